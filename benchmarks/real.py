"""Circuits and a scan of a pretrained model: SmolLM2-135M on indirect object identification and on capitals.

    python -m benchmarks.real FOLDER                    all stages; started again, it resumes where it stopped
    python -m benchmarks.real FOLDER --stage nodes      some stages, and those that they need
    python -m benchmarks.real FOLDER --model DIRECTORY  a local copy of the model; by default the one of `make real`

A stage is one command of `oa-train`. FOLDER gets the runs, `stages.json` with the command, minutes, CPU minutes and
peak memory of each, `table.md` with the results of finished stages, and `nodes.png`. An interrupted fit resumes from
its last checkpoint, a scan from its finished pieces; everything else starts again.
"""

import argparse
import json
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real_model import real_model
from benchmarks.real_text import real_text
from oa_train.figures.fronts import front_figure
from oa_train.figures.style import save_figure
from oa_train.metrics.estimates import Estimate
from oa_train.studies.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
AGREEMENT = ("median_ratio", "mean_ratio", "rank_correlation")
SHOWN = ("optimal", "counterfactual", "resample", "mean", "noise", "zero")


@dataclass(frozen=True)
class Stage:
    """A command and what it is about.

    Attributes:
        name: of the stage.
        command: subcommand of `oa-train`.
        options: its options; {run} is the run folder of the stage `of`.
        of: the fit whose run a study is about.
    """

    name: str
    command: str
    options: str
    of: str | None = None


STAGES = (
    Stage("nodes", "fit", "--config configs/circuit_nodes_smollm2.yaml"),
    Stage("nodes_compared", "compare", "--run {run} --compare.random_circuits 0", of="nodes"),
    Stage(
        "nodes_random",
        "compare",
        "--run {run}/front/1 --compare.ablations [optimal]",
        of="nodes",
    ),
    Stage("edges", "fit", "--config configs/circuit_edges_smollm2.yaml"),
    Stage("edges_compared", "compare", "--run {run} --compare.random_circuits 0", of="edges"),
    Stage("capitals", "fit", "--config configs/circuit_nodes_capitals.yaml"),
    Stage(
        "capitals_compared",
        "compare",
        "--run {run} --compare.random_circuits 0",
        of="capitals",
    ),
    Stage("scan", "scan", "--config configs/scan_smollm2.yaml"),
    Stage(
        "curve",
        "curve",
        "--run {run}/front/1 --data.n_test 32 --data.n_validation 8 --curve.rankings [scores,attribution,random] "
        "--curve.random_orders 1 --curve.fractions [0.2,0.4,0.6,0.8] --curve.ablations [optimal,mean,zero] "
        "--curve.fit.steps 20 --curve.fit.batch_size 4 --curve.fit.evaluate_every 20",
        of="nodes",
    ),
    Stage(
        "robustness",
        "robustness",
        "--run {run}/front/1 --data.n_test 64 --robustness.n_subsets 8 --robustness.densities [0.25,0.5,0.75] "
        "--robustness.ascent.steps 20 --robustness.ascent.step_size 0.1 --robustness.ascent.n_prompts 8 "
        "--robustness.ascent.random_starts 1",
        of="nodes",
    ),
    Stage(
        "interact",
        "interact",
        "--run {run} --data.n_test 32 --interact.scan {run}/studies/scan_0 --interact.ablation mean",
        of="scan",
    ),
    Stage("tracing", "fit", "--config configs/trace_smollm2.yaml"),
    Stage("traced", "trace", "--run {run} --trace.draws 3", of="tracing"),
    Stage("lenses", "fit", "--config configs/lenses_smollm2.yaml --data.path {text}"),
    Stage("lenses_compared", "compare_lenses", "--run {run}", of="lenses"),
    Stage(
        "lenses_faithful",
        "faithfulness",
        "--run {run} --data.scored last --data.context_length 32 --data.n_test 24 --data.n_means 512",
        of="lenses",
    ),
)


class Progress:
    """Finished stages, kept in `stages.json`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "stages.json"
        self.stages: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def of(self, name: str) -> dict[str, Any]:
        """Facts of a stage."""
        return self.stages.setdefault(name, {"minutes": 0.0, "cpu_minutes": 0.0, "memory_gib": 0.0, "results": None})

    def save(self) -> None:
        """Write the file."""
        self.path.write_text(json.dumps(self.stages, indent=1) + "\n")


def words_of(stage: Stage, progress: Progress, folder: Path, model: str) -> list[str]:
    """The command line of a stage; a fit that has a checkpoint is resumed, and a scan that has pieces."""
    command = ["--lm.name", model]
    if stage.command == "scan":
        pieces = sorted((folder / stage.name).glob("version_*/studies/scan_*/pieces"))
        command += ["--output", str(folder), "--experiment", stage.name]
        command += ["--resume", str(pieces[-1].parent)] if pieces else []
    if stage.command == "fit":
        command += ["--trainer.default_root_dir", str(folder), "--experiment", stage.name]
        state = _last_state(folder / stage.name)
        if state is not None:
            command += ["--ckpt_path", str(state)]
    run = progress.of(stage.of)["run"] if stage.of else ""
    text = str(real_text()) if "{text}" in stage.options else ""
    return [stage.command, *shlex.split(stage.options.format(run=run, text=text)), *command]


def _last_state(experiment: Path) -> Path | None:
    versions = sorted(experiment.glob("version_*"), key=lambda path: RunFolder(path).version, reverse=True)
    return next(filter(None, (RunFolder(version).last_state() for version in versions)), None)


def carry_out(stage: Stage, progress: Progress, folder: Path, model: str) -> None:
    """Run a stage unless it is done, and note its cost."""
    facts = progress.of(stage.name)
    if facts["results"]:
        return
    words = words_of(stage, progress, folder, model)
    print(f"{stage.name}: oa-train {shlex.join(words)}", flush=True)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with (folder / f"{stage.name}.log").open("a") as log:
        done = subprocess.run(  # noqa: S603 (our own command)
            [sys.executable, "-m", "oa_train.cli.main", *words], cwd=ROOT, stdout=log, stderr=log
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    facts["minutes"] += (time.perf_counter() - start) / 60
    facts["cpu_minutes"] += cpu / 60
    facts["memory_gib"] = max(facts["memory_gib"], after.ru_maxrss / 2**20)
    facts["command"] = shlex.join(["oa-train", stage.command, *shlex.split(stage.options)])
    if done.returncode == 0:
        text = (folder / f"{stage.name}.log").read_text()
        facts["results"] = re.findall(r"^results: (.+)$", text, re.MULTILINE)[-1]
        facts["run"] = str(Path(facts["results"]).parent.parent)
    progress.save()
    if done.returncode != 0:
        sys.exit(f"{stage.name} ended with status {done.returncode}; see {folder / stage.name}.log")


def table(progress: Progress) -> str:
    """Figures of all stages that are done, as Markdown."""
    lines = ["| stage | circuit | ablation | KL (nats) | accuracy | logit difference | minutes | GiB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, facts in progress.stages.items():
        if not facts["results"]:
            continue
        results = json.loads((Path(facts["results"]) / "results.json").read_text())
        cost = f"{facts['minutes']:.0f} | {facts['memory_gib']:.1f}"
        for row in results["rows"]:
            if row.get("ablation") is not None and row.get("component", "circuit") == "circuit":
                kept = row.get("run", row.get("number", ""))
                figures = " | ".join(_figure(row[key]) for key in ("kl", "accuracy", "logit_difference"))
                lines.append(f"| {name} | {kept} | {row['ablation']} | {figures} | {cost} |")
        for drawn in results.get("random_circuits", []):
            values = sorted(drawn["kl"])
            middle = values[len(values) // 2]
            lines.append(
                f"| {name} | {len(values)} random of {drawn['size']} | optimal | lowest {values[0]:.3g}, median "
                f"{middle:.3g}; this circuit {drawn['run_kl']:.3g} | | | {cost} |"
            )
        for pair in results.get("agreement", []):
            if pair["first"] == "optimal":
                shown = ", ".join(f"{key.replace('_', ' ')} {_figure(pair[key])}" for key in AGREEMENT)
                lines.append(f"| {name} | {results['n_units']} units | {pair['second']} | {shown} | | | {cost} |")
        if "kl" in results["metrics"]:
            figures = " | ".join(_figure(results["metrics"][key]) for key in ("kl", "accuracy", "logit_difference"))
            lines.append(f"| {name} | {results['circuit']} | {results['ablation']} | {figures} | {cost} |")
    return "\n".join(lines) + "\n"


def _figure(value: dict[str, Any]) -> str:
    low, high = value["ci95"]
    return f"{value['mean']:.3f} ({low:.3f} to {high:.3f})"


def figure(progress: Progress, folder: Path) -> None:
    """KL divergence of the three circuits of nodes under each ablation, if they have been compared."""
    results = progress.of("nodes_compared")["results"]
    if not results:
        return
    document = json.loads((Path(results) / "results.json").read_text())
    rows, sizes = document["rows"], {run["name"]: run["n_nodes"] for run in document["runs"]}
    kl = {
        kind: [Estimate(**row["kl"]) for run in sizes for row in rows if (row["run"], row["ablation"]) == (run, kind)]
        for kind in SHOWN
    }
    title = "SmolLM2-135M, indirect object identification"
    save_figure(front_figure([*sizes.values()], kl, 300, "heads and MLPs", title), folder / "nodes.png")


def needed(names: Sequence[str]) -> list[Stage]:
    """The stages of these names and those that they are about, in order."""
    known = {stage.name: stage for stage in STAGES}
    wanted = {*names, *(known[name].of for name in names)}
    return [stage for stage in STAGES if stage.name in wanted]


def main() -> None:
    """Carry out the stages, and write the table after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stage", action="append", choices=[stage.name for stage in STAGES])
    parser.add_argument("--model", default=None)
    options = parser.parse_args()
    folder = options.folder.expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    model = options.model or str(real_model())
    progress = Progress(folder)
    for stage in needed(options.stage or [stage.name for stage in STAGES]):
        carry_out(stage, progress, folder, model)
        (folder / "table.md").write_text(table(progress))
        figure(progress, folder)
    print(table(progress))


if __name__ == "__main__":
    main()
