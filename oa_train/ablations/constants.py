"""Constants: replacements that do not depend on the prompt.

Zero ablation, mean ablation and optimal ablation are the same thing with other numbers. The numbers of an optimal
ablation are trained: they are those with which the ablated model stays closest to the clean one (Li & Janson, 2024).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oa_train.ablations.base import Ablation, NodeValues, ValuesOf
from oa_train.artefacts import Artefact, load_artefact, save_artefact
from oa_train.batches import Batch
from oa_train.errors import ArtefactError, ConfigurationError
from oa_train.models.families import Dimensions
from oa_train.shapes import Float, Int, Tensor


@dataclass(frozen=True, eq=False)
class Constants(Ablation):
    """One vector for each component, or one for each component and position.

    Positions count from a prompt's first real token. A table of P positions gives position P - 1 and everything
    after it the last row; a table of one position is pooled: one vector wherever the component is ablated.

    Attributes:
        heads: value of each head, before the attention output projection.
        mlps: output of each MLP.
        bos_token_id: token that these constants never replace at the first position.
        provenance: model, task and run that they come from, plain data.
    """

    heads: Float[Tensor, "layer table head d_head"]
    mlps: Float[Tensor, "layer table d_model"]
    bos_token_id: int | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def zeros(cls, dimensions: Dimensions, bos_token_id: int | None = None, n_positions: int = 1) -> "Constants":
        """Zero ablation: the module's output is Hugging Face's zero; an MLP's output bias goes with it."""
        layers, heads = dimensions.n_layers, dimensions.n_heads
        return cls(
            heads=torch.zeros(layers, n_positions, heads, dimensions.d_head),
            mlps=torch.zeros(layers, n_positions, dimensions.d_model),
            bos_token_id=bos_token_id,
        )

    @property
    def n_positions(self) -> int:
        """Rows of the table; 1 when the constants are pooled."""
        return self.heads.shape[1]

    def with_positions(self, n_positions: int) -> "Constants":
        """The same constants in a larger table, whose further positions get what the last one has.

        Args:
            n_positions: size of the table.

        Raises:
            ConfigurationError: it is smaller than this one.
        """
        further = n_positions - self.n_positions
        if further < 0:
            raise ConfigurationError(
                f"These constants tell {self.n_positions} positions apart and cannot be put into a table of "
                f"{n_positions}; give at least as many."
            )
        heads = torch.cat([self.heads, self.heads[:, -1:].expand(-1, further, -1, -1)], dim=1)
        mlps = torch.cat([self.mlps, self.mlps[:, -1:].expand(-1, further, -1)], dim=1)
        return replace(self, heads=heads, mlps=mlps)

    def to(self, device: torch.device | str) -> "Constants":
        """Copy to a device."""
        return replace(self, heads=self.heads.to(device), mlps=self.mlps.to(device))

    def detach(self) -> "Constants":
        """A copy without gradients that later training does not change."""
        return replace(self, heads=self.heads.detach().clone(), mlps=self.mlps.detach().clone())

    def save(self, folder: str | Path) -> Path:
        """Write the constants as an artefact folder."""
        header = {"bos_token_id": self.bos_token_id, "provenance": dict(self.provenance)}
        return save_artefact(folder, "constants", Artefact(header, {"heads": self.heads, "mlps": self.mlps}))

    @classmethod
    def load(cls, folder: str | Path) -> "Constants":
        """Read constants that `save` wrote.

        Raises:
            ArtefactError: the folder is missing, damaged, or holds something else.
        """
        artefact = load_artefact(folder, "constants")
        try:
            header = artefact.header
            tensors = artefact.tensors
            return cls(tensors["heads"], tensors["mlps"], header["bos_token_id"], header["provenance"])
        except KeyError as problem:
            raise ArtefactError(f"{folder} does not hold constants: {problem} is missing.") from problem

    def replacements(self, batch: Batch, values_of: ValuesOf | None = None) -> NodeValues:
        """The constants laid out for the rows and positions of a batch, with gradients to them; no model is run."""
        del values_of
        return self.replacements_at(batch.positions)

    def replacements_at(self, positions: Int[Tensor, "row position"]) -> NodeValues:
        """The same for positions that were counted elsewhere."""
        if self.n_positions == 1:
            return NodeValues(self.heads.unsqueeze(1), self.mlps.unsqueeze(1))
        rows = positions.clamp(max=self.n_positions - 1)
        return NodeValues(self.heads[:, rows], self.mlps[:, rows])


class TrainableConstants(nn.Module):
    """Optimal-ablation constants as float32 parameters, for one circuit or for several at once.

    Args:
        starts: where training starts, for each circuit.
    """

    def __init__(self, starts: Sequence[Constants]) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.stack([start.heads.detach().float() for start in starts]))
        self.mlps = nn.Parameter(torch.stack([start.mlps.detach().float() for start in starts]))
        self.bos_token_id = starts[0].bos_token_id

    def sets(self) -> list[Constants]:
        """The constants of each circuit, sharing gradients with the parameters."""
        tables = zip(self.heads.unbind(), self.mlps.unbind(), strict=True)
        return [Constants(heads, mlps, self.bos_token_id) for heads, mlps in tables]

    @torch.no_grad()
    def load(self, constants: Constants) -> None:
        """Overwrite the constants of every circuit in place."""
        self.heads.copy_(constants.heads)
        self.mlps.copy_(constants.mlps)
