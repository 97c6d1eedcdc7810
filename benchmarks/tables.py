"""BNAF beside the densities of scikit-learn on its three small tables, and as a detector of malignant tumours.

    python benchmarks/tables.py                             half an hour on one idle core

Every method sees the same rows, in the split of bnaf.py --seed=K: standardised by the training split, scored on the test
split in nats a row, in the table's own units. BNAF is run as its users run it, by bnaf.main on a CSV, and stops by the
validation split; the others need none, and learn from its rows too. Detectors learn from benign rows alone, and tell the
benign rows of the test split from all malignant ones by their log-likelihood.
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
from functools import partial
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neighbors import KernelDensity

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from report import insert, significant, table
from timing import START, machine_name, progress

import bnaf
from common.runs import find_run
from datasets.tabular import dequantize_columns, load_table, read_rows, write_table

TABLES = {
    'breast_cancer': load_breast_cancer,
    'wine': load_wine,
    'diabetes': lambda: load_diabetes(scaled=False),
}
LEFT_OUT = (
    'sex',
    's4',
)  # of diabetes: a category, and a ratio that most rows have in whole numbers
SETTINGS = {
    'BNAF, default': [],
    'BNAF, few rows': ['--hidden_dim=4', '--batch_size=50', '--early_stop=30', '--ema_decay=0.99'],
}
DETECTION = 'benign'  # the table that is a detector's
CHOSEN = ('bandwidth', 'n_components', 'reg_covar')  # for a method of scikit-learn


def searched(model, **values):
    """-> fit(rows) of a model, its one number by cross-validation"""
    return lambda rows: (
        GridSearchCV(model, values, cv=KFold(10, shuffle=True, random_state=0))
        .fit(rows)
        .best_estimator_
    )


kernels = searched(KernelDensity(), bandwidth=np.geomspace(0.05, 2, 40))  # Gaussian ones
gaussian = searched(
    GaussianMixture(), reg_covar=np.geomspace(1e-6, 1, 13)
)  # what is added to its variances


def mixture(rows):
    """Gaussians of full covariance, their number by BIC; what is added to their variances is as for one Gaussian"""
    added = gaussian(rows).reg_covar
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of one that has not settled: BIC judges it as it is
        tried = [
            GaussianMixture(k, reg_covar=added, n_init=3, random_state=0).fit(rows)
            for k in range(1, 11)
        ]
    return min(tried, key=lambda model: model.bic(rows))


PEERS = {'Gaussian': gaussian, 'Gaussian mixture': mixture, 'kernels': kernels}


def write_tables(folder):
    """CSVs of the tables, each column spread evenly over its rounding, and of the classes of breast_cancer
    -> {name: (rows, columns)}"""
    shapes = {}
    for name, load in TABLES.items():
        data = load()
        kept = [k for k, column in enumerate(data.feature_names) if column not in LEFT_OUT]
        rows, columns = data.data[:, kept], [str(data.feature_names[k]) for k in kept]
        rows = dequantize_columns(
            rows, np.array([np.diff(np.unique(column)).min() for column in rows.T])
        )
        classes = enumerate(data.target_names) if name == 'breast_cancer' else ()
        for part, own in [(name, rows), *((part, rows[data.target == k]) for k, part in classes)]:
            write_table(folder / f'{part}.csv', '.csv', own, columns)
            shapes[str(part)] = own.shape
    return shapes


def run(*words):
    """bnaf.main, silent but for its errors"""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            bnaf.main([str(word) for word in words])
    except SystemExit:
        print(said.getvalue().splitlines()[-1], file=sys.stderr)
        raise


def train_bnaf(options, source, others, seed):
    """-> log-likelihoods of the test split and of others, a table or None, in the data's own units; how it went"""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ('test.npy', 'others.npy')]
        run(
            '--train',
            f'--dataset={source}',
            f'--seed={seed}',
            f'--output_dir={folder}',
            f'--scores={files[0]}',
            *options,
        )
        if others:
            run('--evaluate', f'--output_dir={folder}', f'--input={others}', f'--scores={files[1]}')
        best = find_run('bnaf', bnaf.Request(output_dir=str(folder)), False, bnaf.load_checkpoint)
        test, other = (np.load(file)[:, 1] if file.exists() else None for file in files)
    return test, other, {'validation': -best['best'], 'step': best['step']}


def fit_peer(fit, source, others, seed):
    """-> the same of a method of scikit-learn; what was chosen for it"""
    rows = load_table(str(source), seed=seed)
    model, log_scale = fit(np.concatenate([rows.train, rows.validation])), np.log(rows.std).sum()
    test, other = (
        model.score_samples(part) - log_scale if part is not None else None
        for part in (rows.test, read_rows(others, rows) if others else None)
    )
    return test, other, {key: value for key, value in model.get_params().items() if key in CHOSEN}


def measure(name, seeds, folder):
    """-> {method: what it scores on a table with each seed}: test log-likelihood in nats and, of a detector, AUROC"""
    source, others = folder / f'{name}.csv', folder / 'malignant.csv' if name == DETECTION else None
    methods = {
        **{method: partial(train_bnaf, words) for method, words in SETTINGS.items()},
        **{method: partial(fit_peer, fit) for method, fit in PEERS.items()},
    }
    results = {}
    for method, score in methods.items():
        runs = results[method] = []
        for seed in seeds:
            start = time.process_time()
            test, other, about = score(source, others, seed)
            runs.append(
                {'nats': float(test.mean()), **about, 'seconds': time.process_time() - start}
            )
            if others:
                runs[-1]['auroc'] = roc_auc_score(
                    np.repeat([0, 1], (len(test), len(other))), -np.append(test, other)
                )
        progress(
            f'{name}, {method}: {mean_text(values(runs, "nats"))} nats, {values(runs, "seconds").mean():.1f} s a run'
        )
    return results


def values(runs, key):
    return np.array([run[key] for run in runs])


def mean_text(values, digits=2):
    """Mean ± standard error"""
    return f'{values.mean():.{digits}f} ± {values.std(ddof=1) / math.sqrt(len(values)):.{digits}f}'


def markdown(results):
    """A line a method; in brackets by how much BNAF is above the best of the others, seed by seed"""
    scores = [*((name, 'nats', 2) for name in results['results']), (DETECTION, 'auroc', 3)]
    lines = []
    for method in (*results['settings'], *PEERS):
        cells = []
        for name, key, digits in scores:
            runs = results['results'][name]
            text = mean_text(values(runs[method], key), digits)
            if method in results['settings']:
                best = max((values(runs[peer], key) for peer in PEERS), key=np.mean)
                text += f' ({mean_text(values(runs[method], key) - best, digits)})'
            cells.append(text)
        seconds = [run['seconds'] for runs in results['results'].values() for run in runs[method]]
        options = ' '.join(results['settings'].get(method, ()))
        lines.append(
            [f'{method}: `{options}`' if options else method, *cells, significant(np.mean(seconds))]
        )
    heads = [
        f'{name} ({" x ".join(map(str, results["shapes"][name]))})' for name in results['results']
    ]
    return table(['', *heads, 'malignant or benign: AUROC', 'CPU seconds'], lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--n_seeds', type=int, default=10, help='each with a split of its own')
    parser.add_argument(
        '--out',
        default=ROOT / 'images',
        type=Path,
        metavar='DIR',
        help='where tables.json goes; its table goes to the README.md beside DIR, if there is one',
    )
    args = parser.parse_args(argv)
    if args.n_seeds < 2:
        parser.error('--n_seeds has to be 2 at least, for standard errors')
    with tempfile.TemporaryDirectory() as folder:
        shapes = write_tables(Path(folder))
        measured = {
            name: measure(name, range(args.n_seeds), Path(folder)) for name in (*TABLES, DETECTION)
        }
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
    (args.out / 'tables.json').write_text(json.dumps(results, indent=1) + '\n')
    if (args.out.parent / 'README.md').exists():
        insert(args.out.parent / 'README.md', 'tables.py', markdown(results))
    print(markdown(results), end='')


if __name__ == '__main__':
    main()
