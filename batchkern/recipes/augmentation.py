"""Stochastic batch augmentation, Table 1."""

from dataclasses import replace

from batchkern.recipes.base import (
    CIFAR10,
    CIFAR100,
    FIVE_SEEDS,
    IMAGENET,
    MEDIAN,
    LeftOut,
    Published,
    Recipe,
    Training,
    milestones,
)

PAPER = "Li et al., IJCAI 2020"

_RESNET_CIFAR = Training(
    lr=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    batch_size=128,
    epochs=164,
    schedule=milestones(82, 123, of=164, gamma=0.1),
    augment="crop+flip",
)
_VGG_CIFAR = replace(_RESNET_CIFAR, lr=0.05, weight_decay=5e-4)
_RESNET_IMAGENET = Training(
    lr=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    batch_size=256,
    epochs=90,
    schedule=milestones(30, 60, of=90, gamma=0.1),
    augment="resized-crop+flip",
)
_VGG_IMAGENET = Training(
    lr=0.01,
    momentum=0.9,
    weight_decay=5e-4,
    batch_size=256,
    epochs=74,
    schedule=milestones(25, 50, of=74, gamma=0.1),
    augment="resized-crop+flip",
)

_ALEXNET_CIFAR = replace(_RESNET_CIFAR, lr=0.01, weight_decay=5e-4)
_ALEXNET_IMAGENET = replace(_RESNET_IMAGENET, lr=0.01, weight_decay=5e-4, batch_size=128)

_CHOSEN = (
    "M is split evenly between Gaussian and dropout copies; the paper gives only the sum.",
    "omega is pi/3, the paper's fair schedule. Eligible are the fully connected layers (section 4.3); the vote is at "
    "the last one.",
    "sigma, tau and the dropout probability are not given: 0.1, 0.2 and 0.1, the defaults of the strategy.",
    "Whether the column SBA includes Cutout is not said: no Cutout in either arm.",
)
_CHOSEN_FOR_ALL = (
    "The paper reports the median of the last five epochs: it stands beside the last epoch's error.",
    "The regime is that of each network's authors, who give none for some data: see the settings.",
    FIVE_SEEDS,
)
_RESNET_CIFAR_CHOSEN = "He et al. train for 64,000 updates and decay at 32,000 and 48,000: 164 epochs, 82 and 123."
_VGG_CIFAR_CHOSEN = (
    "VGGNet-16 on CIFAR is not described: batch norm, and two hidden linear layers of 512 with dropout; the schedule "
    "of the ResNet-44 rows, rate 0.05, weight decay 5e-4."
)
_ALEXNET_CIFAR_CHOSEN = (
    "AlexNet on CIFAR is not described: its convolutions, pooling 2x2, no hidden linear layers; the schedule of the "
    "ResNet-44 rows, rate 0.01, weight decay 5e-4."
)
_ALEXNET_IMAGENET_CHOSEN = (
    "Krizhevsky et al. train for 90 epochs and decay where the error stops improving: epochs 30 and 60; the network in "
    "one column, without local response normalisation. Its first fully connected layer is too wide for a dense basis."
)
_IMAGENET_CHOSEN = (
    "How images become 224 x 224 pixels is not said: random resized crops and flips; at the test the centre of 256."
)
_IMAGENET_ETA = "eta on ImageNet is not given: 0.1, the other of the paper's two values being 0.01."
_RESNET_IMAGENET_CHOSEN = "He et al. decay where the error plateaus: epochs 30 and 60 of 90."
_VGG_IMAGENET_CHOSEN = (
    "Simonyan and Zisserman decay where the accuracy stops improving, for 74 epochs: epochs 25 and 50; no dropout; "
    "initialised as timm does. Its first fully connected layer is too wide for a dense basis."
)

# Those of several, and where the vote is; of a network with one it is that one.
_LAYERS = {
    ("vgg16-cifar", 32): ("hidden.1", "hidden.4", "fc"),
    ("alexnet", 224): ("hidden.4", "fc"),
    ("vgg16", 224): ("pre_logits.fc2", "head.fc"),
}


def _strategy(model: str, size: int, copies: int, eta: float) -> str:
    options = f"gaussian={copies // 2}, dropout={copies // 2}, eta={eta}"
    if layers := _LAYERS.get((model, size)):
        options += f", layers={layers}, vote_layer={layers[-1]!r}"
    return f"augmentation({options})"


# error of the baseline, with Cutout, with Cutout and batch augmentation, with the strategy; M, eta
_TABLE = (
    ("cifar10", CIFAR10, "resnet44", 32, (6.92, 6.28, 4.56, 3.23), 40, 0.01, _RESNET_CIFAR, _RESNET_CIFAR_CHOSEN),
    ("cifar10", CIFAR10, "vgg16-cifar", 32, (16.25, 6.17, 4.69, 2.73), 32, 0.1, _VGG_CIFAR, _VGG_CIFAR_CHOSEN),
    ("cifar10", CIFAR10, "alexnet", 32, (23.88, 21.34, 20.00, 18.03), 32, 0.01, _ALEXNET_CIFAR, _ALEXNET_CIFAR_CHOSEN),
    ("cifar100", CIFAR100, "resnet44", 32, (28.01, 27.04, 25.85, 24.61), 40, 0.1, _RESNET_CIFAR, _RESNET_CIFAR_CHOSEN),
    ("cifar100", CIFAR100, "vgg16-cifar", 32, (38.67, 27.00, 24.69, 22.19), 32, 0.1, _VGG_CIFAR, _VGG_CIFAR_CHOSEN),
    (
        "imagenet", IMAGENET, "resnet50", 224, (23.73, None, 23.16, 22.72), 4, 0.1,
        _RESNET_IMAGENET, _RESNET_IMAGENET_CHOSEN,
    ),
    ("imagenet", IMAGENET, "vgg16", 224, (23.78, None, 21.29, 19.37), 4, 0.1, _VGG_IMAGENET, _VGG_IMAGENET_CHOSEN),
    (
        "imagenet", IMAGENET, "alexnet", 224, (41.69, None, 37.73, 34.40), 8, 0.1,
        _ALEXNET_IMAGENET, _ALEXNET_IMAGENET_CHOSEN,
    ),
)  # fmt: skip
_CUTOUT_CHOSEN = (
    "The size of Cutout's square is not given: half the image's side, on CIFAR-100 a fourth, as its own paper has it."
)


def _strategies(model: str, size: int, data: str, copies: int, eta: float) -> dict[str, str]:
    """What follows the recipe's name, and the strategy, in the order of the columns."""
    cutout = "cutout(size=8)" if data == CIFAR100 else "cutout"
    return {
        "-cutout": cutout,
        "-cutout-ba": f"{cutout}+batch-augmentation(copies={copies})",
        "": _strategy(model, size, copies, eta),
    }


RECIPES = tuple(
    Recipe(
        name=f"augmentation/{short}-{model}{ending}",
        paper=PAPER,
        table="Table 1",
        published=Published("error", errors[0], method, beside={MEDIAN: (errors[0], method)}),
        data=data,
        model=model,
        image_size=size,
        center_crop=data == IMAGENET,
        strategy=strategy,
        training=training,
        seeds=5,
        chosen=(
            *([_CUTOUT_CHOSEN] if ending else _CHOSEN),
            *_CHOSEN_FOR_ALL,
            chosen,
            *([_IMAGENET_CHOSEN] if data == IMAGENET else []),
            *([_IMAGENET_ETA] if data == IMAGENET and not ending else []),
        ),
    )
    for short, data, model, size, errors, copies, eta, training, chosen in _TABLE
    for (ending, strategy), method in zip(_strategies(model, size, data, copies, eta).items(), errors[1:], strict=True)
    if method is not None
)
LEFT_OUT: tuple[LeftOut, ...] = ()
