"""augment_latent against plain-Python Philox (tests/golden), the laws it should follow, and eqs. 5-8 written out."""

from __future__ import annotations

import json
import math
from typing import Any

import kernel_backend
import numpy as np
import pytest
import torch
from golden import philox as golden
from scipy import stats
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import batchkern
from batchkern.basis import Hadamard

PLAIN = {"gaussian": 2, "dropout": 2, "sigma": 0.5, "tau": 0.6, "drop_prob": 0.3}
DRAWS = json.loads(golden.PATH.read_text())["draws"]


def matrix(basis: Tensor | Hadamard | None, width: int) -> np.ndarray:
    if basis is None:
        return np.eye(width)
    return (basis.matrix() if isinstance(basis, Hadamard) else basis).double().numpy()


def expected_stack(
    x: Tensor,
    seed: int,
    *,
    gaussian: int,
    dropout: int,
    sigma: float,
    tau: float,
    drop_prob: float,
    basis: Tensor | Hadamard | None = None,
    rescale_dropout: bool = False,
) -> Tensor:
    """Eqs. 5-8 in float64, one output row after the other, with the numbers of the golden generator."""
    batch, width = x.shape
    sigma_matrix = matrix(basis, width)
    rows = []
    for row in range((1 + gaussian + dropout) * batch):
        copy, i = divmod(row, batch)
        base = x[i].double().numpy()
        if copy == 0:
            rows.append(base)
        elif copy <= gaussian:
            noise = [sigma * golden.normal(seed, row, c) for c in range(width)]
            rows.append(base + sigma_matrix @ np.clip(noise, -tau, tau))
        else:
            mask = np.array([golden.kept(seed, row, c, drop_prob) for c in range(width)], dtype=float)
            rows.append(base * mask / (1 - drop_prob if rescale_dropout else 1))
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, width, dtype=torch.float64)


def a_basis(kind: str, width: int) -> Tensor | Hadamard | None:
    return None if kind == "none" else batchkern.random_basis(width, kind)


# --- values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "normalized", "orthogonal", "hadamard"])
@pytest.mark.parametrize("width", [1, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_definition(kind: str, width: int, dtype: torch.dtype) -> None:
    x, basis = torch.randn(3, width, dtype=dtype), a_basis(kind, width)
    for rescale in (False, True):
        options = {**PLAIN, "basis": basis, "rescale_dropout": rescale}
        result = batchkern.augment_latent(x, seed=11, **options)
        assert result.dtype == dtype
        assert result.shape == (15, width)
        assert torch.equal(result[:3], x)
        tolerance = 2e-6 if dtype == torch.float32 or isinstance(basis, Hadamard) else 1e-12
        expected = expected_stack(x, 11, **options)
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 2**32, 12345678901234])
def test_every_seed(seed: int) -> None:
    x = torch.randn(2, 5, dtype=torch.float64)
    expected = expected_stack(x, seed, **PLAIN)
    for form in (seed, torch.tensor(seed, dtype=torch.int64)):
        torch.testing.assert_close(batchkern.augment_latent(x, seed=form, **PLAIN), expected)


@pytest.mark.parametrize("draw", [d for d in DRAWS if d["row"] == 127], ids=lambda d: str(d["seed"]))
def test_golden_draws(draw: dict) -> None:
    # Row 127 of the output of 64 rows: the last row of the one copy.
    width = draw["first_column"] + len(draw["normals"])
    options = {"sigma": 1.0, "tau": math.inf, "drop_prob": 0.3, "seed": draw["seed"]}
    noise = batchkern.augment_latent(torch.zeros(64, width), gaussian=1, dropout=0, **options)
    drawn = noise[127, draw["first_column"] :]
    torch.testing.assert_close(drawn, torch.tensor(draw["normals"]), rtol=0, atol=1e-6)
    masked = batchkern.augment_latent(torch.ones(64, width), gaussian=0, dropout=1, **options)
    assert masked[127, draw["first_column"] :].tolist() == draw["kept_at_drop_prob_0.3"]


@pytest.mark.parametrize(("gaussian", "dropout"), [(0, 0), (0, 3), (3, 0), (1, 1)])
def test_numbers_of_copies(gaussian: int, dropout: int) -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    options = {**PLAIN, "gaussian": gaussian, "dropout": dropout}
    result = batchkern.augment_latent(x, seed=1, **options)
    assert result.shape == ((1 + gaussian + dropout) * 4, 6)
    torch.testing.assert_close(result, expected_stack(x, 1, **options))


@pytest.mark.parametrize("kind", ["none", "normalized", "hadamard"])
def test_empty_batch(kind: str) -> None:
    x = torch.empty(0, 6, requires_grad=True)
    result = batchkern.augment_latent(x, seed=1, basis=a_basis(kind, 6), **PLAIN)
    assert result.shape == (0, 6)
    result.sum().backward()
    assert x.grad.shape == (0, 6)


def test_empty_width() -> None:
    assert batchkern.augment_latent(torch.empty(3, 0), seed=1, **PLAIN).shape == (15, 0)


def test_drop_prob_0_and_1() -> None:
    x = torch.randn(50, 40)
    options = {**PLAIN, "gaussian": 0}
    for seed in range(3):
        kept = batchkern.augment_latent(x, seed=seed, **{**options, "drop_prob": 0.0})
        assert torch.equal(kept, x.repeat(3, 1))
        rescaled = batchkern.augment_latent(x, seed=seed, rescale_dropout=True, **{**options, "drop_prob": 0})
        assert torch.equal(rescaled, kept)
        dropped = batchkern.augment_latent(x, seed=seed, **{**options, "drop_prob": 1.0})
        assert torch.equal(dropped[:50], x)
        assert not dropped[50:].any()


def test_mask_threshold() -> None:
    # An element is dropped when its 32-bit word is below drop_prob * 2^32: not at it, and not above.
    word = golden.word(5, 1, 0)
    options = {"gaussian": 0, "dropout": 1, "sigma": 1.0, "tau": 1.0, "seed": 5}
    for threshold, value in ((word - 1, 1), (word, 1), (word + 1, 0)):
        result = batchkern.augment_latent(torch.ones(1, 1), drop_prob=threshold / 2**32, **options)
        assert result.tolist() == [[1], [value]]


def test_sigma_0_adds_nothing() -> None:
    x = torch.randn(5, 6)
    options = {**PLAIN, "sigma": 0.0, "dropout": 0}
    assert torch.equal(batchkern.augment_latent(x, seed=1, **options), x.repeat(3, 1))


def test_noise_is_clipped_before_the_basis() -> None:
    options = {"gaussian": 50, "dropout": 0, "sigma": 2.0, "tau": 0.5, "drop_prob": 0.0, "seed": 3}
    noise = batchkern.augment_latent(torch.zeros(20, 30), **options)[20:]
    assert noise.abs().max() == 0.5
    share = (noise.abs() == 0.5).float().mean().item()
    expected = 2 * stats.norm.cdf(-0.25)
    assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / noise.numel())
    basis = batchkern.random_basis(30, "orthogonal")
    moved = batchkern.augment_latent(torch.zeros(20, 30), basis=basis, **options)[20:]
    torch.testing.assert_close(moved, noise @ basis.T)
    assert moved.abs().max() > 0.6  # a clip behind the basis would bound it


# --- laws ------------------------------------------------------------------------------------------------


def test_noise_follows_the_clipped_normal_law() -> None:
    sigma, tau = 0.7, 1.0
    options = {"gaussian": 4, "dropout": 0, "sigma": sigma, "tau": tau, "drop_prob": 0.0, "seed": 2024}
    noise = batchkern.augment_latent(torch.zeros(64, 257), **options)[64:].flatten().double().numpy()
    inside = noise[np.abs(noise) < tau]
    tail = stats.norm.cdf(-tau / sigma)
    for side in (-tau, tau):
        assert stats.binomtest(int((noise == side).sum()), len(noise), tail).pvalue > 1e-3
    law = stats.truncnorm(-tau / sigma, tau / sigma, scale=sigma)
    assert stats.kstest(inside, law.cdf).pvalue > 1e-3


def test_tails_of_the_normal_law() -> None:
    options = {"gaussian": 1, "dropout": 0, "sigma": 1.0, "tau": math.inf, "drop_prob": 0.0, "seed": 7}
    noise = batchkern.augment_latent(torch.zeros(1000, 500), **options)[1000:].flatten()
    for bound in (2.0, 3.0, 4.0):
        expected = len(noise) * 2 * stats.norm.cdf(-bound)
        assert abs(int((noise.abs() > bound).sum()) - expected) < 5 * math.sqrt(expected)
    assert abs(noise.double().mean().item()) < 5 / math.sqrt(len(noise))
    assert abs(noise.double().square().mean().item() - 1) < 5 * math.sqrt(2 / len(noise))


def test_no_two_copies_or_rows_share_noise() -> None:
    batch, width = 8, 512
    options = {"gaussian": 3, "dropout": 3, "sigma": 1.0, "tau": 10.0, "drop_prob": 0.5, "seed": 99}
    stacked = batchkern.augment_latent(torch.ones(batch, width), **options)[batch:].double()
    noise, masks = (part - part.mean(1, keepdim=True) for part in stacked.chunk(2))
    for part in (noise, masks):
        correlation = torch.corrcoef(part)
        assert (correlation - torch.eye(len(part))).abs().max() < 6 / math.sqrt(width)
        # Neighbouring columns come from one Philox counter.
        neighbours = torch.corrcoef(part.T)
        for lag in (1, 2, 3, 4):
            assert neighbours.diagonal(lag).abs().mean() < 2 / math.sqrt(len(part))
    # Dropout copies do not reuse the words of Gaussian ones either.
    assert torch.corrcoef(torch.cat([noise, masks]))[: len(noise), len(noise) :].abs().max() < 0.3


@pytest.mark.parametrize("drop_prob", [0.05, 0.3, 0.5, 0.9])
def test_mask_rate(drop_prob: float) -> None:
    options = {**PLAIN, "gaussian": 1, "drop_prob": drop_prob}
    masks = batchkern.augment_latent(torch.ones(64, 256), seed=6, **options)[128:]
    assert set(masks.unique().tolist()) == {0.0, 1.0}  # not rescaled: eq. 8
    assert stats.binomtest(int((masks == 0).sum()), masks.numel(), drop_prob).pvalue > 1e-3
    per_column = (masks == 0).sum(0)
    spread = math.sqrt(128 * drop_prob * (1 - drop_prob))
    assert (per_column - 128 * drop_prob).abs().max() < 6 * spread
    rescaled = batchkern.augment_latent(torch.ones(64, 256), seed=6, rescale_dropout=True, **options)[128:]
    torch.testing.assert_close(rescaled, masks / (1 - drop_prob))


# --- seeds -----------------------------------------------------------------------------------------------


def test_same_seed_same_numbers() -> None:
    x = torch.randn(6, 10)
    first = batchkern.augment_latent(x, seed=4, **PLAIN)
    assert torch.equal(first, batchkern.augment_latent(x, seed=4, **PLAIN))
    assert not torch.equal(first, batchkern.augment_latent(x, seed=5, **PLAIN))
    # A fixed seed neither reads nor moves torch's generator.
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(first, batchkern.augment_latent(x, seed=4, **PLAIN))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_torch_manual_seed_governs() -> None:
    x = torch.randn(6, 10)
    torch.manual_seed(1)
    first, second = (batchkern.augment_latent(x, **PLAIN) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(batchkern.augment_latent(x, **PLAIN), first)
    torch.manual_seed(2)
    assert not torch.equal(batchkern.augment_latent(x, **PLAIN), first)


# --- types and layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["none", "normalized", "hadamard"])
def test_narrow_types_round_once(dtype: torch.dtype, kind: str) -> None:
    x, basis = torch.randn(6, 8).to(dtype), a_basis(kind, 8)
    result = batchkern.augment_latent(x, seed=3, basis=basis, **PLAIN)
    assert result.dtype == dtype
    assert torch.equal(result[:6], x)
    expected = expected_stack(x, 3, basis=basis, **PLAIN)
    half_step = torch.finfo(dtype).eps / 2
    # On a GPU the clipped noise and a dense basis, whose columns have norm 1, are rounded to the type of x, too.
    rounded = 2 * half_step * PLAIN["tau"] * 8 if kernel_backend.chosen and kind == "normalized" else 0.0
    torch.testing.assert_close(result.double(), expected, rtol=half_step * 1.01, atol=1e-6 + rounded)


@pytest.mark.parametrize("basis_dtype", [torch.float64, torch.bfloat16], ids=str)
def test_basis_of_another_type(basis_dtype: torch.dtype) -> None:
    x, basis = torch.randn(6, 8), batchkern.random_basis(8).to(basis_dtype)
    result = batchkern.augment_latent(x, seed=3, basis=basis, **PLAIN)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected_stack(x, 3, basis=basis, **PLAIN), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["normalized", "hadamard"])
def test_autocast_does_not_round_the_noise(kind: str) -> None:
    x, basis = torch.randn(6, 8), a_basis(kind, 8)
    expected = batchkern.augment_latent(x, seed=3, basis=basis, **PLAIN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = batchkern.augment_latent(x, seed=3, basis=basis, **PLAIN)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


def test_strided_input() -> None:
    x, basis = torch.randn(6, 8), batchkern.random_basis(8)
    expected = batchkern.augment_latent(x, seed=3, basis=basis, **PLAIN)
    for strided in (torch.cat([x, x], dim=1)[:, :8], x.t().contiguous().t(), x.repeat_interleave(2, 0)[::2]):
        assert torch.equal(batchkern.augment_latent(strided, seed=3, basis=basis, **PLAIN), expected)
    strided_basis = basis.t().contiguous().t()
    result = batchkern.augment_latent(x, seed=3, basis=strided_basis, **PLAIN)
    torch.testing.assert_close(result, expected)


def test_input_is_left_alone() -> None:
    x = torch.randn(6, 8)
    before = x.clone()
    batchkern.augment_latent(x, seed=3, **PLAIN).zero_()
    assert torch.equal(x, before)


def test_nan_and_infinity_pass_through() -> None:
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1.0]])
    options = {"gaussian": 1, "dropout": 1, "sigma": 0.5, "tau": 0.6, "drop_prob": 0.0, "seed": 1}
    result = batchkern.augment_latent(x, **options)
    for row in result:
        assert row[0].isnan()
        assert row[1] == math.inf
        assert row[2] == -math.inf


# --- gradient --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_is_the_sum_over_copies(rescale: bool, dtype: torch.dtype) -> None:
    batch, width = 4, 6
    x = torch.randn(batch, width, dtype=dtype, requires_grad=True)
    options = {**PLAIN, "basis": batchkern.random_basis(width), "rescale_dropout": rescale}
    result = batchkern.augment_latent(x, seed=8, **options)
    upstream = torch.randn_like(result)
    result.backward(upstream)
    expected = torch.zeros(batch, width, dtype=torch.float64)
    for row in range(5 * batch):
        copy, i = divmod(row, batch)
        mask = [1.0 if copy <= 2 else float(golden.kept(8, row, c, 0.3)) for c in range(width)]
        scale = 1 / 0.7 if rescale and copy > 2 else 1.0
        expected[i] += upstream[row].double() * torch.tensor(mask).double() * scale
    assert x.grad.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(x.grad.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["none", "normalized", "hadamard"])
def test_gradcheck(kind: str) -> None:
    x, basis = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), a_basis(kind, 5)
    assert torch.autograd.gradcheck(
        lambda x: batchkern.augment_latent(x, seed=8, basis=basis, rescale_dropout=True, **PLAIN), x
    )


def test_upstream_gradient_of_stride_zero() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    batchkern.augment_latent(x, seed=8, **{**PLAIN, "drop_prob": 0.0}).sum().backward()
    assert torch.equal(x.grad, torch.full((3, 5), 5.0))
    x.grad = None
    (2 * batchkern.augment_latent(x, seed=8, **{**PLAIN, "drop_prob": 1.0})[:, :1].expand(-1, 4)).sum().backward()
    assert torch.equal(x.grad, torch.tensor([24.0, 0, 0, 0, 0]).expand(3, 5))


def test_the_gradient_uses_the_masks_of_its_own_forward() -> None:
    x = torch.randn(3, 50, requires_grad=True)
    options = {**PLAIN, "gaussian": 0, "dropout": 1}
    first = batchkern.augment_latent(x, **options)
    batchkern.augment_latent(x, **options)
    first[3:].sum().backward()
    assert torch.equal(x.grad.bool(), first[3:].detach().bool())


def test_the_basis_gets_no_gradient() -> None:
    basis = torch.randn(4, 4, requires_grad=True)
    assert not batchkern.augment_latent(torch.randn(2, 4), basis=basis, **PLAIN).requires_grad
    x = torch.randn(2, 4, requires_grad=True)
    batchkern.augment_latent(x, basis=basis, **PLAIN).sum().backward()
    assert basis.grad is None


def test_second_derivative_raises() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    squares = batchkern.augment_latent(x, seed=1, **PLAIN).square().sum()
    (grad,) = torch.autograd.grad(squares, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|once_differentiable"):
        grad.sum().backward()


# --- compile ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)],
)
@pytest.mark.timeout(240)  # ten rounds of Philox, inlined by the compiler, took it ten minutes
def test_compiled_equals_eager(backend: str) -> None:
    x, basis = torch.randn(5, 6), batchkern.random_basis(6)

    def step(x: Tensor, basis: Tensor, seed: Tensor | None) -> Tensor:
        return batchkern.augment_latent(x, basis=basis, seed=seed, **PLAIN)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    results = []
    for function in (compiled, step):
        leaf = x.clone().requires_grad_()
        stacked = function(leaf, basis, torch.tensor(12))
        stacked.square().sum().backward()
        results.append((stacked.detach(), leaf.grad))
    torch.testing.assert_close(*results)


def test_compiled_without_a_seed_draws_a_fresh_one_each_call() -> None:
    compiled = torch.compile(lambda x: batchkern.augment_latent(x, **PLAIN), fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 6)
    torch.manual_seed(3)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(compiled(x), first)


@pytest.mark.parametrize("kind", ["none", "hadamard"])
def test_compiled_with_other_bases(kind: str) -> None:
    basis = a_basis(kind, 6)
    compiled = torch.compile(
        lambda x: batchkern.augment_latent(x, basis=basis, seed=1, **PLAIN),
        fullgraph=True,
        backend="aot_eager",
    )
    x = torch.randn(5, 6)
    torch.testing.assert_close(compiled(x), batchkern.augment_latent(x, basis=basis, seed=1, **PLAIN))


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")
def test_an_int_is_no_seed_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        x, seed = torch.empty(4, 3, device="cuda"), torch.empty((), dtype=torch.int64, device="cuda")
        assert batchkern.augment_latent(x, seed=7, **PLAIN).shape == (20, 3)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for allowed in (None, seed):
            assert batchkern.augment_latent(x, seed=allowed, **PLAIN).shape == (20, 3)
        with pytest.raises(ValueError, match="seed must be None or .* while a CUDA graph is captured, got 7"):
            batchkern.augment_latent(x, seed=7, **PLAIN)
    # What is captured on a GPU says nothing about a tensor of the CPU, nor about what the compiler traces.
    x = torch.randn(4, 3)
    eager = batchkern.augment_latent(x, seed=7, **PLAIN)
    compiled = torch.compile(lambda x: batchkern.augment_latent(x, seed=7, **PLAIN), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), eager)


# --- wrong arguments -------------------------------------------------------------------------------------

ON_META = {"device": "meta"}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"x": [[0.0]]}, TypeError, ["x", "list", "tensor"]),
        ({"x": torch.zeros(4, 3).int()}, TypeError, ["x", "int32", "float32"]),
        ({"x": torch.zeros(3)}, ValueError, ["x", "(3,)", "2 dimension"]),
        ({"x": torch.zeros(4, 3, 2)}, ValueError, ["x", "(4, 3, 2)", "2 dimension"]),
        ({"gaussian": -1}, ValueError, ["gaussian", "-1", "at least 0"]),
        ({"gaussian": 1.0}, TypeError, ["gaussian", "float", "int"]),
        ({"dropout": -2}, ValueError, ["dropout", "-2", "at least 0"]),
        ({"dropout": True}, TypeError, ["dropout", "bool", "int"]),
        ({"sigma": -0.1}, ValueError, ["sigma", "-0.1", "[0, inf]"]),
        ({"sigma": math.nan}, ValueError, ["sigma", "nan", "[0, inf]"]),
        ({"sigma": torch.tensor(0.1)}, TypeError, ["sigma", "Tensor", "number"]),
        ({"tau": 0.0}, ValueError, ["tau", "0.0", "(0, inf]"]),
        ({"tau": -1.0}, ValueError, ["tau", "-1.0", "(0, inf]"]),
        ({"tau": math.nan}, ValueError, ["tau", "nan", "(0, inf]"]),
        ({"drop_prob": -0.01}, ValueError, ["drop_prob", "-0.01", "[0, 1]"]),
        ({"drop_prob": 1.01}, ValueError, ["drop_prob", "1.01", "[0, 1]"]),
        ({"drop_prob": 1.0, "rescale_dropout": True}, ValueError, ["drop_prob", "below 1", "rescale_dropout"]),
        ({"basis": [[1.0]]}, TypeError, ["basis", "list", "tensor"]),
        ({"basis": torch.eye(3).int()}, TypeError, ["basis", "int32", "float32"]),
        ({"basis": torch.ones(3)}, ValueError, ["basis", "(3,)", "2 dimension"]),
        ({"basis": torch.ones(3, 4)}, ValueError, ["basis", "(3, 4)", "(3, 3)"]),
        ({"basis": torch.ones(3, 3, **ON_META)}, ValueError, ["basis", "meta", "cpu"]),
        ({"basis": Hadamard(torch.ones(4))}, ValueError, ["basis", "(4,)", "(3,)"]),
        ({"basis": Hadamard(torch.ones(3).double())}, TypeError, ["basis", "float64", "float32"]),
        ({"basis": Hadamard(torch.ones(3, **ON_META))}, ValueError, ["basis", "meta", "cpu"]),
        ({"seed": 1.5}, TypeError, ["seed", "float", "int"]),
        ({"seed": True}, TypeError, ["seed", "bool", "int"]),
        ({"seed": 2**63}, ValueError, ["seed", str(2**63), "64 bits"]),
        ({"seed": -(2**63) - 1}, ValueError, ["seed", str(-(2**63) - 1), "64 bits"]),
        ({"seed": torch.tensor(1, dtype=torch.int32)}, TypeError, ["seed", "int32", "int64"]),
        ({"seed": torch.tensor([1])}, ValueError, ["seed", "(1,)", "0 dimension"]),
        ({"seed": torch.tensor(1, **ON_META)}, ValueError, ["seed", "meta", "cpu"]),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        batchkern.augment_latent(**{"x": torch.zeros(4, 3), **PLAIN, **arguments})
    for word in words:
        assert word in str(raised.value)
