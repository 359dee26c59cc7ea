"""The ResNet-20 for CIFAR-10 that was trained in PyTorch, from its file of weights."""

from pathlib import Path

from experiments.common import images
from experiments.common.cli import require
from jaxkd import data, distill, models

WEIGHTS = (
    "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/"
    "resnet20-12fca82f.th"
)
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Statistics of each channel with which its images were normalised: ImageNet's, although it was
trained on CIFAR-10."""
CLASS_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
)  # fmt: skip
"""The classes of CIFAR-10, in the order of its outputs."""


def check_weights(path: str) -> None:
    """Raises `OptionError` if `--weights` names no file."""
    require(bool(path), f"--weights is needed: a file of a ResNet-20, such as {WEIGHTS}")
    require(Path(path).exists(), f"--weights {path}: there is no such file; download {WEIGHTS}")


def load_resnet20(
    name: str, path: str, dataset: data.Dataset, options: images.Options
) -> distill.Pretrained:
    """Loads the network, with its classes in the order of a data set's.

    Args:
        name: Its name in the plan.
        path: A PyTorch or safetensors file, or the folder of a run that trained one.
        dataset: The data set, with the ten classes of CIFAR-10.
        options: The options of the experiment.

    Raises:
        OptionError: If the data set has other classes, or the file does not hold these weights.
    """
    require(
        len(dataset.class_names) == len(CLASS_NAMES),
        f"--dataset {options.dataset}: the teacher knows the ten classes of CIFAR-10, "
        f"but this data set has {len(dataset.class_names)}",
    )
    network = images.load_pretrained(
        name, models.resnet20(), path, dataset.train.images, options, mean=MEAN, std=STD
    )
    return images.match_teacher(network, path, dataset.class_names, default=CLASS_NAMES)
