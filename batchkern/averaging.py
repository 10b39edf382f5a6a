"""An exponential moving average of a model's weights, which is evaluated and saved instead of the last weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from batchkern.saved_state import saved_number


class WeightAverage:
    """The average of all floating-point entries of a model's state, including the running statistics of batch norm.

    After update t, counted from 1, the average moves by 1 - d towards the weights, with d = min(decay, (1 + t) /
    (10 + t)), as in TensorFlow's ``ExponentialMovingAverage``, so that the random initial weights soon lose their
    influence.

    Args:
        model: the model; its state must stay in the same memory.
        decay: in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
        self.average = {name: value.clone() for name, value in self.weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average; called after each update of the weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_([*self.average.values()], [*self.weights.values()], 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Copies the average into the model."""
        for name, value in self.weights.items():
            value.copy_(self.average[name])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the model has the averaged weights; afterwards it has its own weights again."""
        own = [value.clone() for value in self.weights.values()]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for value, before in zip(self.weights.values(), own, strict=True):
                    value.copy_(before)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = state["average"]
        if {name: value.shape for name, value in saved.items()} != {n: v.shape for n, v in self.average.items()}:
            raise ValueError("the average does not belong to the weights of this model")
        self.updates = saved_number(state, "updates")
        for name, value in self.average.items():
            value.copy_(saved[name])
