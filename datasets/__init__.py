"""Data sets and pictures of them: images (images.py) and tables (tabular.py, columns.py, toy.py)."""

from .images import (
    IMAGE_DATASETS,
    ImageData,
    ImageSplit,
    load_images,
    load_photo,
    load_run_images,
    save_grid,
    shift_randomly,
)

__all__ = [
    'IMAGE_DATASETS',
    'ImageData',
    'ImageSplit',
    'load_images',
    'load_photo',
    'load_run_images',
    'save_grid',
    'shift_randomly',
]
