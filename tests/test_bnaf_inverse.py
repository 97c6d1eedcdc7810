"""The root search of BNAF's inverse: float32 first, and only the rows that need it."""

import math

import pytest
import torch
from helpers import assert_close, perturbed

import bnaf


def randn(*shape):
    """Return standard normal numbers in float64."""
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize('d', [1, bnaf.GROUP - 1, bnaf.GROUP, bnaf.GROUP + 1, 2 * bnaf.GROUP + 3])
@pytest.mark.parametrize('n_hidden', [0, 1, 2])
def test_round_trip_of_groups_of_variables(d, n_hidden):
    torch.manual_seed(0)
    flow = perturbed(bnaf.BlockFlow(d, n_hidden, 3, 'gated'), 0.1)
    x = randn(20, d)
    with torch.no_grad():
        x_back, _ = flow.inverse(flow(x)[0])
    assert_close(x_back, x, atol=1e-10)


@pytest.mark.parametrize('residual', [None, 'normal', 'gated'])
def test_logdet_is_as_exact_as_that_of_forward_where_units_are_saturated(residual):
    torch.manual_seed(0)
    flow = bnaf.BlockFlow(2, 1, 20, residual).double()
    with torch.no_grad():
        flow.linears[0].log_g += 2.0
        x = 2 * randn(500, 2)
        z, logdet = flow(x)
        x_back, logdet_back = flow.inverse(z)
    found = x_back.isfinite().all(1)
    assert found.float().mean() > 0.9
    # what the error of x does to logdet, and no more
    error = (flow(x_back[found])[1] + logdet_back[found]).abs()
    assert error.max() < 1e-12


def test_gradients_do_not_change_what_is_returned():
    torch.manual_seed(0)
    model = perturbed(bnaf.BNAF(5, 3, 1, 6), 0.1)
    z = model(randn(50, 5))[0].detach()
    with torch.no_grad():
        x, logdet = model.inverse(z)
    x_again, logdet_again = model.inverse(z)
    assert x_again.requires_grad and logdet_again.requires_grad
    assert_close(x_again, x, atol=1e-11)
    assert_close(logdet_again, logdet, atol=1e-11)


def test_what_float32_does_not_tell_apart_is_found():
    """A slope of 1e-4 at a value of 1000, where float32 rounds to 6e-5: by Newton in float64."""
    flow = bnaf.BlockFlow(1, 0, 1, None).double()
    with torch.no_grad():
        flow.linears[1].bias.fill_(1000.0)
        flow.linears[1].log_g.fill_(math.log(1e-4))
        flow.linears[0].log_g.fill_(0.0)
        flow.linears[0].bias.fill_(0.0)
        x = torch.linspace(-1, 1, 101, dtype=torch.float64)[:, None]
        flow.inverse_tol = 1e-8
        x_back, _ = flow.inverse(flow(x)[0])
    assert_close(x_back, x, atol=1e-8)


def test_stubborn_rows_are_searched_alone():
    """A root far on a plateau takes dozens of steps; the others are not evaluated that often."""
    n, n_evaluated, n_calls = 4000, 0, 0

    def function(u, rows):
        nonlocal n_evaluated, n_calls
        n_evaluated += len(u)
        n_calls += 1
        return u + 1e4 * torch.tanh(u - 3), 1 + 1e4 / torch.cosh(u - 3).square(), None

    roots = torch.linspace(2.9, 3.1, n, dtype=torch.float64)
    roots[::1000] = 1e5
    target, _, _ = function(roots, None)
    n_evaluated, n_calls = 0, 0
    start = torch.full_like(roots, 3.0)
    u, converged = bnaf.find_root(function, target, 1e-9, start)
    assert converged.all()
    assert_close(u, roots, atol=1e-8)
    assert n_calls > 12
    assert n_evaluated < 8 * n


def test_rows_keep_their_places_when_others_are_dropped():
    """The function of each row is another one, and rows converge in another order than theirs."""
    torch.manual_seed(0)
    shift = 20 * randn(1000)

    def function(u, rows):
        own = shift if rows is None else shift[rows]
        v = u - own
        return v + 3 * torch.tanh(v), 1 + 3 / torch.cosh(v).square(), None

    roots = 5 * randn(1000)
    target, _, _ = function(roots, None)
    u, converged = bnaf.find_root(function, target, 1e-9)
    assert converged.all()
    assert_close(u, roots, atol=1e-9)


def test_no_root_is_reported():
    """Of a bounded function, beyond its range, and for too few steps."""

    def function(u, rows):
        return torch.tanh(u), 1 / torch.cosh(u).square(), None

    target = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0, math.nan], dtype=torch.float64)
    u, converged = bnaf.find_root(function, target, 1e-9)
    assert converged.tolist() == [False, True, True, True, False, False]
    assert_close(u[1:4], target[1:4].atanh(), atol=1e-9)
    _, converged = bnaf.find_root(function, target, 1e-9, max_steps=2)
    assert converged.tolist() == [False, False, True, False, False, False]
