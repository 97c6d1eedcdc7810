"""Put small trainings through faults: kills, signals, full disks, disagreement and bad numbers.

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

    What it prints goes to the files ``out`` and ``err`` of the folder. ``file_limit`` is the
    largest file it can write, in bytes.
    """

    def __init__(
        self,
        folder: Path,
        code: str,
        words: Sequence[str],
        n_processes: int = 1,
        max_restarts: int = 0,
        file_limit: int | None = None,
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
                preexec_fn=file_size_limit(file_limit) if file_limit else None,
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

        Raises ``AssertionError`` if it takes more than ``seconds``.
        """
        start = time.perf_counter()
        while not condition():
            is_late = time.perf_counter() > start + seconds
            require(not is_late, f'waited {seconds} s in {self.folder}: {self.errors()}')
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
            self.is_running()  # removes the dead child from /proc

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
        **limits: int,
    ) -> Job:
        """Start a script with these words; see ``program`` and ``Job`` for the other arguments."""
        code = program(script, {**CONSTANTS, **(constants or {})}, preamble, write_delay)
        return Job(folder or self.new_folder(script), code, words, n_processes, **limits)

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


def read_files(run: Path) -> dict[str, bytes]:
    """Return the contents of a run folder except its lock and events."""
    paths = [path for path in run.iterdir() if path.name != '.lock']
    return {path.name: path.read_bytes() for path in paths if 'tfevents' not in path.name}


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
            job = harness.run(script, words, folder, constants=constants, file_limit=FILE_LIMIT)
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
