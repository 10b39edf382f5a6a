"""What only a GPU can show: its own arithmetic, streams, large offsets, the device-side assert, the number of launches.

That the kernels are right is tested by tests/ops, on a GPU too: ``pytest tests/ops --kernels cuda``. Graphs have
test_gpu_graphs.py. Several processes may share a GPU (``-n 8 -m "not large"``), but for the tests that take more than
10 GB.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import HALF_STEP, NEEDS_GPU, NUMBERS, basis_of, batch, launches, layer, linear_step, step
from torch import Tensor

import batchkern
from batchkern import _backend, reference
from batchkern.basis import Basis, apply_basis

pytestmark = NEEDS_GPU

OPS = _backend.OPS
# One shape for each way of sharing rows among threads, and of selecting.
SHAPES = [
    (128, 10),  # eight lanes for a row, one block in all
    (1000, 19),  # rows that begin at every alignment
    (3000, 1000),  # a warp
    (300, 5003),  # a block of 256
    (600, 40_000),  # a block of 512
    (3, 300_001),  # several blocks
    (20_011, 33),  # a selection of its own
]


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_serves_this_device(op: str) -> None:
    status = next(s for s in _backend.status() if (s.op, s.device) == (op, "cuda"))
    assert status.backend == "kernel", status.why
    assert _backend.has_kernel(op, torch.empty(1, device="cuda"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_path(shape: tuple[int, int], dtype: torch.dtype, smoothing: float) -> None:
    check_losses(*batch(*shape, dtype), smoothing)


@pytest.mark.parametrize("shape", [(1000, 19), (1000, 1000), (200, 40_000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_probabilities_too_small_for_a_float(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Below 1.2e-38 the processor's exponential gives 0."""
    logits, target = batch(*shape, dtype)
    logits *= 20
    assert has_too_small(logits)
    check_losses(logits, target, 0.0)


def has_too_small(logits: Tensor) -> bool:
    """Whether most rows have such probabilities."""
    return float((F.softmax(logits.double(), 1).amin(1) < 1e-40).double().mean()) > 0.9


def check_losses(logits: Tensor, target: Tensor, smoothing: float) -> None:
    """A trimmed cross entropy at keep .3 against one in float64."""
    loss, losses, grad = step(logits, target, 0.3, label_smoothing=smoothing)
    exact = F.cross_entropy(logits.double(), target, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=1e-6)
    kept, k = reference.select(losses, target != -100, 0.3)
    assert torch.equal(grad.any(1), kept)
    torch.testing.assert_close(loss.double(), losses[kept].double().mean(), rtol=3e-7, atol=0)
    leaf = logits.double().requires_grad_()
    F.cross_entropy(leaf[kept], target[kept], label_smoothing=smoothing).backward()
    assert_gradients_close(grad, leaf.grad, 1e-6 / k)


def assert_gradients_close(grad: Tensor, exact: Tensor, error: float | Tensor) -> None:
    """``error``, and half a step of the type of ``grad``; half a step of float16's smallest numbers is 2^-25."""
    rounding, smallest = HALF_STEP[grad.dtype], 2**-25 if grad.dtype == torch.float16 else 0.0
    assert ((grad - exact).abs() <= error + rounding * exact.abs() + smallest).all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", [(2, 19, 64, 512), (1, 150, 64, 48), (3, 3000, 5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pixels(shape: tuple[int, ...], soft: bool, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(shape, device="cuda")).to(dtype).contiguous(memory_format=memory_format)
    rows = (shape[0], *shape[2:])
    target = torch.randint(min(shape[1], 255), rows, device="cuda", dtype=torch.uint8)
    target[torch.rand(rows, device="cuda") < 0.2] = 255
    options = {} if soft else {"ignore_index": 255}
    if soft:
        target = torch.rand_like(logits, dtype=torch.float32).softmax(1)
    leaf, wide = logits.detach().requires_grad_(), logits.double().requires_grad_()
    found = batchkern.cross_entropy(leaf, target, stats=True, **options)
    exact = reference.cross_entropy(wide, target, **options)
    for ours, theirs in zip(found[:3], exact[:3], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=2e-6)
    assert (found.correct == exact.correct).double().mean() > 0.999  # logits of 16 bits tie
    loss = batchkern.trimmed_mean(found.loss, 0.3, mask=None if soft else target != 255)
    fused = batchkern.trimmed_cross_entropy(leaf, target, 0.3, **options)
    torch.testing.assert_close(loss, fused)
    (grad,), (of_fused,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(fused, leaf)
    assert torch.equal(grad.any(1), of_fused.any(1))
    torch.testing.assert_close(grad, of_fused)
    kept = grad.any(1)
    assert grad.stride() == logits.stride()
    (theirs,) = torch.autograd.grad(torch.where(kept, exact.loss, 0).sum() / kept.sum(), wide)
    assert_gradients_close(grad, theirs, 3e-6 / float(kept.sum()))


@pytest.mark.parametrize("size", [1, 400, 16_384, 16_385, 1_000_000])
@pytest.mark.parametrize("fraction", [1e-3, 0.2, 1.0])
def test_ranks(size: int, fraction: float) -> None:
    losses = torch.randn(size, device="cuda").mul(50).round()
    losses[:: size // 3 + 1] = torch.nan
    indices = batchkern.rank_batches(losses, fraction)
    assert torch.equal(indices.cpu(), batchkern.rank_batches(losses.cpu(), fraction))


@pytest.mark.parametrize("rows", [5000, 70_000])
def test_two_streams_at_once(rows: int) -> None:
    batches = [batch(rows, 300) for _ in range(2)]
    expected = [step(*each, 0.4) for each in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results: list[list[tuple[Tensor, Tensor, Tensor]]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(step(*batches[i], 0.4))
    torch.cuda.synchronize()
    for i in range(2):
        for outputs in results[i]:
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected[i]))


@pytest.mark.parametrize("shape", [(128, 10), (4096, 1000), (300, 40_000), (70_000, 33)], ids=str)
def test_a_hundred_repeats_change_no_bit(shape: tuple[int, int]) -> None:
    logits, target = batch(*shape)
    expected = step(logits, target, 0.4)
    order = batchkern.rank_batches(expected[1], 0.05)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(step(logits, target, 0.4), expected))
        assert torch.equal(batchkern.rank_batches(expected[1], 0.05), order)


@pytest.fixture
def need() -> Iterator[Callable[[float], None]]:
    """Skips a test that needs more free memory, in GB, than there is, and gives back what it took: other processes use
    the GPU."""

    def skip(gigabytes: float) -> None:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 1e9
        if free < gigabytes:
            pytest.skip(f"needs {gigabytes} GB of free memory on the GPU, and {free:.0f} GB are free")

    yield skip
    torch.cuda.empty_cache()


@pytest.mark.large
def test_losses_beyond_32_bits(need: Callable[[float], None]) -> None:
    need(14)  # logits and gradient of 6 GB each
    rows, classes = 30_000, 100_001  # 3 x 10^9 elements
    logits = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(classes, (rows,), device="cuda")
    target[-3:] = logits[-3:].mul_(8).argmin(1)  # the hardest rows are the last ones
    loss, losses, grad = step(logits, target, 3 / rows)
    leaf = logits[-3:].double().requires_grad_()
    exact = F.cross_entropy(leaf, target[-3:], reduction="none")
    torch.testing.assert_close(losses[-3:].double(), exact.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.double(), exact.detach().mean(), rtol=1e-6, atol=0)
    kept = torch.arange(rows, device="cuda") >= rows - 3
    assert torch.equal(grad.any(1), kept)
    assert_gradients_close(grad[-3:], torch.autograd.grad(exact.mean(), leaf)[0], 1e-6 / 3)


@pytest.mark.parametrize(
    ("shape", "most"), [((128, 10), 1), ((4096, 1000), 1), ((3000, 10), 2), ((20_011, 33), 2)], ids=str
)
def test_launches(shape: tuple[int, int], most: int) -> None:
    logits, target = batch(*shape)
    logits.requires_grad_()
    forward = launches(lambda: batchkern.trimmed_cross_entropy(logits, target, 0.3))
    assert len(forward) == most, forward
    loss = batchkern.trimmed_cross_entropy(logits, target, 0.3)
    one = torch.ones((), device="cuda")
    backward = launches(lambda: torch.autograd.grad(loss, logits, one, retain_graph=True))
    assert len(backward) == 1, backward


WRONG_TARGET = """
import torch, batchkern
logits = torch.randn(100, 10, device="cuda")
target = torch.zeros(100, dtype=torch.int64, device="cuda")
target[57] = 10
batchkern.trimmed_cross_entropy(logits, target, 0.5)
torch.cuda.synchronize()
"""


def test_a_wrong_target_trips_an_assert_on_the_device() -> None:
    run = subprocess.run([sys.executable, "-c", WRONG_TARGET], capture_output=True, text=True)
    assert run.returncode != 0
    assert "target must be in [0, C) or ignore_index" in run.stderr
    assert "device-side assert triggered" in run.stderr


# --- linear_trimmed_cross_entropy: cuBLAS and the row kernels ----------------------------------------------------


def error(x: Tensor, exact: Tensor) -> Tensor:
    return (x.double() - exact).square().mean().sqrt()


@pytest.mark.parametrize("shape", [(100, 16, 50), (700, 64, 5003), (1000, 256, 32_000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_rows", [64, None])
@pytest.mark.parametrize("keep", [0.2, 0.9, 1.0])
def test_linear(shape: tuple[int, int, int], dtype: torch.dtype, chunk_rows: int | None, keep: float) -> None:
    hidden, weight, bias, target = layer(*shape, dtype)
    loss, losses, *grads = linear_step(hidden, weight, bias, target, keep, chunk_rows=chunk_rows)
    kept, _ = reference.select(losses, target != -100, keep)
    assert torch.equal(grads[0].any(1), kept)
    torch.testing.assert_close(loss.double(), losses[kept].double().mean(), rtol=3e-7, atol=0)
    steps = []
    for oracle in (torch.float64, dtype):
        leaves = [x.detach().to(oracle).requires_grad_() for x in (hidden, weight, bias)]
        rows = F.cross_entropy(F.linear(*leaves)[kept], target[kept], reduction="none")
        steps.append([rows.detach(), *torch.autograd.grad(1.5 * rows.mean(), leaves)])
    for ours, exact, theirs in zip([losses[kept], *grads], *steps):
        assert error(ours, exact) <= 1.2 * error(theirs, exact) + 1e-6 * exact.abs().max()


def test_linear_under_autocast() -> None:
    hidden, weight, bias, target = layer(600, 64, 3000, torch.float32)
    for keep, chunk_rows in ((0.2, 64), (0.9, 64), (1.0, 64), (0.5, None)):
        with torch.autocast("cuda", torch.bfloat16):
            wide = linear_step(hidden.bfloat16(), weight, bias, target, keep, chunk_rows=chunk_rows)
        narrow = linear_step(*(x.bfloat16() for x in (hidden, weight, bias)), target, keep, chunk_rows=chunk_rows)
        assert [x.dtype for x in wide[2:]] == [torch.bfloat16, torch.float32, torch.float32]
        for ours, theirs in zip(wide, narrow):
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-7, atol=1e-4)


def test_no_linear_step_waits_for_the_device() -> None:
    inputs = layer(500, 32, 2000, torch.bfloat16)
    for keep in (0.2, 0.9, 1.0):
        linear_step(*inputs, keep, chunk_rows=100)
        torch.cuda.set_sync_debug_mode("error")
        try:
            linear_step(*inputs, keep, chunk_rows=100)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cap", [{}, {"softcap": 2.0, "logit_scale": 0.5}], ids=str)
@pytest.mark.parametrize("chunk_rows", [64, None])
def test_losses_of_tokens(cap: dict[str, float], chunk_rows: int | None) -> None:
    hidden, weight, bias, target = layer(700, 64, 5003, torch.float32)
    upstream = torch.randn(700, device="cuda") * (torch.rand(700, device="cuda") < 0.3)
    results = []
    for op, dtype in ((batchkern.linear_cross_entropy, torch.float32), (reference.linear_cross_entropy, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        options = {"chunk_rows": chunk_rows} if dtype == torch.float32 else {}
        rows = op(*leaves[:2], target, bias=leaves[2], stats=True, **cap, **options)
        total = ((rows.loss + 0.1 * rows.lse) * upstream).sum()
        results.append([*rows[:3], *torch.autograd.grad(total, leaves)])
    assert torch.equal(results[0][3].any(1), (upstream != 0) & (target != -100))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


def test_a_promise_spares_the_host_and_may_be_captured() -> None:
    hidden, weight, _, target = layer(500, 32, 2000, torch.bfloat16)
    upstream = torch.zeros(500, device="cuda")
    upstream[:100] = 1
    leaf = hidden.detach().requires_grad_()

    def step() -> Tensor:
        losses = batchkern.linear_cross_entropy(
            leaf, weight, target, reduction="none", chunk_rows=100, backward_rows=120
        )
        return torch.autograd.grad(losses, leaf, upstream)[0]

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.testing.assert_close(captured, expected, rtol=1e-2, atol=1e-4)


def test_all_logits_never_exist() -> None:
    hidden, weight, bias, target = layer(8192, 64, 64_000, torch.bfloat16)  # logits of 1 GB
    for keep in (0.2, 1.0):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        linear_step(hidden, weight, bias, target, keep)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before < 0.7e9


# --- augment_latent and soft_label_kl: kernels in Triton ---------------------------------------------------------


# A dense basis of 20,000 features would take 3 GB in float64, and has nothing that one of 4096 has not.
KINDS = [(kind, width) for kind in ("none", "normalized", "hadamard") for width in (1, 10, 300, 4096)]


@pytest.mark.parametrize(("kind", "width"), [*KINDS, ("none", 20_000), ("hadamard", 20_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_virtual_samples(kind: str, width: int, dtype: torch.dtype) -> None:
    check_virtual_samples(torch.randn(50, width, device="cuda").to(dtype), basis_of(kind, width))


def rows_of(wider: Tensor, width: int, begin: int) -> Tensor:
    """``wider`` cut to some of its columns: a view whose rows are not side by side."""
    return wider[:, begin : begin + width]


# Rows that begin and end at multiples of 16 bytes, and rows that do not: by their width, stride or first element.
VIEWS = [(64, 72, 0), (1000, 1024, 8), (64, 67, 0), (61, 64, 0), (1000, 1016, 1)]


@pytest.mark.parametrize(("width", "stride", "begin"), VIEWS)
@pytest.mark.parametrize("kind", ["none", "normalized", "hadamard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_virtual_samples_of_views(width: int, stride: int, begin: int, kind: str, dtype: torch.dtype) -> None:
    x, grad = (rows_of(torch.randn(n, stride, device="cuda").to(dtype), width, begin) for n in (50, 250))
    check_virtual_samples(x, basis_of(kind, width), grad)


def check_virtual_samples(x: Tensor, basis: Basis | None, grad: Tensor | None = None) -> None:
    seed = torch.tensor(-7).cuda()
    leaf, exact_leaf = x.detach().requires_grad_(), x.double().detach().requires_grad_()
    out = batchkern.augment_latent(leaf, basis=basis, seed=seed, **NUMBERS)
    exact = reference.augment_latent(exact_leaf, seed, basis=basis, **NUMBERS)
    assert ((out - exact).abs() <= 2e-6 + noise_error(basis, x.dtype) + HALF_STEP[x.dtype] * exact.abs()).all()
    begin = (1 + NUMBERS["gaussian"]) * len(x)
    assert torch.equal(out[begin:] == 0, exact[begin:] == 0)  # the masks
    grad = torch.randn_like(out) if grad is None else grad
    (ours,) = torch.autograd.grad(out, leaf, grad)
    (theirs,) = torch.autograd.grad(exact, exact_leaf, grad.double())
    assert ((ours - theirs).abs() <= 4e-6 + HALF_STEP[x.dtype] * theirs.abs()).all()


def noise_error(basis: Basis | None, dtype: torch.dtype) -> float:
    """A dense basis is rounded to the type of x; each of its columns has norm 1."""
    return 0.0 if basis is None else 1e-5 if dtype == torch.float32 else 2 * HALF_STEP[dtype]


@pytest.mark.parametrize("classes", [10, 19, 1000, 5003, 8192, 9001, 32_000, 131_072])
@pytest.mark.parametrize("distance", [1e-3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_divergences(classes: int, distance: float, dtype: torch.dtype) -> None:
    p = 2 * torch.randn(20, classes, device="cuda")
    q = p.repeat(3, 1) + distance * torch.randn(60, classes, device="cuda")
    check_divergences(p.to(dtype), q.to(dtype))


@pytest.mark.parametrize(("width", "stride", "begin"), [*VIEWS, (9008, 9016, 8), (9008, 9008, 0), (9000, 9001, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_divergences_of_views(width: int, stride: int, begin: int, dtype: torch.dtype) -> None:
    p, q = (rows_of(torch.randn(n, stride, device="cuda").to(dtype), width, begin) for n in (20, 60))
    check_divergences(p, q)
    check_divergences(p.contiguous(), q)
    check_divergences(p, q.contiguous())


@pytest.mark.parametrize("classes", [19, 1000, 9001, 32_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_divergences_of_probabilities_too_small_for_a_float(classes: int, dtype: torch.dtype) -> None:
    """Below 1.2e-38 the processor's exponential gives 0: of P, of Q, and of both."""
    p, q = (60 * torch.randn(n, classes, device="cuda") for n in (20, 60))
    assert has_too_small(p)
    assert has_too_small(q)
    # A divergence may come from classes of a probability down to 2^-32 (a smaller one is within 1e-12). Their exponent
    # is off by half a step of 32 (1e-6) and of the difference of logits before it (1e-6), and by 1e-8 of itself.
    check_divergences(p.to(dtype), q.to(dtype), rtol=4e-6)
    # Nearly all of Q is in a class whose P is 0 in float32.
    p = torch.zeros(20, classes, device="cuda")
    p[:, 1:] = -150 - 10 * torch.rand(20, classes - 1, device="cuda")
    q = p.repeat(3, 1)
    q[:, 1] = 3.0
    check_divergences(p.to(dtype), q.to(dtype))


def check_divergences(p: Tensor, q: Tensor, rtol: float = 2e-6) -> None:
    p, q = p.detach().requires_grad_(), q.detach().requires_grad_()
    mean, rows = batchkern.soft_label_kl(p, q, reference_grad=True, per_sample=True)
    exact_p, exact_q = (x.detach().double().requires_grad_() for x in (p, q))
    exact = reference.soft_label_kl(exact_p, exact_q)
    torch.testing.assert_close(rows.double(), exact.detach(), rtol=rtol, atol=1e-12)
    torch.testing.assert_close(mean.double(), exact.detach().mean(), rtol=rtol, atol=1e-12)
    ours = torch.autograd.grad(mean, (p, q))
    theirs = torch.autograd.grad(exact.mean(), (exact_p, exact_q))
    check_gradients(ours, theirs, len(q), exact.detach())


def check_gradients(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], rows: int, kl: Tensor) -> None:
    """Of the mean of ``kl``, by both logits. That of the reference holds the divergence, which may be far above 1."""
    for grad, exact, size in zip(ours, theirs, (max(1.0, float(kl.max())), 1.0)):
        allowed = size * 1e-6 / rows + 2 * HALF_STEP[grad.dtype] * exact.abs() + 2**-25 * (grad.dtype == torch.float16)
        assert ((grad - exact).abs() <= allowed).all()


# --- beyond 2^31 elements: the last rows, whose numbers and offsets have more than 32 bits -------------------------


@pytest.mark.large
@pytest.mark.parametrize(
    ("kind", "copies", "rows", "width"),
    [
        ("none", {"gaussian": 0, "dropout": 1}, 40_000, 30_000),
        ("none", {"gaussian": 1, "dropout": 0}, 40_000, 29_999),  # rows that begin anywhere
        ("hadamard", {"gaussian": 1, "dropout": 0}, 40_000, 30_000),  # in four pieces
        ("hadamard", {"gaussian": 1, "dropout": 0}, 300_000, 4096),
        ("normalized", {"gaussian": 1, "dropout": 0}, 300_000, 4096),
    ],
    ids=str,
)
def test_virtual_samples_beyond_32_bits(
    kind: str, copies: dict[str, int], rows: int, width: int, need: Callable[[float], None]
) -> None:
    need(17)  # x and its gradient of 2.5 GB each, virtual samples and their gradient of 5 GB each
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    numbers, basis, seed = {**NUMBERS, **copies}, basis_of(kind, width), torch.tensor(3).cuda()
    out = batchkern.augment_latent(x, seed=seed, basis=basis, **numbers)
    assert out.numel() > 2**31
    last = torch.arange(2 * rows - 5, 2 * rows, device="cuda")
    exact, kept = x.detach()[-5:].double(), 1.0
    if copies["dropout"]:
        kept = (reference.random_words(last, width, seed) >= round(numbers["drop_prob"] * 2**32)).double()
        exact = exact * kept
    else:
        noise = numbers["sigma"] * reference.random_normals(last, width, seed)
        exact = exact + apply_basis(noise.clamp(-numbers["tau"], numbers["tau"]), basis)
    assert ((out[-5:] - exact).abs() <= 2e-6 + noise_error(basis, x.dtype) + HALF_STEP[x.dtype] * exact.abs()).all()
    weight = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, weight)
    exact = weight[rows - 5 : rows].double() + weight[-5:].double() * kept
    assert ((grad[-5:] - exact).abs() <= 4e-6 + HALF_STEP[x.dtype] * exact.abs()).all()


@pytest.mark.large
@pytest.mark.parametrize(("rows", "classes"), [(272_000, 8000), (272_000, 8001), (21_760, 100_000), (21_760, 100_001)])
def test_divergences_beyond_32_bits(rows: int, classes: int, need: Callable[[float], None]) -> None:
    # Both logits and the gradient of the virtual ones of 4.4 GB each, that of the reference of 8.7 GB in float32 and of
    # 4.4 GB as it is returned: 26 GB.
    need(30)
    p = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16).add_(p).requires_grad_()
    p.requires_grad_()
    mean, kl = batchkern.soft_label_kl(p, q, reference_grad=True, per_sample=True)
    exact_p, exact_q = (x.detach()[-5:].double().requires_grad_() for x in (p, q))
    assert (rows - 5) * classes > 2**31
    exact = reference.soft_label_kl(exact_p, exact_q)
    torch.testing.assert_close(kl[-5:].double(), exact.detach(), rtol=2e-6, atol=0)
    # Of the sum, so that a gradient is as large as beside few rows.
    grads = torch.autograd.grad(mean, (p, q), torch.tensor(float(rows)).cuda())
    theirs = torch.autograd.grad(exact.sum(), (exact_p, exact_q))
    check_gradients(tuple(x[-5:] for x in grads), theirs, 1, exact.detach())


def test_fifty_repeats_of_virtual_samples_change_no_bit() -> None:
    x, basis = torch.randn(100, 1000, device="cuda"), basis_of("hadamard", 1000)

    def everything() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        virtual = batchkern.augment_latent(leaf, basis=basis, seed=3, **NUMBERS)
        loss, rows = batchkern.soft_label_kl(virtual[:100], virtual[100:], reference_grad=True, per_sample=True)
        return [virtual.detach(), loss.detach(), rows, torch.autograd.grad(loss, leaf)[0]]

    first = everything()
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(everything(), first))


def test_launches_of_virtual_samples() -> None:
    x, seed, one = torch.randn(128, 64, device="cuda"), torch.tensor(3).cuda(), torch.ones((), device="cuda")
    for kind, most in (("none", 1), ("hadamard", 2), ("normalized", 2)):
        basis = basis_of(kind, 64)
        names = launches(lambda basis=basis: batchkern.augment_latent(x, basis=basis, seed=seed, **NUMBERS))
        assert len(names) <= most + (kind == "normalized"), names  # cuBLAS may take one more
    p, q = torch.randn(128, 10, device="cuda"), torch.randn(512, 10, device="cuda", requires_grad=True)
    assert len(launches(lambda: batchkern.soft_label_kl(p, q))) == 2
    loss = batchkern.soft_label_kl(p, q)
    assert len(launches(lambda: torch.autograd.grad(loss, q, one, retain_graph=True))) <= 3  # runs the kernel again
    assert len(launches(lambda: torch.autograd.grad(batchkern.soft_label_kl(p, q), q, one))) == 3
