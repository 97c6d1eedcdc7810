"""Checkpoints: one file with everything needed to resume a run or to use its model.

They are written atomically and validated when read. A file from a stranger cannot run code, and
takes no more memory than ``bounds`` allows.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from dataclasses import fields as options_of
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from .bounds import memory_for, memory_limit
from .errors import UserError, one_line
from .interfaces import Training
from .options import Options
from .tensors import load_tensors, save_tensors

LARGEST_INT = 2**62  # bounds what is computed from a step number
LARGEST_DIM, LARGEST_INPUT = 2**16, 2**24


@dataclass(frozen=True)
class CheckpointFormat:
    """What a script's checkpoint consists of, and how it is saved, read and restored.

    Attributes:
        script: the file name of the script.
        number: the number of the format. It is raised when older checkpoints cannot be read.
        config_class: the dataclass of the options that are kept.
        least_dims: the least of each dimension of an input, without the batch.
        fields: the attributes of a training that are kept, with their schema (``has_schema``).
        parts: the attributes that are kept by their ``state_dict()``, with its schema. Among them
            are ``model``, ``average`` and ``optimizer``.
        build_model: makes the model of a config and of input dimensions.
        build_optimizer: makes the optimizer of a config and of parameters.
        defaults: values of fields that older checkpoints of the same number do not have.
        upgrades: for each older number that can be read, a function that returns the content of
            such a checkpoint as that of the next number.
        memory_per_input: returns about how many bytes it takes to use a model for one input. A
            checkpoint may take no more than other files of its size (``common.bounds``).
    """

    script: str
    number: int
    config_class: type[Options]
    least_dims: tuple[int, ...]
    fields: dict[str, Any]
    parts: dict[str, Any]
    build_model: Callable[[Any, list[int]], nn.Module]
    build_optimizer: Callable[[Any, Iterable[nn.Parameter]], Optimizer]
    defaults: dict[str, Any] = field(default_factory=dict)
    upgrades: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = field(default_factory=dict)
    memory_per_input: Callable[[Any], int] = lambda model: 0

    def save(self, run: Training, path: Path) -> None:
        """Save everything needed to resume a training or to use its model."""
        save_tensors(path, self.content(run))

    def content(self, run: Training) -> dict[str, Any]:
        """Return what ``save`` saves. Its tensors are those of the training, not copies."""
        content = {
            'script': self.script,
            'format': self.number,
            'config': asdict(run.config),
            'input_dims': run.input_dims,
            'world_size': run.process.world_size,
        }
        for name, schema in self.fields.items():
            value = getattr(run, name)
            content[name] = int(value) if schema is int else value  # some are on a GPU
        for name in self.parts:
            content[name] = getattr(run, name).state_dict()
        return content

    def restore(self, run: Training, saved: dict[str, Any]) -> None:
        """Bring a training to where a checkpoint was saved.

        The parts are removed from ``saved``, so that they do not stay in memory twice.
        """
        for name, schema in self.fields.items():
            value = getattr(run, name, None)
            if schema is int and isinstance(value, torch.Tensor):
                value.fill_(saved[name])
            else:
                setattr(run, name, saved[name])
        for name in self.parts:
            getattr(run, name).load_state_dict(saved.pop(name))

    def read(self, path: Path) -> dict[str, Any]:
        """Return the content of a checkpoint, with its config as a dataclass and its path.

        Nothing in the file is trusted. Raises ``UserError`` unless it has exactly the
        expected entries, finite weights, and the shapes of the model that its options describe.
        """
        saved = load_tensors(path)
        if not isinstance(saved, dict) or saved.get('script') != self.script:
            raise UserError(f'{path} is not a checkpoint of {self.script}')
        self.require_format(path, saved.get('format', 0))

        try:
            saved = {**self.defaults, **self.upgrade(saved)}
            self.require_schema(saved)
            saved['config'] = self.parse_config(saved['config'])
            self.require_finite(saved)
            model = self.require_state(saved)
            if self.memory_per_input(model) > memory_limit(path):
                raise ValueError('its inputs take more memory than a file of its size may')
        except (ValueError, UserError) as error:
            raise UserError(
                f'{path} is a checkpoint of another version of {self.script}, or damaged: '
                f'{one_line(error)}'
            ) from error
        return {**saved, 'path': Path(path)}

    def require_readable(self, model: nn.Module) -> None:
        """Raise ``UserError`` where ``read`` would refuse the checkpoints of a model."""
        # at least the weights and their average are in the file
        n_bytes = 2 * sum(parameter.nbytes for parameter in model.parameters())
        if self.memory_per_input(model) > memory_for(n_bytes):
            raise UserError(
                'so small a model of such large inputs is not read again, as it takes more memory '
                'than a file of its size may: make the model larger, or the inputs smaller'
            )

    def require_format(self, path: Path, number: Any) -> None:
        """Raise ``UserError`` where a checkpoint has another format than the script reads."""
        if type(number) is not int:
            raise UserError(f'{path} is damaged: its format is no number')
        if number == self.number or number in self.upgrades:
            return
        advice = 'update the code'
        if number < self.number:
            advice = 'train again, or use the version that wrote it'
        raise UserError(
            f'{path} is a checkpoint of another version of {self.script}, or damaged: it has '
            f'format {number}, and this version reads format {self.number}: {advice}'
        )

    def upgrade(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Return the content of a checkpoint of an older number as that of the present one.

        Raises ``ValueError`` where it lacks an entry that files of its number have.
        """
        for number in range(saved['format'], self.number):
            try:
                saved = self.upgrades[number](saved)
            except (LookupError, TypeError, AttributeError) as error:
                raise ValueError(f'it lacks entries of format {number}') from error
        return {**saved, 'format': self.number}

    def require_schema(self, saved: dict[str, Any]) -> None:
        """Raise ``ValueError`` where an entry is missing, unknown or of the wrong type."""
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
            raise ValueError(f'entries are missing or unknown: {", ".join(different)}')
        for name, expected in schema.items():
            if not has_schema(saved[name], expected):
                raise ValueError(f'{name} has the wrong type or contents')

        for name in ('world_size', 'first_world_size'):
            if saved.get(name, 1) < 1:
                raise ValueError(f'its {name} is 0')
        dims = saved['input_dims']
        if len(dims) != len(self.least_dims):
            raise ValueError(f'its inputs have {len(dims)} dimensions')
        are_within = all(low <= n < LARGEST_DIM for low, n in zip(self.least_dims, dims))
        # those that may be 0 say how many conditions there are, and not how large an input is
        n_values = math.prod(n for low, n in zip(self.least_dims, dims) if low)
        if not are_within or n_values >= LARGEST_INPUT:
            raise ValueError(f'its input_dims are {dims}')

    def require_finite(self, saved: dict[str, Any]) -> None:
        """Raise ``ValueError`` where a number is not finite, but for scores that are not known."""
        is_validated = math.isfinite(saved['best'])
        unknown = set() if is_validated else {('best', 'inf'), ('validation_loss', 'nan')}
        for entry in (*self.fields, 'scheduler'):
            for name, number in find_not_finite(entry, saved.get(entry)):
                if (name, str(number)) not in unknown:
                    raise ValueError(f'its {name} is {number}')

    def parse_config(self, config: dict[str, Any]) -> Options:
        """Return the config of a checkpoint. Options that it does not have get their defaults.

        Raises ``ValueError`` for an option that does not exist, ``UserError`` for a value out of
        bounds.
        """
        unknown = config.keys() - {f.name for f in options_of(self.config_class)}
        if unknown:
            raise ValueError(f'unknown options: {", ".join(sorted(map(str, unknown)))}')
        for name, value in config.items():
            is_list = value is None or has_schema(value, [str])  # None: it was not given
            if not is_list and not isinstance(value, (str, int, float)):
                raise ValueError(f'its option {name} is neither text nor a number')
        return self.config_class(**config)

    def require_state(self, saved: dict[str, Any]) -> nn.Module:
        """Return the model of a checkpoint.

        Raises ``ValueError`` where weights or optimizer do not fit the options or are not finite.
        The shapes are found without taking memory for the model, and without taking time for one
        that is larger than the weights in the file.
        """
        config, dims = saved['config'], saved['input_dims']
        n_values = sum(count_values(value) for value in saved['model'].values())
        try:
            with torch.device('meta'), limit_parameters(n_values):
                average = AveragedModel(self.build_model(config, dims))
        except RuntimeError:
            # a layer looks at its values when it is built, and on the meta device it has none
            with limit_parameters(n_values):
                average = AveragedModel(self.build_model(config, dims))

        for name, module in (('model', average.module), ('average', average)):
            require_same_tensors(name, saved[name], module.state_dict())
            module.load_state_dict(saved[name], assign=True)

        parameters = list(average.module.parameters())
        state = load_optimizer_state(
            lambda values: self.build_optimizer(config, values), parameters, saved['optimizer']
        )
        for values in (saved['model'], saved['average'], *state):
            for name, value in values.items():
                if isinstance(value, torch.Tensor) and not is_finite(value):
                    raise ValueError(f'its weights are not finite: {name}')
        return average.module


def require_entries(values: dict[Any, Any], schema: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless values have these entries, of these types (``has_schema``).

    They may have others besides.
    """
    for name, expected in schema.items():
        if name not in values or not has_schema(values[name], expected):
            raise ValueError(f'{name} is missing, or has the wrong type or contents')


def batch_of_all_processes(saved: dict[str, Any], config_class: type[Any]) -> int:
    """Return how many images or rows a step of a checkpoint took, over all its processes.

    Raises ``ValueError`` where the entries that say so are missing or of the wrong type.
    """
    require_entries(saved, {'config': dict, 'world_size': int})
    config = {'batch_size': config_class.batch_size, **saved['config']}
    require_entries(config, {'batch_size': int})
    return config['batch_size'] * saved['world_size']


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


def find_not_finite(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield the numbers in plain values that are not finite, each with its name."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from find_not_finite(key, item)
    elif isinstance(value, list):
        for item in value:
            yield from find_not_finite(name, item)
    elif isinstance(value, float) and not math.isfinite(value):
        yield name, value


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
    for key, wanted in expected.items():
        value = saved[key]
        is_plain = type(value) is torch.Tensor and value.layout == torch.strided
        if not is_plain or value.shape != wanted.shape or value.dtype != wanted.dtype:
            raise ValueError(f'its {name} has another type or shape than its options imply: {key}')


def load_optimizer_state(
    build: Callable[[list[nn.Parameter]], Optimizer],
    parameters: list[nn.Parameter],
    saved: dict[str, Any],
) -> list[dict[str, Any]]:
    """Validate a saved optimizer, and return its state for each parameter.

    Raises ``ValueError`` unless ``build(parameters)`` can load ``saved`` and has the same options,
    apart from the learning rate.
    """
    optimizer = build(parameters)
    fresh_groups = optimizer.state_dict()['param_groups']
    indices = [group['params'] for group in fresh_groups]
    saved_indices = [group.get('params') for group in saved['param_groups']]
    if not is_same(saved_indices, indices):
        raise ValueError('its optimizer belongs to other weights')
    require_same_state(parameters, saved['state'], build)

    try:
        optimizer.load_state_dict(saved)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(f'its optimizer cannot be loaded: {one_line(error)}') from error
    for group, fresh in zip(optimizer.param_groups, fresh_groups):
        for key in fresh.keys() - {'params', 'lr'}:
            if key not in group or not is_same(group[key], fresh[key]):
                raise ValueError(f"its optimizer has another value of {key} than this script's")
        lr = group.get('lr')
        if type(lr) is not float or not 0 <= lr < math.inf:
            raise ValueError("its optimizer's learning rate is not a number")
    return list(saved['state'].values())


def is_same(value: Any, expected: Any) -> bool:
    """Return whether a value has the type and the value of a plain one, or of a list of them."""
    if type(value) is not type(expected):
        return False
    if isinstance(expected, (list, tuple)):
        return len(value) == len(expected) and all(map(is_same, value, expected))
    return value == expected


def require_same_state(
    parameters: list[nn.Parameter],
    saved: dict[Any, Any],
    build: Callable[[list[nn.Parameter]], Optimizer],
) -> None:
    """Raise ``ValueError`` unless the state of each parameter has the form that a step gives it."""
    expected_of: dict[tuple[int, torch.dtype], dict[str, Any]] = {}

    for index, state in saved.items():
        is_index = type(index) is int and 0 <= index < len(parameters)
        if not is_index or type(state) is not dict:
            raise ValueError("its optimizer's state does not match its weights")

        parameter = parameters[index]
        kind = parameter.dim(), parameter.dtype
        # distinct sizes, so that a state of this shape must have the shape of its parameter
        sizes = list(range(2, 2 + parameter.dim()))
        example = torch.zeros(sizes, dtype=parameter.dtype)
        if kind not in expected_of:
            expected_of[kind] = state_after_a_step(build, example)
        expected = expected_of[kind]
        if state.keys() != expected.keys():
            raise ValueError("its optimizer's state has other entries than this script's optimizer")

        for name, value in expected.items():
            if type(state[name]) is not type(value):
                raise ValueError(f"its optimizer's state has another type: {name}")
            if not isinstance(value, torch.Tensor):
                continue
            if value.shape == example.shape:
                shape = parameter.shape
            elif value.dim() == 0:
                shape = value.shape
            else:
                shape = state[name].shape  # how it depends on the parameter is not known
            if state[name].dtype != value.dtype or state[name].shape != shape:
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
