"""The one loop that runs a plan.

A stage that is done is on disk and is not trained again; one that was cut off goes on from its newest sound checkpoint,
with the bits that an unbroken run would have had.
"""

import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkd import checkpoints
from jaxkd.batches import make_order, make_placer, take
from jaxkd.evaluate import accuracy, make_predict, summarize
from jaxkd.losses import hard_cross_entropy
from jaxkd.models.model import Model, Outputs
from jaxkd.plan import Stage, order
from jaxkd.runs import Run, RunError
from jaxkd.train import Loss, Purpose, TrainState, make_state, make_train_step

__all__ = ["Stage", "Trained", "measure", "run_plan"]

EVALUATIONS = 10
"""How often, evenly spread, a stage's student meets the validation split."""

SAVE_EVERY = 15.0
"""Seconds after which the next evaluation also saves a checkpoint."""


class Trained(NamedTuple):
    """What a stage left, for one seed.

    Attributes:
        variables: The final weights and statistics.
        seconds: Time it took to train, over all restarts.
        validation_accuracy: At the end, in [0, 1].
    """

    variables: dict
    seconds: float
    validation_accuracy: float


def run_plan(
    plan: Sequence[Stage], seeds: Iterable[int], run: Run, *, validation: Mapping[str, Any]
) -> dict[str, list[Trained]]:
    """Trains every stage of a plan for every seed, from where an earlier call on the same run left off.

    All draws of a stage derive from `jax.random.key(seed)` and the stage's name: stages may be added to a plan, and
    seeds to a run, without moving a bit of the others.

    Args:
        plan: The stages, in any order.
        seeds: One training of the whole plan for each.
        run: Takes the metrics and the checkpoints.
        validation: `inputs` and `labels`, on which each student is evaluated as it trains.

    Returns:
        For each stage's name, in the plan's order, what it left: one entry a seed.

    Raises:
        ValueError: If the plan is inconsistent.
        RunError: If a loss stops being finite.
        OSError: If the run's folder cannot be written.
    """
    stages, seeds, place = order(plan), list(seeds), make_placer()
    models = {stage.name: stage.model for stage in stages}
    trained: dict[str, list[Trained]] = {stage.name: [] for stage in plan}
    with _progress() as progress:
        whole = progress.add_task("all stages", total=len(seeds) * sum(stage.steps for stage in stages))
        ready = [_prepare(stage, [models[name] for name in stage.teachers], validation, place) for stage in stages]
        for seed in seeds:
            for one in ready:
                name = f"{one.stage.name}, seed {seed}"
                task = progress.add_task(name, total=one.stage.steps)

                def advance(steps: int, task: Any = task) -> None:
                    progress.advance(task, steps)
                    progress.advance(whole, steps)

                teachers = tuple(trained[teacher][-1].variables for teacher in one.stage.teachers)
                start = trained[one.stage.start][-1].variables if one.stage.start else None
                result, told = _train(one, seed, teachers, start, run, advance)
                trained[one.stage.name].append(result)
                progress.remove_task(task)
                progress.console.print(f"{name}: {told}", highlight=False)
    return trained


def measure(
    plan: Sequence[Stage], trained: Mapping[str, Sequence[Trained]], test: Mapping[str, Any], *, reference: str
) -> list[dict]:
    """Measures what a plan left on a test set.

    Args:
        plan: The stages.
        trained: What `run_plan` returned.
        test: `inputs` and `labels`.
        reference: Name of the stage with which agreement is measured, seed by seed.

    Returns:
        A row for each stage, in the plan's order, as `evaluate.summarize` makes them.
    """
    logits = {}
    for stage in plan:
        predict = make_predict(stage.model)
        logits[stage.name] = [predict(one.variables, test["inputs"]) for one in trained[stage.name]]
    return [
        summarize(
            stage.name,
            stage.model,
            [one.variables for one in trained[stage.name]],
            logits[stage.name],
            test["inputs"],
            test["labels"],
            reference_logits=None if stage.name == reference else logits[reference],
            seconds=[one.seconds for one in trained[stage.name]],
        )
        for stage in plan
    ]


class _Ready(NamedTuple):
    """A stage with its compiled functions and its data in place, for all seeds."""

    stage: Stage
    step: Callable[..., tuple[TrainState, dict[str, Array]]]
    init: Callable[..., dict]
    predict: Callable[..., np.ndarray]
    teacher_predicts: list[Callable[..., np.ndarray]]
    data: dict[str, Array]
    validation: Mapping[str, Any]


def _prepare(
    stage: Stage, teachers: Sequence[Model], validation: Mapping[str, Any], place: Callable[[Any], Array]
) -> _Ready:
    live, loss = (tuple(teachers), stage.loss) if not stage.cache_teachers else ((), _from_cache(stage.loss))
    return _Ready(
        stage,
        make_train_step(stage.model, stage.tx, loss, teachers=live, augment=stage.augment),
        jax.jit(stage.model.init),
        make_predict(stage.model),
        [make_predict(teacher) for teacher in teachers] if stage.cache_teachers else [],
        {name: place(array) for name, array in stage.data.items()},
        validation,
    )


def _train(
    ready: _Ready,
    seed: int,
    teachers: tuple[dict, ...],
    start: dict | None,
    run: Run,
    advance: Callable[[int], None],
) -> tuple[Trained, str]:
    """Trains one stage for one seed; returns what it left and a word on it."""
    stage, began = ready.stage, time.monotonic()
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.name.encode()))
    state, first, notes = _begin(ready, key, start, run.checkpoints(seed, stage.name))
    advance(first)
    if first == stage.steps:
        return Trained(state.variables, **notes), "already trained"
    run.rewind_metrics(seed, stage.name, first)

    data: dict[str, Any] = ready.data
    if stage.cache_teachers:
        predicted = zip(ready.teacher_predicts, teachers, strict=True)
        cache = tuple(jnp.asarray(predict(variables, stage.data["inputs"])) for predict, variables in predicted)
        data, teachers = data | {"teacher_logits": cache}, ()
    select = make_order(key, len(stage.data["inputs"]), stage.batch_size)
    evaluated = {-(-stage.steps * (i + 1) // EVALUATIONS) for i in range(EVALUATIONS)}
    before, saved, losses = notes["seconds"], began, []
    for number in range(first + 1, stage.steps + 1):
        state, metrics = ready.step(state, take(data, select(number - 1)), teachers, key)
        losses.append(metrics["loss"])
        advance(1)
        if number in evaluated:
            record = _evaluate(ready, seed, state, losses)
            losses = []
            # Before the checkpoint: a record ahead of the newest checkpoint is rewound, a missing one would be lost.
            run.append_metrics(record)
            if number == stage.steps or time.monotonic() - saved > SAVE_EVERY:
                saved = time.monotonic()
                notes = {"seconds": before + saved - began, "validation_accuracy": record["validation_accuracy"]}
                checkpoints.save(run.checkpoints(seed, stage.name), number, state, notes=notes)
    told = f"{notes['validation_accuracy']:.1%} on validation after {stage.steps} steps and {notes['seconds']:.1f} s"
    return Trained(state.variables, **notes), told + (f", resumed at step {first}" if first else "")


def _begin(ready: _Ready, key: Array, start: dict | None, folder: Any) -> tuple[TrainState, int, dict]:
    """The state to go on from, its step, and the notes that were saved with it."""
    variables = ready.init(jax.random.fold_in(key, Purpose.INIT), ready.data["inputs"][:1])
    if start is not None:
        _check_same_tree(ready.stage, start, variables)
        variables = start
    state = make_state(variables, ready.stage.tx)
    found = checkpoints.restore(folder, state)
    return (found.tree, found.step, found.notes) if found else (state, 0, {"seconds": 0.0})


def _evaluate(ready: _Ready, seed: int, state: TrainState, losses: list[Array]) -> dict:
    stage, number, loss = ready.stage, int(state.step), float(np.mean(jax.device_get(losses)))
    if not np.isfinite(loss):
        raise RunError(f"{stage.name}, seed {seed}: the loss is {loss} at step {number}; try a smaller learning rate")
    logits = ready.predict(state.variables, ready.validation["inputs"])
    return {
        "seed": seed,
        "stage": stage.name,
        "step": number,
        "epoch": number * stage.batch_size / len(stage.data["inputs"]),
        "loss": loss,
        "validation_loss": float(np.mean(hard_cross_entropy(logits, ready.validation["labels"]))),
        "validation_accuracy": accuracy(logits, ready.validation["labels"]),
    }


def _from_cache(loss: Loss) -> Loss:
    """The loss, given the teachers' outputs out of the batch."""
    return lambda student, _, batch: loss(student, tuple(Outputs(one, {}) for one in batch["teacher_logits"]), batch)


def _check_same_tree(stage: Stage, start: dict, fresh: dict) -> None:
    there, here = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (start, fresh)
    )
    differing = sorted(path for path in there.keys() | here.keys() if there.get(path) != here.get(path))
    if differing:
        listed = "; ".join(f"{path} is {there.get(path)} there and {here.get(path)} here" for path in differing)
        raise ValueError(f"stage {stage.name!r} cannot start from {stage.start!r}: {listed}")


def _progress() -> Any:
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    shown = progress.Progress(*columns)
    shown.disable = not shown.console.is_terminal
    return shown
