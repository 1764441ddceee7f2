"""Agreement of a circuit, or of scores for its parts, with the true circuit."""

from dataclasses import asdict, dataclass

from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_f1_score,
    binary_precision,
    binary_recall,
)

from oa_train.shapes import Bool, Float, Tensor


@dataclass(frozen=True)
class Recovery:
    """Agreement of a circuit with the true one; the best value of each metric is 1.

    Attributes:
        precision: share of the circuit that is in the true one; 0 for an empty circuit.
        recall: share of the true circuit that is in the circuit.
        f1: harmonic mean of the two.
        auroc: probability that a true part has a higher score than another; ties count half. None without scores.
        average_precision: area under the precision-recall curve over score thresholds. None without scores.
    """

    precision: float
    recall: float
    f1: float
    auroc: float | None = None
    average_precision: float | None = None

    def as_json(self) -> dict[str, float | None]:
        """The metrics by name."""
        return asdict(self)


def recovery(
    circuit: Bool[Tensor, " entry"], true: Bool[Tensor, " entry"], scores: Float[Tensor, " entry"] | None = None
) -> Recovery:
    """Compare a circuit with the true one.

    `scores` ranks all entries, higher for those to keep first, in any range.

    Raises:
        ValueError: all entries are in the true circuit, or none is.
    """
    if bool(true.all()) or not bool(true.any()):
        raise ValueError("A circuit of all parts or of none leaves nothing to find.")
    target, chosen = true.long(), circuit.long()
    # Ranks replace the scores, because torchmetrics applies a sigmoid to values outside [0, 1].
    ranks = None if scores is None else _ranks(scores)
    return Recovery(
        precision=float(binary_precision(chosen, target)),
        recall=float(binary_recall(chosen, target)),
        f1=float(binary_f1_score(chosen, target)),
        auroc=None if ranks is None else float(binary_auroc(ranks, target)),
        average_precision=None if ranks is None else float(binary_average_precision(ranks, target)),
    )


def _ranks(scores: Tensor) -> Float[Tensor, " entry"]:
    """Ranks in [0, 1); equal scores share a rank."""
    ranks: Tensor = scores.detach().unique(return_inverse=True)[1].double()
    return ranks / max(1, len(ranks))
