"""Files: written atomically, locked, and recognised by their size and time or by their content."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from .errors import UserError

try:
    import fcntl
except ImportError:  # Windows has locks of its own
    fcntl = None  # type: ignore[assignment]

FULL_DISK = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
NO_LOCKS = errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK
LOCK_SECONDS = 0.2  # the first attempt may only remove the lock of a process that is gone


def first_existing(data_dir: Path, name: str, candidates: Iterable[str]) -> Path | None:
    """Return the first candidate in ``data_dir``, else in its sub-folder ``name``, else None."""
    candidates = list(candidates)
    for folder in (data_dir, data_dir / name):
        for candidate in candidates:
            if (folder / candidate).exists():
                return folder / candidate
    return None


def file_signature(path: Path) -> list[str | int]:
    """Return name, size and time of a file. A cache of the file is stale when they differ."""
    status = path.stat()
    return [f'{path.parent.name}/{path.name}', status.st_size, status.st_mtime_ns]


def path_hash(path: PurePath) -> int:
    """Return a number below 2^62 that identifies a relative path, the same on all platforms."""
    name = unicodedata.normalize('NFC', path.as_posix())  # some file systems take accents apart
    content = name.encode('utf-8', 'surrogatepass')  # a file's name need not be valid text
    first_bytes = hashlib.sha256(content).digest()[:8]
    return int.from_bytes(first_bytes, 'big') >> 2


def name_part(text: str, n_bytes: int = 150) -> str:
    """Return a text as a part of a file's name, which has at most 255 bytes.

    A text of more than ``n_bytes`` is cut and ends in its digest, so that others differ from it.
    """
    content = os.fsencode(text)
    if len(content) <= n_bytes:
        return text
    end = f'_{digest([text])}'
    return content[: n_bytes - len(end)].decode(errors='ignore') + end


def digest(values: Any, arrays: Iterable[Any] = ()) -> str:
    """Return 16 hexadecimal digits that identify plain values (as JSON) and arrays."""
    content = hashlib.sha256(json.dumps(values).encode())
    for array in arrays:
        content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()[:16]


@contextlib.contextmanager
def file_lock(path: Path, holder: str, wait: bool = True) -> Iterator[None]:
    """Hold a lock file. It is free again when its holder dies.

    ``holder`` describes the process that may have the lock, such as ``'another process trains in
    ...'``. It is printed while this process waits or, with ``wait=False``, raised as ``UserError``.
    """
    lock: BaseFileLock = FileLock(path)
    if not supports_flock(path.parent):
        # a file that exists while the lock is held, and names the process and its machine
        path = path.with_name(f'{path.name}.held')
        lock = SoftFileLock(path)

    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        if isinstance(lock, SoftFileLock):
            holder += f' ({path} names it: if it is gone, remove that file)'
        if not wait:
            raise UserError(f'{holder}: wait until it is done, or stop it') from error
        print(f'{holder}: waiting until it is done', file=sys.stderr)
        lock.acquire()

    try:
        yield
    finally:
        lock.release()


def supports_flock(folder: Path) -> bool:
    """Return whether the system can lock files in a folder, as some network file systems cannot."""
    if fcntl is None:
        return True
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return False
            raise
    return True


@contextlib.contextmanager
def report_full_disk(what: object, consequence: str = '') -> Iterator[None]:
    """Raise ``UserError`` where there is no room to write ``what``."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise UserError(f'{what} cannot be written{consequence}: {error.strerror}') from error


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write(temporary)``, and rename that file to ``path`` once it is on the disk.

    A process that is killed leaves the file as it was before, or whole.
    """
    temporary = path.with_name(f'.{name_part(path.name, 200)}.{os.getpid()}')
    try:
        with report_full_disk(path, ' and is as it was before'):
            write(temporary)
            fsync_path(temporary)
            os.replace(temporary, path)
            fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write plain values as a JSON file, atomically."""
    text = json.dumps(content, indent=2) + '\n'
    write_atomically(path, lambda temporary: temporary.write_text(text))


def fsync_path(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if path.is_dir() and os.name != 'posix':
        return

    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_new_folder(path: Path) -> Path:
    """Make the folder ``path`` or, if it exists, the first free of ``path-2``, ``path-3``, ...

    Raises ``UserError`` where something else than a folder is in the place of a parent.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f'{path.parent} cannot be made: it or a folder above it is a file, or a link to a '
            'folder that does not exist'
        ) from error

    for n in itertools.count(1):
        folder = path if n == 1 else path.with_name(f'{path.name}-{n}')
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError('counting never ends')


def make_writable(folder: Path) -> bool:
    """Make a folder if necessary, and return whether files can be created in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
