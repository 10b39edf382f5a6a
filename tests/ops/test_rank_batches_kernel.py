"""The CPU kernel of rank_batches, at every instruction set, against NumPy's stable sort."""

from __future__ import annotations

import math

import kernel_backend
import numpy as np
import pytest
import torch
from kernel_cases import DTYPES, INSTRUCTION_SETS, REPEATS, on_threads, with_instruction_set
from torch import Tensor

import batchkern

OPS = torch.ops.batchkern


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest):
    with with_instruction_set(request.param):
        yield request.param


def order(losses: Tensor) -> Tensor:
    """All indices by falling loss: NaN first, ties by lower index."""
    wide = losses.double().numpy()
    nan = np.isnan(wide)
    return torch.from_numpy(np.lexsort((np.where(nan, 0, -wide), ~nan)))


def draws(n: int) -> dict[str, Tensor]:
    special = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 3.0])
    random = torch.randn(n)
    return {
        "random": random,
        "few": (2 * random).round(),
        "special": special[torch.randint(len(special), (n,))],
        "one apart": torch.where(torch.arange(n) == n // 2, 2.0, 1.0),  # every digit but one in a single bin
        "rising": torch.arange(n, dtype=torch.float32) - n / 3,
        "close": 1 + torch.randint(300, (n,)) * 2.0**-23,  # the lower digits decide
    }


@pytest.mark.parametrize("n", [0, 1, 2, 3, 255, 256, 257, 400, 65_537])
def test_ranks(instruction_set: str, n: int) -> None:
    for kind, losses in draws(n).items():
        for dtype in DTYPES if kind in ("random", "special") else DTYPES[:1]:
            narrow = losses.to(dtype)
            expected = order(narrow)
            for fraction in (1e-9, 0.03, 0.2, 0.5, 1.0):  # of 65,537: one, few that are selected, many that are sorted
                count = min(n, max(1, math.floor(fraction * n)))
                assert torch.equal(batchkern.rank_batches(narrow, fraction), expected[:count]), (kind, dtype)


def test_every_count(instruction_set: str) -> None:
    losses = draws(70)["special"]
    expected = order(losses)
    for count in range(0, 71, 5 if kernel_backend.chosen == "host" else 1):  # 70 too, with that of all
        assert torch.equal(OPS.rank_batches(losses, count), expected[:count])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(instruction_set: str, dtype: torch.dtype) -> None:
    losses = draws(257)["few"].to(dtype)
    expected = OPS.rank_batches(losses, 100)
    assert torch.equal(expected, order(losses)[:100])
    assert torch.equal(OPS.rank_batches(losses.repeat_interleave(3)[1::3], 100), expected)
    assert torch.equal(OPS.rank_batches(torch.cat([losses[:1], losses])[1:], 100), expected)
    assert torch.equal(OPS.rank_batches(torch._neg_view(-losses), 100), expected)
    assert torch.equal(OPS.rank_batches(losses[:1].expand(257), 100), torch.arange(100))


def test_repeats_and_threads_change_nothing(instruction_set: str) -> None:
    losses = draws(65_537)["few"]
    expected = order(losses)[:30_000]
    for threads in (1, 2):
        with on_threads(threads):
            assert all(torch.equal(OPS.rank_batches(losses, 30_000), expected) for _ in range(REPEATS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(OPS.rank_batches.default, (torch.randn(18).to(dtype)[::2], 4))


@pytest.mark.parametrize(
    ("losses", "count", "error", "message"),
    [
        (torch.ones(3).double(), 1, TypeError, "losses must be float32, bfloat16 or float16, got Double"),
        (torch.ones(3, 1), 1, ValueError, r"losses must be \(N,\), got \[3, 1\]"),
        (torch.tensor(1.0), 1, ValueError, r"losses must be \(N,\), got \[\]"),
        (torch.ones(3), 4, ValueError, r"k must be in \[0, 3\], got 4"),
        (torch.ones(3), -1, ValueError, r"k must be in \[0, 3\], got -1"),
    ],
)
def test_refuses(losses: Tensor, count: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OPS.rank_batches(losses, count)
