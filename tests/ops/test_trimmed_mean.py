"""trimmed_mean against a sort in plain Python."""

from __future__ import annotations

import math
import os
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
import warm
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import batchkern


def highest(losses: list[float], keep: float, mask: list[bool] | None = None) -> list[int]:
    """The kept rows by the documented rule: NaN first, then by loss, then by index; masked rows do not count."""
    rows = [i for i in range(len(losses)) if mask is None or mask[i]]
    rows.sort(key=lambda i: (0, 0.0, i) if math.isnan(losses[i]) else (1, -losses[i], i))
    return rows[: max(round(keep * len(rows)), 1)]


def selected(
    scores: list[float],
    keep: float,
    mask: list[bool],
    order: str = "highest",
    skip: float = 0.0,
    above: float | None = None,
) -> set[int]:
    """The kept rows of one sample by the documented rule: NaN ranks highest, the first row first of equal ones."""
    rows = [i for i in range(len(scores)) if mask[i]]
    if order == "highest":
        rows.sort(key=lambda i: (0, 0.0, i) if math.isnan(scores[i]) else (1, -scores[i], i))
    else:
        rows.sort(key=lambda i: (1, 0.0, i) if math.isnan(scores[i]) else (0, scores[i], i))
    k = min(max(round(keep * len(rows)), 1), len(rows))
    first = min(round(skip * len(rows)), len(rows) - k)
    kept = set(rows[first : first + k])
    if above is not None:
        kept |= {i for i in rows[first:] if math.isnan(scores[i]) or scores[i] > above}
    return kept


def run(losses: Tensor, keep: float | Tensor, **options) -> tuple[Tensor, Tensor]:
    """The mean and its gradient."""
    leaf = losses.detach().clone().requires_grad_()
    mean = batchkern.trimmed_mean(leaf, keep, **options)
    (grad,) = torch.autograd.grad(mean, leaf)
    return mean.detach(), grad


# Few values, so that most rows tie.
LOSS = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 2.5, 1e-40])
ROWS = st.lists(st.tuples(LOSS, st.booleans()), min_size=1, max_size=40)
KEEP = st.one_of(st.floats(0, 1, exclude_min=True), st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]))


@given(rows=ROWS, keep=KEEP, masked=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]))
@example(rows=[(0.0, True), (-0.0, True), (0.0, True), (-0.0, True)], keep=0.5, masked=False, dtype=torch.float32)
@example(rows=[(-math.inf, False), (-math.inf, True)], keep=1.0, masked=True, dtype=torch.float32)
@example(rows=[(math.nan, False), (1.0, True), (2.5, True)], keep=0.5, masked=True, dtype=torch.float32)
def test_selection(rows: list[tuple[float, bool]], keep: float, masked: bool, dtype: torch.dtype) -> None:
    losses = [loss for loss, _ in rows]
    mask = [ok for _, ok in rows] if masked else None
    kept = highest(losses, keep, mask)
    tensor = torch.tensor(losses, dtype=dtype)
    mean, grad = run(tensor, keep, mask=None if mask is None else torch.tensor(mask))
    expected = torch.zeros(len(losses), dtype=dtype)
    expected[kept] = 1 / max(len(kept), 1)
    torch.testing.assert_close(grad, expected)
    dropped = [i for i in range(len(losses)) if i not in kept]
    assert (grad[dropped].view(torch.uint8) == 0).all()  # +0.0, bit for bit
    if kept:
        total = sum(torch.tensor([losses[i] for i in kept], dtype=torch.float64).tolist())
        torch.testing.assert_close(mean.double(), torch.tensor(total / len(kept)).double(), equal_nan=True)
    else:
        assert mean.isnan()


@given(
    rows=st.lists(st.tuples(LOSS, st.booleans()), min_size=1, max_size=30),
    samples=st.integers(1, 3),
    keep=KEEP,
    order=st.sampled_from(["highest", "lowest"]),
    skip=st.sampled_from([0.0, 0.1, 0.25, 0.5]),
    above=st.sampled_from([None, 0.0, 0.7, -math.inf]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
@example([(1.0, True)], 1, 0.4, "highest", 0.6, None, torch.float32)  # what is skipped leaves one
@example([(math.nan, True), (1.0, True), (0.5, True)], 1, 0.4, "lowest", 0.0, None, torch.float32)
@example([(math.nan, True), (2.5, True), (1.0, True), (0.0, True)], 1, 0.25, "highest", 0.25, 0.5, torch.float32)
def test_bands(rows, samples, keep, order, skip, above, dtype) -> None:
    skip, above = min(skip, 1 - keep), above if order == "highest" else None
    width = len(rows) // samples
    shape = samples, width
    score, mask = (torch.tensor(column[: samples * width]).view(shape) for column in zip(*rows, strict=True))
    score, mask = score.to(dtype), mask.bool()
    kept = [selected(score[i].tolist(), keep, mask[i].tolist(), order, skip, above) for i in range(samples)]
    expected = torch.tensor([[i in part for i in range(width)] for part in kept]).view(shape).bool()
    band = {"order": order, "skip": skip, "above": above, "mask": mask, "within": "sample"}
    assert torch.equal(batchkern.select_rows(score, keep, **band), expected)
    losses, weight = torch.randn(samples, width), torch.rand(samples, width)
    mean, grad = run(losses, keep, score=score, weight=weight, **band)
    counts = torch.where(expected, weight, 0).double()
    exact = (counts * losses).sum() / counts.sum()
    torch.testing.assert_close(mean.double(), exact, equal_nan=True, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, (counts / counts.sum()).where(expected, 0).float(), rtol=1e-5, atol=1e-7)
    if samples == 1:
        whole = {name: value for name, value in band.items() if name != "within"}
        assert torch.equal(batchkern.select_rows(score, keep, **whole), expected)


def test_any_shape_is_its_rows() -> None:
    losses = torch.randn(2, 3, 4, 5).transpose(1, 3)
    flat = losses.reshape(-1)
    mean, grad = run(losses, 0.3)
    expected, flat_grad = run(flat, 0.3)
    assert torch.equal(mean, expected)
    assert torch.equal(grad, flat_grad.view(losses.shape))
    assert torch.equal(batchkern.select_rows(losses, 0.3), grad > 0)
    assert run(torch.tensor(2.0), 0.5)[0] == 2
    # Ranked apart: of each sample's 60 rows 18.
    assert batchkern.select_rows(losses, 0.3, within="sample").flatten(1).sum(1).tolist() == [18, 18]
    assert batchkern.select_rows(flat[:5], 0.3, within="sample").all()  # a sample of one row keeps it


def test_kept_rows_alone_decide() -> None:
    """What is dropped may be infinite in losses and weights."""
    losses, score = torch.tensor([1.0, math.inf, 3.0, math.nan]), torch.tensor([4.0, 1.0, 3.0, 2.0])
    mean, grad = run(losses, 0.5, score=score, weight=torch.tensor([1.0, math.nan, 3.0, math.inf]))
    assert mean == (1 + 3 * 3) / 4
    assert grad.tolist() == [0.25, 0.0, 0.75, 0.0]


def test_keep_is_any_real_number_or_float_tensor() -> None:
    losses = torch.randn(40)
    for keep in (numpy.float32(0.25), Fraction(1, 4), torch.tensor(0.25), torch.tensor(0.25).bfloat16()):
        assert torch.equal(run(losses, keep)[1], run(losses, 0.25)[1])
    assert torch.equal(run(losses, 1)[1], run(losses, 1.0)[1])


def test_k_is_python_rounding_of_keep_times_n() -> None:
    keeps = (0.01, 0.1, 0.2, 0.25, 0.3, 0.5, 0.625, 0.7, 0.75, 0.9, 0.999, 1.0)
    for n in [*range(1, 65), 100, 127, 250, 333, 511, 512]:
        losses = torch.arange(n, dtype=torch.float64)
        for keep in keeps:
            k = max(round(keep * n), 1)
            assert batchkern.trimmed_mean(losses, keep).item() == pytest.approx(n - (k + 1) / 2, rel=1e-12)


def test_valid_minus_infinity_ranks_above_masked_rows() -> None:
    losses = torch.tensor([math.inf, -math.inf, math.nan])
    mean, grad = run(losses, 1.0, mask=torch.tensor([False, True, False]))
    assert mean == -math.inf
    assert grad.tolist() == [0, 1, 0]


def test_nan_is_kept_not_trimmed_away() -> None:
    mean, grad = run(torch.tensor([1.0, 5.0, math.nan, math.inf]), 0.25)
    assert mean.isnan()
    assert grad.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("mask", [None, []], ids=["no mask", "mask"])
def test_empty(mask: list | None) -> None:
    mean, grad = run(torch.empty(0), 0.5, mask=None if mask is None else torch.empty(0, dtype=torch.bool))
    assert mean.isnan()
    assert mean.dim() == 0
    assert grad.shape == (0,)


def test_all_masked_is_nan_with_zero_gradient() -> None:
    mean, grad = run(torch.tensor([1.0, math.inf, math.nan]), 0.5, mask=torch.zeros(3, dtype=torch.bool))
    assert mean.isnan()
    assert grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_losses_are_summed_in_float32(dtype: torch.dtype) -> None:
    losses = torch.rand(4096).to(dtype)
    mean, grad = run(losses, 0.5)
    assert mean.dtype == torch.float32
    assert grad.dtype == dtype
    expected = sum(losses.double().sort(descending=True).values[:2048].tolist()) / 2048
    assert mean.item() == pytest.approx(expected, rel=1e-6)  # a bfloat16 sum would be off by 1e-2


def test_the_upstream_factor_is_multiplied_before_rounding() -> None:
    # A loss scale of 2^16 on 1 / 100003, which float16 holds to two digits only.
    leaf = torch.ones(100_003, dtype=torch.float16, requires_grad=True)
    (batchkern.trimmed_mean(leaf, 1.0) * 2.0**16).backward()
    assert (leaf.grad == torch.tensor(2.0**16 / 100_003).half()).all()


def test_strided_losses() -> None:
    base = torch.randn(20, 3)
    losses = base[::2, 1]
    mean, grad = run(losses, 0.4)
    kept = highest(losses.tolist(), 0.4)
    assert mean.item() == pytest.approx(sum(losses[i].item() for i in kept) / 4, rel=1e-6)
    leaf = base.clone().requires_grad_()
    batchkern.trimmed_mean(leaf[::2, 1], 0.4).backward()
    expected = torch.zeros(20, 3)
    expected[::2, 1] = grad
    assert torch.equal(leaf.grad, expected)


def test_losses_and_upstream_of_stride_zero() -> None:
    one = torch.tensor(3.0, requires_grad=True)
    mean = batchkern.trimmed_mean(one.expand(8), 0.5)
    assert mean == 3
    mean.expand(5).sum().backward()
    assert one.grad == 5


def test_keep_as_tensor() -> None:
    losses = torch.randn(37)
    keep = torch.tensor(0.0, dtype=torch.float64)
    for value in (0.1, 0.5, 0.999, 1.0):
        keep.fill_(value)
        for got, expected in zip(run(losses, keep), run(losses, value), strict=True):
            assert torch.equal(got, expected)


def test_gradcheck() -> None:
    losses = torch.randperm(12).double().requires_grad_()  # gaps of 1: a finite difference changes no rank
    mask = torch.arange(12) % 4 != 1
    assert torch.autograd.gradcheck(lambda x: batchkern.trimmed_mean(x, 0.4) ** 2, losses)
    assert torch.autograd.gradcheck(lambda x: batchkern.trimmed_mean(x, 0.4, mask=mask), losses)


def test_second_derivative_raises() -> None:
    losses = torch.randn(6, requires_grad=True)
    (grad,) = torch.autograd.grad(batchkern.trimmed_mean(losses, 0.5) ** 2, losses, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_compiled_equals_eager() -> None:
    compiled = torch.compile(batchkern.trimmed_mean, fullgraph=True, backend="aot_eager")
    losses, mask = torch.randn(33), torch.arange(33) % 3 > 0
    for options in ({}, {"mask": mask}):
        for fraction in (0.3, torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)):
            leaf = losses.clone().requires_grad_()
            mean = compiled(leaf, fraction, **options)
            mean.backward()
            expected = run(losses, fraction, **options)
            torch.testing.assert_close((mean.detach(), leaf.grad), expected)


LOSSES = torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"losses": [1.0, 2.0]}, TypeError, ["losses", "list", "tensor"]),
        ({"losses": torch.zeros(4, dtype=torch.int64)}, TypeError, ["losses", "int64", "float32"]),
        ({"keep": 0.0}, ValueError, ["keep", "0.0", "(0, 1]"]),
        ({"keep": -0.5}, ValueError, ["keep", "-0.5", "(0, 1]"]),
        ({"keep": 1.0001}, ValueError, ["keep", "1.0001", "(0, 1]"]),
        ({"keep": math.nan}, ValueError, ["keep", "nan", "(0, 1]"]),
        ({"keep": "half"}, TypeError, ["keep", "str", "(0, 1]"]),
        ({"keep": True}, TypeError, ["keep", "bool", "(0, 1]"]),
        ({"keep": torch.tensor(1)}, TypeError, ["keep", "int64", "float"]),
        ({"keep": torch.tensor([0.5]).double()}, TypeError, ["keep", "1-dim", "0-dim"]),
        ({"keep": torch.tensor(2.0).double()}, ValueError, ["keep", "2.0", "(0, 1]"]),
        ({"keep": torch.tensor(0.5, device="meta").double()}, ValueError, ["keep", "meta", "cpu"]),
        ({"mask": [True] * 4}, TypeError, ["mask", "list", "tensor"]),
        ({"mask": torch.ones(4)}, TypeError, ["mask", "float32", "bool"]),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, ["mask", "(3,)", "(4,)"]),
        ({"mask": torch.ones(4, 1, dtype=torch.bool)}, ValueError, ["mask", "(4, 1)", "(4,)"]),
        ({"score": torch.ones(3)}, ValueError, ["score", "(3,)", "losses", "(4,)"]),
        ({"score": torch.ones(4, dtype=torch.int64)}, TypeError, ["score", "int64"]),
        ({"score": torch.ones(4, requires_grad=True)}, ValueError, ["score", "gradient"]),
        ({"weight": torch.ones(1)}, ValueError, ["weight", "(1,)", "(4,)"]),
        ({"weight": torch.ones(4, requires_grad=True)}, ValueError, ["weight", "gradient"]),
        ({"order": "smallest"}, ValueError, ["order", "'smallest'", "'highest'", "'lowest'"]),
        ({"within": "batch"}, ValueError, ["within", "'batch'", "'all'", "'sample'"]),
        ({"losses": torch.tensor(1.0), "within": "sample"}, ValueError, ["within", "'all'", "losses"]),
        ({"skip": 1.0}, ValueError, ["skip", "1.0", "[0, 1)"]),
        ({"skip": -0.1}, ValueError, ["skip", "-0.1", "[0, 1)"]),
        ({"skip": math.nan}, ValueError, ["skip", "nan", "[0, 1)"]),
        ({"skip": "some"}, TypeError, ["skip", "str"]),
        ({"skip": 0.6}, ValueError, ["skip + keep", "0.6 + 0.5", "1"]),
        ({"skip": 0.6, "keep": torch.tensor(0.5)}, ValueError, ["skip + keep", "0.6 + 0.5", "1"]),
        ({"above": math.nan}, ValueError, ["above", "nan"]),
        ({"above": "0.7"}, TypeError, ["above", "str"]),
        ({"above": 0.7, "order": "lowest"}, ValueError, ["above", "None", "'lowest'"]),
        ({"mask": torch.ones(4, dtype=torch.bool, device="meta")}, ValueError, ["mask", "meta", "cpu"]),
    ],
)
def test_wrong_arguments(arguments: dict, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        batchkern.trimmed_mean(**{"losses": LOSSES, "keep": 0.5, **arguments})
    for word in words:
        assert word in str(raised.value)


# --- two and three processes -----------------------------------------------------------------------------------

BATCHES = {
    # Ties across ranks: of the five 2.0, the lower rank's go first.
    "ties": ([1.0, 2.0, 2.0, 0.0, 3.0, 2.0, 2.0, 0.0, 1.0, 0.0, 2.0, 1.0], None, 1 / 3),
    "masked": ([9.0, 2.0, 5.0, 0.0, 3.0, 9.0, 4.0, 7.0, 6.0, 9.0, 1.0, 8.0], [0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1], 0.4),
    "one rank masked": ([9.0] * 6 + [-math.inf, 9.0, 4.0, 7.0, -1.0, 5.0], [0] * 6 + [1] * 6, 0.6),
    "all kept on one rank": ([0.0, 1.0, 2.0, 3.0, 0.5, 1.5, 2.5, 3.5, 9.0, 8.0, 7.0, 6.0], None, 0.25),
    "nan": ([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 5.0, 5.0, 5.0, 5.0, math.nan, 3.0], None, 0.25),
    "all masked": ([1.0] * 12, [0] * 12, 0.5),
}
BANDS = {
    "plain": {},
    "lowest": {"order": "lowest"},
    "band": {"skip": 0.25},
    "above": {"above": 1.5},
    "weighted": {"weight": True},
    "another score": {"score": True, "skip": 0.25, "weight": True},
    "by sample": {"within": "sample", "weight": True},
}
"""By name: options of a batch of nine rows, of which three ranks have 4, 5 and 0."""
UNEQUAL = (4, 5, 0)
NINE = {"losses": [1.0, 2.0, 2.0, 0.0, 3.0, 2.0, 2.0, 0.0, 1.0], "score": [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0, 5.0]}


def nine(name: str, rows: slice) -> tuple[Tensor, dict]:
    """Losses and options of some of the rows, two to a row."""
    columns = torch.tensor([NINE["losses"], NINE["score"][::-1]]).T[rows]
    options = dict(BANDS[name])
    if "score" in options:
        options["score"] = torch.tensor([NINE["score"], NINE["losses"]]).T[rows]
    if "weight" in options:
        options["weight"] = 1 + torch.tensor([NINE["score"], NINE["score"]]).T[rows]
    return columns, options


def _worker(rank: int, folder: Path, world: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    results = {}
    for name, (losses, mask, keep) in BATCHES.items():
        mine = torch.tensor(losses).chunk(world)[rank]
        my_mask = None if mask is None else torch.tensor(mask).bool().chunk(world)[rank]
        results[name] = run(mine, keep, mask=my_mask, group=dist.group.WORLD)
    if world == len(UNEQUAL):
        start = sum(UNEQUAL[:rank])
        for name in BANDS:
            mine, options = nine(name, slice(start, start + UNEQUAL[rank]))
            for dtype in (torch.float32, torch.float64):
                results[name, dtype] = run(mine.to(dtype), 0.3, group=dist.group.WORLD, **options)
            if "weight" not in options:
                results[name] = batchkern.select_rows(mine, 0.3, group=dist.group.WORLD, **options)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("world", [2, 3])
def test_group_ranks_the_concatenated_batch(tmp_path: Path, world: int) -> None:
    warm.spawn(_worker, world, tmp_path, world)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for name, (losses, mask, keep) in BATCHES.items():
        whole, whole_grad = run(torch.tensor(losses), keep, mask=None if mask is None else torch.tensor(mask).bool())
        averaged = sum(rank[name][0] for rank in ranks) / world
        torch.testing.assert_close(averaged, whole, equal_nan=True, msg=name)
        # DDP averages: row i's share of the averaged gradient is its own rank's over the world size.
        grads = torch.cat([rank[name][1] for rank in ranks]) / world
        torch.testing.assert_close(grads, whole_grad, msg=name)
        kept = highest(losses, keep, mask)
        assert set(grads.nonzero().flatten().tolist()) == set(kept), name
    if world != len(UNEQUAL):
        return
    for name in BANDS:
        losses, options = nine(name, slice(None))
        for dtype in (torch.float32, torch.float64):
            whole, whole_grad = run(losses.to(dtype), 0.3, **options)
            torch.testing.assert_close(sum(rank[name, dtype][0] for rank in ranks) / world, whole, msg=name)
            torch.testing.assert_close(
                torch.cat([rank[name, dtype][1] for rank in ranks]) / world, whole_grad, msg=name
            )
        if "weight" not in options:
            assert torch.equal(torch.cat([rank[name] for rank in ranks]), batchkern.select_rows(losses, 0.3, **options))
