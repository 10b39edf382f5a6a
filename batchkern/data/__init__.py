"""Labelled images: where they come from, how they are held, and how batches of them reach the device.

`load` and `load_pair` open a source (a built-in name, a parquet file, a folder, a Hugging Face hub name) and
return `ImageData`, which hands out uint8 rows for any index tensor. `Feed` turns these rows into normalised,
augmented batches on the device. Which rows make up a batch is decided elsewhere, by the index plan.
"""

from batchkern.data.derived import subset, validation_split, with_label_noise
from batchkern.data.feed import AUGMENTATIONS, Feed
from batchkern.data.images import ImageData, StreamedImages, TensorImages, match_shape
from batchkern.data.loading import load, load_pair

__all__ = [
    "AUGMENTATIONS",
    "Feed",
    "ImageData",
    "StreamedImages",
    "TensorImages",
    "load",
    "load_pair",
    "match_shape",
    "subset",
    "validation_split",
    "with_label_noise",
]
