"""Properties of BNAF's layers, of the inverse, and of the whole flow, in float64 with perturbed parameters."""

import copy
import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bnaf
import glow
from datasets.tabular import TableData, load_table

FLOWS = {
    'no residual': lambda d: bnaf.BlockFlow(d, 1, 4),
    'normal': lambda d: bnaf.BlockFlow(d, 0, 3, 'normal'),
    'gated': lambda d: bnaf.BlockFlow(d, 2, 4, 'gated'),
    'gated checkpointed': lambda d: bnaf.BlockFlow(d, 1, 4, 'gated', checkpoint_grads=True),
    'Flip': lambda d: bnaf.Flip(),
    'BNAF': lambda d: bnaf.BNAF(d, 3, 1, 4),
    'BNAF normal': lambda d: bnaf.BNAF(d, 2, 0, 5, 'normal'),
}


def perturbed(module, size=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
    return module


def jacobian(function, x):
    return torch.autograd.functional.jacobian(lambda v: function(v[None])[0][0], x)


@pytest.mark.parametrize('shape', [(1, 1), (1, 3), (4, 2), (3, 5)])
@pytest.mark.parametrize('name', FLOWS)
def test_flow_is_a_bijection_with_the_right_logdet(name, shape):
    torch.manual_seed(0)
    flow = perturbed(FLOWS[name](shape[1]))
    x = torch.randn(shape, dtype=torch.float64)
    z, logdet = flow(x)
    x_back, logdet_back = flow.inverse(z)
    assert logdet.shape == logdet_back.shape == (len(x),)
    torch.testing.assert_close(x_back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(logdet_back, -logdet, rtol=0, atol=1e-9)
    for i in range(len(x)):
        j = jacobian(flow, x[i])
        torch.testing.assert_close(logdet[i], torch.linalg.slogdet(j)[1], rtol=0, atol=1e-9)
        j_back = jacobian(flow.inverse, z[i].detach())
        torch.testing.assert_close(
            logdet_back[i], torch.linalg.slogdet(j_back)[1], rtol=0, atol=1e-7
        )
        if isinstance(flow, bnaf.BlockFlow):
            assert (
                (j.diagonal() > 0).all()
                and not j.triu(1).any()
                and j.tril(-1).count_nonzero() == j[0].numel() * (j[0].numel() - 1) // 2
            )


@pytest.mark.parametrize('n_flows', [1, 2, 3])
def test_autoregressive_order_after_each_flip(n_flows):
    """One flow is lower triangular; each flip reverses the order, so two flows depend on everything"""
    model = perturbed(bnaf.BNAF(4, n_flows, 1, 3))
    x = torch.randn(4, dtype=torch.float64)
    assert not jacobian(model[0], x).triu(1).any()
    if n_flows > 1:
        flipped = jacobian(bnaf.Sequence([model[0], model[1], model[2]]), x)
        upper_after_unflipping = jacobian(bnaf.Sequence([model[1], model[2], model[1]]), x)
        assert not upper_after_unflipping.tril(-1).any()
        assert flipped.count_nonzero() == 16


@pytest.mark.parametrize('a, b', [(1, 4), (4, 1), (3, 3)])
def test_masked_linear(a, b):
    torch.manual_seed(0)
    layer = perturbed(bnaf.MaskedLinear(3, a, b))
    w, diagonal = layer.weights(torch.float64)
    blocks = w.view(3, b, 3, a)
    for i in range(3):
        for j in range(3):
            assert (blocks[i, :, j] == 0).all() == (j > i)
        assert torch.equal(blocks[i, :, i], diagonal[..., i]) and (diagonal > 0).all()
    torch.testing.assert_close(w.norm(dim=1), layer.log_g.exp().squeeze(1))


def by_logsumexp(flow, x):
    """log dz_i / dx_i of a flow without residual as the paper computes it (eq. 9-11): in logs, and over the tensors
    (B, d, b, a) that the flow never builds; in the precision of x"""
    flow = copy.deepcopy(flow).to(x.dtype)
    z, log_j = x, x.new_zeros(*x.shape, 1)
    for k, linear in enumerate(flow.linears):
        if k:
            log_j = log_j + 2 * (math.log(2) - z - torch.nn.functional.softplus(-2 * z)).view(
                log_j.shape
            )
            z = z.tanh()
        w, _ = linear.weights(x.dtype)
        v = torch.block_diag(*linear.log_diagonal.exp()) + linear.mask * linear.lower
        log_w = linear.log_diagonal + (linear.log_g - v.norm(dim=1, keepdim=True).log()).view(
            *linear.log_diagonal.shape[:2], 1
        )
        z, log_j = z @ w.T + linear.bias, torch.logsumexp(log_w + log_j[:, :, None], 3)
    return log_j.squeeze(2).sum(1)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1.0, 10.0, 40.0]),
    st.sampled_from([1.0, 10.0, 100.0]),
    st.booleans(),
)
def test_float32_is_as_good_as_logsumexp(seed, spread, steepness, opposed):
    """Blocks whose logs spread over +-40, units as far into saturation as e^-200; opposed: where the next layer's weights
    are large the derivatives are small, so that products underflow in float32 and yet count"""
    torch.manual_seed(seed)
    flow = bnaf.BlockFlow(3, 1, 4)
    with torch.no_grad():
        for linear in flow.linears:
            linear.log_diagonal.uniform_(-spread, spread)
        if opposed:
            flow.linears[0].log_g += (
                math.log(steepness) * torch.tensor([1.0, 1.0, 0.0, 0.0] * 3)[:, None]
            )
            flow.linears[1].log_diagonal.copy_(
                spread * torch.tensor([1.0, 1.0, -1.0, -1.0]) + torch.randn(3, 4, 4)
            )
    x = steepness * torch.randn(5, 3)
    exact = by_logsumexp(flow, x.double())
    error, error_of_logsumexp = (
        (y.double() - exact).abs().max().item() for y in (flow(x)[1], by_logsumexp(flow, x))
    )
    assert error <= 3 * error_of_logsumexp + 1e-6 * (1 + exact.abs().max())
    double = copy.deepcopy(flow).double()
    gradients = [
        torch.autograd.grad(f(y)[1].sum(), y)[0].double()
        for f, y in ((flow, x.clone().requires_grad_()), (double, x.double().requires_grad_()))
    ]
    torch.testing.assert_close(
        *gradients, rtol=1e-3, atol=1e-3 * (1 + gradients[1].abs().max().item()) * 1e-2
    )


def test_saturated_units_are_computed_in_float64():
    """Derivatives of e^-120 underflow in float32; those below e^-708 are taken for that"""
    torch.manual_seed(0)
    flow = bnaf.BlockFlow(1, 0, 3)
    with torch.no_grad():
        flow.linears[0].log_g.zero_()
        for x, low, high in ((60.0, -150, -110), (1e4, -712, -700)):
            z, logdet = flow(torch.tensor([[x], [-x], [0.0]]))
            assert low < logdet[0] < high and low < logdet[1] < high and logdet[2] > -10, logdet
            assert z.dtype == logdet.dtype == torch.float32


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
    """Sums of tanhs are bounded: latents beyond have no origin, and say so; the rest of the batch is not harmed"""
    flow = perturbed(bnaf.BlockFlow(2, 1, 4))
    x = torch.randn(3, 2, dtype=torch.float64)
    z = flow(x)[0].detach()
    z[1, 1] = 1e4
    with torch.no_grad():
        x_back, logdet = flow.inverse(z)
    assert x_back[1].isnan().any() and logdet[1].isnan()
    torch.testing.assert_close(x_back[[0, 2]], x[[0, 2]], rtol=0, atol=1e-10)


def test_tolerance_is_kept():
    flow = perturbed(bnaf.BlockFlow(2, 1, 4))
    x = torch.randn(200, 2, dtype=torch.float64)
    for flow.inverse_tol in (1e-2, 1e-5, 1e-9):
        with torch.no_grad():
            x_back, _ = flow.inverse(flow(x)[0])
        assert (x_back[:, 0] - x[:, 0]).abs().max() <= flow.inverse_tol


@pytest.mark.parametrize('steepness', [1e-6, 1.0, 1e6])
def test_find_root_of_hard_functions(steepness):
    """Steps, plateaus and slopes on which Newton's method alone runs off"""

    def function(u, rows):
        return (
            torch.tanh(steepness * (u - 3)) + 1e-3 * u + torch.tanh(u / 100),
            steepness / torch.cosh((steepness * (u - 3)).clamp(-300, 300)).square()
            + 1e-3
            + 0.01 / torch.cosh(u / 100).square(),
            None,
        )

    true = torch.linspace(-50, 50, 41, dtype=torch.float64)[:, None]
    u, _ = bnaf.find_root(function, function(true, None)[0], 1e-9)
    torch.testing.assert_close(u, true, rtol=0, atol=1e-8)


def test_gradients_through_the_inverse():
    """By the implicit function theorem, against finite differences: for z and for every parameter"""
    torch.manual_seed(0)
    model = perturbed(bnaf.BNAF(3, 2, 1, 2))
    x = torch.randn(2, 3, dtype=torch.float64)
    z = model(x)[0].detach().requires_grad_()
    weights = torch.randn(2, 3, dtype=torch.float64)

    def loss():
        x, logdet = model.inverse(z)
        return (weights * x).sum() + logdet.square().sum()

    parameters = [z, *model.parameters()]
    gradients = torch.autograd.grad(loss(), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients):
            flat = parameter.view(-1)
            for k in range(0, len(flat), max(1, len(flat) // 4)):
                h, old = 1e-4, flat[k].item()
                values = []
                for flat[k] in (old - h, old + h):
                    values.append(loss().item())
                flat[k] = old
                assert (values[1] - values[0]) / (2 * h) == pytest.approx(
                    gradient.reshape(-1)[k].item(), abs=1e-5, rel=1e-3
                )


def test_a_latent_out_of_reach_leaves_the_gradients_of_others_alone():
    torch.manual_seed(0)
    flow = bnaf.BlockFlow(2, 1, 4).double()
    z = flow(torch.randn(3, 2, dtype=torch.float64))[0].detach()
    gradients = []
    for rows in (z[:2], torch.cat([z[:2], torch.full((1, 2), 100.0, dtype=torch.float64)])):
        x, logdet = flow.inverse(rows)
        assert x[2:].isnan().all() and logdet[2:].isnan().all()
        gradients.append(
            torch.autograd.grad(x[:2].sum() + logdet[:2].sum(), list(flow.parameters()))
        )
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_second_derivatives_are_refused_rather_than_wrong():
    flow, x = bnaf.BlockFlow(2, 1, 4), torch.randn(3, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(flow(x)[1].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient.sum().backward()


def test_checkpoint_grads_changes_no_gradient():
    x, gradients = torch.randn(5, 3, dtype=torch.float64), []
    for checkpoint_grads in (False, True):
        torch.manual_seed(0)
        model = bnaf.BNAF(3, 2, 1, 4, checkpoint_grads=checkpoint_grads).double()
        model.log_prob(x).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def fitted(dataset='8gaussians', steps=600, **options):
    """A small model after some steps of training, in float64, and its data"""
    config = bnaf.Config(
        **{**bnaf.TOY, 'dataset': dataset, 'hidden_dim': 20, 'n_epochs': steps // 100, **options}
    )
    data = load_table(dataset)
    run = bnaf.Training(config, data, bnaf.Process(0, 1, torch.device('cpu')))
    for _ in range(steps):
        run.take_step()
    return run.model.double(), data


@pytest.mark.parametrize('dataset', ['8gaussians', 'u1'])
def test_densities_integrate_to_one(dataset):
    model, data = fitted(dataset, n_hidden=1, lr=0.05)
    axis = np.linspace(-8, 8, 401)
    points = np.stack(np.meshgrid(axis, axis), 2).reshape(-1, 2)
    total = bnaf.density(model, data, points).sum() * (axis[1] - axis[0]) ** 2
    x, _, n_lost = bnaf.sample_with_log_prob(
        bnaf.directions(model, data)[0], 20_000, 2, torch.zeros((), dtype=torch.float64)
    )
    lost = n_lost / (
        n_lost + 20_000
    )  # what lies beyond the range of the last tanhs, when it is pulled
    assert total + lost == pytest.approx(1, abs=1e-3 + 3 * math.sqrt(lost / 20_000))


def test_samples_of_a_fitted_gaussian_are_gaussian():
    """Two-sample Kolmogorov-Smirnov tests, of both variables and of two projections, against new data"""
    from scipy.stats import ks_2samp

    config = bnaf.Config(n_flows=2, n_hidden=0, hidden_dim=8, lr=0.02, n_epochs=12)
    mix = np.array([[1.0, 0.6], [0.0, 0.8]])
    data = TableData(
        None,
        None,
        None,
        ('a', 'b'),
        np.zeros(2),
        np.ones(2),
        lambda rng, n: (rng.normal(size=(n, 2)) @ mix).astype(np.float32),
    )
    run = bnaf.Training(config, data, bnaf.Process(0, 1, torch.device('cpu')))
    for _ in range(1200):
        if run.step == 800:
            run.optimizer.param_groups[0]['lr'] = 0.002
        run.take_step()
    samples, _ = bnaf.sample_rows(run.average.module, data, 2000, 1.0, 0)
    new = data.draw(np.random.default_rng(10**6), 2000)
    for direction in ([1, 0], [0, 1], [1, 1], [1, -1]):
        assert ks_2samp(samples @ direction, new @ direction).pvalue > 1e-3
    assert ks_2samp(1.5 * samples[:, 0], new[:, 0]).pvalue < 1e-3  # the test sees a wrong width


def test_temperature_of_samples():
    model, _ = fitted(steps=200)
    cold, warm = (model.sample(500, t, torch.Generator().manual_seed(0)) for t in (0.0, 1.0))
    assert (cold - cold[0]).abs().max() < 1e-8 and warm.std(0).min() > 0.5


def test_plumbing_is_the_same_text_in_both_scripts():
    names = (
        'Sequence',
        'log_normal',
        'Process',
        'setup',
        'wrap_ddp',
        'load_checkpoint',
        'restore_model',
        'update',
        'train',
        'parse_args',
        'main',
    )
    for name in names:
        assert inspect.getsource(getattr(glow, name)) == inspect.getsource(getattr(bnaf, name)), (
            name
        )
