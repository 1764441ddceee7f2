"""The page docs/python.md runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

from oa_train.ablations.fitting import RefitSettings
from oa_train.errors import ArtefactError
from oa_train.studies.finish_circuits import FinishSettings, finish
from oa_train.studies.run_folder import RunFolder
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.data import TaskData
from tests.builders import quiet_trainer, small_ioi

PAGE = Path(__file__).parent.parent / "docs" / "python.md"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task, module = small_ioi(n_validation=8, n_test=8, n_means=8), CircuitModule()
    quiet_trainer(max_steps=1).fit(module, datamodule=TaskData(task))
    module.masks.distribution.logits.data.copy_(torch.linspace(-2, 2, len(module.level)))
    folder = Path("runs/circuit_nodes_tiny/version_0")
    finish(module.frozen, task, module.trained_circuits(), folder, FinishSettings(refit=RefitSettings(steps=0)))
    return RunFolder(folder)


def test_the_lines_of_the_page_run(run):
    run.save_config({"lm": {"name": "tiny", "trust_remote_code": True}})
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    space: dict = {}
    exec(compile(code, str(PAGE), "exec"), space)
    assert Path("keep_probability.png").stat().st_size > 5_000
    assert list(space["scores"][space["scores"].kept].part) == list(space["circuit"].names)
    assert space["top"].keep_probability.is_monotonic_decreasing
    assert space["logits"].shape[1] == space["prompt"]["input_ids"].shape[1]
    assert not run.lm().trust_remote_code


def test_a_model_that_has_moved_is_named_anew(run):
    run.save_config({"lm": {"name": "/gone/model"}})
    with pytest.raises(ArtefactError, match=r"/gone/model, which is not there(.|\n)*--lm.name FOLDER"):
        run.lm()
    assert run.lm("tiny").name == "tiny"
