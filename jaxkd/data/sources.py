"""Image datasets by name: the embedded one, a folder of photographs, or a TensorFlow dataset."""

import os
import re
from pathlib import Path

from jaxkd.data import embedded, image_folder, parquet_images, tfds_images, tfds_prepare
from jaxkd.data.dataset import Dataset, Split, make_dataset
from jaxkd.data.errors import DataError, expand_user_path, warn

# A thousand photographs of this side fill 50 GB.
_MAX_IMAGE_SIZE = 4096
_DEFAULT_IMAGE_SIZE = 64


def load(
    name: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    *,
    image_size: int | None = None,
    stream: bool | None = None,
) -> Dataset:
    """Loads an image classification dataset by name or path.

    The first of these that fits is loaded:

    1. `"fashion_mnist_mini"`, which is part of the package: 10,000 + 2,000 images of Fashion-MNIST.
    2. A folder `train/<class>/*.jpg`, `test/<class>/*.jpg` and optionally `val/<class>/*.jpg` (or
       `valid`, `validation`, `dev`): a path, or the name of a folder that exists.
    3. A folder with images in `.parquet` files, as the Hugging Face hub has them, such as
       `data/train-00000-of-00002.parquet`, or one of `DatasetDict.save_to_disk`. Needs pyarrow.
    4. A TensorFlow dataset, such as `"cifar10"`, `"cifar10:3.0.2"` or `"name/config"`. If it is not
       prepared yet and TensorFlow is installed, it is downloaded and prepared first. Its test set
       is the split `test`, else the split `validation`, else a fifth of `train`.

    A tenth of the training images, drawn by a fixed key, becomes the validation set, unless a
    folder has one. Only preparing a TensorFlow dataset uses the network. Warnings say what was
    passed over or chosen without being asked for.

    Args:
        name: Name or path, as above.
        data_dir: The folder of TensorFlow datasets; `None` means `$TFDS_DATA_DIR` or
            `~/tensorflow_datasets`.
        image_size: Side in pixels to which photographs of various sizes are fitted; `None` means
            64. `"fashion_mnist_mini"` and a TensorFlow dataset whose images all have the same size
            keep it, and a warning says so if another is asked for. So do those of `.parquet` files,
            unless another size is asked for.
        stream: Whether the images of a folder, or of a TensorFlow dataset that is stored as
            array_record, stay on disk, and each batch is read and decoded when it is needed.
            `split.images` is then a column of `data.Records`. Equal images, transparent parts and
            animations are not looked for. `None` streams images that would take more than half of
            the memory of the machine, and says so.

    Returns:
        The dataset; equal calls give equal arrays.

    Raises:
        DataError: If there is no such dataset, or it is damaged, or something that reading it needs
            is missing.

    Example:
        >>> from jaxkd import data
        >>> dataset = data.load("fashion_mnist_mini")
        >>> [split.images.shape for split in (dataset.train, dataset.validation, dataset.test)]
        [(9000, 28, 28, 1), (1000, 28, 28, 1), (2000, 28, 28, 1)]
        >>> dataset.class_names[dataset.test.labels[0]]
        'Ankle boot'

    References:
        Xiao et al. 2017, Fashion-MNIST, https://arxiv.org/abs/1708.07747
    """
    name = os.fspath(name)
    if not name:
        raise DataError(
            "the name of the dataset is empty: give a folder with train/CLASS and test/CLASS, or "
            "the name of a dataset"
        )
    side = _DEFAULT_IMAGE_SIZE if image_size is None else image_size
    _check_image_size(side)
    folder = expand_user_path(name)
    is_folder = name != embedded.NAME and os.path.isdir(folder)
    if is_folder and parquet_images.has_images(folder):
        if stream:
            raise DataError(
                f"the images of the .parquet files in {name} are read whole: leave out stream, or "
                "save the images in folders"
            )
        source = parquet_images.read_parquet_images(
            folder, image_size=image_size, default_size=_DEFAULT_IMAGE_SIZE
        )
        return make_dataset(name, *source)
    source = _read(name, tfds_prepare.resolve_data_dir(data_dir), side, stream)
    dataset = make_dataset(name, *source)
    if image_size is not None:
        _warn_of_size(name, dataset, image_size)
    return dataset


def _warn_of_size(name: str, dataset: Dataset, image_size: int) -> None:
    height, width = dataset.test.images.shape[1:3]
    if (height, width) != (image_size, image_size):
        warn(
            f"{name}: all images have {height} x {width} pixels and keep that size; image_size "
            f"{image_size} is for photographs of various sizes"
        )


def _check_image_size(image_size: int) -> None:
    # True is an int.
    if not isinstance(image_size, int) or isinstance(image_size, bool):
        raise DataError(f"image_size is {image_size!r:.40}: choose a whole number of pixels")
    if not 1 <= image_size <= _MAX_IMAGE_SIZE:
        limit = "at least 1 pixel" if image_size < 1 else f"at most {_MAX_IMAGE_SIZE:,} pixels"
        raise DataError(f"image_size is {image_size}: choose {limit}")


def _read(
    name: str, data_dir: Path, image_size: int, stream: bool | None
) -> tuple[Split, Split, tuple[str, ...], Split | None]:
    if name == embedded.NAME:
        if stream:
            warn(f"{name} is part of the package and is not streamed")
        return *embedded.read_embedded(), None
    if _is_path(name, data_dir):
        path = expand_user_path(name)
        return image_folder.read_image_folder(path, image_size=image_size, stream=stream)
    read = tfds_images.read_tfds_images
    return *read(name, data_dir, image_size=image_size, stream=stream), None


def _is_path(name: str, data_dir: Path) -> bool:
    """Returns True for a path, `photos/fruit`, False for a dataset, `mnist_corrupted/fog`."""
    if os.path.isdir(expand_user_path(name)):
        return True
    head, *tail = re.split(r"[/\\]", name)
    # A path that does not exist is still a path, so that the error can say so.
    return bool(tail) and not (head.isidentifier() and tfds_prepare.is_known(head, data_dir))
