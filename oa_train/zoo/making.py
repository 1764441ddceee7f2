"""Steps of making a small model other than its training: its tokenizer in a folder, its figures, its card."""

import argparse
import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from oa_train.models.frozen import CausalLM
from oa_train.models.spec import LMSpec
from oa_train.seeds import derive_seed
from oa_train.tasks import Prompt, Task

log = logging.getLogger(__name__)

# Makes the model (or dictionary) of a seed in a folder, and returns its figures.
Build = Callable[[Path, int], Mapping[str, float]]


@contextmanager
def temporary_lm(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> Iterator[LMSpec]:
    """A folder with the tokenizer and the configuration of a model, for the duration of the context.

    Tasks load a model's tokenizer from a folder, so there must be one before training.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        model.config.save_pretrained(folder)
        yield LMSpec(folder)


def small_gpt2(
    name: str, seed: int, tokenizer: PreTrainedTokenizerFast, *, n_layer: int, n_inner: int, n_positions: int
) -> GPT2LMHeadModel:
    """A GPT-2 of width 64 with 4 heads and random weights, which its name and the seed decide."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=n_positions,
        n_embd=64,
        n_layer=n_layer,
        n_head=4,
        n_inner=n_inner,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # the global generator is not touched
        torch.manual_seed(derive_seed(name, seed))
        return GPT2LMHeadModel(config)


@torch.no_grad()
def share_right(model: CausalLM, task: Task, prompts: Sequence[Prompt]) -> float:
    """Share of prompts whose most probable next token is an answer."""
    right = 0
    for start in range(0, len(prompts), 200):
        part = prompts[start : start + 200]
        tokens, mask = task.encoder.pad(task.encoder.encode([prompt.text for prompt in part]), "right")
        logits = model(input_ids=tokens, attention_mask=mask).logits
        top = logits[torch.arange(len(part)), mask.sum(dim=1) - 1].argmax(dim=-1).tolist()
        for prompt, token in zip(part, top, strict=True):
            right += token in [task.encoder.continuation(prompt.text, answer) for answer in prompt.answers]
    return right / len(prompts)


@torch.no_grad()
def next_words(model: CausalLM, task: Task, text: str, most: int = 2) -> list[tuple[str, float]]:
    """The most probable next words of a text, with their probabilities."""
    tokens, mask = task.encoder.pad(task.encoder.encode([text]), "right")
    top = model(input_ids=tokens, attention_mask=mask).logits[0, -1].softmax(dim=-1).topk(most)
    words = task.tokenizer.convert_ids_to_tokens(top.indices.tolist())
    return [(word.replace("▁", " "), value) for word, value in zip(words, top.values.tolist(), strict=True)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: the order of sums is then fixed, and so small a model is not slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_model(
    output: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    card: Callable[[str], str],
) -> None:
    """Write the folder of a model, whose files are replaced: weights, configuration, tokenizer and model card.

    `card` makes the text of the card from the SHA-256 of the weights.
    """
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    model.save_pretrained(output)
    digest = hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()
    (output / "README.md").write_text(card(digest), encoding="utf-8")
    for file in output.iterdir():
        file.chmod(0o644)  # transformers leaves the weights readable by their owner only


def make_from_command_line(
    name: str, description: str | None, build: Build, arguments: Sequence[str] | None = None
) -> None:
    """Make what the module `name` of `oa_train.zoo` makes, with arguments of the command line."""
    parser = argparse.ArgumentParser(prog=f"python -m oa_train.zoo.{name}", description=description)
    parser.add_argument("--output", type=Path, required=True, help="folder that is written")
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is drawn")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for kind, figure in build(options.output, options.seed).items():
        log.info("%s: %.4g", kind, figure)
