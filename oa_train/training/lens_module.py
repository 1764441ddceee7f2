"""Training of lenses."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from oa_train.batches import Batch
from oa_train.checks import check_positive
from oa_train.errors import ConfigurationError, nearest_names
from oa_train.lenses.lens import LENS_KINDS, ConstantsLens, Lens, check_layers, check_lens_kinds
from oa_train.lenses.mean_attention import mean_attention
from oa_train.lenses.predictions import PREDICTIONS, Tokens, lens_logits
from oa_train.lenses.trained_lenses import TrainedLenses
from oa_train.metrics.divergence import kl_divergence
from oa_train.models.parts import Dimensions
from oa_train.models.spec import BUILT_IN, LMSpec
from oa_train.shapes import Float, Tensor
from oa_train.training.averages import CircuitMeans
from oa_train.training.best_slices import BestSlices
from oa_train.training.module import FrozenModelModule
from oa_train.training.optimizers import LRSchedulerCallable, OptimizerCallable, decaying_to_zero
from oa_train.training.settings import as_list
from oa_train.training.steps import share_of_step
from oa_train.training.strategies import share_from_first_process
from oa_train.training.summed import summed

# Default learning rates of each kind of lens: constants, and affine maps.
RATES = {"oca": 0.003, "oca_shared": 0.003, "tuned": 0.0003, "linear_oca": 0.0003}


class LensModule(FrozenModelModule):
    """Trains lenses, at all layers at once, to predict what the model predicts.

    The loss of a lens at a layer is the KL divergence of its prediction from the model's (of `linear_oca` from that of
    `oca`), averaged over the scored positions of the prompts. Layers and lenses are trained independently on the same
    prompts, each with its own best state by validation; only the constants of `oca_shared` serve all layers.

    Args:
        lm: the frozen model; the built-in one by default.
        seed: recorded only; nothing here is random.
        lenses: kinds that are trained: `oca` (constants in place of all later attention outputs, its own for each
            layer), `oca_shared` (the same constants for all layers), `tuned` (an affine map), `linear_oca` (an affine
            map that matches `oca`).
        layers: layers at which lenses are trained; all by default.
        learning_rates: initial learning rate by kind; kinds that are not named have that of `RATES`.
        optimizer: class of the optimiser, with its arguments except `lr`; Adam by default.
        lr_scheduler: class of a schedule of the rates, with its arguments; by default cosine decay to zero over the
            whole training.
        predictions_at_once: predictions (layers times scored positions) whose activations are kept at once; bounds
            memory, changes no result.

    Raises:
        ConfigurationError: an argument has a value that cannot work.
        ModelError: the model cannot be loaded.
    """

    keeps_best = True
    shardable = False

    def __init__(
        self,
        *,
        lm: LMSpec = BUILT_IN,
        seed: int = 0,
        lenses: str | list[str] = ["oca", "tuned"],  # noqa: B006 (never changed)
        layers: list[int] | None = None,
        learning_rates: dict[str, float] | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        predictions_at_once: int = PREDICTIONS,
    ) -> None:
        arguments = dict(locals())
        kinds = as_list(lenses)
        check_lens_kinds("lenses", kinds, trained=True)
        check_positive(predictions_at_once=predictions_at_once, **(learning_rates or {}))
        for kind in learning_rates or ():
            if kind not in kinds:
                raise ConfigurationError(f"learning_rates names {kind!r}. {nearest_names(kind, kinds)}")
        super().__init__(arguments, optimizer, lr_scheduler or partial(decaying_to_zero, self))
        sizes = Dimensions.of(self.frozen.config)
        self.starts = check_layers(layers, sizes.n_layers)
        self._sizes = sizes.n_layers, sizes.d_model
        self.rates = {kind: (learning_rates or {}).get(kind, RATES[kind]) for kind in kinds}
        self.predictions_at_once = predictions_at_once
        self.lenses = nn.ModuleDict({kind: LENS_KINDS[kind].make(self.starts, *self._sizes) for kind in kinds})
        self.best = nn.ModuleDict({kind: BestSlices(lens.trained()) for kind, lens in self._kinds()})
        self.started: Tensor
        self.register_buffer("started", torch.tensor(False))
        # The first validation compares the trained lenses with their initial state.
        self._start: dict[str, Lens] = {}
        self._losses = CircuitMeans(2 * len(kinds), len(self.starts))

    def _kinds(self) -> Iterator[tuple[str, Any]]:
        yield from self.lenses.items()

    def describe(self) -> dict[str, Any]:
        """Kinds and layers."""
        return {"lenses": list(self.lenses), "layers": self.starts}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """A group for each lens."""
        return [{"params": list(lens.parameters()), "lr": self.rates[kind]} for kind, lens in self._kinds()]

    def on_fit_start(self) -> None:
        """Start constants at the mean attention outputs, unless they were restored."""
        if bool(self.started) and all(best.known() for best in self._bests().values()):
            return
        means = None
        if any(LENS_KINDS[kind].from_means for kind in self.lenses):
            means = mean_attention(self.frozen, self.data.task, self.track).to(self.device)
            share_from_first_process([means])
        for kind, lens in self._kinds():
            start = LENS_KINDS[kind].make(self.starts, *self._sizes).to(self.device).requires_grad_(False)
            if isinstance(start, ConstantsLens):
                assert means is not None
                start.load(means)
            self._start[kind] = start
            if not bool(self.started):
                lens.load_state_dict(start.state_dict())
        self.started.fill_(True)

    def _parts(self, tokens: Tokens, n_prompts: int) -> Iterator[tuple[str, Callable[[], Float[Tensor, " start"]]]]:
        """Kinds of lens, each with a function that computes its loss on some of the tokens."""
        weights = tokens.weights / n_prompts
        for kind, lens in self._kinds():
            for piece in tokens.pieces(len(self.starts), self.predictions_at_once):

                def losses(kind: str = kind, lens: Lens = lens, piece: slice = piece) -> Float[Tensor, " start"]:
                    logits = lens_logits(lens, self.frozen, tokens, piece)
                    kl = kl_divergence(self._target(kind, tokens, piece), logits)
                    return kl @ weights[piece].to(kl.dtype)

                yield kind, losses

    def _target(self, kind: str, tokens: Tokens, piece: slice) -> Tensor:
        """Logits that a lens is trained to match."""
        teacher = LENS_KINDS[kind].teacher
        if not teacher:
            return tokens.logits[piece]
        with torch.no_grad():
            lens: Any = self.lenses[teacher]
            return lens_logits(lens, self.frozen, tokens, piece)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of all lenses at all layers."""
        tokens = Tokens(self.frozen, batch)
        parts = list(self._parts(tokens, len(batch)))
        values, loss = summed([losses for _, losses in parts], list(self.lenses.parameters()))
        sums = dict.fromkeys(self.lenses, torch.zeros(len(self.starts), device=self.device))
        for (kind, _), value in zip(parts, values, strict=True):
            sums[kind] = sums[kind] + value
        means = {kind: self.over_processes(value) for kind, value in sums.items()}
        self.check_finite({f"train/kl_{kind}": value for kind, value in means.items()}, "Losses", batch)
        for kind, value in means.items():
            self.log(f"train/kl_{kind}", value.mean(), prog_bar=True, batch_size=len(batch))
        # A sum, so that the gradient of a lens at a layer is that of its own mean, whatever else is trained.
        return loss * share_of_step(self.trainer, self.data.epoch_length, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses of the trained lenses and, at the first validation, of their initial state."""
        self._evaluate(batch, [dict(self._kinds()), *([self._start] if self._start else [])])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses of the best lenses."""
        self._evaluate(batch, [self._best_lenses()])

    @torch.no_grad()
    def _evaluate(self, batch: Batch, sets: list[dict[str, Any]]) -> None:
        tokens, rows = Tokens(self.frozen, batch), []
        for lenses in sets:
            for kind, lens in lenses.items():
                pieces = []
                for piece in tokens.pieces(len(self.starts), self.predictions_at_once):
                    logits = lens_logits(lens, self.frozen, tokens, piece)
                    teacher = LENS_KINDS[kind].teacher
                    target = tokens.logits[piece]
                    if teacher:
                        target = lens_logits(lenses[teacher], self.frozen, tokens, piece)
                    pieces.append(kl_divergence(target, logits))
                rows.append(tokens.by_prompt(torch.cat(pieces, dim=1)).mean(dim=1))
        self._losses.update(torch.stack(rows).to(self.device), len(batch))

    def _mean_losses(self) -> Float[Tensor, "lens start"]:
        losses: Tensor = self._losses.compute()
        self._losses.reset()
        return losses

    def on_validation_epoch_end(self) -> None:
        """Keep the best state of each lens at each layer; the best checkpoint minimises the mean of their losses."""
        losses = self._mean_losses()
        if self.trainer.sanity_checking:  # on a few prompts, not comparable with later losses
            return
        for number, (kind, lens) in enumerate(self._kinds()):
            if self._start:
                self._offer(kind, self._start[kind], losses[len(self.lenses) + number])
            self._offer(kind, lens, losses[number])
            self.log(f"val/kl_{kind}", losses[number].mean(), prog_bar=True, sync_dist=True)
        self._start = {}
        objective = torch.stack([best.loss.mean() for best in self._bests().values()])
        self.log("val/objective", objective.mean(), sync_dist=True)

    def _bests(self) -> dict[str, Any]:
        return dict(self.best.items())

    def _offer(self, kind: str, lens: Lens, losses: Float[Tensor, " start"]) -> None:
        best = self._bests()[kind]
        best.offer(lens.trained(), losses if len(best.loss) == len(losses) else losses.mean(dim=0, keepdim=True))

    def on_test_epoch_end(self) -> None:
        """Report the means over layers."""
        for kind, losses in zip(self.lenses, self._mean_losses(), strict=False):
            self.log(f"test/kl_{kind}", losses.mean(), sync_dist=True)

    def _best_lenses(self) -> dict[str, Lens]:
        """Copies of the best state of each lens, or of the last state without any validation."""
        chosen: dict[str, Lens] = {}
        for kind, lens in self._kinds():
            copy, best = LENS_KINDS[kind].make(self.starts, *self._sizes), self._bests()[kind]
            copy.load_state_dict(best.tensors() if best.known() else lens.state_dict())
            chosen[kind] = copy.to(self.device).requires_grad_(False)
        return chosen

    def trained_lenses(self, name: str = "lens") -> TrainedLenses:
        """The best lenses by validation."""
        lenses = {kind: lens.cpu() for kind, lens in self._best_lenses().items()}
        return TrainedLenses(name, lenses, *self._sizes, self.provenance())

    def validation_losses(self) -> dict[str, Float[Tensor, " start"]]:
        """Lowest validation loss of each lens at each layer, or over all layers if they share parameters."""
        return {kind: best.loss.cpu() for kind, best in self._bests().items()}
