"""Half precision is for the frozen model; what is trained, and what it is trained on, stays in single precision."""

from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from oa_train.cli.main import main
from oa_train.masks.hard_concrete import HardConcrete
from oa_train.masks.uniform import UniformGradientSampling
from oa_train.metrics.divergence import kl_divergence
from oa_train.models.spec import LMSpec
from oa_train.training.checkpoints import read_checkpoint
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.constants_module import ConstantsModule
from oa_train.training.data import TaskData
from tests.builders import quiet_trainer, small_ioi
from tests.jobs.fits import SMALL

# How the frozen model computes, and the trainer's precision.
WAYS = {"bf16-mixed": (LMSpec(), "bf16-mixed"), "bfloat16": (LMSpec(dtype="bfloat16"), "32-true")}
EXACT = (LMSpec(), "32-true")


class Seen(Callback):
    """Notes the gradients of every step and the data types of all that is trained."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []
        self.losses: list[float] = []
        self.dtypes: set[torch.dtype] = set()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        trained = list(pl_module.named_trainables().values())
        self.dtypes |= {tensor.dtype for p in trained for tensor in (p, p.grad)}
        self.gradients.append(torch.cat([p.grad.flatten() for p in trained]))
        self.losses.append(float(trainer.callback_metrics.get("train/loss", torch.nan)))

    def on_train_end(self, trainer, pl_module) -> None:
        for state in trainer.optimizers[0].state.values():
            self.dtypes |= {value.dtype for value in state.values()}


def trained(way: tuple[LMSpec, str], made) -> tuple[Seen, torch.nn.Module]:
    lm, precision = way
    seen, module = Seen(), made(lm)
    trainer = quiet_trainer(precision=precision, max_steps=2, callbacks=[seen])
    trainer.fit(module, TaskData(small_ioi(lm=lm, batch_size=16)))
    return seen, module


ABLATION_KINDS = {
    "uniform": lambda lm: CircuitModule(lm=lm, masks=UniformGradientSampling),
    "hard_concrete": lambda lm: CircuitModule(lm=lm, masks=lambda n: HardConcrete(n, initial_logit=0.0)),
    "constants": lambda lm: ConstantsModule(lm=lm, keep="m*"),
}


@pytest.mark.parametrize("kind", ABLATION_KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_half_precision_changes_little_and_nothing_that_is_trained(way, kind):
    exact, _ = trained(EXACT, ABLATION_KINDS[kind])
    half, module = trained(WAYS[way], ABLATION_KINDS[kind])
    assert half.dtypes == {torch.float32}
    # The data type of the model is what was asked for, so something was indeed computed in half precision.
    assert module.frozen.dtype is getattr(torch, module.lm.dtype)
    assert not torch.equal(exact.gradients[0], half.gradients[0])
    cosine = torch.nn.functional.cosine_similarity(exact.gradients[0], half.gradients[0], dim=0)
    assert cosine > 0.999
    assert half.losses[1] == pytest.approx(exact.losses[1], rel=0.02)


def test_divergences_are_in_single_precision_under_autocast():
    generator = torch.Generator().manual_seed(0)
    clean, masked = (torch.randn(8, 1, 5000, generator=generator).to(torch.bfloat16) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = kl_divergence(clean, masked)
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (clean, masked))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_bf16_true_on_the_command_line_leaves_what_is_trained_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--lm.dtype", "bfloat16", "--trainer.precision", "bf16-true", "--trainer.max_steps", "3"]
    assert main(["fit", *SMALL, *words]) == 0
    run = Path("runs/circuit_nodes_tiny/version_0")
    state = read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float32}
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["precision"] == "bf16-true"
