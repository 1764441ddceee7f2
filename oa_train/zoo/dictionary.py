"""Makes the built-in dictionary `tiny_r2`: a sparse autoencoder of the input of block 2 of the built-in model.

    python -m oa_train.zoo.dictionary --output checkpoints/tiny_r2

It is trained on the residual stream at every token of indirect object prompts.
"""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from oa_train.batches import Batch
from oa_train.engine.reading import read_values
from oa_train.models.dictionaries import Dictionary, save_dictionary
from oa_train.models.frozen import CausalLM
from oa_train.models.loading import load_model
from oa_train.models.selection import Nodes
from oa_train.models.sites import Site
from oa_train.models.spec import LMSpec
from oa_train.seeds import torch_generator
from oa_train.shapes import Float, Tensor
from oa_train.tasks import IOI, Task
from oa_train.zoo.making import make_from_command_line

SITE = Site("residual", 2)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Training settings of the dictionary.

    Attributes:
        n_features: number of entries of the code.
        steps: number of steps of Adam.
        batch_size: number of prompts in a step.
        learning_rate: learning rate of Adam; it falls linearly over the last fifth of the steps.
        sparsity: weight of the code's mean L1 norm against the reconstruction error, both in units of the variance.
    """

    n_features: int = 256
    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 2e-3
    sparsity: float = 0.08


def activations(model: CausalLM, batch: Batch) -> Float[Tensor, "token d_model"]:
    """The residual stream at the site, at every real token that is not protected."""
    values = read_values(model, batch, Nodes.of(model.config, [SITE.kind]))[SITE]
    return values[:, :, 0][batch.attention_mask & ~batch.protected]


def train_dictionary(model: CausalLM, task: Task, recipe: Recipe, seed: int = 0) -> Dictionary:
    """Train a dictionary of one hidden layer: ReLU code, decoder directions of length 1; the seed is of its start."""
    first = activations(model, task.batch("train", 0, 512))
    centre, scale = first.mean(dim=0), (first - first.mean(dim=0)).square().sum(dim=1).mean()
    generator = torch_generator("dictionary", seed)
    directions = F.normalize(torch.randn(recipe.n_features, first.shape[1], generator=generator), dim=1)
    w_dec = directions.clone().requires_grad_()
    w_enc = directions.T.clone().requires_grad_()
    b_enc, b_dec = torch.zeros(recipe.n_features, requires_grad=True), centre.clone().requires_grad_()
    optimizer = torch.optim.Adam([w_enc, b_enc, w_dec, b_dec], lr=recipe.learning_rate, betas=(0.9, 0.99))
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * min(1.0, 5 * (1 - step / recipe.steps))
        x = activations(model, task.batch("train", step, recipe.batch_size))
        code = F.relu((x - b_dec) @ w_enc + b_enc)
        error = (code @ w_dec + b_dec - x).square().sum(dim=1).mean() / scale
        loss = error + recipe.sparsity * code.sum(dim=1).mean() / scale.sqrt()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            w_dec.copy_(F.normalize(w_dec, dim=1))
        if step % 500 == 499:
            log.info("step %d of %d: unexplained variance %.4f", step + 1, recipe.steps, error.item())
    w_enc, b_enc, w_dec, b_dec = (tensor.detach().clone() for tensor in (w_enc, b_enc, w_dec, b_dec))
    return Dictionary(f"r{SITE.layer}", w_enc, b_enc, w_dec, b_dec, "relu", subtracts_decoder_bias=True)


@torch.no_grad()
def figures(dictionary: Dictionary, model: CausalLM, task: Task) -> dict[str, float]:
    """Share of the variance that the dictionary explains on held-out prompts, and numbers of active features."""
    x = activations(model, task.batch("test", 0, 512))
    code = dictionary.encode(x)
    error = (code @ dictionary.w_dec + dictionary.b_dec - x).square().sum()
    on = code > 0
    return {
        "explained variance": 1 - float(error / (x - x.mean(dim=0)).square().sum()),
        "features on at a token": float(on.sum(dim=1).float().mean()),
        "features ever on": float(on.any(dim=0).sum()),
    }


CARD = """---
license: mit
---

# tiny_r2

A sparse dictionary of {n_features} features of what enters block 2 of the built-in model `tiny` (site `r2`): a sparse
autoencoder with a ReLU code and decoder directions of length 1.

    python -m oa_train.zoo.dictionary --output checkpoints/tiny_r2 --seed {seed}

{steps:,} steps of {batch_size} prompts of indirect object identification, on one CPU thread.

| on 512 held-out prompts | |
|---|---|
{rows}

MIT, as the package.
"""


def build(output: Path, seed: int = 0, recipe: Recipe | None = None) -> dict[str, float]:
    """Train the dictionary and write its folder, with a card; returns the figures of `figures`."""
    recipe, lm = recipe or Recipe(), LMSpec("tiny")
    model, task = load_model(lm), IOI(lm=lm)
    dictionary = train_dictionary(model, task, recipe, seed)
    measured = figures(dictionary, model, task)
    save_dictionary(dictionary, output)
    rows = "\n".join(f"| {name} | {value:.3g} |" for name, value in measured.items())
    card = CARD.format(
        n_features=recipe.n_features, seed=seed, steps=recipe.steps, batch_size=recipe.batch_size, rows=rows
    )
    (output / "README.md").write_text(card, encoding="utf-8")
    return measured


main = partial(make_from_command_line, "dictionary", __doc__, build)


if __name__ == "__main__":
    main()
