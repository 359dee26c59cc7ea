"""Options, networks, stages and runs of the experiments on images."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common import options as common_options
from experiments.common import plans
from experiments.common.cli import OptionError, require
from jaxkd import data, distill, models, runs
from jaxkd.distill import Examples, LossFn
from jaxkd.transfer import TransferError
from jaxkd.weights import load_variables, read_class_names

TEACHER = ((64, 128), 128)
STUDENT = ((16, 32), 32)
"""Channels of the convolutions, and units before the logits, of the CNNs of several experiments."""


@dataclasses.dataclass(frozen=True)
class Options(common_options.Options):
    """Options of an experiment on images."""

    dataset: str = "fashion_mnist_mini"
    """`fashion_mnist_mini`, which is included; a TFDS name such as `cifar10`; or a folder with
    train/CLASS/, test/CLASS/ and optionally val/CLASS/."""
    data_dir: str | None = None
    """Folder of the TFDS data sets. By default the one that TFDS uses."""
    image_size: int = 64
    """Side in pixels to which a folder's images are resized."""
    augment: bool = False
    """Crops and flips the images at random."""
    views: int | None = None
    """With --augment: number of views of each image. The epochs show them in turn, so that a
    teacher needs to see each view only once. By default, a new view is drawn at every step."""

    @property
    def can_cache_teachers(self) -> bool:
        """Returns whether everything that a student will see is known in advance."""
        return not self.augment or self.views is not None

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        super().check()
        require(
            self.views is None or (self.augment and self.views >= 1),
            f"--views {self.views}: needs at least 1, together with --augment",
        )


@dataclasses.dataclass(frozen=True)
class SoftTargetOptions(common_options.SoftTargetOptions, Options):
    """Options of an experiment on images that distils with soft targets."""


def load(options: Options) -> data.Dataset:
    """Loads the images that the options name."""
    # Data sets of another size warn of a size that was asked for, which the default is not.
    size = None if options.image_size == Options.image_size else options.image_size
    dataset = data.load(options.dataset, options.data_dir, image_size=size)
    common_options.check_batch_size(options, len(dataset.train.labels))
    return dataset


def make_network(module: Any, mean: Any, std: Any, options: Options) -> models.Model:
    """Makes a model for uint8 images, in the precision of the options.

    Args:
        module: A module of `jaxkd.models`.
        mean: Mean of each channel, in units of full brightness.
        std: Standard deviation of each channel, in the same units.
        options: The options.
    """
    model = common_options.make_model(module, options)
    return models.with_input_normalization(model, np.asarray(mean), np.asarray(std))


def make_cnn(
    features: Sequence[int], hidden: int, dataset: data.Dataset, options: Options
) -> models.Model:
    """Makes a CNN for a data set, normalised by the statistics of its training images.

    Args:
        features: Number of channels of each convolution.
        hidden: Number of units before the logits.
        dataset: The data set.
        options: The options.

    Raises:
        OptionError: If the images are too small for the network.
    """
    module = models.CNN(tuple(features), hidden, len(dataset.class_names))
    model = make_network(module, *data.channel_statistics(dataset.train.images), options)
    infer_shapes(model, dataset.train.images)
    return model


def infer_shapes(model: models.Model, images: Any) -> Any:
    """Returns the shapes of a model's variables for some images.

    Raises:
        OptionError: If the images are too small for the network.
    """
    try:
        return jax.eval_shape(model.init, jax.random.key(0), images[:1])
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"the images do not fit the network: {reason}") from error


def load_pretrained(
    name: str,
    module: Any,
    path: str | Path,
    images: Any,
    options: Options,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> distill.Pretrained:
    """Loads a network with weights from a file or a folder, for uint8 images.

    Prints what was removed from the names of the weights and what was left out.

    Args:
        name: Its name in the plan.
        module: A module of `jaxkd.models` that knows PyTorch's names.
        path: As for `jaxkd.weights.load_weights`: a PyTorch or safetensors file, also one that
            `jaxkd convert` or a run wrote; an index of shards; or a folder of a run or a hub model.
        images: Some of the images.
        options: The options.
        mean: Mean of each channel that it was trained with, in units of full brightness.
        std: Standard deviation of each channel, in the same units.

    Raises:
        OptionError: If the images are grey, or the file does not hold these weights.
    """
    module_name = type(module).__name__
    require(
        images.shape[-1] == 3,
        f"the images are grey, but {module_name} was trained on colour images",
    )
    model = make_network(module, mean, std, options)
    target = infer_shapes(model, images)
    try:
        variables, report = load_variables(path, target, module.torch_rules())
    except TransferError as error:
        # The counts alone, without the list of everything that is missing.
        reason = str(error.report).splitlines()[0]
        raise OptionError(
            f"--weights {path} does not fit {module_name}: {reason}; "
            "`python -m jaxkd convert` shows the details"
        ) from error
    except ValueError as error:
        # Most of these messages begin with the path.
        reason = str(error).removeprefix(str(path)).strip(" :")
        raise OptionError(f"--weights {path}: {reason}") from error
    if report.removed and distill.is_primary_process():
        names = " and ".join(map(repr, report.removed))
        print(f"{module_name}: removed {names} from the names of its weights")
    return distill.Pretrained(name, model, jax.device_put(variables))


def match_teacher(
    teacher: distill.Pretrained, path: str | Path, names: Sequence[str], *, default: Sequence[str]
) -> distill.Pretrained:
    """Brings a pretrained teacher's classes into the order of the data's, by their names.

    Args:
        teacher: The teacher.
        path: The file of its weights. That of a student of jaxkd names its classes.
        names: The classes of the data, by label.
        default: The teacher's classes, if the file does not name them.

    Raises:
        OptionError: If the two do not have the same classes.
    """
    try:
        teacher_names = read_class_names(path) or tuple(default)
    except ValueError:  # a PyTorch file
        teacher_names = tuple(default)
    is_numbered = all(name.isdecimal() for name in names)
    if is_numbered and len(names) == len(teacher_names) and {*names} != {*teacher_names}:
        print(
            f"the classes of the images are numbers: {names[0]} is taken for the teacher's "
            f"{teacher_names[0]}, and so on in this order"
        )
        return teacher
    try:
        order = data.match_classes(teacher_names, names)
    except data.DataError as error:
        raise OptionError(f"--dataset: {error}") from error
    if (order == np.arange(len(order))).all():
        return teacher
    print("the classes of teacher and images are in different orders: they are matched by name")
    return teacher._replace(model=models.with_class_order(teacher.model, order))


def num_steps(options: Options, dataset: data.Dataset, *, epochs: int | None = None) -> int:
    """Returns the number of steps of the options' epochs, or of `epochs`, over all images."""
    return common_options.num_steps(options, len(dataset.train.labels), epochs=epochs)


def make_stage(
    name: str,
    model: models.Model,
    examples: Examples,
    loss: LossFn,
    options: Options,
    *,
    steps: int,
    **kwargs: Any,
) -> distill.Stage:
    """Makes a stage with the options' optimizer, batch size and augmentation.

    The arguments are those of `plans.make_stage`.
    """
    augmentation: dict[str, Any] = {}
    if options.augment:
        augmentation = {"augment": data.crop_and_flip, "views": options.views}
    return plans.make_stage(
        name, model, examples, loss, options, steps=steps, **augmentation | kwargs
    )


def open_run(experiment: str, options: Options, dataset: data.Dataset) -> runs.Run:
    """Starts the run of an experiment on images, or resumes it."""
    return plans.open_run(experiment, options, options.dataset, list_arrays(dataset))


def list_arrays(dataset: data.Dataset) -> list[np.ndarray]:
    """Returns all arrays of a data set, for the run's fingerprint."""
    splits = (dataset.train, dataset.validation, dataset.test)
    return [array for split in splits for array in split]
