"""Figures say what they show, for models of every size, and leave matplotlib as it was."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from oa_train.ablations.registry import ABLATION_KINDS
from oa_train.figures.circuits import circuit_drawing
from oa_train.figures.comparison import (
    MOST_ROWS,
    RANDOM_CIRCUITS,
    SMALLEST_KL,
    Control,
    Panel,
    comparison_figure,
)
from oa_train.figures.maps import score_map
from oa_train.figures.minimality import COLOURS, worth_figure
from oa_train.figures.overlap import agreement_figure
from oa_train.figures.style import ABLATION_STYLES, KEPT, ablation_style, save_figure
from oa_train.metrics.estimates import Estimate

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def global_state():
    """No figure may change matplotlib's settings."""
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before


def saved(figure: Figure, folder) -> str:
    """Save in both formats and return the SVG, in which every text stands as a comment."""
    assert save_figure(figure, folder / "deep" / "figure.png").read_bytes().startswith(PNG)
    svg = save_figure(figure, folder / "deep" / "figure.svg").read_text()
    assert "<svg" in svg
    return svg


def texts(figure: Figure) -> list[str]:
    found = [text.get_text() for axes in figure.axes for text in axes.texts]
    return found + [axes.get_title() for axes in figure.axes] + [axes.get_title("left") for axes in figure.axes]


def names_of(n_layers: int, n_heads: int) -> list[str]:
    return [name for i in range(n_layers) for name in (*(f"a{i}.h{h}" for h in range(n_heads)), f"m{i}")]


SIZES = [(1, 1), (3, 4), (12, 12)]


def drawn_map(table, threshold: float = 0.5) -> Figure:
    table = np.asarray(table, dtype=float)
    rows, columns = ([f"{letter}{i}" for i in range(n)] for letter, n in zip("rc", table.shape, strict=True))
    return score_map(table, rows, columns, ("reader", "source"), threshold)


@pytest.mark.parametrize("shape", [(1, 2), (12, 13), (16, 33), (13, 157), (120, 90)])
def test_a_map_of_any_size(tmp_path, shape):
    table = np.random.default_rng(0).random(shape)
    table[0, 1] = np.nan
    figure = drawn_map(table, 0.25)
    axes = figure.axes[0]
    for n, letter, labels in zip(shape, "rc", (axes.get_yticklabels(), axes.get_xticklabels()), strict=True):
        names = [label.get_text() for label in labels if label.get_text().startswith(letter)]
        # Names stand beside the map as long as they can be read, and numbers in it.
        assert names == ([f"{letter}{i}" for i in range(n)] if n <= 60 else [])
    np.testing.assert_array_equal(np.ma.filled(axes.images[0].get_array(), np.nan), table)
    n_entries = table.size - 1
    assert len(axes.texts) == (n_entries if table.size <= 400 else 0)
    above = int((table > 0.25).sum())
    framed = " (framed)" if table.size <= 400 else ""
    svg = saved(figure, tmp_path)
    assert f"<!-- {above:,} of {n_entries:,} above the threshold 0.25{framed} -->" in svg
    assert "<!-- reader" in svg
    assert "<!-- source" in svg


def test_a_map_frames_what_exceeds_the_threshold_and_leaves_blank_what_is_no_entry():
    figure = drawn_map([[0.9, 0.5, 0.1], [np.nan, 0.51, 1.0]])
    frames = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    assert sorted((frame.get_x() + 0.5, frame.get_y() + 0.5) for frame in frames) == [(0, 0), (1, 1), (2, 1)]
    numbers = [text.get_text() for text in figure.axes[0].texts]
    assert numbers == ["0.90", "0.50", "0.10", "0.51", "1.00"]


@pytest.mark.parametrize(("n_layers", "n_heads"), SIZES)
def test_a_circuit_of_any_size(tmp_path, n_layers, n_heads):
    names = names_of(n_layers, n_heads)
    figure = circuit_drawing(n_layers, n_heads, names[::2], "the circuit of a task")
    found = texts(figure)
    assert figure.get_suptitle() == "the circuit of a task"
    assert sum(text == "MLP" for text in found) == n_layers
    assert all(f"layer {layer}" in found for layer in range(n_layers))
    assert sum(text == f"h{n_heads - 1}" for text in found) == n_layers
    svg = saved(figure, tmp_path)
    assert "<!-- the circuit of a task -->" in svg
    assert f"<!-- layer {n_layers - 1} -->" in svg


def test_a_circuit_fills_the_boxes_that_it_keeps():
    figure = circuit_drawing(2, 2, {"a1.h0", "m0"}, "")
    axes = figure.axes[0]
    filled = []
    for patch in axes.patches:
        assert isinstance(patch, FancyBboxPatch)
        if to_hex(patch.get_facecolor()) == KEPT.lower():
            filled.append((patch.get_x() + patch.get_width() / 2, patch.get_y() + patch.get_height() / 2))
    # Head 0 of layer 1, and the MLP of layer 0 to the right of its two heads.
    np.testing.assert_allclose(sorted(filled), [(0, 1), (2.5, 0)], atol=1e-12)
    assert len(axes.patches) == 6


@pytest.mark.parametrize("kept", [(), names_of(2, 2)])
def test_the_empty_and_the_whole_circuit_are_drawn(kept):
    figure = circuit_drawing(2, 2, kept, "")
    filled = [to_hex(patch.get_facecolor()) == KEPT.lower() for patch in figure.axes[0].patches]
    assert filled == [bool(kept)] * 6


def an_estimate(mean: float, low: float, high: float) -> Estimate:
    return Estimate(mean, (high - low) / 4, (low, high), 100)


def intervals(n: int, scale: float) -> list[Estimate]:
    return [an_estimate(scale * (i + 1), scale * (i + 0.5), scale * (i + 2)) for i in range(n)]


def two_panels(circuit, components, names, title: str = "", controls=()):
    panels = [Panel("circuits", ["circuit"], circuit), Panel("components", names, components)]
    return comparison_figure(panels, title, controls=controls)


@pytest.mark.parametrize(("n_layers", "n_heads"), SIZES[:2])
def test_a_comparison_of_any_size(tmp_path, n_layers, n_heads):
    names = names_of(n_layers, n_heads)
    scales = (("optimal", 0.01), ("mean", 0.1), ("zero", 1.0))
    circuit = {kind: intervals(1, scale) for kind, scale in scales}
    components = {kind: intervals(len(names), scale) for kind, scale in scales}
    controls = [Control("7 kept", 0.1, [0.5, 0.7])]
    figure = two_panels(circuit, components, names, "three ablations", controls)
    upper, lower, control = figure.axes
    assert [label.get_text() for label in control.get_yticklabels()] == ["7 kept"]
    assert [label.get_text() for label in lower.get_yticklabels()] == names
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["optimal", "mean", "zero", RANDOM_CIRCUITS]
    assert lower.get_xscale() == upper.get_xscale() == "log"
    svg = saved(figure, tmp_path)
    for words in ("three ablations", "KL divergence from the clean model (nats)", names[0], names[-1], "optimal"):
        assert f"<!-- {words} -->" in svg


def test_of_many_components_those_that_matter_most_are_drawn():
    names = names_of(12, 12)
    values = intervals(len(names), 0.01)[::-1]
    figure = comparison_figure([Panel("one component ablated", names, {"optimal": values}, ranked=True)], "")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == names[:MOST_ROWS]
    assert f"the {MOST_ROWS} of {len(names)} that matter most" in axes.get_title(loc="left")


def test_points_stand_at_their_means_in_their_colours():
    components = {"optimal": intervals(3, 0.01), "zero": intervals(3, 0.1)}
    circuit = {"optimal": [an_estimate(0.5, 0.4, 0.7)], "zero": [an_estimate(2.0, 1.0, 3.0)]}
    upper, lower = two_panels(circuit, components, ["a0.h0", "a0.h1", "m0"]).axes
    for axes, drawn in ((upper, circuit), (lower, components)):
        for container, (kind, wanted) in zip(axes.containers, drawn.items(), strict=True):
            points, _, (bars,) = container.lines
            np.testing.assert_allclose(points.get_xdata(), [interval.mean for interval in wanted])
            np.testing.assert_allclose(np.round(points.get_ydata()), range(len(wanted)))
            ends = [(segment[0, 0], segment[1, 0]) for segment in bars.get_segments()]
            np.testing.assert_allclose(ends, [interval.ci95 for interval in wanted])
            assert (points.get_color(), points.get_marker()) == ABLATION_STYLES[kind]
    # The first component stands on top.
    assert lower.get_ylim()[0] > lower.get_ylim()[1]


def test_every_ablation_has_a_colour_and_a_marker_of_its_own():
    # What restores units is compared with nothing.
    taking = {name for name, kind in ABLATION_KINDS.items() if not kind.restores}
    assert taking == set(ABLATION_STYLES)
    assert all(len(set(values)) == len(taking) for values in zip(*ABLATION_STYLES.values(), strict=True))


def test_an_ablation_without_a_colour_of_its_own_gets_one_that_lasts():
    assert all(ablation_style(name) == style for name, style in ABLATION_STYLES.items())
    assert ablation_style("my own") == ablation_style("my own")
    assert not set(ablation_style("my own")) & {value for style in ABLATION_STYLES.values() for value in style}
    own = intervals(2, 0.1)
    (axes,) = comparison_figure([Panel("circuits", ["first", "second"], {"my own": own})], "").axes
    assert axes.containers[0].lines[0].get_color() == ablation_style("my own")[0]


def test_what_is_no_total_ablation_is_hollow():
    rows = {kind: intervals(1, 0.1) for kind in ("optimal", "counterfactual")}
    labels = {"optimal": "optimal", "counterfactual": "counterfactual (not total)"}
    (axes,) = comparison_figure([Panel("circuits", ["circuit"], rows)], "", labels).axes
    faces = [to_hex(container.lines[0].get_markerfacecolor()) for container in axes.containers]
    assert faces == [ABLATION_STYLES["optimal"][0].lower(), "#ffffff"]


def test_divergences_of_zero_and_below_are_drawn_at_the_edge(tmp_path):
    none = [an_estimate(0.0, -1e-3, 1e-3)]
    figure = two_panels({"mean": none}, {"mean": none}, ["m0"])
    points = figure.axes[1].containers[0].lines[0]
    assert points.get_xdata().tolist() == [SMALLEST_KL]
    saved(figure, tmp_path)


@pytest.mark.parametrize("n_runs", [2, 5])
def test_runs_are_tabled_with_their_numbers(tmp_path, n_runs):
    names = [f"run {number}" for number in range(n_runs)]
    kl = {kind: [0.0123 * (i + 1) for i in range(n_runs)] for kind in ("optimal", "counterfactual mean")}
    overlap = [[1.0 if i == j else 0.25 for j in range(n_runs)] for i in range(n_runs)]
    figure = agreement_figure(names, kl, overlap)
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == [f"{i + 1}  run {i}" for i in range(n_runs)]
    shown = [text.get_text() for text in left.texts]
    assert shown == [f"{kl[kind][i]:.2g}" for i in range(n_runs) for kind in kl]
    assert [text.get_text() for text in right.texts].count("0.25") == n_runs * (n_runs - 1)
    saved(figure, tmp_path)


def test_parts_stand_by_what_they_are_worth_and_in_the_colour_of_their_verdict(tmp_path):
    worth = [an_estimate(0.5, 0.4, 0.6), an_estimate(0.002, 0.0, 0.004), an_estimate(-0.001, -0.002, 0.0)]
    figure = worth_figure(["a0.h0", "m0", "m1"], worth, ["needed", "undecided", "superfluous"], 0.001, "three parts")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a0.h0", "m0", "m1"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    for rank, (container, verdict) in enumerate(zip(axes.containers, COLOURS, strict=True)):
        points, _, (bars,) = container.lines
        assert (points.get_xdata()[0], points.get_ydata()[0]) == (worth[rank].mean, rank + 1)
        assert points.get_color() == COLOURS[verdict]
        ((low, _), (high, _)) = bars.get_segments()[0]
        np.testing.assert_allclose([low, high], worth[rank].ci95)
    svg = saved(figure, tmp_path)
    for words in ("three parts", "needed (1)", "undecided (1)", "superfluous (1)", "tolerance 0.001"):
        assert f"<!-- {words} -->" in svg


def test_of_many_parts_the_first_have_names_and_all_have_a_rank(tmp_path):
    names = [f"m{number}" for number in range(3 * MOST_ROWS)]
    verdicts = ["needed"] * MOST_ROWS + ["superfluous"] * (2 * MOST_ROWS)
    figure = worth_figure(names, intervals(len(names), 0.01)[::-1], verdicts, 0.0, "")
    rows, ranks = figure.axes
    assert [label.get_text() for label in rows.get_yticklabels()] == names[:MOST_ROWS]
    assert sum(len(container.lines[0].get_xdata()) for container in ranks.containers) == len(names)
    assert f"all {len(names)}, by rank" in texts(figure)
    saved(figure, tmp_path)
