"""Figures of data sets and of rows of numbers. (Grids of images alone are drawn by images.py.)"""

import textwrap

import numpy as np
import torch
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from common.errors import truncate
from common.files import write_atomically

from .images import draw_grid

rcParams['text.parse_math'] = (
    False  # a column's name is its name, with whatever dollars there are in it
)


def cell_centres(extent, n):
    """-> the centres (n^2, 2) of n x n cells of a plane, row by row; extent as for draw_planes"""
    left, right, bottom, top = extent
    middles = (np.arange(n) + 0.5) / n
    return np.stack(
        np.meshgrid(left + middles * (right - left), bottom + middles * (top - bottom)), 2
    ).reshape(-1, 2)


def histogram(rows, extent, n):
    """How many of the rows (N, 2) lie in each of n x n cells of a plane -> (n, n); extent as for draw_planes"""
    return np.histogram2d(*rows.T, n, (extent[:2], extent[2:]))[0].T


def draw_panels(panels, columns, extent):
    """{title: values on a regular grid (n, m)} -> matplotlib figure, the panels side by side

    columns: names of the two axes; extent: x and y at the grid's edges, (left, right, bottom, top).
    """
    figure = Figure((4 * len(panels), 4.3), layout='constrained')
    square = np.isclose(extent[1] - extent[0], extent[3] - extent[2])
    for axes, (title, values) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items()
    ):
        axes.imshow(
            values,
            cmap='inferno',
            origin='lower',
            extent=extent,
            aspect='equal' if square else 'auto',
            interpolation='nearest',
            vmin=0,
            vmax=np.quantile(values, 0.998),
        )
        axes.set(title=truncate(title), xlabel=truncate(columns[0]), ylabel=truncate(columns[1]))
    return figure


def save_figure(path, figure):
    write_atomically(path, lambda temporary: figure.savefig(temporary, format='png', dpi=120))
    print(f'wrote {path}')


def draw_density(data, samples, density, title):
    """Rows of two columns -> matplotlib figure of the target, the learned density(points (N, 2)), and samples (N, 2)"""
    n = 300
    rows = (
        data.draw(np.random.default_rng(0), 10**6)
        if data.draw
        else data.test * data.std + data.mean
    )
    extent = (
        (-4.2, 4.2, -4.2, 4.2) if data.draw else np.stack([rows.min(0), rows.max(0)], 1).ravel()
    )
    points = cell_centres(extent, n)
    target = (
        histogram(rows, extent, 200 if data.draw else 40)
        if data.energy is None
        else (-data.energy(torch.from_numpy(points))).exp().numpy().reshape(n, n)
    )
    panels = {
        'target' if data.draw else 'test data': target,
        title: density(points).reshape(n, n),
        'samples': histogram(samples, extent, 120),
    }
    return draw_panels(panels, data.columns, extent)


def draw_pairs(real, drawn, columns, title):
    """Rows (N, k) of data and of a model's samples -> matplotlib figure of k x k panels: each pair of columns, the data's
    below the diagonal in grey and the samples' above it in orange, and histograms of both on the diagonal"""
    k = len(columns)
    low, high = np.quantile(real, 0.002, axis=0), np.quantile(real, 0.998, axis=0)
    low, high = low - 0.1 * (high - low), high + 0.1 * (high - low)
    figure = Figure((max(5, 1.7 * k + 0.6), 1.7 * k + 1.2), layout='constrained')
    for (i, j), axes in np.ndenumerate(figure.subplots(k, k, squeeze=False)):
        axes.set(xticks=[], yticks=[], xlim=(low[j], high[j]))
        if i == j:
            bins = np.linspace(low[i], high[i], 30)
            axes.hist(real[:, i], bins, density=True, color='0.75')
            axes.hist(
                drawn[:, i], bins, density=True, color='tab:orange', histtype='step', linewidth=1.5
            )
        else:
            rows, colour = (real, '0.4') if i > j else (drawn, 'tab:orange')
            axes.scatter(rows[:, j], rows[:, i], 4, colour, alpha=0.6, linewidths=0)
            axes.set_ylim(low[i], high[i])
        axes.tick_params(labelsize=6)
        if i == k - 1:
            axes.set_xlabel(truncate(columns[j], 24), fontsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(2))
        if j == 0 and k > 1:
            axes.set_ylabel(truncate(columns[i], 24), fontsize=8)
            axes.yaxis.set_major_locator(
                MaxNLocator(2) if i else NullLocator()
            )  # a histogram's height means nothing
    figure.suptitle(title)
    return figure


def draw_images(images, attributes, names, title):
    """Images (N, C, H, W) and their attributes (N, A) -> matplotlib figure: a grid of them, a row a class where each
    has one class, and how frequent each attribute is"""
    classes = len(names) and (attributes.sum(1) == 1).all()
    n_across = min(10, len(images))
    shown = (
        [np.flatnonzero(attributes[:, k])[:10] for k in range(len(names))]
        if classes
        else np.arange(min(8, len(images) // n_across) * n_across).reshape(-1, n_across)
    )
    grid = np.asarray(
        draw_grid(
            [images[index] for index in shown if len(index)],
            [name for name, index in zip(names, shown) if len(index)] if classes else (),
        )
    )
    figure = Figure((14 if len(names) else 8, 7), layout='constrained')
    ratios = [3, 2] if len(names) else [1]
    left, *right = figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
    left.imshow(grid)
    left.axis('off')
    for axes in right:
        axes.barh(
            range(len(names)),
            attributes.mean(0),
            color='0.6',
            tick_label=[truncate(name) for name in names],
        )
        axes.set(xlabel='frequency', ylim=(len(names) - 0.5, -0.5))
        axes.tick_params(labelsize=9 if len(names) <= 20 else 6)
    figure.suptitle(title)
    return figure


def draw_table(values, columns, title):
    """Rows (N, D) -> matplotlib figure: the histogram of each column, without its outer 1%, and the correlations"""
    n_across = int(np.ceil(np.sqrt(len(columns))))
    figure = Figure((12, 6), layout='constrained')
    left, right = figure.subfigures(1, 2)
    panels = left.subplots(-(-len(columns) // n_across), n_across, squeeze=False).ravel()
    for axes in panels:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for axes, name, column in zip(panels, columns, values.T):
        column = column[np.isfinite(column)]
        if len(column):
            axes.hist(column, np.linspace(*np.quantile(column, [0.005, 0.995]), 41), color='0.6')
        axes.set_xlabel(textwrap.shorten(str(name), 80 // n_across, placeholder='…'), fontsize=7)
    axes = right.subplots()
    whole = values[np.isfinite(values).all(1)]
    with np.errstate(invalid='ignore', divide='ignore'):
        correlation = (
            np.atleast_2d(np.corrcoef(whole, rowvar=False))
            if len(whole) > 1
            else np.full((1, 1), np.nan)
        )
    right.colorbar(axes.imshow(correlation, cmap='RdBu_r', vmin=-1, vmax=1), ax=axes)
    axes.set(title='correlation', xticks=[], yticks=[])
    figure.suptitle(title)
    return figure
