"""What the processes of test_distributed.py run. ``python ranks.py FOLDER RANK WORLD`` does the jobs of FOLDER/jobs."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from training import flat, images, net, trainer, without_plots

from batchkern.errors import UserError
from batchkern.strategies import (
    HardBatches,
    PassiveInjection,
    RandomSelection,
    Stepwise,
    StochasticAugmentation,
    Strategy,
    Trimming,
)
from batchkern.trainer import Interrupted, Trainer

PASSIVE = images(21, seed=5, classes=3)
STRONG = {"eta": 1.0, "sigma": 0.5, "tau": 0.6, "omega": 0.0}
SCENARIOS = {
    "baseline": lambda: [],
    "trimming": lambda: [Trimming()],
    "compact trimming": lambda: [Trimming(0.5, backward="compact")],
    "hard batches": lambda: [HardBatches(0.5)],
    "stepwise": lambda: [Stepwise((0.5, 1.0), (1, 2))],
    "augmentation": lambda: [StochasticAugmentation(**STRONG, layers=("conv2", "fc"))],
    "augmentation in two steps": lambda: [StochasticAugmentation(**STRONG, two_step=True)],
    "passive": lambda: [PassiveInjection(PASSIVE, 2, batch_size=6)],
    "random rows": lambda: [RandomSelection("rows", 0.7, 0.3)],
    "random batches": lambda: [RandomSelection("batches", delta=0.5)],
    "hard, trimmed, augmented, passive": lambda: [
        HardBatches(0.5),
        Trimming(0.8, 0.3, backward="compact"),
        StochasticAugmentation(**STRONG | {"omega": math.pi / 3}),
        PassiveInjection(PASSIVE, 3),
    ],
    "stepwise, random rows, augmented in two steps": lambda: [
        Stepwise((0.5, 1.0), (1, 2)),
        RandomSelection("rows", 0.7, 0.3),
        StochasticAugmentation(**STRONG, two_step=True, basis="hadamard"),
    ],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "baseline": {"augment": "crop+flip", "label_smoothing": 0.1, "schedule": "cosine"},
    "passive": {"optimizer": "adamw", "lr": 1e-3},
    "hard, trimmed, augmented, passive": {"augment": "flip"},
}
ROWS = (
    41  # batches of 7: the last has 6 rows, which two ranks share evenly and three as well, as they do not the others
)


def build(name: str, **options: Any) -> Any:
    """A trainer of two epochs; with random weights of its own on each rank but the first."""
    rank = int(os.environ.get("RANK", "0"))
    model = net(seed=100 * rank)
    return trainer(
        SCENARIOS[name](), model, images(ROWS), images(20, seed=1), batch_size=7, **OPTIONS.get(name, {}) | options
    )


def trained(name: str) -> dict[str, Any]:
    run = build(name)
    row = run.fit()
    return {
        "weights": run.weights,
        "heads": run.heads,
        "row": row,
        "fed": run.fed,
        "predicted": run.predict(images(1100, seed=2)),
        "strategies": [strategy.state_dict() for strategy in run.strategies],
    }
