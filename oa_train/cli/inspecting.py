"""`oa-train inspect`: what a model is made of, what a circuit of it costs, and whether the family table fits it."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from oa_train.cli.output import console
from oa_train.cli.parser import ExplainingParser
from oa_train.cli.quiet import silence_libraries
from oa_train.cli.trainer import check_true_precision
from oa_train.diagnostics.memory import StepSettings, Strategy, node_step_memory
from oa_train.diagnostics.selfcheck import Check, self_check
from oa_train.errors import ConfigurationError, RunError
from oa_train.models.families import check_family, find_parts
from oa_train.models.graph import Graph
from oa_train.models.loading import CausalLM, LMSpec, empty_model, load_model
from oa_train.models.selection import Nodes
from oa_train.tasks.task import positive

DEFAULT_TOKENS = 32

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"]

# Up to this size a model is checked in float64, whatever its own type: half a billion parameters.
FLOAT64_BYTES = 2**32
# Attention back ends that compute in float64.
FLOAT64_ATTENTION = (None, "sdpa", "eager")


def inspect_command(argv: Sequence[str]) -> dict[str, Any]:
    """Show the facts of a model, and check it when asked to; returns what `--json` prints.

    Raises:
        RunError: a check has failed.
    """
    silence_libraries()
    parser = _parser()
    options = parser.parse_args(list(argv))
    lm: LMSpec = parser.instantiate_classes(options).lm
    facts = model_facts(
        lm,
        options.batch_size,
        options.n_tokens,
        options.samples_per_prompt,
        precision=options.precision,
        strategy=options.strategy,
        devices=options.devices,
        recompute=options.recompute,
    )
    if not options.json:
        _show(facts)
    checks: tuple[Check, ...] = ()
    if options.check:
        lm = _sharpest(lm, facts["frozen"]["parameters"])
        checks = self_check(load_model(lm))
        facts |= {"checked_in": lm.dtype, "checks": [_check_facts(check) for check in checks]}
    if options.json:
        print(json.dumps(facts, indent=2))
    elif options.check:
        _show_checks(checks, lm.dtype)
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(checks)} checks of {lm.name!r} failed: {'; '.join(failed)}.\n"
            f"The entry of {facts['model']['family']!r} in oa_train/models/families.py does not fit this model; "
            "docs/extending.md says what each check shows."
        )
    return facts


def model_facts(
    lm: LMSpec,
    batch_size: int = 16,
    n_tokens: int | None = None,
    samples_per_prompt: int = 4,
    *,
    precision: Precision = "32-true",
    strategy: Strategy = "auto",
    devices: int = 1,
    recompute: bool = False,
) -> dict[str, Any]:
    """Gather what can be known of a model without its weights.

    Args:
        lm: the model; its configuration is read.
        batch_size: prompts in a training batch of one process.
        n_tokens: tokens of every prompt, and positions of a table of constants; by default 32, or as many as the
            model has.
        samples_per_prompt: mask samples drawn for each prompt.
        precision: of the trainer.
        strategy: of the trainer.
        devices: processes of the trainer, on all nodes together.
        recompute: of the module.

    Returns:
        Plain values; sizes in bytes.

    Raises:
        ModelError: there is no such model, or its family is not in the table or its entry wrong.
        ConfigurationError: a number is not positive, or the model has fewer positions than `n_tokens`.
    """
    positive("batch_size", batch_size)
    positive("samples_per_prompt", samples_per_prompt)
    positive("devices", devices)
    check_true_precision("precision", precision, lm.dtype)
    if devices > 1 and strategy == "auto":
        raise ConfigurationError(f"devices is {devices}, which needs a strategy: ddp or fsdp.")
    model = empty_model(lm)
    config: Any = model.config
    n_tokens = _prompt_length(config, n_tokens)
    family, graph = check_family(config.model_type), Graph.of(config)
    settings = StepSettings(
        batch_size,
        n_tokens,
        samples_per_prompt,
        autocast=precision.endswith("-mixed"),
        recompute=recompute,
        strategy=strategy,
        n_processes=devices,
    )
    memory = node_step_memory(model, settings)
    parts = find_parts(model)
    return {
        "model": {
            "name": lm.name,
            "revision": lm.revision,
            "family": family.model_type,
            "dtype": lm.dtype,
            "parallel": graph.parallel,
            "post_norms": family.post_norms,
        },
        "sizes": {
            "layers": graph.n_layers,
            "heads": graph.n_heads,
            "kv_heads": graph.n_kv_heads,
            "d_head": parts.dimensions.d_head,
            "d_model": parts.dimensions.d_model,
            "vocabulary": config.vocab_size,
        },
        "frozen": {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "bytes": sum(parameter.nbytes for parameter in model.parameters()),
        },
        **_circuit_facts(model, graph, n_tokens),
        "step": {**asdict(settings), "precision": precision},
        "step_bytes": {**asdict(memory), "total": memory.total},
    }


def _prompt_length(config: Any, given: int | None) -> int:
    longest = getattr(config, "max_position_embeddings", None) or math.inf
    if given is None:
        return int(min(DEFAULT_TOKENS, longest))
    if given > longest:
        raise ConfigurationError(f"n_tokens is {given}; this model has {longest} positions.")
    return positive("n_tokens", given)


def _circuit_facts(model: CausalLM, graph: Graph, n_tokens: int) -> dict[str, Any]:
    """Components, readers, sources and edges, and what circuits of them train."""
    sizes = find_parts(model).dimensions
    components = Nodes.of(model.config)
    n_heads = graph.n_layers * graph.n_heads
    n_groups = graph.n_layers * graph.n_kv_heads
    node_constants = n_heads * sizes.d_head + graph.n_layers * sizes.d_model
    return {
        "components": {
            "count": len(components),
            "heads": n_heads,
            "mlps": graph.n_layers,
            "names": list(components.names),
        },
        "readers": {
            "count": graph.n_readers,
            "q": n_heads,
            "k": n_groups,
            "v": n_groups,
            "mlps": graph.n_layers,
            "logits": 1,
        },
        "sources": {"count": graph.n_sources, "input": 1, "heads": n_heads, "mlps": graph.n_layers},
        "edges": graph.n_edges,
        "node_circuit": _trained(len(components), node_constants, n_tokens),
        # Edges have the embedding as a source, which therefore has a constant as well.
        "edge_circuit": _trained(graph.n_edges, node_constants + sizes.d_model, n_tokens),
    }


def _trained(n_masks: int, n_constants: int, n_tokens: int) -> dict[str, int]:
    return {
        "masks": n_masks,
        "pooled_constants": n_constants,
        "total": n_masks + n_constants,
        "constants_by_position": n_constants * n_tokens,
        "total_by_position": n_masks + n_constants * n_tokens,
    }


def _sharpest(lm: LMSpec, n_parameters: int) -> LMSpec:
    """The same model in float64 where that is feasible, else as it is."""
    feasible = 8 * n_parameters <= FLOAT64_BYTES and lm.attn_implementation in FLOAT64_ATTENTION
    return replace(lm, dtype="float64") if feasible else lm


def _check_facts(check: Check) -> dict[str, Any]:
    # JSON has no NaN.
    figure = None if math.isnan(check.figure) else check.figure
    return {**asdict(check), "figure": figure, "passed": check.passed}


def _parser() -> ExplainingParser:
    parser = ExplainingParser(
        prog="oa-train inspect",
        description="Show parts, edges, trained parameters and memory of a model, from its configuration alone.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="config", help="configuration file; may be given several times")
    parser.add_class_arguments(LMSpec, "lm")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts in a training batch of one process")
    parser.add_argument("--n_tokens", type=int | None, help=f"tokens of a prompt; {DEFAULT_TOKENS} or all there are")
    parser.add_argument("--samples_per_prompt", type=int, default=4, help="mask samples drawn for each prompt")
    parser.add_argument("--precision", type=Precision, default="32-true", help="of the trainer")
    parser.add_argument("--strategy", type=Strategy, default="auto", help="of the trainer")
    parser.add_argument("--devices", type=int, default=1, help="processes of the trainer, on all nodes together")
    parser.add_argument(
        "--recompute", type=bool, default=False, help="whether blocks are run again in the backward pass"
    )
    parser.add_argument("--check", action="store_true", help="load the weights and check that the interventions fit")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def _show(facts: dict[str, Any]) -> None:
    model = facts["model"]
    table = Table(
        title=f"{model['name']}: {model['family']}, {model['dtype']}", title_justify="left", show_header=False
    )
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for section in (_part_rows, _circuit_rows, _memory_rows):
        for what, value, note in section(facts):
            table.add_row(what, value if isinstance(value, str) else f"{value:,}", note)
        table.add_section()
    console.print(table)


Rows = Iterator[tuple[str, int | str, str]]


def _part_rows(facts: dict[str, Any]) -> Rows:
    model, sizes, frozen = facts["model"], facts["sizes"], facts["frozen"]
    yield "layers", sizes["layers"], "attention and MLP in parallel" if model["parallel"] else "attention, then MLP"
    yield "heads", sizes["heads"], f"of width {sizes['d_head']}; {sizes['kv_heads']} key-value heads"
    yield "width", sizes["d_model"], "with post-norms" if model["post_norms"] else "no post-norms"
    yield "vocabulary", sizes["vocabulary"], ""
    yield "frozen parameters", frozen["parameters"], _size(frozen["bytes"])


def _circuit_rows(facts: dict[str, Any]) -> Rows:
    components, readers, sources, sizes = facts["components"], facts["readers"], facts["sources"], facts["sizes"]
    layers, heads = sizes["layers"], sizes["heads"]
    names = f"a0.h0 to a{layers - 1}.h{heads - 1}, m0 to m{layers - 1}"
    yield "components", components["count"], f"{components['heads']:,} heads and {components['mlps']:,} MLPs: {names}"
    yield "sources", sources["count"], "input and the components"
    groups = f"{readers['q']:,} q, {readers['k']:,} k, {readers['v']:,} v"
    yield "readers", readers["count"], f"{groups}, {readers['mlps']:,} MLPs, logits"
    yield "edges", facts["edges"], "from every source to every later reader"
    for kind in ("node", "edge"):
        trained = facts[f"{kind}_circuit"]
        parts = f"{trained['masks']:,} masks, {trained['pooled_constants']:,} in pooled constants"
        by_position = f"{trained['total_by_position']:,} with constants for {facts['step']['n_tokens']} positions"
        yield f"trained, {kind} circuit", trained["total"], f"{parts}; {by_position}"


def _memory_rows(facts: dict[str, Any]) -> Rows:
    memory, step = facts["step_bytes"], facts["step"]
    rows = f"{step['batch_size']} prompts of {step['n_tokens']} tokens, {step['samples_per_prompt']} samples each"
    yield "node training step", _size(memory["total"]), f"{rows}{_manner(step)}; peak of all tensors:"
    share = f", a share of 1 in {step['n_processes']}" if step["strategy"] == "fsdp" else ""
    yield "  weights", _size(memory["weights"]), f"frozen parameters and buffers{share}"
    if memory["gathered"]:
        yield "  gathered", _size(memory["gathered"]), "weights outside of the blocks, from other processes"
    yield "  trained", _size(memory["trained"]), "masks and pooled constants, their gradients, Adam's moments"
    yield "  replacements", _size(memory["replacements"]), "masks laid out for all rows and positions"
    yield "  activations", _size(memory["activations"]), "kept for the backward pass"
    yield "  logits", _size(memory["logits"]), "of both runs, with their divergence"
    yield "  passing", _size(memory["passing"]), "made and dropped on the way"


def _manner(step: dict[str, Any]) -> str:
    """How the step is carried out, where it is not the usual way."""
    parts = [
        f", {step['precision']}" if step["autocast"] else "",
        ", with recomputation" if step["recompute"] else "",
        f", in each of {step['n_processes']} processes" if step["n_processes"] > 1 else "",
    ]
    return "".join(parts)


def _show_checks(checks: Sequence[Check], dtype: str) -> None:
    table = Table(title=f"self-check in {dtype}", title_justify="left")
    for column in ("what should hold", "figure", "at most", ""):
        table.add_column(column, justify="right" if column in ("figure", "at most") else "left")
    for check in checks:
        figure = escape(check.problem) if check.problem else f"{check.figure:.2g}"
        table.add_row(check.name, figure, f"{check.tolerance:g}", "passed" if check.passed else "[bold]failed[/bold]")
    console.print(table)


def _size(n_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} B"
