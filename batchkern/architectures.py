"""The networks of the papers, with random weights, which ``models.build`` makes by name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


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

    If the block halves the image and doubles the channels, the shortcut takes every second pixel, and zeros for the
    new channels: option A of He et al., which has no parameters.
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
    """Batch norm and ReLU before each of two 3x3 convolutions; the shortcut is a 1x1 convolution if channels change."""

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
    """Two 3x3 convolutions; if channels change, the shortcut is a 1x1 convolution (He et al., option B)."""

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
    """VGG-16 (Simonyan & Zisserman 2015, table 1, D) in its CIFAR version: batch norm after each convolution, and
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
    """Kaiming initialisation: torch's default is small for ReLU, and signals would vanish in a deep network without
    batch norm."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) or (isinstance(module, nn.Linear) and module is not model.fc):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
