"""Rows that come from Python rather than from a file: arrays and DataFrames, as of scikit-learn."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data

from common.errors import UserError, index_of_name

from .columns import Condition
from .own_tables import named_frame, require_column_names
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
    if is_new:
        given = (estimator.columns, estimator.drop, estimator.condition)
        takes_all = all(option is None for option in given)
    else:
        data = estimator.data_
        takes_all = data.columns == data.features
        if has_used_features(x, data):
            return as_frame(x, data.used_features)

    least = 2 if is_new else 1
    if isinstance(x, pd.DataFrame):
        validate_data(estimator, x, reset=is_new, skip_check_array=True)
        return as_frame(x)
    if takes_all:
        checks: dict[str, Any] = {'dtype': [np.float64, np.float32]}
    else:  # what is not used may be anything, and conditions may be texts
        checks = {'dtype': None, 'ensure_all_finite': False}
    x = validate_data(estimator, x, reset=is_new, ensure_min_samples=least, **checks)
    return as_frame(x)


def has_used_features(x: Any, data: TableData) -> bool:
    """Return whether an input has what a model uses of its table, which is not all of it."""
    used = data.used_features
    if used == data.features:
        return False
    if isinstance(x, pd.DataFrame):
        return set(used) <= set(x.columns)
    return np.ndim(x) == 2 and np.shape(x)[1] == len(used)


def as_frame(x: Any, names: Sequence[str] = ()) -> pd.DataFrame:
    """Return an array or a DataFrame as a table whose columns have names, by default numbers."""
    if isinstance(x, pd.DataFrame) and all(isinstance(name, str) for name in x.columns):
        return x.reset_index(drop=True)
    return named_frame(np.asarray(x), names)


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
        is_row = all(np.ndim(value) == 0 for value in given.values())
        columns = {}
        for key, value in given.items():
            name = condition_name(key, names)
            columns[name] = [value] if is_row else np.asarray(value)
        frame = pd.DataFrame(columns)
    elif isinstance(given, pd.DataFrame):
        frame = given
        require_column_names(frame, 'given')
    else:
        values = np.asarray(given)
        if values.ndim < 2:  # one row, or values of the only condition
            values = values.reshape(-1, 1) if len(names) == 1 else values[None]
        if values.ndim != 2 or values.shape[1] != len(names):
            raise UserError(f'given is of shape {np.shape(given)}, not (n, {len(names)})')
        frame = as_frame(values, names)

    missing = [name for name in names if name not in frame]
    if missing:
        raise UserError(f'given lacks {", ".join(missing)}')
    return frame[names].reset_index(drop=True)


def condition_name(key: Any, names: Sequence[str]) -> str:
    """Return the name of a condition that is given by its name, or by its index in the table.

    Raises ``UserError`` with the nearest names where there is none.
    """
    if isinstance(key, numbers.Integral):
        key = f'column {key}'
    text = str(key)
    return text if text in names else names[index_of_name(text, names, 'condition')]
