"""trimmed_cross_entropy against F.cross_entropy, a sort in plain Python, and formulas in float64."""

from __future__ import annotations

import copy
import itertools
import math
import os
from pathlib import Path
from typing import Any

import kernel_backend
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import warm
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import batchkern

WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0, 1.5, 0.75])
OPTIONS = [
    dict(itertools.chain(*(option.items() for option in chosen)))
    for size in range(4)
    for chosen in itertools.combinations(
        ({"ignore_index": 3}, {"label_smoothing": 0.1}, {"class_weight": WEIGHT}), size
    )
]


def ids(options: dict[str, Any]) -> str:
    return "+".join(options) or "plain"


def batch(rows: int = 24, classes: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits and targets; about a quarter of the targets is the default ignore_index."""
    target = torch.randint(classes, (rows,))
    target[torch.rand(rows) < 0.25] = -100
    return (3 * torch.randn(rows, classes)).to(dtype), target


def run(logits: Tensor, target: Tensor, keep: float | Tensor, *, upstream: float = 1.0, **options: Any):
    """The loss and its gradient, times ``upstream``."""
    leaf = logits.detach().clone().requires_grad_()
    loss = batchkern.trimmed_cross_entropy(leaf, target, keep, **options)
    (grad,) = torch.autograd.grad(loss * upstream, leaf)
    return loss.detach(), grad


def torch_options(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same options for F.cross_entropy."""
    options = dict(options)
    weight = options.pop("class_weight", None)
    return {**options, "weight": None if weight is None else weight.to(dtype)}


def highest(losses: list[float], keep: float, valid: list[bool]) -> list[int]:
    """The kept rows by the documented rule: NaN first, then by loss, then by index; ignored rows do not count."""
    rows = [i for i, ok in enumerate(valid) if ok]
    rows.sort(key=lambda i: (0, 0.0, i) if math.isnan(losses[i]) else (1, -losses[i], i))
    return rows[: max(round(keep * len(rows)), 1)]


def expected_step(
    logits: Tensor,
    target: Tensor,
    keep: float,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
) -> tuple[float, Tensor, Tensor, list[int]]:
    """Loss, gradient, per-sample losses and kept rows, row by row in float64 from the definition."""
    rows, classes = logits.shape
    weight = torch.ones(classes).double() if class_weight is None else class_weight.double()
    losses, grads = torch.zeros(rows).double(), torch.zeros(rows, classes).double()
    for i, label in enumerate(target.tolist()):
        if label == ignore_index:
            continue
        aim = torch.full((classes,), label_smoothing / classes, dtype=torch.float64)
        aim[label] += 1 - label_smoothing
        aim *= weight
        row = logits[i].double()
        log_p = row - row.logsumexp(0)
        losses[i] = -(aim * log_p).sum()
        grads[i] = log_p.exp() * aim.sum() - aim
    kept = highest(losses.tolist(), keep, (target != ignore_index).tolist())
    divisor = weight[target[kept]].sum()
    dropped = torch.ones(rows, dtype=torch.bool)
    dropped[kept] = False
    grads[dropped] = 0
    return float(losses[kept].sum() / divisor), grads / divisor, losses, kept


# --- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_keep_1_is_cross_entropy(options: dict[str, Any], dtype: torch.dtype) -> None:
    logits, target = batch(dtype=dtype)
    target[target == -100] = options.get("ignore_index", -100)
    loss, grad = run(logits, target, 1.0, **options)
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf, target, **torch_options(options, dtype))
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, leaf.grad)


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_definition(options: dict[str, Any], keep: float, dtype: torch.dtype) -> None:
    logits, target = batch(dtype=dtype)
    target[target == -100] = options.get("ignore_index", -100)
    expected, expected_grad, expected_losses, kept = expected_step(logits, target, keep, **options)
    loss, losses = batchkern.trimmed_cross_entropy(logits, target, keep, per_sample=True, **options)
    loss_alone, grad = run(logits, target, keep, upstream=0.75, **options)
    assert loss.dtype == losses.dtype == dtype
    assert torch.equal(loss, loss_alone)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(loss.item(), expected, **tolerance)
    torch.testing.assert_close(losses.double(), expected_losses, **tolerance)
    torch.testing.assert_close(grad.double(), 0.75 * expected_grad, **tolerance)
    assert set(grad.any(1).nonzero().flatten().tolist()) == set(kept)


def test_k_is_python_rounding_of_keep_times_n() -> None:
    # Rows of rising loss, so that the last row is always kept and the kept rows can be counted.
    keeps = (0.01, 0.1, 0.2, 0.25, 0.3, 0.5, 0.625, 0.7, 0.75, 0.9, 0.999, 1.0)
    logits = torch.stack([torch.linspace(-3, 3, 512), torch.zeros(512)], dim=1)
    target = torch.ones(512, dtype=torch.int64)
    # On the host a kernel's call takes 60 ms: there all that end in a half, and what is past a warp and a block.
    for n in (
        (*range(1, 17), 20, 33, 50, 333, 512)
        if kernel_backend.chosen == "host"
        else (*range(1, 65), 127, 250, 333, 512)
    ):
        for keep in keeps:
            kept = run(logits[:n], target[:n], keep)[1].any(1)
            assert kept.sum() == max(round(keep * n), 1)
            assert kept[-1]


def test_losses_of_ignored_rows_are_zero_and_detached() -> None:
    logits, target = batch()
    logits[target == -100] = math.nan
    leaf = logits.requires_grad_()
    _, losses = batchkern.trimmed_cross_entropy(leaf, target, 0.5, per_sample=True)
    assert not losses.requires_grad
    assert losses.shape == (24,)
    assert (losses[target == -100] == 0).all()
    assert (losses[target != -100] > 0).all()


def test_all_ignored_is_nan_with_zero_gradient() -> None:
    logits, target = torch.randn(5, 3), torch.full((5,), -100)
    assert F.cross_entropy(logits, target).isnan()
    for options in ({}, {"class_weight": torch.rand(3)}, {"label_smoothing": 0.2}):
        for keep in (1.0, 0.3):
            loss, grad = run(logits, target, keep, **options)
            assert loss.isnan()
            assert not grad.any()


@pytest.mark.parametrize("classes", [5, 1])
def test_empty_batch(classes: int) -> None:
    logits, target = torch.empty(0, classes), torch.empty(0, dtype=torch.int64)
    loss, grad = run(logits, target, 0.5)
    assert loss.isnan()
    assert grad.shape == (0, classes)
    _, losses = batchkern.trimmed_cross_entropy(logits, target, 0.5, per_sample=True)
    assert losses.shape == (0,)


def test_one_row_and_one_class() -> None:
    loss, grad = run(torch.tensor([[1.0, 2.0]]), torch.tensor([0]), 0.01)
    assert loss.item() == pytest.approx(math.log1p(math.e))
    assert grad.any()
    loss, grad = run(torch.randn(4, 1), torch.zeros(4, dtype=torch.int64), 0.5)
    assert loss == 0
    assert not grad.any()


# --- selection -------------------------------------------------------------------------------------------------

# Rows that tie with their own copies and with nothing else. Each has a gradient that is not zero where it is kept.
PALETTE = [
    ([0.0, 0.0, 0.0], 0, math.log(3)),
    ([0.0, 2.0, 0.0], 0, math.log(2 + math.exp(2))),
    ([0.0, 2.0, 0.0], 1, math.log(2 + math.exp(2)) - 2),
    ([9.0, -9.0, 0.0], 1, 18 + math.log1p(math.exp(-18) + math.exp(-9))),
    ([-math.inf, 0.0, 1.0], 0, math.inf),
    ([-math.inf, 0.0, 1.0], 1, math.log1p(math.e)),
    ([math.nan, 0.0, 1.0], 2, math.nan),
    ([math.inf, 0.0, 1.0], 1, math.nan),
    ([math.nan, math.inf, -math.inf], -100, math.nan),
    ([5.0, 0.0, 0.0], -100, math.nan),
]


@given(
    rows=st.lists(st.integers(0, len(PALETTE) - 1), min_size=1, max_size=24),
    keep=st.one_of(st.floats(0, 1, exclude_min=True), st.sampled_from([0.25, 0.5, 1.0])),
)
@example(rows=[0, 0, 0, 0], keep=0.5)
@example(rows=[4, 6, 7, 4], keep=0.5)
@example(rows=[8, 9, 1, 1], keep=0.5)
def test_selection(rows: list[int], keep: float) -> None:
    logits, target, losses = (list(column) for column in zip(*(PALETTE[i] for i in rows), strict=True))
    kept = highest(losses, keep, [label != -100 for label in target])
    loss, grad = run(torch.tensor(logits), torch.tensor(target), keep)
    dropped = [i for i in range(len(rows)) if i not in kept]
    assert (grad[dropped].view(torch.uint8) == 0).all()  # +0.0, bit for bit, whatever the row holds
    assert grad[kept].bool().any(1).all()
    if kept:
        expected = torch.tensor(losses, dtype=torch.float64)[kept].sum() / len(kept)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0, equal_nan=True)


def test_zero_losses_of_either_sign_tie() -> None:
    # A weight of 0 makes the first row's loss a zero, of whatever sign; the other row's loss underflows to a zero
    # whose sign differs. The lower index is kept, and the divisor shows which: 0 / 0 or 0 / 2.
    zero = torch.tensor([[0.0, 0.0], [0.0, -200.0]])
    weight = torch.tensor([2.0, 0.0])
    loss, losses = batchkern.trimmed_cross_entropy(
        zero, torch.tensor([1, 0]), 0.5, class_weight=weight, per_sample=True
    )
    assert losses.tolist() == [0, 0]
    assert loss.isnan()
    loss = batchkern.trimmed_cross_entropy(zero.flip(0), torch.tensor([0, 1]), 0.5, class_weight=weight)
    assert loss == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_logits_are_ranked_by_their_float32_losses(dtype: torch.dtype) -> None:
    logits = torch.randn(1000, 10).to(dtype)
    target = torch.randint(10, (1000,))
    exact = F.cross_entropy(logits.double(), target, reduction="none")
    order = exact.argsort(descending=True)
    # A cut that float32 cannot get wrong, and that ranks of rounded losses would.
    rounded = exact.to(dtype).float().sort(descending=True, stable=True).indices
    cut = next(
        k
        for k in range(200, 1000)
        if exact[order[k - 1]] - exact[order[k]] > 1e-5 and set(order[:k].tolist()) != set(rounded[:k].tolist())
    )
    loss, grad = run(logits, target, cut / 1000)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    assert set(grad.any(1).nonzero().flatten().tolist()) == set(order[:cut].tolist())
    assert loss.item() == pytest.approx(exact[order[:cut]].mean().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_in_narrow_types_is_not_above_torch(dtype: torch.dtype) -> None:
    logits, target = batch(64, 50, dtype)
    loss, grad = run(logits, target, 1.0)
    expected, expected_grad, _, _ = expected_step(logits, target, 1.0)
    leaf = logits.clone().requires_grad_()
    torch_loss = F.cross_entropy(leaf, target)
    torch_loss.backward()
    assert abs(loss.item() - expected) <= abs(torch_loss.item() - expected) + 1e-6
    torch_error = (leaf.grad.double() - expected_grad).abs()
    half_step = expected_grad.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal
    assert ((grad.double() - expected_grad).abs() <= torch_error + half_step).all()


def test_the_upstream_factor_is_multiplied_before_rounding() -> None:
    # softmax / k is far below float16's smallest number; with a loss scale of 2^16 it is not.
    logits = torch.tensor([[12.0, 0.0, 0.0]] * 2048).half()
    _, grad = run(logits, torch.zeros(2048, dtype=torch.int64), 1.0, upstream=2.0**16)
    p = math.exp(-12) / (1 + 2 * math.exp(-12))
    assert grad[0, 1].item() == pytest.approx(p / 2048 * 2**16, rel=1e-3)


def test_losses_beyond_the_range_of_float16() -> None:
    logits = torch.tensor([[0.0, 60000.0], [60000.0, -60000.0]]).half()
    loss, _ = run(logits, torch.tensor([0, 1]), 1.0)
    assert loss.item() == pytest.approx(90000, rel=1e-3)


# --- layouts ---------------------------------------------------------------------------------------------------

LAYOUTS = {
    "row-strided": lambda x: torch.cat([x, x + 1], dim=1)[:, : x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "one row expanded": lambda x: x[:1].expand(len(x), -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_logits(layout: str, dtype: torch.dtype) -> None:
    logits, target = batch(dtype=dtype)
    strided = LAYOUTS[layout](logits)
    expected = run(strided.contiguous(), target, 0.4)
    leaf = strided.detach().requires_grad_()
    loss = batchkern.trimmed_cross_entropy(leaf, target, 0.4)
    (grad,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close((loss.detach(), grad), expected)


def test_strided_target_and_weight() -> None:
    logits, target = batch()
    weight = torch.stack([WEIGHT, WEIGHT], dim=1)[:, 0]
    strided = torch.stack([target, target], dim=1)[:, 1]
    expected = run(logits, target, 0.4, class_weight=WEIGHT)
    torch.testing.assert_close(run(logits, strided, 0.4, class_weight=weight), expected)


def test_upstream_gradient_of_stride_zero() -> None:
    logits, target = batch()
    leaf = logits.clone().requires_grad_()
    batchkern.trimmed_cross_entropy(leaf, target, 0.4).expand(3, 5).sum().backward()
    torch.testing.assert_close(leaf.grad, run(logits, target, 0.4, upstream=15.0)[1])
    leaf.grad = None
    upstream = torch.tensor([2.0]).expand(4)[3]
    batchkern.trimmed_cross_entropy(leaf, target, 0.4).backward(upstream)
    torch.testing.assert_close(leaf.grad, run(logits, target, 0.4, upstream=2.0)[1])


def test_inputs_are_left_alone() -> None:
    logits, target = batch()
    before = logits.clone(), target.clone(), WEIGHT.clone()
    run(logits, target, 0.3, class_weight=WEIGHT)
    assert all(torch.equal(a, b) for a, b in zip(before, (logits, target, WEIGHT), strict=True))


# --- keep as a tensor, inplace_backward, autograd, compile ------------------------------------------------------


def test_keep_as_tensor() -> None:
    logits, target = batch(37)
    keep = torch.tensor(0.0, dtype=torch.float64)
    for value in (0.1, 0.5, 0.999, 1.0):
        keep.fill_(value)
        for got, expected in zip(run(logits, target, keep), run(logits, target, value), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_inplace_backward(dtype: torch.dtype) -> None:
    hidden, target = torch.randn(24, 4, dtype=dtype), batch()[1]
    model = nn.Linear(4, 7, dtype=dtype)
    batchkern.trimmed_cross_entropy(model(hidden), target, 0.4).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    logits = model(hidden)
    value = logits.detach().clone()
    loss = batchkern.trimmed_cross_entropy(logits, target, 0.4, inplace_backward=True)
    assert torch.equal(logits.detach(), value)  # nothing happens before backward
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    loss.backward()
    assert seen == [logits.data_ptr()]
    _, grad = run(value, target, 0.4)
    torch.testing.assert_close(logits.detach(), grad)
    for parameter, before in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, before)


def test_inplace_backward_through_a_strided_view() -> None:
    leaf = torch.randn(10, 8, requires_grad=True)
    target = torch.randint(4, (10,))
    _, expected = run(leaf[:, 2:6], target, 0.4)
    wide = leaf + 0
    untouched = wide.detach()[:, 6:].clone()
    batchkern.trimmed_cross_entropy(wide[:, 2:6], target, 0.4, inplace_backward=True).backward()
    torch.testing.assert_close(wide.detach()[:, 2:6], expected)
    assert torch.equal(wide.detach()[:, 6:], untouched)
    torch.testing.assert_close(leaf.grad[:, 2:6], expected)


def test_inplace_backward_of_a_leaf_raises() -> None:
    logits, target = batch()
    with pytest.raises(ValueError, match=r"inplace_backward must be False if logits is a leaf"):
        batchkern.trimmed_cross_entropy(logits.requires_grad_(), target, 0.5, inplace_backward=True)


def test_inplace_backward_of_overlapping_logits_raises() -> None:
    row = torch.randn(1, 4, requires_grad=True) * 2
    with pytest.raises(ValueError, match=r"inplace_backward must be False if logits overlaps itself.*\(0, 1\)"):
        batchkern.trimmed_cross_entropy(row.expand(5, 4), torch.ones(5).long(), 0.5, inplace_backward=True)


def test_inplace_backward_without_gradient() -> None:
    logits, target = batch()
    loss = batchkern.trimmed_cross_entropy(logits, target, 0.5, inplace_backward=True)
    assert torch.equal(loss, batchkern.trimmed_cross_entropy(logits, target, 0.5))


def test_inplace_backward_raises_where_the_logits_changed() -> None:
    leaf, target = torch.randn(6, 3, requires_grad=True), torch.randint(3, (6,))
    logits = leaf * 1
    loss = batchkern.trimmed_cross_entropy(logits, target, 0.5, inplace_backward=True)
    logits.detach().add_(1)
    with pytest.raises(RuntimeError, match=r"inplace_backward.*changed after the forward"):
        loss.backward()


def test_inplace_backward_twice_raises() -> None:
    leaf, target = torch.randn(6, 3, requires_grad=True), torch.randint(3, (6,))
    loss = batchkern.trimmed_cross_entropy(leaf * 1, target, 0.5, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward"):
        loss.backward()


def test_inplace_backward_raises_where_another_node_saved_the_logits() -> None:
    leaf, target = torch.randn(6, 3, requires_grad=True), torch.randint(3, (6,))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        batchkern.trimmed_cross_entropy(leaf.exp(), target, 0.5, inplace_backward=True).backward()


def test_second_derivative_raises() -> None:
    logits, target = batch()
    leaf = logits.requires_grad_()
    (grad,) = torch.autograd.grad(batchkern.trimmed_cross_entropy(leaf, target, 0.5), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|once_differentiable"):
        grad.square().sum().backward()


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_gradcheck(options: dict[str, Any]) -> None:
    logits, target = batch(10, 7, torch.float64)
    target[target == -100] = options.get("ignore_index", -100)
    leaf = logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: batchkern.trimmed_cross_entropy(z, target, 0.4, **options) ** 2, leaf)


@pytest.mark.parametrize("options", [{}, OPTIONS[-1], {"inplace_backward": True}], ids=ids)
def test_compiled_equals_eager(options: dict[str, Any]) -> None:
    logits, target = batch(33)
    target[target == -100] = options.get("ignore_index", -100)

    def step(leaf: Tensor, target: Tensor, keep: float | Tensor) -> tuple[Tensor, Tensor]:
        return batchkern.trimmed_cross_entropy(leaf * 1, target, keep, per_sample=True, **options)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    schedule = torch.tensor(0.3, dtype=torch.float64)
    for keep in (0.3, schedule, schedule * 2):
        leaves = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        results = [function(leaf, target, keep) for function, leaf in zip((compiled, step), leaves, strict=True)]
        torch.testing.assert_close(*results)
        for loss, losses in results:
            assert not losses.requires_grad
            loss.backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.slow
def test_compiled_by_inductor_equals_eager() -> None:
    compiled = torch.compile(batchkern.trimmed_cross_entropy, fullgraph=True)
    logits, target = batch(33)
    leaf = logits.clone().requires_grad_()
    loss = compiled(leaf, target, 0.3)
    loss.backward()
    torch.testing.assert_close((loss.detach(), leaf.grad), run(logits, target, 0.3))


# --- wrong arguments -------------------------------------------------------------------------------------------

CPU = pytest.mark.cpu
LOGITS, TARGET = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
ON_META = {"device": "meta"}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"logits": [[0.0]]}, TypeError, ["logits", "list", "tensor"]),
        ({"logits": torch.zeros(4, 3).long()}, TypeError, ["logits", "int64", "float32", "bfloat16", "float16"]),
        ({"logits": torch.zeros(4)}, ValueError, ["target", "()", "(4,)"]),
        ({"logits": torch.zeros(4, 3, 2)}, ValueError, ["target", "(4, 2)", "(4, 3, 2)", "(4,)"]),
        ({"target": [0, 1, 2, 0]}, TypeError, ["target", "list", "tensor"]),
        ({"target": TARGET.bool()}, TypeError, ["target", "bool", "int64"]),
        ({"target": TARGET[:3]}, ValueError, ["target", "(3,)", "(4,)"]),
        ({"target": TARGET[:, None]}, ValueError, ["target", "(4, 1)", "(4,)"]),
        ({"target": TARGET.to("meta")}, ValueError, ["target", "meta", "cpu"]),
        pytest.param(
            {"target": torch.tensor([0, 1, 3, 7])},
            ValueError,
            ["target[2]", "3", "[0, 3)", "-100"],
            marks=pytest.mark.cpu,
        ),
        pytest.param(
            {"target": torch.tensor([0, -1, 2, 0])},
            ValueError,
            ["target[1]", "-1", "[0, 3)", "-100"],
            marks=pytest.mark.cpu,
        ),
        pytest.param(
            {"target": torch.tensor([0, -100, 2, 0]), "ignore_index": 1},
            ValueError,
            ["target[1]", "-100", "(1)"],
            marks=pytest.mark.cpu,
        ),
        ({"keep": 0.0}, ValueError, ["keep", "0.0", "(0, 1]"]),
        ({"keep": -0.1}, ValueError, ["keep", "-0.1", "(0, 1]"]),
        ({"keep": 1.5}, ValueError, ["keep", "1.5", "(0, 1]"]),
        ({"keep": math.nan}, ValueError, ["keep", "nan", "(0, 1]"]),
        ({"keep": True}, TypeError, ["keep", "bool", "(0, 1]"]),
        ({"keep": None}, TypeError, ["keep", "NoneType", "(0, 1]"]),
        ({"keep": torch.tensor(1)}, TypeError, ["keep", "int64", "float"]),
        ({"keep": torch.ones(2).double()}, TypeError, ["keep", "1-dim", "0-dim"]),
        ({"keep": torch.tensor(0.0).double()}, ValueError, ["keep", "0.0", "(0, 1]"]),
        ({"keep": torch.tensor(1.0, **ON_META).double()}, ValueError, ["keep", "meta", "cpu"]),
        ({"label_smoothing": -0.1}, ValueError, ["label_smoothing", "-0.1", "[0, 1]"]),
        ({"label_smoothing": 1.1}, ValueError, ["label_smoothing", "1.1", "[0, 1]"]),
        ({"label_smoothing": math.nan}, ValueError, ["label_smoothing", "nan", "[0, 1]"]),
        ({"label_smoothing": "0.1"}, TypeError, ["label_smoothing", "str", "number"]),
        ({"class_weight": [1.0] * 3}, TypeError, ["class_weight", "list", "tensor"]),
        ({"class_weight": torch.ones(3).long()}, TypeError, ["class_weight", "int64", "float32"]),
        ({"class_weight": torch.ones(4)}, ValueError, ["class_weight", "(4,)", "(3,)"]),
        ({"class_weight": torch.ones(3, 1)}, ValueError, ["class_weight", "(3, 1)", "1 dimension"]),
        ({"class_weight": torch.ones(3, **ON_META)}, ValueError, ["class_weight", "meta", "cpu"]),
    ],
)
def test_wrong_arguments(arguments: dict, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        batchkern.trimmed_cross_entropy(**{"logits": LOGITS, "target": TARGET, "keep": 0.5, **arguments})
    for word in words:
        assert word in str(raised.value)


# --- the module ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_module_equals_function(options: dict[str, Any]) -> None:
    logits, target = batch()
    target[target == -100] = options.get("ignore_index", -100)
    module = batchkern.TrimmedCrossEntropyLoss(0.4, **options)
    assert torch.equal(module(logits, target), batchkern.trimmed_cross_entropy(logits, target, 0.4, **options))
    module.keep = 0.9
    assert torch.equal(module(logits, target), batchkern.trimmed_cross_entropy(logits, target, 0.9, **options))


def test_module_passes_every_option_on() -> None:
    leaf, target = torch.randn(6, 7, requires_grad=True), torch.randint(7, (6,))
    logits = leaf * 1
    module = batchkern.TrimmedCrossEntropyLoss(
        torch.tensor(0.5, dtype=torch.float64), per_sample=True, inplace_backward=True
    )
    loss, losses = module(logits, target)
    assert losses.shape == (6,)
    loss.backward()
    assert not logits.detach().any(1).all()  # the gradient, with its rows of zeros, is where the logits were


def test_module_state() -> None:
    module = batchkern.TrimmedCrossEntropyLoss(0.4, class_weight=WEIGHT.clone())
    assert list(module.state_dict()) == ["class_weight"]
    assert not list(module.parameters())
    other = batchkern.TrimmedCrossEntropyLoss(0.4, class_weight=torch.ones(7))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.class_weight, WEIGHT)
    other.load_state_dict(nn.CrossEntropyLoss(weight=2 * WEIGHT).state_dict())
    assert torch.equal(other.class_weight, 2 * WEIGHT)
    assert copy.deepcopy(module).double().class_weight.dtype == torch.float64
    assert copy.deepcopy(module).to("meta").class_weight.device.type == "meta"
    assert not batchkern.TrimmedCrossEntropyLoss(0.4).state_dict()


def test_module_repr() -> None:
    module = batchkern.TrimmedCrossEntropyLoss(0.25, ignore_index=7, label_smoothing=0.125)
    assert repr(module) == "TrimmedCrossEntropyLoss(keep=0.25, ignore_index=7, label_smoothing=0.125)"


@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        ({"keep": 0.0}, ValueError, "keep"),
        ({"keep": torch.tensor(1)}, TypeError, "keep"),
        ({"keep": "0.5"}, TypeError, "keep"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing"),
    ],
)
def test_module_refuses_wrong_arguments_when_built(arguments: dict, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        batchkern.TrimmedCrossEntropyLoss(**{"keep": 0.5, **arguments})


# --- two and three processes -----------------------------------------------------------------------------------

HALF, WIDTH = 12, 5


def group_cases() -> dict[str, tuple[Tensor, Tensor, Tensor, float | Tensor, dict[str, Any]]]:
    """Name -> inputs, weight, target, keep and options of a whole batch, of which each rank takes its part."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * HALF, WIDTH, generator=generator)
    inputs[HALF:] = inputs[:HALF].flip(0)  # every loss occurs on two ranks
    weight = torch.randn(WIDTH, 7, generator=generator)
    target = torch.randint(7, (HALF,), generator=generator)
    target = torch.cat([target, target.flip(0)])
    ignored = target.clone()
    ignored[[0, 3, 14, 20]] = -100
    lopsided = target.clone()
    lopsided[:HALF] = -100
    spots = torch.rand(9, 1, 2, 3, generator=generator).round(decimals=1)  # some pixels tie
    dense = torch.randint(7, (9, 2, 3), generator=generator, dtype=torch.int32)
    dense[:, 0, 0] = -100
    mixed = torch.rand(9, 7, 2, 3, generator=generator).softmax(1)
    diverged = inputs.clone()
    diverged[17] = math.nan
    return {
        "ties": (inputs, weight, target, 0.3, {}),
        "ties, keep as tensor": (inputs, weight, target, torch.tensor(0.3, dtype=torch.float64), {}),
        "ignored rows": (inputs, weight, ignored, 0.5, {}),
        "everything": (inputs, weight, ignored, 0.35, {"class_weight": WEIGHT, "label_smoothing": 0.1}),
        "keep 1 with weights": (inputs, weight, ignored, 1.0, {"class_weight": WEIGHT}),
        "one rank ignored": (inputs, weight, lopsided, 0.5, {"class_weight": WEIGHT}),
        "NaN on rank 1": (diverged, weight, target, 1 / 24, {}),
        "all ignored": (inputs, weight, torch.full_like(target, -100), 0.5, {}),
        "float64": (inputs.double(), weight.double(), ignored, 0.35, {"class_weight": WEIGHT.double()}),
        "nine images": (inputs[:9, :, None, None] * spots, weight, dense, 0.3, {"class_weight": WEIGHT}),
        "nine images, mixed": (inputs[:9, :, None, None] * spots, weight, mixed, 0.3, {"label_smoothing": 0.1}),
    }


def group_step(inputs: Tensor, weight: Tensor, target: Tensor, keep: float | Tensor, options: dict[str, Any]):
    """The loss, and its gradient with respect to the logits and a shared weight."""
    weight = weight.clone().requires_grad_()
    logits = torch.einsum("nh...,hc->nc...", inputs, weight)
    loss = batchkern.trimmed_cross_entropy(logits, target, keep, **options)
    return loss.detach(), *torch.autograd.grad(loss, (logits, weight))


SHARES = {2: [12, 12], 3: [10, 14, 0]}
"""Rows of each rank, by the number of ranks."""


def share_of(x: Tensor, rank: int, world: int) -> Tensor:
    """Of nine rows three ranks get 4, 5 and 0."""
    shares = SHARES[world] if len(x) == 2 * HALF else {2: [4, 5], 3: [4, 5, 0]}[world]
    return x.split(shares)[rank]


def _worker(rank: int, folder: Path, world: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    results = {}
    for name, (inputs, weight, target, keep, options) in group_cases().items():
        mine, my_target = (share_of(x, rank, world) for x in (inputs, target))
        results[name] = group_step(mine, weight, my_target, keep, {**options, "group": dist.group.WORLD})
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("world", [2, 3])
def test_group_ranks_the_concatenated_batch(tmp_path: Path, world: int) -> None:
    warm.spawn(_worker, world, tmp_path, world)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for name, case in group_cases().items():
        loss, logits_grad, weight_grad = group_step(*case)
        losses, logits_grads, weight_grads = zip(*(rank[name] for rank in ranks), strict=True)
        compare = {"equal_nan": True, "msg": name, "rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(sum(losses) / world, loss, **compare)
        # What DDP computes: the average over ranks.
        torch.testing.assert_close(sum(weight_grads) / world, weight_grad, **compare)
        torch.testing.assert_close(torch.cat(logits_grads) / world, logits_grad, **compare)
        kept = torch.cat(logits_grads).bool().any(1)
        assert torch.equal(kept, logits_grad.bool().any(1)), name


def test_group_cases_split_a_tie_between_ranks() -> None:
    # The case "ties" is only worth something where a kept row's equal on the other rank is dropped.
    inputs, weight, target, keep, _ = group_cases()["ties"]
    kept = group_step(inputs, weight, target, keep, {})[1].any(1)
    assert kept.sum() == 7
    assert (kept & ~kept.flip(0))[:HALF].sum() == 1


def test_inplace_backward_refuses_a_view_of_a_leaf() -> None:
    logits = torch.randn(4, 6, requires_grad=True)
    with pytest.raises(ValueError, match="inplace_backward must be False if logits is a leaf or a view of one"):
        batchkern.trimmed_cross_entropy(logits.view(6, 4), torch.zeros(6, dtype=torch.long), 0.5, inplace_backward=True)
