"""Clocks: functions that are timed in turn, and the peak rates of the machine itself."""

import math
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

START = time.perf_counter()
# Of one reading of the clock, beside which reading it takes no time; on a GPU also long enough
# that the first launch, for which the GPU waits, does not count.
MIN_SECONDS = {'cpu': 0.03, 'cuda': 0.1}
# Calls before the first reading. A captured training takes three steps as they are, captures the
# fourth, and replays it from then on.
N_WARMUP = {'cpu': 2, 'cuda': 6}
MAX_ROUNDS = 30

Timer = Callable[[int], float]  # from a number of calls to the seconds of one of them


def progress(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f'{time.perf_counter() - START:5.0f} s  {text}', flush=True)


def allow_tf32() -> None:
    """Let a GPU compute float32 products in TF32, ours and the peers' alike."""
    torch.set_float32_matmul_precision('high')
    torch.backends.cudnn.allow_tf32 = True


def cpu_name() -> str:
    """Return the model of the CPU, or its architecture where Linux does not name the model."""
    for line in Path('/proc/cpuinfo').read_text().splitlines():
        if line.startswith('model name'):
            return line.split(':')[1].strip()
    return platform.machine()


def machine_name() -> str:
    """Return the name of the GPU if there is one, else of the CPU with torch's threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    n_threads = torch.get_num_threads()
    return f'{cpu_name()}, {n_threads} thread{"s" if n_threads > 1 else ""}'


def synchronize(device: torch.device) -> None:
    """Wait until the GPU has done all that was asked of it."""
    if device.type == 'cuda':
        torch.cuda.synchronize()


def seconds_per_call(function: Callable, device: torch.device, n_calls: int = 1) -> float:
    """Return the seconds of one call, the mean over ``n_calls``.

    On a CPU they are those of a clock on the wall. On a GPU they lie between two CUDA events
    around all calls: calls return before the GPU has done what they ask of it.
    """
    if device.type == 'cuda':
        return seconds_between_events(function, n_calls)
    start = time.perf_counter()
    for _ in range(n_calls):
        function()
    return (time.perf_counter() - start) / n_calls


def seconds_between_events(function: Callable, n_calls: int) -> float:
    """Return the seconds of one of ``n_calls`` on an otherwise idle GPU."""
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(n_calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / n_calls


def warm_up(timer: Timer, n_calls: int, has_long_start: bool) -> float:
    """Call a function until it runs at its usual speed; return the seconds of the last call.

    Where no ``has_long_start`` is expected, a call of over a second is the last: beside it, what
    the first one does in addition does not count.
    """
    for _ in range(n_calls):
        seconds = timer(1)
        if seconds > 1 and not has_long_start:
            break
    return seconds


def raise_error(name: str, error: Exception) -> None:
    """Let a function that fails end all measurements."""
    raise error


def time_in_turn(
    timers: dict[str, Timer],
    budget: float,
    min_rounds: int = 3,
    min_seconds: float = MIN_SECONDS['cpu'],
    n_warmup: int = N_WARMUP['cpu'],
    on_error: Callable[[str, Exception], None] = raise_error,
) -> dict[str, list[float]]:
    """Time functions in turn, A B C A B C ..., for about ``budget`` seconds.

    Arguments:
        timers: for each name, a function from a number of calls to the seconds of one of them.
        budget: seconds of all rounds together, which come after the warm-up.
        min_rounds: rounds at least, whatever the budget.
        min_seconds: of one reading of the clock, between which lie as many calls as it takes.
        n_warmup: calls of each before the first round.
        on_error: called with the name of a function that raises, which is left out, and the error.

    Returns the seconds of one call for each name, one value per round.
    """
    n_calls = {}
    round_seconds = 0.0
    for name, timer in timers.items():
        # a training on a GPU captures its step late in the warm-up
        has_long_start = 'compile' in name.split() or n_warmup > N_WARMUP['cpu']
        try:
            seconds = warm_up(timer, n_warmup, has_long_start)
        except Exception as error:
            on_error(name, error)
            continue
        n_calls[name] = max(1, math.ceil(min_seconds / seconds))
        round_seconds += seconds * n_calls[name]

    times: dict[str, list[float]] = {name: [] for name in n_calls}
    n_rounds = max(min_rounds, int(budget / (round_seconds or 1)))
    for _ in range(min(MAX_ROUNDS, n_rounds)):
        for name in list(times):
            try:
                times[name].append(timers[name](n_calls[name]))
            except Exception as error:
                del times[name]
                on_error(name, error)
    return times


def quartiles(values: Iterable[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    return np.quantile(list(values), (0.25, 0.5, 0.75)).tolist()


# ------------------------------------------------------------------------------ the machine itself


def measure_peaks(device: torch.device, quick: bool) -> dict[str, float]:
    """Measure GFLOP/s of a matrix product and of a convolution, and GB/s of a copy."""
    peaks = {}
    for name, dtype in (('float32', torch.float32), ('bf16', torch.bfloat16)):
        peaks[f'gemm_{name}_gflops'] = gemm_gflops(device, dtype, quick)
        peaks[f'conv3x3_{name}_gflops'] = conv3x3_gflops(device, dtype, quick)
    peaks['copy_gb_s'] = copy_gigabytes(device, quick)
    return peaks


def matrix_size(device: torch.device, quick: bool) -> int:
    """Return the number of rows of a matrix that is large enough for the device."""
    if quick:
        return 256
    return 8192 if device.type == 'cuda' else 2048


def best_time(function: Callable, device: torch.device, quick: bool) -> float:
    """Return the seconds of the fastest of a few calls, which take about a second at most."""
    times = [seconds_per_call(function, device)]
    while len(times) < (3 if quick else 8) and sum(times) < 1:
        times.append(seconds_per_call(function, device))
    return min(times)


def gemm_gflops(device: torch.device, dtype: torch.dtype, quick: bool) -> float:
    """Measure GFLOP/s of the product of two large square matrices.

    They are smaller where this takes long: some CPUs have no instructions for bfloat16.
    """
    n, seconds = 128, 0.0
    while n < matrix_size(device, quick) and seconds < 0.05:
        n *= 2
        a = torch.randn(n, n, device=device).to(dtype)
        b = torch.randn(n, n, device=device).to(dtype)
        seconds = best_time(lambda a=a, b=b: a @ b, device, quick)
    return 2e-9 * n**3 / seconds


def conv3x3_gflops(device: torch.device, dtype: torch.dtype, quick: bool) -> float:
    """Measure GFLOP/s of a 3x3 convolution of 128 channels on images of 32x32 pixels."""
    n_images = matrix_size(device, quick) // 32
    layout = dict(dtype=dtype, memory_format=torch.channels_last)
    x = torch.randn(n_images, 128, 32, 32, device=device).to(**layout)
    weight = torch.randn(128, 128, 3, 3, device=device).to(**layout)

    seconds = best_time(lambda: F.conv2d(x, weight, padding=1), device, quick)
    gflop = 2e-9 * 9 * 128 * x.numel()
    return gflop / seconds


def copy_gigabytes(device: torch.device, quick: bool) -> float:
    """Measure GB/s of a copy; each value of 4 bytes is read once and written once."""
    source = torch.zeros(2**24 if quick else 2**27, device=device)
    target = torch.empty_like(source)
    return 8e-9 * len(source) / best_time(lambda: target.copy_(source), device, quick)
