"""Tiny models of Glow: as modules, as options, and as words of the command line."""

from dataclasses import replace

import numpy as np
import torch

import glow
from datasets import ImageSplit
from datasets.image_conditions import make_condition

TINY = ['--depth=1', '--width=8', '--n_epochs=1', '--batch_size=128']
# pixels of an image in a grid: 8 x 8 enlarged 16 times, or 16 x 16 8 times, and 8 between
CELL = 136


def random_images(*shape, seed=0):
    """Return uint8 images of noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def tiny_glow(**options):
    """Return a model of 4x4 grey images at 5 bits, unless options say otherwise."""
    torch.manual_seed(0)
    shape = dict(input_dims=(1, 4, 4), n_levels=1, depth=2, width=8)
    return glow.Glow(**{**shape, 'n_bits': 5, **options})


def with_classes(data):
    """Return a data set of noise whose images belong to three classes by turns."""
    classes = np.eye(3, dtype=bool)[np.arange(len(data.train.images)) % 3]
    split = ImageSplit(data.train.images, classes, classes.astype(np.float32))
    condition = make_condition('abc', classes, is_class=True)
    return replace(data, train=split, validation=split, test=split, condition=condition)


def training_words(folder, *words):
    """Return the words that train a tiny model of the digits into a folder."""
    places = [f'--output_dir={folder}', f'--data_dir={folder}']
    return ['--train', '--dataset=digits', *TINY, *places, *words]


def digits_config(**options):
    """Return the options of the digits data set with others in their place."""
    return glow.Config(**{**glow.DEFAULTS['digits'], 'dataset': 'digits', **options})
