"""Pickles of strangers, read without running anything of them: of CIFAR-10, and of pandas' tables of any version.

A class or function that a pickle names is replaced by an object that keeps what it would have been called with; only
numbers, text, lists and dicts are made. value() then makes arrays of what stands for arrays.
"""

import io
import pickle
import pickletools
import re

import numpy as np

# Of each package what arrays and tables need. None of it is looked up, so where in the package it lies is no matter.
NAMES = {
    'numpy': 'ndarray dtype _reconstruct _frombuffer',
    'builtins': 'slice object',
    '_codecs': 'encode',
    'copyreg': '_reconstructor',
    'pandas': 'DataFrame BlockManager Index Int64Index RangeIndex _new_Index _unpickle_block',
}


class Named:
    """Stands for what a class or function of the same name would give: its arguments and its state, and does nothing"""

    def __new__(cls, *args):
        named = object.__new__(cls)
        named.args, named.state = args, None
        return named

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.state = state


class HarmlessUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        package = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}.get(
            module, module.split('.')[0]
        )
        if name not in NAMES.get(package, '').split():
            raise pickle.UnpicklingError(
                f'it holds {module}.{name}, which no array of numbers needs'
            )
        return type(name, (Named,), {})


def read_pickle(path):
    """-> what a pickle holds, Named objects standing for all but numbers, text, lists and dicts. Raises ValueError."""
    content = path.read_bytes()
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if 'PUT' in opcode.name and argument > len(
                content
            ):  # would make room for that many objects
                raise ValueError('it numbers more objects than it has bytes')
        return HarmlessUnpickler(io.BytesIO(content), encoding='latin1').load()
    except (
        Exception
    ) as error:  # whatever it is that a pickle makes pickle raise, the file is at fault
        raise ValueError(str(error) or type(error).__name__) from None


def value(item):
    """The array, list of objects, slice or bytes that a Named object stands for; anything else is its own value."""
    kind = type(item).__name__ if isinstance(item, Named) else None
    if kind == 'encode':
        return item.args[0].encode('latin1')
    if kind == 'slice':
        return slice(*item.args)
    if kind == '_new_Index':
        return value(item.args[1].get('data'))
    if kind == '_frombuffer':
        return make_array(*item.args)
    if kind == '_reconstruct':
        _, shape, dtype, by_columns, content = item.state
        return make_array(value(content), dtype, shape, 'F' if by_columns else 'C')
    return item


def make_array(content, dtype, shape, order):
    if isinstance(content, list):  # of an array of objects
        return content
    content = (
        content.encode('latin1') if isinstance(content, str) else content
    )  # as python 2 wrote it
    kind, byte_order = dtype.args[0], dtype.state[1] if dtype.state else '|'
    if not re.fullmatch('[iufb][1248]', kind) or byte_order not in tuple('<>|='):
        raise ValueError(f'it holds an array of {kind!r}, not of numbers')
    return np.frombuffer(content, byte_order + kind).reshape(shape, order=order)


def read_pickled_table(path):
    """-> the numbers of a pickled DataFrame (N, D) and its columns. Raises ValueError."""
    frame = read_pickle(path)
    try:
        manager = frame.state.get('_mgr', frame.state.get('_data'))
        if manager.args:  # pandas since 1.3
            blocks, axes = manager.args
            blocks = [block.args[:2] for block in blocks]
        else:  # and since 0.14
            state = manager.state[3]['0.14.1']
            axes, blocks = (
                state['axes'],
                [(block['values'], block['mgr_locs']) for block in state['blocks']],
            )
        columns = [str(name) for name in value(axes[0])]
        blocks = [(value(values), value(place)) for values, place in blocks]
        n_rows = blocks[0][0].shape[1]
        if sum(values.size for values, _ in blocks) != len(columns) * n_rows:
            raise ValueError('it holds no table')
        data = np.full((len(columns), n_rows), np.nan)
        for values, place in blocks:
            data[place] = values
    except (AttributeError, TypeError, LookupError):
        raise ValueError('it holds no table') from None
    return data.T, columns
