"""Image data sets: faces (drawn), digits (scikit-learn's), mnist, cifar10, celeba, image folders.

All come as uint8 arrays (N, C, H, W) with boolean attributes (N, A), in three splits. Images that
must be drawn, or decoded and cropped, are prepared once and stored in an array on disk, which is
memory-mapped from then on. A photo of the user's own is cropped alike.
"""

import csv
import gzip
import hashlib
import multiprocessing
import os
import signal
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from common.errors import UserError, index_of_name, one_line, truncate
from common.files import digest, file_signature, first_existing, path_hash, write_atomically

from .cache import CreateArray, memmap_cache
from .drawn_faces import ATTRIBUTES, draw_faces, face_attributes
from .image_conditions import (
    CLASSES,
    MAX_CONDITIONS,
    ImageCondition,
    are_printable,
    condition_of_checkpoint,
    make_condition,
)
from .pickles import array_of, read_pickle

IMAGE_DATASETS = ('faces', 'digits', 'mnist', 'cifar10', 'celeba', 'folder')
SUFFIXES = {'.jpg', '.jpeg', '.png', '.bmp', '.webp', '.gif', '.tif', '.tiff', '.ppm', '.pgm'}
# The formats that are decoded, whatever a file's name says. Pillow hands some others, such as
# PostScript, to external programs.
FORMATS = ('JPEG', 'PNG', 'BMP', 'WEBP', 'GIF', 'TIFF', 'PPM')
CACHE_VERSION = 1  # must be increased whenever the same source would give other pixels

DIGIT_NAMES = tuple('0123456789')
MNIST_FILES = [
    'train-images-idx3-ubyte',
    'train-labels-idx1-ubyte',
    't10k-images-idx3-ubyte',
    't10k-labels-idx1-ubyte',
]
MAX_IDX_BYTES = 2**26  # the largest file of MNIST holds 47 million
CIFAR_CLASSES = (
    'airplane',
    'automobile',
    'bird',
    'cat',
    'deer',
    'dog',
    'frog',
    'horse',
    'ship',
    'truck',
)
CIFAR_FILES = [*(f'data_batch_{k}' for k in range(1, 6)), 'test_batch']
CIFAR_ROW = 1 + 3 * 32 * 32  # bytes of a label and an image

CELEBA_FILES = ('img_align_celeba', 'list_attr_celeba.txt', 'list_eval_partition.txt')
CELEBA_FOLDERS = ('Img', 'Anno', 'Eval')  # the sub-folders in which CelebA's owners keep them
# CelebA's aligned photos are 178 pixels wide and 218 high, with background above and below the
# face. As in Real NVP (Dinh et al., 2017, section 4.1), the central 148x148 pixels are kept and
# resized. The crop is written as a share of the shorter side, to apply to photos of other sizes.
CELEBA_CROP = 148 / 178

FACES_SEED = 842
# The test split starts with this one of its faces, a plain one with nothing covered, because the
# first test images are those that are edited by default.
FIRST_TEST_FACE = 4

SPLIT_NAMES = {'train': 0, 'validation': 1, 'val': 1, 'valid': 1, 'test': 2}
MAX_ATTRIBUTES = 1000
DECODE_CHUNK = 64  # images that a worker process decodes at a time
# Of the files of celeba and folder, so many are read for the fingerprint, and so much of each
N_SAMPLED_FILES, N_SAMPLED_BYTES = 64, 2**16

GRID_CELL = 128  # pixels to which small images are enlarged in a grid
GRID_MARGIN = 8
GRID_FONT_SIZE = 18

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
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

SplitIndex = slice | np.ndarray
Row = list[str]  # the cells of a row of a table
Signature = list[str | int]  # name, size and time of a file


@dataclass(frozen=True)
class ImageSplit:
    """Images of one split.

    Attributes:
        images: (N, C, H, W), uint8, memory-mapped if they come from a cache.
        attributes: (N, A), boolean; A is 0 where the data set has none.
        conditions: (N, Y), float32, 0 or 1, that a model is given; None without conditions.
    """

    images: np.ndarray
    attributes: np.ndarray
    conditions: np.ndarray | None = None


@dataclass(frozen=True)
class ImageData:
    """An image data set.

    Attributes:
        train, validation, test: The three splits.
        attribute_names: A names; the classes of a labelled data set are attributes.
        n_values: Values per image by which bits/dim is divided. This is C * H * W, except for
            mnist: its 28x28 images are padded to 32x32, and 784 values count.
        fingerprint: Digest that identifies the images, in whichever folder of whichever machine.
            Of celeba and folder, it is one of names, sizes, tables and the content of some files.
        cache_key: Digest of what the images were made from, with the times of the files, and of
            their split. What is computed from the images is stale when it changes.
        split_bounds: The two numbers by which a folder was split (``split_by_hash``), or none.
        files: A row (path hash, size in bytes) for each image of a folder, int64, (N, 2).
        notes: What has changed since a run was trained on the images, in one line each.
        condition: What the conditions of each image are called, and how frequent they are.
    """

    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit
    attribute_names: tuple[str, ...]
    n_values: int
    fingerprint: str
    cache_key: str = ''
    split_bounds: list[int] = field(default_factory=list)
    files: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.int64))
    notes: tuple[str, ...] = ()
    condition: ImageCondition = field(default_factory=ImageCondition)

    def attribute_index(self, text: str) -> int:
        """Return the index of an attribute given by index or name, such as '8' or 'Black_Hair'.

        Raises ``UserError`` with the nearest names if there is no such attribute.
        """
        return index_of_name(text, self.attribute_names, 'attribute')

    def differing(self, texts: Sequence[str] | None, n: int, source: str) -> list[int]:
        """Return the indices of attributes that differ among the first ``n`` training images.

        Arguments:
            texts: Indices or names of the attributes; by default, all that differ.
            n: How many training images to look at.
            source: What to call the data set in an error message.

        Raises ``UserError`` if no attribute differs, or one of those given does not.
        """
        present = self.train.attributes[:n]
        differs = np.asarray(present.any(0) & ~present.all(0))
        if not differs.any():
            raise UserError(
                f'the images of {source} have no attributes that differ: for a folder of images, '
                'list them in its attributes.csv'
            )
        if not texts:
            return np.flatnonzero(differs).tolist()

        chosen = [self.attribute_index(text) for text in texts]
        for i in chosen:
            if not differs[i]:
                raise UserError(
                    f'attribute {i} ({self.attribute_names[i]}) is the same in all training '
                    'images: choose another'
                )
        return chosen


class ImageOptions(Protocol):
    """The options of a run that say which images it learns."""

    dataset: str
    data_dir: str
    image_size: int
    condition: list[str] | None


def load_run_images(
    config: ImageOptions, saved: dict[str, Any] | None, may_differ: bool = True
) -> ImageData:
    """Load the images that a run is about with their conditions, split as in its training.

    Arguments:
        config: the options of the run.
        saved: the checkpoint of the run, or None for a new one.
        may_differ: whether the images may differ from those that the run was trained on. If so,
            the result's ``notes`` say how.

    Raises ``UserError`` where they differ and must not, or where what the checkpoint says of them
    is damaged.
    """
    source = f'{config.dataset} in {config.data_dir}'
    if saved is None:
        data = load_images(config.dataset, config.data_dir, config.image_size)
        if not config.condition:
            return data
        return with_conditions(data, choose_condition(data, config.condition, source), source)

    require_valid_split(saved)
    bounds = saved['split_bounds']
    data = load_images(config.dataset, config.data_dir, config.image_size, bounds)
    data = with_conditions(data, condition_of_checkpoint(saved), source)
    if saved['fingerprint'] in ('', data.fingerprint):
        return data

    change = describe_change(config, data.files, saved)
    if not may_differ:
        raise UserError(
            f'{change}; add --accept_changed_data to train on with these images, or give the '
            'former ones by --data_dir'
        )
    return replace(data, notes=(change,))


def require_valid_split(saved: dict[str, Any]) -> None:
    """Raise ``UserError`` unless a checkpoint's split and list of files have their form."""
    bounds, files = saved['split_bounds'], saved['files']
    has_bounds = len(bounds) in (0, 2) and bounds == sorted(bounds)
    has_files = files.dtype == torch.int64 and files.dim() == 2 and files.shape[1] == 2
    if not has_bounds or not has_files:
        raise UserError(f'{saved["path"]} is damaged: it does not say how its images were split')


def choose_condition(data: ImageData, words: Sequence[str], source: str) -> ImageCondition:
    """Return what ``--condition`` means.

    Arguments:
        data: The images.
        words: ``['classes']``, or names or indices of attributes.
        source: What to call the data set in an error message.

    Raises ``UserError`` where the images have no such classes or attributes, or do not differ.
    """
    train, is_class = data.train.attributes, list(words) == [CLASSES]
    if is_class:
        chosen = list(range(train.shape[1]))
        differing = data.differing(None, len(train), source)
        if not (train.sum(1) == 1).all():
            some = ','.join(data.attribute_names[i] for i in differing[-2:])
            raise UserError(
                f'the images of {source} have no classes, of which each has exactly one: choose '
                f'attributes, as in --condition={some}'
            )
    else:
        chosen = data.differing(words, len(train), source)
        if len(set(chosen)) < len(chosen) or len(chosen) > MAX_CONDITIONS:
            raise UserError(
                f'--condition={",".join(words)}: give up to {MAX_CONDITIONS} different attributes'
            )
    names = [data.attribute_names[i] for i in chosen]
    for name in names:
        if ',' in name or name.startswith('-'):
            raise UserError(
                f'--condition: {name!r} cannot be told apart in --given: rename it, without commas '
                'and a minus in front'
            )
    return make_condition(names, train[:, chosen], is_class)


def with_conditions(data: ImageData, condition: ImageCondition, source: str) -> ImageData:
    """Return a data set in which each image has its conditions.

    Raises ``UserError`` where images lack them; ``source`` names the data set.
    """
    if not condition.names:
        return data
    missing = [name for name in condition.names if name not in data.attribute_names]
    if missing:
        raise UserError(
            f'the model is given {missing[0]!r}, which the images of {source} no longer have'
        )
    chosen = [data.attribute_names.index(name) for name in condition.names]

    def with_own(split: ImageSplit) -> ImageSplit:
        conditions = split.attributes[:, chosen].astype(np.float32)
        if condition.is_class and not (conditions.sum(1) == 1).all():
            raise UserError(f'the images of {source} do not have exactly one class each')
        return replace(split, conditions=conditions)

    return replace(
        data,
        train=with_own(data.train),
        validation=with_own(data.validation),
        test=with_own(data.test),
        condition=condition,
    )


def count_conditions(data: ImageData) -> ImageData:
    """Return a data set whose p(y) is how frequent y is among its own training images.

    Raises ``UserError`` where y is the same in all of them.
    """
    old = data.condition
    if not old.names:
        return data
    assert data.train.conditions is not None
    condition = make_condition(old.names, data.train.conditions.astype(bool), old.is_class)
    if len(condition.values) < 2:
        raise UserError(f'{old.description} is now the same in all training images')
    return replace(data, condition=condition)


def describe_change(config: ImageOptions, files: torch.Tensor, saved: dict[str, Any]) -> str:
    """Return a line that says how images with these ``files`` differ from those of a run."""
    if config.dataset != 'folder':
        return f'{config.dataset} in {config.data_dir} is not what the model was trained on'

    then, now = dict(saved['files'].tolist()), dict(files.tolist())
    n_new, n_gone = len(now.keys() - then.keys()), len(then.keys() - now.keys())
    n_changed = sum(now[path] != then[path] for path in now.keys() & then.keys())
    if not n_new and not n_changed and not n_gone:
        return (
            f'attributes.csv or the content of images in {config.data_dir} has changed since '
            'training; if splits have, test images may have been trained on'
        )
    counts = f'{n_new:,} new, {n_changed:,} changed, {n_gone:,} gone'
    change = f'the images in {config.data_dir} have changed since training: {counts}'
    if not saved['split_bounds']:
        change += '; test images may have been trained on, unless attributes.csv has a split'
    return change


def load_images(
    name: str,
    data_dir: str | Path = 'data',
    image_size: int | None = None,
    split_bounds: Sequence[int] | None = None,
) -> ImageData:
    """Load an image data set.

    For the images of a run, see ``load_run_images``.

    Arguments:
        name: One of ``IMAGE_DATASETS``.
        data_dir: The folder of its files and of the cache.
        image_size: Height and width in pixels, of data sets that can have several sizes.
        split_bounds: Those of a run, by which a folder is split as in its training
            (``load_folder``); by default, it is split as for a new run.

    Raises ``UserError`` if files are missing or damaged, or the size does not fit.
    """
    loaders: dict[str, Callable[[Path, int | None], ImageData]] = {
        'faces': load_faces,
        'digits': load_digits,
        'mnist': load_mnist,
        'cifar10': load_cifar10,
        'celeba': load_celeba,
        'folder': partial(load_folder, split_bounds=split_bounds),
    }
    if name not in loaders:
        raise UserError(f'unknown data set {name!r}: there are {", ".join(IMAGE_DATASETS)}')
    return loaders[name](Path(data_dir), image_size)


def find_images(name: str, data_dir: str | Path) -> list[Path | None]:
    """Return the paths of the files of a data set in ``data_dir``, None for each missing file.

    The list is empty for data sets that have no files of their own.
    """
    candidates = {
        'mnist': [[file, f'{file}.gz'] for file in MNIST_FILES],
        'cifar10': [[f'cifar-10-batches-py/{file}', file] for file in CIFAR_FILES],
        'celeba': [
            [file, f'{folder}/{file}'] for file, folder in zip(CELEBA_FILES, CELEBA_FOLDERS)
        ],
    }
    files = candidates.get(name, [])
    return [first_existing(Path(data_dir), name, paths) for paths in files]


def require_files(name: str, data_dir: Path, needs: str) -> list[Path]:
    """Return the paths of the files of a data set; raise ``UserError`` if any is missing."""
    paths = find_images(name, data_dir)
    present = [path for path in paths if path is not None]
    if len(present) < len(paths):
        raise UserError(f'{name} is not in {data_dir}: it needs {needs}')
    return present


def require_size(name: str, image_size: int | None, size: int) -> None:
    """Raise ``UserError`` if another size is asked for than the one that the images have."""
    if image_size not in (None, size):
        raise UserError(
            f'--image_size={image_size}: the images of {name} are {size}x{size}, '
            'leave --image_size out'
        )


def load_photo(path: str | Path, name: str, image_size: int) -> np.ndarray:
    """Decode a user's photo, cropped and resized as a data set is; return (C, size, size) bytes."""
    if name == 'mnist':
        return pad_digits(decode_photo(path, 28, mode='L'))
    if name == 'digits':
        return decode_photo(path, 8, mode='L') // 16 * 17
    crop = CELEBA_CROP if name == 'celeba' else 1.0
    return decode_photo(path, image_size, crop)


def shift_randomly(x: torch.Tensor, max_shift: int, generator: torch.Generator) -> torch.Tensor:
    """Shift each image (B, C, H, W) by up to ``max_shift`` pixels along both axes.

    The pixels at the edge are repeated where nothing else comes in.
    """
    b, _, h, w = x.shape
    offsets = torch.randint(
        -max_shift, max_shift + 1, (2, b, 1), device=x.device, generator=generator
    )
    rows = (torch.arange(h, device=x.device) + offsets[0]).clamp(0, h - 1)
    columns = (torch.arange(w, device=x.device) + offsets[1]).clamp(0, w - 1)
    images = torch.arange(b, device=x.device)[:, None, None]

    # Indexing around a slice moves the axis of the slice to the end: (B, H, W, C).
    rows, columns = rows[:, :, None], columns[:, None, :]
    return x[images, :, rows, columns].permute(0, 3, 1, 2)


def make_image_data(
    images: np.ndarray,
    attributes: np.ndarray,
    names: Sequence[str],
    parts: Sequence[SplitIndex],
    source: Any,
    fingerprint: str = '',
    n_values: int | None = None,
) -> ImageData:
    """Split images and attributes into a data set.

    Arguments:
        images: (N, C, H, W), uint8.
        attributes: (N, A), boolean.
        names: A names of attributes.
        parts: Slices or indices of the train, validation and test images.
        source: JSON-serialisable description of what the images were made from.
        fingerprint, n_values: See ``ImageData``; by default, the digest of ``source`` and
            C * H * W values.
    """
    train, validation, test = [ImageSplit(images[part], attributes[part]) for part in parts]
    return ImageData(
        train,
        validation,
        test,
        attribute_names=tuple(names),
        n_values=n_values or int(np.prod(images.shape[1:])),
        fingerprint=fingerprint or digest(source),
        cache_key=digest(source),
    )


def slices_in_order(n_train: int, n_validation: int) -> list[slice]:
    """Split images in their order. The last of ``n_train`` images are the validation split."""
    first = n_train - n_validation
    return [slice(0, first), slice(first, n_train), slice(n_train, None)]


def random_split(n: int, source: str | Path) -> list[np.ndarray]:
    """Return sorted indices of 80, 10 and 10% of ``n`` images, always the same ones.

    Raises ``UserError`` if there are fewer than ten images; ``source`` names them.
    """
    require_ten(n, source)
    order = np.random.default_rng(0).permutation(n)
    n_held_out = n // 10
    parts = np.split(order, [n - 2 * n_held_out, n - n_held_out])
    return [np.sort(part) for part in parts]


def require_ten(n: int, source: str | Path) -> None:
    """Raise ``UserError`` if ``n`` images are too few to be split; ``source`` names them."""
    if n < 10:
        raise UserError(
            f'{source} has {n} images: at least 10 are needed for a split into train, validation '
            'and test'
        )


def choose_split_bounds(hashes: np.ndarray, source: str | Path) -> list[int]:
    """Return the bounds by which a tenth of the images validates and a tenth tests.

    See ``split_by_hash``. Raises ``UserError`` if there are fewer than ten images; ``source`` names
    them.
    """
    require_ten(len(hashes), source)
    ranked = np.sort(hashes)
    n_held_out = len(hashes) // 10
    return [int(ranked[n_held_out]), int(ranked[2 * n_held_out])]


def split_by_hash(
    hashes: np.ndarray, bounds: Sequence[int], source: str | Path
) -> list[np.ndarray]:
    """Return sorted indices of the train, validation and test images.

    An image whose hash is below the first of two bounds validates, one below the second tests, and
    the others train. So an image stays in its split, whichever others come or go.

    Raises ``UserError`` where a split has no image; ``source`` names them.
    """
    place = np.searchsorted(bounds, hashes, side='right')
    parts = [np.flatnonzero(place == split) for split in (2, 0, 1)]
    if not all(len(part) for part in parts):
        raise UserError(
            f'{source} has no images for the training, validation or test split of this run: too '
            'few of those that it was trained on are left'
        )
    return parts


def one_hot(labels: np.ndarray) -> np.ndarray:
    """Return labels 0 to 9 as boolean attributes (N, 10)."""
    return np.eye(10, dtype=bool)[labels]


def is_image_array(array: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Return whether an array has this shape and holds bytes."""
    return array.shape == shape and array.dtype == np.uint8


# ---------------------------------------------------------------------------------- grids of images


def arrange_in_rows(images: np.ndarray, n: int = 8) -> list[np.ndarray]:
    """Return images in rows of n. The last row may be shorter."""
    return [images[i : i + n] for i in range(0, len(images), n)]


def save_grid(
    path: str | Path,
    rows: Sequence[np.ndarray],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> None:
    """Save the picture of ``draw_grid`` as a PNG file."""
    picture = draw_grid(rows, row_labels, column_labels)
    write_atomically(Path(path), lambda temporary: picture.save(temporary, format='png'))
    tqdm.write(f'wrote {path}')


def draw_grid(
    rows: Sequence[np.ndarray],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> Image.Image:
    """Draw rows of images, with labels at the left and at the top.

    Images are enlarged by a whole number, so that their pixels stay sharp.

    Arguments:
        rows: Arrays (n, C, H, W) of uint8; the first row has the most images.
        row_labels: One for each row, of one line or several, or none.
        column_labels: One for each image of the first row, or none.
    """
    height, width = rows[0].shape[2:]
    zoom = max(1, GRID_CELL // max(height, width))
    height, width = height * zoom, width * zoom
    row_step = height + GRID_MARGIN
    column_step = width + GRID_MARGIN

    font = ImageFont.load_default(GRID_FONT_SIZE)
    lines_of_rows = [[truncate(line) for line in label.split('\n')] for label in row_labels]
    label_widths = [int(font.getlength(line)) for lines in lines_of_rows for line in lines]
    left = top = GRID_MARGIN
    if row_labels:
        left += max(label_widths) + 2 * GRID_MARGIN
    if column_labels:
        top += GRID_FONT_SIZE + GRID_MARGIN

    size = (left + len(rows[0]) * column_step, top + len(rows) * row_step)
    canvas = Image.new('RGB', size, 'white')
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            corner = (left + j * column_step, top + i * row_step)
            canvas.paste(enlarge(image, zoom), corner)

    draw = ImageDraw.Draw(canvas)
    for i, lines in enumerate(lines_of_rows):
        position = (left - 2 * GRID_MARGIN, top + i * row_step + height // 2)
        draw.text(position, '\n'.join(lines), 'black', font, anchor='rm', align='right')
    for j, label in enumerate(column_labels):
        position = (left + j * column_step + width // 2, top - GRID_MARGIN - 2)
        draw.text(position, label, 'black', font, anchor='ms')
    return canvas


def enlarge(image: np.ndarray, zoom: int) -> Image.Image:
    """Return an image (C, H, W) as a picture in which each pixel is a square of ``zoom`` pixels."""
    enlarged = image.repeat(zoom, axis=1).repeat(zoom, axis=2)
    pixels = enlarged.transpose(1, 2, 0)
    if pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(pixels)


# ---------------------------------------------------------------------- drawn and bundled data sets


def load_faces(data_dir: Path, image_size: int | None) -> ImageData:
    """Load 12,000 drawn faces with CelebA's attributes (see drawn_faces.py), 32x32 by default."""
    size = image_size or 32
    n_train, n_validation, n_test = 10_000, 1_000, 1_000
    n = n_train + n_validation + n_test
    shape = (n, 3, size, size)
    source = ['faces', CACHE_VERSION, size, n, FACES_SEED]

    def draw(create: CreateArray) -> None:
        array = create(shape, np.uint8)
        array[:] = draw_faces(n, size, FACES_SEED)

    def fits(array: np.ndarray) -> bool:
        return is_image_array(array, shape)

    images = memmap_cache(data_dir, f'faces_{size}', source, draw, fits)
    attributes = face_attributes(n, FACES_SEED)
    test = np.roll(np.arange(n - n_test, n), -FIRST_TEST_FACE)
    parts: list[SplitIndex] = [slice(0, n_train), slice(n_train, n - n_test), test]
    return make_image_data(images, attributes, ATTRIBUTES, parts, source)


def load_digits(data_dir: Path, image_size: int | None) -> ImageData:
    """Load the 1,797 handwritten digits, 8x8, that come with scikit-learn.

    Their 17 levels are reduced to 16, by merging the two highest, so that 4 bits hold a value.
    """
    from sklearn import datasets as sklearn_datasets  # takes a second, so only where needed

    require_size('digits', image_size, 8)
    pixels, labels = sklearn_datasets.load_digits(return_X_y=True)
    levels = np.minimum(pixels, 15).astype(np.uint8)
    images = (levels * 17).reshape(-1, 1, 8, 8)
    parts = random_split(len(images), 'digits')
    return make_image_data(images, one_hot(labels), DIGIT_NAMES, parts, ['digits'])


# -------------------------------------------------------------------------------------------- mnist


def load_mnist(data_dir: Path, image_size: int | None) -> ImageData:
    """Load the four files of MNIST (LeCun, Cortes and Burges), which may be gzipped.

    The 28x28 images are padded with zeros to 32x32. The last 5,000 training images (at most a
    tenth) are the validation split.
    """
    require_size('mnist', image_size, 32)
    paths = require_files(
        'mnist',
        data_dir,
        f'{", ".join(MNIST_FILES)} (gzipped or not): '
        f'python -m datasets fetch mnist --data_dir={data_dir}',
    )
    train_images = read_idx(paths[0], n_dims=3)
    train_labels = read_idx(paths[1], n_dims=1)
    test_images = read_idx(paths[2], n_dims=3)
    test_labels = read_idx(paths[3], n_dims=1)
    require_matching_labels(train_images, train_labels, paths[1])
    require_matching_labels(test_images, test_labels, paths[3])

    images = pad_digits(np.concatenate([train_images, test_images])[:, None])
    labels = np.concatenate([train_labels, test_labels])
    n_train = len(train_images)
    n_validation = min(5000, n_train // 10)
    return make_image_data(
        images,
        one_hot(labels),
        DIGIT_NAMES,
        slices_in_order(n_train, n_validation),
        source=['mnist', *map(file_signature, paths)],
        fingerprint=digest(['mnist', n_train], [images, labels]),
        n_values=784,
    )


def pad_digits(images: np.ndarray) -> np.ndarray:
    """Pad images (..., 28, 28) with zeros to 32x32."""
    no_margin, margin = (0, 0), (2, 2)
    other_axes = [no_margin] * (images.ndim - 2)
    return np.pad(images, [*other_axes, margin, margin])


def require_matching_labels(images: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """Raise ``UserError`` unless there is a digit for each 28x28 image; ``path`` has the labels."""
    highest = labels.max(initial=0)
    height, width = images.shape[1:]
    is_mnist = (height, width) == (28, 28) and highest <= 9
    if not is_mnist or len(images) != len(labels):
        raise UserError(
            f'{path}: {len(labels)} labels up to {highest} do not fit '
            f'{len(images)} images of {height}x{width}'
        )


def read_idx(path: Path, n_dims: int) -> np.ndarray:
    """Read an array of bytes with ``n_dims`` dimensions in MNIST's own format (idx).

    Reads no more than the header announces, which is limited to ``MAX_IDX_BYTES``. Raises
    ``UserError`` if the file is damaged or of another kind.
    """
    open_file: Callable[..., Any] = gzip.open if path.suffix == '.gz' else open
    try:
        with open_file(path, 'rb') as file:
            shape = read_idx_shape(file, path, n_dims)
            size = int(np.prod(shape, dtype=object))  # as a Python integer it cannot overflow
            if size > MAX_IDX_BYTES:
                raise UserError(
                    f'{path} claims to hold {"x".join(map(str, shape))} bytes, '
                    'which no MNIST file does'
                )
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f'{path} cannot be read: {error}; download it again') from error

    if len(content) != size:
        comparison = 'longer' if len(content) > size else 'shorter'
        raise UserError(
            f'{path} is {comparison} than the {size} bytes that its header announces; '
            'download it again'
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_idx_shape(file: IO[bytes], path: Path, n_dims: int) -> list[int]:
    """Read the header of an idx file: a magic number, then the sizes as 4 bytes each."""
    magic = bytes([0, 0, 8, n_dims])  # 8 stands for unsigned bytes
    header = file.read(4 + 4 * n_dims)
    if len(header) < 4 + 4 * n_dims or header[:4] != magic:
        raise UserError(
            f'{path} is not an idx file of bytes in {n_dims} dimensions: its header is '
            f'{header[:4].hex() or "empty"}, not {magic.hex()}'
        )
    return list(struct.unpack(f'>{n_dims}I', header[4:]))


# ------------------------------------------------------------------------------------------ cifar10


def load_cifar10(data_dir: Path, image_size: int | None) -> ImageData:
    """Load the Python version of CIFAR-10 (Krizhevsky, 2009): 32x32 images of ten classes.

    The last tenth of the training images, in their order, is the validation split. The cache has
    the layout of the binary version: each row is a label followed by the pixels of an image.
    """
    require_size('cifar10', image_size, 32)
    paths = require_files(
        'cifar10',
        data_dir,
        f'{", ".join(CIFAR_FILES)} of its Python version: '
        f'python -m datasets fetch cifar10 --data_dir={data_dir}',
    )

    def unpickle(create: CreateArray) -> None:
        rows = read_cifar_batches(paths)
        array = create(rows.shape, np.uint8)
        array[:] = rows

    def fits(rows: np.ndarray) -> bool:
        if rows.shape[1:] != (CIFAR_ROW,) or rows.dtype != np.uint8:
            return False
        if len(rows) == 0 or len(rows) % len(paths) != 0:
            return False
        return rows[:, 0].max() < 10

    source = ['cifar10', CACHE_VERSION, *map(file_signature, paths)]
    rows = memmap_cache(data_dir, 'cifar10', source, unpickle, fits)
    images = rows[:, 1:].reshape(-1, 3, 32, 32)
    attributes = one_hot(rows[:, 0])
    n_test = len(rows) // len(paths)
    parts = slices_in_order(n_train=len(rows) - n_test, n_validation=n_test // 2)
    fingerprint = digest(['cifar10'], [rows])
    return make_image_data(images, attributes, CIFAR_CLASSES, parts, source, fingerprint)


def read_cifar_batches(paths: Sequence[Path]) -> np.ndarray:
    """Read all batches as rows (N, 3073) of uint8: a label and then the pixels."""
    batches = [read_cifar_batch(path) for path in paths]
    sizes = [len(batch) for batch in batches]
    if len(set(sizes)) > 1:
        raise UserError(
            f'{paths[0].parent}: its batches hold {", ".join(map(str, sizes))} images, '
            'and should all hold the same number'
        )
    return np.concatenate(batches)


def read_cifar_batch(path: Path) -> np.ndarray:
    """Read one batch as rows (N, 3073) of uint8; raise ``UserError`` if it is damaged."""
    try:
        batch = read_pickle(path)
        pixels = array_of(batch['data'])
        labels = np.array(batch['labels'])
    except (OSError, ValueError, TypeError, LookupError, RecursionError, MemoryError) as error:
        # Where the pickle holds no dict, or labels that are no list, the lookup or the array fails.
        raise UserError(
            f'{path} cannot be read as a batch of cifar10: {one_line(error)}; fetch it again'
        ) from error

    if not is_cifar_batch(pixels, labels):
        raise UserError(
            f'{path} does not hold 3x32x32 images of bytes with a label from 0 to 9 each; '
            'fetch it again'
        )
    return np.column_stack([labels.astype(np.uint8), pixels])


def is_cifar_batch(pixels: Any, labels: np.ndarray) -> bool:
    """Return whether there are images, with a label from 0 to 9 for each."""
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        return False
    if pixels.shape[1:] != (CIFAR_ROW - 1,) or len(pixels) == 0:
        return False
    if labels.shape != (len(pixels),):
        return False
    return bool(np.isin(labels, np.arange(10)).all())


# ------------------------------------------------------------------------------------------- celeba


def load_celeba(data_dir: Path, image_size: int | None) -> ImageData:
    """Load CelebA (Liu et al., 2015): aligned photos with 40 attributes, in its own splits.

    The central square of each photo (see ``CELEBA_CROP``) is resized to 64x64 by default.
    """
    folder, attribute_path, partition_path = require_files(
        'celeba',
        data_dir,
        f'{", ".join(CELEBA_FILES)}, which its owners hand out: '
        f'python -m datasets fetch celeba --data_dir={data_dir} says how',
    )
    attribute_names, cells = read_celeba_attributes(attribute_path)
    partition = read_celeba_partition(partition_path)
    files = {entry.name for entry in os.scandir(folder)}
    require_same_images(cells, attribute_path, partition, partition_path)
    require_same_images(cells, attribute_path, files, folder)

    file_names = sorted(cells)
    paths = [folder / name for name in file_names]
    cells_in_order = [cells[name] for name in file_names]
    attributes = parse_attributes(attribute_path, attribute_names, cells_in_order)
    words = [partition[name] for name in file_names]
    parts = split_by_word(partition_path, words, {'0': 0, '1': 1, '2': 2})

    size = image_size or 64
    signatures = [file_signature(path) for path in paths]
    images, images_digest = load_decoded(data_dir, 'celeba', paths, signatures, size, CELEBA_CROP)
    source = [images_digest, [file_signature(attribute_path), file_signature(partition_path)]]
    file_sizes = [n_bytes for _, n_bytes, _ in signatures]
    identity = ['celeba', file_names, file_sizes, sampled_content(paths), attribute_names, words]
    fingerprint = digest(identity, [attributes])
    return make_image_data(images, attributes, attribute_names, parts, source, fingerprint)


def read_celeba_attributes(path: Path) -> tuple[list[str], dict[str, Row]]:
    """Read the names of the attributes, and the cells of each image, by its file name.

    The first line of the file is the number of images, the second one the names.
    """
    lines = read_lines(path)
    names = lines[1].split() if len(lines) > 1 else []
    rows = [line.split() for line in lines[2:] if line.strip()]
    cells = {row[0]: row[1:] for row in rows}

    announced = lines[0].strip() if lines else 'nothing'
    if announced != str(len(cells)):
        raise UserError(f'{path} announces {announced} images and has {len(cells)} rows')
    return names, cells


def read_celeba_partition(path: Path) -> dict[str, str]:
    """Read the split of each image, by its file name: '0', '1' or '2'."""
    rows = [line.split() for line in read_lines(path)]
    return {row[0]: row[1] for row in rows if len(row) >= 2}


# ------------------------------------------------------------------------------------------ folders


def load_folder(
    data_dir: Path, image_size: int | None, split_bounds: Sequence[int] | None = None
) -> ImageData:
    """Load the images in a folder and its sub-folders, cropped square, 64x64 by default.

    The folder may have an attributes.csv, with the columns image, split (optional), and one column
    of 1 and -1 for each attribute. Without splits, an image's path decides which split it is in.

    Arguments:
        data_dir: The folder.
        image_size: Height and width in pixels.
        split_bounds: Those that a run's checkpoint keeps, or [] if it keeps none: its images were
            split by ``random_split``. None, for a new run, stands for ``choose_split_bounds``.
    """
    if not data_dir.is_dir():
        raise UserError(f'{data_dir} is no directory: give one of images by --data_dir')
    files = find_image_files(data_dir)
    if not files:
        raise UserError(
            f'{data_dir} has no images ({" ".join(sorted(SUFFIXES))}): give a directory by '
            '--data_dir'
        )

    signatures = [file_signature(path) for path in files]
    relative_paths = [path.relative_to(data_dir) for path in files]
    file_rows = describe_files(relative_paths, signatures)

    names: list[str] = []
    attributes = np.zeros((len(files), 0), bool)
    parts = None
    table = data_dir / 'attributes.csv'
    table_lines: list[str] = []
    if table.exists():
        table_lines = read_lines(table)
        names, attributes, parts = read_attribute_table(table, list(map(str, relative_paths)))
    if parts is None:
        parts, split_bounds = split_folder(file_rows[:, 0], split_bounds, data_dir)
    bounds = list(split_bounds or [])

    images, images_digest = load_decoded(data_dir, 'folder', files, signatures, image_size or 64)
    source = [images_digest, table_lines, bounds]
    order = np.lexsort(file_rows.T)  # the files' own order depends on the platform
    content = sampled_content([files[i] for i in order])
    fingerprint = digest(['folder', table_lines, content], [file_rows[order]])
    data = make_image_data(images, attributes, names, parts, source, fingerprint)
    return replace(data, split_bounds=bounds, files=torch.from_numpy(file_rows))


def sampled_content(paths: Sequence[Path]) -> list[str]:
    """Return digests of the beginnings of some of the files, at equal distances."""
    digests = []
    for path in paths[:: max(1, len(paths) // N_SAMPLED_FILES)]:
        with open(path, 'rb') as file:
            beginning = file.read(N_SAMPLED_BYTES)
        digests.append(hashlib.sha256(beginning).hexdigest())
    return digests


def describe_files(relative_paths: Sequence[Path], signatures: Sequence[Signature]) -> np.ndarray:
    """Return the path hash and the size in bytes of each file, (N, 2), int64."""
    hashes = np.array([path_hash(path) for path in relative_paths], np.int64)
    sizes = np.array([size for _, size, _ in signatures], np.int64)
    return np.stack([hashes, sizes], axis=1)


def split_folder(
    hashes: np.ndarray, bounds: Sequence[int] | None, source: Path
) -> tuple[list[np.ndarray], Sequence[int]]:
    """Return sorted indices of the train, validation and test images, and the bounds between them.

    ``bounds`` is as in ``load_folder``.
    """
    if bounds is None:
        bounds = choose_split_bounds(hashes, source)
    if not bounds:
        return random_split(len(hashes), source), []
    return split_by_hash(hashes, bounds, source), bounds


def find_image_files(folder: Path) -> list[Path]:
    """Return the images in a folder and its sub-folders, sorted, without hidden ones."""
    files = []
    for path in folder.rglob('*'):
        hidden = any(part.startswith('.') for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and path.is_file() and not hidden:
            files.append(path)
    return sorted(files)


def read_attribute_table(
    path: Path, files: Sequence[str]
) -> tuple[list[str], np.ndarray, list[np.ndarray] | None]:
    """Read an attributes.csv.

    Arguments:
        path: The table. Each of its rows names an image by the path relative to the table or, where
            this is unique, by the file's name alone.
        files: The relative paths of all images.

    Returns the attribute names, the attributes (N, A) in the order of ``files``, and the indices of
    the three splits, or None if there is no column of splits.
    """
    header, *rows = read_csv_rows(path)
    if not header or header[0] != 'image':
        raise UserError(
            f'{path}: the first column must be named image, then split (optional) and the '
            'attributes'
        )

    row_of_file: dict[str, Row] = {}
    for row, file in zip(rows, match_files(rows, files)):
        if file in row_of_file:
            raise UserError(f'{path} has two rows for {row[0]}')
        row_of_file[file] = row
    require_same_images(row_of_file, path, files, path.parent)
    rows = [row_of_file[file] for file in files]

    has_splits = header[1:2] == ['split']
    first = 2 if has_splits else 1
    names = header[first:]
    attributes = parse_attributes(path, names, [row[first:] for row in rows])
    if not has_splits:
        return names, attributes, None
    words = [row[1] if len(row) > 1 else '' for row in rows]
    return names, attributes, split_by_word(path, words, SPLIT_NAMES)


def read_csv_rows(path: Path) -> list[Row]:
    """Return the cells of a table without the spaces around them; at least one row, maybe empty."""
    try:
        rows = [row for row in csv.reader(read_lines(path)) if row]
    except csv.Error as error:
        raise UserError(f'{path} cannot be read as a table: {error}') from error
    stripped = [[cell.strip() for cell in row] for row in rows]
    return stripped or [[]]


def match_files(rows: Sequence[Row], files: Sequence[str]) -> list[str]:
    """Return the relative path of the image of each row, or the row's name of it if unknown."""
    paths_by_name: dict[str, list[str]] = {}
    for file in files:
        paths_by_name.setdefault(os.path.basename(file), []).append(file)

    known = set(files)
    matches = []
    for name, *_ in rows:
        candidates = paths_by_name.get(name, [])
        is_unique_name = name not in known and len(candidates) == 1
        matches.append(candidates[0] if is_unique_name else name)
    return matches


# ----------------------------------------------------------------- parts of CelebA's and own tables


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file in UTF-8; raise ``UserError`` if it cannot be read."""
    try:
        return path.read_text(encoding='utf-8-sig').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read as text: {error}') from error


def require_same_images(
    names: Collection[str], path: Path, other_names: Collection[str], other_path: Path
) -> None:
    """Raise ``UserError`` unless two files or folders have the same images."""
    for here, there, missing in (
        (path, other_path, set(names) - set(other_names)),
        (other_path, path, set(other_names) - set(names)),
    ):
        if missing:
            raise UserError(
                f'{len(missing)} of the images in {here} are not in {there}, '
                f'such as {min(missing)!r}'
            )


def parse_attributes(path: Path, names: Sequence[str], rows: Sequence[Row]) -> np.ndarray:
    """Return cells of '1' and '-1' as booleans (N, A); raise ``UserError`` for any others."""
    are_different = len(set(names)) == len(names)
    if not are_different or not are_printable(names) or len(names) > MAX_ATTRIBUTES:
        raise UserError(
            f'{path}: attribute names must be printable and different from each other, '
            f'{MAX_ATTRIBUTES} at most'
        )
    for row in rows:
        if len(row) != len(names) or not {'1', '-1'}.issuperset(row):
            raise UserError(
                f'{path}: every image needs {len(names)} values 1 or -1, '
                f'one has {" ".join(row)[:60]!r}'
            )
    attributes = np.array([[cell == '1' for cell in row] for row in rows], bool)
    return attributes.reshape(len(rows), len(names))  # also where there are no names


def split_by_word(path: Path, words: Sequence[str], splits: Mapping[str, int]) -> list[np.ndarray]:
    """Return sorted indices of the train, validation and test images.

    Arguments:
        path: Where the words come from, for error messages.
        words: The split of each image.
        splits: 0 (train), 1 (validation) or 2 (test) for each allowed word.
    """
    unknown = set(words) - set(splits)
    if unknown:
        raise UserError(f'{path}: a split is one of {", ".join(splits)}, not {min(unknown)!r}')
    split_of_image = np.array([splits[word] for word in words])
    parts = [np.flatnonzero(split_of_image == split) for split in range(3)]
    if not all(len(part) for part in parts):
        raise UserError(f'{path}: training, validation and test split need at least one image each')
    return parts


# ----------------------------------------------------------------------------------------- decoding


def load_decoded(
    data_dir: Path,
    name: str,
    files: Sequence[Path],
    signatures: Sequence[Signature],
    size: int,
    crop: float = 1.0,
) -> tuple[np.ndarray, str]:
    """Return the images of all files (N, 3, size, size), and a digest of their source.

    They are memory-mapped from the cache of ``data_dir``, and decoded first if necessary; for
    ``crop``, see ``decode_photo``.
    """
    source = [name, CACHE_VERSION, size, crop, signatures]
    shape = (len(files), 3, size, size)

    def decode_all(create: CreateArray) -> None:
        array = create(shape, np.uint8)
        bar = tqdm(desc=f'decoding {name}', total=len(files), unit='image', dynamic_ncols=True)
        with bar:
            decode_in_parallel(str(array.filename), files, size, crop, bar)

    def fits(array: np.ndarray) -> bool:
        return is_image_array(array, shape)

    images = memmap_cache(data_dir, f'{name}_{size}', source, decode_all, fits)
    return images, digest(source)


def decode_in_parallel(
    array_path: str, files: Sequence[Path], size: int, crop: float, bar: tqdm
) -> None:
    """Decode images into the rows of a .npy file, by as many processes as there are cores.

    Processes are used because threads would wait for Python's global lock half of the time.
    """
    starts = range(0, len(files), DECODE_CHUNK)
    n_workers = min(count_usable_cores(), len(starts))
    with ProcessPoolExecutor(n_workers, initializer=exit_with_parent) as pool:
        tasks = []
        for start in starts:
            chunk = files[start : start + DECODE_CHUNK]
            tasks.append(pool.submit(decode_chunk, array_path, start, chunk, size, crop))
        try:
            for task in tasks:
                bar.update(task.result())
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


def exit_with_parent() -> None:
    """Make a worker process exit when its parent does, and leave Ctrl-C to the parent.

    Otherwise, the worker of a killed parent would wait for work forever, and hold the lock of the
    cache, which it has inherited.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, 'only worker processes call this'

    def wait_and_exit() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()


def decode_chunk(array_path: str, start: int, files: Sequence[Path], size: int, crop: float) -> int:
    """Decode images into the rows of a .npy file from ``start`` on; return how many there are."""
    array = np.lib.format.open_memmap(array_path, 'r+')
    for i, path in enumerate(files, start):
        array[i] = decode_photo(path, size, crop)
    return len(files)


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
        image = convert_mode(read_upright(path), path, mode)

    side = round(crop * min(image.size))
    if side < size:
        raise UserError(
            f'{path} is too small: {image.width}x{image.height} pixels leave a square of {side}, '
            f'and --image_size is {size}'
        )
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    resized = square.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(resized).reshape(size, size, -1)
    return pixels.transpose(2, 0, 1)


def read_upright(path: str | Path) -> Image.Image:
    """Read an image and turn it upright; raise ``UserError`` if it is damaged."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return ImageOps.exif_transpose(image)
    except DAMAGED_IMAGE_ERRORS as error:
        raise UserError(f'{path} cannot be decoded as an image: {one_line(error)}') from error


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
