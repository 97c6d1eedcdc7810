"""Columns of the user's own tables: which are modelled, which are given, and what is in them.

The density p(columns | conditions) is one of numbers. A condition may also be a category, such as
a text, which is given to the model as one number per category.
"""

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.errors import UserError, index_of_name, nearest_names, truncate

from .own_tables import PICKLED, UNNAMED_FIRST, is_own_table, is_unnamed, read_frame

MAX_CATEGORIES = 100  # of a condition
MAX_NUMERIC_CATEGORIES = 10  # a column of more different numbers is a number, not a category
ROWS_PER_CATEGORY = 5  # and so is one of fewer rows per number
MAX_SUGGESTED_CATEGORIES = 20  # a column of more different texts is not suggested as a condition
MIN_INDEX_ROWS = 20  # of a table in which a column of different whole numbers looks like an index
MAX_NAMED = 8  # columns that a message describes, one by one
MAX_DESCRIBED = 1_000  # columns that are looked at for a message
MAX_OPTION = 240  # characters of an option that a message suggests
BOOLEANS = {'true': 1.0, 'false': 0.0}


# -------------------------------------------------------------------------------------- selection


@dataclass(frozen=True)
class Selection:
    """The names of the columns that are modelled, and of those that they are conditioned on."""

    columns: tuple[str, ...]
    conditions: tuple[str, ...]


def select_columns(
    names: Sequence[str],
    columns: Sequence[str] | None = None,
    drop: Sequence[str] | None = None,
    condition: Sequence[str] | None = None,
) -> Selection:
    """Select columns of a table with these names, in the order in which they are asked for.

    Arguments:
        names: all columns of the table.
        columns: those to model, by default all.
        drop: those to leave out.
        condition: those that the density is given; they are not modelled.

    Each is a list of names, indices from 0, and ranges of either, such as ``0-5``, whose ends are
    part of it. Raises ``UserError`` where there are no such columns, and where none is left.
    """
    chosen = parse_columns(columns, names) if columns else list(range(len(names)))
    dropped = parse_columns(drop or [], names)
    conditions = parse_columns(condition or [], names)

    both = [names[k] for k in conditions if k in dropped]
    if both:
        raise UserError(
            f'--condition and --drop both name {list_names(both)}: take it out of one of them'
        )
    left_out = {*dropped, *conditions}
    modelled = [k for k in chosen if k not in left_out]
    if not modelled:
        raise UserError(
            'no column is left to model: give other --columns, or fewer to --drop and --condition'
        )
    return Selection(
        columns=tuple(names[k] for k in modelled),
        conditions=tuple(names[k] for k in conditions),
    )


def parse_columns(texts: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the indices of columns that are given by names, indices and ranges, each once."""
    indices: list[int] = []
    for text in texts:
        indices += parse_range(text, names)
    return list(dict.fromkeys(indices))


def parse_range(text: str, names: Sequence[str]) -> list[int]:
    """Return the indices of the column, or of the range of columns, that ``text`` means."""
    ends = None if text in names else split_range(text, names)
    if ends is None:
        return [index_of_name(text, names, 'column')]

    first, last = (index_of_name(end, names, 'column') for end in ends)
    if last < first:
        raise UserError(f'the columns {text} run backwards: {ends[1]} comes before {ends[0]}')
    return list(range(first, last + 1))


def split_range(text: str, names: Sequence[str]) -> tuple[str, str] | None:
    """Return the two ends of a range such as ``0-5``, or None if neither end is a column.

    Names may have hyphens of their own: the hyphen that parts two columns is the one that counts.
    Raises ``UserError`` where there are several.
    """
    by_n_known: dict[int, list[tuple[str, str]]] = {1: [], 2: []}
    for hyphen in re.finditer('-', text):
        ends = text[: hyphen.start()].strip(), text[hyphen.end() :].strip()
        n_known = sum(end in names or end.isdecimal() for end in ends)
        if all(ends) and n_known:
            by_n_known[n_known].append(ends)

    ranges = by_n_known[2]
    if len(ranges) > 1:
        texts = ' or '.join(f'{first} to {last}' for first, last in ranges)
        raise UserError(f'the columns {text} may be {texts}: give their indices')
    likely = [*ranges, *by_n_known[1]]
    return likely[0] if likely else None


# --------------------------------------------------------------------------------- what cells hold


def as_numbers(column: pd.Series) -> np.ndarray | None:
    """Return a column as float64 (N,), where missing cells are NaN; None if it is not numeric.

    True and False are 1 and 0, in a column of text too if it holds nothing else.
    """
    dtype = column.dtype
    if isinstance(dtype, np.dtype) and dtype.kind in 'fiub':
        return column.to_numpy(np.float64)
    if column.isna().all():
        return np.full(len(column), np.nan)
    if isinstance(dtype, np.dtype) and dtype.kind in 'mMc':  # times and complex numbers
        return None
    if isinstance(dtype, pd.DatetimeTZDtype | pd.PeriodDtype | pd.IntervalDtype):
        return None
    if not isinstance(dtype, pd.CategoricalDtype) and pd.api.types.is_numeric_dtype(dtype):
        return column.to_numpy(np.float64, na_value=np.nan)

    codes, cells = distinct_cells(column)
    numbers = parse_cells(cells)
    if numbers is None:
        return None
    return np.array([*numbers, np.nan])[codes]  # the code of a missing cell is -1


def distinct_cells(column: pd.Series) -> tuple[np.ndarray, list[Any]]:
    """Return the different cells of a column, and for each row the index of its cell.

    The index of a missing cell is -1.
    """
    dtype = column.dtype
    if isinstance(dtype, np.dtype) and dtype.kind == 'f' and dtype.itemsize < 8:
        # 0.1 in float32 is 0.1, not the nearest float64
        column = pd.Series(column.to_numpy().astype(str).astype(np.float64))
    cells = column.astype(object)
    try:
        codes, distinct = pd.factorize(cells)
    except TypeError:  # cells that cannot be compared, such as lists
        codes, distinct = pd.factorize(cells.map(str, na_action='ignore'))
    return codes, list(distinct)


def parse_cells(cells: Sequence[Any]) -> list[float] | None:
    """Return cells as numbers, or None where one of them is none."""
    if all(map(is_true_or_false, cells)):
        return [BOOLEANS[str(cell).strip().lower()] for cell in cells]

    parsed = []
    for cell in cells:
        number = parse_cell(cell)
        if number is None:
            return None
        parsed.append(number)
    return parsed


def is_true_or_false(cell: Any) -> bool:
    """Return whether a cell holds True or False, or one of their names."""
    return isinstance(cell, str | bool | np.bool_) and str(cell).strip().lower() in BOOLEANS


def parse_cell(cell: Any) -> float | None:
    """Return the number in a cell, or None where it is something else."""
    is_text = isinstance(cell, str) and '_' not in cell  # Python reads 1_000 as a number
    if not is_text and not isinstance(cell, bool | np.bool_ | Real | Decimal):
        return None
    try:
        return float(cell)
    except ValueError:
        return None
    except OverflowError:  # a whole number that is too large
        return np.inf


def number_columns(frame: pd.DataFrame, names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return columns as numbers (N, D), and the names of those that are not numeric, in order.

    The latter are NaN in the result.
    """
    if all(isinstance(t, np.dtype) and t.kind in 'fiu' for t in frame.dtypes[list(names)]):
        # all columns are taken as they are, so that they need no copy
        table = frame if list(frame.columns) == list(names) else frame[list(names)]
        return table.to_numpy(np.float64), []

    numbers = np.full((len(frame), len(names)), np.nan)
    not_numeric = []
    for k, name in enumerate(names):
        values = as_numbers(frame[name])
        if values is not None:
            numbers[:, k] = values
        if values is None or name in frame.attrs.get(PICKLED, ()):
            not_numeric.append(name)
    return numbers, not_numeric


def looks_like_an_index(values: np.ndarray) -> bool:
    """Return whether a column (N,) holds nothing but different whole numbers."""
    if len(values) < MIN_INDEX_ROWS or (values != np.floor(values)).any():
        return False
    return len(np.unique(values)) == len(values)


# ---------------------------------------------------------------------------------------- messages


def list_names(names: Sequence[str]) -> str:
    """Return the first names of a list as text, for a message."""
    more = f' and {len(names) - MAX_NAMED} more' if len(names) > MAX_NAMED else ''
    return ', '.join(map(shorten, names[:MAX_NAMED])) + more


def shorten(name: str) -> str:
    """Shorten the name of a column for a message, which names several."""
    return truncate(name, 30)


def option_words(
    option: str, given: Sequence[str] | None, names: Sequence[str], added: Iterable[str]
) -> str:
    """Return an option that adds columns to those that it was given, as it is typed.

    Arguments:
        option: its name, such as ``'drop'``.
        given: what it was given.
        names: all columns of the table.
        added: the names of the columns to be added. A column whose name cannot be typed in a list
            is given by its index.
    """
    words = list(given or [])
    places = {name: k for k, name in enumerate(names)}
    for name in added:
        is_plain = name == name.strip() and ',' not in name and len(name) <= 40
        if is_plain and not re.fullmatch(r'-?\d+|column \d+|', name) and name != UNNAMED_FIRST:
            words.append(name)
        else:
            words.append(str(places[name]))
    value = ','.join(words)
    if len(value) > MAX_OPTION:
        return f'--{option}={shlex.quote(value[:MAX_OPTION])}... ({len(words)} columns)'
    return f'--{option}={shlex.quote(value)}'


@dataclass(frozen=True)
class ColumnOptions:
    """The options that select columns of a table, for messages that add to them."""

    names: Sequence[str]
    drop: Sequence[str] | None = None
    condition: Sequence[str] | None = None

    def to_drop(self, names: Iterable[str]) -> str:
        """Return ``--drop`` with these columns besides those that it has."""
        return option_words('drop', self.drop, self.names, names)

    def to_condition(self, names: Iterable[str]) -> str:
        """Return ``--condition`` with these columns besides those that it has."""
        return option_words('condition', self.condition, self.names, names)


def require_readable(
    frame: pd.DataFrame,
    selection: Selection,
    source: str | Path,
    options: ColumnOptions | None = None,
) -> None:
    """Raise ``UserError`` where a selected column has no name, or is a pickle in its file.

    ``options`` are given where columns can still be dropped.
    """
    selected = [*selection.columns, *selection.conditions]
    if options is not None and UNNAMED_FIRST in selected and frame.columns[0] == UNNAMED_FIRST:
        drop = options.to_drop([UNNAMED_FIRST])
        raise UserError(
            f"{source}: the first column has no name. Is it pandas' index? "
            f'Add {drop}, leave it out (index=False), or name it'
        )
    pickled = [name for name in selected if name in frame.attrs.get(PICKLED, ())]
    if pickled:
        drop = f'add {options.to_drop(pickled)}, or ' if options is not None else ''
        raise UserError(
            f'{source}: not read, as pickles can run code: {list_names(pickled)}: {drop}save the '
            'table as .csv or .parquet'
        )


def require_numeric(
    frame: pd.DataFrame,
    not_numeric: Sequence[str],
    source: str | Path,
    options: ColumnOptions | None = None,
) -> None:
    """Raise ``UserError`` where there are columns that are not numeric.

    It describes them. Where ``options`` are given, it suggests to condition on those of few
    different cells, and to drop the others.
    """
    if not not_numeric:
        return
    texts: list[str] = []
    to_drop: list[str] = []
    to_condition: list[str] = []
    for name in not_numeric[:MAX_DESCRIBED]:
        example, row, n_distinct, n_texts = describe_text(frame[name])
        if n_texts or options is None:
            more = f' and {n_texts - 1:,} more' if n_texts > 1 else ''
            texts.append(f'{shorten(name)} ({example!r} in row {row}{more})')
            to_drop.append(name)
            continue
        texts.append(f'{shorten(name)} ({example!r}, {n_distinct:,} different)')
        is_category = 1 < n_distinct <= MAX_SUGGESTED_CATEGORIES
        (to_condition if is_category else to_drop).append(name)

    to_drop += not_numeric[MAX_DESCRIBED:]
    more = f' and {len(not_numeric) - MAX_NAMED} more' if len(not_numeric) > MAX_NAMED else ''
    advice = 'give numbers, as in the table that the model was trained on'
    if options is not None:
        words = [options.to_drop(to_drop)] if to_drop else []
        words += [options.to_condition(to_condition)] if to_condition else []
        advice = f'add {" ".join(words)}, or encode them as numbers'
    raise UserError(f'{source}: not numeric: {", ".join(texts[:MAX_NAMED])}{more}: {advice}')


def describe_text(column: pd.Series) -> tuple[str, int, int, int]:
    """Return the first cell of a column that is no number, and its row.

    Besides, return the number of different cells and, if some of them are numbers, how many cells
    are none; else 0.
    """
    codes, cells = distinct_cells(column)
    is_text = np.array([parse_cell(cell) is None for cell in cells])
    first = int(np.argmax(is_text))
    row = int(np.argmax(codes == first))
    n_texts = 0 if is_text.all() else int(np.isin(codes, np.flatnonzero(is_text)).sum())
    return str(cells[first])[:30], row, len(cells), n_texts


def require_complete(
    names: Sequence[str],
    is_missing: np.ndarray,
    source: str | Path,
    options: ColumnOptions | None = None,
) -> None:
    """Raise ``UserError`` where cells are missing or infinite.

    Arguments:
        names: the names of the columns.
        is_missing: whether each cell (N, D) is missing or infinite.
        source: where the cells come from.
        options: given where columns can still be dropped.
    """
    counts = is_missing.sum(axis=0)
    if not counts.any():
        return
    texts: list[str] = []
    often_missing: list[str] = []
    for k in np.flatnonzero(counts).tolist():
        row = int(np.argmax(is_missing[:, k]))
        what = '' if texts else ' missing or infinite values, the first'
        texts.append(f'{counts[k]:,}{what} in column {shorten(names[k])}, row {row}')
        if 10 * counts[k] > len(is_missing):
            often_missing.append(names[k])

    more = f' and {len(texts) - MAX_NAMED} more columns' if len(texts) > MAX_NAMED else ''
    n_rows = is_missing.any(axis=1).sum()
    advice = f'drop those {n_rows:,} of {len(is_missing):,} rows or fill them in'
    if options is not None and often_missing:
        advice += f', or add {options.to_drop(often_missing)}'
    raise UserError(f'{source}: {"; ".join(texts[:MAX_NAMED])}{more}: {advice}')


# -------------------------------------------------------------------------------------- conditions


@dataclass(frozen=True)
class Condition:
    """A column that a density is given, and how its values become numbers.

    A category becomes one number per category, which is 1 for its own and 0 for the others.
    """

    name: str

    # Mean and standard deviation of a number in the training split.
    mean: float = 0.0
    std: float = 1.0

    # The categories as text (``category_text``), sorted, numbers by their value; none of a number.
    categories: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Return how many numbers stand for a value."""
        return len(self.categories) or 1

    def encode(self, values: pd.Series, source: str | Path) -> np.ndarray:
        """Return values (N,) as the model gets them: (N, width), float64.

        Raises ``UserError`` where values are missing, no numbers, or no known categories.
        """
        numbers = self.read(values, source)
        if self.categories:
            return np.eye(self.width)[numbers.astype(int)]

        with np.errstate(over='ignore'):
            encoded = (numbers - self.mean) / self.std
        if not (np.abs(encoded) <= np.finfo(np.float32).max).all():
            largest = np.abs(numbers).max()
            raise UserError(
                f'{source}: column {shorten(self.name)} holds values that are too large for '
                f'float32: {largest:g}'
            )
        return encoded[:, None]

    def read(self, values: pd.Series, source: str | Path) -> np.ndarray:
        """Return values (N,) as numbers, or as the indices of their categories, float64."""
        require_complete([self.name], missing_cells(values)[:, None], source)
        if self.categories:
            return self.read_categories(values, source)
        return self.read_numbers(values, source)

    def read_numbers(self, values: pd.Series, source: str | Path) -> np.ndarray:
        """Return values (N,) as numbers; raise ``UserError`` where one is none."""
        found = as_numbers(values)
        if found is None:
            example, row, _, _ = describe_text(values)
            raise UserError(
                f'{source}: column {shorten(self.name)} needs numbers, and has {example!r} in row '
                f'{row}'
            )
        return found

    def read_categories(self, values: pd.Series, source: str | Path) -> np.ndarray:
        """Return the indices of categories (N,); raise ``UserError`` where one is not known."""
        codes, cells = distinct_cells(values)
        index_of = {category: k for k, category in enumerate(self.categories)}
        indices = []
        for i, cell in enumerate(cells):
            text = category_text(cell)
            if text not in index_of:
                row = int(np.argmax(codes == i))
                near = nearest_names(text, self.categories, n=3, cutoff=0)
                # longer than other names in messages, as one of them is to be copied from here
                nearest = ', '.join(truncate(category, 80) for category in near)
                raise UserError(
                    f'{source}: {shorten(self.name)} {shorten(text)!r} in row {row} is not among '
                    f'the {self.width} that the model knows: the nearest are {nearest}'
                )
            indices.append(index_of[text])
        return np.array(indices, np.float64)[codes]


def missing_cells(column: pd.Series) -> np.ndarray:
    """Return which cells (N,) of a column are missing, infinite or blank."""
    is_missing = column.isna().to_numpy(bool)
    dtype = column.dtype
    if isinstance(dtype, np.dtype) and dtype.kind in 'fiub':
        return ~np.isfinite(column.to_numpy(np.float64))

    codes, cells = distinct_cells(column)
    is_bad = [is_blank_or_infinite(cell) for cell in cells]
    return is_missing | np.array([*is_bad, True])[codes]


def is_blank_or_infinite(cell: Any) -> bool:
    """Return whether a cell is a text without characters, or a number that is not finite."""
    if isinstance(cell, str):
        return not cell.strip()
    number = parse_cell(cell)
    return number is not None and not np.isfinite(number)


def category_text(value: Any) -> str:
    """Return the text of a category: the same for 1, 1.0, True, ``'1'`` and ``'true'``.

    Text that is not written as a number would be, such as ``'01'``, stays as it is. Characters that
    cannot be printed are escaped.
    """
    if isinstance(value, int | np.integer):
        return str(int(value))
    text = str(value).strip()
    number = BOOLEANS.get(text.lower()) if isinstance(value, str) else None
    if number is None:
        number = parse_cell(value)
    if number is not None and np.isfinite(number):
        is_text = isinstance(value, str) and text.lower() not in BOOLEANS
        if not is_text or is_plain_number(text, number):
            return f'{number + 0.0:.15g}'  # 0 has no sign
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def is_plain_number(text: str, number: float) -> bool:
    """Return whether a text is how a number is written, up to zeros behind its point."""
    return re.sub(r'\.0+$', '', text) == f'{number:.15g}'


def category_order(text: str) -> tuple[bool, float, str]:
    """Return a key that sorts categories: numbers by their value, then text."""
    number = parse_cell(text)
    is_text = number is None or not np.isfinite(number)
    return is_text, 0.0 if is_text or number is None else number, text


def make_condition(column: pd.Series, train: np.ndarray, source: str | Path) -> Condition:
    """Return the condition that a column without missing cells is.

    Arguments:
        column: its values in all rows.
        train: the indices of the training rows, which standardise a number.
        source: where the values come from.

    Raises ``UserError`` where they are all the same, or too many different texts.
    """
    name = str(column.name)
    found = None if isinstance(column.dtype, pd.CategoricalDtype) else as_numbers(column)
    cells = distinct_cells(column)[1]
    is_number = found is not None and len(cells) > MAX_NUMERIC_CATEGORIES
    categories = set() if is_number else {category_text(cell) for cell in cells}
    n_distinct, n_rows = len(cells) if is_number else len(categories), len(column)
    if n_distinct < 2:
        raise UserError(f'{source}: column {shorten(name)} is constant: no use as --condition')

    is_few = n_distinct <= MAX_NUMERIC_CATEGORIES and n_rows >= ROWS_PER_CATEGORY * n_distinct
    if found is not None and not is_few and not is_boolean(column):
        return make_number(name, found[train], source)

    if n_distinct > MAX_CATEGORIES or n_distinct > max(0.9 * n_rows, 2):
        raise UserError(
            f'{source}: --condition={shorten(name)}: {n_distinct:,} different texts in '
            f'{n_rows:,} rows are too many; merge the rare ones, or drop the column'
        )
    return Condition(name, categories=tuple(sorted(categories, key=category_order)))


def is_boolean(column: pd.Series) -> bool:
    """Return whether a column that ``as_numbers`` can read holds True and False, or their names."""
    dtype = column.dtype
    if pd.api.types.is_bool_dtype(dtype) or pd.api.types.is_numeric_dtype(dtype):
        return pd.api.types.is_bool_dtype(dtype)
    _, cells = distinct_cells(column)
    return all(map(is_true_or_false, cells))


def make_number(name: str, values: np.ndarray, source: str | Path) -> Condition:
    """Return the condition that is a number, standardised by these values (N,).

    Raises ``UserError`` where they are all the same.
    """
    with np.errstate(over='ignore', invalid='ignore'):
        mean, std = float(values.mean()), float(values.std())
    if not (np.isfinite(std) and std > 0):
        raise UserError(
            f'{source}: column {shorten(name)} is constant in the training split, or too large '
            'for float32: no use as --condition'
        )
    return Condition(name, mean, std)


def encode_conditions(
    frame: pd.DataFrame, conditions: Sequence[Condition], source: str | Path
) -> np.ndarray:
    """Return the values of conditions (N, C) as the model gets them, float64.

    C is the sum of their widths. Columns are found by name. Raises ``UserError`` where one is
    missing or cannot be encoded.
    """
    require_conditions(frame, [condition.name for condition in conditions], source)
    encoded = [condition.encode(frame[condition.name], source) for condition in conditions]
    return np.concatenate([np.empty((len(frame), 0)), *encoded], axis=1)


def repeat_conditions(
    frame: pd.DataFrame, conditions: Sequence[Condition], n: int, source: str | Path
) -> tuple[pd.DataFrame, np.ndarray]:
    """Return rows of conditions, each ``n`` times, as a table and as the model gets them (N, C).

    The table has the conditions alone. Errors are those of ``encode_conditions``.
    """
    context = encode_conditions(frame, conditions, source)
    again = np.repeat(np.arange(len(frame)), n)
    names = [condition.name for condition in conditions]
    return frame[names].iloc[again], context[again]


def require_conditions(frame: pd.DataFrame, names: Sequence[str], source: str | Path) -> None:
    """Raise ``UserError`` where a table does not have all columns that a model is given."""
    missing = describe_missing(names, list(frame.columns))
    if missing:
        raise UserError(f'{source}: the model is conditioned on {missing}: give their values')


def describe_missing(names: Sequence[str], columns: Sequence[str]) -> str:
    """Return the names that are not among columns, with the nearest that are; empty if all are."""
    texts = []
    for name in names:
        if name in columns:
            continue
        near = nearest_names(name, columns)
        texts.append(f'{shorten(name)} (perhaps {shorten(near[0])})' if near else shorten(name))
        if len(texts) == MAX_NAMED:
            break
    return ', '.join(texts)


# -------------------------------------------------------------------------------- values of --given


def parse_given(text: str, names: Sequence[str]) -> pd.DataFrame:
    """Return the values of conditions that ``--given`` has, in one row or those of a table.

    Arguments:
        text: ``'age=40,sex=1'``, or the path of a table.
        names: the conditions. Not all of them need a value.

    Raises ``UserError`` where something else has a value, or the text cannot be understood.
    """
    if not names:
        raise UserError('the model is not conditioned on any column: leave out --given')
    if is_own_table(text) and ('=' not in text or Path(text).is_file()):
        return read_given_table(text, names)

    values: dict[str, list[Any]] = {}
    for piece in text.split(','):
        name, value = split_assignment(piece, names)
        if name in values:
            raise UserError(f'--given has two values of {name}')
        values[name] = [parse_value(value)]
    return pd.DataFrame(values)


def read_given_table(path: str, names: Sequence[str]) -> pd.DataFrame:
    """Return the rows of a table that has values of some conditions."""
    frame = read_frame(path)
    if is_unnamed(frame.columns) and frame.shape[1] == len(names) and not is_unnamed(names):
        frame.columns = pd.Index(list(names), dtype=object)
    if not set(names) & set(frame.columns):
        raise UserError(
            f'{path} has columns {list_names(list(frame.columns))}, and none of the conditions '
            f'{list_names(names)}'
        )
    return frame


def split_assignment(piece: str, names: Sequence[str]) -> tuple[str, str]:
    """Return the name of a condition and its value, from ``'age=40'``."""
    piece = piece.strip()
    known = [name for name in names if re.match(re.escape(name) + r'\s*=', piece)]
    if known:
        name = max(known, key=len)  # a name may have = in it
        value = piece[len(name) :].strip().removeprefix('=').strip()
    else:
        name, equals, value = (part.strip() for part in piece.partition('='))
        if not equals or not name:
            raise UserError(
                f'--given takes NAME=VALUE,... or the path of a table, not {shorten(piece)!r}'
            )
        name = names[index_of_name(name, names, 'condition')]
    if not value:
        raise UserError(f'--given has no value of {name}')
    return name, value


def parse_value(text: str) -> Any:
    """Return the number that a text is, else the text."""
    number = parse_cell(text)
    if number is None or not is_plain_number(text, number):
        return text
    return int(text) if re.fullmatch(r'[+-]?\d{1,15}', text) else number
