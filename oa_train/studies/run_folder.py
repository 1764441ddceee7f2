"""Run folders: their creation and content, and the commands that resume runs.

<root>/<experiment>/version_<N>/
    config.yaml  run.log  checkpoints/{best,last}.ckpt
    circuit/ constants/             of one circuit
    front/<N>/{circuit,constants}/  of several
    lens/ or tracing/               of lenses, or of the constants of causal tracing
    studies/<name>_<K>/             circuit/ constants/ as well, where a study found a circuit
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
    from oa_train.ablations.trained import TrainedCircuit
    from oa_train.models.spec import LMSpec

CONFIG_FILE = "config.yaml"
# Inside the folder of a study: what a resumable one has done.
PIECES = "pieces"
FRONT = "front"
STUDIES = "studies"
VERSION = "version"

# Model options that are taken from a run folder; `trust_remote_code` never is.
_KEPT_OF_LM = (
    *("name", "revision", "gguf_file", "adapter", "dtype", "quantization", "attn_implementation", "bos"),
    "local_files_only",
)

_SCHEME = re.compile(r"[a-zA-Z][\w+.-]+://")


@dataclass(frozen=True)
class RunFolder:
    """Folder of a run, or of one of its circuits: `RUN/front/N`, or `RUN/studies/<name>_<K>` if a study wrote one."""

    path: Path

    @classmethod
    def create(cls, root: Path, experiment: str) -> "RunFolder":
        """Claim the next version of an experiment, a folder in the root; no two processes get the same one.

        Raises:
            RunError: the folder cannot be made.
        """
        return cls(make_next_folder(root / experiment, VERSION))

    @classmethod
    def find(cls, text: str, *, whole: bool = False) -> "RunFolder":
        """The folder that a user named, of a run or, unless only a `whole` run will do, of one of its circuits.

        Raises:
            ArtefactError: it is not a run; runs nearby are listed.
        """
        folder = cls(Path(text).expanduser())
        if folder.path.is_dir() and folder.config_path.is_file() and (folder.run == folder.path or not whole):
            return folder
        raise ArtefactError(_not_a_run(text, folder.path))

    @property
    def run(self) -> Path:
        """The run: RUN of RUN/front/N or RUN/studies/<name>_<K>, else the folder itself."""
        of_a_study = self.path.parent.name == STUDIES and (self.path / "circuit").is_dir()
        is_part = (self.path.parent.name == FRONT or of_a_study) and not (self.path / CONFIG_FILE).exists()
        return RunFolder(self.path.parent.parent).run if is_part else self.path

    @property
    def is_of_a_study(self) -> bool:
        """True if a study made the run folder, which has no circuit."""
        return not (self.path / "circuit").exists() and "model" not in self.config()

    @property
    def config_path(self) -> Path:
        """Configuration of the run."""
        return self.run / CONFIG_FILE

    @property
    def version(self) -> int:
        """Number of the version; 0 for a folder of another name."""
        number = self.path.name.removeprefix(f"{VERSION}_")
        return int(number) if number.isdecimal() else 0

    def checkpoint(self, name: str) -> Path:
        """Path of `best` or `last`."""
        return self.run / "checkpoints" / f"{name}.ckpt"

    def config(self) -> dict[str, Any]:
        """Configuration of the run.

        Raises:
            ConfigurationError: it cannot be read, or names another file.
        """
        content = read_config(self.config_path)
        if "config" in content:
            raise ConfigurationError(
                f"{self.config_path} names another configuration file, as no run folder of `oa-train fit` does."
            )
        return content

    def lm(self, name: str | None = None) -> "LMSpec":
        """The model of the run, without leave to run code of its own.

        Args:
            name: where the model is now, if it has moved; a copy of the same weights will do. Without it, a folder
                that is gone is looked for by the fingerprint of its weights (see `models.moved`), which is warned of.

        Raises:
            ArtefactError: it is not where it was, and was not found; the message says where it was looked for.
        """
        from oa_train.models.spec import LMSpec
        from oa_train.studies.run_model import located

        stored = {key: value for key, value in dict(self.config().get("lm") or {}).items() if key in _KEPT_OF_LM}
        spec = LMSpec(**stored)
        if name is not None:
            return replace(spec, name=name)
        return located(self, spec) if is_gone(spec.name) else spec

    def save_config(self, config: dict[str, Any]) -> None:
        """Write the configuration."""
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
            ArtefactError: there is none; the message says why.
        """
        from oa_train.ablations.trained import TrainedCircuit  # torch, which help and refusals do without

        try:
            return TrainedCircuit.load(self.path)
        except ArtefactError as problem:
            raise ArtefactError(self._why_no_circuit(problem)) from problem

    def _why_no_circuit(self, problem: ArtefactError) -> str:
        if not (self.path / "circuit").exists() and (self.path / "constants").is_dir():
            return (
                f"{self.path} holds constants of components that were ablated alone, and no circuit.\nGive runs that "
                "trained a circuit, or constants for one (`circuit` or `keep` of ConstantsModule)."
            )
        for folder, content, command in (
            ("lens", "lenses", "compare_lenses"),
            ("tracing", "constants of causal tracing", "trace"),
        ):
            if (self.path / folder).is_dir():
                return f"{self.path} holds {content}, and no circuit: oa-train {command} --run {self.path}"
        if len(circuits := self.circuits()) > 1:
            choices = f"{self.path / FRONT}/N, N being {', '.join(part.path.name for part in circuits)}"
            return f"{self.path} holds several circuits. Give one of them: {choices}."
        return (
            f"{problem}\nThe run was not finished, or was damaged since. This finishes it, in a new version:\n"
            f"  {self.resume_command(self.last_state())}"
        )

    def last_state(self) -> Path | None:
        """The latest checkpoint: `last.ckpt`, or `best.ckpt` if `last.ckpt` was deleted; None without either."""
        return next((path for path in map(self.checkpoint, ("last", "best")) if path.is_file()), None)

    def resume_command(self, checkpoint: Path | None = None) -> str:
        """The command that resumes the run at a checkpoint, `last.ckpt` by default, or finishes it; for a shell."""
        return f"{self.start_command()} --ckpt_path {shlex.quote(str(checkpoint or self.checkpoint('last')))}"

    def start_command(self) -> str:
        """The command that runs the configuration again from its beginning."""
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
            exactness = "but not exactly as it would have: the averages of StochasticWeightAveraging begin anew:"
            return [
                f"This resumes from {kept}, in a new version of the run, {exactness}",
                f"  {self.resume_command(kept)}",
            ]
        if kept is not None:
            sentence = f"Nothing up to {kept} is lost. This resumes from there, in a new version of the run:"
            return [sentence, f"  {self.resume_command(kept)}"]
        return ["No checkpoint had been written yet. This starts again:", f"  {self.start_command()}"]


def is_gone(name: str) -> bool:
    """True if the name of a model is the path of one that does not exist."""
    path = Path(name).expanduser()
    return path.is_absolute() and not path.exists()


def circuit_folders(run: Path, n_circuits: int) -> list[Path]:
    """Folders of the circuits of a run: the run itself for one, `front/N` for several."""
    return [run] if n_circuits == 1 else [run / FRONT / str(number) for number in range(n_circuits)]


def output_root(option: str, text: str) -> Path:
    """Resolve the folder that is to hold runs, and check that folders can be made in it.

    Args:
        option: its name, for messages.
        text: as the user gave it; `~` is the home directory.

    Raises:
        ConfigurationError: it is not a local folder, a broken link or a file is in the way, or its parent is not
            writable.
    """
    if _SCHEME.match(text):
        raise ConfigurationError(f"{option} is {text!r}; runs are written to local folders only. Give a path.")
    check_writable(option, text, Path(text).expanduser())
    return Path(text).expanduser()


def check_experiment(name: str) -> None:
    """Check that the name of an experiment makes a folder inside the root.

    Raises:
        ConfigurationError: it is empty, absolute or leads out of the root.
    """
    if ".." in Path(name).parts or Path(name).is_absolute() or not name:
        raise ConfigurationError(
            f"experiment is {name!r}; expected a name, which becomes a folder below the root of all runs."
        )


def check_writable(option: str, text: str, folder: Path) -> None:
    """Check that a folder can be made, and folders in it; see `output_root`."""
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
        ConfigurationError: the file is missing, or is no YAML mapping.
    """
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, _UniqueKeys)  # noqa: S506 (it makes nothing but plain values)
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
    """Refuses duplicate keys of a mapping; YAML itself would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1 and key.value != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands here twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _not_a_run(text: str, folder: Path) -> str:
    if folder.is_file():
        return f"--run is {text!r}, which is a file. Give the folder of the run, {str(folder.parent)!r}?"
    above: Sequence[Path] = [part.parent for part in (folder, folder.parent) if part.name == FRONT]
    if folder.is_dir() and any((run / CONFIG_FILE).is_file() for run in above):
        return (
            f"--run is {text!r}, of a run that has trained several circuits side by side. `test` and `validate` take "
            "the run itself and report all of them, and so does `compare`; other studies take one, <run>/front/<N>."
        )
    state = f"has no {CONFIG_FILE}" if folder.is_dir() else "does not exist"
    near = sorted({*folder.glob(f"*/{CONFIG_FILE}"), *folder.parent.glob(f"*/{CONFIG_FILE}")})[:5]
    hint = f" Runs nearby: {', '.join(str(path.parent) for path in near)}." if near else ""
    return (
        f"--run is {text!r}, a folder that {state}.\nExpected the run folder that `oa-train fit` made, "
        f"runs/<experiment>/version_<N>.{hint}"
    )
