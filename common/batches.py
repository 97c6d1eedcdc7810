"""The order in which rows are drawn, and other random numbers.

Everything is a function of the seed, of how many rows were seen before, and of the process. A
resumed run therefore goes on exactly as an unbroken one, and no state of a random generator has to
be saved.
"""

from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch


class Stream(IntEnum):
    """What random numbers are for. Numbers for different purposes never come from one stream."""

    EVALUATION = 0
    ORDER = 1
    INITIALIZATION = 2
    TRAINING = 3
    SAMPLES = 4


def seed_sequence(stream: Stream, *key: int) -> np.random.SeedSequence:
    """Return a seed that depends on the stream and on ``key`` alone.

    NumPy pads a key with zeros: without the stream, the keys (s,) and (s, 0) would be the same.
    ``EVALUATION`` adds nothing to its keys, which leaves published scores as they are.
    """
    return np.random.SeedSequence(key, spawn_key=(stream,) if stream else ())


def seeded_generator(device: torch.device | str, stream: Stream, *key: int) -> torch.Generator:
    """Return a random generator of torch that depends on the stream and on ``key`` alone."""
    seed = seed_sequence(stream, *key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))


@lru_cache(maxsize=2)
def epoch_order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Return the shuffled indices of all rows for one epoch."""
    rng = np.random.default_rng(seed_sequence(Stream.ORDER, seed, epoch))
    return rng.permutation(n_rows)


def batch_indices(
    n_rows: int, batch_size: int, seed: int, n_seen: int = 0, rank: int = 0
) -> np.ndarray:
    """Return which rows a process takes at a step, of shape ``(batch_size,)``.

    The epochs follow each other without a gap. Each of them shuffles the rows anew and takes each
    row once; a batch may hold the end of one and the beginning of the next. Earlier steps have
    taken the first ``n_seen`` rows of this sequence, and the next ``rank`` batches belong to the
    processes of lower rank. The number of processes may therefore change at any step.
    """
    first = n_seen + rank * batch_size
    epochs, places = np.divmod(np.arange(first, first + batch_size), n_rows)

    parts = []
    for epoch in range(epochs[0], epochs[-1] + 1):
        parts.append(epoch_order(n_rows, seed, epoch)[places[epochs == epoch]])
    return np.concatenate(parts)
