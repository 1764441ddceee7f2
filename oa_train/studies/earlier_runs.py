"""Earlier runs of the same experiment: their results, and the checkpoint from which a job resumes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oa_train.errors import ArtefactError, CheckpointError, ConfigurationError
from oa_train.studies.run_folder import FRONT, VERSION, RunFolder, read_config
from oa_train.studies.run_list import fit_results
from oa_train.training.checkpoints import read_checkpoint
from oa_train.training.slurm import slurm_job

# Keys of a recorded configuration that do not describe the experiment.
RECORDS = ("resumed_from", "slurm_job")


def finished_results(run: RunFolder) -> dict[str, Any] | None:
    """Results of the finished training run; None if it is not finished or its files are damaged."""
    results = fit_results(run)
    numbers = {str(row["number"]) for row in (results or {}).get("rows", ()) if "number" in row}
    folders = [run.path / FRONT / number for number in numbers] or [run.path]
    try:
        for folder in folders if results and (numbers or "circuit" in results) else ():
            RunFolder(folder).trained_circuit()
    except ArtefactError:
        return None
    return results


def checkpoint_to_go_on_from(folder: Path, config: Mapping[str, Any]) -> tuple[Path | None, list[str]]:
    """Last checkpoint of this job's latest run with this configuration, and messages about it.

    Damaged checkpoints are skipped, so that one of them does not make every restart of the job fail.

    Args:
        folder: folder that holds the runs, `version_<N>`.
        config: configuration of this run, in the form in which runs record it.
    """
    job, messages = slurm_job(), []
    numbers = [run.name.removeprefix(f"{VERSION}_") for run in folder.glob(f"{VERSION}_*")]
    for number in sorted(filter(str.isdecimal, numbers), key=int, reverse=True):
        run = RunFolder(folder / f"{VERSION}_{number}")
        checkpoint = run.checkpoint("last")
        if not checkpoint.is_file() or not is_same_experiment(run, config, job):
            continue
        try:
            read_checkpoint(checkpoint)
        except CheckpointError:
            messages.append(f"{checkpoint} is damaged and is skipped.")
            continue
        return checkpoint, [*messages, f"SLURM has started job {job} again; it resumes from {checkpoint}."]
    return None, [*messages, f"SLURM has started job {job} again, but it left no checkpoint; it starts as before."]


def is_same_experiment(run: RunFolder, config: Mapping[str, Any], job: str | None = None) -> bool:
    """True if a run has this configuration and, if a job is given, belongs to it."""
    try:
        recorded = read_config(run.config_path)
    except ConfigurationError:
        return False
    same = {**recorded, **dict.fromkeys(RECORDS)} == {**config, **dict.fromkeys(RECORDS)}
    return same and job in (None, recorded.get("slurm_job"))
