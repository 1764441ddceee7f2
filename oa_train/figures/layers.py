"""Axes with the layers of a model in the horizontal direction."""

from collections.abc import Iterable, Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from oa_train.figures.style import FONT_SIZE, new_figure, tidy

# Names of a panel's row and column.
Place = tuple[str, str]


def over_layers(axes: Axes) -> None:
    """Prepare axes for lines over layers, which are whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)


def layer_panels(
    places: Iterable[Place], labels: Mapping[str, str], layer: str, title: str
) -> tuple[Figure, dict[Place, Axes]]:
    """A grid of panels over layers, each with a line at 0; rows and columns are in order of first appearance.

    `labels` has the label of the vertical axes by row, and `layer` is the label of the horizontal axes.
    """
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*places, strict=True))
    figure = new_figure(1.3 + 2.9 * len(columns), 0.9 + 2.1 * len(rows), title)
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey="row")
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
