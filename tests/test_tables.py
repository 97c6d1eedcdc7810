"""Tables: the published ones against their authors' own steps on small files of their formats, and the user's own."""

import gzip
import io
import pickle
import resource
import zipfile
from collections import Counter

import h5py
import numpy as np
import pandas as pd
import pytest
import tiny_tables
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import UserError
from datasets import tabular, toy


@pytest.fixture
def sizes(monkeypatch, tmp_path):
    """Tables of 200 rows pass for whole ones, and are read in several chunks; caches go below tmp_path"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tabular, 'CHUNK', 60)

    def set_sizes(name, counts):
        monkeypatch.setitem(tabular.TABLES, name, (counts, *tabular.TABLES[name][1:]))

    for name in tabular.TABLES:
        set_sizes(name, (162, 18, 20))
    return set_sizes


def load(name, folder):
    data = tabular.load_table(name, folder)
    return [np.asarray(part) for part in (data.train, data.validation, data.test)]


def tenths(data):
    """The authors' split: the last tenth, then the last tenth of what is left"""
    n_test = int(0.1 * len(data))
    rest = data[:-n_test]
    n_validation = int(0.1 * len(rest))
    return rest[:-n_validation], rest[-n_validation:], data[-n_test:]


def scaled(splits):
    known = np.vstack(splits[:2])
    return [(part - known.mean(0)) / known.std(0) for part in splits]


def assert_same(splits, expected):
    for part, wanted in zip(splits, expected):
        assert part.dtype == np.float32
        np.testing.assert_allclose(part, wanted, rtol=1e-5, atol=1e-5)


def test_power_is_shuffled_and_noised_as_by_its_authors(sizes, tmp_path):
    tiny_tables.write_power(tmp_path)
    rng = np.random.RandomState(42)
    data = np.load(tmp_path / 'power' / 'data.npy')
    rng.shuffle(data)  # the rows themselves, as they do it
    data = np.delete(np.delete(data, 3, 1), 1, 1)
    voltage, power, metering = 0.01 * rng.rand(200, 1), 0.001 * rng.rand(200, 1), rng.rand(200, 3)
    assert_same(
        load('power', tmp_path),
        scaled(tenths(data + np.hstack([power, voltage, metering, np.zeros((200, 1))]))),
    )


def test_raw_power_drops_rows_with_missing_values(sizes, tmp_path):
    sizes('power', (147, 16, 18)), tiny_tables.write_raw_power(tmp_path, 202)
    splits = load('power', tmp_path)
    known = np.concatenate(splits[:2])
    np.testing.assert_allclose(known.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(known.std(0), 1, atol=1e-5)
    assert [part.shape for part in splits] == [(147, 6), (16, 6), (18, 6)]


@pytest.mark.parametrize('protocol', [0, 2, 4, 5, 'of 2016'])
def test_gas(protocol, sizes, tmp_path):
    if protocol == 'of 2016':
        tiny_tables.write_old_gas(tmp_path)
    else:
        tiny_tables.write_gas(tmp_path, protocol=protocol)
    data = tiny_tables.gas_table(200).drop(columns=['Meth', 'Eth', 'Time'])
    while True:  # the authors' loop
        many = (data.corr() > 0.98).sum(axis=1)
        if not np.any(many > 1):
            break
        data = data.drop(columns=data.columns[np.where(many > 1)[0][0]])
    assert data.shape == (200, 8)
    assert_same(load('gas', tmp_path), tenths(((data - data.mean()) / data.std()).to_numpy()))


def test_raw_gas_is_every_fourth_row(sizes, tmp_path):
    tiny_tables.write_raw_gas(tmp_path / 'raw')
    (tmp_path / 'authors' / 'gas').mkdir(parents=True)
    tiny_tables.gas_table(800)[3::4].to_pickle(tmp_path / 'authors' / 'gas' / 'ethylene_CO.pickle')
    raw = load('gas', tmp_path / 'raw')
    assert [part.shape for part in raw] == [(162, 8), (18, 8), (20, 8)]
    assert_same(raw, load('gas', tmp_path / 'authors'))


@pytest.mark.parametrize('gzipped', [False, True])
def test_hepmass(gzipped, sizes, tmp_path):
    sizes('hepmass', (270, 30, 150)), tiny_tables.write_hepmass(tmp_path)
    train, test = (
        pd.read_csv(tmp_path / 'hepmass' / f'1000_{part}.csv', index_col=False)
        for part in ('train', 'test')
    )
    if gzipped:
        for part in ('train', 'test'):
            path = tmp_path / f'1000_{part}.csv'
            (tmp_path / 'hepmass' / path.name).rename(path)
            tiny_tables.compress(path)
    train, test = (part[part.iloc[:, 0] == 1].iloc[:, 1:] for part in (train, test))
    test = test.iloc[:, :-1]
    train, test = ((part - train.mean()) / train.std() for part in (train, test))
    kept = [
        k for k in train if [n for _, n in sorted(Counter(train[k]).items())][0] <= 5
    ]  # the authors' rule
    assert len(kept) == 21
    train, test = train[kept].to_numpy(), test[kept].to_numpy()
    assert_same(load('hepmass', tmp_path), [train[:-30], train[-30:], test])


def test_miniboone(sizes, tmp_path):
    tiny_tables.write_miniboone(tmp_path)
    assert_same(
        load('miniboone', tmp_path), scaled(tenths(np.load(tmp_path / 'miniboone' / 'data.npy')))
    )


def test_raw_miniboone_is_the_signal_without_outliers(sizes, tmp_path):
    tiny_tables.write_raw_miniboone(tmp_path)
    splits = load('miniboone', tmp_path)
    assert [part.shape for part in splits] == [(162, 43), (18, 43), (20, 43)]
    assert np.abs(np.concatenate(splits)).max() < 20


def test_bsds300(sizes, tmp_path):
    tiny_tables.write_bsds300(tmp_path, (162, 18, 20))
    import h5py

    with h5py.File(tmp_path / 'BSDS300' / 'BSDS300.hdf5') as file:
        assert_same(
            load('bsds300', tmp_path), [file[part][:] for part in ('train', 'validation', 'test')]
        )


def test_bsds300_from_images(sizes, tmp_path):
    """Patches of noise pictures: uniform in [0, 1] less the mean of the 64 pixels, of which the last is not there"""
    sizes('bsds300', (2000, 100, 500)), tiny_tables.write_bsds300_images(tmp_path)
    train, validation, test = load('bsds300', tmp_path)
    assert train.shape == (2000, 63) and validation.shape == (100, 63) and test.shape == (500, 63)
    for part in (train, test):
        assert abs(part.mean()) < 0.01 and part.std() == pytest.approx(
            np.sqrt(63 / 64 / 12), rel=0.05
        )
        assert len(np.unique(part)) > 0.9 * part.size  # the noise makes them continuous
    again = load('bsds300', tmp_path)
    np.testing.assert_array_equal(train, again[0])


def test_parsed_once_and_anew_when_the_file_changes(sizes, tmp_path, monkeypatch):
    tiny_tables.write_miniboone(tmp_path)
    first = load('miniboone', tmp_path)[0]
    monkeypatch.setattr(tabular, 'prepare_miniboone', lambda path: pytest.fail('parsed again'))
    np.testing.assert_array_equal(load('miniboone', tmp_path)[0], first)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(
        tabular.TABLES, 'miniboone', ((81, 9, 10), *tabular.TABLES['miniboone'][1:])
    )
    tiny_tables.write_miniboone(tmp_path, 100)
    assert len(load('miniboone', tmp_path)[0]) == 81


class Payload:
    def __reduce__(self):
        return print, ('it ran',)


def test_a_hostile_pickle_runs_nothing(sizes, tmp_path, capsys):
    (tmp_path / 'gas').mkdir()
    path = tmp_path / 'gas' / 'ethylene_CO.pickle'
    for content in (Payload(), [tiny_tables.gas_table(200), Payload()], {'a': 1}, pd.Series([1.0])):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match='cannot be read as gas'):
            tabular.load_table('gas', tmp_path)
    assert 'it ran' not in capsys.readouterr().out


def image_bomb():
    content = io.BytesIO()
    with zipfile.ZipFile(content, 'w') as archive:
        image = io.BytesIO()
        Image.new('1', (9_000, 9_000)).save(image, 'png')
        archive.writestr('images/train/1.jpg', image.getvalue())
    return content.getvalue()


def h5_bomb(name, shape):
    content = io.BytesIO()
    with h5py.File(content, 'w') as file:
        file.create_dataset(name, shape, 'f8', chunks=(1000, 10), compression='gzip')
    return content.getvalue()


def npy_bomb():
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        content, {'descr': '<f8', 'fortran_order': False, 'shape': (10**10, 43)}
    )
    return content.getvalue()


@pytest.mark.parametrize(
    'name, path, content, part',
    [
        ('hepmass', '1000_train.csv.gz', gzip.compress(bytes(10**9), 1), 'line of more than'),
        (
            'hepmass',
            '1000_train.csv.gz',
            gzip.compress(b'a,b\n' + 1_000 * (b'0,1\n' * 1_000)),
            'more than 100,000 rows',
        ),
        ('gas', 'ethylene_CO.txt', b'x' * 5_000, 'line of more than'),
        ('power', 'power/data.npy', npy_bomb(), 'cannot be read'),
        ('miniboone', 'miniboone/data.npy', npy_bomb(), 'cannot be read'),
        ('bsds300', 'bsds300_gray.zip', image_bomb(), '9000x9000'),
        (
            'bsds300',
            'BSDS300/BSDS300.hdf5',
            h5_bomb('train', (10**10, 63)),
            'BSDS300.hdf5 cannot be read',
        ),
        ('own.npy', 'own.npy', npy_bomb(), 'cannot be read'),
        ('own.h5', 'own.h5', h5_bomb('rows', (10**10, 10)), 'has not the size for it'),
    ],
)
def test_bombs_take_no_memory(name, path, content, part, sizes, tmp_path, monkeypatch):
    monkeypatch.setattr(tabular, 'MAX_ROWS', 100_000)
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_bytes(content)
    del content
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=part):
        tabular.load_table(name, tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@settings(max_examples=100, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=100),
        st.lists(
            st.lists(
                st.sampled_from(
                    ['1', '-2.5', '?', '', 'nan', '1e400', '12:34:56', '16/12/2006', '#']
                ),
                max_size=9,
            ).map(';'.join),
            max_size=8,
        ).map(lambda lines: '\n'.join(['Date;Time;a;b;c;d;e;f;g', *lines]).encode()),
    )
)
def test_any_bytes_are_power_gas_or_miniboone_or_a_clean_error(tmp_path_factory, content):
    for name, file in (
        ('power', 'household_power_consumption.txt'),
        ('gas', 'ethylene_CO.txt'),
        ('miniboone', 'MiniBooNE_PID.txt'),
        ('hepmass', '1000_train.csv'),
    ):
        folder = tmp_path_factory.getbasetemp() / f'fuzz_{name}'
        folder.mkdir(exist_ok=True)
        (folder / file).write_bytes(content)
        with pytest.raises(UserError):  # for want of rows, if for nothing else
            tabular.load_table(name, folder)


@pytest.mark.parametrize(
    'name, path, content, part',
    [
        ('power', 'power/data.npy', b'', 'cannot be read as power'),
        ('power', 'power/data.npy', b'\x93NUMPY', 'cannot be read as power'),
        ('gas', 'gas/ethylene_CO.pickle', b'\x80\x02}', 'cannot be read as gas'),
        ('hepmass', 'hepmass/1000_train.csv', b'a,b\n1,2\n', 'cannot be read as hepmass'),
        ('miniboone', 'MiniBooNE_PID.txt', b'x', 'cannot be read as miniboone'),
        ('bsds300', 'BSDS300/BSDS300.hdf5', b'\x89HDF', 'cannot be read as bsds300'),
        ('bsds300', 'bsds300_gray.zip', b'PK\x05\x06' + bytes(18), 'no images/train'),
    ],
)
def test_damaged_published_tables(name, path, content, part, sizes, tmp_path):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_bytes(content)
    with pytest.raises(UserError, match=part):
        tabular.load_table(name, tmp_path)


def test_wrong_counts_and_missing_values(sizes, tmp_path):
    tiny_tables.write_miniboone(tmp_path, 150)
    with pytest.raises(UserError, match='truncated, or another version'):
        tabular.load_table('miniboone', tmp_path)
    data = np.full((200, 43), 1.0) + np.random.default_rng(0).random((200, 43))
    data[7, 3] = np.nan
    np.save(tmp_path / 'miniboone' / 'data.npy', data)
    with pytest.raises(UserError, match='missing or infinite'):
        tabular.load_table('miniboone', tmp_path)


# ------------------------------------------------------------------------------------------------- own tables


def own(tmp_path, values, name='table.csv', columns=None):
    path = tmp_path / name
    if name.endswith('.csv'):
        pd.DataFrame(values, columns=columns).to_csv(path, index=False, header=columns is not None)
    elif name.endswith('.npy'):
        np.save(path, values)
    else:
        tabular.write_table(
            path, '.h5', values, columns or [f'c{k}' for k in range(np.shape(values)[1])]
        )
    return path


@pytest.mark.parametrize('name', ['table.csv', 'table.npy', 'table.h5'])
def test_own_table(name, tmp_path):
    values = tiny_tables.columns_of(np.random.default_rng(0), 300, 3) * [1, 1e-3, 1e6] + [0, 5, 1e9]
    data = tabular.load_table(str(own(tmp_path, values, name)))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [240, 30, 30]
    assert np.concatenate([data.train, data.validation, data.test]).shape == (300, 3)
    np.testing.assert_allclose(data.train.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(data.train.std(0), 1, atol=1e-5)
    np.testing.assert_allclose(
        data.test * data.std + data.mean, values[data.test_index], rtol=1e-5, atol=1e-4
    )
    other = tabular.load_table(str(tmp_path / name), seed=1)
    assert not np.array_equal(other.test_index, data.test_index)


def test_own_table_with_a_header_and_a_test_file(tmp_path):
    rng = np.random.default_rng(0)
    path = own(tmp_path, rng.normal(size=(100, 2)), columns=['height', '2'])
    test = own(tmp_path, rng.normal(size=(7, 2)), 'test.npy')
    data = tabular.load_table(str(path), test_file=str(test))
    assert data.columns == ('height', '2') and data.column_index('height') == 0
    assert [len(part) for part in (data.train, data.validation, data.test)] == [90, 10, 7]
    np.testing.assert_allclose(
        data.test * data.std + data.mean, np.load(test), rtol=1e-5, atol=1e-5
    )


def test_discrete_columns_are_noted_and_dequantized(tmp_path):
    rng = np.random.default_rng(0)
    values = np.column_stack([rng.normal(size=500), rng.integers(0, 5, 500) * 0.5])
    path = str(own(tmp_path, values, columns=['a', 'grade']))
    data = tabular.load_table(path)
    assert len(data.notes) == 1 and data.notes[0].startswith('grade: few distinct values')
    data = tabular.load_table(path, dequantize=True)
    grades = data.train[:, 1] * data.std[1] + data.mean[1]
    assert (
        not data.notes
        and len(np.unique(grades)) == 400
        and grades.min() >= 0
        and grades.max() < 2.5
    )
    assert (np.floor(np.sort(grades) / 0.5) == np.sort(np.floor(grades / 0.5))).all()


def test_columns_that_follow_from_others_are_noted(tmp_path):
    values = np.random.default_rng(0).normal(size=(500, 3)) * [1, 1e3, 1e-3]
    assert not tabular.load_table(str(own(tmp_path, values))).notes
    for column in (values[:, 1], 5 - values[:, 2], values @ [1, 1, 1]):
        (note,) = tabular.load_table(str(own(tmp_path, np.column_stack([values, column])))).notes
        assert note.startswith('some columns follow exactly from others')


def table_with(value, row=3, column=1, n=30):
    values = np.random.default_rng(0).normal(size=(n, 3)).astype(object)
    values[row, column] = value
    return values


@pytest.mark.parametrize(
    'values, part',
    [
        (table_with(np.nan), '1 missing or infinite values, the first in column b, row 3'),
        (table_with(np.inf), '1 missing or infinite values, the first in column b, row 3'),
        (table_with('red'), "column b is not numeric: 'red' in row 3"),
        (
            np.column_stack([np.random.default_rng(0).normal(size=(30, 2)), np.full(30, 7.0)]),
            'column c is constant',
        ),
        (np.random.default_rng(0).normal(size=(5, 3)), '5 rows and 3 columns'),
        (np.random.default_rng(0).normal(size=(2, 3)), 'many more rows than columns'),
    ],
)
def test_bad_own_tables(values, part, tmp_path):
    path = own(tmp_path, values, columns=['a', 'b', 'c'])
    with pytest.raises(UserError) as error:
        tabular.load_table(str(path))
    assert part in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    'text, part',
    [
        ('a;b\n1,5;2\n', "has ';' between its cells: save it with commas"),
        ('a\tb\n1\t2\n', 'between its cells'),
        ('1;2\n3;4\n', 'between its cells'),
        ('a,b\n', 'has no rows'),
        ('a,b\n\n', 'has no rows'),
    ],
)
def test_csv_files_of_other_kinds(text, part, tmp_path):
    (tmp_path / 'my.csv').write_text(text)
    with pytest.raises(UserError) as error:
        tabular.load_table(str(tmp_path / 'my.csv'))
    assert part in str(error.value) and 'my.csv' in str(error.value)


def test_bad_files(tmp_path):
    rng = np.random.default_rng(0)
    cases = {
        'missing.csv': None,
        'empty.csv': b'',
        'text.npy': b'hello',
        'object.npy': None,
        'cube.npy': None,
        'foreign.h5': b'hello',
        'ragged.csv': b'a,b\n1,2\n1,2,3\n',
        'bytes.csv': b'\xff\xfe\x00a',
    }
    np.save(tmp_path / 'object.npy', np.array([{}, Payload()], dtype=object), allow_pickle=True)
    np.save(tmp_path / 'cube.npy', rng.random((3, 3, 3)))
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            tabular.load_table(str(tmp_path / name))
        assert name in str(error.value)
    with pytest.raises(UserError, match='unknown data set .u22., perhaps u2'):
        tabular.load_table('u22')
    with pytest.raises(UserError, match='has 2 columns'):
        tabular.load_table(
            str(own(tmp_path, rng.random((30, 3)))),
            test_file=str(own(tmp_path, rng.random((30, 2)), 't.npy')),
        )


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_or_a_clean_error(tmp_path_factory, content):
    for suffix in ('.csv', '.npy', '.h5'):
        path = tmp_path_factory.getbasetemp() / f'fuzz{suffix}'
        path.write_bytes(content)
        try:
            values, columns = tabular.read_table(path)
        except UserError:
            continue
        assert np.isfinite(values).all() and values.shape[1] == len(columns)


# ------------------------------------------------------------------------------------------------- toy problems


@pytest.mark.parametrize('name', toy.SAMPLERS)
def test_samplers(name):
    draw = toy.SAMPLERS[name]
    points = draw(np.random.default_rng(0), 1001)
    assert points.shape == (1001, 2) and np.isfinite(points).all()
    np.testing.assert_array_equal(points, draw(np.random.default_rng(0), 1001))
    assert not np.array_equal(points, draw(np.random.default_rng(1), 1001))
    assert 0.5 < points.std(0).min() and np.abs(points).max() < 6


def test_checkerboard_and_eight_gaussians_are_where_they_should_be():
    x, y = toy.checkerboard(np.random.default_rng(0), 10_000).T
    assert ((np.floor(x / 2) + np.floor(y / 2)) % 2 == 0).all()
    points = toy.eight_gaussians(np.random.default_rng(0), 10_000)
    radius, sector = np.hypot(*points.T), np.round(np.arctan2(*points.T[::-1]) / (np.pi / 4)) % 8
    assert radius.mean() == pytest.approx(4 / np.sqrt(2), abs=0.05)
    assert np.bincount(sector.astype(int), minlength=8).min() > 1100


def test_energies_by_hand():
    origin, far = (
        torch.zeros(1, 2, dtype=torch.float64),
        torch.tensor([[5.0, 0.0]], dtype=torch.float64),
    )
    assert toy.u1(torch.tensor([[2.0, 0.0]])).item() == pytest.approx(0.0, abs=1e-6)
    assert toy.u1(origin).item() == pytest.approx(
        (2 / 0.4) ** 2 / 2 - np.log(2) + (2 / 0.6) ** 2 / 2
    )
    assert toy.u2(origin).item() == 0
    assert toy.u2(far).item() == pytest.approx((1 / 0.4) ** 2 / 2 + 25 / 2)
    bump = 3 * np.exp(-((1 / 0.6) ** 2) / 2)
    assert toy.u3(origin).item() == pytest.approx(-np.log(1 + np.exp(-((bump / 0.35) ** 2) / 2)))
    step = 3 / (1 + np.exp(1 / 0.3))
    assert toy.u4(origin).item() == pytest.approx(-np.log(1 + np.exp(-((step / 0.35) ** 2) / 2)))


def test_log_normaliser():
    """Of a Gaussian by hand, and of u2: sqrt(2 pi) 0.4 across, and 8 + sqrt(2 pi) 0.2 along"""
    assert toy.log_normaliser(lambda x: x.square().sum(1) / 2) == pytest.approx(
        np.log(2 * np.pi), abs=1e-9
    )
    root = np.sqrt(2 * np.pi)
    assert toy.log_normaliser(toy.u2) == pytest.approx(
        np.log(root * 0.4 * (8 + root * 0.2)), abs=1e-6
    )


def write(path, text):
    path.write_text(text)
    return path


def test_headers_of_csv(tmp_path):
    """With names, without, numbered by pandas, quoted, after an empty line"""
    for text, names in (
        ('a,b\n1,2\n3,4\n', ('a', 'b')),
        ('1,2\n3,4\n', ('column 0', 'column 1')),
        ('0,1\n1,2\n3,4\n', ('0', '1')),
        ('"1","2"\n3,4\n', ('column 0', 'column 1')),
        ('\n"a b",c\n1,2\n3,4\n', ('a b', 'c')),
    ):
        values, columns = tabular.read_table(write(tmp_path / 'x.csv', text))
        assert columns == names and values.tolist() == [[1, 2], [3, 4]], text
    with pytest.raises(UserError, match='index=False'):
        tabular.read_table(write(tmp_path / 'x.csv', ',a\n0,1\n1,2\n'))


def test_discrete_columns_are_spread_in_the_test_file_too(tmp_path):
    rng = np.random.default_rng(0)
    for name, n in (('train', 400), ('test', 100)):
        np.save(
            tmp_path / f'{name}.npy', np.column_stack([rng.integers(8, size=n), rng.normal(size=n)])
        )
    rows = tabular.load_table(
        str(tmp_path / 'train.npy'), test_file=str(tmp_path / 'test.npy'), dequantize=True
    )
    assert rows.steps.tolist() == [1, 0]
    for part in (rows.train, rows.test):
        assert len(np.unique(part[:, 0])) == len(part)
    assert abs(rows.test[:, 0].mean()) < 0.3
