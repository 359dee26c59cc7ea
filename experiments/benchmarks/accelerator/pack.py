"""Makes the folder that travels to an accelerator without network: images, and perhaps wheels.

The images are those of CIFAR-10 (JPEG), read from a folder of TensorFlow Datasets. Their JPEG files
are copied as they are into one file; the accelerator decodes them. If they do not fit --max-mib,
equally many training images of each class are taken, the first ones of each.

Command: python -m experiments.benchmarks.accelerator.pack --output runs/accelerator_kit
With wheels that the device lacks: python -m experiments.benchmarks.accelerator.pack --wheels
tyro==1.0.17 docstring-parser==0.17.0

Time: 1 minute on 2 CPU cores
"""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from experiments.benchmarks.accelerator.cifar import IMAGES_FILE
from experiments.benchmarks.accelerator.jpeg_file import JpegSplit, write_jpegs
from experiments.common import cli
from jaxkd.cli.limits import expand
from jaxkd.data import DataError, tfds_prepare, tfds_reader
from jaxkd.data.errors import import_or_raise

DATASET = "cifar10"
MEBIBYTE = 2**20
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")
"""What wheels may be built for."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the command."""

    output: str = "runs/accelerator_kit"
    """Folder to make. Files of an earlier call are replaced."""
    data_dir: str = "~/tensorflow_datasets"
    """Folder of TensorFlow Datasets, which has cifar10 as array_record."""
    max_mib: float = 50.0
    """Limit of all files together, in MiB."""
    wheels: tuple[str, ...] = ()
    """Wheels to add, as NAME==VERSION, without what they need."""
    python_version: str = "3.12"
    """Version of the device's Python, for the wheels."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        cli.require(self.max_mib > 0, f"--max-mib {self.max_mib:g}: must be above 0")
        for wheel in self.wheels:
            cli.require(
                re.fullmatch(r"\w[\w.-]*==[\w.!+-]+", wheel) is not None,
                f"--wheels {wheel}: must be NAME==VERSION",
            )
        cli.require(
            re.fullmatch(r"3\.\d+", self.python_version) is not None,
            f"--python-version {self.python_version}: must be such as 3.12",
        )


def read_dataset(data_dir: Path) -> tuple[JpegSplit, JpegSplit, tuple[str, ...]]:
    """Reads the JPEG files of the dataset.

    Raises:
        DataError: If it is missing or damaged.
    """
    prepared = tfds_reader.open_prepared(
        tfds_prepare.find_or_prepare(DATASET, data_dir), DATASET, data_dir
    )
    train, test = (
        JpegSplit(*zip(*_read_files(prepared, name), strict=True)) for name in ("train", "test")
    )
    return train, test, tuple(prepared.builder.info.features["label"].names)


def _read_files(prepared: tfds_reader.PreparedDataset, split: str) -> Iterator[tuple[bytes, int]]:
    decode = import_or_raise("tensorflow_datasets").decode
    if prepared.file_format != "array_record":
        raise DataError(f"{prepared.folder} is stored as {prepared.file_format}: use array_record")
    source = prepared.builder.as_data_source(split=split, decoders={"image": decode.SkipDecoding()})
    for example in source:
        yield example["image"], int(example["label"])


def select_balanced(split: JpegSplit, per_class: int) -> JpegSplit:
    """Returns the first images of each class."""
    labels = np.asarray(split.labels)
    # The position of each image within its class.
    rank = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        rank[labels == label] = np.arange(np.sum(labels == label))
    chosen = np.flatnonzero(rank < per_class)
    return JpegSplit([split.files[i] for i in chosen.tolist()], labels[chosen].tolist())


def write_that_fits(
    path: Path,
    train: JpegSplit,
    test: JpegSplit,
    class_names: Sequence[str],
    max_bytes: float,
) -> JpegSplit:
    """Writes all test images, and all training images or as many of each class as fit.

    Returns:
        The training images that were written.

    Raises:
        OptionError: If the test images alone do not fit.
    """
    per_class = int(np.bincount(train.labels).max())
    chosen = train
    while True:
        write_jpegs(path, chosen, test, class_names)
        size = path.stat().st_size
        if size <= max_bytes:
            return chosen
        # What an image takes in the file, with a little to spare.
        bytes_per_image = size / (len(chosen.labels) + len(test.labels))
        excess = (size - max_bytes) / bytes_per_image / len(class_names)
        per_class = min(per_class, len(chosen.labels) // len(class_names)) - 1 - int(1.02 * excess)
        if per_class < 1:
            path.unlink()
            raise cli.OptionError(
                f"--max-mib: the test images take {size / MEBIBYTE:.1f} MiB, so nothing is left "
                "for training images: raise it"
            )
        chosen = select_balanced(train, per_class)


def download_wheels(names: Sequence[str], folder: Path, python_version: str) -> list[Path]:
    """Downloads wheels with pip and returns their paths.

    Raises:
        OptionError: If pip fails.
    """
    if not names:
        return []
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
        *("--only-binary=:all:", "--python-version", python_version, *platforms),
        *("--dest", str(folder), *names),
    ]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    if completed.returncode:
        reason = (completed.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise cli.OptionError(f"--wheels {' '.join(names)}: {reason}")
    return sorted(folder.glob("*.whl"))


def main(config: Config) -> None:
    """Makes the folder and prints its sizes and the command for the device."""
    config.check()
    folder = expand(config.output)
    cli.check_writable("--output", folder)
    wheel_folder = folder / "wheels"
    wheels = download_wheels(config.wheels, wheel_folder, config.python_version)
    wheel_bytes = sum(path.stat().st_size for path in wheels)
    train, test, class_names = read_dataset(expand(config.data_dir))
    path = folder / IMAGES_FILE
    max_bytes = config.max_mib * MEBIBYTE - wheel_bytes
    chosen = write_that_fits(path, train, test, class_names, max_bytes)
    for file in (path, *wheels):
        print(f"{file}: {file.stat().st_size / MEBIBYTE:.2f} MiB")
    total = path.stat().st_size + wheel_bytes
    print(
        f"{len(chosen.labels):,} of {len(train.labels):,} training images and "
        f"{len(test.labels):,} test images; {total / MEBIBYTE:.2f} MiB in all"
    )
    if wheels:
        print(f"First, on the device: pip install --no-index --no-deps {wheel_folder}/*.whl")
    print(
        f"On the device: python -m experiments.benchmarks.accelerator --pack {config.output} "
        "--minutes 25"
    )


if __name__ == "__main__":
    cli.run(main, Config, __doc__, resumes=False)
