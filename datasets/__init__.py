"""Data sets and pictures of them: images (images.py), tables (tabular.py) and problems (toy.py)."""

from .image_conditions import ImageCondition, condition_of_checkpoint, name_for_file
from .images import (
    IMAGE_DATASETS,
    ImageData,
    ImageSplit,
    arrange_in_rows,
    count_conditions,
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
    'arrange_in_rows',
    'condition_of_checkpoint',
    'count_conditions',
    'load_images',
    'load_photo',
    'load_run_images',
    'name_for_file',
    'save_grid',
    'shift_randomly',
]
