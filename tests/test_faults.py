"""A short form of tests/faults.py, and that its checks can fail."""

import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bnaf
import glow
from common import checkpoints
from common.errors import UserError, exit_on_user_error
from common.logs import ScalarWriter
from common.runs import find_run, lock_run_folder
from datasets import tabular
from datasets.tabular import save_table

pytestmark = pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='looks into /proc')
import faults


@pytest.fixture(scope='module')
def bench(tmp_path_factory):
    return faults.Bench(tmp_path_factory.mktemp('faults'))


def test_killed_at_any_moment(bench):
    counts = faults.killed(bench, 4, (('glow, digits', 1), ('bnaf, a table', 2)))
    assert counts['kills'] == 4 and counts['ended by themselves, bit for bit as if let alone'] >= 2


def test_preempted(bench):
    (seconds,) = faults.preempted(bench, [('bnaf, a table', 2)], [signal.SIGTERM]).values()
    assert max(seconds.values()) < 10


def test_restarted_by_torchrun(bench):
    stopped, _ = faults.restarted(bench, ['bnaf, a table']).values()
    assert max(stopped.values()) < 10


def test_a_lost_process_is_named(bench):
    (seconds,) = faults.lost(bench, ['bnaf, a table'], repeats=1).values()
    assert max(seconds) < 10


def test_out_of_disk(bench):
    assert len(faults.out_of_disk(bench, ['glow, digits'])['lines']) == 3


def test_a_second_training_in_the_same_folder(bench):
    assert faults.twice(bench, ['bnaf, a table']) == {'refusals': 1}


def test_processes_that_disagree(bench):
    assert faults.disagreeing(bench, slice(2, 5))['refusals'] == 3


def test_memory_does_not_grow(bench):
    assert faults.growing(bench, n_steps=300, warm=150, cases=['bnaf, a table'])


def test_numbers(bench):
    names = [
        'images of one colour',
        'bf16, lr x 100',
        'a table, lr x 10,000',
        'train 1e30',
        'test 1e200',
    ]
    ends = faults.numbers(bench, names)['result or line']
    assert [name for name, end in ends.items() if isinstance(end, str)] == [
        'a table, lr x 10,000',
        'test 1e200',
    ]


def test_scalars_are_in_the_file_before_the_checkpoint_that_is_past_them(tmp_path, monkeypatch):
    """Whichever checkpoint a kill leaves: what it will not do again is there"""
    save_tensors, steps = checkpoints.save_tensors, []

    def checked(path, content):
        steps.append(content['step'])
        tags = {tag for tag, step in faults.logged(path.parent) if step == content['step']}
        assert ('bits_per_dim/train' in tags) == (steps[-1] > 0) and (
            'bits_per_dim/validation' in tags
        ) == (steps[-1] in (11, 22))
        save_tensors(path, content)

    monkeypatch.setattr(checkpoints, 'save_tensors', checked)
    for name, value in {**faults.STEPS, 'VALIDATE_STEPS': 11}.items():
        monkeypatch.setattr(glow, name, value)
    glow.main(
        ['--train', *faults.DIGITS, '--n_epochs=2', '--batch_size=128', f'--output_dir={tmp_path}']
    )
    assert sorted(set(steps)) == [0, 5, 10, 11, 15, 20, 22]


def test_the_learning_rate_that_is_logged_is_that_of_the_step(tmp_path, monkeypatch):
    """Not the one to which the validation after it lowers it"""
    monkeypatch.setattr(bnaf, 'EPOCH_STEPS', 5)
    rates, take_step = [], bnaf.Training.take_step

    def watched(run):
        result = take_step(run)
        rates.append(run.optimizer.param_groups[0]['lr'])
        return result

    monkeypatch.setattr(bnaf.Training, 'take_step', watched)
    monkeypatch.setattr(bnaf, 'LOG_STEPS', 1)
    bnaf.main(
        [
            '--train',
            '--dataset=rings',
            '--n_flows=1',
            '--hidden_dim=4',
            '--batch_size=40',
            '--n_epochs=30',
            '--lr_patience=0',
            '--lr=1',
            f'--output_dir={tmp_path}',
        ]
    )
    logged = faults.logged(next(tmp_path.iterdir()))
    assert rates[10] > rates[-1]
    assert [logged['lr', step] for step in range(1, len(rates) + 1)] == pytest.approx(rates)


def test_what_a_start_makes_void(tmp_path, monkeypatch):
    for first, n in ((1, 4), (3, 4)):
        monkeypatch.setattr(os, 'getpid', lambda: first)  # is in the name of its file
        scalars = ScalarWriter(tmp_path, first)
        for step in range(first, first + n):
            scalars.add(step, {'loss': 10.0 * first + step})
        scalars.flush()
    assert faults.logged(tmp_path) == {
        ('loss', step): value for step, value in enumerate([11, 12, 33, 34, 35, 36], 1)
    }
    scalars = ScalarWriter(tmp_path, 7)
    scalars.add(7, {'loss': 0.0})
    scalars.add(7, {'loss': 0.0})
    scalars.flush()
    with pytest.raises(AssertionError, match='step 7 is there twice'):
        faults.logged(tmp_path)


def test_differences_are_found():
    a = {'x': [torch.zeros(2), float('nan'), 1.0]}
    assert faults.differences(a, {'x': [torch.zeros(2), float('nan'), 1.0]}) == []
    assert faults.differences(a, {'x': [torch.tensor([0.0, 1e-38]), float('nan'), 1]}) == [
        '/x/0',
        '/x/2',
    ]


def test_what_the_killed_left_is_cleared_away(tmp_path):
    kept = ['.generated_samples.csv.5', '.best.pt.1.old', '.settings.json.bak', '.shot.png.2x']
    for name in ('.best.pt.1', '.results.json.23', '.samples_at_step_000500.png.4', *kept):
        (tmp_path / name).touch()
    with lock_run_folder(tmp_path, is_new=False):
        assert sorted(os.listdir(tmp_path)) == sorted([*kept, '.lock'])


def test_what_a_restart_goes_on_with(tmp_path):
    """Its own run, if it has saved anything; else it does as it was told, whatever else lies there"""
    for name in ('glow_mine', 'glow_other'):
        (tmp_path / name).mkdir()
    (tmp_path / 'glow_other' / 'checkpoint.pt').touch()
    request = glow.Request(output_dir=str(tmp_path))
    assert (
        find_run('glow', request, True, str)
        is None
        is find_run('glow', request, True, str, tmp_path / 'glow_mine')
    )
    named = glow.Request(restore_file='best.pt')
    assert find_run('glow', named, True, str, tmp_path / 'glow_mine') == 'best.pt'
    (tmp_path / 'glow_mine' / 'checkpoint.pt').touch()
    assert find_run('glow', named, True, str, tmp_path / 'glow_mine') == str(
        tmp_path / 'glow_mine' / 'checkpoint.pt'
    )


def test_a_run_that_another_has_taken_further_is_not_overwritten(tmp_path, monkeypatch, capsys):
    """While this one still loads its data"""
    words = [
        '--train',
        *faults.TABLE[1:],
        '--dataset=rings',
        f'--output_dir={tmp_path}',
        '--resume',
    ]
    monkeypatch.setattr(bnaf, 'EPOCH_STEPS', 2)
    bnaf.main([*words, '--n_epochs=1'])
    load_table = tabular.load_table

    def slow_load_rows(*args):
        monkeypatch.setattr(tabular, 'load_table', load_table)
        bnaf.main([*words, '--n_epochs=3'])
        return load_table(*args)

    monkeypatch.setattr(tabular, 'load_table', slow_load_rows)
    with pytest.raises(SystemExit):
        bnaf.main([*words, '--n_epochs=2'])
    assert 'is at a later step than' in capsys.readouterr().err
    assert bnaf.load_checkpoint(next(tmp_path.glob('*/checkpoint.pt')))['step'] == 6


def test_scalars_are_seen_within_a_minute(tmp_path):
    scalars = ScalarWriter(tmp_path, 1)
    scalars.add(1, {'loss': 1.0})
    assert not faults.logged(tmp_path)
    scalars.flushed -= 60
    scalars.add(2, {'loss': 2.0})
    assert len(faults.logged(tmp_path)) == 2


def test_a_picture_is_not_worth_a_training(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise UserError('samples are not finite')

    monkeypatch.setattr(glow, 'sample_rows', fail)
    glow.main(
        ['--train', *faults.DIGITS, '--n_epochs=1', '--batch_size=256', f'--output_dir={tmp_path}']
    )
    assert 'no picture: samples are not finite' in capsys.readouterr().out and list(
        tmp_path.glob('*/best.pt')
    )


@pytest.mark.parametrize('suffix', ['csv', 'npy', 'h5'])
def test_tables_on_a_full_disk(suffix, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match=f'rows.{suffix} cannot be written'):
            save_table(tmp_path / f'rows.{suffix}', np.zeros((1000, 2)), ['a', 'b'])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'message',
    [
        'Timed out after 601 seconds waiting for clients. 1/2 clients joined.',
        'Gloo: closed by peer',
        'rendezvous: environment variable RANK expected',
        'the size of tensor a must match',
    ],
)
def test_only_what_another_process_did_is_said_in_one_line(message, monkeypatch, capsys):
    monkeypatch.setenv('RANK', '1')
    for world_size in ('2', None):
        monkeypatch.setenv('WORLD_SIZE', world_size) if world_size else monkeypatch.delenv(
            'WORLD_SIZE'
        )
        with pytest.raises((SystemExit, RuntimeError)) as error, exit_on_user_error('glow'):
            raise RuntimeError(message)
        assert (error.type is SystemExit) == bool(world_size and 'tensor' not in message)
    assert capsys.readouterr().err.count('process 1 on') == ('tensor' not in message)
