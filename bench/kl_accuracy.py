"""A Markdown table: how exact the mean KL of virtual rows next to their reference is, here and with F.kl_div.

Float32 logits, reference rows 2 * N(0, 1), virtual rows reference + perturbation * N(0, 1); errors are relative to the
mean in float64 on the same float32 logits. F.kl_div takes log_softmax of both, summed in float32.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

import batchkern

ROWS = {10: 4096, 1000: 512, 32000: 32}
EXPONENTS = range(1, 8)


def with_kl_div(reference: Tensor, virtual: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(reference, 1), F.log_softmax(virtual, 1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def exactly(reference: Tensor, virtual: Tensor) -> Tensor:
    """The reference in float64, which tests compare with 50 digits: sum P t would lose digits even there."""
    return batchkern.soft_label_kl(reference.double(), virtual.double(), per_sample=True)[1]


def rows(classes: int, seed: int) -> list[list[str]]:
    torch.manual_seed(seed)
    reference, noise = 2 * torch.randn(ROWS[classes], classes), torch.randn(ROWS[classes], classes)
    lines = []
    for exponent in EXPONENTS:
        virtual = reference + 10.0**-exponent * noise
        exact = exactly(reference, virtual).mean().item()
        line = [f"1e-{exponent}", f"{classes}", f"{exact:.2e}"]
        ours_mean, ours_rows = batchkern.soft_label_kl(reference, virtual, per_sample=True)
        theirs_rows = with_kl_div(reference, virtual)
        for mean, values in ((ours_mean, ours_rows), (theirs_rows.mean(), theirs_rows)):
            line += [f"{abs(mean.item() / exact - 1):.1e}", f"{values.min().item():.1e}"]
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    headings = ["perturbation", "classes", "mean KL", "batchkern: error", "lowest row", "F.kl_div: error", "lowest row"]
    for line in (headings, ["---:"] * len(headings), *(line for classes in ROWS for line in rows(classes, seed))):
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
