"""Studies: questions about a model, answered by rows, metrics and figures in a common format.

    <run>/studies/<name>_<K>/results.json, tables/<table>.csv, figures/<figure>.png

A study is a class with a name, a settings dataclass and a `run` that returns `Findings`. The command line, the results
file, the tables and the figures follow from these.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from oa_train.ablations.base import Ablation
from oa_train.ablations.evaluation import CLEAN_BYTES, Behaviour, CleanLogits, circuit_behaviour, clean_behaviour
from oa_train.ablations.registry import ABLATION_KINDS, STATISTICS, AblationName
from oa_train.ablations.trained_circuit import TrainedCircuit, run_name
from oa_train.artefacts import versions
from oa_train.batches import Batch
from oa_train.engine.chunks import ROWS_PER_RUN, RUN_BYTES
from oa_train.errors import ArtefactError, ConfigurationError, RunError
from oa_train.figures.style import save_figure
from oa_train.files import make_next_folder, write_json
from oa_train.metrics.estimates import Estimate, estimate, paired_difference, written
from oa_train.metrics.measures import MEASURES
from oa_train.models.frozen import CausalLM
from oa_train.models.levels import Level
from oa_train.models.weights import fingerprint
from oa_train.progress import Stage, Track, counted, silent
from oa_train.shapes import Bool, Float, Tensor
from oa_train.studies.findings import Findings as Findings, Row as Row, Table as Table, plain, write_csv
from oa_train.studies.run_folder import PIECES
from oa_train.tasks.task import Stream, Task

RESULTS_FILE = "results.json"

# Maximum number of rows of a table of parts on the terminal; tables/*.csv has all of them.
MOST_LISTED = 30

SCHEMA_VERSION = 1

S = TypeVar("S")


class Study(ABC, Generic[S]):
    """A question about a model. Subclasses define `name`, `Settings` and `run`, and may extend `check`.

    Args:
        model: frozen causal language model.
        task: source of prompts.
        from_runs: results of runs that the study is about, instances of `FromRun`; trained circuits by default.
        settings: an instance of `Settings`; its defaults if omitted.
        track: progress.

    Raises:
        ConfigurationError: see `check`.

    Attributes:
        name: the command's name and the prefix of study folders.
        Settings: dataclass of the options.
        FromRun: class of `from_runs`.
        asks_of: number of `from_runs` that the study needs: `none`, `one`, `several` (at least one), `optional` (one
            or none), or `any` (any number).
        resumable: True if the study writes pieces to its folder (see `studies.pieces`) and can be resumed from them.
        folder: the study's folder, once created.
    """

    name: ClassVar[str]
    Settings: ClassVar[type]
    FromRun: ClassVar[type[Any]] = TrainedCircuit
    asks_of: ClassVar[Literal["none", "one", "several", "optional", "any"]] = "none"
    resumable: ClassVar[bool] = False
    folder: Path | None = None

    def __init__(
        self,
        model: CausalLM,
        task: Task,
        from_runs: Sequence[Any] = (),
        settings: S | None = None,
        track: Track = silent,
    ) -> None:
        self.model = model
        self.task = task
        self.from_runs = list(from_runs)
        self.settings: S = settings if settings is not None else self.Settings()
        self.track = track
        self.check()

    def check(self) -> None:
        """Reject unsuitable settings or `from_runs` before anything is computed.

        Raises:
            ConfigurationError: the number of `from_runs` is not what the study needs, or two have the same name.
        """
        names, noun = [trained.name for trained in self.from_runs], self.FromRun.noun
        fits, wanted = {
            "none": (not names, f"no {noun}"),
            "one": (len(names) == 1, f"one {noun}"),
            "several": (len(names) > 0, f"{noun}s with different names"),
            "optional": (len(names) <= 1, f"one {noun} or none"),
            "any": (True, f"{noun}s with different names, or none"),
        }[self.asks_of]
        if not fits or len(set(names)) < len(names):
            raise ConfigurationError(f"{self.name} expects {wanted}; it was given {names}.")

    @property
    def circuits(self) -> list[TrainedCircuit]:
        """The trained circuits, for a study of circuits."""
        return self.from_runs

    @abstractmethod
    def run(self) -> Findings:
        """Compute the findings. Nothing is written."""

    def plan(self) -> Sequence[Stage]:
        """Stages of the work, if known in advance; used to number them and to estimate the remaining time."""
        return []

    def answer(self) -> Findings:
        """Announce the work unless it is planned already, and do it. Nothing is written."""
        if not self.track.stages:
            self.announce(self.plan())
        return self.run()

    def announce(self, stages: Sequence[Stage]) -> None:
        """Print the cost of these stages, and number them in the progress output."""
        if stages:
            self.track = self.track.planned(stages)
            self.track.say(self._cost(stages))

    def _cost(self, stages: Sequence[Stage]) -> str:
        tokens, passes = max(batch.tokens.shape[1] for batch in self.batches), sum(stage.passes for stage in stages)
        weights = sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))
        kept = sum(len(batch) * batch.scored.shape[1] for batch in self.batches) * self.model.config.vocab_size * 4
        memory = (weights + RUN_BYTES + min(kept, CLEAN_BYTES)) / 2**30
        return (
            f"{self.name}: {passes:,} passes over prompts of up to {tokens} tokens in {len(stages)} stages, "
            f"up to {written(memory, 2)} GiB of tensors"
        )

    @cached_property
    def batches(self) -> list[Batch]:
        """The test prompts."""
        return list(self.task.batches("test", self.task.n_test))

    @cached_property
    def clean(self) -> CleanLogits:
        """Logits of the clean model on the test prompts, computed once."""
        return CleanLogits(self.model)

    def clean_behaviour(self) -> Behaviour:
        """Behaviour of the clean model on the test prompts."""
        return clean_behaviour(self.model, counted(self.track, self.batches, "running the clean model"), self.clean)

    def behaviour(
        self,
        level: Level,
        masks: Bool[Tensor, "circuit entry"] | Float[Tensor, "circuit entry"],
        ablations: Sequence[Ablation],
        description: str,
        rows_per_run: int = ROWS_PER_RUN,
    ) -> Behaviour:
        """Behaviour of circuits on the test prompts; see `circuit_behaviour`."""
        with self.track(len(masks) * self.task.n_test, f"evaluating {description}") as advance:
            return circuit_behaviour(
                self.model, self.batches, level, masks, ablations, rows_per_run, self.clean, advance
            )

    def run_in(self, run: str | Path) -> Findings:
        """Create `studies/<name>_<K>` in a run folder, compute the findings, and write them there.

        Raises:
            RunError: the folder cannot be created (raised before anything is computed) or written to.
        """
        folder = self.claim(run)
        with removed_if_empty(folder):
            return self.write(self.answer(), folder)

    def claim(self, run: str | Path) -> Path:
        """Create the next free study folder of a run."""
        self.folder = make_next_folder(Path(run) / "studies", self.name)
        return self.folder

    def resume(self, folder: str | Path) -> Path:
        """Use the folder of an unfinished study of the same kind, whose pieces are then reused.

        Raises:
            ArtefactError: the folder is not that of such a study, or the study is finished.
        """
        folder = Path(folder)
        if not self.resumable or not (folder / PIECES).is_dir() or not folder.name.startswith(f"{self.name}_"):
            raise ArtefactError(
                f"{folder} is not the folder of an unfinished {self.name}, such as studies/{self.name}_0 of a run."
            )
        if (folder / RESULTS_FILE).exists():
            raise ArtefactError(f"{folder} already holds results: this {self.name} is finished.")
        self.folder = folder
        return folder

    def write(self, findings: Findings, folder: Path) -> Findings:
        """Write the results, a trained circuit if there is one, the table and the figures, in this order.

        Returns:
            The findings, with their folder set.

        Raises:
            RunError: a file cannot be written.
        """
        try:
            write_json(folder / RESULTS_FILE, self.document(findings, folder.parent.parent))
            if findings.trained is not None:
                findings.trained.save_circuit(folder)
                findings.trained.save_constants(folder)
            if findings.rows:
                write_csv(folder / "tables" / f"{findings.table}.csv", findings.flat_rows())
            for name, draw in findings.figures.items():
                figure = draw()
                if figure is not None:
                    save_figure(figure, folder / "figures" / f"{name}.png")
        except OSError as problem:
            raise RunError(f"The results in {folder} cannot be written: {problem}") from problem
        return replace(findings, folder=folder)

    def document(self, findings: Findings, run: Path) -> dict[str, Any]:
        """Content of `results.json`."""
        lm = self.task.lm
        return {
            "schema_version": SCHEMA_VERSION,
            "command": self.name,
            "experiment": run_name(run),
            "seed": self.task.seed,
            "model": {
                "family": self.model.config.model_type,
                "fingerprint": self.fingerprint,
                "revision": lm.revision,
                "name": lm.name,
            },
            "task": {
                **self.task.describe(),
                "n_prompts": self.task.n_test,
                "split": "test",
                "distinct_prompts": self.distinct_prompts,
            },
            "versions": versions(),
            "metrics": plain(findings.metrics),
            "rows": plain(findings.rows),
            **({} if findings.circuit is None else {"circuit": dict(findings.circuit)}),
            **plain(findings.facts),
            "settings": plain(self.settings),
        }

    @cached_property
    def distinct_prompts(self) -> dict[Stream, int]:
        """Number of distinct texts among the prompts of each stream that evaluations use."""
        task = self.task
        sizes: dict[Stream, int] = {"means": task.n_means, "validation": task.n_validation, "test": task.n_test}
        return {stream: len({task.prompt(stream, n).text for n in range(size)}) for stream, size in sizes.items()}

    @property
    def prompts(self) -> str:
        """Description of the test prompts, for titles."""
        n_test, distinct = self.task.n_test, self.distinct_prompts["test"]
        repeated = "" if distinct == n_test else f", {distinct:,} of them distinct, which intervals count"
        return f"{n_test:,} held-out prompts{repeated}"

    @property
    def subject(self) -> str:
        """Model and task, for titles."""
        return f"{Path(self.task.lm.name).name}, {self.task.name}"

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the model's weights, from `from_runs` if known: a sharded model's weights cannot be read."""
        known = (trained.fingerprint for trained in self.from_runs)
        return next(filter(None, known), None) or fingerprint(self.model)


@contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove a study folder that is still empty when the work inside the context fails or is interrupted."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
            folder.parent.rmdir()
        raise


def estimates(behaviour: Behaviour, index: int = 0) -> dict[str, Estimate]:
    """Estimates of all measures of one circuit."""
    return {
        name: estimate(getattr(behaviour, name)[index], behaviour.identities, is_share=name == "accuracy")
        for name in MEASURES
    }


def differences(
    behaviour: Behaviour, other: Behaviour, index: int, other_index: int, name: str
) -> dict[str, Estimate]:
    """Paired differences of two circuits in all measures on the same prompts, by `<measure>_minus_<name>`."""
    return {
        f"{measure}_minus_{name}": paired_difference(
            getattr(behaviour, measure)[index], getattr(other, measure)[other_index], behaviour.identities
        )
        for measure in MEASURES
    }


def statistics_stages(kinds: Sequence[AblationName], task: Task) -> list[Stage]:
    """Stages that gather the statistics of the `means` prompts for ablations of these kinds."""
    needed = {statistic for kind in kinds for statistic in ABLATION_KINDS[kind].statistics}
    return [Stage(description, task.n_means) for name, description in STATISTICS.items() if name in needed]


def spoken(name: str) -> str:
    """Name of an ablation or measure as written in titles and tables."""
    return name.replace("_", " ")
