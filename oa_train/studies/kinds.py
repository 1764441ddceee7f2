"""Kinds of ablation that a study compares."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from oa_train.ablations.registry import KINDS, AblationKind, AblationSource, check_suits
from oa_train.batches import Batch
from oa_train.studies.study import spoken


@dataclass(frozen=True)
class ChosenKinds:
    """Kinds of ablation of a study, and for each kind that is left out by default the reason."""

    kinds: list[AblationKind]
    left_out: dict[AblationKind, str]

    def lines(self) -> Iterator[str]:
        """Sentences about the kinds that are left out."""
        for reason in dict.fromkeys(self.left_out.values()):
            kinds = [spoken(kind) for kind, other in self.left_out.items() if other == reason]
            yield f"Left out: {' and '.join(kinds)} ablation, because {reason}."


def chosen_kinds(
    requested: list[AblationKind] | None, source: AblationSource, batches: Sequence[Batch]
) -> ChosenKinds:
    """The requested kinds, or by default all that ablate anything and that the prompts allow.

    Raises:
        TaskError: the prompts do not allow a requested kind.
    """
    if requested is not None:
        check_suits(requested, source, batches)
        return ChosenKinds(requested, {})
    reasons = {name: kind.why_not(source, batches) for name, kind in KINDS.items()}
    left_out = {name: reason for name, reason in reasons.items() if reason is not None}
    return ChosenKinds([name for name, kind in KINDS.items() if not kind.restores and name not in left_out], left_out)
