"""The CPU kernel of trimmed_cross_entropy with every instruction set: rows, error, blocks, threads and memory."""

from __future__ import annotations

import io
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kernel_backend
import pytest
import torch
import torch.nn.functional as F
import warm
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    FEWER_DTYPES,
    INSTRUCTION_SETS,
    LAYOUTS,
    REPEATS,
    TOLERANCE,
    bits,
    column_slice,
    excess,
    on_threads,
    with_instruction_set,
)
from torch import Tensor

import batchkern
from batchkern import reference

OPS = torch.ops.batchkern
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0])
CPU = pytest.mark.cpu


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest):
    with with_instruction_set(request.param):
        yield request.param


# --- error -----------------------------------------------------------------------------------------------------


@dataclass
class Case:
    logits: Tensor
    target: Tensor
    keep: float | Tensor = 1.0
    ignore_index: int = -100
    label_smoothing: float = 0.0
    class_weight: Tensor | None = None
    upstream: float = 1.0
    options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.options = {"ignore_index": self.ignore_index, "label_smoothing": self.label_smoothing}

    def oracle(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of all rows, and the loss and gradient of the kept ones, in float64."""
        weight = None if self.class_weight is None else self.class_weight.double()
        leaf = self.logits.double().requires_grad_()
        only_kept = torch.where(kept, self.target, self.ignore_index)
        losses = reference.trimmed_cross_entropy(leaf, self.target, 1.0, class_weight=weight, **self.options)[1]
        loss = reference.trimmed_cross_entropy(leaf, only_kept, 1.0, class_weight=weight, **self.options)[0]
        (grad,) = torch.autograd.grad(loss * self.upstream, leaf)
        return losses, loss.detach(), grad


def forward(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    keep, keep_tensor = (1.0, case.keep) if isinstance(case.keep, Tensor) else (case.keep, None)
    return OPS.trimmed_cross_entropy(
        case.logits, case.target, keep, keep_tensor=keep_tensor, class_weight=case.class_weight, **case.options
    )


def gradient(case: Case) -> Tensor:
    leaf = case.logits.detach().requires_grad_()
    loss = batchkern.trimmed_cross_entropy(leaf, case.target, case.keep, class_weight=case.class_weight, **case.options)
    return torch.autograd.grad(loss * case.upstream, leaf)[0]


def check(case: Case) -> None:
    """Every instruction set against the oracle: the same rows, no error far above that of a correctly rounded result.

    No result in the same dtype is closer to the oracle than the correctly rounded one, so this is stricter than a
    bound by torch's own error. What comes on top: TOLERANCE of a loss, or of 1, or of the largest weight, with which
    losses grow; of a gradient, as much and 1e-7 of the factor by which all of it is multiplied (measured by CPU kernels
    on 30,000 batches: 1.3e-7).
    """
    valid = case.target != case.ignore_index
    oracles: dict[tuple[bool, ...], tuple[Tensor, Tensor, Tensor]] = {}  # instruction sets may round a tie differently
    for name in INSTRUCTION_SETS:
        with with_instruction_set(name):
            loss, losses, _, kept, normalizer = forward(case)
            grad = gradient(case)
        expected, k = reference.select(losses, valid, case.keep)
        assert torch.equal(kept, expected), name
        rows = tuple(kept.tolist())
        exact_losses, exact_loss, exact_grad = oracles[rows] if rows in oracles else case.oracle(kept)
        oracles[rows] = exact_losses, exact_loss, exact_grad

        weight = torch.ones(case.logits.shape[1]) if case.class_weight is None else case.class_weight
        assert normalizer == (k if case.class_weight is None else weight[case.target[kept]].sum()), name  # eighths
        largest = max([1.0, *weight.tolist()])
        scale = exact_losses.abs().nan_to_num(0, 0).clamp(min=largest)
        assert (excess(losses, exact_losses, exact_losses.float()) <= TOLERANCE * scale).all(), name
        # The mean of float32 losses, rounded once more: 6e-8 of it each time.
        tolerance = TOLERANCE * largest + (TOLERANCE + 2e-8) * exact_loss.abs().nan_to_num(0, 0)
        assert excess(loss, exact_loss, exact_loss) <= tolerance, name

        assert not bits(grad[~kept]).any(), name  # +0.0 whatever the row holds
        if normalizer != 0:
            factor = float(abs(case.upstream) * weight.max() / normalizer) if k else 0.0
            assert (excess(grad, exact_grad, exact_grad.to(grad.dtype)) <= (TOLERANCE + 1e-7) * factor).all(), name


COLUMNS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 127, 129, 255, 257, 511, 513, 1023, 1025, 2047, 2049]
COLUMNS += [4095, 4096, 4097, 4113, 5000]
SPECIAL = {
    "nan": lambda row, label: row.index_fill_(0, (label + 1) % len(row), math.nan),
    "+inf": lambda row, label: row.index_fill_(0, (label + 2) % len(row), math.inf),
    "-inf at the target": lambda row, label: row.index_fill_(0, label, -math.inf),
    "-inf elsewhere": lambda row, label: row.index_fill_(0, (label + 1) % len(row), -math.inf),
    "-inf but the target": lambda row, label: row.copy_(row.new_full((len(row),), -math.inf).index_fill_(0, label, 1)),
    "-inf": lambda row, label: row.fill_(-math.inf),
    "zeros": lambda row, label: row.zero_(),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    classes = draw(st.sampled_from(COLUMNS))
    rows = min(draw(st.sampled_from([0, 1, 2, 3, 5, 16, 33])), 1 + 20_000 // max(classes, 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    distinct = max(1, rows // draw(st.sampled_from([1, 1, 4])))  # rows tie with their copies
    logits = torch.randn(distinct, classes, generator=generator) * draw(st.sampled_from([0.01, 1.0, 10.0, 100.0]))
    logits += draw(st.sampled_from([0.0, 0.0, 1e4, -1e4]))
    target = torch.randint(max(classes, 1), (distinct,), generator=generator)
    special = draw(st.lists(st.sampled_from(sorted(SPECIAL)), max_size=min(distinct, 3 * (classes > 0))))
    for row, kind in enumerate(special):
        SPECIAL[kind](logits[row], target[row])
    copy = torch.randint(distinct, (rows,), generator=generator)
    logits, target = logits[copy].to(draw(st.sampled_from(DTYPES))), target[copy]
    ignore_index = draw(st.sampled_from([-100, 0, -1, 2**40]))
    ignored = draw(st.sampled_from([0.0, 0.3, 1.0])) if classes else 1.0
    target[torch.rand(rows, generator=generator) < ignored] = ignore_index
    weight = None
    if classes and draw(st.booleans()):
        weight = torch.randint(1 - draw(st.booleans()), 25, (classes,), generator=generator) / 8  # exact in bfloat16
    keep = draw(st.one_of(st.sampled_from([1e-9, 0.5, 1.0]), st.floats(0, 1, exclude_min=True)))
    return Case(
        LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](logits),
        target,
        torch.tensor(keep, dtype=torch.float64) if draw(st.booleans()) else keep,
        ignore_index,
        draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        weight,
        draw(st.sampled_from([1.0, -0.37])),
    )


@settings(max_examples=75 if kernel_backend.chosen == "host" else 250)
@given(case=cases())
def test_drawn_batches(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["random", "one apart"])
def test_no_element_is_further_from_exact_than_torch(
    instruction_set: str, kind: str, smoothing: float, dtype: torch.dtype
) -> None:
    logits, target = 3 * torch.randn(300, 257), torch.randint(257, (300,))
    if kind == "one apart":  # all exponentials of a row err alike, and nothing averages out
        logits = torch.linspace(-7, 0, 300)[:, None].expand(300, 257).index_fill(1, torch.tensor(5), 0.0)
        target[::2] = 5
    case = Case(logits.to(dtype), target, 0.5, label_smoothing=smoothing)
    _, losses, _, kept, normalizer = forward(case)
    case.upstream = normalizer.item()  # every row's gradient is that of its own loss
    exact_losses, _, exact_grad = case.oracle(kept)
    own_losses = F.cross_entropy(case.logits, target, reduction="none", label_smoothing=smoothing)
    leaf = case.logits.clone().requires_grad_()
    F.cross_entropy(leaf[kept], target[kept], reduction="sum", label_smoothing=smoothing).backward()
    assert (excess(losses, exact_losses, own_losses) <= TOLERANCE * exact_losses.clamp(min=1)).all()
    assert excess(gradient(case), exact_grad, leaf.grad).max() <= TOLERANCE


# --- blocks of 4096 columns and their remainders ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [5000, 8192, 40_001])
def test_blocks(classes: int, dtype: torch.dtype) -> None:
    late = classes - 2  # in the last block; where classes is odd, in the remainder behind the last vector
    base = torch.randn(classes)
    rows, target = [base] * 9, torch.randint(classes, (9,))
    rows[1] = base.index_fill(0, torch.arange(4096), -math.inf)
    rows[2] = base.index_fill(0, torch.arange(late), -math.inf)
    rows[3] = base.index_fill(0, torch.tensor(late), 60.0)
    rows[4] = base.index_fill(0, torch.tensor(classes - 1), math.nan)
    rows[5] = base.index_fill(0, torch.tensor([0, classes - 1]), math.inf)
    rows[6] = torch.linspace(-90, 90, classes)  # every block has a higher maximum than all before it
    rows[7] = torch.linspace(90, -90, classes)
    target[2], target[3] = classes - 1, 0
    logits = torch.stack(rows).to(dtype)
    for keep in (1.0, 0.3):
        check(Case(column_slice(logits), target, keep, upstream=0.5))
    check(Case(logits[[0, 3, 6, 7]], target[[0, 3, 6, 7]], 0.5, label_smoothing=0.1))


@pytest.mark.parametrize("dtype", FEWER_DTYPES, ids=str)
def test_more_rows_than_one_block_of_a_gpu_selects_from(dtype: torch.dtype) -> None:
    copy = torch.randint(64, (20_011,))  # so that the threshold splits a tie, across what blocks have
    logits, target = (2 * torch.randn(64, 7)).to(dtype)[copy], torch.randint(7, (64,))[copy]
    target[torch.rand(len(copy)) < 0.1] = -100
    check(Case(logits, target, 0.3))
    check(Case(logits, target, torch.tensor(0.7, dtype=torch.float64), class_weight=torch.arange(1, 8) / 4))
    check(Case(logits[:, :3], target % 3, 1.0, ignore_index=1))
    check(Case(logits, torch.full_like(target, -100)))


# What a GPU counts, holds in registers where the last block selects, and holds in a block of a launch of its own.
@pytest.mark.parametrize(("rows", "classes"), [(256, 64), (1500, 16), (3000, 5)])
@pytest.mark.parametrize("dtype", FEWER_DTYPES, ids=str)
def test_narrow_rows(rows: int, classes: int, dtype: torch.dtype) -> None:
    copy = torch.randint(64, (rows,))
    logits, target = (2 * torch.randn(64, classes)).to(dtype)[copy], torch.randint(classes, (64,))[copy]
    target[torch.rand(rows) < 0.1] = -100
    check(Case(logits, target, 0.3, class_weight=torch.randint(1, 25, (classes,)) / 8))
    check(Case(column_slice(logits), target, 0.02, label_smoothing=0.1))


def test_a_shift_of_all_logits_changes_no_bit(instruction_set: str) -> None:
    # Multiples of 1/64 stay exact at 1e4, so that nothing but the shift differs.
    logits = (torch.randn(40, 333) * 5 * 64).round() / 64
    target = torch.randint(333, (40,))
    shift = torch.tensor([0.0, 1e4, -1e4, 1.0])[torch.arange(40) % 4][:, None]
    plain, shifted = Case(logits, target, 0.5), Case(logits + shift, target, 0.5)
    _, losses, lse, kept, _ = forward(plain)
    _, shifted_losses, shifted_lse, shifted_kept, _ = forward(shifted)
    assert torch.equal(losses, shifted_losses)
    assert torch.equal(kept, shifted_kept)
    assert torch.equal(shifted_lse - lse, torch.cat([shift, torch.zeros(40, 1)], dim=1))
    assert torch.equal(gradient(plain), gradient(shifted))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_rows_tie_wherever_they_lie(instruction_set: str, dtype: torch.dtype) -> None:
    # Rows of odd length start at every alignment; a sum whose order depended on it would break ties at random.
    for classes in (67, 1000, 1003) if kernel_backend.chosen == "host" else (7, 67, 1000, 1003, 4099):
        row = (4 * torch.randn(1, classes)).to(dtype)
        case = Case(row.repeat(37, 1), torch.full((37,), classes // 2), 0.5, label_smoothing=0.1)
        _, losses, lse, kept, _ = forward(case)
        assert (losses == losses[0]).all()
        assert (lse == lse[0]).all()
        assert torch.equal(kept, torch.arange(37) < 18)
        grad = gradient(case)
        assert (grad[:18] == grad[0]).all()
        for name, layout in LAYOUTS.items():
            moved = Case(layout(case.logits), case.target, 0.5, label_smoothing=0.1)
            moved_losses, moved_grad = forward(moved)[1], gradient(moved)
            narrow = kernel_backend.chosen and moved.logits[0].nbytes <= 256 and not moved.logits.is_contiguous()
            shifted = (
                kernel_backend.chosen and name == "column slice" and classes % 8 == 0
            )  # contiguous rows are all aligned
            # Another kernel, or another order: rows tie as well, and differ in their last bit.
            if name == "transposed" or narrow or shifted:
                assert (moved_losses == moved_losses[0]).all()
                assert (moved_grad[:18] == moved_grad[0]).all()
                torch.testing.assert_close(moved_losses, losses, rtol=1e-6, atol=0)
                torch.testing.assert_close(moved_grad, grad)
                continue
            assert torch.equal(moved_losses, losses)
            assert torch.equal(moved_grad, grad)


# --- threads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_and_threads_change_no_bit(instruction_set: str, dtype: torch.dtype) -> None:
    # 157 rows of 1003: a thread takes 32 of them, so that two threads share the rows.
    logits = torch.randn(157, 1003).to(dtype)
    logits[3, 5], logits[150, 1000] = math.nan, math.inf
    case = Case(logits, torch.randint(1003, (157,)), 0.4, label_smoothing=0.1, class_weight=torch.rand(1003))
    first: list[Tensor] = []
    for threads in (1, 2):
        with on_threads(threads):
            for _ in range(REPEATS):
                results = [bits(x) for x in (*forward(case), gradient(case))]
                first = first or results
                assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


# --- autograd and memory ---------------------------------------------------------------------------------------


def test_keep_tensor_changed_before_backward() -> None:
    # The gradient is that of the rows that the forward pass kept.
    leaf, target = torch.randn(20, 5, requires_grad=True), torch.randint(5, (20,))
    keep = torch.tensor(0.25, dtype=torch.float64)
    loss = batchkern.trimmed_cross_entropy(leaf, target, keep)
    keep.fill_(1.0)
    loss.backward()
    assert torch.equal(leaf.grad, gradient(Case(leaf, target, 0.25)))
    assert batchkern.trimmed_cross_entropy(leaf, target, keep) == batchkern.trimmed_cross_entropy(leaf, target, 1.0)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_penalty_on_the_gradient_raises(inplace: bool) -> None:
    # The upstream gradient is a constant here, which torch's own once_differentiable lets pass without a word.
    leaf, target = torch.randn(20, 5, requires_grad=True), torch.randint(5, (20,))
    loss = batchkern.trimmed_cross_entropy(leaf * 1, target, 0.5, inplace_backward=inplace)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        (loss + grad.square().sum()).backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_gradient_is_the_same_bit_for_bit(instruction_set: str, dtype: torch.dtype) -> None:
    logits, target = (3 * torch.randn(40, 131)).to(dtype), torch.randint(131, (40,))
    logits[7, 3], logits[8, 4] = math.nan, -math.inf
    for weight in (None, torch.rand(131)):
        for layout in ("contiguous", "column slice", "transposed"):
            case = Case(LAYOUTS[layout](logits), target, 0.4, label_smoothing=0.1, class_weight=weight)
            _, _, lse, kept, normalizer = forward(case)
            options = {"class_weight": weight, "label_smoothing": 0.1}
            over = LAYOUTS[layout](logits.clone())
            saved = target, lse, kept, normalizer
            OPS.trimmed_cross_entropy_backward_(torch.tensor(1.0), over, *saved, **options)
            assert torch.equal(bits(over), bits(gradient(case)))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Gradients above 32 MiB are calloc'ed pages, of which dropped rows are never touched.
@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_gradient(instruction_set: str, dtype: torch.dtype) -> None:
    rows, classes = 2051, 4099 * 4 // dtype.itemsize
    logits = torch.randn(rows, 1, dtype=dtype) + torch.linspace(-4, 4, classes, dtype=dtype)
    logits[::100] = math.nan  # kept, and too many to keep all
    target = torch.randint(classes, (rows,))
    assert logits.nbytes > 2**25
    _, _, lse, kept, normalizer = OPS.trimmed_cross_entropy(logits, target, 0.008)
    assert kept.sum() == 16

    def backward(where: slice | Tensor) -> Tensor:
        saved = target[where], lse[where], kept[where], normalizer
        return OPS.trimmed_cross_entropy_backward(torch.tensor(2.0), logits[where], *saved)

    # What came before in this memory must not show in the zeros.
    del_me = torch.full((rows, classes), math.nan, dtype=dtype)
    del del_me
    grad = backward(slice(None))
    assert grad.is_contiguous()
    assert grad.data_ptr() % 64 == 0
    assert not bits(grad[~kept]).any()
    # The same rows by themselves are a small gradient, in ordinary memory.
    assert torch.equal(bits(grad[kept]), bits(backward(kept)))
    kept_ones = grad.clone()[kept]
    grad.add_(1)
    assert (grad[~kept] == 1).all()
    assert torch.equal(bits(grad[kept]), bits(kept_ones + 1))
    file = io.BytesIO()
    torch.save(grad[:3], file)  # of a view the whole storage is saved
    file.seek(0)
    assert torch.equal(bits(torch.load(file, weights_only=True)), bits(grad[:3]))


@pytest.mark.cpu
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_large_gradients_are_freed_and_their_dropped_rows_take_no_memory() -> None:
    logits, target = torch.randn(1025, 8200), torch.randint(8200, (1025,))
    _, _, lse, kept, normalizer = OPS.trimmed_cross_entropy(logits, target, 0.05)
    saved = torch.tensor(1.0), logits, target, lse, kept, normalizer
    OPS.trimmed_cross_entropy_backward(*saved)
    before = resident_bytes()
    grad = OPS.trimmed_cross_entropy_backward(*saved)
    # A twentieth of 32 MiB was written. Huge pages may round it up, to no more than what is mapped.
    assert resident_bytes() - before < (grad.nbytes if huge_pages_always() else grad.nbytes // 2)
    assert grad[kept].any()
    for _ in range(50):
        del grad
        grad = OPS.trimmed_cross_entropy_backward(*saved).add_(1)  # touches every page
    assert resident_bytes() - before < 2.5 * grad.nbytes


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_pages_always() -> bool:
    return HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text()


def asks_for_huge_pages(x: Tensor) -> bool:
    """Whether the middle of its memory was marked with ``MADV_HUGEPAGE``."""
    address, inside = x.data_ptr() + x.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            inside = begin <= address < end
        elif inside and line.startswith("VmFlags:"):
            return " hg" in line
    raise AssertionError("not mapped")


def large_gradient(rows: int, keep: float) -> Tensor:
    leaf = torch.randn(rows, 8200, requires_grad=True)
    batchkern.trimmed_cross_entropy(leaf, torch.randint(8200, (rows,)), keep).backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.cpu
@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="needs a Linux kernel with huge pages")
@pytest.mark.parametrize(("keep", "asked"), [(0.05, False), (0.2, True)])
def test_large_gradients_are_in_huge_pages_where_enough_is_written(keep: float, asked: bool) -> None:
    assert asks_for_huge_pages(large_gradient(1025, keep)) == asked


@pytest.mark.cpu
def test_the_memory_of_a_large_gradient_is_used_again() -> None:
    first = large_gradient(1026, 0.5)
    other = large_gradient(1026, 0.5)
    assert first.data_ptr() != other.data_ptr()
    place = first.data_ptr()
    first.fill_(math.nan)
    del first
    again = large_gradient(1030, 0.5)
    assert again.data_ptr() == place
    assert again.isfinite().all()
    assert (again == 0).all(1).sum() == 515  # dropped rows
    del again
    larger = large_gradient(1500, 0.5)  # does not fit
    assert (larger != 0).any(1).sum() == 750
    assert larger.isfinite().all()
    assert (other == 0).all(1).sum() == 513


# --- the raw operators -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"class_weight": WEIGHT, "label_smoothing": 0.1}, {"keep_tensor": torch.tensor(0.3).double()}],
    ids=lambda options: "+".join(options) or "plain",
)
def test_opcheck(options: dict[str, Any], dtype: torch.dtype) -> None:
    logits, target = torch.randn(9, 5).to(dtype), torch.tensor([0, 1, 2, -100, 4, 3, 2, 1, 0])
    arguments = (column_slice(logits), target, 0.6)
    torch.library.opcheck(OPS.trimmed_cross_entropy.default, arguments, options)
    _, _, lse, kept, normalizer = OPS.trimmed_cross_entropy(*arguments, **options)
    options = {name: value for name, value in options.items() if name != "keep_tensor"}
    saved = target, lse, kept, normalizer
    grad = torch.tensor(1.5)
    torch.library.opcheck(OPS.trimmed_cross_entropy_backward.default, (grad, column_slice(logits), *saved), options)
    torch.library.opcheck(OPS.trimmed_cross_entropy_backward_.default, (grad, logits, *saved), options)


LOGITS, TARGET = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": LOGITS.double()}, TypeError, "logits must be float32, bfloat16 or float16, got Double"),
        ({"logits": LOGITS[0]}, ValueError, r"target must be integers \[\] or probabilities \[3\], got Long \[4\]"),
        ({"logits": LOGITS[0, 0]}, ValueError, r"logits must be \(C,\) or \(B, C, ...\), got \[\]"),
        ({"target": TARGET[:3]}, ValueError, r"target must be integers \[4\] or .* \[4, 3\], got Long \[3\]"),
        ({"target": TARGET.bool()}, TypeError, "target must hold integers or probabilities, got Bool"),
        ({"target": torch.zeros(4, 3).half()}, TypeError, "must be float32 or of the logits' type, got Half"),
        ({"class_weight": torch.ones(4)}, ValueError, r"class_weight must be \(3,\), got \[4\]"),
        ({"keep": 0.0}, ValueError, r"keep must be in \(0, 1\], got 0"),
        ({"keep": math.nan}, ValueError, r"keep must be in \(0, 1\], got nan"),
        pytest.param(
            {"keep_tensor": torch.tensor(1.5).double()},
            ValueError,
            r"keep must be in \(0, 1\], got 1.5",
            marks=pytest.mark.cpu,
        ),
        ({"keep_tensor": torch.ones(2).double()}, ValueError, "keep_tensor must be 0-dim float64"),
        pytest.param(
            {"target": torch.tensor([0, 2, 3, 9])},
            ValueError,
            r"target\[2\] is 3; it must be in \[0, 3\)",
            marks=pytest.mark.cpu,
        ),
        pytest.param(
            {"target": torch.tensor([0, 2, 1, -1])},
            ValueError,
            r"target\[3\] is -1;.*ignore_index \(-100\)",
            marks=pytest.mark.cpu,
        ),
        pytest.param(
            {"target": torch.tensor([2**63 - 1, -(2**63), 0, 0])},
            ValueError,
            r"target\[0\] is 9223372036854775807;",
            marks=pytest.mark.cpu,
        ),
        pytest.param(
            {"target": torch.tensor([0, -(2**63), 0, 0])},
            ValueError,
            r"target\[1\] is -9223372036854775808;",
            marks=pytest.mark.cpu,
        ),
        pytest.param(
            {"logits": torch.empty(4, 0)},
            ValueError,
            r"target\[0\] is 0; it must be in \[0, 0\)",
            marks=pytest.mark.cpu,
        ),
    ],
)
def test_forward_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OPS.trimmed_cross_entropy(**{"logits": LOGITS, "target": TARGET, "keep": 0.5, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": LOGITS.double()}, TypeError, "logits must be float32"),
        ({"target": TARGET[:3]}, ValueError, "target must be integers"),
        ({"lse": torch.zeros(4)}, ValueError, r"lse must be contiguous float32 \(4, 2\)"),
        ({"lse": torch.zeros(4, 2).double()}, ValueError, "lse must be"),
        ({"lse": torch.zeros(2, 4).t()}, ValueError, "lse must be"),
        ({"kept": torch.ones(3).bool()}, ValueError, r"kept must be contiguous bool \(4,\)"),
        ({"kept": torch.ones(4)}, ValueError, "kept must be"),
        ({"kept": torch.ones(8).bool()[::2]}, ValueError, "kept must be"),
        ({"class_weight": torch.ones(4)}, ValueError, "class_weight must be"),
        pytest.param({"target": torch.tensor([0, 3, 2, 0])}, ValueError, r"target\[1\] is 3", marks=CPU),
        pytest.param(
            {"target": torch.tensor([0, 1, 1 << 40, 0])},
            ValueError,
            r"target\[2\] is 1099511627776",
            marks=pytest.mark.cpu,
        ),
        pytest.param({"target": torch.tensor([-1, 1, 2, 0])}, ValueError, r"target\[0\] is -1", marks=CPU),
        ({"grad": torch.ones(4)}, RuntimeError, "4 elements"),
        ({"normalizer": torch.ones(4)}, RuntimeError, "4 elements"),
    ],
)
def test_backward_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    lse, kept, one = torch.zeros(4, 2), torch.ones(4).bool(), torch.tensor(1.0)
    usual = {"grad": one, "target": TARGET, "lse": lse, "kept": kept, "normalizer": one}
    for op in (OPS.trimmed_cross_entropy_backward, OPS.trimmed_cross_entropy_backward_):
        with pytest.raises(error, match=message):
            op(**{"logits": LOGITS.clone(), **usual, **arguments})


@pytest.mark.cpu
def test_a_wrong_target_far_down_a_large_batch_is_named(instruction_set: str) -> None:
    target = torch.randint(10, (100_000,))
    target[99_999] = 10
    with pytest.raises(ValueError, match=r"target\[99999\] is 10; it must be in \[0, 10\)"):
        batchkern.trimmed_cross_entropy(torch.randn(100_000, 10), target, 0.5)


WRONG_TARGET = """
import sys
sys.path.insert(0, {tests!r})
import kernel_backend
kernel_backend.start("host")
import torch, batchkern
target = torch.zeros(100, dtype=torch.int64)
target[57] = {value}
batchkern.trimmed_cross_entropy(torch.randn(100, 10), target, 1.0)
"""


@pytest.mark.skipif(kernel_backend.chosen != "host", reason="an assert of the CUDA kernels: needs --kernels host")
@pytest.mark.parametrize("value", [10, -1, 2**40, -(2**63)])
def test_a_wrong_target_trips_the_assert_of_the_kernel(value: int) -> None:
    program = WRONG_TARGET.format(tests=str(Path(__file__).parents[1]), value=value)
    run = warm.run("-c", program)
    assert run.returncode != 0
    assert "target must be in [0, C) or ignore_index" in run.stderr
