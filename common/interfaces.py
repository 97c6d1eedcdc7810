"""What common/ expects of a script: its processes, and its training."""

from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

T = TypeVar('T')


class Process(Protocol):
    """This process among those that a launcher has started."""

    rank: int
    world_size: int
    device: torch.device
    store: Any

    def gather(self, value: T) -> list[T]:
        """Return the value of every process, in the order of ranks."""

    def share(self, value: T) -> T:
        """Return the value of rank 0 on every process."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place."""

    def any(self, flag: object) -> bool:
        """Return whether the flag is set on any process."""


class Training(Protocol):
    """A training: what it carries from step to step, and where it stands."""

    config: Any
    process: Process
    input_dims: list[int]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    score_name: str
    score_sign: int  # times a loss, it is the score
    step: int
    n_seen: int
    n_per_step: int
    n_per_epoch: int
    n_per_validation: int
    n_to_see: int
    n_skipped: torch.Tensor
    skips_in_a_row: torch.Tensor
    best: float
    validation_loss: float


class LoadCheckpoint(Protocol):
    """Read and validate a checkpoint. Raises ``UserError`` where it is damaged."""

    def __call__(self, path: Path) -> dict[str, Any]:
        """Return the content of the checkpoint, its path and its config as a dataclass."""
