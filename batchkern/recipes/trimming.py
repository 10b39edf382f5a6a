"""Mini-batch trimming, Table 1."""

from batchkern.recipes.base import CIFAR10, CIFAR100, SVHN, LeftOut, Published, Recipe, Training, milestones

PAPER = "Fassold 2021, arXiv:2110.13058"

_TRAINING = Training(
    optimizer="adam",
    lr=0.001,
    momentum=0.9,
    weight_decay=1e-4,
    batch_size=128,
    epochs=150,
    schedule=milestones(50, 100, of=150, gamma=0.5),
)
_CHOSEN = (
    "The paper does not give the variants of the networks. We use those of timm, with the stem for ImageNet (7x7, "
    "stride 2, and pooling).",
    "The paper does not mention augmentation. We use none.",
    "The paper does not give the first beta of Adam. We use 0.9.",
)
_SVHN = (
    "The paper does not say which parts of SVHN were used. We use the 73,257 training images, without the extra ones."
)

_TABLE = (
    ("svhn", SVHN, "resnet34", 5.87, 5.76),
    ("svhn", SVHN, "densenet121", 4.62, 4.42),
    ("cifar10", CIFAR10, "resnet34", 17.43, 17.01),
    ("cifar10", CIFAR10, "densenet121", 10.10, 10.19),
    ("cifar100", CIFAR100, "resnet34", 48.19, 47.72),
    ("cifar100", CIFAR100, "densenet121", 32.95, 32.18),
)

RECIPES = tuple(
    Recipe(
        name=f"trimming/{short}-{model}",
        paper=PAPER,
        table="Table 1",
        published=Published("error", baseline, method),
        data=data,
        model=model,
        image_size=32,
        strategy="trimming(start=1.0, end=0.2)",
        training=_TRAINING,
        seeds=10,
        chosen=(*_CHOSEN, _SVHN) if data == SVHN else _CHOSEN,
    )
    for short, data, model, baseline, method in _TABLE
)
LEFT_OUT: tuple[LeftOut, ...] = ()
