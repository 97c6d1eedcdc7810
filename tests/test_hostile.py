"""Files of strangers: each loads as what it is or is refused in one line, and none runs code or takes more than its size."""

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
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import EpsImagePlugin, Image
from test_glow_commands import only
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
from datasets import images, load_images, tabular
from datasets.pickles import Named
from datasets.plots import draw_pairs

pytestmark = pytest.mark.filterwarnings(
    'ignore:.*deprecated|.*prototype|invalid escape'
)  # of what makes the files
SCRIPTS = {'glow': glow, 'bnaf': bnaf}
MODES = '--generate', '--evaluate', '--visualize', '--check', '--train'
MUCH = 2**28  # bytes: what a small file may not take


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """-> path of a tiny checkpoint of each script, by its name"""
    folder = tmp_path_factory.mktemp('trained')
    pd.DataFrame(np.random.default_rng(0).normal(size=(90, 2)), columns=['a', 'b']).to_csv(
        folder / 'rows.csv', index=False
    )
    glow.main(
        [
            '--train',
            '--dataset=digits',
            '--depth=1',
            '--width=8',
            '--n_epochs=1',
            '--batch_size=512',
            f'--output_dir={folder}',
            f'--data_dir={folder}',
        ]
    )
    bnaf.main(
        [
            '--train',
            f'--dataset={folder}/rows.csv',
            '--n_flows=2',
            '--hidden_dim=3',
            '--n_epochs=2',
            f'--output_dir={folder}',
        ]
    )
    return {name: only(folder.glob(f'{name}_*/checkpoint.pt')) for name in SCRIPTS}


class Call:
    """Pickled, a call"""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def refusal(function, *args):
    """-> the one line in which it is refused, neither much time nor much memory being taken for it"""
    Path('/proc/self/clear_refs').write_text('5')  # the peak is counted from here
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
    assert (
        line.startswith(f'{script}.py: error: ') and line.endswith('\n') and line[:-1].isprintable()
    ), line
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
    name, other = rng.choice(list(parts), 2, replace=False)
    swapped = {
        **parts,
        name: parts[other],
        other: parts[name],
    }  # of one size they would make a whole checkpoint
    return [
        lambda: flip(content, rng.integers(n), rng),
        lambda: flip(content, rng.integers(64), rng),  # in the first header
        lambda: flip(content, n - 1 - rng.integers(min(n, 4000)), rng),  # in the directory
        lambda: content[: rng.integers(n)],
        lambda: content[rng.integers(n) :],
        lambda: content + rng.bytes(rng.integers(1, 100)),
        lambda: rng.bytes(rng.integers(1, 100)) + content,
        lambda: content[: (at := rng.integers(n))] + bytes(64) + content[at + 64 :],
        lambda: archived(swapped if len(parts[name]) != len(parts[other]) else {}),
        lambda: archived(
            {key: part for key, part in parts.items() if '/data/' not in key or rng.random() < 0.9}
        ),
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


def test_a_checkpoint_is_not_looked_at_again(checkpoints, tmp_path):
    file = shutil.copy(checkpoints['glow'], tmp_path)
    whole, loaded = glow.load_checkpoint(checkpoints['glow']), glow.load_checkpoint(file)
    with open(file, 'r+b') as content:
        content.write(bytes(os.path.getsize(file)))
    assert same({**loaded, 'path': None}, {**whole, 'path': None})


ARCHIVES = {
    'large': lambda parts, root: archived(
        {**parts, f'{root}/more': bytes(2**28)}, compression=zipfile.ZIP_DEFLATED
    ),
    'compressed': lambda parts, root: archived(parts, compression=zipfile.ZIP_DEFLATED),
    'two_cases': lambda parts, root: archived(
        {**parts, f'{root}/DATA/0': bytes(len(parts[f'{root}/data/0']))}
    ),
    'two_pickles': lambda parts, root: archived({**parts, f'{root}/DATA.PKL': b'.'}),
    'many': lambda parts, root: archived(
        {**parts, **{f'{root}/data/x{k}': b'' for k in range(20_000)}}
    ),
    'torchscript': lambda parts, root: archived({**parts, f'{root}/constants.pkl': b'.'}),
    'protocol': lambda parts, root: archived(
        {
            name: b'\x80\x04' + part[2:] if name.endswith('.pkl') else part
            for name, part in parts.items()
        }
    ),
    'none': lambda parts, root: archived({}),
    'empty': lambda parts, root: b'',
    'pickle': lambda parts, root: pickle.dumps(Call(bytearray, 10**11)),
    'old': lambda parts, root: old_format({'script': 'glow.py'}),
    'old_before_zip': lambda parts, root: old_format(Call(bytearray, 10**11)) + archived(parts),
    'overlapping': lambda parts, root: overlapping(parts, root),
}


@pytest.mark.parametrize('name', ARCHIVES)
def test_archives_that_are_no_checkpoints(name, checkpoints, tmp_path, recwarn):
    parts = archive(checkpoints['glow'])
    (tmp_path / 'bad.pt').write_bytes(
        ARCHIVES[name](parts, only({part.split('/')[0] for part in parts}))
    )
    assert 'cannot be read as a checkpoint' in refusal(glow.load_checkpoint, tmp_path / 'bad.pt')
    assert not recwarn.list


def old_format(content):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def overlapping(parts, root):
    """A checkpoint with an entry more that lies within another one"""
    inner = archived({f'{root}/inner': bytes(2**20)})
    content = archived({**parts, f'{root}/outer': inner})
    entry = bytearray(inner[inner.index(b'PK\x01\x02') : inner.rindex(b'PK\x05\x06')])
    entry[42:46] = struct.pack('<I', content.index(inner))
    end = bytearray(content[content.rindex(b'PK\x05\x06') :])
    n, size = (
        struct.unpack('<H', end[10:12])[0] + 1,
        struct.unpack('<I', end[12:16])[0] + len(entry),
    )
    end[8:16] = struct.pack('<2HI', n, n, size)
    return content[: content.rindex(b'PK\x05\x06')] + bytes(entry) + bytes(end)


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
    return Call(
        torch._utils._rebuild_tensor_v2,
        torch.zeros(1).storage(),
        offset,
        size,
        stride,
        False,
        OrderedDict(),
        *more,
    )


def tensors(weight):
    """What may stand for a weight and is none, by name"""
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
def test_weights_that_are_none(part, script, checkpoints, tmp_path):
    saved, file = torch.load(checkpoints[script]), tmp_path / 'bad.pt'
    values = saved[part]
    if part == 'optimizer':
        values = max(values['state'].values(), key=lambda state: state['exp_avg'].numel())
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
        *[
            {'config': {**config, key: value}}
            for key, value in (
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
                ('more', 1),
                (3, 4),
            )
        ],
        {'config': {}},
        {'config': [1]},
        {'config': bomb()},
        {'config': Shadowed(config, keys=None, items=3)},
        *[
            {'input_dims': value}
            for value in (
                [],
                [-1],
                [2**16],
                [2, 2],
                ['a'],
                [True],
                (2,),
                bomb(),
                2,
                [1, 8, 16],
                [10**9] * 3,
            )
        ],
        *[
            {key: value}
            for key in ('step', 'world_size')
            for value in (-1, 2**70, 10**400, 0.5, True, '1', None, [1], torch.tensor(1))
        ],
        *[{'best': value} for value in (1, None, '1', torch.tensor(1.0))],
        *[
            {part: value}
            for part in ('model', 'average', 'optimizer', 'script')
            for value in (
                None,
                3,
                [],
                bomb(),
                circle(),
                {'x': 1},
                {1: torch.zeros(1)},
                {**saved[part], '\33[31m': torch.zeros(1)} if part != 'script' else {},
            )
        ],
        *[
            {'optimizer': {**adam, 'param_groups': [{**group, **change}]}}
            for change in (
                {'lr': 'x'},
                {'lr': math.nan},
                {'lr': -1.0},
                {'lr': torch.ones(1)},
                {'betas': (2, 3)},
                {'betas': [0.9, 0.999]},
                {'betas': 'x'},
                {'eps': torch.ones(2)},
                {'eps': math.inf},
                {'weight_decay': '0'},
                {'foreach': True},
                {'capturable': True},
                {'fused': None},
                {'differentiable': True},
                {'maximize': True},
                {'params': [0]},
                {'params': bomb()},
                {'params': [10**6] * len(group['params'])},
            )
        ],
        *[
            {'optimizer': {**adam, 'param_groups': value}}
            for value in ([], [group, group], [3], None, group, bomb())
        ],
        *[
            {'optimizer': {**adam, 'state': {**state, **change}}}
            for change in (
                {i: {}},
                {i: 3},
                {-1: state[i]},
                {'a': state[i]},
                {i: {**state[i], 'more': torch.zeros(1)}},
                {i: {**state[i], 'step': torch.zeros(2)}},
                {i: {**state[i], 'exp_avg': torch.zeros(())}},
                {i: {**state[i], 'exp_avg_sq': bomb()}},
            )
        ],
        *[
            {'optimizer': {**adam, **change}}
            for change in ({'state': None}, {'state': []}, {'more': 1}, {'param_groups': (group,)})
        ],
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
    large = {
        'glow': [
            (dict(n_levels=9, depth=2**10, width=2**14, image_size=2**10), [1, 2**10, 2**10]),
            (dict(depth=2**10), saved['input_dims']),
            (dict(width=10**9), saved['input_dims']),
        ],
        'bnaf': [
            (dict(n_flows=2**8, n_hidden=2**6, hidden_dim=2**12), [d]) for d in (2, 200, 2**16 - 1)
        ],
    }
    for change, dims in large[script]:
        torch.save({**saved, 'config': {**saved['config'], **change}, 'input_dims': dims}, file)
        assert 'damaged' in refusal(SCRIPTS[script].load_checkpoint, file)


def test_no_payload_runs(checkpoints, tmp_path, capsys):
    canary, saved, file = tmp_path / 'canary', torch.load(checkpoints['glow']), tmp_path / 'bad.pt'
    (tmp_path / 'other.pt').write_bytes(pickle.dumps(Call(os.mkdir, str(canary))))
    mkdir = Call(os.mkdir, str(canary))
    payloads = [
        mkdir,
        Call(eval, f'__import__("os").mkdir({str(canary)!r})'),
        Call(torch.load, str(tmp_path / 'other.pt'), 'cpu'),
        Call(torch._tensor._rebuild_from_type_v2, os.mkdir, str, (str(canary),), {}),
        Call(torch._utils._rebuild_parameter, mkdir, False, OrderedDict()),
        Call(torch.nn.Parameter, mkdir),
        Call(torch.Tensor, 10**5, 10**5),
        Call(bytearray, 10**11),
        Call(torch.UntypedStorage, 10**12),
        Call(torch.empty, 10**11),
        Call(set, [1]),
        Call(complex, 1),
        Call(torch.device, 'cpu'),
        Call(torch.hub.load, str(tmp_path), 'x'),
        Call(
            torch._utils._rebuild_meta_tensor_no_storage,
            torch.float32,
            (10**9, 10**9),
            (1, 1),
            False,
        ),
        np.zeros(3),
        torch.float32,
        torch.Size([1]),
        torch.nn.Linear(1, 1),
        Path('/'),
    ]
    for payload in payloads:
        for change in (
            {'model': payload},
            {'config': {**saved['config'], 'dataset': payload}},
            {'more': payload},
        ):
            torch.save({**saved, **change}, file)
            assert 'holds more than tensors' in refusal(glow.load_checkpoint, file), payload
    commands = [
        *[[mode, f'--restore_file={file}'] for mode in MODES],
        ['--train', '--resume', f'--output_dir={tmp_path}/runs'],
    ]
    for words in commands:
        (tmp_path / 'runs' / 'glow_x').mkdir(parents=True, exist_ok=True)
        torch.save({**saved, 'more': mkdir}, file)
        shutil.copy(file, tmp_path / 'runs' / 'glow_x' / 'checkpoint.pt')
        assert 'holds more than tensors' in refused('glow', capsys, *words)
    assert not canary.exists() and sorted(path.name for path in tmp_path.iterdir()) == [
        'bad.pt',
        'other.pt',
        'runs',
    ]


@pytest.mark.parametrize('mode', ['--train', '--evaluate'])
def test_scheduler_and_units_are_checked(mode, checkpoints, tmp_path, capsys):
    saved, file = torch.load(checkpoints['bnaf']), tmp_path / 'checkpoint.pt'
    scheduler, units = saved['scheduler'], saved['units']
    changes = [
        *[
            {'scheduler': {**scheduler, **change}}
            for change in (
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
                {'mode': bomb()},
            )
        ],
        {'scheduler': 3},
        *[
            {'units': {**units, **change}}
            for change in (
                {'mean': [math.nan] * 2},
                {'std': [0.0, 1.0]},
                {'std': [math.inf] * 2},
                {'steps': [-math.inf] * 2},
                {'columns': ['\33[31m', 'b']},
                {'columns': ['a']},
                {'columns': ['c', 'd']},
                {'mean': [1, 2]},
                {'more': []},
                {'mean': bomb()},
            )
        ],
    ]
    for change in changes:
        torch.save({**saved, **change}, file)
        content = file.read_bytes()
        refused('bnaf', capsys, mode, f'--restore_file={file}', '--n_epochs=3')
        assert file.read_bytes() == content, change
        assert {path.name for path in tmp_path.iterdir()} <= {'checkpoint.pt', '.lock'}, change


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
    cache, picture = only(tmp_path.glob('attribute_directions_*.pt')), only(tmp_path.glob('*.png'))
    first, shown = torch.load(cache), picture.read_bytes()
    torch.save(content, cache)
    glow.main(words)
    assert (
        torch.equal(torch.load(cache), first)
        and picture.read_bytes() == shown
        and not Path('canary').exists()
    )


# --------------------------------------------------------------------------------------------------------- images


def bytes_of(image, format, **options):
    content = io.BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


def claims(width, height):
    """A PNG whose header claims another size than it has"""
    content = bytearray(bytes_of(noise_image(20, 20), 'PNG'))
    content[16:24] = struct.pack('>2I', width, height)
    content[29:33] = struct.pack('>I', zipfile.crc32(content[12:29]))
    return bytes(content)


BAD_IMAGES = {
    'empty': b'',
    'text': b'I am no picture',
    'half': bytes_of(noise_image(40, 40), 'JPEG')[:700],
    'bomb': claims(2**31 - 1, 2**31 - 1),
    'warned_of': claims(10_000, 10_000),
    'strip': bytes_of(Image.new('1', (100_000, 1)), 'PNG'),
    'less': claims(40, 40),
    'none': claims(0, 0),
    'postscript': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n',
    'icon': bytes_of(noise_image(32, 32), 'ICO'),
    'tiff_of_rubbish': b'II*\0' + bytes(range(256)),
    'webp_of_nothing': b'RIFF\xff\xff\xff\x7fWEBPVP8 ',
    'gif_of_nothing': b'GIF89a' + 7 * b'\xff',
}


@pytest.mark.parametrize('name', BAD_IMAGES)
def test_bad_images_are_named(name, tmp_path, monkeypatch):
    """None is handed to another program, such as Ghostscript, whatever it holds"""
    (tmp_path / 'gs').write_text(f'#!/bin/sh\ntouch {tmp_path}/canary\n')
    (tmp_path / 'gs').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, 'gs_binary', None)
    (tmp_path / '\33[31m.jpg').write_bytes(BAD_IMAGES[name])
    assert '\\x1b[31m.jpg' in refusal(images.load_photo, tmp_path / '\33[31m.jpg', 'faces', 16)
    assert not (tmp_path / 'canary').exists()


def test_one_bad_image_among_good_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / 'photos')
    (tmp_path / 'photos' / 'a' / 'bad.jpg').write_bytes(BAD_IMAGES['half'])
    assert 'bad.jpg cannot be decoded' in refusal(load_images, 'folder', tmp_path / 'photos', 16)


def test_odd_images_are_decoded(tmp_path, recwarn):
    """To the same pixels as the plain image: of 16 bits, a palette with transparency, many frames, with rubbish for EXIF"""
    plain = Image.fromarray(np.kron([[0, 85], [170, 255]], np.ones((12, 12))).astype(np.uint8))
    palette, exif = plain.quantize(4), Image.Exif()
    exif[0x0112], exif[0x927C] = 77, bytes(1000)
    odd = {
        '16.png': bytes_of(Image.fromarray(np.asarray(plain).astype(np.uint16) * 257), 'PNG'),
        'palette.png': bytes_of(palette, 'PNG', transparency=b'\xff' * 4),
        'cmyk.tif': bytes_of(plain.convert('RGB').convert('CMYK'), 'TIFF'),
        'frames.gif': bytes_of(
            palette, 'GIF', save_all=True, append_images=[Image.new('L', (24, 24))]
        ),
        'frames.webp': bytes_of(
            plain.convert('RGB'),
            'WEBP',
            lossless=True,
            save_all=True,
            append_images=[Image.new('RGB', (24, 24))],
        ),
        'exif.png': bytes_of(plain, 'PNG', exif=exif),
        'exif.jpg': bytes_of(
            plain, 'JPEG', quality=100, exif=b'Exif\0\0II*\0\x08\0\0\0\x10\0\x12\x01'
        ),
        'two.jpg': bytes_of(
            plain.convert('RGB'),
            'MPO',
            quality=100,
            save_all=True,
            append_images=[Image.new('RGB', (24, 24))],
        ),
    }
    for name, content in odd.items():
        (tmp_path / name).write_bytes(content)
        assert (
            np.abs(
                images.load_photo(tmp_path / name, 'faces', 24).astype(int) - np.asarray(plain)
            ).max()
            <= 2
        ), name
    assert not recwarn.list


def test_links_that_lead_in_circles(tmp_path, monkeypatch):
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
    """They reach a picture, cut where they are long, and no file name"""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / 'photos')
    rows = [(*row[:2], *[row[2]] * len(NAMES)) for row in attribute_rows()[1:]]
    write_table(tmp_path / 'photos', [('image', 'split', *NAMES), *rows])
    glow.main(
        [
            '--train',
            '--dataset=folder',
            '--data_dir=photos',
            '--image_size=16',
            '--n_levels=1',
            '--depth=1',
            '--width=8',
            '--n_epochs=1',
        ]
    )
    before = set(tmp_path.rglob('*'))
    glow.main(['--visualize'])
    new = [path.name for path in set(tmp_path.rglob('*')) - before]
    assert sorted(name for name in new if not name.startswith('attribute_directions_')) == [
        'manipulated_sample_attr_all.png'
    ]
    picture = Image.open(only(tmp_path.rglob('manipulated_*.png')))
    assert picture.width < 2000 and picture.height == 34 + 136 * len(NAMES)


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
    (tmp_path / 'attributes.csv').write_text('\n'.join([header, *[name + cells for name in files]]))
    assert part in refusal(images.read_attribute_table, tmp_path / 'attributes.csv', files)


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
def test_cifar_of_things_that_are_no_arrays(data, tmp_path):
    write_cifar(tmp_path)
    (tmp_path / 'data_batch_2').write_bytes(pickle.dumps({'data': data, 'labels': [0]}))
    assert 'data_batch_2' in refusal(load_images, 'cifar10', tmp_path)


def test_cifar_of_arrays_without_a_type(tmp_path, monkeypatch):
    """As read_pickle gives them"""
    array = type('_reconstruct', (Named,), {})()
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


# --------------------------------------------------------------------------------------------------------- caches


def npy(array, header=None):
    content = io.BytesIO()
    if header:
        content.write(b'\x93NUMPY\x01\x00' + struct.pack('<H', len(header)) + header.encode())
    else:
        np.save(content, array, allow_pickle=True)
    return content.getvalue()


def npz(array):
    content = io.BytesIO()
    np.savez(content, array)
    return content.getvalue()


@pytest.mark.parametrize(
    'change',
    [
        lambda whole: npy(np.array([Call(os.mkdir, 'canary')])),
        lambda whole: npz(np.zeros((20, 3, 16, 16), np.uint8)),
        lambda whole: b'',
        lambda whole: npy(np.zeros((20, 3, 16, 15), np.uint8)),
        lambda whole: npy(np.zeros((19, 3, 16, 16), np.uint8)),
        lambda whole: whole[:-1],
        lambda whole: npy(np.zeros((20, 3, 16, 16), np.int8)),
        lambda whole: npy(np.zeros(())),
        lambda whole: pickle.dumps(Call(os.mkdir, 'canary')),
        lambda whole: npy(None, '(' * 9000),
        lambda whole: npy(None, "{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 2)}"),
        lambda whole: npy(
            None, f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({10**30}, 2)}}"
        ),
        lambda whole: b'\x93NUMPY\x01\x00\xff\xff{',
    ],
)
def test_a_cache_that_is_none_is_made_again(change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / 'photos')
    write_cifar(tmp_path / 'cifar')
    for name, folder in (('folder', tmp_path / 'photos'), ('cifar10', tmp_path / 'cifar')):
        first = load_images(name, folder, 16 if name == 'folder' else None).train.images.copy()
        cache = only((folder / '.cache').glob('*.npy'))
        cache.write_bytes(change(cache.read_bytes()))
        again = load_images(name, folder, 16 if name == 'folder' else None).train.images
        assert again.shape == first.shape and (again == first).all()
    assert not Path('canary').exists()


def test_a_cache_of_classes_that_there_are_not(tmp_path):
    write_cifar(tmp_path)
    first = load_images('cifar10', tmp_path).train.attributes.copy()
    cache = only((tmp_path / '.cache').glob('*.npy'))
    np.save(cache, np.full((120, 3073), 200, np.uint8))
    assert (load_images('cifar10', tmp_path).train.attributes == first).all()


# --------------------------------------------------------------------------------------------------------- tables

ROWS = np.random.default_rng(0).normal(size=(60, 2))


def h5(path, write):
    with h5py.File(path, 'w') as file:
        write(file)


def virtual(file):
    layout = h5py.VirtualLayout((60, 2), 'f8')
    layout[:] = h5py.VirtualSource('other.h5', 'x', (60, 2))
    file.create_virtual_dataset('x', layout)


def chunked(file):
    """60 rows in one chunk of a million, compressed twice"""
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_chunk((1000, 1000))
    options.set_deflate(9)
    options.set_deflate(9)
    space = h5py.h5s.create_simple((60, 2), (h5py.h5s.UNLIMITED,) * 2)
    h5py.h5d.create(file.id, b'x', h5py.h5t.NATIVE_DOUBLE, space, options).write(
        h5py.h5s.ALL, h5py.h5s.ALL, ROWS
    )


BAD_H5 = {
    'linked': lambda file: file.update({'x': h5py.ExternalLink('other.h5', 'x')}),
    'virtual': virtual,
    'dangling': lambda file: file.update(
        {'x': h5py.SoftLink('/nowhere'), 'y': h5py.SoftLink('/y')}
    ),
    'elsewhere': lambda file: file.create_dataset(
        'x', (60, 2), 'f8', external=[('rows.bin', 0, h5py.h5f.UNLIMITED)]
    ),
    'references': lambda file: file.create_dataset('x', (60, 2), h5py.ref_dtype),
    'text': lambda file: file.create_dataset('x', (60, 2), 'S4'),
    'null': lambda file: file.update({'x': h5py.Empty('f8')}),
    'complex': lambda file: file.update({'x': ROWS * 1j}),
    'bomb': lambda file: file.create_dataset(
        'x', (10**8, 20), 'f8', chunks=(1000, 20), compression='gzip'
    ),
    'large_chunks': chunked,
    'twice': lambda file: file.create_dataset('x', data=ROWS).attrs.update({'columns': ['a', 'a']}),
    'escapes': lambda file: file.create_dataset('x', data=ROWS).attrs.update(
        {'columns': ['\33[31m', 'a']}
    ),
}


@pytest.mark.parametrize('name', BAD_H5)
def test_h5_that_is_no_table_or_leads_elsewhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    h5(tmp_path / 'other.h5', lambda file: file.update({'x': ROWS}))
    (tmp_path / 'rows.bin').write_bytes(ROWS.tobytes())
    h5(tmp_path / 'bad.h5', BAD_H5[name])
    assert 'bad.h5' in refusal(tabular.load_table, str(tmp_path / 'bad.h5'))


@pytest.mark.parametrize(
    'content',
    [
        npz(ROWS),
        b'PK\x03\x04rubbish',
        npy(np.array([[{}, 1]] * 60)),
        npy(ROWS.astype([('a', 'f8')])),
        npy(ROWS[None]),
        npy(ROWS * 1j),
        npy(ROWS > 0),
        npy(None, '(' * 9000),
        npy(None, "{'descr': 'O', 'fortran_order': False, 'shape': (60, 2)}") + bytes(960),
        pickle.dumps(Call(os.mkdir, 'canary')),
        npy(None, f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({2**62}, 4)}}"),
    ],
)
def test_npy_that_is_no_table(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('bad.npy').write_bytes(content)
    assert 'bad.npy' in refusal(tabular.load_table, 'bad.npy') and not Path('canary').exists()


def csv_of(header, rows=ROWS):
    return (
        f'{header}\n'.encode() + '\n'.join(','.join(map(str, row)) for row in rows).encode() + b'\n'
    )


@pytest.mark.parametrize(
    'content',
    [
        csv_of('\33[31ma,b'),
        csv_of('"a\nb",c'),
        csv_of('a\0,b'),
        csv_of(f'{"n" * 200_000},b'),
        csv_of('a,"b'),
        csv_of('a'.encode('utf-16').decode('latin1')),
        csv_of(',b'),
        csv_of('a,b') + b'\xff\xfe,1\n',
        csv_of('a,b').replace(b',', b'\0,'),
        csv_of('a,b') + b'1,"2\n',
        csv_of('a,b') + b'1,2,3\n',
        csv_of('a,b') + b'9' * 400 + b',1\n',
        csv_of('a,b', np.full((60, 2), '1e400')),
        csv_of('a,b', [(1.5, 2)] * 300_000 + [('x', 'y')]),
        csv_of('a', ROWS),
        csv_of('a,b', ROWS[:, [0, 1, 1]]),
        b'a,b\n' + b'1' * 10**7,
        b','.join([b'1.5'] * 10**6) + b'\n',
    ],
)
def test_csv_that_is_no_table(content, tmp_path, recwarn):
    (tmp_path / 'bad.csv').write_bytes(content)
    assert 'bad.csv' in refusal(tabular.load_table, str(tmp_path / 'bad.csv')) and not recwarn.list


@pytest.fixture(scope='module')
def odd_columns(tmp_path_factory):
    """-> best.pt of a model of a table whose columns have odd names"""
    folder = tmp_path_factory.mktemp('odd')
    rows = np.random.default_rng(0).normal(size=(200, len(NAMES)))
    pd.DataFrame(rows, columns=NAMES).to_csv(folder / 'odd.csv', index=False)
    bnaf.main(
        [
            '--train',
            f'--dataset={folder}/odd.csv',
            '--n_flows=2',
            '--hidden_dim=2',
            '--n_epochs=1',
            f'--output_dir={folder}',
        ]
    )
    return only(folder.rglob('best.pt'))


def test_odd_names_of_columns(odd_columns, capsys):
    before = set(odd_columns.parent.rglob('*'))
    for mode in ('--generate', '--visualize', '--evaluate'):
        bnaf.main([mode, f'--restore_file={odd_columns}'])
    new = {path.name for path in set(odd_columns.parent.rglob('*')) - before}
    assert new == {'generated_samples.csv', 'visualization.png'}
    assert list(pd.read_csv(odd_columns.with_name('generated_samples.csv')).columns) == [
        *NAMES,
        'log_likelihood',
    ]
    figure = draw_pairs(ROWS, ROWS, [NAMES[6], NAMES[4]], 'rows')
    labels = {
        label for axes in figure.axes for label in (axes.get_xlabel(), axes.get_ylabel()) if label
    }
    assert {len(label) for label in labels} == {24, len(NAMES[4])}


@pytest.mark.parametrize('option', ['scores', 'output'])
def test_where_no_file_can_go(option, odd_columns, tmp_path, capsys):
    """It is said before anything is computed"""
    mode = {'scores': '--evaluate', 'output': '--generate'}[option]
    (tmp_path / 'folder.csv').mkdir()
    for file, part in (
        (tmp_path / 'folder.csv', 'is there already'),
        (tmp_path / 'none' / 'x.csv', 'there is no folder'),
        (odd_columns / 'x.csv', 'there is no folder'),
    ):
        assert part in refused(
            'bnaf', capsys, mode, f'--{option}={file}', f'--restore_file={odd_columns}'
        )
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['folder.csv']


# --------------------------------------------------------------------------------------------------- what nobody reads


@pytest.mark.parametrize('script', SCRIPTS)
def test_results_and_events_are_never_read(script, checkpoints, tmp_path):
    for name in ('results.json', 'events.out.tfevents.1.x', '.lock'):
        (tmp_path / name).write_bytes(b'\xff' * 100)
    shutil.copy(checkpoints[script], tmp_path)
    for mode in MODES:
        words = [
            mode,
            f'--restore_file={tmp_path}/checkpoint.pt',
            *['--n_epochs=3'] * (mode == '--train'),
        ]
        SCRIPTS[script].main(words)
