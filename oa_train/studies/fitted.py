"""Optimal constants of circuits, by default trained from the means."""

from collections.abc import Sequence

from oa_train.ablations.constants import Constants
from oa_train.ablations.fitting import RefitSettings, fit_constants
from oa_train.ablations.registry import AblationSource
from oa_train.models.levels import Level
from oa_train.shapes import Bool, Tensor


def fitted_constants(
    source: AblationSource,
    masks: Bool[Tensor, "circuit entry"],
    fit: RefitSettings,
    description: str,
    *,
    starts: Sequence[Constants] | None = None,
    level: Level | None = None,
) -> list[Constants]:
    """Train optimal constants for each circuit; on the validation prompts they are no worse than means and zeros.

    Args:
        source: model, task, means and progress.
        masks: a circuit in each row.
        fit: settings of the training.
        description: text of the progress bar.
        starts: initial constants of each circuit, or one set for all; by default the means.
        level: level of the masks, if it differs from that of the source.
    """
    return fit_constants(
        source.model,
        source.task,
        level or source.level,
        masks,
        starts or [source.mean],
        fit,
        others=[source.mean, source.zero],
        track=source.track,
        description=description,
    ).sets
