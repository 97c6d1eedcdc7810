"""bnaf.py as a user types it: every mode, several processes, stopped and resumed, tables in and out, bad input."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import tiny_tables
import torch
import torch.distributed as dist
from test_glow_commands import command, only

import bnaf
import glow
from common.runs import find_run
from datasets import tabular

SCRIPT = Path(bnaf.__file__)
TINY = ['--n_flows=2', '--hidden_dim=4', '--n_epochs=2', '--batch_size=40']
ALONE = bnaf.Process(rank=0, world_size=1, device=torch.device('cpu'))


def refused(capsys, *words):
    """Run bnaf.py here, expecting a refusal -> its one line"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        bnaf.main([str(word) for word in words])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith('bnaf.py: error: ') and not any(
        'Traceback' in line for line in lines
    ), lines
    assert len(lines) == 1 or 'step/s' in lines[0], lines
    return lines[-1]


def gaussian_table(n=400):
    rng = np.random.default_rng(0)
    height = 170 + 10 * rng.normal(size=n)
    return pd.DataFrame(
        {
            'height': height,
            'weight': 70 + 0.6 * (height - 170) + 5 * rng.normal(size=n),
            'age': 40 + 12 * rng.normal(size=n),
        }
    )


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A model of a small table -> path of its best.pt; the table lies beside its run's folder"""
    folder = tmp_path_factory.mktemp('people')
    gaussian_table().to_csv(folder / 'people.csv', index=False)
    bnaf.main(
        [
            '--train',
            f'--dataset={folder}/people.csv',
            f'--output_dir={folder}',
            '--n_flows=1',
            '--hidden_dim=8',
            '--n_epochs=40',
            '--batch_size=20',
            '--ema_decay=0.95',
        ]
    )
    return only(folder.glob('bnaf_people_*/best.pt'))


def test_the_lines_of_the_default(tmp_path):
    out, _ = command(SCRIPT, '--train', '--n_epochs=4', '--hidden_dim=20', cwd=tmp_path)
    assert (
        ' parameters, step 0 of at most 400\nnote: after so few steps' in out
        and '8gaussians test: -' in out
        and 'best.pt' in out
    )
    run = only((tmp_path / 'results').iterdir())
    assert list(run.glob('events.out.tfevents.*'))
    result = json.loads((run / 'results.json').read_text())
    out, _ = command(SCRIPT, '--evaluate', cwd=tmp_path)
    assert f'{result["log_likelihood_nats"]:.4f} ± ' in out and result['n_rows'] == 50_000
    assert json.loads((run / 'results.json').read_text()) == result
    command(SCRIPT, '--generate', cwd=tmp_path)
    assert len(pd.read_csv(run / 'generated_samples.csv')) == 1000
    command(SCRIPT, '--visualize', cwd=tmp_path)
    assert (run / 'visualization.png').stat().st_size > 10_000


def test_matching_an_energy(tmp_path, capsys):
    bnaf.main(
        ['--train', '--dataset=u1', '--hidden_dim=20', '--n_epochs=6', f'--output_dir={tmp_path}']
    )
    best = only(tmp_path.glob('bnaf_u1_*/best.pt'))
    out = capsys.readouterr().out
    assert 'KL(q || p)' in out and 'effective sample size' in out
    result = json.loads(best.with_name('results.json').read_text())
    assert 0 < result['kl_nats'] < 5 and 0 < result['effective_sample_size'] <= 1
    bnaf.main(['--generate', f'--restore_file={best}', '--n_samples=50'])
    bnaf.main(['--visualize', f'--restore_file={best}'])
    samples = pd.read_csv(best.with_name('generated_samples.csv'))
    model = bnaf.restore_model(bnaf.load_checkpoint(best), torch.device('cpu'))
    p = bnaf.density(model, tabular.load_table('u1'), samples[['x1', 'x2']].to_numpy())
    np.testing.assert_allclose(
        np.log(p), samples['log_likelihood'], atol=1e-6
    )  # pushed forward and pulled back


def test_two_processes(tmp_path):
    rows = tiny_tables.columns_of(np.random.default_rng(0), 500, 4)
    np.save(tmp_path / 'my.npy', rows)
    where = dict(cwd=tmp_path, CUDA_VISIBLE_DEVICES='')
    command(
        '-m',
        'torch.distributed.launch',
        '--nproc_per_node=2',
        SCRIPT,
        '--train',
        '--dataset=my.npy',
        *TINY,
        **where,
    )
    run = only((tmp_path / 'results').iterdir())
    with_two = json.loads((run / 'results.json').read_text())
    assert with_two['n_rows'] == 50
    command(SCRIPT, '--evaluate', **where)
    with_one = json.loads((run / 'results.json').read_text())
    assert with_one['log_likelihood_nats'] == pytest.approx(
        with_two['log_likelihood_nats'], rel=1e-6
    )


def first_gradients(rank, world_size, folder):
    """Gradients of the first step on this process's share of one joint batch"""
    torch.manual_seed(1000 + rank)  # nothing may depend on it
    if world_size > 1:
        dist.init_process_group('gloo', f'file://{folder}/meet', rank=rank, world_size=world_size)
    config = bnaf.Config(**{**bnaf.TOY, 'hidden_dim': 8})
    run = bnaf.Training(
        config, tabular.load_table('moons'), bnaf.Process(rank, world_size, torch.device('cpu'))
    )
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    run.objective(x[rank * 32 // world_size : (rank + 1) * 32 // world_size]).backward()
    torch.save(
        {key: value.grad for key, value in run.model.named_parameters()},
        f'{folder}/{rank}_of_{world_size}.pt',
    )
    if world_size > 1:
        dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    first_gradients(0, 1, tmp_path)
    torch.multiprocessing.spawn(first_gradients, (2, tmp_path), nprocs=2)
    whole = torch.load(tmp_path / '0_of_1.pt')
    for rank in (0, 1):
        for key, value in torch.load(tmp_path / f'{rank}_of_2.pt').items():
            torch.testing.assert_close(value, whole[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('dataset', ['rings', 'my.npy'])
def test_resuming_is_as_if_it_had_never_stopped(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)  # bit for bit on a CPU only
    monkeypatch.setattr(bnaf, 'EPOCH_STEPS', 10)
    monkeypatch.chdir(tmp_path)
    np.save(
        'my.npy', tiny_tables.columns_of(np.random.default_rng(0), 500, 4)
    )  # 10 steps of 40 rows an epoch
    words = [
        '--train',
        f'--dataset={dataset}',
        *TINY,
        '--n_epochs=4',
        '--lr_patience=0',
        '--n_epochs_warmup=0.5',
    ]
    bnaf.main([*words, '--output_dir=whole'])
    monkeypatch.setattr(bnaf, 'SAVE_STEPS', 7)
    take_step = bnaf.Training.take_step

    def dies_at_step_25(run):
        if run.step == 25:
            raise ZeroDivisionError
        return take_step(run)

    monkeypatch.setattr(bnaf.Training, 'take_step', dies_at_step_25)
    with pytest.raises(ZeroDivisionError):
        bnaf.main([*words, '--output_dir=stopped'])
    monkeypatch.setattr(bnaf.Training, 'take_step', take_step)
    stopped = only(tmp_path.glob('stopped/*/checkpoint.pt'))
    assert bnaf.load_checkpoint(stopped)['step'] == 21  # in the middle of the third epoch
    bnaf.main(['--train', f'--restore_file={stopped}'])
    whole, resumed = (
        torch.load(only(tmp_path.glob(f'{run}/*/checkpoint.pt'))) for run in ('whole', 'stopped')
    )
    assert whole['step'] == resumed['step'] == 40
    for name in ('model', 'average'):
        for key, value in whole[name].items():
            assert torch.equal(value, resumed[name][key]), key
    assert str(whole['optimizer']) == str(resumed['optimizer'])
    for name in ('scheduler', 'validation_loss', 'best', 'best_step', 'units'):
        assert whole[name] == resumed[name], name


def test_early_stopping_keeps_the_best(tmp_path):
    """With a learning rate that only makes things worse after a while"""
    np.save(tmp_path / 'my.npy', tiny_tables.columns_of(np.random.default_rng(0), 100, 4))
    bnaf.main(
        [
            '--train',
            f'--dataset={tmp_path}/my.npy',
            '--n_epochs=2000',
            '--early_stop=5',
            '--lr=0.05',
            '--batch_size=20',
            '--ema_decay=0',
            f'--output_dir={tmp_path}',
        ]
    )
    last, best = (
        bnaf.load_checkpoint(only(tmp_path.glob(f'*/{name}.pt'))) for name in ('checkpoint', 'best')
    )
    assert last['step'] == best['step'] + 5 * 4 < 2000 * 4 and best['step'] == last['best_step']
    assert best['validation_loss'] == last['best'] < last['validation_loss']


def test_fewer_rows_on_request(tmp_path):
    np.save(tmp_path / 'my.npy', tiny_tables.columns_of(np.random.default_rng(0), 100, 4))
    config = bnaf.Config(dataset=str(tmp_path / 'my.npy'), max_rows=30)
    whole, fewer = (tabular.load_run_table(c, None) for c in (replace(config, max_rows=0), config))
    assert (
        len(whole.train) == 80
        and (fewer.train == whole.train[:30]).all()
        and (fewer.test == whole.test).all()
    )


def test_scores_are_in_the_units_of_the_data(trained, tmp_path, capsys):
    """log p of centimetres and kilograms is that of the standardised row less the logs of the deviations"""
    scores = tmp_path / 'scores.csv'
    bnaf.main(['--evaluate', f'--restore_file={trained}', f'--scores={scores}'])
    result = json.loads(trained.with_name('results.json').read_text())
    table, scores = gaussian_table(), pd.read_csv(scores)
    assert scores['log_likelihood'].mean() == pytest.approx(result['log_likelihood_nats'], abs=1e-5)
    saved = bnaf.load_checkpoint(trained)
    model = bnaf.restore_model(saved, torch.device('cpu'))
    mean, std = (np.array(saved['units'][key]) for key in ('mean', 'std'))
    rows = torch.tensor(((table.to_numpy() - mean) / std)[scores['row']], dtype=torch.float32)
    with torch.no_grad():
        np.testing.assert_allclose(
            scores['log_likelihood'], model.log_prob(rows) - np.log(std).sum(), atol=1e-4
        )
    # and it is about right: the entropy of the Gaussian that the table was drawn from
    entropy = 1.5 * np.log(2 * np.pi * np.e) + np.log(10 * 5 * 12)
    assert -result['log_likelihood_nats'] == pytest.approx(entropy, abs=0.6)


def test_scores_of_another_table_find_its_anomaly(trained, tmp_path):
    table = gaussian_table()
    table.loc[7, 'weight'] += 60
    table.to_csv(tmp_path / 'new.csv', index=False)
    bnaf.main(
        [
            '--evaluate',
            f'--restore_file={trained}',
            f'--input={tmp_path}/new.csv',
            f'--scores={tmp_path}/s.npy',
        ]
    )
    scores = np.load(tmp_path / 's.npy')
    assert scores.shape == (400, 2) and scores[:, 1].argmin() == 7


@pytest.mark.parametrize('suffix', ['.csv', '.npy', '.h5'])
def test_generate(suffix, trained, tmp_path):
    file = tmp_path / f'new{suffix}'
    bnaf.main(['--generate', f'--restore_file={trained}', '--n_samples=500', f'--output={file}'])
    if suffix == '.csv':
        table = pd.read_csv(file)
        assert list(table.columns) == ['height', 'weight', 'age', 'log_likelihood']
        values = table.to_numpy()
    elif suffix == '.npy':
        values = np.load(file)
    else:
        with h5py.File(file) as content:
            values = content['rows'][:]
            assert list(content['rows'].attrs['columns']) == [
                'height',
                'weight',
                'age',
                'log_likelihood',
            ]
    assert values.shape == (500, 4)
    np.testing.assert_allclose(values[:, :3].mean(0), [170, 70, 40], atol=4)


def test_temperature_and_no_file_of_the_users_is_overwritten(trained, tmp_path, capsys):
    file = tmp_path / 'new.csv'
    bnaf.main(
        [
            '--generate',
            f'--restore_file={trained}',
            '--n_samples=50',
            f'--output={file}',
            '--z_std=0',
        ]
    )
    assert len(pd.read_csv(file)) == 50 and len(pd.read_csv(file).drop_duplicates()) == 1
    content = file.read_bytes()
    for words in (['--generate', f'--output={file}'], ['--evaluate', f'--scores={file}']):
        assert 'is there already' in refused(capsys, *words, f'--restore_file={trained}')
    assert file.read_bytes() == content


def test_scores_of_samples_are_what_generate_says(trained, tmp_path):
    bnaf.main(['--generate', f'--restore_file={trained}', f'--output={tmp_path}/new.csv'])
    table = pd.read_csv(tmp_path / 'new.csv')
    table.iloc[:, :3].to_csv(tmp_path / 'rows.csv', index=False)
    bnaf.main(
        [
            '--evaluate',
            f'--restore_file={trained}',
            f'--input={tmp_path}/rows.csv',
            f'--scores={tmp_path}/s.csv',
        ]
    )
    np.testing.assert_allclose(
        pd.read_csv(tmp_path / 's.csv')['log_likelihood'], table['log_likelihood'], atol=1e-3
    )


def test_columns_by_name_and_our_own_files_read_back(trained, tmp_path, capsys):
    """The same rows score the same with their columns in another order, and as --generate wrote them"""
    restore = f'--restore_file={trained}'
    for suffix in ('csv', 'h5'):
        bnaf.main(['--generate', restore, '--n_samples=30', f'--output={tmp_path}/drawn.{suffix}'])
    drawn = pd.read_csv(tmp_path / 'drawn.csv')
    drawn[['age', 'weight', 'height']].to_csv(tmp_path / 'other_order.csv', index=False)
    for name in ('drawn.csv', 'drawn.h5', 'other_order.csv'):
        bnaf.main(
            [
                '--evaluate',
                restore,
                f'--input={tmp_path}/{name}',
                f'--scores={tmp_path}/{name}.scores.csv',
            ]
        )
        scores = pd.read_csv(tmp_path / f'{name}.scores.csv')['log_likelihood']
        np.testing.assert_allclose(scores, drawn['log_likelihood'], atol=2e-3)
    drawn[['age', 'weight']].assign(length=170.0).to_csv(tmp_path / 'foreign.csv', index=False)
    line = refused(capsys, '--evaluate', restore, f'--input={tmp_path}/foreign.csv')
    assert (
        'has columns age, weight, length, and the model was trained on height, weight, age' in line
    )
    drawn.assign(age=1e60).to_csv(tmp_path / 'large.csv', index=False)
    assert '1e+60' in refused(capsys, '--evaluate', restore, f'--input={tmp_path}/large.csv')


def test_one_sample(trained, tmp_path):
    for seed in range(20):  # among them draws that the flow does not reach
        bnaf.main(
            [
                '--generate',
                f'--restore_file={trained}',
                '--n_samples=1',
                f'--seed={seed}',
                f'--output={tmp_path}/{seed}.csv',
            ]
        )
        assert pd.read_csv(tmp_path / f'{seed}.csv').shape == (1, 4)


def test_another_seed_does_not_split_anew_and_names_with_spaces(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bnaf.main(['--evaluate', f'--restore_file={trained}', '--seed=5'])
    gaussian_table().rename(columns={'height': 'body height'}).to_csv('spaced.csv', index=False)
    bnaf.main(['--train', '--dataset=spaced.csv', *TINY])
    (tmp_path / 'elsewhere').mkdir()
    best = only((tmp_path / 'results').glob('*/best.pt'))
    monkeypatch.chdir(tmp_path / 'elsewhere')
    bnaf.main(['--visualize', f'--restore_file={best}', '--vis_dims', 'body height,age'])
    assert best.with_name('visualization.png').exists()


def test_an_energy_stays_on_when_training_goes_on(tmp_path):
    options = ['--hidden_dim=4', '--n_hidden=0', f'--output_dir={tmp_path}']
    bnaf.main(['--train', '--dataset=u2', '--n_epochs=1', *options])
    saved = bnaf.load_checkpoint(only(tmp_path.glob('*/checkpoint.pt')))
    config = replace(saved['config'], n_epochs=100)
    run = bnaf.Training(config, tabular.load_table('u2'), ALONE, saved)
    assert run.step == 100 and run.n_steps == 10_000 and run.n_annealing == 50


def test_visualize_a_table(trained):
    for options in ([], ['--vis_dims=0,age'], ['--vis_dims', 'weight', '0']):
        bnaf.main(['--visualize', f'--restore_file={trained}', *options])
        assert trained.with_name('visualization.png').stat().st_size > 10_000


def test_a_model_can_be_used_without_its_table(trained, tmp_path, capsys):
    table = trained.parent.parent / 'people.csv'
    content = table.read_text()
    try:
        table.unlink()
        bnaf.main(['--generate', f'--restore_file={trained}', f'--output={tmp_path}/a.csv'])
        assert 'no such table' in refused(capsys, '--evaluate', f'--restore_file={trained}')
        gaussian_table(300).to_csv(table, index=False)
        assert 'not what it was' in refused(capsys, '--evaluate', f'--restore_file={trained}')
    finally:
        table.write_text(content)


def test_every_command_of_the_readme(tmp_path, monkeypatch):
    """As written, on small data under the names used there; training is made small by options added at the end"""
    readme = SCRIPT.with_name('README.md').read_text()
    commands = re.findall(r'(?:python|torchrun)[^`\n|]*?bnaf\.py( --[^h][^`\n|#]*)', readme)
    assert {
        word
        for line in commands
        for word in ('train', 'evaluate', 'generate', 'visualize')
        if word in line
    } == {'train', 'evaluate', 'generate', 'visualize'}
    monkeypatch.chdir(tmp_path)
    gaussian_table().to_csv('my.csv', index=False)
    gaussian_table(30).to_csv('new.csv', index=False)
    pd.DataFrame(tiny_tables.columns_of(np.random.default_rng(0), 200, 5)).to_csv(
        'breast_cancer.csv', index=False
    )
    for name in ('val.npy', 'test.npy'):
        np.save(name, tiny_tables.columns_of(np.random.default_rng(0), 200, 4))
    for name in tabular.TABLES:
        monkeypatch.setitem(tabular.TABLES, name, ((162, 18, 20), *tabular.TABLES[name][1:]))
    tiny_tables.write_power(tmp_path / 'data')
    tiny_tables.write_miniboone(tmp_path / 'data')
    for folder in ('data', 'DATA'):
        tiny_tables.write_bsds300_images(tmp_path / folder)
    newest = None
    for line in dict.fromkeys(commands):
        words = shlex.split(line)
        if '--restore_file' in line:
            words = [re.sub('results/RUN/', f'{newest.parent}/', word) for word in words]
        if '--train' in words and '--restore_file' not in line:
            words += ['--n_flows=1', '--hidden_dim=4', '--n_epochs=2']
        if '--input' in line or '--scores' in line:
            bnaf.main(
                ['--train', '--dataset=my.csv', '--n_epochs=5', '--n_flows=1', '--hidden_dim=4']
            )
        bnaf.main(words)
        newest = find_run('bnaf', bnaf.Request(), False, Path)


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    'words, part',
    [
        ([], 'one of the arguments --train --evaluate --generate --visualize --check is required'),
        (['--train', '--dataset=u7'], 'unknown data set'),
        (['--train', '--input=new.csv'], '--input goes with --evaluate'),
        (['--train', '--dataset=power'], 'power/data.npy'),
        (['--train', '--dataset=gas'], 'zenodo.org/records/1161203'),
        (['--train', '--dataset=hepmass'], '1000_train.csv'),
        (['--train', '--dataset=miniboone'], 'MiniBooNE_PID.txt'),
        (['--train', '--dataset=bsds300'], 'BSDS300.hdf5'),
        (['--train', '--dataset=no.csv'], 'no.csv: no such table'),
        (['--train', '--residual=maybe'], 'none, normal, gated'),
        (['--train', '--n_flows=0'], 'outside'),
        (['--evaluate'], 'python bnaf.py --train'),
        (['--generate', '--output=x.png'], '.csv, .npy or .h5'),
    ],
)
def test_bad_commands(words, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert part in refused(capsys, *words)
    assert not list(tmp_path.rglob('*.p*'))


@pytest.mark.parametrize(
    'words, part',
    [
        (['--evaluate', '--hidden_dim=7'], '--hidden_dim=7 contradicts'),
        (['--evaluate', '--dataset=u1'], 'contradicts'),
        (['--visualize', '--vis_dims=3'], 'out of range: there are 0 to 2'),
        (['--visualize', '--vis_dims=wait'], 'the nearest are weight'),
    ],
)
def test_bad_commands_for_a_checkpoint(words, part, trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.parent.iterdir()}
    assert part in refused(capsys, *words, f'--restore_file={trained}')
    assert before == {path: path.stat().st_mtime_ns for path in trained.parent.iterdir()}


def test_tables_that_do_not_fit_the_model(trained, tmp_path, capsys):
    gaussian_table().iloc[:, :2].to_csv(tmp_path / 'two.csv', index=False)
    line = refused(capsys, '--evaluate', f'--restore_file={trained}', f'--input={tmp_path}/two.csv')
    assert 'has 2 columns, and the model was trained on 3: height, weight, age' in line
    table = gaussian_table()
    table.loc[4, 'age'] = np.nan
    table.to_csv(tmp_path / 'hole.csv', index=False)
    line = refused(
        capsys, '--evaluate', f'--restore_file={trained}', f'--input={tmp_path}/hole.csv'
    )
    assert '1 missing or infinite values, the first in column age, row 4' in line


def test_a_checkpoint_of_glow_is_refused(tmp_path, capsys):
    glow.main(
        [
            '--train',
            '--dataset=digits',
            '--depth=1',
            '--width=8',
            '--n_epochs=1',
            f'--output_dir={tmp_path}',
            f'--data_dir={tmp_path}',
        ]
    )
    best = only(tmp_path.glob('*/best.pt'))
    assert 'is not a checkpoint of bnaf.py' in refused(
        capsys, '--generate', f'--restore_file={best}'
    )


def test_divergence_stops_with_one_line_and_is_never_saved(tmp_path, capsys):
    line = refused(
        capsys,
        '--train',
        '--lr=1e6',
        '--n_epochs_warmup=0',
        '--n_epochs=1',
        f'--output_dir={tmp_path}',
    )
    assert 'diverged' in line and 'lower --lr' in line
    assert (
        bnaf.load_checkpoint(only(tmp_path.rglob('*.pt')))['step'] == 0
    )  # what cannot be told from a new model
