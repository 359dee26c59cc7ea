"""Makes the embedded dataset from Fashion-MNIST; run once, the result is part of the package.

It takes the first 1,000 training and the first 200 test images of each class, in their original
order, so that anybody can check the selection. The Debian package `dataset-fashion-mnist` holds the
four files:

    python -m experiments.tools.make_fashion_mnist_mini /usr/share/datasets/fashion-mnist

The file is an xz stream of two NumPy arrays, uint8 images `[12000, 28, 28, 1]` and uint8 labels
`[12000]`, training before test. It is a seventh smaller than with deflate and has no time stamps.
"""

import gzip
import io
import lzma
import sys
from pathlib import Path

import numpy as np

from jaxkd._messages import shorten
from jaxkd.data import embedded

# The default preset's dictionary of 8 MiB covers nearly all of the 9.4 MB; a larger one gains 2 KB.
_PRESET = lzma.PRESET_DEFAULT | lzma.PRESET_EXTREME


def make(folder: Path) -> bytes:
    """Selects the images and compresses them.

    Args:
        folder: The folder of `train-images-idx3-ubyte.gz` and its three companions.

    Returns:
        The content of the embedded file; equal calls give equal bytes.
    """
    train_images, train_labels = _first_of_each_class(folder, "train", 1000)
    test_images, test_labels = _first_of_each_class(folder, "t10k", 200)
    file = io.BytesIO()
    # In the order in which `embedded` reads them.
    np.save(file, np.concatenate([train_images, test_images]))
    np.save(file, np.concatenate([train_labels, test_labels]))
    return lzma.compress(file.getvalue(), preset=_PRESET)


def _first_of_each_class(folder: Path, part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    # An idx file begins with a magic number and its dimensions, 4 bytes each.
    images = _read_idx(folder / f"{part}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28, 1)
    labels = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz", header=8)
    indices = np.sort(
        np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(10)])
    )
    return images[indices], labels[indices]


def _read_idx(path: Path, *, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m experiments.tools.make_fashion_mnist_mini FOLDER")
    try:
        content = make(Path(sys.argv[1]))
    except (OSError, EOFError, ValueError) as error:
        sys.exit(f"error: {shorten(error, 290)}")
    embedded.FILE.write_bytes(content)
