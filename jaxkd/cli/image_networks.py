"""The networks that `jaxkd distill` trains on images, and those that it takes from files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd import data, distill, models, weights
from jaxkd._messages import list_some, shorten
from jaxkd.data import Dataset
from jaxkd.transfer import Rule, TransferError, transfer
from jaxkd.weights.files import RUN_FILE
from jaxkd.weights.students import CARD_FILE

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_LITE = ((127 / 255,) * 3, (128 / 255,) * 3)
_TRAINED_ON_IMAGENET = ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2")
_AUTO_CHANNELS = (64, 128, 128, 128)
_STUDENT_CHANNELS = (16, 32, 64, 64)


class Teacher(NamedTuple):
    """A teacher of a plan.

    Attributes:
        model: The model, whose classes are those of the data in their order.
        pretrained: The entry of the plan that has its weights, or `None` if it is trained.
        is_fine_tuned: Whether it starts from the pretrained weights, except for the last layer, and
            is trained on the data.
    """

    model: models.Model
    pretrained: distill.Pretrained | None = None
    is_fine_tuned: bool = False


def describe_default(size: int, *, is_teacher: bool) -> str:
    """Describes the CNN that serves where no network is named.

    Args:
        size: Side of the images in pixels. Each convolution halves it, down to about 5.
        is_teacher: Whether it is the teacher, which has more channels.
    """
    count = 2 if size < 48 else 3 if size < 80 else 4
    channels = (_AUTO_CHANNELS if is_teacher else _STUDENT_CHANNELS)[:count]
    hidden = 128 if is_teacher else 32
    return f"CNN(features={channels}, hidden={hidden})"


def make_network(description: str, dataset: Dataset, *, option: str) -> models.Model:
    """Makes a network for the data, normalised by the statistics of its training images.

    Args:
        description: As for `models.make_module`.
        dataset: The data.
        option: The option that named it, for messages.

    Raises:
        ValueError: If there is no such network, or the images do not fit it.
    """
    try:
        module = models.make_module(description, num_classes=len(dataset.class_names))
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
    model = models.with_input_normalization(
        models.from_linen(module), *data.channel_statistics(dataset.train.images)
    )
    return check_network(model, dataset, owner=f"{option} {shorten(description, 60)}")


def check_network(model: models.Model, dataset: Dataset, *, owner: str) -> models.Model:
    """Returns a model after a check that it takes the images and has the classes of the data."""
    try:
        logits = _infer(model, dataset)[1].logits
    # Flax and the networks raise errors of many types for shapes and arguments.
    except Exception as error:
        raise ValueError(
            f"{owner} does not fit images of {_size(dataset)}: {shorten(error, 150)}"
        ) from error
    num_classes = len(dataset.class_names)
    if logits.shape != (1, num_classes):
        raise ValueError(
            f"{owner} returns logits of the shape {list(logits.shape)} for one image, but the data "
            f"has {num_classes} classes: leave out num_classes"
        )
    return model


def infer_outputs(model: models.Model, dataset: Dataset) -> models.Outputs:
    """Returns the shapes of a model's outputs for one image."""
    return _infer(model, dataset)[1]


def choose_teacher(
    name: str, dataset: Dataset, *, statistics: tuple[Any, Any] | None = None
) -> Teacher:
    """Makes the teacher that the option `--teacher` names.

    Args:
        name: `auto`; a description of a network, which is trained; `NETWORK:FILE` with weights; or
            the folder of a run, whose student teaches.
        dataset: The data.
        statistics: Mean and standard deviation of each channel for a network from a file, in units
            of full brightness. By default those that are known for it, or those of the data.

    Raises:
        ValueError: If there is no such network or file, or they do not fit the data.
    """
    if name == "auto":
        name = describe_default(dataset.train.images.shape[1], is_teacher=True)
        print(f"the teacher is trained: {name}")
    network, separator, file = name.partition(":")
    if Path(name).is_dir():
        return _load_student(Path(name), dataset)
    if separator and file:
        return _load_weights(network, Path(file), dataset, statistics)
    if "/" in name or Path(name).exists():
        raise ValueError(
            f"--teacher {shorten(name, 80)}: write NETWORK:{shorten(name, 80)} for a file of "
            "weights, such as resnet20:weights.th, or the folder of a run"
        )
    return Teacher(make_network(name, dataset, option="--teacher"))


def _load_student(folder: Path, dataset: Dataset) -> Teacher:
    """Makes a teacher of the student of a run."""
    if not (folder / CARD_FILE).is_file() or not (folder / RUN_FILE).is_file():
        raise ValueError(f"--teacher {folder} has no {CARD_FILE} and {RUN_FILE} of a finished run")
    card = weights.read_card(folder)
    if card.network is None or card.inputs != "images":
        raise ValueError(
            f"--teacher {folder}: its student is no network of jaxkd.models that reads images"
        )
    model = models.from_linen(models.make_module(card.network))
    if card.mean is not None and card.std is not None:
        model = models.with_input_normalization(model, np.array(card.mean), np.array(card.std))
    variables = weights.load_safetensors(folder)
    entry = distill.Pretrained("teacher", model, jax.device_put(variables))
    return Teacher(*_match_classes(entry, card.class_names, dataset, f"--teacher {folder}"))


def _load_weights(
    network: str, file: Path, dataset: Dataset, statistics: tuple[Any, Any] | None
) -> Teacher:
    """Makes a teacher of a file of weights, which is fine-tuned if it has other classes."""
    option = f"--teacher {network}:{shorten(file, 80)}"
    if not file.exists():
        raise ValueError(f"{option}: there is no file {shorten(file, 80)}")
    num_classes = len(dataset.class_names)
    try:
        module: Any = models.make_module(network, num_classes=num_classes)
    except ValueError as error:
        raise ValueError(f"--teacher: {error}") from error
    if not hasattr(module, "torch_rules"):
        raise ValueError(f"{option}: {network} takes no weights of PyTorch")
    mean, std = statistics or _find_statistics(network, dataset)
    model = models.with_input_normalization(models.from_linen(module), mean, std)
    check_network(model, dataset, owner=option)
    fresh = jax.jit(model.init)(jax.random.key(0), dataset.train.images[:1])
    try:
        variables, report = weights.load_variables(file, fresh, module.torch_rules(), strict=False)
    except TransferError as error:
        raise ValueError(
            f"{option}: {str(error.report).splitlines()[0]}; `jaxkd convert` shows the details"
        ) from error
    lacking = [*report.missing, *(mismatch[0] for mismatch in report.mismatched)]
    others = [path for path in lacking if not path.startswith("params/logits/")]
    if others or report.unexpected:
        raise ValueError(
            f"{option} does not fit: {list_some([*others, *report.unexpected])} is missing or left "
            "over; `jaxkd convert` shows the details"
        )
    if lacking:
        print(f"{network} knows other classes: it gets a new last layer and is fine-tuned")
        return Teacher(model, distill.Pretrained("pretrained", model, variables), True)
    entry = distill.Pretrained("teacher", model, jax.device_put(variables))
    names = _read_names(file)
    if not names:
        print(
            f"{file.name} does not name its classes: {dataset.class_names[0]} is taken for its "
            f"first one, {dataset.class_names[-1]} for its last one, and so on in this order"
        )
        return Teacher(model, entry)
    return Teacher(*_match_classes(entry, names, dataset, option))


def transfer_all_but_head(source: dict, fresh: dict) -> dict:
    """Returns the weights of another network, with a last layer of zeros."""
    head = jax.tree.map(jnp.zeros_like, fresh["params"]["logits"])
    fresh = {**fresh, "params": {**fresh["params"], "logits": head}}
    rules = (Rule("params/logits/{rest...}", None),)
    return transfer(source, fresh, rules=rules, strict=False)[0]


def _find_statistics(network: str, dataset: Dataset) -> tuple[Any, Any]:
    name = network.partition("(")[0]
    if name == "efficientnet_lite0":
        mean, std = _LITE
    elif name in _TRAINED_ON_IMAGENET or name.startswith("efficientnet"):
        mean, std = _IMAGENET
    else:
        mean, std = data.channel_statistics(dataset.train.images)
        print(
            f"the images of {name} are normalised by the statistics of the data: name others by "
            "--teacher-mean and --teacher-std if its weights were trained with others"
        )
    if dataset.train.images.shape[-1] != 3:
        raise ValueError(f"the images are grey, but the weights of {name} are those for colours")
    return np.asarray(mean), np.asarray(std)


def _read_names(file: Path) -> Sequence[str]:
    try:
        return weights.read_class_names(file)
    except ValueError:  # a PyTorch file
        return ()


def _match_classes(
    teacher: distill.Pretrained, names: Sequence[str], dataset: Dataset, option: str
) -> tuple[models.Model, distill.Pretrained]:
    """Brings a teacher's classes into the order of the data's, by their names."""
    try:
        order = data.match_classes(names, dataset.class_names)
    except data.DataError as error:
        raise ValueError(f"{option}: {error}") from error
    if (order != np.arange(len(order))).any():
        print("the classes of teacher and images are in different orders: they are matched by name")
        teacher = teacher._replace(model=models.with_class_order(teacher.model, order))
    check_network(teacher.model, dataset, owner=option)
    return teacher.model, teacher


def _infer(model: models.Model, dataset: Dataset) -> tuple[Mapping[str, Any], models.Outputs]:
    """Returns the shapes of a model's variables, and of its outputs for one image."""
    image = dataset.train.images[:1]
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    outputs, _ = jax.eval_shape(
        lambda variables, image: model.apply(variables, image, train=False), variables, image
    )
    return variables, outputs


def _size(dataset: Dataset) -> str:
    return " x ".join(map(str, dataset.train.images.shape[1:]))
