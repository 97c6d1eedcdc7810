"""The readers that ``fuzz.py`` feeds: valid files of each, how they are read and damaged.

A reader raises ``UserError`` for all that it refuses. Functions whose docstring promises another
error to the caller are wrapped by ``documented``.
"""

import bz2
import contextlib
import csv
import functools
import gzip
import io
import lzma
import os
import pickle
import pickletools
import shutil
import socket
import socketserver
import struct
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mutations import (
    H5_END_ADDRESS,
    H5_SUPERBLOCK,
    Mutator,
    keep_first,
    make_zip,
    mutate_answer,
    mutate_bz2,
    mutate_checkpoint,
    mutate_gzip,
    mutate_h5,
    mutate_idx,
    mutate_jpeg,
    mutate_npy,
    mutate_pickle,
    mutate_png,
    mutate_tar,
    mutate_text,
    mutate_webp,
    mutate_xz,
    mutate_zip,
)
from tiny_data import attribute_rows, idx, noise_image, python2_batch
from tiny_tables import visitors, write_gas, write_old_gas, write_pandas_h5

import bnaf
import glow
from common.errors import UserError, one_line
from datasets import fetch, images, own_tables, photo_sets, photos, pickles, tabular
from datasets.drawn_faces import ATTRIBUTES

CHECKPOINTS = Path(__file__).resolve().parent / 'checkpoints'


class Seed(NamedTuple):
    """A valid file, and how it is damaged. Its name says how it is read."""

    name: str
    content: bytes
    mutate: Mutator


class Reader(NamedTuple):
    """What is fed to a reader, and how to tell whether a file got beyond its header."""

    make_seeds: Callable[[], list[Seed]]
    read: Callable[[Path], Any]
    passes_header: Callable[[Path], bool]


@contextlib.contextmanager
def documented(*errors: type[Exception]) -> Iterator[None]:
    """Turn the errors that a docstring promises into ``UserError``, as the callers do."""
    try:
        yield
    except errors as error:
        raise UserError(one_line(error)) from error


# ------------------------------------------------------------------------------------------- tables


def numbers(n: int = 6, d: int = 3) -> np.ndarray:
    """Return a table (n, d) of numbers that have few digits."""
    return np.random.default_rng(0).normal(size=(n, d)).round(2)


def make_h5(write: Callable[[h5py.File], Any], **options: Any) -> bytes:
    """Return an HDF5 file that a function writes."""
    content = io.BytesIO()
    with h5py.File(content, 'w', **options) as file:
        write(file)
    return content.getvalue()


def write_named_rows(file: h5py.File) -> None:
    rows = file.create_dataset('rows', data=numbers())
    rows.attrs['columns'] = ['a', 'b', 'c']
    file.create_group('notes')['text'] = 'of another kind'
    file['elsewhere'] = h5py.ExternalLink('other.h5', '/rows')
    file['alias'] = h5py.SoftLink('/notes')


def write_packed_rows(file: h5py.File) -> None:
    options = dict(chunks=(20, 2), compression='gzip', shuffle=True, fletcher32=True)
    file.create_dataset('rows', data=numbers(50, 4), **options)
    file['rows'].attrs['unit'] = np.float32(1)


def write_growing_rows(file: h5py.File) -> None:
    options = dict(maxshape=(None, 3), fillvalue=7, scaleoffset=4)
    rows = file.create_dataset('rows', (4, 3), '>i2', **options)
    rows[:2] = 1


def write_compact_rows(file: h5py.File) -> None:
    kind = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    kind.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple((6, 3))
    data = h5py.h5d.create(file.id, b'rows', h5py.h5t.IEEE_F32LE, space, kind)
    data.write(h5py.h5s.ALL, h5py.h5s.ALL, numbers().astype(np.float32))


def make_pandas_h5(*blocks: tuple[list[str], np.ndarray], key: str = 'df') -> bytes:
    """Return an HDF5 file as pandas writes it in its format 'fixed'."""
    content = io.BytesIO()
    write_pandas_h5(content, blocks, key=key)
    return content.getvalue()


def make_dated_h5() -> bytes:
    """Return a file of pandas with a date beside numbers."""
    days = np.arange(6).reshape(6, 1)
    content = io.BytesIO(make_pandas_h5((['when'], days), (['x'], numbers(6, 1))))
    with h5py.File(content, 'a') as file:
        file['df/block0_values'].attrs['value_type'] = np.bytes_('datetime64[s]')
    return content.getvalue()


def make_h5_seeds() -> list[Seed]:
    text = np.full((6, 1), 'text', object)
    flags = np.ones((6, 2), np.int8)
    contents = [make_h5(write) for write in (write_named_rows, write_packed_rows)]
    contents += [make_h5(write) for write in (write_growing_rows, write_compact_rows)]
    contents += [
        make_pandas_h5((['a', 'b', 'c'], numbers())),
        make_pandas_h5((['0', '1'], numbers(6, 2)), (['2', '3'], flags), key='a/b'),
        make_pandas_h5((['x'], numbers(6, 1)), (['city'], text)),
        make_dated_h5(),
    ]
    return [Seed('table.h5', content, mutate_h5) for content in contents]


def passes_h5_header(path: Path) -> bool:
    """Return whether the superblock is whole and leads to the header of an object, within the file.

    HDF5 itself is not asked, as it may crash.
    """
    content = path.read_bytes()
    if len(content) < H5_SUPERBLOCK or content[:9] != b'\x89HDF\r\n\x1a\n\0':
        return False
    (end,) = struct.unpack_from('<Q', content, H5_END_ADDRESS)
    (root,) = struct.unpack_from('<Q', content, 64)
    return end <= len(content) and root < len(content) and content[root] == 1


def make_npy_seeds() -> list[Seed]:
    arrays = [numbers(), numbers().astype('>f4'), np.asfortranarray(numbers())]
    arrays += [np.ones((3, 2), np.uint8)]
    contents = []
    for array in arrays:
        content = io.BytesIO()
        np.save(content, array)
        contents.append(content.getvalue())
    return [Seed('table.npy', content, mutate_npy) for content in contents]


def passes_npy_header(path: Path) -> bool:
    """Return whether numpy reads the header of a .npy file."""
    with open(path, 'rb') as file, contextlib.suppress(Exception):
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read_header = np.lib.format.read_array_header_2_0
        read_header(file)
        return True
    return False


def make_csv_seeds() -> list[Seed]:
    table = visitors(12).to_csv(index=False)
    quoted = 'a,"b; c","d ""e"""\n' + '1,2,"x"\n-3.5,,"y\nz"\n1e5,nan,inf\n' * 3
    texts = [table, quoted, '\ufeff0,1,2\r\n' + '0.5, 1 ,2\r\n' * 4, '1,2\n3,4\n\n5,6']
    seeds = []
    for text in texts:
        content = text.encode()
        tabs = text.replace(',', '\t').encode()
        packed = gzip.compress(content, 1, mtime=0)
        seeds.append(Seed('table.csv', content, mutate_text))
        seeds.append(Seed('table.tsv', tabs, mutate_text))
        seeds.append(Seed('table.csv.gz', packed, PACKED_TEXT))
    return seeds


PACKED_TEXT = mutate_gzip(mutate_text)
PACKED_IDX = mutate_gzip(mutate_idx)


def passes_csv_header(path: Path) -> bool:
    """Return whether the first row is in UTF-8 and can be split into cells."""
    open_file: Callable[..., Any] = gzip.open if path.suffix == '.gz' else open
    options = dict(encoding='utf-8', newline='')
    with contextlib.suppress(Exception), open_file(path, 'rt', **options) as file:
        return any(next(csv.reader(file)))
    return False


# ------------------------------------------------------------------------------------------ pickles


def make_pickle_seeds() -> list[Seed]:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), np.uint8)
    batch = {'data': pixels, 'labels': [3, 7]}
    contents = [python2_batch(pixels, np.array([3, 7]))]
    contents += [pickle.dumps(batch, protocol) for protocol in (2, 4)]
    seeds = [Seed('data_batch_1', content, mutate_pickle) for content in contents]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for write in (write_gas, partial(write_gas, protocol=4), write_old_gas):
            write(folder, n=5)
            content = (folder / 'gas' / 'ethylene_CO.pickle').read_bytes()
            seeds.append(Seed('ethylene_CO.pickle', content, mutate_pickle))
    return seeds


def read_any_pickle(path: Path) -> None:
    if path.suffix != '.pickle':
        images.read_cifar_batch(path)
        return
    with documented(ValueError):
        pickles.read_pickled_table(path)


def passes_pickle_header(path: Path) -> bool:
    """Return whether the protocol and the next 20 operations, or all, can be told apart."""
    return has_operations(path.read_bytes())


def has_operations(content: bytes, n: int = 20) -> bool:
    """Return whether a pickle begins with its protocol and n operations, or ends before."""
    k = 0
    with contextlib.suppress(Exception):
        for k, (opcode, _, _) in enumerate(pickletools.genops(content)):
            if k == 0 and opcode.name != 'PROTO':
                return False
            if k == n:
                break
        return True
    return k >= n


# ------------------------------------------------------------------------------------------- images


def make_idx_seeds() -> list[Seed]:
    rng = np.random.default_rng(0)
    pictures, labels = idx(rng.integers(0, 256, (3, 28, 28))), idx(rng.integers(0, 10, 20))
    seeds = []
    for name, content in (('images-idx3-ubyte', pictures), ('labels-idx1-ubyte', labels)):
        seeds.append(Seed(name, content, mutate_idx))
        seeds.append(Seed(f'{name}.gz', gzip.compress(content, 1, mtime=0), PACKED_IDX))
    return seeds


def read_any_idx(path: Path) -> None:
    images.read_idx(path, n_idx_dims(path))


def n_idx_dims(path: Path) -> int:
    """Return how many dimensions a file of MNIST has by its name."""
    return 3 if path.name.startswith('images') else 1


def passes_idx_header(path: Path) -> bool:
    """Return whether the file has a whole header whose magic number is right."""
    open_file: Callable[..., Any] = gzip.open if path.suffix == '.gz' else open
    n_dims = n_idx_dims(path)
    with contextlib.suppress(Exception), open_file(path, 'rb') as file:
        header = file.read(4 + 4 * n_dims)
        return len(header) == 4 + 4 * n_dims and header[:4] == bytes([0, 0, 8, n_dims])
    return False


ROTATED = b'Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6' + bytes(6)
FRAME = {'save_all': True, 'duration': 40}
# Formats of Pillow, modes and options, how they are damaged, and the data set that they are read as
PICTURES: list[tuple[str, str, dict[str, Any], Mutator, str]] = [
    ('JPEG', 'RGB', {'quality': 80}, mutate_jpeg, 'folder'),
    ('JPEG', 'CMYK', {'progressive': True}, mutate_jpeg, 'celeba'),
    ('JPEG', 'L', {'exif': ROTATED}, mutate_jpeg, 'mnist'),
    ('PNG', 'RGB', {}, mutate_png, 'folder'),
    ('PNG', 'RGBA', {}, mutate_png, 'folder'),
    ('PNG', 'P', {'transparency': 3}, mutate_png, 'digits'),
    ('PNG', 'I;16', {}, mutate_png, 'mnist'),
    ('PNG', '1', {}, mutate_png, 'mnist'),
    ('WEBP', 'RGB', {'quality': 50}, mutate_webp, 'folder'),
    ('WEBP', 'RGBA', {'lossless': True}, mutate_webp, 'celeba'),
    ('WEBP', 'RGB', FRAME, mutate_webp, 'folder'),
    ('GIF', 'P', {}, keep_first(13), 'folder'),
    ('GIF', 'P', {**FRAME, 'transparency': 0}, keep_first(13), 'folder'),
    ('BMP', 'RGB', {}, keep_first(2), 'folder'),
    ('BMP', 'P', {}, keep_first(2), 'mnist'),
    ('PPM', 'RGB', {}, keep_first(2), 'folder'),
    ('PPM', 'L', {}, keep_first(2), 'mnist'),
    ('TIFF', 'RGB', {}, keep_first(8), 'folder'),
    ('TIFF', 'RGB', {'compression': 'tiff_lzw'}, keep_first(8), 'folder'),
    ('TIFF', 'RGB', {'compression': 'tiff_adobe_deflate'}, keep_first(8), 'folder'),
    ('TIFF', 'RGB', {'compression': 'jpeg'}, keep_first(8), 'folder'),
    ('TIFF', 'CMYK', {'compression': 'packbits'}, keep_first(8), 'folder'),
    ('TIFF', '1', {'compression': 'group4'}, keep_first(8), 'mnist'),
    ('TIFF', 'I;16', {'compression': 'raw'}, keep_first(8), 'mnist'),
    ('TIFF', 'F', {}, keep_first(8), 'folder'),
]


def make_picture(kind: str, mode: str, options: dict[str, Any]) -> bytes:
    """Return a small image in a format of Pillow."""
    picture = noise_image(5, 4).resize((36, 30))
    picture = picture.convert('I').convert(mode) if mode.startswith('I') else picture.convert(mode)
    if 'save_all' in options:
        options = {**options, 'append_images': [picture.rotate(90)]}
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def make_image_seeds() -> list[Seed]:
    seeds = []
    for kind, mode, options, mutate, name in PICTURES:
        suffix = kind.lower()
        seeds.append(Seed(f'{name}.{suffix}', make_picture(kind, mode, options), mutate))
    return seeds


def read_photo(path: Path) -> None:
    photos.load_photo(path, path.stem, 8)


def passes_image_header(path: Path) -> bool:
    """Return whether Pillow tells the format and the size of an image."""
    with contextlib.suppress(Exception), Image.open(path, formats=photos.FORMATS) as image:
        return image.width > 0
    return False


def make_attribute_seeds() -> list[Seed]:
    rows = attribute_rows()
    own = '\n'.join(','.join(map(str, row)) for row in rows)
    plain = '\n'.join(f'{row[0]},{row[2]}' for row in [('image', 0, 'Odd'), *rows[1:]])

    names = [f'{k:06}.jpg' for k in range(1, 7)]
    cells = ' 1 -1' * (len(ATTRIBUTES) // 2)
    lines = ['6', ' '.join(ATTRIBUTES), *(f'{name}{cells}' for name in names)]
    kaggle = ['image_id,Bald,Male', *(f'{name},1,-1' for name in names)]
    partition = [f'{name} {k % 3}' for k, name in enumerate(names)]
    kaggle_partition = ['image_id,partition', *(f'{name},{k % 3}' for k, name in enumerate(names))]
    texts = [
        ('attributes.csv', own),
        ('attributes.csv', plain),
        ('list_attr_celeba.txt', '\n'.join(lines)),
        ('list_attr_celeba.csv', '\n'.join(kaggle)),
        ('list_eval_partition.txt', '\n'.join(partition)),
        ('list_eval_partition.csv', '\n'.join(kaggle_partition)),
    ]
    return [Seed(name, text.encode(), mutate_text) for name, text in texts]


def read_attributes(path: Path) -> None:
    if path.stem == 'attributes':
        photo_sets.read_attribute_table(path, [row[0] for row in attribute_rows()[1:]])
    elif path.stem == 'list_eval_partition':
        photo_sets.read_celeba_partition(path)
    else:
        names, cells = photo_sets.read_celeba_attributes(path)
        photo_sets.parse_attributes(path, names, list(cells.values()), list(cells))


# -------------------------------------------------------------------------------------- checkpoints


def make_checkpoint_seeds() -> list[Seed]:
    paths = sorted(CHECKPOINTS.glob('*.pt'))
    for path in (paths[0], paths[-1]):  # of each script; torch takes its time for the first model
        read_checkpoint(path)
    return [Seed(path.name, path.read_bytes(), mutate_checkpoint) for path in paths]


def read_checkpoint(path: Path) -> None:
    """Load a checkpoint, and make its model if it loads."""
    script = glow if path.name.startswith('glow') else bnaf
    script.restore_model(script.load_checkpoint(path), torch.device('cpu'))


def passes_checkpoint_header(path: Path) -> bool:
    """Return whether the zip file opens and its pickle begins as ``passes_pickle_header`` says."""
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith('data.pkl'))
        return has_operations(archive.read(name))
    return False


# ----------------------------------------------------------------------------------------- archives


def archive_members() -> list[tuple[str, bytes]]:
    """Return members that the published data sets have, and one that they have not."""
    return [
        ('cifar-10-batches-py/data_batch_1', b'batch' * 30),
        ('cifar-10-batches-py/test_batch', bytes(2000)),
        ('img_align_celeba/000001.jpg', b'photo'),
        ('./BSDS300/BSDS300.hdf5', b'rows'),
        ('readme.html', b'text'),
    ]


def picture_members() -> list[tuple[str, bytes]]:
    """Return members like those of the Berkeley images."""
    kinds = [('JPEG', 'L', {}), ('PNG', 'RGB', {}), ('JPEG', 'RGB', {'progressive': True})]
    contents = [make_picture(*kind) for kind in kinds]
    return [(f'BSDS300/images/train/{k}.jpg', content) for k, content in enumerate(contents)]


def make_tar(members: list[tuple[str, bytes]], form: int) -> bytes:
    """Return a tar file with a folder, a link and these members."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode='w', format=form) as archive:
        for name, kind in (('folder', tarfile.DIRTYPE), ('link', tarfile.SYMTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, 'folder'
            archive.addfile(entry)
        for name, part in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(part)
            archive.addfile(entry, io.BytesIO(part))
        entry = tarfile.TarInfo('long/' * 40 + 'é')  # takes another header in each form
        archive.addfile(entry)
    return content.getvalue()


PACKERS: dict[str, tuple[Callable[[bytes], bytes], Mutator]] = {
    '.tar': (lambda part: part, mutate_tar),
    '.tar.gz': (partial(gzip.compress, compresslevel=1, mtime=0), mutate_gzip(mutate_tar)),
    '.tar.bz2': (bz2.compress, mutate_bz2(mutate_tar)),
    '.tar.xz': (partial(lzma.compress, preset=0), mutate_xz(mutate_tar)),
}


def make_archive_seeds() -> list[Seed]:
    seeds = []
    for name, members in (('data', archive_members()), ('pictures', picture_members())):
        for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            seeds.append(Seed(f'{name}.zip', make_zip(members, compression), mutate_zip))
        for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            for suffix, (pack, mutate) in PACKERS.items():
                seeds.append(Seed(name + suffix, pack(make_tar(members, form)), mutate))
    return seeds


@functools.cache
def archive_targets() -> dict[str, str]:
    """Return what is unpacked of the archives of all published data sets."""
    targets: dict[str, str] = {}
    for source in fetch.SOURCES.values():
        for file in source.files:
            targets.update(file.targets)
    return targets


def read_archive(path: Path) -> None:
    if path.name.startswith('pictures'):
        with documented(*tabular.DAMAGED_FILE_ERRORS):
            tabular.read_grey_images(path, 'train')
        return
    folder = path.parent / 'unpacked'
    try:
        fetch.unpack(path, archive_targets(), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def passes_archive_header(path: Path) -> bool:
    """Return whether the archive opens and has a first member."""
    with contextlib.suppress(Exception):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as zipped:
                return bool(zipped.namelist())
        with tarfile.open(path) as tar:
            return tar.next() is not None
    return False


# --------------------------------------------------------------------------------------------- HTTP

BODY = b'content of a file ' * 20
REDIRECTED = b'HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nrest'


def make_answer(status: str, body: bytes = BODY, *fields: str) -> bytes:
    """Return what a server sends. Fields without a length end where the server hangs up."""
    head = '\r\n'.join([f'HTTP/1.1 {status}', *fields, '', ''])
    return head.encode() + body


def make_answer_seeds() -> list[Seed]:
    length = f'Content-Length: {len(BODY)}'
    chunked = b''.join(b'%x\r\n%b\r\n' % (n, BODY[:n]) for n in (20, 100, 0))
    packed = gzip.compress(BODY, mtime=0)
    text = 'Content-Type: text/html; charset=utf-8'
    new = [
        make_answer('200 OK', BODY, length, text, 'Date: Sat, 01 Jan 2022 00:00:00 GMT'),
        make_answer('200 OK'),
        make_answer('200 OK', chunked, 'Transfer-Encoding: chunked', 'Trailer: x'),
        make_answer('200 OK', packed, f'Content-Length: {len(packed)}', 'Content-Encoding: gzip'),
        make_answer('302 Found', b'', 'Location: /other', 'Content-Length: 0', 'Set-Cookie: a=b'),
        make_answer('404 Not Found', b'none', 'Content-Length: 4'),
        make_answer('503 Busy', b'', 'Retry-After: 1'),
    ]
    kept = [
        make_answer('206 Partial Content', BODY, length, 'Content-Range: bytes 4-363/364'),
        make_answer('416 Out of Range', b'', 'Content-Range: bytes */4', 'Content-Length: 0'),
    ]
    seeds = [Seed('new', content, mutate_answer) for content in new]
    return seeds + [Seed('kept', content, mutate_answer) for content in kept]


class AnswerServer(socketserver.ThreadingTCPServer):
    """Sends ``answer`` to who asks for /file, a good one for anything else, and hangs up."""

    daemon_threads = True
    answer = b''


class AnswerHandler(socketserver.StreamRequestHandler):
    """Reads one request of an ``AnswerServer``."""

    server: AnswerServer
    timeout = 5

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            first_line = self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            is_first = first_line.split()[1:2] == [b'/file']
            self.wfile.write(self.server.answer if is_first else REDIRECTED)


@functools.cache
def answer_server() -> AnswerServer:
    """Start the server of this process, the only place that it can still connect to."""
    server = AnswerServer(('127.0.0.1', 0), AnswerHandler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    resolve = socket.getaddrinfo

    def resolve_server(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if (host, port) != server.server_address:
            raise socket.gaierror(socket.EAI_NONAME, 'there is no network')
        return resolve(host, port, *args, **options)

    socket.getaddrinfo = resolve_server
    os.environ['NO_PROXY'] = '*'
    fetch.PAUSE, fetch.TIMEOUT = 0, (2, 2)
    return server


def read_answer(path: Path) -> None:
    server = answer_server()
    server.answer = path.read_bytes()
    target = path.with_name('downloaded')
    part = path.with_name('downloaded.part')
    if path.name == 'kept':
        part.write_bytes(b'kept')
    url = f'http://127.0.0.1:{server.server_address[1]}/file'
    try:
        fetch.download(fetch.PublishedFile('file', (url,), {}), target)
    finally:
        for left in (target, part):
            left.unlink(missing_ok=True)


def passes_http_header(path: Path) -> bool:
    """Return whether the status line is one of HTTP/1 with a number that can be a status."""
    words = path.read_bytes().split(b'\r\n')[0].split(b' ')
    return len(words) > 1 and words[0].startswith(b'HTTP/1.') and words[1].isdigit()


READERS = {
    'h5': Reader(make_h5_seeds, own_tables.read_frame, passes_h5_header),
    'npy': Reader(make_npy_seeds, own_tables.read_frame, passes_npy_header),
    'csv': Reader(make_csv_seeds, own_tables.read_frame, passes_csv_header),
    'pickles': Reader(make_pickle_seeds, read_any_pickle, passes_pickle_header),
    'idx': Reader(make_idx_seeds, read_any_idx, passes_idx_header),
    'images': Reader(make_image_seeds, read_photo, passes_image_header),
    'attributes': Reader(make_attribute_seeds, read_attributes, passes_csv_header),
    'checkpoints': Reader(make_checkpoint_seeds, read_checkpoint, passes_checkpoint_header),
    'http': Reader(make_answer_seeds, read_answer, passes_http_header),
    'archives': Reader(make_archive_seeds, read_archive, passes_archive_header),
}
