"""glow.py on more processes: one and two measured here, 8 to 512 GPUs worked out.

    python benchmarks/processes.py                          a minute and a half on two CPU cores
    python benchmarks/processes.py --gpu=DIR/speed.json     from step times that speed.py measured on a GPU

Writes processes.json, and its tables between two marks of README.md. Without --gpu the GPUs' step times are assumed,
and the tables say so.
"""

import argparse
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from report import insert, significant, table
from timing import cpu_name, progress, seconds_of

import glow
from datasets import ImageData, ImageSplit

NVLINK, INFINIBAND = (
    450e9,
    50e9,
)  # bytes/s each way of a GPU, as published: NVLink 4 of an HGX H100, NDR 400 Gb/s
BUCKET = 25 * 2**20  # bytes of gradients that DistributedDataParallel sends at once, by default
PER_NODE = 8
ASSUMED_FLOPS = (
    0.25 * 800e12
)  # a quarter of what large bf16 products reach on such a GPU: assumed, not measured
MODELS = {
    'A': dict(n_levels=3, depth=32, width=512),
    'C': dict(n_levels=4, depth=48, width=512, checkpoint_grads=True),
}
IMAGES, BATCH = (3, 64, 64), 16  # a GPU's
CELEBA = 162_770  # images to train on


# ----------------------------------------------------------------------------------------------- measured, Gloo


def work(n_steps):
    """One process of several: the faces' default model, on noise; the first prints the seconds of a step"""
    torch.set_num_threads(1)
    config = replace(glow.Config(**glow.DEFAULTS['faces']), batch_size_init=32)
    images = np.random.default_rng(0).integers(
        0, 256, (512, 3, config.image_size, config.image_size), dtype=np.uint8
    )
    part = ImageSplit(images, np.zeros((len(images), 0), bool))
    with glow.setup() as process:
        run = glow.Training(config, ImageData(part, part, part, (), images[0].size, 0, ''), process)
        times = [seconds_of(run.take_step, process.device) for _ in range(n_steps + 2)][2:]
        if process.rank == 0:
            print(
                json.dumps(
                    {
                        'seconds': float(np.median(times)),
                        'batch': config.batch_size,
                        'parameters': sum(p.numel() for p in run.model.parameters()),
                    }
                )
            )


def launch(n, n_steps):
    """-> what the first of n processes prints"""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in map(str, range(n)):
        environment = {
            **os.environ,
            'RANK': rank,
            'LOCAL_RANK': rank,
            'WORLD_SIZE': str(n),
            'LOCAL_WORLD_SIZE': str(n),
            'MASTER_ADDR': 'localhost',
            'MASTER_PORT': port,
            'OMP_NUM_THREADS': '1',
            'CUDA_VISIBLE_DEVICES': '',
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, '-W', 'ignore', __file__, f'--work={n_steps}'],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f'of {n} processes some failed')
    return json.loads(outputs[0])


def measure(n_rounds, n_steps):
    """1 and 2 processes in turn -> one result each, a thread a process"""
    rounds = [[launch(n, n_steps) for n in (1, 2)] for _ in range(n_rounds)]
    results = []
    for k, n in enumerate((1, 2)):
        per_second = [n * r[k]['batch'] / r[k]['seconds'] for r in rounds]
        ratios = [
            p * rounds[i][0]['seconds'] / rounds[i][0]['batch'] for i, p in enumerate(per_second)
        ]
        results.append(
            {
                'processes': n,
                'batch': rounds[0][k]['batch'],
                'per_second': float(np.median(per_second)),
                'ratio': float(np.median(ratios)),
                'ratios': [min(ratios), max(ratios)],
                'gradient_bytes': 4 * rounds[0][k]['parameters'],
            }
        )
        progress(f'{n} processes: {results[-1]["per_second"]:.4g} images/s')
    return results


# --------------------------------------------------------------------------------------------------- worked out


def count(shape):
    """-> parameters of a model, and FLOPs of an image's training step, without what checkpoint_grads computes again"""
    model = glow.build_model(glow.Config(**{**shape, 'checkpoint_grads': False}), IMAGES)
    objective = glow.BitsPerDim(model, math.prod(IMAGES))
    with FlopCounterMode(display=False) as counter:
        objective(torch.zeros(1, *IMAGES, dtype=torch.uint8)).backward()
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def step_time(name, flops, measured):
    """-> seconds of a step of BATCH images on one GPU, and where they are from"""
    checkpoints = MODELS[name].get('checkpoint_grads', False)
    for row in measured['rows'] if measured else []:
        if (row['config'], row['quantity']) == (f'{name}{BATCH}', 'training'):
            entries = [
                e
                for e in row['entries']
                if e['name'] not in measured['machine']['peers']
                and ('checkpoint_grads' in e['name'].split()) == checkpoints
            ]
            best = min(entries, key=lambda e: e['seconds'])
            return best['seconds'], f'measured on {measured["machine"]["device"]} ({best["name"]})'
    again = 4 / 3 if checkpoints else 1  # a step with checkpoints has two forward passes
    return again * BATCH * flops / ASSUMED_FLOPS, 'assumed'


def all_reduce(size, n):
    """-> seconds to sum size bytes over n GPUs, as one ring, where 2 (n - 1) / n of them pass each GPU's slowest link,
    and in two levels: scattered over a node's GPUs, each of which is in a ring of its own across nodes, and gathered"""
    if n <= PER_NODE:
        ring = 2 * (n - 1) / n * size / NVLINK
        return ring, ring
    nodes = n // PER_NODE
    inside = 2 * (PER_NODE - 1) / PER_NODE * size / NVLINK
    return 2 * (n - 1) / n * size / INFINIBAND, inside + 2 * (
        nodes - 1
    ) / nodes * size / PER_NODE / INFINIBAND


def overlapped(step, backward, reduce, size):
    """Seconds of a step whose buckets are sent during backward: the first waits to be full, the last for the end"""
    bucket = min(1.0, BUCKET / size)
    return step - backward + max(backward + bucket * reduce, bucket * backward + reduce)


def project(measured):
    results = []
    for name, shape in MODELS.items():
        parameters, flops = count(shape)
        step, source = step_time(name, flops, measured)
        backward = (3 / 4 if shape.get('checkpoint_grads') else 2 / 3) * step
        size = 4 * parameters
        for n in (1, 8, 64, 512):
            ring, levels = all_reduce(size, n)
            plain, hidden, hidden_levels = (
                step + ring,
                *(overlapped(step, backward, t, size) if n > 1 else step for t in (ring, levels)),
            )
            results.append(
                {
                    'model': name,
                    'parameters': parameters,
                    'step_seconds': step,
                    'source': source,
                    'gpus': n,
                    'ring_seconds': ring,
                    'levels_seconds': levels,
                    'smallest_batch': BATCH * ring / backward,
                    'per_second': {
                        kind: n * BATCH / t
                        for kind, t in (
                            ('ring', plain),
                            ('ring, overlapped', hidden),
                            ('two levels, overlapped', hidden_levels),
                        )
                    },
                }
            )
    return results


def markdown(results):
    parts = [
        f'**Measured**: {results["cpu"]}, the model of `glow.py --train` (drawn faces), one thread and a batch of '
        f'{results["measured"][0]["batch"]} a process, Gloo.\n',
        table(
            ['processes', 'images/s', 'of one process (range)', 'gradients'],
            [
                [
                    r['processes'],
                    significant(r['per_second']),
                    '{}x ({} to {})'.format(*map(significant, (r['ratio'], *r['ratios']))),
                    f'{significant(r["gradient_bytes"] / 2**20)} MiB',
                ]
                for r in results['measured']
            ],
        ),
    ]
    for name in MODELS:
        rows = [r for r in results['projected'] if r['model'] == name]
        first = rows[0]
        ms = lambda seconds: significant(1e3 * seconds)
        source = (
            '**assumed**, not measured: ' + f'{ASSUMED_FLOPS / 1e12:.0f} TFLOP/s'
            if first['source'] == 'assumed'
            else first['source']
        )
        parts.append(
            f'**Worked out**: model {name}, {first["parameters"]:,} parameters, '
            f'{4e-6 * first["parameters"]:,.0f} MB of gradients, {BATCH} images a GPU. '
            f'A step on one GPU: {ms(first["step_seconds"])} ms, {source}.\n'
        )
        kinds = list(first['per_second'])
        ideal = first['per_second']['ring']
        parts.append(
            table(
                [
                    'GPUs',
                    'steps an epoch of CelebA',
                    'all-reduce: ring, ms',
                    'two levels, ms',
                    *(f'images/s: {k}' for k in kinds),
                    'batch a GPU that hides a ring',
                ],
                [
                    [
                        r['gpus'],
                        CELEBA // (BATCH * r['gpus']),
                        ms(r['ring_seconds']),
                        ms(r['levels_seconds']),
                        *(
                            f'{r["per_second"][k]:,.0f} ({r["per_second"][k] / r["gpus"] / ideal:.0%})'
                            for k in kinds
                        ),
                        math.ceil(r['smallest_batch']),
                    ]
                    for r in rows
                ],
            )
        )
    return '\n'.join(parts)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--gpu', type=Path, metavar='FILE', help="speed.py's results on a GPU")
    parser.add_argument('--quick', action='store_true', help='one short round')
    parser.add_argument(
        '--out',
        default=Path(__file__).parent,
        type=Path,
        metavar='DIR',
        help='where the results go',
    )
    parser.add_argument('--work', type=int, help=argparse.SUPPRESS)  # one of launch's processes
    args = parser.parse_args(argv)
    if args.work:
        return work(args.work)
    measured = json.loads(args.gpu.read_text()) if args.gpu else None
    results = {
        'cpu': f'{cpu_name()}, {len(os.sched_getaffinity(0))} cores',
        'measured': measure(n_rounds=1 if args.quick else 3, n_steps=2 if args.quick else 20),
        'projected': project(measured),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / 'processes.json').write_text(json.dumps(results, indent=1) + '\n')
    if (args.out / 'README.md').exists():
        insert(args.out / 'README.md', 'processes.py', markdown(results))
    progress(f'wrote to {args.out}')


if __name__ == '__main__':
    main()
