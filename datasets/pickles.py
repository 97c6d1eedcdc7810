"""Strangers' pickles, read without running any code of theirs: CIFAR-10's, and tables of pandas.

Loading builds only numbers, text, lists and dicts. Every class or function that a pickle names is
replaced by a stand-in (``StandIn``) that keeps the arguments it was called with and does nothing.
``array_of`` then makes an array of a stand-in for an array. Since nothing is looked up, this works
for pickles of any version of numpy and pandas.
"""

import io
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import numpy as np

from common.bounds import open_regular

MAX_PICKLE_BYTES = 2**30  # no published pickle is larger

# What arrays and tables need of each package, in whichever of its modules a version keeps them.
ALLOWED_NAMES = {
    'numpy': {'ndarray', 'dtype', '_reconstruct', '_frombuffer'},
    'builtins': {'slice', 'object'},
    '_codecs': {'encode'},
    'copyreg': {'_reconstructor'},
    'pandas': {
        'DataFrame',
        'BlockManager',
        'Index',
        'Int64Index',
        'RangeIndex',
        '_new_Index',
        '_unpickle_block',
    },
}
PYTHON_2_PACKAGES = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}

# A damaged or hostile pickle asks for nonsense, such as items of a number or attributes that are
# not there. Python then raises whatever it raises for the same nonsense in a program.
DAMAGED_PICKLE_ERRORS = (
    ValueError,
    pickle.PickleError,
    AttributeError,
    EOFError,
    LookupError,
    OverflowError,
    RecursionError,
    TypeError,
)

# Likewise, a stand-in need not have the arguments and the state of what it stands for.
MALFORMED_OBJECT_ERRORS = (
    AttributeError,
    LookupError,
    OverflowError,
    RecursionError,
    TypeError,
)


class StandIn:
    """Stand-in for an object, known by its class or function's name; keeps arguments and state."""

    args: tuple
    state: Any

    def __new__(cls, *args: Any) -> 'StandIn':
        stand_in = object.__new__(cls)
        stand_in.args = args
        stand_in.state = None
        return stand_in

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class HarmlessUnpickler(pickle.Unpickler):
    """Unpickler that imports nothing: every allowed name becomes a subclass of ``StandIn``."""

    def find_class(self, module: str, name: str) -> type[StandIn]:
        """Return a stand-in of that name; raise ``UnpicklingError`` unless it is allowed."""
        package = PYTHON_2_PACKAGES.get(module, module.split('.')[0])
        if name not in ALLOWED_NAMES.get(package, ()):
            raise pickle.UnpicklingError(
                f'it holds {module}.{name}, which no array of numbers needs'
            )
        return type(name, (StandIn,), {})


def read_pickle(path: Path) -> Any:
    """Return what a pickle holds, with ``StandIn`` objects for all but numbers, text, lists, dicts.

    Raises ``ValueError`` if the pickle is damaged or names anything that arrays do not need.
    """
    with open_regular(path, MAX_PICKLE_BYTES) as file:
        content = file.read()
    try:
        check_memo_numbers(content)
        return HarmlessUnpickler(io.BytesIO(content), encoding='latin1').load()
    except DAMAGED_PICKLE_ERRORS as error:
        raise ValueError(str(error) or type(error).__name__) from error


def check_memo_numbers(content: bytes) -> None:
    """Raise ``ValueError`` if a pickle numbers an object higher than it can have objects.

    The unpickler would allocate memory for as many objects as the highest number says.
    """
    for opcode, argument, _ in pickletools.genops(content):
        if 'PUT' not in opcode.name or not isinstance(argument, int):
            continue
        if argument > len(content):
            raise ValueError('it numbers more objects than it has bytes')


def array_of(item: Any) -> Any:
    """Return the array, list of objects, slice or bytes that a ``StandIn`` object stands for.

    Anything else is returned as it is. Raises ``ValueError`` for an array of anything but numbers,
    and where the arguments or the state of the object do not fit its name.
    """
    try:
        return unchecked_array_of(item)
    except MALFORMED_OBJECT_ERRORS as error:
        raise ValueError('it holds a malformed array') from error


def unchecked_array_of(item: Any) -> Any:
    """Do the work of ``array_of``; malformed objects raise any of ``MALFORMED_OBJECT_ERRORS``."""
    if not isinstance(item, StandIn):
        return item

    name = type(item).__name__
    if name == 'encode':
        return item.args[0].encode('latin1')
    if name == 'slice':
        return slice(*item.args)
    if name == '_new_Index':
        return unchecked_array_of(item.args[1].get('data'))
    if name == '_frombuffer':
        return make_array(*item.args)
    if name == '_reconstruct':
        _, shape, dtype, is_fortran, content = item.state
        return make_array(unchecked_array_of(content), dtype, shape, 'F' if is_fortran else 'C')
    return item


def make_array(content: Any, dtype: StandIn, shape: tuple[int, ...], order: Any) -> Any:
    """Return the array (or the list of objects) with the content that a pickle has for it.

    Raises ``ValueError`` unless it consists of integers, floats or booleans.
    """
    if isinstance(content, list):  # an array of objects, such as the names of columns
        return content
    if isinstance(content, str):  # as Python 2 wrote it
        content = content.encode('latin1')

    kind = dtype.args[0]
    byte_order = dtype.state[1] if dtype.state else '|'
    if not re.fullmatch('[iufb][1248]', kind) or byte_order not in tuple('<>|='):
        raise ValueError(f'it holds an array of {kind!r}, not of numbers')
    return np.frombuffer(content, byte_order + kind).reshape(shape, order=order)


def read_pickled_table(path: Path) -> tuple[np.ndarray, list[str]]:
    """Return the numbers (N, D) of a pickled ``DataFrame``, and the names of its D columns.

    Raises ``ValueError`` if the pickle holds anything else.
    """
    frame = read_pickle(path)
    try:
        names, blocks = table_parts(frame)
        n_rows = blocks[0][0].shape[1]
        if sum(values.size for values, _ in blocks) != len(names) * n_rows:
            raise ValueError('it holds no table')

        columns = np.full((len(names), n_rows), np.nan)
        for values, places in blocks:
            columns[places] = values
    except MALFORMED_OBJECT_ERRORS as error:
        raise ValueError('it holds no table') from error
    return columns.T, names


def table_parts(frame: Any) -> tuple[list[str], list[tuple[np.ndarray, Any]]]:
    """Return the column names of an unpickled ``DataFrame``, and its blocks of columns.

    pandas keeps columns of one type together, in blocks: for each, their values (columns, N) and
    which columns of the table they are, as an index of the table's columns.
    """
    manager = frame.state.get('_mgr', frame.state.get('_data'))
    if manager.args:  # since pandas 1.3
        block_objects, axes = manager.args
        blocks = [block.args[:2] for block in block_objects]
    else:  # since pandas 0.14
        state = manager.state[3]['0.14.1']
        axes = state['axes']
        blocks = [(block['values'], block['mgr_locs']) for block in state['blocks']]

    names = array_of(axes[0])
    if not all(isinstance(name, (str, int)) for name in names):
        raise ValueError('it has columns whose names are no text')
    return list(map(str, names)), [
        (array_of(values), array_of(places)) for values, places in blocks
    ]
