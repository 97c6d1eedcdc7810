"""Fixtures that several test modules use; functions are in helpers.py."""

import os

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch: tiny models gain nothing from more

import pytest
import torch
from helpers import only, people_table

import bnaf
import glow
from datasets import grids, latents


def pytest_make_parametrize_id(config, val, argname):
    """Name bytes by their argument: some hold the time, and all processes need the same names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture
def convolutions_of_a_gpu(monkeypatch):
    """Convolutions and products round their operands to TF32 where it is allowed, as on a GPU."""

    def round_operands(function, backend):
        def rounded(x, weight, *args, **options):
            if backend.allow_tf32 and x.dtype == torch.float32:
                x, weight = round_to_tf32(x), round_to_tf32(weight)
            return function(x, weight, *args, **options)

        return rounded

    functional, backends = torch.nn.functional, torch.backends
    for name, backend in (('conv2d', backends.cudnn), ('linear', backends.cuda.matmul)):
        rounded = round_operands(getattr(functional, name), backend)
        monkeypatch.setattr(functional, name, rounded)


def round_to_tf32(x):
    """Return float32 values rounded to 10 bits of mantissa."""
    return ((x.view(torch.int32) + 2**12) & -(2**13)).view(torch.float32)


@pytest.fixture
def saved_grids(monkeypatch):
    """A list that gets the name, the rows and the labels of each grid of images that is saved."""
    saved = []

    def watched(path, rows, *labels):
        saved.append((path.name, rows, *labels))
        grids.save_grid(path, rows, *labels)
        assert path.exists()

    for module in (glow, latents):
        monkeypatch.setattr(module, 'save_grid', watched)
    return saved


@pytest.fixture(scope='session')
def trained_glow(tmp_path_factory):
    """The best.pt of a tiny Glow of scikit-learn's digits."""
    folder = tmp_path_factory.mktemp('digits')
    words = ['--dataset=digits', '--depth=1', '--width=8', '--n_epochs=1', '--batch_size=128']
    glow.main(['--train', *words, f'--output_dir={folder}', f'--data_dir={folder}'])
    return only(folder.glob('glow_digits_*/best.pt'))


@pytest.fixture(scope='session')
def trained_bnaf(tmp_path_factory):
    """The best.pt of a small BNAF of people.csv, which lies beside the folder of its run."""
    folder = tmp_path_factory.mktemp('people')
    people_table().to_csv(folder / 'people.csv', index=False)
    words = ['--n_flows=1', '--hidden_dim=8', '--n_epochs=40', '--batch_size=20']
    words += ['--ema_decay=0.95', f'--output_dir={folder}']
    bnaf.main(['--train', f'--dataset={folder}/people.csv', *words])
    return only(folder.glob('bnaf_people_*/best.pt'))
