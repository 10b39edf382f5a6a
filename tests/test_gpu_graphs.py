"""What only a GPU can show of graphs: those a user captures, and those of torch.compile.

Apart from test_gpu.py, since a capture that fails may spoil what a process does next, and Inductor takes its time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_cases import NEEDS_GPU, NUMBERS, basis_of, batch, launches, layer, linear_step, step
from torch import Tensor

import batchkern
from batchkern import reference

pytestmark = NEEDS_GPU

CLASSES = 1000


@pytest.fixture
def compiler() -> Iterator[None]:
    """Nothing of what was compiled before, nor afterwards: graphs hold memory."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("shape", [(100, 50), (5000, 50), (70_000, 50), (3, 300_001)], ids=str)
def test_a_captured_graph_follows_keep_and_its_inputs(shape: tuple[int, int]) -> None:
    keep = torch.tensor(0.5, dtype=torch.float64, device="cuda")
    logits, target = batch(*shape)

    def everything(logits: Tensor, target: Tensor, keep: float | Tensor) -> list[Tensor]:
        loss, losses, grad = step(logits, target, keep)
        orders = [batchkern.rank_batches(losses, fraction) for fraction in (0.01, 0.1)]
        return [loss, losses, grad, batchkern.trimmed_mean(losses, keep), *orders]

    everything(logits, target, keep)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = everything(logits, target, keep)
    for seed, value in enumerate([0.1, 1.0, 0.37, 1e-9]):
        torch.manual_seed(seed)
        fresh, labels = batch(*shape)
        logits.copy_(fresh)
        target.copy_(labels)
        keep.fill_(value)
        graph.replay()
        step(fresh, labels, 0.9)  # eager calls in between do not disturb the graph's own memory
        for ours, expected in zip(outputs, everything(fresh, labels, value)):
            assert torch.equal(ours, expected)


def test_a_captured_linear_step_follows_keep_and_its_inputs() -> None:
    for keep in (torch.tensor(0.5, dtype=torch.float64, device="cuda"), 0.3, 1.0):
        inputs = layer(500, 32, 2000, torch.float32)
        linear_step(*inputs, keep, chunk_rows=100)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = linear_step(*inputs, keep, chunk_rows=100)
        for seed, value in enumerate([0.1, 1.0]):
            torch.manual_seed(seed)
            fresh = layer(500, 32, 2000, torch.float32)
            for x, y in zip(inputs, fresh):
                x.copy_(y)
            if isinstance(keep, Tensor):
                keep.fill_(value)
            graph.replay()
            expected = linear_step(*fresh, value if isinstance(keep, Tensor) else keep, chunk_rows=100)
            torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["none", "normalized", "hadamard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_graph_draws_fresh_virtual_samples(kind: str, dtype: torch.dtype) -> None:
    x, basis = torch.randn(64, 256, device="cuda").to(dtype), basis_of(kind, 256)

    def everything() -> tuple[Tensor, Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        virtual = batchkern.augment_latent(leaf, basis=basis, **NUMBERS)
        loss = batchkern.soft_label_kl(virtual[:64].detach(), virtual[64:])
        return virtual.detach(), loss.detach(), torch.autograd.grad(loss, leaf)[0]

    everything()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = everything()
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append([x.clone() for x in outputs])
        virtual, loss, _ = seen[-1]
        exact = reference.soft_label_kl(virtual[:64].double(), virtual[64:].double()).mean()
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    assert not any(torch.equal(a, b) for a, b in zip(seen[0], seen[1]))
    assert not any(torch.equal(a, b) for a, b in zip(seen[1], seen[2]))


def test_a_captured_small_step_is_two_launches() -> None:
    logits, target = batch(128, 10)
    step(logits, target, 0.3)
    graph = torch.cuda.CUDAGraph()
    leaf, one = logits.requires_grad_(), torch.ones((), device="cuda")
    with torch.cuda.graph(graph):
        torch.autograd.grad(batchkern.trimmed_cross_entropy(leaf, target, 0.3), leaf, one)
    kernels = launches(graph.replay)
    assert len(kernels) == 2, kernels


def test_compiled_step_equals_eager() -> None:
    def both(logits: Tensor, target: Tensor, keep: float) -> Tensor:
        loss, losses = batchkern.trimmed_cross_entropy(logits * 2, target, keep, per_sample=True)
        order = batchkern.rank_batches(losses, 0.2)
        return loss + batchkern.trimmed_mean((logits - 1).square().mean(1), keep) + 0 * order.sum()

    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True)
    logits, target = batch(500, 40)
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    for keep in (0.3, 0.6):
        results = [f(leaf, target, keep) for f, leaf in zip((compiled, both), leaves)]
        torch.testing.assert_close(*results)
    for result in results:
        result.backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_compiled_linear_step_equals_eager() -> None:
    hidden, weight, bias, target = layer(500, 32, 2000, torch.float32)

    def loss(hidden: Tensor, keep: float) -> Tensor:
        return batchkern.linear_trimmed_cross_entropy(hidden.tanh(), weight, target, keep, bias=bias, chunk_rows=100)

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True)
    for keep in (1.0, 0.9, 0.5, 0.2):
        leaves = [hidden.clone().requires_grad_() for _ in range(2)]
        results = [f(leaf, keep) for f, leaf in zip((compiled, loss), leaves)]
        torch.testing.assert_close(*results)
        for result in results:
            result.backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("kind", ["none", "normalized", "hadamard"])
def test_compiled_augmentation_equals_eager(kind: str) -> None:
    basis = basis_of(kind, 64)

    def step(x: Tensor) -> Tensor:
        virtual = batchkern.augment_latent(x, basis=basis, seed=5, **NUMBERS)
        return batchkern.soft_label_kl(virtual[:32], virtual[32:], reference_grad=True)

    torch.compiler.reset()
    x = torch.randn(32, 64, device="cuda")
    results = []
    for function in (torch.compile(step, fullgraph=True), step):
        leaf = x.clone().requires_grad_()
        loss = function(leaf)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(*results)


# --- torch.compile(mode="reduce-overhead"): the compiler's own graphs ---------------------------------------------


@dataclass
class Replayed:
    """A step that is compiled and replayed. The gradient is that of its first result; ``close`` is how close to eager
    results must be, where not to the bit."""

    step: Callable[..., tuple[Tensor, ...]]
    inputs: Callable[[int], tuple[Tensor, ...]]
    sizes: tuple[int, ...] = (4096, 300)
    close: tuple[float, float] = (1e-5, 1e-9)


def with_logits(size: int) -> tuple[Tensor, ...]:
    logits, target = batch(size, CLASSES)
    return logits.requires_grad_(), target


def keep_on_the_device() -> Tensor:
    return 0.2 + 0.6 * torch.rand((), dtype=torch.float64, device="cuda")


def trimmed(logits: Tensor, target: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
    return (batchkern.trimmed_cross_entropy(2 * logits, target, keep),)


def trimmed_with_losses(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return batchkern.trimmed_cross_entropy(2 * logits, target, 0.3, per_sample=True)


def mean(losses: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
    return (batchkern.trimmed_mean(2 * losses, keep),)


def linear(hidden: Tensor, weight: Tensor, target: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
    return batchkern.linear_trimmed_cross_entropy(2 * hidden, weight, target, keep, per_sample=True, chunk_rows=1500)


def linear_inputs(size: int) -> tuple[Tensor, ...]:
    hidden, weight, _, target = layer(size, 64, CLASSES, torch.float32)
    return hidden.requires_grad_(), weight.requires_grad_(), target, keep_on_the_device()


def divergence(p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    return batchkern.soft_label_kl(2 * p, 2 * q, reference_grad=True, per_sample=True)


def divergence_inputs(size: int) -> tuple[Tensor, ...]:
    p, q = (torch.randn(n, CLASSES, device="cuda", requires_grad=True) for n in (size, 2 * size))
    return p, q


def ranks(losses: Tensor) -> tuple[Tensor, ...]:
    return batchkern.rank_batches(2 * losses, 0.2), batchkern.rank_batches(2 * losses, 1e-3)


def augment(kind: str) -> Callable[..., tuple[Tensor, ...]]:
    basis = basis_of(kind, CLASSES)

    def step(x: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        virtual = batchkern.augment_latent(2 * x, basis=basis, seed=seed, **NUMBERS)
        return virtual.square().sum() / 1e6, virtual

    return step


def augment_inputs(size: int) -> tuple[Tensor, ...]:
    seed = torch.randint(2**40, (), device="cuda")
    return torch.randn(size, CLASSES, device="cuda", requires_grad=True), seed


REPLAYED: dict[str, Callable[[], Replayed]] = {
    "trimmed_cross_entropy": lambda: Replayed(
        trimmed, lambda n: (*with_logits(n), keep_on_the_device()), (4096, 20_011, 128)
    ),
    "per_sample": lambda: Replayed(trimmed_with_losses, with_logits),
    "trimmed_mean": lambda: Replayed(
        mean,
        lambda n: (torch.randn(n, device="cuda", requires_grad=True), keep_on_the_device()),
        (4096, 70_000, 20_000),
    ),
    # The order in which a matmul adds may depend on where its arguments lie.
    "linear_trimmed_cross_entropy": lambda: Replayed(linear, linear_inputs, close=(1e-4, 1e-6)),
    "soft_label_kl": lambda: Replayed(divergence, divergence_inputs),
    "rank_batches": lambda: Replayed(ranks, lambda n: (torch.randn(n, device="cuda"),), (4096, 1_000_000, 20_000)),
    "augment_latent": lambda: Replayed(augment("none"), augment_inputs),
    "augment_latent hadamard": lambda: Replayed(augment("hadamard"), augment_inputs),
    "augment_latent dense": lambda: Replayed(augment("normalized"), augment_inputs, close=(1e-4, 1e-6)),
}


def results_of(step: Callable[..., tuple[Tensor, ...]], inputs: tuple[Any, ...]) -> list[Tensor]:
    """Results and gradients, in memory of their own: the next replay writes over that of its graph."""
    torch.compiler.cudagraph_mark_step_begin()
    results = step(*inputs)
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    grads = torch.autograd.grad(results[0], wanted) if wanted else ()
    return [x.detach().clone() for x in (*results, *grads)]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one with each replay of a graph."""
    seen: list[object] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        seen.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return seen


@pytest.mark.parametrize("name", REPLAYED)
def test_reduced_overhead_equals_eager(name: str, compiler: None, replays: list[object]) -> None:
    """Each size is warmed up, captured and replayed; then all in turn, as what one graph leaves behind another finds.

    After a warm-up the compiler itself checks that nobody holds memory of its pool.
    """
    case = REPLAYED[name]()
    compiled = torch.compile(case.step, mode="reduce-overhead", fullgraph=True, dynamic=False)
    for size in [size for size in case.sizes for _ in range(3)] + 2 * list(case.sizes):
        inputs = case.inputs(size)
        ours, expected = results_of(compiled, inputs), results_of(case.step, inputs)
        torch.testing.assert_close(ours, expected, rtol=case.close[0], atol=case.close[1])
    assert len(replays) >= 4 * len(case.sizes)  # of five calls the first is a warm-up


@pytest.mark.parametrize("op", ["trimmed_cross_entropy", "linear_trimmed_cross_entropy"])
def test_reduced_overhead_follows_a_number(op: str, compiler: None) -> None:
    """A schedule of ``keep`` as a float, which no graph may hold."""

    def step(inputs: tuple[Tensor, ...], keep: float) -> tuple[Tensor, ...]:
        if op == "trimmed_cross_entropy":
            return batchkern.trimmed_cross_entropy(2 * inputs[0], inputs[1], keep, per_sample=True)
        return batchkern.linear_trimmed_cross_entropy(
            2 * inputs[0], inputs[1], inputs[2], keep, per_sample=True, chunk_rows=1500
        )

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for keep in (0.5, 0.5, 0.5, 0.4, 0.4, 0.4, 0.3, 0.2, 0.5, 0.95, 0.9, 0.85):
        inputs = with_logits(4096) if op == "trimmed_cross_entropy" else linear_inputs(4096)[:3]
        ours, expected = (results_of(lambda *x, f=f, keep=keep: f(x, keep), inputs) for f in (compiled, step))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["none", "hadamard", "normalized"])
def test_reduced_overhead_draws_fresh_numbers(kind: str, compiler: None, replays: list[object]) -> None:
    basis = basis_of(kind, CLASSES)
    compiled = torch.compile(
        lambda x: batchkern.augment_latent(2 * x, basis=basis, **NUMBERS), mode="reduce-overhead", fullgraph=True
    )
    x = torch.randn(512, CLASSES, device="cuda")
    before = None
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(x).clone()
        assert torch.equal(out[:512], 2 * x)
        dropped = out[3 * 512 :] == 0
        assert abs(float(dropped.double().mean()) - NUMBERS["drop_prob"]) < 0.005  # eleven standard deviations
        if before is not None:
            noise, mask = out[512 : 3 * 512], dropped
            assert float((noise == before[0]).double().mean()) < 0.5  # both clipped alike, mostly
            assert float((mask != before[1]).double().mean()) > 0.4  # 2 p (1 - p) = .42
        before = out[512 : 3 * 512], dropped
    assert len(replays) >= 4


# --- what may and may not change in a captured graph --------------------------------------------------------------


def test_an_int_as_seed_is_refused_in_a_capture() -> None:
    x, seed = torch.randn(64, 256, device="cuda"), torch.tensor(5).cuda()
    expected = batchkern.augment_latent(x, seed=5, **NUMBERS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = batchkern.augment_latent(x, seed=seed, **NUMBERS)
        with pytest.raises(ValueError, match="seed must be None or .* while a CUDA graph is captured, got 5"):
            batchkern.augment_latent(x, seed=5, **NUMBERS)
    for number in (5, 6):
        seed.fill_(number)
        graph.replay()
        assert torch.equal(out, expected) is (number == 5)


@pytest.mark.parametrize("width", [256, 10])
@pytest.mark.parametrize("kind", ["none", "hadamard", "normalized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_after_one_call_a_capture_compiles_nothing(
    width: int, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    x, basis = torch.randn(128, width, device="cuda").to(dtype), basis_of(kind, width)
    seeds = torch.tensor([1, 2], device="cuda")  # the second lies at no multiple of 16 bytes

    def everything(seed: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        virtual = batchkern.augment_latent(leaf, basis=basis, seed=seed, **NUMBERS)
        loss = batchkern.soft_label_kl(virtual[:128], virtual[128:], reference_grad=True)
        return [virtual.detach(), loss.detach(), torch.autograd.grad(loss, leaf)[0]]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything(seeds[0])
    torch.cuda.current_stream().wait_stream(stream)

    compiled: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **info: compiled.append(info["repr"]))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = everything(seeds[1])
    assert compiled == []
    for number in (2, 7):
        seeds[1] = number
        graph.replay()
        for ours, expected in zip(outputs, everything(seeds[1]), strict=True):
            torch.testing.assert_close(ours, expected)


def test_the_snippet_of_the_documentation() -> None:
    page = (Path(__file__).parents[1] / "docs" / "cuda-graphs.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(snippet, "docs/cuda-graphs.md", "exec"), names)
    assert len(names["losses"]) == 100
    assert sum(names["losses"][-10:]) < 0.8 * sum(names["losses"][:10])
