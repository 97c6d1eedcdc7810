"""Figures of data sets, of densities and of rows of numbers.

Grids of images without anything beside them are drawn by ``grids.py``.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, NullLocator

from common.errors import truncate
from common.files import write_atomically

from .grids import draw_grid
from .tabular import TableData

rcParams['text.parse_math'] = False  # a dollar in the name of a column is just a dollar

# A rectangle of the plane: (left, right, bottom, top).
Extent = tuple[float, float, float, float]

TOY_EXTENT = (-4.2, 4.2, -4.2, 4.2)
N_TOY_SAMPLES = 10**6  # the histogram of a two-dimensional problem stands for its density
N_IMAGES_ACROSS = 10
N_IMAGES_DOWN = 8


def save_figure(path: Path, figure: Figure) -> None:
    """Save a figure as a PNG, and say so."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format='png', dpi=120))
    print(f'wrote {path}')


# ------------------------------------------------------------------------- functions of the plane


def draw_density(
    data: TableData,
    samples: np.ndarray,
    density: Callable[[np.ndarray], np.ndarray],
    title: str,
) -> Figure:
    """Draw the target, the density of a model, and samples of it, side by side.

    Arguments:
        data: a table of two columns.
        samples: rows (N, 2) in the table's own units.
        density: the density at points (n, 2), of shape (n,).
        title: the title of the density's panel.
    """
    n_cells = 300
    if data.sampler is not None:
        rows = data.sampler(np.random.default_rng(0), N_TOY_SAMPLES)
        extent, n_bins = TOY_EXTENT, 200
        target_title = 'target'
    else:
        assert data.test is not None, 'a table without a sampler has rows'
        rows = data.to_own_units(data.test)
        extent, n_bins = bounding_box(rows), 40
        target_title = 'test data, all conditions' if data.conditions else 'test data'

    points = cell_centres(extent, n_cells)
    if data.energy is None:
        target = histogram(rows, extent, n_bins)
    else:
        unnormalised = (-data.energy(torch.from_numpy(points))).exp()
        target = unnormalised.numpy().reshape(n_cells, n_cells)

    panels = {
        target_title: target,
        title: density(points).reshape(n_cells, n_cells),
        'samples': histogram(samples, extent, 120),
    }
    return draw_panels(panels, data.columns, extent)


def draw_panels(panels: Mapping[str, np.ndarray], columns: Sequence[str], extent: Extent) -> Figure:
    """Draw functions of the same rectangle side by side.

    Arguments:
        panels: the values of each function on a regular grid (n, m), by title.
        columns: the names of the two axes.
        extent: the rectangle that the grid covers.
    """
    left, right, bottom, top = extent
    is_square = np.isclose(right - left, top - bottom)
    x_name, y_name = truncate(columns[0]), truncate(columns[1])

    figure = Figure((4 * len(panels), 4.3), layout='constrained')
    row_of_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, values) in zip(row_of_axes, panels.items()):
        axes.imshow(
            values,
            cmap='inferno',
            origin='lower',
            extent=extent,
            aspect='equal' if is_square else 'auto',
            interpolation='nearest',
            vmin=0,
            vmax=np.quantile(values, 0.998),
        )
        axes.set(title=wrap(title), xlabel=x_name, ylabel=y_name)
    return figure


def wrap(title: str) -> str:
    """Return a title in at most two lines of 40 characters."""
    return '\n'.join(textwrap.wrap(title, 40, max_lines=2, placeholder=' …'))


def bounding_box(points: np.ndarray) -> Extent:
    """Return the smallest rectangle that holds all points (N, 2)."""
    left, bottom = points.min(axis=0)
    right, top = points.max(axis=0)
    return left, right, bottom, top


def cell_centres(extent: Extent, n: int) -> np.ndarray:
    """Return the centres (n * n, 2) of n x n cells of a rectangle, row by row."""
    left, right, bottom, top = extent
    middles = (np.arange(n) + 0.5) / n
    x = left + middles * (right - left)
    y = bottom + middles * (top - bottom)
    centres = np.stack(np.meshgrid(x, y), axis=2)
    return centres.reshape(-1, 2)


def histogram(points: np.ndarray, extent: Extent, n: int) -> np.ndarray:
    """Count how many points (N, 2) are in each of n x n cells of a rectangle; return (n, n)."""
    x, y = points.T
    ranges = extent[:2], extent[2:]
    counts, _, _ = np.histogram2d(x, y, n, ranges)
    return counts.T


# ----------------------------------------------------------------------- one column, given others


def draw_curves(
    x: np.ndarray, curves: Mapping[str, np.ndarray], values: np.ndarray, column: str, title: str
) -> Figure:
    """Draw densities of one column over a histogram of data.

    Arguments:
        x: the values (n,) at which the densities are known.
        curves: each density (n,), by its label.
        values: the data (N,), which need not have the conditions of any of the densities.
        column: the name of the column.
        title: the title of the figure.
    """
    figure = Figure((7, 4.3), layout='constrained')
    axes = figure.subplots()
    bins = np.linspace(x[0], x[-1], 60).tolist()
    axes.hist(values, bins, density=True, color='0.85', label='data, all conditions')
    for label, density in curves.items():
        axes.plot(x, density, label=truncate(label))
    axes.set(xlabel=truncate(column), ylabel='density', title=wrap(title), xlim=(x[0], x[-1]))
    axes.legend(frameon=False)
    return figure


def draw_fan(
    x: np.ndarray,
    quantiles: np.ndarray,
    levels: Sequence[float],
    points: tuple[np.ndarray, np.ndarray],
    names: tuple[str, str],
    title: str,
) -> Figure:
    """Draw how the quantiles of one column depend on a condition.

    Arguments:
        x: values of the condition (n,), in increasing order.
        quantiles: the quantiles of the column given each of them, (n, k).
        levels: the k levels of the quantiles, in increasing order and symmetric about 0.5.
        points: data to draw behind: the conditions (N,) and the values (N,) of the column.
        names: of the condition and of the column.
        title: the title of the figure.
    """
    figure = Figure((7, 4.6), layout='constrained')
    axes = figure.subplots()
    k = len(levels)
    for i in range(k // 2):
        share = levels[k - 1 - i] - levels[i]
        darkness = (i + 1) / (k // 2 + 1)
        low, high = quantiles[:, i], quantiles[:, k - 1 - i]
        colour = colormaps['Oranges'](0.7 * darkness)
        axes.fill_between(
            x, low, high, color=colour, linewidth=0, label=f'{share:.0%} of the density'
        )
    axes.plot(x, quantiles[:, k // 2], color='tab:red', label='median')
    axes.scatter(*points, 8, '0.3', alpha=0.5, linewidths=0, label='data')
    # a few values far out would leave no room for all others
    low, high = np.quantile(np.append(points[1], quantiles), [0.005, 0.995])
    margin = 0.1 * (high - low)
    axes.set(
        xlabel=truncate(names[0]),
        ylabel=truncate(names[1]),
        title=wrap(title),
        xlim=(x[0], x[-1]),
        ylim=(low - margin, high + margin),
    )
    axes.legend(frameon=False)
    return figure


# -------------------------------------------------------------------------------- pairs of columns


def draw_pairs(
    real: np.ndarray, generated: np.ndarray, columns: Sequence[str], title: str
) -> Figure:
    """Draw each pair of k columns in a grid of k x k panels, for data and samples of a model.

    The data are below the diagonal in grey, the samples above it in orange, and histograms of both
    are on the diagonal.

    Arguments:
        real: rows (N, k) of data.
        generated: rows (M, k) of samples.
        columns: the names of the columns.
        title: the title of the figure.
    """
    k = len(columns)
    low, high = np.quantile(real, [0.005, 0.995], axis=0)
    margin = 0.15 * (high - low)
    low, high = low - margin, high + margin

    width, height = max(5, 1.7 * k + 0.6), 1.7 * k + 1.2
    figure = Figure((width, height), layout='constrained')
    grid = figure.subplots(k, k, squeeze=False)
    for (i, j), axes in np.ndenumerate(grid):
        axes.set(xticks=[], yticks=[])
        axes.set_xlim(low[j], high[j])
        if i == j:
            bins = np.linspace(low[i], high[i], 30).tolist()
            draw_two_histograms(axes, real[:, i], generated[:, i], bins)
        else:
            rows, colour = (real, '0.4') if i > j else (generated, 'tab:orange')
            x, y = rows[:, j], rows[:, i]
            axes.scatter(x, y, 4, colour, alpha=0.6, linewidths=0)
            axes.set_ylim(low[i], high[i])
        label_outer_axes(axes, i, j, columns)
    figure.suptitle(title)
    return figure


def draw_two_histograms(
    axes: Axes, real: np.ndarray, generated: np.ndarray, bins: list[float]
) -> None:
    """Draw the histograms of a column of data and of samples, one over the other."""
    axes.hist(real, bins, density=True, color='0.75')
    axes.hist(generated, bins, density=True, color='tab:orange', histtype='step', linewidth=1.5)


def label_outer_axes(axes: Axes, i: int, j: int, columns: Sequence[str]) -> None:
    """Label panel (i, j) of a grid where it is in the last row or in the first column."""
    k = len(columns)
    axes.tick_params(labelsize=6)
    if i == k - 1:
        axes.set_xlabel(truncate(columns[j], 24), fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(2))
    if j == 0 and k > 1:
        axes.set_ylabel(truncate(columns[i], 24), fontsize=8)
        is_histogram = i == 0  # its height is in other units than the label says
        axes.yaxis.set_major_locator(NullLocator() if is_histogram else MaxNLocator(2))


# ------------------------------------------------------------------------------------- data sets


def draw_images(
    images: np.ndarray, attributes: np.ndarray, names: Sequence[str], title: str
) -> Figure:
    """Draw some images of a data set and how frequent each attribute is.

    Where each image has exactly one attribute, its class, there is a row of images per class.

    Arguments:
        images: the images (N, C, H, W) uint8.
        attributes: which attributes each image has, (N, A) bool.
        names: the names of the A attributes.
        title: the title of the figure.
    """
    grid = draw_sample_images(images, attributes, names)
    figure = Figure((14 if len(names) else 8, 7), layout='constrained')
    width_ratios = [3, 2] if len(names) else [1]
    row_of_axes = figure.subplots(1, len(width_ratios), squeeze=False, width_ratios=width_ratios)[0]

    row_of_axes[0].imshow(grid)
    row_of_axes[0].axis('off')
    if len(names):
        draw_frequencies(row_of_axes[1], attributes.mean(axis=0), names)
    figure.suptitle(title)
    return figure


def draw_sample_images(
    images: np.ndarray, attributes: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    """Draw the first images of a data set, or of each of its classes, as one picture (H, W, 3)."""
    has_classes = len(names) > 0 and (attributes.sum(axis=1) == 1).all()
    if not has_classes:
        n_across = min(N_IMAGES_ACROSS, len(images))
        n_down = min(N_IMAGES_DOWN, len(images) // n_across)
        shown = images[: n_down * n_across]
        rows = list(shown.reshape(n_down, n_across, *images.shape[1:]))
        return np.asarray(draw_grid(rows))

    rows, labels = [], []
    for is_member, name in zip(attributes.T, names):
        index = np.flatnonzero(is_member)[:N_IMAGES_ACROSS]
        if len(index):
            rows.append(images[index])
            labels.append(name)
    return np.asarray(draw_grid(rows, labels))


def draw_frequencies(axes: Axes, frequencies: np.ndarray, names: Sequence[str]) -> None:
    """Draw a bar per attribute, from top to bottom."""
    n = len(names)
    labels = [truncate(name) for name in names]
    axes.barh(range(n), frequencies, color='0.6', tick_label=labels)
    axes.set(xlabel='frequency', ylim=(n - 0.5, -0.5))
    axes.tick_params(labelsize=9 if n <= 20 else 6)


def draw_table(values: np.ndarray, columns: Sequence[str], title: str) -> Figure:
    """Draw the histogram of each column of a table (N, D), and how its columns are correlated.

    Values may be missing or infinite.
    """
    figure = Figure((12, 6), layout='constrained')
    left, right = figure.subfigures(1, 2, squeeze=False)[0]
    draw_histograms(left, values, columns)
    draw_correlations(right, values)
    figure.suptitle(title)
    return figure


def draw_histograms(figure: SubFigure, values: np.ndarray, columns: Sequence[str]) -> None:
    """Draw the histogram of each column, without the smallest and the largest 0.5%."""
    n_across = int(np.ceil(np.sqrt(len(columns))))
    n_down = -(-len(columns) // n_across)
    panels = figure.subplots(n_down, n_across, squeeze=False).ravel()
    for axes in panels:
        axes.set(xticks=[], yticks=[], frame_on=False)

    for axes, name, column in zip(panels, columns, values.T):
        column = column[np.isfinite(column)]
        if len(column):
            low, high = np.quantile(column, [0.005, 0.995])
            axes.hist(column, np.linspace(low, high, 41), color='0.6')
        label = textwrap.shorten(str(name), 80 // n_across, placeholder='…')
        axes.set_xlabel(label, fontsize=7)


def draw_correlations(figure: SubFigure, values: np.ndarray) -> None:
    """Draw the correlation matrix of the rows (N, D) that have all their values."""
    axes = figure.subplots()
    complete = values[np.isfinite(values).all(axis=1)]
    if len(complete) > 1:
        with np.errstate(invalid='ignore', divide='ignore'):  # of constant columns
            correlation = np.atleast_2d(np.corrcoef(complete, rowvar=False))
    else:
        correlation = np.full((1, 1), np.nan)
    picture = axes.imshow(correlation, cmap='RdBu_r', vmin=-1, vmax=1)
    figure.colorbar(picture, ax=axes)
    axes.set(title='correlation', xticks=[], yticks=[])
