"""What no operation can read: tensors whose memory was freed, DTensors, nested and masked tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from operations import ARGUMENTS, OPERATIONS, B, C, operations
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

import batchkern
from batchkern import _backend

needs_module = pytest.mark.skipif(_backend.extension is None, reason="the compiled module looks at storages")

# --- memory ------------------------------------------------------------------------------------------------------


@needs_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fewer", ["none", "one less"])
@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_a_tensor_that_was_freed_is_named(name: str, argument: str, fewer: str, dtype: torch.dtype) -> None:
    function, tensors = operations(dtype)[name]
    storage = tensors[argument].untyped_storage()
    size = 0 if fewer == "none" else storage.nbytes() - 1
    storage.resize_(size)
    words = rf"^{argument} must have its values in memory, got shape \(.*\) with a storage of {size} bytes"
    with pytest.raises(ValueError, match=words):
        function(**tensors)


@needs_module
def test_a_view_needs_what_its_last_element_needs() -> None:
    whole = torch.randn(B, 2 * C)
    logits, target = whole[::2, C:], torch.arange(B // 2) % C
    expected = batchkern.cross_entropy(logits, target)
    last = 4 * (6 * 2 * C + 2 * C)  # of the row before the last one of whole
    whole.untyped_storage().resize_(last)
    assert torch.equal(batchkern.cross_entropy(logits, target), expected)
    whole.untyped_storage().resize_(last - 1)
    with pytest.raises(ValueError, match="logits must have its values in memory"):
        batchkern.cross_entropy(logits, target)
    assert batchkern.trimmed_mean(torch.ones(1).expand(100), 0.5) == 1  # one element stands for all
    assert batchkern.rank_batches(torch.empty(0), 0.5).shape == (0,)


@needs_module
@pytest.mark.parametrize("cls", [torch.nn.Parameter, type("Plain", (Tensor,), {})])
def test_a_parameter_or_a_subclass_that_was_freed_is_named(cls: type[Tensor]) -> None:
    losses = cls(torch.randn(B)) if cls is torch.nn.Parameter else torch.randn(B).as_subclass(cls)
    losses.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="losses must have its values in memory"):
        batchkern.trimmed_mean(losses, 0.5)


@needs_module
def test_operators_and_backward_passes_name_it_too() -> None:
    logits, target = torch.randn(B, C, requires_grad=True), torch.arange(B) % C
    loss = batchkern.cross_entropy(scaled := logits * 1, target)
    scaled.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"logits must have its values in memory, got \[8, 5\] with a storage of 0"):
        loss.backward()
    with pytest.raises(ValueError, match="losses must have its values in memory"):
        torch.ops.batchkern.rank_batches(freed(torch.randn(B)), 3)
    with pytest.raises(ValueError, match="virtual_logits must have its values in memory"):
        torch.ops.batchkern.soft_label_kl(torch.randn(B, C), freed(torch.randn(B, C)))
    with pytest.raises(ValueError, match="mask must have its values in memory"):
        torch.ops.batchkern.trimmed_mean(torch.randn(B), 0.5, mask=freed(torch.ones(B).bool()))


@needs_module
@pytest.mark.parametrize("argument", ["hidden", "weight", "target"])
@pytest.mark.parametrize("call", ["rows", "mean", "trimmed", "trimmed twice"])
def test_backward_passes_of_the_linear_operations_name_it(call: str, argument: str) -> None:
    leaves = torch.randn(B, 16, requires_grad=True), torch.randn(C, 16, requires_grad=True)
    tensors = {"hidden": leaves[0] * 1, "weight": leaves[1] * 1, "target": torch.arange(B) % C}
    if "trimmed" in call:
        loss = batchkern.linear_trimmed_cross_entropy(**tensors, keep=0.9 if "twice" in call else 0.3)
    else:
        loss = batchkern.linear_cross_entropy(**tensors, reduction="none" if call == "rows" else "mean").sum()
    if "twice" in call:  # the first time the forward pass has made the gradient
        loss.backward(retain_graph=True)
    freed(tensors[argument])
    with pytest.raises(ValueError, match=rf"^{argument} must have its values in memory, got shape"):
        loss.backward()


def freed(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize("name", OPERATIONS)
def test_tensors_without_memory_of_their_own_are_served(name: str) -> None:
    function, tensors = operations()[name]
    expected = function(**tensors)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert function(**{key: mode.from_tensor(x) for key, x in tensors.items()}).shape == expected.shape
    on_meta = {key: freed(x.to("meta")) for key, x in tensors.items()}
    assert function(**on_meta).shape == expected.shape


# --- tensors that are none -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _one_process() -> Iterator[None]:
    if not dist.is_gloo_available():
        pytest.skip("needs gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Own(DTensor):
    """A subclass of one that cannot be read."""


def unserved(kind: str, x: Tensor) -> Tensor:
    if kind == "MaskedTensor":
        return torch.masked.masked_tensor(x, torch.ones_like(x, dtype=torch.bool))
    if "DTensor" in kind:
        sharded = distribute_tensor(x, init_device_mesh("cpu", (1,)), [Replicate()])
        if kind != "DTensor":
            sharded.__class__ = Own
        return sharded
    return torch.nested.nested_tensor([x, x], layout=torch.jagged if kind == "jagged" else torch.strided)


@pytest.mark.parametrize("kind", ["DTensor", "subclass of DTensor", "MaskedTensor", "jagged", "nested"])
@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
@pytest.mark.usefixtures("_one_process")
def test_the_error_says_what_to_give_instead(name: str, argument: str, kind: str) -> None:
    function, tensors = operations()[name]
    x = tensors[argument]
    if kind in ("jagged", "nested") and x.dim() == 0:
        pytest.skip("there are none without a dimension")
    if name.startswith("linear") and argument in ("weight", "bias") and kind == "DTensor":
        pytest.skip("these are gathered")
    with pytest.raises(TypeError, match=rf"^{argument} must be an ordinary tensor, got a .*: (call|give) "):
        function(**tensors | {argument: unserved(kind, x)})
