"""Stops a training whose loss or weights are not finite, before its last good checkpoint is overwritten."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NoReturn

import torch
from torch import Tensor

from batchkern.errors import UserError

CUDA_CHECK_EVERY = 50
"""On a GPU, losses are checked every this many updates, since each check waits for the device."""


class FiniteCheck:
    """Raises a UserError at, or on a GPU soon after, the first loss that is not finite.

    Args:
        device: the device of the losses.
        rest: returns a further part of the error message, about files.
    """

    def __init__(self, device: torch.device, rest: Callable[[], str]) -> None:
        self._rest = rest
        self._first = torch.full((), -1, dtype=torch.int64, device=device)

    def watch(self, loss: Tensor, update: int) -> None:
        if loss.device.type == "cpu":
            if not torch.isfinite(loss):
                self._fail(update, "the loss is not finite at")
            return
        first = ~torch.isfinite(loss) & (self._first < 0)
        self._first = torch.where(first, update, self._first)
        if update % CUDA_CHECK_EVERY == CUDA_CHECK_EVERY - 1:
            self.losses()

    def losses(self) -> None:
        """Checks the losses watched so far."""
        update = int(self._first)
        if update >= 0:
            self._fail(update, "the loss is not finite at")

    def weights(self, weights: Iterable[Tensor], updates: int) -> None:
        """Checks the weights: a step after a finite loss can overflow, and must not replace a finite checkpoint."""
        if not torch.stack([weight.detach().isfinite().all() for weight in weights]).all():
            self._fail(updates - 1, "the weights are not finite after")

    def _fail(self, update: int, what: str) -> NoReturn:
        raise UserError(f"{what} update {update + 1}{self._rest()}; a lower learning rate may help")
