"""The rule for files of any origin: which are opened, and what reading one may take."""

import inspect
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers import needs_limits, needs_pipes

from common import bounds
from common.bounds import (
    LEAST_MEMORY,
    MEMORY_PER_BYTE,
    bounded_memory,
    file_size,
    limit_address_space,
    memory_limit,
    open_regular,
    read_after_trial,
    read_bounded,
)
from common.errors import UserError

try:
    import resource
except ImportError:
    resource = None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of a file of one byte."""
    (tmp_path / 'file').write_bytes(b'x')
    return tmp_path / 'file'


MORE = 3 * LEAST_MEMORY // 2  # the process may have some to spare

# The functions below read a file, or do something else instead.


def size_of(path: Path) -> int:
    return path.stat().st_size


def allocate_with_numpy(path: Path) -> int:
    return len(np.ones(MORE, np.uint8))


def allocate_with_torch(path: Path) -> int:
    return len(torch.ones(MORE, dtype=torch.uint8))


def allocate_in_steps(path: Path) -> int:
    return len([bytes(2**26) for _ in range(MORE // 2**26)])


def crash(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def work_for_ever(path: Path) -> None:
    while True:
        pass


def wait_for_ever(path: Path) -> None:
    threading.Event().wait()


def raise_user_error(path: Path) -> None:
    raise UserError('not like this')


def raise_bug(path: Path) -> None:
    raise LookupError('a bug')


GREEDY = [allocate_with_numpy, allocate_with_torch, allocate_in_steps]


# -------------------------------------------------------------------------------- regular files


def test_the_size_of_a_regular_file(path):
    assert file_size(path) == 1
    assert open_regular(path, max_bytes=1).read() == b'x'
    link = path.with_name('link')
    link.symlink_to(path)
    assert file_size(link) == 1
    with pytest.raises(FileNotFoundError):
        file_size(path.with_name('none'))


def test_a_file_that_is_too_large(path):
    path.write_bytes(bytes(2000))
    with pytest.raises(UserError, match='file has 2,000 bytes, 1,999 are the most'):
        open_regular(path, max_bytes=1999)


@needs_pipes
def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'zero').symlink_to('/dev/zero')
    for read in (file_size, open_regular, memory_limit):
        with pytest.raises(UserError, match='is a folder, not a file'):
            read(tmp_path)
        for name in ('pipe', 'zero'):
            with pytest.raises(UserError, match=f'{name} is a pipe, a socket or a device'):
                read(tmp_path / name)


def test_the_limit_of_memory(path):
    assert memory_limit(path) == LEAST_MEMORY
    path.write_bytes(bytes(LEAST_MEMORY // MEMORY_PER_BYTE + 1000))
    assert memory_limit(path) == LEAST_MEMORY + 1000 * MEMORY_PER_BYTE


# ------------------------------------------------------------------------------------- memory


@needs_limits
@pytest.mark.parametrize('read', [read_bounded, read_after_trial])
@pytest.mark.parametrize('function', GREEDY)
def test_what_takes_more_memory_than_its_size_allows(function, read, path):
    with pytest.raises(UserError, match='file takes more than 256 MiB of memory'):
        read(function, path)
    path.write_bytes(bytes(2 * MORE // MEMORY_PER_BYTE))
    assert read(function, path)


@needs_limits
def test_the_limit_ends_with_the_reading(path):
    read_bounded(size_of, path)
    with pytest.raises(UserError):
        read_bounded(raise_user_error, path)
    for function in GREEDY:
        assert function(path)


@needs_limits
def test_a_lower_limit_stays_and_is_no_fault_of_the_file(path):
    with limit_address_space(2**27) as is_outer, limit_address_space(2**28) as is_inner:
        assert is_outer and not is_inner
        with pytest.raises(MemoryError):
            read_bounded(allocate_with_numpy, path)
    with bounded_memory(path), limit_address_space(2**27) as is_inner:
        assert is_inner
        with pytest.raises(MemoryError):
            bytes(2**28)


def test_other_errors_are_not_about_memory(path):
    with pytest.raises(UserError, match='^not like this$'):
        read_bounded(raise_user_error, path)
    with pytest.raises(LookupError, match='a bug'):
        read_bounded(raise_bug, path)


def test_where_memory_cannot_be_limited(path, monkeypatch):
    monkeypatch.setattr(bounds, 'resource', None)
    assert read_bounded(size_of, path) == 1
    assert read_after_trial(size_of, path) == 1
    with limit_address_space(2**20) as is_limited:
        assert not is_limited


# ------------------------------------------------------------------------------ child processes


def test_what_a_child_returns_and_raises(path):
    assert read_after_trial(size_of, path) == 1
    with pytest.raises(UserError, match='^not like this$'):
        read_after_trial(raise_user_error, path)
    with pytest.raises(LookupError, match='a bug'):
        read_after_trial(raise_bug, path)
    with pytest.raises(FileNotFoundError):
        read_after_trial(size_of, path.with_name('none'))


@needs_limits
def test_a_child_that_crashes(path):
    with pytest.raises(UserError, match='file is damaged: the library that reads it has crashed'):
        read_after_trial(crash, path)


@needs_limits
def test_a_child_that_is_busy_for_ever(path, monkeypatch):
    monkeypatch.setattr(bounds, 'LEAST_SECONDS', 1)
    start = time.monotonic()
    with pytest.raises(UserError, match='was still busy after 1 s'):
        read_after_trial(work_for_ever, path)
    assert time.monotonic() - start < 10


@needs_limits
def test_a_child_that_waits_for_ever(path, monkeypatch):
    monkeypatch.setattr(bounds, 'LEAST_SECONDS', 1)
    monkeypatch.setattr(bounds, 'PATIENCE', 1)
    with pytest.raises(UserError, match='is damaged'):
        read_after_trial(wait_for_ever, path)


def test_a_large_file_may_take_more_time():
    assert bounds.seconds_for(1000) == bounds.LEAST_SECONDS
    assert bounds.seconds_for(100 * 2**20) == bounds.LEAST_SECONDS + 100


@needs_limits
def test_a_trial_under_a_lower_limit_of_time(path):
    """The user's own limit of the processor's time stays, and is no fault of the file."""
    code = f"""
        import resource
        from pathlib import Path
        from common import bounds
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        bounds.LEAST_SECONDS = 1000
        print(bounds.read_after_trial(Path.read_bytes, Path({str(path)!r})))
    """
    assert run_python(inspect.cleandoc(code)) == "b'x'"


@needs_limits
def test_a_script_without_a_guard_reads_a_table(tmp_path):
    """Its own code is not run again by the process that reads the file first."""
    with h5py.File(tmp_path / 'x.h5', 'w') as file:
        file['rows'] = np.ones((3, 2))
    code = f"""
        from datasets.own_tables import read_frame
        print(read_frame({str(tmp_path / 'x.h5')!r}).shape)
    """
    assert run_python(inspect.cleandoc(code)) == '(3, 2)'


def run_python(code: str) -> str:
    """Return what code prints that a process of its own runs."""
    command = [sys.executable, '-c', code]
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_limits
def test_two_threads_do_not_mix_up_their_limits(path):
    """The second one waits, so that the first limit does not outlive both."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    first_is_in, first_may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with bounded_memory(path):
            first_is_in.set()
            first_may_end.wait(10)

    threads = [threading.Thread(target=hold)]
    threads[0].start()
    first_is_in.wait(10)
    threads.append(threading.Thread(target=read_bounded, args=(size_of, path)))
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive()
    assert multiprocessing_result(read_bounded, size_of, path) == 1  # has no such thread

    first_may_end.set()
    for thread in threads:
        thread.join(10)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def multiprocessing_result(function, *args):
    """Return what a forked process returns."""
    with multiprocessing.get_context('fork').Pool(1) as pool:
        return pool.apply_async(function, args).get(10)
