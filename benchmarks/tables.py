"""BNAF beside the densities of scikit-learn on its three small tables, and as a detector of malignant tumours.

    python benchmarks/tables.py

Every method sees the same rows, in the split of bnaf.py --seed=K: standardised by the training split, scored on the test
split in nats a row, in the table's own units. BNAF is run as its users run it, by bnaf.main on a CSV, and stops by the
validation split; the others need none, and learn from its rows too. Detectors learn from benign rows alone, and tell the
benign rows of the test split from all malignant ones by their log-likelihood.
"""
import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import sklearn
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bnaf
from datasets.tabular import load_rows, read_rows, spread, write_table

TABLES = {'breast_cancer': load_breast_cancer, 'wine': load_wine, 'diabetes': lambda: load_diabetes(scaled=False)}
LEFT_OUT = ('sex', 's4')            # of diabetes: a category, and a ratio that most rows have in whole numbers
SETTINGS = {'BNAF, default': [], 'BNAF, small': ['--n_flows=1', '--hidden_dim=2']}
DETECTION = 'benign'                # the table that is a detector's


def kernels(rows):
    """Gaussian kernels, their width by cross-validation"""
    return GridSearchCV(KernelDensity(), {'bandwidth': np.geomspace(0.05, 2, 40)}, cv=10).fit(rows).best_estimator_


def gaussian(rows):
    """One Gaussian; what is added to its variances by cross-validation"""
    return GridSearchCV(GaussianMixture(), {'reg_covar': np.geomspace(1e-6, 1, 13)}, cv=10).fit(rows).best_estimator_


def mixture(rows):
    """Gaussians of full covariance, their number by BIC; what is added to their variances is that of one Gaussian"""
    added = gaussian(rows).reg_covar
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')         # of a mixture that has not settled: BIC judges it as it is
        tried = [GaussianMixture(k, reg_covar=added, n_init=3, random_state=0).fit(rows) for k in range(1, 11)]
    return min(tried, key=lambda model: model.bic(rows))


PEERS = {'Gaussian': gaussian, 'Gaussian mixture': mixture, 'kernels': kernels}


def write_tables(folder):
    """CSVs of the three tables, every column spread evenly over its rounding, and of the rows of breast_cancer by class"""
    for name, load in TABLES.items():
        data = load()
        kept = [k for k, column in enumerate(data.feature_names) if column not in LEFT_OUT]
        values, columns = data.data[:, kept], [str(data.feature_names[k]) for k in kept]
        values = spread(values, np.array([np.diff(np.unique(column)).min() for column in values.T]))
        write_table(folder / f'{name}.csv', '.csv', values, columns)
        if name == 'breast_cancer':
            for k, part in enumerate(data.target_names):
                write_table(folder / f'{part}.csv', '.csv', values[data.target == k], columns)


def run(*words):
    """bnaf.main, silently; an error of it is ours"""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            bnaf.main([*words])
    except SystemExit:
        print(errors.getvalue().splitlines()[-1], file=sys.stderr)
        raise


def read_scores(path):
    return np.loadtxt(path, delimiter=',', skiprows=1, ndmin=2)[:, 1]


def train_bnaf(table, others, words, seed, folder):
    """-> log-likelihoods of the test split and of others, a table or None, in the data's own units; validation score and
    step of the best checkpoint"""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        out = Path(out)
        run('--train', f'--dataset={table}', f'--seed={seed}', f'--output_dir={out}', f'--scores={out}/test.csv', *words)
        if others:
            run('--evaluate', f'--output_dir={out}', f'--input={others}', f'--scores={out}/others.csv')
        best = bnaf.load_checkpoint(next(out.glob('*/best.pt')))
        return (read_scores(out / 'test.csv'), read_scores(out / 'others.csv') if others else None,
                {'validation': -best['best'], 'step': best['step']})


def fit_peer(fit, table, others, seed):
    """-> the same of one of PEERS; what was chosen for it"""
    rows = load_rows(str(table), seed=seed)
    model, constant = fit(np.concatenate([rows.train, rows.validation])), np.log(rows.std).sum()
    chosen = {key: value for key, value in model.get_params().items() if key in ('bandwidth', 'n_components', 'reg_covar')}
    return (model.score_samples(rows.test) - constant,
            model.score_samples(read_rows(others, rows)) - constant if others else None, chosen)


def measure(name, seeds, folder, settings):
    """-> what each method scores on a table: test log-likelihood in nats, for a detector AUROC, one a seed"""
    table, others = folder / f'{name}.csv', folder / 'malignant.csv' if name == DETECTION else None
    methods = {method: lambda seed, words=words: train_bnaf(table, others, words, seed, folder)
               for method, words in settings.items()}
    methods.update({method: lambda seed, fit=fit: fit_peer(fit, table, others, seed) for method, fit in PEERS.items()})
    results = {}
    for method, score in methods.items():
        runs = results[method] = []
        for seed in seeds:
            start = time.perf_counter()
            test, other, about = score(seed)
            runs.append({'nats': float(test.mean()), **about, 'seconds': time.perf_counter() - start})
            if others:
                runs[-1]['auroc'] = roc_auc_score(np.repeat([0, 1], (len(test), len(other))), -np.append(test, other))
        print(f'{name}, {method}: {mean_text([r["nats"] for r in runs])} nats, '
              f'{np.mean([r["seconds"] for r in runs]):.1f} s a run', flush=True)
    return results


def mean_text(values, digits=2):
    """Mean ± standard error"""
    return f'{np.mean(values):.{digits}f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.{digits}f}'
