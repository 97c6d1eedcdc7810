"""Pictures of what a flow of images has learned: reconstructions, edits, interpolations.

A flow is known here by its latents, and by a function that decodes them to images.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import name_part

from .grids import save_gif, save_grid
from .image_conditions import ImageCondition, name_for_file
from .images import ImageOptions, find_attribute_names, require_attributes
from .photos import split_paths

# What --visualize draws
EDITS, OTHER_CONDITIONS = 'edits', 'other conditions'
INTERPOLATION, NEIGHBOURS, RECONSTRUCTIONS = 'interpolation', 'neighbours', 'reconstructions'
HAVE_STEPS = EDITS, INTERPOLATION, RECONSTRUCTIONS

NEIGHBOUR_TEMPERATURES = (0.1, 0.2, 0.3, 0.5)
STEPS_BETWEEN = tuple(i / 8 for i in range(9))  # of an interpolation
FRAMES_PER_STEP = 4  # of a GIF


# Maps latents (N, D), given conditions (N, Y) if any, to uint8 images (N, C, H, W)
Decode = Callable[[Tensor, Tensor | None], np.ndarray]


class PictureOptions(Protocol):
    """The options of a call that say what is drawn."""

    z_std: float
    given: str
    vis_attrs: list
    vis_alphas: list[float]
    vis_img: str
    vis_gif: bool

    @property
    def is_edit(self) -> bool:
        """Whether an image is to be moved along attributes."""


class Start(NamedTuple):
    """Images that a picture starts from.

    Attributes:
        images: uint8, (N, C, H, W).
        z: Their latents, (N, D).
        y: Their conditions, (N, Y), if there are any.
        name: What the images are called in the names of files.
    """

    images: np.ndarray
    z: Tensor
    y: Tensor | None
    name: str


# Maps n steps t to the latents (n, D) there, and to their conditions (n, Y) if any
Walk = Callable[[Sequence[float]], tuple[Tensor, Tensor | None]]


def choose_picture(request: PictureOptions, config: ImageOptions, condition: ImageCondition) -> str:
    """Return what ``--visualize`` draws, before any image is loaded.

    Raises ``UserError`` where options exclude each other, or name what there is not.
    """
    n_photos = len(split_paths(request.vis_img))
    if n_photos > 2:
        raise UserError(
            f'--vis_img has {n_photos} photos: give one, or two to interpolate between them'
        )
    if n_photos == 2 and (request.is_edit or request.given is not None):
        raise UserError(
            'two photos of --vis_img are interpolated: leave out --given, --vis_attrs and '
            '--vis_alphas, or give one photo'
        )
    if request.is_edit:
        require_attributes(config, request.vis_attrs or [])
    if request.given is not None:
        condition.parse(request.given, np.zeros(len(condition.names)))

    if request.given is not None:
        picture = OTHER_CONDITIONS
    elif n_photos == 2:
        picture = INTERPOLATION
    elif request.is_edit or find_attribute_names(config.dataset, config.data_dir):
        picture = EDITS
    else:
        picture = NEIGHBOURS if n_photos else RECONSTRUCTIONS

    is_still = picture == EDITS and len(request.vis_alphas) < 2
    if request.vis_gif and (is_still or picture not in HAVE_STEPS):
        raise UserError(
            '--vis_gif has no row of steps to show: give two photos (--vis_img=a.jpg,b.jpg), or '
            'attributes (--vis_attrs) and several --vis_alphas'
        )
    return picture


def picture_name(name: str, request: PictureOptions) -> str:
    """Return the file name of a picture, which says ``--z_std`` if there is one."""
    z_std = '' if request.z_std is None else f'_z_std_{request.z_std:g}'
    return f'{name_part(name)}{z_std}.png'


# --------------------------------------------------------------------------- walks between latents


def straight_walk(z: Tensor, dz: Tensor, y: Tensor | None) -> Walk:
    """Return the walk z + t dz, from a latent (D,) whose conditions (Y,) stay as they are."""

    def walk(steps: Sequence[float]) -> tuple[Tensor, Tensor | None]:
        t = z.new_tensor(steps)[:, None]
        return z + t * dz, None if y is None else y.expand(len(t), -1)

    return walk


def walk_between(z: Tensor, y: Tensor | None) -> Walk:
    """Return the walk from the first of two latents (2, D), at t = 0, to the second, at t = 1.

    It is an arc of a great circle (White 2016, arXiv 1609.04468), along which latents stay as far
    from 0 as samples are. The paper's straight line (sec. 6) comes nearer to 0, where images are
    plain, as at a low temperature. Conditions (2, Y) change in proportion to t.
    """
    cosine = torch.cosine_similarity(z[0], z[1], dim=0)
    angle = cosine.clamp(-1, 1).arccos()

    def walk(steps: Sequence[float]) -> tuple[Tensor, Tensor | None]:
        t = z.new_tensor(steps)[:, None]
        if angle.sin() > 1e-3:
            weights = ((1 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()
        else:
            weights = 1 - t, t  # of images that are the same
        between = None if y is None else torch.lerp(y[:1], y[1:], t)
        return weights[0] * z[0] + weights[1] * z[1], between

    return walk


def draw_edits(
    decode: Decode,
    start: Start,
    dz: Tensor,
    chosen: Sequence[int],
    names: Sequence[str],
    folder: Path,
    request: PictureOptions,
) -> None:
    """Save a grid of edits z + alpha * dz of an image: a row per attribute, a column per alpha.

    Arguments:
        decode: Maps latents to images.
        start: The first one of its images is edited.
        dz: The direction of each attribute, (A, D).
        chosen: The indices of the attributes that are shown.
        names: The names of all A attributes.
        folder: Where the picture is saved.
        request: The options of the call.
    """
    y = None if start.y is None else start.y[0]
    walks = [straight_walk(start.z[0], dz[i].to(start.z), y) for i in chosen]
    row_labels = [names[i] if names[i] == str(i) else f'{i} {names[i]}' for i in chosen]
    column_labels = [f'{alpha:+g}' if alpha else 'unchanged' for alpha in request.vis_alphas]
    change = f'attr_{",".join(map(str, chosen)) if request.vis_attrs else "all"}'
    path = folder / picture_name(f'manipulated_{start.name}_{change}', request)
    save_walks(decode, walks, request.vis_alphas, path, request.vis_gif, row_labels, column_labels)


def draw_interpolation(decode: Decode, start: Start, folder: Path, request: PictureOptions) -> None:
    """Save a row for each pair of images, which leads from one to the other.

    A single image leads nowhere.
    """
    if len(start.z) < 2:
        print('note: there is a single image, and none to interpolate to')
        return
    walks = []
    for i in range(0, len(start.z) - 1, 2):
        pair = slice(i, i + 2)
        walks.append(walk_between(start.z[pair], None if start.y is None else start.y[pair]))
    path = folder / picture_name(f'interpolation_{start.name}', request)
    save_walks(decode, walks, STEPS_BETWEEN, path, request.vis_gif)


def save_walks(
    decode: Decode,
    walks: Sequence[Walk],
    steps: Sequence[float],
    path: Path,
    with_gif: bool,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> None:
    """Save a grid with a row of images for each walk and, if asked for, an animation."""
    n_frames = FRAMES_PER_STEP if with_gif else 1  # for each step
    n_steps = len(steps) - 1
    places = np.linspace(0, n_steps, n_frames * n_steps + 1)
    finer = np.interp(places, np.arange(len(steps)), steps).tolist()
    rows = [decode(*walk(finer)) for walk in walks]

    save_grid(path, [row[::n_frames] for row in rows], row_labels, column_labels)
    if with_gif:
        save_gif(path.with_suffix('.gif'), list(np.stack(rows, axis=1)), row_labels)


# --------------------------------------------------------------------------------------- other rows


def draw_reconstructions(
    decode: Decode, start: Start, folder: Path, request: PictureOptions
) -> None:
    """Save images above what their latents are decoded to."""
    rows = [start.images, decode(start.z, start.y)]
    path = folder / picture_name(f'reconstructed_{start.name}', request)
    save_grid(path, rows, ['images', 'decoded'])


def draw_neighbours(
    decode: Decode, start: Start, noise: Tensor, folder: Path, request: PictureOptions
) -> None:
    """Save a photo, its reconstruction, and the images of latents near that of the photo.

    At temperature T, a latent z has neighbours sqrt(1 - T^2) z + T e, with noise e of N(0, I),
    which is of shape (n, D). So where z is a sample of the prior, its neighbours are samples, too.
    """
    y = None if start.y is None else start.y.expand(len(noise), -1)
    rows = [np.concatenate([start.images, decode(start.z, start.y)])]
    labels = ['photo, decoded']
    for t in NEIGHBOUR_TEMPERATURES:
        rows.append(decode(math.sqrt(1 - t * t) * start.z + t * noise, y))
        labels.append(f'T = {t:g}')
    save_grid(folder / picture_name(f'neighbours_of_{start.name}', request), rows, labels)


def draw_other_conditions(
    decode: Decode,
    start: Start,
    condition: ImageCondition,
    folder: Path,
    request: PictureOptions,
) -> None:
    """Save a grid of images and, below each of them, its latent decoded given ``--given``.

    An image keeps the attributes that ``--given`` leaves out.
    """
    assert start.y is not None
    own = start.y.cpu().numpy()
    others = np.stack([condition.parse(request.given, y) for y in own])
    other_y = torch.tensor(others, device=start.y.device)

    rows = [decode(start.z, start.y), decode(start.z, other_y)]
    row_labels = ['unchanged', 'given ' + request.given.replace(',', '\n')]
    column_labels = list(map(condition.label, own)) if condition.is_class else []
    name = picture_name(f'manipulated_{start.name}_{name_for_file(request.given)}', request)
    save_grid(folder / name, rows, row_labels, column_labels)
