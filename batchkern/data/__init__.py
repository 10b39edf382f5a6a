"""Labelled data: where they come from, how they are held, and how batches of them reach the device.

`load` and `load_pair` open a source (a built-in name, a parquet file, a folder, a Hugging Face hub name) and
return `ImageData`, which hands out uint8 rows for any index tensor. `Feed` turns these rows into normalised,
augmented batches on the device. Which rows make up a batch is decided elsewhere, by the index plan.
"""

from batchkern.data.datasets import DatasetData, DatasetFeed, as_labelled, feed_of, from_dataset
from batchkern.data.derived import subset, validation_split, with_label_noise
from batchkern.data.feed import AUGMENTATIONS, Feed
from batchkern.data.images import ImageData, StreamedImages, TensorImages, match_shape
from batchkern.data.labelled import Labelled
from batchkern.data.loading import HELD_OUT, Trained, load, load_pair, load_test
from batchkern.data.tables import Column, TableData, load_table, load_table_pair, open_pair
from batchkern.data.tensors import TensorData, from_tensors
from batchkern.data.unlabelled import find_images, images_of, table_of

__all__ = [
    "AUGMENTATIONS",
    "HELD_OUT",
    "Column",
    "DatasetData",
    "DatasetFeed",
    "Feed",
    "ImageData",
    "Labelled",
    "StreamedImages",
    "TableData",
    "TensorData",
    "TensorImages",
    "Trained",
    "as_labelled",
    "feed_of",
    "find_images",
    "from_dataset",
    "from_tensors",
    "images_of",
    "load",
    "load_pair",
    "load_table",
    "load_table_pair",
    "load_test",
    "match_shape",
    "open_pair",
    "subset",
    "table_of",
    "validation_split",
    "with_label_noise",
]
