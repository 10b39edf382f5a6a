"""The accuracy of the mean KL of virtual rows close to their reference, ours and that of F.kl_div; and the gradient of
a confident token with bfloat16 logits.

Float32 logits, virtual rows reference + perturbation * N(0, 1); errors are relative to the mean in float64 on the same
float32 logits. F.kl_div takes log_softmax of both, summed in float32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import batchkern
from batchkern import reference
from bench import inputs

ROWS = {10: 4096, 1000: 512, 32000: 32}
PERTURBATIONS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


def with_kl_div(p: Tensor, q: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(q, 1), F.log_softmax(p, 1), reduction="none", log_target=True).sum(1)


def with_batchkern(p: Tensor, q: Tensor) -> Tensor:
    return batchkern.soft_label_kl(p, q, per_sample=True)[1]


@pytest.mark.parametrize("classes", ROWS)
def test_accuracy(session: Any, classes: int) -> None:
    session.begin()
    torch.manual_seed(0)
    p, _ = inputs.trained_logits(ROWS[classes], classes, session.device.device)
    noise = torch.randn_like(p)
    for perturbation in PERTURBATIONS:
        q = p + perturbation * noise
        # In float64, by a formula that tests compare with 50 digits: sum P t would lose digits even in float64.
        exact = float(reference.soft_label_kl(p.double(), q.double()).mean())
        for variant, divergence in (("ours", with_batchkern), ("F.kl_div", with_kl_div)):
            rows = divergence(p, q)
            error = abs(float(rows.double().mean()) / exact - 1)
            entry = {"op": "soft_label_kl", "classes": classes, "perturbation": perturbation, "variant": variant}
            session.add("accuracy", {**entry, "error": error, "lowest_row": float(rows.min())})


def test_confident_tokens_and_10_classes(session: Any) -> None:
    """The gradient of the weight of the target, with a single feature, which is 1, and two words."""
    session.begin()
    target = torch.tensor([0], device=session.device.device)
    for probability in (0.9, 0.99, 0.999, 0.9999):
        z = torch.tensor([[probability], [1 - probability]], dtype=torch.float64).log()
        weight = (z - z[1]).to(session.device.device, torch.bfloat16)
        hidden = torch.ones(1, 1, dtype=torch.bfloat16, device=weight.device)
        found = {}
        for name, dtype, loss in (
            ("exact", torch.float64, lambda h, w: F.cross_entropy(F.linear(h, w), target)),
            ("ours", torch.bfloat16, lambda h, w: batchkern.linear_cross_entropy(h, w, target)),
            ("eager", torch.bfloat16, lambda h, w: F.cross_entropy(F.linear(h, w), target)),
        ):
            leaf = weight.to(dtype, copy=True).requires_grad_()
            loss(hidden.to(dtype), leaf).backward()
            found[name] = float(leaf.grad[0])
        exact = torch.softmax(weight.double(), 0)[0].item()
        session.add("confident", {"op": "linear_cross_entropy", "probability": exact, **found})
