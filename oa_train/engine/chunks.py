"""Splitting runs of several circuits on several prompts into pieces that fit in memory."""

from collections.abc import Iterator, Sequence

from torch.distributed.fsdp import FSDPModule

from oa_train.batches import Batch
from oa_train.engine.levels import ENGINES
from oa_train.models.frozen import CausalLM
from oa_train.models.levels import Level
from oa_train.shapes import Bool, Float, Tensor

# Default number of rows of one model run: enough to keep a processor busy, and their activations fit in memory.
ROWS_PER_RUN = 128

# Most bytes of activations in one run, by the estimate `Engine.row_bytes`; larger runs are split.
RUN_BYTES = 2**30


def chunks(
    model: CausalLM,
    level: Level,
    batch: Batch,
    masks: Bool[Tensor, "circuit entry"] | Float[Tensor, "circuit entry"],
    rows_per_run: int = ROWS_PER_RUN,
    gradients: bool = False,
) -> Iterator[tuple[Batch, list[slice]]]:
    """Pieces of a batch, each with slices of the circuits; the circuits of a slice run on the piece together.

    A run has at most `rows_per_run` rows, circuits times prompts, and `RUN_BYTES` of activations; `gradients` is True
    if a backward pass follows. `masks` is as in `copies_logits`.
    Prompts are split first: circuits on the same prompts share their clean prefix, and a run of few circuits would
    not amortise its cost. With a sharded model only circuits are split, and the memory limit is ignored: every process
    must run the model the same number of times, though their batches may differ by a prompt or in length.
    """
    n_circuits = len(masks)
    if isinstance(model, FSDPModule):
        at_once = max(1, rows_per_run // len(batch))
        yield batch, [slice(first, min(first + at_once, n_circuits)) for first in range(0, n_circuits, at_once)]
        return
    row_bytes = ENGINES[type(level)].row_bytes(model, batch, level, masks, gradients)
    n_prompts = min(rows_per_run // max(1, n_circuits), RUN_BYTES // max(1, sum(row_bytes)))
    for piece in batch.pieces(max(1, n_prompts)):
        most_circuits = max(1, rows_per_run // len(piece))
        yield piece, list(_slices(row_bytes, RUN_BYTES // len(piece), most_circuits))


def _slices(sizes: Sequence[int], most_bytes: int, most_circuits: int) -> Iterator[slice]:
    """Slices of as many circuits as possible, at least one, which together take at most `most_bytes`."""
    first = taken = 0
    for circuit, size in enumerate(sizes):
        if circuit > first and (circuit - first == most_circuits or taken + size > most_bytes):
            yield slice(first, circuit)
            first, taken = circuit, 0
        taken += size
    if sizes:
        yield slice(first, len(sizes))
