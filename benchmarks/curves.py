"""Learning curves of runs, against steps and against time, from the tensorboard events in their folders.

    python benchmarks/curves.py results/RUN "wider=results/RUN" ... --out=curves.png

A run is called by the name before its =, else by its folder without the date.
"""

import argparse
import re
import struct
import sys
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from matplotlib.figure import Figure
from tensorboardX.proto.event_pb2 import Event

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.errors import UserError

OBJECTIVES = {
    'bits_per_dim': ('bits/dim', 1),
    'loss': ('log-likelihood in nats', -1),
}  # its name, and its sign here


def read_events(path):
    """-> the events of a file: records of a length, its checksum, as many bytes, and theirs; a torn one ends it"""
    content, start = path.read_bytes(), 0
    while start + 12 <= len(content):
        (length,) = struct.unpack_from('<Q', content, start)
        if start + length + 16 > len(content):
            return
        try:
            yield Event.FromString(content[start + 12 : start + 12 + length])
        except DecodeError:
            raise UserError(f'{path} is damaged: it holds no events at byte {start}') from None
        start += length + 16


def read_scalars(folder):
    """-> {tag: (steps, minutes, values)}. Minutes are of training: pauses between the events files of resumed runs are
    left out, and so is what a resumed run did again."""
    points, minutes = {}, 0.0
    for path in sorted(folder.glob('events.out.tfevents.*')):
        events = list(read_events(path))
        for event in events:
            for value in event.summary.value:
                at = minutes + (event.wall_time - events[0].wall_time) / 60
                points.setdefault(value.tag, {})[event.step] = at, value.simple_value
        minutes += (events[-1].wall_time - events[0].wall_time) / 60 if events else 0
    return {
        tag: np.array([(step, *p) for step, p in sorted(by_step.items())]).T
        for tag, by_step in points.items()
    }


def draw(runs):
    """{name: folder} -> matplotlib figure: medians of sixtieth parts of each run's training, and its validation"""
    figure, shown = Figure((10, 3.6), layout='constrained'), []
    left, right = figure.subplots(1, 2, sharey=True)
    for k, (name, folder) in enumerate(runs.items()):
        scalars = read_scalars(folder)
        objective = next((name for name in OBJECTIVES if f'{name}/train' in scalars), None)
        if objective is None:
            raise UserError(f'{folder} holds no events of a training')
        label, sign = OBJECTIVES[objective]
        train = scalars[f'{objective}/train']
        parts = np.array_split(train, min(60, train.shape[1]), axis=1)
        medians = np.array([np.median(part, axis=1) for part in parts]).T
        validation = scalars.get(f'{objective}/validation', np.zeros((3, 0)))
        line = f'C{k}' + '.-' * (validation.shape[1] < 50)
        for axes, x in ((left, 0), (right, 1)):
            axes.plot(medians[x], sign * medians[2], f'C{k}', alpha=0.5, label=f'{name}, training')
            axes.plot(validation[x], sign * validation[2], line, label=f'{name}, validation')
        shown += [
            *sign * medians[2, 3:],
            *sign * validation[2, len(validation[2]) // 20 :],
        ]  # not where it all began
    left.set(xlabel='step', ylabel=label)
    shown = [value for value in shown if np.isfinite(value)]
    if len(set(shown)) > 1:
        margin = 0.1 * (max(shown) - min(shown))
        left.set_ylim(min(shown) - margin, max(shown) + margin)
    right.set(xlabel='minutes')
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(fontsize=8)
    return figure


def main(argv=None):
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
        runs[name or re.sub(r'_\d+-\d+-\d+_\d+-\d+-\d+', '', Path(folder).name)] = Path(folder)
    try:
        figure = draw(runs)
    except UserError as error:
        print(f'curves.py: error: {error}', file=sys.stderr)
        sys.exit(2)
    figure.savefig(args.out, dpi=100)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
