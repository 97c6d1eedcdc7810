"""Damage to files that keeps them recognisable, for ``fuzz.py``.

A mutator takes the content of a valid file, that of another one of the same format, and a random
generator. It returns damaged content whose checksums and lengths are mostly right, so that readers
get beyond the header.
"""

import bz2
import functools
import gzip
import io
import lzma
import pickletools
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import torch

Mutator = Callable[[bytes, bytes, Random], bytes]
Damage = Callable[[bytearray, int, Random], None]

MAX_DAMAGES = 4  # that are done to one file
MAX_SLICE = 64  # bytes that are duplicated, deleted or inserted at a time
RARE = 1 / 8  # how often what is usually kept or repaired is not

# Integers at which sizes, offsets and counts go wrong
NUMBERS = [0, 1, 2, 127, 128, 255, 256, 1000, 2**15 - 1, 2**15, 2**16 - 1, 2**16, 2**24]
NUMBERS += [2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
WORDS = ['', ' ', '0', '-1', '1e999', 'nan', 'inf', '1_0', '٣', '²', '"', "'", '\0', '\t', ',', ';']
WORDS += ['\r', '\n', '\r\n', '\x85', '\ufeff', 'é', '"a\n', '""', '\\', '%s', '{}', 'None', '1,2']
WORDS += ['0x10', '1' * 400, 'a' * 5000, 'True', '2024-01-01', '../x', '/', '\ud7ff', ',' * 300]
WORDS += [str(number) for number in NUMBERS] + [str(-number) for number in NUMBERS]


# -------------------------------------------------------------------------------- bytes of any kind


def position(content: bytes | bytearray, start: int, rng: Random) -> int:
    """Return the place of a byte from ``start`` on, most often of one that is not zero.

    Long runs of zeros mean little in most formats.
    """
    place = start
    for _ in range(rng.choice([1, 8])):
        place = rng.randrange(start, len(content))
        if content[place]:
            break
    return place


# The functions in DAMAGES change content in place, from ``start`` on.


def flip_bit(content: bytearray, start: int, rng: Random) -> None:
    content[position(content, start, rng)] ^= 1 << rng.randrange(8)


def set_byte(content: bytearray, start: int, rng: Random) -> None:
    content[position(content, start, rng)] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])


def set_integer(content: bytearray, start: int, rng: Random) -> None:
    place = position(content, start, rng)
    n_bytes = rng.choice([2, 4, 8])
    number = rng.choice(NUMBERS) % 256**n_bytes
    end = min(place + n_bytes, len(content))
    content[place:end] = number.to_bytes(n_bytes, rng.choice(['little', 'big']))[: end - place]


def change_integer(content: bytearray, start: int, rng: Random) -> None:
    place = position(content, start, rng)
    content[place] = (content[place] + rng.choice([-2, -1, 1, 2, 8, 16])) % 256


def duplicate_slice(content: bytearray, start: int, rng: Random) -> None:
    place = position(content, start, rng)
    part = content[place : place + rng.randint(1, MAX_SLICE)]
    content[place:place] = part * rng.choice([1, 1, 1, 50])


def delete_slice(content: bytearray, start: int, rng: Random) -> None:
    place = position(content, start, rng)
    del content[place : place + rng.randint(1, MAX_SLICE)]


def insert_bytes(content: bytearray, start: int, rng: Random) -> None:
    place = position(content, start, rng)
    content[place:place] = rng.randbytes(rng.randint(1, MAX_SLICE))


def overwrite_slice(content: bytearray, start: int, rng: Random) -> None:
    source, place = position(content, start, rng), position(content, start, rng)
    part = content[source : source + rng.randint(1, MAX_SLICE)]
    content[place : place + len(part)] = part


def truncate_end(content: bytearray, start: int, rng: Random) -> None:
    del content[position(content, start, rng) :]


FREQUENT: list[Damage] = [flip_bit, set_byte, set_integer, change_integer]
DAMAGES = 3 * FREQUENT + [duplicate_slice, delete_slice, insert_bytes, overwrite_slice]
DAMAGES += [truncate_end]


def mutate_bytes(content: bytes, other: bytes, rng: Random, start: int = 0) -> bytes:
    """Damage some bytes from ``start`` on, or go on as another file does."""
    changed = bytearray(content)
    if rng.random() < RARE and min(len(content), len(other)) > start:
        place = position(changed, start, rng)
        changed[place:] = other[min(place, len(other) - 1) :]
    for _ in range(rng.randint(1, MAX_DAMAGES)):
        if len(changed) > start:
            rng.choice(DAMAGES)(changed, start, rng)
    return bytes(changed)


def keep_first(n_bytes: int) -> Mutator:
    """Return a mutator that keeps the first bytes of a file, or rarely damages them too."""

    def mutate(content: bytes, other: bytes, rng: Random) -> bytes:
        start = 0 if rng.random() < RARE else n_bytes
        return mutate_bytes(content, other, rng, start)

    return mutate


# ---------------------------------------------------------------------------------- text and tables


def mutate_text(content: bytes, other: bytes, rng: Random) -> bytes:
    """Replace, double, move or drop words or lines of a text; rarely damage its bytes."""
    if rng.random() < RARE:
        return mutate_bytes(content, other, rng)
    lines = content.decode().splitlines(keepends=True)
    others = other.decode().splitlines(keepends=True)
    for _ in range(rng.randint(1, MAX_DAMAGES)):
        place = rng.randrange(len(lines)) if lines else 0
        if lines and rng.random() < 0.6:
            lines[place] = mutate_line(lines[place], rng)
            continue
        lines[place : place + 1] = rng.choice(
            [[], lines[place : place + 1] * 3, lines[:3], [rng.choice(others)], ['\n']]
        )
    return ''.join(lines).encode(errors='surrogatepass')


def mutate_line(line: str, rng: Random) -> str:
    """Replace a piece of a line, between two characters that may separate words, by a word."""
    marks = [k for k, character in enumerate(line) if character in ',\t ;:=\r\n']
    ends = sorted([-1, len(line), *marks])
    k = rng.randrange(len(ends) - 1)
    before, piece, after = line[: ends[k] + 1], line[ends[k] + 1 : ends[k + 1]], line[ends[k + 1] :]
    word = rng.choice(WORDS)
    return before + rng.choice([word, word + piece, piece + word, piece * 2]) + after


DTYPES = ["'<f8'", "'<f4'", "'>f8'", "'|O'", "'<i8'", "'<c16'", "'<U9'", "'|V3'", "'<M8[s]'"]
DTYPES += ["[('a', '<f8')]", "('<f8', (2,))", "'<f8,<i4'", '8', 'None', "'|S0'", "'<f2'"]
DTYPES += ["'|u1'", "'|b1'"]
DTYPES += ["'V2147483647'", "('<f8', (2147483647,))", "'<f16'", "[('a', '|O')]", "'<x9'", '()']
SHAPES = ['(3, 2)', '(0, 2)', '(2, 3)', '(6,)', '()', '(-1, 2)', '(3, 2.0)', '(True, 2)', '[3, 2]']
SHAPES += ['(0, 4611686018427387904)', '(4294967296, 4294967296)', '(9223372036854775807, 1)']
SHAPES += ['(18446744073709551616, 0)', f'({"1, " * 65})', '(1, 6)', '(3, -2)', '3', '(1, 0)']


def mutate_npy(content: bytes, other: bytes, rng: Random) -> bytes:
    """Damage a .npy file, or give its data another header whose length is right."""
    (n_header,) = struct.unpack('<H', content[8:10])
    header, data = content[10 : 10 + n_header], content[10 + n_header :]
    choice = rng.random()
    if choice < 0.2:
        return mutate_bytes(content, other, rng, start=8)
    if choice < 0.5:
        return content[: 10 + n_header] + mutate_bytes(data, other, rng)
    if choice < 0.6:
        header = mutate_text(header, header, rng)
    else:
        header = make_npy_header(rng)

    version = rng.choice([1, 1, 1, 2, 3])
    length = struct.pack('<H' if version == 1 else '<I', len(header) % 2**16)
    return content[:6] + bytes([version, 0]) + length + header + data


def make_npy_header(rng: Random) -> bytes:
    """Return a header of a .npy file in which a part is odd, or rarely several."""
    dtype, order, shape = DTYPES[0], 'False', SHAPES[0]
    choice = rng.random()
    if choice < 0.5 or choice > 0.9:
        dtype = rng.choice(DTYPES)
    if choice > 0.5:
        shape = rng.choice(SHAPES)
    if choice > 0.8:
        order = rng.choice(['True', 'True', '1', 'None'])
    if choice > 0.95:
        shape = '[' * 400 + shape
    return f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()


H5_SUPERBLOCK = 96  # bytes of it, up to the address of the root group
H5_END_ADDRESS = 40  # where it has the length of the file


def mutate_h5(content: bytes, other: bytes, rng: Random) -> bytes:
    """Damage an HDF5 file, and write its length into the superblock, as HDF5 compares them."""
    changed = bytearray(keep_first(H5_SUPERBLOCK)(content, other, rng))
    if rng.random() >= RARE and len(changed) > H5_SUPERBLOCK:
        struct.pack_into('<Q', changed, H5_END_ADDRESS, len(changed))
    return bytes(changed)


def mutate_idx(content: bytes, other: bytes, rng: Random) -> bytes:
    """Damage the data or the sizes of an idx file; rarely its magic number."""
    n_header = 4 + 4 * content[3]
    if rng.random() < 0.5:
        return mutate_bytes(content, other, rng, start=n_header)
    changed = bytearray(content)
    place = rng.randrange(4, n_header, 4)
    struct.pack_into('>I', changed, place, rng.choice(NUMBERS) % 2**32)
    return keep_first(4)(bytes(changed), other, rng) if rng.random() < 0.5 else bytes(changed)


# ------------------------------------------------------------------------------------------ pickles

# Operations that may be inserted: constants, containers, calls, attributes, and what is remembered
OPERATIONS = [b'N', b'\x88', b'K\1', b'M\1\1', b']', b'}', b')', b'(', b't', b'l', b'd', b'0', b'1']
OPERATIONS += [b'2', b'R', b'b', b'a', b'e', b's', b'u', b'\x81', b'\x85', b'\x86', b'\x87']
OPERATIONS += [b'J' + struct.pack('<I', number % 2**32) for number in NUMBERS]
OPERATIONS += [b'\x8a\x09' + number.to_bytes(9, 'little') for number in NUMBERS]
OPERATIONS += [b'j' + struct.pack('<I', number) for number in (0, 1, 2**31 - 1, 2**32 - 1)]
OPERATIONS += [b'r' + struct.pack('<I', number) for number in (0, 1, 10**8, 2**32 - 1)]
OPERATIONS += [b'G' + struct.pack('>d', value) for value in (0.0, -1.5, float('nan'), float('inf'))]
OPERATIONS += [b'X\1\0\0\0a', b'U\1\xff', b'cnumpy\nndarray\n', b'ccollections\nOrderedDict\n']
OPERATIONS += [b'ctorch\nuint16\n', b'h\0', b'q\0', b'p3\n', b'g0\n', b'I01\n', b'F1e999\n', b'Q']
OPERATIONS += [b'o', b'\x8f', b'.']


@functools.lru_cache(64)
def pickle_operations(content: bytes) -> list[bytes]:
    """Return the operations of a valid pickle with their arguments, one after the other."""
    starts = [place for _, _, place in pickletools.genops(content)]
    return [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)])]


def mutate_pickle(content: bytes, other: bytes, rng: Random) -> bytes:
    """Change, drop, double, move, insert or replace operations; rarely damage the bytes."""
    if rng.random() < RARE:
        return mutate_bytes(content, other, rng, start=2)
    parts, others = list(pickle_operations(content)), pickle_operations(other)
    for _ in range(rng.randint(1, MAX_DAMAGES)):
        place = rng.randrange(2, len(parts))
        part = parts[place]
        if len(part) > 1 and rng.random() < 0.4:
            parts[place] = mutate_bytes(part, part, rng, start=1)
            continue
        parts[place : place + 1] = rng.choice(
            [[], [part, part], [part, parts[place - 1]], [rng.choice(OPERATIONS), part]]
            + [[rng.choice(OPERATIONS)], [rng.choice(parts)], [rng.choice(others)]]
        )
    return b''.join(parts)


# -------------------------------------------------------------------------------------- checkpoints


def read_zip(content: bytes) -> dict[str, bytes]:
    """Return the members of a zip file by name."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def make_zip(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip file with the right checksums, which does not depend on the time."""
    content = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(content, 'w') as archive:
        warnings.simplefilter('ignore')  # about names that come twice
        for name, part in members:
            archive.writestr(zipfile.ZipInfo(name), part, compression)
    return content.getvalue()


def mutate_checkpoint(content: bytes, other: bytes, rng: Random) -> bytes:
    """Damage the values, the pickle or the tensors of a checkpoint, and make a new zip file."""
    choice = rng.random()
    if choice < 0.5:
        return mutate_saved_values(content, rng)
    if choice < 0.5 + RARE:
        return mutate_bytes(content, other, rng, start=4)

    members = read_zip(content)
    name = next(name for name in members if name.endswith('data.pkl'))
    if rng.random() < 0.4:
        name = rng.choice(list(members))
    others = [part for key, part in read_zip(other).items() if key.endswith(name.split('/')[-1])]
    mutate = mutate_pickle if name.endswith('data.pkl') else mutate_bytes
    members[name] = mutate(members[name] or b'\0', others[0] if others else b'\0', rng)
    return make_zip(list(members.items()))


def mutate_saved_values(content: bytes, rng: Random) -> bytes:
    """Replace, drop or rename entries of a checkpoint, and save it again."""
    saved = torch.load(io.BytesIO(content), weights_only=True)
    for _ in range(rng.randint(1, 2)):
        container, key = random_entry(saved, rng)
        value = container[key]
        if rng.random() < 0.7:
            container[key] = other_value(value, rng)
            continue
        del container[key]
        if isinstance(container, dict) and rng.random() < 0.3:
            container[rng.choice(['', f'{key}.', 0, '\x1b[2J'])] = value
        if not saved:
            break
    file = io.BytesIO()
    torch.save(saved, file)
    return file.getvalue()


def random_entry(container: Any, rng: Random) -> tuple[Any, Any]:
    """Return a dict or a list inside a value that is one, and the key of one of its entries."""
    while True:
        keys = list(container) if isinstance(container, dict) else range(len(container))
        key = rng.choice(keys)
        value = container[key]
        if not isinstance(value, dict | list) or not value or rng.random() < RARE:
            return container, key
        container = value


def other_value(value: Any, rng: Random) -> Any:
    """Return a value that a careless reader may take for the present one."""
    plain: list[Any] = [None, True, '', 'a' * 300, '\x1b[2J', [], {}, (), [value], [[1.0, 2.0]], -1]
    plain += [0.5, float('nan'), float('inf'), 10**30, torch.zeros(()), torch.zeros(2, 0)]
    plain += [rng.choice(NUMBERS)] * 4
    if isinstance(value, torch.Tensor) and rng.random() < 0.7:
        return other_tensor(value, rng)
    if isinstance(value, list) and rng.random() < 0.5:
        return rng.choice([value * 2, value[:-1], value[::-1]])
    if isinstance(value, str) and rng.random() < 0.5:
        return mutate_line(value, rng)
    if isinstance(value, int | float) and rng.random() < 0.5:
        return rng.choice([-value, value + 1, value * 1000, value - 1, float(value)])
    return rng.choice(plain)


def other_tensor(value: torch.Tensor, rng: Random) -> torch.Tensor:
    """Return a tensor of another shape, type or content."""
    flat = value.flatten()
    others = [flat, flat[:-1].clone(), value[None], value.double(), value.half(), value.long()]
    others += [torch.full_like(value, number) for number in (0, 1, -1, 127)]
    others += [value.expand(2, *value.shape), value.bool(), value.to(torch.complex64)]
    if value.is_floating_point():
        others += [torch.full_like(value, x) for x in (float('nan'), float('inf'), 1e30, 1e-40)]
    return rng.choice(others)


# ------------------------------------------------------------------------------ packed and archives


def mutate_gzip(mutate: Mutator) -> Mutator:
    """Return a mutator of gzipped files, which damages what is packed; rarely the packed bytes."""
    return mutate_packed(mutate, gzip.decompress, lambda part: gzip.compress(part, 1, mtime=0))


def mutate_bz2(mutate: Mutator) -> Mutator:
    """Do as ``mutate_gzip``, for bzip2."""
    return mutate_packed(mutate, bz2.decompress, lambda part: bz2.compress(part, 1))


def mutate_xz(mutate: Mutator) -> Mutator:
    """Do as ``mutate_gzip``, for xz."""
    return mutate_packed(mutate, lzma.decompress, lambda part: lzma.compress(part, preset=0))


def mutate_packed(
    mutate: Mutator, unpack: Callable[[bytes], bytes], pack: Callable[[bytes], bytes]
) -> Mutator:
    """Return a mutator of packed files; see ``mutate_gzip``."""

    def mutate_inside(content: bytes, other: bytes, rng: Random) -> bytes:
        if rng.random() < RARE:
            return mutate_bytes(content, other, rng, start=10)
        return pack(mutate(unpack(content), unpack(other), rng))

    return mutate_inside


def mutate_zip(content: bytes, other: bytes, rng: Random) -> bytes:
    """Damage the names or the contents of members; rarely the directory of the archive."""
    members = list(read_zip(content).items())
    others = list(read_zip(other).items())
    for _ in range(rng.randint(1, 2)):
        place = rng.randrange(len(members))
        name, part = members[place]
        new_name = mutate_line(name, rng) if rng.random() < 0.3 else rng.choice(others)[0]
        changes = [[(new_name, part)], [(name, mutate_bytes(part or b'\0', part, rng))]]
        members[place : place + 1] = rng.choice([*changes, *changes, [members[place]] * 2])

    names = [name.encode(errors='replace').decode()[:60_000] for name, _ in members]
    members = [(name, part) for name, (_, part) in zip(names, members)]
    changed = make_zip(members, rng.choice([0, 0, 8, 8, 12, 14]))
    if rng.random() < 0.5:
        return changed
    place = rng.choice([4, changed.rindex(b'PK\1\2')])  # the directory of its last member on
    return changed[:place] + mutate_bytes(changed[place:], b'', rng, 4)


TAR_BLOCK = 512
TAR_FIELDS = [0, 100, 108, 116, 124, 136, 156, 157, 257, 263, 265, 297, 329, 345, 386, 482, 483]
TAR_TYPES = b'0\x00123456789LKSxgXVDM7'
TAR_NUMBERS = [b'0', b'-1', b'77777777777', b'\x80' + bytes(10) + b'\1', b'\xff' * 12, b' ', b'9x']
TAR_NUMBERS += [b'\x80\0\0\0' + b'\x7f' + b'\xff' * 7, b'00000000010\0', b'200000000']
TAR_NUMBERS += [b'\x80' + b'\xff' * 11]


def mutate_tar(content: bytes, other: bytes, rng: Random) -> bytes:
    """Damage fields of headers, whose checksums are repaired, or anything in the archive."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        headers = tar_headers(bytes(changed))
        if not headers:
            break
        place = rng.choice(headers)
        field = rng.choice(TAR_FIELDS)
        if field == 156:
            changed[place + field] = rng.choice(TAR_TYPES)
        elif rng.random() < 0.6:
            number = rng.choice(TAR_NUMBERS)
            changed[place + field : place + field + len(number)] = number
        else:
            changed = bytearray(mutate_bytes(bytes(changed), other, rng, min(place, 100)))
    for place in tar_headers(bytes(changed)):
        header = changed[place : place + TAR_BLOCK]
        header[148:156] = b' ' * 8
        changed[place + 148 : place + 156] = b'%06o\0 ' % sum(header)
    return bytes(changed)


def tar_headers(content: bytes) -> list[int]:
    """Return where the headers of an archive are, as far as its sizes can be followed."""
    places, place = [], 0
    while place + TAR_BLOCK <= len(content) and any(content[place : place + TAR_BLOCK]):
        places.append(place)
        try:
            size = tarfile.nti(content[place + 124 : place + 136])
        except tarfile.HeaderError:
            break
        place += TAR_BLOCK * (1 + max(0, -(-size // TAR_BLOCK)))
    return places


# ------------------------------------------------------------------------------------------- images


def mutate_png(content: bytes, other: bytes, rng: Random) -> bytes:
    """Damage the data, the names or the order of chunks. Lengths and checksums are right."""
    chunks, others = png_chunks(content), png_chunks(other)
    pixels = [chunk for chunk in chunks if chunk[0] == b'IDAT']
    if rng.random() < 0.3:
        data = mutate_bytes(zlib.decompress(pixels[0][1]), b'', rng)
        chunks[chunks.index(pixels[0])] = b'IDAT', zlib.compress(data, 1)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(chunks))
        kind, data = chunks[place]
        changes = [[(kind, mutate_bytes(data or b'\0', data, rng))]] * 4
        changes += [[rng.choice(chunks), (kind, data)], [(kind, data)] * 2, [rng.choice(others)]]
        if place:
            name = rng.choice(PNG_CHUNKS)
            changes += [[], [(name, data)], [(kind, data), (name, b'')]]
        chunks[place : place + 1] = rng.choice(changes)
    return make_png(chunks)


PNG_CHUNKS = [b'IHDR', b'PLTE', b'tRNS', b'gAMA', b'iCCP', b'tEXt', b'zTXt', b'iTXt', b'eXIf']
PNG_CHUNKS += [b'acTL', b'fcTL', b'fdAT', b'IDAT', b'IEND', b'cHRM', b'sRGB', b'ABCD', b'pHYs']


def png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """Return the names and the data of the chunks of a valid PNG."""
    chunks, place = [], 8
    while place < len(content):
        length, kind = struct.unpack('>I4s', content[place : place + 8])
        chunks.append((kind, content[place + 8 : place + 8 + length]))
        place += 12 + length
    return chunks


def make_png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """Return a PNG of these chunks, with the right lengths and checksums."""
    parts = [b'\x89PNG\r\n\x1a\n']
    for kind, data in chunks:
        parts.append(struct.pack('>I', len(data)) + kind + data)
        parts.append(struct.pack('>I', zlib.crc32(kind + data)))
    return b''.join(parts)


def mutate_jpeg(content: bytes, other: bytes, rng: Random) -> bytes:
    """Damage a segment of the header, whose length is repaired, or all that follows."""
    segments = jpeg_segments(content)
    if rng.random() < 0.3:
        return mutate_bytes(content, other, rng, start=segments[-1])
    k = rng.randrange(len(segments) - 1)
    start, end = segments[k], segments[k + 1]
    head, data = content[start : start + 2], content[start + 4 : end]
    data = mutate_bytes(data, b'', rng)[: 2**16 - 3]
    segment = head + struct.pack('>H', 2 + len(data)) + data
    copies = rng.choice([1, 1, 1, 2])
    return content[:start] + segment * copies + content[end:]


def jpeg_segments(content: bytes) -> list[int]:
    """Return where the segments of a valid JPEG begin, and where its first scan's data does."""
    places = [2]
    while content[places[-1] : places[-1] + 2] != b'\xff\xda':
        (length,) = struct.unpack('>H', content[places[-1] + 2 : places[-1] + 4])
        places.append(places[-1] + 2 + length)
    (length,) = struct.unpack('>H', content[places[-1] + 2 : places[-1] + 4])
    return [*places, places[-1] + 2 + length]


def mutate_webp(content: bytes, other: bytes, rng: Random) -> bytes:
    """Damage a WEBP file, and write its length into its header."""
    changed = bytearray(keep_first(16)(content, other, rng))
    if len(changed) >= 8 and rng.random() >= RARE:
        struct.pack_into('<I', changed, 4, len(changed) - 8)
    return bytes(changed)


# --------------------------------------------------------------------------------------------- HTTP

HTTP_LINES = ['Transfer-Encoding: chunked', 'Content-Encoding: gzip', 'Content-Encoding: deflate']
HTTP_LINES += ['Content-Range: bytes 4-9/10', 'Content-Range: bytes */4', 'Location: //x:99999/']
HTTP_LINES += ['Location: http://[', 'Location: /ok', 'Location: \xff\xfe', 'Location: file:///x']
HTTP_LINES += ['Location: http://' + 'a' * 70 + '/', 'Location: http://.x/', 'Location: http:///']
HTTP_LINES += ['Set-Cookie: a=b; expires=x', 'Connection: keep-alive', 'Retry-After: 9', ' folded']
HTTP_LINES += ['Content-Length: ²', 'Content-Length: 1, 1', 'Content-Length: -1', 'no colon', ':']
HTTP_LINES += ['WWW-Authenticate: Digest', 'Refresh: 0', 'Content-Type: \0', 'X: ' + 'a' * 70_000]
HTTP_STATUS = [100, 101, 199, 200, 204, 206, 206, 206, 300, 301, 302, 303, 304, 307, 308, 400, 401]
HTTP_STATUS += [403, 404, 407, 416, 416, 429, 500, 503, 600, 999]


def mutate_answer(content: bytes, other: bytes, rng: Random) -> bytes:
    """Change the status, the fields or the body of an answer; rarely its first bytes."""
    head, _, body = content.partition(b'\r\n\r\n')
    lines = head.decode('latin1').split('\r\n')
    for _ in range(rng.randint(1, 3)):
        choice = rng.random()
        place = rng.randrange(1, len(lines)) if len(lines) > 1 else 1
        if choice < 0.2:
            lines[0] = f'HTTP/1.1 {rng.choice(HTTP_STATUS)} {rng.choice(["OK", "", "x" * 99])}'
        elif choice < 0.5:
            lines[place:place] = [rng.choice(HTTP_LINES)]
        elif choice < 0.7:
            lines[place : place + 1] = [mutate_line(line, rng) for line in lines[place : place + 1]]
        elif choice < 0.85:
            body = mutate_bytes(body or b'\0', b'', rng)
        else:
            return mutate_bytes(content, other, rng, start=0 if rng.random() < RARE else 13)
    return '\r\n'.join([*lines, '', '']).encode('latin1', 'ignore') + body
