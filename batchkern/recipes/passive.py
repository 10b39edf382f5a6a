"""Passive batch injection, Tables I, II and IV to VII."""

from dataclasses import replace

from batchkern.recipes.base import (
    CIFAR10,
    CIFAR100,
    FIVE_SEEDS,
    GTSRB,
    IMAGENET,
    SVHN,
    TOP5,
    LeftOut,
    Published,
    Recipe,
    Training,
    milestones,
)

PAPER = "Singh et al. 2020, arXiv:2006.04406"

_CIFAR = Training(
    lr=0.1,
    momentum=0.9,
    weight_decay=5e-4,
    batch_size=128,
    epochs=250,
    schedule=milestones(50, 100, 150, 200, of=250, gamma=0.2),
    augment="crop+flip",
)
_SVHN = replace(_CIFAR, augment="crop")
_IMAGENET = Training(
    lr=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    batch_size=256,
    epochs=120,
    schedule=milestones(30, 60, 90, of=120, gamma=0.1),
    augment="resized-crop+flip",
)

_OF_PASSIVE = (
    "The paper does not describe passive batches. Ours are as large as active ones, and are not augmented.",
    "We count active batches over the whole training, and do not begin again in each epoch.",
    "We use the 73,257 training images of SVHN, without the extra ones.",
)
_CHOSEN = (*_OF_PASSIVE, FIVE_SEEDS)
_OWN_STATISTICS = (
    "The paper does not say which statistics batch norm uses at the test. At g = 1 we use those of the active batches "
    "alone, since statistics over both sets fit neither."
)
_CIFAR_CHOSEN = (*_CHOSEN, "The paper uses weight decay, but does not give it. We use 5e-4.")
_SVHN_CHOSEN = (
    *_CIFAR_CHOSEN,
    "The paper does not give the settings for SVHN as the active set. We use those for CIFAR, but no flips, which "
    "would change digits.",
)
_VGG_CHOSEN = (
    *_CIFAR_CHOSEN,
    "The paper does not describe VGG-16 on CIFAR. Ours has batch norm, and two hidden linear layers of 512 with "
    "dropout. The passive head has two such layers of its own.",
)
_IMAGENET_CHOSEN = (
    *_CHOSEN,
    "The paper uses weight decay, but does not give it. We use 1e-4.",
    "The paper does not say how images become 224 x 224 pixels. We train on random resized crops and flips, and test "
    "on the centre of images of 256 pixels. Of images of the injected set we also use the centre.",
)


def _recipe(
    name: str,
    table: str,
    active: str,
    passive: str,
    model: str,
    figures: tuple[float, float],
    every: int = 100,
    training: Training = _CIFAR,
    chosen: tuple[str, ...] = _CIFAR_CHOSEN,
    image_size: int = 32,
    also: tuple[str, ...] = (),
) -> Recipe:
    return Recipe(
        name=f"passive/{name}" + (f"-g{every}" if every != 100 else ""),
        paper=PAPER,
        table=table,
        published=Published("accuracy", *figures),
        data=active,
        model=model,
        image_size=image_size,
        strategy="passive(every=1, freeze_bn=True)" if every == 1 else f"passive(every={every})",
        training=training,
        seeds=5,
        chosen=(*chosen, _OWN_STATISTICS) if every == 1 else chosen,
        passive=passive,
        also=also,
    )


def _imagenet(
    name: str,
    table: str,
    passive: str,
    figures: tuple[float, float],
    top5: tuple[float, float] | None = None,
    model: str = "resnet50",
    also: tuple[str, ...] = (),
) -> Recipe:
    recipe = _recipe(
        name, table, IMAGENET, passive, model, figures, training=_IMAGENET, chosen=_IMAGENET_CHOSEN, image_size=224
    )
    recipe = replace(recipe, center_crop=True)
    if top5 is None:
        return recipe
    return replace(recipe, published=replace(recipe.published, beside={TOP5: top5}), also=also)


def _srip(recipe: Recipe, accuracy: float, top5: float | None = None) -> Recipe:
    """The row of the other method beside that of passive batches, whose baseline it shares."""
    published = Published("accuracy", recipe.published.baseline, accuracy)
    if top5 is not None:
        published = replace(published, beside={TOP5: (recipe.published.beside[TOP5][0], top5)})
    chosen = (*(sentence for sentence in recipe.chosen if sentence not in _OF_PASSIVE), _SRIP_CHOSEN)
    name = f"{recipe.name}-srip"
    return replace(recipe, name=name, strategy="srip", published=published, passive=None, also=(), chosen=chosen)


# The baseline, the strategy at each g, and SRIP.
_TABLE_2 = (
    ("cifar10", CIFAR10, "resnet56", 93.4, {100: 94.4, 1: 93.3}, 93.7),
    ("cifar10", CIFAR10, "wrn22-10", 95.6, {100: 96.0, 1: 95.4}, 95.8),
    ("cifar10", CIFAR10, "vgg16-cifar", 93.5, {100: 94.1, 1: 93.4}, 93.9),
    ("cifar100", CIFAR100, "resnet56", 71.6, {100: 71.7, 1: 71.3}, 71.6),
    ("cifar100", CIFAR100, "wrn22-10", 79.3, {100: 80.2, 1: 79.2}, 79.9),
    ("cifar100", CIFAR100, "vgg16-cifar", 72.0, {100: 74.1, 1: 71.9}, 73.8),
)

_ALSO = {("cifar10", "resnet56", 100): ("Table V", "Table VII"), ("cifar10", "resnet56", 1): ("Table VII",)}
_SRIP_CHOSEN = (
    "The paper does not say how it trained SRIP. We use the coefficients of SRIP's own paper, at the same parts of the "
    "training, and the weight decay of the other rows."
)
_GAP_CHOSEN = (
    *_CIFAR_CHOSEN,
    "The paper does not say how it measures the accuracy on the training data. We measure it after the training, "
    "without augmentation.",
    "A part of the training data has the same share of each class.",
)

_RESNET50 = _imagenet("imagenet-resnet50", "Table I", CIFAR100, (76.1, 76.8), (92.9, 93.3), also=("Table VI",))
_WRN18_2 = _imagenet("imagenet-wrn18-2", "Table I", CIFAR100, (74.4, 74.8), (91.8, 92.2), "wrn18-2")
_ROWS_OF_TABLE_2 = tuple(
    (
        _recipe(
            f"{short}-{model}",
            "Table II",
            data,
            SVHN,
            model,
            (baseline, method),
            every,
            chosen=_VGG_CHOSEN if model == "vgg16-cifar" else _CIFAR_CHOSEN,
            also=_ALSO.get((short, model, every), ()),
        ),
        srip,
    )
    for short, data, model, baseline, methods, srip in _TABLE_2
    for every, method in methods.items()
)

RECIPES = (
    _RESNET50,
    _srip(_RESNET50, 76.4, 93.1),
    _WRN18_2,
    _srip(_WRN18_2, 74.6, 92.0),
    *(recipe for recipe, _ in _ROWS_OF_TABLE_2),
    *(_srip(recipe, srip) for recipe, srip in _ROWS_OF_TABLE_2 if not recipe.name.endswith("-g1")),
    *(
        replace(
            _recipe(f"cifar10-resnet56-gap-{share:g}", "Table IV", CIFAR10, SVHN, "resnet56", gaps, chosen=_GAP_CHOSEN),
            published=Published("gap", *gaps),
            share=share / 100,
        )
        for share, gaps in {100: (6.5, 5.5), 25: (16.2, 14.9), 12.5: (24.4, 21.1)}.items()
    ),
    _recipe("cifar10-resnet56-gtsrb", "Table V", CIFAR10, GTSRB, "resnet56", (93.4, 94.3)),
    _imagenet("imagenet-resnet50-svhn", "Table VI", SVHN, (76.1, 76.7)),
    *(
        _recipe("cifar10-resnet56", "Table VII", CIFAR10, SVHN, "resnet56", (93.4, method), every)
        for every, method in {10: 94.1, 1000: 93.6}.items()
    ),
    *(
        _recipe("svhn-resnet56", "Table VII", SVHN, CIFAR10, "resnet56", (96.3, method), every, _SVHN, _SVHN_CHOSEN)
        for every, method in {100: 96.8, 1: 96.1, 10: 96.7, 1000: 96.4}.items()
    ),
)
LEFT_OUT = (
    LeftOut(
        PAPER, "Table III", "object detection, which is not a comparison of classifiers (but see examples/detection.py)"
    ),
)
