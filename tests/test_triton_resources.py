"""That tools/triton_resources.py compiles what is launched, reads it rightly, and refuses what it should."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "triton_resources.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("triton_resources", SCRIPT)
    module = sys.modules["triton_resources"] = importlib.util.module_from_spec(spec)  # where dataclass looks for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("ptx", "widths"),
    [
        ("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", [16]),
        (
            "ld.global.L1::evict_last.L2::cache_hint.v4.b32 {%r1}, [%rd1], %rd2; ld.global.b16 { %rs1 }, [ %rd2 ];",
            [16, 2],
        ),
        (
            "ld.global.v2.b64 { %rd1, %rd2 }, [ %rd3 ]; ld.shared.v4.b32 {%r1}, [%r2]; st.global.v4.b32 [%rd1], {%r1};",
            [16],
        ),
    ],
)
def test_widths_of_loads(script: ModuleType, ptx: str, widths: list[int]) -> None:
    assert [int(vector or 1) * int(bits) // 8 for vector, bits in script.LOADS.findall(ptx)] == widths


SCALED = ["scale_gradient"] * 2


@pytest.mark.parametrize(
    ("case", "launched"),
    [
        (
            ("soft_label_kl", 1000, torch.float32),
            ["whole_rows, rows 1, columns 1024", "reference_gradient, columns 1024", *SCALED],
        ),
        (
            ("soft_label_kl", 9001, torch.bfloat16),
            ["reference_rows, sets 8", "swept_rows, sets 8, threads 1024", "reference_gradient", *SCALED],
        ),
        (("augment_latent", 64, torch.float16, "dense"), ["rows, dense True, rows 32, columns 64"]),
        (("augment_latent", 64, torch.float16, "hadamard"), ["rows, dense False", "hadamard_rows, rows 64, a 1, b 64"]),
        (
            ("augment_latent", 20_000, torch.float32, "hadamard"),
            ["rows, dense False", "hadamard_rows, rows 1, a 64, b 128, whole False", "sum_of_pieces, n 8192"],
        ),
    ],
)
def test_what_a_call_launches_is_compiled(script: ModuleType, case: tuple, launched: list[str]) -> None:
    kernels = script.inspect((script.Case(*case), 90))
    assert len(kernels) == len(launched)
    for kernel, start in zip(kernels, launched, strict=True):
        assert kernel.name.startswith(start)
        assert 16 <= kernel.registers <= 255
        assert not kernel.complaint()


@pytest.mark.parametrize(
    ("width", "dtype", "widest"),
    [
        (1000, torch.float32, 16),
        (1000, torch.bfloat16, 16),
        (20, torch.float32, 16),
        (302, torch.float32, 8),
        (300, torch.bfloat16, 8),
        (302, torch.float16, 4),
        (301, torch.float16, 2),
    ],
    ids=str,
)
def test_loads_are_as_wide_as_rows_allow(script: ModuleType, width: int, dtype: torch.dtype, widest: int) -> None:
    # Triton's own hint is for multiples of 16 elements, which these are not.
    (copies,) = script.inspect((script.Case("augment_latent", width, dtype, "none"), 90))
    assert copies.allowed == widest
    assert copies.load == max(widest, 8), copies  # a seed has 8
    divergences, *_ = script.inspect((script.Case("soft_label_kl", width, dtype), 90))
    assert divergences.load == divergences.allowed == widest, divergences


def compilations(script: ModuleType, monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> set[str]:
    """What a call would have Triton compile, each as Triton tells it from the others."""
    from triton import knobs

    found = set()

    def note(*, key: str, fn: Any, **_: Any) -> bool:
        found.add(f"{fn.name} {key}")
        return True  # it need not be compiled

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", note)
    with script.compiled(80):  # no other test has compiled for it
        call()
    return found


@pytest.mark.parametrize("width", [64, 61, 9008, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_tensors_begin_decides_between_two_compilations(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, width: int, dtype: torch.dtype
) -> None:
    from batchkern.triton import augment_latent, soft_label_kl

    seeds, signs = torch.zeros(2, dtype=torch.int64), torch.ones(width + 1)
    flat = torch.zeros(6 * width + 1, dtype=dtype)
    copies = {"gaussian": 1, "dropout": 1, "drop_prob": 0.5}
    bases = {None: None, "dense": torch.zeros(1).expand(width, width), "signs": signs[:width], "shifted": signs[1:]}

    def augment(begin: int, seed: int, basis: str | None) -> set[str]:
        x = flat[begin:][: 2 * width].view(2, width)
        grad = flat[begin:][: 6 * width].view(6, width)

        def call() -> None:
            augment_latent.augment_latent(x, seeds[seed], sigma=1.0, tau=1.0, basis=bases[basis], **copies)
            augment_latent.augment_latent_backward(grad, seeds[seed], **copies)

        return compilations(script, monkeypatch, call)

    def divergence(p_begin: int, q_begin: int) -> set[str]:
        p, q = flat[p_begin:][: 2 * width].view(2, width), flat[q_begin:][: 4 * width].view(4, width)
        return compilations(script, monkeypatch, lambda: soft_label_kl.soft_label_kl(p, q, reference_grad=True))

    aligned = width % 8 == 0
    for begin in (0, 1):
        assert {s.data_ptr() % 16 for s in seeds} == {0, 8}
        for basis, same in ((None, None), ("dense", "dense"), ("signs", "shifted")):
            first = augment(begin, 0, basis)
            assert first
            assert augment(begin, 1, same) == first
    for basis in bases:
        assert (augment(0, 0, basis) == augment(1, 0, basis)) is not aligned
    anywhere = divergence(1, 1)
    assert divergence(0, 1) == divergence(1, 0) == anywhere
    assert (divergence(0, 0) == anywhere) is not aligned


def test_complaints(script: ModuleType) -> None:
    good = script.Kernel("rows", 90, "", registers=40, shared=0, stack=0, load=16, allowed=16, speed=None)
    assert not good.complaint()
    assert not replace(good, allowed=2, load=2).complaint()
    assert "8 bytes of stack" in replace(good, stack=8).complaint()
    assert "no load of 16 bytes, but of 8" in replace(good, load=8).complaint()


def test_machine_code_is_held_to_the_worst_of_the_table(script: ModuleType) -> None:
    found = [
        kernel
        for dtype in (torch.float32, torch.float16)
        for kernel in script.inspect((script.Case("augment_latent", 64, dtype, "none"), 90))
    ]
    (name,) = {replace(kernel, name=kernel.name.partition(", vector")[0]).name for kernel in found}
    kernels = [replace(kernel, name=name) for kernel in found]
    before = script.table(kernels)
    assert script.slower(kernels, before) == []
    most = max(kernel.speed.barriers for kernel in kernels)
    assert most > 0
    better = replace(kernels[0], speed=replace(kernels[0].speed, barriers=0))
    assert script.slower([better], before) == []
    worse = replace(kernels[0], speed=replace(kernels[0].speed, barriers=most + 1))
    assert script.slower([worse], before) == [f"sm_90: {name}: barriers {most + 1}, was {most}"]


def test_every_configuration_of_the_launchers_is_among_the_cases(script: ModuleType) -> None:
    from batchkern.triton import augment_latent, soft_label_kl

    widths = {
        (op, basis): {case.width for case in script.cases() if (case.op, case.basis) == (op, basis)}
        for op, basis in {(case.op, case.basis) for case in script.cases()}
    }
    tiles = {augment_latent._tile(width) for width in range(1, 5000)}
    for key in (("augment_latent", "none"), ("augment_latent", "dense"), ("augment_latent_backward", "")):
        for aligned in (True, False):
            assert {augment_latent._tile(w) for w in widths[key] if (w % 8 == 0) is aligned} == tiles
    for aligned in (True, False):
        swept = [w for w in widths["soft_label_kl", ""] if (w % 8 == 0) is aligned]
        assert {(w - 1).bit_length() for w in swept if 8 < w <= soft_label_kl.ONE_TILE} == set(range(4, 14))
        for size in (2, 4):
            long = {w * size > soft_label_kl.SHORT for w in swept if w > soft_label_kl.ONE_TILE}
            assert long == {True, False}
        pieces = [w for w in widths["augment_latent", "hadamard"] if (w % 8 == 0) is aligned]
        assert {(w - 1).bit_length() for w in pieces if 8 < w <= augment_latent.WIDEST} == set(range(4, 14))
        padded = {(w - 1) // augment_latent.WIDEST + 1 for w in pieces if w > augment_latent.WIDEST}
        assert {2, 4, 8, 16} <= padded
