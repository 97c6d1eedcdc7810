"""Clocks: functions timed in turn, and what the machine itself can do."""

import contextlib
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

START = time.perf_counter()


def progress(text):
    print(f'{time.perf_counter() - START:5.0f} s  {text}', flush=True)


def prefer_tf32():
    """Float32 products in TF32 on a GPU, for everybody alike"""
    torch.set_float32_matmul_precision('high')
    torch.backends.cudnn.allow_tf32 = True


def cpu_name():
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    return next(
        (line.split(':')[1].strip() for line in lines if line.startswith('model name')),
        platform.machine(),
    )


def machine_name():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f'{cpu_name()}, {torch.get_num_threads()} thread' + 's' * (torch.get_num_threads() > 1)


def synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize()


def seconds_of(function, device, repeats=1):
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


@contextlib.contextmanager
def out_of_memory_is_said(what):
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        progress(f'{what}: out of memory')
        torch.cuda.empty_cache()


def in_turn(functions, device, budget, least=3):
    """All functions in turn, A B C A B C ..., for about budget seconds -> {name: seconds of a call, one a round}"""
    repeats, round_seconds = {}, 0.0
    for name, function in functions.items():
        with out_of_memory_is_said(name):
            for _ in range(
                5 if device.type == 'cuda' else 2
            ):  # the last is warm; a long one is at once
                seconds = seconds_of(function, device)
                if seconds > 1 and device.type == 'cpu' and 'compile' not in name.split():
                    break
            repeats[name] = max(
                1, math.ceil(0.03 / seconds)
            )  # a look at the clock is nothing to 30 ms
            round_seconds += seconds * repeats[name]
    times = {name: [] for name in repeats}
    for _ in range(min(30, max(least, int(budget / (round_seconds or 1))))):
        for name in times:
            times[name].append(seconds_of(functions[name], device, repeats[name]))
    return times


def quartiles(values):
    return [float(q) for q in np.quantile(values, (0.25, 0.5, 0.75))]


def measure_peaks(device, quick):
    """-> what the machine itself does: GFLOP/s of products of matrices and of a convolution, GB/s of a copy"""
    n = 512 if quick else 8192 if device.type == 'cuda' else 2048
    best = lambda function: min(seconds_of(function, device) for _ in range(3 if quick else 8))
    peaks = {}
    for name, dtype in (('float32', torch.float32), ('bf16', torch.bfloat16)):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        peaks[f'gemm_{name}_gflops'] = 2e-9 * n**3 / best(lambda: a @ b)
        x = torch.randn(n // 32, 128, 32, 32, device=device).to(
            dtype, memory_format=torch.channels_last
        )
        w = torch.randn(128, 128, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
        peaks[f'conv3x3_{name}_gflops'] = (
            2e-9 * 9 * 128 * x.numel() / best(lambda: F.conv2d(x, w, padding=1))
        )
    source = torch.zeros(
        2**24 if quick else 2**27, device=device
    )  # 4 bytes each, read once and written once
    target = torch.empty_like(source)
    peaks['copy_gb_s'] = 8e-9 * len(source) / best(lambda: target.copy_(source))
    return peaks
