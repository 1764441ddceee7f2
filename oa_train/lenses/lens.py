"""Lenses: estimates, from the residual stream at a layer, of the stream that the final norm will read.

Every lens ends in the model's own norm and unembedding. What is between the layer and there differs: nothing (logit
lens), an affine map (tuned lens, Belrose et al. 2023), or the model's own blocks with a constant in place of what each
attention layer adds (optimal constant attention, Li & Janson 2024).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from oa_train.engine.tail import run_tail
from oa_train.errors import ConfigurationError, nearest_names
from oa_train.models.frozen import CausalLM
from oa_train.shapes import Float, Tensor


class Lens(nn.Module, ABC):
    """A lens at several layers.

    Args:
        starts: layers, ascending; layer l is read where the residual stream enters block l.

    Attributes:
        needs_partners: True if it reads what attention adds on other prompts.
    """

    needs_partners = False

    def __init__(self, starts: Sequence[int]) -> None:
        super().__init__()
        self.starts = list(starts)

    @abstractmethod
    def forward(
        self,
        model: CausalLM,
        residuals: Float[Tensor, "start token d_model"],
        partners: Float[Tensor, "layer token d_model"] | None = None,
    ) -> Float[Tensor, "start token d_model"]:
        """Estimates of what enters the final norm, in the dtype of the residuals.

        Args:
            model: frozen causal language model.
            residuals: what enters the block of each start.
            partners: what attention adds in each layer at another prompt's token.
        """

    def trained(self) -> dict[str, Tensor]:
        """Tensors that are trained, by name: [start, ...], or [1, ...] where all starts share them."""
        return dict(self.named_parameters())

    def at(self, starts: Sequence[int]) -> "Lens":
        """The same lens at some of its layers.

        Raises:
            ConfigurationError: it has no such layer.
        """
        for start in starts:
            if start not in self.starts:
                raise ConfigurationError(f"The lens has no layer {start}; it has {_ranges(self.starts)}.")
        return self._at([self.starts.index(start) for start in starts])

    @abstractmethod
    def _at(self, numbers: list[int]) -> "Lens":
        """The same lens at the starts with these numbers."""


class LogitLens(Lens):
    """Reads the residual stream out as it is (nostalgebraist 2020)."""

    def forward(self, model: CausalLM, residuals: Tensor, partners: Tensor | None = None) -> Tensor:
        """The residuals themselves."""
        return residuals

    def _at(self, numbers: list[int]) -> "LogitLens":
        return LogitLens([self.starts[number] for number in numbers])


class AffineLens(Lens):
    """Adds an affine function of the residual stream: x + W x + b. It starts as the logit lens.

    Args:
        starts: layers.
        d_model: width of the residual stream.
    """

    def __init__(self, starts: Sequence[int], d_model: int) -> None:
        super().__init__(starts)
        self.weight = nn.Parameter(torch.zeros(len(starts), d_model, d_model))
        self.bias = nn.Parameter(torch.zeros(len(starts), d_model))

    def forward(self, model: CausalLM, residuals: Tensor, partners: Tensor | None = None) -> Tensor:
        """Map each layer's residuals."""
        mapped = torch.baddbmm(self.bias.unsqueeze(1), residuals.to(self.bias.dtype), self.weight.mT)
        return residuals + mapped.to(residuals.dtype)

    def _at(self, numbers: list[int]) -> "AffineLens":
        chosen = AffineLens([self.starts[number] for number in numbers], self.bias.shape[-1])
        chosen.weight, chosen.bias = nn.Parameter(self.weight[numbers]), nn.Parameter(self.bias[numbers])
        return chosen.requires_grad_(self.bias.requires_grad)


class ConstantsLens(Lens):
    """Runs the model's later blocks with a constant in place of what each attention layer adds.

    Args:
        starts: layers.
        n_layers: of the model.
        d_model: width of the residual stream.
        shared: all starts share the constants; else each has its own.
    """

    def __init__(self, starts: Sequence[int], n_layers: int, d_model: int, shared: bool = False) -> None:
        super().__init__(starts)
        self.constants = nn.Parameter(torch.zeros(1 if shared else len(starts), n_layers, d_model))

    @property
    def shared(self) -> bool:
        """True if all starts share the constants."""
        return len(self.constants) == 1 and len(self.starts) > 1

    @torch.no_grad()
    def load(self, outputs: Float[Tensor, "layer d_model"]) -> None:
        """Set the constants of every start."""
        self.constants.copy_(outputs.expand_as(self.constants))

    def forward(self, model: CausalLM, residuals: Tensor, partners: Tensor | None = None) -> Tensor:
        """Run the blocks from every start on."""

        def added(layer: int, live: Sequence[int]) -> Tensor:
            numbers = slice(0, 1) if len(self.constants) == 1 else slice(0, len(live))
            return self.constants[numbers, layer].unsqueeze(1)

        return run_tail(model, residuals, self.starts, added)

    def _at(self, numbers: list[int]) -> "ConstantsLens":
        _, n_layers, d_model = self.constants.shape
        chosen = ConstantsLens([self.starts[number] for number in numbers], n_layers, d_model, shared=True)
        rows = [0] if len(self.constants) == 1 else numbers
        chosen.constants = nn.Parameter(self.constants[rows])
        return chosen.requires_grad_(self.constants.requires_grad)


class ResampleLens(Lens):
    """Runs the model's later blocks with what attention adds at another prompt's token."""

    needs_partners = True

    def forward(self, model: CausalLM, residuals: Tensor, partners: Tensor | None = None) -> Tensor:
        """Run the blocks from every start on; raises ConfigurationError without partners."""
        if partners is None:
            raise ConfigurationError("The resample lens needs what attention adds on other prompts.")
        values = partners
        return run_tail(model, residuals, self.starts, lambda layer, live: values[layer].unsqueeze(0))

    def _at(self, numbers: list[int]) -> "ResampleLens":
        return ResampleLens([self.starts[number] for number in numbers])


@dataclass(frozen=True)
class LensKind:
    """A kind of lens.

    Attributes:
        make: makes it for starts, number of layers and width.
        trained: True if its parameters are trained.
        teacher: kind of lens whose prediction it is trained to match; empty for the model's.
        from_means: True if constants begin as what attention adds on average.
    """

    make: Callable[[Sequence[int], int, int], Lens]
    trained: bool = True
    teacher: str = ""
    from_means: bool = False


LENS_KINDS: Mapping[str, LensKind] = {
    "logit": LensKind(lambda starts, n_layers, d_model: LogitLens(starts), trained=False),
    "tuned": LensKind(lambda starts, n_layers, d_model: AffineLens(starts, d_model)),
    "oca": LensKind(lambda starts, n_layers, d_model: ConstantsLens(starts, n_layers, d_model), from_means=True),
    "oca_shared": LensKind(
        lambda starts, n_layers, d_model: ConstantsLens(starts, n_layers, d_model, shared=True), from_means=True
    ),
    "linear_oca": LensKind(lambda starts, n_layers, d_model: AffineLens(starts, d_model), teacher="oca"),
    "mean": LensKind(
        lambda starts, n_layers, d_model: ConstantsLens(starts, n_layers, d_model, shared=True),
        trained=False,
        from_means=True,
    ),
    "resample": LensKind(lambda starts, n_layers, d_model: ResampleLens(starts), trained=False),
}


def check_lens_kinds(option: str, names: Sequence[str], trained: bool = False) -> None:
    """Refuse kinds of lens that do not exist, are named twice or, if only trained ones will do, are not trained.

    Raises:
        ConfigurationError: one is.
    """
    known: dict[str, Any] = {name: kind for name, kind in LENS_KINDS.items() if kind.trained or not trained}
    for name in names:
        if name not in known:
            raise ConfigurationError(f"{option} names {name!r}. {nearest_names(name, known)}")
    if not names or len(set(names)) < len(names):
        raise ConfigurationError(f"{option} is {list(names)}; expected kinds of lens, each once.")
    for name in names if trained else ():
        teacher = LENS_KINDS[name].teacher
        if teacher and teacher not in names:
            raise ConfigurationError(f"{option} names {name!r}, which is trained to match {teacher!r}: name that too.")


def check_layers(layers: Sequence[int] | None, n_layers: int) -> list[int]:
    """Layers of a lens: all by default.

    Raises:
        ConfigurationError: the model has no such layer, or they do not ascend.
    """
    chosen = list(range(n_layers)) if layers is None else list(layers)
    if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= n_layers:
        raise ConfigurationError(f"layers is {chosen}; expected ascending numbers from 0 to {n_layers - 1}.")
    return chosen


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers for a message: "0 to 29", or a list."""
    if len(numbers) > 1 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
