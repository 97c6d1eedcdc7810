"""Files from strangers: each loads as what it is or is refused in one line.

None of them runs code, and none takes more memory than its size justifies.
"""

import gzip
import io
import math
import os
import pickle
import shutil
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import only
from PIL import EpsImagePlugin, Image
from tiny_data import (
    attribute_rows,
    idx,
    noise_image,
    write_cifar,
    write_folder,
    write_mnist,
    write_table,
)

import bnaf
import glow
from common.errors import UserError
from datasets import images, load_images, photo_sets, photos, tabular
from datasets.pickles import StandIn
from datasets.plots import draw_pairs

# Some of the hostile files are made by ways that libraries warn about.
pytestmark = pytest.mark.filterwarnings('ignore:.*deprecated|.*prototype|invalid escape')

SCRIPTS = {'glow': glow, 'bnaf': bnaf}
MODES = '--generate', '--evaluate', '--visualize', '--check', '--train'
MAX_MEMORY = 2**28  # bytes that a small file may take
MAX_SECONDS = 5
CLEAR_REFS = Path('/proc/self/clear_refs')

needs_posix = pytest.mark.skipif(
    os.name != 'posix', reason='makes links, scripts or file names that only POSIX systems allow'
)


# --------------------------------------------------------------------------------------- helpers


class Call:
    """Becomes a call of a function when it is pickled."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


def refusal(function: Callable, *args: Any) -> str:
    """Return the one line in which a call is refused. It may take little time and memory.

    Memory is measured on Linux only.
    """
    reset_peak_memory()
    memory = memory_of_process('VmRSS')
    start = time.perf_counter()
    with pytest.raises(UserError) as error:
        function(*args)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 1000
    assert memory_of_process('VmHWM') - memory < MAX_MEMORY
    assert time.perf_counter() - start < MAX_SECONDS
    return message


def reset_peak_memory() -> None:
    """Let the peak VmHWM begin at what the process takes now."""
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text('5')


def memory_of_process(name: str) -> int:
    """Return a line of Linux's /proc/self/status in bytes, 0 on other systems."""
    if not CLEAR_REFS.exists():
        return 0
    lines = Path('/proc/self/status').read_text().splitlines()
    status = dict(line.split(':') for line in lines)
    return int(status[name].split()[0]) * 1024


def refused(script: str, capsys: pytest.CaptureFixture, *words: str | Path) -> str:
    """Run a script in this process, and return the one line in which it refuses to go on."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match='2'):
        SCRIPTS[script].main([str(word) for word in words])
    errors = capsys.readouterr().err
    assert errors.startswith(f'{script}.py: error: '), errors
    assert errors.endswith('\n'), errors
    assert errors[:-1].isprintable(), errors
    return errors


def have_equal_content(a: dict, b: dict) -> bool:
    """Return whether two checkpoints hold the same, whatever files they come from."""
    return are_equal({**a, 'path': None}, {**b, 'path': None})


def are_equal(a: Any, b: Any) -> bool:
    """Compare dicts, tensors and plain values; NaN equals NaN."""
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return False
        return all(are_equal(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b or (a != a and b != b)


def deep_list() -> list:
    """Return a list of 10^40 elements that takes little memory."""
    value: list = [0]
    for _ in range(40):
        value = [value] * 10
    return value


def circular_list() -> list:
    """Return a list that contains itself."""
    value: list = []
    value.append(value)
    return value


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """The path of a tiny checkpoint of each script, by the script's name."""
    folder = tmp_path_factory.mktemp('trained')
    words = ['--dataset=digits', '--depth=1', '--width=8', '--n_epochs=1', '--batch_size=512']
    glow.main(['--train', *words, f'--output_dir={folder}', f'--data_dir={folder}'])

    rows = np.random.default_rng(0).normal(size=(90, 2))
    pd.DataFrame(rows, columns=['a', 'b']).to_csv(folder / 'rows.csv', index=False)
    words = ['--n_flows=2', '--hidden_dim=3', '--n_epochs=2']
    bnaf.main(['--train', f'--dataset={folder}/rows.csv', *words, f'--output_dir={folder}'])
    return {name: only(folder.glob(f'{name}_*/checkpoint.pt')) for name in SCRIPTS}


# -------------------------------------------------------------------- checkpoints: damaged bytes


def read_zip(path: Path) -> dict[str, bytes]:
    """Return the members of a zip file by name."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def make_zip(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip file with the right checksums."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, 'w', compression) as archive:
        for name, part in members.items():
            archive.writestr(name, part)
    return content.getvalue()


def flip_bit(content: bytes, position: int, rng: np.random.Generator) -> bytes:
    """Return a copy in which one bit of the byte at a position is another."""
    changed = bytearray(content)
    changed[position] ^= 1 << rng.integers(8)
    return bytes(changed)


# The functions in DAMAGES take a checkpoint's bytes, its members by name and a numpy Generator.
# They return damaged bytes.


def flip_any_bit(content, members, rng):
    return flip_bit(content, rng.integers(len(content)), rng)


def flip_bit_in_first_header(content, members, rng):
    return flip_bit(content, rng.integers(64), rng)


def flip_bit_in_directory(content, members, rng):
    n = len(content)
    return flip_bit(content, n - 1 - rng.integers(min(n, 4000)), rng)


def cut_off_end(content, members, rng):
    return content[: rng.integers(len(content))]


def cut_off_beginning(content, members, rng):
    return content[rng.integers(len(content)) :]


def append_bytes(content, members, rng):
    return content + rng.bytes(rng.integers(1, 100))


def prepend_bytes(content, members, rng):
    return rng.bytes(rng.integers(1, 100)) + content


def overwrite_with_zeros(content, members, rng):
    start = rng.integers(len(content))
    return content[:start] + bytes(64) + content[start + 64 :]


def swap_members(content, members, rng):
    a, b = rng.choice(list(members), 2, replace=False)
    if len(members[a]) == len(members[b]):  # this could be a good checkpoint
        return make_zip({})
    return make_zip({**members, a: members[b], b: members[a]})


def drop_tensors(content, members, rng):
    kept = {}
    for name, part in members.items():
        if '/data/' not in name or rng.random() < 0.9:
            kept[name] = part
    return make_zip(kept)


DAMAGES = [
    flip_any_bit,
    flip_bit_in_first_header,
    flip_bit_in_directory,
    cut_off_end,
    cut_off_beginning,
    append_bytes,
    prepend_bytes,
    overwrite_with_zeros,
    swap_members,
    drop_tensors,
]


@pytest.mark.slow
@pytest.mark.parametrize('script', SCRIPTS)
def test_damaged_checkpoints_are_whole_or_refused(script, checkpoints, tmp_path, recwarn):
    path, file = checkpoints[script], tmp_path / 'bad.pt'
    load = SCRIPTS[script].load_checkpoint
    whole, content, members = load(path), path.read_bytes(), read_zip(path)

    rng = np.random.default_rng(0)
    n_whole, n = 0, 150
    for _ in range(n):
        damage = DAMAGES[rng.integers(len(DAMAGES))]
        file.write_bytes(damage(content, members, rng))
        try:
            loaded = load(file)
        except UserError as error:
            assert str(file) in str(error)
        else:
            n_whole += 1
            assert have_equal_content(loaded, whole)
    assert 0 < n_whole < n / 2
    assert not [str(warning.message) for warning in recwarn.list]


@pytest.mark.slow
@pytest.mark.parametrize('script', SCRIPTS)
def test_damaged_pickles_with_right_checksums(script, checkpoints, tmp_path):
    """Such a file may hold another checkpoint, as good as any, but whatever loads can be used."""
    module, file = SCRIPTS[script], tmp_path / 'bad.pt'
    members = read_zip(checkpoints[script])
    pickled = only(name for name in members if name.endswith('data.pkl'))

    rng = np.random.default_rng(1)
    n_refused, n = 0, 150
    for _ in range(n):
        content = members[pickled]
        for _ in range(rng.integers(1, 4)):
            content = flip_any_bit(content, members, rng)
        file.write_bytes(make_zip({**members, pickled: content}))
        try:
            loaded = module.load_checkpoint(file)
        except UserError as error:
            n_refused += 1
            assert str(error).isprintable()
        else:
            module.restore_model(loaded, torch.device('cpu'))
    assert n_refused > n / 2


def test_a_loaded_checkpoint_does_not_depend_on_its_file(checkpoints, tmp_path):
    file = shutil.copy(checkpoints['glow'], tmp_path)
    whole, loaded = glow.load_checkpoint(checkpoints['glow']), glow.load_checkpoint(file)
    with open(file, 'r+b') as content:
        content.write(bytes(os.path.getsize(file)))
    assert have_equal_content(loaded, whole)


# The functions in BAD_ARCHIVES take a checkpoint's members by name and the folder that they are in.
# They return the bytes of something else.


def compressed_zeros(members, root):
    return make_zip({**members, f'{root}/more': bytes(2**28)}, zipfile.ZIP_DEFLATED)


def names_that_differ_in_case(members, root):
    size = len(members[f'{root}/data/0'])
    return make_zip({**members, f'{root}/DATA/0': bytes(size)})


def many_members(members, root):
    return make_zip({**members, **{f'{root}/data/x{k}': b'' for k in range(20_000)}})


def pickles_of_another_protocol(members, root):
    changed = {}
    for name, part in members.items():
        changed[name] = b'\x80\x04' + part[2:] if name.endswith('.pkl') else part
    return make_zip(changed)


def overlapping_members(members, root):
    """Return a checkpoint with one more member, which lies within another one."""
    inner = make_zip({f'{root}/inner': bytes(2**20)})
    content = make_zip({**members, f'{root}/outer': inner})
    entry_mark, end_mark = b'PK\x01\x02', b'PK\x05\x06'

    entry = bytearray(inner[inner.index(entry_mark) : inner.rindex(end_mark)])
    entry[42:46] = struct.pack('<I', content.index(inner))
    end_position = content.rindex(end_mark)
    end = bytearray(content[end_position:])
    (n,) = struct.unpack('<H', end[10:12])
    (size,) = struct.unpack('<I', end[12:16])
    end[8:16] = struct.pack('<2HI', n + 1, n + 1, size + len(entry))
    return content[:end_position] + bytes(entry) + bytes(end)


def save_in_old_format(content: Any) -> bytes:
    """Return a file as torch.save wrote it before it used zip files."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def old_format_before_zip(members, root):
    return save_in_old_format(Call(bytearray, 10**11)) + make_zip(members)


BAD_ARCHIVES = {
    'large': compressed_zeros,
    'compressed': lambda members, root: make_zip(members, zipfile.ZIP_DEFLATED),
    'two_cases': names_that_differ_in_case,
    'two_pickles': lambda members, root: make_zip({**members, f'{root}/DATA.PKL': b'.'}),
    'many': many_members,
    'torchscript': lambda members, root: make_zip({**members, f'{root}/constants.pkl': b'.'}),
    'protocol': pickles_of_another_protocol,
    'none': lambda members, root: make_zip({}),
    'empty': lambda members, root: b'',
    'pickle': lambda members, root: pickle.dumps(Call(bytearray, 10**11)),
    'old': lambda members, root: save_in_old_format({'script': 'glow.py'}),
    'old_before_zip': old_format_before_zip,
    'overlapping': overlapping_members,
}


@pytest.mark.parametrize('name', BAD_ARCHIVES)
def test_archives_that_are_no_checkpoints(name, checkpoints, tmp_path, recwarn):
    members = read_zip(checkpoints['glow'])
    root = only({name.split('/')[0] for name in members})
    (tmp_path / 'bad.pt').write_bytes(BAD_ARCHIVES[name](members, root))
    message = refusal(glow.load_checkpoint, tmp_path / 'bad.pt')
    assert 'cannot be read as a checkpoint' in message
    assert not [str(warning.message) for warning in recwarn.list]


# The pickles in BAD_PICKLES, without their first and last operation, call or name more than
# torch.save does, or nest what it leaves flat.

UNTYPED = b'ctorch.storage\nUntypedStorage\n'
DICT = b'ccollections\nOrderedDict\n'
BAD_PICKLES = {
    'storages of many numbers': UNTYPED
    + b'q\0]('
    + b'K\1' * 50_000
    + b'e\x85q\1]('
    + b'h\0h\1R' * 5000
    + b'e',
    'a storage of a size': UNTYPED + b'J\0\0\0\x40\x85R',
    'a storage with attributes': UNTYPED + b'K\x10\x85R}X\6\0\0\0_dtypeK\1sb',
    'dicts of many numbers': DICT
    + b'q\0}('
    + b''.join(b'J' + struct.pack('<i', i) + b'K\1' for i in range(20_000))
    + b'u\x85q\1]('
    + b'h\0h\1R' * 300
    + b'e',
    'a dict with attributes of a list': b'](K\1e}X\1\0\0\0aK\1sb',
    'a deep tuple': b')' + b'\x85' * 300_000,
    'a deep tuple as a key': b'})' + b'\x85' * 5000 + b'K\1s',
    'a tuple as a key': b'}K\1K\2\x86K\1s',
    'bytes': b'c_codecs\nencode\nX\1\0\0\0aX\6\0\0\0latin1\x86R',
    'an object': DICT + b')\x81',
    'a type of numbers': b'ctorch\nuint16\n',
    'a function': b'ctorch._utils\n_rebuild_tensor_v2\n',
    'nothing': b'',
    'too much taken': b'000',
}


@pytest.mark.parametrize('name', BAD_PICKLES)
def test_pickles_that_do_more_than_they_may(name, checkpoints, tmp_path):
    members = {}
    for member, part in read_zip(checkpoints['glow']).items():
        if member.endswith('data.pkl'):
            part = b'\x80\2' + BAD_PICKLES[name] + b'.'
        if '/data/' not in member:
            members[member] = part
    (tmp_path / 'bad.pt').write_bytes(make_zip(members))
    message = refusal(glow.load_checkpoint, tmp_path / 'bad.pt')
    assert 'cannot be read as a checkpoint' in message


# ------------------------------------------------------------------- checkpoints: hostile values


class Shadowed:
    """Becomes an OrderedDict with attributes of its own when it is pickled."""

    def __init__(self, mapping: dict, **attributes: Any) -> None:
        self.mapping = mapping
        self.attributes = attributes

    def __reduce__(self) -> tuple:
        return OrderedDict, (), self.attributes, None, iter(self.mapping.items())


def strided(size: Any, stride: Any, offset: int = 0, *more: Any) -> Call:
    """Return what becomes, when pickled, a tensor of one number that seems to have more."""
    storage = torch.zeros(1).storage()
    rebuild = torch._utils._rebuild_tensor_v2
    return Call(rebuild, storage, offset, size, stride, False, OrderedDict(), *more)


def bad_tensors(weight: torch.Tensor) -> dict[str, Any]:
    """Return by name what stands in place of a weight and must not be taken for it."""
    return {
        'sparse': weight.to_sparse(),
        'complex': weight.cfloat(),
        'float64': weight.double(),
        'half': weight.half(),
        'meta': weight.to('meta'),
        'nested': torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        'expanded': torch.zeros(()).expand(weight.shape),
        'part': torch.zeros(10**6)[: weight.numel()].view(weight.shape),
        'huge': strided((10**6, 10**6), (0, 0)),
        'overflow': strided((2**32, 2**32), (0, 0)),
        'outside': strided((10**9,), (1,)),
        'before': strided((1,), (1,), -(10**6)),
        'after': strided((1,), (1,), 10**6),
        'backward': strided((2, 1), (-1, 1), 1),
        'many_dims': strided((1,) * 100, (0,) * 100),
        'negative': strided((-1,), (1,)),
        'uneven': strided((1,), ()),
        'text_size': strided('a', 'b'),
        'negated': strided((1,), (1,), 0, {'neg': True}),
        'parameter': torch.nn.Parameter(weight),
        'nan': weight * math.nan,
        'inf': weight.abs() / 0,
        'shape': weight[None],
        'empty': weight[:0],
        'list': weight.tolist(),
        'none': None,
        'text': 'x',
        'bytes': bytearray(4),
        'storage': weight.storage(),
    }


@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize('part', ['model', 'average', 'optimizer'])
def test_bad_tensors_in_place_of_weights(part, script, checkpoints, tmp_path):
    saved, file = torch.load(checkpoints[script]), tmp_path / 'bad.pt'
    values = saved[part]
    if part == 'optimizer':
        states = values['state'].values()
        values = max(states, key=lambda state: state['exp_avg'].numel())
    key = max(values, key=lambda key: values[key].numel())
    for name, value in bad_tensors(values[key]).items():
        values[key] = value
        torch.save(saved, file)
        assert str(file) in refusal(SCRIPTS[script].load_checkpoint, file), name


BAD_OPTIONS = [
    ('dataset', '\33[2J'),
    ('dataset', 'a\nb'),
    ('dataset', 3),
    ('data_dir', '\u202e'),
    ('data_dir', None),
    ('data_dir', '\udc80'),
    ('seed', -1),
    ('seed', 2**63),
    ('seed', True),
    ('batch_size', 2**40),
    ('batch_size', 0),
    ('n_epochs', 10**400),
    ('lr', math.nan),
    ('lr', 1),
    ('ema_decay', torch.tensor(0.5)),
    ('checkpoint_grads', 'yes'),
    ('data_dir', ['a']),
    ('more', 1),
    (3, 4),
]
BAD_INPUT_DIMS = [
    [],
    [-1],
    [2**16],
    [2, 2],
    ['a'],
    [True],
    (2,),
    deep_list(),
    2,
    [1, 8, 16],
    [1, 8, 16, 0],
    [1, 8, 8, 2**16],
    [1, 2**15, 2**15, 0],
    [10**9] * 3,
    [2**16 - 1] * 300_000,
]
BAD_FORMATS = ['A' * 10**6, torch.tensor(1), True, None, [1]]
BAD_COUNTS = [-1, 2**70, 10**400, 0.5, True, '1', None, [1], torch.tensor(1)]
BAD_LOSSES = [1, None, '1', torch.tensor(1.0)]
BAD_PARTS = [None, 3, [], deep_list(), circular_list(), {'x': 1}, {1: torch.zeros(1)}, {}]
BAD_ADAM_OPTIONS = [
    {'lr': 'x'},
    {'lr': math.nan},
    {'lr': -1.0},
    {'lr': torch.ones(1)},
    {'betas': (2, 3)},
    {'betas': [0.9, 0.999]},
    {'betas': 'x'},
    {'betas': (torch.ones(2), 0.9)},
    {'eps': torch.ones(2)},
    {'eps': math.inf},
    {'weight_decay': '0'},
    {'foreach': True},
    {'capturable': True},
    {'fused': None},
    {'differentiable': True},
    {'maximize': True},
    {'params': [0]},
    {'params': deep_list()},
]


def bad_configs(config: dict) -> list:
    """Return what is not a config of the script."""
    changed = [{**config, key: value} for key, value in BAD_OPTIONS]
    return [*changed, {}, [1], deep_list(), Shadowed(config, keys=None, items=3)]


def bad_optimizers(adam: dict) -> list[dict]:
    """Return what is not a state of Adam for the parameters of the model."""
    group, state = adam['param_groups'][0], adam['state']
    n = len(group['params'])
    bad_groups = [[{**group, **change}] for change in BAD_ADAM_OPTIONS]
    bad_groups += [[{**group, 'params': [value] * n}] for value in (10**6, torch.ones(2))]
    for key in ('params', 'lr', 'betas', 'eps', 'weight_decay'):
        bad_groups.append([{name: value for name, value in group.items() if name != key}])
    bad_groups += [[], [group, group], [3], None, group, deep_list(), (group,)]

    i = max(state, key=lambda i: state[i]['exp_avg'].numel())
    bad_states = [
        {i: {}},
        {i: 3},
        {-1: state[i]},
        {'a': state[i]},
        {i: {**state[i], 'more': torch.zeros(1)}},
        {i: {**state[i], 'step': torch.zeros(2)}},
        {i: {**state[i], 'exp_avg': torch.zeros(())}},
        {i: {**state[i], 'exp_avg_sq': deep_list()}},
    ]
    return [
        *[{**adam, 'param_groups': groups} for groups in bad_groups],
        *[{**adam, 'state': {**state, **change}} for change in bad_states],
        {**adam, 'state': None},
        {**adam, 'state': []},
        {**adam, 'more': 1},
    ]


def bad_entries(saved: dict) -> Iterable[tuple[str, Any]]:
    """Return names of a checkpoint's entries, each with what that entry must not be."""
    entries = [('config', config) for config in bad_configs(saved['config'])]
    entries += [('input_dims', dims) for dims in BAD_INPUT_DIMS]
    entries += [('format', number) for number in BAD_FORMATS]
    entries += [('step', count) for count in BAD_COUNTS]
    for name in ('world_size', 'first_world_size'):
        entries += [(name, count) for count in [*BAD_COUNTS, 0]]
    entries += [('best', loss) for loss in BAD_LOSSES]
    for part in ('model', 'average', 'optimizer', 'script'):
        entries += [(part, value) for value in BAD_PARTS]
    for part in ('model', 'average', 'optimizer'):
        entries += [(part, {**saved[part], '\33[31m': torch.zeros(1)})]
    entries += [('optimizer', adam) for adam in bad_optimizers(saved['optimizer'])]
    return entries


@pytest.mark.slow
@pytest.mark.parametrize('script', SCRIPTS)
def test_bad_entries(script, checkpoints, tmp_path):
    saved, file = torch.load(checkpoints[script]), tmp_path / 'bad.pt'
    load = SCRIPTS[script].load_checkpoint
    for i, (name, value) in enumerate(bad_entries(saved)):
        torch.save({**saved, name: value}, file)
        assert str(file) in refusal(load, file), f'entry {i}, {name}'
    for name in saved.keys() - SCRIPTS[script].CHECKPOINT.defaults.keys():
        others = {other: value for other, value in saved.items() if other != name}
        torch.save(others, file)
        refusal(load, file)


ODD_CONTENT_OF_FORMAT_1 = [
    ({'step': 10**15}, {'batch_size': 'a'}),
    ({'step': 10**25}, {'batch_size': 'a' * 1000}),
    ({'step': 2**2000}, {'batch_size': 1.5}),
    ({'world_size': 2**2000}, {}),
    ({}, {'batch_size': 2**2000}),
    ({'step': torch.ones(2), 'world_size': torch.ones(3)}, {}),
    ({'world_size': 0}, {}),
    ({'config': []}, {}),
]


@pytest.mark.parametrize('script', SCRIPTS)
def test_odd_content_is_not_upgraded(script, tmp_path):
    saved = torch.load(Path(__file__).parent / 'checkpoints' / f'{script}_1.pt')
    file = tmp_path / 'bad.pt'
    for entries, options in ODD_CONTENT_OF_FORMAT_1:
        content = {**saved, 'config': {**saved['config'], **options}, **entries}
        torch.save(content, file)
        assert 'another version' in refusal(SCRIPTS[script].load_checkpoint, file)
    for name in saved.keys() - {'script', 'format'}:
        content = {other: value for other, value in saved.items() if other != name}
        torch.save(content, file)
        assert 'another version' in refusal(SCRIPTS[script].load_checkpoint, file)


def large_glows(saved: dict) -> list[tuple[dict, list[int]]]:
    """Return options of large models, and the shapes of their input."""
    largest = {'n_levels': 9, 'depth': 2**10, 'width': 2**14, 'image_size': 2**10}
    return [
        (largest, [1, 2**10, 2**10, 0]),
        ({'depth': 2**10}, saved['input_dims']),
        ({'width': 10**9}, saved['input_dims']),
    ]


def large_bnafs(saved: dict) -> list[tuple[dict, list[int]]]:
    """Return options of large models, and the shapes of their input."""
    largest = {'n_flows': 2**8, 'n_hidden': 2**6, 'hidden_dim': 2**12}
    return [(largest, [2]), (largest, [200]), (largest, [2**16 - 1])]


@pytest.mark.parametrize('script', SCRIPTS)
def test_models_too_large_for_their_weights(script, checkpoints, tmp_path):
    saved, file = torch.load(checkpoints[script]), tmp_path / 'bad.pt'
    large_models = {'glow': large_glows, 'bnaf': large_bnafs}[script]
    for options, dims in large_models(saved):
        config = {**saved['config'], **options}
        torch.save({**saved, 'config': config, 'input_dims': dims}, file)
        assert 'damaged' in refusal(SCRIPTS[script].load_checkpoint, file)


def payloads(canary: Path, other: Path) -> list:
    """Return what runs code, takes much memory, or is no tensor, when it is loaded by pickle.

    Args:
        canary: A folder that the code would make.
        other: A pickle that does the same.
    """
    make_folder = Call(os.mkdir, str(canary))
    rebuild_meta = torch._utils._rebuild_meta_tensor_no_storage
    return [
        make_folder,
        Call(eval, f'__import__("os").mkdir({str(canary)!r})'),
        Call(torch.load, str(other), 'cpu'),
        Call(torch._tensor._rebuild_from_type_v2, os.mkdir, str, (str(canary),), {}),
        Call(torch._utils._rebuild_parameter, make_folder, False, OrderedDict()),
        Call(torch.nn.Parameter, make_folder),
        Call(torch.Tensor, 10**5, 10**5),
        Call(bytearray, 10**11),
        Call(torch.UntypedStorage, 10**12),
        Call(torch.empty, 10**11),
        Call(set, [1]),
        Call(complex, 1),
        Call(torch.device, 'cpu'),
        Call(torch.hub.load, str(other.parent), 'x'),
        Call(rebuild_meta, torch.float32, (10**9, 10**9), (1, 1), False),
        np.zeros(3),
        torch.Size([1]),
        torch.nn.Linear(1, 1),
        Path('/'),
    ]


def entries_with(payload: Any, saved: dict) -> list[dict]:
    """Return entries of a checkpoint that hold the payload at several depths."""
    config = {**saved['config'], 'dataset': payload}
    return [{'model': payload}, {'config': config}, {'more': payload}]


def test_a_type_of_tensors_is_no_entry(checkpoints, tmp_path):
    """A checkpoint may name such a type, which is harmless, but not in these places."""
    saved, file = torch.load(checkpoints['glow']), tmp_path / 'bad.pt'
    for change in entries_with(torch.float32, saved):
        torch.save({**saved, **change}, file)
        assert 'damaged' in refusal(glow.load_checkpoint, file)


def test_no_payload_runs(checkpoints, tmp_path, capsys):
    canary, other, file = tmp_path / 'canary', tmp_path / 'other.pt', tmp_path / 'bad.pt'
    saved = torch.load(checkpoints['glow'])
    make_folder = Call(os.mkdir, str(canary))
    other.write_bytes(pickle.dumps(make_folder))

    for payload in payloads(canary, other):
        for change in entries_with(payload, saved):
            torch.save({**saved, **change}, file)
            assert 'holds more than tensors' in refusal(glow.load_checkpoint, file), payload

    commands = [[mode, f'--restore_file={file}'] for mode in MODES]
    commands.append(['--train', '--resume', f'--output_dir={tmp_path}/runs'])
    run_folder = tmp_path / 'runs' / 'glow_x'
    for words in commands:
        run_folder.mkdir(parents=True, exist_ok=True)
        torch.save({**saved, 'more': make_folder}, file)
        shutil.copy(file, run_folder / 'checkpoint.pt')
        assert 'holds more than tensors' in refused('glow', capsys, *words)
    assert not canary.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['bad.pt', 'other.pt', 'runs']


BAD_SCHEDULERS = [
    {'step': None},
    {'optimizer': None},
    {'min_lrs': []},
    {'min_lrs': 'x'},
    {'factor': 7.0},
    {'best': 'x'},
    {'patience': 10**9},
    {'more': 1},
    {'num_bad_epochs': None},
    {'num_bad_epochs': -1},
    {'mode': deep_list()},
]
BAD_UNITS = [
    {'mean': [math.nan] * 2},
    {'std': [0.0, 1.0]},
    {'std': [math.inf] * 2},
    {'steps': [-math.inf] * 2},
    {'columns': ['\33[31m', 'b']},
    {'columns': ['a']},
    {'columns': ['c', 'd']},
    {'mean': [1, 2]},
    {'more': []},
    {'mean': deep_list()},
    {'features': ['x1']},
    {'features': ['x1', 'x2', 'x2']},
    {'features': ['x1', 'x2', '\33[31m']},
    {'conditions': [{'name': 'c', 'mean': 0.0, 'std': 1.0, 'categories': []}]},
    {'conditions': [{'name': 'c'}]},
    {'conditions': deep_list()},
    {'quantiles': [[0.0] * 21]},
    {'quantiles': [[0.0] * 20] * 2},
    {'quantiles': [[math.nan] * 21] * 2},
    {'quantiles': [[1.0] + [0.0] * 20] * 2},
    {'ranges': [[-1.0, 1.0]]},
    {'ranges': [[1.0, -1.0]] * 2},
    {'ranges': [[-1.0, math.inf]] * 2},
]
BAD_COLUMN_OPTIONS = ['a', ['\33[31m'], [3], [['a']], {'a': 1}, deep_list()]


@pytest.mark.parametrize('mode', ['--train', '--evaluate'])
def test_scheduler_and_units_are_checked(mode, checkpoints, tmp_path, capsys):
    saved, file = torch.load(checkpoints['bnaf']), tmp_path / 'checkpoint.pt'
    scheduler, units = saved['scheduler'], saved['units']
    changes = [{'scheduler': 3}]
    changes += [{'scheduler': {**scheduler, **change}} for change in BAD_SCHEDULERS]
    changes += [{'units': {**units, **change}} for change in BAD_UNITS]
    for i, change in enumerate(changes):
        torch.save({**saved, **change}, file)
        content = file.read_bytes()
        refused('bnaf', capsys, mode, f'--restore_file={file}', '--n_epochs=3')
        assert file.read_bytes() == content, i
        assert {path.name for path in tmp_path.iterdir()} <= {'checkpoint.pt', '.lock'}, i


@pytest.mark.parametrize('name', ['columns', 'drop', 'condition'])
def test_options_that_are_lists_are_checked(name, checkpoints, tmp_path):
    saved, file = torch.load(checkpoints['bnaf']), tmp_path / 'bad.pt'
    for value in BAD_COLUMN_OPTIONS:
        torch.save({**saved, 'config': {**saved['config'], name: value}}, file)
        assert 'bad.pt' in refusal(bnaf.load_checkpoint, file)
    torch.save({**saved, 'config': {**saved['config'], name: ['x1']}}, file)
    assert getattr(bnaf.load_checkpoint(file)['config'], name) == ['x1']


def test_conditions_of_another_width_than_the_models(checkpoints, tmp_path, capsys):
    """Damage of the units of a conditional model is refused by every mode."""
    rng = np.random.default_rng(0)
    pd.DataFrame({'a': rng.normal(size=50), 'c': rng.choice(['p', 'q'], 50)}).to_csv(
        tmp_path / 'my.csv', index=False
    )
    words = [f'--dataset={tmp_path}/my.csv', '--condition=c', f'--output_dir={tmp_path}']
    bnaf.main(['--train', *words, '--n_flows=1', '--hidden_dim=2', '--n_epochs=1'])
    saved = torch.load(only(tmp_path.glob('bnaf_*/best.pt')))
    (condition,) = saved['units']['conditions']
    for change in (
        {'categories': ['p']},
        {'categories': ['p', 'q', 'r']},
        {'categories': ['p', 'p']},
        {'categories': ['p', '\33[31m']},
        {'name': 'd'},
        {'name': 'a'},
        {'std': 0.0},
        {'mean': math.inf},
    ):
        units = {**saved['units'], 'conditions': [{**condition, **change}]}
        torch.save({**saved, 'units': units}, tmp_path / 'bad.pt')
        for mode in ('--evaluate', '--generate'):
            line = refused('bnaf', capsys, mode, f'--restore_file={tmp_path}/bad.pt', *words[:1])
            assert 'damaged' in line, change


def test_weights_without_an_inverse(checkpoints, tmp_path, capsys):
    saved = torch.load(checkpoints['glow'])
    for key, value in saved['average'].items():
        if key.endswith('.p'):
            value.zero_()
    torch.save(saved, tmp_path / 'bad.pt')
    assert 'singular' in refused('glow', capsys, '--generate', f'--restore_file={tmp_path}/bad.pt')
    assert [path.name for path in tmp_path.iterdir()] == ['bad.pt']


@pytest.mark.parametrize(
    'content',
    [
        torch.zeros(10, 63),
        torch.zeros(10, 64).double(),
        {'a': 1},
        [torch.zeros(10, 64)],
        None,
        torch.zeros(0),
        Call(bytearray, 10**11),
        Call(os.mkdir, 'canary'),
    ],
)
def test_hostile_attribute_directions_are_made_again(content, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(checkpoints['glow'], tmp_path)
    words = ['--visualize', '--restore_file=checkpoint.pt', '--vis_attrs=3']
    glow.main(words)
    cache = only(tmp_path.glob('attribute_directions_*.pt'))
    picture = only(tmp_path.glob('*.png'))
    directions, shown = torch.load(cache), picture.read_bytes()

    torch.save(content, cache)
    glow.main(words)
    assert torch.equal(torch.load(cache), directions)
    assert picture.read_bytes() == shown
    assert not Path('canary').exists()


# ---------------------------------------------------------------------------------------- images


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


BAD_IMAGES = {
    'empty': b'',
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


NAMES = [
    '../../x',
    '/etc/x',
    '=cmd|calc',
    '+1',
    '$\\frac{',
    '\N{GRINNING FACE}',
    'n' * 10_000,
    "'); x",
    '%s{0}',
    'CON',
]


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


@pytest.mark.parametrize(
    'header, cells, part',
    [
        ('image,split', '', 'a split is one of'),
        ('image,' + 'n' * 200_000, ',1', 'field larger'),
        ('image,\33[31m', ',1', 'printable'),
        ('image,' + ','.join(map(str, range(5000))), ',1' * 5000, '1000 at most'),
        ('image,a\0', ',1', ''),
        ('image,"a', ',1', ''),
        ('image,a,a', ',1,1', 'different'),
    ],
)
def test_bad_attribute_tables(header, cells, part, tmp_path):
    files = [f'{i:02}.png' for i in range(20)]
    lines = [header, *[name + cells for name in files]]
    (tmp_path / 'attributes.csv').write_text('\n'.join(lines))
    assert part in refusal(photo_sets.read_attribute_table, tmp_path / 'attributes.csv', files)


def test_mnist_that_unfolds_without_end(tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / 'train-images-idx3-ubyte'
    with gzip.open(f'{path}.gz', 'wb', 1) as file:
        file.write(idx(np.zeros((40, 28, 28))))
        for _ in range(2**9):
            file.write(bytes(2**20))
    path.unlink()
    assert 'longer' in refusal(load_images, 'mnist', tmp_path)


@pytest.mark.parametrize(
    'data',
    [
        Call(np.ndarray),
        Call(np.dtype, 'u1'),
        Call(np.zeros(0).__reduce__()[0], np.ndarray, (0,), b'b'),
        Call(bytearray, 10**11),
    ],
)
def test_cifar_batches_without_an_array(data, tmp_path):
    write_cifar(tmp_path)
    (tmp_path / 'data_batch_2').write_bytes(pickle.dumps({'data': data, 'labels': [0]}))
    assert 'data_batch_2' in refusal(load_images, 'cifar10', tmp_path)


def test_cifar_arrays_with_a_bad_state(tmp_path, monkeypatch):
    """``read_pickle`` leaves such an array as an object of the class ``StandIn``."""
    array = type('_reconstruct', (StandIn,), {})()
    for state in (
        None,
        3,
        (1, (2,), 5, False, b'ab'),
        (1, (2,), array, False, b'ab'),
        (1, 'a', None, None, None),
    ):
        array.state = state
        monkeypatch.setattr(images, 'read_pickle', lambda path: {'data': array, 'labels': [0]})
        refusal(images.read_cifar_batch, tmp_path / 'data_batch_1')


# ---------------------------------------------------------------------------------------- caches


def npy_file(array: np.ndarray) -> bytes:
    """Return an array as an .npy file, objects pickled."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=True)
    return content.getvalue()


def npy_header(header: str) -> bytes:
    """Return an .npy file that has this header and no data."""
    size = struct.pack('<H', len(header))
    return b'\x93NUMPY\x01\x00' + size + header.encode()


def npy_header_of(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return an .npy file that states a type and a shape and has no data."""
    return npy_header(f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}")


def npz_file(array: np.ndarray) -> bytes:
    """Return an array as an .npz file."""
    content = io.BytesIO()
    np.savez(content, array)
    return content.getvalue()


@pytest.mark.parametrize(
    'change',
    [
        lambda whole: npy_file(np.array([Call(os.mkdir, 'canary')])),
        lambda whole: npz_file(np.zeros((20, 3, 16, 16), np.uint8)),
        lambda whole: b'',
        lambda whole: npy_file(np.zeros((20, 3, 16, 15), np.uint8)),
        lambda whole: npy_file(np.zeros((19, 3, 16, 16), np.uint8)),
        lambda whole: whole[:-1],
        lambda whole: npy_file(np.zeros((20, 3, 16, 16), np.int8)),
        lambda whole: npy_file(np.zeros(())),
        lambda whole: pickle.dumps(Call(os.mkdir, 'canary')),
        lambda whole: npy_header('(' * 9000),
        lambda whole: npy_header_of('<f8', (-1, 2)),
        lambda whole: npy_header_of('|u1', (10**30, 2)),
        lambda whole: b'\x93NUMPY\x01\x00\xff\xff{',
    ],
)
def test_a_bad_cache_is_made_again(change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / 'photos')
    write_cifar(tmp_path / 'cifar')
    for name, folder, size in (('folder', 'photos', 16), ('cifar10', 'cifar', None)):
        first = load_images(name, tmp_path / folder, size).train.images.copy()
        cache = only((tmp_path / folder / '.cache').glob('*.npy'))
        cache.write_bytes(change(cache.read_bytes()))
        again = load_images(name, tmp_path / folder, size).train.images
        assert again.shape == first.shape
        assert (again == first).all()
    assert not Path('canary').exists()


def test_a_cache_with_classes_that_do_not_exist(tmp_path):
    write_cifar(tmp_path)
    first = load_images('cifar10', tmp_path).train.attributes.copy()
    cache = only((tmp_path / '.cache').glob('*.npy'))
    np.save(cache, np.full((120, 3073), 200, np.uint8))
    assert (load_images('cifar10', tmp_path).train.attributes == first).all()


# ---------------------------------------------------------------------------------------- tables

ROWS = np.random.default_rng(0).normal(size=(60, 2))


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


def add_a_large_chunk(file):
    """Put 60 rows into one chunk of a million numbers, compressed twice."""
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_chunk((1000, 1000))
    options.set_deflate(9)
    options.set_deflate(9)
    space = h5py.h5s.create_simple((60, 2), (h5py.h5s.UNLIMITED,) * 2)
    data = h5py.h5d.create(file.id, b'x', h5py.h5t.NATIVE_DOUBLE, space, options)
    data.write(h5py.h5s.ALL, h5py.h5s.ALL, ROWS)


def add_columns_of_one_name(file):
    file.create_dataset('x', data=ROWS).attrs['columns'] = ['a', 'a']


def add_columns_with_escapes(file):
    file.create_dataset('x', data=ROWS).attrs['columns'] = ['\33[31m', 'a']


@pytest.mark.parametrize(
    'write',
    [
        add_external_link,
        add_virtual_data,
        add_dangling_links,
        add_data_of_another_file,
        add_references,
        add_text,
        add_empty,
        add_complex_numbers,
        add_compressed_zeros,
        add_a_large_chunk,
        add_columns_of_one_name,
        add_columns_with_escapes,
    ],
)
def test_h5_that_is_no_table_or_leads_elsewhere(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_h5(tmp_path / 'other.h5', lambda file: file.update({'x': ROWS}))
    (tmp_path / 'rows.bin').write_bytes(ROWS.tobytes())
    write_h5(tmp_path / 'bad.h5', write)
    assert 'bad.h5' in refusal(tabular.load_table, str(tmp_path / 'bad.h5'))


@pytest.mark.parametrize(
    'content',
    [
        npz_file(ROWS),
        b'PK\x03\x04rubbish',
        npy_file(np.array([[{}, 1]] * 60)),
        npy_file(ROWS.astype([('a', 'f8')])),
        npy_file(ROWS[None]),
        npy_file(ROWS * 1j),
        npy_file(ROWS > 0),
        npy_header('(' * 9000),
        npy_header_of('O', (60, 2)) + bytes(960),
        pickle.dumps(Call(os.mkdir, 'canary')),
        npy_header_of('<f8', (2**62, 4)),
    ],
)
def test_npy_that_is_no_table(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('bad.npy').write_bytes(content)
    assert 'bad.npy' in refusal(tabular.load_table, 'bad.npy')
    assert not Path('canary').exists()


def csv_file(header: str, rows: Iterable = ROWS) -> bytes:
    """Return a .csv file."""
    lines = [header, *[','.join(map(str, row)) for row in rows]]
    return '\n'.join(lines).encode() + b'\n'


@pytest.mark.parametrize(
    'content',
    [
        csv_file('\33[31ma,b'),
        csv_file('"a\nb",c'),
        csv_file('a\0,b'),
        csv_file(f'{"n" * 200_000},b'),
        csv_file('a,"b'),
        csv_file('a'.encode('utf-16').decode('latin1')),
        csv_file(',b'),
        csv_file('a,b') + b'\xff\xfe,1\n',
        csv_file('a,b').replace(b',', b'\0,'),
        csv_file('a,b') + b'1,"2\n',
        csv_file('a,b') + b'1,2,3\n',
        csv_file('a,b') + b'9' * 400 + b',1\n',
        csv_file('a,b', np.full((60, 2), '1e400')),
        csv_file('a,b', [(1.5, 2)] * 300_000 + [('x', 'y')]),
        csv_file('a', ROWS),
        csv_file('a,b', ROWS[:, [0, 1, 1]]),
        b'a,b\n' + b'1' * 10**7,
        b','.join([b'1.5'] * 10**6) + b'\n',
    ],
)
def test_csv_that_is_no_table(content, tmp_path, recwarn):
    (tmp_path / 'bad.csv').write_bytes(content)
    assert 'bad.csv' in refusal(tabular.load_table, str(tmp_path / 'bad.csv'))
    assert not [str(warning.message) for warning in recwarn.list]


@pytest.fixture(scope='module')
def odd_columns(tmp_path_factory):
    """The best.pt of a model of a table whose columns have odd names."""
    folder = tmp_path_factory.mktemp('odd')
    rows = np.random.default_rng(0).normal(size=(200, len(NAMES)))
    pd.DataFrame(rows, columns=NAMES).to_csv(folder / 'odd.csv', index=False)
    words = ['--n_flows=2', '--hidden_dim=2', '--n_epochs=1', f'--output_dir={folder}']
    bnaf.main(['--train', f'--dataset={folder}/odd.csv', *words])
    return only(folder.rglob('best.pt'))


@pytest.mark.slow
def test_odd_names_of_columns(odd_columns, capsys):
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


@pytest.mark.parametrize('option', ['scores', 'output'])
def test_where_no_file_can_go(option, odd_columns, tmp_path, capsys):
    """This is said before anything is computed."""
    mode = {'scores': '--evaluate', 'output': '--generate'}[option]
    (tmp_path / 'folder.csv').mkdir()
    for file, part in (
        (tmp_path / 'folder.csv', 'is a folder'),
        (tmp_path / 'none' / 'x.csv', 'there is no folder'),
        (odd_columns / 'x.csv', 'there is no folder'),
    ):
        words = [mode, f'--{option}={file}', f'--restore_file={odd_columns}']
        assert part in refused('bnaf', capsys, *words)
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['folder.csv']


# ------------------------------------------------------------------------- files that are not read


@pytest.mark.parametrize('script', SCRIPTS)
def test_results_and_events_are_never_read(script, checkpoints, tmp_path):
    for name in ('results.json', 'events.out.tfevents.1.x', '.lock'):
        (tmp_path / name).write_bytes(b'\xff' * 100)
    shutil.copy(checkpoints[script], tmp_path)
    for mode in MODES:
        words = [mode, f'--restore_file={tmp_path}/checkpoint.pt']
        if mode == '--train':
            words.append('--n_epochs=3')
        SCRIPTS[script].main(words)
