"""Rows that come from Python rather than from a file: arrays and DataFrames, as of scikit-learn."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data

from common.errors import UserError, index_of_name

from .columns import Condition
from .own_tables import named_frame
from .tabular import TableData


def input_frame(estimator: BaseEstimator, x: Any, is_new: bool = False) -> pd.DataFrame:
    """Return the input of an estimator as a table, after the checks of scikit-learn.

    Where the estimator leaves out some columns, the others will do: as an array, or as a DataFrame
    in any order and with any further columns.

    Arguments:
        estimator: has ``columns``, ``drop`` and ``condition`` and, once it is fitted, ``data_``.
        x: an array or a DataFrame (N, D).
        is_new: whether it is to be fitted, so that its features become those of ``x``.
    """
    if not is_new and has_used_features(x, estimator.data_):
        return as_frame(x, estimator.data_.used_features)

    selects = any(option is not None for option in (estimator.columns, estimator.drop))
    if isinstance(x, pd.DataFrame) or selects or estimator.condition is not None:
        # texts are allowed, and what is not used may be anything
        validate_data(estimator, x, reset=is_new, skip_check_array=True)
    else:
        least = 2 if is_new else 1
        types = [np.float64, np.float32]
        x = validate_data(estimator, x, reset=is_new, dtype=types, ensure_min_samples=least)
    return as_frame(x)


def has_used_features(x: Any, data: TableData) -> bool:
    """Return whether an input has what a model uses of its table, which is not all of it."""
    used = data.used_features
    if used == data.features:
        return False
    if isinstance(x, pd.DataFrame):
        return set(used) <= set(x.columns)
    return np.ndim(x) == 2 and np.shape(x)[1] == len(used)


def as_frame(x: Any, names: Sequence[str] | None = None) -> pd.DataFrame:
    """Return an array or a DataFrame as a table whose columns have names, by default numbers."""
    if isinstance(x, pd.DataFrame) and all(isinstance(name, str) for name in x.columns):
        return x.reset_index(drop=True)
    return named_frame(np.asarray(x), names or ())


def condition_frame(given: Any, conditions: Sequence[Condition]) -> pd.DataFrame:
    """Return the conditions that samples are drawn for, a row for each of their combinations.

    Arguments:
        given: a dict of values, or of lists of equal length; a DataFrame; or an array (N, C) in the
            order of ``conditions``. A key of a dict may be the index of a column without a name.
        conditions: those of the model.
    """
    names = [condition.name for condition in conditions]
    if not names:
        raise UserError('given is for models with conditions, and this one has none')
    if given is None:
        raise UserError(f'the model has conditions: sample needs given, with {", ".join(names)}')

    if isinstance(given, Mapping):
        keys = [f'column {key}' if isinstance(key, int) else key for key in given]
        for key in keys:
            index_of_name(key, names, 'condition')
        is_row = all(np.ndim(value) == 0 for value in given.values())
        values = [[value] for value in given.values()] if is_row else list(given.values())
        frame = pd.DataFrame(dict(zip(keys, values)))
    elif isinstance(given, pd.DataFrame):
        frame = given
    else:
        frame = as_frame(np.atleast_2d(given), names)

    missing = [name for name in names if name not in frame]
    if missing:
        raise UserError(f'given lacks {", ".join(missing)}')
    return frame[names].reset_index(drop=True)
