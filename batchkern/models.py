"""Image classifiers by name, and functions on models that strategies need."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchkern.architectures import MLP, AlexNet, CifarResNet, CifarVGG, SmallCNN, WideResNet, WideResNet18
from batchkern.errors import UserError, require

# 6n + 2 layers (He et al. 2015, section 4.2).
_RESNETS = {"resnet8": 1, "resnet20": 3, "resnet44": 7, "resnet56": 9}
# Depth 6n + 4 and widening factor (Zagoruyko & Komodakis 2016, table 1).
_WIDE_RESNETS = {"wrn22-10": (3, 10)}
BUILT_IN = ("mlp", "cnn", *_RESNETS, *_WIDE_RESNETS, "wrn18-2", "vgg16-cifar", "alexnet")


def build(name: str, *, shape: tuple[int, ...], classes: int, pretrained: bool = False) -> nn.Module:
    """A new model with random weights, by name.

    Args:
        name: "mlp" (`MLP`), "cnn" (`SmallCNN`), "resnet8", "resnet20", "resnet44", "resnet56" (`CifarResNet`),
            "wrn22-10" (`WideResNet`), "wrn18-2" (`WideResNet18`), "vgg16-cifar" (`CifarVGG`), "alexnet" (`AlexNet`,
            laid out by the size of the images), or a model of timm.
        shape: (C, H, W) of the images; for "mlp" that of a row, whatever it is.
        classes: number of logits.
        pretrained: with the pretrained weights of a timm model, from the Hugging Face hub or its cache; a classifier
            with another number of classes has random weights.

    Raises:
        UserError: unknown name (the message lists similar ones), images below 4x4, fewer than two classes, a timm model
            that cannot be built for these images, or pretrained weights that do not exist or cannot be loaded.
    """
    if name != "mlp" and (len(shape) != 3 or shape[0] < 1 or min(shape[1:]) < 4):
        raise UserError(
            f"shape must be (C, H, W) with C >= 1 and H, W >= 4 for the model {name!r}, not {tuple(shape)}; for rows "
            "of any other shape there is mlp"
        )
    if classes < 2:
        raise UserError(f"classes must be at least 2, not {classes}")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # the type of images
    try:
        if pretrained and name in BUILT_IN:
            raise UserError(f"there are no pretrained weights for {name!r}: only for models of timm, such as resnet50")
        if name == "mlp":
            return MLP(math.prod(shape), classes)
        return _build(name, (shape[0], shape[1], shape[2]), classes, pretrained)
    finally:
        torch.set_default_dtype(default)


def _build(name: str, shape: tuple[int, int, int], classes: int, pretrained: bool) -> nn.Module:
    if name == "cnn":
        return SmallCNN(shape[0], classes)
    if name in _RESNETS:
        return CifarResNet(_RESNETS[name], shape[0], classes)
    if name in _WIDE_RESNETS:
        return WideResNet(*_WIDE_RESNETS[name], shape[0], classes)
    if name == "wrn18-2":
        return WideResNet18(2, shape[0], classes)
    if name == "vgg16-cifar":
        return CifarVGG(shape[0], classes)
    if name == "alexnet":
        return AlexNet(shape[0], classes, small=min(shape[1:]) < 64)
    return _build_timm(name, shape, classes, pretrained)


def _build_timm(name: str, shape: tuple[int, int, int], classes: int, pretrained: bool) -> nn.Module:
    built_in = f"the built-in models are {', '.join(BUILT_IN)}"
    try:
        timm = require("timm", "models")
    except UserError as error:
        raise UserError(f"unknown model {name!r}: {built_in}; for any other {error}") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*BUILT_IN, *timm.list_models()], n=5)
        hint = f"; near matches: {', '.join(near)}" if near else ""
        raise UserError(f"unknown model {name!r}: {built_in}, and any model of timm{hint}")
    if pretrained and not timm.is_model_pretrained(name):
        raise UserError(
            f"timm has no pretrained weights for {name!r}; timm.list_pretrained() names what it has some for"
        )
    try:
        # A vision transformer's grid of patches is laid out for one image size.
        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
        size = {"img_size": shape[1:]} if config is not None and config.fixed_input_size else {}
        return timm.create_model(name, pretrained, num_classes=classes, in_chans=shape[0], **size)
    except Exception as error:  # the hub's client raises various exceptions
        if pretrained and not isinstance(error, AssertionError | TypeError):
            raise UserError(f"the pretrained weights of {name!r} cannot be loaded: {_first_line(error)}") from error
        if not isinstance(error, AssertionError | RuntimeError | TypeError | ValueError):
            raise
        raise UserError(f"model {name!r} of timm cannot be built for images of shape {shape}: {error}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


class AttachedHead(nn.ModuleDict):
    """Layers that ``batchkern.parts.SecondHead`` has attached to a model, and that are not the model's own."""


def find_classifier(model: nn.Module, name: str | None = None) -> tuple[str, nn.Linear]:
    """The layer that turns features into logits: its name in `model.named_modules()`, and the module.

    Args:
        name: the module's name; None: the one that `model.get_classifier()` returns, for a model of timm,
            else the last `nn.Linear` in registration order.

    Raises:
        UserError: there is no such module, or it is not an `nn.Linear`; the message lists the Linear modules.
    """
    modules = dict(model.named_modules())
    attached = tuple(f"{key}." for key, module in modules.items() if isinstance(module, AttachedHead))
    linear = {
        k: module for k, module in modules.items() if isinstance(module, nn.Linear) and not k.startswith(attached)
    }
    listed = f"its Linear modules are {', '.join(linear)}" if linear else "it has no Linear module"
    if name is not None:
        if name in linear:
            return name, linear[name]
        what = f"a {type(modules[name]).__name__}, not a Linear" if name in modules else "not in the model"
        raise UserError(f"classifier {name!r} is {what}; {listed}")
    if callable(getattr(model, "get_classifier", None)):
        head = model.get_classifier()  # type: ignore[operator]
        for key, module in linear.items():
            if module is head:
                return key, module
        # The last Linear then belongs to another part, such as a squeeze-and-excite block.
        raise UserError(
            f"the classifier of {type(model).__name__} is a {type(head).__name__}, not a Linear; name another: {listed}"
        )
    if not linear:
        raise UserError(f"{type(model).__name__} has no classifier that could be found: {listed}")
    return list(linear.items())[-1]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer normalises with the statistics of its batch."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def in_channels_last(model: nn.Module) -> nn.Module:
    """Converts the weights of 2-d convolutions to channels last, in place. Their outputs are then channels last,
    too."""
    for module in model.modules():
        for weight in module.parameters(recurse=False) if isinstance(module, nn.Conv2d) else ():
            if weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return model


class Compiled:
    """``torch.compile`` of a model, separate from it: the model's own modules, keys and hooks do not change.

    Each shape has its own graph, without a limit on their number, so results do not depend on the shapes used before.

    Raises:
        UserError: when called, the model cannot be compiled.
    """

    def __init__(self, model: nn.Module, backend: str) -> None:
        self.backend = backend
        self.forward = torch.compile(model, backend=backend, dynamic=False)

    def __call__(self, images: Tensor) -> Tensor:
        from torch._dynamo import config, exc

        try:
            with config.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20):
                logits: Tensor = self.forward(images)
                return logits
        except exc.TorchDynamoException as error:
            reason = " ".join(str(error).split("Set TORCH")[0].split())[:300]
            raise UserError(f"the model cannot be compiled by {self.backend}: {reason}") from error


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """A context in which no batch-norm layer changes its running mean, variance or batch count.

    Layers in train mode still normalise with the batch's own statistics, layers in eval mode with their
    running ones: in `_BatchNorm.forward`, and in `SyncBatchNorm`'s and timm's, `track_running_stats` decides
    in train mode whether the buffers are passed on and the count is raised, and nothing in eval mode.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
