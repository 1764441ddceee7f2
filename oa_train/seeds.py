"""Stateless randomness: every draw has its own generator, whose seed is a hash of the purpose of the draw.

No draw depends on earlier ones, so a resumed run needs only the step. The global generators of Python, numpy and torch
are neither read nor advanced.
"""

import hashlib
import random

import torch


def derive_seed(*key: int | str) -> int:
    """Hash a key to a seed of 63 bits.

    Args:
        *key: purpose of the draw, from the general to the particular; the same key gives the same seed.
    """
    text = "\x1f".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a torch generator for the draw that `key` names (see `derive_seed`)."""
    return torch.Generator(device=device).manual_seed(derive_seed(*key))


def python_generator(*key: int | str) -> random.Random:
    """Make a Python generator for the draw that `key` names (see `derive_seed`)."""
    return random.Random(derive_seed(*key))
