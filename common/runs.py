"""Runs."""

import contextlib
import math
import signal
import time
from dataclasses import asdict
from pathlib import Path

import torch

from .errors import UserError
from .files import file_lock, make_new_folder


@contextlib.contextmanager
def lock_run_folder(folder, is_new):
    """-> the folder, or a new one of a name like it, held against other trainings until the end"""
    folder = make_new_folder(folder) if is_new else folder
    with file_lock(folder / '.lock', f'another process trains in {folder}', wait=False):
        for kind in ('pt', 'png', 'json'):
            for stale in folder.glob(
                f'.*.{kind}.[0-9]*'
            ):  # of a process that was killed while it wrote
                if stale.suffix[1:].isdigit():
                    stale.unlink()
        yield folder


@contextlib.contextmanager
def catch_stop_signals():
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
def open_run_folder(script, config, request, process, saved, load):
    """-> the folder of the run, a new one or its checkpoint's, the same for all processes"""
    name = f'{script}_{Path(config.dataset).stem}_{time.strftime("%Y-%m-%d_%H-%M-%S")}'
    folder = saved['path'].parent if saved else Path(request.output_dir) / name
    with (
        lock_run_folder(folder, saved is None)
        if process.rank == 0
        else contextlib.nullcontext() as folder
    ):
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


def stop_if_diverged(run, is_validated, max_skips, newest):
    """UserError where a training diverged: too many steps in a row were skipped, or the validation score is not finite"""
    if run.skips_in_a_row > max_skips or is_validated and not math.isfinite(run.validation_loss):
        raise UserError(
            f'training diverged: at step {run.step}, learning rate {run.optimizer.param_groups[0]["lr"]:g}, the '
            f'loss, its gradients or the validation score are not finite ({run.skips_in_a_row} steps skipped in '
            f'a row); start again with a lower --lr; the last checkpoint is {newest}'
        )


def local_device(local_rank, n_here):
    """-> this process's GPU, of n_here processes on this machine, or the CPU"""
    if not torch.cuda.is_available():
        return torch.device('cpu')
    if n_here > (n_gpus := torch.cuda.device_count()):
        raise UserError(f'{n_here} processes on a machine of {n_gpus} GPUs: lower --nproc_per_node')
    torch.cuda.set_device(local_rank)
    return torch.device('cuda', local_rank)
