"""Polyak's average of the weights."""

from collections.abc import Callable
from typing import Any

import torch

Tensors = list[torch.Tensor]


def moving_average(decay: float, n_batches: float = 1.0) -> Callable:
    """Return the function by which ``AveragedModel`` updates an exponential moving average.

    After n updates the average decays by min(``decay``, (1 + n) / (10 + n)), so that it soon
    forgets the first weights. Each update decays it as ``n_batches`` of them would: with twice as
    many processes as a training began with, one step stands for two.
    """

    @torch.no_grad()
    def update(averages: Tensors, values: Tensors, n_updates: Any) -> None:
        n = int(n_updates)
        decay_now = min(decay, (1 + n) / (10 + n)) ** n_batches
        torch._foreach_lerp_(averages, values, 1 - decay_now)

    return update
