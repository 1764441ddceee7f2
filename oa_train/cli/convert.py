"""`oa-train convert`: converts a circuit or constants from layout 1 to the current one."""

from collections.abc import Sequence
from pathlib import Path

from oa_train.ablations.old_layout import convert
from oa_train.cli.output import console
from oa_train.cli.parser import ExplainingParser


def convert_command(argv: Sequence[str]) -> Path:
    """Convert a folder, and say where the new one is."""
    parser = ExplainingParser(
        prog="oa-train convert",
        description="Convert a circuit or constants of layout 1 to the current one; the old folder is left unchanged.",
    )
    parser.add_argument("old", type=str, help="folder of a circuit or constants")
    parser.add_argument("new", type=str, help="folder to make")
    options = parser.parse_args(list(argv))
    written = convert(Path(options.old).expanduser(), Path(options.new).expanduser())
    console.print(f"converted: {written}", soft_wrap=True)
    return written
