"""``batchkern evaluate``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

from batchkern.cli._options import BestOption, DataOption, DeviceOption, argument, check_out, option
from batchkern.cli._streams import visible
from batchkern.cli._tables import make_table, print_tables
from batchkern.cli._train import spare_threads
from batchkern.data import ImageData
from batchkern.files import write_file
from batchkern.trained import load_model

KIND = "batchkern evaluation"


def evaluate(
    run: Annotated[Path, argument(help="the directory of a run that has ended")],
    data: DataOption,
    split: Annotated[
        str | None,
        option(
            help="of --data; default: test, else validation, else the only one; held-out: the fifth held out by train"
        ),
    ] = None,
    best: BestOption = False,
    device: DeviceOption = None,
    out: Annotated[Path | None, option(help="write the figures into this file, as JSON")] = None,
    overwrite: Annotated[bool, option("--overwrite", help="replace --out if it is such a file")] = False,
) -> None:
    """Accuracy and loss of a trained model on labelled images, resized as in its training.

    The figures are for the model alone, without the vote of a strategy.
    """
    check_out(out, overwrite, "an evaluation", _is_evaluation)
    trained = load_model(run, best=best)
    images = trained.preprocessing.labelled(data, split, trained=trained.data)
    spare_threads(images.shape)
    figures = trained.evaluate(images, device)
    if out is not None:
        content = {"kind": KIND, "run": os.fspath(run), "data": data, "split": split, **figures}
        write_file(out, json.dumps(content, indent=1).encode())
    top = f"  top-5 accuracy {figures['top5_accuracy']:.2%}" if "top5_accuracy" in figures else ""
    kind = "images" if isinstance(images, ImageData) else "rows"
    print(f"{figures['rows']:,} {kind} of {visible(images.name)}")
    print(f"accuracy {figures['accuracy']:.2%}{top}  loss {figures['loss']:.4f}\n")
    table = make_table("class", "rows", "accuracy", numbers=True)
    for entry in figures["per_class"]:
        share = "" if entry["accuracy"] is None else f"{entry['accuracy']:.2%}"
        table.add_row(visible(entry["class"]), f"  {entry['rows']:,}", f"  {share}")
    print_tables(table)


def _is_evaluation(content: bytes) -> bool:
    try:
        found: Any = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("kind") == KIND
