"""Hard mini-batches, Tables 3 to 5."""

from typing import Any

from batchkern.recipes.base import CIFAR10, CIFAR100, FIVE_SEEDS, STL10, LeftOut, Published, Recipe, Training

PAPER = "Sahayam et al. 2023, arXiv:2304.03486"

_TRAINING = Training(lr=0.005, momentum=0.9, weight_decay=0.0, batch_size=512, epochs=100)
_CHOSEN = (
    "The number of epochs is not given; the authors' program (github.com/imjohnzakkam/DyBAT) has 100 by default.",
    "Weight decay, schedule and augmentation are not mentioned, and the authors' program has none.",
    "The paper crops the images to 128 pixels, which are smaller than that: they are resized, as in that program.",
    "Batches are replayed in descending loss, as in Algorithm 2; that program replays them in index order, which is "
    "order=index.",
    "That program never shuffles and drops the last, smaller batch; here the baseline shuffles in each epoch, the "
    "batches that are replayed are shuffled once, and none is dropped.",
    "When a training loss has converged is not said: once it came to its least, but for 1 % of its whole fall.",
    FIVE_SEEDS,
)
_SAME_FIGURES = (
    "Tables 3 and 4 print the same test accuracies for this network on CIFAR-10 and on CIFAR-100; one of the two is "
    "probably a slip of the paper."
)

# (network, its baseline, {delta: figure}): test top-1 accuracy, what follows the plus-minus sign, and the epoch e in
# which the training loss converged; None where e and the percentage beside it contradict each other.
_TABLES = (
    (
        "Table 3",
        "cifar10",
        CIFAR10,
        (
            ("resnet18", (69.6, 0.9, 80), {0.8: (68.3, 1.0, 79), 0.5: (69.2, 1.0, 77), 0.2: (68.7, 0.7, 74)}),
            ("resnet50", (63.1, 1.1, 77), {0.8: (63.7, 0.9, 75), 0.5: (64.6, 1.0, 72), 0.2: (63.6, 1.0, 70)}),
            ("efficientnet_b4", (52.6, 0.7, 34), {0.8: (54.2, 1.0, 32), 0.5: (49.7, 1.0, None)}),
            ("efficientnetv2_s", (56.5, 1.1, 33), {0.8: (53.8, 1.1, 27), 0.2: (50.1, 1.3, None)}),
            (
                "mobilenetv3_small_100",
                (55.4, 1.1, 61),
                {0.8: (51.7, 1.2, 61), 0.5: (51.7, 0.9, 59), 0.2: (53.2, 1.1, 53)},
            ),
        ),
    ),
    (
        "Table 4",
        "cifar100",
        CIFAR100,
        (
            ("resnet18", (33.2, 0.8, 100), {0.8: (33.6, 1.1, 99), 0.5: (34.5, 1.0, 92), 0.2: (35.8, 0.9, 86)}),
            ("efficientnet_b4", (52.6, 0.7, 35), {0.8: (54.2, 1.0, 35), 0.5: (49.7, 1.0, 42), 0.2: (54.0, 1.2, 29)}),
            ("efficientnetv2_s", (56.5, 1.1, 39), {0.8: (53.8, 1.1, 38), 0.5: (53.1, 0.7, 37), 0.2: (50.1, 1.3, 36)}),
            (
                "mobilenetv3_small_100",
                (21.5, 0.9, 95),
                {0.8: (21.3, 0.8, 94), 0.5: (19.7, 0.7, 92), 0.2: (19.3, 0.6, 68)},
            ),
        ),
    ),
    (
        "Table 5",
        "stl10",
        STL10,
        (
            ("resnet18", (50.0, 1.5, 100), {0.8: (48.3, 1.7, 91), 0.5: (49.5, 1.6, 91), 0.2: (47.8, 1.0, 97)}),
            ("resnet50", (47.2, 1.4, None), {0.8: (47.1, 1.5, 98), 0.5: (47.3, 1.4, 97), 0.2: (46.5, 1.5, 100)}),
            ("efficientnet_b4", (33.2, 0.9, 43), {0.8: (32.3, 1.1, 47), 0.5: (31.0, 1.1, 34), 0.2: (33.5, 1.3, None)}),
            ("efficientnetv2_s", (37.6, 1.2, 51), {0.8: (37.3, 1.1, 58), 0.5: (39.9, 0.9, 44), 0.2: (38.2, 1.1, 54)}),
            (
                "mobilenetv3_small_100",
                (33.2, 1.0, 82),
                {0.8: (32.6, 0.7, 80), 0.5: (32.8, 1.4, 83), 0.2: (29.9, 1.1, 81)},
            ),
        ),
    ),
)
_UPDATE_SECONDS = {1.0: 0.0310, 0.8: 0.0981, 0.5: 0.0991, 0.2: 0.0996}
"""Table 1: with ResNet-18 on CIFAR-10."""


def _published(table: str, model: str, delta: float, baseline: Any, method: Any) -> Published:
    (value, half, epochs), (other, other_half, other_epochs) = baseline, method
    return Published(
        "accuracy",
        value,
        other,
        intervals=(half, other_half),
        converged=(epochs, other_epochs) if epochs and other_epochs else None,
        update_seconds=(
            (_UPDATE_SECONDS[1.0], _UPDATE_SECONDS[delta]) if (table, model) == ("Table 3", "resnet18") else None
        ),
    )


def _chosen(table: str, model: str) -> tuple[str, ...]:
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
        "Table 3: EfficientNet B4 with delta 0.2, EfficientNetV2-S with delta 0.5; Table 4: ResNet-50",
        "the figures could not be read with certainty in the copy of the paper at hand",
    ),
    LeftOut(PAPER, "Table 6", "the same runs as Tables 3 to 5, as relative changes"),
    LeftOut(PAPER, "train accuracy in Tables 3 to 5", "it is not measured"),
)
