"""What a training is given, checked and turned into what it runs with; and described for its config.json."""

from __future__ import annotations

import math
import numbers
import os
import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from batchkern import schedules
from batchkern.data import ImageData, TensorImages
from batchkern.errors import UserError, whole
from batchkern.models import frozen_statistics, has_batch_norm

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
AMP_TYPES: dict[str, torch.dtype | None] = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = ("sgd", "adam", "adamw")


def check_counts(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None:
            count(name, value)


def count(name: str, value: int, least: int | None = 1) -> int:
    """``value``, which may be NumPy's, as Python's."""
    number = whole(value)
    if number is None or (least is not None and not least <= number < 2**63):
        limit = "" if least is None else f" of at least {least}"
        raise UserError(f"{name} must be a whole number{limit}, got {value!r}")
    return number


def check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> float:
    """``value``, which may be NumPy's, as Python's."""
    number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and low <= number <= high):
        raise UserError(f"{name} must be in {'(' if open_low else '['}{low:g}, {high:g}], got {value!r}")
    if open_low and number == low:
        raise UserError(f"{name} must be above {low:g}, got {value!r}")
    return number


def check_choice(name: str, value: object, allowed: Iterable[str], *, function: bool = False) -> None:
    if not (isinstance(value, str) and value in allowed):
        raise UserError(f"{name} must be one of {', '.join(allowed)}{' or a function' * function}, got {value!r:.60}")


def check_kind(name: str, value: object, kind: Any, what: str) -> None:
    """``kind``: as of isinstance."""
    if not isinstance(value, kind):
        raise UserError(f"{name} must be {what}, got {value!r:.60}")


def check_flags(**flags: bool) -> None:
    for name, value in flags.items():
        check_kind(name, value, bool, "True or False")


def check_one_process() -> None:
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise UserError(
            f"WORLD_SIZE is {world}: a comparison runs in one process, and its jobs side by side; "
            "torchrun is for batchkern train"
        )


def check_data(train: ImageData, test: ImageData, batch_size: int) -> None:
    for name, data in (("train", train), ("test", test)):
        check_kind(name, data, ImageData, "labelled images, as batchkern.data.load gives them")
    if test.shape != train.shape:
        raise UserError(f"test images are of shape {test.shape}, training images of shape {train.shape}")
    if test.classes != train.classes:
        raise UserError(f"test data have {len(test.classes)} classes that are not the {len(train.classes)} of training")
    if len(train) < batch_size:
        raise UserError(
            f"batch_size is {batch_size}, but {train.name} has {len(train)} samples; it must be at most that"
        )


def pick_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise UserError(f"device must be cpu, cuda or cuda:N, got {device!r:.60}") from None
    if picked.type not in ("cpu", "cuda"):
        raise UserError(f"device must be cpu, cuda or cuda:N, got {str(device)!r}")
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {device}, but this torch ({torch.__version__}) sees no CUDA device")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device is {device}, but torch sees {torch.cuda.device_count()} CUDA devices, counted from 0")
    return picked


def check_rates(lr: float, momentum: float, weight_decay: float) -> tuple[float, float, float]:
    """As Python's numbers."""
    most = torch.finfo(torch.float32).max
    return (
        check_range("lr", lr, 0, most, open_low=True),
        check_range("momentum", momentum, 0, 1),
        check_range("weight_decay", weight_decay, 0, most),
    )


def build_optimizer(
    optimizer: str | OptimizerFactory,
    parameters: list[nn.Parameter],
    lr: float,
    momentum: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    if callable(optimizer):
        built = optimizer(parameters)
        if not isinstance(built, torch.optim.Optimizer):
            raise UserError(f"optimizer must return a torch.optim.Optimizer, got a {type(built).__name__}")
        return built
    check_choice("optimizer", optimizer, OPTIMIZERS, function=True)
    if optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if momentum == 1:
        raise UserError(f"momentum must be below 1 for {optimizer}, where it is the first beta, got {momentum!r}")
    cls = torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW
    return cls(parameters, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: an option is missing or of another type, which torch would only notice in the next update.
    """
    for own, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for name, value in own.items():
            if type(saved.get(name)) is not type(value):
                raise ValueError(
                    f"{name} of the optimizer is {saved.get(name)!r:.40}, not of type {type(value).__name__}"
                )
    optimizer.load_state_dict(state)


def pick_schedule(schedule: str | schedules.RateSchedule) -> schedules.RateSchedule:
    if callable(schedule):
        factor = schedule(0.0)
        check_kind("what schedule returns", factor, numbers.Real, "a factor on the learning rate")
        return schedule
    check_choice("schedule", schedule, schedules.RATES, function=True)
    return schedules.RATES[schedule]()


def check_model_kind(model: nn.Module | str) -> None:
    """A name, or a module whose weights have values."""
    check_kind("model", model, nn.Module | str, "a module or the name of one")
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    if any(parameter.is_meta or isinstance(parameter, UninitializedParameter) for parameter in parameters):
        raise UserError("model has weights without values, as on the meta device or of lazy modules: give them some")


def check_model(model: nn.Module, shape: tuple[int, int, int], classes: int, device: torch.device) -> None:
    """Runs two black images through, so that a model that does not fit the data says so before training."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *shape, device=device, dtype=torch.float32))
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"the model cannot take images of shape {shape}: {reason}") from error
    finally:
        model.train(training)
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"the model must give logits of shape (batch, {classes}), got {got} for a batch of 2")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("the model has no weights to train: none takes a gradient")


def least_rows(model: nn.Module, shape: tuple[int, int, int], device: torch.device, world: int, batch_size: int) -> int:
    """The fewest rows that a batch of all ``world`` ranks may have in training: such that none has one alone, where
    batch norm cannot do with one.

    Raises:
        UserError: a batch has fewer.
    """
    if not has_batch_norm(model):
        return 1
    training = model.training
    model.train()
    try:
        drawn_from = [device] if device.type == "cuda" else []
        with torch.no_grad(), frozen_statistics(model), torch.random.fork_rng(drawn_from):
            model(torch.zeros(1, *shape, device=device, dtype=torch.float32))
        return 1
    except ValueError:  # of torch.nn.functional.batch_norm
        least = world + 1
    finally:
        model.train(training)
    if batch_size < least:
        raise UserError(
            f"batch_size is {batch_size}, but the model's batch norm needs {least} rows for these images: "
            "more than one in each process"
        )
    return least


def uses_all_parameters(model: nn.Module, shape: tuple[int, int, int], device: torch.device) -> bool:
    """Whether every parameter that trains has a part in the logits."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    model.eval()
    try:
        logits = model(torch.zeros(2, *shape, device=device, dtype=torch.float32))
        return None not in torch.autograd.grad(logits.sum(), trained, allow_unused=True)
    finally:
        model.train(training)


def describe_data(data: ImageData) -> dict[str, Any]:
    return {
        "name": data.name,
        "rows": len(data),
        "classes": len(data.classes),
        "shape": list(data.shape),
        "labels_crc32": zlib.crc32(data.labels.numpy().data),
        # Streamed images are too many to read before each training.
        "images_crc32": zlib.crc32(data.images.contiguous().numpy().data) if isinstance(data, TensorImages) else None,
    }


def describe_model(model: nn.Module | str) -> str:
    if isinstance(model, str):
        return model
    return f"{type(model).__name__} with {sum(p.numel() for p in model.parameters())} parameters"


def describe_choice(choice: str | Callable[..., Any]) -> str:
    """A name, or a function's; without an address, which is another in the process that resumes the run."""
    if isinstance(choice, str):
        return choice
    return getattr(choice, "__qualname__", None) or re.sub(r" at 0x[0-9a-fA-F]+", "", repr(choice))
