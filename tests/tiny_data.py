"""Small image data sets in exactly the formats of the real ones."""

import csv
import struct

import numpy as np
from PIL import Image

from datasets.drawn_faces import ATTRIBUTES

# -------------------------------------------------------------------------------------------- mnist


def idx(array, magic=None):
    """Return the content of an idx file: unsigned bytes in any number of dimensions."""
    magic = magic or (0, 0, 8, array.ndim)
    header = struct.pack(f'>4B{array.ndim}I', *magic, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist(folder, n_train=40, n_test=10):
    """Write the four files of MNIST with random images and labels."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for part, n in (('train', n_train), ('t10k', n_test)):
        images = rng.integers(0, 256, (n, 28, 28))
        labels = rng.integers(0, 10, n)
        (folder / f'{part}-images-idx3-ubyte').write_bytes(idx(images))
        (folder / f'{part}-labels-idx1-ubyte').write_bytes(idx(labels))


# ------------------------------------------------------------------------------------------ cifar10


def python2_batch(pixels, labels):
    """Return a pickle as in CIFAR-10, written by Python 2: text and bytes are the same type."""
    label_items = b''.join(b'K' + bytes([label]) for label in labels)
    shape = b''.join(b'J' + struct.pack('<i', size) for size in pixels.shape)
    n_bytes = struct.pack('<i', pixels.size)
    return (
        b'\x80\x02}(U\x06labels](' + label_items + b'e'
        b'U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR'
        b'(K\x01' + shape + b'\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R'
        b'(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'
        b'\x89T' + n_bytes + pixels.tobytes() + b'tbu.'
    )


def write_cifar(folder, n=20):
    """Write six batches of n images. Image i of all has i as its first byte, and class i % 10."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    names = [*(f'data_batch_{k}' for k in range(1, 6)), 'test_batch']
    for k, name in enumerate(names):
        numbers = np.arange(k * n, k * n + n)
        pixels = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        pixels[:, 0] = numbers
        (folder / name).write_bytes(python2_batch(pixels, numbers % 10))


# ------------------------------------------------------------------------------- celeba and folders


def noise_image(width, height, seed=0):
    """Return a picture whose pixels are random."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_celeba(folder):
    """Write 12 images in the format of CelebA: 8 of them train, 2 validation, 2 test."""
    (folder / 'img_align_celeba').mkdir(parents=True)
    splits = [0] * 8 + [1] * 2 + [2] * 2
    rows, partition = [], []
    for i, split in enumerate(splits):
        name = f'{i + 1:06}.jpg'
        noise_image(178, 218, i).save(folder / 'img_align_celeba' / name, quality=95)
        cells = [' 1' if (i + k) % 3 else '-1' for k in range(40)]
        rows.append(f'{name} {" ".join(cells)}\n')
        partition.append(f'{name} {split}\n')

    header = f'12\n{" ".join(ATTRIBUTES)} \n'
    (folder / 'list_attr_celeba.txt').write_text(header + ''.join(rows))
    (folder / 'list_eval_partition.txt').write_text(''.join(partition))


def write_celeba_of_kaggle(folder, n):
    """Write n images as Kaggle hands out CelebA: the last two tenths validate and test."""
    photos = folder / 'img_align_celeba' / 'img_align_celeba'
    photos.mkdir(parents=True)
    rows, partition = [('image_id', *ATTRIBUTES)], [('image_id', 'partition')]
    for i in range(n):
        name = f'{i + 1:06}.jpg'
        noise_image(178, 218, i).save(photos / name)
        rows.append((name, *(1 if (i + k) % 3 else -1 for k in range(40))))
        partition.append((name, max(0, 10 * i // n - 7)))
    for table, content in (('list_attr_celeba', rows), ('list_eval_partition', partition)):
        with open(folder / f'{table}.csv', 'w', newline='') as file:
            csv.writer(file).writerows(content)


def write_folder(folder, size=20):
    """Write 20 images into two sub-folders. The smallest is ``size`` wide and ``size - 2`` high."""
    for i in range(20):
        path = folder / 'ab'[i % 2] / f'{i:02}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(size + i, size - 2, i).save(path)


def attribute_rows():
    """Return header and rows of an attributes.csv for the images of ``write_folder``.

    16 images are train, 2 validation and 2 test.
    """
    splits = ['train'] * 16 + ['val', 'validation', 'test', 'test']
    rows = [('image', 'split', 'Odd', 'Big')]
    for i, split in enumerate(splits):
        is_odd = 2 * (i % 2) - 1
        rows.append((f'{i:02}.png', split, is_odd, 1))
    return rows


def write_table(folder, rows):
    """Write rows as attributes.csv."""
    with open(folder / 'attributes.csv', 'w', newline='') as file:
        csv.writer(file).writerows(rows)
