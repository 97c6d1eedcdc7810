"""A Gaussian, for a learned density to be compared with."""

import math

import numpy as np
from sklearn.covariance import ledoit_wolf

MOST_ROWS = 100_000  # that it is fitted to; more make no difference
ADDED_VARIANCE = 1e-6  # to each column, so that columns that depend on each other do no harm


def gaussian_log_prob(known: np.ndarray, rows: np.ndarray, n_columns: int) -> np.ndarray:
    """Return log p of rows, (N,) in nats, by a Gaussian fitted to known ones.

    Its covariance is shrunk as by Ledoit and Wolf (2004), which helps where there are few rows.

    Arguments:
        known: the rows that it is fitted to, (M, D + C).
        rows: those to score, (N, D + C).
        n_columns: D. The density is that of these columns given the C others.
    """
    known = known[:: -(-len(known) // MOST_ROWS)].astype(np.float64)
    mean = known.mean(axis=0)
    covariance, _ = ledoit_wolf(known)
    covariance += ADDED_VARIANCE * np.eye(len(mean))

    deviations = rows - mean
    log_p = log_normal(deviations, covariance)
    of_others = slice(n_columns, None)
    return log_p - log_normal(deviations[:, of_others], covariance[of_others, of_others])


def log_normal(deviations: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Return log N(x; 0, covariance) of deviations x, (N, D) or (N, 0), in nats and (N,)."""
    squares = deviations * np.linalg.solve(covariance, deviations.T).T
    _, log_det = np.linalg.slogdet(covariance)
    log_of_constant = deviations.shape[1] * math.log(2 * math.pi)
    return -0.5 * (squares.sum(axis=1) + log_det + log_of_constant)
