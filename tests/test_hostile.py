"""Files of strangers: each loads as what it is or is refused in one line, and none runs code or takes more than its size."""
import io
import math
import os
import pickle
import shutil
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

import bnaf
import glow
from datasets import UserError
from datasets.runs import load_tensors
from test_glow_commands import only

pytestmark = pytest.mark.filterwarnings('ignore:.*deprecated|.*prototype|invalid escape')      # of what makes the files
SCRIPTS = {'glow': glow, 'bnaf': bnaf}
MODES = '--generate', '--evaluate', '--visualize', '--check', '--train'
MUCH = 2**28        # bytes: what a small file may not take


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """-> path of a tiny checkpoint of each script, by its name"""
    folder = tmp_path_factory.mktemp('trained')
    (folder / 'rows.csv').write_text('a,b\n' + ''.join(f'{x},{y}\n' for x, y in np.random.default_rng(0).normal(size=(90, 2))))
    glow.main(['--train', '--dataset=digits', '--depth=1', '--width=8', '--n_epochs=1', '--batch_size=512',
               f'--output_dir={folder}', f'--data_dir={folder}'])
    bnaf.main(['--train', f'--dataset={folder}/rows.csv', '--n_flows=2', '--hidden_dim=3', '--n_epochs=2',
               f'--output_dir={folder}'])
    return {name: only(folder.glob(f'{name}_*/checkpoint.pt')) for name in SCRIPTS}


class Call:
    """Pickled, a call"""
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def refusal(function, *args):
    """-> the one line in which it is refused, neither much time nor much memory being taken for it"""
    Path('/proc/self/clear_refs').write_text('5')       # the peak is counted from here
    before, start = resident('VmRSS'), time.perf_counter()
    with pytest.raises(UserError) as error:
        function(*args)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000
    assert resident('VmHWM') - before < MUCH and time.perf_counter() - start < 5
    return str(error.value)


def resident(name):
    status = dict(line.split(':') for line in Path('/proc/self/status').read_text().splitlines())
    return int(status[name].split()[0]) * 1024


def refused(script, capsys, *words):
    """Run a script here, expecting a refusal -> its one line"""
    capsys.readouterr()
    with pytest.raises(SystemExit, match='2'):
        SCRIPTS[script].main([str(word) for word in words])
    line = capsys.readouterr().err
    assert line.startswith(f'{script}.py: error: ') and line.endswith('\n') and line[:-1].isprintable(), line
    return line


def same(a, b):
    """Whether two checkpoints hold the same, tensor by tensor"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b or a != a and b != b


# ----------------------------------------------------------------------------------------- checkpoints, as bytes

def archive(path):
    with zipfile.ZipFile(path) as content:
        return {name: content.read(name) for name in content.namelist()}


def archived(parts, **options):
    """{name: bytes}, or pairs of them -> a zip file's bytes, its checksums right"""
    content = io.BytesIO()
    with zipfile.ZipFile(content, 'w', **options) as file:
        for name, part in parts.items() if isinstance(parts, dict) else parts:
            file.writestr(name, part)
    return content.getvalue()


def flip(content, at, rng):
    content = bytearray(content)
    content[at] ^= 1 << rng.integers(8)
    return bytes(content)


def damaged(content, parts, rng):
    """A checkpoint's bytes, damaged in some way that its checksums may show"""
    n = len(content)
    name, other = rng.choice([name for name in parts if len(set(map(len, parts.values()))) > 1], 2, replace=False)
    return [
        lambda: flip(content, rng.integers(n), rng),
        lambda: flip(content, rng.integers(64), rng),                                       # in the first header
        lambda: flip(content, n - 1 - rng.integers(min(n, 4000)), rng),                     # in the directory
        lambda: content[:rng.integers(n)],
        lambda: content[rng.integers(n):],
        lambda: content + rng.bytes(rng.integers(1, 100)),
        lambda: rng.bytes(rng.integers(1, 100)) + content,
        lambda: content[:(at := rng.integers(n))] + bytes(64) + content[at + 64:],
        lambda: archived({**parts, name: parts[other], other: parts[name]} if len(parts[name]) != len(parts[other]) else {}),
        lambda: archived({key: part for key, part in parts.items() if '/data/' not in key or rng.random() < 0.9}),
    ][rng.integers(10)]()


@pytest.mark.parametrize('script', SCRIPTS)
def test_damaged_checkpoints_are_whole_or_refused(script, checkpoints, tmp_path, recwarn):
    path, load, rng = checkpoints[script], SCRIPTS[script].load_checkpoint, np.random.default_rng(0)
    whole, parts, file = load(path), archive(path), tmp_path / 'bad.pt'
    n_whole, n = 0, 150
    for k in range(n):
        file.write_bytes(damaged(path.read_bytes(), parts, rng))
        try:
            loaded = load(file)
        except UserError as error:
            assert str(file) in str(error)
        else:
            n_whole += 1
            assert same({**loaded, 'path': None}, {**whole, 'path': None})
    assert 0 < n_whole < n / 2 and not recwarn.list


@pytest.mark.parametrize('script', SCRIPTS)
def test_damaged_pickles_with_right_checksums(script, checkpoints, tmp_path):
    """What they then hold may be another checkpoint, as good as any, but whatever loads has the right form"""
    path, module, rng = checkpoints[script], SCRIPTS[script], np.random.default_rng(1)
    parts, file = archive(path), tmp_path / 'bad.pt'
    pickled = only(name for name in parts if name.endswith('data.pkl'))
    n_refused, n = 0, 150
    for _ in range(n):
        content = parts[pickled]
        for _ in range(rng.integers(1, 4)):
            content = flip(content, rng.integers(len(content)), rng)
        file.write_bytes(archived({**parts, pickled: content}))
        try:
            loaded = module.load_checkpoint(file)
        except UserError as error:
            n_refused += 1
            assert str(error).isprintable()
        else:
            module.restore_model(loaded, torch.device('cpu'))
    assert n_refused > n / 2


@pytest.mark.parametrize('make', [
    lambda saved, parts: archived({**parts, 'checkpoint/data/more': bytes(2**28)}, compression=zipfile.ZIP_DEFLATED),
    lambda saved, parts: archived({name: part for name, part in parts.items()}, compression=zipfile.ZIP_DEFLATED),
    lambda saved, parts: archived({**parts, **{name.upper(): part for name, part in parts.items()}}),
    lambda saved, parts: archived({**parts, **{f'checkpoint/data/x{k}': b'' for k in range(20_000)}}),
    lambda saved, parts: archived({**parts, 'checkpoint/constants.pkl': b'.'}),
    lambda saved, parts: archived({}),
    lambda saved, parts: b'PK\x05\x06' + bytes(18),
    lambda saved, parts: pickle.dumps(Call(bytearray, 10**11)),
    lambda saved, parts: old_format(saved),
    lambda saved, parts: old_format(Call(bytearray, 10**11)) + archived(parts),
    lambda saved, parts: overlapping(parts),
], ids=['large', 'compressed', 'two_cases', 'many', 'torchscript', 'none', 'empty', 'pickle', 'old', 'old_before_zip', 'overlapping'])
def test_archives_that_are_no_checkpoints(make, checkpoints, tmp_path, recwarn):
    path = checkpoints['glow']
    (tmp_path / 'bad.pt').write_bytes(make(torch.load(path), archive(path)))
    assert 'cannot be read as a checkpoint' in refusal(glow.load_checkpoint, tmp_path / 'bad.pt')
    assert not recwarn.list


def old_format(content):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def overlapping(parts):
    """Ten thousand entries that are all the same bytes of the file"""
    large = max(parts, key=lambda name: len(parts[name]))
    content = archived({**parts, large: bytes(2**22)})
    start = content.index(b'PK\x01\x02')
    entry = content[content.rindex(b'PK\x01\x02', 0, content.rindex(large.encode())):]
    entry = entry[:46 + len(large)]
    directory, n = content[start:content.rindex(b'PK\x05\x06')] + 10_000 * entry, len(parts) + 10_000
    end = b'PK\x05\x06' + bytes(4) + 2 * n.to_bytes(2, 'little') + len(directory).to_bytes(4, 'little') + start.to_bytes(4, 'little')
    return content[:start] + directory + end + bytes(2)


# ------------------------------------------------------------------------------------------ checkpoints, as pickles

def bomb():
    value = [0]
    for _ in range(40):
        value = [value] * 10
    return value


def circle():
    value = []
    value.append(value)
    return value


class Shadowed:
    """Pickled, an OrderedDict with attributes of its own"""
    def __init__(self, mapping, **attributes):
        self.mapping, self.attributes = mapping, attributes

    def __reduce__(self):
        return OrderedDict, (), self.attributes, None, iter(self.mapping.items())


def strided(size, stride, offset=0, *more):
    """Pickled, a tensor of one number that seems to be more"""
    return Call(torch._utils._rebuild_tensor_v2, torch.zeros(1).storage(), offset, size, stride, False, OrderedDict(), *more)


def tensors(weight):
    """What may stand for a weight and is none, by name"""
    return {
        'sparse': weight.to_sparse(), 'complex': weight.cfloat(), 'float64': weight.double(), 'half': weight.half(),
        'meta': weight.to('meta'), 'nested': torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        'expanded': torch.zeros(()).expand(weight.shape), 'part': torch.zeros(10**6)[:weight.numel()].view(weight.shape),
        'huge': strided((10**6, 10**6), (0, 0)), 'overflow': strided((2**32, 2**32), (0, 0)), 'outside': strided((10**9,), (1,)),
        'before': strided((1,), (1,), -10**6), 'after': strided((1,), (1,), 10**6), 'backward': strided((2, 1), (-1, 1), 1),
        'many_dims': strided((1,) * 100, (0,) * 100), 'negative': strided((-1,), (1,)), 'uneven': strided((1,), ()),
        'text_size': strided('a', 'b'), 'negated': strided((1,), (1,), 0, {'neg': True}), 'parameter': torch.nn.Parameter(weight),
        'nan': weight * math.nan, 'inf': weight.abs() / 0, 'shape': weight[None], 'empty': weight[:0], 'list': weight.tolist(),
        'none': None, 'text': 'x', 'bytes': bytearray(4), 'storage': weight.storage(),
    }


@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize('part', ['model', 'average', 'optimizer'])
def test_weights_that_are_none(part, script, checkpoints, tmp_path):
    saved, file = torch.load(checkpoints[script]), tmp_path / 'bad.pt'
    values = saved[part] if part != 'optimizer' else max(saved[part]['state'].values(), key=lambda state: state['exp_avg'].numel())
    key = max(values, key=lambda key: values[key].numel())
    for name, value in tensors(values[key]).items():
        values[key] = value
        torch.save(saved, file)
        assert str(file) in refusal(SCRIPTS[script].load_checkpoint, file), name


@pytest.mark.parametrize('script', SCRIPTS)
def test_other_parts_that_are_none(script, checkpoints, tmp_path):
    saved, file = torch.load(checkpoints[script]), tmp_path / 'bad.pt'
    adam, config = saved['optimizer'], saved['config']
    group, state = adam['param_groups'][0], adam['state']
    i = max(state, key=lambda i: state[i]['exp_avg'].numel())
    changes = [
        *[{'config': {**config, key: value}} for key, value in (
            ('dataset', '\33[2J'), ('dataset', 'a\nb'), ('dataset', 3), ('data_dir', '\u202e'), ('data_dir', None), ('data_dir', '\udc80'),
            ('seed', -1), ('seed', 2**63), ('seed', True), ('batch_size', 2**40), ('batch_size', 0), ('n_epochs', 10**400), ('lr', math.nan),
            ('lr', 1), ('ema_decay', torch.tensor(0.5)), ('checkpoint_grads', 'yes'), ('more', 1), (3, 4))],
        {'config': {}}, {'config': [1]}, {'config': bomb()}, {'config': Shadowed(config, keys=None, items=3)},
        *[{'input_dims': value} for value in ([], [-1], [2**16], [2, 2], ['a'], [True], (2,), bomb(), 2, [1, 8, 16], [10**9] * 3)],
        *[{key: value} for key in ('step', 'world_size') for value in (-1, 2**70, 10**400, 0.5, True, '1', None, [1], torch.tensor(1))],
        *[{'best': value} for value in (1, None, '1', torch.tensor(1.))],
        *[{part: value} for part in ('model', 'average', 'optimizer', 'script') for value in (
            None, 3, [], bomb(), circle(), {'x': 1}, {1: torch.zeros(1)}, {**saved[part], '\33[31m': torch.zeros(1)} if part != 'script' else {})],
        *[{'optimizer': {**adam, 'param_groups': [{**group, **change}]}} for change in (
            {'lr': 'x'}, {'lr': math.nan}, {'lr': -1.}, {'lr': torch.ones(1)}, {'betas': (2, 3)}, {'betas': [0.9, 0.999]}, {'betas': 'x'},
            {'eps': torch.ones(2)}, {'eps': math.inf}, {'weight_decay': '0'}, {'foreach': True}, {'capturable': True}, {'fused': None},
            {'differentiable': True}, {'maximize': True}, {'params': [0]}, {'params': bomb()}, {'params': [10**6] * len(group['params'])})],
        *[{'optimizer': {**adam, 'param_groups': value}} for value in ([], [group, group], [3], None, group, bomb())],
        *[{'optimizer': {**adam, 'state': {**state, **change}}} for change in (
            {i: {}}, {i: 3}, {-1: state[i]}, {'a': state[i]}, {i: {**state[i], 'more': torch.zeros(1)}},
            {i: {**state[i], 'step': torch.zeros(2)}}, {i: {**state[i], 'exp_avg': torch.zeros(())}}, {i: {**state[i], 'exp_avg_sq': bomb()}})],
        *[{'optimizer': {**adam, **change}} for change in ({'state': None}, {'state': []}, {'more': 1}, {'param_groups': (group,)})],
    ]
    for change in changes:
        torch.save({**saved, **change}, file)
        assert str(file) in refusal(SCRIPTS[script].load_checkpoint, file), change
    for key in saved:
        torch.save({name: value for name, value in saved.items() if name != key}, file)
        refusal(SCRIPTS[script].load_checkpoint, file)


@pytest.mark.parametrize('script', SCRIPTS)
def test_models_too_large_for_their_weights(script, checkpoints, tmp_path):
    saved, file = torch.load(checkpoints[script]), tmp_path / 'bad.pt'
    large = [(dict(n_levels=9, depth=2**10, width=2**14, image_size=2**10), [1, 2**10, 2**10]),
             (dict(depth=2**10), saved['input_dims']), (dict(width=10**9), saved['input_dims'])] if script == 'glow' else [
            (dict(n_flows=2**8, n_hidden=2**6, hidden_dim=2**12), dims) for dims in ([2], [200], [2**16 - 1])]
    for change, dims in large:
        torch.save({**saved, 'config': {**saved['config'], **change}, 'input_dims': dims}, file)
        assert 'damaged' in refusal(SCRIPTS[script].load_checkpoint, file)


def test_no_payload_runs(checkpoints, tmp_path, capsys):
    canary, saved, file = tmp_path / 'canary', torch.load(checkpoints['glow']), tmp_path / 'bad.pt'
    (tmp_path / 'other.pt').write_bytes(pickle.dumps(Call(os.mkdir, str(canary))))
    mkdir = Call(os.mkdir, str(canary))
    payloads = [
        mkdir, Call(eval, f'__import__("os").mkdir({str(canary)!r})'), Call(torch.load, str(tmp_path / 'other.pt'), 'cpu'),
        Call(torch._tensor._rebuild_from_type_v2, os.mkdir, str, (str(canary),), {}),
        Call(torch._utils._rebuild_parameter, mkdir, False, OrderedDict()), Call(torch.nn.Parameter, mkdir),
        Call(torch.Tensor, 10**5, 10**5), Call(bytearray, 10**11), Call(torch.UntypedStorage, 10**12),
        Call(torch.empty, 10**11), Call(set, [1]), Call(complex, 1), Call(torch.device, 'cpu'), Call(torch.hub.load, str(tmp_path), 'x'),
        Call(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (10**9, 10**9), (1, 1), False), np.zeros(3), torch.float32,
        torch.Size([1]), torch.nn.Linear(1, 1), Path('/'),
    ]
    for payload in payloads:
        for change in ({'model': payload}, {'config': {**saved['config'], 'dataset': payload}}, {'more': payload}):
            torch.save({**saved, **change}, file)
            assert 'holds more than tensors' in refusal(glow.load_checkpoint, file), payload
    for words in (*[[mode, f'--restore_file={file}'] for mode in MODES], ['--train', '--resume', f'--output_dir={tmp_path}/runs']):
        (tmp_path / 'runs' / 'glow_x').mkdir(parents=True, exist_ok=True)
        torch.save({**saved, 'more': mkdir}, file)
        shutil.copy(file, tmp_path / 'runs' / 'glow_x' / 'checkpoint.pt')
        assert 'holds more than tensors' in refused('glow', capsys, *words)
    assert not canary.exists() and sorted(path.name for path in tmp_path.iterdir()) == ['bad.pt', 'other.pt', 'runs']
