"""The data sets, apart from the algorithms. Loaders return uint8 images and boolean attributes as numpy arrays."""
from .files import UserError
from .images import IMAGE_DATASETS, ImageData, ImageSplit, draw_grid, load_images, load_photo, shift_randomly

__all__ = ['IMAGE_DATASETS', 'UserError', 'ImageData', 'ImageSplit', 'draw_grid', 'load_images', 'load_photo',
           'shift_randomly']
