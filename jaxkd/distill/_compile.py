"""Compiles the stages of a plan. Stages whose steps are the same program share it."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxkd._messages import list_some, shorten
from jaxkd.data.bucketing import LengthBuckets, check_one_array, token_lengths
from jaxkd.distill._cached_outputs import CachedParts, select_outputs
from jaxkd.distill._diagnosis import count_classes
from jaxkd.distill._lowering import (
    LoweredStep,
    batch_shapes,
    check_draws,
    depends_on_num_steps,
    find_unmixed,
    hash_predict,
    lower_step,
    variables_shape,
)
from jaxkd.distill._multi_step import MultiStep
from jaxkd.distill.placement import Placement
from jaxkd.distill.plan import AVERAGE, Entry, Pretrained, Stage, input_shapes, needed_stages
from jaxkd.distill.step import StepFn, make_train_step
from jaxkd.runs import fingerprint


class CompiledStage(NamedTuple):
    """A stage with its compiled functions, for all seeds.

    Attributes:
        stage: The stage.
        multi_step: Takes steps. Stages with the same program have the identical function.
        init: `(key, inputs) -> variables`.
        needed_stages: Names of the stages that it learns or starts from, also through derived
            models.
        fingerprint: JSON values that identify the training, whatever the seed. A checkpoint with
            others is refused.
        lowered: Its lowered step.
        find_program: `steps -> digest`: the digest of the program if the training had as many
            steps, or `None` if the steps depend on their number otherwise than by the program.
    """

    stage: Stage
    multi_step: MultiStep
    init: Callable[..., dict]
    needed_stages: frozenset[str]
    fingerprint: dict[str, Any]
    lowered: LoweredStep
    find_program: Callable[[int], str | None]


class _Program(NamedTuple):
    """Stages whose steps are the same program.

    Attributes:
        stages: The stages.
        make_step: Makes the step of the first one.
        lowered: The lowered step; `None` until it is needed.
    """

    stages: list[Stage]
    make_step: Callable[..., StepFn]
    lowered: LoweredStep | None = None


def compile_stages(
    plan: Sequence[Entry],
    seed: int,
    placement: Placement,
    buckets: LengthBuckets | None = None,
    *,
    evaluations: int = 1,
) -> list[CompiledStage]:
    """Makes the compiled functions of all stages of a plan.

    Every program is lowered once, without compiling it, for the digest by which a checkpoint knows
    its program.

    Args:
        plan: The stages and pretrained models, sorted.
        seed: A seed whose examples have the shapes of every seed's.
        placement: Where the stages train.
        buckets: The lengths to which batches of tokens are cut.
        evaluations: Number of evaluations of each stage.

    Returns:
        The stages in the order of the plan.
    """
    entries = {entry.name: entry for entry in plan}
    pretrained = {entry.name: entry.variables for entry in plan if isinstance(entry, Pretrained)}
    # Computed once for all stages that share a teacher.
    hash_weights = functools.cache(lambda name: _hash_weights(pretrained[name]))
    # Jitted once per model: a new `jax.jit` for each stage would compile the same program again.
    models = {entry.model for entry in plan}
    inits = {model: jax.jit(model.init) for model in models}
    digests: dict[tuple[str, str, CachedParts | None], str] = {}

    def hash_teacher(name: str, example: Any, parts: CachedParts) -> str:
        key = name, str(example), None if parts.are_logits else parts
        if key not in digests:
            digests[key] = hash_predict(entries[name], example, key[-1])
        return digests[key]

    for entry in plan:
        if isinstance(entry, Stage):
            check_draws(entry, seed)
    compiled = {}
    for program in _find_programs(plan, seed):
        multi_step = placement.make_multi_step(program.make_step)
        lowered = program.lowered or lower_step(program.stages[0], program.make_step, entries, seed)
        for stage in program.stages:
            for number in lowered.unused_teachers:
                warnings.warn(
                    f"stage {shorten(stage.name, 40)!r} names the teacher "
                    f"{shorten(stage.teachers[number], 40)!r}, but its loss does not depend on it: "
                    f"read teachers[{number}] in the loss, or leave the name out",
                    stacklevel=3,
                )
            if unmixed := find_unmixed(stage, entries, seed):
                warnings.warn(
                    f"the loss of stage {shorten(stage.name, 40)!r} reads {list_some(unmixed)} as "
                    "if its augment did not mix the inputs: mix them by context.mix, as "
                    "data.mix_labels does",
                    stacklevel=3,
                )
            weights = {name: hash_weights(name) for name in stage.needs if name in pretrained}
            compiled[stage.name] = CompiledStage(
                stage,
                multi_step,
                inits[stage.model],
                frozenset(needed_stages(entries, stage.name)),
                _describe(stage, weights)
                | {"program": lowered.digest}
                | _describe_best(stage, evaluations)
                | _describe_batches(stage, seed, buckets, hash_teacher),
                lowered,
                functools.partial(_find_program, stage, entries, seed),
            )
    return [compiled[entry.name] for entry in plan if entry.name in compiled]


def check_buckets(
    plan: Sequence[Entry],
    seed: int,
    buckets: LengthBuckets,
    validation_inputs: Any,
    *,
    scores_classes: bool,
) -> None:
    """Checks that buckets hold every text, and logits that are joined have one shape in all.

    Args:
        plan: The stages and pretrained models.
        seed: A seed whose examples have the shapes of every seed's.
        buckets: The lengths to which tokens are cut.
        validation_inputs: `[N, ..., S]`.
        scores_classes: Whether the logits of the validation split are joined.

    Raises:
        ValueError: If the inputs are a dict, a text is longer than the last bucket, or there are
            logits of each token, whose number is the bucket length.
    """
    check_one_array(validation_inputs)
    all_inputs = [stage.examples(seed)["inputs"] for stage in plan if isinstance(stage, Stage)]
    if scores_classes:
        all_inputs.append(validation_inputs)
    for tokens in all_inputs:
        buckets.choose(int(token_lengths(tokens).max(initial=0)))
    entries = {entry.name: entry for entry in plan}
    results: dict[Any, str] = {}

    def find_token_outputs(entry: Entry, inputs: Any, parts: CachedParts) -> str:
        # Entries may share a model, which is then traced once.
        key = entry.model, inputs.shape[1:], inputs.dtype, parts
        if key not in results:
            results[key] = _find_token_outputs(entry, inputs, buckets, parts)
        return results[key]

    for entry in plan:
        if scores_classes and find_token_outputs(entry, validation_inputs, CachedParts()):
            raise ValueError(
                f"{entry.name!r} has logits of each token, which buckets cut to several lengths: "
                "pass a make_score, or no buckets"
            )
        if not isinstance(entry, Stage) or not entry.cache_teachers:
            continue
        inputs = entry.examples(seed)["inputs"]
        # Their own average cannot be cached.
        for name in entry.teachers:
            if found := find_token_outputs(entries[name], inputs, entry.cached_parts):
                raise ValueError(
                    f"stage {entry.name!r} caches {found} of each token of {name!r}, which buckets "
                    "cut to several lengths: drop cache_teachers or the buckets"
                )


def _find_token_outputs(
    entry: Entry, inputs: Any, buckets: LengthBuckets, parts: CachedParts
) -> str:
    """Returns which outputs of an example have a shape that depends on the bucket length."""

    def predict(variables: Any, inputs: Any) -> Any:
        outputs = entry.model.apply(variables, inputs, train=False)[0]
        return select_outputs(outputs, parts, owner=f"teacher {shorten(entry.name, 40)!r}")

    def at_length(length: int) -> Any:
        dtype = jax.dtypes.canonicalize_dtype(inputs.dtype)
        return jax.ShapeDtypeStruct((1, *inputs.shape[1:-1], length), dtype)

    variables = variables_shape(entry, at_length(inputs.shape[-1]))
    shortest, longest = (
        jax.eval_shape(predict, variables, at_length(length))
        for length in (buckets.lengths[0], buckets.lengths[-1])
    )
    if shortest.logits != longest.logits:
        return "logits"
    for name in parts.features:
        if shortest.features[name] != longest.features[name]:
            return f"{name!r:.60}"
    return ""


def group_by_program(plan: Sequence[Entry], seed: int = 0) -> list[list[Stage]]:
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


def _find_programs(plan: Sequence[Entry], seed: int) -> list[_Program]:
    entries = {entry.name: entry for entry in plan}
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
            programs.append(_Program([entry], _step_maker(entry, entries, seed)))
    return [
        program
        for programs in candidates.values()
        for program in _merge_equal(programs, entries, seed)
    ]


def _candidate_key(stage: Stage, seed: int) -> tuple:
    """Returns attributes that are equal for all stages of one program."""
    batch = batch_shapes(stage, seed)
    # Sets of names, shapes and dtypes: the order of a batch's arrays does not change the program. A
    # Python number (weak type) promotes in another way than an array.
    return (
        stage.model,
        frozenset(
            (jax.tree_util.keystr(path), x.shape, x.dtype, x.weak_type)
            for path, x in jax.tree_util.tree_leaves_with_path(batch)
        ),
        # A step divides by the number of steps for `LossContext.progress`.
        stage.steps,
        stage.batch_size,
        len(stage.teachers),
        stage.cache_teachers,
        stage.cached_parts,
        stage.views,
        stage.rewrite is None,
        stage.augment is None,
        stage.init_loss is None,
        stage.ema_decay,
    )


def _merge_equal(
    programs: Sequence[_Program], entries: Mapping[str, Entry], seed: int
) -> list[_Program]:
    """Merges programs whose lowered steps are equal."""
    if len(programs) == 1:
        return list(programs)
    by_digest: dict[str, _Program] = {}
    for program in programs:
        lowered = lower_step(program.stages[0], program.make_step, entries, seed)
        merged = by_digest.setdefault(lowered.digest, program._replace(stages=[], lowered=lowered))
        merged.stages.extend(program.stages)
    return list(by_digest.values())


def _is_same_step(stage: Stage, other: Stage) -> bool:
    """Returns whether two stages differ only in what is not part of their step."""
    # Data act through their shapes, which the candidate key compares; `start` and `transfer` act
    # before the first step, `best` after an evaluation.
    ignored = {"name", "key_name", "data", "start", "transfer", "best"}
    names = {field.name for field in dataclasses.fields(Stage)} - ignored
    return all(getattr(stage, name) == getattr(other, name) for name in names)


def _step_maker(stage: Stage, entries: Mapping[str, Entry], seed: int) -> Callable[..., StepFn]:
    models = [stage.model if name == AVERAGE else entries[name].model for name in stage.teachers]
    cached_num_classes = None
    if stage.cache_top_k is not None:
        inputs = stage.examples(seed)["inputs"]
        cached_num_classes = [count_classes(model, inputs) for model in models]
    return functools.partial(
        make_train_step,
        stage.model,
        stage.tx,
        stage.loss,
        # Cached teachers are not run: their logits come with the batch.
        teachers=() if stage.cache_teachers else tuple(models),
        rewrite=stage.rewrite,
        augment=stage.augment,
        views=stage.views,
        loss_tx=stage.loss_tx,
        num_steps=stage.steps,
        cached_num_classes=cached_num_classes,
        ema_decay=stage.ema_decay,
    )


def _find_program(stage: Stage, entries: Mapping[str, Entry], seed: int, steps: int) -> str | None:
    """Returns the digest of a stage's program with another number of steps; see `CompiledStage`."""
    make_step = _step_maker(stage, entries, seed)
    if depends_on_num_steps(stage, make_step, entries, seed):
        return None
    make_shorter = functools.partial(make_step, num_steps=steps)
    return lower_step(stage, make_shorter, entries, seed).digest


def _describe(stage: Stage, pretrained: Mapping[str, str]) -> dict[str, Any]:
    """Returns what identifies a training in JSON, without its program.

    Args:
        stage: The stage.
        pretrained: The digests of the pretrained weights that it needs.
    """
    description: dict[str, Any] = {
        "steps": stage.steps,
        "batch_size": stage.batch_size,
        "teachers": list(stage.teachers),
        "start": stage.start,
        "augment": stage.augment is not None,
        "cache_teachers": stage.cache_teachers,
    }
    # Left out where they are `None`, so that these options do not refuse older checkpoints.
    for name in ("views", "cache_top_k", "ema_decay", "key_name"):
        value = getattr(stage, name)
        if value is not None:
            description[name] = dict(value) if isinstance(value, Mapping) else value
    if stage.rewrite is not None:
        description["rewrite"] = True
    if stage.cache_teachers:
        description |= {f"cache_{k}": v for k, v in stage.cached_parts.describe().items()}
    if pretrained:
        # Weights that a user exchanges under the same name would otherwise go unnoticed.
        description["pretrained"] = dict(pretrained)
    return description


def _describe_best(stage: Stage, evaluations: int) -> dict[str, Any]:
    """Returns what decides which weights a stage returns, in JSON."""
    if stage.best is None:
        return {}
    order = {True: "largest ", False: "smallest ", None: ""}[stage.best.largest]
    patience = "" if stage.best.patience is None else f", patience {stage.best.patience}"
    # Others would be evaluated if the training were longer, so that it cannot go on.
    when = f"{min(evaluations, stage.steps)} evaluations in {stage.steps} steps"
    return {"best": f"{order}{stage.best.score} of {when}{patience}"}


def _describe_batches(
    stage: Stage, seed: int, buckets: LengthBuckets | None, hash_teacher: Callable[..., str]
) -> dict[str, Any]:
    """Returns what a step reads but does not compute: cached teachers and the cut of its tokens."""
    description: dict[str, Any] = {}
    if buckets is not None:
        description["buckets"] = list(buckets.lengths)
    if stage.cache_teachers:
        example = input_shapes(stage.examples(seed)["inputs"])
        # Their program is not part of the step.
        description["cached_teachers"] = [
            hash_teacher(name, example, stage.cached_parts) for name in stage.teachers
        ]
    return description


def _hash_weights(variables: Any) -> str:
    return fingerprint(map(np.asarray, jax.tree.leaves(jax.device_get(variables))))
