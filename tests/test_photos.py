"""Photos of the user's own: which are read, what model they get, and what is drawn of them."""

import contextlib
import csv
import json
import math
import os
import shutil
import warnings
import zlib
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import CPU, only, refusal_line, run_mode, single_process
from PIL import Image
from tiny_data import (
    attribute_rows,
    noise_image,
    write_celeba,
    write_celeba_of_kaggle,
    write_folder,
    write_table,
)

import glow
from common import tensors
from common.errors import UserError
from datasets import (
    ImageSplit,
    grids,
    images,
    latents,
    load_images,
    load_run_images,
    photo_sets,
    photos,
)
from datasets import __main__ as command
from datasets.anomalies import print_least_likely

run = partial(run_mode, glow)
SMALL = ['--image_size=16', '--n_levels=1', '--depth=1', '--width=4', '--n_epochs=1']


@pytest.fixture
def folder(tmp_path):
    """A folder of 20 images."""
    write_folder(tmp_path / 'photos')
    return tmp_path / 'photos'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The best.pt of a run on 200 images without attributes, which lie beside its folder."""
    place = tmp_path_factory.mktemp('photos')
    (place / 'photos').mkdir()
    for i in range(200):
        noise_image(20, 16, i).save(place / 'photos' / f'{i:03}.png')
    train(place, *SMALL, '--lr=0.01', '--n_epochs=3')
    return only(place.glob('out/*/best.pt'))


def train(place, *words):
    """Train on ``photos`` of a folder, with the results in ``out``."""
    places = [f'--data_dir={place}/photos', f'--output_dir={place}/out']
    glow.main(['--train', '--dataset=folder', *places, *words])


def model_of(path):
    """Return the model of a checkpoint."""
    return glow.restore_model(glow.load_checkpoint(path), CPU)


def photo_in(path, i):
    """Return a path of one of the images that a run was trained on."""
    return path.parents[2] / 'photos' / f'{i:03}.png'


# ------------------------------------------------------------------------------ defaults by number


def test_the_defaults_follow_from_the_number_of_photos(tmp_path, monkeypatch, capsys):
    """They are those of the first limit above it, and the options that are given come first."""
    process = single_process(glow)
    for n, width, n_epochs in ((299, 64, 500), (999, 64, 250), (1_000, 64, 100), (50_000, 512, 80)):
        monkeypatch.setattr(glow, 'count_photos', lambda name, data_dir, n=n: n)
        for dataset in ('folder', 'celeba'):
            given = {'dataset': dataset, 'depth': 3}
            config = glow.choose_config('train', given, None, process)
            assert (config.width, config.n_epochs, config.depth) == (width, n_epochs, 3)
            assert config.image_size == photo_sets.usual_size(n)  # as without a run
            line = capsys.readouterr().out
            assert line.startswith(f'defaults for {n:,} photos: --image_size=')
            assert f'--width={width}' in line and '--depth' not in line

            words = dict(word.split('=') for word in line.split(': ')[1].split())
            for name, value in words.items():  # as printed, they are the config
                assert getattr(config, name.removeprefix('--')) == float(value)

    config = glow.choose_config('train', {'dataset': 'digits'}, None, process)
    assert config.width == 64 and not capsys.readouterr().out


def test_a_run_has_the_defaults_of_its_photos(tmp_path, capsys):
    write_folder(tmp_path / 'photos', size=40)
    train(tmp_path, '--depth=1', '--width=4', '--n_epochs=1')
    path = only(tmp_path.glob('out/*/checkpoint.pt'))
    config = glow.load_checkpoint(path)['config']
    assert (config.image_size, config.n_levels, config.translate) == (32, 2, 2)
    assert 'defaults for 20 photos: --image_size=32' in capsys.readouterr().out

    for i in range(20):  # with more of them, the run stays as it is
        noise_image(40, 40, i).save(tmp_path / 'photos' / f'more_{i}.png')
    run('train', path, '--n_epochs=2', '--accept_changed_data')
    assert 'defaults for' not in capsys.readouterr().out


def test_photos_are_counted_as_they_are_loaded(folder, tmp_path):
    assert images.count_photos('folder', folder) == 20
    write_celeba(tmp_path / 'celeba')
    (tmp_path / 'celeba' / 'img_align_celeba' / '.DS_Store').touch()
    assert images.count_photos('celeba', tmp_path / 'celeba') == 12


def test_flipped_images():
    x = torch.arange(2000 * 3 * 2 * 4).view(2000, 3, 2, 4).to(torch.uint8)
    generator = torch.Generator().manual_seed(0)
    flipped = images.flip_randomly(x, 0.25, generator)
    is_flipped = (flipped == x.flip(3)).flatten(1).all(1)
    is_same = (flipped == x).flatten(1).all(1)
    assert (is_flipped ^ is_same).all()
    assert abs(is_flipped.double().mean() - 0.25) < 0.04
    assert torch.equal(images.flip_randomly(x, 0.0, generator), x)


def test_training_images_are_flipped_when_asked(folder):
    data = load_images('folder', folder, 16)
    config = glow.Config(dataset='folder', image_size=16, n_levels=1, batch_size=16, flip=0.5)
    process = single_process(glow)
    seen = set()
    for n_seen in (0, 16, 32):
        x, *_ = glow.training_batch(data, config, n_seen, process)
        seen |= {image.numpy().tobytes() for image in x}
    own = {image.tobytes() for image in data.train.images}
    mirrored = {image[..., ::-1].tobytes() for image in data.train.images}
    assert seen <= own | mirrored and seen & own and seen & mirrored


# ----------------------------------------------------------------------------------- broken photos


def add_broken(folder):
    """Add a photo that is broken, one that is too small, and a sidecar that is no image."""
    whole = (folder / 'a' / '00.png').read_bytes()
    (folder / 'a' / 'half.png').write_bytes(whole[:300])
    noise_image(9, 9).save(folder / 'b' / 'tiny.png')
    (folder / 'notes.txt').write_text('not an image')


def test_broken_photos_are_left_out_by_name(folder, monkeypatch):
    whole = load_images('folder', folder, 16)
    add_broken(folder)
    with pytest.raises(UserError, match='half.png cannot be decoded .*--skip_broken leaves such'):
        load_images('folder', folder, 16)

    def load():
        return load_images('folder', folder, 16, skip_broken=True)

    data = load()
    line = 'left out 2 of 22 images, broken or too small: a/half.png, b/tiny.png'
    assert data.notes == (line,)
    assert data.fingerprint == whole.fingerprint and data.split_bounds == whole.split_bounds
    assert torch.equal(data.files, whole.files)
    for part in ('train', 'validation', 'test'):
        split, expected = getattr(data, part), getattr(whole, part)
        assert np.array_equal(split.images, expected.images) and split.names == expected.names

    decode = photos.decode_photo
    monkeypatch.setattr(photos, 'decode_photo', None)  # they come from the cache
    assert load().notes == data.notes
    monkeypatch.setattr(photos, 'decode_photo', decode)
    with pytest.raises(UserError, match='half.png cannot be decoded .*--skip_broken leaves such'):
        load_images('folder', folder, 16)
    assert len(list(folder.glob('.cache/*.npy'))) == 1


def test_a_broken_photo_has_a_row_of_attributes(folder):
    write_table(folder, attribute_rows())
    whole = load_images('folder', folder, 16)
    (folder / 'b' / '19.png').write_bytes(b'broken')
    data = load_images('folder', folder, 16, skip_broken=True)
    assert len(data.test.images) == len(whole.test.images) - 1
    assert np.array_equal(data.test.attributes, whole.test.attributes[:1])
    assert np.array_equal(data.train.attributes, whole.train.attributes)

    (folder / 'a' / '18.png').write_bytes(b'broken')
    with pytest.raises(UserError, match='need at least one image each'):
        load_images('folder', folder, 16, skip_broken=True)


def test_where_no_photo_can_be_decoded(folder):
    with pytest.raises(UserError, match='all 20 images in .*photos are broken or too small'):
        load_images('folder', folder, 32, skip_broken=True)  # all are too small


def test_photos_are_not_decoded_far_ahead(monkeypatch):
    """So that they do not pile up where they are written slowly."""
    submitted = []

    class Pool(contextlib.nullcontext):
        def __init__(self, n_workers, initializer):
            super().__init__(self)

        def submit(self, decode, files, *args):
            submitted.append(files)
            future = Future()
            future.set_result([np.zeros(1)] * len(files))
            return future

        def shutdown(self, cancel_futures):
            pass

    monkeypatch.setattr(photos, 'ProcessPoolExecutor', Pool)
    monkeypatch.setattr(photos, 'count_usable_cores', lambda: 2)
    files = [Path(f'{i}.jpg') for i in range(64 * 50)]
    decoded = photos.decode_files(files, 'folder', 16, skip_broken=False)
    next(decoded)
    assert len(submitted) == 4 * 2 + 1
    assert 1 + len(list(decoded)) == len(files) and sum(submitted, []) == files


def test_many_names_are_cut(tmp_path):
    files = [tmp_path / f'{i}.jpg' for i in range(30)]
    line = photos.describe_left_out(tmp_path, files, np.arange(30) >= 25)
    assert line.startswith('left out 25 of 30 images') and line.endswith('9.jpg and 15 more')


def test_a_run_keeps_leaving_out(folder, tmp_path, capsys):
    add_broken(folder)
    words = ['--train', '--dataset=folder', f'--data_dir={folder}', f'--output_dir={tmp_path}/out']
    assert '--skip_broken' in refusal_line(glow, capsys, *words, *SMALL)
    train(tmp_path, *SMALL, '--skip_broken')
    assert 'note: left out 2 of 22' in capsys.readouterr().out
    path = only(tmp_path.glob('out/*/best.pt'))
    assert len(glow.load_checkpoint(path)['files']) == 20
    run('evaluate', path)
    out = capsys.readouterr().out
    assert 'left out 2 of 22' in out and 'folder test' in out and 'have changed' not in out
    noise_image(20, 20).save(folder / 'new.png')
    run('evaluate', path)
    out = capsys.readouterr().out
    assert 'left out 2 of 23' in out and 'have changed since training: 1 new' in out


def test_preparing_leaves_out_too(folder, capsys):
    add_broken(folder)
    words = ['prepare', 'folder', f'--data_dir={folder}', '--image_size=16']
    with pytest.raises(SystemExit, match='2'):
        command.main(words)
    assert '--skip_broken' in capsys.readouterr().err
    command.main([*words, '--skip_broken'])
    out = capsys.readouterr().out
    assert out.startswith('note: left out 2 of 22 images')
    assert 'folder: 16 / 2 / 2 images of 3x16x16 are ready' in out


# -------------------------------------------------------------------------------------- attributes


def test_attributes_of_1_and_0(folder):
    write_table(folder, attribute_rows())
    expected = load_images('folder', folder, 16)
    header, *rows = attribute_rows()
    write_table(folder, [header, *[(*row[:2], int(row[2] > 0), row[3]) for row in rows]])
    data = load_images('folder', folder, 16)
    assert data.train.attributes.any() and not data.train.attributes.all()
    for part in ('train', 'validation', 'test'):
        own = getattr(data, part).attributes
        assert np.array_equal(own, getattr(expected, part).attributes)


def test_attributes_as_pandas_writes_them(folder):
    """As truth values or numbers, with the column of splits anywhere, and rows without a photo."""
    write_table(folder, attribute_rows())
    expected = load_images('folder', folder, 16)
    header, *rows = attribute_rows()
    names, words, odd, big = zip(*rows)
    frame = pd.DataFrame(dict(image=names, Odd=np.array(odd) > 0, split=words, Big=1.0))
    frame.loc[len(frame)] = ['gone.png', True, 'train', 0.0]
    frame.to_csv(folder / 'attributes.csv', index=False)
    data = load_images('folder', folder, 16)
    assert data.attribute_names == expected.attribute_names == ('Odd', 'Big')
    assert data.notes == (f'1 of the images in {folder}/attributes.csv are not there',)
    for part in ('train', 'validation', 'test'):
        own, other = getattr(data, part), getattr(expected, part)
        assert own.names == other.names and np.array_equal(own.attributes, other.attributes)

    frame.to_csv(folder / 'attributes.csv')
    with pytest.raises(UserError, match="the first line is ',image,Odd,split,Big'"):
        load_images('folder', folder, 16)


def test_formats_that_are_not_read_are_counted(folder, tmp_path):
    for name in ('x.HEIC', 'a/y.heic', 'b/z.cr2', 'notes.txt', '._x.HEIC'):
        (folder / name).touch()
    line = 'photos of these formats are not read, convert them to .jpg: 1 .cr2, 2 .heic'
    assert load_images('folder', folder, 16).notes == (line,)
    (tmp_path / 'phone').mkdir()
    (tmp_path / 'phone' / 'x.heic').touch()
    with pytest.raises(UserError, match='has no images .*; photos of these formats .* 1 .heic'):
        load_images('folder', tmp_path / 'phone', 16)


def test_a_folder_of_photos_without_its_data_set(folder, tmp_path, monkeypatch, capsys):
    line = refusal_line(glow, capsys, '--train', f'--dataset={folder}')
    assert f'--dataset=folder --data_dir={folder}' in line
    line = refusal_line(glow, capsys, '--train', f'--data_dir={folder}/a')
    assert f'{folder}/a has photos: add --dataset=folder to learn them' in line
    monkeypatch.setenv('HOME', str(tmp_path))
    line = refusal_line(glow, capsys, '--train', '--data_dir=~/photos/a')
    assert f'{folder}/a has photos' in line
    assert photos.split_paths('a.jpg,~/b.jpg') == ['a.jpg', f'{tmp_path}/b.jpg']


def test_names_are_checked_before_photos_are_decoded(folder, tmp_path, monkeypatch, capsys):
    write_table(folder, attribute_rows())
    train(tmp_path, *SMALL)
    shutil.rmtree(folder / '.cache')
    monkeypatch.setattr(photos, 'decode_files', None)
    path = only(tmp_path.glob('out/*/best.pt'))
    restore = f'--restore_file={path}'
    for words in (
        ['--visualize', restore, '--vis_attrs=Smiling'],
        ['--train', '--dataset=folder', f'--data_dir={folder}', '--condition=Smiling'],
    ):
        assert "unknown attribute 'Smiling'" in refusal_line(glow, capsys, *words)
    for words, part in (
        (['--visualize', restore, '--vis_img=none.jpg'], 'there is no photo none.jpg'),
        (['--visualize', restore, f'--vis_img={folder}/a/00.png,none.jpg'], 'no photo none.jpg'),
        (['--evaluate', restore, '--input=none'], '--input=none: there is no such folder'),
    ):
        assert part in refusal_line(glow, capsys, *words)


def test_attribute_names_of_every_data_set(folder, tmp_path):
    assert images.find_attribute_names('faces', 'nowhere')[8] == 'Black_Hair'
    assert images.find_attribute_names('mnist', 'nowhere')[3] == '3'
    assert images.find_attribute_names('cifar10', 'nowhere')[3] == 'cat'
    assert images.find_attribute_names('folder', 'nowhere') == []
    assert images.find_attribute_names('celeba', 'nowhere') == []
    write_table(folder, attribute_rows())
    assert images.find_attribute_names('folder', folder) == ['Odd', 'Big']
    write_celeba(tmp_path / 'celeba')
    names = images.find_attribute_names('celeba', tmp_path / 'celeba')
    assert names[8] == 'Black_Hair' and len(names) == 40


# ---------------------------------------------------------------------------------- CelebA in parts


@pytest.fixture
def kaggle(tmp_path):
    """CelebA with 40 photos, as Kaggle hands it out."""
    write_celeba_of_kaggle(tmp_path / 'kaggle', 40)
    return tmp_path / 'kaggle'


def test_celeba_of_kaggle(kaggle):
    data = load_images('celeba', kaggle, 16)
    assert [len(split.images) for split in (data.train, data.validation, data.test)] == [32, 4, 4]
    assert data.attribute_names[8] == 'Black_Hair' and not data.notes and not data.split_bounds
    assert data.test.names == [f'{i:06}.jpg' for i in range(37, 41)]
    assert data.test.attributes[1].tolist() == [(37 + k) % 3 != 0 for k in range(40)]

    inner = kaggle / 'img_align_celeba'
    for place in (inner, inner / 'img_align_celeba'):
        assert load_images('celeba', place, 16).fingerprint == data.fingerprint


def test_tables_beside_the_photos_of_celeba(kaggle):
    plain = load_images('celeba', kaggle, 16)
    for name in ('list_attr_celeba.csv', 'list_eval_partition.csv'):
        (kaggle / name).rename(kaggle / 'img_align_celeba' / 'img_align_celeba' / name)
    assert load_images('celeba', kaggle, 16).fingerprint == plain.fingerprint


def test_the_folder_of_celebas_photos_itself(kaggle, monkeypatch):
    plain = load_images('celeba', kaggle, 16)
    monkeypatch.chdir(kaggle / 'img_align_celeba' / 'img_align_celeba')
    assert load_images('celeba', '.', 16).fingerprint == plain.fingerprint
    for name in ('list_attr_celeba.csv', 'list_eval_partition.csv'):
        (kaggle / name).rename(kaggle / 'img_align_celeba' / name)
    assert load_images('celeba', kaggle / 'img_align_celeba', 16).fingerprint == plain.fingerprint


def test_some_of_celebas_photos(kaggle):
    for i in range(1, 33, 2):
        (kaggle / f'img_align_celeba/img_align_celeba/{i:06}.jpg').unlink()
    data = load_images('celeba', kaggle, 16)
    assert data.notes[0].startswith('24 of the 40 images of CelebA are in ')
    assert len(data.notes) == 1 and not data.split_bounds
    assert [len(split.images) for split in (data.train, data.validation, data.test)] == [16, 4, 4]
    assert data.train.names == [f'{i:06}.jpg' for i in range(2, 33, 2)]
    assert data.train.attributes[0].tolist() == [(1 + k) % 3 != 0 for k in range(40)]


def test_the_first_photos_of_celeba_are_split_by_their_names(kaggle):
    for i in range(31, 41):
        (kaggle / f'img_align_celeba/img_align_celeba/{i:06}.jpg').unlink()
    data = load_images('celeba', kaggle, 16)
    assert [len(split.images) for split in (data.train, data.validation, data.test)] == [24, 3, 3]
    assert len(data.split_bounds) == 2 and 'split by their names' in data.notes[1]

    (kaggle / 'img_align_celeba/img_align_celeba' / data.train.names[0]).unlink()
    again = load_images('celeba', kaggle, 16, data.split_bounds)  # as of a run
    assert again.train.names == data.train.names[1:]
    assert again.test.names == data.test.names and again.validation.names == data.validation.names
    with pytest.raises(UserError, match='at least one image each'):
        load_images('celeba', kaggle, 16, [])  # of a run that had CelebA's own split


def test_an_empty_table_of_celeba(kaggle):
    (kaggle / 'list_attr_celeba.csv').write_text('')
    assert images.find_attribute_names('celeba', kaggle) == []
    with pytest.raises(UserError, match='40 of the images in .* are not in .*attr_celeba.csv'):
        load_images('celeba', kaggle, 16)


def test_broken_photos_that_empty_a_split_of_celeba(kaggle):
    for i in range(33, 37):  # those that validate
        (kaggle / f'img_align_celeba/img_align_celeba/{i:06}.jpg').write_bytes(b'broken')
    data = load_images('celeba', kaggle, 16, skip_broken=True)
    assert len(data.validation.images) == 3 and len(data.split_bounds) == 2
    assert 'split by their names' in data.notes[0] and '000033.jpg' in data.notes[1]


@pytest.mark.parametrize(
    'missing, name',
    [
        ('list_attr_celeba.csv', r'list_attr_celeba.txt \(or .csv\)'),
        ('list_eval_partition.csv', r'list_eval_partition.txt \(or .csv\)'),
        ('img_align_celeba', 'img_align_celeba'),
    ],
)
def test_the_missing_part_of_celeba_is_named(missing, name, kaggle):
    (kaggle / missing).rename(kaggle / 'away')
    with pytest.raises(UserError, match=f'celeba is not in .*: what is there lacks {name}, which'):
        load_images('celeba', kaggle, 16)


def test_a_photo_without_a_row(kaggle):
    noise_image(178, 218).save(kaggle / 'img_align_celeba' / 'img_align_celeba' / 'me.jpg')
    with pytest.raises(UserError, match="1 of the images in .* are not in .*, such as 'me.jpg'"):
        load_images('celeba', kaggle, 16)


@pytest.mark.slow
def test_half_of_celeba_trains_and_edits(kaggle, tmp_path, capsys):
    for i in range(1, 41, 2):
        (kaggle / f'img_align_celeba/img_align_celeba/{i:06}.jpg').unlink()
    words = [f'--data_dir={kaggle}', f'--output_dir={tmp_path}/out']
    glow.main(['--train', '--dataset=celeba', *SMALL, *words])
    glow.main(['--visualize', '--vis_attrs=8,20', *words])
    out = capsys.readouterr().out
    assert 'defaults for 20 photos' in out and '20 of the 40 images of CelebA' in out
    assert 'have changed' not in out and 'is not what' not in out
    assert only(tmp_path.glob('out/*/manipulated_sample_attr_8,20.png'))


# ---------------------------------------------------------------------------------------- pictures


def bins(array, n_bits=5):
    """Return uint8 images at so many bits."""
    return np.asarray(array) >> (8 - n_bits)


def middle_of_arc(z):
    """Return what is half-way between two latents on the great circle through them."""
    first, second = z.double()
    cosine = first @ second / (first.norm() * second.norm())
    return ((first + second) / (2 * (cosine.arccos() / 2).cos())).float()


def test_walks_between_latents():
    """An arc leads from one to the other, as far from 0 as these are; equal ends stay."""
    z = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    z = 5 * z / z.norm(dim=1, keepdim=True)
    y = torch.eye(2)
    points, conditions = latents.walk_between(z, y)([0.0, 0.25, 0.5, 1.0])
    assert torch.equal(points[[0, -1]], z)
    torch.testing.assert_close(points.norm(dim=1), torch.full((4,), 5.0))
    torch.testing.assert_close(points[2], middle_of_arc(z))
    assert conditions.tolist() == [[1, 0], [0.75, 0.25], [0.5, 0.5], [0, 1]]

    same = torch.stack([z[0], z[0]])
    points, conditions = latents.walk_between(same, None)([0.0, 0.5, 1.0])
    torch.testing.assert_close(points, z[[0, 0, 0]])
    assert conditions is None


def test_test_images_are_reconstructed_and_interpolated(trained, saved_grids):
    run('visualize', trained, '--vis_gif')
    (name, (originals, decoded), labels), (name_2, rows, *_) = saved_grids
    assert name == 'reconstructed_sample.png' and name_2 == 'interpolation_sample.png'
    assert labels == ['images', 'decoded']
    test = load_images('folder', photo_in(trained, 0).parent, 16).test.images
    assert np.array_equal(originals, test[:8])
    assert np.array_equal(bins(decoded), bins(originals))
    assert len(rows) == 4 and {len(row) for row in rows} == {9}
    for k, row in enumerate(rows):
        assert np.array_equal(bins(row[[0, -1]]), bins(test[[2 * k, 2 * k + 1]]))

    z = glow.encode(model_of(trained), test[:2], CPU)
    middle = glow.decode(model_of(trained), middle_of_arc(z)[None])[0]
    assert np.abs(bins(rows[0][4]).astype(int) - bins(middle)).max() <= 1

    with Image.open(trained.with_name('interpolation_sample.gif')) as gif:
        assert gif.n_frames == 2 * 32 and gif.info['loop'] == 0
        assert gif.size == (4 * (128 + 8) + 8, 128 + 2 * 8)


def test_from_one_photo_to_another_without_the_data(trained, saved_grids, tmp_path):
    a, b = photo_in(trained, 3), photo_in(trained, 4)
    place = shutil.copy(trained, tmp_path)
    words = ['--data_dir=nowhere', '--vis_gif', f'--output={tmp_path}/new/pictures']
    run('visualize', place, f'--vis_img={a}, {b}', *words)
    ((name, (row,), *_),) = saved_grids
    assert name == 'interpolation_img_003_004.png'
    ends = [photos.load_photo(path, 'folder', 16) for path in (a, b)]
    assert np.array_equal(bins(row[[0, -1]]), bins(ends))
    found = sorted(path.name for path in tmp_path.rglob('*'))
    assert found == ['best.pt', 'interpolation_img_003_004.gif', name, 'new', 'pictures']


def test_a_photo_and_its_neighbours(trained, saved_grids):
    run('visualize', trained, f'--vis_img={photo_in(trained, 5)}', '--z_std=0.9')
    run('visualize', trained, f'--vis_img={photo_in(trained, 5)}')
    assert saved_grids[0][0] == 'neighbours_of_img_005_z_std_0.9.png'
    name, (first, *rows), labels = saved_grids[1]
    assert name == 'neighbours_of_img_005.png'
    assert np.array_equal(bins(first[0]), bins(first[1])) and len(first) == 2
    assert labels[1:] == ['T = 0.1', 'T = 0.2', 'T = 0.3', 'T = 0.5']
    assert {len(row) for row in rows} == {8}
    distances = [np.abs(row.astype(float) - first[0]).mean() for row in rows]
    assert 0 < distances[0] < distances[1] < distances[2] < distances[3]


def test_long_names(trained, tmp_path):
    """Names of files have at most 255 bytes, and each of these characters three or four."""
    paths = [tmp_path / (character * n + '.png') for character, n in (('写', 80), ('🙂', 60))]
    for path in paths:
        noise_image(20, 20).save(path)
    words = [f'--vis_img={paths[0]},{paths[1]}', f'--output={tmp_path}/out']
    run('visualize', trained, *words)
    picture = only((tmp_path / 'out').iterdir())
    assert picture.name == f'interpolation_img_{"写" * 20}_{"🙂" * 15}.png'


def test_a_name_with_a_comma(tmp_path):
    (tmp_path / 'a,b.jpg').touch()
    assert photos.split_paths(f'{tmp_path}/a,b.jpg') == [f'{tmp_path}/a,b.jpg']
    assert photos.split_paths('a.jpg, b.jpg') == ['a.jpg', 'b.jpg']
    assert photos.split_paths('') == []


def test_directions_where_nothing_can_be_written(trained_glow, tmp_path, monkeypatch):
    """They are computed anew each time."""
    saved, data = glow.load_checkpoint(trained_glow), load_images('digits')
    monkeypatch.setattr(tensors, 'make_writable', lambda folder: False)
    args = model_of(trained_glow), data, tmp_path / 'best.pt', saved['config'], CPU
    first, second = glow.attribute_directions(*args), glow.attribute_directions(*args)
    assert torch.equal(first, second) and not list(tmp_path.iterdir())


def test_edits_as_a_gif(trained_glow, saved_grids):
    words = ['--vis_attrs=3,5', '--vis_alphas=-1,0,1', '--vis_gif']
    run('visualize', trained_glow, *words)
    ((name, rows, *_),) = saved_grids
    assert name == 'manipulated_sample_attr_3,5.png' and len(rows) == 2
    path = trained_glow.with_name('manipulated_sample_attr_3,5.gif')
    with Image.open(path) as gif:
        assert gif.n_frames == 16  # 9 from -1 to 1, and 7 on the way back
        for frame, column in ((0, 0), (4, 1), (8, 2), (12, 1)):
            gif.seek(frame)
            shown = np.asarray(gif.convert('L')).astype(int)
            middles = shown[34 + 8 : 34 + 128 : 16, 8 + 8 : 8 + 128 : 16]  # below the labels
            assert np.abs(middles - rows[0][column][0]).max() <= 8
    path.unlink()


def test_a_gif_of_one_image_is_larger(tmp_path):
    frames = [np.full((1, 3, 16, 16), 100 * k, np.uint8) for k in range(2)]
    grids.save_gif(tmp_path / 'one.gif', frames)
    with Image.open(tmp_path / 'one.gif') as gif:
        assert gif.n_frames == 2 and gif.size == (272, 272)


@pytest.mark.parametrize(
    'words, part',
    [
        (['--vis_img=a.jpg,b.jpg,c.jpg'], '3 photos'),
        (['--vis_img=a.jpg,b.jpg', '--vis_attrs=3'], 'two photos'),
        (['--vis_img=a.jpg,b.jpg', '--vis_alphas=1'], 'two photos'),
        (['--vis_img=a.jpg,b.jpg', '--given=3'], 'two photos'),
        (['--vis_img=a.jpg', '--vis_gif'], 'no row of steps'),
        (['--vis_attrs=3'], 'no attributes'),
        (['--vis_attrs=3', '--data_dir=gone'], 'gone is no folder'),
        (['--given=3'], '--condition'),
        (['--vis_img=nowhere.jpg'], 'no photo nowhere.jpg'),
    ],
)
def test_pictures_that_cannot_be_drawn(words, part, trained, capsys):
    line = refusal_line(glow, capsys, '--visualize', f'--restore_file={trained}', *words)
    assert part in line


def test_a_gif_of_one_step(trained_glow, capsys):
    words = ['--visualize', f'--restore_file={trained_glow}', '--vis_gif', '--vis_alphas=1']
    assert 'no row of steps' in refusal_line(glow, capsys, *words)


# ------------------------------------------------------------------------------------------ scores


def read_scores(path):
    """Return the rows of a table of scores as dicts."""
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def test_photos_are_scored_by_name(trained, tmp_path, capsys):
    new = tmp_path / 'new'
    (new / 'in').mkdir(parents=True)
    for i in range(12):
        noise_image(30, 20, 300 + i).save(new / 'in' / f'{i:02}.png')
    Image.new('RGB', (50, 50), 'white').save(new / 'white.png')
    scores = tmp_path / 'scores.csv'
    run('evaluate', trained, f'--input={new}', f'--scores={scores}', '--data_dir=nowhere')

    rows = read_scores(scores)
    names = [*(f'in/{i:02}.png' for i in range(12)), 'white.png']
    assert [row['image'] for row in rows] == names
    arrays = np.stack([photos.load_photo(new / name, 'folder', 16) for name in names])
    split = ImageSplit(arrays, np.zeros((13, 0), bool))
    by_place, _ = glow.bits_per_dim(model_of(trained), split, 768, 7, single_process(glow))
    bits = np.array([float(row['bits_per_dim']) for row in rows])
    mean, error = bits.mean(), 2 * bits.std() / math.sqrt(13)
    assert mean == pytest.approx(by_place, rel=2e-3)  # with other noise

    out = capsys.readouterr().out
    assert f'{new}: {mean:.4f} ± {error:.4f} bits/dim at 5 bits (13 images' in out
    worst = names[int(bits.argmax())]
    first_line = next(line for line in out.splitlines() if line.startswith('least likely: '))
    assert first_line.startswith(f'least likely: {worst}: {bits.max():.4f} bits/dim, percentile ')
    assert out.count('least likely: ') == 5

    # the percentile says how many of the 20 validation images are less likely
    known = glow.load_checkpoint(trained)['validation_quantiles']
    data = load_images('folder', photo_in(trained, 0).parent, 16)
    process = single_process(glow)
    of_validation = glow.score_split(
        model_of(trained), data.validation, data.condition, 768, 9, process
    )['bits_per_dim'].numpy()
    assert known == pytest.approx(np.sort(-of_validation), rel=1e-6)
    for row in rows:
        share = 100 * (of_validation > float(row['bits_per_dim'])).mean()
        assert abs(float(row['percentile']) - share) <= 100 / 19 + 1e-6


def test_a_photo_has_the_same_score_among_others(trained, tmp_path):
    (tmp_path / 'new').mkdir()
    for name, i in (('a', 1), ('b', 2), ('c', 1)):
        noise_image(20, 20, i).save(tmp_path / 'new' / f'{name}.png')
    tables = []
    for path in (tmp_path / 'new', tmp_path / 'new' / 'c.png'):
        scores = tmp_path / f'{path.stem}.csv'
        run('evaluate', trained, f'--input={path}', f'--scores={scores}')
        tables.append([float(row['bits_per_dim']) for row in read_scores(scores)])
    (a, b, c), (alone,) = tables
    assert a == c == pytest.approx(alone, rel=1e-6) and a != b


def test_results_of_photos_go_where_they_are_asked_for(trained, tmp_path):
    before = trained.with_name('results.json').read_text()
    place = tmp_path / 'out'
    run('evaluate', trained, f'--input={photo_in(trained, 1).parent}', f'--output={place}')
    results = json.loads((place / 'results.json').read_text())
    assert results['n_images'] == 200 and 0 < results['bits_per_dim'] < 8
    assert trained.with_name('results.json').read_text() == before


def test_names_of_strangers_are_escaped(trained, tmp_path, capsys):
    (tmp_path / 'new').mkdir()
    for name in (b'a\xff.png', b'b\x1b[31m\n.png'):
        noise_image(20, 20).save(tmp_path / 'new.png')
        os.rename(tmp_path / 'new.png', os.path.join(os.fsencode(tmp_path / 'new'), name))
    (tmp_path / 'new' / 'c\x1b.png').touch()
    scores = tmp_path / 'scores.csv'
    run('evaluate', trained, f'--input={tmp_path}/new', f'--scores={scores}', '--skip_broken')
    out = capsys.readouterr().out
    assert '\x1b' not in out and 'c\\x1b.png' in out and 'a\\udcff.png' in out
    names = [row['image'] for row in read_scores(scores)]
    assert names == ['a\\udcff.png', 'b\\x1b[31m\\n.png']


def test_a_photo_without_a_score_is_the_least_likely(capsys):
    columns = {'image': np.array(['a', 'b', 'c']), 'bits_per_dim': np.array([1.0, math.nan, 2.0])}
    print_least_likely(columns)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(': ')[1] for line in lines] == ['b', 'c', 'a']


def test_a_single_photo_and_the_test_split_are_scored(trained, tmp_path, capsys):
    photo = photo_in(trained, 7)
    run('evaluate', trained, f'--input={photo}')
    out = capsys.readouterr().out
    assert '\n007.png: ' in out and '±' not in out and 'percentile' in out

    scores = tmp_path / 'scores.csv'
    run('evaluate', trained, f'--scores={scores}', f'--output={tmp_path}')
    test = load_images('folder', photo.parent, 16).test
    rows = read_scores(scores)
    assert [row['image'] for row in rows] == list(test.names)
    mean = np.mean([float(row['bits_per_dim']) for row in rows])
    assert f'{mean:.4f} ±' in capsys.readouterr().out
    assert (tmp_path / 'results.json').exists()


def test_images_without_files_are_scored_by_number(trained_glow, tmp_path):
    scores = tmp_path / 'scores.csv'
    run('evaluate', trained_glow, f'--scores={scores}', f'--output={tmp_path}')
    assert [row['image'] for row in read_scores(scores)] == list(map(str, range(179)))


def test_an_older_checkpoint_knows_no_percentiles(trained_glow, tmp_path):
    saved = glow.load_checkpoint(trained_glow)
    for quantiles in ([], [-3.0] * 9):
        request = glow.Request(scores=f'{tmp_path}/scores.csv')
        scores = {'bits_per_dim': torch.tensor([2.0, 3.0])}
        older = {**saved, 'validation_quantiles': quantiles}
        columns = glow.save_scores(scores, ['a', 'b'], older, request)
        assert list(columns) == ['image', 'bits_per_dim']
    for quantiles in ([-3.0] * 9 + [-4.0], [math.nan] * 20):
        with pytest.raises(UserError, match='is damaged: its validation_quantiles'):
            glow.save_scores(scores, ['a'], {**older, 'validation_quantiles': quantiles}, request)


def test_input_that_cannot_be_scored(trained, tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    noise_image(8, 8).save(tmp_path / 'small.png')
    (tmp_path / 'there.csv').touch()
    restore = f'--restore_file={trained}'
    for words, part in (
        ([f'--input={tmp_path}/empty'], 'has no images'),
        ([f'--input={tmp_path}/none'], 'no such folder'),
        ([f'--input={tmp_path}/small.png'], 'too small: 8x8'),
        ([f'--input={tmp_path}/there.csv'], 'cannot be decoded'),
        ([f'--scores={tmp_path}/there.csv'], '--overwrite'),
        (['--scores=scores.npy'], 'should end in .csv'),
        ([f'--scores={tmp_path}/none/scores.csv'], 'no folder'),
        ([f'--output={tmp_path}/there.csv'], 'there.csv is no folder that can be written to'),
    ):
        assert part in refusal_line(glow, capsys, '--evaluate', restore, *words)
    assert '--input goes with --evaluate' in refusal_line(glow, capsys, '--generate', '--input=a')

    noise_image(20, 20).save(tmp_path / 'large.png')
    (tmp_path / 'there.csv').unlink()
    run('evaluate', trained, f'--input={tmp_path}', '--skip_broken')
    out = capsys.readouterr().out
    assert 'note: left out 1 of 2 images' in out and 'small.png' in out and '\nlarge.png: ' in out


def test_a_photo_of_a_model_with_conditions_is_scored_by_p_of_x(tmp_path):
    """So are test images, and the validation images that it is compared with."""
    words = ['--dataset=digits', '--condition=classes', '--n_epochs=1', '--depth=1', '--width=4']
    words += ['--lr=0.02', '--n_epochs_warmup=0', f'--output_dir={tmp_path}/out']
    glow.main(['--train', *words])
    path = only(tmp_path.glob('out/*/best.pt'))
    saved = glow.load_checkpoint(path)
    data = load_run_images(saved['config'], saved)
    (tmp_path / 'new').mkdir()
    for i in range(30):
        Image.fromarray(data.test.images[i, 0]).save(tmp_path / 'new' / f'{i:02}.png')
    scores = [f'--scores={tmp_path}/{name}.csv' for name in ('new', 'test')]
    run('evaluate', path, f'--input={tmp_path}/new', scores[0])
    run('evaluate', path, scores[1])
    of_new, of_test = (read_scores(tmp_path / f'{name}.csv') for name in ('new', 'test'))

    def expected(split, seeds=None):
        process = single_process(glow)
        values = glow.score_split(model_of(path), split, data.condition, 64, 60, process, seeds)
        of_x = values[glow.WITHOUT_CONDITIONS].numpy()
        assert np.abs(of_x - values['bits_per_dim'].numpy()).max() > 1e-3  # not p(x | y)
        return of_x

    first = replace(data.test, images=data.test.images[:30], conditions=data.test.conditions[:30])
    seeds = [zlib.crc32(image.tobytes()) for image in first.images]
    for rows, bits in ((of_new, expected(first, seeds)), (of_test, expected(data.test))):
        assert [float(row['bits_per_dim']) for row in rows] == pytest.approx(bits, rel=1e-5)
    known = saved['validation_quantiles']
    assert known == pytest.approx(np.sort(-expected(data.validation)), rel=1e-5)


# ------------------------------------------------------------------------------------- from Python


def test_encode_takes_tensors_and_arrays_without_a_warning(trained):
    data = load_images('folder', photo_in(trained, 0).parent, image_size=16)
    model, array = model_of(trained), data.test.images[:3]
    read_only = array.copy()
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        latents = [
            glow.encode(model, x, CPU)
            for x in (array, read_only, torch.tensor(array), array[:, :, ::-1][:, :, ::-1])
        ]
    for z in latents[1:]:
        assert torch.equal(z, latents[0])
