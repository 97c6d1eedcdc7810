"""Tables that the defaults of bnaf.py were chosen on: drawn from known densities, or real ones.

None of them is among the tables that BNAF is compared with others on (tables.py, conditional.py).
A known density has ``rows(rng, n)``, which draws rows (n, D), and ``log_prob(rows)``, (n,) in nats.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.random import Generator
from scipy import stats
from sklearn.datasets import load_digits, load_iris
from sklearn.decomposition import PCA

N_TEST = 4_000
Rows = np.ndarray
Drawn = tuple[Rows, Rows, Rows]  # rows to learn from, rows to test on, log p of the latter or 0


class GaussianTable:
    """A Gaussian whose columns are correlated by a few factors, or a copula of it.

    Arguments:
        n_columns: the number of columns D.
        n_factors: how many factors they have in common.
        noise: the variance of each column's own part, relative to that of all factors.
        marginal: the distribution that columns are mapped to; None leaves the Gaussian.
        every: every how many columns are mapped.
    """

    def __init__(
        self,
        n_columns: int,
        n_factors: int = 3,
        noise: float = 0.1,
        marginal: stats.rv_continuous | None = None,
        every: int = 1,
    ) -> None:
        factors = np.random.default_rng(n_columns).normal(size=(n_columns, n_factors))
        covariance = factors @ factors.T + n_factors * noise * np.eye(n_columns)
        scale = np.sqrt(np.diag(covariance))
        covariance /= scale * scale[:, None]
        self.gaussian = stats.multivariate_normal(np.zeros(n_columns), covariance)
        self.marginal, self.mapped = marginal, slice(None, None, every)

    def rows(self, rng: Generator, n: int) -> Rows:
        rows = self.gaussian.rvs(n, random_state=rng)
        if self.marginal is not None:
            uniform = stats.norm.cdf(rows[:, self.mapped])
            rows[:, self.mapped] = self.marginal.ppf(uniform)
        return rows

    def log_prob(self, rows: Rows) -> np.ndarray:
        if self.marginal is None:
            return self.gaussian.logpdf(rows)
        x = rows[:, self.mapped]
        # of the two tails that which is not rounded to one
        lower, upper = self.marginal.cdf(x), self.marginal.sf(x)
        z = np.where(lower < upper, stats.norm.ppf(lower), stats.norm.isf(upper))
        log_slope = self.marginal.logpdf(x) - stats.norm.logpdf(z)

        unmapped = rows.copy()
        unmapped[:, self.mapped] = z
        return self.gaussian.logpdf(unmapped) + log_slope.sum(axis=1)


class MixtureTable:
    """A mixture of three Gaussians of eight columns."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        tables = [GaussianTable(8, noise=noise) for noise in (0.1, 0.3, 1.0)]
        self.parts = []
        for part in tables:
            covariance = part.gaussian.cov * rng.uniform(0.2, 1.5)
            order = rng.permutation(8)
            mean = 1.5 * rng.normal(size=8)
            self.parts.append(stats.multivariate_normal(mean, covariance[order][:, order]))
        self.weights = np.array([0.5, 0.3, 0.2])

    def rows(self, rng: Generator, n: int) -> Rows:
        counts = rng.multinomial(n, self.weights)
        parts = [part.rvs(k, random_state=rng) for part, k in zip(self.parts, counts)]
        return rng.permutation(np.concatenate(parts))

    def log_prob(self, rows: Rows) -> np.ndarray:
        of_parts = [part.logpdf(rows) for part in self.parts]
        return np.logaddexp.reduce(np.log(self.weights)[:, None] + of_parts)


class CurvedTable:
    """Six columns, each a curved function of the two before it with some noise; shuffled."""

    order = (3, 0, 5, 1, 4, 2)
    noise = 0.3

    def rows(self, rng: Generator, n: int) -> Rows:
        columns = [rng.normal(size=n)]
        while len(columns) < len(self.order):
            columns.append(self.mean(columns) + self.noise * rng.normal(size=n))
        return np.stack(columns, axis=1)[:, self.order]

    def mean(self, columns: list[np.ndarray]) -> np.ndarray:
        """Return the mean of the next column, given those before it."""
        square = columns[-2] ** 2 / 4 if len(columns) > 1 else 0
        return np.sin(1.5 * columns[-1]) + square

    def log_prob(self, rows: Rows) -> np.ndarray:
        columns = rows[:, np.argsort(self.order)].T
        log_p = stats.norm.logpdf(columns[0])
        for k in range(1, len(columns)):
            log_p = log_p + stats.norm.logpdf(columns[k], self.mean(columns[:k]), self.noise)
        return log_p


def draw_known(make: Callable, n: int, seed: int) -> Drawn:
    """Draw rows of a known density."""
    known = make()
    rows = known.rows(np.random.default_rng((seed, n)), n)
    test = known.rows(np.random.default_rng((seed, n, 1)), N_TEST)
    return rows, test, known.log_prob(test)


def draw_real(rows: Rows, n: int, seed: int) -> Drawn:
    """Split real rows at random, with those beyond ``n`` to test on."""
    rows = np.random.default_rng(seed).permutation(rows)
    test = rows[n : n + N_TEST]
    return rows[:n], test, np.zeros(len(test))


def iris_rows() -> Rows:
    """Return the four measures of iris, spread over their rounding."""
    rows = load_iris().data
    return rows + 0.1 * np.random.default_rng(0).random(rows.shape)


def digit_rows() -> Rows:
    """Return the first sixteen principal components of scikit-learn's digits with noise."""
    pixels = load_digits().data
    pixels = pixels + np.random.default_rng(0).random(pixels.shape)
    return PCA(16, random_state=0).fit_transform(pixels)


KNOWN: dict[str, Callable] = {
    'Gaussian': partial(GaussianTable, 12),
    'heavy tails': partial(GaussianTable, 20, marginal=stats.t(3)),
    'skewed': partial(GaussianTable, 24, noise=0.05, marginal=stats.lognorm(0.6), every=2),
    'one-sided': partial(GaussianTable, 10, marginal=stats.gamma(1.5)),
    'mixture': MixtureTable,
    'curved': CurvedTable,
}
REAL: dict[str, Callable] = {'iris': iris_rows, 'digits': digit_rows}


def draw_table(name: str, n: int, seed: int, miniboone: Path | None = None) -> Drawn:
    """Return rows to learn from, rows to test on, and log p of these in nats, 0 if not known.

    Arguments:
        name: one of ``KNOWN`` or ``REAL``, or 'MINIBOONE'.
        n: the number of rows to learn from.
        seed: decides which they are.
        miniboone: the folder of val.npy, validation rows of MINIBOONE.
    """
    if name in KNOWN:
        return draw_known(KNOWN[name], n, seed)
    rows = REAL[name]() if name in REAL else np.load(miniboone / 'val.npy').astype(np.float64)
    return draw_real(rows, n, seed)
