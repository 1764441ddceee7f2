"""The level of nodes: selections of units as mask entries.

A selection names kinds of site and has an entry for each of their units, layer by layer in forward order. An entry
may be restricted to a span of the prompt: `m3@S2` is MLP 3 at the tokens of the span S2, and at all other tokens the
MLP is kept.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch

from oa_train.errors import ConfigurationError, nearest_names
from oa_train.models.dictionaries import Dictionary, reload_dictionary
from oa_train.models.levels import Level, ScoreMap
from oa_train.models.parts import Dimensions
from oa_train.models.sites import (
    DEFAULT_SITES,
    SITE_KINDS,
    Site,
    check_dictionaries,
    check_site_kinds,
    matching,
    site_of_name,
)
from oa_train.shapes import Bool, Float, Int, Tensor

AT = "@"


@dataclass(frozen=True)
class Group:
    """The entries of one site at one span (None for all tokens), which are contiguous in a mask.

    Attributes:
        entries: their slice of a mask.
        units: indices of their units within the site, in mask order; None for all units.
    """

    site: Site
    span: str | None
    entries: slice
    units: tuple[int, ...] | None


@dataclass(frozen=True)
class Nodes(Level):
    """Units of some kinds of site in one model, as mask entries.

    Attributes:
        dimensions: sizes of the model.
        kinds: kinds of site, keys of `SITE_KINDS`.
        spanned: shell patterns with a span (`m*@S2`); a unit matched by some of them has an entry for each of their
            spans instead of one for all tokens.
        dictionaries: sparse dictionaries whose features are units; at most one per layer.
        overlapping: spans of one unit may share tokens, provided that no mask ablates the unit at both of them.
    """

    kind = "nodes"
    part = "component"
    has_one_stream = True

    dimensions: Dimensions
    kinds: tuple[str, ...] = DEFAULT_SITES
    spanned: tuple[str, ...] = ()
    dictionaries: tuple[Dictionary, ...] = ()
    overlapping: bool = False

    def __post_init__(self) -> None:
        check_site_kinds("sites", self.kinds)
        check_dictionaries(self.kinds, len(self.dictionaries))
        if len(self.by_layer) < len(self.dictionaries):
            raise ConfigurationError("Two dictionaries are in the same layer, so their features would share names.")
        for dictionary in self.dictionaries:
            site_of_name(dictionary.site, self.dimensions)
            if dictionary.d_model != self.dimensions.d_model:
                raise ConfigurationError(
                    f"The dictionary {dictionary.path} has width {dictionary.d_model}, the model "
                    f"{self.dimensions.d_model}."
                )

    @classmethod
    def of(
        cls,
        config: Any,
        kinds: Sequence[str] = DEFAULT_SITES,
        patterns: Sequence[str] = (),
        dictionaries: Sequence[Dictionary] = (),
    ) -> "Nodes":
        """The units of a model with this Hugging Face configuration; patterns with a span restrict what they match.

        Raises:
            ConfigurationError: a kind does not exist, a unit is selected both with and without a span, or two
                dictionaries are in the same layer.
        """
        positive = [pattern for pattern in patterns if not pattern.startswith("!")]
        spanned = tuple(pattern for pattern in positive if AT in pattern)
        nodes = cls(Dimensions.of(config), tuple(kinds), spanned, tuple(dictionaries))
        for pattern in (pattern for pattern in positive if spanned and AT not in pattern):
            restricted = torch.tensor([of_unit != (None,) for of_unit in nodes._unit_spans])
            twice = (matching(nodes.unit_names, pattern) & restricted).nonzero().flatten().tolist()
            if twice:
                raise ConfigurationError(
                    f"The pattern {pattern!r} selects {nodes.unit_names[twice[0]]} at every token, and another one "
                    "selects it at a span: spans of one unit must not overlap. Leave one of them out."
                )
        return nodes

    @cached_property
    def by_layer(self) -> dict[int, Dictionary]:
        """Dictionaries by the layer of their site."""
        return {dictionary.layer: dictionary for dictionary in self.dictionaries}

    @cached_property
    def sites(self) -> Mapping[Site, tuple[int, int]]:
        """Sites in forward order, with number and width of their units."""
        sites = [
            Site(name, layer)
            for name in self.kinds
            for layer in SITE_KINDS[name].layers_of(self.dimensions, self.by_layer)
        ]
        sites.sort(key=lambda site: SITE_KINDS[site.kind].rank(site.layer, self.by_layer))
        return {site: SITE_KINDS[site.kind].shape_of(site.layer, self.dimensions, self.by_layer) for site in sites}

    @cached_property
    def unit_names(self) -> tuple[str, ...]:
        """Names of all units, site by site."""
        return tuple(
            name
            for site, (n_units, _) in self.sites.items()
            for name in SITE_KINDS[site.kind].unit_names(site.layer, n_units)
        )

    @cached_property
    def _first_units(self) -> dict[Site, int]:
        """Index in `unit_names` of each site's first unit."""
        firsts = itertools.accumulate((n_units for n_units, _ in self.sites.values()), initial=0)
        return dict(zip(self.sites, firsts, strict=False))

    @cached_property
    def _unit_spans(self) -> list[tuple[str | None, ...]]:
        """Spans of each unit; None means all tokens."""
        spans: list[tuple[str | None, ...]] = [()] * len(self.unit_names)
        for pattern in dict.fromkeys(self.spanned):
            unit, _, span = pattern.rpartition(AT)
            for number in matching(self.unit_names, unit).nonzero().flatten().tolist():
                if span not in spans[number]:
                    spans[number] += (span,)
        return [of_unit or (None,) for of_unit in spans]

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Groups of entries, in mask order."""
        groups: list[Group] = []
        first_entry = 0
        for site, (n_units, _) in self.sites.items():
            first_unit = self._first_units[site]
            of_units = self._unit_spans[first_unit : first_unit + n_units]
            for span in dict.fromkeys(span for of_unit in of_units for span in of_unit):
                units = tuple(number for number, of_unit in enumerate(of_units) if span in of_unit)
                entries = slice(first_entry, first_entry + len(units))
                groups.append(Group(site, span, entries, None if len(units) == n_units else units))
                first_entry = entries.stop
        return tuple(groups)

    def _units(self, group: Group) -> Sequence[int]:
        """Indices of a group's units within their site."""
        return range(self.sites[group.site][0]) if group.units is None else group.units

    @cached_property
    def _entry_units(self) -> Int[Tensor, " entry"]:
        """Index in `unit_names` of each entry's unit."""
        return torch.cat([self._first_units[group.site] + torch.tensor(self._units(group)) for group in self.groups])

    @cached_property
    def _entry_spans(self) -> list[str | None]:
        return [group.span for group in self.groups for _ in range(group.entries.start, group.entries.stop)]

    @cached_property
    def spans(self) -> tuple[str | None, ...]:
        """Spans that entries are restricted to; None for entries that apply at every token."""
        return tuple(dict.fromkeys(group.span for group in self.groups))

    @cached_property
    def span_pairs(self) -> tuple[tuple[str, str], ...]:
        """Pairs of spans that restrict the same unit, which must not share a token."""
        pairs = (pair for of_unit in set(self._unit_spans) for pair in itertools.combinations(of_unit, 2))
        return tuple(dict.fromkeys((first, second) for first, second in pairs if first and second))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Name of each mask entry."""
        pairs = zip(self._entry_units.tolist(), self._entry_spans, strict=True)
        return tuple(
            self.unit_names[unit] if span is None else f"{self.unit_names[unit]}{AT}{span}" for unit, span in pairs
        )

    def __len__(self) -> int:
        return self.groups[-1].entries.stop if self.groups else 0

    def matched(self, pattern: str) -> Bool[Tensor, " entry"]:
        """Entries that a shell pattern matches: `a*.h*`, `m[0-3]`, `a3` for all heads of layer 3, `m*@S2`, `m3.n1?`.

        A pattern without a span matches a unit's entries at all spans.

        Raises:
            ConfigurationError: the pattern matches nothing.
        """
        if pattern in self._indices:  # a shortcut for stored selections, which name thousands of entries
            return self.mask([pattern])
        unit, at, span = pattern.rpartition(AT) if AT in pattern else (pattern, "", "")
        matched = matching(self.unit_names, unit)[self._entry_units]
        if at:
            matched &= torch.tensor([of is not None and fnmatchcase(of, span) for of in self._entry_spans])
        if not matched.any():
            raise ConfigurationError(
                f"The pattern {pattern!r} matches no component of the kinds {', '.join(self.kinds)}. "
                f"{nearest_names(pattern, self.names)}{self._other_kind(unit)}"
            )
        return matched

    def _other_kind(self, unit: str) -> str:
        """Hint at another kind of site whose units match, if there is one."""
        for name in dict.fromkeys((*DEFAULT_SITES, *SITE_KINDS)):
            if name not in self.kinds and SITE_KINDS[name].may_name(unit, self.dimensions):
                return f"\nIt would match units of the kind {name!r}, which sites does not name."
        return ""

    def replaced(self, masks: Bool[Tensor, "circuit entry"]) -> dict[Site, Bool[Tensor, "circuit slot unit"]]:
        """Units that each circuit ablates, separately for each of `spans`."""
        replaced = {
            site: torch.zeros(len(masks), len(self.spans), n_units, dtype=torch.bool, device=masks.device)
            for site, (n_units, _) in self.sites.items()
        }
        for group in self.groups:
            replaced[group.site][:, self.spans.index(group.span), self._units(group)] = ~masks[:, group.entries]
        return replaced

    def nodes(self, mask: Bool[Tensor, " entry"]) -> tuple[str, ...]:
        """Names of the kept entries."""
        return self.kept(mask)

    def node_level(self, config: Any) -> "Nodes":
        """This level."""
        return self

    def counts(self, mask: Bool[Tensor, " entry"]) -> dict[str, int]:
        """Number of kept entries, and of all entries."""
        return {"nodes": int(mask.sum()), "nodes_total": len(self)}

    @cached_property
    def entry_kinds(self) -> tuple[tuple[str, ...], Int[Tensor, " entry"]]:
        """Kinds of site, and for each entry the index of its kind."""
        kinds = torch.zeros(len(self), dtype=torch.long)
        for group in self.groups:
            kinds[group.entries] = self.kinds.index(group.site.kind)
        return self.kinds, kinds

    def score_map(self, scores: Float[Tensor, " entry"]) -> ScoreMap:
        """A row for each layer (and span), a column for each unit of a layer."""
        firsts, columns = {}, list[str]()
        for name in self.kinds:
            firsts[name] = len(columns)
            n_units = max(units for site, (units, _) in self.sites.items() if site.kind == name)
            label = SITE_KINDS[name].unit_name.removeprefix(".")
            columns += [label.format(unit=unit) if label else name for unit in range(n_units)]
        lines = list(dict.fromkeys((group.site.layer, group.span) for group in self.groups))
        table = torch.full((len(lines), len(columns)), torch.nan)
        for group in self.groups:
            at = [firsts[group.site.kind] + unit for unit in self._units(group)]
            table[lines.index((group.site.layer, group.span)), at] = scores[group.entries].float().cpu()
        names = tuple(f"{layer}" if span is None else f"{layer} {AT}{span}" for layer, span in lines)
        return ScoreMap(table, names, tuple(columns), "layer", "unit")

    @property
    def grid(self) -> tuple[int, int] | None:
        """Number of layers, and of heads in a layer; None unless the units are whole heads and MLPs."""
        plain = set(self.kinds) == set(DEFAULT_SITES) and self.spans == (None,)
        return (self.dimensions.n_layers, self.dimensions.n_heads) if plain else None

    def of_model(self, config: Any) -> "Nodes":
        """The same selection in a model with this Hugging Face configuration."""
        return replace(self, dimensions=Dimensions.of(config))

    def header(self) -> dict[str, Any]:
        """Plain values from which `from_header` rebuilds this level; dictionaries are stored as paths."""
        return {
            "level": self.kind,
            "dimensions": asdict(self.dimensions),
            "sites": list(self.kinds),
            "spanned": list(self.spanned),
            "dictionaries": [
                {name: getattr(dictionary, name) for name in ("path", "site", "centres_input", "fingerprint")}
                for dictionary in self.dictionaries
            ],
        }

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> "Nodes":
        """The level that `header` describes; raises `ArtefactError` if a dictionary is missing or has changed."""
        dictionaries = tuple(map(reload_dictionary, header["dictionaries"]))
        return cls(Dimensions(**header["dimensions"]), tuple(header["sites"]), tuple(header["spanned"]), dictionaries)

    def identity(self) -> dict[str, Any]:
        """The kinds, the spans, and fingerprints of the dictionaries, wherever they are stored."""
        return {
            "level": self.kind,
            "sites": list(self.kinds),
            "spanned": list(self.spanned),
            "dictionaries": [dictionary.fingerprint for dictionary in self.dictionaries],
        }

    def describe(self) -> str:
        """Sizes of the model, in words."""
        return f"{self.dimensions.n_layers} layers of {self.dimensions.n_heads} heads, width {self.dimensions.d_model}"
