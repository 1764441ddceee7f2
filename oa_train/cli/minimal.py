"""`oa-train minimal`: what each part of a trained circuit is worth, and what the model does without all of them."""

from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table

from oa_train.cli.arguments import ExplainingParser, check_configs, take_option
from oa_train.cli.finished import chosen_options, finished_folder, finished_parser, load_run, loaded_model
from oa_train.cli.interruption import terminable
from oa_train.cli.output import console, estimate_cell, track
from oa_train.cli.quiet import silence_libraries
from oa_train.cli.record import record_in
from oa_train.errors import ConfigurationError
from oa_train.metrics.estimates import Estimate
from oa_train.studies.minimal import MinimalSettings, minimal
from oa_train.studies.minimality import Minimality

# More parts than this are not listed on the terminal; tables/parts.csv has them all.
MOST_LISTED = 40


def minimal_command(argv: Sequence[str]) -> Minimality:
    """Ask of a run's circuit whether it is minimal and complete, and show the tables."""
    silence_libraries()
    check_configs(argv)
    given, words = take_option(argv, "--run")
    parser = _parser()
    if given is None:
        if {"-h", "--help"} & set(words):
            parser.print_help()
            parser.exit()
        raise ConfigurationError("minimal needs --run, the folder of a finished run.")
    folder = finished_folder(given)
    chosen = chosen_options(parser, folder, words)
    run = load_run(folder)
    model = loaded_model(chosen, [run])
    record_in(folder)
    with terminable():
        minimality = minimal(model, chosen.data, run, folder, chosen.minimal, track)
    _show(minimality)
    return minimality


def _parser() -> ExplainingParser:
    parser = finished_parser(
        "minimal",
        "Take each part out of a circuit in turn, and then ablate all of them and nothing else.",
        "folder of a finished run; it gets the results",
    )
    parser.add_class_arguments(MinimalSettings, "minimal")
    parser.link_arguments("seed_everything", "minimal.seed")
    return parser


def _show(minimality: Minimality) -> None:
    circuit, ablation = minimality.circuit, minimality.ablation.replace("_", " ")
    console.print(
        f"{len(circuit)} of {len(circuit.level)} {circuit.level.parts} under {ablation} ablation: KL divergence "
        f"{estimate_cell(minimality.figures['kl'])} nats"
    )
    console.print(_part_table(minimality))
    for line in _superfluous_lines(minimality):
        console.print(line)
    console.print(_complement_table(minimality))
    console.print(f"results: {minimality.folder}", soft_wrap=True)


def _part_table(minimality: Minimality) -> Table:
    circuit, shown = minimality.circuit, minimality.removals[:MOST_LISTED]
    listed = f": the {len(shown)} that are worth most" if len(shown) < len(minimality.removals) else ""
    title = f"The circuit without one of its {circuit.level.parts}{listed}"
    table = Table(title=title, title_justify="left", min_width=len(title), padding=(0, 0, 0, 1))
    table.add_column("without", no_wrap=True)
    table.add_column("KL minus\ncircuit", justify="right", no_wrap=True)
    table.add_column("accuracy", justify="right")
    if not circuit.level.has_one_stream:
        table.add_column("edges that\ngo with it", justify="right")
    table.add_column("verdict")
    for removal in shown:
        dangling = [str(removal.dangling)] if not circuit.level.has_one_stream else []
        accuracy = f"{removal.figures['accuracy'].mean:.3f}"
        table.add_row(removal.names[0], estimate_cell(removal.increase), accuracy, *dangling, removal.verdict)
    return table


def _superfluous_lines(minimality: Minimality) -> Iterator[str]:
    counts = (f"{len(minimality.of_verdict(verdict))} {verdict}" for verdict in ("needed", "undecided", "superfluous"))
    yield f"{', '.join(counts)} of {len(minimality.removals)} {minimality.circuit.level.parts}"
    names = minimality.of_verdict("superfluous")
    if names:
        more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
        yield f"superfluous: {', '.join(names[:MOST_LISTED])}{more}"
    if minimality.together is not None:
        yield (
            f"all {len(names)} of them together are worth {estimate_cell(minimality.together.increase)} nats, one by "
            f"one {minimality.apart:.3g} in sum"
        )


def _complement_table(minimality: Minimality) -> Table:
    table = Table(title="The model without the circuit, all else kept", title_justify="left", padding=(0, 0, 0, 1))
    table.add_column("ablated", no_wrap=True)
    for column in ("KL", "accuracy", "logit\ndifference"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("nothing", *_cells(minimality.clean))
    table.add_row("the circuit", *_cells(minimality.complement))
    for number, figures in enumerate(minimality.random_complements, start=1):
        table.add_row(f"random circuit {number}", *_cells(figures))
    return table


def _cells(figures: Mapping[str, Estimate]) -> list[str]:
    return [
        estimate_cell(figures["kl"]),
        f"{figures['accuracy'].mean:.3f}",
        f"{figures['logit_difference'].mean:.2f}",
    ]
