"""Inputs like the outputs of a trained network: confident for most rows, uncertain for some, wrong for a few."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURES = 32
SEPARATION = 1.15
"""The squared length of a class mean divided by 2 log C: at 1 a class can just be distinguished from C others."""
ROWS_AT_ONCE = 1 << 20


def trained_logits(rows: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``(rows, classes)`` float32 and targets ``(rows,)``: the output of the optimal classifier of classes with
    Gaussian features, whose frequencies follow Zipf's law. Like a last layer, it is linear in the features.

    Rows differ in their noise, so that a few rows have most of the loss.
    """
    logits = torch.empty(rows, classes, device=device)
    means = torch.randn(classes, FEATURES, device=device) * (SEPARATION * 2 * math.log(classes) / FEATURES) ** 0.5
    prior = torch.log(1.0 / (10 + torch.arange(classes, device=device)))
    bias = prior - prior.logsumexp(0) - means.square().sum(1) / 2
    target = torch.multinomial(prior.exp(), rows, replacement=True)
    for start in range(0, rows, ROWS_AT_ONCE):  # the features of 10 million rows would take more memory than the logits
        own = target[start : start + ROWS_AT_ONCE]
        noise = torch.randn(len(own), FEATURES, device=device) * (0.5 + torch.rand(len(own), 1, device=device))
        torch.addmm(bias, means[own] + noise, means.T, out=logits[start : start + ROWS_AT_ONCE])
    return logits, target


def trained_losses(rows: int, device: torch.device) -> Tensor:
    """Cross entropies ``(rows,)`` for ten classes."""
    logits, target = trained_logits(rows, 10, device)
    return F.cross_entropy(logits, target, reduction="none")
