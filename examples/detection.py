"""Does a network that was trained with passive batches make a better detector? Table III of its paper, on your data.

    batchkern train --data ILSVRC/imagenet-1k --model resnet50 --image-size 224 --out runs/plain ...
    batchkern train --data ILSVRC/imagenet-1k --model resnet50 --image-size 224 --out runs/passive --strategy passive \\
        --passive uoft-cs/cifar100 ...
    python examples/detection.py --backbone plain=runs/plain --backbone passive=runs/passive \\
        --train coco/train2017 coco/annotations/instances_train2017.json \\
        --test coco/val2017 coco/annotations/instances_val2017.json

Each run of a residual network becomes the backbone of torchvision's Faster R-CNN with a feature pyramid, which is then
trained on boxes in COCO's format: seed by seed the same new weights, the same order, the same flips. Shown are COCO's
average precision (AP, over overlaps of 0.5 to 0.95) and that at an overlap of 0.5, as pycocotools computes them, with
the 95 % interval over seeds and the paired difference to the first backbone.

The defaults are the usual ones for COCO: 12 epochs, batches of 16, SGD at 0.02 with momentum 0.9 and weight decay 1e-4,
a tenth of the rate from epochs 8 and 11 on, the shorter side resized to 800 pixels, and the stem and the first stage of
the backbone left as they are. ``--drawn FOLDER`` draws a small set of shapes there and takes it in place of COCO.

Singh et al. 2020, arXiv:2006.04406, section V-B. Needs ``pip install 'batchkern[train,models]' pycocotools``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.transforms.functional import pil_to_tensor

from batchkern.bench_report.markdown import table
from batchkern.compare.statistics import interval, paired_difference
from batchkern.errors import UserError
from batchkern.files import write_file

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = ("rectangle", "disc", "triangle")
Detections = list[dict[str, Any]]


# --- data ------------------------------------------------------------------------------------------------------


class Boxes(CocoDetection):
    """Images in [0, 1] and their boxes, with classes counted from 1; crowds and empty boxes are left out."""

    def __init__(self, images: Path, annotations: Path) -> None:
        for path in (images, annotations):
            if not path.exists():
                raise UserError(
                    f"{path} does not exist; there must be a folder of images and COCO's JSON of their boxes"
                )
        try:
            with quiet():
                super().__init__(str(images), str(annotations))
            files = [image["file_name"] for image in self.coco.loadImgs(self.ids)]
            self.classes = {category: place for place, category in enumerate(sorted(self.coco.getCatIds()), 1)}
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise UserError(
                f"{annotations} is no file of boxes in COCO's format: {type(error).__name__}: {error}"
            ) from None
        missing = next((file for file in files if not (images / file).is_file()), None)
        if missing:
            raise UserError(f"{images} has no {missing}, which {annotations} names")
        if not self.ids or not self.classes:
            raise UserError(f"{annotations} has {len(self.ids)} images and {len(self.classes)} categories")

    def __getitem__(self, place: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, annotations = super().__getitem__(place)
        pixels = pil_to_tensor(image.convert("RGB")).float() / 255
        usable = [a for a in annotations if not a.get("iscrowd") and min(a["bbox"][2:]) > 0]
        boxes = torch.tensor([a["bbox"] for a in usable], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([self.classes[a["category_id"]] for a in usable], dtype=torch.int64)
        return pixels, {"boxes": boxes, "labels": labels}


def mirrored(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    boxes, width = target["boxes"], image.shape[-1]
    boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
    return image.flip(-1), target | {"boxes": boxes}


def draw(folder: Path, name: str, count: int, size: int = 96) -> tuple[Path, Path]:
    """Images of one to three coloured shapes on noise, and their boxes: a folder of images, and COCO's JSON."""
    numbers = np.random.default_rng([count, *name.encode()])
    images, annotations = folder / name, folder / f"{name}.json"
    images.mkdir(parents=True)
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": 10 * place, "name": shape} for place, shape in enumerate(SHAPES, 1)]
    for number in range(count):
        picture = Image.fromarray(numbers.integers(0, 90, (size, size, 3), dtype=np.uint8))
        pen = ImageDraw.Draw(picture)
        for _ in range(numbers.integers(1, 4)):
            width, height = (int(x) for x in numbers.integers(size // 4, size // 2, 2))
            x, y = int(numbers.integers(0, size - width)), int(numbers.integers(0, size - height))
            kind, colour = int(numbers.integers(3)), tuple(int(c) for c in numbers.integers(120, 256, 3))
            corners = (x, y, x + width - 1, y + height - 1)
            if kind == 0:
                pen.rectangle(corners, fill=colour)
            elif kind == 1:
                pen.ellipse(corners, fill=colour)
            else:
                pen.polygon([(x + width // 2, y), (x, corners[3]), (corners[2], corners[3])], fill=colour)
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": 10 * (kind + 1),
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
        file = f"{number}.png"
        picture.save(images / file)
        content["images"].append({"id": number, "file_name": file, "width": size, "height": size})
    annotations.write_text(json.dumps(content))
    return images, annotations


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """pycocotools prints as it goes."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


# --- the detector ----------------------------------------------------------------------------------------------


def detector(model: str, weights: Path, classes: int, *, size: int, trained_layers: int, **more: Any) -> FasterRCNN:
    """Faster R-CNN on a residual network of torchvision's names, with the weights of a run; the rest is new.

    Raises:
        UserError: there are no such weights, or they are of another network.
    """
    file = weights / "model.safetensors" if weights.is_dir() else weights
    try:
        found = load_file(file)
    except Exception as error:  # a class of Rust's, too
        raise UserError(f"{file} is no file of weights, as a run has that has ended: {error}") from None
    backbone = resnet_fpn_backbone(backbone_name=model, weights=None, trainable_layers=trained_layers)
    own = backbone.body.state_dict()
    wrong = [name for name, value in own.items() if name not in found or found[name].shape != value.shape]
    if wrong:
        raise UserError(f"{file} does not have the weights of a {model}: {wrong[0]} is missing, or of another shape")
    backbone.body.load_state_dict({name: found[name] for name in own})
    return FasterRCNN(backbone, classes + 1, min_size=size, max_size=size * 5 // 3, **more)


def train(model: nn.Module, data: Boxes, options: argparse.Namespace, seed: int) -> None:
    """SGD on images of which every second one is mirrored, with a linear warm-up over the first 500 updates, or a tenth
    of all where these are fewer."""
    order, flips = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    loader = DataLoader(
        data,
        options.batch,
        shuffle=True,
        generator=order,
        collate_fn=list,
        drop_last=True,
        num_workers=options.workers,
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=options.lr, momentum=0.9, weight_decay=1e-4)
    updates = options.epochs * len(loader)
    warm = max(1, min(500, updates // 10))

    def factor(update: int) -> float:
        epoch = update / len(loader)
        decays = (epoch >= options.epochs * 8 / 12) + (epoch >= options.epochs * 11 / 12)
        return min(1.0, (update + 1) / warm) * 0.1**decays

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for epoch in range(options.epochs):
        total = 0.0
        for batch in loader:
            flipped = torch.rand(len(batch), generator=flips) < 0.5
            pairs = [mirrored(*pair) if flip else pair for pair, flip in zip(batch, flipped, strict=True)]
            images = [image.to(DEVICE) for image, _ in pairs]
            targets = [{key: value.to(DEVICE) for key, value in target.items()} for _, target in pairs]
            loss = sum(model(images, targets).values())
            if not torch.isfinite(loss):
                raise UserError(f"the loss is {float(loss)} in epoch {epoch + 1}; a smaller --lr may help")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(f"epoch {epoch + 1}/{options.epochs}  loss {total / len(loader):.3f}", flush=True)


@torch.no_grad()
def detect(model: nn.Module, data: Boxes) -> Detections:
    """What COCO's evaluation takes: a dictionary for each box that was found."""
    model.eval()
    categories = {place: category for category, place in data.classes.items()}
    found: Detections = []
    for place, number in enumerate(data.ids):
        (boxes,) = model([data[place][0].to(DEVICE)])
        for (left, top, right, bottom), label, score in zip(
            boxes["boxes"].tolist(), boxes["labels"].tolist(), boxes["scores"].tolist(), strict=True
        ):
            found.append(
                {
                    "image_id": number,
                    "category_id": categories[label],
                    "bbox": [left, top, right - left, bottom - top],
                    "score": score,
                }
            )
    return found


def average_precision(truth: COCO, found: Detections) -> tuple[float, float]:
    """COCO's AP over overlaps of 0.5 to 0.95, and that at 0.5, in per cent."""
    if not found:
        return 0.0, 0.0
    with quiet():
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * float(evaluation.stats[0]), 100 * float(evaluation.stats[1])


# --- the comparison --------------------------------------------------------------------------------------------


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each seed and backbone."""
    training, test = Boxes(*options.train), Boxes(*options.test)
    if training.classes != test.classes:
        raise UserError(f"{options.test[1]} has other categories than {options.train[1]}")
    if len(training) < options.batch:
        raise UserError(f"--batch is {options.batch}, but {options.train[1]} has {len(training)} images")
    rows = []
    for seed in range(options.seeds):
        for name, weights in options.backbone.items():
            torch.manual_seed(seed)
            model = detector(
                options.model, weights, len(training.classes), size=options.size, trained_layers=options.trained_layers
            )
            print(f"{name}, seed {seed}")
            train(model.to(DEVICE), training, options, seed)
            precision, at_half = average_precision(test.coco, detect(model, test))
            print(f"AP {precision:.1f}, at an overlap of 0.5 {at_half:.1f}", flush=True)
            rows.append({"backbone": name, "seed": seed, "ap": precision, "ap50": at_half})
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """Means over seeds and half of their 95 % intervals; differences to the first backbone, paired by seed."""
    lines = []
    names = list(dict.fromkeys(row["backbone"] for row in rows))
    for name in names:
        cells = [name]
        for key in ("ap50", "ap"):
            values = {
                arm: {row["seed"]: row[key] for row in rows if row["backbone"] == arm} for arm in (name, names[0])
            }
            difference = paired_difference(values[name], values[names[0]]) if name != names[0] else None
            cells.append(with_half(*interval([*values[name].values()])))
            cells.append(with_half(difference["mean"], difference["half_width"], "+") if difference else "")
        lines.append(cells)
    return table(["backbone", "AP at 0.5 (%)", "difference", "AP (%)", "difference"], lines)


def with_half(mean: float, half: float | None, sign: str = "") -> str:
    return f"{mean:{sign}.1f}" + ("" if half is None else f" ± {half:.1f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backbone", action="append", required=True, metavar="NAME=RUN", help="may be given several times"
    )
    parser.add_argument("--model", default="resnet50", help="the network of the runs: resnet18, 34, 50, 101 or 152")
    parser.add_argument("--train", nargs=2, type=Path, metavar=("IMAGES", "JSON"))
    parser.add_argument("--test", nargs=2, type=Path, metavar=("IMAGES", "JSON"))
    parser.add_argument("--drawn", type=Path, metavar="FOLDER", help="draw 48 images to train on and 24 to test on")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--size", type=int, default=800, help="pixels of the shorter side")
    parser.add_argument("--trained-layers", type=int, default=3, help="of the backbone's five, counted from the last")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--workers", type=int, default=4, help="processes that read images")
    parser.add_argument("--json", type=Path, help="write all rows to this file, which must not exist yet")
    options = parser.parse_args()
    for name, least in (("epochs", 1), ("batch", 1), ("size", 32), ("trained_layers", 0), ("seeds", 1), ("workers", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    if options.trained_layers > 5:
        parser.error(f"--trained-layers must be at most 5, got {options.trained_layers}")
    if not 0 < options.lr < float("inf"):
        parser.error(f"--lr must be above 0, got {options.lr}")
    if options.model not in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
        parser.error(f"--model must be resnet18, resnet34, resnet50, resnet101 or resnet152, got {options.model!r}")
    pairs = [text.partition("=") for text in options.backbone]
    if not all(name and run for name, _, run in pairs) or len({name for name, *_ in pairs}) < len(pairs):
        parser.error(f"--backbone must be NAME=RUN, each name once, got {' '.join(options.backbone)}")
    options.backbone = {name: Path(run) for name, _, run in pairs}
    if (options.drawn is None) == (options.train is None) or (options.train is None) != (options.test is None):
        parser.error("--train and --test, both, or --drawn in place of them")
    if options.drawn and options.drawn.exists():
        parser.error(f"--drawn must be a folder that does not exist yet, got {options.drawn}")
    if options.json and (options.json.exists() or not options.json.parent.is_dir()):
        parser.error(f"--json must be a file that does not exist yet in a folder that does, got {options.json}")
    return options


def main() -> int:
    options = parse()
    try:
        for weights in options.backbone.values():  # before anything is drawn or trained
            detector(options.model, weights, 1, size=options.size, trained_layers=options.trained_layers)
        if options.drawn:
            options.train, options.test = draw(options.drawn, "train", 48), draw(options.drawn, "test", 24)
        rows = run_all(options)
        print("\n" + summary(rows))
        if options.json:
            write_file(options.json, (json.dumps(rows, indent=1) + "\n").encode())
    except (UserError, OSError) as error:
        print(f"detection.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
