"""Optimizers and learning-rate schedules: built from settings, checked, and loaded from a checkpoint."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchkern import schedules
from batchkern.errors import UserError
from batchkern.validation import check_choice, check_kind, check_range

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


OPTIMIZERS = ("sgd", "adam", "adamw")


def check_rates(lr: float, momentum: float, weight_decay: float) -> tuple[float, float, float]:
    """The three settings, checked and converted to Python numbers."""
    most = torch.finfo(torch.float32).max
    return (
        check_range("lr", lr, 0, most, open_low=True),
        check_range("momentum", momentum, 0, 1),
        check_range("weight_decay", weight_decay, 0, most),
    )


def build_optimizer(
    optimizer: str | OptimizerFactory,
    parameters: list[nn.Parameter],
    lr: float,
    momentum: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    if callable(optimizer):
        return _checked_optimizer(optimizer(parameters), parameters)
    check_choice("optimizer", optimizer, OPTIMIZERS, function=True)
    if optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if momentum == 1:
        raise UserError(f"momentum must be below 1 for {optimizer}, where it is the first beta, got {momentum!r}")
    cls = torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW
    return cls(parameters, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay)


def _checked_optimizer(built: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Checks a user's optimizer; converts NumPy numbers to Python numbers, since a checkpoint with them could not be
    read."""
    kind = type(built).__name__
    check_kind("what optimizer returns", built, torch.optim.Optimizer, "a torch.optim.Optimizer")
    closure = inspect.signature(built.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(f"optimizer must be one whose step needs no closure, got {kind}")
    theirs = {id(parameter) for group in built.param_groups for parameter in group["params"]}
    if not any(id(parameter) in theirs for parameter in parameters):
        raise UserError(f"optimizer must train the parameters that it is given; those of this {kind} are others")
    for group in (built.defaults, *built.param_groups):
        for name, value in group.items():
            group[name] = tuple(map(_plain_number, value)) if type(value) is tuple else _plain_number(value)
    return built


def _plain_number(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


_STATES: dict[type, set[str]] = {
    torch.optim.SGD: {"momentum_buffer"},
    torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
}
"""The state that the named optimizers keep for each parameter."""


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads the state of an optimizer.

    Raises:
        ValueError: an option is missing or of another type, which torch would detect only in the next update.
    """
    for own, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for name, value in own.items():
            if type(saved.get(name)) is not type(value):
                raise ValueError(
                    f"{name} of the optimizer is {saved.get(name)!r:.40}, not of type {type(value).__name__}"
                )
    optimizer.load_state_dict(state)
    names = _STATES.get(type(optimizer))
    for parameter, kept in optimizer.state.items() if names else ():
        for name, value in kept.items():
            fits = isinstance(value, Tensor) and value.shape == (() if name == "step" else parameter.shape)
            whole_state = kept.keys() - {"max_exp_avg_sq"} == names  # kept with amsgrad=True
            if not whole_state or not (fits or value is None) or (name == "step" and not value >= 1):
                raise ValueError(f"the optimizer's {name} is not that of a parameter of shape {tuple(parameter.shape)}")


def pick_schedule(schedule: str | schedules.RateSchedule) -> schedules.RateSchedule:
    if callable(schedule):
        checked = partial(_factor, schedule)
        checked(0.0)
        return checked
    if isinstance(schedule, str) and schedule not in schedules.RATES and (steps := schedules.parse_step(schedule)):
        return steps
    allowed = [*schedules.RATES, "step(milestones=(0.3, 0.6), gamma=0.1)"]
    check_choice("schedule", schedule, allowed, function=True)
    return schedules.RATES[schedule]()


def _factor(schedule: schedules.RateSchedule, progress: float) -> float:
    factor = schedule(progress)
    if not isinstance(factor, numbers.Real) or not math.isfinite(factor):
        raise UserError(f"schedule must return a factor on the learning rate, got {factor!r:.60} at {progress:g}")
    return float(factor)
