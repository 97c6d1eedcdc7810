"""A training step: it never waits for the device, clips as it should, and can be captured."""

import contextlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo  # before torch.cuda is replaced
from contenders import as_image_data, as_table_data, random_values
from helpers import CPU, mixed_table, single_process
from tiny_models import with_classes
from torch.utils._python_dispatch import TorchDispatchMode

import bnaf
import glow
from common.devices import collect_gradients, keep_on_device, to_device
from common.errors import UserError
from common.graphs import N_WARMUP, CapturedStep, can_capture
from common.runs import StopQuestion
from datasets.tabular import load_table, table_from_frame

SHAPES = {
    'glow': dict(image_size=8, n_levels=1, depth=2, width=8, batch_size=4),
    'bnaf': dict(data_dim=3, n_flows=2, n_hidden=1, hidden_dim=4, batch_size=20),
}
SCRIPTS = {'glow': glow, 'bnaf': bnaf}
OTHER_LAYERS = dict(coupling='additive', permutation='shuffle', fixed_top=True, translate=2)
GIVEN_CLASSES = dict(condition=['classes'], weight_y=1.0)


def small_training(name, **options):
    """Return a training of a small model on noise."""
    script, shape = SCRIPTS[name], dict(SHAPES[name])
    values = random_values(name, shape, 4 * shape['batch_size'])
    data = as_image_data(values) if name == 'glow' else as_table_data(values, n_test=5)
    shape.pop('data_dim', None)
    if name == 'glow':
        options = {'batch_size_init': 8, **options}
    if options.get('condition'):
        data = with_classes(data)
    return script.Training(script.Config(**shape, **options), data, single_process(script))


def conditional_training(**options):
    """Return a small training of two columns given two others."""
    data = table_from_frame(mixed_table(100), 'x', drop=['index'], condition=['city', 'old'])
    config = bnaf.Config(n_flows=2, hidden_dim=4, batch_size=20, **options)
    return bnaf.Training(config, data, single_process(bnaf))


def state_tensors(run):
    """Return all tensors that a training step changes."""
    tensors = [run.n_skipped, run.skips_in_a_row]
    for module in (run.model, run.average):
        tensors += module.state_dict().values()
    for state in run.optimizer.state.values():
        tensors += state.values()
    return tensors


def counters(run):
    """Return the tensors that count the steps of a training."""
    steps = [state['step'] for state in run.optimizer.state.values()]
    return [run.n_skipped, run.skips_in_a_row, run.average.n_averaged, *steps]


@torch.no_grad()
def densities(run, model):
    """Return the log-densities of the first of a training's data by a model or an average of it."""
    model = getattr(model, 'module', model)
    if isinstance(model, bnaf.BNAF):
        return model.log_prob(torch.from_numpy(run.data.train[:5]))
    images = torch.from_numpy(run.data.train.images[:5])
    y = glow.conditions_of(run.data.train, slice(5), CPU)
    return model.log_prob(images, torch.full(images.shape, 0.5), y)


# ----------------------------------------------------------------------------- waiting, clipping


READING = {'_local_scalar_dense', 'nonzero', 'is_nonzero', 'equal'}
COPYING = {'lift_fresh'}  # values of the CPU to a tensor


class Without(TorchDispatchMode):
    """Inside, some operations fail: those for which the CPU would wait for a GPU."""

    def __init__(self, forbidden):
        super().__init__()
        self.forbidden = forbidden

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name().split('::')[1].split('.')[0] not in self.forbidden, func
        return func(*args, **(kwargs or {}))


def take_steps_without_waiting(run, n):
    """Take steps that read no tensor, and in which what is captured takes no value of the CPU."""
    compute = run.compute

    def strictly(*inputs):
        with Without(READING | COPYING):
            return compute(*inputs)

    run.compute = strictly
    with Without(READING):
        for _ in range(n):
            run.take_step()


@pytest.mark.parametrize(
    'name, options',
    [
        ('glow', {}),
        ('glow', dict(bf16=True)),
        ('glow', dict(checkpoint_grads=True)),
        ('glow', dict(plain_conv1x1=True)),
        ('glow', OTHER_LAYERS),
        ('glow', GIVEN_CLASSES),
        ('bnaf', {}),
        ('bnaf', dict(residual='normal')),
        ('bnaf', dict(checkpoint_grads=True)),
    ],
)
def test_no_step_reads_a_tensor(name, options):
    run = small_training(name, **options)
    take_steps_without_waiting(run, 2)
    assert run.step == 2
    for wait, forbidden in ((run.n_skipped.item, READING), (lambda: torch.tensor(1), COPYING)):
        with pytest.raises(AssertionError), Without(forbidden):
            wait()


@pytest.mark.parametrize('checkpoint_grads', [False, True])
def test_no_step_given_conditions_reads_a_tensor(checkpoint_grads):
    run = conditional_training(checkpoint_grads=checkpoint_grads)
    take_steps_without_waiting(run, 2)
    assert run.step == 2


def test_no_step_on_an_energy_reads_a_tensor():
    config = bnaf.Config(dataset='u2', n_flows=1, hidden_dim=4, n_hidden=1)
    run = bnaf.Training(config, load_table('u2', ''), single_process(bnaf))
    take_steps_without_waiting(run, 1)
    assert run.step == 1


def plain_adam(config, parameters):
    return torch.optim.Adam(parameters, lr=config.lr)


@pytest.mark.parametrize('name', SCRIPTS)
@pytest.mark.parametrize('is_fused', [True, False])
def test_gradients_are_clipped_as_by_torch(name, is_fused, monkeypatch):
    """A large gradient is clipped, a small one is left as it is."""
    if not is_fused:
        monkeypatch.setattr(SCRIPTS[name], 'build_optimizer', plain_adam)
    first = small_training(name)
    _, norm = first.take_step()
    for clip in (norm.item() / 2, norm.item() * 2):
        run, other = (small_training(name, grad_norm_clip=clip) for _ in range(2))
        run.take_step()

        other.optimizer.step = lambda: None
        other.config.grad_norm_clip = math.inf
        other.take_step()
        torch.nn.utils.clip_grad_norm_(other.model.parameters(), clip)
        for parameter, clipped in zip(run.model.parameters(), other.model.parameters()):
            torch.testing.assert_close(parameter.grad, clipped.grad)


def test_gradients_have_the_strides_of_their_parameters():
    layer = torch.nn.Conv2d(2, 3, 1).to(memory_format=torch.channels_last)
    values = torch.randn(layer.weight.shape)
    layer.weight.grad = values.as_strided(values.shape, (2, 1, 1, 1))
    assert layer.weight.grad.stride() != layer.weight.stride()

    (gradient,) = collect_gradients(layer)
    assert gradient is layer.weight.grad and gradient.stride() == layer.weight.stride()
    assert torch.equal(gradient, values)


@pytest.mark.parametrize('name', SCRIPTS)
def test_moments_of_a_checkpoint_have_the_strides_of_their_parameters(name, tmp_path):
    """Fused Adam pairs values by their places in memory."""
    run = small_training(name)
    run.take_step()
    script = SCRIPTS[name]
    script.CHECKPOINT.save(run, tmp_path / 'checkpoint.pt')
    saved = script.load_checkpoint(tmp_path / 'checkpoint.pt')
    resumed = script.Training(saved['config'], run.data, run.process, saved)
    for parameter in resumed.model.parameters():
        state = resumed.optimizer.state[parameter]
        assert state['exp_avg'].stride() == state['exp_avg_sq'].stride() == parameter.stride()


@pytest.mark.parametrize('name', SCRIPTS)
@pytest.mark.parametrize('is_fused', [True, False])
def test_skipped_steps_are_counted(name, is_fused, monkeypatch):
    if not is_fused:
        monkeypatch.setattr(SCRIPTS[name], 'build_optimizer', plain_adam)
    run = small_training(name)
    weights = [p.detach().clone() for p in run.model.parameters()]
    counts = []
    for factor in (1.0, math.inf, math.nan, 1.0):
        parameter = next(run.model.parameters())
        hook = parameter.register_hook(lambda grad, factor=factor: grad * factor)
        run.take_step()
        hook.remove()
        counts.append((int(run.n_skipped), int(run.skips_in_a_row)))
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 0)]
    assert int(run.average.n_averaged) == 2
    assert not all(map(torch.equal, weights, run.model.parameters()))


# ------------------------------------------------------------------------------------ capturing


class FakeGraph(TorchDispatchMode):
    """A CUDA graph on a CPU: records the operations inside, undoes them, and replays them."""

    def __init__(self):
        super().__init__()
        self.tape, self.state = [], None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.tape.append((func, args, kwargs or {}, result))
        return result

    @contextlib.contextmanager
    def record(self, tensors):
        before = [tensor.clone() for tensor in tensors]
        with self:
            yield
        with torch.no_grad():
            for tensor, value in zip(tensors, before):
                tensor.copy_(value)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.tape:
            again = func(*args, **kwargs)
            flat, _ = torch.utils._pytree.tree_flatten(result)
            flat_again, _ = torch.utils._pytree.tree_flatten(again)
            for tensor, value in zip(flat, flat_again):
                if isinstance(tensor, torch.Tensor) and tensor is not value:
                    tensor.detach().copy_(value)


@pytest.fixture
def capture_on_cpu(monkeypatch):
    """Let a CPU capture steps: returns a function that makes a training capture its own."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, 'Stream', lambda: stream)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: stream)
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', FakeGraph)

    def capture(run):
        monkeypatch.setattr(torch.cuda, 'graph', lambda graph: graph.record(state_tensors(run)))
        run.compute = CapturedStep(run.compute, run.optimizer)
        return run

    return capture


@pytest.mark.parametrize(
    'name, options', [('glow', {}), ('glow', OTHER_LAYERS), ('glow', GIVEN_CLASSES), ('bnaf', {})]
)
def test_captured_steps_are_the_steps(name, options, capture_on_cpu):
    """Batches, noise and the learning rate of each step reach the graph, and nothing runs twice."""
    options = dict(options, lr=1e-2, n_epochs_warmup=3.0, grad_norm_clip=1.0, no_cuda_graph=True)
    plain = small_training(name, **options)
    captured = capture_on_cpu(small_training(name, **options))
    for step in range(N_WARMUP + 5):
        loss, norm = plain.take_step()
        loss_of_graph, norm_of_graph = captured.take_step()
        torch.testing.assert_close(loss_of_graph, loss)
        torch.testing.assert_close(norm_of_graph, norm)
        assert (captured.compute.graph is None) == (step < N_WARMUP)

    # not the weights, as Adam magnifies gradients that are zero but for rounding
    for model, expected in ((captured.model, plain.model), (captured.average, plain.average)):
        torch.testing.assert_close(densities(captured, model), densities(plain, expected))
    for tensor, expected in zip(counters(captured), counters(plain), strict=True):
        assert tensor == expected
    groups = (run.optimizer.state_dict()['param_groups'] for run in (captured, plain))
    assert next(groups) == next(groups)  # so that a checkpoint does not tell


def test_captured_steps_given_conditions(capture_on_cpu):
    plain, captured = conditional_training(), capture_on_cpu(conditional_training())
    for _ in range(N_WARMUP + 5):
        loss, _ = plain.take_step()
        loss_of_graph, _ = captured.take_step()
        torch.testing.assert_close(loss_of_graph, loss)


def test_captured_steps_turn_an_energy_on(capture_on_cpu):
    def training():
        config = bnaf.Config(dataset='u2', n_flows=1, hidden_dim=4, n_hidden=1, n_epochs=1)
        return bnaf.Training(config, load_table('u2', ''), single_process(bnaf))

    plain, captured = training(), capture_on_cpu(training())
    for _ in range(N_WARMUP + 5):
        loss, _ = plain.take_step()
        loss_of_graph, _ = captured.take_step()
        torch.testing.assert_close(loss_of_graph, loss)


def test_a_step_that_cannot_be_captured(capture_on_cpu, monkeypatch):
    run = capture_on_cpu(small_training('bnaf'))
    for _ in range(N_WARMUP):
        run.take_step()

    @contextlib.contextmanager
    def refusing_graph(graph):
        yield
        raise RuntimeError('operation not permitted when stream is capturing')

    monkeypatch.setattr(torch.cuda, 'graph', refusing_graph)
    with pytest.raises(UserError, match='add --no_cuda_graph') as caught:
        run.take_step()
    assert 'not permitted' in str(caught.value.__cause__)
    assert run.optimizer.param_groups[0]['capturable'] is False

    monkeypatch.setattr(torch.cuda, 'graph', out_of_memory)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run.take_step()


def out_of_memory(graph):
    raise torch.cuda.OutOfMemoryError


def test_what_is_captured():
    gpu = torch.device('cuda')
    weights = [torch.zeros(1, requires_grad=True)]
    fused, plain = (torch.optim.Adam(weights, fused=fused) for fused in (True, False))
    assert can_capture(glow.Process(0, 1, gpu), fused)
    groups = [{'params': weights}, {'params': [torch.zeros(1, requires_grad=True)]}]
    for other in (
        plain,
        torch.optim.SGD(weights, fused=True),
        torch.optim.Adam(groups, fused=True),
    ):
        assert not can_capture(glow.Process(0, 1, gpu), other)
    assert not can_capture(glow.Process(0, 1, CPU), fused)
    assert not can_capture(glow.Process(0, 2, gpu), fused)
    with torch.autograd.set_detect_anomaly(True):
        assert not can_capture(glow.Process(0, 1, gpu), fused)


# ------------------------------------------------------------------------- data, questions to all


def test_data_on_the_cpu_stays_where_it_is():
    values = np.arange(5)
    assert keep_on_device(values, CPU) is None
    assert to_device(values, CPU).data_ptr() == values.ctypes.data


def test_images_on_the_device_give_the_same_batches():
    run = small_training('glow')
    images = torch.from_numpy(run.data.train.images)
    arguments = run.data, run.config, 0, run.process
    for one, other in zip(glow.training_batch(*arguments), glow.training_batch(*arguments, images)):
        assert torch.equal(one, other)


@pytest.mark.parametrize('seconds, n_between', [(0.01, 20), (0.5, 4), (3, 1)])
def test_processes_ask_each_other_every_few_steps(seconds, n_between, monkeypatch):
    """Two seconds or twenty steps apart, whichever comes first."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr('common.runs.time.monotonic', lambda: clock.now)
    asked = []
    process = SimpleNamespace(
        world_size=2,
        share=lambda value: value,
        any=lambda flag: asked.append(clock.now) or bool(flag),
    )
    signals = []
    stop = StopQuestion(process, signals, max_steps=20)
    for _ in range(200):
        assert not stop.is_wanted()
        clock.now += seconds
    distances = np.diff(asked) / seconds
    np.testing.assert_allclose(distances[-5:], n_between)

    signals.append('SIGTERM')
    answers = [stop.is_wanted() for _ in range(n_between)]
    assert sum(answers) == 1


def test_a_single_process_stops_at_once():
    signals = []
    stop = StopQuestion(single_process(glow), signals, max_steps=20)
    assert not stop.is_wanted()
    signals.append('SIGINT')
    assert stop.is_wanted()
