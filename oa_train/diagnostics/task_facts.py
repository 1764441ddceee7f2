"""Facts about the prompts of a task: the sizes of its streams, and the clean model's results on them."""

import statistics
from collections.abc import Mapping
from typing import Any, get_args

from oa_train.ablations.clean_ability import Ability
from oa_train.tasks.file_formats import shorten
from oa_train.tasks.task import Stream, Task

# Number of prompts read from a stream whose prompts are drawn without end.
DRAWN = 512


def stream_rows(task: Task) -> list[dict[str, Any]]:
    """A row for each stream: its numbers of prompts, distinct texts and used prompts, and their lengths in tokens."""
    rows = []
    texts_of = {stream: _texts(task, stream) for stream in get_args(Stream)}
    used = {"validation": task.n_validation, "test": task.n_test, "means": task.n_means}
    for stream, texts in texts_of.items():
        size = task.size(stream)
        lengths = task.lengths(stream, DRAWN if size is None else size)
        row: dict[str, Any] = {
            "stream": f"{stream} (as train)" if stream != "train" and texts == texts_of["train"] else stream
        }
        row["prompts"] = "drawn" if size is None else size
        row["distinct texts"] = f"{len(texts)} of {DRAWN}" if size is None else len(texts)
        row["used"] = used.get(stream, "all" if size is None else "repeatedly")
        row["tokens"] = f"{min(lengths)} to {max(lengths)}, median {statistics.median(lengths):g}"
        rows.append(row)
    return rows


def ability_rows(abilities: Mapping[Stream, Ability]) -> list[dict[str, Any]]:
    """The clean model's accuracy and logit difference on each stream."""
    rows = []
    for stream, ability in abilities.items():
        row: dict[str, Any] = {"stream": stream, "prompts": len(ability.top)}
        row |= {name.replace("_", " "): str(value) for name, value in ability.estimates.items()}
        if ability.has_distractors:
            row["answer before wrong ones"] = f"{ability.preferred:.0%}"
        rows.append(row)
    return rows


def wrong_rows(task: Task, abilities: Mapping[Stream, Ability]) -> list[dict[str, Any]]:
    """Rows of prompts that the clean model gets wrong, in ascending order of logit difference."""
    wrong = []
    for stream, ability in abilities.items():
        columns = (ability.accuracy, ability.logit_difference, ability.top)
        for number, (accuracy, difference, top) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            if accuracy < 1:
                prompt = task.prompt(stream, number)
                row = {
                    "where": task.place(stream, number) or f"{stream} {number}",
                    "prompt": shorten(prompt.text, 70),
                    "answer": repr(prompt.answers[0]),
                    "predicted": repr(task.tokenizer.decode([top])),
                    "logit difference": f"{difference:.2f}",
                }
                wrong.append((difference, row))
    return [row for _, row in sorted(wrong, key=lambda pair: pair[0])]


def _texts(task: Task, stream: Stream) -> set[str]:
    size = task.size(stream)
    return {task.prompt(stream, number).text for number in range(DRAWN if size is None else size)}
