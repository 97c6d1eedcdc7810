"""Arrays that are prepared once, kept on disk, and memory-mapped from then on."""

import contextlib
import errno
import math
import os
import shutil
import tokenize
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.bounds import open_regular
from common.errors import UserError, one_line
from common.files import digest, file_lock, make_writable, write_atomically

NO_RESERVATION = errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS

Shape = tuple[int, ...]
CreateArray = Callable[[Shape, npt.DTypeLike], np.memmap]
IsValid = Callable[[np.ndarray], bool]

may_write_beside_data = ContextVar('may_write_beside_data', default=True)

# NumPy parses the header of a .npy file as Python source. A damaged header can therefore fail in
# the tokenizer, in the parser, or where its values are turned into a data type and a shape.
DAMAGED_ARRAY_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    SyntaxError,
    tokenize.TokenError,
    RecursionError,
    MemoryError,
)


@contextlib.contextmanager
def cache_beside_data(is_named_by_user: bool) -> Iterator[None]:
    """Inside, caches are written to the folder of the data only if the user has named it.

    Otherwise, a checkpoint of anyone has. Caches that are there are read.
    """
    token = may_write_beside_data.set(is_named_by_user)
    try:
        yield
    finally:
        may_write_beside_data.reset(token)


def memmap_cache(
    data_dir: Path,
    name: str,
    source: Any,
    make: Callable[[CreateArray], object],
    fits: IsValid,
) -> np.ndarray:
    """Return an array that is memory-mapped from a cache file; prepare the file if necessary.

    The file is in ``.cache`` of ``data_dir`` or, where that cannot or must not be written to, of
    ``data``.

    Arguments:
        data_dir: The folder of the data set.
        name: The first part of the file's name.
        source: JSON-serialisable description of what the array is made from. Its digest is part of
            the file's name, so a change of the source makes the cache stale.
        make: Fills the array. It is called with a function that creates the array on disk from a
            shape and a dtype.
        fits: Whether an array has the expected shape and dtype; any other is made again.

    Raises ``UserError`` where there is no folder to write to or not enough space.
    """
    file_name = f'{name}_{digest(source)}.npy'
    folders = [data_dir / '.cache', Path('data') / '.cache']
    for candidate in folders:
        array = load_valid(candidate / file_name, fits)
        if array is not None:
            return array

    if not may_write_beside_data.get():
        folders = folders[1:]
    folder = next((folder for folder in folders if make_writable(folder)), None)
    if folder is None:
        raise UserError(f'{" or ".join(map(str, folders))} cannot be written to')
    path = folder / file_name

    def write(temporary: Path) -> None:
        make(lambda shape, dtype: create_array(temporary, shape, dtype, name))

    with file_lock(folder / f'.{name}.lock', f'another process prepares {name}'):
        # Another process may have prepared it while this one waited for the lock.
        array = load_valid(path, fits)
        if array is not None:
            return array

        remove_other_versions(folder, name)
        write_atomically(path, write)
        return map_npy(path)


def load_valid(path: Path, fits: IsValid) -> np.ndarray | None:
    """Memory-map an array; return None if it is missing, damaged, or does not fit."""
    try:
        array = map_npy(path)
    except ValueError:
        return None
    return array if fits(array) else None


def create_array(path: Path, shape: Shape, dtype: npt.DTypeLike, name: str) -> np.memmap:
    """Create a .npy file and return its array, memory-mapped for writing.

    Raises ``UserError`` or, where other processes take the space meanwhile, ``OSError`` where the
    disk has too little. Without reserving the space, writing to the memory-mapped array could end
    the process by a signal (SIGBUS) instead of an error.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise UserError(
            f'the cache of {name} takes {size / 1e9:.1f} GB, '
            f'{path.parent} has {free / 1e9:.1f} left'
        )
    array = np.lib.format.open_memmap(path, 'w+', dtype, shape)
    reserve_space(path)
    return array


def reserve_space(path: Path) -> None:
    """Reserve space on the disk for all of a file, where the file system supports it."""
    if not hasattr(os, 'posix_fallocate'):
        return
    with open(path, 'r+b') as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno not in NO_RESERVATION:
                raise


def remove_other_versions(folder: Path, name: str) -> None:
    """Remove the caches of earlier sources and the temporary files of killed processes."""
    for pattern in (f'{name}_*.npy', f'.{name}_*.npy.*'):
        for path in folder.glob(pattern):
            path.unlink()


def map_npy(path: Path) -> np.memmap:
    """Memory-map the array of numbers in a .npy file for reading.

    Raises ``ValueError`` if it cannot be read. Unlike with ``np.load``, this includes archives and
    arrays of anything but numbers.
    """
    try:
        dtype = read_npy_dtype(path)
        if dtype.kind not in 'biufc':
            raise ValueError(f'it holds {dtype}, not numbers')
        return np.lib.format.open_memmap(path, mode='r')
    except (UserError, *DAMAGED_ARRAY_ERRORS) as error:
        raise ValueError(one_line(error)) from error


def read_npy_dtype(path: Path) -> np.dtype:
    """Return the data type that the header of a .npy file states.

    A type that takes no bytes, such as ``V0``, would end the process in ``np.memmap``.
    """
    with open_regular(path) as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            _, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:  # the later version 3 has other names of fields, which arrays of numbers lack
            _, _, dtype = np.lib.format.read_array_header_2_0(file)
    return dtype
