"""Writes the hand-written models, each into a folder with its tokenizer, its edges and a model card.

    python -m oa_train.zoo.known --output checkpoints/known

Nothing is trained, so it takes seconds.
"""

from functools import partial
from pathlib import Path

from oa_train.zoo.known.registry import KNOWN_MODELS, write_known
from oa_train.zoo.making import make_from_command_line


def build(output: Path, seed: int = 0) -> dict[str, float]:
    """Write each model into a folder of its own in `output`; returns their numbers of edges."""
    return {f"edges of {name}": len(write_known(name, output / name, seed).edges) for name in KNOWN_MODELS}


main = partial(make_from_command_line, "known", __doc__, build)

if __name__ == "__main__":
    main()
