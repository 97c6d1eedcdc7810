"""Files of any origin: which of them are opened, and what reading one may take.

The rule is the same for all formats. Only regular files are opened. Reading one takes at most
``LEAST_MEMORY`` or, if that is more, ``MEMORY_PER_BYTE`` times its size on the disk, which for a
compressed file is its packed size.

Linux enforces the rule while a file is read, whatever library reads it. Elsewhere only the sizes
that files declare are compared with it.
"""

import contextlib
import faulthandler
import math
import multiprocessing
import os
import re
import signal
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from .errors import UserError

try:
    import resource
except ImportError:  # Windows has no limits of this kind
    resource = None  # type: ignore[assignment]

LEAST_MEMORY = 2**28  # bytes
MEMORY_PER_BYTE = 64

# How long ``read_after_trial`` tries. The time is that of the processor, so that a busy machine or
# a slow disk makes no difference.
LEAST_SECONDS = 4
BYTES_PER_SECOND = 2**20
PATIENCE = 20  # times as long on the clock

# What libraries say when the system gives them no memory; most raise MemoryError
OUT_OF_MEMORY = 'out of memory|enough memory|bad_alloc|(cannot|can.t|unable to|could not) allocate'
OUT_OF_MEMORY += r'|(allocation|malloc of size \d+) failed|calling read\(nbytes\) on source failed'

limit_lock = threading.RLock()  # for one thread at a time, as the limit is that of the process

MEMORY_MAP = Path('/proc/self/statm')

Result = TypeVar('Result')


def forget_threads() -> None:
    """Free the lock in a process that was forked, where the thread that holds it does not exist."""
    global limit_lock
    limit_lock = threading.RLock()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=forget_threads)


def file_size(path: str | Path, max_bytes: int | None = None) -> int:
    """Return the size of a regular file in bytes.

    Raises ``UserError`` for folders, devices, pipes and sockets, which could block or never end,
    and for files of more than ``max_bytes``. Raises ``OSError`` where there is no such file.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = 'a folder' if stat.S_ISDIR(status.st_mode) else 'a pipe, a socket or a device'
        raise UserError(f'{path} is {kind}, not a file: give the path of a file')
    if max_bytes is not None and status.st_size > max_bytes:
        raise UserError(f'{path} has {status.st_size:,} bytes, {max_bytes:,} are the most')
    return status.st_size


def open_regular(path: str | Path, max_bytes: int | None = None) -> BinaryIO:
    """Open a file for reading its bytes. Raises the errors of ``file_size``."""
    file_size(path, max_bytes)
    return open(path, 'rb')


def memory_limit(path: str | Path) -> int:
    """Return how many bytes of memory a file may take. See ``file_size`` for errors."""
    return memory_for(file_size(path))


def memory_for(n_bytes: int) -> int:
    """Return how many bytes of memory a file of so many bytes may take."""
    return max(LEAST_MEMORY, MEMORY_PER_BYTE * n_bytes)


@contextlib.contextmanager
def bounded_memory(path: str | Path) -> Iterator[None]:
    """Read a file in this context, in no more memory than ``memory_limit`` of it.

    The limit holds for all threads of the process, so nothing else should be done meanwhile.
    Raises ``UserError`` where the file needs more, and the errors of ``file_size``.
    """
    limit = memory_limit(path)
    with limit_address_space(limit) as is_limited:
        try:
            yield
        except Exception as error:
            # where another limit is lower, the file is not to blame
            if not is_limited or not is_about_memory(error):
                raise
            raise UserError(
                f'{path} takes more than {limit / 2**20:,.0f} MiB of memory, too much for its '
                'size: it is damaged, or packed very densely; if you trust it, make it smaller, '
                'unpack it, or save it as .csv'
            ) from error


def is_about_memory(error: Exception) -> bool:
    """Return whether an error of a library says that the system gave it no memory."""
    is_said = re.search(OUT_OF_MEMORY, str(error), re.IGNORECASE) is not None
    return isinstance(error, MemoryError) or (is_said and not isinstance(error, UserError))


@contextlib.contextmanager
def limit_address_space(n_bytes: int) -> Iterator[bool]:
    """Let this process take only so many bytes more than it has now.

    Yields whether it has a new limit: only Linux has one, and not where the old one is lower. Other
    threads that want a limit wait until this one ends.
    """
    if not can_limit():
        yield False
        return

    with limit_lock:
        n_pages = int(MEMORY_MAP.read_text().split()[0])
        limit = n_pages * resource.getpagesize() + n_bytes
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        is_lower = all(other == resource.RLIM_INFINITY or limit < other for other in (soft, hard))
        if is_lower:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        try:
            yield is_lower
        finally:
            if is_lower:
                resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def can_limit() -> bool:
    """Return whether processes can be limited here, which is so on Linux alone."""
    return resource is not None and MEMORY_MAP.exists()


# ------------------------------------------------------------------------- in a process of its own


def read_bounded(function: Callable[[Path], Result], path: Path) -> Result:
    """Return ``function(path)``, called in ``bounded_memory``."""
    with bounded_memory(path):
        return function(path)


def read_after_trial(function: Callable[[Path], Result], path: Path) -> Result:
    """Return ``function(path)``, called in ``bounded_memory``, after another process has tried it.

    This is for libraries that a damaged file can crash, or keep busy for ever. Raises ``UserError``
    where the other process does not end by itself within ``seconds_for`` a file of this size. Only
    on Linux is there a trial.
    """
    seconds = seconds_for(file_size(path))
    if can_limit() and not ends_well(function, path, seconds):
        raise UserError(
            f'{path} is damaged: the library that reads it has crashed, or was still busy after '
            f'{seconds} s'
        )
    return read_bounded(function, path)


def seconds_for(n_bytes: int) -> int:
    """Return how many seconds of processor time it may take to read a file of so many bytes."""
    return LEAST_SECONDS + n_bytes // BYTES_PER_SECOND


def ends_well(function: Callable[[Path], Any], path: Path, seconds: int) -> bool:
    """Return whether a process that calls ``function(path)`` ends by itself, even by an error."""
    process = multiprocessing.get_context('fork').Process(
        target=try_to_read, args=(function, path, seconds)
    )
    with warnings.catch_warnings():
        # that other threads are not forked: they may hold locks, but none of those used here
        warnings.simplefilter('ignore', DeprecationWarning)
        process.start()
    try:
        process.join(PATIENCE * seconds)
    finally:
        process.kill()  # after Ctrl-C, or where it waits for what never comes
        process.join()
    return process.exitcode == 0


def try_to_read(function: Callable[[Path], Any], path: Path, seconds: int) -> None:
    """Call ``function(path)`` in a process that has no other task, and ignore its errors."""
    exit_with_parent()
    faulthandler.disable()  # a crash is reported in one line
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    most = math.ceil(time.process_time()) + seconds
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (most, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(Exception):
        read_bounded(function, path)


def exit_with_parent() -> None:
    """Make a worker process exit when its parent does, and leave Ctrl-C to the parent.

    Otherwise, the worker of a killed parent would wait for work forever, and hold the lock of the
    cache, which it has inherited.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, 'only worker processes call this'

    def wait_and_exit() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()
