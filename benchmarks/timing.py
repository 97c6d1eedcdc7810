"""Clocks: functions that are timed in turn, and the peak rates of the machine itself."""

import contextlib
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

START = time.perf_counter()
MIN_SECONDS = 0.03  # of one reading of the clock, beside which reading it takes no time
MAX_ROUNDS = 30


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
    """Return the wall-clock seconds of one call, the mean over ``n_calls``."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(n_calls):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / n_calls


@contextlib.contextmanager
def report_out_of_memory(name: str) -> Iterator[None]:
    """Print that the GPU's memory ran out inside, and go on."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        progress(f'{name}: out of memory')
        torch.cuda.empty_cache()


def warm_up(function: Callable, device: torch.device, is_compiled: bool) -> float:
    """Call a function until it runs at its usual speed; return the seconds of the last call."""
    for _ in range(5 if device.type == 'cuda' else 2):
        seconds = seconds_per_call(function, device)
        if seconds > 1 and device.type == 'cpu' and not is_compiled:
            break  # beside so long a call, what the first one does in addition does not count
    return seconds


def time_in_turn(
    functions: dict[str, Callable], device: torch.device, budget: float, min_rounds: int = 3
) -> dict[str, list[float]]:
    """Time all functions in turn, A B C A B C ..., for about ``budget`` seconds.

    Returns the seconds of one call for each name, one value per round. A function that runs out
    of the GPU's memory is left out.
    """
    n_calls = {}
    round_seconds = 0.0
    for name, function in functions.items():
        with report_out_of_memory(name):
            seconds = warm_up(function, device, is_compiled='compile' in name.split())
            n_calls[name] = max(1, math.ceil(MIN_SECONDS / seconds))
            round_seconds += seconds * n_calls[name]

    n_rounds = max(min_rounds, int(budget / (round_seconds or 1)))
    times = {name: [] for name in n_calls}
    for _ in range(min(MAX_ROUNDS, n_rounds)):
        for name in times:
            seconds = seconds_per_call(functions[name], device, n_calls[name])
            times[name].append(seconds)
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
        return 512
    return 8192 if device.type == 'cuda' else 2048


def best_time(function: Callable, device: torch.device, quick: bool) -> float:
    """Return the seconds of the fastest of a few calls."""
    n_repeats = 3 if quick else 8
    return min(seconds_per_call(function, device) for _ in range(n_repeats))


def gemm_gflops(device: torch.device, dtype: torch.dtype, quick: bool) -> float:
    """Measure GFLOP/s of the product of two large square matrices."""
    n = matrix_size(device, quick)
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    return 2e-9 * n**3 / best_time(lambda: a @ b, device, quick)


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
