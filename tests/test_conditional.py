"""Conditional densities and anomalies by the command line, from training to pictures."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import CPU, mixed_table, only, refusal_line
from scipy.stats import norm

import bnaf
from bnaf import BNAFDensity
from datasets import anomalies, learned, plots
from datasets.tabular import load_run_table

SMALL = ['--n_flows=2', '--hidden_dim=4', '--batch_size=50', '--ema_decay=0.9']
GIVEN = ['--drop=index', '--condition=city,old']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The best.pt of a model of x and y given city and old, of mixed.csv beside its run."""
    return train(tmp_path_factory.mktemp('mixed'), mixed_table(), *GIVEN, '--n_epochs=60')


@pytest.fixture(scope='module')
def trained_on_x(tmp_path_factory):
    """The best.pt of a model of x given y and city, of mixed.csv beside its run."""
    words = ['--columns=x', '--condition=y,city', '--n_epochs=40']
    return train(tmp_path_factory.mktemp('x'), mixed_table(), *words)


def train(folder, table, *words):
    """Train a small model of a table, which is saved as mixed.csv; return its best.pt."""
    table.to_csv(folder / 'mixed.csv', index=False)
    places = [f'--dataset={folder}/mixed.csv', f'--output_dir={folder}']
    bnaf.main(['--train', *places, *SMALL, *words])
    return only(folder.glob('bnaf_mixed_*/best.pt'))


def run(mode, checkpoint, *words):
    """Run a mode of the script with a checkpoint."""
    bnaf.main([f'--{mode}', f'--restore_file={checkpoint}', *map(str, words)])


# ------------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_the_density_of_a_linear_gaussian_table_is_the_known_one():
    """Given a number and a category: within the bar of the known density's own score."""
    rng = np.random.default_rng(0)

    def draw(n):
        a, b = rng.normal(size=n), rng.choice(['p', 'q', 'r'], n)
        shift = pd.Series(b).map({'p': -1.0, 'q': 0.0, 'r': 2.0}).to_numpy()
        y1 = 1.5 * a + shift + 0.5 * rng.normal(size=n)
        y2 = 0.8 * y1 - a + 0.7 * rng.normal(size=n)
        log_p = norm.logpdf(y1, 1.5 * a + shift, 0.5) + norm.logpdf(y2, 0.8 * y1 - a, 0.7)
        return pd.DataFrame({'a': 3 * a + 5, 'y1': y1, 'b': b, 'y2': y2}), log_p

    model = BNAFDensity(condition=['a', 'b'], n_epochs=60, ema_decay=0.99).fit(draw(5000)[0])
    new, known = draw(2000)
    scores = model.score_samples(new)
    bar = 2 * known.std() / math.sqrt(len(known))
    assert abs(scores.mean() - known.mean()) < bar
    assert np.abs(scores - known).mean() < 0.2
    shuffled = new.assign(b=new['b'].sample(frac=1, random_state=0).to_numpy())
    assert model.score_samples(shuffled).mean() < known.mean() - 10 * bar


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path):
    mixed_table().to_csv(tmp_path / 'mixed.csv', index=False)
    models = []
    for name, parts in (('whole', [4]), ('parts', [2, 4])):
        words = [f'--dataset={tmp_path}/mixed.csv', f'--output_dir={tmp_path}/{name}', *SMALL]
        for k, n_epochs in enumerate(parts):
            options = ['--resume'] if k else GIVEN
            bnaf.main(['--train', *words, *options, f'--n_epochs={n_epochs}'])
        path = only((tmp_path / name).glob('*/checkpoint.pt'))
        models.append(bnaf.load_checkpoint(path)['model'])
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name
    assert any('context_weight' in name for name in models[0])


def test_columns_travel_in_the_checkpoint(trained):
    saved = bnaf.load_checkpoint(trained)
    assert saved['config'].condition == ['city', 'old'] and saved['config'].drop == ['index']
    assert saved['units']['columns'] == ['x', 'y'] and saved['input_dims'] == [2, 4]
    assert saved['units']['conditions'] == [
        {'name': 'city', 'mean': 0.0, 'std': 1.0, 'categories': ['Oslo', 'Rome']},
        {'name': 'old', 'mean': 0.0, 'std': 1.0, 'categories': ['0', '1']},
    ]


# ------------------------------------------------------------------------- scores and anomalies


def test_scores_are_given_the_conditions(trained, tmp_path, capsys):
    capsys.readouterr()
    run('evaluate', trained)
    assert 'mixed.csv test, given city, old: -' in capsys.readouterr().out
    mean = json.loads(trained.with_name('results.json').read_text())['log_likelihood_nats']
    assert mean == pytest.approx(-math.log(2 * math.pi * math.e), abs=0.4)

    table = mixed_table()
    table[['y', 'old', 'x', 'city']].to_csv(tmp_path / 'less.csv', index=False)
    table.assign(more='text').to_csv(tmp_path / 'more.csv', index=False)
    for name in ('less', 'more'):
        run(
            'evaluate',
            trained,
            f'--input={tmp_path}/{name}.csv',
            f'--scores={tmp_path}/{name}.s.csv',
        )
    less, more = (pd.read_csv(tmp_path / f'{name}.s.csv') for name in ('less', 'more'))
    pd.testing.assert_frame_equal(less, more)
    expected = BNAFDensity.load(trained).score_samples(table)
    np.testing.assert_allclose(less['log_likelihood'], expected, atol=1e-4)


def test_percentiles_are_those_among_the_validation_rows(trained, tmp_path):
    saved = bnaf.load_checkpoint(trained)
    data = load_run_table(saved['config'], saved)
    objective = bnaf.Objective(bnaf.restore_model(saved, CPU), data)
    process = bnaf.Process(0, 1, CPU)
    of_validation = -bnaf.row_losses(objective, data.validation, process).numpy()

    run('evaluate', trained, f'--scores={tmp_path}/s.csv')
    scores = pd.read_csv(tmp_path / 's.csv')
    below = (of_validation < scores['log_likelihood'].to_numpy()[:, None]).mean(1)
    np.testing.assert_allclose(scores['percentile'], 100 * below, atol=100 / len(of_validation))
    assert scores['percentile'].between(0, 100).all()
    assert scores['percentile'].is_monotonic_increasing is False


def test_explain_names_the_cells_that_make_rows_unlikely(trained, tmp_path, capsys):
    table = mixed_table(seed=1)
    table.loc[7, 'x'] += 12
    table.loc[11, 'y'] -= 12
    table.to_csv(tmp_path / 'new.csv', index=False)
    capsys.readouterr()
    run(
        'evaluate',
        trained,
        f'--input={tmp_path}/new.csv',
        '--explain',
        f'--scores={tmp_path}/s.csv',
    )
    out = capsys.readouterr().out
    assert 'row 7: ' in out and 'nats: x (+' in out and 'row 11: ' in out and 'nats: y (+' in out
    assert out.count('row ') <= anomalies.N_PRINTED

    scores = pd.read_csv(tmp_path / 's.csv')
    names = ['row', 'log_likelihood', 'percentile', 'column_1', 'gain_1', 'column_2', 'gain_2']
    assert list(scores) == names
    assert scores['column_1'][7] == 'x' and scores['column_1'][11] == 'y'
    is_low = scores['percentile'] < anomalies.LOW_PERCENTILE
    assert scores['column_1'][~is_low].isna().all()
    assert scores['column_1'][is_low].notna().mean() > 0.8
    assert (scores['gain_1'].dropna() > 0).all()
    both = scores.dropna()
    assert (both['gain_1'] >= both['gain_2']).all()

    # the gain is that of the best cell, by hand
    model = BNAFDensity.load(trained)
    quantiles = model.data_.quantiles[:, 0] * model.data_.std[0] + model.data_.mean[0]
    rows = pd.concat([table[7:8]] * len(quantiles)).assign(x=quantiles)
    gain = model.score_samples(rows).max() - model.score_samples(table[7:8])[0]
    assert scores['gain_1'][7] == pytest.approx(gain, abs=1e-3)


def test_small_tables_have_no_percentiles_and_explain_their_own_lowest_rows(tmp_path, capsys):
    """One in ten of 60 rows validates, which says little of a percentile."""
    table = mixed_table(60)[['x', 'y']]
    table.loc[3, 'x'] += 15
    checkpoint = train(tmp_path, table, '--n_epochs=20')
    words = [f'--input={tmp_path}/mixed.csv', f'--scores={tmp_path}/s.csv', '--explain']
    capsys.readouterr()
    run('evaluate', checkpoint, *words)
    scores = pd.read_csv(tmp_path / 's.csv')
    assert 'percentile' not in scores
    assert scores['column_1'].notna().sum() == 3 and scores['column_1'][3] == 'x'
    assert capsys.readouterr().out.count('\nrow ') == 3


def test_old_checkpoints_are_explained_once_their_table_is_there(tmp_path, capsys):
    stored = Path(bnaf.__file__).with_name('tests') / 'checkpoints' / 'bnaf_3.pt'
    with pytest.raises(ValueError, match='of an older version: train it on'):
        BNAFDensity.load(stored).explain(np.ones((3, 2)))
    copy = tmp_path / 'bnaf_3.pt'
    copy.write_bytes(stored.read_bytes())
    run('evaluate', copy, '--explain')
    assert 'row ' in capsys.readouterr().out


def test_damaged_quantiles_of_validation_scores(trained, tmp_path, capsys):
    saved = torch.load(trained)
    for quantiles in ([math.nan] * 30, [1.0, 0.0] * 20, [0.0] * 2000):
        torch.save({**saved, 'validation_quantiles': quantiles}, tmp_path / 'bad.pt')
        line = refusal_line(bnaf, capsys, '--evaluate', f'--restore_file={tmp_path}/bad.pt')
        assert 'damaged: its validation_quantiles' in line


def test_overwrite(trained, tmp_path, capsys):
    words = [f'--scores={tmp_path}/s.csv']
    run('evaluate', trained, *words)
    line = refusal_line(bnaf, capsys, '--evaluate', f'--restore_file={trained}', *words)
    assert 'is there already' in line and '--overwrite' in line
    (tmp_path / 's.csv').write_text('old')
    run('evaluate', trained, '--overwrite', *words)
    assert (tmp_path / 's.csv').read_text().startswith('row,log_likelihood,percentile\n')
    run('generate', trained, '--given=city=Rome,old=1', f'--output={tmp_path}/s.csv', '--overwrite')
    assert (tmp_path / 's.csv').read_text().startswith('city,x,old,y,log_likelihood\n')


# -------------------------------------------------------------------------------------- samples


def test_samples_follow_what_is_given(trained, tmp_path):
    pd.DataFrame({'old': [True, False], 'id': [5, 6], 'city': ['Rome', 'Oslo']}).to_csv(
        tmp_path / 'given.csv', index=False
    )
    words = [f'--output={tmp_path}/new.csv', '--n_samples=300']
    run('generate', trained, f'--given={tmp_path}/given.csv', *words)
    table = pd.read_csv(tmp_path / 'new.csv')
    assert list(table) == ['city', 'x', 'old', 'y', 'log_likelihood']
    assert list(table['city']) == 300 * ['Rome'] + 300 * ['Oslo']
    means = table['x'].groupby(table['city']).mean()
    assert means['Rome'] == pytest.approx(7, abs=0.5)
    assert means['Oslo'] == pytest.approx(0, abs=0.5)

    run('evaluate', trained, f'--input={tmp_path}/new.csv', f'--scores={tmp_path}/s.csv')
    scores = pd.read_csv(tmp_path / 's.csv')['log_likelihood']
    np.testing.assert_allclose(scores, table['log_likelihood'], atol=1e-3)


def test_every_test_row_comes_back(trained, capsys):
    run('check', trained)
    assert 'mixed.csv test: 40 of 40 rows come back within' in capsys.readouterr().out


@pytest.mark.parametrize(
    'suffix, part', [('.h5', 'can only hold numbers, and city is text'), ('.npy', 'has no names')]
)
def test_files_that_cannot_hold_the_samples_are_refused_before_any_is_drawn(
    suffix, part, trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(bnaf, 'sample_rows', None)
    words = ['--given=city=Rome,old=1', f'--output={tmp_path}/x{suffix}']
    assert part in refusal_line(bnaf, capsys, '--generate', f'--restore_file={trained}', *words)


def test_samples_of_some_columns_of_a_table_without_names(tmp_path, capsys):
    """A file of them without names would be read as other columns."""
    np.save(tmp_path / 'my.npy', np.random.default_rng(0).normal(size=(60, 4)))
    words = [f'--dataset={tmp_path}/my.npy', f'--output_dir={tmp_path}', '--n_epochs=1']
    bnaf.main(['--train', *words, *SMALL, '--drop=1'])
    checkpoint = only(tmp_path.glob('bnaf_*/best.pt'))
    words = ['--generate', f'--restore_file={checkpoint}']
    line = refusal_line(bnaf, capsys, *words, f'--output={tmp_path}/x.npy')
    assert 'has no names for the columns' in line
    run('generate', checkpoint, f'--output={tmp_path}/x.csv', '--n_samples=5')
    run('evaluate', checkpoint, f'--input={tmp_path}/x.csv', f'--scores={tmp_path}/s.csv')
    scores, samples = (pd.read_csv(tmp_path / f'{name}.csv') for name in 'sx')
    np.testing.assert_allclose(scores['log_likelihood'], samples['log_likelihood'], atol=1e-3)


# ------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    'words, kind',
    [
        ([], 'draw_pairs'),
        (['--vis_dims=y'], 'draw_pairs'),
        (['--given=city=Rome,old=1'], 'draw_density'),
    ],
)
def test_pictures_of_two_columns(words, kind, trained, monkeypatch):
    assert picture(monkeypatch, trained, *words)[0] == kind


def picture(monkeypatch, checkpoint, *words):
    """Visualize a model; return which function drew the picture, and its arguments."""
    drawn = []
    for name in ('draw_pairs', 'draw_density', 'draw_curves', 'draw_fan'):
        draw = getattr(plots, name)

        def remember(*arguments, name=name, draw=draw):
            drawn.append((name, arguments))
            return draw(*arguments)

        monkeypatch.setattr(learned, name, remember)
    file = checkpoint.with_name('visualization.png')
    file.unlink(missing_ok=True)
    run('visualize', checkpoint, *words)
    assert file.read_bytes().startswith(b'\x89PNG')
    return only(drawn)


def test_a_fan_of_quantiles_along_a_number(trained_on_x, monkeypatch):
    """The quantiles are those of samples, and the data beside them have the same category."""
    kind, (values, quantiles, levels, points, names, title) = picture(
        monkeypatch, trained_on_x, '--given=city=Rome'
    )
    assert kind == 'draw_fan' and names == ('y', 'x') and 'given city=Rome' in title
    assert quantiles.shape == (len(values), len(levels))
    assert (np.diff(quantiles, axis=1) > 0).all()

    middle = len(values) // 2
    model = BNAFDensity.load(trained_on_x)
    samples = model.sample(4000, {'y': values[middle], 'city': 'Rome'}, random_state=0)['x']
    shares = [(samples < quantile).mean() for quantile in quantiles[middle]]
    assert shares == pytest.approx(levels, abs=0.03)
    rome = mixed_table().query('city == "Rome"')
    np.testing.assert_allclose(np.sort(points[0]), np.sort(rome['y']), atol=1e-5)


def test_a_curve_for_each_category_and_each_row(trained_on_x, tmp_path, monkeypatch):
    kind, (x, curves, _, column, _) = picture(monkeypatch, trained_on_x, '--given=y=2')
    assert kind == 'draw_curves' and list(curves) == ['city=Oslo', 'city=Rome'] and column == 'x'
    for density in curves.values():
        assert density.sum() * (x[1] - x[0]) == pytest.approx(1, abs=0.1)
    assert (curves['city=Oslo'] * x).sum() < (curves['city=Rome'] * x).sum()

    (tmp_path / 'given.csv').write_text('y,city\n0,Oslo\n3,Rome\n')
    _, (_, curves, *_) = picture(monkeypatch, trained_on_x, f'--given={tmp_path}/given.csv')
    assert list(curves) == ['y=0, city=Oslo', 'y=3, city=Rome']


def test_one_condition_gets_a_fan_without_being_asked(tmp_path, monkeypatch):
    words = ['--columns=x', '--condition=y', '--n_epochs=1']
    checkpoint = train(tmp_path, mixed_table(100), *words)
    assert picture(monkeypatch, checkpoint)[0] == 'draw_fan'


def test_pictures_of_three_columns_given_a_row(tmp_path, monkeypatch, capsys):
    table = mixed_table(100).assign(z=np.random.default_rng(1).normal(size=100))
    checkpoint = train(tmp_path, table, *GIVEN, '--n_epochs=1')
    given = '--given=city=Rome,old=1'
    kind, (real, drawn, columns, title) = picture(monkeypatch, checkpoint, given, '--vis_dims=z,x')
    assert kind == 'draw_pairs' and columns == ['z', 'x'] and 'given city=Rome, old=1' in title
    assert real.shape == drawn.shape == (100, 2)
    words = ['--visualize', f'--restore_file={checkpoint}', given]
    assert 'unknown column' in refusal_line(bnaf, capsys, *words, '--vis_dims=nonsense')


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    'words, part',
    [
        (['--generate'], 'the model has conditions: add --given=city=...,old=...'),
        (['--generate', '--given=city=Rome'], 'the model is conditioned on old'),
        (['--generate', '--given=city=Roma,old=1'], "'Roma' in row 0 is not among the 2"),
        (['--generate', '--given=town=Rome,old=1'], "unknown condition 'town': the nearest are"),
        (['--generate', '--given=Rome'], '--given takes NAME=VALUE'),
        (['--generate', '--given=none.csv'], 'none.csv: no such table'),
        (['--visualize', '--given=city=Rome'], '--given lacks old'),
        (['--visualize', '--given=city=Rome,old=1', '--vis_dims=x'], 'more than two columns'),
        (['--evaluate', '--given=city=Rome'], '--given goes with --generate or --visualize'),
        (['--generate', '--condition=city'], 'which has condition=city,old'),
        (['--evaluate', '--explain', '--scores=s.npy'], '--scores should end in .csv'),
        (['--generate', '--explain'], '--explain goes with --train or --evaluate'),
    ],
)
def test_bad_commands(words, part, trained, capsys):
    mode, *others = words
    line = refusal_line(bnaf, capsys, mode, f'--restore_file={trained}', *others)
    assert part in line, line


def test_given_for_a_model_without_conditions(trained_bnaf, capsys):
    words = [f'--restore_file={trained_bnaf}', '--given=age=40']
    for mode in ('--generate', '--visualize'):
        line = refusal_line(bnaf, capsys, mode, *words)
        assert '--given' in line and 'condition' in line


def test_pictures_have_room_for_few_curves(trained_on_x, tmp_path, capsys):
    lines = [f'{k},Rome' for k in range(learned.MOST_CURVES + 1)]
    (tmp_path / 'given.csv').write_text('\n'.join(['y,city', *lines]))
    words = [f'--restore_file={trained_on_x}', f'--given={tmp_path}/given.csv']
    line = refusal_line(bnaf, capsys, '--visualize', *words)
    assert '9 densities are too many for a picture: choose at most 8 by --given' in line
