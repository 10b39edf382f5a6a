"""The kernels of cross_entropy with every instruction set: layouts, types, targets against float64, raw operators."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import kernel_backend
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, INSTRUCTION_SETS, REPEATS, TOLERANCE, bits, excess, on_threads, with_instruction_set
from torch import Tensor

OPS = torch.ops.batchkern


@dataclass
class Case:
    logits: Tensor
    target: Tensor
    upstream: Tensor
    upstream_lse: Tensor
    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0

    def run(self) -> tuple[Tensor, ...]:
        """Losses, states, entropies, whether predictions are right, and the gradient."""
        options = (self.weight, self.ignore_index, self.label_smoothing)
        losses, lse, entropy, correct = OPS.cross_entropy(self.logits, self.target, *options, True)
        saved = (self.logits, self.target, lse, *options)
        return losses, lse, entropy, correct, OPS.cross_entropy_backward(self.upstream, self.upstream_lse, *saved)

    def oracle(self) -> tuple[Tensor, ...]:
        """The same in float64, by PyTorch, with rows that no gradient reaches left out of the differentiation."""
        soft = self.target.is_floating_point()
        valid = torch.ones_like(self.upstream, dtype=torch.bool) if soft else self.target.long() != self.ignore_index
        live = valid & ((self.upstream != 0) | (self.upstream_lse != 0))
        weight = None if self.weight is None else self.weight.double()

        def rows(z: Tensor) -> tuple[Tensor, Tensor]:
            loss = F.cross_entropy(
                z,
                self.target.double() if soft else self.target.long(),
                weight,
                ignore_index=self.ignore_index,
                reduction="none",
                label_smoothing=self.label_smoothing,
            )
            lse = z.logsumexp(1)
            return loss, torch.where(lse == math.inf, math.nan, lse)

        z = self.logits.double()
        loss, lse = (torch.where(valid, x, 0) for x in rows(z))
        p = z.softmax(1)
        entropy = torch.where(valid, -torch.where(p == 0, 0, p * z.log_softmax(1)).sum(1), 0)
        label = self.target.float().argmax(1) if soft else self.target.long()
        correct = (z.argmax(1) == label) & valid & ~lse.isnan()
        leaf = torch.where(live.unsqueeze(1), z, 0).requires_grad_()
        some, others = rows(leaf)
        total = torch.where(live, some, 0) * self.upstream + torch.where(live, others, 0) * self.upstream_lse
        (grad,) = torch.autograd.grad(total.sum(), leaf)
        return loss, lse, entropy, correct, torch.where(live.unsqueeze(1), grad, 0)


def check(case: Case) -> None:
    loss, lse, entropy, correct, grad = case.oracle()
    largest = 1.0 if case.weight is None else max(1.0, float(case.weight.max()))
    sums = 1.0
    if case.target.is_floating_point() and case.target.numel():
        sums = max(1.0, float(case.target.double().sum(1).max()))
    scale = largest * sums
    for name in INSTRUCTION_SETS:
        with with_instruction_set(name):
            losses, state, entropies, are_correct, ours = case.run()
        bound = TOLERANCE * loss.abs().nan_to_num(0, 0, 0).clamp(min=scale)
        # Probabilities are smoothed and weighted in float32: another half of a unit of each.
        if case.target.is_floating_point():
            bound = 3 * bound
        assert (excess(losses, loss, loss.float()) <= bound).all(), name
        both = state[..., 0].double() + state[..., 1].double()
        assert (excess(both, lse, lse.float()) <= TOLERANCE * lse.abs().nan_to_num(0, 0, 0).clamp(min=1)).all(), name
        size = math.log(max(case.logits.shape[1], 2))
        assert (excess(entropies, entropy, entropy.float()) <= 10 * TOLERANCE * size).all(), name
        assert torch.equal(are_correct, correct), name
        assert ours.stride() == torch.empty_like(case.logits).stride(), name
        factor = float((case.upstream.abs() * scale + case.upstream_lse.abs()).max()) if case.upstream.numel() else 0.0
        assert (excess(ours, grad, grad.to(ours.dtype)) <= (3 * TOLERANCE + 2e-7) * factor).all(), name
        dead = ~((case.upstream != 0) | (case.upstream_lse != 0))
        assert not bits(ours.movedim(1, -1)[dead].contiguous()).any(), name


LAYOUTS: dict[str, Any] = {
    "channels first": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "cropped": lambda x: F.pad(x, (1, 2), value=77.0)[..., 1:-2] if x.dim() > 2 else F.pad(x, (1, 2))[:, 1:-2],
    "shifted": lambda x: (
        F.pad(x.movedim(1, -1), (0, 0, 1, 2), value=77.0)[..., 1:-2, :].contiguous().movedim(-1, 1)
        if x.dim() == 2
        else F.pad(x.movedim(1, -1), (0, 0, 1, 2), value=77.0)[..., 1:-2, :].movedim(-1, 1)
    ),
    "samples last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "some of the classes": lambda x: torch.cat([x, torch.full_like(x, 77.0)], dim=1)[:, : x.shape[1]],
    "every other sample": lambda x: x.repeat_interleave(2, dim=0)[::2],
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    small = kernel_backend.chosen is not None
    classes = draw(st.sampled_from([1, 2, 5, 19, 63, 64, 65, 150, *([] if small else [700])]))
    room = (2_000 if small else 20_000) // classes
    samples = draw(st.sampled_from([0, 1, 2, 3, min(70, room)]))
    spatial = draw(st.sampled_from([(), (1,), (7,), (64,), (5, 13), (3, 2, 2), (130,)]))
    if samples * math.prod(spatial) > room:
        spatial = ()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    rows, shape = (samples, *spatial), (samples, classes, *spatial)
    logits = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.01, 1.0, 10.0, 100.0]))
    logits += draw(st.sampled_from([0.0, 0.0, 1e3, -1e3]))
    # Where each block of classes has a higher maximum than those before it.
    logits += draw(st.sampled_from([0.0, 1.0])) * torch.linspace(0, 40, classes).view(-1, *[1] * len(spatial))
    dtype = draw(st.sampled_from(DTYPES))
    logits = logits.to(dtype)
    ignore_index, kind = -100, draw(st.sampled_from(["int64", "uint8", "int32", "uint16", "float32", "logits' type"]))
    soft = kind in ("float32", "logits' type")
    if soft:
        target = torch.rand(shape, generator=generator).pow(draw(st.sampled_from([1, 20])))
        target = target.to(dtype if kind == "logits' type" else torch.float32)
    else:
        # uint8 holds 255 at most, and it is the one that is ignored.
        target = torch.randint(min(classes, 255), rows, generator=generator)
        ignore_index = 255 if kind == "uint8" else draw(st.sampled_from([-100, 0, 255]))
        if ignore_index >= 0 or kind in ("int64", "int32"):
            target[torch.rand(rows, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = ignore_index
        target = target.to(getattr(torch, kind))
    dead = torch.rand(rows, generator=generator) < draw(st.sampled_from([0.0, 0.4, 0.8, 1.0]))
    upstream, upstream_lse = (torch.randn(rows, generator=generator) for _ in range(2))
    upstream, upstream_lse = upstream.masked_fill(dead, 0), upstream_lse.masked_fill(dead, 0)
    if draw(st.booleans()):
        upstream_lse = torch.zeros_like(upstream_lse)
    if samples and draw(st.booleans()):
        special = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        logits.view(samples, classes, -1)[0, classes // 2, ::3] = special
        if soft:  # zero times an infinite logit is NaN, in float64 too
            target.view(samples, classes, -1)[0, classes // 2, ::3] = 0.25
    weight = None
    if draw(st.booleans()):
        weight = torch.randint(1, 25, (classes,), generator=generator) / 8
    layout = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    return Case(
        layout(logits),
        LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](target) if soft else target,
        upstream,
        upstream_lse,
        weight,
        ignore_index,
        draw(st.sampled_from([0.0, 0.0, 0.1])),
    )


@settings(max_examples=60 if kernel_backend.chosen else 250)
@given(case=cases())
def test_drawn_batches(case: Case) -> None:
    check(case)


def image(dtype: torch.dtype = torch.float32) -> Case:
    """More than one tile, more than one block of classes, and some rows of each tile alone with a gradient."""
    target = torch.randint(70, (3, 9, 11))
    target[torch.rand(3, 9, 11) < 0.2] = -100
    upstream = torch.randn(3, 9, 11) * (torch.rand(3, 9, 11) < 0.3)
    upstream[2] = torch.randn(9, 11)
    return Case((3 * torch.randn(3, 70, 9, 11)).to(dtype), target, upstream, torch.zeros(3, 9, 11), torch.rand(70))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_repeats_and_threads_change_no_bit(layout: torch.memory_format, dtype: torch.dtype) -> None:
    case = image(dtype)
    case.logits = case.logits.contiguous(memory_format=layout)
    check(case)
    for instruction_set in INSTRUCTION_SETS:
        with with_instruction_set(instruction_set):
            first: list[Tensor] = []
            for threads in (1, 2):
                with on_threads(threads):
                    for _ in range(REPEATS):
                        results = [bits(x.contiguous()) for x in case.run()]
                        first = first or results
                        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_an_expanded_upstream_gradient_is_one_number() -> None:
    case = image()
    for value in (0.5, 0.0):
        case.upstream = torch.full((3, 9, 11), value)
        whole = case.run()[-1]
        case.upstream = torch.tensor(value).expand(3, 9, 11)
        assert torch.equal(case.run()[-1], whole)
        assert whole.any() == (value != 0)


def test_more_pixels_than_a_block_of_a_gpu_selects_from() -> None:
    logits, target = torch.randn(2, 3, 100, 110), torch.randint(3, (2, 100, 110))
    soft = torch.rand(2, 3, 100, 110).softmax(1)
    for aim in (target, soft):
        losses = OPS.cross_entropy(logits, aim)[0]
        loss, fused, _, kept, normalizer = OPS.trimmed_cross_entropy(logits, aim, 0.3)
        assert torch.equal(fused, losses)
        mean, expected, _ = OPS.trimmed_mean(losses.flatten(), 0.3)
        assert torch.equal(kept.flatten(), expected)
        assert normalizer == 6600
        torch.testing.assert_close(loss, mean, rtol=1e-6, atol=0)


# --- the raw operators -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("stats", [False, True])
def test_opcheck(stats: bool, soft: bool) -> None:
    logits = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    target = torch.rand(2, 5, 3, 4) if soft else torch.randint(5, (2, 3, 4), dtype=torch.uint8)
    options = (torch.rand(5), -100, 0.1)
    torch.library.opcheck(OPS.cross_entropy.default, (logits, target, *options, stats))
    state = OPS.cross_entropy(logits, target, *options, stats)[1]
    upstream = torch.randn(2, 3, 4)
    for grads in ((upstream, None), (None, upstream)):
        torch.library.opcheck(OPS.cross_entropy_backward.default, (*grads, logits, target, state, *options))
    torch.library.opcheck(OPS.trimmed_cross_entropy.default, (logits, target, 0.5, None, *options))
    _, _, *saved = OPS.trimmed_cross_entropy(logits, target, 0.5, None, *options)
    backward = (torch.tensor(1.5), logits, target, *saved, options[0], 0.1)
    torch.library.opcheck(OPS.trimmed_cross_entropy_backward.default, backward)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": torch.zeros(4, 3).double()}, TypeError, "logits must be float32"),
        ({"target": torch.zeros(4, 2)}, ValueError, r"target must be integers \[4\] or probabilities \[4, 3\]"),
        ({"target": torch.zeros(4, 3).double()}, TypeError, "target must be float32, bfloat16 or float16"),
        ({"target": torch.zeros(4, 3).half()}, TypeError, "must be float32 or of the logits' type"),
        ({"lse": torch.zeros(4, 3)}, ValueError, r"lse must be contiguous float32 \(4, 2\)"),
        ({"lse": torch.zeros(2, 4).t()}, ValueError, "lse must be contiguous"),
        ({"grad_losses": torch.zeros(3)}, ValueError, "grad_losses must have 4 elements"),
        ({"grad_lse": torch.zeros(5)}, ValueError, "grad_lse must have 4 elements"),
        ({"class_weight": torch.zeros(4)}, ValueError, "class_weight must be"),
    ],
)
def test_backward_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    usual = {
        "grad_losses": torch.zeros(4),
        "grad_lse": None,
        "logits": torch.zeros(4, 3),
        "target": torch.zeros(4, dtype=torch.int32),
        "lse": torch.zeros(4, 2),
    }
    with pytest.raises(error, match=message):
        OPS.cross_entropy_backward(**{**usual, **arguments})
