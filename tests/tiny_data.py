"""Small data sets in exactly the formats of the real ones."""

import csv
import struct

import numpy as np
from PIL import Image

from datasets.faces import ATTRIBUTES


def idx(array, magic=None):
    """An idx file's content: unsigned bytes in any number of dimensions"""
    header = struct.pack(f'>4B{array.ndim}I', *(magic or (0, 0, 8, array.ndim)), *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist(folder, n_train=40, n_test=10):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for part, n in (('train', n_train), ('t10k', n_test)):
        (folder / f'{part}-images-idx3-ubyte').write_bytes(idx(rng.integers(0, 256, (n, 28, 28))))
        (folder / f'{part}-labels-idx1-ubyte').write_bytes(idx(rng.integers(0, 10, n)))


def python2_batch(pixels, labels):
    """A pickle of CIFAR-10's, as python 2 wrote it: text and the array's bytes are strings of one kind"""
    shape = b''.join(b'J' + struct.pack('<i', size) for size in pixels.shape)
    return (
        b'\x80\x02}(U\x06labels](' + b''.join(b'K' + bytes([label]) for label in labels) + b'e'
        b'U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR'
        b'(K\x01' + shape + b'\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R'
        b'(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'
        b'\x89T' + struct.pack('<i', pixels.size) + pixels.tobytes() + b'tbu.'
    )


def write_cifar(folder, n=20):
    """Six batches of n images; image i of all shows its number in its first byte"""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for k, name in enumerate([*(f'data_batch_{k}' for k in range(1, 6)), 'test_batch']):
        pixels = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        pixels[:, 0] = np.arange(k * n, k * n + n)
        (folder / name).write_bytes(
            python2_batch(pixels, [i % 10 for i in range(k * n, k * n + n)])
        )


def noise_image(width, height, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def write_celeba(folder):
    """12 images: 8 of them train, 2 validation, 2 test"""
    names = [f'{i:06}.jpg' for i in range(1, 13)]
    (folder / 'img_align_celeba').mkdir(parents=True)
    for i, name in enumerate(names):
        noise_image(178, 218, i).save(folder / 'img_align_celeba' / name, quality=95)
    rows = [
        f'{name} ' + ' '.join(' 1' if (i + k) % 3 else '-1' for k in range(40))
        for i, name in enumerate(names)
    ]
    (folder / 'list_attr_celeba.txt').write_text(
        '\n'.join(['12', ' '.join(ATTRIBUTES) + ' ', *rows]) + '\n'
    )
    (folder / 'list_eval_partition.txt').write_text(
        ''.join(f'{name} {0 if i < 8 else 1 if i < 10 else 2}\n' for i, name in enumerate(names))
    )


def write_folder(folder, size=20):
    """20 images in two sub-folders, the smallest size x size - 2"""
    for i in range(20):
        path = folder / 'ab'[i % 2] / f'{i:02}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(size + i, size - 2, i).save(path)


def attribute_rows():
    """Header and rows of an attributes.csv for write_folder's images: 16 train, 2 validation, 2 test"""
    split = ['train'] * 16 + ['val', 'validation', 'test', 'test']
    return [('image', 'split', 'Odd', 'Big')] + [
        (f'{i:02}.png', split[i], 2 * (i % 2) - 1, 1) for i in range(20)
    ]


def write_table(folder, rows):
    with open(folder / 'attributes.csv', 'w', newline='') as file:
        csv.writer(file).writerows(rows)
