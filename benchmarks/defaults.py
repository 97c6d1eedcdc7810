"""How good the defaults of bnaf.py are for tables of your own, beside each option changed alone.

    python benchmarks/defaults.py --miniboone=DIR       forty minutes on two idle cores

The tables are those of known_tables.py, of 120 to 50,000 rows, each with three seeds. The score is
the log-likelihood of rows that play no part in the training. Where the density is known, its own
score minus that is the gap, of which 0 is the best there can be; else the gap is minus the score.

Each training has a process of one thread. It enters defaults.json when it is done: called again,
the script goes on with what is missing. In the end it writes a table in benchmarks/README.md.
``DIR`` holds val.npy, the validation rows of MINIBOONE; without it, that table is left out.
"""

import argparse
import sys
import time
import warnings
from concurrent.futures import as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

# bnaf.py is in the folder above this one.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ablation import load_results, worker_processes
from known_tables import draw_table
from pages import insert, table
from tables import values_of
from timing import cpu_name, progress

import bnaf
from common.errors import exit_on_user_error
from common.files import write_json

HERE = Path(__file__).resolve().parent
DEFAULT = 'default'

# Tables and the rows to learn from, nine tenths of which train.
FEW = {
    'Gaussian': 200,
    'iris': 120,
    'mixture': 300,
    'digits': 300,
    'one-sided': 400,
    'heavy tails': 500,
    'skewed': 500,
    'MINIBOONE': 500,
    'curved': 1_000,
}
MORE = {
    'digits': 1_500,
    'mixture': 2_000,
    'MINIBOONE': 2_500,
    'heavy tails': 5_000,
    'curved': 10_000,
}
MANY = {'curved': 50_000}
SIZES = {'few': FEW, 'more': MORE, 'many': MANY}

# What is changed, one option at a time.
CHANGES: dict[str, dict[str, tuple]] = {
    'few': dict(
        last_residual=('none', 'normal'),
        n_flows=(3, 8),
        n_hidden=(1,),
        hidden_dim=(4, 20),
        batch_size=(10, 50),
        lr=(0.01, 0.04),
        early_stop=(10, 40),
    ),
    'more': dict(
        last_residual=('none',),
        n_hidden=(1,),
        hidden_dim=(10,),
        batch_size=(50, 200),
    ),
    'many': dict(last_residual=('none',)),
}


class Job(NamedTuple):
    """A training: its table, the rows to learn from, the seed, and the options of the estimator."""

    table: str
    n_rows: int
    seed: int
    options: dict


def fit(job: Job, miniboone: Path | None) -> dict:
    """Fit a model; return its gap in nats, and its CPU seconds.

    The gap is how far it scores below the density itself or, of a real table, minus its score.
    """
    torch.set_num_threads(1)
    rows, test, log_p = draw_table(job.table, job.n_rows, job.seed, miniboone)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        model = bnaf.BNAFDensity(seed=job.seed, **job.options).fit(rows)
    seconds = time.process_time() - start

    gap = (log_p - model.score_samples(test)).mean()
    return {**job._asdict(), 'gap': float(gap), 'seconds': seconds}


def options_of_size(size: str) -> dict:
    """Return the options that may be changed, with their defaults for tables of a size."""
    n_train = max(SIZES[size].values()) * 9 // 10
    return {'n_flows': bnaf.Config.n_flows, **bnaf.own_table_defaults(n_train)}


def settings_of_size(size: str) -> dict[str, dict]:
    """Return the defaults and every change of them, by a name."""
    defaults = options_of_size(size)
    settings = {DEFAULT: defaults}
    for name, values in CHANGES[size].items():
        for value in values:
            settings[f'`--{name}={value}`'] = {**defaults, name: value}
    return settings


def all_jobs(sizes: list[str], n_seeds: int, with_miniboone: bool) -> list[Job]:
    """Return all trainings, seed by seed."""
    jobs = []
    for size in sizes:
        for seed in range(n_seeds):
            for name, n_rows in SIZES[size].items():
                if name == 'MINIBOONE' and not with_miniboone:
                    continue
                jobs += [Job(name, n_rows, seed, o) for o in settings_of_size(size).values()]
    return jobs


def measure(args: argparse.Namespace, file: Path) -> dict:
    """Fit what ``file`` does not hold yet, and keep it there; return the content of the file."""
    runs = load_results(file)['runs']
    results = {'cpu': cpu_name(), 'torch': torch.__version__, 'n_seeds': args.n_seeds, 'runs': runs}

    done = [Job(*(run[name] for name in Job._fields)) for run in runs]
    jobs = all_jobs(args.sizes, args.n_seeds, args.miniboone is not None)
    missing = [job for job in jobs if job not in done]
    with worker_processes(args.n_workers) as executor:
        trainings = [executor.submit(fit, job, args.miniboone) for job in missing]
        for training in as_completed(trainings):
            run = training.result()
            runs.append(run)
            write_json(file, results)
            progress(f'{run["table"]} {run["n_rows"]}: {run["gap"]:.3f}, {run["seconds"]:.1f} s')
    return results


# ------------------------------------------------------------------------------------------- table


def runs_of(results: dict, size: str, setting: str, name: str) -> list[dict]:
    """Return the trainings of a setting on a table, one per seed, in the order of seeds."""
    job = name, SIZES[size][name], settings_of_size(size)[setting]
    runs = []
    for run in results['runs']:
        is_theirs = (run['table'], run['n_rows'], run['options']) == job
        if is_theirs and run['seed'] < results['n_seeds']:
            runs.append(run)
    return sorted(runs, key=lambda run: run['seed'])


def format_table(results: dict) -> str:
    """Return a table for each size, of what was measured with all settings and seeds."""
    blocks = []
    for size, tables in SIZES.items():
        settings, measured = settings_of_size(size), []
        for name in tables:
            counts = [len(runs_of(results, size, setting, name)) for setting in settings]
            if min(counts) == results['n_seeds']:
                measured.append(name)
        if measured:
            blocks.append(format_size(results, size, measured))
    return '\n'.join(blocks)


def format_size(results: dict, size: str, tables: list[str]) -> str:
    """Return a line per setting: the gap of the default, and how much larger that of others is."""
    lines = []
    for setting in settings_of_size(size):
        gaps, differences, seconds = [], [], []
        for name in tables:
            runs = runs_of(results, size, setting, name)
            of_default = runs_of(results, size, DEFAULT, name)
            gap = values_of(runs, 'gap')
            gaps.append(gap.mean())
            differences.append((gap - values_of(of_default, 'gap')).mean())
            seconds.append(values_of(runs, 'seconds').mean())

        if setting == DEFAULT:
            cells = [f'{gap:.3f}' for gap in gaps] + ['']
        else:
            cells = [f'{difference:+.3f}' for difference in differences]
            cells.append(f'{np.mean(differences):+.3f}')
        lines.append([setting, *cells, f'{np.mean(seconds):.1f}'])

    names = [f'{name}, {SIZES[size][name]:,} rows' for name in tables]
    words = ' '.join(f'--{name}={value}' for name, value in options_of_size(size).items())
    header = [f'default: `{words}`', *names, 'mean', 'CPU seconds']
    return table(header, lines)


# -------------------------------------------------------------------------------------------- main


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--miniboone', type=Path, metavar='DIR', help='where val.npy is')
    parser.add_argument('--sizes', nargs='+', choices=SIZES, default=list(SIZES))
    parser.add_argument('--n_seeds', type=int, default=3, help='trainings per setting')
    parser.add_argument('--n_workers', type=int, default=2, help='trainings at the same time')
    parser.add_argument(
        '--out',
        type=Path,
        metavar='DIR',
        help='where defaults.json goes, and the tables if DIR has a README.md (default: '
        'benchmarks/)',
    )
    args = parser.parse_args(argv)
    if args.n_seeds < 1 or args.n_workers < 1:
        parser.error('--n_seeds and --n_workers have to be 1 at least')
    return args


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, and show all."""
    args = parse_args(argv)
    folder = args.out or HERE
    folder.mkdir(parents=True, exist_ok=True)
    with exit_on_user_error('defaults'):
        results = measure(args, folder / 'defaults.json')
    text = format_table(results)
    if (folder / 'README.md').exists():
        insert(folder / 'README.md', 'defaults.py', text)
    print(text, end='')


if __name__ == '__main__':
    main()
