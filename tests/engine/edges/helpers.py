"""Small things that the tests of edges share."""

import torch

from oa_train.batches import Batch, unanswered
from oa_train.engine.values import Values
from oa_train.models.frozen import CausalLM
from oa_train.models.graph import Graph
from tests.builders import BOS, PAD, VOCABULARY, random_mask

ARCHETYPES = ["gpt2", "gpt_neo", "llama", "gemma2"]


def protected_batch(lengths: list[int], padding_side: str = "right") -> Batch:
    """Rows of random tokens after a beginning-of-sequence token that is protected, scored at their last one."""
    generator, width = torch.Generator().manual_seed(0), max(lengths)
    columns = torch.arange(width)
    tokens, real = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        real[row] = columns >= width - length if padding_side == "left" else columns < length
        drawn = torch.randint(3, VOCABULARY, (length - 1,), generator=generator)
        tokens[row, real[row]] = torch.cat([torch.tensor([BOS]), drawn])
    return unanswered(tokens, real, (tokens == BOS) & real)


def graph_of(model: CausalLM) -> Graph:
    return Graph.of(model.config)


def all_kept(model: CausalLM, rows: int) -> torch.Tensor:
    return torch.ones(rows, len(graph_of(model)), dtype=torch.float64)


def mask_of(model: CausalLM, rows: int) -> torch.Tensor:
    """Random masks with exact zeros and ones, and gradients."""
    return random_mask(rows, len(graph_of(model))).requires_grad_()


def random_values(model: CausalLM, rows: int = 1, slots: int = 1, seed: int = 0, gradients: bool = True) -> Values:
    """Random float64 values for every source, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    return Values(
        {
            site: torch.randn(rows, slots, *shape, generator=generator, dtype=torch.float64).requires_grad_(gradients)
            for site, shape in graph_of(model).sites.items()
        }
    )


def values_of_kind(model: CausalLM, batch: Batch, kind: str) -> Values:
    """Values that are shared by all tokens, differ by position from a row's first real token, or by row and column."""
    rows, width = batch.tokens.shape
    if kind == "shared":
        return random_values(model)
    if kind == "per position":
        return Values(random_values(model, slots=width).tensors, {None: batch.positions})
    return random_values(model, rows, width)
