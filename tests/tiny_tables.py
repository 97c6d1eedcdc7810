"""Tables in exactly the formats of the published ones, of any size."""

import gzip
import io
import pickle
import zipfile

import h5py
import numpy as np
import pandas as pd
from PIL import Image


def columns_of(rng, n, d):
    return rng.normal(size=(n, d)) @ (
        np.eye(d) + 0.3 * rng.normal(size=(d, d)) / np.sqrt(d)
    ) + rng.normal(size=d)


def write_power(folder, n=200):
    """data/power/data.npy of the MAF authors: 8 columns, the minute of the day last"""
    rng = np.random.default_rng(0)
    (folder / 'power').mkdir(parents=True, exist_ok=True)
    np.save(folder / 'power' / 'data.npy', np.abs(columns_of(rng, n, 8)).round(3))


def write_raw_power(folder, n=200):
    """household_power_consumption.txt of UCI: semicolons, and ? where values are missing, every tenth row here"""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        'Date;Time;Global_active_power;Global_reactive_power;Voltage;Global_intensity;Sub_metering_1;'
        'Sub_metering_2;Sub_metering_3'
    ]
    for i in range(n):
        values = [f'{v:.3f}' for v in rng.random(7) * 5] if i % 10 else ['?'] * 6 + ['']
        lines.append(
            ';'.join([f'16/12/{2006 + i % 3}', f'{i // 60 % 24:02}:{i % 60:02}:00', *values])
        )
    (folder / 'household_power_consumption.txt').write_text('\n'.join(lines) + '\n')


def gas_table(n):
    rng = np.random.default_rng(0)
    sensors = columns_of(rng, n, 8)
    both = np.concatenate(
        [sensors, sensors + 0.001 * rng.normal(size=(n, 8))], 1
    )  # 8 are near copies of 8
    columns = pd.Index(['Time', 'Meth', 'Eth', *(f'{k + 1}' for k in range(16))], dtype=object)
    return pd.DataFrame(
        np.column_stack([np.arange(n) / 100, rng.random((n, 2)), both]), columns=columns
    )


def write_gas(folder, n=200, protocol=2):
    (folder / 'gas').mkdir(parents=True, exist_ok=True)
    with open(folder / 'gas' / 'ethylene_CO.pickle', 'wb') as file:
        pickle.dump(gas_table(n), file, protocol=protocol)


def write_raw_gas(folder, n=800):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'ethylene_CO.txt', 'w') as file:
        file.write(
            'Time (seconds), CO conc (ppm), Ethylene conc (ppm), sensor readings (16 channels)\n'
        )
        gas_table(n).to_csv(file, sep=' ', header=False, index=False)


def write_hepmass(folder, n_train=600, n_test=300):
    """1000_train.csv and 1000_test.csv: the label first; six of 27 features take few values; one column more in test"""
    rng = np.random.default_rng(0)
    (folder / 'hepmass').mkdir(parents=True, exist_ok=True)
    for part, n in (('train', n_train), ('test', n_test)):
        features = columns_of(rng, n, 27)
        features[:, ::5] = rng.integers(3, size=(n, 6))  # 0, 5, 10, 15, 20, 25
        table = pd.DataFrame(
            np.column_stack([np.arange(n) % 2, features]),
            columns=['# label', *(f'f{k}' for k in range(27))],
        )
        if part == 'test':
            table['mass'] = 1000.0
        table.to_csv(folder / 'hepmass' / f'1000_{part}.csv', index=False)


def write_miniboone(folder, n=200):
    (folder / 'miniboone').mkdir(parents=True, exist_ok=True)
    np.save(folder / 'miniboone' / 'data.npy', columns_of(np.random.default_rng(0), n, 43))


def write_raw_miniboone(folder, n=211, n_background=50):
    """MiniBooNE_PID.txt: the counts of signal and background, then rows of 50, of which seven take few values"""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    data = columns_of(rng, n + n_background, 50)
    data[:, 1:43:6] = rng.integers(3, size=(n + n_background, 7))
    data[:11] = -999.0
    with open(folder / 'MiniBooNE_PID.txt', 'w') as file:
        file.write(f' {n} {n_background}\n')
        np.savetxt(file, data, '%.6g')


def write_bsds300(folder, counts):
    rng = np.random.default_rng(0)
    (folder / 'BSDS300').mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / 'BSDS300' / 'BSDS300.hdf5', 'w') as file:
        for part, n in zip(('train', 'validation', 'test'), counts):
            file.create_dataset(part, data=columns_of(rng, n, 63))


def write_bsds300_images(folder):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(folder / 'bsds300_gray.zip', 'w') as archive:
        for part in ('train', 'test'):
            for i in range(3):
                file = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (20, 30), dtype=np.uint8)).save(file, 'png')
                archive.writestr(f'images/{part}/{i}.jpg', file.getvalue())


def compress(path):
    path.with_name(path.name + '.gz').write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


class DataFrame:
    """Pickles as pandas of 2016 did, which today's cannot write, once its module's name is replaced"""

    def __init__(self, state):
        self.__dict__ = state


class BlockManager:
    def __init__(self, axes, values):
        self.axes, self.values = axes, values

    def __getstate__(self):
        block = {'values': self.values, 'mgr_locs': slice(0, len(self.values), 1)}
        return (
            self.axes,
            [self.values],
            [self.axes[0]],
            {'0.14.1': {'axes': self.axes, 'blocks': [block]}},
        )

    def __setstate__(self, state):
        raise NotImplementedError


def write_old_gas(folder, n=200):
    table = gas_table(n)
    axes = [np.array(table.columns, dtype=object), np.arange(n)]
    frame = DataFrame(
        {
            '_data': BlockManager(axes, table.to_numpy().T.copy()),
            '_typ': 'dataframe',
            '_metadata': [],
        }
    )
    content = pickle.dumps(frame, protocol=2)
    for name, module in (
        ('DataFrame', 'pandas.core.frame'),
        ('BlockManager', 'pandas.core.internals'),
    ):
        content = content.replace(
            f'ctiny_tables\n{name}\n'.encode(), f'c{module}\n{name}\n'.encode()
        )
    assert b'tiny_tables' not in content
    (folder / 'gas').mkdir(parents=True, exist_ok=True)
    (folder / 'gas' / 'ethylene_CO.pickle').write_bytes(content)
