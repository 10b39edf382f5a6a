"""What each process of test_distributed.py runs: ``python ranks.py FOLDER RANK WORLD JOB...``.

What a job returns is saved as FOLDER/RANK.pt, under the job's name.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from training import RecordingTrainer, flat, images, net, normalised, sgd, trainer

from batchkern.data import ImageData
from batchkern.errors import UserError
from batchkern.parts import BatchLoss, HardBatchSampler, WholeEpochs
from batchkern.strategies import (
    RHO,
    SRIP,
    BatchAugmentation,
    CutMix,
    Cutout,
    HardBatches,
    ImportanceSampling,
    InfoBatch,
    Mixup,
    PassiveInjection,
    RandomSelection,
    SelectiveBackprop,
    SmallLoss,
    Stepwise,
    StochasticAugmentation,
    Trimming,
    trimming,
)
from batchkern.trainer import Interrupted

PASSIVE = images(21, seed=5, classes=3)
STRONG = {"eta": 1.0, "sigma": 0.5, "tau": 0.6, "omega": 0.0}


def masks(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Which of four levels a pixel has, under noise; some count nowhere, in each row another share."""
    numbers = torch.Generator().manual_seed(seed)
    levels = torch.randint(4, (rows, 6, 6), generator=numbers)
    inputs = levels[:, None] + 0.4 * torch.randn(rows, 1, 6, 6, generator=numbers)
    levels[torch.rand(rows, 6, 6, generator=numbers) < torch.rand(rows, 1, 1, generator=numbers)] = -100
    return inputs, levels


class NoisyRows(Dataset):
    """Each time others."""

    def __len__(self) -> int:
        return 41

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        data = images(41)
        return data.images[row] / 255 + 0.2 * torch.randn(1, 6, 6), int(data.labels[row])


class Segments(nn.Sequential):
    """Logits for each pixel."""

    def __init__(self, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            super().__init__(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))


SCENARIOS: dict[str, Callable[[], list[Any]]] = {
    "baseline": lambda: [],
    "trimming": lambda: [Trimming()],
    "compact trimming": lambda: [Trimming(0.5, backward="compact")],
    "hard batches": lambda: [HardBatches(0.5)],
    "stepwise": lambda: [Stepwise((0.5, 1.0), (1, 2))],
    "augmentation": lambda: [StochasticAugmentation(**STRONG, layers=("conv2", "fc"))],
    "augmentation in two steps": lambda: [StochasticAugmentation(**STRONG, two_step=True)],
    "passive": lambda: [PassiveInjection(PASSIVE, 2, batch_size=6)],
    "random rows": lambda: [RandomSelection("rows", 0.7, 0.3)],
    "random rows alone": lambda: [RandomSelection("rows", 0.7, 0.3, backward="compact")],
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
    "a batch of one row": lambda: [
        Trimming(0.5),
        StochasticAugmentation(**STRONG, two_step=True),
        PassiveInjection(PASSIVE, 2),
    ],
    "an idle layer": lambda: [],
    "mixed": lambda: [Mixup(1.0), StochasticAugmentation(**STRONG)],
    "mixed and trimmed": lambda: [Cutout(3), Mixup(1.0), Trimming(0.8, 0.3), PassiveInjection(PASSIVE, 3)],
    "mixed, compact trimming": lambda: [CutMix(), Trimming(0.5, backward="compact")],
    "mixed, random rows": lambda: [Mixup(1.0), RandomSelection("rows", 0.7, 0.3)],
    "mixed, copied, random rows alone": lambda: [
        CutMix(),
        BatchAugmentation(2),
        RandomSelection("rows", 0.7, 0.3, backward="compact"),
    ],
    "a mixed batch of one row": lambda: [Mixup(1.0), HardBatches(0.5), Trimming(0.5)],
    "knobs": lambda: [Trimming(0.8, 0.3), PassiveInjection(PASSIVE, 3)],
    "masks": lambda: [Trimming(0.5, 0.5)],
    "random rows of a dataset": lambda: [HardBatches(0.5)],
    "infobatch": lambda: [InfoBatch(0.6, 1.0)],
    "selective backprop": lambda: [SelectiveBackprop(1.0, 30)],
    "selective backprop, trimmed, passive": lambda: [
        SelectiveBackprop(0.5),
        Trimming(0.7),
        PassiveInjection(PASSIVE, 3),
    ],
    "importance": lambda: [ImportanceSampling(3, 0.4)],
    "mixed, importance": lambda: [Mixup(1.0), ImportanceSampling(2, 0.0)],
    "rho": lambda: [RHO(0.5, reference_epochs=2)],
    "small loss": lambda: [SmallLoss(0.5, 1)],
    "small loss at random": lambda: [SmallLoss(0.5, 1, at_random=True)],
    "cut out, copied, isometric": lambda: [Cutout(), BatchAugmentation(2), SRIP(0.1)],
}
SOME = (
    "masks",
    "compact trimming",
    "augmentation",
    "passive",
    "a batch of one row",
    "mixed",
    "a mixed batch of one row",
)
"""Those that three ranks train."""
OPTIONS: dict[str, dict[str, Any]] = {
    "baseline": {"augment": "crop+flip", "label_smoothing": 0.1, "schedule": "cosine"},
    "passive": {"optimizer": "adamw", "lr": 1e-3},
    "hard, trimmed, augmented, passive": {"augment": "flip"},
    "importance": {"label_smoothing": 0.1, "augment": "crop+flip"},
    "mixed": {"label_smoothing": 0.1, "augment": "crop+flip"},
    "a mixed batch of one row": {"train": images(9), "batch_size": 4},
    "knobs": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.7, "ema_decay": 0.8, "warmup_epochs": 1},
    "masks": {"train": masks(41), "test": masks(20, 1)},
    "random rows of a dataset": {"train": NoisyRows(), "test": NoisyRows(), "workers": 1},
    "a batch of one row": {"train": images(9), "batch_size": 4},  # of the last batch, only the first rank has a row
}


class WithIdleLayer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.idle = nn.Linear(3, 3)
        with torch.no_grad():
            self.idle.weight.fill_(0.5)
            self.idle.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def build(strategies: list[Any], model: nn.Module | None = None, **options: Any) -> RecordingTrainer:
    """A trainer of two epochs: five batches of 7 rows and one of 6, which two ranks share evenly and three do, too.

    Each rank comes with weights of its own, of which only the first rank's may matter.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = model or net(seed=100 * rank, **options.pop("net", {}))
    defaults = {"model": model, "train": images(41), "test": images(20, seed=1), "batch_size": 7}
    return trainer(strategies, **defaults | options)


# --- the training of one process ------------------------------------------------------------------------------------


def trained(name: str) -> dict[str, Any]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    made = {"an idle layer": lambda: WithIdleLayer(net()), "masks": lambda: Segments(rank)}
    model = made[name]() if name in made else None
    run = build(SCENARIOS[name](), model, **OPTIONS.get(name, {}))
    taken, batch = [], run.feed.batch

    def watched(indices: Tensor, step: int | None, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if step is not None:  # not where it is only evaluated
            taken.append((indices, positions))
        return batch(indices, step, positions)

    run.feed.batch = watched  # type: ignore[method-assign]
    row = run.fit()
    return {
        "weights": run.weights,
        "heads": run.heads,
        "row": {key: value for key, value in row.items() if key != "seconds"},
        "taken": taken,
        "predicted": run.predict(images(1100, seed=2) if isinstance(run.feed.data, ImageData) else run.test_feed.data),
        "strategies": [strategy.state_dict() for strategy in run.strategies],
    }


def all_scenarios(folder: Path) -> dict[str, Any]:
    return {name: trained(name) for name in SCENARIOS}


def some_scenarios(folder: Path) -> dict[str, Any]:
    return {name: trained(name) for name in SOME}


# --- what idles, what decides ---------------------------------------------------------------------------------------


def idle_heads(folder: Path) -> dict[str, float]:
    """How many steps AdamW has made with each part of the network: none with those that had no gradient."""
    run = build([PassiveInjection(PASSIVE, 4)], optimizer="adamw", lr=1e-3)
    head = run.run.extras["passive_head"]["fc"].weight
    run.fit()
    parts = {"head": head, "fc": run.model.fc.weight, "trunk": run.model.conv1.weight}
    return {name: float(run.optimizer.state[weight]["step"]) for name, weight in parts.items()}


def timing(folder: Path) -> float:
    """Compact costs a quarter on the first rank; on the others it would never pay."""
    seconds = iter([1.0, 4.0 if dist.get_rank() == 0 else 1.0] * 5)
    kept = trimming._seconds
    trimming._seconds = lambda action, device: next(seconds)
    try:
        strategy = Trimming(backward="auto")
        build([strategy])
    finally:
        trimming._seconds = kept
    return strategy.compact_below


def batch_norm(folder: Path) -> list[dict[str, float]]:
    run = build([], net={"norm": True}, out=folder / "norm")
    run.fit()
    return [run.evaluate(), {"running mean": float(run.model.norm.running_mean.sum())}]


# --- resume and stop ------------------------------------------------------------------------------------------------


class KilledError(BaseException):
    pass


def everything(out: Path, **options: Any) -> RecordingTrainer:
    strategies = [
        HardBatches(0.5),
        Trimming(),
        PassiveInjection(PASSIVE, 3),
        StochasticAugmentation(**STRONG | {"omega": math.pi / 3}),
    ]
    options = {"net": {"dropout": 0.25, "norm": True}, "epochs": 3, "augment": "crop+flip", "out": out} | options
    return build(strategies, **options)


def at_update(run: Any, number: int, action: Callable[[], None]) -> None:
    """Before the update of this number, counted from 1, passive ones too."""
    update, made = run.updater.update, 0

    def watched(batch: Any) -> None:
        nonlocal made
        made += 1
        if made == number:
            action()
        update(batch)

    run.updater.update = watched


def resumed(folder: Path) -> int:
    everything(folder / "whole").fit()

    def die() -> None:
        raise KilledError

    killed = everything(folder / "killed", checkpoint_every=1)
    at_update(killed, 10, die)
    with contextlib.suppress(KilledError):
        killed.fit()
    torch.manual_seed(5)
    again = everything(folder / "killed", resume=True)
    again.fit()
    return len(again.weights)


def stopped(folder: Path) -> list[Any]:
    """One rank is told to stop by its launcher; the other by Ctrl-C, twice and later."""
    run = everything(folder / "stopped")
    rank = dist.get_rank()
    at_update(run, 6 - rank, lambda: [os.kill(os.getpid(), (signal.SIGINT, signal.SIGTERM)[rank]) for _ in range(2)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        run.fit()
        said = "not stopped"
    except Interrupted as stop:
        said = str(stop)
    made, restored = len(run.weights), signal.getsignal(signal.SIGTERM) is before
    everything(folder / "stopped", resume=True).fit()
    return [said, made, restored]


# --- what is wrong --------------------------------------------------------------------------------------------------


def sentence(action: Callable[[], Any]) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return "no error"


def wrong(folder: Path) -> dict[str, str]:
    said = {
        "holds a run": sentence(lambda: build([], out=folder / "one")),
        "other ranks": sentence(lambda: build([], out=folder / "one", resume=True)),
    }
    run = build([], out=folder / "unwritable")

    def block() -> None:
        if dist.get_rank() == 0:
            (folder / "unwritable" / "metrics.jsonl").unlink()
            (folder / "unwritable" / "metrics.jsonl").mkdir()

    at_update(run, 2, block)
    said["not writable"] = sentence(run.fit)
    run = build([], out=folder / "diverged", checkpoint_every=2)

    def diverge() -> None:
        if dist.get_rank() == 1:
            with torch.no_grad():
                run.model.fc.weight[0, 0] = math.nan

    at_update(run, 4, diverge)
    said["diverged"] = sentence(run.fit)
    return said


# --- your own training loop ----------------------------------------------------------------------------------------


def snippet(folder: Path) -> Tensor:
    """The step in docs/distributed.md, once, with this rank's half of a batch."""
    page = Path(__file__).parent.parent / "docs" / "distributed.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    model = net()
    parallel = nn.parallel.DistributedDataParallel(model)
    rank = dist.get_rank()
    x, target = halves(rank)
    names["step"](parallel, torch.optim.SGD(model.parameters(), lr=0.1), x, target)
    return flat(model)


def halves(*ranks: int) -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(5)
    x, target = torch.randn(12, 1, 6, 6, generator=numbers), torch.randint(4, (12,), generator=numbers)
    return torch.cat([x.chunk(2)[r] for r in ranks]), torch.cat([target.chunk(2)[r] for r in ranks])


def loop(folder: Path) -> list[Any]:
    """Hard batches in a loop of one's own, whose sampler and loss know the group; batches of 7 rows on two ranks."""
    group = dist.group.WORLD if dist.is_initialized() else None
    data, model = images(41), net(norm=False)
    dataset = TensorDataset(normalised(data), data.labels)
    parallel = nn.parallel.DistributedDataParallel(model) if group else model
    sampler = HardBatchSampler(len(dataset), 7, delta=0.5, group=group)
    loader = WholeEpochs(DataLoader(dataset, batch_sampler=sampler))
    loss_of = BatchLoss(0.6, sampler=sampler, group=group)
    optimizer, weights = sgd(model), []
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            loss_of(parallel(x), y).backward()
            optimizer.step()
            weights.append(flat(model))
    return [weights, sampler.rounds.ledger.losses]


if __name__ == "__main__":
    folder, rank, world, *jobs = sys.argv[1:]
    torch.set_num_threads(1)
    sys.modules["batchkern.plots"] = type(sys)("batchkern.plots")
    sys.modules["batchkern.plots"].plot_run = lambda path: None
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init",
        rank=int(rank),
        world_size=int(world),
        timeout=timedelta(seconds=60),  # a rank that waits for another one should fail, not hang
    )
    torch.save({job: globals()[job](Path(folder)) for job in jobs}, Path(folder) / f"{rank}.pt")
