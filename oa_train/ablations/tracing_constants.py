"""Constants by which causal tracing corrupts subjects: for each traced run, the one that hurts it least."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from oa_train.ablations.context import check_fingerprint
from oa_train.ablations.tracing import Tracing
from oa_train.ablations.trained_circuit import run_name
from oa_train.artefacts import (
    PROVENANCE,
    SIZE,
    Artefact,
    Schema,
    check_header,
    check_tensor,
    load_artefact,
    save_artefact,
)
from oa_train.errors import ArtefactError, OaTrainError
from oa_train.models.frozen import CausalLM
from oa_train.shapes import Float, Tensor

FOLDER, _TABLE = "tracing", "constants"
_TRACING: Schema = {
    "n_layers": SIZE,
    "layers": [range(1 << 20)],
    "kinds": [str],
    "spans": [str],
    "windows": [SIZE],
    "subject": str,
}
_HEADER: Schema = {"tracing": _TRACING, "provenance": PROVENANCE}


@dataclass(frozen=True, eq=False)
class TracingConstants:
    """The corrupting constant of each traced run, trained to lose as little probability as possible in that run.

    Attributes:
        name: name in tables and figures.
        tracing: the traced runs.
        table: constant of each run; that of the run that restores nothing comes last.
        provenance: model, task and run that they come from, as plain data.
        noun: what messages call it.
    """

    noun: ClassVar[str] = "set of tracing constants"

    name: str
    tracing: Tracing
    table: Float[Tensor, "run d_model"]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str | None:
        """Digest of the model's weights."""
        fingerprint: str | None = self.provenance.get("fingerprint")
        return fingerprint

    def check_belongs(self, model: CausalLM) -> None:
        """Raise an `ArtefactError` if the constants belong to another model."""
        check_fingerprint(model, "The tracing constants belong", self.provenance)

    def save(self, run: str | Path) -> Path:
        """Write `tracing/` into a run folder."""
        header = {"tracing": self.tracing.describe(), "provenance": dict(self.provenance)}
        return save_artefact(Path(run) / FOLDER, FOLDER, Artefact(header, {_TABLE: self.table}))

    @classmethod
    def load(cls, run: str | Path) -> "TracingConstants":
        """Read `tracing/` of a run folder.

        Raises:
            ArtefactError: it is missing, damaged, of another version, or holds something else.
        """
        folder = Path(run) / FOLDER
        if not folder.is_dir():
            raise ArtefactError(
                f"{run} has no tracing constants. Give a finished run of TracingModule (oa-train fit --model "
                "TracingModule ...), or leave the run out and choose corruptions that are not trained."
            )
        artefact = load_artefact(folder, FOLDER)
        check_header(folder, FOLDER, artefact.header, _HEADER)
        try:
            tracing = Tracing.of_description(artefact.header["tracing"])
        except OaTrainError as problem:
            raise ArtefactError(f"{folder} contradicts itself: {problem}") from problem
        table = artefact.tensors.get(_TABLE)
        check_tensor(folder, _TABLE, table, [len(tracing), None], torch.float32)
        assert table is not None
        return cls(run_name(run), tracing, table, artefact.header["provenance"])
