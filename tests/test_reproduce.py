"""Recipes are what is recorded; a training fits its minutes, leaves few files and goes on."""

import json
import os
import shlex
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import keeping
import planning
import pytest
import recipes
import reproduce
import results
import torch
from helpers import CPU, only
from hypothesis import given
from hypothesis import strategies as st
from recipes import RECIPES, Job, Recipe
from tiny_data import write_mnist
from tiny_tables import write_miniboone

import bnaf
import glow
from datasets.tabular import TABLES

TINY = {
    'tiny_glow': 'python glow.py --train --dataset=digits --depth=1 --width=4 --n_levels=1 '
    '--n_epochs=2 --batch_size=100',
    'tiny_bnaf': 'python bnaf.py --train --hidden_dim=4 --batch_size=20 --n_epochs=3',
}


@pytest.fixture(scope='module', autouse=True)
def tiny_recipes():
    with pytest.MonkeyPatch.context() as patch:
        for name, command in TINY.items():
            patch.setitem(RECIPES, name, Recipe(command=command))
        yield


def make_job(name, folder):
    return recipes.make_job(name, folder / 'data', folder / 'work')


def refusal(capsys, *words):
    """Return the one line with which reproduce.py refuses a command."""
    with pytest.raises(SystemExit) as stop:
        reproduce.main([str(word) for word in words])
    assert stop.value.code == 2
    line = only(capsys.readouterr().err.splitlines())
    assert line.startswith('reproduce.py: error: ')
    return line


# ----------------------------------------------------------------------------------------- recipes


def test_every_recorded_row_has_one_recipe():
    rows = [recipe.row for recipe in RECIPES.values() if recipe.row]
    assert sorted(rows) == sorted(recipes.recorded_rows())


@pytest.mark.parametrize('name', [name for name in RECIPES if RECIPES[name].row])
def test_a_recipe_trains_what_its_row_records(name):
    row = recipes.recorded_rows()[RECIPES[name].row]
    script, *words = RECIPES[name].words()
    job = Job(name, script, words, 'somewhere', '')
    command = results.training_command(job.script, job.config, world_size=1)
    assert set(shlex.split(command)) - {'--data_dir=DATA'} == set(shlex.split(row['command'])) - {
        '--data_dir=DATA'
    }


def test_the_list_shows_all_recipes(capsys):
    reproduce.main(['--list'])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(' | ')[0].strip('| ') for line in lines[2:]] == list(RECIPES)
    shown = '\n'.join(lines)
    for row in recipes.recorded_rows().values():
        assert results.score_cell(row) in shown
    assert 'python -m datasets fetch celeba' in shown


def test_tables_that_are_made_of_others(tmp_path):
    job = make_job('breast_cancer', tmp_path)
    assert len(job.script.load_run_table(job.config, None).columns) == 30

    (tmp_path / 'data').mkdir(exist_ok=True)
    write_miniboone(tmp_path / 'data', n=sum(TABLES['miniboone'][0]))
    job = make_job('miniboone_part', tmp_path)
    assert len(job.script.load_run_table(job.config, None).columns) == 43


@pytest.mark.parametrize(
    'words, message',
    [
        (['mnits'], "unknown name 'mnits': perhaps mnist; --list shows all"),
        ([], 'give a name'),
        (['u1'], 'give --out=DIR'),
        (['u1', '--minutes=0', '--out=here'], '--minutes=0 is not above 0'),
        (['mnist', '--out=here', '--data_dir=gone'], 'python -m datasets fetch mnist'),
        (['photos_b', '--out=here', '--data_dir=gone'], 'photos'),
        (['miniboone_part', '--out=here', '--data_dir=gone'], 'fetch miniboone'),
        (['u1', '--out=file/below'], 'cannot be written'),
        (['--check', '--out=empty'], 'holds no results.json'),
        (['u1', '--out=damaged'], 'cannot be read'),
        (['u1', 'u2', 'u3', 'u4', 'rings', 'digits', 'faces', '--out=here'], 'more than 8 files'),
        (['u1', 'u2', 'u3', 'u4', 'speed', '--out=here'], 'more than 8 files'),
        (['u1', '--nonsense'], 'unrecognized arguments'),
    ],
)
def test_what_is_refused(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').write_text('')
    for folder, text in (('empty', None), ('damaged', '{')):
        (tmp_path / folder).mkdir()
        if text:
            (tmp_path / folder / 'results.json').write_text(text)
    assert message in refusal(capsys, *words, '--work=work')


# ---------------------------------------------------------------------------------------- planning


@pytest.mark.parametrize('seconds, n_steps', [(600, 60), (0, 3)])
def test_steps_are_measured_until_their_time_is_over(seconds, n_steps, tmp_path, monkeypatch):
    take_step = bnaf.Training.take_step
    steps = []

    def counted_step(run):
        steps.append(run.step)
        return take_step(run)

    monkeypatch.setattr(bnaf.Training, 'take_step', counted_step)
    job = make_job('tiny_bnaf', tmp_path)
    measured = planning.measure(job, seconds, launched=time.time() - 5)
    assert steps == list(range(n_steps))
    assert measured['step_seconds'] > 0 and measured['save_seconds'] > 0
    assert measured['item_seconds'] > 0 and measured['start_seconds'] > 5

    data = bnaf.load_run_table(job.config, None)
    assert measured['n_validation'] == len(data.validation)
    assert measured['n_test'] == len(data.test)
    assert measured['steps_per_epoch'] == bnaf.EPOCH_BATCHES
    assert measured['epochs_per_validation'] == 1
    assert not (tmp_path / 'work').exists()


def test_a_training_of_images_is_measured(tmp_path):
    """It ends by itself, before all steps are taken. Its epochs are too short to validate each."""
    measured = planning.measure(make_job('tiny_glow', tmp_path), 600, launched=time.time())
    assert measured['step_seconds'] > 0 and measured['item_seconds'] > 0
    assert measured['epochs_per_validation'] > 1


@pytest.mark.parametrize('n_steps, mean', [(60, 2), (20, 2), (4, 9), (1, 0)])
def test_the_first_steps_do_not_count(n_steps, mean):
    """Ten steps of 9 s come before steps of 2 s; of fewer, the first half does not count."""
    clock = planning.StepClock(bnaf, 600)
    seconds = [9] * planning.N_WARMUP + [2] * planning.N_STEPS
    clock.ends = [100 + sum(seconds[: k + 1]) for k in range(n_steps)]
    step, first_step = clock.step_seconds()
    assert step == mean
    warmed_up = clock.ends[max(1, min(planning.N_WARMUP, n_steps // 2)) - 1]
    n_warmup = clock.ends.index(warmed_up) + 1
    assert first_step == warmed_up - n_warmup * step


@given(
    step=st.floats(1e-4, 10),
    fixed=st.floats(0, 20),
    each=st.floats(0, 0.1),
    seconds=st.floats(1, 1e4),
)
def test_as_many_epochs_as_fit(step, fixed, each, seconds):
    job = Job('mnist', *split(RECIPES['mnist'].words()), 'data', '')
    measured = {
        'start_seconds': 6.0,
        'step_seconds': step,
        'save_seconds': 0.1,
        'steps_per_epoch': 100,
        'epochs_per_validation': 5,
        'validation_seconds': fixed,
        'item_seconds': each,
        'n_train': 3200,
        'n_validation': 100,
        'n_test': 200,
    }

    def total(n_epochs):
        validation = fixed + 100 * each + 0.2
        training = n_epochs * (100 * step + validation / 5) + validation
        return 6 + training + fixed + 200 * each + sum(drawing)

    drawing = [planning.seconds_after_training(job, measured)[1]]
    assert drawing[0] > 3200 * each  # editing a picture encodes them
    n_epochs = planning.choose_epochs(job, measured, seconds)
    assert 1 <= n_epochs <= job.config.n_epochs
    assert n_epochs == 1 or total(n_epochs) < seconds
    assert n_epochs == job.config.n_epochs or total(n_epochs + 1) > 0.95 * seconds - 1e-6


def split(words):
    return words[0], words[1:]


@pytest.mark.parametrize('name', ['mnist', 'celeba_a', 'u1', 'power'])
def test_the_schedule_is_as_short_as_the_training(name):
    job = Job(name, *split(RECIPES[name].words()), 'data', '')
    n = job.config.n_epochs
    assert planning.schedule_words(job.config, n) == [f'--n_epochs={n}']

    for n_epochs in (1, n // 2):
        words = [*job.words, *planning.schedule_words(job.config, n_epochs)]
        short = Job(name, job.script_name, words, 'data', '').config
        assert short.n_epochs == n_epochs
        assert short.n_epochs_warmup <= max(n_epochs / 10, 0)
        if job.script is bnaf:
            assert short.lr_patience == max(1, round(job.config.lr_patience * n_epochs / n))
        unchanged = {'n_epochs': n, 'n_epochs_warmup': job.config.n_epochs_warmup}
        if job.script is bnaf:
            unchanged['lr_patience'] = job.config.lr_patience
        assert replace(short, **unchanged) == job.config


# ------------------------------------------------------------------------------------ what is kept


def restored(script, file):
    """Return the model of a file of weights, as the README restores it."""
    saved = torch.load(file, weights_only=True)
    saved['config'] = script.Config(**saved['config'])
    return script.restore_model(saved, CPU)


def test_weights_are_kept_as_they_fit(trained_bnaf, tmp_path, monkeypatch):
    size = trained_bnaf.stat().st_size
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    expected = restored(bnaf, trained_bnaf).log_prob(x)

    rooms = {size: 'all', size - 1: 'float32', 1: 'nothing'}
    full, _ = keeping.reduced_checkpoint(trained_bnaf, size - 1)
    rooms[len(full) - 1] = 'float16'
    for room, text in rooms.items():
        monkeypatch.setattr(keeping, 'MAX_BYTES', room)
        assert text in keeping.write_weights(trained_bnaf, tmp_path, 'name', 1)
        if text == 'nothing':
            assert not list(tmp_path.iterdir())
            continue
        file = only(tmp_path.iterdir())
        assert file.stat().st_size <= room
        tolerance = 0.05 if text == 'float16' else 0
        torch.testing.assert_close(
            restored(bnaf, file).log_prob(x), expected, rtol=0, atol=tolerance
        )
    assert bnaf.load_checkpoint(trained_bnaf)  # it has not been changed


def test_weights_are_cut_into_files(trained_glow, tmp_path, monkeypatch):
    size = trained_glow.stat().st_size
    monkeypatch.setattr(keeping, 'MAX_BYTES', size // 2)
    text = keeping.write_weights(trained_glow, tmp_path, 'name', 3)
    assert 'all' in text and '3 files' in text
    parts = [tmp_path / f'name.pt.{k}' for k in (1, 2, 3)]
    assert b''.join(part.read_bytes() for part in parts) == trained_glow.read_bytes()
    assert keeping.weight_files(tmp_path, 'name') == parts

    # smaller ones leave no part of the larger ones behind
    keeping.write_weights(trained_glow, tmp_path, 'name', 1)
    assert [path.name for path in tmp_path.iterdir()] == ['name.pt']


# ---------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    'unit, score, epochs, verdict',
    [
        ('bits/dim', 1.49, 12, 'as good'),
        ('bits/dim', 1.0, 12, 'as good'),
        ('bits/dim', 1.51, 12, 'WORSE'),
        ('bits/dim', 1.51, 11, 'not judged'),
        ('nats', 0.51, 12, 'as good'),
        ('nats', 0.49, 12, 'WORSE'),
        ('nats of KL', 1.51, 12, 'WORSE'),
        ('nats of KL', 1.49, 12, 'as good'),
    ],
)
def test_scores_are_judged_within_both_bars(unit, score, epochs, verdict, tmp_path, capsys):
    """The bars are 0.3 and 0.4, so that together they allow a difference of 0.5."""
    row = {'score': 1.0, 'two_standard_errors': 0.3, 'unit': unit, 'effective_sample_size': None}
    entry = {**row, 'score': score, 'two_standard_errors': 0.4, 'stage': 'done'}
    entry |= {'n_epochs': epochs, 'recipe_epochs': 12, 'is_complete': True}
    text, is_worse = reproduce.compare(entry, row, '')
    assert verdict in text and is_worse == (verdict == 'WORSE')

    _, is_worse = reproduce.compare({**entry, 'is_complete': False}, row, '')
    assert not is_worse
    text, is_worse = reproduce.compare(entry, None, 'Glow 3.35')
    assert 'Glow 3.35' in text and not is_worse


def test_check_exits_with_1_where_a_score_is_worse(tmp_path, capsys):
    row = recipes.recorded_rows()['u1']
    entry = {**row, 'stage': 'done', 'n_epochs': 200, 'recipe_epochs': 200, 'is_complete': True}
    entries = {'u1': entry, 'speed': {'stage': 'passed'}, 'u2': {'stage': 'training'}}
    file = tmp_path / 'results.json'
    file.write_text(json.dumps(entries))
    reproduce.main(['--check', f'--out={tmp_path}'])
    assert 'u1: 0.0014' in capsys.readouterr().out

    entry['score'] += 1
    file.write_text(json.dumps(entries))
    with pytest.raises(SystemExit, match='1'):
        reproduce.main(['--check', f'--out={tmp_path}'])
    assert 'WORSE' in capsys.readouterr().out


# ------------------------------------------------------------------------------ checks of a machine


def run_checks(tmp_path, monkeypatch, code=0, minutes=10):
    """Run gpu_tests and speed without running anything; return the commands and their limits."""
    commands = []

    def fake_run(call, words, log, end, update=None):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text('3 passed\n')
        commands.append(SimpleNamespace(words=words, seconds=end - time.monotonic()))
        return code

    monkeypatch.setattr(reproduce.Call, 'run', fake_run)
    places = [f'--out={tmp_path}/out', f'--work={tmp_path}/work', f'--minutes={minutes}']
    reproduce.main(['speed', 'gpu_tests', *places])
    return commands


@pytest.mark.parametrize('minutes', [3, 10])
def test_tests_come_before_speed_within_four_minutes(minutes, tmp_path, monkeypatch, capsys):
    tests, speed = run_checks(tmp_path, monkeypatch, minutes=minutes)
    assert 'pytest' in tests.words and speed.words[0].endswith('speed.py')
    assert f'--out={tmp_path}/out' in speed.words
    given = float(only(w for w in speed.words if w.startswith('--minutes=')).split('=')[1])
    assert tests.seconds < 60 * min(4, minutes) / 2
    assert 60 * given < speed.seconds <= 60 * min(4, minutes)
    assert capsys.readouterr().out.splitlines() == [
        'gpu_tests: passed: 3 passed',
        'speed: passed: 3 passed',
    ]


def test_a_failed_test_fails_the_call(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match='2'):
        run_checks(tmp_path, monkeypatch, code=1)
    assert 'gpu_tests, speed failed' in capsys.readouterr().err


def test_without_pytest_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce.importlib.util, 'find_spec', lambda name: None)
    assert len(run_checks(tmp_path, monkeypatch)) == 1
    assert 'pytest is not installed' in capsys.readouterr().out.splitlines()[0]


# ------------------------------------------------------------------------------------- whole calls


def read_entries(folder):
    return json.loads((folder / 'results.json').read_text())


def call_words(folder, *names, minutes=60):
    places = [f'--{place}={folder}/{place}' for place in ('out', 'work')]
    return [*names, *places, f'--data_dir={folder}/data', f'--minutes={minutes}']


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    """The folder of a call that has trained two tiny models side by side, and its output."""
    folder = tmp_path_factory.mktemp('done')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, 'UPDATE_SECONDS', 5)
        lines = []
        patch.setattr(reproduce, 'say', lambda name, text: lines.append((name, text)))
        reproduce.main(call_words(folder, *TINY))
    return SimpleNamespace(folder=folder, lines=lines)


@pytest.mark.slow
def test_a_call_leaves_few_small_files(done):
    files = {path.name: path.stat().st_size for path in (done.folder / 'out').iterdir()}
    pictures_and_weights = {f'{name}.{ending}' for name in TINY for ending in ('png', 'pt')}
    assert files.keys() == {'results.json', 'log.txt'} | pictures_and_weights
    assert max(files.values()) < 16 * 2**20 and len(files) <= 8
    log = (done.folder / 'out' / 'log.txt').read_text()
    assert all(f'==== {name}' in log for name in TINY)


@pytest.mark.slow
def test_an_entry_says_what_its_run_has_reached(done):
    entries = read_entries(done.folder / 'out')
    for name, entry in entries.items():
        script = glow if name == 'tiny_glow' else bnaf
        run = only((done.folder / 'work' / name).glob(f'{script.NAME}_*'))
        scores = json.loads((run / 'results.json').read_text())
        assert entry['stage'] == 'done' and entry['is_complete']
        assert entry['score'] == scores.get('bits_per_dim', scores.get('log_likelihood_nats'))
        assert entry['row']['score'] == entry['score']
        assert entry['row']['steps'] == entry['step']
        saved = script.load_checkpoint(done.folder / 'out' / f'{name}.pt')
        assert saved['step'] == scores['step']
        assert saved['config'].n_epochs == entry['n_epochs'] == entry['recipe_epochs']
        assert list(run.glob('generated_samples*'))
        assert list(run.glob('manipulated_*')) + list(run.glob('visualization.png'))


@pytest.mark.slow
def test_lines_are_few_and_named(done):
    assert {name for name, _ in done.lines} == set(TINY)
    assert len(done.lines) < 30
    assert any('test score' in text for _, text in done.lines)


@pytest.mark.slow
def test_a_stopped_call_goes_on(tmp_path, monkeypatch, capsys):
    """A signal during training leaves files; the same command then ends the same training."""
    long = 'python bnaf.py --train --hidden_dim=4 --batch_size=20 --n_epochs=8'
    monkeypatch.setitem(RECIPES, 'tiny_bnaf', Recipe(command=long))
    monkeypatch.setattr(reproduce, 'UPDATE_SECONDS', 0.2)
    keep = keeping.Keeper.keep

    def keep_and_stop(keeper, job, plan, stage):
        entry = keep(keeper, job, plan, stage)
        if stage == 'training' and entry.get('step', 0) > 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return entry

    with monkeypatch.context() as patch:
        patch.setattr(keeping.Keeper, 'keep', keep_and_stop)
        with pytest.raises(SystemExit, match='2'):
            reproduce.main(call_words(tmp_path, 'tiny_bnaf'))
    assert 'stopped by SIGTERM; the same command goes on' in capsys.readouterr().err
    first = read_entries(tmp_path / 'out')['tiny_bnaf']
    assert first['stage'].startswith('stopped') and not first['is_complete']
    assert (tmp_path / 'out' / 'tiny_bnaf.png').exists()

    reproduce.main(call_words(tmp_path, 'tiny_bnaf'))
    entry = read_entries(tmp_path / 'out')['tiny_bnaf']
    assert entry['stage'] == 'done' and entry['is_complete']
    assert entry['n_epochs'] == first['n_epochs'] == 8
    assert entry['step'] == 8 * bnaf.EPOCH_BATCHES > first['step']
    only((tmp_path / 'work' / 'tiny_bnaf').glob('bnaf_*'))


@pytest.mark.slow
def test_one_failure_does_not_end_the_others(tmp_path, capsys, monkeypatch):
    (tmp_path / 'data').mkdir()
    write_mnist(tmp_path / 'data')
    damaged = next((tmp_path / 'data').rglob('train-images*'))
    damaged.write_bytes(b'nonsense')
    really_reproduce = reproduce.reproduce

    def reproduce_or_enter(job, call):
        if job.name == 'mnist':
            really_reproduce(job, call)
        else:
            call.keeper.enter(job.name, {'stage': 'done'})

    monkeypatch.setattr(reproduce, 'reproduce', reproduce_or_enter)
    with pytest.raises(SystemExit, match='2'):
        reproduce.main(call_words(tmp_path, 'mnist', 'tiny_bnaf'))
    assert 'mnist failed' in capsys.readouterr().err
    entries = read_entries(tmp_path / 'out')
    stage = entries['mnist']['stage']
    assert stage.startswith('failed: it could not be measured') and 'is not an idx file' in stage
    assert entries['tiny_bnaf']['stage'] == 'done'
