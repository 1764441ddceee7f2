"""Chunking of runs of several circuits on several prompts into pieces that fit into memory."""

import sys
from collections.abc import Iterator

from torch.distributed.fsdp import FSDPModule

from oa_train.batches import Batch
from oa_train.engine.levels import ENGINES
from oa_train.models.frozen import CausalLM
from oa_train.models.levels import Level

# Default rows of one model run: enough to keep a processor busy, few enough for the activations of a small model.
ROWS_PER_RUN = 128

# Most memory of one run beside the model's own activations; larger runs are split.
RUN_BYTES = 2**29


def chunks(
    model: CausalLM,
    level: Level,
    batch: Batch,
    n_circuits: int,
    rows_per_run: int = ROWS_PER_RUN,
    gradients: bool = False,
) -> Iterator[tuple[Batch, list[slice]]]:
    """Pieces of a batch, each with slices of the circuits; the circuits of a slice run on the piece together.

    A run has at most `rows_per_run` rows, circuits times prompts; `gradients` is True if a backward pass follows.
    Prompts are split first: circuits on the same prompts share their clean prefix, whose cost a run of few circuits
    would not recover. Of a sharded model circuits alone are split, and memory does not count: all processes have to
    run it equally often, though their batches may differ by a prompt or in length.
    """
    if isinstance(model, FSDPModule):
        at_once = max(1, rows_per_run // len(batch))
        yield batch, [slice(first, min(first + at_once, n_circuits)) for first in range(0, n_circuits, at_once)]
        return
    row_bytes = ENGINES[type(level)].row_bytes(model, batch, gradients)
    most_rows = min(rows_per_run, max(1, RUN_BYTES // row_bytes) if row_bytes else sys.maxsize)
    for piece in batch.pieces(max(1, most_rows // max(1, n_circuits))):
        at_once = max(1, most_rows // len(piece))
        yield piece, [slice(first, min(first + at_once, n_circuits)) for first in range(0, n_circuits, at_once)]
