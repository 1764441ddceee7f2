"""Accuracy and logit difference of the clean model on a task, before anything is trained."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from oa_train.batches import Batch
from oa_train.engine.forward import scored_logits
from oa_train.metrics.estimates import Estimate, estimate
from oa_train.metrics.measures import measured
from oa_train.models.frozen import CausalLM
from oa_train.progress import Advance, Track, silent
from oa_train.shapes import Float, Int, Tensor
from oa_train.tasks.task import Task

# Number of prompts that suffices to tell whether a model can do a task.
ENOUGH = 64

# A model that prefers the answer to the wrong ones on a smaller share of prompts cannot do the task: guessing is 0.5.
ABLE_FROM = 0.75


@dataclass(frozen=True, eq=False)
class Ability:
    """The clean model's behaviour on prompts of a task.

    Attributes:
        accuracy: share of the scored positions at which the top token is an answer.
        logit_difference: log odds of the answers against the wrong ones, or, if there are none, against all others.
        top: id of the top token at the last scored position.
        has_distractors: the prompts have wrong answers.
    """

    accuracy: Float[Tensor, " prompt"]
    logit_difference: Float[Tensor, " prompt"]
    top: Int[Tensor, " prompt"]
    has_distractors: bool

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Means with intervals, which need at least two prompts."""
        return {
            "accuracy": estimate(self.accuracy, is_share=True),
            "logit_difference": estimate(self.logit_difference),
        }

    @property
    def preferred(self) -> float:
        """Share of prompts on which the answers are more probable than the wrong ones."""
        return float((self.logit_difference > 0).double().mean())

    @property
    def warning(self) -> str | None:
        """A warning for the user if the model cannot do the task, else None."""
        share = self.preferred if self.has_distractors else float(self.accuracy.mean())
        if share >= ABLE_FROM:
            return None
        does = "prefers the answers to the wrong ones" if self.has_distractors else "gives an answer"
        return (
            f"Warning: the clean model {does} on only {share:.0%} of the prompts, so it cannot do this task and a "
            "circuit would explain something else. `oa-train check-data` shows the prompts; choose others, or a "
            "larger model."
        )

    def lines(self, prompts: str, warn: bool = True) -> list[str]:
        """Accuracy and logit difference in a sentence, with the warning if there is one.

        Args:
            prompts: what was evaluated, as in "validation prompts".
            warn: add the warning.
        """
        figures = self.estimates
        sentence = (
            f"clean model on {len(self.top)} {prompts}: accuracy {figures['accuracy']}, logit difference "
            f"{figures['logit_difference']}"
        )
        return [sentence, *([self.warning] if self.warning and warn else [])]


@torch.no_grad()
def clean_ability(model: CausalLM, batches: Iterable[Batch], advance: Advance = lambda passes: None) -> Ability:
    """Accuracy and logit difference of the clean model on prompts; `advance` counts them."""
    parts, tops, has_distractors = [], [], False
    for batch in batches:
        moved = batch.to(model.device)
        logits = scored_logits(model, moved)
        parts.append([measured(name, logits, logits, moved) for name in ("accuracy", "logit_difference")])
        tops.append(logits[:, -1].argmax(dim=-1))
        advance(len(batch))
        has_distractors = has_distractors or bool((moved.distractors >= 0).any())
    accuracy, difference = (torch.cat(values).cpu() for values in zip(*parts, strict=True))
    return Ability(accuracy, difference, torch.cat(tops).cpu(), has_distractors)


def ability_before_training(model: CausalLM, task: Task, track: Track = silent) -> list[str]:
    """Lines for the user before training: remarks on the task's prompts, and how well the clean model does on them."""
    n_prompts = min(task.n_validation, ENOUGH)
    with track(n_prompts, "clean model on validation prompts") as advance:
        ability = clean_ability(model, task.batches("validation", n_prompts), advance)
    return [*task.remarks, *ability.lines("validation prompts", warn=task.solvable)]
