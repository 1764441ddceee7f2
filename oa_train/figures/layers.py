"""Axes whose horizontal direction is the layers of a model."""

from collections.abc import Iterable, Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from oa_train.figures.style import FONT_SIZE, new_figure, tidy

# Two names of a panel: those of its row and of its column.
Place = tuple[str, str]


def over_layers(axes: Axes) -> None:
    """Prepare axes for lines over layers, which are whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)


def layer_panels(
    places: Iterable[Place], labels: Mapping[str, str], layer: str, title: str
) -> tuple[Figure, dict[Place, Axes]]:
    """A grid of panels over layers, each with a line at 0, in order of appearance of the names of rows and columns.

    `labels` has the label of the vertical axes of each row, and `layer` is that of the horizontal ones.
    """
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*places, strict=True))
    figure = new_figure(1.3 + 2.9 * len(columns), 0.9 + 2.1 * len(rows), title)
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat:
        axes.axhline(0, color="#555555", linewidth=0.7, zorder=0)
        over_layers(axes)
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(column, fontsize=FONT_SIZE)
    for axes, row in zip(grid[:, 0], rows, strict=True):
        axes.set_ylabel(labels[row], fontsize=FONT_SIZE - 1)
    for axes in grid[-1]:
        axes.set_xlabel(layer, fontsize=FONT_SIZE - 1)
    return figure, {(row, column): grid[i, j] for i, row in enumerate(rows) for j, column in enumerate(columns)}
