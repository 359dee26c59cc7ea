"""`fashion_mnist_mini`, the dataset that is part of the package.

`experiments/tools/make_fashion_mnist_mini.py` made the file; `fashion_mnist_mini.LICENSE` is its
licence.
"""

import io
from pathlib import Path

import numpy as np

from jaxkd.data.dataset import Split
from jaxkd.data.errors import DataError, import_or_raise, one_line

NAME = "fashion_mnist_mini"
FILE = Path(__file__).with_name("fashion_mnist_mini.npy.xz")
CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_NUM_TRAIN = 10_000


def read_embedded() -> tuple[Split, Split, tuple[str, ...]]:
    """Reads the embedded file.

    Returns:
        10,000 training and 2,000 test images `[N, 28, 28, 1]`, the same number of each class, and
        the class names.

    Raises:
        DataError: If the file is missing or damaged, or this Python was built without lzma.
    """
    lzma = import_or_raise("lzma")
    try:
        file = io.BytesIO(lzma.decompress(FILE.read_bytes()))
        # Two arrays in one stream: the images come first.
        images = np.load(file)
        labels = np.load(file).astype(np.int32)
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise DataError(
            f"{NAME} is damaged ({one_line(error)}): reinstall jaxkd-distill"
        ) from error
    train = Split(images[:_NUM_TRAIN], labels[:_NUM_TRAIN])
    test = Split(images[_NUM_TRAIN:], labels[_NUM_TRAIN:])
    return train, test, CLASS_NAMES
