"""Tasks with a finite number of prompts: training repeats them in another order, evaluation repeats none."""

from collections.abc import Mapping, Sized
from typing import Any

from oa_train.errors import TaskError
from oa_train.seeds import python_generator
from oa_train.tasks.task import Stream, Task

# Fewer prompts leave wide intervals: at 100 the standard error of an accuracy of 0.8 is 0.04.
WIDE_BELOW = 100


class FiniteTask(Task):
    """Task whose streams are finite.

    Attributes:
        streams: the prompts of each stream in order, or their numbers; set before `cap_sizes`.
        source: name of the source of the prompts, for messages.
    """

    streams: Mapping[Stream, Sized]
    source: str

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._order: dict[tuple[Stream, int], list[int]] = {}

    def size(self, stream: Stream) -> int | None:
        """Number of prompts of a stream."""
        return len(self.streams[stream])

    def cap_sizes(self) -> None:
        """Cap evaluation sizes at the number of prompts, and add remarks on small ones."""
        options: dict[str, Stream] = {"n_validation": "validation", "n_test": "test", "n_means": "means"}
        for option, stream in options.items():
            size = len(self.streams[stream])
            if getattr(self, option) > size:
                setattr(self, option, size)
                if size < WIDE_BELOW and stream != "means":
                    self.remarks.append(
                        f"{option} is {size}, all that there are: the intervals of {stream} metrics are wide."
                    )
        if self.streams["train"] is self.streams["refit"]:
            self.remarks.append(
                f"train, refit and means share {len(self.streams['train'])} prompts, which training repeats; "
                "no validation or test prompt is among them."
            )

    def place_of(self, stream: Stream, index: int) -> int:
        """Position in its stream of prompt number `index`; train and refit start over at the end, in another order.

        Raises:
            TaskError: a stream that is not trained on has no prompt with this number.
        """
        size = len(self.streams[stream])
        if stream not in ("train", "refit"):
            if index >= size:
                raise TaskError(f"{self.source} has {size} prompts in the stream {stream!r}, none {index}.")
            return index
        epoch, place = divmod(index, size)
        if (stream, epoch) not in self._order:
            order = list(range(size))
            python_generator(self.seed, self.name, stream, epoch).shuffle(order)
            # A batch spans two epochs at most.
            self._order = {key: kept for key, kept in self._order.items() if key[0] != stream or key[1] == epoch - 1}
            self._order[stream, epoch] = order
        return self._order[stream, epoch][place]
