"""Data sets and pictures of them: images (images.py), tables (tabular.py) and problems (toy.py)."""

from .grids import arrange_in_rows, save_grid
from .image_conditions import ImageCondition, condition_of_checkpoint, name_for_file
from .image_data import ImageData, ImageSplit
from .images import (
    IMAGE_DATASETS,
    PHOTO_DATASETS,
    count_conditions,
    count_photos,
    flip_randomly,
    load_images,
    load_run_images,
    shift_randomly,
    values_per_image,
)
from .photos import has_photos, load_input_photos, load_photo, split_paths

__all__ = [
    'IMAGE_DATASETS',
    'PHOTO_DATASETS',
    'ImageCondition',
    'ImageData',
    'ImageSplit',
    'arrange_in_rows',
    'condition_of_checkpoint',
    'count_conditions',
    'count_photos',
    'flip_randomly',
    'has_photos',
    'load_images',
    'load_input_photos',
    'load_photo',
    'load_run_images',
    'name_for_file',
    'save_grid',
    'shift_randomly',
    'split_paths',
    'values_per_image',
]
