"""Tables from strangers: each loads as what it is or is refused in one line.

None of them runs code, and none takes more memory than its size justifies.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from helpers import only
from hostile import (
    ENDLESS_KEY,
    LONG_NAMES,
    NAMES,
    ODD_NPY_TYPES,
    SPECIAL_FILES,
    call_guarded,
    ends_within,
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
from tiny_tables import (
    pickle_as_in_2016,
    set_counts,
    write_gas,
    write_hepmass,
    write_power,
)

import bnaf
from common import bounds
from common.errors import UserError
from datasets import tabular
from datasets.plots import draw_pairs

# Fonts lack some of the characters in names.
pytestmark = pytest.mark.filterwarnings('ignore:Glyph')

ROWS = np.random.default_rng(0).normal(size=(60, 2))


# ------------------------------------------------------------------------------------------- .h5


def write_h5(path: Path, write: Callable[[h5py.File], Any]) -> None:
    """Write an HDF5 file by a function of the open file."""
    with h5py.File(path, 'w') as file:
        write(file)


# Each of these functions adds to an open HDF5 file what is not a table.


def add_external_link(file):
    file['x'] = h5py.ExternalLink('other.h5', 'x')


def add_virtual_data(file):
    layout = h5py.VirtualLayout((60, 2), 'f8')
    layout[:] = h5py.VirtualSource('other.h5', 'x', (60, 2))
    file.create_virtual_dataset('x', layout)


def add_dangling_links(file):
    file['x'] = h5py.SoftLink('/nowhere')
    file['y'] = h5py.SoftLink('/y')


def add_data_of_another_file(file):
    file.create_dataset('x', (60, 2), 'f8', external=[('rows.bin', 0, h5py.h5f.UNLIMITED)])


def add_references(file):
    file.create_dataset('x', (60, 2), h5py.ref_dtype)


def add_text(file):
    file.create_dataset('x', (60, 2), 'S4')


def add_empty(file):
    file['x'] = h5py.Empty('f8')


def add_complex_numbers(file):
    file['x'] = ROWS * 1j


def add_compressed_zeros(file):
    file.create_dataset('x', (10**8, 20), 'f8', chunks=(1000, 20), compression='gzip')


def add_columns_of_one_name(file):
    file.create_dataset('x', data=ROWS).attrs['columns'] = ['a', 'a']


def add_columns_with_escapes(file):
    file.create_dataset('x', data=ROWS).attrs['columns'] = ['\33[31m', 'a']


def add_a_large_chunk(file):
    """Put 60 rows into one chunk of 64 million numbers, gzipped twice."""
    add_packed_twice(file, (2**14, 2**12), compressed_zeros(2**29))


def add_packed_twice(file, chunk=ROWS.shape, content=None):
    """Put 2 GB of zeros into 7 KB, as a chunk of 60 rows that is gzipped twice."""
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_chunk(chunk)
    options.set_deflate(9)
    options.set_deflate(9)
    space = h5py.h5s.create_simple(ROWS.shape, (h5py.h5s.UNLIMITED,) * 2)
    data = h5py.h5d.create(file.id, b'x', h5py.h5t.NATIVE_DOUBLE, space, options)
    data.write_direct_chunk((0, 0), zlib.compress(content or compressed_zeros(2**31), 9))


def compressed_zeros(n_bytes: int) -> bytes:
    """Return what zlib can make of zeros, without making them: equal blocks, and a checksum."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = compressor.compress(bytes(2**24)) + compressor.flush(zlib.Z_FULL_FLUSH)
    end = compressor.flush()
    checksum = (n_bytes % 65_521) << 16 | 1
    return b'\x78\xda' + block * (n_bytes // 2**24) + end + checksum.to_bytes(4, 'big')


def add_many_groups(file):
    for k in range(6000):
        file.create_group(f'{k}')
    file['x'] = ROWS


def add_bytes_of_zeros(file):
    """Put 330 million zeros of a byte each into 350 KB: as float64 they take 2.7 GB."""
    data = file.create_dataset('x', (2**24, 20), 'i1', chunks=(2**16, 20), compression='gzip')
    chunk = zlib.compress(bytes(2**16 * 20), 9)
    for start in range(0, 2**24, 2**16):
        data.id.write_direct_chunk((start, 0), chunk)


# By name: what is no table, leads elsewhere, or unfolds to more than its file justifies
BAD_H5: dict[str, Callable[[h5py.File], Any]] = {
    'an external link': add_external_link,
    'virtual data': add_virtual_data,
    'dangling links': add_dangling_links,
    'data of another file': add_data_of_another_file,
    'references': add_references,
    'text': add_text,
    'empty': add_empty,
    'complex numbers': add_complex_numbers,
    'compressed zeros': add_compressed_zeros,
    'a large chunk': add_a_large_chunk,
    'packed twice': add_packed_twice,
    'many groups': add_many_groups,
    'bytes of zeros': add_bytes_of_zeros,
    'columns of one name': add_columns_of_one_name,
    'columns with escapes': add_columns_with_escapes,
}


@pytest.mark.parametrize('name', BAD_H5)
def test_h5_that_is_no_table_or_leads_elsewhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_h5(tmp_path / 'other.h5', lambda file: file.update({'x': ROWS}))
    (tmp_path / 'rows.bin').write_bytes(ROWS.tobytes())
    write_h5(tmp_path / 'bad.h5', BAD_H5[name])
    assert 'bad.h5' in refusal(tabular.load_table, str(tmp_path / 'bad.h5'))


# Which bit is flipped, counted from the heap that has the names of the columns: in the size of one
ENDLESS_BITS = {'a long name': (48, 7), 'a name of nothing': (48, 0)}


def read_columns(path: Path) -> None:
    """Read the names of columns as any program would, whatever HDF5 says to it."""
    with contextlib.suppress(OSError, KeyError, RuntimeError), h5py.File(path) as file:
        file['x'].attrs['columns']


@needs_posix
@pytest.mark.parametrize('name', ENDLESS_BITS)
def test_h5_that_is_read_for_ever(name, tmp_path, monkeypatch):
    """HDF5 follows a damaged heap of names in a circle. Such a library is stopped."""
    path = tmp_path / 'bad.h5'
    write_h5(
        path, lambda file: file.create_dataset('x', data=ROWS).attrs.update(columns=['a', 'b'])
    )
    content = bytearray(path.read_bytes())
    place, bit = ENDLESS_BITS[name]
    content[content.index(b'GCOL') + place] ^= 1 << bit
    path.write_bytes(content)
    if ends_within(2, read_columns, path):
        pytest.skip('this version of HDF5 is not caught by such a file')
    monkeypatch.setattr(bounds, 'LEAST_SECONDS', 2)
    assert 'bad.h5' in refusal(tabular.load_table, str(path))


# ------------------------------------------------------------------------------------------ .npy


# By name: what is no table of numbers
BAD_NPY: dict[str, bytes] = {
    'an archive': npz_file(ROWS),
    'half an archive': b'PK\x03\x04rubbish',
    'objects': npy_file(np.array([[{}, 1]] * 60)),
    'a structure': npy_file(ROWS.astype([('a', 'f8')])),
    'three dimensions': npy_file(ROWS[None]),
    'complex numbers': npy_file(ROWS * 1j),
    'truth values': npy_file(ROWS > 0),
    'a deep header': npy_header('(' * 9000),
    'objects without a pickle': npy_header_of('O', (60, 2)) + bytes(960),
    'a pickle': pickled_folder(),
    'a huge shape': npy_header_of('<f8', (2**62, 4)),
    **ODD_NPY_TYPES,
}


@pytest.mark.parametrize('name', BAD_NPY)
def test_npy_that_is_no_table(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('bad.npy').write_bytes(BAD_NPY[name])
    assert 'bad.npy' in refusal(tabular.load_table, 'bad.npy')
    assert not Path('canary').exists()


# ------------------------------------------------------------------------------------------ text


def csv_file(header: str, rows: Iterable = ROWS) -> bytes:
    """Return a .csv file."""
    lines = [header, *[','.join(map(str, row)) for row in rows]]
    return '\n'.join(lines).encode() + b'\n'


# By name: texts that are no tables of numbers
BAD_CSV: dict[str, bytes] = {
    'a name with escapes': csv_file('\33[31ma,b'),
    'a name of two lines': csv_file('"a\nb",c'),
    'a name with a zero byte': csv_file('a\0,b'),
    'a long name': csv_file(f'{"n" * 200_000},b'),
    'a quote in the header that does not end': csv_file('a,"b'),
    'utf-16': csv_file('a'.encode('utf-16').decode('latin1')),
    'a first column without a name': csv_file(',b'),
    'no utf-8': csv_file('a,b') + b'\xff\xfe,1\n',
    'zero bytes': csv_file('a,b').replace(b',', b'\0,'),
    'a quote that does not end': csv_file('a,b') + b'1,"2\n',
    'three cells': csv_file('a,b') + b'1,2,3\n',
    'a number of 400 digits': csv_file('a,b') + b'9' * 400 + b',1\n',
    'infinite numbers': csv_file('a,b', np.full((60, 2), '1e400')),
    'text after many rows': csv_file('a,b', [(1.5, 2)] * 300_000 + [('x', 'y')]),
    'one name of two': csv_file('a', ROWS),
    'two names of three': csv_file('a,b', ROWS[:, [0, 1, 1]]),
    'a cell of ten million digits': b'a,b\n' + b'1' * 10**7,
    'a million columns': b','.join([b'1.5'] * 10**6) + b'\n',
}


@pytest.mark.parametrize('name', BAD_CSV)
def test_csv_that_is_no_table(name, tmp_path):
    (tmp_path / 'bad.csv').write_bytes(BAD_CSV[name])
    assert 'bad.csv' in refusal(tabular.load_table, str(tmp_path / 'bad.csv'))


# By name: a text, and how often it comes in all
LONG_TEXTS: dict[str, tuple[bytes, int]] = {
    'one line of commas': (b',' * 10**6, 60),
    'lines of 30,000 commas': (b',' * 30_000 + b'\n', 2000),
    'lines of 60,000 commas': (b',' * 60_000 + b'\n', 1000),
    'lines of 1,000 commas': (b',' * 1000 + b'\n', 60_000),
    'empty lines': (b'\n' * 10**6, 60),
    'lines of names': (b','.join(b'n%d' % k for k in range(10_000)) + b'\n', 1000),
}


@pytest.mark.parametrize('suffix', ['.csv', '.csv.gz'])
@pytest.mark.parametrize('name', LONG_TEXTS)
def test_texts_that_are_long(name, suffix, tmp_path):
    text, n = LONG_TEXTS[name]
    path = tmp_path / f'bad{suffix}'
    path.write_bytes(gzip_repeated(text, n) if suffix.endswith('.gz') else text * n)
    assert path.name in refusal(tabular.load_table, str(path))


# ------------------------------------------------------------------------------- published tables


SHARED_ROWS = np.zeros((1, 57_000))
SHARED_PLACE = slice(0, 1, 1)
# By name: a pickle in place of the table of GAS
BAD_GAS: dict[str, Callable[[], bytes]] = {
    'names that are nested lists': lambda: pickle_as_in_2016(
        [repeated_list(100, 4)], 60, [(ROWS.T, slice(0, 2, 1))]
    ),
    'names that are deeply nested lists': lambda: pickle_as_in_2016(
        [repeated_list(10, 8)] * 2, 60, [(ROWS.T, slice(0, 2, 1))]
    ),
    'a block 60,000 times': lambda: pickle_as_in_2016(
        ['a'] * 60_000, 57_000, [(SHARED_ROWS, SHARED_PLACE)] * 60_000
    ),
    'a small block 60,000 times': lambda: pickle_as_in_2016(
        ['a'] * 60_000, 1_400, [(SHARED_ROWS[:, :1_400].copy(), SHARED_PLACE)] * 60_000
    ),
    'a key that takes for ever': lambda: ENDLESS_KEY,
    'a folder that is made': pickled_folder,
}


@pytest.mark.parametrize('name', BAD_GAS)
def test_pickles_that_are_no_table_of_gas(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_gas(tmp_path)
    path = tmp_path / 'gas' / 'ethylene_CO.pickle'
    path.write_bytes(BAD_GAS[name]())
    assert path.name in refusal(tabular.load_table, 'gas', tmp_path)
    assert not Path('canary').exists()


WIDE_LINE = b'1' + b',1' * 1_999 + b'\n'


@pytest.mark.parametrize('name', ['hepmass/1000_train.csv', '1000_train.csv.gz'])
def test_hepmass_of_many_columns(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    is_packed = path.suffix == '.gz'
    path.write_bytes(gzip_repeated(WIDE_LINE * 250, 200) if is_packed else WIDE_LINE * 2_000)
    assert path.name in refusal(tabular.load_table, 'hepmass', tmp_path)


@pytest.mark.parametrize('name', ODD_NPY_TYPES)
def test_published_npy_of_odd_types(name, tmp_path):
    (tmp_path / 'power').mkdir()
    (tmp_path / 'power' / 'data.npy').write_bytes(ODD_NPY_TYPES[name])
    assert 'data.npy' in refusal(tabular.load_table, 'power', tmp_path)


# By the path of a file: the table that it is of
PUBLISHED_FILES = {
    'power/data.npy': 'power',
    'household_power_consumption.txt': 'power',
    'gas/ethylene_CO.pickle': 'gas',
    'ethylene_CO.txt': 'gas',
    'hepmass/1000_train.csv': 'hepmass',
    'hepmass/1000_test.csv': 'hepmass',
    '1000_train.csv.gz': 'hepmass',
    'miniboone/data.npy': 'miniboone',
    'MiniBooNE_PID.txt': 'miniboone',
    'BSDS300/BSDS300.hdf5': 'bsds300',
    'bsds300_gray.zip': 'bsds300',
    'BSDS300-images.tgz': 'bsds300',
}


@needs_posix
@pytest.mark.parametrize('kind', SPECIAL_FILES)
@pytest.mark.parametrize('name', PUBLISHED_FILES)
def test_published_tables_are_files(name, kind, tmp_path):
    path = tmp_path / name
    if name.endswith('test.csv'):
        write_hepmass(tmp_path)
    path.parent.mkdir(exist_ok=True)
    replace_by_special(kind, path)
    assert path.name in refusal(tabular.load_table, PUBLISHED_FILES[name], tmp_path)


def rows_or_message(name: str, folder: Path) -> np.ndarray | str:
    """Load the training rows of a table, or return the line in which it is refused."""
    try:
        return np.array(tabular.load_table(name, folder).train)
    except UserError as error:
        return str(error)


BAD_ROW_CACHES: dict[str, Callable[[Path], Any]] = {
    **{name: lambda path, npy=npy: path.write_bytes(npy) for name, npy in ODD_NPY_TYPES.items()},
    **SPECIAL_FILES,
}


@needs_posix
@pytest.mark.parametrize('name', BAD_ROW_CACHES)
def test_a_bad_cache_of_a_table(name, tmp_path, monkeypatch):
    """It is made again, or named."""
    set_counts(monkeypatch, 'power')
    write_power(tmp_path)
    first = rows_or_message('power', tmp_path)
    cache = only((tmp_path / '.cache').glob('*.npy'))
    cache.unlink()
    BAD_ROW_CACHES[name](cache)
    again = call_guarded(rows_or_message, 'power', tmp_path)
    if isinstance(again, str):
        assert cache.name in again
    else:
        assert (again == first).all()


# ------------------------------------------------------------------------------- names and places


TABLE_SUFFIXES = ['.csv', '.tsv', '.csv.gz', '.npy', '.h5', '.parquet']


@needs_posix
@pytest.mark.parametrize('kind', SPECIAL_FILES)
@pytest.mark.parametrize('suffix', TABLE_SUFFIXES)
def test_a_table_is_a_file(suffix, kind, tmp_path):
    path = tmp_path / f'bad{suffix}'
    replace_by_special(kind, path)
    assert path.name in refusal(tabular.load_table, str(path))


def train_on(folder: Path, name: str, columns: list[str], n_rows: int = 200) -> Path:
    """Train a small model on a table of random rows; return the table's path."""
    path = folder / f'{name}.csv'
    rows = np.random.default_rng(0).normal(size=(n_rows, len(columns)))
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    words = ['--n_flows=2', '--hidden_dim=2', '--n_epochs=1', f'--output_dir={folder}']
    bnaf.main(['--train', f'--dataset={path}', *words])
    return path


@pytest.mark.parametrize('name', LONG_NAMES)
def test_long_names_of_tables(name, tmp_path):
    """The name of the folder of the run is shortened, and found again."""
    path = train_on(tmp_path, LONG_NAMES[name], ['a', 'b'])
    run = only(tmp_path.glob('bnaf_*'))
    bnaf.main(['--evaluate', f'--dataset={path}', f'--output_dir={tmp_path}'])
    assert list(run.glob('*.json'))


@pytest.mark.parametrize('name', LONG_NAMES)
def test_long_names_of_columns(name, tmp_path):
    train_on(tmp_path, 'rows', [LONG_NAMES[name], 'b'])
    best = only(tmp_path.rglob('best.pt'))
    for mode in ('--generate', '--visualize', '--evaluate'):
        bnaf.main([mode, f'--restore_file={best}'])
    names = [path.name for path in best.parent.iterdir()]
    assert all(len(name.encode()) <= 100 for name in names)


@pytest.fixture(scope='module')
def odd_columns(tmp_path_factory):
    """The best.pt of a model of a table whose columns have odd names."""
    folder = tmp_path_factory.mktemp('odd')
    train_on(folder, 'odd', NAMES)
    return only(folder.rglob('best.pt'))


@pytest.mark.slow
def test_odd_names_of_columns(odd_columns):
    folder = odd_columns.parent
    before = set(folder.rglob('*'))
    for mode in ('--generate', '--visualize', '--evaluate'):
        bnaf.main([mode, f'--restore_file={odd_columns}'])
    new = {path.name for path in set(folder.rglob('*')) - before}
    assert new == {'generated_samples.csv', 'visualization.png'}
    samples = pd.read_csv(folder / 'generated_samples.csv')
    assert list(samples.columns) == [*NAMES, 'log_likelihood']

    figure = draw_pairs(ROWS, ROWS, [NAMES[6], NAMES[4]], 'rows')
    labels = set()
    for axes in figure.axes:
        labels |= {axes.get_xlabel(), axes.get_ylabel()}
    lengths = {len(label) for label in labels if label}
    assert lengths == {24, len(NAMES[4])}


# By name: where no file can be written, in a folder that has a folder.csv, and what is said of it
BAD_PLACES: dict[str, tuple[str, str]] = {
    'a folder': ('folder.csv', 'is a folder'),
    'in no folder': ('none/x.csv', 'there is no folder'),
    'in a file': ('best.pt/x.csv', 'there is no folder'),
}


@pytest.mark.parametrize('option', ['scores', 'output'])
@pytest.mark.parametrize('name', BAD_PLACES)
def test_where_no_file_can_go(name, option, odd_columns, tmp_path):
    """This is said before anything is computed."""
    mode = {'scores': '--evaluate', 'output': '--generate'}[option]
    place, part = BAD_PLACES[name]
    (tmp_path / 'folder.csv').mkdir()
    (tmp_path / 'best.pt').write_bytes(odd_columns.read_bytes())
    words = [f'--{option}={tmp_path}/{place}', f'--restore_file={tmp_path}/best.pt']
    assert part in refused('bnaf', mode, *words)
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['best.pt', 'folder.csv']
