"""What a hand-written model comes with."""

from dataclasses import dataclass

from oa_train.models.loading import CausalLM


@dataclass(frozen=True, eq=False)
class KnownModel:
    """A model whose weights were written by hand, so that what it computes, and by which edges, is known.

    Attributes:
        name: of the model, and of the task that it solves.
        model: frozen, float32.
        words: the tokens behind the special ones, in the order of their ids.
        edges: the edges by which the task is solved, as `source->reader`; which of them can be spared under a kind of
            ablation is computed (see `zoo.truth`).
        wiring: what the parts of the model do, by name, for people.
    """

    name: str
    model: CausalLM
    words: tuple[str, ...]
    edges: tuple[str, ...]
    wiring: dict[str, str]
