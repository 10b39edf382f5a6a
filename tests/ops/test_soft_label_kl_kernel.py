"""The CPU kernel of soft_label_kl against the reference in float64, with eager PyTorch's own error as the measure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    COARSER,
    DRAWN_DTYPES,
    DTYPES,
    INSTRUCTION_SETS,
    LAYOUTS,
    ORDERED,
    REPEATS,
    SLOW,
    TOLERANCE,
    rounded_once_more,
)
from torch import Tensor

import batchkern
from batchkern import _backend, reference

_C = _backend.extension
RAW = torch.ops.batchkern.soft_label_kl
NARROW = (torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    instruction_set, threads = _C.instruction_set(), torch.get_num_threads()
    yield
    _C.use_instruction_set(instruction_set)
    torch.set_num_threads(threads)


def each_instruction_set() -> Iterator[str]:
    for instruction_set in INSTRUCTION_SETS:
        _C.use_instruction_set(instruction_set)
        yield instruction_set


def kernel(p: Tensor, q: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Divergences, and the gradients of their sum with respect to ``p`` and ``q``."""
    mean, kl, to_virtual, to_reference = RAW(p, q, temperature=temperature, reference_grad=True, virtual_grad=True)
    # 2^-149 is the smallest subnormal.
    torch.testing.assert_close(mean.double(), kl.double().mean(), rtol=TOLERANCE, atol=2**-149, equal_nan=True)
    return kl, to_reference * len(q), to_virtual * len(q)


def eager(p: Tensor, q: Tensor, temperature: float) -> Tensor:
    """What one writes with F.kl_div."""
    copies = len(q) // max(len(p), 1)
    log_p, log_q = F.log_softmax(p / temperature, 1).repeat(copies, 1), F.log_softmax(q / temperature, 1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def oracle(p: Tensor, q: Tensor, temperature: float) -> Tensor:
    return reference.soft_label_kl(p, q, temperature=temperature)


def with_gradients(function: Any, p: Tensor, q: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    p, q = p.detach().requires_grad_(), q.detach().requires_grad_()
    kl = function(p, q, temperature)
    return kl.detach().double(), *(x.double() for x in torch.autograd.grad(kl.sum(), (p, q)))


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def assert_no_worse_than_eager(p: Tensor, q: Tensor, temperature: float) -> None:
    """Values and gradients on every instruction set; eager gets float32 logits, so that narrow ones have no excuse."""
    exact = with_gradients(oracle, p.double(), q.double(), temperature)
    own = with_gradients(eager, p.float(), q.float(), temperature)
    # Beyond eager's largest error: a value is rounded to float32 once more (2^-23 of it, and as much next to 0); a
    # gradient holds one exponential of relative error 2^-22, and that of the reference the sum of the divergences too.
    grad_slack = 2**-22 / temperature
    sums = exact[0].view(-1, len(p)).sum(0).max() if exact[0].numel() else 0.0
    slacks = 2**-23 * (1 + exact[0]), grad_slack * (1 + sums), grad_slack
    for instruction_set in each_instruction_set():
        for got, wanted, theirs, slack in zip(kernel(p, q, temperature), exact, own, slacks, strict=True):
            assert got.dtype == torch.float32
            error = (got.double() - wanted).abs()
            allowed = largest(theirs - wanted) + COARSER * slack + rounded_once_more(p.dtype) * wanted.abs()
            assert (error <= allowed).all(), (instruction_set, tuple(p.shape), float((error / allowed).max()))


# --- the operator as torch sees it -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", [(False, False), (False, True), (True, False), (True, True)], ids=str)
def test_opcheck(dtype: torch.dtype, wanted: tuple[bool, bool]) -> None:
    p, q = torch.randn(3, 5).to(dtype), torch.randn(6, 5).to(dtype)
    options = {"temperature": 2.0, "reference_grad": wanted[0], "virtual_grad": wanted[1]}
    torch.library.opcheck(RAW.default, (p, q), options)
    gradient, factor = torch.randn(6, 5), torch.tensor(0.5)
    out = torch.empty(6, 5, dtype=dtype)
    torch.library.opcheck(torch.ops.batchkern.scale_gradient_.default, (out, gradient, factor))


@pytest.mark.parametrize("wanted", [(False, False), (False, True), (True, False)], ids=str)
def test_what_is_not_asked_for_is_not_made_and_changes_nothing(wanted: tuple[bool, bool]) -> None:
    p, q = torch.randn(3, 50), torch.randn(6, 50)
    for _ in each_instruction_set():
        mean, kl, to_virtual, to_reference = RAW(p, q, reference_grad=True, virtual_grad=True)
        alone = RAW(p, q, reference_grad=wanted[0], virtual_grad=wanted[1])
        # The kernel without a gradient is another instance of the template, free to sum in another order.
        torch.testing.assert_close(alone[:2], (mean, kl), rtol=1e-6, atol=0)
        for made, asked, full in ((alone[2], wanted[1], to_virtual), (alone[3], wanted[0], to_reference)):
            assert made.shape == (len(full) if asked else 0, 50)
            torch.testing.assert_close(made, full[: len(made)], rtol=1e-6, atol=1e-9)


def test_raw_operator_refuses_what_it_cannot_do() -> None:
    with pytest.raises(TypeError, match=r"reference_logits must be float32.*(Double|float64)"):
        RAW(torch.zeros(2, 3).double(), torch.zeros(4, 3).double())
    for p, q in (((2, 3), (3, 3)), ((2, 3), (4, 4)), ((0, 3), (4, 3)), ((6,), (6, 1)), ((2, 3), (2, 2, 3))):
        with pytest.raises(ValueError, match="logits must be"):
            RAW(torch.zeros(p), torch.zeros(q))


# --- values and gradients --------------------------------------------------------------------------------

LAYOUT = st.sampled_from(sorted(LAYOUTS))


@given(
    batch=st.sampled_from([0, 1, 2, 5]),
    copies=st.integers(1, 3),
    classes=st.sampled_from([1, 2, 3, 15, 16, 17, 100, 1000, 4097]),
    dtype=st.sampled_from(DRAWN_DTYPES),
    temperature=st.sampled_from([0.25, 0.3, 1.0, 3.0]),
    scale=st.sampled_from([0.01, 1.0, 10.0, 100.0]),
    distance=st.sampled_from([None, None, None, 0.0, 1e-6, 1e-3, 0.1, 0.5, 1.0]),
    layouts=st.tuples(LAYOUT, LAYOUT),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=120)
def test_values_and_gradients(
    batch: int,
    copies: int,
    classes: int,
    dtype: torch.dtype,
    temperature: float,
    scale: float,
    distance: float | None,
    layouts: tuple[str, str],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (scale * torch.randn(n, classes, generator=generator) for n in (batch, copies * batch))
    if distance is not None:  # virtual rows near their reference
        q = p.repeat(copies, 1) + distance * torch.randn(copies * batch, classes, generator=generator)
    p, q = (LAYOUTS[layout](x.to(dtype)) for layout, x in zip(layouts, (p, q), strict=True))
    assert_no_worse_than_eager(p, q, temperature)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_many_classes(scale: float) -> None:
    p = scale * torch.randn(2, 32000)
    assert_no_worse_than_eager(p, scale * torch.randn(4, 32000), 1.0)
    for dtype in DRAWN_DTYPES[1:]:
        assert_no_worse_than_eager(p.to(dtype), (p.repeat(2, 1) + 0.1 * torch.randn(4, 32000)).to(dtype), 1.0)


@pytest.mark.parametrize("offset", [100.0, 1000.0, -30000.0])
@pytest.mark.parametrize("classes", [1, 2, 30])
def test_a_row_may_be_shifted_as_a_whole(offset: float, classes: int) -> None:
    # A softmax does not see it, and eager subtracts each row's maximum before it rounds. These sums are exact.
    p = torch.randint(-32, 33, (5, classes)) / 8
    q = torch.cat([p, p + torch.randint(-1, 2, p.shape) / 8, p.flip(1)])
    for temperature in (0.3, 1.0):
        assert_no_worse_than_eager(p, q + offset, temperature)
        for _ in each_instruction_set():
            plain, moved = kernel(p, q, temperature), kernel(p, q + offset, temperature)
            torch.testing.assert_close(moved, plain, rtol=1e-5, atol=1e-6)
            assert (moved[0] >= 0).all()


@pytest.mark.parametrize("offset", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("higher", [0, 1])
@pytest.mark.parametrize("classes", [10, 8208])
def test_a_row_that_lies_higher_as_a_whole_loses_no_digits(classes: int, higher: int, offset: float) -> None:
    p = torch.randn(8, classes)
    rows = [p, p + 1e-3 * torch.randn(8, classes)]
    rows[higher] = rows[higher] + offset
    assert_no_worse_than_eager(*rows, 1.0)


@pytest.mark.parametrize("classes", [10, 1000, 32000])
def test_next_to_the_reference(classes: int) -> None:
    rows = 64 if classes < (1000 if SLOW else 32000) else 4
    p = 2 * torch.randn(rows, classes)
    for exponent in range(1, 8):
        q = p + 10.0**-exponent * torch.randn_like(p)
        exact, exact_to_p, _ = with_gradients(oracle, p.double(), q.double(), 1.0)
        for _ in each_instruction_set():
            mean, kl, _, to_p = RAW(p, q, reference_grad=True)
            assert (kl >= 0).all()
            if exponent <= 5:
                assert abs(mean.item() / exact.mean().item() - 1) < 1e-4
                assert (len(q) * to_p - exact_to_p).norm() < 1e-3 * exact_to_p.norm()
        assert (RAW(p, p)[1] == 0).all()
        if exponent == 5:  # or the test would show nothing
            assert abs(eager(p, q, 1.0).mean().item() / exact.mean().item() - 1) > 0.1


def test_around_the_seams_of_the_formula() -> None:
    # |d| of 1/2, where the difference of logits is no longer used alone, and t of -1 and 1.
    for edge in (0.5, 1.0, -1.0, 20.0, -20.0):
        d = edge + torch.tensor([-1e-2, -1e-6, 0, 1e-6, 1e-2])
        p = torch.randn(5, 40)
        q = p.clone()
        q[:, 0] -= d
        assert_no_worse_than_eager(p, q, 1.0)


# --- infinities and NaN ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [3, 17, 5000, 20_000])  # the last is swept by the GPU kernel
def test_absent_classes_are_as_if_they_were_not_there(classes: int, dtype: torch.dtype) -> None:
    p, q = torch.randn(4, classes).to(dtype), torch.randn(8, classes).to(dtype)
    for present in (
        torch.rand(classes) < 0.6,
        torch.arange(classes) >= classes - 2,  # whole blocks of the kernel's 4096 hold nothing
        torch.arange(classes) < 1,
    ):
        if not present.any():
            continue
        masked = [x.masked_fill(~present, -INF) for x in (p, q)]
        for _ in each_instruction_set():
            kl, to_p, to_q = kernel(*masked)
            wanted, wanted_p, wanted_q = kernel(p[:, present], q[:, present])
            torch.testing.assert_close(kl, wanted, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(to_p[:, present], wanted_p, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(to_q[:, present], wanted_q, rtol=1e-5, atol=1e-6)
            assert not to_p[:, ~present].any()
            assert not to_q[:, ~present].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 19, 300])
def test_special_logits_stay_in_their_rows(dtype: torch.dtype, classes: int) -> None:
    at = classes - 1
    for p_value, q_value, expected in (
        (0.0, -INF, INF),  # impossible under Q, possible under P
        (-INF, 0.0, None),  # impossible under P: finite
        (NAN, 0.0, NAN),
        (0.0, NAN, NAN),
        (-INF, NAN, NAN),
        (NAN, -INF, NAN),
        (INF, 0.0, NAN),  # the softmax of +inf is NaN
        (0.0, INF, NAN),
        (NAN, NAN, NAN),
    ):
        p, q = torch.randn(3, classes).to(dtype), torch.randn(6, classes).to(dtype)
        clean = with_gradients(oracle, p.double(), q.double(), 1.0)
        p[1, at] = p_value
        q[[1, 4], at] = q_value
        exact = with_gradients(oracle, p.double(), q.double(), 1.0)
        for _ in each_instruction_set():
            kl, to_p, to_q = (x.double() for x in kernel(p, q))
            special, others = kl[[1, 4]], [0, 2, 3, 5]
            if expected is None:
                torch.testing.assert_close(special, exact[0][[1, 4]], rtol=1e-5, atol=1e-7)
            else:
                assert torch.equal(special.isnan(), torch.full((2,), math.isnan(expected)))
                assert math.isnan(expected) or (special == expected).all()
            if expected is None or expected == INF:
                torch.testing.assert_close(to_q, exact[2], rtol=1e-5, atol=1e-6)
            else:
                assert to_q[[1, 4]].isnan().all()
            torch.testing.assert_close(kl[others], clean[0][others], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(to_q[others], clean[2][others], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(to_p[[0, 2]], clean[1][[0, 2]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 30])
def test_what_is_impossible_under_q_is_so_however_improbable_under_p(classes: int, dtype: torch.dtype) -> None:
    # e^-200 is no number of float32, and not 0.
    p = torch.zeros(1, classes).to(dtype)
    p[0, -1] = -200.0
    q = p.masked_fill(p < -1, -INF)
    assert oracle(p.double(), q.double(), 1.0).item() == INF
    for _ in each_instruction_set():
        kl, _, to_q = kernel(p, q)
        assert kl.item() == INF
        assert not to_q.isnan().any()


def test_huge_logits() -> None:
    # The largest finite values: certain rows that agree, and rows that disagree by more than float32 can hold.
    top = torch.finfo(torch.float32).max
    p = torch.tensor([[top, 0.0, -top], [0.0, 1.0, -top], [1e30, 1e30, 0.0]])
    for _ in each_instruction_set():
        kl, to_p, to_q = kernel(p, p.clone())
        assert not torch.cat([kl[:, None], to_p, to_q], 1).any()
        kl, _, to_q = kernel(p, p.flip(1))
        assert kl.tolist() == [INF, INF, INF] or (kl > 1e29).all()
        torch.testing.assert_close(to_q.double(), p.flip(1).double().softmax(1) - p.double().softmax(1))


@pytest.mark.parametrize("temperature", [INF, 1e39, 1e-39, 0.0, -1.0, math.nan])
def test_a_temperature_out_of_float32_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be in"):
        batchkern.soft_label_kl(torch.randn(3, 21), torch.randn(6, 21), temperature=temperature)


# --- the graph around it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_mean_in_the_dtype_of_the_logits(dtype: torch.dtype) -> None:
    p, q = torch.randn(5, 33).to(dtype), torch.randn(15, 33).to(dtype)
    p_leaf, q_leaf = p.clone().requires_grad_(), q.clone().requires_grad_()
    (-5.0 * batchkern.soft_label_kl(p_leaf, q_leaf, temperature=2.0, scale=0.5, reference_grad=True)).backward()
    _, exact_p, exact_q = with_gradients(oracle, p.double(), q.double(), 2.0)
    for leaf, exact in ((p_leaf, exact_p), (q_leaf, exact_q)):
        assert leaf.grad.dtype == dtype
        half_step = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        tiny = 2.0**-25 if dtype == torch.float16 else 0.0  # half the distance of two subnormal halves
        torch.testing.assert_close(
            leaf.grad.double(),
            -2.5 / 15 * exact,
            rtol=1.01 * half_step + rounded_once_more(dtype) + 1e-5,
            atol=1e-7 + tiny,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_graph_that_is_kept_gives_the_same_again(dtype: torch.dtype, wanted: tuple[bool, bool], scale: float) -> None:
    # The first backward pass multiplies the saved gradient in place, later ones run the kernel again.
    p, q = (torch.randn(n, 21).to(dtype).requires_grad_(flag) for n, flag in zip((4, 12), wanted, strict=True))
    leaves = [x for x in (p, q) if x.requires_grad]
    loss = batchkern.soft_label_kl(p, q, scale=scale, reference_grad=True)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [x.clone() for x in once]
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    scaled = torch.autograd.grad(loss, leaves, torch.tensor(-4.0), retain_graph=True)
    last = torch.autograd.grad(loss, leaves)
    for first, copy, second, third, fourth in zip(once, kept, again, scaled, last, strict=True):
        assert copy.any()
        assert torch.equal(first, copy)  # not overwritten by those that came later
        assert torch.equal(second, copy)
        assert torch.equal(third, -4 * copy)  # a power of two: exact
        assert torch.equal(fourth, copy)
    accumulated = batchkern.soft_label_kl(p, q, scale=scale, reference_grad=True)
    for _ in range(3):
        accumulated.backward(retain_graph=True)
    for leaf, copy in zip(leaves, kept, strict=True):
        torch.testing.assert_close(leaf.grad, copy + copy + copy)


def test_a_gradient_handed_out_is_nobody_elses() -> None:
    # With a factor of 1 it is the very memory that was saved, which a later pass must not see changed.
    q = torch.randn(6, 9, requires_grad=True)
    loss = batchkern.soft_label_kl(torch.randn(3, 9), q, scale=0.7)
    (grad,) = torch.autograd.grad(loss, q, retain_graph=True)
    expected = grad.clone()
    grad.zero_()
    assert expected.any()
    assert torch.equal(torch.autograd.grad(loss, q)[0], expected)


def test_who_gets_a_gradient() -> None:
    p, q = torch.randn(3, 9, requires_grad=True), torch.randn(6, 9, requires_grad=True)
    to_p, to_q = torch.autograd.grad(batchkern.soft_label_kl(p, q, reference_grad=True), (p, q))
    loss = batchkern.soft_label_kl(p, q.detach(), reference_grad=True)
    torch.testing.assert_close(torch.autograd.grad(loss, p)[0], to_p, rtol=1e-6, atol=1e-9)
    loss = batchkern.soft_label_kl(p.detach(), q, reference_grad=True)
    torch.testing.assert_close(torch.autograd.grad(loss, q)[0], to_q, rtol=1e-6, atol=1e-9)
    assert not batchkern.soft_label_kl(p, q.detach()).requires_grad
    assert not batchkern.soft_label_kl(p.detach(), q.detach(), reference_grad=True).requires_grad
    with torch.no_grad():
        quiet = batchkern.soft_label_kl(p, q, reference_grad=True)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, batchkern.soft_label_kl(p, q, reference_grad=True).detach(), rtol=1e-6, atol=0)


def test_both_logits_may_be_one_tensor() -> None:
    x = torch.randn(3, 9, requires_grad=True)
    loss = batchkern.soft_label_kl(x, x, reference_grad=True)
    (grad,) = torch.autograd.grad(loss, x)
    assert loss == 0
    assert not grad.any()


def test_second_derivative_raises_for_a_constant_upstream_gradient() -> None:
    p, q = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    loss = batchkern.soft_label_kl(p, q, reference_grad=True)
    for grad in torch.autograd.grad(loss, (p, q), create_graph=True):
        with pytest.raises(RuntimeError, match="twice"):
            grad.square().sum().backward(retain_graph=True)


@pytest.mark.parametrize("changed", [0, 1])
def test_logits_changed_before_the_backward_pass_raise(changed: int) -> None:
    p, q = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    inputs = p * 1, q * 1
    loss = batchkern.soft_label_kl(*inputs, reference_grad=True)
    with torch.no_grad():
        inputs[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_changes_nothing() -> None:
    for dtype in DRAWN_DTYPES:
        p, q = torch.randn(3, 9).to(dtype), torch.randn(6, 9).to(dtype)
        results = []
        for enabled in (False, True):
            leaf = q.clone().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                mean = batchkern.soft_label_kl(p, leaf)
                mean.backward()
            results.append((mean.detach(), leaf.grad))
        torch.testing.assert_close(*results, rtol=0, atol=0)


@ORDERED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_and_repeats_change_no_bit(dtype: torch.dtype) -> None:
    # 48 reference rows of 257 classes and 5 virtual rows: a thread takes no fewer than 21.
    p, q = torch.randn(48, 257).to(dtype), torch.randn(5 * 48, 257).to(dtype)
    first = None
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for _ in range(REPEATS):
            leaves = p.clone().requires_grad_(), q.clone().requires_grad_()
            mean, kl = batchkern.soft_label_kl(*leaves, reference_grad=True, per_sample=True)
            results = mean.detach(), kl, *torch.autograd.grad(mean, leaves)
            first = first or results
            assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


@pytest.mark.parametrize(
    ("dtype", "reference_grad"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)], ids=str
)
def test_compiled_equals_eager(dtype: torch.dtype, reference_grad: bool) -> None:
    torch.compiler.reset()  # or the cases would count as recompilations of one function
    p, q = torch.randn(3, 7).to(dtype), torch.randn(6, 7).to(dtype)

    def step(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        options = {"temperature": 2.0, "scale": 0.3, "reference_grad": reference_grad, "per_sample": True}
        mean, rows = batchkern.soft_label_kl(p, q, **options)
        return 3 * mean, rows

    results = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        leaves = p.clone().requires_grad_(reference_grad), q.clone().requires_grad_()
        loss, rows = function(*leaves)
        loss.backward()
        results.append((loss.detach(), rows, *(x.grad for x in leaves if x.requires_grad)))
    for compiled, plain in zip(*results, strict=True):
        assert torch.equal(compiled, plain)
