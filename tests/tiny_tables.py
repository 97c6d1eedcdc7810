"""Small tables in exactly the formats of the published ones."""

import gzip
import io
import pickle
import zipfile

import h5py
import numpy as np
import pandas as pd
from PIL import Image

from datasets import tabular


def set_counts(monkeypatch, name, counts=(162, 18, 20)):
    """Let a published table have so many rows in its splits: by default those of 200 rows."""
    _, *others = tabular.TABLES[name]
    monkeypatch.setitem(tabular.TABLES, name, (counts, *others))


def columns_of(rng, n, d):
    """Draw n rows (n, d) of a Gaussian whose columns are correlated."""
    noise = rng.normal(size=(n, d))
    mix = np.eye(d) + 0.3 * rng.normal(size=(d, d)) / np.sqrt(d)
    mean = rng.normal(size=d)
    return noise @ mix + mean


# ------------------------------------------------------------------------------------------ POWER


def write_power(folder, n=200):
    """Write the MAF authors' data.npy: 8 columns, of which the last is the minute of the day."""
    rng = np.random.default_rng(0)
    (folder / 'power').mkdir(parents=True, exist_ok=True)
    data = np.abs(columns_of(rng, n, 8)).round(3)
    np.save(folder / 'power' / 'data.npy', data)


def write_raw_power(folder, n=200):
    """Write UCI's household_power_consumption.txt. Every tenth row has missing values ('?')."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    names = ['Date', 'Time', 'Global_active_power', 'Global_reactive_power', 'Voltage']
    names += ['Global_intensity', 'Sub_metering_1', 'Sub_metering_2', 'Sub_metering_3']

    rows = [names]
    for i in range(n):
        date = f'16/12/{2006 + i % 3}'
        time = f'{i // 60 % 24:02}:{i % 60:02}:00'
        if i % 10:
            values = [f'{v:.3f}' for v in rng.random(7) * 5]
        else:
            values = ['?'] * 6 + ['']
        rows.append([date, time, *values])
    text = '\n'.join(';'.join(row) for row in rows)
    (folder / 'household_power_consumption.txt').write_text(text + '\n')


# -------------------------------------------------------------------------------------------- GAS


def gas_table(n):
    """Return n rows of GAS: the time, two gases and 16 sensors, of which 8 nearly copy the rest."""
    rng = np.random.default_rng(0)
    sensors = columns_of(rng, n, 8)
    copies = sensors + 0.001 * rng.normal(size=(n, 8))
    time, gases = np.arange(n) / 100, rng.random((n, 2))

    names = ['Time', 'Meth', 'Eth', *(f'{k + 1}' for k in range(16))]
    values = np.column_stack([time, gases, sensors, copies])
    return pd.DataFrame(values, columns=pd.Index(names, dtype=object))


def write_gas(folder, n=200, protocol=2):
    """Write the MAF authors' ethylene_CO.pickle as the installed pandas does."""
    (folder / 'gas').mkdir(parents=True, exist_ok=True)
    with open(folder / 'gas' / 'ethylene_CO.pickle', 'wb') as file:
        pickle.dump(gas_table(n), file, protocol=protocol)


def write_raw_gas(folder, n=800):
    """Write UCI's ethylene_CO.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ['Time (seconds)', 'CO conc (ppm)', 'Ethylene conc (ppm)']
    names += ['sensor readings (16 channels)']
    with open(folder / 'ethylene_CO.txt', 'w') as file:
        file.write(', '.join(names) + '\n')
        gas_table(n).to_csv(file, sep=' ', header=False, index=False)


class DataFrame:
    """A table that is pickled as pandas did in 2016, which today's pandas cannot do.

    The name of this module in the pickle has to be replaced by that of pandas.
    """

    def __init__(self, state):
        self.__dict__ = state


class BlockManager:
    """The part of such a table that holds its values."""

    def __init__(self, axes, blocks):
        self.axes, self.blocks = axes, blocks

    def __getstate__(self):
        values = [block['values'] for block in self.blocks]
        newer_state = {'0.14.1': {'axes': self.axes, 'blocks': self.blocks}}
        return self.axes, values, [self.axes[0]], newer_state

    def __setstate__(self, state):
        raise NotImplementedError


def pickle_as_in_2016(names, n_rows, blocks):
    """Return a table as pandas pickled it in 2016.

    The blocks are pairs of values (columns, N) and the places of these columns, as a slice.
    """
    axes = [names, np.arange(n_rows)]
    entries = [{'values': values, 'mgr_locs': places} for values, places in blocks]
    manager = BlockManager(axes, entries)
    frame = DataFrame({'_data': manager, '_typ': 'dataframe', '_metadata': []})

    content = pickle.dumps(frame, protocol=2)
    modules = {'DataFrame': 'pandas.core.frame', 'BlockManager': 'pandas.core.internals'}
    for name, module in modules.items():
        ours, theirs = f'ctiny_tables\n{name}\n', f'c{module}\n{name}\n'
        content = content.replace(ours.encode(), theirs.encode())
    assert b'tiny_tables' not in content
    return content


def write_old_gas(folder, n=200):
    """Write ethylene_CO.pickle as pandas did in 2016."""
    table = gas_table(n)
    values = table.to_numpy().T.copy()
    names = np.array(table.columns, dtype=object)
    content = pickle_as_in_2016(names, n, [(values, slice(0, len(values), 1))])
    (folder / 'gas').mkdir(parents=True, exist_ok=True)
    (folder / 'gas' / 'ethylene_CO.pickle').write_bytes(content)


# ---------------------------------------------------------------------------------------- HEPMASS


def write_hepmass(folder, n_train=600, n_test=300):
    """Write 1000_train.csv and 1000_test.csv.

    The label comes first. Of the 27 features, six take few values. The test file has one column
    more, as the published one does.
    """
    rng = np.random.default_rng(0)
    (folder / 'hepmass').mkdir(parents=True, exist_ok=True)
    names = ['# label', *(f'f{k}' for k in range(27))]
    for part, n in (('train', n_train), ('test', n_test)):
        features = columns_of(rng, n, 27)
        features[:, ::5] = rng.integers(3, size=(n, 6))  # columns 0, 5, 10, 15, 20 and 25
        labels = np.arange(n) % 2

        table = pd.DataFrame(np.column_stack([labels, features]), columns=names)
        if part == 'test':
            table['mass'] = 1000.0
        table.to_csv(folder / 'hepmass' / f'1000_{part}.csv', index=False)


def compress(path):
    """Replace a file by its gzipped content."""
    path.with_name(path.name + '.gz').write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


# -------------------------------------------------------------------------------------- MINIBOONE


def write_miniboone(folder, n=200):
    """Write the MAF authors' data.npy."""
    rng = np.random.default_rng(0)
    (folder / 'miniboone').mkdir(parents=True, exist_ok=True)
    np.save(folder / 'miniboone' / 'data.npy', columns_of(rng, n, 43))


def write_raw_miniboone(folder, n=211, n_background=50):
    """Write UCI's MiniBooNE_PID.txt.

    The first line has the counts of signal and background, which then follow in this order. Seven
    of the 50 features take few values, and the first 11 rows of the signal are outliers.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    data = columns_of(rng, n + n_background, 50)
    data[:, 1:43:6] = rng.integers(3, size=(n + n_background, 7))
    data[:11] = -999.0
    with open(folder / 'MiniBooNE_PID.txt', 'w') as file:
        file.write(f' {n} {n_background}\n')
        np.savetxt(file, data, '%.6g')


# ---------------------------------------------------------------------------------------- BSDS300


def write_bsds300(folder, counts):
    """Write the MAF authors' BSDS300.hdf5, with as many rows in its three splits as ``counts``."""
    rng = np.random.default_rng(0)
    (folder / 'BSDS300').mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / 'BSDS300' / 'BSDS300.hdf5', 'w') as file:
        for part, n in zip(('train', 'validation', 'test'), counts):
            file.create_dataset(part, data=columns_of(rng, n, 63))


def write_bsds300_images(folder):
    """Write bsds300_gray.zip with three noise images for training and three for testing."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / 'bsds300_gray.zip', 'w') as archive:
        for part in ('train', 'test'):
            for i in range(3):
                pixels = rng.integers(0, 256, (20, 30), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, 'png')
                archive.writestr(f'images/{part}/{i}.jpg', file.getvalue())


# ------------------------------------------------------------------------------- the user's tables


def visitors(n=400):
    """Return a table of all kinds of columns."""
    rng = np.random.default_rng(0)
    age = rng.uniform(18, 90, n).round(1)
    sex = rng.choice(['female', 'male'], n)
    height = 165 + 12 * (sex == 'male') - 0.05 * age + 6 * rng.normal(size=n)
    columns = {
        'id': rng.permutation(n) + 1000,
        'date': [f'2024-{1 + k // 28 % 12:02}-{1 + k % 28:02}' for k in range(n)],
        'age': age,
        'sex': sex,
        'city': rng.choice(['Rome', 'Oslo', 'Bonn'], n),
        'member': rng.random(n) < 0.4,
        'height': height,
        'weight': height - 100 + 8 * rng.normal(size=n),
    }
    return pd.DataFrame(columns)


def write_pandas_h5(path, blocks, kind='frame', key='df'):
    """Write an HDF5 file as ``DataFrame.to_hdf`` does in its format 'fixed'.

    Each block is a list of names and the values of these columns (N, k). Values of type object
    stand for text: they are written as a pickle, which prints when it is read.
    """
    names = [name for block_names, _ in blocks for name in block_names]
    with h5py.File(path, 'w') as file:
        group = file.create_group(key)
        group.attrs['pandas_type'] = np.bytes_(kind)
        group.attrs['nblocks'] = len(blocks)
        group['axis0'] = np.array([name.encode() for name in names])
        group['axis1'] = np.arange(len(blocks[0][1]))
        for k, (block_names, values) in enumerate(blocks):
            group[f'block{k}_items'] = np.array([name.encode() for name in block_names])
            if values.dtype != object:
                group[f'block{k}_values'] = values
                continue
            text = group.create_dataset(f'block{k}_values', 1, h5py.vlen_dtype(np.uint8))
            text[0] = np.frombuffer(pickle.dumps(Printing()), np.uint8)


class Printing:
    """Prints when it is unpickled."""

    def __reduce__(self):
        return print, ('it ran',)
