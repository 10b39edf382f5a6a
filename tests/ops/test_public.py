"""__torch_function__: subclasses of Tensor and modes see calls of the operations, as those of F.cross_entropy."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operations import ARGUMENTS, OPERATIONS, operations
from torch import Tensor
from torch.overrides import TorchFunctionMode

import batchkern
from batchkern import Rows

seen: list[Any] = []


def watch(function: Any) -> None:
    if not torch.compiler.is_compiling():
        seen.append(function)


class Plain(Tensor):
    """All that a subclass must have."""


class Watched(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        watch(func)
        return super().__torch_function__(func, types, args, kwargs)


class Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        watch(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    seen.clear()


@pytest.mark.parametrize("cls", [Plain, Watched])
@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_a_subclass_sees_the_call_and_is_the_result(name: str, argument: str, cls: type[Tensor]) -> None:
    function, tensors = operations()[name]
    expected = function(**tensors)
    result = function(**tensors | {argument: tensors[argument].as_subclass(cls)})
    assert type(result) is cls
    assert torch.equal(result.as_subclass(Tensor), expected)
    assert [f for f in seen if f is not Tensor.as_subclass] == [getattr(batchkern, name)] * (cls is Watched)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_mode_sees_the_call_alone(name: str) -> None:
    function, tensors = operations()[name]
    with Watching():
        result = function(**tensors)
    assert seen == [getattr(batchkern, name)]
    assert torch.equal(result, function(**tensors))


@pytest.mark.parametrize("name", OPERATIONS)
def test_arguments_by_place_are_looked_at(name: str) -> None:
    function, tensors = operations()[name]
    first, *others = tensors.items()
    function(first[1].as_subclass(Watched), **dict(others))
    assert seen == [getattr(batchkern, name)]


def test_rows_and_pairs_are_of_the_subclass() -> None:
    logits, target = torch.randn(6, 4), torch.randint(4, (6,))
    rows = batchkern.cross_entropy(logits.as_subclass(Plain), target, stats=True)
    assert type(rows) is Rows
    assert [type(x) for x in rows] == [Plain] * 4
    for a, b in zip(rows, batchkern.cross_entropy(logits, target, stats=True), strict=True):
        assert torch.equal(a.as_subclass(Tensor), b)
    pair = batchkern.trimmed_cross_entropy(logits.as_subclass(Plain), target, 0.5, per_sample=True)
    assert [type(x) for x in pair] == [Plain, Plain]


def test_rows_are_made_by_name_by_place_and_of_an_iterable() -> None:
    by_place = Rows(*torch.arange(4))
    for rows in (Rows(**by_place._asdict()), Rows(iter(by_place)), pickle.loads(pickle.dumps(by_place))):
        assert rows == by_place
        assert type(rows) is Rows
    with pytest.raises(TypeError, match="missing"):
        Rows(loss=by_place.loss)


def test_the_gradient_reaches_what_a_subclass_was_made_of() -> None:
    leaf, target = torch.randn(6, 4, requires_grad=True), torch.randint(4, (6,))
    batchkern.cross_entropy(leaf.as_subclass(Watched), target).backward()
    assert type(leaf.grad) is Tensor
    torch.testing.assert_close(leaf.grad, *torch.autograd.grad(F.cross_entropy(leaf, target), leaf))


def test_a_subclass_may_answer_in_the_place_of_the_operation() -> None:
    class Answering(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return "mine" if func is batchkern.rank_batches else NotImplemented

    losses = torch.randn(4).as_subclass(Answering)
    assert batchkern.rank_batches(losses, 0.5) == "mine"
    with pytest.raises(TypeError, match=r"no implementation found for 'batchkern\.ops\.trimmed_mean\.select_rows'"):
        batchkern.select_rows(losses, 0.5)


@pytest.mark.parametrize("kind", [Plain, Watched, "mode", "device"])
def test_within_the_compiler(kind: Any) -> None:
    logits, target = torch.randn(6, 4), torch.randint(4, (6,))
    expected = batchkern.cross_entropy(logits, target, reduction="none")
    compiled = torch.compile(
        lambda z: batchkern.cross_entropy(z, target, reduction="none"), fullgraph=True, backend="eager"
    )
    if isinstance(kind, str):
        with Watching() if kind == "mode" else torch.device("cpu"):
            result = compiled(logits)
    else:
        result = compiled(logits.as_subclass(kind)).as_subclass(Tensor)
    assert torch.equal(result, expected)


def test_a_parameter_is_a_tensor() -> None:
    result = batchkern.trimmed_mean(torch.nn.Parameter(torch.randn(4)), 0.5)
    assert type(result) is Tensor
    assert result.requires_grad
