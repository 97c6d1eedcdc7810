"""Data sets of photos: CelebA, whole or in part, and folders of the user's own."""

import csv
import hashlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from common.bounds import bounded_memory, open_regular
from common.errors import UserError, truncate
from common.files import digest, file_signature, first_existing, path_hash

from .image_conditions import are_printable
from .image_data import (
    ImageData,
    choose_split_bounds,
    make_image_data,
    random_split,
    require_files,
    split_by_hash,
)
from .photos import (
    describe_left_out,
    describe_unread,
    find_image_files,
    is_image_name,
    load_decoded,
)

CELEBA_PHOTOS = 'img_align_celeba'
CELEBA_TABLES = ('list_attr_celeba', 'list_eval_partition')  # .txt, or .csv as Kaggle has them
CELEBA_FOLDERS = ('Anno', 'Eval')  # the sub-folders in which CelebA's owners keep the tables
CELEBA_SPLITS = {'0': 0, '1': 1, '2': 2}

SPLIT_NAMES = {'train': 0, 'validation': 1, 'val': 1, 'valid': 1, 'test': 2}
MAX_ATTRIBUTES = 1000
MAX_TABLE_BYTES = 2**28  # CelebA's own table has 27 million
# What a cell of an attribute may be; pandas writes the others where it has made numbers or truth
# values of the column
ATTRIBUTE_CELLS = {'1': 1, '0': 0, '-1': -1, '1.0': 1, '0.0': 0, '-1.0': -1, 'True': 1, 'False': 0}
# So many of the files are read for the fingerprint, and so much of each
N_SAMPLED_FILES, N_SAMPLED_BYTES = 64, 2**16

Row = list[str]  # the cells of a row of a table
SMALL_SIZE, LARGE_SIZE, MANY_PHOTOS = 32, 64, 50_000


def usual_size(n_photos: int) -> int:
    """Return the height and width in pixels that so many photos have by default."""
    return SMALL_SIZE if n_photos < MANY_PHOTOS else LARGE_SIZE


# Splits photos, given by their indices, into those that train, validate and test. Returns their
# places among these indices, and the bounds of the split.
Split = Callable[[np.ndarray], tuple[list[np.ndarray], Sequence[int]]]


def decode_and_split(
    data_dir: Path,
    name: str,
    files: Sequence[Path],
    image_size: int | None,
    skip_broken: bool,
    split: Split,
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], list[int], str]:
    """Decode all photos, and split those that could be decoded.

    Returns the images (N, 3, size, size), which of them could be decoded (N,), the indices of the
    three splits, their bounds, and a digest of what the images were made from.
    """
    chosen = np.arange(len(files))
    parts, bounds = split(chosen)  # errors come before the long decoding
    size = image_size or usual_size(len(files))
    signatures = [file_signature(path) for path in files]
    images, is_whole, images_digest = load_decoded(
        data_dir, name, files, signatures, size, skip_broken
    )
    if not is_whole.all():
        chosen = np.flatnonzero(is_whole)
        parts, bounds = split(chosen)
    return images, is_whole, [chosen[part] for part in parts], list(bounds), images_digest


def find_celeba(data_dir: Path) -> dict[str, Path | None]:
    """Return the paths of CelebA's photos and of its two tables, None for each that is missing.

    ``data_dir`` may be the folder of the photos itself. Kaggle's photos are in a folder within a
    folder of the same name.
    """
    while data_dir.absolute().name == CELEBA_PHOTOS:
        data_dir = data_dir.absolute().parent
    inner = f'{CELEBA_PHOTOS}/{CELEBA_PHOTOS}'
    photos = [inner, CELEBA_PHOTOS, f'Img/{inner}', f'Img/{CELEBA_PHOTOS}']
    paths = {CELEBA_PHOTOS: first_existing(data_dir, 'celeba', photos)}
    for table, folder in zip(CELEBA_TABLES, CELEBA_FOLDERS):
        candidates = []
        for file in (f'{table}.txt', f'{table}.csv'):
            candidates += [file, f'{folder}/{file}', f'{CELEBA_PHOTOS}/{file}', f'{inner}/{file}']
        paths[f'{table}.txt (or .csv)'] = first_existing(data_dir, 'celeba', candidates)
    return paths


def require_celeba(data_dir: Path) -> list[Path]:
    """Return CelebA's photos and its two tables; raise ``UserError`` where one is missing."""
    advice = f'python -m datasets fetch celeba --data_dir={data_dir} says how'
    return require_files(
        'celeba', data_dir, find_celeba(data_dir), ', which its owners hand out', advice
    )


def find_celeba_photos(folder: Path) -> list[str]:
    """Return the sorted names of the photos in CelebA's folder."""
    entries = os.scandir(folder)
    return sorted(e.name for e in entries if is_image_name(e.name) and e.is_file())


def load_celeba(
    data_dir: Path,
    image_size: int | None,
    split_bounds: Sequence[int] | None = None,
    skip_broken: bool = False,
) -> ImageData:
    """Load CelebA (Liu et al., 2015): aligned photos with 40 attributes, in its own splits.

    Some of the photos will do. The central square of each (see ``CELEBA_CROP``) is resized.

    Arguments:
        data_dir: The folder of the photos and the two tables.
        image_size: Height and width in pixels, by default ``usual_size``.
        split_bounds: Those that a run's checkpoint keeps, or [] if it was split as CelebA is. For a
            new run (None), CelebA's own split is taken, or photos are split by their names, as in
            ``load_folder``, where that leaves none to train, validate or test.
        skip_broken: Whether photos that cannot be decoded, or are too small, are left out.
    """
    folder, attribute_path, partition_path = require_celeba(data_dir)
    attribute_names, cells = read_celeba_attributes(attribute_path)
    partition = read_celeba_partition(partition_path)
    file_names = find_celeba_photos(folder)
    require_rows(file_names, folder, cells, attribute_path)
    require_rows(file_names, folder, partition, partition_path)

    cells_in_order = [cells[name] for name in file_names]
    attributes = parse_attributes(attribute_path, attribute_names, cells_in_order, file_names)
    words = np.array([partition[name] for name in file_names], dtype=object)
    require_split_words(partition_path, words, CELEBA_SPLITS)
    hashes = np.array([path_hash(PurePath(name)) for name in file_names])

    def split(chosen: np.ndarray) -> tuple[list[np.ndarray], Sequence[int]]:
        has_own_split = set(CELEBA_SPLITS) <= set(words[chosen])
        if split_bounds or (split_bounds is None and not has_own_split):
            return split_folder(hashes[chosen], split_bounds, folder)
        return split_by_word(partition_path, words[chosen], CELEBA_SPLITS), []

    paths = [folder / name for name in file_names]
    images, is_whole, parts, bounds, images_digest = decode_and_split(
        data_dir, 'celeba', paths, image_size, skip_broken, split
    )
    used = np.flatnonzero(is_whole)
    source = [images_digest, [file_signature(attribute_path), file_signature(partition_path)]]
    identity = [*describe_photos([paths[i] for i in used]), attribute_names, words[used].tolist()]
    data = make_image_data(
        images,
        attributes,
        attribute_names,
        parts,
        source=[source, bounds] if bounds else source,
        fingerprint=digest(['celeba', *identity], [attributes[used]]),
        file_names=file_names,
    )
    notes = celeba_notes(len(cells), folder, paths, is_whole, bounds)
    return replace(data, split_bounds=bounds, notes=notes)


def celeba_notes(
    n_all: int, folder: Path, paths: Sequence[Path], is_whole: np.ndarray, bounds: Sequence[int]
) -> tuple[str, ...]:
    """Return what the user should know of photos of CelebA, of which there are ``n_all``."""
    notes = []
    if len(paths) < n_all:
        notes.append(f'{len(paths):,} of the {n_all:,} images of CelebA are in {folder}')
    if bounds:
        notes.append("images are split by their names, not as CelebA's table says")
    if not is_whole.all():
        notes.append(describe_left_out(folder, paths, is_whole))
    return tuple(notes)


def describe_photos(paths: Sequence[Path]) -> list[list]:
    """Return the names, the sizes and, of some of them, the content of CelebA's photos."""
    sizes = [path.stat().st_size for path in paths]
    return [[path.name for path in paths], sizes, sampled_content(paths)]


def require_rows(
    file_names: Sequence[str], folder: Path, rows: Mapping[str, Any], table: Path
) -> None:
    """Raise ``UserError`` where a table has no row for one of the photos in a folder."""
    missing = [name for name in file_names if name not in rows]
    if missing:
        raise UserError(
            f'{len(missing)} of the images in {folder} are not in {table}, such as {missing[0]!r}'
        )


def read_celeba_attributes(path: Path) -> tuple[list[str], dict[str, Row]]:
    """Read the names of the attributes, and the cells of each image, by its file name.

    The first line of the .txt is the number of images, the second one the names. The .csv begins
    with the names.
    """
    with bounded_memory(path):
        if path.suffix == '.csv':
            header, *rows = read_csv_rows(path)
            return header[1:], {row[0]: row[1:] for row in rows}

        lines = read_lines(path)
        names = lines[1].split() if len(lines) > 1 else []
        rows = [line.split() for line in lines[2:] if line.strip()]
        cells = {row[0]: row[1:] for row in rows}

        announced = lines[0].strip() if lines else 'nothing'
        if announced != str(len(cells)):
            raise UserError(f'{path} announces {announced} images and has {len(cells)} rows')
        return names, cells


def read_celeba_partition(path: Path) -> dict[str, str]:
    """Read the split of each image, by its file name: '0', '1' or '2'."""
    with bounded_memory(path):
        if path.suffix == '.csv':
            rows = read_csv_rows(path)[1:]  # below the names of the columns
        else:
            rows = [line.split() for line in read_lines(path)]
        return {row[0]: row[1] for row in rows if len(row) >= 2}


# ------------------------------------------------------------------------------------------ folders


def load_folder(
    data_dir: Path,
    image_size: int | None,
    split_bounds: Sequence[int] | None = None,
    skip_broken: bool = False,
) -> ImageData:
    """Load the images in a folder and its sub-folders, cropped square.

    The folder may have an attributes.csv, with the columns image, split (optional), and one column
    for each attribute, of 1 and -1 or of 1 and 0. Without splits, an image's path decides which
    split it is in.

    Arguments:
        data_dir: The folder.
        image_size: Height and width in pixels, by default ``usual_size``.
        split_bounds: Those that a run's checkpoint keeps, or [] if it keeps none: its images were
            split by ``random_split``. None, for a new run, stands for ``choose_split_bounds``.
        skip_broken: Whether images that cannot be decoded, or are too small, are left out.
    """
    files = find_image_files(data_dir)
    relative_paths = [path.relative_to(data_dir) for path in files]
    file_rows = describe_files(relative_paths, files)

    table = data_dir / 'attributes.csv'
    table_lines: list[str] = []
    names: list[str] = []
    attributes, words, n_missing = np.zeros((len(files), 0), bool), None, 0
    if table.exists():
        table_lines = read_lines(table)
        names, attributes, words, n_missing = read_attribute_table(
            table, list(map(str, relative_paths))
        )

    def split(chosen: np.ndarray) -> tuple[list[np.ndarray], Sequence[int]]:
        if words is not None:
            return split_by_word(table, words[chosen], SPLIT_NAMES), split_bounds or []
        return split_folder(file_rows[chosen, 0], split_bounds, data_dir)

    images, is_whole, parts, bounds, images_digest = decode_and_split(
        data_dir, 'folder', files, image_size, skip_broken, split
    )
    used_rows, used = file_rows[is_whole], np.flatnonzero(is_whole)
    order = np.lexsort(used_rows.T)  # the files' own order depends on the platform
    content = sampled_content([files[i] for i in used[order]])
    data = make_image_data(
        images,
        attributes,
        names,
        parts,
        source=[images_digest, table_lines, bounds],
        fingerprint=digest(['folder', table_lines, content], [used_rows[order]]),
        file_names=[path.as_posix() for path in relative_paths],
    )
    notes = []
    if n_missing:
        notes.append(f'{n_missing:,} of the images in {table} are not there')
    if not is_whole.all():
        notes.append(describe_left_out(data_dir, files, is_whole))
    if unread := describe_unread(data_dir):
        notes.append(unread)
    file_table = torch.from_numpy(used_rows)
    return replace(data, split_bounds=bounds, files=file_table, notes=tuple(notes))


def sampled_content(paths: Sequence[Path]) -> list[str]:
    """Return digests of the beginnings of some of the files, at equal distances."""
    digests = []
    for path in paths[:: max(1, len(paths) // N_SAMPLED_FILES)]:
        with open_regular(path) as file:
            beginning = file.read(N_SAMPLED_BYTES)
        digests.append(hashlib.sha256(beginning).hexdigest())
    return digests


def describe_files(relative_paths: Sequence[Path], files: Sequence[Path]) -> np.ndarray:
    """Return the path hash and the size in bytes of each file, (N, 2), int64."""
    hashes = np.array([path_hash(path) for path in relative_paths], np.int64)
    sizes = np.array([path.stat().st_size for path in files], np.int64)
    return np.stack([hashes, sizes], axis=1)


def split_folder(
    hashes: np.ndarray, bounds: Sequence[int] | None, source: Path
) -> tuple[list[np.ndarray], Sequence[int]]:
    """Return sorted indices of the train, validation and test images, and the bounds between them.

    ``bounds`` is as in ``load_folder``.
    """
    if bounds is None:
        bounds = choose_split_bounds(hashes, source)
    if not bounds:
        return random_split(len(hashes), source), []
    return split_by_hash(hashes, bounds, source), bounds


def read_attribute_table(
    path: Path, files: Sequence[str]
) -> tuple[list[str], np.ndarray, np.ndarray | None, int]:
    """Read an attributes.csv.

    Arguments:
        path: The table. Each of its rows names an image by the path relative to the table or, where
            this is unique, by the file's name alone.
        files: The relative paths of all images.

    Returns the attribute names, the attributes (N, A) in the order of ``files``, the split of each
    of them in words, or None if there is no column of splits, and how many rows have no image.
    """
    header, *rows = read_csv_rows(path)
    names = attribute_header(path, header)
    if 'split' in header:  # the second column, from now on
        place = header.index('split')
        rows = [[row[0], *row[place : place + 1], *row[1:place], *row[place + 1 :]] for row in rows]

    row_of_file: dict[str, Row] = {}
    for row, file in zip(rows, match_files(rows, files)):
        if file in row_of_file:
            raise UserError(f'{path} has two rows for {row[0]}')
        row_of_file[file] = row
    require_rows(files, path.parent, row_of_file, path)
    n_missing = len(row_of_file) - len(files)
    rows = [row_of_file[file] for file in files]

    first = 2 if 'split' in header else 1
    attributes = parse_attributes(path, names, [row[first:] for row in rows], files)
    if 'split' not in header:
        return names, attributes, None, n_missing
    words = [row[1] if len(row) > 1 else '' for row in rows]
    require_split_words(path, words, SPLIT_NAMES)
    return names, attributes, np.array(words, dtype=object), n_missing


def attribute_header(path: Path, header: Row) -> list[str]:
    """Return the names of attributes from the first row of a table."""
    if not header or header[0] != 'image':
        found = truncate(','.join(header)) or 'nothing'
        raise UserError(
            f'{path}: the first column must be named image, the others split (optional) and the '
            f'attributes, with commas between them; the first line is {found!r}'
        )
    return [name for name in header[1:] if name != 'split']


def read_csv_rows(path: Path) -> list[Row]:
    """Return the cells of a table without the spaces around them; at least one row, maybe empty."""
    with bounded_memory(path):
        try:
            rows = [[cell.strip() for cell in row] for row in csv.reader(read_lines(path)) if row]
        except csv.Error as error:
            raise UserError(f'{path} cannot be read as a table: {error}') from error
        return rows or [[]]


def match_files(rows: Sequence[Row], files: Sequence[str]) -> list[str]:
    """Return the relative path of the image of each row, or the row's name of it if unknown."""
    paths_by_name: dict[str, list[str]] = {}
    for file in files:
        paths_by_name.setdefault(os.path.basename(file), []).append(file)

    known = set(files)
    matches = []
    for name, *_ in rows:
        candidates = paths_by_name.get(name, [])
        is_unique_name = name not in known and len(candidates) == 1
        matches.append(candidates[0] if is_unique_name else name)
    return matches


# ----------------------------------------------------------------- parts of CelebA's and own tables


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file in UTF-8; raise ``UserError`` if it cannot be read."""
    try:
        with open_regular(path, MAX_TABLE_BYTES) as file:
            return file.read().decode('utf-8-sig').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read as text: {error}') from error


def parse_attributes(
    path: Path, names: Sequence[str], rows: Sequence[Row], images: Sequence[str]
) -> np.ndarray:
    """Return the attributes of images as booleans (N, A).

    The cells of an attribute are 1 and -1, or 1 and 0. Raises ``UserError``, with the name of the
    image, for any others; ``path`` has them.
    """
    are_different = len(set(names)) == len(names)
    if not are_different or not are_printable(names) or len(names) > MAX_ATTRIBUTES:
        raise UserError(
            f'{path}: attribute names must be printable and different from each other, '
            f'{MAX_ATTRIBUTES} at most'
        )
    for image, row in zip(images, rows):
        if len(row) != len(names):
            raise UserError(f'{path}: {image} has {len(row)} values for {len(names)} attributes')
        if not ATTRIBUTE_CELLS.keys() >= set(row):
            k = next(k for k, cell in enumerate(row) if cell not in ATTRIBUTE_CELLS)
            raise UserError(
                f'{path}: {image} has {truncate(row[k])!r} for {names[k]}, which must be 1 and -1, '
                'or 1 and 0'
            )

    numbers = np.array([[ATTRIBUTE_CELLS[cell] for cell in row] for row in rows], np.int8)
    numbers = numbers.reshape(len(rows), len(names))  # also where there are no names
    is_mixed = (numbers == 0).any(0) & (numbers == -1).any(0)
    if is_mixed.any():
        name = names[int(is_mixed.argmax())]
        raise UserError(f'{path}: {name} has both 0 and -1: write one of them')
    return numbers == 1


def require_split_words(path: Path, words: Collection[str], splits: Mapping[str, int]) -> None:
    """Raise ``UserError`` where one of the words of a table is none of the allowed splits."""
    unknown = set(words) - set(splits)
    if unknown:
        raise UserError(f'{path}: a split is one of {", ".join(splits)}, not {min(unknown)!r}')


def split_by_word(
    path: Path, words: Collection[str], splits: Mapping[str, int]
) -> list[np.ndarray]:
    """Return sorted indices of the train, validation and test images.

    Arguments:
        path: Where the words come from, for error messages.
        words: The split of each image.
        splits: 0 (train), 1 (validation) or 2 (test) for each allowed word.
    """
    split_of_image = np.array([splits[word] for word in words])
    parts = [np.flatnonzero(split_of_image == split) for split in range(3)]
    if not all(len(part) for part in parts):
        raise UserError(f'{path}: training, validation and test split need at least one image each')
    return parts
