"""How long a training takes on this machine, and how many of its epochs fit into given seconds."""

import contextlib
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

# The scripts are in the folder above this one.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from recipes import Job
from timing import synchronize

import glow

N_WARMUP, N_STEPS = 10, 50
TABLE_ROWS = 10_000  # that the validation of a table is measured on


# ---------------------------------------------------------------------------------------- measuring


class MeasuredError(Exception):
    """Ends a training when enough of its steps were measured."""


class StepClock:
    """Times steps and checkpoints of a training, and ends it by ``MeasuredError``.

    It ends after ``N_WARMUP + N_STEPS`` steps, or after so many that ``seconds`` have passed. No
    validation interrupts them.
    """

    def __init__(self, script: Any, seconds: float) -> None:
        self.real_step, self.real_save = script.Training.take_step, script.save_checkpoint
        self.seconds = seconds
        self.ends: list[float] = []
        self.saves: list[float] = []
        self.run: Any = None

    def take_step(self, run: Any) -> Any:
        if self.run is None:
            self.run, self.n_per_validation = run, run.n_per_validation
            run.n_per_validation = 10**18
        n_steps = len(self.ends)
        is_late = n_steps > 2 and time.perf_counter() > self.ends[0] + self.seconds
        if is_late or n_steps == N_WARMUP + N_STEPS:
            raise MeasuredError

        result = self.real_step(run)
        if n_steps in (N_WARMUP - 1, N_WARMUP + N_STEPS - 1):
            synchronize(run.process.device)  # in between, a GPU may lag behind
        self.ends.append(time.perf_counter())
        return result

    def save_checkpoint(self, *args: Any) -> None:
        begin = time.perf_counter()
        self.real_save(*args)
        self.saves.append(time.perf_counter() - begin)

    def step_seconds(self) -> tuple[float, float]:
        """Return the mean of a step after the warm-up, and when the first step began."""
        n_warmup = max(1, min(N_WARMUP, len(self.ends) // 2))
        warm = self.ends[n_warmup - 1]
        step = (self.ends[-1] - warm) / max(1, len(self.ends) - n_warmup)
        return step, warm - n_warmup * step


def measure(job: Job, seconds: float, launched: float) -> dict[str, float]:
    """Take ``N_STEPS`` steps of a real training, or as many as ``seconds`` allow, and validate.

    ``launched`` is when this process was started. Returns the seconds of a start, a step, saving,
    and a validation (``validation_seconds + item_seconds * items``), and the numbers of items.
    """
    import_seconds = time.time() - launched
    load = job.script.load_run_images if job.script is glow else job.script.load_run_table
    load(job.config, None)  # builds its cache, which takes time only once
    clock = StepClock(job.script, seconds)
    begin = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(job.script.Training, 'take_step', lambda run: clock.take_step(run)),
        mock.patch.object(job.script, 'save_checkpoint', clock.save_checkpoint),
        contextlib.suppress(MeasuredError),
    ):
        places = [f'--data_dir={job.data_dir}', f'--output_dir={folder}']
        job.script.main(['--train', *job.words, *places])

    step, first_step = clock.step_seconds()
    run = clock.run
    return {
        'start_seconds': import_seconds + max(0.0, first_step - begin),
        'step_seconds': step,
        'save_seconds': max(clock.saves),
        'steps_per_epoch': run.n_per_epoch / run.n_per_step,
        'epochs_per_validation': clock.n_per_validation / run.n_per_epoch,
        **measure_validation(run, seconds),
    }


def measure_validation(run: Any, seconds: float) -> dict[str, float]:
    """Validate on a few items, and on three times as many unless that takes too long."""
    data = run.data
    is_images = hasattr(data.validation, 'images')
    splits = [data.train, data.validation, data.test]
    items = [split.images if is_images else split for split in splits]
    n_train, n, n_test = (0 if rows is None else len(rows) for rows in items)

    def validate(n_items: int) -> float:
        part = items[1][:n_items]
        run.data = replace(
            data, validation=replace(data.validation, images=part) if is_images else part
        )
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            run.validate(Path(folder))
        synchronize(run.process.device)
        return time.perf_counter() - begin

    few = min(n, 4 * run.config.batch_size if is_images else TABLE_ROWS)
    many = min(n, 3 * few)
    of_few = validate(few)
    fixed, each = 0.0, of_few / few
    if many > few and of_few < seconds / 5:
        of_few = min(of_few, validate(few))  # the first one may have loaded a library
        each = max(0.0, validate(many) - of_few) / (many - few)
        fixed = max(0.0, of_few - few * each)
    return {
        'validation_seconds': fixed,
        'item_seconds': each,
        'n_train': n_train,
        'n_validation': n,
        'n_test': n_test,
    }


# ----------------------------------------------------------------------------------------- planning


def seconds_after_training(job: Job, measured: dict[str, float]) -> tuple[float, float]:
    """Return the seconds of the evaluation, and those of the drawings."""
    evaluation = measured['validation_seconds'] + measured['item_seconds'] * measured['n_test']
    drawing = 2 * measured['start_seconds'] + 5  # a start, and what else takes time
    if job.script is glow:  # --visualize encodes training images
        drawing += measured['item_seconds'] * min(measured['n_train'], glow.DZ_IMAGES)
    return evaluation, drawing


def choose_epochs(job: Job, measured: dict[str, float], seconds: float) -> int:
    """Return how many epochs fit into ``seconds`` with all else that is to be done, at least 1."""
    validation = measured['validation_seconds'] + 2 * measured['save_seconds']
    validation += measured['item_seconds'] * measured['n_validation']
    epoch = measured['steps_per_epoch'] * measured['step_seconds']
    epoch += validation / measured['epochs_per_validation']
    # the last step is always validated, wherever in a cycle it is
    rest = measured['start_seconds'] + validation + sum(seconds_after_training(job, measured))
    n_epochs = int((0.95 * seconds - rest) / epoch)
    return max(1, min(n_epochs, job.config.n_epochs))


def schedule_words(config: Any, n_epochs: int) -> list[str]:
    """Return the options that shorten a training to ``n_epochs``, and its schedule with it.

    What is a share of the training, as ``--lr_decay`` and ``--annealing``, follows by itself.
    """
    words = [f'--n_epochs={n_epochs}']
    if n_epochs == config.n_epochs:
        return words
    if config.n_epochs_warmup:
        words.append(f'--n_epochs_warmup={min(config.n_epochs_warmup, n_epochs / 10):g}')
    if hasattr(config, 'lr_patience'):
        patience = config.lr_patience * n_epochs / config.n_epochs
        words.append(f'--lr_patience={max(1, round(patience))}')
    return words
