"""Plans: which model learns from which teachers, as data.

Direct distillation, teacher assistants, several teachers, born-again generations and distillation
after a weight transfer are all plans.
"""

import graphlib
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxkd._messages import shorten
from jaxkd.data.records import Records, is_dataset
from jaxkd.data.views import Augment
from jaxkd.distill._cached_outputs import CachedParts, check_cache_options, make_parts
from jaxkd.distill._requirements import (
    DERIVED_REQUIREMENTS,
    MODEL,
    REQUIREMENTS,
    check_numbers,
    describe_value,
    named_arrays,
)
from jaxkd.distill._rewrite import RewriteFn
from jaxkd.distill.selection import Best
from jaxkd.distill.step import LossFn, TrainState, init_train_state
from jaxkd.models.model import Model

MAX_NAME = 100
"""Largest number of characters of a stage's name, which is part of paths."""

MAX_REPEATS = 10
"""Largest number of times that a batch may hold each example."""

SMALL_BATCH = 1024
"""Size of a batch that any number of examples may fill."""

AVERAGE = "@average"
"""Among the teachers of a stage: the moving average of its own student. No stage has this name."""

KEY_PURPOSES = ("init", "order", "step")
"""What a stage draws: initial weights, also those of its loss; the order of its examples; and, in
its steps, augmentation, dropout and the loss's own numbers. Fixed views are those of the seed."""

Examples = Mapping[str, Any] | Callable[[int], Mapping[str, Any]]
"""Arrays and scalars by name, or a function of the seed that returns them."""


class Pretrained(NamedTuple):
    """A pretrained model of a plan. It teaches, or stages start from its weights.

    Attributes:
        name: Name of the model, unique in the plan.
        model: The model.
        variables: Its parameters and running statistics.
    """

    name: str
    model: Model
    variables: Mapping[str, Any]

    @property
    def needs(self) -> tuple[str, ...]:
        """The names that must come before it: none."""
        return ()


@dataclass(frozen=True)
class Derived:
    """A model of a plan whose weights come from those of others, without training.

    It may be an ensemble, a part of a joint model, or an average of weights. It teaches, is
    evaluated, and stages start from it, as if it were trained.

    Attributes:
        name: Name of the model, unique in the plan.
        model: The model.
        sources: Names of the stages, pretrained or derived models whose variables it takes.
        combine: `(*variables of the sources) -> variables`.

    Example:
        >>> import jax
        >>> from jaxkd import distill, models
        >>> model = models.from_linen(models.CNN(features=(4,), hidden=8))
        >>> def average(first, second):
        ...     return jax.tree.map(lambda a, b: (a + b) / 2, first, second)
        >>> distill.Derived("soup", model, ("first", "second"), average).needs
        ('first', 'second')
    """

    name: str
    model: Model
    sources: tuple[str, ...]
    combine: Callable[..., dict]

    def __post_init__(self) -> None:
        """Raises `TypeError` or `ValueError` if an attribute is unfit."""
        owner = f"the derived model {shorten(repr(self.name), 60)}"
        for attribute, requirement in DERIVED_REQUIREMENTS.items():
            requirement.check(getattr(self, attribute), f"{attribute} of {owner}")
        if not self.sources:
            raise ValueError(f"{owner} has no sources: name the stages whose weights it takes")

    @property
    def needs(self) -> tuple[str, ...]:
        """The names that must come before it: its sources."""
        return tuple(self.sources)


@dataclass(frozen=True)
class Stage:
    """One training of a plan.

    Attributes:
        name: Name of the stage, unique in the plan. It names the stage's folder and, unless there
            is a `key_name`, is folded into its PRNG key.
        model: The student.
        data: The examples by name: arrays of one length, `inputs` among them, of which a step
            selects a batch, and scalars that every batch has. `inputs` may be a dict of arrays, for
            a model that takes one. The loss reads them by name. `data.Records`, or a
            `grain.MapDataset` of such dicts, of which they are made, are read batch by batch and
            need not fit into memory. A
            function of the seed may return either, if seeds learn from different examples; their
            number must be equal. Stages whose steps compile to the same program, such as stages
            that differ in a scalar temperature, share it.
        loss: `(student, teachers, batch, context) -> [B]`, see `LossFn` and `LossContext`.
        tx: The optimizer.
        steps: Number of training steps.
        teachers: Names of the stages or pretrained models that teach, in the order in which the
            loss gets their outputs. `AVERAGE` is the student's own average, as it was before the
            step.
        start: Name of the stage or pretrained model whose weights this stage starts from; `None`
            for random weights.
        transfer: `(source, fresh) -> variables`. Converts the weights of `start` to this stage's
            architecture, for example
            `lambda source, fresh: transfer.transfer(source, fresh, strict=False)[0]`. `None` takes
            them as they are.
        batch_size: Number of examples in a batch, at most 10 times the examples, or 1,024.
        rewrite: `(variables, batch, key) -> batch`, run at the beginning of the step with the
            student's variables, see `make_train_step`: on-policy distillation samples there. It
            does not go with `cache_teachers` and `views`.
        augment: `(key, inputs) -> inputs`, run inside the step.
        views: Number of augmented views of each example. The epochs show them in turn, to student
            and teachers, and all stages of a seed share them. `None` draws a new view at every
            step.
        cache_teachers: Computes the teachers' logits once for all examples and views and keeps them
            on disk, instead of running the teachers at every step. The teachers' outputs then have
            the features of `cache_features` alone.
        cache_top_k: Number of the largest logits to cache of each output. The other classes share
            their total weight evenly. `None` caches all.
        cache_features: Names of the teachers' features that are cached with the logits. Every
            teacher must have them.
        cache_logits: Whether the logits are cached. Without them, the logits of the teachers'
            outputs are `None`: a loss that computes them from cached hidden states, such as
            `losses.fused_linear_kl_divergence`, needs a cache of the states' width.
        cache_dtype: "float32", "float16" or "bfloat16": how logits and floating-point features are
            kept on disk and on the devices. The loss gets them in float32. A number beyond the
            range of the dtype is an error.
        init_loss: `key -> loss_params`, for a loss with parameters of its own, such as a projector.
            They are trained with the student and are in `LossContext.params`.
        loss_tx: The optimizer of these parameters; `None` for `tx` with a state of its own.
        ema_decay: Largest weight of the old average when a step updates the exponential moving
            average of the student's weights, such as 0.999. The average is what is evaluated and
            returned. `None` keeps none.
        best: Returns the weights of the best evaluation, and may end the training early. `None`
            returns the last weights.
        key_name: Name that is folded into the PRNG key in place of the stage's own. Stages with the
            same one start from the same random weights, if their networks are equal, and see the
            examples in the same order, so that they differ in nothing that is drawn. A dict gives
            names to some of `KEY_PURPOSES` alone.
    """

    name: str
    model: Model
    data: Examples
    loss: LossFn
    tx: optax.GradientTransformation
    steps: int
    teachers: tuple[str, ...] = ()
    start: str | None = None
    transfer: Callable[[dict, dict], dict] | None = None
    batch_size: int = 128
    rewrite: RewriteFn | None = None
    augment: Augment | None = None
    views: int | None = None
    cache_teachers: bool = False
    cache_top_k: int | None = None
    cache_features: tuple[str, ...] = ()
    cache_logits: bool = True
    cache_dtype: str = "float32"
    init_loss: Callable[[Array], Any] | None = None
    loss_tx: optax.GradientTransformation | None = None
    ema_decay: float | None = None
    best: Best | None = None
    key_name: str | Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        """Raises `TypeError` or `ValueError` if attributes are unfit or contradict each other."""
        if not isinstance(self.name, str):
            raise TypeError(f"a stage's name must be text, got {shorten(repr(self.name), 80)}")
        # The first character excludes `.` and `..`, which would lead out of the stage's own folder.
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(
                "a stage's name is also a folder's name: use letters, digits, '_', '-' and '.', "
                f"not {shorten(repr(self.name), 150)}"
            )
        if len(self.name) > MAX_NAME:
            raise ValueError(
                f"a stage's name is also a folder's name: use at most {MAX_NAME} characters, not "
                f"the {len(self.name):,} of {shorten(self.name, 40)!r}"
            )
        if is_dataset(self.data):
            object.__setattr__(self, "data", Records(self.data))
        for attribute, requirement in REQUIREMENTS.items():
            requirement.check(getattr(self, attribute), f"{attribute} of stage {self.name!r}")
        # The data of a function are checked when it is called: they may differ from seed to seed.
        if not callable(self.data):
            self._check_batch_size(self.examples(0))
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"stage {self.name!r} needs steps and batch_size of at least 1")
        if self.transfer is not None and self.start is None:
            raise ValueError(
                f"stage {self.name!r} has a transfer but no start: "
                "name the stage whose weights it takes"
            )
        if self.views is not None and (self.augment is None or self.views < 1):
            raise ValueError(
                f"stage {self.name!r} has views={self.views}: "
                "views need an augment and a number of at least 1"
            )
        if isinstance(self.key_name, Mapping) and not {*self.key_name} <= {*KEY_PURPOSES}:
            raise ValueError(
                f"stage {self.name!r} has a key_name with {shorten(str(list(self.key_name)), 80)}: "
                f"name purposes of {list(KEY_PURPOSES)}"
            )
        if self.rewrite is not None and (self.cache_teachers or self.views is not None):
            option = "cache_teachers" if self.cache_teachers else "views"
            raise ValueError(
                f"stage {self.name!r} has a rewrite, whose batches are not known beforehand: leave "
                f"out {option}"
            )
        check_cache_options(self)
        self._check_average()
        if self.best is not None:
            self.best.check(f"stage {self.name!r}")

    def _check_average(self) -> None:
        """Raises `ValueError` unless the decay is a fraction, and there if the average teaches."""
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"stage {self.name!r} has ema_decay={self.ema_decay}: it must be between 0 and 1, "
                "such as 0.999"
            )
        if AVERAGE in self.teachers and (self.ema_decay is None or self.cache_teachers):
            raise ValueError(
                f"stage {self.name!r} learns from its own average: it needs an ema_decay, such as "
                "0.999, and its teachers cannot be cached"
            )

    def _check_batch_size(self, examples: Mapping[str, Any]) -> None:
        """Raises `ValueError` if a batch would hold every example many times."""
        count = len(jax.tree.leaves(examples["inputs"])[0])
        # A few examples may fill a batch of the usual size.
        largest = max(MAX_REPEATS * count, SMALL_BATCH)
        if self.batch_size > largest:
            raise ValueError(
                f"stage {shorten(self.name, 40)!r} has batches of {self.batch_size:,}, but only "
                f"{count:,} examples: choose a batch_size of at most {largest:,}"
            )

    def make_key(self, seed: int, purpose: str) -> Array:
        """Makes the PRNG key of a purpose, one of `KEY_PURPOSES`.

        It depends on the seed and a name alone, so that adding a stage does not move another one's
        bits.
        """
        names = self.key_name
        name = names.get(purpose) if isinstance(names, Mapping) else names
        # CRC-32 instead of `hash`, which differs from process to process.
        number = zlib.crc32((self.name if name is None else name).encode())
        return jax.random.fold_in(jax.random.key(seed), number)

    @property
    def cached_parts(self) -> CachedParts:
        """What is cached of the outputs of its teachers."""
        return make_parts(
            self.cache_features, self.cache_logits, self.cache_top_k, self.cache_dtype
        )

    @property
    def needs(self) -> tuple[str, ...]:
        """The names that must come before this stage: its teachers and its start."""
        others = tuple(name for name in self.teachers if name != AVERAGE)
        return others if self.start is None else (*others, self.start)

    def examples(self, seed: int) -> Mapping[str, Any]:
        """Returns the examples of a seed: arrays, or the columns of records, and scalars.

        Raises:
            TypeError: If a function of the seed returns anything but a dict.
            ValueError: If there are no `inputs`, an array is a list or holds text, the arrays
                differ in length, or `inputs` is a dict with views or cached teachers.
        """
        data = self.data(seed) if callable(self.data) else self.data
        if not isinstance(data, Mapping):
            raise TypeError(
                f"the data of stage {self.name!r} must return a dict of arrays, got "
                f"{describe_value(data)}"
            )
        for name, array in data.items():
            # Nested lists would be taken for many arrays.
            if isinstance(array, (list, tuple)):
                raise ValueError(
                    f"stage {self.name!r} has a {type(array).__name__} as {name!r}: "
                    "make it an array with np.asarray"
                )
        check_numbers(data, f"stage {self.name!r}")
        lengths = {name: len(array) for name, array in named_arrays(data) if np.ndim(array)}
        has_inputs = any(name == "inputs" or name.startswith("inputs/") for name in lengths)
        if not has_inputs or len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(
                f"stage {self.name!r} needs `inputs` and arrays of the same length, at least 1, "
                f"got the lengths {str(lengths)[:150]}"
            )
        if isinstance(data["inputs"], Mapping) and (self.views or self.cache_teachers):
            raise ValueError(
                f"stage {self.name!r} has a dict of inputs, but views and cache_teachers need one "
                "array: leave them out, or stack the inputs"
            )
        # JAX takes a dict alone for a tree.
        return dict(data) if isinstance(data, Records) else data


Entry = Stage | Pretrained | Derived
"""An entry of a plan."""


def init_stage_state(stage: Stage, variables: dict, loss_params: Any) -> TrainState:
    """Returns the state of a stage before its first step, from its student's variables."""
    return init_train_state(
        variables,
        stage.tx,
        loss_params=loss_params,
        loss_tx=stage.loss_tx,
        has_average=stage.ema_decay is not None,
    )


def input_shapes(inputs: Any, batch_size: int = 1) -> Any:
    """Returns the shapes and dtypes of a batch of inputs `[N, ...]`, an array or a dict of them."""
    return jax.tree.map(
        # JAX makes float32 of float64.
        lambda array: jax.ShapeDtypeStruct(
            (batch_size, *np.shape(array)[1:]), jnp.result_type(array)
        ),
        inputs,
    )


def needed_stages(entries: Mapping[str, Entry], name: str) -> set[str]:
    """Returns the stages that an entry needs itself, or through the derived models that it needs.

    Args:
        entries: The entries of a plan by name.
        name: Name of the entry.
    """
    found = set()
    for needed in entries[name].needs:
        if isinstance(entries[needed], Stage):
            found.add(needed)
        else:
            found |= needed_stages(entries, needed)
    return found


def teacher_baselines(
    plan: Sequence[Entry], variables: Mapping[str, Any] | None = None
) -> list[tuple[str, str]]:
    """Pairs each teacher with the stages that train its student without a teacher.

    A teacher that is no better than such a stage has little to teach.

    Args:
        plan: Stages and pretrained models in any order.
        variables: The variables of each stage by name, if they are known. By default their shapes
            are traced, on the examples of seed 0.

    Returns:
        Pairs of a teacher's name and the name of a stage of the same network as one of its
        students, which has neither a teacher nor a start. Networks are the same if their variables
        have the same names, shapes and dtypes.
    """
    stages = [entry for entry in plan if isinstance(entry, Stage)]
    pairs = [
        (teacher, alone.name)
        for student in stages
        for teacher in student.teachers
        if teacher != AVERAGE
        for alone in stages
        if not alone.needs and alone.name != teacher and _is_same_network(alone, student, variables)
    ]
    return list(dict.fromkeys(pairs))


def _is_same_network(stage: Stage, other: Stage, variables: Mapping[str, Any] | None) -> bool:
    # Two calls that make the same network return models that do not compare equal.
    if stage.model == other.model:
        return True
    first, second = (
        _describe_variables(_trace_variables(entry) if variables is None else variables[entry.name])
        for entry in (stage, other)
    )
    # Nothing is known of models without variables.
    return bool(first) and first == second


def _trace_variables(stage: Stage) -> Any:
    """Returns the shapes of the variables of a stage's model."""
    inputs = input_shapes(stage.examples(0)["inputs"])
    return jax.eval_shape(stage.model.init, jax.random.key(0), inputs)


def _describe_variables(variables: Any) -> tuple:
    """Returns names, shapes and dtypes of variables."""
    return tuple(
        (jax.tree_util.keystr(path), leaf.shape, leaf.dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    )


def check_entries(plan: Sequence[Entry]) -> None:
    """Raises `TypeError` if a plan is no sequence of stages and pretrained models.

    A pretrained model is a plain tuple, whose attributes are checked here.
    """
    if not isinstance(plan, (list, tuple)) or isinstance(plan, Pretrained):
        raise TypeError(
            f"a plan must be a list of stages, got {describe_value(plan)}: write [stage]"
        )
    for entry in plan:
        if not isinstance(entry, (Stage, Pretrained, Derived)):
            raise TypeError(
                "a plan holds Stage, Pretrained and Derived, but also "
                f"{describe_value(entry)}: remove it"
            )
        if isinstance(entry, Pretrained):
            MODEL.check(entry.model, f"model of the pretrained {shorten(repr(entry.name), 80)}")


def order(plan: Sequence[Entry]) -> tuple[Entry, ...]:
    """Sorts a plan so that every stage comes after those it learns from.

    Args:
        plan: Stages and pretrained models in any order.

    Returns:
        The same stages and models, sorted.

    Raises:
        TypeError: If the plan is no sequence of stages and pretrained models.
        ValueError: If two entries share a name, if case is ignored, a stage names an unknown one,
            or stages depend on each other in a cycle.
    """
    check_entries(plan)
    entries = {entry.name: entry for entry in plan}
    if len(entries) != len(plan):
        raise ValueError(f"stages must have different names, got {[entry.name for entry in plan]}")
    # They name folders, and the disks of many laptops ignore case.
    folders: dict[str, str] = {}
    for name in entries:
        other = folders.setdefault(name.casefold(), name)
        if other != name:
            raise ValueError(
                f"stages {other!r} and {name!r} differ in case alone, and would share a folder on "
                "some disks: give one another name"
            )
    needs = {entry.name: entry.needs for entry in plan}
    for name, needed in needs.items():
        # `TopologicalSorter` would accept an unknown name as one more entry that needs nothing.
        unknown = [other for other in needed if other not in entries]
        if unknown:
            raise ValueError(
                f"stage {name!r} learns from {unknown}, but the plan has only {list(entries)}"
            )
    try:
        return tuple(entries[name] for name in graphlib.TopologicalSorter(needs).static_order())
    # graphlib puts the nodes of the cycle into the second argument of its error.
    except graphlib.CycleError as error:
        raise ValueError(
            f"stages depend on each other in a cycle: {' -> '.join(error.args[1])}"
        ) from error
