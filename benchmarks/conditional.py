"""BNAF as a conditional density, p(y | x), beside scikit-learn's regressions with a distribution.

    python benchmarks/conditional.py            three minutes on one idle core

The table is scikit-learn's diabetes: how far the disease has come in a year, given ten properties
of the patient. Every method sees the same rows, split as ``bnaf.py --seed=K`` splits them; scores
are the mean log p(y | x) of the test split, in nats. ``BNAFDensity`` has its defaults. A ridge
regression gets a Gaussian around its prediction, as wide as its errors in cross-validation. The
Gaussian process has a width for each property, and noise.

Writes conditional.json, and a table in RESULTS.md.
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import sklearn
import torch
from scipy.stats import norm
from sklearn.datasets import load_diabetes
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

# bnaf.py is in the folder above this one.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pages import insert, significant, table
from tables import mean_and_error, values_of
from timing import START, machine_name, progress

from bnaf import BNAFDensity
from datasets.tabular import split_at_random

HERE = Path(__file__).resolve().parent
TARGET = 'target'
PENALTIES = np.geomspace(0.1, 1000, 30)


def score_bnaf(known: pd.DataFrame, test: pd.DataFrame, seed: int) -> np.ndarray:
    """Return log p(y | x) of each test row by a BNAF of default options."""
    conditions = [name for name in known if name != TARGET]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        model = BNAFDensity(condition=conditions, seed=seed).fit(known)
    return model.score_samples(test)


def score_ridge(known: pd.DataFrame, test: pd.DataFrame, seed: int) -> np.ndarray:
    """Return log p(y | x) of each test row by a ridge regression."""
    x, y = known.drop(columns=TARGET), known[TARGET]
    model = make_pipeline(StandardScaler(), RidgeCV(PENALTIES))
    errors = cross_val_predict(model, x, y, cv=10) - y
    predicted = model.fit(x, y).predict(test.drop(columns=TARGET))
    return norm.logpdf(test[TARGET], predicted, errors.std())


def score_process(known: pd.DataFrame, test: pd.DataFrame, seed: int) -> np.ndarray:
    """Return log p(y | x) of each test row by a Gaussian process."""
    x, y = known.drop(columns=TARGET), known[TARGET]
    widths = RBF(3 * np.ones(x.shape[1]), (0.1, 1e4))
    process = GaussianProcessRegressor(
        ConstantKernel() * widths + WhiteKernel(),
        normalize_y=True,
        n_restarts_optimizer=2,
        random_state=seed,
    )
    scaler = StandardScaler().fit(x)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ConvergenceWarning)  # widths that do not matter
        process.fit(scaler.transform(x), y)
    unseen = scaler.transform(test.drop(columns=TARGET))
    return norm.logpdf(test[TARGET], *process.predict(unseen, return_std=True))


METHODS = {
    'BNAF, `BNAFDensity(condition=...)`': score_bnaf,
    'Gaussian process': score_process,
    'ridge regression': score_ridge,
}


def measure(n_seeds: int) -> dict[str, list[dict]]:
    """Return for each method what it scores on each split, and its CPU seconds."""
    rows = load_diabetes(as_frame=True, scaled=False).frame
    results = {}
    for name, score in METHODS.items():
        results[name] = []
        for seed in range(n_seeds):
            train, validation, test = split_at_random(len(rows), seed, with_test=True)
            known = rows.iloc[np.concatenate([train, validation])]
            start = time.process_time()
            scores = score(known, rows.iloc[test], seed)
            seconds = time.process_time() - start
            results[name].append({'nats': float(scores.mean()), 'seconds': seconds})
        progress(f'{name}: {mean_and_error(values_of(results[name], "nats"), 3)} nats')
    return results


def format_table(about: dict) -> str:
    """Return a line per method; in the second column is BNAF's lead, split by split."""
    ours, *_ = (values_of(runs, 'nats') for runs in about['results'].values())
    lines = []
    for k, (name, runs) in enumerate(about['results'].items()):
        nats = values_of(runs, 'nats')
        lead = mean_and_error(ours - nats, 3) if k else ''
        seconds = significant(values_of(runs, 'seconds').mean())
        lines.append([name, mean_and_error(nats, 3), lead, seconds])
    return table(['', 'log p(y \\| x)', 'how far BNAF is above it', 'CPU seconds'], lines)


def main(argv: list[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--n_seeds', type=int, default=10, help='splits')
    parser.add_argument(
        '--out',
        type=Path,
        metavar='DIR',
        help='where conditional.json goes, and its table if DIR has a RESULTS.md '
        '(default: benchmarks/, and RESULTS.md of the project)',
    )
    args = parser.parse_args(argv)
    if args.n_seeds < 2:
        parser.error('--n_seeds has to be 2 at least, for standard errors')

    about = {
        'command': f'python benchmarks/conditional.py --n_seeds={args.n_seeds}',
        'machine': machine_name(),
        'torch': torch.__version__,
        'scikit-learn': sklearn.__version__,
        'results': measure(args.n_seeds),
        'minutes': (time.perf_counter() - START) / 60,
    }
    file = (args.out or HERE) / 'conditional.json'
    page = (args.out or HERE.parent) / 'RESULTS.md'
    file.write_text(json.dumps(about, indent=1) + '\n')
    if page.exists():
        insert(page, 'conditional.py', format_table(about))
    print(format_table(about), end='')


if __name__ == '__main__':
    main()
