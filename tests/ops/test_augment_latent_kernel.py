"""The CPU kernels of augment_latent against the reference: exact integers, masks and conversions, errors elsewhere."""

from __future__ import annotations

import functools
import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kernel_backend
import pytest
import torch
from golden import philox as golden
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DRAWN_DTYPES, DTYPES, INSTRUCTION_SETS, LAYOUTS, ORDERED, REPEATS, SLOW
from scipy import stats
from torch import Tensor

import batchkern
from batchkern import _backend, reference
from batchkern.basis import Hadamard

_C = _backend.extension
OPS = torch.ops.batchkern
NARROW = (torch.bfloat16, torch.float16)
PLAIN = {"gaussian": 2, "dropout": 2, "sigma": 0.5, "tau": 0.6, "drop_prob": 0.3}
NO_NOISE = {"gaussian": 0, "sigma": 1.0, "tau": 1.0}
SEEDS = (0, -1, 2**32, 2**32 + 1, -(2**63), 0x123456789ABCDEF)
CSRC = Path(__file__).parents[2] / "csrc"


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    instruction_set, threads = _C.instruction_set(), torch.get_num_threads()
    yield
    _C.use_instruction_set(instruction_set)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def each_instruction_set() -> Iterator[str]:
    for instruction_set in INSTRUCTION_SETS:
        _C.use_instruction_set(instruction_set)
        yield instruction_set


def seeded(seed: int) -> Tensor:
    return torch.tensor(seed, dtype=torch.int64)


def patterns(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit type, once."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def assert_identical(got: Tensor, expected: Tensor) -> None:
    """Bit for bit, but for the payload of a NaN."""
    bits = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    assert got.dtype == expected.dtype
    same = (got.view(bits) == expected.view(bits)) | (got.isnan() & expected.isnan())
    assert same.all(), (got[~same][:5], expected[~same][:5])


def assert_within(got: Tensor, expected: Tensor, allowed: Tensor) -> None:
    error = (got.double() - expected).abs()
    worst = (error - allowed).flatten().argmax() if error.numel() else 0
    assert (error <= allowed).all(), [float(x.flatten()[worst]) for x in (error, allowed, got, expected)]


@functools.cache
def a_basis(kind: str, width: int) -> Tensor | Hadamard | None:
    generator = torch.Generator().manual_seed(width)
    return None if kind == "none" else batchkern.random_basis(width, kind, generator=generator)


# --- the operators as torch sees them --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "normalized", "hadamard"])
def test_opcheck(dtype: torch.dtype, kind: str) -> None:
    basis = a_basis(kind, 6)
    matrix = basis.signs if isinstance(basis, Hadamard) else basis
    rescale = kind != "none"
    options = {**PLAIN, "rescale_dropout": rescale, "basis": matrix}
    torch.library.opcheck(OPS.augment_latent.default, (torch.randn(3, 6).to(dtype), seeded(3)), options)
    options = {"gaussian": 1, "dropout": 2, "drop_prob": 0.3, "rescale_dropout": rescale}
    torch.library.opcheck(OPS.augment_latent_backward.default, (torch.randn(12, 6).to(dtype), seeded(3)), options)


def test_raw_operators_refuse_what_they_cannot_do() -> None:
    with pytest.raises(TypeError, match=r"x must be float32.*(Double|float64)"):
        OPS.augment_latent(torch.zeros(2, 3).double(), seeded(0), **PLAIN)
    with pytest.raises(ValueError, match="seed"):
        OPS.augment_latent(torch.zeros(2, 3), torch.zeros(1, dtype=torch.int64), **PLAIN)
    with pytest.raises(ValueError, match="basis"):
        OPS.augment_latent(torch.zeros(2, 3), seeded(0), basis=torch.zeros(3, 4), **PLAIN)
    with pytest.raises(ValueError, match="grad"):
        OPS.augment_latent_backward(torch.zeros(4, 3), seeded(0), gaussian=1, dropout=1, drop_prob=0.5)


# --- Philox: the same integers ---------------------------------------------------------------------------


def masks(shape: tuple[int, int], seed: int, threshold: float, dropout: int = 1) -> Tensor:
    """Which elements of the dropout copies have a word of at least ``threshold``."""
    options = {**NO_NOISE, "dropout": dropout, "drop_prob": threshold / 2**32}
    return OPS.augment_latent(torch.ones(shape), seeded(seed), **options)[shape[0] :].bool()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("width", [13, 521])
def test_every_bit_of_the_words(seed: int, width: int) -> None:
    # A word is the only w for which an element is kept at the threshold w and dropped at w + 1. Columns: all four
    # places in a quad, and both sides of the 512 that the kernel makes at a time.
    words = reference.random_words(torch.arange(3, 9), width, seeded(seed))
    for _ in each_instruction_set():
        for word in words[:, -13:].flatten()[:: 17 if SLOW else 1].tolist():
            for threshold in (word, word + 1):
                assert torch.equal(masks((3, width), seed, threshold, dropout=2), words >= threshold)


DRAWS = json.loads(golden.PATH.read_text())["draws"]
ROWS = (1, 127) if SLOW else (1, 7, 127)  # the draws of row 7 are behind 65,533 columns


@pytest.mark.parametrize("draw", [d for d in DRAWS if d["row"] in ROWS], ids=lambda d: f"{d['seed']}-{d['row']}")
def test_words_of_the_golden_file(draw: dict) -> None:
    row, start = draw["row"], draw["first_column"]
    shape = row, start + len(draw["words"])  # row `row` is the first of the one copy
    for _ in each_instruction_set():
        for i, word in list(enumerate(draw["words"]))[:: 6 if SLOW else 1]:
            assert masks(shape, draw["seed"], word)[0, start + i]
            assert not masks(shape, draw["seed"], word + 1)[0, start + i]


def test_philox_header_gives_the_published_answers(tmp_path: Path) -> None:
    # The counters of the published vectors are not those of any row and column, so the header is compiled by itself.
    compiler = shutil.which("c++")
    if compiler is None or not CSRC.exists():
        pytest.skip("needs a C++ compiler and csrc")
    calls = "".join(
        "{uint32_t c[4] = {%s}; batchkern::philox(c[0], c[1], c[2], c[3], %s);"  # noqa: UP031
        r'std::printf("%%u %%u %%u %%u\n", c[0], c[1], c[2], c[3]);}' % (", ".join(map(str, c)), ", ".join(map(str, k)))
        for c, k, _ in golden.KNOWN_ANSWERS
    )
    source = tmp_path / "philox.cpp"
    source.write_text(f'#include <cstdio>\n#include "{CSRC / "philox.h"}"\nint main() {{ {calls} }}\n')
    subprocess.run([compiler, "-std=c++17", source, "-o", tmp_path / "philox"], check=True)
    printed = subprocess.run([tmp_path / "philox"], check=True, capture_output=True, text=True).stdout
    assert [tuple(map(int, line.split())) for line in printed.splitlines()] == [w for _, _, w in golden.KNOWN_ANSWERS]


# Including the thresholds next to 0 and 2^32, and probabilities that round to them (ties to even).
PROBABILITIES = (0.0, 2**-33, 2**-32, 0.3, 0.5, 2 / 3, 1 - 2**-32, 1 - 2**-33, 1.0)
if SLOW:  # one for each threshold that a kernel sees
    PROBABILITIES = (0.0, 2**-32, 0.5, 2 / 3, 1 - 2**-32, 1 - 2**-33)


@pytest.mark.parametrize("drop_prob", PROBABILITIES)
def test_masks_are_those_of_the_reference(drop_prob: float) -> None:
    # More elements than 2^16, so that a threshold compared in float32 would show at 0.3 and 2/3.
    for batch, width, seed in ((1, 1, -5), (7, 3, 2**40 + 7), (33, 1031, -(2**62))):
        rows = torch.arange(2 * batch, 4 * batch)
        expected = reference.random_words(rows, width, seeded(seed)) >= round(drop_prob * 2**32)
        for _ in each_instruction_set():
            options = {"gaussian": 1, "dropout": 2, "sigma": 1.0, "tau": 1.0, "drop_prob": drop_prob}
            out = OPS.augment_latent(torch.ones(batch, width), seeded(seed), **options)
            assert torch.equal(out[2 * batch :].bool(), expected)
            # The backward pass draws the same masks: the two copies have weights that no sum confuses.
            upstream = torch.tensor([0.0, 0.0, 1.0, 2.0]).repeat_interleave(batch)[:, None].expand(-1, width)
            grad = OPS.augment_latent_backward(upstream, seeded(seed), gaussian=1, dropout=2, drop_prob=drop_prob)
            assert torch.equal(grad, expected[:batch].float() + 2 * expected[batch:].float())


@functools.cache
def many_normals() -> tuple[Tensor, dict[str, Tensor]]:
    """1,049,595 normals in float64, and those of the kernel on every instruction set."""
    batch, width = 101 if SLOW else 1015, 1034 + 1  # the interpreter: all of them in tests/triton
    expected = reference.random_normals(torch.arange(batch, 2 * batch), width, seeded(-(2**40)))
    options = {"gaussian": 1, "dropout": 0, "sigma": 1.0, "tau": 1e30, "drop_prob": 0.0}
    x = torch.zeros(batch, width)
    return expected, {
        instruction_set: OPS.augment_latent(x, seeded(-(2**40)), **options)[batch:]
        for instruction_set in each_instruction_set()
    }


def test_a_million_normals() -> None:
    expected, instruction_sets = many_normals()
    assert expected.numel() > (1e5 if SLOW else 1e6)
    for drawn in instruction_sets.values():
        error = (drawn.double() - expected).abs()
        assert error.max() < 1e-6
        # 1e-6 is the promise across backends. On a CPU: six roundings, of a logarithm, a root, a sine and products.
        assert kernel_backend.chosen or (error <= 6 * 2**-24 * expected.abs()).all()


def test_clipped_normals_follow_their_law() -> None:
    # Kolmogorov-Smirnov over the whole law, atoms at +-tau included: both one-sided limits at every value.
    sigma, tau, batch, width = 0.7, 1.0, 500, 1001
    options = {"gaussian": 1, "dropout": 0, "sigma": sigma, "tau": tau, "drop_prob": 0.0}
    for _ in each_instruction_set():
        drawn = OPS.augment_latent(torch.zeros(batch, width), seeded(2026), **options)[batch:].double()
        values, counts = drawn.flatten().unique(return_counts=True)
        assert values[0] == -tau
        assert values[-1] == tau
        below = torch.from_numpy(stats.norm.cdf(values.numpy() / sigma))
        below[0] = 0.0  # P(X < -tau)
        upto = torch.from_numpy(stats.norm.cdf(values.numpy() / sigma))
        upto[-1] = 1.0  # P(X <= tau)
        seen = counts.cumsum(0) / drawn.numel()
        distance = max((seen - upto).abs().max().item(), (seen - counts / drawn.numel() - below).abs().max().item())
        assert stats.kstwobign.sf(math.sqrt(drawn.numel()) * distance) > 1e-3


# --- values and gradients --------------------------------------------------------------------------------

WIDTHS = (1, 2, 3, 5, 15, 16, 17, 63, 64, 65, 511, 512, 513, 1000)


def half_step(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """At most half the distance of two neighbours in ``dtype``, the error of one rounding; 0 for float32."""
    facts = torch.finfo(dtype)
    return expected.abs().clamp(min=facts.tiny) * (0.0 if dtype == torch.float32 else facts.eps / 2)


def own_result(x: Tensor, seed: Tensor, options: dict[str, Any]) -> Tensor:
    """PyTorch's own: in float32, but a product with a dense basis on a GPU in the type of ``x``."""
    own = reference.augment_latent(x.float(), seed, **options)
    if kernel_backend.chosen and isinstance(options["basis"], Tensor):
        gaussian = slice(len(x), (1 + options["gaussian"]) * len(x))
        noise = reference.augment_latent(torch.zeros_like(x), seed, **{**options, "basis": None})[gaussian]
        own[gaussian] = (x.repeat(options["gaussian"], 1) + noise @ options["basis"].to(x.dtype).T).float()
    return own


@given(
    batch=st.sampled_from([0, 1, 3, 5]),
    width=st.sampled_from(WIDTHS),
    gaussian=st.integers(0, 3),
    dropout=st.integers(0, 3),
    sigma=st.sampled_from([0.0, 0.3, 2.0]),
    tau=st.sampled_from([0.5, 1.0, math.inf]),
    drop_prob=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    rescale=st.booleans(),
    kind=st.sampled_from(["none", "normalized", "orthogonal", "hadamard"]),
    basis_dtype=st.sampled_from([torch.float32, torch.float64, *NARROW]),
    dtype=st.sampled_from(DRAWN_DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    upstream=st.sampled_from(["random", "transposed", "sum"]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
@settings(max_examples=100)
def test_values_and_gradient(
    batch: int,
    width: int,
    kind: str,
    basis_dtype: torch.dtype,
    dtype: torch.dtype,
    layout: str,
    upstream: str,
    seed: int,
    rescale: bool,
    **numbers: Any,
) -> None:
    torch.manual_seed(seed)  # so that Hypothesis can repeat an example
    basis = a_basis(kind, width)
    if isinstance(basis, Tensor):
        basis = basis.to(basis_dtype)
    options = {**numbers, "basis": basis, "rescale_dropout": rescale}
    x = LAYOUTS[layout](torch.randn(batch, width).to(dtype))
    exact_x = x.double().requires_grad_()
    exact = reference.augment_latent(exact_x, seeded(seed), **options)
    own_error = (own_result(x, seeded(seed), options).double() - exact).abs()
    allowed = own_error.max().item() if exact.numel() else 0.0
    # 1e-6 is what normals may differ by; a rescaled copy may be 10 x.
    allowed = allowed + 1e-6 * exact.abs().clamp(min=1) + half_step(exact, dtype)

    grad = torch.randn(exact.shape).to(dtype)
    if upstream == "transposed":
        grad = grad.t().contiguous().t()
    elif upstream == "sum":
        grad = torch.ones_like(grad)
    (exact_grad,) = torch.autograd.grad(exact, exact_x, grad.double(), retain_graph=True)
    (summed,) = torch.autograd.grad(exact, exact_x, grad.double().abs())
    # A float32 sum of n terms and their scale: 2 n roundings, of 2^-24 of the terms' sum at most.
    allowed_grad = 2 * (1 + numbers["gaussian"] + numbers["dropout"]) * 2**-24 * summed + half_step(exact_grad, dtype)

    for _ in each_instruction_set():
        leaf = x.detach().requires_grad_()
        result = batchkern.augment_latent(leaf, seed=seed, **options)
        assert result.dtype == dtype
        assert torch.equal(result[:batch], x)
        assert_within(result, exact, allowed)
        if upstream == "sum":
            result.sum().backward()  # a gradient of stride 0
        else:
            result.backward(grad)
        assert leaf.grad.dtype == dtype
        assert_within(leaf.grad, exact_grad, allowed_grad)


@pytest.mark.skipif(SLOW, reason="too slow in the interpreter: tests/triton has smaller parts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_noise_of_a_dense_basis_that_is_made_in_parts(dtype: torch.dtype) -> None:
    # Its buffer holds 2^22 floats, 16384 rows of 256: these are 16500, and a part ends within the third copy.
    batch, gaussian, width, seed = 5500, 3, 256, -9
    x, basis = torch.randn(batch, width).to(dtype), a_basis("normalized", width)
    options = {"gaussian": gaussian, "dropout": 1, "sigma": 0.5, "tau": 0.6, "drop_prob": 0.3}
    out = batchkern.augment_latent(x, seed=seed, basis=basis, **options)
    ends = [batch, batch + 1, batch + 16383, batch + 16384, 4 * batch - 1]
    rows = torch.tensor([*ends, *range(batch, 4 * batch, 101)])
    noise = (0.5 * reference.random_normals(rows, width, seeded(seed))).clamp(-0.6, 0.6)
    expected = x[rows % batch].double() + noise @ basis.double().T
    own_error = (noise.float() @ basis.T - noise @ basis.double().T).abs().max()  # of torch's matmul
    assert_within(out[rows], expected, own_error + 2**-23 * expected.abs() + half_step(expected, dtype))
    kept = reference.random_words(torch.arange(4 * batch, 5 * batch), width, seeded(seed)) >= round(0.3 * 2**32)
    assert torch.equal(out[4 * batch :], x * kept)


# --- 16-bit types: conversions ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_value_is_loaded_and_stored_as_it_is(dtype: torch.dtype) -> None:
    for values in (patterns(dtype).view(256, 256), patterns(dtype)[:-3].view(1, -1)):  # and a remainder of a vector
        for _ in each_instruction_set():
            out = OPS.augment_latent(values, seeded(1), dropout=1, drop_prob=0.0, **NO_NOISE)
            assert_identical(out[len(values) :], values)


def test_subnormal_halves_survive_flush_denormal() -> None:
    # They are normal numbers in float32, and torch's own conversion keeps them.
    values = patterns(torch.float16).view(256, 256)
    if not torch.set_flush_denormal(True):
        pytest.skip("not supported on this processor")
    for _ in each_instruction_set():
        out = OPS.augment_latent(values, seeded(1), dropout=1, drop_prob=0.0, **NO_NOISE)
        assert_identical(out[256:], values)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_products_round_as_torch_rounds(dtype: torch.dtype) -> None:
    # times 3/2: every odd mantissa is a tie, subnormal ones too, and 43680 lands on 65520, the first half to overflow.
    values = patterns(dtype).view(256, 256)
    expected = (values.float() * 1.5).to(dtype)
    words = reference.random_words(torch.arange(256, 512), 256, seeded(4)) >= round(2**32 / 3)
    for _ in each_instruction_set():
        options = {"dropout": 1, "drop_prob": 1 / 3, "rescale_dropout": True, **NO_NOISE}
        out = OPS.augment_latent(values, seeded(4), **options)[256:]
        assert_identical(out[words], expected[words])
        assert words.float().mean() > 0.6


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("sigma", [1e-8, 1.0, 1e30] if SLOW else [1e-8, 3e-6, 1e-3, 1.0, 1e30])
def test_sums_with_noise_round_as_torch_rounds(dtype: torch.dtype, sigma: float) -> None:
    values = patterns(dtype).view(256, 256)
    options = {"gaussian": 1, "dropout": 0, "sigma": sigma, "tau": 1e38, "drop_prob": 0.0}
    for _ in each_instruction_set():
        noise = OPS.augment_latent(torch.zeros(256, 256), seeded(4), **options)[256:]
        out = OPS.augment_latent(values, seeded(4), **options)[256:]
        assert_identical(out, (values.float() + noise).to(dtype))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_sums_of_gradients_round_as_torch_rounds(dtype: torch.dtype) -> None:
    a = patterns(dtype)
    finite = torch.where(a.isfinite(), a.float(), 1.0)
    half_ulp = torch.exp2(torch.floor(torch.log2(finite.abs().clamp(min=torch.finfo(dtype).tiny)))) / 2
    tie = (half_ulp * torch.finfo(dtype).eps).to(dtype)  # a + tie lies halfway between a and its neighbour
    for b in (tie, -tie, a[torch.randperm(len(a))], a.neg(), torch.full_like(a, torch.finfo(dtype).max)):
        c = a[torch.randperm(len(a))]
        for terms in ((a, b), (a, b, c)):
            stacked = torch.stack(terms)
            expected = functools.reduce(Tensor.add, (t.float() for t in terms)).to(dtype) + 0.0  # no -0 from a sum
            for _ in each_instruction_set():
                got = OPS.augment_latent_backward(stacked, seeded(1), gaussian=len(terms) - 1, dropout=0, drop_prob=0.0)
                assert_identical(got[0], expected)


# --- autocast, generators, threads, compiler -------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", NARROW, ids=str)
@pytest.mark.parametrize("kind", ["none", "normalized", "hadamard"])
def test_autocast_changes_nothing(dtype: torch.dtype, autocast: torch.dtype, kind: str) -> None:
    x = torch.randn(6, 8).to(dtype)
    results = []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=autocast, enabled=enabled):
            out = batchkern.augment_latent(leaf, seed=3, basis=a_basis(kind, 8), **PLAIN)
            out.square().sum().backward()
        results.append((out.detach(), leaf.grad))
    for plain, inside in zip(*results, strict=True):
        assert inside.dtype == dtype
        assert torch.equal(plain, inside)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_manual_seed_governs_and_one_number_is_drawn(dtype: torch.dtype) -> None:
    x = torch.randn(6, 10).to(dtype)
    torch.manual_seed(5)
    first, second = (batchkern.augment_latent(x, **PLAIN) for _ in range(2))
    state = torch.get_rng_state()
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    numbers = [int(torch.randint(-(2**63), 2**63 - 1, ())) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    for number, result in zip(numbers, (first, second), strict=True):
        assert torch.equal(batchkern.augment_latent(x, seed=number, **PLAIN), result)


@ORDERED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["none", "hadamard", "normalized"])
def test_threads_and_repeats_change_no_bit(dtype: torch.dtype, kind: str) -> None:
    x = torch.randn(70, 513).to(dtype)  # 350 rows out, of which a thread takes no fewer than 7
    upstream = torch.randn(5 * 70, 513).to(dtype)
    results: dict[int, list[tuple[Tensor, Tensor]]] = {1: [], 2: []}
    for threads, seen in results.items():
        torch.set_num_threads(threads)
        for _ in range(REPEATS):
            leaf = x.clone().requires_grad_()
            out = batchkern.augment_latent(leaf, seed=6, basis=a_basis(kind, 513), **PLAIN)
            out.backward(upstream)
            seen.append((out.detach(), leaf.grad))
    for seen in results.values():
        for out, grad in seen[1:]:
            assert_identical(out, seen[0][0])
            assert_identical(grad, seen[0][1])
    (out, grad), (out2, grad2) = results[1][0], results[2][0]
    assert_identical(grad2, grad)
    if kind != "normalized":
        assert_identical(out2, out)
    else:  # torch's matmul may split its sums another way
        torch.testing.assert_close(out2.double(), out.double(), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["none", "normalized", "hadamard"])
def test_compiled_equals_eager_bit_for_bit(dtype: torch.dtype, kind: str) -> None:
    torch.compiler.reset()  # or the cases would count as recompilations of one function
    x, basis, weight = torch.randn(5, 6).to(dtype), a_basis(kind, 6), torch.randn(25, 6).to(dtype)

    def step(x: Tensor) -> Tensor:
        return batchkern.augment_latent(x, basis=basis, seed=-12, rescale_dropout=True, **PLAIN)

    results = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        out.backward(weight)
        results.append((out.detach(), leaf.grad))
    for compiled, eager in zip(*results, strict=True):
        assert_identical(compiled, eager)
