"""What runs have reached: kept in results.json, and shown as a table in RESULTS.md.

    python benchmarks/results.py                        write the table again
    python benchmarks/results.py results/RUN            add a run, or replace one of the same name
    python benchmarks/results.py "my model=results/RUN" ... under a name of your own

Without a name of its own a run is called by its data set and its model. It is read from what
training leaves in its folder: results.json, best.pt and, for the steps and the minutes, the
TensorBoard events. Pauses of a run that was resumed do not count.
"""

import argparse
import json
import math
import sys
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType

import numpy as np
import torch

# The scripts are in the folder above this one.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from curves import read_scalars
from pages import insert, table
from timing import machine_name

import bnaf
import glow
from common.errors import UserError, one_line
from common.options import as_typed
from datasets import PHOTO_DATASETS
from datasets.own_tables import is_own_table

HERE = Path(__file__).resolve().parent
SCRIPTS = {'glow.py': glow, 'bnaf.py': bnaf}
UNITS = {'bits_per_dim': 'bits/dim', 'log_likelihood_nats': 'nats', 'kl_nats': 'nats of KL'}
# Published scores on a test split, and where. They were read in transcriptions of these papers.
PEERS = {
    'mnist': [
        ('RealNVP', 1.06, 'arXiv 1810.01367'),
        ('Glow', 1.05, 'arXiv 1810.01367'),
        ('FFJORD', 0.99, 'arXiv 1810.01367'),
    ],
    'cifar10': [('Glow', 3.35, 'arXiv 1807.03039')],
    'power': [
        ('BNAF', 0.61, 'arXiv 1904.04676'),
        ('NAF', 0.62, 'arXiv 1904.04676'),
        ('RQ-NSF', 0.66, 'arXiv 1906.04032'),
    ],
    'gas': [
        ('BNAF', 12.06, 'arXiv 1904.04676'),
        ('NAF', 11.96, 'arXiv 1904.04676'),
        ('RQ-NSF', 13.09, 'arXiv 1906.04032'),
    ],
    'hepmass': [
        ('BNAF', -14.71, 'arXiv 1904.04676'),
        ('NAF', -15.09, 'arXiv 1904.04676'),
        ('RQ-NSF', -14.01, 'arXiv 1906.04032'),
    ],
    'miniboone': [
        ('BNAF', -8.95, 'arXiv 1904.04676'),
        ('NAF', -8.86, 'arXiv 1904.04676'),
        ('RQ-NSF', -9.22, 'arXiv 1906.04032'),
    ],
    'bsds300': [
        ('BNAF', 157.36, 'arXiv 1904.04676'),
        ('NAF', 157.73, 'arXiv 1904.04676'),
        ('RQ-NSF', 157.31, 'arXiv 1906.04032'),
    ],
}
# What a folder's files raise if they are missing, damaged or of something else than a run:
# json, torch.load with its unpickler and its zip reader, and the look-ups in what these return.
READ_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    RuntimeError,
    UnpicklingError,
    UserError,
)

# -------------------------------------------------------------------------------------------- runs


@dataclass
class Run:
    """What training and evaluation left in a run's folder."""

    script: ModuleType  # glow or bnaf
    config: glow.Config | bnaf.Config
    saved: dict  # best.pt
    scores: dict  # results.json
    scalars: dict[str, np.ndarray]  # the TensorBoard events, as curves.read_scalars returns them


def read_run(folder: Path) -> Run:
    """Read the folder of a run. Raises ``UserError`` where it was not trained and evaluated."""
    try:
        scores = json.loads((folder / 'results.json').read_text())
        saved = torch.load(folder / 'best.pt', map_location='cpu', weights_only=True)
        script = SCRIPTS[saved['script']]
        config = restore_config(script, saved['config'])
        is_of_checkpoint = scores['step'] == saved['step']
        scalars = read_scalars(folder)
    except READ_ERRORS as error:
        raise UserError(f'{folder} is not a run that was evaluated: {one_line(error)}') from error

    if not scalars:
        raise UserError(f'{folder} holds no events of a training')
    if not is_of_checkpoint:
        raise UserError(
            f'{folder}: results.json is of another checkpoint than best.pt: run --evaluate'
        )
    return Run(script, config, saved, scores, scalars)


def restore_config(script: ModuleType, saved: dict) -> glow.Config | bnaf.Config:
    """Return a config of the script as it is now; other versions of it had other options."""
    known = {field.name for field in fields(script.Config)}
    options = {name: value for name, value in saved.items() if name in known}
    return script.Config(**options)


def summarize(run: Run, name: str, machine: str) -> dict:
    """Return a run's row of the table; ``name``, if given, stands for its data."""
    score_key = next(key for key in UNITS if key in run.scores)
    steps = max(points[0, -1] for points in run.scalars.values())
    minutes = max(points[1, -1] for points in run.scalars.values())
    model = run.script.build_model(run.config, run.saved['input_dims'])
    return {
        'data': name or describe_data(run),
        'model': describe_model(run),
        'parameters': model.n_parameters,
        'score': run.scores[score_key],
        'two_standard_errors': run.scores['two_standard_errors'],
        'unit': UNITS[score_key],
        'effective_sample_size': run.scores.get('effective_sample_size'),
        'n_test': run.scores.get('n_rows', run.scores.get('n_images')),
        'peers': PEERS.get(run.config.dataset, []),
        'best_step': run.scores['step'],
        'steps': int(steps),
        'minutes': minutes,
        'machine': machine,
        'command': training_command(run.script, run.config, run.saved['first_world_size']),
    }


def describe_data(run: Run) -> str:
    name = Path(run.config.dataset).stem
    if run.script is bnaf:
        return name
    _, height, width, _ = run.saved['input_dims']
    return f'{name}, {height}x{width}, {run.config.n_bits} bits'


def describe_model(run: Run) -> str:
    config = run.config
    if run.script is glow:
        splits = 'split' if config.n_levels == 1 else 'splits'
        text = f'Glow: {config.n_levels} {splits}, depth {config.depth}, width {config.width}'
        for option, default in (('coupling', 'affine'), ('permutation', 'conv1x1')):
            value = getattr(config, option)
            if value != default:
                text += f', {value}'
        if config.condition:
            text += f', given {",".join(config.condition)}'
        return f'{text}, bf16' if config.bf16 else text
    flows = 'flow' if config.n_flows == 1 else 'flows'
    n_layers = config.n_hidden + 1
    layers = 'layer' if n_layers == 1 else 'layers'
    layers = f'{n_layers} hidden {layers} of {config.hidden_dim} per column'
    return f'BNAF: {config.n_flows} {flows}, {layers}'


def training_command(script: ModuleType, config: glow.Config | bnaf.Config, world_size: int) -> str:
    """Return the command that trains with a config, without the data set's defaults.

    Of paths only the names are kept, and ``DATA`` stands for the folder of the data. For a table of
    the user's own, and for photos, options whose defaults depend on their number are always there.
    """
    launcher = 'python' if world_size == 1 else f'torchrun --nproc_per_node={world_size}'
    words = [launcher, f'{script.NAME}.py', '--train']
    defaults = script.DEFAULTS.get(config.dataset, {})
    always: Collection[str] = ()
    if is_own_table(config.dataset):
        always = bnaf.TABLE_OPTIONS
    elif config.dataset in PHOTO_DATASETS:
        always = glow.PHOTO_OPTIONS
    for field in fields(config):
        value = getattr(config, field.name)
        is_default = value == defaults.get(field.name, field.default)
        if is_default and field.name not in always:
            continue
        if field.type is bool:
            words.append(f'--{field.name}')
        elif field.name == 'data_dir':
            words.append('--data_dir=DATA')
        elif field.type is str:
            words.append(f'--{field.name}={Path(value).name}')
        else:
            words.append(f'--{field.name}={as_typed(value)}')
    return ' '.join(words)


# ------------------------------------------------------------------------------------------- table


def format_table(rows: dict[str, dict]) -> str:
    """Return the table of all runs."""
    lines = []
    for row in rows.values():
        lines.append(
            [
                row['data'],
                row['model'],
                f'{row["parameters"]:,}',
                score_cell(row),
                peers_cell(row['peers']),
                f'{row["best_step"]:,} of {row["steps"]:,}',
                f'{row["minutes"]:.1f}',
                row['machine'],
                f'`{row["command"]}`',
            ]
        )
    header = ['data', 'model', 'parameters', 'test score', 'published']
    return table([*header, 'best at step', 'minutes', 'machine', 'command'], lines)


def score_cell(row: dict) -> str:
    """Show a score with as many digits as its error allows, two at least."""
    error = row['two_standard_errors']
    digits = max(2, math.ceil(-math.log10(error / 2)))
    text = f'{row["score"]:.{digits}f} ± {error:.{digits}f} {row["unit"]}'
    if row['effective_sample_size']:
        text += f', {row["effective_sample_size"]:.1%} effective'
    return text


def peers_cell(peers: list[tuple[str, float, str]]) -> str:
    """Name published scores, those from one source together."""
    by_source = {}
    for name, score, source in peers:
        by_source.setdefault(source, []).append(f'{name} {score}')
    return '; '.join(f'{", ".join(scores)} ({source})' for source, scores in by_source.items())


# -------------------------------------------------------------------------------------------- main


def parse_args(argv: list[str] | None) -> argparse.Namespace:
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
        type=Path,
        metavar='DIR',
        help='where results.json is, and RESULTS.md if there is one '
        '(default: benchmarks/, and RESULTS.md of the project)',
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    file = (args.out or HERE) / 'results.json'
    page = (args.out or HERE.parent) / 'RESULTS.md'
    machine = args.machine or f'{machine_name()}, torch {torch.__version__.split("+")[0]}'
    try:
        rows = json.loads(file.read_text()) if file.exists() else {}
        for argument in args.runs:
            name, _, folder = argument.rpartition('=')
            row = summarize(read_run(Path(folder)), name, machine)
            rows[name or f'{row["data"]}, {row["model"]}'] = row
        file.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + '\n')
        if page.exists():
            insert(page, 'results.py', format_table(rows))
    except (UserError, ValueError, OSError) as error:
        print(f'results.py: error: {error}', file=sys.stderr)
        sys.exit(2)
    print(format_table(rows), end='')


if __name__ == '__main__':
    main()
