"""Colours, sizes and text styles shared by all figures."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Figure

from oa_train.files import replace_file

# Colour and marker of each ablation in every figure; safe for red-green colour blindness.
ABLATION_STYLES: Mapping[str, tuple[str, str]] = {
    "optimal": ("#0072B2", "o"),
    "mean": ("#E69F00", "s"),
    "mean_by_position": ("#56B4E9", "p"),
    "zero": ("#555555", "x"),
    "resample": ("#009E73", "^"),
    "noise": ("#CC79A7", "v"),
    "counterfactual_mean": ("#8C6D31", "P"),
    "counterfactual": ("#D55E00", "D"),
}
# Colour and marker of a corruption that is not an ablation: noise added to embeddings.
OTHERS: Mapping[str, tuple[str, str]] = {"gaussian": ("#D55E00", "v")}
# Colours and markers of ablations without a style of their own.
OTHER_STYLES = (("#7B4FA3", "<"), ("#A6761D", "h"), ("#1B1B1B", "*"))
KEPT, ABLATED = "#0072B2", "#D9D9D9"
FONT_SIZE = 9
DOTS_PER_INCH = 160


def ablation_style(name: str) -> tuple[str, str]:
    """Colour and marker of an ablation, the same in every figure."""
    return {**ABLATION_STYLES, **OTHERS}.get(name, OTHER_STYLES[sum(name.encode()) % len(OTHER_STYLES)])


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """An empty figure of this size in inches, independent of matplotlib's global state, with its title wrapped."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DOTS_PER_INCH)
    if title:
        lines = [textwrap.fill(line, max(24, int(11 * width))) for line in title.split("\n")]
        figure.suptitle("\n".join(lines), fontsize=FONT_SIZE + 1)
    return figure


def tidy(axes: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """Small tick labels, a pale grid, and no frame above and on the right."""
    axes.tick_params(labelsize=FONT_SIZE - 1)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def legend_beside(figure: Figure, place: Literal["upper", "center"] = "center", **options: Any) -> None:
    """A legend on the right of all axes, with each of their labels once."""
    drawn = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
    handles = {name: handle for of_axes in drawn for handle, name in of_axes}
    options |= {"loc": f"outside right {place}", "frameon": False, "fontsize": FONT_SIZE - 1}
    figure.legend(handles.values(), handles.keys(), **options)


def write(axes: Axes, x: float, y: float, text: str, size: int = FONT_SIZE - 2, **options: Any) -> None:
    """Write text centred at a point."""
    axes.text(x, y, text, ha="center", va="center", fontsize=size, **options)


def write_in_cells(axes: Axes, texts: Sequence[Sequence[str]], **options: Any) -> None:
    """Write a text into each cell of a heat map, white on dark cells; empty texts are left out."""
    (image,) = axes.images
    for (row, column), shade in np.ndenumerate(image.norm(np.asarray(image.get_array()))):
        if texts[row][column]:
            write(axes, column, row, texts[row][column], color="white" if shade > 0.6 else "black", **options)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure atomically, as PNG, SVG or PDF depending on the suffix of the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix("."))
    replace_file(path, drawn.getvalue())
    return path
