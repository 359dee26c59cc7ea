"""A plan: who learns what from whom, as data.

Direct distillation, assistants, several teachers, born-again generations and transfer-then-distil are plans.
"""

import graphlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import optax
from jax import Array

from jaxkd.models.model import Model
from jaxkd.train import Loss
from jaxkd.views import Augment

Examples = Mapping[str, Any] | Callable[[int], Mapping[str, Any]]
"""Arrays and numbers by name, or a function of the seed that returns them."""


class Pretrained(NamedTuple):
    """A model of a plan that comes trained: it teaches, and others start from it.

    Attributes:
        name: Unique in the plan.
        model: The model.
        variables: Its weights and statistics.
    """

    name: str
    model: Model
    variables: Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """One training of a plan.

    Attributes:
        name: Unique in the plan; it names the stage's folder and seeds its random draws.
        model: The student of this stage.
        data: Arrays of one length, `inputs` among them, of which each batch is a selection, and numbers, which every
            batch has; the loss reads them by name. Teacher and student may learn from different ones. Or a function of
            the seed that returns them, where seeds are to learn from different ones, in equal number. Stages that
            differ in their name and in this alone, such as in a temperature, are compiled once.
        loss: `(student, teachers, batch) -> [B]`, or with `init_loss` `(student, teachers, batch, loss_params) -> [B]`.
        tx: The optimizer.
        steps: How many steps to take.
        teachers: Names of the stages whose final models teach this one, in the order in which the loss gets them.
        start: Name of a stage from whose final weights this one starts; `None`: fresh ones.
        transfer: `(theirs, fresh) -> variables`, how weights of another architecture become this one's, such as
            `lambda theirs, fresh: transfer.transfer(theirs, fresh, strict=False)[0]`; `None`: as they are.
        batch_size: Examples a step.
        augment: `(key, inputs) -> inputs`, run inside the step.
        views: How many pictures `augment` makes of each example; the epochs show them in turn, to student and teachers
            alike, and all stages of a seed have the same ones. `None`: a new one at every step.
        cache_teachers: Compute the teachers' logits once for all of `data`, in all `views`, instead of at every step,
            and keep them on disk. The outputs that the loss then gets hold no features.
        cache_top_k: How many of the largest logits to keep of each output, where there are many classes; the others
            then weigh together what they did, each the same. `None`: all.
        init_loss: `key -> loss_params`, for a loss with parameters of its own, such as a projector: it gets them as a
            fourth argument, they are trained beside the student, and the student goes without them.
        loss_tx: The optimizer of these parameters; `None`: `tx`, with a state of its own.
    """

    name: str
    model: Model
    data: Examples
    loss: Loss
    tx: optax.GradientTransformation
    steps: int
    teachers: tuple[str, ...] = ()
    start: str | None = None
    transfer: Callable[[dict, dict], dict] | None = None
    batch_size: int = 128
    augment: Augment | None = None
    views: int | None = None
    cache_teachers: bool = False
    cache_top_k: int | None = None
    init_loss: Callable[[Array], Any] | None = None
    loss_tx: optax.GradientTransformation | None = None

    def __post_init__(self) -> None:
        """Raises `ValueError` if the attributes contradict each other."""
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"a stage's name is a folder's: letters, digits, '_', '-' and '.', not {self.name!r}")
        if not callable(self.data):
            self.examples(0)
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"stage {self.name!r} needs steps and batch_size of at least 1")
        if self.transfer is not None and self.start is None:
            raise ValueError(f"stage {self.name!r} has a transfer but no start: name the stage whose weights it takes")
        if self.views is not None and (self.augment is None or self.views < 1):
            raise ValueError(f"stage {self.name!r} has views={self.views}: it needs an augment, and at least one view")
        if self.cache_teachers and self.augment is not None and self.views is None:
            raise ValueError(
                f"stage {self.name!r} would learn from logits of images that it does not see: drop either augment or "
                "cache_teachers, or give the number of views that augment makes of each example"
            )
        if self.cache_top_k is not None and (not self.cache_teachers or self.cache_top_k < 1):
            raise ValueError(
                f"stage {self.name!r} has cache_top_k={self.cache_top_k}: it needs cache_teachers, and at least one"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of those that come before it: its teachers, and the one that it starts from."""
        return self.teachers if self.start is None else (*self.teachers, self.start)

    def examples(self, seed: int) -> Mapping[str, Any]:
        """The arrays that a seed learns from.

        Raises:
            ValueError: If there are no `inputs` or the arrays' lengths differ.
        """
        data = self.data(seed) if callable(self.data) else self.data
        lengths = {name: len(array) for name, array in data.items() if np.ndim(array)}
        if "inputs" not in lengths or len(set(lengths.values())) != 1 or not lengths["inputs"]:
            raise ValueError(
                f"stage {self.name!r} needs `inputs` and arrays of their length, at least 1, got {lengths}"
            )
        return data


def order(plan: Sequence[Stage | Pretrained]) -> tuple[Stage | Pretrained, ...]:
    """Sorts a plan so that every stage comes after those it learns from.

    Args:
        plan: Stages and pretrained models in any order.

    Returns:
        The same ones.

    Raises:
        ValueError: If two stages share a name, one names a stage that is not there, or they wait for each other.
    """
    stages = {stage.name: stage for stage in plan}
    if len(stages) != len(plan):
        raise ValueError(f"stages must have different names, got {[stage.name for stage in plan]}")
    needs = {one.name: one.needs if isinstance(one, Stage) else () for one in plan}
    for name, needed in needs.items():
        if unknown := [other for other in needed if other not in stages]:
            raise ValueError(f"stage {name!r} learns from {unknown}, which the plan does not have: {list(stages)}")
    try:
        return tuple(stages[name] for name in graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        raise ValueError(f"stages wait for each other: {' -> '.join(error.args[1])}") from error
