"""Checkpoints from strangers: each loads as what it is or is refused in one line.

None of them runs code, and none takes more memory than its size justifies.
"""

import io
import math
import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import only
from hostile import (
    MODES,
    SCRIPTS,
    SPECIAL_FILES,
    Call,
    call_guarded,
    errors_of_command,
    needs_posix,
    refusal,
    refused,
    repeated_list,
    replace_by_special,
)
from torch import Tensor

import bnaf
import glow
from common.errors import UserError
from datasets import images

# Some of the hostile files are made by ways that libraries warn about.
pytestmark = pytest.mark.filterwarnings('ignore:.*deprecated|.*prototype|invalid escape')

# Returns the entries of a checkpoint that are replaced by others, given its content
Change = Callable[[dict[str, Any]], dict[str, Any]]


# --------------------------------------------------------------------------------------- helpers


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
    return repeated_list(10, 40)


def circular_list() -> list:
    """Return a list that contains itself."""
    value: list = []
    value.append(value)
    return value


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory, trained_glow):
    """The path of a tiny checkpoint of each script, by the script's name."""
    folder = tmp_path_factory.mktemp('trained')
    rows = np.random.default_rng(0).normal(size=(90, 2))
    pd.DataFrame(rows, columns=['a', 'b']).to_csv(folder / 'rows.csv', index=False)
    words = ['--n_flows=2', '--hidden_dim=3', '--n_epochs=2']
    bnaf.main(['--train', f'--dataset={folder}/rows.csv', *words, f'--output_dir={folder}'])
    bnaf_path = only(folder.glob('bnaf_*/checkpoint.pt'))
    return {'glow': trained_glow.with_name('checkpoint.pt'), 'bnaf': bnaf_path}


def save_changed(saved: dict[str, Any], change: dict[str, Any], file: Path) -> Path:
    """Save a checkpoint some of whose entries are replaced; return the file."""
    torch.save({**saved, **change}, file)
    return file


# -------------------------------------------------------------------------------- damaged bytes


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
def test_archives_that_are_no_checkpoints(name, checkpoints, tmp_path):
    members = read_zip(checkpoints['glow'])
    root = only({name.split('/')[0] for name in members})
    (tmp_path / 'bad.pt').write_bytes(BAD_ARCHIVES[name](members, root))
    message = refusal(glow.load_checkpoint, tmp_path / 'bad.pt')
    assert 'cannot be read as a checkpoint' in message


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


# ------------------------------------------------------------------------------- hostile values


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


# What stands in place of a weight and must not be taken for it
BAD_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    'sparse': lambda weight: weight.to_sparse(),
    'complex': lambda weight: weight.cfloat(),
    'float64': lambda weight: weight.double(),
    'half': lambda weight: weight.half(),
    'meta': lambda weight: weight.to('meta'),
    'nested': lambda weight: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    'expanded': lambda weight: torch.zeros(()).expand(weight.shape),
    'part': lambda weight: torch.zeros(10**6)[: weight.numel()].view(weight.shape),
    'huge': lambda weight: strided((10**6, 10**6), (0, 0)),
    'overflow': lambda weight: strided((2**32, 2**32), (0, 0)),
    'outside': lambda weight: strided((10**9,), (1,)),
    'before': lambda weight: strided((1,), (1,), -(10**6)),
    'after': lambda weight: strided((1,), (1,), 10**6),
    'backward': lambda weight: strided((2, 1), (-1, 1), 1),
    'many_dims': lambda weight: strided((1,) * 100, (0,) * 100),
    'negative': lambda weight: strided((-1,), (1,)),
    'uneven': lambda weight: strided((1,), ()),
    'text_size': lambda weight: strided('a', 'b'),
    'negated': lambda weight: strided((1,), (1,), 0, {'neg': True}),
    'parameter': lambda weight: torch.nn.Parameter(weight),
    'nan': lambda weight: weight * math.nan,
    'inf': lambda weight: weight.abs() / 0,
    'shape': lambda weight: weight[None],
    'empty': lambda weight: weight[:0],
    'list': lambda weight: weight.tolist(),
    'none': lambda weight: None,
    'text': lambda weight: 'x',
    'bytes': lambda weight: bytearray(4),
    'storage': lambda weight: weight.storage(),
}


@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize('part', ['model', 'average', 'optimizer'])
@pytest.mark.parametrize('name', BAD_TENSORS)
def test_bad_tensors_in_place_of_weights(name, part, script, checkpoints, tmp_path):
    saved, file = torch.load(checkpoints[script]), tmp_path / 'bad.pt'
    values = saved[part]
    if part == 'optimizer':
        states = values['state'].values()
        values = max(states, key=lambda state: state['exp_avg'].numel())
    key = max(values, key=lambda key: values[key].numel())
    values[key] = BAD_TENSORS[name](values[key])
    torch.save(saved, file)
    assert str(file) in refusal(SCRIPTS[script].load_checkpoint, file)


BAD_OPTIONS: dict[str, tuple[Any, Any]] = {
    'a data set of escapes': ('dataset', '\33[2J'),
    'a data set of two lines': ('dataset', 'a\nb'),
    'a data set that is a number': ('dataset', 3),
    'a folder written backwards': ('data_dir', '\u202e'),
    'a folder of nothing': ('data_dir', None),
    'a folder of half a character': ('data_dir', '\udc80'),
    'a negative seed': ('seed', -1),
    'a seed of 64 bits': ('seed', 2**63),
    'a seed that is true': ('seed', True),
    'a huge batch': ('batch_size', 2**40),
    'a batch of nothing': ('batch_size', 0),
    'epochs of 400 digits': ('n_epochs', 10**400),
    'a learning rate of NaN': ('lr', math.nan),
    'a learning rate that is an integer': ('lr', 1),
    'a decay that is a tensor': ('ema_decay', torch.tensor(0.5)),
    'a switch that is text': ('checkpoint_grads', 'yes'),
    'a folder that is a list': ('data_dir', ['a']),
    'an unknown option': ('more', 1),
    'an option without a name': (3, 4),
}
BAD_CONFIGS: dict[str, Callable[[dict], Any]] = {
    'empty': lambda config: {},
    'a list': lambda config: [1],
    'a deep list': lambda config: deep_list(),
    'with attributes': lambda config: Shadowed(config, keys=None, items=3),
}
BAD_INPUT_DIMS: dict[str, Any] = {
    'none': [],
    'negative': [-1],
    'a large one': [2**16],
    'two': [2, 2],
    'text': ['a'],
    'true': [True],
    'a tuple': (2,),
    'a deep list': deep_list(),
    'a number': 2,
    'three of an image': [1, 8, 16],
    'not square': [1, 8, 16, 0],
    'many conditions': [1, 8, 8, 2**16],
    'a huge image': [1, 2**15, 2**15, 0],
    'overflowing': [10**9] * 3,
    'many': [2**16 - 1] * 300_000,
}
BAD_COUNTS: dict[str, Any] = {
    'negative': -1,
    'of 70 bits': 2**70,
    'of 400 digits': 10**400,
    'a half': 0.5,
    'true': True,
    'text': '1',
    'none': None,
    'a list': [1],
    'a tensor': torch.tensor(1),
}
BAD_PARTS: dict[str, Any] = {
    'none': None,
    'a number': 3,
    'a list': [],
    'a deep list': deep_list(),
    'a circular list': circular_list(),
    'a number by name': {'x': 1},
    'a tensor by number': {1: torch.zeros(1)},
    'empty': {},
}
# By the name of an entry: values that are not of its type, or out of bounds
BAD_VALUES: dict[str, dict[str, Any]] = {
    'input_dims': BAD_INPUT_DIMS,
    'format': {
        'of a million letters': 'A' * 10**6,
        'a tensor': torch.tensor(1),
        'true': True,
        'none': None,
        'a list': [1],
    },
    'step': BAD_COUNTS,
    'world_size': {**BAD_COUNTS, '0': 0},
    'first_world_size': {**BAD_COUNTS, '0': 0},
    'best': {
        'an integer': 1,
        'none': None,
        'text': '1',
        'a tensor': torch.tensor(1.0),
        'NaN': math.nan,
        'minus infinity': -math.inf,
    },
    'model': BAD_PARTS,
    'average': BAD_PARTS,
    'optimizer': BAD_PARTS,
    'script': BAD_PARTS,
}
BAD_ADAM_OPTIONS: dict[str, dict[str, Any]] = {
    'a rate of text': {'lr': 'x'},
    'a rate of NaN': {'lr': math.nan},
    'a negative rate': {'lr': -1.0},
    'a rate that is a tensor': {'lr': torch.ones(1)},
    'large betas': {'betas': (2, 3)},
    'a list of betas': {'betas': [0.9, 0.999]},
    'betas of text': {'betas': 'x'},
    'betas of tensors': {'betas': (torch.ones(2), 0.9)},
    'an eps that is a tensor': {'eps': torch.ones(2)},
    'an infinite eps': {'eps': math.inf},
    'a decay of text': {'weight_decay': '0'},
    'foreach': {'foreach': True},
    'capturable': {'capturable': True},
    'fused': {'fused': None},
    'differentiable': {'differentiable': True},
    'maximize': {'maximize': True},
    'one parameter': {'params': [0]},
    'parameters of a deep list': {'params': deep_list()},
}
# Given the group of parameters that a whole optimizer has
BAD_ADAM_GROUPS: dict[str, Callable[[dict], Any]] = {
    'parameters of high numbers': lambda group: [{**group, 'params': [10**6] * len_of(group)}],
    'parameters of tensors': lambda group: [{**group, 'params': [torch.ones(2)] * len_of(group)}],
    'without params': lambda group: [without(group, 'params')],
    'without lr': lambda group: [without(group, 'lr')],
    'without betas': lambda group: [without(group, 'betas')],
    'without eps': lambda group: [without(group, 'eps')],
    'without weight_decay': lambda group: [without(group, 'weight_decay')],
    'no groups': lambda group: [],
    'two groups': lambda group: [group, group],
    'a group that is a number': lambda group: [3],
    'groups of nothing': lambda group: None,
    'a group for a list': lambda group: group,
    'groups of a deep list': lambda group: deep_list(),
    'a tuple of groups': lambda group: (group,),
}
# Given the index of a parameter and its state
BAD_ADAM_STATES: dict[str, Callable[[int, dict], dict]] = {
    'empty': lambda i, state: {i: {}},
    'a number': lambda i, state: {i: 3},
    'a negative index': lambda i, state: {-1: state},
    'a text as an index': lambda i, state: {'a': state},
    'one entry more': lambda i, state: {i: {**state, 'more': torch.zeros(1)}},
    'two steps': lambda i, state: {i: {**state, 'step': torch.zeros(2)}},
    'an average of no dimensions': lambda i, state: {i: {**state, 'exp_avg': torch.zeros(())}},
    'an average of a deep list': lambda i, state: {i: {**state, 'exp_avg_sq': deep_list()}},
}
BAD_ADAMS: dict[str, dict[str, Any]] = {
    'no state': {'state': None},
    'a list of states': {'state': []},
    'one entry more': {'more': 1},
}


def without(entries: dict, name: str) -> dict:
    """Return entries but one."""
    return {other: value for other, value in entries.items() if other != name}


def len_of(group: dict) -> int:
    """Return the number of parameters of a group of an optimizer."""
    return len(group['params'])


def set_entry(name: str, value: Any) -> Change:
    """Return a change of an entry, whatever it was."""
    return lambda saved: {name: value}


def set_option(name: Any, value: Any) -> Change:
    """Return a change of an option in the config."""
    return lambda saved: {'config': {**saved['config'], name: value}}


def change_config(function: Callable[[dict], Any]) -> Change:
    """Return a change of the config by a function of it."""
    return lambda saved: {'config': function(saved['config'])}


def add_tensor(part: str) -> Change:
    """Return a change that adds a tensor to a part of the checkpoint."""
    return lambda saved: {part: {**saved[part], '\33[31m': torch.zeros(1)}}


def change_adam(change: dict[str, Any]) -> Change:
    """Return a change of some entries of the optimizer."""
    return lambda saved: {'optimizer': {**saved['optimizer'], **change}}


def change_adam_groups(function: Callable[[dict], Any]) -> Change:
    """Return a change of the optimizer's groups, by a function of its only one."""

    def change(saved: dict[str, Any]) -> dict[str, Any]:
        groups = function(saved['optimizer']['param_groups'][0])
        return {'optimizer': {**saved['optimizer'], 'param_groups': groups}}

    return change


def change_adam_option(option: dict[str, Any]) -> Change:
    """Return a change of an option in the optimizer's group."""
    return change_adam_groups(lambda group: [{**group, **option}])


def change_adam_state(function: Callable[[int, dict], dict]) -> Change:
    """Return a change of the optimizer's state of its largest parameter."""

    def change(saved: dict[str, Any]) -> dict[str, Any]:
        state = saved['optimizer']['state']
        i = max(state, key=lambda i: state[i]['exp_avg'].numel())
        return {'optimizer': {**saved['optimizer'], 'state': {**state, **function(i, state[i])}}}

    return change


def bad_entries() -> dict[str, Change]:
    """Return by name all changes of a checkpoint after which it must not be loaded."""
    changes: dict[str, Change] = {}
    for name, (option, value) in BAD_OPTIONS.items():
        changes[f'config: {name}'] = set_option(option, value)
    for name, function in BAD_CONFIGS.items():
        changes[f'config: {name}'] = change_config(function)
    for entry, values in BAD_VALUES.items():
        for name, value in values.items():
            changes[f'{entry}: {name}'] = set_entry(entry, value)
    for part in ('model', 'average', 'optimizer'):
        changes[f'{part}: one tensor more'] = add_tensor(part)
    for name, option in BAD_ADAM_OPTIONS.items():
        changes[f'adam: {name}'] = change_adam_option(option)
    for name, function in BAD_ADAM_GROUPS.items():
        changes[f'adam: {name}'] = change_adam_groups(function)
    for name, state in BAD_ADAM_STATES.items():
        changes[f'state of adam: {name}'] = change_adam_state(state)
    for name, entries in BAD_ADAMS.items():
        changes[f'adam: {name}'] = change_adam(entries)
    return changes


BAD_ENTRIES = bad_entries()


@pytest.mark.slow
@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize('name', BAD_ENTRIES)
def test_bad_entries(name, script, checkpoints, tmp_path):
    saved = torch.load(checkpoints[script])
    file = save_changed(saved, BAD_ENTRIES[name](saved), tmp_path / 'bad.pt')
    assert str(file) in refusal(SCRIPTS[script].load_checkpoint, file)


@pytest.mark.parametrize('script', SCRIPTS)
def test_missing_entries(script, checkpoints, tmp_path):
    saved, file = torch.load(checkpoints[script]), tmp_path / 'bad.pt'
    for name in saved.keys() - SCRIPTS[script].CHECKPOINT.defaults.keys():
        torch.save(without(saved, name), file)
        assert str(file) in refusal(SCRIPTS[script].load_checkpoint, file)


# Entries and options of a checkpoint of format 1 that cannot be upgraded
ODD_CONTENT_OF_FORMAT_1: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'a batch of text': ({'step': 10**15}, {'batch_size': 'a'}),
    'a large step, a batch of text': ({'step': 10**25}, {'batch_size': 'a' * 1000}),
    'a huge step, a batch of halves': ({'step': 2**2000}, {'batch_size': 1.5}),
    'a huge number of processes': ({'world_size': 2**2000}, {}),
    'a huge batch': ({}, {'batch_size': 2**2000}),
    'tensors': ({'step': torch.ones(2), 'world_size': torch.ones(3)}, {}),
    'no process': ({'world_size': 0}, {}),
    'a list of options': ({'config': []}, {}),
}


def load_format_1(script: str) -> dict[str, Any]:
    """Return the content of a checkpoint of the first format."""
    return torch.load(Path(__file__).parent / 'checkpoints' / f'{script}_1.pt')


@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize('name', ODD_CONTENT_OF_FORMAT_1)
def test_odd_content_is_not_upgraded(name, script, tmp_path):
    saved = load_format_1(script)
    entries, options = ODD_CONTENT_OF_FORMAT_1[name]
    change = {'config': {**saved['config'], **options}, **entries}
    file = save_changed(saved, change, tmp_path / 'bad.pt')
    assert 'another version' in refusal(SCRIPTS[script].load_checkpoint, file)


@pytest.mark.parametrize('script', SCRIPTS)
def test_missing_entries_of_format_1(script, tmp_path):
    saved, file = load_format_1(script), tmp_path / 'bad.pt'
    for name in saved.keys() - {'script', 'format'}:
        torch.save(without(saved, name), file)
        assert 'another version' in refusal(SCRIPTS[script].load_checkpoint, file)


LARGEST_GLOW = {'n_levels': 9, 'depth': 2**10, 'width': 2**14, 'image_size': 2**10}
LARGEST_BNAF = {'n_flows': 2**8, 'n_hidden': 2**6, 'hidden_dim': 2**12}
# By name: the script, options of a large model, and the shape of its input, if it is another one
LARGE_MODELS: dict[str, tuple[str, dict[str, Any], list[int] | None]] = {
    'the largest glow': ('glow', LARGEST_GLOW, [1, 2**10, 2**10, 0]),
    'a deep glow': ('glow', {'depth': 2**10}, None),
    'a wide glow': ('glow', {'width': 10**9}, None),
    'the largest bnaf of 2 columns': ('bnaf', LARGEST_BNAF, [2]),
    'the largest bnaf of 200 columns': ('bnaf', LARGEST_BNAF, [200]),
    'the largest bnaf': ('bnaf', LARGEST_BNAF, [2**16 - 1]),
}


@pytest.mark.parametrize('name', LARGE_MODELS)
def test_models_too_large_for_their_weights(name, checkpoints, tmp_path):
    script, options, dims = LARGE_MODELS[name]
    saved = torch.load(checkpoints[script])
    config = {**saved['config'], **options}
    change = {'config': config, 'input_dims': dims or saved['input_dims']}
    file = save_changed(saved, change, tmp_path / 'bad.pt')
    assert 'damaged' in refusal(SCRIPTS[script].load_checkpoint, file)


# What runs code, takes much memory, or is no tensor, when it is loaded by pickle. The functions
# take a folder that the code would make, and a pickle that does the same.
PAYLOADS: dict[str, Callable[[Path, Path], Any]] = {
    'os.mkdir': lambda canary, other: Call(os.mkdir, str(canary)),
    'eval': lambda canary, other: Call(eval, f'__import__("os").mkdir({str(canary)!r})'),
    'torch.load': lambda canary, other: Call(torch.load, str(other), 'cpu'),
    'rebuild from type': lambda canary, other: Call(
        torch._tensor._rebuild_from_type_v2, os.mkdir, str, (str(canary),), {}
    ),
    'rebuild parameter': lambda canary, other: Call(
        torch._utils._rebuild_parameter, Call(os.mkdir, str(canary)), False, OrderedDict()
    ),
    'parameter': lambda canary, other: Call(torch.nn.Parameter, Call(os.mkdir, str(canary))),
    'large tensor': lambda canary, other: Call(torch.Tensor, 10**5, 10**5),
    'large bytes': lambda canary, other: Call(bytearray, 10**11),
    'large storage': lambda canary, other: Call(torch.UntypedStorage, 10**12),
    'large empty tensor': lambda canary, other: Call(torch.empty, 10**11),
    'set': lambda canary, other: Call(set, [1]),
    'complex': lambda canary, other: Call(complex, 1),
    'device': lambda canary, other: Call(torch.device, 'cpu'),
    'hub': lambda canary, other: Call(torch.hub.load, str(other.parent), 'x'),
    'rebuild meta': lambda canary, other: Call(
        torch._utils._rebuild_meta_tensor_no_storage,
        torch.float32,
        (10**9, 10**9),
        (1, 1),
        False,
    ),
    'array': lambda canary, other: np.zeros(3),
    'size': lambda canary, other: torch.Size([1]),
    'module': lambda canary, other: torch.nn.Linear(1, 1),
    'path': lambda canary, other: Path('/'),
}


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


@pytest.mark.parametrize('name', PAYLOADS)
def test_no_payload_runs(name, checkpoints, tmp_path):
    canary, other, file = tmp_path / 'canary', tmp_path / 'other.pt', tmp_path / 'bad.pt'
    saved = torch.load(checkpoints['glow'])
    other.write_bytes(pickle.dumps(Call(os.mkdir, str(canary))))
    for change in entries_with(PAYLOADS[name](canary, other), saved):
        save_changed(saved, change, file)
        assert 'holds more than tensors' in refusal(glow.load_checkpoint, file)
    assert not canary.exists()


@pytest.mark.parametrize('mode', [*MODES, '--resume'])
def test_no_command_runs_a_payload(mode, checkpoints, tmp_path):
    file, canary = tmp_path / 'runs' / 'glow_x' / 'checkpoint.pt', tmp_path / 'canary'
    file.parent.mkdir(parents=True)
    save_changed(torch.load(checkpoints['glow']), {'more': Call(os.mkdir, str(canary))}, file)
    words = [mode, f'--restore_file={file}']
    if mode == '--resume':
        words = ['--train', '--resume', f'--output_dir={tmp_path}/runs']
    assert 'holds more than tensors' in refused('glow', *words)
    assert not canary.exists()
    assert [path.name for path in tmp_path.iterdir()] == ['runs']


BAD_SCHEDULERS: dict[str, dict[str, Any]] = {
    'a step': {'step': None},
    'an optimizer': {'optimizer': None},
    'least rates': {'min_lrs': []},
    'least rates of text': {'min_lrs': 'x'},
    'a factor': {'factor': 7.0},
    'a best score of text': {'best': 'x'},
    'a best score of NaN': {'best': math.nan},
    'a best score of minus infinity': {'best': -math.inf},
    'patience': {'patience': 10**9},
    'one entry more': {'more': 1},
    'bad epochs of nothing': {'num_bad_epochs': None},
    'negative bad epochs': {'num_bad_epochs': -1},
    'bad epochs of NaN': {'num_bad_epochs': math.nan},
    'infinite bad epochs': {'num_bad_epochs': math.inf},
    'an infinite cooldown': {'cooldown_counter': math.inf},
    'a mode of a deep list': {'mode': deep_list()},
}
BAD_UNITS: dict[str, dict[str, Any]] = {
    'means of NaN': {'mean': [math.nan] * 2},
    'a deviation of 0': {'std': [0.0, 1.0]},
    'infinite deviations': {'std': [math.inf] * 2},
    'infinite steps': {'steps': [-math.inf] * 2},
    'columns with escapes': {'columns': ['\33[31m', 'b']},
    'one column': {'columns': ['a']},
    'other columns': {'columns': ['c', 'd']},
    'means that are integers': {'mean': [1, 2]},
    'one entry more': {'more': []},
    'means of a deep list': {'mean': deep_list()},
    'one feature': {'features': ['x1']},
    'a feature twice': {'features': ['x1', 'x2', 'x2']},
    'a feature with escapes': {'features': ['x1', 'x2', '\33[31m']},
    'a condition that the model lacks': {
        'conditions': [{'name': 'c', 'mean': 0.0, 'std': 1.0, 'categories': []}]
    },
    'a condition that is only a name': {'conditions': [{'name': 'c'}]},
    'conditions of a deep list': {'conditions': deep_list()},
    'quantiles of one column': {'quantiles': [[0.0] * 21]},
    'too few quantiles': {'quantiles': [[0.0] * 20] * 2},
    'quantiles of NaN': {'quantiles': [[math.nan] * 21] * 2},
    'quantiles that decrease': {'quantiles': [[1.0] + [0.0] * 20] * 2},
    'the range of one column': {'ranges': [[-1.0, 1.0]]},
    'ranges that decrease': {'ranges': [[1.0, -1.0]] * 2},
    'infinite ranges': {'ranges': [[-1.0, math.inf]] * 2},
}
BAD_BNAF_NUMBERS: dict[str, dict[str, Any]] = {
    'scheduler of a number': {'scheduler': 3},
    'annealing of NaN': {'n_annealing': math.nan},
    'infinite annealing': {'n_annealing': math.inf},
    'annealing of minus infinity': {'n_annealing': -math.inf},
}


def bad_bnafs() -> dict[str, Change]:
    """Return by name changes of a checkpoint of BNAF that every mode has to refuse."""
    changes: dict[str, Change] = {}
    for name, change in BAD_BNAF_NUMBERS.items():
        changes[name] = lambda saved, change=change: change
    for part, table in (('scheduler', BAD_SCHEDULERS), ('units', BAD_UNITS)):
        for name, change in table.items():
            changes[f'{part}: {name}'] = change_dict(part, change)
    return changes


def change_dict(part: str, change: dict[str, Any]) -> Change:
    """Return a change of some entries of a part of the checkpoint."""
    return lambda saved: {part: {**saved[part], **change}}


BAD_BNAFS = bad_bnafs()


@pytest.mark.parametrize('mode', ['--train', '--evaluate'])
@pytest.mark.parametrize('name', BAD_BNAFS)
def test_scheduler_and_units_are_checked(name, mode, checkpoints, tmp_path):
    saved = torch.load(checkpoints['bnaf'])
    file = save_changed(saved, BAD_BNAFS[name](saved), tmp_path / 'checkpoint.pt')
    content = file.read_bytes()
    words = ['--n_epochs=3'] if mode == '--train' else []  # it would be over otherwise
    assert 'checkpoint.pt' in refused('bnaf', mode, f'--restore_file={file}', *words)
    assert file.read_bytes() == content
    assert {path.name for path in tmp_path.iterdir()} <= {'checkpoint.pt', '.lock'}


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_score_of_nan_is_none_of_a_best_one(script, checkpoints, tmp_path):
    """A run has a score that is not finite before its first validation alone."""
    saved, file = torch.load(checkpoints[script]), tmp_path / 'checkpoint.pt'
    assert math.isfinite(saved['best'])
    save_changed(saved, {'validation_loss': math.nan}, file)
    assert str(file) in refusal(SCRIPTS[script].load_checkpoint, file)

    change = {'validation_loss': math.nan, 'best': math.inf}
    if script == 'bnaf':
        change['scheduler'] = {**saved['scheduler'], 'best': math.inf}
    loaded = SCRIPTS[script].load_checkpoint(save_changed(saved, change, file))
    assert loaded['best'] == math.inf


BAD_COLUMN_OPTIONS: dict[str, Any] = {
    'text': 'a',
    'escapes': ['\33[31m'],
    'numbers': [3],
    'lists': [['a']],
    'a dict': {'a': 1},
    'a deep list': deep_list(),
}


@pytest.mark.parametrize('option', ['columns', 'drop', 'condition'])
@pytest.mark.parametrize('name', BAD_COLUMN_OPTIONS)
def test_options_that_are_lists_are_checked(name, option, checkpoints, tmp_path):
    saved = torch.load(checkpoints['bnaf'])
    change = set_option(option, BAD_COLUMN_OPTIONS[name])(saved)
    file = save_changed(saved, change, tmp_path / 'bad.pt')
    assert 'bad.pt' in refusal(bnaf.load_checkpoint, file)

    save_changed(saved, set_option(option, ['x1'])(saved), file)
    assert getattr(bnaf.load_checkpoint(file)['config'], option) == ['x1']


@pytest.fixture(scope='module')
def conditional(tmp_path_factory):
    """The best.pt of a model of a table's column a, given its column c."""
    folder, rng = tmp_path_factory.mktemp('conditional'), np.random.default_rng(0)
    columns = {'a': rng.normal(size=50), 'c': rng.choice(['p', 'q'], 50)}
    pd.DataFrame(columns).to_csv(folder / 'my.csv', index=False)
    words = ['--condition=c', '--n_flows=1', '--hidden_dim=2', '--n_epochs=1']
    bnaf.main(['--train', f'--dataset={folder}/my.csv', *words, f'--output_dir={folder}'])
    return only(folder.glob('bnaf_*/best.pt'))


BAD_CONDITIONS: dict[str, dict[str, Any]] = {
    'one category': {'categories': ['p']},
    'three categories': {'categories': ['p', 'q', 'r']},
    'a category twice': {'categories': ['p', 'p']},
    'a category with escapes': {'categories': ['p', '\33[31m']},
    'another column': {'name': 'd'},
    'the column itself': {'name': 'a'},
    'a deviation of 0': {'std': 0.0},
    'an infinite mean': {'mean': math.inf},
}


@pytest.mark.parametrize('mode', ['--evaluate', '--generate'])
@pytest.mark.parametrize('name', BAD_CONDITIONS)
def test_conditions_of_another_width_than_the_models(name, mode, conditional, tmp_path):
    """Damage of the units of a conditional model is refused by every mode."""
    saved = torch.load(conditional)
    (condition,) = saved['units']['conditions']
    units = {**saved['units'], 'conditions': [{**condition, **BAD_CONDITIONS[name]}]}
    file = save_changed(saved, {'units': units}, tmp_path / 'bad.pt')
    assert 'damaged' in refused('bnaf', mode, f'--restore_file={file}')


def test_weights_without_an_inverse(checkpoints, tmp_path):
    saved = torch.load(checkpoints['glow'])
    for key, value in saved['average'].items():
        if key.endswith('.p'):
            value.zero_()
    torch.save(saved, tmp_path / 'bad.pt')
    assert 'singular' in refused('glow', '--generate', f'--restore_file={tmp_path}/bad.pt')
    assert [path.name for path in tmp_path.iterdir()] == ['bad.pt']


# -------------------------------------------------------------------- models larger than their file


def colour_checkpoint(saved: dict[str, Any], size: int) -> dict[str, Any]:
    """Return a checkpoint of a model of colour images that has small weights, whatever its size."""
    config = {**saved['config'], 'dataset': 'faces', 'image_size': size}
    dims = [3, size, size, 0]
    model = glow.build_model(glow.Config(**config), dims)
    adam = glow.build_optimizer(glow.Config(**config), model.parameters())
    return {
        **saved,
        'config': config,
        'input_dims': dims,
        'model': model.state_dict(),
        'average': torch.optim.swa_utils.AveragedModel(model).state_dict(),
        'optimizer': adam.state_dict(),
    }


def test_images_too_large_for_a_small_file(checkpoints, tmp_path):
    """The weights of Glow do not depend on the size of its images, the memory of samples does."""
    file = tmp_path / 'large.pt'
    torch.save(colour_checkpoint(torch.load(checkpoints['glow']), 2048), file)
    assert file.stat().st_size < 100_000
    assert 'large.pt' in refused('glow', '--generate', f'--restore_file={file}')
    assert [path.name for path in tmp_path.iterdir()] == ['large.pt']


def test_names_that_no_h5_can_hold(checkpoints, tmp_path, monkeypatch):
    """HDF5 keeps the names of columns in at most 64 KB. This is said before anything is drawn."""

    def fail(*args: Any) -> None:
        raise AssertionError('rows were drawn')

    names = [f'column {k}' for k in range(5000)]
    units = {
        'columns': names,
        'mean': [0.0] * len(names),
        'std': [1.0] * len(names),
        'steps': [0.0] * len(names),
        'levels': [[] for _ in names],
        'features': names,
        'conditions': [],
        'quantiles': [[] for _ in names],
        'ranges': [[] for _ in names],
    }
    wide = bnaf.table_from_units(units, len(names), 0, 'wide.pt')
    monkeypatch.setattr(bnaf, 'load_run_table', lambda *args, **options: wide)
    monkeypatch.setattr(bnaf, 'sample_rows', fail)
    words = [f'--restore_file={checkpoints["bnaf"]}', f'--output={tmp_path}/x.h5']
    assert 'x.h5' in refused('bnaf', '--generate', *words)
    assert not (tmp_path / 'x.h5').exists()


# ----------------------------------------------------------- names and folders that a file brings


FOREIGN_FOLDERS = {'one that is not there': False, 'one that is there': True}


@pytest.fixture
def quick_faces(monkeypatch):
    """Faces are blank, instead of drawn."""
    monkeypatch.setattr(
        images, 'draw_faces', lambda n, size, seed: np.zeros((n, 3, size, size), np.uint8)
    )


@pytest.mark.parametrize('mode', MODES[:-1])
@pytest.mark.parametrize('name', FOREIGN_FOLDERS)
def test_a_checkpoint_makes_no_folders(name, mode, checkpoints, tmp_path, monkeypatch, quick_faces):
    """The folder of the data is that of whoever trained the model, and is left as it is."""
    monkeypatch.chdir(tmp_path)
    foreign = tmp_path / 'foreign' / 'new'
    if FOREIGN_FOLDERS[name]:
        foreign.mkdir(parents=True)
    saved = colour_checkpoint(torch.load(checkpoints['glow']), 16)
    saved['config']['data_dir'] = str(foreign)
    torch.save(saved, 'checkpoint.pt')

    before = set(tmp_path.glob('foreign/**/*'))
    # whether blank faces can be edited is not the question
    call_guarded(run_or_refuse, 'glow', mode, '--restore_file=checkpoint.pt')
    assert set(tmp_path.glob('foreign/**/*')) == before
    assert foreign.parent.exists() == FOREIGN_FOLDERS[name]
    if mode != '--generate':
        assert list((tmp_path / 'data' / '.cache').glob('faces_16_*.npy'))


@pytest.mark.parametrize('mode', ['--evaluate', '--check', '--visualize'])
def test_images_of_another_shape_than_the_models(
    mode, checkpoints, tmp_path, monkeypatch, quick_faces
):
    """A model of grey images cannot be of a data set in colour."""
    monkeypatch.chdir(tmp_path)
    saved = torch.load(checkpoints['glow'])
    torch.save({**saved, 'config': {**saved['config'], 'dataset': 'faces'}}, 'bad.pt')
    refused('glow', mode, '--restore_file=bad.pt')


def run_or_refuse(script: str, *words: str) -> None:
    """Run a command, which may end in one line."""
    try:
        SCRIPTS[script].main(list(words))
    except SystemExit as stop:
        assert stop.code == 2


LONG_OPTIONS: dict[str, tuple[str, dict[str, str]]] = {
    'a data set of glow': ('glow', {'dataset': 'x' * 10**6}),
    'a folder of mnist': ('glow', {'dataset': 'mnist', 'data_dir': 'x' * 10**6}),
    'a folder of photos': ('glow', {'dataset': 'folder', 'data_dir': 'x' * 10**6}),
    'a folder of long names': ('glow', {'dataset': 'folder', 'data_dir': 'x/' * (10**6 // 2)}),
    'a data set of bnaf': ('bnaf', {'dataset': 'x' * 10**6}),
    'a table': ('bnaf', {'dataset': 'x' * 10**6 + '.csv'}),
    'a table in long folders': ('bnaf', {'dataset': 'x/' * (10**6 // 2) + 'x.csv'}),
    'a folder of a published table': ('bnaf', {'dataset': 'power', 'data_dir': 'x' * 10**6}),
}


@pytest.mark.parametrize('mode', ['--evaluate', '--check'])
@pytest.mark.parametrize('name', LONG_OPTIONS)
def test_long_options_give_short_lines(name, mode, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, options = LONG_OPTIONS[name]
    saved = torch.load(checkpoints[script])
    torch.save({**saved, 'config': {**saved['config'], **options}}, 'bad.pt')
    refused(script, mode, '--restore_file=bad.pt')
    assert {path.name for path in tmp_path.iterdir()} <= {'bad.pt', 'data'}


# ------------------------------------------------------------------------- other files beside them


@needs_posix
@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize('kind', SPECIAL_FILES)
def test_a_checkpoint_is_a_file(kind, script, tmp_path):
    replace_by_special(kind, tmp_path / 'bad.pt')
    for mode in MODES:
        assert 'bad.pt' in refused(script, mode, f'--restore_file={tmp_path}/bad.pt')


OTHER_DIRECTIONS: dict[str, Any] = {
    'another shape': torch.zeros(10, 63),
    'another type': torch.zeros(10, 64).double(),
    'a dict': {'a': 1},
    'a list': [torch.zeros(10, 64)],
    'nothing': None,
    'empty': torch.zeros(0),
    'large bytes': Call(bytearray, 10**11),
    'a folder that is made': Call(os.mkdir, 'canary'),
}


def visualize_edits() -> tuple[Path, Path]:
    """Draw edits by the checkpoint in this folder; return the cached directions and the picture."""
    words = ['--visualize', '--restore_file=checkpoint.pt', '--vis_attrs=3']
    errors_of_command('glow', *words, exit_code=None)
    return only(Path().glob('attribute_directions_*.pt')), only(Path().glob('*.png'))


def make_directions_again(cache: Path, replace: Callable[[Path], Any]) -> None:
    """Fail unless cached directions are made again once something else is in their place."""
    picture = only(Path().glob('*.png'))
    directions, shown = torch.load(cache), picture.read_bytes()
    cache.unlink()
    replace(cache)
    call_guarded(visualize_edits)
    assert torch.equal(torch.load(cache), directions)
    assert picture.read_bytes() == shown
    assert not Path('canary').exists()


@pytest.mark.parametrize('name', OTHER_DIRECTIONS)
def test_hostile_attribute_directions_are_made_again(name, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(checkpoints['glow'], tmp_path)
    cache, _ = visualize_edits()
    make_directions_again(cache, lambda path: torch.save(OTHER_DIRECTIONS[name], path))


@needs_posix
@pytest.mark.parametrize('kind', SPECIAL_FILES)
def test_attribute_directions_are_a_file(kind, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(checkpoints['glow'], tmp_path)
    cache, _ = visualize_edits()
    make_directions_again(cache, SPECIAL_FILES[kind])


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
