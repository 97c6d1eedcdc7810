"""Photos: found in folders, decoded, turned upright, cropped to squares and resized."""

import itertools
import math
import os
import struct
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from common.bounds import bounded_memory, exit_with_parent, memory_limit, open_regular
from common.errors import UserError, one_line, printable, truncate
from common.files import digest

from .cache import CreateArray, memmap_cache

SUFFIXES = {'.jpg', '.jpeg', '.png', '.bmp', '.webp', '.gif', '.tif', '.tiff', '.ppm', '.pgm'}
# Photos that are left alone with a note
UNREAD_SUFFIXES = {'.heic', '.heif', '.avif', '.jxl', '.dng', '.cr2', '.cr3', '.nef', '.arw'}
# The formats that are decoded, whatever a file's name says. Pillow hands some others, such as
# PostScript, to external programs.
FORMATS = ('JPEG', 'PNG', 'BMP', 'WEBP', 'GIF', 'TIFF', 'PPM')
CACHE_VERSION = 3  # must be increased whenever the same files would give another cache

# CelebA's aligned photos are 178 pixels wide and 218 high, with background above and below the
# face. As in Real NVP (Dinh et al., 2017, section 4.1), the central 148x148 pixels are kept and
# resized. The crop is written as a share of the shorter side, to apply to photos of other sizes.
CELEBA_CROP = 148 / 178

# A JPEG is decoded at a half, a quarter or an eighth of its size where both of its sides keep so
# many pixels, and so many for each pixel of the result. This is faster and takes less memory. Other
# images are reduced likewise before they are converted.
ENOUGH_PIXELS, ENOUGH_PER_PIXEL = 1024, 4

MAX_SCANS = 64  # of a JPEG; most have one, or ten
SLOW_CODECS, MAX_SLOW = {'ppm_plain', 'bmp_rle'}, 2**17  # pixels, and bytes

DECODE_CHUNK = 64  # images that a worker process decodes at a time
N_NAMED = 10  # files that are left out, of which so many are named

# A damaged image makes Pillow fail in whichever step meets the damage: it parses headers, tags and
# compressed data in Python, and few of its checks raise an error of its own.
DAMAGED_IMAGE_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

Signature = list[str | int]  # name, size and time of a file


# ------------------------------------------------------------------------------------------- files


def is_image_name(name: str) -> bool:
    """Return whether a file with this name is an image, by its suffix, and is not hidden."""
    return Path(name).suffix.lower() in SUFFIXES and not name.startswith('.')


def has_photos(folder: str | Path) -> bool:
    """Return whether there are images in a folder itself, not in its sub-folders."""
    path = Path(folder)
    return path.is_dir() and any(is_image_name(entry.name) for entry in os.scandir(path))


def visible_paths(folder: Path) -> Iterator[Path]:
    """Yield all that is in a folder and its sub-folders, without what is hidden."""
    for path in folder.rglob('*'):
        if not any(part.startswith('.') for part in path.relative_to(folder).parts):
            yield path


def find_image_files(folder: Path, option: str = '--data_dir') -> list[Path]:
    """Return the images in a folder and its sub-folders, sorted, without hidden ones.

    Raises ``UserError`` where there is none; ``option`` is what the folder was given by.
    """
    if not folder.is_dir():
        raise UserError(f'{folder} is no folder: give one of images by {option}')
    files = [path for path in visible_paths(folder) if is_image_name(path.name) and path.is_file()]
    if not files:
        unread = describe_unread(folder)
        raise UserError(
            f'{folder} has no images ({" ".join(sorted(SUFFIXES))}): give a folder by {option}'
            + (f'; {unread}' if unread else '')
        )
    return sorted(files)


def split_paths(text: str) -> list[str]:
    """Return the paths in ``a.jpg,b.jpg``. A comma may also belong to the name of a file."""
    if text and os.path.exists(text):
        return [text]
    return [os.path.expanduser(path.strip()) for path in text.split(',') if path.strip()]


def describe_left_out(folder: Path, files: Sequence[Path], is_whole: np.ndarray) -> str:
    """Return a line that counts and names the files that could not be used."""
    names = []
    for path, whole in zip(files, is_whole):
        if not whole:
            names.append(truncate(printable(path.relative_to(folder).as_posix())))
    named = ', '.join(names[:N_NAMED])
    if len(names) > N_NAMED:
        named += f' and {len(names) - N_NAMED:,} more'
    return f'left out {len(names):,} of {len(files):,} images, broken or too small: {named}'


def describe_unread(folder: Path) -> str:
    """Return a line that counts the photos whose format is not read, or nothing if all are."""
    suffixes = [path.suffix.lower() for path in visible_paths(folder)]
    counts = Counter(suffix for suffix in suffixes if suffix in UNREAD_SUFFIXES)
    if not counts:
        return ''
    named = ', '.join(f'{n:,} {suffix}' for suffix, n in sorted(counts.items()))
    return f'photos of these formats are not read, convert them to .jpg: {named}'


# ----------------------------------------------------------------------------------------- decoding


def load_input_photos(
    path: str | Path, name: str, image_size: int, skip_broken: bool, is_quiet: bool = False
) -> tuple[list[str], np.ndarray, list[str]]:
    """Decode the photos in a folder, or a single one.

    Arguments:
        path: The folder or the file.
        name, image_size: See ``load_photo``.
        skip_broken: Whether photos that cannot be decoded, or are too small, are left out.
        is_quiet: Whether no progress bar is shown.

    Returns the names of the photos, relative to the folder, the photos (N, C, size, size), and
    lines that the user should know. Raises ``UserError`` where there is no photo.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise UserError(f'--input={path}: there is no such folder, and no such photo')
    if not path.is_dir():
        return [path.name], load_photo(path, name, image_size)[None], []

    files = find_image_files(path, '--input')
    photos = list(decode_files(files, name, image_size, skip_broken, is_quiet))
    is_whole = np.array([photo is not None for photo in photos])
    require_whole(is_whole, path)
    names = [file.relative_to(path).as_posix() for file, whole in zip(files, is_whole) if whole]
    notes = [] if is_whole.all() else [describe_left_out(path, files, is_whole)]
    if unread := describe_unread(path):
        notes.append(unread)
    return names, np.stack([photo for photo in photos if photo is not None]), notes


def require_whole(is_whole: np.ndarray, source: Path) -> None:
    """Raise ``UserError`` unless one of the images of ``source`` can be used."""
    if not is_whole.any():
        raise UserError(f'all {len(is_whole):,} images in {source} are broken or too small')


def load_photo(path: str | Path, name: str, image_size: int) -> np.ndarray:
    """Decode a photo, cropped and resized as a data set is; return (C, size, size) bytes.

    Arguments:
        path: The file, in any of ``FORMATS``.
        name: The data set.
        image_size: Height and width of the result, where the data set can have several.

    Raises ``UserError`` where the file is missing or damaged, or its image is too small.
    """
    if not os.path.exists(path):
        raise UserError(f'there is no photo {path}')
    with bounded_memory(path):
        return decode_as(path, name, image_size)


def decode_as(path: str | Path, name: str, image_size: int) -> np.ndarray:
    """Decode a photo as those of a data set are; see ``load_photo``."""
    if name == 'mnist':
        return pad_digits(decode_photo(path, 28, mode='L'))
    if name == 'digits':
        return decode_photo(path, 8, mode='L') // 16 * 17
    crop = CELEBA_CROP if name == 'celeba' else 1.0
    return decode_photo(path, image_size, crop)


def pad_digits(images: np.ndarray) -> np.ndarray:
    """Pad images (..., 28, 28) with zeros to 32x32."""
    no_margin, margin = (0, 0), (2, 2)
    other_axes = [no_margin] * (images.ndim - 2)
    return np.pad(images, [*other_axes, margin, margin])


def load_decoded(
    data_dir: Path,
    name: str,
    files: Sequence[Path],
    signatures: Sequence[Signature],
    size: int,
    skip_broken: bool,
) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the photos in all files, which of them could be decoded, and a digest of their source.

    The photos, (N, 3, size, size), are memory-mapped from the cache of ``data_dir``, and decoded
    first if necessary. Those that could not be are black, with ``skip_broken``, or raise
    ``UserError``.
    """
    source = [name, CACHE_VERSION, size, CELEBA_CROP, signatures]
    row_shape = (len(files), 1 + 3 * size * size)  # whether it could be decoded, and its pixels

    def decode_all(create: CreateArray) -> None:
        rows = create(row_shape, np.uint8)
        for i, photo in enumerate(decode_files(files, name, size, skip_broken)):
            rows[i, 0] = photo is not None
            rows[i, 1:] = 0 if photo is None else photo.ravel()

    def fits(rows: np.ndarray) -> bool:
        return rows.shape == row_shape and rows.dtype == np.uint8

    rows = memmap_cache(data_dir, f'{name}_{size}', source, decode_all, fits)
    photos = rows[:, 1:].reshape(-1, 3, size, size)
    is_whole = rows[:, 0].astype(bool)
    if not skip_broken and not is_whole.all():
        decode_chunk([files[int(is_whole.argmin())]], name, size, skip_broken)  # raises its error
    require_whole(is_whole, data_dir)
    return photos, is_whole, digest(source)


def decode_files(
    files: Sequence[Path], name: str, size: int, skip_broken: bool, is_quiet: bool = False
) -> Iterator[np.ndarray | None]:
    """Decode photos one after the other, as ``load_photo`` does, by a process for each core.

    Processes are used because threads would wait for Python's global lock half of the time. A photo
    that cannot be decoded is None with ``skip_broken``, else ``UserError`` is raised.
    """
    starts = iter(range(0, len(files), DECODE_CHUNK))
    n_workers = min(count_usable_cores(), -(-len(files) // DECODE_CHUNK))
    bar = tqdm(
        desc=f'decoding {name}',
        total=len(files),
        unit='image',
        dynamic_ncols=True,
        disable=is_quiet or len(files) <= DECODE_CHUNK,  # that takes no time to speak of
    )
    with bar, ProcessPoolExecutor(n_workers, initializer=exit_with_parent) as pool:
        tasks: deque[Future] = deque()

        def submit(n_chunks: int) -> None:
            for start in itertools.islice(starts, n_chunks):
                chunk = files[start : start + DECODE_CHUNK]
                tasks.append(pool.submit(decode_chunk, chunk, name, size, skip_broken))

        try:
            submit(4 * n_workers)  # no more, so that what is decoded does not pile up
            while tasks:
                photos = tasks.popleft().result()
                submit(1)
                bar.update(len(photos))
                yield from photos
        except BrokenProcessPool as error:
            raise UserError(
                'a process that decoded images was killed, perhaps for lack of memory'
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, the other chunks are not needed


def count_usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def decode_chunk(
    files: Sequence[Path], name: str, size: int, skip_broken: bool
) -> list[np.ndarray | None]:
    """Decode some photos; see ``decode_files``."""
    photos: list[np.ndarray | None] = []
    for path in files:
        try:
            photos.append(load_photo(path, name, size))
        except UserError as error:
            if not skip_broken:
                raise UserError(f'{error}; --skip_broken leaves such photos out') from error
            photos.append(None)
    return photos


def decode_photo(path: str | Path, size: int, crop: float = 1.0, mode: str = 'RGB') -> np.ndarray:
    """Decode an image file, crop it to a central square, and resize it.

    The image is turned upright as its EXIF data says, and transparency is laid on white.

    Arguments:
        path: A file in any of ``FORMATS``.
        size: Height and width of the result, in pixels.
        crop: Side of the central square, as a share of the image's shorter side.
        mode: 'RGB', or 'L' for grey.

    Returns an array (C, size, size) of uint8. Raises ``UserError`` if the file is damaged, or its
    image is smaller than ``size``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about odd metadata, which does not matter here
        warnings.simplefilter('error', Image.DecompressionBombWarning)
        n_enough = max(ENOUGH_PIXELS, math.ceil(ENOUGH_PER_PIXEL * size / crop))
        image = shrink(read_upright(path, n_enough), n_enough)

        side = round(crop * min(image.size))
        if side < size:
            raise UserError(
                f'{path} is too small: {image.width}x{image.height} pixels leave a square of '
                f'{side}, and images are {size}x{size}: use a larger photo, or train with a lower '
                '--image_size'
            )
        left = (image.width - side) // 2
        top = (image.height - side) // 2
        box = (left, top, left + side, top + side)
        square = convert_mode(image.crop(box), path, mode)
    resized = square.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(resized).reshape(size, size, -1)
    return pixels.transpose(2, 0, 1)


def read_upright(path: str | Path, n_enough: int) -> Image.Image:
    """Read an image and turn it upright; raise ``UserError`` if it is damaged.

    A JPEG may be decoded at a part of its size, but with at least ``n_enough`` pixels on each side.
    """
    try:
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
            require_quick(image, file)
            image.draft(None, (n_enough, n_enough))
            n_bytes = math.prod(image.size) * len(image.getbands())
            if n_bytes > memory_limit(path):  # decoders would call the file damaged
                raise MemoryError
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        most = f'{Image.MAX_IMAGE_PIXELS:,} pixels'
        raise UserError(f'{path} has more than {most}: make it smaller') from error
    except DAMAGED_IMAGE_ERRORS as error:
        raise UserError(f'{path} cannot be decoded as an image: {one_line(error)}') from error


def require_quick(image: Image.Image, file: BinaryIO) -> None:
    """Raise ``ValueError`` where an image takes much longer to decode than others of its size.

    Each scan of a JPEG goes over all of its pixels, and some few formats are decoded in Python.
    """
    position, n_bytes = file.tell(), os.fstat(file.fileno()).st_size
    if image.format in ('JPEG', 'MPO'):
        file.seek(0)
        if file.read().count(b'\xff\xda') > MAX_SCANS:
            raise ValueError(f'it has more than {MAX_SCANS} scans')
        file.seek(position)
    codecs = {tile[0] for tile in getattr(image, 'tile', ())}
    is_small = math.prod(image.size) <= MAX_SLOW and n_bytes <= MAX_SLOW
    if codecs & SLOW_CODECS and not is_small:
        raise ValueError('it is in a form that is slow to read: save it as .png')


def shrink(image: Image.Image, n_enough: int) -> Image.Image:
    """Reduce an image by a whole factor where both its sides keep ``n_enough`` pixels."""
    factor = min(image.size) // n_enough
    if factor < 2 or image.mode not in ('L', 'RGB', 'RGBA', 'CMYK'):
        return image
    return image.reduce(factor)


def convert_mode(image: Image.Image, path: str | Path, mode: str) -> Image.Image:
    """Convert an image to ``mode``: 16 bits are reduced to 8, transparency is laid on white."""
    if image.mode.startswith('I'):
        high_bytes = np.asarray(image).clip(0, 65535) // 256
        image = Image.fromarray(high_bytes.astype(np.uint8))
    try:
        if image.has_transparency_data:
            background = Image.new('RGBA', image.size, 'white')
            image = Image.alpha_composite(background, image.convert('RGBA'))
        return image.convert(mode)
    except (OSError, ValueError) as error:  # not every mode can be converted
        raise UserError(f'{path} cannot be decoded as an image: {one_line(error)}') from error
