"""`oa-train runs`: a table of runs; quick, because it does not import torch."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from oa_train.cli.output import console, print_table
from oa_train.errors import ConfigurationError, nearest_names
from oa_train.studies.run_list import list_runs


def runs(words: Sequence[str]) -> list[dict[str, str]]:
    """Print a table of the runs, with the latest last; returns its rows."""
    parser = argparse.ArgumentParser(
        prog="oa-train runs", description="List runs with size, KL divergence and accuracy.", exit_on_error=False
    )
    parser.add_argument("--output", default="runs", help="folder that holds the runs (default: runs)")
    try:
        chosen, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as problem:
        raise ConfigurationError("--output needs a value.") from problem
    if rest:
        raise ConfigurationError(f"There is no option {rest[0]}. {nearest_names(rest[0], ['--output', '--help'])}")
    root = Path(chosen.output).expanduser()
    if not root.is_dir():
        raise ConfigurationError(f"--output is {chosen.output!r}; expected a folder that holds runs.")
    rows = list_runs(root)
    if rows:
        print_table(f"runs in {root}", rows)
    else:
        console.print(f"There are no runs in {root}.")
    return rows
