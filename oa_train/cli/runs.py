"""`oa-train runs`: the runs under a folder with their main results, read from their files without torch."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from oa_train.errors import ArtefactError, ConfigurationError, nearest_names
from oa_train.studies.run_folder import CONFIG_FILE, FRONT, RunFolder, read_config


def runs(words: Sequence[str]) -> list[dict[str, str]]:
    """Print a table of the runs, the latest last; returns its rows."""
    from oa_train.cli.output import console, table_of

    parser = argparse.ArgumentParser(
        prog="oa-train runs", description="List runs with size, KL divergence and accuracy.", exit_on_error=False
    )
    parser.add_argument("--output", default="runs", help="folder that holds the runs (default: runs)")
    try:
        chosen, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as problem:
        raise ConfigurationError("--output needs a value.") from problem
    if rest:
        raise ConfigurationError(f"There is no option {rest[0]}. {nearest_names(rest[0], ['--output', '--help'])}")
    root = Path(chosen.output).expanduser()
    if not root.is_dir():
        raise ConfigurationError(f"--output is {chosen.output!r}; expected a folder that holds runs.")
    configs = sorted(root.rglob(CONFIG_FILE), key=lambda path: path.stat().st_mtime)
    rows = [row for path in configs for row in _rows(RunFolder(path.parent), root)]
    console.print(table_of(f"runs in {root}", rows) if rows else f"There are no runs in {root}.")
    return rows


def finished_results(run: RunFolder) -> dict[str, Any] | None:
    """Results of the end of a training of this run; None if it is not finished, or its files are damaged."""
    results = _results(run)
    numbers = {str(row["number"]) for row in (results or {}).get("rows", ()) if "number" in row}
    folders = [run.path / FRONT / number for number in numbers] or [run.path]
    try:
        for folder in folders if results and (numbers or "circuit" in results) else ():
            RunFolder(folder).trained_circuit()
    except ArtefactError:
        return None
    return results


def _results(run: RunFolder) -> dict[str, Any] | None:
    """The latest results of the end of a training."""
    paths = sorted(run.path.glob("studies/fit_*/results.json"), key=lambda path: path.stat().st_mtime)
    with suppress(OSError, ValueError):
        results = json.loads(paths[-1].read_text(encoding="utf-8")) if paths else None
        return results if isinstance(results, dict) and isinstance(results.get("rows"), list) else None
    return None


def _rows(run: RunFolder, root: Path) -> Iterator[dict[str, str]]:
    """A row for each circuit of a run, or for the run if it has no circuits."""
    try:
        config = read_config(run.config_path)
    except ConfigurationError:  # a configuration of something else
        return
    results, lm, data = _results(run), config.get("lm"), config.get("data")
    begun = datetime.fromtimestamp(run.config_path.stat().st_mtime).astimezone()
    states = {
        "finished": results,
        "not finished": run.last_state(),
        "study": any(run.path.glob("studies/*/results.json")),
        "no checkpoint": True,
    }
    name = str(run.path.relative_to(root))
    rest = {
        "state": next(state for state, holds in states.items() if holds),
        "model": Path(str(lm.get("name", "tiny"))).name if isinstance(lm, Mapping) else "",
        "task": str(data.get("class_path") if isinstance(data, Mapping) else data).rpartition(".")[2],
        "date": f"{begun:%Y-%m-%d %H:%M}",
    }
    results = results or {"rows": ()}
    own = results.get("ablation")
    circuits = [part for part in results["rows"] if "number" in part and part.get("ablation") == own]
    for part in circuits:
        yield {"run": f"{name}/{FRONT}/{part['number']}", **_figures(part, part), **rest}
    if not circuits:
        yield {"run": name, **_figures(results.get("circuit") or {}, results.get("metrics") or {}), **rest}


def _figures(counts: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, str]:
    """Size, and metrics as means and half the widths of their intervals."""
    part = "edges" if "edges_total" in counts else "nodes"
    size = f"{counts[part]:,} of {counts[f'{part}_total']:,} {part}" if f"{part}_total" in counts else ""
    texts = {
        name: f"{metric['mean']:.3g} "
        + (
            "[{:.2g}, {:.2g}]".format(*metric["ci95"])  # of a share
            if name == "accuracy"
            else f"± {metric['ci95'][1] - metric['mean']:.1g}"
        )
        for name in ("kl", "accuracy")
        if isinstance(metric := metrics.get(name), Mapping)
    }
    return {"size": size, "KL": texts.get("kl", ""), "accuracy": texts.get("accuracy", "")}
