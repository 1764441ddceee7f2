"""The path of a greedy search as rows, tables and a figure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from oa_train.ablations.evaluation import Behaviour
from oa_train.figures.recovery import recovery_figure
from oa_train.figures.style import Figure
from oa_train.metrics.estimates import Estimate, ratio_of_means
from oa_train.models.levels import Level
from oa_train.shapes import Bool, Float, Tensor
from oa_train.studies.comparison_tables import measure_cells
from oa_train.studies.findings import Row, listed
from oa_train.studies.greedy import Step
from oa_train.studies.study import estimates

RecoveryMeasure = Literal["kl", "logit_difference", "accuracy"]

# Accuracy has ties; the KL divergence, with this weight, breaks them.
TIE_BREAK = 1e-6

# Maximum number of units of one step that are named on the terminal.
MOST_NAMED = 4


def recovery_of(behaviour: Behaviour, clean: Behaviour, index: int, measure: RecoveryMeasure) -> Estimate:
    """Recovery of a circuit: the share of the gap between everything ablated (circuit 0) and the clean model."""
    values, whole = getattr(behaviour, measure), getattr(clean, measure)[0]
    return ratio_of_means(values[index] - values[0], whole - values[0], clean.identities)


def recoveries(
    behaviour: Behaviour, clean: Behaviour, nothing: Behaviour, measure: RecoveryMeasure
) -> Float[Tensor, " circuit"]:
    """Recovery of each circuit; ties of accuracy are broken by the KL divergence."""

    def of(name: str) -> Tensor:
        values, whole, none = (getattr(b, name).double().mean(dim=1) for b in (behaviour, clean, nothing))
        closed: Tensor = (values - none) / (whole - none)
        return closed

    return of(measure) if measure != "accuracy" else of(measure) + TIE_BREAK * of("kl").clamp(-1, 1)


def evenly(n_steps: int, most: int) -> list[int]:
    """Indices of at most `most` evenly spaced steps, including the first and the last."""
    if n_steps <= most:
        return list(range(n_steps))
    return [round(number * (n_steps - 1) / (most - 1)) for number in range(most)]


def step_cells(row: Row) -> Mapping[str, Any]:
    """Cells of a step in the printed table."""
    moved = [*(f"+{name}" for name in row["restored"].split()), *(f"-{name}" for name in row["removed"].split())]
    return {
        "units": row["size"],
        "move": row["move"],
        "moved": listed(moved, MOST_NAMED, " "),
        "recovery": row["recovery"],
        "KL": row["kl"],
        **measure_cells(row),
    }


def step_rows(
    steps: Sequence[Step],
    level: Level,
    free: Bool[Tensor, " entry"],
    clean: Behaviour,
    measured: Mapping[str, tuple[Sequence[int], Behaviour]],
    measure: RecoveryMeasure,
) -> Iterator[dict[str, Any]]:
    """A row for each step.

    Args:
        steps: steps of the search.
        level: level of the masks.
        free: entries that could be moved.
        clean: behaviour of the clean model.
        measured: by column prefix, the indices of the evaluated steps, and their behaviour, preceded by that with
            everything ablated.
        measure: measure whose recovery is reported.
    """
    for number, step in enumerate(steps):
        row: dict[str, Any] = {
            "step": number,
            "move": step.move,
            "restored": " ".join(level.names[unit] for unit in step.restored),
            "removed": " ".join(level.names[unit] for unit in step.removed),
            "size": int((step.mask & free).sum()),
            "validation_recovery": step.recovery,
            "tried": step.tried,
            "units": step.units,
            "screened": step.screened,
        }
        for prefix, (points, behaviour) in measured.items():
            if number in points:
                index = 1 + points.index(number)
                row[f"{prefix}recovery"] = recovery_of(behaviour, clean, index, measure)
                row |= {f"{prefix}{name}": value for name, value in estimates(behaviour, index).items()}
        yield row


def searched(steps: Sequence[Step], n_prompts: int, tried_in_vain: int) -> dict[str, Any]:
    """Statistics of a search, for `results.json`."""
    moves = [step.move for step in steps[1:]]
    return {
        "prompts": n_prompts,
        "circuits": sum(step.tried for step in steps) + tried_in_vain,
        "rounds": len(moves),
        "screened_rounds": sum(step.screened for step in steps),
        "moves": {move: moves.count(move) for move in dict.fromkeys(moves)},
        "tried_in_vain": tried_in_vain,
    }


def searched_lines(search: Mapping[str, Any], pairs: int) -> Iterator[str]:
    """The statistics of `searched` as sentences."""
    moves = ", ".join(f"{count} x {move}" for move, count in search["moves"].items())
    yield (
        f"search: {search['circuits']:,} circuits on {search['prompts']} validation prompts in {search['rounds']} "
        f"rounds ({moves})"
    )
    if search["screened_rounds"]:
        yield f"{search['screened_rounds']} rounds tried only some units: those that did best when last tried"
    yield "No single unit of the set can be removed" + (
        ", nor any of the pairs and swaps that were tried." if pairs else "."
    )


def path_figure(rows: Sequence[Row], target: float, size_label: str, recovery_label: str, title: str) -> Figure:
    """Figure of the recovery of the measured steps against their size."""
    measured = [row for row in rows if "recovery" in row]
    # The turning point belongs to both phases.
    turn = max((row["step"] for row in rows if row["move"].startswith("restore")), default=0)
    parts = {"restoring": [row for row in measured if row["step"] <= turn]} if turn else {}
    removing = [row for row in measured if row["step"] >= turn]
    parts |= {"removing": removing} if len(removing) > 1 or not parts else {}
    trained = [row for row in rows if "trained_recovery" in row]
    paths = {name: ([row["size"] for row in part], [row["recovery"] for row in part]) for name, part in parts.items()}
    return recovery_figure(
        paths,
        ([row["size"] for row in trained], [row["trained_recovery"] for row in trained]),
        target,
        rows[-1]["size"],
        (size_label, recovery_label),
        title,
    )
