"""Files of tensors: written atomically, and read without trusting them.

A file from a stranger cannot run code, and what is loaded of it is no larger than the file.
"""

import contextlib
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .bounds import bounded_memory
from .errors import UserError, is_out_of_memory
from .files import make_writable, write_atomically

# What zipfile, pickle and torch.load raise for files that are damaged or that only look like theirs
DAMAGED_FILE_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


def save_tensors(path: Path, content: Any) -> None:
    """Save with ``torch.save``, atomically. Raises ``UserError`` where there is no room."""

    def write(temporary: Path) -> None:
        try:
            with open(temporary, 'wb') as file:
                torch.save(content, file)
        except RuntimeError as error:
            # torch's error, of the zip file that it could not finish, hides the system's
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise

    write_atomically(path, write)


def load_tensors(path: Path) -> Any:
    """Load what ``save_tensors`` wrote: tensors, plain values, and dicts and lists of them.

    No pickled object is made, and the result has no more bytes than the file. Raises ``UserError``
    where the file does not exist, is damaged, or takes more memory than ``bounded_memory`` allows.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f'{path} is a folder, not a checkpoint: give its best.pt')
    if not path.exists():
        raise UserError(f'{path}: no such checkpoint')

    try:
        with bounded_memory(path):
            storage_sizes = inspect_archive(path)
            mapped = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
            copy = BoundedCopy(path.stat().st_size)
            content = copy(mapped)
        if copy.tensor_sizes() != storage_sizes:
            # a tensor larger than its storage would expose the bytes behind it
            raise ValueError('its tensors do not have the sizes of their storages')
    except DAMAGED_FILE_ERRORS as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise  # the file is inspected by then, and not larger than it should be
        raise UserError(
            f'{path} cannot be read as a checkpoint: it is truncated, damaged or holds more than '
            f'tensors and plain values ({type(error).__name__})'
        ) from error
    return content


def tensor_cache(
    path: Path, shape: Sequence[int], make: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Load the float32 tensor of this shape from a file; make and save it if there is none.

    A file that is damaged or holds something else is replaced. Nothing is saved in a folder that
    cannot be written to.
    """
    with contextlib.suppress(UserError):
        tensor = load_tensors(path)
        is_tensor = isinstance(tensor, torch.Tensor)
        if is_tensor and tensor.shape == tuple(shape) and tensor.dtype == torch.float32:
            return tensor

    tensor = make()
    if make_writable(path.parent):
        save_tensors(path, tensor)
    return tensor


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Return the bytes of a tensor of any type; numpy itself has no bfloat16."""
    return tensor.detach().cpu().flatten().view(torch.uint8).numpy()


# ----------------------------------------------------------------------- inspection before loading


def inspect_archive(path: Path) -> list[int]:
    """Check the zip file that ``torch.save`` makes, and return the sizes of its tensors' storages.

    Raises ``zipfile.BadZipFile`` or ``ValueError`` where entries are compressed, overlap, come
    twice or have wrong checksums, and where the pickle holds more than tensors and plain values.
    """
    with zipfile.ZipFile(path) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        names = {entry.filename.lower() for entry in entries}
        n_bytes = sum(entry.file_size for entry in entries)

        if len(names) < len(entries) or any(entry.compress_type for entry in entries):
            raise zipfile.BadZipFile('entries come twice or are compressed')
        if n_bytes > path.stat().st_size or archive.testzip():
            raise zipfile.BadZipFile('entries overlap or have wrong checksums')

        pickles = [entry for entry in entries if entry.filename.lower().endswith('.pkl')]
        if len(pickles) != 1:
            raise zipfile.BadZipFile('there is not exactly one pickle')
        inspect_pickle(archive.read(pickles[0]))

    return [entry.file_size for entry in entries if '/data/' in entry.filename]


PICKLE_PROTOCOL = 2
MAX_TUPLE_DEPTH = 20  # deeper ones overflow the stack of the interpreter when they are hashed

ORDERED_DICT = 'collections OrderedDict'
REBUILD_FUNCTIONS = {'torch._utils _rebuild_tensor_v2', 'torch._utils _rebuild_tensor_v3'}
STORAGES = 'Bool Byte Char Short Int Long Half BFloat16 Float Double ComplexFloat ComplexDouble'
# Types of tensors that have no storage of their own, and are saved with an untyped one
UNTYPED = 'uint16 uint32 uint64 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz'

# Everything that the pickle of a checkpoint may name: dicts, and plain tensors of any type
ALLOWED_PICKLE_GLOBALS = {
    ORDERED_DICT,
    *REBUILD_FUNCTIONS,
    'torch.storage UntypedStorage',
    *(f'torch {storage}Storage' for storage in STORAGES.split()),
    *(f'torch {dtype}' for dtype in UNTYPED.split()),
}


class Item(NamedTuple):
    """What is known of an object on the unpickler's stack."""

    kind: str = 'value'  # or 'mark', 'empty tuple', or the name of an allowed global
    depth: int = 0  # of a tuple, counting the tuples inside it


class PickleInspector:
    """Follows the stack of an unpickler without making any object.

    Only what ``torch.save`` writes is let through: plain values, and calls of the functions that
    rebuild a tensor and of ``OrderedDict()``. No other function or class is called, whatever is
    named, because some take memory or show memory that was never written.
    """

    def __init__(self) -> None:
        self.stack: list[Item] = []
        self.memo: dict[int, Item] = {}

    def pop_to_mark(self) -> list[Item]:
        """Take all items above the last mark, and the mark, from the stack."""
        items = []
        while (item := self.stack.pop()).kind != 'mark':
            items.append(item)
        return items

    def push_tuple(self, parts: list[Item]) -> None:
        """Push a tuple of these parts."""
        depth = 1 + max((part.depth for part in parts), default=0)
        if depth > MAX_TUPLE_DEPTH:
            raise ValueError('the pickle nests its tuples too deeply')
        self.stack.append(Item('value' if parts else 'empty tuple', depth))

    def call(self) -> None:
        """Replace a function and its arguments by a result."""
        arguments, function = self.stack.pop(), self.stack.pop()
        is_rebuild = function.kind in REBUILD_FUNCTIONS
        is_empty_dict = function.kind == ORDERED_DICT and arguments.kind == 'empty tuple'
        if not is_rebuild and not is_empty_dict:
            raise ValueError(f'the pickle calls {function.kind}')
        self.stack.append(Item('ordered dict' if is_empty_dict else 'value'))

    def step(self, name: str, argument: Any) -> None:
        """Follow one operation. Raises ``ValueError`` for one that ``torch.save`` does not use."""
        stack = self.stack
        if name == 'PROTO':
            if argument != PICKLE_PROTOCOL:
                raise ValueError(f'the pickle has protocol {argument}')
        elif name in CONSTANTS:
            stack.append(Item())
        elif name == 'GLOBAL':
            if argument not in ALLOWED_PICKLE_GLOBALS:
                raise ValueError(f'the pickle names {argument}')
            stack.append(Item(argument))
        elif name == 'MARK':
            stack.append(Item('mark'))
        elif name in ('BINPUT', 'LONG_BINPUT'):
            self.memo[argument] = stack[-1]
        elif name in ('BINGET', 'LONG_BINGET'):
            stack.append(self.memo[argument])
        elif name == 'EMPTY_TUPLE':
            self.push_tuple([])
        elif name == 'TUPLE':
            self.push_tuple(self.pop_to_mark())
        elif name in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
            self.push_tuple([stack.pop() for _ in range(int(name[-1]))])
        elif name in ('APPENDS', 'SETITEMS'):
            self.pop_to_mark()
        elif name == 'APPEND':
            stack.pop()
        elif name == 'SETITEM':
            stack.pop()
            stack.pop()
        elif name == 'BINPERSID':  # a storage
            stack.pop()
            stack.append(Item())
        elif name == 'REDUCE':
            self.call()
        elif name == 'BUILD':  # the attributes of a state dict
            stack.pop()
            if stack[-1].kind != 'ordered dict':
                raise ValueError('the pickle sets attributes of more than an OrderedDict')
        elif name != 'STOP':
            raise ValueError(f'the pickle uses {name}')


CONSTANTS = {
    'EMPTY_DICT',
    'EMPTY_LIST',
    'NONE',
    'NEWTRUE',
    'NEWFALSE',
    'BININT',
    'BININT1',
    'BININT2',
    'LONG1',
    'BINFLOAT',
    'BINUNICODE',
}


def inspect_pickle(content: bytes) -> None:
    """Raise ``ValueError`` or ``LookupError`` where a pickle does more than ``torch.save`` does."""
    inspector = PickleInspector()
    for opcode, argument, _ in pickletools.genops(content):
        inspector.step(opcode.name, argument)


class BoundedCopy:
    """Copies dicts, lists and tensors out of a mapped file, of no more bytes than the file has.

    A small file may seem large by naming one thing many times. That is refused, and so are keys
    and values that are not plain.
    """

    def __init__(self, n_bytes: int) -> None:
        self.n_left = n_bytes
        self.size_at: dict[int, int] = {}

    def __call__(self, value: Any) -> Any:
        self.n_left -= value.nbytes if isinstance(value, torch.Tensor) else 1
        if self.n_left < 0:
            raise ValueError('it unfolds to more than its size')

        if isinstance(value, dict):
            if any(type(key) not in (str, int) for key in value):
                raise ValueError('it has keys that are neither text nor numbers')
            return {key: self(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self(item) for item in value)
        if isinstance(value, torch.Tensor):
            self.size_at[value.untyped_storage().data_ptr()] = value.nbytes
            return value.detach().clone()
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise ValueError(f'it holds a {type(value).__name__}')

    def tensor_sizes(self) -> list[int]:
        """Return the bytes of each tensor copied so far, in the order of the file."""
        return [self.size_at[address] for address in sorted(self.size_at)]
