"""Writes the hand-written models, each into a folder with its tokenizer, its edges and a model card.

    python -m oa_train.zoo.known --output checkpoints/known

Nothing is trained, so it takes seconds.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from oa_train.zoo.known.registry import KNOWN_MODELS, write_known

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write all models from the command line."""
    parser = argparse.ArgumentParser(prog="python -m oa_train.zoo.known", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder in which each model gets its own folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of the distractors")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in KNOWN_MODELS:
        known = write_known(name, options.output / name, options.seed)
        log.info("%s: %d edges", options.output / name, len(known.edges))


if __name__ == "__main__":
    main()
