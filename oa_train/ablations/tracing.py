"""Causal tracing: clean values restored in runs whose subject is corrupted (Meng et al. 2022; Li & Janson 2024).

A traced run is one row of a mask over a single selection: the token embeddings of the subject are replaced by a
corruption, and in some layers the output of attention, of the MLP or of the block is restored, at a span, to its value
in the clean run. The share of the lost probability that is recovered measures how much of the recall of the fact
passes through that place.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from oa_train.ablations.base import Ablation
from oa_train.batches import Batch
from oa_train.engine.chunks import ROWS_PER_RUN, chunks
from oa_train.engine.levels import copies_logits
from oa_train.engine.reading import clean_run, read_values
from oa_train.engine.values import Values
from oa_train.errors import ConfigurationError, nearest_names
from oa_train.metrics.measures import measured
from oa_train.models.frozen import CausalLM
from oa_train.models.selection import AT, Nodes
from oa_train.models.sites import SITE_KINDS, Site
from oa_train.progress import Advance
from oa_train.shapes import Bool, Float, Tensor

# Kinds of site that can be restored, with the offset from a block's index to that of its site: the output of block l
# is the residual stream at the input of block l + 1.
RESTORABLE = {"attention": 0, "mlp": 0, "residual": 1}

# The corrupted site: the output of the token embedding, before position embeddings are added.
CORRUPTED = Site("tokens")

SUBJECT = "subject"

# Corruption of the subjects of a batch in some runs: [run or 1, row or 1, position or 1, d_model].
Corruption = Callable[[Batch, slice], Tensor]


@dataclass(frozen=True)
class TracedRun:
    """Site, span and layers that a run restores.

    Attributes:
        kind: key of `RESTORABLE`.
        span: span at which values are restored; see `TokenLayout.span`.
        window: number of neighbouring layers that are restored.
        layer: index of the block in the middle of the window.
    """

    kind: str
    span: str
    window: int
    layer: int

    def layers(self, n_layers: int) -> range:
        """The restored blocks; fewer at both ends of the model."""
        reach = self.window // 2
        return range(max(0, self.layer - reach), min(n_layers, self.layer + reach + 1))


@dataclass(frozen=True)
class Tracing:
    """The traced runs of a model, one for each kind of site, span, window and layer.

    Attributes:
        n_layers: number of layers of the model.
        layers: indices of the blocks in the middle of the windows.
        kinds: kinds of site that are restored, keys of `RESTORABLE`.
        spans: spans at which values are restored.
        windows: odd numbers of neighbouring layers that are restored together.
        subject: span whose tokens are corrupted.
    """

    n_layers: int
    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    spans: tuple[str, ...]
    windows: tuple[int, ...] = (1,)
    subject: str = SUBJECT

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted({*self.layers} & {*range(self.n_layers)}):
            raise ConfigurationError(
                f"layers is {list(self.layers)}; expected ascending numbers from 0 to {self.n_layers - 1}."
            )
        for kind in self.kinds:
            if kind not in RESTORABLE:
                raise ConfigurationError(f"restore names {kind!r}. {nearest_names(kind, RESTORABLE)}")
        for window in self.windows:
            if window < 1 or window % 2 == 0:
                raise ConfigurationError(f"windows names {window}; expected odd numbers of layers, such as 1 or 5.")
        for name, values in {"restore": self.kinds, "at": self.spans, "windows": self.windows}.items():
            if not values or len(set(values)) < len(values):
                raise ConfigurationError(f"{name} is {list(values)}; expected at least one, each once.")

    @cached_property
    def runs(self) -> tuple[TracedRun, ...]:
        """The runs that restore something; `masks` has, and `len` counts, one more, which restores nothing."""
        return tuple(
            TracedRun(kind, span, window, layer)
            for kind in self.kinds
            for span in self.spans
            for window in self.windows
            for layer in self.layers
        )

    def __len__(self) -> int:
        return len(self.runs) + 1

    def level(self, config: Any) -> Nodes:
        """The selection of the subject's token embeddings and of everything that is restored somewhere."""
        patterns = [
            f"{SITE_KINDS[kind].site_name.format(layer='*')}{AT}{s}" for kind in self.kinds for s in self.spans
        ]
        nodes = Nodes.of(config, [CORRUPTED.kind, *self.kinds], [f"{CORRUPTED.kind}{AT}{self.subject}", *patterns])
        return replace(nodes, overlapping=True)  # every run restores at one span

    def masks(self, level: Nodes) -> Bool[Tensor, "run entry"]:
        """A mask for each run; false entries are replaced, by the corruption or by clean values."""
        masks = torch.ones(len(self), len(level), dtype=torch.bool)
        masks[:, level.index(f"{CORRUPTED.kind}{AT}{self.subject}")] = False
        for number, run in enumerate(self.runs):
            for layer in run.layers(self.n_layers):
                name = SITE_KINDS[run.kind].site_name.format(layer=layer + RESTORABLE[run.kind])
                masks[number, level.index(f"{name}{AT}{run.span}")] = False
        return masks

    def describe(self) -> dict[str, Any]:
        """Plain values from which `of_description` restores the tracing."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def of_description(cls, description: dict[str, Any]) -> "Tracing":
        """The tracing that `describe` described."""
        arguments: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in description.items()
        }
        return cls(**arguments)


class Tracer:
    """Runs a model with corrupted subjects and restored values.

    A model run has at most `rows_per_run` rows, runs times prompts; that bounds memory and changes no result.
    """

    def __init__(self, model: CausalLM, tracing: Tracing, rows_per_run: int = ROWS_PER_RUN) -> None:
        self.model, self.tracing, self.rows_per_run = model, tracing, rows_per_run
        self.level = tracing.level(model.config)
        self.masks = tracing.masks(self.level)

    def pieces(self, batch: Batch, gradients: bool = False) -> "Iterator[TracedPrompts]":
        """Pieces of a batch on the model's device, with clean values and the runs that fit in memory at once."""
        pieces = chunks(self.model, self.level, batch, self.masks, self.rows_per_run, gradients)
        return (TracedPrompts(self, prompts, slices) for prompts, slices in pieces)

    def probabilities(
        self, batch: Batch, corruption: Corruption, advance: Advance = lambda rows: None
    ) -> Float[Tensor, "run prompt"]:
        """Probability of each prompt's answers in every run, in float32, on the CPU; `advance` counts rows."""
        return torch.cat([traced for _, traced in self._traced(batch, corruption, advance)], dim=1)

    def lost(
        self, batch: Batch, corruption: Corruption, advance: Advance = lambda rows: None
    ) -> Float[Tensor, "run prompt"]:
        """Drop in the probability of each prompt's answers in every run, on the CPU; see `probability_lost`."""
        parts = self._traced(batch, corruption, advance)
        return torch.cat([probability_lost(clean, traced) for clean, traced in parts], dim=1)

    @torch.no_grad()
    def _traced(
        self, batch: Batch, corruption: Corruption, advance: Advance = lambda rows: None
    ) -> list[tuple[Float[Tensor, " prompt"], Float[Tensor, "run prompt"]]]:
        """Probabilities of the answers in the clean run and in every run, piece by piece."""
        parts = []
        for piece in self.pieces(batch.to(self.model.device)):
            of_piece = []
            for runs in piece.slices:
                of_piece.append(piece.probabilities(runs, corruption(piece.batch, runs)).cpu())
                advance(of_piece[-1].numel())
            parts.append((piece.clean.cpu(), torch.cat(of_piece)))
        return parts


class TracedPrompts:
    """Some prompts of a batch, their clean values and probabilities, and slices of the runs that fit in memory."""

    def __init__(self, tracer: Tracer, batch: Batch, slices: Sequence[slice]) -> None:
        self._tracer, self.batch, self.slices = tracer, batch, slices
        logits, self._values = clean_run(tracer.model, batch, tracer.level)
        self.clean = answer_probability(logits, batch)

    def logits(
        self,
        runs: slice,
        corruption: Float[Tensor, "run_or_1 row_or_1 position_or_1 d_model"],
        recompute: bool = False,
    ) -> Float[Tensor, "run_x_row scored vocabulary"]:
        """Logits of some runs on the prompts, laid out as `Batch.repeat`, with gradients to the corruption."""
        tracer = self._tracer
        masks = tracer.masks[runs]
        corrupted = corruption.expand(len(masks), len(self.batch), -1, -1).flatten(0, 1).unsqueeze(2)
        values = self._values.repeat(len(masks))
        values = Values({**values, CORRUPTED: corrupted})
        return copies_logits(tracer.model, self.batch, tracer.level, masks, values, recompute)

    def probabilities(
        self,
        runs: slice,
        corruption: Float[Tensor, "run_or_1 row_or_1 position_or_1 d_model"],
        recompute: bool = False,
    ) -> Float[Tensor, "run prompt"]:
        """Probability of the answers in some runs, with gradients to the corruption."""
        logits = self.logits(runs, corruption, recompute)
        copies = len(logits) // len(self.batch)
        return answer_probability(logits, self.batch.repeat(copies)).view(copies, -1)


def answer_probability(logits: Float[Tensor, "batch scored vocabulary"], batch: Batch) -> Float[Tensor, " batch"]:
    """Probability of each prompt's answers; the geometric mean over its scored positions."""
    return measured("cross_entropy", logits, logits, batch).neg().exp()


def probability_lost(
    clean: Float[Tensor, " prompt"], traced: Float[Tensor, "*run prompt"]
) -> Float[Tensor, "*run prompt"]:
    """Drop in the answers' probability, clipped at 0: a run with more probability than the model has lost nothing."""
    return (clean - traced).clamp(min=0)


def corrupted_by(ablation: Ablation, model: CausalLM, level: Nodes, subject: str = SUBJECT) -> Corruption:
    """The corruption by an ablation of the subject's token embeddings, the same in all runs.

    It is any ablation that was prepared for this level, the `tokens_level` of the model.
    """

    def corruption(batch: Batch, runs: slice) -> Tensor:
        values = ablation.replacements(batch, lambda prompts: read_values(model, prompts, level))
        return values.at(CORRUPTED, subject).squeeze(2).unsqueeze(0)

    return corruption


def corrupted_by_constants(constants: Float[Tensor, "run d_model"]) -> Corruption:
    """The corruption that replaces the subject's token embeddings by a constant for each run."""
    return lambda batch, runs: constants[runs].to(batch.tokens.device)[:, None, None]


def tokens_level(config: Any, subject: str = SUBJECT) -> Nodes:
    """The selection of the subject's token embeddings alone."""
    return Nodes.of(config, [CORRUPTED.kind], [f"{CORRUPTED.kind}{AT}{subject}"])
