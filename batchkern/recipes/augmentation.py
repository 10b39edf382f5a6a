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
    "The paper gives only the number M of all copies. We make half of them by Gaussian noise and half by dropout.",
    "omega is pi/3, the paper's fair schedule. The eligible layers are the fully connected ones (section 4.3), and the "
    "vote is at the last one.",
    "The paper does not give sigma, tau and the dropout probability. We use 0.1, 0.2 and 0.1, the strategy's defaults.",
    "The paper does not say whether the column SBA includes Cutout. We use no Cutout in either arm.",
)
_CHOSEN_FOR_ALL = (
    "The paper reports the median of the last five epochs. We show it beside the error after the last epoch.",
    "Each network is trained as its authors did. Where they say nothing, our choice is in the settings.",
    FIVE_SEEDS,
)
_RESNET_CIFAR_CHOSEN = (
    "He et al. train for 64,000 updates, and lower the rate after 32,000 and 48,000. We use 164, 82 and 123 epochs."
)
_VGG_CIFAR_CHOSEN = (
    "The paper does not describe VGGNet-16 on CIFAR. Ours has batch norm, and two hidden linear layers of 512 with "
    "dropout. We use the schedule of the ResNet-44 rows, a rate of 0.05 and a weight decay of 5e-4."
)
_ALEXNET_CIFAR_CHOSEN = (
    "The paper does not describe AlexNet on CIFAR. Ours has its convolutions, 2x2 pooling and no hidden linear layers. "
    "We use the schedule of the ResNet-44 rows, a rate of 0.01 and a weight decay of 5e-4."
)
_ALEXNET_IMAGENET_CHOSEN = (
    "Krizhevsky et al. train for 90 epochs, and lower the rate when the error stops improving. We do so after epochs "
    "30 and 60. Our network has one column and no local response normalisation. Its first fully connected layer is not "
    "eligible, since it is too wide for a dense basis."
)
_IMAGENET_CHOSEN = (
    "The paper does not say how images become 224 x 224 pixels. We train on random resized crops and flips, and test "
    "on the centre of images of 256 pixels."
)
_IMAGENET_ETA = "The paper does not give eta on ImageNet. Of its two values, 0.1 and 0.01, we use 0.1."
_RESNET_IMAGENET_CHOSEN = (
    "He et al. lower the rate when the error stops improving. We do so after epochs 30 and 60 of 90."
)
_VGG_IMAGENET_CHOSEN = (
    "Simonyan and Zisserman train for 74 epochs, and lower the rate when the accuracy stops improving. We do so after "
    "epochs 25 and 50, without dropout, and initialise it as timm does. The first fully connected layer is not "
    "eligible, since it is too wide for a dense basis."
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
    "The paper does not give the size of Cutout's square. We use that of Cutout's own paper: half of the image's side, "
    "and a fourth of it on CIFAR-100."
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
