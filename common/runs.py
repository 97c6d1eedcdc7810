"""Runs: their folders, which checkpoint they start from, what their processes agree on, signals."""

import contextlib
import math
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .errors import UserError, is_lost_connection
from .files import file_lock, make_new_folder, name_part
from .interfaces import LoadCheckpoint, Process, Training
from .options import Options, RunRequest, as_typed

LAST, BEST = 'checkpoint.pt', 'best.pt'
# The folder of a run is called SCRIPT_DATASET_TIME, with -2, -3 ... where there is one already
TIME = '%Y-%m-%d_%H-%M-%S'
TIME_AND_NUMBER = r'\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(-\d+)?'


def require_launcher(script: str) -> None:
    """Raise ``UserError`` where srun has started processes that know nothing of each other."""
    n_tasks = os.environ.get('SLURM_NTASKS', '1')
    n_tasks = os.environ.get('SLURM_STEP_NUM_TASKS', n_tasks)  # of srun, not of the whole job
    if 'RANK' in os.environ or n_tasks == '1':
        return
    raise UserError(
        f'SLURM has {n_tasks} tasks here, but no launcher joins them: type '
        'srun --ntasks-per-node=1 torchrun --nnodes=... --nproc_per_node=... '
        f'--rdzv_backend=c10d --rdzv_endpoint=HOST:29500 {script} ..., or, for one process in a '
        'batch script, unset SLURM_NTASKS first'
    )


def local_device(name: str, local_rank: int, n_processes: int, store: Any) -> torch.device:
    """Return the GPU of this process, of ``n_processes`` on this machine, or the CPU.

    ``name`` is the value of ``--device``. Each process may see all GPUs or one of its own. It
    enters its GPU in the launcher's ``store``, so that two processes on one GPU are found out.
    """
    has_gpu = torch.cuda.is_available()
    if name == 'cuda' and not has_gpu:
        raise UserError('--device=cuda: torch finds no GPU; leave the option out, or use cpu')
    if name == 'cpu' or not has_gpu:
        return torch.device('cpu')

    n_gpus = torch.cuda.device_count()
    device = torch.device('cuda', local_rank % n_gpus)
    torch.cuda.set_device(device)
    if n_processes > n_gpus and not has_own_gpu(device, local_rank, n_processes, store):
        raise UserError(
            f'{n_processes} processes on a machine of {n_gpus} GPUs: lower --nproc_per_node'
        )
    return device


def has_own_gpu(device: torch.device, local_rank: int, n_processes: int, store: Any) -> bool:
    """Return whether each process of this machine has a GPU of its own, by the GPUs' UUIDs."""
    uuid = getattr(torch.cuda.get_device_properties(device), 'uuid', None)
    if uuid is None:  # before torch 2.5
        return False
    prefix = f'GPU on {socket.gethostname()} of local rank'
    store.set(f'{prefix} {local_rank}', str(uuid))
    uuids = {store.get(f'{prefix} {other}') for other in range(n_processes)}
    return len(uuids) == n_processes


def require_agreement(process: Process, **values: Any) -> None:
    """Raise ``UserError`` that names the values that are not the same on all processes."""
    of_each_process = process.gather(values)
    names = sorted(set().union(*of_each_process))
    different = []
    for name in names:
        if len({repr(values.get(name)) for values in of_each_process}) > 1:
            different.append(name)
    if different:
        raise UserError(f'the processes start from different {" and ".join(different)}')


# ------------------------------------------------------------------------- which checkpoint to use


def load_selected_checkpoint(
    script: str,
    mode: str,
    request: RunRequest,
    process: Process,
    load: LoadCheckpoint,
    format_score: Callable[[Any, float], str],
    dataset: str | None,
) -> dict[str, Any] | None:
    """Load the checkpoint that ``select_checkpoint`` chooses, and print which one it is.

    ``format_score`` returns a loss as the text of a score, given the config and the loss. Returns
    None where a training starts from nothing.
    """

    def select_and_load() -> dict[str, Any] | None:
        restarted_from = None
        if process.store and process.store.check([script]):
            restarted_from = Path(process.store.get(script).decode())
        path = select_checkpoint(script, request, mode, restarted_from, dataset)
        return load(path) if path else None

    saved = load_on_rank_0(process, select_and_load, to_train=mode == 'train')
    if saved and process.rank == 0:
        score = 'not validated yet'
        if saved['best'] < math.inf:
            score = f'validation {format_score(saved["config"], saved["validation_loss"])}'
        print(f'restored {saved["path"]}: step {saved["step"]}, {score}')
        if mode == 'train' and saved['world_size'] != process.world_size:
            print(
                f'note: {saved["world_size"]} processes before, {process.world_size} now: each '
                'step takes more or fewer at once, and the number of epochs stays the same'
            )
    return saved


def load_on_rank_0(
    process: Process, load: Callable[[], dict[str, Any] | None], to_train: bool = False
) -> dict[str, Any] | None:
    """Return, on every process, the content of a checkpoint that rank 0 loads, or None.

    The file may lie on the disk of rank 0 alone. Unless it is ``to_train`` on, only what evaluation
    needs is sent. Raises ``UserError`` on every process where rank 0 cannot load it.
    """
    saved, error = None, None
    if process.rank == 0:
        try:
            saved = load()
        except UserError as caught:
            error = caught
    error = process.share(error)
    if error:
        raise error

    names = list(saved) if saved else []
    if not to_train:
        names = [name for name in names if name not in ('model', 'optimizer')]
    # entry by entry, as each takes several times its size while it is sent
    content = {name: process.share(saved and saved[name]) for name in process.share(names)}
    return content or None


def select_checkpoint(
    script: str,
    request: RunRequest,
    mode: str,
    restarted_from: Path | None = None,
    dataset: str | None = None,
) -> Path | None:
    """Choose the checkpoint to start from. Raises ``UserError`` where there is none to use.

    A run that torchrun restarts goes on from the last checkpoint of its folder,
    ``restarted_from``, if it has saved one. Otherwise ``--restore_file`` decides. Without it,
    training starts from nothing (None) or, with ``--resume``, from the newest run's last
    checkpoint; all other modes take the newest run's best one. Where a data set is given, the
    newest run is that of the data set.
    """
    if restarted_from and (restarted_from / LAST).exists():
        return restarted_from / LAST
    if request.restore_file:
        return Path(request.restore_file)
    if mode == 'train' and not request.resume:
        return None

    newest = newest_run(script, Path(request.output_dir), dataset)
    if mode == 'train':
        return newest / LAST if newest else None
    if newest is None:
        of_dataset = f' for {Path(dataset).stem}' if dataset else ''
        option = f' --dataset={dataset}' if dataset else ''
        raise UserError(
            f'no checkpoint of {script}.py{of_dataset} under {request.output_dir}: train first '
            f'(python {script}.py --train{option}), or give --restore_file or --output_dir'
        )
    best = newest / BEST
    return best if best.exists() else newest / LAST


def newest_run(script: str, output_dir: Path, dataset: str | None) -> Path | None:
    """Return the folder that has saved last of those in ``output_dir``, or None.

    Where a data set is given, only folders that are named after it count.
    """
    found = list(output_dir.glob(f'{script}_*/{LAST}'))
    if dataset:
        name = re.escape(run_name(script, dataset)) + TIME_AND_NUMBER
        found = [path for path in found if re.fullmatch(name, path.parent.name)]
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return newest.parent if newest else None


def run_name(script: str, dataset: str) -> str:
    """Return the name of a run's folder without its time."""
    return f'{script}_{name_part(Path(dataset).stem)}_'


def require_newest(saved: dict[str, Any] | None, load: LoadCheckpoint) -> None:
    """Refuse to train on from a checkpoint that is older than the newest one in its folder."""
    if saved is None:
        return
    newest = saved['path'].with_name(LAST)
    if newest.exists() and load(newest)['step'] > saved['step']:
        raise UserError(
            f'{newest} is at a later step than {saved["path"]}, and would be overwritten: go on '
            f'from it, or copy {saved["path"].name} to a folder of its own'
        )


# ---------------------------------------------------------------------------------- folders of runs


@contextlib.contextmanager
def open_run_folder(
    script: str,
    config: Options,
    request: RunRequest,
    process: Process,
    saved: dict[str, Any] | None,
    load: LoadCheckpoint,
) -> Iterator[Path]:
    """Yield the folder of a run, the same for all processes: a new one, or its checkpoint's."""
    dataset: str = config.dataset  # type: ignore[attr-defined]
    name = run_name(script, dataset) + time.strftime(TIME)
    folder = saved['path'].parent if saved else Path(request.output_dir) / name

    with contextlib.ExitStack() as stack:
        if process.rank == 0:
            folder = stack.enter_context(lock_run_folder(folder, is_new=saved is None))
        folder = process.gather(folder)[0]
        if process.rank == 0:
            require_newest(saved, load)
            if process.store:
                process.store.set(script, str(folder))
            settings = [f'{key}={as_typed(value)}' for key, value in asdict(config).items()]
            print(f'{folder}: {" ".join(settings)}')
        yield folder


@contextlib.contextmanager
def lock_run_folder(folder: Path, is_new: bool) -> Iterator[Path]:
    """Lock the folder of a run against other trainings.

    With ``is_new`` it is made first, under the next free name. Temporary files that a killed
    process has left in it are removed.
    """
    if is_new:
        folder = make_new_folder(folder)
    with file_lock(folder / '.lock', f'another process trains in {folder}', wait=False):
        for suffix in ('pt', 'png', 'json'):
            for path in folder.glob(f'.*.{suffix}.[0-9]*'):
                if path.suffix[1:].isdigit():
                    path.unlink()
        yield folder


# ---------------------------------------------------------------------------- how a training ends


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[list[str]]:
    """Collect the names of SIGTERM, SIGINT and SIGHUP in a list instead of ending the process.

    The training looks at the list between steps, so that a step is finished and saved. SIGHUP
    comes when the terminal is closed. Where it is ignored, as under nohup, it stays so. After the
    loss of another process, SIGTERM no longer ends this one, so that it can say what it has lost.
    """
    caught: list[str] = []

    def remember(number: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(number).name)

    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    handlers = {}
    for number in numbers:
        handlers[number] = signal.signal(number, remember)
    try:
        yield caught
    except Exception as error:
        if is_lost_connection(error):
            # the launcher sends it now that one process has ended, and this one is yet to report
            del handlers[signal.SIGTERM]
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class StopQuestion:
    """The question whether a training is to stop, asked before each step.

    It stops when any process has caught a signal. To find out, the processes wait for each other:
    every ``max_steps`` steps, or as many as take ``SECONDS``, whichever are fewer.

    Arguments:
        process: this process.
        signals: the list of signals that it has caught.
        max_steps: the largest number of steps between two answers.
    """

    SECONDS = 2.0
    TIMED_STEPS = range(5, 10)  # after those in which kernels are chosen or compiled

    def __init__(self, process: Process, signals: list[str], max_steps: int) -> None:
        self.process, self.signals, self.max_steps = process, signals, max_steps
        self.n_asked, self.n_between = 0, 1

    def is_wanted(self) -> bool:
        """Return whether the training is to stop, the same on all processes."""
        if self.process.world_size == 1:
            return bool(self.signals)

        self.n_asked += 1
        if self.n_asked == self.TIMED_STEPS.start:
            self.start = time.monotonic()
        if self.n_asked == self.TIMED_STEPS.stop:
            seconds = (time.monotonic() - self.start) / len(self.TIMED_STEPS)
            fitting = int(self.SECONDS / seconds)
            self.n_between = self.process.share(max(1, min(self.max_steps, fitting)))
        return self.n_asked % self.n_between == 0 and self.process.any(self.signals)


def print_how_to_go_on(run: Training, script: str, signals: list[str], checkpoint: Path) -> None:
    """Print, on rank 0, which signal has ended a training and the command that continues it."""
    if run.process.rank == 0:
        signal_name = signals[0] if signals else 'a signal to another process'
        command = f'{launcher()} {script}.py --train --restore_file={checkpoint}'
        print(f'stopped after step {run.step} by {signal_name}; to go on: {command}')


def print_if_over(run: Training) -> None:
    """Print, on rank 0, if a training has no steps left, and how to add some."""
    if run.process.rank == 0 and run.n_seen >= run.n_to_see:
        options = ['n_epochs', 'early_stop']
        names = ' or '.join(f'--{name}' for name in options if hasattr(run.config, name))
        print(f'step {run.step} was the last one of this training: to go on, add a larger {names}')


def launcher() -> str:
    """Return the command that started this process, up to the script: python or torchrun."""
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        return 'python'
    words = ['torchrun']
    n_nodes = os.environ.get('GROUP_WORLD_SIZE', '1')
    if n_nodes != '1':
        words.append(f'--nnodes={n_nodes}')
    words.append(f'--nproc_per_node={os.environ.get("LOCAL_WORLD_SIZE", "1")}')
    return ' '.join(words)


def is_validation_due(run: Training) -> bool:
    """Return whether the last step has ended the rows between two validations, or the training."""
    n_rows = run.n_seen % run.n_per_validation
    return n_rows < run.n_per_step or run.n_seen >= run.n_to_see


def stop_if_diverged(run: Training, is_validated: bool, max_skips: int, checkpoint: Path) -> None:
    """Raise ``UserError`` where a training has diverged.

    It has when more than ``max_skips`` steps in a row were skipped, or when the validation score
    is not finite.
    """
    has_bad_score = is_validated and not math.isfinite(run.validation_loss)
    n_skips = int(run.skips_in_a_row)
    if n_skips <= max_skips and not has_bad_score:
        return
    raise UserError(
        f'training diverged: at step {run.step}, learning rate '
        f'{run.optimizer.param_groups[0]["lr"]:g}, the loss, its gradients or the validation score '
        f'are not finite ({n_skips} steps skipped in a row); start again with a lower '
        f'--lr; the last checkpoint is {checkpoint}'
    )
