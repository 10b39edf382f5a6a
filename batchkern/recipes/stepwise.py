"""Step-wise progressive training, Tables I to IV."""

from batchkern.recipes.base import (
    BIRDSNAP,
    CIFAR100,
    FIVE_SEEDS,
    FOOD101,
    TOP5,
    LeftOut,
    Published,
    Recipe,
    Training,
    milestones,
)

PAPER = "Prasad et al., ICPR 2020"

_TRAINING = Training(
    lr=0.001,
    momentum=0.9,
    weight_decay=1e-4,
    batch_size=24,
    epochs=100,
    # Of the baseline alone: the strategy sets its own rate.
    schedule=milestones(30, 60, 90, of=100, gamma=0.1),
)
_CHOSEN = (
    "The rates of eq. 9 are read as multiplying the sum of a batch's gradients (eq. 7).",
    "Images that are not square are squeezed to 224 x 224 pixels; the paper does not say how it treats them.",
    FIVE_SEEDS,
)
_BATCH = "The batch size b is not given for this table: 24, whose multiples are the sizes of Figure 1b."
_BATCH_FOOD = "The batch size b is 24, by section IV-C."
_BIRDSNAP = (
    "The 2,443 test images of Birdsnap are not marked on the hub: a fifth of each class is held out; with the "
    "official split, give --data and --test."
)
_FOOD = "Of Food-101 the hub's 'validation' part is the official test set, as in the paper."

_TABLE = (
    ("Table I", "cifar100", CIFAR100, "resnet50", (64.94, 66.34), (88.62, 90.72), (_BATCH,)),
    ("Table II", "cifar100", CIFAR100, "resnext50_32x4d", (65.58, 66.80), (88.67, 90.19), (_BATCH,)),
    ("Table II", "cifar100", CIFAR100, "res2next50", (66.41, 66.98), (88.74, 90.59), (_BATCH,)),
    ("Table III", "birdsnap", BIRDSNAP, "res2net50_26w_4s", (61.7901, 62.1391), (83.379, 85.150), (_BATCH, _BIRDSNAP)),
    ("Table III", "birdsnap", BIRDSNAP, "res2next50", (61.99, 62.4611), (84.0025, 84.9875), (_BATCH, _BIRDSNAP)),
    ("Table IV", "food101", FOOD101, "res2net50_26w_4s", (53.5584, 54.9901), (81.0297, 81.5010), (_BATCH_FOOD, _FOOD)),
)

RECIPES = tuple(
    Recipe(
        name=f"stepwise/{short}-{model}",
        paper=PAPER,
        table=table,
        published=Published("accuracy", *top1, beside={TOP5: top5}),
        data=data,
        model=model,
        image_size=224,
        strategy="stepwise",
        training=_TRAINING,
        seeds=5,
        chosen=(*_CHOSEN, *chosen),
    )
    for table, short, data, model, top1, top5, chosen in _TABLE
)
_OF_SUBSETS = "trained on a part of the data, or without carrying weights over: no strategy against the baseline"
LEFT_OUT = (
    LeftOut(PAPER, "Tables I and IV: the rows with set A, B, C, D or O alone", _OF_SUBSETS),
    LeftOut(
        PAPER,
        "Table IV: Pre-trained=True; Tables V and VI",
        "start from weights trained on ImageNet; here all start at random",
    ),
    LeftOut(
        PAPER, "Table VII", "its set of faces with and without masks, put together from three others, is not published"
    ),
    LeftOut(PAPER, "section IV-B2: Res2Net-50 and its v1b variant on CIFAR-100", "figures of the text, in no table"),
)
