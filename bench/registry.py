"""What is measured: a case is an operation at a shape, and each operation has one function that sets a case up, for
time, memory and errors alike."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = (
    "trimmed_cross_entropy",
    "linear_trimmed_cross_entropy",
    "soft_label_kl",
    "augment_latent",
    "trimmed_mean",
    "rank_batches",
)
FULL_PASS = ("forward", "backward", "full")
FIRST_ON_A_GPU = (
    "trimmed_cross_entropy 65536x1000 float32 keep 0.2",
    "soft_label_kl 1024x4x131072 bfloat16 near",
    "trimmed_cross_entropy 8192x131072 bfloat16 keep 0.2",
    "augment_latent 1024x4096x32x0 bfloat16 hadamard",
    "augment_latent 1024x4096x32x0 bfloat16 no basis",
    "linear_trimmed_cross_entropy 4096x4096x128256 bfloat16 keep 0.2",
    "trimmed_cross_entropy 128x10 float32 keep 0.2",
    "soft_label_kl 512x8x1000 float32 near",
    "rank_batches 1000000 float32 keep 0.2",
    "trimmed_mean 65536 float32 keep 0.2",
    "augment_latent 1024x4096x32x0 bfloat16 normalized",
    "soft_label_kl 128x4x10 float32 near",
    "trimmed_cross_entropy 8192x50257 bfloat16 keep 0.2",
    "linear_trimmed_cross_entropy 4096x4096x128256 bfloat16 keep 1",
)
"""Operations and cases, the most important first: time on a GPU may run out."""

Forward = Callable[..., Tensor]
"""From the inputs of a problem to its result."""
Oracle = Callable[..., Tensor]
"""The same in float64, from the inputs in float64."""


class Floor(NamedTuple):
    """What no implementation can avoid: bytes of memory traffic, and flops of products in the inputs' type."""

    bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class Variant:
    """One implementation, ours or a peer."""

    step: Forward
    less: str = ""
    """What it leaves undone of what ours does."""
    random: Forward | None = None
    """The step with random numbers of its own, where it has any: that is timed. None: ``step``."""
    oracle: Oracle | None = None
    """Where it computes something else than the problem's oracle does."""
    wrong: Callable[[Tensor, tuple[Tensor, ...]], str] | None = None
    """Where a result has random numbers that no oracle knows: what is wrong with it and its gradients, in words."""
    modes: Sequence[str] = FULL_PASS
    captured: bool = True
    """Whether it is measured in a CUDA graph, too. Not what may wait for the device: a capture that fails harms what
    comes after it."""

    @property
    def timed(self) -> Forward:
        return self.random or self.step


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm; NaN where anything is NaN."""
    value, exact = value.detach().double(), exact.double()
    scale = float(exact.norm())
    return float((value - exact).norm()) / (scale if scale > 0 else 1.0)


@dataclass
class Problem:
    """One case with its data."""

    inputs: tuple[Tensor, ...]
    variants: Mapping[str, Variant]
    oracle: Oracle
    differentiable: int = 1
    """So many of the inputs, from the first on, get a gradient; 0: there is no backward pass."""
    upstream: Tensor | None = None
    """The gradient of the result; None: 1."""
    result_error: Callable[[Tensor, Tensor], float] = relative_error
    """Of a result, beside the oracle's."""
    limit: float = 1e-3
    """An error above this is a mistake, not rounding: what makes it is not timed."""


@dataclass(frozen=True)
class Case:
    """One set-up of an operation."""

    shape: tuple[tuple[str, int], ...]
    dtype: torch.dtype = torch.float32
    keep: float | None = None
    kind: str = ""
    modes: tuple[str, ...] = FULL_PASS
    target_s: float | None = None
    """Seconds of device time that ours should take at most in the last of the modes, where launches bound it."""
    target_fraction: float | None = None
    """Of the floor's speed, which ours should reach there: no GPU's bandwidth makes it wrong."""

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.shape)

    def along(self, name: str, size: int) -> Case:
        return replace(self, shape=tuple((key, size if key == name else value) for key, value in self.shape))

    def __str__(self) -> str:
        words = ["x".join(map(str, self.sizes.values())), str(self.dtype)[6:]]
        words += [f"keep {self.keep:g}"] if self.keep is not None else []
        return " ".join([*words, *filter(None, [self.kind])])


@dataclass(frozen=True)
class Sweep:
    """A case whose size doubles along one dimension."""

    case: Case
    along: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    name: str
    build: Callable[[Case, torch.device], Problem]
    floor: Callable[[Case, str], Floor]
    """Of a case and a mode, from the shape alone."""
    cases: Mapping[str, Sequence[Case]]
    """By type of device."""
    sweeps: Mapping[str, Sequence[Sweep]]
    quick: Case
    """A small one, for tests."""


@cache
def operations() -> dict[str, Operation]:
    """Each is the constant ``OPERATION`` of the module of its name."""
    return {name: importlib.import_module(f"bench.{name}").OPERATION for name in NAMES}


def doubled(first: int, last: int) -> tuple[int, ...]:
    """first, 2 first, 4 first, ... up to last."""
    sizes = [first]
    while 2 * sizes[-1] <= last:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)


def shape(**sizes: int) -> tuple[tuple[str, int], ...]:
    return tuple(sizes.items())
