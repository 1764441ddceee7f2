"""`oa-train compare`: a finished run under each ablation."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from rich.table import Table

from oa_train.ablations.constants import Constants
from oa_train.circuits.circuit import Circuit
from oa_train.cli.arguments import (
    CONFIG_FILE,
    ExplainingParser,
    add_model_and_task,
    check_configs,
    read_config,
    refuse_stored_trust,
    run_folder,
    take_option,
)
from oa_train.cli.output import console, estimate_cell, track
from oa_train.cli.quiet import silence_libraries
from oa_train.errors import ArtefactError, ConfigurationError
from oa_train.interventions.ablated import check_belongs
from oa_train.models.loading import load_model
from oa_train.studies.compare import Compared, CompareSettings, compare

# What of a run's configuration says which model and which prompts.
SHARED_KEYS = ("seed_everything", "lm", "data")


def compare_command(argv: Sequence[str]) -> Compared:
    """Compare ablations on a run and show the table."""
    silence_libraries()
    check_configs(argv)
    given, words = take_option(argv, "--run")
    parser = _parser()
    if given is None:
        if {"-h", "--help"} & set(words):
            parser.print_help()
            parser.exit()
        raise ConfigurationError("compare needs --run, the folder of a finished run.")
    folder = run_folder(given)
    refuse_stored_trust(folder, words)
    config = {key: value for key, value in read_config(folder / CONFIG_FILE).items() if key in SHARED_KEYS}
    options = parser.parse_args(["--config", yaml.safe_dump(config), "--run", str(folder), *words])
    chosen = parser.instantiate_classes(options)
    circuit, constants = _artefacts(folder)
    device = _device(chosen.device)
    model = load_model(chosen.lm)
    torch.nn.Module.to(model, device)
    check_belongs(model, circuit, constants)
    compared = compare(model, chosen.data, circuit, constants, folder, chosen.compare, track)
    _show(compared, circuit)
    return compared


def _artefacts(folder: Path) -> tuple[Circuit, Constants]:
    try:
        return Circuit.load(folder / "circuit"), Constants.load(folder / "constants")
    except ArtefactError as problem:
        raise ArtefactError(
            f"{problem}\nThe run was not finished. This finishes it, in a new version of the run:\n  oa-train fit "
            f"--config {folder / CONFIG_FILE} --ckpt_path {folder / 'checkpoints' / 'last.ckpt'}"
        ) from problem


def _device(given: str) -> str:
    if given == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=given)
    except (RuntimeError, AssertionError) as problem:
        first = str(problem).split("\n")[0]
        raise ConfigurationError(f"--device {given!r} cannot be used: {first}") from problem
    return given


def _parser() -> ExplainingParser:
    parser = ExplainingParser(
        prog="oa-train compare",
        description="Compare optimal, mean and zero ablation of everything outside the circuit and of each component.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="config", help="configuration file; may be given several times")
    parser.add_argument("--run", type=str, required=True, help="folder of a finished run; its model and task are used")
    parser.add_argument("--device", type=str, default="auto", help="where the model runs: auto, cpu, cuda, cuda:1")
    parser.add_argument("--seed_everything", type=int, default=0, help="seed of all draws")
    parser.add_class_arguments(CompareSettings, "compare")
    add_model_and_task(parser, ("data",))
    parser.link_arguments("seed_everything", "compare.seed")
    return parser


def _show(compared: Compared, circuit: Circuit) -> None:
    table = Table(title="KL divergence from the clean model in nats, mean ± 95 % interval", title_justify="left")
    for column in ("ablated", "ablation", "KL", "KL minus optimal", "accuracy"):
        table.add_column(column, justify="left" if column in ("ablated", "ablation") else "right", no_wrap=True)
    previous = None
    for row in compared.rows:
        name = "all others" if row.component == "circuit" else row.component
        if previous not in (None, name):
            table.add_section()
        table.add_row(
            name if name != previous else "",
            row.ablation,
            estimate_cell(row.figures["kl"]),
            "" if row.ablation == "optimal" else estimate_cell(row.difference_to_optimal["kl"]),
            f"{row.figures['accuracy'].mean:.3f}",
        )
        previous = name
    console.print(table)
    if compared.random_kl:
        ordered = sorted(compared.random_kl)
        median = statistics.median(ordered)
        console.print(
            f"{len(ordered)} random circuits of {len(circuit)} components under optimal constants: "
            f"median KL {median:.4g}, lowest {ordered[0]:.4g}"
        )
    console.print(f"results: {compared.folder}", soft_wrap=True)
