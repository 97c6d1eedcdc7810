"""Checkpoints."""

import contextlib
import math
import pickletools
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from .errors import UserError, one_line
from .files import write_atomically

ALLOWED_PICKLE_GLOBALS = {
    'torch._utils _rebuild_tensor_v2',
    'torch FloatStorage',
    'torch BoolStorage',
    'torch LongStorage',
    'collections OrderedDict',
    2,
}  # all that the pickle of a checkpoint names, and its protocol


LARGEST = 2**62  # bound on a step number and on what is computed from it


def save_tensors(path, content):
    """torch.save, atomically; UserError where there is no room for it"""

    def write(temporary):
        try:
            with open(temporary, 'wb') as file:
                torch.save(content, file)
        except RuntimeError as error:  # torch's own, of its zip file, hides the system's
            raise error.__context__ if isinstance(error.__context__, OSError) else error

    write_atomically(path, write)


def save_checkpoint(run, log, script, fields, parts, path):
    """All that a run needs to go on and its model to be used, after what was logged before it; by the main process"""
    if run.process.rank == 0:
        log.flush()
        save_tensors(
            path,
            {
                'script': f'{script}.py',
                'config': asdict(run.config),
                'input_dims': run.input_dims,
                'world_size': run.process.world_size,
                **{name: getattr(run, name) for name in fields},
                **{name: getattr(run, name).state_dict() for name in parts},
            },
        )


def restore_state(run, saved, fields, parts):
    """What save_run has saved; the parts are taken out of it, lest they lie in memory until the end"""
    for name in fields:
        setattr(run, name, saved[name])
    for name in parts:
        getattr(run, name).load_state_dict(saved.pop(name))


def load_tensors(path):
    """-> what save_tensors wrote: tensors and plain values, never a pickled object, of no more bytes than the file has.
    UserError where it is damaged."""
    if not Path(path).is_file():
        raise UserError(
            f'{path}: no such checkpoint' + ', but a folder: give its best.pt' * Path(path).is_dir()
        )
    left, storages = Path(path).stat().st_size, {}

    def copy(value):
        """Of dicts, lists and tensors in the mapped file: what only seems large, being one thing many times, is refused"""
        nonlocal left
        left -= value.nbytes if isinstance(value, torch.Tensor) else 1
        if left < 0:
            raise ValueError
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(copy(item) for item in value)
        if not isinstance(value, torch.Tensor):
            return value
        storages[value.untyped_storage().data_ptr()] = value.nbytes
        return value.detach().clone()

    try:
        with zipfile.ZipFile(path) as archive:
            parts = sorted(archive.infolist(), key=lambda part: part.header_offset)
            (pickled,) = (part for part in parts if part.filename.lower().endswith('.pkl'))
            if (
                len({part.filename.lower() for part in parts}) < len(parts)
                or any(part.compress_type for part in parts)
                or sum(part.file_size for part in parts) > left
                or archive.testzip()
            ):
                raise zipfile.BadZipFile  # stored once and as they are, nothing small unfolds to something huge
            for opcode, name, _ in pickletools.genops(archive.read(pickled)):
                if opcode.name in ('GLOBAL', 'PROTO') and name not in ALLOWED_PICKLE_GLOBALS:
                    raise ValueError
        content = copy(torch.load(path, map_location='cpu', weights_only=True, mmap=True))
        if [storages[at] for at in sorted(storages)] != [
            part.file_size for part in parts if '/data/' in part.filename
        ]:
            raise ValueError  # a tensor that claims to be larger than it is would show what lies behind it
        return content
    except Exception as error:  # a damaged file fails in too many ways to list
        raise UserError(
            f'{path} cannot be read as a checkpoint: it is truncated, damaged or holds more than tensors '
            f'and plain values ({type(error).__name__})'
        ) from None


def tensor_cache(path, shape, make):
    """-> float32 tensor of that shape: what make() gives, kept in a file"""
    with contextlib.suppress(UserError):  # none, or damaged: made again
        tensor = load_tensors(path)
        if isinstance(tensor, torch.Tensor) and (tensor.shape, tensor.dtype) == (
            shape,
            torch.float32,
        ):
            return tensor
    tensor = make()
    save_tensors(path, tensor)
    return tensor


def has_schema(value, form):
    """Whether a value is of the type that form is or, form being a dict or a list of one, holds what matches that"""
    if isinstance(form, dict):
        return (
            type(value) is dict
            and value.keys() == form.keys()
            and all(has_schema(value[key], form[key]) for key in form)
        )
    if isinstance(form, list):
        return type(value) is list and all(has_schema(item, form[0]) for item in value)
    return (
        isinstance(value, form)
        if form is dict
        else type(value) is form and (form is not int or 0 <= value < LARGEST)
    )


@contextlib.contextmanager
def limit_parameters(n_values):
    """Stops, by ValueError, what builds a model of more values"""

    def count(module, name, parameter):
        nonlocal n_values
        n_values -= parameter.numel()
        if n_values < 0:
            raise ValueError('its options are those of a model with more weights than it has')

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def validate_optimizer(parameters, saved):
    """-> the state of each parameter in what an Adam has saved, ValueError unless Adam could go on from it"""
    optimizer = torch.optim.Adam(parameters)
    fresh = dict(optimizer.param_groups[0])
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    if (
        type(group['lr']) is not float
        or not 0 <= group['lr'] < math.inf
        or {type(group['amsgrad']), type(group['fused'])} != {bool}
        or any(
            group[key] != fresh[key] for key in fresh.keys() - {'params', 'lr', 'amsgrad', 'fused'}
        )
    ):
        raise ValueError("its optimizer's options are not those of a training")
    names = {'step', 'exp_avg', 'exp_avg_sq', *['max_exp_avg_sq'] * group['amsgrad']}
    for p, state in optimizer.state.items():
        if state.keys() != names or any(
            state[name].shape != (() if name == 'step' else p.shape) for name in names
        ):
            raise ValueError("its optimizer's state has other shapes than its weights")
    return optimizer.state.values()


def read_checkpoint(path, script, form, Config, n_dims, build):
    """-> the dict in a script's checkpoint, its config a Config. UserError unless it has all its parts and no others, as
    form has them, with an input of n_dims, finite weights, and the shapes of the model that build(config, input_dims)
    makes of its options, which are found out without taking memory, nor time for a model larger than the weights."""
    saved = load_tensors(path)
    if not isinstance(saved, dict) or saved.get('script') != script:
        raise UserError(f'{path} is not a checkpoint of {script}')
    try:
        if not has_schema(saved, form):
            raise ValueError('parts are missing, unknown or of another type')
        config, dims = Config(**saved['config']), saved['input_dims']
        if (
            len(dims) != n_dims
            or not all(type(n) is int and 0 < n < 2**16 for n in dims)
            or math.prod(dims) >= 2**24
        ):
            raise ValueError(f'its input_dims are {dims}')
        with (
            torch.device('meta'),
            limit_parameters(sum(value.numel() for value in saved['model'].values())),
        ):
            average = build(config, dims)
        average.module.load_state_dict(saved['model'], assign=True)
        average.load_state_dict(saved['average'], assign=True)
        states = validate_optimizer(average.module.parameters(), saved['optimizer'])
        if not all(
            value.isfinite().all()
            for part in (saved['model'], saved['average'], *states)
            for value in part.values()
        ):
            raise ValueError('its weights are not finite')
        return {**saved, 'config': config, 'path': Path(path)}
    except Exception as error:  # likewise
        raise UserError(
            f'{path} is a checkpoint of another version of {script}, or damaged: {one_line(error)}'
        ) from None
