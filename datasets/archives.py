"""Zip and tar files of any origin: their members, one after the other."""

import contextlib
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from common.errors import UserError, one_line

BLOCK_SIZE = 2**20  # bytes that are read from a file at a time
# What the standard library raises while it reads a damaged archive: each compression method has an
# error of its own, encrypted members are a RuntimeError, and bad offsets become an OSError. Names
# that are no UTF-8 are a ValueError, as are negative sizes; large ones are an OverflowError, and
# what ends too early may be a struct.error or a LookupError.
ARCHIVE_ERRORS = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    OverflowError,
    LookupError,
)


class Member(NamedTuple):
    """A member of an archive."""

    name: str
    is_regular: bool  # neither a link nor a device
    open: Callable[[], IO[bytes] | None]


def iterate_members(archive: Path) -> Generator[Member, None, None]:
    """Yield the members of a zip or tar file. Any other file is its own only member."""
    with report_damaged_archive(archive):
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                for info in zipped.infolist():
                    file_type = stat.S_IFMT(info.external_attr >> 16)
                    is_regular = file_type in (0, stat.S_IFREG)  # 0 where the mode is not recorded
                    yield Member(info.filename, is_regular, partial(zipped.open, info))
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                for entry in forward_entries(tar):
                    yield Member(entry.name, entry.isreg(), partial(tar.extractfile, entry))
        else:
            yield Member(archive.name, True, lambda: open(archive, 'rb'))


def forward_entries(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the entries of a tar file, unless one lies before the last, as after a negative size.

    The standard library may read such entries again without end.
    """
    offset = -1
    for entry in tar:
        if entry.offset <= offset:
            raise tarfile.ReadError('its members are not in order')
        offset = entry.offset
        yield entry


def read_blocks(archive: Path, member: Member) -> Iterator[bytes]:
    """Yield the content of a regular member of an archive in blocks."""
    with report_damaged_archive(archive):
        source = member.open()
        assert source is not None  # as it is for links and devices in a tar file
        with source:
            while block := source.read(BLOCK_SIZE):
                yield block


@contextlib.contextmanager
def report_damaged_archive(archive: Path) -> Iterator[None]:
    """Raise ``UserError`` where an archive cannot be read."""
    try:
        yield
    except ARCHIVE_ERRORS as error:
        raise UserError(
            f'{archive} cannot be unpacked: {one_line(error)}; download it again'
        ) from error
