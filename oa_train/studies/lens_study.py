"""Studies of lenses: lenses of runs, lenses that need no training, and a tuned lens from a folder."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from oa_train.ablations.evaluation import prompt_identities
from oa_train.errors import ConfigurationError
from oa_train.lenses.lens import LENS_KINDS, ConstantsLens, Lens, check_layers, check_lens_kinds
from oa_train.lenses.predictions import mean_attention
from oa_train.lenses.trained_lenses import TrainedLenses, check_sizes, load_tuned_lens
from oa_train.models.parts import Dimensions
from oa_train.progress import Stage
from oa_train.shapes import Int, Tensor
from oa_train.studies.study import S, Study

# Name of the tuned lens that is read from a folder.
FROM_FOLDER = "tuned, from a folder"


class LensStudy(Study[S]):
    """A study of lenses. Subclasses choose layers and kinds in `check`.

    Attributes:
        layers: layers that are read.
        kinds: kinds of lens.
    """

    FromRun: ClassVar[type[Any]] = TrainedLenses
    layers: list[int]
    kinds: list[str]

    def choose_layers(self, layers: Sequence[int] | None) -> None:
        """Set `layers`: by default those that all runs have, or without runs all layers of the model.

        Raises:
            ConfigurationError: a layer does not exist, or a run's lenses do not have it.
        """
        if layers is None and self.from_runs:
            layers = sorted(set.intersection(*(set(run.layers) for run in self.from_runs)))
        self.layers = check_layers(layers, Dimensions.of(self.model.config).n_layers)
        for run in self.from_runs:
            lacking = [layer for layer in self.layers if layer not in run.layers]
            if lacking:
                raise ConfigurationError(f"The lenses of {run.name} were not trained for the layers {lacking}.")

    def choose_kinds(self, kinds: Sequence[str] | None) -> None:
        """Set `kinds`: by default those of the runs, and all that need no training.

        Raises:
            ConfigurationError: a kind does not exist, or no run has trained it.
        """
        trained = dict.fromkeys(kind for run in self.from_runs for kind in run.lenses)
        available = [*trained, *(name for name, kind in LENS_KINDS.items() if not kind.trained)]
        self.kinds = available if kinds is None else list(kinds)
        check_lens_kinds("lenses", self.kinds)
        for kind in self.kinds:
            if kind not in available:
                raise ConfigurationError(
                    f"lenses names {kind!r}, which has to be trained: give a run that has trained it (--run), or "
                    f"train one with oa-train fit --model LensModule --model.lenses '[{kind}]'."
                )

    def lenses(self, tuned_lens: str | None = None) -> dict[str, Lens]:
        """The lenses by name, at `layers`, on the model's device; `tuned_lens` is the folder of one more."""
        sizes, lenses = Dimensions.of(self.model.config), dict[str, Lens]()
        for kind in self.kinds:
            if LENS_KINDS[kind].trained:
                having = [run for run in self.from_runs if kind in run.lenses]
                for run in having:
                    lenses[kind if len(having) == 1 else f"{kind} ({run.name})"] = run.lenses[kind].at(self.layers)
                continue
            lens: Any = LENS_KINDS[kind].make(self.layers, sizes.n_layers, sizes.d_model)
            if isinstance(lens, ConstantsLens):
                lens.load(mean_attention(self.model, self.task, self.track))
            lenses[kind] = lens
        if tuned_lens is not None:
            loaded = load_tuned_lens(tuned_lens)
            check_sizes(self.model, len(loaded.starts), loaded.bias.shape[1], f"tuned lens {tuned_lens}")
            lenses[FROM_FOLDER] = loaded.at(self.layers)
        return {name: lens.to(self.model.device).requires_grad_(False) for name, lens in lenses.items()}

    @property
    def mean_stages(self) -> list[Stage]:
        """Stage that computes the mean attention outputs, if a kind of lens needs them."""
        return [Stage("means", self.task.n_means)] if any(LENS_KINDS[kind].from_means for kind in self.kinds) else []

    @property
    def identities(self) -> Int[Tensor, " prompt"]:
        """Hashes of the test prompts."""
        return torch.cat([prompt_identities(batch) for batch in self.batches])
