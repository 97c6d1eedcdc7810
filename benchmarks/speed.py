"""Speed and memory of glow.py and bnaf.py beside other implementations, and beside the machine.

    python benchmarks/speed.py                on a GPU if there is one; ten minutes on two cores
    python benchmarks/speed.py --minutes=3    only what can be measured in three minutes
    python benchmarks/speed.py --quick        a minute, to see that it runs: its figures say little
    python benchmarks/speed.py --only=input   share of a step of glow.py that goes into its batch

All but the last write speed.json and speed.md, anew whenever a row is done, and at the end
scaling.png and the table of targets in README.md, which says how the models match and what the
columns mean. The last prints its figures.
"""

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

# glow.py and bnaf.py are in the folder above this one.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from contenders import PEERS, SCRIPTS, has_options, is_installed
from pages import insert
from speed_report import (
    CHECKPOINT_TIME,
    check_figures,
    draw_growth,
    format_report,
    target_of,
    targets_section,
)
from speed_rows import (
    SECONDS,
    failure,
    measure_command,
    measure_fresh,
    measure_growth,
    measure_inverses,
    measure_machine,
    measure_memory,
    measure_speed,
)
from timing import allow_tf32, progress, quartiles

import glow
from common.files import write_atomically, write_json
from datasets import ImageData, load_images
from datasets.image_data import make_image_data

# The shapes that are compared. n_levels is glow.py's, one less than the paper's L.
GLOW = {
    'a': dict(image_size=32, n_levels=2, depth=8, width=128, batch_size=16),
    'b': dict(image_size=64, n_levels=2, depth=8, width=256, batch_size=8),
    'c': dict(image_size=64, n_levels=2, depth=32, width=512, batch_size=2),
}
MODELS_ON_GPU = {
    'A': dict(image_size=64, n_levels=3, depth=32, width=512),
    'B': dict(image_size=64, n_levels=3, depth=24, width=256),
    'C': dict(image_size=64, n_levels=4, depth=48, width=512),
}
GLOW_ON_GPU = {
    f'{name}{batch_size}': dict(model, batch_size=batch_size)
    for name, model in MODELS_ON_GPU.items()
    for batch_size in (16, 64)
}
TABLE = dict(n_flows=5, n_hidden=1, batch_size=200)
BNAF = {
    'a': dict(data_dim=2, n_flows=1, n_hidden=1, hidden_dim=50, batch_size=200),
    'b': dict(TABLE, data_dim=6, hidden_dim=40),
    'b2': dict(TABLE, data_dim=6, hidden_dim=40, batch_size=2000),
    'c': dict(TABLE, data_dim=43, hidden_dim=10),
    'd': dict(TABLE, data_dim=63, hidden_dim=20),
}

# Our variants that are not compiled. On a GPU steps are captured but for the eager ones.
VARIANTS = {
    'cpu': ('float32', 'bf16', 'checkpoint_grads'),
    'cuda': ('float32', 'float32 eager', 'bf16', 'bf16 eager'),
}
# Compiling takes half a minute, so that only steps of training are compiled, and on a CPU only
# where it may pay.
COMPILED = {
    'a': ('compile', 'bf16 compile'),
    'b': ('compile', 'bf16 compile'),
    'c': ('bf16 compile',),
}
IN_MEMORY = ('float32', 'bf16', 'checkpoint_grads')  # the variants whose memory is measured
# How many rows are inverted, and whether bisection inverts them, too: on a CPU it is slow.
INVERTED = {
    'cpu': (('b', 20, True), ('c', 20, True), ('c', 200, False), ('c', 5000, False)),
    'cuda': (('c', 5000, True),),
}
REPORT_SECONDS = 5  # of --minutes, to write the report in
# A batch whose activations are so many that a GPU does not hold those of all contenders at once.
LARGE_BATCH = 64

# How cost grows: a base shape, and the values of each of its numbers that is changed.
SWEEPS = {
    'glow': (
        dict(image_size=32, n_levels=2, depth=4, width=64, batch_size=4),
        dict(
            depth=(1, 2, 4, 8, 16, 32),
            width=(16, 32, 64, 128, 256, 512),
            image_size=(16, 32, 64, 128),
            batch_size=(1, 2, 4, 8, 16, 32),
        ),
    ),
    'bnaf': (
        dict(TABLE, data_dim=16, hidden_dim=16),
        dict(
            data_dim=(2, 4, 8, 16, 32, 64),
            hidden_dim=(4, 8, 16, 32, 64),
            batch_size=(50, 200, 800, 3200),
        ),
    ),
}

# The real commands: their options, and the step after which a run is cut short. Those of BNAF are
# the form of the paper and the width of the official code.
BNAF_EPOCH = '--n_epochs=1 --n_hidden=1 --hidden_dim=10 --batch_size=200 --last_residual=none'
COMMANDS = {
    'quick': {
        'glow': ('--dataset=digits --depth=2', 10),
        'bnaf': ('--n_epochs=1 --n_flows=1 --batch_size=4000', None),
    },
    'cpu': {'glow': ('--dataset=faces', 60), 'bnaf': (BNAF_EPOCH, None)},
    'cuda': {
        'glow': (
            '--dataset=faces --image_size=64 --n_levels=3 --depth=32 --width=512 '
            '--batch_size=16 --lr=1e-4',
            600,
        ),
        'bnaf': (BNAF_EPOCH, None),
    },
}
TABLE_SHAPE = (36_488, 43)  # of the noise that bnaf.py is run on: as large as MINIBOONE


# --------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Settings:
    """What is the same for all measurements of a run."""

    device: torch.device
    quick: bool
    peers: Sequence[str]  # those that are installed


@dataclass(frozen=True)
class Job:
    """What is measured in one process."""

    measure: Callable[..., Iterator]  # yields pairs of a section of speed.json and a result
    arguments: dict
    seconds: float  # without so many it is not begun

    @property
    def script(self) -> str:
        return self.arguments.get('script', '')

    @property
    def config(self) -> str:
        return self.arguments.get('config', '')

    @property
    def title(self) -> str:
        words = [self.measure.__name__.removeprefix('measure_'), self.script, self.config]
        words += self.arguments.get('names', ())
        if 'n' in self.arguments:
            words.append(f'{self.arguments["n"]} rows')
        return ' '.join(word for word in words if word)


def plan(settings: Settings) -> Iterator[Job]:
    """Yield all that is measured, what matters most first."""
    machine = dict(device=settings.device, quick=settings.quick)
    yield Job(measure_machine, machine, seconds=5)
    if settings.quick:
        yield from plan_quick(settings)
    elif settings.device.type == 'cuda':
        yield from plan_on_gpu(settings)
    else:
        yield from plan_on_cpu(settings)


def plan_quick(settings: Settings) -> Iterator[Job]:
    """Yield one job of each kind, on the first shape of each script."""
    config = next(iter(GLOW))
    yield from speed_jobs('glow', config, SECONDS, settings)
    yield from memory_jobs('glow', config, settings)

    config = next(iter(BNAF))
    yield from bnaf_jobs(config, settings)
    yield inverse_job(config, 20, True, settings)
    yield from memory_jobs('bnaf', config, settings)
    yield from other_jobs(settings)


def plan_on_cpu(settings: Settings) -> Iterator[Job]:
    """Yield all jobs on a CPU: ratios of speed first."""
    for config in GLOW:
        yield from speed_jobs('glow', config, SECONDS, settings)
    for config, variants in COMPILED.items():
        yield from compiled_jobs(config, variants, settings)
    for config in BNAF:
        yield from bnaf_jobs(config, settings)
    for config, n, is_bisected in INVERTED['cpu']:
        yield inverse_job(config, n, is_bisected, settings)

    for config in ('b2', 'c'):
        yield from memory_jobs('bnaf', config, settings)
    for config in GLOW:
        yield from memory_jobs('glow', config, settings)
    yield from other_jobs(settings)


def plan_on_gpu(settings: Settings) -> Iterator[Job]:
    """Yield all jobs on a GPU, those that have targets first: its time may be short."""
    for config in ('A16', 'A64'):
        yield from speed_jobs('glow', config, ['training'], settings)
        yield from compiled_jobs(config, ['bf16 compile'], settings)
    for config in ('b2', 'c', 'b'):
        yield from bnaf_jobs(config, settings)
    yield from speed_jobs('glow', 'A16', ['sampling'], settings)
    for config, n, is_bisected in INVERTED['cuda']:
        yield inverse_job(config, n, is_bisected, settings)

    for config in ('A16', 'A64'):
        yield from compiled_jobs(config, ['bf16 compile eager'], settings)
    for config in ('B16', 'C16', 'B64', 'C64'):
        yield from speed_jobs('glow', config, ['training'], settings)
    for config in ('A16', 'C16'):
        yield from memory_jobs('glow', config, settings)
    for config in ('b2', 'c'):
        yield from memory_jobs('bnaf', config, settings)
    for config in ('a', 'd'):
        yield from bnaf_jobs(config, settings)
    for config in ('B16', 'C16', 'B64', 'C64'):
        yield from compiled_jobs(config, ['bf16 compile'], settings)
    for config in GLOW:
        yield from speed_jobs('glow', config, SECONDS, settings)
    yield from speed_jobs('glow', 'A16', ['evaluation'], settings)
    yield from other_jobs(settings)


def shape_of(script: str, config: str) -> dict:
    shapes = BNAF if script == 'bnaf' else {**GLOW, **GLOW_ON_GPU}
    return shapes[config]


def available(script: str, names: Iterable[str], settings: Settings) -> list[str]:
    """Return those of the names that are an installed peer, or a variant that the script has."""
    found = []
    for name in names:
        is_peer = name in PEERS[script]
        if name in settings.peers or not is_peer and has_options(script, name):
            found.append(name)
    return found


def speed_jobs(
    script: str,
    config: str,
    quantities: Iterable[str],
    settings: Settings,
    names: Iterable[str] = (),
    **options: str,
) -> Iterator[Job]:
    """Yield the job of a shape, if any variant of ours is there; by default of all uncompiled."""
    shape, device = shape_of(script, config), settings.device
    quantities = list(quantities)
    if not names:
        variants = VARIANTS[device.type] if script == 'glow' else variants_of_bnaf(device)
        if 'training' not in quantities:
            variants = [name for name in variants if 'eager' not in name.split()]
        names = [*PEERS[script][:1], *variants]
    names = available(script, names, settings)
    if not set(names).difference(PEERS[script]):
        return

    is_large = device.type == 'cuda' and shape['batch_size'] == LARGE_BATCH
    arguments = dict(script=script, config=config, shape=shape, names=names, quantities=quantities)
    arguments |= dict(device=device, quick=settings.quick, in_turn=not is_large, **options)
    seconds = 5 + sum(SECONDS[quantity] for quantity in quantities)
    if any('compile' in name.split() for name in names):
        seconds += 30
    yield Job(measure_speed, arguments, seconds)


def variants_of_bnaf(device: torch.device) -> tuple[str, ...]:
    return ('float32', 'float32 eager') if device.type == 'cuda' else ('float32',)


def compiled_jobs(config: str, variants: Iterable[str], settings: Settings) -> Iterator[Job]:
    """Yield a job for each compiled variant of Glow, beside the peer.

    Torch compiles a function for eight cases at most, and runs further ones uncompiled without a
    word. One compiled model in a process stays far below.
    """
    for variant in variants:
        names = [*PEERS['glow'][:1], variant]
        yield from speed_jobs('glow', config, ['training'], settings, names)


def bnaf_jobs(config: str, settings: Settings) -> Iterator[Job]:
    """Yield the jobs of a BNAF: on a CPU with a warm allocator and in fresh processes."""
    variants = variants_of_bnaf(settings.device)
    if settings.device.type == 'cuda':
        yield from speed_jobs('bnaf', config, ['training'], settings)
        return

    quantities = ['training', 'evaluation']
    names = [*PEERS['bnaf'], *variants]
    yield from speed_jobs('bnaf', config, quantities, settings, names, state='warm')
    names = available('bnaf', [*PEERS['bnaf'][:1], *variants], settings)
    arguments = dict(script='bnaf', config=config, shape=BNAF[config], names=names)
    arguments |= dict(device=settings.device, quick=settings.quick)
    yield Job(measure_fresh, arguments, 5 + SECONDS['training'])


def inverse_job(config: str, n: int, is_bisected: bool, settings: Settings) -> Job:
    arguments = dict(script='bnaf', config=config, shape=BNAF[config])
    arguments |= dict(n=n, is_bisected=is_bisected, device=settings.device, quick=settings.quick)
    return Job(measure_inverses, arguments, seconds=2 + n / 200)


def memory_jobs(script: str, config: str, settings: Settings) -> Iterator[Job]:
    variants = IN_MEMORY if script == 'glow' else ('float32',)
    names = available(script, [*PEERS[script][:1], *variants], settings)
    arguments = dict(script=script, config=config, shape=shape_of(script, config), names=names)
    yield Job(measure_memory, dict(arguments, device=settings.device), 5 * len(names))


def other_jobs(settings: Settings) -> Iterator[Job]:
    """Yield the real commands, each once more in bf16 if the script has that option; and growth."""
    device = settings.device
    for script in SCRIPTS:
        words, n_steps = COMMANDS['quick' if settings.quick else device.type][script]
        options = ['', ' --bf16'] if has_options(script, 'bf16') else ['']
        for option in options:
            arguments = dict(script=script, words=words + option, n_steps=n_steps)
            arguments |= dict(table_shape=TABLE_SHAPE, device=device)
            yield Job(measure_command, arguments, seconds=5 if settings.quick else 25)
    for script, (base_shape, sweeps) in SWEEPS.items():
        arguments = dict(script=script, base_shape=base_shape, sweeps=sweeps)
        yield Job(measure_growth, dict(arguments, device=device, quick=settings.quick), 20)


# ---------------------------------------------------------------------------------------- processes


def run_job(job: Job, end: float | None) -> Iterator[tuple[str, Any]]:
    """Run a job in a process of its own and yield its results as they come, and what fails.

    ``end`` is the time, of ``time.monotonic``, at which the process is killed.
    """
    context = multiprocessing.get_context('forkserver')
    start_server()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=send_results, args=(there, job))
    process.start()
    there.close()
    try:
        while here.poll(None if end is None else max(0.0, end - time.monotonic())):
            try:
                yield here.recv()
            except EOFError:
                break
        else:
            yield failure(job.title, TimeoutError('no time was left to finish it'))
            return
        process.join()
        if process.exitcode:
            yield failure(job.title, RuntimeError(f'its process ended with {process.exitcode}'))
    finally:
        process.kill()
        process.join()
        here.close()


def send_results(end: Connection, job: Job) -> None:
    """Send the results of a job, and what it raises. What it prints is not shown."""
    warnings.simplefilter('ignore')
    allow_tf32()
    with (
        open(os.devnull, 'w') as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            for result in job.measure(**job.arguments):
                end.send(result)
        except Exception as error:
            end.send(failure(job.title, error))


def start_server() -> None:
    """Start, if it does not run, the process that those of all jobs are forks of.

    It has imported all modules, which takes seconds, and has computed nothing.
    """
    peers = [peer for peers in PEERS.values() for peer in peers if is_installed(peer)]
    forkserver.set_forkserver_preload(['speed', 'torch._dynamo', *peers])
    environment = {
        'PYTHONPATH': os.pathsep.join(sys.path),  # which Python 3.11 does not hand on
        # A fork cannot use a GPU that was initialized before. To look for one does so otherwise.
        'PYTORCH_NVML_BASED_CUDA_CHECK': '1',
    }
    with mock.patch.dict(os.environ, environment):
        forkserver.ensure_running()


# ------------------------------------------------------------------------------------------ results


def new_results(settings: Settings, versions: dict[str, str]) -> dict:
    """Return what speed.json holds before anything is measured."""
    machine = {'kind': settings.device.type, 'device': '', 'torch': torch.__version__}
    return {
        'machine': {**machine, 'peers': versions, 'quick': settings.quick},
        'peaks': {},
        'rows': [],
        'memory': [],
        'commands': [],
        'growth': {},
        'absolute': [],
        'failures': [],
    }


def add_result(results: dict, section: str, value: dict) -> None:
    """Print a result, and add it to its section."""
    progress(describe(section, value))
    if section in ('machine', 'peaks'):
        results[section].update(value)
    elif section == 'growth':
        for script, curves in value.items():
            results['growth'].setdefault(script, {}).update(curves)
    elif section == 'rows':
        add_row(results, value)
    elif section == 'memory':
        results['memory'].append(memory_row(value, results))
    else:
        results[section].append(value)

    if results['machine']['kind'] == 'cuda':
        results['absolute'] = check_figures(results['rows'], results['memory'])


def describe(section: str, value: dict) -> str:
    """Return a line on a result."""
    title = f'{value.get("script", "")} {value.get("config", "")}'
    if section == 'failures':
        return f'{value["what"]}: {value["error"]}'
    if section == 'rows':
        rates = [f'{name} {value["n"] / np.median(t):.4g}' for name, t in value['times'].items()]
        quantity = f'{value["state"]} {value["quantity"]}'.strip()
        return f'{title} {quantity}, {value["unit"]}/s: {", ".join(rates)}'
    if section == 'memory':
        return f'{title} memory: ' + ', '.join(f'{n} {m:.0f} MiB' for n, m in value['mib'].items())
    if section == 'commands':
        figures = f'{value["per_second"]:.4g} per second, {value["overhead"]:.1%} outside of steps'
        return f'{value["script"]}.py --train {value["words"]}: {figures}'
    if section == 'peaks':
        return ', '.join(f'{name} {rate:.4g}' for name, rate in value.items())
    if section == 'growth':
        return describe_growth(value)
    return value['device']


def describe_growth(value: dict) -> str:
    """Return a line on the milliseconds of a step, while one number of a shape changes."""
    lines = []
    for script, curves in value.items():
        for name, points in curves.items():
            figures = ', '.join(f'{number}: {1e3 * t:.3g} ms' for number, t in points)
            lines.append(f'{script} growth with {name}: {figures}')
    return '; '.join(lines)


def add_row(results: dict, row: dict) -> None:
    """Add the results of a job to the row of the same shape and quantity, or as a new row."""
    times, parameters, in_turn = row.pop('times'), row.pop('parameters'), row.pop('in_turn')
    baseline = 'bisection' if 'bisection' in times else PEERS[row['script']][0]
    row['entries'] = []
    for known in results['rows']:
        if all(known[key] == row[key] for key in ('script', 'config', 'quantity', 'state', 'n')):
            known['gflop'] = known['gflop'] or row['gflop']
            row = known
    if not row['entries']:
        results['rows'].append(row)

    names = [entry['name'] for entry in row['entries']]
    for name in times:
        if name in names:
            continue
        entry = {'name': name, 'seconds': float(np.median(times[name])), 'ratio': None}
        if baseline in times and name != baseline:
            entry['ratio'] = quartiles_of_ratio(times[baseline], times[name], in_turn)
        entry['parameters'] = parameters.get(name)
        # the entry that ratios are to is the first
        row['entries'].insert(0 if name == baseline else len(row['entries']), entry)
    complete_entries(row, results)


def quartiles_of_ratio(theirs: list[float], ours: list[float], in_turn: bool) -> list[float]:
    """Return the quartiles of a ratio: round by round, if the two were timed in turn."""
    if not in_turn:
        theirs = [float(np.median(theirs))] * len(ours)
    return quartiles(a / b for a, b in zip(theirs, ours))


def complete_entries(row: dict, results: dict) -> None:
    """Work out what follows from the times of a row: rates, shares of the peak, targets."""
    entries = {entry['name']: entry for entry in row['entries']}
    key = row['script'], row['quantity'], row['config']
    for name, entry in entries.items():
        entry['per_second'] = row['n'] / entry['seconds']
        entry['gflops'] = row['gflop'] / entry['seconds'] if row['gflop'] else None
        peak = results['peaks'].get(f'gemm_{"bf16" if "bf16" in name else "float32"}_gflops')
        entry['fraction'] = entry['gflops'] / peak if entry['gflops'] and peak else None

        is_ours = name not in PEERS[row['script']] and name != 'bisection'
        kind = results['machine']['kind']
        entry['target'] = target_of(kind, *key, name, row['state']) if is_ours else None
        plain = entries.get(without('checkpoint_grads', name))
        if plain and plain is not entry:
            entry['time_over_plain'] = entry['seconds'] / plain['seconds']

    for name, entry in entries.items():
        plain = entries.get(without('compile', name))
        if plain and plain is not entry and plain['target'] == entry['target']:
            # either way will do: what is asked is asked of the faster one
            slower = min(entry, plain, key=lambda e: e['ratio'][1] if e['ratio'] else 0)
            slower['target'] = None
    for entry in row['entries']:
        is_judged = entry['target'] and entry['ratio']
        entry['met'] = entry['ratio'][1] >= entry['target'] if is_judged else None


def without(word: str, variant: str) -> str:
    """Return a variant without one of its words."""
    return ' '.join(other for other in variant.split() if other != word) or 'float32'


def memory_row(row: dict, results: dict) -> dict:
    """Return a row of memory; what ``checkpoint_grads`` costs in time is beside what it saves."""
    slowdowns = {}
    for other in results['rows']:
        is_same = other['script'] == row['script'] and other['config'] == row['config']
        if is_same and other['quantity'] == 'training':
            slowdowns |= {e['name']: e.get('time_over_plain') for e in other['entries']}

    peer = PEERS[row['script']][0]
    entries = []
    for name, mib in row['mib'].items():
        slowdown = slowdowns.get(name)
        entry = {'name': name, 'mib': mib, 'ratio': None, 'target': None, 'met': None}
        entry |= {'time_over_plain': slowdown, 'time_met': slowdown and slowdown <= CHECKPOINT_TIME}
        if name != peer:
            kind = results['machine']['kind']
            entry['target'] = target_of(kind, row['script'], 'memory', row['config'], name)
            if peer in row['mib']:
                entry['ratio'] = mib / row['mib'][peer]
        if entry['target'] and entry['ratio'] is not None:
            entry['met'] = entry['ratio'] <= entry['target']
        entries.append(entry)
    return {key: row[key] for key in ('script', 'config', 'shape')} | {'entries': entries}


# ---------------------------------------------------------------------------------- input pipeline


def measure_input() -> None:
    """Print how much of a training step of glow.py goes into getting its batch from the cache.

    Measured on the CPU: the default job, drawn faces; and a cache of CelebA's shape, of random
    pixels, for the model that is trained on CelebA, with a small batch.
    """
    config = glow.Config(dataset='faces', **glow.DEFAULTS['faces'])
    faces = load_images('faces', config.data_dir, config.image_size)
    print_batch_share('faces, default model, batch 32', faces, config, n_steps=40)

    small = dict(batch_size=2, batch_size_init=2)
    config = glow.Config(**{**glow.DEFAULTS['celeba'], 'dataset': 'celeba', **small})
    with tempfile.TemporaryDirectory() as folder:
        images = random_celeba(Path(folder))
        print_batch_share('CelebA-shaped, default model, batch 2', images, config, n_steps=6)


def print_batch_share(name: str, data: ImageData, config: glow.Config, n_steps: int) -> None:
    """Print the median milliseconds of getting a batch and of the whole step."""
    process = glow.Process(0, 1, torch.device('cpu'))
    run = glow.Training(config, data, process)
    get_batch = glow.training_batch
    batch_times, step_times = [], []

    def timed_batch(*args, **kwargs):
        start = time.perf_counter()
        batch = get_batch(*args, **kwargs)
        batch_times.append(time.perf_counter() - start)
        return batch

    with mock.patch.object(glow, 'training_batch', timed_batch):
        for _ in range(n_steps + 1):
            start = time.perf_counter()
            run.take_step()
            step_times.append(time.perf_counter() - start)

    # The first step is for warming up.
    batch_ms = 1e3 * np.median(batch_times[1:])
    step_ms = 1e3 * np.median(step_times[1:])
    share = batch_ms / step_ms
    print(f'{name}: {batch_ms:.2f} ms of {step_ms:.0f} ms per step, {share:.2%}')


def random_celeba(folder: Path, n: int = 20_000) -> ImageData:
    """Return ``n`` random images, memory-mapped as CelebA's cache is."""
    path = folder / 'celeba.npy'
    size = (n, 3, 64, 64)
    images = np.lib.format.open_memmap(path, 'w+', np.uint8, size)
    rng = np.random.default_rng(0)
    for part in np.array_split(images, 100):
        part[:] = rng.integers(0, 256, part.shape, np.uint8)
    images.flush()

    images = np.load(path, mmap_mode='r')
    attributes = np.zeros((n, 0), bool)
    splits = slice(-200), slice(-200, -100), slice(-100, None)
    return make_image_data(images, attributes, (), splits, ['random'])


# -------------------------------------------------------------------------------------------- main


def measure_all(jobs: list[Job], results: dict, folder: Path, end: float | None) -> None:
    """Run the jobs that there is time for, and save what they give as soon as it is there."""
    for job in jobs:
        if has_slow_bf16(results['peaks']):
            job = without_bf16(job)
            if job is None:
                continue
        is_late = end is not None and time.monotonic() + job.seconds > end
        late = failure(job.title, TimeoutError(f'not begun: it takes {job.seconds:.0f} s or more'))
        for section, value in [late] if is_late else run_job(job, end):
            add_result(results, section, value)
            save(results, folder)
        if job.measure is measure_machine and has_slow_bf16(results['peaks']):
            add_result(results, 'failures', slow_bf16(results['peaks']))


def has_slow_bf16(peaks: dict[str, float]) -> bool:
    """Say whether bf16 is slower than float32, as on CPUs without instructions for it.

    The steps of a large model then take a minute.
    """
    if not peaks:
        return False
    return peaks['conv3x3_bf16_gflops'] < peaks['conv3x3_float32_gflops'] / 2


def slow_bf16(peaks: dict[str, float]) -> dict:
    """Return the entry that says why bf16 was not measured."""
    bf16, float32 = peaks['conv3x3_bf16_gflops'], peaks['conv3x3_float32_gflops']
    rates = f'{bf16:.3g} GFLOP/s in bf16, {float32:.3g} in float32'
    return {'what': 'variants with bf16', 'error': f'slow on this machine: convolutions do {rates}'}


def without_bf16(job: Job) -> Job | None:
    """Return a job without the variants in bf16, or None where no other is left."""
    if '--bf16' in job.arguments.get('words', ''):
        return None
    names = job.arguments.get('names')
    if names is None:
        return job
    names = [name for name in names if 'bf16' not in name.split()]
    if not set(names).difference(PEERS[job.script]):
        return None
    return replace(job, arguments={**job.arguments, 'names': names})


def peer_versions() -> dict[str, str]:
    """Return the versions of the peers that are installed."""
    packages = {'normflows': 'normflows', 'pyro': 'pyro-ppl', 'zuko': 'zuko'}
    return {
        peer: metadata.version(package) for peer, package in packages.items() if is_installed(peer)
    }


def save(results: dict, folder: Path) -> None:
    """Write speed.json and speed.md."""
    write_json(folder / 'speed.json', results)
    page = format_report(results)
    write_atomically(folder / 'speed.md', lambda path: path.write_text(page))


def finish(results: dict, folder: Path) -> None:
    """Draw scaling.png, and write the targets in README.md if it is there."""
    save(results, folder)
    if results['growth']:
        draw_growth(results['growth'], SWEEPS).savefig(folder / 'scaling.png', dpi=120)
    if (folder / 'README.md').exists():
        insert(folder / 'README.md', 'speed.py', targets_section(results))
    progress(f'wrote speed.json, speed.md and scaling.png to {folder}')


def choose_jobs(jobs: Iterable[Job], scripts: list[str], configs: list[str]) -> list[Job]:
    """Return the jobs of some scripts and, if any are named, of some shapes."""
    chosen = []
    for job in jobs:
        is_asked = job.script in scripts and (not configs or job.config in configs)
        if not job.script or is_asked:
            chosen.append(job)
    return chosen


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--only', default='glow,bnaf', help='glow, bnaf, input, or several (default: glow,bnaf)'
    )
    parser.add_argument(
        '--rows', default='', help='nothing but some of the shapes, such as a,c,A16 (default: all)'
    )
    parser.add_argument(
        '--minutes', type=float, metavar='M', help='leave out what takes longer (default: nothing)'
    )
    parser.add_argument('--quick', action='store_true', help='the first shape of each script, once')
    parser.add_argument(
        '--out',
        default=Path(__file__).parent,
        type=Path,
        metavar='DIR',
        help='where the results go (default: the folder of this script)',
    )
    args = parser.parse_args(argv)
    args.only = args.only.split(',')
    args.rows = args.rows.split(',') if args.rows else []
    unknown = set(args.only).difference(SCRIPTS, ['input'])
    if unknown:
        parser.error(f'--only takes glow, bnaf and input, not {",".join(sorted(unknown))}')
    unknown = set(args.rows).difference(GLOW, GLOW_ON_GPU, BNAF)
    if unknown:
        parser.error(f'--rows takes the names of shapes, not {",".join(sorted(unknown))}')
    return args


def main(argv: list[str] | None = None) -> None:
    start = time.monotonic()
    args = parse_args(argv)
    if 'input' in args.only:
        measure_input()
    scripts = [script for script in SCRIPTS if script in args.only]
    if not scripts:
        return

    versions = peer_versions()
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    settings = Settings(device, args.quick, list(versions))
    results = new_results(settings, versions)
    args.out.mkdir(parents=True, exist_ok=True)
    for script in scripts:
        for peer in PEERS[script]:
            if peer not in versions:
                what, error = f'{script}: {peer}', 'not installed (requirements-bench.txt)'
                add_result(results, 'failures', {'what': what, 'error': error})

    jobs = choose_jobs(plan(settings), scripts, args.rows)
    end = None if args.minutes is None else start + 60 * args.minutes - REPORT_SECONDS
    measure_all(jobs, results, args.out, end)
    finish(results, args.out)


if __name__ == '__main__':
    main()
