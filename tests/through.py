"""Runs the tests of the operations, whose tensors are the CPU's, through CUDA kernels: ``pytest --through host|cuda``.

``host``: compiled by a C++ compiler with the headers of ``cuda_on_host``, which run a grid on the host.
``cuda``: on a GPU. Each tensor is copied there with all of its storage, so that strides and addresses stay what they
are, and the results are copied back.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
OPS = (
    "trimmed_cross_entropy",
    "trimmed_cross_entropy_backward",
    "trimmed_cross_entropy_backward_",
    "trimmed_mean",
    "trimmed_mean_backward",
    "rank_batches",
)

which: str | None = None
"""What ``start`` was called with."""

_overrides = torch.library.Library("batchkern", "IMPL")


def start(name: str) -> None:
    global which
    import batchkern._backend  # the schemas

    assert batchkern._backend.extension is not None, batchkern._backend.extension_error
    which = name
    # Whatever a kernel should write is NaN, or the largest number, before: an element that it leaves out shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if name == "host":
        load_host_kernels()
    for op in OPS:
        overload = getattr(torch.ops.batchkern, op).default
        _overrides.impl(op, (on_host if name == "host" else on_gpu)(overload), "CPU")


def load_host_kernels() -> None:
    """Builds and loads a library that registers CUDA kernels which take CPU tensors."""
    from torch.utils import cpp_extension  # which says that it found no GPU

    folder = ROOT / "tests" / "cuda_on_host"
    sources = [folder / "runner.cpp", folder / "library.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] * (
        "libasan" in os.environ.get("LD_PRELOAD", "")
    )
    build = ROOT / "build" / ("cuda-on-host-sanitized" if sanitize else "cuda-on-host")
    build.mkdir(parents=True, exist_ok=True)
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
