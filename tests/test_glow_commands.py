"""glow.py as a user types it: every mode, several processes, stopping and resuming, bad input."""

import copy
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import (
    CPU,
    joined_group,
    only,
    refusal_line,
    run_command,
    single_process,
    train_until,
)
from PIL import Image
from tiny_data import (
    attribute_rows,
    noise_image,
    write_celeba,
    write_cifar,
    write_folder,
    write_mnist,
    write_table,
)
from tiny_models import CELL, TINY, digits_config, training_words

import glow
from common.averages import MovingAverage
from common.batches import Stream, seed_sequence, seeded_generator
from common.errors import UserError
from common.files import make_new_folder
from common.options import resolve_config
from common.tensors import load_tensors, save_tensors
from datasets import (
    IMAGE_DATASETS,
    load_images,
    load_photo,
    load_run_images,
    shift_randomly,
)
from datasets.image_data import random_split

SCRIPT = Path(glow.__file__)


# -------------------------------------------------------------------------------- modes as commands


@pytest.mark.slow
def test_the_four_lines(tmp_path, monkeypatch):
    """On drawn faces in an empty folder, with a small model and small images."""
    small = ['--image_size=16', '--n_levels=1', *TINY, '--batch_size=256']
    launcher = ['-m', 'torch.distributed.launch']
    out, _ = run_command(*launcher, SCRIPT, '--train', *small, cwd=tmp_path)
    assert ' parameters, step 0 of at most 40\n' in out
    assert 'faces test: ' in out and 'best.pt' in out
    run = only((tmp_path / 'results').iterdir())
    names = {path.name for path in run.iterdir()}
    assert {'checkpoint.pt', 'best.pt', 'results.json'} <= names
    assert list(run.glob('events.out.tfevents.*')) and list(run.glob('samples_at_step_*.png'))
    result = json.loads((run / 'results.json').read_text())

    out, _ = run_command(SCRIPT, '--evaluate', cwd=tmp_path)
    assert 'restored results/' in out and 'step 40' in out
    assert json.loads((run / 'results.json').read_text()) == result
    assert f'{result["bits_per_dim"]:.4f}' in out and result['n_images'] == 1000

    monkeypatch.chdir(tmp_path)  # and the others in this process, which starts nothing
    glow.main(['--generate', '--z_std=0.7'])
    picture = Image.open(run / 'generated_samples_at_z_std_0.7.png')
    assert picture.size == (8 + 8 * CELL, 8 + 4 * CELL)  # 32 samples, 8 per row

    glow.main(['--visualize', '--vis_attrs=8,20'])
    assert (run / 'manipulated_sample_attr_8,20.png').exists()


@pytest.mark.slow
@pytest.mark.parametrize('module', ['torch.distributed.launch', 'torch.distributed.run'])
def test_two_processes(module, tmp_path):
    where = dict(cwd=tmp_path, CUDA_VISIBLE_DEVICES='')  # two processes need two GPUs or none
    words = ['--train', '--distributed', '--dataset=digits', *TINY, '--batch_size=64']
    run_command('-m', module, '--nproc_per_node=2', SCRIPT, *words, **where)
    run = only((tmp_path / 'results').iterdir())
    assert glow.load_checkpoint(run / 'best.pt')['step'] == math.ceil(1439 / 128)
    with_two = json.loads((run / 'results.json').read_text())

    run_command(SCRIPT, '--evaluate', '--batch_size=7', **where)
    with_one = json.loads((run / 'results.json').read_text())
    expected = dict(with_two)
    for key in ('bits_per_dim', 'two_standard_errors'):
        expected[key] = pytest.approx(with_two[key], rel=1e-6)
    assert with_one == expected


def test_old_spelling_of_local_rank(trained_glow):
    for word in ('--local_rank=0', '--local-rank=0', '--local_rank 0'):
        glow.main([*word.split(), '--evaluate', f'--restore_file={trained_glow}'])


def save_first_gradients(rank, world_size, folder, options):
    """Save what ``first_gradients`` returns on one process of a group."""
    torch.manual_seed(1000 + rank)  # nothing may depend on it
    with joined_group(rank, world_size, folder):
        weights_and_gradients = first_gradients(rank, world_size, options)
    torch.save(weights_and_gradients, f'{folder}/{rank}_of_{world_size}.pt')


def first_gradients(rank, world_size, options):
    """Return the initial weights, and the gradients of the first step on this process's share of
    one joint batch."""
    config = digits_config(depth=2, width=8, **options)
    data = load_run_images(config, None)
    run = glow.Training(config, data, glow.Process(rank, world_size, CPU))
    weights = copy.deepcopy(run.model.state_dict())

    share = slice(rank * 32 // world_size, (rank + 1) * 32 // world_size)
    x = torch.from_numpy(data.train.images[:32])
    u = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    given = []
    if data.train.conditions is not None:
        given = [torch.from_numpy(data.train.conditions[:32][share])]
    run.objective(x[share], u[share], *given).backward()
    gradients = {key: value.grad for key, value in run.model.named_parameters()}
    return weights, gradients


@pytest.mark.slow
@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(condition=['classes'], fixed_top=True, permutation='shuffle'),
        dict(condition=['classes'], weight_y=0.0, coupling='additive'),
    ],
    ids=['plain', 'classes', 'classes without head'],
)
def test_two_processes_have_the_gradients_of_one(options, tmp_path):
    save_first_gradients(0, 1, tmp_path, options)
    torch.multiprocessing.spawn(save_first_gradients, (2, tmp_path, options), nprocs=2)
    weights, gradients = torch.load(tmp_path / '0_of_1.pt')
    for rank in (0, 1):
        weights_here, gradients_here = torch.load(tmp_path / f'{rank}_of_2.pt')
        for key, value in weights.items():
            assert torch.equal(value, weights_here[key]), key
        for key, value in gradients.items():
            if value is not None:
                torch.testing.assert_close(gradients_here[key], value, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------- stopping and resuming


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)  # bit for bit on a CPU only
    glow.main(training_words(tmp_path / 'whole', '--n_epochs=2'))
    train_until(glow, 14, training_words(tmp_path / 'stopped', '--n_epochs=2'))
    stopped = only(tmp_path.glob('stopped/*/checkpoint.pt'))
    assert glow.load_checkpoint(stopped)['step'] == 14  # within the second epoch
    glow.main(['--train', f'--restore_file={stopped}'])

    whole = torch.load(only(tmp_path.glob('whole/*/checkpoint.pt')))
    resumed = torch.load(stopped)
    assert whole['step'] == resumed['step'] == 23
    for name in ('model', 'average'):
        for key, value in whole[name].items():
            assert torch.equal(value, resumed[name][key]), key
    resumed_state = resumed['optimizer']['state']
    for i, state in whole['optimizer']['state'].items():
        for key, value in state.items():
            assert torch.equal(value, resumed_state[i][key]), (i, key)
    assert whole['validation_loss'] == resumed['validation_loss']
    assert whole['best'] == resumed['best']


def test_what_follows_from_the_images_seen_on_four_processes(tmp_path, monkeypatch):
    train_until(glow, 15, training_words(tmp_path, '--n_epochs=4'))
    saved = glow.load_checkpoint(only(tmp_path.rglob('checkpoint.pt')))
    data = load_images('digits')
    monkeypatch.setattr(glow, 'wrap_ddp', lambda objective, *args, **values: objective)

    for world_size in (1, 4):
        process = glow.Process(0, world_size, CPU)
        run = glow.Training(saved['config'], data, process, copy.deepcopy(saved))
        assert run.n_seen == 15 * 128 and run.n_to_see == 4 * 1439
        assert run.n_per_step == 128 * world_size
        assert run.n_per_validation == 1439 * math.ceil(glow.VALIDATE_STEPS * 128 / 1439)

        # a step replaces four, in the average too
        run.average.n_averaged.fill_(10**6)
        before = [value.clone() for value in run.average.module.parameters()]
        run.take_step()
        decay = saved['config'].ema_decay ** world_size
        parameters = zip(run.average.module.parameters(), before, run.model.parameters())
        for average, old, new in parameters:
            expected = decay * old + (1 - decay) * new
            torch.testing.assert_close(average, expected, rtol=1e-4, atol=1e-6)
        assert run.n_seen == 15 * 128 + 128 * world_size


def test_fewer_epochs_than_were_trained(tmp_path, capsys):
    glow.main(training_words(tmp_path, '--n_epochs=3'))
    checkpoint = only(tmp_path.rglob('checkpoint.pt'))
    glow.main(['--train', f'--restore_file={checkpoint}', '--n_epochs=1'])
    assert 'step 34 of at most 34' in capsys.readouterr().out


def test_the_average_soon_forgets_the_first_weights():
    model = torch.nn.Linear(1, 1)
    average = MovingAverage(model, decay=0.999)
    torch.nn.init.zeros_(model.weight)
    average.update(torch.tensor(False))
    assert average.module.weight == 0  # the first update copies

    torch.nn.init.ones_(model.weight)
    shares = []
    for _ in range(100):
        average.update(torch.tensor(False))
        shares.append(1 - average.module.weight.item())
    assert shares[0] == pytest.approx(2 / 11) and shares[-1] < 1e-6


def test_a_later_state_is_not_overwritten(trained_glow, tmp_path, capsys):
    """Training resumes from best.pt only in a folder of its own, or where it is the last state, and
    a best.pt is left there."""
    saved = torch.load(trained_glow)
    torch.save({**saved, 'step': saved['step'] + 7}, tmp_path / 'checkpoint.pt')
    torch.save({**saved, 'best': 0.0}, tmp_path / 'best.pt')
    words = ['--train', f'--restore_file={tmp_path}/best.pt', '--n_epochs=2']
    assert f'{tmp_path}/checkpoint.pt is at a later step' in refusal_line(glow, capsys, *words)

    (tmp_path / 'own').mkdir()
    (tmp_path / 'best.pt').rename(tmp_path / 'own' / 'start.pt')
    glow.main(['--train', f'--restore_file={tmp_path}/own/start.pt', '--n_epochs=2'])
    assert glow.load_checkpoint(tmp_path / 'own' / 'best.pt')['step'] == 23


def test_runs_that_start_together_get_folders_of_their_own(tmp_path):
    folders = [make_new_folder(tmp_path / 'results' / 'run') for _ in range(3)]
    assert [folder.name for folder in folders] == ['run', 'run-2', 'run-3']
    assert all(folder.is_dir() for folder in folders)


def test_a_signal_at_the_last_validation_ends_the_program(tmp_path, monkeypatch, capsys):
    validate = glow.Training.validate

    def validate_and_signal(run, folder):
        validate(run, folder)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(glow.Training, 'validate', validate_and_signal)
    glow.main(training_words(tmp_path))
    assert 'stopped after step 12 by SIGTERM; to go on' in capsys.readouterr().out
    assert not list(tmp_path.rglob('results.json'))
    glow.main(training_words(tmp_path, '--resume'))
    assert only(tmp_path.rglob('results.json'))  # only the evaluation was left to do


def test_an_error_common_to_all_is_printed_once_and_that_of_one_process_by_it(monkeypatch, capsys):
    monkeypatch.setenv('LOCAL_RANK', '1')
    common, own = UserError('no data'), OSError('no space left')
    for error, printed in ((common, ''), (own, 'glow.py: error: no space left\n')):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr(glow, 'run_mode', fail)
        with pytest.raises(SystemExit, match='2'):
            glow.main(['--train'])
        assert capsys.readouterr().err == printed


# ----------------------------------------------------------------------------------------- training


def test_more_processes_than_images(trained_glow, monkeypatch):
    model = glow.restore_model(glow.load_checkpoint(trained_glow), CPU)
    test = load_images('digits').test
    first = replace(test, images=test.images[:1], attributes=test.attributes[:1])
    monkeypatch.setattr(dist, 'all_reduce', lambda sums: None)
    fourth_of_eight = glow.Process(3, 8, CPU)
    mean, error = glow.bits_per_dim(model, first, 64, 10, fourth_of_eight)
    assert mean == error == 0  # this process's share of the sum


@pytest.mark.slow
@pytest.mark.parametrize('precision', [(), ('--bf16',)])
def test_training_learns_and_the_average_can_be_turned_off(precision, tmp_path):
    words = ['--depth=2', '--width=16', '--n_epochs=6', '--batch_size=64', '--lr=0.01']
    glow.main(training_words(tmp_path, *words, '--ema_decay=0', *precision))
    saved = glow.load_checkpoint(only(tmp_path.glob('*/best.pt')))
    for key, value in saved['model'].items():
        assert torch.equal(value, saved['average'][f'module.{key}']), key
    assert saved['validation_loss'] < 3  # guessing needs four bits per value


@pytest.mark.slow
def test_compiled_steps_have_the_same_gradients(monkeypatch):
    """Traced as for the compiler but executed by torch: real compilation takes minutes."""
    compile_module, data, gradients = torch.nn.Module.compile, load_images('digits'), []

    def compile_without_code(module, **options):
        return compile_module(module, backend='aot_eager', **options)

    monkeypatch.setattr(torch.nn.Module, 'compile', compile_without_code)
    for is_compiled in (False, True):
        config = digits_config(depth=2, width=8, compile=is_compiled)
        run = glow.Training(config, data, single_process(glow))
        compiled = [module._compiled_call_impl is not None for module in run.model.modules()]
        assert any(compiled) == is_compiled
        batch = glow.training_batch(data, run.config, 0, single_process(glow))
        run.objective(*batch).backward()
        gradients.append({name: p.grad for name, p in run.model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_compiling_without_a_compiler(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    words = ['--train', '--dataset=digits', '--compile', f'--output_dir={tmp_path}']
    assert 'install g++' in refusal_line(glow, capsys, *words)


def test_learning_rate():
    config = glow.Config(lr=1.0, lr_decay=0.25, n_epochs=10, n_epochs_warmup=0.5)
    rates = [glow.learning_rate(config, 7 * step, 7, n_per_epoch=140) for step in range(200)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert set(rates[10:150]) == {1.0}
    assert rates[150:] == pytest.approx(np.arange(50, 0, -1) / 50)


def test_every_image_of_an_epoch_is_seen_once_on_changing_numbers_of_processes():
    data = load_images('digits')
    config = glow.Config(dataset='digits', batch_size=10)
    numbered = replace(data, train=replace(data.train, images=np.arange(1439)[:, None, None, None]))
    batches, n_seen = [], 0
    while n_seen < 3 * 1439:
        world_size = 1 + n_seen // 700 % 4
        for rank in range(world_size):
            process = glow.Process(rank, world_size, CPU)
            x, _ = glow.training_batch(numbered, config, n_seen, process)
            batches.append(x.flatten())
        n_seen += 10 * world_size

    seen = torch.cat(batches)
    epochs = [seen[k * 1439 : (k + 1) * 1439] for k in range(3)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(1439))
    assert not torch.equal(epochs[0], epochs[1])


def test_only_images_of_mnist_are_shifted_unless_told_otherwise():
    def translation(**options):
        return resolve_config(glow.Config, options, glow.DEFAULTS, None, ()).translate

    shifts = {name: translation(dataset=name) for name in IMAGE_DATASETS}
    assert shifts == {**dict.fromkeys(IMAGE_DATASETS, 0), 'mnist': 1}
    assert translation(dataset='mnist', translate=0) == 0
    assert translation(dataset='digits', translate=3) == 3


def test_training_images_are_shifted_anew_in_each_step():
    data, process = load_images('digits'), single_process(glow)
    plain, config = digits_config(batch_size=1439), digits_config(batch_size=1439, translate=2)
    for n_seen in (0, 1439):
        x, u = glow.training_batch(data, config, n_seen, process)
        whole, _ = glow.training_batch(data, plain, n_seen, process)
        generator = seeded_generator(CPU, Stream.TRAINING, config.seed, n_seen, 0)
        assert torch.equal(x, shift_randomly(whole, 2, generator))
        assert torch.equal(u, torch.rand(x.shape, generator=generator))
    assert not torch.equal(x, whole)


def test_streams_of_random_numbers_differ():
    """NumPy pads keys with zeros, and takes these for the same."""
    keys = [(7,), (7, 0), (7, 0, 0), (7,), (7, 0)]
    sequences = [seed_sequence(stream, *key) for stream, key in zip(Stream, keys, strict=True)]
    assert len({int(sequence.generate_state(1)[0]) for sequence in sequences}) == len(keys)


def test_divergence_stops_with_one_line_and_is_never_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(glow, 'LOG_STEPS', 2)
    words = ['--lr=1e6', '--n_epochs_warmup=0', '--max_skips=2']
    line = refusal_line(glow, capsys, *training_words(tmp_path, *words))
    assert 'at step 4, learning rate 1e+06' in line  # looked at every two steps
    assert 'not finite (3 steps skipped in a row); start again with a lower --lr' in line
    checkpoint = only(tmp_path.rglob('*.pt'))
    assert glow.load_checkpoint(checkpoint)['step'] == 0  # as good as new
    assert str(checkpoint) in line


def test_a_validation_that_is_not_finite_stops_with_one_line(tmp_path, monkeypatch, capsys):
    score = torch.full((180,), math.nan)
    monkeypatch.setattr(glow, 'score_split', lambda *args: {'bits_per_dim': score})
    line = refusal_line(glow, capsys, *training_words(tmp_path))
    assert 'diverged: at step 12' in line
    assert 'not finite (0 steps skipped' in line and 'lower --lr' in line
    assert glow.load_checkpoint(only(tmp_path.rglob('*.pt')))['step'] == 0


def test_a_model_that_cannot_be_sampled_is_trained_all_the_same(tmp_path, monkeypatch, capsys):
    singular = torch.zeros(2, 2)
    monkeypatch.setattr(glow, 'sample_grid', lambda *args: torch.linalg.inv(singular))
    glow.main(training_words(tmp_path))
    assert 'no picture: linalg.inv' in capsys.readouterr().out
    assert only(tmp_path.rglob('results.json'))


def test_steps_without_finite_gradients_are_skipped(monkeypatch):
    """A batch of NaNs changes nothing, the next one does, and Adam does not count it as a step."""
    data = load_images('digits')
    config = glow.Config(dataset='digits', image_size=8, n_levels=1, depth=1, width=8)
    run = glow.Training(config, data, single_process(glow))
    training_batch = glow.training_batch

    def batch_with_nans_at_step_2(*args):
        x, u = training_batch(*args)
        return x, u * math.nan if run.step == 2 else u

    monkeypatch.setattr(glow, 'training_batch', batch_with_nans_at_step_2)
    states = []
    for _ in range(4):
        run.take_step()
        weights, average = run.model.state_dict(), run.average.state_dict()
        values = [*weights.values(), *average.values()]
        states.append([value.clone() for value in values])
    assert all(map(torch.equal, states[1], states[2]))
    assert not all(map(torch.equal, states[2], states[3]))
    assert run.step == 4 and run.n_skipped == 1 and run.skips_in_a_row == 0
    assert next(iter(run.optimizer.state.values()))['step'] == 3


# ------------------------------------------------------------------------ evaluating and generating


def test_generate(trained_glow):
    glow.main(['--generate', f'--restore_file={trained_glow}'])
    picture = Image.open(trained_glow.with_name('generated_samples_at_z_std_range.png'))
    assert picture.height == 8 + 8 * CELL and picture.width > 8 + 4 * CELL

    glow.main(['--generate', f'--restore_file={trained_glow}', '--z_std=0', '--n_samples=3'])
    file = trained_glow.with_name('generated_samples_at_z_std_0.png')
    picture = np.asarray(Image.open(file))
    first, second, third = (picture[8:CELL, 8 + CELL * i : CELL * (i + 1)] for i in range(3))
    assert (first == second).all() and (first == third).all()  # temperature 0 leaves no noise


def test_bf16_after_training_only_when_asked_for(trained_glow):
    scores = []
    for words in ([], ['--bf16'], []):
        glow.main(['--evaluate', f'--restore_file={trained_glow}', *words])
        result = json.loads(trained_glow.with_name('results.json').read_text())
        scores.append(result['bits_per_dim'])
    before, in_bf16, after = scores
    assert before == after
    assert in_bf16 != before
    assert in_bf16 == pytest.approx(before, abs=0.02)


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=NEEDS_GPU)])
def test_tf32_changes_nothing_after_training(device, trained_glow, request, capsys):
    if device == 'cpu':
        request.getfixturevalue('convolutions_of_a_gpu')
    before = torch.backends.cudnn.allow_tf32
    try:
        results = []
        for is_allowed in (False, True):
            torch.backends.cudnn.allow_tf32 = is_allowed
            torch.backends.cuda.matmul.allow_tf32 = is_allowed
            results.append(results_of_a_model(trained_glow, torch.device(device)))
            results[-1].append(capsys.readouterr().out)
    finally:
        torch.backends.cudnn.allow_tf32 = before
        torch.backends.cuda.matmul.allow_tf32 = False
    for in_float32, where_allowed in zip(*results):
        assert np.array_equal(in_float32, where_allowed)


def results_of_a_model(path, device):
    """Return a score, samples, latents and edits of a model, and print the error of its inverse."""
    saved, data = glow.load_checkpoint(path), load_images('digits')
    model = glow.restore_model(saved, device)
    split = replace(data.test, images=data.test.images[:100])
    process = glow.Process(rank=0, world_size=1, device=device)
    score = glow.bits_per_dim(model, split, 64, 50, process)
    samples = model.sample(8, 0.7, torch.Generator().manual_seed(0)).cpu()
    z = glow.encode(model, split.images, device)
    x, _ = model.inverse(1.5 * z)
    glow.check(model, data, saved['config'], device)
    return [score, samples, z.cpu(), x.detach().cpu(), glow.decode(model, 1.5 * z)]


def test_test_images_are_never_shifted(trained_glow, tmp_path):
    saved, results = load_tensors(trained_glow), []
    for translate in (0, 3):
        config = {**saved['config'], 'translate': translate}
        save_tensors(tmp_path / 'best.pt', {**saved, 'config': config})
        glow.main(['--evaluate', f'--restore_file={tmp_path}/best.pt'])
        results.append(json.loads((tmp_path / 'results.json').read_text()))
    assert results[0] == results[1]


def test_directions_are_kept_apart_by_precision(trained_glow, tmp_path):
    """Also of a model that was trained in bf16, which is used in float32 unless asked otherwise."""
    saved = torch.load(trained_glow)
    saved['config']['bf16'] = True
    torch.save(saved, tmp_path / 'best.pt')
    words = ['--visualize', f'--restore_file={tmp_path}/best.pt', '--vis_attrs=3']
    n_files = []
    for precision in ([], ['--bf16'], []):
        glow.main([*words, *precision])
        n_files.append(len(list(tmp_path.glob('attribute_directions_*.pt'))))
    assert n_files == [1, 2, 2]


def test_samples_are_sorted_by_log_probability(trained_glow):
    model = glow.restore_model(glow.load_checkpoint(trained_glow), CPU)
    (samples,) = glow.sample_grid(model, [0.7], 16, 0, 'cpu')
    images = torch.from_numpy(samples)
    with torch.no_grad():
        log_p = model.log_prob(images, torch.full(images.shape, 0.5))
    assert log_p[:4].mean() > log_p[-4:].mean()


@pytest.mark.parametrize(
    'words, n, n_rows',
    [(['--z_std=0.7'], 5, 1), ([], 8, 8), (['--z_std=0.7', '--n_samples=9'], 9, 2)],
)
def test_few_samples_are_drawn_where_they_take_much_memory(
    words, n, n_rows, trained_glow, monkeypatch, tmp_path
):
    """As many as ``--n_samples`` says, or else at least one at each temperature."""
    grids = []
    monkeypatch.setattr(glow, 'save_grid', lambda path, rows, *labels: grids.append(rows))
    model = glow.restore_model(glow.load_checkpoint(trained_glow), CPU)
    memory = 64 * model.memory_per_image + 5 * 16 * 64
    monkeypatch.setattr(glow, 'memory_limit', lambda path: memory)
    glow.main(['--generate', f'--restore_file={trained_glow}', f'--output={tmp_path}', *words])
    assert len(grids[0]) == n_rows
    assert sum(map(len, grids[0])) == n


def test_a_batch_that_is_too_large_is_scored_in_parts(trained_glow, monkeypatch, tmp_path):
    """A checkpoint says how many images are scored at once, but not how much memory they take."""
    saved = torch.load(trained_glow)
    saved['config']['batch_size'] = 2**20
    torch.save(saved, tmp_path / 'best.pt')
    n_images = set()
    log_prob_and_last = glow.Glow.log_prob_and_last

    def record(model, x, u, y):
        n_images.add(len(x))
        return log_prob_and_last(model, x, u, y)

    monkeypatch.setattr(glow.Glow, 'log_prob_and_last', record)
    monkeypatch.setattr(glow.Glow, 'n_at_once', 50)
    glow.main(['--evaluate', f'--restore_file={tmp_path}/best.pt'])
    assert max(n_images) == 50


def test_bits_per_dim_of_mnist_counts_784_values(trained_glow):
    model = glow.restore_model(glow.load_checkpoint(trained_glow), CPU)
    test, process = load_images('digits').test, single_process(glow)
    by_64, _ = glow.bits_per_dim(model, test, 64, 50, process)
    by_32, _ = glow.bits_per_dim(model, test, 32, 11, process)
    assert by_32 == pytest.approx(2 * by_64, rel=1e-6)


# --------------------------------------------------------------------------------------- attributes


def test_visualize_leaves_the_image_unchanged_in_the_middle(trained_glow):
    words = ['--vis_attrs', '3', '8', '--vis_alphas', '-1 0,1']
    glow.main(['--visualize', f'--restore_file={trained_glow}', *words])
    file = trained_glow.with_name('manipulated_sample_attr_3,8.png')
    picture = np.asarray(Image.open(file))
    height, width = picture.shape[:2]
    left, top = width - 3 * CELL, height - 2 * CELL
    image = np.kron(load_images('digits').test.images[0, 0], np.ones((16, 16), np.uint8))
    for row in (0, 1):
        shifted = picture[top + CELL * row :]
        cells = [shifted[:128, left + CELL * i :][:, :128, 0] for i in range(3)]
        assert (cells[1] == image).all()
        assert (cells[0] != image).any()
        assert (cells[2] != image).any()


def test_visualize_every_attribute_and_a_photo(trained_glow, tmp_path):
    photo = tmp_path / 'my photo.tiff'
    Image.new('CMYK', (31, 57), (10, 80, 30, 0)).save(photo)
    restore = f'--restore_file={trained_glow}'
    glow.main(['--visualize', restore, '--vis_attrs=3', f'--vis_img={photo}'])
    assert trained_glow.with_name('manipulated_img_my photo_attr_3.png').exists()

    glow.main(['--visualize', restore])
    picture = Image.open(trained_glow.with_name('manipulated_sample_attr_all.png'))
    assert picture.height == 34 + 10 * CELL


def test_attribute_directions_are_differences_of_means(trained_glow):
    saved = glow.load_checkpoint(trained_glow)
    model, data = glow.restore_model(saved, CPU), load_images('digits')
    dz = glow.attribute_directions(model, data, trained_glow.parent, saved['config'], CPU)

    z = glow.encode(model, data.train.images, CPU).double()
    has = torch.from_numpy(data.train.attributes[:, 5])
    difference = z[has].mean(0) - z[~has].mean(0)
    expected = 1.6 * difference
    torch.testing.assert_close(dz[5].double(), expected, rtol=1e-3, atol=1e-4)


def test_attributes_that_never_differ_cannot_be_visualized():
    data = load_images('digits')
    attributes = np.ones_like(data.train.attributes)
    alike = replace(data, train=replace(data.train, attributes=attributes))
    for texts in (None, ['3']):
        with pytest.raises(UserError, match='the images of digits have no attributes that differ'):
            alike.differing(texts, 100, 'digits')
    assert data.differing(None, 100, 'digits') == list(range(10))


def test_edits_need_attributes_that_differ(tmp_path, capsys):
    photos = tmp_path / 'photos'
    write_folder(photos)
    data, output = f'--data_dir={photos}', f'--output_dir={tmp_path}/out'
    small = ['--image_size=16', '--n_levels=1', *TINY]
    glow.main(['--train', '--dataset=folder', *small, data, output])
    for word in ('--vis_attrs=0', '--vis_alphas=1'):
        assert 'no attributes' in refusal_line(glow, capsys, '--visualize', word, output)

    write_table(photos, attribute_rows())
    glow.main(['--visualize', data, output])
    line = refusal_line(glow, capsys, '--visualize', '--vis_attrs=Big', output)
    assert 'the same in all training images' in line
    assert only(tmp_path.glob('out/*/manipulated_sample_attr_all.png'))


# ------------------------------------------------------------------------- changed and moved images

TINY_PHOTOS = ['--image_size=16', '--n_levels=1', '--depth=1', '--width=8', '--batch_size=8']


@pytest.fixture
def photo_run(tmp_path):
    """The last checkpoint of a tiny model of a folder without attributes, which lies beside it."""
    write_folder(tmp_path / 'photos')
    data, output = f'--data_dir={tmp_path}/photos', f'--output_dir={tmp_path}/out'
    glow.main(['--train', '--dataset=folder', *TINY_PHOTOS, '--n_epochs=1', data, output])
    return only(tmp_path.glob('out/*/checkpoint.pt'))


def watch(monkeypatch, name):
    """Return a list that gets the data with which a function of glow.py is called from now on."""
    seen, function = [], getattr(glow, name)

    def watched(*args):
        seen.extend(arg for arg in args if isinstance(arg, glow.ImageData))
        return function(*args)

    monkeypatch.setattr(glow, name, watched)
    return seen


def add_photos(folder, n=10):
    """Add n images to the folder of ``photo_run``, change one and remove one."""
    for i in range(n):
        noise_image(24, 20, 100 + i).save(folder / f'{i}.png')
    noise_image(30, 30, 200).save(folder / 'a' / '00.png')
    (folder / 'b' / '01.png').unlink()


def note_lines(capsys):
    """Return the notes about the images that were printed."""
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith('note: ') and 'steps' not in line]


def test_nothing_that_was_trained_on_is_tested_after_images_are_added(
    photo_run, tmp_path, monkeypatch, capsys
):
    saved = glow.load_checkpoint(photo_run)
    trained_on = load_run_images(saved['config'], saved)
    seen, restore = watch(monkeypatch, 'evaluate'), f'--restore_file={photo_run}'
    glow.main(['--evaluate', restore])
    assert not note_lines(capsys)
    add_photos(tmp_path / 'photos')
    glow.main(['--evaluate', restore])

    (before, after) = seen
    assert np.array_equal(before.train.images, trained_on.train.images)
    train = {image.tobytes() for image in before.train.images}
    held_out = [*after.validation.images, *after.test.images]
    assert not train & {image.tobytes() for image in held_out}
    assert len(held_out) > 4
    (note,) = note_lines(capsys)
    counts = '10 new, 1 changed, 1 gone'
    assert note == f'note: the images in {tmp_path}/photos have changed since training: {counts}'
    glow.main(['--check', restore])
    assert note_lines(capsys) == [note]


def test_a_training_goes_on_with_changed_images_only_where_they_are_accepted(
    photo_run, tmp_path, capsys
):
    before = glow.load_checkpoint(photo_run)
    add_photos(tmp_path / 'photos')
    glow.main(['--evaluate', f'--restore_file={photo_run}'])  # the images are decoded here
    words = ['--train', f'--restore_file={photo_run}', '--n_epochs=2']
    content = photo_run.read_bytes()
    line = refusal_line(glow, capsys, *words)
    assert '10 new, 1 changed, 1 gone; add --accept_changed_data' in line
    assert photo_run.read_bytes() == content

    # a score that the new images would never reach
    torch.save({**torch.load(photo_run), 'best': 0.0}, photo_run)
    glow.main([*words, '--accept_changed_data'])
    after = glow.load_checkpoint(photo_run)
    assert after['step'] > before['step'] and len(after['files']) == 29
    assert after['split_bounds'] == before['split_bounds']
    assert after['fingerprint'] != before['fingerprint']
    best = glow.load_checkpoint(photo_run.with_name('best.pt'))
    assert best['fingerprint'] == after['fingerprint']  # not one that other images validated
    capsys.readouterr()
    glow.main(['--train', f'--restore_file={photo_run}', '--n_epochs=3'])
    assert not note_lines(capsys)


def test_a_run_goes_on_with_its_images_elsewhere(photo_run, tmp_path, monkeypatch, capsys):
    seen = watch(monkeypatch, 'evaluate')
    glow.main(['--evaluate', f'--restore_file={photo_run}'])
    shutil.copytree(tmp_path / 'photos', tmp_path / 'moved' / 'copy')
    shutil.rmtree(tmp_path / 'photos')
    for path in (tmp_path / 'moved').rglob('*.png'):
        os.utime(path, (0, 0))

    words = [f'--restore_file={photo_run}', f'--data_dir={tmp_path}/moved/copy']
    glow.main(['--train', '--n_epochs=2', *words])
    glow.main(['--evaluate', *words])
    glow.main(['--check', *words])
    assert not note_lines(capsys)
    first, *others = seen
    for data in others:
        assert data.fingerprint == first.fingerprint
        assert np.array_equal(data.test.images, first.test.images)


def test_attributes_that_are_added_later_are_noted(photo_run, tmp_path, capsys):
    write_table(tmp_path / 'photos', attribute_rows())
    glow.main(['--visualize', f'--restore_file={photo_run}'])
    (note,) = note_lines(capsys)
    assert f'attributes.csv or the content of images in {tmp_path}/photos has changed' in note


def test_other_data_of_the_same_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / 'data')
    glow.main(['--train', '--dataset=mnist', *TINY, '--batch_size=8'])
    run = only(tmp_path.glob('results/*/checkpoint.pt'))
    write_mnist(tmp_path / 'other', n_train=50)

    words = [f'--restore_file={run}', '--data_dir=other']
    capsys.readouterr()
    glow.main(['--evaluate', *words])
    assert note_lines(capsys) == ['note: mnist in other is not what the model was trained on']
    line = refusal_line(glow, capsys, '--train', '--n_epochs=2', *words)
    assert 'mnist in other is not what the model was trained on; add --accept_changed' in line
    glow.main(['--train', '--n_epochs=2', '--accept_changed_data', *words])
    assert glow.load_checkpoint(run)['config'].data_dir == 'other'


def as_format_2(saved):
    """Return the content of a checkpoint as one of format 2, which knew no conditions."""
    n_levels, depth = (saved['config'][name] for name in ('n_levels', 'depth'))
    former = {**saved, 'format': 2, 'input_dims': saved['input_dims'][:3]}
    del former['condition']
    for part in ('model', 'average'):
        of_last_level = f'levels.{n_levels}.{depth + 1}.'
        weights = saved[part].items()
        former[part] = {key.replace('prior.', of_last_level): value for key, value in weights}
    return former


def as_format_1(path):
    """Make a checkpoint one of format 1, which says nothing of its images."""
    saved = as_format_2(load_tensors(path))
    for name in ('fingerprint', 'split_bounds', 'files'):
        del saved[name]
    save_tensors(path, {**saved, 'format': 1})


def test_a_folder_of_format_1_keeps_its_split(photo_run, tmp_path, monkeypatch, capsys):
    as_format_1(photo_run)
    as_format_1(photo_run.with_name('best.pt'))
    seen = watch(monkeypatch, 'evaluate')
    restore = f'--restore_file={photo_run}'
    glow.main(['--evaluate', restore])
    glow.main(['--train', restore, '--n_epochs=2'])
    glow.main(['--evaluate', restore])
    assert not note_lines(capsys)
    saved = glow.load_checkpoint(photo_run)
    assert saved['format'] == 3 and saved['split_bounds'] == [] and len(saved['files']) == 20

    parts = random_split(20, 'photos')
    sorted_files = sorted((tmp_path / 'photos').rglob('*.png'))
    data = load_images('folder', tmp_path / 'photos', 16, [])
    for number, part in enumerate(parts):
        expected = [load_photo(sorted_files[i], 'folder', 16) for i in part]
        for used in (*seen, data):
            split = (used.train, used.validation, used.test)[number]
            assert np.array_equal(split.images, expected)

    add_photos(tmp_path / 'photos')
    glow.main(['--evaluate', restore])
    (note,) = note_lines(capsys)
    assert '1 gone; test images may have been trained on, unless attributes.csv' in note


@pytest.mark.parametrize(
    'change',
    [
        {'split_bounds': [5]},
        {'split_bounds': [7, 5]},
        {'split_bounds': list(range(100))},
        {'files': torch.zeros(3, dtype=torch.int64)},
        {'files': torch.zeros(3, 3, dtype=torch.int64)},
        {'files': torch.zeros(3, 2)},
        {'files': torch.tensor(0)},
    ],
)
def test_what_a_checkpoint_says_of_its_images_is_not_trusted(change, photo_run, tmp_path, capsys):
    save_tensors(tmp_path / 'bad.pt', {**load_tensors(photo_run), **change})
    for mode in ('--evaluate', '--train'):
        line = refusal_line(glow, capsys, mode, f'--restore_file={tmp_path}/bad.pt')
        assert 'bad.pt is damaged: it does not say how its images were split' in line


@pytest.mark.parametrize(
    'change',
    [
        {'split_bounds': [-1, 5]},
        {'split_bounds': [2, 2**70]},
        {'split_bounds': ['a', 'b']},
        {'split_bounds': None},
        {'files': [[1, 2]]},
        {'files': None},
        {'fingerprint': 3},
    ],
)
def test_entries_of_the_wrong_type(change, trained_glow, tmp_path, capsys):
    save_tensors(tmp_path / 'bad.pt', {**load_tensors(trained_glow), **change})
    assert 'damaged' in refusal_of(tmp_path / 'bad.pt', capsys)


# --------------------------------------------------------------------------------------- the README


@pytest.mark.slow
def test_every_command_of_the_readme(tmp_path, monkeypatch):
    """As written, on small data of the names there. Options at its end make a training small."""
    pages = [SCRIPT.with_name(name).read_text() for name in ('README.md', 'RESULTS.md')]
    # code that goes on in the next line
    text = re.sub(r'(?<!`)`[^`]+`(?!`)', lambda code: code[0].replace('\n', ' '), '\n'.join(pages))
    pattern = r'(?:python|torchrun)[^`\n|]*?glow\.py( --[^h][^`\n|#]*)'  # all except --help
    commands = list(dict.fromkeys(re.findall(pattern, text)))
    for mode in ('train', 'evaluate', 'generate', 'visualize', 'given'):
        assert any(mode in command for command in commands), mode

    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / 'DATA')
    write_cifar(tmp_path / 'data')
    write_celeba(tmp_path / 'CELEBA')
    write_folder(tmp_path / 'DATA', size=70)
    header, *rows = attribute_rows()
    differing = [(image, split, odd, -odd) for image, split, odd, _ in rows]
    write_table(tmp_path / 'DATA', [header, *differing])
    for name in ('me.jpg', 'you.jpg'):
        noise_image(300, 200).save(name)
    write_folder(tmp_path / 'PHOTOS', size=70)
    shutil.copy('me.jpg', tmp_path / 'PHOTOS' / 'IMG_0001.JPG')

    glow.main(['--train', '--image_size=16', *TINY])
    faces = only(tmp_path.glob('results/*/best.pt'))
    (tmp_path / 'results' / 'RUN').mkdir()
    for name in ('best.pt', 'checkpoint.pt'):
        content = faces.with_name(name).read_bytes()
        (tmp_path / 'results' / 'RUN' / name).write_bytes(content)
    for command in commands:
        glow.main(make_small(shlex.split(command), faces))


def make_small(words, faces):
    """Return a command's words with options at the end that make it quick.

    ``faces`` is the checkpoint of a tiny model, for commands that name none.
    """
    if any(word.startswith(('--restore_file', '--resume')) for word in words):
        return [word for word in words if not word.startswith('--n_epochs')]
    if any(word.startswith('--given') for word in words):
        return [*words, f'--restore_file={run_that_takes(words)}']
    if '--train' not in words:
        return [*words, f'--restore_file={faces}']
    words = [*words, *TINY, '--batch_size=4', '--batch_size_init=8']
    if not any(word.startswith('--dataset') for word in words):
        words += ['--image_size=16', '--batch_size=256']
    return words


def run_that_takes(words):
    """Return the checkpoint of a run in results/ whose conditions are those of ``--given``."""
    (text,) = re.findall(r'--given=(\S+)', ' '.join(words))
    names = {name.removeprefix('-') for name in text.split(',')}
    for path in Path('results').glob('*/best.pt'):
        if names <= set(glow.load_checkpoint(path)['condition']['names']):
            return path
    raise AssertionError(f'no command before {words} trains what is given {names}')


def python_of_the_readme():
    """Return its blocks of Python. The first is of bnaf.py."""
    readme = SCRIPT.with_name('README.md').read_text()
    return re.findall(r'```python\n(.*?)```', readme, re.DOTALL)


def test_the_readmes_python_of_conditions():
    """It goes on from the block before, with a model of the digits given their classes."""
    saved = glow.load_checkpoint(SCRIPT.parent / 'tests' / 'checkpoints' / 'glow_3.pt')
    model, config = glow.restore_model(saved, CPU), saved['config']
    images = load_images('digits').test.images[:2]
    names = dict(torch=torch, glow=glow, model=model, saved=saved, config=config)
    names |= dict(images=images, device=CPU)
    exec(python_of_the_readme()[-1], names)
    assert names['log_p'].shape == (2,) and names['samples'].shape == (2, 1, 8, 8)
    back = glow.decode(model, names['z'], names['y'])
    assert (back // 16 == images // 16).all()


def test_the_readmes_python(trained_glow, tmp_path, monkeypatch):
    """As written, but for the checkpoint: the row of images begins and ends with the test images
    that it is to begin and end with, in their bins."""
    _, code, _ = python_of_the_readme()
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace('results/RUN/best.pt', str(trained_glow)), names)

    images, (row,) = names['images'], names['rows']
    assert names['log_p'].shape == (2,)
    assert len(row) == 9
    ends = row[[0, -1]]
    assert (ends // 16 == images // 16).all()  # digits have 4 bits
    assert Image.open('interpolation.png').width > 9 * 8


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    'words, part',
    [
        ([], 'one of the arguments --train --evaluate --generate --visualize --check is required'),
        (['--train', '--evaluate'], 'not allowed with'),
        (['--train', '--dataset=imagenet'], 'faces, digits, mnist, cifar10, celeba, folder'),
        (['--train', '--dataset=mnist'], 'train-images-idx3-ubyte'),
        (['--train', '--dataset=celeba'], 'img_align_celeba'),
        (['--train', '--dataset=folder'], '--data_dir'),
        (['--train', '--n_bits=0'], '1..8'),
        (['--train', '--n_bits=9'], '1..8'),
        (['--train', '--lr=nan'], 'outside'),
        (['--train', '--depth=-3'], 'outside'),
        (['--train', '--depth=many'], 'invalid int value'),
        (['--train', f'--seed={10**20}'], 'outside'),
        (['--train', '--dataset=digits', '--n_levels=3'], 'not divisible by 2^(n_levels + 1) = 16'),
        (['--train', '--dataset=digits', '--image_size=16'], '--image_size'),
        (['--train', '--no_such_option'], 'unrecognized arguments'),
        (['--evaluate'], 'python glow.py --train'),
        (['--generate', '--restore_file=nowhere.pt'], 'nowhere.pt: no such checkpoint'),
        (
            ['--generate', '--restore_file=.'],
            '. is a folder, not a checkpoint: give its best.pt',
        ),
        (['--train', '--resume', '--max_skips=-1'], 'outside'),
        (['--visualize', '--vis_alphas', ''], '--vis_alphas is empty'),
        (['--visualize', '--vis_alphas=-1,x'], '--vis_alphas'),
        (['--visualize', '--vis_alphas=0,nan'], 'outside -1000..1000'),
        (['--visualize', '--vis_alphas', '-1001'], 'outside -1000..1000'),
    ],
)
def test_bad_commands(words, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert part in refusal_line(glow, capsys, *words)
    assert not list(tmp_path.rglob('*.p*'))  # neither checkpoint nor picture


@pytest.mark.parametrize(
    'words, part',
    [
        (['--evaluate', '--depth=7'], '--depth=7 contradicts'),
        (['--train', '--dataset=mnist'], 'dataset=digits'),
        (['--train', '--lr=0.1'], 'lr=0.001'),
        (['--visualize', '--vis_attrs=10'], 'out of range: there are 0 to 9'),
        (['--visualize', '--vis_attrs=-1'], 'out of range'),
        (['--visualize', '--vis_attrs=three'], 'unknown attribute'),
        (['--evaluate', '--plain_conv1x1'], 'plain_conv1x1=False'),
        (['--visualize', '--vis_img=no.jpg'], 'no.jpg'),
    ],
)
def test_bad_commands_for_a_checkpoint(words, part, trained_glow, capsys):
    folder = trained_glow.parent
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert part in refusal_line(glow, capsys, *words, f'--restore_file={trained_glow}')
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


class Payload:
    """A pickle of this makes the folder that the environment variable CANARY names."""

    def __reduce__(self):
        return os.mkdir, (os.environ['CANARY'],)


def refusal_of(file, capsys):
    """Return the line with which a checkpoint is refused."""
    return refusal_line(glow, capsys, '--generate', f'--restore_file={file}')


@pytest.mark.parametrize('kind', ['truncated', 'empty', 'text', 'pickle'])
def test_files_that_are_no_checkpoints(kind, trained_glow, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('CANARY', str(tmp_path / 'canary'))
    file, whole = tmp_path / 'bad.pt', trained_glow.read_bytes()
    contents = {
        'truncated': whole[: len(whole) // 2],
        'empty': b'',
        'text': b'hello',
        'pickle': pickle.dumps(Payload()),
    }
    file.write_bytes(contents[kind])
    assert 'cannot be read as a checkpoint' in refusal_of(file, capsys)
    assert list(tmp_path.iterdir()) == [file]


def test_checkpoints_of_something_else(trained_glow, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('CANARY', str(tmp_path / 'canary'))
    file, saved = tmp_path / 'bad.pt', torch.load(trained_glow)
    for change, part in (
        ({'extra': Payload()}, 'holds more than tensors'),
        ({'script': 'bnaf.py'}, 'not a checkpoint of glow.py'),
        ({'config': {**saved['config'], 'colour': 'red'}}, 'another version'),
        ({'config': {**saved['config'], 'depth': 'x'}}, 'another version'),
        ({'config': {**saved['config'], 'n_bits': 9}}, 'another version'),
        ({'input_dims': [8]}, 'another version'),
        ({'input_dims': [1, 8, 10**9, 0]}, 'another version'),
        ({'step': 'a'}, 'another version'),
        ({'validation_loss': 'x'}, 'another version'),
        ({'model': 3}, 'another version'),
    ):
        torch.save({**saved, **change}, file)
        assert part in refusal_of(file, capsys), change
    assert list(tmp_path.iterdir()) == [file]


def test_damaged_parts_of_a_checkpoint(trained_glow, tmp_path, capsys):
    file, saved = tmp_path / 'bad.pt', torch.load(trained_glow)
    config, optimizer, model = saved['config'], saved['optimizer'], saved['model']
    nan = {**model, 'levels.0.1.0.b': model['levels.0.1.0.b'] * math.nan}
    moments = {}
    for i, state in optimizer['state'].items():
        of_three = state['exp_avg'].flatten()[:1].repeat(3)
        moments[i] = {**state, 'exp_avg': of_three}
    for change, part in (
        ({'config': {**config, 'width': 7}}, 'another type or shape'),
        ({'model': {}}, 'more weights'),
        ({'config': {**config, 'width': 2**14, 'depth': 2**7}}, 'damaged'),
        ({'optimizer': {}}, ''),
        ({'optimizer': {**optimizer, 'state': moments}}, 'other shapes'),
        ({'more': 1}, 'unknown'),
        ({'model': nan}, 'not finite'),
        ({'config': {**config, 'data_dir': '\33[2J'}}, 'printable'),
    ):
        torch.save({**saved, **change}, file)
        line = refusal_of(file, capsys)
        assert 'damaged' in line and part in line and line.isprintable(), line
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_out_of_gpu_memory(tmp_path, capsys):
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        words = ['--train', '--dataset=digits', '--width=4096', f'--output_dir={tmp_path}']
        assert 'lower --batch_size' in refusal_line(glow, capsys, *words)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
