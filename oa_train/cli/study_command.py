"""One command for every study: its options follow from its settings."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from jsonargparse import Namespace

from oa_train.ablations.trained_circuit import TrainedCircuit
from oa_train.cli.bars import track
from oa_train.cli.faults import Claim, building
from oa_train.cli.output import show
from oa_train.cli.parser import (
    ExplainingParser,
    add_config,
    add_model_and_task,
    check_values,
    link_model,
    make_paths_absolute,
)
from oa_train.cli.precheck import stored_config, take_options
from oa_train.cli.quiet import silence_libraries
from oa_train.cli.run_log import record_in
from oa_train.errors import ConfigurationError, nearest_names
from oa_train.models.loading import load_on_device
from oa_train.progress import silent
from oa_train.studies.processes import from_first, process_group
from oa_train.studies.run_folder import RunFolder, check_experiment, check_writable, output_root
from oa_train.studies.study import Findings, Study, removed_if_empty
from oa_train.training.interruption import terminable

# Options whose values a study takes from its run.
FROM_RUN = ("seed_everything", "lm", "data")

# Values of `asks_of` that require a run.
NEEDING_RUNS = ("one", "several")
# Values that allow several runs.
TAKING_SEVERAL = ("several", "any")

_RUN_HELP = {
    "none": "folder of a run, whose model, task and seed are used; results are stored in it",
    "one": "folder of a finished run; results are stored in it",
    "optional": "folder of a run, whose model, task, seed and result (if any) are used; results are stored in it",
    "several": "folder of a finished run, with one circuit or several; model and task are those of the first run, in "
    "which results are stored",
    "any": "folder of a run; model, task and seed are those of the first run, in which results are stored",
}


def own_study(words: list[str]) -> Findings:
    """Run a study given by the import path of its class."""
    if not words or words[0].startswith("-"):
        raise ConfigurationError("study needs the class of a study first: oa-train study package.module.Class --help")
    return run_study(words[0], words[1:])


def run_study(path: str, words: Sequence[str]) -> Findings:
    """Run the study whose class has this import path, with these options, and show its findings."""
    silence_libraries()
    kind = _study_class(path)
    parser = _parser(kind)
    folders, rest = take_options(words, "--run")
    if {"-h", "--help"} & set(rest):
        parser.print_help()
        parser.exit()
    if kind.asks_of in NEEDING_RUNS and not folders:
        raise ConfigurationError(f"{kind.name} needs --run, the folder of a finished run.")
    if len(folders) > 1 and kind.asks_of not in TAKING_SEVERAL:
        raise ConfigurationError(f"--run is given {len(folders)} times: {', '.join(folders)}; expected one.")
    if dist.is_torchelastic_launched() and not kind.resumable:
        raise ConfigurationError(f"{kind.name} cannot be distributed over processes; run it without torchrun.")
    runs = [RunFolder.find(folder) for folder in folders]
    options = _options(parser, runs, rest)
    with building():
        chosen = parser.instantiate_classes(options)
    if kind.resumable and chosen.resume is not None:
        runs = [RunFolder(Path(chosen.resume).absolute().parent.parent)]
    elif runs:
        check_writable("--run", folders[0], runs[0].path / "studies")
    else:
        check_experiment(chosen.experiment)
        output_root("--output", chosen.output)
    trained = _trained(kind, runs)
    model = load_on_device(chosen.lm, chosen.device)
    for part in trained:
        part.check_belongs(model)
    study = kind(model, chosen.data, trained, chosen[kind.name], track)
    if kind.resumable and chosen.resume is not None:
        study.resume(chosen.resume)
    with process_group() as rank:
        if rank:
            study.folder, study.track = Path(from_first("")), silent
            return study.answer()
        return _carried_out(study, runs[0] if runs else None, parser, options)


def _carried_out(study: Study[Any], run: RunFolder | None, parser: ExplainingParser, options: Namespace) -> Findings:
    """Run a study in the folder of a run, by default a new one."""
    claim = None if run else Claim(output_root("--output", options.output), options.experiment)
    run = run or claim.run  # type: ignore[union-attr] # one of the two exists
    with nullcontext() if claim is None else claim.given_up_after_a_refusal():
        if claim is not None:
            plain = yaml.safe_load(parser.dump(options, skip_validation=True))
            run.save_config({name: value for name, value in plain.items() if name != "config"})
        record_in(run.path)
        folder = study.folder or study.claim(run.path)
        if study.resumable:
            track.say(f"Finished pieces are kept in {folder}; after an interruption, resume with --resume {folder}")
        from_first(str(folder))
        with terminable(), removed_if_empty(folder):
            findings = study.answer()
        try:
            findings = study.write(findings, folder)
        finally:  # a table that could not be written is still shown
            show(findings)
    return findings


def _study_class(path: str) -> type[Study[Any]]:
    module, _, name = path.rpartition(".")
    if not module:
        raise ConfigurationError(f"{path!r} is not an import path; expected package.module.Class of a study.")
    try:
        members = vars(import_module(module))
    except ImportError as problem:
        raise ConfigurationError(f"The module {module} cannot be imported: {problem}") from problem
    kinds = {key: kind for key, kind in members.items() if isinstance(kind, type) and issubclass(kind, Study)}
    if name not in kinds:
        raise ConfigurationError(f"{module} has no study named {name!r}. {nearest_names(name, kinds)}")
    return kinds[name]


def _parser(kind: type[Study[Any]]) -> ExplainingParser:
    parser = ExplainingParser(prog=f"oa-train {kind.name}", description=(kind.__doc__ or "").partition("\n")[0])
    add_config(parser)
    needs_run = kind.asks_of in NEEDING_RUNS
    run_type = str if needs_run else str | None
    parser.add_argument("--run", type=run_type, required=needs_run, help=_RUN_HELP[kind.asks_of])
    if not needs_run:
        parser.add_argument("--output", type=str, default="runs", help="folder for a new run, without --run")
        parser.add_argument("--experiment", type=str, default=kind.name, help="name of the new run")
    if kind.resumable:
        parser.add_argument("--resume", type=str | None, default=None, help="folder of this study, if unfinished")
    parser.add_argument("--device", type=str, default="auto", help="device of the model: auto, cpu, cuda, cuda:1")
    parser.add_argument("--seed_everything", type=int, default=0, help="seed of all draws")
    add_model_and_task(parser)
    link_model(parser)
    parser.add_class_arguments(kind.Settings, kind.name)
    return parser


def _options(parser: ExplainingParser, runs: Sequence[RunFolder], words: Sequence[str]) -> Namespace:
    """The options of a command line; model, task and seed are those of the run unless the command line sets them."""
    stored: list[str] = []
    if runs:
        config = stored_config(runs[0], words)
        shared = {name: value for name, value in config.items() if name.partition(".")[0] in FROM_RUN}
        stored = ["--config", yaml.safe_dump(shared), "--run", str(runs[0].path)]
    options = parser.parse_args([*stored, *words])
    check_values(parser, options)
    make_paths_absolute(options)
    return options


def _trained(kind: type[Study[Any]], runs: Sequence[RunFolder]) -> list[Any]:
    """Load the circuits, lenses or constants of the runs that a study analyses."""
    if kind.asks_of == "none":
        return []
    having = [run for run in runs if not (kind.asks_of in ("optional", "any") and run.is_of_a_study)]
    of_circuits = kind.FromRun is TrainedCircuit
    if of_circuits and kind.asks_of in TAKING_SEVERAL:
        having = [circuit for run in having for circuit in run.circuits()]
    return _named_apart(
        [run.trained_circuit() if of_circuits else kind.FromRun.load(run.path) for run in having], having
    )


def _named_apart(trained: Sequence[Any], runs: Sequence[RunFolder]) -> list[Any]:
    """Use the paths of the runs as names if the names are not unique."""
    if len({part.name for part in trained}) == len(trained):
        return list(trained)
    return [replace(part, name=str(run.path)) for part, run in zip(trained, runs, strict=True)]
