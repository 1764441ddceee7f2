"""Constants: replacements that do not depend on the prompt.

Zero ablation, mean ablation and optimal ablation are the same thing with other numbers. The numbers of an optimal
ablation are trained: they are those with which the ablated model stays closest to the clean one (Li & Janson, 2024).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oa_train.ablations.base import Ablation, SourceValues, ValuesOf
from oa_train.artefacts import Artefact, load_artefact, save_artefact
from oa_train.batches import Batch
from oa_train.errors import ArtefactError, ConfigurationError
from oa_train.models.families import Dimensions
from oa_train.shapes import Float, Int, Tensor


@dataclass(frozen=True, eq=False)
class Constants(Ablation):
    """One vector for each source (the embedding and the components), or one for each source and position.

    Positions count from a prompt's first real token. A table of P positions gives position P - 1 and everything
    after it the last row; a table of one position is pooled: one vector wherever the source is ablated.

    Attributes:
        inputs: the embedding; used where edges are cut.
        heads: value of each head, before the attention output projection.
        mlps: output of each MLP.
        bos_token_id: token that these constants never replace at the first position.
        provenance: model, task and run that they come from, plain data.
    """

    inputs: Float[Tensor, "1 table d_model"]
    heads: Float[Tensor, "layer table head d_head"]
    mlps: Float[Tensor, "layer table d_model"]
    bos_token_id: int | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def zeros(cls, dimensions: Dimensions, bos_token_id: int | None = None, n_positions: int = 1) -> "Constants":
        """Zero ablation: the module's output is Hugging Face's zero; an MLP's output bias goes with it."""
        layers, heads = dimensions.n_layers, dimensions.n_heads
        return cls(
            inputs=torch.zeros(1, n_positions, dimensions.d_model),
            heads=torch.zeros(layers, n_positions, heads, dimensions.d_head),
            mlps=torch.zeros(layers, n_positions, dimensions.d_model),
            bos_token_id=bos_token_id,
        )

    @classmethod
    def from_tensors(
        cls, tensors: Iterable[Tensor], bos_token_id: int | None, provenance: Mapping[str, Any] | None = None
    ) -> "Constants":
        """The constants whose `tensors` these are."""
        inputs, heads, mlps = tensors
        return cls(inputs, heads, mlps, bos_token_id, provenance or {})

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, heads and MLPs; the table is dimension 1 of each."""
        return self.inputs, self.heads, self.mlps

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
        return self._map(lambda table: torch.cat([table, *[table[:, -1:]] * further], dim=1))

    def to(self, device: torch.device | str) -> "Constants":
        """Copy to a device."""
        return self._map(lambda table: table.to(device))

    def detach(self) -> "Constants":
        """A copy without gradients that later training does not change."""
        return self._map(lambda table: table.detach().clone())

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Constants":
        inputs, heads, mlps = map(function, self.tensors())
        return replace(self, inputs=inputs, heads=heads, mlps=mlps)

    def save(self, folder: str | Path) -> Path:
        """Write the constants as an artefact folder."""
        header = {"bos_token_id": self.bos_token_id, "provenance": dict(self.provenance)}
        tensors = {"inputs": self.inputs, "heads": self.heads, "mlps": self.mlps}
        return save_artefact(folder, "constants", Artefact(header, tensors))

    @classmethod
    def load(cls, folder: str | Path) -> "Constants":
        """Read constants that `save` wrote.

        Raises:
            ArtefactError: the folder is missing, damaged, or holds something else.
        """
        artefact = load_artefact(folder, "constants")
        try:
            header = artefact.header
            tables = (artefact.tensors[name] for name in ("inputs", "heads", "mlps"))
            return cls.from_tensors(tables, header["bos_token_id"], header["provenance"])
        except KeyError as problem:
            raise ArtefactError(f"{folder} does not hold constants: {problem} is missing.") from problem

    def replacements(self, batch: Batch, values_of: ValuesOf | None = None) -> SourceValues:
        """The constants laid out for the rows and positions of a batch, with gradients to them; no model is run."""
        del values_of
        return self.replacements_at(batch.positions)

    def replacements_at(self, positions: Int[Tensor, "row position"]) -> SourceValues:
        """The same for positions that were counted elsewhere."""
        if self.n_positions == 1:
            return SourceValues(*(table.unsqueeze(1) for table in self.tensors()))
        rows = positions.clamp(max=self.n_positions - 1)
        return SourceValues(*(table[:, rows] for table in self.tensors()))


class TrainableConstants(nn.Module):
    """Optimal-ablation constants as float32 parameters, for one circuit or for several at once.

    Args:
        starts: where training starts, for each circuit.
        with_inputs: whether the embedding's constants are trained too, as circuits of edges need; nodes never use
            them.
    """

    def __init__(self, starts: Sequence[Constants], with_inputs: bool = False) -> None:
        super().__init__()
        inputs, heads, mlps = (
            torch.stack(alike).detach().float() for alike in zip(*(one.tensors() for one in starts), strict=True)
        )
        self.inputs = nn.Parameter(inputs, requires_grad=with_inputs)
        self.heads = nn.Parameter(heads)
        self.mlps = nn.Parameter(mlps)
        self.bos_token_id = starts[0].bos_token_id

    def tables(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """Inputs, heads and MLPs of all circuits, which are dimension 0 of each."""
        return self.inputs, self.heads, self.mlps

    def sets(self) -> list[Constants]:
        """The constants of each circuit, sharing gradients with the parameters."""
        tables = zip(*(table.unbind() for table in self.tables()), strict=True)
        return [Constants.from_tensors(table, self.bos_token_id) for table in tables]

    @torch.no_grad()
    def load(self, constants: Constants) -> None:
        """Overwrite the constants of every circuit in place."""
        for own, given in zip(self.tables(), constants.tensors(), strict=True):
            own.copy_(given)
