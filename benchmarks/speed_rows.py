"""What speed.py measures, each part in a process of its own.

Every ``measure_...`` is a generator of pairs: the section of speed.json that a result belongs to,
and the result. One that fails in part yields the error among ``'failures'`` and goes on.
"""

import contextlib
import ctypes
import gc
import io
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

# glow.py and bnaf.py are in the folder above this one.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from contenders import (
    SCRIPTS,
    Contender,
    build_bare_model,
    count_parameters,
    invert_by_bisection,
    make_contender,
)
from speed_report import OVERHEAD
from timing import (
    MIN_SECONDS,
    N_WARMUP,
    Timer,
    cpu_name,
    machine_name,
    measure_peaks,
    seconds_per_call,
    synchronize,
    time_in_turn,
)

from common.errors import one_line

Results = Iterator[tuple[str, Any]]

SMALLEST = {
    'glow': dict(image_size=8, n_levels=1, depth=1, width=8, batch_size=2),
    'bnaf': dict(data_dim=2, n_flows=2, n_hidden=1, hidden_dim=2, batch_size=2),
}
# What is timed, and for about how many seconds.
SECONDS = {'training': 5, 'evaluation': 2, 'sampling': 3}
UNITS = {'glow': 'images', 'bnaf': 'rows'}


def failure(what: str, error: Exception) -> tuple[str, dict]:
    """Return the entry of what could not be measured, with its error in one line."""
    return 'failures', {'what': what, 'error': error_text(error)}


class RemoteError(RuntimeError):
    """An error of another process, as its text says it."""


def error_text(error: Exception) -> str:
    """Return the type and the text of an error in one line."""
    if isinstance(error, RemoteError):
        return str(error)
    return f'{type(error).__name__}: {one_line(error)}'


def measure_machine(device: torch.device, quick: bool) -> Results:
    """Name the machine, and measure what it can do at best."""
    threads = torch.get_num_threads()
    yield 'machine', {'device': machine_name(), 'cpu': cpu_name(), 'threads': threads}
    yield 'peaks', measure_peaks(device, quick)


# ------------------------------------------------------------------------------------------- speed


def measure_speed(
    script: str,
    config: str,
    shape: dict,
    names: Sequence[str],
    quantities: Sequence[str],
    device: torch.device,
    quick: bool = False,
    state: str = '',
    in_turn: bool = True,
) -> Results:
    """Time training steps, evaluation or sampling of contenders, the first of them the baseline.

    Arguments:
        state: of the allocator: ``'warm'`` if it is to keep the memory that is freed.
        in_turn: hold all contenders in memory and time them in turn; otherwise build one after
            the other.
    """
    if state == 'warm':
        keep_freed_memory()
    first_times: dict[str, dict[str, list[float]]] = {quantity: {} for quantity in quantities}
    for group in [names] if in_turn else [[name] for name in names]:
        contenders = {}
        for name in group:
            try:
                contenders[name] = make_contender(script, shape, name, device)
            except Exception as error:
                yield failure(f'{script} {config}, {name}', error)

        for quantity in quantities:
            row = new_row(script, config, quantity, shape, state, in_turn)
            yield from time_contenders(row, contenders, device, quick)
            if names[0] in row['times']:
                first_times[quantity] = {names[0]: row['times'][names[0]]}
            row['times'] = first_times[quantity] | row['times']
            if row['parameters']:
                yield 'rows', row
        contenders.clear()
        free_memory(device)


def new_row(
    script: str, config: str, quantity: str, shape: dict, state: str = '', in_turn: bool = True
) -> dict:
    """Return a row without times."""
    return {
        'script': script,
        'config': config,
        'quantity': quantity,
        'state': state,
        'shape': shape,
        'n': shape['batch_size'],
        'unit': UNITS[script],
        'in_turn': in_turn,
        'gflop': None,
        'times': {},
        'parameters': {},
    }


def time_contenders(
    row: dict, contenders: dict[str, Contender], device: torch.device, quick: bool
) -> Results:
    """Add to a row the times of contenders, and the work of ours; yield what fails."""
    quantity = row['quantity']
    for contender in contenders.values():
        contender.model.train(quantity == 'training')

    functions = functions_to_time(quantity, contenders)
    timers = {
        name: partial(seconds_per_call, function, device) for name, function in functions.items()
    }
    yield from time_row(row, timers, device, quick)
    for name in row['times']:
        row['parameters'][name] = count_parameters(contenders[name].model)

    plain = contenders.get('float32')
    if 'float32' in row['times'] and plain is not None:
        try:
            row['gflop'] = count_gflop(quantity, plain)
        except Exception as error:
            yield failure(f'{row["script"]} {row["config"]}, counting operations', error)


def time_row(
    row: dict, timers: dict[str, Timer], device: torch.device, quick: bool, min_rounds: int = 3
) -> Results:
    """Add the times of functions to a row; yield those that fail."""
    errors = []
    what = f'{row["script"]} {row["config"]} {row["quantity"]}'
    seconds = SECONDS[row['quantity']]
    row['times'] = time_in_turn(
        timers,
        budget=seconds / 20 if quick else seconds,
        min_rounds=2 if quick else min_rounds,
        min_seconds=MIN_SECONDS[device.type],
        n_warmup=N_WARMUP[device.type if row['quantity'] == 'training' else 'cpu'],
        on_error=lambda name, error: errors.append((name, error)),
    )
    for name, error in errors:
        yield failure(f'{what}, {name}', error)


def functions_to_time(quantity: str, contenders: dict[str, Contender]) -> dict[str, Callable]:
    """Return what is called of each contender."""
    if quantity == 'training':
        return {name: contender.step for name, contender in contenders.items()}

    functions = {}
    for name, contender in contenders.items():
        # Checkpointed gradients make no difference without gradients.
        if 'checkpoint_grads' not in name.split():
            is_evaluation = quantity == 'evaluation'
            function = contender.evaluate if is_evaluation else contender.sample
            functions[name] = torch.no_grad()(function)
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


def free_memory(device: torch.device) -> None:
    """Let go of one contender before the next one is built."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def keep_freed_memory() -> None:
    """Let this process keep all memory that it frees, instead of giving it back to the system.

    Memory that is given back costs a page fault per 4 KiB when it is taken again, and glibc gives
    back every block of more than 32 MiB.
    """
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    if not mallopt(mmap_max, 0) or not mallopt(trim_threshold, -1):
        raise OSError('mallopt has refused to keep freed memory')


# ---------------------------------------------------------------------------------- fresh processes


def measure_fresh(
    script: str,
    config: str,
    shape: dict,
    names: Sequence[str],
    device: torch.device,
    quick: bool = False,
) -> Results:
    """Time training steps of contenders that each have a process of their own, in turn."""
    context = multiprocessing.get_context('fork')  # this process has not computed anything yet
    row = new_row(script, config, 'training', shape, state='fresh')
    with contextlib.ExitStack() as stack:
        timers, ends = {}, []
        for name in names:
            here, there = context.Pipe()
            ends.append(stack.enter_context(here))
            arguments = there, list(ends), script, shape, name, device
            context.Process(target=serve_steps, args=arguments, daemon=True).start()
            there.close()
            try:
                row['parameters'][name] = receive(here)
            except Exception as error:
                yield failure(f'{script} {config} in a fresh process, {name}', error)
            else:
                timers[name] = partial(ask_for_steps, here)
        yield from time_row(row, timers, device, quick)
    if row['times']:
        yield 'rows', row


def serve_steps(
    own_end: Connection,
    other_ends: list[Connection],
    script: str,
    shape: dict,
    name: str,
    device: torch.device,
) -> None:
    """Build a contender and send its number of parameters; then take as many steps as are asked.

    For each number of steps that comes, the seconds of one of them are sent. ``other_ends`` are
    inherited from the process that asks, and are closed, as otherwise its end would go unnoticed.
    """
    for end in other_ends:
        end.close()
    with contextlib.suppress(EOFError, BrokenPipeError), own_end:
        try:
            contender = make_contender(script, shape, name, device)
            contender.model.train()
            own_end.send(count_parameters(contender.model))
            while True:
                n_calls = own_end.recv()
                own_end.send(seconds_per_call(contender.step, device, n_calls))
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:
            own_end.send(RemoteError(error_text(error)))


def ask_for_steps(end: Connection, n_calls: int) -> float:
    """Let the contender at the other end take steps; return the seconds of one of them."""
    end.send(n_calls)
    return receive(end)


def receive(end: Connection) -> Any:
    """Receive a value. Raises ``RemoteError`` where the other process has failed or ended."""
    try:
        value = end.recv()
    except EOFError as error:
        raise RemoteError('its process has ended') from error
    if isinstance(value, Exception):
        raise value
    return value


# ---------------------------------------------------------------------------------------- inverses


def measure_inverses(
    script: str,
    config: str,
    shape: dict,
    n: int,
    is_bisected: bool,
    device: torch.device,
    quick: bool = False,
) -> Results:
    """Time the inverse of a BNAF on ``n`` rows, beside bisection.

    Sampling cannot be compared to Pyro's BNAF, which has no inverse.
    """
    model = make_contender(script, shape, 'float32', device).model.eval()
    x = torch.randn(n, model.data_dim, device=device)
    with torch.no_grad():
        z, _ = model(x)

    functions = {'float32': partial(model.inverse, z)}
    if is_bisected:
        functions = {'bisection': partial(invert_by_bisection, model, z), **functions}
    timers = {}
    for name, function in functions.items():
        timers[name] = partial(seconds_per_call, torch.no_grad()(function), device)

    row = new_row(script, config, 'sampling', shape)
    row['n'] = n
    yield from time_row(row, timers, device, quick, min_rounds=2)
    row['parameters'] = dict.fromkeys(row['times'], count_parameters(model))
    if row['times']:
        yield 'rows', row


# ------------------------------------------------------------------------------------------ memory


def measure_memory(
    script: str, config: str, shape: dict, names: Sequence[str], device: torch.device
) -> Results:
    """Measure MiB of training steps of each contender, in a process of its own."""
    row = {'script': script, 'config': config, 'shape': shape, 'mib': {}}
    for name in names:
        try:
            row['mib'][name] = in_own_process(memory_of_steps, script, shape, name, device)
        except Exception as error:
            yield failure(f'{script} {config} memory, {name}', error)
    if row['mib']:
        yield 'memory', row


def in_own_process(function: Callable, *arguments: Any) -> Any:
    """Call a function in a process of its own and return its result."""
    context = multiprocessing.get_context('fork')
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=send_result, args=(there, function, arguments), daemon=True)
    process.start()
    there.close()
    with here:
        result = receive(here)
    process.join()
    return result


def send_result(end: Connection, function: Callable, arguments: tuple) -> None:
    """Send what a function returns, or an error with what it raises in one line."""
    try:
        end.send(function(*arguments))
    except Exception as error:
        end.send(RemoteError(error_text(error)))


def memory_of_steps(script: str, shape: dict, name: str, device: torch.device) -> float:
    """Return MiB of two training steps; infinity where a GPU does not have so many.

    On a CPU what imports, libraries and the bare model take is not counted.
    """
    # What is loaded when it is first used is loaded by a step of a tiny model.
    make_contender(script, SMALLEST[script], name, device).step()
    build_bare_model(script, shape, name)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    before = peak_mib()

    try:
        contender = make_contender(script, shape, name, device)
        n_steps = 2 if device.type == 'cpu' else N_WARMUP['cuda']
        for _ in range(n_steps):
            contender.step()
        synchronize(device)
    except torch.cuda.OutOfMemoryError:
        return math.inf
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_mib() - before


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
    table_shape: Sequence[int],
    device: torch.device,
) -> Results:
    """Run the script's own ``main`` with ``--train``, cut short after ``n_steps``.

    Yields images or rows per second over a cycle from one validation to the next, and the share
    of it that is not steps. BNAF is trained on noise of ``table_shape``.
    """
    module = SCRIPTS[script]
    with timed_training(module, n_steps, device) as clock:
        words = train_quietly(module, words, table_shape)

    # The first fifth of the steps is for warming up.
    starts, ends = np.array(clock.steps[len(clock.steps) // 5 :]).T
    step_seconds = np.median(ends - starts)
    between_steps = np.mean(starts[1:] - ends[:-1])
    validation_and_save = clock.saves[-1] - ends[-1]

    cycle = clock.run.n_per_validation / clock.run.n_per_step
    outside = cycle * between_steps + validation_and_save
    seconds = cycle * step_seconds + outside
    overhead, target = float(outside / seconds), OVERHEAD[device.type]

    yield (
        'commands',
        {
            'script': script,
            'words': words,
            'n_steps': len(clock.steps),
            'step_seconds': float(step_seconds),
            'per_second': float(cycle * clock.run.config.batch_size / seconds),
            'overhead': overhead,
            'target': target,
            'met': overhead < target,
        },
    )


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


def train_quietly(module: ModuleType, words: str, table_shape: Sequence[int]) -> str:
    """Train in a temporary folder without output, BNAF on noise; return all words but paths."""
    errors = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
    ):
        arguments = words.split()
        if module.NAME == 'bnaf':
            noise = np.random.default_rng(0).normal(size=table_shape).astype(np.float32)
            np.save(f'{folder}/noise.npy', noise)
            arguments = [f'--dataset={folder}/noise.npy', *arguments]
            words = f'--dataset=noise.npy {words}'
        try:
            module.main(['--train', f'--output_dir={folder}', *arguments])
        except SystemExit as error:
            raise RuntimeError(errors.getvalue()) from error
    return words


# ------------------------------------------------------------------------------------------ growth


def measure_growth(
    script: str, base_shape: dict, sweeps: dict, device: torch.device, quick: bool = False
) -> Results:
    """Time training steps while one number of a shape changes at a time.

    Yields ``{number of the shape: [(value, seconds), ...]}`` for each number.
    """
    for name, values in sweeps.items():
        points = []
        for value in values[:2] if quick else values:
            shape = {**base_shape, name: value}
            step = make_contender(script, shape, 'float32', device).step
            times = time_in_turn(
                {'step': partial(seconds_per_call, step, device)},
                budget=0.1 if quick else 0.6,
                n_warmup=N_WARMUP[device.type],
            )
            points.append((value, float(np.median(times['step']))))
        yield 'growth', {script: {name: points}}
