"""Properties of BNAF's layers, of the inverse, and of the whole flow, in float64 with perturbed
parameters."""

import copy
import functools
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, jacobian, log_det, perturbed, single_process
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

import bnaf
from common.errors import UserError
from common.tensors import load_tensors
from datasets.tabular import TableData, load_table

FLOWS = {
    'no residual': lambda d: bnaf.BlockFlow(d, 1, 4),
    'normal': lambda d: bnaf.BlockFlow(d, 0, 3, 'normal'),
    'gated': lambda d: bnaf.BlockFlow(d, 2, 4, 'gated'),
    'gated checkpointed': lambda d: bnaf.BlockFlow(d, 1, 4, 'gated', checkpoint_grads=True),
    'Flip': lambda d: bnaf.Flip(),
    'BNAF': lambda d: bnaf.BNAF(d, 3, 1, 4),
    'BNAF normal': lambda d: bnaf.BNAF(d, 2, 0, 5, 'normal'),
    'BNAF to the end': lambda d: bnaf.BNAF(d, 3, 1, 4, last_residual='gated'),
}

SHAPES = [
    (1, 1),
    (1, 3),
    (4, 2),
    (3, 5),
]


def randn(*shape):
    """Return standard normal numbers in float64."""
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('name', FLOWS)
def test_flow_is_a_bijection_with_the_right_logdet(name, shape):
    torch.manual_seed(0)
    flow = perturbed(FLOWS[name](shape[1]), 0.3)
    x = randn(*shape)
    z, logdet = flow(x)
    x_back, logdet_back = flow.inverse(z)

    assert logdet.shape == logdet_back.shape == (len(x),)
    assert_close(x_back, x, atol=1e-10)
    assert_close(logdet_back, -logdet, atol=1e-9)
    for i in range(len(x)):
        derivatives = jacobian(flow, x[i])
        assert_close(logdet[i], log_det(derivatives), atol=1e-9)
        derivatives_back = jacobian(flow.inverse, z[i].detach())
        assert_close(logdet_back[i], log_det(derivatives_back), atol=1e-7)
        if isinstance(flow, bnaf.BlockFlow):
            assert_is_autoregressive(derivatives)


def assert_is_autoregressive(jacobian):
    """Fail unless a Jacobian is lower triangular with a positive diagonal and no zero below it."""
    d = len(jacobian)
    assert (jacobian.diagonal() > 0).all()
    assert not jacobian.triu(1).any()
    assert jacobian.tril(-1).count_nonzero() == d * (d - 1) // 2


@pytest.mark.parametrize('n_flows', [1, 2, 3])
def test_autoregressive_order_after_each_flip(n_flows):
    """One flow is lower triangular; each flip reverses the order, so two flows depend on all."""
    model = perturbed(bnaf.BNAF(4, n_flows, 1, 3), 0.3)
    x = randn(4)
    assert not jacobian(model[0], x).triu(1).any()
    if n_flows > 1:
        flow, flip, next_flow = model[0], model[1], model[2]
        both = jacobian(bnaf.Sequence([flow, flip, next_flow]), x)
        assert both.count_nonzero() == 16
        between_flips = jacobian(bnaf.Sequence([flip, next_flow, flip]), x)
        assert not between_flips.tril(-1).any()


@pytest.mark.parametrize('a, b', [(1, 4), (4, 1), (3, 3)])
def test_masked_linear(a, b):
    torch.manual_seed(0)
    layer = perturbed(bnaf.MaskedLinear(3, a, b), 0.3)
    w, diagonal = layer.weights(torch.float64)
    blocks = w.view(3, b, 3, a)
    for i in range(3):
        for j in range(3):
            assert (blocks[i, :, j] == 0).all() == (j > i)
        assert torch.equal(blocks[i, :, i], diagonal[i])
        assert (diagonal > 0).all()
    scale = layer.log_g.exp().squeeze(1)
    torch.testing.assert_close(w.norm(dim=1), scale)


# ---------------------------------------------------------------------------------------- precision


def logdet_by_logsumexp(flow, x):
    """Return the log-determinant of a flow without residual as the paper computes it (eq. 9-11).

    It works in logarithms and over tensors (B, d, b, a), which the flow never builds, and in the
    precision of x.
    """
    flow = copy.deepcopy(flow).to(x.dtype)
    z, log_j = x, x.new_zeros(*x.shape, 1)
    for k, linear in enumerate(flow.linears):
        if k:
            log_slope = 2 * (math.log(2) - z - F.softplus(-2 * z))  # of tanh
            log_j = log_j + log_slope.view(log_j.shape)
            z = z.tanh()
        w, _ = linear.weights(x.dtype)
        log_diagonal = bnaf.diagonal_blocks(linear.weight, linear.d)
        v = linear.mask * linear.weight
        bnaf.diagonal_blocks(v, linear.d).copy_(log_diagonal.exp())
        log_scale = linear.log_g - v.norm(dim=1, keepdim=True).log()
        d, b, _ = log_diagonal.shape
        log_w = log_diagonal + log_scale.view(d, b, 1)
        z = z @ w.T + linear.bias
        log_j = torch.logsumexp(log_w + log_j[:, :, None], 3)
    return log_j.squeeze(2).sum(1)


def steep_flow(seed, spread, steepness, opposed):
    """Return a flow in 3-d whose diagonal blocks span many orders of magnitude."""
    torch.manual_seed(seed)
    flow = bnaf.BlockFlow(3, 1, 4)
    first, second, _ = flow.linears
    with torch.no_grad():
        for linear in flow.linears:
            bnaf.diagonal_blocks(linear.weight, 3).uniform_(-spread, spread)
        if opposed:
            is_steep = torch.tensor([1.0, 1.0, 0.0, 0.0] * 3)
            first.log_g += math.log(steepness) * is_steep[:, None]
            sign = torch.tensor([1.0, 1.0, -1.0, -1.0])
            log_diagonal = spread * sign + torch.randn(3, 4, 4)
            bnaf.diagonal_blocks(second.weight, 3).copy_(log_diagonal)
    return flow


def gradient_of_logdet(flow, x):
    """Return the gradient of the summed log-determinants by the rows, in float64."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(flow(x)[1].sum(), x)
    return gradient.double()


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1.0, 10.0, 20.0]),
    st.sampled_from([1.0, 10.0, 100.0]),
    st.booleans(),
)
def test_float32_is_as_good_as_logsumexp(seed, spread, steepness, opposed):
    """With blocks whose logs spread over +-20, and units saturated as far as e^-200.

    If opposed, derivatives are small where the next layer's weights are large. Derivatives below
    1e-38 of the largest of their block are lost, which counts for weights beyond e^+-40.
    """
    flow = steep_flow(seed, spread, steepness, opposed)
    x = steepness * torch.randn(5, 3)
    exact = logdet_by_logsumexp(flow, x.double())
    largest = exact.abs().max()
    error = (flow(x)[1].double() - exact).abs().max()
    error_of_logsumexp = (logdet_by_logsumexp(flow, x).double() - exact).abs().max()
    assert error <= 3 * error_of_logsumexp + 1e-6 * (1 + largest)

    gradient = gradient_of_logdet(flow, x)
    exact_gradient = gradient_of_logdet(copy.deepcopy(flow).double(), x.double())
    atol = 1e-5 * (1 + exact_gradient.abs().max().item())
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-3, atol=atol)


@pytest.mark.parametrize('is_plain', [False, True])
@pytest.mark.parametrize('residual', [None, 'gated'])
def test_slopes_that_underflow(residual, is_plain, monkeypatch):
    """Far out all units of a block are saturated, and slopes are below what float32 can hold."""
    monkeypatch.setattr(bnaf, 'is_transformed', lambda: is_plain)
    torch.manual_seed(0)
    flow = bnaf.BlockFlow(2, 1, 3, residual)
    for linear in flow.linears:
        linear.log_g.data.zero_()
    if residual:
        flow.gate.data.fill_(150.0)  # of the row itself, hardly anything is in the output
    exact = copy.deepcopy(flow).double()
    for x in (80.0, 300.0):
        rows = torch.tensor([[x, -x], [-x, 0.1], [x, x]])
        logdet = flow(rows)[1]
        expected = exact(rows.double())[1]
        assert expected.max() < math.log(1e-60)
        torch.testing.assert_close(logdet.double(), expected, rtol=1e-6, atol=0)
        gradient = gradient_of_logdet(flow, rows)
        expected = gradient_of_logdet(exact, rows.double())
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-30)


# ------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('checkpoint_grads', [False, True])
@pytest.mark.parametrize('residual', [None, 'normal', 'gated'])
def test_no_rows(residual, checkpoint_grads, dtype):
    model = bnaf.BNAF(3, 2, 1, 4, residual, checkpoint_grads).to(dtype)
    rows = torch.zeros(0, 3, dtype=dtype, requires_grad=True)
    for direction in (model, model.inverse):
        for grad_enabled in (False, True):
            with torch.set_grad_enabled(grad_enabled):
                out, logdet = direction(rows)
            assert out.shape == (0, 3)
            assert logdet.shape == (0,)
            assert out.dtype == logdet.dtype == dtype

    log_p = model.log_prob(rows)
    assert log_p.shape == (0,)
    log_p.sum().backward()
    assert rows.grad.shape == (0, 3)
    assert not any(p.grad.any() for p in model.parameters())


def test_no_samples():
    model = bnaf.BNAF(3, 2, 1, 4).double()
    assert model.sample(0).shape == (0, 3)
    like = next(model.parameters())
    for from_noise in (model, model.inverse):
        x, log_p, n_lost = bnaf.sample_with_log_prob(from_noise, 0, 3, like)
        assert x.shape == (0, 3)
        assert log_p.shape == (0,)
        assert n_lost == 0
        assert x.dtype == log_p.dtype == torch.float64


@pytest.mark.parametrize('dataset', ['8gaussians', 'u1'])
def test_objective_of_no_rows(dataset):
    objective = bnaf.Objective(bnaf.BNAF(2, 2, 1, 4), load_table(dataset))
    assert objective.per_row(torch.zeros(0, 2)).shape == (0,)
    rows = np.zeros((0, 2), np.float32)
    assert bnaf.row_losses(objective, rows, single_process(bnaf)).shape == (0,)


@pytest.mark.parametrize('shape', [(5, 2), (0, 4), (3,), (1, 5, 3)])
def test_log_prob_of_rows_of_another_width(shape):
    model = bnaf.BNAF(3, 2, 1, 4)
    with pytest.raises(ValueError) as error:
        model.log_prob(torch.zeros(shape))
    assert str(error.value) == f'log_prob takes rows (B, 3), not {shape}'


# ------------------------------------------------------------------------------------------ inverse


@pytest.mark.parametrize(
    'dtype, size, tol', [(torch.float32, 0.1, 1e-5), (torch.float64, 0.1, 1e-10)]
)
def test_round_trip_of_a_whole_model(dtype, size, tol):
    torch.manual_seed(0)
    model = perturbed(bnaf.BNAF(6, 3, 1, 10), size).to(dtype)
    with torch.no_grad():
        model[-1].linears[-1].log_g += 2.0  # a trained one is about as steep
        x = torch.randn(500, 6, dtype=dtype)
        x_back, _ = model.inverse(model(x)[0])
    assert (x_back - x).abs().max() < tol


def test_what_the_flow_does_not_reach_is_nan():
    """Sums of tanhs are bounded: a latent beyond the bound gives NaN and leaves the other rows of
    the batch alone."""
    flow = perturbed(bnaf.BlockFlow(2, 1, 4), 0.3)
    x = randn(3, 2)
    z = flow(x)[0].detach()
    z[1, 1] = 1e4
    with torch.no_grad():
        x_back, logdet = flow.inverse(z)
    assert x_back[1].isnan().any() and logdet[1].isnan()
    assert_close(x_back[[0, 2]], x[[0, 2]], atol=1e-10)


def test_tolerance_is_kept():
    flow = perturbed(bnaf.BlockFlow(2, 1, 4), 0.3)
    x = randn(200, 2)
    for tol in (1e-2, 1e-5, 1e-9):
        flow.inverse_tol = tol
        with torch.no_grad():
            x_back, _ = flow.inverse(flow(x)[0])
        error = (x_back[:, 0] - x[:, 0]).abs()
        assert error.max() <= tol


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('residual', ['gated', 'normal', 'none'])
@pytest.mark.parametrize('tails', ['light', 'heavy'])
def test_far_outside_the_inverse_is_right_or_nan(tails, residual, dtype):
    """Slopes are so small there that many rows round to the same latent.

    The tolerance holds for each flow, so the error of the whole model may be somewhat larger.
    """
    tol = 1e-5 if dtype == torch.float32 else 1e-10
    model, near = overfitted(tails, residual)
    model, near = model.to(dtype), near.to(dtype)
    rng = np.random.default_rng(0)
    sign = rng.choice([-1, 1], size=(1000, 2))
    distance = rng.uniform(20, 200, size=(1000, 2))
    far = torch.from_numpy(sign * distance).to(dtype)
    far[:500, 0] /= 100  # inside the data in one of the columns
    with torch.no_grad():
        far_error = (model.inverse(model(far)[0])[0] - far).abs()
        near_error = (model.inverse(model(near)[0])[0] - near).abs()
    assert near_error.max() <= 10 * tol
    assert far_error.isnan().any()
    assert far_error.nan_to_num(0.0).max() <= 100 * tol


@functools.cache
def overfitted(tails, residual):
    """Return a model after some steps at a high learning rate, and test rows (N, 2).

    The data are strongly correlated, or have the tails of Student's t with 2 degrees of freedom.
    The test rows are those within 3 standard deviations.
    """
    rng = np.random.default_rng(0)
    if tails == 'heavy':
        rows = rng.standard_t(2, size=(5000, 2))
    else:
        noise = rng.normal(size=(5000, 2))
        rows = rng.normal(size=(5000, 1)) + 0.1 * noise
    rows = (rows / rows.std(0)).astype(np.float32)
    splits = rows[:4000], rows[4000:4500], rows[4500:]
    columns = ('a', 'b')
    data = TableData(*splits, columns, np.zeros(2), np.ones(2))

    small = dict(n_flows=3, hidden_dim=8)
    config = bnaf.Config(residual=residual, lr=0.2, ema_decay=0.0, **small)
    run = bnaf.Training(config, data, single_process(bnaf))
    for _ in range(150):
        run.take_step()
    is_near = np.abs(data.test).max(1) < 3
    return run.model, torch.from_numpy(data.test[is_near])


@pytest.mark.parametrize('steepness', [1e-6, 1.0, 1e6])
def test_find_root_of_hard_functions(steepness):
    """A step, plateaus and slopes on which Newton's method alone diverges."""

    def function(u, rows):
        v = steepness * (u - 3)
        value = torch.tanh(v) + 1e-3 * u + torch.tanh(u / 100)
        slope_of_step = steepness / torch.cosh(v.clamp(-300, 300)).square()
        slope = slope_of_step + 1e-3 + 0.01 / torch.cosh(u / 100).square()
        return value, slope, None

    roots = torch.linspace(-50, 50, 41, dtype=torch.float64)
    target, _, _ = function(roots, None)
    u, _ = bnaf.find_root(function, target, 1e-9)
    assert_close(u, roots, atol=1e-8)


@pytest.mark.slow
def test_gradients_through_the_inverse():
    """By the implicit function theorem, against finite differences: of z and every parameter."""
    torch.manual_seed(0)
    model = perturbed(bnaf.BNAF(3, 2, 1, 2), 0.3)
    z = model(randn(2, 3))[0].detach().contiguous().requires_grad_()
    weights = randn(2, 3)

    def loss():
        x, logdet = model.inverse(z)
        return (weights * x).sum() + logdet.square().sum()

    parameters = [z, *model.parameters()]
    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients):
        n = parameter.numel()
        for k in range(0, n, max(1, n // 4)):
            expected = central_difference(loss, parameter, k, 1e-4)
            actual = gradient.reshape(-1)[k].item()
            assert expected == pytest.approx(actual, abs=1e-5, rel=1e-3)


@torch.no_grad()
def central_difference(function, parameter, k, h):
    """Return the derivative of a function by element k of a parameter, by finite differences."""
    flat = parameter.view(-1)
    old = flat[k].item()
    flat[k] = old - h
    below = function().item()
    flat[k] = old + h
    above = function().item()
    flat[k] = old
    return (above - below) / (2 * h)


def test_a_latent_out_of_reach_leaves_the_gradients_of_others_alone():
    torch.manual_seed(0)
    flow = bnaf.BlockFlow(2, 1, 4).double()
    z = flow(randn(3, 2))[0].detach()[:2]
    out_of_reach = torch.full((1, 2), 100.0, dtype=torch.float64)
    gradients = []
    for rows in (z, torch.cat([z, out_of_reach])):
        x, logdet = flow.inverse(rows)
        assert x[2:].isnan().all()
        assert logdet[2:].isnan().all()
        loss = x[:2].sum() + logdet[:2].sum()
        gradients.append(torch.autograd.grad(loss, list(flow.parameters())))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('checkpoint_grads', [False, True])
@pytest.mark.parametrize('residual', [None, 'normal', 'gated'])
def test_second_derivatives(residual, checkpoint_grads):
    """The Hessian of log p by x, where units are saturated, too, against finite differences."""
    torch.manual_seed(0)
    model = bnaf.BNAF(3, 2, 1, 4, residual, checkpoint_grads)
    model = perturbed(model, 0.3).requires_grad_(False)
    for x in (randn(1, 3), 4 * randn(1, 3)):
        hessian = torch.autograd.functional.hessian(model.log_prob, x).view(3, 3)
        assert hessian.count_nonzero() == 9
        expected = hessian_by_differences(model, x, 1e-5)
        torch.testing.assert_close(hessian, expected, rtol=1e-6, atol=1e-8)


def hessian_by_differences(model, x, h):
    """Return the Hessian of log p at one row x (1, D), by finite differences of the gradient."""
    steps = h * torch.eye(x.shape[1], dtype=x.dtype)
    rows = torch.cat([x - steps, x + steps]).requires_grad_()
    (gradients,) = torch.autograd.grad(model.log_prob(rows).sum(), rows)
    below, above = gradients.chunk(2)
    return (above - below) / (2 * h)


def test_second_derivatives_by_the_weights():
    torch.manual_seed(0)
    model = perturbed(bnaf.BNAF(2, 2, 1, 3), 0.3)
    x = randn(4, 2)
    parameters = list(model.parameters())

    def gradient_along(direction, h):
        """Return the gradient of log p in all weights, moved by h along a direction."""
        with torch.no_grad():
            for parameter, part in zip(parameters, direction):
                parameter += h * part
        gradients = torch.autograd.grad(model.log_prob(x).sum(), parameters)
        with torch.no_grad():
            for parameter, part in zip(parameters, direction):
                parameter -= h * part
        return gradients

    direction = [randn(*parameter.shape) for parameter in parameters]
    gradients = torch.autograd.grad(model.log_prob(x).sum(), parameters, create_graph=True)
    slope = sum((g * part).sum() for g, part in zip(gradients, direction))
    hessian_times_direction = torch.autograd.grad(slope, parameters)
    above, below = gradient_along(direction, 1e-6), gradient_along(direction, -1e-6)
    for exact, a, b in zip(hessian_times_direction, above, below):
        torch.testing.assert_close(exact, (a - b) / 2e-6, rtol=1e-5, atol=1e-6)


def test_the_density_is_differentiable_many_times():
    torch.manual_seed(0)
    model = perturbed(bnaf.BNAF(2, 2, 1, 3), 0.3)
    x = randn(3, 2).requires_grad_()
    torch.autograd.gradgradcheck(model, (x,))

    # of the third order, along one direction
    def second_derivative(x):
        (first,) = torch.autograd.grad(model.log_prob(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        return second

    torch.autograd.gradcheck(second_derivative, (x,))


# d, n_hidden and hidden_dim, and into how many strips the largest weight is cut
FAST_SHAPES = {
    (1, 0, 1): 0,
    (3, 2, 4): 0,
    (2, 1, 120): 2,
    (12, 1, 20): 2,
    (5, 1, 70): 3,
}


@pytest.mark.parametrize('n_rows', [1, 5])
@pytest.mark.parametrize('residual', [None, 'normal', 'gated'])
@pytest.mark.parametrize('shape', FAST_SHAPES)
def test_fast_layers_equal_plain_ones(shape, residual, n_rows, monkeypatch):
    """In values and in gradients, where weights above the diagonal are not zero, too."""
    torch.manual_seed(0)
    d, n_hidden, hidden_dim = shape
    flow = perturbed(bnaf.BlockFlow(d, n_hidden, hidden_dim, residual), 0.3)
    assert max(len(linear.strips) for linear in flow.linears) == FAST_SHAPES[shape]

    x = randn(n_rows, d).requires_grad_()
    weights = randn(n_rows, d)
    results = []
    for is_plain in (False, True):
        monkeypatch.setattr(bnaf, 'is_transformed', lambda: is_plain)
        z, logdet = flow(x)
        loss = (weights * z).sum() + logdet.square().sum()
        gradients = torch.autograd.grad(loss, [x, *flow.parameters()])
        results.append([z, logdet, *gradients])
    for fast, plain in zip(*results):
        scale = plain.abs().max().item()
        assert_close(fast, plain, atol=1e-12 * (1 + scale))


def test_weights_above_the_diagonal_are_not_trained():
    torch.manual_seed(0)
    run = bnaf.Training(bnaf.Config(n_flows=2, hidden_dim=3), gaussian_data(), single_process(bnaf))
    for _ in range(3):
        run.take_step()
    for linear in run.model.modules():
        if isinstance(linear, bnaf.MaskedLinear):
            assert torch.equal(linear.weight != 0, linear.mask == 1)


@pytest.mark.parametrize('residual', [None, 'gated'])
def test_the_number_of_parameters_is_that_of_the_weights_that_change_the_output(residual):
    model = perturbed(bnaf.BNAF(3, 2, 1, 4, residual), 0.3)
    model.log_prob(randn(5, 3)).sum().backward()
    n_used = sum(parameter.grad.count_nonzero() for parameter in model.parameters())
    assert model.n_parameters == n_used


def test_the_number_of_parameters_of_the_official_model_in_the_plane():
    toy = bnaf.Config(**bnaf.TOY)
    assert bnaf.build_model(toy, (2, 0)).n_parameters == 15_904


@pytest.mark.parametrize('checkpoint_grads', [False, True])
def test_gradient_penalty(checkpoint_grads):
    """The gradient of |d log p / dx|^2 by every parameter, against finite differences."""
    torch.manual_seed(0)
    model = perturbed(bnaf.BNAF(2, 2, 1, 3, 'gated', checkpoint_grads), 0.3)
    x = randn(4, 2).requires_grad_()

    def penalty():
        with torch.enable_grad():
            log_p = model.log_prob(x).sum()
            (score,) = torch.autograd.grad(log_p, x, create_graph=True)
        return score.square().sum()

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(penalty(), parameters, materialize_grads=True)
    for parameter, gradient in zip(parameters, gradients):
        for k in {0, parameter.numel() - 1}:
            expected = central_difference(penalty, parameter, k, 1e-5)
            actual = gradient.reshape(-1)[k].item()
            assert expected == pytest.approx(actual, abs=1e-6, rel=1e-5)


@pytest.mark.parametrize('output', ['x', 'logdet'])
@pytest.mark.parametrize('by', ['z', 'parameters'])
def test_second_derivatives_of_the_inverse_are_refused_rather_than_wrong(by, output):
    torch.manual_seed(0)
    model = bnaf.BNAF(2, 2, 1, 4).double()
    z = randn(3, 2).mul(0.5).requires_grad_()
    x, logdet = model.inverse(z)
    value = (x if output == 'x' else logdet).sum()
    inputs = [z] if by == 'z' else list(model.parameters())
    torch.autograd.grad(value, inputs, retain_graph=True)
    with pytest.raises(NotImplementedError, match='the inverse has first derivatives only'):
        torch.autograd.grad(value, inputs, create_graph=True)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('checkpoint_grads', [False, True])
@pytest.mark.parametrize('residual', [None, 'normal', 'gated'])
def test_function_transforms(residual, checkpoint_grads, dtype):
    torch.manual_seed(0)
    model = perturbed(bnaf.BNAF(3, 2, 1, 4, residual, checkpoint_grads), 0.3).to(dtype)
    rows = randn(4, 3).to(dtype)

    def log_p(row):
        return model.log_prob(row[None])[0]

    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    if dtype == torch.float64:
        close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    close(torch.func.vmap(log_p)(rows), model.log_prob(rows))

    leaf = rows.clone().requires_grad_()
    (gradients,) = torch.autograd.grad(model.log_prob(leaf).sum(), leaf)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        close(torch.func.vmap(transform(log_p))(rows), gradients)

    hessian = torch.autograd.functional.hessian(log_p, rows[0])
    close(torch.func.hessian(log_p)(rows[0]), hessian)
    close(torch.func.jacrev(torch.func.grad(log_p))(rows[0]), hessian)

    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, rows)[1].sum()

    by_weights = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for actual, gradient in zip(by_weights.values(), expected):
        close(actual, gradient)


def test_forward_mode_differentiation():
    torch.manual_seed(0)
    model = perturbed(bnaf.BNAF(3, 2, 1, 4), 0.3)
    x, direction = randn(4, 3), randn(4, 3)
    with forward_ad.dual_level():
        dual = model.log_prob(forward_ad.make_dual(x, direction))
        slope = forward_ad.unpack_dual(dual).tangent
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_prob(x).sum(), x)
    torch.testing.assert_close(slope, (gradient * direction).sum(1))


def test_function_transforms_of_the_inverse_are_refused_rather_than_wrong():
    model = bnaf.BNAF(2, 2, 1, 4)
    row = torch.zeros(2)

    def logdet(z):
        return model.inverse(z[None])[1][0]

    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError):
            transform(logdet)(row)
    with pytest.raises(RuntimeError):
        torch.func.vmap(logdet)(row[None])


def test_checkpoint_grads_changes_no_gradient():
    x, gradients = randn(5, 3), []
    for checkpoint_grads in (False, True):
        torch.manual_seed(0)
        model = bnaf.BNAF(3, 2, 1, 4, checkpoint_grads=checkpoint_grads).double()
        model.log_prob(x).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


# -------------------------------------------------------------------------- checkpoints of format 2


STORED = Path(__file__).parent / 'checkpoints'


def test_weights_of_format_2_are_merged():
    """Each matrix is what its blocks on the diagonal and below it were, and so are its moments."""
    file = STORED / 'bnaf_2.pt'
    former, saved = load_tensors(file), bnaf.load_checkpoint(file)
    names, new_names = list(former['model']), list(saved['model'])

    def require_merged(merged, diagonal, lower):
        mask = torch.block_diag(*torch.ones_like(diagonal))
        d, b, a = diagonal.shape
        rows = torch.arange(d * b)[:, None] // b
        columns = torch.arange(d * a) // a
        assert torch.equal(merged[mask > 0], torch.block_diag(*diagonal)[mask > 0])
        assert torch.equal(merged[rows > columns], lower[rows > columns])
        assert not merged[rows < columns].any()

    for k, new_name in enumerate(new_names):
        layer, _, parameter = new_name.rpartition('.')
        if parameter != 'weight':
            i = names.index(new_name)
            assert torch.equal(saved['model'][new_name], former['model'][new_name])
            for key, value in saved['optimizer']['state'][k].items():
                assert torch.equal(value, former['optimizer']['state'][i][key])
            continue

        diagonal, lower = f'{layer}.log_diagonal', f'{layer}.lower'
        for prefix, part in (('', 'model'), ('module.', 'average')):
            former_pair = former[part][prefix + diagonal], former[part][prefix + lower]
            require_merged(saved[part][prefix + new_name], *former_pair)
        for key, value in saved['optimizer']['state'][k].items():
            pair = [
                former['optimizer']['state'][names.index(name)][key] for name in (diagonal, lower)
            ]
            if key == 'step':
                assert value == pair[0] == pair[1]
            else:
                require_merged(value, *pair)


DAMAGES = {
    'no diagonal': lambda model, adam: model.pop('0.linears.0.log_diagonal'),
    'no lower': lambda model, adam: model.pop('0.linears.0.lower'),
    'shape': lambda model, adam: model.update({'0.linears.0.lower': torch.zeros(3, 2)}),
    'flat': lambda model, adam: model.update({'0.linears.0.log_diagonal': torch.zeros(8)}),
    'empty': lambda model, adam: model.update({'0.linears.0.log_diagonal': torch.zeros(0, 1, 1)}),
    'scalars': lambda model, adam: model.update(
        {f'0.linears.0.{name}': torch.zeros(()) for name in ('log_diagonal', 'lower')}
    ),
    'type': lambda model, adam: model.update({'0.linears.0.lower': torch.zeros(8, 2).double()}),
    'complex': lambda model, adam: model.update({'0.linears.0.lower': torch.zeros(8, 2).cfloat()}),
    'text': lambda model, adam: model.update({'0.linears.0.lower': 'x'}),
    'number': lambda model, adam: model.update({3: torch.zeros(1)}),
    'no state': lambda model, adam: adam['state'].pop(2),
    'other state': lambda model, adam: adam['state'].update({0: 3}),
    'moment': lambda model, adam: adam['state'][1].update(exp_avg=torch.zeros(2)),
    'entry': lambda model, adam: adam['state'][1].pop('step'),
    'more': lambda model, adam: adam['state'][5].update(more=torch.zeros(2)),
    'groups': lambda model, adam: adam['param_groups'].clear(),
    'indices': lambda model, adam: adam['param_groups'][0].update(params=[0]),
    'tensors': lambda model, adam: adam['param_groups'][0].update(params=[torch.ones(2)] * 33),
    'eight bits': lambda model, adam: model.update(
        {k: v.to(torch.float8_e4m3fn) for k, v in model.items() if 'linears.0' in k}
    ),
    'vector': lambda model, adam: adam['param_groups'][0].update(params=torch.ones(2)),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_checkpoints_of_format_2(damage, tmp_path):
    saved = load_tensors(STORED / 'bnaf_2.pt')
    DAMAGES[damage](saved['model'], saved['optimizer'])
    torch.save(saved, tmp_path / 'damaged.pt')
    with pytest.raises(UserError, match='damaged.pt') as error:
        bnaf.load_checkpoint(tmp_path / 'damaged.pt')
    assert '\n' not in str(error.value)


# -------------------------------------------------------------------------------------------- tails


@torch.no_grad()
@pytest.mark.parametrize('residual', ['normal', 'gated'])
def test_with_a_residual_on_the_last_flow_every_z_has_an_x(residual):
    torch.manual_seed(0)
    model = bnaf.BNAF(3, 4, 1, 5, last_residual=residual).double()
    z = torch.cat([6 * randn(2000, 3), torch.tensor([[1e3, -1e3, 0.0]], dtype=torch.float64)])
    x, logdet = model.inverse(z)
    assert x.isfinite().all() and logdet.isfinite().all()
    assert_close(model(x)[0], z, atol=1e-7)

    of_paper = bnaf.BNAF(3, 4, 1, 5).double()
    assert of_paper.inverse(z)[0].isnan().any()  # beyond the range of its last tanhs


@torch.no_grad()
def test_the_slope_of_the_tails_is_that_of_all_gates():
    """Far out, tanhs are constant: x grows 13 times as fast as z at first."""
    torch.manual_seed(0)
    model = bnaf.BNAF(4, 5, 1, 5, last_residual='gated').double()
    others, last = torch.tensor([bnaf.GATE_OF_OTHERS, bnaf.GATE_OF_LAST]).double()
    slope = 1 / (torch.sigmoid(-others) ** 4 * torch.sigmoid(-last)).item()
    assert slope < 14

    far = torch.tensor([[1e4, 1e4, 1e4, 1e4], [2e4, 2e4, 2e4, 2e4]], dtype=torch.float64)
    near, farther = model.inverse(far)[0]
    assert_close((farther - near) / 1e4, torch.full((4,), slope).double(), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize('residual', [None, 'normal', 'gated'])
def test_what_f_adds_reaches_as_far_whatever_the_residual(residual):
    torch.manual_seed(0)
    flow = bnaf.BNAF(1, 1, 0, 20, last_residual=residual).double()[0]
    x = torch.tensor([[-1e4], [1e4]], dtype=torch.float64)
    z, _ = flow(x)
    _, rest = flow.add_residual(x.new_zeros(1), x.new_zeros(1), x.new_zeros(1))
    low, high = (z - rest * x).flatten().tolist()
    assert high - low == pytest.approx(2 * bnaf.REACH, rel=0.02)


def test_paper_and_own_form_begin_with_the_same_weights():
    """All but what ``init_tails`` sets."""
    models = []
    for last_residual in ('none', 'gated'):
        config = bnaf.Config(n_flows=3, hidden_dim=4, last_residual=last_residual)
        models.append(bnaf.build_model(config, (3, 0)))
    paper, own = (dict(model.named_parameters()) for model in models)
    assert own.keys() - paper.keys() == {'4.gate'}
    for name in paper.keys() - {'0.gate', '2.gate', '4.linears.2.log_g'}:
        assert torch.equal(paper[name], own[name]), name


# ----------------------------------------------------------------------------------- trained models


def fitted(dataset='8gaussians', n_steps=600, **options):
    """Return a small model after some steps of training, in float64, and its data."""
    small = {**bnaf.TOY, 'dataset': dataset, 'hidden_dim': 20, 'n_epochs': n_steps // 100}
    config = bnaf.Config(**{**small, **options})
    data = load_table(dataset)
    run = bnaf.Training(config, data, single_process(bnaf))
    for _ in range(n_steps):
        run.take_step()
    return run.model.double(), data


@pytest.mark.slow
@pytest.mark.parametrize('dataset', ['8gaussians', 'u1'])
def test_densities_integrate_to_one(dataset):
    model, data = fitted(dataset, n_hidden=1, lr=0.05)
    axis = np.linspace(-8, 8, 401)
    points = np.stack(np.meshgrid(axis, axis), 2).reshape(-1, 2)
    area = (axis[1] - axis[0]) ** 2
    total = area * bnaf.Learned(model, data, seed=0).density(points).sum()

    # what lies beyond the range of the last tanhs cannot be drawn
    sampler, _ = bnaf.directions(model, data)
    like = torch.zeros((), dtype=torch.float64)
    _, _, n_lost = bnaf.sample_with_log_prob(sampler, 20_000, 2, like)
    lost = n_lost / (n_lost + 20_000)
    error_of_lost = math.sqrt(lost / 20_000)
    assert total + lost == pytest.approx(1, abs=1e-3 + 3 * error_of_lost)


@pytest.mark.slow
def test_samples_of_a_fitted_gaussian_are_gaussian():
    """By two-sample Kolmogorov-Smirnov tests of four projections against new data."""
    from scipy.stats import ks_2samp

    small = dict(n_flows=2, n_hidden=0, hidden_dim=8)
    config = bnaf.Config(lr=0.02, n_epochs=12, **small)
    data = gaussian_data()
    run = bnaf.Training(config, data, single_process(bnaf))
    for _ in range(1200):
        if run.step == 800:
            run.optimizer.param_groups[0]['lr'] = 0.002
        run.take_step()

    samples, _ = bnaf.sample_rows(run.average.module, data, 2000, 1.0, 0)
    new = data.sampler(np.random.default_rng(10**6), 2000)
    directions = np.array([[1, 0], [0, 1], [1, 1], [1, -1]])
    for a, b in zip(directions @ samples.T, directions @ new.T):
        assert ks_2samp(a, b).pvalue > 1e-3
    assert ks_2samp(1.5 * samples[:, 0], new[:, 0]).pvalue < 1e-3  # the test sees a wrong width


def gaussian_data():
    """Return data that are drawn anew for each step from a Gaussian in the plane."""
    mix = np.array([[1.0, 0.6], [0.0, 0.8]])

    def draw(rng, n):
        return (rng.normal(size=(n, 2)) @ mix).astype(np.float32)

    return TableData(None, None, None, ('a', 'b'), np.zeros(2), np.ones(2), draw)


def test_temperature_of_samples():
    model, _ = fitted(n_steps=100)
    generator = torch.Generator().manual_seed(0)
    cold = model.sample(500, 0.0, generator)
    warm = model.sample(500, 1.0, generator)
    assert (cold - cold[0]).abs().max() < 1e-8
    assert warm.std(0).min() > 0.5


def test_autocast_does_not_round_a_density():
    torch.manual_seed(0)
    model = bnaf.BNAF(3, 2, 1, 4)
    x = torch.randn(5, 3)
    with torch.autocast('cpu', torch.bfloat16):
        log_p = model.log_prob(x)
    assert torch.equal(log_p, model.log_prob(x))
    log_p.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_rows_of_float64_are_exact_in_a_model_of_float32():
    torch.manual_seed(0)
    model = bnaf.BNAF(3, 2, 1, 4, residual='gated')
    x = randn(50, 3)
    assert_close(model.inverse(model(x)[0])[0], x, atol=1e-10)
