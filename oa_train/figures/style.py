"""Colours, sizes and marks that all figures share."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Figure

from oa_train.artefacts import replace_file

# Colour and marker of each ablation in every figure; distinguishable without red and green.
ABLATION_STYLES: Mapping[str, tuple[str, str]] = {
    "optimal": ("#0072B2", "o"),
    "mean": ("#E69F00", "s"),
    "zero": ("#555555", "x"),
    "resample": ("#009E73", "^"),
    "noise": ("#CC79A7", "v"),
    "counterfactual_mean": ("#8C6D31", "P"),
    "counterfactual": ("#D55E00", "D"),
}
# For ablations that have no style of their own.
OTHER_STYLES = (("#7B4FA3", "<"), ("#56B4E9", ">"), ("#A6761D", "h"), ("#1B1B1B", "*"))
KEPT, ABLATED = "#0072B2", "#D9D9D9"
FONT_SIZE = 9
DOTS_PER_INCH = 160
