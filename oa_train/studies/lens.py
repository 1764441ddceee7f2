"""Predictions of one prompt, layer by layer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch

from oa_train.batches import Batch, unanswered
from oa_train.checks import check_at_least
from oa_train.errors import ConfigurationError
from oa_train.figures.lenses import prediction_grid
from oa_train.lenses.lens import LENS_KINDS, Lens
from oa_train.lenses.predictions import PREDICTIONS, Tokens, lens_logits
from oa_train.metrics.divergence import kl_divergence
from oa_train.metrics.estimates import written
from oa_train.shapes import Float, Tensor
from oa_train.studies.lens_study import LensStudy
from oa_train.studies.study import Findings, Row, Table, spoken


@dataclass(frozen=True)
class LensSettings:
    """Settings of `lens`.

    Attributes:
        prompt: text to read; by default the first test prompt.
        lens: kind of lens; by default the run's first, or `logit`.
        layers: layers to read; by default those of the run's lenses, or all.
        tokens: number of most probable tokens listed for each layer.
    """

    prompt: str | None = None
    lens: str | None = None
    layers: list[int] | None = None
    tokens: int = 3

    def __post_init__(self) -> None:
        check_at_least(1, tokens=self.tokens)
        if self.prompt is not None and not self.prompt.strip():
            raise ConfigurationError("lens.prompt is empty; expected a text.")


class ReadPrompt(LensStudy[LensSettings]):
    """Reads one prompt's residual stream at every layer: when does the prediction form?

    Rows: one for each layer and position, with the most probable tokens, their probabilities, and `kl`, the divergence
    of the lens's prediction from the model's, in nats. The last row of each position (`layer` is `model`) is the
    model's own prediction.

    Raises:
        ConfigurationError: no run has trained this lens, it lacks a layer that was asked for, or it is the resample
            lens.
    """

    name = "lens"
    Settings: ClassVar[type] = LensSettings
    asks_of = "optional"

    def check(self) -> None:
        """Choose the lens and the layers."""
        super().check()
        self.choose_kinds(None if self.settings.lens is None else [self.settings.lens])
        self.kinds = self.kinds[:1]
        if LENS_KINDS[self.kinds[0]].needs_partners:
            raise ConfigurationError(
                f"The {self.kinds[0]} lens needs other prompts; choose another lens for a single prompt."
            )
        self.choose_layers(self.settings.layers)

    @torch.no_grad()
    def run(self) -> Findings:
        """Read the prompt with the lens at every layer."""
        text = self.settings.prompt or self.task.prompt("test", 0).text
        batch = self._batch(text).to(self.model.device)
        (kind,), lens, tokens = self.kinds, next(iter(self.lenses().values())), Tokens(self.model, batch)
        logits, divergence = self._predictions(lens, tokens)
        columns = [self._word(token) for token in batch.tokens[0].tolist()]
        top = logits.softmax(dim=-1).topk(self.settings.tokens, dim=-1)
        places = [*map(str, self.layers), "model"]
        rows = list(self._rows(places, columns, top.values, top.indices, divergence))
        words = [[self._word(token) for token in line] for line in top.indices[..., 0].tolist()]
        probabilities = top.values[..., 0].numpy()
        title = f"{self.subject.split(',')[0]}, {spoken(kind)} lens: most probable next token at every layer"
        heading = f"Next token after {text!r}, predicted by the {spoken(kind)} lens"
        return Findings(
            rows,
            facts={"prompt": text, "lens": kind},
            shown=[Table(heading, list(self._cells(rows, columns)))],
            figures={"predictions": partial(prediction_grid, words, probabilities, places, columns, title)},
            table="predictions",
        )

    def _batch(self, text: str) -> Batch:
        """The text as a batch of one prompt, scored at every position."""
        encoder = self.task.encoder
        tokens, mask = encoder.pad(encoder.encode([text]), "right")
        batch = unanswered(tokens, mask, encoder.protected(tokens, mask))
        width = tokens.shape[1]
        none = torch.full((1, width, 1), -1)
        scored, weights = torch.arange(width).unsqueeze(0), torch.full((1, width), 1 / width)
        return replace(batch, scored=scored, weights=weights, answers=none, distractors=none)

    def _predictions(
        self, lens: Lens, tokens: Tokens
    ) -> tuple[Float[Tensor, "place token vocabulary"], Float[Tensor, "place token"]]:
        parts = [
            lens_logits(lens, self.model, tokens, piece) for piece in tokens.pieces(len(self.layers), PREDICTIONS)
        ]
        logits = torch.cat([torch.cat(parts, dim=1), tokens.logits.unsqueeze(0)]).float()
        return logits.cpu(), kl_divergence(tokens.logits.cpu(), logits.cpu())

    def _word(self, token: int) -> str:
        return str(self.task.tokenizer.decode([token])).replace("\n", "\\n") or " "

    def _rows(
        self, places: Sequence[str], columns: Sequence[str], values: Tensor, tokens: Tensor, divergence: Tensor
    ) -> Iterator[Row]:
        for position, column in enumerate(columns):
            for number, name in enumerate(places):
                row: dict[str, Any] = {"position": position, "token": column, "layer": name}
                for rank in range(tokens.shape[-1]):
                    row[f"top_{rank + 1}"] = self._word(int(tokens[number, position, rank]))
                    row[f"probability_{rank + 1}"] = float(values[number, position, rank])
                yield row | {"kl": float(divergence[number, position])}

    def _cells(self, rows: Sequence[Row], columns: Sequence[str]) -> Iterator[Row]:
        """Rows of the last position for the terminal, the model's own prediction first."""
        for row in reversed([row for row in rows if row["position"] == len(columns) - 1]):
            cells: dict[str, Any] = {"layer": row["layer"]}
            for rank in range(self.settings.tokens):
                cells[f"{rank + 1}."] = f"{row[f'top_{rank + 1}']!r} {row[f'probability_{rank + 1}']:.3f}"
            yield cells | {"KL from the model": written(max(0.0, row["kl"]))}
