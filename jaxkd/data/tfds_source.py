"""Image classification sets prepared by TensorFlow Datasets, read without TensorFlow wherever that is possible."""

import hashlib
from pathlib import Path

import numpy as np

from jaxkd.data import cache, tfds_decode, tfds_folder, tfds_prepare
from jaxkd.data.dataset import Split
from jaxkd.data.errors import DataError, require
from jaxkd.data.tfds_decode import Fields
from jaxkd.data.tfds_prepared import Prepared, only_feature, open_prepared


def read(name: str, data_dir: Path, *, image_size: int) -> tuple[Split, Split, tuple[str, ...]]:
    """Reads a TensorFlow dataset, preparing it first if need be.

    Decoded images are kept beside the version's folder, in `<version>.decoded.npz`, where that can be written.

    Args:
        name: `name`, `name/config`, either with `:version` or `/version`; without one, the newest prepared.
        data_dir: The folder of all datasets.
        image_size: Side in pixels to which images are fitted, as RGB, if the dataset does not fix their shape.

    Returns:
        Training split, test split (see `jaxkd.data.load`) and class names.

    Raises:
        DataError: If the dataset is unknown, cannot be prepared, is half-written, or does not classify images.
    """
    folder = tfds_folder.find(name, data_dir) or tfds_prepare.prepare(name, data_dir)
    prepared = open_prepared(folder, name, data_dir)
    fields = _fields(prepared, image_size)
    cached, fingerprint = folder.with_name(f"{folder.name}.decoded.npz"), _fingerprint(folder, fields)
    splits = cache.read(cached, fingerprint)
    if splits is None:
        splits = tfds_decode.decode(prepared, fields)
        cache.write(cached, fingerprint, *splits)
    return *splits, fields.class_names


def _fields(prepared: Prepared, image_size: int) -> Fields:
    features = require("tensorflow_datasets").features
    image, label = (only_feature(prepared, kind, of="an image") for kind in (features.Image, features.ClassLabel))
    images, labels = (prepared.builder.info.features[key] for key in (image, label))
    if images.np_dtype != np.uint8:
        raise DataError(f"{prepared.name} has {np.dtype(images.np_dtype)} images: choose a dataset of uint8 images")
    if all(images.shape):
        return Fields(image, label, images.shape, None, tuple(labels.names))
    return Fields(image, label, (image_size, image_size, 3), image_size, tuple(labels.names))


def _fingerprint(folder: Path, fields: Fields) -> str:
    """Hashes all that decides what decoding gives, with the shards' sizes in place of their contents."""
    digest = hashlib.sha256(f"{fields.image} {fields.label} {fields.shape}\n".encode())
    for path in sorted(folder.iterdir()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    for path in sorted(folder.glob("*.json")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
