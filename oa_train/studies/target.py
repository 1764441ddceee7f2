"""Circuits that missed the size asked for: what is said about them."""

from collections.abc import Iterator, Sequence

from oa_train.ablations.trained import TrainedCircuit
from oa_train.metrics.estimates import written
from oa_train.studies.run_folder import RunFolder

# Relative distance within which a size counts as reached, as in training; the nearest whole size always does.
TOLERANCE = 0.05


def missed_targets(circuits: Sequence[TrainedCircuit], run: RunFolder) -> Iterator[str]:
    """Lines that say what was asked for, what came of it, why, and what to do; none if all targets were reached.

    Args:
        circuits: all circuits of a run, in the order of its front.
        run: where they are.
    """
    missed: dict[int, float] = {}
    reasons: dict[str, None] = {}
    for number, trained in enumerate(circuits):
        target, circuit = trained.training.get("target_size"), trained.circuit
        if not isinstance(target, int | float) or abs(len(circuit) - target) <= max(0.5, TOLERANCE * target):
            continue
        missed[number] = target
        name = f"circuit {number} of the front" if len(circuits) > 1 else "the circuit"
        expected = "" if circuit.scores is None else f", and its masks kept {written(float(circuit.scores.sum()))}"
        asked = f"{target:,.0f}" if target == round(target) else written(target)
        yield (
            f"target_size {asked} was missed: {name} has {len(circuit):,} {circuit.level.parts}{expected}"
            f"{' on average' if expected else ''}."
        )
        reasons |= dict.fromkeys(_reason(trained))
    yield from reasons
    if missed:
        sizes = sorted({round(target) for target in missed.values()})
        every = "every circuit of the front" if len(circuits) > 1 else "the circuit"
        yield f"This gives {every} exactly {sizes[0]:,}, those of the highest keep-probability, and refits:"
        best = run.checkpoint("best")
        state = best if best.is_file() else run.last_state()
        others = f"  (or {', '.join(map(str, sizes[1:]))})" if len(sizes) > 1 else ""
        yield f"  {run.resume_command(state)} --finish.size {sizes[0]}{others}"


def _reason(trained: TrainedCircuit) -> Iterator[str]:
    circuit = trained.circuit
    if circuit.scores is None:
        return
    above = int((circuit.scores > trained.training.get("threshold", 0.5)).sum())
    if len(circuit) < above:
        yield f"{above - len(circuit):,} of the {above:,} above the threshold dangled and were removed."
    else:
        yield (
            "The penalty weight had not settled. Train longer (--trainer.max_epochs), or let the goal fall faster "
            "(--model.target_warmup)."
        )
