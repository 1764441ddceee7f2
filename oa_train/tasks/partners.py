"""Partners of prompts for resample ablation: other prompts of equal length, whose activations replace their own."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from oa_train.batches import Batch
from oa_train.errors import TaskError
from oa_train.seeds import derive_seed
from oa_train.shapes import Tensor
from oa_train.tasks.task import Task

# Number of prompts after the donors that are searched for a partner with lengths that no donor has.
FURTHER_PROMPTS = 20_000


class Partners:
    """Draws a partner for every prompt: another prompt of equal length from the stream `means`.

    The partner depends only on the seed and the prompt's index, not on its batch.

    Args:
        task: source of the donors.
        seed: other seeds draw other partners.
        spans: spans that have as many tokens in the partner as in the prompt, so that values at a span can be taken
            from the same span of the partner.
    """

    def __init__(self, task: Task, seed: int, spans: Sequence[str] = ()) -> None:
        self._task = task
        self._seed = seed
        self._spans = tuple(spans)
        # Batches of one prompt, by the number of tokens of the prompt and of its spans.
        self._by_lengths: dict[tuple[int, ...], list[Batch]] = {}
        self._n_read = 0

    def __call__(self, batch: Batch) -> Batch:
        """The partners of a batch's prompts, each in its prompt's columns, with its own spans.

        Raises:
            TaskError: the prompts lack one of the spans, or a prompt has no partner of equal lengths.
        """
        partners = []
        for lengths, partner in self._partners(batch):
            if partner is None:
                raise self._without_partner(lengths)
            partners.append(partner)

        def in_columns(values: Sequence[Tensor], padding: Tensor) -> Tensor:
            real = [row[partner.attention_mask] for row, partner in zip(values, partners, strict=True)]
            filled = padding.clone()
            filled[batch.attention_mask] = torch.cat(real).to(padding.device)
            return filled

        nowhere = torch.zeros_like(batch.attention_mask)
        names = partners[0].spans
        return replace(
            batch,
            tokens=in_columns([partner.tokens for partner in partners], batch.tokens),
            protected=in_columns([partner.protected for partner in partners], nowhere),
            spans={name: in_columns([partner.spans[name] for partner in partners], nowhere) for name in names},
            counterfactual_tokens=None,
        )

    def why_lacking(self, batches: Iterable[Batch]) -> str | None:
        """Message about the prompts without a partner: how many, and why; None if all have one."""
        pairs = [pair for batch in batches for pair in self._partners(batch)]
        alone = [lengths for lengths, partner in pairs if partner is None]
        if not alone:
            return None
        lengths = ", ".join(map(str, sorted({n_tokens for n_tokens, *_ in alone})))
        spans = f", with the same in {' and '.join(map(repr, self._spans))}" if self._spans else ""
        return (
            f"{len(alone)} of {len(pairs)} prompts have no partner: no other prompt of the stream means has their "
            f"number of tokens ({lengths}{spans})"
        )

    def _partners(self, batch: Batch) -> Iterator[tuple[tuple[int, ...], Batch | None]]:
        """Lengths of each prompt, and its partner if there is one."""
        tokens = [row[real] for row, real in zip(batch.tokens.cpu(), batch.attention_mask.cpu(), strict=True)]
        for number, lengths, row in zip(batch.example_ids.tolist(), self._lengths(batch), tokens, strict=True):
            # A small file of prompts serves both for training and as donors, and no prompt is its own partner.
            donors = self._with_lengths(lengths)
            first = derive_seed(self._seed, "donor", number) % max(len(donors), 1)
            others = itertools.chain(donors[first:], donors[:first])
            yield (
                lengths,
                next((donor for donor in others if not torch.equal(donor.tokens[donor.attention_mask], row)), None),
            )

    def _lengths(self, batch: Batch) -> list[tuple[int, ...]]:
        spans = [batch.layout.span(name).sum(dim=1) for name in self._spans]
        return [tuple(row) for row in torch.stack([batch.lengths, *spans], dim=1).tolist()]

    def _with_lengths(self, lengths: tuple[int, ...]) -> Sequence[Batch]:
        if not self._n_read:
            for batch in self._task.batches("means", self._task.n_means):
                for row, key in enumerate(self._lengths(batch)):
                    self._by_lengths.setdefault(key, []).append(batch.rows(slice(row, row + 1)))
                self._n_read += len(batch)
        if lengths not in self._by_lengths:
            self._by_lengths[lengths] = self._further(lengths)
        return self._by_lengths[lengths]

    def _further(self, lengths: tuple[int, ...]) -> list[Batch]:
        """The first prompt after the donors with these lengths, for lengths that no donor has; empty if none does."""
        size = self._task.size("means")
        end = self._n_read + FURTHER_PROMPTS
        for number in range(self._n_read, end if size is None else min(size, end)):
            batch = self._task.batch("means", number, 1)
            if self._lengths(batch) == [lengths]:
                return [batch]
        return []

    def _without_partner(self, lengths: tuple[int, ...]) -> TaskError:
        spans = [f", {n} of them in the span {name!r}" for name, n in zip(self._spans, lengths[1:], strict=True)]
        size = self._task.size("means")
        return TaskError(
            f"Resample ablation needs another prompt of {lengths[0]} tokens{''.join(spans)}, and there is none among "
            f"{FURTHER_PROMPTS if size is None else size} prompts of the task {self._task.name}. "
            f"{'Raise n_means' if size is None else 'Add prompts of this length'}, or choose another ablation."
        )
