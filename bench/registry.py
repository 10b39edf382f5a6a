"""The cases that are measured: each is an operation at a shape. An operation has one function that sets up a case, for
the measurement of time, memory and errors."""

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
"""The same in float64, from inputs in float64."""


class Floor(NamedTuple):
    """The work that no implementation can avoid: bytes of memory traffic, and flops of products in the inputs' type."""

    bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class Variant:
    """One implementation, ours or a peer."""

    step: Forward
    less: str = ""
    """The part of our work that it leaves out."""
    random: Forward | None = None
    """The step that draws its own random numbers, which is the one that is timed. None: ``step`` is timed."""
    oracle: Oracle | None = None
    """Its own oracle, if it computes something else than the problem's oracle."""
    wrong: Callable[[Tensor, tuple[Tensor, ...]], str] | None = None
    """For a result with its own random numbers, which has no oracle: what is wrong with it and its gradients, or
    nothing."""
    modes: Sequence[str] = FULL_PASS
    captured: bool = True
    """Whether it is also measured in a CUDA graph. It must not be if the host may wait for the device: a capture that
    fails affects later measurements."""

    @property
    def timed(self) -> Forward:
        return self.random or self.step


def relative_error(value: Tensor, exact: Tensor) -> float:
    """The norm of the difference divided by the norm; NaN if any element is NaN."""
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
    """This many inputs, from the first on, get a gradient; 0: there is no backward pass."""
    upstream: Tensor | None = None
    """The gradient of the result; None: 1."""
    result_error: Callable[[Tensor, Tensor], float] = relative_error
    """The error of a result, given that of the oracle."""
    limit: float = 1e-3
    """An error above this is a mistake, not rounding: a variant with such an error is not timed."""


@dataclass(frozen=True)
class Case:
    """One set-up of an operation."""

    shape: tuple[tuple[str, int], ...]
    dtype: torch.dtype = torch.float32
    keep: float | None = None
    kind: str = ""
    modes: tuple[str, ...] = FULL_PASS
    target_s: float | None = None
    """The target for our device time in the last mode, in seconds, if the time is dominated by launches."""
    target_fraction: float | None = None
    """The target for our speed in the last mode as a fraction of the floor's, which holds for a GPU of any
    bandwidth."""

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
    """The floor of a case and a mode, from the shape alone."""
    cases: Mapping[str, Sequence[Case]]
    """By type of device."""
    sweeps: Mapping[str, Sequence[Sweep]]
    quick: Case
    """A small case, for tests."""


@cache
def operations() -> dict[str, Operation]:
    """Every operation: the constant ``OPERATION`` of the module of its name."""
    return {name: importlib.import_module(f"bench.{name}").OPERATION for name in NAMES}


def doubled(first: int, last: int) -> tuple[int, ...]:
    """first, 2 first, 4 first, ... up to last."""
    sizes = [first]
    while 2 * sizes[-1] <= last:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)


def shape(**sizes: int) -> tuple[tuple[str, int], ...]:
    return tuple(sizes.items())
