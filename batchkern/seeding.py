"""Random numbers as pure functions of a seed and a place in the training, so that a resumed run draws the same
numbers."""

from __future__ import annotations

import hashlib
import operator

import torch
from torch import Tensor

from batchkern.errors import UserError, whole


def checked_seed(seed: object) -> int:
    number = whole(seed)
    if number is None:
        raise UserError(f"seed must be a whole number, got {seed!r}")
    return number


def derived_seed(seed: int, *place: int | str) -> int:
    """A 63-bit seed for one place, such as ``("epoch", 3)``; different places give unrelated numbers.

    Raises:
        UserError: ``seed`` is not a whole number.
    """
    plain = [part if isinstance(part, str | bool) else operator.index(part) for part in place]
    digest = hashlib.blake2b(repr((checked_seed(seed), *plain)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *place: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(derived_seed(seed, *place))


def torch_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The states of torch's default generators: of the CPU, and of a CUDA ``device``."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_torch_states(states: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda" and states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
