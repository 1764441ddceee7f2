"""Trained lenses on disk, and tuned lenses in the format of AlignmentResearch/tuned-lens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch

from oa_train.ablations.context import check_fingerprint
from oa_train.ablations.trained_circuit import run_name
from oa_train.artefacts import (
    FLOATS,
    PROVENANCE,
    SIZE,
    Artefact,
    Schema,
    check_header,
    check_tensor,
    load_artefact,
    save_artefact,
)
from oa_train.errors import ArtefactError
from oa_train.files import read_json
from oa_train.lenses.lens import LENS_KINDS, AffineLens, Lens
from oa_train.models.frozen import CausalLM
from oa_train.models.parts import Dimensions
from oa_train.shapes import Tensor

FOLDER = "lens"
_HEADER: Schema = {
    "kinds": [str],
    "layers": [range(1 << 20)],
    "n_layers": SIZE,
    "d_model": SIZE,
    "provenance": PROVENANCE,
}


@dataclass(frozen=True, eq=False)
class TrainedLenses:
    """Lenses that were trained together, by kind.

    Attributes:
        name: name of the run, for tables and figures.
        lenses: the lenses by kind, a key of `LENS_KINDS`; all read the same layers.
        n_layers: number of layers of the model.
        d_model: width of the model's residual stream.
        provenance: the model, task and run that they come from, as plain data.
        noun: what error messages call it.
    """

    noun: ClassVar[str] = "run with lenses"

    name: str
    lenses: Mapping[str, Lens]
    n_layers: int
    d_model: int
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> Sequence[int]:
        """Indices of the layers, the same for all lenses."""
        return next(iter(self.lenses.values())).starts

    @property
    def fingerprint(self) -> str | None:
        """Digest of the model's weights."""
        fingerprint: str | None = self.provenance.get("fingerprint")
        return fingerprint

    def check_belongs(self, model: CausalLM) -> None:
        """Raise an `ArtefactError` unless the lenses were trained on this model."""
        check_sizes(model, self.n_layers, self.d_model, "lens")
        check_fingerprint(model, "The lens belongs", self.provenance)

    def save(self, run: str | Path) -> Path:
        """Write the lenses to `lens/` in a run folder."""
        header = {
            "kinds": list(self.lenses),
            "layers": list(self.layers),
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "provenance": dict(self.provenance),
        }
        tensors = {f"{kind}.{name}": t for kind, lens in self.lenses.items() for name, t in lens.trained().items()}
        return save_artefact(Path(run) / FOLDER, FOLDER, Artefact(header, tensors))

    @classmethod
    def load(cls, run: str | Path) -> "TrainedLenses":
        """Read the lenses from `lens/` in a run folder.

        Raises:
            ArtefactError: the folder is missing, damaged, of another version, or holds something else.
        """
        folder = Path(run) / FOLDER
        if not folder.is_dir():
            raise ArtefactError(
                f"{run} has no lenses. Give a finished run of LensModule (oa-train fit --model LensModule ...)."
            )
        artefact = load_artefact(folder, FOLDER)
        header = artefact.header
        check_header(folder, FOLDER, header, _HEADER)
        unknown = [kind for kind in header["kinds"] if kind not in LENS_KINDS]
        if unknown or not header["layers"]:
            raise ArtefactError(f"{folder} holds lenses of unknown kinds or of no layer: {', '.join(unknown)}.")
        sizes = header["layers"], header["n_layers"], header["d_model"]
        lenses = {kind: LENS_KINDS[kind].make(*sizes).requires_grad_(False) for kind in header["kinds"]}
        for kind, lens in lenses.items():
            for name, parameter in lens.named_parameters():
                key = f"{kind}.{name}"
                check_tensor(folder, key, artefact.tensors.get(key), [*parameter.shape], torch.float32)
                parameter.data.copy_(artefact.tensors[key])
        return cls(run_name(run), lenses, header["n_layers"], header["d_model"], header["provenance"])


def load_tuned_lens(folder: str | Path) -> AffineLens:
    """Read a tuned lens in the format of AlignmentResearch/tuned-lens: `config.json` and `params.pt`.

    No code from the file is run.

    Raises:
        ArtefactError: the folder does not hold such a lens, or the lens is damaged.
    """
    folder = Path(folder).expanduser()
    config, file = folder / "config.json", folder / "params.pt"
    if not (config.is_file() and file.is_file()):
        raise ArtefactError(f"{folder} does not hold a tuned lens; expected config.json and params.pt in it.")
    content = read_json(config)
    n_layers, d_model = (_size(config, content, name) for name in ("num_hidden_layers", "d_model"))
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError, ValueError, KeyError) as problem:
        raise ArtefactError(f"{file} is damaged, or holds more than tensors: {problem}") from problem
    lens = AffineLens(range(n_layers), n_layers, d_model)
    weights, biases = [], []
    for layer in range(n_layers):
        weights.append(_tensor(file, state, f"{layer}.weight", [d_model, d_model]))
        has_bias = content.get("bias", True)
        biases.append(_tensor(file, state, f"{layer}.bias", [d_model]) if has_bias else torch.zeros(d_model))
    with torch.no_grad():
        lens.weight.copy_(torch.stack(weights))
        lens.bias.copy_(torch.stack(biases))
    return lens.requires_grad_(False)


def _size(config: Path, content: Mapping[str, Any], name: str) -> int:
    size = content.get(name)
    if not isinstance(size, int) or not 0 < size < 1 << 20:
        raise ArtefactError(f"{config} is not the configuration of a tuned lens: {name} is {size!r}; expected a size.")
    return size


def _tensor(file: Path, state: Any, name: str, shape: list[int]) -> Tensor:
    tensor = state.get(name) if isinstance(state, Mapping) else None
    check_tensor(file, name, tensor if isinstance(tensor, Tensor) else None, shape, *FLOATS)
    assert isinstance(tensor, Tensor)
    return tensor.float()


def check_sizes(model: CausalLM, n_layers: int, d_model: int, label: str) -> None:
    """Raise an `ArtefactError` unless the lens has the model's number of layers and width."""
    own = Dimensions.of(model.config)
    if (own.n_layers, own.d_model) != (n_layers, d_model):
        raise ArtefactError(
            f"The {label} belongs to a model with {n_layers} layers of width {d_model}; this model has "
            f"{own.n_layers} of width {own.d_model}."
        )
