"""Runs the tests of the operations, whose tensors are the CPU's, through GPU kernels: ``pytest --kernels ...``.

``host``: those in CUDA C++, compiled by a C++ compiler with the headers of ``cuda_on_host``, which run a grid on the
host. ``interpreter``: those in Triton, by its interpreter. Not with bfloat16, which that computes wrongly without a
word. ``cuda``: all, on a GPU. Each tensor is copied there with all of its storage, so that strides and addresses stay
what they are, and the results are copied back.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import batchkern.triton

ROOT = Path(__file__).resolve().parents[1]
CUDA_OPS = (
    "cross_entropy",
    "cross_entropy_backward",
    "trimmed_cross_entropy",
    "trimmed_cross_entropy_backward",
    "trimmed_cross_entropy_backward_",
    "cross_entropy_losses",
    "cross_entropy_backward_",
    "trimmed_mean",
    "trimmed_mean_backward",
    "rank_batches",
)

chosen: str | None = None
"""What ``start`` was called with."""
host_library: Path | None = None
"""What was loaded for ``host``."""

_overrides = torch.library.Library("batchkern", "IMPL")


def start(name: str) -> None:
    global chosen
    import batchkern._backend  # the schemas

    assert batchkern._backend.extension is not None, batchkern._backend.extension_error
    chosen = name
    kernels: dict[str, Callable[..., Any]]
    if name == "interpreter":
        kernels = interpreted_kernels()
    elif name == "host":
        load_host_kernels()
        kernels = {op: on_host(overload(op)) for op in CUDA_OPS}
    else:
        kernels = {op: on_gpu(overload(op)) for op in (*CUDA_OPS, *batchkern.triton.KERNELS)}
        kernels["soft_label_kl"] = with_wide_gradient(kernels["soft_label_kl"])
    for op, kernel in kernels.items():
        _overrides.impl(op, kernel, "CPU")
    # Whatever a kernel should write is NaN, or the largest number, before: an element that it leaves out shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def overload(op: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.batchkern, op).default


def interpreted_kernels() -> dict[str, Callable[..., Any]]:
    """The launchers, for the interpreter takes tensors of any device."""
    assert "triton" not in sys.modules, "Triton looks at TRITON_INTERPRET when it is imported"
    os.environ["TRITON_INTERPRET"] = "1"
    np.seterr(over="ignore", invalid="ignore")  # it computes with NumPy, and infinities are meant
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        # Up to Triton 3.7 this is int(data), which a NumPy that refuses arrays of one element breaks.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor

    # NumPy adds pairwise, as a GPU does, along what lies side by side alone: sums of joined tensors would lose digits.
    def add(self: Any, x: Any) -> Any:
        total = np.ascontiguousarray(np.moveaxis(x.handle.data, self.axis, -1)).sum(-1, dtype=x.handle.data.dtype)
        return self.to_tensor(np.expand_dims(total, self.axis) if self.keep_dims else total, x.dtype)

    whole = interpreter.ReduceOps.sum
    interpreter.ReduceOps.sum = lambda self, x: whole(self, x) if self.axis is None else add(self, x)

    # Every call of a function within a kernel looks through all of triton.language once more for what to replace, which
    # takes a third of the time, and leaves it replaced. This looks once for each launch, in every module that has any.
    everything = SimpleNamespace(__globals__={"tl": interpreter.tl, "core": interpreter.tl.core})
    patch_lang = interpreter._patch_lang
    interpreter._patch_lang = lambda kernel: patch_lang(everything)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    return {op: batchkern.triton.launcher(op) for op in batchkern.triton.KERNELS}


def load_host_kernels() -> None:
    """Builds and loads a library that registers CUDA kernels which take CPU tensors."""
    global host_library
    from torch.utils import cpp_extension  # which says that it found no GPU

    folder = ROOT / "tests" / "cuda_on_host"
    sources = [folder / "runner.cpp", folder / "library.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] * (
        "libasan" in os.environ.get("LD_PRELOAD", "")
    )
    build = ROOT / "build" / ("cuda-on-host-sanitized" if sanitize else "cuda-on-host")
    build.mkdir(parents=True, exist_ok=True)
    host_library = build / "cuda_on_host.so"
    cpp_extension.load(
        "cuda_on_host",
        [str(source) for source in sources],
        extra_cflags=["-O1", "-g1", "-fvisibility=hidden", "-Wno-unknown-pragmas", *sanitize],
        extra_ldflags=sanitize,
        extra_include_paths=[str(folder / "include")],
        build_directory=str(build),
        with_cuda=False,
        is_python_module=False,
    )


def on_host(op: torch._ops.OpOverload) -> Callable[..., Any]:
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return lambda *args, **kwargs: op.redispatch(cuda, *args, **kwargs)


def with_wide_gradient(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Float32 as on a CPU, where the GPU keeps the gradient of bfloat16 logits in bfloat16."""

    def call(*args: Any, **kwargs: Any) -> Any:
        mean, kl, to_virtual, to_reference = kernel(*args, **kwargs)
        return mean, kl, to_virtual.float(), to_reference

    return call


def on_gpu(op: torch._ops.OpOverload) -> Callable[..., Any]:
    def move(x: Any, storages: dict[int, Tensor]) -> Any:
        if not isinstance(x, Tensor):
            return x
        storage = x.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = torch.tensor(storage, dtype=torch.uint8).cuda()
        there = storages[storage.data_ptr()].untyped_storage()
        return torch.empty(0, dtype=x.dtype, device="cuda").set_(there, x.storage_offset(), x.shape, x.stride())

    def call(*args: Any, **kwargs: Any) -> Any:
        storages: dict[int, Tensor] = {}
        moved = [move(x, storages) for x in args]
        results = op(*moved, **{name: move(x, storages) for name, x in kwargs.items()})
        for argument, x, there in zip(op._schema.arguments, args, moved, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                x.copy_(there)
        if isinstance(results, tuple):
            return tuple(x.cpu() for x in results)
        return None if results is None else results.cpu()

    return call
