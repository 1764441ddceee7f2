"""Donors: other prompts of equal length, whose values stand in under resample ablation."""

from collections.abc import Sequence
from dataclasses import replace

from oa_train.batches import Batch
from oa_train.errors import TaskError
from oa_train.seeds import derive_seed
from oa_train.shapes import Int, Tensor
from oa_train.tasks.task import Task

# Further prompts that are looked through for one of a length that no donor has.
FURTHER_PROMPTS = 20_000


class Donors:
    """Gives every prompt a partner: a prompt of as many tokens, from the stream `means`, drawn at random.

    Streams share no text, so a prompt of any other stream is never its own partner, whatever batch it comes in. The
    partner follows from the seed and the prompt's number alone.

    Args:
        task: where donors come from.
        seed: other seeds draw other partners.
    """

    def __init__(self, task: Task, seed: int) -> None:
        self._task = task
        self._seed = seed
        self._by_length: dict[int, list[Int[Tensor, " position"]]] = {}
        self._n_read = 0

    def __call__(self, batch: Batch) -> Batch:
        """The partners of all prompts of a batch, each in its prompt's columns.

        Raises:
            TaskError: the task has no other prompt of one of the lengths.
        """
        tokens = batch.tokens.clone()
        numbers, lengths = batch.example_ids.tolist(), batch.lengths.tolist()
        for row, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
            donors = self._of_length(length)
            chosen = donors[derive_seed(self._seed, "donor", number) % len(donors)]
            tokens[row, batch.attention_mask[row]] = chosen.to(tokens.device)
        return replace(batch, tokens=tokens, counterfactual_tokens=None)

    def _of_length(self, length: int) -> Sequence[Tensor]:
        if not self._n_read:
            for batch in self._task.batches("means", self._task.n_means):
                for row in range(len(batch)):
                    self._add(batch, row)
        if length not in self._by_length:
            self._by_length[length] = [self._first_of_length(length)]
        return self._by_length[length]

    def _add(self, batch: Batch, row: int) -> None:
        tokens = batch.tokens[row][batch.attention_mask[row]]
        self._by_length.setdefault(len(tokens), []).append(tokens)
        self._n_read += 1

    def _first_of_length(self, length: int) -> Tensor:
        """The first of the prompts after the donors that has this length: only rare lengths come here."""
        for number in range(self._n_read, self._n_read + FURTHER_PROMPTS):
            batch = self._task.batch("means", number, 1)
            if int(batch.lengths) == length:
                return batch.tokens[0]
        raise TaskError(
            f"Resample ablation needs another prompt of {length} tokens, and there is none among {FURTHER_PROMPTS} "
            f"prompts of the task {self._task.name}. Raise n_means, or choose another ablation."
        )
