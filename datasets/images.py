"""Image data sets: faces (drawn), digits (scikit-learn's), mnist, cifar10, celeba, image folders.

All come as uint8 arrays (N, C, H, W) with boolean attributes (N, A), in three splits. Images that
must be drawn, or decoded and cropped, are prepared once and stored in an array on disk, which is
memory-mapped from then on. A photo of the user's own is cropped alike.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch

from common.bounds import bounded_memory, open_regular, read_after_trial
from common.errors import UserError, index_of_name, one_line
from common.files import digest, file_signature, first_existing

from .cache import CreateArray, memmap_cache
from .drawn_faces import ATTRIBUTES, draw_faces, face_attributes
from .image_conditions import (
    CLASSES,
    MAX_CONDITIONS,
    ImageCondition,
    condition_of_checkpoint,
    make_condition,
)
from .image_data import (
    ImageData,
    ImageSplit,
    SplitIndex,
    make_image_data,
    one_hot,
    random_split,
    require_files,
    slices_in_order,
)
from .photo_sets import (
    attribute_header,
    find_celeba,
    find_celeba_photos,
    load_celeba,
    load_folder,
    read_celeba_attributes,
    read_csv_rows,
    require_celeba,
)
from .photos import find_image_files, pad_digits
from .pickles import array_of, read_pickle

PHOTO_DATASETS = ('celeba', 'folder')  # each photo is a file, and some of them will do
IMAGE_DATASETS = ('faces', 'digits', 'mnist', 'cifar10', *PHOTO_DATASETS)
CACHE_VERSION = 1  # must be increased whenever the same source would give other pixels

DIGIT_NAMES = tuple('0123456789')
MNIST_FILES = [
    'train-images-idx3-ubyte',
    'train-labels-idx1-ubyte',
    't10k-images-idx3-ubyte',
    't10k-labels-idx1-ubyte',
]
MNIST_VALUES = 28 * 28
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

FACES_SEED = 842
# The test split starts with this one of its faces, a plain one with nothing covered, because the
# first test images are those that are edited by default.
FIRST_TEST_FACE = 4


class ImageOptions(Protocol):
    """The options of a run that say which images it learns."""

    dataset: str
    data_dir: str
    image_size: int
    skip_broken: bool
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
    load = partial(
        load_images,
        config.dataset,
        config.data_dir,
        config.image_size,
        skip_broken=config.skip_broken,
    )
    if saved is None:
        if config.condition and config.condition != [CLASSES]:
            require_attributes(config, config.condition)
        data = load()
        if not config.condition:
            return data
        return with_conditions(data, choose_condition(data, config.condition, source), source)

    require_valid_split(saved)
    data = load(saved['split_bounds'])
    require_same_shape(data, saved, source)
    data = with_conditions(data, condition_of_checkpoint(saved), source)
    if saved['fingerprint'] in ('', data.fingerprint):
        return data

    change = describe_change(config, data.files, saved)
    if not may_differ:
        raise UserError(
            f'{change}; add --accept_changed_data to train on with these images, or give the '
            'former ones by --data_dir'
        )
    return replace(data, notes=(*data.notes, change))


def require_same_shape(data: ImageData, saved: dict[str, Any], source: str) -> None:
    """Raise ``UserError`` where images have another shape than those of a checkpoint's model."""
    shape, known = data.train.images.shape[1:], saved['input_dims'][:3]
    if list(shape) != list(known):
        found, expected = ('x'.join(map(str, dims)) for dims in (shape, known))
        raise UserError(
            f'the images of {source} are {found}, and the model of {saved["path"]} is of {expected}'
        )


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


def values_per_image(name: str, shape: Sequence[int]) -> int:
    """Return the number by which bits/dim of images of this shape are divided.

    The 28x28 images of mnist are padded to 32x32, and 784 values count.
    """
    return MNIST_VALUES if name == 'mnist' else math.prod(shape)


def load_images(
    name: str,
    data_dir: str | Path = 'data',
    image_size: int | None = None,
    split_bounds: Sequence[int] | None = None,
    skip_broken: bool = False,
) -> ImageData:
    """Load an image data set.

    For the images of a run, see ``load_run_images``.

    Arguments:
        name: One of ``IMAGE_DATASETS``.
        data_dir: The folder of its files and of the cache.
        image_size: Height and width in pixels, of data sets that can have several sizes.
        split_bounds: Those of a run, by which photos are split as in its training
            (``load_folder``); by default, they are split as for a new run.
        skip_broken: Whether photos that cannot be decoded, or are too small, are left out.

    Raises ``UserError`` if files are missing or damaged, or the size does not fit.
    """
    loaders: dict[str, Callable[[Path, int | None], ImageData]] = {
        'faces': load_faces,
        'digits': load_digits,
        'mnist': load_mnist,
        'cifar10': load_cifar10,
        'celeba': partial(load_celeba, split_bounds=split_bounds, skip_broken=skip_broken),
        'folder': partial(load_folder, split_bounds=split_bounds, skip_broken=skip_broken),
    }
    require_known_name(name)
    return loaders[name](Path(data_dir), image_size)


def require_known_name(name: str) -> None:
    """Raise ``UserError`` unless there is a data set of this name."""
    if name not in IMAGE_DATASETS:
        advice = ''
        if Path(name).is_dir():
            advice = f'; for a folder of images, --dataset=folder --data_dir={name}'
        raise UserError(f'unknown data set {name!r}: there are {", ".join(IMAGE_DATASETS)}{advice}')


def count_photos(name: str, data_dir: str | Path) -> int:
    """Return how many photos there are of celeba or folder, before any of them is decoded."""
    if name == 'folder':
        return len(find_image_files(Path(data_dir)))
    folder, *_ = require_celeba(Path(data_dir))
    return len(find_celeba_photos(folder))


def find_attribute_names(name: str, data_dir: str | Path) -> Sequence[str]:
    """Return the names of a data set's attributes, before any of its images is loaded.

    There are none where a folder, or CelebA, is not there.
    """
    names = {
        'faces': ATTRIBUTES,
        'digits': DIGIT_NAMES,
        'mnist': DIGIT_NAMES,
        'cifar10': CIFAR_CLASSES,
    }
    if name in names:
        return names[name]
    if name == 'celeba':
        if None in find_celeba(Path(data_dir)).values():
            return []
        _, attribute_path, _ = require_celeba(Path(data_dir))
        return read_celeba_attributes(attribute_path)[0]
    table = Path(data_dir) / 'attributes.csv'
    return attribute_header(table, read_csv_rows(table)[0]) if table.exists() else []


def require_attributes(config: ImageOptions, texts: Sequence[str]) -> None:
    """Raise ``UserError`` unless the images have all these attributes, given by index or name."""
    if config.dataset in PHOTO_DATASETS:
        count_photos(config.dataset, config.data_dir)  # an error where there are none
    names = find_attribute_names(config.dataset, config.data_dir)
    if not names:
        raise UserError(
            f'the images of {config.dataset} in {config.data_dir} have no attributes: for a folder '
            'of images, list them in its attributes.csv'
        )
    for text in texts:
        index_of_name(text, names, 'attribute')


def find_images(name: str, data_dir: str | Path) -> dict[str, Path | None]:
    """Return the paths of the files of a data set in ``data_dir``, None for each missing file.

    There are none for data sets that have no files of their own.
    """
    if name == 'celeba':
        return find_celeba(Path(data_dir))
    candidates = {
        'mnist': {file: [file, f'{file}.gz'] for file in MNIST_FILES},
        'cifar10': {file: [f'cifar-10-batches-py/{file}', file] for file in CIFAR_FILES},
    }
    files = candidates.get(name, {})
    return {file: first_existing(Path(data_dir), name, paths) for file, paths in files.items()}


def require_size(name: str, image_size: int | None, size: int) -> None:
    """Raise ``UserError`` if another size is asked for than the one that the images have."""
    if image_size not in (None, size):
        raise UserError(
            f'--image_size={image_size}: the images of {name} are {size}x{size}, '
            'leave --image_size out'
        )


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


def flip_randomly(x: torch.Tensor, p: float, generator: torch.Generator) -> torch.Tensor:
    """Mirror each image (B, C, H, W), left to right, with probability ``p``."""
    is_flipped = torch.rand(len(x), 1, 1, 1, device=x.device, generator=generator) < p
    return torch.where(is_flipped, x.flip(3), x)


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


def is_image_array(array: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Return whether an array has this shape and holds bytes."""
    return array.shape == shape and array.dtype == np.uint8


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
        find_images('mnist', data_dir),
        ' (gzipped or not)',
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
        n_values=MNIST_VALUES,
    )


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
    try:
        with open_regular(path) as packed, bounded_memory(path):
            file: Any = gzip.open(packed) if path.suffix == '.gz' else packed
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
        find_images('cifar10', data_dir),
        ' of its Python version',
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
        pixels, labels = read_after_trial(unpickle_batch, path)
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


def unpickle_batch(path: Path) -> tuple[Any, np.ndarray]:
    """Return what a batch has as its pixels, and its labels."""
    batch = read_pickle(path)
    return array_of(batch['data']), array_of_labels(batch['labels'])


def array_of_labels(labels: Any) -> np.ndarray:
    """Return a list of numbers as an array. Raises ``TypeError`` for a list of anything else."""
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise TypeError('its labels are no list of numbers')
    return np.array(labels)


def is_cifar_batch(pixels: Any, labels: np.ndarray) -> bool:
    """Return whether there are images, with a label from 0 to 9 for each."""
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        return False
    if pixels.shape[1:] != (CIFAR_ROW - 1,) or len(pixels) == 0:
        return False
    if labels.shape != (len(pixels),):
        return False
    return bool(np.isin(labels, np.arange(10)).all())
