"""The trainings of RESULTS.md and those to come: their data, commands and expected scores."""

import json
import os
import shlex
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

# The scripts are in the folder above this one.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pages import table
from results import PEERS, SCRIPTS, peers_cell, score_cell
from tables import write_tables

import bnaf
from common.errors import UserError
from common.options import resolve_config
from datasets.fetch import SOURCES, find_data_files
from datasets.own_tables import is_own_table
from datasets.tabular import load_table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def recorded_rows() -> dict[str, dict]:
    """Return the rows of results.json."""
    return json.loads((HERE / 'results.json').read_text())


@dataclass(frozen=True)
class Recipe:
    """A training: the name of its row in results.json or, where it has none, its command."""

    row: str = ''
    command: str = ''

    def words(self) -> list[str]:
        """Return the script and its options, without the mode and the folder of the data."""
        command = self.command or recorded_rows()[self.row]['command']
        _, script, _, *options = shlex.split(command)
        return [script, *(word for word in options if not word.startswith('--data_dir='))]


GLOW = 'python glow.py --train --bf16 --lr_decay=0.33'
BNAF = 'python bnaf.py --train'
RECIPES = {
    'faces': Recipe('drawn faces, 32x32, 5 bits'),
    'faces_bf16': Recipe('drawn faces, 32x32, 5 bits, in bf16'),
    'faces_given': Recipe('drawn faces, 32x32, 5 bits, given two attributes'),
    'digits': Recipe('digits, 8x8, 4 bits'),
    'digits_given': Recipe('digits, 8x8, 4 bits, given the class'),
    'mnist': Recipe('MNIST, 32x32, 8 bits'),
    'photos': Recipe('10,000 photos of faces, 32x32, 5 bits'),
    '8gaussians': Recipe('8gaussians'),
    '2spirals': Recipe('2spirals'),
    'checkerboard': Recipe('checkerboard'),
    'rings': Recipe('rings'),
    'u1': Recipe('u1'),
    'u2': Recipe('u2'),
    'u3': Recipe('u3'),
    'u4': Recipe('u4'),
    'breast_cancer': Recipe('breast cancer, of scikit-learn'),
    'miniboone_part': Recipe('validation rows of MINIBOONE'),
    'bsds300_6_epochs': Recipe('BSDS300'),
    # For a GPU. celeba_a and celeba_b are two of the large models of RESULTS.md.
    'mnist_large': Recipe(
        command=f'{GLOW} --dataset=mnist --n_levels=2 --depth=32 --width=256 --batch_size=64 '
        '--n_epochs=50'
    ),
    'cifar10': Recipe(command=f'{GLOW} --dataset=cifar10 --batch_size=64'),
    'celeba_a': Recipe(
        command=f'{GLOW} --dataset=celeba --n_levels=3 --depth=32 --width=512 --batch_size=16'
    ),
    'celeba_b': Recipe(
        command=f'{GLOW} --dataset=celeba --n_levels=3 --depth=24 --width=256 --batch_size=32 '
        '--n_bits=4'
    ),
    'photos_b': Recipe(
        command=f'{GLOW} --dataset=folder --image_size=64 --n_levels=3 --depth=24 --width=256 '
        '--batch_size=32 --n_epochs=100 --translate=0 --flip=0 --lr=0.001 --lr_decay=0 '
        '--ema_decay=0.999'
    ),
    'power': Recipe(command=f'{BNAF} --dataset=power'),
    'gas': Recipe(command=f'{BNAF} --dataset=gas'),
    'hepmass': Recipe(command=f'{BNAF} --dataset=hepmass'),
    'miniboone': Recipe(command=f'{BNAF} --dataset=miniboone'),
    'bsds300': Recipe(command=f'{BNAF} --dataset=bsds300'),
}
FACE_ATTRIBUTES = 'Black_Hair,Blond_Hair,Eyeglasses,Male,Pale_Skin,Smiling'


@dataclass
class Job:
    """A training to do, in plain values.

    Attributes:
        name: that of its recipe.
        script_name: ``glow.py`` or ``bnaf.py``.
        words: the options of the recipe.
        data_dir, folder: where its data is, and where its runs and its log go.
    """

    name: str
    script_name: str
    words: list[str]
    data_dir: str
    folder: str

    @property
    def script(self) -> ModuleType:
        return SCRIPTS[self.script_name]

    @property
    def log(self) -> Path:
        return Path(self.folder) / 'log.txt'

    @cached_property
    def config(self) -> Any:
        """The script's config of the whole recipe."""
        words = ['--train', *self.words, f'--data_dir={self.data_dir}']
        _, options, _ = self.script.parse_args(words)
        return resolve_config(self.script.Config, options, self.script.DEFAULTS, None, ())

    def command(self, mode: str, *words: str) -> list[str]:
        """Return the script and the options of one of its modes."""
        places = [f'--data_dir={self.data_dir}', f'--output_dir={self.folder}']
        return [str(ROOT / self.script_name), mode, *words, *places]

    def drawings(self) -> list[list[str]]:
        """Return the modes, with their options, that draw samples and what was learned."""
        if self.script is bnaf:
            return [['--generate'], ['--visualize']]
        edits = ['--visualize', '--vis_alphas=-1,-0.5,0,0.5,1']
        if self.config.dataset in ('faces', 'celeba'):
            edits.append(f'--vis_attrs={FACE_ATTRIBUTES}')
        return [['--generate', '--z_std=0.7'], edits]


def make_job(name: str, data_dir: Path, work: Path) -> Job:
    """Return the job of a recipe. Its own tables are in ``data_dir``, photos in ``photos/`` there.

    Raises ``UserError`` where data is missing.
    """
    script_name, *words = RECIPES[name].words()
    data_dir = data_dir.resolve()
    for k, word in enumerate(words):
        option, _, value = word.partition('=')
        if option in ('--dataset', '--test_file') and is_own_table(value):
            words[k] = f'{option}={data_dir / value}'
        elif word == '--dataset=folder':
            data_dir = data_dir / 'photos'

    job = Job(name, script_name, words, str(data_dir), str(work.resolve() / name))
    require_data(job)
    return job


def require_data(job: Job) -> None:
    """Make a table of scikit-learn. Raise ``UserError`` where other data is missing."""
    dataset, data_dir = job.config.dataset, Path(job.data_dir)
    if is_own_table(dataset):
        paths = [Path(dataset), Path(job.config.test_file or dataset)]
        if not all(path.exists() for path in paths):
            make_tables(data_dir, paths)
        is_there = all(path.exists() for path in paths)
    elif dataset == 'folder':
        is_there = data_dir.is_dir()
    else:
        is_there = None not in find_data_files(dataset, data_dir)
    if not is_there:
        raise UserError(f'{job.name}: its data is not in {data_dir}: {how_to_get(dataset)}')


def make_tables(data_dir: Path, paths: list[Path]) -> None:
    """Write the table of breast cancer or, if MINIBOONE is there, two splits of it."""
    data_dir.mkdir(parents=True, exist_ok=True)
    if paths[0].name == 'breast_cancer.csv':
        with tempfile.TemporaryDirectory(dir=data_dir) as folder:
            write_tables(Path(folder))
            os.replace(Path(folder) / paths[0].name, paths[0])
    elif None not in find_data_files('miniboone', data_dir):
        data = load_table('miniboone', data_dir)
        for path, rows in zip(paths, (data.validation, data.test)):
            np.save(path, rows)


def how_to_get(dataset: str) -> str:
    """Say in a few words how the data of a recipe is had."""
    name = Path(dataset).name
    if name == 'folder':
        return 'photos of your own, in photos/'
    if name == 'breast_cancer.csv':
        return 'made of that of scikit-learn'
    if name == 'val.npy':
        return 'python -m datasets fetch miniboone'
    has_files = name in SOURCES and SOURCES[name].files
    return f'python -m datasets fetch {name}' if has_files else 'built in'


def published(name: str) -> str:
    """Return the published scores of a recipe's data, with their sources."""
    script, *words = RECIPES[name].words()
    return peers_cell(PEERS.get(Job(name, script, words, '', '').config.dataset, []))


def list_recipes() -> str:
    """Return the table of all recipes."""
    lines, rows = [], recorded_rows()
    for name, recipe in RECIPES.items():
        script, *words = recipe.words()
        data = how_to_get(Job(name, script, words, '', '').config.dataset)
        expected = score_cell(rows[recipe.row]) if recipe.row else published(name)
        lines.append([name, data, ' '.join([script, *words]), expected])
    return table(['name', 'data', 'command', 'expected or published'], lines)
