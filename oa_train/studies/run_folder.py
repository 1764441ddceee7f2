"""Run folders: their creation, their contents, and the commands that resume runs.

<root>/<experiment>/version_<N>/
    config.yaml  run.log  checkpoints/{best,last}.ckpt
    circuit/ constants/             for a single circuit
    front/<N>/{circuit,constants}/  for several circuits
    lens/ or tracing/               for lenses, or for constants of causal tracing
    studies/<name>_<K>/             with circuit/ and constants/ if the study found a circuit
"""

import os
import re
import shlex
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from oa_train.errors import ArtefactError, ConfigurationError
from oa_train.files import make_next_folder, replace_file

if TYPE_CHECKING:
    from oa_train.ablations.trained_circuit import TrainedCircuit
    from oa_train.models.spec import LMSpec

CONFIG_FILE = "config.yaml"
# Inside the folder of a resumable study: what has been computed so far.
PIECES = "pieces"
FRONT = "front"
STUDIES_FOLDER = "studies"
VERSION = "version"

# Model options that are taken from a run folder; `trust_remote_code` never is.
_KEPT_OF_LM = (
    *("name", "revision", "gguf_file", "adapter", "dtype", "quantization", "attn_implementation", "bos"),
    "local_files_only",
)

_SCHEME = re.compile(r"[a-zA-Z][\w+.-]+://")


@dataclass(frozen=True)
class RunFolder:
    """Folder of a run, or of one of its circuits: `RUN/front/N`, or `RUN/studies/<name>_<K>` if a study found one."""

    path: Path

    @classmethod
    def create(cls, root: Path, experiment: str) -> "RunFolder":
        """Create the folder of an experiment's next version in `root`; no two processes get the same one.

        Raises:
            RunError: the folder cannot be created.
        """
        return cls(make_next_folder(root / experiment, VERSION))

    @classmethod
    def find(cls, text: str, *, whole: bool = False) -> "RunFolder":
        """The run folder, or unless it has to be `whole` that of one of its circuits, at a path that a user gave.

        Raises:
            ArtefactError: there is no run at the path; the message lists runs nearby.
        """
        folder = cls(Path(text).expanduser())
        if folder.path.is_dir() and folder.config_path.is_file() and (folder.run == folder.path or not whole):
            return folder
        raise ArtefactError(_not_a_run(text, folder.path))

    @property
    def run(self) -> Path:
        """Folder of the run: RUN for RUN/front/N or RUN/studies/<name>_<K>, otherwise the folder itself."""
        of_a_study = self.path.parent.name == STUDIES_FOLDER and (self.path / "circuit").is_dir()
        is_part = (self.path.parent.name == FRONT or of_a_study) and not (self.path / CONFIG_FILE).exists()
        return RunFolder(self.path.parent.parent).run if is_part else self.path

    @property
    def is_of_a_study(self) -> bool:
        """True if the run folder was created by a study rather than by training; it then has no circuit."""
        return not (self.path / "circuit").exists() and "model" not in self.config()

    @property
    def config_path(self) -> Path:
        """Path of the run's configuration."""
        return self.run / CONFIG_FILE

    @property
    def version(self) -> int:
        """Number of the version; 0 for a folder with another name."""
        number = self.path.name.removeprefix(f"{VERSION}_")
        return int(number) if number.isdecimal() else 0

    def checkpoint(self, name: str) -> Path:
        """Path of the checkpoint `best` or `last`."""
        return self.run / "checkpoints" / f"{name}.ckpt"

    def config(self) -> dict[str, Any]:
        """Configuration of the run.

        Raises:
            ConfigurationError: it cannot be read, or refers to another configuration file.
        """
        content = read_config(self.config_path)
        if "config" in content:
            raise ConfigurationError(
                f"{self.config_path} refers to another configuration file, which no run folder of `oa-train fit` does."
            )
        return content

    def lm(self, name: str | None = None) -> "LMSpec":
        """The model of the run, which is not allowed to run code of its own (`trust_remote_code` is dropped).

        Args:
            name: where the model is now, if it has moved; a copy of the same weights will do. Without it, a folder
                that no longer exists is searched for by the fingerprint of its weights (see `models.moved_models`),
                with a warning.

        Raises:
            ArtefactError: the model has moved and was not found; the message lists the folders that were searched.
        """
        from oa_train.models.spec import LMSpec
        from oa_train.studies.run_model import located

        stored = {key: value for key, value in dict(self.config().get("lm") or {}).items() if key in _KEPT_OF_LM}
        spec = LMSpec(**stored)
        if name is not None:
            return replace(spec, name=name)
        return located(self, spec) if is_gone(spec.name) else spec

    def save_config(self, config: dict[str, Any]) -> None:
        """Write the run's configuration."""
        replace_file(self.path / CONFIG_FILE, yaml.safe_dump(config, sort_keys=False).encode())

    def circuits(self) -> "list[RunFolder]":
        """Folders with one circuit each: `front/N` of a run that trained several, else the run itself."""
        if (self.path / "circuit").exists() or not (self.path / FRONT).is_dir():
            return [self]
        numbers = [folder for folder in (self.path / FRONT).iterdir() if folder.name.isdecimal()]
        return [RunFolder(folder) for folder in sorted(numbers, key=lambda folder: int(folder.name))] or [self]

    def trained_circuit(self) -> "TrainedCircuit":
        """The circuit of the run.

        Raises:
            ArtefactError: the run has no circuit, or several; the message says why and what to do.
        """
        from oa_train.ablations.trained_circuit import (
            TrainedCircuit,  # imports torch, which help and early errors do not need
        )

        try:
            return TrainedCircuit.load(self.path)
        except ArtefactError as problem:
            raise ArtefactError(self._why_no_circuit(problem)) from problem

    def _why_no_circuit(self, problem: ArtefactError) -> str:
        if not (self.path / "circuit").exists() and (self.path / "constants").is_dir():
            return (
                f"{self.path} holds constants of components that were ablated alone, but no circuit.\nGive runs that "
                "trained a circuit, or constants for one (`circuit` or `keep` of ConstantsModule)."
            )
        for folder, content, command in (
            ("lens", "lenses", "compare_lenses"),
            ("tracing", "constants of causal tracing", "trace"),
        ):
            if (self.path / folder).is_dir():
                return f"{self.path} holds {content}, but no circuit: oa-train {command} --run {self.path}"
        if len(circuits := self.circuits()) > 1:
            choices = f"{self.path / FRONT}/N, N being {', '.join(part.path.name for part in circuits)}"
            return f"{self.path} holds several circuits. Give one of them: {choices}."
        return (
            f"{problem}\nThe run was not finished, or has been damaged since. This finishes it, in a new version:\n"
            f"  {self.resume_command(self.last_state())}"
        )

    def last_state(self) -> Path | None:
        """The latest checkpoint: `last.ckpt`, or `best.ckpt` if `last.ckpt` was deleted; None without either."""
        return next((path for path in map(self.checkpoint, ("last", "best")) if path.is_file()), None)

    def resume_command(self, checkpoint: Path | None = None) -> str:
        """The shell command that finishes the run, or resumes it from a checkpoint, by default `last.ckpt`."""
        return f"{self.start_command()} --ckpt_path {shlex.quote(str(checkpoint or self.checkpoint('last')))}"

    def start_command(self) -> str:
        """The command that runs the configuration again from the beginning."""
        return f"oa-train fit --config {shlex.quote(str(self.config_path))}"

    def how_to_resume(self, resumed_from: Path | None = None) -> list[str]:
        """Lines that say how to resume an interrupted run, which may have been resumed from a checkpoint itself."""
        if not self.config_path.is_file():
            return [f"Nothing is left in {self.run}. Start again with the command that started this run."]
        kept = self.last_state()
        if resumed_from is not None and (kept is None or kept != self.checkpoint("last")):
            sentence = f"No further state had been written. This resumes from {resumed_from} once more:"
            return [sentence, f"  {self.resume_command(resumed_from)}"]
        if kept is not None and "StochasticWeightAveraging" in self.config_path.read_text(encoding="utf-8"):
            exactness = "but not exactly: the averages of StochasticWeightAveraging start again:"
            return [
                f"This resumes from {kept}, in a new version of the run, {exactness}",
                f"  {self.resume_command(kept)}",
            ]
        if kept is not None:
            sentence = f"Nothing up to {kept} is lost. This resumes from there, in a new version of the run:"
            return [sentence, f"  {self.resume_command(kept)}"]
        return ["No checkpoint had been written yet. This starts again:", f"  {self.start_command()}"]


def is_gone(name: str) -> bool:
    """True if the name of a model is an absolute path that does not exist."""
    path = Path(name).expanduser()
    return path.is_absolute() and not path.exists()


def circuit_folders(run: Path, n_circuits: int) -> list[Path]:
    """Folders of the circuits of a run: the run itself for one, `front/N` for several."""
    return [run] if n_circuits == 1 else [run / FRONT / str(number) for number in range(n_circuits)]


def output_root(option: str, text: str) -> Path:
    """Resolve the folder that is to hold runs, and check that folders can be created in it.

    Args:
        option: name of the option, for messages.
        text: path as the user gave it; `~` is the home directory.

    Raises:
        ConfigurationError: it is not a local folder, a broken link or a file is in the way, or its parent is not
            writable.
    """
    if _SCHEME.match(text):
        raise ConfigurationError(f"{option} is {text!r}; runs are written to local folders only. Give a path.")
    check_writable(option, text, Path(text).expanduser())
    return Path(text).expanduser()


def check_experiment(name: str) -> None:
    """Check that the name of an experiment denotes a folder inside the root of all runs.

    Raises:
        ConfigurationError: the name is empty or absolute, or leads out of the root.
    """
    if ".." in Path(name).parts or Path(name).is_absolute() or not name:
        raise ConfigurationError(
            f"experiment is {name!r}; expected a name, which becomes a folder below the root of all runs."
        )


def check_writable(option: str, text: str, folder: Path) -> None:
    """Check that a folder can be created, and folders inside it; see `output_root`."""
    absolute = folder.absolute()
    above = next(parent for parent in (absolute, *absolute.parents) if os.path.lexists(parent))
    if above.is_symlink() and not above.exists():
        raise ConfigurationError(
            f"{option} is {text!r}, but {above} is a link to {above.readlink()}, which is missing."
        )
    if not above.is_dir():
        raise ConfigurationError(f"{option} is {text!r}, but {above} is a file, not a folder.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigurationError(f"{option} is {text!r}, but the folder {above} is not writable.")


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML configuration.

    Raises:
        ConfigurationError: the file is missing, or is not a YAML mapping.
    """
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, _UniqueKeys)  # noqa: S506 (it constructs only plain values)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as problem:
        how = "cannot be read" if isinstance(problem, OSError) else "cannot be read as YAML"
        raise ConfigurationError(f"The configuration {path} {how}: {' '.join(str(problem).split())}") from problem
    if content is None:
        raise ConfigurationError(f"The configuration {path} is empty; expected named options.")
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"The configuration {path} holds a {type(content).__name__}; expected named options (experiment: name)."
        )
    return content


class _UniqueKeys(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys of a mapping; PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1 and key.value != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} occurs twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _not_a_run(text: str, folder: Path) -> str:
    if folder.is_file():
        return f"--run is {text!r}, which is a file. Give the folder of the run, {str(folder.parent)!r}?"
    above: Sequence[Path] = [part.parent for part in (folder, folder.parent) if part.name == FRONT]
    if folder.is_dir() and any((run / CONFIG_FILE).is_file() for run in above):
        return (
            f"--run is {text!r}, in a run that has trained several circuits side by side. `test` and `validate` take "
            "the run itself and report all of them, and so does `compare`; other studies take one, <run>/front/<N>."
        )
    state = f"has no {CONFIG_FILE}" if folder.is_dir() else "does not exist"
    near = sorted({*folder.glob(f"*/{CONFIG_FILE}"), *folder.parent.glob(f"*/{CONFIG_FILE}")})[:5]
    hint = f" Runs nearby: {', '.join(str(path.parent) for path in near)}." if near else ""
    return (
        f"--run is {text!r}, a folder that {state}.\nExpected the run folder that `oa-train fit` made, "
        f"runs/<experiment>/version_<N>.{hint}"
    )
