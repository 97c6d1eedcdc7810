"""The order in which rows are drawn.

Everything is a function of seed, step and process alone. A resumed run therefore goes on exactly
as an unbroken one, and no state of a random generator has to be saved.
"""

from functools import lru_cache

import numpy as np
import torch


def seeded_generator(device: torch.device | str, *key: int) -> torch.Generator:
    """Return a random generator that depends on ``key`` alone."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))


def steps_per_epoch(n_rows: int, batch_size: int, world_size: int = 1) -> int:
    """Return how many whole steps of ``batch_size`` rows per process there are; at least one."""
    return max(1, n_rows // (batch_size * world_size))


@lru_cache(maxsize=1)
def epoch_order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Return the shuffled indices of all rows for one epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n_rows)


def batch_indices(
    n_rows: int, batch_size: int, seed: int, step: int, rank: int = 0, world_size: int = 1
) -> np.ndarray:
    """Return which rows a process takes at a step, of shape ``(batch_size,)``.

    Each epoch shuffles the rows anew and takes each at most once. The rows left at its end, too
    few for a step, are skipped. If there are fewer rows than one step takes, rows repeat.
    """
    epoch, step_in_epoch = divmod(step, steps_per_epoch(n_rows, batch_size, world_size))
    first = (step_in_epoch * world_size + rank) * batch_size
    places = np.arange(first, first + batch_size) % n_rows
    return epoch_order(n_rows, seed, epoch)[places]
