"""Image classification datasets prepared by TensorFlow Datasets (TFDS).

Those stored as array_record are read without TensorFlow.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxkd._messages import list_some
from jaxkd.data import decoded_cache, image_folder, tfds_prepare, tfds_reader, tfds_stream
from jaxkd.data.dataset import Split, hold_out_test
from jaxkd.data.errors import DataError, import_or_raise, warn
from jaxkd.data.memory import should_stream
from jaxkd.data.progress import track
from jaxkd.data.tfds_reader import PreparedDataset


class _Fields(NamedTuple):
    """The features of an example that are read.

    Attributes:
        image: Name of the feature that is the image.
        label: Name of the feature that is the label.
        shape: `(H, W, C)` of decoded images.
        image_size: Side to which images are fitted; `None` if all have `shape` already.
        class_names: Name of each class, by label.
    """

    image: str
    label: str
    shape: tuple[int, ...]
    image_size: int | None
    class_names: tuple[str, ...]


def read_tfds_images(
    name: str, data_dir: Path, *, image_size: int, stream: bool | None = None
) -> tuple[Split, Split, tuple[str, ...]]:
    """Reads a TensorFlow dataset, and prepares it first if it is missing.

    Decoded images are cached beside the version's folder, in `<version>.decoded.npz`, if that is
    writable.

    Args:
        name: `name`, `name/config`, either with `:version` or `/version`; without a version, the
            newest that is prepared.
        data_dir: The folder of all datasets.
        image_size: Side in pixels to which images are fitted, as RGB, if the dataset does not fix
            their shape.
        stream: Whether images are decoded when they are needed; see `jaxkd.data.load`.

    Returns:
        Training split, test split (see `jaxkd.data.load`) and class names.

    Raises:
        DataError: If the dataset is unknown, cannot be prepared, is damaged, or does not classify
            images.
    """
    folder = tfds_prepare.find_or_prepare(name, data_dir)
    prepared = tfds_reader.open_prepared(folder, name, data_dir)
    _warn_of_splits(prepared)
    fields = _find_fields(prepared, image_size)
    # Beside the folder: TFDS must not find an unknown file in it.
    cache_path = folder.with_name(f"{folder.name}.decoded.npz")
    fingerprint = _fingerprint(folder, fields)
    if _should_stream(prepared, fields, stream):
        read = _stream_reader(prepared, fields, fingerprint)
        return *_read_splits(prepared, read), fields.class_names
    splits = decoded_cache.read_decoded(cache_path, fingerprint)
    if splits is None:
        splits = _decode(prepared, fields)
        decoded_cache.write_decoded(cache_path, fingerprint, *splits)
    return *splits, fields.class_names


def _warn_of_splits(prepared: PreparedDataset) -> None:
    """Says which split is not read, or which images are the test set in place of a missing one."""
    splits = prepared.builder.info.splits
    if "test" in splits and "validation" in splits:
        choice = "the split validation is not read; a tenth of train is held out for validation"
    elif "test" in splits or "train" not in splits:
        return
    else:
        substitute = "the split validation" if "validation" in splits else "a fifth of train"
        choice = f"there is no split test; {substitute} is the test set"
    warn(f"{prepared.name}: {choice}")


def _find_fields(prepared: PreparedDataset, image_size: int) -> _Fields:
    features = import_or_raise("tensorflow_datasets").features
    expected = "an image classification set"
    image = tfds_reader.only_feature(prepared, features.Image, expected=expected)
    label = tfds_reader.only_feature(prepared, features.ClassLabel, expected=expected)
    image_feature = prepared.builder.info.features[image]
    class_names = tuple(prepared.builder.info.features[label].names)
    if image_feature.np_dtype != np.uint8:
        raise DataError(
            f"{prepared.name} has {np.dtype(image_feature.np_dtype)} images: "
            "choose a dataset of uint8 images"
        )
    # TFDS writes None for a side that varies from image to image.
    if all(image_feature.shape):
        return _Fields(image, label, image_feature.shape, None, class_names)
    return _Fields(image, label, (image_size, image_size, 3), image_size, class_names)


def _fingerprint(folder: Path, fields: _Fields) -> str:
    """Hashes everything that the decoded images depend on."""
    digest = hashlib.sha256(f"{fields.image} {fields.label} {fields.shape}\n".encode())
    # Sizes stand for the shards' contents: hashing those would take as long as decoding them.
    for path in sorted(folder.iterdir()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    for path in sorted(folder.glob("*.json")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _should_stream(prepared: PreparedDataset, fields: _Fields, stream: bool | None) -> bool:
    # Other formats have no random access.
    if stream is None and prepared.file_format != "array_record":
        return False
    splits = prepared.builder.info.splits
    names = {"train", "test" if "test" in splits else "validation"}
    count = sum(split.num_examples for name, split in splits.items() if name in names)
    return should_stream(prepared.name, (count, *fields.shape), stream=stream)


def _stream_reader(
    prepared: PreparedDataset, fields: _Fields, fingerprint: str
) -> Callable[[str], Split]:
    """Returns `split -> Split`, whose images are decoded when they are needed."""
    return functools.partial(
        tfds_stream.stream_split,
        prepared,
        image=fields.image,
        label=fields.label,
        read=lambda example: _fit(example[fields.image], fields.image_size),
        fingerprint=fingerprint,
    )


def _decode(prepared: PreparedDataset, fields: _Fields) -> tuple[Split, Split]:
    return _read_splits(prepared, functools.partial(_decode_split, prepared, fields))


def _read_splits(prepared: PreparedDataset, read: Callable[[str], Split]) -> tuple[Split, Split]:
    """Reads the training images and the test images (see `jaxkd.data.load`).

    Args:
        prepared: The dataset.
        read: `name -> Split`.

    Raises:
        DataError: If there is no `train`, examples are damaged or missing, or TensorFlow is needed
            and missing.
    """
    splits = prepared.builder.info.splits
    if "train" not in splits:
        raise DataError(
            f"{prepared.name} has no split named train, only {list_some(splits)}: "
            "choose another dataset"
        )
    train = read("train")
    for test_name in ("test", "validation"):
        if test_name in splits:
            return train, read(test_name)
    return hold_out_test(train)


def _decode_split(prepared: PreparedDataset, fields: _Fields, split: str) -> Split:
    total = prepared.builder.info.splits[split].num_examples
    # Filled in place: a list of the images and their stack would take twice the memory.
    decoded = Split(np.empty((total, *fields.shape), np.uint8), np.empty(total, np.int32))
    examples = track(
        _read_examples(prepared, split),
        description=f"decoding {prepared.name} {split}",
        total=total,
    )
    count = 0
    for example in examples:
        # Surplus examples are only counted, for the message.
        if count < total:
            decoded.images[count] = _fit(example[fields.image], fields.image_size)
            decoded.labels[count] = example[fields.label]
        count += 1
    if count != total:
        raise prepared.damaged_error(f"{split} holds {count} examples instead of {total}")
    return decoded


def _fit(image: np.ndarray, image_size: int | None) -> np.ndarray:
    if image_size is None:
        return image
    # Pillow takes a grey image as [H, W] only.
    array = image[..., 0] if image.shape[-1] == 1 else image
    return image_folder.fit_image(import_or_raise("PIL.Image").fromarray(array), image_size)


def _read_examples(prepared: PreparedDataset, split: str) -> Iterator[dict[str, Any]]:
    with tfds_reader.without_opencv_advice():
        yield from tfds_reader.read_examples(prepared, split)
