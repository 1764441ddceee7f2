"""Joint effects beside single ones: right values, a known backup, what is screened out, and bad input."""

import json
from itertools import combinations
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch

from oa_train.ablations.evaluation import circuit_behaviour, clean_behaviour
from oa_train.ablations.fitting import RefitSettings
from oa_train.ablations.registry import ABLATION_KINDS, AblationSource
from oa_train.cli.main import main
from oa_train.errors import OaTrainError
from oa_train.metrics.ground_truth import recovery
from oa_train.models.frozen import CausalLM
from oa_train.models.loading import load_model
from oa_train.models.selection import Nodes
from oa_train.models.spec import LMSpec
from oa_train.studies.interact import Interact, InteractSettings
from oa_train.studies.joint_sets import n_screened
from oa_train.studies.scan import Scan, ScanSettings
from oa_train.studies.unit_study import UnitStudy
from oa_train.zoo.known.backup_induction import BACKUP, PRIMARY
from tests.builders import small_ioi
from tests.known import known_case
from tests.studies.test_plans import check_plan

BRIEF = RefitSettings(steps=2, batch_size=2, evaluate_every=2)
FIT = RefitSettings(steps=6, batch_size=4, evaluate_every=3)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load_model(LMSpec())


@pytest.fixture(scope="module")
def task():
    return small_ioi(n_validation=4, n_test=8, n_means=8)


def run(model: CausalLM, task: Any, **settings: Any):
    return Interact(model, task, settings=InteractSettings(**settings)).run()


@pytest.mark.parametrize("kind", ["mean", "resample"])
def test_interactions_are_the_joint_effect_minus_the_single_ones(model, task, kind):
    names, primary = ("a0.h1", "a1.h0", "m1"), ("a1.h1", "m0")
    findings = run(model, task, components=[*names], ablation=kind, pairs="all", primary=[*primary], groups=[[*names]])
    level, batches = Nodes.of(model.config), list(task.batches("test", 8))
    ablation = ABLATION_KINDS[kind].prepare(AblationSource(model, task, level))
    clean = clean_behaviour(model, batches).logit_difference

    def effects(*ablated: str) -> dict[str, torch.Tensor]:
        behaviour = circuit_behaviour(model, batches, level, ~level.mask(ablated).unsqueeze(0), [ablation])
        fall = clean - behaviour.logit_difference
        return {"kl": behaviour.kl.double()[0], "logit_difference": fall.double()[0]}

    def check(row: Any, members: list[tuple[str, ...]]) -> None:
        joint, apart = (
            effects(*(name for member in members for name in member)),
            [effects(*names) for names in members],
        )
        for loss, both in joint.items():
            expected = both - sum(values[loss] for values in apart)
            interaction = row[f"{loss}_interaction"]
            assert interaction.mean == pytest.approx(expected.mean().item(), abs=2e-5)
            assert interaction.stderr == pytest.approx(expected.std().item() / 8**0.5, rel=1e-2, abs=1e-5)
            assert row[f"{loss}_joint"].mean == pytest.approx(both.mean().item(), abs=2e-5)

    for pair in combinations(names, 2):
        (row,) = findings.where(form="pair", units=" + ".join(pair))
        check(row, [(name,) for name in pair])
    check(findings.where(form="group")[0], [(name,) for name in names])
    for name in names:
        (row,) = findings.where(form="conditional", units=name)
        check(row, [primary, (name,)])
        growth = row["kl_conditional"].mean - row["kl_alone"].mean
        assert row["kl_interaction"].mean == pytest.approx(growth)
    sizes = [abs(row["kl_interaction"].mean) for row in findings.rows if row["form"] != "conditional"]
    assert sizes == sorted(sizes, reverse=True)


@pytest.fixture(scope="module")
def known():
    case = known_case("backup_induction")
    return case.model, case.task


def test_the_backup_is_found_as_the_pair_that_matters_only_together(known):
    findings = run(*known, components=["a[23].h[01]", "a1.h2", "a0.h[12]"], fit=FIT)
    first, *others = findings.rows
    assert first["units"] == f"{PRIMARY} + {BACKUP}"
    assert first["kl_interaction"].ci95[0] > 1
    assert first["significant"]
    assert all(abs(findings.facts["alone"][name].mean) < 1e-4 for name in (PRIMARY, BACKUP))
    assert all(abs(row["kl_interaction"].mean) < 1e-3 for row in others)
    assert sum(row["significant"] for row in findings.rows) == 1
    assert findings.figures["pairs"]() is not None


@pytest.mark.parametrize("ablation", ["mean", "zero", "optimal"])
def test_given_the_primary_head_the_backup_grows_most(known, ablation):
    fit = RefitSettings(steps=0)
    findings = run(*known, sites=["heads"], primary=PRIMARY, ablation=ablation, fit=fit)
    assert findings.rows[0]["units"] == BACKUP
    assert findings.rows[0]["kl_interaction"].ci95[0] > 1
    assert len(findings.rows) == 11
    growth = torch.tensor([row["kl_interaction"].mean for row in findings.rows])
    true = torch.tensor([row["units"] == BACKUP for row in findings.rows])
    assert recovery(true, true, growth).auroc == 1
    assert abs(findings.rows[0]["kl_alone"].mean) < 1e-4


def test_another_prompt_s_value_keeps_the_backup_silent(known):
    findings = run(*known, sites=["heads"], pairs=[[BACKUP, PRIMARY]], ablation="resample")
    (row,) = findings.rows
    assert findings.facts["alone"][PRIMARY].mean > 1
    assert abs(row["kl_interaction"].mean) < 0.1


def test_pairs_are_screened_by_single_effects_and_that_is_said(model, task, tmp_path):
    scan = Scan(model, task, settings=ScanSettings(ablations=["mean"])).run_in(tmp_path)
    effects = {row["component"]: row["kl"].mean for row in scan.rows}
    chosen = sorted(effects, key=lambda name: -effects[name])[:3]
    measured = run(model, task, ablation="mean", most_pairs=5)
    read = run(model, task, ablation="mean", most_pairs=5, scan=str(scan.folder))
    for findings in (measured, read):
        assert {name for row in findings.rows for name in row["units"].split(" + ")} == set(chosen)
        assert len(findings.facts["screened_out"]) == 12
        assert any(
            "Screened out: 12 of 15 units" in str(line) and "102 of 105 pairs" in str(line) for line in findings.shown
        )
    assert len(measured.facts["alone"]) == 15
    assert set(read.facts["alone"]) == set(chosen)
    assert "in the scan under mean ablation" in next(str(line) for line in read.shown if "Screened" in str(line))
    assert measured.flat_rows()[0]["kl_interaction"] == pytest.approx(read.flat_rows()[0]["kl_interaction"], abs=1e-6)
    other, file = known_case("backup_induction"), scan.folder / "results.json"
    with pytest.raises(OaTrainError, match="was made with the model"):
        Interact(other.model, other.task, settings=InteractSettings(scan=str(file)))
    with pytest.raises(OaTrainError, match=r"ranks a0.h0, .* which this selection does not have"):
        Interact(
            model,
            task,
            settings=InteractSettings(scan=str(file), ablation="mean", sites=["attention", "mlp", "residual"]),
        )
    with pytest.raises(OaTrainError, match=r"has no results\.json"):
        Interact(model, task, settings=InteractSettings(scan=str(tmp_path)))


def test_a_budget_of_pairs_is_kept():
    for most in range(1, 200):
        n = n_screened(1000, most)
        assert n * (n - 1) // 2 <= most < (n + 1) * n // 2
    assert n_screened(5, 10**6) == 5


def test_it_does_what_it_says_and_goes_on_where_it_stopped(model, task, tmp_path, monkeypatch):
    settings = InteractSettings(
        components=["a0*", "m*"], most_pairs=6, pairs="all", primary=["a1.h0", "a1.h1"], parts_at_once=3, fit=BRIEF
    )
    expected = Interact(model, task, settings=settings)
    check_plan(expected)
    stopped, folder = Interact(model, task, settings=settings), tmp_path / "studies" / "interact_0"
    behaviours = UnitStudy.behaviours

    def without_sets(ablations: UnitStudy, sets: Any, described: str, *others: Any) -> Any:
        if described == "sets of units":
            raise KeyboardInterrupt
        return behaviours(ablations, sets, described, *others)

    with monkeypatch.context() as patched:
        patched.setattr(UnitStudy, "behaviours", without_sets)
        with pytest.raises(KeyboardInterrupt):
            stopped.run_in(tmp_path)
    assert sorted(file.stem for file in folder.glob("pieces/*.safetensors")) == ["0000", "0001", "0002"]
    resumed = Interact(model, task, settings=settings)
    resumed.resume(folder)
    findings = resumed.write(resumed.answer(), folder)
    assert json.dumps(findings.flat_rows()) == json.dumps(expected.run().flat_rows())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": [["a0.h0", "a0.h9"]]}, "The pattern 'a0.h9' matches no component .* Did you mean a0.h"),
        ({"pairs": [["a0.h0", "a0.h0"]]}, "a0.h0 with itself"),
        ({"pairs": [["a0.h0"]]}, r"pairs has \['a0.h0'\]; expected two names"),
        ({"pairs": []}, "pairs is empty"),
        ({"groups": [["m1"]]}, r"The group \['m1'\] selects m1; expected at least two units"),
        ({"groups": [["m1", "m7"]]}, "The pattern 'm7' matches no component"),
        ({"primary": "a7.h0"}, "The pattern 'a7.h0' matches no component"),
        ({"primary": "*"}, "contains all 15 selected units"),
        ({"components": "m1", "primary": "m1"}, "contains all 1 selected units"),
        ({"components": []}, r"components \[\] selects no unit; expected at least two units"),
        ({"components": "m1"}, "selects m1; expected at least two units"),
        ({"components": ["*", "!*"], "primary": "m1"}, "selects no unit; expected at least one unit"),
        ({"ablation": "optimum"}, "Did you mean optimal"),
        ({"ablation": "clean"}, "restores the model's own values"),
        ({"most_pairs": 0}, "most_pairs is 0"),
        ({"threshold": nan}, "threshold is nan"),
        ({"parts_at_once": 0}, "parts_at_once is 0"),
    ],
)
def test_bad_input_is_told_before_any_work(model, task, settings, message):
    with pytest.raises(OaTrainError, match=message):
        Interact(model, task, settings=InteractSettings(**settings))


def test_the_command_writes_table_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["interact", "--data", "IOI", "--data.n_test", "8", "--data.n_means", "8", "--data.n_validation", "4"]
    words += ["--interact.fit.steps", "1", "--interact.pairs", "[[a1.h0,m1],[m1,m2]]", "--interact.primary", "a1.h0"]
    assert main([*words, "--interact.components", "m*"]) == 0
    folder = Path("runs/interact/version_0/studies/interact_0")
    assert {file.name for file in (folder / "figures").iterdir()} == {"pairs.png", "ranked.png", "conditional.png"}
    results = json.loads((folder / "results.json").read_text())
    assert [row["form"] for row in results["rows"]] == ["pair"] * 2 + ["conditional"] * 3
    assert results["primary"] == ["a1.h0"]
    assert (folder / "tables" / "interactions.csv").is_file()
    assert main([*words, "--interact.primary", "a1.h7"]) == 2
    assert "a1.h7" in capsys.readouterr().err
