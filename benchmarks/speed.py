"""Speed and memory of glow.py and bnaf.py beside other implementations, and beside the machine.

    python benchmarks/speed.py                on a GPU if there is one; nine minutes on two cores
    python benchmarks/speed.py --quick        a minute, to see that it runs: its figures say little
    python benchmarks/speed.py --only=input   share of a step of glow.py that goes into its batch

The first two write speed.json, speed.md, scaling.png and the table of targets in README.md, which
says how the models match and what the columns mean. The last prints its figures.
"""

import argparse
import contextlib
import gc
import io
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# glow.py and bnaf.py are in the folder above this one.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from contenders import (
    PEERS,
    SCRIPTS,
    Contender,
    build_bare_model,
    has_options,
    invert_by_bisection,
    is_installed,
    make_contender,
)
from pages import insert
from speed_report import (
    CHECKPOINT_TIME,
    OVERHEAD,
    check_figures,
    draw_growth,
    format_report,
    target_of,
    targets_table,
)
from timing import (
    allow_tf32,
    machine_name,
    measure_peaks,
    progress,
    quartiles,
    report_out_of_memory,
    synchronize,
    time_in_turn,
)

import glow
from datasets import ImageData, load_images
from datasets.images import make_image_data

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
    for (name, model), batch_size in product(MODELS_ON_GPU.items(), (16, 32, 64))
}
TABLE = dict(n_flows=5, n_hidden=1, batch_size=200)
BNAF = {
    'a': dict(data_dim=2, n_flows=1, n_hidden=1, hidden_dim=50, batch_size=200),
    'b': dict(TABLE, data_dim=6, hidden_dim=40),
    'b2': dict(TABLE, data_dim=6, hidden_dim=40, batch_size=2000),
    'c': dict(TABLE, data_dim=43, hidden_dim=10),
    'd': dict(TABLE, data_dim=63, hidden_dim=20),
}
SMALLEST = {
    'glow': dict(image_size=8, n_levels=1, depth=1, width=8, batch_size=2),
    'bnaf': dict(data_dim=2, n_flows=2, n_hidden=1, hidden_dim=2, batch_size=2),
}

VARIANTS = {
    'cpu': {
        'glow': ('float32', 'bf16', 'compile', 'checkpoint_grads'),
        'bnaf': ('float32', 'compile'),
    },
    'cuda': {
        'glow': (
            'float32',
            'bf16',
            'compile',
            'bf16 compile',
            'checkpoint_grads',
            'bf16 checkpoint_grads',
        ),
        'bnaf': ('float32', 'compile'),
    },
}
# Compiling takes longer than measuring, so only some shapes are compiled.
COMPILED = {
    'cpu': {'glow': ('a', 'b'), 'bnaf': ('b', 'b2')},
    'cuda': {'glow': ('a', 'b', 'c', 'A16'), 'bnaf': tuple(BNAF)},
}
# Memory takes a process per variant, so only that of some shapes is measured.
MEASURED_MEMORY = {'glow': (*GLOW, *GLOW_ON_GPU), 'bnaf': ('b2', 'c')}
# The shapes of BNAF that are inverted, and how many rows: bisection is slow.
N_INVERTED = {'b': 20, 'c': 20}
# What is timed of each shape, and for about how many seconds.
SECONDS = {'training': 8, 'evaluation': 2, 'sampling': 4}

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

# The real commands: their options, and the step after which a run is cut short.
COMMANDS = {
    'quick': {
        'glow': ('--dataset=digits --depth=2', 10),
        'bnaf': ('--n_epochs=1 --n_flows=1 --batch_size=4000', None),
    },
    'cpu': {'glow': ('--dataset=faces', 100), 'bnaf': ('--n_epochs=1', None)},
    'cuda': {
        'glow': (
            '--dataset=faces --image_size=64 --n_levels=3 --depth=32 --width=512 '
            '--batch_size=16 --lr=1e-4',
            600,
        ),
        'bnaf': ('--n_epochs=1', None),
    },
}
TABLE_SHAPE = (36_488, 43)  # of the noise that bnaf.py is run on: as large as MINIBOONE


@dataclass(frozen=True)
class Settings:
    """What is the same for all measurements of a run."""

    device: torch.device
    quick: bool
    peers: dict[str, str]  # the peers that are installed, with their versions
    peaks: dict[str, float]  # what the machine itself can do


# ------------------------------------------------------------------------------------------- speed


def measure_shape(script: str, config: str, shape: dict, settings: Settings) -> list[dict]:
    """Time training steps, evaluation and sampling of the peers and of our variants in turn."""
    contenders = {}
    for name in names_to_measure(script, config, settings):
        with report_out_of_memory(f'{script} {config} {name}'):
            contenders[name] = make_contender(script, shape, name, settings.device)

    rows = []
    for quantity in SECONDS:
        row = {'script': script, 'config': config, 'quantity': quantity, 'shape': shape}
        entries = measure_quantity(row, contenders, settings)
        if entries:
            rows.append(row)
            report_row(row)
    return rows


def names_to_measure(script: str, config: str, settings: Settings) -> list[str]:
    """Name the contenders of a shape: the installed peers, then our variants."""
    peers = [peer for peer in PEERS[script] if peer in settings.peers]
    return peers + variants_to_measure(script, config, settings)


def variants_to_measure(script: str, config: str, settings: Settings) -> list[str]:
    """Name our variants that are measured of a shape."""
    device = settings.device.type
    is_compiled = not settings.quick and config in COMPILED[device][script]
    variants = [name for name in VARIANTS[device][script] if has_options(script, name)]
    return [name for name in variants if is_compiled or 'compile' not in name.split()]


def measure_quantity(
    row: dict,
    contenders: dict[str, Contender],
    settings: Settings,
) -> list[dict]:
    """Time one quantity of a shape and add the results to ``row``; return its entries."""
    script, quantity = row['script'], row['quantity']
    for contender in contenders.values():
        contender.model.train(quantity == 'training')
    functions = functions_to_time(quantity, script, row['config'], contenders, settings.device)
    if not functions:
        return []

    seconds = SECONDS[quantity] / 20 if settings.quick else SECONDS[quantity]
    min_rounds = 2 if settings.quick else 3
    times = time_in_turn(functions, settings.device, seconds, min_rounds)

    is_bisected = 'bisection' in times
    row['gflop'] = None
    if 'float32' in times and not is_bisected:  # the number of steps of an inverse varies
        row['gflop'] = count_gflop(quantity, contenders['float32'])
    row['n'] = N_INVERTED[row['config']] if is_bisected else row['shape']['batch_size']
    row['unit'] = 'images' if script == 'glow' else 'rows'

    baseline = 'bisection' if is_bisected else PEERS[script][0]
    row['entries'] = []
    for name in times:
        entry = speed_entry(row, name, times, baseline, settings)
        inverted = 'float32' if name == 'bisection' else name  # bisection inverts our own model
        parameters = contenders[inverted].model.parameters()
        entry['parameters'] = sum(parameter.numel() for parameter in parameters)
        row['entries'].append(entry)
    return row['entries']


def functions_to_time(
    quantity: str,
    script: str,
    config: str,
    contenders: dict[str, Contender],
    device: torch.device,
) -> dict[str, Callable]:
    """Return what is called of each contender; empty where the shape's quantity is not timed."""
    if quantity == 'training':
        return {name: contender.step for name, contender in contenders.items()}

    # Checkpointed gradients make no difference without gradients.
    contenders = {
        name: contender
        for name, contender in contenders.items()
        if 'checkpoint_grads' not in name.split()
    }
    if quantity == 'evaluation':
        functions = {name: contender.evaluate for name, contender in contenders.items()}
    elif script == 'glow':
        functions = {name: contender.sample for name, contender in contenders.items()}
    elif config in N_INVERTED:
        models = {name: contender.model for name, contender in contenders.items()}
        for peer in PEERS[script]:
            models.pop(peer, None)
        functions = inverses(models, N_INVERTED[config], device)
    else:
        functions = {}
    return {name: torch.no_grad()(function) for name, function in functions.items()}


def inverses(
    models: dict[str, nn.Module],
    n: int,
    device: torch.device,
) -> dict[str, Callable]:
    """Return functions that invert BNAFs on the same ``n`` rows, bisection before the models' own.

    Sampling cannot be compared to Pyro's BNAF, which has no inverse.
    """
    model = models['float32']
    x = torch.randn(n, model.data_dim, device=device)
    z = model(x)[0].detach()
    functions = {'bisection': partial(invert_by_bisection, model, z)}
    for name, model in models.items():
        functions[name] = partial(model.inverse, z)
    return functions


def count_gflop(quantity: str, contender: Contender) -> float:
    """Count GFLOP of one call, in matrix products and convolutions; of both passes in training."""
    is_training = quantity == 'training'
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(is_training):
        if is_training:
            contender.objective().backward()
        elif quantity == 'evaluation':
            contender.evaluate()
        else:
            contender.sample()
    return counter.get_total_flops() / 1e9


def speed_entry(
    row: dict,
    name: str,
    times: dict[str, list[float]],
    baseline: str,
    settings: Settings,
) -> dict:
    """Return the result of one contender. Its ratio to the baseline is taken round by round."""
    seconds = float(np.median(times[name]))
    entry = {
        'name': name,
        'seconds': seconds,
        'per_second': row['n'] / seconds,
        'ratio': None,
        'target': None,
        'met': None,
        'gflops': None,
        'fraction': None,
    }
    if row['gflop']:
        peak = 'gemm_bf16_gflops' if 'bf16' in name else 'gemm_float32_gflops'
        entry['gflops'] = row['gflop'] / seconds
        entry['fraction'] = entry['gflops'] / settings.peaks[peak]

    is_ours = name not in PEERS[row['script']] and name != 'bisection'
    if baseline in times and name != baseline:
        rounds = zip(times[baseline], times[name])
        entry['ratio'] = quartiles(theirs / ours for theirs, ours in rounds)
    if is_ours:
        key = (row['script'], row['quantity'], row['config'])
        entry['target'] = target_of(settings.device.type, *key, name)
    if entry['target'] and entry['ratio']:
        entry['met'] = entry['ratio'][1] >= entry['target']

    plain = ' '.join(word for word in name.split() if word != 'checkpoint_grads') or 'float32'
    if plain != name and plain in times:
        entry['time_over_plain'] = seconds / float(np.median(times[plain]))
    return entry


def report_row(row: dict) -> None:
    title = f'{row["script"]} {row["config"]}'
    if row['quantity'] == 'training':
        counts = [f'{entry["name"]} {entry["parameters"]:,}' for entry in row['entries']]
        progress(f'{title} parameters: {", ".join(counts)}')
    rates = [
        f'{entry["name"]} {entry["per_second"]:.4g} {row["unit"]}/s' for entry in row['entries']
    ]
    progress(f'{title} {row["quantity"]}: {", ".join(rates)}')


# ------------------------------------------------------------------------------------------ memory


def measure_memory(
    script: str, config: str, shape: dict, settings: Settings, rows: list[dict]
) -> dict:
    """Measure the peak memory of training steps of one peer and of our variants.

    ``rows`` are the shape's measurements of speed: what ``checkpoint_grads`` costs in time is
    shown beside what it saves.
    """
    device = settings.device.type
    peer = PEERS[script][0]
    names = [peer] if peer in settings.peers else []
    for name in variants_to_measure(script, config, settings):
        # On a CPU compiling itself takes more memory than the steps.
        if device == 'cuda' or 'compile' not in name.split():
            names.append(name)

    slowdowns = {}
    for row in rows:
        if row['quantity'] == 'training':
            slowdowns = {e['name']: e.get('time_over_plain') for e in row['entries']}

    entries = []
    for name in names:
        slowdown = slowdowns.get(name)
        entry = {
            'name': name,
            'mib': memory_of(script, shape, name),
            'ratio': None,
            'target': None,
            'met': None,
            'time_over_plain': slowdown,
            'time_met': slowdown and slowdown <= CHECKPOINT_TIME,
        }
        if name != peer:
            entry['target'] = target_of(device, script, 'memory', config, name)
        if name != peer and peer in settings.peers:
            entry['ratio'] = entry['mib'] / entries[0]['mib']
        if entry['target'] and entry['ratio'] is not None:
            entry['met'] = entry['ratio'] <= entry['target']
        entries.append(entry)

    sizes = ', '.join(f'{entry["name"]} {entry["mib"]:.0f} MiB' for entry in entries)
    progress(f'{script} {config} memory: {sizes}')
    return {'script': script, 'config': config, 'shape': shape, 'entries': entries}


def memory_of(script: str, shape: dict, name: str) -> float:
    """Measure MiB of a contender's training steps in a process of its own; inf if too many."""
    request = json.dumps([script, shape, name])
    command = [sys.executable, '-W', 'ignore', __file__, '--memory', request]
    done = subprocess.run(command, capture_output=True, text=True)
    if 'OutOfMemoryError' in done.stderr:
        return math.inf
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.split()[-1])


def print_memory(script: str, shape: dict, name: str) -> None:
    """Print MiB of two training steps: the work of the process that ``memory_of`` starts.

    On a CPU what imports, libraries and the bare model take is not counted.
    """
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    allow_tf32()
    # What is loaded when it is first used is loaded by a step of a tiny model.
    make_contender(script, SMALLEST[script], name, device).step()
    build_bare_model(script, shape, name)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    before = peak_mib()

    contender = make_contender(script, shape, name, device)
    for _ in range(2):
        contender.step()
    synchronize(device)
    if device.type == 'cuda':
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        print(peak_mib() - before)


def peak_mib() -> float:
    """Return the most memory that this process has had resident, which Linux alone tells.

    The maximum of ``resource.getrusage`` is of no use: it starts at that of the parent process.
    """
    status = Path('/proc/self/status').read_text()
    kib = status.split('VmHWM:')[1].split()[0]
    return int(kib) / 1024


# ------------------------------------------------------------------------------- the real commands


@dataclass
class CommandClock:
    """Times taken from outside while a script trains."""

    run: object = None  # the script's Training
    steps: list[tuple[float, float]] = field(default_factory=list)  # start and end of each
    saves: list[float] = field(default_factory=list)  # end of each


def measure_command(
    script: str,
    words: str,
    n_steps: int | None,
    device: torch.device,
) -> dict:
    """Run the script's own ``main`` with ``--train``, cut short after ``n_steps``.

    Returns images or rows per second over a cycle from one validation to the next, and the share
    of it that is not steps.
    """
    module = SCRIPTS[script]
    with timed_training(module, n_steps, device) as clock:
        words = train_quietly(module, words)

    # The first fifth of the steps is for warming up.
    starts, ends = np.array(clock.steps[len(clock.steps) // 5 :]).T
    step_seconds = np.median(ends - starts)
    between_steps = np.mean(starts[1:] - ends[:-1])
    validation_and_save = clock.saves[-1] - ends[-1]

    cycle = clock.run.n_per_validation / clock.run.n_per_step
    outside = cycle * between_steps + validation_and_save
    seconds = cycle * step_seconds + outside
    overhead, target = float(outside / seconds), OVERHEAD[device.type]

    result = {
        'script': script,
        'words': words,
        'n_steps': len(clock.steps),
        'step_seconds': float(step_seconds),
        'per_second': float(cycle * clock.run.config.batch_size / seconds),
        'overhead': overhead,
        'target': target,
        'met': overhead < target,
    }
    figures = f'{result["per_second"]:.4g} per second, {overhead:.1%} outside of steps'
    progress(f'{script}.py --train {words}: {figures}')
    return result


@contextlib.contextmanager
def timed_training(
    module: ModuleType, n_steps: int | None, device: torch.device
) -> Iterator[CommandClock]:
    """Inside, a script's training is timed, and ends after ``n_steps`` if they are given."""
    clock = CommandClock()
    take_step, save_checkpoint = module.Training.take_step, module.save_checkpoint

    def timed_step(run):
        if n_steps:
            run.n_to_see = n_steps * run.n_per_step
        start = time.perf_counter()
        result = take_step(run)
        synchronize(device)
        clock.steps.append((start, time.perf_counter()))
        clock.run = run
        return result

    def timed_save(*args, **kwargs):
        save_checkpoint(*args, **kwargs)
        clock.saves.append(time.perf_counter())

    with (
        mock.patch.object(module.Training, 'take_step', timed_step),
        mock.patch.object(module, 'save_checkpoint', timed_save),
    ):
        yield clock


def train_quietly(module: ModuleType, words: str) -> str:
    """Train in a temporary folder without output, BNAF on noise; return all words but paths."""
    errors = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
    ):
        arguments = words.split()
        if module.NAME == 'bnaf':
            noise = np.random.default_rng(0).normal(size=TABLE_SHAPE).astype(np.float32)
            np.save(f'{folder}/noise.npy', noise)
            arguments = [f'--dataset={folder}/noise.npy', *arguments]
            words = f'--dataset=noise.npy {words}'
        try:
            module.main(['--train', f'--output_dir={folder}', *arguments])
        except SystemExit as error:
            raise RuntimeError(errors.getvalue()) from error
    return words


# ------------------------------------------------------------------------------------------ growth


def measure_growth(script: str, device: torch.device, quick: bool) -> dict:
    """Time training steps while one number of a shape changes at a time.

    Returns ``{number of the shape: [(value, seconds), ...]}``.
    """
    base_shape, sweeps = SWEEPS[script]
    growth = {}
    for name, values in sweeps.items():
        growth[name] = []
        for value in values[:2] if quick else values:
            shape = {**base_shape, name: value}
            step = make_contender(script, shape, 'float32', device).step
            times = time_in_turn({'step': step}, device, budget=0.1 if quick else 0.6)
            growth[name].append((value, float(np.median(times['step']))))
        figures = ', '.join(f'{value}: {1e3 * seconds:.3g} ms' for value, seconds in growth[name])
        progress(f'{script} growth with {name}: {figures}')
    return growth


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


def measure_all(
    scripts: list[str],
    configs: list[str],
    device: torch.device,
    quick: bool,
) -> dict:
    """Return everything measured, as speed.json holds it."""
    peers = peer_versions()
    settings = Settings(device, quick, peers, measure_peaks(device, quick))
    results = {
        'machine': {
            'kind': device.type,
            'device': machine_name(),
            'torch': torch.__version__,
            'peers': peers,
            'quick': quick,
        },
        'peaks': settings.peaks,
        'rows': [],
        'memory': [],
        'commands': [],
        'growth': {},
        'absolute': [],
    }
    peaks = ', '.join(f'{name} {value:.4g}' for name, value in settings.peaks.items())
    progress(f'{results["machine"]["device"]}: {peaks}')

    for script in scripts:
        rows, memory = measure_shapes(script, configs, settings)
        results['rows'] += rows
        results['memory'] += memory
        results['growth'][script] = measure_growth(script, device, quick)
        results['commands'] += measure_commands(script, device, quick)
    if device.type == 'cuda':
        results['absolute'] = check_figures(results['rows'], results['memory'])
    return results


def peer_versions() -> dict[str, str]:
    """Return the versions of the peers that are installed."""
    packages = {'normflows': 'normflows', 'pyro': 'pyro-ppl', 'zuko': 'zuko'}
    return {
        peer: metadata.version(package) for peer, package in packages.items() if is_installed(peer)
    }


def measure_shapes(
    script: str, configs: list[str], settings: Settings
) -> tuple[list[dict], list[dict]]:
    """Measure speed and memory of a script's shapes: of those named, or of all."""
    for peer in PEERS[script]:
        if peer not in settings.peers:
            print(f'{peer} is not installed (requirements-bench.txt): its columns stay empty')

    shapes = BNAF if script == 'bnaf' else GLOW
    if script == 'glow' and settings.device.type == 'cuda':
        shapes = {**GLOW, **GLOW_ON_GPU}
    chosen = configs or list(shapes)[: 1 if settings.quick else None]

    rows, memory = [], []
    for config, shape in shapes.items():
        if config not in chosen:
            continue
        measured = measure_shape(script, config, shape, settings)
        rows += measured
        free_memory(settings.device)
        if settings.quick or config in MEASURED_MEMORY[script]:
            memory.append(measure_memory(script, config, shape, settings, measured))
    return rows, memory


def free_memory(device: torch.device) -> None:
    """Let go of one shape's models before those of the next are built."""
    gc.collect()
    torch.compiler.reset()
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def measure_commands(script: str, device: torch.device, quick: bool) -> list[dict]:
    """Run the script's command, and once more in bf16 if it has that option."""
    words, n_steps = COMMANDS['quick' if quick else device.type][script]
    results = [measure_command(script, words, n_steps, device)]
    if has_options(script, 'bf16'):
        results.append(measure_command(script, f'{words} --bf16', n_steps, device))
    return results


def write_results(results: dict, folder: Path) -> None:
    """Write speed.json, speed.md and scaling.png, and the targets in README.md if it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'speed.json').write_text(json.dumps(results, indent=1) + '\n')
    (folder / 'speed.md').write_text(format_report(results))
    draw_growth(results['growth'], SWEEPS).savefig(folder / 'scaling.png', dpi=120)
    if (folder / 'README.md').exists():
        insert(folder / 'README.md', 'speed.py', targets_table(results))
    progress(f'wrote speed.json, speed.md and scaling.png to {folder}')


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--only', default='glow,bnaf', help='glow, bnaf, input, or several (default: glow,bnaf)'
    )
    parser.add_argument(
        '--rows', default='', help='some of the shapes, such as a,c,A16 (default: all)'
    )
    parser.add_argument('--quick', action='store_true', help='the first shape of each script, once')
    parser.add_argument(
        '--out',
        default=Path(__file__).parent,
        type=Path,
        metavar='DIR',
        help='where the results go (default: the folder of this script)',
    )
    # Given to the processes that memory_of starts.
    parser.add_argument('--memory', type=json.loads, help=argparse.SUPPRESS)

    args = parser.parse_args(argv)
    args.only = args.only.split(',')
    args.rows = args.rows.split(',') if args.rows else []
    unknown = set(args.only).difference(SCRIPTS, ['input'])
    if unknown:
        parser.error(f'--only takes glow, bnaf and input, not {",".join(sorted(unknown))}')
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.memory:
        print_memory(*args.memory)
        return
    if 'input' in args.only:
        measure_input()

    scripts = [script for script in SCRIPTS if script in args.only]
    if scripts:
        allow_tf32()
        device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        results = measure_all(scripts, args.rows, device, args.quick)
        write_results(results, args.out)


if __name__ == '__main__':
    main()
