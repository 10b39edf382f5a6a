"""The memory that the launches of a stream share: allocated once, not by PyTorch, and all zeros between launches.

Run by ``pytest --kernels host``: the device on the host counts allocations, fills them with bytes other than zero, and
lets a test choose the stream.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import kernel_backend
import pytest
import torch

if kernel_backend.chosen != "host":
    pytest.skip("needs --kernels host", allow_module_level=True)

import batchkern
from batchkern import reference


class Device(ctypes.Structure):
    """``cuda_on_host::Device``"""

    _fields_ = (
        ("stream", ctypes.c_int64),
        ("capturing", ctypes.c_int),
        ("refusals", ctypes.c_int),
        ("allocations", ctypes.c_int),
        ("emptied", ctypes.c_int),
        ("error", ctypes.c_int),
        ("mode", ctypes.c_int),
        ("newest", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
    )


STREAMS = iter(range(100, 1000))  # streams without launches so far


@pytest.fixture
def device() -> Iterator[Device]:
    """The device, with a new stream that has had no launches."""
    library = ctypes.CDLL(str(kernel_backend.host_library))
    library.cuda_on_host_device.restype = ctypes.POINTER(Device)
    device = library.cuda_on_host_device().contents
    device.stream = next(STREAMS)
    yield device
    device.stream = device.capturing = device.refusals = 0


def check_all() -> None:
    """Runs operations that use each part of a workspace: selections by several blocks, and the tickets of rows."""
    losses = torch.randn(20_000).mul(50).round()
    kept, _ = reference.select(losses, torch.ones_like(losses, dtype=torch.bool), 0.3)
    torch.testing.assert_close(batchkern.trimmed_mean(losses, 0.3), losses[kept].mean())
    assert torch.equal(batchkern.rank_batches(losses, 1e-3), reference.rank_batches(losses, 20))
    for rows, classes in ((1000, 10), (2, 20_000)):
        logits, target = torch.randn(rows, classes), torch.randint(classes, (rows,))
        loss = batchkern.trimmed_cross_entropy(logits, target, 0.5)
        torch.testing.assert_close(loss, reference.trimmed_cross_entropy(logits, target, 0.5)[0])


def test_a_stream_has_one_workspace_that_stays_all_zeros(device: Device) -> None:
    before, first = device.allocations, device.stream
    check_all()
    check_all()
    assert device.allocations == before + 1
    assert not any(ctypes.string_at(device.newest, device.bytes))
    device.stream = next(STREAMS)
    check_all()
    assert device.allocations == before + 2
    assert not any(ctypes.string_at(device.newest, device.bytes))
    device.stream = first
    check_all()
    assert device.allocations == before + 2


def test_a_captured_launch_takes_memory_of_its_graph(device: Device) -> None:
    before, device.capturing = device.allocations, 1
    check_all()
    assert device.allocations == before


def test_memory_that_pytorch_holds_is_asked_for_once(device: Device) -> None:
    emptied, device.refusals = device.emptied, 1
    check_all()
    assert device.emptied == emptied + 1
    assert device.error == 0  # no later call finds it
    device.stream, device.refusals = next(STREAMS), 2
    with pytest.raises(RuntimeError, match="CUDA error 2"):
        check_all()
    device.refusals = 0
    check_all()
