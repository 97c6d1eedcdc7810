"""Which part of the project may import which, and that importing a script does nothing."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import bnaf
import glow

ROOT = Path(glow.__file__).parent
OURS = {'glow', 'bnaf', 'common', 'datasets', 'tests', 'benchmarks'}
BENCHMARKS = {path.stem for path in (ROOT / 'benchmarks').glob('*.py')}
TESTS = {path.stem for path in (ROOT / 'tests').glob('*.py')}
STANDARD = set(sys.stdlib_module_names)

SCRIPT_IMPORTS = {'torch', 'numpy', 'tqdm', 'datasets', 'common'}
SCRIPT_IMPORTS |= {'sklearn.base', 'sklearn.utils'}  # what an estimator is made of
DATA_PACKAGES = {'numpy', 'torch', 'PIL', 'pandas', 'h5py', 'sklearn', 'matplotlib', 'requests'}
DATA_PACKAGES |= {'tqdm', 'pyarrow'}
ALLOWED = {
    'glow.py': SCRIPT_IMPORTS,
    'bnaf.py': SCRIPT_IMPORTS,
    'datasets': DATA_PACKAGES
    | {'common.files', 'common.errors', 'common.bounds', 'common.logs', 'datasets'},
    'common': {'torch', 'numpy', 'tensorboardX', 'tqdm', 'filelock', 'common'},
}
FORBIDDEN = {
    'glow.py': {'glow', 'bnaf', 'tests', 'benchmarks'},
    'bnaf.py': {'glow', 'bnaf', 'tests', 'benchmarks'},
    'datasets': {'torch.distributed'},
    'common': set(),
    'benchmarks': {'tests'} | TESTS,
}


def imports_of(source, package=''):
    """Return the full names of all modules that a source imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = [package] * (node.level > 0) + [node.module] * bool(node.module)
            module = '.'.join(parts)
            names.add(module)
            # from common import logs imports common.logs; from torch import nn counts as torch.nn
            names.update(f'{module}.{alias.name}' for alias in node.names)
    return names


def matches(name, packages):
    """Return whether a module is one of the packages, or lies within one."""
    return any(name == package or name.startswith(f'{package}.') for package in packages)


def violations(source, place, package=''):
    """Return the imports of a source that its place does not allow."""
    found = set()
    for name in imports_of(source, package):
        is_standard = name.split('.')[0] in STANDARD
        is_allowed = place not in ALLOWED or is_standard or matches(name, ALLOWED[place])
        # the package itself is named by a "from" import of one of its modules
        is_package = any(allowed.startswith(f'{name}.') for allowed in ALLOWED.get(place, ()))
        if matches(name, FORBIDDEN[place]) or not (is_allowed or is_package):
            found.add(name)
    return found


@pytest.mark.parametrize('place', FORBIDDEN)
def test_imports_follow_the_table(place):
    paths = [ROOT / place] if place.endswith('.py') else sorted((ROOT / place).glob('*.py'))
    assert paths
    for path in paths:
        package = '' if place.endswith('.py') else place
        assert not violations(path.read_text(), place, package), path


@pytest.mark.parametrize(
    'source, place',
    [
        ('import bnaf', 'glow.py'),
        ('def f():\n    from glow import update', 'bnaf.py'),
        ('import pandas', 'glow.py'),
        ('from sklearn.datasets import load_digits', 'bnaf.py'),
        ('from common.runs import lock_run_folder', 'datasets'),
        ('from common import checkpoints', 'datasets'),
        ('import torch.distributed as dist', 'datasets'),
        ('from torch import distributed', 'datasets'),
        ('import glow', 'datasets'),
        ('from datasets import load_images', 'common'),
        ('import matplotlib', 'common'),
        ('from helpers import only', 'benchmarks'),
    ],
)
def test_violations_are_found(source, place):
    assert violations(source, place, place.removesuffix('.py'))


def test_importing_a_script_does_nothing(tmp_path):
    code = 'import sys; sys.argv = ["x", "--nonsense"]; import glow, bnaf'
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=tmp_path,
        env={'PYTHONPATH': str(ROOT), 'PATH': '/usr/bin'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stdout and not list(tmp_path.iterdir()), done.stderr


@pytest.mark.parametrize(
    'name',
    [
        'log_normal',
        'Process',
        'setup',
        'wrap_ddp',
        'save_checkpoint',
        'load_checkpoint',
        'restore_model',
        'update',
        'train',
        'take_steps',
        'parse_args',
        'main',
    ],
)
def test_plumbing_is_the_same_text_in_both_scripts(name):
    assert inspect.getsource(getattr(glow, name)) == inspect.getsource(getattr(bnaf, name))
