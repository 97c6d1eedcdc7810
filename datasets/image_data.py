"""What an image data set is, and how images are split to train, validate and test."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UserError, index_of_name
from common.files import digest

from .image_conditions import ImageCondition

SplitIndex = slice | np.ndarray


@dataclass(frozen=True)
class ImageSplit:
    """Images of one split.

    Attributes:
        images: (N, C, H, W), uint8, memory-mapped if they come from a cache.
        attributes: (N, A), boolean; A is 0 where the data set has none.
        conditions: (N, Y), float32, 0 or 1, that a model is given; None without conditions.
        names: The file of each image, N names; none where images have no files of their own.
    """

    images: np.ndarray
    attributes: np.ndarray
    conditions: np.ndarray | None = None
    names: Sequence[str] = ()


@dataclass(frozen=True)
class ImageData:
    """An image data set.

    Attributes:
        train, validation, test: The three splits.
        attribute_names: A names; the classes of a labelled data set are attributes.
        n_values: Values per image by which bits/dim is divided. This is C * H * W, except for
            mnist: its 28x28 images are padded to 32x32, and 784 values count.
        fingerprint: Digest that identifies the images, in whichever folder of whichever machine.
            Of celeba and folder, it is one of names, sizes, tables and the content of some files.
        cache_key: Digest of what the images were made from, with the times of the files, and of
            their split. What is computed from the images is stale when it changes.
        split_bounds: The two numbers by which images were split (``split_by_hash``), or none.
        files: A row (path hash, size in bytes) for each image of a folder, int64, (N, 2).
        notes: What the user should know of the images, in one line each: which were left out, or
            what has changed since a run was trained on them.
        condition: What the conditions of each image are called, and how frequent they are.
    """

    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit
    attribute_names: tuple[str, ...]
    n_values: int
    fingerprint: str
    cache_key: str = ''
    split_bounds: list[int] = field(default_factory=list)
    files: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.int64))
    notes: tuple[str, ...] = ()
    condition: ImageCondition = field(default_factory=ImageCondition)

    def attribute_index(self, text: str) -> int:
        """Return the index of an attribute given by index or name, such as '8' or 'Black_Hair'.

        Raises ``UserError`` with the nearest names if there is no such attribute.
        """
        return index_of_name(text, self.attribute_names, 'attribute')

    def differing(self, texts: Sequence[str] | None, n: int, source: str) -> list[int]:
        """Return the indices of attributes that differ among the first ``n`` training images.

        Arguments:
            texts: Indices or names of the attributes; by default, all that differ.
            n: How many training images to look at.
            source: What to call the data set in an error message.

        Raises ``UserError`` if no attribute differs, or one of those given does not.
        """
        present = self.train.attributes[:n]
        differs = np.asarray(present.any(0) & ~present.all(0))
        if not differs.any():
            raise UserError(
                f'the images of {source} have no attributes that differ: for a folder of images, '
                'list them in its attributes.csv'
            )
        if not texts:
            return np.flatnonzero(differs).tolist()

        chosen = [self.attribute_index(text) for text in texts]
        for i in chosen:
            if not differs[i]:
                raise UserError(
                    f'attribute {i} ({self.attribute_names[i]}) is the same in all training '
                    'images: choose another'
                )
        return chosen


def require_files(
    name: str, data_dir: Path, paths: Mapping[str, Path | None], form: str, advice: str
) -> list[Path]:
    """Return the paths of the files of a data set; raise ``UserError`` if any is missing.

    Arguments:
        name: The data set.
        data_dir: Where its files were looked for.
        paths: The path of each file, by what it is called; None for one that is missing.
        form: What all of them have in common, in words that follow their names.
        advice: Where they come from.
    """
    missing = [file for file, path in paths.items() if path is None]
    if missing:
        lacks = 'it needs' if len(missing) == len(paths) else 'what is there lacks'
        raise UserError(
            f'{name} is not in {data_dir}: {lacks} {", ".join(missing)}{form}: {advice}'
        )
    return [path for path in paths.values() if path is not None]


def make_image_data(
    images: np.ndarray,
    attributes: np.ndarray,
    names: Sequence[str],
    parts: Sequence[SplitIndex],
    source: Any,
    fingerprint: str = '',
    n_values: int | None = None,
    file_names: Sequence[str] = (),
) -> ImageData:
    """Split images and attributes into a data set.

    Arguments:
        images: (N, C, H, W), uint8.
        attributes: (N, A), boolean.
        names: A names of attributes.
        parts: Slices or indices of the train, validation and test images.
        source: JSON-serialisable description of what the images were made from.
        fingerprint, n_values: See ``ImageData``; by default, the digest of ``source`` and
            C * H * W values.
        file_names: N names, of images that have files of their own.
    """
    splits = []
    for part in parts:
        names_of_part = np.array(file_names, dtype=object)[part].tolist() if file_names else ()
        splits.append(ImageSplit(images[part], attributes[part], names=names_of_part))
    train, validation, test = splits
    return ImageData(
        train,
        validation,
        test,
        attribute_names=tuple(names),
        n_values=n_values or int(np.prod(images.shape[1:])),
        fingerprint=fingerprint or digest(source),
        cache_key=digest(source),
    )


def slices_in_order(n_train: int, n_validation: int) -> list[slice]:
    """Split images in their order. The last of ``n_train`` images are the validation split."""
    first = n_train - n_validation
    return [slice(0, first), slice(first, n_train), slice(n_train, None)]


def random_split(n: int, source: str | Path) -> list[np.ndarray]:
    """Return sorted indices of 80, 10 and 10% of ``n`` images, always the same ones.

    Raises ``UserError`` if there are fewer than ten images; ``source`` names them.
    """
    require_ten(n, source)
    order = np.random.default_rng(0).permutation(n)
    n_held_out = n // 10
    parts = np.split(order, [n - 2 * n_held_out, n - n_held_out])
    return [np.sort(part) for part in parts]


def require_ten(n: int, source: str | Path) -> None:
    """Raise ``UserError`` if ``n`` images are too few to be split; ``source`` names them."""
    if n < 10:
        raise UserError(
            f'{source} has {n} images: at least 10 are needed for a split into train, validation '
            'and test'
        )


def choose_split_bounds(hashes: np.ndarray, source: str | Path) -> list[int]:
    """Return the bounds by which a tenth of the images validates and a tenth tests.

    See ``split_by_hash``. Raises ``UserError`` if there are fewer than ten images; ``source`` names
    them.
    """
    require_ten(len(hashes), source)
    ranked = np.sort(hashes)
    n_held_out = len(hashes) // 10
    return [int(ranked[n_held_out]), int(ranked[2 * n_held_out])]


def split_by_hash(
    hashes: np.ndarray, bounds: Sequence[int], source: str | Path
) -> list[np.ndarray]:
    """Return sorted indices of the train, validation and test images.

    An image whose hash is below the first of two bounds validates, one below the second tests, and
    the others train. So an image stays in its split, whichever others come or go.

    Raises ``UserError`` where a split has no image; ``source`` names them.
    """
    place = np.searchsorted(bounds, hashes, side='right')
    parts = [np.flatnonzero(place == split) for split in (2, 0, 1)]
    if not all(len(part) for part in parts):
        raise UserError(
            f'{source} has no images for the training, validation or test split of this run: too '
            'few of those that it was trained on are left'
        )
    return parts


def one_hot(labels: np.ndarray) -> np.ndarray:
    """Return labels 0 to 9 as boolean attributes (N, 10)."""
    return np.eye(10, dtype=bool)[labels]
