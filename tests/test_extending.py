"""What someone who extends a script meets: other optimizers, layers, fields, older checkpoints."""

import gc
import io
import json
import math
import os
import time
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, only, refusal_line, single_process
from torch import nn

import bnaf
import glow
from common import logs
from common.checkpoints import CheckpointFormat
from common.errors import UserError
from common.options import option
from common.runs import launcher
from common.tensors import load_tensors, save_tensors
from datasets import load_images, load_run_images
from datasets.tabular import load_table

STORED = Path(__file__).parent / 'checkpoints'
TINY_GLOW = ['--dataset=digits', '--depth=1', '--width=8', '--n_epochs=1', '--batch_size=256']
TINY_BNAF = ['--dataset=rings', '--hidden_dim=3', '--n_epochs=1', '--batch_size=20']
TINY = {'glow': TINY_GLOW, 'bnaf': TINY_BNAF}
SCRIPTS = {'glow': glow, 'bnaf': bnaf}


def train(script, folder, *words):
    """Train a tiny model and return the folder of its run."""
    script.main(['--train', *TINY[script.NAME], f'--output_dir={folder}', *words])
    return only(folder.glob(f'{script.NAME}_*'))


def extend(monkeypatch, script, **functions):
    """Put other functions in the place of a script's, as someone who edits the script would."""
    for name, function in functions.items():
        monkeypatch.setattr(script, name, function)
    monkeypatch.setattr(script, 'CHECKPOINT', replace(script.CHECKPOINT, **functions))


# ------------------------------------------------------------------------------- other optimizers

OPTIMIZERS = {
    'other options': lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.8, 0.9), weight_decay=0.1),
    'AdamW': lambda p: torch.optim.AdamW(p, lr=1e-3),
    'Adamax': lambda p: torch.optim.Adamax(p, lr=1e-3),
    'SGD': lambda p: torch.optim.SGD(p, lr=1e-3),
    'momentum': lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    'RMSprop': lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize('script', SCRIPTS.values(), ids=SCRIPTS)
def test_other_optimizers_train_save_and_resume(script, name, tmp_path, monkeypatch):
    extend(monkeypatch, script, build_optimizer=lambda config, p: OPTIMIZERS[name](p))
    run = train(script, tmp_path)
    step = script.load_checkpoint(run / 'best.pt')['step']
    last = run / 'checkpoint.pt'
    script.main(['--train', f'--restore_file={last}', '--n_epochs=2'])
    assert script.load_checkpoint(last)['step'] == 2 * step


def test_another_optimizer_trains_saves_and_resumes(tmp_path, monkeypatch):
    test_other_optimizers_train_save_and_resume(glow, 'momentum', tmp_path, monkeypatch)


def test_a_checkpoint_of_another_optimizer_is_refused_with_the_reason(tmp_path, monkeypatch):
    run = train(glow, tmp_path)
    extend(monkeypatch, glow, build_optimizer=lambda config, p: OPTIMIZERS['momentum'](p))
    with pytest.raises(UserError, match='optimizer') as error:
        glow.load_checkpoint(run / 'checkpoint.pt')
    assert isinstance(error.value.__cause__, ValueError)


# --------------------------------------------------------------------------- other layers and types


class BufferLayer(nn.Module):
    """An identity layer with a buffer."""

    def __init__(self, buffer):
        super().__init__()
        self.register_buffer('buffer', buffer)

    def forward(self, x):
        return x, x.new_zeros(len(x))

    inverse = forward


class BufferReader(BufferLayer):
    """A layer that reads its buffer when it is built."""

    def __init__(self, buffer):
        super().__init__(buffer)
        self.total = self.buffer.sum().item()


LAYERS = {
    'item': lambda: BufferReader(torch.ones(3)),
    **{
        str(dtype).removeprefix('torch.'): lambda dtype=dtype: BufferLayer(torch.ones(3).to(dtype))
        for dtype in (
            torch.float64,
            torch.bfloat16,
            torch.float16,
            torch.complex64,
            torch.int8,
            torch.int32,
            torch.uint16,
            torch.float8_e4m3fn,
        )
    },
}


@pytest.mark.parametrize('name', LAYERS)
def test_buffers_of_any_type_train_save_and_resume(name, tmp_path, monkeypatch):
    try:
        torch.save(LAYERS[name]().buffer, io.BytesIO())
    except KeyError:
        pytest.skip('this version of torch cannot save this type')

    def build(config, input_dims, build_model=glow.build_model):
        model = build_model(config, input_dims)
        model.levels[0].insert(1, LAYERS[name]())
        return model

    extend(monkeypatch, glow, build_model=build)
    run = train(glow, tmp_path)
    saved = glow.load_checkpoint(run / 'best.pt')
    buffer = saved['model']['levels.0.1.buffer']
    assert (buffer.to(torch.complex128) == 1).all() and len(buffer) == 3
    glow.main(['--train', f'--restore_file={run}/checkpoint.pt', '--n_epochs=2'])


class Centring(nn.Module):
    """A layer that the first images set: it subtracts the mean of each channel."""

    def __init__(self, n_channels):
        super().__init__()
        self.register_buffer('mean', torch.zeros(n_channels, 1, 1))
        self.sizes = []

    def initialize(self, pieces):
        total = 0
        for x in pieces:
            self.sizes.append(len(x))
            total = total + x.mean((2, 3), keepdim=True).sum(0)
        self.mean.copy_(total / sum(self.sizes))

    def forward(self, x):
        return x - self.mean, x.new_zeros(len(x))

    def inverse(self, z):
        return z + self.mean, z.new_zeros(len(z))


class SecondFirst(nn.Module):
    """Two layers that run in another order than the one in which they are registered."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        y, logdet_second = self.second(x)
        z, logdet_first = self.first(y)
        return z, logdet_second + logdet_first


def test_added_layers_are_set_from_the_images_too():
    model = glow.Glow((1, 8, 8), 1, 1, 4)
    outer, inner, actnorm = Centring(4), Centring(4), glow.Actnorm(4)
    model.levels[0].insert(1, outer)
    model.levels[0].insert(2, SecondFirst(inner, actnorm))
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
    glow.initialize(model, images, batch_size=8)

    assert outer.sizes == inner.sizes == [8, 8, 4] and actnorm.initialized
    assert outer.mean.abs().max() > 1e-4
    assert inner.mean.abs().max() < 1e-6  # the actnorm has centred its input


def test_priors_and_couplings_are_no_actnorms():
    """Layers with an ``initialize`` are set from data; these are not."""
    prior = glow.Prior(4)
    assert not isinstance(prior, glow.Actnorm) and not hasattr(prior, 'initialize')
    for coupling in (glow.AffineCoupling(4, 8), glow.Split(4)):
        assert isinstance(coupling, glow.Coupling) and isinstance(coupling.net, nn.Module)
    additive = glow.AdditiveCoupling(4, 8)
    assert isinstance(additive.net, nn.Module) and not hasattr(additive, 'initialize')
    assert not isinstance(glow.Split(4), glow.AffineCoupling)
    assert np.isfinite(prior.log_s.detach().numpy()).all()


def test_what_cannot_be_read_back_is_found_out_before_the_first_step(tmp_path, monkeypatch, capsys):
    def build(config, input_dims, build_model=glow.build_model):
        model = build_model(config, input_dims)
        model.register_buffer('far', torch.tensor(math.inf))
        return model

    def fail(run):
        raise AssertionError('a step was taken')

    extend(monkeypatch, glow, build_model=build)
    monkeypatch.setattr(glow.Training, 'take_step', fail)
    words = ['--train', *TINY_GLOW, f'--output_dir={tmp_path}']
    assert 'its weights are not finite: far' in refusal_line(glow, capsys, *words)


def test_a_bug_is_not_reported_as_a_damaged_file(tmp_path, monkeypatch):
    run = train(glow, tmp_path)

    def build(config, input_dims):
        raise ZeroDivisionError

    extend(monkeypatch, glow, build_model=build)
    with pytest.raises(ZeroDivisionError):
        glow.load_checkpoint(run / 'best.pt')


# --------------------------------------------------------------------------- versions of the format


def score(script, path):
    """Return the score of a stored checkpoint on data that never changes."""
    saved = script.load_checkpoint(path)
    model, process = script.restore_model(saved, CPU), single_process(script)
    if script is glow:
        data = load_run_images(saved['config'], saved)
        return glow.bits_per_dim(model, data.test, 64, 64, process)[0]
    data = load_table('rings')
    return -bnaf.row_losses(bnaf.Objective(model, data), data.test[:1000], process).mean().item()


STORED_FILES = [
    (script, number)
    for script in SCRIPTS.values()
    for number in range(1, script.CHECKPOINT.number + 1)
]


@pytest.mark.parametrize('script, number', STORED_FILES)
def test_stored_checkpoints_of_all_formats_load_and_score_the_same(script, number, tmp_path):
    """If this has to change, raise the number of the format and store a new file."""
    path = STORED / f'{script.NAME}_{number}.pt'
    expected = json.loads((STORED / 'scores.json').read_text())[path.stem]
    assert load_tensors(path)['format'] == number
    assert score(script, path) == pytest.approx(expected, rel=1e-4)

    copy = tmp_path / 'checkpoint.pt'
    copy.write_bytes(path.read_bytes())
    step = script.load_checkpoint(copy)['step']
    n_epochs = script.load_checkpoint(copy)['config'].n_epochs + 1
    script.main(['--train', f'--restore_file={copy}', f'--n_epochs={n_epochs}'])
    assert script.load_checkpoint(copy)['step'] > step
    assert load_tensors(copy)['format'] == script.CHECKPOINT.number


@pytest.mark.parametrize('dataset, translate', [('mnist', 1), ('digits', 0)])
def test_what_format_2_means_is_said_in_format_3(dataset, translate):
    """The prior was a layer of the last level, and images of mnist were shifted by a pixel."""
    saved = load_tensors(STORED / 'glow_2.pt')
    saved['config']['dataset'] = dataset
    upgraded = glow.upgrade_from_2(saved)
    assert upgraded['config'] == {**saved['config'], 'translate': translate}
    assert upgraded['input_dims'] == [1, 8, 8, 0] and upgraded['condition']['names'] == []

    model = glow.build_model(glow.load_checkpoint(STORED / 'glow_2.pt')['config'], [1, 8, 8, 0])
    for part, prefix in (('model', ''), ('average', 'module.')):
        names = [key for key in saved[part] if key not in upgraded[part]]
        former = os.path.commonprefix(names)
        assert names == [f'{former}log_s', f'{former}b'] and former.startswith(f'{prefix}levels.1.')
        for name in ('log_s', 'b'):
            moved = upgraded[part][f'{prefix}prior.{name}']
            assert moved is saved[part][former + name] and moved.shape == model.prior.b.shape
        assert list(upgraded[part]) == [
            key.replace(former, f'{prefix}prior.') for key in saved[part]
        ]


@pytest.mark.parametrize(
    'number, advice', [(0, 'train again'), (None, 'train again'), (9, 'update the code')]
)
def test_other_formats_are_refused_by_name(number, advice, tmp_path):
    saved = load_tensors(STORED / 'glow_1.pt')
    saved['format'] = number
    if number is None:
        del saved['format']
    save_tensors(tmp_path / 'other.pt', saved)
    expected = f'it has format {number or 0}, and this version reads format 3: {advice}'
    with pytest.raises(UserError, match=expected):
        glow.load_checkpoint(tmp_path / 'other.pt')


def test_added_fields_and_options_leave_older_checkpoints_readable(monkeypatch):
    @dataclass
    class Config(glow.Config):
        added_option: int = option('model', 3, 'added later')

    added = {**glow.CHECKPOINT.fields, 'added_field': float}
    known = glow.CHECKPOINT.defaults
    changes = dict(config_class=Config, fields=added, defaults={**known, 'added_field': 0.5})
    monkeypatch.setattr(glow, 'CHECKPOINT', replace(glow.CHECKPOINT, **changes))
    saved = glow.load_checkpoint(STORED / 'glow_1.pt')
    assert saved['config'].added_option == 3 and saved['added_field'] == 0.5

    without = replace(glow.CHECKPOINT, defaults=known)
    with pytest.raises(UserError, match='added_field'):
        without.read(STORED / 'glow_1.pt')


def test_every_part_of_the_format_is_described():
    documented = CheckpointFormat.__doc__
    for field in fields(CheckpointFormat):
        assert f'{field.name}:' in documented


# ---------------------------------------------------------------------------- options of each mode


@pytest.mark.parametrize(
    'script, words, part',
    [
        (glow, '--evaluate --z_std=0.5', '--z_std goes with --generate or --visualize'),
        (glow, '--generate --vis_attrs=3', '--vis_attrs goes with --visualize, not with'),
        (glow, '--generate --n_samples=5', '--n_samples goes with --z_std'),
        (glow, '--train --n_samples=5 --z_std=1', 'goes with --generate'),
        (glow, '--check --resume', '--resume goes with --train'),
        (glow, '--visualize --detect_anomaly', '--detect_anomaly goes with --train'),
        (bnaf, '--generate --scores=x.csv', '--scores goes with --train or --evaluate'),
        (bnaf, '--train --input=x.csv', '--input goes with --evaluate'),
        (bnaf, '--evaluate --output=x.csv', '--output goes with --generate'),
        (bnaf, '--visualize --z_std=2', '--z_std goes with --generate'),
        (bnaf, '--evaluate --inverse_tol=1e-3', '--inverse_tol goes with'),
    ],
)
def test_options_that_a_mode_ignores_are_refused(script, words, part, capsys):
    assert part in refusal_line(script, capsys, *words.split())


def test_another_seed_of_samples_does_not_split_the_table_anew(trained_bnaf, monkeypatch):
    calls = []

    def watched(*args):
        calls.append(args)

    monkeypatch.setattr(bnaf, 'visualize', watched)
    for words in ([], ['--seed=5']):
        bnaf.main(['--visualize', f'--restore_file={trained_bnaf}', *words])
    (_, data, _, config, *_), (_, other_data, _, other_config, *_) = calls
    assert config.seed == 0 and other_config.seed == 5
    assert np.array_equal(data.test, other_data.test)


@pytest.mark.parametrize('script', SCRIPTS.values(), ids=SCRIPTS)
def test_help_shows_which_mode_takes_which_options(script, capsys):
    with pytest.raises(SystemExit):
        script.main(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    for mode, names in script.MODE_OPTIONS.items():
        assert f'--{mode}: {" ".join(sorted(names))}' in text

    known = {f.name for f in (*fields(script.Config), *fields(script.Request))}
    taken = set().union(*script.MODE_OPTIONS.values())
    assert taken <= known and script.MODE_OPTIONS.keys() == script.MODES.keys()


def test_temperature_of_an_edit_multiplies_the_latents_of_the_splits(trained_glow, monkeypatch):
    latents, decode = [], glow.decode

    def watched(model, z, y):
        latents.append(z)
        return decode(model, z, y)

    monkeypatch.setattr(glow, 'decode', watched)
    words = ['--visualize', f'--restore_file={trained_glow}', '--vis_attrs=3', '--vis_alphas=0,1']
    for temperature in ([], ['--z_std=1'], ['--z_std=0.6']):
        glow.main([*words, *temperature])
    plain, same, scaled = latents
    model = glow.restore_model(glow.load_checkpoint(trained_glow), CPU)
    n_last = math.prod(model.z_shapes[-1])
    assert torch.equal(plain, same) and 0 < n_last < plain.shape[1]
    torch.testing.assert_close(scaled[:, :-n_last], 0.6 * plain[:, :-n_last])
    assert torch.equal(scaled[:, -n_last:], plain[:, -n_last:])


# -------------------------------------------------------------------------------- what is logged


def test_the_speed_that_is_logged_is_that_since_the_last_log(tmp_path, monkeypatch):
    data = load_images('digits')
    config = glow.Config(**{**glow.DEFAULTS['digits'], 'depth': 1, 'width': 8, 'batch_size': 10})
    run = glow.Training(config, data, single_process(glow))
    clock = [0.0]
    monkeypatch.setattr(logs.time, 'perf_counter', lambda: clock[0])
    logged = []
    monkeypatch.setattr(
        logs.ScalarWriter, 'add', lambda self, step, scalars: logged.append(scalars)
    )
    with logs.TrainingLog(run, tmp_path, 'images', glow.format_score) as log:
        for seconds in (1, 1, 4, 4):
            clock[0] += seconds
            run.step += 1
            log.log_step(torch.tensor(1.0), torch.tensor(1.0), every=2)
        clock[0] += 1000  # a validation
        log.log_validation()
        for _ in range(2):
            clock[0] += 2
            run.step += 1
            log.log_step(torch.tensor(1.0), torch.tensor(1.0), every=2)
    measured = [scalars['images_per_s'] for scalars in logged if 'images_per_s' in scalars]
    assert measured == pytest.approx([10, 2.5, 5])


@pytest.mark.parametrize('dataset, label', [('rings', 'log_likelihood'), ('u1', 'kl')])
def test_the_curve_of_an_energy_is_one_of_kl(dataset, label, tmp_path):
    from faults import logged_scalars

    run = train(bnaf, tmp_path, f'--dataset={dataset}')
    tags = {tag for tag, _ in logged_scalars(run)}
    assert {f'{label}/train', f'{label}/validation'} <= tags
    (other_label,) = {'log_likelihood', 'kl'} - {label}
    assert not any(tag.startswith(other_label) for tag in tags)


@pytest.mark.parametrize('index', range(3))
def test_checking_names_the_layer_with_the_largest_error(index, trained_glow, monkeypatch, capsys):
    saved = glow.load_checkpoint(trained_glow)
    model = glow.restore_model(saved, CPU)
    layer = model.levels[0][1][index]
    inverse = layer.inverse
    monkeypatch.setattr(layer, 'inverse', lambda z: (inverse(z)[0] + 0.25, inverse(z)[1]))
    glow.check(model, load_images('digits'), saved['config'], CPU)
    name = f'levels.0.1.{index} ({type(layer).__name__}), 0.25'
    assert f'worst layer: {name}' in capsys.readouterr().out


def test_a_training_closes_its_files(tmp_path):
    gc.collect()  # of what earlier tests have left
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        train(glow, tmp_path)
        gc.collect()
    assert not [str(warning.message) for warning in caught if 'unclosed' in str(warning.message)]


def test_checkpoints_are_saved_by_time(tmp_path, monkeypatch):
    saves, clock = [], [0.0]
    take_step, save = glow.Training.take_step, glow.save_checkpoint

    def minute_of_work(run):
        clock[0] += 60
        return take_step(run)

    def watched(run, log, path):
        saves.append((run.step, path.name))
        save(run, log, path)

    monkeypatch.setattr(glow.Training, 'take_step', minute_of_work)
    monkeypatch.setattr(glow, 'save_checkpoint', watched)
    monkeypatch.setattr(time, 'monotonic', lambda: clock[0])
    train(glow, tmp_path, '--n_epochs=5')
    saved_steps = [step for step, name in saves if name == 'checkpoint.pt']
    assert saved_steps == [0, 10, 20, 29]


# ------------------------------------------------------------------------------------- the launcher


@pytest.mark.parametrize(
    'environment, expected',
    [
        ({}, 'python'),
        ({'LOCAL_WORLD_SIZE': '8', 'GROUP_WORLD_SIZE': '1'}, 'torchrun --nproc_per_node=8'),
        (
            {'LOCAL_WORLD_SIZE': '8', 'GROUP_WORLD_SIZE': '4'},
            'torchrun --nnodes=4 --nproc_per_node=8',
        ),
    ],
)
def test_the_line_to_go_on_names_the_launcher(environment, expected, monkeypatch):
    monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)
    if environment:
        monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launcher() == expected
