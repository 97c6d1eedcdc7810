"""BNAFDensity: an estimator that scikit-learn takes for one of its own."""

import dataclasses
import inspect
import io
import json
import math
import pickle
import re
import signal
import unittest
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import mixed_table, only, people_table, refusal_line
from known_tables import draw_table
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import bnaf
from bnaf import BNAFDensity

SMALL = dict(n_flows=1, hidden_dim=4, n_epochs=12, batch_size=50)


def rows(n=300, d=3, seed=0):
    """Draw n rows (n, d) of a Gaussian whose columns are correlated."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ (np.eye(d) + 0.5 * np.tri(d)) + 10


@pytest.fixture(scope='module')
def fitted():
    """An estimator of three columns without names, and what it was fitted to."""
    x = rows()
    return BNAFDensity(**SMALL).fit(x), x


@pytest.fixture(scope='module')
def conditional():
    """An estimator of x and y given city and old, and the table it was fitted to."""
    table = mixed_table()
    options = dict(n_flows=2, hidden_dim=4, n_epochs=60, batch_size=50, ema_decay=0.9)
    return BNAFDensity(condition=['city', 'old'], drop=['index'], **options).fit(table), table


# -------------------------------------------------------------------- what scikit-learn asks for


@pytest.mark.slow
@parametrize_with_checks([BNAFDensity()])
def test_checks_of_scikit_learn(estimator, check, monkeypatch):
    """All that ``check_estimator`` makes, with the default parameters, and none left out."""
    monkeypatch.setenv('SCIPY_ARRAY_API', '1')  # else scikit-learn leaves one out
    try:
        check(estimator)
    except unittest.SkipTest as error:
        pytest.fail(f'left out: {error}')


def test_its_parameters_are_the_options_of_the_command():
    parameters = inspect.signature(BNAFDensity).parameters
    options = {field.name: field for field in dataclasses.fields(bnaf.Config)}
    of_files = {'dataset', 'data_dir', 'test_file', 'max_rows'}
    of_energies = {'annealing'}
    of_estimators = {'device', 'verbose'}
    assert parameters.keys() - of_estimators == options.keys() - of_files - of_energies
    for name in parameters.keys() - of_estimators:
        default = None if name in bnaf.TABLE_OPTIONS else options[name].default
        assert parameters[name].default == default, name
        assert f'        {name}: ' in BNAFDensity.__doc__ or name in ('columns', 'drop')


def test_defaults_depend_on_the_number_of_training_rows(monkeypatch):
    """Nine tenths of the rows train: 100 of 111 are as many as the limit."""
    small, more = dict(hidden_dim=2, batch_size=20), dict(hidden_dim=3, batch_size=40)
    monkeypatch.setattr(bnaf, 'BY_ROWS', {100: small, math.inf: more})
    for n_rows, defaults in ((110, small), (111, more)):
        config = config_of(BNAFDensity(n_epochs=1).fit(rows(n=n_rows)))
        assert defaults.items() <= config.items()
        config = config_of(BNAFDensity(n_epochs=1, batch_size=30).fit(rows(n=n_rows)))
        assert config['batch_size'] == 30 and config['hidden_dim'] == defaults['hidden_dim']


def config_of(model):
    """Return the options of the training of an estimator."""
    return torch.load(io.BytesIO(model.checkpoint_), weights_only=True)['config']


@pytest.mark.slow
def test_samples_of_heavy_tails_stay_near_the_data():
    """The paper's form has a bounded last flow, whose inverse explodes at its rim."""
    table, *_ = draw_table('heavy tails', 600, 4)
    farthest = {}
    for last_residual in (None, 'none'):
        model = BNAFDensity(last_residual=last_residual, seed=4).fit(table)
        noise = torch.randn(20_000, 20, generator=torch.Generator().manual_seed(0)).double()
        with torch.no_grad():
            samples, _ = model.model_.inverse(noise)
        farthest[last_residual] = samples.abs().amax(1)

    of_data = abs((table - model.data_.mean) / model.data_.std).max()
    assert 0.5 * of_data < farthest[None].max() < 2 * of_data
    of_paper = farthest['none']
    assert of_paper.isnan().any() and of_paper.nan_to_num(0.0).max() > 3 * of_data


def test_scores_are_log_densities_in_the_units_of_the_data(fitted):
    model, x = fitted
    scores = model.score_samples(x)
    assert scores.shape == (300,) and scores.dtype == np.float64
    assert model.score(x) == pytest.approx(scores.sum())

    _, logdet = np.linalg.slogdet(np.cov(x.T))
    entropy = 1.5 * np.log(2 * np.pi * np.e) + logdet / 2
    assert -scores.mean() == pytest.approx(entropy, abs=0.4)
    scaled = BNAFDensity(**SMALL).fit(1000 * x)
    np.testing.assert_allclose(scaled.score_samples(1000 * x), scores - 3 * np.log(1000), atol=1e-3)


def test_a_density_of_one_column_integrates_to_one():
    model = BNAFDensity(**SMALL).fit(rows(d=1))
    grid = np.linspace(-20, 40, 20_001)[:, None]
    total = np.exp(model.score_samples(grid)).sum() * (grid[1, 0] - grid[0, 0])
    assert total == pytest.approx(1, abs=0.01)


def test_pipeline_grid_search_and_cross_validation(fitted):
    _, x = fitted
    small = {**SMALL, 'n_epochs': 2}
    pipeline = make_pipeline(StandardScaler(), BNAFDensity(**small)).fit(x)
    assert pipeline.score_samples(x).shape == (300,)
    search = GridSearchCV(BNAFDensity(**small), {'hidden_dim': [2, 4]}, cv=2, n_jobs=2).fit(x)
    assert search.best_params_['hidden_dim'] in (2, 4)
    assert np.isfinite(cross_val_score(clone(search.best_estimator_), x, cv=2)).all()


def test_threads_fit_the_same_as_one_after_the_other():
    parts = [rows(seed=k) for k in range(4)]
    small = {**SMALL, 'n_epochs': 3}
    expected = [BNAFDensity(**small).fit(x).score(x) for x in parts]
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda x: BNAFDensity(**small).fit(x), parts))
    assert [model.score(x) for model, x in zip(models, parts)] == expected


def test_fitting_leaves_the_random_numbers_of_others_alone(fitted):
    _, x = fitted
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    BNAFDensity(**{**SMALL, 'n_epochs': 1}).fit(x)
    assert (torch.rand(1), np.random.rand()) == before


def test_pickles_score_and_sample_the_same(fitted):
    model, x = fitted
    copy = pickle.loads(pickle.dumps(model))
    assert (copy.score_samples(x) == model.score_samples(x)).all()
    assert (copy.sample(5, random_state=1) == model.sample(5, random_state=1)).all()


def test_fit_writes_nothing_and_sets_no_signal_handler(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, 'signal', None)
    BNAFDensity(**SMALL).fit(rows())
    assert not list(tmp_path.iterdir())
    output = capsys.readouterr()
    assert output.out == output.err == ''
    BNAFDensity(verbose=True, **SMALL).fit(rows())
    assert 'step' in capsys.readouterr().err


def test_the_best_validation_score_counts_not_the_last(monkeypatch):
    validate, losses = bnaf.Training.validate, iter([3.0, 1.0, 2.0, 2.0])

    def validate_as_told(run, folder):
        validate(run, folder)
        run.validation_loss = next(losses)
        steps.append((run.step, next(run.average.module.parameters()).clone()))

    steps = []
    monkeypatch.setattr(bnaf.Training, 'validate', validate_as_told)
    model = BNAFDensity(**{**SMALL, 'n_epochs': 4}).fit(rows())
    assert len(steps) == 4
    (_, best), (_, last) = steps[1], steps[3]
    own = next(model.model_.parameters())
    assert torch.equal(own, best.double()) and not torch.equal(own, last.double())


# --------------------------------------------------------------------------- columns and conditions


def test_frames_keep_their_names():
    table = people_table(200)
    model = BNAFDensity(**SMALL).fit(table)
    assert list(model.feature_names_in_) == list(table.columns)
    samples = model.sample(7, random_state=0)
    assert isinstance(samples, pd.DataFrame) and list(samples) == list(table)
    assert np.isfinite(model.score_samples(samples)).all()
    with pytest.raises(ValueError, match='feature names should match'):
        model.score_samples(table[['weight', 'height', 'age']])
    assert isinstance(BNAFDensity(**SMALL).fit(table.to_numpy()).sample(7), np.ndarray)


def test_a_model_that_leaves_columns_out_needs_only_the_others():
    table = mixed_table()
    model = BNAFDensity(columns=['x', 'y'], **SMALL).fit(table)
    assert model.n_features_in_ == 5
    scores = model.score_samples(table)
    np.testing.assert_array_equal(model.score_samples(table[['y', 'x']]), scores)
    np.testing.assert_array_equal(model.score_samples(table[['x', 'y']].to_numpy()), scores)
    assert list(model.sample(3)) == ['x', 'y']

    by_index = BNAFDensity(columns=['2', 4], **SMALL).fit(table)
    np.testing.assert_array_equal(by_index.score_samples(table), scores)
    array = table[['index', 'x', 'y']].to_numpy(float)
    by_array = BNAFDensity(drop=[0], **SMALL).fit(array)
    np.testing.assert_array_equal(by_array.score_samples(array), scores)
    np.testing.assert_array_equal(by_array.score_samples(array[:, 1:]), scores)


def test_conditional_scores(conditional):
    """They are those of the columns given the conditions, which follow their categories."""
    model, table = conditional
    assert model.data_.columns == ('x', 'y')
    scores = model.score_samples(table)
    # the table is x ~ N(5 [Rome] + 2 [old], 1), y ~ N(x / 2, 1)
    assert scores.mean() == pytest.approx(-np.log(2 * np.pi * np.e), abs=0.3)
    elsewhere = table.assign(city=np.where(table['city'] == 'Rome', 'Oslo', 'Rome'))
    assert model.score_samples(elsewhere).mean() < scores.mean() - 3
    renamed = table.assign(old=table['old'].map({True: 'true', False: '0'}))
    np.testing.assert_array_equal(model.score_samples(renamed), scores)


def test_conditional_samples(conditional):
    model, table = conditional
    samples = model.sample(2000, given={'city': 'Rome', 'old': True}, random_state=0)
    assert list(samples) == ['city', 'x', 'old', 'y']  # in the order of the table
    assert samples['x'].mean() == pytest.approx(7, abs=0.4)
    assert (samples['city'] == 'Rome').all()
    assert np.isfinite(model.score_samples(samples)).all()

    given = pd.DataFrame({'old': [0, 1], 'city': ['Oslo', 'Rome'], 'more': [1, 2]})
    both = model.sample(500, given=given, random_state=0)
    assert len(both) == 1000
    means = both['x'].groupby(both['city']).mean()
    assert means['Rome'] - means['Oslo'] == pytest.approx(7, abs=0.6)
    lists = model.sample(2, given={'city': ['Oslo', 'Rome', 'Rome'], 'old': [0, 1, 0]})
    assert list(lists['city']) == ['Oslo', 'Oslo', 'Rome', 'Rome', 'Rome', 'Rome']


def test_conditions_of_arrays():
    x = rows()
    model = BNAFDensity(condition=[1], **SMALL).fit(x)
    for given in ({1: 10.0}, np.array([[10.0]]), {'column 1': 10.0}):
        samples = model.sample(4, given=given, random_state=0)
        assert samples.shape == (4, 3) and (samples[:, 1] == 10).all()
    assert model.score_samples(samples).shape == (4,)


def test_arrays_in_the_order_of_the_table(conditional):
    """A table is scored the same with and without the names of its columns."""
    table = people_table(200)
    small = {**SMALL, 'n_epochs': 2}
    for options in ({'condition': ['height']}, {'columns': ['age', 'weight', 'height']}):
        model = BNAFDensity(**options, **small).fit(table)
        with pytest.warns(UserWarning, match='valid feature names'):
            of_array = model.score_samples(table.to_numpy())
        np.testing.assert_array_equal(of_array, model.score_samples(table))
    model = BNAFDensity(condition=[0], **small).fit(table.to_numpy())
    with pytest.warns(UserWarning, match='fitted without feature names'):
        of_table = model.score_samples(table)
    np.testing.assert_array_equal(of_table, model.score_samples(table.to_numpy()))
    model = BNAFDensity(drop=['height'], **small).fit(table)
    with pytest.warns(UserWarning, match='valid feature names'):
        of_array = model.score_samples(table.to_numpy())
    np.testing.assert_array_equal(of_array, model.score_samples(table))


def test_one_column_need_not_be_in_a_list_and_may_be_a_number_of_numpy():
    table = people_table(100)
    for condition in ('age', 2, np.int64(2), np.array(['age']), ('age',)):
        model = BNAFDensity(condition=condition, **{**SMALL, 'n_epochs': 1}).fit(table)
        assert model.data_.columns == ('height', 'weight'), condition
        assert clone(model).condition is condition or not isinstance(condition, str | int)


def test_conditions_in_float32_and_names_that_are_numbers():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({'2020': rng.normal(size=90), '2021': rng.choice([0.1, 0.2, 0.3], 90)})
    small = {**SMALL, 'n_epochs': 1}
    model = BNAFDensity(condition=['2021'], **small).fit(table.astype(np.float32))
    assert model.data_.conditions[0].categories == ('0.1', '0.2', '0.3')
    assert len(model.sample(2, given={'2021': 0.1})) == 2
    assert len(model.score_samples(table)) == 90
    with pytest.raises(ValueError, match='column 1 may be number 1 or number 0'):
        BNAFDensity(drop=['1'], **small).fit(table.set_axis(['1', '7'], axis=1))


def test_samples_repeat_by_random_state(fitted):
    model, _ = fitted
    assert (model.sample(5, random_state=3) == model.sample(5, random_state=3)).all()
    assert (model.sample(5, random_state=3) != model.sample(5, random_state=4)).all()
    state = np.random.RandomState(0)
    assert (model.sample(5, random_state=state) != model.sample(5, random_state=state)).all()
    assert (model.sample(5) != model.sample(5)).all()
    assert model.sample(2000, random_state=0).mean(0) == pytest.approx([10, 10, 10], abs=0.4)


@pytest.mark.parametrize(
    'given, part',
    [
        (None, 'sample needs given, with city, old'),
        ({'city': 'Rome'}, 'given lacks old'),
        ({'city': 'Rome', 'odl': 1}, "unknown condition 'odl': the nearest are old"),
        ({'city': 'Roma', 'old': 1}, "city 'Roma' in row 0 is not among the 2"),
        ({'city': ['Rome', 'Oslo'], 'old': [1]}, 'must be of the same length'),
        ({'city': None, 'old': 1}, 'missing'),
        ({np.int64(2): 'Rome', 'old': 1}, "unknown condition 'column 2'"),
        (['Rome'], 'given is of shape (1,), not (n, 2)'),
        (['Rome', 1, 'Oslo', 0], 'given is of shape (4,), not (n, 2)'),
        (pd.DataFrame([['Rome', 1, 2]], columns=['city', 'old', 'old']), 'comes twice'),
        (pd.DataFrame({'city': ['Rome']}), 'given lacks old'),
    ],
)
def test_bad_conditions_of_samples(given, part, conditional):
    with pytest.raises(ValueError) as error:
        conditional[0].sample(3, given=given)
    assert part in str(error.value) and '\n' not in str(error.value)


def test_given_for_a_model_without_conditions(fitted):
    with pytest.raises(ValueError, match='this one has none'):
        fitted[0].sample(3, given={'a': 1})


@pytest.mark.parametrize(
    'options, change, part',
    [
        ({}, {}, "not numeric: city ('Rome', 2 different): add condition=['city'], or"),
        ({'condition': ['town']}, {}, "unknown column 'town': the nearest are"),
        ({'condition': ['city'], 'drop': ['city']}, {}, 'condition and drop both name city'),
        ({'columns': ['x']}, {'x': 1.0}, "constant: x: add drop=['x']"),
        ({'columns': ['x', 'y']}, {'x': np.nan}, 'missing or infinite values'),
        ({'columns': ['x'], 'lr': 1e6}, {}, 'fit again with a lower lr'),
        ({'columns': ['x'], 'n_flows': 0}, {}, 'n_flows=0 is outside'),
        ({'columns': ['x'], 'residual': 'much'}, {}, 'must be one of none, normal, gated'),
        ({'columns': ['x'], 'residual': None}, {}, 'residual=None is not'),
        ({'columns': ['x'], 'seed': None}, {}, 'seed=None is outside'),
        ({'columns': ['x'], 'last_residual': 1}, {}, 'last_residual=1 is not'),
        ({'columns': ['x'], 'n_epochs': 2.5}, {}, 'n_epochs=2.5 is outside'),
        ({'columns': ['x'], 'n_epochs': True}, {}, 'n_epochs=True is outside'),
        ({'columns': ['x'], 'dequantize': 'no'}, {}, "dequantize='no' is not"),
        ({'columns': ['x'], 'lr': [1.0]}, {}, 'lr=[1.0] is outside'),
        ({'columns': ['x'], 'device': 'gpu'}, {}, "device='gpu' is none of"),
        ({'condition': ['city', 'old']}, {'x': 'much'}, 'not numeric: x'),
    ],
)
def test_bad_fits(options, change, part):
    with pytest.raises(ValueError) as error:
        BNAFDensity(**{**SMALL, **options}).fit(mixed_table().assign(**change))
    assert part in str(error.value) and '--' not in str(error.value), error.value


@pytest.mark.parametrize('x', [[1.0, 2.0], None, [[[1.0]]], np.zeros((0, 3))])
def test_inputs_of_other_shapes(x):
    for options in ({}, {'condition': [0]}):
        with pytest.raises(ValueError, match=r'Expected 2D|dim 3|0 sample|NoneType|minimum'):
            BNAFDensity(**options, **SMALL).fit(x)


@pytest.mark.parametrize('n_samples', [0, -1, 2.5, '5', None])
def test_bad_numbers_of_samples(n_samples, fitted):
    with pytest.raises((ValueError, TypeError), match='n_samples'):
        fitted[0].sample(n_samples)


def test_hints_are_python():
    text = "add --drop='id,arrival date' --condition=city,old, or encode them"
    assert bnaf.as_parameters(text) == (
        "add drop=['id', 'arrival date'], condition=['city', 'old'], or encode them"
    )
    assert bnaf.as_parameters('add --dequantize: --drop=0') == "add dequantize: drop=['0']"


def test_tables_of_one_row_and_of_two():
    with pytest.raises(ValueError, match='1 sample'):
        BNAFDensity(**SMALL).fit(rows(1))
    assert np.isfinite(BNAFDensity(**SMALL).fit(rows(2, 1)).score_samples(rows(2, 1))).all()


def test_discrete_columns_warn_and_can_be_spread():
    x = np.round(rows())
    with pytest.warns(UserWarning, match='few distinct values.* drop them or add dequantize'):
        BNAFDensity(**SMALL).fit(x)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = BNAFDensity(dequantize=True, **SMALL).fit(x)
    assert set(model.sample(100).ravel()) <= set(x.ravel())


def test_explain_finds_spoilt_cells(monkeypatch):
    """Of rows with one cell spoilt that are found, nine in ten name it first."""
    rng = np.random.default_rng(0)
    model = BNAFDensity(n_flows=2, hidden_dim=4, n_epochs=60, batch_size=50, ema_decay=0.9)
    model.fit(rows(1000, 5))
    new = rows(1000, 5, seed=1)
    spoilt = rng.choice(1000, 50, replace=False)
    cells = rng.integers(5, size=50)
    new[spoilt, cells] += rng.choice([-1, 1], 50) * 4 * new.std(0)[cells]

    threshold = np.quantile(model.score_samples(rows(1000, 5, seed=2)), 0.05)
    found = model.score_samples(new)[spoilt] < threshold
    gains = model.explain(new[spoilt])
    assert gains.shape == (50, 5) and found.mean() > 0.9
    monkeypatch.setattr(bnaf, 'ROWS_AT_ONCE', 63)  # three rows of 21 quantiles
    np.testing.assert_allclose(model.explain(new[spoilt]), gains, atol=1e-12)
    assert (gains.argmax(1) == cells)[found].mean() >= 0.9


def test_the_readmes_python(tmp_path, monkeypatch):
    readme = Path(bnaf.__file__).with_name('README.md').read_text()
    code, *_ = re.findall(r'```python\n(.*?)```', readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    table = people_table(200)
    table.to_csv('my.csv', index=False)
    names = {}
    exec(code.replace('fit(', 'set_params(n_epochs=20).fit('), names)

    assert names['log_p'].shape == (200,) and np.isfinite(names['log_p']).all()
    assert list(names['rows']) == list(table) and len(names['rows']) == 1000
    assert (names['rows_of_40']['age'] == 40).all()
    assert list(names['gains']) == list(table) and Path('model.pt').exists()
    assert names['rows_of_40']['height'].mean() == pytest.approx(table['height'].mean(), abs=3)


# ----------------------------------------------------------------------- checkpoints of the command


def test_the_command_reads_what_the_estimator_saves(conditional, tmp_path, capsys):
    model, table = conditional
    table.to_csv(tmp_path / 'new.csv', index=False)
    path = tmp_path / 'model.pt'
    model.save(path)
    words = [f'--restore_file={path}', f'--scores={tmp_path}/s.csv']
    bnaf.main(['--evaluate', f'--input={tmp_path}/new.csv', *words])
    scores = pd.read_csv(tmp_path / 's.csv')['log_likelihood']
    np.testing.assert_allclose(scores, model.score_samples(table), atol=1e-4)

    words = [f'--restore_file={path}', f'--output={tmp_path}/o.csv', '--n_samples=9']
    bnaf.main(['--generate', '--given=city=Rome,old=1', *words])
    assert list(pd.read_csv(tmp_path / 'o.csv')) == ['city', 'x', 'old', 'y', 'log_likelihood']
    for mode in ('evaluate', 'visualize', 'check', 'train'):
        line = refusal_line(bnaf, capsys, f'--{mode}', f'--restore_file={path}')
        assert 'model.pt was fitted from Python and knows no table' in line and '--input' in line


def test_the_estimator_loads_what_it_saves_and_what_the_command_saves(
    conditional, trained_bnaf, tmp_path
):
    model, table = conditional
    model.save(tmp_path / 'model.pt')
    copy = BNAFDensity.load(tmp_path / 'model.pt')
    assert copy.get_params() == {**model.get_params(), **copy_of_resolved(model)}
    assert (copy.score_samples(table) == model.score_samples(table)).all()
    given = {'city': 'Oslo', 'old': 0}
    pd.testing.assert_frame_equal(
        copy.sample(3, given, random_state=0), model.sample(3, given, random_state=0)
    )

    of_command = BNAFDensity.load(trained_bnaf)
    people = people_table()
    saved = json.loads(trained_bnaf.with_name('results.json').read_text())
    assert of_command.score_samples(people).mean() == pytest.approx(
        saved['log_likelihood_nats'], abs=0.3
    )
    assert list(of_command.feature_names_in_) == list(people.columns)
    clone(of_command)


def copy_of_resolved(model):
    """Return the parameters that ``fit`` had to choose."""
    given = model.get_params()
    defaults = bnaf.own_table_defaults(360)
    return {name: value for name, value in defaults.items() if given[name] is None}


def test_gains_have_the_names_of_the_columns(conditional):
    model, table = conditional
    gains = model.explain(table.head(3))
    assert list(gains) == ['x', 'y'] and len(gains) == 3


def test_places_where_no_model_can_be_saved(fitted, tmp_path):
    for path in (tmp_path, tmp_path / 'none' / 'model.pt'):
        with pytest.raises(ValueError, match='is a folder, or in none'):
            fitted[0].save(path)


def test_files_that_are_no_models(tmp_path):
    with pytest.raises(ValueError, match='no such checkpoint'):
        BNAFDensity.load(tmp_path / 'none.pt')
    (tmp_path / 'bad.pt').write_bytes(b'nothing')
    with pytest.raises(ValueError, match='cannot be read as a checkpoint'):
        BNAFDensity.load(tmp_path / 'bad.pt')

    words = ['--n_epochs=1', '--hidden_dim=2', f'--output_dir={tmp_path}']
    bnaf.main(['--train', '--dataset=u1', *words])
    with pytest.raises(ValueError, match='a model of the energy u1, not of rows'):
        BNAFDensity.load(only(tmp_path.glob('bnaf_u1_*/best.pt')))
