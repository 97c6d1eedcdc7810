"""bnaf.py as a user types it: every mode, several processes, stopping and resuming, tables as input
and output, bad input."""

import json
import math
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
from helpers import (
    CPU,
    joined_group,
    only,
    people_table,
    refusal_line,
    run_command,
    single_process,
    train_until,
)

import bnaf
from common.options import resolve_config
from common.runs import select_checkpoint
from datasets import learned, tabular

SCRIPT = Path(bnaf.__file__)
TINY = ['--n_flows=2', '--hidden_dim=4', '--n_epochs=2', '--batch_size=40']
COLUMNS = ['height', 'weight', 'age', 'log_likelihood']  # of people_table, and what is added


def write_rows(path, n, d=4):
    """Write a table of n related Gaussian rows of d columns."""
    rows = tiny_tables.columns_of(np.random.default_rng(0), n, d)
    if path.suffix == '.npy':
        np.save(path, rows)
    else:
        pd.DataFrame(rows).to_csv(path, index=False)


def as_format_1(saved):
    """Return the content of a checkpoint as that of format 1, which counted steps."""
    saved = dict(saved)
    n_per_step = saved['config']['batch_size'] * saved['world_size']
    best_step = saved.pop('n_seen_at_best') // n_per_step
    n_annealing = saved['n_annealing'] / n_per_step
    for name in ('fingerprint', 'n_seen', 'first_world_size', 'validation_quantiles'):
        saved.pop(name, None)
    names = ('columns', 'mean', 'std', 'steps')
    return {
        **saved,
        'format': 1,
        'best_step': best_step,
        'n_annealing': n_annealing,
        'input_dims': saved['input_dims'][:1],
        'units': {name: saved['units'][name] for name in names},
    }


def read_results(checkpoint):
    """Return the results.json beside a checkpoint."""
    return json.loads(checkpoint.with_name('results.json').read_text())


# -------------------------------------------------------------------------------- modes as commands


@pytest.mark.slow
def test_the_lines_of_the_default(tmp_path, monkeypatch):
    out, _ = run_command(SCRIPT, '--train', '--n_epochs=4', '--hidden_dim=20', cwd=tmp_path)
    assert ' parameters, step 0 of at most 400\n' in out
    assert '8gaussians test: -' in out and 'best.pt' in out
    run = only((tmp_path / 'results').iterdir())
    assert list(run.glob('events.out.tfevents.*'))
    result = json.loads((run / 'results.json').read_text())

    out, _ = run_command(SCRIPT, '--evaluate', cwd=tmp_path)
    assert f'{result["log_likelihood_nats"]:.4f} ± ' in out and result['n_rows'] == 50_000
    assert json.loads((run / 'results.json').read_text()) == result

    monkeypatch.chdir(tmp_path)  # and the others in this process, which starts nothing
    bnaf.main(['--generate'])
    assert len(pd.read_csv(run / 'generated_samples.csv')) == 1000

    bnaf.main(['--visualize'])
    assert (run / 'visualization.png').stat().st_size > 10_000


@pytest.mark.slow
def test_matching_an_energy(tmp_path, capsys):
    words = ['--dataset=u1', '--hidden_dim=20', '--n_epochs=6', f'--output_dir={tmp_path}']
    bnaf.main(['--train', *words])
    best = only(tmp_path.glob('bnaf_u1_*/best.pt'))
    out = capsys.readouterr().out
    assert 'KL(q || p)' in out and 'effective sample size' in out
    result = read_results(best)
    assert 0 < result['kl_nats'] < 5 and 0 < result['effective_sample_size'] <= 1

    bnaf.main(['--generate', f'--restore_file={best}', '--n_samples=50'])
    bnaf.main(['--visualize', f'--restore_file={best}'])
    samples = pd.read_csv(best.with_name('generated_samples.csv'))
    model = bnaf.restore_model(bnaf.load_checkpoint(best), CPU)
    points = samples[['x1', 'x2']].to_numpy()
    p = bnaf.Learned(model, tabular.load_table('u1'), seed=0).density(points)
    # the density of a sample is the same in both directions
    np.testing.assert_allclose(np.log(p), samples['log_likelihood'], atol=1e-6)


@pytest.mark.slow
def test_two_processes(tmp_path):
    write_rows(tmp_path / 'my.npy', 500)
    where = dict(cwd=tmp_path, CUDA_VISIBLE_DEVICES='')
    launcher = ['-m', 'torch.distributed.launch', '--nproc_per_node=2']
    run_command(*launcher, SCRIPT, '--train', '--dataset=my.npy', *TINY, **where)
    run = only((tmp_path / 'results').iterdir())
    with_two = json.loads((run / 'results.json').read_text())
    assert with_two['n_rows'] == 50

    run_command(SCRIPT, '--evaluate', **where)
    with_one = json.loads((run / 'results.json').read_text())
    expected = pytest.approx(with_two['log_likelihood_nats'], rel=1e-6)
    assert with_one['log_likelihood_nats'] == expected


def save_first_gradients(rank, world_size, folder):
    """Save what ``first_gradients`` returns on one process of a group."""
    torch.manual_seed(1000 + rank)  # nothing may depend on it
    with joined_group(rank, world_size, folder):
        gradients = first_gradients(rank, world_size)
    torch.save(gradients, f'{folder}/{rank}_of_{world_size}.pt')


def first_gradients(rank, world_size):
    """Return the gradients of the first step on this process's share of one joint batch."""
    config = bnaf.Config(**{**bnaf.TOY, 'hidden_dim': 8})
    process = bnaf.Process(rank, world_size, CPU)
    run = bnaf.Training(config, tabular.load_table('moons'), process)

    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    share = slice(rank * 32 // world_size, (rank + 1) * 32 // world_size)
    run.objective(x[share]).backward()
    return {key: value.grad for key, value in run.model.named_parameters()}


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    save_first_gradients(0, 1, tmp_path)
    torch.multiprocessing.spawn(save_first_gradients, (2, tmp_path), nprocs=2)
    whole = torch.load(tmp_path / '0_of_1.pt')
    for rank in (0, 1):
        for key, value in torch.load(tmp_path / f'{rank}_of_2.pt').items():
            torch.testing.assert_close(value, whole[key], rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------- training


@pytest.mark.slow
@pytest.mark.parametrize('dataset', ['rings', 'my.npy'])
def test_a_resumed_training_equals_an_uninterrupted_one(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)  # bit for bit on a CPU only
    monkeypatch.setattr(bnaf, 'EPOCH_BATCHES', 10)
    monkeypatch.chdir(tmp_path)
    write_rows(Path('my.npy'), 500)  # 10 steps of 40 rows per epoch
    words = ['--train', f'--dataset={dataset}', *TINY, '--n_epochs=4', '--lr_patience=0']
    words += ['--n_epochs_warmup=0.5']
    bnaf.main([*words, '--output_dir=whole'])
    train_until(bnaf, 21, [*words, '--output_dir=stopped'])
    stopped = only(tmp_path.glob('stopped/*/checkpoint.pt'))
    assert bnaf.load_checkpoint(stopped)['step'] == 21  # within the third epoch
    bnaf.main(['--train', f'--restore_file={stopped}'])

    whole = torch.load(only(tmp_path.glob('whole/*/checkpoint.pt')))
    resumed = torch.load(stopped)
    assert whole['step'] == resumed['step'] == 40
    for name in ('model', 'average'):
        for key, value in whole[name].items():
            assert torch.equal(value, resumed[name][key]), key
    assert str(whole['optimizer']) == str(resumed['optimizer'])
    for name in ('scheduler', 'validation_loss', 'best', 'n_seen_at_best', 'units'):
        assert whole[name] == resumed[name], name


def test_the_newest_run_is_that_of_the_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bnaf, 'EPOCH_BATCHES', 2)
    words = ['--hidden_dim=3', '--n_epochs=1', '--batch_size=20', f'--output_dir={tmp_path}']
    for dataset in ('rings', 'moons'):
        bnaf.main(['--train', f'--dataset={dataset}', *words])
    capsys.readouterr()

    newest = {'--dataset=rings': 'bnaf_rings_', '--dataset=moons': 'bnaf_moons_', '': 'bnaf_moons_'}
    for word, name in newest.items():
        bnaf.main(['--evaluate', *word.split(), f'--output_dir={tmp_path}'])
        assert f'restored {tmp_path}/{name}' in capsys.readouterr().out

    bnaf.main(
        ['--train', '--resume', '--dataset=rings', '--n_epochs=2', f'--output_dir={tmp_path}']
    )
    assert f'restored {tmp_path}/bnaf_rings_' in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 2
    line = refusal_line(bnaf, capsys, '--check', '--dataset=u1', f'--output_dir={tmp_path}')
    assert f'no checkpoint of bnaf.py for u1 under {tmp_path}: train first' in line
    line = refusal_line(bnaf, capsys, '--check', '--n_flows=2', f'--output_dir={tmp_path}')
    assert '--n_flows=2 contradicts the checkpoint' in line

    bnaf.main(['--train', '--resume', '--dataset=u1', *words])  # there is none: it starts one
    assert len(list(tmp_path.iterdir())) == 3


def test_another_data_set_with_a_longer_name_is_not_meant(tmp_path):
    for name in ('glow_my_2_2026-01-01_00-00-00', 'glow_my_2026-01-01_00-00-00-2'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'checkpoint.pt').touch()
    request = bnaf.Request(output_dir=str(tmp_path))
    found = select_checkpoint('glow', request, 'evaluate', dataset='data/my.csv')
    assert found == tmp_path / 'glow_my_2026-01-01_00-00-00-2' / 'checkpoint.pt'


@pytest.mark.slow
def test_early_stopping_keeps_the_best(tmp_path, capsys):
    """With a learning rate that after a while only makes the model worse."""
    write_rows(tmp_path / 'my.npy', 100)
    words = ['--n_epochs=2000', '--early_stop=5', '--lr=0.05', '--batch_size=20', '--ema_decay=0']
    words += [f'--dataset={tmp_path}/my.npy', f'--output_dir={tmp_path}']
    bnaf.main(['--train', *words])
    last = bnaf.load_checkpoint(only(tmp_path.glob('*/checkpoint.pt')))
    best = bnaf.load_checkpoint(only(tmp_path.glob('*/best.pt')))
    assert best['n_seen'] == last['n_seen_at_best']
    assert last['step'] == best['step'] + 5 * 4 < 2000 * 4
    assert best['validation_loss'] == last['best'] < last['validation_loss']
    assert 'training ends early, as 5 epochs have not brought' in capsys.readouterr().out


def test_training_ends_early_at_the_end_of_an_epoch(tmp_path):
    write_rows(tmp_path / 'my.npy', 330)
    config = bnaf.Config(dataset=str(tmp_path / 'my.npy'), batch_size=100, early_stop=4)
    run = bnaf.Training(config, tabular.load_run_table(config, None), single_process(bnaf))
    for epoch in (1, 2, 3):
        step = math.ceil(epoch * 264 / 100)
        run.n_seen_at_best = 100 * step
        assert run.n_to_see == (epoch + 4) * 264


def test_an_epoch_of_few_rows_is_a_step(tmp_path):
    write_rows(tmp_path / 'my.npy', 50)
    config = bnaf.Config(dataset=str(tmp_path / 'my.npy'), batch_size=100, n_epochs=30)
    run = bnaf.Training(config, tabular.load_run_table(config, None), single_process(bnaf))
    assert run.n_per_epoch == run.n_per_validation == 100
    assert run.n_to_see == 30 * 100


def test_fewer_rows_on_request(tmp_path):
    write_rows(tmp_path / 'my.npy', 100)
    config = bnaf.Config(dataset=str(tmp_path / 'my.npy'), max_rows=30)
    fewer = tabular.load_run_table(config, None)
    whole = tabular.load_run_table(replace(config, max_rows=0), None)
    assert len(whole.train) == 80
    assert (fewer.train == whole.train[:30]).all()
    assert (fewer.test == whole.test).all()


def test_an_energy_stays_on_when_a_training_is_resumed(tmp_path):
    options = ['--hidden_dim=4', '--n_hidden=0', f'--output_dir={tmp_path}']
    bnaf.main(['--train', '--dataset=u2', '--n_epochs=1', *options])
    saved = bnaf.load_checkpoint(only(tmp_path.glob('*/checkpoint.pt')))
    config = replace(saved['config'], n_epochs=100)
    run = bnaf.Training(config, tabular.load_table('u2'), single_process(bnaf), saved)
    assert run.step == 100 and run.n_seen == 20_000
    assert run.n_to_see == 2_000_000 and run.n_annealing == 10_000


def test_divergence_stops_with_one_line_and_is_never_saved(tmp_path, capsys):
    words = ['--train', '--lr=1e6', '--n_epochs_warmup=0', '--n_epochs=1']
    line = refusal_line(bnaf, capsys, *words, f'--output_dir={tmp_path}')
    assert 'diverged' in line and 'lower --lr' in line
    saved = bnaf.load_checkpoint(only(tmp_path.rglob('*.pt')))
    assert saved['step'] == 0  # as good as a new model


# ------------------------------------------------------------------ defaults of tables, a Gaussian


def test_defaults_of_a_table_depend_on_its_rows(tmp_path, monkeypatch, capsys):
    small = dict(batch_size=20, hidden_dim=3, last_residual='gated')
    more = dict(batch_size=40, hidden_dim=5, last_residual='none')
    monkeypatch.setattr(bnaf, 'BY_ROWS', {81: small, math.inf: more})
    for n, n_train, defaults in ((100, 80, small), (102, 82, more)):
        write_rows(tmp_path / f'{n}.csv', n)
        words = [f'--dataset={tmp_path}/{n}.csv', f'--output_dir={tmp_path}', '--n_epochs=1']
        bnaf.main(['--train', *words, '--batch_size=30'])
        config = load_last_config(tmp_path, n)
        assert {**defaults, 'batch_size': 30}.items() <= vars(config).items()
        line = re.search(rf'defaults for {n_train} training rows: (.*)', capsys.readouterr().out)[1]
        words = [f'--{name}={getattr(config, name)}' for name in bnaf.TABLE_OPTIONS]
        assert line.split() == [word for word in words if word != '--batch_size=30']

    # a run goes on as it began, whatever the defaults are by then
    monkeypatch.setattr(bnaf, 'BY_ROWS', {math.inf: dict(more, hidden_dim=7)})
    last = only(tmp_path.glob('bnaf_100_*/checkpoint.pt'))
    bnaf.main(['--train', f'--restore_file={last}', '--n_epochs=2'])
    assert load_last_config(tmp_path, 100).hidden_dim == 3
    assert 'defaults for' not in capsys.readouterr().out


def test_where_all_options_are_given_no_defaults_are_printed(tmp_path, capsys):
    write_rows(tmp_path / 'my.csv', 100)
    options = {**bnaf.own_table_defaults(80), 'batch_size': 40}
    words = [f'--{name}={value}' for name, value in options.items()]
    words += [f'--dataset={tmp_path}/my.csv', f'--output_dir={tmp_path}', '--n_epochs=1']
    bnaf.main(['--train', *words])
    assert 'defaults for' not in capsys.readouterr().out


def test_a_training_without_steps_left_says_so(tmp_path, capsys):
    write_rows(tmp_path / 'my.csv', 100)
    words = [f'--dataset={tmp_path}/my.csv', f'--output_dir={tmp_path}']
    bnaf.main(['--train', *words, '--n_flows=1', '--early_stop=1', '--lr=0.5'])
    assert 'was the last one' not in capsys.readouterr().out
    last = only(tmp_path.glob('bnaf_my_*/checkpoint.pt'))
    step = bnaf.load_checkpoint(last)['step']
    bnaf.main(['--train', f'--restore_file={last}', '--n_epochs=2000'])
    line = f'step {step} was the last one of this training: to go on, add a larger --n_epochs or '
    assert f'{line}--early_stop\n' in capsys.readouterr().out
    bnaf.main(['--train', f'--restore_file={last}', '--early_stop=2'])
    assert bnaf.load_checkpoint(last)['step'] > step
    assert 'was the last one' not in capsys.readouterr().out


def load_last_config(folder, name):
    """Return the config of the only run on a table of that name."""
    return bnaf.load_checkpoint(only(folder.glob(f'bnaf_{name}_*/checkpoint.pt')))['config']


@pytest.mark.parametrize('name, has_gaussian', [('rings', False), ('power', True)])
def test_only_your_own_tables_have_defaults_by_size(
    name, has_gaussian, tmp_path, monkeypatch, capsys
):
    tiny_tables.set_counts(monkeypatch, 'power')
    tiny_tables.write_power(tmp_path)
    words = [f'--dataset={name}', f'--data_dir={tmp_path}', f'--output_dir={tmp_path}']
    bnaf.main(['--train', *words, '--n_epochs=1', '--hidden_dim=2'])
    config = load_last_config(tmp_path, name)
    assert config.last_residual == 'none' and config.lr_patience == bnaf.Config.lr_patience
    out = capsys.readouterr().out
    assert 'defaults for' not in out and ('a Gaussian fitted' in out) == has_gaussian


def test_fewer_rows_on_request_decide_the_defaults_and_the_ranges(tmp_path, monkeypatch):
    small, more = dict(batch_size=20, hidden_dim=3), dict(batch_size=40, hidden_dim=5)
    monkeypatch.setattr(bnaf, 'BY_ROWS', {31: small, math.inf: more})
    write_rows(tmp_path / 'my.csv', 200)
    words = [f'--dataset={tmp_path}/my.csv', '--max_rows=30', '--n_epochs=1']
    bnaf.main(['--train', *words, f'--output_dir={tmp_path}'])
    config, saved = saved_run(only(tmp_path.glob('*/checkpoint.pt')))
    assert config.hidden_dim == 3
    data = tabular.load_run_table(config, saved)
    expected = [data.train.min(axis=0), data.train.max(axis=0)]
    np.testing.assert_array_equal(np.transpose(saved['units']['ranges']), expected)


# With these, the ratios in table 2 of the paper are met to two decimals.
PARAMETERS = {
    'power': 181_264,
    'gas': 308_884,
    'hepmass': 516_814,
    'miniboone': 170_284,
    'bsds300': 4_461_034,
}


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameters_of_published_tables(name):
    _, n_columns, _ = tabular.TABLES[name]
    config = resolve_config(bnaf.Config, {'dataset': name}, bnaf.DEFAULTS, None, ())
    assert bnaf.build_model(config, (n_columns, 0)).n_parameters == PARAMETERS[name]
    assert config.last_residual == 'none'


def test_a_model_is_compared_with_a_gaussian(trained_bnaf, capsys):
    bnaf.main(['--evaluate', f'--restore_file={trained_bnaf}'])
    out = capsys.readouterr().out
    pattern = (
        r'fitted to the training rows scores (\S+) nats; the flow is (\S+) ± (\S+) nats (\w+) it'
    )
    value, lead, error, side = re.search(pattern, out).groups()
    result = read_results(trained_bnaf)
    assert float(value) == pytest.approx(result['gaussian_log_likelihood_nats'], abs=1e-4)
    difference = result['log_likelihood_nats'] - result['gaussian_log_likelihood_nats']
    assert float(lead) * {'above': 1, 'below': -1}[side] == pytest.approx(difference, abs=1e-3)

    # the table is a Gaussian: height and weight, which are related, and age
    age = 0.5 * math.log(2 * math.pi * math.e * 12**2)
    others = math.log(2 * math.pi * math.e) + math.log(10) + math.log(5)
    assert float(value) == pytest.approx(-age - others, abs=0.4)
    assert 0 < float(error) < 1


def test_infinite_scores_are_not_compared(monkeypatch, capsys):
    data = tabular.table_from_frame(people_table(), 'X')
    losses = torch.zeros(len(data.test), dtype=torch.float64)
    assert list(bnaf.compare_with_gaussian(losses, data)) == ['gaussian_log_likelihood_nats']
    assert ' above it' in capsys.readouterr().out
    losses[3] = math.inf
    bnaf.compare_with_gaussian(losses, data)
    assert capsys.readouterr().out.endswith(' nats\n')


def test_a_conditional_model_is_compared_with_a_conditional_gaussian(tmp_path, capsys):
    people_table().to_csv(tmp_path / 'my.csv', index=False)
    words = [f'--dataset={tmp_path}/my.csv', '--condition=height,age', f'--output_dir={tmp_path}']
    bnaf.main(['--train', *words, '--n_epochs=1'])
    # the weight is a line in the height, with a deviation of 5
    of_weight = -0.5 * math.log(2 * math.pi * math.e) - math.log(5)
    value = re.search(r'a Gaussian fitted .* scores (\S+) nats', capsys.readouterr().out)[1]
    assert float(value) == pytest.approx(of_weight, abs=0.3)


def test_samples_of_discrete_columns_never_leave_the_data(tmp_path, capsys):
    table = people_table()
    table['sex'] = np.arange(len(table)) % 2
    table.to_csv(tmp_path / 'my.csv', index=False)
    words = ['--columns=sex,age', '--dequantize', '--n_epochs=1', f'--output_dir={tmp_path}']
    bnaf.main(['--train', f'--dataset={tmp_path}/my.csv', *words])
    data = tabular.load_run_table(*saved_run(only(tmp_path.glob('*/best.pt'))))
    sex, age = data.ranges.T
    rows = np.array([[9.0, age.mean()], [-9.0, age.mean()], [0.0, age[1] + 1]])
    assert data.is_outside(rows).tolist() == [False, False, True]


def test_models_of_former_formats_do_not_know_the_range(tmp_path, capsys):
    stored = SCRIPT.parent / 'tests' / 'checkpoints' / 'bnaf_4.pt'
    bnaf.main(['--generate', f'--restore_file={stored}', f'--output={tmp_path}/s.csv'])
    assert 'leave the range' not in capsys.readouterr().out


def test_how_many_samples_leave_the_range_of_the_data_is_said(trained_bnaf, tmp_path, capsys):
    words = [f'--restore_file={trained_bnaf}', '--n_samples=500', f'--output={tmp_path}/s.csv']
    for z_std, least, most in ((0.1, 0, 0), (5, 400, 500)):
        bnaf.main(['--generate', *words, f'--z_std={z_std}', '--overwrite'])
        out = capsys.readouterr().out
        n_outside = int(
            re.search(r'\n(\d+) of them leave the range of the training rows in', out)[1]
        )
        assert least <= n_outside <= most

        data = tabular.load_run_table(*saved_run(trained_bnaf))
        train = data.to_own_units(data.train)
        samples = pd.read_csv(tmp_path / 's.csv')[list(data.columns)].to_numpy()
        is_outside = (samples < train.min(0) - 1e-4) | (samples > train.max(0) + 1e-4)
        assert is_outside.any(axis=1).sum() == n_outside


def saved_run(path):
    """Return the config and the content of a checkpoint."""
    saved = bnaf.load_checkpoint(path)
    return saved['config'], saved


# ------------------------------------------------------------------------------- scores and samples


def test_scores_are_in_the_units_of_the_data(trained_bnaf, tmp_path):
    """log p of centimetres and kilograms is that of the standardised row minus the logarithms of
    the standard deviations."""
    file = tmp_path / 'scores.csv'
    bnaf.main(['--evaluate', f'--restore_file={trained_bnaf}', f'--scores={file}'])
    mean_score = read_results(trained_bnaf)['log_likelihood_nats']
    scores = pd.read_csv(file)
    assert scores['log_likelihood'].mean() == pytest.approx(mean_score, abs=1e-5)

    saved = bnaf.load_checkpoint(trained_bnaf)
    model = bnaf.restore_model(saved, CPU)
    mean, std = (np.array(saved['units'][key]) for key in ('mean', 'std'))
    standardised = ((people_table().to_numpy() - mean) / std)[scores['row']]
    with torch.no_grad():
        log_p = model.log_prob(torch.tensor(standardised, dtype=torch.float32)).numpy()
    expected = log_p - np.log(std).sum()
    np.testing.assert_allclose(scores['log_likelihood'], expected, atol=1e-4)

    # it is close to the entropy of the Gaussian that the table was drawn from
    entropy = 1.5 * np.log(2 * np.pi * np.e) + np.log(10 * 5 * 12)
    assert -mean_score == pytest.approx(entropy, abs=0.6)


def test_scores_of_another_table_find_its_anomaly(trained_bnaf, tmp_path):
    table = people_table()
    table.loc[7, 'weight'] += 60
    table.to_csv(tmp_path / 'new.csv', index=False)
    files = [f'--input={tmp_path}/new.csv', f'--scores={tmp_path}/s.npy']
    bnaf.main(['--evaluate', f'--restore_file={trained_bnaf}', *files])
    scores = np.load(tmp_path / 's.npy')
    assert scores.shape == (400, 3) and scores[:, 1].argmin() == 7
    assert scores[7, 2] == 0 and 40 < scores[:, 2].mean() < 60  # the percentile


@pytest.mark.parametrize('suffix', ['.csv', '.npy', '.h5'])
def test_generate(suffix, trained_bnaf, tmp_path):
    file = tmp_path / f'new{suffix}'
    words = ['--n_samples=500', f'--output={file}']
    bnaf.main(['--generate', f'--restore_file={trained_bnaf}', *words])
    if suffix == '.csv':
        table = pd.read_csv(file)
        columns, values = list(table.columns), table.to_numpy()
    elif suffix == '.npy':
        columns, values = COLUMNS, np.load(file)
    else:
        with h5py.File(file) as content:
            columns, values = list(content['rows'].attrs['columns']), content['rows'][:]
    assert columns == COLUMNS
    assert values.shape == (500, 4)
    np.testing.assert_allclose(values[:, :3].mean(0), [170, 70, 40], atol=4)


def test_temperature_and_no_file_of_the_users_is_overwritten(trained_bnaf, tmp_path, capsys):
    file, restore = tmp_path / 'new.csv', f'--restore_file={trained_bnaf}'
    words = ['--n_samples=50', f'--output={file}', '--z_std=0']
    bnaf.main(['--generate', restore, *words])
    table = pd.read_csv(file)
    assert len(table) == 50 and len(table.round(9).drop_duplicates()) == 1

    content = file.read_bytes()
    for words in (['--generate', f'--output={file}'], ['--evaluate', f'--scores={file}']):
        assert 'is there already' in refusal_line(bnaf, capsys, *words, restore)
    assert file.read_bytes() == content


def test_scores_of_samples_are_what_generate_says(trained_bnaf, tmp_path):
    restore = f'--restore_file={trained_bnaf}'
    bnaf.main(['--generate', restore, f'--output={tmp_path}/new.csv'])
    table = pd.read_csv(tmp_path / 'new.csv')
    table.iloc[:, :3].to_csv(tmp_path / 'rows.csv', index=False)
    files = [f'--input={tmp_path}/rows.csv', f'--scores={tmp_path}/s.csv']
    bnaf.main(['--evaluate', restore, *files])
    scores = pd.read_csv(tmp_path / 's.csv')['log_likelihood']
    np.testing.assert_allclose(scores, table['log_likelihood'], atol=1e-3)


def discrete_table(n=500):
    """Return n rows of two continuous columns and four that take few values."""
    rng = np.random.default_rng(0)
    size = rng.normal(size=n)
    columns = {
        'size': size,
        'weight': 0.8 * size + 0.6 * rng.normal(size=n),
        'flag': (rng.random(n) < 0.29).astype(int),
        'count': rng.integers(3, 7, n),
        'tenths': rng.integers(1, 5, n) * 0.1,  # 3 * 0.1 is 0.30000000000000004
        'irregular': rng.choice([0, 1, 2.5], n, p=[0.5, 0.3, 0.2]),
    }
    return pd.DataFrame(columns)


LEVELS = {
    'flag': [0, 1],
    'count': [3, 4, 5, 6],
    'tenths': [0.1, 0.2, 0.3, 0.4],
    'irregular': [0, 1, 2.5],
}


@pytest.fixture(scope='module')
def trained_on_discrete(tmp_path_factory):
    """The best.pt of a BNAF of discrete.csv, which lies beside the folder of its run."""
    folder = tmp_path_factory.mktemp('discrete')
    discrete_table().to_csv(folder / 'discrete.csv', index=False)
    words = [f'--dataset={folder}/discrete.csv', f'--output_dir={folder}', '--dequantize']
    words += ['--n_flows=1', '--hidden_dim=20', '--n_epochs=100', '--batch_size=50']
    bnaf.main(['--train', *words, '--ema_decay=0.99', '--lr=0.02'])
    return only(folder.glob('bnaf_discrete_*/best.pt'))


@pytest.mark.slow
def test_samples_have_the_values_of_discrete_columns(trained_on_discrete, tmp_path):
    """Their moments are those of the table, within three standard errors and what so short a
    training may miss: a tenth of a deviation. The noise would add half a step."""
    output = f'--output={tmp_path}/new.csv'
    bnaf.main(['--generate', f'--restore_file={trained_on_discrete}', '--n_samples=4000', output])
    table, drawn = discrete_table(), pd.read_csv(tmp_path / 'new.csv')
    for name, levels in LEVELS.items():
        assert sorted(drawn[name].unique()) == levels, name
    for name in LEVELS:
        column, new = table[name], drawn[name]
        error = column.std() * np.sqrt(1 / len(column) + 1 / len(new))
        missed = column.std() / 10
        assert new.mean() == pytest.approx(column.mean(), abs=3 * error + missed), name
        kurtosis = ((column - column.mean()) ** 4).mean() / column.std() ** 4
        error *= np.sqrt((kurtosis - 1) / 4)
        assert new.std() == pytest.approx(column.std(), abs=3 * error + missed), name


@pytest.mark.slow
def test_scores_of_discrete_samples_are_what_generate_says(trained_on_discrete, tmp_path):
    restore = f'--restore_file={trained_on_discrete}'
    bnaf.main(['--generate', restore, f'--output={tmp_path}/new.csv'])
    bnaf.main(['--evaluate', restore, f'--input={tmp_path}/new.csv', f'--scores={tmp_path}/s.csv'])
    drawn = pd.read_csv(tmp_path / 'new.csv')['log_likelihood']
    scores = pd.read_csv(tmp_path / 's.csv')['log_likelihood']
    np.testing.assert_allclose(scores, drawn, atol=1e-3)


@pytest.mark.slow
def test_pictures_show_samples_and_data_alike(trained_on_discrete, monkeypatch):
    calls = []
    monkeypatch.setattr(learned, 'draw_pairs', lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(bnaf, 'save_figure', lambda *arguments: None)
    bnaf.main(['--visualize', f'--restore_file={trained_on_discrete}'])
    ((real, drawn, columns, _),) = calls
    for name, levels in LEVELS.items():
        k = columns.index(name)
        assert sorted(set(real[:, k])) == sorted(set(drawn[:, k])) == levels


@pytest.mark.slow
def test_training_on_from_format_1_learns_the_levels(trained_on_discrete, tmp_path):
    saved = torch.load(trained_on_discrete)
    known = saved['units'], saved['fingerprint']
    torch.save(as_format_1(saved), tmp_path / 'checkpoint.pt')
    restore = f'--restore_file={tmp_path}/checkpoint.pt'
    bnaf.main(['--generate', restore, '--n_samples=20', f'--output={tmp_path}/new.csv'])
    assert len(pd.read_csv(tmp_path / 'new.csv')) == 20

    bnaf.main(['--train', restore, '--n_epochs=105'])
    resumed = bnaf.load_checkpoint(tmp_path / 'checkpoint.pt')
    assert (resumed['units'], resumed['fingerprint']) == known


def test_columns_are_matched_by_name(trained_bnaf, tmp_path, capsys):
    """The same rows score the same with their columns in another order, and as --generate wrote
    them."""
    restore = f'--restore_file={trained_bnaf}'
    for suffix in ('csv', 'h5'):
        output = f'--output={tmp_path}/drawn.{suffix}'
        bnaf.main(['--generate', restore, '--n_samples=30', output])
    drawn = pd.read_csv(tmp_path / 'drawn.csv')
    drawn[['age', 'weight', 'height']].to_csv(tmp_path / 'other_order.csv', index=False)
    for name in ('drawn.csv', 'drawn.h5', 'other_order.csv'):
        file = tmp_path / f'{name}.scores.csv'
        bnaf.main(['--evaluate', restore, f'--input={tmp_path}/{name}', f'--scores={file}'])
        scores = pd.read_csv(file)['log_likelihood']
        np.testing.assert_allclose(scores, drawn['log_likelihood'], atol=2e-3)

    other = drawn[['age', 'weight']].assign(length=170.0)
    other.to_csv(tmp_path / 'other.csv', index=False)
    line = refusal_line(bnaf, capsys, '--evaluate', restore, f'--input={tmp_path}/other.csv')
    assert 'has columns age, weight, length, and the model was trained on' in line
    assert 'height, weight, age' in line

    drawn.assign(age=1e60).to_csv(tmp_path / 'large.csv', index=False)
    line = refusal_line(bnaf, capsys, '--evaluate', restore, f'--input={tmp_path}/large.csv')
    assert '1e+60' in line


def test_one_sample(trained_bnaf, tmp_path):
    restore = f'--restore_file={trained_bnaf}'
    for seed in range(20):  # among them draws that the flow does not reach
        file = tmp_path / f'{seed}.csv'
        bnaf.main(['--generate', restore, '--n_samples=1', f'--seed={seed}', f'--output={file}'])
        assert pd.read_csv(file).shape == (1, 4)


# ----------------------------------------------------------------------------------- other commands


def test_columns_whose_names_have_spaces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    people_table().rename(columns={'height': 'body height'}).to_csv('spaced.csv', index=False)
    bnaf.main(['--train', '--dataset=spaced.csv', *TINY])
    best = only((tmp_path / 'results').glob('*/best.pt'))
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    bnaf.main(['--visualize', f'--restore_file={best}', '--vis_dims', 'body height,age'])
    assert best.with_name('visualization.png').exists()


def test_visualize_a_table(trained_bnaf):
    picture = trained_bnaf.with_name('visualization.png')
    for options in ([], ['--vis_dims=0,age'], ['--vis_dims', 'weight', '0']):
        bnaf.main(['--visualize', f'--restore_file={trained_bnaf}', *options])
        assert picture.stat().st_size > 10_000
        picture.unlink()


def test_a_model_can_be_used_without_its_table(trained_bnaf, tmp_path, capsys):
    restore = f'--restore_file={trained_bnaf}'
    table = trained_bnaf.parent.parent / 'people.csv'
    content = table.read_text()
    try:
        table.unlink()
        bnaf.main(['--generate', restore, f'--output={tmp_path}/a.csv'])
        assert 'no such table' in refusal_line(bnaf, capsys, '--evaluate', restore)
        people_table(300).to_csv(table, index=False)
        assert 'not what it was' in refusal_line(bnaf, capsys, '--evaluate', restore)
    finally:
        table.write_text(content)


@pytest.fixture
def moved_run(tmp_path):
    """A checkpoint of a tiny BNAF whose two tables have moved, and their new paths."""
    (tmp_path / 'old').mkdir()
    rows = tiny_tables.columns_of(np.random.default_rng(0), 130, 3)
    np.save(tmp_path / 'old' / 'rows.npy', rows[:100])
    np.save(tmp_path / 'old' / 'test.npy', rows[100:])
    words = [f'--{name}={tmp_path}/old/{file}.npy' for name, file in MOVED_FILES.items()]
    bnaf.main(['--train', *words, *TINY, f'--output_dir={tmp_path}/results'])
    (tmp_path / 'old').rename(tmp_path / 'new')

    checkpoint = only(tmp_path.glob('results/*/checkpoint.pt'))
    return checkpoint, {name: tmp_path / 'new' / f'{f}.npy' for name, f in MOVED_FILES.items()}


MOVED_FILES = {'dataset': 'rows', 'test_file': 'test'}


def test_a_run_goes_on_with_tables_that_have_moved(moved_run, monkeypatch, capsys):
    checkpoint, files = moved_run
    score = read_results(checkpoint)['log_likelihood_nats']
    restore = f'--restore_file={checkpoint}'
    line = refusal_line(bnaf, capsys, '--evaluate', restore)
    assert 'old/rows.npy: no such table; if it has moved, give --dataset=NEWPATH' in line
    line = refusal_line(bnaf, capsys, '--evaluate', restore, f'--dataset={files["dataset"]}')
    assert 'old/test.npy: no such table; if it has moved, give --test_file=NEWPATH' in line

    monkeypatch.chdir(checkpoint.parent.parent.parent / 'new')  # paths may be relative
    words = [restore, '--dataset=rows.npy', '--test_file=test.npy']
    for mode in ('--evaluate', '--check', '--visualize', '--generate'):
        bnaf.main([mode, *words])
    assert read_results(checkpoint)['log_likelihood_nats'] == score

    bnaf.main(['--train', *words, '--n_epochs=4'])
    resumed = bnaf.load_checkpoint(checkpoint)
    for name, file in files.items():
        assert getattr(resumed['config'], name) == str(file)
    bnaf.main(['--evaluate', restore])


def test_resume_finds_moved_tables(moved_run):
    checkpoint, files = moved_run
    words = [f'--output_dir={checkpoint.parent.parent}', '--n_epochs=3']
    words += [f'--{name}={file}' for name, file in files.items()]
    bnaf.main(['--train', '--resume', *words])
    assert bnaf.load_checkpoint(checkpoint)['config'].dataset == str(files['dataset'])


def test_other_rows_do_not_pass_for_moved_ones(moved_run, capsys):
    checkpoint, files = moved_run
    words = [f'--restore_file={checkpoint}', *(f'--{k}={file}' for k, file in files.items())]
    for file in files.values():
        rows = np.load(file)
        changed = rows.copy()
        changed[0] += 1e-9
        for other in (changed, rows[:-1], rows[::-1]):
            np.save(file, other)
            for mode in ('--train', '--evaluate', '--generate'):
                line = refusal_line(bnaf, capsys, mode, *words)
                for name in ('rows', 'test'):
                    assert re.search(f'new/{name}.npy .in place of .*old/{name}.npy', line)
                assert 'is not what it was when the model was trained' in line
        np.save(file, rows)
    bnaf.main(['--evaluate', *words])


def test_a_checkpoint_without_a_fingerprint_compares_the_units(moved_run, capsys):
    checkpoint, files = moved_run
    saved = torch.load(checkpoint)
    torch.save(as_format_1(saved), checkpoint)
    words = [f'--restore_file={checkpoint}', *(f'--{k}={file}' for k, file in files.items())]
    bnaf.main(['--evaluate', *words])
    np.save(files['dataset'], 2 * np.load(files['dataset']))
    assert 'is not what it was' in refusal_line(bnaf, capsys, '--evaluate', *words)


def test_only_own_tables_replace_each_other(moved_run, trained_bnaf, tmp_path, capsys):
    people = trained_bnaf.parent.parent / 'people.csv'
    people_table(20).to_csv(tmp_path / 'test.csv', index=False)
    contradictions = [
        (trained_bnaf, '--dataset=power'),
        (trained_bnaf, f'--test_file={tmp_path}/test.csv'),  # it was trained without one
        (moved_run[0], '--test_file='),
        (SCRIPT.parent / 'tests' / 'checkpoints' / 'bnaf_2.pt', f'--dataset={people}'),
        (SCRIPT.parent / 'tests' / 'checkpoints' / 'bnaf_2.pt', '--dataset=moons'),
    ]
    for checkpoint, word in contradictions:
        for mode in bnaf.MODES:
            line = refusal_line(bnaf, capsys, f'--{mode}', f'--restore_file={checkpoint}', word)
            assert 'contradicts the checkpoint' in line


def test_another_file_of_a_published_table_is_refused(tmp_path, monkeypatch, capsys):
    tiny_tables.set_counts(monkeypatch, 'power')
    tiny_tables.write_power(tmp_path / 'a')
    tiny_tables.write_power(tmp_path / 'moved')
    words = ['--dataset=power', f'--data_dir={tmp_path}/a', f'--output_dir={tmp_path}']
    bnaf.main(['--train', *words, *TINY])
    last = only(tmp_path.glob('bnaf_power_*/checkpoint.pt'))
    evaluate = ['--evaluate', f'--restore_file={last}']
    bnaf.main([*evaluate, f'--data_dir={tmp_path}/moved'])

    file = tmp_path / 'moved' / 'power' / 'data.npy'
    np.save(file, np.load(file).astype(np.float32))  # another size
    line = refusal_line(bnaf, capsys, *evaluate, f'--data_dir={tmp_path}/moved')
    assert 'power is not what it was when the model was trained' in line


@pytest.mark.slow
def test_every_command_of_the_readme(tmp_path, monkeypatch):
    """As written, on small data of the names there. Options at its end make a training small."""
    pages = [SCRIPT.with_name(name).read_text() for name in ('README.md', 'RESULTS.md')]
    readme = '\n'.join(pages)
    pattern = r'(?:python|torchrun)[^`\n|]*?bnaf\.py( --[^h][^`\n|#]*)'  # all except --help
    commands = list(dict.fromkeys(re.findall(pattern, readme)))
    for mode in ('train', 'evaluate', 'generate', 'visualize'):
        assert any(mode in command for command in commands), mode

    monkeypatch.chdir(tmp_path)
    write_readme_data(tmp_path)
    for name in tabular.TABLES:
        tiny_tables.set_counts(monkeypatch, name)
    newest = None
    for command in commands:
        words = shlex.split(command)
        if '--restore_file' in command:
            words = [word.replace('results/RUN/', f'{newest.parent}/') for word in words]
        elif '--train' in words:
            words += ['--n_flows=1', '--hidden_dim=4', '--n_epochs=2']
        small = ['--n_epochs=5', '--n_flows=1', '--hidden_dim=4']
        if '--input' in command or '--scores' in command:
            bnaf.main(['--train', '--dataset=my.csv', *small])
        if '--given' in command:
            bnaf.main(['--train', '--dataset=my.csv', '--condition=age', *small])
        bnaf.main(words)
        newest = select_checkpoint('bnaf', bnaf.Request(), 'evaluate')


def write_readme_data(folder):
    """Write small tables under the names that the README's commands use."""
    people_table().to_csv(folder / 'my.csv', index=False)
    people_table(30).to_csv(folder / 'new.csv', index=False)
    write_rows(folder / 'breast_cancer.csv', 200, d=5)
    diabetes = people_table(200).rename(columns={'height': 'bmi', 'weight': 'target'})
    diabetes.to_csv(folder / 'diabetes.csv', index=False)
    for name in ('val.npy', 'test.npy'):
        write_rows(folder / name, 200)
    tiny_tables.write_power(folder / 'data')
    tiny_tables.write_miniboone(folder / 'data')
    for data_dir in ('data', 'DATA'):
        tiny_tables.write_bsds300_images(folder / data_dir)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    'words, part',
    [
        ([], 'one of the arguments --train --evaluate --generate --visualize --check is required'),
        (['--train', '--dataset=u7'], 'unknown data set'),
        (['--train', '--input=new.csv'], '--input'),
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
    assert part in refusal_line(bnaf, capsys, *words)
    assert not list(tmp_path.rglob('*.p*'))  # neither checkpoint nor picture


@pytest.mark.parametrize(
    'words, part',
    [
        (['--evaluate', '--hidden_dim=7'], '--hidden_dim=7 contradicts'),
        (['--evaluate', '--dataset=u1'], 'contradicts'),
        (['--evaluate', '--seed=5'], '--seed=5 contradicts the checkpoint'),
        (['--visualize', '--vis_dims=3'], 'out of range: there are 0 to 2'),
        (['--visualize', '--vis_dims=wait'], 'the nearest are weight'),
    ],
)
def test_bad_commands_for_a_checkpoint(words, part, trained_bnaf, capsys):
    folder = trained_bnaf.parent
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert part in refusal_line(bnaf, capsys, *words, f'--restore_file={trained_bnaf}')
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_tables_that_do_not_fit_the_model(trained_bnaf, tmp_path, capsys):
    evaluate = ['--evaluate', f'--restore_file={trained_bnaf}']
    people_table().iloc[:, :2].to_csv(tmp_path / 'two.csv', index=False)
    line = refusal_line(bnaf, capsys, *evaluate, f'--input={tmp_path}/two.csv')
    assert 'has 2 columns, and the model was trained on 3: height, weight, age' in line

    table = people_table()
    table.loc[4, 'age'] = np.nan
    table.to_csv(tmp_path / 'hole.csv', index=False)
    line = refusal_line(bnaf, capsys, *evaluate, f'--input={tmp_path}/hole.csv')
    assert '1 missing or infinite values, the first in column age, row 4' in line


def test_a_checkpoint_of_glow_is_refused(trained_glow, capsys):
    line = refusal_line(bnaf, capsys, '--generate', f'--restore_file={trained_glow}')
    assert 'is not a checkpoint of bnaf.py' in line
