"""Ablations of plain activations (tensors or nested lists), without a model.

    ablated = mean_ablation(activations, activations.mean(0), [3, 17])
    effect = compute_ablation_effect(activations, ablated)

Activations are [batch, units]; further leading dimensions are allowed. For tensors the result is a tensor of the same
dtype and device; for nested lists it is nested lists of floats, computed in float64. The input is never changed.
"""

from collections.abc import Callable
from typing import Any

import torch

from oa_train.errors import ConfigurationError
from oa_train.shapes import Tensor

# A tensor, or nested lists of numbers; not checked by annotations, so that users get our messages.
Activations = Any

# Integers, in a sequence or a tensor.
Indices = Any


def zero_ablation(activations: Activations, neurons_to_ablate: Indices) -> Activations:
    """Activations [batch, units] with the chosen units set to zero.

    Raises:
        ConfigurationError: as in `mean_ablation`.
    """
    values = _tensor("activations", activations)
    return _replaced(activations, values, torch.zeros_like(values), neurons_to_ablate)


def mean_ablation(activations: Activations, mean_activations: Activations, neurons_to_ablate: Indices) -> Activations:
    """Activations [batch, units] with the chosen units set to their means.

    Args:
        activations: [batch, units].
        mean_activations: [units], the mean of each unit.
        neurons_to_ablate: indices of units, from 0 to units - 1, each once.

    Raises:
        ConfigurationError: shapes do not match, values are not numbers, or indices are out of range, negative or
            given twice.
    """
    values = _tensor("activations", activations)
    return _replaced(activations, values, _per_unit("mean_activations", mean_activations, values), neurons_to_ablate)


def optimal_ablation(activations: Activations, constants: Activations, neurons_to_ablate: Indices) -> Activations:
    """Activations [batch, units] with the chosen units set to constants [units]; see `optimal_constants`.

    Raises:
        ConfigurationError: as in `mean_ablation`.
    """
    values = _tensor("activations", activations)
    return _replaced(activations, values, _per_unit("constants", constants, values), neurons_to_ablate)


def resample_ablation(
    activations: Activations,
    neurons_to_ablate: Indices,
    other: Activations | None = None,
    seed: int = 0,
) -> Activations:
    """Activations [batch, units] with the chosen units taken from other rows.

    Args:
        activations: [batch, units].
        neurons_to_ablate: as in `mean_ablation`.
        other: activations of the same shape from which values are taken, row by row. By default each row takes those
            of another row of the batch, which needs at least two (a random cycle through all of them).
        seed: seed of the cycle.

    Raises:
        ConfigurationError: as in `mean_ablation`; or the batch has one row and `other` is not given.
    """
    values = _tensor("activations", activations)
    if other is not None:
        others = _tensor("other", other).to(values)
        if others.shape != values.shape:
            raise ConfigurationError(
                f"other has the shape {list(others.shape)}; expected that of activations, {list(values.shape)}."
            )
    else:
        if values.dim() < 2 or len(values) < 2:
            raise ConfigurationError("Resampling takes values from another row; give at least two rows, or `other`.")
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed)).to(values.device)
        others = torch.empty_like(values)
        others[order] = values[order.roll(1)]
    return _replaced(activations, values, others, neurons_to_ablate)


def noise_ablation(
    activations: Activations,
    mean_activations: Activations,
    standard_deviations: Activations,
    neurons_to_ablate: Indices,
    seed: int = 0,
) -> Activations:
    """Activations [batch, units] with the chosen units drawn from Gaussians with these means and deviations [units].

    Raises:
        ConfigurationError: as in `mean_ablation`; or a standard deviation is negative.
    """
    values = _tensor("activations", activations)
    deviations = _per_unit("standard_deviations", standard_deviations, values)
    if (deviations < 0).any():
        raise ConfigurationError(f"standard_deviations holds {float(deviations.min())}; expected at least 0.")
    draws = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(values)
    noise = _per_unit("mean_activations", mean_activations, values) + draws * deviations
    return _replaced(activations, values, noise, neurons_to_ablate)


def optimal_constants(
    activations: Activations,
    loss: Callable[[Tensor], Tensor],
    neurons_to_ablate: Indices,
    steps: int = 200,
    learning_rate: float = 0.01,
) -> Activations:
    """Constants [units] that minimise the loss of the ablated activations, trained with Adam from the batch's means.

    The best constants found are returned, so their loss is never above that of the means (Li & Janson 2024).

    Args:
        activations: [batch, units].
        loss: a differentiable function from ablated activations to a scalar tensor.
        neurons_to_ablate: as in `mean_ablation`. Constants of other units are the means.
        steps: number of steps of Adam.
        learning_rate: learning rate of Adam.

    Raises:
        ConfigurationError: as in `mean_ablation`.
    """
    values = _tensor("activations", activations).detach()
    means = values.reshape(-1, values.shape[-1]).mean(dim=0)
    chosen = _chosen(neurons_to_ablate, len(means), values.device)
    constants = means.clone().requires_grad_()
    optimizer = torch.optim.Adam([constants], lr=learning_rate)
    best, lowest = means, float("inf")
    for step in range(steps + 1):
        value = loss(torch.where(chosen, constants, values))
        if value.item() < lowest:
            best, lowest = constants.detach().clone(), value.item()
        if step < steps:
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return _like(activations, best)


def compute_ablation_effect(original: Activations, ablated: Activations) -> Any:
    """Euclidean (L2) norm of the difference of two activations of the same shape: a float for lists, else a tensor.

    Raises:
        ConfigurationError: the shapes differ, or values are not numbers.
    """
    before, after = _tensor("original", original), _tensor("ablated", ablated)
    if before.shape != after.shape:
        raise ConfigurationError(
            f"ablated has the shape {list(after.shape)}; expected that of original, {list(before.shape)}."
        )
    norm = torch.linalg.vector_norm(before - after.to(before))
    return norm if isinstance(original, Tensor) else norm.item()


ablation_effect = compute_ablation_effect


def _replaced(template: Activations, values: Tensor, replacements: Tensor, neurons: Indices) -> Any:
    chosen = _chosen(neurons, values.shape[-1], values.device)
    return _like(template, torch.where(chosen, replacements, values))


def _chosen(neurons: Indices, n_units: int, device: torch.device) -> Tensor:
    """Flags of the chosen units."""
    numbers = neurons.tolist() if isinstance(neurons, Tensor) else list(neurons)
    wrong = [number for number in numbers if isinstance(number, bool) or not isinstance(number, int)]
    if wrong:
        raise ConfigurationError(f"neurons_to_ablate holds {wrong[0]!r}; expected indices of units.")
    outside = [number for number in numbers if not 0 <= number < n_units]
    if outside:
        raise ConfigurationError(
            f"neurons_to_ablate holds {outside[0]}; expected indices from 0 to {n_units - 1}, of {n_units} units."
        )
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice:
        raise ConfigurationError(f"neurons_to_ablate names {twice[0]} twice; expected each index once.")
    chosen = torch.zeros(n_units, dtype=torch.bool)
    chosen[numbers] = True
    return chosen.to(device)


def _tensor(name: str, values: Activations) -> Tensor:
    if isinstance(values, Tensor):
        tensor = values
    else:
        try:
            tensor = torch.tensor(values, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as problem:
            raise ConfigurationError(
                f"{name} is not an array of numbers: {problem}. Expected a tensor, or nested lists of equal lengths."
            ) from problem
    if tensor.dim() == 0:
        raise ConfigurationError(f"{name} is a single number; expected [batch, units].")
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def _per_unit(name: str, values: Activations, like: Tensor) -> Tensor:
    tensor = _tensor(name, values).to(like)
    if tensor.shape != like.shape[-1:]:
        raise ConfigurationError(
            f"{name} has the shape {list(tensor.shape)}; expected [{like.shape[-1]}], a value for each unit."
        )
    return tensor


def _like(template: Activations, tensor: Tensor) -> Activations:
    return tensor if isinstance(template, Tensor) else tensor.tolist()
