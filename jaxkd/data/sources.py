"""Datasets by name: the embedded one, a folder of photographs, or anything from TensorFlow Datasets."""

import os
import re
from pathlib import Path

from jaxkd.data import embedded, folder_source, tfds_folder, tfds_prepare, tfds_source
from jaxkd.data.dataset import Dataset, Split, make_dataset
from jaxkd.data.errors import DataError, expand


def load(
    name: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None, *, image_size: int = 64
) -> Dataset:
    """Loads an image classification set; what a name means is decided in this order.

    1. `"fashion_mnist_mini"`, which comes with the package: 10,000 + 2,000 images of Fashion-MNIST.
    2. A folder `train/<class>/*.jpg`, `test/<class>/*.jpg`: a path, or the name of a folder that exists.
    3. A TensorFlow dataset, prepared or, where TensorFlow and a network are at hand, prepared now: `"cifar10"`,
       `"cifar10:3.0.2"` or `"name/config"`. It is tested on its `test` split, without one on its `validation` split,
       without either on a fifth of `train`.

    A tenth of the training images, drawn by a fixed key, becomes the validation set. Nothing but preparing uses the
    network.

    Args:
        name: Name or path, as above.
        data_dir: Where TensorFlow datasets are; `None` means `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
        image_size: Side in pixels to which photographs of various sizes are fitted. A set whose images all have one
            size keeps it.

    Returns:
        The dataset; equal calls give equal arrays.

    Raises:
        DataError: If there is no such dataset, or it is damaged, or something that reading it needs is missing.

    Example:
        >>> from jaxkd import data
        >>> dataset = data.load("fashion_mnist_mini")
        >>> dataset.train.images.shape, dataset.validation.images.shape, dataset.test.images.shape
        ((9000, 28, 28, 1), (1000, 28, 28, 1), (2000, 28, 28, 1))
        >>> dataset.class_names[dataset.test.labels[0]]
        'Ankle boot'

    References:
        Xiao et al. 2017, Fashion-MNIST, https://arxiv.org/abs/1708.07747
    """
    name = os.fspath(name)
    if image_size < 1:
        raise DataError(f"image_size is {image_size}: choose at least 1 pixel")
    return make_dataset(name, *_read(name, tfds_folder.resolve(data_dir), image_size))


def _read(name: str, data_dir: Path, image_size: int) -> tuple[Split, Split, tuple[str, ...]]:
    if name == embedded.NAME:
        return embedded.read()
    if _is_path(name, data_dir):
        return folder_source.read(expand(name), image_size=image_size)
    return tfds_source.read(name, data_dir, image_size=image_size)


def _is_path(name: str, data_dir: Path) -> bool:
    """Tells `photos/fruit`, a folder, from `mnist_corrupted/fog`, a dataset and its configuration."""
    if expand(name).is_dir():
        return True
    head, *tail = re.split(r"[/\\]", name)
    return bool(tail) and not (head.isidentifier() and tfds_prepare.is_known(head, data_dir))
