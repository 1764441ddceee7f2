"""Lenses: estimates, from the residual stream at a layer, of the stream that the final norm will read.

Every lens ends in the model's own norm and unembedding. What is between the layer and there differs: nothing (logit
lens), an affine map (tuned lens, Belrose et al. 2023), or the model's own blocks with a constant in place of what each
attention layer adds (optimal constant attention, Li & Janson 2024).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
        n_layers: of the model.
        d_model: width of the residual stream.

    Attributes:
        needs_partners: True if it reads what attention adds on other prompts.
    """

    needs_partners = False

    def __init__(self, starts: Sequence[int], n_layers: int, d_model: int) -> None:
        super().__init__()
        self.starts, self.n_layers, self.d_model = list(starts), n_layers, d_model

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
        chosen, numbers = type(self)(starts, self.n_layers, self.d_model), [self.starts.index(n) for n in starts]
        for name, parameter in self.named_parameters():
            slices = parameter[numbers if len(parameter) == len(self.starts) else [0]]
            setattr(chosen, name, nn.Parameter(slices, parameter.requires_grad))
        return chosen


class LogitLens(Lens):
    """Reads the residual stream out as it is (nostalgebraist 2020)."""

    def forward(self, model: CausalLM, residuals: Tensor, partners: Tensor | None = None) -> Tensor:
        """The residuals themselves."""
        return residuals


class AffineLens(Lens):
    """Adds an affine function of the residual stream: x + W x + b. It starts as the logit lens."""

    def __init__(self, starts: Sequence[int], n_layers: int, d_model: int) -> None:
        super().__init__(starts, n_layers, d_model)
        self.weight = nn.Parameter(torch.zeros(len(starts), d_model, d_model))
        self.bias = nn.Parameter(torch.zeros(len(starts), d_model))

    def forward(self, model: CausalLM, residuals: Tensor, partners: Tensor | None = None) -> Tensor:
        """Map each layer's residuals."""
        mapped = torch.baddbmm(self.bias.unsqueeze(1), residuals.to(self.bias.dtype), self.weight.mT)
        return residuals + mapped.to(residuals.dtype)


class ConstantsLens(Lens):
    """Runs the model's later blocks with a constant in place of what each attention layer adds.

    Unless they are `shared`, each start has constants of its own.
    """

    def __init__(self, starts: Sequence[int], n_layers: int, d_model: int, shared: bool = False) -> None:
        super().__init__(starts, n_layers, d_model)
        self.constants = nn.Parameter(torch.zeros(1 if shared else len(starts), n_layers, d_model))

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


class ResampleLens(Lens):
    """Runs the model's later blocks with what attention adds at another prompt's token."""

    needs_partners = True

    def forward(self, model: CausalLM, residuals: Tensor, partners: Tensor | None = None) -> Tensor:
        """Run the blocks from every start on; raises ConfigurationError without partners."""
        if partners is None:
            raise ConfigurationError("The resample lens needs what attention adds on other prompts.")
        values = partners
        return run_tail(model, residuals, self.starts, lambda layer, live: values[layer].unsqueeze(0))


@dataclass(frozen=True)
class LensKind:
    """A kind of lens.

    Attributes:
        make: makes it for starts, number of layers and width.
        trained: True if its parameters are trained.
        teacher: kind of lens whose prediction it is trained to match; empty for the model's.
        learning_rate: initial learning rate by default.
        affine: True if it is an `AffineLens`, whose singular vectors `faithfulness` uses as directions.
        from_means: True if, untrained, it holds mean attention outputs.
        needs_partners: True if it reads attention outputs of other prompts.
    """

    make: Callable[[Sequence[int], int, int], Lens]
    trained: bool = True
    teacher: str = ""
    learning_rate: float = 0.003
    affine: bool = False
    from_means: bool = False
    needs_partners: bool = False


LENS_KINDS: dict[str, LensKind] = {
    "logit": LensKind(LogitLens, trained=False),
    "tuned": LensKind(AffineLens, learning_rate=0.0003, affine=True),
    "oca": LensKind(ConstantsLens),
    "oca_shared": LensKind(partial(ConstantsLens, shared=True)),
    "linear_oca": LensKind(AffineLens, teacher="oca", learning_rate=0.0003, affine=True),
    "mean": LensKind(partial(ConstantsLens, shared=True), trained=False, from_means=True),
    "resample": LensKind(ResampleLens, trained=False, needs_partners=True),
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
