"""The values that replace components in a run."""

from dataclasses import dataclass
from typing import Literal

from oa_train.shapes import Float, Tensor

AblationKind = Literal["zero", "mean", "optimal"]


@dataclass(frozen=True, eq=False)
class Replacements:
    """A value for every component, row and position; dimensions of size 1 stand for all.

    Attributes:
        heads: replaces each head's value, the input of the attention output projection.
        mlps: replaces each MLP's output.
    """

    heads: Float[Tensor, "layer row_or_1 position_or_1 head d_head"]
    mlps: Float[Tensor, "layer row_or_1 position_or_1 d_model"]
