"""Where studies put their answers, and the layout of `results.json`.

<run>/studies/<command>_<K>/results.json, tables/*.csv, figures/*.png
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oa_train.artefacts import replace_file, versions, write_json
from oa_train.errors import RunError

RESULTS_FILE = "results.json"
SCHEMA_VERSION = 1


def results_document(
    command: str,
    run: Path,
    provenance: Mapping[str, Any],
    n_prompts: int,
    *,
    metrics: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    circuit: Mapping[str, int] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Lay out a results file.

    Args:
        command: the study.
        run: run folder; see `run_name`.
        provenance: model, task and seed, as artefact headers have them.
        n_prompts: test prompts.
        metrics: metric objects by name.
        rows: one for each line of the study's table.
        circuit: sizes of the circuit.
        **more: further keys of the study.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "experiment": run_name(run),
        "seed": provenance["seed"],
        "model": {key: provenance[key] for key in ("family", "fingerprint", "revision")}
        | {"name": provenance["model"]},
        "task": {**provenance["task"], "n_prompts": n_prompts, "split": "test"},
        "versions": versions(),
        "metrics": dict(metrics),
        "rows": [dict(row) for row in rows],
        **({"circuit": dict(circuit)} if circuit is not None else {}),
        **more,
    }


def run_name(run: str | Path) -> str:
    """What tables and figures call a run: experiment and version, and of several circuits the one's number."""
    parts = Path(run).absolute().parts
    return "/".join(parts[-4:] if parts[-2:-1] == ("front",) else parts[-2:])


def write_results(folder: Path, document: Mapping[str, Any]) -> Path:
    """Write `results.json` into a study folder.

    Raises:
        RunError: it cannot be written.
    """
    path = folder / RESULTS_FILE
    try:
        write_json(path, document)
    except OSError as problem:
        raise RunError(f"{path} cannot be written: {problem}") from problem
    return path


def write_table(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as `tables/<name>.csv`; a metric object becomes the columns mean, stderr, low and high."""
    flat = [_flatten(row) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in flat for key in row)))
    writer.writeheader()
    writer.writerows(flat)
    path = folder / "tables" / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    replace_file(path, text.getvalue().encode())
    return path


def _flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping) and "ci95" in value:
            low, high = value["ci95"]
            flat |= {key: value["mean"], f"{key}_stderr": value["stderr"], f"{key}_low": low, f"{key}_high": high}
        else:
            flat[key] = value
    return flat
