"""Cost of a training step on a pretrained model relative to the plain model, and its scaling with threads.

    python -m benchmarks.real_steps               nodes, edges, growth with heads, and `Trainer.fit`
    python -m benchmarks.real_steps --only nodes  one of them: nodes, edges, heads or trainer
    python -m benchmarks.real_steps --only threads

The model is that of `make real`, SmolLM2-135M; the prompts are of indirect object identification, 4 x 2 mask samples.
Contestants take turns, in one order and then in reverse, so that other load on the machine affects all alike; a
ratio is that of one turn, with median and quartiles over turns. Seconds are CPU seconds of all threads of the process,
because other load stretches wall time. Each line of the output is one JSON object.

    floor      Hugging Face's own forward and backward to a parameter added to the embedding, on all 8 rows, logits at
               the scored position, KL divergence
    clean      Hugging Face's own forward on the 4 prompts, no gradient
    step       our whole step: batch, clean forward, masks, masked forward and backward, Adam for masks and constants
    heads      an edge step again, of random weights in the same shape, with other numbers of heads of the same total
               width
    trainer    a step inside `Trainer.fit` with the loggers and callbacks of `oa-train fit`, against the same in a bare
               loop; `total` is of all steps together, including occasional work such as logging, `clock` the same in
               wall time
    threads    a node step with two threads against one with a single thread, in separate processes, in wall time and
               CPU time
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from transformers import AutoModelForCausalLM

from benchmarks.real_model import real_model
from oa_train import CircuitModule, LMSpec, TaskData
from oa_train.batches import Batch
from oa_train.cli.quiet import silence_libraries
from oa_train.engine.forward import model_inputs
from oa_train.metrics.divergence import kl_divergence
from oa_train.models.frozen import CausalLM, freeze
from oa_train.models.graph import Graph
from oa_train.models.loading import load_config
from oa_train.tasks.ioi import IOI
from oa_train.training.callbacks import BestCheckpoint, LastCheckpoint, MaskImages
from oa_train.training.checkpoints import WholeFileCheckpointIO
from oa_train.training.interruption import StopAtSignal

PROMPTS, SAMPLES = 4, 2
PARTS = ("nodes", "edges", "heads", "trainer", "threads")
HEADS = (9, 18)

Step = Callable[[], object]


def prompts_of(lm: LMSpec, n_batches: int = 1000) -> IOI:
    """The task."""
    return IOI(lm=lm, sentences="literature", batch_size=PROMPTS, batches_per_epoch=n_batches, n_means=8)


def circuit_module(lm: LMSpec, level: str) -> CircuitModule:
    """A module with the settings of the shipped configurations for this model, and one circuit."""
    return CircuitModule(lm=lm, level=level, samples_per_prompt=SAMPLES, penalty_weight=1e-4)  # type: ignore[arg-type]


def plain_logits(model: CausalLM, batch: Batch, shift: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of the plain model at the scored positions; `shift` is added to the embedding."""
    inputs, base, unembedding = model_inputs(batch), model.base_model, model.get_output_embeddings()
    if shift is not None:
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")) + shift  # type: ignore[operator]
    hidden = base(**inputs).last_hidden_state[torch.arange(len(batch.tokens))[:, None], batch.scored]  # type: ignore[operator]
    logits: torch.Tensor = unembedding(hidden)  # type: ignore[operator]
    return logits


def floor(model: CausalLM, batch: Batch) -> Step:
    """Forward and backward of the plain model on all rows of a step."""
    rows, shift = batch.repeat(SAMPLES), torch.zeros(model.config.hidden_size, requires_grad=True)
    with torch.no_grad():
        clean = plain_logits(model, batch).repeat(SAMPLES, 1, 1)

    def run() -> None:
        kl_divergence(clean, plain_logits(model, rows, shift)).mean().backward()
        shift.grad = None

    return run


def clean(model: CausalLM, batch: Batch) -> Step:
    """Forward of the plain model on the prompts."""

    @torch.no_grad()
    def run() -> None:
        plain_logits(model, batch)

    return run


def whole_step(module: CircuitModule, task: IOI) -> Step:
    """A training step in a bare loop, on the next batch at every call."""
    optimizer, numbers = module.configure_optimizers(), iter(range(10**6))

    def run() -> None:
        batch = task.batch("train", next(numbers))
        optimizer.zero_grad(set_to_none=True)
        lost, penalty = module.masked_loss(batch, module.clean_logits(batch))
        (lost + penalty).sum().backward()
        optimizer.step()

    return run


def in_turns(contestants: dict[str, Step], repetitions: int) -> dict[str, list[float]]:
    """Seconds of every contestant in each turn, after one turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repetitions + 1):
        for name in [*contestants] if turn % 2 else [*reversed(contestants)]:
            start = time.process_time()
            contestants[name]()
            if turn:
                times[name].append(time.process_time() - start)
    return times


def spread(values: list[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "quartiles": [low, high], "n": len(values)}


def rounded(value: Any) -> Any:
    """Nested figures with four digits after the point."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value


def step_ratio(lm: LMSpec, module: CircuitModule, repetitions: int) -> dict[str, Any]:
    """A step of a module beside the plain model."""
    task = prompts_of(lm)
    batch = task.batch("train", 0)
    contestants = {
        "floor": floor(module.frozen, batch),
        "clean": clean(module.frozen, batch),
        "step": whole_step(module, task),
    }
    times = in_turns(contestants, repetitions)
    turns = zip(*times.values(), strict=True)
    return {
        "ratio": spread([step / (plain + forward) for plain, forward, step in turns]),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "tokens": batch.tokens.shape[1],
    }


def growth(lm: LMSpec, repetitions: int) -> Iterator[dict[str, Any]]:
    """An edge step against the number of heads, in models of one shape and cost."""
    for heads in HEADS:
        config = load_config(lm)
        config.update({"num_attention_heads": heads, "num_key_value_heads": heads // 3})
        config.head_dim = config.hidden_size // heads
        torch.manual_seed(0)
        model: CausalLM = AutoModelForCausalLM.from_config(config)
        freeze(model)
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            prompts_of(lm).tokenizer.save_pretrained(folder)
            edges = len(Graph.of(config))
            del model
            spec = LMSpec(folder)
            yield {"heads": heads, "edges": edges, **step_ratio(spec, circuit_module(spec, "edges"), repetitions)}


class InTurns(lightning.Callback):
    """Times each step of `Trainer.fit` from one batch's end to the next, in turns with a bare step outside of it.

    Args:
        bare: the bare step.

    Attributes:
        turns: for each step, seconds of the processor and of the clock, of the trainer and of the bare step after it.
    """

    def __init__(self, bare: Step) -> None:
        self._bare = bare
        self._start: torch.Tensor | None = None
        self.turns: list[torch.Tensor] = []

    def on_train_batch_start(self, *_: object) -> None:
        """Stop the clocks, time a bare step, start the clocks: the callbacks of the batch before have all run."""
        end = _now()
        self._bare()
        if self._start is not None:
            self.turns.append(torch.stack([end - self._start, _now() - end]))
        self._start = _now()


def _now() -> torch.Tensor:
    return torch.tensor([time.process_time(), time.perf_counter()], dtype=torch.float64)


def trainer_ratio(lm: LMSpec, steps: int, folder: Path) -> dict[str, Any]:
    """A step of `Trainer.fit`, as the command line builds it, beside one of a bare loop."""
    task = prompts_of(lm, steps)
    clock = InTurns(whole_step(circuit_module(lm, "nodes"), prompts_of(lm)))
    last = LastCheckpoint(folder / "checkpoints")
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=[TensorBoardLogger(folder), CSVLogger(folder)],
        callbacks=[
            clock, BestCheckpoint(folder / "checkpoints"), last, StopAtSignal(last), MaskImages(), RichProgressBar()
        ],
        plugins=[WholeFileCheckpointIO()],
        log_every_n_steps=10,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(circuit_module(lm, "nodes"), datamodule=TaskData(task))
    turns = torch.stack(clock.turns[2:])  # [step, trainer or bare, processor or clock]
    processor, total = turns[:, :, 0], turns.sum(dim=0)
    return {
        "ratio": spread((processor[:, 0] / processor[:, 1]).tolist()),
        **dict(zip(("total", "clock"), (total[0] / total[1]).tolist(), strict=True)),
        "seconds": dict(zip(("trainer", "bare"), processor.median(dim=0).values.tolist(), strict=True)),
    }


def worker(lm: LMSpec) -> None:
    """Make steps when told how many on stdin, and write their seconds and CPU seconds."""
    task, module = prompts_of(lm), circuit_module(lm, "nodes")
    step = whole_step(module, task)
    step()
    print("ready", flush=True)
    for line in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            step()
        print(time.perf_counter() - start, time.process_time() - cpu, flush=True)


def threads_ratio(lm: LMSpec, steps: int, repetitions: int) -> dict[str, Any]:
    """Some node steps with two threads beside as many with one."""
    command = [sys.executable, "-m", "benchmarks.real_steps", "--worker", lm.name]
    workers = {
        threads: subprocess.Popen(  # noqa: S603 (our own command line)
            command,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for threads in (1, 2)
    }

    def asked(process: subprocess.Popen[str]) -> Callable[[], tuple[float, float]]:
        assert process.stdin is not None
        assert process.stdout is not None

        def run() -> tuple[float, float]:
            print(steps, file=process.stdin, flush=True)
            wall, cpu = map(float, process.stdout.readline().split())  # type: ignore[union-attr]
            return wall / steps, cpu / steps

        assert process.stdout.readline() == "ready\n"
        return run

    turns = {threads: asked(process) for threads, process in workers.items()}
    figures: dict[int, list[tuple[float, float]]] = {threads: [] for threads in turns}
    for number in range(repetitions):
        for threads in (1, 2) if number % 2 else (2, 1):
            figures[threads].append(turns[threads]())
    for process in workers.values():
        process.communicate()
    pairs = [*zip(figures[1], figures[2], strict=True)]
    return {
        "wall_ratio": spread([two[0] / alone[0] for alone, two in pairs]),
        "cpu_ratio": spread([two[1] / alone[1] for alone, two in pairs]),
        "seconds": {f"{n} threads": statistics.median(w for w, _ in figures[n]) for n in figures},
    }


def measured(part: str, lm: LMSpec, repetitions: int) -> Iterator[dict[str, Any]]:
    """Rows of one part of the benchmark."""
    if part in ("nodes", "edges"):
        yield step_ratio(lm, circuit_module(lm, part), repetitions)
    elif part == "heads":
        yield from growth(lm, max(2, repetitions // 2))
    elif part == "trainer":
        with TemporaryDirectory() as folder:
            yield trainer_ratio(lm, 4 * repetitions + 4, Path(folder))
    else:
        for model, steps in (("tiny", 50), (lm.name, 1)):
            yield {"model": Path(model).name, **threads_ratio(LMSpec(model), steps, 2 * repetitions)}


def main() -> None:
    """Measure all parts, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--model", help="another model, by default that of `make real`")
    parser.add_argument("--repetitions", type=int, default=13)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    silence_libraries()
    if options.worker:
        worker(LMSpec(options.worker))
        return
    torch.set_num_threads(1)
    lm = LMSpec(options.model or str(real_model()))
    about = {"torch": torch.__version__, "machine": platform.machine()}
    for part in options.only or PARTS:
        for row in measured(part, lm, options.repetitions):
            print(json.dumps({"part": part} | rounded(row) | about), flush=True)


if __name__ == "__main__":
    main()
