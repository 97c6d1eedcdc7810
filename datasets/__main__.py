"""List, fetch, prepare and show the data sets.

python -m datasets list                           all data sets, and whether each is in --data_dir
python -m datasets fetch mnist                    download, verify and unpack into --data_dir
python -m datasets fetch power --raw              from the UCI repository, not the MAF authors
python -m datasets fetch celeba --from FILE ...   from files that you have downloaded
python -m datasets prepare celeba                 build the cache that training reads
python -m datasets show mnist                     draw a picture, and print a line per split
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from common.errors import UserError, UserErrorParser
from common.files import name_part

from .columns import list_names, number_columns
from .fetch import SOURCES, data_set_status, fetch_data_set
from .images import IMAGE_DATASETS, ImageData, load_images
from .own_tables import SUFFIXES, is_own_table, read_frame
from .plots import draw_images, draw_panels, draw_table
from .tabular import TableData, load_table
from .toy import ENERGIES

N_SHOWN_SAMPLES = 10_000  # of a two-dimensional density
BLOCK_BYTES = 2**26  # read at once of an array, which may not fit into memory as a whole


# --------------------------------------------------------------------------------- command line


def parse_image_size(text: str) -> int:
    """Return the pixels per side of an image."""
    size = int(text)
    if not 1 <= size <= 1024:
        raise argparse.ArgumentTypeError(f'{size} is outside 1..1024')
    return size


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. Raises ``UserError`` where it is wrong."""
    parser = UserErrorParser(
        prog='python -m datasets',
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest='verb', required=True, parser_class=UserErrorParser)

    def add_verb(verb: str, description: str) -> argparse.ArgumentParser:
        return verbs.add_parser(verb, help=description, allow_abbrev=False)

    name_help = 'as python -m datasets list shows it'
    name_or_table = f'{name_help}, or a table of your own ({" ".join(SUFFIXES)})'

    listing = add_verb('list', 'list all data sets, and whether each is in --data_dir')
    add_data_dir(listing)

    fetching = add_verb('fetch', 'download, verify and unpack a data set')
    fetching.add_argument('name', metavar='NAME', help=name_help)
    add_data_dir(fetching)
    add_fetch_options(fetching)

    preparing = add_verb('prepare', 'build the cache of a data set')
    preparing.add_argument('name', metavar='NAME', help=name_or_table)
    add_data_dir(preparing)
    add_image_options(preparing)

    showing = add_verb(
        'show', 'draw a data set; print its size, range, missing values and duplicates'
    )
    showing.add_argument('name', metavar='NAME', help=name_or_table)
    add_data_dir(showing)
    add_image_options(showing)
    showing.add_argument(
        '--output',
        type=Path,
        metavar='FILE',
        help='file of the picture (default: results/NAME.png)',
    )
    return parser.parse_args(argv)


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """Add the option that all verbs have."""
    parser.add_argument(
        '--data_dir',
        type=Path,
        default=Path('data'),
        metavar='DIR',
        help='folder of the data sets (default: data)',
    )


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of those verbs that load images."""
    parser.add_argument(
        '--image_size', type=parse_image_size, metavar='N', help='pixels per side of an image'
    )
    parser.add_argument(
        '--skip_broken', action='store_true', help='leave out photos that are broken or too small'
    )


def add_fetch_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where ``fetch`` takes the files from."""
    parser.add_argument(
        '--raw',
        action='store_true',
        help='take a table from the UCI repository, before its preprocessing',
    )
    parser.add_argument(
        '--from',
        dest='given',
        type=Path,
        nargs='+',
        default=[],
        metavar='FILE',
        help='unpack files that you have downloaded, instead of downloading them',
    )


# --------------------------------------------------------------------------------- list and fetch


def print_data_sets(data_dir: Path) -> None:
    """Print a table of all data sets, with the status of each in ``data_dir``."""
    rows = [
        ('name', 'kind', 'items', 'dimensions', 'download', 'from', 'license', f'in {data_dir}')
    ]
    for name, source in SOURCES.items():
        rows.append(
            (
                name,
                source.kind,
                source.items,
                source.dimensions,
                source.download,
                source.origin,
                source.license,
                data_set_status(name, data_dir),
            )
        )

    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        print('  '.join(cells).rstrip())


def fetch(name: str, data_dir: Path, raw: bool, given: Sequence[Path]) -> None:
    """Fetch a data set, and print its status, license and citation."""
    status = fetch_data_set(name, data_dir, raw, given)
    line = f'{name} in {data_dir}: {status}'
    if status != 'verified':
        line += (
            ', but not by a published checksum: '
            f'python -m datasets prepare {name} --data_dir={data_dir} checks what it holds'
        )
    print(line)
    source = SOURCES[name]
    print(f'license: {source.license}; to be cited as {source.citation}')


# --------------------------------------------------------------------------------------- prepare


def prepare(name: str, data_dir: Path, image_size: int | None, skip_broken: bool) -> None:
    """Load a data set, which builds its cache, and print its size and the time that it took."""
    start = time.perf_counter()
    data = load_data_set(name, data_dir, image_size, skip_broken)
    seconds = time.perf_counter() - start

    arrays = list(arrays_of_splits(data).values())
    counts = ' / '.join(f'{len(array):,}' for array in arrays)
    n = sum(len(array) for array in arrays)
    items = 'images' if name in IMAGE_DATASETS else 'rows'
    print(
        f'{name}: {counts} {items} of {format_shape(arrays[0])} are ready, '
        f'in {seconds:.1f} s ({n / seconds:,.0f} per second)'
    )


def load_data_set(
    name: str, data_dir: Path, image_size: int | None = None, skip_broken: bool = False
) -> ImageData | TableData:
    """Load a data set of images, a table or a two-dimensional problem."""
    if name in IMAGE_DATASETS:
        images = load_images(name, data_dir, image_size, skip_broken=skip_broken)
        for note in images.notes:
            print(f'note: {note}')
        return images
    require_no_image_size(name, image_size)
    return load_table(name, data_dir)


def arrays_of_splits(data: ImageData | TableData) -> dict[str, np.ndarray]:
    """Return the images or rows of each split that there is."""
    if isinstance(data, ImageData):
        return {
            'train': data.train.images,
            'validation': data.validation.images,
            'test': data.test.images,
        }
    splits = {'train': data.train, 'validation': data.validation, 'test': data.test}
    return {name: rows for name, rows in splits.items() if rows is not None}


def require_no_image_size(name: str, image_size: int | None) -> None:
    """Raise ``UserError`` where an image size is given for something other than images."""
    if image_size:
        known = ', '.join(IMAGE_DATASETS)
        raise UserError(f'--image_size is for images, and {name} is none of {known}')


# ------------------------------------------------------------------------------------------ show


def show(
    name: str, data_dir: Path, image_size: int | None, skip_broken: bool, output: Path | None
) -> None:
    """Draw a data set into a file, and print a line of counts per split."""
    if output and output.exists():
        raise UserError(f'{output} exists: give another name by --output, or move it away')
    path = output or Path('results') / f'{name_part(Path(name).name)}.png'

    if is_own_table(name):
        arrays, figure = draw_user_table(name)
    elif name in ENERGIES:
        require_no_image_size(name, image_size)
        arrays = {}
        figure = draw_energy(name)
    else:
        data = load_data_set(name, data_dir, image_size, skip_broken)
        arrays, figure = draw_data_set(name, data)

    for part, array in arrays.items():
        print(f'{name} {part}: {describe_values(array)}')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    print(f'drawn to {path}')


def draw_user_table(name: str) -> tuple[dict[str, np.ndarray], Figure]:
    """Return the rows of a table of the user's own, where values may be missing, and a figure.

    Columns that are not numeric are left out, and their names printed.
    """
    frame = read_frame(name)
    columns = list(frame.columns)
    values, not_numeric = number_columns(frame, columns)
    if not_numeric:
        print(f'{name}: not drawn, as it is not numeric: {list_names(not_numeric)}')
        kept = [k for k, column in enumerate(columns) if column not in not_numeric]
        values, columns = values[:, kept], [columns[k] for k in kept]
    if not columns:
        raise UserError(f'{name} has no column of numbers')
    return {'all': values}, draw_table(values, columns, name)


def draw_data_set(name: str, data: ImageData | TableData) -> tuple[dict[str, np.ndarray], Figure]:
    """Return the images or rows of each split, and a figure of those that train."""
    arrays = arrays_of_splits(data)
    if isinstance(data, ImageData):
        attributes = data.train.attributes
        return arrays, draw_images(arrays['train'], attributes, data.attribute_names, name)
    if data.sampler:
        rows = data.sampler(np.random.default_rng(0), N_SHOWN_SAMPLES)
        return {'drawn': rows}, draw_table(rows, data.columns, name)
    return arrays, draw_table(arrays['train'], data.columns, name)


def draw_energy(name: str) -> Figure:
    """Return a figure of the unnormalised density exp(-U) of an energy U."""
    limit = 4.5
    axis = torch.linspace(-limit, limit, 301)
    points = torch.stack(torch.meshgrid(axis, axis, indexing='xy'), -1)
    density = (-ENERGIES[name](points)).exp().numpy()
    extent = (-limit, limit, -limit, limit)
    return draw_panels({f'exp(-U) of {name}': density}, ('x1', 'x2'), extent)


def describe_values(values: np.ndarray) -> str:
    """Return a line with the size of an array, its range, and what is missing or duplicate."""
    flat = values.reshape(len(values), -1)
    low, high = np.inf, -np.inf
    n_missing = 0
    hashes: set[int] = set()
    for block in np.array_split(flat, max(1, flat.nbytes // BLOCK_BYTES)):
        finite = block[np.isfinite(block)]
        n_missing += block.size - finite.size
        if finite.size:
            low = min(low, finite.min())
            high = max(high, finite.max())
        hashes.update(hash(row.tobytes()) for row in np.ascontiguousarray(block))
    return (
        f'{len(values):,} of {format_shape(values)}, from {low:g} to {high:g}, '
        f'{n_missing:,} missing, {len(values) - len(hashes):,} duplicates'
    )


def format_shape(values: np.ndarray) -> str:
    """Return the shape of one image or row, such as ``3x32x32``."""
    return 'x'.join(map(str, values.shape[1:]))


# ------------------------------------------------------------------------------------------ main


def run(argv: Sequence[str] | None) -> None:
    """Do what the command line says."""
    args = parse_args(argv)
    if args.verb == 'list':
        print_data_sets(args.data_dir)
    elif args.verb == 'fetch':
        fetch(args.name, args.data_dir, args.raw, args.given)
    elif args.verb == 'prepare':
        prepare(args.name, args.data_dir, args.image_size, args.skip_broken)
    else:
        show(args.name, args.data_dir, args.image_size, args.skip_broken, args.output)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. Errors that are expected end it with one line and exit code 2."""
    try:
        run(argv)
        return
    except (UserError, OSError) as error:
        message = str(error)
    except KeyboardInterrupt:
        message = 'interrupted: repeat the same command to continue'
    except MemoryError:
        message = 'out of memory'
    print(f'python -m datasets: error: {message}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
    main()
