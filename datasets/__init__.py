"""Data sets and pictures of them: images (images.py), tables (tabular.py) and problems (toy.py)."""

from .image_conditions import ImageCondition, condition_of_checkpoint
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
    'ImageCondition',
    'ImageData',
    'ImageSplit',
    'condition_of_checkpoint',
    'load_images',
    'load_photo',
    'load_run_images',
    'save_grid',
    'shift_randomly',
]
