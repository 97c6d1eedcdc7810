"""Train, score and draw the models of RESULTS.md, each by its name, within the given minutes.

    python benchmarks/reproduce.py --list                       the names, and what they need
    python benchmarks/reproduce.py faces u2 --minutes=5 --out=DIR
    python benchmarks/reproduce.py --check --out=DIR            compare DIR with what is recorded
    python benchmarks/reproduce.py gpu_tests speed --out=DIR    tests of a GPU, then its speed

Each name is measured first, then trained for as many epochs as fit. Names run side by side. DIR
gets at most eight files, each below 16 MiB, and has them whenever this is killed: results.json,
log.txt, a picture of each name and, where they fit, its weights. The runs themselves are in --work;
the same command goes on with them.
"""

import argparse
import contextlib
import difflib
import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

# The scripts are in the folder above this one.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from keeping import (
    MAX_FILES,
    MAX_PARTS,
    Keeper,
    is_evaluated,
    read_results,
    run_folder,
    weight_files,
)
from planning import choose_epochs, measure, schedule_words, seconds_after_training
from recipes import HERE, RECIPES, ROOT, Job, list_recipes, make_job, published, recorded_rows
from results import SCRIPTS, score_cell
from timing import machine_name

from common.errors import UserError, UserErrorParser, exit_on_user_error, one_line
from common.files import make_writable, write_json
from common.runs import catch_stop_signals

UPDATE_SECONDS = 30.0  # between two updates of DIR
RESERVED_SECONDS = 5.0  # of a call, for its own start and for the last files
STOP_SECONDS = 60.0  # in which a training may save itself
MEASURING_SHARE = 0.1  # of the time that is left, at most, each for steps and validations
CHECKS = ('gpu_tests', 'speed')
CHECK_MINUTES = 4.0  # of both together, at most
SPEED_FILES = 3  # that speed.py writes
# tests/test_gpu.py, and the tests that are named for a GPU elsewhere
GPU_TESTS = ['-m', 'pytest', '-q', '--continue-on-collection-errors', 'tests']
GPU_TESTS += ['-k', 'gpu or cuda or tf32']


@dataclass
class Call:
    """What holds for all names of one call.

    Attributes:
        keeper: keeps the files of DIR.
        end: on the clock of ``time.monotonic``.
        n_threads: of each training.
        signals: the names of those that have come, which end all that is done.
        failed: the names that have failed.
        shown: the stage, and the number of validations, of each name's last line.
    """

    keeper: Keeper
    end: float
    n_threads: int
    signals: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    shown: dict[str, tuple] = field(default_factory=dict)

    def run(
        self, words: list[str], log: Path, end: float, update: Callable[[], Any] = lambda: None
    ) -> int | None:
        """Run python with these words. Return its exit code, or None where it was stopped.

        It is stopped at ``end``, or by a signal to us. What it prints is added to ``log``;
        ``update`` is called now and then.
        """
        environment = {**os.environ, 'OMP_NUM_THREADS': str(self.n_threads)}
        log.parent.mkdir(parents=True, exist_ok=True)
        next_update = time.monotonic() + UPDATE_SECONDS
        with log.open('a') as output:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                while process.poll() is None:
                    if self.signals or time.monotonic() > end:
                        return None
                    time.sleep(0.1)
                    if time.monotonic() > next_update:
                        update()
                        next_update = time.monotonic() + UPDATE_SECONDS
            finally:
                stop_process(process)
        return process.returncode


def stop_process(process: subprocess.Popen) -> None:
    """End a process if it has not ended; a training saves itself before."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    process.kill()
    process.wait()


def say(name: str, text: str) -> None:
    print(f'{name}: {text}', flush=True)


def last_line(log: Path) -> str:
    lines = log.read_text(errors='replace').strip().splitlines()
    return lines[-1][:300] if lines else 'it printed nothing'


# --------------------------------------------------------------------------------------- trainings


def make_plan(job: Job, call: Call) -> dict[str, Any]:
    """Measure a training and choose its epochs. A run that goes on keeps the plan that it has."""
    file = Path(job.folder) / 'plan.json'
    if file.exists():
        plan = json.loads(file.read_text())
        if run_folder(job) is None:  # there was no time to begin: plan anew
            n_epochs = choose_epochs(job, plan['measured'], call.end - time.monotonic())
            plan['n_epochs'] = n_epochs
            write_json(file, plan)
        return plan

    report = file.with_name('measured.json')
    seconds = MEASURING_SHARE * (call.end - time.monotonic())
    arguments = json.dumps([asdict(job), str(report), seconds, time.time()])
    code = call.run([__file__, f'--measure={arguments}'], job.log, call.end)
    if code is None:
        raise UserError('there was no time to measure it')
    if code:
        raise UserError(f'it could not be measured: {last_line(job.log)}')

    measured = json.loads(report.read_text())
    n_epochs = choose_epochs(job, measured, call.end - time.monotonic())
    plan = {'n_epochs': n_epochs, 'measured': measured}
    write_json(file, plan)
    return plan


def reproduce(job: Job, call: Call) -> None:
    """Measure, train, evaluate and draw. Raises ``UserError`` where a command fails."""
    plan = make_plan(job, call)
    n_epochs = plan['n_epochs']
    of = f'{n_epochs} of {job.config.n_epochs} epochs'
    say(job.name, f'{1e3 * plan["measured"]["step_seconds"]:.3g} ms per step, {of}')

    # train
    end = call.end - sum(seconds_after_training(job, plan['measured']))
    words = job.command('--train', '--resume', *job.words, *schedule_words(job.config, n_epochs))
    code = call.run(words, job.log, end, lambda: update(job, call, plan, 'training'))
    if code:
        raise UserError(f'the training failed: {last_line(job.log)}')
    folder = run_folder(job)
    if folder is None:
        raise UserError('there was no time for a first checkpoint: give more minutes')
    plan['is_complete'] = code == 0
    stage = 'trained' if code == 0 else f'stopped before the end of {n_epochs} epochs'
    update(job, call, plan, stage)

    # evaluate, unless the training has done it, and draw
    modes = [] if is_evaluated(folder) else [['--evaluate']]
    modes += job.drawings()
    if not call.signals:
        commands = [job.command(*words)[1:] for words in modes]
        arguments = json.dumps([job.script_name, commands])
        words = [__file__, f'--modes={arguments}']
        if call.run(words, job.log, call.end, lambda: update(job, call, plan, stage)) != 0:
            say(job.name, f'not all of it could be drawn: {last_line(job.log)}')
    update(job, call, plan, 'done' if plan['is_complete'] else stage)


def update(job: Job, call: Call, plan: dict[str, Any], stage: str) -> None:
    """Bring DIR up to date, and print where a name stands if that is new."""
    entry = call.keeper.keep(job, plan, stage)
    scores = entry.get('validation', [[], [], []])[2]
    state = stage, len(scores)
    if call.shown.get(job.name) == state:
        return
    call.shown[job.name] = state

    text = f'{stage}, step {entry.get("step", 0):,}'
    if 'score' in entry:
        text += f', test score {score_cell(entry)}'
    elif scores:
        text += f', validation {scores[-1]:.4f} ({entry["objective"]})'
    say(job.name, text)


def run_job(job: Job, call: Call) -> None:
    """Do all of a job. What ends it is printed and kept, and does not end the others."""
    try:
        reproduce(job, call)
    except Exception as error:
        call.failed.append(job.name)
        if not isinstance(error, (UserError, OSError)):
            raise  # a bug, whose traceback is wanted
        say(job.name, f'error: {one_line(error)}')
        so_far = read_results(call.keeper.out).get(job.name, {})
        with call.keeper.lock:
            call.keeper.enter(job.name, {**so_far, 'stage': f'failed: {one_line(error)}'})


def run_modes(script_name: str, commands: list[list[str]]) -> None:
    """Run modes of a script one after the other, in this process; exit with 1 if one failed."""
    has_failed = False
    for words in commands:
        try:
            SCRIPTS[script_name].main(words)
        except SystemExit:  # it has printed why
            has_failed = True
    sys.exit(int(has_failed))


# ------------------------------------------------------------------------------ checks of a machine


def run_checks(names: list[str], call: Call) -> None:
    """Run the tests that are meant for a GPU, then speed.py, before anything else is trained."""
    begin = time.monotonic()
    end = min(call.end, begin + 60 * CHECK_MINUTES)
    if 'gpu_tests' in names:
        if importlib.util.find_spec('pytest'):
            run_check('gpu_tests', GPU_TESTS, begin + (end - begin) / 2, call)
        else:
            say('gpu_tests', 'left out, as pytest is not installed (requirements-dev.txt)')
    if 'speed' in names:
        minutes = max(0.1, (end - time.monotonic() - 15) / 60)  # it may end a little late
        words = [f'{HERE}/speed.py', f'--out={call.keeper.out}', f'--minutes={minutes:.2f}']
        run_check('speed', words, end, call)


def run_check(name: str, words: list[str], end: float, call: Call) -> None:
    """Run python with these words, and keep how it ended."""
    log = call.keeper.work / name / 'log.txt'
    log.unlink(missing_ok=True)
    code = call.run(words, log, end)
    stage = {0: 'passed', None: 'stopped'}.get(code, 'failed')
    if stage == 'failed':
        call.failed.append(name)
    call.keeper.enter(name, {'stage': stage, 'summary': last_line(log)})
    say(name, f'{stage}: {last_line(log)}')


# ----------------------------------------------------------------------------------------- verdicts


def has_worse(out: Path) -> bool:
    """Compare the scores in DIR with those recorded; return whether any of them is worse."""
    entries, rows = read_results(out), recorded_rows()
    if not entries:
        raise UserError(f'{out} holds no results.json')
    verdicts = []
    for name, entry in entries.items():
        text, is_worse = entry['stage'], entry['stage'].startswith('failed')
        if name in RECIPES and 'score' in entry and not is_worse:
            text, is_worse = compare(entry, rows.get(RECIPES[name].row), published(name))
        say(name, text)
        verdicts.append(is_worse)
    return any(verdicts)


def compare(entry: dict, row: dict | None, published: str) -> tuple[str, bool]:
    """Say how a score compares with a recorded row, and whether it is worse.

    It is worse where it differs by more than both bars allow (two standard errors each, added as
    squares). A run of fewer epochs than the recipe's is not judged.
    """
    if not math.isfinite(entry['score'] + entry['two_standard_errors']):
        return 'the score is not finite: WORSE', True
    text = score_cell(entry)
    if row is None:
        return f'{text}; none is recorded; published: {published or "none"}', False

    text += f', recorded {score_cell(row)}'
    if not entry.get('is_complete') or entry['n_epochs'] < entry['recipe_epochs']:
        of = f'at most {entry["n_epochs"]} of {entry["recipe_epochs"]} epochs'
        return f'{text}: not judged, as the run was shorter ({of})', False
    excess = entry['score'] - row['score']
    if row['unit'] == 'nats':  # of log-likelihood, the only score of which more is better
        excess = -excess
    bars = math.hypot(entry['two_standard_errors'], row['two_standard_errors'])
    return (f'{text}: WORSE', True) if excess > bars else (f'{text}: as good', False)


# -------------------------------------------------------------------------------------------- main


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = UserErrorParser(
        'python benchmarks/reproduce.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    work = ROOT / 'results' / 'reproduce'
    parser.add_argument('names', nargs='*', metavar='NAME', help='as --list shows them')
    parser.add_argument('--list', action='store_true', help='print all names')
    parser.add_argument('--check', action='store_true', help='compare DIR with what is recorded')
    parser.add_argument('--minutes', type=float, default=10, help='of the whole call [10]')
    parser.add_argument('--out', type=Path, metavar='DIR', help='where the eight files go')
    parser.add_argument('--data_dir', type=Path, default=Path('data'), help='of all data [data]')
    parser.add_argument('--work', type=Path, default=work, help='of the runs [results/reproduce]')
    # Given to the processes that this starts.
    parser.add_argument('--measure', type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument('--modes', type=json.loads, help=argparse.SUPPRESS)

    args = parser.parse_args(argv)
    known = [*RECIPES, *CHECKS]
    for name in args.names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise UserError(f'unknown name {name!r}: perhaps {near}; --list shows all')
    is_alone = args.list or args.measure or args.modes
    if not (is_alone or args.names or args.check):
        raise UserError('give a name (--list shows all) or --check')
    if not (is_alone or args.out):
        raise UserError('give --out=DIR, the folder of the results')
    if not args.minutes > 0:
        raise UserError(f'--minutes={args.minutes:g} is not above 0')
    return args


def make_call(args: argparse.Namespace, n_jobs: int) -> Call:
    """Return what holds for all names. Raises ``UserError`` where DIR has no room for them."""
    end = time.monotonic() + 60 * args.minutes - RESERVED_SECONDS
    out, work = args.out.resolve(), args.work.resolve()
    others = read_results(out).keys() - set(args.names)
    names = others.union(args.names)
    n_files = 2 + len(names.difference(CHECKS)) + SPEED_FILES * ('speed' in names)
    n_files += sum(len(weight_files(out, name)) for name in others)
    if n_files > MAX_FILES:
        raise UserError(
            f'{", ".join(sorted(names))} take more than {MAX_FILES} files: give fewer names at '
            'once, or another --out'
        )
    for folder in (out, work):
        if not make_writable(folder):
            raise UserError(f'{folder} cannot be written')

    n_parts = min(MAX_PARTS, MAX_FILES - n_files) // max(1, n_jobs)
    n_threads = int(os.environ.get('OMP_NUM_THREADS') or torch.get_num_threads())
    torch.set_num_threads(max(1, n_threads // max(1, n_jobs)))
    machine = f'{machine_name()}, torch {torch.__version__.split("+")[0]}'
    return Call(Keeper(out, work, n_parts, machine), end, torch.get_num_threads())


def run_all(args: argparse.Namespace) -> None:
    """Run the checks, then all trainings side by side. Raises ``UserError`` where one failed."""
    names = [name for name in dict.fromkeys(args.names) if name not in CHECKS]
    jobs = [make_job(name, args.data_dir, args.work) for name in names]
    call = make_call(args, len(jobs))
    threads = [threading.Thread(target=run_job, args=(job, call)) for job in jobs]
    with catch_stop_signals() as call.signals:
        run_checks(args.names, call)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if call.signals:
        raise UserError(f'stopped by {call.signals[0]}; the same command goes on')
    if call.failed:
        log = call.keeper.out / 'log.txt'
        raise UserError(f'{", ".join(call.failed)} failed: {log} says why')


def main(argv: list[str] | None = None) -> None:
    with exit_on_user_error('reproduce'):
        args = parse_args(argv)
        if args.measure:
            job, report, seconds, launched = args.measure
            write_json(Path(report), measure(Job(**job), seconds, launched))
        elif args.modes:
            run_modes(*args.modes)
        elif args.list:
            print(list_recipes(), end='')
        elif args.names:
            run_all(args)
        if args.check and has_worse(args.out):
            sys.exit(1)


if __name__ == '__main__':
    main()
