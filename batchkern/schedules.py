"""Schedules are plain callables; any function with the same signature can be used.

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
    """``start`` in the first epoch, ``end`` in the last, linear in between; a single epoch gives ``start``.

    Args:
        start, end: any numbers; fractions of rows in (0, 1] if it is a schedule of keep.

    Returns:
        ``f(epoch, epochs)``, with epochs counted from 0.

    Examples:
        >>> from batchkern.schedules import linear
        >>> keep = linear(1.0, 0.2)
        >>> [round(keep(epoch, 5), 2) for epoch in range(5)]
        [1.0, 0.8, 0.6, 0.4, 0.2]
    """

    def value(epoch: int, epochs: int) -> float:
        t = epoch / (epochs - 1) if epochs > 1 else 0.0
        # A constant must be exact: a rounding error may change how many rows are kept.
        return start if start == end else (1 - t) * start + t * end

    return value


def stages(values: dict[int, float]) -> EpochSchedule:
    """Piecewise constant: ``{0: 1.0, 50: 0.5}`` is 1.0 up to epoch 49 and 0.5 from epoch 50 on.

    Args:
        values: the first epoch of each stage, counted from 0, and its value; one stage begins at 0.

    Raises:
        UserError: no stage begins at 0.

    Examples:
        >>> from batchkern.schedules import stages
        >>> keep = stages({0: 1.0, 2: 0.5})
        >>> [keep(epoch, 4) for epoch in range(4)]
        [1.0, 1.0, 0.5, 0.5]
    """
    if 0 not in values:
        raise UserError(f"stages must have a value for epoch 0, got epochs {sorted(values)}")

    def value(epoch: int, epochs: int) -> float:
        return values[max(start for start in values if start <= epoch)]

    return value


def every(count: int) -> Callable[[int], bool]:
    """A function of n that is True at each multiple of ``count``, counted from 1.

    Args:
        count: a whole number of at least 1.

    Raises:
        UserError: ``count`` is another value.

    Examples:
        >>> from batchkern.schedules import every
        >>> due = every(3)
        >>> [n for n in range(1, 8) if due(n)]
        [3, 6]
    """
    if type(count) is not int or count < 1:
        raise UserError(f"every must be a whole number of at least 1, got {count!r}")
    return lambda n: n % count == 0


def bernoulli(probability: float) -> Callable[[torch.Generator], bool]:
    """A function that is True with a fixed probability, drawn from the generator that it is called with.

    Args:
        probability: in [0, 1].

    Raises:
        UserError: ``probability`` is another value.

    Examples:
        >>> import torch
        >>> from batchkern.schedules import bernoulli
        >>> fires, numbers = bernoulli(0.25), torch.Generator().manual_seed(0)
        >>> share = sum(fires(numbers) for _ in range(1000)) / 1000
        >>> 0.2 < share < 0.3
        True
    """
    if not 0 <= probability <= 1:
        raise UserError(f"probability must be in [0, 1], got {probability}")
    return lambda generator: bool(torch.rand((), generator=generator, dtype=torch.float64) < probability)


def constant() -> RateSchedule:
    """The factor 1 throughout.

    Examples:
        >>> from batchkern.schedules import constant
        >>> constant()(0.5)
        1.0
    """
    return lambda progress: 1.0


def cosine() -> RateSchedule:
    """Half a cosine, which falls from 1 to 0.

    Examples:
        >>> from batchkern.schedules import cosine
        >>> [round(cosine()(progress), 2) for progress in (0, 0.25, 0.5, 0.75)]
        [1.0, 0.85, 0.5, 0.15]
    """
    return lambda progress: 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class step:
    """The factor is multiplied by ``gamma`` at each milestone; the default is that of the trimming paper (epochs 50 and
    100 of 150).

    It is a class, so that it can be sent to worker processes, and its values appear in a run's config.json.

    Args:
        milestones: increasing fractions of the training, in (0, 1): epoch 30 of 100 is 0.3.
        gamma: above 0.

    Examples:
        >>> from batchkern.schedules import step
        >>> schedule = step(milestones=(0.5, 0.75), gamma=0.5)
        >>> [schedule(progress) for progress in (0, 0.5, 0.75)]
        [1.0, 0.5, 0.25]
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
    """``schedule``, multiplied by a factor that rises linearly from ``start`` to 1 over the first part of the training.

    Args:
        schedule: the factors after the warm-up.
        share: fraction of the training that the warm-up takes, in (0, 1].
        start: the factor at the beginning.

    Examples:
        >>> from batchkern.schedules import constant, warm_up
        >>> schedule = warm_up(constant(), share=0.25, start=0.0)
        >>> [schedule(progress) for progress in (0, 0.125, 0.25, 0.5)]
        [0.0, 0.5, 1.0, 1.0]
    """
    return lambda progress: schedule(progress) * min(1.0, start + (1 - start) * progress / share)


_STEP = re.compile(r"step\(\s*milestones\s*=\s*\(([^()]*)\)\s*(?:,\s*gamma\s*=\s*([^,()]*))?\)")


def parse_step(text: str) -> step | None:
    """The schedule of ``"step(milestones=(0.3, 0.6), gamma=0.1)"``; ``None`` if the text is not of that form.

    Args:
        text: with or without ``gamma``.

    Raises:
        UserError: :class:`step` does not accept the numbers.

    Examples:
        >>> from batchkern.schedules import parse_step
        >>> parse_step("step(milestones=(0.3, 0.6), gamma=0.1)")
        step(milestones=(0.3, 0.6), gamma=0.1)
        >>> parse_step("cosine") is None
        True
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
