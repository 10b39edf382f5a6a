"""Step-wise progressive training, Tables I to VI and section IV-B2."""

from dataclasses import replace

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
_PRETRAINED = replace(_TRAINING, weights="pretrained")
_CHOSEN = (
    "We take the rates of eq. 9 as factors of the sum of a batch's gradients (eq. 7).",
    "The paper does not say what it does with images that are not square. We squeeze them to 224 x 224 pixels.",
    FIVE_SEEDS,
)
_BATCH = "The paper does not give the batch size b for this table. We use 24: the sizes in Figure 1b are its multiples."
_BATCH_FOOD = "Section IV-C gives the batch size b, 24."
_BIRDSNAP = (
    "The hub does not mark the 2,443 test images of Birdsnap. We hold out a fifth of each class. If you have the "
    "official split, give --data and --test."
)
_TEXT = "The figures are from the text. It gives gains of 0.39 and 1.50 points, but not the baseline."
_V1B = "The variant with 25.72 million parameters is v1b, which timm calls res2net50d. The figures are from the text."
_FOOD = "We test on the part of Food-101 that the hub calls 'validation'. It is the official test set, as in the paper."

_SETS = "stepwise(batch_multiples=(1, 1, 1, 1, 1), share_weights=False, rates=(1, 1, 1, 1, 1))"
_SETS_CHOSEN = (
    "Sets A, B, C, D and O alone are the steps of one training, each of which begins with the initial weights. The "
    "paper does not give their batch size and rate. We use b and lambda.",
)
_PRETRAINED_CHOSEN = ("The paper does not say which weights trained on ImageNet it uses. We use those of timm.",)

# A table's name, data, network, the baseline's (top-1, top-5), and what was chosen; then of each strategy what follows
# the recipe's name, its text, (top-1, top-5), and the accuracy after each step.
_TABLE = (
    (
        "Table I", "cifar100", CIFAR100, "resnet50", (64.94, 88.62), (_BATCH,), _TRAINING,
        (
            ("", "stepwise", (66.34, 90.72), ()),
            ("-sets", _SETS, (57.28, 85.81), (35.79, 46.73, 52.52, 55.29, 57.28)),
        ),
    ),
    (
        "Table II", "cifar100", CIFAR100, "resnext50_32x4d", (65.58, 88.67), (_BATCH,), _TRAINING,
        (("", "stepwise", (66.80, 90.19), ()),),
    ),
    (
        "Table II", "cifar100", CIFAR100, "res2next50", (66.41, 88.74), (_BATCH,), _TRAINING,
        (("", "stepwise", (66.98, 90.59), ()),),
    ),
    (
        "section IV-B2", "cifar100", CIFAR100, "res2net50_26w_4s", (66.65, 89.15), (_BATCH, _TEXT), _TRAINING,
        (("", "stepwise", (67.04, 90.65), ()),),
    ),
    (
        "section IV-B2", "cifar100", CIFAR100, "res2net50d", (64.79, None), (_BATCH, _V1B), _TRAINING,
        (("", "stepwise", (66.11, None), ()),),
    ),
    (
        "Table III", "birdsnap", BIRDSNAP, "res2net50_26w_4s", (61.7901, 83.379), (_BATCH, _BIRDSNAP), _TRAINING,
        (("", "stepwise", (62.1391, 85.150), ()),),
    ),
    (
        "Table III", "birdsnap", BIRDSNAP, "res2next50", (61.99, 84.0025), (_BATCH, _BIRDSNAP), _TRAINING,
        (("", "stepwise", (62.4611, 84.9875), ()),),
    ),
    (
        "Table IV", "food101", FOOD101, "res2net50_26w_4s", (53.5584, 81.0297), (_BATCH_FOOD, _FOOD), _TRAINING,
        (
            ("", "stepwise", (54.9901, 81.5010), (13.0218, 21.8970, 30.2851, 38.2772, 54.9901)),
            ("-sets", _SETS, (37.8614, 67.5485), (12.0832, 15.7109, 17.0257, 18.2574, 37.8614)),
        ),
    ),
    (
        "Table IV", "food101-pretrained", FOOD101, "res2net50_26w_4s", (85.7347, 96.8832), (_BATCH_FOOD, _FOOD),
        _PRETRAINED,
        (
            ("", "stepwise", (86.7089, 97.2554), (75.5881, 78.7247, 80.6337, 81.8614, 86.7089)),
            ("-sets", _SETS, (86.2574, 97.1406), (75.5881, 80.2851, 82.0371, 83.9247, 86.2574)),
        ),
    ),
    (
        "Table V", "food101-b12", FOOD101, "res2net50_26w_4s", (84.6931, 96.5901), (_FOOD,),
        replace(_PRETRAINED, batch_size=12),
        (("", "stepwise", (85.9168, 97.1129), (75.2832, 81.5089, 83.3307, 84.1624, 85.9168)),),
    ),
    (
        "Table V", "food101-b16", FOOD101, "res2net50_26w_4s", (85.2356, 96.7050), (_FOOD,),
        replace(_PRETRAINED, batch_size=16),
        (("", "stepwise", (86.2653, 96.9822), (76.0119, 81.5327, 83.7109, 84.4554, 86.2653)),),
    ),
    (
        "Table VI", "food101-three-steps", FOOD101, "res2net50_26w_4s", (85.7347, 96.2198), (_FOOD,),
        replace(_PRETRAINED, epochs=60, schedule=milestones(30, of=60, gamma=0.1)),
        (
            (
                "",
                "stepwise(fractions=(0.2, 0.6, 1.0), batch_multiples=(1, 2, 1))",
                (86.3723, 97.1327),
                (75.5881, 83.5287, 86.3723),
            ),
        ),
    ),
)  # fmt: skip

RECIPES = tuple(
    Recipe(
        name=f"stepwise/{short}-{model}{ending}",
        paper=PAPER,
        table=table,
        published=Published(
            "accuracy",
            top1,
            own1,
            beside={} if top5 is None or own5 is None else {TOP5: (top5, own5)},
            steps=steps,
        ),
        data=data,
        model=model,
        image_size=224,
        strategy=strategy,
        training=training,
        seeds=5,
        chosen=(
            *_CHOSEN,
            *chosen,
            *(_PRETRAINED_CHOSEN if training.weights else ()),
            *(_SETS_CHOSEN if strategy == _SETS else ()),
        ),
    )
    for table, short, data, model, (top1, top5), chosen, training, strategies in _TABLE
    for ending, strategy, (own1, own5), steps in strategies
)
LEFT_OUT = (
    LeftOut(PAPER, "Table VII", "its data, faces with and without masks from three other data sets, are not published"),
)
