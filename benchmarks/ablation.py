"""What the couplings and permutations of Glow contribute: figure 3 of its paper, at a small scale.

    python benchmarks/ablation.py --data_dir=PHOTOS     twenty minutes on two idle cores

Small models of photos with additive or affine couplings, and with channels that are reversed,
shuffled or mixed by a 1x1 convolution. All else is the same, the order of the images and their
noise included, which the seed decides. Scores are in bits/dim, of the averaged weights.

Each training has a process of one thread. It enters ablation.json when it is done: called again
with the same settings, the script goes on with what is missing. In the end it writes
images/ablation.png and a table in RESULTS.md.
"""

import argparse
import contextlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# glow.py is in the folder above this one.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from curves import set_limits
from pages import insert, table
from tables import mean_and_error, values_of
from timing import cpu_name, progress

import glow
from common.errors import UserError, exit_on_user_error
from common.files import write_json
from datasets import ImageData, ImageSplit, load_run_images
from datasets.photos import exit_with_parent

HERE = Path(__file__).resolve().parent
PERMUTATIONS = {'reverse': 'reverse', 'shuffle': 'shuffle', 'conv1x1': '1x1 convolution'}
COUPLINGS = {'additive': '--', 'affine': '-'}  # and the lines that show them

# To the schedule of the learning rate, the whole training is one epoch.
MODEL = dict(
    dataset='folder',
    image_size=32,
    n_bits=5,
    n_levels=2,
    depth=8,
    width=32,
    batch_size=16,
    lr=2e-3,
    n_epochs=1,
    n_epochs_warmup=0.05,
    lr_decay=1 / 3,
    ema_decay=0.99,
)
N_POINTS = 20  # of a learning curve
N_VALIDATION = 250  # images that each of them is computed from

# --------------------------------------------------------------------------------------- trainings


def train(settings: dict, data_dir: str, variant: dict) -> dict:
    """Train one model; return its scores, its learning curve and its CPU minutes.

    Arguments:
        settings: what all trainings have in common, as ``settings_of`` returns it.
        data_dir: the folder of the photos.
        variant: the coupling, the permutation and the seed.
    """
    torch.set_num_threads(1)
    config = glow.Config(data_dir=data_dir, **settings['model'], **variant)
    data = load_run_images(config, None)
    n_steps = settings['n_steps']

    start = time.process_time()
    run = glow.Training(config, data, glow.Process(0, 1, torch.device('cpu')))
    run.n_per_epoch = n_steps * config.batch_size

    steps, bits = [], []
    validation = head(data.validation, settings['n_validation'])
    for k in range(1, N_POINTS + 1):
        while run.step < k * n_steps // N_POINTS:
            run.take_step()
        if run.step not in (0, *steps):
            steps.append(run.step)
            bits.append(score(run, validation))
    minutes = (time.process_time() - start) / 60

    return {
        **variant,
        'test': score(run, data.test),
        'parameters': run.model.n_parameters,
        'skipped': int(run.n_skipped),
        'minutes': minutes,
        'steps': steps,
        'validation': bits,
    }


def head(split: ImageSplit, n: int) -> ImageSplit:
    """Return the first ``n`` images of a split."""
    return replace(split, images=split.images[:n], attributes=split.attributes[:n])


def score(run: glow.Training, split: ImageSplit) -> float:
    """Return the bits/dim of the averaged weights on a split."""
    model, batch_size = run.average.module, 4 * run.config.batch_size
    return glow.bits_per_dim(model, split, run.data.n_values, batch_size, run.process)[0]


@contextlib.contextmanager
def worker_processes(n: int) -> Iterator[Executor]:
    """Give processes that take tasks, and end them at once where an exception comes first."""
    spawn = multiprocessing.get_context('spawn')
    executor = ProcessPoolExecutor(n, spawn, initializer=exit_with_parent)
    try:
        yield executor
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------- results


def settings_of(data: ImageData, n_steps: int) -> dict:
    """Return what all trainings that are compared have in common."""
    return {
        'model': MODEL,
        'n_steps': n_steps,
        'n_validation': N_VALIDATION,
        'images': data.fingerprint,
        'cpu': cpu_name(),
        'torch': torch.__version__,
    }


def all_variants(n_seeds: int) -> list[dict]:
    """Return the coupling, permutation and seed of each training, seed by seed."""
    variants = []
    for seed in range(n_seeds):
        for permutation in PERMUTATIONS:
            for coupling in COUPLINGS:
                variant = {'coupling': coupling, 'permutation': permutation, 'seed': seed}
                variants.append(variant)
    return variants


def load_results(file: Path) -> dict:
    """Return what a former call has left in a file, or no trainings where there is none."""
    if not file.exists():
        return {'runs': []}
    try:
        results = json.loads(file.read_text())
        _ = results['runs']
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{file} is damaged: remove it to train anew') from error
    return results


def load_runs(file: Path, settings: dict) -> list[dict]:
    """Return the trainings in a file, or none where they had other settings."""
    results = load_results(file)
    if results['runs'] and results['settings'] != settings:
        progress(f'{file.name} is of other settings: all trainings start anew')
        return []
    return results['runs']


def runs_of(results: dict, coupling: str, permutation: str) -> list[dict]:
    """Return the trainings of two of the options, one per seed, in the order of seeds."""
    runs = []
    for run in results['runs']:
        is_theirs = (run['coupling'], run['permutation']) == (coupling, permutation)
        if is_theirs and run['seed'] < results['n_seeds']:
            runs.append(run)
    return sorted(runs, key=lambda run: run['seed'])


def measure(args: argparse.Namespace, file: Path) -> dict:
    """Train what ``file`` does not hold yet, and keep it there; return the content of the file."""
    config = glow.Config(data_dir=args.data_dir, **MODEL)
    settings = settings_of(load_run_images(config, None), args.n_steps)
    results = {
        'command': f'python benchmarks/ablation.py --data_dir=PHOTOS --n_steps={args.n_steps} '
        f'--n_seeds={args.n_seeds} --n_workers={args.n_workers}',
        'settings': settings,
        'n_seeds': args.n_seeds,
        'runs': load_runs(file, settings),
    }

    done = [(run['coupling'], run['permutation'], run['seed']) for run in results['runs']]
    missing = [v for v in all_variants(args.n_seeds) if tuple(v.values()) not in done]
    with worker_processes(args.n_workers) as executor:
        trainings = [executor.submit(train, settings, args.data_dir, v) for v in missing]
        for training in as_completed(trainings):
            run = training.result()
            results['runs'].append(run)
            write_json(file, results)
            name = f'{run["coupling"]}, {run["permutation"]}, seed {run["seed"]}'
            progress(f'{name}: {run["test"]:.4f} bits/dim, {run["minutes"]:.2f} CPU minutes')
    return results


def format_table(results: dict) -> str:
    """Return a line per permutation.

    In brackets is how far it is below the permutation of the line before, seed by seed.
    """
    lines = []
    before = {}
    for permutation, name in PERMUTATIONS.items():
        scores, parameters, minutes = {}, [], []
        cells = []
        for coupling in COUPLINGS:
            runs = runs_of(results, coupling, permutation)
            scores[coupling] = values_of(runs, 'test')
            cell = mean_and_error(scores[coupling], 4)
            if before:
                cell += f' ({mean_and_error(before[coupling] - scores[coupling], 4)})'
            cells.append(cell)
            parameters.append(f'{runs[0]["parameters"]:,}')
            minutes.append(f'{values_of(runs, "minutes").mean():.1f}')

        lead = mean_and_error(scores['additive'] - scores['affine'], 4)
        lines.append([name, *cells, lead, ' and '.join(parameters), ' and '.join(minutes)])
        before = scores
    header = ['', *COUPLINGS, 'how far affine is below', 'parameters', 'CPU minutes']
    return table(header, lines)


def draw(results: dict) -> Figure:
    """Draw the learning curves, each the mean over the seeds."""
    figure = Figure((9, 4.5), layout='constrained')
    axes: Axes = figure.subplots()
    relevant = []
    for k, (permutation, name) in enumerate(PERMUTATIONS.items()):
        for coupling, style in COUPLINGS.items():
            runs = runs_of(results, coupling, permutation)
            bits = np.mean([run['validation'] for run in runs], axis=0)
            axes.plot(runs[0]['steps'], bits, f'C{k}{style}', label=f'{name}, {coupling}')
            # The first values, and a setback among them, would flatten the curves.
            relevant += bits[len(bits) // 2 :].tolist()

    set_limits(axes, relevant)
    axes.set(xlabel='step', ylabel='bits/dim of validation images')
    axes.grid(alpha=0.3)
    figure.legend(loc='outside right upper')
    return figure


# -------------------------------------------------------------------------------------------- main


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--data_dir',
        required=True,
        metavar='PHOTOS',
        help='a folder as of glow.py --dataset=folder',
    )
    parser.add_argument('--n_steps', type=int, default=1500, help='steps per training')
    parser.add_argument('--n_seeds', type=int, default=2, help='trainings per model')
    parser.add_argument('--n_workers', type=int, default=2, help='trainings at the same time')
    parser.add_argument(
        '--out',
        type=Path,
        metavar='DIR',
        help='where ablation.json and ablation.png go, and the table if DIR has a RESULTS.md '
        '(default: benchmarks/, images/, and RESULTS.md of the project)',
    )
    args = parser.parse_args(argv)
    if args.n_seeds < 2:
        parser.error('--n_seeds has to be 2 at least, for standard errors')
    if args.n_steps < 1 or args.n_workers < 1:
        parser.error('--n_steps and --n_workers have to be 1 at least')
    return args


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, and show all."""
    args = parse_args(argv)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    with exit_on_user_error('ablation'):
        results = measure(args, (args.out or HERE) / 'ablation.json')
    draw(results).savefig((args.out or HERE.parent / 'images') / 'ablation.png', dpi=100)
    page = (args.out or HERE.parent) / 'RESULTS.md'
    if page.exists():
        insert(page, 'ablation.py', format_table(results))
    print(format_table(results), end='')


if __name__ == '__main__':
    main()
