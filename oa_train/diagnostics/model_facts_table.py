"""Facts about a model (see `diagnostics.model_facts`) as the rows of a table."""

from collections.abc import Iterator
from typing import Any

Rows = Iterator[tuple[str, int | str, str]]


def facts_rows(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows about the model's parts, its circuits, and the memory of a training step."""
    rows = [row for section in (_part_rows, _circuit_rows, _memory_rows) for row in section(facts)]
    return [{"part": part, "size": size, "of": note} for part, size, note in rows]


def _part_rows(facts: dict[str, Any]) -> Rows:
    model, sizes, frozen = facts["model"], facts["sizes"], facts["frozen"]
    yield "layers", sizes["layers"], "attention and MLP in parallel" if model["parallel"] else "attention, then MLP"
    yield "heads", sizes["heads"], f"of width {sizes['d_head']}; {sizes['kv_heads']} key-value heads"
    yield "width", sizes["d_model"], "with post-norms" if model["post_norms"] else "no post-norms"
    yield "vocabulary", sizes["vocabulary"], ""
    yield "frozen parameters", frozen["parameters"], _size(frozen["bytes"])
    threads = facts["threads"]
    yield "threads", threads["used"], f"{threads['cores']} cores; OMP_NUM_THREADS sets them (docs/scaling.md, Threads)"


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
    if memory is None:
        yield "node training step", "", "not estimated: the memory of experts depends on the tokens routed to them"
        return
    rows = f"{step['batch_size']} prompts of {step['n_tokens']} tokens, {step['samples_per_prompt']} samples each"
    yield "node training step", _size(memory["total"]), f"{rows}{_manner(step)}; peak of all tensors:"
    share = f", a share of 1 in {step['n_processes']}" if step["strategy"] == "fsdp" else ""
    yield "  weights", _size(memory["weights"]), f"frozen parameters and buffers{share}"
    if memory["gathered"]:
        yield "  gathered", _size(memory["gathered"]), "weights outside the blocks, from other processes"
    yield "  trained", _size(memory["trained"]), "masks and pooled constants, their gradients, Adam's moments"
    yield "  replacements", _size(memory["replacements"]), "masks laid out for all rows and positions"
    yield "  activations", _size(memory["activations"]), "kept for the backward pass"
    yield "  logits", _size(memory["logits"]), "of both runs, with their divergence"
    yield "  passing", _size(memory["passing"]), "temporaries at the peak"


def _manner(step: dict[str, Any]) -> str:
    """Settings of the step that differ from the default, in words."""
    parts = [
        f", {step['precision']}" if step["autocast"] else "",
        ", with recomputation" if step["recompute"] else "",
        f", in each of {step['n_processes']} processes" if step["n_processes"] > 1 else "",
    ]
    return "".join(parts)


def _size(n_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} B"
