"""Image data sets: faces (drawn), digits (scikit-learn's), mnist, cifar10, celeba, and any folder of images.

All come as uint8 arrays (N, C, H, W) with boolean attributes (N, A), in three splits. What has to be drawn or decoded
is so once, into an array on disk that is memory-mapped from then on.
"""

import csv
import gzip
import multiprocessing
import os
import signal
import threading
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from common.errors import UserError, index_of_name, one_line, truncate
from common.files import digest, file_signature, first_existing, write_atomically

from .cache import memmap_cache
from .faces import ATTRIBUTES, draw_faces, face_attributes
from .pickles import read_pickle, value

IMAGE_DATASETS = ('faces', 'digits', 'mnist', 'cifar10', 'celeba', 'folder')
FORMATS = (
    'JPEG',
    'PNG',
    'BMP',
    'WEBP',
    'GIF',
    'TIFF',
    'PPM',
)  # whatever a file is named; Pillow gives others to programs
SUFFIXES = {'.jpg', '.jpeg', '.png', '.bmp', '.webp', '.gif', '.tif', '.tiff', '.ppm', '.pgm'}
SPLITS = {'train': 0, 'validation': 1, 'val': 1, 'valid': 1, 'test': 2}
TEN_CLASSES = tuple('0123456789')
MNIST_FILES = [
    f'{part}-{kind}'
    for part in ('train', 't10k')
    for kind in ('images-idx3-ubyte', 'labels-idx1-ubyte')
]
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
CELEBA_FILES = 'img_align_celeba', 'list_attr_celeba.txt', 'list_eval_partition.txt'
CACHE_VERSION = 1  # raised whenever the same source would give other pixels
FACES_SEED = 842
FACES_FIRST = (
    4  # of the test split, so that what is edited by default is a plain face with nothing covered
)
CELEBA_CROP = 148 / 178  # share of an image's shorter side that is kept
DECODED_AT_ONCE = 64  # images a process takes at a time
MAX_ATTRIBUTES = 1000


@dataclass(frozen=True)
class ImageSplit:
    images: np.ndarray  # (N, C, H, W) uint8, perhaps memory-mapped
    attributes: np.ndarray  # (N, A) bool; A = 0 where there are none


@dataclass(frozen=True)
class ImageData:
    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit
    attribute_names: tuple
    n_values: (
        int  # by which bits/dim is divided: C H W, but 784 for mnist, which is padded to 32x32
    )
    max_shift: int  # training images may be shifted by up to so many pixels
    fingerprint: str  # digest of what the images were made from

    def attribute_index(self, text):
        """'8' or 'Black_Hair' -> 8; raises UserError with the nearest names"""
        return index_of_name(text, self.attribute_names, 'attribute')

    def editable(self, texts, n, source):
        """-> indices of the attributes that texts name, by default of all, that differ among the first n training images.
        UserError where there are none, or one that is named does not."""
        has = self.train.attributes[:n]
        differs = has.any(0) & ~has.all(0)
        if not differs.any():
            raise UserError(
                f'the images of {source} have no attributes that differ: a folder has those of its attributes.csv'
            )
        chosen = (
            [self.attribute_index(text) for text in texts]
            if texts
            else np.flatnonzero(differs).tolist()
        )
        for i in chosen:
            if not differs[i]:
                raise UserError(
                    f'attribute {i} ({self.attribute_names[i]}) is the same in all training images: it cannot '
                    'be edited'
                )
        return chosen


def load_images(name, data_dir='data', image_size=None):
    """-> ImageData of one of IMAGE_DATASETS; image_size in pixels a side. Raises UserError."""
    loaders = {
        'faces': load_faces,
        'digits': load_digits,
        'mnist': load_mnist,
        'cifar10': load_cifar10,
        'celeba': load_celeba,
        'folder': load_folder,
    }
    if name not in loaders:
        raise UserError(f'unknown data set {name!r}: there are {", ".join(IMAGE_DATASETS)}')
    return loaders[name](Path(data_dir), image_size)


def find_images(name, data_dir):
    """-> what the named data set consists of in data_dir, a path or None each; [] if it needs no files of its own"""
    places = {
        'mnist': [[file, f'{file}.gz'] for file in MNIST_FILES],
        'cifar10': [[f'cifar-10-batches-py/{file}', file] for file in CIFAR_FILES],
        'celeba': [
            [file, f'{folder}/{file}']
            for file, folder in zip(CELEBA_FILES, ('Img', 'Anno', 'Eval'))
        ],
    }
    return [first_existing(Path(data_dir), name, candidates) for candidates in places.get(name, [])]


def load_photo(path, name, image_size):
    """A user's photo, cropped and resized as the named data set's own images -> (C, image_size, image_size) uint8"""
    if name == 'mnist':
        return np.pad(decode(path, 28, mode='L'), ((0, 0), (2, 2), (2, 2)))
    if name == 'digits':
        return decode(path, 8, mode='L') // 16 * 17
    return decode(path, image_size, CELEBA_CROP if name == 'celeba' else 1.0)


def shift_randomly(x, max_shift, generator):
    """Each image of a tensor (B, C, H, W) moved by up to max_shift pixels both ways; its margin, empty, wraps round"""
    b, _, h, w = x.shape
    dy, dx = torch.randint(
        -max_shift, max_shift + 1, (2, b, 1), device=x.device, generator=generator
    )
    rows = (torch.arange(h, device=x.device) + dy) % h
    columns = (torch.arange(w, device=x.device) + dx) % w
    return x[
        torch.arange(b, device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None]
    ].permute(0, 3, 1, 2)


def make_image_data(images, attributes, names, parts, source, n_values=None, max_shift=0):
    """parts: slices or indices of the train, validation and test splits -> ImageData"""
    splits = [ImageSplit(images[part], attributes[part]) for part in parts]
    n_values = n_values or int(np.prod(images.shape[1:]))
    return ImageData(*splits, tuple(names), n_values, max_shift, digest(source))


def seeded_parts(n, where):
    """80/10/10 of n images, shuffled once and for all -> three arrays of sorted indices"""
    if n < 10:
        raise UserError(
            f'{where} has {n} images: at least 10 are needed for a split into train, validation and test'
        )
    order = np.random.default_rng(0).permutation(n)
    return [np.sort(part) for part in np.split(order, [n - 2 * (n // 10), n - n // 10])]


def is_pixels(*shape):
    return lambda array: (array.shape, array.dtype) == (shape, np.uint8)


def save_grid(path, *grid):
    write_atomically(Path(path), lambda temporary: draw_grid(*grid).save(temporary, format='png'))
    tqdm.write(f'wrote {path}')


def draw_grid(rows, row_labels=(), column_labels=()):
    """Rows of uint8 images (n, C, H, W) -> PIL image: whole-number enlargement, margins, labels left and above"""
    c, h, w = rows[0].shape[1:]
    row_labels = [truncate(label) for label in row_labels]
    zoom = max(1, 128 // max(h, w))
    h, w, gap, font = h * zoom, w * zoom, 8, ImageFont.load_default(18)
    left = gap + max([int(font.getlength(label)) + 2 * gap for label in row_labels], default=0)
    top = gap + (18 + gap if column_labels else 0)
    canvas = Image.new(
        'RGB', (left + len(rows[0]) * (w + gap), top + len(rows) * (h + gap)), 'white'
    )
    draw = ImageDraw.Draw(canvas)
    for i, j in ((i, j) for i, row in enumerate(rows) for j in range(len(row))):
        pixels = rows[i][j].transpose(1, 2, 0).repeat(zoom, 0).repeat(zoom, 1)
        canvas.paste(
            Image.fromarray(pixels[..., 0] if c == 1 else pixels),
            (left + j * (w + gap), top + i * (h + gap)),
        )
    for i, label in enumerate(row_labels):
        draw.text((left - 2 * gap, top + i * (h + gap) + h // 2), label, 'black', font, anchor='rm')
    for j, label in enumerate(column_labels):
        draw.text((left + j * (w + gap) + w // 2, top - gap - 2), label, 'black', font, anchor='ms')
    return canvas


# ------------------------------------------------------------------------------------- drawn and bundled sets


def load_faces(data_dir, image_size):
    size, n_train, n_held_out = image_size or 32, 10_000, 1_000
    n = n_train + 2 * n_held_out
    source = ['faces', CACHE_VERSION, size, n, FACES_SEED]
    images = memmap_cache(
        data_dir,
        f'faces_{size}',
        source,
        lambda create: np.copyto(
            create((n, 3, size, size), np.uint8), draw_faces(n, size, FACES_SEED)
        ),
        is_pixels(n, 3, size, size),
    )
    test = np.roll(np.arange(n_train + n_held_out, n), -FACES_FIRST)
    parts = slice(0, n_train), slice(n_train, n_train + n_held_out), test
    return make_image_data(images, face_attributes(n, FACES_SEED), ATTRIBUTES, parts, source)


def load_digits(data_dir, image_size):
    """scikit-learn's 1,797 handwritten digits, 8x8 with values 0..16; the topmost two merged, 4 bits hold them all"""
    from sklearn.datasets import load_digits as load

    require_size('digits', image_size, 8)
    pixels, labels = load(return_X_y=True)
    images = (np.minimum(pixels, 15) * 17).astype(np.uint8).reshape(-1, 1, 8, 8)
    return make_image_data(
        images,
        np.eye(10, dtype=bool)[labels],
        TEN_CLASSES,
        seeded_parts(len(images), 'digits'),
        ['digits'],
    )


def require_size(name, given, own):
    if given not in (None, own):
        raise UserError(
            f'--image_size={given}: the images of {name} are {own}x{own}, leave --image_size out'
        )


# ------------------------------------------------------------------------------------------------------ mnist


def load_mnist(data_dir, image_size):
    """The four idx files of LeCun, Cortes and Burges, gzipped or not; the last 5,000 training images validate.

    28x28, padded with zeros to 32x32 on one channel; bits/dim counts the 784 values of the digit itself.
    """
    require_size('mnist', image_size, 32)
    paths = find_images('mnist', data_dir)
    if None in paths:
        raise UserError(
            f'mnist is not in {data_dir}: it needs {", ".join(MNIST_FILES)} (gzipped or not): '
            f'python -m datasets fetch mnist --data_dir={data_dir}'
        )
    arrays = [
        read_idx(path, 3 if 'images' in name else 1) for path, name in zip(paths, MNIST_FILES)
    ]
    for (images, labels), path in zip((arrays[:2], arrays[2:]), paths[1::2]):
        if len(images) != len(labels) or images.shape[1:] != (28, 28) or labels.max(initial=0) > 9:
            raise UserError(
                f'{path}: {len(labels)} labels up to {labels.max(initial=0)} do not fit '
                f'{len(images)} images of {images.shape[1]}x{images.shape[2]}'
            )
    n_train, n_validation = len(arrays[0]), min(5000, len(arrays[0]) // 10)
    images = np.pad(np.concatenate(arrays[::2])[:, None], ((0, 0), (0, 0), (2, 2), (2, 2)))
    attributes = np.eye(10, dtype=bool)[np.concatenate(arrays[1::2])]
    parts = (
        slice(0, n_train - n_validation),
        slice(n_train - n_validation, n_train),
        slice(n_train, None),
    )
    return make_image_data(
        images,
        attributes,
        TEN_CLASSES,
        parts,
        ['mnist', *map(file_signature, paths)],
        n_values=784,
        max_shift=1,
    )


def read_idx(path, n_dims):
    """An idx file of unsigned bytes -> array. No more is read than its header promises, and that is bounded."""
    try:
        with (gzip.open if path.suffix == '.gz' else open)(path, 'rb') as file:
            header = file.read(4 + 4 * n_dims)
            magic = bytes([0, 0, 8, n_dims])
            if len(header) < 4 + 4 * n_dims or header[:4] != magic:
                raise UserError(
                    f'{path} is not an idx file of bytes in {n_dims} dimensions: its header is '
                    f'{header[:4].hex() or "empty"}, not {magic.hex()}'
                )
            shape = [int.from_bytes(header[4 + 4 * i : 8 + 4 * i], 'big') for i in range(n_dims)]
            size = int(np.prod(shape, dtype=object))
            if size > 2**26:
                raise UserError(
                    f'{path} claims to hold {"x".join(map(str, shape))} bytes, which no MNIST file does'
                )
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f'{path} cannot be read: {error}; download it again') from None
    if len(content) != size:
        raise UserError(
            f'{path} is {"longer" if len(content) > size else "shorter"} than the {size} bytes that its '
            'header promises; download it again'
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


# ---------------------------------------------------------------------------------------------------- cifar10


def load_cifar10(data_dir, image_size):
    """The python version of Krizhevsky (2009), 32x32 in ten classes; the last tenth of the training images, in order,
    validates. The cache has the layout of the binary version: a row an image, its label and then its pixels."""
    require_size('cifar10', image_size, 32)
    paths = find_images('cifar10', data_dir)
    if None in paths:
        raise UserError(
            f'cifar10 is not in {data_dir}: it needs {", ".join(CIFAR_FILES)} of its python version: '
            f'python -m datasets fetch cifar10 --data_dir={data_dir}'
        )
    source = ['cifar10', CACHE_VERSION, *map(file_signature, paths)]

    def unpickle(create):
        batches = [read_cifar_batch(path) for path in paths]
        if len(set(map(len, batches))) > 1:
            raise UserError(
                f'{paths[0].parent}: its batches hold {", ".join(str(len(batch)) for batch in batches)} images, '
                'and should all hold the same number'
            )
        create((len(paths) * len(batches[0]), 3073), np.uint8)[:] = np.concatenate(batches)

    def fits(rows):
        return (
            rows.shape[1:] == (3073,)
            and rows.dtype == np.uint8
            and len(rows)
            and len(rows) % len(paths) == 0
            and rows[:, 0].max() < 10
        )

    rows = memmap_cache(data_dir, 'cifar10', source, unpickle, fits)
    n_test = len(rows) // len(paths)
    n_train, n_validation = len(rows) - n_test, n_test // 2
    parts = (
        slice(0, n_train - n_validation),
        slice(n_train - n_validation, n_train),
        slice(n_train, None),
    )
    attributes = np.eye(10, dtype=bool)[rows[:, 0]]
    return make_image_data(
        rows[:, 1:].reshape(-1, 3, 32, 32), attributes, CIFAR_CLASSES, parts, source
    )


def read_cifar_batch(path):
    """-> rows (N, 3073) uint8: the label, then the 3x32x32 pixels"""
    try:
        batch = read_pickle(path)
        pixels, labels = value(batch['data']), np.array(batch['labels'])
    except Exception as error:  # of what stands for an array anything may be missing
        raise UserError(
            f'{path} cannot be read as a batch of cifar10: {one_line(error)}; fetch it again'
        ) from None
    if (
        getattr(pixels, 'dtype', None) != np.uint8
        or pixels.shape != (len(pixels), 3072)
        or not len(pixels)
        or labels.shape != (len(pixels),)
        or not np.isin(labels, np.arange(10)).all()
    ):
        raise UserError(
            f'{path} holds no bytes of 3x32x32 images with a label from 0 to 9 each; fetch it again'
        )
    return np.column_stack([labels.astype(np.uint8), pixels])


# ---------------------------------------------------------------------------------------- celeba and folders


def load_celeba(data_dir, image_size):
    """CelebA as it ships (Liu et al., 2015): aligned images, 40 attributes, and its own partition"""
    paths = find_images('celeba', data_dir)
    if None in paths:
        raise UserError(
            f'celeba is not in {data_dir}: it needs {", ".join(CELEBA_FILES)}, which its owners hand out: '
            f'python -m datasets fetch celeba --data_dir={data_dir} says how'
        )
    folder, attribute_path, partition_path = paths
    lines = read_lines(attribute_path)
    names = lines[1].split() if len(lines) > 1 else []
    table = {line.split()[0]: line.split()[1:] for line in lines[2:] if line.strip()}
    partition = dict(
        line.split()[:2] for line in read_lines(partition_path) if len(line.split()) >= 2
    )
    if not lines or lines[0].strip() != str(len(table)):
        raise UserError(
            f'{attribute_path} announces {lines[0].strip() if lines else "nothing"} images and has '
            f'{len(table)} rows'
        )
    require_same_names(table, attribute_path, partition, partition_path)
    require_same_names(table, attribute_path, {entry.name for entry in os.scandir(folder)}, folder)
    rows = [(name, partition[name], table[name]) for name in sorted(table)]
    attributes = parse_attributes(attribute_path, names, [row[2] for row in rows])
    parts = split_parts(partition_path, [row[1] for row in rows], {'0': 0, '1': 1, '2': 2})
    size = image_size or 64
    images, source = decode_all(
        data_dir, 'celeba', [folder / row[0] for row in rows], size, CELEBA_CROP
    )
    return make_image_data(
        images,
        attributes,
        names,
        parts,
        [source, [file_signature(attribute_path), file_signature(partition_path)]],
    )


def load_folder(data_dir, image_size):
    """Any images below data_dir, cropped square; an attributes.csv (image, split, columns of 1 / -1) may be there"""
    if not data_dir.is_dir():
        raise UserError(f'{data_dir} is no directory: give one of images by --data_dir')
    files = sorted(
        path
        for path in data_dir.rglob('*')
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith('.') for part in path.relative_to(data_dir).parts)
    )
    if not files:
        raise UserError(
            f'{data_dir} has no images ({" ".join(sorted(SUFFIXES))}): give a directory by --data_dir'
        )
    table = data_dir / 'attributes.csv'
    names, attributes, parts = [], np.zeros((len(files), 0), bool), None
    if table.exists():
        names, attributes, parts = read_attribute_table(
            table, [str(path.relative_to(data_dir)) for path in files]
        )
    parts = parts or seeded_parts(len(files), data_dir)
    images, source = decode_all(data_dir, 'folder', files, image_size or 64)
    return make_image_data(
        images,
        attributes,
        names,
        parts,
        [source, file_signature(table) if table.exists() else None],
    )


def read_attribute_table(path, files):
    """-> attribute names, attributes (N, A) in the order of files, and the three splits, None without a split column

    A row's image is a path relative to the table or, where that is unique, a file's bare name.
    """
    try:
        header, *rows = [
            [cell.strip() for cell in row] for row in csv.reader(read_lines(path)) if row
        ] or [[]]
    except csv.Error as error:
        raise UserError(f'{path} cannot be read as a table: {error}') from None
    if not header or header[0] != 'image':
        raise UserError(
            f'{path}: the first column must be named image, then split (optional) and the attributes'
        )
    bare = {}
    for file in files:
        bare.setdefault(os.path.basename(file), []).append(file)
    known = set(files)
    table = {}
    for row in rows:
        name = row[0] if row[0] in known or len(bare.get(row[0], ())) != 1 else bare[row[0]][0]
        if name in table:
            raise UserError(f'{path} has two rows for {row[0]}')
        table[name] = row
    require_same_names(table, path, known, path.parent)
    rows = [table[file] for file in files]
    n_before = 2 if header[1:2] == ['split'] else 1
    attributes = parse_attributes(path, header[n_before:], [row[n_before:] for row in rows])
    parts = split_parts(path, [(*row, '')[1] for row in rows], SPLITS) if n_before == 2 else None
    return header[n_before:], attributes, parts


def read_lines(path):
    try:
        return path.read_text(encoding='utf-8-sig').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read as text: {error}') from None


def require_same_names(names, where, others, elsewhere):
    for here, in_here, there, in_there in (
        (where, names, elsewhere, others),
        (elsewhere, others, where, names),
    ):
        missing = set(in_here) - set(in_there)
        if missing:
            raise UserError(
                f'{len(missing)} of the images in {here} are not in {there}, such as {min(missing)!r}'
            )


def parse_attributes(path, names, rows):
    """Cells '1' and '-1' -> (N, A) bool"""
    if not len(set(names)) == len(names) <= MAX_ATTRIBUTES or not all(
        name.isprintable() and name for name in names
    ):
        raise UserError(
            f'{path}: attribute names must be printable and different from each other, {MAX_ATTRIBUTES} at most'
        )
    for row in rows:
        if len(row) != len(names) or not {'1', '-1'}.issuperset(row):
            raise UserError(
                f'{path}: every image needs {len(names)} values 1 or -1, one has {" ".join(row)[:60]!r}'
            )
    return np.array([[cell == '1' for cell in row] for row in rows], bool).reshape(
        len(rows), len(names)
    )


def split_parts(path, words, meaning):
    """One word an image -> sorted indices of the train, validation and test images"""
    unknown = set(words) - set(meaning)
    if unknown:
        raise UserError(f'{path}: a split is one of {", ".join(meaning)}, not {min(unknown)!r}')
    which = np.array([meaning[word] for word in words])
    parts = [np.flatnonzero(which == k) for k in range(3)]
    if not all(map(len, parts)):
        raise UserError(f'{path}: training, validation and test split need at least one image each')
    return parts


def decode_all(data_dir, name, files, size, crop=1.0):
    """-> memory-mapped images (N, 3, size, size) of all the files, and what identifies them"""
    source = [name, CACHE_VERSION, size, crop, [file_signature(path) for path in files]]

    def decode_in_parallel(create):
        out = create((len(files), 3, size, size), np.uint8)
        starts = range(0, len(files), DECODED_AT_ONCE)
        # processes, as threads spend half of their time waiting for each other's Python
        with (
            ProcessPoolExecutor(min(n_cores(), len(starts)), initializer=end_with_parent) as pool,
            tqdm(
                desc=f'decoding {name}', total=len(files), unit='image', dynamic_ncols=True
            ) as bar,
        ):
            tasks = [
                pool.submit(
                    decode_into, out.filename, i, files[i : i + DECODED_AT_ONCE], size, crop
                )
                for i in starts
            ]
            try:
                for task in tasks:
                    bar.update(task.result())
            except BrokenProcessPool:
                raise UserError(
                    'a process that decoded images was killed, perhaps for want of memory'
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)  # an error stops the others early

    fits = is_pixels(len(files), 3, size, size)
    return memmap_cache(data_dir, f'{name}_{size}', source, decode_in_parallel, fits), digest(
        source
    )


def n_cores():
    """How many this process may use"""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def end_with_parent():
    """A worker whose parent is killed would wait for work for ever, and hold the lock that it has inherited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # that is for the parent to handle
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def decode_into(array_path, first, files, size, crop):
    """Writes the images of files to the array's rows from first on -> how many"""
    out = np.lib.format.open_memmap(array_path, 'r+')
    for k, path in enumerate(files):
        out[first + k] = decode(path, size, crop)
    return len(files)


def decode(path, size, crop=1.0, mode='RGB'):
    """An image file, upright, its central square of crop times the shorter side, resized -> (C, size, size) uint8"""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of odd metadata
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith('I'):  # 16 bits
                    image = Image.fromarray(
                        (np.asarray(image).clip(0, 65535) // 256).astype(np.uint8)
                    )
                if image.has_transparency_data:
                    image = Image.alpha_composite(
                        Image.new('RGBA', image.size, 'white'), image.convert('RGBA')
                    )
                image = image.convert(mode)
    except Exception as error:  # a damaged image fails in too many ways to list
        raise UserError(f'{path} cannot be decoded as an image: {one_line(error)}') from None
    side = round(crop * min(image.size))
    if side < size:
        raise UserError(
            f'{path} is too small: {image.width}x{image.height} pixels leave a square of {side}, '
            f'and --image_size is {size}'
        )
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize(
        (size, size), Image.Resampling.LANCZOS
    )
    return np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1)
