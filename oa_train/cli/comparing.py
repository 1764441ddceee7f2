"""`oa-train compare`: one finished run or several under each ablation."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from oa_train.ablations.registry import KINDS
from oa_train.cli.arguments import ExplainingParser, check_configs, take_options
from oa_train.cli.finished import chosen_options, finished_folder, finished_parser, load_run, loaded_model
from oa_train.cli.interruption import terminable
from oa_train.cli.output import console, estimate_cell, track
from oa_train.cli.quiet import silence_libraries
from oa_train.cli.record import record_in
from oa_train.errors import ConfigurationError
from oa_train.studies.compare import CompareSettings, compare
from oa_train.studies.comparison import Compared, Comparison
from oa_train.studies.runs import TrainedCircuit


def compare_command(argv: Sequence[str]) -> Compared:
    """Compare ablations on one run or several and show the tables."""
    silence_libraries()
    check_configs(argv)
    given, words = take_options(argv, "--run")
    parser = _parser()
    if not given:
        if {"-h", "--help"} & set(words):
            parser.print_help()
            parser.exit()
        raise ConfigurationError("compare needs --run, the folder of a finished run.")
    folders = [finished_folder(one) for one in given]
    folder = folders[0]
    chosen = chosen_options(parser, folder, words)
    runs = _named_apart([load_run(one) for one in folders], folders)
    model = loaded_model(chosen, runs)
    record_in(folder)
    with terminable():
        compared = compare(model, chosen.data, runs, folder, chosen.compare, track)
    _show(compared, runs)
    return compared


def _named_apart(runs: Sequence[TrainedCircuit], folders: Sequence[Path]) -> list[TrainedCircuit]:
    """The runs, by their whole paths where experiment and version are the same."""
    if len({run.name for run in runs}) == len(runs):
        return list(runs)
    return [replace(run, name=str(folder)) for run, folder in zip(runs, folders, strict=True)]


def _parser() -> ExplainingParser:
    parser = finished_parser(
        "compare",
        "Compare all ablations of everything outside the circuit, and of each component alone.",
        "folder of a finished run; may be given several times: the first one's model and task are used, and its "
        "folder gets the results",
    )
    parser.add_class_arguments(CompareSettings, "compare")
    parser.link_arguments("seed_everything", "compare.seed")
    return parser


def _show(compared: Compared, runs: Sequence[TrainedCircuit]) -> None:
    for run in runs:
        console.print(_circuit_table(run, [row for row in compared.circuits() if row.run is run]))
    if compared.components():
        console.print(_component_table(compared))
    for size, found in compared.random_circuits.items():
        console.print(
            f"{len(found.kl)} random circuits of {size} {runs[0].circuit.level.parts} under optimal constants: "
            f"median KL "
            f"{statistics.median(found.kl):.4g}, lowest {min(found.kl):.4g}; the run's circuit after the same "
            f"training {found.run_kl:.4g}, percentile {found.percentile:.3g}"
        )
    if len(runs) > 1:
        console.print(_overlap_table(compared, runs))
    for group in compared.seeds:
        console.print(
            f"seeds {', '.join(map(str, group['seeds']))} of {group['runs'][0]} and its like: KL under "
            f"{group['ablation']} ablation {group['kl']['mean']:.3g} ± {group['kl']['standard_deviation']:.1g} "
            f"(standard deviation), size {group['size']['mean']:.3g} ± "
            f"{group['size']['standard_deviation']:.1g}, Jaccard {group['jaccard']:.2f}"
        )
    console.print(f"results: {compared.folder}", soft_wrap=True)


def _circuit_table(run: TrainedCircuit, rows: Sequence[Comparison]) -> Table:
    kept = f"{len(run.circuit)} of {len(run.circuit.level)} {run.circuit.level.parts}"
    table = Table(
        title=f"{run.name}: {kept}, trained with {run.ablation.replace('_', ' ')} ablation\n"
        "KL divergence in nats with everything else ablated, mean ± 95 % interval",
        title_justify="left",
        padding=(0, 0, 0, 1),
    )
    for column in ("ablation", "KL", "KL minus\noptimal", "accuracy", "logit\ndifference"):
        table.add_column(column, justify="left" if column == "ablation" else "right", no_wrap=True)
    for row in rows:
        difference = row.difference_to_optimal.get("kl")
        table.add_row(
            _label(row),
            estimate_cell(row.figures["kl"]),
            "" if difference is None or row.ablation == "optimal" else estimate_cell(difference),
            f"{row.figures['accuracy'].mean:.3f}",
            f"{row.figures['logit_difference'].mean:.2f}",
        )
    return table


def _component_table(compared: Compared) -> Table:
    table = Table(title="KL divergence in nats with one component ablated", title_justify="left", padding=(0, 0, 0, 1))
    table.add_column("ablated", no_wrap=True)
    by_name: dict[str, dict[str, str]] = {}
    for row in compared.components():
        by_name.setdefault(row.component, {})[_label(row)] = f"{row.figures['kl'].mean:.2g}"
    for label in next(iter(by_name.values())):
        table.add_column(label.replace("counterfactual", "counter-\nfactual").replace(" ", "\n"), justify="right")
    for name, cells in by_name.items():
        table.add_row(name, *cells.values())
    return table


def _overlap_table(compared: Compared, runs: Sequence[TrainedCircuit]) -> Table:
    table = Table(title="Jaccard overlap of the circuits", title_justify="left")
    table.add_column("")
    for number in range(len(runs)):
        table.add_column(str(number + 1), justify="right")
    for number, (run, overlaps) in enumerate(zip(runs, compared.jaccard, strict=True)):
        table.add_row(f"{number + 1}  {run.name}", *(f"{overlap:.2f}" for overlap in overlaps))
    return table


def _label(row: Comparison) -> str:
    name = row.ablation.replace("_", " ")
    return name if KINDS[row.ablation].total else f"{name}\n(not total)"
