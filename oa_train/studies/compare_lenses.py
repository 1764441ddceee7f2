"""Comparison of lenses: how well each predicts the model's output from its middle layers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from oa_train.checks import check_at_least
from oa_train.figures.lenses import lens_figure
from oa_train.figures.style import Figure
from oa_train.lenses.lens import Lens
from oa_train.lenses.predictions import PREDICTIONS, Tokens, lens_logits
from oa_train.metrics.divergence import kl_divergence
from oa_train.metrics.estimates import Estimate, estimate, paired_difference
from oa_train.progress import Stage, counted
from oa_train.shapes import Float, Tensor
from oa_train.studies.lens_study import LensStudy
from oa_train.studies.study import Findings, Row, Table, spoken

# Maximum number of layers in the table on the terminal, besides the last one.
MOST_LAYERS = 10

# The reference lens, in order of preference: the divergences of the others are compared with its divergence.
REFERENCES = ("oca", "oca_shared", "tuned", "logit")


@dataclass(frozen=True)
class CompareLensesSettings:
    """Settings of `compare_lenses`.

    Attributes:
        lenses: kinds of lens; by default those of the runs, and `logit`, `mean` and `resample`.
        layers: layers to read; by default those of the runs' lenses, or all.
        tuned_lens: folder of a tuned lens in the format of AlignmentResearch (`config.json`, `params.pt`).
        predictions_at_once: predictions (layers times scored positions) computed at once; limits memory without
            changing results.
    """

    lenses: list[str] | None = None
    layers: list[int] | None = None
    tuned_lens: str | None = None
    predictions_at_once: int = PREDICTIONS

    def __post_init__(self) -> None:
        check_at_least(1, predictions_at_once=self.predictions_at_once)


@dataclass(frozen=True, eq=False)
class Readings:
    """Measures of a lens on each prompt, averaged over scored positions.

    Attributes:
        kl: KL divergence of the lens's prediction from the model's, in nats.
        agreement: share of positions at which lens and model have the same top token.
        depth: first layer from which the top token stays the model's; one past the last layer read if there is none.
    """

    kl: Float[Tensor, "start prompt"]
    agreement: Float[Tensor, "start prompt"]
    depth: Float[Tensor, " prompt"]


class CompareLenses(LensStudy[CompareLensesSettings]):
    """Reads the residual stream of every layer with several lenses: what do middle layers already know?

    Rows: one for each lens and layer, with `kl` (divergence of the lens's prediction from the model's, in nats),
    `agreement` (share of scored positions at which both have the same top token) and the paired difference of the
    divergence from the reference's, for example `kl_minus_oca`. Metrics: `depth_<lens>`, the first layer from which
    the lens's top token stays the model's (prediction depth, Belrose et al. 2023).

    Raises:
        ConfigurationError: no run has trained a lens that was asked for, or it lacks a layer that was asked for.
    """

    name = "compare_lenses"
    Settings: ClassVar[type] = CompareLensesSettings
    asks_of = "any"

    def check(self) -> None:
        """Choose the lenses and layers."""
        super().check()
        self.choose_layers(self.settings.layers)
        self.choose_kinds(self.settings.lenses)

    def plan(self) -> list[Stage]:
        """The means if they are needed, and the test prompts."""
        return [*self.mean_stages, Stage("reading", self.task.n_test)]

    def run(self) -> Findings:
        """Read every test prompt with every lens."""
        readings, identities = self._readings(self.lenses(self.settings.tuned_lens)), self.identities
        reference = next((name for name in REFERENCES if name in readings), next(iter(readings)))
        rows = list(self._rows(readings, reference, identities))
        depths = {f"depth_{name}": estimate(read.depth, identities) for name, read in readings.items()}
        return Findings(
            rows,
            metrics=depths,
            facts={"layers": self.layers, "reference": reference},
            shown=list(self._shown(rows, depths, list(readings))),
            figures={"layers": partial(self._figure, rows, list(readings))},
            table="lenses",
        )

    @torch.no_grad()
    def _readings(self, lenses: Mapping[str, Lens]) -> dict[str, Readings]:
        parts: dict[str, list[Readings]] = {name: [] for name in lenses}
        needs_partners = any(lens.needs_partners for lens in lenses.values())
        for batch in counted(self.track, self.batches, "reading every layer"):
            tokens = Tokens(self.model, batch.to(self.model.device), attention=needs_partners)
            partners = tokens.partners() if needs_partners else None
            for name, lens in lenses.items():
                parts[name].append(self._read(lens, tokens, partners if lens.needs_partners else None))
        return {
            name: Readings(
                *(torch.cat([getattr(part, of) for part in of_lens], dim=-1) for of in ("kl", "agreement", "depth"))
            )
            for name, of_lens in parts.items()
        }

    def _read(self, lens: Lens, tokens: Tokens, partners: Tensor | None) -> Readings:
        kl, agrees = [], []
        for piece in tokens.pieces(len(self.layers), self.settings.predictions_at_once):
            logits = lens_logits(lens, self.model, tokens, piece, partners)
            kl.append(kl_divergence(tokens.logits[piece], logits))
            agrees.append(logits.argmax(dim=-1) == tokens.logits[piece].argmax(dim=-1))
        agreement = torch.cat(agrees, dim=1)
        settled = agreement.flip(0).cumprod(dim=0).sum(dim=0)  # number of layers at the end that all agree
        layers = torch.tensor([*self.layers, self.layers[-1] + 1], device=settled.device)
        depth = layers[len(self.layers) - settled].float()
        values = torch.cat([torch.cat(kl, dim=1).float(), agreement.float(), depth.unsqueeze(0)])
        averages = tokens.by_prompt(values).cpu()
        n_layers = len(self.layers)
        return Readings(averages[:n_layers], averages[n_layers:-1], averages[-1])

    def _rows(self, readings: Mapping[str, Readings], reference: str, identities: Tensor) -> Iterator[Row]:
        for name, read in readings.items():
            for number, layer in enumerate(self.layers):
                row: dict[str, Any] = {
                    "lens": name,
                    "layer": layer,
                    "kl": estimate(read.kl[number], identities),
                    "agreement": estimate(read.agreement[number], identities, is_share=True),
                }
                difference = paired_difference(read.kl[number], readings[reference].kl[number], identities)
                yield row | {f"kl_minus_{reference}": difference}

    def _shown(self, rows: Sequence[Row], depths: Mapping[str, Estimate], names: Sequence[str]) -> Iterator[Table]:
        step = -(-len(self.layers) // MOST_LAYERS)
        shown = {*self.layers[::step], self.layers[-1]}
        for measure, title in (
            ("kl", "KL divergence of the lens from the model, in nats"),
            ("agreement", "Share of positions with the model's top token"),
        ):
            cells = [
                {"layer": layer} | {spoken(row["lens"]): _cell(row, measure) for row in rows if row["layer"] == layer}
                for layer in self.layers
                if layer in shown
            ]
            yield Table(f"{title}, on {self.prompts}", cells)
        yield Table(
            "First layer from which the top token stays the model's",
            [{"lens": spoken(name), "prediction depth": depths[f"depth_{name}"]} for name in names],
        )

    def _figure(self, rows: Sequence[Row], names: Sequence[str]) -> Figure:
        lines = {
            spoken(name): {
                measure: [row[measure] for row in rows if row["lens"] == name] for measure in ("kl", "agreement")
            }
            for name in names
        }
        return lens_figure(lines, self.layers, f"{self.subject}: predictions read from the residual stream")


def _cell(row: Row, measure: str) -> Any:
    """A compact cell, because the table has a column for each lens."""
    value: Estimate = row[measure]
    if measure == "kl":
        return value
    return f"{value.mean:.0%} [{value.ci95[0]:.0%}, {value.ci95[1]:.0%}]"
