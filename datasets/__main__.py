"""Lists, fetches, prepares and shows the data sets.

python -m datasets list                                what there is, and what of it lies in --data_dir
python -m datasets fetch mnist                         downloaded, verified and unpacked below --data_dir
python -m datasets fetch power --raw                   from the UCI repository, not from the MAF authors
python -m datasets fetch celeba --from FILE ...        from files that you have downloaded
python -m datasets prepare celeba                      builds the cache that training reads, ahead of it
python -m datasets show mnist                          a picture, and a row of numbers a split
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from common.errors import UserError

from .fetch import SOURCES, fetch, state
from .images import IMAGE_DATASETS, load_images
from .plots import draw_images, draw_panels, draw_table
from .tabular import SUFFIXES, load_table, read_numbers
from .toy import ENERGIES, SAMPLERS

N_DRAWN = 10_000  # rows of a two-dimensional density to be shown


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f'{message} (see python -m datasets --help)')


def pixels(text):
    if not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f'{text} is outside 1..1024')
    return int(text)


def parse_args(argv):
    parser = Parser(
        prog='python -m datasets',
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest='verb', required=True, parser_class=Parser)
    for verb, text in (
        ('list', 'all data sets, and which are there'),
        ('fetch', 'download, verify and unpack one'),
        ('prepare', 'build its cache'),
        ('show', 'draw it, and count'),
    ):
        sub = verbs.add_parser(verb, help=text, allow_abbrev=False)
        if verb != 'list':
            sub.add_argument(
                'name',
                metavar='NAME',
                help='as python -m datasets list shows it'
                + (f', or a table of your own ({" ".join(SUFFIXES)})' if verb != 'fetch' else ''),
            )
        sub.add_argument(
            '--data_dir', type=Path, default=Path('data'), metavar='DIR', help='(default: data)'
        )
        if verb == 'fetch':
            sub.add_argument(
                '--raw', action='store_true', help='of a table: as it is in the UCI repository'
            )
            sub.add_argument(
                '--from',
                dest='given',
                type=Path,
                nargs='+',
                default=[],
                metavar='FILE',
                help='downloaded by yourself',
            )
        if verb in ('prepare', 'show'):
            sub.add_argument('--image_size', type=pixels, metavar='N', help='pixels a side')
        if verb == 'show':
            sub.add_argument(
                '--output',
                type=Path,
                metavar='FILE',
                help='the picture (default: results/NAME.png)',
            )
    return parser.parse_args(argv)


def print_list(data_dir):
    header = 'name', 'kind', 'items', 'dimensions', 'download', 'from', 'license', f'in {data_dir}'
    rows = [
        (
            name,
            source.kind,
            source.items,
            source.dimensions,
            source.download,
            source.origin,
            source.license,
            state(name, data_dir),
        )
        for name, source in SOURCES.items()
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in (header, *rows):
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def fetch_one(name, data_dir, raw, given):
    found = fetch(name, data_dir, raw, given)
    print(
        f'{name} in {data_dir}: {found}'
        + (
            ''
            if found == 'verified'
            else ', but not by a published checksum: '
            f'python -m datasets prepare {name} --data_dir={data_dir} checks what it holds'
        )
    )
    print(f'license: {SOURCES[name].license}; to be cited as {SOURCES[name].citation}')


def load(name, data_dir, image_size):
    """-> ImageData or Rows"""
    if name in IMAGE_DATASETS:
        return load_images(name, data_dir, image_size)
    if image_size:
        raise UserError(
            f'--image_size is for images, and {name} is none of {", ".join(IMAGE_DATASETS)}'
        )
    return load_table(name, data_dir)


def prepare(name, data_dir, image_size):
    start = time.perf_counter()
    data = load(name, data_dir, image_size)
    seconds = time.perf_counter() - start
    images = name in IMAGE_DATASETS
    splits = [
        part.images if images else part
        for part in (data.train, data.validation, data.test)
        if part is not None
    ]
    n = sum(map(len, splits))
    print(
        f'{name}: {" / ".join(f"{len(part):,}" for part in splits)} {"images" if images else "rows"} of '
        f'{"x".join(map(str, splits[0].shape[1:]))} are ready, in {seconds:.1f} s ({n / seconds:,.0f} a second)'
    )


def show(name, data_dir, image_size, output):
    path = output or Path('results') / f'{Path(name).name}.png'
    if output and output.exists():
        raise UserError(f'{output} exists: give another name by --output, or move it away')
    if Path(name).suffix in SUFFIXES:  # as it is: values may be missing
        values, columns = read_numbers(name)
        splits, figure = {'all': values}, draw_table(values, columns, name)
    else:
        data = load(name, data_dir, image_size)
        splits = {'train': data.train, 'validation': data.validation, 'test': data.test}
        if name in IMAGE_DATASETS:
            figure = draw_images(
                data.train.images, data.train.attributes, data.attribute_names, name
            )
            splits = {split: part.images for split, part in splits.items()}
        elif name in ENERGIES:
            splits, figure = {}, draw_energy(name)
        else:
            if name in SAMPLERS:
                splits = {'drawn': data.draw(np.random.default_rng(0), N_DRAWN)}
            figure = draw_table(next(iter(splits.values())), data.columns, name)
    for split, values in splits.items():
        print(f'{name} {split}: ' + count(values))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    print(f'drawn to {path}')


def draw_energy(name):
    import torch

    axis = torch.linspace(-4.5, 4.5, 301)
    x, y = torch.meshgrid(axis, axis, indexing='xy')
    return draw_panels(
        {f'exp(-U) of {name}': (-ENERGIES[name](torch.stack([x, y], -1))).exp().numpy()},
        ('x1', 'x2'),
        (-4.5, 4.5, -4.5, 4.5),
    )


def count(values):
    """-> a line on an array: how many, of what range, how many missing and duplicate"""
    flat = values.reshape(len(values), -1)
    low, high, missing, seen = np.inf, -np.inf, 0, set()
    for block in np.array_split(
        flat, max(1, flat.nbytes // 2**26)
    ):  # parts, as all may not fit into memory
        good = block[np.isfinite(block)]
        missing += block.size - good.size
        if good.size:
            low, high = min(low, good.min()), max(high, good.max())
        seen.update(hash(row.tobytes()) for row in np.ascontiguousarray(block))
    return (
        f'{len(values):,} of {"x".join(map(str, values.shape[1:]))}, from {low:g} to {high:g}, '
        f'{missing:,} missing, {len(values) - len(seen):,} duplicates'
    )


def main(argv=None):
    try:
        args = parse_args(argv)
        if args.verb == 'list':
            print_list(args.data_dir)
        elif args.verb == 'fetch':
            fetch_one(args.name, args.data_dir, args.raw, args.given)
        elif args.verb == 'prepare':
            prepare(args.name, args.data_dir, args.image_size)
        else:
            show(args.name, args.data_dir, args.image_size, args.output)
        return
    except (UserError, OSError) as error:
        message = str(error)
    except KeyboardInterrupt:
        message = 'interrupted: the same command goes on, or begins anew'
    except MemoryError:
        message = 'out of memory'
    print(f'python -m datasets: error: {message}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
    main()
