"""Image classifiers by name, and what the strategies need to know of any model."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchkern.errors import UserError, require

# 6n + 2 layers (He et al. 2015, section 4.2).
_RESNETS = {"resnet8": 1, "resnet20": 3, "resnet44": 7, "resnet56": 9}
# Depth 6n + 4 and widening factor (Zagoruyko & Komodakis 2016, table 1).
_WIDE_RESNETS = {"wrn22-10": (3, 10)}
BUILT_IN = ("mlp", "cnn", *_RESNETS, *_WIDE_RESNETS, "wrn18-2", "vgg16-cifar", "alexnet")


class MLP(nn.Module):
    """Two hidden layers of 128 ReLUs; rows of any shape.

    (b, ...) -> logits (b, classes).
    """

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.fc = nn.Linear(128, classes)

    def forward(self, rows: Tensor) -> Tensor:
        return self.fc(self.layers(rows))


class SmallCNN(nn.Module):
    """Three 3x3 convolutions and two linear layers, without batch norm; images of any H, W >= 4.

    About 66,000 parameters. (b, C, H, W) -> logits (b, classes).
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.hidden = nn.Linear(64, 128)
        self.fc = nn.Linear(128, classes)
        for layer in (self.conv1, self.conv2, self.conv3, self.hidden):
            # torch's default is small for ReLU: after 4 epochs of SGD on digits 20 to 71 % were right, not 89 to 97 %.
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x)).mean(dim=(2, 3))
        return self.fc(F.relu(self.hidden(x)))


class _Block(nn.Module):
    """Two 3x3 convolutions beside an identity shortcut.

    Where the block halves the image and doubles the channels, the shortcut takes every second pixel and zeros
    for the new channels: option A of He et al., which has no parameters.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.new_channels = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(y + shortcut)


class CifarResNet(nn.Module):
    """The residual networks of He et al. 2015, section 4.2: 6n + 2 layers of 16, 32 and 64 channels.

    (b, C, H, W) -> logits (b, classes). With 20 layers (n = 3) 0.27 million parameters, with 56 0.85 million.
    """

    def __init__(self, n: int, channels: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.stage1 = nn.Sequential(*(_Block(16, 16, 1) for _ in range(n)))
        self.stage2 = nn.Sequential(_Block(16, 32, 2), *(_Block(32, 32, 1) for _ in range(n - 1)))
        self.stage3 = nn.Sequential(_Block(32, 64, 2), *(_Block(64, 64, 1) for _ in range(n - 1)))
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(images)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(x.mean(dim=(2, 3)))


class _PreActivationBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions; a 1x1 one as the shortcut where channels change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return y + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """The wide residual networks of Zagoruyko & Komodakis 2016 for CIFAR: 6n + 4 layers, k times as wide, no dropout.

    (b, C, H, W) -> logits (b, classes). With n = 3 and k = 10, WRN-22-10, 26.8 million parameters.
    """

    def __init__(self, n: int, k: int, channels: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        blocks, width = [], 16
        for stage in range(3):
            for place in range(n):
                stride = 2 if stage > 0 and place == 0 else 1
                blocks.append(_PreActivationBlock(width, 16 * k * 2**stage, stride))
                width = 16 * k * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn(self.blocks(self.conv(images))))
        return self.fc(x.mean(dim=(2, 3)))


class WideResNet18(nn.Module):
    """The residual network of 18 layers for ImageNet with all blocks k times as wide (Zagoruyko & Komodakis 2016,
    section 3.5).

    (b, C, H, W) -> logits (b, classes). With k = 2 and 1,000 classes 45.6 million parameters.
    """

    def __init__(self, k: int, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 64, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, padding=1),
        )
        blocks, width = [], 64
        for stage in range(4):
            for place in range(2):
                outputs, stride = 64 * k * 2**stage, 2 if stage > 0 and place == 0 else 1
                blocks.append(_ProjectedBlock(width, outputs, stride))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(images)).mean(dim=(2, 3)))


class _ProjectedBlock(nn.Module):
    """Two 3x3 convolutions; where channels change, a 1x1 convolution is the shortcut (He et al., option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarVGG(nn.Module):
    """VGG-16 (Simonyan & Zisserman 2015, table 1, D) as it is used on CIFAR: batch norm behind each convolution, and
    linear layers of 512, with dropout before both hidden ones.

    (b, C, H, W) -> logits (b, classes). 15.3 million parameters.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for outputs, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
                channels = outputs
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Sequential(
            nn.Dropout(), nn.Linear(512, 512), nn.ReLU(), nn.Dropout(), nn.Linear(512, 512), nn.ReLU()
        )
        self.fc = nn.Linear(512, classes)
        _initialise_for_relu(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.hidden(self.features(images).mean(dim=(2, 3))))


class AlexNet(nn.Module):
    """AlexNet in one column (Krizhevsky 2014), with dropout before both hidden linear layers.

    (b, C, H, W) -> logits (b, classes). For 1,000 classes of ImageNet 61.1 million parameters. For images below 64x64
    the pooling is 2x2, the first convolution is padded to the borders, and the classifier is the only linear layer: the
    network that is common on CIFAR, 2.5 million parameters.
    """

    def __init__(self, channels: int, classes: int, *, small: bool) -> None:
        super().__init__()
        pool = nn.MaxPool2d(2, ceil_mode=True) if small else nn.MaxPool2d(3, 2, ceil_mode=False)
        self.features = nn.Sequential(
            nn.Conv2d(channels, 64, 11, 4, padding=5 if small else 2), nn.ReLU(), pool,
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), pool,
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), pool,
            nn.AdaptiveAvgPool2d(1 if small else 6), nn.Flatten(),
        )  # fmt: skip
        self.hidden: nn.Module = nn.Identity()
        if not small:
            self.hidden = nn.Sequential(
                nn.Dropout(), nn.Linear(256 * 36, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU()
            )
        self.fc = nn.Linear(256 if small else 4096, classes)
        _initialise_for_relu(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.hidden(self.features(images)))


def _initialise_for_relu(model: nn.Module) -> None:
    """torch's default is small for ReLU, and without batch norm a deep network would hardly pass anything on."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) or (isinstance(module, nn.Linear) and module is not model.fc):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def build(name: str, *, shape: tuple[int, ...], classes: int, pretrained: bool = False) -> nn.Module:
    """A new model with random weights, by name.

    Args:
        name: "mlp" (`MLP`), "cnn" (`SmallCNN`), "resnet8", "resnet20", "resnet44", "resnet56" (`CifarResNet`),
            "wrn22-10" (`WideResNet`), "wrn18-2" (`WideResNet18`), "vgg16-cifar" (`CifarVGG`), "alexnet" (`AlexNet`,
            laid out by the size of the images), or a model of timm.
        shape: (C, H, W) of the images; for "mlp" that of a row, whatever it is.
        classes: number of logits.
        pretrained: with the weights that timm has for a model of its own, from the Hugging Face hub or its cache, but
            for a classifier of another number of classes.

    Raises:
        UserError: unknown name (the sentence lists near ones), images below 4x4, fewer than two classes, a model of
            timm that cannot be built for these images, or pretrained weights that there are not or that cannot be had.
    """
    if name != "mlp" and (len(shape) != 3 or shape[0] < 1 or min(shape[1:]) < 4):
        raise UserError(
            f"shape must be (C, H, W) with C >= 1 and H, W >= 4 for the model {name!r}, not {tuple(shape)}; for rows "
            "of any other shape there is mlp"
        )
    if classes < 2:
        raise UserError(f"classes must be at least 2, not {classes}")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # as images are
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
    except Exception as error:  # of the hub's client whatever it likes
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
        UserError: no such module, or it is not an `nn.Linear`; the sentence lists those that are.
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
        # Its last Linear is then a part of something else, such as a squeeze-and-excite block.
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
    """Lays out the weights of 2-d convolutions channels last, in place. Their outputs then are, whatever the inputs."""
    for module in model.modules():
        for weight in module.parameters(recurse=False) if isinstance(module, nn.Conv2d) else ():
            if weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return model


class Compiled:
    """``torch.compile`` of a model, beside it: the model's own modules, keys and hooks stay what they are.

    Each shape has a graph of its own, however many there are. Which ones came before then decides no bit of a result.

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
    """Within it, no batch-norm layer changes its running mean, variance or batch count.

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
