"""Colours, sizes and text styles shared by all figures."""

import io
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, independent of a display and of matplotlib's global state."""
    return Figure(figsize=(width, height), layout="constrained", dpi=DOTS_PER_INCH)


def set_title(figure: Figure, title: str) -> None:
    """Set a title over the whole figure, wrapped to its width."""
    characters = max(24, int(11 * figure.get_figwidth()))
    lines = [textwrap.fill(line, characters) for line in title.split("\n")]
    figure.suptitle("\n".join(lines), fontsize=FONT_SIZE + 1)


def write(axes: Axes, x: float, y: float, text: str, size: int = FONT_SIZE - 2, **options: Any) -> None:
    """Write text centred at a point."""
    axes.text(x, y, text, ha="center", va="center", fontsize=size, **options)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure atomically, as PNG, SVG or PDF depending on the suffix of the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix("."))
    replace_file(path, drawn.getvalue())
    return path
