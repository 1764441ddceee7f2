"""`oa-train demo`: train, finish and compare a circuit on the built-in model."""

from collections.abc import Sequence
from pathlib import Path

from oa_train.cli.arguments import ExplainingParser, check_output
from oa_train.cli.comparing import compare_command
from oa_train.cli.fitting import fit
from oa_train.cli.output import console
from oa_train.errors import RunError

EXPERIMENT = "circuit_nodes_tiny.yaml"


def demo(argv: Sequence[str]) -> Path:
    """Run the demonstration; returns the run folder."""
    parser = ExplainingParser(
        prog="oa-train demo",
        description="Train a circuit for indirect object identification in the built-in model, and compare ablations.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=str, default="runs", help="folder that gets the run")
    options = parser.parse_args(list(argv))
    check_output("--output", options.output)
    console.print("[bold]1. Train masks and constants, then refit the constants[/bold] (oa-train fit)")
    run = fit(["--config", str(experiment_file()), "--trainer.default_root_dir", options.output])
    assert run is not None
    console.print("\n[bold]2. Compare the learned constants with every other ablation[/bold] (oa-train compare)")
    compared = compare_command(["--run", str(run)])
    console.print("\n[bold]Where to look[/bold]")
    places = {
        "the circuit": run / "studies" / "fit_0" / "figures" / "circuit.png",
        "the comparison": compared.folder / "figures" / "comparison.png",
        "its numbers": compared.folder / "results.json",
        "curves": f"tensorboard --logdir {options.output}",
    }
    for what, where in places.items():
        console.print(f"  {what:<15} {where}", soft_wrap=True)
    return run


def experiment_file() -> Path:
    """The demonstration's configuration, in the wheel or in a source tree.

    Raises:
        RunError: the installation lacks it.
    """
    package = Path(__file__).parent.parent
    for folder in (package.parent / "configs", package / "_builtin" / "configs"):
        if (folder / EXPERIMENT).is_file():
            return folder / EXPERIMENT
    raise RunError(f"This installation lacks {EXPERIMENT}; install oa_train again.")
