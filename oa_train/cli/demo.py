"""`oa-train demo`: train, finish and compare a circuit on the built-in model."""

from collections.abc import Sequence
from pathlib import Path

from oa_train.cli.main import run_command
from oa_train.cli.output import console
from oa_train.cli.parser import ExplainingParser
from oa_train.errors import RunError
from oa_train.studies.run_folder import output_root
from oa_train.studies.study import Findings

EXPERIMENT = "circuit_nodes_tiny.yaml"


def demo(words: Sequence[str]) -> Path:
    """Run the demonstration; returns the run folder."""
    parser = ExplainingParser(
        prog="oa-train demo",
        description="Train a circuit for indirect object identification in the built-in model, and compare ablations.",
    )
    parser.add_argument("--output", type=str, default="runs", help="folder for the run")
    output = parser.parse_args(list(words)).output
    output_root("--output", output)
    console.print("1. Train masks and constants, then refit the constants (oa-train fit)", style="bold")
    run = run_command("fit", ["--config", str(experiment_file()), "--trainer.default_root_dir", output])
    assert isinstance(run, Path)
    console.print("\n2. Compare the learned constants with every other ablation (oa-train compare)", style="bold")
    compared = run_command("compare", ["--run", str(run)])
    assert isinstance(compared, Findings)
    assert compared.folder is not None
    console.print("\nWhere to look", style="bold")
    places = {
        "the circuit": run / "studies" / "fit_0" / "figures" / "circuit.png",
        "the comparison": compared.folder / "figures" / "comparison.png",
        "its numbers": compared.folder / "results.json",
        "curves": f"tensorboard --logdir {output}",
    }
    for name, place in places.items():
        console.print(f"  {name:<15} {place}", soft_wrap=True)
    return run


def experiment_file() -> Path:
    """The demonstration's configuration, in the wheel or in a source tree."""
    package = Path(__file__).parent.parent
    for folder in (package.parent / "configs", package / "_builtin" / "configs"):
        if (folder / EXPERIMENT).is_file():
            return folder / EXPERIMENT
    raise RunError(f"This installation lacks {EXPERIMENT}; install oa_train again.")
