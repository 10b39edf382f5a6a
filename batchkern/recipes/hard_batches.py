"""Hard mini-batches, Tables 3 to 5."""

from typing import Any

from batchkern.recipes.base import (
    CIFAR10,
    CIFAR100,
    EPOCHS,
    FIVE_SEEDS,
    MILLISECONDS,
    STL10,
    TRAINING,
    LeftOut,
    Published,
    Recipe,
    Training,
)

PAPER = "Sahayam et al. 2023, arXiv:2304.03486"

_TRAINING = Training(lr=0.005, momentum=0.9, weight_decay=0.0, batch_size=512, epochs=100, drop_last=True)
_CHOSEN = (
    "The paper does not give the number of epochs. We use 100, the default of the authors' program "
    "(github.com/imjohnzakkam/DyBAT).",
    "The paper does not mention weight decay, a schedule or augmentation. We use none, as that program does.",
    "The paper says that images are cropped to 128 pixels, but they are smaller. We resize them, as that program does.",
    "We replay batches in the order of descending loss, as Algorithm 2 does. That program replays them in the order of "
    "their index, which is order=index here.",
    "That program never shuffles, and drops the last, smaller batch. We drop that batch too, but shuffle: the baseline "
    "in each epoch, and the batches that are replayed once.",
    "The paper does not say when a training loss has converged. We take the first epoch in which it is within 1 % of "
    "its total decrease from its minimum.",
    FIVE_SEEDS,
)
_SAME_FIGURES = (
    "Tables 3 and 4 print the same test accuracies for this network on CIFAR-10 and on CIFAR-100. One of the two is "
    "probably a mistake in the paper."
)
_DERIVED = (
    "The row of the baseline is illegible in our copy of the paper. Its accuracy follows from Table 6, which gives "
    "the gain of the best row as 6.00 % of that row's accuracy. Its epochs follow from the percentages in the rows "
    "below it."
)

# (network, its baseline, {delta: figure}): test top-1 accuracy, what follows the plus-minus sign, the epoch e in which
# the training loss converged (None where e and the percentage beside it contradict each other), training accuracy.
_TABLES = (
    (
        "Table 3",
        "cifar10",
        CIFAR10,
        (
            (
                "resnet18",
                (69.6, 0.9, 80, 99.7),
                {0.8: (68.3, 1.0, 79, 99.7), 0.5: (69.2, 1.0, 77, 99.7), 0.2: (68.7, 0.7, 74, 99.7)},
            ),
            (
                "resnet50",
                (63.1, 1.1, 77, 99.6),
                {0.8: (63.7, 0.9, None, 99.6), 0.5: (64.6, 1.0, 72, 99.6), 0.2: (63.6, 1.0, 70, 99.6)},
            ),
            (
                "efficientnet_b4",
                (52.6, 0.7, 34, 99.5),
                {0.8: (54.2, 1.0, 32, 99.5), 0.5: (49.7, 1.0, None, 99.5), 0.2: (54.0, 1.2, 30, 99.6)},
            ),
            (
                "efficientnetv2_s",
                (56.5, 1.1, 33, 99.6),
                {0.8: (53.8, 1.1, 27, 99.6), 0.5: (53.1, 0.7, 28, 99.5), 0.2: (50.1, 1.3, None, 99.5)},
            ),
            (
                "mobilenetv3_small_100",
                (55.4, 1.1, 61, 99.5),
                {0.8: (51.7, 1.2, 61, 99.5), 0.5: (51.7, 0.9, 59, 99.5), 0.2: (53.2, 1.1, 53, 99.5)},
            ),
        ),
    ),
    (
        "Table 4",
        "cifar100",
        CIFAR100,
        (
            (
                "resnet18",
                (33.2, 0.8, 100, 86.6),
                {0.8: (33.6, 1.1, 99, 91.0), 0.5: (34.5, 1.0, 92, 95.0), 0.2: (35.8, 0.9, 86, 98.0)},
            ),
            ("resnet50", (32.9, None, 100, None), {0.5: (35.0, 0.8, 93, 88.3), 0.2: (34.6, 1.0, 88, 95.1)}),
            (
                "efficientnet_b4",
                (52.6, 0.7, 35, 99.5),
                {0.8: (54.2, 1.0, 35, 99.5), 0.5: (49.7, 1.0, 42, 99.5), 0.2: (54.0, 1.2, 29, 99.6)},
            ),
            (
                "efficientnetv2_s",
                (56.5, 1.1, 39, 99.6),
                {0.8: (53.8, 1.1, 38, 99.6), 0.5: (53.1, 0.7, 37, 99.5), 0.2: (50.1, 1.3, 36, 99.5)},
            ),
            (
                "mobilenetv3_small_100",
                (21.5, 0.9, 95, 70.3),
                {0.8: (21.3, 0.8, 94, 81.2), 0.5: (19.7, 0.7, 92, 79.4), 0.2: (19.3, 0.6, 68, 98.9)},
            ),
        ),
    ),
    (
        "Table 5",
        "stl10",
        STL10,
        (
            (
                "resnet18",
                (50.0, 1.5, 100, 66.8),
                {0.8: (48.3, 1.7, 91, 65.9), 0.5: (49.5, 1.6, 91, 65.9), 0.2: (47.8, 1.0, 97, 60.9)},
            ),
            (
                "resnet50",
                (47.2, 1.4, None, 82.1),
                {0.8: (47.1, 1.5, 98, 85.2), 0.5: (47.3, 1.4, 97, 85.1), 0.2: (46.5, 1.5, 100, 77.1)},
            ),
            (
                "efficientnet_b4",
                (33.2, 0.9, 43, 93.0),
                {0.8: (32.3, 1.1, 47, 93.1), 0.5: (31.0, 1.1, 34, 93.0), 0.2: (33.5, 1.3, None, 92.7)},
            ),
            (
                "efficientnetv2_s",
                (37.6, 1.2, 51, 93.0),
                {0.8: (37.3, 1.1, 58, 93.4), 0.5: (39.9, 0.9, 44, 93.9), 0.2: (38.2, 1.1, 54, 93.4)},
            ),
            (
                "mobilenetv3_small_100",
                (33.2, 1.0, 82, 92.8),
                {0.8: (32.6, 0.7, 80, 93.0), 0.5: (32.8, 1.4, 83, 92.9), 0.2: (29.9, 1.1, 81, 92.8)},
            ),
        ),
    ),
)
_MILLISECONDS = {1.0: 31.0, 0.8: 98.1, 0.5: 99.1, 0.2: 99.6}
"""Table 1: with ResNet-18 on CIFAR-10."""


def _published(table: str, model: str, delta: float, baseline: Any, method: Any) -> Published:
    beside = {TRAINING: (baseline[3], method[3])} if baseline[3] else {}
    if baseline[2] and method[2]:
        beside[EPOCHS] = baseline[2], method[2]
    if (table, model) == ("Table 3", "resnet18"):
        beside[MILLISECONDS] = _MILLISECONDS[1.0], _MILLISECONDS[delta]
    return Published("accuracy", baseline[0], method[0], intervals=(baseline[1], method[1]), beside=beside)


def _chosen(table: str, model: str) -> tuple[str, ...]:
    if (table, model) == ("Table 4", "resnet50"):
        return (*_CHOSEN, _DERIVED)
    twice = model.startswith("efficientnet") and table != "Table 5"
    return (*_CHOSEN, _SAME_FIGURES) if twice else _CHOSEN


RECIPES = tuple(
    Recipe(
        name=f"hard-batches/{short}-{model}-{delta}",
        paper=PAPER,
        table=table,
        published=_published(table, model, delta, baseline, method),
        data=data,
        model=model,
        image_size=128,
        strategy=f"hard-batches(delta={delta})",
        training=_TRAINING,
        seeds=5,
        chosen=_chosen(table, model),
    )
    for table, short, data, rows in _TABLES
    for model, baseline, methods in rows
    for delta, method in methods.items()
)
LEFT_OUT = (
    LeftOut(
        PAPER,
        "Table 4: ResNet-50 with delta 0.8",
        "the figures are illegible in our copy of the paper",
    ),
    LeftOut(PAPER, "Table 1", "the times of an update, which are shown with the rows of ResNet-18 in Table 3"),
    LeftOut(PAPER, "Table 2", "the sizes of the networks, which a test compares with those that are built"),
    LeftOut(PAPER, "Table 6", "the runs of Tables 3 to 5 once more, as relative changes"),
)
