"""The end of a training of lenses or of the constants of tracing."""

import json

import pytest

from oa_train.studies.finish import finish_fit
from oa_train.studies.finish_circuits import FinishSettings
from oa_train.studies.finish_losses import NO_VALIDATION
from oa_train.training.data import TaskData
from oa_train.training.lens_module import LensModule
from oa_train.training.tracing_module import TracingModule
from tests.builders import quiet_trainer, small_ioi

MODULES = {
    "lens": (lambda: LensModule(lenses=["oca", "tuned"], layers=[0, 2]), "kl"),
    "tracing": (lambda: TracingModule(subject="S2", at=["-1"], windows=[1]), "probability_lost"),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("max_steps", [1, 2])
def test_without_any_validation_the_last_state_is_kept_and_its_losses_are_unknown(tmp_path, name, max_steps):
    make, loss = MODULES[name]
    module, task = make(), small_ioi(batches_per_epoch=2)
    quiet_trainer(max_steps=max_steps).fit(module, datamodule=TaskData(task))
    findings = finish_fit(module, task, tmp_path, FinishSettings())
    written = json.loads((tmp_path / "studies" / "fit_0" / "results.json").read_text())
    losses = [row[loss] for row in written["rows"]]
    validated = max_steps == 2
    assert all((value is not None and value > 0) is validated for value in losses)
    assert (findings.shown[0] == NO_VALIDATION) is not validated
    assert (tmp_path / name).is_dir()
