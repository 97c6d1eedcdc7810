"""Checkpoints: one file that holds all that a run needs to go on, and its model to be used.

They are written atomically and validated when read. A file from a stranger runs no code, and takes
no more memory than it has bytes.
"""

import contextlib
import math
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from dataclasses import fields as options_of
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from .errors import UserError, one_line
from .files import write_atomically
from .interfaces import Training
from .options import Options

# Everything that the pickle of a checkpoint may name: dicts, and plain tensors of any type
STORAGES = (
    'Bool Byte Char Short Int Long Half BFloat16 Float Double ComplexFloat ComplexDouble'.split()
)
ALLOWED_PICKLE_GLOBALS = {
    'collections OrderedDict',
    'torch._utils _rebuild_tensor_v2',
    'torch._utils _rebuild_tensor_v3',
    'torch.storage UntypedStorage',
    *(f'torch {storage}Storage' for storage in STORAGES),
    *(f'torch {name}' for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)),
}
PICKLE_PROTOCOL = 2

LARGEST_INT = 2**62  # bounds what is computed from a step number
LARGEST_DIM, LARGEST_INPUT = 2**16, 2**24

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


# ------------------------------------------------------------------------------- files of tensors


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

    No pickled object is made, and no more memory is taken than the file has bytes. Raises
    ``UserError`` where the file does not exist or is damaged.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f'{path}: no such checkpoint, but a folder: give its best.pt')
    if not path.is_file():
        raise UserError(f'{path}: no such checkpoint')

    try:
        storage_sizes = inspect_archive(path)
        mapped = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        copy = BoundedCopy(path.stat().st_size)
        content = copy(mapped)
        if copy.storage_sizes() != storage_sizes:
            # a tensor that claims to be larger than it is would show what lies behind it
            raise ValueError('its tensors are not as large as what is stored of them')
    except DAMAGED_FILE_ERRORS as error:
        raise UserError(
            f'{path} cannot be read as a checkpoint: it is truncated, damaged or holds more than '
            f'tensors and plain values ({type(error).__name__})'
        ) from error
    return content


def inspect_archive(path: Path) -> list[int]:
    """Check the zip file that ``torch.save`` makes, and return the sizes of its tensors' storages.

    Raises ``zipfile.BadZipFile`` or ``ValueError`` where entries are compressed, overlap, come
    twice or have wrong checksums, and where the pickle names more than tensors and dicts.
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
        for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if opcode.name == 'GLOBAL' and argument not in ALLOWED_PICKLE_GLOBALS:
                raise ValueError(f'the pickle names {argument}')
            if opcode.name == 'PROTO' and argument != PICKLE_PROTOCOL:
                raise ValueError(f'the pickle has protocol {argument}')

    return [entry.file_size for entry in entries if '/data/' in entry.filename]


class BoundedCopy:
    """Copies dicts, lists and tensors out of a mapped file, of no more bytes than the file has.

    A small file may seem large by naming one thing many times. That is refused.
    """

    def __init__(self, n_bytes: int) -> None:
        self.n_left = n_bytes
        self.size_at: dict[int, int] = {}

    def __call__(self, value: Any) -> Any:
        self.n_left -= value.nbytes if isinstance(value, torch.Tensor) else 1
        if self.n_left < 0:
            raise ValueError('it unfolds to more than its size')

        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self(item) for item in value)
        if isinstance(value, torch.Tensor):
            self.size_at[value.untyped_storage().data_ptr()] = value.nbytes
            return value.detach().clone()
        return value

    def storage_sizes(self) -> list[int]:
        """Return the bytes of the storages of all tensors so far, in the order of the file."""
        return [self.size_at[address] for address in sorted(self.size_at)]


def tensor_cache(
    path: Path, shape: Sequence[int], make: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Return the float32 tensor of a shape that a file keeps; make and save it where there is none.

    A file that is damaged or holds something else is replaced.
    """
    with contextlib.suppress(UserError):
        tensor = load_tensors(path)
        is_tensor = isinstance(tensor, torch.Tensor)
        if is_tensor and tensor.shape == tuple(shape) and tensor.dtype == torch.float32:
            return tensor

    tensor = make()
    save_tensors(path, tensor)
    return tensor


# ------------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class CheckpointFormat:
    """What a script's checkpoint consists of, and how it is saved, read and restored.

    Attributes:
        script: the file name of the script.
        number: the number of the format. It is raised when older checkpoints cannot be read.
        config_class: the dataclass of the options that are kept.
        n_dims: the number of dimensions of an input, without the batch.
        fields: the attributes of a training that are kept, with their schema (``has_schema``).
        parts: the attributes that are kept by their ``state_dict()``, with its schema. Among them
            are ``model``, ``average`` and ``optimizer``.
        build_model: makes the model of a config and of input dimensions.
        build_optimizer: makes the optimizer of a config and of parameters.
        defaults: values of fields that older checkpoints of the same number do not have.
    """

    script: str
    number: int
    config_class: type[Options]
    n_dims: int
    fields: dict[str, Any]
    parts: dict[str, Any]
    build_model: Callable[[Any, list[int]], nn.Module]
    build_optimizer: Callable[[Any, Iterable[nn.Parameter]], Optimizer]
    defaults: dict[str, Any] = field(default_factory=dict)

    def save(self, run: Training, path: Path) -> None:
        """Save all that a training needs to go on, and its model to be used."""
        content = {
            'script': self.script,
            'format': self.number,
            'config': asdict(run.config),
            'input_dims': run.input_dims,
            'world_size': run.process.world_size,
        }
        for name in self.fields:
            content[name] = getattr(run, name)
        for name in self.parts:
            content[name] = getattr(run, name).state_dict()
        save_tensors(path, content)

    def restore(self, run: Training, saved: dict[str, Any]) -> None:
        """Bring a training to where a checkpoint was saved.

        The parts are removed from ``saved``, so that they do not stay in memory twice.
        """
        for name in self.fields:
            setattr(run, name, saved[name])
        for name in self.parts:
            getattr(run, name).load_state_dict(saved.pop(name))

    def read(self, path: Path) -> dict[str, Any]:
        """Return the content of a checkpoint, with its config as a dataclass and its path.

        Nothing in the file is trusted. Raises ``UserError`` unless it has all its parts and no
        others, finite weights, and the shapes of the model that its options describe.
        """
        saved = load_tensors(path)
        if not isinstance(saved, dict) or saved.get('script') != self.script:
            raise UserError(f'{path} is not a checkpoint of {self.script}')
        self.require_format(path, saved.get('format', 0))

        try:
            saved = {**self.defaults, **saved}
            self.require_schema(saved)
            saved['config'] = self.parse_config(saved['config'])
            self.require_state(saved)
        except (ValueError, UserError) as error:
            raise UserError(
                f'{path} is a checkpoint of another version of {self.script}, or damaged: '
                f'{one_line(error)}'
            ) from error
        return {**saved, 'path': Path(path)}

    def require_format(self, path: Path, number: Any) -> None:
        """Raise ``UserError`` where a checkpoint has another format than the script reads."""
        if type(number) is int and number == self.number:
            return
        is_older = isinstance(number, int) and number < self.number
        advice = 'train again, or use the version that wrote it' if is_older else 'update the code'
        raise UserError(
            f'{path} is a checkpoint of another version of {self.script}, or damaged: it has '
            f'format {number}, and this version reads format {self.number}: {advice}'
        )

    def require_schema(self, saved: dict[str, Any]) -> None:
        """Raise ``ValueError`` where a part is missing, unknown or of another type."""
        schema = {
            'script': str,
            'format': int,
            'config': dict,
            'input_dims': [int],
            'world_size': int,
            **self.fields,
            **self.parts,
        }
        different = sorted(str(name) for name in saved.keys() ^ schema.keys())
        if different:
            raise ValueError(f'parts are missing or unknown: {", ".join(different)}')
        for name, form in schema.items():
            if not has_schema(saved[name], form):
                raise ValueError(f'{name} is not what it should be')

        dims = saved['input_dims']
        is_possible = all(0 < n < LARGEST_DIM for n in dims) and math.prod(dims) < LARGEST_INPUT
        if len(dims) != self.n_dims or not is_possible:
            raise ValueError(f'its input_dims are {dims}')

    def parse_config(self, config: dict[str, Any]) -> Options:
        """Return the config of a checkpoint. Options that it does not have get their defaults.

        Raises ``ValueError`` for an option that does not exist, ``UserError`` for a value out of
        bounds.
        """
        unknown = config.keys() - {f.name for f in options_of(self.config_class)}
        if unknown:
            raise ValueError(f'unknown options: {", ".join(sorted(map(str, unknown)))}')
        return self.config_class(**config)

    def require_state(self, saved: dict[str, Any]) -> None:
        """Raise ``ValueError`` where weights or optimizer do not fit the options or are not finite.

        The shapes are found without taking memory for the model, and without taking time for one
        that is larger than the weights in the file.
        """
        config, dims = saved['config'], saved['input_dims']
        n_values = sum(count_values(value) for value in saved['model'].values())
        try:
            with torch.device('meta'), limit_parameters(n_values):
                average = AveragedModel(self.build_model(config, dims))
        except (RuntimeError, NotImplementedError):
            # a layer looks at its values when it is built, and on the meta device it has none
            with limit_parameters(n_values):
                average = AveragedModel(self.build_model(config, dims))

        for name, module in (('model', average.module), ('average', average)):
            require_same_tensors(name, saved[name], module.state_dict())
            module.load_state_dict(saved[name], assign=True)

        parameters = list(average.module.parameters())
        state = load_optimizer_state(
            lambda own: self.build_optimizer(config, own), parameters, saved['optimizer']
        )
        for values in (saved['model'], saved['average'], *state):
            for name, value in values.items():
                if isinstance(value, torch.Tensor) and not is_finite(value):
                    raise ValueError(f'its weights are not finite: {name}')


def has_schema(value: Any, schema: Any) -> bool:
    """Return whether a value is of the type ``schema``.

    A schema that is a dict of schemas stands for a dict with exactly these keys, a list of one
    schema for a list of such values, and ``int`` for a number that is not negative nor huge.
    """
    if isinstance(schema, dict):
        if type(value) is not dict or value.keys() != schema.keys():
            return False
        return all(has_schema(value[key], schema[key]) for key in schema)
    if isinstance(schema, list):
        return type(value) is list and all(has_schema(item, schema[0]) for item in value)
    if schema is int:
        return type(value) is int and 0 <= value < LARGEST_INT
    return type(value) is schema


def count_values(value: Any) -> int:
    """Return the number of values of a tensor. Raises ``ValueError`` for anything else."""
    if not isinstance(value, torch.Tensor):
        raise ValueError('something among its weights is no tensor')
    return value.numel()


@contextlib.contextmanager
def limit_parameters(n_values: int) -> Iterator[None]:
    """Stop, by ``ValueError``, the construction of a model with more than ``n_values`` values."""

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal n_values
        n_values -= parameter.numel()
        if n_values < 0:
            raise ValueError('its options describe a model with more weights than the file holds')

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def require_same_tensors(
    name: str, saved: dict[str, Any], expected: dict[str, torch.Tensor]
) -> None:
    """Raise ``ValueError`` unless a state dict has the expected names, types and shapes."""
    different = sorted(str(key) for key in saved.keys() ^ expected.keys())
    if different:
        raise ValueError(f'its {name} lacks, or should not have, {", ".join(different)}')
    for key, own in expected.items():
        value = saved[key]
        is_plain = type(value) is torch.Tensor and value.layout == torch.strided
        if not is_plain or value.shape != own.shape or value.dtype != own.dtype:
            raise ValueError(f'its {name} has another type or shape than its options: {key}')


def load_optimizer_state(
    build: Callable[[list[nn.Parameter]], Optimizer],
    parameters: list[nn.Parameter],
    saved: dict[str, Any],
) -> list[dict[str, Any]]:
    """Return what a saved optimizer keeps of each parameter.

    ``build`` makes an optimizer of parameters. Raises ``ValueError`` unless the one it makes of
    ``parameters`` has the same options, but for the learning rate, and could go on from ``saved``.
    """
    optimizer = build(parameters)
    fresh_groups = optimizer.state_dict()['param_groups']
    indices = [group['params'] for group in fresh_groups]
    if [group.get('params') for group in saved['param_groups']] != indices:
        raise ValueError('its optimizer is one of other weights')
    require_same_state(parameters, saved['state'], build)

    try:
        optimizer.load_state_dict(saved)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(f'its optimizer cannot be loaded: {one_line(error)}') from error
    for group, fresh in zip(optimizer.param_groups, fresh_groups):
        for key in fresh.keys() - {'params', 'lr'}:
            if type(group[key]) is not type(fresh[key]) or group[key] != fresh[key]:
                raise ValueError(f"its optimizer's option {key} is not that of a training")
        if type(group['lr']) is not float or not 0 <= group['lr'] < math.inf:
            raise ValueError("its optimizer's learning rate is not a number")
    return list(saved['state'].values())


def require_same_state(
    parameters: list[nn.Parameter],
    saved: dict[Any, Any],
    build: Callable[[list[nn.Parameter]], Optimizer],
) -> None:
    """Raise ``ValueError`` unless a saved state, by parameter, is what a step would leave."""
    expected_of: dict[tuple[int, torch.dtype], dict[str, Any]] = {}

    for index, state in saved.items():
        is_index = type(index) is int and 0 <= index < len(parameters)
        if not is_index or type(state) is not dict:
            raise ValueError("its optimizer's state is not of its weights")

        parameter = parameters[index]
        kind = parameter.dim(), parameter.dtype
        # sizes that are all different tell whether a state has the shape of its parameter
        sizes = list(range(2, 2 + parameter.dim()))
        example = torch.zeros(sizes, dtype=parameter.dtype)
        if kind not in expected_of:
            expected_of[kind] = state_after_a_step(build, example)
        expected = expected_of[kind]
        if state.keys() != expected.keys():
            raise ValueError("its optimizer's state has other parts than a training gives it")

        for name, value in expected.items():
            if type(state[name]) is not type(value):
                raise ValueError(f"its optimizer's state has another type: {name}")
            if not isinstance(value, torch.Tensor):
                continue
            has_shape_of_weight = value.shape == example.shape
            shape = parameter.shape if has_shape_of_weight else value.shape
            is_known = has_shape_of_weight or value.dim() == 0
            if state[name].dtype != value.dtype or is_known and state[name].shape != shape:
                raise ValueError("its optimizer's state has other shapes than its weights")


def state_after_a_step(
    build: Callable[[list[nn.Parameter]], Optimizer], value: torch.Tensor
) -> dict[str, Any]:
    """Return what an optimizer keeps of one parameter after a step with a gradient of zero."""
    parameter = nn.Parameter(value)
    parameter.grad = torch.zeros_like(value)
    optimizer = build([parameter])
    optimizer.step()
    return optimizer.state[parameter]


def is_finite(value: torch.Tensor) -> bool:
    """Return whether all values of a tensor of any type are finite."""
    if value.is_floating_point() and value.element_size() == 1:
        value = value.float()  # torch has no isfinite of eight-bit floats
    return bool(value.isfinite().all())


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Return the bytes of a tensor of any type; numpy itself has no bfloat16."""
    return tensor.detach().cpu().flatten().view(torch.uint8).numpy()
