"""The Gaussian that a flow is compared with."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf

from datasets import baseline
from datasets.baseline import gaussian_log_prob


def rows(n, d=5, seed=0):
    """Draw n rows (n, d) of a Gaussian whose columns are correlated."""
    mix = np.random.default_rng(1).normal(size=(d, d))
    return np.random.default_rng(seed).normal(size=(n, d)) @ mix + 3


def test_it_is_a_gaussian_with_a_shrunk_covariance():
    known, test = rows(40), rows(20, seed=2)
    fitted = LedoitWolf().fit(known)
    expected = multivariate_normal(known.mean(axis=0), fitted.covariance_).logpdf(test)
    log_p = gaussian_log_prob(known, test, 5)
    assert log_p.shape == (20,)
    np.testing.assert_allclose(log_p, expected, rtol=1e-3)
    assert abs(fitted.covariance_ - np.cov(known.T)).max() > 0.01  # it matters here


def test_a_conditional_gaussian_is_a_regression():
    known, test = rows(50_000), rows(1000, seed=2)
    x = np.column_stack([known[:, 2:], np.ones(len(known))])
    weights, *_ = np.linalg.lstsq(x, known[:, :2], rcond=None)
    errors = known[:, :2] - x @ weights
    test_errors = test[:, :2] - np.column_stack([test[:, 2:], np.ones(len(test))]) @ weights
    expected = multivariate_normal(np.zeros(2), np.cov(errors.T)).logpdf(test_errors)
    np.testing.assert_allclose(gaussian_log_prob(known, test, 2), expected, atol=0.05)


@pytest.mark.parametrize('spoil', [lambda x: x[:, 0], lambda x: np.zeros(len(x))])
def test_dependent_and_constant_columns_do_no_harm(spoil):
    known, test = rows(200), rows(20, seed=2)
    known[:, 4], test[:, 4] = spoil(known), spoil(test)
    assert np.isfinite(gaussian_log_prob(known, test, 5)).all()
    assert np.isfinite(gaussian_log_prob(known, test, 2)).all()


def test_of_many_rows_it_takes_evenly_spaced_ones(monkeypatch):
    monkeypatch.setattr(baseline, 'MOST_ROWS', 100)
    known = rows(250)
    log_p = gaussian_log_prob(known, known[:3], 5)
    np.testing.assert_array_equal(log_p, gaussian_log_prob(known[::3], known[:3], 5))


def test_rows_on_a_line_do_no_harm():
    """Their covariance is not shrunk at all."""
    known = np.outer([1, -1] * 10, [1.0, 2.0, 3.0])
    assert np.isfinite(gaussian_log_prob(known, rows(5, d=3), 3)).all()
