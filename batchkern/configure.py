"""What a training is given, checked and turned into what it runs with; and described for its config.json."""

from __future__ import annotations

import inspect
import math
import numbers
import os
import re
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from batchkern import schedules
from batchkern.data import DatasetData, ImageData, Labelled, StreamedImages, TensorData, TensorImages
from batchkern.data.labelled import rows_of
from batchkern.errors import UserError, whole

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
        limit += " and below 2**63" if number is not None and number >= 2**63 else ""
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


def check_number(name: str, value: Any) -> float:
    """``value``; a number that is neither ``int`` nor ``float``, such as one of NumPy, as ``float``."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        number = float(value) if real else math.nan
    except OverflowError:  # a whole number with some 300 digits
        number = math.nan
    if math.isnan(number):
        raise UserError(f"{name} must be a number, got {value!r:.60}")
    return value if type(value) in (int, float) else number


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


def check_same_kind(name: str, data: Labelled, train: Labelled) -> None:
    """Images are normalised, and other inputs taken as they are."""
    if isinstance(data, ImageData) != isinstance(train, ImageData):
        kinds = ["uint8 images" if isinstance(part, ImageData) else "other inputs" for part in (data, train)]
        raise UserError(f"{name} has {kinds[0]}, but the training set has {kinds[1]}: both must be of one kind")
    if isinstance(data, DatasetData):
        check_standardized(name, data, train.statistics() is not None)
    places = [places_of(part) for part in (data, train)]
    if places[0] != places[1]:
        shapes = [f"({', '.join(map(str, ('N', *part)))}{',' * (not part)})" for part in places]
        raise UserError(f"{name} has labels of shape {shapes[0]}, but those of the training set are {shapes[1]}")


def check_standardized(name: str, data: Labelled, standardized: bool) -> None:
    """A dataset's rows are taken as they are."""
    if standardized and isinstance(data, DatasetData):
        raise UserError(
            f"{name} is the dataset {data.name}, whose rows are taken as they are, but the training set is "
            "standardised: give a pair of tensors in place of the dataset"
        )


def places_of(data: Labelled) -> tuple[int, ...]:
    """Of one target: none, or those of a mask."""
    if isinstance(data, DatasetData):
        return data.places
    return () if data.labels is None else tuple(data.labels.shape[1:])


def check_data(train: Labelled, test: Labelled, batch_size: int) -> None:
    check_same_kind("test", test, train)
    if test.shape != train.shape:
        what = "images" if isinstance(test, ImageData) else "inputs"
        raise UserError(f"test {what} are of shape {test.shape}, training {what} of shape {train.shape}")
    if test.classes != train.classes:
        counts = [len(data.classes) if data.classes else "no named" for data in (test, train)]
        raise UserError(f"test data have {counts[0]} classes that are not the {counts[1]} of training")
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


def check_knobs(
    max_grad_norm: float | None, ema_decay: float | None, compile: str | None, model: nn.Module | str
) -> tuple[float | None, float | None]:
    """The first two, as Python's numbers."""
    most = torch.finfo(torch.float32).max
    if max_grad_norm is not None:
        max_grad_norm = check_range("max_grad_norm", max_grad_norm, 0, most, open_low=True)
    if ema_decay is not None:
        ema_decay = check_range("ema_decay", ema_decay, 0, 1, open_low=True)
        if ema_decay == 1:
            raise UserError("ema_decay must be below 1, where the average would stay what it was, got 1")
    if hasattr(model, "_orig_mod"):  # its keys would have another prefix
        raise UserError("model is compiled already: give the module itself, and compile='inductor'")
    if compile is not None and compile not in torch.compiler.list_backends(()):
        shown = ", ".join(torch.compiler.list_backends())
        raise UserError(f"compile must be a backend of torch.compile, such as {shown}, got {compile!r:.60}")
    return max_grad_norm, ema_decay


def build_optimizer(
    optimizer: str | OptimizerFactory,
    parameters: list[nn.Parameter],
    lr: float,
    momentum: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    if callable(optimizer):
        return _checked_optimizer(optimizer(parameters), parameters)
    check_choice("optimizer", optimizer, OPTIMIZERS, function=True)
    if optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if momentum == 1:
        raise UserError(f"momentum must be below 1 for {optimizer}, where it is the first beta, got {momentum!r}")
    cls = torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW
    return cls(parameters, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay)


def _checked_optimizer(built: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """One of the user's, with Python's numbers in place of NumPy's, which no checkpoint could be read with."""
    kind = type(built).__name__
    check_kind("what optimizer returns", built, torch.optim.Optimizer, "a torch.optim.Optimizer")
    closure = inspect.signature(built.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(f"optimizer must be one whose step needs no closure, got {kind}")
    theirs = {id(parameter) for group in built.param_groups for parameter in group["params"]}
    if not any(id(parameter) in theirs for parameter in parameters):
        raise UserError(f"optimizer must train the parameters that it is given; those of this {kind} are others")
    for group in (built.defaults, *built.param_groups):
        for name, value in group.items():
            group[name] = tuple(map(_plain_number, value)) if type(value) is tuple else _plain_number(value)
    return built


def _plain_number(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


_STATES: dict[type, set[str]] = {
    torch.optim.SGD: {"momentum_buffer"},
    torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
}
"""What the optimizers of the trainer keep for a parameter."""


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
    names = _STATES.get(type(optimizer))
    for parameter, kept in optimizer.state.items() if names else ():
        for name, value in kept.items():
            fits = isinstance(value, Tensor) and value.shape == (() if name == "step" else parameter.shape)
            whole_state = kept.keys() - {"max_exp_avg_sq"} == names  # that of amsgrad=True
            if not whole_state or not (fits or value is None) or (name == "step" and not value >= 1):
                raise ValueError(f"the optimizer's {name} is not that of a parameter of shape {tuple(parameter.shape)}")


def pick_schedule(schedule: str | schedules.RateSchedule) -> schedules.RateSchedule:
    if callable(schedule):
        checked = partial(_factor, schedule)
        checked(0.0)
        return checked
    if isinstance(schedule, str) and schedule not in schedules.RATES and (steps := schedules.parse_step(schedule)):
        return steps
    allowed = [*schedules.RATES, "step(milestones=(0.3, 0.6), gamma=0.1)"]
    check_choice("schedule", schedule, allowed, function=True)
    return schedules.RATES[schedule]()


def _factor(schedule: schedules.RateSchedule, progress: float) -> float:
    factor = schedule(progress)
    if not isinstance(factor, numbers.Real) or not math.isfinite(factor):
        raise UserError(f"schedule must return a factor on the learning rate, got {factor!r:.60} at {progress:g}")
    return float(factor)


def check_model_kind(model: nn.Module | str) -> None:
    """A name, or a module whose weights have values."""
    check_kind("model", model, nn.Module | str, "a module or the name of one")
    held = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else ()
    if any(value.is_meta or isinstance(value, UninitializedParameter) for value in held):
        raise UserError("model has weights without values, as on the meta device or of lazy modules: give them some")


def described_inputs(inputs: Any) -> str:
    """Of a batch of them, as in "images of shape (3, 32, 32)"."""
    if not isinstance(inputs, Tensor):
        return f"inputs of type {type(inputs).__name__}"
    shape = tuple(inputs.shape[1:])
    kind = f", {inputs.dtype}" if inputs.dtype != torch.float32 else ""
    return f"{'images' if len(shape) == 3 else 'inputs'} of shape {shape}{kind}"


def check_model(model: nn.Module, inputs: Any, classes: int | None, places: tuple[int, ...]) -> int:
    """That it fits the data, and has something to train; its classes."""
    found = check_logits(model, inputs, classes, places)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("the model has no weights to train: none takes a gradient")
    return found


def check_logits(model: nn.Module, inputs: Any, classes: int | None, places: tuple[int, ...]) -> int:
    """Runs two rows through, so that a model that does not fit the data says so at once; its classes.

    Args:
        inputs: of two rows.
        classes: that the data have, if they are known.
        places: of one target: none, or those of a mask.
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
    """What the model gives in training, which leaves its buffers and torch's generators as they are."""
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
    """The fewest rows that a batch of all ``world`` ranks may have in training: such that none has one alone, where
    the model, as with batch norm, cannot do with one.

    Raises:
        UserError: a batch has fewer, or the model does not give logits in training.
    """
    for rows in (1, 2):
        try:
            logits = _in_training(model, rows_of(inputs, torch.arange(rows)), device)
            break
        except Exception as error:  # of torch.nn.functional.batch_norm a ValueError
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
            f"batch_size is {batch_size}, but the model, as by batch norm, needs {least} rows for these inputs: "
            "more than one in each process"
        )
    return least


def uses_all_parameters(model: nn.Module, inputs: Any) -> bool:
    """Whether every parameter that trains has a part in the logits."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    model.eval()
    try:
        logits = model(inputs)
        return None not in torch.autograd.grad(logits.sum(), trained, allow_unused=True)
    finally:
        model.train(training)


def describe_data(data: Labelled) -> dict[str, Any]:
    described = {
        "name": data.name,
        "rows": len(data),
        "classes": len(data.classes) if data.classes else None,
        "shape": list(data.shape) if data.shape is not None else None,
        "labels_crc32": None if data.labels is None else zlib.crc32(data.labels.numpy().data),
        # Streamed images, and rows of a dataset, are too many to read before each training.
        "images_crc32": zlib.crc32(data.images.contiguous().numpy().data) if isinstance(data, TensorImages) else None,
    }
    if isinstance(data, TensorData):
        del described["images_crc32"]
        described |= {"inputs_crc32": zlib.crc32(data.inputs.numpy().data), "standardize": data.standardize}
    if isinstance(data, StreamedImages) and data.cells.crop:
        described["center_crop"] = True
    return described


def describe_model(model: nn.Module | str) -> str:
    if isinstance(model, str):
        return model
    return f"{type(model).__name__} with {sum(p.numel() for p in model.parameters())} parameters"


def describe_choice(choice: str | Callable[..., Any]) -> str:
    """A name, or a function's; without an address, which is another in the process that resumes the run."""
    if isinstance(choice, str):
        return choice
    return getattr(choice, "__qualname__", None) or re.sub(r" at 0x[0-9a-fA-F]+", "", repr(choice))
