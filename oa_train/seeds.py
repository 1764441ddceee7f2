"""Stateless randomness: every draw comes from a generator of its own, whose seed is a hash of what the draw is for.

No draw depends on earlier ones, so a resumed run needs the step and nothing else. The global generators of python,
numpy and torch are neither read nor moved.
"""

import hashlib
import random

import torch


def derive_seed(*key: int | str) -> int:
    """Hash a key to a seed of 63 bits.

    Args:
        *key: what the draw is for, from the general to the particular; the same key gives the same seed.
    """
    text = "\x1f".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a torch generator for the draw that `key` names (see `derive_seed`)."""
    return torch.Generator(device=device).manual_seed(derive_seed(*key))


def python_generator(*key: int | str) -> random.Random:
    """Make a python generator for the draw that `key` names (see `derive_seed`)."""
    return random.Random(derive_seed(*key))
