"""What needs a GPU: captured steps, TF32, checkpoints that go from one device to another."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from contenders import as_image_data, as_table_data, random_values
from helpers import CPU, mixed_table, only
from tiny_models import with_classes

import bnaf
import glow
from common.devices import keep_on_device, to_device
from common.graphs import N_WARMUP, CapturedStep
from datasets import load_images

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
GPU = torch.device('cuda', 0)
SCRIPTS = {'glow': glow, 'bnaf': bnaf}
SHAPES = {
    'glow': dict(image_size=16, n_levels=2, depth=2, width=16, batch_size=8),
    'bnaf': dict(data_dim=6, n_flows=3, n_hidden=1, hidden_dim=8, batch_size=50),
}
GLOW_OPTIONS = [{}, dict(bf16=True), dict(checkpoint_grads=True), dict(plain_conv1x1=True)]
GLOW_OPTIONS += [dict(coupling='additive', permutation='shuffle', fixed_top=True, translate=2)]
GLOW_OPTIONS += [dict(condition=['classes'], weight_y=1.0)]
GLOW_OPTIONS += [dict(condition=['classes'], weight_y=1.0, bf16=True)]
CASES = [('glow', options) for options in GLOW_OPTIONS]
CASES += [('glow', dict(plain_conv1x1=True, depth=20))]
CASES += [('bnaf', {}), ('bnaf', dict(residual='normal')), ('bnaf', dict(checkpoint_grads=True))]


def small_training(name, device=GPU, saved=None, **options):
    """Return a training of a small model on noise."""
    script, shape = SCRIPTS[name], dict(SHAPES[name])
    values = random_values(name, shape, 8 * shape['batch_size'])
    data = as_image_data(values) if name == 'glow' else as_table_data(values, n_test=50)
    shape.pop('data_dim', None)
    if options.get('condition'):
        data = with_classes(data)
    config = script.Config(**{**shape, **options})
    return script.Training(config, data, script.Process(0, 1, device), saved)


def take_steps(run, n):
    """Return the losses and the norms of ``n`` steps, on the CPU."""
    results = []
    for _ in range(n):
        results.append(torch.stack(run.take_step()).cpu())
    return torch.stack(results)


@pytest.fixture
def float32_convolutions():
    """Without TF32, so that two ways to the same sum differ by little."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


# ------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize('name, options', CASES)
def test_captured_steps_are_the_steps(name, options, float32_convolutions):
    options = dict(options, lr=1e-3, n_epochs_warmup=1.0)
    plain = small_training(name, no_cuda_graph=True, **options)
    captured = small_training(name, **options)
    assert isinstance(captured.compute, CapturedStep)
    n_steps = N_WARMUP + 10
    tolerance = dict(rtol=2e-2, atol=2e-2) if options.get('bf16') else dict(rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        take_steps(captured, n_steps), take_steps(plain, n_steps), **tolerance
    )
    assert captured.compute.graph is not None

    averages = zip(captured.average.module.parameters(), plain.average.module.parameters())
    for average, expected in averages:
        torch.testing.assert_close(average, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('name, options', CASES)
@pytest.mark.parametrize('no_cuda_graph', [True, False])
def test_steps_never_wait_for_the_gpu(name, options, no_cuda_graph):
    run = small_training(name, no_cuda_graph=no_cuda_graph, **options)
    take_steps(run, N_WARMUP + 1)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(3):
            loss, _ = run.take_step()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert loss.isfinite()


def test_compiled_steps_are_captured(float32_convolutions):
    plain = small_training('glow', no_cuda_graph=True)
    compiled = small_training('glow', compile=True)
    results = take_steps(compiled, N_WARMUP + 5), take_steps(plain, N_WARMUP + 5)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('name', SCRIPTS)
def test_skipped_steps_inside_a_graph(name):
    """A learning rate that ruins the weights: all later steps are skipped, and counted."""
    run = small_training(name)
    take_steps(run, N_WARMUP + 2)
    with torch.no_grad():
        next(run.model.parameters()).fill_(torch.nan)
    before = [value.clone() for value in run.average.module.parameters()]
    take_steps(run, 4)
    assert int(run.n_skipped) == int(run.skips_in_a_row) == 4
    assert all(map(torch.equal, before, run.average.module.parameters()))


def test_the_cpu_and_the_gpu_take_the_same_steps(float32_convolutions):
    for name in SCRIPTS:
        results = []
        for device in (CPU, GPU):
            run = small_training(name, device)
            run.objective.eval()  # without TF32
            if name == 'glow':
                u = torch.full((8, 3, 16, 16), 0.5)
                x = torch.from_numpy(run.data.train.images[:8])
                batch = x, u
            else:
                batch = torch.from_numpy(run.data.train[:50]), torch.tensor(1.0)
            loss = run.objective(*(value.to(device) for value in batch))
            loss.backward()
            gradients = [p.grad.cpu() for p in run.model.parameters()]
            results.append([loss.detach().cpu(), *gradients])
        for on_cpu, on_gpu in zip(*results):
            torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------- from device to device


@pytest.mark.parametrize('name', SCRIPTS)
@pytest.mark.parametrize('first, second', [('cuda', 'cpu'), ('cpu', 'cuda')])
def test_checkpoints_go_from_device_to_device(name, first, second, tmp_path, capsys):
    script = SCRIPTS[name]
    words = ['--train', '--n_epochs=1', f'--output_dir={tmp_path}']
    words += {'glow': ['--dataset=digits', '--depth=1', '--width=8'], 'bnaf': []}[name]
    script.main([*words, f'--device={first}'])
    checkpoint = only(tmp_path.rglob('checkpoint.pt'))
    saved = script.load_checkpoint(checkpoint)
    group = saved['optimizer']['param_groups'][0]
    assert isinstance(group['lr'], float) and group['capturable'] is False

    script.main(['--train', f'--restore_file={checkpoint}', '--n_epochs=2', f'--device={second}'])
    assert script.load_checkpoint(checkpoint)['step'] == 2 * saved['step']


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_resumed_training_goes_on(name, tmp_path, float32_convolutions):
    """Captured again after a restart, steps go on as those of a training that was not stopped."""
    script = SCRIPTS[name]
    whole = small_training(name)
    take_steps(whole, 6)
    script.CHECKPOINT.save(whole, tmp_path / 'checkpoint.pt')
    expected = take_steps(whole, 6)
    saved = script.load_checkpoint(tmp_path / 'checkpoint.pt')
    for options in ({}, dict(no_cuda_graph=True)):
        resumed = small_training(name, saved=copy.deepcopy(saved), **options)
        assert resumed.step == 6
        torch.testing.assert_close(take_steps(resumed, 6), expected, rtol=1e-3, atol=1e-3)


# -------------------------------------------------------------------------------------- the rest


def test_data_sets_on_the_gpu(monkeypatch):
    values = np.arange(1000)
    assert keep_on_device(values, GPU).is_cuda
    assert torch.equal(to_device(values, GPU).cpu(), torch.from_numpy(values))
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (values.nbytes, 0))
    assert keep_on_device(values, GPU) is None


def test_round_trips_of_glow(tmp_path, capsys):
    words = ['--dataset=digits', '--depth=8', '--width=64', '--n_epochs=3']
    glow.main(['--train', *words, f'--output_dir={tmp_path}'])
    best = only(tmp_path.rglob('best.pt'))
    for is_allowed in (False, True):
        torch.backends.cudnn.allow_tf32 = is_allowed
        torch.backends.cuda.matmul.allow_tf32 = is_allowed
        capsys.readouterr()
        glow.main(['--check', f'--restore_file={best}'])
        text = capsys.readouterr().out
        assert float(text.split('within ')[1].split()[0]) < 0.05, text
    torch.backends.cuda.matmul.allow_tf32 = False


def test_round_trips_of_bnaf():
    model = bnaf.BNAF(data_dim=6, n_flows=3, hidden_dim=8).to(GPU)
    x = torch.randn(1000, 6, device=GPU)
    z, _ = model(x)
    again, logdet = model.inverse(z)
    found = again.isfinite().all(1)
    assert found.float().mean() > 0.9
    assert (again - x)[found].abs().max() < 1e-3 and logdet[found].isfinite().all()


@pytest.mark.parametrize(
    'name, words',
    [
        ('glow', ['--dataset=digits', '--depth=1', '--width=8', '--bf16']),
        ('glow', ['--dataset=digits', '--depth=1', '--width=8', '--condition=classes']),
        ('bnaf', []),
    ],
)
def test_all_modes(name, words, tmp_path, capsys):
    script = SCRIPTS[name]
    script.main(['--train', *words, '--n_epochs=1', f'--output_dir={tmp_path}'])
    best = only(tmp_path.rglob('best.pt'))
    for mode in ('--evaluate', '--generate', '--visualize', '--check'):
        script.main([mode, f'--restore_file={best}'])
    results = json.loads(best.with_name('results.json').read_text())
    assert all(np.isfinite(value) for value in results.values() if isinstance(value, float))


def test_images_are_kept_on_the_gpu(tmp_path):
    config = glow.Config(dataset='digits', image_size=8, n_levels=1, depth=1, width=8)
    run = glow.Training(config, load_images('digits'), glow.Process(0, 1, GPU))
    assert run.images.is_cuda and run.images.dtype == torch.uint8


def test_the_estimator(tmp_path):
    """Fitted on a GPU, it scores and samples as on a CPU, where its pickle and its file go."""
    table = mixed_table(300)
    options = dict(n_flows=2, hidden_dim=4, n_epochs=3, batch_size=50, condition=['city', 'old'])
    model = bnaf.BNAFDensity(drop=['index'], device='cuda', **options).fit(table)
    assert next(model.model_.parameters()).is_cuda
    scores = model.score_samples(table)

    model.save(tmp_path / 'model.pt')
    given = {'city': 'Rome', 'old': 1}
    samples = model.sample(5, given, random_state=0)
    for copy_on_cpu in (
        pickle.loads(pickle.dumps(model)),
        bnaf.BNAFDensity.load(tmp_path / 'model.pt', device='cpu'),
    ):
        assert not next(copy_on_cpu.model_.parameters()).is_cuda
        np.testing.assert_allclose(copy_on_cpu.score_samples(table), scores, atol=1e-8)
        own = copy_on_cpu.sample(5, given, random_state=0)
        np.testing.assert_allclose(own[['x', 'y']], samples[['x', 'y']], atol=1e-6)
