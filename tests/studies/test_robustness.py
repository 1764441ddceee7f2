"""What lies outside a circuit in many combinations: masks that mix, the ascent, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oa_train.ablations.constants import Constants
from oa_train.ablations.evaluation import circuit_behaviour
from oa_train.ablations.fitting import RefitSettings
from oa_train.ablations.registry import AblationSource
from oa_train.ablations.trained_circuit import TrainedCircuit
from oa_train.ablations.worst_mask import AscentSettings, ascend
from oa_train.circuits.circuit import Circuit
from oa_train.cli.main import main
from oa_train.engine.forward import scored_logits
from oa_train.engine.levels import copies_logits, masked_logits
from oa_train.engine.reading import read_values
from oa_train.errors import ConfigurationError
from oa_train.metrics.divergence import kl_divergence
from oa_train.models.frozen import CausalLM
from oa_train.models.graph import Graph
from oa_train.models.loading import load_model
from oa_train.models.selection import Nodes
from oa_train.models.spec import LMSpec
from oa_train.seeds import torch_generator
from oa_train.studies.robustness import Robustness, RobustnessSettings
from oa_train.zoo.known.digit_sum import DIGITS
from oa_train.zoo.known.families import gpt2
from oa_train.zoo.known.wiring import Wiring, subspaces
from tests.builders import small_ioi
from tests.known import known_case

KEPT = ("a0.h0", "a0.h3", "m0", "a1.h0", "a1.h1", "a1.h2", "a1.h3")
ASCENT = AscentSettings(steps=4, step_size=0.25, random_starts=1, n_prompts=4)
QUICK = RobustnessSettings(n_subsets=2, densities=[0.5], ascent=ASCENT, fit=RefitSettings(steps=0))


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load_model(LMSpec())


@pytest.fixture(scope="module")
def task():
    return small_ioi(n_test=8, n_means=16, n_validation=8)


@pytest.fixture(scope="module")
def source(model, task):
    return AblationSource(model, task, Graph.of(model.config))


def by_hand(level, names, source, **provenance) -> TrainedCircuit:
    circuit = Circuit(level, tuple(names), provenance={"ablation": "mean"} | provenance)
    return TrainedCircuit(
        "by hand", circuit, replace(source.mean, provenance={"bos_token_id": source.task.bos_token_id})
    )


@pytest.mark.parametrize("kind", [Nodes, Graph])
def test_masks_of_numbers_mix_and_pass_gradients(task, kind):
    model = load_model(LMSpec()).double()
    level, batch = kind.of(model.config), task.batch("test", 0, 3)
    values = AblationSource(model, task, level).mean.replacements(batch, lambda b: read_values(model, b, level))
    values = values.mapped(lambda table: table.double())
    masks = torch.rand(2, len(level), dtype=torch.float64).requires_grad_()
    logits = copies_logits(model, batch, level, masks, values)
    for number in range(2):
        rows = masks[number].detach().expand(3, -1)
        wanted = masked_logits(model, batch, level, rows, values)
        torch.testing.assert_close(logits.view(2, 3, *logits.shape[1:])[number], wanted, rtol=0, atol=1e-10)
    (gradient,) = torch.autograd.grad(logits[..., 7].sum(), masks)
    step = torch.zeros_like(masks)
    step[1, 2] = 1e-5
    with torch.no_grad():
        above, below = (
            copies_logits(model, batch, level, masks + sign * step, values)[..., 7].sum() for sign in (1, -1)
        )
    assert gradient[1, 2].item() == pytest.approx(((above - below) / 2e-5).item(), rel=1e-5, abs=1e-9)


def test_an_ascent_is_sign_steps_inside_the_box(model, task, source):
    level = Nodes.of(model.config)
    ablation, batches = source.mean.of_level(level), list(task.batches("validation", 4))
    free = ~level.mask(KEPT)
    starts = torch.where(free, torch.rand(2, 15), 1.0)
    starts[0] = level.mask(KEPT).float()
    (batch,) = batches
    values, clean = ablation.replacements(batch, lambda b: read_values(model, b, level)), scored_logits(model, batch)

    def loss(mask: torch.Tensor) -> torch.Tensor:
        logits = masked_logits(model, batch, level, mask.expand(4, -1), values)
        return kl_divergence(clean, logits)[:, 0].mean()

    for number, start in enumerate(starts):
        mask, visited = start.clone(), []
        for _ in range(5):
            mask.requires_grad_()
            value = loss(mask)
            (gradient,) = torch.autograd.grad(value, mask)
            visited.append((value.item(), mask.detach()))
            mask = mask.detach().clone()
            mask[free] = (mask + 0.25 * gradient.sign())[free].clamp(0, 1)
        ascended = ascend(model, batches, level, starts, free, ablation, ASCENT)
        highest, wanted = max(visited, key=lambda pair: pair[0])
        assert ascended.first_losses[number].item() == pytest.approx(visited[0][0], rel=1e-4)
        assert ascended.losses[number].item() == pytest.approx(highest, rel=1e-4)
        torch.testing.assert_close(ascended.masks[number], wanted, rtol=0, atol=1e-6)
    assert (ascended.masks >= 0).all()
    assert (ascended.masks <= 1).all()
    assert (ascended.masks[:, ~free] == 1).all()
    assert (ascended.losses >= ascended.first_losses).all()


@pytest.mark.parametrize("edges", [False, True])
def test_every_mask_is_evaluated_on_the_test_prompts(model, task, source, edges):
    level = Graph.of(model.config) if edges else Nodes.of(model.config)
    names = [name for number, name in enumerate(level.names) if number % 2] if edges else KEPT
    run = by_hand(level, names, source)
    findings = Robustness(model, task, [run], QUICK).run()
    facts = findings.facts["ablations"]["mean"]
    search = facts["search"]
    assert search["worst"] >= max(
        search["all_off"], search["random_subsets"], search["worst_vertex"], *search["starts"]
    )
    assert search["worst_vertex"] >= max(search["all_off"], search["random_subsets"])
    outside = [name for name in level.names if name not in run.circuit.names]
    assert set(facts["worst_mask"]) == set(outside)
    assert all(0 <= value <= 1 for value in facts["worst_mask"].values())
    worst = run.circuit.mask.float()
    for name, value in facts["worst_mask"].items():
        worst[level.index(name)] = value
    masks = torch.stack([run.circuit.mask.float(), worst])
    wanted = circuit_behaviour(model, task.batches("test", 8), level, masks, [source.mean.of_level(level)]).kl
    for number, mask in enumerate(("all off", "worst")):
        (row,) = findings.where(mask=mask)
        assert row["kl"].mean == pytest.approx(wanted[number].mean().item(), rel=1e-3, abs=1e-6)
    assert row["kl_minus_all_off"].mean == pytest.approx((wanted[1] - wanted[0]).mean().item(), rel=1e-2, abs=1e-5)
    assert len(findings.where(mask="random subset")) == 2


def test_parts_that_were_not_free_stay(model, task, source):
    run = by_hand(Nodes.of(model.config), ["a0.h0", "m0", "a1.h0"], source, selected=["a1", "a0.h0"])
    findings = Robustness(model, task, [run], QUICK).run()
    assert set(findings.facts["ablations"]["mean"]["worst_mask"]) == {"a1.h1", "a1.h2", "a1.h3"}


def half_harmful() -> CausalLM:
    """A model in which m0 writes 1, and m1 spoils the answer by how far that is from 0 and from 1."""
    n = len(DIGITS)
    model = gpt2(32, DIGITS, n_layers=2, n_heads=2, n_units=12, n_positions=16)
    wiring = Wiring(model, subspaces(32, token=n, output=n), DIGITS, DIGITS, torch_generator("half harmful"))
    support, spoiled = wiring.vector("support"), 4 * wiring.vector("output")
    wiring.add_units(0, [wiring.vector("one")], [support])
    wiring.add_units(1, list(wiring.basis("token")), list(wiring.basis("output")))
    wiring.add_units(1, [support], [spoiled])
    wiring.add_units(1, [2 * support], [-spoiled], bias=-1.0)
    return wiring.finish()


def test_a_part_that_hurts_only_half_on_is_found():
    model, batch = half_harmful(), known_case("digit_sum").batch.rows(slice(0, 8))
    level = Nodes.of(model.config)
    free, zero = level.mask(["m0"]), Constants.zeros(level)
    vertices = torch.stack([torch.ones(len(level)), (~free).float()])
    starts = torch.where(free, 0.15, vertices)
    settings = AscentSettings(steps=8, step_size=0.1, n_prompts=8)
    ascended = ascend(model, [batch], level, starts[1:], free, zero, settings)
    of_vertices = ascend(model, [batch], level, vertices, free, zero, replace(settings, steps=0)).losses
    assert of_vertices.max() < 1e-5
    assert ascended.losses.item() > 1
    assert 0.4 < ascended.masks[0, level.index("m0")].item() < 0.6


def test_other_ablations_and_their_constants(model, task, source):
    run = by_hand(Nodes.of(model.config), KEPT, source)
    settings = replace(QUICK, ablations=["optimal", "resample"])
    findings = Robustness(model, task, [run], settings).run()
    assert {row["ablation"] for row in findings.rows} == {"optimal", "resample"}
    assert {"worst_optimal_kl", "worst_minus_all_off_resample_kl"} <= findings.metrics.keys()
    assert findings.figures["subsets"]() is not None


def test_what_cannot_be_asked_is_refused(model, task, source):
    level = Nodes.of(model.config)
    with pytest.raises(ConfigurationError, match="keeps all components that it could leave out"):
        Robustness(model, task, [by_hand(level, level.names, source)])
    with pytest.raises(ConfigurationError, match="keeps all components"):
        Robustness(model, task, [by_hand(level, KEPT, source, selected=["m0"])])
    with pytest.raises(ConfigurationError, match="n_prompts is 16, but there are 8 validation prompts"):
        Robustness(model, task, [by_hand(level, KEPT, source)])
    with pytest.raises(ConfigurationError, match="expects one circuit"):
        Robustness(model, task)
    for settings, message in (
        ({"densities": [1.5]}, "densities names 1.5"),
        ({"densities": [0.5, 0.5]}, "twice"),
        ({"n_subsets": -1}, "n_subsets is -1"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"ablations": ["clean"]}, "restores the model's own values"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            RobustnessSettings(**settings)
    for name, value in (("steps", -1), ("n_prompts", 0), ("step_size", 0.0), ("step_size", 2.0)):
        with pytest.raises(ConfigurationError, match=f"{name} is {value}"):
            AscentSettings(**{name: value})


def test_on_the_command_line(model, task, source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, folder = by_hand(Nodes.of(model.config), KEPT, source), Path("runs/nodes/version_0")
    run.save_circuit(folder)
    run.save_constants(folder)
    (folder / "config.yaml").write_text("lm: {name: tiny}\ndata: IOI\n")
    command = ["robustness", "--run", str(folder), "--data.n_test", "8", "--data.n_validation", "4"]
    command += ["--robustness.ascent.steps", "2", "--robustness.ascent.n_prompts", "4", "--robustness.n_subsets", "2"]
    assert main(command) == 0
    said = capsys.readouterr().out
    for words in ("7 of 15 components", "worst vertex", "2 random subsets, 50% kept", "The 8 components outside are"):
        assert words in said
    study = folder / "studies" / "robustness_0"
    assert json.loads((study / "results.json").read_text())["n_outside"] == 8
    assert (study / "figures" / "subsets.png").stat().st_size > 10_000
    assert main(["robustness", "--run", str(folder), "--robustness.densities", "[2]"]) == 2
    assert "densities names 2" in capsys.readouterr().err
