"""Put small trainings through faults: kills, signals, full disks, moved data, bad numbers and more.

    python tests/faults.py --kills=100                 check every promise
    python tests/faults.py --only=preempted,numbers    check some of them

What was measured is printed and kept in ``faults.json``, and a table of it goes into ``README.md``.
The exit code is 1 if a promise was broken. Linux only: processes are found in ``/proc``.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'benchmarks'))
from curves import read_events
from pages import insert, table
from timing import cpu_name, progress

import bnaf
import glow
from datasets.images import load_run_images

ROOT = Path(__file__).resolve().parent.parent
Figures = dict[str, Any]  # what a check measured, as it goes into faults.json


class Case(NamedTuple):
    """A small training: the script, its options, and the constants of the script that differ."""

    script: str
    options: list[str]
    constants: dict[str, float]


SCRIPTS = {'glow': glow, 'bnaf': bnaf}
WRITE_DELAY = 0.05  # seconds that each write takes longer, so that some kills fall into it
CONSTANTS = dict(SAVE_SECONDS=0.03, LOG_STEPS=1)
FILE_LIMIT = 2**13  # bytes per file: more than a job prints, fewer than it saves

DIGITS = ['--dataset=digits', '--depth=1', '--width=8', '--n_epochs=3']
TABLE = ['--dataset=table.npy', '--n_flows=2', '--hidden_dim=4', '--n_epochs=10', '--lr_patience=0']
TOY = ['--dataset=rings', '--hidden_dim=4', '--n_epochs=5']
PICTURES = ['--dataset=folder', '--image_size=16', '--n_levels=1', '--depth=1', '--width=8']
CASES = {
    'glow, digits': Case('glow', [*DIGITS, '--batch_size=64'], dict(VALIDATE_STEPS=20)),
    'bnaf, a table': Case('bnaf', [*TABLE, '--batch_size=20'], {}),
    'bnaf, a toy': Case('bnaf', [*TOY, '--batch_size=50'], dict(EPOCH_BATCHES=20)),
}
ON_ONE_AND_TWO = tuple((case, n_processes) for case in CASES for n_processes in (1, 2))


# --------------------------------------------------------------------------------------------- jobs


def require(condition: bool, message: str) -> None:
    """Raise ``AssertionError`` with the message unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def program(script: str, constants: dict, preamble: str = '', write_delay: float = 0.0) -> str:
    """Return the source of a program that runs a script under other conditions.

    ``constants`` replace those of the script, ``preamble`` is executed before it, and each write
    takes ``write_delay`` seconds longer.
    """
    lines = [
        f'import os, sys, time, {script}',
        'from common import files',
        'fsync_path = files.fsync_path',
        preamble,
        f'files.fsync_path = lambda path: (time.sleep({write_delay}), fsync_path(path))',
    ]
    lines += [f'{script}.{name} = {value}' for name, value in constants.items()]
    return '\n'.join([*lines, f'{script}.main()'])


def file_size_limit(n_bytes: int) -> Callable[[], None]:
    """Return a function that keeps the process that calls it from writing larger files."""
    import resource  # here, as Windows has none, and can still make the table from faults.json

    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def read_environment(path: Path) -> dict[str, str]:
    """Return the variables in an ``environ`` file of ``/proc``."""
    words = path.read_text(errors='replace').split('\0')
    return dict(word.split('=', 1) for word in words if '=' in word)


class Job:
    """A program that runs in a folder, as one process or as several under torchrun.

    What it prints goes to the files ``out`` and ``err`` of the folder. ``prepare`` is called in the
    new process before the program starts.
    """

    def __init__(
        self,
        folder: Path,
        code: str,
        words: Sequence[str],
        n_processes: int = 1,
        max_restarts: int = 0,
        prepare: Callable[[], None] | None = None,
    ):
        self.folder = folder
        self.mark = uuid.uuid4().hex  # its processes are found by this word in their environment
        self.rank_of_launcher = -1 if n_processes > 1 else 0

        command = [sys.executable, '-W', 'ignore', '-c', code, *words]
        if n_processes > 1:
            launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
            launcher += [f'--nproc_per_node={n_processes}', f'--max-restarts={max_restarts}']
            command = [*launcher, '--no-python', *command]
        variables = {
            'OMP_NUM_THREADS': '1',
            'CUDA_VISIBLE_DEVICES': '',
            'PYTHONPATH': str(ROOT),
            'FAULTS_JOB': self.mark,
        }

        self.start = time.perf_counter()
        with open(folder / 'out', 'w') as out, open(folder / 'err', 'w') as err:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **variables},
                stdout=out,
                stderr=err,
                preexec_fn=prepare,
            )

    def find_processes(self) -> dict[int, int]:
        """Return ``{process id: rank}`` of all its running processes; torchrun's own rank is -1."""
        found = {}
        for path in Path('/proc').glob('[0-9]*/environ'):
            with contextlib.suppress(OSError):  # ended meanwhile, or another user's
                variables = read_environment(path)
                if variables.get('FAULTS_JOB') == self.mark:
                    rank = variables.get('RANK', self.rank_of_launcher)
                    found[int(path.parent.name)] = int(rank)
        return found

    def pid_of(self, rank: int) -> int:
        """Return the id of the process of this rank."""
        return {rank: pid for pid, rank in self.find_processes().items()}[rank]

    def is_running(self) -> bool:
        """Tell whether the program, or torchrun, has not ended yet."""
        return self.process.poll() is None

    def wait(self, seconds: float = 300) -> int:
        """Wait for the end and return the exit code."""
        self.wait_until(lambda: not self.is_running(), seconds)
        return self.process.returncode

    def wait_until(
        self, condition: Callable[[], bool], seconds: float = 300, interval: float = 0.005
    ) -> float:
        """Wait for a condition and return how many seconds it took.

        Kills the program and raises ``AssertionError`` if it takes more than ``seconds``.
        """
        start = time.perf_counter()
        while not condition():
            if time.perf_counter() > start + seconds:
                self.kill()
                require(False, f'waited {seconds} s in {self.folder}: {self.errors()}')
            time.sleep(interval)
        return time.perf_counter() - start

    def wait_for_middle(self) -> None:
        """Wait until a checkpoint of the middle of the training is saved."""
        self.wait_until(lambda: self.saved_step() >= 10)

    def wait_for_end_of(self, pid: int) -> float:
        """Wait until one of its processes has ended and return how many seconds it took."""
        return self.wait_until(lambda: pid not in self.find_processes())

    def kill(self) -> None:
        """Kill all its processes, torchrun's workers too, which are in no common process group."""
        while pids := self.find_processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()  # removes the dead child from /proc

    def output(self) -> str:
        """Return what it has written to the standard output so far."""
        return (self.folder / 'out').read_text()

    def errors(self) -> str:
        """Return what it has written to the standard error so far."""
        return (self.folder / 'err').read_text()

    def run_folder(self) -> Path | None:
        """Return the folder with its checkpoint, or None before there is one."""
        checkpoint = next(self.folder.glob('results/*/checkpoint.pt'), None)
        return checkpoint.parent if checkpoint else None

    def saved_step(self) -> int:
        """Return the step of ``checkpoint.pt``, or -1 before there is one."""
        run = self.run_folder()
        return torch.load(run / 'checkpoint.pt', weights_only=True)['step'] if run else -1

    def refusal(self) -> str:
        """Wait for an exit with code 2 and return the one line of the error."""
        require(self.wait() == 2, f'the exit code is not 2: {self.errors()}')
        require('Traceback' not in self.errors(), f'a traceback: {self.errors()}')
        return self.error_line()

    def error_line(self) -> str:
        """Return the one line of an error that its processes have printed together."""
        lines = re.split('[\r\n]+', self.errors())
        lines = [line for line in lines if ': error: ' in line]  # the others are progress
        require(len(lines) == 1, f'not one line: {self.errors()}')
        return lines[0]


# ---------------------------------------------------------------------------------- what a job left


def temporary_files(folder: Path) -> list[Path]:
    """Return the unfinished files in the run folders of a job."""
    return list(folder.glob('results/*/.*.*.*'))


def logged_scalars(run: Path) -> dict[tuple[str, int], float]:
    """Return ``{(tag, step): value}`` as TensorBoard shows them.

    A run that starts again removes what was logged from its first step on. Raises
    ``AssertionError`` if a value is logged twice nevertheless.
    """
    points = {}
    for path in sorted(run.glob('events.out.tfevents.*')):
        for event in read_events(path):
            if event.WhichOneof('what') == 'session_log':
                points = {key: value for key, value in points.items() if key[1] < event.step}
            for value in event.summary.value:
                key = value.tag, event.step
                require(key not in points, f'{value.tag} of step {event.step} is there twice')
                points[key] = value.simple_value
    return points


def outcome(run: Path) -> dict[str, Any]:
    """Return all that a training left except its speed: equal for equal trainings."""
    require(not list(run.glob('.*.*.*')), f'temporary files are left in {run}')
    left = {
        name: torch.load(run / name, weights_only=True) for name in ('checkpoint.pt', 'best.pt')
    }
    left['results.json'] = json.loads((run / 'results.json').read_text())
    left['pictures'] = {path.name: path.read_bytes() for path in run.glob('*.png')}
    scalars = logged_scalars(run).items()
    left['scalars'] = {key: value for key, value in scalars if not key[0].endswith('_per_s')}
    return left


def differences(a: Any, b: Any, where: str = '') -> list[str]:
    """Return the places at which two nested values are not equal to the bit."""
    if type(a) is not type(b):
        return [where]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f'{where}: other keys']
        keys = list(a)
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f'{where}: other length']
        keys = range(len(a))
    else:
        return [] if is_equal(a, b) else [where]

    found = []
    for key in keys:
        found += differences(a[key], b[key], f'{where}/{key}')
    return found


def is_equal(a: Any, b: Any) -> bool:
    """Compare two tensors or plain values of one type; NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b or (a != a and b != b)


class Reference(NamedTuple):
    """A training that nothing happened to."""

    outcome: dict[str, Any]
    seconds: float
    folder: Path


class Harness:
    """The folder of all jobs, and the undisturbed trainings that they are compared with."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.references: dict[tuple[str, int], Reference] = {}
        self.rng = np.random.default_rng(0)
        self.table = self.rng.normal(size=(200, 3)) @ [[1, 0.5, 0], [0, 1, 0.5], [0, 0, 1]]
        np.save(folder / 'table.npy', self.table)

    def new_folder(self, name: str) -> Path:
        """Make a folder whose name begins with this one."""
        words = re.split('[, ]+', name)
        folder = self.folder / '_'.join([*words, uuid.uuid4().hex[:8]])
        folder.mkdir()
        return folder

    def run(
        self,
        script: str,
        words: Sequence[str],
        folder: Path | None = None,
        n_processes: int = 1,
        constants: dict[str, float] | None = None,
        preamble: str = '',
        write_delay: float = 0.0,
        **options: Any,
    ) -> Job:
        """Start a script with these words; see ``program`` and ``Job`` for the other arguments."""
        code = program(script, {**CONSTANTS, **(constants or {})}, preamble, write_delay)
        return Job(folder or self.new_folder(script), code, words, n_processes, **options)

    def train(
        self,
        case: str,
        n_processes: int = 1,
        folder: Path | None = None,
        words: Sequence[str] = (),
        write_delay: float = WRITE_DELAY,
        **options: Any,
    ) -> Job:
        """Start the training of a case, with further words on its command line."""
        script, case_words, constants = CASES[case]
        table = f'--dataset={self.folder}/table.npy'  # the same file for all
        case_words = [table if word == '--dataset=table.npy' else word for word in case_words]
        return self.run(
            script,
            ['--train', *case_words, *words],
            folder or self.new_folder(case),
            n_processes,
            constants,
            write_delay=write_delay,
            **options,
        )

    def reference(self, case: str, n_processes: int = 1) -> Reference:
        """Return the undisturbed training of a case, which is made once."""
        key = case, n_processes
        if key not in self.references:
            job = self.train(case, n_processes)
            require(job.wait() == 0, job.errors())
            seconds = time.perf_counter() - job.start
            self.references[key] = Reference(outcome(job.run_folder()), seconds, job.folder)
        return self.references[key]

    def require_equal(self, job: Job, case: str, n_processes: int = 1) -> None:
        """Raise ``AssertionError`` unless a job left what the undisturbed training did."""
        undisturbed = self.reference(case, n_processes).outcome
        different = differences(undisturbed, outcome(job.run_folder()))
        places = ', '.join(different[:5])
        name = case_name(case, n_processes)
        require(not different, f'{name}: differs from the undisturbed training in {places}')


def case_name(case: str, n_processes: int) -> str:
    """Return a case with its number of processes, as faults.json names it."""
    return f'{case}, {n_processes} process' + 'es' * (n_processes > 1)


def range_of(seconds: Iterable[float]) -> str:
    """Return the smallest and the largest of some times as text."""
    seconds = list(seconds)
    return f'{min(seconds):.2g} to {max(seconds):.2g} s'


# -------------------------------------------------------------------------------- kills and signals


def check_kills(
    harness: Harness, n_kills: int = 100, cases: Sequence[tuple[str, int]] = ON_ONE_AND_TWO
) -> Figures:
    """A training that is killed at any moment and started again by the same command leaves what it
    would have left undisturbed."""
    counts = Counter()
    for k, (case, n_processes) in enumerate(cases):
        n_left = (n_kills - counts['kills']) // (len(cases) - k)
        while True:
            states = train_despite_kills(harness, case, n_processes, n_left)
            n_left -= len(states)
            counts['kills'] += len(states)
            counts[f'kills of {case_name(case, n_processes)}'] += len(states)
            counts['trainings that ended equal to the bit'] += 1
            for state in states:
                counts.update(state)
            if not n_left:
                break
    return dict(counts)


def train_despite_kills(
    harness: Harness, case: str, n_processes: int, max_kills: int
) -> list[list[str]]:
    """Repeat a training's command until it ends by itself; return what each kill left, in words."""
    seconds = harness.reference(case, n_processes).seconds
    folder = harness.new_folder(case)
    states = []
    while True:
        job = harness.train(case, n_processes, folder, ['--resume'])
        if len(states) == max_kills or not kill_at_random(job, harness.rng, seconds):
            break
        states.append(describe_kill(job, SCRIPTS[CASES[case].script]))
    require(job.wait() == 0, job.errors())
    harness.require_equal(job, case, n_processes)
    return states


def kill_at_random(job: Job, rng: np.random.Generator, seconds: float) -> bool:
    """Kill a job at a random moment, or during a random write, and tell whether it still ran.

    ``seconds`` is the time that the whole training takes.
    """
    if rng.random() < 0.5:
        end = time.perf_counter() + rng.uniform(0, seconds)
        while job.is_running() and time.perf_counter() < end:
            time.sleep(0.005)
    else:
        for _ in range(rng.integers(1, 10)):
            wait_for_write(job)
        time.sleep(rng.uniform(0, 2 * WRITE_DELAY))
    was_running = job.is_running()
    job.kill()
    return was_running


def wait_for_write(job: Job) -> None:
    """Wait until a job begins its next write, or ends."""
    for is_writing in (False, True):
        job.wait_until(
            lambda: not job.is_running() or bool(temporary_files(job.folder)) == is_writing,
            interval=5e-4,
        )


def describe_kill(job: Job, script: ModuleType) -> list[str]:
    """Say when a job was killed, by what it left. Every checkpoint must load."""
    paths = job.folder.glob('results/*/*.pt')
    steps = {path.name: script.load_checkpoint(path)['step'] for path in paths}
    run = job.run_folder()
    moments = {
        'kills within a write': temporary_files(job.folder),
        'kills before the first checkpoint': not steps,
        'kills between best.pt and checkpoint.pt': (
            steps.get('best.pt', -1) > steps.get('checkpoint.pt', math.inf)
        ),
        'kills after the training': run and (run / 'results.json').exists(),
    }
    return [moment for moment, is_so in moments.items() if is_so]


def summarize_kills(figures: Figures) -> str:
    minutes = figures['seconds'] / 60
    return (
        f'{figures["kills"]} kills in {minutes:.0f} minutes, '
        f'{figures.get("kills within a write", 0)} of them within a write; '
        f'{figures["trainings that ended equal to the bit"]} trainings ended, all equal to the bit'
    )


def check_preemption(
    harness: Harness,
    cases: Sequence[tuple[str, int]] = ON_ONE_AND_TWO,
    signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
) -> Figures:
    """A signal to one process ends all of them after the same step, with a line that says how to
    resume."""
    seconds = {}
    for case, n_processes in cases:
        for number in signals:
            job = harness.train(case, n_processes)
            job.wait_for_middle()
            os.kill(job.pid_of(n_processes - 1), number)
            taken = job.wait_until(lambda job=job: not job.is_running())
            require(job.wait() == 0 and 'Traceback' not in job.errors(), job.errors())
            seconds[f'{case_name(case, n_processes)}, {number.name}'] = round(taken, 2)

            resumed = resume_as_told(harness, job, case, n_processes)
            require(resumed.wait() == 0, resumed.errors())
            harness.require_equal(resumed, case, n_processes)
    return {'seconds until it had saved and ended': seconds}


def resume_as_told(harness: Harness, job: Job, case: str, n_processes: int) -> Job:
    """Start the command that a stopped job printed."""
    pattern = r'stopped after step (\d+) by .*; to go on: (.*) \w+\.py (.*)'
    ((step, launcher, words),) = re.findall(pattern, job.output())
    expected = 'python' if n_processes == 1 else f'torchrun --nproc_per_node={n_processes}'
    require(launcher == expected, f'it was started by {expected} and says {launcher}')
    saved_step = job.saved_step()
    require(int(step) == saved_step, f'it says step {step} and has saved step {saved_step}')
    script, _, constants = CASES[case]
    return harness.run(script, shlex.split(words), job.folder, n_processes, constants)


def summarize_preemption(figures: Figures) -> str:
    seconds = figures['seconds until it had saved and ended']
    return f'{len(seconds)} signals; {range_of(seconds.values())} until the end'


def check_restarts(harness: Harness, cases: Sequence[str] = tuple(CASES)) -> Figures:
    """Under `torchrun --max-restarts`, when a process dies, all resume from the last checkpoint by
    themselves."""
    seconds_to_stop, seconds_to_resume = {}, {}
    for case in cases:
        job = harness.train(case, 2, max_restarts=3)
        job.wait_for_middle()
        step, other = job.saved_step(), job.pid_of(0)
        os.kill(job.pid_of(1), signal.SIGKILL)

        stopped = job.wait_for_end_of(other)
        resumed = job.wait_until(lambda job=job, step=step: job.saved_step() > step + 5)
        seconds_to_stop[case] = round(stopped, 2)
        seconds_to_resume[case] = round(stopped + resumed, 2)
        require(job.wait() == 0, job.errors())
        harness.require_equal(job, case, 2)
    return {
        'seconds until the others had stopped': seconds_to_stop,
        'seconds until a later step was saved': seconds_to_resume,
    }


def summarize_restarts(figures: Figures) -> str:
    seconds = figures['seconds until a later step was saved']
    return f'{range_of(seconds.values())} until a later step was saved'


def check_lost_process(
    harness: Harness, cases: Sequence[str] = tuple(CASES), repeats: int = 3
) -> Figures:
    """When a process dies, each of the others ends with one line that says which process it is and
    that it has lost another one."""
    seconds = []
    for case in [*cases] * repeats:
        job = harness.train(case, 2)
        job.wait_for_middle()
        other = job.pid_of(0)
        os.kill(job.pid_of(1), signal.SIGKILL)
        seconds.append(round(job.wait_for_end_of(other), 2))

        require(job.wait() != 0, 'the exit code is 0')
        line = f'process 0 on {socket.gethostname()} lost, or never reached, another process'
        n_lines = job.errors().count(line)
        require(n_lines == 1, f'{case}: no line of the other process: {job.errors()}')
    return {'seconds until the others had stopped': sorted(seconds)}


def summarize_lost_process(figures: Figures) -> str:
    seconds = figures['seconds until the others had stopped']
    return f'{len(seconds)} deaths; {range_of(seconds)} until the others had ended'


# -------------------------------------------------------------------------------- disks and folders


def read_files(run: Path, with_events: bool = False) -> dict[str, bytes]:
    """Return the contents of a run folder except its lock and, unless asked for, its events."""
    paths = [path for path in run.iterdir() if not path.name.startswith('.lock')]
    if not with_events:
        paths = [path for path in paths if 'tfevents' not in path.name]
    return {path.name: path.read_bytes() for path in paths}


def check_full_disk(harness: Harness, cases: Sequence[str] = tuple(CASES)) -> Figures:
    """When a file cannot be written, the program ends with one line, and the files that were there
    are as before."""
    lines = Counter()
    never = dict.fromkeys(('SAVE_SECONDS', 'VALIDATE_STEPS', 'EPOCH_BATCHES'), 10**6)
    for case in cases:
        script, _, constants = CASES[case]
        folder = harness.new_folder(case)
        shutil.copytree(harness.reference(case).folder / 'results', folder / 'results')
        run = next(folder.glob('results/*'))
        before = read_files(run)

        resume = ['--train', f'--restore_file={run}/checkpoint.pt', '--n_epochs=1000']
        attempts = [
            (resume, constants),  # the disk is full at a checkpoint
            (resume, never),  # at the events
            (['--generate'], {}),  # at the samples
        ]
        for words, constants in attempts:
            limit = file_size_limit(FILE_LIMIT)
            job = harness.run(script, words, folder, constants=constants, prepare=limit)
            line = job.refusal()
            require(' cannot be written' in line, line)
            require(read_files(run) == before, f'{words}: a file in {run} has changed')
            lines[re.sub(r'\S*/', '', line)] += 1  # without the names of folders
    return {'lines': dict(lines)}


def summarize_full_disk(figures: Figures) -> str:
    return f'{sum(figures["lines"].values())} writes refused'


def check_second_training(harness: Harness, cases: Sequence[str] = tuple(CASES)) -> Figures:
    """A second training in the folder of a running one is refused and writes nothing there."""
    for case in cases:
        job = harness.train(case)
        job.wait_for_middle()
        run, first = job.run_folder(), job.pid_of(0)
        os.kill(first, signal.SIGSTOP)  # so that it does not end before the second one begins
        words = ['--train', f'--restore_file={run}/checkpoint.pt', '--n_epochs=50']
        second = harness.run(CASES[case].script, words)
        require('another process trains in' in second.refusal(), second.errors())

        os.kill(first, signal.SIGCONT)
        require(job.wait() == 0, job.errors())
        n_events = len(list(run.glob('events.*')))
        require(n_events == 1, 'the second training has written events')
        harness.require_equal(job, case)
    return {'refusals': len(cases)}


def summarize_second_training(figures: Figures) -> str:
    return f'{figures["refusals"]} refused'


def check_disagreement(harness: Harness, which: slice = slice(None)) -> Figures:
    """Processes that were started with different options or data stop and say what differs."""
    folder = harness.new_folder('disagree')
    (folder / 'other').mkdir()
    np.save(folder / 'table.npy', harness.table)
    np.save(folder / 'other' / 'table.npy', harness.table + 1)
    for name in ('here', 'there'):
        write_pictures(folder / name, 20, seed=len(name))

    pictures = [*PICTURES, '--data_dir=here']
    cases = [  # script, options, what is different on process 1, what the line names
        ('glow', pictures, "sys.argv.append('--seed=1')", ' --seed'),
        ('glow', pictures, "sys.argv.append('--depth=2')", ' --depth'),
        ('glow', pictures, "sys.argv.append('--data_dir=there')", 'data'),
        ('glow', pictures, "sys.argv[1] = '--evaluate'", ' mode'),
        ('bnaf', TABLE, "sys.argv.append('--lr=1')", ' --lr'),
        ('bnaf', TABLE, "os.chdir('other')", 'data'),
    ]
    seconds = []
    for script, words, change, name in cases[which]:
        preamble = f"if os.environ['RANK'] == '1': {change}"
        job = harness.run(script, ['--train', *words], folder, 2, preamble=preamble)
        require(job.wait() != 0, f'{change}: it trained')
        seconds.append(round(time.perf_counter() - job.start, 2))

        beginning = 'error: the processes start from different'
        lines = [line for line in job.errors().splitlines() if beginning in line]
        require(len(lines) == 1 and name in lines[0], f'{change}: {job.errors()}')
    return {'refusals': len(seconds), 'seconds from start to end': seconds}


def summarize_disagreement(figures: Figures) -> str:
    seconds = range_of(figures['seconds from start to end'])
    return f'{figures["refusals"]} refused, {seconds} after the start'


# ---------------------------------------------------------------- other processes, runs and places


STOP = """
import signal
take_step = {script}.Training.take_step
def take_step_and_stop(run):
    result = take_step(run)
    if run.n_seen >= {n_seen} and run.process.rank == run.process.world_size - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return result
{script}.Training.take_step = take_step_and_stop"""


def check_resizing(
    harness: Harness, cases: Sequence[str] = tuple(CASES), sizes: Sequence[int] = (1, 4, 2)
) -> Figures:
    """A training that is stopped and resumed on other numbers of processes ends after as many
    images or rows as an unbroken one, to one batch of all processes, with a finite result."""
    figures = {}
    for case in cases:
        unbroken = harness.reference(case, sizes[0]).outcome['checkpoint.pt']['n_seen']
        figures[case] = {'unbroken': unbroken, 'resized': resize(harness, case, sizes, unbroken)}
    return {'processes': list(sizes), 'images or rows after each start': figures}


def resize(harness: Harness, case: str, sizes: Sequence[int], n_to_see: int) -> list[int]:
    """Train on each of these numbers of processes; return what had been seen at the end of each."""
    script, words, _ = CASES[case]
    batch_size = int(re.search(r'--batch_size=(\d+)', ' '.join(words))[1])
    folder = harness.new_folder(case)
    seen, step = [0], 0
    for n_processes in sizes:
        is_last = len(seen) == len(sizes)
        n_seen = 10**9 if is_last else n_to_see * len(seen) // len(sizes)
        preamble = STOP.format(script=script, n_seen=n_seen)
        job = harness.train(case, n_processes, folder, ['--resume'], preamble=preamble)
        require(job.wait() == 0, job.errors())
        was_stopped = 'stopped after step' in job.output()
        require(was_stopped != is_last, f'{case}: on {n_processes} processes: {job.output()}')

        saved = torch.load(job.run_folder() / 'checkpoint.pt', weights_only=True)
        n_new = (saved['step'] - step) * batch_size * n_processes
        step = saved['step']
        require(saved['n_seen'] == seen[-1] + n_new, f'{case}: it has miscounted at step {step}')
        worlds = saved['first_world_size'], saved['world_size']
        require(worlds == (sizes[0], n_processes), f'{case}: numbers of processes: {worlds}')
        seen.append(saved['n_seen'])

    is_right_end = abs(seen[-1] - n_to_see) < batch_size * max(sizes[0], sizes[-1])
    require(is_right_end, f'{case}: it has seen {seen}, one without a stop {n_to_see}')
    score = read_score(job.run_folder() / 'results.json')
    require(math.isfinite(score), f'{case}: the result is {score}')
    return seen[1:]


def summarize_resizing(figures: Figures) -> str:
    cases = figures['images or rows after each start'].values()
    ends = [f'{case["resized"][-1]:,} for {case["unbroken"]:,}' for case in cases]
    sizes = ', then '.join(map(str, figures['processes']))
    return f'{sizes} processes: {", ".join(ends)} images or rows'


CHOICES = {  # options of two trainings of each script on different data
    'glow': (DIGITS[:3], [*PICTURES, '--data_dir=pictures']),
    'bnaf': (
        ['--dataset=rows.npy', *TABLE[1:3]],
        ['--dataset=rows_2.npy', *TABLE[1:3]],  # whose run folders begin with the same words
    ),
}


def check_choice(
    harness: Harness, scripts: Sequence[str] = tuple(CHOICES), which: slice = slice(None)
) -> Figures:
    """`--train --resume`, `--evaluate` and `--generate` take the newest run of a folder or, with
    `--dataset`, the newest run of that data set."""
    n_commands = 0
    for script in scripts:
        folder = harness.new_folder('choose')
        write_pictures(folder / 'pictures', 20)
        np.save(folder / 'rows.npy', harness.table)
        np.save(folder / 'rows_2.npy', harness.table + 1)
        first, second = CHOICES[script]
        runs = []
        for words in (first, first, second):
            words = ['--train', *words, '--batch_size=256', '--n_epochs=1']
            job = harness.run(script, words, folder)
            runs.append(chosen_run(job, r'the model is (\S+)/best.pt'))

        resume = ['--train', '--resume', '--n_epochs=2']
        commands = [  # and which of the three runs it should take
            (['--evaluate'], 2),
            (['--evaluate', *first[:1]], 1),
            (['--generate', *first[:1]], 1),
            (['--generate'], 2),
            ([*resume], 2),
            ([*resume, *first[:1]], 1),  # this run is the newest from here on
            (['--evaluate'], 1),
        ]
        for words, expected in commands[which]:
            run = chosen_run(harness.run(script, words, folder), r'restored (\S+)/\w+\.pt: step')
            require(run == runs[expected], f'{script} {words}: it took {run} of {runs}')
        n_runs = len(list(folder.glob('results/*')))
        require(n_runs == len(set(runs)) == 3, f'{script}: there are {n_runs} runs')
        n_commands += len(commands[which])
    return {'commands that took the right run': n_commands}


def chosen_run(job: Job, pattern: str) -> str:
    """Wait for the end and return the folder of a run that a line of its output names."""
    require(job.wait() == 0, job.errors())
    runs = re.findall(pattern, job.output())
    require(len(runs) == 1, f'the output does not name one run: {job.output()}')
    return runs[0]


def summarize_choice(figures: Figures) -> str:
    return f'{figures["commands that took the right run"]} commands took the right one'


MOVES = {  # the script, its options, the one that says where the data is, and where it is in turn
    'a table': ('bnaf', [*TABLE, '--batch_size=20'], 'dataset', 'table.npy', 'new/table.npy'),
    'a folder of images': (
        'glow',
        [*PICTURES, '--n_epochs=10', '--batch_size=8'],
        'data_dir',
        'pictures',
        'new/photos',
    ),
}


def check_moved_data(harness: Harness, names: Sequence[str] = tuple(MOVES)) -> Figures:
    """A training whose data moves while it is stopped goes on with the new path, and leaves what it
    would have left undisturbed. Other rows in the new place are refused."""
    lines = []
    for name in names:
        script, words, option, old, new = MOVES[name]
        folder = harness.new_folder('move')
        write_pictures(folder / 'pictures', 40)
        np.save(folder / 'table.npy', harness.table)
        (folder / 'new').mkdir()
        train = ['--train', '--resume', *words]
        in_old_place = [*train, f'--{option}={folder / old}']
        in_new_place = [*train, f'--{option}={folder / new}']
        undisturbed = harness.run(script, in_old_place)
        require(undisturbed.wait() == 0, undisturbed.errors())

        stop = STOP.format(script=script, n_seen=200)
        stopped = harness.run(script, in_old_place, folder, preamble=stop)
        require(stopped.wait() == 0 and 'stopped after' in stopped.output(), stopped.errors())
        (folder / old).rename(folder / new)
        if name == 'a table':
            lines.append(refuse_other_rows(harness, in_new_place, folder, folder / new))
        resumed = harness.run(script, in_new_place, folder)
        require(resumed.wait() == 0, resumed.errors())

        left = [outcome_without(option, job.run_folder()) for job in (undisturbed, resumed)]
        different = ', '.join(differences(*left)[:5])
        require(not different, f'{name}: differs from the undisturbed training in {different}')
    return {'trainings that ended equal to the bit': len(names), 'lines about other rows': lines}


def outcome_without(option: str, run: Path) -> dict[str, Any]:
    """Return all that a training left, except an option and the name of its data."""
    left = outcome(run)
    for name in ('checkpoint.pt', 'best.pt'):
        del left[name]['config'][option]
    del left['results.json']['dataset']
    return left


def refuse_other_rows(harness: Harness, words: list[str], folder: Path, table: Path) -> str:
    """Change a table that has moved, in one value, and back; return the line that refuses it."""
    rows = np.load(table)
    changed = rows.copy()
    changed[-1, -1] += 1e-9
    np.save(table, changed)
    line = refuse_unchanged(harness, 'bnaf', words, folder)
    require('is not what it was when the model was trained' in line, line)
    np.save(table, rows)
    return line.replace(f'{folder}/', '')


def refuse_unchanged(harness: Harness, script: str, words: list[str], folder: Path) -> str:
    """Return the line that refuses a command. The run folder must stay as it is."""
    (run,) = folder.glob('results/*')
    before = read_files(run, with_events=True)
    line = harness.run(script, words, folder).refusal()
    require(list(folder.glob('results/*')) == [run], f'{words}: another run was started')
    is_same = read_files(run, with_events=True) == before
    require(is_same, f'{words}: a file in {run} has changed')
    return line


def summarize_moved_data(figures: Figures) -> str:
    n = figures['trainings that ended equal to the bit']
    n_refused = len(figures['lines about other rows'])
    return f'{n} trainings ended, all equal to the bit; {n_refused} refused'


def splits_of(run: Path) -> dict[bytes, str]:
    """Return which split of a run's data each of its images is in."""
    saved = glow.load_checkpoint(run / 'checkpoint.pt')
    data = load_run_images(saved['config'], saved)
    names = ('train', 'validation', 'test')
    return {image.tobytes(): name for name in names for image in getattr(data, name).images}


def check_changed_images(harness: Harness, n: int = 100, n_added: int = 50) -> Figures:
    """When images are added to the folder of a run, all that it had stay in their split.
    `--evaluate` says how many are new, and training goes on only with `--accept_changed_data`."""
    folder = harness.new_folder('change')
    write_pictures(folder / 'pictures', n)
    words = ['--train', '--resume', *PICTURES, f'--data_dir={folder}/pictures', '--n_epochs=4']
    words += ['--batch_size=8']
    stop = STOP.format(script='glow', n_seen=100)
    stopped = harness.run('glow', words, folder, preamble=stop)
    require(stopped.wait() == 0 and 'stopped after' in stopped.output(), stopped.errors())
    run = stopped.run_folder()
    before = splits_of(run)
    require(len(before) == n, f'the splits have {len(before)} of {n} images')

    write_pictures(folder / 'pictures' / 'more', n_added, seed=1)
    evaluated = harness.run('glow', ['--evaluate'], folder)
    require(evaluated.wait() == 0, evaluated.errors())
    note = f'have changed since training: {n_added} new, 0 changed, 0 gone'
    require(note in evaluated.output(), f'no word of new images: {evaluated.output()}')
    after = require_same_splits(before, run)

    line = refuse_unchanged(harness, 'glow', words, folder)
    require('add --accept_changed_data' in line, line)
    resumed = harness.run('glow', [*words, '--accept_changed_data'], folder)
    require(resumed.wait() == 0, resumed.errors())
    require(require_same_splits(before, run) == after, 'the training has split them otherwise')
    return {
        'images before': dict(Counter(before.values())),
        'images after': dict(Counter(after.values())),
        'line without --accept_changed_data': line.replace(f'{folder}/', ''),
    }


def require_same_splits(before: dict[bytes, str], run: Path) -> dict[bytes, str]:
    """Return ``splits_of(run)``. Each image must be where it was, and the test split be scored."""
    after = splits_of(run)
    n_moved = sum(after.get(image) != split for image, split in before.items())
    require(n_moved == 0, f'{n_moved} of {len(before)} images are in another split')

    n_test = list(after.values()).count('test')
    n_scored = json.loads((run / 'results.json').read_text())['n_images']
    require(
        n_scored == n_test, f'{n_scored} images were scored, and {n_test} are in the test split'
    )
    return after


def summarize_changed_images(figures: Figures) -> str:
    n_before, n_after = (sum(figures[f'images {time}'].values()) for time in ('before', 'after'))
    return f'{n_after - n_before} images added to {n_before}, all of which stayed in their split'


# ------------------------------------------------------------------------------------- surroundings


EQUAL = 'equal to the bit'

NO_FLOCK = """
import errno, fcntl
def flock(*args):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.flock = flock"""

TOO_LITTLE_MEMORY = """
import torch
take_step = {script}.Training.take_step
def take_step_or_fail(run):
    return torch.empty(2**50, dtype=torch.uint8) if run.step == 10 else take_step(run)
{script}.Training.take_step = take_step_or_fail"""

INTERRUPTED_IMPORT = """
import os, runpy, signal, sys
class Interrupt:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell has it ignored
sys.meta_path.insert(0, Interrupt)
runpy.run_path({path!r}, run_name='__main__')"""


def meet_dangling_link(harness: Harness, case: str) -> str:
    """Train where ``results`` is a link to nowhere."""
    folder = harness.new_folder(case)
    (folder / 'results').symlink_to('nowhere')
    line = harness.train(case, folder=folder).refusal()
    require('results cannot be made' in line, line)
    return line


def meet_dead_holder(harness: Harness, case: str) -> str:
    """Train, on a file system without flock, where a process that was killed has left its lock."""
    first = harness.train(case, preamble=NO_FLOCK)
    first.wait_for_middle()
    os.kill(first.pid_of(0), signal.SIGSTOP)  # so that it does not end before the second one begins
    second = harness.train(case, 1, first.folder, ['--resume'], preamble=NO_FLOCK)
    require('another process trains in' in second.refusal(), second.errors())
    first.kill()

    third = harness.train(case, 1, first.folder, ['--resume'], preamble=NO_FLOCK)
    require(third.wait() == 0, third.errors())
    harness.require_equal(third, case)
    return EQUAL


def meet_error_of_one_process(harness: Harness, case: str) -> str:
    """Train on two processes, the second of which does not find the table."""
    script, words, _ = CASES[case]
    folder = harness.new_folder(case)
    (folder / 'other').mkdir()
    np.save(folder / 'table.npy', harness.table)
    preamble = "if os.environ['RANK'] == '1': os.chdir('other')"
    job = harness.run(script, ['--train', *words], folder, 2, preamble=preamble)
    require(job.wait() != 0, 'it trained')

    line = job.error_line()
    require('other/table.npy' in line, line)
    n_tracebacks = job.errors().count('Traceback')
    require(n_tracebacks <= 1, f'a traceback beside that of torchrun: {job.errors()}')
    require(re.search(r'exitcode *: 2 ', job.errors()), f'not exit code 2: {job.errors()}')
    return line.replace(f'{folder}/', '')


def meet_too_little_memory(harness: Harness, case: str) -> str:
    """Train until a step needs more memory than there is, and go on where there is more."""
    preamble = TOO_LITTLE_MEMORY.format(script=CASES[case].script)
    job = harness.train(case, preamble=preamble)
    line = job.refusal()
    require('out of memory' in line, line)

    resumed = harness.train(case, folder=job.folder, words=['--resume'])
    require(resumed.wait() == 0, resumed.errors())
    harness.require_equal(resumed, case)
    return line


def meet_interrupt(harness: Harness, script: str, module: str) -> str:
    """Interrupt a script while it imports a module."""
    path = str(ROOT / f'{script}.py')
    code = INTERRUPTED_IMPORT.format(module=module, path=path)
    job = Job(harness.new_folder('interrupt'), code, ['--train'])
    line = job.refusal()
    require(job.errors() == f'{script}.py: error: interrupted\n', job.errors())
    return line


def meet_lost_errors(harness: Harness, case: str, lose: Callable[[], None]) -> str:
    """Train without a standard error."""
    job = harness.train(case, prepare=lose)
    require(job.wait() == 0, f'the exit code is {job.wait()}: {job.output()}')
    harness.require_equal(job, case)
    return EQUAL


def break_pipe_of_errors() -> None:
    """Make the standard error a pipe that nobody reads."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    os.dup2(write_end, 2)


SURROUNDINGS = {
    'a dangling link called results': partial(meet_dangling_link, case='bnaf, a table'),
    'a lock of a dead process, without flock': partial(meet_dead_holder, case='glow, digits'),
    'no table on one of two processes': partial(meet_error_of_one_process, case='bnaf, a table'),
    'too little memory': partial(meet_too_little_memory, case='glow, digits'),
    'an interrupt while glow.py imports': partial(meet_interrupt, script='glow', module='torch'),
    'an interrupt while bnaf.py imports': partial(meet_interrupt, script='bnaf', module='tqdm'),
    'a closed standard error': partial(
        meet_lost_errors, case='glow, digits', lose=partial(os.close, 2)
    ),
    'a standard error that nobody reads': partial(
        meet_lost_errors, case='bnaf, a table', lose=break_pipe_of_errors
    ),
}


def check_surroundings(harness: Harness, only: Sequence[str] = ()) -> Figures:
    """Too little memory, an interrupted start, a closed standard error, a dead process's lock and
    the like end a training with one line, or change nothing of what it leaves."""
    return {'result or line': {name: SURROUNDINGS[name](harness) for name in only or SURROUNDINGS}}


def summarize_surroundings(figures: Figures) -> str:
    ends = list(figures['result or line'].values())
    n_equal = ends.count(EQUAL)
    return f'{len(ends)} faults: {len(ends) - n_equal} lines, {n_equal} trainings equal to the bit'


ROUND_OTHERWISE = """
import math, torch
build_model = {script}.build_model
def build_otherwise(config, input_dims):
    model = build_model(config, input_dims)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.nextafter(value, torch.full_like(value, math.inf)))
    return model
if os.environ['RANK'] == '1':
    {script}.build_model = build_otherwise"""

WITHOUT_COMMON_FILES = """
if os.environ['RANK'] == '1':
    os.mkdir('other')
    os.chdir('other')"""

SRUN_ALONE = """
os.environ.pop('SLURM_STEP_NUM_TASKS', None)
os.environ['SLURM_NTASKS'] = '2'"""


def check_start(
    harness: Harness,
    rounded: Sequence[str] = tuple(CASES),
    apart: Sequence[str] = ('glow, digits', 'bnaf, a toy'),
    alone: Sequence[str] = ('glow, digits', 'bnaf, a toy'),
) -> Figures:
    """Processes whose initial weights differ in the last bits, or that share no files, leave what
    those of one machine do. Processes that `srun` starts without `torchrun` are refused."""
    for case in rounded:
        preamble = ROUND_OTHERWISE.format(script=CASES[case].script)
        job = harness.train(case, 2, preamble=preamble)
        require(job.wait() == 0, job.errors())
        harness.require_equal(job, case, 2)

    for case in apart:
        job = harness.train(case, 2, preamble=WITHOUT_COMMON_FILES)
        require(job.wait() == 0, job.errors())
        harness.require_equal(job, case, 2)
        others = list((job.folder / 'other').iterdir())
        require(not others, f'process 1 has written {others}')

    for case in alone:
        job = harness.train(case, preamble=SRUN_ALONE)
        line = job.refusal()
        require('srun' in line and 'torchrun' in line, line)
        require(not (job.folder / 'results').exists(), 'it has made a run folder')
    return {
        'from other initial weights, equal to the bit': len(rounded),
        'without common files, equal to the bit': len(apart),
        'refusals': len(alone),
    }


def summarize_start(figures: Figures) -> str:
    n_equal = sum(n for name, n in figures.items() if name.endswith('equal to the bit'))
    return f'{n_equal} trainings, all equal to the bit; {figures["refusals"]} refused'


# ------------------------------------------------------------------------------- memory and numbers


COUNT_MEMORY = """
take_step = {script}.Training.take_step
def count_memory(run):
    if run.step in ({warmup}, {n_steps} - 1):
        status = dict(line.split(':', 1) for line in open('/proc/self/status'))
        print('memory', status['VmRSS'].split()[0], len(os.listdir('/proc/self/fd')))
    return take_step(run)
{script}.Training.take_step = count_memory"""


def check_growth(
    harness: Harness,
    n_steps: int = 2000,
    warmup: int = 500,
    bound: float = 0.01,
    cases: Sequence[str] = tuple(CASES),
) -> Figures:
    """Neither memory nor the number of open files grows with the number of steps."""
    figures = {}
    for case in cases:
        script, words, _ = CASES[case]
        preamble = COUNT_MEMORY.format(script=script, warmup=warmup, n_steps=n_steps)
        last_step = harness.reference(case).outcome['checkpoint.pt']['step']
        n_epochs = int(re.search(r'--n_epochs=(\d+)', ' '.join(words))[1])
        longer = [f'--n_epochs={math.ceil(n_steps * n_epochs / last_step)}']
        if script == 'bnaf':
            longer += ['--early_stop=10000']

        job = harness.train(case, words=longer, preamble=preamble, write_delay=0)
        require(job.wait(900) == 0, job.errors())
        counts = re.findall(r'memory (\d+) (\d+)', job.output())
        (early_kib, early_files), (late_kib, late_files) = np.array(counts, dtype=int).tolist()
        figures[case] = {
            'MB': [round(early_kib / 1e3, 1), round(late_kib / 1e3, 1)],
            'open files': [early_files, late_files],
        }
        is_bounded = early_files == late_files and late_kib < (1 + bound) * early_kib
        require(is_bounded, f'{case}: {figures[case]}')
    return {f'at step {warmup} and {n_steps}': figures}


def summarize_growth(figures: Figures) -> str:
    (steps,) = (name for name in figures if name.startswith('at step'))
    pairs = [case['MB'] for case in figures[steps].values()]
    return f'{steps}: ' + ', '.join(f'{early:.0f} and {late:.0f}' for early, late in pairs) + ' MB'


def write_pictures(folder: Path, n: int, seed: int = 0, one_colour: bool = False) -> None:
    """Write n images of noise, or of one colour that all share."""
    folder.mkdir()
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    if one_colour:
        pixels[:] = pixels[0, 0, 0]
    for i in range(n):
        Image.fromarray(pixels[i]).save(folder / f'{i:02}.png')


def write_odd_data(folder: Path, table: np.ndarray) -> None:
    """Write images of one colour, few images, tables with a huge value, and tables of few rows."""
    write_pictures(folder / 'flat', 20, one_colour=True)
    write_pictures(folder / 'ten', 10)
    write_pictures(folder / 'one', 1)

    np.save(folder / 'table.npy', table)
    order = np.random.default_rng(0).permutation(len(table))  # how --seed=0 splits the rows
    for split, row in (('train', order[0]), ('test', order[-1])):
        for value in ('1e30', '1e200'):
            changed = table.copy()
            changed[row, 1] = float(value)
            np.save(folder / f'{split}_{value}.npy', changed)

    rng = np.random.default_rng(0)
    for n in (3, 10, 11):
        np.save(folder / f'{n}_rows.npy', rng.normal(size=(n, 3)))


def odd_trainings(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Return ``{name: (script, options)}`` of trainings with odd options, and on odd data."""
    digits, table = [*DIGITS, '--batch_size=64'], [*TABLE, '--batch_size=20']
    pictures = [*PICTURES, '--n_epochs=4', '--batch_size=8']
    trainings = {
        'lr x 100': ('glow', [*digits, '--lr=0.1']),
        'lr x 10,000': ('glow', [*digits, '--lr=10']),
        'images of one colour': ('glow', [*pictures, '--data_dir=flat']),
        'one image in a split': ('glow', [*pictures, '--data_dir=ten']),
        'one image': ('glow', [*pictures, '--data_dir=one']),
        'batches of 1 image': ('glow', [*digits, '--batch_size=1', '--n_epochs=1']),
        '1 bit': ('glow', [*digits, '--n_bits=1']),
        '8 bits': ('glow', [*digits, '--n_bits=8']),
        'bf16': ('glow', [*digits, '--bf16']),
        'bf16, lr x 100': ('glow', [*digits, '--bf16', '--lr=0.1']),
        'a table, lr x 100': ('bnaf', [*table, '--lr=1']),
        'a table, lr x 10,000': ('bnaf', [*table, '--lr=100']),
        'a toy, lr x 100': ('bnaf', [*TOY, '--lr=10']),
        'an energy, lr x 100': ('bnaf', [*TOY[1:], '--dataset=u2', '--lr=10']),
        'batches of 1 row': ('bnaf', [*table, '--batch_size=1', '--n_epochs=2']),
    }
    for file in sorted(folder.glob('*_*.npy')):
        trainings[file.stem.replace('_', ' ')] = ('bnaf', [*table, f'--dataset={file.name}'])
    return trainings


def check_numbers(harness: Harness, only: Sequence[str] = ()) -> Figures:
    """Whatever the options and the data, a training ends with a finite result or with one line, and
    all its checkpoints are finite."""
    folder = harness.new_folder('numbers')
    write_odd_data(folder, harness.table)
    trainings = odd_trainings(folder)
    ends = {}
    for name in only or trainings:
        script, words = trainings[name]
        output = f'results_of_{len(ends)}'
        job = harness.run(script, ['--train', *words, f'--output_dir={output}'], folder)
        if job.wait() == 2:
            ends[name] = job.refusal().split(': error: ')[1].replace(f'{folder}/', '')
        else:
            require(job.wait() == 0, f'{name}: {job.errors()}')
            ends[name] = read_score(next(folder.glob(f'{output}/*/results.json')))
            require(math.isfinite(ends[name]), f'{name}: the result is {ends[name]}')
        for path in folder.glob(f'{output}/*/*.pt'):
            require_finite_checkpoint(SCRIPTS[script], path)
    return {'result or line': ends}


def read_score(path: Path) -> float:
    """Return the score in a ``results.json``, whichever it has."""
    result = json.loads(path.read_text())
    names = ('bits_per_dim', 'log_likelihood_nats', 'kl_nats')
    return next(result[name] for name in names if name in result)


def require_finite_checkpoint(script: ModuleType, path: Path) -> None:
    """Raise ``AssertionError`` if the optimizer in a checkpoint holds a number that is not finite.

    Loading it refuses weights that are not.
    """
    states = script.load_checkpoint(path)['optimizer']['state'].values()
    is_finite = all(value.isfinite().all() for state in states for value in state.values())
    require(is_finite, f'the optimizer in {path} is not finite')


def summarize_numbers(figures: Figures) -> str:
    ends = figures['result or line'].values()
    n_lines = sum(isinstance(end, str) for end in ends)
    return f'{len(ends)} cases, {n_lines} of which end in a line'


# ------------------------------------------------------------------------------------------- report


class Promise(NamedTuple):
    """A promise, which is the docstring of its check, and how its figures are shown."""

    check: Callable[..., Figures]
    summarize: Callable[[Figures], str]

    def text(self) -> str:
        return ' '.join(self.check.__doc__.split())


PROMISES = {
    'killed': Promise(check_kills, summarize_kills),
    'preempted': Promise(check_preemption, summarize_preemption),
    'restarted': Promise(check_restarts, summarize_restarts),
    'lost': Promise(check_lost_process, summarize_lost_process),
    'out_of_disk': Promise(check_full_disk, summarize_full_disk),
    'twice': Promise(check_second_training, summarize_second_training),
    'disagreeing': Promise(check_disagreement, summarize_disagreement),
    'growing': Promise(check_growth, summarize_growth),
    'numbers': Promise(check_numbers, summarize_numbers),
    'resized': Promise(check_resizing, summarize_resizing),
    'chosen': Promise(check_choice, summarize_choice),
    'moved': Promise(check_moved_data, summarize_moved_data),
    'changed': Promise(check_changed_images, summarize_changed_images),
    'surroundings': Promise(check_surroundings, summarize_surroundings),
    'started': Promise(check_start, summarize_start),
}


def markdown(results: dict[str, Figures]) -> str:
    """Return the table of the promises that are in the results, one row each."""
    rows = []
    for name, promise in PROMISES.items():
        if name not in results:
            continue
        figures = results[name]
        is_kept = 'broken' not in figures
        measured = promise.summarize(figures) if is_kept else f'**broken**: {figures["broken"]}'
        rows.append([promise.text(), f'`--only={name}`', measured])
    return table(('promise', '`python tests/faults.py`', 'measured'), rows)


def measure(harness: Harness, name: str, n_kills: int) -> Figures:
    """Check a promise and return its figures; those of a broken one say how it was broken."""
    options = {'n_kills': n_kills} if name == 'killed' else {}
    start = time.perf_counter()
    try:
        figures = PROMISES[name].check(harness, **options)
    except AssertionError as error:
        figures = {'broken': str(error)}
    return {**figures, 'seconds': round(time.perf_counter() - start)}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    names = ','.join(PROMISES)
    parser.add_argument('--kills', type=int, default=100, metavar='N', help='kills of "killed"')
    parser.add_argument('--only', default=names, metavar='A,B', help=f'some of {names}')
    parser.add_argument(
        '--out',
        default=Path(__file__).parent,
        type=Path,
        metavar='DIR',
        help='folder of faults.json and, where there is one, of the README.md with its table',
    )
    args = parser.parse_args(argv)
    args.only = args.only.split(',')
    unknown = [name for name in args.only if name not in PROMISES]
    if unknown:
        parser.error(f'no such promise: {", ".join(unknown)}; there are {names}')
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    file, page = args.out / 'faults.json', args.out / 'README.md'
    results = json.loads(file.read_text()) if file.exists() else {}
    n_cores = len(os.sched_getaffinity(0))
    results['machine'] = f'{cpu_name()}, {n_cores} cores, torch {torch.__version__}'

    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder))
        for name in args.only:
            results[name] = measure(harness, name, args.kills)
            progress(f'{name}: {json.dumps(results[name], indent=1)}')
            file.write_text(json.dumps(results, indent=1) + '\n')
    if page.exists():
        insert(page, 'faults.py', markdown(results))
    sys.exit(int(any('broken' in results[name] for name in args.only)))


if __name__ == '__main__':
    main()
