"""List of the runs under a folder with their main results, read from files without importing torch."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from oa_train.errors import ConfigurationError
from oa_train.studies.run_folder import CONFIG_FILE, FRONT, RunFolder, read_config


def list_runs(root: Path) -> list[dict[str, str]]:
    """A row for each run in or below a folder, the latest last; a run with several circuits has a row for each."""
    configs = sorted(root.rglob(CONFIG_FILE), key=lambda path: path.stat().st_mtime)
    return [row for path in configs for row in _rows(RunFolder(path.parent), root)]


def fit_results(run: RunFolder) -> dict[str, Any] | None:
    """Latest results of the end of a training run; None if there are none."""
    paths = sorted(run.path.glob("studies/fit_*/results.json"), key=lambda path: path.stat().st_mtime)
    with suppress(OSError, ValueError):
        results = json.loads(paths[-1].read_text(encoding="utf-8")) if paths else None
        return results if isinstance(results, dict) and isinstance(results.get("rows"), list) else None
    return None


def _rows(run: RunFolder, root: Path) -> Iterator[dict[str, str]]:
    """A row for each circuit of a run with several, otherwise one for the run."""
    try:
        config = read_config(run.config_path)
    except ConfigurationError:  # not the configuration of a run
        return
    results, lm, data = fit_results(run), config.get("lm"), config.get("data")
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
    """Size, KL divergence as mean and half-width of its interval, accuracy as mean and ends of its interval."""
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
