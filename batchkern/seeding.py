"""Random numbers as pure functions of a seed and a place in the training, so that a resumed run draws the same."""

from __future__ import annotations

import hashlib

import torch


def derived_seed(seed: int, *place: int | str) -> int:
    """A 63-bit seed for one place, such as ``("epoch", 3)``; different places give unrelated numbers."""
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *place: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(derived_seed(seed, *place))
