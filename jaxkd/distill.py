"""The one loop that runs a plan.

A stage that is done is on disk and is not trained again; one that was cut off goes on from its newest sound checkpoint,
with the bits that an unbroken run would have had.
"""

import functools
import itertools
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkd import checkpoints
from jaxkd.batches import make_order, make_placer
from jaxkd.evaluate import accuracy, make_predict, summarize
from jaxkd.losses import hard_cross_entropy
from jaxkd.models.model import Model, Outputs
from jaxkd.parallel import Advance, Mapped, Sharded, is_first_host, local, make_mesh, tell_all
from jaxkd.plan import Pretrained, Stage, order
from jaxkd.runs import Run, RunError, fingerprint
from jaxkd.train import Batch, Loss, Purpose, TrainState, make_state, make_train_step

__all__ = ["Pretrained", "Stage", "Trained", "results", "run_plan"]

EVALUATIONS = 10
"""How often, evenly spread, a stage's student meets the validation split."""


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
    plan: Sequence[Stage | Pretrained],
    seeds: Iterable[int],
    run: Run,
    *,
    validation: Mapping[str, Any],
    save_every: float = 15.0,
    devices: Sharded | Mapped | None = None,
) -> dict[str, list[Trained]]:
    """Trains every stage of a plan for every seed, from where an earlier call on the same run left off.

    All draws of a stage derive from `jax.random.key(seed)` and the stage's name: stages may be added to a plan, and
    seeds to a run, without moving a bit of the others.

    Args:
        plan: The stages and pretrained models, in any order.
        seeds: One training of the whole plan for each.
        run: Takes the metrics and the checkpoints.
        validation: `inputs` and `labels`, on which each student is evaluated as it trains.
        save_every: Seconds between checkpoints within a stage. One is also saved at its end and on Ctrl-C.
        devices: Where it runs; by default on the first device alone. A run may go on on others.

    Returns:
        For each name, in the plan's order, what it left, a pretrained model what it came with: one entry a seed.

    Raises:
        ValueError: If the plan is inconsistent.
        RunError: If a loss stops being finite, or the run holds checkpoints of another plan.
        OSError: If the run's folder cannot be written.
    """
    stages = [one for one in order(plan) if isinstance(one, Stage)]
    seeds, devices = list(seeds), devices or Sharded(make_mesh(devices=jax.local_devices()[:1]))
    models = {one.name: one.model for one in plan}
    given = {one.name: one.variables for one in plan if isinstance(one, Pretrained)}
    predicts = _make_predicts(plan, devices)
    trained: dict[str, list[Trained]] = {one.name: [] for one in plan}
    for one in plan:
        if isinstance(one, Pretrained):
            trained[one.name] = [_as_given(one, predicts[one.name], validation)] * len(seeds)
    with _progress() as progress:
        whole = progress.add_task("all stages", total=len(seeds) * sum(stage.steps for stage in stages))
        remembering = {name: _remember_last(predict) for name, predict in predicts.items()}
        inits = {model: jax.jit(model.init) for model in models.values()}
        ready = [_prepare(stage, models, inits, predicts, remembering, given, validation, devices) for stage in stages]
        for seed in seeds:
            place = make_placer(devices.place_examples)
            for one in ready:
                name = f"{one.stage.name}, seed {seed}"
                task = progress.add_task(name, total=one.stage.steps)

                def advance(steps: int, task: Any = task) -> None:
                    progress.advance(task, steps)
                    progress.advance(whole, steps)

                latest = {name: trained[name][-1].variables for name in one.stage.needs}
                teachers = tuple(latest[teacher] for teacher in one.stage.teachers)
                start = latest[one.stage.start] if one.stage.start else None
                result, told = _train(one, seed, teachers, start, run, place, save_every, advance)
                trained[one.stage.name].append(result)
                progress.remove_task(task)
                progress.console.print(f"{name}: {told}", highlight=False, markup=False)
    return trained


def results(
    plan: Sequence[Stage | Pretrained],
    trained: Mapping[str, Sequence[Trained]],
    test: Mapping[str, Any],
    *,
    reference: str,
) -> list[dict]:
    """Measures what a plan left on a test set.

    Args:
        plan: The stages and pretrained models.
        trained: What `run_plan` returned.
        test: `inputs` and `labels`.
        reference: Name of the one with which agreement is measured, seed by seed.

    Returns:
        A row for each of them, in the plan's order, as `evaluate.summarize` makes them.
    """
    logits = {}
    for name, predict in _make_predicts(plan, None).items():
        remembering = _remember_last(predict)
        logits[name] = [np.asarray(remembering(one.variables, test["inputs"])) for one in trained[name]]
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
    """A stage with its compiled functions, for all seeds."""

    stage: Stage
    devices: Sharded | Mapped
    advance: Advance
    init: Callable[..., dict]
    predict: Callable[..., np.ndarray]
    teacher_predicts: list[Callable[..., Array]]
    validation: Mapping[str, Any]
    fingerprint: dict[str, Any]


def _prepare(
    stage: Stage,
    models: Mapping[str, Model],
    inits: Mapping[Model, Callable[..., dict]],
    predicts: Mapping[str, Callable[..., np.ndarray]],
    remembering: Mapping[str, Callable[..., Array]],
    given: Mapping[str, Any],
    validation: Mapping[str, Any],
    devices: Sharded | Mapped,
) -> _Ready:
    teachers = [models[name] for name in stage.teachers]
    live, loss = (tuple(teachers), stage.loss) if not stage.cache_teachers else ((), _from_cache(stage.loss))
    make_step = functools.partial(
        make_train_step, stage.model, stage.tx, loss, teachers=live, augment=stage.augment, loss_tx=stage.loss_tx
    )
    return _Ready(
        stage,
        devices,
        devices.make_advance(make_step),
        inits[stage.model],
        predicts[stage.name],
        [remembering[name] for name in stage.teachers] if stage.cache_teachers else [],
        validation,
        _describe(stage, {name: given[name] for name in stage.needs if name in given}),
    )


def _make_predicts(
    plan: Sequence[Stage | Pretrained], devices: Sharded | Mapped | None
) -> dict[str, Callable[..., np.ndarray]]:
    """A predict for each, one and the same for those of one model, which compile once."""

    @functools.cache
    def make(model: Model) -> Callable[..., np.ndarray]:
        if not isinstance(devices, Sharded):
            return make_predict(model)
        predict = make_predict(model, mesh=devices.mesh)
        return lambda variables, inputs: predict(devices.place_teacher(variables), inputs)

    return {one.name: make(one.model) for one in plan}


def _remember_last(predict: Callable[..., np.ndarray]) -> Callable[..., Array]:
    """Predicts anew only for other weights or inputs: stages and seeds that share both share the answer."""
    last: list[Any] = [None, None, None]

    def remembered(variables: dict, inputs: Any) -> Array:
        if last[0] is not variables or last[1] is not inputs:
            last[:] = variables, inputs, jnp.asarray(predict(variables, inputs))
        return last[2]

    return remembered


def _as_given(one: Pretrained, predict: Callable[..., np.ndarray], validation: Mapping[str, Any]) -> Trained:
    variables = dict(one.variables)
    logits = predict(variables, validation["inputs"])
    return Trained(variables, 0.0, accuracy(logits, validation["labels"]))


def _train(
    ready: _Ready,
    seed: int,
    teachers: tuple[dict, ...],
    start: dict | None,
    run: Run,
    place: Callable[[Any], Array],
    save_every: float,
    advance: Callable[[int], None],
) -> tuple[Trained, str]:
    """Trains one stage for one seed; returns what it left and a word on it."""
    stage, folder, began = ready.stage, run.checkpoints(seed, ready.stage.name), time.monotonic()
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.name.encode()))
    examples = stage.examples(seed)
    state, first, notes = _begin(ready, key, start, examples["inputs"], folder)
    advance(first)
    run.rewind_metrics(seed, stage.name, first)
    if first == stage.steps:
        return _finished(stage, seed, state, notes, run), "already trained"

    data: dict[str, Any] = {name: place(array) for name, array in examples.items()}
    if stage.cache_teachers:
        predicted = zip(ready.teacher_predicts, teachers, strict=True)
        cache = tuple(place(predict(variables, examples["inputs"])) for predict, variables in predicted)
        data, teachers = data | {"teacher_logits": cache}, ()
    state, teachers = ready.devices.place(state), ready.devices.place_teacher(teachers)
    select = make_order(key, len(examples["inputs"]), stage.batch_size)
    evaluated = {-(-stage.steps * (i + 1) // EVALUATIONS) for i in range(EVALUATIONS)}
    stops = sorted({*evaluated, *range(0, stage.steps, ready.devices.chunk)})
    before, saved, reached = notes["seconds"], began, notes["validation_accuracy"]
    losses: list[Any] = [np.array(notes["losses"], np.float32)]

    def save(number: int) -> float:
        seconds = before + time.monotonic() - began
        # The losses since the last evaluation go along, so that the next record is that of an unbroken run.
        so_far = np.concatenate(jax.device_get(losses)).tolist()
        noted = {"seconds": seconds, "losses": so_far, "stage": ready.fingerprint, "validation_accuracy": reached}
        if is_first_host():
            checkpoints.save(folder, number, jax.device_get(local(state)), notes=noted)
        return seconds

    try:
        for begin, number in itertools.pairwise([first, *(stop for stop in stops if stop > first)]):
            indices = np.stack([select(step) for step in range(begin, number)])
            state, values = ready.advance(state, data, indices, teachers, key)
            losses.append(values)
            advance(number - begin)
            if number in evaluated:
                # Before the checkpoint: a record ahead of the newest one is rewound, a missing one would be lost.
                record = _evaluate(ready, seed, state, losses, len(examples["inputs"]))
                run.append_metrics(record)
                reached = record["validation_accuracy"]
                losses = [np.empty(0, np.float32)]
            if number == stage.steps or time.monotonic() - saved > save_every:
                notes, saved = notes | {"seconds": save(number), "validation_accuracy": reached}, time.monotonic()
    except KeyboardInterrupt:
        _save_if_whole(state, losses, evaluated, save)
        raise
    trained = _finished(stage, seed, state, notes, run)
    told = f"{trained.validation_accuracy:.1%} on validation after {stage.steps} steps and {trained.seconds:.1f} s"
    return trained, told + (f", resumed at step {first}" if first else "")


def _begin(
    ready: _Ready, key: Array, start: dict | None, inputs: Array, folder: Path
) -> tuple[TrainState, int, dict[str, Any]]:
    """The state to go on from, its step, and the notes that were saved with it."""
    stage = ready.stage
    variables = ready.init(jax.random.fold_in(key, Purpose.INIT), inputs[:1])
    if start is not None:
        start = start if stage.transfer is None else stage.transfer(start, variables)
        _check_same_tree(stage, start, variables)
        variables = start
    loss_params = None if stage.init_loss is None else stage.init_loss(jax.random.fold_in(key, Purpose.LOSS))
    state = make_state(variables, stage.tx, loss_params=loss_params, loss_tx=stage.loss_tx)
    try:
        found = checkpoints.restore(folder, state) if is_first_host() else None
    except ValueError as error:
        raise RunError(f"{error}: it belongs to another plan; name another folder for the run") from error
    notes: dict[str, Any] = {"step": 0, "seconds": 0.0, "losses": [], "validation_accuracy": None}
    if found is not None:
        notes, state = notes | found.notes | {"step": found.step}, found.tree
    notes, state = tell_all(notes, state)
    if notes["step"] and notes["stage"] != ready.fingerprint:
        raise RunError(
            f"{folder} holds another training ({notes['stage']} there, {ready.fingerprint} here): "
            "name another folder for the run"
        )
    return jax.tree.map(jnp.asarray, state), notes["step"], notes


def _describe(stage: Stage, given: Mapping[str, Any]) -> dict[str, Any]:
    """What can be told of a stage in JSON; the rest of it, such as the learning rate, is for the run's config."""
    told = {
        "steps": stage.steps,
        "batch_size": stage.batch_size,
        "teachers": list(stage.teachers),
        "start": stage.start,
        "augment": stage.augment is not None,
        "cache_teachers": stage.cache_teachers,
    }
    weights = {name: fingerprint(jax.tree.leaves(jax.device_get(variables))) for name, variables in given.items()}
    return told | ({"pretrained": weights} if given else {})


def _finished(stage: Stage, seed: int, state: TrainState, notes: Mapping[str, Any], run: Run) -> Trained:
    records = {(record["seed"], record["stage"], record["step"]) for record in run.metrics()}
    if is_first_host() and (seed, stage.name, stage.steps) not in records:
        raise RunError(
            f"{run.folder}/metrics.jsonl has lost the records of {stage.name}, seed {seed}: "
            f"delete {run.checkpoints(seed, stage.name)} to train it anew"
        )
    return Trained(local(state.variables), notes["seconds"], notes["validation_accuracy"])


def _save_if_whole(state: TrainState, losses: Sequence[Any], evaluated: set[int], save: Callable[[int], Any]) -> None:
    """Saves where Ctrl-C left a training, unless it fell into a step, whose state is then gone."""
    if state.step.is_deleted():
        return
    number = int(state.step)
    if number and sum(map(len, losses)) == number - max((one for one in evaluated if one <= number), default=0):
        save(number)


def _evaluate(ready: _Ready, seed: int, state: TrainState, losses: Sequence[Any], examples: int) -> dict[str, Any]:
    stage, number = ready.stage, int(state.step)
    loss = float(np.mean(np.concatenate(jax.device_get(losses))))
    logits = ready.predict(local(state.variables), ready.validation["inputs"])
    if not np.isfinite(loss) or not np.isfinite(logits).all():
        raise RunError(
            f"{stage.name}, seed {seed}: the loss is {loss} by step {number}, and training has diverged; "
            "try a smaller learning rate"
        )
    return {
        "seed": seed,
        "stage": stage.name,
        "step": number,
        "epoch": number * stage.batch_size / examples,
        "loss": loss,
        "validation_loss": float(np.mean(hard_cross_entropy(logits, ready.validation["labels"]))),
        "validation_accuracy": accuracy(logits, ready.validation["labels"]),
    }


def _from_cache(loss: Loss) -> Loss:
    """The loss, given the teachers' outputs out of the batch."""

    def cached(student: Outputs, _: tuple[Outputs, ...], batch: Batch, *loss_params: Any) -> Array:
        return loss(student, tuple(Outputs(one, {}) for one in batch["teacher_logits"]), batch, *loss_params)

    return cached


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
    shown.console.quiet = not is_first_host()
    return shown
