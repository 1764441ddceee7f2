"""Rankings of parts: by keep-probabilities of a circuit, at random, by a finished scan or by a CSV file."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from oa_train.ablations.registry import AblationName
from oa_train.ablations.trained_circuit import TrainedCircuit
from oa_train.errors import ArtefactError, ConfigurationError, nearest_names
from oa_train.files import read_json
from oa_train.models.levels import Level
from oa_train.seeds import torch_generator
from oa_train.shapes import Float, Int, Tensor
from oa_train.studies.findings import listed
from oa_train.studies.study import RESULTS_FILE

SCORES, ATTRIBUTION, RANDOM = "scores", "attribution", "random"
BUILT_IN = (SCORES, ATTRIBUTION, RANDOM)

# Maximum number of names that a message lists.
MOST_NAMED = 5


@dataclass(frozen=True, eq=False)
class Ranking:
    """Parts in an order of importance.

    Attributes:
        name: name in tables and figures.
        scores: score of each part; the larger, the more important.
        draw: number of a random order, counted from 1; None for other rankings.
    """

    name: str
    scores: Float[Tensor, " part"]
    draw: int | None = None

    @property
    def ascending(self) -> Int[Tensor, " part"]:
        """Indices of the parts, least important first; ties by descending index, as in `Level.largest`."""
        return self.scores.argsort(descending=True, stable=True).flip(0)

    def names(self, parts: Sequence[str]) -> list[str]:
        """Names of the parts, least important first."""
        return [parts[number] for number in self.ascending.tolist()]


def check_names(rankings: Sequence[str]) -> None:
    """Validate names of rankings.

    Raises:
        ConfigurationError: the list is empty, or a ranking is named twice or is neither built in nor a path.
    """
    if not rankings:
        raise ConfigurationError(f"rankings is empty; name at least one of {', '.join(BUILT_IN)}, or a path.")
    if len(set(rankings)) < len(rankings):
        raise ConfigurationError(f"rankings names one of {', '.join(rankings)} twice.")
    for name in rankings:
        if name not in BUILT_IN and not Path(name).expanduser().exists():
            raise ConfigurationError(
                f"rankings names {name!r}, which is not a path either. {nearest_names(name, BUILT_IN)} A path "
                "leads to the folder of a finished scan (studies/scan_0 of its run), or to a CSV file with the "
                "columns component and score."
            )


def keep_probabilities(trained: TrainedCircuit | None, level: Level, parts: Sequence[str]) -> Ranking:
    """Ranking by the keep-probabilities of a run's circuit.

    Raises:
        ConfigurationError: there is no circuit, or it was not trained.
        ArtefactError: a part has no keep-probability.
    """
    if trained is None:
        raise ConfigurationError(
            "rankings names scores, the keep-probabilities of a trained circuit. Give --run, the folder of a finished "
            "run that has one (RUN/front/N of a run with several)."
        )
    if trained.circuit.scores is None:
        raise ConfigurationError(f"rankings names scores, but {trained.name} was not trained and has none.")
    scores = dict(zip(trained.circuit.level.names, trained.circuit.scores.double().tolist(), strict=True))
    return Ranking(SCORES, _of_parts(f"The circuit of {trained.name}", scores, level, parts))


def told_apart(rankings: Mapping[str, Ranking]) -> dict[str, Ranking]:
    """The rankings; those with the same name are renamed to their keys."""
    names = [ranking.name for ranking in rankings.values()]
    return {
        key: ranking if names.count(ranking.name) == 1 else replace(ranking, name=key)
        for key, ranking in rankings.items()
    }


def random_order(n_parts: int, seed: int, draw: int) -> Ranking:
    """A random order, determined by the seed and the draw."""
    order = torch.randperm(n_parts, generator=torch_generator(seed, "random ranking", draw))
    return Ranking(RANDOM, order.double(), draw)


def ranking_of_path(
    text: str, level: Level, parts: Sequence[str], fingerprint: str, ablation: AblationName | None
) -> Ranking:
    """The ranking by a finished scan's KL divergences, or by the scores in a CSV file.

    Args:
        text: path of a scan's study folder, or of a CSV file with the columns `component` (or `edge`) and `score`.
        level: level of the parts.
        parts: names of the parts to rank.
        fingerprint: fingerprint of the model, which a scan must match.
        ablation: kind of ablation in the scan; by default `optimal`, or the first one it has.

    Raises:
        ArtefactError: the path is neither, or the ranking is damaged, belongs to another model, or ranks other parts.
    """
    path = Path(text).expanduser()
    if path.is_dir() or path.name == RESULTS_FILE:
        effects = effects_of_scan(path, level, parts, fingerprint, ablation)
        name = path.name if path.is_dir() else path.parent.name
        return Ranking(name, torch.tensor([*effects.values()], dtype=torch.float64))
    return Ranking(path.name, _scores_of_csv(path, level, parts))


def effects_of_scan(
    path: str | Path, level: Level, parts: Sequence[str], fingerprint: str, ablation: AblationName | None
) -> dict[str, float]:
    """KL divergence in nats of each part ablated alone, from a finished scan; see `ranking_of_path`."""
    folder = Path(path).expanduser()
    folder = folder.parent if folder.name == RESULTS_FILE else folder
    file = folder / RESULTS_FILE
    if not file.is_file():
        raise ArtefactError(f"The ranking {folder} has no results.json: expected the folder of a finished scan.")
    results = read_json(file)
    if results.get("command") != "scan":
        raise ArtefactError(f"The ranking {folder} holds results of {results.get('command')!r}; expected a scan's.")
    model: Mapping[str, Any] = results.get("model") or {}
    if model.get("fingerprint") != fingerprint:
        raise ArtefactError(
            f"The ranking {folder} was made with the model {model.get('name')} "
            f"({str(model.get('fingerprint'))[:12]}), not with this one ({fingerprint[:12]}). Scan this model."
        )
    try:
        by_kind: dict[str, dict[str, float]] = {}
        for row in results["rows"]:
            by_kind.setdefault(row["ablation"], {})[row["component"]] = float(row["kl"]["mean"])
        kind = ablation or ("optimal" if "optimal" in by_kind else next(iter(by_kind)))
    except (KeyError, TypeError, ValueError, StopIteration) as problem:
        raise ArtefactError(f"The ranking {file} is damaged: it has no rows of a scan ({problem!r}).") from problem
    if kind not in by_kind:
        raise ArtefactError(f"The ranking {folder} has no {kind} ablation. {nearest_names(kind, by_kind)}")
    scores = _of_parts(f"The ranking {folder}", by_kind[kind], level, parts)
    return dict(zip(parts, scores.tolist(), strict=True))


def _scores_of_csv(path: Path, level: Level, parts: Sequence[str]) -> Tensor:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise ArtefactError(f"The ranking {path} cannot be read as CSV: {problem}") from problem
    if not {level.part, "score"} <= set(columns):
        raise ArtefactError(
            f"The ranking {path} has the columns {', '.join(columns) or 'none'}; expected {level.part} and score."
        )
    scores: dict[str, float] = {}
    for line, row in enumerate(rows, start=2):
        name, text = (row[level.part] or "").strip(), row["score"]
        if name in scores:
            raise ArtefactError(f"The ranking {path} names {name} twice, the second time in line {line}.")
        try:
            scores[name] = float(text or "")
        except ValueError:
            scores[name] = math.nan
        if not math.isfinite(scores[name]):
            raise ArtefactError(
                f"The ranking {path} gives {name} the score {text!r} in line {line}; expected a number."
            )
    return _of_parts(f"The ranking {path}", scores, level, parts)


def _of_parts(whose: str, scores: Mapping[str, float], level: Level, parts: Sequence[str]) -> Tensor:
    """Scores of the parts in their order; scores of the level's other parts are ignored."""
    known = set(level.names)
    unknown, missing = [name for name in scores if name not in known], [name for name in parts if name not in scores]
    if unknown:
        raise ArtefactError(
            f"{whose} ranks {listed(unknown, MOST_NAMED)}, which this selection does not have: it belongs to "
            f"another model or selection. {nearest_names(unknown[0], level.names)}"
        )
    if missing:
        raise ArtefactError(
            f"{whose} has no score for {listed(missing, MOST_NAMED)}, of the {len(parts)} selected {level.parts}. "
            "Select only what it ranks (components), or rank the rest too."
        )
    return torch.tensor([scores[name] for name in parts], dtype=torch.float64)
