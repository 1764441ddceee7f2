"""Speed and memory of training in one process and in several, in single and half precision.

    python -m benchmarks.scaling            GPT-2-small shape, random weights
    python -m benchmarks.scaling --quick    a small shape

Every arrangement is a `Trainer.fit` in processes of its own. All are run in turn, in several rounds, because machines
drift: speeds are compared within a round, and medians over rounds are reported. Each process has the same
batch whatever the arrangement, so two processes do twice the work in a step. With `--accelerator gpu` the arrangements
are those of as many GPUs as there are. Each line of the output is one JSON object:

    steps_per_second       of `Trainer.fit`, including everything between two steps
    prompts_per_second     of all processes together
    ratio                  of prompts per second to those of the first arrangement, in the same round
    weights_bytes          the frozen model, or the process's share of it
    above_weights_bytes    peak bytes of all other tensors, by torch's allocator
    estimated_bytes        the same, as estimated by `oa-train inspect`
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.nodes import RandomTokens, make_model
from benchmarks.timing import POSITIONS, SAMPLES
from oa_train import CircuitModule, LMSpec, TaskData
from oa_train.cli.quiet import silence_libraries
from oa_train.diagnostics.memory import StepSettings, node_step_memory
from oa_train.models.loading import empty_model
from oa_train.training.strategies import ShardedStrategy

PROMPTS = 4
WARM_UP = 2


@dataclass(frozen=True)
class Arrangement:
    """One way to train.

    Attributes:
        name: what it is called in the results.
        processes: how many.
        strategy: `auto`, `ddp` or `fsdp`.
        dtype: of the frozen model.
        precision: of the trainer.
        recompute: of the module.
    """

    name: str
    processes: int = 1
    strategy: str = "auto"
    dtype: str = "float32"
    precision: str = "32-true"
    recompute: bool = False


def arrangements(n_devices: int) -> list[Arrangement]:
    """Those that make sense with so many devices; the first is what the others are compared with."""
    alone = [
        Arrangement("float32"),
        Arrangement("bfloat16", dtype="bfloat16"),
        Arrangement("bf16-mixed", precision="bf16-mixed"),
        Arrangement("float32, recompute", recompute=True),
        Arrangement("float32, fsdp", strategy="fsdp"),
    ]
    if n_devices == 1:
        return alone
    together = [
        Arrangement(f"{n_devices} x float32, ddp", n_devices, "ddp"),
        Arrangement(f"{n_devices} x bfloat16, ddp", n_devices, "ddp", dtype="bfloat16"),
        Arrangement(f"{n_devices} x float32, fsdp", n_devices, "fsdp"),
        Arrangement(f"{n_devices} x bfloat16, fsdp", n_devices, "fsdp", dtype="bfloat16"),
    ]
    return alone[:-1] + together


class Measurement(lightning.Callback):
    """Times steps, and in one more step watches the memory.

    Args:
        n_timed: steps that are timed, after a few that are not.
    """

    def __init__(self, n_timed: int) -> None:
        self._n_timed = n_timed
        self._ends: list[float] = []
        self._profile: Any = None
        self.above_weights = 0
        self.weights = 0

    @property
    def seconds(self) -> float:
        """Median time from the end of one timed step to that of the next."""
        ends = self._ends[WARM_UP - 1 : WARM_UP + self._n_timed]
        return statistics.median(after - before for before, after in itertools.pairwise(ends))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: object, batch_idx: int) -> None:
        """Begin to watch the memory when all timed steps are done."""
        if batch_idx != WARM_UP + self._n_timed:
            return
        frozen = [*pl_module.frozen.parameters(), *pl_module.frozen.buffers()]
        self.weights = sum(_bytes_of(tensor) for tensor in frozen)
        self.above_weights = sum(_bytes_of(tensor) for tensor in _trained(trainer, pl_module))
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()

    def on_train_batch_end(self, trainer: Any, *_: object) -> None:
        """Note the time, or what was seen of the memory."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self._ends.append(time.perf_counter())
        if len(self._ends) != WARM_UP + self._n_timed + 1:
            return
        if self._profile is None:
            self.above_weights = torch.cuda.max_memory_allocated() - self.weights
        else:
            self._profile.__exit__(None, None, None)
            self.above_weights += allocated_peak(self._profile)


def _trained(trainer: Any, module: Any) -> list[torch.Tensor]:
    """Bytes kept between two steps besides the model: parameters, gradients, moments."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    return [
        *parameters,
        *gradients,
        *(value for state in states for value in state.values() if torch.is_tensor(value)),
    ]


def _bytes_of(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def allocated_peak(watched: Any) -> int:
    """Most bytes that were taken from the allocator at one time, less what there was at the beginning."""
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def run_job(arrangement: Arrangement, folder: Path, accelerator: str, n_timed: int) -> None:
    """Train under one arrangement; the first process writes what it measured into the folder."""
    lm = LMSpec(str(folder / "model"), dtype=arrangement.dtype)  # type: ignore[arg-type] # checked by LMSpec
    task = RandomTokens(lm=lm, batch_size=PROMPTS, batches_per_epoch=WARM_UP + n_timed + 1)
    module = CircuitModule(lm=lm, samples_per_prompt=SAMPLES, recompute=arrangement.recompute)
    measurement = Measurement(n_timed)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator=accelerator,
        devices=arrangement.processes,
        strategy={"auto": "auto", "ddp": DDPStrategy(), "fsdp": ShardedStrategy()}[arrangement.strategy],
        precision=arrangement.precision,  # type: ignore[arg-type]
        callbacks=[measurement],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=TaskData(task))
    if trainer.is_global_zero:
        measured = {
            "seconds": measurement.seconds,
            "weights_bytes": measurement.weights,
            "above_weights_bytes": measurement.above_weights,
        }
        (folder / "measured.json").write_text(json.dumps(measured))


def measure(arrangement: Arrangement, folder: Path, accelerator: str, n_timed: int) -> dict[str, Any]:
    """Run one arrangement in processes of its own."""
    words = ["--job", json.dumps(asdict(arrangement)), "--folder", str(folder), "--accelerator", accelerator]
    command = [sys.executable, "-m", "benchmarks.scaling", *words, "--steps", str(n_timed)]
    subprocess.run(command, check=True)  # noqa: S603 (our own command line)
    measured: dict[str, Any] = json.loads((folder / "measured.json").read_text())
    return measured


def estimated(arrangement: Arrangement, folder: Path) -> int:
    """Bytes above the weights as estimated by `oa-train inspect`."""
    settings = StepSettings(
        PROMPTS,
        POSITIONS,
        SAMPLES,
        autocast=arrangement.precision.endswith("-mixed"),
        recompute=arrangement.recompute,
        strategy=arrangement.strategy,  # type: ignore[arg-type]
        n_processes=arrangement.processes,
    )
    model = empty_model(LMSpec(str(folder / "model"), dtype=arrangement.dtype))  # type: ignore[arg-type]
    memory = node_step_memory(model, settings)
    return memory.total - memory.weights


def compare(shape: str, accelerator: str, rounds: int, n_timed: int) -> list[dict[str, Any]]:
    """All rows."""
    n_devices = torch.cuda.device_count() if accelerator == "gpu" else 2
    ways = arrangements(n_devices)
    with TemporaryDirectory() as name:
        folder = Path(name)
        make_model(shape, folder / "model")
        measured = [[measure(way, folder, accelerator, n_timed) for way in ways] for _ in range(rounds)]
        estimates = [estimated(way, folder) for way in ways]
    rows = []
    for number, way in enumerate(ways):
        times = [in_round[number]["seconds"] for in_round in measured]
        ratios = [way.processes * in_round[0]["seconds"] / in_round[number]["seconds"] for in_round in measured]
        last = measured[-1][number]
        rows.append(
            {
                "name": way.name,
                "shape": shape,
                "accelerator": accelerator,
                "steps_per_second": round(1 / statistics.median(times), 3),
                "prompts_per_second": round(way.processes * PROMPTS / statistics.median(times), 2),
                "ratio": round(statistics.median(ratios), 3),
                "weights_bytes": last["weights_bytes"],
                "above_weights_bytes": last["above_weights_bytes"],
                "estimated_bytes": estimates[number],
                "rounds": rounds,
            }
        )
    return rows


def main() -> None:
    """Run one job, or all rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape")
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a round")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    silence_libraries()
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    torch.set_num_threads(1)
    if options.job is not None:
        run_job(Arrangement(**json.loads(options.job)), options.folder, options.accelerator, options.steps)
        return
    about = {"torch": torch.__version__, "machine": platform.machine(), "threads_per_process": 1}
    for row in compare("quick" if options.quick else "gpt2-small", options.accelerator, options.rounds, options.steps):
        print(json.dumps(row | about), flush=True)


if __name__ == "__main__":
    main()
