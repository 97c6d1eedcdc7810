"""Images from strangers, their tables and their caches: each loads as what it is or is refused.

None runs code or another program, and none takes more memory than its size justifies.
"""

import gzip
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import only
from hostile import (
    ENDLESS_KEY,
    LONG_NAMES,
    NAMES,
    ODD_NPY_TYPES,
    SPECIAL_FILES,
    Call,
    call_guarded,
    gzip_repeated,
    needs_posix,
    npy_file,
    npy_header,
    npy_header_of,
    npz_file,
    pickled_folder,
    refusal,
    refused,
    repeated_list,
    replace_by_special,
)
from PIL import EpsImagePlugin, Image
from tiny_data import (
    attribute_rows,
    idx,
    noise_image,
    write_celeba,
    write_cifar,
    write_folder,
    write_mnist,
    write_table,
)

import glow
from common.errors import UserError
from datasets import images, load_images, photo_sets, photos
from datasets.pickles import StandIn

# Some of the hostile files are made by ways that libraries warn about.
pytestmark = pytest.mark.filterwarnings('ignore:.*deprecated')


# ---------------------------------------------------------------------------------------- photos


def image_bytes(image: Image.Image, file_format: str, **options: Any) -> bytes:
    """Return an image as a file."""
    content = io.BytesIO()
    image.save(content, file_format, **options)
    return content.getvalue()


def png_with_wrong_size(width: int, height: int) -> bytes:
    """Return a PNG of 20x20 pixels whose header states another size, with the right checksum."""
    content = bytearray(image_bytes(noise_image(20, 20), 'PNG'))
    content[16:24] = struct.pack('>2I', width, height)
    content[29:33] = struct.pack('>I', zipfile.crc32(content[12:29]))
    return bytes(content)


def webp_header(width: int, height: int) -> bytes:
    """Return a lossless WEBP that states a size, and ends there."""
    n_bits = 14  # of each side, less one
    size = (width - 1) | (height - 1) << n_bits
    data = b'\x2f' + struct.pack('<I', size) + bytes(9)
    chunk = b'VP8L' + struct.pack('<I', len(data)) + data
    return b'RIFF' + struct.pack('<I', 4 + len(chunk)) + b'WEBP' + chunk


def jpeg_of_many_scans() -> bytes:
    """Return a progressive JPEG whose last scan comes a hundred times."""
    content = image_bytes(noise_image(40, 40), 'JPEG', progressive=True)
    start = content.rindex(b'\xff\xda')
    return content[:start] + content[start:-2] * 100 + content[-2:]


def bmp_of_run_lengths(width: int, height: int) -> bytes:
    """Return a BMP of this size that ends its first line at once, and has no other."""
    start = 14 + 40 + 1024  # after the headers and the palette
    header = struct.pack('<I2HI', start + 4, 0, 0, start)
    sizes = struct.pack('<I2i2H2I2i2I', 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    return b'BM' + header + sizes + bytes(1024) + b'\0\0\0\1'


BAD_IMAGES = {
    'empty': b'',
    'many scans': jpeg_of_many_scans(),
    'many comments': b'P2 100 100 255\n' + b'#\n' * 2**20,
    'run lengths': bmp_of_run_lengths(40_000_000, 2),
    'text': b'I am no picture',
    'half': image_bytes(noise_image(40, 40), 'JPEG')[:700],
    'bomb': png_with_wrong_size(2**31 - 1, 2**31 - 1),
    'warned_of': png_with_wrong_size(10_000, 10_000),
    'strip': image_bytes(Image.new('1', (100_000, 1)), 'PNG'),
    'less': png_with_wrong_size(40, 40),
    'none': png_with_wrong_size(0, 0),
    'postscript': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n',
    'icon': image_bytes(noise_image(32, 32), 'ICO'),
    'tiff_of_rubbish': b'II*\0' + bytes(range(256)),
    'webp_of_nothing': b'RIFF\xff\xff\xff\x7fWEBPVP8 ',
    'gif_of_nothing': b'GIF89a' + 7 * b'\xff',
    'webp_of_a_header': webp_header(9_459, 9_459),  # Pillow warns of more pixels
    'webp_strip': webp_header(16_384, 5_461),
}


@needs_posix
@pytest.mark.parametrize('name', BAD_IMAGES)
def test_bad_images_are_named(name, tmp_path, monkeypatch):
    """None is handed to another program, such as Ghostscript, whatever it holds."""
    ghostscript, image = tmp_path / 'gs', tmp_path / '\33[31m.jpg'
    ghostscript.write_text(f'#!/bin/sh\ntouch {tmp_path}/canary\n')
    ghostscript.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, 'gs_binary', None)
    image.write_bytes(BAD_IMAGES[name])
    assert '\\x1b[31m.jpg' in refusal(photos.load_photo, image, 'faces', 16)
    assert not (tmp_path / 'canary').exists()


def test_one_bad_image_among_good_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / 'photos')
    (tmp_path / 'photos' / 'a' / 'bad.jpg').write_bytes(BAD_IMAGES['half'])
    assert 'bad.jpg cannot be decoded' in refusal(load_images, 'folder', tmp_path / 'photos', 16)


def odd_images(plain: Image.Image) -> dict[str, bytes]:
    """Return files that hold a grey image of 24x24 pixels in unusual forms."""
    colour, palette = plain.convert('RGB'), plain.quantize(4)
    wide = Image.fromarray(np.asarray(plain).astype(np.uint16) * 257)  # 16 bits
    grey_frames = {'save_all': True, 'append_images': [Image.new('L', (24, 24))]}
    colour_frames = {'save_all': True, 'append_images': [Image.new('RGB', (24, 24))]}
    exif = Image.Exif()
    exif[0x0112], exif[0x927C] = 77, bytes(1000)  # no orientation, and a note of the camera
    truncated_exif = b'Exif\0\0II*\0\x08\0\0\0\x10\0\x12\x01'
    return {
        '16.png': image_bytes(wide, 'PNG'),
        'palette.png': image_bytes(palette, 'PNG', transparency=b'\xff' * 4),
        'cmyk.tif': image_bytes(colour.convert('CMYK'), 'TIFF'),
        'frames.gif': image_bytes(palette, 'GIF', **grey_frames),
        'frames.webp': image_bytes(colour, 'WEBP', lossless=True, **colour_frames),
        'exif.png': image_bytes(plain, 'PNG', exif=exif),
        'exif.jpg': image_bytes(plain, 'JPEG', quality=100, exif=truncated_exif),
        'two.jpg': image_bytes(colour, 'MPO', quality=100, **colour_frames),
    }


def test_odd_images_are_decoded(tmp_path, recwarn):
    """All become the same pixels as the plain image."""
    square = np.ones((12, 12))
    pixels = np.kron([[0, 85], [170, 255]], square).astype(np.uint8)
    for name, content in odd_images(Image.fromarray(pixels)).items():
        (tmp_path / name).write_bytes(content)
        decoded = photos.load_photo(tmp_path / name, 'faces', 24)
        assert np.abs(decoded.astype(int) - pixels).max() <= 2, name
    assert not [str(warning.message) for warning in recwarn.list]


@needs_posix
def test_circular_links(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / 'photos')
    first = load_images('folder', tmp_path / 'photos', 16).fingerprint
    (tmp_path / 'photos' / 'a' / 'loop.png').symlink_to('loop.png')
    (tmp_path / 'photos' / 'a' / 'up').symlink_to('..')
    assert load_images('folder', tmp_path / 'photos', 16).fingerprint == first


# By name: the data set, and the file that is something else
IMAGE_FILES: dict[str, tuple[str, str]] = {
    'attribute table': ('folder', 'attributes.csv'),
    'training images of mnist': ('mnist', 'train-images-idx3-ubyte'),
    'training labels of mnist': ('mnist', 'train-labels-idx1-ubyte'),
    'test images of mnist': ('mnist', 't10k-images-idx3-ubyte'),
    'test labels of mnist': ('mnist', 't10k-labels-idx1-ubyte'),
    'gzipped images of mnist': ('mnist', 'train-images-idx3-ubyte.gz'),
    'training batch of cifar10': ('cifar10', 'data_batch_2'),
    'test batch of cifar10': ('cifar10', 'test_batch'),
    'attributes of celeba': ('celeba', 'list_attr_celeba.txt'),
    'splits of celeba': ('celeba', 'list_eval_partition.txt'),
}
WRITERS: dict[str, Callable[[Path], None]] = {
    'folder': write_folder,
    'mnist': write_mnist,
    'cifar10': write_cifar,
    'celeba': write_celeba,
}


@needs_posix
@pytest.mark.parametrize('kind', SPECIAL_FILES)
@pytest.mark.parametrize('name', IMAGE_FILES)
def test_images_are_files(name, kind, tmp_path):
    data_set, file = IMAGE_FILES[name]
    WRITERS[data_set](tmp_path)
    (tmp_path / file.removesuffix('.gz')).unlink(missing_ok=True)
    replace_by_special(kind, tmp_path / file)
    size = 16 if data_set in ('folder', 'celeba') else None
    assert Path(file).name in refusal(load_images, data_set, tmp_path, size)


@needs_posix
@pytest.mark.parametrize('kind', SPECIAL_FILES)
def test_a_photo_is_a_file(kind, tmp_path):
    replace_by_special(kind, tmp_path / 'me.png')
    assert 'me.png' in refusal(photos.load_photo, tmp_path / 'me.png', 'faces', 16)


@needs_posix
@pytest.mark.parametrize('option', ['vis_img', 'input'])
@pytest.mark.parametrize('kind', SPECIAL_FILES)
def test_a_photo_of_a_command_is_a_file(kind, option, trained_glow, tmp_path):
    replace_by_special(kind, tmp_path / 'me.png')
    mode = {'vis_img': '--visualize', 'input': '--evaluate'}[option]
    words = [mode, f'--restore_file={trained_glow}', f'--{option}={tmp_path}/me.png']
    assert 'me.png' in refused('glow', *words)


@needs_posix
@pytest.mark.parametrize('kind', SPECIAL_FILES)
def test_what_is_no_file_is_no_photo_of_celeba(kind, tmp_path):
    write_celeba(tmp_path)
    first = call_guarded(pixels_of, 'celeba', tmp_path, 16)
    replace_by_special(kind, tmp_path / 'img_align_celeba' / '000003.jpg')
    others = np.delete(first, 2, axis=0)
    assert (call_guarded(pixels_of, 'celeba', tmp_path, 16) == others).all()


@needs_posix
@pytest.mark.parametrize('kind', SPECIAL_FILES)
def test_what_is_no_file_is_no_photo_of_a_folder(kind, tmp_path):
    write_folder(tmp_path)
    first = call_guarded(pixels_of, 'folder', tmp_path, 16)
    replace_by_special(kind, tmp_path / 'a' / 'me.png')
    assert (call_guarded(pixels_of, 'folder', tmp_path, 16) == first).all()


# -------------------------------------------------------------------------------- attribute tables


def test_odd_names_of_attributes(tmp_path, monkeypatch):
    """They are written into a picture, cut where they are long, and into no file name."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / 'photos')
    rows = [('image', 'split', *NAMES)]
    for image, split, value, _ in attribute_rows()[1:]:
        rows.append((image, split, *[value] * len(NAMES)))
    write_table(tmp_path / 'photos', rows)
    words = ['--dataset=folder', '--data_dir=photos', '--image_size=16']
    words += ['--n_levels=1', '--depth=1', '--width=8', '--n_epochs=1']
    glow.main(['--train', *words])

    before = set(tmp_path.rglob('*'))
    glow.main(['--visualize'])
    new = [path.name for path in set(tmp_path.rglob('*')) - before]
    new = [name for name in new if not name.startswith('attribute_directions_')]
    assert new == ['manipulated_sample_attr_all.png']
    picture = Image.open(only(tmp_path.rglob('manipulated_*.png')))
    assert picture.width < 2000
    assert picture.height == 34 + 136 * len(NAMES)


# By name: the header, the cells after the name of each image, and a part of the message
BAD_ATTRIBUTE_TABLES: dict[str, tuple[str, str, str]] = {
    'no word for the split': ('image,split', '', 'a split is one of'),
    'a long name': ('image,' + 'n' * 200_000, ',1', 'field larger'),
    'a name of escapes': ('image,\33[31m', ',1', 'printable'),
    'many attributes': ('image,' + ','.join(map(str, range(5000))), ',1' * 5000, '1000 at most'),
    'a name with a zero byte': ('image,a\0', ',1', ''),
    'a quote that does not end': ('image,"a', ',1', ''),
    'two attributes of a name': ('image,a,a', ',1,1', 'different'),
}


@pytest.mark.parametrize('name', BAD_ATTRIBUTE_TABLES)
def test_bad_attribute_tables(name, tmp_path):
    header, cells, part = BAD_ATTRIBUTE_TABLES[name]
    files = [f'{i:02}.png' for i in range(20)]
    lines = [header, *[name + cells for name in files]]
    (tmp_path / 'attributes.csv').write_text('\n'.join(lines))
    assert part in refusal(photo_sets.read_attribute_table, tmp_path / 'attributes.csv', files)


@pytest.mark.slow
@pytest.mark.parametrize('name', LONG_NAMES)
def test_long_names_of_attributes(name, tmp_path, monkeypatch):
    """Names of files are shorter than they would be."""
    monkeypatch.chdir(tmp_path)
    attribute = LONG_NAMES[name]
    write_folder(tmp_path / 'photos')
    _, *rows = attribute_rows()
    write_table(tmp_path / 'photos', [('image', 'split', attribute), *[row[:3] for row in rows]])
    words = ['--dataset=folder', '--data_dir=photos', '--image_size=16', f'--condition={attribute}']
    words += ['--n_levels=1', '--depth=1', '--width=8', '--n_epochs=1']
    glow.main(['--train', *words])

    before = set(tmp_path.rglob('*'))
    glow.main(['--generate', f'--given={attribute}'])
    glow.main(['--visualize', f'--given=-{attribute}'])
    new = {path.name for path in set(tmp_path.rglob('*')) - before}
    assert len(new) == 2
    assert all(len(name.encode()) <= 250 for name in new)


@pytest.mark.parametrize('name', LONG_NAMES)
def test_long_names_of_photos(name, trained_glow, tmp_path):
    photo = tmp_path / f'{LONG_NAMES[name]}.png'
    noise_image(20, 20).save(photo)
    output = tmp_path / 'pictures'
    words = [f'--restore_file={trained_glow}', f'--vis_img={photo}', '--vis_attrs=3']
    glow.main(['--visualize', *words, f'--output={output}'])
    picture = only(output.glob('*.png'))
    assert len(picture.name.encode()) < 200


# ------------------------------------------------------------------------------- mnist and cifar10


def test_mnist_that_unfolds_without_end(tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / 'train-images-idx3-ubyte'
    images_of_40 = gzip.compress(idx(np.zeros((40, 28, 28))))
    Path(f'{path}.gz').write_bytes(images_of_40 + gzip_repeated(bytes(2**20), 2**9))
    path.unlink()
    assert 'longer' in refusal(load_images, 'mnist', tmp_path)


# What stands in place of the pixels or of the labels of a batch of CIFAR-10
BAD_CIFAR_DATA: dict[str, Any] = {
    'an array of nothing': Call(np.ndarray),
    'a type': Call(np.dtype, 'u1'),
    'an empty array': Call(np.zeros(0).__reduce__()[0], np.ndarray, (0,), b'b'),
    'large bytes': Call(bytearray, 10**11),
    'nested lists': repeated_list(500, 3),
}
BAD_CIFAR_LABELS: dict[str, Any] = {
    'nested lists': repeated_list(400, 3),
    'deeply nested lists': repeated_list(10, 8),
    'lists of a hundred million': repeated_list(100, 4),
    'text': 'x' * 20,
    'lists of texts': [['x'] * 20] * 20,
    'a dict': {},
    'huge numbers': [10**400] * 20,
}


@pytest.mark.parametrize('name', BAD_CIFAR_DATA)
def test_cifar_batches_without_an_array(name, tmp_path):
    write_cifar(tmp_path)
    batch = {'data': BAD_CIFAR_DATA[name], 'labels': [0]}
    (tmp_path / 'data_batch_2').write_bytes(pickle.dumps(batch))
    assert 'data_batch_2' in refusal(load_images, 'cifar10', tmp_path)


def test_cifar_batches_that_take_for_ever(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / 'data_batch_2').write_bytes(ENDLESS_KEY)
    assert 'data_batch_2' in refusal(load_images, 'cifar10', tmp_path)


@pytest.mark.parametrize('name', BAD_CIFAR_LABELS)
def test_cifar_batches_without_labels(name, tmp_path):
    write_cifar(tmp_path)
    batch = {'data': np.zeros((20, 3072), np.uint8), 'labels': BAD_CIFAR_LABELS[name]}
    (tmp_path / 'data_batch_2').write_bytes(pickle.dumps(batch))
    assert 'data_batch_2' in refusal(load_images, 'cifar10', tmp_path)


# What an array's stand-in has for its state
BAD_ARRAY_STATES: dict[str, Callable[[StandIn], Any]] = {
    'none': lambda array: None,
    'a number': lambda array: 3,
    'a number for a type': lambda array: (1, (2,), 5, False, b'ab'),
    'itself for a type': lambda array: (1, (2,), array, False, b'ab'),
    'text for a shape': lambda array: (1, 'a', None, None, None),
}


@pytest.mark.parametrize('name', BAD_ARRAY_STATES)
def test_cifar_arrays_with_a_bad_state(name, tmp_path, monkeypatch):
    """``read_pickle`` leaves such an array as an object of the class ``StandIn``."""
    array = type('_reconstruct', (StandIn,), {})()
    array.state = BAD_ARRAY_STATES[name](array)
    monkeypatch.setattr(images, 'read_pickle', lambda path: {'data': array, 'labels': [0]})
    (tmp_path / 'data_batch_1').write_bytes(b'')
    refusal(images.read_cifar_batch, tmp_path / 'data_batch_1')


# ---------------------------------------------------------------------------------------- caches


# By name: what is in the place of a whole cache file, of 20 images of 16x16 pixels or of another
BAD_CACHES: dict[str, Callable[[bytes], bytes]] = {
    'an array of objects': lambda whole: npy_file(np.array([Call(os.mkdir, 'canary')])),
    'an archive': lambda whole: npz_file(np.zeros((20, 3, 16, 16), np.uint8)),
    'empty': lambda whole: b'',
    'another height': lambda whole: npy_file(np.zeros((20, 3, 16, 15), np.uint8)),
    'another number': lambda whole: npy_file(np.zeros((19, 3, 16, 16), np.uint8)),
    'cut off': lambda whole: whole[:-1],
    'another type': lambda whole: npy_file(np.zeros((20, 3, 16, 16), np.int8)),
    'a number': lambda whole: npy_file(np.zeros(())),
    'a pickle': lambda whole: pickled_folder(),
    'a deep header': lambda whole: npy_header('(' * 9000),
    'a negative shape': lambda whole: npy_header_of('<f8', (-1, 2)),
    'a huge shape': lambda whole: npy_header_of('|u1', (10**30, 2)),
    'a header that does not end': lambda whole: b'\x93NUMPY\x01\x00\xff\xff{',
}
for type_name, npy in ODD_NPY_TYPES.items():
    BAD_CACHES[type_name] = lambda whole, npy=npy: npy
# By name: its files, the folder that they are in, and the size of the images
CACHED_DATA_SETS: dict[str, tuple[Callable[[Path], None], int | None]] = {
    'folder': (write_folder, 16),
    'cifar10': (write_cifar, None),
}


def pixels_of(name: str, folder: Path, size: int | None) -> np.ndarray:
    """Load the training images of a data set."""
    return np.array(load_images(name, folder, size).train.images)


@pytest.mark.parametrize('data_set', CACHED_DATA_SETS)
@pytest.mark.parametrize('name', BAD_CACHES)
def test_a_bad_cache_is_made_again(name, data_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write, size = CACHED_DATA_SETS[data_set]
    write(tmp_path / 'data')
    first = pixels_of(data_set, tmp_path / 'data', size)
    cache = only((tmp_path / 'data' / '.cache').glob('*.npy'))
    whole = cache.read_bytes()
    cache.write_bytes(BAD_CACHES[name](whole))
    again = call_guarded(pixels_of, data_set, tmp_path / 'data', size)
    assert again.shape == first.shape
    assert (again == first).all()
    assert cache.read_bytes() == whole
    assert not Path('canary').exists()


@needs_posix
@pytest.mark.parametrize('kind', SPECIAL_FILES)
def test_a_cache_is_a_file(kind, tmp_path, monkeypatch):
    """What is none is replaced, or named."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / 'data')
    first = pixels_of('folder', tmp_path / 'data', 16)
    cache = only((tmp_path / 'data' / '.cache').glob('*.npy'))
    replace_by_special(kind, cache)
    again = call_guarded(pixels_or_message, 'folder', tmp_path / 'data', 16)
    if isinstance(again, str):
        assert cache.name in again
    else:
        assert (again == first).all()


def pixels_or_message(name: str, folder: Path, size: int) -> np.ndarray | str:
    """Load the training images of a data set, or return the line in which it is refused."""
    try:
        return pixels_of(name, folder, size)
    except UserError as error:
        return str(error)


def test_a_cache_with_classes_that_do_not_exist(tmp_path):
    write_cifar(tmp_path)
    first = load_images('cifar10', tmp_path).train.attributes.copy()
    cache = only((tmp_path / '.cache').glob('*.npy'))
    np.save(cache, np.full((120, 3073), 200, np.uint8))
    assert (load_images('cifar10', tmp_path).train.attributes == first).all()
