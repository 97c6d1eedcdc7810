"""Images given their class or attributes: density, training, every mode, bad input and files."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CPU,
    assert_close,
    only,
    perturbed,
    refusal_line,
    run_mode,
    single_process,
    train_until,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_data import attribute_rows, write_folder, write_table
from tiny_models import CELL, TINY, digits_config, random_images, tiny_glow, training_words

import glow
from common import checkpoints
from common.errors import UserError
from common.tensors import load_tensors, save_tensors
from datasets import (
    ImageCondition,
    condition_of_checkpoint,
    load_images,
    load_run_images,
    name_for_file,
)
from datasets.image_conditions import make_condition
from datasets.images import choose_condition, with_conditions

CLASSES = ['--condition=classes', '--lr=0.01', '--n_epochs_warmup=0']
run = partial(run_mode, glow)
PHOTOS = ['--dataset=folder', '--image_size=8', '--n_levels=1', '--batch_size=8', *TINY[:3]]


def of_three_classes(seed=0, **options):
    """Return a perturbed model of three classes, and its conditions, of which two are frequent."""
    model = perturbed(tiny_glow(n_conditions=3, **options), 0.1, seed)
    return model, ImageCondition(tuple('abc'), True, np.eye(3, dtype=np.float32), (4, 5, 1))


def of_two_attributes():
    """Return a perturbed model of two attributes, and its conditions: no image has both."""
    model = perturbed(tiny_glow(n_conditions=2), 0.1)
    values = np.array([[0, 0], [1, 0], [0, 1]], np.float32)
    return model, ImageCondition(('Round', 'Red'), False, values, (7, 2, 1))


CASES = pytest.mark.parametrize('make', [of_three_classes, of_two_attributes])


def noisy_images(n):
    """Return n images of noise, and their noise of the dequantization."""
    u = torch.linspace(0, 1, 16 * n + 1, dtype=torch.float64)[:-1]
    return random_images(n, 1, 4, 4), u.view(n, 1, 4, 4)


def rows_of(condition, n):
    """Return conditions of n images: each value in turn."""
    values = torch.from_numpy(condition.values).double()
    return values[torch.arange(n) % len(values)]


def log_probs(model, condition, x, u):
    """Return log p(x | y) for each value of y in turn, (B, K)."""
    columns = []
    for value in condition.values:
        y = torch.from_numpy(value).to(u).expand(len(x), -1)
        columns.append(model.log_prob(x, u, y))
    return torch.stack(columns, dim=1)


def log_shares(condition):
    """Return log p(y) of each value."""
    counts = torch.tensor(condition.counts, dtype=torch.float64)
    return (counts / counts.sum()).log()


# -------------------------------------------------------------------------------------- the density


@pytest.mark.parametrize('fixed_top', [False, True])
def test_at_first_all_conditions_have_the_same_density(fixed_top):
    model = tiny_glow(n_conditions=3, fixed_top=fixed_top)
    x, u = noisy_images(8)
    glow.initialize(model, x)
    _, condition = of_three_classes()
    log_p = log_probs(model.double(), condition, x, u)
    assert torch.equal(log_p[:, :1].expand(-1, 3), log_p)

    perturbed(model, 0.1)
    log_p = log_probs(model, condition, x, u)
    assert ((log_p[:, 0] - log_p[:, 1]).abs() > 1e-3).all()


@CASES
def test_the_density_given_conditions_integrates_to_one(make):
    """By importance sampling from the flow's own inverse at a higher temperature."""
    model, condition = make()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3000, 16, dtype=torch.float64, generator=generator)
    for value in condition.values:
        y = torch.from_numpy(value).to(noise).expand(len(noise), -1)
        with torch.no_grad():
            x, logdet_inverse = model.inverse(1.2 * noise, y)
            z, logdet = model(x, y)
        log_q = glow.log_normal(noise) - 16 * math.log(1.2) - logdet_inverse
        total = (glow.log_normal(z) + logdet - log_q).exp().mean()
        assert total.item() == pytest.approx(1, abs=0.1)


@CASES
def test_only_the_last_latent_depends_on_the_conditions(make):
    """So the joint density of it and y tells them apart as that of the image does."""
    model, condition = make()
    x, u = noisy_images(6)
    log_p = log_probs(model, condition, x, u)
    _, last = model.log_prob_and_last(x, u, rows_of(condition, 6))
    joint = glow.log_joint(model, last, condition)
    difference = log_p + log_shares(condition) - joint
    assert_close(difference, difference[:, :1].expand_as(difference), atol=1e-6)
    assert (joint[:, 0] - joint[:, 1]).std() > 1e-3


@CASES
def test_scores_of_images_with_conditions_by_hand(make):
    model, condition = make()
    x, u = noisy_images(12)
    y = rows_of(condition, 12)
    with torch.no_grad():
        given, last = model.log_prob_and_last(x, u, y)
        scores = glow.score_conditions(model, condition, 32, given, last, y)
        log_p = log_probs(model, condition, x, u)
        logits = model.head(last)
    bits, *accuracies = scores.values()
    assert list(scores) == ['bits_per_dim_without_conditions', *glow.GUESSERS]
    alone = (log_p + log_shares(condition)).logsumexp(1)
    assert_close(bits, -alone / (32 * math.log(2)), atol=1e-6)

    best = (log_p + log_shares(condition)).argmax(1)
    values = torch.from_numpy(condition.values)
    guesses = [
        values[best],
        (logits > 0).double(),
        values[[np.argmax(condition.counts)]].expand(12, -1),
    ]
    if condition.is_class:
        guesses[1] = F.one_hot(logits.argmax(1), 3).double()
    for guess, score in zip(guesses, accuracies, strict=True):
        rights = (guess == y).double()
        expected = rights.amin(1) if condition.is_class else rights.mean(1)
        assert torch.equal(score.double(), expected)
        assert 0 < score.double().mean() < 1


@pytest.mark.parametrize('fixed_top', [False, True])
def test_without_conditions_a_fixed_prior_is_the_standard_normal(fixed_top):
    model = perturbed(glow.Prior(4, is_fixed=fixed_top), 0.0 if fixed_top else 0.1)
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    z, logdet = model(x)
    assert (torch.equal(z, x) and not logdet.any()) == fixed_top
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum((1, 2, 3))
    assert torch.allclose(model.log_prob(x), normal) == fixed_top


def test_a_fixed_prior_is_not_among_what_is_learned():
    free, fixed = tiny_glow(n_conditions=3), tiny_glow(n_conditions=3, fixed_top=True)
    assert free.n_parameters - fixed.n_parameters == 2 * 8  # log s and b of eight channels
    assert fixed.prior.linear.weight.requires_grad


@pytest.mark.parametrize(
    'n_conditions, y',
    [
        (0, torch.zeros(2, 1)),
        (0, torch.zeros(2, 0)),
        (3, None),
        (3, torch.zeros(2, 2)),
        (3, torch.zeros(1, 3)),
        (3, torch.zeros(3)),
    ],
)
def test_conditions_that_do_not_fit_have_no_density(n_conditions, y):
    model = tiny_glow(n_conditions=n_conditions)
    wanted = r'conditions y of shape \(2, 3\)' if n_conditions else 'no conditions'
    with pytest.raises(ValueError, match=f'the model takes {wanted}, and was given'):
        model.log_prob(random_images(2, 1, 4, 4), None, y)
    with pytest.raises(ValueError, match=f'the model takes {wanted}, and was given'):
        model.sample(2, y=y)


@pytest.mark.parametrize('convert', [torch.Tensor.numpy, torch.Tensor.bool, torch.Tensor.long])
def test_conditions_may_have_any_type(convert):
    model, condition = of_three_classes()
    x, u = noisy_images(3)
    y = rows_of(condition, 3)
    z, _ = model(u, y)
    for function, *args in ((model.log_prob, x, u), (model, u), (model.inverse, z)):
        results = [function(*args, y=some) for some in (y, convert(y))]
        torch.testing.assert_close(*results, rtol=0, atol=0)


def test_samples_depend_on_their_conditions():
    model, condition = of_three_classes()
    with torch.no_grad():
        model.prior.linear.weight[8:] *= 10  # shifts of the last latent
    y = torch.from_numpy(condition.values)
    model.float()
    one, other, again = (
        model.sample(3, 0.7, torch.Generator().manual_seed(0), y[rows].float())
        for rows in ([0, 1, 2], [0, 2, 2], [0, 1, 2])
    )
    assert torch.equal(one, again) and one.shape == (3, 1, 4, 4)
    assert torch.equal(one[[0, 2]], other[[0, 2]]) and not torch.equal(one[1], other[1])


# ---------------------------------------------------------------------------------- the objective


@CASES
@pytest.mark.parametrize('weight_y', [0.0, 0.3])
def test_the_objective_by_hand(make, weight_y):
    model, condition = make()
    x, u = noisy_images(6)
    y = rows_of(condition, 6)
    loss = glow.Objective(model, 32, weight_y=weight_y, is_class=condition.is_class)(x, u, y)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]

    log_p, last = model.log_prob_and_last(x, u, y)
    logits = model.head(last)
    if condition.is_class:
        log_q = logits.log_softmax(1)[y.bool()]
    else:
        log_q = torch.where(y > 0, logits.sigmoid(), 1 - logits.sigmoid()).log().sum(1)
    bits = -log_p.mean() / (32 * math.log(2))
    torch.testing.assert_close(loss, bits)  # that of y is a part of the gradient alone
    objective = bits - weight_y * log_q.mean() / math.log(2)
    expected = torch.autograd.grad(objective, list(model.parameters()), materialize_grads=True)
    torch.testing.assert_close(gradients, list(expected))
    assert model.prior.linear.weight.grad.abs().min() > 0
    assert model.head.weight.grad.any() == model.head.bias.grad.any() == bool(weight_y)


@pytest.mark.parametrize('options', [dict(), dict(fixed_top=True)], ids=['learned', 'fixed'])
def test_a_step_learns_what_depends_on_the_conditions(options):
    config = digits_config(depth=1, width=8, condition=['classes'], n_epochs_warmup=0.0, **options)
    run = glow.Training(config, load_run_images(config, None), single_process(glow))
    for _ in range(2):
        run.take_step()
    for model in (run.model, run.average.module):
        prior, head = model.prior, model.head
        assert prior.linear.weight.all() and head.weight.any() and head.bias.all()
        assert prior.log_s.any() == prior.b.any() == (not config.fixed_top)


def test_conditions_come_with_their_images():
    config = digits_config(condition=['classes'], batch_size=20)
    data = load_run_images(config, None)
    x, _, y = glow.training_batch(data, config, 40, single_process(glow))
    images = {image.tobytes(): k for k, image in enumerate(data.train.images)}
    rows = [images[image.numpy().tobytes()] for image in x]
    assert (y.numpy() == data.train.attributes[rows]).all() and y.dtype == torch.float32
    assert (y.sum(1) == 1).all() and len(y.argmax(1).unique()) > 4


# ------------------------------------------------------------------------------------- the commands


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The best.pt of a tiny model of the digits given their classes."""
    folder = tmp_path_factory.mktemp('digits')
    glow.main(training_words(folder, *CLASSES))
    return only(folder.glob('glow_digits_*/best.pt'))


def write_photos(folder):
    """Write images that are odd or even, of which two attributes tell, and of which late ones."""
    write_folder(folder)
    _, *rows = attribute_rows()
    table = [('image', 'split', 'Odd', 'Even', 'Late', 'Big')]
    for i, (image, split, odd, big) in enumerate(rows):
        table.append((image, split, odd, -odd, 1 if i % 8 < 4 else -1, big))
    write_table(folder, table)


def train_on_photos(folder, *words):
    """Train a tiny model of the images of ``write_photos`` into a folder; return its best.pt."""
    places = [f'--data_dir={folder}/photos', f'--output_dir={folder}/out']
    glow.main(['--train', *PHOTOS, *places, *words])
    return only(folder.glob('out/*/best.pt'))


@pytest.fixture(scope='module')
def trained_on_photos(tmp_path_factory):
    """The best.pt of a tiny model of images given whether they are odd and late."""
    folder = tmp_path_factory.mktemp('photos')
    write_photos(folder / 'photos')
    words = ['--condition=Late,Odd', '--n_epochs=10', '--lr=0.02', '--n_epochs_warmup=0']
    return train_on_photos(folder, *words)


def model_and_data(path):
    """Return the model of a checkpoint and its images, with their conditions."""
    saved = glow.load_checkpoint(path)
    return glow.restore_model(saved, CPU), load_run_images(saved['config'], saved)


@torch.no_grad()
def guess_of_bayes(model, condition, images):
    """Return the number of the value of y that Bayes' rule guesses, by the density of the image."""
    x = torch.from_numpy(images)
    middles = torch.full(x.shape, 0.5)
    return (log_probs(model, condition, x, middles) + log_shares(condition)).argmax(1)


def test_evaluating_prints_and_saves_how_often_a_guess_is_right(trained, capsys):
    run('evaluate', trained)
    results = json.loads(trained.with_name('results.json').read_text())
    text = capsys.readouterr().out
    assert f'digits test, given the class: {results["bits_per_dim"]:.4f} ±' in text
    assert 'bits/dim at 4 bits (179 images' in text
    accuracies = [results[f'accuracy_of_{guesser}'] for guesser in ('bayes_rule', 'head')]
    errors = [2 * math.sqrt(p * (1 - p) / 179) for p in accuracies]
    cells = [f'{p:.1%} ± {error:.1%}' for p, error in zip(accuracies, errors)]
    assert f"right guesses of the class: {cells[0]} by Bayes' rule, {cells[1]} by the head" in text
    assert f'not given the class: {results["bits_per_dim_without_conditions"]:.4f} ±' in text

    model, data = model_and_data(trained)
    noise = [
        torch.rand(1, 8, 8, generator=glow.seeded_generator('cpu', glow.Stream.EVALUATION, i))
        for i in range(179)
    ]
    x, u = torch.from_numpy(data.test.images), torch.stack(noise)
    with torch.no_grad():
        _, last = model.log_prob_and_last(x, u, torch.from_numpy(data.test.conditions))
        guesses = model.head(last).argmax(1)
        log_p = log_probs(model, data.condition, x, u).double() + log_shares(data.condition)
    classes = torch.from_numpy(data.test.attributes.argmax(1))
    assert results['accuracy_of_head'] == pytest.approx((guesses == classes).double().mean().item())
    accuracy = (log_p.argmax(1) == classes).double().mean().item()
    assert results['accuracy_of_bayes_rule'] == pytest.approx(accuracy) and accuracy > 0.2
    bits = -log_p.logsumexp(1).mean().item() / (64 * math.log(2))
    assert results['bits_per_dim_without_conditions'] == pytest.approx(bits, rel=1e-5)


def test_scores_in_bf16(trained):
    results = []
    for words in ([], ['--bf16']):
        run('evaluate', trained, *words)
        results.append(json.loads(trained.with_name('results.json').read_text()))
    for name in ('bits_per_dim', 'bits_per_dim_without_conditions'):
        assert results[1][name] == pytest.approx(results[0][name], abs=0.02)
        assert results[1][name] != results[0][name]


def test_shares_of_two_processes_have_the_scores_of_one(trained, monkeypatch):
    model, data = model_and_data(trained)
    monkeypatch.setattr(glow.dist, 'all_reduce', lambda sums: None)

    def score(process, batch_size):
        return glow.score_split(model, data.test, data.condition, 64, batch_size, process)

    first, second = (score(glow.Process(rank, 2, CPU), 50) for rank in (0, 1))
    whole = score(single_process(glow), 33)
    assert set(whole) >= {'bits_per_dim', glow.WITHOUT_CONDITIONS, *glow.GUESSERS}
    for name, values in whole.items():
        assert not first[name][1::2].any() and not second[name][::2].any()
        torch.testing.assert_close(first[name] + second[name], values, rtol=1e-5, atol=0)


def test_samples_of_every_class(trained, saved_grids):
    run('generate', trained)
    run('generate', trained, '--z_std=0.5', '--n_samples=9')
    (name, rows, labels), (other_name, other_rows, other_labels) = saved_grids
    assert name == 'generated_samples_at_z_std_0.7.png'
    assert labels == [str(k) for k in range(10)] and {len(row) for row in rows} == {8}
    picture = Image.open(trained.with_name(name))
    assert picture.height == 8 + 10 * CELL and picture.width > 8 + 8 * CELL

    model, data = model_and_data(trained)
    for k, row in enumerate(rows):
        generator = glow.seeded_generator('cpu', glow.Stream.SAMPLES, 0, k)
        z = 0.7 * torch.randn(8, 64, generator=generator)
        y = torch.from_numpy(data.condition.values[k]).expand(8, -1)
        expected = {image.tobytes() for image in glow.decode(model, z, y)}
        assert {image.tobytes() for image in row} == expected

    assert other_name == 'generated_samples_at_z_std_0.5.png'
    assert [len(row) for row in other_rows] == [8, 1] * 10
    assert other_labels[::2] == labels and set(other_labels[1::2]) == {''}


def test_samples_of_one_class(trained, saved_grids):
    run('generate', trained, '--given=7')
    run('generate', trained, '--given=7', '--z_std=0.6', '--n_samples=10')
    run('generate', trained, '--given=1', '--z_std=0.6', '--n_samples=10')
    names = [name for name, *_ in saved_grids]
    assert names[0] == 'generated_samples_at_z_std_range_given_7.png'
    assert names[1:] == [f'generated_samples_at_z_std_0.6_given_{k}.png' for k in (7, 1)]
    (_, _, labels), (_, rows, _), (_, other_rows, _) = saved_grids
    assert labels[0] == 'T = 0' and [len(row) for row in rows] == [8, 2]
    assert not np.array_equal(rows[0], other_rows[0])

    model, data = model_and_data(trained)
    for k, samples in ((7, rows), (1, other_rows)):
        (expected,) = glow.sample_grid(model, [0.6], 10, 0, CPU, data.condition.parse(str(k)))
        assert np.array_equal(np.concatenate(samples), expected)


def test_of_many_combinations_the_most_frequent_are_shown():
    model = tiny_glow(n_conditions=5).eval()
    y = np.random.default_rng(0).random((500, 5)) < 0.4
    condition = make_condition('abcde', y, is_class=False)
    assert len(condition.values) > glow.MAX_SHOWN
    rows, labels = glow.sample_each_condition(model, condition, 0.7, 2, 0, CPU)
    assert len(rows) == len(labels) == glow.MAX_SHOWN
    shown = condition.values[: glow.MAX_SHOWN]
    assert labels == [condition.label(value).replace(',', '\n') for value in shown]
    assert min(condition.counts[: glow.MAX_SHOWN]) >= max(condition.counts[glow.MAX_SHOWN :])


def test_a_row_for_each_of_many_combinations_is_a_note(monkeypatch, trained, capsys):
    monkeypatch.setattr(glow, 'MAX_SHOWN', 9)
    run('generate', trained)
    assert 'note: the first 9 of 10; add --given for another one' in capsys.readouterr().out


def test_the_temperature_of_images_under_another_class(trained, saved_grids):
    run('visualize', trained, '--given=3', '--z_std=0.5')
    ((name, (scaled, given), *_),) = saved_grids
    assert name == 'manipulated_sample_given_3_z_std_0.5.png'
    model, data = model_and_data(trained)
    y = torch.from_numpy(data.test.conditions[:8])
    z = glow.encode(model, data.test.images[:8], CPU, y)
    z[:, : -math.prod(model.z_shapes[-1])] *= 0.5
    three = torch.from_numpy(data.condition.parse('3')).expand(8, -1)
    assert np.array_equal(scaled, glow.decode(model, z, y))
    assert np.array_equal(given, glow.decode(model, z, three))


def test_images_under_another_class(trained, saved_grids):
    run('visualize', trained, '--given=3')
    ((name, (unchanged, given), labels, columns),) = saved_grids
    assert name == 'manipulated_sample_given_3.png' and labels == ['unchanged', 'given 3']
    assert columns == [str(k) for k in load_images('digits').test.attributes[:8].argmax(1)]
    _, data = model_and_data(trained)
    assert np.array_equal(unchanged, data.test.images[:8])
    is_three = data.test.attributes[:8, 3]
    changes = (given != unchanged).any((1, 2, 3))
    assert is_three.any() and not changes[is_three].any() and changes[~is_three].any()


@pytest.mark.parametrize('words', [['--given=3'], ['--vis_attrs=3,5', '--vis_alphas=0,1']])
def test_a_photo_is_given_what_it_looks_like(words, trained, saved_grids, tmp_path, capsys):
    model, data = model_and_data(trained)
    guesses = guess_of_bayes(model, data.condition, data.test.images)
    i = int((guesses != torch.from_numpy(data.test.attributes.argmax(1))).nonzero()[0])
    photo = tmp_path / 'photo.png'
    Image.fromarray(data.test.images[i, 0]).save(photo)

    run('visualize', trained, f'--vis_img={photo}', *words)
    assert f'takes {photo} for {guesses[i]}' in capsys.readouterr().out
    ((name, rows, *_),) = saved_grids
    assert name.startswith('manipulated_img_photo_')
    assert np.array_equal(rows[0][0], data.test.images[i])
    assert len(rows) == 2 and len(rows[0]) == (1 if 'given' in words[0] else 2)


def test_a_photo_is_more_likely_of_a_frequent_class(trained):
    model, data = model_and_data(trained)
    for k in (2, 6):
        counts = tuple(10**15 if i == k else 1 for i in range(10))
        skewed = replace(data.condition, counts=counts)
        y = glow.guess_conditions(model, data.test.images[:3], skewed, CPU)
        assert y.argmax(1).tolist() == [k, k, k]


def test_autocast_rounds_neither_the_prior_nor_the_head():
    model, condition = of_three_classes()
    prior, head = model.prior.float(), model.head.float()
    x, y = torch.randn(3, 8, 1, 1), rows_of(condition, 3).float()
    results = []
    for is_enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=is_enabled):
            results.append((*prior(x, y), *prior.inverse(x, y), head(x)))
    assert all(map(torch.equal, *results))


def test_edits_keep_the_class(trained, saved_grids):
    run('visualize', trained, '--vis_attrs=3', '--vis_alphas=0,1')
    ((_, (row,), *_),) = saved_grids
    model, data = model_and_data(trained)
    config = glow.load_checkpoint(trained)['config']
    dz = glow.attribute_directions(model, data, trained.parent, config, CPU)

    y = torch.from_numpy(data.train.conditions)
    z = glow.encode(model, data.train.images, CPU, y).double()
    has = torch.from_numpy(data.train.attributes[:, 3])
    expected = 1.6 * (z[has].mean(0) - z[~has].mean(0))
    torch.testing.assert_close(dz[3].double(), expected, rtol=1e-3, atol=1e-4)

    y = torch.from_numpy(data.test.conditions[:1])
    z = glow.encode(model, data.test.images[:1], CPU, y)
    assert np.array_equal(row[0], data.test.images[0])
    assert np.array_equal(row[1:], glow.decode(model, z + dz[3], y))


def test_checking_a_model_with_conditions(trained, monkeypatch, capsys):
    model, data = model_and_data(trained)
    given, inverse = [], model.prior.inverse

    def watched(z, y):
        given.append(y)
        return inverse(z, y)

    monkeypatch.setattr(model.prior, 'inverse', watched)
    glow.check(model, data, glow.load_checkpoint(trained)['config'], CPU)
    assert 'all 179 images come back within' in capsys.readouterr().out
    of_model, of_prior = given
    assert torch.equal(of_model, of_prior)
    assert np.array_equal(of_prior, data.test.conditions)


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path):
    words = [*CLASSES, '--n_epochs=2', '--translate=1', '--coupling=additive']
    glow.main(training_words(tmp_path / 'whole', *words))
    train_until(glow, 14, training_words(tmp_path / 'stopped', *words))
    stopped = only(tmp_path.glob('stopped/*/checkpoint.pt'))
    glow.main(['--train', f'--restore_file={stopped}'])
    whole, resumed = (
        load_tensors(only(tmp_path.glob('whole/*/checkpoint.pt'))),
        load_tensors(stopped),
    )
    assert whole['step'] == resumed['step'] == 23 and whole['best'] == resumed['best']
    for name in ('model', 'average'):
        for key, value in whole[name].items():
            assert torch.equal(value, resumed[name][key]), key
    assert whole['condition']['counts'] == resumed['condition']['counts']


def test_a_head_that_was_not_trained_has_no_accuracy(tmp_path, capsys):
    glow.main(training_words(tmp_path, *CLASSES, '--weight_y=0'))
    results = json.loads(only(tmp_path.rglob('results.json')).read_text())
    text = capsys.readouterr().out
    assert 'accuracy_of_bayes_rule' in results and 'accuracy_of_head' not in results
    assert "by Bayes' rule, " in text and 'by the head' not in text
    model, _ = model_and_data(only(tmp_path.rglob('best.pt')))
    assert not model.head.weight.any()


# --------------------------------------------------------------------------------------- attributes


def test_attributes_are_kept_as_they_are_named(trained_on_photos):
    """Combinations of them come by how frequent they are among the training images."""
    condition = condition_of_checkpoint(glow.load_checkpoint(trained_on_photos))
    assert condition.names == ('Late', 'Odd') and not condition.is_class
    _, data = model_and_data(trained_on_photos)
    assert np.array_equal(data.train.conditions, data.train.attributes[:, [2, 0]])
    counts = [(data.train.conditions == value).all(1).sum() for value in condition.values]
    assert counts == list(condition.counts) and sum(counts) == 16
    assert sorted(counts, reverse=True) == counts


def test_scores_of_attributes(trained_on_photos, capsys):
    run('evaluate', trained_on_photos)
    assert 'folder test, given Late, Odd: ' in capsys.readouterr().out
    results = json.loads(trained_on_photos.with_name('results.json').read_text())
    model, data = model_and_data(trained_on_photos)
    most_frequent = data.condition.values[0]
    rights = data.test.conditions == most_frequent
    assert results['accuracy_of_most_frequent'] == rights.mean()

    seeds = [glow.seeded_generator('cpu', glow.Stream.EVALUATION, i) for i in range(2)]
    u = torch.stack([torch.rand(3, 8, 8, generator=seed) for seed in seeds])
    with torch.no_grad():
        y = torch.from_numpy(data.test.conditions)
        _, last = model.log_prob_and_last(torch.from_numpy(data.test.images), u, y)
        guesses = model.head(last) > 0
    assert results['accuracy_of_head'] == (guesses == y).double().mean().item()


def test_samples_given_attributes(trained_on_photos, saved_grids):
    run('generate', trained_on_photos)
    run('generate', trained_on_photos, '--given=-Odd,Late', '--z_std=0.7')
    (_, rows, labels), (name, given_rows, _) = saved_grids
    _, data = model_and_data(trained_on_photos)
    assert set(labels) == {'Late\nOdd', 'Late\n-Odd', '-Late\nOdd', '-Late\n-Odd'}
    names = [label.replace('\n', ',') for label in labels]
    assert names == [data.condition.label(value) for value in data.condition.values]
    assert name == 'generated_samples_at_z_std_0.7_given_Late,-Odd.png'
    assert len(rows) == 4 and sum(map(len, given_rows)) == 32


def test_images_keep_the_attributes_that_are_left_out(trained_on_photos, saved_grids):
    run('visualize', trained_on_photos, '--given=-Odd')
    run('visualize', trained_on_photos, '--given=-Late,-Odd')
    (name, (unchanged, given), *_), (_, (_, both), *_) = saved_grids
    assert name == 'manipulated_sample_given_-Odd.png'
    model, data = model_and_data(trained_on_photos)
    assert data.test.conditions.tolist() == [[1, 0], [1, 1]]
    y = torch.from_numpy(data.test.conditions)
    z = glow.encode(model, data.test.images, CPU, y)
    assert (unchanged[1] != given[1]).any() and (given != both).any((1, 2, 3)).all()
    late, neither = torch.tensor([[1.0, 0.0]] * 2), torch.zeros(2, 2)
    for images, conditions in ((unchanged, y), (given, late), (both, neither)):
        assert np.array_equal(images, glow.decode(model, z, conditions))


def test_a_condition_by_its_index(tmp_path, saved_grids):
    write_photos(tmp_path / 'photos')
    best = train_on_photos(tmp_path, '--condition=0')
    assert condition_of_checkpoint(glow.load_checkpoint(best)).names == ('Odd',)
    saved_grids.clear()
    run('generate', best, '--given=-Odd')
    run('generate', best, '--given=Odd')
    assert [name.partition('given')[2] for name, *_ in saved_grids] == ['_-Odd.png', '_Odd.png']


def test_what_no_training_image_shows_is_noted(trained_on_photos, monkeypatch, capsys):
    saved = glow.load_checkpoint(trained_on_photos)
    condition = condition_of_checkpoint(saved)
    model = glow.restore_model(saved, CPU)
    without = replace(condition, values=condition.values[1:], counts=condition.counts[1:])
    missing = condition.label(condition.values[0])
    for known, expected in ((condition, ''), (without, f'note: no training image is {missing}')):
        request = glow.Request(given=missing, z_std=0.7)
        folder = trained_on_photos.parent
        glow.generate(model, known, folder, saved['config'], CPU, request, memory=2**28)
        assert capsys.readouterr().out.partition('wrote')[0].strip() == expected


def test_names_of_files_that_are_cut_differ():
    given = ','.join(f'attribute_{k}' for k in range(10))
    names = {name_for_file(text) for text in (given, given[:-1] + '8', 'a/b', '../a')}
    assert len(names) == 4 and all(len(name) < 120 for name in names)
    assert all(Path(name).name == name for name in names)


def test_classes_of_a_folder(tmp_path, capsys):
    write_folder(tmp_path / 'photos')
    _, *rows = attribute_rows()
    header = 'image', 'split', '2', '0', 'Never'  # names that are numbers, of other places
    table = [(image, split, odd, -odd, -1) for image, split, odd, _ in rows]
    write_table(tmp_path / 'photos', [header, *table])
    best = train_on_photos(tmp_path, '--condition=classes')
    condition = condition_of_checkpoint(glow.load_checkpoint(best))
    assert condition.is_class and condition.names == ('2', '0', 'Never')
    assert condition.values.tolist() == [[1, 0, 0], [0, 1, 0]] and condition.counts == (8, 8)
    assert condition.parse('2').argmax() == 0 and condition.parse('0').argmax() == 1
    with pytest.raises(UserError, match='no training image is of class Never'):
        condition.parse('Never')
    run('generate', best, '--given=0')

    table[-1] = (*table[-1][:2], 1, 1, -1)  # a test image of two classes
    write_table(tmp_path / 'photos', [header, *table])
    line = refusal_line(glow, capsys, '--evaluate', f'--restore_file={best}')
    assert 'do not have exactly one class each' in line


def test_conditions_of_changed_images_are_counted_anew(tmp_path, capsys):
    write_photos(tmp_path / 'photos')
    best = train_on_photos(tmp_path, '--condition=Late,Odd')
    table = tmp_path / 'photos' / 'attributes.csv'
    head_of_table, *rows = table.read_text().splitlines()
    before = condition_of_checkpoint(glow.load_checkpoint(best))
    rows[0] = rows[0].replace('-1,1,1,1', '1,-1,-1,1')
    table.write_text('\n'.join([head_of_table, *rows]))
    words = [f'--restore_file={best}', '--n_epochs=2', '--accept_changed_data']
    glow.main(['--train', *words])
    _, data = model_and_data(best.with_name('checkpoint.pt'))
    assert sum(data.condition.counts) == 16 and data.condition.counts != before.counts
    for value, count in zip(data.condition.values, data.condition.counts, strict=True):
        assert (data.train.conditions == value).all(1).sum() == count

    same = [','.join([*row.split(',')[:2], '1', '1', '1', '1']) for row in rows]
    table.write_text('\n'.join([head_of_table, *same]))
    line = refusal_line(glow, capsys, '--train', *words[:1], '--n_epochs=3', words[2])
    assert 'Late, Odd is now the same in all training images' in line


def with_names(*names):
    """Return the digits with the attributes 3 and 4 alone, under other names."""
    data = load_images('digits')
    parts = {}
    for name in ('train', 'validation', 'test'):
        part = getattr(data, name)
        parts[name] = replace(part, attributes=part.attributes[:, 3:5])
    return replace(data, attribute_names=names, **parts)


@pytest.mark.parametrize('name', ['0', '1', '2021'])
def test_conditions_are_found_by_their_names_only(name):
    """A name may be a number, which is no index here: data may have changed since the training."""
    data = with_names('a', 'b')
    condition = make_condition([name], data.train.attributes[:, 1:], is_class=False)
    with pytest.raises(UserError, match=f"'?{name}'?"):
        with_conditions(data, condition, 'digits')

    given = with_conditions(with_names('a', name), condition, 'digits')
    assert np.array_equal(given.test.conditions, data.test.attributes[:, 1:])


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    'words, part',
    [
        (['--condition=classes'], 'have no classes, of which each has exactly one: choose attr'),
        (['--condition=Latte'], "unknown attribute 'Latte': the nearest are Late"),
        (['--condition=Big'], 'attribute 3 (Big) is the same in all training images'),
        (['--condition=Odd,Late,Odd'], '--condition=Odd,Late,Odd: give up to 10 different'),
        (['--condition=Odd,0'], '--condition=Odd,0: give up to 10 different'),
        (['--condition=7'], 'attribute 7 is out of range: there are 0 to 3'),
        (['--condition='], '--condition is empty'),
        (['--condition=Odd', '--weight_y=-1'], '--weight_y'),
        (['--plain_conv1x1', '--permutation=shuffle'], 'leave out --plain_conv1x1'),
        (['--permutation=sort'], '--permutation'),
        (['--coupling=linear'], '--coupling'),
        (['--translate=8'], '--translate=8 shifts an image of 8 pixels away'),
    ],
)
def test_bad_trainings(words, part, trained_on_photos, tmp_path, capsys):
    photos = trained_on_photos.parents[2] / 'photos'
    places = [f'--data_dir={photos}', f'--output_dir={tmp_path}/out']
    assert part in refusal_line(glow, capsys, '--train', *PHOTOS, *places, *words)
    assert not (tmp_path / 'out').exists()


def test_the_weight_of_no_condition(tmp_path, capsys):
    words = training_words(tmp_path / 'out', '--weight_y=1')
    assert '--weight_y goes with --condition' in refusal_line(glow, capsys, *words)
    assert not (tmp_path / 'out').exists()


def test_names_that_given_could_not_tell_apart(tmp_path, capsys):
    write_folder(tmp_path / 'photos')
    load_images('folder', tmp_path / 'photos', 8)
    _, *rows = attribute_rows()
    for name in ('Odd, or so', '-Odd'):
        table = [('image', 'split', name, 'Even'), *((*row[:3], -row[2]) for row in rows)]
        write_table(tmp_path / 'photos', table)
        places = [f'--data_dir={tmp_path}/photos', f'--output_dir={tmp_path}/out']
        for word in ('--condition=classes', '--condition=0'):
            line = refusal_line(glow, capsys, '--train', *PHOTOS, *places, word)
            assert f'{name!r} cannot be told apart in --given: rename it' in line


def test_images_that_have_no_attributes(tmp_path, capsys):
    write_folder(tmp_path / 'photos')
    places = [f'--data_dir={tmp_path}/photos', f'--output_dir={tmp_path}/out']
    load_images('folder', tmp_path / 'photos', 8)
    for words in (['--condition=classes'], ['--condition=Odd']):
        line = refusal_line(glow, capsys, '--train', *PHOTOS, *places, *words)
        assert 'have no attributes' in line and 'attributes.csv' in line


def test_more_attributes_than_can_be_summed_over():
    rng = np.random.default_rng(0)
    data = load_images('digits')
    attributes = rng.random((len(data.train.images), 11)) < 0.5
    names = tuple(f'a{k}' for k in range(11))
    many = replace(data, attribute_names=names, train=replace(data.train, attributes=attributes))
    with pytest.raises(UserError, match='give up to 10 different attributes'):
        choose_condition(many, names, 'digits')
    assert choose_condition(many, names[1:], 'digits').names == names[1:]


@pytest.mark.parametrize(
    'words, part',
    [
        (['--generate', '--given=11'], '--given=11: the model knows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9'),
        (['--generate', '--given=seven'], '--given=seven: the model knows 0, 1, 2'),
        (['--generate', '--given=1,2'], '--given takes one class, such as --given=9'),
        (['--generate', '--given=,'], '--given takes one class'),
        (['--generate', '--given='], '--given takes one class'),
        (['--visualize', '--given='], '--given takes one class'),
        (['--generate', '--given=7', '--n_samples=3'], '--n_samples goes with --z_std'),
        (['--visualize', '--given=11'], '--given=11: the model knows 0, 1'),
        (['--visualize', '--given=3', '--vis_attrs=3'], 'leave out --vis_attrs and --vis_alphas'),
        (['--visualize', '--given=3', '--vis_alphas=-2,-1,0,1,2'], 'leave out --vis_attrs and'),
        (['--evaluate', '--given=3'], '--given goes with --generate or --visualize'),
        (['--evaluate', '--condition=3'], 'condition=classes'),
        (['--train', '--condition=3'], 'condition=classes'),
        (['--train', '--weight_y=1'], 'weight_y=0.5'),
    ],
)
def test_bad_commands_for_a_checkpoint_of_classes(words, part, trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.parent.iterdir()}
    line = refusal_line(glow, capsys, *words, f'--restore_file={trained}')
    assert part in line, line
    assert before == {path: path.stat().st_mtime_ns for path in trained.parent.iterdir()}


@pytest.mark.parametrize(
    'words, part',
    [
        (['--generate', '--given=Odd'], '--given says nothing of Late: add Late or -Late'),
        (['--generate', '--given=Odd,-Odd,Late'], '--given has two values of Odd'),
        (['--generate', '--given=Odd,Lake'], '--given=Lake: the model knows Late, Odd'),
        (['--visualize', '--given=Odd,- Odd'], '--given has two values of Odd'),
        (['--visualize', '--given=-Odder'], '--given=Odder: the model knows Late, Odd'),
        (['--visualize', '--given=0'], '--given=0: the model knows Late, Odd'),
        (['--evaluate', '--condition=Odd,Late'], 'condition=Late,Odd'),
    ],
)
def test_bad_commands_for_a_checkpoint_of_attributes(words, part, trained_on_photos, capsys):
    line = refusal_line(glow, capsys, *words, f'--restore_file={trained_on_photos}')
    assert part in line, line


@pytest.mark.parametrize('mode', ['--generate', '--visualize'])
def test_given_for_a_model_without_conditions(mode, trained_glow, capsys):
    line = refusal_line(glow, capsys, mode, '--given=3', f'--restore_file={trained_glow}')
    assert '--given is for models that were trained with --condition' in line


def test_images_that_lose_the_attributes_of_a_model(tmp_path, capsys):
    write_photos(tmp_path / 'photos')
    best = train_on_photos(tmp_path, '--condition=Late,Odd')
    write_table(tmp_path / 'photos', attribute_rows())
    for mode in ('--evaluate', '--check', '--visualize', '--train'):
        line = refusal_line(glow, capsys, mode, f'--restore_file={best}')
        assert "the model is given 'Late'" in line
    (tmp_path / 'photos' / 'attributes.csv').unlink()
    assert 'Late' in refusal_line(glow, capsys, '--evaluate', f'--restore_file={best}')
    run('generate', best, '--given=Late,Odd')


@settings(max_examples=100, deadline=None)
@given(
    names=st.lists(st.text('abc', min_size=1), min_size=2, max_size=5, unique=True),
    is_on=st.lists(st.booleans(), min_size=5, max_size=5),
    is_class=st.booleans(),
)
def test_a_label_is_what_given_takes(names, is_on, is_class):
    n = len(names)
    values = np.eye(n, dtype=np.float32)
    condition = ImageCondition(tuple(names), is_class, values, (1,) * n)
    y = values[sum(is_on) % n] if is_class else np.array(is_on[:n], np.float32)
    assert np.array_equal(condition.parse(condition.label(y)), y)
    assert np.array_equal(condition.parse(condition.label(y), 1 - y), y)


@settings(max_examples=200, deadline=None)
@given(text=st.text('a-,b 01'))
def test_any_given_is_right_or_a_clean_error(text):
    for is_class in (False, True):
        condition = ImageCondition(
            ('a', 'b', '-a'), is_class, np.eye(3, dtype=np.float32), (1,) * 3
        )
        for start in (None, np.zeros(3, np.float32)):
            try:
                y = condition.parse(text, start)
            except UserError as error:
                assert '\n' not in str(error)
                continue
            assert y.dtype == np.float32 and y.shape == (3,) and set(y) <= {0, 1}
            assert not is_class or y.sum() == 1


# ------------------------------------------------------------------------------ hostile checkpoints


def resized(condition, names):
    """Return an entry of a checkpoint with other names."""
    return {**condition, 'names': names}


ONE_ONE_MINUS_ONE = torch.eye(10) + torch.eye(10).roll(1, 1) - torch.eye(10).roll(2, 1)
DAMAGES = {
    'no names': lambda c: resized(c, []),
    'a name too few': lambda c: resized(c, c['names'][:-1]),
    'a name twice': lambda c: resized(c, [*c['names'][:-1], '0']),
    'an empty name': lambda c: resized(c, [*c['names'][:-1], '']),
    'names that move the cursor': lambda c: resized(c, [*c['names'][:-1], '\33[2J']),
    'names that are no text': lambda c: resized(c, list(range(10))),
    'a count too few': lambda c: {**c, 'counts': c['counts'][:-1]},
    'no counts': lambda c: {**c, 'counts': []},
    'a count of zero': lambda c: {**c, 'counts': [0, *c['counts'][1:]]},
    'a count below zero': lambda c: {**c, 'counts': [-1, *c['counts'][1:]]},
    'a count that is huge': lambda c: {**c, 'counts': [10**400, *c['counts'][1:]]},
    'counts that are no numbers': lambda c: {**c, 'counts': ['1'] * 10},
    'halves': lambda c: {**c, 'values': c['values'] / 2},
    'a sum of one all the same': lambda c: {**c, 'values': c['values'] @ ONE_ONE_MINUS_ONE},
    'NaN': lambda c: {**c, 'values': c['values'] * math.nan},
    'float64': lambda c: {**c, 'values': c['values'].double()},
    'booleans': lambda c: {**c, 'values': c['values'].bool()},
    'another shape': lambda c: {**c, 'values': c['values'][None]},
    'a number': lambda c: {**c, 'values': torch.tensor(1.0)},
    'a column too few': lambda c: {**c, 'values': c['values'][:, 1:]},
    'no values': lambda c: {**c, 'values': None},
    'two classes at once': lambda c: {**c, 'values': (c['values'] + c['values'].roll(1, 1))},
    'no class': lambda c: {**c, 'values': 0 * c['values']},
    'one value': lambda c: {**c, 'values': c['values'][:1], 'counts': c['counts'][:1]},
    'a value twice': lambda c: {**c, 'values': c['values'][[0, *range(9)]]},
    'too many values': lambda c: {
        **c,
        'values': c['values'].repeat(200, 1),
        'counts': c['counts'] * 200,
    },
    'a class that is a number': lambda c: {**c, 'is_class': 1},
    'more entries': lambda c: {**c, 'more': 1},
    'no entries': lambda c: {},
    'a list': lambda c: [],
}


@pytest.mark.parametrize('name', DAMAGES)
def test_what_a_checkpoint_says_of_its_conditions_is_not_trusted(name, trained, tmp_path, capsys):
    saved = load_tensors(trained)
    condition = DAMAGES[name](saved['condition'])
    if 'values' in condition and condition['values'] is not None:
        condition['values'] = condition['values'].clone()  # not a part of a larger tensor
    save_tensors(tmp_path / 'bad.pt', {**saved, 'condition': condition})
    for mode in ('--generate', '--evaluate'):
        line = refusal_line(glow, capsys, mode, f'--restore_file={tmp_path}/bad.pt')
        assert 'bad.pt' in line and 'damaged' in line and line.isprintable()
        assert 'conditions do not fit' in line or 'condition has the wrong type' in line


@settings(max_examples=200, deadline=None)
@given(
    names=st.lists(st.text(max_size=2), max_size=3),
    is_class=st.booleans(),
    shape=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 9),
    counts=st.lists(st.integers(0, 2**61), max_size=3),
    n=st.integers(0, 3),
)
def test_any_conditions_of_a_checkpoint_can_be_used_or_are_refused(
    names, is_class, shape, seed, counts, n
):
    """Those that are of the right types."""
    values = np.random.default_rng(seed).integers(0, 2, shape).astype(np.float32)
    entry = dict(names=names, is_class=is_class, values=torch.from_numpy(values), counts=counts)
    saved = {'condition': entry, 'input_dims': [1, 4, 4, n], 'path': Path('x.pt')}
    try:
        condition = condition_of_checkpoint(saved)
    except UserError as error:
        assert str(error) == 'x.pt is damaged: its conditions do not fit each other'
        return
    assert (
        len(condition.names) == n and ','.join(map(condition.label, condition.values)).isprintable()
    )
    if n:
        last = torch.zeros(2, 8, 1, 1)
        joint = glow.log_joint(tiny_glow(n_conditions=n), last, condition)
        assert joint.shape == (2, len(counts)) and joint.isfinite().all()


def other_width(saved, key, n):
    """Return the weights of both parts with another number of conditions in one of them."""
    parts = {}
    for part, prefix in (('model', ''), ('average', 'module.')):
        weight = saved[part][prefix + key]
        shape = [n if size == 10 else size for size in weight.shape]
        parts[part] = {**saved[part], prefix + key: torch.zeros(shape)}
    return parts


@pytest.mark.parametrize(
    'change',
    [
        lambda saved: {'input_dims': [*saved['input_dims'][:3], 9]},
        lambda saved: {'input_dims': [*saved['input_dims'][:3], 0]},
        lambda saved: {'input_dims': [*saved['input_dims'][:3], 2**16 - 1]},
        lambda saved: {'input_dims': saved['input_dims'][:3]},
        lambda saved: other_width(saved, 'prior.linear.weight', 9),
        lambda saved: other_width(saved, 'head.weight', 9),
        lambda saved: {'condition': ImageCondition().to_entry()},
        lambda saved: {'config': {**saved['config'], 'translate': 8}},
        lambda saved: {'config': {**saved['config'], 'coupling': 'additive'}},
        lambda saved: {'config': {**saved['config'], 'permutation': 'none'}},
        lambda saved: {'config': {**saved['config'], 'permutation': 'shuffle'}},
    ],
)
def test_parts_of_a_checkpoint_that_disagree(change, trained, tmp_path, capsys):
    saved = load_tensors(trained)
    save_tensors(tmp_path / 'bad.pt', {**saved, **change(saved)})
    for mode in ('--generate', '--evaluate'):
        line = refusal_line(glow, capsys, mode, f'--restore_file={tmp_path}/bad.pt')
        assert 'damaged' in line


def test_conditions_do_not_count_as_size_of_the_images(trained, monkeypatch):
    """Large images of many classes can be learned."""
    monkeypatch.setattr(checkpoints, 'LARGEST_INPUT', 8 * 8 + 1)
    assert glow.load_checkpoint(trained)['input_dims'] == [1, 8, 8, 10]


def test_images_without_end_are_refused_without_conditions_too(trained_glow, tmp_path):
    """No number of conditions may hide the size of the images."""
    saved = load_tensors(trained_glow)
    config = {**saved['config'], 'image_size': 2**15}
    save_tensors(
        tmp_path / 'bad.pt', {**saved, 'config': config, 'input_dims': [1, 2**15, 2**15, 0]}
    )
    with pytest.raises(UserError, match='its input_dims are'):
        glow.load_checkpoint(tmp_path / 'bad.pt')
