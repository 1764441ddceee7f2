"""Names and order of the components of a model at node level: attention heads and MLPs.

A node mask has one entry a component: for each layer its heads and then its MLP. Seen as [layer, head + 1] the last
column therefore is the MLPs and the others are the heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

import torch

from oa_train.errors import ConfigurationError, nearest_names, unknown_name
from oa_train.models.families import Dimensions
from oa_train.shapes import Bool, Tensor


@dataclass(frozen=True)
class Components:
    """The attention heads `a{layer}.h{head}` and MLPs `m{layer}` of a model, in mask order.

    Attributes:
        n_layers: decoder blocks.
        n_heads: attention heads of a block.
    """

    n_layers: int
    n_heads: int

    @classmethod
    def of(cls, dimensions: Dimensions) -> "Components":
        """The components of a model of these sizes."""
        return cls(dimensions.n_layers, dimensions.n_heads)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Name of each mask entry."""
        return tuple(
            name
            for layer in range(self.n_layers)
            for name in (*(f"a{layer}.h{head}" for head in range(self.n_heads)), f"m{layer}")
        )

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    def __len__(self) -> int:
        return self.n_layers * (self.n_heads + 1)

    def index(self, name: str) -> int:
        """Mask entry of a component.

        Raises:
            UnknownNameError: the model has no component of that name.
        """
        if name not in self._indices:
            raise unknown_name("component", name, self.names)
        return self._indices[name]

    def mask(self, names: Sequence[str]) -> Bool[Tensor, " component"]:
        """A mask that keeps the named components and ablates all others."""
        mask = torch.zeros(len(self), dtype=torch.bool)
        mask[[self.index(name) for name in names]] = True
        return mask

    def kept(self, mask: Bool[Tensor, " component"]) -> tuple[str, ...]:
        """Names of the components that a mask keeps, in mask order."""
        return tuple(name for name, keep in zip(self.names, mask.tolist(), strict=True) if keep)

    def select(self, patterns: Sequence[str]) -> tuple[str, ...]:
        """Names that match shell patterns, in mask order.

        Args:
            patterns: `a*.h*`, `m[0-3]`, a name, `a3` for all heads of layer 3; a leading `!` takes out what the
                patterns before it put in.

        Raises:
            ConfigurationError: a pattern matches nothing.
        """
        chosen: set[str] = set()
        for pattern in patterns:
            wanted = pattern.removeprefix("!")
            found = zip(self.names, matching(self.names, wanted), strict=True)
            matched = {name for name, matches in found if matches}
            if not matched:
                raise ConfigurationError(
                    f"The pattern {pattern!r} matches no component. {nearest_names(wanted, self.names)}"
                )
            chosen = chosen - matched if pattern.startswith("!") else chosen | matched
        return tuple(name for name in self.names if name in chosen)


def matching(names: Sequence[str], pattern: str) -> list[bool]:
    """Which names a shell pattern matches; `a3` matches all heads of layer 3."""
    return [fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.h*") for name in names]
