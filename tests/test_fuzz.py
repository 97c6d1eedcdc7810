"""A short form of tests/fuzz.py, and tests that it finds what it should."""

import os
import sys
import time

import pytest

if not sys.platform.startswith('linux'):
    pytest.skip('limits its processes as only Linux does', allow_module_level=True)

import fuzz
import mutations
from fuzz_readers import READERS, Reader

from common.errors import UserError


@pytest.mark.slow
@pytest.mark.parametrize('name', READERS)
def test_damaged_files_load_or_are_refused(name, tmp_path):
    results = fuzz.fuzz(name, 5, tmp_path / 'findings')
    assert not results.findings
    assert results.share_passed() > 0.5
    assert results.counts[fuzz.LOADED] > 0
    assert results.counts[fuzz.REFUSED] > 0


@pytest.mark.parametrize('name', READERS)
def test_valid_files_load_and_inputs_depend_on_their_number_alone(name, tmp_path):
    reader = READERS[name]
    seeds, again = reader.make_seeds(), reader.make_seeds()
    inputs = [fuzz.make_input(name, seeds, number) for number in range(10)]
    assert inputs == [fuzz.make_input(name, again, number) for number in range(10)]
    assert len(set(inputs)) > 5

    if name == 'http':  # changes where this process may connect to
        return
    for seed in seeds:
        path = tmp_path / seed.name
        path.write_bytes(seed.content)
        reader.read(path)
        assert reader.passes_header(path)


# ------------------------------------------------------------------------- what the harness finds


def add_reader(monkeypatch, read):
    """Let the harness have a reader called 'new' of any bytes."""
    seed = fuzz.Seed('file', b'0' * 100, mutations.keep_first(4))
    monkeypatch.setitem(READERS, 'new', Reader(lambda: [seed], read, lambda path: True))


def test_values_and_refusals_are_no_findings(monkeypatch, tmp_path):
    def read(path):
        if path.read_bytes()[-1:] != b'0':
            raise UserError('damaged')

    add_reader(monkeypatch, read)
    results = fuzz.fuzz('new', 20, tmp_path / 'findings', n_inputs=300)
    assert results.n_inputs == results.n_passed == 300
    assert results.counts[fuzz.LOADED] + results.counts[fuzz.REFUSED] == 300
    assert results.counts[fuzz.LOADED] and results.counts[fuzz.REFUSED]
    assert not (tmp_path / 'findings').exists()


def raise_key_error(path):
    return {}['a missing key']


def refuse_at_length(path):
    raise UserError('damaged ' * 1000)


def crash(path):
    os.abort()


def leave(path):
    os._exit(7)


def sleep(path):
    time.sleep(60)


def take_memory(path):
    return bytearray(2 * fuzz.MAX_MEMORY)


def write_much(path):
    with open(path.with_name('large'), 'wb') as file:
        file.truncate(2 * fuzz.MAX_FILE_BYTES)


BAD_READERS = {
    raise_key_error: 'KeyError in test_fuzz.py, raise_key_error',
    refuse_at_length: 'a refusal of more than 1,000 characters: ',
    crash: 'crash: SIGABRT in File ',
    leave: 'crash: exit code 7',
    sleep: 'hang: more than 0.5 s in File ',
    take_memory: 'MemoryError in test_fuzz.py, take_memory',
    write_much: 'OSError in test_fuzz.py, write_much',
}


@pytest.mark.parametrize('read', BAD_READERS, ids=lambda read: read.__name__)
def test_what_a_bad_reader_does_is_found(read, monkeypatch, tmp_path):
    """It is found for each input, as the next worker goes on with the next one."""
    add_reader(monkeypatch, read)
    monkeypatch.setattr(fuzz, 'MAX_SECONDS', 0.5)
    results = fuzz.fuzz('new', 30, tmp_path, first=7, n_inputs=2)
    assert results.counts == {fuzz.FINDING: 2}
    summary = next(iter(results.findings))
    assert summary.startswith(BAD_READERS[read])
    assert results.first_seeds[summary] == 7

    kept = (tmp_path / 'new_7_file.txt').read_text()
    assert kept.startswith('python tests/fuzz.py --reader=new --seed=7\n')
    assert read.__name__ in kept or read in (leave, refuse_at_length)
    seeds = READERS['new'].make_seeds()
    assert (tmp_path / 'new_7_file').read_bytes() == fuzz.make_input('new', seeds, 7).content


def test_the_command_repeats_an_input_and_writes_its_table(monkeypatch, tmp_path, capsys):
    add_reader(monkeypatch, raise_key_error)
    page = tmp_path / 'README.md'
    page.write_text('<!-- what fuzz.py wrote -->\n\n| h5 | 8 |\n| new | 9 |\n<!-- until here -->')
    monkeypatch.setattr(fuzz, 'PAGE', page)
    words = ['--reader=new', f'--out={tmp_path}', '--write']
    with pytest.raises(SystemExit, match='1'):
        fuzz.main([*words, '--seed=7'])
    assert (tmp_path / 'new_7_file').exists()
    output = capsys.readouterr().out
    assert '1 times, first seed 7: KeyError' in output
    for text in (output, page.read_text()):
        assert '| new | 1 | 100% | 0 | 0 | 1 | ' in text
    assert '| h5 | 8 |\n' in text and '| new | 9 |' not in text

    with pytest.raises(SystemExit, match='2'):
        fuzz.main(['--reader=old'])
    assert 'no such reader: old' in capsys.readouterr().err
