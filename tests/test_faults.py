"""A short form of tests/faults.py, tests of its own checks, and of what a run leaves behind."""

import errno
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import faults
import numpy as np
import pytest
import torch
import torch.distributed as dist
import tqdm
from helpers import (
    CPU,
    joined_group,
    needs_limits,
    only,
    refusal_line,
    run_command,
    run_on_machines,
    single_process,
)

import bnaf
import glow
from common import checkpoints, errors, files, tensors
from common.bounds import limit_address_space
from common.errors import UserError, exit_on_user_error
from common.files import file_lock, make_new_folder
from common.logs import ScalarWriter, TrainingLog, progress_bar
from common.options import resolve_config
from common.runs import catch_stop_signals, local_device, lock_run_folder, select_checkpoint
from datasets import load_images, tabular
from datasets.own_tables import frame_of_columns, save_table

needs_posix = pytest.mark.skipif(os.name != 'posix', reason='signals, links and pipes of POSIX')

# ---------------------------------------------------------------------------- the harness, in short


@pytest.fixture(scope='module')
def harness(tmp_path_factory):
    if not Path('/proc/self/environ').exists():
        pytest.skip('processes are found in /proc, which Linux has')
    return faults.Harness(tmp_path_factory.mktemp('faults'))


@pytest.mark.slow
def test_killed_at_any_moment(harness):
    counts = faults.check_kills(harness, 3, (('bnaf, a table', 2), ('glow, digits', 1)))
    assert counts['kills'] == 3
    assert counts['trainings that ended equal to the bit'] >= 2


@pytest.mark.slow
def test_preempted(harness):
    figures = faults.check_preemption(harness, [('bnaf, a table', 2)], [signal.SIGTERM])
    (seconds,) = figures['seconds until it had saved and ended'].values()
    assert seconds < 10


@pytest.mark.slow
def test_restarted_by_torchrun(harness):
    figures = faults.check_restarts(harness, ['bnaf, a table'])
    (seconds,) = figures['seconds until the others had stopped'].values()
    assert seconds < 10


@pytest.mark.slow
def test_a_lost_process_is_named(harness):
    figures = faults.check_lost_process(harness, ['bnaf, a table'], repeats=1)
    (seconds,) = figures['seconds until the others had stopped']
    assert seconds < 10


@pytest.mark.slow
def test_out_of_disk(harness):
    assert len(faults.check_full_disk(harness, ['glow, digits'])['lines']) == 3


@pytest.mark.slow
def test_a_second_training_in_the_same_folder(harness):
    assert faults.check_second_training(harness, ['bnaf, a table']) == {'refusals': 1}


@pytest.mark.slow
def test_processes_that_disagree(harness):
    assert faults.check_disagreement(harness, slice(2, 5))['refusals'] == 3


@pytest.mark.slow
def test_memory_does_not_grow(harness):
    assert faults.check_growth(harness, n_steps=300, warmup=150, cases=['bnaf, a table'])


@pytest.mark.slow
def test_numbers(harness):
    names = ['images of one colour', 'bf16, lr x 100', 'a table, lr x 10,000']
    names += ['train 1e30', 'test 1e200']
    ends = faults.check_numbers(harness, names)['result or line']
    lines = [name for name, end in ends.items() if isinstance(end, str)]
    assert lines == ['a table, lr x 10,000', 'test 1e200']


@pytest.mark.slow
def test_other_numbers_of_processes(harness):
    figures = faults.check_resizing(harness, ['bnaf, a toy'], sizes=(1, 2, 1))
    (case,) = figures['images or rows after each start'].values()
    assert case['unbroken'] == case['resized'][-1] == 5000


@pytest.mark.slow
def test_which_run_is_meant(harness):
    counts = faults.check_choice(harness, ['bnaf'], slice(1, 6, 2))  # each mode once
    assert counts == {'commands that took the right run': 3}


@pytest.mark.slow
def test_data_that_moves(harness):
    figures = faults.check_moved_data(harness, ['a table'])
    assert len(figures['lines about other rows']) == 1


@pytest.mark.slow
def test_images_that_are_added(harness):
    figures = faults.check_changed_images(harness, n=40, n_added=20)
    assert figures['images before'] == {'train': 32, 'validation': 4, 'test': 4}


@pytest.mark.slow
def test_surroundings(harness):
    names = ['no table on one of two processes', 'an interrupt while glow.py imports']
    names += ['a closed standard error']
    ends = faults.check_surroundings(harness, names)['result or line'].values()
    assert [end == faults.EQUAL for end in ends] == [False, False, True]


@pytest.mark.slow
def test_processes_on_other_machines(harness):
    case = ['bnaf, a toy']
    assert faults.check_start(harness, rounded=case, apart=[], alone=case)['refusals'] == 1


# ------------------------------------------------------------------------------- the harness itself


def test_a_broken_promise_is_shown(harness, tmp_path, monkeypatch):
    def check(harness):
        """This holds."""
        faults.require(False, 'it does not')

    monkeypatch.setitem(faults.PROMISES, 'twice', faults.Promise(check, str))
    page = tmp_path / 'README.md'
    page.write_text('<!-- what faults.py wrote --><!-- until here -->')
    with pytest.raises(SystemExit, match='1'):
        faults.main(['--only=twice', f'--out={tmp_path}'])
    assert '| This holds. | `--only=twice` | **broken**: it does not |' in page.read_text()
    assert json.loads((tmp_path / 'faults.json').read_text())['twice']['broken'] == 'it does not'


def test_differences_are_found():
    a = {'x': [torch.zeros(2), float('nan'), 1.0]}
    same = {'x': [torch.zeros(2), float('nan'), 1.0]}
    other = {'x': [torch.tensor([0.0, 1e-38]), float('nan'), 1]}
    assert faults.differences(a, same) == []
    assert faults.differences(a, other) == ['/x/0', '/x/2']
    assert faults.differences(a, {'x': [1.0]}) == ['/x: other length']
    assert faults.differences(a, {'y': a['x']}) == [': other keys']


def test_scalars_that_a_later_start_replaces(tmp_path, monkeypatch):
    for first_step in (1, 3):
        monkeypatch.setattr(os, 'getpid', lambda pid=first_step: pid)  # part of the file's name
        scalars = ScalarWriter(tmp_path, first_step)
        for step in range(first_step, first_step + 4):
            scalars.add(step, {'loss': 10.0 * first_step + step})
        scalars.flush()
    values = [11, 12, 33, 34, 35, 36]
    expected = {('loss', step): value for step, value in enumerate(values, 1)}
    assert faults.logged_scalars(tmp_path) == expected


def test_a_scalar_that_is_logged_twice_is_found(tmp_path):
    scalars = ScalarWriter(tmp_path, 7)
    scalars.add(7, {'loss': 0.0})
    scalars.add(7, {'loss': 0.0})
    scalars.flush()
    with pytest.raises(AssertionError, match='step 7 is there twice'):
        faults.logged_scalars(tmp_path)


# ------------------------------------------------------------------------------- several processes


def save_first_state(rank, name, folder):
    """Save the weights and averages of a training that is built from other weights on process 1."""
    script = faults.SCRIPTS[name]
    build_model = script.build_model

    def build_differently(config, input_dims):
        model = build_model(config, input_dims)
        for value in model.state_dict().values():
            if value.is_floating_point():
                value += rank  # a difference that no rounding explains
        return model

    script.build_model = build_differently
    config, data = tiny_training(name)
    with joined_group(rank, 2, folder):
        run = script.Training(config, data, script.Process(rank, 2, CPU))
        state = {**run.model.state_dict(), **run.average.state_dict()}
    torch.save(state, f'{folder}/{rank}.pt')


def tiny_training(name):
    """Return the config and the data of a small training."""
    if name == 'bnaf':
        return bnaf.Config(dataset='rings', n_flows=2, hidden_dim=4), tabular.load_table('rings')
    options = dict(dataset='digits', depth=1, width=8)
    return resolve_config(glow.Config, options, glow.DEFAULTS, None, ()), load_images('digits')


@pytest.mark.slow
@pytest.mark.parametrize('name', faults.SCRIPTS)
def test_all_processes_start_from_the_weights_of_the_first(name, tmp_path):
    """Machines with other processors round the same initial weights differently."""
    torch.multiprocessing.spawn(save_first_state, (name, tmp_path), nprocs=2)
    config, data = tiny_training(name)
    run = faults.SCRIPTS[name].Training(config, data, faults.SCRIPTS[name].Process(0, 1, CPU))
    expected = {**run.model.state_dict(), **run.average.state_dict()}
    for rank in (0, 1):
        state = torch.load(tmp_path / f'{rank}.pt')
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(state[key], value), (rank, key)


@pytest.mark.slow
def test_machines_without_a_common_disk(tmp_path):
    """Training, resuming and evaluating; only the first machine has files of the run."""
    folders = [tmp_path / 'first', tmp_path / 'second']
    for folder in folders:
        folder.mkdir()
    script = glow.__file__
    for words in (
        ['--train', *faults.DIGITS[:-1], '--batch_size=64', '--n_epochs=1'],
        ['--train', '--resume', '--n_epochs=2'],
        ['--evaluate'],
    ):
        (code, out, err), (other_code, other_out, other_err) = run_on_machines(
            script, *words, folders=folders
        )
        assert code == other_code == 0, err + other_err
        assert 'two standard errors' in out and not other_out
    run = only(folders[0].glob('results/*'))
    last = glow.load_checkpoint(run / 'checkpoint.pt')
    assert last['config'].n_epochs == 2
    assert not (folders[1] / 'results').exists()

    (run / 'checkpoint.pt').write_bytes(b'damaged')
    (run / 'best.pt').unlink()
    for words, part in (
        (['--train', '--resume'], 'checkpoint.pt cannot be read as a checkpoint'),
        (['--evaluate', '--output_dir=none'], 'no checkpoint of'),
    ):
        ends = run_on_machines(script, *words, folders=folders)
        assert [code for code, _, _ in ends] == [2, 2]
        (line,) = ''.join(err for _, _, err in ends).strip().splitlines()
        assert line.startswith('glow.py: error: ') and part in line


def devices_of(uuids, monkeypatch):
    """Return the device of each process of a machine; ``uuids`` are those of the GPUs it sees."""
    store, here = dist.HashStore(), threading.local()
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: len(here.uuids))
    monkeypatch.setattr(
        torch.cuda,
        'get_device_properties',
        lambda device: SimpleNamespace(uuid=here.uuids[device.index]),
    )

    def start(local_rank):
        here.uuids = uuids[local_rank]
        return str(local_device('', local_rank, len(uuids), store))

    with ThreadPoolExecutor(len(uuids)) as pool:
        return list(pool.map(start, range(len(uuids))))


@pytest.mark.parametrize(
    'uuids, devices',
    [
        (['a'], ['cuda:0']),
        (['abc'], ['cuda:0']),
        (['abc'] * 3, ['cuda:0', 'cuda:1', 'cuda:2']),
        (['a', 'b', 'c'], ['cuda:0'] * 3),  # as srun --gpus-per-task=1 shows them
        (['ab', 'ab', 'cd', 'cd'], ['cuda:0', 'cuda:1'] * 2),
    ],
)
def test_each_process_gets_a_gpu_of_its_own(uuids, devices, monkeypatch):
    assert devices_of(uuids, monkeypatch) == devices


@pytest.mark.parametrize('uuids', [['a', 'a'], ['ab'] * 3, ['a', 'b', 'a']])
def test_two_processes_on_one_gpu_are_refused(uuids, monkeypatch):
    expected = (
        f'{len(uuids)} processes on a machine of {len(uuids[0])} GPUs: lower --nproc_per_node'
    )
    with pytest.raises(UserError, match=expected):
        devices_of(uuids, monkeypatch)


def test_a_process_that_sees_one_gpu_takes_it_whatever_its_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    assert str(local_device('', 3, 1, None)) == 'cuda:0'


@pytest.mark.parametrize('script', faults.SCRIPTS.values(), ids=faults.SCRIPTS)
def test_the_device_can_be_chosen(script, tmp_path, monkeypatch, capsys):
    with script.setup('cpu') as process:
        assert process.device == CPU
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    with script.setup('cpu') as process:
        assert process.device == CPU

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    words = ['--train', f'--output_dir={tmp_path}']
    assert 'torch finds no GPU' in refusal_line(script, capsys, *words, '--device=cuda')
    assert 'must be one of cpu, cuda' in refusal_line(script, capsys, *words, '--device=tpu')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('script', faults.SCRIPTS.values(), ids=faults.SCRIPTS)
def test_commands_compute_products_in_float32(script, tmp_path, monkeypatch, capsys):
    torch.set_float32_matmul_precision('high')  # as NVIDIA's containers do
    refusal_line(script, capsys, '--generate', f'--output_dir={tmp_path}')
    assert torch.get_float32_matmul_precision() == 'highest'


@pytest.mark.parametrize('script', faults.SCRIPTS.values(), ids=faults.SCRIPTS)
def test_srun_without_a_launcher_is_refused(script, tmp_path, monkeypatch, capsys):
    def setup_refusal(**variables):
        for name in ('RANK', 'SLURM_NTASKS', 'SLURM_STEP_NUM_TASKS'):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return refusal_line(script, capsys, '--generate', f'--output_dir={tmp_path}')

    line = setup_refusal(SLURM_NTASKS='4')
    assert f'--rdzv_endpoint=HOST:29500 {script.NAME}.py' in line and 'unset SLURM_NTASKS' in line
    assert 'SLURM has 2 tasks' in setup_refusal(SLURM_NTASKS='1', SLURM_STEP_NUM_TASKS='2')

    for variables in (
        dict(SLURM_NTASKS='1'),
        dict(SLURM_NTASKS='4', SLURM_STEP_NUM_TASKS='1'),
        dict(SLURM_NTASKS='4', RANK='0'),
    ):
        assert 'train first' in setup_refusal(**variables)


# --------------------------------------------------------------------------------------------- logs


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_progress_bar_keeps_moving_when_steps_get_slower(monkeypatch):
    """Each step of a second is shown, after a thousand fast ones, and fast ones twice a second."""
    monkeypatch.setattr(tqdm.std, 'time', lambda: clock[0])
    clock, screen = [0.0], Terminal()
    monkeypatch.setattr(sys, 'stderr', screen)
    bar = progress_bar(total=1010)

    def draws_of_steps(n, seconds):
        before = screen.getvalue().count('\r')
        for _ in range(n):
            clock[0] += seconds
            bar.update()
        return screen.getvalue().count('\r') - before

    assert draws_of_steps(1000, 0.004) in (7, 8)
    assert draws_of_steps(9, 1.0) == 9


class Loss:
    """Counts the steps at which it is read from the device."""

    def __init__(self, run):
        self.run, self.read_at = run, []

    def __format__(self, spec):
        self.read_at.append(self.run.step)
        return '1.234'

    def item(self):
        self.read_at.append(self.run.step)
        return 1.234


def test_the_first_loss_is_shown_at_once_and_others_are_rarely_read(tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, 'stderr', screen)
    parameter = torch.nn.Parameter(torch.zeros(1))
    run = SimpleNamespace(
        process=single_process(glow),
        config=SimpleNamespace(n_epochs=1),
        model=SimpleNamespace(n_parameters=1),
        optimizer=torch.optim.SGD([parameter], lr=1.0),
        score_name='score',
        score_sign=1,
        step=40,
        n_seen=40,
        n_per_step=1,
        n_per_epoch=100,
        n_skipped=0,
        skips_in_a_row=0,
        best=float('inf'),
        validation_loss=0.0,
    )
    loss, norm = Loss(run), torch.zeros(())
    with TrainingLog(run, tmp_path, 'rows', lambda config, loss: f'{loss:.3f} nats') as log:
        for run.step in range(41, 82):
            log.log_step(loss, norm, every=20)
            if run.step == 41:
                shown = screen.getvalue().split('\r')[-1]
                assert '41/100' in shown and '1.234 nats' in shown and 'rows/s' in shown
    assert sorted(set(loss.read_at)) == [41, 60, 80]
    assert {step for _, step in faults.logged_scalars(tmp_path)} == {60, 80}


def test_a_busy_machine_is_noted(tmp_path, monkeypatch, capsys):
    words = ['--train', *faults.TOY, '--n_epochs=1', '--batch_size=50', f'--output_dir={tmp_path}']
    monkeypatch.setattr(bnaf, 'EPOCH_BATCHES', 2)
    monkeypatch.setattr(os, 'getloadavg', lambda: (1000.0, 0.0, 0.0))
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    bnaf.main(words)
    assert 'OMP_NUM_THREADS' not in capsys.readouterr().out

    monkeypatch.delenv('OMP_NUM_THREADS')
    bnaf.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert 'set OMP_NUM_THREADS=1' in only(line for line in lines if 'load 1000.0' in line)

    monkeypatch.setattr(os, 'getloadavg', lambda: (0.1, 1000.0, 1000.0))
    bnaf.main(words)
    assert 'OMP_NUM_THREADS' not in capsys.readouterr().out


def test_scalars_are_on_the_disk_before_a_checkpoint_of_their_step(tmp_path, monkeypatch):
    """So that after a kill nothing is missing that a resumed training does not log again."""
    save_tensors, steps = checkpoints.save_tensors, []

    def check_and_save(path, content):
        step = content['step']
        tags = {tag for tag, at in faults.logged_scalars(path.parent) if at == step}
        assert ('bits_per_dim/train' in tags) == (step > 0)
        assert ('bits_per_dim/validation' in tags) == (step in (12, 23))
        save_tensors(path, content)
        steps.append(step)

    monkeypatch.setattr(checkpoints, 'save_tensors', check_and_save)
    for name, value in dict(SAVE_SECONDS=0, LOG_STEPS=1, VALIDATE_STEPS=11).items():
        monkeypatch.setattr(glow, name, value)
    words = ['--n_epochs=2', '--batch_size=128', f'--output_dir={tmp_path}']
    glow.main(['--train', *faults.DIGITS, *words])
    assert sorted(set(steps)) == list(range(24))


def test_the_learning_rate_that_is_logged_is_that_of_the_step(tmp_path, monkeypatch):
    """Not the one to which the validation after the step lowers it."""
    rates, take_step = [], bnaf.Training.take_step

    def take_step_and_note_rate(run):
        result = take_step(run)
        rates.append(run.optimizer.param_groups[0]['lr'])
        return result

    monkeypatch.setattr(bnaf.Training, 'take_step', take_step_and_note_rate)
    monkeypatch.setattr(bnaf, 'EPOCH_BATCHES', 5)
    monkeypatch.setattr(bnaf, 'LOG_STEPS', 1)
    words = ['--dataset=rings', '--n_flows=1', '--hidden_dim=4', '--batch_size=40']
    words += ['--n_epochs=30', '--lr_patience=0', '--lr=1', f'--output_dir={tmp_path}']
    bnaf.main(['--train', *words])

    scalars = faults.logged_scalars(next(tmp_path.iterdir()))
    logged = [scalars['lr', step] for step in range(1, len(rates) + 1)]
    assert rates[10] > rates[-1]
    assert logged == pytest.approx(rates)


def test_scalars_are_on_the_disk_within_a_minute(tmp_path):
    scalars = ScalarWriter(tmp_path, 1)
    scalars.add(1, {'loss': 1.0})
    assert not faults.logged_scalars(tmp_path)
    scalars.last_flush -= 60
    scalars.add(2, {'loss': 2.0})
    assert len(faults.logged_scalars(tmp_path)) == 2


# -------------------------------------------------------------------------------------- run folders


def test_what_a_killed_process_left_is_removed(tmp_path):
    kept = ['.generated_samples.csv.5', '.best.pt.1.old', '.settings.json.bak', '.shot.png.2x']
    removed = ['.best.pt.1', '.results.json.23', '.samples_at_step_000500.png.4']
    for name in (*kept, *removed):
        (tmp_path / name).touch()
    with lock_run_folder(tmp_path, is_new=False):
        assert sorted(os.listdir(tmp_path)) == sorted([*kept, '.lock'])


def test_what_a_restarted_run_resumes_from(tmp_path):
    """From its own checkpoint, if it has saved one. Otherwise it does as it was told, whatever
    other runs are there."""
    mine, other = tmp_path / 'glow_mine', tmp_path / 'glow_other'
    mine.mkdir()
    other.mkdir()
    (other / 'checkpoint.pt').touch()
    request = glow.Request(output_dir=str(tmp_path))
    assert select_checkpoint('glow', request, 'train') is None
    assert select_checkpoint('glow', request, 'train', mine) is None
    named = glow.Request(restore_file='best.pt')
    assert select_checkpoint('glow', named, 'train', mine) == Path('best.pt')

    (mine / 'checkpoint.pt').touch()
    assert select_checkpoint('glow', named, 'train', mine) == mine / 'checkpoint.pt'


def test_which_checkpoint_is_taken(tmp_path):
    request = glow.Request(output_dir=str(tmp_path))
    resume = glow.Request(output_dir=str(tmp_path), resume=True)
    assert select_checkpoint('glow', resume, 'train') is None
    with pytest.raises(UserError, match='train first'):
        select_checkpoint('glow', request, 'generate')

    for age, name in ((0, 'glow_old'), (1, 'glow_new'), (2, 'bnaf_newest')):
        last = tmp_path / name / 'checkpoint.pt'
        last.parent.mkdir()
        last.touch()
        os.utime(last, (age, age))
    last, best = tmp_path / 'glow_new' / 'checkpoint.pt', tmp_path / 'glow_new' / 'best.pt'
    assert select_checkpoint('glow', request, 'train') is None
    assert select_checkpoint('glow', resume, 'train') == last
    assert select_checkpoint('glow', request, 'generate') == last
    best.touch()
    assert select_checkpoint('glow', resume, 'train') == last
    assert select_checkpoint('glow', request, 'generate') == best


def test_a_run_that_another_has_taken_further_is_not_overwritten(tmp_path, monkeypatch, capsys):
    """Even if that happens while this one still loads its data."""
    words = [*faults.TABLE[1:], '--dataset=rings', f'--output_dir={tmp_path}', '--resume']
    monkeypatch.setattr(bnaf, 'EPOCH_BATCHES', 2)
    bnaf.main(['--train', *words, '--n_epochs=1'])
    load_table = tabular.load_table

    def load_while_another_trains(*args):
        monkeypatch.setattr(tabular, 'load_table', load_table)
        bnaf.main(['--train', *words, '--n_epochs=3'])
        return load_table(*args)

    monkeypatch.setattr(tabular, 'load_table', load_while_another_trains)
    with pytest.raises(SystemExit):
        bnaf.main(['--train', *words, '--n_epochs=2'])
    assert 'is at a later step than' in capsys.readouterr().err
    assert bnaf.load_checkpoint(next(tmp_path.glob('*/checkpoint.pt')))['step'] == 6


def test_a_picture_that_fails_does_not_end_a_training(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise UserError('samples are not finite')

    monkeypatch.setattr(glow, 'sample_grid', fail)
    words = ['--n_epochs=1', '--batch_size=256', f'--output_dir={tmp_path}']
    glow.main(['--train', *faults.DIGITS, *words])
    assert 'no picture: samples are not finite' in capsys.readouterr().out
    assert list(tmp_path.glob('*/best.pt'))


@needs_posix
@pytest.mark.parametrize('parent', ['file', 'link', 'file/results', 'link/results'])
def test_a_folder_of_runs_in_a_place_that_is_taken(parent, tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
    monkeypatch.setattr(files, 'itertools', SimpleNamespace(count=lambda n: range(n, 9)))
    with pytest.raises(UserError, match=f'{parent} cannot be made: it or a folder above it'):
        make_new_folder(tmp_path / parent / 'run')


HOLD_A_LOCK = """
import errno, fcntl, os, sys, time
from pathlib import Path

def no_flock(*args):
    raise OSError(int(sys.argv[1]), 'not supported')

fcntl.flock = no_flock
from common.files import file_lock

with file_lock(Path(sys.argv[2]), 'another process trains'):
    print('held', flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize('number', [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_locks_on_a_file_system_without_flock(number, tmp_path, monkeypatch):
    fcntl = pytest.importorskip('fcntl', reason='Windows has locks of its own')

    def no_flock(*args):
        raise OSError(number, 'not supported')

    monkeypatch.setattr(fcntl, 'flock', no_flock)
    path = tmp_path / '.lock'
    words = [sys.executable, '-c', HOLD_A_LOCK, str(number), str(path)]
    root = Path(glow.__file__).parent
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=root) as other:
        assert other.stdout.readline() == b'held\n'
        marker = only(file for file in tmp_path.iterdir() if file.stat().st_size)
        content = marker.read_text().splitlines()
        with pytest.raises(UserError, match='another process trains'):
            with file_lock(path, 'another process trains', wait=False):
                pass
        other.kill()

    with file_lock(path, 'another process trains', wait=False):
        assert marker.read_text().startswith(f'{os.getpid()}\n')
    assert not marker.exists()

    # nobody here can know whether a process of another machine is gone
    marker.write_text('\n'.join([content[0], 'elsewhere', *content[2:], '']))
    with pytest.raises(UserError, match=f'{re.escape(str(marker))}.* if it is gone, remove'):
        with file_lock(path, 'another process trains', wait=False):
            pass
    assert marker.exists()


def test_a_training_is_saved_when_its_terminal_is_closed():
    hang_up = getattr(signal, 'SIGHUP', None) or pytest.skip('Windows has no SIGHUP')
    ended = []
    before = signal.signal(hang_up, lambda *args: ended.append('by the signal'))
    try:
        with catch_stop_signals() as signals:
            signal.raise_signal(hang_up)
        assert signals == ['SIGHUP'] and not ended

        signal.signal(hang_up, signal.SIG_IGN)  # as nohup does
        with catch_stop_signals() as signals:
            signal.raise_signal(hang_up)
        assert not signals
    finally:
        signal.signal(hang_up, before)


@pytest.mark.parametrize('message, ends', [('Gloo: closed by peer', False), ('a bug', True)])
def test_the_launcher_ends_no_process_that_is_yet_to_say_what_it_has_lost(
    message, ends, monkeypatch
):
    monkeypatch.setenv('WORLD_SIZE', '2')
    ended = []
    before = signal.signal(signal.SIGTERM, lambda *args: ended.append('by the signal'))
    try:
        with pytest.raises(RuntimeError, match=message), catch_stop_signals():
            raise RuntimeError(message)
        signal.raise_signal(signal.SIGTERM)
        assert bool(ended) == ends
    finally:
        signal.signal(signal.SIGTERM, before)


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize('suffix', ['csv', 'npy', 'h5'])
def test_tables_on_a_full_disk(suffix, tmp_path):
    resource = pytest.importorskip('resource', reason='limits the size of files as POSIX does')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match=f'rows.{suffix} cannot be written'):
            table = frame_of_columns({'a': np.zeros(1000), 'b': np.zeros(1000)})
            save_table(tmp_path / f'rows.{suffix}', table)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


LOST_PROCESS = [
    'Timed out after 601 seconds waiting for clients. 1/2 clients joined.',
    'Gloo: closed by peer',
    'rendezvous: environment variable RANK expected',
]


@pytest.mark.parametrize('message', LOST_PROCESS)
def test_a_lost_process_is_reported_in_one_line(message, monkeypatch, capsys):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(SystemExit), exit_on_user_error('glow'):
        raise RuntimeError(message)
    assert capsys.readouterr().err.count('process 1 on') == 1


@pytest.mark.parametrize(
    'message, world_size',
    [*((message, None) for message in LOST_PROCESS), ('the size of tensor a must match', '2')],
)
def test_other_errors_keep_their_traceback(message, world_size, monkeypatch, capsys):
    """A bug does, and so does what looks like a lost process where there is only one."""
    monkeypatch.setenv('RANK', '1')
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    if world_size:
        monkeypatch.setenv('WORLD_SIZE', world_size)
    with pytest.raises(RuntimeError), exit_on_user_error('glow'):
        raise RuntimeError(message)
    assert not capsys.readouterr().err


@pytest.mark.parametrize('script', [glow, bnaf])
@pytest.mark.parametrize('rank', ['0', '1'])
def test_an_error_of_several_processes_is_printed_once(script, rank, monkeypatch, capsys):
    """By the first that has it, whichever that is. Those that lose it then have nothing to add."""
    monkeypatch.setenv('LOCAL_RANK', rank)
    monkeypatch.setenv('WORLD_SIZE', '2')
    store = dist.HashStore()

    def lines_of(error):
        with pytest.raises(SystemExit), exit_on_user_error(script.NAME):
            try:
                raise error
            except Exception as error:
                errors.report_error(script.NAME, error, store)
                raise
        return capsys.readouterr().err.splitlines()

    lost = 'Gloo: closed by peer'
    assert 'lost, or never reached' in only(lines_of(RuntimeError(lost)))
    assert lines_of(UserError('no data')) == [f'{script.NAME}.py: error: no data']
    assert not lines_of(UserError('no data'))
    assert not lines_of(RuntimeError(lost))
    assert lines_of(OSError('no disk')) == [f'{script.NAME}.py: error: no disk']

    class LostStore:
        def add(self, key, value):
            raise dist.DistNetworkError('Connection reset by peer')

    store = LostStore()
    assert lines_of(UserError('no data')) == [f'{script.NAME}.py: error: no data']


FAIL_ON_SOME_RANKS = """
import os

import {script}
from common.errors import UserError


def fail(mode, options, request, process):
    if process.rank in map(int, os.environ['FAILING'].split()):
        raise UserError('this process cannot go on')
    process.gather(None)


{script}.run_mode = fail
{script}.main(['--evaluate'])
"""


@pytest.mark.slow
@pytest.mark.parametrize('script, module', [('glow', 'launch'), ('bnaf', 'run')])
@pytest.mark.parametrize('failing', ['1', '0 1'])
def test_an_error_of_some_ranks_is_one_line(script, module, failing, tmp_path):
    path = tmp_path / 'fail.py'
    path.write_text(FAIL_ON_SOME_RANKS.format(script=script))
    root = str(Path(glow.__file__).parent)
    words = ['-m', f'torch.distributed.{module}', '--nproc_per_node=2', path]
    _, output = run_command(*words, cwd=tmp_path, exit_code=1, FAILING=failing, PYTHONPATH=root)
    lines = [line for line in output.splitlines() if ': error: ' in line]
    assert lines == [f'{script}.py: error: this process cannot go on'], output


def allocate_with_torch():
    torch.empty(2**50, dtype=torch.uint8)


def allocate_with_numpy():
    np.empty(2**60, dtype=np.uint8)


def allocate_on_windows():
    raise RuntimeError('[enforce fail] DefaultCPUAllocator: not enough memory: you tried to ...')


@pytest.mark.parametrize('run', [allocate_with_torch, allocate_with_numpy, allocate_on_windows])
def test_too_little_memory_is_reported_in_one_line(run, capsys):
    with pytest.raises(SystemExit, match='2'), exit_on_user_error('glow'):
        run()
    line = only(capsys.readouterr().err.splitlines())
    assert line.startswith('glow.py: error: out of memory: lower --batch_size')


@needs_limits
def test_too_little_memory_is_no_damaged_file(tmp_path, monkeypatch):
    """The file is not to blame where this process may take less than the file."""
    tensors.save_tensors(tmp_path / 'x.pt', {'x': torch.zeros(2)})
    monkeypatch.setattr(torch, 'load', lambda *args, **options: allocate_with_torch())
    with pytest.raises(RuntimeError, match='allocate'), limit_address_space(2**27):
        tensors.load_tensors(tmp_path / 'x.pt')
    with pytest.raises(UserError, match='more than 256 MiB'):
        tensors.load_tensors(tmp_path / 'x.pt')


def test_long_names_lose_their_middle():
    """Lists stay whole, as they are advice that can be typed."""
    columns = ','.join(f'column_{k}' for k in range(99))
    for text in ('no data', 'n' * 255, f'add --drop={columns}', '/a/folder' * 40):
        assert str(UserError(text)) == text

    name = str(UserError('n' * 10**6 + '.csv: no such table'))
    assert len(name) < 280 and name.startswith('nnn') and name.endswith(': no such table')
    path = str(UserError('a/' * 10**6 + ' is no folder'))
    assert len(path) == 600 + len(' is no folder') and path.endswith('/ is no folder')
    assert len(str(UserError('a ' * 10**6))) == 10_000
    line = errors.error_line(OSError(errno.ENAMETOOLONG, 'File name too long', 'n' * 10**6))
    assert len(line) < 320 and 'File name too long' in line


def test_long_names_are_cut_where_they_name_files():
    for text in ('x', 'n' * 150, 'é' * 75):
        assert files.name_part(text) == text
    names = ['n' * 150 + end for end in ('', 'a', 'b')]
    names += ['é' * 150, '語' * 100, 'n' * 10**6, '\udcff' * 200]
    parts = {files.name_part(name) for name in names}
    assert len(parts) == len(names)
    assert all(len(os.fsencode(part)) <= 150 for part in parts)


def test_a_file_of_a_long_name_is_written(tmp_path):
    path = tmp_path / ('n' * 250)
    files.write_atomically(path, lambda temporary: temporary.write_text('x'))
    assert only(tmp_path.iterdir()) == path


@needs_posix
@pytest.mark.parametrize('script', [glow, bnaf])
def test_an_interrupt_while_a_script_is_imported(script, tmp_path):
    """Also where an imported package turns the interrupt into another error."""
    code = """
    import time
    print('importing', flush=True)
    try:
        time.sleep(60)
    except BaseException:
        raise ImportError('numpy could not be loaded')
    """
    (tmp_path / 'numpy.py').write_text(inspect.cleandoc(code))
    with subprocess.Popen(
        [sys.executable, script.__file__, '--help'],
        env={**os.environ, 'PYTHONPATH': str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout.readline() == b'importing\n'
        process.send_signal(signal.SIGINT)
        assert process.wait() == 2
        assert process.stderr.read().decode() == f'{script.NAME}.py: error: interrupted\n'


class BrokenStream(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, 'Broken pipe')


def test_a_training_goes_on_without_its_output(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bnaf, 'EPOCH_BATCHES', 2)
    words = ['--train', *faults.TOY, '--n_epochs=1', '--batch_size=50']

    def train(name, stdout, stderr):
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'stdout', stdout)
            patch.setattr(sys, 'stderr', stderr)
            bnaf.main([*words, f'--output_dir={tmp_path / name}'])

    train('closed', None, None)
    train('no errors', sys.stdout, BrokenStream())
    with pytest.raises(SystemExit, match='2'):
        train('no output', BrokenStream(), sys.stderr)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == 'bnaf.py: error: the output cannot be written: Broken pipe'
    for name in ('closed', 'no errors', 'no output'):
        best = only((tmp_path / name).glob('*/best.pt'))
        assert bnaf.load_checkpoint(best)['step'] == 2


@needs_posix
@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_output_that_is_not_read_is_one_line(unbuffered, trained_bnaf):
    """Such as that of ``python bnaf.py --evaluate | true``."""
    words = [sys.executable, bnaf.__file__, '--evaluate', f'--restore_file={trained_bnaf}']
    environment = {**os.environ, 'PYTHONUNBUFFERED': unbuffered}
    pipe = subprocess.PIPE
    with subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe) as process:
        process.stdout.close()
        line = 'bnaf.py: error: the output cannot be written: Broken pipe\n'
        assert process.stderr.read().decode() == line
        assert process.wait() == 2
