"""Columns of the user's own tables: which are used, what is in them, and where they come from."""

import gzip
import io
import json
import subprocess
import sys
from decimal import Decimal

import h5py
import numpy as np
import pandas as pd
import pytest
import tiny_tables
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError, nearest_names
from datasets import __main__ as command
from datasets import own_tables
from datasets.columns import (
    Condition,
    as_numbers,
    category_text,
    describe_missing,
    encode_conditions,
    make_condition,
    number_columns,
    parse_given,
    select_columns,
)
from datasets.own_tables import read_frame, require_new_table, save_table
from datasets.tabular import (
    QUANTILE_LEVELS,
    TableData,
    column_quantiles,
    frame_of_rows,
    load_run_table,
    load_table,
    read_rows,
    rows_of_frame,
    table_from_frame,
    table_from_units,
    table_units,
)

NAMES = ['id', 'date', 'age', 'sex', 'city', 'member', 'height', 'weight']


def refusal(function, *args, **options):
    """Return the one line in which a call is refused."""
    with pytest.raises(UserError) as error:
        function(*args, **options)
    line = str(error.value)
    assert line.isprintable() and len(line) < 1000
    return line


@pytest.fixture
def visitors(tmp_path):
    """Return the path of a table of all kinds of columns."""
    path = tmp_path / 'visitors.csv'
    tiny_tables.visitors().to_csv(path, index=False)
    return str(path)


def load_visitors(path, **options):
    """Load the table with height and weight, given age, sex and city, unless told otherwise."""
    chosen = {'columns': ['height', 'weight'], 'condition': ['age', 'sex', 'city']}
    return load_table(path, **{**chosen, **options})


# -------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize(
    'options, columns, conditions',
    [
        ({}, '0 1 2 3 4 5 6 7', ''),
        ({'columns': ['height', '2', 'weight']}, '6 2 7', ''),
        ({'columns': ['1-3']}, '1 2 3', ''),
        ({'columns': ['age-city', '0']}, '2 3 4 0', ''),
        ({'columns': ['age - 4']}, '2 3 4', ''),
        ({'columns': ['2-city', 'age']}, '2 3 4', ''),
        ({'columns': ['0-7'], 'drop': ['id', '3-5']}, '1 2 6 7', ''),
        ({'drop': ['date-7']}, '0', ''),
        ({'condition': ['sex', 'age']}, '0 1 4 5 6 7', '3 2'),
        ({'columns': ['height', 'age'], 'condition': ['age']}, '6', '2'),
        ({'columns': ['height'], 'condition': ['city']}, '6', '4'),
    ],
)
def test_selection(options, columns, conditions):
    selection = select_columns(NAMES, **options)
    assert selection.columns == tuple(NAMES[int(k)] for k in columns.split())
    assert selection.conditions == tuple(NAMES[int(k)] for k in conditions.split())


def test_names_with_hyphens():
    names = ['a', 'b', 'a-b', 'c-d', 'e', 'my name', '1-2']
    for text, expected in {
        'a-b': ['a-b'],  # a name, not the range from a to b
        'b-c-d': ['b', 'a-b', 'c-d'],
        'a-b-c-d': ['a-b', 'c-d'],
        'c-d-e': ['c-d', 'e'],
        'c-d-my name': ['c-d', 'e', 'my name'],
        '1-2': ['1-2'],
        '0-1': ['a', 'b'],
    }.items():
        assert list(select_columns(names, [text]).columns) == expected, text
    line = refusal(select_columns, ['a', 'b', 'a-b', 'b-c', 'c'], ['a-b-c'])
    assert line == 'the columns a-b-c may be a to b-c or a-b to c: give their indices'


@pytest.mark.parametrize(
    'options, parts',
    [
        ({'columns': ['hight']}, ["unknown column 'hight': the nearest are", 'height']),
        ({'drop': ['age-hight']}, ["unknown column 'hight'", 'height']),
        ({'condition': ['8']}, ['column 8 is out of range: there are 0 to 7']),
        ({'columns': ['5-9']}, ['column 9 is out of range']),
        ({'columns': ['height-age']}, ['height-age run backwards: age comes before height']),
        ({'drop': ['age'], 'condition': ['age']}, ['--condition and --drop both name age']),
        ({'drop': ['0-7']}, ['no column is left to model']),
        ({'condition': ['0-7']}, ['no column is left to model']),
        ({'columns': ['age'], 'condition': ['age']}, ['no column is left to model']),
    ],
)
def test_bad_selections(options, parts):
    line = refusal(select_columns, NAMES, **options)
    assert all(part in line for part in parts), line


def test_columns_of_a_run_and_of_other_data_sets(visitors):
    data = load_visitors(visitors)
    assert data.columns == ('height', 'weight') and data.n_context == 1 + 2 + 3
    assert [condition.name for condition in data.conditions] == ['age', 'sex', 'city']
    assert data.train.shape == (320, 8) and data.test.shape == (40, 8)

    for name in ('moons', 'u1', 'power'):
        for option in ('columns', 'drop', 'condition'):
            line = refusal(load_table, name, **{option: ['0']})
            assert line.endswith(f'are for tables of your own, not {name}')


# ------------------------------------------------------------------------------- what columns hold


def test_all_columns_of_text_are_named_with_what_to_do(visitors):
    line = refusal(load_table, visitors, drop=['id'], condition=['sex'])
    assert line == (
        f"{visitors}: not numeric: date ('2024-01-01', 336 different), city ('Rome', 3 different): "
        'add --drop=id,date --condition=sex,city, or encode them as numbers'
    ).replace("'Rome'", repr(tiny_tables.visitors()['city'][0]))
    data = load_table(visitors, drop=['id', 'date'], condition=['sex', 'city'])
    assert data.columns == ('age', 'member', 'height', 'weight')


def test_what_is_suggested_can_be_typed():
    frame = tiny_tables.visitors().rename(columns={'date': 'the, date', 'city': 'home city'})
    frame['7'] = 'x' + frame['id'].astype(str)
    line = refusal(table_from_frame, frame, 'x.csv')
    assert "add --drop=1,8 --condition='sex,home city'" in line
    data = table_from_frame(frame, 'x.csv', drop=['1', '8'], condition=['sex', 'home city'])
    assert data.columns == ('id', 'age', 'member', 'height', 'weight')


def test_columns_without_names_are_suggested_by_their_index(tmp_path):
    np.save(tmp_path / 'x.npy', np.random.default_rng(0).normal(size=(60, 3)) * [1, 0, 1])
    line = refusal(load_table, str(tmp_path / 'x.npy'))
    assert line.endswith('x.npy: constant: column 1: add --drop=1')
    assert load_table(str(tmp_path / 'x.npy'), drop=['1']).columns == ('column 0', 'column 2')


def test_a_text_among_numbers_is_shown_with_its_row(visitors):
    frame = tiny_tables.visitors().astype({'age': object})
    frame.loc[7, 'age'] = 'forty'
    frame.to_csv(visitors, index=False)
    line = refusal(load_table, visitors, columns=['age', 'height'])
    assert "not numeric: age ('forty' in row 7): add --drop=age, or" in line
    assert load_table(visitors, columns=['height', 'weight']).columns == ('height', 'weight')

    like = table_from_frame(tiny_tables.visitors(), 'x', columns=['age', 'height'])
    line = refusal(read_rows, visitors, like)
    assert "visitors.csv: not numeric: age ('forty' in row 7): give numbers" in line


def test_missing_cells_are_counted_in_used_columns_only(visitors):
    frame = tiny_tables.visitors()
    frame.loc[3:5, 'age'] = np.nan
    frame.loc[9:, 'weight'] = np.inf
    frame.loc[20, 'sex'] = None
    frame['empty'] = np.nan
    frame.to_csv(visitors, index=False)
    options = {'columns': ['age', 'height', 'weight'], 'condition': ['sex'], 'drop': ['id']}
    assert refusal(load_table, visitors, **options) == (
        f'{visitors}: 3 missing or infinite values, the first in column age, row 3; '
        '391 in column weight, row 9; 1 in column sex, row 20: '
        'drop those 394 of 400 rows or fill them in, or add --drop=id,weight'
    )
    assert load_table(visitors, columns=['height'], condition=['member']).columns == ('height',)


def test_true_and_false_are_1_and_0(tmp_path):
    flags = np.random.default_rng(0).random(60) < 0.5
    expected = flags.astype(float).tolist()
    spellings = [('True', 'False'), ('TRUE', 'FALSE'), ('true', 'false'), (' true', 'False ')]
    for yes, no in spellings:
        text = pd.Series(np.where(flags, yes, no))
        assert as_numbers(text).tolist() == expected
        assert as_numbers(text.astype('category')).tolist() == expected

        numbers = np.arange(60) + 0.5
        path = tmp_path / 'flags.csv'
        pd.DataFrame({'flag': text, 'x': numbers}).to_csv(path, index=False)
        data = table_from_frame(read_frame(path), path)
        flags_again = data.to_own_units(data.head(60))[:, 0].round(6)
        assert len(data.train) == 48 and set(flags_again) == {0, 1}
    for column in (flags, flags.astype(object), pd.array(flags, 'boolean')):
        assert as_numbers(pd.Series(column)).tolist() == expected
    assert as_numbers(pd.Series([True, 'false'])).tolist() == [1, 0]
    assert as_numbers(pd.Series(['true', 'maybe'])) is None
    assert np.isnan(as_numbers(pd.Series([True, None], dtype=object))[1])


def test_numbers_in_other_types():
    for column in (
        pd.Series([1, 2.5, None], dtype=object),
        pd.Series([1, 2.5, None], dtype='Float64'),
        pd.Series(['1', ' 2.5', None], dtype=object),
        pd.Series([1, 2.5, None], dtype='category'),
    ):
        np.testing.assert_array_equal(as_numbers(column), [1, 2.5, np.nan])
    assert as_numbers(pd.Series([1, 10**400], dtype=object)).tolist() == [1, np.inf]
    for column in (
        pd.Series([1j, 2]),
        pd.Series(pd.date_range('2024-01-01', periods=3)),
        pd.Series(pd.date_range('2024-01-01', periods=3, tz='UTC')),
        pd.Series(pd.timedelta_range('1s', periods=3)),
        pd.Series([[1], [2]]),
        pd.Series(['1_000', '2']),
    ):
        assert as_numbers(column) is None
        frame = pd.DataFrame({'x': np.arange(len(column)) + 0.5, 'bad': column})
        assert 'not numeric: bad (' in refusal(table_from_frame, frame, 'x', with_test=False)


def test_columns_that_look_like_an_index_are_noted(visitors):
    notes = load_table(visitors, columns=['id', 'age', 'height'], drop=['date']).notes
    (note,) = [note for note in notes if 'whole numbers' in note]
    assert note == (
        'id: all values are different whole numbers. Is it an index? Then add --drop=date,id'
    )
    frame = pd.DataFrame({'x': np.arange(19.0), 'y': np.random.default_rng(0).normal(size=19)})
    assert not any('whole' in note for note in table_from_frame(frame, 'x').notes)
    frame = pd.concat([frame, pd.DataFrame({'x': [99.0], 'y': [0.5]})])
    assert any('x: all values' in note for note in table_from_frame(frame, 'x').notes)
    frame = pd.concat([frame, frame.head(1)])  # one value comes twice
    assert not any('whole' in note for note in table_from_frame(frame, 'x').notes)


def test_an_index_without_a_name(tmp_path):
    path = tmp_path / 'indexed.csv'
    tiny_tables.visitors()[['height', 'weight']].to_csv(path)
    line = refusal(load_table, str(path))
    assert "the first column has no name. Is it pandas' index? Add --drop=0, leave it out" in line
    data = load_table(str(path), drop=['0'])
    assert data.columns == ('height', 'weight')
    rows = read_rows(path, data)  # it is not needed, so it does not matter
    np.testing.assert_array_equal(rows[data.test_index], data.test)
    refusal(load_table, str(path), condition=['0'])


def test_constant_columns_are_named_together():
    frame = tiny_tables.visitors().assign(planet=3, year=2024.0)
    line = refusal(table_from_frame, frame, 'x', drop=['0-5'])
    assert line == 'x: constant: planet, year: add --drop=0-5,planet,year'
    frame = frame.assign(rare=np.arange(400) == 17)
    columns, seeds = ['rare', 'height'], range(20)
    lines = set()
    for seed in seeds:
        try:
            table_from_frame(frame, 'x', seed, columns=columns)
        except UserError as error:
            lines.add(str(error))
    assert lines == {'x: constant in the training split: rare: add --drop=rare'}


# ----------------------------------------------------------------------------------------- readers


@pytest.mark.parametrize('name', ['t.tsv', 't.csv.gz', 't.tsv.gz', 'a.b.csv.gz'])
def test_text_between_tabs_and_gzipped(name, visitors, tmp_path):
    separator = '\t' if '.tsv' in name else ','
    tiny_tables.visitors().to_csv(tmp_path / name, index=False, sep=separator)
    expected = load_visitors(visitors)
    data = load_visitors(str(tmp_path / name))
    np.testing.assert_array_equal(data.train, expected.train)
    assert data.fingerprint == expected.fingerprint


def test_text_between_other_separators(tmp_path):
    (tmp_path / 't.tsv').write_text('a,b\n1,2\n')
    assert "has ',' between its cells: give it a name that ends in .csv" in refusal(
        read_frame, tmp_path / 't.tsv'
    )
    (tmp_path / 't.tsv').write_text('a b\n1\n')
    assert list(read_frame(tmp_path / 't.tsv').columns) == ['a b']


def test_empty_lines_before_the_header(tmp_path):
    for n, is_read in ((500, True), (1500, False)):
        (tmp_path / 't.csv').write_text('\n' * n + 'a,b\n' + '1,2\n' * 20)
        if is_read:
            assert list(read_frame(tmp_path / 't.csv').columns) == ['a', 'b']
        else:
            line = refusal(read_frame, tmp_path / 't.csv')
            assert 'begins with more than 1,000 empty lines' in line


def test_near_names_are_not_looked_for_among_too_many():
    many = [f'{k:06}' * 20 for k in range(20_000)]
    assert nearest_names('colour', ['color', 'odour', *'abc']) == ['color']
    assert not nearest_names(many[0], many)
    text = describe_missing(['x' * 100] * 20 + ['y'], many)
    assert text.count('xxx…') == 8


def test_own_tables_are_told_by_their_names():
    for name in ('x.csv', 'x.tsv', 'dir/x.csv.gz', 'x.tsv.gz', 'x.npy', 'x.h5', 'x.parquet'):
        assert own_tables.is_own_table(name), name
    for name in ('moons', 'x.gz', 'x.csv/y', 'x.npy.gz', 'x.txt'):
        assert not own_tables.is_own_table(name), name


@pytest.mark.parametrize(
    'content, part',
    [
        (gzip.compress((b',' * 99 + b'\n') * 800_000, 1), 'too much for its size'),
        (gzip.compress(b'0' * 10**7), 'a line of more than'),
        (gzip.compress(b'a,b\n1,2\n')[:-9], 'cannot be read as a table'),
        (b'a,b\n1,2\n', 'cannot be read as a table'),
        (b'\x1f\x8b\x08\0', 'cannot be read as a table'),
    ],
)
def test_gzipped_text_that_is_no_table(content, part, tmp_path):
    (tmp_path / 'bad.csv.gz').write_bytes(content)
    assert part in refusal(read_frame, tmp_path / 'bad.csv.gz')


def pandas_blocks(n=60):
    """Return the blocks of a table that pandas would write, and the table without its text."""
    rng = np.random.default_rng(0)
    blocks = [
        (['city'], np.full((n, 1), 'Rome', object)),
        (['b', 'größe'], rng.normal(size=(n, 2))),
        (['a'], rng.integers(100, size=(n, 1))),
    ]
    frame = pd.DataFrame(blocks[1][1], columns=['b', 'größe']).assign(a=blocks[2][1][:, 0])
    return blocks, frame


def test_h5_of_pandas_without_its_pickles(tmp_path, capsys):
    blocks, frame = pandas_blocks()
    path = tmp_path / 'pandas.h5'
    tiny_tables.write_pandas_h5(path, blocks)
    line = refusal(load_table, str(path))
    assert 'not read, as pickles can run code: city: add --drop=city, or save the table as' in line
    refusal(load_table, str(path), condition=['city'])
    assert 'it ran' not in capsys.readouterr().out

    data = load_table(str(path), drop=['city'])
    expected = table_from_frame(frame, 'x')
    assert data.columns == ('b', 'größe', 'a')
    np.testing.assert_array_equal(data.train, expected.train)
    np.testing.assert_array_equal(read_rows(path, data)[data.test_index], data.test)
    assert 'pickles can run code: city: save the' in refusal(
        read_rows, path, TableData(None, None, None, ('city',), np.zeros(1), np.ones(1))
    )


def test_h5_of_pandas_in_a_group_and_without_names(tmp_path):
    values = np.random.default_rng(0).normal(size=(30, 2))
    path = tmp_path / 'pandas.h5'
    tiny_tables.write_pandas_h5(path, [(['1'], values[:, 1:]), (['0'], values[:, :1])], key='a/b')
    frame = read_frame(path)
    assert list(frame.columns) == ['column 1', 'column 0']
    np.testing.assert_array_equal(frame['column 0'], values[:, 0])


def change_h5(path, change):
    with h5py.File(path, 'a') as file:
        change(file)


@pytest.mark.parametrize(
    'kind, change, part',
    [
        (
            'frame_table',
            None,
            'holds a frame_table of pandas, which cannot be read: save it by to_',
        ),
        ('series', None, 'holds a series of pandas'),
        ('frame', lambda file: file.copy('df', 'other'), 'holds 2 tables of pandas, not one'),
        ('frame', lambda file: file.__delitem__('df/axis0'), 'names of its columns as text'),
        ('frame', lambda file: file.__delitem__('df/axis1'), 'cannot be read as a table'),
        ('frame', lambda file: file.__delitem__('df/block1_values'), 'cannot be read as a table'),
        ('frame', lambda file: file.__delitem__('df/block2_items'), 'other columns than its first'),
    ],
)
def test_h5_of_pandas_that_cannot_be_read(kind, change, part, tmp_path):
    path = tmp_path / 'pandas.h5'
    tiny_tables.write_pandas_h5(path, pandas_blocks()[0], kind)
    if change:
        change_h5(path, change)
    assert part in refusal(read_frame, path)


def test_h5_of_pandas_that_declares_more_than_it_holds(tmp_path):
    path = tmp_path / 'pandas.h5'
    tiny_tables.write_pandas_h5(path, pandas_blocks()[0])

    def declare(file):
        del file['df/block1_values']
        file.create_dataset('df/block1_values', (10**10, 2), 'f8', chunks=(1000, 2))

    def link(file):
        del file['df/block1_values']
        file['df/block1_values'] = h5py.ExternalLink('other.h5', 'x')

    def declare_names(file):
        del file['df/axis0']
        file.create_dataset('df/axis0', (10**9,), 'S9', chunks=(1000,))

    for change, part in (
        (declare, 'has not the size for it'),
        (link, 'cannot be read as a table'),
        (declare_names, 'columns, 65535 are the most'),
    ):
        tiny_tables.write_pandas_h5(path, pandas_blocks()[0])
        change_h5(path, change)
        assert part in refusal(read_frame, path)


def write_h5_by_pandas(csv, path, **options):
    """Write a table with ``to_hdf``, in a process where ``tables`` is PyTables."""
    code = f"""
import sys, pandas
try:
    import tables
except ImportError:
    sys.exit(3)
frame = pandas.read_csv(sys.argv[1], parse_dates=['day'])
frame.to_hdf(sys.argv[2], key='df', mode='w', **{options})
"""
    done = subprocess.run([sys.executable, '-c', code, csv, path], cwd=path.parent)
    if done.returncode == 3:
        pytest.skip('needs PyTables')
    assert done.returncode == 0


def test_h5_with_links_to_other_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = pandas_blocks()[0]
    tiny_tables.write_pandas_h5('other.h5', blocks)
    with h5py.File('linked.h5', 'w') as file:
        file['df'] = h5py.ExternalLink('other.h5', 'df')
    assert 'has 0 two-dimensional data sets' in refusal(read_frame, 'linked.h5')

    tiny_tables.write_pandas_h5('linked.h5', blocks)
    name = 'df/block1_values'
    with h5py.File('linked.h5', 'a') as file:
        del file[name]
        file[name] = h5py.ExternalLink('other.h5', name)
    assert 'cannot be read as a table' in refusal(read_frame, 'linked.h5')


def test_h5_that_pandas_wrote(tmp_path):
    csv, path = tmp_path / 'x.csv', tmp_path / 'x.h5'
    frame = tiny_tables.visitors()
    frame['day'] = pd.to_datetime(frame['date'])
    frame.to_csv(csv, index=False)
    write_h5_by_pandas(csv, path)
    read = read_frame(path)
    numeric = ['id', 'age', 'member', 'height', 'weight']
    pd.testing.assert_frame_equal(read[numeric], frame[numeric], check_column_type=False)
    assert (read['day'] == frame['day']).all() and list(read.columns) == list(frame.columns)
    assert read.attrs[own_tables.PICKLED] == ['date', 'sex', 'city']

    write_h5_by_pandas(csv, path, format='table')
    assert "format='fixed'" in refusal(read_frame, path)


def test_parquet(tmp_path, visitors):
    pytest.importorskip('pyarrow')
    frame = tiny_tables.visitors()
    frame['tags'] = [['a'], ['b', 'c']] * 200
    frame['price'] = [Decimal('1.50'), Decimal('2.25')] * 200
    frame.index = np.random.default_rng(0).permutation(400)
    frame.to_parquet(tmp_path / 'x.parquet')
    read = read_frame(tmp_path / 'x.parquet')
    assert list(read.columns) == list(frame.columns)
    expected = load_visitors(visitors)
    data = load_visitors(str(tmp_path / 'x.parquet'))
    np.testing.assert_array_equal(data.train, expected.train)
    assert 'tags ("[\'a\']", 2 different)' in refusal(table_from_frame, read, 'x')
    assert read['price'].dtype == np.float64 and read['price'][1] == 2.25

    constant = pd.DataFrame({'x': np.zeros(4 * 10**7)})
    constant.to_parquet(tmp_path / 'bomb.parquet')
    assert 'has not the size for it' in refusal(read_frame, tmp_path / 'bomb.parquet')


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    (tmp_path / 'x.parquet').write_bytes(b'PAR1')
    line = refusal(read_frame, tmp_path / 'x.parquet')
    assert 'python -m pip install pyarrow' in line and '.csv' in line


def pandas_h5_with(content):
    """Return an HDF5 file of pandas in which some bytes are replaced."""
    file = io.BytesIO()
    tiny_tables.write_pandas_h5(file, pandas_blocks(12)[0])
    whole = bytearray(file.getvalue())
    position, replacement = content
    position %= len(whole)
    whole[position : position + len(replacement)] = replacement
    return bytes(whole)


TEXTS = st.lists(st.sampled_from(['a', '1', '-2.5', 'nan', '', '"', '\t', ',', '\n', 'True', '\r']))
CONTENTS = st.binary(max_size=200) | TEXTS.map(lambda cells: ''.join(cells).encode())
PATCHES = st.tuples(st.integers(0, 10**5), st.binary(min_size=1, max_size=12))


@settings(max_examples=150, deadline=None)
@given(content=CONTENTS, patch=PATCHES)
def test_any_bytes_are_a_table_or_a_clean_error(tmp_path_factory, content, patch):
    files = {
        'fuzz.tsv': content,
        'raw.csv.gz': content,
        'fuzz.csv.gz': gzip.compress(content),
        'raw.h5': content,
        'fuzz.h5': pandas_h5_with(patch),
        'fuzz.parquet': content,
    }
    for name, part in files.items():
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(part)
        try:
            frame = read_frame(path)
            values, not_numeric = number_columns(frame, list(frame.columns))
            assert values.shape == frame.shape and len(set(not_numeric)) == len(not_numeric)
            table_from_frame(frame, path, drop=not_numeric or None)
        except UserError as error:
            assert str(error).isprintable()


# ----------------------------------------------------------------------------------------- writers


def test_tables_with_text_are_written_as_csv_alone(tmp_path, capsys):
    frame = pd.DataFrame({'city': ['Rome', 'Oslo'], 'x': [1.5, 2.0], 'row': [0, 1]})
    save_table(tmp_path / 'x.csv', frame)
    assert (tmp_path / 'x.csv').read_text() == 'city,x,row\nRome,1.5,0\nOslo,2.0,1\n'
    for name in ('x.npy', 'x.h5'):
        assert 'can only hold numbers, and city is text' in refusal(
            save_table, tmp_path / name, frame
        )
        save_table(tmp_path / name, frame[['x', 'row']])
        assert read_frame(tmp_path / name).to_numpy().tolist() == [[1.5, 0], [2, 1]]
    assert list(read_frame(tmp_path / 'x.h5').columns) == ['x', 'row']

    assert 'is there already' in refusal(require_new_table, tmp_path / 'x.csv')
    require_new_table(tmp_path / 'x.csv', overwrite=True)
    (tmp_path / 'folder.csv').mkdir()
    assert 'is a folder' in refusal(require_new_table, tmp_path / 'folder.csv', True)


# -------------------------------------------------------------------------------------- conditions


@pytest.mark.parametrize(
    'values, text',
    [
        ([True, 1, 1.0, '1', '1.0', 'True', 'TRUE', ' true ', np.float32(1), np.bool_(True)], '1'),
        ([False, 0, -0.0, '0', '0.0', 'false'], '0'),
        ([0.1 + 0.2, 0.3, '0.3'], '0.3'),
        ([1e20, '1e+20'], '1e+20'),
        ([10**17 + 1, str(10**17 + 1)], '100000000000000001'),
        (['01'], '01'),
        (['1e3'], '1e3'),
        (['Rome', ' Rome '], 'Rome'),
        (['nan'], 'nan'),
        (['1_000'], '1_000'),
        (['a\nb'], 'a\\nb'),
    ],
)
def test_text_of_categories(values, text):
    assert {category_text(value) for value in values} == {text}


def condition_of(values, train=None):
    column = pd.Series(values, name='x')
    return make_condition(column, np.arange(len(column)) if train is None else train, 'x.csv')


def test_what_becomes_a_category():
    rng = np.random.default_rng(0)
    assert condition_of(rng.choice(['b', 'a', '10', '9'], 50)).categories == ('9', '10', 'a', 'b')
    assert condition_of(rng.integers(3, size=50) - 1).categories == ('-1', '0', '1')
    assert condition_of([True, False, True]).categories == ('0', '1')
    assert condition_of(['true', 'False', 'true']).categories == ('0', '1')
    assert condition_of(np.arange(50) % 10).categories == tuple(map(str, range(10)))
    assert condition_of(pd.Categorical(rng.integers(20, size=400))).width == 20

    for numbers in (np.arange(55) % 11, np.arange(49) % 10, rng.normal(size=60)):
        condition = condition_of(numbers)
        assert condition.categories == () and condition.width == 1
        assert (condition.mean, condition.std) == (numbers.mean(), numbers.std())
    text = pd.Series(rng.normal(size=60)).astype(str)
    assert condition_of(text).categories == ()
    half = condition_of(np.arange(60.0), train=np.arange(30))
    assert (half.mean, half.std) == (14.5, np.arange(30).std())


def test_conditions_that_are_no_use():
    texts = [f'n{k}' for k in range(400)]
    line = refusal(condition_of, texts[:358] + texts[:42])
    assert '--condition=x: 358 different texts in 400 rows are too many; ' in line
    assert '60 different texts in 60 rows' in refusal(condition_of, texts[:60])
    assert condition_of(texts[:100] * 4).width == 100
    refusal(condition_of, texts[:101] * 4)
    assert 'column x is constant' in refusal(condition_of, ['a'] * 30)
    assert 'column x is constant' in refusal(condition_of, np.ones(30))
    spike = np.arange(60) // 59 * np.linspace(1, 2, 60)
    assert 'constant in the training split' in refusal(
        condition_of, spike + np.r_[np.zeros(30), np.arange(30)], train=np.arange(30)
    )


def test_conditions_are_encoded():
    conditions = [Condition('age', 40.0, 10.0), Condition('sex', categories=('0', '1'))]
    frame = pd.DataFrame({'sex': ['true', 0, '1.0'], 'more': 7, 'age': [40, 45.0, 20]})
    encoded = encode_conditions(frame, conditions, 'x')
    assert encoded.dtype == np.float64
    assert encoded.tolist() == [[0, 0, 1], [0.5, 1, 0], [-2, 0, 1]]
    assert encode_conditions(frame, [], 'x').shape == (3, 0)
    assert encode_conditions(frame[:0], conditions, 'x').shape == (0, 3)


@pytest.mark.parametrize(
    'changes, part',
    [
        (
            {'sex': 'femal'},
            "sex 'femal' in row 0 is not among the 2 that the model knows: the near",
        ),
        ({'sex': ['male', 'f']}, "sex 'f' in row 1"),
        ({'age': ['41', 'old']}, "column age needs numbers, and has 'old' in row 1"),
        ({'age': [1.0, np.nan]}, '1 missing or infinite values, the first in column age, row 1'),
        ({'age': [np.inf, 1.0]}, '1 missing or infinite values, the first in column age, row 0'),
        ({'age': 1e300}, 'column age holds values that are too large for float32: 1e+300'),
        ({'sex': [None, 'male']}, '1 missing or infinite values, the first in column sex, row 0'),
        ({'sex': ['male', ' ']}, '1 missing or infinite values, the first in column sex, row 1'),
    ],
)
def test_values_that_cannot_be_encoded(changes, part):
    conditions = [Condition('age', 40.0, 10.0), Condition('sex', categories=('female', 'male'))]
    frame = pd.DataFrame({'age': [40, 50], 'sex': ['male', 'female']}).assign(**changes)
    line = refusal(encode_conditions, frame, conditions, 'x.csv')
    assert line.startswith('x.csv: ') and part in line
    if 'femal' in str(changes):
        assert line.endswith('female, male')


def test_a_category_can_be_copied_from_the_line_that_refuses_another():
    penguins = ('Adelie Penguin (Pygoscelis adeliae)', 'Gentoo penguin (Pygoscelis papua)')
    frame = pd.DataFrame({'species': ['Gentoo']})
    line = refusal(encode_conditions, frame, [Condition('species', categories=penguins)], 'x.csv')
    assert all(penguin in line for penguin in penguins)


def test_columns_of_conditions_that_are_missing():
    conditions = [Condition('age'), Condition('sex'), Condition('city')]
    line = refusal(encode_conditions, pd.DataFrame({'ages': [1], 'sex': [1]}), conditions, 'x.csv')
    assert line == 'x.csv: the model is conditioned on age (perhaps ages), city: give their values'


def test_given_values(tmp_path):
    names = ['age', 'sex', 'home city', 'a=b', 'a']
    frame = parse_given(' age = 40.5, sex=1,home city=New York,a=b=3=4', names)
    assert frame.to_dict('list') == {
        'age': [40.5],
        'sex': [1],
        'home city': ['New York'],
        'a=b': ['3=4'],
    }
    assert parse_given('sex=True', names).to_dict('list') == {'sex': ['True']}
    assert parse_given('sex=no.csv', names).to_dict('list') == {'sex': ['no.csv']}
    assert parse_given('2=Rome', names).to_dict('list') == {'home city': ['Rome']}

    path = tmp_path / 'given.csv'
    path.write_text('sex,more,age\nmale,1,40\nfemale,2,30\n')
    frame = parse_given(str(path), names)
    assert list(frame.columns) == ['sex', 'more', 'age'] and len(frame) == 2
    np.save(tmp_path / 'given.npy', np.ones((3, 2)))
    assert list(parse_given(str(tmp_path / 'given.npy'), ['x', 'y']).columns) == ['x', 'y']


@pytest.mark.parametrize(
    'text, part',
    [
        ('aeg=4', "unknown condition 'aeg': the nearest are age"),
        ('age', "--given takes NAME=VALUE,... or the path of a table, not 'age'"),
        ('age=4,', "not ''"),
        ('=4', 'takes NAME=VALUE'),
        ('age=', '--given has no value of age'),
        ('age=4,age=5', '--given has two values of age'),
        ('no.csv', 'no.csv: no such table'),
        ('', 'takes NAME=VALUE'),
        ('x' * 5_000, 'takes NAME=VALUE'),
    ],
)
def test_bad_given_values(text, part):
    assert part in refusal(parse_given, text, ['age', 'sex'])


def test_given_values_of_other_columns(tmp_path):
    path = tmp_path / 'other.csv'
    path.write_text('a,b\n1,2\n')
    assert 'has columns a, b, and none of the conditions age, sex' in refusal(
        parse_given, str(path), ['age', 'sex']
    )
    assert 'leave out --given' in refusal(parse_given, 'age=4', [])


# ----------------------------------------------------------------------------- rows and conditions


def test_rows_are_followed_by_their_conditions(visitors):
    frame = tiny_tables.visitors()
    data = load_visitors(visitors)
    assert data.test.dtype == np.float32
    own = frame.loc[data.test_index]
    np.testing.assert_allclose(data.to_own_units(data.test), own[['height', 'weight']], rtol=1e-5)
    np.testing.assert_allclose(data.to_own_units(data.test[:, :2]), own[['height', 'weight']], 1e-5)
    np.testing.assert_array_equal(data.quantize(data.test), data.test[:, :2])
    assert data.head(7).shape == (7, 8) and data.to_own_units(data.head(7)).shape == (7, 2)

    context = data.test[:, 2:]
    train = np.setdiff1d(np.arange(400), data.test_index)
    np.testing.assert_allclose(context[:, 0], (own['age'] - data.conditions[0].mean) / 20, atol=1)
    assert abs(data.conditions[0].mean - frame['age'][train].mean()) < 1
    assert data.conditions[1].categories == ('female', 'male')
    assert data.conditions[2].categories == ('Bonn', 'Oslo', 'Rome')
    expected = pd.get_dummies(own[['sex', 'city']]).to_numpy(float)
    np.testing.assert_array_equal(context[:, 1:], expected)


def test_rows_without_conditions_are_the_same_with_them(visitors):
    with_conditions = load_visitors(visitors)
    without = load_visitors(visitors, condition=None)
    for part in ('train', 'validation', 'test'):
        np.testing.assert_array_equal(getattr(with_conditions, part)[:, :2], getattr(without, part))
    np.testing.assert_array_equal(with_conditions.quantiles, without.quantiles)


def test_rows_of_other_tables(visitors, tmp_path):
    data = load_visitors(visitors)
    frame = tiny_tables.visitors()
    shuffled = frame[['sex', 'weight', 'age', 'height', 'city']]
    rows = rows_of_frame(shuffled, data, 'x')
    np.testing.assert_array_equal(rows[data.test_index], data.test)
    np.testing.assert_array_equal(read_rows(visitors, data), rows)  # more columns than needed
    exact = rows_of_frame(shuffled, data, 'x', np.float64)
    assert exact.dtype == np.float64 and not np.array_equal(exact, rows)
    np.testing.assert_allclose(exact, rows, atol=1e-5)
    assert rows_of_frame(shuffled[:0], data, 'x').shape == (0, 8)

    line = refusal(rows_of_frame, shuffled.drop(columns='city'), data, 'x')
    assert 'the model is conditioned on city: give their values' in line
    line = refusal(rows_of_frame, shuffled.drop(columns='weight'), data, 'x')
    assert 'has 4 columns, and the model was trained on 5: age, sex, city, height, weight' in line
    line = refusal(rows_of_frame, frame.rename(columns={'weight': 'weights'}), data, 'x')
    assert line == 'x lacks columns that the model was trained on: weight (perhaps weights)'
    refusal(rows_of_frame, frame[['height', 'height', 'weight']], data, 'x')
    line = refusal(rows_of_frame, frame.assign(city='Paris'), data, 'x')
    assert "city 'Paris' in row 0 is not among the 3" in line


def test_rows_of_tables_without_names(tmp_path):
    values = np.random.default_rng(0).normal(size=(60, 4))
    path = tmp_path / 'x.npy'
    np.save(path, values)
    data = load_table(str(path), columns=['3', '1'], condition=['0'])
    assert data.columns == ('column 3', 'column 1') and data.conditions[0].name == 'column 0'
    rows = read_rows(path, data)
    np.testing.assert_array_equal(rows[data.test_index], data.test)

    np.save(tmp_path / 'fewer.npy', values[:, [0, 1, 3]])
    np.testing.assert_array_equal(read_rows(tmp_path / 'fewer.npy', data), rows)
    named = pd.DataFrame(values, columns=['a', 'b', 'c', 'd'])
    np.testing.assert_array_equal(rows_of_frame(named, data, 'x'), rows)
    scored = np.column_stack([values[:, [0, 1, 3]], np.zeros(60)])
    names = ['a', 'b', 'c', 'log_likelihood']
    named = pd.DataFrame(scored, columns=names)
    np.testing.assert_array_equal(rows_of_frame(named, data, 'x'), rows)
    assert 'has 2 columns' in refusal(rows_of_frame, named[['a', 'b']], data, 'x')


def test_a_test_file_has_the_conditions_too(visitors, tmp_path):
    frame = tiny_tables.visitors()
    test = frame.head(30)[['age', 'city', 'weight', 'height', 'sex']]
    test.to_csv(tmp_path / 'test.csv', index=False)
    data = load_visitors(visitors, test_file=tmp_path / 'test.csv')
    assert data.train.shape == (360, 8) and data.test.shape == (30, 8)
    np.testing.assert_array_equal(data.test, rows_of_frame(test, data, 'x'))

    test.assign(city='Paris').to_csv(tmp_path / 'test.csv', index=False)
    line = refusal(load_visitors, visitors, test_file=tmp_path / 'test.csv')
    assert 'test.csv: city' in line


def test_rows_as_a_table(visitors):
    data = load_visitors(visitors)
    rows = data.to_own_units(data.head(5))
    frame = frame_of_rows(rows, data)
    assert list(frame.columns) == ['height', 'weight']
    given = tiny_tables.visitors().loc[10:14, ['city', 'id', 'age']]
    frame = frame_of_rows(rows, data, given)
    assert list(frame.columns) == ['age', 'city', 'height', 'weight']
    assert frame['age'].tolist() == given['age'].tolist() and not frame.isna().any(axis=None)


def test_tables_from_python_may_be_small():
    frame = pd.DataFrame({'x': [1.0, 2.0], 'y': [3.0, 5.0]})
    data = table_from_frame(frame, 'the table', with_test=False)
    assert data.train.shape == data.validation.shape == (1, 2) and data.test.shape == (0, 2)
    assert np.isfinite(data.train).all() and len(data.test_index) == 0
    data = table_from_frame(frame, 'the table', with_test=False, condition=['x'])
    assert data.conditions[0].mean == 1.5
    assert '10' not in refusal(table_from_frame, frame, 'the table')
    assert '1 rows' in refusal(table_from_frame, frame[:1], 'the table', with_test=False)
    assert 'constant: y' in refusal(table_from_frame, frame.assign(y=1), 't', with_test=False)

    frame = tiny_tables.visitors().head(37)
    data = table_from_frame(
        frame, 'x', with_test=False, columns=['height', 'weight'], condition=['city', 'age']
    )
    assert data.train.shape == (34, 6) and data.validation.shape == (3, 6)


# --------------------------------------------------------------------- fingerprints and checkpoints


def test_fingerprints_cover_what_is_selected(visitors, tmp_path):
    frame = tiny_tables.visitors()

    def fingerprint(frame=frame, **options):
        chosen = {'columns': ['height', 'weight'], 'condition': ['age', 'sex']}
        return table_from_frame(frame, 'x', **{**chosen, **options}).fingerprint

    first = fingerprint()
    same = [
        fingerprint(seed=3),
        fingerprint(frame.drop(columns=['date', 'city'])),
        fingerprint(frame.assign(city='Paris')),
        fingerprint(columns=['6-7'], condition=['2', '3']),
        load_visitors(visitors, condition=['age', 'sex']).fingerprint,
    ]
    assert set(same) == {first}
    age, sex = frame['age'].copy(), frame['sex'].copy()
    age[300] += 0.1
    sex[300] = {'male': 'female', 'female': 'male'}[sex[300]]
    others = [
        fingerprint(frame.assign(age=age)),
        fingerprint(frame.assign(sex=sex)),
        fingerprint(frame.assign(sex=frame['sex'].replace('male', 'man'))),
        fingerprint(frame.rename(columns={'sex': 'gender'}), condition=['age', 'gender']),
        fingerprint(condition=['age']),
        fingerprint(condition=['sex', 'age']),
        fingerprint(condition=None),
        fingerprint(columns=['weight', 'height']),
        fingerprint(test_frame=frame.head(20)),
        fingerprint(test_frame=frame.assign(age=age).tail(120)),
        fingerprint(test_frame=frame.tail(120)),
    ]
    assert len({first, *others}) == 12
    plain = frame[['height', 'weight']]
    assert fingerprint(condition=None) == table_from_frame(plain, 'x').fingerprint


def test_fingerprints_are_those_of_earlier_checkpoints(tmp_path):
    values = np.arange(60).reshape(20, 3) ** 2 / 7
    np.save(tmp_path / 'x.npy', values)
    assert load_table(str(tmp_path / 'x.npy')).fingerprint == FINGERPRINTS[0]
    pd.DataFrame(values, columns=['a', 'b', 'c']).to_csv(tmp_path / 'x.csv', index=False)
    data = load_table(str(tmp_path / 'x.csv'), test_file=tmp_path / 'x.npy')
    assert data.fingerprint == FINGERPRINTS[1]


FINGERPRINTS = (
    'cc232150b78531b7',
    '3495563392a9d2f6',
)  # of ``table_fingerprint`` when it knew no conditions


def test_units_are_kept(visitors):
    data = load_visitors(visitors)
    units = json.loads(json.dumps(table_units(data)))  # plain values
    restored = table_from_units(units, 2, 6, 'x.pt')
    assert restored.conditions == data.conditions and restored.n_context == 6
    np.testing.assert_array_equal(restored.quantiles, data.quantiles)
    np.testing.assert_array_equal(restored.ranges, data.ranges)
    rows = read_rows(visitors, restored)
    np.testing.assert_array_equal(rows[data.test_index], data.test)

    assert restored.features == data.features
    assert restored.used_features == ('age', 'sex', 'city', 'height', 'weight')

    unknown = {'conditions': [], 'quantiles': [[], []], 'ranges': [[], []]}
    restored = table_from_units({**units, **unknown}, 2, 0, 'x.pt')
    assert restored.conditions == ()
    assert restored.quantiles.shape == restored.ranges.shape == (0, 2)
    assert unknown.items() <= table_units(restored).items()


def damaged_units(units):
    """Yield units in which one thing is wrong."""
    for key in ('columns', 'mean', 'std', 'steps', 'levels', 'quantiles', 'ranges'):
        yield {**units, key: units[key][:1]}
    for value in (np.nan, np.inf, 0.0, -1.0):
        yield {**units, 'std': [1.0, value]}
    yield {**units, 'columns': ['a', 'a']}
    yield {**units, 'columns': ['a', 'age']}
    yield {**units, 'columns': ['a', '\33[31m']}
    for features in (
        units['features'][:-1],
        [*units['features'], '\33[31m'],
        units['features'] * 2,
    ):
        yield {**units, 'features': features}

    quantiles = units['quantiles'][0]
    for bad in (quantiles[::-1], quantiles[:5], [], [*quantiles[:-1], np.inf]):
        yield {**units, 'quantiles': [quantiles, bad]}
    for bad in ([1.0, -1.0], [0.0], [-1.0, 0.0, 1.0], [-1.0, np.nan], []):
        yield {**units, 'ranges': [[-1.0, 1.0], bad]}

    conditions = units['conditions']
    yield {**units, 'conditions': []}
    yield {**units, 'conditions': conditions[::2]}
    for change in (
        {'std': 0.0},
        {'std': np.nan},
        {'mean': np.inf},
        {'name': '\n'},
        {'name': 'sex'},
        {'categories': ['a', 'b']},
    ):
        yield {**units, 'conditions': [{**conditions[0], **change}, *conditions[1:]]}
    for categories in (['a', 'a'], ['a', '\0'], ['a']):
        yield {**units, 'conditions': [conditions[0], {**conditions[1], 'categories': categories}]}


def test_damaged_units(visitors):
    units = table_units(load_visitors(visitors, condition=['age', 'sex']))
    table_from_units(units, 2, 3, 'x.pt')
    cases = list(damaged_units(units))
    assert len(cases) == 37
    for case in cases:
        assert 'x.pt is damaged' in refusal(table_from_units, case, 2, 3, 'x.pt'), case


def test_quantiles(visitors):
    data = load_visitors(visitors)
    assert data.quantiles.shape == (21, 2)
    assert (QUANTILE_LEVELS[0], QUANTILE_LEVELS[-1]) == (0.02, 0.98)
    below = (data.train[:, None, :2] <= data.quantiles).mean(axis=0)
    np.testing.assert_allclose(below, np.stack([QUANTILE_LEVELS] * 2, axis=1), atol=0.005)
    assert load_table('moons').quantiles.shape == (21, 2)

    rows = np.arange(250_001.0)[:, None]
    np.testing.assert_allclose(column_quantiles(rows)[:, 0], QUANTILE_LEVELS * 250_000, atol=3)


def test_ranges_of_the_training_rows(visitors):
    data = load_visitors(visitors, condition=['age', 'sex'])
    lowest, highest = data.ranges
    np.testing.assert_array_equal(lowest, data.train[:, :2].min(axis=0))
    np.testing.assert_array_equal(highest, data.train[:, :2].max(axis=0))
    assert not data.is_outside(data.train[:, :2]).any()

    rows = np.zeros((5, 2))
    rows[1, 0], rows[2, 1], rows[3] = lowest[0] - 1e-6, highest[1] + 1e-6, highest
    assert data.is_outside(rows).tolist() == [False, True, True, False, False]
    assert load_table('moons').ranges.shape == (0, 2)  # its rows are new at each step


class RunConfig:
    """The options of a run."""

    dataset, data_dir, seed, test_file = '', 'data', 0, ''
    dequantize, max_rows, columns, drop, condition = False, 0, None, None, None

    def __init__(self, **options):
        self.__dict__.update(options)


def saved_run(data, config):
    units = table_units(data)
    dims = [len(data.columns), data.n_context]
    return {
        'units': units,
        'input_dims': dims,
        'path': 'x.pt',
        'fingerprint': data.fingerprint,
        'config': config,
    }


def test_a_run_finds_its_columns_again(visitors, tmp_path):
    options = {'columns': ['height', 'weight'], 'condition': ['age', 'sex']}
    config = RunConfig(dataset=visitors, **options)
    data = load_run_table(config, None)
    assert data.columns == ('height', 'weight') and data.n_context == 3
    saved = saved_run(data, config)
    again = load_run_table(config, saved)
    np.testing.assert_array_equal(again.test, data.test)
    units = load_run_table(config, saved, needs_rows=False)
    assert units.test is None and units.conditions == data.conditions

    frame = tiny_tables.visitors()
    frame['age'] += 1
    frame.to_csv(visitors, index=False)
    assert 'is not what it was' in refusal(load_run_table, config, saved)
    saved['fingerprint'] = ''  # as in old checkpoints
    assert 'is not what it was' in refusal(load_run_table, config, saved)


def test_a_model_fitted_from_python_has_units_only():
    data = table_from_frame(tiny_tables.visitors(), 'x', columns=['height'], condition=['sex'])
    saved = saved_run(data, RunConfig())
    units = load_run_table(RunConfig(), saved, needs_rows=False)
    assert units.conditions == data.conditions
    assert refusal(load_run_table, RunConfig(), saved) == (
        'x.pt was fitted from Python and knows no table: score rows by --evaluate --input=FILE'
    )


# ------------------------------------------------------------------------------------------- show


def test_a_table_with_text_is_drawn_without_it(visitors, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command.main(['show', visitors])
    out = capsys.readouterr().out
    assert f'{visitors}: not drawn, as it is not numeric: date, sex, city' in out
    assert '400 of 5,' in out and 'results/visitors.csv.png' in out

    frame = tiny_tables.visitors()[['date', 'city']]
    frame.to_csv(visitors, index=False)
    with pytest.raises(SystemExit):
        command.main(['show', visitors, '--output=x.png'])
    assert 'has no column of numbers' in capsys.readouterr().err
