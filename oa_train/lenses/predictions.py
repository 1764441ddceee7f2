"""The scored tokens of a batch as inputs of lenses, and the predictions of lenses at them."""

from collections.abc import Iterator

import torch

from oa_train.batches import Batch
from oa_train.engine.tail import read_out, scored_stream
from oa_train.errors import TaskError
from oa_train.lenses.lens import Lens
from oa_train.models.frozen import CausalLM
from oa_train.progress import Track, counted, silent
from oa_train.shapes import Float, Tensor
from oa_train.tasks.task import Task

# Default number of predictions (layers times tokens) that are computed at once.
PREDICTIONS = 1024


class Tokens:
    """The scored tokens of a batch, as lenses read them; positions of weight 0 are left out.

    Attributes:
        logits: logits of the model.
        residuals: input of each block and, last, of the final norm.
        attention: output of each attention layer, which the resample lens and the means need; None if not asked for.
        weights: weight of each token in its prompt's average; they sum to 1 over a prompt.
        rows: index of each token's prompt.
    """

    def __init__(self, model: CausalLM, batch: Batch, attention: bool = False) -> None:
        stream = scored_stream(model, batch, attention)
        counted = batch.weights > 0
        self.logits: Float[Tensor, "token vocabulary"] = stream.logits[counted]
        self.residuals: Float[Tensor, "place token d_model"] = stream.residuals[:, counted]
        self.attention: Float[Tensor, "layer token d_model"] | None = None
        if stream.attention is not None:
            self.attention = stream.attention[:, counted]
        self.weights: Float[Tensor, " token"] = batch.weights[counted]
        self.rows: Tensor = counted.nonzero()[:, 0]
        self._n_rows = len(batch)

    def __len__(self) -> int:
        return len(self.logits)

    def partners(self) -> Float[Tensor, "layer token d_model"]:
        """For each token, the attention outputs at a token of the next prompt in the batch.

        Token i takes those at token i of that prompt, modulo its number of tokens; the last prompt takes the first's.

        Raises:
            TaskError: the batch has only one prompt.
        """
        assert self.attention is not None
        if self._n_rows < 2:
            raise TaskError("A batch of one prompt has no other prompt to resample from; choose a larger batch size.")
        counts = torch.bincount(self.rows, minlength=self._n_rows)
        firsts = counts.cumsum(0) - counts
        within = torch.arange(len(self.rows), device=self.rows.device) - firsts[self.rows]
        others = (self.rows + 1) % self._n_rows
        return self.attention[:, firsts[others] + within % counts[others]]

    def by_prompt(self, values: Float[Tensor, "start token"]) -> Float[Tensor, "start prompt"]:
        """Weighted average over the tokens of each prompt."""
        totals = values.new_zeros(len(values), self._n_rows)
        return totals.index_add_(1, self.rows, values * self.weights.to(values.dtype))

    def pieces(self, n_starts: int, most: int = PREDICTIONS) -> Iterator[slice]:
        """Slices of the tokens, of at most `most` predictions each."""
        at_once = max(1, most // max(1, n_starts))
        for first in range(0, len(self), at_once):
            yield slice(first, min(first + at_once, len(self)))


def lens_logits(
    lens: Lens, model: CausalLM, tokens: Tokens, piece: slice, partners: Tensor | None = None
) -> Float[Tensor, "start token vocabulary"]:
    """Predictions of a lens at a slice of the tokens, differentiable with respect to its parameters."""
    others = None if partners is None else partners[:, piece]
    final = lens(model, tokens.residuals[lens.starts][:, piece], others)
    logits: Tensor = read_out(model, final.flatten(0, 1)).unflatten(0, final.shape[:2])
    return logits


@torch.no_grad()
def mean_attention(model: CausalLM, task: Task, track: Track = silent) -> Float[Tensor, "layer d_model"]:
    """Mean attention outputs at the scored positions of the task's `means` prompts, in float32.

    They are the constants of the mean lens, and the initial constants of others.
    """
    total, n_prompts = torch.zeros(1, dtype=torch.float64), 0
    batches = list(task.batches("means", task.n_means))
    for batch in counted(track, batches, "averaging attention outputs"):
        tokens = Tokens(model, batch.to(model.device), attention=True)
        assert tokens.attention is not None
        of_prompts = torch.einsum("ltd,t->ld", tokens.attention.double(), tokens.weights.double())
        total, n_prompts = total + of_prompts.cpu(), n_prompts + len(batch)
    return (total / n_prompts).float()
