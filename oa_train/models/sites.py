"""Sites: inputs or outputs of a decoder's modules, and the units into which their tensors are split.

Units can be ablated: a head, an MLP, a neuron, the residual stream before a block, a feature of a sparse dictionary.
To add a kind of site, add an entry to `SITE_KINDS` (and, if it needs a module that no other kind needs, its path to
`models.families` and its modules to `models.parts`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

from oa_train.errors import ArtefactError, ConfigurationError, nearest_names
from oa_train.models.dictionaries import Dictionary
from oa_train.models.parts import Dimensions, Parts
from oa_train.shapes import Bool, Float, Tensor

# The module whose input or output is the tensor of a site.
Place = tuple[nn.Module, Literal["input", "output"]]
# Dictionaries by the layer of their site.
Dictionaries = Mapping[int, Dictionary]
# Modules through which the units of a layer's site write to the residual stream: the last linear map, and the module
# whose output is added (the map itself, or a norm after it); none where the tensor itself is added.
Writes = Callable[[Parts, int], tuple[nn.Module, ...]]


@dataclass(frozen=True, order=True)
class Site:
    """A place of one kind in one layer.

    Attributes:
        kind: a key of `SITE_KINDS`.
        layer: index of the block, from 0; the number of layers for the input of the final norm.
    """

    kind: str
    layer: int = 0

    @property
    def key(self) -> str:
        """Name in files, and of parameters: `heads_3`."""
        return f"{self.kind}_{self.layer}"

    @classmethod
    def of_key(cls, key: str) -> "Site":
        """The site of a key; raises `ArtefactError` if the key is not valid."""
        kind, _, layer = key.rpartition("_")
        if kind not in SITE_KINDS or not layer.isdecimal():
            raise ArtefactError(f"{key!r} names no site; expected a kind and a layer, such as heads_3.")
        return cls(kind, int(layer))


@dataclass(frozen=True)
class SiteKind:
    """One kind of site.

    Attributes:
        name: name in configurations (`sites: [heads, mlp]`).
        site_name: name of a layer's site, with `{layer}` in it; also that of its unit, if it has only one.
        layers: layers that have such a site.
        shape: number and width of its units.
        place: module whose input or output is a layer's tensor, and which of the two.
        unit_name: suffix for each of several units, with `{unit}` in it.
        after_attention: whether attention of the layer, up to the input of its output projection, reads nothing that
            depends on the tensor. A circuit that ablates no other tensor of the layer can skip that attention.
        writes: how its units write to the residual stream; None if they do not, or not linearly.
    """

    name: str
    site_name: str
    layers: Callable[[Dimensions], Sequence[int]]
    shape: Callable[[Dimensions], tuple[int, int]]
    place: Callable[[Parts, int], Place]
    unit_name: str = ""
    after_attention: bool = False
    writes: Writes | None = None

    def layers_of(self, dimensions: Dimensions, dictionaries: Dictionaries) -> Sequence[int]:
        """Layers of a model that have such a site."""
        return self.layers(dimensions)

    def shape_of(self, layer: int, dimensions: Dimensions, dictionaries: Dictionaries) -> tuple[int, int]:
        """Number and width of the units of a layer's site."""
        return self.shape(dimensions)

    def place_of(self, layer: int, parts: Parts, dictionaries: Dictionaries) -> Place:
        """Module with a layer's tensor, and whether it is input or output; raises `ConfigurationError` without one."""
        return self.place(parts, layer)

    def rank(self, layer: int, dictionaries: Dictionaries) -> tuple[int, int, int]:
        """Sort key for forward order."""
        return layer, list(SITE_KINDS).index(self.name), 0

    def is_after_attention(self, layer: int, dictionaries: Dictionaries) -> bool:
        """`after_attention` of a layer's site."""
        return self.after_attention

    def unit_names(self, layer: int, n_units: int) -> list[str]:
        """Names of the units of a layer's site."""
        name = self.site_name.format(layer=layer)
        return [name + self.unit_name.format(unit=unit) for unit in range(n_units)]

    def may_name(self, pattern: str, dimensions: Dimensions) -> bool:
        """True if a shell pattern matches units of this kind in a model of these sizes."""
        names = (
            self.unit_names(layer, self.shape_of(layer, dimensions, {})[0]) for layer in self.layers_of(dimensions, {})
        )
        return any(bool(matching(of_layer, pattern).any()) for of_layer in names)

    def read(
        self, tensor: Tensor, layout: tuple[int, int, int, int], layer: int, dictionaries: Dictionaries
    ) -> Float[Tensor, "row position unit width"]:
        """Values of the units in a site's tensor, whose rows and positions may be merged into one dimension.

        `layout` holds the number of rows, positions and units, and the units' width.
        """
        return tensor.reshape(layout)

    def write(
        self,
        tensor: Tensor,
        before: Float[Tensor, "row position unit width"],
        after: Float[Tensor, "row position unit width"],
        layer: int,
        dictionaries: Dictionaries,
    ) -> Tensor:
        """The tensor that replaces `tensor` when its units change from `before` to `after`."""
        return after.reshape(tensor.shape)


class _Features(SiteKind):
    """Entries of the code that a sparse dictionary computes from another site's tensor.

    The change of the code is decoded and added, so that the reconstruction error is kept.
    """

    @staticmethod
    def _read(dictionary: Dictionary) -> SiteKind:
        """The kind of site that a dictionary reads."""
        return SITE_KINDS[_DICTIONARY_SITES[dictionary.site[0]]]

    def layers_of(self, dimensions: Dimensions, dictionaries: Dictionaries) -> Sequence[int]:
        return sorted(dictionaries)

    def shape_of(self, layer: int, dimensions: Dimensions, dictionaries: Dictionaries) -> tuple[int, int]:
        return dictionaries[layer].n_features, 1

    def place_of(self, layer: int, parts: Parts, dictionaries: Dictionaries) -> Place:
        site = site_of_name(dictionaries[layer].site, parts.dimensions)
        return SITE_KINDS[site.kind].place_of(site.layer, parts, {})

    def rank(self, layer: int, dictionaries: Dictionaries) -> tuple[int, int, int]:
        return (*self._read(dictionaries[layer]).rank(layer, {})[:2], 1)

    def is_after_attention(self, layer: int, dictionaries: Dictionaries) -> bool:
        return self._read(dictionaries[layer]).after_attention

    def may_name(self, pattern: str, dimensions: Dimensions) -> bool:
        # Neither the layer of a dictionary nor its number of features is known here.
        layers = [self.site_name.format(layer=layer) for layer in range(dimensions.n_layers + 1)]
        return bool(matching(layers, pattern.partition(".")[0]).any())

    def read(
        self, tensor: Tensor, layout: tuple[int, int, int, int], layer: int, dictionaries: Dictionaries
    ) -> Float[Tensor, "row position unit width"]:
        return dictionaries[layer].like(tensor).encode(tensor.reshape(*layout[:2], -1)).unsqueeze(-1)

    def write(self, tensor: Tensor, before: Tensor, after: Tensor, layer: int, dictionaries: Dictionaries) -> Tensor:
        change = dictionaries[layer].like(tensor).decode_change((after - before).squeeze(-1))
        return tensor + change.to(tensor.dtype).reshape(tensor.shape)


def _neurons(parts: Parts, layer: int) -> Place:
    if not parts.down_projections:
        raise ConfigurationError(
            f"Models of the family {parts.family.model_type!r} have no sites of the kind 'neurons': their MLPs have "
            "no single down projection that the neurons enter. Ablate whole MLPs (sites: [mlp])."
        )
    return parts.down_projections[layer], "input"


def _residual(parts: Parts, layer: int) -> Place:
    return (parts.final_norm if layer == len(parts.blocks) else parts.blocks[layer]), "input"


def _directly(parts: Parts, layer: int) -> tuple[nn.Module, ...]:
    return ()


def _every_layer(dimensions: Dimensions) -> range:
    return range(dimensions.n_layers)


def _before_the_first(dimensions: Dimensions) -> range:
    return range(1)


def _stream(dimensions: Dimensions) -> tuple[int, int]:
    return 1, dimensions.d_model


# In forward order within a layer.
SITE_KINDS: dict[str, SiteKind] = {
    kind.name: kind
    for kind in (
        SiteKind("tokens", "tokens", _before_the_first, _stream, lambda parts, _: (parts.token_embedding, "output")),
        SiteKind(
            "embedding",
            "input",
            _before_the_first,
            _stream,
            lambda parts, _: (parts.blocks[0], "input"),
            writes=_directly,
        ),
        SiteKind("residual", "r{layer}", lambda sizes: range(1, sizes.n_layers + 1), _stream, _residual),
        SiteKind(
            "heads",
            "a{layer}",
            _every_layer,
            lambda sizes: (sizes.n_heads, sizes.d_head),
            lambda parts, layer: (parts.attention_outputs[layer], "input"),
            ".h{unit}",
            after_attention=True,
            writes=lambda parts, layer: (parts.attention_outputs[layer], parts.attentions[layer]),
        ),
        SiteKind(
            "attention",
            "a{layer}",
            _every_layer,
            _stream,
            lambda parts, layer: (parts.attentions[layer], "output"),
            after_attention=True,
            writes=_directly,
        ),
        SiteKind(
            "neurons",
            "m{layer}",
            _every_layer,
            lambda sizes: (sizes.d_mlp, 1),
            _neurons,
            ".n{unit}",
            after_attention=True,
            writes=lambda parts, layer: (parts.down_projections[layer], parts.mlps[layer]),
        ),
        SiteKind(
            "mlp",
            "m{layer}",
            _every_layer,
            _stream,
            lambda parts, layer: (parts.mlps[layer], "output"),
            after_attention=True,
            writes=_directly,
        ),
        _Features("features", "f{layer}", _before_the_first, _stream, _residual, ".{unit}"),
    )
}

DEFAULT_SITES = ("heads", "mlp")

# Kinds of site at which dictionaries can read, by the first letter of the site's name.
_DICTIONARY_SITES = {"r": "residual", "m": "mlp", "a": "attention"}


def site_of_name(name: str, dimensions: Dimensions) -> Site:
    """The site that a dictionary names: `r3`, `m3` or `a3`; `r0` is the embedding.

    Raises:
        ConfigurationError: a model of these sizes has no such site.
    """
    kind, layer = _DICTIONARY_SITES[name[0]], int(name[1:])
    if kind == "residual" and layer == 0:
        return Site("embedding")
    if layer not in SITE_KINDS[kind].layers(dimensions):
        raise ConfigurationError(f"There is no site {name!r} in a model of {dimensions.n_layers} layers.")
    return Site(kind, layer)


def check_dictionaries(names: Sequence[str], n_dictionaries: int) -> None:
    """Refuse features without dictionaries, and dictionaries without features."""
    if "features" in names and not n_dictionaries:
        raise ConfigurationError("sites names features, which are those of a dictionary; set dictionaries as well.")
    if n_dictionaries and "features" not in names:
        raise ConfigurationError(
            f"dictionaries are set, and sites is {list(names)}, without features. Add features to sites, or leave "
            "the dictionaries out."
        )


def check_site_kinds(option: str, names: Sequence[str]) -> None:
    """Refuse kinds of site that do not exist or are named twice."""
    for name in names:
        if name not in SITE_KINDS:
            raise ConfigurationError(f"{option} names {name!r}. {nearest_names(name, SITE_KINDS)}")
    if not names or len(set(names)) < len(names):
        raise ConfigurationError(f"{option} is {list(names)}; expected kinds of site, each once.")


def matching(names: Sequence[str], pattern: str) -> Bool[Tensor, " name"]:
    """Names that a shell pattern matches; if there are none, the units of the site it names (`a3`: `a3.h0`, ...)."""
    for wanted in (pattern, f"{pattern}.*"):
        matched = torch.tensor([fnmatchcase(name, wanted) for name in names], dtype=torch.bool)
        if matched.any():
            break
    return matched
