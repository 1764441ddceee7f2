"""Effects of single units, read from a finished scan, by which other studies choose what to look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oa_train.ablations.registry import AblationKind
from oa_train.errors import ArtefactError, ConfigurationError
from oa_train.files import read_json
from oa_train.studies.study import RESULTS_FILE


@dataclass(frozen=True)
class ScannedEffects:
    """KL divergence in nats of each unit ablated alone, and the ablation that it was measured under."""

    kl: dict[str, float]
    ablation: AblationKind


def read_scan(path: str | Path, ablation: AblationKind, units: Sequence[str], fingerprint: str) -> ScannedEffects:
    """Read the effects of some units from a scan.

    Args:
        path: folder of the scan (`RUN/studies/scan_0`) or its `results.json`.
        ablation: kind of ablation that is preferred; the scan's first one stands in where it was not scanned.
        units: names of the units.
        fingerprint: digest of the model's weights.

    Raises:
        ArtefactError: it is no finished scan, or one of another model.
        ConfigurationError: the scan lacks a unit.
    """
    file = Path(path) / RESULTS_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ArtefactError(
            f"{path} holds no finished scan; expected the folder of one, RUN/studies/scan_0, or its {RESULTS_FILE}."
        )
    document = read_json(file)
    if document.get("command") != "scan" or not document.get("rows"):
        raise ArtefactError(f"{file} holds no scan but results of {document.get('command')!r}.")
    if document["model"]["fingerprint"] != fingerprint:
        raise ArtefactError(f"{file} is a scan of another model ({document['model']['name']}): the weights differ.")
    rows = document["rows"]
    used = ablation if any(row["ablation"] == ablation for row in rows) else rows[0]["ablation"]
    kl = {row["component"]: row["kl"]["mean"] for row in rows if row["ablation"] == used}
    missing = [name for name in units if name not in kl]
    if missing:
        more = f" and of {len(missing) - 1} more units" if len(missing) > 1 else ""
        raise ConfigurationError(
            f"The scan {file} has no effect of {missing[0]}{more} that are selected. Select units that it has, or "
            "leave the scan out: single effects are then measured."
        )
    return ScannedEffects({name: kl[name] for name in units}, used)
