"""Tables of numbers: two-dimensional problems, five published tables, and the user's own files.

The published tables are those of the MAF paper (Papamakarios et al., 2017, appendix D), prepared as
by its authors. They are read from the authors' files (Zenodo, record 1161203) or from the raw
downloads: of the UCI repository or, for BSDS300, the Berkeley images.
"""

import contextlib
import gzip
import io
import lzma
import math
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
from numpy.random import Generator
from PIL import Image
from tqdm import tqdm

from common.bounds import bounded_memory, open_regular, read_after_trial, read_bounded
from common.errors import UserError, index_of_name, nearest_names, one_line
from common.files import digest, file_signature, first_existing

from .archives import iterate_members
from .cache import CreateArray, map_npy, memmap_cache
from .columns import (
    MAX_CATEGORIES,
    ColumnOptions,
    Condition,
    Selection,
    describe_missing,
    encode_conditions,
    list_names,
    looks_like_an_index,
    make_condition,
    missing_cells,
    number_columns,
    require_complete,
    require_conditions,
    require_numeric,
    require_readable,
    select_columns,
)
from .own_tables import (
    DAMAGED_TABLE_ERRORS,
    MAX_COLUMNS,
    PICKLED,
    SUFFIXES,
    BoundedLineFile,
    is_own_table,
    is_table,
    is_unnamed,
    open_h5,
    read_frame,
    require_column_names,
)
from .photos import DAMAGED_IMAGE_ERRORS
from .pickles import read_pickled_table
from .toy import ENERGIES, SAMPLERS, Energy, Sampler, log_normaliser

CACHE_VERSION = 1  # to be raised whenever the same source gives other rows than before

N_VALIDATION, N_TEST = 5_000, 50_000  # rows of the two-dimensional problems
CHUNK_ROWS = 50_000  # rows of a text that are parsed at once; a multiple of 4, which GAS needs

# No published table reaches these limits. They keep a damaged or hostile file from taking all
# memory.
MAX_RAW_LINE_BYTES = 4_096
MAX_ROWS = 20_000_000
MAX_PIXELS = 2**20  # the Berkeley images have 481 x 321

# The levels of the quantiles that a model of a table keeps, and from how many rows they are taken.
QUANTILE_LEVELS = np.linspace(0.02, 0.98, 21)
MAX_QUANTILE_ROWS = 100_000

# The cell of a level begins this much below it, in steps: a value may be rounded, as to float32.
ROUNDING = 1e-4

# What the readers raise for files that are damaged or something else than their names say: those
# of own tables, of archives, and Pillow (SyntaxError for a broken PNG). zipfile raises RuntimeError
# for an encrypted or unknown kind of zip file.
DAMAGED_FILE_ERRORS = (
    *DAMAGED_TABLE_ERRORS,
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
INDEX_NOTE = 'all values are different whole numbers. Is it an index? Then add'

Counts = tuple[int, int, int]  # rows of the training, validation and test splits
Split = tuple[np.ndarray, np.ndarray, np.ndarray]  # indices of the rows of these three
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

    All rows are float32: D columns that are modelled, and C numbers that the density is given, to
    which ``conditions`` are encoded. The columns are standardised. In the table's own units they
    are ``mean + std * row``, which is what ``to_own_units`` returns.
    """

    # The splits, each of shape (N, D + C). A two-dimensional problem has no training split, as it
    # draws new rows instead. All three are None where only the units of a table are known.
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

    # The columns that the density is given, in the order of the C numbers that stand for them.
    conditions: tuple[Condition, ...] = ()

    # All columns of the table that the rows come from, used or not, in its order.
    features: tuple[str, ...] = ()

    # Quantiles of each column in the training rows, standardised, of ``QUANTILE_LEVELS``: (Q, D).
    # (0, D) if not known.
    quantiles: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))

    # The lowest and the highest value of each column in the training rows, standardised: (2, D).
    # (0, D) if not known, and where there are new rows at each step.
    ranges: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))

    def __post_init__(self) -> None:
        """Give what is not known its shape; by default, all columns are used."""
        for name in ('quantiles', 'ranges'):
            if not len(getattr(self, name)):
                object.__setattr__(self, name, np.empty((0, len(self.columns))))
        if not self.features:
            object.__setattr__(self, 'features', self.columns)

    @property
    def n_context(self) -> int:
        """Return how many numbers C the density is given."""
        return sum(condition.width for condition in self.conditions)

    @property
    def used_features(self) -> tuple[str, ...]:
        """Return the columns of the table that are modelled or given, in its order."""
        used = {*self.columns, *(condition.name for condition in self.conditions)}
        return tuple(name for name in self.features if name in used)

    def column_index(self, text: str) -> int:
        """Return the index of a column that is given by its index or its name.

        Raises ``UserError`` with the nearest names if there is no such column.
        """
        return index_of_name(text, self.columns, 'column')

    def to_own_units(self, rows: np.ndarray) -> np.ndarray:
        """Return standardised rows (N, D) or (N, D + C) in the table's own units, (N, D)."""
        return rows[..., : len(self.columns)] * self.std + self.mean

    def is_outside(self, rows: np.ndarray) -> np.ndarray:
        """Return which of the standardised rows (N, D) leave the range of the training rows, (N,).

        Those do that have a value below or above all of its column. Columns with levels do not
        count, as ``quantize`` never leaves these. The ranges must be known.
        """
        lowest, highest = self.ranges
        is_beyond = (rows < lowest) | (rows > highest)
        for k, levels in enumerate(self.levels):
            is_beyond[:, k] &= len(levels) == 0
        return is_beyond.any(axis=1)

    def quantize(self, rows: np.ndarray) -> np.ndarray:
        """Return rows in the table's own units, with discrete columns on their levels: (N, D).

        The rows are (N, D), or (N, D + C) with what the density is given, which is left out.

        It undoes ``dequantize_columns``, which spreads a level over a cell: from the level to one
        step above it. Each value becomes the level of the nearest cell, hence a value below all
        cells the lowest level, and one above them the highest. Levels need not be equidistant.
        """
        return self.map_discrete(rows, nearest_levels)

    def map_discrete(self, rows: np.ndarray, function: MapColumn) -> np.ndarray:
        """Return rows (N, D) with ``function(column, levels, step)`` for each column of levels."""
        rows = rows[:, : len(self.columns)].copy()
        steps = np.broadcast_to(self.steps, len(self.columns))
        for k, levels in enumerate(self.levels):
            if len(levels):
                rows[:, k] = function(rows[:, k], levels, steps[k])
        return rows

    def head(self, n: int) -> np.ndarray:
        """Return up to n rows (n, D + C): of the test split, then of the others."""
        splits = (self.test, self.validation, self.train)
        heads = [split[:n] for split in splits if split is not None]
        return np.concatenate(heads)[:n]


class TableOptions(Protocol):
    """The options of a run that say which table it learns, and how the table is split."""

    dataset: str
    data_dir: str
    seed: int
    test_file: str
    dequantize: bool
    max_rows: int
    columns: list[str] | None
    drop: list[str] | None
    condition: list[str] | None


def load_table(
    name: str,
    data_dir: str | Path = 'data',
    seed: int = 0,
    test_file: str | Path = '',
    dequantize: bool = False,
    columns: Sequence[str] | None = None,
    drop: Sequence[str] | None = None,
    condition: Sequence[str] | None = None,
) -> TableData:
    """Load a two-dimensional problem, a published table, or a table of the user's own.

    Arguments:
        name: one of ``SAMPLERS``, ``ENERGIES`` or ``TABLES``, or the path of the user's own table.
        data_dir: the folder of the published tables.
        seed: splits the user's own table at random.
        test_file: the path of a table to test on; without it, the user's own table is split.
        dequantize: whether to add uniform noise to the discrete columns of the user's own table.
        columns, drop, condition: which columns of the user's own table are modelled, left out, and
            given to the density; see ``select_columns``.

    Raises ``UserError`` where there is no such table or it cannot be used.
    """
    if is_own_table(name):
        return load_user_table(
            Path(name), seed, test_file, dequantize, columns=columns, drop=drop, condition=condition
        )
    known = [*SAMPLERS, *ENERGIES, *TABLES]
    if name in known and (columns or drop or condition):
        raise UserError(f'--columns, --drop and --condition are for tables of your own, not {name}')
    if name in SAMPLERS or name in ENERGIES:
        return load_toy_problem(name)
    if name in TABLES:
        return load_published_table(name, Path(data_dir))

    near = nearest_names(name, known)
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
        saved_units = saved_table_units(saved)
        if needs_rows:
            require_known_table(saved)
        if not config.dataset:
            return saved_units
        is_toy_problem = config.dataset in SAMPLERS or config.dataset in ENERGIES
        if not needs_rows and not is_toy_problem and not has_moved(config, saved['config']):
            return saved_units
        require_tables(config)

    data = load_table(
        config.dataset,
        config.data_dir,
        saved['config'].seed if saved else config.seed,
        config.test_file,
        config.dequantize,
        *column_options(config),
    )
    if saved and saved_units:
        name = describe_tables(config, saved['config'])
        require_same_table(data, saved_units, name)
    if config.max_rows and data.train is not None:
        train = data.train[: config.max_rows]
        own = train[:, : len(data.columns)]
        data = replace(
            data, train=train, quantiles=column_quantiles(own), ranges=column_ranges(own)
        )
    return data


def require_known_table(saved: dict[str, Any]) -> None:
    """Raise ``UserError`` where a checkpoint knows no table, as those from Python."""
    if not saved['config'].dataset:
        raise UserError(
            f'{saved["path"]} was fitted from Python and knows no table: score rows by --evaluate '
            '--input=FILE'
        )


def saved_table_units(saved: dict[str, Any]) -> TableData:
    """Return the table that a checkpoint knows, without its rows."""
    n_columns, n_context = saved['input_dims']
    data = table_from_units(saved['units'], n_columns, n_context, saved['path'])
    return replace(data, fingerprint=saved['fingerprint'])


def column_options(config: TableOptions) -> list[list[str] | None]:
    """Return the options of a run that select columns, in the order of ``load_table``."""
    return [config.columns, config.drop, config.condition]


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
        quantiles=column_quantiles(sampler(np.random.default_rng((10**9, 2)), N_VALIDATION)),
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
    conditions = [
        {
            'name': condition.name,
            'mean': condition.mean,
            'std': condition.std,
            'categories': list(condition.categories),
        }
        for condition in data.conditions
    ]
    return {
        'columns': list(data.columns),
        'mean': data.mean.tolist(),
        'std': data.std.tolist(),
        'steps': np.broadcast_to(data.steps, len(data.columns)).tolist(),
        'levels': [levels.tolist() for levels in data.levels] or [[] for _ in data.columns],
        'features': list(data.features),
        'conditions': conditions,
        'quantiles': data.quantiles.T.tolist(),
        'ranges': data.ranges.T.tolist(),
    }


def table_from_units(
    units: dict[str, list], n_columns: int, n_context: int, path: str | Path
) -> TableData:
    """Return a table without rows that has the given units, those of the checkpoint at ``path``.

    Its values have the types that ``table_units`` gives them. Raises ``UserError`` unless they are
    the units of ``n_columns`` columns, and of conditions that are ``n_context`` numbers.
    """
    entries, features = units['conditions'], units['features']
    names = [*units['columns'], *(entry['name'] for entry in entries)]
    per_column = ('columns', 'mean', 'std', 'steps', 'levels', 'quantiles', 'ranges')
    is_valid = (
        all(len(units[name]) == n_columns for name in per_column)
        and len(features) <= MAX_COLUMNS
        and ''.join(features).isprintable()
        and len(set(features)) == len(features)
        and len(set(names)) == len(names)
        and set(names) <= set(features)
        and np.isfinite([units['mean'], units['std'], units['steps']]).all()
        and min(units['std']) > 0
        and all(is_increasing(values) for values in units['levels'])
        and do_not_decrease(units['quantiles'], len(QUANTILE_LEVELS))
        and do_not_decrease(units['ranges'], 2)
        and all(is_valid_condition(entry) for entry in entries)
        and sum(len(entry['categories']) or 1 for entry in entries) == n_context
    )
    if not is_valid:
        raise UserError(f'{path} is damaged: its columns and its units do not fit')
    return TableData(
        train=None,
        validation=None,
        test=None,
        columns=tuple(units['columns']),
        mean=np.array(units['mean']),
        std=np.array(units['std']),
        steps=np.array(units['steps']),
        levels=tuple(np.array(values) for values in units['levels']),
        features=tuple(features),
        quantiles=np.array(units['quantiles']).T,
        ranges=np.array(units['ranges']).T,
        conditions=tuple(condition_from_units(entry) for entry in entries),
    )


def is_increasing(values: list[float]) -> bool:
    """Return whether values are finite, and each is larger than the one before it."""
    return bool(np.isfinite(values).all() and (np.diff(values) > 0).all())


def do_not_decrease(columns: list[list[float]], n: int) -> bool:
    """Return whether each column has n finite values that do not decrease, or none has any."""
    lengths = {len(values) for values in columns}
    if lengths == {0}:
        return True
    if lengths != {n}:
        return False
    values = np.array(columns)
    return bool(np.isfinite(values).all() and (values[:, 1:] >= values[:, :-1]).all())


def is_valid_condition(entry: dict[str, Any]) -> bool:
    """Return whether the plain values of a condition make sense."""
    categories = entry['categories']
    return bool(
        np.isfinite([entry['mean'], entry['std']]).all()
        and entry['std'] > 0
        and ''.join(categories).isprintable()
        and len(set(categories)) == len(categories) <= MAX_CATEGORIES
    )


def condition_from_units(entry: dict[str, Any]) -> Condition:
    """Return the condition that has these plain values."""
    return Condition(entry['name'], entry['mean'], entry['std'], tuple(entry['categories']))


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
        and len(data.conditions) == len(expected.conditions)
        and all(map(is_same_condition, data.conditions, expected.conditions))
    )
    if not is_same:
        raise UserError(
            f'{name} is not what it was when the model was trained: bring back the table of then, '
            'score new rows by --evaluate --input=FILE, or train a new model'
        )


def is_same_condition(condition: Condition, expected: Condition) -> bool:
    """Return whether two conditions are the same column, in the same units."""
    return (
        (condition.name, condition.categories) == (expected.name, expected.categories)
        and math.isclose(condition.mean, expected.mean, rel_tol=1e-5, abs_tol=1e-8)
        and math.isclose(condition.std, expected.std, rel_tol=1e-5)
    )


# ------------------------------------------------------------------------------ the user's tables


def load_user_table(
    path: Path, seed: int, test_file: str | Path, dequantize: bool, **selection: Any
) -> TableData:
    """Load a table of the user's own, standardised by its training split.

    It is split 80/10/10% at random, or 90/10% into training and validation where there is a
    ``test_file`` to test on. The ``selection`` is that of ``table_from_frame``.
    """
    frame = read_frame(path)
    test_frame = read_frame(test_file) if test_file else None
    return table_from_frame(
        frame,
        path,
        seed,
        test_frame,
        dequantize=dequantize,
        test_source=test_file,
        **selection,
    )


def table_from_frame(
    frame: pd.DataFrame,
    source: str | Path,
    seed: int = 0,
    test_frame: pd.DataFrame | None = None,
    with_test: bool = True,
    dequantize: bool = False,
    columns: Sequence[str] | None = None,
    drop: Sequence[str] | None = None,
    condition: Sequence[str] | None = None,
    test_source: str | Path = 'the test table',
) -> TableData:
    """Return a table of the user's own, standardised by its training split.

    Arguments:
        frame: the table. Columns that are not used may hold anything.
        source: where it comes from, for messages.
        seed: splits it at random.
        test_frame: the rows to test on. Without it, a tenth of the rows is for testing.
        with_test: if not, there is no test split (it has no rows), and a table may be small.
        dequantize: whether to add uniform noise to discrete columns.
        columns, drop, condition: which columns are modelled, left out, and given to the density;
            see ``select_columns``.
        test_source: where the ``test_frame`` comes from.

    Raises ``UserError`` where the table cannot be used.
    """
    require_column_names(frame, source)
    options = ColumnOptions(list(frame.columns), drop, condition)
    selection = select_columns(options.names, columns, drop, condition)
    if 'log_likelihood' in (*selection.columns, *selection.conditions):
        raise UserError(
            f'{source}: log_likelihood is a name of what this program writes: add '
            f'{options.to_drop(["log_likelihood"])}, or rename the column'
        )
    values = read_values(frame, selection, source, options)
    require_usable(values, selection.columns, options, source, with_test)
    split = split_at_random(len(values), seed, with_test and test_frame is None)
    if with_test and len(split[0]) < len(selection.columns):
        raise UserError(
            f'{source} has {len(values)} rows of {len(selection.columns)} columns: '
            'too few to train, validate and test on'
        )
    known = known_rows(split)
    conditions = tuple(make_condition(frame[k], known, source) for k in selection.conditions)
    context = encode_conditions(frame, conditions, source)
    data = standardise_table(values, context, split, selection.columns, options, source, dequantize)
    data = replace(data, conditions=conditions, features=tuple(frame.columns))

    parts = [(values, frame, source), (values[:0], frame[:0], source)]
    if test_frame is not None:
        test_frame = match_columns(test_frame, selection, options.names, test_source)
        test_values = read_values(test_frame, selection, test_source)
        parts[1] = test_values, test_frame, test_source
        test = rows_of_values(test_values, test_frame, data, test_source)
        data = replace(data, test=test, test_index=np.arange(len(test)))
    return replace(data, fingerprint=table_fingerprint(parts, data.columns, conditions))


def read_values(
    frame: pd.DataFrame,
    selection: Selection,
    source: str | Path,
    options: ColumnOptions | None = None,
) -> np.ndarray:
    """Return the columns of a table that are modelled, as numbers (N, D).

    Raises ``UserError`` where one of them is not numeric, or where cells of them or of the
    conditions are missing. ``options`` are given where columns can still be dropped.
    """
    require_readable(frame, selection, source, options)
    values, not_numeric = number_columns(frame, selection.columns)
    require_numeric(frame, not_numeric, source, options)

    missing = [missing_cells(frame[name]) for name in selection.conditions]
    is_missing = np.column_stack([~np.isfinite(values), *missing])
    require_complete([*selection.columns, *selection.conditions], is_missing, source, options)
    return values


def require_usable(
    values: np.ndarray,
    columns: tuple[str, ...],
    options: ColumnOptions,
    source: str | Path,
    with_test: bool,
) -> None:
    """Raise ``UserError`` where a table (N, D) has too few rows or constant columns."""
    few = max(len(columns), 10) if with_test else 2
    if len(values) < few:
        raise UserError(
            f'{source} has {len(values)} rows and {len(columns)} columns: '
            'a density needs many more rows than columns'
        )
    require_varying((values != values[:1]).any(axis=0), columns, options, source)


def require_varying(
    is_varying: np.ndarray,
    columns: tuple[str, ...],
    options: ColumnOptions,
    source: str | Path,
    where: str = '',
) -> None:
    """Raise ``UserError`` with all columns that are constant."""
    constant = [columns[k] for k in np.flatnonzero(~is_varying)]
    if constant:
        raise UserError(
            f'{source}: constant{where}: {list_names(constant)}: add {options.to_drop(constant)}'
        )


def standardise_table(
    values: np.ndarray,
    context: np.ndarray,
    split: Split,
    columns: tuple[str, ...],
    options: ColumnOptions,
    source: str | Path,
    dequantize: bool,
) -> TableData:
    """Return values (N, D) and the numbers (N, C) that are given with them as standardised splits.

    Discrete columns get noise where they are to be dequantized, else a note.
    """
    discrete = find_discrete_columns(values)
    levels, steps = find_levels(values, discrete if dequantize else [])
    spread = dequantize_columns(values, steps) if steps.any() else values

    mean, std = training_units(spread[known_rows(split)], columns, options, source)
    train_rows, validation_rows, test_rows = (
        join_context(standardise_rows(spread[index], mean, std, source), context[index])
        for index in map(np.sort, split)
    )

    still_discrete = [] if dequantize else [columns[k] for k in discrete]
    return TableData(
        train_rows,
        validation_rows,
        test_rows,
        columns,
        mean,
        std,
        test_index=np.sort(split[2]),
        notes=(
            *index_notes(values, columns, options),
            *likelihood_notes(spread[split[0]], still_discrete),
        ),
        steps=steps,
        levels=levels,
        quantiles=column_quantiles(train_rows[:, : len(columns)]),
        ranges=column_ranges(train_rows[:, : len(columns)]),
    )


def join_context(rows: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Return rows (N, D) followed by what is given with them, (N, C), in the type of the rows."""
    if not context.shape[1]:
        return rows
    return np.concatenate([rows, context.astype(rows.dtype)], axis=1)


def column_quantiles(rows: np.ndarray) -> np.ndarray:
    """Return the quantiles (Q, D) of rows (N, D), or of evenly spaced ones where they are many."""
    stride = -(-len(rows) // MAX_QUANTILE_ROWS)
    some = np.asarray(rows[::stride], np.float64)
    return np.quantile(some, QUANTILE_LEVELS, axis=0)


def column_ranges(rows: np.ndarray) -> np.ndarray:
    """Return the lowest and the highest value of each column of rows (N, D), as (2, D) float64."""
    return np.stack([rows.min(axis=0), rows.max(axis=0)]).astype(np.float64)


def table_fingerprint(
    parts: Sequence[tuple[np.ndarray, pd.DataFrame, str | Path]],
    columns: tuple[str, ...],
    conditions: Sequence[Condition],
) -> str:
    """Return a digest of the user's own rows as they were read, and of those to test on.

    Arguments:
        parts: for both, the values (N, D), the table that has the conditions, and its source.
        columns: the names of the D columns.
        conditions: what the density is given.
    """
    values: list[Any] = [columns, [len(rows) for rows, _, _ in parts]]
    arrays = [rows for rows, _, _ in parts]
    if conditions:
        values.append([(condition.name, condition.categories) for condition in conditions])
    for _, frame, source in parts:
        arrays += [condition.read(frame[condition.name], source) for condition in conditions]
    return digest(values, [array.astype('<f8', copy=False) for array in arrays])


def index_notes(
    values: np.ndarray, columns: tuple[str, ...], options: ColumnOptions
) -> tuple[str, ...]:
    """Return a note about those columns of a table (N, D) that look like an index, if any."""
    found = [name for name, column in zip(columns, values.T) if looks_like_an_index(column)]
    if not found or len(found) == len(columns):
        return ()
    return (f'{list_names(found)}: {INDEX_NOTE} {options.to_drop(found)}',)


def find_discrete_columns(values: np.ndarray) -> list[int]:
    """Return which columns have few distinct values: at most 10, or 5% of the number of rows.

    Columns of a few rows whose values are all different are not among them.
    """
    few = max(10, len(values) // 20)
    n_distinct = [len(np.unique(column)) for column in values.T]
    return [k for k, n in enumerate(n_distinct) if n <= few and n < len(values)]


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
    n_rows, n_columns = values.shape
    if n_columns == 1 or n_rows <= n_columns or (values == values[0]).all(axis=0).any():
        return False
    correlation = np.corrcoef(values, rowvar=False)
    return np.linalg.eigvalsh(correlation)[0] < 1e-10


def split_at_random(n_rows: int, seed: int, with_test: bool) -> Split:
    """Return the indices, in random order, of training, validation and test rows.

    A tenth of the rows, at least one, is for validation and, ``with_test``, another tenth for
    testing.
    """
    order = np.random.default_rng(seed).permutation(n_rows)
    tenth = max(1, n_rows // 10)
    rest, last = np.split(order, [n_rows - tenth])
    if not with_test:
        return rest, last, order[:0]
    train, validation = np.split(rest, [n_rows - 2 * tenth])
    return train, validation, last


def known_rows(split: Split) -> np.ndarray:
    """Return the indices of the rows that standardise a table: those of the training split.

    Tables of less than ten rows, which hardly have two to train on, are standardised by all.
    """
    n_rows = sum(map(len, split))
    return split[0] if n_rows >= 10 else np.arange(n_rows)


def training_units(
    values: np.ndarray, columns: tuple[str, ...], options: ColumnOptions, source: str | Path
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation, each (D,), of the training rows (N, D).

    Raises ``UserError`` where a column is constant.
    """
    with np.errstate(over='ignore'):  # standardise_rows refuses values that are too large
        mean, std = values.mean(axis=0), values.std(axis=0)
    require_varying(std > 0, columns, options, source, ' in the training split')
    return mean, std


def standardise_rows(
    values: np.ndarray,
    mean: np.ndarray,
    std: np.ndarray,
    path: str | Path,
    dtype: npt.DTypeLike = np.float32,
) -> np.ndarray:
    """Return the standardised rows (N, D), as float32 unless another type is wanted.

    Raises ``UserError`` where a value or a standard deviation is too large for it.
    """
    with np.errstate(over='ignore', invalid='ignore'):
        rows = ((values - mean) / std).astype(dtype)
    is_finite = np.isfinite(rows).all() and np.isfinite(std).all()
    if not is_finite:
        largest = np.abs(values).max()
        raise UserError(
            f'{path} holds values that are too large for {np.dtype(dtype)}: {largest:g}'
        )
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
    """Read a table of the user's own as rows (N, D + C) in the units of another.

    See ``rows_of_frame``.
    """
    return rows_of_frame(read_frame(path), like, path)


def rows_of_frame(
    frame: pd.DataFrame, like: TableData, source: str | Path, dtype: npt.DTypeLike = np.float32
) -> np.ndarray:
    """Return a table of the user's own as rows (N, D + C) in the units of another.

    Columns are found as by ``match_columns``. See ``rows_of_values``. Raises ``UserError`` where
    columns or cells are missing, or hold text.
    """
    require_column_names(frame, source)
    conditions = tuple(condition.name for condition in like.conditions)
    selection = Selection(like.columns, conditions)
    table = match_columns(frame, selection, like.features, source)
    values = read_values(table, selection, source)
    return rows_of_values(values, table, like, source, dtype)


def rows_of_values(
    values: np.ndarray,
    table: pd.DataFrame,
    like: TableData,
    source: str | Path,
    dtype: npt.DTypeLike = np.float32,
) -> np.ndarray:
    """Return the values (N, D) of a table, with its conditions, in the units of another.

    Discrete columns are spread once, even where they already were.
    """
    context = encode_conditions(table, like.conditions, source)
    on_levels = like.map_discrete(values, remove_noise)
    spread = dequantize_columns(on_levels, like.steps)
    rows = standardise_rows(spread, like.mean, like.std, source, dtype)
    return join_context(rows, context)


def frame_of_rows(
    rows: np.ndarray, like: TableData, given: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Return rows (N, D) in the own units of a table with the names of its columns, in its order.

    The conditions among the columns of ``given``, which has N rows, are among them.
    """
    table = pd.DataFrame(rows, columns=pd.Index(like.columns, dtype=object))
    if given is not None:
        names = [condition.name for condition in like.conditions if condition.name in given]
        table = pd.concat([table, given[names].reset_index(drop=True)], axis=1)
    return table[[name for name in like.used_features if name in table]]


def match_columns(
    frame: pd.DataFrame, selection: Selection, features: Sequence[str], source: str | Path
) -> pd.DataFrame:
    """Return a table that has the selected columns by name, and may have more.

    Where it or the table that the model was trained on has no names, it has to have all columns of
    the latter, or those that are used, in the same order. A last column ``log_likelihood``, as
    generated rows have it, is then left out. Raises ``UserError`` where columns are missing.

    Arguments:
        frame: the table.
        selection: the columns and the conditions of the model.
        features: all columns of the table that the model was trained on.
        source: where the table comes from.
    """
    wanted = [*selection.columns, *selection.conditions]
    names = list(frame.columns)
    if set(wanted) <= set(names):
        return frame

    if names and names[-1] == 'log_likelihood':
        names = names[:-1]
        frame = frame.iloc[:, :-1]
    used = [name for name in features if name in wanted]
    if is_unnamed(names) or is_unnamed(features):
        for own_names in (list(features), used):
            if len(own_names) == len(names):
                return rename_columns(frame, own_names)

    if set(selection.columns) <= set(names) and not is_unnamed(names):
        require_conditions(frame, selection.conditions, source)
    if len(names) > len(wanted) and not is_unnamed(names) and not is_unnamed(wanted):
        missing = describe_missing(wanted, names)
        raise UserError(f'{source} lacks columns that the model was trained on: {missing}')
    expected = list_names(used)
    if len(names) != len(wanted):
        raise UserError(
            f'{source} has {len(names)} columns, and the model was trained on {len(wanted)}: '
            f'{expected}'
        )
    raise UserError(
        f'{source} has columns {list_names(names)}, and the model was trained on {expected}'
    )


def rename_columns(frame: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Return a table with other names of its columns. Those that are pickles remain so."""
    pickled = frame.attrs.get(PICKLED, ())
    renamed = frame.set_axis(names, axis=1)
    renamed.attrs[PICKLED] = [new for new, old in zip(names, frame.columns) if old in pickled]
    return renamed


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
        quantiles=column_quantiles(train),
        ranges=column_ranges(train),
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
    with open_regular(path) as file, progress:
        content = gzip.open(file) if path.suffix == '.gz' else file
        text = io.BufferedReader(BoundedLineFile(content, MAX_RAW_LINE_BYTES), 2**18)
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
    if path.suffix == '.npy':
        data = map_published_npy(path, 8)
    else:
        data = read_bounded(read_raw_power, path)

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
        data, names = read_after_trial(read_pickled_table, path)
        sensors = [k for k, name in enumerate(names) if name not in ('Meth', 'Eth', 'Time')]
        data = data[:, sensors]
    else:
        data = read_bounded(read_raw_gas, path)

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
    test_path = path.with_name(path.name.replace('train', 'test'))
    train = read_bounded(read_hepmass_signal, path)
    test = read_bounded(read_hepmass_signal, test_path)
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
        data = read_bounded(read_raw_miniboone, path)
    return standardise_splits(split_in_order(data))


def read_raw_miniboone(path: Path) -> np.ndarray:
    """Return the signal (N, 43) of the raw file, whose first line says how many rows it has."""
    with open_regular(path) as file:
        counts = file.readline(MAX_RAW_LINE_BYTES).split()
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
        return read_after_trial(read_bsds300_patches, path)

    rng = np.random.default_rng(0)
    with bounded_memory(path):
        known_images = read_grey_images(path, 'train')
        test_images = read_grey_images(path, 'test')
    known = draw_patches(known_images, n_train + n_validation, rng)
    test = draw_patches(test_images, n_test, rng)
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
    with contextlib.closing(iterate_members(path)) as members:
        for member in members:
            file = member.open() if member.is_regular and is_wanted(member.name) else None
            if file is not None:
                images.append((member.name, read_grey_image(file)))

    if not images:
        raise ValueError(f'it has no images/{part}/*.jpg')
    return [image for _, image in sorted(images, key=lambda item: item[0])]


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
