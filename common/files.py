"""Files written atomically, locks, and what identifies a file."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import sys

import numpy as np
from filelock import FileLock, Timeout

from .errors import UserError


def first_existing(data_dir, name, candidates):
    """-> the first candidate there is in data_dir or in its sub-folder of the data set's name, else None"""
    paths = [
        folder / candidate for folder in (data_dir, data_dir / name) for candidate in candidates
    ]
    return next((path for path in paths if path.exists()), None)


def file_signature(path):
    """Name, size and time of a file: what a cache made of it is known by"""
    status = path.stat()
    return [f'{path.parent.name}/{path.name}', status.st_size, status.st_mtime_ns]


def digest(source, arrays=()):
    """-> hexadecimal digest of plain values and of arrays"""
    content = hashlib.sha256(json.dumps(source).encode())
    for array in arrays:
        content.update(np.ascontiguousarray(array))
    return content.hexdigest()[:16]


@contextlib.contextmanager
def file_lock(path, other, wait=True):
    """Holds a lock file, which the system frees when its holder dies. Where another holds it, says what that one does and
    waits, or raises UserError."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise UserError(f'{other}: wait until it is done, or stop it') from None
        print(f'{other}: waiting until it is done', file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def report_full_disk(what, besides=''):
    """UserError where there is no room for what is written"""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f'{what} cannot be written{besides}: {error.strerror}') from None


def write_atomically(path, write):
    """write(file name) to a temporary file that takes its final name only when it is whole and on the disk"""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        with report_full_disk(path, ' and is as it was before'):
            write(temporary)
            fsync_path(temporary)
            os.replace(temporary, path)
            fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    write_atomically(
        path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + '\n')
    )


def fsync_path(path):
    """Waits until a file, or the names in a folder, are on the disk"""
    if path.is_dir() and os.name != 'posix':
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_new_folder(path):
    """Makes a folder of that name or, where there is one, of the first free name-2, name-3 ..."""
    for n in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            folder = path if n == 1 else path.with_name(f'{path.name}-{n}')
            folder.mkdir(parents=True)
            return folder


def is_writable(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
