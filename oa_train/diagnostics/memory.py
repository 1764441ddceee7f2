"""Memory of a training step of a node circuit, measured without weights.

The step runs on fake tensors while the bytes of live tensors are counted. The result therefore holds for Hugging
Face's own code, whatever a family keeps for its backward pass.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from oa_train.ablations.constants import Constants, TrainableConstants
from oa_train.batches import Batch, unanswered
from oa_train.diagnostics.live_bytes import LiveBytes
from oa_train.engine.forward import scored_logits
from oa_train.engine.nodes import node_taps
from oa_train.errors import RunError
from oa_train.metrics.divergence import kl_divergence
from oa_train.models.frozen import CausalLM
from oa_train.models.selection import Nodes
from oa_train.models.sharding import shard
from oa_train.shapes import Tensor

Strategy = Literal["auto", "ddp", "fsdp"]


@dataclass(frozen=True)
class StepSettings:
    """Settings of a training step on which its memory depends.

    Attributes:
        batch_size: number of prompts in a batch of one process.
        n_tokens: number of tokens of every prompt.
        samples_per_prompt: number of mask samples for each prompt.
        autocast: whether the model's operations run in half precision, as under `bf16-mixed` and `16-mixed`.
        recompute: whether the blocks use activation checkpointing.
        strategy: `auto` for one process, `ddp`, or `fsdp`, which shards the model's weights across processes.
        n_processes: number of processes.
    """

    batch_size: int
    n_tokens: int
    samples_per_prompt: int
    autocast: bool = False
    recompute: bool = False
    strategy: Strategy = "auto"
    n_processes: int = 1


@dataclass(frozen=True)
class StepMemory:
    """Peak memory of tensors in a training step, in bytes, split by purpose.

    A device also needs memory for the libraries themselves, workspaces of matrix products, and the allocator's
    overhead.

    Attributes:
        weights: the frozen model's parameters and buffers, or the process's share of them.
        gathered: gathered weights that a sharded model keeps after a run: those outside the blocks. (Blocks are
            gathered one at a time and freed again.)
        trained: masks and pooled constants, their gradients and Adam's two moments.
        replacements: masks, and constants that differ by position, for every row and position.
        activations: tensors that the masked run keeps for the backward pass.
        logits: logits of the clean and the masked run, and what their divergence keeps.
        passing: temporary tensors at the peak.
    """

    weights: int
    gathered: int
    trained: int
    replacements: int
    activations: int
    logits: int
    passing: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(asdict(self).values())


def node_step_memory(model: CausalLM, settings: StepSettings) -> StepMemory:
    """Memory of a training step of a node circuit with pooled constants, in each process.

    Args:
        model: model on the meta device, from `empty_model`; it is not changed.
        settings: settings of the step.

    Raises:
        RunError: the strategy is `fsdp` and a process group is already initialised.
    """
    shapes: Any = copy.deepcopy(model)
    shapes.config.pad_token_id = None  # otherwise transformers searches the tokens, which have no values, for it
    tokens = torch.zeros(settings.batch_size, settings.n_tokens, dtype=torch.long)
    batch = unanswered(tokens, torch.ones_like(tokens, dtype=torch.bool))
    shared = settings.strategy == "fsdp"
    processes = _fake_processes(settings.n_processes) if shared else nullcontext()
    # Fake CPU tensors rather than meta tensors, because the code of some models reads a tensor's value.
    with processes as mesh, FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        standing = shapes.to_empty(device="cpu")
        standing.tie_weights()
        if mesh is not None:
            shard(standing, mesh)
        live.peak = live.now  # up to here, tied or sharded weights existed twice
        return _step(standing, batch, settings, live)


@contextmanager
def _fake_processes(n_processes: int) -> Iterator[DeviceMesh]:
    """A mesh of which only this process exists: collectives return tensors of the right size, without content."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

    if distributed.is_initialized():
        raise RunError(
            "The memory of a sharded model cannot be measured inside a process group. Measure it in one process."
        )
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=n_processes)
    try:
        yield init_device_mesh("cpu", (n_processes,))
    finally:
        distributed.destroy_process_group()


def _step(model: CausalLM, batch: Batch, settings: StepSettings, live: LiveBytes) -> StepMemory:
    """Run a step as in `training.circuit_module`, measuring the live bytes after each part of it."""
    weights, copies = live.now, settings.samples_per_prompt
    nodes = Nodes.of(model.config)
    mask, constants, optimiser = _trained(nodes, in_buckets=settings.strategy == "ddp")
    trained = live.now
    # bfloat16 and float16 have the same size.
    with torch.autocast("cpu", torch.bfloat16) if settings.autocast else nullcontext():
        with torch.no_grad():
            clean = scored_logits(model, batch)
        after_clean = live.now
        rows = batch.repeat(copies)
        values = constants.sets()[0].replacements(rows)
        taps = node_taps(model, nodes, mask.expand(len(rows), -1), values, rows.layout)
        laid_out = live.now
        logits = scored_logits(model, rows, taps, settings.recompute)
        ran = live.now
        loss = kl_divergence(clean, logits.unflatten(0, (copies, -1))).mean()
        compared = live.now
    loss.backward()
    del optimiser
    return StepMemory(
        weights=weights,
        gathered=after_clean - trained - clean.nbytes,
        trained=trained - weights,
        replacements=laid_out - after_clean,
        activations=ran - laid_out - logits.nbytes,
        logits=clean.nbytes + logits.nbytes + compared - ran,
        passing=live.peak - compared,
    )


def _trained(nodes: Nodes, in_buckets: bool) -> tuple[Tensor, TrainableConstants, list[Tensor]]:
    """A mask and constants with gradients, and Adam's moments; with `in_buckets` also DDP's gradient buckets."""
    mask = torch.ones(len(nodes), requires_grad=True)
    constants = TrainableConstants([Constants.zeros(nodes)])
    moments = []
    for leaf in (mask, *constants.parameters()):
        leaf.grad = torch.zeros_like(leaf)
        moments += [torch.zeros_like(leaf) for _ in range(3 if in_buckets else 2)]
    return mask, constants, moments
