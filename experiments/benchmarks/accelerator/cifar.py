"""The images of the pack, and the networks and stages that learn from them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.accelerator import results
from experiments.benchmarks.accelerator.jpeg_file import read_jpegs
from experiments.benchmarks.accelerator.measurement import Context
from jaxkd import data, distill, evaluate, losses, models, runs
from jaxkd.data.dataset import Dataset, make_dataset
from jaxkd.data.decoded_cache import read_decoded, write_decoded
from jaxkd.models import Outputs

IMAGES_FILE = "images.npz"
"""The file of images in the pack."""
# The settings of RepDistiller for CIFAR: https://github.com/HobbitLong/RepDistiller.
LEARNING_RATE = 0.05
LEARNING_RATE_BATCH = 64
"""Batch size of that learning rate, which grows in proportion."""
DECAY_PROGRESS = (150 / 240, 180 / 240, 210 / 240)
"""When the learning rate falls to a tenth, as a share of the training."""
WEIGHT_DECAY = 5e-4
MOMENTUM = 0.9
TINY_RESNET = (0, (4, 4, 4, 4))
"""Arguments of a network without blocks, which compiles fast."""


def load(context: Context) -> Dataset:
    """Returns the images of the pack, decoded once for all measurements.

    A tenth of the training images is held out for validation.
    """
    assert context.pack is not None
    path = context.pack / IMAGES_FILE
    status = path.stat()
    fingerprint = f"{path.name} {status.st_size} {status.st_mtime_ns}"
    cache = context.shared / "decoded.npz"
    splits = read_decoded(cache, fingerprint)
    if splits is None:
        train, test, names = read_jpegs(path)
        write_decoded(cache, fingerprint, train, test)
    else:
        train, test = splits
        with np.load(path) as arrays:
            names = tuple(map(str, arrays["class_names"]))
    return make_dataset("the pack", train, test, names)


def make_resnet(arguments: Sequence[Any], dataset: Dataset, *, bf16: bool) -> models.Model:
    """Makes a ResNet for uint8 images from the arguments of `models.CifarResNet`."""
    module = models.CifarResNet(*arguments, num_classes=len(dataset.class_names))
    model = models.from_linen(module)
    if bf16:
        model = models.with_compute_dtype(model, jnp.bfloat16)
    return models.with_input_normalization(model, *data.channel_statistics(dataset.train.images))


def count_steps(dataset: Dataset, epochs: int, batch_size: int) -> int:
    """Returns the number of steps of some passes over the training images."""
    return max(1, epochs * len(dataset.train.labels) // batch_size)


def make_optimizer(steps: int, batch_size: int) -> optax.GradientTransformation:
    """Makes SGD with momentum, weight decay, and a learning rate that falls in three steps."""
    boundaries = {int(progress * steps): 0.1 for progress in DECAY_PROGRESS}
    schedule = optax.piecewise_constant_schedule(
        LEARNING_RATE * batch_size / LEARNING_RATE_BATCH, boundaries
    )
    return optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(schedule, momentum=MOMENTUM)
    )


def make_stage(
    name: str,
    model: models.Model,
    dataset: Dataset,
    loss: distill.LossFn,
    *,
    epochs: int,
    batch_size: int,
    **attributes: Any,
) -> distill.Stage:
    """Makes a stage on randomly cropped and flipped images.

    Args:
        name: Name of the stage.
        model: The student.
        dataset: The images.
        loss: The loss.
        epochs: Passes over the training images.
        batch_size: Images per step.
        **attributes: Further attributes of the stage.
    """
    steps = count_steps(dataset, epochs, batch_size)
    return distill.Stage(
        name,
        model,
        dataset.train.examples,
        loss,
        make_optimizer(steps, batch_size),
        steps=steps,
        batch_size=batch_size,
        augment=data.crop_and_flip,
        **attributes,
    )


def supervised_loss(
    student: Outputs,
    teachers: tuple[Outputs, ...],
    batch: distill.Batch,
    context: distill.LossContext,
) -> jax.Array:
    """Computes the cross-entropy with the labels."""
    return losses.hard_cross_entropy(student.logits, batch["labels"])


def train_teacher(
    context: Context,
    dataset: Dataset,
    *,
    arguments: Sequence[Any],
    epochs: int,
    batch_size: int,
    bf16: bool,
) -> distill.Pretrained:
    """Trains a ResNet, or reads it if another measurement has trained it."""
    model = make_resnet(arguments, dataset, bf16=bf16)
    stage = make_stage(
        "teacher", model, dataset, supervised_loss, epochs=epochs, batch_size=batch_size
    )
    options = {"arguments": arguments, "epochs": epochs, "batch_size": batch_size, "bf16": bf16}
    name = f"teacher_{results.digest_identity(options)}"
    run = runs.open_run(context.shared / name, options, arrays=dataset.train)
    (trained,) = distill.run_plan([stage], [0], run, validation=dataset.validation.examples)[
        "teacher"
    ]
    return distill.Pretrained("teacher", model, trained.variables)


def measure_accuracy(model: models.Model, variables: Any, dataset: Dataset) -> float:
    """Returns the share of test images that a model classifies correctly."""
    predict = _make_predict(model)
    return evaluate.accuracy(predict(variables, dataset.test.images), dataset.test.labels)


@functools.cache
def _make_predict(model: models.Model) -> Callable:
    return evaluate.make_predict(model)
