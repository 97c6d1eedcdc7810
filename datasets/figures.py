"""Figures of rows of numbers. (Grids of images are drawn by images.py.)"""
import numpy as np
from matplotlib.figure import Figure


def draw_planes(panels, columns, extent):
    """{title: values on a regular grid (n, m)} -> matplotlib figure, the panels side by side

    columns: names of the two axes; extent: x and y at the grid's edges, (left, right, bottom, top).
    """
    figure = Figure((4 * len(panels), 4.3), layout='constrained')
    square = np.isclose(extent[1] - extent[0], extent[3] - extent[2])
    for axes, (title, values) in zip(figure.subplots(1, len(panels)), panels.items()):
        axes.imshow(values, cmap='inferno', origin='lower', extent=extent, aspect='equal' if square else 'auto',
                    interpolation='nearest', vmin=0, vmax=np.quantile(values, 0.998))
        axes.set(title=title, xlabel=columns[0], ylabel=columns[1])
    return figure


def draw_pairs(real, drawn, columns, title):
    """Rows (N, k) of data and of a model's samples -> matplotlib figure of k x k panels: each pair of columns, the data's
    below the diagonal in grey and the samples' above it in orange, and histograms of both on the diagonal"""
    k = len(columns)
    low, high = np.quantile(real, 0.002, axis=0), np.quantile(real, 0.998, axis=0)
    low, high = low - 0.1 * (high - low), high + 0.1 * (high - low)
    figure = Figure((1.7 * k + 0.6, 1.7 * k + 0.8), layout='constrained')
    for (i, j), axes in np.ndenumerate(figure.subplots(k, k, squeeze=False)):
        axes.set(xticks=[], yticks=[], xlim=(low[j], high[j]))
        if i == j:
            bins = np.linspace(low[i], high[i], 30)
            axes.hist(real[:, i], bins, density=True, color='0.75')
            axes.hist(drawn[:, i], bins, density=True, color='tab:orange', histtype='step', linewidth=1.5)
        else:
            rows, colour = (real, '0.4') if i > j else (drawn, 'tab:orange')
            axes.scatter(rows[:, j], rows[:, i], 4, colour, alpha=0.6, linewidths=0)
            axes.set_ylim(low[i], high[i])
        if i == k - 1:
            axes.set_xlabel(columns[j], fontsize=8)
        if j == 0:
            axes.set_ylabel(columns[i], fontsize=8)
    figure.suptitle(title)
    return figure
