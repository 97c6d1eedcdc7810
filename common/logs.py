"""Progress bar and TensorBoard scalars."""

import math
import os
import sys
import time

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from .files import report_full_disk


def progress_bar(*args, **options):
    """tqdm, seldom updated where its output goes to a file"""
    return tqdm(
        *args, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 15, **options
    )


class ScalarWriter:
    """Scalars of a run for tensorboard, in an events file that supersedes what earlier files say of first_step and later
    ones. (SummaryWriter writes by a thread, which loses what it still holds when it is killed, and tells no one of a full
    disk.) Does nothing without a folder."""

    def __init__(self, folder, first_step):
        self.folder, self.writer = (
            folder,
            folder and EventsWriter(str(folder / 'events'), f'.{os.getpid()}'),
        )
        self.flushed = time.time()
        self.write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, **content):
        if self.writer:
            with report_full_disk(f'the events of {self.folder}'):
                self.writer.write_event(Event(wall_time=time.time(), **content))

    def add(self, step, values):
        self.write(
            step=step,
            summary=Summary(
                value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
            ),
        )
        if time.time() > self.flushed + 30:
            self.flush()

    def flush(self):
        """On the disk, before a checkpoint says that these steps are done"""
        if self.writer:
            with report_full_disk(f'the events of {self.folder}'):
                self.writer.flush()
        self.flushed = time.time()


class TrainingLog(ScalarWriter):
    """What the main process shows of a training of a score, in units, on items: scalars and, as a context, a progress bar"""

    def __init__(self, run, folder, score, unit, items):
        super().__init__(folder if run.process.rank == 0 else None, run.step + 1)
        self.run, self.score, self.unit, self.items = run, score, unit, items

    def __enter__(self):
        run = self.run
        if self.writer:
            print(
                f'{sum(p.numel() for p in run.model.parameters()):,} parameters, step {run.step:,} of at most {run.n_steps:,}'
            )
            if run.n_steps * (1 - run.config.ema_decay) < 3:
                print(
                    'note: after so few steps the averaged weights, which are scored, are mostly the first: lower --ema_decay'
                )
        self.begin, self.first = time.perf_counter(), run.step
        self.bar = progress_bar(
            total=run.n_steps, initial=run.step, disable=not self.writer, unit='step'
        )
        return self

    def __exit__(self, *error):
        self.bar.close()

    def step(self, loss, norm, every):
        """After each step of the optimizer; loss and gradient norm are shown every so many steps"""
        run = self.run
        self.bar.update()
        if run.step % every == 0 and not run.skips_in_a_row:
            speed = (
                (run.step - self.first)
                * run.config.batch_size
                * run.process.world_size
                / (time.perf_counter() - self.begin)
            )
            validation = f' (validation: {run.validation_loss:.3f})' if run.best < math.inf else ''
            self.bar.set_postfix_str(
                f'{loss:.3f} {self.unit}{validation}, {speed:.0f} {self.items}/s', refresh=False
            )
            self.add(
                run.step,
                {
                    f'{self.score}/train': loss.item(),
                    'gradient_norm': norm.item(),
                    'lr': run.optimizer.param_groups[0]['lr'],
                    f'{self.items}_per_s': speed,
                    'steps_skipped': run.n_skipped,
                },
            )

    def validated(self):
        self.add(self.run.step, {f'{self.score}/validation': self.run.validation_loss})

    def stopped(self, signals, script, newest):
        """Says, after a signal, how to go on"""
        if self.writer:
            print(
                f'stopped after step {self.run.step} by {signals[0] if signals else "a signal to another process"}; to go on: '
                f'python {script}.py --train --restore_file={newest}'
            )
