"""Conditional densities p(x | c): what holds of flows holds of them, given any context."""

import math
from functools import partial

import pytest
import torch
from helpers import assert_close, jacobian, log_det, perturbed
from torch.autograd import forward_ad

import bnaf
from common.errors import UserError

FLOWS = {
    'no residual': lambda d, c: bnaf.BlockFlow(d, 1, 4, context_dim=c),
    'normal': lambda d, c: bnaf.BlockFlow(d, 0, 3, 'normal', context_dim=c),
    'gated': lambda d, c: bnaf.BlockFlow(d, 2, 4, 'gated', context_dim=c),
    'gated checkpointed': lambda d, c: bnaf.BlockFlow(
        d, 1, 4, 'gated', checkpoint_grads=True, context_dim=c
    ),
    'Flip': lambda d, c: bnaf.Flip(),
    'BNAF': lambda d, c: bnaf.BNAF(d, 3, 1, 4, context_dim=c),
}
SHAPES = [(1, 1, 1), (4, 1, 2), (3, 2, 1), (3, 5, 3)]  # rows, columns, context


def randn(*shape):
    """Return standard normal numbers in float64."""
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('name', FLOWS)
def test_a_flow_given_a_context_is_a_bijection_with_the_right_logdet(name, shape):
    torch.manual_seed(0)
    n, d, c = shape
    flow = perturbed(FLOWS[name](d, c), 0.3)
    x, context = randn(n, d), randn(n, c)
    z, logdet = flow(x, context)
    x_back, logdet_back = flow.inverse(z, context)

    assert_close(x_back, x, atol=1e-10)
    assert_close(logdet_back, -logdet, atol=1e-9)
    for i in range(n):
        own = context[i : i + 1]
        derivatives = jacobian(lambda x, own=own: flow(x, own), x[i])
        assert_close(logdet[i], log_det(derivatives), atol=1e-9)
        derivatives_back = jacobian(lambda z, own=own: flow.inverse(z, own), z[i].detach())
        assert_close(logdet_back[i], log_det(derivatives_back), atol=1e-7)


def test_at_first_a_context_has_no_effect_and_later_it_moves_every_variable():
    torch.manual_seed(0)
    x, context = randn(1, 4), randn(1, 2)
    model = bnaf.BNAF(4, 2, 1, 5, context_dim=2).double()
    assert_close(model(x, context)[0], model(x, 0 * context)[0], atol=0)
    model = perturbed(model, 0.3)
    derivatives = jacobian(lambda c: model(x, c), context[0])
    assert derivatives.count_nonzero() == 4 * 2


def test_a_context_does_not_change_the_order_of_the_variables():
    torch.manual_seed(0)
    flow = perturbed(bnaf.BlockFlow(4, 1, 5, 'gated', context_dim=2), 0.3)
    context = randn(1, 2)
    derivatives = jacobian(lambda x: flow(x, context), randn(4))
    assert not derivatives.triu(1).any()
    assert (derivatives.diagonal() > 0).all()


@pytest.mark.parametrize('dtype, atol', [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize('checkpoint_grads', [False, True])
@pytest.mark.parametrize('residual', [None, 'normal', 'gated'])
@pytest.mark.parametrize('shape', [(1, 1, 4), (3, 2, 4), (12, 1, 20)])  # the last is cut in strips
def test_fast_layers_equal_plain_ones(shape, residual, checkpoint_grads, dtype, atol, monkeypatch):
    """In values, and in the gradients of rows, contexts and parameters."""
    torch.manual_seed(0)
    d, n_hidden, hidden_dim = shape
    flow = bnaf.BlockFlow(d, n_hidden, hidden_dim, residual, checkpoint_grads, context_dim=3)
    flow = perturbed(flow, 0.3).to(dtype)
    x, context = (randn(6, k).to(dtype).requires_grad_() for k in (d, 3))
    weights = randn(6, d).to(dtype)

    results = []
    for is_plain in (False, True):
        monkeypatch.setattr(bnaf, 'is_transformed', lambda: is_plain)
        z, logdet = flow(x, context)
        loss = (weights * z).sum() + logdet.square().sum()
        gradients = torch.autograd.grad(loss, [x, context, *flow.parameters()])
        results.append([z, logdet, *gradients])
    for fast, plain in zip(*results):
        assert_close(fast, plain, atol=atol * (1 + plain.abs().max().item()))


def test_gradients_by_the_context():
    """First and second ones of the forward direction, first ones of the inverse."""
    torch.manual_seed(0)
    model = perturbed(bnaf.BNAF(3, 2, 1, 4, context_dim=2), 0.2)
    x, context = randn(3, 3).requires_grad_(), randn(3, 2).requires_grad_()
    assert torch.autograd.gradcheck(model, (x, context))
    assert torch.autograd.gradgradcheck(model, (x, context))
    z = model(x, context)[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(model.inverse, (z, context))


def test_function_transforms():
    """A gradient of each row by its context, and a derivative along a direction."""
    torch.manual_seed(0)
    model = perturbed(bnaf.BNAF(3, 2, 1, 4, context_dim=2), 0.2)
    x, context = randn(4, 3), randn(4, 2).requires_grad_()

    def log_prob(context, x):
        return model.log_prob(x[None], context[None]).squeeze()

    of_each_row = torch.func.vmap(torch.func.grad(log_prob))(context.detach(), x)
    (expected,) = torch.autograd.grad(model.log_prob(x, context).sum(), context)
    assert_close(of_each_row, expected, atol=1e-12)

    direction = randn(4, 2)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(context.detach(), direction)
        along = forward_ad.unpack_dual(model.log_prob(x, dual)).tangent
    assert_close(along, (expected * direction).sum(1), atol=1e-12)


@pytest.mark.parametrize('context', [None, torch.zeros(4, 1), torch.zeros(3, 2), torch.zeros(2)])
def test_a_context_of_another_shape(context):
    model = bnaf.BNAF(3, 2, 1, 4, context_dim=2)
    for use in (partial(model.log_prob, torch.zeros(4, 3)), partial(model.sample, 4)):
        with pytest.raises(ValueError) as error:
            use(context=context)
        assert str(error.value).startswith('the context of this model is of shape (4, 2), not ')


def test_a_context_for_a_model_that_takes_none():
    with pytest.raises(ValueError, match='of shape None, not'):
        bnaf.BNAF(3, 2, 1, 4).log_prob(torch.zeros(4, 3), torch.zeros(4, 2))


def test_every_sample_belongs_to_its_context_also_when_it_is_drawn_again():
    torch.manual_seed(0)
    context = torch.arange(30_000, dtype=torch.float64)[:, None]
    n_drawn = 0

    def from_noise(z, context):
        nonlocal n_drawn
        n_drawn += len(z)
        x = torch.where(torch.rand(len(z), 1) < 0.3, math.nan, context + 0.0 * z)
        return x, context.squeeze(1)

    like = torch.zeros((), dtype=torch.float64)
    x, log_p, n_lost = bnaf.sample_with_log_prob(from_noise, 30_000, 1, like, context=context)
    assert_close(x, context, atol=0)
    assert n_lost == n_drawn - 30_000 and 10_000 < n_lost < 16_000
    normal = log_p + context.squeeze(1)  # log N(z) alone
    assert normal.max() < -0.9 and normal.isfinite().all()


def test_a_context_for_which_nothing_is_found_ends_with_one_line():
    context = torch.arange(2000.0)[:, None]

    def from_noise(z, context):
        return torch.where(context == 7, math.nan, z), z.sum(1)

    with pytest.raises(UserError, match='of 3,000 draws only 1999 gave finite rows'):
        bnaf.sample_with_log_prob(from_noise, 2000, 1, torch.zeros(()), context=context)


def test_samples_follow_their_contexts():
    torch.manual_seed(0)
    model = perturbed(bnaf.BNAF(2, 2, 1, 6, context_dim=1), 0.3)
    n = 4000
    low, high = torch.zeros(n, 1, dtype=torch.float64), torch.ones(n, 1, dtype=torch.float64)
    both = model.sample(2 * n, context=torch.cat([low, high]))
    for rows, context in zip(both.chunk(2), (low, high)):
        z, _ = model(rows, context)
        assert_close(z.mean(0), torch.zeros_like(z[0]), atol=0.08)
        assert_close(z.std(0), torch.ones_like(z[0]), atol=0.05)
    wrong, _ = model(both[:n], high)
    assert wrong.mean(0).abs().max() > 0.1
