"""Images for `jaxkd distill`: networks that fit, and teachers from files."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd import data, models, weights
from jaxkd._messages import list_some, shorten
from jaxkd.cli.errors import require
from jaxkd.cli.folders import note_unfinished
from jaxkd.cli.problem import Defaults, Problem, Student, Teacher
from jaxkd.transfer import Rule, TransferError, transfer
from jaxkd.weights.files import RUN_FILE
from jaxkd.weights.students import CARD_FILE, find_student

Statistics = tuple[Any, Any]
"""Mean and standard deviation of each channel, in units of full brightness."""

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_LITE = ((127 / 255,) * 3, (128 / 255,) * 3)
_TRAINED_ON_IMAGENET = ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2")
_TEACHER_CHANNELS = (64, 128, 128, 128)
_STUDENT_CHANNELS = (16, 32, 64, 64)


class ImageProblem(Problem):
    """Classification of images."""

    defaults = Defaults(epochs=10, batch_size=128, learning_rate=1e-3)
    has_texts = False
    example = "resnet20"

    def __init__(
        self,
        dataset: data.Dataset,
        *,
        augment: bool = False,
        mix: Callable[..., data.Mixed] | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        """Keeps the data.

        Args:
            dataset: The images.
            augment: Whether they are cropped and flipped at random.
            mix: `data.mixup` or `data.cutmix`, or `None`.
            statistics: Those with which the teacher's weights were trained. By default the known
                ones, or those of the data.
        """
        super().__init__(
            [split.examples for split in dataset[:3]],
            dataset.class_names,
            augment=_make_augment(augment, mix),
        )
        self._statistics = statistics
        self.default_student = _describe_cnn(_STUDENT_CHANNELS, 32, self._side)

    def make_student(self, description: str, *, option: str) -> Student:
        """See `Problem`."""
        return Student(self._make_network(description, option), {})

    def make_teacher(self, name: str) -> Teacher:
        """Makes the teacher that `--teacher` names.

        Args:
            name: `auto`; a description of a network, which is trained; `NETWORK:FILE` with weights;
                or the folder of a run, whose student teaches.
        """
        if name == "auto":
            name = _describe_cnn(_TEACHER_CHANNELS, 128, self._side)
            print(f"the teacher is trained: {name}")
        network, separator, file = name.partition(":")
        require(
            self._statistics is None or bool(separator and file),
            "--teacher-mean and --teacher-std are for --teacher NETWORK:FILE: leave them out",
        )
        if Path(name).is_dir():
            return self._load_student(Path(name))
        if separator and file:
            return self._load_weights(network, Path(file))
        if folder := find_student(name):
            raise ValueError(
                f"--teacher {shorten(name, 80)} is a file of a student: pass the folder, "
                f"--teacher {shorten(folder, 80)}"
            )
        if "/" in name or Path(name).exists():
            raise ValueError(
                f"--teacher {shorten(name, 80)}: write NETWORK:{shorten(name, 80)} for a file of "
                "weights, such as resnet20:weights.th, or the folder of a run"
            )
        return Teacher(self._make_network(name, "--teacher"))

    @property
    def _images(self) -> Any:
        return self.train["inputs"]

    @property
    def _side(self) -> int:
        return self._images.shape[1]

    def _make_network(self, description: str, option: str) -> models.Model:
        module = self.make_module(description, option=option)
        statistics = data.channel_statistics(self._images)
        model = models.with_input_normalization(models.from_linen(module), *statistics)
        return self.check_model(model, owner=f"{option} {shorten(description, 60)}")

    def _load_student(self, folder: Path) -> Teacher:
        """Makes a teacher of the student of a run."""
        option = f"--teacher {shorten(folder, 80)}"
        if not (folder / CARD_FILE).is_file() or not (folder / RUN_FILE).is_file():
            raise ValueError(f"{option} has no {CARD_FILE} and {RUN_FILE} of a finished run")
        try:
            model, variables, card = weights.load_network(folder)
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from error
        note_unfinished(folder)
        require(card.inputs == "images", f"{option}: its student reads {card.inputs}, not images")
        self._check_size(model, variables, card.shape, option)
        teacher = Teacher(model, jax.device_put(variables))
        return self._match_classes(teacher, card.class_names, option)

    def _check_size(
        self, model: models.Model, variables: dict, shape: Sequence[int], option: str
    ) -> None:
        """Checks that a model takes the images; says so if it was trained on another size."""
        ours, theirs = self._images.shape[1:], tuple(shape)
        if ours == theirs:
            return
        described = [" x ".join(map(str, size)) for size in (theirs, ours)]
        difference = f"was trained on images of {described[0]}, and these are {described[1]}"
        remedy = f"--image-size {theirs[0]} makes them fit, if they come from a folder"
        try:
            jax.eval_shape(
                lambda images: model.apply(variables, images, train=False)[0], self._images[:1]
            )
        # Flax raises errors of many types for shapes.
        except Exception as error:
            raise ValueError(f"{option} {difference}: {remedy}") from error
        print(f"note: the student of {option} {difference}: {remedy}")

    def _load_weights(self, network: str, file: Path) -> Teacher:
        """Makes a teacher of a file of weights, which is fine-tuned if it has other classes."""
        option = f"--teacher {shorten(network, 60)}:{shorten(file, 80)}"
        if not file.exists():
            raise ValueError(f"{option}: there is no file {shorten(file, 80)}")
        module = self.make_module(network, option="--teacher")
        advice = _describe_student(file) or "`jaxkd convert` shows the details"
        if not hasattr(module, "torch_rules"):
            kind = shorten(network, 60)
            raise ValueError(
                f"{option}: {kind} takes no file of weights; "
                f"{_describe_student(file) or 'train it, or pass the folder of a run'}"
            )
        statistics = self._statistics or self._find_statistics(network)
        model = models.with_input_normalization(models.from_linen(module), *statistics)
        self.check_model(model, owner=option)
        fresh = jax.jit(model.init)(jax.random.key(0), self._images[:1])
        try:
            with warnings.catch_warnings():
                # What is lacking is judged below.
                warnings.filterwarnings(
                    "ignore", ".*(come from the source|running means and variances are missing)"
                )
                variables, report = weights.load_variables(
                    file, fresh, module.torch_rules(), strict=False
                )
        except TransferError as error:
            counts = str(error.report).splitlines()[0]
            raise ValueError(f"{option}: {counts}; {advice}") from error
        lacking = [*report.missing, *(mismatch[0] for mismatch in report.mismatched)]
        others = [path for path in lacking if not path.startswith("params/logits/")]
        if others or report.unexpected:
            raise ValueError(
                f"{option} does not fit: {list_some([*others, *report.unexpected], count=2)} is "
                f"missing or left over; {advice}"
            )
        if lacking:
            print(f"{network} knows other classes: it gets a new last layer and is fine-tuned")
            # A batch is too small to estimate the statistics, so those of the weights are kept.
            frozen = models.with_frozen_batch_stats(model)
            return Teacher(frozen, variables, {"transfer": transfer_with_zero_head})
        teacher = Teacher(model, jax.device_put(variables))
        if names := _read_names(file):
            return self._match_classes(teacher, names, option)
        print(
            f"{file.name} does not name its classes: {self.class_names[0]} is taken for its first "
            f"one, {self.class_names[-1]} for its last one, and so on in this order"
        )
        return teacher

    def _find_statistics(self, network: str) -> Statistics:
        name = network.partition("(")[0]
        if self._images.shape[-1] != 3:
            raise ValueError(f"the images are grey, but the weights of {name} are for colours")
        if name == "efficientnet_lite0":
            mean, std = _LITE
        elif name in _TRAINED_ON_IMAGENET or name.startswith("efficientnet"):
            mean, std = _IMAGENET
        else:
            mean, std = data.channel_statistics(self._images)
            print(
                f"the images of {name} are normalised by the statistics of the data: name others "
                "by --teacher-mean and --teacher-std if its weights were trained with others"
            )
        return np.asarray(mean), np.asarray(std)

    def _match_classes(self, teacher: Teacher, names: Sequence[str], option: str) -> Teacher:
        """Brings a teacher's classes into the order of the data's, by their names."""
        try:
            order = data.match_classes(names, self.class_names)
        except data.DataError as error:
            raise ValueError(f"{option}: {error}") from error
        model = teacher.model
        if (order != np.arange(len(order))).any():
            print("teacher and images have their classes in other orders: they are matched by name")
            model = models.with_class_order(model, order)
        return teacher._replace(model=self.check_model(model, owner=option))


def _make_augment(crops: bool, mix: Callable[..., data.Mixed] | None) -> Callable[..., Any] | None:
    if mix is None or not crops:
        return mix or (data.crop_and_flip if crops else None)

    def augment(key: jax.Array, images: jax.Array) -> data.Mixed:
        cropped = data.crop_and_flip(jax.random.fold_in(key, 0), images)
        return mix(jax.random.fold_in(key, 1), cropped)

    return augment


def transfer_with_zero_head(source: dict, fresh: dict) -> dict:
    """Returns the weights of another network, with a last layer of zeros."""
    # A random last layer would need more epochs.
    head = jax.tree.map(jnp.zeros_like, fresh["params"]["logits"])
    fresh = {**fresh, "params": {**fresh["params"], "logits": head}}
    rules = (Rule("params/logits/{rest...}", None),)
    return transfer(source, fresh, rules=rules, strict=False)[0]


def _describe_cnn(channels: Sequence[int], hidden: int, side: int) -> str:
    """Describes a CNN whose convolutions halve images of a side down to about five pixels."""
    count = 2 if side < 48 else 3 if side < 80 else 4
    return f"CNN(features={tuple(channels[:count])}, hidden={hidden})"


def _describe_student(file: Path) -> str:
    """Describes the student whose folder or file is named, with how it teaches; empty if none."""
    folder = find_student(file)
    if folder is None:
        return ""
    network = shorten(weights.read_card(folder).network or "a network of its own", 50)
    return f"{shorten(folder, 60)} holds {network}: pass --teacher {shorten(folder, 60)}"


def _read_names(file: Path) -> Sequence[str]:
    try:
        return weights.read_class_names(file)
    except ValueError:  # a PyTorch file
        return ()
