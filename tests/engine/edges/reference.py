"""The slow, obvious reference that the engine for edges is tested against.

The two share only the table of families and the order of edges. Here the input of every reader is summed source by
source, by the names of edges; the model's own norm and its whole projection are applied to it, and the reader's part
is picked from the result.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from oa_train.batches import Batch
from oa_train.diagnostics.reference import run_with_hooks
from oa_train.engine.values import Values
from oa_train.models.families import Family, check_config
from oa_train.models.frozen import CausalLM
from oa_train.models.graph import Graph
from oa_train.models.parts import Dimensions
from oa_train.models.sites import Site
from oa_train.shapes import Float, Tensor


def reference_edge_logits(
    model: CausalLM, batch: Batch, graph: Graph, mask: Float[Tensor, "row edge"], values: Values
) -> Float[Tensor, "row scored vocabulary"]:
    """Reference implementation of `engine.edges.run.run_edges`, in loops."""
    return run_with_hooks(model, batch, _Loops(model, batch, graph, mask, values).attach())


class _Loops:
    def __init__(self, model: CausalLM, batch: Batch, graph: Graph, mask: Tensor, values: Values) -> None:
        self.model, self.batch, self.graph = model, batch, graph
        self.constants = {site: values.at(site) for site in graph.sites}
        self.family: Family = check_config(model.config)
        self.sizes = Dimensions.of(model.config)
        self.blocks: Any = model.get_submodule(self.family.blocks)
        self.masks: dict[str, dict[str, Tensor]] = {name: {} for name in graph.readers}
        for keep, source, reader in zip(mask.T, graph.edge_sources, graph.edge_readers, strict=True):
            self.masks[graph.readers[reader]][graph.sources[source]] = keep
        # By source: [row, position, d_model].
        self.written: dict[str, Tensor] = {}
        self.replacements: dict[str, Tensor] = {}
        self.fixed: dict[str, Tensor] = {}  # the replacements without gradients
        self.biases: dict[int, Tensor] = {}
        self.streams: dict[int, Tensor] = {}

    def attach(self) -> list[Any]:
        handles = []
        for layer, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(self.enter(layer)))
            for index, path in enumerate(self.family.projections):
                hook = self.project(layer, index, len(self.family.projections))
                handles.append(block.get_submodule(path).register_forward_hook(hook))
            output = block.get_submodule(self.family.attention_output)
            handles.append(output.register_forward_pre_hook(self.write_heads(layer, block, output)))
            enters = block.get_submodule(self.family.mlp_input)
            handles.append(enters.register_forward_pre_hook(self.read_alone(f"m{layer}", layer)))
            handles.append(block.get_submodule(self.family.mlp).register_forward_hook(self.write_mlp(layer)))
        norm = self.model.get_submodule(self.family.final_norm)
        handles.append(norm.register_forward_pre_hook(self.read_alone("logits", self.sizes.n_layers)))
        return handles

    def enter(self, layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any) -> None:
            self.streams[layer] = args[0]
            if layer == 0:
                self.write_vector("input", args[0].view(*self.batch.tokens.shape, -1), Site("embedding"))

        return hook

    def reader_input(self, reader: str, layer: int, stream: Tensor) -> Tensor:
        """Sum of all that a reader reads, and the model's own stream at protected tokens."""
        total = torch.zeros_like(self.written["input"])
        for source, keep in self.masks[reader].items():
            rows = keep.view(-1, 1, 1)
            replacement = torch.where(rows < 0.001, self.replacements[source], self.fixed[source])
            total = total + rows * self.written[source] + (1 - rows) * replacement
        for written_in, bias in self.biases.items():
            # A layer's bias is read by those who read its heads.
            if f"a{written_in}.h0" in self.masks[reader]:
                total = total + bias
        for row, position in self.batch.protected.nonzero().tolist():
            protected = torch.zeros_like(total, dtype=torch.bool)
            protected[row, position] = True
            total = torch.where(protected, stream.view(total.shape), total)
        return total

    def project(self, layer: int, index: int, n_modules: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, _: Any, output: Tensor) -> Tensor:
            projected = output.clone()
            for reader in self.masks:
                part = self.part(reader, layer, index, n_modules)
                if part is not None:
                    read = self.normed(layer, self.reader_input(reader, layer, self.streams[layer]))
                    projected[..., part] = module.forward(read).view(output.shape)[..., part]
            return projected

        return hook

    def normed(self, layer: int, stream: Tensor) -> Tensor:
        if not self.family.attention_norm:
            return stream
        norm: Any = self.blocks[layer].get_submodule(self.family.attention_norm)
        read: Tensor = norm.forward(stream)
        return read

    def part(self, reader: str, layer: int, index: int, n_modules: int) -> slice | None:
        """Place of a reader in a projection's output; None when it is not in it."""
        if not reader.startswith(f"a{layer}."):
            return None
        kind, number = "qkv".index(reader[-2]), int(reader.partition(".")[2][1:-3])
        width, heads, groups = self.sizes.d_head, self.graph.n_heads, self.graph.n_kv_heads
        if n_modules == 3:
            return slice(number * width, (number + 1) * width) if kind == index else None
        first = 3 * number + kind if self.family.interleaved else (0, heads, heads + groups)[kind] + number
        return slice(first * width, (first + 1) * width)

    def read_alone(self, reader: str, layer: int) -> Callable[..., tuple[Tensor, ...]]:
        def hook(_: nn.Module, args: Any) -> tuple[Tensor, ...]:
            return (self.reader_input(reader, layer, args[0]).view(args[0].shape), *args[1:])

        return hook

    def write_heads(self, layer: int, block: nn.Module, output: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any) -> None:
            heads = args[0].view(*self.batch.tokens.shape, self.sizes.n_heads, self.sizes.d_head)
            nothing = torch.zeros_like(heads).flatten(2)
            bias = output.forward(nothing)
            total = output.forward(heads.flatten(2))
            constants = self.constants[Site("heads", layer)].expand_as(heads)
            for head in range(self.sizes.n_heads):
                for values, by_source in (
                    (heads, self.written),
                    (constants, self.replacements),
                    (constants.detach(), self.fixed),
                ):
                    alone = torch.zeros_like(heads)
                    alone[:, :, head] = values[:, :, head]
                    share = output.forward(alone.flatten(2)) - bias
                    by_source[f"a{layer}.h{head}"] = self.after_norm(block, share, total)
            self.biases[layer] = self.after_norm(block, bias, total)

        return hook

    def after_norm(self, block: nn.Module, part: Tensor, total: Tensor) -> Tensor:
        """Contribution of a summand to the RMS norm of a sum."""
        if not self.family.attention_post_norm:
            return part
        norm: Any = block.get_submodule(self.family.attention_post_norm)
        epsilon = next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
        ones = torch.ones_like(total)
        gain = norm.forward(ones) * (1 + epsilon) ** 0.5
        normed: Tensor = part * gain / torch.sqrt(total.pow(2).mean(-1, keepdim=True) + epsilon)
        return normed

    def write_mlp(self, layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            self.write_vector(f"m{layer}", output.view(*self.batch.tokens.shape, -1), Site("mlp", layer))

        return hook

    def write_vector(self, source: str, written: Tensor, site: Site) -> None:
        self.written[source] = written
        self.replacements[source] = self.constants[site].squeeze(2)
        self.fixed[source] = self.replacements[source].detach()
