"""Inputs that look like those of a trained network: sure of most rows, unsure of some, wrong about a few."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURES = 32
SEPARATION = 1.15
"""Squared length of a class mean, over 2 log C: at 1 a class can just be told from C others."""
ROWS_AT_ONCE = 1 << 20


def trained_logits(rows: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``(rows, classes)`` float32 and targets ``(rows,)``: the output of the best classifier there is for classes that
    are Gaussian clouds of features, as frequent as Zipf's law has it. It is linear in the features, as a last layer is.

    Rows differ in how noisy they are, so a few have most of the loss.
    """
    logits = torch.empty(rows, classes, device=device)
    means = torch.randn(classes, FEATURES, device=device) * (SEPARATION * 2 * math.log(classes) / FEATURES) ** 0.5
    prior = torch.log(1.0 / (10 + torch.arange(classes, device=device)))
    bias = prior - prior.logsumexp(0) - means.square().sum(1) / 2
    target = torch.multinomial(prior.exp(), rows, replacement=True)
    for start in range(0, rows, ROWS_AT_ONCE):  # of 10 million rows the features would outweigh the logits
        own = target[start : start + ROWS_AT_ONCE]
        noise = torch.randn(len(own), FEATURES, device=device) * (0.5 + torch.rand(len(own), 1, device=device))
        torch.addmm(bias, means[own] + noise, means.T, out=logits[start : start + ROWS_AT_ONCE])
    return logits, target


def trained_losses(rows: int, device: torch.device) -> Tensor:
    """Cross entropies ``(rows,)`` of ten classes."""
    logits, target = trained_logits(rows, 10, device)
    return F.cross_entropy(logits, target, reduction="none")
