"""The conditions of a model of images: the class of each image, or some of its attributes."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from common.errors import UserError, nearest_names
from common.files import name_part

CLASSES = 'classes'  # of --condition: the classes of a data set, not attributes by name
MAX_CONDITIONS = 10  # attributes: all combinations of them are summed over
MAX_VALUES = 2**MAX_CONDITIONS


@dataclass(frozen=True)
class ImageCondition:
    """The conditions y of a model of images: a number 0 or 1 for each of Y names.

    Attributes:
        names: Classes or attributes; none of a model without conditions.
        is_class: Whether each image has exactly one of them.
        values: The y that training images have, (K, Y), float32: classes in their order,
            combinations of attributes by how frequent they are.
        counts: How many training images have each of them, K numbers.
    """

    names: tuple[str, ...] = ()
    is_class: bool = False
    values: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    counts: tuple[int, ...] = ()

    @property
    def description(self) -> str:
        """What a model is given: ``'the class'``, or the names of attributes."""
        return 'the class' if self.is_class else ', '.join(self.names)

    def label(self, y: np.ndarray) -> str:
        """Return conditions as ``--given`` takes them: ``'7'``, or ``'Smiling,-Male'``."""
        if self.is_class:
            return self.names[int(y.argmax())]
        return ','.join(name if on else f'-{name}' for name, on in zip(self.names, y))

    def parse(self, text: str, start: np.ndarray | None = None) -> np.ndarray:
        """Return the conditions (Y,) that ``--given`` describes.

        Arguments:
            text: ``'7'``, a class, or ``'Smiling,-Male'``, attributes that are there or not.
            start: The conditions (Y,) of an image, which hold for attributes that ``text`` leaves
                out. Without it, none may be left out.

        Raises ``UserError`` where the text cannot be understood.
        """
        if not self.names:
            raise UserError('--given is for models that were trained with --condition')
        words = [word.strip() for word in text.split(',') if word.strip()]
        if self.is_class:
            if len(words) != 1:
                raise UserError(f'--given takes one class, such as --given={self.names[-1]}')
            k = self.find(words[0])
            if not self.values[:, k].any():
                raise UserError(f'no training image is of class {self.names[k]}')
            return np.eye(len(self.names), dtype=np.float32)[k]

        found: dict[int, bool] = {}
        for word in words:
            name = word if word in self.names else word.removeprefix('-').strip()
            k = self.find(name)
            if k in found:
                raise UserError(f'--given has two values of {self.names[k]}')
            found[k] = word == name
        missing = [name for k, name in enumerate(self.names) if k not in found]
        if missing and start is None:
            raise UserError(
                f'--given says nothing of {", ".join(missing)}: add {missing[0]} or -{missing[0]}'
            )

        y = np.zeros(len(self.names), np.float32) if start is None else start.copy()
        y[list(found)] = list(found.values())
        return y

    def find(self, name: str) -> int:
        """Return the place of a name; raise ``UserError`` where there is no such name."""
        if name not in self.names:
            near: Sequence[str] = self.names
            if len(near) > MAX_CONDITIONS:
                near = nearest_names(name, near, MAX_CONDITIONS, 0) or near[:MAX_CONDITIONS]
            raise UserError(f'--given={name}: the model knows {", ".join(near)}')
        return self.names.index(name)

    def to_entry(self) -> dict[str, Any]:
        """Return the conditions as a checkpoint keeps them."""
        return {
            'names': list(self.names),
            'is_class': self.is_class,
            'values': torch.from_numpy(self.values),
            'counts': list(self.counts),
        }


def make_condition(names: Sequence[str], y: np.ndarray, is_class: bool) -> ImageCondition:
    """Return the conditions of training images that have the values ``y`` (N, Y), boolean."""
    if is_class:
        counts = y.sum(0)
        values = np.eye(len(names))[counts > 0]
        counts = counts[counts > 0]
    else:
        values, counts = np.unique(y, axis=0, return_counts=True)
        order = np.argsort(-counts, kind='stable')
        values, counts = values[order], counts[order]
    counts = tuple(counts.tolist())
    return ImageCondition(tuple(names), is_class, values.astype(np.float32), counts)


def condition_of_checkpoint(saved: dict[str, Any]) -> ImageCondition:
    """Return the conditions of a checkpoint; raise ``UserError`` where they are damaged."""
    entry = saved['condition']
    names, values, counts = entry['names'], entry['values'], entry['counts']
    is_whole = (
        len(names) == saved['input_dims'][-1] == len(set(names))
        and are_printable(names)
        and values.dtype == torch.float32
        and values.shape == (len(counts), len(names))
        and len(counts) <= MAX_VALUES
        and bool(names) == (len(counts) > 1)
        and all(counts)
        and bool(((values == 0) | (values == 1)).all())
        and len(set(map(tuple, values.tolist()))) == len(counts)
        and not (entry['is_class'] and (values.sum(1) != 1).any())
    )
    if not is_whole:
        raise UserError(f'{saved["path"]} is damaged: its conditions do not fit each other')
    return ImageCondition(tuple(names), entry['is_class'], values.numpy(), tuple(counts))


def name_for_file(given: str) -> str:
    """Return conditions, as ``--given`` takes them, as part of the name of a file."""
    name = re.sub(r'[^\w,-]', '_', given)
    return f'given_{name_part(name, 100)}'


def are_printable(names: Collection[str]) -> bool:
    """Return whether names can be shown."""
    return all(name and name.isprintable() for name in names)
