"""Schedules are plain callables; anything of the same signature serves as well.

Per epoch: ``f(epoch, epochs) -> value``. Learning-rate factors: ``f(progress) -> factor`` with progress in [0, 1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from batchkern.errors import UserError

__all__ = ["bernoulli", "constant", "cosine", "every", "linear", "stages", "step"]

EpochSchedule = Callable[[int, int], float]
RateSchedule = Callable[[float], float]


def linear(start: float, end: float) -> EpochSchedule:
    """``start`` in the first epoch, ``end`` in the last, straight in between; one epoch alone gives ``start``."""

    def value(epoch: int, epochs: int) -> float:
        t = epoch / (epochs - 1) if epochs > 1 else 0.0
        # A line without slope must not waver in the last place: that may decide how many rows are kept.
        return start if start == end else (1 - t) * start + t * end

    return value


def stages(values: dict[int, float]) -> EpochSchedule:
    """Piecewise constant: ``{0: 1.0, 50: 0.5}`` is 1.0 up to epoch 49 and 0.5 from epoch 50 on."""
    if 0 not in values:
        raise UserError(f"stages must say what holds from epoch 0, got epochs {sorted(values)}")

    def value(epoch: int, epochs: int) -> float:
        return values[max(start for start in values if start <= epoch)]

    return value


def every(count: int) -> Callable[[int], bool]:
    """True at each multiple of ``count``, counting from 1."""
    if type(count) is not int or count < 1:
        raise UserError(f"every must be a whole number of at least 1, got {count!r}")
    return lambda n: n % count == 0


def bernoulli(probability: float) -> Callable[[torch.Generator], bool]:
    """True with a fixed probability, drawn from the generator it is called with."""
    if not 0 <= probability <= 1:
        raise UserError(f"probability must be in [0, 1], got {probability}")
    return lambda generator: bool(torch.rand((), generator=generator, dtype=torch.float64) < probability)


def constant() -> RateSchedule:
    return lambda progress: 1.0


def cosine() -> RateSchedule:
    """Half a cosine from 1 to 0."""
    return lambda progress: 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class step:
    """Times ``gamma`` at each milestone; the default is the trimming paper's (epochs 50 and 100 of 150).

    A class, so that a worker process can be sent one, and a run's config.json tells its numbers.

    Args:
        milestones: increasing parts of the training, in (0, 1): epoch 30 of 100 is 0.3.
        gamma: above 0.
    """

    milestones: tuple[float, ...] = (1 / 3, 2 / 3)
    gamma: float = 0.5

    def __post_init__(self) -> None:
        if any(not 0 < m < 1 for m in self.milestones) or any(a >= b for a, b in pairwise(self.milestones)):
            raise UserError(f"milestones must increase within (0, 1), as parts of the training, got {self.milestones}")
        if not 0 < self.gamma < math.inf:
            raise UserError(f"gamma must be a number above 0, got {self.gamma}")

    def __call__(self, progress: float) -> float:
        return self.gamma ** sum(progress >= m for m in self.milestones)


def warm_up(schedule: RateSchedule, share: float, start: float) -> RateSchedule:
    """``schedule``, times a line from ``start`` to 1 over the first ``share`` of the training, in (0, 1]."""
    return lambda progress: schedule(progress) * min(1.0, start + (1 - start) * progress / share)


_STEP = re.compile(r"step\(\s*milestones\s*=\s*\(([^()]*)\)\s*(?:,\s*gamma\s*=\s*([^,()]*))?\)")


def parse_step(text: str) -> step | None:
    """The schedule of ``"step(milestones=(0.3, 0.6), gamma=0.1)"``; ``None``: the text is not of that form.

    Raises:
        UserError: numbers that :class:`step` does not take.
    """
    match = _STEP.fullmatch(text.strip())
    try:
        if match:
            milestones = tuple(float(part) for part in match[1].split(",") if part.strip())
            return step(milestones, step.gamma if match[2] is None else float(match[2]))
    except UserError:
        raise
    except ValueError:
        pass
    return None


RATES: dict[str, Callable[[], RateSchedule]] = {"constant": constant, "cosine": cosine, "step": step}
