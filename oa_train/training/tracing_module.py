"""Training of the constants by which causal tracing corrupts subjects."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import nn

from oa_train.ablations.registry import AblationSource
from oa_train.ablations.tracing import (
    CORRUPTED,
    SUBJECT,
    Tracer,
    Tracing,
    corrupted_by_constants,
    probability_lost,
    tokens_level,
)
from oa_train.ablations.tracing_constants import TracingConstants
from oa_train.batches import Batch
from oa_train.checks import check_choice, check_positive
from oa_train.engine.chunks import ROWS_PER_RUN
from oa_train.models.parts import Dimensions
from oa_train.models.spec import BUILT_IN, LMSpec
from oa_train.shapes import Float, Tensor
from oa_train.training.metric_averages import CircuitMeans
from oa_train.training.optimizers import LRSchedulerCallable, OptimizerCallable
from oa_train.training.settings import as_list
from oa_train.training.side_by_side import BestSlices, Part, SideBySideModule
from oa_train.training.strategies import share_from_first_process

_TABLE = "table"

TracingLoss = Literal["probability", "cross_entropy"]


class TracingModule(SideBySideModule):
    """Finds the constants that hurt each traced run least when they replace the subject's token embeddings.

    Every run restores some clean values (see `ablations.tracing`), and has its own constant, shared by all prompts and
    all tokens of the subject. The best constants minimise the drop in the answers' probability: the mean over prompts
    of max(0, P - P'), with the clean model's probability P and the run's P' (Li & Janson 2024).

    Args:
        lm: the frozen model; the built-in one by default.
        seed: recorded only; nothing here is random.
        restore: what is restored, each in separate runs: `attention` or `mlp` (their outputs), `residual` (the
            residual stream after a block).
        at: spans at which it is restored, each in separate runs: one that the prompts name, its `_first` or `_last`
            token or the `_next` one after it (`subject_last`), `-1` for the last token of the prompt, `every`; by
            default the last token of the prompt and that of the subject.
        windows: odd numbers of neighbouring layers that are restored together.
        layers: blocks in the middle of the windows; all by default. Choose fewer to make a large model affordable.
        subject: span whose tokens are corrupted.
        loss: what training minimises: `probability` as above, or `cross_entropy`, the mean of max(0, log P - log P'),
            whose gradient does not vanish if a run has lost an answer altogether.
        learning_rate: initial learning rate.
        optimizer: class of the optimiser, with its arguments except `lr`; Adam by default.
        lr_scheduler: class of a schedule of the rate, with its arguments; by default cosine decay to zero over the
            whole training.
        rows_per_run: most rows (runs times prompts) whose activations are kept at once; bounds memory, changes no
            result.
        recompute: activation checkpointing of each decoder block; less memory, more time, the same result.

    Raises:
        ConfigurationError: an argument has a value that cannot work.
        ModelError: the model cannot be loaded.
    """

    shardable = False

    def __init__(
        self,
        *,
        lm: LMSpec = BUILT_IN,
        seed: int = 0,
        restore: str | list[str] = ["attention", "mlp"],  # noqa: B006 (never changed)
        at: str | list[str | int] | None = None,
        windows: list[int] = [5],  # noqa: B006 (never changed)
        layers: list[int] | None = None,
        subject: str = SUBJECT,
        loss: TracingLoss = "probability",
        learning_rate: float = 0.01,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        rows_per_run: int = ROWS_PER_RUN,
        recompute: bool = False,
    ) -> None:
        arguments = dict(locals())
        check_positive(learning_rate=learning_rate, rows_per_run=rows_per_run)
        check_choice("loss", loss, get_args(TracingLoss))
        # To YAML, -1 is a number.
        spans = (
            ["-1", f"{subject}_last"] if at is None else [str(span) for span in ([at] if isinstance(at, str) else at)]
        )
        chosen: tuple[Any, ...] = (tuple(as_list(restore)), tuple(spans), tuple(windows), subject)
        Tracing(1, (0,), *chosen)  # refuses wrong names before the model is loaded
        super().__init__(arguments, optimizer, lr_scheduler)
        self.loss, self.learning_rate, self.recompute = loss, learning_rate, recompute
        n_layers = Dimensions.of(self.frozen.config).n_layers
        self.tracing = Tracing(n_layers, tuple(range(n_layers) if layers is None else layers), *chosen)
        self._rows_per_run = rows_per_run
        zeros = torch.zeros(len(self.tracing), Dimensions.of(self.frozen.config).d_model)
        self.constants = nn.Parameter(zeros)
        self.started = nn.Buffer(torch.tensor(False))
        self.best = BestSlices({_TABLE: zeros})
        # The first validation compares the trained constants with the initial ones.
        self._start: Tensor | None = None
        self.losses = CircuitMeans(2, len(self.tracing))

    @cached_property
    def tracer(self) -> Tracer:
        """The tracer, which runs the model."""
        return Tracer(self.frozen, self.tracing, self._rows_per_run)

    def describe(self) -> dict[str, Any]:
        """The traced runs and the loss."""
        return {"tracing": self.tracing.describe(), "loss": self.loss}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The constants of all runs."""
        return [{"params": [self.constants], "lr": self.learning_rate}]

    def on_fit_start(self) -> None:
        """Start every constant at the mean embedding of the subjects' tokens, unless it was restored."""
        if bool(self.started) and self.best.known():
            return
        level = tokens_level(self.frozen.config, self.tracing.subject)
        source = AblationSource(self.frozen, self.data.task, level, track=self.track)
        start = source.mean.tables[CORRUPTED][0].to(self.constants).expand_as(self.constants).clone()
        share_from_first_process([start])
        self._start = start
        if not bool(self.started):
            with torch.no_grad():
                self.constants.copy_(start)
            self.started.fill_(True)

    def _parts(self, batch: Batch) -> Iterator[Part]:
        for piece in self.tracer.pieces(batch, gradients=True):
            for runs in piece.slices:

                def of_runs(piece: Any = piece, runs: slice = runs) -> Float[Tensor, " run"]:
                    probabilities = piece.probabilities(runs, self.constants[runs][:, None, None], self.recompute)
                    if self.loss == "cross_entropy":
                        losses = probability_lost(piece.clean.log(), probabilities.log())
                    else:
                        losses = probability_lost(piece.clean, probabilities)
                    return losses.sum(dim=1) / len(batch)

                yield "train/loss", runs, of_runs

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of all runs."""
        return self.step_of_parts(list(self._parts(batch)), batch, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses of the current constants and, at the first validation, of the initial ones."""
        self._evaluate(batch, [self.constants.detach(), *([] if self._start is None else [self._start])])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses of the best constants."""
        self._evaluate(batch, [self._best()])

    def predict_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, "run prompt"]:
        """Probabilities of the answers in every run under the best constants."""
        return self.tracer.probabilities(batch, corrupted_by_constants(self._best()))

    def _evaluate(self, batch: Batch, tables: list[Tensor]) -> None:
        losses = [self.tracer.lost(batch, corrupted_by_constants(table)).mean(dim=1) for table in tables]
        self.losses.update(torch.stack(losses).to(self.device), len(batch))

    def on_validation_epoch_end(self) -> None:
        """Keep each run's best constants; the best checkpoint minimises the mean of their losses."""
        losses = self.losses.taken()
        if self.trainer.sanity_checking:  # on a few prompts, not comparable with later losses
            return
        if self._start is not None:
            self.best.offer({_TABLE: self._start}, losses[1])
            self._start = None
        self.best.offer({_TABLE: self.constants}, losses[0])
        self.log("val/probability_lost", losses[0].mean(), prog_bar=True, sync_dist=True)
        self.log("val/objective", self.best.loss.mean(), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Report the mean over runs."""
        self.log("test/probability_lost", self.losses.taken()[0].mean(), sync_dist=True)

    def _best(self) -> Float[Tensor, "run d_model"]:
        return self.best.tensors()[_TABLE] if self.best.known() else self.constants.detach()

    def tracing_constants(self, name: str = "tracing") -> TracingConstants:
        """The best constants by validation, or the last ones without one."""
        table = self._best().float().cpu().clone()
        return TracingConstants(name, self.tracing, table, self.provenance())
