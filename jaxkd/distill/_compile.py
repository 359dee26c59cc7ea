"""Compiles the stages of a plan. Stages whose steps are the same program share it."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.distill._multi_step import MultiStep
from jaxkd.distill.placement import Placement
from jaxkd.distill.plan import Pretrained, Stage
from jaxkd.distill.step import BatchInfo, StepFn, init_train_state, make_train_step
from jaxkd.distill.top_k import top_k
from jaxkd.evaluate import Score
from jaxkd.models.model import Model
from jaxkd.runs import fingerprint


class CompiledStage(NamedTuple):
    """A stage with its compiled functions, for all seeds.

    Attributes:
        stage: The stage.
        multi_step: Takes steps. Stages with the same program have the identical function.
        init: `(key, inputs) -> variables`.
        score: `variables -> Score` on the validation split.
        fingerprint: JSON values that identify the training. A checkpoint with others is refused.
    """

    stage: Stage
    multi_step: MultiStep
    init: Callable[..., dict]
    score: Callable[[dict], Score]
    fingerprint: dict[str, Any]


class _Program(NamedTuple):
    """Stages whose steps are the same program.

    Attributes:
        stages: The stages.
        make_step: Makes the step of the first one.
    """

    stages: list[Stage]
    make_step: Callable[..., StepFn]


def compile_stages(
    plan: Sequence[Stage | Pretrained],
    seed: int,
    placement: Placement,
    scores: Mapping[str, Callable[[dict], Score]],
) -> list[CompiledStage]:
    """Makes the compiled functions of all stages of a plan.

    Args:
        plan: The stages and pretrained models, sorted.
        seed: A seed whose examples have the shapes of every seed's.
        placement: Where the stages train.
        scores: `variables -> Score` on the validation split, by name.

    Returns:
        The stages in the order of the plan.
    """
    models = {entry.name: entry.model for entry in plan}
    pretrained = {entry.name: entry.variables for entry in plan if isinstance(entry, Pretrained)}
    # Jitted once per model: a new `jax.jit` for each stage would compile the same program again.
    inits = {model: jax.jit(model.init) for model in models.values()}
    compiled = {}
    for program in _find_programs(plan, seed):
        multi_step = placement.make_multi_step(program.make_step)
        for stage in program.stages:
            weights = {name: pretrained[name] for name in stage.needs if name in pretrained}
            compiled[stage.name] = CompiledStage(
                stage,
                multi_step,
                inits[stage.model],
                scores[stage.name],
                _describe(stage, weights),
            )
    return [compiled[entry.name] for entry in plan if entry.name in compiled]


def group_by_program(plan: Sequence[Stage | Pretrained], seed: int = 0) -> list[list[Stage]]:
    """Groups the stages of a plan whose training steps compile to the same program.

    Only stages that could share a program are lowered: those with the same model, shapes and number
    of teachers. Two equal optimizers, such as two calls of `optax.adam(1e-3)`, give the same
    program, although they do not compare equal. Stages of a group take the same number of steps.

    Args:
        plan: Stages and pretrained models.
        seed: A seed whose examples have the shapes of every seed's.

    Returns:
        The groups.
    """
    return [program.stages for program in _find_programs(plan, seed)]


def _find_programs(plan: Sequence[Stage | Pretrained], seed: int) -> list[_Program]:
    models = {entry.name: entry.model for entry in plan}
    candidates: dict[Any, list[_Program]] = {}
    for entry in plan:
        if not isinstance(entry, Stage):
            continue
        programs = candidates.setdefault(_candidate_key(entry, seed), [])
        # Stages made with `dataclasses.replace` have identical functions: no need to lower them.
        same = next((p for p in programs if _is_same_step(p.stages[0], entry)), None)
        if same is not None:
            same.stages.append(entry)
        else:
            programs.append(_Program([entry], _step_maker(entry, models)))
    return [
        program
        for programs in candidates.values()
        for program in _merge_equal(programs, models, seed)
    ]


def _candidate_key(stage: Stage, seed: int) -> tuple:
    """Returns attributes that are equal for all stages of one program."""
    batch = _batch_shapes(stage, seed)
    # Sets of names, shapes and dtypes: the order of a batch's arrays does not change the program. A
    # Python number (weak type) promotes in another way than an array.
    return (
        stage.model,
        frozenset((name, x.shape, x.dtype, x.weak_type) for name, x in batch.items()),
        # A step divides by the number of steps for `LossContext.progress`.
        stage.steps,
        stage.batch_size,
        len(stage.teachers),
        stage.cache_teachers,
        stage.cache_top_k,
        stage.views,
        stage.augment is None,
        stage.init_loss is None,
    )


def _merge_equal(
    programs: Sequence[_Program], models: Mapping[str, Model], seed: int
) -> list[_Program]:
    """Merges programs whose lowered steps are equal."""
    if len(programs) == 1:
        return list(programs)
    by_digest: dict[str, _Program] = {}
    for program in programs:
        digest = _hash_step(program, models, seed)
        by_digest.setdefault(digest, program._replace(stages=[])).stages.extend(program.stages)
    return list(by_digest.values())


def _is_same_step(stage: Stage, other: Stage) -> bool:
    """Returns whether two stages differ only in what is not part of their step."""
    # Data act through their shapes, which the candidate key compares; `start` and `transfer` act
    # before the first step.
    ignored = {"name", "data", "start", "transfer"}
    names = {field.name for field in dataclasses.fields(Stage)} - ignored
    return all(getattr(stage, name) == getattr(other, name) for name in names)


def _step_maker(stage: Stage, models: Mapping[str, Model]) -> Callable[..., StepFn]:
    return functools.partial(
        make_train_step,
        stage.model,
        stage.tx,
        stage.loss,
        # Cached teachers are not run: their logits come with the batch.
        teachers=() if stage.cache_teachers else tuple(models[name] for name in stage.teachers),
        augment=stage.augment,
        views=stage.views,
        loss_tx=stage.loss_tx,
        num_steps=stage.steps,
    )


def _hash_step(program: _Program, models: Mapping[str, Model], seed: int) -> str:
    """Returns a digest of a step as it is lowered for its shapes, without compiling it."""
    stage = program.stages[0]
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = _batch_shapes(stage, seed)
    # Networks are initialised with one example, as `start_or_resume` does.
    example = jax.ShapeDtypeStruct((1, *batch["inputs"].shape[1:]), batch["inputs"].dtype)

    # Called with a real key, because a user's `init_loss` need not be traceable.
    loss_params = None if stage.init_loss is None else stage.init_loss(jax.random.key(0))

    def init_state(key: Any, inputs: Any) -> Any:
        variables = stage.model.init(key, inputs)
        return init_train_state(variables, stage.tx, loss_params=loss_params, loss_tx=stage.loss_tx)

    teachers = [models[name] for name in stage.teachers]
    teacher_variables = tuple(jax.eval_shape(teacher.init, key, example) for teacher in teachers)
    info = BatchInfo()
    if stage.views is not None:
        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        index = jax.ShapeDtypeStruct((stage.batch_size,), jnp.int32)
        info = BatchInfo(index, scalar, key)
    if stage.cache_teachers:
        logits = tuple(
            _cached_logits_shape(stage, teacher, variables, batch["inputs"])
            for teacher, variables in zip(teachers, teacher_variables, strict=True)
        )
        info = info._replace(teacher_logits=logits)
        teacher_variables = ()
    step: Any = program.make_step()
    state = jax.eval_shape(init_state, key, example)
    text = step.lower(state, batch, teacher_variables, key, info).as_text()
    # Host callbacks, and constants that JAX makes arguments, are not in the text. A stage that has
    # them shares with no other.
    if any(marker in text for marker in ("callback", "host_transfer", "jax.const")):
        text += stage.name
    return hashlib.sha256(text.encode()).hexdigest()


def _batch_shapes(stage: Stage, seed: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a step's batch. A Python number keeps its weak type."""
    shapes = {}
    for name, array in stage.examples(seed).items():
        shape = jax.eval_shape(jnp.asarray, array)
        if shape.ndim:
            shape = jax.ShapeDtypeStruct((stage.batch_size, *shape.shape[1:]), shape.dtype)
        shapes[name] = shape
    return shapes


def _cached_logits_shape(
    stage: Stage, teacher: Model, variables: Any, inputs: jax.ShapeDtypeStruct
) -> Any:
    def predict(variables: Any, inputs: Any) -> Any:
        logits = teacher.apply(variables, inputs, train=False)[0].logits.astype(jnp.float32)
        if stage.views is not None:
            # Only the shape counts here: `[B, V, ..., C]`, as `teacher_logits` returns it with
            # views.
            logits = jnp.repeat(logits[:, None], stage.views, axis=1)
        return logits if stage.cache_top_k is None else top_k(logits, k=stage.cache_top_k)

    return jax.eval_shape(predict, variables, inputs)


def _describe(stage: Stage, pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what identifies a training in JSON. The loss and the optimizer cannot be included."""
    description: dict[str, Any] = {
        "steps": stage.steps,
        "batch_size": stage.batch_size,
        "teachers": list(stage.teachers),
        "start": stage.start,
        "augment": stage.augment is not None,
        "cache_teachers": stage.cache_teachers,
    }
    # Left out where they are `None`, so that these options do not refuse older checkpoints.
    for name in ("views", "cache_top_k"):
        value = getattr(stage, name)
        if value is not None:
            description[name] = value
    if pretrained:
        description["pretrained"] = {
            # Weights that a user exchanges under the same name would otherwise go unnoticed.
            name: fingerprint(map(np.asarray, jax.tree.leaves(jax.device_get(variables))))
            for name, variables in pretrained.items()
        }
    return description
