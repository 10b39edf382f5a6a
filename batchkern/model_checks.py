"""Checks of a model by a pass over a few rows: its logits, and the smallest batch that it can train on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from batchkern.data.labelled import rows_of
from batchkern.errors import UserError
from batchkern.validation import check_kind


def check_model_kind(model: nn.Module | str) -> None:
    """Checks that a model is a name, or a module whose weights have values."""
    check_kind("model", model, nn.Module | str, "a module or the name of one")
    held = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else ()
    if any(value.is_meta or isinstance(value, UninitializedParameter) for value in held):
        raise UserError("model has weights without values (on the meta device, or of lazy modules): initialise them")


def described_inputs(inputs: Any) -> str:
    """A description of the inputs of a batch, such as "images of shape (3, 32, 32)"."""
    if not isinstance(inputs, Tensor):
        return f"inputs of type {type(inputs).__name__}"
    shape = tuple(inputs.shape[1:])
    kind = f", {inputs.dtype}" if inputs.dtype != torch.float32 else ""
    return f"{'images' if len(shape) == 3 else 'inputs'} of shape {shape}{kind}"


def check_model(model: nn.Module, inputs: Any, classes: int | None, places: tuple[int, ...]) -> int:
    """Checks that a model fits the data and has trainable weights; returns its number of classes."""
    found = check_logits(model, inputs, classes, places)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("the model has no weights to train: none takes a gradient")
    return found


def check_logits(model: nn.Module, inputs: Any, classes: int | None, places: tuple[int, ...]) -> int:
    """Runs two rows through a model, to check at once that it fits the data; returns its number of classes.

    Args:
        inputs: the inputs of two rows.
        classes: number of classes of the data, if known.
        places: shape of one target: () for a label, or the shape of a mask.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(inputs)
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"the model cannot take {described_inputs(inputs)}: {reason}") from error
    finally:
        model.train(training)
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(found, tuple) or len(found) < 2 or found != (2, classes or found[1], *places):
        wanted = ", ".join(map(str, ("batch", classes or "classes", *places)))
        raise UserError(f"the model must give logits of shape ({wanted}), got {found} for a batch of 2")
    return found[1]


def _in_training(model: nn.Module, inputs: Any, device: torch.device) -> Any:
    """The model's output in training mode, without changing its buffers or torch's generators."""
    training = model.training
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return torch.func.functional_call(model, buffers, (inputs,))
    finally:
        model.train(training)


def least_rows(
    model: nn.Module,
    inputs: Any,
    classes: int,
    places: tuple[int, ...],
    device: torch.device,
    world: int,
    batch_size: int,
) -> int:
    """The smallest training batch over all ``world`` ranks. If the model cannot train on a single row, for example
    because of batch norm, it is so large that every rank has at least two rows.

    Raises:
        UserError: a batch has fewer rows, or the model does not return logits in training.
    """
    for rows in (1, 2):
        try:
            logits = _in_training(model, rows_of(inputs, torch.arange(rows)), device)
            break
        except Exception as error:  # torch.nn.functional.batch_norm raises a ValueError
            if rows == 2:
                reason = str(error).partition("\n")[0] or type(error).__name__
                raise UserError(f"the model cannot take {described_inputs(inputs)} in training: {reason}") from error
    if not isinstance(logits, Tensor) or logits.shape != (rows, classes, *places) or not logits.is_floating_point():
        got = f"{logits.dtype} of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        wanted = ", ".join(map(str, ("batch", classes, *places)))
        raise UserError(
            f"the model must give float logits of shape ({wanted}) in training, too, got {got} for a batch of {rows}"
        )
    if not logits.requires_grad:
        raise UserError("the model's logits in training have no gradient: is it detached, or within no_grad?")
    least = 1 if rows == 1 else world + 1
    if batch_size < least:
        raise UserError(
            f"batch_size is {batch_size}, but the model (perhaps its batch norm) needs {least} rows for these inputs: "
            "more than one in each process"
        )
    return least


def uses_all_parameters(model: nn.Module, inputs: Any) -> bool:
    """Whether the logits depend on every trainable parameter."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    model.eval()
    try:
        logits = model(inputs)
        return None not in torch.autograd.grad(logits.sum(), trained, allow_unused=True)
    finally:
        model.train(training)
