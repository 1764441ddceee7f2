"""Choice of the lenses of a study: lenses of runs, lenses that need no training, and a tuned lens from a folder."""

from collections.abc import Sequence
from typing import Any

from oa_train.errors import ConfigurationError
from oa_train.lenses.lens import LENS_KINDS, ConstantsLens, Lens, check_layers, check_lens_kinds
from oa_train.lenses.mean_attention import mean_attention
from oa_train.lenses.trained_lenses import TrainedLenses, check_sizes, load_tuned_lens
from oa_train.models.frozen import CausalLM
from oa_train.models.parts import Dimensions
from oa_train.progress import Track
from oa_train.tasks.task import Task

# Name of the tuned lens that is read from a folder.
FROM_FOLDER = "tuned, from a folder"


def chosen_layers(model: CausalLM, layers: Sequence[int] | None, runs: Sequence[TrainedLenses]) -> list[int]:
    """Layers to read: by default those that all runs have, or without runs all layers of the model.

    Raises:
        ConfigurationError: a layer does not exist, or a run's lenses do not have it.
    """
    n_layers = Dimensions.of(model.config).n_layers
    if layers is None and runs:
        shared = set.intersection(*(set(run.layers) for run in runs))
        layers = sorted(shared)
    chosen = check_layers(layers, n_layers)
    for run in runs:
        lacking = [layer for layer in chosen if layer not in run.layers]
        if lacking:
            raise ConfigurationError(f"The lenses of {run.name} were not trained for the layers {lacking}.")
    return chosen


def chosen_kinds(kinds: Sequence[str] | None, runs: Sequence[TrainedLenses]) -> list[str]:
    """Kinds of lens: by default those of the runs, and all that need no training.

    Raises:
        ConfigurationError: a kind does not exist, or no run has trained it.
    """
    trained = list(dict.fromkeys(kind for run in runs for kind in run.lenses))
    untrained = [name for name, kind in LENS_KINDS.items() if not kind.trained]
    if kinds is None:
        return [*trained, *untrained]
    check_lens_kinds("lenses", kinds)
    for kind in kinds:
        if kind not in (*trained, *untrained):
            raise ConfigurationError(
                f"lenses names {kind!r}, which has to be trained: give a run that has trained it (--run), or train "
                f"one with oa-train fit --model LensModule --model.lenses '[{kind}]'."
            )
    return list(kinds)


def chosen_lenses(
    model: CausalLM,
    task: Task,
    kinds: Sequence[str],
    layers: Sequence[int],
    runs: Sequence[TrainedLenses],
    tuned_lens: str | None,
    track: Track,
) -> dict[str, Lens]:
    """The lenses by name, restricted to these layers, on the model's device."""
    sizes, lenses = Dimensions.of(model.config), dict[str, Lens]()
    for kind in kinds:
        if LENS_KINDS[kind].trained:
            having = [run for run in runs if kind in run.lenses]
            for run in having:
                lenses[kind if len(having) == 1 else f"{kind} ({run.name})"] = run.lenses[kind].at(layers)
            continue
        lens: Any = LENS_KINDS[kind].make(layers, sizes.n_layers, sizes.d_model)
        if isinstance(lens, ConstantsLens):
            lens.load(mean_attention(model, task, track))
        lenses[kind] = lens
    if tuned_lens is not None:
        loaded = load_tuned_lens(tuned_lens)
        check_sizes(model, len(loaded.starts), loaded.bias.shape[1], f"tuned lens {tuned_lens}")
        lenses[FROM_FOLDER] = loaded.at(layers)
    return {name: lens.to(model.device).requires_grad_(False) for name, lens in lenses.items()}
