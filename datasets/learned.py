"""Pictures of what a model of a table has learned, by itself or given conditions."""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from common.errors import UserError

from .columns import Condition, encode_conditions, parse_given
from .plots import draw_curves, draw_density, draw_fan, draw_pairs
from .tabular import TableData

LEVELS = (0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975)  # of the quantiles along a condition
N_ALONG = 200  # values of the condition at which they are drawn
MOST_CURVES = 8  # in one picture
MOST_PAIRS = 8  # columns that are drawn in pairs
N_SAMPLES = 50_000  # for a histogram of the plane
N_SCATTERED, N_ROWS = 1_500, 5_000  # data beside samples, and behind densities of one column


class Learned(Protocol):
    """A model of a table, in the table's own units.

    Contexts are encoded conditions, (N, C), and None for a model without conditions.
    """

    def sample(self, n: int, context: np.ndarray | None = None) -> np.ndarray:
        """Draw n rows (n, D), one for each context."""

    def density(self, points: np.ndarray, context: np.ndarray | None = None) -> np.ndarray:
        """Return p at points (N, D), given one context."""

    def quantiles(self, levels: tuple[float, ...], context: np.ndarray) -> np.ndarray:
        """Return quantiles of the only column given each context, (N, k)."""


def draw_learned(
    learned: Learned, data: TableData, given: str, chosen: Sequence[str] | None, title: str
) -> Figure:
    """Draw what was learned beside the data.

    With two columns the picture shows the target, the learned density and samples, side by side.
    With more it shows each pair of columns: data below the diagonal, samples above it. Of a model
    with conditions, ``draw_conditional`` shows the density for given ones. Without them, each
    sample has the conditions of a test row.

    Columns that were spread to dequantize them are spread in the first picture, as is the density
    that it compares them with, and are on the values of the table in the second.

    Arguments:
        learned: the model.
        data: its table, with rows.
        given: the value of ``--given``, or empty.
        chosen: which columns to draw in pairs, by default the first ones.
        title: the title of the picture.
    """
    n_columns = len(data.columns)
    if given or (n_columns == 1 and len(data.conditions) == 1):
        return draw_conditional(learned, data, given, chosen, title)
    if n_columns == 2 and not data.conditions:
        require_pairs(chosen, n_columns)
        return draw_density(data, learned.sample(N_SAMPLES), learned.density, title)

    rows = data.head(N_SCATTERED)
    context = rows[:, n_columns:] if data.conditions else None
    return draw_samples(learned, data, rows, context, chosen, title)


def require_pairs(chosen: Sequence[str] | None, n_columns: int) -> None:
    """Raise ``UserError`` where columns are chosen for a picture that does not show pairs."""
    if chosen and n_columns < 3:
        raise UserError('--vis_dims is for pictures of more than two columns')


def draw_samples(
    learned: Learned,
    data: TableData,
    rows: np.ndarray,
    context: np.ndarray | None,
    chosen: Sequence[str] | None,
    title: str,
) -> Figure:
    """Draw pairs of columns of rows (N, D + C) and of as many samples, one for each context."""
    places = list(range(min(MOST_PAIRS, len(data.columns))))
    if chosen:
        places = [data.column_index(text) for text in chosen]
    real = data.quantize(data.to_own_units(rows))
    drawn = data.quantize(learned.sample(len(rows), context))
    names = [data.columns[k] for k in places]
    title += '; data grey, samples orange'
    return draw_pairs(real[:, places], drawn[:, places], names, title)


def draw_conditional(
    learned: Learned, data: TableData, text: str, chosen: Sequence[str] | None, title: str
) -> Figure:
    """Draw the density given the conditions of ``--given``, which is ``text``.

    Of one column it is a curve for each row of conditions. One of these may be left out: a category
    gets a curve for each of its values, and a number the quantiles along it. Two columns get a
    picture of the plane, and more get samples beside the data, for one row of conditions.
    """
    names = [condition.name for condition in data.conditions]
    given = parse_given(text, names) if text else pd.DataFrame(index=[0])
    free = [condition for condition in data.conditions if condition.name not in given]
    n_columns = len(data.columns)
    if len(free) > (n_columns == 1):
        lacks = ', '.join(condition.name for condition in free)
        raise UserError(f'--given lacks {lacks}; only of one column may one condition be left out')
    require_pairs(chosen, n_columns)
    if free:
        return draw_along(learned, data, given, free[0], title)

    context = encode_conditions(given, data.conditions, '--given')
    labels = describe_rows(given, names)
    if n_columns == 1:
        return draw_column(learned, data, labels, context, title)
    if len(labels) > 1:
        raise UserError('--visualize takes one row of --given where there are several columns')
    title = f'{title}, given {labels[0]}'
    if n_columns == 2:
        samples = learned.sample(N_SAMPLES, context.repeat(N_SAMPLES, axis=0))
        return draw_density(data, samples, partial(learned.density, context=context), title)
    rows = data.head(N_SCATTERED)
    contexts = context.repeat(len(rows), axis=0)
    return draw_samples(learned, data, rows, contexts, chosen, title)


def draw_along(
    learned: Learned, data: TableData, given: pd.DataFrame, free: Condition, title: str
) -> Figure:
    """Draw the density of one column along a condition, given one row of the others."""
    if len(given) > 1:
        raise UserError(f'--given has several rows, and they lack {free.name}')
    others = [condition for condition in data.conditions if condition != free]
    if others:
        (label,) = describe_rows(given, [condition.name for condition in others])
        title = f'{title}, given {label}'
    encoded = {c.name: c.encode(given[c.name], '--given') for c in others}

    if free.categories:
        context = join_contexts(data, {**encoded, free.name: np.eye(free.width)})
        labels = [f'{free.name}={category}' for category in free.categories]
        return draw_column(learned, data, labels, context, title)

    rows = rows_of_categories(data, encoded)
    along = split_context(data, rows)[free.name][:, 0]
    low, high = np.quantile(along, [0.005, 0.995])
    values = np.linspace(low, high, N_ALONG)
    context = join_contexts(data, {**encoded, free.name: values[:, None]})
    return draw_fan(
        free.mean + free.std * values,
        learned.quantiles(LEVELS, context),
        LEVELS,
        (free.mean + free.std * along, data.to_own_units(rows)[:, 0]),
        (free.name, data.columns[0]),
        title,
    )


def draw_column(
    learned: Learned, data: TableData, labels: Sequence[str], context: np.ndarray, title: str
) -> Figure:
    """Draw the density of the only column for each context (n, C), over a histogram of data."""
    if len(labels) > MOST_CURVES:
        raise UserError(
            f'{len(labels)} densities are too many for a picture: choose at most {MOST_CURVES} '
            'by --given=TABLE'
        )
    values = data.to_own_units(data.head(N_ROWS))[:, 0]
    low, high = np.quantile(values, [0.01, 0.99])
    margin = 0.25 * (high - low)
    x = np.linspace(low - margin, high + margin, 500)
    curves = {}
    for label, row in zip(labels, context):
        curves[label] = learned.density(x[:, None], row[None])
    return draw_curves(x, curves, values, data.columns[0], title)


def rows_of_categories(data: TableData, encoded: dict[str, np.ndarray]) -> np.ndarray:
    """Return the rows (N, D + C) that have the given categories, or all if none has.

    ``encoded`` has the values of some conditions, each (1, width). Those of numbers do not count.
    """
    rows = data.head(N_ROWS)
    contexts = split_context(data, rows)
    is_alike = np.ones(len(rows), dtype=bool)
    for condition in data.conditions:
        if condition.categories and condition.name in encoded:
            is_alike &= (contexts[condition.name] == encoded[condition.name]).all(axis=1)
    return rows[is_alike] if is_alike.any() else rows


def split_context(data: TableData, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return the encoded values (N, width) of each condition in rows (N, D + C)."""
    contexts, start = {}, len(data.columns)
    for condition in data.conditions:
        contexts[condition.name] = rows[:, start : start + condition.width]
        start += condition.width
    return contexts


def join_contexts(data: TableData, encoded: dict[str, np.ndarray]) -> np.ndarray:
    """Return contexts (N, C) of encoded conditions, each (N, width), or (1, width) for all rows."""
    n_rows = max(map(len, encoded.values()))
    blocks = []
    for condition in data.conditions:
        blocks.append(np.broadcast_to(encoded[condition.name], (n_rows, condition.width)))
    return np.hstack(blocks)


def describe_rows(given: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Return each row of conditions as text."""
    return [', '.join(f'{name}={row[name]}' for name in names) for _, row in given.iterrows()]
