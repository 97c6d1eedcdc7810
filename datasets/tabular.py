"""Rows of numbers: two-dimensional problems, the five tables of the MAF paper, and tables of the user's own.

The tables are prepared as by their authors (Papamakarios et al., 2017, appendix D), whose files are at Zenodo, record
1161203; all but BSDS300's also from the raw downloads of the UCI repository.
"""

import csv
import difflib
import gzip
import io
import math
import re
import tarfile
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from common.errors import UserError, index_of_name, one_line, truncate
from common.files import digest, file_signature, first_existing, write_atomically

from .cache import map_npy, memmap_cache
from .pickles import read_pickled_table
from .toy import ENERGIES, SAMPLERS, log_normaliser

SUFFIXES = ('.csv', '.npy', '.h5', '.hdf5')
CACHE_VERSION = 1  # raised whenever the same source would give other rows
N_VALIDATION, N_TEST = 5_000, 50_000  # rows of the two-dimensional problems
CHUNK = 50_000  # rows of a text that are parsed at once; a multiple of 4, for GAS
MAX_LINE, MAX_ROWS = 4_096, 20_000_000  # bytes and rows that no text of a published table reaches
MAX_PIXELS = 2**20  # of a Berkeley image; they have 481 x 321
MAX_COLUMNS = 2**16 - 1  # of a text of the user's own; a million take pandas minutes
MAX_RATIO = 1_000  # by how much compression may make a table of the user's own smaller

# Rows of the three splits, columns, and where the files lie: the MAF authors' first, the raw ones after it
TABLES = {
    'power': (
        (1_659_917, 184_435, 204_928),
        6,
        ['power/data.npy', 'household_power_consumption.txt'],
    ),
    'gas': ((852_174, 94_685, 105_206), 8, ['gas/ethylene_CO.pickle', 'ethylene_CO.txt']),
    'hepmass': (
        (315_123, 35_013, 174_987),
        21,
        ['hepmass/1000_train.csv', '1000_train.csv', '1000_train.csv.gz'],
    ),
    'miniboone': ((29_556, 3_284, 3_648), 43, ['miniboone/data.npy', 'MiniBooNE_PID.txt']),
    'bsds300': (
        (1_000_000, 50_000, 250_000),
        63,
        ['BSDS300/BSDS300.hdf5', 'bsds300_gray.zip', 'BSDS300-images.tgz'],
    ),
}


@dataclass(frozen=True)
class TableData:
    train: np.ndarray  # (N, D) float32, standardised: the data's own units are mean + std * row
    validation: np.ndarray
    test: np.ndarray
    columns: tuple
    mean: np.ndarray = None  # (D,) float64
    std: np.ndarray = None
    draw: object = (
        None  # draw(numpy Generator, n) -> n new training rows (n, D) float32, instead of train
    )
    energy: object = None  # U(x) of a density exp(-U) / Z; the rows are noise then
    log_z: float = 0.0
    test_index: np.ndarray = None  # which rows of the table are its test split
    notes: tuple = ()
    steps: object = 0.0  # (D,) over which discrete columns are spread; 0 where they are not

    @property
    def fingerprint(self):
        """Digest that differs where other rows were read, or in other units"""
        return digest([self.columns, self.mean.tolist(), self.std.tolist()], [self.validation])

    def column_index(self, text):
        """'2' or a column's name -> 2; raises UserError with the nearest names"""
        return index_of_name(text, self.columns, 'column')

    def head(self, n):
        """-> up to n rows of a table in its own units, first those of the test split"""
        return (
            np.concatenate([part[:n] for part in (self.test, self.validation, self.train)])[:n]
            * self.std
            + self.mean
        )


def load_table(name, data_dir='data', seed=0, test_file='', dequantize=False):
    """-> Rows of a two-dimensional problem, of one of TABLES, or of a table of the user's own. Raises UserError."""
    if name in SAMPLERS or name in ENERGIES:
        return load_toy(name)
    if name in TABLES:
        return load_published(name, Path(data_dir))
    if Path(name).suffix in SUFFIXES:
        return load_user_table(Path(name), seed, test_file, dequantize)
    known = [*SAMPLERS, *ENERGIES, *TABLES]
    near = difflib.get_close_matches(name, known, n=1)
    raise UserError(
        f'unknown data set {name!r}{f", perhaps {near[0]}" if near else ""}: there are {", ".join(known)}, '
        f'and any table ({" ".join(SUFFIXES)})'
    )


def load_run_table(config, saved, no_split=False):
    """-> Rows of a run's options or, where there is a checkpoint's dict, in its units and as it split them; UserError where
    they are others now. Without rows of any split where these are not needed and the data has units of its own."""
    like = saved and table_from_units(saved['units'], saved['input_dims'][0], saved['path'])
    if like and no_split and config.dataset not in SAMPLERS and config.dataset not in ENERGIES:
        return like
    seed = saved['config'].seed if saved else config.seed
    data = load_table(config.dataset, config.data_dir, seed, config.test_file, config.dequantize)
    if like:
        require_same_units(data, like, config.dataset)
    return (
        replace(data, train=data.train[: config.max_rows])
        if config.max_rows and not data.draw
        else data
    )


def load_toy(name):
    energy = ENERGIES.get(name)
    sampler = SAMPLERS.get(name) or (lambda rng, n: rng.normal(size=(n, 2)))

    def draw(rng, n):
        return sampler(rng, n).astype(np.float32)

    held_out = [
        draw(np.random.default_rng((10**9, i)), n) for i, n in enumerate((N_VALIDATION, N_TEST))
    ]
    return TableData(
        None,
        *held_out,
        ('x1', 'x2'),
        np.zeros(2),
        np.ones(2),
        draw,
        energy,
        log_normaliser(energy) if energy else 0.0,
        np.arange(N_TEST),
    )


def table_units(rows):
    """-> the units of Rows as plain values, for a checkpoint"""
    return {
        'columns': list(rows.columns),
        'mean': rows.mean.tolist(),
        'std': rows.std.tolist(),
        'steps': np.broadcast_to(rows.steps, len(rows.columns)).tolist(),
    }


def table_from_units(units, n_columns, path):
    """-> Rows without any, in the units that a checkpoint at path has. UserError unless they are units of so many columns."""
    numbers = {key: np.array(units[key]) for key in ('mean', 'std', 'steps')}
    if not (
        all(len(values) == n_columns for values in units.values())
        and ''.join(units['columns']).isprintable()
        and np.isfinite([*numbers.values()]).all()
        and (numbers['std'] > 0).all()
    ):
        raise UserError(f'{path} is damaged: its columns and its units do not fit')
    return TableData(None, None, None, tuple(units['columns']), **numbers)


def require_same_units(rows, like, name):
    if not (
        rows.columns == like.columns
        and np.allclose(rows.mean, like.mean)
        and np.allclose(rows.std, like.std)
    ):
        raise UserError(
            f'{name} is not what it was when the model was trained: score new rows by --evaluate --input=FILE, or '
            'train a new model'
        )


# ------------------------------------------------------------------------------------------ the user's tables


def load_user_table(path, seed, test_file, dequantize):
    """80/10/10 by seed or, with a test_file, 90/10 and that; standardised by the training split."""
    values, columns = read_table(path)
    check(values, columns, path)
    rng = np.random.default_rng(seed)
    discrete = [
        k for k in range(len(columns)) if len(np.unique(values[:, k])) <= max(10, len(values) // 20)
    ]
    notes = ()
    steps = np.zeros(len(columns))
    if discrete and dequantize:
        steps[discrete] = [np.diff(np.unique(values[:, k])).min() for k in discrete]
        values = dequantize_columns(values, steps)
    elif discrete:
        names = ', '.join(columns[k] for k in discrete[:8]) + ' ...' * (len(discrete) > 8)
        notes = (
            f'{names}: few distinct values. A density on them has no upper bound, and a log-likelihood no meaning: '
            'leave such columns out, or add --dequantize',
        )
    order = rng.permutation(len(values))
    n = len(values) // 10
    train, validation, test = np.split(order, [len(order) - 2 * n, len(order) - n])
    if test_file:
        train = np.concatenate([train, validation])
        validation, test = test, None
    if min(len(train), n) < 1 or len(train) < len(columns):
        raise UserError(
            f'{path} has {len(values)} rows of {len(columns)} columns: too few to train, validate and test on'
        )
    with np.errstate(over='ignore'):
        mean, std = values[train].mean(0), values[train].std(0)
    if (std == 0).any():
        raise UserError(
            f'{path}: column {columns[int(np.argmin(std))]} is constant in the training split: leave it out'
        )
    splits = [standardise(values[np.sort(part)], mean, std, path) for part in (train, validation)]
    if len(columns) > 1 and np.linalg.eigvalsh(np.corrcoef(values[train], rowvar=False))[0] < 1e-10:
        notes += (
            'some columns follow exactly from others, such as copies or sums. The density on such rows has no upper '
            'bound, and a log-likelihood no meaning: leave them out',
        )
    rows = TableData(*splits, None, columns, mean, std, steps=steps, notes=notes)
    if test_file:
        held_out = read_rows(test_file, rows)
        return replace(rows, test=held_out, test_index=np.arange(len(held_out)))
    test_index = np.sort(test)
    return replace(
        rows, test=standardise(values[test_index], mean, std, path), test_index=test_index
    )


def standardise(values, mean, std, path):
    """-> float32 (N, D); UserError where a value or the deviation is too large for it"""
    with np.errstate(over='ignore', invalid='ignore'):
        rows = ((values - mean) / std).astype(np.float32)
    if not (np.isfinite(rows).all() and np.isfinite(std).all()):
        raise UserError(f'{path} holds values that no float32 can: {np.abs(values).max():g}')
    return rows


def dequantize_columns(values, steps):
    """Values of discrete columns, each spread evenly over its step; steps (D,) are 0 where a column is not discrete"""
    return values + steps * np.random.default_rng(0).random(values.shape)


def read_rows(path, like):
    """A table of the user's own -> float32 (N, D) in the units of like, a Rows; columns that have names may come in any
    order, and the last may be the log_likelihood of generated rows, which is left out. Raises UserError."""
    values, names = read_table(path)
    if names[-1] == 'log_likelihood' and len(names) == len(like.columns) + 1:
        values, names = values[:, :-1], names[:-1]
    if len(names) != len(like.columns):
        raise UserError(
            f'{path} has {len(names)} columns, and the model was trained on {len(like.columns)}: '
            f'{", ".join(like.columns)}'
        )
    if names != like.columns and not (is_unnamed(names) or is_unnamed(like.columns)):
        if set(names) != set(like.columns):
            raise UserError(
                f'{path} has columns {", ".join(names)}, and the model was trained on '
                f'{", ".join(like.columns)}'
            )
        values = values[:, [names.index(name) for name in like.columns]]
    return standardise(dequantize_columns(values, like.steps), like.mean, like.std, path)


def is_unnamed(columns):
    return all(re.fullmatch(r'column \d+', name) for name in columns)


def check(values, columns, path):
    if len(values) < len(columns) or len(values) < 10:
        raise UserError(
            f'{path} has {len(values)} rows and {len(columns)} columns: a density needs many more rows than '
            'columns'
        )
    constant = (values == values[:1]).all(0)
    if constant.any():
        names = [columns[k] for k in np.flatnonzero(constant)]
        raise UserError(f'{path}: column {", ".join(names)} is constant: leave it out')


def read_table(path):
    """A table of the user's own without missing values -> values (N, D) float64, column names. Raises UserError."""
    values, columns = read_numbers(path)
    bad = ~np.isfinite(values)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise UserError(
            f'{path}: {int(bad.sum())} missing or infinite values, the first in column {columns[column]}, '
            f'row {row}: drop those rows or fill them in'
        )
    return values, columns


def read_numbers(path):
    """.csv with or without a header, .npy, or .h5 with one two-dimensional data set -> values (N, D), column names"""
    path = Path(path)
    if not path.is_file():
        raise UserError(f'{path}: no such table')
    readers = {'.csv': read_csv, '.npy': read_npy, '.h5': read_h5, '.hdf5': read_h5}
    if path.suffix not in readers:
        raise UserError(f'{path} should end in {", ".join(readers)}')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of columns of several types, refused below
            values, columns = readers[path.suffix](path)
    except UserError:
        raise
    except Exception as error:  # a damaged table fails in too many ways to list
        raise UserError(f'{path} cannot be read as a table: {one_line(error)}') from None
    for name, n in Counter(columns).items():
        if not name.isprintable() or n > 1:
            raise UserError(
                f'{path}: the column name {truncate(name)!r} is no printable text, or comes twice'
            )
    return values, columns


def read_csv(path):
    with open(path, newline='', encoding='utf-8-sig') as file:
        first = next((row for row in csv.reader(file) if row), [''])
    separator = next((character for character in ';\t' if character in first[0]), '')
    if len(first) == 1 and separator:
        raise UserError(
            f'{path} has {separator!r} between its cells: save it with commas there, and points in its numbers'
        )
    if len(first) > MAX_COLUMNS:
        raise UserError(f'{path} has {len(first)} columns, {MAX_COLUMNS} are the most')
    numbered = [cell.strip() for cell in first] == [
        str(k) for k in range(len(first))
    ]  # by pandas, for want of names
    header = None if all(is_number(cell) for cell in first) and not numbered else 0
    if not first[0].strip() and header == 0:
        raise UserError(
            f"{path}: the first column has no name. Is it pandas' index? Leave it out (index=False), or name it"
        )
    table = pd.read_csv(path, header=header, skipinitialspace=True, encoding='utf-8-sig')
    if not isinstance(
        table.index, pd.RangeIndex
    ):  # pandas takes the first cells for names of rows then
        raise UserError(f'{path}: its rows have more cells than its header')
    if table.empty:
        raise UserError(f'{path} has no rows')
    columns = tuple(str(name) if header == 0 else f'column {name}' for name in table.columns)
    for name, column in zip(columns, table):
        if not pd.api.types.is_numeric_dtype(table[column]) or table[column].dtype == bool:
            numbers = pd.to_numeric(table[column], errors='coerce')
            row = int(np.argmax((numbers.isna() & table[column].notna()).to_numpy()))
            raise UserError(
                f'{path}: column {name} is not numeric: {str(table[column].iloc[row])[:40]!r} in row {row}; '
                'leave it out or encode it as numbers'
            )
    return table.to_numpy(np.float64), columns


def is_number(cell):
    try:
        float(cell)
    except ValueError:
        return not cell.strip()
    return True


def read_npy(path):
    return require_table(map_npy(path), path)


def read_h5(path):
    with h5py.File(path) as file:
        own = [
            file[name] for name in file if isinstance(file.get(name, getlink=True), h5py.HardLink)
        ]
        tables = [item for item in own if isinstance(item, h5py.Dataset) and item.ndim == 2]
        if len(tables) != 1:
            raise UserError(
                f'{path} has {len(tables)} two-dimensional data sets at its top, not one'
            )
        if tables[0].external or tables[0].is_virtual:
            raise UserError(f'{path} takes its table from other files')
        n_read = max(tables[0].size, math.prod(tables[0].chunks or ()))  # chunks are read whole
        if (
            n_read * tables[0].dtype.itemsize > MAX_RATIO * path.stat().st_size
        ):  # HDF5 need not store what it declares
            raise UserError(
                f'{path} claims to hold a table of shape {tables[0].shape}, but has not the size for it'
            )
        values, columns = require_table(tables[0][:], path)
        names = tuple(str(name) for name in np.atleast_1d(tables[0].attrs.get('columns', ())))
        return values, names if len(names) == len(columns) else columns


def require_table(values, path):
    if values.ndim != 2 or values.dtype.kind not in 'fiu' or not values.size:
        raise UserError(
            f'{path} holds {values.dtype} of shape {values.shape}, not a table of numbers'
        )
    return np.asarray(values, np.float64), tuple(f'column {k}' for k in range(values.shape[1]))


def require_new_table(path):
    """UserError unless save_table can write there"""
    if path.suffix not in ('.csv', '.npy', '.h5'):
        raise UserError(f'{path} should end in .csv, .npy or .h5')
    if path.exists():
        raise UserError(f'{path} is there already: move it away or give another name')
    if not path.parent.is_dir():
        raise UserError(f'{path}: there is no folder {path.parent}')


def save_table(path, values, columns):
    """Rows (N, D) and the columns' names, as a .csv, .npy or .h5"""
    path = Path(path)
    write_atomically(path, lambda temporary: write_table(temporary, path.suffix, values, columns))
    print(f'wrote {path}')


def write_table(path, suffix, values, columns):
    if suffix == '.csv':
        table = pd.DataFrame(values, columns=columns)
        table.astype({'row': int} if 'row' in columns else {}).to_csv(path, index=False)
        return
    content = io.BytesIO()  # lest numpy or h5py meet a full disk, which they do not name
    if suffix == '.npy':
        np.save(content, values)
    else:
        with h5py.File(content, 'w') as file:
            file.create_dataset('rows', data=values).attrs['columns'] = list(columns)
    path.write_bytes(content.getbuffer())


# ------------------------------------------------------------------------------------------- published tables


def load_published(name, data_dir):
    counts, n_columns, places = TABLES[name]
    path = first_existing(data_dir, name, places)
    if path is None:
        raise UserError(
            f'{name} is not in {data_dir}: it needs {places[0]} as the MAF authors have it '
            f'(zenodo.org/records/1161203: python -m datasets fetch {name} --data_dir={data_dir}) or, as '
            f'downloaded, {" or ".join(places[1:])}'
        )
    prepare = {
        'power': prepare_power,
        'gas': prepare_gas,
        'hepmass': prepare_hepmass,
        'miniboone': prepare_miniboone,
        'bsds300': prepare_bsds300,
    }[name]
    source = [name, CACHE_VERSION, counts, file_signature(path)]

    def make(create):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    'ignore'
                )  # of means of nothing: such splits are refused below
                splits = prepare(path)
        except Exception as error:  # likewise
            raise UserError(f'{path} cannot be read as {name}: {one_line(error)}') from None
        shapes = [part.shape for part in splits]
        if shapes != [(n, n_columns) for n in counts]:
            raise UserError(
                f'{path} gives {" / ".join(map(str, shapes))} rows and columns where {name} has '
                f'{" / ".join(map(str, counts))} rows of {n_columns}: truncated, or another version of it'
            )
        rows = create(shape, np.float32)
        for part, end in zip(splits, np.cumsum(counts)):
            rows[end - len(part) : end] = part
        if not np.isfinite(rows).all():
            raise UserError(f'{path} holds missing or infinite values: download it again')

    shape = sum(counts), n_columns
    rows = memmap_cache(
        data_dir, name, source, make, lambda rows: (rows.shape, rows.dtype) == (shape, np.float32)
    )
    columns = tuple(f'{name} {k}' for k in range(n_columns))
    splits = np.split(rows, np.cumsum(counts)[:2])
    return TableData(
        *splits, columns, np.zeros(n_columns), np.ones(n_columns), test_index=np.arange(counts[2])
    )


class TextLines(io.RawIOBase):
    """A text, gzipped or not, as bytes; raises ValueError at a line that no table has, so that memory stays bounded"""

    def __init__(self, file):
        self.file, self.line = file, b''

    def readable(self):
        return True

    def readinto(self, buffer):
        content = self.file.read(len(buffer))
        *lines, self.line = (self.line + content).split(b'\n')
        if max(map(len, [self.line, *lines])) > MAX_LINE:
            raise ValueError(f'it has a line of more than {MAX_LINE:,} bytes')
        buffer[: len(content)] = content
        return len(content)


def read_chunks(path, **options):
    """The rows of a text, gzipped or not, in DataFrames of CHUNK rows; options are those of pandas.read_csv"""
    with (
        open(path, 'rb') as file,
        tqdm(
            desc=f'reading {path.name}',
            total=path.stat().st_size,
            unit='B',
            unit_scale=True,
            dynamic_ncols=True,
        ) as bar,
    ):
        text = io.BufferedReader(
            TextLines(gzip.open(file) if path.suffix == '.gz' else file), 2**18
        )
        n = 0
        for part in pd.read_csv(text, chunksize=CHUNK, **options):
            n += len(part)
            if n > MAX_ROWS:
                raise ValueError(f'it has more than {MAX_ROWS:,} rows')
            yield part
            bar.set_postfix_str(
                f'{n / max(bar.format_dict["elapsed"], 1e-3):,.0f} rows/s', refresh=False
            )
            bar.update(file.tell() - bar.n)


def split_off(data):
    """The last tenth is the test split, the last tenth of the rest validates."""
    n_test = len(data) // 10
    n_validation = (len(data) - n_test) // 10
    return np.split(data, [len(data) - n_test - n_validation, len(data) - n_test])


def standardised(train, validation, test):
    known = np.concatenate([train, validation])
    mean, std = known.mean(0), known.std(0)
    return [(part - mean) / std for part in (train, validation, test)]


def prepare_power(path):
    """Shuffled and with noise as wide as the rounding of each column, by the authors' seed; without reactive power and
    intensity. The raw file has no noise on its minute of the day; it gets some here, so that column is another draw."""
    rng = np.random.RandomState(42)
    if path.suffix == '.npy':
        data = map_npy(path)
    else:
        data = np.concatenate(
            [
                power_rows(part.dropna())
                for part in read_chunks(
                    path, sep=';', na_values='?', usecols=range(1, 9), dtype={'Time': 'category'}
                )
            ]
        )
        data[:, -1] += np.random.default_rng(42).random(len(data))
    order = np.arange(len(data))
    rng.shuffle(order)  # draws what shuffling the rows themselves would
    data = data[order][:, [0, 2, 4, 5, 6, 7]]
    n = len(data)
    voltage, power, metering = 0.01 * rng.rand(n, 1), 0.001 * rng.rand(n, 1), rng.rand(n, 3)
    return standardised(*split_off(data + np.hstack([power, voltage, metering, np.zeros((n, 1))])))


def power_rows(part):
    """Times of day, of which there are 1,440, become minutes in the last column"""
    time = part.pop('Time').cat
    text = time.categories.astype(str).str
    minute = 60 * text[:2].astype(int) + text[3:5].astype(int)
    return np.column_stack([part.to_numpy(float), minute.to_numpy(float)[time.codes]])


def prepare_gas(path):
    """Of each group of sensors with a correlation above 0.98 one is kept. Of the raw file, every fourth row."""
    if path.suffix == '.pickle':
        data, columns = read_pickled_table(path)
        data = data[:, [k for k, name in enumerate(columns) if name not in ('Meth', 'Eth', 'Time')]]
    else:
        parts = read_chunks(path, sep=r'\s+', skiprows=1, header=None, usecols=range(3, 19))
        data = np.concatenate([part.to_numpy()[3::4] for part in parts])
    while True:
        correlated = (np.corrcoef(data.T) > 0.98).sum(1) > 1
        if not correlated.any():
            break
        data = np.delete(data, np.argmax(correlated), axis=1)
    return split_off((data - data.mean(0)) / data.std(0, ddof=1))


def prepare_hepmass(path):
    """The signal (label 1) of the mass-1000 files, without the features whose smallest value comes more than 5 times"""

    def signal(path):
        parts = read_chunks(path, index_col=False)
        return np.concatenate([part[part.iloc[:, 0] == 1].to_numpy()[:, 1:] for part in parts])

    train = signal(path)
    test = signal(path.with_name(path.name.replace('train', 'test')))[
        :, : train.shape[1]
    ]  # it has a column too many
    kept = continuous(train)
    mean, std = train.mean(0), train.std(0, ddof=1)
    train, test = (((part - mean) / std)[:, kept] for part in (train, test))
    n_validation = len(train) // 10
    return train[:-n_validation], train[-n_validation:], test


def prepare_miniboone(path):
    """The signal, without 11 outliers and without the features whose smallest value comes more than 5 times"""
    if path.suffix == '.npy':
        data = map_npy(path)
    else:
        with open(path) as file:
            n_signal = int(file.readline(MAX_LINE).split()[0])
        parts = read_chunks(path, sep=r'\s+', skiprows=1, header=None, nrows=n_signal)
        data = np.concatenate([part.to_numpy() for part in parts])
        data = data[data[:, 0] >= -100]
        data = data[:, continuous(data)]
    return standardised(*split_off(data))


def continuous(data):
    return np.array([np.unique(column, return_counts=True)[1][0] <= 5 for column in data.T])


def prepare_bsds300(path):
    """8x8 grey patches with uniform noise on their 256 levels, in [0, 1], less their mean, without the last pixel: from
    the authors' file or, drawn anew with a seed, from the Berkeley images; training images give the validation too."""
    counts = TABLES['bsds300'][0]
    if path.suffix == '.hdf5':
        with h5py.File(path) as file:
            parts = [file[part] for part in ('train', 'validation', 'test')]
            if [part.shape for part in parts] != [
                (n, 63) for n in counts
            ]:  # before any of it is read
                raise ValueError(f'it has parts of {", ".join(str(part.shape) for part in parts)}')
            return [part[:] for part in parts]
    rng = np.random.default_rng(0)
    both = draw_patches(read_images(path, 'train'), counts[0] + counts[1], rng)
    return [*np.split(both, [counts[0]]), draw_patches(read_images(path, 'test'), counts[2], rng)]


def read_images(path, part):
    """-> the grey images of archive members images/PART/*.jpg"""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [
                name
                for name in sorted(archive.namelist())
                if f'images/{part}/' in name and name.endswith('.jpg')
            ]
            images = [read_grey(archive.open(name)) for name in names]
    else:
        with tarfile.open(path) as archive:
            members = sorted(
                (
                    m
                    for m in archive
                    if m.isfile() and f'images/{part}/' in m.name and m.name.endswith('.jpg')
                ),
                key=lambda m: m.name,
            )
            images = [read_grey(archive.extractfile(member)) for member in members]
    if not images:
        raise ValueError(f'it has no images/{part}/*.jpg')
    return images


def read_grey(file):
    with Image.open(file, formats=('JPEG', 'PNG')) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f'it has an image of {image.width}x{image.height}, which no Berkeley image is'
            )
        return np.asarray(image.convert('L'))


def draw_patches(images, n, rng):
    """-> (n, 63) float32, in random order, each from a random place in a random image"""
    which = np.bincount(rng.integers(len(images), size=n), minlength=len(images))
    order, start = rng.permutation(n), 0
    patches = np.empty((n, 63), np.float32)
    for image, k in zip(images, which):
        windows = np.lib.stride_tricks.sliding_window_view(image, (8, 8))
        rows, columns = (
            rng.integers(windows.shape[0], size=k),
            rng.integers(windows.shape[1], size=k),
        )
        pixels = (windows[rows, columns].reshape(k, 64) + rng.random((k, 64))) / 256
        patches[order[start : start + k]] = (pixels - pixels.mean(1, keepdims=True))[:, :63]
        start += k
    return patches
