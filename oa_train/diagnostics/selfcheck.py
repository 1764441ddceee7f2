"""Checks that the family table is right for a model, by running the model itself on random tokens.

A wrong entry rarely raises an error: it reads and replaces the wrong values. Every check tests a property that holds
only if the entry is right.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, cast, get_args

import torch

from oa_train.ablations.constants import Constants
from oa_train.batches import Batch, leading_tokens, unanswered
from oa_train.diagnostics.model_state import model_state
from oa_train.diagnostics.reader_checks import logits_with_every_edge, misplaced_readers
from oa_train.diagnostics.reference import reference_node_logits
from oa_train.engine.forward import scored_logits
from oa_train.engine.levels import masked_logits
from oa_train.engine.nodes import node_taps
from oa_train.engine.prefix import prefix_logits
from oa_train.engine.reading import read_values
from oa_train.models.families import check_config, check_family
from oa_train.models.frozen import CausalLM
from oa_train.models.graph import Graph
from oa_train.models.hooks import Tap, tapped
from oa_train.models.parts import find_parts
from oa_train.models.selection import Nodes
from oa_train.models.sites import Site
from oa_train.models.spec import LMSpec
from oa_train.models.weights import check_finite
from oa_train.progress import Advance, Track, silent
from oa_train.seeds import torch_generator
from oa_train.shapes import Float, Int, Tensor
from oa_train.tasks.encoding import PaddingSide, PromptEncoder

# Largest difference, relative to the largest value, that rounding may cause. Many families compute norms in float32
# whatever their data type, so float64 is not checked to its last digits. Mistakes are of the order of 1.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}

# Of tokens, masks and constants.
SEED = 0
# Long enough for attention and padding to matter, short enough for the slow reference.
N_TOKENS = 6
# Number of positions in the tables of constants: fewer than tokens, so that the last row serves several tokens.
TABLE = 3
# Number of layers whose readers are checked besides the first and the last, unless all layers are checked.
FEW_LAYERS = 2


@dataclass(frozen=True)
class Check:
    """Result of a check.

    Attributes:
        name: the property that should hold.
        figure: largest difference relative to the largest value, or a number of exceptions; NaN if the check could
            not be carried out.
        tolerance: upper limit of the figure.
        problem: why the check could not be carried out; otherwise empty.
    """

    name: str
    figure: float
    tolerance: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        """True if the figure is within its limit."""
        return self.figure <= self.tolerance


@torch.no_grad()
def self_check(
    model: CausalLM, lm: LMSpec | None = None, *, full: bool = False, track: Track = silent
) -> tuple[Check, ...]:
    """Check that the interventions fit a model.

    Args:
        model: frozen causal language model; the checks are sharpest in float64.
        lm: specification from which the model was loaded, to check that its tokenizer matches it.
        full: whether to check the readers of every layer, not only of the first, the last and two random ones.
        track: progress.

    Returns:
        The checks in the order in which they were carried out. A check that raises an error has failed; the others
        are still carried out.

    Raises:
        ModelError: the family is not in the table, the model's modules are not those of its entry, or its weights are
            not finite.
    """
    find_parts(model)
    check_finite(model)
    trial = _Trial(model, full)
    with track(len(COMPARISONS) + len(COUNTS) + 2 + trial.reader_rows, "checking the interventions") as advance:
        trial.advance = advance
        before = model_state(model, trial.tokens(2))
        checks = []
        for name, check in (COMPARISONS | COUNTS).items():
            checks.append(_carried_out(name, TOLERANCES[model.dtype] if name in COMPARISONS else 0, check, trial))
            advance(1)
        after = model_state(model, trial.tokens(2))
        advance(2)
    changed = sum(before[key] != after[key] for key in before)
    checks.append(Check("the model is as before: hooks, modules, weights, logits", changed, 0))
    if lm is not None:
        checks.append(
            _carried_out("the tokenizer fits the embedding", 0, lambda _: PromptEncoder.of(lm) is None, trial)
        )
    return tuple(checks)


def _carried_out(name: str, tolerance: float, check: Callable[["_Trial"], float], trial: "_Trial") -> Check:
    try:
        return Check(name, check(trial), tolerance)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as problem:
        # Values replaced at the wrong place can break the model's own code anywhere.
        first = str(problem).strip().split("\n")[0]
        return Check(name, float("nan"), tolerance, f"{type(problem).__name__}: {first}")


class _Trial:
    """A model, and the random inputs that the checks use, in its data type and on its device."""

    def __init__(self, model: CausalLM, full: bool) -> None:
        self.model = model
        self.parts = find_parts(model)
        self.dimensions = self.parts.dimensions
        self.nodes = Nodes.of(model.config)
        self.advance = cast(Advance, lambda done: None)
        n_layers, n_heads = self.dimensions.n_layers, self.dimensions.n_heads
        drawn = torch.randperm(n_layers, generator=torch_generator(SEED, "check layers")).tolist()
        self.layers = sorted(drawn if full else {0, n_layers - 1, *drawn[:FEW_LAYERS]})
        self.reader_rows = 3 * len(self.layers) * (n_heads + 2 * Graph.of(model.config).n_kv_heads)
        embedding: Any = model.get_input_embeddings()
        self.vocabulary: int = embedding.weight.shape[0]
        bos = getattr(model.config, "bos_token_id", None)
        self.bos_token_id: int | None = bos if isinstance(bos, int) and bos < self.vocabulary else None

    def tokens(self, n_rows: int) -> Int[Tensor, "row position"]:
        """Random tokens after the model's BOS, if it has one."""
        shape = (n_rows, N_TOKENS)
        tokens = torch.randint(0, self.vocabulary, shape, generator=torch_generator(SEED, "check tokens"))
        if self.bos_token_id is not None:
            tokens[:, 0] = self.bos_token_id
        return tokens.to(self.model.device)

    def mask(self, n_rows: int) -> Float[Tensor, "row component"]:
        """Random masks; about a quarter of the entries are exactly 0 and another quarter exactly 1."""
        entries = torch.rand(self.ones(n_rows).shape, generator=torch_generator(SEED, "check masks"))
        return (2 * entries - 0.5).clamp(0, 1).to(self.model.device, self.model.dtype)

    def ones(self, n_rows: int) -> Float[Tensor, "row component"]:
        """Masks that keep everything."""
        return torch.ones(n_rows, len(self.nodes), dtype=self.model.dtype, device=self.model.device)

    def constants(self, n_positions: int = 1, nodes: Nodes | None = None) -> Constants:
        """Random constants."""
        generator = torch_generator(SEED, "check constants")
        return Constants.zeros(nodes or self.nodes, n_positions).mapped(
            lambda table: torch.randn(table.shape, generator=generator).to(self.model.device, self.model.dtype)
        )

    def batch(self, rows: Sequence[Tensor] | Tensor, side: PaddingSide = "right", width: int | None = None) -> Batch:
        """Rows of tokens, padded; a leading BOS is protected."""
        padded = _batch(rows, side, width)
        return replace(padded, protected=leading_tokens(padded.tokens, padded.positions, self.bos_token_id))

    def logits(self, batch: Batch, mask: Tensor, constants: Constants) -> Float[Tensor, "row scored vocabulary"]:
        """Logits of the engine for nodes."""
        return masked_logits(self.model, batch, self.nodes, mask, constants.replacements(batch))

    @cached_property
    def fast_and_slow(self) -> list[tuple[Tensor, ...]]:
        """Logits and the gradients of mask and constants, from the engine and from the slow reference."""
        first, second = self.tokens(2)
        batch = self.batch([first, second[: N_TOKENS - 2]], "left")
        results = []
        for run in (masked_logits, reference_node_logits):
            constants, mask = self.constants(TABLE), self.mask(2)
            leaves = [leaf.requires_grad_() for leaf in (mask, *constants.tables.values())]
            with torch.enable_grad():
                logits = run(self.model, batch, self.nodes, mask, constants.replacements(batch))
                weights = torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)
                # The reference does not use constants of units that no row ablates; their gradient is zero.
                gradients = torch.autograd.grad((logits * weights).sum(), leaves, materialize_grads=True)
            results.append((logits.detach(), *gradients))
        return results

    def added(self, batch: Batch, taps: Sequence[Tap] = ()) -> Float[Tensor, "layer row position d_model"]:
        """The vectors that each block adds to the residual stream."""
        read, written = list[Tensor](), list[Tensor]()
        before = [Tap(block, "input", read.append) for block in self.parts.blocks]
        after = [Tap(block, "output", written.append) for block in self.parts.blocks]
        scored_logits(self.model, batch, [*taps, *before, *after], whole=True)
        return torch.stack(written) - torch.stack(read)


def _all_kept(trial: _Trial) -> float:
    batch = trial.batch(trial.tokens(2))
    plain: Tensor = trial.model(input_ids=batch.tokens, use_cache=False).logits
    return _difference(trial.logits(batch, trial.ones(2), trial.constants()), plain[:, -1:])


def _all_ablated(trial: _Trial) -> float:
    tokens = trial.tokens(2)
    tokens[1, -1] = tokens[0, -1]
    logits = trial.logits(trial.batch(tokens), 0 * trial.ones(2), trial.constants(TABLE))
    return _difference(logits[1], logits[0])


def _ablated_blocks(trial: _Trial) -> float:
    """Largest difference, over tokens and two sets of MLP constants, in a block's update minus its MLP's constant."""
    batch, constants = _batch(trial.tokens(2)), trial.constants()
    mlps = [Site("mlp", layer) for layer in range(trial.dimensions.n_layers)]
    zeros = {site: torch.zeros_like(table) if site in mlps else table for site, table in constants.tables.items()}
    rest = []
    for table in (constants, replace(constants, tables=zeros)):
        values = table.replacements(batch)
        taps = node_taps(trial.model, trial.nodes, 0 * trial.ones(2), values, batch.layout)
        rest.append(trial.added(batch, taps) - torch.stack([values[site][0] for site in mlps]))
    return _difference(torch.stack(rest), rest[1][:, :1, :1].expand_as(torch.stack(rest)))


def _written_alone(trial: _Trial, kinds: tuple[str, str]) -> float:
    """Largest difference over tokens at sites of the second kind when all their inputs, of the first, are constant."""
    if "neurons" in kinds and not trial.parts.down_projections:
        return 0.0
    batch = _batch(trial.tokens(2))
    nodes, read = (Nodes.of(trial.model.config, [kind]) for kind in kinds)
    mask = torch.zeros(2, len(nodes), dtype=trial.model.dtype, device=trial.model.device)
    values = trial.constants(nodes=nodes).replacements(batch)
    with tapped(node_taps(trial.model, nodes, mask, values, batch.layout)):
        written = torch.stack(list(read_values(trial.model, batch, read).values()))
    return _difference(written, written[:, :1, :1].expand_as(written))


def _padding(trial: _Trial) -> float:
    tokens, mask, constants = trial.tokens(1), trial.mask(1), trial.constants(TABLE)
    padded = [trial.batch(tokens, side, N_TOKENS + 3) for side in get_args(PaddingSide)]
    differences = []
    for run in (lambda batch: trial.logits(batch, mask, constants), partial(scored_logits, trial.model)):
        plain = run(trial.batch(tokens))
        differences += [_difference(run(batch), plain) for batch in padded]
    return _largest(differences)


def _sharing(trial: _Trial) -> float:
    """Difference between shared and separate runs of circuits that each ablate one component, in several layers."""
    n_entries, batch = len(trial.nodes), trial.batch(trial.tokens(2))
    masks = torch.ones(3, n_entries, dtype=torch.bool, device=batch.tokens.device)
    masks[range(3), [n_entries // 3, 2 * n_entries // 3, n_entries - 1]] = False
    values = trial.constants().replacements(batch)
    shared = prefix_logits(trial.model, batch, trial.nodes, masks, values).ablated.flatten(0, 1)
    rows = masks.to(trial.model.dtype).repeat_interleave(2, dim=0)
    return _difference(shared, masked_logits(trial.model, batch.repeat(3), trial.nodes, rows, values))


def _all_edges_kept(trial: _Trial) -> float:
    batch = trial.batch(trial.tokens(2))
    return _difference(logits_with_every_edge(trial.model, batch), scored_logits(trial.model, batch))


def _against_reference(trial: _Trial, part: slice) -> float:
    fast, slow = (results[part] for results in trial.fast_and_slow)
    return _largest(_difference(*pair) for pair in zip(fast, slow, strict=True))


def _wrong_parallel(trial: _Trial) -> float:
    """Number of layers whose MLP changes with its own layer's heads though the model is parallel, or vice versa."""
    n_layers = trial.dimensions.n_layers
    batch, kept = _batch(trial.tokens(1).expand(n_layers, -1)), trial.ones(n_layers)
    ablated = kept.unflatten(1, (n_layers, -1)).clone()
    layers = torch.arange(n_layers)
    ablated[layers, layers, :-1] = 0
    runs: list[list[Tensor]] = []
    for mask in (kept, ablated.flatten(1)):
        outputs: list[Tensor] = []
        taps = node_taps(trial.model, trial.nodes, mask, trial.constants().replacements(batch), batch.layout)
        reading = [Tap(mlp, "output", outputs.append) for mlp in trial.parts.mlps]
        scored_logits(trial.model, batch, [*taps, *reading], whole=True)
        runs.append(outputs)
    parallel = check_config(trial.model.config).parallel
    pairs = enumerate(zip(*runs, strict=True))
    return sum(torch.equal(before[row], after[row]) != parallel for row, (before, after) in pairs)


def _wrong_post_norms(trial: _Trial) -> float:
    """Number of layers that, without post-norms, add more than attention and MLP outputs, or the reverse."""
    writes: list[Tensor] = []
    modules = [module for pair in zip(trial.parts.attention_outputs, trial.parts.mlps, strict=True) for module in pair]
    added = trial.added(trial.batch(trial.tokens(2)), [Tap(module, "output", writes.append) for module in modules])
    by_row = [value.reshape(added.shape[1:]) for value in writes]  # some families flatten rows and positions
    written = torch.stack(by_row).unflatten(0, (-1, 2)).sum(dim=1)
    post_norms = check_family(trial.model.config.model_type).post_norms
    # The first token's activations can be a thousand times those of others, which would hide a difference.
    pairs = zip(added[:, :, 1:], written[:, :, 1:], strict=True)
    return sum((_difference(*pair) > TOLERANCES[trial.model.dtype]) != post_norms for pair in pairs)


# Properties that should hold, and the functions that return the largest deviation.
COMPARISONS: dict[str, Callable[[_Trial], float]] = {
    "all kept: the logits are the model's own": _all_kept,
    "all ablated: only the last token and its position count": _all_ablated,
    "all ablated: blocks add their constants and nothing else": _ablated_blocks,
    "padding left, right and none agree": _padding,
    "the logits are the slow reference's": partial(_against_reference, part=slice(1)),
    "the gradients are the slow reference's": partial(_against_reference, part=slice(1, None)),
    "circuits that share clean layers: the logits are those of whole runs": _sharing,
    "every edge kept: the logits are the model's own": _all_edges_kept,
    "heads at constants: attention adds the same at every token": partial(
        _written_alone, kinds=("heads", "attention")
    ),
    "neurons at constants: the MLP adds the same at every token": partial(_written_alone, kinds=("neurons", "mlp")),
}
# Properties that should hold, and the functions that count exceptions.
COUNTS: dict[str, Callable[[_Trial], float]] = {
    "every MLP reads what `parallel` says": _wrong_parallel,
    "every block adds what `post_norms` says": _wrong_post_norms,
    "every query, key and value reads what its name says": lambda trial: misplaced_readers(
        trial.model, _batch(trial.tokens(1)), TOLERANCES[trial.model.dtype], trial.layers, trial.advance
    ),
}


def _batch(rows: Sequence[Tensor] | Tensor, side: PaddingSide = "right", width: int | None = None) -> Batch:
    width = width or max(map(len, rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.long, device=rows[0].device)
    real = torch.zeros_like(tokens, dtype=torch.bool)
    for row, ids in enumerate(rows):
        place = slice(width - len(ids), width) if side == "left" else slice(len(ids))
        tokens[row, place], real[row, place] = ids, True
    return unanswered(tokens, real)


def _difference(actual: Float[Tensor, "*shape"], expected: Float[Tensor, "*shape"]) -> float:
    """Largest difference relative to the largest expected value; NaN if any value is NaN."""
    largest = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((actual - expected).abs().max() / largest)


def _largest(figures: Iterable[float]) -> float:
    return float(torch.tensor(list(figures)).max())  # unlike Python's, it keeps NaN
