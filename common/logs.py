"""Progress bar and TensorBoard scalars of rank 0."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from .errors import UserError
from .files import report_full_disk
from .interfaces import Training

FLUSH_SECONDS = 30


def progress_bar(*args: Any, **options: Any) -> tqdm:
    """Return a tqdm bar that is updated rarely where its output goes to a file."""
    interval = 0.5 if sys.stderr.isatty() else 15
    # tqdm would find its own miniters from the fastest steps, and stand still in slower ones
    return tqdm(*args, dynamic_ncols=True, mininterval=interval, miniters=1, **options)


def busy_note(device: torch.device) -> str | None:
    """Return a recommendation where threads of this process would wait for each other's cores."""
    if device.type != 'cpu' or 'OMP_NUM_THREADS' in os.environ:
        return None
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has none
        return None
    n_cores = os.cpu_count() or 1
    if load <= n_cores:
        return None
    return (
        f'note: other work keeps the {n_cores} cores of this machine busy (load {load:.1f}): '
        'set OMP_NUM_THREADS=1, or steps may be several times as slow'
    )


class ScalarWriter:
    """Writes scalars for TensorBoard to an events file in a folder; without a folder, does nothing.

    The file supersedes what earlier files of the folder say about ``first_step`` and later steps.
    ``SummaryWriter`` is not used: it writes from a thread, which loses events when the process is
    killed and reports no full disk.
    """

    def __init__(self, folder: Path | None, first_step: int) -> None:
        self.folder = folder
        self.writer = EventsWriter(str(folder / 'events'), f'.{os.getpid()}') if folder else None
        self.last_flush = time.time()
        self.write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, **content: Any) -> None:
        """Write an event."""
        if self.writer:
            with report_full_disk(f'the events of {self.folder}'):
                self.writer.write_event(Event(wall_time=time.time(), **content))

    def add(self, step: int, scalars: dict[str, float]) -> None:
        """Write the scalars of a step. Flush if the last flush was some time ago."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self.write(step=step, summary=Summary(value=values))
        if time.time() > self.last_flush + FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Flush to the disk. A checkpoint does it first, as its steps are not logged again."""
        if self.writer:
            with report_full_disk(f'the events of {self.folder}'):
                self.writer.flush()
        self.last_flush = time.time()

    def close(self) -> None:
        """Flush and close the file. Nothing can be written afterwards."""
        if self.writer:
            with report_full_disk(f'the events of {self.folder}'):
                self.writer.close()
        self.writer = None


class TrainingLog(ScalarWriter):
    """Progress bar and TensorBoard scalars of rank 0. Use it as a context manager.

    Arguments:
        run: the training.
        folder: the folder of the run.
        items: what a batch consists of, such as ``'images'``.
        format_score: returns a loss as the text of a score, given the config and the loss.
    """

    def __init__(
        self,
        run: Training,
        folder: Path,
        items: str,
        format_score: Callable[[Any, float], str],
    ) -> None:
        super().__init__(folder if run.process.rank == 0 else None, run.step + 1)
        self.run, self.items = run, items
        self.format_score = partial(format_score, run.config)
        self.shows_loss = False
        self.restart_clock()

    def __enter__(self) -> 'TrainingLog':
        run = self.run
        n_most = run.config.n_epochs * run.n_per_epoch
        n_steps = run.step + max(0, math.ceil((n_most - run.n_seen) / run.n_per_step))
        if self.writer:
            n_parameters = run.model.n_parameters
            print(f'{n_parameters:,} parameters, step {run.step:,} of at most {n_steps:,}')
            if note := busy_note(run.process.device):
                print(note)
        self.bar = progress_bar(
            total=n_steps, initial=run.step, disable=not self.writer, unit='step'
        )
        self.restart_clock()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.close()
        # the error that ended the training is the one to report
        with contextlib.suppress(UserError) if error else contextlib.nullcontext():
            self.close()

    def restart_clock(self) -> None:
        """Measure the speed from here on."""
        self.clock_step, self.clock_time = self.run.step, time.perf_counter()

    def items_per_second(self) -> float:
        """Return the speed, over all processes, since the clock was last restarted."""
        n_items = (self.run.step - self.clock_step) * self.run.n_per_step
        return n_items / (time.perf_counter() - self.clock_time)

    def log_step(self, loss: torch.Tensor, norm: torch.Tensor, every: int) -> None:
        """Count a step of the optimizer. Every so many steps, show its loss and gradient norm.

        The loss of the first step is shown at once. Others are not read from the device.
        """
        run = self.run
        self.bar.update()
        is_logged = run.step % every == 0
        if (self.shows_loss and not is_logged) or run.skips_in_a_row:
            return

        value = loss.item()  # waits for a GPU: the speed is that of steps that are done
        speed = self.items_per_second()
        validation = ''
        if run.best < math.inf:
            validation = f' (validation: {self.format_score(run.validation_loss)})'
        score = self.format_score(value)
        self.bar.set_postfix_str(
            f'{score}{validation}, {speed:.0f} {self.items}/s', refresh=not self.shows_loss
        )
        self.shows_loss = True
        if not is_logged:
            return

        scalars = {
            f'{run.score_name}/train': run.score_sign * value,
            'gradient_norm': norm.item(),
            'lr': run.optimizer.param_groups[0]['lr'],
            f'{self.items}_per_s': speed,
            'steps_skipped': int(run.n_skipped),
        }
        self.add(run.step, scalars)
        self.restart_clock()

    def log_validation(self) -> None:
        """Write the validation score. The time that it took does not count as training."""
        run = self.run
        score = run.score_sign * run.validation_loss
        self.add(run.step, {f'{run.score_name}/validation': score})
        self.restart_clock()
