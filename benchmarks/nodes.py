"""How much node-level training costs beyond the model itself.

    python -m benchmarks.nodes            GPT-2-small shape, random weights
    python -m benchmarks.nodes --quick    a small shape, some seconds

Everything is timed side by side in one process, round-robin, and reported as medians and ratios: machines differ and
drift, ratios of neighbours hardly do. Each line of the output is one JSON object.

    floor          plain Hugging Face forward and backward to a parameter added to the embedding, frozen weights,
                   logits at the last position only, KL divergence; as many rows as the masked part has. The
                   unembedding gets a contiguous slice: `logits_to_keep=1` is slower on a CPU, because its slice is not
    clean          plain forward on the prompts alone, no gradient; the same unembedding
    masked         our masked part: sample masks, forward with replaced components, KL divergence, backward
    step           our whole step: clean forward, masked part, Adam for masks and constants
    trainer        a step inside `lightning.Trainer.fit`
    bare           the same step in a bare loop
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from oa_train import CircuitModule, LMSpec, TaskData
from oa_train.batches import Batch
from oa_train.cli.quiet import silence_libraries
from oa_train.metrics.divergence import kl_divergence
from oa_train.tasks.induction import Induction

SHAPES = {
    "gpt2-small": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257},
    "quick": {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 1000},
}
PROMPTS, SAMPLES, POSITIONS = 2, 4, 16
ALLOCATORS = {
    "default": {},
    # Keeps freed blocks instead of handing them back to the system, as a GPU's caching allocator does.
    "nommap": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"},
}


class RandomTokens(Induction):
    """Prompts of random tokens and fixed length, made in no time: only the model is to be timed."""

    name = "random tokens"

    def batch(self, stream: str, index: int, size: int | None = None) -> Batch:
        """Random tokens; the same batch whatever the stream."""
        size = size or self.batch_size
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(3, 500, (size, POSITIONS), generator=generator)
        return Batch(
            tokens=tokens,
            attention_mask=torch.ones_like(tokens, dtype=torch.bool),
            scored=torch.full((size, 1), POSITIONS - 1),
            weights=torch.ones(size, 1),
            answers=torch.full((size, 1, 1), 5),
            distractors=torch.full((size, 1, 1), 6),
            counterfactual_tokens=None,
            example_ids=torch.arange(size),
            padded=False,
        )

    def batches(self, stream: str, n_prompts: int, size: int | None = None):  # type: ignore[no-untyped-def]
        """One small batch; means and validation are not timed."""
        yield self.batch(stream, 0, 2)


def make_model(shape: str, folder: Path) -> LMSpec:
    """Write a model with random weights and a tokenizer of the task's words."""
    from oa_train.tasks.vocabulary import read_words

    torch.manual_seed(0)
    config = GPT2Config(**SHAPES[shape], n_positions=64, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    words = {word: i for i, word in enumerate(["<bos>", "Words", ":", ",", *read_words("induction")])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<bos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>").save_pretrained(folder)
    return LMSpec(str(folder))


def side_by_side(contestants: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Time every contestant in turn, again and again, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for repetition in range(repetitions + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if repetition:
                times[name].append(time.perf_counter() - start)
    return times


def last_logits(module: CircuitModule, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits of the plain model at the last position."""
    hidden = module.frozen.base_model(**inputs, use_cache=False).last_hidden_state
    return module.frozen.get_output_embeddings()(hidden[:, -1].contiguous())


def floor_step(module: CircuitModule, batch: Batch) -> Callable[[], object]:
    """Forward and backward of the plain model on as many rows as the masked part has."""
    rows = batch.repeat(SAMPLES)
    shift = torch.zeros(module.dimensions.d_model, requires_grad=True)
    with torch.no_grad():
        clean = last_logits(module, input_ids=batch.tokens).repeat(SAMPLES, 1)

    def step() -> None:
        embedded = module.frozen.get_input_embeddings()(rows.tokens) + shift
        kl_divergence(clean, last_logits(module, inputs_embeds=embedded)).mean().backward()
        shift.grad = None

    return step


def clean_forward(module: CircuitModule, batch: Batch) -> Callable[[], object]:
    """Plain forward on the prompts."""

    @torch.no_grad()
    def run() -> object:
        return last_logits(module, input_ids=batch.tokens)

    return run


def masked_part(module: CircuitModule, batch: Batch) -> Callable[[], object]:
    """The step without its clean forward and without the optimiser."""
    clean = module.clean_logits(batch)

    def run() -> None:
        kl, penalty = module.masked_loss(batch, clean)
        (kl + penalty).backward()
        module.zero_grad(set_to_none=True)

    return run


def whole_step(module: CircuitModule, task: RandomTokens) -> Callable[[], object]:
    """What one call of `training_step` and the optimiser do, in a bare loop."""
    optimizer = module.configure_optimizers()
    numbers = iter(range(1_000_000))

    def run() -> None:
        number = next(numbers)
        batch = task.batch("train", number)
        optimizer.zero_grad(set_to_none=True)
        kl, penalty = module.masked_loss(batch, module.clean_logits(batch))
        (kl + penalty).backward()
        optimizer.step()

    return run


class StepTimes(lightning.Callback):
    """Time from one batch end to the next inside `Trainer.fit`, alternating with a bare step outside of that time."""

    def __init__(self, bare: Callable[[], object]) -> None:
        self._bare = bare
        self.trainer_times: list[float] = []
        self.bare_times: list[float] = []
        self._start: float | None = None

    def on_train_batch_end(self, *_: object) -> None:
        """Stop the clock, time a bare step, start the clock."""
        if self._start is not None:
            self.trainer_times.append(time.perf_counter() - self._start)
        start = time.perf_counter()
        self._bare()
        self.bare_times.append(time.perf_counter() - start)
        self._start = time.perf_counter()


def measure(shape: str, repetitions: int, allocator: str) -> list[dict[str, object]]:
    """All rows of one shape under the allocator that this process runs with."""
    with TemporaryDirectory() as folder:
        lm = make_model(shape, Path(folder))
        task = RandomTokens(lm=lm, batch_size=PROMPTS, batches_per_epoch=2 * repetitions + 4)
        module = CircuitModule(lm=lm, samples_per_prompt=SAMPLES)
        batch = task.batch("train", 0)
        contestants = {
            "floor": floor_step(module, batch),
            "clean": clean_forward(module, batch),
            "masked": masked_part(module, batch),
            "step": whole_step(module, task),
        }
        times = side_by_side(contestants, repetitions)
        clock = StepTimes(whole_step(CircuitModule(lm=lm, samples_per_prompt=SAMPLES), task))
        trainer = lightning.Trainer(
            max_epochs=1,
            logger=lightning.pytorch.loggers.CSVLogger(folder),
            callbacks=[clock],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            accelerator="cpu",
        )
        trainer.fit(module, datamodule=TaskData(task))
        times |= {"trainer": clock.trainer_times[2:], "bare": clock.bare_times[2:]}
    median = {name: statistics.median(values) for name, values in times.items()}
    whole = median["floor"] + median["clean"]
    ratios = {
        "floor": {"ratio_to_floor": 1.0},
        "clean": {"ratio_to_floor": median["clean"] / median["floor"]},
        "masked": {"ratio_to_floor": median["masked"] / median["floor"]},
        "step": {"ratio_to_floor_plus_clean": median["step"] / whole},
        "bare": {},
        "trainer": {"ratio_to_bare": median["trainer"] / median["bare"]},
    }
    return [
        {
            "name": name,
            "shape": shape,
            "allocator": allocator,
            "median_ms": round(1000 * median[name], 2),
            "range_ms": [round(1000 * min(times[name]), 2), round(1000 * max(times[name]), 2)],
            "repetitions": len(times[name]),
            **{key: round(value, 3) for key, value in ratio.items()},
        }
        for name, ratio in ratios.items()
    ]


def main() -> None:
    """Measure under both allocators, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--allocator", choices=[*ALLOCATORS, "both"], default="both", help="of the C library")
    options = parser.parse_args()
    if options.allocator == "both":
        words = [word for word in sys.argv[1:] if word != "--allocator"]
        for allocator, variables in ALLOCATORS.items():
            command = [sys.executable, "-m", "benchmarks.nodes", *words, "--allocator", allocator]
            subprocess.run(command, check=True, env=os.environ | variables)  # noqa: S603 (our own command line)
        return
    silence_libraries()
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)
    about = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
    for row in measure("quick" if options.quick else "gpt2-small", options.repetitions, options.allocator):
        print(json.dumps(row | about), flush=True)


if __name__ == "__main__":
    main()
