"""Learning curves of runs, against steps and against time, from the tensorboard events in their folders.

    python benchmarks/curves.py results/RUN [results/RUN ...] --out=curves.png
"""
import argparse
import struct
import sys
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from matplotlib.figure import Figure
from tensorboardX.proto.event_pb2 import Event

OBJECTIVES = {'bits_per_dim': ('bits/dim', 1), 'loss': ('log-likelihood in nats', -1)}     # its name, and its sign here


def read_events(path):
    """-> the events of a file: records of a length, its checksum, as many bytes, and theirs; a torn one ends it"""
    content, start = path.read_bytes(), 0
    while start + 12 <= len(content):
        length, = struct.unpack_from('<Q', content, start)
        if start + length + 16 > len(content):
            return
        try:
            yield Event.FromString(content[start + 12:start + 12 + length])
        except DecodeError:
            sys.exit(f'{path} is damaged: it holds no events at byte {start}')
        start += length + 16


def read_scalars(folder):
    """-> {tag: (steps, minutes, values)}. Minutes are of training: pauses between the events files of resumed runs are
    left out, and so is what a resumed run did again."""
    points, minutes = {}, 0.
    for path in sorted(folder.glob('events.out.tfevents.*')):
        events = list(read_events(path))
        for event in events:
            for value in event.summary.value:
                at = minutes + (event.wall_time - events[0].wall_time) / 60
                points.setdefault(value.tag, {})[event.step] = at, value.simple_value
        minutes += (events[-1].wall_time - events[0].wall_time) / 60 if events else 0
    return {tag: np.array([(step, *p) for step, p in sorted(by_step.items())]).T for tag, by_step in points.items()}


def draw(folders):
    """-> matplotlib figure: training (the median of every twentieth part of the run) and validation of each run"""
    figure = Figure((11, 4), layout='constrained')
    for axes, x in zip(figure.subplots(1, 2, sharey=True), (0, 1)):
        for k, folder in enumerate(folders):
            scalars = read_scalars(folder)
            objective = next((name for name in OBJECTIVES if f'{name}/train' in scalars), None)
            if objective is None:
                sys.exit(f'{folder} holds no events of a training')
            label, sign = OBJECTIVES[objective]
            train = scalars[f'{objective}/train']
            parts = [part for part in np.array_split(train, min(60, train.shape[1]), axis=1)]
            medians = np.array([np.median(part, axis=1) for part in parts]).T
            axes.plot(medians[x], sign * medians[2], f'C{k}', label=f'{folder.name}: training')
            validation = scalars.get(f'{objective}/validation', np.zeros((3, 0)))
            axes.plot(validation[x], sign * validation[2], f'C{k}o', label=f'{folder.name}: validation')
            shown = sign * np.concatenate([medians[2, 3:], validation[2]])
            if np.isfinite(shown).any():
                low, high = np.quantile(shown[np.isfinite(shown)], (0, 1))
                axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
        axes.set(xlabel=('step', 'minutes')[x], ylabel=(label, None)[x])
        axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, help='folders of runs of one of the scripts')
    parser.add_argument('--out', default='curves.png', metavar='FILE')
    args = parser.parse_args(argv)
    for run in args.runs:
        if not list(run.glob('events.out.tfevents.*')):
            sys.exit(f'{run} holds no events of a training')
    draw(args.runs).savefig(args.out, dpi=120)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
