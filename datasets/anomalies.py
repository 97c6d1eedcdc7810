"""Tables of scores: how unlikely each row or image is, and which cells of a row make it so."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError

MOST_QUANTILES = 1_001  # of the scores of the validation rows
LEAST_VALIDATION_ROWS = 20  # fewer say little of a percentile
LOW_PERCENTILE = 5.0  # rows below it are explained
MOST_EXPLAINED, N_PRINTED = 1_000, 5  # rows
N_CAUSES = 3  # columns that are named for each row

Columns = dict[str, np.ndarray]


def score_quantiles(log_likelihoods: np.ndarray) -> list[float]:
    """Return the quantiles of log-likelihoods (N,) that a checkpoint keeps, the lowest first."""
    levels = np.linspace(0, 1, min(len(log_likelihoods), MOST_QUANTILES))
    return np.quantile(log_likelihoods, levels).tolist()


def score_columns(
    log_likelihoods: np.ndarray, indices: np.ndarray, quantiles: list[float], path: Path
) -> Columns:
    """Return the columns of a table of scores: row, log_likelihood, percentile.

    Arguments:
        log_likelihoods: those of the rows, (N,).
        indices: which rows of their table they are, (N,).
        quantiles, path: see ``percentiles``.
    """
    columns = {'row': indices, 'log_likelihood': log_likelihoods}
    return {**columns, **percentiles(log_likelihoods, quantiles, path)}


def percentiles(
    log_likelihoods: np.ndarray,
    quantiles: list[float],
    path: Path,
    least: int = LEAST_VALIDATION_ROWS,
) -> Columns:
    """Return the column percentile: how many per cent of the validation split are less likely.

    There is no such column if too few validation rows, or images, are known.

    Arguments:
        log_likelihoods: those of rows or images, (N,).
        quantiles: of the log-likelihoods of the validation split, as the checkpoint has them.
        path: the checkpoint, for messages.
        least: how many validation rows, or images, are enough.
    """
    if len(quantiles) < least:
        return {}
    known = np.array(quantiles)
    is_sorted = np.isfinite(known).all() and (known[1:] >= known[:-1]).all()
    if len(known) > MOST_QUANTILES or not is_sorted:
        raise UserError(f'{path} is damaged: its validation_quantiles are no quantiles')
    levels = np.linspace(0, 100, len(known))
    return {'percentile': np.interp(log_likelihoods, known, levels)}


def print_least_likely(columns: Columns) -> None:
    """Print the images with the most bits/dim, at most ``N_PRINTED``.

    ``columns`` are image, bits_per_dim and, if it is known, percentile.
    """
    prefix = 'least likely: ' if len(columns['image']) > 1 else ''
    bits = np.nan_to_num(columns['bits_per_dim'], nan=np.inf)
    for i in np.argsort(-bits, kind='stable')[:N_PRINTED]:
        text = f'{columns["image"][i]}: {columns["bits_per_dim"][i]:.4f} bits/dim'
        if 'percentile' in columns:
            text += f', percentile {columns["percentile"][i]:.1f}'
        print(prefix + text)


def lowest_rows(scores: Columns) -> np.ndarray:
    """Return the places of the rows to be explained, the least likely one first.

    They are those below ``LOW_PERCENTILE`` of the validation rows or, where that is not known, as
    many of the rows themselves; at most ``MOST_EXPLAINED``.
    """
    order = np.argsort(scores['log_likelihood'], kind='stable')
    if 'percentile' in scores:
        lowest = order[scores['percentile'][order] < LOW_PERCENTILE]
    else:
        lowest = order[: math.ceil(len(order) * LOW_PERCENTILE / 100)]
    return lowest[:MOST_EXPLAINED]


def cause_columns(
    n_rows: int, names: Sequence[str], lowest: np.ndarray, gains: np.ndarray
) -> Columns:
    """Return the columns that explain scores: column_1, gain_1, and so on, up to ``N_CAUSES``.

    Arguments:
        n_rows: all rows. Those that are not explained have empty cells.
        names: the names of the D columns of the density.
        lowest: the places of the k rows that are explained.
        gains: how far the log-likelihood of these would rise with a better cell, (k, D).
    """
    columns: Columns = {}
    best_first = np.argsort(-gains, axis=1, kind='stable')
    for rank in range(min(N_CAUSES, len(names))):
        best = best_first[:, rank]
        gain = np.full(n_rows, np.nan)
        gain[lowest] = gains[np.arange(len(lowest)), best]
        name = np.full(n_rows, '', dtype=object)
        name[lowest] = np.array(names, dtype=object)[best]

        helps = gain > 0
        columns[f'column_{rank + 1}'] = np.where(helps, name, '')
        columns[f'gain_{rank + 1}'] = np.where(helps, gain, np.nan)
    return columns


def print_causes(scores: Columns, causes: Columns, lowest: np.ndarray) -> None:
    """Print the least likely rows, at most ``N_PRINTED``, and the cells that make them so.

    ``causes`` are the columns of ``cause_columns``, and ``lowest`` the rows of ``lowest_rows``.
    """
    if not len(lowest):
        print(f'no row is below percentile {LOW_PERCENTILE:g} of the validation rows')
    for i in lowest[:N_PRINTED]:
        texts = []
        for rank in range(1, len(causes) // 2 + 1):
            name, gain = causes[f'column_{rank}'][i], causes[f'gain_{rank}'][i]
            if name:
                texts.append(f'{name} (+{gain:.1f})')
        print(
            f'row {scores["row"][i]}: {scores["log_likelihood"][i]:.2f} nats: '
            f'{", ".join(texts) or "no single cell"}'
        )
