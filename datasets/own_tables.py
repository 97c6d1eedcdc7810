"""Readers and writers of the user's own tables, which may be of any origin and are not trusted.

A table is read as a ``pandas.DataFrame`` whose columns have names. Its cells may be numbers, text
or anything else, or be missing: which columns can be used is told by ``columns.py``.
"""

import contextlib
import csv
import gzip
import io
import itertools
import math
import os
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import pandas as pd

from common.bounds import memory_limit, open_regular, read_after_trial, read_bounded
from common.errors import UserError, one_line, truncate
from common.files import write_atomically

from .cache import map_npy

# Of the tables that can be read, and of those that can be written.
SUFFIXES = ('.csv', '.tsv', '.csv.gz', '.tsv.gz', '.npy', '.h5', '.hdf5', '.parquet')
NEW_SUFFIXES = ('.csv', '.npy', '.h5')

# Formats whose libraries a damaged file can crash, or keep busy for ever
READ_AFTER_TRIAL = ('.h5', '.hdf5', '.parquet')

MAX_COLUMNS = 2**16 - 1  # pandas takes minutes for a million
MAX_MEMBERS = 5_000  # of a group of a .h5
MAX_BLANK_LINES = 1_000  # before the first row of a text
MAX_H5_COLUMNS = 4_000  # HDF5 keeps their names in an attribute of 64 KiB
MAX_LINE_BYTES = 2**22  # of a text; a parser keeps whole lines
WIDE = 1_000  # columns; pandas parses fewer in blocks of rows, which takes less memory

MIN_PYARROW = 15  # earlier ones may run code that a file brings along

UNNAMED_FIRST = 'Unnamed: 0'  # what pandas calls a first column that has no name
PICKLED = 'pickled_columns'  # the attribute of a DataFrame that lists its columns without values

# What the readers raise for files that are damaged or something else than their names say.
# EOFError and zlib.error are those of gzip.
DAMAGED_TABLE_ERRORS = (
    OSError,
    ValueError,
    MemoryError,
    OverflowError,
    RuntimeError,
    csv.Error,
    EOFError,
    zlib.error,
)


def table_suffix(name: str | Path) -> str:
    """Return the end of a file's name that says how it is stored, such as ``.csv.gz``."""
    path = Path(name)
    return ''.join(path.suffixes[-2:]) if path.suffix == '.gz' else path.suffix


def is_own_table(name: str) -> bool:
    """Return whether ``name`` is the path of a table of the user's own, not a known data set."""
    return table_suffix(name) in SUFFIXES


# ---------------------------------------------------------------------------------------- readers


def read_frame(path: str | Path) -> pd.DataFrame:
    """Read a table of the user's own.

    Its columns have different names of printable text: ``column 0``, ``column 1`` and so on where
    the file has no names. Text stays text, and cells may be missing. Columns that the file holds
    as pickles are not read: their cells are missing, and ``frame.attrs[PICKLED]`` lists them.

    Raises ``UserError`` if the file cannot be read as a table.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f'{path}: no such table')
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        **dict.fromkeys(['.csv', '.tsv', '.csv.gz', '.tsv.gz'], read_text),
        **dict.fromkeys(['.h5', '.hdf5'], read_h5),
        '.npy': read_npy,
        '.parquet': read_parquet,
    }
    suffix = table_suffix(path)
    if suffix not in readers:
        raise UserError(f'{path} should end in {", ".join(SUFFIXES)}')

    try:
        with warnings.catch_warnings():
            # pandas warns of columns of several types, which are refused if they are used.
            warnings.simplefilter('ignore')
            read = read_after_trial if suffix in READ_AFTER_TRIAL else read_bounded
            frame = read(readers[suffix], path)
    except DAMAGED_TABLE_ERRORS as error:
        raise UserError(f'{path} cannot be read as a table: {one_line(error)}') from error
    require_column_names(frame, path)
    return frame


def require_column_names(frame: pd.DataFrame, source: str | Path) -> None:
    """Raise ``UserError`` unless the columns of a table have different names of printable text."""
    for name, n in Counter(frame.columns).items():
        if not isinstance(name, str) or not name.isprintable() or n > 1:
            raise UserError(
                f'{source}: the column name {truncate(str(name))!r} is no printable text, '
                'or comes twice'
            )


def named_frame(values: np.ndarray, names: Sequence[str] = ()) -> pd.DataFrame:
    """Return values (N, D) as a table, with numbered columns unless there are D names."""
    if len(names) != values.shape[1]:
        names = [f'column {k}' for k in range(values.shape[1])]
    return pd.DataFrame(values, columns=pd.Index(names, dtype=object), copy=False)


def is_unnamed(columns: Sequence[str]) -> bool:
    """Return whether the names of columns are the numbers that a file without names gets."""
    return all(re.fullmatch(r'column \d+', name) for name in columns)


# ------------------------------------------------------------------------------------------- text


class BoundedLineFile(io.RawIOBase):
    """The bytes of a text, whose lines have to be short.

    Reading raises ``ValueError`` at a line of more than ``max_line_bytes``, and after more than
    ``max_bytes`` in all, if that is given. A parser that reads whole lines thus takes little
    memory, whatever the file.
    """

    def __init__(
        self,
        file: BinaryIO | gzip.GzipFile,
        max_line_bytes: int,
        max_bytes: float = math.inf,
    ) -> None:
        self.file = file
        self.max_line_bytes, self.max_bytes = max_line_bytes, max_bytes
        self.n_read = 0
        self.unfinished_line = b''

    def readable(self) -> bool:
        """Return True: ``io.BufferedReader`` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with the next bytes, and return how many there were."""
        try:
            content = self.file.read(len(buffer))
        except MemoryError as error:
            raise ValueError('out of memory') from error  # pandas would hide a MemoryError
        if b'\0' in content:
            raise ValueError('it has zero bytes, which no text has')
        self.n_read += len(content)
        if self.n_read > self.max_bytes:
            raise ValueError(f'it holds more than {self.max_bytes:,} bytes, too many for its size')

        lines = (self.unfinished_line + content).split(b'\n')
        if max(map(len, lines)) > self.max_line_bytes:
            raise ValueError(f'it has a line of more than {self.max_line_bytes:,} bytes')
        self.unfinished_line = lines[-1]
        buffer[: len(content)] = content
        return len(content)


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Open a text, gzipped or not, for reading its bytes; see ``BoundedLineFile``."""
    with open_regular(path) as file:
        content = gzip.open(file) if path.suffix == '.gz' else file
        lines = BoundedLineFile(content, MAX_LINE_BYTES, memory_limit(path))
        yield io.BufferedReader(lines, 2**18)


def read_text(path: Path) -> pd.DataFrame:
    """Read a text of columns between commas or tabs, with or without names; see ``read_frame``.

    A first column without a name, but with names beside it, is called ``UNNAMED_FIRST``.
    """
    separator = '\t' if table_suffix(path).startswith('.tsv') else ','
    first_row = read_first_row(path, separator)
    has_header = is_header(first_row)
    with open_text(path) as file:
        frame = pd.read_csv(
            file,
            sep=separator,
            header=0 if has_header else None,
            skipinitialspace=True,
            encoding='utf-8-sig',
            float_precision='round_trip',  # exact in all versions of pandas
            low_memory=len(first_row) < WIDE,  # so many columns in many blocks take minutes
        )

    # pandas takes superfluous first cells for names of the rows.
    if not isinstance(frame.index, pd.RangeIndex):
        raise UserError(f'{path}: its rows have more cells than its header')
    if frame.empty:
        raise UserError(f'{path} has no rows')

    names = [str(name) if has_header else f'column {name}' for name in frame.columns]
    frame.columns = pd.Index(names, dtype=object)
    return frame


def read_first_row(path: Path, separator: str) -> list[str]:
    """Return the cells of the first row of a text that is not empty.

    Raises ``UserError`` where they are too many, or separated by something else.
    """
    with open_text(path) as file:
        lines = io.TextIOWrapper(file, newline='', encoding='utf-8-sig')
        rows = csv.reader(lines, delimiter=separator)
        cells = next((row for row in itertools.islice(rows, MAX_BLANK_LINES) if row), None)
        if cells is None and next(rows, None) is not None:
            raise UserError(f'{path} begins with more than {MAX_BLANK_LINES:,} empty lines')
        cells = cells or ['']

    others = ';\t' if separator == ',' else ';,'
    other = next((character for character in others if character in cells[0]), '')
    if len(cells) == 1 and other:
        raise UserError(f'{path} has {other!r} between its cells: {separator_advice(other)}')
    if len(cells) > MAX_COLUMNS:
        raise UserError(f'{path} has {len(cells)} columns, {MAX_COLUMNS} are the most')
    return cells


def separator_advice(separator: str) -> str:
    """Return what to do with a text that has a separator which its name does not promise."""
    if separator == ';':
        return 'save it with commas there, and points in its numbers'
    suffix = '.tsv' if separator == '\t' else '.csv'
    return f'give it a name that ends in {suffix}'


def is_header(cells: list[str]) -> bool:
    """Return whether the cells of a first row are names of columns.

    They are where one of them is no number, or where they are 0, 1, 2 ...: this is how pandas
    writes columns without names.
    """
    numbers = [str(k) for k in range(len(cells))]
    is_numbered = [cell.strip() for cell in cells] == numbers
    return is_numbered or not all(is_number_or_empty(cell) for cell in cells)


def is_number_or_empty(cell: str) -> bool:
    """Return whether a cell of a text holds a number, or nothing."""
    try:
        float(cell)
    except ValueError:
        return not cell.strip()
    return True


# ------------------------------------------------------------------------------------ .npy, .h5


def read_npy(path: Path) -> pd.DataFrame:
    """Read a .npy file; see ``read_frame``. Its columns are numbered."""
    return named_frame(to_float_table(map_npy(path), path))


def to_float_table(values: np.ndarray, path: Path) -> np.ndarray:
    """Return an array as float64; raise ``UserError`` unless it is a table of real numbers."""
    if not is_table(values):
        raise UserError(
            f'{path} holds {values.dtype} of shape {values.shape}, not a table of numbers'
        )
    return np.asarray(values, np.float64)


def is_table(values: np.ndarray) -> bool:
    """Return whether an array is two-dimensional, of real numbers, and not empty."""
    return values.ndim == 2 and values.dtype.kind in 'fiu' and values.size > 0


def read_h5(path: Path) -> pd.DataFrame:
    """Read a .h5 file; see ``read_frame``.

    It is one of pandas (``DataFrame.to_hdf``), or has one two-dimensional data set, whose attribute
    ``columns`` may have the names of its columns.
    """
    with open_h5(path) as file:
        pandas_tables = find_pandas_tables(file)
        if pandas_tables:
            return read_pandas_h5(file, pandas_tables, path)
        table = find_h5_table(file, path)
        values = to_float_table(H5Reader(path).read(table), path)
        attribute = np.atleast_1d(table.attrs.get('columns', ()))
    return named_frame(values, [str(name) for name in attribute])


@contextlib.contextmanager
def open_h5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading.

    h5py raises ``KeyError`` for damaged objects and ``TypeError`` for types of numbers that numpy
    lacks. Both become ``ValueError``.
    """
    try:
        with h5py.File(path) as file:
            yield file
    except (KeyError, TypeError) as error:
        raise ValueError(one_line(error)) from error


def hard_links(group: h5py.Group) -> dict[str, Any]:
    """Return the members of a group by name, without links that can lead to another file.

    Raises ``ValueError`` where they are so many that it would take long to look at them.
    """
    if len(group) > MAX_MEMBERS:
        raise ValueError(f'it has more than {MAX_MEMBERS:,} members in a group')
    names = [name for name in group if isinstance(group.get(name, getlink=True), h5py.HardLink)]
    return {name: group[name] for name in names}


def find_h5_table(file: h5py.File, path: Path) -> h5py.Dataset:
    """Return the only two-dimensional data set at the top of an HDF5 file.

    Raises ``UserError`` where there is none or more than one.
    """
    members = hard_links(file).values()
    tables = [item for item in members if isinstance(item, h5py.Dataset) and item.ndim == 2]
    if len(tables) != 1:
        raise UserError(f'{path} has {len(tables)} two-dimensional data sets at its top, not one')
    return tables[0]


class H5Reader:
    """Reads data sets of an HDF5 file, as far as their size can be in the file.

    HDF5 need not store what it declares. All that is read together may be as large as
    ``memory_limit`` of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.n_left = memory_limit(path)

    def read(self, data: h5py.Dataset) -> np.ndarray:
        """Return the values of a data set.

        Raises ``UserError`` where they are in other files, and where they are too many.
        """
        if data.external or data.is_virtual:
            raise UserError(f'{self.path} takes its table from other files')
        n_read = max(data.size, math.prod(data.chunks or ()))  # HDF5 reads whole chunks
        self.n_left -= n_read * data.dtype.itemsize
        if self.n_left < 0:
            raise UserError(
                f'{self.path} claims to hold a table of shape {data.shape}, but has not the size '
                'for it'
            )
        return data[:]


# ------------------------------------------------------------------------------- .h5 of pandas


def find_pandas_tables(file: h5py.File) -> dict[str, h5py.Group]:
    """Return the groups that pandas has written, at the top of a file or one level below it."""
    groups = {}
    for name, item in hard_links(file).items():
        if not isinstance(item, h5py.Group):
            continue
        if 'pandas_type' in item.attrs:
            groups[name] = item
            continue
        for inner, member in hard_links(item).items():
            if isinstance(member, h5py.Group) and 'pandas_type' in member.attrs:
                groups[f'{name}/{inner}'] = member
    return groups


def read_pandas_h5(file: h5py.File, groups: dict[str, h5py.Group], path: Path) -> pd.DataFrame:
    """Read a DataFrame that ``to_hdf`` has written in the format 'fixed'; see ``read_frame``.

    The columns of each type are in a data set of their own. Text is there as a pickle, which is
    never read.
    """
    if len(groups) != 1:
        first = ', '.join(truncate(name) for name in list(groups)[:8])
        raise UserError(f'{path} holds {len(groups)} tables of pandas, not one: {first}')
    ((_, group),) = groups.items()
    kind = read_attribute(group, 'pandas_type')
    if kind != 'frame':
        raise UserError(
            f'{path} holds a {kind} of pandas, which cannot be read: save it by to_hdf(..., '
            "format='fixed') of a DataFrame, or as .csv"
        )

    reader = H5Reader(path)
    members = hard_links(group)
    order = read_names(members.get('axis0'), reader)
    n_rows = len(members['axis1'])
    columns: dict[str, np.ndarray] = {}
    pickled: list[str] = []
    for k in range(len(order)):
        if f'block{k}_items' not in members:
            break
        names = read_names(members[f'block{k}_items'], reader)
        block = read_block(members[f'block{k}_values'], reader)
        if block is None:
            pickled += names
            block = np.full((n_rows, len(names)), None, object)
        if block.shape != (n_rows, len(names)):
            raise ValueError(f'its block {k} is not {n_rows} rows of {len(names)} columns')
        columns.update(zip(names, block.T))
    return order_columns(columns, order, pickled, path)


def order_columns(
    columns: dict[str, np.ndarray], order: list[str], pickled: list[str], path: Path
) -> pd.DataFrame:
    """Return columns by name as a table. Raises ``ValueError`` where they are not all there."""
    if sorted(columns) != sorted(order):
        raise ValueError('its blocks have other columns than its first axis')
    if not columns or not len(columns[order[0]]):
        raise UserError(f'{path} has no rows')
    frame = pd.DataFrame({name: columns[name] for name in order})
    if all(name.isdecimal() for name in order):  # pandas numbers columns without names
        frame.columns = pd.Index([f'column {name}' for name in order], dtype=object)
        pickled = [f'column {name}' for name in pickled]
    frame.attrs[PICKLED] = pickled
    return frame


def read_attribute(item: h5py.HLObject, name: str) -> str:
    """Return an attribute of pandas as text, empty where there is none."""
    value = item.attrs.get(name, b'')
    return value.decode('utf-8', 'replace') if isinstance(value, bytes) else str(value)


def read_names(data: Any, reader: H5Reader) -> list[str]:
    """Return names of columns. Raises ``UserError`` where they are something other than text."""
    kind = data.dtype.kind if isinstance(data, h5py.Dataset) and data.ndim == 1 else ''
    if kind not in tuple('SUiu'):
        raise UserError(
            f'{reader.path} does not hold the names of its columns as text: save it as .csv'
        )
    if len(data) > MAX_COLUMNS:
        raise UserError(f'{reader.path} has {len(data)} columns, {MAX_COLUMNS} are the most')
    values = reader.read(data)
    return [v.decode('utf-8') if isinstance(v, bytes) else str(v) for v in values.tolist()]


def read_block(data: Any, reader: H5Reader) -> np.ndarray | None:
    """Return the values (N, k) of columns of one type, or None of columns that are pickled."""
    if not isinstance(data, h5py.Dataset):
        raise ValueError('one of its blocks is no data set')
    if data.dtype.kind not in 'fiu' or data.ndim != 2:
        return None
    values = reader.read(data)
    if data.id.get_type().get_class() == h5py.h5t.BITFIELD:
        return values.astype(bool)

    # Dates are stored as whole numbers of a unit; without one it is the nanosecond.
    kind = read_attribute(data, 'value_type')
    found = re.match(r'(datetime|timedelta)64(?:\[(s|ms|us|ns)\b)?', kind)
    if found:
        return values.astype(np.int64).view(f'{found[1]}64[{found[2] or "ns"}]')
    return values


# --------------------------------------------------------------------------------------- .parquet


def read_parquet(path: Path) -> pd.DataFrame:
    """Read a .parquet file; see ``read_frame``. Raises ``UserError`` where pyarrow is missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f'{path}: reading .parquet needs pyarrow: python -m pip install pyarrow, or save the '
            'table as .csv'
        ) from error

    version = int(pyarrow.__version__.partition('.')[0])
    if version < MIN_PYARROW:
        raise UserError(
            f'{path}: reading .parquet needs pyarrow {MIN_PYARROW} or later: '
            'python -m pip install --upgrade pyarrow'
        )

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            require_parquet_size(file.metadata, path)
            table = file.read()
            table.validate(full=True)  # text may be no UTF-8
            # pandas stores an index without a name as a column; metadata of pandas is not trusted
            names = [name for name in table.column_names if not is_index_name(name)]
            columns = {name: arrow_column(table[name]) for name in names}
    except pyarrow.ArrowMemoryError:
        raise
    except (pyarrow.ArrowException, KeyError, TypeError) as error:
        raise ValueError(one_line(error)) from error
    if not columns or not table.num_rows:
        raise UserError(f'{path} has no rows')
    return pd.DataFrame(columns)


def is_index_name(name: str) -> bool:
    """Return whether a column of a .parquet file is an index of pandas that has no name."""
    return re.fullmatch(r'__index_level_\d+__', name) is not None


def require_parquet_size(metadata: Any, path: Path) -> None:
    """Raise ``UserError`` where a .parquet file says to be much larger than it is."""
    groups = [metadata.row_group(k) for k in range(metadata.num_row_groups)]
    n_bytes = sum(group.total_byte_size for group in groups)
    n_bytes = max(n_bytes, 8 * metadata.num_rows * metadata.num_columns)
    if n_bytes > memory_limit(path):
        raise UserError(
            f'{path} claims to hold a table of shape {(metadata.num_rows, metadata.num_columns)}, '
            'but has not the size for it'
        )
    if metadata.num_columns > MAX_COLUMNS:
        raise UserError(f'{path} has {metadata.num_columns} columns, {MAX_COLUMNS} are the most')


def arrow_column(column: Any) -> pd.Series:
    """Return a column of pyarrow for pandas, with decimal numbers as float64."""
    import pyarrow

    if pyarrow.types.is_decimal(column.type):
        return column.cast(pyarrow.float64()).to_pandas()
    return column.to_pandas()


# ---------------------------------------------------------------------------------------- writers


def frame_of_columns(columns: Mapping[str, Any]) -> pd.DataFrame:
    """Return columns (N,) by name as a table."""
    return pd.DataFrame(dict(columns))


def require_new_table(path: Path, overwrite: bool = False) -> None:
    """Raise ``UserError`` unless ``save_table`` can write a file there, a new one by default."""
    if path.suffix not in NEW_SUFFIXES:
        raise UserError(f'{path} should end in .csv, .npy or .h5')
    if path.is_dir():
        raise UserError(f'{path} is a folder: give another name')
    if path.exists() and not overwrite:
        raise UserError(
            f'{path} is there already: give another name, or add --overwrite to replace it'
        )
    if not path.parent.is_dir():
        raise UserError(f'{path}: there is no folder {path.parent}')
    if not os.access(path.parent, os.W_OK):
        raise UserError(f'{path}: the folder cannot be written to')


def save_table(path: str | Path, table: pd.DataFrame) -> None:
    """Save a table as a .csv, .npy or .h5, and say so.

    Raises ``UserError`` where a .npy or .h5 would have to hold something other than numbers.
    """
    path = Path(path)
    if path.suffix != '.csv':
        require_numbers(table, path)
    if path.suffix == '.h5':
        require_h5_names(table.columns, path)
    write_atomically(path, lambda temporary: write_table(temporary, path.suffix, table))
    print(f'wrote {path}')


def require_numbers(table: pd.DataFrame, path: Path) -> None:
    """Raise ``UserError`` where a table has columns that are not of numbers."""
    others = []
    for name, dtype in table.dtypes.items():
        if not (isinstance(dtype, np.dtype) and dtype.kind in 'fiub'):
            others.append(truncate(str(name)))
    if others:
        raise UserError(
            f'{path} can only hold numbers, and {", ".join(others[:8])} is text: '
            'give a name that ends in .csv'
        )


def require_h5_names(names: Collection[str], path: Path) -> None:
    """Raise ``UserError`` where a .h5 cannot keep the names of so many columns."""
    if len(names) > MAX_H5_COLUMNS:
        raise UserError(
            f'{path} would have {len(names):,} columns, and an .h5 keeps the names of '
            f'{MAX_H5_COLUMNS:,} at most: give a name that ends in .csv'
        )


def write_table(path: Path, suffix: str, table: pd.DataFrame) -> None:
    """Write a table in the format of ``suffix``; a .npy holds no names of columns."""
    if suffix == '.csv':
        table.to_csv(path, index=False)
        return

    # numpy and h5py do not say that a disk is full, so they write to memory.
    content = io.BytesIO()
    values = table.to_numpy(np.float64)
    if suffix == '.npy':
        np.save(content, values)
    else:
        with h5py.File(content, 'w') as file:
            rows = file.create_dataset('rows', data=values)
            rows.attrs['columns'] = [str(name) for name in table.columns]
    path.write_bytes(content.getbuffer())
