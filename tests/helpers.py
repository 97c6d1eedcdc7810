"""Functions that several test modules use; fixtures are in conftest.py."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from tqdm import tqdm

CPU = torch.device('cpu')


needs_pipes = pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='makes named pipes')
needs_limits = pytest.mark.skipif(
    sys.platform != 'linux', reason='only Linux limits the memory of a process'
)


def only(elements: Iterable) -> Any:
    """Return the one element there is, or fail."""
    (element,) = elements
    return element


def run_command(
    *words: str | Path, cwd: Path, exit_code: int = 0, **variables: str
) -> tuple[str, str]:
    """Run python with these words, as a user would, and return its output and its errors.

    ``variables`` are added to the environment. Any other exit code than ``exit_code`` fails.
    """
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == exit_code, done.stderr
    return done.stdout, done.stderr


def run_on_machines(*words: str | Path, folders: list[Path]) -> list[tuple[int, str, str]]:
    """Run python with these words as one process per folder, joined to a group.

    Each stands for a machine of its own: they share no files. Returns the exit code, the output and
    the errors of each.
    """
    with socket.create_server(('localhost', 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for rank, folder in enumerate(folders):
        variables = {
            'RANK': str(rank),
            'WORLD_SIZE': str(len(folders)),
            'GROUP_WORLD_SIZE': str(len(folders)),
            'LOCAL_RANK': '0',
            'LOCAL_WORLD_SIZE': '1',
            'MASTER_ADDR': 'localhost',
            'MASTER_PORT': str(port),
            'OMP_NUM_THREADS': '1',
            'CUDA_VISIBLE_DEVICES': '',
        }
        process = subprocess.Popen(
            [sys.executable, '-W', 'ignore', *words],
            cwd=folder,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)

    ends = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        ends.append((process.returncode, out, err))
    return ends


def refusal_line(script: ModuleType, capsys: pytest.CaptureFixture, *words: str | Path) -> str:
    """Run a script in this process; return the one line with which it refuses the command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main([str(word) for word in words])
    assert stop.value.code == 2

    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f'{script.NAME}.py: error: '), lines
    assert not any('Traceback' in line for line in lines), lines
    assert len(lines) == 1 or 'step/s' in lines[0], lines  # a progress bar may stand above it
    return lines[-1]


def run_mode(script: ModuleType, mode: str, checkpoint: Path, *words: str | Path) -> None:
    """Run a mode of a script with a checkpoint."""
    script.main([f'--{mode}', f'--restore_file={checkpoint}', *map(str, words)])


def single_process(script: ModuleType) -> Any:
    """Return a script's ``Process`` for a training on one process, on the CPU."""
    return script.Process(rank=0, world_size=1, device=CPU)


@contextlib.contextmanager
def joined_group(rank: int, world_size: int, folder: Path) -> Iterator[None]:
    """Join a group of processes that meet in a file of a folder; leave it when all are done."""
    if world_size == 1:
        yield
        return
    meeting = f'file://{folder}/meet'
    dist.init_process_group('gloo', meeting, rank=rank, world_size=world_size)
    yield
    dist.barrier()
    time.sleep(0.5)  # Gloo's threads still free what they have sent
    dist.destroy_process_group()


def train_until(script: ModuleType, step: int, words: list[str]) -> None:
    """Start a training that dies when ``step`` steps are done and saved."""

    def die(run: Any) -> Any:
        if run.step == step:
            raise ZeroDivisionError
        return take_step(run)

    take_step = script.Training.take_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, 'SAVE_SECONDS', 0)
        patch.setattr(script.Training, 'take_step', die)
        with pytest.raises(ZeroDivisionError):
            script.main(words)


def people_table(n: int = 400) -> pd.DataFrame:
    """Return n rows of three columns: height and weight, which are related, and age."""
    rng = np.random.default_rng(0)
    height = 170 + 10 * rng.normal(size=n)
    weight = 70 + 0.6 * (height - 170) + 5 * rng.normal(size=n)
    age = 40 + 12 * rng.normal(size=n)
    return pd.DataFrame({'height': height, 'weight': weight, 'age': age})


def call_with_own_lock(function: Callable[..., Any], *args: Any) -> None:
    """Call a function without the lock of the progress bars, which a killed process never releases.

    It is for a process that was forked and is to be killed: it shares the lock with this one.
    """
    tqdm.set_lock(threading.RLock())
    function(*args)


def mixed_table(n: int = 400, seed: int = 0) -> pd.DataFrame:
    """Return a table with a text, a boolean, an index, and two columns that follow from them."""
    rng = np.random.default_rng(seed)
    city = rng.choice(['Oslo', 'Rome'], n)
    is_old = rng.random(n) < 0.5
    x = 5.0 * (city == 'Rome') + 2.0 * is_old + rng.normal(size=n)
    y = 0.5 * x + rng.normal(size=n)
    index = np.arange(n) + 10_000
    return pd.DataFrame({'index': index, 'city': city, 'x': x, 'old': is_old, 'y': y})


def perturbed(module: torch.nn.Module, size: float, seed: int = 0) -> torch.nn.Module:
    """Convert a module to float64 and add noise to its parameters, in place; return it.

    At initial values, such as weights of zero, mistakes would not show.
    """
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += size * noise
    return module


def jacobian(function: Callable, x: torch.Tensor) -> torch.Tensor:
    """Return the Jacobian (D, D) of a layer's ``forward`` or ``inverse`` at one element x."""

    def flat_output(x: torch.Tensor) -> torch.Tensor:
        return function(x[None])[0].flatten()

    return torch.autograd.functional.jacobian(flat_output, x).reshape(-1, x.numel())


def log_det(matrix: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the absolute determinant."""
    return torch.linalg.slogdet(matrix)[1]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    """Fail unless two tensors are equal within an absolute tolerance."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
