"""Grids of images: pictures, and animations of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from common.errors import truncate
from common.files import write_atomically

GRID_CELL = 128  # pixels to which small images are enlarged in a grid
GRID_MARGIN = 8
IMAGES_IN_ROW = 8
GRID_FONT_SIZE = 18
FRAME_MS = 60  # how long a GIF shows each of its images


def arrange_in_rows(images: np.ndarray, n: int = IMAGES_IN_ROW) -> list[np.ndarray]:
    """Return images in rows of n. The last row may be shorter."""
    return [images[i : i + n] for i in range(0, len(images), n)]


def save_grid(
    path: str | Path,
    rows: Sequence[np.ndarray],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> None:
    """Save the picture of ``draw_grid`` as a PNG file."""
    picture = draw_grid(rows, row_labels, column_labels)
    write_atomically(Path(path), lambda temporary: picture.save(temporary, format='png'))
    tqdm.write(f'wrote {path}')


def save_gif(path: str | Path, frames: Sequence[np.ndarray], labels: Sequence[str] = ()) -> None:
    """Save an animation that runs through all frames, and back, for ever.

    Arguments:
        path: The file.
        frames: What each frame shows side by side, images (n, C, H, W) of uint8; at least two.
        labels: One for each of the n images, which are shown where these fit into a row; or none.
    """
    n_images = len(frames[0])
    labels = labels if 1 < n_images <= IMAGES_IN_ROW else ()
    cell = GRID_CELL if n_images > 1 else 2 * GRID_CELL
    pictures = []
    for images in frames:
        picture = draw_grid(arrange_in_rows(images), column_labels=labels, cell=cell)
        pictures.append(picture.quantize(dither=Image.Dither.NONE))
    first, *others = [*pictures, *pictures[-2:0:-1]]

    def write(temporary: Path) -> None:
        first.save(
            temporary,
            format='gif',
            save_all=True,
            append_images=others,
            duration=FRAME_MS,
            loop=0,
        )

    write_atomically(Path(path), write)
    tqdm.write(f'wrote {path}')


def draw_grid(
    rows: Sequence[np.ndarray],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell: int = GRID_CELL,
) -> Image.Image:
    """Draw rows of images, with labels at the left and at the top.

    Images are enlarged by a whole number, so that their pixels stay sharp.

    Arguments:
        rows: Arrays (n, C, H, W) of uint8.
        row_labels: One for each row, of one line or several, or none.
        column_labels: One for each image of the longest row, or none.
        cell: Pixels up to which small images are enlarged.
    """
    height, width = rows[0].shape[2:]
    zoom = max(1, cell // max(height, width))
    height, width = height * zoom, width * zoom
    row_step = height + GRID_MARGIN
    column_step = width + GRID_MARGIN

    font = ImageFont.load_default(GRID_FONT_SIZE)
    lines_of_rows = [[truncate(line) for line in label.split('\n')] for label in row_labels]
    label_widths = [int(font.getlength(line)) for lines in lines_of_rows for line in lines]
    left = top = GRID_MARGIN
    if row_labels:
        left += max(label_widths) + 2 * GRID_MARGIN
    if column_labels:
        top += GRID_FONT_SIZE + GRID_MARGIN

    n_columns = max(map(len, rows))
    size = (left + n_columns * column_step, top + len(rows) * row_step)
    canvas = Image.new('RGB', size, 'white')
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            corner = (left + j * column_step, top + i * row_step)
            canvas.paste(enlarge(image, zoom), corner)

    draw = ImageDraw.Draw(canvas)
    for i, lines in enumerate(lines_of_rows):
        position = (left - 2 * GRID_MARGIN, top + i * row_step + height // 2)
        draw.text(position, '\n'.join(lines), 'black', font, anchor='rm', align='right')
    for j, label in enumerate(column_labels):
        position = (left + j * column_step + width // 2, top - GRID_MARGIN - 2)
        draw.text(position, label, 'black', font, anchor='ms')
    return canvas


def enlarge(image: np.ndarray, zoom: int) -> Image.Image:
    """Return an image (C, H, W) as a picture in which each pixel is a square of ``zoom`` pixels."""
    enlarged = image.repeat(zoom, axis=1).repeat(zoom, axis=2)
    pixels = enlarged.transpose(1, 2, 0)
    if pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(pixels)
