"""Which share of a training step of glow.py goes into getting its batch from the cache: of the default job, the drawn
faces, and of a cache of CelebA's shape, of random pixels, for the model that is trained on it, with a small batch.

    python benchmarks/input_pipeline.py [--data_dir=data]
"""

import argparse
import statistics
import sys
import tempfile
import time
import unittest.mock
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import glow  # noqa: E402
from datasets import load_images  # noqa: E402
from datasets.images import make_image_data  # noqa: E402


def random_celeba(folder, n=20_000):
    """-> ImageData of n random images, memory-mapped as CelebA's cache is"""
    images = np.lib.format.open_memmap(folder / 'celeba.npy', 'w+', np.uint8, (n, 3, 64, 64))
    rng = np.random.default_rng(0)
    for part in np.array_split(images, 100):
        part[:] = rng.integers(0, 256, part.shape, np.uint8)
    images.flush()
    images = np.load(folder / 'celeba.npy', mmap_mode='r')
    parts = slice(0, n - 200), slice(n - 200, n - 100), slice(n - 100, n)
    return make_image_data(images, np.zeros((n, 0), bool), (), parts, ['random'])


def measure(name, data, config, n_steps):
    """Prints the median milliseconds of a batch and of the whole step of the script's own training"""
    run = glow.Training(config, data, glow.Process(0, 1, torch.device('cpu')))
    batch, step = [], []

    def timed_batch(*args, get=glow.training_batch):
        start = time.perf_counter()
        result = get(*args)
        batch.append(time.perf_counter() - start)
        return result

    with unittest.mock.patch.object(glow, 'training_batch', timed_batch):
        for _ in range(n_steps + 1):
            start = time.perf_counter()
            run.take_step()
            step.append(time.perf_counter() - start)
    batch, step = (
        1e3 * statistics.median(times[1:]) for times in (batch, step)
    )  # the first also warms up
    print(f'{name}: {batch:.2f} ms of {step:.0f} ms a step, {100 * batch / step:.2f}%')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data_dir', default='data', help='where the drawn faces are kept')
    args = parser.parse_args()
    config = glow.Config(**{**glow.DEFAULTS['faces'], 'dataset': 'faces'})
    measure(
        'faces, default model, batch 32',
        load_images('faces', args.data_dir, config.image_size),
        config,
        40,
    )
    config = glow.Config(
        **{**glow.DEFAULTS['celeba'], 'dataset': 'celeba', 'batch_size': 2, 'batch_size_init': 2}
    )
    with tempfile.TemporaryDirectory() as folder:
        measure('CelebA-shaped, default model, batch 2', random_celeba(Path(folder)), config, 6)
