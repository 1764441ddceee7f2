"""Mean output of attention at the scored positions of a task's prompts."""

import torch

from oa_train.lenses.predictions import Tokens
from oa_train.models.frozen import CausalLM
from oa_train.progress import Track, counted, silent
from oa_train.shapes import Float, Tensor
from oa_train.tasks.task import Task


@torch.no_grad()
def mean_attention(model: CausalLM, task: Task, track: Track = silent) -> Float[Tensor, "layer d_model"]:
    """Mean over the task's `means` prompts, in float32: constants of the mean lens, initial constants of others."""
    total, n_prompts = torch.zeros(1, dtype=torch.float64), 0
    batches = list(task.batches("means", task.n_means))
    for batch in counted(track, batches, "averaging attention outputs"):
        tokens = Tokens(model, batch.to(model.device), attention=True)
        assert tokens.attention is not None
        of_prompts = torch.einsum("ltd,t->ld", tokens.attention.double(), tokens.weights.double())
        total, n_prompts = total + of_prompts.cpu(), n_prompts + len(batch)
    return (total / n_prompts).float()
