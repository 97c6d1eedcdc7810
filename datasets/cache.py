"""Arrays kept on the disk and memory-mapped."""

import contextlib
import math
import shutil
from pathlib import Path

import numpy as np

from common.errors import UserError, one_line
from common.files import digest, file_lock, is_writable, write_atomically


def memmap_cache(data_dir, name, source, make, fits):
    """-> the array on disk, memory-mapped, that make(create) filled, create(shape, dtype) being what gives it the array;
    made anew when its source is another, or what lies there does not fit"""
    file = f'{name}_{digest(source)}.npy'
    folders = [data_dir / '.cache', Path('data') / '.cache']

    def load(folder):
        """-> the array, None where there is none, or a damaged or another one: it is made again"""
        with contextlib.suppress(ValueError):
            array = map_npy(folder / file)
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

    with file_lock(folder / f'.{name}.lock', f'another process prepares {name}'):
        if (array := load(folder)) is not None:  # made while this process waited
            return array
        for stale in (
            *folder.glob(f'{name}_*.npy'),
            *folder.glob(f'.{name}_*.npy.*'),
        ):  # of before, of the killed
            stale.unlink()
        write_atomically(folder / file, write)
        return map_npy(folder / file)


def map_npy(path):
    """-> the array in a .npy file, memory-mapped. Raises ValueError, also where np.load would read archives or pickles."""
    try:
        return np.lib.format.open_memmap(path, mode='r')
    except Exception as error:  # a damaged header fails in too many ways to list
        raise ValueError(one_line(error)) from None
