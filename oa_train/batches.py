"""Batches of prompts: made by tasks, read by the engine and the metrics."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from oa_train.errors import TaskError, nearest_names
from oa_train.shapes import Bool, Float, Int, Tensor

TensorFunction = Callable[[Tensor], Tensor]

# A span of all real tokens.
WHOLE = "every"

# Suffixes for tokens in or next to a named span: `subject_last` is the last token of `subject`.
_DERIVED = ("_first", "_last", "_next")


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Positions of a padded batch's tokens, and flags for those that are real, protected, and in each span.

    Attributes:
        positions: position of each token counted from its row's first real token; 0 at padding before it.
        real: True at real tokens, False at padding.
        protected: True at tokens that are never ablated.
        spans: tokens of each named span.
        continued: True if other tokens precede these, as with a key-value cache; spans may then be empty.
    """

    positions: Int[Tensor, "row position"]
    real: Bool[Tensor, "row position"]
    protected: Bool[Tensor, "row position"]
    spans: Mapping[str, Bool[Tensor, "row position"]]
    continued: bool = False

    def span(self, name: str) -> Bool[Tensor, "row position"]:
        """Tokens of a span.

        `name` is a named span, its first or last token or the one after it (`subject_first`, `subject_last`,
        `subject_next`), `-1` for each row's last real token, `-2` for the one before it, or `every` for all tokens.

        Raises:
            TaskError: the prompts have no span of that name, or one of them has no ablatable token in it.
        """
        base, derived = name, ""
        if name not in self.spans:
            derived = next((suffix for suffix in _DERIVED if name.endswith(suffix)), "")
            base = name.removesuffix(derived)
        if base in self.spans:
            inside = self._derived(self.spans[base], derived)
        elif name == WHOLE:
            inside = self.real
        elif name.startswith("-") and name[1:].isdigit():
            from_the_end = self.real.long().flip(1).cumsum(dim=1).flip(1)
            inside = self.real & (from_the_end == int(name[1:]))
        else:
            known = f"{nearest_names(base, self.spans)} " if self.spans else "These prompts name no spans. "
            raise TaskError(
                f"There is no span {name!r} in these prompts. {known}-1 is the last token of every prompt."
            )
        lacking = ~(inside & ~self.protected).any(dim=1)
        if not self.continued and bool(lacking.any()):
            row = int(lacking.nonzero()[0])
            state = "holds protected tokens only" if bool(inside[row].any()) else "is empty"
            raise TaskError(
                f"The span {name!r} {state} in prompt {row} of a batch, so nothing can be ablated there (a "
                "beginning-of-sequence token never is). Choose another span, or leave such prompts out."
            )
        return inside

    def _derived(self, span: Bool[Tensor, "row position"], which: str) -> Bool[Tensor, "row position"]:
        """The tokens of a span, or its first, its last or the one after its last."""
        columns = torch.arange(span.shape[1], device=span.device)
        if which == "_first":
            return span & (columns == span.long().argmax(dim=1, keepdim=True))
        last = torch.where(span, columns, -1).amax(dim=1, keepdim=True)
        if which == "_last":
            return span & (columns == last)
        return self.real & (columns == last + 1) & (last >= 0) if which else span


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts of equal padded length, scored at one position or at several.

    Attributes:
        tokens: token ids; padded on the left or on the right.
        attention_mask: True at real tokens, False at padding.
        scored: columns whose next-token predictions are scored, from left to right. A prompt with fewer columns than
            the others repeats its last one.
        weights: weight of each scored position in the prompt's average; they sum to 1, and repetitions have 0.
        answers: ids of the correct next tokens, padded with -1.
        distractors: ids of the wrong tokens with which answers are compared, padded with -1.
        counterfactual_tokens: the counterfactual prompts, aligned with `tokens` token by token.
        example_ids: index of each prompt within its stream.
        padded: True if a row has padding; stored in addition to the mask to save a device synchronisation.
        protected: True at tokens that are never ablated: a beginning-of-sequence token at the start. It is an
            attention sink, on whose outlier activations every later token relies.
        spans: True at the tokens of each named span.
        scored_from: no column to the left of this one is scored; 0 if it was not known without a synchronisation.
    """

    tokens: Int[Tensor, "batch position"]
    attention_mask: Bool[Tensor, "batch position"]
    scored: Int[Tensor, "batch scored"]
    weights: Float[Tensor, "batch scored"]
    answers: Int[Tensor, "batch scored answer"]
    distractors: Int[Tensor, "batch scored distractor"]
    counterfactual_tokens: Int[Tensor, "batch position"] | None
    example_ids: Int[Tensor, " batch"]
    padded: bool
    protected: Bool[Tensor, "batch position"]
    spans: Mapping[str, Bool[Tensor, "batch position"]] = field(default_factory=dict)
    scored_from: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        # On other devices this would cost a synchronisation, and tensors on the meta device have no values.
        if type(self.scored) is Tensor and self.scored.is_cpu and self.scored.numel():
            self._set_scored_from(int(self.scored.min()))

    def _set_scored_from(self, column: int) -> None:
        object.__setattr__(self, "scored_from", column)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def positions(self) -> Int[Tensor, "batch position"]:
        """Position of each token counted from its row's first real token; 0 at padding before it."""
        return (self.attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Number of real tokens of each prompt."""
        return self.attention_mask.sum(dim=1)

    @property
    def layout(self) -> TokenLayout:
        """Layout of the tokens."""
        return TokenLayout(self.positions, self.attention_mask, self.protected, self.spans)

    def average(self, values: Float[Tensor, "batch scored"]) -> Float[Tensor, " batch"]:
        """Weighted mean of values over the scored positions of each prompt."""
        return (values * self.weights.to(values.dtype)).sum(dim=1)

    def _map(self, function: TensorFunction) -> "Batch":
        changed: dict[str, Any] = {}
        for attribute in fields(self):
            value = getattr(self, attribute.name)
            if isinstance(value, Tensor):
                changed[attribute.name] = function(value)
            elif isinstance(value, Mapping):
                changed[attribute.name] = {name: function(inside) for name, inside in value.items()}
        mapped = replace(self, **changed)
        mapped._set_scored_from(max(self.scored_from, mapped.scored_from))
        return mapped

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Copy to a device; `example_ids`, which seed generators, remain on the CPU."""
        ids = self.example_ids
        return self._map(lambda tensor: tensor if tensor is ids else tensor.to(device, non_blocking=non_blocking))

    def repeat(self, times: int) -> "Batch":
        """Tile the batch: row `s * len(self) + b` is prompt `b`; with `times` 1 this is the batch itself."""
        if times == 1:
            return self
        return self._map(lambda tensor: tensor.repeat(times, *[1] * (tensor.dim() - 1)))

    def rows(self, chosen: slice | Bool[Tensor, " batch"]) -> "Batch":
        """Some of the rows, with their padding: a slice of them, or those whose flag is True."""
        return self._map(lambda tensor: tensor[chosen])

    def pieces(self, most: int) -> "Iterator[Batch]":
        """Split into pieces of at most `most` rows."""
        if len(self) <= most:
            yield self
            return
        for first in range(0, len(self), most):
            yield self.rows(slice(first, first + most))

    def counterfactual(self) -> "Batch":
        """The counterfactual prompts; raises `TaskError` if the task makes none."""
        if self.counterfactual_tokens is None:
            raise TaskError(
                "These prompts have no counterfactuals: their task makes none. Choose another ablation, or give each "
                "prompt of the task a counterfactual."
            )
        other = replace(self, tokens=self.counterfactual_tokens, counterfactual_tokens=None)
        other._set_scored_from(self.scored_from)
        return other


def unanswered(
    tokens: Int[Tensor, "batch position"],
    attention_mask: Bool[Tensor, "batch position"],
    protected: Bool[Tensor, "batch position"] | None = None,
) -> Batch:
    """A batch of prompts without answers, each scored at its last real token; padding may be on either side."""
    n_rows, width = tokens.shape
    columns = torch.arange(width, device=tokens.device)
    none = torch.full((n_rows, 1, 1), -1, device=tokens.device)
    return Batch(
        tokens=tokens,
        attention_mask=attention_mask,
        scored=torch.where(attention_mask, columns, 0).amax(dim=1, keepdim=True),
        weights=torch.ones(n_rows, 1, device=tokens.device),
        answers=none,
        distractors=none,
        counterfactual_tokens=None,
        example_ids=torch.arange(n_rows, device=tokens.device),
        padded=not bool(attention_mask.all()),
        protected=torch.zeros_like(attention_mask) if protected is None else protected,
    )


def leading_tokens(
    tokens: Int[Tensor, "row position"], positions: Int[Tensor, "row position"], token_id: int | None
) -> Bool[Tensor, "row position"]:
    """True at a row's first real token if that is `token_id`, such as a beginning-of-sequence token; never for None.

    Padding to its left also has position 0, so it is True as well if it has the same id.
    """
    if token_id is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    return (positions == 0) & (tokens == token_id)
