"""In which order rows are drawn: functions of seed, step and process alone, so that a resumed run goes on exactly as an
unbroken one, and nothing of it needs to be saved."""

from functools import lru_cache

import numpy as np
import torch


def seeded_generator(device, *key):
    """A random generator that is a function of the key (integers)"""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))


def steps_per_epoch(n, batch_size, world_size=1):
    """How many whole steps of batch_size rows a process n rows give; one at least"""
    return max(1, n // (batch_size * world_size))


@lru_cache(maxsize=1)
def epoch_order(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_indices(n, batch_size, seed, step, rank=0, world_size=1):
    """-> which of n rows a process takes at a step (batch_size,): each epoch shuffles them anew, and no row comes twice
    in it; what is over at its end is left out."""
    epoch, k = divmod(step, steps_per_epoch(n, batch_size, world_size))
    first = (k * world_size + rank) * batch_size
    return epoch_order(n, seed, epoch)[np.arange(first, first + batch_size) % n]
