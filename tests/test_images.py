"""The image data sets: right splits and pixels, one cache, and a clear refusal of what is damaged or hostile."""

import gzip
import multiprocessing
import os
import pickle
import select
import struct
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
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
from datasets import cache, faces, images, load_images, load_photo
from datasets.pickles import read_pickle, value


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


def all_images(data):
    return np.concatenate([part.images for part in (data.train, data.validation, data.test)])


# ------------------------------------------------------------------------------------------------------ faces


def test_faces(tmp_path, monkeypatch):
    data = load_images('faces', tmp_path, 8)
    assert [len(part.images) for part in (data.train, data.validation, data.test)] == [
        10_000,
        1_000,
        1_000,
    ]
    assert (
        data.train.images.shape[1:] == (3, 8, 8)
        and data.train.images.dtype == np.uint8
        and data.n_values == 192
    )
    assert data.attribute_names[8] == 'Black_Hair' and data.attribute_names[20] == 'Male'
    frequency = data.train.attributes.mean(0)
    assert ((frequency > 0.05) & (frequency < 0.7)).sum() >= 24
    monkeypatch.setattr(images, 'draw_faces', None)  # the second time nothing is drawn
    again = load_images('faces', tmp_path, 8)
    assert (again.test.images == data.test.images).all() and (
        again.test.attributes == data.test.attributes
    ).all()
    assert again.fingerprint == data.fingerprint


def test_a_face_depends_neither_on_how_many_are_drawn_nor_on_chance():
    few, many = faces.draw_faces(3, 16), faces.draw_faces(600, 16)
    assert (few == many[:3]).all()
    assert (faces.face_attributes(3) == faces.face_attributes(600)[:3]).all()
    assert len(np.unique(many.reshape(600, -1), axis=0)) == 600
    assert (faces.draw_faces(3, 16, seed=1) != few).any()


@pytest.mark.parametrize(
    'name',
    [
        name
        for name, share in zip(faces.ATTRIBUTES, faces.face_attributes(5000).mean(0))
        if share > 0 and name not in ('No_Beard', 'Straight_Hair')
    ],
)  # what is not there
def test_every_attribute_shows(name, monkeypatch):
    """The same people with and without an attribute: wherever it can be seen, pixels change"""
    monkeypatch.setattr(faces, 'BLOCK', 60)
    rng = np.random.default_rng(0)
    has, look = faces.sample_attributes(rng), faces.sample_look(rng)
    always = np.ones(faces.BLOCK, bool)
    has['Wearing_Hat'] = has['Bald'] = has['Eyeglasses'] = ~always  # they hide others
    off, on = (
        faces.Painter({**has, name: always & value}, look, 32).face().astype(int)
        for value in (False, True)
    )
    change = np.abs(on - off).max(axis=(1, 2, 3))
    assert np.median(change) >= 16, change


# ------------------------------------------------------------------------------------------- digits and mnist


def test_digits():
    data = load_images('digits')
    pixels = all_images(data)
    assert pixels.shape == (1797, 1, 8, 8) and data.n_values == 64
    assert (pixels == (pixels >> 4) * 17).all()  # four bits hold every value
    assert len(np.unique(pixels)) == 16
    assert (
        np.concatenate(
            [data.train.attributes, data.validation.attributes, data.test.attributes]
        ).sum(1)
        == 1
    ).all()
    assert len(data.validation.images) == len(data.test.images) == 179


def test_mnist(mnist):
    data = load_images('mnist', mnist)
    raw = np.frombuffer((mnist / 'train-images-idx3-ubyte').read_bytes()[16:], np.uint8).reshape(
        -1, 28, 28
    )
    pixels = np.concatenate([data.train.images, data.validation.images])
    assert pixels.shape == (40, 1, 32, 32) and (pixels[:, 0, 2:-2, 2:-2] == raw).all()
    assert pixels.sum(dtype=int) == raw.sum(dtype=int)  # nothing but zeros around
    labels = np.frombuffer((mnist / 't10k-labels-idx1-ubyte').read_bytes()[8:], np.uint8)
    assert (data.test.attributes.argmax(1) == labels).all()
    assert data.n_values == 784 and data.max_shift == 1 and len(data.test.images) == 10


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


@settings(max_examples=200, deadline=None)
@given(
    n_dims=st.sampled_from([1, 3]),
    content=st.one_of(
        st.binary(max_size=80),
        st.builds(
            lambda shape, rest: (
                struct.pack(f'>4B{len(shape)}I', 0, 0, 8, len(shape), *shape) + rest
            ),
            st.lists(st.integers(0, 5), min_size=1, max_size=3),
            st.binary(max_size=130),
        ),
    ),
    zipped=st.booleans(),
)
def test_idx_parser_refuses_or_is_right(tmp_path_factory, n_dims, content, zipped):
    path = tmp_path_factory.mktemp('idx') / ('file.gz' if zipped else 'file')
    path.write_bytes(gzip.compress(content) if zipped else content)
    try:
        array = images.read_idx(path, n_dims)
    except UserError:
        return
    assert array.ndim == n_dims and idx(array) == content


# ---------------------------------------------------------------------------------------------------- cifar10


@pytest.fixture
def cifar(tmp_path):
    write_cifar(tmp_path / 'cifar-10-batches-py')
    return tmp_path


def test_cifar10(cifar, monkeypatch):
    data = load_images('cifar10', cifar)
    assert [part.images.shape for part in (data.train, data.validation, data.test)] == [
        (90, 3, 32, 32),
        (10, 3, 32, 32),
        (20, 3, 32, 32),
    ]
    assert all_images(data)[:, 0, 0, 0].tolist() == list(
        range(120)
    )  # in their order, validation before test
    assert data.attribute_names[3] == 'cat' and data.n_values == 3072 and data.max_shift == 0
    classes = [part.attributes.argmax(1) for part in (data.train, data.validation, data.test)]
    assert np.concatenate(classes).tolist() == [i % 10 for i in range(120)]
    raw = (cifar / 'cifar-10-batches-py' / 'test_batch').read_bytes()
    assert data.test.images[7].tobytes() in raw
    monkeypatch.setattr(images, 'read_pickle', None)  # the second time it comes from the cache
    assert (all_images(load_images('cifar10', cifar)) == all_images(data)).all()
    photo = cifar / 'photo.png'
    noise_image(50, 40).save(photo)
    assert load_photo(photo, 'cifar10', 32).shape == (3, 32, 32)


class Payload:
    def __reduce__(self):
        return print, ('it ran',)


@pytest.mark.parametrize(
    'content',
    [
        pickle.dumps(Payload()),
        pickle.dumps({'data': Payload(), 'labels': [0] * 20}),
        b'cos\nsystem\n(S"echo it ran"\ntR.',
        b'cbuiltins\neval\n(S"print(1)"\ntR.',
        b'cnumpy\nload\n(S"x"\ntR.',
        b'',
        b'\x80\x02}',
        pickle.dumps({}),
        pickle.dumps([1, 2]),
        pickle.dumps({'data': np.zeros((20, 3072)), 'labels': [0] * 20}),
        pickle.dumps({'data': np.zeros((20, 3071), np.uint8), 'labels': [0] * 20}),
        pickle.dumps({'data': np.zeros((20, 3072), np.uint8), 'labels': [10] * 20}),
        pickle.dumps({'data': np.zeros((20, 3072), np.uint8), 'labels': [0] * 19}),
        pickle.dumps({'data': np.full((20, 3072), None), 'labels': [0] * 20}),
        pickle.dumps({'data': np.zeros((19, 3072), np.uint8), 'labels': [0] * 19}),
        python2_batch(np.zeros((20, 3072), np.uint8), [0] * 20).replace(
            struct.pack('<i', 3072), struct.pack('<i', 2**30)
        ),
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
    (tmp_path / 'p').write_bytes(f'c{name.replace(".", chr(10))}\n.'.encode())
    with pytest.raises(ValueError, match=f'it holds {name}, which no array of numbers needs'):
        read_pickle(tmp_path / 'p')


def test_a_pickle_that_makes_room_for_two_thousand_million_objects(tmp_path):
    (tmp_path / 'p').write_bytes(b'\x80\x02]r\xff\xff\xff\x7f.')
    with pytest.raises(ValueError, match='numbers more objects than it has bytes'):
        read_pickle(tmp_path / 'p')


@pytest.mark.parametrize('protocol', [0, 1, 2, 3, 4, 5, 'python 2'])
def test_arrays_of_any_protocol(protocol, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (4, 6), dtype=np.uint8)
    others = {
        'little': array.astype('<i4'),
        'big': array.astype('>f8'),
        'columns': np.asfortranarray(array),
    }
    (tmp_path / 'p').write_bytes(
        python2_batch(array, [1, 2])
        if protocol == 'python 2'
        else pickle.dumps({'data': array, **others}, protocol)
    )
    read = read_pickle(tmp_path / 'p')
    assert (value(read['data']) == array).all() and value(read['data']).dtype == np.uint8
    for name in others if protocol != 'python 2' else ():
        assert (value(read[name]) == others[name]).all() and value(read[name]).dtype == others[
            name
        ].dtype


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


@settings(max_examples=300, deadline=None)
@given(
    content=st.one_of(st.binary(max_size=60), st.lists(opcodes, max_size=25).map(b''.join)),
    ended=st.booleans(),
)
def test_any_pickle_is_refused_or_harmless(tmp_path_factory, content, ended):
    path = tmp_path_factory.getbasetemp() / 'fuzz.pickle'
    path.write_bytes(content + b'.' * ended)
    try:
        batch = images.read_cifar_batch(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert batch.shape == (len(batch), 3073) and batch.dtype == np.uint8


# ------------------------------------------------------------------------------------------ folders and celeba


def test_folder_without_attributes(folder):
    data = load_images('folder', folder, 16)
    assert [len(part.images) for part in (data.train, data.validation, data.test)] == [16, 2, 2]
    assert data.attribute_names == () and data.train.attributes.shape == (16, 0)
    expected = [images.decode(path, 16) for path in sorted(folder.rglob('*.png'))]
    assert {image.tobytes() for image in expected} == {
        image.tobytes() for image in all_images(data)
    }
    assert len({image.tobytes() for image in expected}) == 20


def test_folder_with_attributes_by_file_name_or_path(folder):
    write_table(folder, attribute_rows())
    data = load_images('folder', folder, 16)
    assert data.attribute_names == ('Odd', 'Big')
    assert [len(part.images) for part in (data.train, data.validation, data.test)] == [16, 2, 2]
    for i in (0, 3, 15):
        image = images.decode(next(folder.rglob(f'{i:02}.png')), 16)
        (row,) = np.flatnonzero((data.train.images == image).all((1, 2, 3)))
        assert data.train.attributes[row].tolist() == [i % 2 == 1, True]
    rows = attribute_rows()
    write_table(
        folder,
        [rows[0], *[(f'{"ab"[i % 2]}/{row[0]}', *row[1:]) for i, row in enumerate(rows[1:])]],
    )
    assert (all_images(load_images('folder', folder, 16)) == all_images(data)).all()


@pytest.mark.parametrize(
    'change, part',
    [
        (lambda rows: rows[:-1], '1 of the images in .*photos are not in .*attributes.csv'),
        (lambda rows: [*rows, ('99.png', 'train', 1, 1)], "such as '99.png'"),
        (lambda rows: [*rows, rows[5]], 'two rows'),
        (lambda rows: [('file', *rows[0][1:]), *rows[1:]], 'first column must be named image'),
        (lambda rows: [*rows[:-1], (*rows[-1][:3], 0)], '1 or -1'),
        (lambda rows: [*rows[:-1], rows[-1][:3]], 'needs 2 values'),
        (lambda rows: [*rows[:-1], (rows[-1][0], 'tset', 1, 1)], 'tset'),
        (
            lambda rows: [rows[0], *[(row[0], 'train', *row[2:]) for row in rows[1:]]],
            'at least one image',
        ),
        (lambda rows: [('image', 'split', 'Odd', 'Odd'), *rows[1:]], 'different from each other'),
        (lambda rows: [('image', 'split', 'Odd', '\x1b[31mred'), *rows[1:]], 'printable'),
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
    assert not [path for path in tmp_path.rglob('*.npy*')]  # nothing half done is left
    (folder / 'a' / 'bad.jpg').unlink()
    with pytest.raises(UserError, match='too small'):
        load_images('folder', folder, 19)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='has no images'):
        load_images('folder', tmp_path / 'empty')
    with pytest.raises(UserError, match='no directory'):
        load_images('folder', tmp_path / 'nowhere')
    noise_image(16, 16).save(tmp_path / 'empty' / 'one.png')
    with pytest.raises(UserError, match='at least 10'):
        load_images('folder', tmp_path / 'empty', 16)


def test_celeba(celeba):
    data = load_images('celeba', celeba)
    assert [len(part.images) for part in (data.train, data.validation, data.test)] == [8, 2, 2]
    assert data.train.images.shape[1:] == (3, 64, 64) and data.attribute_names == faces.ATTRIBUTES
    assert data.test.attributes[1].tolist() == [(11 + k) % 3 != 0 for k in range(40)]
    with Image.open(celeba / 'img_align_celeba' / '000003.jpg') as image:
        crop = image.crop((15, 35, 163, 183)).resize((64, 64), Image.Resampling.LANCZOS)
    assert (data.train.images[2] == np.asarray(crop).transpose(2, 0, 1)).all()
    assert (
        load_photo(celeba / 'img_align_celeba' / '000003.jpg', 'celeba', 64) == data.train.images[2]
    ).all()


def test_celeba_in_its_own_sub_folders(celeba):
    plain = load_images('celeba', celeba)
    for name, place in (
        ('img_align_celeba', 'Img'),
        ('list_attr_celeba.txt', 'Anno'),
        ('list_eval_partition.txt', 'Eval'),
    ):
        (celeba / 'celeba' / place).mkdir(parents=True)
        (celeba / name).rename(celeba / 'celeba' / place / name)
    assert (all_images(load_images('celeba', celeba)) == all_images(plain)).all()


@pytest.mark.parametrize(
    'name, change, part',
    [
        (
            'list_attr_celeba.txt',
            lambda text: text.replace('12\n', '13\n', 1),
            'announces 13 images and has 12',
        ),
        ('list_attr_celeba.txt', lambda text: text[:-4] + '\n', 'needs 40 values'),
        ('list_attr_celeba.txt', lambda text: text.replace('-1', '0', 1), '1 or -1'),
        (
            'list_attr_celeba.txt',
            lambda text: text.replace('000001.jpg', '000099.jpg'),
            '000099.jpg',
        ),
        ('list_attr_celeba.txt', lambda text: '', 'announces nothing'),
        ('list_eval_partition.txt', lambda text: text.replace('000002.jpg 0\n', ''), '000002.jpg'),
        ('list_eval_partition.txt', lambda text: text.replace(' 2', ' 3'), "not '3'"),
    ],
)
def test_bad_celeba(name, change, part, celeba):
    path = celeba / name
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=part):
        load_images('celeba', celeba)


def test_celeba_with_an_image_missing(celeba):
    (celeba / 'img_align_celeba' / '000005.jpg').unlink()
    with pytest.raises(UserError, match='000005.jpg'):
        load_images('celeba', celeba)


def test_attribute_file_that_is_no_text(celeba):
    (celeba / 'list_attr_celeba.txt').write_bytes(b'12\n\xff\xfe')
    with pytest.raises(UserError, match='cannot be read as text'):
        load_images('celeba', celeba)


lines = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.lists(st.sampled_from(['000001.jpg', '1', '-1', '0', 'x', ',']), max_size=4).map(
            ' '.join
        ),
    ),
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(attributes=lines, partition=lines)
def test_any_attribute_and_partition_file_is_right_or_a_clean_error(
    tmp_path_factory, attributes, partition
):
    folder = tmp_path_factory.getbasetemp() / 'fuzz_celeba'
    (folder / 'img_align_celeba').mkdir(parents=True, exist_ok=True)
    (folder / 'img_align_celeba' / '000001.jpg').touch()
    for name, content in (
        ('list_attr_celeba.txt', attributes),
        ('list_eval_partition.txt', partition),
    ):
        (folder / name).write_text('\n'.join(content), encoding='utf-8', errors='replace')
    with pytest.raises(UserError):  # one image cannot make three splits
        load_images('celeba', folder)


@settings(max_examples=150, deadline=None)
@given(
    content=st.one_of(
        lines.map('\n'.join),
        st.lists(
            st.lists(
                st.sampled_from(
                    [
                        'image',
                        'split',
                        'A',
                        'B',
                        'a.png',
                        'b.png',
                        'c.png',
                        'train',
                        'val',
                        'test',
                        '1',
                        '-1',
                    ]
                ),
                max_size=4,
            ).map(','.join)
        ).map('\n'.join),
    )
)
def test_any_attribute_table_is_right_or_a_clean_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / 'fuzz.csv'
    path.write_text(content, encoding='utf-8', errors='replace')
    names = ['a.png', 'b.png', 'c.png']
    try:
        columns, attributes, parts = images.read_attribute_table(path, names)
    except UserError:
        return
    assert attributes.shape == (3, len(columns)) and attributes.dtype == bool
    assert parts is None or sorted(np.concatenate(parts)) == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------ cache


def test_nothing_is_decoded_twice_and_a_change_is_seen(folder, monkeypatch):
    first = load_images('folder', folder, 16)
    (cache,) = (folder / '.cache').glob('*.npy')
    with monkeypatch.context() as patch:
        patch.setattr(images, 'decode', None)
        assert (all_images(load_images('folder', folder, 16)) == all_images(first)).all()
    noise_image(20, 18, 77).save(folder / 'a' / '00.png')
    changed = load_images('folder', folder, 16)
    assert (
        all_images(changed) != all_images(first)
    ).any() and changed.fingerprint != first.fingerprint
    assert (
        not cache.exists() and len(list((folder / '.cache').glob('*.npy'))) == 1
    )  # the stale one is gone
    load_images('folder', folder, 8)
    assert len(list((folder / '.cache').glob('*.npy'))) == 2


def test_a_damaged_cache_is_made_again(folder):
    first = all_images(load_images('folder', folder, 16)).copy()
    (cache,) = (folder / '.cache').glob('*.npy')
    cache.write_bytes(cache.read_bytes()[:500])
    assert (all_images(load_images('folder', folder, 16)) == first).all()


def test_data_that_cannot_be_written_to_is_cached_elsewhere(folder, tmp_path, monkeypatch):
    is_writable = cache.is_writable
    monkeypatch.setattr(
        cache, 'is_writable', lambda path: path != folder / '.cache' and is_writable(path)
    )
    load_images('folder', folder, 16)
    assert not (folder / '.cache').exists()
    assert len(list((tmp_path / 'data' / '.cache').glob('folder_16_*.npy'))) == 1


def test_killed_at_any_moment_and_begun_anew(tmp_path):
    """SIGKILL, five times: what is left is removed, and the cache is bit for bit that of an undisturbed process"""
    for i in range(150):
        (tmp_path / 'photos').mkdir(exist_ok=True)
        noise_image(60, 50, i).save(tmp_path / 'photos' / f'{i:03}.png')
    start = time.perf_counter()
    load_images('folder', tmp_path / 'photos', 48)
    seconds = time.perf_counter() - start
    (cache,) = (tmp_path / 'photos' / '.cache').glob('*.npy')
    content = cache.read_bytes()
    cache.unlink()
    rng = np.random.default_rng(0)
    for k in range(5):
        process = multiprocessing.get_context('fork').Process(
            target=load_images, args=('folder', tmp_path / 'photos', 48)
        )
        alive, inherited = os.pipe()
        process.start()
        os.close(inherited)
        time.sleep(rng.uniform(0, seconds))
        process.kill()
        process.join()
        assert select.select([alive], [], [], 10)[0]  # closed, as its workers are gone too
        os.close(alive)
        assert not cache.exists() or cache.read_bytes() == content
        cache.unlink(missing_ok=True)
    load_images('folder', tmp_path / 'photos', 48)  # nobody holds the lock any more
    assert cache.read_bytes() == content
    assert [path.name for path in cache.parent.iterdir() if path.suffix != '.lock'] == [cache.name]


def test_two_at_once_decode_once(folder, tmp_path, capfd):
    def slow_load():
        decode = images.decode
        images.decode = lambda *args: (
            time.sleep(0.05),
            (tmp_path / 'decoded').open('a').write('x'),
            decode(*args),
        )[2]
        load_images('folder', folder, 16)

    processes = [multiprocessing.get_context('fork').Process(target=slow_load) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / 'decoded').read_text() == 20 * 'x'
    assert 'another process prepares folder_16: waiting until it is done' in capfd.readouterr().err


def test_a_worker_that_is_killed_is_a_clean_error(folder, monkeypatch):
    monkeypatch.setattr(images, 'decode', lambda *args: os._exit(9))
    with pytest.raises(UserError, match='was killed'):
        load_images('folder', folder, 16)


def test_no_room_for_the_cache(folder, monkeypatch):
    monkeypatch.setattr(cache.shutil, 'disk_usage', lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match='takes 0.0 GB, .* has 0.0 left'):
        load_images('folder', folder, 16)
    assert not list((folder / '.cache').glob('*.npy*'))


# ----------------------------------------------------------------------------------------------------- photos


@pytest.mark.parametrize(
    'mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'I;16', 'I', 'F']
)
def test_photos_of_every_mode(mode, tmp_path):
    grey = np.full((40, 30), 128, np.uint8)
    if mode.startswith('I'):
        image = Image.fromarray(grey.astype(np.uint16 if mode == 'I;16' else np.int32) * 256)
    elif mode == 'F':
        image = Image.fromarray(grey.astype(np.float32))
    else:
        image = Image.fromarray(grey).convert('RGB')
        image = image.quantize() if mode == 'P' else image.convert(mode)
    path = tmp_path / (
        'photo.png' if mode in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16') else 'photo.tif'
    )
    image.save(path)
    photo = load_photo(path, 'faces', 24)
    assert photo.shape == (3, 24, 24) and photo.dtype == np.uint8
    if mode != '1':
        assert np.abs(photo.astype(int) - 128).max() <= 2


def test_photos_are_cropped_in_the_middle_upright_and_on_white(tmp_path):
    pixels = np.zeros((30, 90, 3), np.uint8)
    pixels[:, 30:60] = (255, 0, 0)
    pixels[:, 60:] = (0, 255, 0)
    Image.fromarray(pixels).save(tmp_path / 'wide.png')
    assert (
        load_photo(tmp_path / 'wide.png', 'faces', 30) == np.array([255, 0, 0])[:, None, None]
    ).all()
    turned = Image.fromarray(pixels[:, 30:90])  # red left, green right; upright: red above
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned.save(tmp_path / 'turned.png', exif=exif)
    photo = load_photo(tmp_path / 'turned.png', 'faces', 10)
    assert photo[0, 0].min() == 255 and photo[1, -1].min() == 255
    Image.new('RGBA', (20, 20), (0, 0, 0, 0)).save(tmp_path / 'clear.png')
    assert load_photo(tmp_path / 'clear.png', 'faces', 20).min() == 255


def test_photos_for_grey_data_sets(tmp_path):
    Image.new('RGB', (60, 60), (255, 255, 255)).save(tmp_path / 'white.png')
    photo = load_photo(tmp_path / 'white.png', 'mnist', 32)
    assert (
        photo.shape == (1, 32, 32)
        and photo[0, 2:-2, 2:-2].min() == 255
        and photo.sum(dtype=int) == 255 * 784
    )
    noise_image(16, 16).save(tmp_path / 'noise.png')
    photo = load_photo(tmp_path / 'noise.png', 'digits', 8)
    assert photo.shape == (1, 8, 8) and (photo == (photo >> 4) * 17).all()


def test_bad_photos(tmp_path, monkeypatch):
    noise_image(40, 40).save(tmp_path / 'whole.jpg')
    (tmp_path / 'half.jpg').write_bytes((tmp_path / 'whole.jpg').read_bytes()[:600])
    for name, part in (('half.jpg', 'cannot be decoded'), ('none.jpg', 'cannot be decoded')):
        with pytest.raises(UserError, match=part):
            load_photo(tmp_path / name, 'faces', 32)
    with pytest.raises(UserError, match='too small: 40x40'):
        load_photo(tmp_path / 'whole.jpg', 'faces', 64)
    monkeypatch.setattr(
        Image, 'MAX_IMAGE_PIXELS', 1500
    )  # 1,600 pixels: Pillow only warns below twice the limit
    with pytest.raises(UserError, match='exceeds limit'):
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
    data = images.ImageData(None, None, None, ('Male', 'Smiling', 'Young'), 1, 0, '')
    assert data.attribute_index('Smiling') == 1 and data.attribute_index('2') == 2
    for text, part in (
        ('Smilling', "unknown attribute 'Smilling': the nearest are Smiling"),
        ('3', 'there are 0 to 2'),
        ('-1', 'out of range'),
        ('smiling', 'Smiling'),
    ):
        with pytest.raises(UserError, match=part):
            data.attribute_index(text)


def test_grid_shows_every_pixel_whole():
    rng = np.random.default_rng(0)
    for size, c, zoom in ((8, 1, 16), (32, 3, 4), (48, 3, 2), (200, 3, 1)):
        rows = [rng.integers(0, 256, (n, c, size, size), dtype=np.uint8) for n in (3, 2)]
        picture = np.asarray(images.draw_grid(rows, ['a label', 'b'], ['x', 'y', 'z']))
        step = size * zoom + 8
        top, left = picture.shape[0] - 2 * step, picture.shape[1] - 3 * step
        assert left > 50 and top > 20  # room for the labels
        for i, row in enumerate(rows):
            for j, image in enumerate(row):
                cell = picture[top + i * step :, left + j * step :][: size * zoom, : size * zoom]
                assert (cell == image.transpose(1, 2, 0).repeat(zoom, 0).repeat(zoom, 1)).all()
        assert (
            picture[top + step :, left + 2 * step :] == 255
        ).all()  # the shorter row ends in white


def test_shifts_move_whole_images():
    x = torch.zeros(50, 1, 8, 8, dtype=torch.uint8)
    x[:, :, 3:5, 3:5] = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    shifted = images.shift_randomly(x, 2, torch.Generator().manual_seed(0))
    corners = set()
    for image in shifted:
        i, j = (image[0] == 1).nonzero()[0].tolist()
        assert image[0, i : i + 2, j : j + 2].tolist() == [[1, 2], [3, 4]] and image.sum() == 10
        corners.add((i, j))
    assert {i for i, _ in corners} == {j for _, j in corners} == {1, 2, 3, 4, 5}
