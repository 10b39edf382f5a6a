"""linear_cross_entropy against PyTorch in float64: values, gradients, what it costs, what it does not read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import batchkern
from batchkern import linear_cross_entropy, trimmed_mean
from batchkern.ops import _chunked_linear

GEMMA = {"softcap": 2.0}
CAPS: list[dict[str, float]] = [{}, GEMMA, {"logit_scale": 0.25}, {"softcap": 1.5, "logit_scale": 3.0}]


def problem(
    rows: int = 40, width: int = 12, words: int = 200, dtype: torch.dtype = torch.float32, ignored: float = 0.2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, target"""
    target = torch.randint(words, (rows,))
    target[torch.rand(rows) < ignored] = -100
    hidden, weight, bias = torch.randn(rows, width), torch.randn(words, width), torch.randn(words)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), target


def leaves_of(*tensors: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in tensors]


def capped(logits: Tensor, softcap: float | None = None, logit_scale: float = 1.0) -> Tensor:
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits * logit_scale


def exact(layer: tuple[Tensor, Tensor, Tensor], target: Tensor, upstream: Tensor, upstream_lse: Tensor, **options: Any):
    """PyTorch in float64: losses, lse, entropy and correct of the rows, and the gradients of a weighted sum."""
    cap = {name: options.pop(name) for name in ("softcap", "logit_scale") if name in options}
    leaves = leaves_of(*layer, dtype=torch.float64)
    logits = capped(F.linear(*leaves), **cap)
    valid = target != options.get("ignore_index", -100)
    loss = F.cross_entropy(logits, target, reduction="none", **options)
    lse = logits.logsumexp(-1)
    live = [torch.where(valid & (x != 0), x, 0).double() for x in (upstream, upstream_lse)]
    total = (loss * live[0]).sum() + (lse * live[1]).sum()
    p = logits.softmax(-1)
    entropy = torch.where(valid, -(p * p.log()).sum(-1), 0)
    rows = loss, torch.where(valid, lse, 0), entropy, (logits.argmax(-1) == target) & valid
    return [x.detach() for x in rows], torch.autograd.grad(total, leaves)


def ours(layer: tuple[Tensor, Tensor, Tensor], target: Tensor, upstream: Tensor, upstream_lse: Tensor, **options: Any):
    leaves = leaves_of(*layer)
    rows = linear_cross_entropy(*leaves[:2], target, bias=leaves[2], stats=True, **options)
    total = (rows.loss * upstream).sum() + (rows.lse * upstream_lse).sum()
    assert not rows.entropy.requires_grad
    return [x.detach() for x in rows], torch.autograd.grad(total, leaves)


def upstreams(rows: int, share: float = 0.4) -> tuple[Tensor, Tensor]:
    """Of both signs, and zero for most rows."""
    live = torch.rand(rows) < share
    return torch.where(live, torch.randn(rows), 0), torch.where(live & (torch.rand(rows) < 0.5), torch.randn(rows), 0)


@pytest.mark.parametrize("cap", CAPS, ids=str)
@pytest.mark.parametrize("chunk_rows", [7, None], ids=["chunks", "one chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_and_any_weighting_of_them(cap: dict[str, float], chunk_rows: int | None, dtype: torch.dtype) -> None:
    *layer, target = problem(dtype=dtype)
    options = {"label_smoothing": 0.1, **cap}
    upstream = upstreams(len(target))
    rows, grads = ours(layer, target, *upstream, chunk_rows=chunk_rows, **options)
    expected, expected_grads = exact(layer, target, *upstream, **options)
    step = 1e-6 if dtype == torch.float32 else 1e-12
    for value, wanted in zip(rows[:3], expected[:3], strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=step, atol=step)
    assert torch.equal(rows[3], expected[3])
    for value, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=2e-5, atol=5 * step * float(wanted.abs().max()))


@pytest.mark.parametrize("cap", CAPS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk_rows", [7, None], ids=["chunks", "one chunk"])
def test_reductions(cap: dict[str, float], reduction: str, chunk_rows: int | None) -> None:
    *layer, target = problem()
    options = {"label_smoothing": 0.1}
    leaves, wide = leaves_of(*layer), leaves_of(*layer, dtype=torch.float64)
    loss = linear_cross_entropy(
        *leaves[:2], target, bias=leaves[2], reduction=reduction, chunk_rows=chunk_rows, **options, **cap
    )
    expected = F.cross_entropy(capped(F.linear(*wide), **cap), target, reduction=reduction, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    for value, wanted in zip(torch.autograd.grad(2 * loss, leaves), torch.autograd.grad(2 * expected, wide)):
        torch.testing.assert_close(value.double(), wanted, rtol=2e-5, atol=5e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("cap", CAPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types_are_as_exact_as_their_logits(cap: dict[str, float], dtype: torch.dtype) -> None:
    """What rounds the product of the layer, tanh and the scale once each may be that far off."""
    *layer, target = problem(rows=200, dtype=dtype, ignored=0)
    upstream = upstreams(len(target), share=1.0)
    rows, grads = ours(layer, target, *upstream, chunk_rows=64, **cap)
    expected, expected_grads = exact(layer, target, *upstream, **cap)
    step = torch.finfo(dtype).eps
    largest = capped(F.linear(*layer).double(), **cap).abs().max()
    for value, wanted in zip(rows[:2], expected[:2]):
        assert (value.double() - wanted).abs().max() < 2 * step * largest
    for value, wanted in zip(grads, expected_grads, strict=True):
        assert value.dtype == dtype
        assert (value.double() - wanted).abs().max() < 4 * step * wanted.abs().max()


def test_a_confident_token_keeps_its_gradient_in_bfloat16() -> None:
    # p = 0.999: softmax - 1 in bfloat16 is zero.
    hidden, weight = torch.ones(1, 1).bfloat16(), torch.tensor([[6.90625], [0.0]]).bfloat16()
    probability = torch.softmax(weight.double().flatten(), 0)[0]
    leaf, leaf_weight = leaves_of(hidden, weight)
    linear_cross_entropy(leaf, leaf_weight, torch.tensor([0]), reduction="none").sum().backward()
    exact = float(probability - 1)
    assert exact == pytest.approx(-1.001e-3, rel=1e-3)
    assert float(leaf_weight.grad[0]) == pytest.approx(exact, rel=2**-8)
    plain, plain_weight = leaves_of(hidden, weight)
    F.cross_entropy(F.linear(plain, plain_weight), torch.tensor([0])).backward()
    assert plain_weight.grad[0] == 0


# --- what it costs ---------------------------------------------------------------------------------------------


def backward_flops(upstream: Tensor, **options: Any) -> float:
    """In units of F. No row is ignored."""
    hidden, weight, bias, target = problem(rows=len(upstream), ignored=0)
    leaves = leaves_of(hidden, weight, bias)
    losses = linear_cross_entropy(*leaves[:2], target, bias=leaves[2], reduction="none", **options)
    with FlopCounterMode(display=False) as counter:
        losses.backward(upstream)
    return counter.get_total_flops() / (2 * hidden.numel() * len(weight))


@pytest.mark.parametrize("cap", [{}, GEMMA], ids=str)
def test_the_backward_pass_costs_the_rows_that_a_gradient_reaches(cap: dict[str, float]) -> None:
    for count in (0, 1, 7, 20, 40):
        upstream = torch.zeros(40)
        upstream[torch.randperm(40)[:count]] = torch.randn(count)
        assert backward_flops(upstream, chunk_rows=8, **cap) == pytest.approx(3 * count / 40)
        kept = 2 if not cap else 3
        assert backward_flops(upstream, **cap) == pytest.approx(kept * count / 40)  # logits of one chunk are kept


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("cap", [{}, GEMMA], ids=str)
def test_a_reduction_costs_three_products(reduction: str, cap: dict[str, float]) -> None:
    hidden, weight, _, target = problem(ignored=0)
    leaves = leaves_of(hidden, weight)
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(*leaves, target, reduction=reduction, chunk_rows=8, **cap).backward()
    assert counter.get_total_flops() == 3 * 2 * hidden.numel() * len(weight)


def test_rows_without_a_gradient_are_not_read() -> None:
    *layer, target = problem()
    upstream = upstreams(len(target))
    upstream[0][:8] = upstream[1][:8] = 0
    _, expected = ours(layer, target, *upstream, chunk_rows=7)
    leaves = leaves_of(*layer)
    for chunk_rows in (7, None):
        losses = linear_cross_entropy(*leaves[:2], target, bias=leaves[2], stats=True, chunk_rows=chunk_rows)
        broken = leaves[0].detach().clone()
        leaves[0].data[:8] = math.nan  # after the forward pass
        grads = torch.autograd.grad([losses.loss, losses.lse], leaves, list(upstream))
        leaves[0].data.copy_(broken)
        torch.testing.assert_close(grads, expected)
        assert not grads[0][:8].any()


def test_ignored_rows_may_hold_nan() -> None:
    for dtype in (torch.float32, torch.float64):
        *layer, target = problem(dtype=dtype)
        target[:3] = -100
        for cap in (*CAPS, {"chunk_rows": 7}, {"chunk_rows": 7, **GEMMA}):
            results = []
            for value in (1.0, math.nan):
                leaves = leaves_of(*layer)
                leaves[0].data[:3] = value
                loss = linear_cross_entropy(*leaves[:2], target, bias=leaves[2], **cap)
                results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
            assert all(map(torch.equal, *results))
            assert not results[0][1][:3].any()


def test_backward_rows_is_a_promise() -> None:
    hidden, weight, _, target = problem(ignored=0)
    for enough in (True, False):
        leaf = hidden.clone().requires_grad_()
        losses = linear_cross_entropy(leaf, weight, target, reduction="none", backward_rows=10)
        upstream = torch.zeros(40)
        upstream[: 10 if enough else 11] = 1
        if enough:
            losses.backward(upstream)
            assert torch.equal(leaf.grad.any(1), upstream > 0)
        else:
            with pytest.raises(ValueError, match="backward_rows was 10, and 11 rows have a gradient"):
                losses.backward(upstream)


@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_where_the_host_knows_only_a_promise(monkeypatch: pytest.MonkeyPatch, cap: dict[str, float]) -> None:
    # As on a GPU: more rows are gathered than have a gradient, and the others may hold anything.
    *layer, target = problem()
    layer[0][target == -100] = math.nan
    upstream = upstreams(len(target), share=0.3)
    _, expected = ours(layer, target, *upstream, chunk_rows=7, **cap)
    count = _chunked_linear._count
    monkeypatch.setattr(torch, "_assert_async", lambda *_: None)
    monkeypatch.setattr(_chunked_linear, "_count", lambda mask, limits: count(mask.to("meta"), limits))
    _, grads = ours(layer, target, *upstream, chunk_rows=7, backward_rows=25, **cap)
    torch.testing.assert_close(grads, expected)


# --- compositions ----------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 99),
    keep=st.sampled_from([0.05, 0.3, 0.6, 0.9, 1.0]),
    chunk_rows=st.sampled_from([None, 9]),
    cap=st.sampled_from(CAPS),
)
def test_the_trimmed_function_is_the_composition(
    seed: int, keep: float, chunk_rows: int | None, cap: dict[str, float]
) -> None:
    torch.manual_seed(seed)
    *layer, target = problem(rows=30, words=70)
    layer[0][7:14] = layer[0][:7]  # ties, where the targets are equal as well
    target[7:14] = target[:7]
    fused_leaves, leaves = leaves_of(*layer), leaves_of(*layer)
    options = {"chunk_rows": chunk_rows, **cap}
    fused = batchkern.linear_trimmed_cross_entropy(*fused_leaves[:2], target, keep, bias=fused_leaves[2], **options)
    losses = linear_cross_entropy(*leaves[:2], target, bias=leaves[2], reduction="none", **options)
    composed = trimmed_mean(losses, keep, mask=target != -100)
    torch.testing.assert_close(fused, composed, equal_nan=True)
    fused_grads = torch.autograd.grad(fused, fused_leaves)
    grads = torch.autograd.grad(composed, leaves)
    torch.testing.assert_close(fused_grads, grads, rtol=1e-5, atol=1e-6)
    assert torch.equal(fused_grads[0].any(1), grads[0].any(1))


def test_a_retained_backward_pass_is_linear_in_the_upstream_gradient() -> None:
    *layer, target = problem()
    upstream, _ = upstreams(len(target))
    for chunk_rows in (7, None):
        leaves = leaves_of(*layer)
        losses = linear_cross_entropy(*leaves[:2], target, bias=leaves[2], reduction="none", chunk_rows=chunk_rows)
        first = torch.autograd.grad(losses, leaves, upstream, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(losses, leaves, upstream, retain_graph=True), first)
        twice = torch.autograd.grad(losses, leaves, -2 * upstream)
        torch.testing.assert_close(twice, tuple(-2 * x for x in first))


def test_a_micro_batch_without_a_target_adds_nothing() -> None:
    hidden, weight, _, target = problem()
    nothing = torch.full_like(target, -100)
    for chunk_rows in (7, None):
        leaves = leaves_of(hidden, weight)
        for labels in (target, nothing):
            (linear_cross_entropy(*leaves, labels, reduction="sum", chunk_rows=chunk_rows) / 64).backward()
        wide = leaves_of(hidden, weight, dtype=torch.float64)
        (F.cross_entropy(wide[0] @ wide[1].t(), target, reduction="sum") / 64).backward()
        for ours, theirs in zip(leaves, wide):
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2e-5, atol=1e-6)
    assert linear_cross_entropy(hidden, weight, nothing).isnan()  # as F.cross_entropy has it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masked_words_stay_masked_under_a_cap(dtype: torch.dtype) -> None:
    hidden, weight, bias, target = problem(words=70, dtype=dtype)
    target.clamp_(max=59)
    bias[60:] = -math.inf
    upstream = upstreams(len(target))
    for chunk_rows in (7, None):
        rows, (to_hidden, to_weight, _) = ours(
            (hidden, weight, bias), target, *upstream, chunk_rows=chunk_rows, **GEMMA
        )
        part = weight[:60], bias[:60]
        expected, (wanted, wanted_weight, _) = exact((hidden, *part), target, *upstream, **GEMMA)
        torch.testing.assert_close(rows[0].double(), expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(to_hidden.double(), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(to_weight[:60].double(), wanted_weight, rtol=1e-4, atol=1e-5)
        assert not to_weight[60:].any()


def test_tokens_of_any_shape_and_integer_type() -> None:
    hidden, weight, _, target = problem(rows=42)
    flat = linear_cross_entropy(hidden, weight, target, stats=True)
    for shape in ((6, 7), (2, 3, 7)):
        rows = linear_cross_entropy(hidden.view(*shape, 12), weight, target.view(shape).int(), stats=True)
        for value, wanted in zip(rows, flat, strict=True):
            assert torch.equal(value, wanted.view(shape))
    one = linear_cross_entropy(hidden[5], weight, torch.tensor(3, dtype=torch.uint8), reduction="none")
    torch.testing.assert_close(one, F.cross_entropy(hidden[5] @ weight.t(), torch.tensor(3)))
    strided = hidden.view(6, 7, 12).transpose(0, 1)
    losses = linear_cross_entropy(strided, weight, target.view(6, 7).t(), reduction="none")
    torch.testing.assert_close(losses, flat.loss.view(6, 7).t())


@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_an_empty_batch(cap: dict[str, float]) -> None:
    _, weight, bias, _ = problem()
    for chunk_rows in (7, None):
        for reduction in ("none", "mean", "sum"):
            leaves = leaves_of(torch.randn(0, 12), weight, bias)
            target = torch.zeros(0, dtype=torch.long)
            options = {"chunk_rows": chunk_rows, "reduction": reduction, **cap}
            loss = linear_cross_entropy(*leaves[:2], target, bias=leaves[2], **options)
            assert loss.isnan() if reduction == "mean" else loss.sum() == 0
            assert not any(x.any() for x in torch.autograd.grad(loss.sum(), leaves))


@pytest.mark.parametrize("chunk_rows", [7, None], ids=["chunks", "one chunk"])
def test_within_a_checkpoint(chunk_rows: int | None) -> None:
    *layer, target = problem()

    def loss(*leaves: Tensor) -> Tensor:
        options = {"bias": leaves[2], "chunk_rows": chunk_rows}
        losses = linear_cross_entropy(*leaves[:2], target, reduction="none", **options)
        mean = linear_cross_entropy(*leaves[:2], target, **options)
        return (
            losses.square().mean() + mean + batchkern.linear_trimmed_cross_entropy(*leaves[:2], target, 0.4, **options)
        )

    results = []
    for call in (loss, lambda *leaves: checkpoint(loss, *leaves, use_reentrant=False)):
        leaves = leaves_of(*layer)
        results.append(torch.autograd.grad(call(*leaves), leaves))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_autocast_is_that_of_a_linear_layer() -> None:
    *layer, target = problem()
    upstream, _ = upstreams(len(target))
    leaves, plain = leaves_of(*layer), leaves_of(*layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = linear_cross_entropy(*leaves[:2], target, bias=leaves[2], reduction="none", chunk_rows=7)
        expected = batchkern.cross_entropy(F.linear(*plain), target, reduction="none")
    torch.testing.assert_close(losses, expected)
    for ours, theirs in zip(
        torch.autograd.grad(losses, leaves, upstream), torch.autograd.grad(expected, plain, upstream)
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-6 * float(theirs.abs().max()))


def test_gradcheck() -> None:
    hidden, weight, bias, target = (x[:6] for x in problem(dtype=torch.float64))
    target = target % 6

    def rows(*layer: Tensor) -> tuple[Tensor, Tensor]:
        found = linear_cross_entropy(
            layer[0], layer[1], target, bias=layer[2], stats=True, softcap=2.0, logit_scale=0.5
        )
        return found.loss, found.lse

    assert torch.autograd.gradcheck(rows, [x.requires_grad_() for x in (hidden, weight, bias)])


def test_a_transform_of_torch_func() -> None:
    hidden, weight, _, target = problem()
    ours = torch.func.grad(lambda h: linear_cross_entropy(h, weight, target, softcap=2.0))(hidden)
    theirs = torch.func.grad(lambda h: F.cross_entropy(capped(h @ weight.t(), 2.0), target))(hidden)
    torch.testing.assert_close(ours, theirs)


def test_second_derivative_raises() -> None:
    for dtype in (torch.float32, torch.float64):
        hidden, weight, _, target = problem(dtype=dtype)
        leaf = hidden.requires_grad_()
        losses = linear_cross_entropy(leaf, weight, target, reduction="none")
        (grad,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError):
            grad.square().sum().backward()


# --- the compiler ----------------------------------------------------------------------------------------------


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.parametrize("form", ["rows", "mean", "trimmed"])
def test_twenty_numbers_of_tokens_are_compiled_at_most_four_times(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunked_linear, "LEAST_CHUNK", 16)
    monkeypatch.setitem(_chunked_linear.CHUNK_BYTES, "cpu", 1)  # so that some are of one chunk, and some of more
    counter = CompileCounterWithBackend("aot_eager")

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> Tensor:
        if form == "mean":
            return linear_cross_entropy(hidden, weight, target)
        if form == "trimmed":
            return batchkern.linear_trimmed_cross_entropy(hidden, weight, target, 0.4)
        rows = linear_cross_entropy(hidden, weight, target, stats=True)
        return (rows.loss * upstream).sum() + 1e-2 * rows.lse.square().mean() + 0 * rows.entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    _, weight, _, _ = problem()
    for rows in range(3, 43, 2):
        hidden, _, _, target = problem(rows=rows)
        upstream, _ = upstreams(rows)
        results = []
        for function in (compiled, loss):
            leaves = leaves_of(hidden, weight)
            value = function(*leaves, target, upstream)
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
        torch.testing.assert_close(*results, equal_nan=True)
    assert counter.frame_count <= 4


# --- wrong arguments -------------------------------------------------------------------------------------------

HIDDEN, WEIGHT, TARGET = torch.zeros(4, 3), torch.zeros(6, 3), torch.tensor([0, 5, 2, 0])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"hidden": torch.zeros(())}, ValueError, ["hidden", "(..., H)", "()"]),
        ({"hidden": torch.zeros(4, 0), "weight": torch.zeros(6, 0)}, ValueError, ["hidden", "H > 0", "(4, 0)"]),
        ({"weight": torch.zeros(0, 3)}, ValueError, ["weight", "at least one word", "(0, 3)"]),
        ({"weight": torch.zeros(6, 2)}, ValueError, ["weight", "(V, 3)", "(6, 2)"]),
        ({"target": TARGET[:3]}, ValueError, ["target", "(4,)", "(3,)"]),
        ({"target": torch.tensor([0, 6, 2, 0])}, ValueError, ["target[1]", "6", "[0, 6)"]),
        ({"reduction": "median"}, ValueError, ["reduction", "median", "mean"]),
        ({"softcap": 0.0}, ValueError, ["softcap", "0.0", "[1e-30, 1e+30]"]),
        ({"softcap": "30"}, TypeError, ["softcap", "number", "str"]),
        ({"logit_scale": math.nan}, ValueError, ["logit_scale", "nan"]),
        ({"backward_rows": -1}, ValueError, ["backward_rows", "-1", "at least 0"]),
        ({"backward_rows": 2.0}, TypeError, ["backward_rows", "float", "int"]),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        linear_cross_entropy(**{"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET, **arguments})
    for word in words:
        assert word in str(raised.value)
