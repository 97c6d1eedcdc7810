"""Training speed of glow.py on one process and on two, one thread each, on this machine's cores.

    python benchmarks/processes.py             a minute and a half on two CPU cores

Writes processes.json and the table in README.md, which says what limits more processes.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

# glow.py is in the folder above this one.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from contenders import as_image_data
from pages import insert, significant, table
from timing import cpu_name, progress, seconds_per_call

import glow

COUNTS = (1, 2)
N_WARMUP = 2  # steps that are not timed


def train_on_noise(n_steps: int) -> None:
    """Take steps of the drawn faces' default model on noise, as one process of several.

    The first process prints the median seconds of a step as JSON.
    """
    torch.set_num_threads(1)
    config = replace(glow.Config(**glow.DEFAULTS['faces']), batch_size_init=32)
    size = (512, 3, config.image_size, config.image_size)
    images = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    with glow.setup() as process:
        run = glow.Training(config, as_image_data(images), process)
        times = []
        for _ in range(N_WARMUP + n_steps):
            times.append(seconds_per_call(run.take_step, process.device))
        if process.rank == 0:
            result = {
                'seconds': float(np.median(times[N_WARMUP:])),
                'batch': config.batch_size,
                'parameters': sum(p.numel() for p in run.model.parameters()),
            }
            print(json.dumps(result))


def launch(n_processes: int, n_steps: int) -> dict:
    """Train with ``n_processes`` on the CPU; return what the first of them prints."""
    command = [sys.executable, '-W', 'ignore', __file__, f'--n_steps={n_steps}']
    port = free_port()
    processes = []
    for rank in range(n_processes):
        environment = {
            **os.environ,
            'RANK': str(rank),
            'LOCAL_RANK': str(rank),
            'WORLD_SIZE': str(n_processes),
            'LOCAL_WORLD_SIZE': str(n_processes),
            'MASTER_ADDR': 'localhost',
            'MASTER_PORT': str(port),
            'OMP_NUM_THREADS': '1',
            'CUDA_VISIBLE_DEVICES': '',
        }
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        processes.append(process)

    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f'at least one of {n_processes} processes failed')
    return json.loads(outputs[0])


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        return listener.getsockname()[1]


def measure(n_rounds: int, n_steps: int) -> list[dict]:
    """Train with one process and with two in turn; return one result for each number."""
    rounds = []
    for _ in range(n_rounds):
        rounds.append({n: launch(n, n_steps) for n in COUNTS})

    rates = {}
    for n in COUNTS:
        runs = [launched[n] for launched in rounds]
        rates[n] = [n * run['batch'] / run['seconds'] for run in runs]

    results = []
    for n in COUNTS:
        ratios = [rate / rate_of_one for rate, rate_of_one in zip(rates[n], rates[1])]
        run = rounds[0][n]
        results.append(
            {
                'processes': n,
                'batch': run['batch'],
                'per_second': float(np.median(rates[n])),
                'ratio': float(np.median(ratios)),
                'ratios': [min(ratios), max(ratios)],
                'gradient_bytes': 4 * run['parameters'],
            }
        )
        progress(f'{n} processes: {results[-1]["per_second"]:.4g} images/s')
    return results


def format_table(results: dict) -> str:
    """Return the conditions and the table that README.md shows."""
    conditions = (
        f'Measured on {results["cpu"]}, with the model of `glow.py --train` (drawn faces), one '
        f'thread and a batch of {results["measured"][0]["batch"]} images per process, Gloo:\n'
    )
    lines = []
    for result in results['measured']:
        ratio, low, high = map(significant, (result['ratio'], *result['ratios']))
        lines.append(
            [
                result['processes'],
                significant(result['per_second']),
                f'{ratio}x ({low} to {high})',
                f'{significant(result["gradient_bytes"] / 2**20)} MiB',
            ]
        )
    header = ['processes', 'images/s', 'of one process (range)', 'gradients']
    return f'{conditions}\n{table(header, lines)}'


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--quick', action='store_true', help='one short round')
    parser.add_argument(
        '--out',
        default=Path(__file__).parent,
        type=Path,
        metavar='DIR',
        help='where the results go (default: the folder of this script)',
    )
    # Given to the processes that launch starts.
    parser.add_argument('--n_steps', type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.n_steps:
        train_on_noise(args.n_steps)
        return

    n_rounds, n_steps = (1, 2) if args.quick else (3, 20)
    results = {
        'cpu': f'{cpu_name()}, {len(os.sched_getaffinity(0))} cores',
        'measured': measure(n_rounds, n_steps),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / 'processes.json').write_text(json.dumps(results, indent=1) + '\n')
    if (args.out / 'README.md').exists():
        insert(args.out / 'README.md', 'processes.py', format_table(results))
    progress(f'wrote processes.json to {args.out}')


if __name__ == '__main__':
    main()
