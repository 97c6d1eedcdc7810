"""Learning curves of runs, against steps and against time, from their TensorBoard events.

    python benchmarks/curves.py results/RUN "wider=results/RUN" ... --out=curves.png

A run is called by the name before its =, else by its folder without the date.
"""

import argparse
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tensorboardX.proto.event_pb2 import Event

# common/ is in the folder above this one.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.errors import UserError

# The tag of an objective: its name on the axis, and the sign with which it is drawn.
OBJECTIVES = {
    'bits_per_dim': ('bits/dim', 1),
    'log_likelihood': ('log-likelihood in nats', 1),
    'loss': ('log-likelihood in nats', -1),  # of older runs
    'kl': ('KL divergence in nats', 1),
}
N_MEDIANS = 60  # of training, which is noisy: one for each of so many equal parts of a run
TIMESTAMP = r'_\d+-\d+-\d+_\d+-\d+-\d+'


def read_events(path: Path) -> Iterator[Event]:
    """Yield the events of a file, up to a record that was not written to its end.

    A record is the length of its content (8 bytes), a checksum of that (4), the content, and its
    checksum (4). Raises ``UserError`` where the content is no event.
    """
    data = path.read_bytes()
    start = 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from('<Q', data, start)
        end = start + 12 + length + 4
        if end > len(data):
            return
        try:
            yield Event.FromString(data[start + 12 : end - 4])
        except DecodeError as error:
            raise UserError(f'{path} is damaged: it holds no events at byte {start}') from error
        start = end


def read_scalars(folder: Path) -> dict[str, np.ndarray]:
    """Return for each tag an array (3, N): steps, minutes and values.

    Minutes are of training. Pauses between the event files of a run that was resumed do not
    count, and a step that was repeated then counts once.
    """
    points = {}  # {tag: {step: (minutes, value)}}
    minutes_before = 0.0
    for path in sorted(folder.glob('events.out.tfevents.*')):
        minutes = minutes_before
        start = None
        for event in read_events(path):
            start = event.wall_time if start is None else start
            minutes = minutes_before + (event.wall_time - start) / 60
            for value in event.summary.value:
                points.setdefault(value.tag, {})[event.step] = (minutes, value.simple_value)
        minutes_before = minutes

    scalars = {}
    for tag, by_step in points.items():
        rows = [(step, *by_step[step]) for step in sorted(by_step)]
        scalars[tag] = np.array(rows).T
    return scalars


def read_curves(folder: Path) -> tuple[str, np.ndarray, np.ndarray]:
    """Return the objective's name, and its values in training and in validation, (3, N) each.

    Raises ``UserError`` where the folder holds none.
    """
    scalars = read_scalars(folder)
    for objective, (label, sign) in OBJECTIVES.items():
        if f'{objective}/train' not in scalars:
            continue
        train = medians(scalars[f'{objective}/train'])
        validation = scalars.get(f'{objective}/validation', np.zeros((3, 0)))
        signs = np.array([[1], [1], [sign]])
        return label, signs * train, signs * validation
    raise UserError(f'{folder} holds no events of a training')


def medians(points: np.ndarray) -> np.ndarray:
    """Return the medians (3, M) of equal parts of points (3, N)."""
    parts = np.array_split(points, min(N_MEDIANS, points.shape[1]), axis=1)
    return np.array([np.median(part, axis=1) for part in parts]).T


def draw_curves(runs: dict[str, Path]) -> Figure:
    """Draw training and validation of runs, given as ``{name: folder}``."""
    figure = Figure((10, 3.6), layout='constrained')
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    relevant = []
    for k, (name, folder) in enumerate(runs.items()):
        label, train, validation = read_curves(folder)
        color = f'C{k}'
        marked = color + '.-' if validation.shape[1] < 50 else color
        for axes, x in ((by_step, 0), (by_time, 1)):
            axes.plot(train[x], train[2], color, alpha=0.5, label=f'{name}, training')
            axes.plot(validation[x], validation[2], marked, label=f'{name}, validation')

        # The first values are far from all others, and would flatten the curves.
        n_first = validation.shape[1] // 20
        relevant += train[2, 3:].tolist()
        relevant += validation[2, n_first:].tolist()

    set_limits(by_step, relevant)
    by_step.set(xlabel='step', ylabel=label)
    by_time.set(xlabel='minutes')
    by_step.grid(alpha=0.3)
    by_time.grid(alpha=0.3)
    by_time.legend(fontsize=8)
    return figure


def set_limits(axes: Axes, values: list[float]) -> None:
    """Let the vertical axis span the finite values, with a margin."""
    values = [value for value in values if np.isfinite(value)]
    if len(set(values)) > 1:
        low, high = min(values), max(values)
        margin = 0.1 * (high - low)
        axes.set_ylim(low - margin, high + margin)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'runs', nargs='+', metavar='[NAME=]RUN', help='folders of runs of one of the scripts'
    )
    parser.add_argument('--out', default='curves.png', metavar='FILE')
    args = parser.parse_args(argv)

    runs = {}
    for run in args.runs:
        name, _, folder = run.rpartition('=')
        folder = Path(folder)
        runs[name or re.sub(TIMESTAMP, '', folder.name)] = folder
    try:
        figure = draw_curves(runs)
    except UserError as error:
        print(f'curves.py: error: {error}', file=sys.stderr)
        sys.exit(2)
    figure.savefig(args.out, dpi=100)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
