"""What becomes of a training that is killed, stopped, started twice, out of disk or fed with nonsense.

    python tests/faults.py --kills=100                 all of it
    python tests/faults.py --only=preempted,numbers    some of it

Prints what was measured and keeps it in faults.json, and its table in the README.md; ends with 1 where a promise was broken.
Linux only: it looks into /proc.
"""

import argparse
import contextlib
import json
import math
import os
import re
import resource
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
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]
from curves import read_events
from report import insert, table
from timing import cpu_name, progress

import bnaf
import glow

SCRIPTS = {'glow': glow, 'bnaf': bnaf}
SLOW = 0.05  # seconds that writing takes longer than it does, so that some kills fall into it
STEPS = dict(SAVE_STEPS=5, LOG_STEPS=1)
LIMIT = 2**13  # bytes of a file: more than a job prints, fewer than it writes
DIGITS = ['--dataset=digits', '--depth=1', '--width=8', '--n_epochs=3']
TABLE = ['--dataset=table.npy', '--n_flows=2', '--hidden_dim=4', '--n_epochs=10', '--lr_patience=0']
TOY = ['--dataset=rings', '--hidden_dim=4', '--n_epochs=5']
CASES = {
    'glow, digits': ('glow', [*DIGITS, '--batch_size=64'], dict(VALIDATE_STEPS=20)),
    'bnaf, a table': ('bnaf', [*TABLE, '--batch_size=20'], {}),
    'bnaf, a toy': ('bnaf', [*TOY, '--batch_size=50'], dict(EPOCH_STEPS=20)),
}

# -------------------------------------------------------------------------------------------------------- jobs


def promise(kept, text):
    if not kept:
        raise AssertionError(text)


def code_of(script, constants=STEPS, first='', slow=0.0):
    """-> a program: a script whose module constants are others, whose writes take longer, and that does something first"""
    return '\n'.join(
        [
            'import os, sys, time, ' + script,
            'from common import files',
            'sync = files.fsync_path',
            first,
            f'files.fsync_path = lambda path: (time.sleep({slow}), sync(path))',
            *(f'{script}.{name} = {value}' for name, value in constants.items()),
            f'{script}.main()',
        ]
    )


class Job:
    """A command in a folder, of one process or of several under torchrun; limit: bytes that a file of it may have"""

    def __init__(self, folder, code, words, n=1, restarts=0, limit=None):
        self.folder, self.mark, self.begin, self.launcher = (
            folder,
            uuid.uuid4().hex,
            time.perf_counter(),
            -1 if n > 1 else 0,
        )
        command = [sys.executable, '-W', 'ignore', '-c', code, *words]
        if n > 1:
            command = [
                sys.executable,
                '-m',
                'torch.distributed.run',
                '--standalone',
                f'--nproc_per_node={n}',
                f'--max-restarts={restarts}',
                '--no-python',
                *command,
            ]
        variables = {
            'OMP_NUM_THREADS': '1',
            'CUDA_VISIBLE_DEVICES': '',
            'PYTHONPATH': str(ROOT),
            'FAULTS_JOB': self.mark,
        }
        limits = (
            (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
        )
        with open(folder / 'out', 'w') as out, open(folder / 'err', 'w') as err:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **variables},
                stdout=out,
                stderr=err,
                preexec_fn=limits,
            )

    def pids(self):
        """-> {process id: rank, -1 of the launcher} of all that still run"""
        found = {}
        for path in Path('/proc').glob('[0-9]*/environ'):
            with contextlib.suppress(OSError):
                variables = dict(
                    word.split('=', 1)
                    for word in path.read_text(errors='replace').split('\0')
                    if '=' in word
                )
                if variables.get('FAULTS_JOB') == self.mark:
                    found[int(path.parent.name)] = int(variables.get('RANK', self.launcher))
        return found

    def pid_of(self, rank):
        return {rank: pid for pid, rank in self.pids().items()}.get(rank)

    def runs(self):
        return self.process.poll() is None

    def wait(self, seconds=300):
        """-> its exit code"""
        self.await_(lambda: not self.runs(), seconds)
        return self.process.returncode

    def await_(self, condition, seconds=300, every=0.005):
        """-> the seconds until it was met"""
        begin = time.perf_counter()
        while not condition():
            promise(
                time.perf_counter() < begin + seconds,
                f'waited {seconds} s in {self.folder}: {self.err()}',
            )
            time.sleep(every)
        return time.perf_counter() - begin

    def kill(self):
        """All its processes at once, torchrun's workers included, which are not of its process group"""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.runs()  # takes leave of a dead child, which else stays in /proc

    def out(self):
        return (self.folder / 'out').read_text()

    def err(self):
        return (self.folder / 'err').read_text()

    def folder_of_run(self):
        """-> where its checkpoint lies, or None as yet"""
        return next((path.parent for path in self.folder.glob('results/*/checkpoint.pt')), None)

    def step(self):
        """-> that of its checkpoint.pt, -1 without one"""
        run = self.folder_of_run()
        return torch.load(run / 'checkpoint.pt', weights_only=True)['step'] if run else -1

    def refusal(self):
        """-> the one line of an error, which is all that it says beside its progress"""
        promise(self.wait() == 2, f'it ended otherwise than with 2: {self.err()}')
        promise('Traceback' not in self.err(), f'a traceback: {self.err()}')
        lines = [line for line in re.split('[\r\n]+', self.err()) if ': error: ' in line]
        promise(len(lines) == 1, f'not one line: {self.err()}')
        return lines[0]


def written(folder):
    """-> temporary files under the folder"""
    return [path for path in folder.glob('results/*/.*.*.*')]


def logged(run):
    """-> {(tag, step): value} as tensorboard shows them: a start takes away what was there from its step on"""
    points = {}
    for path in sorted(run.glob('events.out.tfevents.*')):
        for event in read_events(path):
            if event.WhichOneof('what') == 'session_log':
                points = {
                    (tag, step): value for (tag, step), value in points.items() if step < event.step
                }
            for value in event.summary.value:
                promise(
                    (value.tag, event.step) not in points,
                    f'{value.tag} of step {event.step} is there twice',
                )
                points[value.tag, event.step] = value.simple_value
    return points


def outcome(job):
    """-> all that a run leaves but how fast it was, from which it can be told whether it was ever killed"""
    run = job.folder_of_run()
    promise(not list(run.glob('.*.*.*')), f'temporary files are left in {run}')
    return {
        **{
            name: torch.load(run / name, weights_only=True) for name in ('checkpoint.pt', 'best.pt')
        },
        'results.json': json.loads((run / 'results.json').read_text()),
        'pictures': {path.name: path.read_bytes() for path in run.glob('*.png')},
        'scalars': {
            key: value for key, value in logged(run).items() if not key[0].endswith('_per_s')
        },
    }


def differences(a, b, where=''):
    """-> where two nested values are not equal bit for bit"""
    if type(a) is not type(b):
        return [where]
    if isinstance(a, (dict, list, tuple)):
        if isinstance(a, dict) and a.keys() != b.keys() or len(a) != len(b):
            return [f'{where}: other keys']
        return [
            d
            for key in (a if isinstance(a, dict) else range(len(a)))
            for d in differences(a[key], b[key], f'{where}/{key}')
        ]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or (a != a and b != b)
    return [] if same else [where]


class Bench:
    """A folder for all jobs, and the runs that nothing happened to, each made once"""

    def __init__(self, folder):
        self.folder, self.whole, self.rng = folder, {}, np.random.default_rng(0)
        self.table = self.rng.normal(size=(200, 3)) @ [[1, 0.5, 0], [0, 1, 0.5], [0, 0, 1]]
        np.save(folder / 'table.npy', self.table)

    def folder_for(self, name):
        folder = self.folder / f'{name}_{uuid.uuid4().hex[:8]}'.replace(', ', '_').replace(' ', '_')
        folder.mkdir()
        return folder

    def job(self, script, words, folder=None, n=1, constants={}, first='', slow=0.0, **how):
        return Job(
            folder or self.folder_for(script),
            code_of(script, {**STEPS, **constants}, first, slow),
            words,
            n,
            **how,
        )

    def train(self, case, n=1, folder=None, words=(), slow=SLOW, **how):
        script, options, constants = CASES[case]
        options = [
            option.replace('=table.npy', f'={self.folder}/table.npy') for option in options
        ]  # the same for all
        return self.job(
            script,
            ['--train', *options, *words],
            folder or self.folder_for(case),
            n,
            constants,
            slow=slow,
            **how,
        )

    def reference(self, case, n=1):
        """-> (what a run leaves that was let alone, its seconds, its folder)"""
        if (case, n) not in self.whole:
            job = self.train(case, n)
            promise(job.wait() == 0, job.err())
            self.whole[case, n] = outcome(job), time.perf_counter() - job.begin, job.folder
        return self.whole[case, n]

    def compare(self, job, case, n=1):
        different = differences(self.reference(case, n)[0], outcome(job))
        promise(
            not different,
            f'{case}, {n} processes: differs from the run that was let alone in {", ".join(different[:5])}',
        )


# ---------------------------------------------------------------------------------------------------- promises


def killed(bench, n_kills, cases=tuple((case, n) for case in CASES for n in (1, 2))):
    """Killed at any moment and begun again by the same command, a training leaves what it would have left"""
    counts = Counter()
    for k, (case, n) in enumerate(cases):
        seconds = bench.reference(case, n)[1]
        until = counts['kills'] + (n_kills - counts['kills']) // (len(cases) - k)
        folder = None
        while folder is None or counts['kills'] < until:
            folder = bench.folder_for(case)
            while True:
                job = bench.train(case, n, folder, ['--resume'])
                if counts['kills'] == until or not kill_at_random(job, bench.rng, seconds):
                    break
                counts.update(
                    [
                        'kills',
                        f'kills of {case}, {n} processes',
                        *found(job, SCRIPTS[CASES[case][0]]),
                    ]
                )
            promise(job.wait() == 0, job.err())
            bench.compare(job, case, n)
            counts.update(['ended by themselves, bit for bit as if let alone'])
    return dict(counts)


def kill_at_random(job, rng, seconds):
    """At a moment of the time that a run takes or, half of the time, at some write -> whether it was still running"""
    if rng.random() < 0.5:
        moment = rng.uniform(0, seconds)
        with contextlib.suppress(AssertionError):
            job.await_(lambda: not job.runs(), moment)
    else:
        for _ in range(rng.integers(1, 10)):
            job.await_(lambda: not (job.runs() and written(job.folder)), every=5e-4)
            job.await_(lambda: not job.runs() or written(job.folder), every=5e-4)
        time.sleep(rng.uniform(0, 2 * SLOW))
    was_running = job.runs()
    job.kill()
    return was_running


def found(job, script):
    """-> what a kill left behind, in words; every checkpoint is whole"""
    steps = {
        path.name: script.load_checkpoint(path)['step']
        for path in job.folder.glob('results/*/*.pt')
    }
    if written(job.folder):
        yield 'within a write'
    if not steps:
        yield 'before the first checkpoint'
    if steps.get('best.pt', -1) > steps.get('checkpoint.pt', math.inf):
        yield 'between best.pt and checkpoint.pt'
    if job.folder_of_run() and (job.folder_of_run() / 'results.json').exists():
        yield 'after the training'


def in_the_middle(job):
    job.await_(lambda: job.step() >= 2 * STEPS['SAVE_STEPS'])


def preempted(
    bench,
    cases=tuple((case, n) for case in CASES for n in (1, 2)),
    signals=(signal.SIGTERM, signal.SIGINT),
):
    """A signal to one process ends all of them after the same step, with a line that says how to go on"""
    seconds = {}
    for case, n in cases:
        for number in signals:
            job = bench.train(case, n)
            in_the_middle(job)
            os.kill(job.pid_of(n - 1), number)
            taken = job.await_(lambda: not job.runs())
            promise(job.wait() == 0 and 'Traceback' not in job.err(), job.err())
            ((step, command),) = re.findall(
                r'stopped after step (\d+) by .*; to go on: python (.*)', job.out()
            )
            promise(int(step) == job.step(), f'step {step} was said and {job.step()} saved')
            script, constants = CASES[case][0], CASES[case][2]
            again = bench.job(script, shlex.split(command)[1:], job.folder, n, constants)
            promise(again.wait() == 0, again.err())
            bench.compare(again, case, n)
            seconds[f'{case}, {n} processes, {number.name}'] = round(taken, 2)
    return {'seconds until it had saved and ended': seconds}


def restarted(bench, cases=tuple(CASES)):
    """torchrun --max-restarts: where a process dies, all go on from the last checkpoint by themselves"""
    stopped, trained = {}, {}
    for case in cases:
        job = bench.train(case, 2, restarts=3)
        in_the_middle(job)
        step, other = job.step(), job.pid_of(0)
        os.kill(job.pid_of(1), signal.SIGKILL)
        stopped[case] = round(job.await_(lambda: other not in job.pids()), 2)
        trained[case] = round(
            stopped[case] + job.await_(lambda: job.step() > step + STEPS['SAVE_STEPS']), 2
        )
        promise(job.wait() == 0, job.err())
        bench.compare(job, case, 2)
    return {
        'seconds until the others had stopped': stopped,
        'seconds until a later step was saved': trained,
    }


def lost(bench, cases=tuple(CASES), repeats=3):
    """Where a process dies, the others end with a line that names them"""
    seconds = []
    for case in cases * repeats:
        job = bench.train(case, 2)
        in_the_middle(job)
        other = job.pid_of(0)
        os.kill(job.pid_of(1), signal.SIGKILL)
        seconds.append(round(job.await_(lambda: other not in job.pids()), 2))
        promise(job.wait() != 0, 'it ended as if nothing had been')
        line = f'process 0 on {socket.gethostname()} stops, having lost another one'
        promise(job.err().count(line) == 1, f'{case}: no line of the other process: {job.err()}')
    return {'seconds until the others had stopped': sorted(seconds)}


def lines_of(lines):
    """-> {line without the names of folders: how often}"""
    return dict(Counter(re.sub(r'\S*/', '', line) for line in lines))


def files_of(run):
    return {
        path.name: path.read_bytes()
        for path in run.iterdir()
        if path.name != '.lock' and 'tfevents' not in path.name
    }


def out_of_disk(bench, cases=tuple(CASES)):
    """Where a file cannot be written: one line, and what was there is as it was"""
    lines = []
    for case in cases:
        script, words, constants = CASES[case]
        folder = bench.folder_for(case)
        shutil.copytree(bench.reference(case)[2] / 'results', folder / 'results')
        run = next(folder.glob('results/*'))
        before = files_of(run)
        never = dict.fromkeys(
            ('SAVE_STEPS', 'VALIDATE_STEPS', 'EPOCH_STEPS'), 10**6
        )  # so that the events come first
        goes_on = ['--train', f'--restore_file={run}/checkpoint.pt', '--n_epochs=1000']
        for words, constants in ((goes_on, constants), (goes_on, never), (['--generate'], {})):
            job = bench.job(script, words, folder, constants=constants, limit=LIMIT)
            lines.append(job.refusal())
            promise(' cannot be written' in lines[-1], lines[-1])
            promise(files_of(run) == before, f'{words}: something in {run} is not what it was')
    return {'lines': lines_of(lines)}


def twice(bench, cases=tuple(CASES)):
    """A second training in the folder of a running one is refused, and nothing of it gets there"""
    for case in cases:
        script, words, constants = CASES[case]
        job = bench.train(case)
        in_the_middle(job)
        os.kill(job.pid_of(0), signal.SIGSTOP)  # lest it ends before the second one begins
        second = bench.job(
            script,
            ['--train', f'--restore_file={job.folder_of_run()}/checkpoint.pt', '--n_epochs=50'],
        )
        promise('another process trains in' in second.refusal(), second.err())
        os.kill(job.pid_of(0), signal.SIGCONT)
        promise(job.wait() == 0, job.err())
        promise(
            len(list(job.folder_of_run().glob('events.*'))) == 1,
            'the second one has written events',
        )
        bench.compare(job, case)
    return {'refusals': len(cases)}


def disagreeing(bench, which=slice(None)):
    """Processes that were started on different things stop, and say which"""
    folder = bench.folder_for('disagree')
    (folder / 'other').mkdir()
    np.save(folder / 'table.npy', bench.table)
    np.save(folder / 'other' / 'table.npy', bench.table + 1)
    for name in ('here', 'there'):
        pictures(folder / name, 20, seed=len(name))
    images = [
        '--dataset=folder',
        '--data_dir=here',
        '--image_size=16',
        '--n_levels=1',
        '--depth=1',
        '--width=8',
    ]
    cases = [
        ('glow', images, "sys.argv.append('--seed=1')", ' --seed'),
        ('glow', images, "sys.argv.append('--depth=2')", ' --depth'),
        ('glow', images, "sys.argv.append('--data_dir=there')", 'data'),
        ('glow', images, "sys.argv[1] = '--evaluate'", ' mode'),
        ('bnaf', TABLE, "sys.argv.append('--lr=1')", ' --lr'),
        ('bnaf', TABLE, "os.chdir('other')", 'data'),
    ]
    seconds = []
    for script, words, first, different in cases[which]:
        job = bench.job(
            script, ['--train', *words], folder, 2, first=f"if os.environ['RANK'] == '1': {first}"
        )
        promise(job.wait() != 0, f'{first}: it trained')
        lines = [
            line
            for line in job.err().splitlines()
            if 'error: the processes start from different' in line
        ]
        promise(len(lines) == 1 and different in lines[0], f'{first}: {job.err()}')
        seconds.append(round(time.perf_counter() - job.begin, 2))
    return {'refusals': len(seconds), 'seconds from start to end': seconds}


def growing(bench, n_steps=2000, warm=500, bound=0.01, cases=tuple(CASES)):
    """Neither memory nor open files grow with the steps"""
    figures = {}
    for case in cases:
        script, words, constants = CASES[case]
        first = f"""
take_step = {script}.Training.take_step
def counted(run):
    if run.step in ({warm}, {n_steps} - 1):
        resident = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmRSS'))
        print('counted', resident, len(os.listdir('/proc/self/fd')))
    return take_step(run)
{script}.Training.take_step = counted"""
        whole = bench.reference(case)[0]['checkpoint.pt']
        n_epochs = int(re.search(r'--n_epochs=(\d+)', ' '.join(words))[1])
        epochs = math.ceil(n_steps * n_epochs / whole['step'])
        job = bench.train(
            case,
            1,
            words=[f'--n_epochs={epochs}', *['--early_stop=10000'] * (script == 'bnaf')],
            first=first,
            slow=0,
        )
        promise(job.wait(900) == 0, job.err())
        (kib, files), (kib_later, files_later) = [
            tuple(map(int, pair)) for pair in re.findall(r'counted (\d+) (\d+)', job.out())
        ]
        figures[case] = {
            'MB': [round(kib / 1e3, 1), round(kib_later / 1e3, 1)],
            'open files': [files, files_later],
        }
        promise(files == files_later and kib_later < (1 + bound) * kib, f'{case}: {figures[case]}')
    return {f'at step {warm} and {n_steps}': figures}


def pictures(folder, n, seed=0, flat=False):
    folder.mkdir()
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    for i in range(n):
        Image.fromarray(np.full_like(pixels[0], pixels[0, 0, 0]) if flat else pixels[i]).save(
            folder / f'{i:02}.png'
        )


def numbers(bench, only=()):
    """Whatever the options and the data: a finite result, or one line; no checkpoint of anything else"""
    folder = bench.folder_for('numbers')
    rng = np.random.default_rng(0)
    for name, n, flat in (('flat', 20, True), ('ten', 10, False), ('one', 1, False)):
        pictures(folder / name, n, flat=flat)
    order = np.random.default_rng(0).permutation(
        len(bench.table)
    )  # as the splits are drawn with --seed=0
    for name, where, value in (
        ('train_1e30', 0, 1e30),
        ('train_1e200', 0, 1e200),
        ('test_1e30', -1, 1e30),
        ('test_1e200', -1, 1e200),
    ):
        table = bench.table.copy()
        table[order[where], 1] = value
        np.save(folder / f'{name}.npy', table)
    np.save(folder / 'table.npy', bench.table)
    for n in (3, 10, 11):
        np.save(folder / f'{n}_rows.npy', rng.normal(size=(n, 3)))
    images = [
        '--dataset=folder',
        '--image_size=16',
        '--n_levels=1',
        '--depth=1',
        '--width=8',
        '--n_epochs=4',
        '--batch_size=8',
    ]
    digits, table = [*DIGITS, '--batch_size=64'], [*TABLE, '--batch_size=20']
    cases = {
        'lr x 100': ('glow', [*digits, '--lr=0.1']),
        'lr x 10,000': ('glow', [*digits, '--lr=10']),
        'images of one colour': ('glow', [*images, '--data_dir=flat']),
        'one image in a split': ('glow', [*images, '--data_dir=ten']),
        'one image': ('glow', [*images, '--data_dir=one']),
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
        **{
            file.stem.replace('_', ' '): ('bnaf', [*table, f'--dataset={file.name}'])
            for file in sorted(folder.glob('*_*.npy'))
        },
    }
    ends = {}
    for name, (script, words) in cases.items():
        if only and name not in only:
            continue
        output = f'results_of_{len(ends)}'
        job = bench.job(script, ['--train', *words, f'--output_dir={output}'], folder)
        if job.wait() == 2:
            ends[name] = job.refusal().split(': error: ')[1].replace(f'{folder}/', '')
        else:
            promise(job.wait() == 0, f'{name}: {job.err()}')
            result = json.loads(next(folder.glob(f'{output}/*/results.json')).read_text())
            ends[name] = next(
                result[key]
                for key in ('bits_per_dim', 'log_likelihood_nats', 'kl_nats')
                if key in result
            )
            promise(math.isfinite(ends[name]), f'{name}: {result}')
        for path in folder.glob(f'{output}/*/*.pt'):
            saved = SCRIPTS[script].load_checkpoint(
                path
            )  # which refuses weights that are not finite
            promise(
                all(
                    value.isfinite().all()
                    for state in saved['optimizer']['state'].values()
                    for value in state.values()
                ),
                f'{name}: the optimizer of {path.name} is not finite',
            )
    return {'result or line': ends}


PROMISES = {
    promised.__name__: promised
    for promised in (
        killed,
        preempted,
        restarted,
        lost,
        out_of_disk,
        twice,
        disagreeing,
        growing,
        numbers,
    )
}


# ------------------------------------------------------------------------------------------------------ report


def seconds_text(seconds):
    return f'{min(seconds):.2g} to {max(seconds):.2g} s'


MEASURED = {
    'killed': lambda f: (
        f'{f["kills"]} kills in {f["seconds"] / 60:.0f} minutes, {f.get("within a write", 0)} of them within a '
        f'write; {f["ended by themselves, bit for bit as if let alone"]} trainings ended, all equal to the bit'
    ),
    'preempted': lambda f: (
        f'{len(f["seconds until it had saved and ended"])} signals; '
        f'{seconds_text(f["seconds until it had saved and ended"].values())} until the end'
    ),
    'restarted': lambda f: (
        f'{seconds_text(f["seconds until a later step was saved"].values())} until a later step was saved'
    ),
    'lost': lambda f: (
        f'{len(f["seconds until the others had stopped"])} deaths; '
        f'{seconds_text(f["seconds until the others had stopped"])} until the others had ended'
    ),
    'out_of_disk': lambda f: f'{sum(f["lines"].values())} writes refused',
    'twice': lambda f: f'{f["refusals"]} refused',
    'disagreeing': lambda f: (
        f'{f["refusals"]} refused, {seconds_text(f["seconds from start to end"])} after the start'
    ),
    'growing': lambda f: '; '.join(
        f'{at}: '
        + ', '.join(' and '.join(f'{mb:.0f}' for mb in case['MB']) for case in cases.values())
        + ' MB'
        for at, cases in f.items()
        if at.startswith('at step')
    ),
    'numbers': lambda f: (
        f'{len(f["result or line"])} cases, {sum(isinstance(end, str) for end in f["result or line"].values())} '
        'of which end in a line'
    ),
}


def markdown(results):
    return table(
        ('what is promised', '`python tests/faults.py`', 'measured'),
        [
            [
                results[name]['promise'],
                f'`--only={name}`',
                MEASURED[name](results[name])
                if 'broken' not in results[name]
                else f'**broken**: {results[name]["broken"]}',
            ]
            for name in PROMISES
            if name in results
        ],
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--kills', type=int, default=100, metavar='N')
    parser.add_argument(
        '--only', default=','.join(PROMISES), metavar='A,B', help=f'of {", ".join(PROMISES)}'
    )
    parser.add_argument(
        '--out',
        default=ROOT / 'images',
        type=Path,
        metavar='DIR',
        help='where faults.json goes; its table goes to the README.md beside DIR, if there is one',
    )
    args = parser.parse_args(argv)
    file = args.out / 'faults.json'
    results = json.loads(file.read_text()) if file.exists() else {}
    results['machine'] = (
        f'{cpu_name()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}'
    )
    is_broken = False
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for name in args.only.split(','):
            begin = time.perf_counter()
            try:
                figures = PROMISES[name](
                    bench, **({'n_kills': args.kills} if name == 'killed' else {})
                )
            except AssertionError as error:
                figures, is_broken = {'broken': str(error)}, True
            results[name] = {
                'promise': PROMISES[name].__doc__,
                **figures,
                'seconds': round(time.perf_counter() - begin),
            }
            progress(f'{name}: {json.dumps(figures, indent=1)}')
            file.write_text(json.dumps(results, indent=1) + '\n')
    if (args.out.parent / 'README.md').exists():
        insert(args.out.parent / 'README.md', 'faults.py', markdown(results))
    sys.exit(is_broken)


if __name__ == '__main__':
    main()
