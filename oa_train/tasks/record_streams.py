"""Splitting records into streams."""

from collections import defaultdict
from collections.abc import Sequence
from typing import get_args

from oa_train.errors import TaskError
from oa_train.seeds import derive_seed
from oa_train.tasks.record_reading import Record
from oa_train.tasks.task import Prompt, Stream, stream_of

# Streams that few prompts are cut into, with the fewest of each: two have a standard error.
LEAST: dict[Stream, int] = {"train": 1, "validation": 2, "test": 2}

# Fewer prompts cannot be split.
FEWEST = 20

# From this many prompts on the streams are disjoint (see `stream_of`); the smallest then have about 200.
MANY = 2000

# With fewer prompts, the shares of test and of validation; train, refit and means share the rest.
TEST_SHARE = VALIDATION_SHARE = 0.2


def cut_into_streams(records: Sequence[Record], source: str) -> dict[Stream, list[Prompt]]:
    """The prompts of each stream, in hash order, so that the first N are a fair sample."""
    named = [record for record in records if record.split is not None]
    if named and len(named) < len(records):
        bare = next(record for record in records if record.split is None)
        raise TaskError(f"{source}, {bare.place}: no `split`, and {len(named)} of {len(records)} rows have one.")
    parts = _named_streams(records) if named else _cut_streams(records, source)
    for stream, least in LEAST.items():
        if len(parts.get(stream, ())) < least:
            sizes = ", ".join(f"{len(rows)} {name}" for name, rows in parts.items()) or "none"
            raise TaskError(
                f"{source} has {sizes} prompts; expected at least {least} of {stream}. Add prompts, or a "
                "column `split` with train, validation and test."
            )
    ordered = {
        stream: [record.prompt for record in sorted(rows, key=lambda record: derive_seed("order", record.prompt.text))]
        for stream, rows in parts.items()
    }
    return {stream: ordered.get(stream, ordered["train"]) for stream in get_args(Stream)}


def _named_streams(records: Sequence[Record]) -> dict[Stream, list[Record]]:
    parts: dict[Stream, list[Record]] = defaultdict(list)
    for record in records:
        if record.split is not None:
            parts[record.split].append(record)
    return parts


def _cut_streams(records: Sequence[Record], source: str) -> dict[Stream, list[Record]]:
    if len(records) < FEWEST:
        raise TaskError(
            f"{source} has {len(records)} prompts; expected at least {FEWEST}, for training and "
            "testing on different ones. Add prompts, or a column `split` with train, validation and test."
        )
    parts: dict[Stream, list[Record]] = defaultdict(list)
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.group].append(record)
    if len(groups) >= MANY:
        for name, members in groups.items():
            parts[stream_of(name)] += members
        return parts
    before = 0
    for name in sorted(groups, key=lambda name: derive_seed("stream", name)):
        # The middle of a group determines its stream, so that large groups do not all end up on one side.
        middle = (before + len(groups[name]) / 2) / len(records)
        stream: Stream = "train"
        if middle < TEST_SHARE:
            stream = "test"
        elif middle < TEST_SHARE + VALIDATION_SHARE:
            stream = "validation"
        parts[stream] += groups[name]
        before += len(groups[name])
    return parts
