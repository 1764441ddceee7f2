"""Causal tracing of facts: clean values restored in runs with a corrupted subject."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property, partial
from itertools import product
from typing import Any, ClassVar

import numpy as np
import torch

from oa_train.ablations.noise import AddedNoiseAblation
from oa_train.ablations.prompts import OtherPromptAblation
from oa_train.ablations.registry import ABLATION_KINDS, AblationSource, check_suits
from oa_train.ablations.tracing import (
    SUBJECT,
    Corruption,
    Tracer,
    Tracing,
    corrupted_by,
    corrupted_by_constants,
    probability_lost,
    tokens_level,
)
from oa_train.ablations.tracing_constants import TracingConstants
from oa_train.batches import Batch
from oa_train.errors import ConfigurationError, NotFiniteError, TaskError
from oa_train.figures.style import Figure
from oa_train.metrics.estimates import estimate
from oa_train.models.parts import Dimensions
from oa_train.progress import Stage
from oa_train.seeds import derive_seed
from oa_train.shapes import Float, Tensor
from oa_train.studies.pieces import Piece, Pieces
from oa_train.studies.study import Findings, Study, spoken, statistics_stages
from oa_train.studies.trace_settings import DRAWN, GAUSSIAN, OPTIMAL, RESAMPLE, TraceSettings
from oa_train.studies.trace_tables import Traced, place_maps, profiles, token_maps
from oa_train.tasks.partners import Partners

# Default kinds, spans and windows that are restored.
DEFAULTS: tuple[Any, ...] = (("attention", "mlp"), ("-1", f"{SUBJECT}_last"), (5,))

# Below this drop in the answers' probability there is nothing to recover.
LEAST_LOST = 1e-5


class Trace(Study[TraceSettings]):
    """Corrupts the subject and restores clean values layer by layer: where does the model recall a fact?

    Prompts whose most probable token is not an answer are left out and counted. Rows: one for each corruption and
    traced run, with `recovered`, the share of the lost probability that restoring recovers (the average indirect
    effect of Li & Janson 2024, with a delta-method interval), a bootstrap interval for it (`bootstrap_low` and
    `bootstrap_high`), and the `probability` of the answers; and a row for each corruption with nothing restored.

    Raises:
        ConfigurationError: `optimal` was asked for and no run was given, or its constants were not trained for these
            kinds, spans, windows, layers or this subject; or `prompt` is out of range.
        TaskError: the prompts lack a span, or the model answers fewer than two of them correctly.
    """

    name = "trace"
    Settings: ClassVar[type] = TraceSettings
    FromRun: ClassVar[type[Any]] = TracingConstants
    asks_of = "optional"
    resumable = True

    def check(self) -> None:
        """Choose the traced runs and the corruptions."""
        super().check()
        settings, n_layers = self.settings, Dimensions.of(self.model.config).n_layers
        self.constants: TracingConstants | None = self.from_runs[0] if self.from_runs else None
        trained = self.constants.tracing if self.constants else Tracing(n_layers, tuple(range(n_layers)), *DEFAULTS)
        subject = settings.subject or (trained.subject if self.constants else SUBJECT)
        spans = trained.spans if self.constants else ("-1", f"{subject}_last")
        self.tracing = Tracing(
            n_layers,
            tuple(trained.layers if settings.layers is None else settings.layers),
            tuple(settings.restore or trained.kinds),
            tuple(map(str, settings.at or spans)),
            tuple(settings.windows or trained.windows),
            subject,
        )
        self.corruptions = settings.corruptions or ([OPTIMAL, GAUSSIAN] if self.constants else [GAUSSIAN])
        if OPTIMAL in self.corruptions:
            self._check_constants()
        self.tokens = tokens_level(self.model.config, subject)
        self.source = AblationSource(self.model, self.task, self.tokens, 1, self.track)
        check_suits([name for name in self.corruptions if name in ABLATION_KINDS], self.source, self.batches)
        for span in (subject, *self.tracing.spans):
            self.batches[0].layout.span(span)

    def _check_constants(self) -> None:
        if self.constants is None:
            raise ConfigurationError(
                "trace.corruptions names optimal, whose constants have to be trained: run oa-train fit --model "
                "TracingModule ..., then give that run (--run)."
            )
        known = self.constants.tracing
        lacking = [run for run in self.tracing.runs if run not in known.runs]
        if lacking or known.subject != self.tracing.subject:
            raise ConfigurationError(
                f"The run's constants were trained for {_listed(known)}; the study asks for {_listed(self.tracing)}. "
                "Leave out what was not trained, or train constants for it (oa-train fit --model TracingModule ...)."
            )

    def plan(self) -> list[Stage]:
        """The clean model, all traced runs, and the runs of the prompt that is traced token by token."""
        n_test, n_draws = self.task.n_test, self._n_draws
        stages = [Stage("the clean model", n_test)]
        if GAUSSIAN in self.corruptions:
            stages += statistics_stages(["noise"], self.task)
        stages.append(Stage("tracing", n_test * len(self.tracing) * n_draws))
        if self.settings.prompt is not None:
            longest = max(batch.tokens.shape[1] for batch in self.batches)
            n_runs = len(self.tracing.kinds) * len(self.tracing.layers) * longest
            stages.append(Stage("one prompt, token by token", n_runs * n_draws))
        return stages

    @property
    def _n_draws(self) -> int:
        return sum(map(self._draws, self.corruptions))

    def _draws(self, corruption: str) -> int:
        return self.settings.draws if corruption in DRAWN else 1

    @cached_property
    def known(self) -> list[Batch]:
        """The test prompts that the model answers correctly, in batches of at most `prompts_at_once`.

        Raises:
            TaskError: there are fewer than two.
        """
        right = self._clean.accuracy[0] == 1
        if int(right.sum()) < 2:
            raise TaskError(
                f"The model answers {int(right.sum())} of the {len(right)} test prompts with its most probable token, "
                "so there is no fact whose recall could be traced. `oa-train check-data` shows what it answers."
            )
        parts = right.split([len(batch) for batch in self.batches])
        chosen = (b.rows(flags) for b, flags in zip(self.batches, parts, strict=True) if bool(flags.any()))
        return [piece for batch in chosen for piece in batch.pieces(self.settings.prompts_at_once)]

    @cached_property
    def _clean(self) -> Any:
        return self.clean_behaviour()

    def run(self) -> Findings:
        """Trace every prompt that the model answers correctly, under every corruption."""
        right = self._clean.accuracy[0] == 1
        known, identities = self.known, self._clean.identities[right]
        clean = (-self._clean.cross_entropy[0][right].double()).exp()
        if self.settings.prompt is not None and not 0 <= self.settings.prompt < len(clean):
            raise ConfigurationError(
                f"trace.prompt is {self.settings.prompt}; expected 0 to {len(clean) - 1}, the index of a prompt "
                "that the model answers correctly."
            )
        traced = self._traced(len(known))
        drops = {name: probability_lost(clean, p).mean(dim=0) for name, p in traced.items()}
        for name, values in drops.items():
            if not float(values[-1].mean()) > LEAST_LOST:
                raise NotFiniteError(f"Under the corruption {name} the answers lose no probability; choose another.")
        traced_runs = Traced(self.tracing, traced, drops, identities)
        rows, layers = list(traced_runs.rows()), self.tracing.layers
        figures: dict[str, Callable[[], Figure | None]] = {
            "layers": partial(
                profiles, rows, layers, f"{self.subject}: clean values restored while the subject is corrupted"
            ),
            "map": partial(place_maps, rows, layers, f"{self.subject}: recovered share of the lost probability"),
        }
        if self.settings.prompt is not None:
            figures["prompt"] = partial(token_maps, *self._by_token(self.settings.prompt), layers, self.subject)
        n_test, n_known = self.task.n_test, len(clean)
        return Findings(
            rows,
            metrics={"clean_probability": estimate(clean, identities)},
            facts={
                "n_known": n_known,
                "n_left_out": n_test - n_known,
                "tracing": self.tracing.describe(),
                "agreement": traced_runs.agreement(),
                "localisation": list(traced_runs.localisation()),
            },
            shown=[
                f"{n_known} of {n_test} test prompts are traced: those that the model answers correctly",
                *traced_runs.tables(estimate(clean, identities)),
            ],
            figures=figures,
            table="trace",
        )

    def _corruption(self, name: str, draw: int) -> Corruption:
        seed = derive_seed("tracing", self.task.seed, draw)
        if name == OPTIMAL:
            assert self.constants is not None
            chosen = [self.constants.tracing.runs.index(run) for run in self.tracing.runs]
            return corrupted_by_constants(self.constants.table[[*chosen, len(self.constants.table) - 1]])
        source = self.source
        if name == GAUSSIAN:
            ablation: Any = AddedNoiseAblation.of_spread(source.mean, source.spread, self.settings.noise, seed)
        elif name == RESAMPLE:
            ablation = OtherPromptAblation(Partners(self.task, seed, [self.tracing.subject]), source.level.spans)
        else:
            ablation = ABLATION_KINDS[name].prepare(source)
        return corrupted_by(ablation.to(self.model.device), self.model, self.tokens, self.tracing.subject)

    def _traced(self, n_batches: int) -> dict[str, Float[Tensor, "draw run prompt"]]:
        """Probabilities of the answers, computed or read from finished pieces."""
        drawn = [(name, draw) for name in self.corruptions for draw in range(self._draws(name))]
        jobs = list(product(drawn, range(n_batches)))
        tracer = Tracer(self.model, self.tracing, self.settings.rows_per_run)
        corruptions = {key: self._corruption(*key) for key in drawn}
        missing = [len(self.known[jobs[number][1]]) for number in self._pieces.missing(len(jobs))]
        with self.track(len(self.tracing) * sum(missing), "tracing") as advance:

            def compute(number: int) -> Piece:
                key, batch = jobs[number]
                return {"probabilities": tracer.probabilities(self.known[batch], corruptions[key], advance)}

            pieces = [piece["probabilities"] for piece in self._pieces.all(len(jobs), compute)]
        draws: dict[str, list[Tensor]] = {name: [] for name in self.corruptions}
        for number, (name, _) in enumerate(drawn):
            draws[name].append(torch.cat(pieces[number * n_batches : (number + 1) * n_batches], dim=1))
        return {name: torch.stack(of_draws).double() for name, of_draws in draws.items()}

    @cached_property
    def _pieces(self) -> Pieces:
        about = {
            "settings": asdict(self.settings),
            "tracing": self.tracing.describe(),
            "corruptions": list(self.corruptions),
            "task": self.task.describe() | {"n_test": self.task.n_test, "n_means": self.task.n_means},
            "fingerprint": self.fingerprint,
        }
        return Pieces(self.folder, about)

    def _by_token(self, number: int) -> tuple[dict[tuple[str, str], np.ndarray], list[str], str]:
        """Recovery at each token of one prompt, for each corruption and kind; the tokens, and the answer.

        Under `optimal` all runs use the constants trained with nothing restored; none are trained for single tokens.
        """
        prompt = [batch.rows(slice(row, row + 1)) for batch in self.known for row in range(len(batch))][number]
        columns = (prompt.attention_mask & ~prompt.protected)[0].nonzero().flatten().tolist()
        spans = tuple(f"-{count}" for count in range(len(columns), 0, -1))
        tracing = replace(self.tracing, spans=spans, windows=self.tracing.windows[:1])
        tracer, tables = Tracer(self.model, tracing, self.settings.rows_per_run), dict[tuple[str, str], np.ndarray]()
        with self.track(len(tracing) * self._n_draws, "one prompt, token by token") as advance:
            for name in self.corruptions:
                draws = [
                    tracer.lost(prompt, self._unrestored(name, draw), advance) for draw in range(self._draws(name))
                ]
                drop = torch.stack(draws).mean(dim=0)[:, 0]
                shares = (1 - drop / drop[-1].clamp(min=1e-12))[:-1].view(len(tracing.kinds), len(spans), -1)
                for kind, table in zip(tracing.kinds, shares, strict=True):
                    tables[spoken(name), kind] = table.numpy()
        inside = prompt.layout.span(tracing.subject)[0].tolist()
        words = [str(self.task.tokenizer.decode([token])).strip() or " " for token in prompt.tokens[0].tolist()]
        answer = str(self.task.tokenizer.decode([int(prompt.answers[0, -1, 0])])).strip()
        return tables, [words[column] + "*" * inside[column] for column in columns], answer

    def _unrestored(self, name: str, draw: int) -> Corruption:
        """The corruption of the run that restores nothing, used in every run."""
        if name != OPTIMAL:
            return self._corruption(name, draw)
        assert self.constants is not None
        last = self.constants.table[-1:].to(self.model.device)
        return lambda batch, runs: last[:, None, None]


def _listed(tracing: Tracing) -> str:
    layers = ", ".join(map(str, tracing.windows))
    return (
        f"{', '.join(tracing.kinds)} at {', '.join(tracing.spans)} in windows of {layers} layers ({tracing.subject})"
    )
