"""Ablations by the values that components have on another prompt: resample and counterfactual ablation."""

from collections.abc import Callable

from oa_train.ablations.base import Ablation, SourceValues, ValuesOf
from oa_train.batches import Batch

# Another prompt for each prompt of a batch, token for token parallel to it.
OtherPrompts = Callable[[Batch], Batch]


class OtherPromptAblation(Ablation):
    """Replaces each component's value by the one that it has, at the same position, on another prompt.

    With prompts drawn at random this is resample ablation; with the counterfactual of each prompt it is counterfactual
    ablation, which is no total ablation: what the two prompts share stays.

    Args:
        other_prompts: the other prompt of each prompt; the same whenever it is asked.
        bos_token_id: token that is never replaced at the first position.
    """

    def __init__(self, other_prompts: OtherPrompts, bos_token_id: int | None) -> None:
        self.bos_token_id = bos_token_id
        self._other_prompts = other_prompts

    def replacements(self, batch: Batch, values_of: ValuesOf) -> SourceValues:
        """Run the clean model on the other prompts."""
        return values_of(self._other_prompts(batch))
