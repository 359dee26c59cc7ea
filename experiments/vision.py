"""What the image experiments share: options, networks of images, stages of one length."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import plans
from experiments.cli import OptionError, require
from jaxkd import checkpoints, data, distill, models
from jaxkd.plan import Examples
from jaxkd.train import Loss

OfSeed = Callable[[int], dict[str, Any]]
"""What a seed learns from."""


@dataclasses.dataclass(frozen=True)
class Options(plans.Options):
    """Options of an image experiment."""

    dataset: str = "fashion_mnist_mini"
    """`fashion_mnist_mini`, which comes along; a TFDS name such as `cifar10`; or a folder with train/CLASS/ and
    test/CLASS/."""
    data_dir: str | None = None
    """Where TFDS data sets lie, if not where TFDS puts them."""
    image_size: int = 64
    """Side in pixels to which a folder's images are fitted."""
    augment: bool = False
    """Crop and flip the images at random."""
    views: int | None = None
    """With --augment: how many pictures of each image there are, which the epochs show in turn, so that a teacher sees
    each once alone; None: a new one at every step."""

    @property
    def caches_teachers(self) -> bool:
        """Whether all that a student is shown is known before, so that its teachers can answer once."""
        return not self.augment or self.views is not None

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        super().check()
        require(
            self.views is None or (self.augment and self.views >= 1),
            f"--views {self.views}: at least one, and of images that --augment crops and flips",
        )


@dataclasses.dataclass(frozen=True)
class SoftOptions(plans.SoftOptions, Options):
    """Options of an image experiment in which soft targets teach."""


def network(module: Any, mean: Any, std: Any, options: Options) -> models.Model:
    """A Flax module for uint8 images, which are standardised, in the precision that the options name.

    Args:
        module: One of `jaxkd.models`.
        mean: Of each channel, in units of full brightness.
        std: Standard deviation, likewise.
        options: The options.
    """
    return models.standardized(plans.model(module, options), np.asarray(mean), np.asarray(std))


def cnn(features: Sequence[int], hidden: int, dataset: data.Dataset, options: Options) -> models.Model:
    """A CNN for a data set's uint8 images, standardised by the training images' mean and deviation.

    Raises:
        OptionError: If the images are too small for it.
    """
    module = models.CNN(tuple(features), hidden, len(dataset.class_names))
    model = network(module, *data.channel_statistics(dataset.train.images), options)
    try:
        jax.eval_shape(model.init, jax.random.key(0), dataset.train.images[:1])
    except ValueError as error:
        raise OptionError(f"the images do not fit the network: {str(error).splitlines()[0]}") from error
    return model


def pretrained(
    name: str,
    module: Any,
    weights: str | Path,
    images: Any,
    options: Options,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> distill.Pretrained:
    """A network with the weights of a PyTorch or safetensors file, for uint8 images.

    Args:
        name: Its name in the plan.
        module: One of `jaxkd.models` that knows PyTorch's names.
        weights: The file.
        images: Some of the images.
        options: The options.
        mean: Of each channel, by which its images are standardised, in units of full brightness.
        std: Standard deviation, likewise.

    Raises:
        OptionError: If the images are grey, or the file does not hold these weights.
    """
    require(images.shape[-1] == 3, f"the images are grey, and {type(module).__name__} was trained on colours")
    model = network(module, mean, std, options)
    fresh = jax.eval_shape(model.init, jax.random.key(0), images[:1])
    try:
        variables, _ = checkpoints.from_torch(checkpoints.load_weights(weights), fresh, module.torch_rules())
    except ValueError as error:
        told = "; ".join(str(error).splitlines()[:2])  # without the list of what is missing
        raise OptionError(f"--weights {weights}: {told}; `python -m jaxkd convert` tells more") from error
    return distill.Pretrained(name, model, jax.device_put(variables))


def few_labels(dataset: data.Dataset, count: int) -> tuple[OfSeed, OfSeed]:
    """The training images of which `count` keep their label, as many of each class; each seed draws its own.

    Returns:
        Those images alone; and all of them, where `labelled` tells which those are.

    Raises:
        DataError: If there are not as many images of each class.
    """
    images, labels = dataset.train
    data.balanced_subset(labels, count, jax.random.key(0))  # refuses a wrong number at once

    def kept(seed: int) -> Any:
        return data.balanced_subset(labels, count, jax.random.fold_in(jax.random.key(seed), count))

    def few(seed: int) -> dict[str, Any]:
        chosen = kept(seed)
        return {"inputs": images[chosen], "labels": labels[chosen]}

    def partly(seed: int) -> dict[str, Any]:
        labelled = np.isin(np.arange(len(labels)), kept(seed))
        # A label that is not kept is nowhere in what a student gets.
        return {"inputs": images, "labels": np.where(labelled, labels, 0), "labelled": labelled}

    return few, partly


def steps(options: Options, dataset: data.Dataset, *, epochs: int | None = None) -> int:
    """How many steps the options' epochs take, or `epochs` of them, over all training images."""
    return plans.steps(options, len(dataset.train.labels), epochs=epochs)


def stage(
    name: str,
    model: models.Model,
    examples: Examples,
    loss: Loss,
    options: Options,
    *,
    steps: int,
    **more: Any,
) -> distill.Stage:
    """A stage with the options' optimizer, batch size and augmentation."""
    shown: dict[str, Any] = {"augment": data.crop_and_flip, "views": options.views} if options.augment else {}
    return plans.stage(name, model, examples, loss, options, steps=steps, **shown | more)


def run(
    experiment: str,
    options: Options,
    dataset: data.Dataset,
    plan: Sequence[distill.Stage | distill.Pretrained],
    *,
    alike: int = 1,
    **left: Any,
) -> plans.Done:
    """Runs a plan on images and leaves results, report, figures and the best student.

    Args:
        experiment: Name of the script, for the run's directory.
        options: Its options.
        dataset: The images.
        plan: The stages and pretrained models.
        alike: How many stages differ in numbers alone, and so may train at once.
        **left: Further arguments of `plans.leave`: title, students, comparisons and so on.

    Returns:
        What is left.
    """
    opened = plans.open_run(experiment, options, options.dataset, _arrays(dataset))
    trained = plans.train(opened, options, plan, validation=_batch(dataset.validation), alike=alike)
    return plans.leave(opened, plan, trained, _batch(dataset.test), **left)


def _arrays(dataset: data.Dataset) -> list:
    return [array for split in (dataset.train, dataset.validation, dataset.test) for array in split]


def _batch(split: data.Split) -> dict:
    return {"inputs": split.images, "labels": split.labels}
