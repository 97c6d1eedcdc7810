"""The benchmarks: they run on tiny shapes without the peers, and their tables say what their JSON says."""

import json
import shlex
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.utils import Bunch
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from torch.distributions import MultivariateNormal

import bnaf
import glow
from common.options import resolve_config
from datasets.tabular import load_table

import curves
import faults
import processes
import results
import speed
import tables
from contenders import bisect
from report import insert, significant, targets_table
from targets import CHECKPOINT_TIME, absolute_checks, target_of
from timing import in_turn

CPU = torch.device('cpu')


def cells(text, heading):
    """The lines of the table under a heading, split into cells"""
    part = text.split(f'### {heading}\n')[1].strip().split('\n\n')[0]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in part.splitlines()[2:]]


def test_quick_run_without_peers(tmp_path, monkeypatch, capsys):
    for peer in ('normflows', 'pyro', 'zuko'):
        monkeypatch.setitem(sys.modules, peer, None)  # importing it fails
    glow_shape, bnaf_shape = speed.SMALLEST['glow'], speed.SMALLEST['bnaf']
    monkeypatch.setattr(speed, 'GLOW', {'a': glow_shape})
    monkeypatch.setattr(speed, 'BNAF', {'b': bnaf_shape})
    monkeypatch.setattr(
        speed,
        'SWEEPS',
        {'glow': (glow_shape, dict(depth=(1, 2))), 'bnaf': (bnaf_shape, dict(data_dim=(2, 4)))},
    )
    monkeypatch.setattr(speed, 'TABLE_SHAPE', (20_000, 2))
    monkeypatch.setattr(
        speed,
        'memory_of',
        lambda script, shape, name: 50.0 if 'checkpoint_grads' in name else 100.0,
    )
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    speed.main(['--quick', '--out', str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(f'{peer} is not installed' in printed for peer in ('normflows', 'pyro', 'zuko'))

    results, text = (
        json.loads((tmp_path / 'speed.json').read_text()),
        (tmp_path / 'speed.md').read_text(),
    )
    assert (tmp_path / 'scaling.png').stat().st_size > 10_000
    assert [(row['script'], row['quantity']) for row in results['rows']] == [
        ('glow', 'training'),
        ('glow', 'evaluation'),
        ('glow', 'sampling'),
        ('bnaf', 'training'),
        ('bnaf', 'evaluation'),
        ('bnaf', 'sampling'),
    ]
    for row in results['rows']:
        names = {'training': 'training step'}.get(row['quantity'], row['quantity'])
        lines = cells(
            text, f'{row["script"].replace("glow", "Glow").replace("bnaf", "BNAF")}: {names}'
        )
        assert [line[1].removeprefix('**ours**, ') for line in lines] == [
            entry['name'] for entry in row['entries']
        ]
        for line, entry in zip(lines, row['entries']):
            assert line[2:4] == [f'{entry["parameters"]:,}', significant(entry['per_second'])]
            assert entry['per_second'] == pytest.approx(row['n'] / entry['seconds'])
            bisected = (row['script'], row['quantity']) == ('bnaf', 'sampling') and entry[
                'name'
            ] != 'bisection'
            assert (
                bool(line[4]) == bool(entry['ratio']) == bisected
            )  # else there is nobody to compare to
            if row['gflop'] is not None:
                assert entry['gflops'] == pytest.approx(row['gflop'] / entry['seconds'])
                assert line[7:] == [significant(entry['gflops']), f'{entry["fraction"]:.0%}']
    assert [command['n_steps'] for command in results['commands'][:2]] == [10, 10]  # cut short
    for line, command in zip(cells(text, 'The real commands'), results['commands'], strict=True):
        assert (
            line[0] == f'`{command["script"]}.py --train {command["words"]}`'
            and 0 < command['overhead'] < 1
        )
        assert line[3:] == [
            f'{command["overhead"]:.1%}',
            f'under {command["target"]:.0%}',
            'met' if command['met'] else '**missed**',
        ]
    assert [line[2] for line in cells(text, 'Glow: peak memory of training')] == [
        significant(entry['mib']) for entry in results['memory'][0]['entries']
    ]


def test_memory_in_a_process_of_its_own():
    shape = dict(data_dim=4, n_flows=1, n_hidden=1, hidden_dim=8, batch_size=10_000)
    layer = 10_000 * 4 * 8 * 4 / 2**20  # MiB of a hidden layer's units
    assert speed.memory_of('glow', speed.SMALLEST['glow'], 'float32') >= 0
    assert (
        2 * layer < speed.memory_of('bnaf', shape, 'float32') < 60 * layer
    )  # torch alone would be 200 of them


def test_functions_run_in_turn():
    calls = []
    times = in_turn(
        {name: lambda name=name: calls.append(name) for name in 'ab'}, CPU, budget=0, least=2
    )
    assert {name: len(of) for name, of in times.items()} == {'a': 2, 'b': 2}
    changes = [name for k, name in enumerate(calls) if k == 0 or name != calls[k - 1]]
    assert ''.join(changes) == 'ababab'  # warm-up, then two rounds


def test_targets():
    assert target_of('cpu', 'bnaf', 'training', 'b2', 'compile') == 18
    assert target_of('cpu', 'glow', 'training', 'c', 'float32') == 1.3
    assert target_of('cuda', 'glow', 'training', 'A64', 'bf16 compile') == 4
    assert target_of('cpu', 'glow', 'memory', 'a', 'bf16 checkpoint_grads') == 0.35
    assert (
        target_of('cpu', 'glow', 'training', 'a', 'checkpoint_grads') is None
        and CHECKPOINT_TIME > 1
    )
    entries = [
        {'name': 'bf16', 'per_second': 1999.0, 'fraction': None},
        {'name': 'bf16 compile', 'per_second': 2001.0},
    ]
    rows = [{'config': 'A16', 'quantity': 'training', 'entries': entries}]
    memory = [{'config': 'C16', 'entries': [{'name': 'checkpoint_grads', 'mib': 13 * 1024}]}]
    checks = absolute_checks(rows, memory)
    assert [(check['value'], check['met']) for check in checks] == [
        (2001, True),
        (13 * 1024, False),
    ]


@pytest.mark.parametrize('residual', ['gated', 'none'])
def test_bisection_inverts(residual):
    model = bnaf.build_model(bnaf.Config(residual=residual, n_flows=2, hidden_dim=5), [3]).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    with torch.no_grad():
        assert (bisect(model, model(x)[0], tol=1e-9) - x).abs().max() < 1e-6


def test_communication():
    """One ring of 8 GPUs moves 2 * 7 / 8 of the bytes over NVLink; what is hidden costs nothing but its ends"""
    size = 450_000_000
    assert processes.all_reduce(size, 8)[0] == pytest.approx(1.75e-3)
    ring, levels = processes.all_reduce(size, 64)
    assert ring == pytest.approx(2 * 63 / 64 * size / 50e9)
    assert levels == pytest.approx(1.75e-3 + 2 * 7 / 8 * size / 8 / 50e9)
    assert processes.overlapped(3.0, 2.0, 0.0, size) == 3
    hidden, exposed = (processes.overlapped(3.0, 2.0, reduce, size) for reduce in (0.5, 5.0))
    assert 3 < hidden < 3.1 and 1 + 5 < exposed < 1 + 5 + 2 * 0.1


def test_step_times_are_assumed_until_measured():
    entries = [
        {'name': name, 'seconds': s}
        for name, s in (
            ('normflows', 0.001),
            ('float32', 0.03),
            ('bf16', 0.02),
            ('checkpoint_grads', 0.05),
            ('bf16 checkpoint_grads', 0.04),
        )
    ]
    rows = [
        {'config': config, 'quantity': 'training', 'entries': entries} for config in ('A16', 'C16')
    ]
    measured = {'rows': rows, 'machine': {'device': 'a GPU', 'peers': {'normflows': '1'}}}
    assert processes.step_time('A', 1e12, measured) == (0.02, 'measured on a GPU (bf16)')
    assert processes.step_time('C', 1e12, measured) == (
        0.04,
        'measured on a GPU (bf16 checkpoint_grads)',
    )
    assert processes.step_time('A', 1e12, None) == (16e12 / processes.ASSUMED_FLOPS, 'assumed')


def test_pages_are_written_between_their_marks(tmp_path):
    page = tmp_path / 'README.md'
    page.write_text(
        ''.join(
            f'above\n<!-- what {name} wrote -->\nold\n<!-- until here -->\nbelow\n' for name in 'ab'
        )
    )
    for text in ('new', 'newer'):
        insert(page, 'a', text)
    assert page.read_text() == (
        'above\n<!-- what a wrote -->\n\nnewer\n<!-- until here -->\nbelow\n'
        'above\n<!-- what b wrote -->\nold\n<!-- until here -->\nbelow\n'
    )
    with pytest.raises(ValueError, match='has no <!-- what c wrote'):
        insert(page, 'c', 'text')


def test_the_readme_shows_what_was_measured():
    folder = Path(speed.__file__).parent
    table = targets_table(json.loads((folder / 'speed.json').read_text()))
    readme = (folder.parent / 'README.md').read_text()
    assert table in (folder / 'speed.md').read_text() and table in readme
    for script in (results, tables, faults):
        measured = json.loads((folder.parent / 'images' / f'{script.__name__}.json').read_text())
        assert (
            f'<!-- what {script.__name__}.py wrote -->\n\n{script.markdown(measured)}\n<!-- until here -->'
            in readme
        )


def test_results_of_a_run(tmp_path, capsys):
    """Its row holds what its folder says; its name replaces it; what is no evaluated run is refused"""
    (tmp_path / 'images').mkdir()
    (tmp_path / 'README.md').write_text('<!-- what results.py wrote --><!-- until here -->')
    np.save(tmp_path / 'mine.npy', np.random.default_rng(0).normal(size=(100, 3)))
    words = ['--n_epochs=3', '--batch_size=10', '--n_flows=2', '--hidden_dim=4', '--lr=0.005']
    bnaf.main(
        ['--train', f'--dataset={tmp_path}/mine.npy', f'--output_dir={tmp_path}/runs', *words]
    )
    (run,) = (tmp_path / 'runs').iterdir()
    capsys.readouterr()
    for name in ('', 'a name=', 'a name='):
        results.main([f'{name}{run}', f'--out={tmp_path}/images', '--machine=one core'])
    rows, measured = (
        json.loads(path.read_text())
        for path in (tmp_path / 'images/results.json', run / 'results.json')
    )
    assert list(rows) == ['mine, BNAF: 2 flows, 2 hidden layers of 4 a column', 'a name']
    row, saved = rows['a name'], bnaf.load_checkpoint(run / 'best.pt')
    assert (row['score'], row['best_step'], row['steps']) == (
        measured['log_likelihood_nats'],
        saved['step'],
        24,
    )
    assert row['parameters'] == sum(p.numel() for p in bnaf.restore_model(saved, CPU).parameters())
    assert row['command'] == ' '.join(
        [
            'python bnaf.py --train --dataset=mine.npy --n_flows=2 --hidden_dim=4 --n_epochs=3',
            '--batch_size=10 --lr=0.005',
        ]
    )
    printed = capsys.readouterr().out
    assert (
        printed.endswith(results.markdown(rows))
        and results.markdown(rows) in (tmp_path / 'README.md').read_text()
    )
    (run / 'results.json').write_text(json.dumps({**measured, 'step': saved['step'] + 1}))
    for folder, message in (
        (run, 'of another checkpoint than best.pt'),
        (tmp_path, 'not a run that was evaluated'),
    ):
        with pytest.raises(SystemExit, match='2'):
            results.main([str(folder), f'--out={tmp_path}/images'])
        error = capsys.readouterr().err
        assert (
            error.startswith('results.py: error: ') and message in error and error.count('\n') == 1
        )


@pytest.mark.parametrize(
    'script,given',
    [
        (glow, {}),
        (glow, dict(dataset='mnist', n_levels=2, lr=5e-3, lr_decay=0.33, bf16=True)),
        (bnaf, {}),
        (bnaf, dict(dataset='u2', lr=1e-3)),
        (bnaf, dict(dataset='bsds300', n_epochs=3, seed=10**7, dequantize=True)),
    ],
)
def test_commands_give_back_their_configs(script, given):
    words = [
        '--train',
        *(f'--{name}' if value is True else f'--{name}={value}' for name, value in given.items()),
    ]
    config = resolve_config(script.Config, script.parse_args(words)[1], script.DEFAULTS, None, ())
    line = results.command(script, config, 1)
    assert (
        resolve_config(
            script.Config, script.parse_args(shlex.split(line)[2:])[1], script.DEFAULTS, None, ()
        )
        == config
    )
    assert all(f'--{name}' in line for name in given) and line.count('--') == 1 + len(given)
    elsewhere = results.command(script, replace(config, data_dir='/somewhere/else'), 2)
    assert elsewhere.startswith('torchrun --nproc_per_node=2 ') and '--data_dir=DATA' in elsewhere


def test_scores_and_figures_of_others():
    row = {
        'score': 1.70002,
        'two_standard_errors': 0.00747,
        'unit': 'bits/dim',
        'effective_sample_size': None,
    }
    assert results.score_text(row) == '1.700 ± 0.007 bits/dim'
    assert results.score_text({**row, 'two_standard_errors': 0.0131}).startswith('1.700 ± 0.013')
    row = {
        'score': 0.00139,
        'two_standard_errors': 0.00038,
        'unit': 'nats of KL',
        'effective_sample_size': 0.998,
    }
    assert results.score_text(row) == '0.0014 ± 0.0004 nats of KL, 99.8% effective'
    assert results.score_text({**row, 'score': 32.434, 'two_standard_errors': 3.69}).startswith(
        '32.43 ± 3.69'
    )
    assert results.peers_text([('A', 1.5, 'here'), ('B', 2.0, 'there'), ('C', 3.0, 'here')]) == (
        'A 1.5, C 3.0 (here); B 2.0 (there)'
    )


def test_tables_are_scored_alike(tmp_path, monkeypatch):
    """Splits and units are the same for all; benign rows are told from others far away; the table says by how much"""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(300, 2)).round(2) * (1, 50) + 100 * (np.arange(300) < 100)[:, None]
    monkeypatch.setattr(
        tables,
        'TABLES',
        {
            'breast_cancer': lambda: Bunch(
                data=data,
                feature_names=['a', 'b'],
                target=1 * (np.arange(300) >= 100),
                target_names=['malignant', 'benign'],
            )
        },
    )
    monkeypatch.setattr(
        tables, 'SETTINGS', {'short': ['--n_flows=1', '--hidden_dim=2', '--n_epochs=20']}
    )
    monkeypatch.setattr(tables, 'PEERS', {'Gaussian': tables.gaussian})
    tables.main(['--n_seeds=2', f'--out={tmp_path}'])
    measured = json.loads((tmp_path / 'tables.json').read_text())
    runs = measured['results']['benign']
    assert measured['shapes'] == {
        'breast_cancer': [300, 2],
        'malignant': [100, 2],
        'benign': [200, 2],
    }
    assert all(run['auroc'] == 1 for run in runs['Gaussian'])

    tables.write_tables(tmp_path)
    split = load_table(str(tmp_path / 'benign.csv'), seed=1)
    known, test = (
        torch.tensor(part * split.std + split.mean)
        for part in (np.concatenate([split.train, split.validation]), split.test)
    )
    added = runs['Gaussian'][1]['reg_covar'] * torch.tensor(split.std**2).diag()
    expected = (
        MultivariateNormal(known.mean(0), known.T.cov(correction=0) + added)
        .log_prob(test)
        .mean()
        .item()
    )
    assert runs['Gaussian'][1]['nats'] == pytest.approx(expected, abs=1e-4)
    bnaf.main(
        [
            '--train',
            f'--dataset={tmp_path}/benign.csv',
            f'--output_dir={tmp_path}/own',
            '--seed=1',
            *tables.SETTINGS['short'],
        ]
    )
    own = json.loads(next(tmp_path.glob('own/*/results.json')).read_text())
    assert runs['short'][1]['nats'] == pytest.approx(own['log_likelihood_nats'])

    cell = tables.markdown(measured).splitlines()[2].split('|')[3].split()
    lead = [a['nats'] - b['nats'] for a, b in zip(runs['short'], runs['Gaussian'])]
    assert float(cell[3].strip('(')) == pytest.approx(np.mean(lead), abs=0.006)
    assert float(cell[5].strip(')')) == pytest.approx(abs(lead[0] - lead[1]) / 2, abs=0.006)


def test_errors_of_bnaf_end_the_tables(capsys):
    with pytest.raises(SystemExit, match='2'):
        tables.run('--train', '--dataset=/none.csv')
    assert capsys.readouterr().err == 'bnaf.py: error: /none.csv: no such table\n'


def test_curves_of_a_run_that_was_resumed(tmp_path, capsys):
    """Its second part begins again at step 2; a file that ends in the middle of a record loses that alone"""
    for first, n in ((0, 4), (2, 5)):
        writer = SummaryWriter(str(tmp_path), filename_suffix=f'.{first}')
        for step in range(first, first + n):
            writer.add_scalar('loss/train', 10.0 * first + step, step)
        writer.add_scalar('loss/validation', -1.0 - first, first)
        writer.close()
    last = max(tmp_path.glob('events*'), key=lambda path: path.name[-1])
    last.write_bytes(last.read_bytes() + b'\x18\0\0\0')
    scalars = curves.read_scalars(tmp_path)
    assert scalars['loss/train'][0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert scalars['loss/train'][2].tolist() == [0, 1, 22, 23, 24, 25, 26]
    assert scalars['loss/validation'][2].tolist() == [-1, -3]
    curves.main([str(tmp_path), f'other={tmp_path}', f'--out={tmp_path}/curves.png'])
    assert (tmp_path / 'curves.png').stat().st_size > 5000
    with pytest.raises(SystemExit, match='2'):
        curves.main([str(tmp_path / 'none')])
    assert (
        capsys.readouterr().err
        == f'curves.py: error: {tmp_path}/none holds no events of a training\n'
    )
    with SummaryWriter(str(tmp_path / 'far')) as writer:
        for step in range(5):
            writer.add_scalar('loss/train', -100.0, step)
    for order in (1, -1):
        axes, _ = curves.draw(dict([('far', tmp_path / 'far'), ('run', tmp_path)][::order])).axes
        assert {line.get_label() for line in axes.lines} >= {
            'run, training',
            'run, validation',
            'far, training',
        }
        assert axes.get_ylim()[0] < -26 and axes.get_ylim()[1] > 100


def record(content):
    return struct.pack('<QI', len(content), 0) + content + bytes(4)


def scalar(tag, value):
    return record(
        Event(
            step=1, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        ).SerializeToString()
    )


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
)
def test_curves_of_what_holds_none(content, tmp_path, capsys):
    (tmp_path / 'events.out.tfevents.1.x').write_bytes(content)
    with pytest.raises(SystemExit, match='2'):
        curves.main([str(tmp_path), f'--out={tmp_path}/curves.png'])
    line = capsys.readouterr().err.removesuffix('\n')
    assert str(tmp_path) in line and line.isprintable() and not (tmp_path / 'curves.png').exists()


@pytest.mark.parametrize('value', [1.0, float('nan'), float('inf')])
def test_curves_of_one_step(value, tmp_path):
    (tmp_path / 'events.out.tfevents.1.x').write_bytes(scalar('loss/train', value))
    curves.main([str(tmp_path), f'--out={tmp_path}/curves.png'])
    assert (tmp_path / 'curves.png').exists()


def test_tables_need_two_seeds(tmp_path, capsys):
    with pytest.raises(SystemExit, match='2'):
        tables.main(['--n_seeds=1', f'--out={tmp_path}'])
    assert '--n_seeds has to be 2 at least' in capsys.readouterr().err
