"""BNAF beside scikit-learn's density estimators on its three small tables, and as a detector.

    python benchmarks/tables.py                 ten minutes on one idle core

Every method sees the same rows, split as ``bnaf.py --seed=K`` splits them. They are standardised
by the training split; scores are of the test split, in nats per row, in the table's own units.
BNAF is run as its users run it, by ``bnaf.main`` on a CSV file, and stops by the validation split.
The others do not need one, and learn from its rows too. Detectors of malignant tumours learn from
benign rows alone, and tell the benign rows of the test split from all malignant ones by their
log-likelihood.

Writes tables.json, and a table in RESULTS.md.
"""

import argparse
import contextlib
import io
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sklearn
import torch
from sklearn.base import BaseEstimator
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neighbors import KernelDensity

# bnaf.py is in the folder above this one.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pages import insert, significant, table
from timing import START, machine_name, progress

import bnaf
from datasets.own_tables import frame_of_columns, write_table
from datasets.tabular import dequantize_columns, load_table, read_rows

HERE = Path(__file__).resolve().parent
TABLES = {
    'breast_cancer': load_breast_cancer,
    'wine': load_wine,
    'diabetes': lambda: load_diabetes(scaled=False),
}
# Of diabetes: a category, and a ratio that is a whole number in most rows.
LEFT_OUT = ('sex', 's4')
DETECTION = 'benign'  # the table that a detector learns from
SETTINGS = {'BNAF': []}  # with the defaults of bnaf.py
# What is chosen from the rows for a method of scikit-learn.
CHOSEN = ('bandwidth', 'n_components', 'reg_covar')

# ----------------------------------------------------------------------------------------- methods


def fit_kernels(rows: np.ndarray) -> KernelDensity:
    """Fit Gaussian kernels, their width by cross-validation."""
    return cross_validate(KernelDensity(), rows, bandwidth=np.geomspace(0.05, 2, 40))


def fit_gaussian(rows: np.ndarray) -> GaussianMixture:
    """Fit one Gaussian; what is added to its variances is found by cross-validation."""
    return cross_validate(GaussianMixture(), rows, reg_covar=np.geomspace(1e-6, 1, 13))


def fit_mixture(rows: np.ndarray) -> GaussianMixture:
    """Fit Gaussians of full covariance, their number by BIC.

    What is added to their variances is as for one Gaussian.
    """
    reg_covar = fit_gaussian(rows).reg_covar
    models = []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # BIC judges also a model that has not converged
        for k in range(1, 11):
            model = GaussianMixture(k, reg_covar=reg_covar, n_init=3, random_state=0)
            models.append(model.fit(rows))
    return min(models, key=lambda model: model.bic(rows))


def cross_validate(model: BaseEstimator, rows: np.ndarray, **values: np.ndarray) -> BaseEstimator:
    """Fit a model with the best of the ``values`` of one argument, in ten parts."""
    folds = KFold(10, shuffle=True, random_state=0)
    return GridSearchCV(model, values, cv=folds).fit(rows).best_estimator_


PEERS = {'Gaussian': fit_gaussian, 'Gaussian mixture': fit_mixture, 'kernels': fit_kernels}


class Scores(NamedTuple):
    """Log-likelihoods in the table's own units, and how the model came about."""

    test: np.ndarray
    others: np.ndarray | None  # of the rows that a detector is to find
    about: dict


def score_bnaf(
    options: list[str],
    source: Path,
    others: Path | None,
    seed: int,
) -> Scores:
    """Train BNAF on a table; score its test split and the rows of ``others``."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        test_file, others_file = folder / 'test.npy', folder / 'others.npy'
        words = [f'--dataset={source}', f'--seed={seed}', f'--scores={test_file}', *options]
        run_bnaf('--train', f'--output_dir={folder}', *words)
        if others:
            words = [f'--input={others}', f'--scores={others_file}']
            run_bnaf('--evaluate', f'--output_dir={folder}', *words)

        best = bnaf.load_checkpoint(next(folder.glob('bnaf_*/best.pt')))
        about = {'validation': -best['best'], 'step': best['step']}
        test = np.load(test_file)[:, 1]
        return Scores(test, np.load(others_file)[:, 1] if others else None, about)


def run_bnaf(*words: str) -> None:
    """Call ``bnaf.main`` without its output, of which the last line is printed if it fails."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            bnaf.main(list(words))
    except SystemExit:
        print(output.getvalue().splitlines()[-1], file=sys.stderr)
        raise


def score_peer(fit: Callable, source: Path, others: Path | None, seed: int) -> Scores:
    """Fit a method of scikit-learn to a table; score its test split and the rows of ``others``."""
    data = load_table(str(source), seed=seed)
    model = fit(np.concatenate([data.train, data.validation]))
    about = {name: value for name, value in model.get_params().items() if name in CHOSEN}

    log_scale = np.log(data.std).sum()  # from standardised to the table's own units
    test = model.score_samples(data.test) - log_scale
    if others is None:
        return Scores(test, None, about)
    return Scores(test, model.score_samples(read_rows(others, data)) - log_scale, about)


# ------------------------------------------------------------------------------------ measurements


def write_tables(folder: Path) -> dict[str, tuple[int, int]]:
    """Write CSV files of the tables, and of the two classes of breast_cancer.

    Each column is spread evenly over its rounding. Returns for each table its rows and columns.
    """
    shapes = {}
    for name, load in TABLES.items():
        data = load()
        kept = [k for k, column in enumerate(data.feature_names) if column not in LEFT_OUT]
        columns = [str(data.feature_names[k]) for k in kept]
        rows = data.data[:, kept]
        roundings = [np.diff(np.unique(column)).min() for column in rows.T]
        rows = dequantize_columns(rows, np.array(roundings))

        parts = {name: rows}
        if name == 'breast_cancer':
            for k, part in enumerate(data.target_names):
                parts[str(part)] = rows[data.target == k]
        for part, values in parts.items():
            table = frame_of_columns(dict(zip(columns, values.T)))
            write_table(folder / f'{part}.csv', '.csv', table)
            shapes[part] = values.shape
    return shapes


def measure(
    name: str,
    seeds: Iterable[int],
    folder: Path,
) -> dict[str, list[dict]]:
    """Return for each method what it scores on a table, once per seed.

    That is the test log-likelihood in nats and, for a detector, the area under the ROC curve.
    """
    methods = {}
    for method, options in SETTINGS.items():
        methods[method] = partial(score_bnaf, options)
    for method, fit in PEERS.items():
        methods[method] = partial(score_peer, fit)

    source = folder / f'{name}.csv'
    others = folder / 'malignant.csv' if name == DETECTION else None
    results = {}
    for method, score in methods.items():
        results[method] = []
        for seed in seeds:
            start = time.process_time()
            scores = score(source, others, seed)
            seconds = time.process_time() - start
            run = {'nats': float(scores.test.mean()), **scores.about, 'seconds': seconds}
            if others:
                run['auroc'] = area_under_roc(scores)
            results[method].append(run)

        nats = mean_and_error(values_of(results[method], 'nats'))
        seconds = values_of(results[method], 'seconds').mean()
        progress(f'{name}, {method}: {nats} nats, {seconds:.1f} s per run')
    return results


def area_under_roc(scores: Scores) -> float:
    """Return the chance that one of the others is less likely than a row of the test split."""
    counts = len(scores.test), len(scores.others)
    is_other = np.repeat([0, 1], counts)
    log_p = np.append(scores.test, scores.others)
    return roc_auc_score(is_other, -log_p)


def values_of(runs: list[dict], key: str) -> np.ndarray:
    return np.array([run[key] for run in runs])


# ------------------------------------------------------------------------------------------- table


def format_table(results: dict) -> str:
    """Return one line per method.

    In brackets is by how much BNAF is above the best of the others, seed by seed.
    """
    columns = [(name, 'nats', 2) for name in results['results']]
    columns.append((DETECTION, 'auroc', 3))
    lines = []
    for method in (*results['settings'], *PEERS):
        cells = []
        for name, key, digits in columns:
            runs = results['results'][name]
            text = mean_and_error(values_of(runs[method], key), digits)
            if method in results['settings']:
                text += f' ({mean_and_error(lead_of(method, runs, key), digits)})'
            cells.append(text)

        seconds = []
        for runs in results['results'].values():
            seconds += [run['seconds'] for run in runs[method]]
        options = ' '.join(results['settings'].get(method, ()))
        name = f'{method}: `{options}`' if options else method
        lines.append([name, *cells, significant(np.mean(seconds))])

    header = ['']
    for name in results['results']:
        n_rows, n_columns = results['shapes'][name]
        header.append(f'{name} ({n_rows} x {n_columns})')
    return table([*header, 'malignant or benign: AUROC', 'CPU seconds'], lines)


def lead_of(method: str, runs: dict[str, list[dict]], key: str) -> np.ndarray:
    """Return by how much a method scores above the peer with the best mean, for each seed."""
    peers = [values_of(runs[peer], key) for peer in PEERS]
    return values_of(runs[method], key) - max(peers, key=np.mean)


def mean_and_error(values: np.ndarray, digits: int = 2) -> str:
    """Show a mean ± its standard error."""
    error = values.std(ddof=1) / math.sqrt(len(values))
    return f'{values.mean():.{digits}f} ± {error:.{digits}f}'


# -------------------------------------------------------------------------------------------- main


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--n_seeds', type=int, default=10, help='runs per method, each with another split'
    )
    parser.add_argument(
        '--out',
        type=Path,
        metavar='DIR',
        help='where tables.json goes, and its table if DIR has a RESULTS.md '
        '(default: benchmarks/, and RESULTS.md of the project)',
    )
    args = parser.parse_args(argv)
    if args.n_seeds < 2:
        parser.error('--n_seeds has to be 2 at least, for standard errors')
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        shapes = write_tables(Path(folder))
        for name in (*TABLES, DETECTION):
            measured[name] = measure(name, range(args.n_seeds), Path(folder))
    results = {
        'command': f'python benchmarks/tables.py --n_seeds={args.n_seeds}',
        'machine': machine_name(),
        'torch': torch.__version__,
        'scikit-learn': sklearn.__version__,
        'minutes': (time.perf_counter() - START) / 60,
        'settings': SETTINGS,
        'shapes': shapes,
        'results': measured,
    }

    file = (args.out or HERE) / 'tables.json'
    page = (args.out or HERE.parent) / 'RESULTS.md'
    file.write_text(json.dumps(results, indent=1) + '\n')
    if page.exists():
        insert(page, 'tables.py', format_table(results))
    print(format_table(results), end='')


if __name__ == '__main__':
    main()
