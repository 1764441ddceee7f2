"""Gaussian noise in place of a unit's value, or added to it."""

from dataclasses import replace

import torch
from torch.nn.utils.rnn import pad_sequence

from oa_train.ablations.base import Ablation, ValuesOf
from oa_train.ablations.constants import Constants, Tables
from oa_train.batches import Batch
from oa_train.engine.values import Values
from oa_train.models.sites import Site
from oa_train.seeds import torch_generator
from oa_train.shapes import Float, Tensor

# Random streams of kinds whose units have the same shape in every layer; other kinds have a stream for each site.
_STREAMS = {kind: kind for kind in ("heads", "tokens", "residual", "attention", "neurons")}
_STREAMS |= {"embedding": "inputs", "mlp": "mlps"}


class NoiseAblation(Ablation):
    """Replaces each unit by Gaussian noise with the unit's mean and standard deviation.

    Dimensions and positions are drawn independently, so the noise carries nothing about the prompt: a total ablation.
    Each prompt's draw is seeded by its number. Mean and standard deviation (`spread`) are those of every dimension.
    """

    def __init__(self, mean: Constants, spread: Constants, seed: int) -> None:
        self._mean, self._spread, self._seed = mean, spread, seed

    def to(self, device: torch.device | str) -> "NoiseAblation":
        """Copy mean and standard deviation to a device."""
        return NoiseAblation(self._mean.to(device), self._spread.to(device), self._seed)

    def replacements(self, batch: Batch, values_of: ValuesOf) -> Values:
        """Draw noise for every row and column; no model is run."""
        means, spreads = self._mean.replacements(batch), self._spread.replacements(batch)
        drawn = _standard_normal(self._mean.tables, batch, self._seed)
        spans, width = self._mean.slots.spans, batch.tokens.shape[1]
        # Each span has its own mean and the same draws.
        tensors = {
            site: torch.cat([means.at(site, span) + spreads.at(site, span) * drawn[site] for span in spans], dim=1)
            for site in means
        }
        if spans == (None,):
            return Values(tensors)
        columns = torch.arange(width, device=batch.tokens.device).expand(len(batch), -1)
        return Values(tensors, {span: number * width + columns for number, span in enumerate(spans)})


class AddedNoiseAblation(Ablation):
    """Adds Gaussian noise to each unit's clean value, as causal tracing corrupts subjects (Meng et al. 2022).

    Each prompt's draw is seeded by its number. `deviation` is the noise's standard deviation in every dimension.
    """

    def __init__(self, deviation: Constants, seed: int) -> None:
        self._deviation, self._seed = deviation, seed

    @classmethod
    def of_spread(cls, means: Constants, spread: Constants, scale: float, seed: int) -> "AddedNoiseAblation":
        """Noise with `scale` times the standard deviation of all numbers of a unit, the same in every dimension.

        Computed from mean and standard deviation (`spread`) in every dimension. The scale is 3 in causal tracing.
        """
        tables = {site: _overall(scale, table, means.tables[site]) for site, table in spread.tables.items()}
        return cls(replace(spread, tables=tables), seed)

    def to(self, device: torch.device | str) -> "AddedNoiseAblation":
        """Copy the standard deviations to a device."""
        return AddedNoiseAblation(self._deviation.to(device), self._seed)

    def replacements(self, batch: Batch, values_of: ValuesOf) -> Values:
        """Clean values plus noise for every row and column; runs the clean model."""
        clean, deviations = values_of(batch), self._deviation.replacements(batch)
        drawn = _standard_normal(self._deviation.tables, batch, self._seed)
        (span,) = self._deviation.slots.spans
        return Values({site: clean[site] + deviations.at(site, span) * drawn[site] for site in deviations})


def _overall(scale: float, spread: Tensor, mean: Tensor) -> Tensor:
    """`scale` times the standard deviation of all numbers of a unit, from the statistics of its dimensions."""
    squares = (spread.square() + mean.square()).mean(dim=-1, keepdim=True)
    return (scale * (squares - mean.mean(dim=-1, keepdim=True).square()).sqrt()).expand_as(spread)


def _standard_normal(tables: Tables, batch: Batch, seed: int) -> dict[Site, Float[Tensor, "row position unit width"]]:
    """Standard normal numbers for each row's real tokens, which do not depend on padding.

    Sites that share a stream are drawn together.
    """
    together: dict[str, list[Site]] = {}
    for site in tables:
        together.setdefault(_STREAMS.get(site.kind, site.key), []).append(site)
    return {
        site: drawn
        for stream, sites in together.items()
        for site, drawn in zip(sites, _draw(stream, sites, tables[sites[0]], batch, seed), strict=True)
    }


def _draw(
    stream: str, sites: list[Site], table: Tensor, batch: Batch, seed: int
) -> list[Float[Tensor, "row position unit width"]]:
    rows = []
    for number, length in zip(batch.example_ids.tolist(), batch.lengths.tolist(), strict=True):
        generator = torch_generator(seed, "noise", stream, number, device=table.device)
        rows.append(torch.randn(length, len(sites), *table.shape[1:], generator=generator, device=table.device))
    drawn = pad_sequence(rows, batch_first=True)
    aligned = drawn[torch.arange(len(batch), device=table.device).unsqueeze(1), batch.positions]
    return list(aligned.to(table.dtype).unbind(dim=2))
