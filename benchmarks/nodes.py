"""Cost of node-level training relative to the plain model.

    python -m benchmarks.nodes            GPT-2-small shape, random weights
    python -m benchmarks.nodes --quick    a small shape, some seconds

Everything is timed round-robin in one process, and reported as medians and ratios: machines differ and drift, ratios
of neighbouring turns hardly do. Each line of the output is one JSON object.

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
import platform
import statistics
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

from benchmarks.timing import (
    ALLOCATORS,
    PROMPTS,
    SAMPLES,
    floor_step,
    plain_forward,
    random_tokens,
    side_by_side,
    summary,
    under_both_allocators,
)
from oa_train import CircuitModule, LMSpec, TaskData
from oa_train.batches import Batch
from oa_train.cli.quiet import silence_libraries
from oa_train.tasks.induction import Induction

SHAPES = {
    "gpt2-small": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257},
    "quick": {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 1000},
}


class RandomTokens(Induction):
    """Prompts of random tokens and fixed length, made in no time: only the model is to be timed."""

    name = "random tokens"

    def batch(self, stream: str, index: int, size: int | None = None) -> Batch:
        """Random tokens; the same batch whatever the stream."""
        return random_tokens(size or self.batch_size, index)

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


def masked_part(module: CircuitModule, batch: Batch) -> Callable[[], object]:
    """The step without its clean forward and without the optimiser."""
    clean = module.clean_logits(batch)

    def run() -> None:
        kl, penalty = module.masked_loss(batch, clean)
        (kl + penalty).backward()
        module.zero_grad(set_to_none=True)

    return run


def whole_step(module: CircuitModule, task: RandomTokens) -> Callable[[], object]:
    """One call of `training_step` and of the optimisers, in a bare loop."""
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
            "floor": floor_step(module.frozen, batch),
            "clean": plain_forward(module.frozen, batch),
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
            **summary(times[name]),
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
        under_both_allocators("benchmarks.nodes", sys.argv[1:])
        return
    silence_libraries()
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)
    about = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
    for row in measure("quick" if options.quick else "gpt2-small", options.repetitions, options.allocator):
        print(json.dumps(row | about), flush=True)


if __name__ == "__main__":
    main()
