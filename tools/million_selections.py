"""Checks on a million random small batches with many ties that the CPU kernels keep exactly the rows of the definition.

    python tools/million_selections.py [--cases 1000000] [--seed 0]

Losses are drawn from few values, including NaN, infinities and zeros of either sign, with and without a mask, for keep
at both ends, in between, and such that keep * n ends in exactly .5. ``trimmed_mean`` gets these losses;
``trimmed_cross_entropy`` gets duplicated rows of logits, and the expected rows follow from its own float32 losses.
Instruction sets and dtypes alternate. The oracle is a sort in NumPy that shares no code with the package; on a sample
of cases it is itself compared with ``reference.select``. The exit code is 1 if a row or a count differs.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchkern import _backend, reference

OPS = torch.ops.batchkern
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 500
"""Cases of one size, instruction set and dtype, which NumPy sorts together."""
SIZES = (*range(1, 25), 31, 32, 33, 63, 64, 65, 100)
VALUES = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1.0 + 2**-7, 2.5, 6.1e-5, -6e-8, 65504.0]


def kept_rows(losses: NDArray, valid: NDArray, keep: NDArray) -> tuple[NDArray, NDArray]:
    """The kept rows of ``(cases, B)`` losses and their number. Valid rows rank first, of these NaN, then by loss and
    index."""
    n = valid.sum(1)
    k = np.minimum(np.maximum(np.rint(keep * n), 1), n)
    nan = np.isnan(losses)
    # lexsort is stable, and its last key is the most significant; -0.0 and 0.0 compare equal.
    order = np.lexsort((np.where(nan, 0, -losses), ~nan, ~valid), axis=1)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(order.shape[1]), order.shape), axis=1)
    return rank < k[:, None], k


def draw_keep(rng: np.random.Generator, n: NDArray) -> NDArray:
    """A keep for each case: any, the ends, eighths, and (j + 1/2) / n, for which rounding has a tie."""
    cases = len(n)
    n = np.maximum(n, 1)
    half = (rng.integers(0, n) + 0.5) / n
    eighths = rng.integers(1, 9, cases) / 8
    ends = rng.choice([1e-9, 1.0, np.nextafter(1, 0)], cases)
    return np.choose(rng.integers(4, size=cases), [half, eighths, ends, 1 - rng.random(cases)])


def draw_losses(rng: np.random.Generator, cases: int, size: int, dtype: torch.dtype) -> Tensor:
    """Each case draws from one to four of the values, or from all of them."""
    distinct = rng.integers(1, 6, cases)
    distinct[distinct == 5] = len(VALUES)
    palette = rng.permuted(np.broadcast_to(VALUES, (cases, len(VALUES))), axis=1)
    which = (rng.random((cases, size)) * distinct[:, None]).astype(int)
    return torch.from_numpy(np.take_along_axis(palette, which, 1)).to(dtype)


def draw_logits(rng: np.random.Generator, cases: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Duplicates of a few rows with a few labels; some rows hold NaN or infinities."""
    classes = int(rng.integers(1, 20))
    palette = rng.normal(size=(8, classes)) * rng.choice([0.1, 3, 30])
    palette[1, rng.integers(classes)] = math.nan
    palette[2, rng.integers(classes)] = math.inf
    palette[3, rng.integers(classes)] = -math.inf
    palette[4] = 0
    labels = rng.integers(classes, size=8)
    which = rng.integers(8, size=(cases, size)) % rng.integers(1, 9, (cases, 1))
    offset = rng.integers(8, size=(cases, 1))
    which = (which + offset) % 8
    return torch.from_numpy(palette).to(dtype)[torch.from_numpy(which)], torch.from_numpy(labels[which])


def compare(
    losses: Tensor, valid: Tensor, keep: NDArray, kept: Tensor, k: Tensor, sampled: bool, counts: Counter[str]
) -> int:
    """The number of cases in which the kept rows or their number differ from the oracle's."""
    wide = losses.double().numpy()
    expected, expected_k = kept_rows(wide, valid.numpy(), keep)
    if sampled:
        for case in range(0, len(wide), 50):
            rows, number = reference.select(losses[case].float(), valid[case], keep[case])
            if not (np.array_equal(rows.numpy(), expected[case]) and number == expected_k[case]):
                raise AssertionError(f"the oracle is wrong: {losses[case]}, {valid[case]}, {keep[case]}")
            counts["sampled cases where reference.select agrees with the oracle"] += 1
    wrong = (kept.numpy() != expected).any(1) | (k.numpy() != expected_k)
    for case in wrong.nonzero()[0][:3]:
        print(f"differs: losses {losses[case].tolist()}, valid {valid[case].tolist()}, keep {float(keep[case])!r}")
        print(f"  kept {kept[case].nonzero().flatten().tolist()}, should be {expected[case].nonzero()[0].tolist()}")
    # Cases in which a row is dropped although an equal row is kept: there the index decides.
    same = (wide[:, :, None] == wide[:, None, :]) | (np.isnan(wide)[:, :, None] & np.isnan(wide)[:, None, :])
    split = (same & expected[:, :, None] & (valid.numpy() & ~expected)[:, None, :]).any((1, 2))
    product = keep * valid.numpy().sum(1)
    counts["cases"] += len(wide)
    counts["that split a tie"] += int(split.sum())
    counts["whose keep * n ends in .5"] += int((product % 1 == 0.5).sum())
    counts["with a NaN among the kept"] += int((np.isnan(wide) & expected).any(1).sum())
    counts["with masked or ignored rows"] += int((~valid.numpy()).any(1).sum())
    counts["without a valid row"] += int((~valid.numpy()).all(1).sum())
    return int(wrong.sum())


def run(cases: int, seed: int) -> tuple[int, Counter[str]]:
    """The number of cases that differ, and the counts of what was drawn."""
    rng = np.random.default_rng(seed)
    extension = _backend.extension
    assert extension is not None, _backend.extension_error
    instruction_sets, before = extension.instruction_sets(), extension.instruction_set()
    counts: Counter[str] = Counter()
    wrong = chunk = 0
    try:
        while counts["cases"] < cases:
            group = min(CHUNK, cases - counts["cases"])
            size, dtype = int(rng.choice(SIZES)), DTYPES[chunk % 3]
            extension.use_instruction_set(instruction_sets[chunk // 3 % len(instruction_sets)])
            valid = torch.from_numpy(rng.random((group, size)) >= rng.choice([0, 0.3, 0.9], (group, 1)))
            keep = draw_keep(rng, valid.sum(1).numpy())
            # The fraction is passed as a number, or as a tensor that replaces the number.
            fractions = [(float(f), None) if case % 2 else (1.0, torch.tensor(f)) for case, f in enumerate(keep)]
            if chunk % 5 < 3:
                counts["through trimmed_mean"] += group
                losses = draw_losses(rng, group, size, dtype)
                results = [
                    OPS.trimmed_mean(row, number, keep_tensor=tensor, mask=None if mask.all() else mask)[1:]
                    for row, mask, (number, tensor) in zip(losses, valid, fractions, strict=True)
                ]
                kept, k = (torch.stack(column) for column in zip(*results, strict=True))
            else:
                counts["through trimmed_cross_entropy"] += group
                logits, target = draw_logits(rng, group, size, dtype)
                target[~valid] = -100
                outputs = [
                    OPS.trimmed_cross_entropy(z, t, number, keep_tensor=tensor)
                    for z, t, (number, tensor) in zip(logits, target, fractions, strict=True)
                ]
                _, losses, _, kept, k = (torch.stack(column) for column in zip(*outputs, strict=True))
            wrong += compare(losses, valid, keep, kept, k, chunk % 10 in (0, 3), counts)
            counts[f"{extension.instruction_set()}, {str(dtype).removeprefix('torch.')}"] += group
            chunk += 1
    finally:
        extension.use_instruction_set(before)
    return wrong, counts


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the rows that the CPU kernels keep with the definition's.")
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    wrong, counts = run(arguments.cases, arguments.seed)
    for what, count in counts.items():
        print(f"{count:9,} {what}")
    print(f"{wrong:9,} differ ({time.perf_counter() - start:.0f} s)")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
