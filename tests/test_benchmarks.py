"""The benchmarks run on tiny shapes without the peers; pages show what the JSON files hold."""

import contextlib
import functools
import inspect
import io
import json
import math
import os
import shlex
import signal
import struct
import sys
import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import ablation
import conditional
import curves
import defaults
import faults
import known_tables
import numpy as np
import pandas as pd
import processes
import pytest
import results
import speed
import speed_rows
import tables
import torch
from contenders import count_parameters, has_options, invert_by_bisection, make_config
from helpers import CPU, only
from pages import insert, significant
from scipy import stats
from sklearn.utils import Bunch
from speed_report import CHECKPOINT_TIME, check_figures, target_of, targets_section, targets_table
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from timing import N_WARMUP, seconds_per_call, time_in_turn
from tiny_data import attribute_rows, write_folder, write_table
from torch.distributions import MultivariateNormal

import bnaf
import glow
from common.errors import UserError
from common.files import write_json
from common.options import resolve_config
from datasets.tabular import load_table

ROOT = Path(__file__).resolve().parent.parent
TITLES = {'glow': 'Glow', 'bnaf': 'BNAF'}

# ------------------------------------------------------------------------------------------- speed


PEERS = ('normflows', 'pyro', 'zuko')


@pytest.fixture(scope='module')
def quick_run(tmp_path_factory):
    """speed.py --quick without peers, on the smallest shapes: its results, its page, its output."""
    folder = tmp_path_factory.mktemp('speed')
    (folder / 'README.md').write_text('<!-- what speed.py wrote --><!-- until here -->')
    shapes = speed_rows.SMALLEST
    sweeps = {
        'glow': (shapes['glow'], dict(depth=(1, 2))),
        'bnaf': (shapes['bnaf'], dict(data_dim=(2, 4))),
    }

    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        for peer in PEERS:
            patch.setitem(sys.modules, peer, None)  # importing it fails
        patch.setattr(speed, 'GLOW', {'a': shapes['glow']})
        patch.setattr(speed, 'BNAF', {'b': shapes['bnaf']})
        patch.setattr(speed, 'SWEEPS', sweeps)
        patch.setattr(speed, 'TABLE_SHAPE', (20_000, 2))
        patch.setattr(torch.cuda, 'is_available', lambda: False)
        speed.main(['--quick', f'--out={folder}'])

    measured = json.loads((folder / 'speed.json').read_text())
    page = read(folder, 'speed.md')
    return Namespace(folder=folder, results=measured, page=page, output=output.getvalue())


def read(folder, name):
    return (folder / name).read_text()


def table_cells(page, heading):
    """Return the lines of the table under a heading, split into cells."""
    part = page.split(f'### {heading}\n')[1].strip().split('\n\n')[0]
    cells = []
    for line in part.splitlines()[2:]:
        cells.append([cell.strip() for cell in line.strip('|').split('|')])
    return cells


@pytest.mark.slow
def test_quick_run_measures_all_without_peers(quick_run):
    failures = [entry['what'] for entry in quick_run.results['failures']]
    assert failures[:3] == ['glow: normflows', 'bnaf: pyro', 'bnaf: zuko']
    assert set(failures[3:]) <= {'variants with bf16'}  # which some CPUs are slow at
    for what in failures[:3]:
        assert f'{what}: not installed' in quick_run.output
        assert f'| {what} | not installed' in quick_run.page

    keys = ('script', 'quantity', 'state')
    assert [tuple(row[key] for key in keys) for row in quick_run.results['rows']] == [
        ('glow', 'training', ''),
        ('glow', 'evaluation', ''),
        ('glow', 'sampling', ''),
        ('bnaf', 'training', 'warm'),
        ('bnaf', 'evaluation', 'warm'),
        ('bnaf', 'training', 'fresh'),
        ('bnaf', 'sampling', ''),
    ]

    commands = quick_run.results['commands']
    assert commands[0]['n_steps'] == 10  # cut short
    assert all(0 < command['overhead'] < 1 for command in commands)

    assert (quick_run.folder / 'scaling.png').stat().st_size > 10_000
    targets = targets_table(quick_run.results)
    assert targets in quick_run.page
    section = targets_section(quick_run.results)
    assert targets in section and section in read(quick_run.folder, 'README.md')
    machine = quick_run.results['machine']['device']
    assert 'thread' in machine and section.startswith(f'Measured on {machine}')


@pytest.mark.slow
def test_tables_of_speed_say_what_the_json_says(quick_run):
    states = {'': '', 'warm': ', allocator warm', 'fresh': ', fresh processes'}
    for row in quick_run.results['rows']:
        quantity = row['quantity'].replace('training', 'training step') + states[row['state']]
        lines = table_cells(quick_run.page, f'{TITLES[row["script"]]}: {quantity}')
        names = [line[1].removeprefix('**ours**, ') for line in lines]
        assert names == [entry['name'] for entry in row['entries']]

        is_bisected = (row['script'], row['quantity']) == ('bnaf', 'sampling')
        for line, entry in zip(lines, row['entries'], strict=True):
            assert line[2:4] == [f'{entry["parameters"]:,}', significant(entry['per_second'])]
            assert entry['per_second'] == pytest.approx(row['n'] / entry['seconds'])
            # Without the peers only inverses are compared to something, to bisection.
            has_ratio = is_bisected and entry['name'] != 'bisection'
            assert bool(line[4]) == bool(entry['ratio']) == has_ratio
            if row['gflop'] is not None:
                assert entry['gflops'] == pytest.approx(row['gflop'] / entry['seconds'])
                assert line[7:] == [significant(entry['gflops']), f'{entry["fraction"]:.0%}']


@pytest.mark.slow
def test_tables_of_commands_and_memory_say_what_the_json_says(quick_run):
    commands = quick_run.results['commands']
    for line, command in zip(
        table_cells(quick_run.page, 'The real commands'), commands, strict=True
    ):
        assert line[0] == f'`{command["script"]}.py --train {command["words"]}`'
        assert line[3:] == [
            f'{command["overhead"]:.1%}',
            f'under {command["target"]:.0%}',
            'met' if command['met'] else '**missed**',
        ]

    lines = table_cells(quick_run.page, 'Glow: peak memory of training')
    entries = quick_run.results['memory'][0]['entries']
    assert [line[2] for line in lines] == [significant(entry['mib']) for entry in entries]


def test_only_takes_what_is_measured(tmp_path, capsys):
    with pytest.raises(SystemExit, match='2'):
        speed.main(['--only=glow,flow', f'--out={tmp_path}'])
    assert '--only takes glow, bnaf and input, not flow' in capsys.readouterr().err
    with pytest.raises(SystemExit, match='2'):
        speed.main(['--rows=a,A17', f'--out={tmp_path}'])
    assert '--rows takes the names of shapes, not A17' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def settings_for(device, peers=PEERS):
    return speed.Settings(torch.device(device), quick=False, peers=peers)


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_jobs_can_be_called(device):
    """Nothing else tests those of a GPU where there is none."""
    jobs = list(speed.plan(settings_for(device)))
    for job in jobs:
        inspect.signature(job.measure).bind(**job.arguments)
        names = job.arguments.get('names', ())
        if job.measure is speed.measure_speed:
            # more would be more than torch compiles of one function
            assert sum('compile' in name.split() for name in names) <= 1
            assert names[0] in PEERS and len(names) > 1
            assert set(names[1:]).isdisjoint(names[:1])
    assert {job.measure.__name__ for job in jobs} >= {'measure_memory', 'measure_growth'}

    inverted = [job.arguments['n'] for job in jobs if job.measure is speed.measure_inverses]
    assert inverted == ([5000] if device == 'cuda' else [20, 20, 200, 5000])


def test_shapes_and_scripts_are_chosen():
    jobs = speed.choose_jobs(speed.plan(settings_for('cuda')), ['glow'], ['A16', 'b'])
    assert {(job.script, job.config) for job in jobs[1:]} == {('glow', 'A16'), ('glow', 'b')}
    assert jobs[0].measure is speed.measure_machine

    jobs = speed.choose_jobs(speed.plan(settings_for('cpu', peers=())), ['bnaf'], [])
    assert {job.script for job in jobs[1:]} == {'bnaf'}
    assert not any(set(job.arguments.get('names', ())) & set(PEERS) for job in jobs)


def new_results(kind='cpu'):
    return speed.new_results(settings_for(kind), dict.fromkeys(PEERS, '1'))


def measured_row(times, script='glow', config='a', **values):
    """Return a row as a job yields it."""
    shape = speed.shape_of(script, config)
    row = speed_rows.new_row(script, config, 'training', shape)
    return {**row, 'times': times, 'parameters': dict.fromkeys(times, 7), **values}


def test_each_row_is_saved_when_it_is_done(tmp_path, monkeypatch):
    def rows_then_interrupt(job, end):
        yield 'rows', measured_row({'normflows': [0.2], 'float32': [0.1]})
        assert 'normflows' in read(tmp_path, 'speed.json')
        yield speed_rows.failure('the next', ValueError('two\nlines |'))
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, 'run_job', rows_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        speed.main([f'--out={tmp_path}', '--only=glow'])
    measured = json.loads(read(tmp_path, 'speed.json'))
    assert measured['rows'][0]['entries'][1]['ratio'] == [2, 2, 2]
    page = read(tmp_path, 'speed.md')
    assert page == speed.format_report(measured)
    assert '| the next | ValueError: two lines / |' in page


def test_rows_that_cannot_be_finished_are_left_out(tmp_path, monkeypatch):
    begun = []

    def fake_job(job, end):
        begun.append(job.title)
        yield 'peaks', {}

    for peer in PEERS:
        monkeypatch.setitem(sys.modules, peer, None)
    monkeypatch.setattr(speed, 'run_job', fake_job)
    # ten seconds and what is kept for the report: enough for the machine alone
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    speed.main([f'--out={tmp_path}', f'--minutes={(speed.REPORT_SECONDS + 7) / 60}', '--rows=c'])
    late = [entry['what'] for entry in json.loads(read(tmp_path, 'speed.json'))['failures']]
    assert begun[0] == 'machine' and 'speed glow c float32 bf16 checkpoint_grads' in late
    assert not set(begun) & set(late)
    assert 'TimeoutError: not begun: it takes' in read(tmp_path, 'speed.md')


def test_bf16_is_left_out_where_it_is_slow(tmp_path, monkeypatch):
    peaks = {'conv3x3_bf16_gflops': 4.0, 'conv3x3_float32_gflops': 40.0}
    begun = []

    def fake_job(job, end):
        begun.append(job.title)
        yield 'peaks', peaks if job.measure is speed.measure_machine else {}

    monkeypatch.setattr(speed, 'run_job', fake_job)
    jobs = list(speed.plan(settings_for('cpu')))
    results = new_results()
    speed.measure_all(jobs, results, tmp_path, None)
    assert not any('bf16' in title for title in begun)
    assert 'speed glow a normflows float32 checkpoint_grads' in begun
    assert 'speed glow b normflows compile' in begun and 'command glow' in begun
    assert [entry['what'] for entry in results['failures']] == ['variants with bf16']
    assert '4 GFLOP/s in bf16, 40 in float32' in results['failures'][0]['error']

    peaks['conv3x3_bf16_gflops'] = 30.0
    results = new_results()
    speed.measure_all(jobs, results, tmp_path, None)
    assert any('bf16' in title for title in begun) and not results['failures']


@pytest.mark.slow
def test_processes_that_end_or_hang():
    job = speed.Job(os._exit, dict(status=3), seconds=0)
    assert list(speed.run_job(job, None)) == [
        ('failures', {'what': '_exit', 'error': 'RuntimeError: its process ended with 3'})
    ]
    job = speed.Job(signal.pause, {}, seconds=0)
    ((section, entry),) = speed.run_job(job, time.monotonic() + 0.5)
    assert section == 'failures' and 'no time was left' in entry['error']


def test_a_contender_that_fails_leaves_the_others(monkeypatch):
    make = speed_rows.make_contender

    def fail_sometimes(script, shape, name, device):
        if name == 'normflows':
            raise MemoryError('none\nleft')
        contender = make(script, shape, 'float32', device)
        if name == 'bf16':
            contender.step = None  # cannot be called
        return contender

    monkeypatch.setattr(speed_rows, 'make_contender', fail_sometimes)
    shape = speed_rows.SMALLEST['glow']
    names = ['normflows', 'float32', 'bf16']
    for in_turn in (True, False):
        results = new_results()
        for section, value in speed_rows.measure_speed(
            'glow', 'a', shape, names, ['training'], CPU, quick=True, in_turn=in_turn
        ):
            speed.add_result(results, section, value)
        errors = {entry['what']: entry['error'] for entry in results['failures']}
        assert errors['glow a, normflows'] == 'MemoryError: none left'
        assert errors['glow a training, bf16'].startswith('TypeError: ')
        (row,) = results['rows']
        (entry,) = row['entries']
        assert entry['name'] == 'float32' and entry['ratio'] is None and entry['gflops'] > 0


def test_what_is_built_one_after_the_other_has_ratios(monkeypatch):
    make = speed_rows.make_contender
    built = []

    def make_own(script, shape, name, device):
        built.append(name)
        return make(script, shape, 'float32', device)

    monkeypatch.setattr(speed_rows, 'make_contender', make_own)
    results = new_results()
    names = ['normflows', 'float32']
    shape = speed_rows.SMALLEST['glow']
    arguments = 'glow', 'a', shape, names, ['evaluation'], CPU
    for section, value in speed_rows.measure_speed(*arguments, quick=True, in_turn=False):
        assert list(value['times']) == built  # saved before the next one is built
        speed.add_result(results, section, value)
    theirs, ours = results['rows'][0]['entries']
    assert theirs['ratio'] is None
    assert ours['ratio'][1] == pytest.approx(theirs['seconds'] / ours['seconds'], rel=0.5)


def test_rows_of_several_processes_become_one():
    results = new_results()
    speed.add_row(results, measured_row({'float32': [0.5]}, gflop=1.0))  # the peer has failed
    times = {'normflows': [0.4, 0.6, 0.4], 'compile': [0.2, 0.2, 0.2]}
    speed.add_row(results, measured_row(times))
    times = {'normflows': [9.0], 'bf16': [3.0]}
    speed.add_row(results, measured_row(times, in_turn=False))
    speed.add_row(results, measured_row(times, config='b'))

    first, second = results['rows']
    assert second['config'] == 'b'
    entries = {entry['name']: entry for entry in first['entries']}
    assert list(entries) == ['normflows', 'float32', 'compile', 'bf16']
    assert entries['normflows']['seconds'] == 0.4  # what was measured first
    assert entries['compile']['ratio'] == pytest.approx([2, 2, 2.5])
    assert entries['compile']['gflops'] == pytest.approx(5)
    assert entries['bf16']['ratio'] == pytest.approx([3, 3, 3])  # to its own peer


@pytest.mark.parametrize('compiled,judged', [(0.1, 'compile'), (0.3, 'float32')])
def test_the_faster_of_compiled_and_not_is_judged(compiled, judged):
    results = new_results()
    speed.add_row(results, measured_row({'normflows': [0.5], 'float32': [0.2]}))
    speed.add_row(results, measured_row({'normflows': [0.5], 'compile': [compiled]}))
    entries = results['rows'][0]['entries']
    assert [entry['name'] for entry in entries if entry['met'] is not None] == [judged]


def test_ratios_to_a_peer_that_was_not_timed_in_turn():
    theirs = [1.0, 2.0, 3.0]
    assert speed.quartiles_of_ratio(theirs, [1.0, 2.0, 3.0], in_turn=True) == [1, 1, 1]
    assert speed.quartiles_of_ratio(theirs, [1.0, 1.0], in_turn=False) == [2, 2, 2]


def test_a_gpu_is_timed_between_events(monkeypatch):
    log = []

    class FakeEvent:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append('record')

        def synchronize(self):
            log.append('wait')

        def elapsed_time(self, end):
            assert isinstance(end, FakeEvent) and end is not self
            return 30.0

    monkeypatch.setattr(torch.cuda, 'Event', FakeEvent)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: log.append('synchronize'))
    seconds = seconds_per_call(lambda: log.append('call'), torch.device('cuda'), n_calls=3)
    assert seconds == pytest.approx(0.01)
    assert log == ['synchronize', 'record', 'call', 'call', 'call', 'record', 'wait']


def test_words_of_variants_are_options():
    shape = speed_rows.SMALLEST['glow']
    config = make_config('glow', shape, 'bf16 compile')
    assert config.bf16 and config.compile and not config.checkpoint_grads
    assert has_options('glow', 'bf16 compile') and not has_options('bnaf', 'bf16')
    for script in (glow, bnaf):
        has_eager = has_options(script.NAME, 'float32 eager')
        assert has_eager == hasattr(script.Config, 'no_cuda_graph')
        if has_eager:
            config = make_config(script.NAME, speed_rows.SMALLEST[script.NAME], 'float32 eager')
            assert config.no_cuda_graph


def test_parameters_that_are_used_are_counted():
    model = torch.nn.Linear(2, 3)
    assert count_parameters(model) == 9
    model.n_parameters = 5
    assert count_parameters(model) == 5


@pytest.mark.slow
def test_share_of_the_input(tmp_path, capsys):
    images = speed.random_celeba(tmp_path, n=210)
    assert images.train.images.shape == (10, 3, 64, 64)
    config = glow.Config(image_size=64, n_levels=1, depth=1, width=8, batch_size=2)
    get_batch = glow.training_batch
    speed.print_batch_share('tiny', images, config, n_steps=2)
    assert glow.training_batch is get_batch

    words = capsys.readouterr().out.split()
    assert words[0] == 'tiny:' and words[2:4] == ['ms', 'of']
    assert float(words[1]) < float(words[4])
    assert 0 < float(words[-1].strip('%')) < 100


@pytest.mark.slow
@pytest.mark.skipif(
    not Path('/proc/self/status').exists(), reason='reads peak memory in /proc, which Linux has'
)
def test_memory_in_a_process_of_its_own():
    shape = dict(data_dim=4, n_flows=1, n_hidden=1, hidden_dim=8, batch_size=10_000)
    layer = 10_000 * 4 * 8 * 4 / 2**20  # MiB of a hidden layer's units
    arguments = dict(script='bnaf', config='a', shape=shape, names=['float32'], device=CPU)
    job = speed.Job(speed.measure_memory, arguments, seconds=0)
    ((section, row),) = speed.run_job(job, None)
    assert section == 'memory'
    # torch alone would be 200 layers.
    assert 2 * layer < row['mib']['float32'] < 60 * layer


def test_functions_run_in_turn():
    calls = []

    def timer(name):
        return lambda n_calls: calls.extend(name * n_calls) or 1.0

    timers = {'a': timer('a'), 'b': timer('b')}
    times = time_in_turn(timers, budget=0, min_rounds=2, min_seconds=2)
    assert times == {'a': [1, 1], 'b': [1, 1]}
    # warm-up, then two rounds of as many calls as take two seconds
    assert ''.join(calls) == 'aabb' + 'aabb' * 2


def test_functions_that_fail_are_left_out():
    errors = []

    def fail_after(n):
        counts = iter(range(n))
        return lambda n_calls: next(counts) + 1.0

    timers = {'a': fail_after(9), 'b': fail_after(3), 'c': fail_after(1)}
    times = time_in_turn(
        timers, budget=0, min_rounds=3, on_error=lambda name, error: errors.append(name)
    )
    assert errors == ['c', 'b'] and list(times) == ['a'] and len(times['a']) == 3
    with pytest.raises(StopIteration):
        time_in_turn({'a': fail_after(1)}, budget=0)


def test_warm_up_lasts_until_a_step_is_captured():
    for n_warmup, seconds, n_expected in ((2, 0.1, 2), (2, 5.0, 1), (N_WARMUP['cuda'], 5.0, 6)):
        calls = []
        timer = lambda n_calls, seconds=seconds, calls=calls: calls.append(n_calls) or seconds
        time_in_turn({'float32': timer}, budget=0, min_rounds=0, n_warmup=n_warmup)
        assert len(calls) == n_expected


def test_targets():
    assert target_of('cpu', 'bnaf', 'training', 'b2', 'float32', 'warm') == 5
    assert target_of('cpu', 'bnaf', 'training', 'b2', 'float32', 'fresh') == 16
    assert target_of('cpu', 'bnaf', 'evaluation', 'b2', 'float32', 'warm') is None
    assert target_of('cpu', 'glow', 'training', 'c', 'float32') == 1.3
    assert target_of('cpu', 'glow', 'training', 'c', 'bf16 compile') == 2.0
    assert target_of('cpu', 'glow', 'training', 'b', 'compile') == 1.5
    assert target_of('cuda', 'glow', 'training', 'A64', 'bf16 compile') == 4
    assert target_of('cuda', 'glow', 'training', 'A16', 'bf16') == 2
    assert target_of('cuda', 'glow', 'training', 'A16', 'bf16 compile eager') is None
    assert target_of('cpu', 'glow', 'memory', 'a', 'bf16 checkpoint_grads') == 0.35
    assert target_of('cpu', 'glow', 'training', 'a', 'checkpoint_grads') is None
    assert CHECKPOINT_TIME > 1


def test_targets_of_single_figures():
    entries = [
        {'name': 'bf16', 'per_second': 649.0, 'fraction': None},
        {'name': 'bf16 compile', 'per_second': 651.0},
    ]
    rows = [{'config': 'A16', 'quantity': 'training', 'entries': entries}]
    memory = [{'config': 'C16', 'entries': [{'name': 'checkpoint_grads', 'mib': 13 * 1024}]}]
    checks = check_figures(rows, memory)
    assert [check['value'] for check in checks] == [651, 13 * 1024]
    assert [check['met'] for check in checks] == [True, False]


@pytest.mark.parametrize('residual', ['gated', 'none'])
def test_bisection_inverts(residual):
    config = bnaf.Config(residual=residual, n_flows=2, hidden_dim=5)
    model = bnaf.build_model(config, [3, 0]).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    with torch.no_grad():
        z, _ = model(x)
        assert (invert_by_bisection(model, z, tol=1e-9) - x).abs().max() < 1e-6


@pytest.mark.slow
def test_one_process_and_two(tmp_path):
    (tmp_path / 'README.md').write_text('<!-- what processes.py wrote --><!-- until here -->')
    processes.main(['--quick', f'--out={tmp_path}'])
    measured = json.loads(read(tmp_path, 'processes.json'))
    alone, two = measured['measured']
    assert (alone['processes'], two['processes']) == (1, 2)
    assert alone['ratios'] == [1, 1]
    assert two['ratio'] == pytest.approx(two['per_second'] / alone['per_second'])
    assert alone['gradient_bytes'] == 4 * 715_344
    assert processes.format_table(measured) in read(tmp_path, 'README.md')


# ------------------------------------------------------------------------------------------- pages


def test_pages_are_written_between_their_marks(tmp_path):
    page = tmp_path / 'README.md'
    text = 'above\n<!-- what {} wrote -->{}<!-- until here -->\nbelow\n'
    page.write_text(text.format('a', '\nold\n') + text.format('b', '\nold\n'))
    for new in ('new', 'newer'):
        insert(page, 'a', new)
    assert page.read_text() == text.format('a', '\n\nnewer\n') + text.format('b', '\nold\n')
    with pytest.raises(ValueError, match='has no <!-- what c wrote'):
        insert(page, 'c', 'text')


@pytest.mark.parametrize(
    'script,format_block,page',
    [
        (speed, targets_section, 'benchmarks/README.md'),
        (processes, processes.format_table, 'benchmarks/README.md'),
        (results, results.format_table, 'RESULTS.md'),
        (tables, tables.format_table, 'RESULTS.md'),
        (conditional, conditional.format_table, 'RESULTS.md'),
        (ablation, ablation.format_table, 'RESULTS.md'),
        (defaults, defaults.format_table, 'benchmarks/README.md'),
        (faults, faults.markdown, 'tests/README.md'),
    ],
    ids=[
        'speed',
        'processes',
        'results',
        'tables',
        'conditional',
        'ablation',
        'defaults',
        'faults',
    ],
)
def test_pages_show_what_was_measured(script, format_block, page):
    path = Path(script.__file__)
    block = format_block(json.loads(path.with_suffix('.json').read_text()))
    marked = f'<!-- what {path.name} wrote -->\n\n{block}\n<!-- until here -->'
    assert marked in read(ROOT, page)


def test_all_of_speed_is_on_its_page():
    folder = ROOT / 'benchmarks'
    measured = json.loads(read(folder, 'speed.json'))
    assert read(folder, 'speed.md') == speed.format_report(measured)


# --------------------------------------------------------------------------------- results of runs


@pytest.fixture(scope='module')
def evaluated_run(tmp_path_factory):
    """The folder of a tiny BNAF that was trained and evaluated."""
    folder = tmp_path_factory.mktemp('runs')
    rows = np.random.default_rng(0).normal(size=(100, 3))
    np.save(folder / 'mine.npy', rows)
    words = ['--n_epochs=3', '--batch_size=10', '--n_flows=2', '--hidden_dim=4', '--lr=0.005']
    bnaf.main(['--train', f'--dataset={folder}/mine.npy', f'--output_dir={folder}', *words])
    return only(folder.glob('bnaf_*'))


def test_a_row_holds_what_the_folder_of_its_run_says(evaluated_run, tmp_path, capsys):
    (tmp_path / 'RESULTS.md').write_text('<!-- what results.py wrote --><!-- until here -->')
    for name in ('', 'a name=', 'a name='):  # the last takes the place of the one before
        results.main([f'{name}{evaluated_run}', f'--out={tmp_path}', '--machine=one core'])
    rows = json.loads(read(tmp_path, 'results.json'))
    assert list(rows) == ['mine, BNAF: 2 flows, 1 hidden layer of 4 per column', 'a name']

    row = rows['a name']
    scores = json.loads(read(evaluated_run, 'results.json'))
    saved = bnaf.load_checkpoint(evaluated_run / 'best.pt')
    assert row['score'] == scores['log_likelihood_nats']
    assert row['best_step'] == saved['step'] and row['steps'] == 24
    model = bnaf.restore_model(saved, CPU)
    assert row['parameters'] == model.n_parameters
    assert row['command'] == (
        'python bnaf.py --train --dataset=mine.npy --n_flows=2 --n_hidden=0 --hidden_dim=4 '
        '--last_residual=gated --n_epochs=3 --batch_size=10 --lr=0.005 --lr_patience=5 '
        '--early_stop=20'
    )

    table = results.format_table(rows)
    assert capsys.readouterr().out.endswith(table) and table in read(tmp_path, 'RESULTS.md')


@pytest.mark.parametrize(
    'files,message',
    [
        ({}, 'not a run that was evaluated'),
        ({'results.json': '[]'}, 'not a run that was evaluated'),
        ({'results.json': '{', 'best.pt': None}, 'not a run that was evaluated'),
        ({'results.json': '{}', 'best.pt': ''}, 'not a run that was evaluated'),
        ({'results.json': '{}', 'best.pt': 'damaged'}, 'not a run that was evaluated'),
        ({'results.json': '{}', 'best.pt': None}, 'not a run that was evaluated'),
        ({'results.json': None, 'best.pt': None}, 'holds no events of a training'),
        ({'results.json': '{"step": 1}', 'best.pt': None, 'events.*': None}, 'another checkpoint'),
    ],
)
def test_what_is_no_evaluated_run(files, message, evaluated_run, tmp_path, capsys):
    """None stands for the run's own file."""
    folder = tmp_path / 'run'
    folder.mkdir()
    for pattern, text in files.items():
        if text is None:
            source = only(evaluated_run.glob(pattern))
            (folder / source.name).write_bytes(source.read_bytes())
        else:
            (folder / pattern).write_text(text)
    with pytest.raises(SystemExit, match='2'):
        results.main([str(folder), f'--out={tmp_path}'])
    error = capsys.readouterr().err
    assert error.startswith(f'results.py: error: {folder}') and message in error
    assert error.count('\n') == 1


@pytest.mark.parametrize(
    'script,options',
    [
        (glow, {}),
        (glow, dict(dataset='mnist', n_levels=2, lr=5e-3, lr_decay=0.33, bf16=True)),
        (bnaf, {}),
        (bnaf, dict(dataset='u2', lr=1e-3)),
        (bnaf, dict(dataset='bsds300', n_epochs=3, seed=10**7, dequantize=True)),
    ],
)
def test_commands_give_back_their_configs(script, options):
    words = ['--train']
    for name, value in options.items():
        words.append(f'--{name}' if value is True else f'--{name}={value}')
    config = config_of(script, words)

    line = results.training_command(script, config, world_size=1)
    assert config_of(script, shlex.split(line)[2:]) == config
    assert all(f'--{name}' in line for name in options)
    assert line.count('--') == 1 + len(options)

    elsewhere = replace(config, data_dir='/somewhere/else')
    line = results.training_command(script, elsewhere, world_size=2)
    assert line.startswith('torchrun --nproc_per_node=2 ') and '--data_dir=DATA' in line


def test_commands_on_own_tables_say_what_depends_on_the_rows():
    """Also where a value is the default of other data."""
    config = bnaf.Config(dataset='/x/my.csv', batch_size=200, lr=0.01)
    line = results.training_command(bnaf, config, world_size=1)
    assert ' --dataset=my.csv ' in line and ' --batch_size=200 ' in line
    _, options, _ = bnaf.parse_args(shlex.split(line)[2:])
    n_rows = 100
    assert bnaf.with_table_defaults(bnaf.Config(**options), options, n_rows) == replace(
        config, dataset='my.csv'
    )


def config_of(script, words):
    """Return the config that a script makes of its command line."""
    _, options, _ = script.parse_args(words)
    return resolve_config(script.Config, options, script.DEFAULTS, None, ())


def test_scores_with_as_many_digits_as_their_error_has():
    row = {
        'score': 1.70002,
        'two_standard_errors': 0.00747,
        'unit': 'bits/dim',
        'effective_sample_size': None,
    }
    assert results.score_cell(row) == '1.700 ± 0.007 bits/dim'
    row['two_standard_errors'] = 0.0131
    assert results.score_cell(row) == '1.700 ± 0.013 bits/dim'

    row = {
        'score': 0.00139,
        'two_standard_errors': 0.00038,
        'unit': 'nats of KL',
        'effective_sample_size': 0.998,
    }
    assert results.score_cell(row) == '0.0014 ± 0.0004 nats of KL, 99.8% effective'
    row |= {'score': 32.434, 'two_standard_errors': 3.69}
    assert results.score_cell(row).startswith('32.43 ± 3.69')


def test_published_scores_are_grouped_by_source():
    peers = [('A', 1.5, 'here'), ('B', 2.0, 'there'), ('C', 3.0, 'here')]
    assert results.peers_cell(peers) == 'A 1.5, C 3.0 (here); B 2.0 (there)'


# ------------------------------------------------------------------------------------ small tables


@pytest.fixture(scope='module')
def small_tables(tmp_path_factory):
    """tables.py on one table of two classes, far from each other: its folder and its results."""
    folder = tmp_path_factory.mktemp('tables')
    (folder / 'RESULTS.md').write_text('<!-- what tables.py wrote --><!-- until here -->')
    is_malignant = np.arange(300) < 100
    noise = np.random.default_rng(0).normal(size=(300, 2)).round(2)
    data = Bunch(
        data=noise * (1, 50) + 100 * is_malignant[:, None],
        feature_names=['a', 'b'],
        target=np.where(is_malignant, 0, 1),
        target_names=['malignant', 'benign'],
    )
    settings = {'short': ['--n_flows=1', '--hidden_dim=2', '--n_epochs=20']}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, 'TABLES', {'breast_cancer': lambda: data})
        patch.setattr(tables, 'SETTINGS', settings)
        patch.setattr(tables, 'PEERS', {'Gaussian': tables.fit_gaussian})
        tables.main(['--n_seeds=2', f'--out={folder}'])
        tables.write_tables(folder)
        measured = json.loads(read(folder, 'tables.json'))
        block = tables.format_table(measured)
    return Namespace(folder=folder, results=measured, block=block)


@pytest.mark.slow
def test_detectors_tell_rows_that_are_far_away(small_tables):
    shapes = {'breast_cancer': [300, 2], 'malignant': [100, 2], 'benign': [200, 2]}
    assert small_tables.results['shapes'] == shapes
    runs = small_tables.results['results']['benign']['Gaussian']
    assert all(run['auroc'] == 1 for run in runs)


@pytest.mark.slow
def test_peers_are_scored_in_the_units_of_the_table(small_tables):
    data = load_table(str(small_tables.folder / 'benign.csv'), seed=1)
    known = np.concatenate([data.train, data.validation])
    known = torch.tensor(known * data.std + data.mean)
    test = torch.tensor(data.test * data.std + data.mean)

    run = small_tables.results['results']['benign']['Gaussian'][1]
    added = run['reg_covar'] * torch.tensor(data.std**2).diag()
    gaussian = MultivariateNormal(known.mean(0), known.T.cov(correction=0) + added)
    expected = gaussian.log_prob(test).mean().item()
    assert run['nats'] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_bnaf_scores_as_its_users_see(small_tables, tmp_path):
    words = [f'--dataset={small_tables.folder}/benign.csv', f'--output_dir={tmp_path}', '--seed=1']
    bnaf.main(['--train', *words, *small_tables.results['settings']['short']])
    scores = json.loads(read(only(tmp_path.iterdir()), 'results.json'))
    run = small_tables.results['results']['benign']['short'][1]
    assert run['nats'] == pytest.approx(scores['log_likelihood_nats'])


@pytest.mark.slow
def test_the_table_says_how_far_bnaf_leads(small_tables):
    runs = small_tables.results['results']['benign']
    lead = tables.values_of(runs['short'], 'nats') - tables.values_of(runs['Gaussian'], 'nats')
    error = abs(lead[0] - lead[1]) / 2

    cell = small_tables.block.splitlines()[2].split('|')[3]
    _, in_brackets = cell.split('(')
    shown_lead, _, shown_error = in_brackets.strip(' )').split()
    assert float(shown_lead) == pytest.approx(np.mean(lead), abs=0.006)
    assert float(shown_error) == pytest.approx(error, abs=0.006)
    assert small_tables.block in read(small_tables.folder, 'RESULTS.md')


def test_errors_of_bnaf_end_the_tables(capsys):
    with pytest.raises(SystemExit, match='2'):
        tables.run_bnaf('--train', '--dataset=/none.csv')
    assert capsys.readouterr().err == 'bnaf.py: error: /none.csv: no such table\n'


def test_tables_need_two_seeds(tmp_path, capsys):
    with pytest.raises(SystemExit, match='2'):
        tables.main(['--n_seeds=1', f'--out={tmp_path}'])
    assert '--n_seeds has to be 2 at least' in capsys.readouterr().err


# ---------------------------------------------------------------------------------- learning curves


@pytest.fixture
def resumed_run(tmp_path):
    """A run whose second part begins again at step 2, and ends in the middle of a record."""
    folder = tmp_path / 'run'
    for first, n in ((0, 4), (2, 5)):
        with SummaryWriter(str(folder), filename_suffix=f'.{first}') as writer:
            for step in range(first, first + n):
                writer.add_scalar('loss/train', 10.0 * first + step, step)
            writer.add_scalar('loss/validation', -1.0 - first, first)
    last = only(folder.glob('events*.2'))
    last.write_bytes(last.read_bytes() + b'\x18\0\0\0')
    return folder


def test_scalars_of_a_run_that_was_resumed(resumed_run):
    scalars = curves.read_scalars(resumed_run)
    assert scalars['loss/train'][0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert scalars['loss/train'][2].tolist() == [0, 1, 22, 23, 24, 25, 26]
    assert scalars['loss/validation'][2].tolist() == [-1, -3]


def test_curves_of_two_runs(resumed_run, tmp_path, capsys):
    curves.main([str(resumed_run), f'other={resumed_run}', f'--out={tmp_path}/curves.png'])
    assert (tmp_path / 'curves.png').stat().st_size > 5000
    capsys.readouterr()

    with pytest.raises(SystemExit, match='2'):
        curves.main([str(tmp_path / 'none')])
    error = capsys.readouterr().err
    assert error == f'curves.py: error: {tmp_path}/none holds no events of a training\n'


@pytest.mark.parametrize('order', [1, -1])
def test_the_axis_spans_all_runs(order, resumed_run, tmp_path):
    far = tmp_path / 'far'
    with SummaryWriter(str(far)) as writer:
        for step in range(5):
            writer.add_scalar('loss/train', -100.0, step)

    runs = dict([('far', far), ('run', resumed_run)][::order])
    axes, _ = curves.draw_curves(runs).axes
    labels = {line.get_label() for line in axes.lines}
    assert labels >= {'run, training', 'run, validation', 'far, training'}
    low, high = axes.get_ylim()
    assert low < -26 and high > 100


def record(content):
    """Return a record of an event file, whose checksums are not read."""
    return struct.pack('<QI', len(content), 0) + content + bytes(4)


def scalar(tag, value):
    """Return a record with a scalar at step 1."""
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
    return record(Event(step=1, summary=summary).SerializeToString())


@pytest.mark.parametrize(
    'content',
    [
        record(b'\xff' * 50),
        b'\xff' * 100,
        record(Event(step=1).SerializeToString()),
        scalar('loss/other', 1.0),
        scalar('loss/validation', 1.0),
        scalar('\33[31m', 1.0),
    ],
    ids=['no event', 'no record', 'no scalar', 'other tag', 'no training', 'control characters'],
)
def test_curves_of_what_holds_none(content, tmp_path, capsys):
    (tmp_path / 'events.out.tfevents.1.x').write_bytes(content)
    with pytest.raises(SystemExit, match='2'):
        curves.main([str(tmp_path), f'--out={tmp_path}/curves.png'])
    line = capsys.readouterr().err.removesuffix('\n')
    assert str(tmp_path) in line and line.isprintable()
    assert not (tmp_path / 'curves.png').exists()


@pytest.mark.parametrize(
    'tag,label,sign',
    [
        ('bits_per_dim', 'bits/dim', 1),
        ('loss', 'log-likelihood in nats', -1),
        ('kl', 'KL divergence in nats', 1),
    ],
)
def test_curves_show_the_objective_of_a_run(tag, label, sign, tmp_path):
    (tmp_path / 'events.out.tfevents.1.x').write_bytes(scalar(f'{tag}/train', 2.0))
    axes, _ = curves.draw_curves({'run': tmp_path}).axes
    assert axes.get_ylabel() == label
    assert axes.lines[0].get_ydata().tolist() == [sign * 2.0]


@pytest.mark.parametrize('value', [1.0, float('nan'), float('inf')])
def test_curves_of_one_step(value, tmp_path):
    (tmp_path / 'events.out.tfevents.1.x').write_bytes(scalar('loss/train', value))
    curves.main([str(tmp_path), f'--out={tmp_path}/curves.png'])
    assert (tmp_path / 'curves.png').exists()


# ---------------------------------------------------------------------------- conditional densities


def test_regressions_score_the_known_density(monkeypatch):
    """Of a line with Gaussian noise, and of a target in other units by their logarithm."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2))
    mean = 3 * x[:, 0] - x[:, 1]
    rows = pd.DataFrame({'a': x[:, 0], 'b': 10 * x[:, 1], 'target': mean + rng.normal(size=400)})
    known, test = rows[:300], rows[300:]
    expected = -0.5 * ((rows['target'] - mean)[300:] ** 2 + np.log(2 * np.pi))
    monkeypatch.setattr(conditional, 'BNAFDensity', partial(bnaf.BNAFDensity, n_epochs=150))
    for score in conditional.METHODS.values():
        scores = score(known, test, seed=0)
        assert scores.shape == (100,)
        assert scores.mean() == pytest.approx(expected.mean(), abs=0.15)
        larger = [part.assign(target=7 * part['target']) for part in (known, test)]
        scaled = score(*larger, seed=0)
        assert scaled.mean() == pytest.approx(scores.mean() - np.log(7), abs=0.02)


def test_the_table_of_conditional_densities_says_how_far_bnaf_leads():
    runs = {
        'BNAF': [{'nats': -1.0, 'seconds': 3.0}, {'nats': -3.0, 'seconds': 5.0}],
        'other': [{'nats': -2.0, 'seconds': 1.0}, {'nats': -5.0, 'seconds': 1.0}],
    }
    *_, ours, other = conditional.format_table({'results': runs}).splitlines()
    assert ours == '| BNAF | -2.000 ± 1.000 |  | 4.00 |'
    assert other == '| other | -3.500 ± 1.500 | 1.500 ± 0.500 | 1.00 |'


# ---------------------------------------------------------------------------------------- defaults


@pytest.mark.parametrize('name', known_tables.KNOWN)
def test_known_densities_integrate_to_one(name):
    """By importance sampling from a wider distribution of the same mean and correlation."""
    make, rng = known_tables.KNOWN[name], np.random.default_rng(0)
    if isinstance(make, functools.partial):
        make = functools.partial(known_tables.GaussianTable, 3, **make.keywords)  # three columns
    known = make()
    rows = known.rows(rng, 20_000)
    proposal = stats.multivariate_t(rows.mean(axis=0), 0.8 * np.cov(rows.T), df=3)
    points = proposal.rvs(100_000, random_state=rng)
    with np.errstate(all='ignore'):
        weights = np.exp(
            np.nan_to_num(known.log_prob(points), nan=-np.inf) - proposal.logpdf(points)
        )
    error = weights.std() / math.sqrt(len(weights))
    assert error < 0.03 and weights.mean() == pytest.approx(1, abs=4 * error)


def test_real_tables_are_split_without_overlap(tmp_path):
    for name in known_tables.REAL:
        rows, test, log_p = known_tables.draw_table(name, 100, 1)
        assert len(rows) == 100 and len(test) == len(log_p) > 40 and not log_p.any()
        assert len(np.unique(np.concatenate([rows, test]), axis=0)) == 100 + len(test)

    np.save(tmp_path / 'val.npy', np.arange(30.0).reshape(10, 3))
    rows, test, _ = known_tables.draw_table('MINIBOONE', 6, 0, tmp_path)
    assert rows.shape == (6, 3) and len(np.unique([*rows, *test])) == 30


@pytest.mark.slow
def test_trainings_of_the_defaults_are_made_once(tmp_path, monkeypatch, capsys):
    (tmp_path / 'README.md').write_text('<!-- what defaults.py wrote --><!-- until here -->')
    own = dict(bnaf.OWN_TABLES, hidden_dim=2, batch_size=20, early_stop=1)
    monkeypatch.setattr(bnaf, 'BY_ROWS', {math.inf: own})
    sizes = {'few': {'curved': 40, 'MINIBOONE': 40}, 'more': {'curved': 50}}  # more is not measured
    monkeypatch.setattr(defaults, 'SIZES', sizes)
    monkeypatch.setattr(defaults, 'CHANGES', {'few': {'n_flows': (1,)}, 'more': {}})
    words = ['--sizes', 'few', '--n_seeds=2', f'--out={tmp_path}']
    defaults.main(words)
    measured = json.loads(read(tmp_path, 'defaults.json'))
    runs = {(run['options']['n_flows'], run['seed']): run for run in measured['runs']}
    assert sorted(runs) == [(1, 0), (1, 1), (5, 0), (5, 1)]  # and none without --miniboone

    # what a worker returned is what a user gets
    rows, test, log_p = known_tables.draw_table('curved', 40, 1)
    model = bnaf.BNAFDensity(**own, n_flows=1, seed=1).fit(rows)
    assert runs[1, 1]['gap'] == pytest.approx((log_p - model.score_samples(test)).mean())

    difference = np.mean([runs[1, seed]['gap'] - runs[5, seed]['gap'] for seed in (0, 1)])
    table = defaults.format_table(measured)
    assert f'| `--n_flows=1` | {difference:+.3f} | {difference:+.3f} |' in table
    assert capsys.readouterr().out.endswith(table) and table in read(tmp_path, 'README.md')

    monkeypatch.setattr(defaults, 'fit', None)
    defaults.main(words)
    assert json.loads(read(tmp_path, 'defaults.json')) == measured


def test_a_damaged_file_of_the_defaults_is_refused(tmp_path, capsys):
    for content in ('{', '[]', '{}'):
        (tmp_path / 'defaults.json').write_text(content)
        with pytest.raises(SystemExit, match='2'):
            defaults.main([f'--out={tmp_path}'])
        assert 'defaults.json is damaged: remove it' in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- ablation


@pytest.fixture
def tiny_ablation(tmp_path, monkeypatch):
    """The command line of an ablation of tiny models; its results go to the folder out."""
    write_folder(tmp_path / 'photos')
    write_table(tmp_path / 'photos', attribute_rows())
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'RESULTS.md').write_text('<!-- what ablation.py wrote --><!-- until here -->')
    tiny = dict(image_size=8, n_levels=1, depth=1, width=4, batch_size=4)
    monkeypatch.setattr(ablation, 'MODEL', {**ablation.MODEL, **tiny})
    return [f'--data_dir={tmp_path}/photos', '--n_steps=2', f'--out={out}']


@pytest.mark.slow
def test_an_ablation_that_is_cut_short_goes_on(tiny_ablation, tmp_path, monkeypatch, capsys):
    file = tmp_path / 'out' / 'ablation.json'

    def write_and_interrupt(path, content):
        write_json(path, content)
        if len(content['runs']) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr(ablation, 'write_json', write_and_interrupt)
        ablation.main(tiny_ablation)
    cut_short = json.loads(file.read_text())
    assert len(cut_short['runs']) == 5 and not (file.parent / 'ablation.png').exists()

    ablation.main(tiny_ablation)
    measured = json.loads(file.read_text())
    assert measured['runs'][:5] == cut_short['runs'] and len(measured['runs']) == 12
    variants = {(run['coupling'], run['permutation'], run['seed']) for run in measured['runs']}
    assert len(variants) == 12 and all(run['steps'] == [1, 2] for run in measured['runs'])
    assert len({run['test'] for run in measured['runs']}) == 12
    assert (file.parent / 'ablation.png').stat().st_size > 10_000
    table = ablation.format_table(measured)
    assert capsys.readouterr().out.endswith(table) and table in read(file.parent, 'RESULTS.md')

    # what a worker returned is what the script itself trains
    run = measured['runs'][-1]
    variant = {key: run[key] for key in ('coupling', 'permutation', 'seed')}
    again = ablation.train(measured['settings'], str(tmp_path / 'photos'), variant)
    assert {**again, 'minutes': 0} == {**run, 'minutes': 0}


def ablation_runs(permutation, additive, affine):
    """Return trainings of two seeds whose test scores are given."""
    runs = []
    for coupling, scores in (('additive', additive), ('affine', affine)):
        for seed, test in enumerate(scores):
            run = dict(coupling=coupling, permutation=permutation, seed=seed, test=test)
            curve = dict(steps=[1, 2], validation=[9.0, test])
            runs.append({**run, **curve, 'parameters': 1234, 'minutes': 2.04})
    return runs


def test_the_table_of_the_ablation_compares_seed_by_seed():
    runs = ablation_runs('conv1x1', (2.5, 2.7), (2.0, 2.1))[::-1]
    runs += ablation_runs('reverse', (4.0, 4.2), (3.0, 3.4))
    runs += ablation_runs('shuffle', (3.0, 3.3), (2.5, 2.7))
    results = {'n_seeds': 2, 'runs': runs}
    lines = ablation.format_table(results).splitlines()[2:]
    assert [line.split(' | ')[0] for line in lines] == [
        '| reverse',
        '| shuffle',
        '| 1x1 convolution',
    ]
    assert lines[1] == (
        '| shuffle | 3.1500 ± 0.1500 (0.9500 ± 0.0500) | 2.6000 ± 0.1000 (0.6000 ± 0.1000) '
        '| 0.5500 ± 0.0500 | 1,234 and 1,234 | 2.0 and 2.0 |'
    )
    assert '(' not in lines[0] and '2.6000 ± 0.1000 (0.5500 ± 0.0500)' in lines[2]

    (axes,) = ablation.draw(results).axes
    curves_of = {line.get_label(): line for line in axes.lines}
    assert list(curves_of['shuffle, additive'].get_ydata()) == [9, pytest.approx(3.15)]
    assert curves_of['shuffle, affine'].get_linestyle() == '-'
    assert len({line.get_color() for line in axes.lines}) == 3


def test_trainings_of_other_settings_are_not_kept(tmp_path, capsys):
    file = tmp_path / 'ablation.json'
    assert ablation.load_runs(file, {'n_steps': 2}) == []
    file.write_text(json.dumps({'settings': {'n_steps': 2}, 'runs': [1]}))
    assert ablation.load_runs(file, {'n_steps': 2}) == [1]
    assert ablation.load_runs(file, {'n_steps': 3}) == []
    assert 'all trainings start anew' in capsys.readouterr().out
    file.write_text('{')
    with pytest.raises(UserError, match='ablation.json is damaged: remove it'):
        ablation.load_runs(file, {})


@pytest.mark.parametrize(
    'words,message',
    [
        (['--n_seeds=1'], '--n_seeds has to be 2 at least'),
        (['--n_steps=0'], '--n_steps and --n_workers have to be 1 at least'),
        ([], 'ablation.py: error: /none'),
    ],
)
def test_an_ablation_that_cannot_begin(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match='2'):
        ablation.main(['--data_dir=/none', f'--out={tmp_path}', *words])
    assert message in capsys.readouterr().err
