"""The commands: as a user types them, in several processes, stopped and resumed, and with bad input."""

import json
import math
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tiny_data import (
    attribute_rows,
    noise_image,
    write_celeba,
    write_folder,
    write_mnist,
    write_table,
)

import glow
from common.errors import UserError
from common.files import make_new_folder
from datasets import load_images

SCRIPT = Path(glow.__file__)
TINY = ['--depth=1', '--width=8', '--n_epochs=1', '--batch_size=128']
ALONE = glow.Process(rank=0, world_size=1, device=torch.device('cpu'))


def command(*words, cwd, code=0, **variables):
    """Run a command of its own process, as a user would -> its output and its errors"""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', **variables}
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def refused(capsys, *words):
    """Run glow.py here, expecting a refusal -> its one line"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        glow.main([str(word) for word in words])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith('glow.py: error: ') and not any(
        'Traceback' in line for line in lines
    ), lines
    assert len(lines) == 1 or 'step/s' in lines[0], lines  # nothing beside it but a progress bar
    return lines[-1]


def only(paths):
    (path,) = paths
    return path


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Folder with a tiny trained model of scikit-learn's digits -> path of its best.pt"""
    folder = tmp_path_factory.mktemp('digits')
    glow.main(
        ['--train', '--dataset=digits', f'--output_dir={folder}', f'--data_dir={folder}', *TINY]
    )
    return only(folder.glob('glow_digits_*/best.pt'))


def test_the_four_lines(tmp_path):
    """On drawn faces in an empty folder, model and data made small"""
    out, _ = command(
        '-m',
        'torch.distributed.launch',
        SCRIPT,
        '--train',
        '--image_size=16',
        '--n_levels=1',
        *TINY,
        '--batch_size=256',
        cwd=tmp_path,
    )
    assert (
        ' parameters, step 0 of at most 39\nnote: after so few steps' in out
        and 'faces test: ' in out
        and 'best.pt' in out
    )
    run = only((tmp_path / 'results').iterdir())
    assert {'checkpoint.pt', 'best.pt', 'results.json'} <= {path.name for path in run.iterdir()}
    assert list(run.glob('events.out.tfevents.*')) and list(run.glob('samples_at_step_*.png'))
    trained_result = json.loads((run / 'results.json').read_text())

    out, _ = command(SCRIPT, '--evaluate', cwd=tmp_path)
    assert 'restored results/' in out and 'step 39' in out
    assert json.loads((run / 'results.json').read_text()) == trained_result
    assert f'{trained_result["bits_per_dim"]:.4f}' in out and trained_result['n_images'] == 1000

    command(SCRIPT, '--generate', '--z_std=0.7', cwd=tmp_path)
    picture = Image.open(run / 'generated_samples_at_z_std_0.7.png')
    assert picture.size == (
        8 + 8 * 136,
        8 + 4 * 136,
    )  # 32 samples, 8 a row, 16 pixels enlarged 8 times

    command(SCRIPT, '--visualize', '--vis_attrs=8,20', cwd=tmp_path)
    assert (run / 'manipulated_sample_attr_8,20.png').exists()


@pytest.mark.parametrize(
    'launcher',
    [
        ('-m', 'torch.distributed.launch', '--nproc_per_node=2'),
        ('-m', 'torch.distributed.run', '--nproc_per_node=2'),
    ],
)
def test_two_processes(launcher, tmp_path, trained):
    where = dict(cwd=tmp_path, CUDA_VISIBLE_DEVICES='')  # two processes need two GPUs or none
    command(
        *launcher,
        SCRIPT,
        '--train',
        '--distributed',
        '--dataset=digits',
        *TINY,
        '--batch_size=64',
        **where,
    )
    run = only((tmp_path / 'results').iterdir())
    assert glow.load_checkpoint(run / 'best.pt')['step'] == 1439 // 128
    with_two = json.loads((run / 'results.json').read_text())
    command(SCRIPT, '--evaluate', '--batch_size=7', **where)
    with_one = json.loads((run / 'results.json').read_text())
    assert with_one == {
        **with_two,
        **{
            key: pytest.approx(with_two[key], rel=1e-6)
            for key in ('bits_per_dim', 'two_standard_errors')
        },
    }


def test_old_spelling_of_local_rank(trained, tmp_path):
    for word in ('--local_rank=0', '--local-rank=0', '--local_rank 0'):
        glow.main([*word.split(), '--evaluate', f'--restore_file={trained}'])


def first_gradients(rank, world_size, folder):
    """Gradients of the first step on this process's share of one joint batch, and the weights it started from"""
    torch.manual_seed(1000 + rank)  # nothing may depend on it
    if world_size > 1:
        dist.init_process_group('gloo', f'file://{folder}/meet', rank=rank, world_size=world_size)
    data = load_images('digits')
    config = glow.Config(**{**glow.DEFAULTS['digits'], 'dataset': 'digits', 'depth': 2, 'width': 8})
    run = glow.Training(config, data, glow.Process(rank, world_size, torch.device('cpu')))
    start = {key: value.clone() for key, value in run.model.state_dict().items()}
    share = slice(rank * 32 // world_size, (rank + 1) * 32 // world_size)
    u = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    run.objective(torch.from_numpy(data.train.images[:32])[share], u[share]).backward()
    gradients = {key: value.grad for key, value in run.model.named_parameters()}
    torch.save((start, gradients), f'{folder}/{rank}_of_{world_size}.pt')
    if world_size > 1:
        dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    first_gradients(0, 1, tmp_path)
    torch.multiprocessing.spawn(first_gradients, (2, tmp_path), nprocs=2)
    start, gradients = torch.load(tmp_path / '0_of_1.pt')
    for rank in (0, 1):
        start_here, gradients_here = torch.load(tmp_path / f'{rank}_of_2.pt')
        for key, value in start.items():
            assert torch.equal(value, start_here[key]), key
        for key, value in gradients.items():
            torch.testing.assert_close(gradients_here[key], value, rtol=1e-4, atol=1e-6)


def test_resuming_is_as_if_it_had_never_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)  # bit for bit on a CPU only
    words = [
        '--train',
        '--dataset=digits',
        '--n_epochs=4',
        *TINY[:2],
        '--batch_size=128',
        f'--data_dir={tmp_path}',
    ]
    glow.main([*words, f'--output_dir={tmp_path}/whole'])
    monkeypatch.setattr(glow, 'SAVE_STEPS', 7)
    take_step = glow.Training.take_step

    def dies_at_step_18(run):
        if run.step == 18:
            raise ZeroDivisionError
        return take_step(run)

    monkeypatch.setattr(glow.Training, 'take_step', dies_at_step_18)
    with pytest.raises(ZeroDivisionError):
        glow.main([*words, f'--output_dir={tmp_path}/stopped'])
    monkeypatch.setattr(glow.Training, 'take_step', take_step)
    stopped = only(tmp_path.glob('stopped/*/checkpoint.pt'))
    assert (
        glow.load_checkpoint(stopped)['step'] == 14
    )  # in the middle of the second epoch of 11 steps
    glow.main(['--train', f'--restore_file={stopped}'])
    whole, resumed = (
        torch.load(only(tmp_path.glob(f'{run}/*/checkpoint.pt'))) for run in ('whole', 'stopped')
    )
    assert whole['step'] == resumed['step'] == 44
    for name in ('model', 'average'):
        for key, value in whole[name].items():
            assert torch.equal(value, resumed[name][key]), key
    for i, state in whole['optimizer']['state'].items():
        for key, value in state.items():
            assert torch.equal(value, resumed['optimizer']['state'][i][key]), (i, key)
    assert (
        whole['validation_loss'] == resumed['validation_loss'] and whole['best'] == resumed['best']
    )


def test_a_later_state_is_not_overwritten(trained, tmp_path, capsys):
    """best.pt goes on only in a folder of its own, or where it is the last state, and leaves a best.pt there"""
    saved = torch.load(trained)
    torch.save({**saved, 'step': saved['step'] + 7}, tmp_path / 'checkpoint.pt')
    torch.save({**saved, 'best': 0.0}, tmp_path / 'best.pt')
    line = refused(capsys, '--train', f'--restore_file={tmp_path}/best.pt', '--n_epochs=2')
    assert f'{tmp_path}/checkpoint.pt is at a later step' in line
    (tmp_path / 'own').mkdir()
    (tmp_path / 'best.pt').rename(tmp_path / 'own' / 'start.pt')
    glow.main(['--train', f'--restore_file={tmp_path}/own/start.pt', '--n_epochs=2'])
    assert glow.load_checkpoint(tmp_path / 'own' / 'best.pt')['step'] == 22


def test_runs_that_start_together_get_folders_of_their_own(tmp_path):
    folders = [make_new_folder(tmp_path / 'results' / 'run') for _ in range(3)]
    assert [folder.name for folder in folders] == ['run', 'run-2', 'run-3'] and all(
        folder.is_dir() for folder in folders
    )


def test_an_error_of_one_process_is_said_by_it_and_a_common_one_once(monkeypatch, capsys):
    monkeypatch.setenv('LOCAL_RANK', '1')
    for error, said in (
        (glow.UserError('no data'), ''),
        (OSError('no space left'), 'glow.py: error: no space left\n'),
    ):

        def start(*_, error=error):
            raise error

        monkeypatch.setattr(glow, 'start', start)
        with pytest.raises(SystemExit, match='2'):
            glow.main(['--train'])
        assert capsys.readouterr().err == said


def test_more_processes_than_images(trained):
    model, images = (
        glow.restore_model(glow.load_checkpoint(trained), torch.device('cpu')),
        load_images('digits').test.images,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, 'all_reduce', lambda sums: None)
        mean, error = glow.bits_per_dim(
            model, images[:1], 64, 10, glow.Process(3, 8, torch.device('cpu'))
        )
    assert mean == error == 0  # this process's share of the sum


@pytest.mark.parametrize('precision', [(), ('--bf16',)])
def test_training_learns_and_the_average_can_be_turned_off(precision, tmp_path):
    glow.main(
        [
            '--train',
            '--dataset=digits',
            '--depth=2',
            '--width=16',
            '--n_epochs=6',
            '--lr=0.01',
            '--ema_decay=0',
            f'--output_dir={tmp_path}',
            f'--data_dir={tmp_path}',
            *precision,
        ]
    )
    saved = glow.load_checkpoint(only(tmp_path.glob('*/best.pt')))
    for key, value in saved['model'].items():
        assert torch.equal(value, saved['average'][f'module.{key}']), key
    assert saved['validation_loss'] < 3  # four bits a value is what guessing needs


def test_compiled_steps_have_the_same_gradients(monkeypatch):
    """Traced as for the compiler, and run by torch itself: compiling in earnest takes minutes"""
    compile_module, data, gradients = torch.nn.Module.compile, load_images('digits'), []
    monkeypatch.setattr(
        torch.nn.Module, 'compile', lambda module: compile_module(module, backend='aot_eager')
    )
    for compiled in (False, True):
        run = glow.Training(
            glow.Config(**{**glow.DEFAULTS['digits'], 'width': 8, 'compile': compiled}), data, ALONE
        )
        assert compiled == any(
            module._compiled_call_impl is not None for module in run.model.modules()
        )
        run.objective(*glow.training_batch(data, run.config, 0, ALONE)).backward()
        gradients.append({name: p.grad for name, p in run.model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_compiling_without_a_compiler(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    assert 'install g++' in refused(
        capsys, '--train', '--dataset=digits', '--compile', f'--output_dir={tmp_path}'
    )


def test_learning_rate():
    config = replace(glow.Config(), lr=1.0, lr_decay=0.25, n_epochs=10, n_epochs_warmup=0.5)
    rates = [glow.learning_rate(config, step, per_epoch=20) for step in range(200)]
    assert rates[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1])
    assert set(rates[10:150]) == {1.0}
    assert rates[150:] == pytest.approx([i / 50 for i in range(50, 0, -1)])


def test_every_image_of_an_epoch_is_seen_once(tmp_path):
    data = load_images('digits')
    config = glow.Config(dataset='digits', batch_size=10)
    n = glow.steps_per_epoch(1439, config.batch_size, world_size=2)
    assert n == 1439 // 20
    numbered = replace(data, train=replace(data.train, images=np.arange(1439)[:, None, None, None]))
    for epoch in (0, 1):
        seen = [
            glow.training_batch(
                numbered, config, epoch * n + k, glow.Process(rank, 2, torch.device('cpu'))
            )[0]
            for k in range(n)
            for rank in (0, 1)
        ]
        assert len(torch.cat(seen).unique()) == n * 20


def test_generate(trained, capsys):
    glow.main(['--generate', f'--restore_file={trained}'])
    picture = Image.open(trained.with_name('generated_samples_at_z_std_range.png'))
    assert picture.height == 8 + 8 * 136 and picture.width > 8 + 4 * 136
    glow.main(['--generate', f'--restore_file={trained}', '--z_std=0', '--n_samples=3'])
    picture = np.asarray(Image.open(trained.with_name('generated_samples_at_z_std_0.png')))
    cells = [picture[8:136, 8 + 136 * i : 136 * (i + 1)] for i in range(3)]
    assert (cells[0] == cells[1]).all() and (
        cells[0] == cells[2]
    ).all()  # no noise is left at temperature 0


def test_bf16_beyond_training_is_for_the_asking(trained):
    results = trained.with_name('results.json')
    figures = []
    for words in ([], ['--bf16'], []):
        glow.main(['--evaluate', f'--restore_file={trained}', *words])
        figures.append(json.loads(results.read_text())['bits_per_dim'])
    assert figures[0] == figures[2] != figures[1] == pytest.approx(figures[0], abs=0.02)


def test_directions_are_kept_apart_by_precision(trained, tmp_path):
    """Also of a model that was trained in bf16, which is used in float32 unless asked otherwise"""
    saved = torch.load(trained)
    torch.save({**saved, 'config': {**saved['config'], 'bf16': True}}, tmp_path / 'best.pt')
    for words, n in (([], 1), (['--bf16'], 2), ([], 2)):
        glow.main(['--visualize', f'--restore_file={tmp_path}/best.pt', '--vis_attrs=3', *words])
        assert len(list(tmp_path.glob('attribute_directions_*.pt'))) == n


def test_samples_are_sorted_by_log_probability(trained):
    model = glow.restore_model(glow.load_checkpoint(trained), torch.device('cpu'))
    images = torch.from_numpy(glow.sample_rows(model, [0.7], 16, 0, 'cpu')[0])
    with torch.no_grad():
        log_p = model.log_prob(images, torch.full(images.shape, 0.5))
    assert log_p[:4].mean() > log_p[-4:].mean()


def test_visualize_leaves_the_image_unchanged_in_the_middle(trained):
    glow.main(
        [
            '--visualize',
            f'--restore_file={trained}',
            '--vis_attrs',
            '3',
            '8',
            '--vis_alphas',
            '-1 0,1',
        ]
    )
    picture = np.asarray(Image.open(trained.with_name('manipulated_sample_attr_3,8.png')))
    height, width = picture.shape[:2]
    left, top = width - 3 * 136, height - 2 * 136
    image = load_images('digits').test.images[0, 0].repeat(16, 0).repeat(16, 1)
    for row in (0, 1):
        cells = [picture[top + 136 * row :, left + 136 * i :][:128, :128, 0] for i in range(3)]
        assert (cells[1] == image).all()
        assert (cells[0] != image).any() and (cells[2] != image).any()


def test_visualize_every_attribute_and_a_photo(trained, tmp_path):
    photo = tmp_path / 'my photo.tiff'
    Image.new('CMYK', (31, 57), (10, 80, 30, 0)).save(photo)
    glow.main(['--visualize', f'--restore_file={trained}', '--vis_attrs=3', f'--vis_img={photo}'])
    assert trained.with_name('manipulated_img_my photo_attr_3.png').exists()
    glow.main(['--visualize', f'--restore_file={trained}'])
    picture = Image.open(trained.with_name('manipulated_sample_attr_all.png'))
    assert picture.height == 34 + 10 * 136


def test_attribute_directions_are_differences_of_means(trained):
    saved = glow.load_checkpoint(trained)
    model, data = glow.restore_model(saved, torch.device('cpu')), load_images('digits')
    dz = glow.attribute_directions(model, data, trained, saved['config'], torch.device('cpu'))
    z = glow.encode(model, data.train.images, torch.device('cpu')).double()
    has = torch.from_numpy(data.train.attributes[:, 5])
    torch.testing.assert_close(
        dz[5].double(), 1.6 * (z[has].mean(0) - z[~has].mean(0)), rtol=1e-3, atol=1e-4
    )


def test_bits_per_dim_of_mnist_counts_784_values(trained):
    model = glow.restore_model(glow.load_checkpoint(trained), torch.device('cpu'))
    images = load_images('digits').test.images
    by_64, _ = glow.bits_per_dim(model, images, 64, 50, ALONE)
    by_32, _ = glow.bits_per_dim(model, images, 32, 11, ALONE)
    assert by_32 == pytest.approx(2 * by_64, rel=1e-6)


def test_every_command_of_the_readme(tmp_path, monkeypatch):
    """As written, on small data under the names used there; training is made small by options added at the end"""
    readme = SCRIPT.with_name('README.md').read_text()
    commands = re.findall(
        r'(?:python|torchrun)[^`\n|]*?glow\.py( --[^h][^`\n|#]*)', readme
    )  # all but --help
    assert {
        word
        for line in commands
        for word in ('train', 'evaluate', 'generate', 'visualize')
        if word in line
    } == {'train', 'evaluate', 'generate', 'visualize'}
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / 'DATA')
    write_celeba(tmp_path / 'CELEBA')
    write_folder(tmp_path / 'DATA', size=70)
    write_table(
        tmp_path / 'DATA',
        attribute_rows()[:1] + [(*row[:3], -row[2]) for row in attribute_rows()[1:]],
    )
    noise_image(300, 200).save('me.jpg')
    glow.main(['--train', '--image_size=16', *TINY])
    faces = only(tmp_path.glob('results/*/best.pt'))
    (tmp_path / 'results' / 'RUN').mkdir()
    for name in ('best.pt', 'checkpoint.pt'):
        (tmp_path / 'results' / 'RUN' / name).write_bytes(faces.with_name(name).read_bytes())
    for line in dict.fromkeys(commands):
        words = shlex.split(line)
        if '--restore_file' in line or '--resume' in line:
            words = [word for word in words if not word.startswith('--n_epochs')]
        elif '--train' in words:
            words += [*TINY, '--batch_size=4', '--batch_size_init=8']
            words += ['--image_size=16', '--batch_size=256'] * ('--dataset' not in line)
        else:
            words += [f'--restore_file={faces}']
        glow.main(words)


def test_the_readmes_python(trained, tmp_path, monkeypatch):
    """As written, but for the checkpoint and the data; the 3 is itself at first, and all ends are the test digits"""
    (code,) = re.findall(
        r'```python\n(.*?)```', SCRIPT.with_name('README.md').read_text(), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    exec(code.replace('results/RUN/best.pt', str(trained)), names := {})
    images = names['data'].test.images
    assert (names['rows'][0][0] // 16 == names['three'][0] // 16).all() and len(names['rows']) == 4
    assert all(
        (row[[0, -1]] // 16 == images[2 * k : 2 * k + 2] // 16).all()
        for k, row in enumerate(names['rows'][1:])
    )
    assert Image.open('interpolations.png').width > 9 * 8


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    'words, part',
    [
        ([], 'one of the arguments --train --evaluate --generate --visualize --check is required'),
        (['--train', '--evaluate'], 'not allowed with'),
        (['--train', '--dataset=imagenet'], 'faces, digits, mnist, cifar10, celeba, folder'),
        (['--train', '--dataset=mnist'], 'train-images-idx3-ubyte'),
        (['--train', '--dataset=celeba'], 'img_align_celeba'),
        (['--train', '--dataset=folder'], '--data_dir'),
        (['--train', '--n_bits=0'], '1..8'),
        (['--train', '--n_bits=9'], '1..8'),
        (['--train', '--lr=nan'], 'outside'),
        (['--train', '--depth=-3'], 'outside'),
        (['--train', '--depth=many'], 'invalid int value'),
        (['--train', f'--seed={10**20}'], 'outside'),
        (['--train', '--dataset=digits', '--n_levels=3'], 'not divisible by 2^(n_levels + 1) = 16'),
        (['--train', '--dataset=digits', '--image_size=16'], '--image_size'),
        (['--train', '--no_such_option'], 'unrecognized arguments'),
        (['--evaluate'], 'python glow.py --train'),
        (['--generate', '--restore_file=nowhere.pt'], 'nowhere.pt: no such checkpoint'),
        (
            ['--generate', '--restore_file=.'],
            '.: no such checkpoint, but a folder: give its best.pt',
        ),
        (['--train', '--resume', '--max_skips=-1'], 'outside'),
        (['--visualize', '--vis_alphas', ''], '--vis_alphas is empty'),
        (['--visualize', '--vis_alphas=-1,x'], '--vis_alphas'),
        (['--visualize', '--vis_alphas=0,nan'], 'outside -1000..1000'),
        (['--visualize', '--vis_alphas', '-1001'], 'outside -1000..1000'),
    ],
)
def test_bad_commands(words, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert part in refused(capsys, *words)
    assert not list(tmp_path.rglob('*.p*'))  # neither checkpoint nor picture


@pytest.mark.parametrize(
    'words, part',
    [
        (['--evaluate', '--depth=7'], '--depth=7 contradicts'),
        (['--train', '--dataset=mnist'], 'dataset=digits'),
        (['--train', '--lr=0.1'], 'lr=0.001'),
        (['--visualize', '--vis_attrs=10'], 'out of range: there are 0 to 9'),
        (['--visualize', '--vis_attrs=-1'], 'out of range'),
        (['--visualize', '--vis_attrs=three'], 'unknown attribute'),
        (['--evaluate', '--plain_conv1x1'], 'plain_conv1x1=False'),
        (['--visualize', '--vis_img=no.jpg'], 'no.jpg'),
    ],
)
def test_bad_commands_for_a_checkpoint(words, part, trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.parent.iterdir()}
    assert part in refused(capsys, *words, f'--restore_file={trained}')
    assert before == {path: path.stat().st_mtime_ns for path in trained.parent.iterdir()}


class Payload:
    def __reduce__(self):
        return os.mkdir, (f'{os.environ["CANARY"]}',)


def test_bad_checkpoints(trained, tmp_path, monkeypatch, capsys):
    whole, file = trained.read_bytes(), tmp_path / 'bad.pt'
    monkeypatch.setenv('CANARY', str(tmp_path / 'canary'))
    saved = torch.load(trained)
    cases = {
        'truncated': whole[: len(whole) // 2],
        'empty': b'',
        'text': b'hello',
        'pickle': pickle.dumps(Payload()),
    }
    for name, content in cases.items():
        file.write_bytes(content)
        assert 'cannot be read as a checkpoint' in refused(
            capsys, '--generate', f'--restore_file={file}'
        ), name
    torch.save({**saved, 'extra': Payload()}, file)
    assert 'holds more than tensors' in refused(capsys, '--generate', f'--restore_file={file}')
    assert not (tmp_path / 'canary').exists()
    torch.save({**saved, 'script': 'bnaf.py'}, file)
    assert 'not a checkpoint of glow.py' in refused(capsys, '--generate', f'--restore_file={file}')
    torch.save({**saved, 'config': {**saved['config'], 'colour': 'red'}}, file)
    assert 'another version' in refused(capsys, '--generate', f'--restore_file={file}')
    for change in (
        {'config': {**saved['config'], 'depth': 'x'}},
        {'config': {**saved['config'], 'n_bits': 9}},
        {'input_dims': [8]},
        {'input_dims': [1, 8, 10**9]},
        {'step': 'a'},
        {'validation_loss': 'x'},
        {'model': 3},
    ):
        torch.save({**saved, **change}, file)
        assert 'another version' in refused(capsys, '--generate', f'--restore_file={file}'), change
    nan = {**saved['model'], 'levels.0.1.0.b': saved['model']['levels.0.1.0.b'] * math.nan}
    moments = {
        i: {**state, 'exp_avg': state['exp_avg'].flatten()[:1].repeat(3)}
        for i, state in saved['optimizer']['state'].items()
    }
    for change, part in (
        ({'config': {**saved['config'], 'width': 7}}, 'size mismatch'),
        ({'model': {}}, 'more weights'),
        ({'config': {**saved['config'], 'width': 2**14, 'depth': 2**7}}, 'damaged'),
        ({'optimizer': {}}, ''),
        ({'optimizer': {**saved['optimizer'], 'state': moments}}, 'other shapes'),
        ({'more': 1}, 'unknown'),
        ({'model': nan}, 'not finite'),
        ({'config': {**saved['config'], 'data_dir': '\33[2J'}}, 'printable'),
    ):
        torch.save({**saved, **change}, file)
        line = refused(capsys, '--generate', f'--restore_file={file}')
        assert 'damaged' in line and part in line and line.isprintable(), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ['bad.pt']


def test_divergence_stops_with_one_line_and_is_never_saved(tmp_path, capsys):
    line = refused(
        capsys,
        '--train',
        '--dataset=digits',
        '--lr=1e6',
        '--n_epochs_warmup=0',
        '--max_skips=3',
        *TINY,
        f'--output_dir={tmp_path}',
        f'--data_dir={tmp_path}',
    )
    assert (
        'at step 5, learning rate 1e+06' in line
        and 'not finite (4 steps skipped in a row); start again with a lower --lr' in line
    )
    assert (
        glow.load_checkpoint(only(tmp_path.rglob('*.pt')))['step'] == 0
    )  # named in the line, and as good as new
    assert str(only(tmp_path.rglob('*.pt'))) in line


def test_a_validation_that_is_not_finite_stops_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(glow, 'bits_per_dim', lambda *args: (math.nan, math.nan))
    line = refused(
        capsys,
        '--train',
        '--dataset=digits',
        *TINY,
        f'--output_dir={tmp_path}',
        f'--data_dir={tmp_path}',
    )
    assert (
        'diverged: at step 11' in line
        and 'not finite (0 steps skipped' in line
        and 'lower --lr' in line
    )
    assert glow.load_checkpoint(only(tmp_path.rglob('*.pt')))['step'] == 0


def test_a_model_that_cannot_be_sampled_is_trained_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(glow, 'sample_rows', lambda *args: torch.linalg.inv(torch.zeros(2, 2)))
    glow.main(
        ['--train', '--dataset=digits', *TINY, f'--output_dir={tmp_path}', f'--data_dir={tmp_path}']
    )
    assert 'no picture: linalg.inv' in capsys.readouterr().out and only(
        tmp_path.rglob('results.json')
    )


def test_a_signal_at_the_last_validation_ends_the_program(tmp_path, monkeypatch, capsys):
    validate = glow.Training.validate
    monkeypatch.setattr(
        glow.Training,
        'validate',
        lambda run, folder: (validate(run, folder), signal.raise_signal(signal.SIGTERM)),
    )
    words = [
        '--train',
        '--dataset=digits',
        *TINY,
        f'--output_dir={tmp_path}',
        f'--data_dir={tmp_path}',
    ]
    glow.main(words)
    assert 'stopped after step 11 by SIGTERM; to go on' in capsys.readouterr().out and not list(
        tmp_path.rglob('results.json')
    )
    glow.main([*words, '--resume'])
    assert only(tmp_path.rglob('results.json'))  # nothing was left but the evaluation


def test_steps_without_finite_gradients_are_skipped(tmp_path, monkeypatch):
    """A batch of NaNs changes nothing, the next one does; Adam's count of steps leaves it out"""
    data = load_images('digits')
    run = glow.Training(
        glow.Config(dataset='digits', image_size=8, n_levels=1, depth=1, width=8), data, ALONE
    )
    batch = glow.training_batch
    monkeypatch.setattr(
        glow,
        'training_batch',
        lambda *args: (batch(*args)[0], batch(*args)[1] * (math.nan if run.step == 1 else 1)),
    )
    states = []
    for _ in range(3):
        run.take_step()
        states.append(
            {
                key: value.clone()
                for key, value in (
                    *run.model.state_dict().items(),
                    *run.average.state_dict().items(),
                )
            }
        )
    same = [
        all(torch.equal(before[key], after[key]) for key in before)
        for before, after in zip(states, states[1:])
    ]
    assert (
        same == [True, False] and run.step == 3 and run.n_skipped == 1 and run.skips_in_a_row == 0
    )
    assert next(iter(run.optimizer.state.values()))['step'] == 2


def test_attributes_that_never_differ_cannot_be_visualized():
    data = load_images('digits')
    alike = replace(data, train=replace(data.train, attributes=np.ones_like(data.train.attributes)))
    for texts in (None, ['3']):
        with pytest.raises(UserError, match='the images of digits have no attributes that differ'):
            alike.editable(texts, 100, 'digits')
    assert data.editable(None, 100, 'digits') == list(range(10))


def test_folder_without_attributes_cannot_be_visualized(tmp_path, capsys):
    photos = tmp_path / 'photos'
    write_folder(photos)
    options = [f'--data_dir={photos}', f'--output_dir={tmp_path}/out']
    glow.main(['--train', '--dataset=folder', '--image_size=16', '--n_levels=1', *TINY, *options])
    assert 'no attributes' in refused(capsys, '--visualize', *options[1:])
    write_table(photos, attribute_rows())
    glow.main(['--visualize', *options[1:]])
    assert 'the same in all training images' in refused(
        capsys, '--visualize', '--vis_attrs=Big', *options[1:]
    )
    assert only(tmp_path.glob('out/*/manipulated_sample_attr_all.png'))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_out_of_gpu_memory(tmp_path, capsys):
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        line = refused(
            capsys, '--train', '--dataset=digits', '--width=4096', f'--output_dir={tmp_path}'
        )
        assert 'lower --batch_size' in line
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
