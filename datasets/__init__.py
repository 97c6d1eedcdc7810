"""The data sets, apart from the algorithms: images, for which see images.py, and rows of numbers (tabular.py, toy.py)."""

from .images import (
    IMAGE_DATASETS,
    ImageData,
    ImageSplit,
    load_images,
    load_photo,
    save_grid,
    shift_randomly,
)

__all__ = [
    'IMAGE_DATASETS',
    'ImageData',
    'ImageSplit',
    'load_images',
    'load_photo',
    'save_grid',
    'shift_randomly',
]
