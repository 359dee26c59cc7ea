"""What `jaxkd distill` needs to know of its data: networks that fit, teachers, what training takes.

`ImageProblem` and `TextProblem` are the two kinds.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxkd import distill, models
from jaxkd._messages import shorten
from jaxkd.data.bucketing import LengthBuckets
from jaxkd.data.records import Column, scannable
from jaxkd.models.description import reads_tokens


class Teacher(NamedTuple):
    """A teacher of a plan.

    Attributes:
        model: The model, whose classes are those of the data in their order.
        variables: Its pretrained variables; `None` if it is trained from random ones.
        fine_tuning: Further attributes of the stage that fine-tunes the variables, such as its
            optimizer; `None` if they teach as they are.
    """

    model: models.Model
    variables: Mapping[str, Any] | None = None
    fine_tuning: Mapping[str, Any] | None = None


class Student(NamedTuple):
    """A network to distil into.

    Attributes:
        model: The model.
        start: Further attributes of its stages: what it starts from, if that is not random.
    """

    model: models.Model
    start: Mapping[str, Any]


class Defaults(NamedTuple):
    """Values of options that depend on the kind of data."""

    epochs: int
    batch_size: int
    learning_rate: float


class Problem(abc.ABC):
    """Data in three splits, and the networks for it.

    Attributes:
        train: `inputs` and `labels`.
        validation: `inputs` and `labels`.
        test: `inputs` and `labels`.
        class_names: Name of each class, by label.
        augment: What is drawn of each input at every step, or `None`.
        buckets: The lengths to which batches of texts are cut, or `None`.
        saving: Arguments of `distill.save_results` that the kind of data needs.
        sources: What the configuration of the run records of files that were downloaded.
    """

    defaults: Defaults
    """Options for this kind of data."""
    default_student: str
    """Description of the student's network where none is named."""
    has_texts: bool
    """Whether the inputs are texts."""
    example: str
    """A network for them."""

    def __init__(
        self,
        splits: Sequence[Mapping[str, Any]],
        class_names: Sequence[str],
        *,
        augment: Callable[..., Any] | None = None,
        buckets: LengthBuckets | None = None,
        saving: Mapping[str, Any] | None = None,
    ) -> None:
        """Keeps the data; see the attributes."""
        self.train, self.validation, self.test = splits
        self.class_names = tuple(class_names)
        self.augment = augment
        self.buckets = buckets
        self.saving = dict(saving or {})
        self.sources: dict[str, Any] = {}

    @property
    def arrays(self) -> list[np.ndarray]:
        """All of the data, for the fingerprint of the run."""
        splits = (self.train, self.validation, self.test)
        arrays = [array for split in splits for array in split.values()]
        # What identifies the records and a sample of them stands for streamed ones.
        digests = [array.digest for array in arrays if isinstance(array, Column)]
        texts = [np.frombuffer(digest.encode(), np.uint8) for digest in digests]
        return [scannable(array) for array in arrays] + texts

    @abc.abstractmethod
    def make_teacher(self, name: str) -> Teacher:
        """Makes the teacher that `--teacher` names, and says what was chosen.

        Raises:
            ValueError: If there is no such network or file, or they do not fit the data.
        """

    @abc.abstractmethod
    def make_student(self, description: str, *, option: str) -> Student:
        """Makes the network that an option describes.

        Raises:
            ValueError: If there is no such network, or it does not fit the data.
        """

    def make_module(self, description: str, *, option: str) -> Any:
        """Makes a Linen module for the classes of the data."""
        try:
            is_of_texts = reads_tokens(description)
            if is_of_texts is not None and is_of_texts != self.has_texts:
                read, given = ("texts", "images") if is_of_texts else ("images", "texts")
                raise ValueError(
                    f"{shorten(description.partition('(')[0], 40)} reads {read}, but the data are "
                    f"{given}: choose a network of {given}, such as {self.example}"
                )
            return models.make_module(description, num_classes=len(self.class_names))
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from error

    def check_model(self, model: models.Model, *, owner: str) -> models.Model:
        """Returns a model after a check that it takes the inputs and has the classes."""
        inputs = self.train["inputs"]
        try:
            logits = self.infer_outputs(model).logits
        # Flax and the networks raise errors of many types for shapes and arguments.
        except Exception as error:
            size = " x ".join(map(str, inputs.shape[1:]))
            raise ValueError(
                f"{owner} does not fit inputs of {size}, {inputs.dtype} "
                f"({shorten(error, 120)}): choose other values of its keywords, or another network"
            ) from error
        if logits.shape != (1, len(self.class_names)):
            raise ValueError(
                f"{owner} returns logits of the shape {list(logits.shape)} for one input, but the "
                f"data has {len(self.class_names)} classes: leave out num_classes"
            )
        return model

    def infer_outputs(self, model: models.Model) -> models.Outputs:
        """Returns the shapes of a model's outputs for one input."""
        example = self.train["inputs"][:1]

        def apply(example: Any) -> models.Outputs:
            variables = model.init(jax.random.key(0), example)
            return model.apply(variables, example, train=False)[0]

        return jax.eval_shape(apply, example)

    def make_optimizer(self, learning_rate: float, steps: int) -> optax.GradientTransformation:
        """Makes the optimizer of networks that are trained from random weights."""
        return optax.adam(optax.cosine_decay_schedule(learning_rate, steps))


def make_stage(
    problem: Problem,
    name: str,
    model: models.Model,
    examples: Any,
    loss: distill.LossFn,
    **more: Any,
) -> distill.Stage:
    """Makes a stage on the data of a problem; the other arguments are those of the stage."""
    return distill.Stage(name, model, examples, loss, augment=problem.augment, **more)
