"""soft_label_kl against 50 decimal digits, F.kl_div in float64, and gradcheck."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import batchkern


def decimal_softmax(row: list[float], temperature: float) -> tuple[list[Decimal], list[Decimal]]:
    """Probabilities and their logarithms; a class at -inf has the logarithm -Infinity."""
    scaled = [Decimal(z) / Decimal(temperature) for z in row]
    top = max(scaled)
    lse = top + sum((z - top).exp() for z in scaled).ln()
    return [(z - lse).exp() for z in scaled], [z - lse for z in scaled]


def exact(reference: list[float], virtual: list[float], temperature: float = 1.0) -> float:
    """KL(softmax(reference / T) || softmax(virtual / T)) with 50 digits."""
    with localcontext() as context:
        context.prec = 50
        p, log_p = decimal_softmax(reference, temperature)
        _, log_q = decimal_softmax(virtual, temperature)
        terms = [a * (b - c) for a, b, c in zip(p, log_p, log_q, strict=True) if b != Decimal("-inf")]
        return float(sum(terms))


def divergences(reference: Tensor, virtual: Tensor, **options: Any) -> Tensor:
    return batchkern.soft_label_kl(reference, virtual, per_sample=True, **options)[1]


def naive(reference: Tensor, virtual: Tensor) -> Tensor:
    """What one writes without this operation."""
    log_p, log_q = F.log_softmax(reference, 1), F.log_softmax(virtual, 1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def relative_error(got: Tensor, expected: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(got.tolist(), expected, strict=True))


# --- accuracy --------------------------------------------------------------------------------------------

ROWS, CLASSES = 6, 10


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values(temperature: float, scale: float, dtype: torch.dtype) -> None:
    reference, virtual = (scale * torch.randn(2, ROWS, CLASSES, dtype=dtype)).unbind()
    got = divergences(reference, virtual, temperature=temperature)
    expected = [exact(p, q, temperature) for p, q in zip(reference.tolist(), virtual.tolist(), strict=True)]
    assert got.dtype == dtype
    assert relative_error(got, expected) < (2e-5 if dtype == torch.float32 else 1e-11)
    mean = batchkern.soft_label_kl(reference, virtual, temperature=temperature)
    assert mean.dtype == dtype
    assert mean.dim() == 0
    assert mean.item() == pytest.approx(sum(expected) / ROWS, rel=2e-5)


@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("classes", [10, 300])
def test_virtual_rows_next_to_their_reference(distance: float, classes: int) -> None:
    reference = 2 * torch.randn(ROWS, classes)
    virtual = reference + distance * torch.randn(ROWS, classes)
    expected = [exact(p, q) for p, q in zip(reference.tolist(), virtual.tolist(), strict=True)]
    got = divergences(reference, virtual)
    assert relative_error(got, expected) < 2e-5
    # The plain sum must be much worse, or this test shows nothing.
    if distance <= 1e-3:
        assert relative_error(naive(reference, virtual), expected) > 20 * relative_error(got, expected)
    if distance <= 1e-5:
        assert relative_error(naive(reference, virtual), expected) > 100


BRANCHES = [-21, -20.5, -20, -19.9, -1, -0.26, -0.25, -0.24, -0.1, 0.1, 0.24, 0.25, 0.26, 0.99, 1, 1.01, 3]


@pytest.mark.parametrize("t", BRANCHES)
def test_each_branch_of_the_formula(t: float) -> None:
    # Two classes, one of which moves by about t: the branches for small, middle and large t meet without a jump.
    for size in (0.0, 5.0, -5.0):
        reference = torch.tensor([[size, 0.0]])
        for moved in (torch.tensor([[size - t, 0.0]]), torch.tensor([[size, -t]])):
            expected = exact(reference[0].tolist(), moved[0].tolist())
            assert divergences(reference, moved).item() == pytest.approx(expected, rel=2e-5)


EXTREMES = {
    "opposite and certain": ([0.0, 200.0], [200.0, 0.0]),
    "log-ratio above 88": ([0.0, 0.0, 0.0], [0.0, 0.0, -100.0]),
    "P underflows": ([0.0, -150.0, 1.0], [0.0, 1.0, 0.5]),
    "Q underflows": ([0.0, 1.0, 0.5], [0.0, -150.0, 1.0]),
    "both underflow": ([0.0, -150.0, 1.0], [0.0, -120.0, 0.5]),
    "both underflow, P far below": ([0.0, -900.0, 1.0], [0.0, -120.0, 0.5]),
    "P subnormal": ([0.0, -95.0], [0.0, -1.0]),
    "Q subnormal": ([0.0, -1.0], [0.0, -95.0]),
    "huge logits": ([3e38, 0.0, -3e38], [3e38, 0.0, -3e38]),
    "thousands": ([1000.0, 0.0, -1000.0], [-1000.0, 0.0, 1000.0]),
    "far from zero": ([1e6, 1e6 + 1, 1e6 + 2], [1e6, 1e6 + 1, 1e6 + 3]),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(name: str) -> None:
    p, q = EXTREMES[name]
    expected = exact(p, q)
    reference, virtual = torch.tensor([p], requires_grad=True), torch.tensor([q], requires_grad=True)
    loss = batchkern.soft_label_kl(reference, virtual, reference_grad=True)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-30)
    loss.backward()
    assert reference.grad.isfinite().all()
    soft_p, soft_q = (torch.tensor([row]).double().softmax(1) for row in (p, q))
    torch.testing.assert_close(virtual.grad.double(), soft_q - soft_p, rtol=1e-5, atol=1e-7)


@given(
    rows=st.lists(
        st.tuples(st.floats(-300, 300, width=32), st.floats(-2, 2, width=32), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    size=st.sampled_from([1.0, 1e-2, 1e-4, 1e-6, 0.0]),
    temperature=st.sampled_from([0.1, 1.0, 7.0]),
)
def test_never_negative(rows: list[tuple[float, float, bool]], size: float, temperature: float) -> None:
    reference = torch.tensor([[z for z, _, _ in rows]])
    virtual = torch.tensor([[z + size * d if far else z * (1 + size) for z, d, far in rows]])
    got = divergences(reference, virtual, temperature=temperature)
    assert got >= 0
    if size == 0:
        assert got == 0


def test_never_negative_for_neighbours() -> None:
    reference = 5 * torch.randn(2000, 20)
    for distance in (0.0, 1e-7, 1e-5, 1e-3, 1e-1):
        virtual = reference + distance * torch.randn_like(reference)
        assert (divergences(reference, virtual) >= 0).all()
    assert (naive(reference, reference + 1e-5 * torch.randn_like(reference)) < 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    reference = torch.randn(ROWS, CLASSES).to(dtype)
    virtual = (reference.float() + 0.02 * torch.randn(2 * ROWS, CLASSES).view(2, ROWS, -1)).to(dtype).flatten(0, 1)
    got = divergences(reference, virtual)
    assert got.dtype == torch.float32
    pairs = zip(reference.repeat(2, 1).tolist(), virtual.tolist(), strict=True)
    assert relative_error(got, [exact(p, q) for p, q in pairs]) < 1e-3
    leaf = virtual.clone().requires_grad_()
    batchkern.soft_label_kl(reference, leaf).backward()
    assert leaf.grad.dtype == dtype
    exact_grad = (virtual.double().softmax(1) - reference.double().softmax(1).repeat(2, 1)) / (2 * ROWS)
    torch.testing.assert_close(leaf.grad.double(), exact_grad, rtol=torch.finfo(dtype).eps, atol=1e-7)


# --- classes at -inf -------------------------------------------------------------------------------------

INF = math.inf


def both_gradients(p: list[float], q: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    reference, virtual = torch.tensor([p], requires_grad=True), torch.tensor([q], requires_grad=True)
    loss = batchkern.soft_label_kl(reference, virtual, reference_grad=True)
    return loss.detach(), *torch.autograd.grad(loss, (reference, virtual))


def test_a_class_at_minus_infinity_in_both_rows_adds_nothing() -> None:
    expected, expected_p, expected_q = both_gradients([0.3, 1.0], [0.5, -1.0])
    loss, grad_p, grad_q = both_gradients([0.3, -INF, 1.0], [0.5, -INF, -1.0])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad_p[:, [0, 2]], expected_p)
    torch.testing.assert_close(grad_q[:, [0, 2]], expected_q)
    assert grad_p[0, 1] == grad_q[0, 1] == 0


def test_a_class_at_minus_infinity_in_the_virtual_row_is_infinitely_far() -> None:
    loss, _, grad_q = both_gradients([0.3, 0.0, 1.0], [0.5, -INF, -1.0])
    assert loss == INF
    expected = torch.tensor([[0.5, -INF, -1.0]]).softmax(1) - torch.tensor([[0.3, 0.0, 1.0]]).softmax(1)
    torch.testing.assert_close(grad_q, expected)
    # Other rows are untouched.
    reference, virtual = torch.zeros(2, 2), torch.tensor([[0.0, -INF], [0.0, 1.0]])
    far, near = divergences(reference, virtual).tolist()
    assert far == INF
    assert near == pytest.approx(exact([0.0, 0.0], [0.0, 1.0]), rel=1e-5)


def test_a_class_at_minus_infinity_in_the_reference_alone() -> None:
    loss, grad_p, grad_q = both_gradients([0.3, -INF, 1.0], [0.5, 0.2, -1.0])
    assert loss.item() == pytest.approx(exact([0.3, -INF, 1.0], [0.5, 0.2, -1.0]), rel=1e-5)
    soft_p, soft_q = torch.tensor([[0.3, -INF, 1.0]]).softmax(1), torch.tensor([[0.5, 0.2, -1.0]]).softmax(1)
    torch.testing.assert_close(grad_q, soft_q - soft_p)
    assert grad_p.isfinite().all()
    assert grad_p[0, 1] == 0


def test_all_but_one_class_at_minus_infinity() -> None:
    loss, grad_p, grad_q = both_gradients([-INF, 5.0, -INF], [-INF, 1.0, -INF])
    assert loss == 0
    assert not grad_p.any()
    assert not grad_q.any()


def test_nan_is_not_hidden() -> None:
    for p, q in (([math.nan, 0.0], [0.0, 1.0]), ([0.0, 1.0], [math.nan, 0.0])):
        assert divergences(torch.tensor([p]), torch.tensor([q])).isnan().all()


# --- pairing, means, gradients ---------------------------------------------------------------------------


def test_copies_are_paired_copy_major() -> None:
    reference = torch.randn(4, CLASSES)
    stacked = reference.repeat(3, 1)  # as augment_latent stacks
    assert batchkern.soft_label_kl(reference, stacked) == 0
    assert batchkern.soft_label_kl(reference, reference.repeat_interleave(3, 0)) > 0.1
    virtual = stacked + torch.randn_like(stacked)
    mean, rows = batchkern.soft_label_kl(reference, virtual, per_sample=True)
    expected = [exact(reference[i % 4].tolist(), row) for i, row in enumerate(virtual.tolist())]
    assert relative_error(rows, expected) < 2e-5
    assert mean.item() == pytest.approx(sum(expected) / 12, rel=2e-5)  # over M * B, not B


def test_per_sample_is_detached() -> None:
    virtual = torch.randn(4, 3, requires_grad=True)
    mean, rows = batchkern.soft_label_kl(torch.randn(2, 3), virtual, per_sample=True)
    assert mean.requires_grad
    assert not rows.requires_grad
    assert rows.shape == (4,)


def test_the_reference_is_constant_unless_asked() -> None:
    reference, virtual = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    batchkern.soft_label_kl(reference, virtual).backward()
    assert reference.grad is None
    assert virtual.grad.any()
    assert not batchkern.soft_label_kl(reference, virtual.detach()).requires_grad
    batchkern.soft_label_kl(reference, virtual.detach(), reference_grad=True).backward()
    assert reference.grad.any()


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_gradients_are_those_of_kl_div(copies: int, temperature: float) -> None:
    inputs = torch.randn(4, CLASSES, dtype=torch.float64), torch.randn(4 * copies, CLASSES, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in inputs]
    log_p = (leaves[0] / temperature).log_softmax(1).repeat(copies, 1)
    log_q = (leaves[1] / temperature).log_softmax(1)
    expected = torch.autograd.grad(3 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True), leaves)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        narrow = [x.to(dtype).requires_grad_() for x in inputs]
        loss = batchkern.soft_label_kl(*narrow, temperature=temperature, reference_grad=True)
        for grad, wanted in zip(torch.autograd.grad(3 * loss, narrow), expected, strict=True):
            assert grad.dtype == dtype
            torch.testing.assert_close(grad.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradcheck(copies: int, temperature: float) -> None:
    reference = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    virtual = torch.randn(2 * copies, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda p, q: batchkern.soft_label_kl(p, q, temperature=temperature, reference_grad=True),
        (reference, virtual),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [0.3, -2.0, 0.0])
def test_a_scale_is_in_the_mean_and_in_the_gradient_but_not_in_the_divergences(
    scale: float, dtype: torch.dtype
) -> None:
    leaves = [(2 * torch.randn(n, CLASSES)).to(dtype).requires_grad_() for n in (4, 12)]
    plain, parts = batchkern.soft_label_kl(*leaves, temperature=1.5, reference_grad=True, per_sample=True)
    scaled, same = batchkern.soft_label_kl(*leaves, temperature=1.5, scale=scale, reference_grad=True, per_sample=True)
    assert torch.equal(same, parts)
    torch.testing.assert_close(scaled, scale * plain)
    expected = torch.autograd.grad(plain, leaves, torch.tensor(scale, dtype=plain.dtype))
    for grad, wanted in zip(torch.autograd.grad(scaled, leaves), expected, strict=True):
        torch.testing.assert_close(grad, wanted)
        assert wanted.any() == (scale != 0)


def test_second_derivative_raises() -> None:
    reference, virtual = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    squared = batchkern.soft_label_kl(reference, virtual, reference_grad=True) ** 2
    for grad in torch.autograd.grad(squared, (reference, virtual), create_graph=True):
        with pytest.raises(RuntimeError):
            grad.square().sum().backward()


def test_upstream_gradient_of_stride_zero() -> None:
    reference, virtual = torch.randn(2, 3), torch.randn(4, 3, requires_grad=True)
    (once,) = torch.autograd.grad(batchkern.soft_label_kl(reference, virtual), virtual)
    (many,) = torch.autograd.grad(batchkern.soft_label_kl(reference, virtual).expand(2, 5).sum(), virtual)
    torch.testing.assert_close(many, 10 * once)


def test_strided_logits() -> None:
    reference, virtual = torch.randn(4, 6), torch.randn(8, 6)
    expected = divergences(reference, virtual)
    for layout in (lambda x: torch.cat([x, x], 1)[:, :6], lambda x: x.t().contiguous().t()):
        torch.testing.assert_close(divergences(layout(reference), layout(virtual)), expected)
    one_row = torch.randn(1, 6)
    expanded = divergences(one_row.expand(4, 6), virtual)
    torch.testing.assert_close(expanded, divergences(one_row.repeat(4, 1), virtual))


def test_empty() -> None:
    reference, virtual = torch.randn(0, 4, requires_grad=True), torch.randn(0, 4, requires_grad=True)
    loss, parts = batchkern.soft_label_kl(reference, virtual, reference_grad=True, per_sample=True)
    assert loss.isnan()
    assert parts.shape == (0,)
    loss.backward()
    assert virtual.grad.shape == (0, 4)
    assert reference.grad.shape == (0, 4)


def test_no_virtual_rows_are_an_error() -> None:
    """They would give NaN, which looks like a training that diverged."""
    with pytest.raises(ValueError, match=r"shape \(M \* 3, 4\) .* with M at least 1, got \(0, 4\)"):
        batchkern.soft_label_kl(torch.randn(3, 4), torch.randn(0, 4))


def test_compiled_equals_eager() -> None:
    reference, virtual = torch.randn(3, 7), torch.randn(6, 7)

    def step(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        return batchkern.soft_label_kl(p, q, temperature=2.0, reference_grad=True, per_sample=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, step):
        leaves = [x.clone().requires_grad_() for x in (reference, virtual)]
        mean, rows = function(*leaves)
        results.append((mean.detach(), rows, torch.autograd.grad(mean, leaves)))
    torch.testing.assert_close(*results)


P, Q = torch.zeros(2, 3), torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"reference_logits": [[0.0]]}, TypeError, ["reference_logits", "list", "tensor"]),
        ({"reference_logits": P.long()}, TypeError, ["reference_logits", "int64", "float32"]),
        ({"reference_logits": torch.zeros(3)}, ValueError, ["reference_logits", "(3,)", "2 dimension"]),
        ({"virtual_logits": [[0.0]]}, TypeError, ["virtual_logits", "list", "tensor"]),
        ({"virtual_logits": Q.bfloat16()}, TypeError, ["virtual_logits", "bfloat16", "float32"]),
        ({"virtual_logits": torch.zeros(2, 2, 3)}, ValueError, ["virtual_logits", "(2, 2, 3)", "2 dimension"]),
        ({"virtual_logits": torch.zeros(4, 4)}, ValueError, ["virtual_logits", "(4, 4)", "(M * 2, 3)"]),
        ({"virtual_logits": torch.zeros(3, 3)}, ValueError, ["virtual_logits", "(3, 3)", "(M * 2, 3)"]),
        ({"reference_logits": torch.zeros(0, 3)}, ValueError, ["virtual_logits", "(4, 3)", "(M * 0, 3)"]),
        ({"virtual_logits": Q.to("meta")}, ValueError, ["virtual_logits", "meta", "cpu"]),
        ({"temperature": 0.0}, ValueError, ["temperature", "0.0", "[1.175"]),
        ({"temperature": -1}, ValueError, ["temperature", "-1", "[1.175"]),
        ({"temperature": math.nan}, ValueError, ["temperature", "nan", "[1.175"]),
        ({"temperature": "1"}, TypeError, ["temperature", "str", "number"]),
        ({"scale": math.nan}, ValueError, ["scale", "nan", "[-3.4"]),
        ({"scale": -1e39}, ValueError, ["scale", "-1e+39", "[-3.4"]),
        ({"scale": torch.tensor(1.0)}, TypeError, ["scale", "Tensor", "number"]),
    ],
)
def test_wrong_arguments(arguments: dict, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        batchkern.soft_label_kl(**{"reference_logits": P, "virtual_logits": Q, **arguments})
    for word in words:
        assert word in str(raised.value)
