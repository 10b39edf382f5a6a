"""``batchkern predict``."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from batchkern.cli._options import BestOption, DeviceOption, argument, check_out, option
from batchkern.cli._streams import visible
from batchkern.cli._train import spare_threads
from batchkern.data import Labelled, find_images
from batchkern.errors import UserError
from batchkern.files import write_file
from batchkern.preprocessing import ImagePreprocessing
from batchkern.trained import TrainedModel, load_model

FIGURES = ["predicted", "probability"]


def predict(
    run: Annotated[Path, argument(help="the directory of a run that has ended")],
    images: Annotated[
        list[str],
        argument(help="folders and files of images, or a parquet file, or a name on the hub; no labels needed"),
    ],
    split: Annotated[
        str | None, option(help="split of a parquet file or a name; default: test, else the only one")
    ] = None,
    best: BestOption = False,
    device: DeviceOption = None,
    out: Annotated[Path | None, option(help="write comma-separated values into this file; default: print them")] = None,
    overwrite: Annotated[bool, option("--overwrite", help="replace --out if it is such a file")] = False,
) -> None:
    """Predict the classes of images by a trained model, with the probability of each class, as comma-separated values.

    A folder stands for all images in it and below it. Predictions are made by the model alone, without the vote of a
    strategy.
    """
    check_out(out, overwrite, "a file of predictions", _are_predictions)
    trained = load_model(run, best=best)
    data: Labelled
    places: Iterable[Any]
    table = images[0].lower().endswith((".parquet", ".csv", ".tsv")) or not os.path.lexists(images[0])
    if len(images) == 1 and table:
        data = trained.preprocessing.table(images[0], split)
        heading, places = "row", range(len(data))
    elif split is not None:
        raise UserError(f"split is {split!r}, but files and folders of images have none")
    elif not isinstance(trained.preprocessing, ImagePreprocessing):
        raise UserError(f"the model was not trained on images: give one table of its columns, not {images[0]!r:.60}")
    else:
        heading, places = "path", find_images(images)
        data = trained.preprocessing.data(places)
    spare_threads(data.shape)
    text = _table(trained, data, heading, places, device)  # complete, before the first line is written
    if out is None:
        print(text, end="")
        return
    write_file(out, text.encode(errors="backslashreplace"))
    print(f"{len(data):,} predictions in {visible(out)}")


def _table(trained: TrainedModel, data: Labelled, heading: str, places: Iterable[Any], device: str | None) -> str:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([heading, *FIGURES, *(f"probability({name})" for name in trained.classes)])
    place = iter(places)
    for _, logits in trained.batches(data, device):
        for best, shares in zip(logits.argmax(1).tolist(), logits.softmax(1).tolist(), strict=True):
            shown = [f"{share:.6g}" for share in shares]
            lines.writerow([next(place), trained.classes[best], shown[best], *shown])
    return text.getvalue()


def _are_predictions(content: bytes) -> bool:
    return any(content.startswith(",".join([heading, *FIGURES]).encode() + b",") for heading in ("path", "row"))
