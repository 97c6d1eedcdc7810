"""What the tests of files from strangers share: makers of such files, and calls that are guarded.

A guarded call runs in a process of its own, so that code which hangs, crashes or takes all memory
fails a test and does no more. This is so on Linux; elsewhere, the call runs in this process.
"""

import contextlib
import faulthandler
import gzip
import io
import multiprocessing
import os
import pickle
import signal
import struct
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import call_with_own_lock

import bnaf
import glow
from common import bounds
from common.errors import UserError

SCRIPTS = {'glow': glow, 'bnaf': bnaf}
MODES = '--generate', '--evaluate', '--visualize', '--check', '--train'
MAX_SECONDS = 20  # of a guarded call, on a machine that may be busy
STOP_MEMORY = 2**30  # bytes that a guarded call can take, or what its files justify if it is more
MAX_MESSAGE = 1_000  # characters
MAPPED_BEFORE = 2**25  # bytes: memory that a process has and does not use, which no limit counts
SPARE_OF_CHILDREN = 2**27  # bytes: the same of processes that it starts, which tell only their peak
CLEAR_REFS = Path('/proc/self/clear_refs')

needs_posix = pytest.mark.skipif(
    os.name != 'posix', reason='makes links, scripts or file names that only POSIX systems allow'
)


# --------------------------------------------------------------------------------- guarded calls


class Refusal(NamedTuple):
    """How a call was refused: its message, warnings, the seconds that it took, its peak memory."""

    message: str
    warnings: list[str]
    seconds: float
    n_bytes: int


def call_guarded(function: Callable, *args: Any, n_bytes: int = STOP_MEMORY) -> Any:
    """Return ``function(*args)``, called in a process that is limited in memory and time.

    The test fails where the process raises an error, crashes, or is busy for ``MAX_SECONDS``.
    """
    if not CLEAR_REFS.exists():
        return function(*args)
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=call_with_own_lock, args=(send_result, sender, n_bytes, function, *args)
    )
    process.start()
    sender.close()
    try:
        if not receiver.poll(MAX_SECONDS):
            pytest.fail(f'the call was still busy after {MAX_SECONDS} s')
        result, error = receiver.recv()
    except EOFError:
        process.join()
        pytest.fail(f'the process of the call has crashed: exit code {process.exitcode}')
    finally:
        end_group(process)
    if error:
        pytest.fail(error)
    return result


def send_result(sender: Connection, n_bytes: int, function: Callable, *args: Any) -> None:
    """Send the result of a call or, where it raises an error, None and the traceback.

    The call can take ``n_bytes`` of memory more than the process has.
    """
    os.setsid()  # a group of its own, with the processes that it starts
    faulthandler.disable()  # a crash is reported by the other process
    bounds.LEAST_SECONDS = 2  # of the processor: on a busy machine they may take several times that
    result, error = None, ''
    try:
        with bounds.limit_address_space(n_bytes):
            result = function(*args)
    except BaseException:  # those of pytest are no Exception
        error = traceback.format_exc()
    sender.send((result, error))


def end_group(process: Any) -> None:
    """Kill a process and all that it has started."""
    process.kill()
    with contextlib.suppress(ProcessLookupError):  # it has not made its group yet
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def ends_within(seconds: float, function: Callable, *args: Any) -> bool:
    """Return whether a call, in a process of its own, ends within some seconds."""
    context = multiprocessing.get_context('fork')
    process = context.Process(target=function, args=args)
    process.start()
    process.join(seconds)
    is_over = process.exitcode is not None
    process.kill()
    process.join()
    return is_over


def refusal(function: Callable, *args: Any) -> str:
    """Return the one line in which a call is refused, without warnings, soon, in little memory.

    It may take as much memory as the largest file among its arguments justifies. Memory is measured
    on Linux only.
    """
    paths = [arg for arg in args if isinstance(arg, (str, Path)) and os.path.isfile(arg)]
    allowed = max([bounds.LEAST_MEMORY, *map(bounds.memory_limit, paths)])
    most = max(STOP_MEMORY, allowed + bounds.LEAST_MEMORY)  # more, so that the reader's is lower
    message, warned, seconds, n_bytes = call_guarded(measure_refusal, function, *args, n_bytes=most)
    assert message.isprintable()
    assert len(message) < MAX_MESSAGE
    assert not warned
    assert n_bytes < allowed + MAPPED_BEFORE, f'{n_bytes / 2**20:,.0f} MiB of memory, {message}'
    assert seconds < MAX_SECONDS
    return message


def measure_refusal(function: Callable, *args: Any) -> Refusal:
    """Return how a call is refused. Fails the test where it is not.

    Memory is that of data, and new. Pages of files, such as the code of libraries, are not counted,
    as a process that was forked has few of them at first. Nor is memory that it had reserved.
    """
    reset_peak_memory()
    in_use, reserved = memory_of_process('RssAnon'), memory_of_process('VmSize')
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught, pytest.raises(UserError) as error:
        function(*args)
    seconds = time.perf_counter() - start
    in_use += memory_of_process('RssFile')
    own = min(memory_of_process('VmHWM') - in_use, memory_of_process('VmPeak') - reserved)
    n_bytes = max(own, peak_memory_of_children() - in_use - SPARE_OF_CHILDREN)
    warned = [str(warning.message) for warning in caught]
    return Refusal(str(error.value), warned, seconds, n_bytes)


def reset_peak_memory() -> None:
    """Let the peak VmHWM begin at what the process takes now."""
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text('5')


def memory_of_process(name: str) -> int:
    """Return a line of Linux's /proc/self/status in bytes, 0 on other systems."""
    if not CLEAR_REFS.exists():
        return 0
    lines = Path('/proc/self/status').read_text().splitlines()
    status = dict(line.split(':') for line in lines)
    return int(status[name].split()[0]) * 1024


def peak_memory_of_children() -> int:
    """Return the peak of the largest process that this one has started, 0 but on Linux."""
    if not CLEAR_REFS.exists():
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def refused(script: str, *words: str | Path) -> str:
    """Run a script, guarded, and return the one line in which it refuses to go on."""
    errors = call_guarded(errors_of_command, script, *map(str, words))
    assert errors.startswith(f'{script}.py: error: '), errors
    assert errors.endswith('\n'), errors
    assert errors[:-1].isprintable(), errors
    assert len(errors) < MAX_MESSAGE
    return errors


def errors_of_command(script: str, *words: str, exit_code: int | None = 2) -> str:
    """Run a script in this process, and return what it writes to standard error.

    Fails the test where it ends with another code. None stands for a command that is done.
    """
    errors, code = io.StringIO(), None
    with contextlib.redirect_stderr(errors):
        try:
            SCRIPTS[script].main(list(words))
        except SystemExit as stop:
            code = stop.code
    assert code == exit_code, f'exit code {code}: {errors.getvalue()[-MAX_MESSAGE:]}'
    return errors.getvalue()


# --------------------------------------------------------------------------------- what is refused


class Call:
    """Becomes a call of a function when it is pickled."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


# Names of columns and attributes that could do harm
NAMES = [
    '../../x',
    '/etc/x',
    '=cmd|calc',
    '+1',
    '$\\frac{',
    '\N{GRINNING FACE}',
    'n' * 10_000,
    "'); x",
    '%s{0}',
    'CON',
]
# Names as long as those of files may be, or nearly; the last one has three bytes a letter
LONG_NAMES = {
    '225 letters': 'n' * 225,
    '240 letters': 'n' * 240,
    '120 letters of two bytes': 'é' * 120,
    '75 letters of three bytes': '語' * 75,
}


def link_to_zeros(path: Path) -> None:
    """Make a link to the device whose bytes never end."""
    path.symlink_to('/dev/zero')


# What can stand in place of a file, and is none: reading it waits for ever, or never ends
SPECIAL_FILES: dict[str, Callable[[Path], None]] = {
    'pipe': lambda path: os.mkfifo(path),
    'link to zeros': link_to_zeros,
}


def replace_by_special(kind: str, path: Path) -> None:
    """Put a special file in the place of a file, if there is one."""
    path.unlink(missing_ok=True)
    SPECIAL_FILES[kind](path)


def repeated_list(n: int, depth: int, value: Any = 0) -> Any:
    """Return lists of n elements that are nested to a depth. They take little memory."""
    for _ in range(depth):
        value = [value] * n
    return value


def gzip_repeated(content: bytes, n: int) -> bytes:
    """Return gzipped bytes that unfold to n times the content."""
    return gzip.compress(content, 9) * n


# ------------------------------------------------------------------------------------ numpy's files


def npy_file(array: np.ndarray) -> bytes:
    """Return an array as an .npy file, objects pickled."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=True)
    return content.getvalue()


def npz_file(array: np.ndarray) -> bytes:
    """Return an array as an .npz file."""
    content = io.BytesIO()
    np.savez(content, array)
    return content.getvalue()


def npy_header(header: str) -> bytes:
    """Return an .npy file that has this header and no data."""
    size = struct.pack('<H', len(header))
    return b'\x93NUMPY\x01\x00' + size + header.encode()


def npy_header_of(dtype: Any, shape: tuple[int, ...]) -> bytes:
    """Return an .npy file that states a type and a shape and has no data."""
    return npy_header(f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}}}")


# Headers of types that have no bytes, or are no single numbers
ODD_NPY_TYPES: dict[str, bytes] = {
    'void of no bytes': npy_header_of('|V0', (60, 2)),
    'bytes of no length': npy_header_of('|S0', (60, 2)),
    'text of no length': npy_header_of('<U0', (60, 2)),
    'void of no bytes, a huge shape': npy_header_of('|V0', (2**40, 2**20)),
    'void of eight bytes': npy_header_of('|V8', (60, 2)) + bytes(960),
    'void of no bytes, as many as there are': npy_header_of('|V0', (-1,)),
    'bytes of no length, as many as there are': npy_header_of('|S0', (-1,)),
    'text of no length, as much as there is': npy_header_of('<U0', (-1,)),
    'a structure of nothing': npy_header_of([], (60, 2)),
    'a structure of no bytes': npy_header_of([('a', '|V0')], (60, 2)),
    'a structure of numbers': npy_header_of([('a', '<f4'), ('b', '<f4')], (60, 2)) + bytes(960),
    'a structure of an empty array': npy_header_of([('a', '<f8', (0,))], (60, 2)),
}


# A dict whose key is a pair of twice the same pair, and so on: to hash it takes 2^45 steps
ENDLESS_KEY = b'\x80\2})' + b'2\x86' * 45 + b'K\1s.'


def pickled_folder() -> bytes:
    """Return a pickle that makes the folder ``canary`` when it is loaded."""
    return pickle.dumps(Call(os.mkdir, 'canary'))
