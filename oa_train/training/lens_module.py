"""Training of lenses."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from oa_train.batches import Batch
from oa_train.checks import check_positive
from oa_train.errors import ConfigurationError, nearest_names
from oa_train.lenses.lens import LENS_KINDS, ConstantsLens, Lens, check_layers, check_lens_kinds
from oa_train.lenses.predictions import PREDICTIONS, Tokens, lens_logits, mean_attention
from oa_train.lenses.trained_lenses import TrainedLenses
from oa_train.metrics.divergence import kl_divergence
from oa_train.models.parts import Dimensions
from oa_train.models.spec import BUILT_IN, LMSpec
from oa_train.shapes import Float, Tensor
from oa_train.training.metric_averages import CircuitMeans
from oa_train.training.optimizers import LRSchedulerCallable, OptimizerCallable
from oa_train.training.settings import as_list
from oa_train.training.side_by_side import BestSlices, Part, SideBySideModule
from oa_train.training.strategies import share_from_first_process


class LensModule(SideBySideModule):
    """Trains lenses, at all layers at once, to predict what the model predicts.

    The loss of a lens at a layer is the KL divergence of its prediction from the model's (of `linear_oca` from that of
    `oca`), averaged over the scored positions of the prompts. Layers and lenses are trained independently on the same
    prompts, each with its own best state by validation; only the constants of `oca_shared` serve all layers.

    Args:
        lm: the frozen model; the built-in one by default.
        seed: recorded only; nothing here is random.
        lenses: kinds that are trained: `oca` (constants in place of all later attention outputs, others for each
            layer), `oca_shared` (the same for all layers), `tuned` (an affine map), `linear_oca` (an affine map that
            matches `oca`).
        layers: layers at which lenses are trained; all by default.
        learning_rates: learning rate at the start, by kind; see `LENS_KINDS` for the others.
        optimizer: class of the optimiser, with its arguments except `lr`; Adam by default.
        lr_scheduler: class of a schedule of the rates, with its arguments; by default cosine decay to zero over the
            whole training.
        predictions_at_once: predictions (layers times scored positions) whose activations are kept at once; bounds
            memory, changes no result.

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
        super().__init__(arguments, optimizer, lr_scheduler)
        sizes = Dimensions.of(self.frozen.config)
        self.starts = check_layers(layers, sizes.n_layers)
        self._sizes = sizes.n_layers, sizes.d_model
        self.rates = {kind: (learning_rates or {}).get(kind, LENS_KINDS[kind].learning_rate) for kind in kinds}
        self.predictions_at_once = predictions_at_once
        by_kind = {kind: LENS_KINDS[kind].make(self.starts, *self._sizes) for kind in kinds}
        self.lenses: Any = nn.ModuleDict(by_kind)
        self.best: Any = nn.ModuleDict({kind: BestSlices(lens.trained()) for kind, lens in by_kind.items()})
        self.started = nn.Buffer(torch.tensor(False))
        # The first validation compares the trained lenses with their initial state.
        self._start: dict[str, Lens] = {}
        self.losses = CircuitMeans(2 * len(kinds), len(self.starts))

    def describe(self) -> dict[str, Any]:
        """Kinds and layers."""
        return {"lenses": list(self.lenses), "layers": self.starts}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """A group for each lens."""
        return [{"params": list(lens.parameters()), "lr": self.rates[kind]} for kind, lens in self.lenses.items()]

    def on_fit_start(self) -> None:
        """Start constants at the mean attention outputs, unless they were restored."""
        if bool(self.started) and all(best.known() for best in self.best.values()):
            return
        for kind in self.lenses:
            start = LENS_KINDS[kind].make(self.starts, *self._sizes)
            self._start[kind] = start.to(self.device).requires_grad_(False)
        of_constants = [start for start in self._start.values() if isinstance(start, ConstantsLens)]
        if of_constants:
            means = mean_attention(self.frozen, self.data.task, self.track).to(self.device)
            share_from_first_process([means])
            for start in of_constants:
                start.load(means)
        if not bool(self.started):
            for kind, lens in self.lenses.items():
                lens.load_state_dict(self._start[kind].state_dict())
            self.started.fill_(True)

    def _parts(self, tokens: Tokens, n_prompts: int) -> Iterator[Part]:
        lenses, weights = dict(self.lenses), tokens.weights / n_prompts
        for kind in lenses:
            for piece in tokens.pieces(len(self.starts), self.predictions_at_once):

                def losses(kind: str = kind, piece: slice = piece) -> Float[Tensor, " start"]:
                    kl = self._divergence(lenses, kind, tokens, piece)
                    return kl @ weights[piece].to(kl.dtype)

                yield f"train/kl_{kind}", slice(None), losses

    def _divergence(
        self, lenses: Mapping[str, Any], kind: str, tokens: Tokens, piece: slice
    ) -> Float[Tensor, "start token"]:
        """KL divergence of one of several lenses from what it is trained to match, on a slice of the tokens."""
        teacher = LENS_KINDS[kind].teacher
        with torch.no_grad():
            target = lens_logits(lenses[teacher], self.frozen, tokens, piece) if teacher else tokens.logits[piece]
        return kl_divergence(target, lens_logits(lenses[kind], self.frozen, tokens, piece))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of all lenses at all layers."""
        return self.step_of_parts([*self._parts(Tokens(self.frozen, batch), len(batch))], batch, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses of the trained lenses and, at the first validation, of their initial state."""
        self._evaluate(batch, [dict(self.lenses), *([self._start] if self._start else [])])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses of the best lenses."""
        self._evaluate(batch, [self._best_lenses()])

    @torch.no_grad()
    def _evaluate(self, batch: Batch, sets: Sequence[Mapping[str, Any]]) -> None:
        tokens, rows = Tokens(self.frozen, batch), []
        for lenses in sets:
            for kind in lenses:
                pieces = tokens.pieces(len(self.starts), self.predictions_at_once)
                kl = torch.cat([self._divergence(lenses, kind, tokens, piece) for piece in pieces], dim=1)
                rows.append(tokens.by_prompt(kl).mean(dim=1))
        self.losses.update(torch.stack(rows).to(self.device), len(batch))

    def on_validation_epoch_end(self) -> None:
        """Keep the best state of each lens at each layer; the best checkpoint minimises the mean of their losses."""
        losses = self.losses.taken()
        if self.trainer.sanity_checking:  # on a few prompts, not comparable with later losses
            return
        for number, (kind, lens) in enumerate(self.lenses.items()):
            if self._start:
                self._offer(kind, self._start[kind], losses[len(self.lenses) + number])
            self._offer(kind, lens, losses[number])
            self.log(f"val/kl_{kind}", losses[number].mean(), prog_bar=True, sync_dist=True)
        self._start = {}
        objective = torch.stack([best.loss.mean() for best in self.best.values()])
        self.log("val/objective", objective.mean(), sync_dist=True)

    def _offer(self, kind: str, lens: Lens, losses: Float[Tensor, " start"]) -> None:
        best = self.best[kind]
        best.offer(lens.trained(), losses if len(best.loss) == len(losses) else losses.mean(dim=0, keepdim=True))

    def on_test_epoch_end(self) -> None:
        """Report the means over layers."""
        for kind, losses in zip(self.lenses, self.losses.taken(), strict=False):
            self.log(f"test/kl_{kind}", losses.mean(), sync_dist=True)

    def _best_lenses(self) -> dict[str, Lens]:
        """Copies of the best state of each lens, or of the last state without any validation."""
        chosen: dict[str, Lens] = {}
        for kind, lens in self.lenses.items():
            copy, best = LENS_KINDS[kind].make(self.starts, *self._sizes), self.best[kind]
            copy.load_state_dict(best.tensors() if best.known() else lens.state_dict())
            chosen[kind] = copy.to(self.device).requires_grad_(False)
        return chosen

    def trained_lenses(self, name: str = "lens") -> TrainedLenses:
        """The best lenses by validation."""
        lenses = {kind: lens.cpu() for kind, lens in self._best_lenses().items()}
        return TrainedLenses(name, lenses, *self._sizes, self.provenance())

    def validation_losses(self) -> dict[str, Float[Tensor, " start"]]:
        """Lowest validation loss of each lens at each layer, or over all layers if they share parameters."""
        return {kind: best.loss.cpu() for kind, best in self.best.items()}
