"""What all loaders need: one kind of error, files found and known by their stamp, arrays kept memory-mapped on disk."""

import contextlib
import difflib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm


class UserError(Exception):
    """One clear line for the user: what is wrong and what to do."""

    def __str__(self):  # what comes from a file or its name must not reach a terminal as it is
        return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())


def index_of(text, names, what):
    """'8' or 'Black_Hair' -> 8; raises UserError with the nearest names"""
    if re.fullmatch(r'-?\d+', text):
        if not 0 <= int(text) < len(names):
            raise UserError(f'{what} {text} is out of range: there are 0 to {len(names) - 1}')
        return int(text)
    if text not in names:
        near = difflib.get_close_matches(text, names, cutoff=0) or names
        raise UserError(f'unknown {what} {text!r}: the nearest are {", ".join(near)}')
    return names.index(text)


def find(data_dir, name, candidates):
    """-> the first candidate there is in data_dir or in its sub-folder of the data set's name, else None"""
    paths = [
        folder / candidate for folder in (data_dir, data_dir / name) for candidate in candidates
    ]
    return next((path for path in paths if path.exists()), None)


def stamp(path):
    """Name, size and time of a file: what a cache made of it is known by"""
    status = path.stat()
    return [f'{path.parent.name}/{path.name}', status.st_size, status.st_mtime_ns]


def digest(source, arrays=()):
    """-> hexadecimal digest of plain values and of arrays"""
    content = hashlib.sha256(json.dumps(source).encode())
    for array in arrays:
        content.update(np.ascontiguousarray(array))
    return content.hexdigest()[:16]


def cached(data_dir, name, source, make, fits):
    """-> the array on disk, memory-mapped, that make(create) filled, create(shape, dtype) being what gives it the array;
    made anew when its source is another, or what lies there does not fit"""
    file = f'{name}_{digest(source)}.npy'
    folders = [data_dir / '.cache', Path('data') / '.cache']

    def load(folder):
        """-> the array, None where there is none, or a damaged or another one: it is made again"""
        with contextlib.suppress(ValueError):
            array = map_array(folder / file)
            return array if fits(array) else None

    for folder in folders:
        if (array := load(folder)) is not None:
            return array
    folder = next((folder for folder in folders if is_writable(folder)), None)
    if folder is None:
        raise UserError(f'neither {folders[0]} nor {folders[1]} can be written to')

    def write(temporary):
        def create(shape, dtype):
            size, free = math.prod(shape) * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
            if (
                size > free
            ):  # writing to a mapped file for which there is no room is no error but the end (SIGBUS)
                raise UserError(
                    f'the cache of {name} takes {size / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} left'
                )
            return np.lib.format.open_memmap(temporary, 'w+', dtype, shape)

        make(create)

    with alone(folder / f'.{name}.lock', f'another process prepares {name}'):
        if (array := load(folder)) is not None:  # made while this process waited
            return array
        for stale in (
            *folder.glob(f'{name}_*.npy'),
            *folder.glob(f'.{name}_*.npy.*'),
        ):  # of before, of the killed
            stale.unlink()
        write_atomically(folder / file, write)
        return map_array(folder / file)


def map_array(path):
    """-> the array in a .npy file, memory-mapped. Raises ValueError, also where np.load would read archives or pickles."""
    try:
        return np.lib.format.open_memmap(path, mode='r')
    except Exception as error:  # a damaged header fails in too many ways to list
        raise ValueError(reason(error)) from None


def reason(error):
    """What an error says, in one line and not too long"""
    return ' '.join(str(error).split())[:200] or type(error).__name__


def short(name, n=40):
    """A name as there is room for in a picture or a line"""
    return name if len(name) <= n else f'{name[: n - 1]}…'


@contextlib.contextmanager
def alone(path, other, wait=True):
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
def writing(what, besides=''):
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
        with writing(path, ' and is as it was before'):
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    write_atomically(
        path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + '\n')
    )


def sync(path):
    """Waits until a file, or the names in a folder, are on the disk"""
    if path.is_dir() and os.name != 'posix':
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def progress(*args, **options):
    """tqdm, seldom updated where its output goes to a file"""
    return tqdm(
        *args, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 15, **options
    )


def new_folder(path):
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
