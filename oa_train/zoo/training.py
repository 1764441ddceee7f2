"""Training of small models on generated text."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from oa_train.models.frozen import CausalLM
from oa_train.shapes import Bool, Float, Int, Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """Settings of AdamW and its schedule.

    Attributes:
        steps: number of optimiser steps.
        learning_rate: highest learning rate.
        final: share of the learning rate that is left at the last step.
        warmup: number of steps until the highest learning rate.
        weight_decay: weight decay of matrices; biases and norms have none.
        clip: norm to which the gradient is clipped.
    """

    steps: int = 4000
    learning_rate: float = 2e-3
    final: float = 0.05
    warmup: int = 200
    weight_decay: float = 0.05
    clip: float = 1.0


def train_on(model: CausalLM, loss: Callable[[int], Float[Tensor, ""]], schedule: Schedule) -> list[float]:
    """Train a model in place; `loss` is that of a step, by its number. Returns the loss of each step."""
    optimizer = _optimizer(model, schedule)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, schedule))
    losses = []
    model.train()
    for step in range(schedule.steps):
        step_loss = loss(step)
        step_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(step_loss.item())
        if step % 200 == 199:
            log.info("step %d of %d: loss %.4f", step + 1, schedule.steps, sum(losses[-200:]) / 200)
    model.eval()
    return losses


def answer_loss(
    model: CausalLM, tokens: Int[Tensor, "batch position"], mask: Bool[Tensor, "batch position"]
) -> Float[Tensor, ""]:
    """Mean of the loss on all next tokens and that on the answer, which is the last token of its row.

    Without the second half the model spends its first thousand steps on words that nobody can foresee. `tokens` are
    prompts with one right answer behind each, and `mask` is True at real tokens.
    """
    logits = model(input_ids=tokens[:, :-1], attention_mask=mask[:, :-1]).logits
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    answer = losses[torch.arange(len(losses)), mask.sum(dim=1) - 2]
    return 0.5 * losses[mask[:, 1:]].mean() + 0.5 * answer.mean()


def _optimizer(model: CausalLM, schedule: Schedule) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": schedule.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98))


def rate(step: int, schedule: Schedule) -> float:
    """Factor on the learning rate: linear warmup, then cosine decay."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    done = torch.tensor((step - schedule.warmup) / max(1, schedule.steps - schedule.warmup))
    return schedule.final + (1 - schedule.final) * 0.5 * (1 + float(torch.cos(torch.pi * done)))
