"""Lenses: estimates, from the residual stream at a layer, of the input of the final norm.

Every lens ends in the model's own norm and unembedding. Lenses differ in what lies between the layer and that norm:
nothing (logit lens), an affine map (tuned lens, Belrose et al. 2023), or the model's own blocks with each attention
output replaced by a constant (optimal constant attention, Li & Janson 2024).
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
        starts: indices of the layers, ascending; layer l is read at the input of block l.
        n_layers: number of layers of the model.
        d_model: width of the residual stream.

    Attributes:
        needs_partners: True if it needs attention outputs of other prompts.
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
        """Estimates of the input of the final norm, in the dtype of the residuals.

        Args:
            model: frozen causal language model.
            residuals: input of the block of each start layer.
            partners: output of each attention layer at a token of another prompt.
        """

    def trained(self) -> dict[str, Tensor]:
        """Trainable tensors by name: [start, ...], or [1, ...] where all layers share them."""
        return dict(self.named_parameters())

    def at(self, starts: Sequence[int]) -> "Lens":
        """This lens restricted to some of its layers.

        Raises:
            ConfigurationError: the lens lacks one of the layers.
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
    """Leaves the residual stream unchanged, so that norm and unembedding read it directly (nostalgebraist 2020)."""

    def forward(self, model: CausalLM, residuals: Tensor, partners: Tensor | None = None) -> Tensor:
        """The residuals themselves."""
        return residuals


class AffineLens(Lens):
    """Adds an affine function of the residual stream: x + W x + b. It is initialised as the logit lens."""

    def __init__(self, starts: Sequence[int], n_layers: int, d_model: int) -> None:
        super().__init__(starts, n_layers, d_model)
        self.weight = nn.Parameter(torch.zeros(len(starts), d_model, d_model))
        self.bias = nn.Parameter(torch.zeros(len(starts), d_model))

    def forward(self, model: CausalLM, residuals: Tensor, partners: Tensor | None = None) -> Tensor:
        """Map each layer's residuals."""
        mapped = torch.baddbmm(self.bias.unsqueeze(1), residuals.to(self.bias.dtype), self.weight.mT)
        return residuals + mapped.to(residuals.dtype)


class ConstantsLens(Lens):
    """Runs the model's remaining blocks with each attention output replaced by a constant.

    Each layer has its own constants, unless they are `shared`.
    """

    def __init__(self, starts: Sequence[int], n_layers: int, d_model: int, shared: bool = False) -> None:
        super().__init__(starts, n_layers, d_model)
        self.constants = nn.Parameter(torch.zeros(1 if shared else len(starts), n_layers, d_model))

    @torch.no_grad()
    def load(self, outputs: Float[Tensor, "layer d_model"]) -> None:
        """Set every layer's constants to these attention outputs."""
        self.constants.copy_(outputs.expand_as(self.constants))

    def forward(self, model: CausalLM, residuals: Tensor, partners: Tensor | None = None) -> Tensor:
        """Run the remaining blocks from every start layer."""

        def added(layer: int, live: Sequence[int]) -> Tensor:
            numbers = slice(0, 1) if len(self.constants) == 1 else slice(0, len(live))
            return self.constants[numbers, layer].unsqueeze(1)

        return run_tail(model, residuals, self.starts, added)


class ResampleLens(Lens):
    """Runs the model's remaining blocks with attention outputs taken from a token of another prompt."""

    needs_partners = True

    def forward(self, model: CausalLM, residuals: Tensor, partners: Tensor | None = None) -> Tensor:
        """Run the remaining blocks from every start layer; raises `ConfigurationError` without partners."""
        if partners is None:
            raise ConfigurationError("The resample lens needs attention outputs of other prompts.")
        values = partners
        return run_tail(model, residuals, self.starts, lambda layer, live: values[layer].unsqueeze(0))


@dataclass(frozen=True)
class LensKind:
    """A kind of lens.

    Attributes:
        make: builds the lens from (starts, n_layers, d_model).
        trained: True if its parameters are trained.
        teacher: kind of lens whose predictions it is trained to match; empty for the model's own predictions.
        learning_rate: default initial learning rate.
        affine: True if it is an `AffineLens`, whose singular vectors `faithfulness` uses as directions.
        from_means: True if it is not trained and its constants are mean attention outputs.
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
    """Validate names of kinds of lens.

    Args:
        option: name of the option, for messages.
        names: the kinds.
        trained: whether only kinds that are trained are allowed, each together with its teacher.

    Raises:
        ConfigurationError: a kind is unknown, named twice, not trained though it has to be, or lacks its teacher, or
            no kind is named.
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
    """Validated layers of a lens; all by default.

    Raises:
        ConfigurationError: a layer does not exist, the layers are not in ascending order, or there are none.
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
