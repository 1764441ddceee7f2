"""Colours and sizes that all figures share."""

import io
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure as Figure

from oa_train.files import replace_file

# One colour for each ablation in every figure; distinguishable without red and green.
ABLATION_COLOURS: Mapping[str, str] = {
    "optimal": "#0072B2",
    "mean": "#E69F00",
    "zero": "#555555",
    "resample": "#009E73",
    "noise": "#CC79A7",
    "counterfactual_mean": "#8C6D31",
    "counterfactual": "#D55E00",
}
ABLATION_MARKERS: Mapping[str, str] = {
    "optimal": "o",
    "mean": "s",
    "zero": "x",
    "resample": "^",
    "noise": "v",
    "counterfactual_mean": "P",
    "counterfactual": "D",
}
# For ablations that have no colour of their own.
OTHER_COLOURS, OTHER_MARKERS = ("#7B4FA3", "#56B4E9", "#A6761D", "#1B1B1B"), ("<", ">", "h", "*")
KEPT, ABLATED = "#0072B2", "#D9D9D9"
FONT_SIZE = 9
DOTS_PER_INCH = 160


def ablation_style(name: str) -> tuple[str, str]:
    """Colour and marker of an ablation, the same in every figure."""
    number = sum(name.encode()) % len(OTHER_COLOURS)
    return ABLATION_COLOURS.get(name, OTHER_COLOURS[number]), ABLATION_MARKERS.get(name, OTHER_MARKERS[number])


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that needs no display and no global state."""
    return Figure(figsize=(width, height), layout="constrained", dpi=DOTS_PER_INCH)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure whole, as PNG, SVG or PDF, as the file name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix("."))
    replace_file(path, drawn.getvalue())
    return path
