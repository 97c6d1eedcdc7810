"""Tables of numbers: two-dimensional problems, five published tables, and the user's own files.

The published tables are those of the MAF paper (Papamakarios et al., 2017, appendix D), prepared as
by its authors. They are read from the authors' files (Zenodo, record 1161203) or from the raw
downloads: of the UCI repository or, for BSDS300, the Berkeley images.
"""

import contextlib
import csv
import difflib
import gzip
import io
import lzma
import math
import re
import tarfile
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol

import h5py
import numpy as np
import pandas as pd
from numpy.random import Generator
from PIL import Image
from tqdm import tqdm

from common.errors import UserError, index_of_name, one_line, truncate
from common.files import digest, file_signature, first_existing, write_atomically

from .cache import CreateArray, map_npy, memmap_cache
from .images import DAMAGED_IMAGE_ERRORS
from .pickles import read_pickled_table
from .toy import ENERGIES, SAMPLERS, Energy, Sampler, log_normaliser

SUFFIXES = ('.csv', '.npy', '.h5', '.hdf5')  # of the tables that can be read
NEW_SUFFIXES = ('.csv', '.npy', '.h5')  # of the tables that can be written
CACHE_VERSION = 1  # to be raised whenever the same source gives other rows than before

N_VALIDATION, N_TEST = 5_000, 50_000  # rows of the two-dimensional problems
CHUNK_ROWS = 50_000  # rows of a text that are parsed at once; a multiple of 4, which GAS needs

# No published table reaches these limits. They keep a damaged or hostile file from taking all
# memory.
MAX_LINE_BYTES = 4_096
MAX_ROWS = 20_000_000
MAX_PIXELS = 2**20  # the Berkeley images have 481 x 321

# The same for the user's own tables.
MAX_COLUMNS = 2**16 - 1  # pandas takes minutes for a million
MAX_COMPRESSION = 1_000  # how many times larger a table can be than its file

# The cell of a level begins this much below it, in steps: a value may be rounded, as to float32.
ROUNDING = 1e-4

# What the readers raise for files that are damaged or something else than their names say: the
# readers of numbers, of gzip (EOFError, zlib.error), of archives (zipfile's RuntimeError means an
# encrypted or unknown kind of zip file) and Pillow (SyntaxError for a broken PNG).
DAMAGED_FILE_ERRORS = (
    OSError,
    ValueError,
    MemoryError,
    OverflowError,
    RuntimeError,
    csv.Error,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    SyntaxError,
    Image.DecompressionBombError,
)

# Notes about a table, shown before training.
DISCRETE_NOTE = (
    'few distinct values. The likelihood of discrete columns is unbounded: '
    'drop them or add --dequantize'
)
DEPENDENT_NOTE = (
    'some columns follow exactly from others, such as copies or sums. '
    'The likelihood of such rows is unbounded: drop these columns'
)

Counts = tuple[int, int, int]  # rows of the training, validation and test splits
MapColumn = Callable[[np.ndarray, np.ndarray, float], np.ndarray]  # of a column, levels and step

# Of each published table: the rows of its splits, its columns, and the files it can be read from in
# order of preference, the MAF authors' own first and then the raw ones.
TABLES: dict[str, tuple[Counts, int, list[str]]] = {
    'power': (
        (1_659_917, 184_435, 204_928),
        6,
        ['power/data.npy', 'household_power_consumption.txt'],
    ),
    'gas': (
        (852_174, 94_685, 105_206),
        8,
        ['gas/ethylene_CO.pickle', 'ethylene_CO.txt'],
    ),
    'hepmass': (
        (315_123, 35_013, 174_987),
        21,
        ['hepmass/1000_train.csv', '1000_train.csv', '1000_train.csv.gz'],
    ),
    'miniboone': (
        (29_556, 3_284, 3_648),
        43,
        ['miniboone/data.npy', 'MiniBooNE_PID.txt'],
    ),
    'bsds300': (
        (1_000_000, 50_000, 250_000),
        63,
        ['BSDS300/BSDS300.hdf5', 'bsds300_gray.zip', 'BSDS300-images.tgz'],
    ),
}


@dataclass(frozen=True)
class TableData:
    """Rows to train on, to validate on and to test on, and what their columns mean.

    All rows are float32 and standardised. In the table's own units they are ``mean + std * row``,
    which is what ``to_own_units`` returns.
    """

    # The splits, each of shape (N, D). A two-dimensional problem has no training split, as it draws
    # new rows instead. All three are None where only the units of a table are known.
    train: np.ndarray | None
    validation: np.ndarray | None
    test: np.ndarray | None

    # The names of the D columns.
    columns: tuple[str, ...]

    # Mean and standard deviation of the training rows, each (D,) float64, in the table's own units.
    # 0 and 1 for published tables, whose units are those that their authors prepared them in.
    mean: np.ndarray
    std: np.ndarray

    # ``sampler(rng, n)`` returns n new training rows, (n, D) float32. None with ``train``.
    sampler: Sampler | None = None

    # The energy U(x) of a density exp(-U) / Z, in nats, for points (..., D); ``log_z`` is the
    # logarithm of Z. A model of it is trained on the energy itself: the rows are Gaussian noise.
    energy: Energy | None = None
    log_z: float = 0.0

    # Which rows of the user's file, or of the test file, the test split consists of: (N_test,).
    test_index: np.ndarray | None = None

    # Warnings about the table, each a line to be shown before training.
    notes: tuple[str, ...] = ()

    # The distance between neighbouring values of each discrete column, (D,), in the table's own
    # units. Uniform noise of this width dequantizes it. 0 for all other columns.
    steps: np.ndarray | float = 0.0

    # For each of the D columns the values of the table without that noise, in increasing order;
    # none where it is not dequantized. Empty where no column is.
    levels: tuple[np.ndarray, ...] = ()

    # Identifies the rows, wherever they are stored: the same on all machines. Empty if not known.
    fingerprint: str = ''

    def column_index(self, text: str) -> int:
        """Return the index of a column that is given by its index or its name.

        Raises ``UserError`` with the nearest names if there is no such column.
        """
        return index_of_name(text, self.columns, 'column')

    def to_own_units(self, rows: np.ndarray) -> np.ndarray:
        """Return standardised rows (N, D) in the table's own units."""
        return rows * self.std + self.mean

    def quantize(self, rows: np.ndarray) -> np.ndarray:
        """Return rows (N, D) in the table's own units, with discrete columns on their levels.

        It undoes ``dequantize_columns``, which spreads a level over a cell: from the level to one
        step above it. Each value becomes the level of the nearest cell, hence a value below all
        cells the lowest level, and one above them the highest. Levels need not be equidistant.
        """
        return self.map_discrete(rows, nearest_levels)

    def map_discrete(self, rows: np.ndarray, function: MapColumn) -> np.ndarray:
        """Return rows (N, D) with ``function(column, levels, step)`` for each column of levels."""
        rows = rows.copy()
        steps = np.broadcast_to(self.steps, len(self.columns))
        for k, levels in enumerate(self.levels):
            if len(levels):
                rows[:, k] = function(rows[:, k], levels, steps[k])
        return rows

    def head(self, n: int) -> np.ndarray:
        """Return up to n rows in the table's own units: of the test split, then of the others."""
        splits = (self.test, self.validation, self.train)
        heads = [split[:n] for split in splits if split is not None]
        return self.to_own_units(np.concatenate(heads)[:n])


class TableOptions(Protocol):
    """The options of a run that say which table it learns, and how the table is split."""

    dataset: str
    data_dir: str
    seed: int
    test_file: str
    dequantize: bool
    max_rows: int


def load_table(
    name: str,
    data_dir: str | Path = 'data',
    seed: int = 0,
    test_file: str | Path = '',
    dequantize: bool = False,
) -> TableData:
    """Load a two-dimensional problem, a published table, or a table of the user's own.

    Arguments:
        name: one of ``SAMPLERS``, ``ENERGIES`` or ``TABLES``, or the path of the user's own table.
        data_dir: the folder of the published tables.
        seed: splits the user's own table at random.
        test_file: the path of a table to test on; without it, the user's own table is split.
        dequantize: whether to add uniform noise to the discrete columns of the user's own table.

    Raises ``UserError`` where there is no such table or it cannot be used.
    """
    if name in SAMPLERS or name in ENERGIES:
        return load_toy_problem(name)
    if name in TABLES:
        return load_published_table(name, Path(data_dir))
    if is_own_table(name):
        return load_user_table(Path(name), seed, test_file, dequantize)

    known = [*SAMPLERS, *ENERGIES, *TABLES]
    near = difflib.get_close_matches(name, known, n=1)
    guess = f', perhaps {near[0]}' if near else ''
    raise UserError(
        f'unknown data set {name!r}{guess}: there are {", ".join(known)}, '
        f'and any table ({" ".join(SUFFIXES)})'
    )


def load_run_table(
    config: TableOptions, saved: dict[str, Any] | None, needs_rows: bool = True
) -> TableData:
    """Load the table that a run is about.

    Arguments:
        config: the options of the run.
        saved: the checkpoint of the run, or None for a new one. The table is split as it was then,
            and has to have the same rows, but may have moved.
        needs_rows: whether rows are needed. If not, the table of a saved run is not read, unless
            it has moved or is a two-dimensional problem, and the result has units only.

    Raises ``UserError`` where the table is not the one that the model was trained on.
    """
    saved_units = None
    if saved:
        saved_units = table_from_units(saved['units'], saved['input_dims'][0], saved['path'])
        saved_units = replace(saved_units, fingerprint=saved['fingerprint'])
        is_toy_problem = config.dataset in SAMPLERS or config.dataset in ENERGIES
        if not needs_rows and not is_toy_problem and not has_moved(config, saved['config']):
            return saved_units
        require_tables(config)

    seed = saved['config'].seed if saved else config.seed
    data = load_table(config.dataset, config.data_dir, seed, config.test_file, config.dequantize)
    if saved and saved_units:
        name = describe_tables(config, saved['config'])
        require_same_table(data, saved_units, name)
    if config.max_rows and data.train is not None:
        data = replace(data, train=data.train[: config.max_rows])
    return data


def is_own_table(name: str) -> bool:
    """Return whether ``name`` is the path of a table of the user's own, not a known data set."""
    return Path(name).suffix in SUFFIXES


def has_moved(config: TableOptions, saved: TableOptions) -> bool:
    """Return whether the options of a run name other tables than those that were saved."""
    return (config.dataset, config.test_file) != (saved.dataset, saved.test_file)


def describe_tables(config: TableOptions, saved: TableOptions) -> str:
    """Return the tables of a run as text, with those that were saved where they have moved."""
    pairs = [(config.dataset, saved.dataset), (config.test_file, saved.test_file)]
    texts = [new if new == old else f'{new} (in place of {old})' for new, old in pairs if new]
    return ' or '.join(texts)


def require_tables(config: TableOptions) -> None:
    """Raise ``UserError`` where the user's own tables are not where a saved run had them."""
    for option, path in (('dataset', config.dataset), ('test_file', config.test_file)):
        if is_own_table(path) and not Path(path).is_file():
            raise UserError(
                f'{path}: no such table; if it has moved, give --{option}=NEWPATH and the '
                "run's --restore_file"
            )


def load_toy_problem(name: str) -> TableData:
    """Return the two-dimensional problem of that name, with held-out rows that never change.

    The rows of an energy are standard Gaussian noise.
    """
    energy = ENERGIES.get(name)
    sample = SAMPLERS.get(name, draw_gaussian_noise)

    def sampler(rng: Generator, n: int) -> np.ndarray:
        return sample(rng, n).astype(np.float32)

    return TableData(
        train=None,
        validation=sampler(np.random.default_rng((10**9, 0)), N_VALIDATION),
        test=sampler(np.random.default_rng((10**9, 1)), N_TEST),
        columns=('x1', 'x2'),
        mean=np.zeros(2),
        std=np.ones(2),
        sampler=sampler,
        energy=energy,
        log_z=log_normaliser(energy) if energy else 0.0,
        test_index=np.arange(N_TEST),
        fingerprint=digest([name]),
    )


def draw_gaussian_noise(rng: Generator, n: int) -> np.ndarray:
    """Draw n points (n, 2) of the standard normal distribution."""
    return rng.normal(size=(n, 2))


# ------------------------------------------------------------------------- units in a checkpoint


def table_units(data: TableData) -> dict[str, list]:
    """Return the units of a table as plain values, to be saved in a checkpoint."""
    return {
        'columns': list(data.columns),
        'mean': data.mean.tolist(),
        'std': data.std.tolist(),
        'steps': np.broadcast_to(data.steps, len(data.columns)).tolist(),
        'levels': [levels.tolist() for levels in data.levels] or [[] for _ in data.columns],
    }


def table_from_units(units: dict[str, list], n_columns: int, path: str | Path) -> TableData:
    """Return a table without rows that has the given units, those of the checkpoint at ``path``.

    Raises ``UserError`` unless they are the units of ``n_columns`` columns.
    """
    mean, std = np.array(units['mean']), np.array(units['std'])
    steps = np.array(units['steps'])
    levels = tuple(np.array(values) for values in units['levels'])
    is_valid = (
        all(len(values) == n_columns for values in units.values())
        and ''.join(units['columns']).isprintable()
        and np.isfinite([mean, std, steps]).all()
        and (std > 0).all()
        and all(np.isfinite(values).all() for values in levels)
        and all((np.diff(values) > 0).all() for values in levels)
    )
    if not is_valid:
        raise UserError(f'{path} is damaged: its columns and its units do not fit')
    columns = tuple(units['columns'])
    return TableData(None, None, None, columns, mean, std, steps=steps, levels=levels)


def require_same_table(data: TableData, expected: TableData, name: str) -> None:
    """Raise ``UserError`` unless two tables have the same rows, and the same units.

    The units also tell another split of the same rows, and have to do where the expected table
    comes from a checkpoint that is too old to have a fingerprint.
    """
    is_same = (
        expected.fingerprint in ('', data.fingerprint)
        and data.columns == expected.columns
        and np.allclose(data.mean, expected.mean)
        and np.allclose(data.std, expected.std)
    )
    if not is_same:
        raise UserError(
            f'{name} is not what it was when the model was trained: bring back the table of then, '
            'score new rows by --evaluate --input=FILE, or train a new model'
        )


# ------------------------------------------------------------------------------ the user's tables


def load_user_table(path: Path, seed: int, test_file: str | Path, dequantize: bool) -> TableData:
    """Load a table of the user's own, standardised by its training split.

    It is split 80/10/10% at random, or 90/10% into training and validation where there is a
    ``test_file`` to test on.
    """
    values, columns = read_table(path)
    check_user_table(values, columns, path)
    test_values = read_columns(test_file, columns) if test_file else values[:0]
    fingerprint = table_fingerprint(values, test_values, columns)

    discrete = find_discrete_columns(values)
    levels, steps = find_levels(values, discrete if dequantize else [])
    if steps.any():
        values = dequantize_columns(values, steps)

    train, validation, test = split_at_random(len(values), seed, with_test=not test_file)
    if len(train) < len(columns):
        raise UserError(
            f'{path} has {len(values)} rows of {len(columns)} columns: '
            'too few to train, validate and test on'
        )

    mean, std = training_units(values[train], columns, path)
    train_rows, validation_rows, test_rows = (
        standardise_rows(values[np.sort(index)], mean, std, path)
        for index in (train, validation, test)
    )
    still_discrete = [] if dequantize else [columns[k] for k in discrete]
    data = TableData(
        train_rows,
        validation_rows,
        test_rows,
        columns,
        mean,
        std,
        test_index=np.sort(test),
        notes=likelihood_notes(values[train], still_discrete),
        steps=steps,
        levels=levels,
        fingerprint=fingerprint,
    )
    if test_file:
        test_rows = rows_of_values(test_values, data, test_file)
        data = replace(data, test=test_rows, test_index=np.arange(len(test_rows)))
    return data


def table_fingerprint(values: np.ndarray, test_values: np.ndarray, columns: tuple[str, ...]) -> str:
    """Return a digest of the user's own rows (N, D) as they were read, and of those to test on."""
    counts = [len(values), len(test_values)]
    little_endian = [part.astype('<f8', copy=False) for part in (values, test_values)]
    return digest([columns, counts], little_endian)


def check_user_table(values: np.ndarray, columns: tuple[str, ...], path: Path) -> None:
    """Raise ``UserError`` where a table (N, D) has too few rows or a constant column."""
    if len(values) < len(columns) or len(values) < 10:
        raise UserError(
            f'{path} has {len(values)} rows and {len(columns)} columns: '
            'a density needs many more rows than columns'
        )
    is_constant = (values == values[:1]).all(axis=0)
    if is_constant.any():
        names = ', '.join(columns[k] for k in np.flatnonzero(is_constant))
        raise UserError(f'{path}: column {names} is constant: leave it out')


def find_discrete_columns(values: np.ndarray) -> list[int]:
    """Return which columns have few distinct values: at most 10, or 5% of the number of rows."""
    few = max(10, len(values) // 20)
    n_distinct = [len(np.unique(column)) for column in values.T]
    return [k for k, n in enumerate(n_distinct) if n <= few]


def find_levels(
    values: np.ndarray, discrete: Sequence[int]
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Return the levels of each of D columns, none for those that are not discrete, and D steps.

    A step is the smallest distance between two levels, or 0 where there are none.
    """
    levels = [np.empty(0)] * values.shape[1]
    steps = np.zeros(values.shape[1])
    for k in discrete:
        levels[k] = distinct_levels(values[:, k])
        steps[k] = np.diff(levels[k]).min()
    return tuple(levels), steps


def distinct_levels(column: np.ndarray) -> np.ndarray:
    """Return the different values of a column in increasing order, to 15 significant digits.

    Values that differ by rounding alone, such as 0.3 and 0.1 + 0.2, are the same level.
    """
    values = np.unique(column)
    levels = np.unique([float(f'{value:.15g}') for value in values])
    return levels if len(levels) > 1 else values


def nearest_levels(column: np.ndarray, levels: np.ndarray, step: float) -> np.ndarray:
    """Return for each value the level whose cell, from it to one step above it, is nearest."""
    borders = (levels[:-1] + levels[1:] + step) / 2 - ROUNDING * step
    return levels[np.searchsorted(borders, column, side='right')]


def likelihood_notes(values: np.ndarray, discrete: Sequence[str]) -> tuple[str, ...]:
    """Return notes about what makes the likelihood of a table unbounded.

    Arguments:
        values: the training rows (N, D).
        discrete: the names of the discrete columns, of which the note gives the first eight.
    """
    notes = []
    if discrete:
        names = ', '.join(discrete[:8]) + (' ...' if len(discrete) > 8 else '')
        notes.append(f'{names}: {DISCRETE_NOTE}')
    if has_dependent_columns(values):
        notes.append(DEPENDENT_NOTE)
    return tuple(notes)


def has_dependent_columns(values: np.ndarray) -> bool:
    """Return whether some columns are a linear function of others."""
    if values.shape[1] == 1:
        return False
    correlation = np.corrcoef(values, rowvar=False)
    return np.linalg.eigvalsh(correlation)[0] < 1e-10


def split_at_random(
    n_rows: int, seed: int, with_test: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the indices, in random order, of training, validation and test rows.

    A tenth of the rows is for validation and, ``with_test``, another tenth for testing.
    """
    order = np.random.default_rng(seed).permutation(n_rows)
    tenth = n_rows // 10
    rest, last = np.split(order, [n_rows - tenth])
    if not with_test:
        return rest, last, order[:0]
    train, validation = np.split(rest, [n_rows - 2 * tenth])
    return train, validation, last


def training_units(
    values: np.ndarray, columns: tuple[str, ...], path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation, each (D,), of the training rows (N, D).

    Raises ``UserError`` where a column is constant.
    """
    with np.errstate(over='ignore'):  # standardise_rows refuses values that are too large
        mean, std = values.mean(axis=0), values.std(axis=0)
    if (std == 0).any():
        name = columns[int(np.argmin(std))]
        raise UserError(f'{path}: column {name} is constant in the training split: leave it out')
    return mean, std


def standardise_rows(
    values: np.ndarray, mean: np.ndarray, std: np.ndarray, path: str | Path
) -> np.ndarray:
    """Return the standardised rows (N, D) as float32.

    Raises ``UserError`` where a value or a standard deviation is too large for it.
    """
    with np.errstate(over='ignore', invalid='ignore'):
        rows = ((values - mean) / std).astype(np.float32)
    is_finite = np.isfinite(rows).all() and np.isfinite(std).all()
    if not is_finite:
        largest = np.abs(values).max()
        raise UserError(f'{path} holds values that are too large for float32: {largest:g}')
    return rows


def dequantize_columns(values: np.ndarray, steps: np.ndarray | float) -> np.ndarray:
    """Add uniform noise to discrete columns: each value is spread evenly over its step.

    The step is the smallest distance between two levels of a column. Where its levels are not
    equidistant, as 0, 1 and 2.5, gaps remain between the values that they are spread over.

    Arguments:
        values: the rows (N, D), in the table's own units.
        steps: the step of each column (D,); 0 where a column is not discrete.
    """
    return values + steps * np.random.default_rng(0).random(values.shape)


def remove_noise(column: np.ndarray, levels: np.ndarray, step: float) -> np.ndarray:
    """Return a discrete column with each value in the cell of a level put back on that level.

    Values outside all cells are new to the table and stay as they are.
    """
    nearest = nearest_levels(column, levels, step)
    is_in_cell = (column >= nearest - ROUNDING * step) & (column < nearest + step)
    return np.where(is_in_cell, nearest, column)


def read_rows(path: str | Path, like: TableData) -> np.ndarray:
    """Read a table of the user's own as rows (N, D) in the units of another.

    Named columns may be in any order. A further column ``log_likelihood`` at the end, as generated
    rows have it, is left out. Raises ``UserError`` where the columns differ.
    """
    return rows_of_values(read_columns(path, like.columns), like, path)


def read_columns(path: str | Path, columns: tuple[str, ...]) -> np.ndarray:
    """Read the values (N, D) of a table of the user's own that has these columns."""
    values, names = read_table(path)
    if names[-1] == 'log_likelihood' and len(names) == len(columns) + 1:
        values, names = values[:, :-1], names[:-1]
    return reorder_columns(values, names, columns, path)


def rows_of_values(values: np.ndarray, like: TableData, path: str | Path) -> np.ndarray:
    """Return values (N, D), those of the file at ``path``, as rows in the units of a table.

    Discrete columns are spread once, even where they already were.
    """
    on_levels = like.map_discrete(values, remove_noise)
    values = dequantize_columns(on_levels, like.steps)
    return standardise_rows(values, like.mean, like.std, path)


def reorder_columns(
    values: np.ndarray,
    names: tuple[str, ...],
    wanted: tuple[str, ...],
    path: str | Path,
) -> np.ndarray:
    """Return the columns of a table (N, D) in the order of ``wanted``.

    Where either has no names, columns are taken to be in order already. Raises ``UserError`` where
    there are more, fewer or other columns than wanted.
    """
    if len(names) != len(wanted):
        raise UserError(
            f'{path} has {len(names)} columns, and the model was trained on {len(wanted)}: '
            f'{", ".join(wanted)}'
        )
    if names == wanted or is_unnamed(names) or is_unnamed(wanted):
        return values
    if set(names) != set(wanted):
        raise UserError(
            f'{path} has columns {", ".join(names)}, and the model was trained on '
            f'{", ".join(wanted)}'
        )
    return values[:, [names.index(name) for name in wanted]]


def is_unnamed(columns: tuple[str, ...]) -> bool:
    """Return whether the names of columns are the numbers that a file without names gets."""
    return all(re.fullmatch(r'column \d+', name) for name in columns)


# -------------------------------------------------------------------------- readers of own tables


def read_table(path: str | Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read a table of the user's own: its values (N, D), float64, and the names of its columns.

    Raises ``UserError`` if it cannot be read or has missing or infinite values.
    """
    values, columns = read_numbers(path)
    is_bad = ~np.isfinite(values)
    if is_bad.any():
        row, column = np.argwhere(is_bad)[0]
        raise UserError(
            f'{path}: {int(is_bad.sum())} missing or infinite values, the first in column '
            f'{columns[column]}, row {row}: drop those rows or fill them in'
        )
    return values, columns


def read_numbers(path: str | Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read values (N, D), which may be missing, and the names of the columns.

    The file is a .csv with or without a header, a .npy, or a .h5 with one two-dimensional data set.
    Raises ``UserError`` if it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f'{path}: no such table')
    readers = {'.csv': read_csv, '.npy': read_npy, '.h5': read_h5, '.hdf5': read_h5}
    if path.suffix not in readers:
        raise UserError(f'{path} should end in {", ".join(readers)}')

    try:
        with warnings.catch_warnings():
            # pandas warns of columns of several types, which read_csv refuses.
            warnings.simplefilter('ignore')
            values, columns = readers[path.suffix](path)
    except DAMAGED_FILE_ERRORS as error:
        raise UserError(f'{path} cannot be read as a table: {one_line(error)}') from error

    for name, n in Counter(columns).items():
        if not name.isprintable() or n > 1:
            raise UserError(
                f'{path}: the column name {truncate(name)!r} is no printable text, or comes twice'
            )
    return values, columns


def read_csv(path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read a .csv file; see ``read_numbers``."""
    first_row = read_first_row(path)
    has_header = is_header(first_row)
    if has_header and not first_row[0].strip():
        raise UserError(
            f"{path}: the first column has no name. Is it pandas' index? "
            'Leave it out (index=False), or name it'
        )

    header = 0 if has_header else None
    table = pd.read_csv(
        path,
        header=header,
        skipinitialspace=True,
        encoding='utf-8-sig',
        float_precision='round_trip',  # exact in all versions of pandas
    )
    # pandas takes superfluous first cells for names of the rows.
    if not isinstance(table.index, pd.RangeIndex):
        raise UserError(f'{path}: its rows have more cells than its header')
    if table.empty:
        raise UserError(f'{path} has no rows')

    columns = tuple(str(name) if has_header else f'column {name}' for name in table.columns)
    for name, label in zip(columns, table):
        require_numeric(table[label], name, path)
    return table.to_numpy(np.float64), columns


def read_first_row(path: Path) -> list[str]:
    """Return the cells of the first row of a .csv file that is not empty.

    Raises ``UserError`` where they are too many, or separated by something other than commas.
    """
    with open(path, newline='', encoding='utf-8-sig') as file:
        cells = next((row for row in csv.reader(file) if row), [''])

    separator = next((character for character in ';\t' if character in cells[0]), '')
    if len(cells) == 1 and separator:
        raise UserError(
            f'{path} has {separator!r} between its cells: '
            'save it with commas there, and points in its numbers'
        )
    if len(cells) > MAX_COLUMNS:
        raise UserError(f'{path} has {len(cells)} columns, {MAX_COLUMNS} are the most')
    return cells


def is_header(cells: list[str]) -> bool:
    """Return whether the cells of a first row are names of columns.

    They are where one of them is no number, or where they are 0, 1, 2 ...: this is how pandas
    writes columns without names.
    """
    numbers = [str(k) for k in range(len(cells))]
    is_numbered = [cell.strip() for cell in cells] == numbers
    return is_numbered or not all(is_number_or_empty(cell) for cell in cells)


def is_number_or_empty(cell: str) -> bool:
    """Return whether a cell of a .csv file holds a number, or nothing."""
    try:
        float(cell)
    except ValueError:
        return not cell.strip()
    return True


def require_numeric(column: pd.Series, name: str, path: Path) -> None:
    """Raise ``UserError`` with the first value that is no number, if a column has such values."""
    if pd.api.types.is_numeric_dtype(column) and column.dtype != bool:
        return
    numbers = pd.to_numeric(column, errors='coerce')
    is_text = (numbers.isna() & column.notna()).to_numpy()
    row = int(np.argmax(is_text))
    raise UserError(
        f'{path}: column {name} is not numeric: {str(column.iloc[row])[:40]!r} in row {row}; '
        'leave it out or encode it as numbers'
    )


def read_npy(path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read a .npy file; see ``read_numbers``. Its columns are numbered."""
    values = to_float_table(map_npy(path), path)
    return values, numbered_columns(values)


def read_h5(path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read a .h5 file; see ``read_numbers``.

    The names of the columns are the attribute ``columns`` of the data set, if there is one.
    """
    with open_h5(path) as file:
        table = find_h5_table(file, path)
        values = to_float_table(table[:], path)
        attribute = np.atleast_1d(table.attrs.get('columns', ()))
    names = tuple(str(name) for name in attribute)
    return values, names if len(names) == values.shape[1] else numbered_columns(values)


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


def find_h5_table(file: h5py.File, path: Path) -> h5py.Dataset:
    """Return the only two-dimensional data set at the top of an HDF5 file.

    Raises ``UserError`` where there is none or more than one, where its values are in other files,
    and where it says to be much larger than the file.
    """
    tables = []
    for name in file:
        # A soft or external link can lead to another file.
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            continue
        item = file[name]
        if isinstance(item, h5py.Dataset) and item.ndim == 2:
            tables.append(item)
    if len(tables) != 1:
        raise UserError(f'{path} has {len(tables)} two-dimensional data sets at its top, not one')
    table = tables[0]
    if table.external or table.is_virtual:
        raise UserError(f'{path} takes its table from other files')

    # HDF5 need not store what it declares. It reads whole chunks, which can exceed the table.
    n_read = max(table.size, math.prod(table.chunks or ()))
    if n_read * table.dtype.itemsize > MAX_COMPRESSION * path.stat().st_size:
        raise UserError(
            f'{path} claims to hold a table of shape {table.shape}, but has not the size for it'
        )
    return table


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


def numbered_columns(values: np.ndarray) -> tuple[str, ...]:
    """Return names for the columns of a table (N, D) that has none."""
    return tuple(f'column {k}' for k in range(values.shape[1]))


# -------------------------------------------------------------------------- writers of own tables


def require_new_table(path: Path) -> None:
    """Raise ``UserError`` unless ``save_table`` can write a new file there."""
    if path.suffix not in NEW_SUFFIXES:
        raise UserError(f'{path} should end in .csv, .npy or .h5')
    if path.exists():
        raise UserError(f'{path} is there already: move it away or give another name')
    if not path.parent.is_dir():
        raise UserError(f'{path}: there is no folder {path.parent}')


def save_table(path: str | Path, values: np.ndarray, columns: Sequence[str]) -> None:
    """Save values (N, D) and the names of their columns as a .csv, .npy or .h5, and say so."""
    path = Path(path)
    write_atomically(path, lambda temporary: write_table(temporary, path.suffix, values, columns))
    print(f'wrote {path}')


def write_table(path: Path, suffix: str, values: np.ndarray, columns: Sequence[str]) -> None:
    """Write values (N, D) in the format of ``suffix``; a .npy holds no names of columns."""
    if suffix == '.csv':
        table = pd.DataFrame(values, columns=list(columns))
        if 'row' in columns:
            table = table.astype({'row': int})
        table.to_csv(path, index=False)
        return

    # numpy and h5py do not say that a disk is full, so they write to memory.
    content = io.BytesIO()
    if suffix == '.npy':
        np.save(content, values)
    else:
        with h5py.File(content, 'w') as file:
            rows = file.create_dataset('rows', data=values)
            rows.attrs['columns'] = list(columns)
    path.write_bytes(content.getbuffer())


# ------------------------------------------------------------------------------- published tables


def load_published_table(name: str, data_dir: Path) -> TableData:
    """Load one of ``TABLES``. It is prepared once, and memory-mapped from then on.

    Raises ``UserError`` where its files are missing, damaged, or of another version.
    """
    counts, n_columns, candidates = TABLES[name]
    path = first_existing(data_dir, name, candidates)
    if path is None:
        raise UserError(
            f'{name} is not in {data_dir}: it needs {candidates[0]} as the MAF authors have it '
            f'(zenodo.org/records/1161203: python -m datasets fetch {name} --data_dir={data_dir}) '
            f'or, as downloaded, {" or ".join(candidates[1:])}'
        )

    shape = (sum(counts), n_columns)
    source = [name, CACHE_VERSION, counts, file_signature(path)]

    def make(create: CreateArray) -> None:
        splits = prepare_splits(name, path, counts, n_columns)
        rows = create(shape, np.float32)
        for split, end in zip(splits, np.cumsum(counts)):
            rows[end - len(split) : end] = split
        if not np.isfinite(rows).all():
            raise UserError(f'{path} holds missing or infinite values: download it again')

    def fits(rows: np.ndarray) -> bool:
        return rows.shape == shape and rows.dtype == np.float32

    rows = memmap_cache(data_dir, name, source, make, fits)
    train, validation, test = np.split(rows, np.cumsum(counts)[:2])
    return TableData(
        train,
        validation,
        test,
        columns=tuple(f'{name} {k}' for k in range(n_columns)),
        mean=np.zeros(n_columns),
        std=np.ones(n_columns),
        test_index=np.arange(len(test)),
        fingerprint=digest([name, CACHE_VERSION, counts, path.name, path.stat().st_size]),
    )


def prepare_splits(name: str, path: Path, counts: Counts, n_columns: int) -> Sequence[np.ndarray]:
    """Return the three splits of a published table, prepared from the file at ``path``.

    Raises ``UserError`` if the file is damaged or has other rows and columns than expected.
    """
    prepare = {
        'power': prepare_power,
        'gas': prepare_gas,
        'hepmass': prepare_hepmass,
        'miniboone': prepare_miniboone,
        'bsds300': prepare_bsds300,
    }[name]
    try:
        with warnings.catch_warnings():
            # numpy warns of means of no rows; such splits are refused below.
            warnings.simplefilter('ignore')
            splits = prepare(path)
    except DAMAGED_FILE_ERRORS as error:
        raise UserError(f'{path} cannot be read as {name}: {one_line(error)}') from error

    shapes = [split.shape for split in splits]
    if shapes != [(n, n_columns) for n in counts]:
        raise UserError(
            f'{path} gives {" / ".join(map(str, shapes))} rows and columns where {name} has '
            f'{" / ".join(map(str, counts))} rows of {n_columns}: '
            'truncated, or another version of it'
        )
    return splits


def split_in_order(data: np.ndarray) -> list[np.ndarray]:
    """Split rows so that the last tenth tests, and the last tenth of the rest validates."""
    n_test = len(data) // 10
    n_validation = (len(data) - n_test) // 10
    n_train = len(data) - n_test - n_validation
    return np.split(data, [n_train, n_train + n_validation])


def standardise_splits(splits: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Standardise three splits by the mean and deviation of training and validation together."""
    train, validation, _ = splits
    known = np.concatenate([train, validation])
    mean, std = known.mean(axis=0), known.std(axis=0)
    return [(split - mean) / std for split in splits]


def map_published_npy(path: Path, n_columns: int) -> np.ndarray:
    """Memory-map a .npy file; raise ``ValueError`` unless it is a table of that many columns."""
    data = map_npy(path)
    if not is_table(data) or data.shape[1] != n_columns:
        raise ValueError(f'it holds {data.dtype} of shape {data.shape}, not {n_columns} columns')
    return data


# ------------------------------------------------------------------------ readers of raw downloads


class BoundedLineFile(io.RawIOBase):
    """The bytes of a text, whose lines have to be short.

    Reading raises ``ValueError`` at a line that no table has. A parser that reads whole lines thus
    takes little memory, whatever the file.
    """

    def __init__(self, file: BinaryIO | gzip.GzipFile) -> None:
        self.file = file
        self.unfinished_line = b''

    def readable(self) -> bool:
        """Return True: ``io.BufferedReader`` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with the next bytes, and return how many there were."""
        content = self.file.read(len(buffer))
        lines = (self.unfinished_line + content).split(b'\n')
        if max(map(len, lines)) > MAX_LINE_BYTES:
            raise ValueError(f'it has a line of more than {MAX_LINE_BYTES:,} bytes')
        self.unfinished_line = lines[-1]
        buffer[: len(content)] = content
        return len(content)


def read_chunks(path: Path, **options: Any) -> Iterator[pd.DataFrame]:
    """Read a text, gzipped or not, in chunks of ``CHUNK_ROWS`` rows; show a progress bar.

    The options are those of ``pandas.read_csv``. Raises ``ValueError`` where a line or the whole is
    too long.
    """
    progress = tqdm(
        desc=f'reading {path.name}',
        total=path.stat().st_size,
        unit='B',
        unit_scale=True,
        dynamic_ncols=True,
    )
    with open(path, 'rb') as file, progress:
        content = gzip.open(file) if path.suffix == '.gz' else file
        text = io.BufferedReader(BoundedLineFile(content), 2**18)
        n_rows = 0
        for chunk in pd.read_csv(text, chunksize=CHUNK_ROWS, **options):
            n_rows += len(chunk)
            if n_rows > MAX_ROWS:
                raise ValueError(f'it has more than {MAX_ROWS:,} rows')
            yield chunk

            rate = n_rows / max(progress.format_dict['elapsed'], 1e-3)
            progress.set_postfix_str(f'{rate:,.0f} rows/s', refresh=False)
            progress.update(file.tell() - progress.n)


# ------------------------------------------------------------------------------------------ POWER


def prepare_power(path: Path) -> list[np.ndarray]:
    """Shuffle POWER, add noise as wide as each column's rounding, and drop two columns.

    Shuffling and noise are the authors', from their seed. The dropped columns are the reactive
    power and the intensity. The raw file has no noise on its minute of the day, which gets some
    here: that column is another draw than the authors'.
    """
    rng = np.random.RandomState(42)
    data = map_published_npy(path, 8) if path.suffix == '.npy' else read_raw_power(path)

    # The authors shuffle the rows themselves, which draws the same random numbers.
    order = np.arange(len(data))
    rng.shuffle(order)
    data = data[order][:, [0, 2, 4, 5, 6, 7]]

    n = len(data)
    voltage = 0.01 * rng.rand(n, 1)
    power = 0.001 * rng.rand(n, 1)
    metering = rng.rand(n, 3)
    noise = np.hstack([power, voltage, metering, np.zeros((n, 1))])
    return standardise_splits(split_in_order(data + noise))


def read_raw_power(path: Path) -> np.ndarray:
    """Return the rows (N, 8) of the raw file without those that miss values."""
    columns = range(1, 9)  # all but the date
    dtypes = {'Time': 'category'}
    chunks = read_chunks(path, sep=';', na_values='?', usecols=columns, dtype=dtypes)
    data = np.concatenate([parse_power_rows(chunk.dropna()) for chunk in chunks])
    data[:, -1] += np.random.default_rng(42).random(len(data))
    return data


def parse_power_rows(chunk: pd.DataFrame) -> np.ndarray:
    """Return the numbers of a chunk (n, 8), with its time of day as minutes in the last column."""
    if not isinstance(chunk.dtypes.get('Time'), pd.CategoricalDtype):
        raise ValueError('it has no column Time')

    # There are only 1,440 times of day, so that it is faster to parse each of them once.
    time = chunk.pop('Time').cat
    text = time.categories.astype(str).str
    hours = text[:2].astype(int)
    minutes = text[3:5].astype(int)
    minute_of_day = (60 * hours + minutes).to_numpy(float)
    return np.column_stack([chunk.to_numpy(float), minute_of_day[time.codes]])


# -------------------------------------------------------------------------------------------- GAS


def prepare_gas(path: Path) -> list[np.ndarray]:
    """Keep one sensor of each group with a correlation above 0.98; standardise all rows together.

    The authors' file holds every fourth row of the raw one.
    """
    if path.suffix == '.pickle':
        data, names = read_pickled_table(path)
        sensors = [k for k, name in enumerate(names) if name not in ('Meth', 'Eth', 'Time')]
        data = data[:, sensors]
    else:
        data = read_raw_gas(path)

    while True:
        n_correlated = (np.corrcoef(data.T) > 0.98).sum(axis=1)  # counting the sensor itself
        if (n_correlated <= 1).all():
            break
        first = np.argmax(n_correlated > 1)
        data = np.delete(data, first, axis=1)
    mean, std = data.mean(axis=0), data.std(axis=0, ddof=1)
    return split_in_order((data - mean) / std)


def read_raw_gas(path: Path) -> np.ndarray:
    """Return the 16 sensors (N, 16) in every fourth row of the raw file, the fourth one first."""
    sensors = range(3, 19)
    chunks = read_chunks(path, sep=r'\s+', skiprows=1, header=None, usecols=sensors)
    every_fourth = [chunk.to_numpy(np.float64)[3::4] for chunk in chunks]
    return np.concatenate(every_fourth)


# ---------------------------------------------------------------------------------------- HEPMASS


def prepare_hepmass(path: Path) -> list[np.ndarray]:
    """Keep the signal of the files of mass 1000, standardised by the training file.

    Discrete features are dropped. The last tenth of the training file validates.
    """
    train = read_hepmass_signal(path)
    test = read_hepmass_signal(path.with_name(path.name.replace('train', 'test')))
    test = test[:, : train.shape[1]]  # the test file has one column too many

    kept = find_continuous_columns(train)
    mean, std = train.mean(axis=0), train.std(axis=0, ddof=1)
    train = ((train - mean) / std)[:, kept]
    test = ((test - mean) / std)[:, kept]

    n_validation = len(train) // 10
    return [train[:-n_validation], train[-n_validation:], test]


def read_hepmass_signal(path: Path) -> np.ndarray:
    """Return the features (N, D) of the rows that are labelled 1 in their first column."""
    signal = []
    for chunk in read_chunks(path, index_col=False):
        is_signal = chunk.iloc[:, 0] == 1
        signal.append(chunk[is_signal].to_numpy(np.float64)[:, 1:])
    return np.concatenate(signal)


# -------------------------------------------------------------------------------------- MINIBOONE


def prepare_miniboone(path: Path) -> list[np.ndarray]:
    """Keep the signal of MINIBOONE without its 11 outliers and without discrete features.

    The authors' file holds just this.
    """
    if path.suffix == '.npy':
        data = map_published_npy(path, 43)
    else:
        data = read_raw_miniboone(path)
    return standardise_splits(split_in_order(data))


def read_raw_miniboone(path: Path) -> np.ndarray:
    """Return the signal (N, 43) of the raw file, whose first line says how many rows it has."""
    with open(path) as file:
        counts = file.readline(MAX_LINE_BYTES).split()
    if not counts:
        raise ValueError('its first line has no counts of rows')

    n_signal = int(counts[0])
    chunks = read_chunks(path, sep=r'\s+', skiprows=1, header=None, nrows=n_signal)
    data = np.concatenate([chunk.to_numpy(np.float64) for chunk in chunks])
    data = data[data[:, 0] >= -100]  # the outliers are -999 in all columns
    return data[:, find_continuous_columns(data)]


def find_continuous_columns(data: np.ndarray) -> np.ndarray:
    """Return a mask (D,) of the columns whose smallest value occurs at most five times.

    This is how the authors tell continuous features from discrete ones.
    """
    n_smallest = (data == np.nanmin(data, axis=0)).sum(axis=0)
    return n_smallest <= 5


# ---------------------------------------------------------------------------------------- BSDS300


def prepare_bsds300(path: Path) -> list[np.ndarray]:
    """Return grey 8x8 patches of the Berkeley images, without the last of their 64 pixels.

    Patches have uniform noise on their 256 levels, are scaled to [0, 1], and have their mean
    subtracted. They are in the authors' file or, with a fixed seed, drawn anew from the images. The
    training images give the validation split too.
    """
    n_train, n_validation, n_test = TABLES['bsds300'][0]
    if path.suffix == '.hdf5':
        return read_bsds300_patches(path)

    rng = np.random.default_rng(0)
    known = draw_patches(read_grey_images(path, 'train'), n_train + n_validation, rng)
    test = draw_patches(read_grey_images(path, 'test'), n_test, rng)
    return [known[:n_train], known[n_train:], test]


def read_bsds300_patches(path: Path) -> list[np.ndarray]:
    """Return the three splits of the authors' file; raise ``ValueError`` if their shapes differ."""
    with open_h5(path) as file:
        splits = [file[name] for name in ('train', 'validation', 'test')]
        shapes = [getattr(split, 'shape', None) for split in splits]
        # They are compared before any of them is read, as a shape can declare any size.
        if shapes != [(n, 63) for n in TABLES['bsds300'][0]]:
            raise ValueError(f'it has parts of {", ".join(map(str, shapes))}')
        return [split[:] for split in splits]


def read_grey_images(path: Path, part: str) -> list[np.ndarray]:
    """Return the images (H, W) uint8 of an archive's members images/PART/*.jpg, by name."""

    def is_wanted(name: str) -> bool:
        return f'images/{part}/' in name and name.endswith('.jpg')

    images = []
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as zip_archive:
            for name in sorted(filter(is_wanted, zip_archive.namelist())):
                images.append(read_grey_image(zip_archive.open(name)))
    else:
        with tarfile.open(path) as tar_archive:
            members = [m for m in tar_archive if m.isfile() and is_wanted(m.name)]
            for member in sorted(members, key=lambda m: m.name):
                file = tar_archive.extractfile(member)
                if file is not None:
                    images.append(read_grey_image(file))

    if not images:
        raise ValueError(f'it has no images/{part}/*.jpg')
    return images


def read_grey_image(file: IO[bytes]) -> np.ndarray:
    """Decode an image as grey levels (H, W) uint8.

    Raises ``ValueError`` where it is damaged or larger than any Berkeley image.
    """
    try:
        with Image.open(file, formats=('JPEG', 'PNG')) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f'{image.width}x{image.height}'
                raise ValueError(f'it has an image of {size}, which no Berkeley image is')
            return np.asarray(image.convert('L'))
    except DAMAGED_IMAGE_ERRORS as error:
        raise ValueError(one_line(error)) from error


def draw_patches(images: list[np.ndarray], n: int, rng: Generator) -> np.ndarray:
    """Return n patches (n, 63) float32, each from a random place in a random image.

    Their order is random. Working image by image keeps the memory small.
    """
    image_of_patch = rng.integers(len(images), size=n)
    n_of_image = np.bincount(image_of_patch, minlength=len(images))
    order = rng.permutation(n)
    ends = np.cumsum(n_of_image)

    patches = np.empty((n, 63), np.float32)
    for image, k, end in zip(images, n_of_image, ends):
        windows = np.lib.stride_tricks.sliding_window_view(image, (8, 8))
        rows = rng.integers(windows.shape[0], size=k)
        columns = rng.integers(windows.shape[1], size=k)

        levels = windows[rows, columns].reshape(k, 64)
        pixels = (levels + rng.random((k, 64))) / 256
        centred = pixels - pixels.mean(axis=1, keepdims=True)
        patches[order[end - k : end]] = centred[:, :63]
    return patches
