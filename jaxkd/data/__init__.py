"""Image classification datasets as NumPy arrays, and random augmentation of their batches.

Importing this package needs jax and NumPy. TensorFlow Datasets, Pillow and rich are imported only
when a dataset needs them.
"""

from jaxkd.data.augment import crop_and_flip, random_crop, random_flip
from jaxkd.data.class_names import match_classes, sort_classes
from jaxkd.data.dataset import Dataset, Split
from jaxkd.data.errors import DataError
from jaxkd.data.mixing import Mix, Mixed, cutmix, mix_labels, mixup
from jaxkd.data.rand_augment import Operation, rand_augment
from jaxkd.data.records import Records
from jaxkd.data.sequential import SequentialRecords
from jaxkd.data.sources import load
from jaxkd.data.statistics import channel_statistics
from jaxkd.data.subset import balanced_subset, few_labels

__all__ = [
    "DataError",
    "Dataset",
    "Mix",
    "Mixed",
    "Operation",
    "Records",
    "SequentialRecords",
    "Split",
    "balanced_subset",
    "channel_statistics",
    "crop_and_flip",
    "cutmix",
    "few_labels",
    "load",
    "match_classes",
    "mix_labels",
    "mixup",
    "rand_augment",
    "random_crop",
    "random_flip",
    "sort_classes",
]
