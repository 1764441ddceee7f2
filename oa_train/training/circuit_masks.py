"""Masks of circuits that are trained side by side: sampled for the selected entries, 1 for all others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from oa_train.checks import check_choice
from oa_train.errors import ConfigurationError
from oa_train.masks.base import MaskDistribution, averaged_gradient
from oa_train.models.dictionaries import Dictionary
from oa_train.models.graph import Graph
from oa_train.models.levels import Level
from oa_train.models.selection import Nodes
from oa_train.models.sites import DEFAULT_SITES, check_site_kinds
from oa_train.seeds import torch_generator
from oa_train.shapes import Bool, Float, Int, Tensor

LevelKind = Literal["nodes", "edges"]

# Longest selection that a checkpoint lists by name; of longer ones it lists the patterns.
MOST_LISTED = 2000


@dataclass(frozen=True, eq=False)
class StepRows:
    """Numbers of rows in one optimiser step, over accumulated batches and processes.

    `counts` are the rows that carry gradient to each mask entry, `n_rows` all rows.
    """

    counts: Int[Tensor, " entry"]
    n_rows: int


class CircuitMasks(nn.Module):
    """A distribution over masks of some entries of a level, for several circuits; all other entries are always kept.

    Shell patterns name the entries that may be ablated; `distribution` makes the distribution for a number of entries.
    An entry is in a discrete circuit when its keep-probability exceeds the threshold.

    Attributes:
        selection: true for entries that are selected.
        n_selected: number of selected entries.
        n_fixed: number of entries that are always kept.

    Raises:
        ConfigurationError: a pattern matches nothing, or all patterns together select nothing.
    """

    def __init__(
        self,
        level: Level,
        patterns: Sequence[str],
        distribution: Callable[[int], MaskDistribution],
        *,
        n_circuits: int = 1,
        threshold: float = 0.5,
        seed: int = 0,
        samples_per_prompt: int = 1,
    ) -> None:
        super().__init__()
        self.level, self.n_circuits, self.threshold = level, n_circuits, threshold
        self.seed, self.samples_per_prompt = seed, samples_per_prompt
        self._patterns = list(patterns)
        selection = torch.ones(len(level)).bool() if self._patterns == ["*"] else level.selected(patterns)
        if not selection.any():
            raise ConfigurationError(f"components is {self._patterns}, which selects nothing that could be trained.")
        self.selection = nn.Buffer(selection, persistent=False)
        self.n_selected = int(selection.sum())
        self.n_fixed = len(level) - self.n_selected
        self.distribution = distribution(n_circuits * self.n_selected)

    @property
    def selected(self) -> list[str]:
        """Names of the selected entries, or the patterns where the names are many."""
        if self.level.entries_at_nodes() is None and self.n_selected <= MOST_LISTED:
            return list(self.level.kept(self.selection))
        return self._patterns

    def describe(self) -> dict[str, Any]:
        """Level, selection and distribution, as plain values."""
        return {
            "level": self.level.identity(),
            "circuits": self.n_circuits,
            "components": self.selected,
            "masks": self.distribution.describe(),
        }

    def sample(self, example_ids: Int[Tensor, " batch"], step: StepRows | None = None) -> Float[Tensor, "row entry"]:
        """Draw S masks over all entries for each of C circuits and of the B prompts with these numbers.

        A prompt's masks depend on the seed and its index alone, not on how prompts are batched or distributed.
        Gradients are averaged over the rows of `step`, by default over those drawn here.

        Returns:
            C * S * B rows in the order of `Batch.repeat(C * S)`, all rows of a circuit together.
        """
        drawn, inside = self._drawn(example_ids)
        if inside is not None:
            rows = step or StepRows(inside.sum(dim=0), len(drawn))
            drawn = averaged_gradient(drawn, rows.counts, rows.n_rows)
        by_circuit = drawn.view(len(drawn), -1, self.n_selected).transpose(0, 1)
        return self._spread(by_circuit.flatten(0, 1))

    @torch.no_grad()
    def rows_of_step(
        self, batches: Sequence[Int[Tensor, " batch"]], over_processes: Callable[[Tensor], Tensor], n_processes: int
    ) -> StepRows | None:
        """Count the rows that carry gradient in a whole step of the optimiser; None if gradients are not averaged.

        `batches` are the prompt numbers of each of this process's batches in the step; their masks can be drawn ahead,
        because the parameters do not change before. `over_processes` sums over all processes, with equally many
        prompts each.
        """
        counts, n_rows = torch.zeros_like(self.distribution.logits, dtype=torch.long), 0
        for numbers in batches:
            _, inside = self._drawn(numbers)
            if inside is None:
                return None
            counts += inside.sum(dim=0)
            n_rows += len(inside)
        return StepRows(over_processes(counts), n_rows * n_processes)

    def _drawn(self, numbers: Int[Tensor, " batch"]) -> tuple[Tensor, Tensor | None]:
        """Masks for each sample of each prompt, side by side for all circuits, and the samples that carry gradient."""
        drawn = self._effective(self.distribution.sample(self._uniform(numbers)))
        return drawn, self.distribution.carries_gradient(drawn)

    def _uniform(self, numbers: Int[Tensor, " batch"]) -> Float[Tensor, "row entry"]:
        shape, device = (self.samples_per_prompt, len(self.distribution.logits)), self.distribution.logits.device
        drawn = [
            torch.rand(shape, generator=torch_generator(self.seed, "masks", number, device=device), device=device)
            for number in numbers.tolist()
        ]
        return torch.stack(drawn, dim=1).flatten(0, 1)

    def _effective(self, drawn: Float[Tensor, "row entry"]) -> Float[Tensor, "row entry"]:
        """Drawn masks with 0 for dangling edges, separately for each circuit in each row."""
        if self.level.entries_at_nodes() is None:
            return drawn
        of_circuits = drawn.reshape(-1, self.n_selected)
        lasting = self.level.prune(self._spread(of_circuits > 0))
        return (of_circuits * lasting[:, self.selection]).view(drawn.shape)

    def _spread(self, drawn: Tensor) -> Tensor:
        """Scatter masks [row, entry] of the selected entries into masks of all entries, with 1 elsewhere."""
        if not self.n_fixed:
            return drawn
        kept = torch.ones(len(drawn), len(self.level), device=drawn.device, dtype=drawn.dtype)
        return kept.masked_scatter(self.selection, drawn)

    def probabilities(self) -> Float[Tensor, "circuit entry"]:
        """Keep-probabilities of the selected entries, with gradients."""
        return self.distribution.keep_probability().view(self.n_circuits, -1)

    @torch.no_grad()
    def keep_probability(self) -> Float[Tensor, "circuit entry"]:
        """Keep-probability of every entry; 1 for those that are not selected."""
        return self._spread(self.probabilities().float())

    @torch.no_grad()
    def above_threshold(self) -> Bool[Tensor, "circuit entry"]:
        """Entries whose keep-probability exceeds the threshold, and all that are not selected."""
        return self._spread(self.distribution.threshold(self.threshold).view(self.n_circuits, -1))

    def discrete(self) -> Bool[Tensor, "circuit entry"]:
        """The discrete circuits: entries above the threshold, without dangling edges."""
        return self.level.prune(self.above_threshold())

    def priced(self, masks: Bool[Tensor, "circuit entry"]) -> Bool[Tensor, "circuit selected"]:
        """The columns of masks that are penalised: those of the selected entries."""
        return masks[:, self.selection]

    def check_size(self, size: int) -> None:
        """Check that a circuit can have this many entries.

        Raises:
            ConfigurationError: the level has fewer entries, or more are always kept.
        """
        if not max(1, self.n_fixed) <= size <= len(self.level):
            raise ConfigurationError(
                f"A circuit of {size} parts was asked for; this model has {len(self.level)}, of which {self.n_fixed} "
                "are always kept because `components` does not select them."
            )

    def largest(self, number: int, size: int) -> Bool[Tensor, " entry"]:
        """The `size` entries of circuit `number` with the highest keep-probabilities; see `check_size`."""
        self.check_size(size)
        # Entries that are not selected come first, whatever else has saturated.
        scores = self.keep_probability()[number].cpu() + ~self.selection.cpu()
        return self.level.largest(scores, size)


def level_of(
    kind: LevelKind, config: Any, sites: list[str], patterns: list[str], dictionaries: list[Dictionary]
) -> Level:
    """The level that a configuration names, for a model with this Hugging Face configuration."""
    return Graph.of(config) if kind == Graph.kind else Nodes.of(config, sites, patterns, dictionaries)


def check_level(level: str, node_penalty: float, sites: list[str]) -> None:
    """Check that a level exists, and that a node penalty and sites are compatible with it.

    Raises:
        ConfigurationError: the level does not exist, or the others are not compatible with it.
    """
    check_choice("level", level, get_args(LevelKind))
    if level == "nodes" and node_penalty:
        raise ConfigurationError(
            f"node_penalty is {node_penalty}, which is for edges: set level to edges, or leave it."
        )
    check_site_kinds("sites", sites)
    if level == "edges" and set(sites) != set(DEFAULT_SITES):
        raise ConfigurationError(
            f"sites is {sites}, and level is edges: edges lead from the embedding, heads and MLPs. Other sites are "
            "for circuits of nodes (level: nodes)."
        )
