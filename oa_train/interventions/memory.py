"""How much memory a training step of a node circuit takes, found without weights.

The step is carried out on tensors that have shapes and no content, and the bytes of those that live at one time are
counted. So the figure is that of Hugging Face's own code, whatever the family keeps for its backward pass, and no
formula has to follow it.
"""

import copy
import weakref
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oa_train.ablations.constants import Constants
from oa_train.batches import Batch, unanswered
from oa_train.interventions.base import scored_logits
from oa_train.interventions.nodes import node_taps, spread_mask
from oa_train.metrics.divergence import kl_divergence
from oa_train.models.components import Components
from oa_train.models.families import Dimensions
from oa_train.models.loading import CausalLM
from oa_train.shapes import Tensor


@dataclass(frozen=True)
class StepMemory:
    """Bytes that live at the peak of a training step; the parts sum to it.

    What a device takes beside tensors is not in it: the libraries themselves, work space of matrix products, and
    what an allocator rounds up.

    Attributes:
        weights: the frozen model's parameters and buffers.
        trained: masks and pooled constants, their gradients and Adam's two moments.
        replacements: masks and constants laid out for every row and position.
        activations: what the masked run keeps for the backward pass.
        logits: logits of the clean and the masked run, and what their divergence keeps.
        passing: made and dropped on the way, at the worst moment.
    """

    weights: int
    trained: int
    replacements: int
    activations: int
    logits: int
    passing: int

    @property
    def total(self) -> int:
        """All parts."""
        return sum(asdict(self).values())


def node_step_memory(model: CausalLM, batch_size: int, n_tokens: int, samples_per_prompt: int) -> StepMemory:
    """Find what a training step of a circuit with pooled constants takes.

    Args:
        model: a model on the meta device, as `empty_model` makes it; it stays as it is.
        batch_size: prompts in a batch.
        n_tokens: tokens of every prompt.
        samples_per_prompt: mask samples drawn for each prompt.
    """
    shapes: Any = copy.deepcopy(model)
    shapes.config.pad_token_id = None  # else transformers looks for it among the tokens, to warn
    tokens = torch.zeros(batch_size, n_tokens, dtype=torch.long)
    batch = unanswered(tokens, torch.ones_like(tokens, dtype=torch.bool))
    # Nobody can ask tensors on the meta device for a value, as some models' code does; fakes of the CPU may be asked.
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        standing = shapes.to_empty(device="cpu")
        standing.tie_weights()
        live.peak = live.now  # weights that are tied stood twice until now
        return _step(standing, batch, samples_per_prompt, live)


def _step(model: CausalLM, batch: Batch, samples_per_prompt: int, live: "LiveBytes") -> StepMemory:
    """Do what `training.circuits` does in a step, and note after each part how much lives."""
    weights = live.now
    sizes = Dimensions.of(model.config)
    mask, constants, optimiser = _trained(sizes)
    trained = live.now
    with torch.no_grad():
        clean = scored_logits(model, batch)
    clean_bytes = live.now - trained
    rows = batch.repeat(samples_per_prompt)
    spread = spread_mask(mask.expand(len(rows), -1), torch.zeros_like(rows.attention_mask))
    taps = node_taps(model, spread, constants.replacements(rows))
    laid_out = live.now
    logits = scored_logits(model, rows, taps)
    ran = live.now
    loss = kl_divergence(torch.cat([clean] * samples_per_prompt), logits).mean()
    compared = live.now
    loss.backward()
    del optimiser
    return StepMemory(
        weights=weights,
        trained=trained - weights,
        replacements=laid_out - trained - clean_bytes,
        activations=ran - laid_out - logits.nbytes,
        logits=clean_bytes + logits.nbytes + compared - ran,
        passing=live.peak - compared,
    )


def _trained(sizes: Dimensions) -> tuple[Tensor, Constants, list[Tensor]]:
    """A mask and constants with their gradients, and Adam's moments."""
    mask = torch.ones(len(Components.of(sizes)), requires_grad=True)
    zeros = Constants.zeros(sizes)
    constants = replace(zeros, heads=zeros.heads.requires_grad_(), mlps=zeros.mlps.requires_grad_())
    moments = []
    for leaf in (mask, constants.heads, constants.mlps):
        leaf.grad = torch.zeros_like(leaf)
        moments += [torch.zeros_like(leaf), torch.zeros_like(leaf)]
    return mask, constants, moments


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside the context and still live, each storage once.

    Attributes:
        now: bytes that live.
        peak: most bytes that ever lived at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        before = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if _is_tensor(tensor)}
        for tensor in filter(_is_tensor, tree_leaves(made)):
            storage = tensor.untyped_storage()
            # A view or an in-place result of something older than the context is not made here.
            if storage._cdata not in before and storage._cdata not in self._known:
                self._add(storage)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
