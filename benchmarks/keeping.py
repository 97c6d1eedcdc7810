"""What stays of a run: a few small files, written while it goes on, that a person looks at."""

import contextlib
import io
import json
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

# The scripts are in the folder above this one.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from curves import draw_curves, read_curves
from recipes import RECIPES, Job
from results import UNITS, read_run, summarize

from common.errors import UserError, one_line
from common.files import write_atomically, write_json
from common.runs import BEST, LAST, newest_run

MAX_FILES, MAX_BYTES = 8, 15 * 2**20  # of a folder, and of each file in it
MAX_PARTS = 3  # into which weights may be cut
LOG_BYTES = 2**20  # of each name's log
FIELDS = ('two_standard_errors', 'effective_sample_size')


@dataclass
class Keeper:
    """Keeps the files of all names in the folder ``out``.

    Attributes:
        work: where the runs and the logs are, in a folder for each name.
        n_parts: into how many files the weights of a name may be cut.
        machine: what the names are trained on.
    """

    out: Path
    work: Path
    n_parts: int
    machine: str
    lock: Any = field(default_factory=threading.Lock)  # matplotlib and the files take one at a time
    kept: dict[tuple[Path, int], str] = field(default_factory=dict)  # of each checkpoint and time

    def keep(self, job: Job, plan: dict[str, Any], stage: str) -> dict[str, Any]:
        """Bring the files of a name up to date; return its entry in results.json."""
        folder = run_folder(job)
        recipe = RECIPES[job.name]
        entry = {
            'stage': stage,
            'recipe': recipe.row or recipe.command,
            'recipe_epochs': job.config.n_epochs,
            'machine': self.machine,
            **plan,
        }
        with self.lock:
            if folder:
                entry |= read_progress(job, folder)
                draw_picture(job.name, folder, self.out / f'{job.name}.png')
                entry['weights'] = self.keep_weights(folder / BEST, job.name)
            self.enter(job.name, entry)
            if folder and stage == 'done':
                entry['row'] = summarize(read_run(folder), recipe.row, self.machine)
                self.enter(job.name, entry)
        return entry

    def keep_weights(self, best: Path, name: str) -> str:
        """Keep the best weights if they are new; say what is kept of them."""
        if not best.exists():
            return 'none yet'
        version = best, best.stat().st_mtime_ns
        if version not in self.kept:
            self.kept[version] = write_weights(best, self.out, name, self.n_parts)
        return self.kept[version]

    def enter(self, name: str, entry: dict[str, Any]) -> None:
        """Enter a name in results.json, and put the ends of all logs into log.txt."""
        entries = read_results(self.out)
        entries[name] = entry
        write_json(self.out / 'results.json', entries)

        logs = []
        for other in entries:
            log = self.work / other / 'log.txt'
            if log.exists():
                text = log.read_text(errors='replace').replace('\r', '\n')
                logs.append(f'==== {other}\n{text[-LOG_BYTES:]}\n')
        write_atomically(self.out / 'log.txt', lambda path: path.write_text('\n'.join(logs)))


def run_folder(job: Job) -> Path | None:
    """Return the folder of a name's run that has saved a checkpoint, if there is one."""
    return newest_run(job.script.NAME, Path(job.folder), None)


def is_evaluated(folder: Path) -> bool:
    """Return whether there is a score of the checkpoint that is best or, without one, last."""
    checkpoint = folder / BEST if (folder / BEST).exists() else folder / LAST
    scores = folder / 'results.json'
    return scores.exists() and scores.stat().st_mtime >= checkpoint.stat().st_mtime


def read_results(out: Path) -> dict[str, dict]:
    """Return the entries of results.json. Raises ``UserError`` where it is damaged."""
    file = out / 'results.json'
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f'{file} cannot be read: {one_line(error)}') from error


def read_progress(job: Job, folder: Path) -> dict[str, Any]:
    """Return what a run has reached: its step, curves and, once evaluated, its score."""
    entry: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # there are no events yet
        entry['objective'], train, validation = read_curves(folder)
        for name, points in (('train', train), ('validation', validation)):
            entry[name] = [[float(f'{value:.6g}') for value in axis] for axis in points]
        entry['step'] = int(max(*train[0], *validation[0]))
    if is_evaluated(folder):
        scores = json.loads((folder / 'results.json').read_text())
        key = next(key for key in UNITS if key in scores)
        entry |= {'score': scores[key], 'unit': UNITS[key]}
        entry |= {name: scores.get(name) for name in FIELDS}
    return entry


def draw_picture(name: str, folder: Path, path: Path) -> None:
    """Write one picture of a run: its curves, the newest samples, and what was visualized."""
    files = sorted(folder.glob('generated_*.png')) or sorted(folder.glob('samples_at_*.png'))[-1:]
    files += [*folder.glob('manipulated_*.png'), *folder.glob('visualization.png')]
    pictures = [Image.open(file).convert('RGB') for file in files]
    with contextlib.suppress(UserError):  # there are no events yet
        content = io.BytesIO()
        draw_curves({name: folder}).savefig(content, dpi=100, format='png')
        pictures.insert(0, Image.open(content).convert('RGB'))
    if not pictures:
        return

    width = max(picture.width for picture in pictures)
    whole = Image.new('RGB', (width, sum(picture.height for picture in pictures)), 'white')
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    write_atomically(path, lambda temporary: whole.save(temporary, 'png'))


# ------------------------------------------------------------------------------------------ weights


def write_weights(best: Path, out: Path, name: str, n_parts: int) -> str:
    """Write as much of a checkpoint as fits into ``n_parts`` files; say what was written.

    Where the checkpoint is too large, it is what a model is restored from: the averaged weights, in
    float32 or in float16. A file that is cut ends in .1, .2, ...
    """
    size = best.stat().st_size
    content, text = reduced_checkpoint(best, n_parts * MAX_BYTES)
    pieces = [content[k : k + MAX_BYTES] for k in range(0, len(content), MAX_BYTES)]
    targets = [out / f'{name}.pt']
    if len(pieces) > 1:
        targets = [out / f'{name}.pt.{k + 1}' for k in range(len(pieces))]

    for old in weight_files(out, name):
        if old not in targets[: len(pieces)]:
            old.unlink()
    for target, piece in zip(targets, pieces):
        write_atomically(target, lambda path, piece=piece: path.write_bytes(piece))
    whole = f'{text} of {size / 2**20:.1f} MiB'
    return f'{whole}, cut into {len(pieces)} files' if len(pieces) > 1 else whole


def reduced_checkpoint(best: Path, room: int) -> tuple[bytes, str]:
    """Return as much of a checkpoint as fits into ``room`` bytes, or none; and what it is."""
    size = best.stat().st_size
    if size <= room:
        return best.read_bytes(), 'all'
    if size > 10 * room:  # the averaged weights in float16 are a tenth of it, or more
        return b'', 'nothing'

    saved = torch.load(best, map_location='cpu', weights_only=True)
    for part in ('model', 'optimizer', 'scheduler'):
        saved.pop(part, None)
    content, text = to_bytes(saved), 'the averaged weights in float32'
    if len(content) > room:
        for key, value in saved['average'].items():
            if value.dtype == torch.float32:
                saved['average'][key] = value.half()
        content, text = to_bytes(saved), 'the averaged weights in float16'
    return (content, text) if len(content) <= room else (b'', 'nothing')


def to_bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def weight_files(out: Path, name: str) -> list[Path]:
    """Return the files that ``write_weights`` has written."""
    numbered = [out / f'{name}.pt.{k + 1}' for k in range(MAX_PARTS)]
    return [path for path in (out / f'{name}.pt', *numbered) if path.exists()]
