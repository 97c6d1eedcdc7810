"""Runs: what their processes must agree on, what is shown of them, and how they lie on the disk, their folders, events
and checkpoints, whole or not there, and none of them trusted."""

import contextlib
import math
import os
import pickletools
import re
import signal
import socket
import sys
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from torch.nn.modules.module import register_module_parameter_registration_hook
from tqdm import tqdm

from .files import UserError, alone, new_folder, progress, reason, write_atomically, writing

NAMED = {
    'torch._utils _rebuild_tensor_v2',
    'torch FloatStorage',
    'torch BoolStorage',
    'torch LongStorage',
    'collections OrderedDict',
    2,
}  # all that the pickle of a checkpoint names, and its protocol
LARGEST = 2**62  # bound on a step number and on what is computed from it


@contextlib.contextmanager
def claim(folder, is_new):
    """-> the folder, or a new one of a name like it, held against other trainings until the end"""
    folder = new_folder(folder) if is_new else folder
    with alone(folder / '.lock', f'another process trains in {folder}', wait=False):
        for kind in ('pt', 'png', 'json'):
            for stale in folder.glob(
                f'.*.{kind}.[0-9]*'
            ):  # of a process that was killed while it wrote
                if stale.suffix[1:].isdigit():
                    stale.unlink()
        yield folder


@contextlib.contextmanager
def stop_signals():
    """-> list of the names of SIGTERM and SIGINT as they come: they end nothing, so that a step can be finished and saved"""
    seen = []
    before = {
        number: signal.signal(
            number, lambda number, frame: seen.append(signal.Signals(number).name)
        )
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def find_run(script, request, is_to_train, load, begun=None):
    """-> load(path) of the last checkpoint in a folder that was begun, of the one that restore_file names or, by default, of
    the newest run: to train on, of its last one, else of its best. None where training starts from nothing."""
    begun = begun and Path(begun) / 'checkpoint.pt'
    if begun and begun.exists():
        return load(begun)
    if request.restore_file:
        return load(Path(request.restore_file))
    found = Path(request.output_dir).glob(f'{script}_*/checkpoint.pt')
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    if is_to_train:
        return load(newest) if newest and request.resume else None
    if newest is None:
        raise UserError(
            f'no checkpoint of {script}.py under {request.output_dir}: train first '
            f'(python {script}.py --train), or give --restore_file or --output_dir'
        )
    best = newest.with_name('best.pt')
    return load(best if best.exists() else newest)


def find_checkpoint(script, unit, mode, request, process, load):
    """-> load(path) of the run that torchrun starts anew, else what find_run gives, perhaps None; prints which it is"""
    begun = (
        process.store.get(script).decode()
        if process.store and process.store.check([script])
        else None
    )
    saved = find_run(script, request, mode == 'train', load, begun)
    require_agreement(
        process, checkpoint=saved and [saved[key] for key in ('step', 'validation_loss', 'best')]
    )
    if saved and process.rank == 0:
        score = (
            f'validation loss {saved["validation_loss"]:.4f} {unit}'
            if saved['best'] < math.inf
            else 'not validated yet'
        )
        print(f'restored {saved["path"]}: step {saved["step"]}, {score}')
        if mode == 'train' and saved['world_size'] != process.world_size:
            print(
                f'note: {saved["world_size"]} processes before, {process.world_size} now: the batch of a step and the number '
                'of steps in an epoch change with them'
            )
    return saved


@contextlib.contextmanager
def run_folder(script, config, request, process, saved, load):
    """-> the folder of the run, a new one or its checkpoint's, the same for all processes"""
    name = f'{script}_{Path(config.dataset).stem}_{time.strftime("%Y-%m-%d_%H-%M-%S")}'
    folder = saved['path'].parent if saved else Path(request.output_dir) / name
    with claim(folder, saved is None) if process.rank == 0 else contextlib.nullcontext() as folder:
        folder, *_ = process.gather(folder)
        if process.rank == 0:
            require_newest(saved, load)
            if process.store:
                process.store.set(script, str(folder))
            print(
                f'{folder}: '
                + ' '.join(f'{name}={value}' for name, value in asdict(config).items())
            )
        yield folder


def require_agreement(process, **own):
    """Refuses to go on where something is not the same on all processes, naming it"""
    all_of_them = process.gather(own)
    different = sorted(
        name
        for name in set().union(*all_of_them)
        if len({repr(one.get(name)) for one in all_of_them}) > 1
    )
    if different:
        raise UserError(f'the processes start from different {" and ".join(different)}')


def require_newest(saved, load):
    """UserError where the last checkpoint in its folder, which is claimed, is past the one to train on from"""
    newest = saved and saved['path'].with_name('checkpoint.pt')
    if newest and newest.exists() and load(newest)['step'] > saved['step']:
        raise UserError(
            f'{newest} is at a later step than {saved["path"]} was and would be overwritten: go on from it, or '
            f'copy {saved["path"].name} to a folder of its own'
        )


class Scalars:
    """Scalars of a run for tensorboard, in an events file that supersedes what earlier files say of first_step and later
    ones. (SummaryWriter writes by a thread, which loses what it still holds when it is killed, and tells no one of a full
    disk.) Does nothing without a folder."""

    def __init__(self, folder, first_step):
        self.folder, self.writer = (
            folder,
            folder and EventsWriter(str(folder / 'events'), f'.{os.getpid()}'),
        )
        self.flushed = time.time()
        self.write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, **content):
        if self.writer:
            with writing(f'the events of {self.folder}'):
                self.writer.write_event(Event(wall_time=time.time(), **content))

    def add(self, step, values):
        self.write(
            step=step,
            summary=Summary(
                value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
            ),
        )
        if time.time() > self.flushed + 30:
            self.flush()

    def flush(self):
        """On the disk, before a checkpoint says that these steps are done"""
        if self.writer:
            with writing(f'the events of {self.folder}'):
                self.writer.flush()
        self.flushed = time.time()


class Log(Scalars):
    """What the main process shows of a training of a score, in units, on items: scalars and, as a context, a progress bar"""

    def __init__(self, run, folder, score, unit, items):
        super().__init__(folder if run.process.rank == 0 else None, run.step + 1)
        self.run, self.score, self.unit, self.items = run, score, unit, items

    def __enter__(self):
        run = self.run
        if self.writer:
            print(
                f'{sum(p.numel() for p in run.model.parameters()):,} parameters, step {run.step:,} of at most {run.n_steps:,}'
            )
            if run.n_steps * (1 - run.config.ema_decay) < 3:
                print(
                    'note: after so few steps the averaged weights, which are scored, are mostly the first: lower --ema_decay'
                )
        self.begin, self.first = time.perf_counter(), run.step
        self.bar = progress(
            total=run.n_steps, initial=run.step, disable=not self.writer, unit='step'
        )
        return self

    def __exit__(self, *error):
        self.bar.close()

    def step(self, loss, norm, every):
        """After each step of the optimizer; loss and gradient norm are shown every so many steps"""
        run = self.run
        self.bar.update()
        if run.step % every == 0 and not run.skips_in_a_row:
            speed = (
                (run.step - self.first)
                * run.config.batch_size
                * run.process.world_size
                / (time.perf_counter() - self.begin)
            )
            validation = f' (validation: {run.validation_loss:.3f})' if run.best < math.inf else ''
            self.bar.set_postfix_str(
                f'{loss:.3f} {self.unit}{validation}, {speed:.0f} {self.items}/s', refresh=False
            )
            self.add(
                run.step,
                {
                    f'{self.score}/train': loss.item(),
                    'gradient_norm': norm.item(),
                    'lr': run.optimizer.param_groups[0]['lr'],
                    f'{self.items}_per_s': speed,
                    'steps_skipped': run.n_skipped,
                },
            )

    def validated(self):
        self.add(self.run.step, {f'{self.score}/validation': self.run.validation_loss})

    def stopped(self, signals, script, newest):
        """Says, after a signal, how to go on"""
        if self.writer:
            print(
                f'stopped after step {self.run.step} by {signals[0] if signals else "a signal to another process"}; to go on: '
                f'python {script}.py --train --restore_file={newest}'
            )


def require_finite(run, is_validated, max_skips, newest):
    """UserError where a training diverged: too many steps in a row were skipped, or the validation score is not finite"""
    if run.skips_in_a_row > max_skips or is_validated and not math.isfinite(run.validation_loss):
        raise UserError(
            f'training diverged: at step {run.step}, learning rate {run.optimizer.param_groups[0]["lr"]:g}, the '
            f'loss, its gradients or the validation score are not finite ({run.skips_in_a_row} steps skipped in '
            f'a row); start again with a lower --lr; the last checkpoint is {newest}'
        )


@contextlib.contextmanager
def optional(what):
    """For what is not worth a training: a UserError or a singular matrix in it is printed, and that is all"""
    try:
        yield
    except (UserError, torch.linalg.LinAlgError) as error:
        tqdm.write(f'no {what}: {error}')


def own_device(local_rank, n_here):
    """-> this process's GPU, of n_here processes on this machine, or the CPU"""
    if not torch.cuda.is_available():
        return torch.device('cpu')
    if n_here > (n_gpus := torch.cuda.device_count()):
        raise UserError(f'{n_here} processes on a machine of {n_gpus} GPUs: lower --nproc_per_node')
    torch.cuda.set_device(local_rank)
    return torch.device('cuda', local_rank)


def save_tensors(path, content):
    """torch.save, atomically; UserError where there is no room for it"""

    def write(temporary):
        try:
            with open(temporary, 'wb') as file:
                torch.save(content, file)
        except RuntimeError as error:  # torch's own, of its zip file, hides the system's
            raise error.__context__ if isinstance(error.__context__, OSError) else error

    write_atomically(path, write)


def save_run(run, log, script, fields, parts, path):
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


def restore_run(run, saved, fields, parts):
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
                if opcode.name in ('GLOBAL', 'PROTO') and name not in NAMED:
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


def cached_tensor(path, shape, make):
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


def matches(value, form):
    """Whether a value is of the type that form is or, form being a dict or a list of one, holds what matches that"""
    if isinstance(form, dict):
        return (
            type(value) is dict
            and value.keys() == form.keys()
            and all(matches(value[key], form[key]) for key in form)
        )
    if isinstance(form, list):
        return type(value) is list and all(matches(item, form[0]) for item in value)
    return (
        isinstance(value, form)
        if form is dict
        else type(value) is form and (form is not int or 0 <= value < LARGEST)
    )


@contextlib.contextmanager
def at_most(n_values):
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


def load_adam(parameters, saved):
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
        if not matches(saved, form):
            raise ValueError('parts are missing, unknown or of another type')
        config, dims = Config(**saved['config']), saved['input_dims']
        if (
            len(dims) != n_dims
            or not all(type(n) is int and 0 < n < 2**16 for n in dims)
            or math.prod(dims) >= 2**24
        ):
            raise ValueError(f'its input_dims are {dims}')
        with torch.device('meta'), at_most(sum(value.numel() for value in saved['model'].values())):
            average = build(config, dims)
        average.module.load_state_dict(saved['model'], assign=True)
        average.load_state_dict(saved['average'], assign=True)
        states = load_adam(average.module.parameters(), saved['optimizer'])
        if not all(
            value.isfinite().all()
            for part in (saved['model'], saved['average'], *states)
            for value in part.values()
        ):
            raise ValueError('its weights are not finite')
        return {**saved, 'config': config, 'path': Path(path)}
    except Exception as error:  # likewise
        raise UserError(
            f'{path} is a checkpoint of another version of {script}, or damaged: {reason(error)}'
        ) from None


@contextlib.contextmanager
def errors_in_one_line(name):
    """Ends the program with exit code 2 and one line on stderr, printed only once per machine where all its processes have
    the error in common."""
    try:
        yield
        return
    except (UserError, OSError, torch.linalg.LinAlgError) as error:
        common, message = isinstance(error, UserError), str(error)
    except torch.cuda.OutOfMemoryError:
        common, message = (
            False,
            'out of GPU memory: lower --batch_size or the model, or add --checkpoint_grads',
        )
    except (RuntimeError, ValueError) as error:
        if 'WORLD_SIZE' not in os.environ or not re.search(
            'gloo|nccl|connect|clients|rendezvous', str(error), re.IGNORECASE
        ):
            raise
        process = f'process {os.environ.get("RANK", 0)} on {socket.gethostname()}'
        common, message = (
            False,
            f'{process} stops, having lost another one or found none: {reason(error)}',
        )
    except KeyboardInterrupt:
        common, message = True, 'interrupted'
    if not common or int(os.environ.get('LOCAL_RANK', 0)) == 0:
        print(f'{name}.py: error: {message}', file=sys.stderr)
    sys.exit(2)
