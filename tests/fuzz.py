"""Feed damaged files to every reader of the project, and report what becomes of them.

    python tests/fuzz.py --minutes=10                  all readers, 10 minutes each
    python tests/fuzz.py --reader=h5,images            some of them
    python tests/fuzz.py --reader=h5 --seed=123        one input again, such as one that was kept

Each input is a valid file that was damaged with its checksums repaired, so that most get beyond the
header. It depends on the reader and on its number, the seed, alone. A reader has to return a value
or to refuse the file in one line, in 10 seconds and 1 GB of memory. Anything else is a finding,
whose input and traceback are kept: another exception, a crash, a hang, too much memory.

A table of the results is printed at the end; ``--write`` puts it into ``README.md``, where the rows
of other readers stay. The exit code is 1 if there are findings. Linux only: the limits are those of
its processes.
"""

import argparse
import faulthandler
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'benchmarks'))
from fuzz_readers import READERS, Reader, Seed
from hostile import memory_of_process, peak_memory_of_children, reset_peak_memory
from pages import END_MARK, insert, significant, table
from timing import progress

from common import bounds
from common.errors import UserError, truncate

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / 'tests' / 'README.md'  # gets the table
MAX_SECONDS = 10  # on the clock, for one input
MAX_MEMORY = 2**30  # bytes that a worker may take beyond what it has before its first input
MAX_MESSAGE = 1000  # characters of a refusal; ``UserError`` itself makes one line of it
MAX_FILE_BYTES = 2**30  # that a reader may write
INPUTS_PER_WORKER = 5000  # so that memory that libraries lose does not add up
MAX_KEPT = 5  # inputs that are kept of findings that look the same
REPORT_SECONDS = 60

LOADED, REFUSED, FINDING = 'loaded', 'refused', 'finding'


# ------------------------------------------------------------------------------------------- inputs


def make_input(name: str, seeds: Sequence[Seed], number: int) -> Seed:
    """Return the input of a reader with this number."""
    rng = Random(f'{name} {number}')
    seed = rng.choice(seeds)
    others = [other for other in seeds if other.mutate is seed.mutate]
    content = seed.mutate(seed.content, rng.choice(others).content, rng)
    return seed._replace(content=content)


class Outcome(NamedTuple):
    """What became of an input. ``text`` describes a finding; its last line is a summary."""

    kind: str
    passed_header: bool = False
    seconds: float = 0.0
    memory: int = 0  # bytes at the peak, beyond those before the first input
    text: str = ''


def try_input(reader: Reader, path: Path, memory_before: int) -> Outcome:
    """Read a file, and check afterwards whether its header was good."""
    kind, text = LOADED, ''
    reset_peak_memory()
    start = time.perf_counter()
    try:
        reader.read(path)
    except UserError as error:
        kind = REFUSED
        if len(str(error)) > MAX_MESSAGE:
            kind = FINDING
            text = f'a refusal of more than {MAX_MESSAGE:,} characters: {truncate(str(error))}'
    except BaseException as error:
        kind, text = FINDING, describe_error(error)
    seconds = time.perf_counter() - start

    memory = max(memory_of_process('VmHWM'), peak_memory_of_children()) - memory_before
    return Outcome(kind, reader.passes_header(path), seconds, memory, text)


def describe_error(error: BaseException) -> str:
    """Return the traceback of an error, and a last line that is equal for equal bugs."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).parent.parent == ROOT] or frames
    ours = [frame for frame in ours if '/tests/' not in frame.filename] or ours
    place = f'{Path(ours[-1].filename).name}, {ours[-1].name}'
    deepest = f'{Path(frames[-1].filename).name}, {frames[-1].name}'
    text = ''.join(traceback.format_exception(error))[-10_000:]
    return f'{text}\n{type(error).__name__} in {place} (from {deepest})'


# ------------------------------------------------------------------------------------------ workers


def work(name: str, seeds: list[Seed], first: int, folder: Path, connection: Connection) -> None:
    """Read the inputs from a number on, and send the outcome of each, until nobody listens.

    This is the whole life of a worker process. What it prints, and its traceback where it crashes,
    goes to the file ``log`` of the folder.
    """
    prepare_worker(folder / 'log')
    reader = READERS[name]
    memory_before = memory_of_process('VmRSS')
    with bounds.limit_address_space(MAX_MEMORY):
        for number in range(first, first + INPUTS_PER_WORKER):
            given = make_input(name, seeds, number)
            path = folder / given.name
            path.write_bytes(given.content)
            try:
                connection.send(try_input(reader, path, memory_before))
            except OSError:  # the parent has heard enough
                return
            path.unlink()


def prepare_worker(log_path: Path) -> None:
    """Make this process write to a log, end with its parent, and write no large files."""
    bounds.exit_with_parent()
    with open(log_path, 'wb', buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.enable(2, all_threads=False)
    tqdm.set_lock(threading.RLock())  # a killed process would never release the common one
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))

    torch.set_num_threads(1)  # it would wait for threads of the parent, which are not forked


class Worker:
    """A process that reads inputs in a folder of its own, from a number on."""

    def __init__(self, name: str, seeds: list[Seed], first: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix='fuzz_')
        self.log = Path(self.folder.name) / 'log'
        context = multiprocessing.get_context('fork')
        self.connection, other_end = context.Pipe(duplex=False)
        args = name, seeds, first, Path(self.folder.name), other_end
        self.process = context.Process(target=work, args=args)
        self.process.start()
        other_end.close()
        self.has_ended = False

    def next_outcome(self) -> Outcome | None:
        """Return the outcome of the next input, None where the worker has done its share."""
        if not self.connection.poll(MAX_SECONDS):
            self.has_ended = True
            return Outcome(FINDING, seconds=MAX_SECONDS, text=self.describe_hang())
        try:
            return self.connection.recv()
        except EOFError:
            self.has_ended = True
            self.process.join()

        code = self.process.exitcode
        if code == 0:
            return None
        end = signal.Signals(-code).name if code < 0 else f'exit code {code}'
        return Outcome(FINDING, text=f'{self.traceback()}\ncrash: {end}{self.place()}')

    def describe_hang(self) -> str:
        """End a worker that takes too long, and return where it was."""
        os.kill(self.process.pid, signal.SIGABRT)  # lets faulthandler print a traceback
        self.process.join(1)
        return f'{self.traceback()}\nhang: more than {MAX_SECONDS} s{self.place()}'

    def traceback(self) -> str:
        """Return the end of what the worker has printed, without a list of all modules."""
        text, _, _ = self.log.read_text(errors='replace').partition('\nExtension modules: ')
        return text[-10_000:]

    def place(self) -> str:
        """Return the innermost line of the traceback that a signal has caused, if there is one."""
        lines = [line for line in self.traceback().splitlines() if line.startswith('  File ')]
        return f' in {lines[0].strip()}' if lines else ''

    def close(self) -> None:
        """End the process, and remove its folder."""
        self.connection.close()
        self.process.kill()
        self.process.join()
        self.folder.cleanup()


def outcomes(
    name: str, seeds: list[Seed], first: int, n_inputs: int | None, seconds: float
) -> Iterator[tuple[int, Outcome]]:
    """Yield the number and the outcome of inputs, until there are enough or the time is over."""
    end = time.monotonic() + seconds
    number = first
    worker = None
    try:
        while n_inputs is None or number < first + n_inputs:
            worker = worker or Worker(name, seeds, number)
            outcome = worker.next_outcome()
            if outcome is not None:
                yield number, outcome
                number += 1
            if time.monotonic() > end:
                return
            if worker.has_ended:
                worker.close()
                worker = None
    finally:
        if worker is not None:
            worker.close()


# ------------------------------------------------------------------------------------------- report


@dataclass
class Results:
    """What became of all inputs of a reader."""

    name: str
    n_inputs: int = 0
    n_passed: int = 0
    counts: Counter = field(default_factory=Counter)  # by the kind of the outcome
    seconds: float = 0.0  # of the slowest
    memory: int = 0
    findings: Counter = field(default_factory=Counter)  # by their summary
    first_seeds: dict[str, int] = field(default_factory=dict)

    def add(self, number: int, outcome: Outcome) -> None:
        self.n_inputs += 1
        self.n_passed += outcome.passed_header
        self.counts[outcome.kind] += 1
        self.seconds = max(self.seconds, outcome.seconds)
        self.memory = max(self.memory, outcome.memory)
        if outcome.kind == FINDING:
            summary = outcome.text.splitlines()[-1]
            self.findings[summary] += 1
            self.first_seeds.setdefault(summary, number)

    def share_passed(self) -> float:
        """Return which share of the inputs got beyond the header."""
        return self.n_passed / max(self.n_inputs, 1)

    def line(self) -> str:
        """Return a line about what there was so far."""
        share = f'{self.share_passed():.0%} of which passed the header'
        return f'{self.name}: {self.n_inputs:,} inputs, {share}, {self.counts[FINDING]:,} findings'

    def row(self) -> list[str]:
        """Return the cells of a row of the table."""
        return [
            self.name,
            f'{self.n_inputs:,}',
            f'{self.share_passed():.0%}',
            f'{self.counts[LOADED]:,}',
            f'{self.counts[REFUSED]:,}',
            f'{self.counts[FINDING]:,}',
            significant(self.seconds),
            f'{self.memory / 1e6:,.0f}',
        ]


def fuzz(
    name: str, seconds: float, out: Path, first: int = 0, n_inputs: int | None = None
) -> Results:
    """Feed a reader for some seconds, or some inputs, and keep those that are findings."""
    seeds = READERS[name].make_seeds()
    results = Results(name)
    next_report = time.monotonic() + REPORT_SECONDS
    for number, outcome in outcomes(name, seeds, first, n_inputs, seconds):
        results.add(number, outcome)
        if outcome.kind == FINDING:
            keep_finding(results, number, make_input(name, seeds, number), outcome, out)
        if time.monotonic() > next_report:
            progress(results.line())
            next_report += REPORT_SECONDS
    return results


def keep_finding(results: Results, number: int, given: Seed, outcome: Outcome, out: Path) -> None:
    """Write an input and what became of it to files, unless there are enough like it."""
    summary = outcome.text.splitlines()[-1]
    if results.findings[summary] > MAX_KEPT:
        return
    out.mkdir(parents=True, exist_ok=True)
    path = out / f'{results.name}_{number}_{given.name}'
    path.write_bytes(given.content)
    repeat = f'python tests/fuzz.py --reader={results.name} --seed={number}'
    path.with_name(f'{path.name}.txt').write_text(f'{repeat}\n\n{outcome.text}\n')
    progress(f'{results.name}, seed {number}: {summary}')


HEADER = ['reader', 'inputs', 'passed the header', 'loaded', 'refused in one line', 'findings']
HEADER += ['slowest, s', 'peak memory, MB']


def rows_of_page(page: Path) -> dict[str, list[str]]:
    """Return the cells of the table in a page by the name of the reader."""
    _, _, rest = page.read_text().partition('<!-- what fuzz.py wrote -->')
    lines, _, _ = rest.partition(END_MARK)
    rows = [line.strip('| ').split(' | ') for line in lines.splitlines()]
    return {cells[0]: cells for cells in rows if cells[0] in READERS}


def markdown(rows: dict[str, list[str]]) -> str:
    """Return the table of the readers that are among the rows."""
    return table(HEADER, [rows[name] for name in READERS if name in rows])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    names = ','.join(READERS)
    parser.add_argument('--minutes', type=float, default=10, metavar='M', help='of each reader')
    parser.add_argument('--reader', default=names, metavar='A,B', help=f'some of {names}')
    parser.add_argument('--first', type=int, default=0, metavar='K', help='the first seed')
    parser.add_argument('--seed', type=int, metavar='K', help='this input alone')
    parser.add_argument(
        '--out', type=Path, default=Path('results/fuzz'), metavar='DIR', help='folder of findings'
    )
    parser.add_argument('--write', action='store_true', help='put the table into README.md')
    args = parser.parse_args(argv)
    args.reader = args.reader.split(',')
    unknown = [name for name in args.reader if name not in READERS]
    if unknown:
        parser.error(f'no such reader: {", ".join(unknown)}; there are {names}')
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    first, n_inputs = (args.first, None) if args.seed is None else (args.seed, 1)
    rows, n_findings = {}, 0
    for name in args.reader:
        results = fuzz(name, 60 * args.minutes, args.out, first, n_inputs)
        rows[name] = results.row()
        n_findings += results.counts[FINDING]
        progress(f'{results.line()}, the end')
        for summary, count in results.findings.most_common():
            print(f'    {count:,} times, first seed {results.first_seeds[summary]}: {summary}')
    print(markdown(rows))
    if args.write:
        insert(PAGE, 'fuzz.py', markdown({**rows_of_page(PAGE), **rows}))
    sys.exit(int(n_findings > 0))


if __name__ == '__main__':
    main()
