"""Tables: published ones are prepared as by their authors, the user's own are read safely."""

import functools
import gzip
import io
import pickle
import sys
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
from datasets import own_tables, tabular, toy
from datasets.columns import number_columns

try:
    import resource
except ImportError:  # on Windows
    resource = None

needs_resource = pytest.mark.skipif(
    resource is None, reason='needs the resource module, which only POSIX systems have'
)

# ------------------------------------------------------------------------------- published tables


@pytest.fixture
def set_counts(monkeypatch, tmp_path):
    """Let tables of 200 rows pass for whole ones, read in several chunks; cache below tmp_path.

    The fixture is a function that sets the expected rows of a table's three splits.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tabular, 'CHUNK_ROWS', 60)

    for name in tabular.TABLES:
        tiny_tables.set_counts(monkeypatch, name)
    return functools.partial(tiny_tables.set_counts, monkeypatch)


def load(name, folder):
    """Return the three splits of a published table."""
    data = tabular.load_table(name, folder)
    return [np.asarray(part) for part in (data.train, data.validation, data.test)]


def shapes_of(splits):
    return [part.shape for part in splits]


def tenths(data):
    """Split rows as the authors do: the last tenth, then the last tenth of what is left."""
    n_test = int(0.1 * len(data))
    rest = data[:-n_test]
    n_validation = int(0.1 * len(rest))
    return rest[:-n_validation], rest[-n_validation:], data[-n_test:]


def scaled(splits):
    """Standardise splits as the authors do."""
    known = np.vstack(splits[:2])
    return [(part - known.mean(0)) / known.std(0) for part in splits]


def assert_same(splits, expected):
    for part, wanted in zip(splits, expected):
        assert part.dtype == np.float32
        np.testing.assert_allclose(part, wanted, rtol=1e-5, atol=1e-5)


def test_power_is_shuffled_and_noised_as_by_its_authors(set_counts, tmp_path):
    tiny_tables.write_power(tmp_path)
    rng = np.random.RandomState(42)
    data = np.load(tmp_path / 'power' / 'data.npy')
    rng.shuffle(data)  # unlike prepare_power, the authors shuffle the rows themselves
    data = np.delete(data, [1, 3], axis=1)

    voltage, power = 0.01 * rng.rand(200, 1), 0.001 * rng.rand(200, 1)
    metering = rng.rand(200, 3)
    noise = np.hstack([power, voltage, metering, np.zeros((200, 1))])
    assert_same(load('power', tmp_path), scaled(tenths(data + noise)))


def test_raw_power_drops_rows_with_missing_values(set_counts, tmp_path):
    set_counts('power', (147, 16, 18))
    tiny_tables.write_raw_power(tmp_path, 202)
    splits = load('power', tmp_path)
    known = np.concatenate(splits[:2])
    np.testing.assert_allclose(known.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(known.std(0), 1, atol=1e-5)
    assert shapes_of(splits) == [(147, 6), (16, 6), (18, 6)]


@pytest.mark.parametrize('protocol', [0, 2, 4, 5, 'of 2016'])
def test_gas(protocol, set_counts, tmp_path):
    if protocol == 'of 2016':
        tiny_tables.write_old_gas(tmp_path)
    else:
        tiny_tables.write_gas(tmp_path, protocol=protocol)

    data = tiny_tables.gas_table(200).drop(columns=['Meth', 'Eth', 'Time'])
    while True:  # the authors' loop
        n_correlated = (data.corr() > 0.98).sum(axis=1)
        if not np.any(n_correlated > 1):
            break
        first = np.where(n_correlated > 1)[0][0]
        data = data.drop(columns=data.columns[first])
    assert data.shape == (200, 8)

    standardised = (data - data.mean()) / data.std()
    assert_same(load('gas', tmp_path), tenths(standardised.to_numpy()))


def test_raw_gas_is_every_fourth_row(set_counts, tmp_path):
    tiny_tables.write_raw_gas(tmp_path / 'raw')
    (tmp_path / 'authors' / 'gas').mkdir(parents=True)
    every_fourth = tiny_tables.gas_table(800)[3::4]
    every_fourth.to_pickle(tmp_path / 'authors' / 'gas' / 'ethylene_CO.pickle')

    raw = load('gas', tmp_path / 'raw')
    assert shapes_of(raw) == [(162, 8), (18, 8), (20, 8)]
    assert_same(raw, load('gas', tmp_path / 'authors'))


@pytest.mark.parametrize('gzipped', [False, True])
def test_hepmass(gzipped, set_counts, tmp_path):
    set_counts('hepmass', (270, 30, 150))
    tiny_tables.write_hepmass(tmp_path)
    paths = [tmp_path / 'hepmass' / f'1000_{part}.csv' for part in ('train', 'test')]
    train, test = (pd.read_csv(path, index_col=False) for path in paths)
    if gzipped:
        for path in paths:
            tiny_tables.compress(path.rename(tmp_path / path.name))

    train = train[train.iloc[:, 0] == 1].iloc[:, 1:]
    test = test[test.iloc[:, 0] == 1].iloc[:, 1:-1]
    mean, std = train.mean(), train.std()
    train, test = (train - mean) / std, (test - mean) / std
    kept = []
    for feature in train:  # the authors' rule
        value_counts = sorted(Counter(train[feature]).items())
        _, count_of_smallest = value_counts[0]
        if count_of_smallest <= 5:
            kept.append(feature)
    assert len(kept) == 21

    train, test = train[kept].to_numpy(), test[kept].to_numpy()
    assert_same(load('hepmass', tmp_path), [train[:-30], train[-30:], test])


def test_miniboone(set_counts, tmp_path):
    tiny_tables.write_miniboone(tmp_path)
    data = np.load(tmp_path / 'miniboone' / 'data.npy')
    assert_same(load('miniboone', tmp_path), scaled(tenths(data)))


def test_raw_miniboone_is_the_signal_without_outliers(set_counts, tmp_path):
    tiny_tables.write_raw_miniboone(tmp_path)
    splits = load('miniboone', tmp_path)
    assert shapes_of(splits) == [(162, 43), (18, 43), (20, 43)]
    assert np.abs(np.concatenate(splits)).max() < 20


def test_bsds300(set_counts, tmp_path):
    tiny_tables.write_bsds300(tmp_path, (162, 18, 20))
    with h5py.File(tmp_path / 'BSDS300' / 'BSDS300.hdf5') as file:
        expected = [file[part][:] for part in ('train', 'validation', 'test')]
    assert_same(load('bsds300', tmp_path), expected)


def test_bsds300_from_images(set_counts, tmp_path):
    """Pixels of noise images are uniform in [0, 1], less the mean of the 64 pixels of a patch."""
    set_counts('bsds300', (2000, 100, 500))
    tiny_tables.write_bsds300_images(tmp_path)
    train, validation, test = load('bsds300', tmp_path)
    assert shapes_of([train, validation, test]) == [(2000, 63), (100, 63), (500, 63)]

    std = np.sqrt(63 / 64 / 12)
    for part in (train, test):
        assert abs(part.mean()) < 0.01
        assert part.std() == pytest.approx(std, rel=0.05)
        assert len(np.unique(part)) > 0.9 * part.size  # the noise makes them continuous
    again = load('bsds300', tmp_path)
    np.testing.assert_array_equal(train, again[0])


def test_parsed_once_and_anew_when_the_file_changes(set_counts, tmp_path, monkeypatch):
    tiny_tables.write_miniboone(tmp_path)
    first = load('miniboone', tmp_path)[0]
    with monkeypatch.context() as patch:
        patch.setattr(tabular, 'prepare_miniboone', lambda path: pytest.fail('parsed again'))
        np.testing.assert_array_equal(load('miniboone', tmp_path)[0], first)

    set_counts('miniboone', (81, 9, 10))
    tiny_tables.write_miniboone(tmp_path, 100)
    assert len(load('miniboone', tmp_path)[0]) == 81


# ---------------------------------------------------------------------- hostile and damaged files


class Payload:
    """Prints when it is unpickled by ``pickle``."""

    def __reduce__(self):
        return print, ('it ran',)


def test_a_hostile_pickle_runs_nothing(set_counts, tmp_path, capsys):
    (tmp_path / 'gas').mkdir()
    path = tmp_path / 'gas' / 'ethylene_CO.pickle'
    hostile = [Payload(), [tiny_tables.gas_table(200), Payload()]]
    other = [{'a': 1}, pd.Series([1.0])]
    for content in hostile + other:
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match='cannot be read as gas'):
            tabular.load_table('gas', tmp_path)
    assert 'it ran' not in capsys.readouterr().out


def gzipped_zeros():
    """Return a gzipped text of 10^9 bytes that has a single line."""
    return 1_000 * gzip.compress(bytes(10**6), 1)  # a .gz may have many members


def gzipped_rows():
    """Return a gzipped .csv of 10^6 rows."""
    return gzip.compress(b'a,b\n' + 1_000 * (b'0,1\n' * 1_000))


def long_line():
    return b'x' * 5_000


def zipped_image():
    """Return an archive with an image of 81 million pixels."""
    image = io.BytesIO()
    Image.new('1', (9_000, 9_000)).save(image, 'png')
    content = io.BytesIO()
    with zipfile.ZipFile(content, 'w') as archive:
        archive.writestr('images/train/1.jpg', image.getvalue())
    return content.getvalue()


def empty_h5(name, shape):
    """Return an HDF5 file that declares a data set and stores nothing of it."""
    content = io.BytesIO()
    with h5py.File(content, 'w') as file:
        file.create_dataset(name, shape, 'f8', chunks=(1000, 10), compression='gzip')
    return content.getvalue()


def empty_bsds300():
    return empty_h5('train', (10**10, 63))


def empty_rows():
    return empty_h5('rows', (10**10, 10))


def empty_npy():
    """Return the header of a .npy file that declares 10^10 rows."""
    content = io.BytesIO()
    header = {'descr': '<f8', 'fortran_order': False, 'shape': (10**10, 43)}
    np.lib.format.write_array_header_1_0(content, header)
    return content.getvalue()


def peak_memory():
    """Return the most memory that this process has ever had, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == 'darwin' else 1e3)  # bytes on macOS, else KiB


@needs_resource
@pytest.mark.parametrize(
    'name, path, make_content, part',
    [
        ('hepmass', '1000_train.csv.gz', gzipped_zeros, 'zero bytes'),
        ('hepmass', '1000_train.csv.gz', gzipped_rows, 'more than 100,000 rows'),
        ('gas', 'ethylene_CO.txt', long_line, 'line of more than'),
        ('power', 'power/data.npy', empty_npy, 'cannot be read'),
        ('miniboone', 'miniboone/data.npy', empty_npy, 'cannot be read'),
        ('bsds300', 'bsds300_gray.zip', zipped_image, '9000x9000'),
        ('bsds300', 'BSDS300/BSDS300.hdf5', empty_bsds300, 'BSDS300.hdf5 cannot be read'),
        ('own.npy', 'own.npy', empty_npy, 'cannot be read'),
        ('own.h5', 'own.h5', empty_rows, 'has not the size for it'),
    ],
)
def test_bombs_take_no_memory(name, path, make_content, part, set_counts, tmp_path, monkeypatch):
    monkeypatch.setattr(tabular, 'MAX_ROWS', 100_000)
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_bytes(make_content())
    before = peak_memory()
    with pytest.raises(UserError, match=part):
        tabular.load_table(name, tmp_path)
    assert peak_memory() - before < 200


CELLS = ['1', '-2.5', '?', '', 'nan', '1e400', '12:34:56', '16/12/2006', '#']
LINES = st.lists(st.sampled_from(CELLS), max_size=9).map(';'.join)


def to_power_text(lines):
    """Return a text of these lines below the names of POWER's columns."""
    return '\n'.join(['Date;Time;a;b;c;d;e;f;g', *lines]).encode()


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=100) | st.lists(LINES, max_size=8).map(to_power_text))
def test_any_bytes_are_power_gas_or_miniboone_or_a_clean_error(tmp_path_factory, content):
    files = {
        'power': 'household_power_consumption.txt',
        'gas': 'ethylene_CO.txt',
        'miniboone': 'MiniBooNE_PID.txt',
        'hepmass': '1000_train.csv',
    }
    for name, file in files.items():
        folder = tmp_path_factory.getbasetemp() / f'fuzz_{name}'
        folder.mkdir(exist_ok=True)
        (folder / file).write_bytes(content)
        with pytest.raises(UserError):  # even a table that is right has too few rows
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
def test_damaged_published_tables(name, path, content, part, set_counts, tmp_path):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_bytes(content)
    with pytest.raises(UserError, match=part):
        tabular.load_table(name, tmp_path)


def test_wrong_counts_and_missing_values(set_counts, tmp_path):
    tiny_tables.write_miniboone(tmp_path, 150)
    with pytest.raises(UserError, match='truncated, or another version'):
        tabular.load_table('miniboone', tmp_path)
    data = 1 + np.random.default_rng(0).random((200, 43))
    data[7, 3] = np.nan
    np.save(tmp_path / 'miniboone' / 'data.npy', data)
    with pytest.raises(UserError, match='missing or infinite'):
        tabular.load_table('miniboone', tmp_path)


# -------------------------------------------------------------------------------- the user's tables


def noise(n, d=3):
    return np.random.default_rng(0).normal(size=(n, d))


def write_own(tmp_path, values, name='table.csv', columns=None):
    """Write a table in the format of its name, and return its path."""
    path = tmp_path / name
    if name.endswith('.csv'):
        has_header = columns is not None
        pd.DataFrame(values, columns=columns).to_csv(path, index=False, header=has_header)
    elif name.endswith('.npy'):
        np.save(path, values)
    else:
        columns = columns or [f'c{k}' for k in range(np.shape(values)[1])]
        own_tables.write_table(path, '.h5', pd.DataFrame(values, columns=columns))
    return path


@pytest.mark.parametrize('name', ['table.csv', 'table.npy', 'table.h5'])
def test_own_table(name, tmp_path):
    standard = tiny_tables.columns_of(np.random.default_rng(0), 300, 3)
    values = standard * [1, 1e-3, 1e6] + [0, 5, 1e9]
    data = tabular.load_table(str(write_own(tmp_path, values, name)))
    assert shapes_of([data.train, data.validation, data.test]) == [(240, 3), (30, 3), (30, 3)]
    np.testing.assert_allclose(data.train.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(data.train.std(0), 1, atol=1e-5)

    test = data.test * data.std + data.mean
    np.testing.assert_allclose(test, values[data.test_index], rtol=1e-5, atol=1e-4)
    other = tabular.load_table(str(tmp_path / name), seed=1)
    assert not np.array_equal(other.test_index, data.test_index)


def test_own_table_with_a_header_and_a_test_file(tmp_path):
    rng = np.random.default_rng(0)
    rows, test_rows = rng.normal(size=(100, 2)), rng.normal(size=(7, 2))
    path = write_own(tmp_path, rows, columns=['height', '2'])
    test_file = write_own(tmp_path, test_rows, 'test.npy')
    data = tabular.load_table(str(path), test_file=str(test_file))
    assert data.columns == ('height', '2') and data.column_index('height') == 0
    assert shapes_of([data.train, data.validation, data.test]) == [(90, 2), (10, 2), (7, 2)]

    test = data.test * data.std + data.mean
    np.testing.assert_allclose(test, np.load(test_file), rtol=1e-5, atol=1e-5)


def test_discrete_columns_are_noted_and_dequantized(tmp_path):
    rng = np.random.default_rng(0)
    continuous, grades = rng.normal(size=500), rng.integers(0, 5, 500) * 0.5
    values = np.column_stack([continuous, grades])
    path = str(write_own(tmp_path, values, columns=['a', 'grade']))
    data = tabular.load_table(path)
    assert len(data.notes) == 1 and data.notes[0].startswith('grade: few distinct values')

    data = tabular.load_table(path, dequantize=True)
    grades = data.train[:, 1] * data.std[1] + data.mean[1]
    assert not data.notes
    assert len(np.unique(grades)) == 400
    assert grades.min() >= 0 and grades.max() < 2.5
    steps = np.floor(grades / 0.5)
    assert (np.floor(np.sort(grades) / 0.5) == np.sort(steps)).all()


def test_discrete_columns_are_spread_in_the_test_file_too(tmp_path):
    rng = np.random.default_rng(0)
    for name, n in (('train', 400), ('test', 100)):
        discrete, continuous = rng.integers(8, size=n), rng.normal(size=n)
        np.save(tmp_path / f'{name}.npy', np.column_stack([discrete, continuous]))

    train_file, test_file = str(tmp_path / 'train.npy'), str(tmp_path / 'test.npy')
    data = tabular.load_table(train_file, test_file=test_file, dequantize=True)
    assert data.steps.tolist() == [1, 0]
    for part in (data.train, data.test):
        assert len(np.unique(part[:, 0])) == len(part)
    assert abs(data.test[:, 0].mean()) < 0.3


def mixed_table(n=500):
    """Return n rows with discrete columns of many kinds, and one that is continuous."""
    rng = np.random.default_rng(0)
    columns = {
        'continuous': rng.normal(size=n),
        'flag': rng.random(n) < 0.29,
        'count': rng.integers(3, 9, n),
        'tenths': rng.integers(1, 9, n) / 10,
        'halves': rng.integers(5, size=n) + 0.5,
        'irregular': rng.choice([0, 1, 2.5], n),
        'dose': np.log(rng.choice([1, 2, 5, 30], n)),
        'time': 1_700_000_000 + 60 * rng.integers(9, size=n),
    }
    return pd.DataFrame(columns).astype(float)


def test_dequantized_values_come_back_to_the_last_digit(tmp_path):
    table = mixed_table()
    table.to_csv(tmp_path / 'mixed.csv', index=False)
    data = tabular.load_table(str(tmp_path / 'mixed.csv'), dequantize=True)
    spread = tabular.dequantize_columns(table.to_numpy(), data.steps)
    back = data.quantize(spread)
    for k, name in enumerate(table):
        if name == 'continuous':
            assert (back[:, k] == spread[:, k]).all()
            continue
        assert len(np.unique(spread[:, k])) > 0.9 * len(table), name
        if name == 'dose':  # its values need more than 15 digits
            np.testing.assert_allclose(back[:, k], table[name], rtol=1e-14)
        else:
            assert (back[:, k] == table[name]).all(), name
    assert (data.quantize(back) == back).all()


def test_samples_beyond_the_table_get_its_smallest_and_largest_value(tmp_path):
    table = mixed_table()
    table.to_csv(tmp_path / 'mixed.csv', index=False)
    data = tabular.load_table(str(tmp_path / 'mixed.csv'), dequantize=True)
    low, high = table.min().to_numpy(), table.max().to_numpy()
    beyond = np.stack([low - 0.6 * data.steps, high + 1.6 * data.steps, low - 1e9, high + 1e9])
    (below, above, far_below, far_above) = data.quantize(beyond)[:, 1:]
    np.testing.assert_allclose([below, far_below], [low[1:]] * 2, rtol=1e-14)
    np.testing.assert_allclose([above, far_above], [high[1:]] * 2, rtol=1e-14)

    # a value in the gap between 1 and 2.5, of which each is spread over a step of 1, is rounded
    gap = np.array([1.99, 2.2, 2.3, 2.51])
    levels = data.levels[list(table).index('irregular')]
    assert tabular.nearest_levels(gap, levels, 1.0).tolist() == [1, 1, 2.5, 2.5]


def test_levels_are_free_of_rounding():
    column = np.array([0.1, 0.3, 0.2, 0.1 + 0.2, 3 * 0.1, 0.4])
    assert len(np.unique(column)) == 5
    assert tabular.distinct_levels(column).tolist() == [0.1, 0.2, 0.3, 0.4]
    twins = np.array([0.3, 0.1 + 0.2])
    assert tabular.distinct_levels(twins).tolist() == twins.tolist()


def test_rows_are_spread_once(tmp_path):
    table = mixed_table()
    path = tmp_path / 'mixed.csv'
    table.to_csv(path, index=False)
    data = tabular.load_table(str(path), dequantize=True)
    rows = tabular.read_rows(path, data)

    spread = data.to_own_units(rows.astype(float))
    pd.DataFrame(spread, columns=table.columns).to_csv(tmp_path / 'spread.csv', index=False)
    np.testing.assert_allclose(tabular.read_rows(tmp_path / 'spread.csv', data), rows, atol=1e-5)

    without_time = np.arange(7)  # float32 does not hold the seconds of a date
    rounded = table.astype(np.float32).astype(float)
    rounded.to_csv(tmp_path / 'rounded.csv', index=False)
    again = tabular.read_rows(tmp_path / 'rounded.csv', data)
    np.testing.assert_allclose(again[:, without_time], rows[:, without_time], atol=1e-5)

    new = table.assign(flag=7.25, count=2.5)  # beyond what the table has
    new.to_csv(tmp_path / 'new.csv', index=False)
    values = data.to_own_units(tabular.read_rows(tmp_path / 'new.csv', data))
    assert values[:, 1].min() >= 7.24 and values[:, 2].max() < 3.51


def test_levels_are_kept_by_a_checkpoint(tmp_path):
    mixed_table().to_csv(tmp_path / 'mixed.csv', index=False)
    data = tabular.load_table(str(tmp_path / 'mixed.csv'), dequantize=True)
    units = tabular.table_units(data)
    restored = tabular.table_from_units(units, 8, 0, 'x.pt')
    assert [levels.tolist() for levels in restored.levels] == units['levels']
    assert (restored.steps == data.steps).all() and len(data.levels[0]) == 0

    for bad in ([1.0, 0.0], [0.0, 0.0], [0.0, np.nan], [0.0, np.inf]):
        damaged = {**units, 'levels': [bad, *units['levels'][1:]]}
        with pytest.raises(UserError, match='x.pt is damaged'):
            tabular.table_from_units(damaged, 8, 0, 'x.pt')


def test_a_fingerprint_identifies_the_rows_wherever_they_are(tmp_path):
    values, test_values = noise(100), noise(7) + 1
    (tmp_path / 'other').mkdir()

    def fingerprint(values, name='table.csv', columns=None, test=None, **options):
        path = write_own(tmp_path, values, name, columns)
        if test is not None:
            options['test_file'] = write_own(tmp_path, test, 'other/test.npy')
        return tabular.load_table(str(path), **options).fingerprint

    first = fingerprint(values)
    same = [
        fingerprint(values, 'other/moved.csv'),
        fingerprint(values, 'table.npy'),
        fingerprint(np.asfortranarray(values), 'table.npy'),
        fingerprint(values, 'table.npy', seed=5, dequantize=True),
        fingerprint(values, 'table.h5', ['column 0', 'column 1', 'column 2']),
    ]
    assert first and set(same) == {first}

    train_row = tabular.split_at_random(100, 0, with_test=True)[0][0]
    changed = values.copy()
    changed[train_row, 1] = np.nextafter(changed[train_row, 1], 9)
    others = [
        fingerprint(changed),
        fingerprint(values[::-1]),
        fingerprint(values, columns=['a', 'b', 'c']),
        fingerprint(values, test=test_values),
        fingerprint(values, test=test_values + 1e-9),
        fingerprint(np.concatenate([values, test_values])),
    ]
    assert len({first, *others}) == 7


def test_fingerprints_of_published_tables_and_problems(set_counts, tmp_path):
    fingerprints = []
    for n, folder in ((200, 'a'), (200, 'moved'), (150, 'smaller')):
        tiny_tables.write_miniboone(tmp_path / folder, n)
        set_counts('miniboone', {200: (162, 18, 20), 150: (122, 13, 15)}[n])
        data = tabular.load_table('miniboone', tmp_path / folder)
        fingerprints.append(data.fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]

    names = [*toy.SAMPLERS, *toy.ENERGIES]
    assert len({tabular.load_table(name).fingerprint for name in names}) == len(names)


def test_columns_that_follow_from_others_are_noted(tmp_path):
    values = noise(500) * [1, 1e3, 1e-3]
    assert not tabular.load_table(str(write_own(tmp_path, values))).notes
    copy, reflection = values[:, 1], 5 - values[:, 2]
    for column in (copy, reflection, values.sum(axis=1)):
        path = write_own(tmp_path, np.column_stack([values, column]))
        (note,) = tabular.load_table(str(path)).notes
        assert note.startswith('some columns follow exactly from others')


# ----------------------------------------------------------------- tables that cannot be trained on


def noise_with(value, row=3, column=1):
    """Return 30 rows of noise with one cell replaced."""
    values = noise(30).astype(object)
    values[row, column] = value
    return values


@pytest.mark.parametrize(
    'values, part',
    [
        (noise_with(np.nan), '1 missing or infinite values, the first in column b, row 3'),
        (noise_with(np.inf), '1 missing or infinite values, the first in column b, row 3'),
        (noise_with('red'), "not numeric: b ('red' in row 3): add --drop=b"),
        (noise(30) * [1, 1, 0], 'constant: c: add --drop=c'),
        (noise(5), '5 rows and 3 columns'),
        (noise(2), 'many more rows than columns'),
    ],
)
def test_bad_own_tables(values, part, tmp_path):
    path = write_own(tmp_path, values, columns=['a', 'b', 'c'])
    with pytest.raises(UserError) as error:
        tabular.load_table(str(path))
    assert part in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    'text, part',
    [
        ('a;b\n1,5;2\n', "has ';' between its cells: save it with commas"),
        ('a\tb\n1\t2\n', 'between its cells: give it a name that ends in .tsv'),
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


HEADERS = {
    'with names': ('a,b\n1,2\n3,4\n', ('a', 'b')),
    'without names': ('1,2\n3,4\n', ('column 0', 'column 1')),
    'numbered by pandas': ('0,1\n1,2\n3,4\n', ('0', '1')),
    'quoted numbers': ('"1","2"\n3,4\n', ('column 0', 'column 1')),
    'after an empty line': ('\n"a b",c\n1,2\n3,4\n', ('a b', 'c')),
}


def test_headers_of_csv(tmp_path):
    path = tmp_path / 'x.csv'
    for case, (text, names) in HEADERS.items():
        path.write_text(text)
        frame = own_tables.read_frame(path)
        assert tuple(frame.columns) == names, case
        assert frame.to_numpy(float).tolist() == [[1, 2], [3, 4]], case


def test_bad_files(tmp_path):
    contents = {
        'missing.csv': None,
        'empty.csv': b'',
        'text.npy': b'hello',
        'foreign.h5': b'hello',
        'ragged.csv': b'a,b\n1,2\n1,2,3\n',
        'bytes.csv': b'\xff\xfe\x00a',
    }
    for name, content in contents.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    objects = np.array([{}, Payload()], dtype=object)
    np.save(tmp_path / 'object.npy', objects, allow_pickle=True)
    np.save(tmp_path / 'cube.npy', noise(9).reshape(3, 3, 3))

    for name in (*contents, 'object.npy', 'cube.npy'):
        with pytest.raises(UserError) as error:
            tabular.load_table(str(tmp_path / name))
        assert name in str(error.value)


def test_unknown_names_and_other_columns(tmp_path):
    with pytest.raises(UserError, match='unknown data set .u22., perhaps u2'):
        tabular.load_table('u22')

    path = write_own(tmp_path, noise(30))
    test_file = write_own(tmp_path, noise(30, 2), 't.npy')
    with pytest.raises(UserError, match='has 2 columns'):
        tabular.load_table(str(path), test_file=str(test_file))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_or_a_clean_error(tmp_path_factory, content):
    for suffix in ('.csv', '.npy', '.h5'):
        path = tmp_path_factory.getbasetemp() / f'fuzz{suffix}'
        path.write_bytes(content)
        try:
            frame = own_tables.read_frame(path)
        except UserError:
            continue
        values, not_numeric = number_columns(frame, list(frame.columns))
        assert values.shape == frame.shape and set(not_numeric) <= set(frame.columns)


# ------------------------------------------------------------------------- two-dimensional problems


@pytest.mark.parametrize('name', toy.SAMPLERS)
def test_samplers(name):
    draw = toy.SAMPLERS[name]
    points = draw(np.random.default_rng(0), 1001)
    assert points.shape == (1001, 2) and np.isfinite(points).all()
    np.testing.assert_array_equal(points, draw(np.random.default_rng(0), 1001))
    assert not np.array_equal(points, draw(np.random.default_rng(1), 1001))
    assert points.std(0).min() > 0.5
    assert np.abs(points).max() < 6


def test_checkerboard_and_eight_gaussians_are_where_they_should_be():
    x, y = toy.checkerboard(np.random.default_rng(0), 10_000).T
    column, row = np.floor(x / 2), np.floor(y / 2)
    assert ((column + row) % 2 == 0).all()

    x, y = toy.eight_gaussians(np.random.default_rng(0), 10_000).T
    radius = np.hypot(x, y)
    sector = np.round(np.arctan2(y, x) / (np.pi / 4)) % 8
    assert radius.mean() == pytest.approx(4 / np.sqrt(2), abs=0.05)
    assert np.bincount(sector.astype(int), minlength=8).min() > 1100


def gaussian(distance, width):
    """Return an unnormalised Gaussian density."""
    return np.exp(-((distance / width) ** 2) / 2)


def test_energies_by_hand():
    origin = torch.zeros(1, 2, dtype=torch.float64)
    on_a_moon = torch.tensor([[2.0, 0.0]])
    in_a_wall = torch.tensor([[5.0, 0.0]], dtype=torch.float64)

    assert toy.u1(on_a_moon).item() == pytest.approx(0.0, abs=1e-6)
    density = gaussian(2, 0.4) * 2 * gaussian(2, 0.6)
    assert toy.u1(origin).item() == pytest.approx(-np.log(density))

    assert toy.u2(origin).item() == 0
    density = gaussian(1, 0.4) * gaussian(1, 0.2)
    assert toy.u2(in_a_wall).item() == pytest.approx(-np.log(density))

    bump = 3 * gaussian(1, 0.6)
    assert toy.u3(origin).item() == pytest.approx(-np.log(1 + gaussian(bump, 0.35)))
    step = 3 / (1 + np.exp(1 / 0.3))
    assert toy.u4(origin).item() == pytest.approx(-np.log(1 + gaussian(step, 0.35)))


def test_log_normaliser():
    """Z is known for a Gaussian. For u2 it is the product of the widths across and along a wave."""
    log_z = toy.log_normaliser(lambda x: x.square().sum(1) / 2)
    assert log_z == pytest.approx(np.log(2 * np.pi), abs=1e-9)

    root = np.sqrt(2 * np.pi)
    across, along = root * 0.4, 8 + root * 0.2
    log_z = toy.log_normaliser(toy.u2)
    assert log_z == pytest.approx(np.log(across * along), abs=1e-6)
