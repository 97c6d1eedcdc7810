"""Properties of Glow's layers and of the whole flow, in float64 with perturbed parameters."""

import io
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.utils
from helpers import assert_close, jacobian, log_det, perturbed, refusal_line, run_command
from tiny_models import random_images, tiny_glow, training_words
from torch.utils._python_dispatch import TorchDispatchMode

import glow
from common.errors import UserError
from common.precision import without_tf32


class GivenTwo(torch.nn.Module):
    """A layer that takes two conditions of each image, given the same ones always."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, self.conditions(x))

    def inverse(self, z):
        return self.layer.inverse(z, self.conditions(z))

    def conditions(self, x):
        return x.new_tensor([1.0, 0.0]).expand(len(x), -1)


LAYERS = {
    'Actnorm': lambda c: glow.Actnorm(c),
    'Invertible1x1Conv plu': lambda c: glow.Invertible1x1Conv(c),
    'Invertible1x1Conv plain': lambda c: glow.Invertible1x1Conv(c, plu=False),
    'Shuffle': lambda c: glow.Shuffle(c),
    'Reverse': lambda c: glow.Reverse(c),
    'AffineCoupling': lambda c: glow.AffineCoupling(c, 8),
    'AdditiveCoupling': lambda c: glow.AdditiveCoupling(c, 8),
    'Squeeze': lambda c: glow.Squeeze(),
    'Prior': lambda c: glow.Prior(c),
    'Prior fixed': lambda c: glow.Prior(c, is_fixed=True),
    'Prior given y': lambda c: GivenTwo(glow.Prior(c, 2)),
    'Prior fixed given y': lambda c: GivenTwo(glow.Prior(c, 2, is_fixed=True)),
    'Split': lambda c: glow.Split(c),
    'FlowStep': lambda c: glow.FlowStep(c, 8),
    'FlowStep checkpointed': lambda c: glow.FlowStep(
        c, 8, permutation='plain_conv1x1', checkpoint_grads=True
    ),
    'FlowStep additive reverse': lambda c: glow.FlowStep(c, 8, 'additive', 'reverse'),
    'FlowLevel': lambda c: glow.FlowLevel(c, 2, 8),
    'FlowLevel last': lambda c: glow.FlowLevel(c, 2, 8, is_last=True),
    'FlowLevel plain': lambda c: glow.FlowLevel(c, 2, 8, permutation='plain_conv1x1'),
    'FlowLevel additive': lambda c: glow.FlowLevel(c, 2, 8, coupling='additive'),
    'FlowLevel shuffle': lambda c: glow.FlowLevel(c, 2, 8, permutation='shuffle'),
    'FlowLevel additive reverse last': lambda c: glow.FlowLevel(
        c, 2, 8, True, coupling='additive', permutation='reverse', checkpoint_grads=True
    ),
}
SHAPES = [
    (1, 2, 2, 2),
    (3, 2, 4, 2),
    (2, 4, 2, 4),
]
VARIANTS = [
    {},
    dict(permutation='plain_conv1x1'),
    dict(coupling='additive'),
    dict(permutation='shuffle', fixed_top=True),
    dict(coupling='additive', permutation='reverse', n_conditions=2),
]


def as_options(options):
    """Return the options of a model as the name of a test."""
    return ','.join(map(str, options.values())) or 'plain'


def given_y(model, n):
    """Return the conditions of n images as the list of further arguments; without any, none."""
    dtype = next(model.parameters()).dtype
    y = torch.arange(n * model.n_conditions).view(n, -1) % 3 % 2
    return [y.to(dtype)] if model.n_conditions else []


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('name', LAYERS)
def test_layer_is_a_bijection_with_the_right_logdet(name, shape):
    torch.manual_seed(0)
    layer = perturbed(LAYERS[name](shape[1]), 0.2)
    x = torch.randn(shape, dtype=torch.float64)
    z, logdet = layer(x)
    x_back, logdet_back = layer.inverse(z)

    assert logdet.shape == logdet_back.shape == (len(x),)
    assert_close(x_back, x, atol=1e-9)
    assert_close(logdet_back, -logdet, atol=1e-9)
    for i in range(len(x)):
        derivatives = jacobian(layer, x[i])
        derivatives_back = jacobian(layer.inverse, z[i])
        assert_close(logdet[i], log_det(derivatives), atol=1e-8)
        assert_close(logdet_back[i], log_det(derivatives_back), atol=1e-8)


@pytest.mark.parametrize(
    'input_dims, n_levels',
    [
        ((1, 4, 4), 1),
        ((3, 8, 8), 1),
        ((3, 8, 8), 2),
        ((2, 8, 16), 2),
    ],
)
@pytest.mark.parametrize('options', VARIANTS, ids=as_options)
def test_whole_flow(input_dims, n_levels, options):
    torch.manual_seed(0)
    model = perturbed(glow.Glow(input_dims, n_levels, 2, 8, **options), 0.05)
    x = torch.rand(2, *input_dims, dtype=torch.float64) - 0.5
    given = given_y(model, 2)
    z, logdet = model(x, *given)
    assert z.shape == (2, math.prod(input_dims))

    x_back, logdet_back = model.inverse(z, *given)
    assert_close(x_back, x, atol=1e-8)
    assert_close(logdet_back, -logdet, atol=1e-8)

    given_one = [y[:1] for y in given]
    z_of_one, logdet_of_one = model(x[:1], *given_one)
    torch.testing.assert_close(z_of_one, z[:1])
    torch.testing.assert_close(logdet_of_one, logdet[:1])
    if z.shape[1] <= 64:
        derivatives = jacobian(lambda x: model(x, *given_one), x[0])
        assert_close(logdet[0], log_det(derivatives), atol=1e-8)


def run_layer_by_layer(model, x, *given):
    """Run the forward pass of a model one layer after the other. Returns z and logdet."""
    z, logdet = [], 0
    for level in model.levels:
        for layer in glow.simple_layers(level):
            x, logdet_layer = layer(x)
            logdet = logdet + logdet_layer
        if level is not model.levels[-1]:
            z_a, x = x.chunk(2, dim=1)
            z.append(z_a.flatten(1))
    last, logdet_prior = model.prior(x, *given)
    return torch.cat([*z, last.flatten(1)], dim=1), logdet + logdet_prior


@pytest.mark.parametrize('options', VARIANTS, ids=as_options)
def test_a_level_computes_what_its_layers_do(options):
    model = perturbed(tiny_glow(**options), 0.2)
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64) - 0.5
    given = given_y(model, 3)
    results, gradients = [], []
    for run in (model, lambda *inputs: run_layer_by_layer(model, *inputs)):
        model.zero_grad()
        z, logdet = run(x, *given)
        (z.square().sum() + logdet.sum()).backward()
        results.append((z, logdet))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*gradients)
    x_back, _ = model.inverse(z, *given)
    assert_close(x_back, x, atol=1e-9)  # a level inverts all its steps at once


class CountOperations(TorchDispatchMode):
    """Counts the operations that run inside it, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


# The gradient of log|det W| is computed matrix by matrix where W has no factors
@pytest.mark.parametrize('options', [VARIANTS[0], *VARIANTS[2:]], ids=as_options)
def test_what_does_not_depend_on_x_is_computed_once_a_level(options):
    """Neither that nor a conversion of the layout is repeated by a further step of flow."""
    counts = []
    for depth in (2, 3):
        model = tiny_glow(depth=depth, width=4, **options).to(memory_format=torch.channels_last)
        with CountOperations() as operations:
            y = given_y(model, 2)
            model.log_prob(random_images(2, 1, 4, 4), None, *y).sum().backward()
        counts.append(operations.counts)
    once = ['clone', 'triu', 'baddbmm', 'bmm', 'diag_embed', 'stack', 'pixel_unshuffle']
    assert [counts[0][name] for name in once] == [counts[1][name] for name in once]
    is_plu = 'permutation' not in options
    assert counts[0]['clone'] > 0 and counts[0]['baddbmm'] == 2 * is_plu  # levels
    assert counts[0]['convolution'] < counts[1]['convolution']


def test_a_latent_keeps_its_layout_from_step_to_step():
    model = tiny_glow(input_dims=(3, 8, 8), n_levels=1).to(memory_format=torch.channels_last)
    latents = []
    for module in model.modules():
        if isinstance(module, (glow.FlowStep, glow.Split)):
            module.register_forward_pre_hook(lambda module, args: latents.append(args[0]))
    model(torch.rand(2, 3, 8, 8))
    assert len(latents) == 5
    for x in latents:
        assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@pytest.mark.parametrize('options', VARIANTS, ids=as_options)
@pytest.mark.parametrize('checkpoint_grads', [True, False])
def test_a_training_never_waits_for_the_device(options, checkpoint_grads):
    """It asks for no value of a tensor, and makes none from numbers of Python."""
    model = tiny_glow(checkpoint_grads=checkpoint_grads, **options)
    x = random_images(2, 1, 4, 4)
    batch = [x, torch.rand(x.shape), *given_y(model, 2)]
    for is_class in (False, True):
        objective = glow.Objective(model, 16, bf16=True, weight_y=0.01, is_class=is_class)
        with CountOperations() as operations:
            objective(*batch).backward()
        assert operations.counts['convolution'] > 0
        assert not {'_local_scalar_dense', 'lift_fresh'} & set(operations.counts)

    with CountOperations() as operations:
        assert torch.tensor(1.0) > 0
    assert {'_local_scalar_dense', 'lift_fresh'} <= set(operations.counts)


def count_graphs():
    """Return how many graphs torch has compiled since the counters were cleared."""
    return torch._dynamo.utils.counters['stats']['unique_graphs']


@pytest.fixture
def nothing_compiled():
    """Forget what was compiled in this process before, and count anew."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize('kind', glow.COUPLINGS.values(), ids=glow.COUPLINGS)
def test_couplings_of_every_size_are_compiled(kind, nothing_compiled, monkeypatch):
    """Those of one level share the code; a model of ten levels is compiled to the last."""
    compile_module = torch.nn.Module.compile

    def trace_only(module, **options):
        compile_module(module, backend='eager', **options)

    monkeypatch.setattr(torch.nn.Module, 'compile', trace_only)
    couplings = [kind(2 * c, 4) for c in range(1, 11) for _ in range(3)]
    glow.compile_couplings(torch.nn.ModuleList(couplings))
    for coupling in couplings:
        n_channels = 2 * coupling.net[0].conv.in_channels
        x = torch.randn(2, n_channels, 4, 4)
        torch.testing.assert_close(coupling(x), coupling.forward(x))
    assert count_graphs() == 10


@pytest.mark.slow
@pytest.mark.parametrize('checkpoint_grads, bf16', [(False, False), (True, True)])
def test_compiled_and_eager_agree(nothing_compiled, checkpoint_grads, bf16):
    x = random_images(2, 1, 4, 4)
    u = torch.rand(x.shape)
    losses, gradients = [], []
    for is_compiled in (False, True):
        model = perturbed(tiny_glow(checkpoint_grads=checkpoint_grads), 0.1).float()
        if is_compiled:
            glow.compile_couplings(model)
        loss = glow.Objective(model, 16, bf16)(x, u)
        loss.backward()
        losses.append(loss)
        gradients.append([p.grad for p in model.parameters()])
    assert count_graphs() == len(model.levels)

    tolerance = dict(rtol=0.1, atol=0.02) if bf16 else dict(rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(*losses, **tolerance)
    torch.testing.assert_close(*gradients, **tolerance)


def test_a_singular_matrix_has_no_inverse():
    model = tiny_glow()
    model.levels[0][1][1].p.zero_()
    with pytest.raises(torch.linalg.LinAlgError, match='singular'):
        model.sample(1)


def test_every_latent_matters():
    """Nothing is resampled or thrown away: changing any latent changes the image."""
    model = perturbed(tiny_glow(), 0.2)
    derivatives = jacobian(model.inverse, torch.randn(16, dtype=torch.float64))
    assert (derivatives.abs().amax(0) > 1e-6).all()


def test_checkpoint_grads_changes_no_gradient():
    x = random_images(2, 1, 4, 4)
    u = torch.rand(x.shape, dtype=torch.float64)
    gradients = []
    for checkpoint_grads in (False, True):
        model = perturbed(tiny_glow(checkpoint_grads=checkpoint_grads), 0.2)
        model.log_prob(x, u).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 0


def test_folded_actnorm_is_convolution_then_actnorm():
    layer = perturbed(glow.ConvActnorm(3, 5, 3), 0.2)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected, _ = layer.actnorm(layer.conv(x))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize('n_bits', range(1, 9))
def test_constant_of_n_bits_by_hand(n_bits):
    """log p(x) = log N(z) + logdet - D n log 2, where x in its bins is scaled to [-1/2, 1/2)."""
    model = tiny_glow(n_bits=n_bits).double()
    x = random_images(3, 1, 4, 4)
    u = torch.rand(x.shape, dtype=torch.float64)
    bins = x // 2 ** (8 - n_bits)
    z, logdet = model((bins + u) / 2**n_bits - 0.5)

    log_normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    expected = log_normal + logdet - 16 * math.log(2**n_bits)
    torch.testing.assert_close(model.log_prob(x, u), expected, check_dtype=False)


@pytest.mark.parametrize('n_bits', range(1, 9))
def test_images_survive_the_flow(n_bits):
    """uint8 -> bins -> uint8 is exact, and the picture shown falls into the same bins again."""
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    dequantize = glow.Dequantize(n_bits)
    for u in (torch.zeros(x.shape), torch.full(x.shape, 0.999)):
        y, _ = dequantize(x, u)
        shown, _ = dequantize.inverse(y)
        assert (shown >> (8 - n_bits) == x >> (8 - n_bits)).all()
        assert shown.min() == 0 and shown.max() == 255


def test_probabilities_of_all_images_sum_to_at_most_one():
    """Over all 2^16 one-bit images of 4x4 pixels. With new noise in each of them, the sum estimates
    the mass inside the cube."""
    model = tiny_glow(n_bits=1, width=4)
    pixels = list(itertools.product((0, 255), repeat=16))
    images = torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 4, 4)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    glow.initialize(model, images[order[:512]])

    perturbed(model, 0.01)
    with torch.no_grad():
        u = torch.rand(images.shape, dtype=torch.float64, generator=generator)
        p = model.log_prob(images, u).exp()
    two_errors = 2 * p.std() * 2**8
    assert 0.05 < p.sum() - two_errors and p.sum() + two_errors <= 1


def test_density_integrates_to_one():
    """By importance sampling from the flow's own inverse at a higher temperature: E[p / q] = 1."""
    model = perturbed(tiny_glow(), 0.1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 16, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        x, logdet_inverse = model.inverse(1.2 * noise)
        z, logdet = model(x)
    log_q = glow.log_normal(noise) - 16 * math.log(1.2) - logdet_inverse
    log_p = glow.log_normal(z) + logdet
    total = (log_p - log_q).exp().mean()
    assert total.item() == pytest.approx(1, abs=0.1)


def test_initialisation():
    model = tiny_glow(input_dims=(3, 8, 8))
    x = random_images(64, 3, 8, 8)
    u = torch.rand(x.shape)
    x[:, 0], u[:, 0] = 7, 0.5  # a constant channel
    glow.initialize(model, x, u)

    outputs = []
    for module in model.modules():
        if isinstance(module, glow.Actnorm):
            assert module.initialized
            module.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    z, logdet = run_layer_by_layer(model, model.dequantize(x, u)[0])
    assert z.isfinite().all() and logdet.isfinite().all()

    first = outputs[0].transpose(0, 1).flatten(1)
    var, mean = torch.var_mean(first, dim=1, correction=0)
    assert_close(mean, torch.zeros(12), atol=1e-5)
    assert_close(var[:4], torch.zeros(4), atol=1e-6)  # the squeeze made four of the constant one
    assert_close(var[4:], torch.ones(8), atol=1e-3)


def initialize_at_once(model, x, u):
    """Initialize a model from all images in one pass, each layer as it gets its input."""
    hooks = []
    for module in model.modules():
        if hasattr(module, 'initialize'):
            hook = module.register_forward_pre_hook(lambda layer, args: layer.initialize(args))
            hooks.append(hook)
    with torch.no_grad():
        run_layer_by_layer(model, model.dequantize(x, u)[0])
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize('batch_size', [1, 7, 64])
def test_initialisation_does_not_depend_on_the_size_of_the_pieces(batch_size):
    x = random_images(24, 3, 8, 8)
    u = torch.rand(x.shape)
    x[:, 0], u[:, 0] = 7, 0.5  # a constant channel
    expected = tiny_glow(input_dims=(3, 8, 8))
    initialize_at_once(expected, x, u)

    model, sizes = tiny_glow(input_dims=(3, 8, 8)), []
    for module in model.levels.modules():
        module.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    glow.initialize(model, x, u, batch_size)
    assert max(sizes) == min(batch_size, 24)
    for key, value in expected.state_dict().items():
        assert_close(model.state_dict()[key], value, atol=1e-5)


def test_initialised_once_and_never_after_a_reload():
    model = tiny_glow()
    assert not any(m.initialized for m in model.modules() if type(m) is glow.Actnorm)
    glow.initialize(model, random_images(16, 1, 4, 4))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)

    other = tiny_glow()
    other.load_state_dict(torch.load(file, weights_only=True))
    glow.initialize(other, random_images(16, 1, 4, 4, seed=1))
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_the_last_prior_is_not_initialised_from_data():
    model = tiny_glow()
    glow.initialize(model, random_images(16, 1, 4, 4))
    assert not model.prior.b.any() and not model.prior.log_s.any()


def test_autocast_rounds_the_networks_only():
    torch.manual_seed(0)
    model = glow.Glow((3, 8, 8), 1, 2, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    x = torch.rand(4, 3, 8, 8) - 0.5
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        z, logdet = model(x)
        x_back, _ = model.inverse(z)
    assert z.dtype == logdet.dtype == torch.float32
    assert (x - x_back).abs().max() < 1e-3
    assert not torch.equal(z, model(x)[0])  # the networks were in bf16


def test_only_the_networks_of_a_training_are_computed_in_tf32(convolutions_of_a_gpu):
    model = perturbed(tiny_glow(), 0.05).float()
    x = random_images(8, 1, 4, 4)
    u = torch.rand(x.shape)
    losses, latents = [], []
    for is_allowed in (False, True):
        torch.backends.cudnn.allow_tf32 = is_allowed  # True is the default
        losses.append(model.log_prob(x, u))
        latents.append(model.levels[0][1][1](torch.ones(2, 4, 2, 2))[0])
    assert not torch.equal(*losses)
    assert torch.equal(*latents)
    assert torch.backends.cudnn.allow_tf32  # as it was

    with torch.no_grad():
        assert torch.equal(model.log_prob(x, u), losses[0])
    assert torch.equal(model.eval().log_prob(x, u), losses[0])


def test_the_flags_of_tf32_are_restored_after_an_error():
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    assert flags[0]
    with pytest.raises(ZeroDivisionError), without_tf32():
        assert not torch.backends.cudnn.allow_tf32
        raise ZeroDivisionError
    assert flags == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)


MIXED_FLAGS = """
from torch.backends import cuda, cudnn
import glow
cudnn.fp32_precision = '{of_all}'
cudnn.conv.fp32_precision = cuda.matmul.fp32_precision = 'tf32'
cudnn.rnn.fp32_precision = 'ieee'  # reading cudnn.allow_tf32 fails now
with glow.without_tf32():
    print(cudnn.conv.fp32_precision, cuda.matmul.fp32_precision)
print(cudnn.conv.fp32_precision, cuda.matmul.fp32_precision)
glow.Glow((1, 4, 4), 1, 1, 4).sample(1)
"""


@pytest.mark.skipif(
    not hasattr(torch.backends.cudnn, 'conv'), reason='this torch has one set of flags only'
)
@pytest.mark.parametrize('of_all', ['none', 'tf32'])
def test_tf32_is_turned_off_whichever_flags_allow_it(of_all, tmp_path):
    """In a process of its own, because flags cannot be unset again."""
    code = MIXED_FLAGS.format(of_all=of_all)
    root = str(Path(glow.__file__).parent)
    out, _ = run_command('-c', code, cwd=tmp_path, PYTHONPATH=root)
    assert out.split() == ['ieee', 'ieee', 'tf32', 'tf32']


@pytest.mark.parametrize('shape', [(2, 3, 4, 4), (2, 1, 8, 8), (1, 4, 4)])
def test_images_of_another_shape_have_no_density(shape):
    with pytest.raises(ValueError, match=r'takes uint8 images of shape \(B, 1, 4, 4\), not'):
        tiny_glow().log_prob(random_images(*shape))


def test_images_of_another_type_have_no_density():
    with pytest.raises(ValueError, match=r'not torch.float32 of shape \(2, 1, 4, 4\)'):
        tiny_glow().log_prob(torch.rand(2, 1, 4, 4))


def test_no_images_at_all():
    model = tiny_glow(input_dims=(3, 8, 8))
    images = random_images(0, 3, 8, 8)
    assert model.log_prob(images).shape == (0,)
    assert model.sample(0).shape == images.shape

    z = glow.encode(model, images.numpy(), 'cpu')
    x, logdet = model.inverse(z)
    assert z.shape == (0, 192) and x.shape == images.shape and logdet.shape == (0,)
    assert glow.decode(model, z).shape == images.shape


@pytest.mark.parametrize('n_conditions', [0, 3])
def test_latents_are_decoded_in_parts_that_fit(n_conditions, monkeypatch):
    model = tiny_glow(input_dims=(3, 8, 8), n_conditions=n_conditions).eval()
    z = torch.randn(9, 192)
    y = torch.eye(3)[torch.arange(9) % 3] if n_conditions else None
    whole = glow.decode(model, z, y)
    latents = glow.encode(model, whole, 'cpu', y)
    (samples,) = glow.sample_grid(model, [0.7], 9, 0, 'cpu', None if y is None else y[0].numpy())

    monkeypatch.setattr(glow, 'memory_for', lambda n_bytes: 4 * 4 * model.memory_per_image)
    assert [len(part) for part, _ in model.in_parts(z, y)] == [4, 4, 1]
    torch.testing.assert_close(glow.encode(model, whole, 'cpu', y), latents)
    parts = glow.decode(model, z, y)
    (again,) = glow.sample_grid(model, [0.7], 9, 0, 'cpu', None if y is None else y[0].numpy())
    for a, b in ((whole, parts), (samples, again)):
        assert np.abs(a.astype(int) - b).max() <= 255 // 31 + 1  # rounding may move a bin
        assert (a == b).mean() > 0.99

    monkeypatch.setattr(glow, 'memory_for', lambda n_bytes: 1)
    assert [len(part) for part, _ in model.in_parts(z, y)] == [1] * 9


def test_large_images_need_a_model_that_is_not_tiny():
    """Otherwise the checkpoint would be taken for a hostile one, and the training lost."""
    glow.CHECKPOINT.require_readable(tiny_glow(input_dims=(3, 1024, 1024)))
    with pytest.raises(UserError, match='make the model larger, or the inputs smaller'):
        glow.CHECKPOINT.require_readable(tiny_glow(input_dims=(3, 2048, 2048)))
    large = dict(depth=32, width=128)
    glow.CHECKPOINT.require_readable(tiny_glow(input_dims=(3, 2048, 2048), n_levels=3, **large))


def test_such_a_training_does_not_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(glow.Glow, 'memory_per_image', 2**40)
    line = refusal_line(glow, capsys, *training_words(tmp_path))
    assert 'make the model larger, or the inputs smaller' in line


def test_an_additive_coupling_keeps_volumes_exactly():
    coupling = perturbed(glow.AdditiveCoupling(4, 8), 1.0).float()
    x = torch.randn(3, 4, 4, 4)
    z, logdet = coupling(x)
    assert not torch.equal(z[:, :2], x[:, :2]) and torch.equal(z[:, 2:], x[:, 2:])
    assert not logdet.any() and not coupling.inverse(z)[1].any()


@pytest.mark.parametrize('permutation, tolerance', [('shuffle', 1e-4), ('conv1x1', 1e-3)])
@pytest.mark.parametrize('scale', [1, 10, 1000])
def test_additive_couplings_round_as_float32_does_at_any_latent(scale, permutation, tolerance):
    options = dict(input_dims=(3, 16, 16), n_levels=2, depth=8, width=16)
    model = tiny_glow(**options, coupling='additive', permutation=permutation)
    glow.initialize(model, random_images(64, 3, 16, 16))
    model = perturbed(model, 0.02).float()
    z = scale * torch.randn(16, 768)
    with torch.no_grad():
        x, _ = model.inverse(z)
        z_back, _ = model(x)
    assert (z_back - z).abs().max() < tolerance * max(x.abs().max(), z.abs().max())


@pytest.mark.parametrize('name', ['shuffle', 'reverse'])
def test_a_permutation_is_inverted_exactly(name):
    torch.manual_seed(0)
    layer = glow.PERMUTATIONS[name](12)
    x = torch.randn(2, 12, 4, 4)
    z, logdet = layer(x)
    channels = {channel.numpy().tobytes() for channel in x[0]}
    assert {channel.numpy().tobytes() for channel in z[0]} == channels
    assert not torch.equal(z, x) and not logdet.any()
    assert torch.equal(layer.inverse(z)[0], x)


def test_a_reversal_is_its_own_inverse():
    layer, x = glow.Reverse(4), torch.randn(2, 4, 2, 2)
    z, _ = layer(x)
    assert torch.equal(z, x.flip(1)) and torch.equal(layer(z)[0], x)


def test_each_shuffle_is_another_and_is_kept():
    first, second = (tiny_glow(permutation='shuffle', input_dims=(3, 8, 8)) for _ in range(2))
    shuffles = [layer.w for layer in first.modules() if isinstance(layer, glow.Shuffle)]
    assert len({w.numpy().tobytes() for w in shuffles}) == len(shuffles) == 4
    assert not any(parameter.shape == (12, 12) for parameter in first.parameters())

    for layer in second.modules():
        if isinstance(layer, glow.Shuffle):
            layer.w.copy_(layer.w.flip(0))
    images = random_images(3, 3, 8, 8)
    u = torch.zeros(images.shape)
    for model in (first, second):
        perturbed(model, 0.05).float()
    assert not torch.equal(first.log_prob(images, u), second.log_prob(images, u))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.log_prob(images, u), second.log_prob(images, u))


def test_scale_is_bounded_away_from_zero():
    coupling = glow.AffineCoupling(4, 8)
    torch.nn.init.constant_(coupling.net[-1].bias, -1000.0)
    s, _ = coupling.scale_and_shift(torch.randn(2, 2, 4, 4))
    assert s.min() >= 0.999 * glow.S_MIN


@pytest.mark.parametrize(
    'options, millions',
    [
        ((3, 24, 256), 21.64),
        pytest.param((3, 32, 512), 74.06, marks=pytest.mark.slow),
        pytest.param((4, 48, 512), 189.31, marks=pytest.mark.slow),
    ],
)
def test_parameter_counts_of_the_authors_models(options, millions):
    for permutation in ('conv1x1', 'plain_conv1x1'):
        with torch.device('meta'):
            model = glow.Glow((3, 64, 64), *options, permutation=permutation)
        assert model.n_parameters / 1e6 == pytest.approx(millions, abs=0.02)


def test_temperature_scales_new_noise_only():
    model = tiny_glow()
    cold = model.sample(3, 0.0)
    assert cold.shape == (3, 1, 4, 4) and cold.dtype == torch.uint8
    assert (cold == cold[0]).all()

    warm = model.sample(3, 1.0, torch.Generator().manual_seed(0))
    assert not torch.equal(warm[0], warm[1])

    z = torch.randn(3, 16)
    x, _ = model.inverse(z)
    assert_close(model(x)[0], z, atol=1e-4)
