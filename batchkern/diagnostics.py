"""Which samples the loss counts, and their losses: figures for each epoch, and values for each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

QUANTILES = (0.1, 0.5, 0.9)
TIMES = (0.0, 0.1, 0.5, 0.9, 1.0)


class SampleLog:
    """Stores, on the device, how often each sample was kept and its last known loss.

    A sample is kept when it is in a batch and the loss counts it; it is not if trimming drops it or if its batch is not
    replayed.

    Args:
        rows: size of the training set.
        device: the device of the losses.
        mislabelled: ``(rows,)`` bool, which labels are wrong; None if this is not known.
    """

    def __init__(self, rows: int, device: torch.device, mislabelled: Tensor | None) -> None:
        self.times_kept = torch.zeros(rows, dtype=torch.int32, device=device)
        self.last_loss = torch.full((rows,), torch.nan, dtype=torch.float32, device=device)
        self.mislabelled = None if mislabelled is None else mislabelled.to(device)
        self._times_before = self.times_kept.clone()
        """``times_kept`` at the beginning of the epoch."""
        self._kept_before: Tensor | None = None
        """``(rows,)`` bool: whether a sample was kept in the previous epoch."""

    def observe(self, indices: Tensor, losses: Tensor, kept: Tensor | None) -> None:
        """Records rows ``(b,)`` of a batch, their losses, and the positions in the batch of the kept rows (``None``:
        all).

        If a row is in the batch several times, its highest loss is recorded, which does not depend on the order in
        which a GPU processes them.
        """
        rows = indices.to(self.last_loss.device)
        self.last_loss.scatter_reduce_(0, rows, losses.float(), "amax", include_self=False)
        counted = rows if kept is None else rows[kept]
        self.times_kept.index_add_(0, counted, torch.ones_like(counted, dtype=torch.int32))

    def end_epoch(self) -> dict[str, Any]:
        """Figures of the epoch:

        - ``times_kept``: how often samples were kept since the training began: minimum, 10 %, median, 90 %, maximum;
        - ``never_kept``: fraction of the samples that were never kept so far;
        - ``kept_loss``, ``dropped_loss``: 10 %, 50 % and 90 % quantiles of the last losses of the samples kept in this
          epoch and of all others (``None`` where there is none);
        - ``kept_overlap``: fraction of the samples kept in this epoch that were also kept in the previous one, and
          ``kept_overlap_by_chance``: its expected value for a random selection of the same size (both from the second
          epoch on);
        - ``kept_mislabelled``: fraction of mislabelled samples among the kept ones, counted each time they were kept
          (if wrong labels are known).
        """
        visits = self.times_kept - self._times_before
        kept = visits > 0
        known = ~self.last_loss.isnan()
        row: dict[str, Any] = {
            "times_kept": quantiles(self.times_kept, TIMES),
            "never_kept": float((self.times_kept == 0).double().mean()),
            "kept_loss": quantiles(self.last_loss[kept & known], QUANTILES),
            "dropped_loss": quantiles(self.last_loss[~kept & known], QUANTILES),
        }
        if self._kept_before is not None:
            row["kept_overlap"] = float((kept & self._kept_before).sum() / kept.sum().clamp(min=1))
            row["kept_overlap_by_chance"] = float(self._kept_before.double().mean())
        if self.mislabelled is not None:
            row["kept_mislabelled"] = float(visits[self.mislabelled].sum() / visits.sum().clamp(min=1))
        self._times_before, self._kept_before = self.times_kept.clone(), kept
        return row

    def samples(self) -> dict[str, Tensor]:
        """A value for each sample of the training set, at the end of the training."""
        values = {"times_kept": self.times_kept, "last_loss": self.last_loss}
        return values if self.mislabelled is None else values | {"mislabelled": self.mislabelled}

    def state_dict(self) -> dict[str, Any]:
        return {
            "times_kept": self.times_kept,
            "last_loss": self.last_loss,
            "times_before": self._times_before,
            "kept_before": self._kept_before,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device, like = self.last_loss.device, self.last_loss
        types = {"times_kept": torch.int32, "last_loss": like.dtype, "times_before": torch.int32}
        for name, value in state.items():
            if value is None and name == "kept_before":
                continue
            if not isinstance(value, Tensor) or value.shape != like.shape or value.layout != like.layout:
                raise ValueError(f"{name} does not belong to the {len(like)} samples of the training set")
            if value.dtype != types.get(name, torch.bool):
                raise ValueError(f"{name} is of type {value.dtype}, not of {types.get(name, torch.bool)}")
        self.times_kept, self.last_loss = state["times_kept"].to(device), state["last_loss"].to(device)
        self._times_before = state["times_before"].to(device)
        before = state["kept_before"]
        self._kept_before = None if before is None else before.to(device)


def quantiles(values: Tensor, at: tuple[float, ...]) -> list[float] | None:
    """Quantiles by nearest rank (``torch.quantile`` takes at most 16 million values); ``None`` if there are no
    values."""
    if len(values) == 0:
        return None
    ordered = values.sort().values
    places = [round(q * (len(values) - 1)) for q in at]
    picked: list[float] = ordered[torch.tensor(places, device=values.device)].tolist()
    return picked
