"""Which implementation serves an operation, and what is said about it."""

from __future__ import annotations

import importlib.abc
import importlib.metadata
import importlib.util
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import batchkern
from batchkern import _backend, reference

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")

CALLS = {
    "cross_entropy": lambda: batchkern.cross_entropy(torch.randn(4, 3), torch.arange(4) % 3, reduction="none"),
    "select_rows": lambda: batchkern.select_rows(torch.randn(4), 0.5),
    "trimmed_cross_entropy": lambda: batchkern.trimmed_cross_entropy(torch.randn(4, 3), torch.arange(4) % 3, 0.5),
    "trimmed_mean": lambda: batchkern.trimmed_mean(torch.randn(4), 0.5),
    "linear_cross_entropy": lambda: batchkern.linear_cross_entropy(
        torch.randn(4, 2), torch.randn(3, 2), torch.arange(4) % 3, reduction="none"
    ),
    "linear_trimmed_cross_entropy": lambda: batchkern.linear_trimmed_cross_entropy(
        torch.randn(4, 2), torch.randn(3, 2), torch.arange(4) % 3, 0.5
    ),
    "augment_latent": lambda: batchkern.augment_latent(
        torch.randn(4, 3), gaussian=1, dropout=1, sigma=1.0, tau=1.0, drop_prob=0.5, seed=1
    ),
    "soft_label_kl": lambda: batchkern.soft_label_kl(torch.randn(2, 3), torch.randn(4, 3)),
    "rank_batches": lambda: batchkern.rank_batches(torch.randn(4), 0.5),
}


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry without kernels, for this test alone."""
    monkeypatch.setattr(_backend, "_kernels", set())


def statuses() -> dict[tuple[str, str], _backend.Status]:
    return {(s.op, s.device): s for s in _backend.status()}


def forbid(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    monkeypatch.setattr(reference, op, lambda *_, **__: pytest.fail(f"reference.{op} ran"))


def test_every_operation_is_covered() -> None:
    assert set(CALLS) == set(_backend.OPS)
    for op in _backend.OPS:
        assert callable(getattr(reference, op))
        assert op in batchkern.__all__
    assert len(_backend.status()) == len(_backend.OPS) * len(_backend.DEVICES)


NO_KERNEL = "this release has no kernel for it"
WITHOUT_CUDA = "batchkern._C was built without CUDA: install an nvcc (see README), and then batchkern again"


def extension_built_for(*architectures: str, problem: str = "") -> types.ModuleType:
    module = types.ModuleType("_C")
    module.instruction_set = lambda: "avx2"
    module.asked = []
    module.cuda_problem = lambda device: (module.asked.append(device), problem)[1]
    module.build_facts = lambda: {"cuda": bool(architectures), "cuda_architectures": list(architectures)}
    return module


@pytest.mark.parametrize(
    ("extension", "cpu", "cuda", "in_triton"),
    [
        (None, *3 * ["undefined symbol: _ZN3c10"]),
        (extension_built_for(), NO_KERNEL, WITHOUT_CUDA, "triton is not installed"),
        (extension_built_for("9.0"), NO_KERNEL, NO_KERNEL, "triton is not installed"),
    ],
    ids=["no extension", "without CUDA", "with CUDA"],
)
def test_without_kernels_everything_is_the_reference(
    no_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    extension: types.ModuleType | None,
    cpu: str,
    cuda: str,
    in_triton: str,
) -> None:
    monkeypatch.setattr(_backend, "extension", extension)
    monkeypatch.setattr(_backend, "extension_error", "" if extension else "undefined symbol: _ZN3c10")
    monkeypatch.setattr(_backend, "triton_error", in_triton)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for (op, device), status in statuses().items():
        why = cpu if device == "cpu" else in_triton if op in ("augment_latent", "soft_label_kl") else cuda
        assert (status.backend, status.why) == ("reference", why)


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    """A process that has met no CUDA tensor yet, where all GPUs are of this capability, or there is none."""
    with FakeTensorMode():  # where there is no driver, tensors that pretend to be on a GPU ask none from here on
        pass
    monkeypatch.setattr(_backend, "_supported", {})
    monkeypatch.setattr(_backend, "_warned", False)
    _backend._driver_problem.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)  # which would look for a GPU


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["8.0", "9.0+PTX"], (8, 0), True),
        (["8.0", "9.0+PTX"], (8, 9), True),  # machine code of 8.0
        (["8.0", "9.0+PTX"], (7, 5), False),
        (["8.0", "9.0+PTX"], (12, 0), True),  # PTX of 9.0
        (["8.0", "9.0"], (12, 0), False),
        (["8.6"], (8, 0), False),
        (["9.0+PTX"], (8, 9), False),
        (["10.0"], (10, 3), True),
        ([], (9, 0), False),
    ],
)
def test_which_devices_a_build_runs_on(
    monkeypatch: pytest.MonkeyPatch, architectures: list[str], capability: tuple[int, int], runs: bool
) -> None:
    monkeypatch.setattr(_backend, "extension", extension_built_for(*architectures))
    assert _backend.built_for(capability) is runs


@pytest.mark.parametrize("capability", [None, (7, 5), (9, 0)])
def test_a_device_that_the_build_does_not_serve_gets_the_reference(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None
) -> None:
    monkeypatch.setattr(_backend, "extension", extension_built_for("8.0", "9.0+PTX"))
    monkeypatch.setattr(_backend, "_kernels", {("trimmed_mean", "cuda")})
    pretend(monkeypatch, capability)
    status = statuses()["trimmed_mean", "cuda"]
    with FakeTensorMode(), warnings.catch_warnings():
        x = torch.empty(4, device="cuda")
        warnings.simplefilter("ignore")
        assert _backend.has_kernel("trimmed_mean", x) is (capability != (7, 5))
        assert not _backend.has_kernel("trimmed_mean", x.double())
        assert not _backend.has_kernel("rank_batches", x)
    if capability == (7, 5):
        assert status.backend == "reference"
        assert status.why == (
            "CUDA C++ for 8.0, 9.0+PTX, and this device is 7.5: "
            "set TORCH_CUDA_ARCH_LIST=7.5 and install batchkern again"
        )
    else:
        assert status.backend == "kernel"
        assert status.why.startswith("CUDA C++ for 8.0, 9.0+PTX")
        assert status.why.endswith("no CUDA device is visible to this torch") is (capability is None)


@pytest.mark.parametrize(("capability", "backend"), [(None, "kernel"), ((7, 5), "reference"), ((8, 0), "kernel")])
def test_triton_needs_no_cuda_in_the_build(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, backend: str
) -> None:
    monkeypatch.setattr(_backend, "extension", extension_built_for())
    monkeypatch.setattr(_backend, "_kernels", {("soft_label_kl", "cuda")})
    pretend(monkeypatch, capability)
    status = statuses()["soft_label_kl", "cuda"]
    assert status.backend == backend
    why = {None: "; no CUDA device is visible to this torch", (7, 5): ", and this device is 7.5: it needs 8.0"}
    assert status.why == f"Triton {importlib.metadata.version('triton')}{why.get(capability, '')}"
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert _backend.has_kernel("soft_label_kl", torch.empty(4, device="cuda")) is (backend == "kernel")


TOOLCHAIN = "the provided PTX was compiled with an unsupported toolchain."


def test_a_driver_that_cannot_load_the_kernels_is_asked_once_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = extension_built_for("9.0+PTX", problem=TOOLCHAIN)
    monkeypatch.setattr(_backend, "extension", extension)
    monkeypatch.setattr(_backend, "_kernels", {(op, "cuda") for op in _backend.OPS})
    pretend(monkeypatch, (12, 0))
    assert statuses()["rank_batches", "cuda"] == _backend.Status(
        "rank_batches",
        "cuda",
        "reference",
        "CUDA C++ for 9.0+PTX, and this device is 12.0, whose driver says 'the provided PTX was compiled with an "
        "unsupported toolchain': update the driver, or set TORCH_CUDA_ARCH_LIST=12.0 and install batchkern again",
    )
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for device in ("cuda:1", "cuda:0", "cuda:1"):
            x = torch.empty(4, device=device)
            assert not _backend.has_kernel("rank_batches", x)
            assert not _backend.has_kernel("trimmed_mean", x)
            assert _backend.has_kernel("soft_label_kl", x)  # what Triton compiled, this driver did not see
    assert extension.asked == [0, 1]


REFERENCE_RUNS = [
    ("rank_batches", None, set(), "", "batchkern._C is not there: install batchkern again"),
    ("soft_label_kl", None, set(), "", "batchkern._C is not there: install batchkern again"),
    ("rank_batches", extension_built_for(), set(), "", WITHOUT_CUDA),
    ("soft_label_kl", extension_built_for(), set(), "triton is not installed", "triton is not installed"),
    (
        "trimmed_mean",
        extension_built_for("8.0"),
        {("trimmed_mean", "cuda")},
        "",
        "CUDA C++ for 8.0, and this device is 9.0: set TORCH_CUDA_ARCH_LIST=9.0 and install batchkern again",
    ),
    (
        "trimmed_mean",
        extension_built_for("9.0", problem="no kernel image"),
        {("trimmed_mean", "cuda")},
        "",
        "whose driver says 'no kernel image': update the driver, "
        "or set TORCH_CUDA_ARCH_LIST=9.0 and install batchkern again",
    ),
]


@pytest.mark.parametrize(
    ("op", "extension", "kernels", "triton_error", "why"),
    REFERENCE_RUNS,
    ids=["no extension", "nor Triton", "no nvcc", "no Triton", "no machine code", "old driver"],
)
def test_a_cuda_tensor_that_a_build_would_have_served_warns_once(
    monkeypatch: pytest.MonkeyPatch,
    op: str,
    extension: types.ModuleType | None,
    kernels: set[tuple[str, str]],
    triton_error: str,
    why: str,
) -> None:
    monkeypatch.setattr(_backend, "extension", extension)
    monkeypatch.setattr(_backend, "extension_error", "batchkern._C is not there: install batchkern again")
    monkeypatch.setattr(_backend, "triton_error", triton_error)
    monkeypatch.setattr(_backend, "_kernels", kernels)
    call = {
        "rank_batches": lambda x: batchkern.rank_batches(x, 0.5),
        "trimmed_mean": lambda x: batchkern.trimmed_mean(x, 0.5),
        "soft_label_kl": lambda x: batchkern.soft_label_kl(x.reshape(2, 2), x.reshape(2, 2)),
    }[op]
    pretend(monkeypatch, (9, 0))
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = torch.empty(4, device="cuda")
        call(x.double())  # the reference's, whatever was built
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            _backend.has_kernel(op, x)  # nothing is computed
        with monkeypatch.context() as patch:
            patch.setattr(torch.version, "cuda", None)
            if op == "rank_batches" and extension is not None:  # no nvcc would change that
                call(x)
                _backend._supported.clear()
        assert not caught
        call(x)
        (warning,) = caught
        call(x)
        call(torch.empty(4, device="cuda:1"))
        batchkern.rank_batches(x, 0.5)
    assert caught == [warning]
    assert warning.category is UserWarning
    assert warning.filename == __file__
    text = str(warning.message)
    assert text.startswith(f"batchkern.{op} has no kernel for cuda:0 and runs as plain PyTorch")
    assert f"{why}. " in text


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_the_compiler_asks_the_device_as_well(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(_backend, "extension", extension_built_for("9.0"))
    monkeypatch.setattr(_backend, "_kernels", {("rank_batches", "cuda")})
    pretend(monkeypatch, capability)
    # For batchkern alone: the compiler would look for the GPU.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sys._getframe(1).f_globals is vars(_backend))

    def served(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if _backend.has_kernel("rank_batches", x) else x.sum()

    graphs: list[torch.fx.GraphModule] = []
    torch.compiler.reset()  # or the other capability's graph would be found again
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = torch.empty(4, device="cuda")
        compiled = torch.compile(
            served, backend=lambda graph, _: (graphs.append(graph), graph.forward)[1], fullgraph=True
        )
        results = [compiled(x) for _ in range(2)]
    assert len(graphs) == 1
    assert [result.dim() for result in results] == 2 * [int(capability == (9, 0))]
    ours = [str(warning.message) for warning in caught if "batchkern.rank_batches" in str(warning.message)]
    assert len(ours) == int(capability == (7, 5))


@pytest.mark.parametrize(
    ("cuda", "spec", "compiler", "why"),
    [
        (None, object(), "/gcc", f"torch {torch.__version__} was built without CUDA"),
        ("13.0", None, "/gcc", "triton is not installed: install it"),
        (
            "13.0",
            object(),
            None,
            "Triton needs a C compiler when it runs, but found none (CC, gcc or clang): install one",
        ),
        ("13.0", object(), "/gcc", ""),
    ],
)
def test_when_triton_kernels_are_registered(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, spec: object, compiler: str | None, why: str
) -> None:
    calls: list[str] = []
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(_backend.shutil, "which", lambda name: compiler)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(_backend.triton, "register", lambda: calls.append("registered"))
    assert _backend._register_triton() == why
    assert calls == ["registered"] * (not why)


def test_a_triton_of_another_name_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert _backend._triton_version() == "Triton"


@pytest.mark.skipif(bool(_backend.triton_error), reason=_backend.triton_error)
def test_triton_is_imported_by_the_first_call_and_serves_every_operator() -> None:
    program = """
import sys, torch, batchkern
from batchkern import _backend, triton as ours
assert "triton" not in sys.modules
for operator, module in ours.KERNELS.items():
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"batchkern::{operator}", "CUDA"), operator
assert {op for op, device in _backend._kernels if device == "cuda"} >= set(ours.OPS)
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
try:
    torch.ops.batchkern.soft_label_kl.default.redispatch(cuda, torch.zeros(2, 3).double(), torch.zeros(2, 3).double())
except TypeError as error:
    assert "float64" in str(error)
assert "triton" in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("op", _backend.OPS)
def test_without_kernels_the_reference_is_called(no_kernels: None, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    calls = []
    real = getattr(reference, op)
    monkeypatch.setattr(reference, op, lambda *args, **kwargs: (calls.append(op), real(*args, **kwargs))[1])
    CALLS[op]()
    assert calls[0] == op  # linear_trimmed_cross_entropy calls another


@pytest.mark.parametrize("op", _backend.OPS)
def test_a_cpu_kernel_serves_every_operation(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    # So that a kernel that is missing from the build cannot hide behind the reference.
    torch.manual_seed(1)
    result = CALLS[op]()
    status = statuses()[op, "cpu"]
    assert (status.backend, status.why) == ("kernel", f"C++, {_backend.extension.instruction_set()}")
    with monkeypatch.context() as patch:
        patch.setattr(_backend, "_kernels", set())
        torch.manual_seed(1)
        torch.testing.assert_close(result, CALLS[op](), rtol=1e-5, atol=1e-6)
    forbid(monkeypatch, op)
    CALLS[op]()


def test_float64_and_other_devices_have_no_kernel() -> None:
    assert _backend.has_kernel("rank_batches", torch.empty(0))
    assert not _backend.has_kernel("rank_batches", torch.empty(0, dtype=torch.float64))
    assert not _backend.has_kernel("rank_batches", torch.empty(0, device="meta"))
    assert batchkern.rank_batches(torch.empty(5, device="meta"), 0.5).device.type == "meta"


@pytest.mark.parametrize("kind", ["normalized", "orthogonal", "hadamard", None])
def test_no_operation_reads_a_value_on_a_gpu(kind: str | None) -> None:
    # Fake tensors have a device and a shape but no values: a check or a branch on one raises here.
    with FakeTensorMode(), torch.device("cuda"):
        logits, target = torch.empty(8, 5, requires_grad=True), torch.empty(8, dtype=torch.int64)
        keep = torch.empty((), dtype=torch.float64)
        losses = logits[:, 0]
        basis = None if kind is None else batchkern.random_basis(5, kind)
        ledger = batchkern.BatchLedger(8, "cuda")
        ledger.update(target, losses)
        ledger.update(3, 2.5)
        options = {"gaussian": 1, "dropout": 1, "sigma": 1.0, "tau": 1.0, "drop_prob": 0.5}
        results = [
            batchkern.trimmed_cross_entropy(logits, target, keep, label_smoothing=0.1, class_weight=torch.empty(5)),
            batchkern.trimmed_cross_entropy(logits * 1, target, 0.5, inplace_backward=True),
            batchkern.TrimmedCrossEntropyLoss(keep)(logits, target),
            batchkern.trimmed_mean(losses, keep, mask=target > 0),
            batchkern.linear_trimmed_cross_entropy(logits, torch.empty(7, 5), target, keep, bias=torch.empty(7)),
            batchkern.augment_latent(logits, basis=basis, **options),
            batchkern.augment_latent(logits, seed=1, **options),
            batchkern.soft_label_kl(logits, torch.empty(16, 5), reference_grad=True),
            batchkern.rank_batches(losses, 0.5),
            ledger.rank(0.5),
        ]
    assert all(result.device.type == "cuda" for result in results)


# --- import ----------------------------------------------------------------------------------------------


class Broken(importlib.abc.MetaPathFinder):
    """Makes the import of ``batchkern._C`` fail, whether it was built or not."""

    def __init__(self, error: ImportError) -> None:
        self.error = error

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "batchkern._C":
            raise self.error


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ModuleNotFoundError("No module named 'batchkern._C'", name="batchkern._C"), "No module named 'batchkern._C'"),
        (ImportError("_C.so: undefined symbol: _ZN3c10\nand a second line"), "_C.so: undefined symbol: _ZN3c10"),
        (ImportError(), "ImportError"),
    ],
    ids=["absent", "broken", "silent"],
)
def test_the_reason_for_a_missing_extension(monkeypatch: pytest.MonkeyPatch, error: ImportError, why: str) -> None:
    monkeypatch.setattr(sys, "meta_path", [Broken(error), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "batchkern._C", raising=False)
    monkeypatch.delattr(batchkern, "_C", raising=False)
    spec = importlib.util.spec_from_file_location("batchkern._backend_again", _backend.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, again)  # dataclasses look their module up
    spec.loader.exec_module(again)
    assert again.extension is None
    for status in again.status():
        assert status.backend == "reference"
        assert status.why == f"batchkern._C could not be imported ({why}): install batchkern again"


PROGRAM = """
import sys
sys.modules["batchkern._C"] = None  # importing it raises ModuleNotFoundError
import torch, batchkern
from batchkern import _backend
assert batchkern.trimmed_cross_entropy(torch.zeros(2, 2), torch.tensor([0, 1]), 1.0) > 0.69
assert {s.backend for s in _backend.status()} == {"reference"}
"""


def test_import_works_without_the_extension() -> None:
    result = warm.run("-c", PROGRAM, cwd=ROOT)
    assert result.returncode == 0, result.stderr
