"""Digests of programs as they are lowered for shapes, without compiling them."""

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd._messages import shorten
from jaxkd.data.mixing import Mixed
from jaxkd.distill._cached_outputs import CachedParts, cached_shapes, select_outputs
from jaxkd.distill.placement import DATA
from jaxkd.distill.plan import AVERAGE, Entry, Pretrained, Stage, init_stage_state, input_shapes
from jaxkd.distill.step import BatchInfo, LossContext, StepFn
from jaxkd.models.model import Outputs


class LoweredStep(NamedTuple):
    """Facts about a step that is lowered but not compiled.

    Attributes:
        digest: Digest of the program.
        has_convolutions: Whether it computes convolutions.
        is_complete: Whether the digest covers all that the program computes with. That of a
            program with host callbacks, or with constants that JAX makes arguments, does not.
        unused_teachers: Positions of the teachers on which the step does not depend.
    """

    digest: str
    has_convolutions: bool
    is_complete: bool
    unused_teachers: tuple[int, ...] = ()


def lower_step(
    stage: Stage,
    make_step: Callable[..., StepFn],
    entries: Mapping[str, Entry],
    seed: int,
) -> LoweredStep:
    """Lowers a step for its shapes, without compiling it.

    The step is lowered for one device, wherever the stage trains, and without the names of
    functions. Another process with the same versions of JAX and its packages finds the same digest.
    """
    arguments = _step_arguments(stage, entries, seed)
    text, jaxpr = _lower(make_step(), *arguments)
    used = jax.tree.unflatten(jax.tree.structure(arguments), find_used_inputs(jaxpr))
    by_teacher = used[2]
    if stage.cache_teachers:
        by_teacher = zip(used[4].teacher_logits, used[4].teacher_features, strict=True)
    unused_teachers = tuple(
        number
        for number, uses in enumerate(by_teacher)
        # Some teachers have no variables.
        if jax.tree.leaves(uses) and not any(jax.tree.leaves(uses))
    )
    # Host callbacks, and constants that JAX makes arguments, are not in the text. A stage that has
    # them shares with no other.
    is_complete = not any(marker in text for marker in ("callback", "host_transfer", "jax.const"))
    digest = _hash_text(text if is_complete else text + stage.name)
    return LoweredStep(digest, "stablehlo.convolution" in text, is_complete, unused_teachers)


def depends_on_num_steps(
    stage: Stage,
    make_step: Callable[..., StepFn],
    entries: Mapping[str, Entry],
    seed: int,
) -> bool:
    """Returns whether a step reads the number of steps, as a loss does by `LossContext.progress`.

    A schedule that holds a number of its own is not found, but changes the digest of the step.
    """
    arguments = _step_arguments(stage, entries, seed)
    number = jax.ShapeDtypeStruct((), jnp.float32)

    def count_arguments(take_step: Callable) -> int:
        # JAX leaves out of a program what it does not compute with.
        (signature,) = re.findall(
            r"func\.func public @main\(.*", _lower(take_step, number, *arguments)[0]
        )
        return len(re.findall(r"%arg\d+:", signature))

    reading = jax.jit(lambda number, *rest: make_step(num_steps=number)(*rest))
    ignoring = jax.jit(lambda number, *rest: make_step()(*rest))
    return count_arguments(reading) > count_arguments(ignoring)


def find_unmixed(stage: Stage, entries: Mapping[str, Entry], seed: int) -> list[str]:
    """Returns the arrays of a batch that a loss reads although it ignores the mixture of inputs.

    They belong to the examples before they were mixed. The list is empty if nothing is mixed, or
    the loss reads `LossContext.mix`.
    """
    if stage.augment is None or stage.views is not None or stage.cache_teachers:
        return []
    state, batch, teacher_variables, key, _ = _step_arguments(stage, entries, seed)
    mixed = jax.eval_shape(stage.augment, key, batch["inputs"])
    if not isinstance(mixed, Mixed):
        return []
    models = [stage.model if n == AVERAGE else entries[n].model for n in stage.teachers]

    def compute_loss(mix: Any, own: Mapping[str, Any], *rest: Any) -> Any:
        state, batch, teacher_variables, inputs, key = rest
        teachers = tuple(
            model.apply(
                state.average_variables if variables is None else variables, inputs, train=False
            )[0]
            for model, variables in zip(models, teacher_variables, strict=True)
        )
        student = stage.model.apply(state.variables, inputs, train=True, key=key)[0]
        params = None if state.loss is None else state.loss.params
        context = LossContext(state.step, jnp.float32(0), key, params, None, mix)
        return stage.loss(student, teachers, {**batch, **own}, context)

    own = {
        name: batch[name]
        for name in batch
        if name != "inputs" and all(leaf.ndim for leaf in jax.tree.leaves(batch[name]))
    }
    arguments = mixed.mix, own, state, batch, teacher_variables, mixed.inputs, key
    try:
        traced = jax.make_jaxpr(compute_loss)(*arguments)
    except NameError:  # a network that names the axis of pmap
        return []
    reads = jax.tree.unflatten(jax.tree.structure(arguments), find_used_inputs(traced.jaxpr))
    if any(jax.tree.leaves(reads[0])):
        return []
    return [name for name, used in reads[1].items() if any(jax.tree.leaves(used))]


def _step_arguments(stage: Stage, entries: Mapping[str, Entry], seed: int) -> tuple:
    """Returns the shapes of a step's arguments."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = batch_shapes(stage, seed)
    # Networks are initialised with one example, as `start_or_resume` does.
    example = input_shapes(batch["inputs"])

    # Called with a real key, because a user's `init_loss` need not be traceable.
    loss_params = None if stage.init_loss is None else stage.init_loss(jax.random.key(0))

    def init_state(key: Any, inputs: Any) -> Any:
        variables = stage.model.init(key, inputs)
        return init_stage_state(stage, variables, loss_params)

    teachers = [None if name == AVERAGE else entries[name] for name in stage.teachers]
    teacher_variables = tuple(
        None if teacher is None else variables_shape(teacher, example) for teacher in teachers
    )
    info = BatchInfo()
    if stage.views is not None:
        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        index = jax.ShapeDtypeStruct((stage.batch_size,), jnp.int32)
        info = BatchInfo(index, scalar, key)
    if stage.cache_teachers:
        outputs = [
            cached_outputs_shape(stage, teacher, variables, batch["inputs"])
            for teacher, variables in zip(teachers, teacher_variables, strict=True)
            if teacher is not None  # as `Stage` checks
        ]
        info = info._replace(
            teacher_logits=tuple(cached.logits for cached in outputs),
            teacher_features=tuple(cached.features for cached in outputs),
        )
        teacher_variables = ()
    state = jax.eval_shape(init_state, key, example)
    return state, batch, teacher_variables, key, info


def check_draws(stage: Stage, seed: int) -> None:
    """Raises `ValueError` if `augment` or `rewrite` of a stage draws numbers outside of JAX.

    They are traced once, so that every step would get the same numbers. Two traces differ in them.
    """
    if stage.augment is None and stage.rewrite is None:
        return
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = batch_shapes(stage, seed)
    traced: dict[str, tuple] = {}
    if stage.augment is not None:
        traced["augment"] = stage.augment, key, batch["inputs"]
    if stage.rewrite is not None:
        variables = jax.eval_shape(stage.model.init, key, input_shapes(batch["inputs"]))
        traced["rewrite"] = stage.rewrite, variables, batch, key
    for name, (function, *arguments) in traced.items():
        first, second = (
            # A new function each time, since JAX keeps the trace of one that it knows.
            _find_constants(jax.make_jaxpr(lambda *x, f=function: f(*x))(*arguments))
            for _ in range(2)
        )
        if first != second:
            raise ValueError(
                f"the {name} of stage {shorten(stage.name, 40)!r} draws numbers outside of JAX, as "
                "by numpy.random, which every step would repeat: draw them by jax.random from its "
                "key"
            )


def _find_constants(traced: Any) -> list[bytes]:
    """Returns the constants of a traced function, of those that it calls as well."""
    constants = list(getattr(traced, "consts", ()))
    functions = []
    for equation in getattr(traced, "jaxpr", traced).eqns:
        constants += [var.val for var in equation.invars if hasattr(var, "val")]
        functions += [value for value in equation.params.values() if _is_traced(value)]
    # A key of JAX has a dtype of its own.
    numbers = [v for v in constants if not jnp.issubdtype(jnp.result_type(v), jax.dtypes.extended)]
    inner = (found for function in functions for found in _find_constants(function))
    return [*(np.asarray(number).tobytes() for number in numbers), *inner]


def _is_traced(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def hash_predict(entry: Entry, example: Any, parts: CachedParts | None = None) -> str:
    """Returns a digest of a model's predictions, or the parts of its outputs, as lowered."""

    def read(outputs: Outputs) -> Any:
        return outputs.logits if parts is None else select_outputs(outputs, parts)

    predict = jax.jit(
        lambda variables, inputs: read(entry.model.apply(variables, inputs, train=False)[0])
    )
    return _hash_text(_lower(predict, variables_shape(entry, example), example)[0])


def batch_shapes(stage: Stage, seed: int) -> dict[str, Any]:
    """Returns the shapes of a step's batch. A Python number keeps its weak type."""

    def batch_shape(array: Any) -> jax.ShapeDtypeStruct:
        shape = jax.eval_shape(jnp.asarray, array)
        if shape.ndim:
            shape = jax.ShapeDtypeStruct((stage.batch_size, *shape.shape[1:]), shape.dtype)
        return shape

    return jax.tree.map(batch_shape, dict(stage.examples(seed)))


def variables_shape(entry: Entry, example: Any) -> Any:
    """Returns the shapes of a model's variables."""
    if isinstance(entry, Pretrained):
        return jax.eval_shape(lambda: dict(entry.variables))
    return jax.eval_shape(entry.model.init, jax.eval_shape(lambda: jax.random.key(0)), example)


def cached_outputs_shape(stage: Stage, teacher: Entry, variables: Any, inputs: Any) -> Outputs:
    """Returns the shapes of the cached outputs of a teacher for a batch of inputs.

    Raises:
        ValueError: If the teacher lacks a feature, or has no row of it for each example.
    """
    owner = f"teacher {shorten(teacher.name, 40)!r} of stage {shorten(stage.name, 40)!r}"

    def predict(variables: Any, inputs: Any) -> Outputs:
        outputs = teacher.model.apply(variables, inputs, train=False)[0]
        outputs = select_outputs(outputs, stage.cached_parts, owner=owner)
        for name, array in outputs.features.items():
            if array.shape[:1] != inputs.shape[:1]:
                raise ValueError(
                    f"{owner} has a feature {name!r:.60} of the shape {array.shape} for "
                    f"{len(inputs)} examples: cache features with one row for each example"
                )
        return cached_shapes(outputs, stage.cached_parts, stage.views)

    return jax.eval_shape(predict, variables, inputs)


def _lower(function: Any, *arguments: Any) -> tuple[str, Any]:
    """Returns the text and the jaxpr of a jitted function, lowered for shapes of its arguments."""
    try:
        traced = function.trace(*arguments)
    except NameError:
        # A network that names the axis of pmap, such as one with another batch norm.
        mapped = jax.vmap(function, in_axes=None, axis_name=DATA, axis_size=1)
        traced = jax.jit(mapped).trace(*arguments)
    return traced.lower().as_text(), traced.jaxpr.jaxpr


def find_used_inputs(jaxpr: Any) -> list[bool]:
    """Returns for each input of a jaxpr whether an output depends on it, or may depend on it."""
    needed = {var for var in jaxpr.outvars if not hasattr(var, "val")}
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not needed.isdisjoint(equation.outvars):
            # What a function within does with its inputs is not looked at. A literal has a `val`.
            needed.update(var for var in equation.invars if not hasattr(var, "val"))
    return [var in needed for var in jaxpr.invars]


def _hash_text(text: str) -> str:
    """Returns a digest of a lowered program that does not depend on names and addresses."""
    names = re.findall(r"func\.func \w+ (@[\w.]+)", text)
    numbers = {name: f"@{number}" for number, name in enumerate(names)}
    text = re.sub(r"@[\w.]+", lambda match: numbers.get(match[0], match[0]), text)
    # A callback is an address, or a number that counts those of the process.
    lines = [re.sub(r"\d+", "", line) if "callback" in line else line for line in text.splitlines()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
