"""Labelled data: their sources, how they are stored, and how batches of them reach the device.

`load` and `load_pair` open a source (a built-in name, a parquet file, a folder, a Hugging Face hub name) and
return `ImageData`, which returns uint8 rows for any index tensor. `Feed` turns these rows into normalised,
augmented batches on the device. Which rows make up a batch is decided elsewhere, by the index plan.
"""

from batchkern.data.datasets import DatasetData, from_dataset
from batchkern.data.datasets import DatasetFeed as DatasetFeed
from batchkern.data.datasets import as_labelled as as_labelled
from batchkern.data.datasets import feed_of as feed_of
from batchkern.data.derived import subset, validation_split, with_label_noise
from batchkern.data.feed import AUGMENTATIONS as AUGMENTATIONS
from batchkern.data.feed import Feed as Feed
from batchkern.data.images import ImageData, StreamedImages, TensorImages, match_shape
from batchkern.data.labelled import Labelled
from batchkern.data.loading import HELD_OUT as HELD_OUT
from batchkern.data.loading import Trained as Trained
from batchkern.data.loading import load, load_pair
from batchkern.data.loading import load_test as load_test
from batchkern.data.tables import Column as Column
from batchkern.data.tables import TableData, load_table, load_table_pair
from batchkern.data.tables import open_pair as open_pair
from batchkern.data.tensors import TensorData, from_tensors
from batchkern.data.unlabelled import find_images as find_images
from batchkern.data.unlabelled import images_of as images_of
from batchkern.data.unlabelled import table_of as table_of

# Names imported ``as`` themselves are for other modules of the package, and are not part of the API.
__all__ = [
    "DatasetData",
    "ImageData",
    "Labelled",
    "StreamedImages",
    "TableData",
    "TensorData",
    "TensorImages",
    "from_dataset",
    "from_tensors",
    "load",
    "load_pair",
    "load_table",
    "load_table_pair",
    "match_shape",
    "subset",
    "validation_split",
    "with_label_noise",
]
