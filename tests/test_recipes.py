"""Recipes: that they are what the papers print, that they can be run, and what a smaller scale makes of them."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training import images, single_thread

from batchkern.errors import UserError
from batchkern.models import build, find_classifier
from batchkern.parts.virtual_samples import DENSE_LIMIT
from batchkern.recipes import (
    LEFT_OUT,
    RECIPES,
    TABLES,
    Published,
    comparison_arguments,
    grouped,
    measured,
    scaled,
    select,
    table_name,
)
from batchkern.recipes.base import EPOCHS, MEDIAN, TOP5, TRAINING
from batchkern.strategies import parse
from batchkern.trainer import Trainer

one_thread = single_thread()
ALL = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
DOCS = Path(__file__).parent.parent / "docs" / "recipes.md"

# Typed from the papers' tables: baseline, then the strategy.
PRINTED = """
trimming/svhn-resnet34 5.87 5.76
trimming/svhn-densenet121 4.62 4.42
trimming/cifar10-resnet34 17.43 17.01
trimming/cifar10-densenet121 10.10 10.19
trimming/cifar100-resnet34 48.19 47.72
trimming/cifar100-densenet121 32.95 32.18
stepwise/cifar100-resnet50 64.9400 66.3400
stepwise/cifar100-resnext50_32x4d 65.5800 66.8000
stepwise/cifar100-res2next50 66.4100 66.9800
stepwise/birdsnap-res2net50_26w_4s 61.7901 62.1391
stepwise/birdsnap-res2next50 61.9900 62.4611
stepwise/food101-res2net50_26w_4s 53.5584 54.9901
stepwise/cifar100-resnet50-sets 64.9400 57.2800
stepwise/cifar100-res2net50_26w_4s 66.65 67.04
stepwise/cifar100-res2net50d 64.79 66.11
stepwise/food101-res2net50_26w_4s-sets 53.5584 37.8614
stepwise/food101-pretrained-res2net50_26w_4s 85.7347 86.7089
stepwise/food101-pretrained-res2net50_26w_4s-sets 85.7347 86.2574
stepwise/food101-b12-res2net50_26w_4s 84.6931 85.9168
stepwise/food101-b16-res2net50_26w_4s 85.2356 86.2653
stepwise/food101-three-steps-res2net50_26w_4s 85.7347 86.3723
augmentation/cifar10-resnet44 6.92 3.23
augmentation/cifar10-resnet44-cutout 6.92 6.28
augmentation/cifar10-resnet44-cutout-ba 6.92 4.56
augmentation/cifar10-vgg16-cifar-cutout 16.25 6.17
augmentation/cifar10-vgg16-cifar-cutout-ba 16.25 4.69
augmentation/cifar10-alexnet-cutout 23.88 21.34
augmentation/cifar10-alexnet-cutout-ba 23.88 20.00
augmentation/cifar100-resnet44-cutout 28.01 27.04
augmentation/cifar100-resnet44-cutout-ba 28.01 25.85
augmentation/cifar100-vgg16-cifar-cutout 38.67 27.00
augmentation/cifar100-vgg16-cifar-cutout-ba 38.67 24.69
augmentation/imagenet-resnet50-cutout-ba 23.73 23.16
augmentation/imagenet-vgg16-cutout-ba 23.78 21.29
augmentation/imagenet-alexnet-cutout-ba 41.69 37.73
augmentation/cifar10-vgg16-cifar 16.25 2.73
augmentation/cifar10-alexnet 23.88 18.03
augmentation/cifar100-resnet44 28.01 24.61
augmentation/cifar100-vgg16-cifar 38.67 22.19
augmentation/imagenet-resnet50 23.73 22.72
augmentation/imagenet-vgg16 23.78 19.37
augmentation/imagenet-alexnet 41.69 34.40
passive/imagenet-resnet50 76.1 76.8
passive/imagenet-resnet50-srip 76.1 76.4
passive/imagenet-wrn18-2-srip 74.4 74.6
passive/cifar10-resnet56-srip 93.4 93.7
passive/cifar10-wrn22-10-srip 95.6 95.8
passive/cifar10-vgg16-cifar-srip 93.5 93.9
passive/cifar100-resnet56-srip 71.6 71.6
passive/cifar100-wrn22-10-srip 79.3 79.9
passive/cifar100-vgg16-cifar-srip 72.0 73.8
passive/imagenet-wrn18-2 74.4 74.8
passive/cifar10-resnet56 93.4 94.4
passive/cifar10-resnet56-g1 93.4 93.3
passive/cifar10-wrn22-10 95.6 96.0
passive/cifar10-wrn22-10-g1 95.6 95.4
passive/cifar10-vgg16-cifar 93.5 94.1
passive/cifar10-vgg16-cifar-g1 93.5 93.4
passive/cifar100-resnet56 71.6 71.7
passive/cifar100-resnet56-g1 71.6 71.3
passive/cifar100-wrn22-10 79.3 80.2
passive/cifar100-wrn22-10-g1 79.3 79.2
passive/cifar100-vgg16-cifar 72.0 74.1
passive/cifar100-vgg16-cifar-g1 72.0 71.9
passive/cifar10-resnet56-gap-100 6.5 5.5
passive/cifar10-resnet56-gap-25 16.2 14.9
passive/cifar10-resnet56-gap-12.5 24.4 21.1
passive/cifar10-resnet56-gtsrb 93.4 94.3
passive/imagenet-resnet50-svhn 76.1 76.7
passive/cifar10-resnet56-g10 93.4 94.1
passive/cifar10-resnet56-g1000 93.4 93.6
passive/svhn-resnet56 96.3 96.8
passive/svhn-resnet56-g1 96.3 96.1
passive/svhn-resnet56-g10 96.3 96.7
passive/svhn-resnet56-g1000 96.3 96.4
hard-batches/cifar10-resnet18-0.8 69.6 68.3
hard-batches/cifar10-resnet18-0.5 69.6 69.2
hard-batches/cifar10-resnet18-0.2 69.6 68.7
hard-batches/cifar10-resnet50-0.8 63.1 63.7
hard-batches/cifar10-resnet50-0.5 63.1 64.6
hard-batches/cifar10-resnet50-0.2 63.1 63.6
hard-batches/cifar10-efficientnet_b4-0.8 52.6 54.2
hard-batches/cifar10-efficientnet_b4-0.5 52.6 49.7
hard-batches/cifar10-efficientnet_b4-0.2 52.6 54.0
hard-batches/cifar10-efficientnetv2_s-0.8 56.5 53.8
hard-batches/cifar10-efficientnetv2_s-0.5 56.5 53.1
hard-batches/cifar10-efficientnetv2_s-0.2 56.5 50.1
hard-batches/cifar10-mobilenetv3_small_100-0.8 55.4 51.7
hard-batches/cifar10-mobilenetv3_small_100-0.5 55.4 51.7
hard-batches/cifar10-mobilenetv3_small_100-0.2 55.4 53.2
hard-batches/cifar100-resnet18-0.8 33.2 33.6
hard-batches/cifar100-resnet18-0.5 33.2 34.5
hard-batches/cifar100-resnet18-0.2 33.2 35.8
hard-batches/cifar100-resnet50-0.5 32.9 35.0
hard-batches/cifar100-resnet50-0.2 32.9 34.6
hard-batches/cifar100-efficientnet_b4-0.8 52.6 54.2
hard-batches/cifar100-efficientnet_b4-0.5 52.6 49.7
hard-batches/cifar100-efficientnet_b4-0.2 52.6 54.0
hard-batches/cifar100-efficientnetv2_s-0.8 56.5 53.8
hard-batches/cifar100-efficientnetv2_s-0.5 56.5 53.1
hard-batches/cifar100-efficientnetv2_s-0.2 56.5 50.1
hard-batches/cifar100-mobilenetv3_small_100-0.8 21.5 21.3
hard-batches/cifar100-mobilenetv3_small_100-0.5 21.5 19.7
hard-batches/cifar100-mobilenetv3_small_100-0.2 21.5 19.3
hard-batches/stl10-resnet18-0.8 50 48.3
hard-batches/stl10-resnet18-0.5 50 49.5
hard-batches/stl10-resnet18-0.2 50 47.8
hard-batches/stl10-resnet50-0.8 47.2 47.1
hard-batches/stl10-resnet50-0.5 47.2 47.3
hard-batches/stl10-resnet50-0.2 47.2 46.5
hard-batches/stl10-efficientnet_b4-0.8 33.2 32.3
hard-batches/stl10-efficientnet_b4-0.5 33.2 31.0
hard-batches/stl10-efficientnet_b4-0.2 33.2 33.5
hard-batches/stl10-efficientnetv2_s-0.8 37.6 37.3
hard-batches/stl10-efficientnetv2_s-0.5 37.6 39.9
hard-batches/stl10-efficientnetv2_s-0.2 37.6 38.2
hard-batches/stl10-mobilenetv3_small_100-0.8 33.2 32.6
hard-batches/stl10-mobilenetv3_small_100-0.5 33.2 32.8
hard-batches/stl10-mobilenetv3_small_100-0.2 33.2 29.9
"""


def at_epoch(recipe, epoch):
    """The factor on the learning rate there."""
    schedule = recipe.training.schedule
    return 1.0 if schedule == "constant" else schedule(epoch / recipe.training.epochs)


# --- what the papers print -------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_tables():
    lines = [line.split() for line in PRINTED.split("\n") if line]
    printed = {name: (float(baseline), float(method)) for name, baseline, method in lines}
    assert printed == {name: (r.published.baseline, r.published.method) for name, r in RECIPES.items()}


def test_errors_and_accuracies():
    metrics = {
        name.split("/")[0]: recipe.published.metric
        for name, recipe in RECIPES.items()
        if recipe.published.metric != "gap"
    }
    assert metrics == {
        "trimming": "error",
        "hard-batches": "accuracy",
        "stepwise": "accuracy",
        "augmentation": "error",
        "passive": "accuracy",
    }
    assert [name for name, recipe in RECIPES.items() if recipe.published.metric == "gap"] == [
        f"passive/cifar10-resnet56-gap-{share}" for share in ("100", "25", "12.5")
    ]


def test_relative_improvements_of_the_augmentation_paper():
    """The last column of its Table 1, computed from the two that a recipe holds."""
    printed = {
        "cifar10-resnet44": 53.32,
        "cifar10-vgg16-cifar": 83.20,
        "cifar100-resnet44": 12.14,
        "cifar100-vgg16-cifar": 42.62,
        "imagenet-resnet50": 4.26,
        "imagenet-vgg16": 18.54,
        "cifar10-alexnet": 24.50,
        "imagenet-alexnet": 17.49,
    }
    for name, improvement in printed.items():
        figures = RECIPES[f"augmentation/{name}"].published
        assert 100 * (1 - figures.method / figures.baseline) == pytest.approx(improvement, abs=0.006)


def test_best_figures_of_the_hard_batch_paper():
    """Its Table 6: the best delta against the baseline, relative to the best. Of ResNet-18 on CIFAR-10 it has 0.75,
    where Table 3 and the authors' own list give 0.58."""
    printed = {
        "cifar10-resnet50": 2.32,
        "cifar10-efficientnet_b4": 2.95,
        "cifar10-efficientnetv2_s": -5.01,
        "cifar10-mobilenetv3_small_100": -4.13,
        "cifar100-resnet18": 7.26,
        "cifar100-resnet50": 6.00,
        "cifar100-efficientnet_b4": 2.95,
        "cifar100-efficientnetv2_s": -5.01,
        "cifar100-mobilenetv3_small_100": -0.93,
        "stl10-resnet18": -1.01,
        "stl10-resnet50": 0.21,
        "stl10-efficientnet_b4": 0.89,
        "stl10-efficientnetv2_s": 5.76,
        "stl10-mobilenetv3_small_100": -1.21,
    }
    for name, change in printed.items():
        rows = [r.published for r in RECIPES.values() if r.name.startswith(f"hard-batches/{name}-")]
        best = max(row.method for row in rows)
        assert 100 * (best - rows[0].baseline) / best == pytest.approx(change, abs=0.015), name


def test_improvements_in_the_text_of_the_stepwise_paper():
    printed = {
        "cifar100-resnet50": 1.4,
        "cifar100-resnext50_32x4d": 1.22,
        "cifar100-res2next50": 0.57,
        "birdsnap-res2net50_26w_4s": 0.35,
        "birdsnap-res2next50": 0.47,
        "food101-res2net50_26w_4s": 1.43,
        "food101-pretrained-res2net50_26w_4s": 0.97,
        "cifar100-res2net50_26w_4s": 0.39,
    }
    for name, gain in printed.items():
        assert RECIPES[f"stepwise/{name}"].published.difference == pytest.approx(gain, abs=0.005), name


def test_what_stands_beside_the_accuracies():
    assert {
        name: RECIPES[name].published.beside
        for name in (
            "stepwise/birdsnap-res2next50",
            "passive/imagenet-wrn18-2",
            "augmentation/imagenet-vgg16",
            "hard-batches/cifar100-mobilenetv3_small_100-0.2",
            "hard-batches/stl10-resnet50-0.5",
            "stepwise/food101-b16-res2net50_26w_4s",
            "passive/imagenet-wrn18-2-srip",
            "hard-batches/cifar100-resnet50-0.2",
        )
    } == {
        "stepwise/birdsnap-res2next50": {TOP5: (84.0025, 84.9875)},
        "passive/imagenet-wrn18-2": {TOP5: (91.8, 92.2)},
        "augmentation/imagenet-vgg16": {MEDIAN: (23.78, 19.37)},
        "stepwise/food101-b16-res2net50_26w_4s": {TOP5: (96.7050, 96.9822)},
        "passive/imagenet-wrn18-2-srip": {TOP5: (91.8, 92.0)},
        "hard-batches/cifar100-resnet50-0.2": {EPOCHS: (100, 88)},
        "hard-batches/cifar100-mobilenetv3_small_100-0.2": {TRAINING: (70.3, 98.9), EPOCHS: (95, 68)},
        "hard-batches/stl10-resnet50-0.5": {TRAINING: (82.1, 85.1)},
    }


def test_epochs_to_converge_agree_with_the_papers_percentages():
    """Its last column, the change relative to the strategy's own epochs; of ResNet-18 on STL-10 relative to the
    baseline's, twice."""
    printed = {
        "cifar10-resnet18": {0.8: 1.26, 0.5: 3.89, 0.2: 8.01},
        "cifar10-resnet50": {0.5: 6.94, 0.2: 10.0},
        "cifar10-efficientnet_b4": {0.8: 6.25, 0.2: 13.33},
        "cifar10-efficientnetv2_s": {0.8: 22.22, 0.5: 17.85},
        "cifar10-mobilenetv3_small_100": {0.8: 0.0, 0.5: 3.38, 0.2: 15.09},
        "cifar100-resnet18": {0.8: 1.01, 0.5: 8.69, 0.2: 16.20},
        "cifar100-resnet50": {0.5: 7.52, 0.2: 13.60},
        "cifar100-efficientnet_b4": {0.8: 0.0, 0.5: -16.6, 0.2: 20.6},
        "cifar100-efficientnetv2_s": {0.8: 2.63, 0.5: 5.41, 0.2: 8.33},
        "cifar100-mobilenetv3_small_100": {0.8: 1.06, 0.5: 3.26, 0.2: 39.7},
        "stl10-resnet18": {0.2: 3.09},
        "stl10-efficientnet_b4": {0.8: -8.51, 0.5: 26.47},
        "stl10-efficientnetv2_s": {0.8: -12.06, 0.5: 15.90, 0.2: -5.50},
        "stl10-mobilenetv3_small_100": {0.8: 2.5, 0.5: -1.20, 0.2: 1.23},
    }
    for name, gains in printed.items():
        for delta, gain in gains.items():
            baseline, method = RECIPES[f"hard-batches/{name}-{delta}"].published.beside[EPOCHS]
            assert 100 * (baseline - method) / method == pytest.approx(gain, abs=0.11), (name, delta)


def test_accuracies_after_each_step():
    """The last step's is the main figure, wherever steps are printed."""
    stepped = {name.removeprefix("stepwise/"): r.published for name, r in RECIPES.items() if r.published.steps}
    assert {name: published.steps[:-1] for name, published in stepped.items()} == {
        "cifar100-resnet50-sets": (35.79, 46.73, 52.52, 55.29),
        "food101-res2net50_26w_4s": (13.0218, 21.8970, 30.2851, 38.2772),
        "food101-res2net50_26w_4s-sets": (12.0832, 15.7109, 17.0257, 18.2574),
        "food101-pretrained-res2net50_26w_4s": (75.5881, 78.7247, 80.6337, 81.8614),
        "food101-pretrained-res2net50_26w_4s-sets": (75.5881, 80.2851, 82.0371, 83.9247),
        "food101-b12-res2net50_26w_4s": (75.2832, 81.5089, 83.3307, 84.1624),
        "food101-b16-res2net50_26w_4s": (76.0119, 81.5327, 83.7109, 84.4554),
        "food101-three-steps-res2net50_26w_4s": (75.5881, 83.5287),
    }
    assert all(published.steps[-1] == published.method for published in stepped.values())
    for name, published in stepped.items():
        (strategy,) = parse(RECIPES[f"stepwise/{name}"].strategy)
        assert len(strategy.fractions) == len(published.steps)


def test_published_intervals_are_of_the_hard_batch_paper_alone():
    for name, recipe in RECIPES.items():
        assert (recipe.published.intervals != (None, None)) == name.startswith("hard-batches/")
    assert RECIPES["hard-batches/cifar10-mobilenetv3_small_100-0.8"].published.intervals == (1.1, 1.2)
    assert RECIPES["hard-batches/stl10-resnet18-0.5"].published.intervals == (1.5, 1.6)


@pytest.mark.parametrize(
    ("name", "epochs", "batch_size", "optimizer", "lr", "momentum", "weight_decay", "augment", "seeds"),
    [
        ("trimming/cifar10-resnet34", 150, 128, "adam", 0.001, 0.9, 0.0001, "none", 10),
        ("hard-batches/stl10-resnet50-0.5", 100, 512, "sgd", 0.005, 0.9, 0.0, "none", 5),
        ("stepwise/cifar100-resnet50", 100, 24, "sgd", 0.001, 0.9, 0.0001, "none", 5),
        ("stepwise/food101-b12-res2net50_26w_4s", 100, 12, "sgd", 0.001, 0.9, 0.0001, "none", 5),
        ("stepwise/food101-three-steps-res2net50_26w_4s", 60, 24, "sgd", 0.001, 0.9, 0.0001, "none", 5),
        ("augmentation/cifar10-resnet44", 164, 128, "sgd", 0.1, 0.9, 0.0001, "crop+flip", 5),
        ("augmentation/imagenet-vgg16", 74, 256, "sgd", 0.01, 0.9, 0.0005, "resized-crop+flip", 5),
        ("augmentation/cifar10-alexnet", 164, 128, "sgd", 0.01, 0.9, 0.0005, "crop+flip", 5),
        ("augmentation/imagenet-alexnet", 90, 128, "sgd", 0.01, 0.9, 0.0005, "resized-crop+flip", 5),
        ("passive/cifar10-resnet56", 250, 128, "sgd", 0.1, 0.9, 0.0005, "crop+flip", 5),
        ("passive/svhn-resnet56", 250, 128, "sgd", 0.1, 0.9, 0.0005, "crop", 5),
        ("passive/imagenet-resnet50", 120, 256, "sgd", 0.1, 0.9, 0.0001, "resized-crop+flip", 5),
    ],
)
def test_settings(name, epochs, batch_size, optimizer, lr, momentum, weight_decay, augment, seeds):
    recipe = RECIPES[name]
    settings = {key: value for key, value in vars(recipe.training).items() if key != "schedule"}
    assert settings == {
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "augment": augment,
        "weights": "pretrained" if "food101-" in name else None,
        "drop_last": name.startswith("hard-batches/"),
    }
    assert recipe.seeds == seeds


def test_imagenet_is_cut_out_of_the_centre_and_nothing_else_is():
    for name, recipe in RECIPES.items():
        assert recipe.center_crop == ("/imagenet-" in name) == ("resized-crop" in recipe.training.augment)
        assert comparison_arguments([recipe], out=Path("there"))["center_crop"] == recipe.center_crop


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("trimming/svhn-resnet34", {0: 1, 49: 1, 50: 0.5, 99: 0.5, 100: 0.25, 149: 0.25}),
        ("hard-batches/cifar10-resnet18-0.2", {0: 1, 99: 1}),
        ("stepwise/food101-res2net50_26w_4s", {29: 1, 30: 0.1, 59: 0.1, 60: 0.01, 89: 0.01, 90: 0.001}),
        ("augmentation/cifar100-resnet44", {81: 1, 82: 0.1, 122: 0.1, 123: 0.01}),
        ("augmentation/imagenet-resnet50", {29: 1, 30: 0.1, 60: 0.01}),
        ("augmentation/imagenet-vgg16", {24: 1, 25: 0.1, 50: 0.01}),
        ("passive/cifar10-wrn22-10", {49: 1, 50: 0.2, 99: 0.2, 100: 0.04, 150: 0.008, 199: 0.008, 200: 0.0016}),
        ("passive/imagenet-resnet50", {29: 1, 30: 0.1, 59: 0.1, 60: 0.01, 89: 0.01, 90: 0.001}),
    ],
)
def test_rates_change_at_the_published_epochs(name, factors):
    recipe = RECIPES[name]
    assert {epoch: at_epoch(recipe, epoch) for epoch in factors} == pytest.approx(factors)


def test_stepwise_decays_within_its_steps_and_its_baseline_every_30_epochs():
    """Section IV-B: at epoch 10 of a step's 20. Its own rate takes the place of the schedule."""
    recipe = RECIPES["stepwise/cifar100-resnet50"]
    train = images(600, shape=(1, 4, 4))
    trainer = Trainer("cnn", train, train, strategies=parse(recipe.strategy), progress=False, **vars(recipe.training))
    rates = {batch.epoch: batch.rate for batch in trainer.strategies[0].plan(trainer.batches, iter(()))}
    expected = {0: 1, 9: 1, 10: 0.1, 19: 0.1, 20: 1 / 50, 29: 1 / 50, 30: 1 / 500, 79: 1 / 500, 80: 1, 89: 1, 90: 0.1}
    assert {epoch: rates[epoch] for epoch in expected} == pytest.approx(expected)


def test_copies_and_weights_of_the_augmentation_paper():
    """M of Table 1, and eta of section 4.2."""
    expected = {
        "cifar10-resnet44": (40, 0.01),
        "cifar10-vgg16-cifar": (32, 0.1),
        "cifar100-resnet44": (40, 0.1),
        "cifar100-vgg16-cifar": (32, 0.1),
        "imagenet-resnet50": (4, 0.1),
        "imagenet-vgg16": (4, 0.1),
        "cifar10-alexnet": (32, 0.01),
        "imagenet-alexnet": (8, 0.1),
    }
    for name, (copies, eta) in expected.items():
        (strategy,) = parse(RECIPES[f"augmentation/{name}"].strategy)
        assert (strategy.gaussian, strategy.dropout, strategy.eta) == (copies / 2, copies / 2, eta)


@pytest.mark.parametrize(
    "name", ["cifar10-vgg16-cifar", "imagenet-vgg16", "imagenet-alexnet", "cifar10-resnet44", "cifar10-alexnet"]
)
def test_layers_of_the_augmentation_recipes(name):
    """All linear layers whose basis can be dense, in a network that has several; the vote is at the last."""
    pytest.importorskip("timm")
    recipe = RECIPES[f"augmentation/{name}"]
    (strategy,) = parse(recipe.strategy)
    shape = (3, recipe.image_size, recipe.image_size)
    with torch.device("meta"):
        model = build(recipe.model, shape=shape, classes=10).eval()
        widths = {}
        for key, module in model.named_modules():
            linear = isinstance(module, torch.nn.Linear) or key.startswith("pre_logits.fc")
            if linear:
                module.register_forward_pre_hook(lambda _, args, key=key: widths.update({key: args[0][0].numel()}))
        model(torch.empty(2, *shape))
    eligible = tuple(key for key, width in widths.items() if width <= DENSE_LIMIT)
    assert (strategy.layers or eligible) == eligible
    assert bool(strategy.layers) == (len(eligible) > 1)
    assert strategy.vote_layer in (None, eligible[-1])


def test_rows_are_accounted_for():
    assert Counter(name.split("/")[0] for name in RECIPES) == {
        "trimming": 6,
        "hard-batches": 44,
        "stepwise": 15,
        "augmentation": 21,
        "passive": 33,
    }
    reasons = "\n".join(f"{rows.rows}: {rows.reason}" for rows in LEFT_OUT)
    assert all(word in reasons for word in ("detection", "faces", "illegible"))


# --- that they can be run --------------------------------------------------------------------------------------------


def one_of_each(*attributes):
    """The first recipe of each combination, as parameters of a test."""
    firsts = {tuple(getattr(r, a) for a in attributes): r for r in reversed(RECIPES.values())}
    return pytest.mark.parametrize("recipe", firsts.values(), ids=lambda recipe: recipe.name)


@pytest.mark.slow
@one_of_each("strategy", "training")
def test_a_recipe_trains(recipe):
    """A few epochs of its settings, with a cheap network in place of its own, on small images."""
    shape, passive = (3, 4, 4), images(200, 2, (1, 6, 6)) if recipe.passive else None
    (recipe,), rows = scaled([recipe], 1e-9, 5200, 4)
    training = vars(recipe.training) | {"epochs": min(recipe.training.epochs, 5)}
    training["weights"] = None
    train, test, strategies = images(rows, 0, shape), images(40, 1, shape), parse(recipe.strategy, passive=passive)
    for strategy in strategies:
        if strategy.name == "augmentation":  # its layers are those of the recipe's network
            strategy.layers, strategy.vote_layer = (), None
        elif strategy.name == "cutout":  # and this is for larger images
            strategy.size = None
        elif strategy.name == "batch-augmentation":
            strategy.copies = 2
    trainer = Trainer("cnn", train, test, strategies=strategies, progress=False, **training)
    row = trainer.fit()
    assert math.isfinite(row["train_loss"])
    updates = training["epochs"] * math.ceil(rows / training["batch_size"])
    if strategies[0].name == "stepwise":  # an epoch a step; of 240 rows 48 in batches of 24, 96 of 48, ...
        steps = zip(strategies[0].fractions, strategies[0].batch_multiples, strict=True)
        updates = sum(math.ceil(round(part * rows) / (size * training["batch_size"])) for part, size in steps)
    assert row["updates"] == updates
    if strategies[0].name == "passive":
        assert row["passive_updates"] == updates // strategies[0].every


@one_of_each("model", "image_size")
def test_a_recipe_names_a_network_for_its_images(recipe):
    """Built without memory for its weights; and the classifier can be found, which two of the strategies need."""
    pytest.importorskip("timm")
    shape = (3, recipe.image_size, recipe.image_size)
    with torch.device("meta"):
        model = build(recipe.model, shape=shape, classes=10).eval()
        assert model(torch.empty(2, *shape)).shape == (2, 10)
    assert find_classifier(model)[1].out_features == 10


@pytest.mark.parametrize(
    ("model", "classes", "published"),
    [
        # Table 2 of the hard-batch paper, in millions
        ("mobilenetv3_small_100", 10, 1.52),
        ("efficientnet_b4", 10, 17.56),
        ("resnet18", 10, 11.18),
        ("efficientnetv2_s", 10, 20.19),
        ("resnet50", 10, 23.52),
        # section IV-B of the step-wise paper
        ("resnet50", 1000, 25.56),
        ("resnext50_32x4d", 1000, 25.02),
        ("res2net50_26w_4s", 1000, 25.70),
        ("res2net50d", 1000, 25.72),
        ("res2next50", 1000, 24.67),
    ],
)
def test_networks_have_the_published_numbers_of_parameters(model, classes, published):
    pytest.importorskip("timm")
    with torch.device("meta"):
        built = build(model, shape=(3, 224, 224), classes=classes)
    # Papers cut digits off as often as they round.
    assert sum(p.numel() for p in built.parameters()) / 1e6 == pytest.approx(published, abs=0.0101)
    assert any(recipe.model == model for recipe in RECIPES.values())


@ALL
def test_what_was_chosen_is_said(recipe):
    assert recipe.chosen
    assert len(set(recipe.chosen)) == len(recipe.chosen)
    assert all(sentence.endswith(".") for sentence in recipe.chosen)
    assert any("five seeds" in sentence for sentence in recipe.chosen) == (recipe.seeds == 5)


def test_near_matches():
    with pytest.raises(UserError, match=r"'triming/cifar10-resnet34'; near matches: trimming/cifar10-resnet34"):
        select("triming/cifar10-resnet34")
    for name in ("?", "nothing/*"):
        with pytest.raises(UserError, match=r"^there is no recipe and no table '[^']+'; batchkern reproduce --list"):
            select(name)


# --- tables ----------------------------------------------------------------------------------------------------------


def names(recipes):
    return [recipe.name for recipe in recipes]


def test_what_a_name_stands_for():
    assert names(select("passive/cifar10-resnet56")) == ["passive/cifar10-resnet56"]
    assert names(select("stepwise/table-3")) == ["stepwise/birdsnap-res2net50_26w_4s", "stepwise/birdsnap-res2next50"]
    assert names(select("trimming/*34")) == [f"trimming/{data}-resnet34" for data in ("svhn", "cifar10", "cifar100")]
    assert len(select("hard-batches/*")) == sum(name.startswith("hard-batches/") for name in RECIPES)


def test_every_row_is_in_a_table_of_its_paper():
    assert {recipe.name for rows in TABLES.values() for recipe in rows} == set(RECIPES)
    for name, rows in TABLES.items():
        assert re.fullmatch(r"[a-z-]+/(table-[1-7]|section-iv-b2)", name)
        assert all(recipe.name.partition("/")[0] == name.partition("/")[0] for recipe in rows)


@pytest.mark.parametrize(
    ("paper", "numbers"),
    [
        ("trimming", ["1"]),
        ("hard-batches", ["1", "2", "3", "4", "5", "6"]),
        ("stepwise", ["I", "II", "III", "IV", "V", "VI", "VII"]),
        ("augmentation", ["1"]),
        ("passive", ["I", "II", "III", "IV", "V", "VI", "VII"]),
    ],
)
def test_every_table_of_a_paper_can_be_run_or_has_one_reason_why_not(paper, numbers):
    title = next(recipe.paper for recipe in RECIPES.values() if recipe.name.startswith(f"{paper}/"))
    left_out = [rows.rows for rows in LEFT_OUT if rows.paper == title]
    for number in numbers:
        runs = table_name(f"{paper}/", f"Table {number}") in TABLES
        assert runs != (f"Table {number}" in left_out), number


def test_a_table_has_the_rows_that_another_prints_too():
    """Table VII of the passive paper repeats two rows of its Table II, and the two share a baseline with its own."""
    of_cifar, of_svhn = grouped(TABLES["passive/table-7"])
    assert names(of_cifar) == [f"passive/cifar10-resnet56{end}" for end in ("", "-g1", "-g10", "-g1000")]
    assert names(of_svhn) == [f"passive/svhn-resnet56{end}" for end in ("", "-g1", "-g10", "-g1000")]


def test_rows_that_share_a_baseline():
    groups = grouped(TABLES["passive/table-2"])
    assert [len(group) for group in groups] == [3] * 6  # at two g, and SRIP
    for group in groups:
        assert len({(r.data, r.model, repr(r.training)) for r in group}) == 1
        assert len({r.passive for r in group} - {None}) == 1
        assert len({recipe.published.baseline for recipe in group}) == 1
        assert len({recipe.strategy for recipe in group}) == 3
    apart = grouped(TABLES["passive/table-5"])  # two sets are injected
    assert [group[0].passive for group in apart] == ["ufldl-stanford/svhn:cropped_digits", "tanganke/gtsrb"]
    gaps = grouped(TABLES["passive/table-4"])
    assert [group[0].share for group in gaps] == [1, 0.25, 0.125]


def test_a_strategy_that_injects_nothing_joins_one_that_does():
    injecting = RECIPES["passive/cifar10-resnet56"]
    other = replace(injecting, name="x", strategy="trimming", passive=None)
    third = replace(other, name="y", passive="tanganke/gtsrb")
    assert [names(group) for group in grouped([other, injecting, third])] == [["x", injecting.name], ["y"]]
    assert comparison_arguments([other, injecting], out=Path("there"))["passive"] == injecting.passive


def test_the_smallest_scale_of_a_group_is_what_the_neediest_strategy_needs():
    group = [RECIPES["passive/cifar10-resnet56-g1"], RECIPES["passive/cifar10-resnet56"]]
    assert [recipe.training.epochs for recipe in scaled(group, 0.001, 50_000, 10)[0]] == [10, 10]


def test_a_group_is_a_comparison_of_its_strategies():
    group = grouped(TABLES["hard-batches/table-3"])[0]
    arms = comparison_arguments(group, out=Path("there"))["arms"]
    assert arms == ("baseline", *(f"hard-batches(delta={delta})" for delta in (0.8, 0.5, 0.2)))


# --- a smaller scale -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scale", "rows", "classes", "epochs", "kept"),
    [
        ("trimming/cifar10-resnet34", 0.1, 50_000, 10, 15, 5_000),
        ("trimming/cifar10-resnet34", 0.001, 50_000, 10, 2, 1_280),
        ("hard-batches/stl10-resnet18-0.2", 0.5, 5_000, 10, 50, 5_000),  # ten batches of 512 are more than there are
        ("hard-batches/cifar10-resnet18-0.2", 0.01, 50_000, 10, 2, 5_120),
        ("stepwise/cifar100-resnet50", 0.02, 50_000, 100, 5, 1_000),
        ("stepwise/birdsnap-res2next50", 0.001, 40_000, 500, 5, 500),
        ("augmentation/cifar10-resnet44", 0.001, 50_000, 10, 1, 1_280),
        ("passive/cifar10-resnet56", 0.1, 50_000, 10, 25, 5_000),
        ("passive/cifar10-resnet56", 0.001, 50_000, 10, 10, 1_280),  # the hundredth batch is in the tenth epoch
        ("passive/cifar10-resnet56", 0.001, 700, 10, 17, 700),
        ("passive/cifar10-resnet56-g1", 0.001, 50_000, 10, 1, 1_280),
        ("passive/cifar10-resnet56", 1, 50_000, 10, 250, 50_000),
    ],
)
def test_scale(name, scale, rows, classes, epochs, kept):
    recipe = RECIPES[name]
    (smaller,), left = scaled([recipe], scale, rows, classes)
    assert (smaller.training.epochs, left) == (epochs, kept)
    assert replace(smaller, training=recipe.training) == recipe
    assert replace(smaller.training, epochs=recipe.training.epochs) == recipe.training


def test_a_share_of_the_training_set_is_scaled_too():
    (recipe,), rows = scaled([RECIPES["passive/cifar10-resnet56-gap-25"]], 1, 50_000, 10)
    assert (recipe.training.epochs, rows) == (250, 12_500)
    (recipe,), rows = scaled([recipe], 0.2, 50_000, 10)
    assert (recipe.training.epochs, rows) == (50, 2_500)


def test_milestones_move_with_the_scale():
    (recipe,), _ = scaled([RECIPES["trimming/cifar10-resnet34"]], 0.1, 50_000, 10)
    assert [at_epoch(recipe, epoch) for epoch in (4, 5, 9, 10, 14)] == [1, 0.5, 0.5, 0.25, 0.25]


# --- from a recipe to a comparison and back --------------------------------------------------------------------------


def test_arguments_of_the_comparison():
    recipe = RECIPES["passive/cifar10-resnet56-gtsrb"]
    arguments = comparison_arguments(
        [recipe], out=Path("there"), test="own", train_rows=700, amp="bf16", device="cpu", overwrite=True, resume=False
    )
    assert arguments == {
        "data": "uoft-cs/cifar10",
        "test": "own",
        "passive": "tanganke/gtsrb",
        "image_size": 32,
        "center_crop": False,
        "model": "resnet56",
        "out": Path("there"),
        "arms": ("baseline", "passive(every=100)"),
        "seeds": 5,
        "budgets": ("epochs",),
        "train_rows": 700,
        "training": {
            "epochs": 250,
            "batch_size": 128,
            "optimizer": "sgd",
            "lr": 0.1,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "schedule": recipe.training.schedule,
            "augment": "crop+flip",
            "weights": None,
            "drop_last": False,
            "amp": "bf16",
            "device": "cpu",
        },
        "overwrite": True,
        "resume": False,
    }


def summary(recipe, baseline, method, difference):
    """As a comparison sums up, with (mean, half width) of each in parts of one."""
    figures = [dict(zip(("mean", "half_width"), pair)) for pair in (baseline, method, difference)]
    return {
        "summary": [
            {"arm": "baseline", "budget": "updates", "test_accuracy": figures[0], "difference": {}},
            {
                "arm": recipe.strategy,
                "budget": "updates",
                "test_accuracy": figures[1],
                "difference": {"baseline": figures[2]},
            },
            {"arm": "random", "budget": "updates", "test_accuracy": None, "difference": {}},
        ]
    }


def test_measured_is_in_the_metric_of_the_paper():
    error, accuracy = RECIPES["trimming/cifar10-resnet34"], RECIPES["passive/cifar10-resnet56"]
    figures = (0.8, 0.01), (0.83, 0.02), (0.03, 0.015)
    found = measured(error, summary(error, *figures))
    assert found == {
        "baseline": pytest.approx((20, 1)),
        error.strategy: pytest.approx((17, 2)),
        "difference": pytest.approx((-3, 1.5)),
    }
    found = measured(accuracy, summary(accuracy, *figures))
    assert found == {
        "baseline": pytest.approx((80, 1)),
        accuracy.strategy: pytest.approx((83, 2)),
        "difference": pytest.approx((3, 1.5)),
    }


def test_a_measured_gap():
    """Accuracy on the training set less that on the test set; differences by seed; without a run that failed."""
    recipe = RECIPES["passive/cifar10-resnet56-gap-25"]
    figures = {
        "baseline": {0: (0.9, 0.7), 1: (0.8, 0.7), 2: (0.7, 0.7)},
        recipe.strategy: {1: (0.8, 0.75), 0: (0.9, 0.72)},
    }
    runs = [
        {"arm": arm, "seed": seed, "error": None, "final": {"train_set_accuracy": train, "test_accuracy": test}}
        for arm, of_arm in figures.items()
        for seed, (train, test) in of_arm.items()
    ]
    runs.append({"arm": recipe.strategy, "seed": 2, "error": "it broke", "final": None})
    found = measured(recipe, {"runs": runs})
    assert found["baseline"][0] == pytest.approx(10)
    assert found[recipe.strategy][0] == pytest.approx((5 + 18) / 2)
    assert found["difference"][0] == pytest.approx((-5 - 2) / 2)
    assert found["difference"][1] == pytest.approx(12.706 * 1.5, rel=1e-4)  # Student's t with one degree of freedom


def test_published_difference_has_the_sign_of_the_metric():
    assert Published("error", 17.43, 17.01).difference == pytest.approx(-0.42)


# --- docs/recipes.md -------------------------------------------------------------------------------------------------


def documented():
    """The parts of the page that are made of the recipes."""
    return [f"## {paper}\n\n" + _section(paper) for paper in dict.fromkeys(r.paper for r in RECIPES.values())]


def _section(paper):
    recipes = [recipe for recipe in RECIPES.values() if recipe.paper == paper]
    metric = recipes[0].published.metric
    lines = [
        f"| recipe | table | strategy | published: baseline, strategy (test {metric}, %) | measured |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in recipes:
        figures = zip((r.published.baseline, r.published.method), r.published.intervals)
        shown = ", ".join(f"{value:g}" + ("" if half is None else f" ± {half:g}") for value, half in figures)
        shown += "" if r.published.metric == metric else f" ({r.published.metric})"
        lines.append(f"| `{r.name}` | {r.table} | `{r.strategy}` | {shown} | not yet measured |")
    lines += ["", "Chosen, where the paper leaves it open:", ""]
    for sentence in dict.fromkeys(sentence for r in recipes for sentence in r.chosen):
        names = [r.name for r in recipes if sentence in r.chosen]
        where = "" if len(names) == len(recipes) else f" ({', '.join(f'`{name}`' for name in names)})"
        lines.append(f"- {sentence}{where}")
    left_out = [f"- {rows.rows}: {rows.reason}." for rows in LEFT_OUT if rows.paper == paper]
    return "\n".join([*lines, *(["", "Left out:", "", *left_out] if left_out else [])])


def test_the_page_is_that_of_the_recipes():
    page = DOCS.read_text()
    for section in documented():
        assert section in page
    assert set(re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)) == set(RECIPES)
