"""Circuits that missed the size asked for: what is said about them."""

from collections.abc import Iterator

from oa_train.ablations.trained import TrainedCircuit
from oa_train.metrics.estimates import written
from oa_train.studies.run_folder import RunFolder

# Relative distance within which a size counts as reached, as in training; the nearest whole size always does.
TOLERANCE = 0.05


def missed_target(trained: TrainedCircuit, run: RunFolder) -> Iterator[str]:
    """Lines that say what was asked for, what came of it, why, and what to do; none if the target was reached."""
    target, circuit = trained.training.get("target_size"), trained.circuit
    if not isinstance(target, int | float) or abs(len(circuit) - target) <= max(0.5, TOLERANCE * target):
        return
    yield f"target_size is {target:,}; {trained.name} has {len(circuit):,} {circuit.level.parts}, so it was missed."
    if circuit.scores is not None:
        expected, threshold = float(circuit.scores.sum()), trained.training.get("threshold", 0.5)
        above = int((circuit.scores > threshold).sum())
        if len(circuit) < above:
            yield f"{above - len(circuit):,} of the {above:,} above the threshold dangled and were removed."
        else:
            yield (
                f"The masks of the best state kept {written(expected)} on average: the penalty weight had not "
                "settled. Train longer (--trainer.max_epochs), or let the goal fall faster (--model.target_warmup)."
            )
    yield f"This takes exactly {round(target):,}, those of the highest keep-probability, and refits their constants:"
    yield f"  {run.resume_command(run.checkpoint('best'))} --finish.size {round(target)}"
