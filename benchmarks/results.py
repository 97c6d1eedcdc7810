"""What runs have reached, as data and as the README's table: read from their folders into images/results.json.

    python benchmarks/results.py                                        the table again, from what is there
    python benchmarks/results.py results/RUN "my model=results/RUN"     and these runs, new or in place of older ones

A run is kept under the name before its =, else under its data set and its model. It is read from what training leaves in
its folder: results.json, best.pt, and tensorboard's events for the steps and the minutes, pauses left out.
"""

import argparse
import json
import math
import sys
from dataclasses import fields
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from curves import read_scalars
from report import insert, table
from timing import machine_name

import bnaf
import glow
from common.errors import UserError

SCRIPTS = {'glow.py': glow, 'bnaf.py': bnaf}
SCORES = {'bits_per_dim': 'bits/dim', 'log_likelihood_nats': 'nats', 'kl_nats': 'nats of KL'}
# Of a test split: whose, how much, where published. They were read in transcriptions of these papers.
PEERS = {
    'mnist': [
        ('RealNVP', 1.06, 'arXiv 1810.01367'),
        ('Glow', 1.05, 'arXiv 1810.01367'),
        ('FFJORD', 0.99, 'arXiv 1810.01367'),
    ],
    'bsds300': [
        ('BNAF', 157.36, 'arXiv 1904.04676'),
        ('NAF', 157.73, 'arXiv 1904.04676'),
        ('RQ-NSF', 157.31, 'arXiv 1906.04032'),
    ],
}


def read_run(folder):
    """-> script, checkpoint with a config of the script as it is now, results, scalars; raises UserError"""
    try:
        results = json.loads((folder / 'results.json').read_text())
        saved = torch.load(folder / 'best.pt', map_location='cpu', weights_only=True)
        script = SCRIPTS[saved['script']]
        known = {
            f.name for f in fields(script.Config)
        }  # an older version may have had fewer options, or others
        saved['config'] = script.Config(
            **{name: value for name, value in saved['config'].items() if name in known}
        )
        scalars = read_scalars(folder)
    except Exception as error:  # a damaged file fails in too many ways to list
        raise UserError(
            f'{folder} is not a run that was evaluated: {str(error).splitlines()[0]}'
        ) from None
    if results['step'] != saved['step'] or not scalars:
        raise UserError(
            f'{folder}: results.json is of another checkpoint than best.pt: run --evaluate'
            if scalars
            else f'{folder} holds no events of a training'
        )
    return script, saved, results, scalars


def describe(script, config, dims):
    """-> the data and the model, in words"""
    name = Path(config.dataset).stem
    if script is glow:
        return (
            f'{name}, {dims[1]}x{dims[2]}, {config.n_bits} bits',
            f'Glow: {config.n_levels} splits, depth {config.depth}, width {config.width}'
            + ', bf16' * config.bf16,
        )
    return name, (
        f'BNAF: {config.n_flows} flow{"s" * (config.n_flows > 1)}, {config.n_hidden + 1} hidden layers of '
        f'{config.hidden_dim} a column'
    )


def command(script, config, world_size):
    """-> what trained it: the options that are not the data set's defaults, and of paths of data the names alone"""
    defaults = script.DEFAULTS.get(config.dataset, {})
    words = [
        f'torchrun --nproc_per_node={world_size}' if world_size > 1 else 'python',
        f'{script.NAME}.py',
        '--train',
    ]
    for f in fields(config):
        value = getattr(config, f.name)
        if value != defaults.get(f.name, f.default):
            text = 'DATA' if f.name == 'data_dir' else Path(value).name if f.type is str else value
            words.append(f'--{f.name}' if f.type is bool else f'--{f.name}={text}')
    return ' '.join(words)


def collect(folder, name, machine):
    """-> the name of a run, and its row: minutes of training and validating, the score with two standard errors"""
    script, saved, results, scalars = read_run(folder)
    config, dims = saved['config'], saved['input_dims']
    data, model = describe(script, config, dims)
    key = next(key for key in SCORES if key in results)
    steps, minutes = (max(points[k][-1] for points in scalars.values()) for k in (0, 1))
    return name or f'{data}, {model}', {
        'data': name or data,
        'model': model,
        'parameters': sum(p.numel() for p in script.build_model(config, dims).parameters()),
        'score': results[key],
        'two_standard_errors': results['two_standard_errors'],
        'unit': SCORES[key],
        'effective_sample_size': results.get('effective_sample_size'),
        'n_test': results.get('n_rows', results.get('n_images')),
        'peers': PEERS.get(config.dataset, []),
        'best_step': results['step'],
        'steps': int(steps),
        'minutes': minutes,
        'machine': machine,
        'command': command(script, config, saved.get('world_size', 1)),
    }


def score_text(row):
    digits = max(2, math.ceil(-math.log10(row['two_standard_errors'] / 2)))
    share = row['effective_sample_size']
    return f'{row["score"]:.{digits}f} ± {row["two_standard_errors"]:.{digits}f} {row["unit"]}' + (
        f', {share:.1%} effective' if share else ''
    )


def peers_text(peers):
    sources = dict.fromkeys(source for *_, source in peers)
    return '; '.join(
        ', '.join(f'{name} {figure}' for name, figure, where in peers if where == source)
        + f' ({source})'
        for source in sources
    )


def markdown(rows):
    head = (
        'data',
        'model',
        'parameters',
        'test score',
        'published',
        'best at step',
        'minutes',
        'machine',
        'command',
    )
    return table(
        head,
        [
            [
                row['data'],
                row['model'],
                f'{row["parameters"]:,}',
                score_text(row),
                peers_text(row['peers']),
                f'{row["best_step"]:,} of {row["steps"]:,}',
                f'{row["minutes"]:.1f}',
                row['machine'],
                f'`{row["command"]}`',
            ]
            for row in rows.values()
        ],
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'runs', nargs='*', metavar='[NAME=]RUN', help='folders of runs of one of the scripts'
    )
    parser.add_argument(
        '--machine', help='what trained them (default: this machine, its threads and torch)'
    )
    parser.add_argument(
        '--out',
        default=ROOT / 'images',
        type=Path,
        metavar='DIR',
        help='where results.json is; its table goes to the README.md beside DIR, if there is one',
    )
    args = parser.parse_args(argv)
    path, page = args.out / 'results.json', args.out.parent / 'README.md'
    machine = args.machine or f'{machine_name()}, torch {torch.__version__.split("+")[0]}'
    try:
        rows = json.loads(path.read_text()) if path.exists() else {}
        for run in args.runs:
            name, _, folder = run.rpartition('=')
            rows.update([collect(Path(folder), name, machine)])
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + '\n')
        if page.exists():
            insert(page, 'results.py', markdown(rows))
    except (UserError, ValueError, OSError) as error:
        print(f'results.py: error: {error}', file=sys.stderr)
        sys.exit(2)
    print(markdown(rows), end='')


if __name__ == '__main__':
    main()
