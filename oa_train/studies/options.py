"""Options that several studies share: units, ablations, positions."""

from collections.abc import Sequence
from typing import Any, Literal

from oa_train.ablations.registry import ABLATION_KINDS, AblationName, check_kind
from oa_train.batches import Batch
from oa_train.checks import check_at_least
from oa_train.errors import ConfigurationError
from oa_train.models.dictionaries import DictionarySpec
from oa_train.models.selection import Nodes


def patterns_of(components: str | list[str]) -> list[str]:
    """The patterns of an option that is a pattern or a list of patterns."""
    return [components] if isinstance(components, str) else components


def selected_units(
    config: Any, sites: Sequence[str], components: str | list[str], dictionaries: Sequence[DictionarySpec]
) -> tuple[Nodes, tuple[str, ...]]:
    """The level of these kinds of site, and the names of its selected units.

    Raises:
        ConfigurationError: a pattern matches nothing, or a kind of site does not exist in this model.
    """
    patterns = patterns_of(components)
    level = Nodes.of(config, sites, patterns, [spec.load() for spec in dictionaries])
    return level, level.select(patterns)


def check_positions(positions: int | Literal["every"] | None) -> None:
    """Raise a `ConfigurationError` if the number of positions is below 1."""
    if isinstance(positions, int) and positions < 1:
        raise ConfigurationError(f"positions is {positions}; expected at least 1, or every.")


def check_unit_options(
    parts_at_once: int, positions: int | Literal["every"], threshold: float, false_discovery_rate: float
) -> None:
    """Raise a `ConfigurationError` if one of these options is out of range."""
    check_positions(positions)
    check_at_least(1, parts_at_once=parts_at_once)
    check_at_least(0, threshold=threshold)
    if not 0 < false_discovery_rate < 1:
        raise ConfigurationError(f"false_discovery_rate is {false_discovery_rate}; expected a share between 0 and 1.")


def n_positions(positions: int | Literal["every"], batches: Sequence[Batch]) -> int:
    """Number of positions with their own constants."""
    return max(int(batch.lengths.max()) for batch in batches) if positions == "every" else positions


def check_ablations(ablations: list[AblationName] | None) -> None:
    """Validate kinds of ablation; None is allowed.

    Raises:
        ConfigurationError: the list is empty, or a kind is unknown or named twice.
    """
    if ablations is None:
        return
    if not ablations:
        raise ConfigurationError(f"ablations is empty; name at least one of {', '.join(ABLATION_KINDS)}.")
    for kind in ablations:
        check_kind("ablations", kind)
    if len(set(ablations)) < len(ablations):
        raise ConfigurationError(f"ablations names one of {', '.join(ablations)} twice.")
