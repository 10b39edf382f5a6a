"""linear_trimmed_cross_entropy as it is computed: which products it makes, what memory it takes, how exact it is."""

from __future__ import annotations

import itertools
import math
from typing import Any

import kernel_cases
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import batchkern
from batchkern.ops import _chunked_linear

KEPT, ALL, AGAIN = "keep logits", "gradient of all", "logits again"
NEEDS = [needs for needs in itertools.product([False, True], repeat=3) if any(needs)]


def problem(
    rows: int = 40, width: int = 12, words: int = 200, dtype: torch.dtype = torch.float32, ignored: float = 0.2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, target"""
    target = torch.randint(words, (rows,))
    target[torch.rand(rows) < ignored] = -100
    hidden, weight, bias = torch.randn(rows, width), torch.randn(words, width), torch.randn(words)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), target


def leaves_of(*tensors: Tensor, needs: tuple[bool, ...] = (True, True, True)) -> list[Tensor]:
    return [x.detach().clone().requires_grad_(needed) for x, needed in zip(tensors, needs)]


def step(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, keep: Any, **options: Any) -> list[Tensor]:
    """The loss, the losses and the gradients of 1.5 times the loss."""
    leaves = leaves_of(hidden, weight, bias)
    loss, losses = batchkern.linear_trimmed_cross_entropy(
        *leaves[:2], target, keep, bias=leaves[2], per_sample=True, **options
    )
    return [loss.detach(), losses, *torch.autograd.grad(1.5 * loss, leaves)]


def exact_step(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, kept: Tensor, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """PyTorch's own loss and gradients of the kept rows."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    loss = F.cross_entropy(F.linear(*leaves)[kept], target[kept])
    return [loss.detach(), *torch.autograd.grad(1.5 * loss, leaves)]


def kept_rows(losses: Tensor, target: Tensor, keep: float) -> Tensor:
    """As the definition has it: the highest of the losses, equal ones by index."""
    valid = target != -100
    order = losses.masked_fill(~valid, -math.inf).sort(descending=True, stable=True).indices
    kept = torch.zeros_like(valid)
    kept[order[: max(round(keep * int(valid.sum())), 1)]] = True
    return kept


# --- which products are made -----------------------------------------------------------------------------------


def counted(needs: tuple[bool, ...], keep: float, chunk_rows: int | None) -> tuple[float, float]:
    """The flops of the forward and the backward pass, in units of F. No row is ignored."""
    hidden, weight, bias, target = problem(ignored=0)
    leaves = leaves_of(hidden, weight, bias, needs=needs)
    with FlopCounterMode(display=False) as forward:
        loss = batchkern.linear_trimmed_cross_entropy(*leaves[:2], target, keep, bias=leaves[2], chunk_rows=chunk_rows)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    whole = 2 * hidden.numel() * len(weight)
    return forward.get_total_flops() / whole, backward.get_total_flops() / whole


@pytest.mark.parametrize("keep", [0.05, 0.2, 0.5, 0.65])
def test_the_backward_pass_costs_what_it_keeps(keep: float) -> None:
    assert counted((True, True, True), keep, chunk_rows=8) == pytest.approx((1, 3 * keep))


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.6, 0.7, 0.75, 0.85, 0.95, 1.0])
def test_the_cheapest_way_is_taken(needs: tuple[bool, bool, bool], keep: float) -> None:
    products = needs[0] + needs[1]
    again = 1 + keep * (1 + products)
    everything = 1 + products + ((1 - keep) * (1 + needs[1]) if needs[1] or needs[2] else 0)
    assert sum(counted(needs, keep, chunk_rows=8)) == pytest.approx(min(again, everything))
    assert sum(counted(needs, keep, chunk_rows=None)) == pytest.approx(1 + keep * products)  # the logits were kept


def test_no_gradient_costs_nothing() -> None:
    hidden, weight, bias, target = problem(ignored=0)
    leaves = leaves_of(hidden, weight, bias)
    for keep, chunk_rows in itertools.product((0.3, 1.0), (8, None)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            batchkern.linear_trimmed_cross_entropy(*leaves[:2], target, keep, bias=leaves[2], chunk_rows=chunk_rows)
        assert counter.get_total_flops() == 2 * hidden.numel() * len(weight)


def test_float16_never_makes_a_gradient_that_the_loss_scale_has_not_reached() -> None:
    assert _chunked_linear.choose(1.0, [True] * 3, may_keep_logits=False, dtype=torch.bfloat16) == ALL
    assert _chunked_linear.choose(1.0, [True] * 3, may_keep_logits=False, dtype=torch.float16) == AGAIN


def test_small_gradients_survive_in_float16_under_a_loss_scale() -> None:
    hidden, weight, _, target = problem(rows=64, dtype=torch.float16, ignored=0)
    leaves = leaves_of(hidden, weight)
    loss = batchkern.linear_trimmed_cross_entropy(*leaves, target, 1.0, chunk_rows=8)
    gradient = torch.autograd.grad(2.0**-12 * (2.0**14 * loss), leaves[0])[0]
    exact = leaves_of(hidden.double(), weight.double())
    F.cross_entropy(exact[0] @ exact[1].t(), target).mul(4).backward()
    assert (gradient.double() - exact[0].grad).abs().max() < 2**-9 * exact[0].grad.abs().max()


# --- chunks ----------------------------------------------------------------------------------------------------


def test_chunks_are_equal_and_within_their_budget() -> None:
    def rows(count: int, words: int, dtype: torch.dtype = torch.float32, wanted: int | None = None) -> int:
        hidden, weight = torch.empty(count, 1, dtype=dtype), torch.empty(words, 1, dtype=dtype)
        return _chunked_linear._chunk_rows(hidden, weight, dtype, wanted)

    budget = _chunked_linear.CHUNK_BYTES["cpu"]
    assert rows(2048, 32000) * 32000 * 4 <= budget < rows(2048, 32000) * 32000 * 4 * 1.3
    assert rows(1025, 16384) == 513  # not 1024 and 1
    assert rows(4096, 2**20) == _chunked_linear.LEAST_CHUNK
    assert rows(10, 2**20) == 10
    assert (rows(0, 5), rows(5, 0), rows(5, 5, wanted=2), rows(5, 5, wanted=100)) == (1, 5, 2, 5)


@pytest.mark.cpu
@pytest.mark.parametrize("keep", [0.2, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_logits_never_exist(keep: float, dtype: torch.dtype) -> None:
    rows, words, width = 4096, 32000, 16
    hidden, weight, _, target = problem(rows, width, words, dtype)
    leaves = leaves_of(hidden, weight)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        batchkern.linear_trimmed_cross_entropy(*leaves, target, keep).backward()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    # Half a chunk of bfloat16, and torch's product in float32, where the processor has none in bfloat16.
    chunk = _chunked_linear.CHUNK_BYTES["cpu"]
    product = 0 if dtype == torch.float32 else chunk / 2
    # The gradient of the weight may be summed in float32 before it is rounded.
    gradients = 6 * (weight.numel() + hidden.numel()) + weight.nbytes
    assert max(event.nbytes() for event in events) <= 1.01 * chunk < rows * words * dtype.itemsize / 3
    assert peak <= 1.01 * chunk + product + _chunked_linear.SLICE_BYTES["cpu"] + gradients + 64 * rows


# --- exactness -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES, ids=str)
@pytest.mark.parametrize("chunk_rows", [9, None], ids=["chunks", "one chunk"])
@pytest.mark.parametrize("keep", [0.2, 0.6, 0.9, 1.0])
def test_as_exact_as_pytorch(dtype: torch.dtype, chunk_rows: int | None, keep: float) -> None:
    hidden, weight, bias, target = problem(300, 24, 900, dtype)
    loss, losses, *grads = step(hidden, weight, bias, target, keep, chunk_rows=chunk_rows)
    kept = kept_rows(losses, target, keep)
    exact_loss, *exact = exact_step(hidden, weight, bias, target, kept)
    torch_loss, *theirs = exact_step(hidden, weight, bias, target, kept, dtype)
    epsilon = torch.finfo(dtype).eps
    assert abs(loss.double() - exact_loss) <= abs(torch_loss.double() - exact_loss) + epsilon * exact_loss
    for ours, their, exactly in zip(grads, theirs, exact, strict=True):
        assert ours.dtype == dtype
        error, their_error = (ours.double() - exactly).abs(), (their.double() - exactly).abs()
        assert error.square().mean().sqrt() <= 1.1 * their_error.square().mean().sqrt() + 1e-8
        assert error.max() <= 1.5 * their_error.max() + 1e-8


@pytest.mark.parametrize("chunk_rows", [7, None], ids=["chunks", "one chunk"])
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_dropped_rows_are_exact_zeros(chunk_rows: int | None, keep: float) -> None:
    hidden, weight, bias, target = problem()
    _, losses, to_hidden, *_ = step(hidden, weight, bias, target, keep, chunk_rows=chunk_rows)
    assert torch.equal(to_hidden.any(1), kept_rows(losses, target, keep))


@pytest.mark.parametrize("chunk_rows", [7, None], ids=["chunks", "one chunk"])
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_dropped_rows_are_zeros_under_an_infinite_gradient(chunk_rows: int | None, keep: float) -> None:
    # As a loss scale that is too large makes.
    hidden, weight, _, target = problem()
    leaves = leaves_of(hidden, weight)
    loss, losses = batchkern.linear_trimmed_cross_entropy(*leaves, target, keep, per_sample=True, chunk_rows=chunk_rows)
    to_hidden, _ = torch.autograd.grad(loss, leaves, torch.tensor(math.inf))
    assert torch.equal(to_hidden.any(1), kept_rows(losses, target, keep))


def test_bf16_sums_of_many_chunks_are_made_in_float32() -> None:
    # A thousand equal rows: each adds the same to the gradient of the weight, and in bfloat16 a sum of ones stops at
    # 256. Their mean is the gradient of one row.
    hidden, weight, bias, target = (x[:1] if i in (0, 3) else x for i, x in enumerate(problem(ignored=0)))
    hidden, weight, bias = hidden.bfloat16(), weight.bfloat16(), bias.bfloat16()
    one = step(hidden, weight, bias, target, 1.0)
    many = step(hidden.repeat(1000, 1), weight, bias, target.repeat(1000), 1.0, chunk_rows=1)
    for ours, expected in zip(many[3:], one[3:]):
        torch.testing.assert_close(ours, expected, rtol=2**-7, atol=1e-4)


@given(data=st.data())
def test_any_shape_equals_the_definition(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    rows, width = data.draw(st.integers(1, 30), label="rows"), data.draw(st.integers(1, 6), label="width")
    words = data.draw(st.sampled_from([1, 2, 31, 64, 65, 130, 300]), label="words")
    keep = data.draw(st.sampled_from([0.01, 0.3, 0.5, 0.7, 0.85, 0.95, 1.0]), label="keep")
    chunk_rows = data.draw(st.sampled_from([None, 1, 3, 8]), label="chunk_rows")
    ignored = data.draw(st.sampled_from([0.0, 0.3, 0.9]), label="ignored")
    smoothing = data.draw(st.sampled_from([0.0, 0.2, 1.0]), label="smoothing")
    layout = kernel_cases.LAYOUTS[data.draw(st.sampled_from(list(kernel_cases.LAYOUTS)), label="layout")]
    hidden, weight, bias, target = problem(rows, width, words, ignored=ignored)
    hidden, weight = layout(hidden), layout(weight)
    options = {"label_smoothing": smoothing}
    ours = step(hidden, weight, bias, target, keep, chunk_rows=chunk_rows, **options)
    if (target == -100).all():
        assert ours[0].isnan()
        assert not any(x.any() for x in ours[1:])
        return
    kept = kept_rows(ours[1], target, keep)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    loss = F.cross_entropy(F.linear(*exact)[kept], target[kept], **options)
    expected = [loss.detach(), *torch.autograd.grad(1.5 * loss, exact)]
    for x, y in zip([ours[0], *ours[2:]], expected, strict=True):
        # The gradient of hidden adds up a term for each word, with both signs: its rounding grows with their number.
        scale = max(1, float(y.abs().max()), math.sqrt(words / 64))
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-6 * scale)


def test_slices_of_the_vocabulary_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk_rows, keep in ((None, 0.4), (11, 0.4), (11, 0.9)):
        arguments = *problem(words=333), keep
        expected = step(*arguments, chunk_rows=chunk_rows, label_smoothing=0.1)
        with monkeypatch.context() as patch:
            patch.setitem(_chunked_linear.SLICE_BYTES, "cpu", 4 * 16 * 64)
            patch.setattr(_chunked_linear, "ALIGNMENT", 8)
            torch.testing.assert_close(step(*arguments, chunk_rows=chunk_rows, label_smoothing=0.1), expected)


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.9, 1.0])
def test_where_the_host_knows_no_more_than_how_many_rows_there_may_be(
    monkeypatch: pytest.MonkeyPatch, keep: float
) -> None:
    # As on a GPU, whose mask the host does not look at: more rows are gathered than are kept.
    count = _chunked_linear._count
    for ignored in (0.0, 0.5, 1.0):
        hidden, weight, bias, target = problem(ignored=ignored)
        hidden[target == -100] = math.nan  # which no gathered row may spread
        arguments = hidden, weight, bias, target, keep
        for chunk_rows in (9, None):
            expected = step(*arguments, chunk_rows=chunk_rows, label_smoothing=0.1)
            with monkeypatch.context() as patch:
                patch.setattr(_chunked_linear, "_count", lambda mask, limits: count(mask.to("meta"), limits))
                ours = step(*arguments, chunk_rows=chunk_rows, label_smoothing=0.1)
            torch.testing.assert_close(ours, expected, equal_nan=True)


def test_the_bound_on_a_mask_holds() -> None:
    for rows in (1, 2, 3, 10, 50, 999):
        for percent in range(1, 101):
            keep = percent / 100
            for valid in {1, rows // 2 + 1, rows}:
                k = max(round(keep * valid), 1)
                mask = torch.empty(rows, dtype=torch.bool, device="meta")
                assert k <= _chunked_linear._count(mask, (None, keep)) <= keep * rows + 1
                assert valid - k <= _chunked_linear._count(mask, (None, 1 - keep)) <= (1 - keep) * rows + 1 + 1e-9


# --- in a training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.3, 1.0])
@pytest.mark.parametrize("chunk_rows", [9, None], ids=["chunks", "one chunk"])
def test_backward_twice(keep: float, chunk_rows: int | None) -> None:
    hidden, weight, bias, target = problem()
    leaves = leaves_of(hidden, weight, bias)
    loss = batchkern.linear_trimmed_cross_entropy(*leaves[:2], target, keep, bias=leaves[2], chunk_rows=chunk_rows)
    first = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    second = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    third = torch.autograd.grad(6 * loss, leaves)
    torch.testing.assert_close(second, first)
    torch.testing.assert_close(third, tuple(2 * x for x in first))


@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_tied_embeddings(keep: float) -> None:
    words, width = 50, 8
    tokens, target = torch.randint(words, (30,)), torch.randint(words, (30,))
    embedding = torch.randn(words, width, requires_grad=True)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, embedding)[0]

    hidden = F.embedding(tokens, embedding).tanh()
    ours = gradient(batchkern.linear_trimmed_cross_entropy(hidden, embedding, target, keep, chunk_rows=7))
    hidden = F.embedding(tokens, embedding).tanh()
    expected = gradient(batchkern.trimmed_cross_entropy(hidden @ embedding.t(), target, keep))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_autocast_keeps_the_gradient_of_a_float32_weight_in_float32(keep: float) -> None:
    # F.linear would compute it in bfloat16 and widen it.
    hidden, weight, bias, target = problem(rows=60)
    leaves = leaves_of(hidden.bfloat16(), weight, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = batchkern.linear_trimmed_cross_entropy(*leaves[:2], target, keep, bias=leaves[2], chunk_rows=9)
    grads = torch.autograd.grad(loss, leaves)
    assert [x.dtype for x in grads] == [torch.bfloat16, torch.float32, torch.float32]
    plain = leaves_of(hidden.bfloat16(), weight.bfloat16(), bias.bfloat16())
    narrow = batchkern.linear_trimmed_cross_entropy(*plain[:2], target, keep, bias=plain[2], chunk_rows=9)
    assert torch.equal(loss, narrow)
    for ours, theirs in zip(grads, torch.autograd.grad(narrow, plain)):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-7, atol=1e-3)


def test_a_backward_pass_under_autocast_is_the_same() -> None:
    hidden, weight, bias, target = problem(dtype=torch.float16)
    grads = []
    for enabled in (False, True):
        leaves = leaves_of(hidden, weight, bias)
        loss = batchkern.linear_trimmed_cross_entropy(*leaves[:2], target, 0.4, bias=leaves[2], chunk_rows=9)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(loss, leaves))
    assert all(map(torch.equal, *grads))


def test_results_do_not_depend_on_the_run() -> None:
    arguments = problem(300, 20, 400)
    for keep in (0.3, 0.9):
        first = step(*arguments, keep, chunk_rows=64)
        for _ in range(3):
            assert all(map(torch.equal, step(*arguments, keep, chunk_rows=64), first))


@pytest.mark.cpu
def test_a_wrong_target_is_named_by_its_row() -> None:
    hidden, weight, _, target = problem(ignored=0)
    target[33] = len(weight)
    with pytest.raises(ValueError, match=r"target\[33\] is 200; it must be in \[0, 200\)"):
        batchkern.linear_trimmed_cross_entropy(hidden, weight, target, 0.5, chunk_rows=8)


def test_module_passes_every_option_on() -> None:
    hidden, weight, bias, target = problem()
    target[target == -100] = 3
    options = {"ignore_index": 3, "label_smoothing": 0.1, "per_sample": True, "chunk_rows": 7}
    module = batchkern.LinearTrimmedCrossEntropyLoss(0.4, **options)
    expected = batchkern.linear_trimmed_cross_entropy(hidden, weight, target, 0.4, bias=bias, **options)
    torch.testing.assert_close(module(hidden, weight, target, bias), expected, rtol=0, atol=0)
    assert module(hidden, weight, target)[0] != expected[0]
    module.keep = 0.9
    assert module(hidden, weight, target, bias)[0] < expected[0]
    assert "keep=0.9" in repr(module)
    for wrong in ({"keep": 0}, {"keep": 0.5, "label_smoothing": 2}, {"keep": 0.5, "chunk_rows": 0}):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            batchkern.LinearTrimmedCrossEntropyLoss(**wrong)


# --- operators -------------------------------------------------------------------------------------------------


@pytest.mark.cpu
@pytest.mark.parametrize("keep", [0.3, 1.0])
@pytest.mark.parametrize("chunk_rows", [9, None], ids=["chunks", "one chunk"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(keep: float, chunk_rows: int | None, backend: str) -> None:
    hidden, weight, bias, target = problem()

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batchkern.linear_trimmed_cross_entropy(
            hidden.tanh(), weight, target, keep, bias=bias, chunk_rows=chunk_rows
        )

    results = []
    for call in (torch.compile(function, fullgraph=True, backend=backend), function):
        leaves = leaves_of(hidden, weight, bias)
        loss = call(*leaves)
        results.append((loss.detach(), torch.autograd.grad(1.5 * loss, leaves)))
    torch.testing.assert_close(*results)


@pytest.mark.cpu
def test_a_schedule_of_keep_does_not_compile_again_and_again() -> None:
    hidden, weight, _, target = problem()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def function(hidden: Tensor, keep: float) -> Tensor:
        return batchkern.linear_trimmed_cross_entropy(hidden, weight, target, keep, chunk_rows=9)

    for keep in (1.0, 0.9, 0.85, 0.7, 0.6, 0.55, 0.5, 0.45, 0.4, 0.3, 0.2):
        leaf = hidden.clone().requires_grad_()
        loss = function(leaf, keep)
        torch.testing.assert_close(
            loss, batchkern.linear_trimmed_cross_entropy(hidden, weight, target, keep), rtol=1e-5, atol=1e-6
        )
        loss.backward()
    assert counter.frame_count <= 4


@pytest.mark.parametrize("name", ["losses", "losses_and_gradients", "gradients"])
def test_the_compiler_replays_no_operator_for_which_the_host_reads_keep(name: str) -> None:
    operator = getattr(torch.ops.batchkern, f"linear_{name}").default
    reads = any(argument.name == "keep" for argument in operator._schema.arguments)
    assert reads is (name != "losses")
    assert (torch.Tag.cudagraph_unsafe in operator.tags) is reads


@pytest.mark.cpu
@pytest.mark.parametrize("with_bias", [False, True])
def test_operators(with_bias: bool) -> None:
    hidden, weight, bias, target = problem(rows=20)
    layer = hidden, weight, bias if with_bias else None
    needs = [True, True, with_bias]
    ops, check = torch.ops.batchkern, torch.library.opcheck
    tests = ("test_schema", "test_faketensor")
    for softcap in (None, 2.0):
        options = torch.float32, -100, 0.1, softcap, 0.5
        check(ops.linear_losses.default, (*layer, target, *options, 6, True, False), test_utils=tests)
        check(ops.linear_losses.default, (*layer, target, *options, None, False, True), test_utils=tests)
        for keep in (0.8, 1.0):
            arguments = *layer, target, *options, 6, needs, torch.tensor(keep)
            check(ops.linear_losses_and_gradients.default, arguments, test_utils=tests)
        losses, lse, _, _, (logits,) = ops.linear_losses(*layer, target, *options, None, False, True)
        grad = torch.where(kept_rows(losses, target, 0.5), 0.1, 0.0)
        for upstream in ((grad, None), (None, grad), (grad, grad)):
            for saved in (None, *([] if softcap else [logits])):
                arguments = *layer, *upstream, target, lse, saved, *options, 6, needs, None, torch.tensor(0.5)
                check(ops.linear_gradients.default, arguments, test_utils=tests)


def test_rows_without_a_selection() -> None:
    logits, target = torch.randn(30, 70), torch.randint(70, (30,))
    target[::4] = -100
    losses, lse = torch.full((30,), math.nan), torch.full((30, 2), math.nan)
    call = logits, target, losses, lse, None, None, -100, 0.1
    torch.library.opcheck(torch.ops.batchkern.cross_entropy_losses.default, call, test_utils=("test_schema",))
    assert torch.ops.batchkern.cross_entropy_losses.default(*call) is None
    _, expected, expected_lse, _, _ = torch.ops.batchkern.trimmed_cross_entropy(
        logits, target, 0.5, ignore_index=-100, label_smoothing=0.1
    )
    assert torch.equal(losses, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", kernel_cases.INSTRUCTION_SETS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_of_a_slice_is_a_slice_of_the_gradient(
    dtype: torch.dtype, instruction_set: str, smoothing: float
) -> None:
    logits, target = torch.randn(30, 210).to(dtype), torch.randint(210, (30,))
    with kernel_cases.with_instruction_set(instruction_set):
        upstream = torch.randn(30) * (torch.rand(30) < 0.5), torch.randn(30) * (torch.rand(30) < 0.3)
        _, lse, _, _ = torch.ops.batchkern.cross_entropy(logits, target, None, 7, smoothing)
        saved = target, lse
        whole = torch.ops.batchkern.cross_entropy_backward(*upstream, logits, *saved, None, 7, smoothing)
        for begin, end in ((0, 210), (0, 64), (64, 131), (131, 210), (200, 201)):
            part = logits[:, begin:end].clone()
            torch.ops.batchkern.cross_entropy_backward_.default(*upstream, part, *saved, 7, smoothing, begin, 210)
            assert torch.equal(part, whole[:, begin:end])


@pytest.mark.parametrize(("first", "classes"), [(-1, 20), (11, 20), (0, 9)])
def test_wrong_slices(first: int, classes: int) -> None:
    target, one = torch.zeros(4, dtype=torch.long), torch.ones(4)
    with pytest.raises(ValueError, match=f"not classes from {first} on of {classes}"):
        torch.ops.batchkern.cross_entropy_backward_.default(
            one, None, torch.zeros(4, 10), target, torch.zeros(4, 2), -100, 0.0, first, classes
        )
