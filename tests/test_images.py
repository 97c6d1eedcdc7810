"""Image data sets: splits and pixels, the cache, and clear errors for damaged or hostile files."""

import errno
import gzip
import multiprocessing
import os
import pickle
import select
import shutil
import struct
import time
from pathlib import PurePosixPath, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import call_with_own_lock
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_data import (
    attribute_rows,
    idx,
    noise_image,
    python2_batch,
    write_celeba,
    write_cifar,
    write_folder,
    write_mnist,
    write_table,
)

from common.errors import UserError
from common.files import path_hash
from datasets import (
    cache,
    drawn_faces,
    grids,
    image_data,
    images,
    load_images,
    load_photo,
    photo_sets,
    photos,
)
from datasets.pickles import array_of, read_pickle

# Worker processes see what a test has patched only where they are forked.
needs_fork = pytest.mark.skipif(
    multiprocessing.get_all_start_methods()[0] != 'fork',
    reason='worker processes are not forked on this platform',
)


@pytest.fixture
def mnist(tmp_path):
    write_mnist(tmp_path)
    return tmp_path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / 'photos')
    return tmp_path / 'photos'


@pytest.fixture
def celeba(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_celeba(tmp_path)
    return tmp_path


def splits(data):
    """Return the three splits of a data set."""
    return data.train, data.validation, data.test


def split_sizes(data):
    """Return the numbers of train, validation and test images."""
    return [len(split.images) for split in splits(data)]


def all_images(data):
    """Return the images of all splits."""
    return np.concatenate([split.images for split in splits(data)])


def all_attributes(data):
    """Return the attributes of all splits."""
    return np.concatenate([split.attributes for split in splits(data)])


# -------------------------------------------------------------------------------------------- faces


def test_faces(tmp_path, monkeypatch):
    data = load_images('faces', tmp_path, 8)
    assert split_sizes(data) == [10_000, 1_000, 1_000]
    assert data.train.images.shape[1:] == (3, 8, 8)
    assert data.train.images.dtype == np.uint8
    assert data.n_values == 192
    assert data.attribute_names[8] == 'Black_Hair'
    assert data.attribute_names[20] == 'Male'
    frequency = data.train.attributes.mean(0)
    assert ((frequency > 0.05) & (frequency < 0.7)).sum() >= 24

    monkeypatch.setattr(images, 'draw_faces', None)  # the second time nothing is drawn
    again = load_images('faces', tmp_path, 8)
    assert (again.test.images == data.test.images).all()
    assert (again.test.attributes == data.test.attributes).all()
    assert again.fingerprint == data.fingerprint


def test_a_face_depends_neither_on_how_many_are_drawn_nor_on_chance():
    few = drawn_faces.draw_faces(3, 16)
    many = drawn_faces.draw_faces(600, 16)
    assert (few == many[:3]).all()
    assert (drawn_faces.face_attributes(3) == drawn_faces.face_attributes(600)[:3]).all()
    assert len(np.unique(many.reshape(600, -1), axis=0)) == 600
    assert (drawn_faces.draw_faces(3, 16, seed=1) != few).any()


def drawn_attributes():
    """Return the attributes that occur, without those that mean that something is absent."""
    share = drawn_faces.face_attributes(5000).mean(0)
    drawn = [name for name, of_faces in zip(drawn_faces.ATTRIBUTES, share) if of_faces > 0]
    return [name for name in drawn if name not in ('No_Beard', 'Straight_Hair')]


@pytest.mark.parametrize('name', drawn_attributes())
def test_every_attribute_shows(name, monkeypatch):
    """The same people with and without an attribute: wherever it can be seen, pixels change."""
    monkeypatch.setattr(drawn_faces, 'BLOCK_SIZE', 60)
    rng = np.random.default_rng(0)
    has = drawn_faces.sample_attributes(rng)
    look = drawn_faces.sample_look(rng)
    always = np.ones(drawn_faces.BLOCK_SIZE, bool)
    has['Wearing_Hat'] = has['Bald'] = has['Eyeglasses'] = ~always  # they hide others

    off = drawn_faces.FacePainter({**has, name: ~always}, look, 32).draw()
    on = drawn_faces.FacePainter({**has, name: always}, look, 32).draw()
    difference = np.abs(on.astype(int) - off)
    change = difference.max(axis=(1, 2, 3))
    assert np.median(change) >= 16, change


# --------------------------------------------------------------------------------- digits and mnist


def test_digits():
    data = load_images('digits')
    pixels = all_images(data)
    assert pixels.shape == (1797, 1, 8, 8)
    assert data.n_values == 64
    assert (pixels == (pixels >> 4) * 17).all()  # four bits hold every value
    assert len(np.unique(pixels)) == 16
    assert (all_attributes(data).sum(1) == 1).all()
    assert len(data.validation.images) == len(data.test.images) == 179


def test_mnist(mnist):
    data = load_images('mnist', mnist)
    content = (mnist / 'train-images-idx3-ubyte').read_bytes()
    raw = np.frombuffer(content[16:], np.uint8).reshape(-1, 28, 28)
    pixels = np.concatenate([data.train.images, data.validation.images])
    assert pixels.shape == (40, 1, 32, 32)
    assert (pixels[:, 0, 2:-2, 2:-2] == raw).all()
    assert pixels.sum(dtype=int) == raw.sum(dtype=int)  # nothing but zeros around

    content = (mnist / 't10k-labels-idx1-ubyte').read_bytes()
    labels = np.frombuffer(content[8:], np.uint8)
    assert (data.test.attributes.argmax(1) == labels).all()
    assert data.n_values == 784
    assert len(data.test.images) == 10


def test_mnist_gzipped_in_a_sub_folder(mnist):
    plain = load_images('mnist', mnist)
    (mnist / 'mnist').mkdir()
    for path in list(mnist.glob('*-ubyte')):
        (mnist / 'mnist' / f'{path.name}.gz').write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    zipped = load_images('mnist', mnist)
    assert (all_images(plain) == all_images(zipped)).all()


@pytest.mark.parametrize(
    'content, part',
    [
        (b'', 'is empty'),
        (idx(np.zeros((40, 28, 28)))[:-1], 'shorter'),
        (idx(np.zeros((40, 28, 28))) + b'x', 'longer'),
        (idx(np.zeros((40, 28, 28)), magic=(0, 0, 13, 3)), '00000d03'),
        (idx(np.zeros((39, 28, 28))), '40 labels'),
        (idx(np.zeros((40, 14, 14))), '14x14'),
        (idx(np.zeros(40)), '00000801'),
        (struct.pack('>4B3I', 0, 0, 8, 3, 2**31, 2**31, 2**31), 'claims'),
    ],
)
def test_bad_idx_files(content, part, mnist):
    path = mnist / 'train-images-idx3-ubyte'
    path.write_bytes(content)
    with pytest.raises(UserError, match=part) as error:
        load_images('mnist', mnist)
    assert str(path) in str(error.value) or 'train-labels' in str(error.value)


def test_labels_out_of_range_and_damaged_gzip(mnist):
    (mnist / 'train-labels-idx1-ubyte').write_bytes(idx(np.full(40, 10)))
    with pytest.raises(UserError, match='labels up to 10'):
        load_images('mnist', mnist)
    path = mnist / 'train-labels-idx1-ubyte'
    damaged = bytearray(gzip.compress(path.read_bytes()))
    damaged[20] ^= 255
    path.unlink()
    (mnist / 'train-labels-idx1-ubyte.gz').write_bytes(damaged)
    with pytest.raises(UserError, match='cannot be read|shorter|labels'):
        load_images('mnist', mnist)


def idx_with_header(shape, rest):
    """Return an idx file whose content need not fit its header."""
    header = struct.pack(f'>4B{len(shape)}I', 0, 0, 8, len(shape), *shape)
    return header + rest


idx_files = st.builds(
    idx_with_header,
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    st.binary(max_size=130),
)


@settings(max_examples=200, deadline=None)
@given(
    n_dims=st.sampled_from([1, 3]),
    content=st.one_of(st.binary(max_size=80), idx_files),
    zipped=st.booleans(),
)
def test_idx_parser_refuses_or_is_right(tmp_path_factory, n_dims, content, zipped):
    folder = tmp_path_factory.mktemp('idx')
    path = folder / ('file.gz' if zipped else 'file')
    path.write_bytes(gzip.compress(content) if zipped else content)
    try:
        array = images.read_idx(path, n_dims)
    except UserError:
        return
    assert array.ndim == n_dims
    assert idx(array) == content


# ------------------------------------------------------------------------------------------ cifar10


@pytest.fixture
def cifar(tmp_path):
    write_cifar(tmp_path / 'cifar-10-batches-py')
    return tmp_path


def test_cifar10(cifar, monkeypatch):
    data = load_images('cifar10', cifar)
    assert split_sizes(data) == [90, 10, 20]
    assert all(split.images.shape[1:] == (3, 32, 32) for split in splits(data))
    first_bytes = all_images(data)[:, 0, 0, 0]
    assert first_bytes.tolist() == list(range(120))  # in their order, validation before test
    assert data.attribute_names[3] == 'cat'
    assert data.n_values == 3072
    classes = all_attributes(data).argmax(1)
    assert classes.tolist() == [i % 10 for i in range(120)]
    raw = (cifar / 'cifar-10-batches-py' / 'test_batch').read_bytes()
    assert data.test.images[7].tobytes() in raw
    monkeypatch.setattr(images, 'read_pickle', None)  # the second time it comes from the cache
    again = load_images('cifar10', cifar)
    assert (all_images(again) == all_images(data)).all()

    photo = cifar / 'photo.png'
    noise_image(50, 40).save(photo)
    assert load_photo(photo, 'cifar10', 32).shape == (3, 32, 32)


class Payload:
    """Prints a line when it is unpickled by the standard library."""

    def __reduce__(self):
        return print, ('it ran',)


def batch(data, labels):
    """Return a pickle in the format of a batch of CIFAR-10."""
    return pickle.dumps({'data': data, 'labels': labels})


def enlarged_batch():
    """Return a batch that claims rows of 2**30 pixels."""
    content = python2_batch(np.zeros((20, 3072), np.uint8), [0] * 20)
    return content.replace(struct.pack('<i', 3072), struct.pack('<i', 2**30))


@pytest.mark.parametrize(
    'content',
    [
        pickle.dumps(Payload()),
        batch(Payload(), [0] * 20),
        b'cos\nsystem\n(S"echo it ran"\ntR.',
        b'cbuiltins\neval\n(S"print(1)"\ntR.',
        b'cnumpy\nload\n(S"x"\ntR.',
        b'',
        b'\x80\x02}',
        pickle.dumps({}),
        pickle.dumps([1, 2]),
        batch(np.zeros((20, 3072)), [0] * 20),
        batch(np.zeros((20, 3071), np.uint8), [0] * 20),
        batch(np.zeros((20, 3072), np.uint8), [10] * 20),
        batch(np.zeros((20, 3072), np.uint8), [0] * 19),
        batch(np.full((20, 3072), None), [0] * 20),
        batch(np.zeros((19, 3072), np.uint8), [0] * 19),
        enlarged_batch(),
        b'\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.',
        b'\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7f\x85R.',
    ],
)
def test_bad_cifar10(content, cifar, capfd):
    path = cifar / 'cifar-10-batches-py' / 'data_batch_3'
    path.write_bytes(content)
    with pytest.raises(UserError, match='cifar-10-batches-py'):
        load_images('cifar10', cifar)
    assert 'it ran' not in capfd.readouterr().out


@pytest.mark.parametrize(
    'name', ['os.system', 'builtins.eval', 'numpy.load', 'pandas.read_pickle', 'torch.load']
)
def test_nothing_else_is_even_looked_up(name, tmp_path):
    lines = '\n'.join(name.split('.'))
    (tmp_path / 'p').write_bytes(f'c{lines}\n.'.encode())
    with pytest.raises(ValueError, match=f'it holds {name}, which no array of numbers needs'):
        read_pickle(tmp_path / 'p')


def test_a_pickle_that_makes_room_for_two_thousand_million_objects(tmp_path):
    (tmp_path / 'p').write_bytes(b'\x80\x02]r\xff\xff\xff\x7f.')
    with pytest.raises(ValueError, match='numbers more objects than it has bytes'):
        read_pickle(tmp_path / 'p')


def random_bytes():
    """Return an array (4, 6) of bytes."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (4, 6), dtype=np.uint8)


@pytest.mark.parametrize('protocol', range(6))
def test_arrays_of_any_protocol(protocol, tmp_path):
    array = random_bytes()
    others = {
        'little': array.astype('<i4'),
        'big': array.astype('>f8'),
        'columns': np.asfortranarray(array),
    }
    arrays = {'data': array, **others}
    content = pickle.dumps(arrays, protocol)
    (tmp_path / 'p').write_bytes(content)
    read = read_pickle(tmp_path / 'p')
    for name, expected in arrays.items():
        assert (array_of(read[name]) == expected).all()
        assert array_of(read[name]).dtype == expected.dtype


def test_an_array_of_python_2(tmp_path):
    array = random_bytes()
    (tmp_path / 'p').write_bytes(python2_batch(array, [1, 2]))
    read = array_of(read_pickle(tmp_path / 'p')['data'])
    assert (read == array).all()
    assert read.dtype == np.uint8


opcodes = st.sampled_from(
    [
        b'(',
        b')',
        b']',
        b'}',
        b't',
        b'R',
        b'b',
        b'0',
        b'1',
        b'2',
        b'N',
        b'K\x05',
        b'J\xff\xff\xff\x7f',
        b'U\x02u1',
        b'.',
        b'T\x05\x00\x00\x00hello',
        b'q\x00',
        b'h\x00',
        b'r\xff\xff\xff\x7f',
        b'a',
        b'e',
        b's',
        b'u',
        b'\x81',
        b'\x85',
        b'\x86',
        b'\x87',
        b'\x93',
        b'\x92',
        b'\x8e\xff\xff\xff\xff\x00\x00\x00\x00',
        b'cnumpy\nndarray\n',
        b'cnumpy\ndtype\n',
        b'cnumpy.core.multiarray\n_reconstruct\n',
        b'c_codecs\nencode\n',
        b'cos\nsystem\n',
        b'cbuiltins\nslice\n',
        b'V1\n',
        b'L9999999L\n',
    ]
)


pickles = st.lists(opcodes, max_size=25).map(b''.join)


@settings(max_examples=300, deadline=None)
@given(
    content=st.one_of(st.binary(max_size=60), pickles),
    ended=st.booleans(),
)
def test_any_pickle_is_refused_or_harmless(tmp_path_factory, content, ended):
    path = tmp_path_factory.getbasetemp() / 'fuzz.pickle'
    path.write_bytes(content + b'.' * ended)
    try:
        rows = images.read_cifar_batch(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert rows.shape == (len(rows), 3073)
        assert rows.dtype == np.uint8


# ------------------------------------------------------------------------------- folders and celeba


def test_folder_without_attributes(folder):
    data = load_images('folder', folder, 16)
    assert split_sizes(data) == [16, 2, 2]
    assert data.attribute_names == ()
    assert data.train.attributes.shape == (16, 0)
    expected = {photos.decode_photo(path, 16).tobytes() for path in folder.rglob('*.png')}
    assert expected == {image.tobytes() for image in all_images(data)}
    assert len(expected) == 20


def test_folder_with_attributes_by_file_name_or_path(folder):
    write_table(folder, attribute_rows())
    data = load_images('folder', folder, 16)
    assert data.attribute_names == ('Odd', 'Big')
    assert split_sizes(data) == [16, 2, 2]
    for i in (0, 3, 15):
        (path,) = folder.rglob(f'{i:02}.png')
        image = photos.decode_photo(path, 16)
        (row,) = np.flatnonzero((data.train.images == image).all((1, 2, 3)))
        assert data.train.attributes[row].tolist() == [i % 2 == 1, True]

    header, *rows = attribute_rows()
    rows_by_path = [(f'{"ab"[i % 2]}/{name}', *cells) for i, (name, *cells) in enumerate(rows)]
    write_table(folder, [header, *rows_by_path])
    assert (all_images(load_images('folder', folder, 16)) == all_images(data)).all()


def with_last_row(*row):
    """Return a change of a table: another last row."""
    return lambda rows: [*rows[:-1], row]


def with_header(*header):
    """Return a change of a table: another header."""
    return lambda rows: [header, *rows[1:]]


def with_all_train(rows):
    """Return a table in which all images are of the train split."""
    header, *rows = rows
    return [header, *[(name, 'train', *cells) for name, _, *cells in rows]]


@pytest.mark.parametrize(
    'change, part',
    [
        (lambda rows: rows[:-1], '1 of the images in .*photos are not in .*attributes.csv'),
        (lambda rows: [*rows, rows[5]], 'two rows'),
        (with_header('file', 'split', 'Odd', 'Big'), 'first column must be named image'),
        (with_last_row('19.png', 'test', 1, 2), "19.png has '2' for Big, which must be 1 and -1"),
        (with_last_row('19.png', 'test', 0, 1), 'Odd has both 0 and -1'),
        (with_last_row('19.png', 'test', 1), '19.png has 1 values for 2 attributes'),
        (with_last_row('19.png', 'tset', 1, 1), 'tset'),
        (with_all_train, 'at least one image'),
        (with_header('image', 'split', 'Odd', 'Odd'), 'different from each other'),
        (with_header('image', 'split', 'Odd', '\x1b[31mred'), 'printable'),
        (lambda rows: [], 'first column'),
    ],
)
def test_bad_attribute_tables(change, part, folder):
    write_table(folder, change(attribute_rows()))
    with pytest.raises(UserError, match=part):
        load_images('folder', folder, 16)


def test_bad_folders(folder, tmp_path):
    (folder / 'a' / 'bad.jpg').write_bytes(b'no image')
    with pytest.raises(UserError, match='bad.jpg cannot be decoded'):
        load_images('folder', folder, 16)
    assert not list(tmp_path.rglob('*.npy*'))  # nothing half done is left
    (folder / 'a' / 'bad.jpg').unlink()

    with pytest.raises(UserError, match='too small'):
        load_images('folder', folder, 19)

    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='has no images'):
        load_images('folder', tmp_path / 'empty')
    with pytest.raises(UserError, match='nowhere is no folder'):
        load_images('folder', tmp_path / 'nowhere')
    noise_image(16, 16).save(tmp_path / 'empty' / 'one.png')
    with pytest.raises(UserError, match='at least 10'):
        load_images('folder', tmp_path / 'empty', 16)


def test_celeba(celeba):
    assert load_images('celeba', celeba).train.images.shape[1:] == (3, 32, 32)  # of so few
    data = load_images('celeba', celeba, 64)
    assert split_sizes(data) == [8, 2, 2]
    assert data.train.images.shape[1:] == (3, 64, 64)
    assert data.attribute_names == drawn_faces.ATTRIBUTES
    assert data.test.attributes[1].tolist() == [(11 + k) % 3 != 0 for k in range(40)]

    path = celeba / 'img_align_celeba' / '000003.jpg'
    with Image.open(path) as image:
        square = image.crop((15, 35, 163, 183))
    pixels = np.asarray(square.resize((64, 64), Image.Resampling.LANCZOS))
    assert (data.train.images[2] == pixels.transpose(2, 0, 1)).all()
    assert (load_photo(path, 'celeba', 64) == data.train.images[2]).all()


def test_celeba_in_its_own_sub_folders(celeba):
    plain = load_images('celeba', celeba)
    folders = {
        'img_align_celeba': 'Img',
        'list_attr_celeba.txt': 'Anno',
        'list_eval_partition.txt': 'Eval',
    }
    for name, sub_folder in folders.items():
        folder = celeba / 'celeba' / sub_folder
        folder.mkdir(parents=True)
        (celeba / name).rename(folder / name)
    assert (all_images(load_images('celeba', celeba)) == all_images(plain)).all()


def replace(old, new, count=-1):
    """Return a change of a text."""
    return lambda text: text.replace(old, new, count)


@pytest.mark.parametrize(
    'name, change, part',
    [
        ('list_attr_celeba.txt', replace('12\n', '13\n', 1), 'announces 13 images and has 12'),
        (
            'list_attr_celeba.txt',
            lambda text: text[:-4] + '\n',
            '000012.jpg has 39 values for 40 attributes',
        ),
        ('list_attr_celeba.txt', replace('-1', '0', 1), '5_o_Clock_Shadow has both 0 and -1'),
        ('list_attr_celeba.txt', replace('000001.jpg', '000099.jpg'), '000001.jpg'),
        ('list_attr_celeba.txt', lambda text: '', 'announces nothing'),
        ('list_eval_partition.txt', replace('000002.jpg 0\n', ''), '000002.jpg'),
        ('list_eval_partition.txt', replace(' 2', ' 3'), "not '3'"),
    ],
)
def test_bad_celeba(name, change, part, celeba):
    path = celeba / name
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=part):
        load_images('celeba', celeba)


def test_attribute_file_that_is_no_text(celeba):
    (celeba / 'list_attr_celeba.txt').write_bytes(b'12\n\xff\xfe')
    with pytest.raises(UserError, match='cannot be read as text'):
        load_images('celeba', celeba)


words = st.sampled_from(['000001.jpg', '1', '-1', '0', 'x', ','])
sentences = st.lists(words, max_size=4).map(' '.join)
lines = st.lists(st.one_of(st.text(max_size=20), sentences), max_size=6)


@settings(max_examples=150, deadline=None)
@given(attributes=lines, partition=lines)
def test_any_attribute_and_partition_file_is_right_or_a_clean_error(
    tmp_path_factory, attributes, partition
):
    folder = tmp_path_factory.getbasetemp() / 'fuzz_celeba'
    (folder / 'img_align_celeba').mkdir(parents=True, exist_ok=True)
    (folder / 'img_align_celeba' / '000001.jpg').touch()
    files = {'list_attr_celeba.txt': attributes, 'list_eval_partition.txt': partition}
    for name, content in files.items():
        (folder / name).write_text('\n'.join(content), encoding='utf-8', errors='replace')

    with pytest.raises(UserError):  # one image cannot make three splits
        load_images('celeba', folder)


cells = st.sampled_from('image split A B a.png b.png c.png train val test 1 -1'.split())
tables = st.lists(st.lists(cells, max_size=4).map(','.join))


@settings(max_examples=150, deadline=None)
@given(content=st.one_of(lines, tables).map('\n'.join))
def test_any_attribute_table_is_right_or_a_clean_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / 'fuzz.csv'
    path.write_text(content, encoding='utf-8', errors='replace')
    names = ['a.png', 'b.png', 'c.png']
    try:
        columns, attributes, words, n_missing = photo_sets.read_attribute_table(path, names)
    except UserError:
        return
    assert attributes.shape == (3, len(columns))
    assert attributes.dtype == bool
    assert words is None or set(words) <= {'train', 'val', 'test'}
    assert n_missing >= 0


# ------------------------------------------------------------------------- changed and moved images


def images_of_splits(data):
    """Return a set of images for each split."""
    return [{image.tobytes() for image in split.images} for split in splits(data)]


def test_images_that_come_or_go_leave_the_others_in_their_split(folder):
    data = load_images('folder', folder, 16)
    for i in range(20, 50):
        noise_image(20, 18, i).save(folder / 'b' / f'{i}.png')
    more = load_images('folder', folder, 16, data.split_bounds)
    assert sum(split_sizes(more)) == 50 and more.split_bounds == data.split_bounds
    assert all(before <= now for before, now in zip(images_of_splits(data), images_of_splits(more)))
    assert 16 < len(more.train.images) < 46  # new images are in more than one split
    assert more.fingerprint != data.fingerprint

    for path in folder.glob('a/0*.png'):
        path.unlink()
    fewer = load_images('folder', folder, 16, data.split_bounds)
    assert sum(split_sizes(fewer)) == 45
    assert all(
        now <= before for before, now in zip(images_of_splits(more), images_of_splits(fewer))
    )


@pytest.mark.parametrize('n', [10, 11, 19, 20, 57, 500])
def test_a_tenth_of_a_folder_validates_and_a_tenth_tests(n):
    hashes = np.array([path_hash(PurePosixPath(f'{i}.png')) for i in range(n)])
    parts = image_data.split_by_hash(
        hashes, image_data.choose_split_bounds(hashes, 'photos'), 'photos'
    )
    assert [len(part) for part in parts] == [n - 2 * (n // 10), n // 10, n // 10]
    assert sorted(np.concatenate(parts)) == list(range(n))


def test_a_path_has_the_same_hash_everywhere():
    expected = path_hash(PurePosixPath('a/caf\N{LATIN SMALL LETTER E WITH ACUTE}.png'))
    assert expected == 2382709396845977982
    assert path_hash(PureWindowsPath('a\\cafe\N{COMBINING ACUTE ACCENT}.png')) == expected
    assert 0 <= path_hash(PurePosixPath('no text \udcff.png')) < 2**62


def test_splits_that_a_table_names_hold_in_every_run(folder):
    write_table(folder, attribute_rows())
    data = load_images('folder', folder, 16)
    for bounds in ([], [2**60, 2**61]):
        again = load_images('folder', folder, 16, bounds)
        assert images_of_splits(again) == images_of_splits(data)
        assert again.split_bounds == bounds


@pytest.mark.parametrize('bounds', [[0, 0], [0, 1], [2**62 - 2, 2**62 - 1]])
def test_bounds_that_leave_a_split_empty(bounds, folder):
    with pytest.raises(UserError, match='photos has no images for the training, validation or'):
        load_images('folder', folder, 16, bounds)


def write_any(name, folder):
    """Write a tiny data set of this name."""
    if name == 'cifar10':
        write_cifar(folder)
    elif name == 'folder':
        write_folder(folder)
        write_table(folder, attribute_rows())
    else:
        {'mnist': write_mnist, 'celeba': write_celeba}[name](folder)


@pytest.mark.parametrize('name', ['mnist', 'cifar10', 'celeba', 'folder'])
def test_a_copy_has_the_same_fingerprint(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_any(name, tmp_path / 'data')
    size = 16 if name == 'folder' else None
    data = load_images(name, tmp_path / 'data', size)
    copy = tmp_path / 'elsewhere' / 'copy'
    shutil.copytree(tmp_path / 'data', copy, ignore=shutil.ignore_patterns('.cache'))
    for path in copy.rglob('*'):
        os.utime(path, (0, 0))

    copied = load_images(name, copy, size)
    assert copied.fingerprint == data.fingerprint
    assert copied.cache_key != data.cache_key
    assert (all_images(copied) == all_images(data)).all()


@pytest.mark.parametrize(
    'name, file, old, new',
    [
        ('mnist', 't10k-labels-idx1-ubyte', b'\x04', b'\x05'),
        ('cifar10', 'test_batch', b'K\x04', b'K\x05'),
        ('celeba', 'list_eval_partition.txt', b'000008.jpg 0', b'000008.jpg 2'),
        ('celeba', 'list_attr_celeba.txt', b'000001.jpg -1', b'000001.jpg  1'),
        ('folder', 'attributes.csv', b'00.png,train,-1', b'00.png,train,1'),
    ],
)
def test_a_change_of_as_many_bytes_changes_the_fingerprint(
    name, file, old, new, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_any(name, tmp_path)
    data = load_images(name, tmp_path, 16 if name == 'folder' else None)
    content = (tmp_path / file).read_bytes()
    assert old in content
    (tmp_path / file).write_bytes(content.replace(old, new, 1))
    changed = load_images(name, tmp_path, 16 if name == 'folder' else None)
    assert changed.fingerprint != data.fingerprint


# -------------------------------------------------------------------------------------------- cache


def test_nothing_is_decoded_twice_and_a_change_is_seen(folder, monkeypatch):
    first = load_images('folder', folder, 16)
    (cache,) = (folder / '.cache').glob('*.npy')
    with monkeypatch.context() as patch:
        patch.setattr(photos, 'decode_photo', None)
        assert (all_images(load_images('folder', folder, 16)) == all_images(first)).all()

    noise_image(20, 18, 77).save(folder / 'a' / '00.png')
    changed = load_images('folder', folder, 16)
    assert (all_images(changed) != all_images(first)).any()
    assert changed.cache_key != first.cache_key
    assert not cache.exists()  # it is stale
    assert len(list((folder / '.cache').glob('*.npy'))) == 1
    load_images('folder', folder, 8)
    assert len(list((folder / '.cache').glob('*.npy'))) == 2


def test_a_damaged_cache_is_made_again(folder):
    first = all_images(load_images('folder', folder, 16)).copy()
    (cache,) = (folder / '.cache').glob('*.npy')
    cache.write_bytes(cache.read_bytes()[:500])
    assert (all_images(load_images('folder', folder, 16)) == first).all()


def test_data_that_cannot_be_written_to_is_cached_elsewhere(folder, tmp_path, monkeypatch):
    original = cache.make_writable

    def make_writable(path):
        return path != folder / '.cache' and original(path)

    monkeypatch.setattr(cache, 'make_writable', make_writable)
    load_images('folder', folder, 16)
    assert not (folder / '.cache').exists()
    assert len(list((tmp_path / 'data' / '.cache').glob('folder_16_*.npy'))) == 1


def test_a_disk_that_others_fill_meanwhile(folder, monkeypatch):
    """The space is reserved first. To write to a mapped file on a full disk ends by SIGBUS."""

    def fill_disk(*args):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'posix_fallocate', fill_disk, raising=False)
    with pytest.raises(UserError, match='folder_16_.*cannot be written.*No space left'):
        load_images('folder', folder, 16)
    assert [path.suffix for path in (folder / '.cache').iterdir()] == ['.lock']


@pytest.mark.parametrize('number', [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_space(number, folder, monkeypatch):
    reserved = []

    def refuse(descriptor, start, size):
        reserved.append(size)
        raise OSError(number, 'not supported')

    monkeypatch.setattr(os, 'posix_fallocate', refuse, raising=False)
    load_images('folder', folder, 16)
    (cache,) = (folder / '.cache').glob('*.npy')
    assert reserved == [cache.stat().st_size]


def load_and_kill(folder, seconds):
    """Load the images of a folder in a process, and kill that process after some time."""
    context = multiprocessing.get_context('fork')
    args = (load_images, 'folder', folder, 48)
    process = context.Process(target=call_with_own_lock, args=args)
    alive, inherited = os.pipe()
    process.start()
    os.close(inherited)
    time.sleep(seconds)
    process.kill()
    process.join()

    # The pipe is closed once the workers of the process are gone, too.
    assert select.select([alive], [], [], 10)[0]
    os.close(alive)


@needs_fork
@pytest.mark.slow
def test_killed_at_any_moment_and_begun_anew(tmp_path):
    """After SIGKILL at five moments, no part of a cache is left, and it can be made again."""
    photos = tmp_path / 'photos'
    photos.mkdir()
    for i in range(150):
        noise_image(60, 50, i).save(photos / f'{i:03}.png')
    start = time.perf_counter()
    load_images('folder', photos, 48)
    seconds = time.perf_counter() - start
    (cache,) = (photos / '.cache').glob('*.npy')
    content = cache.read_bytes()
    cache.unlink()

    rng = np.random.default_rng(0)
    for _ in range(5):
        load_and_kill(photos, rng.uniform(0, seconds))
        assert not cache.exists() or cache.read_bytes() == content
        cache.unlink(missing_ok=True)

    load_images('folder', photos, 48)  # nobody holds the lock any more
    assert cache.read_bytes() == content
    left = [path for path in cache.parent.iterdir() if path.suffix != '.lock']
    assert left == [cache]


@needs_fork
def test_two_at_once_decode_once(folder, tmp_path, capfd):
    original = photos.decode_photo

    def slow_decode(*args):
        time.sleep(0.05)
        with (tmp_path / 'decoded').open('a') as file:
            file.write('x')
        return original(*args)

    def slow_load():
        photos.decode_photo = slow_decode
        load_images('folder', folder, 16)

    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=slow_load) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / 'decoded').read_text() == 20 * 'x'
    assert 'another process prepares folder_16: waiting until it is done' in capfd.readouterr().err


@needs_fork
def test_a_worker_that_is_killed_is_a_clean_error(folder, monkeypatch):
    monkeypatch.setattr(photos, 'decode_photo', lambda *args: os._exit(9))
    with pytest.raises(UserError, match='was killed'):
        load_images('folder', folder, 16)


def test_no_room_for_the_cache(folder, monkeypatch):
    monkeypatch.setattr(cache.shutil, 'disk_usage', lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match='takes 0.0 GB, .* has 0.0 left'):
        load_images('folder', folder, 16)
    assert not list((folder / '.cache').glob('*.npy*'))


# ------------------------------------------------------------------------------------------- photos


PNG_MODES = '1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16'
TIFF_MODES = 'CMYK', 'YCbCr', 'I', 'F'


def grey_image(mode):
    """Return a picture in which all pixels have the middle grey of a mode."""
    grey = np.full((40, 30), 128, np.uint8)
    if mode == 'I;16':
        return Image.fromarray(grey.astype(np.uint16) * 256)
    if mode == 'I':
        return Image.fromarray(grey.astype(np.int32) * 256)
    if mode == 'F':
        return Image.fromarray(grey.astype(np.float32))
    image = Image.fromarray(grey).convert('RGB')
    return image.quantize() if mode == 'P' else image.convert(mode)


@pytest.mark.parametrize('mode', [*PNG_MODES, *TIFF_MODES])
def test_photos_of_every_mode(mode, tmp_path):
    path = tmp_path / ('photo.png' if mode in PNG_MODES else 'photo.tif')
    grey_image(mode).save(path)
    photo = load_photo(path, 'faces', 24)
    assert photo.shape == (3, 24, 24)
    assert photo.dtype == np.uint8
    if mode != '1':
        assert np.abs(photo.astype(int) - 128).max() <= 2


def test_photos_are_cropped_in_the_middle_upright_and_on_white(tmp_path):
    pixels = np.zeros((30, 90, 3), np.uint8)
    pixels[:, 30:60] = (255, 0, 0)
    pixels[:, 60:] = (0, 255, 0)
    Image.fromarray(pixels).save(tmp_path / 'wide.png')
    photo = load_photo(tmp_path / 'wide.png', 'faces', 30)
    assert (photo == np.array([255, 0, 0])[:, None, None]).all()

    turned = Image.fromarray(pixels[:, 30:90])  # red left, green right; upright: red above
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned.save(tmp_path / 'turned.png', exif=exif)
    photo = load_photo(tmp_path / 'turned.png', 'faces', 10)
    assert photo[0, 0].min() == 255
    assert photo[1, -1].min() == 255

    clear = Image.new('RGBA', (20, 20), (0, 0, 0, 0))
    clear.save(tmp_path / 'clear.png')
    assert load_photo(tmp_path / 'clear.png', 'faces', 20).min() == 255


def test_a_large_jpeg_is_decoded_at_half_its_size(tmp_path, monkeypatch):
    """What is done with it afterwards stays the same, and few pixels are decoded as they are."""
    coarse = noise_image(12, 9)
    coarse.resize((960, 720), Image.Resampling.NEAREST).save(tmp_path / 'x.jpg', quality=95)
    whole = load_photo(tmp_path / 'x.jpg', 'folder', 90)
    sizes = []
    monkeypatch.setattr(photos.ImageOps, 'exif_transpose', lambda x, **_: sizes.append(x.size))

    load_photo(tmp_path / 'x.jpg', 'folder', 90)
    monkeypatch.setattr(photos, 'ENOUGH_PIXELS', 360)
    half = load_photo(tmp_path / 'x.jpg', 'folder', 90)
    load_photo(tmp_path / 'x.jpg', 'folder', 361)
    load_photo(tmp_path / 'x.jpg', 'celeba', 301)  # takes 148 of 178 pixels
    assert sizes == [(960, 720), (480, 360), (960, 720), (960, 720)]
    assert np.abs(half.astype(int) - whole).max() <= 8


def test_photos_for_grey_data_sets(tmp_path):
    Image.new('RGB', (60, 60), 'white').save(tmp_path / 'white.png')
    photo = load_photo(tmp_path / 'white.png', 'mnist', 32)
    assert photo.shape == (1, 32, 32)
    assert photo[0, 2:-2, 2:-2].min() == 255
    assert photo.sum(dtype=int) == 255 * 784

    noise_image(16, 16).save(tmp_path / 'noise.png')
    photo = load_photo(tmp_path / 'noise.png', 'digits', 8)
    assert photo.shape == (1, 8, 8)
    assert (photo == (photo >> 4) * 17).all()


def test_bad_photos(tmp_path, monkeypatch):
    noise_image(40, 40).save(tmp_path / 'whole.jpg')
    content = (tmp_path / 'whole.jpg').read_bytes()
    (tmp_path / 'half.jpg').write_bytes(content[:600])
    with pytest.raises(UserError, match='half.jpg cannot be decoded'):
        load_photo(tmp_path / 'half.jpg', 'faces', 32)
    with pytest.raises(UserError, match='there is no photo .*none.jpg'):
        load_photo(tmp_path / 'none.jpg', 'faces', 32)
    with pytest.raises(UserError, match='too small: 40x40'):
        load_photo(tmp_path / 'whole.jpg', 'faces', 64)

    # The image has 1,600 pixels. Pillow itself only warns below twice the limit.
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1500)
    with pytest.raises(UserError, match='more than 1,500 pixels: make it smaller'):
        load_photo(tmp_path / 'whole.jpg', 'faces', 32)


@pytest.mark.parametrize(
    'name, part',
    [
        ('imagenet', 'faces, digits, mnist, cifar10, celeba, folder'),
        ('mnist', 'train-images-idx3-ubyte'),
        ('cifar10', 'data_batch_1'),
        ('celeba', 'img_align_celeba'),
    ],
)
def test_missing_data(name, part, tmp_path):
    with pytest.raises(UserError, match=part):
        load_images(name, tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('name, own', [('digits', 8), ('mnist', 32), ('cifar10', 32)])
def test_sizes_that_cannot_be_chosen(name, own, tmp_path):
    with pytest.raises(UserError, match=f'{own}x{own}'):
        load_images(name, tmp_path, 64)


def test_attributes_by_index_and_by_name():
    data = image_data.ImageData(None, None, None, ('Male', 'Smiling', 'Young'), 1, '')
    assert data.attribute_index('Smiling') == 1
    assert data.attribute_index('2') == 2
    errors = {
        'Smilling': "unknown attribute 'Smilling': the nearest are Smiling",
        '3': 'there are 0 to 2',
        '-1': 'out of range',
        'smiling': 'Smiling',
    }
    for text, part in errors.items():
        with pytest.raises(UserError, match=part):
            data.attribute_index(text)


@pytest.mark.parametrize('size, c, zoom', [(8, 1, 16), (32, 3, 4), (48, 3, 2), (200, 3, 1)])
def test_grid_shows_every_pixel_whole(size, c, zoom):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 256, (n, c, size, size), dtype=np.uint8) for n in (3, 2)]
    picture = np.asarray(grids.draw_grid(rows, ['a label', 'b'], ['x', 'y', 'z']))
    cell = size * zoom
    step = cell + 8
    top = picture.shape[0] - 2 * step
    left = picture.shape[1] - 3 * step
    assert left > 50 and top > 20  # room for the labels

    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            y, x = top + i * step, left + j * step
            shown = picture[y : y + cell, x : x + cell]
            enlarged = image.repeat(zoom, 1).repeat(zoom, 2)
            assert (shown == enlarged.transpose(1, 2, 0)).all()
    rest = picture[top + step :, left + 2 * step :]
    assert (rest == 255).all()  # the shorter row ends in white


def test_labels_of_several_lines():
    row = np.zeros((1, 3, 32, 32), np.uint8)
    labels = ('Male', '-Smiling', 'Male\n-Smiling')
    first, second, both = (grids.draw_grid([row], [label]) for label in labels)
    assert first.height == both.height and first.width < second.width == both.width
    ink = [(255 - np.asarray(picture)).sum(dtype=int) for picture in (first, second, both)]
    of_the_image = 128 * 128 * 3 * 255
    assert ink[2] - of_the_image == pytest.approx(ink[0] + ink[1] - 2 * of_the_image, rel=0.02)


def test_shifts_move_whole_images():
    x = torch.zeros(50, 1, 8, 8, dtype=torch.uint8)
    x[:, :, 3:5, 3:5] = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    shifted = images.shift_randomly(x, 2, torch.Generator().manual_seed(0))
    corners = set()
    for image in shifted:
        i, j = (image[0] == 1).nonzero()[0].tolist()
        square = image[0, i : i + 2, j : j + 2]
        assert square.tolist() == [[1, 2], [3, 4]]
        assert image.sum() == 10
        corners.add((i, j))
    assert {i for i, _ in corners} == {1, 2, 3, 4, 5}
    assert {j for _, j in corners} == {1, 2, 3, 4, 5}


def test_shifts_repeat_the_edge():
    x = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).expand(60, 3, -1, -1)
    shifted = images.shift_randomly(x, 3, torch.Generator().manual_seed(0))
    padded = np.pad(x[0], ((0, 0), (3, 3), (3, 3)), mode='edge')
    windows = np.lib.stride_tricks.sliding_window_view(padded, (4, 4), axis=(1, 2))
    found = set()
    for image in shifted.numpy():
        matches = (windows == image[:, None, None]).all((0, 3, 4))
        found.add(tuple(np.argwhere(matches)[0]))
    assert len(found) > 25  # of 49 shifts


def test_images_with_an_empty_margin_are_shifted_as_if_they_were_a_torus():
    x = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    x[..., 2:-2, 2:-2] = torch.arange(16, dtype=torch.uint8).view(4, 4)
    shifted = images.shift_randomly(x, 2, torch.Generator().manual_seed(0))
    offsets = torch.randint(-2, 3, (2, 20), generator=torch.Generator().manual_seed(0))
    for image, before, (i, j) in zip(shifted, x, offsets.T.tolist()):
        assert torch.equal(image, before.roll((-i, -j), (1, 2)))
