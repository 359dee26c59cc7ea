"""The one loop that runs a plan.

A stage that is done is on disk and is not trained again; one that was cut off goes on from its newest sound checkpoint,
with the bits that an unbroken run would have had.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
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
from jaxkd.cache import TopK, Views, expand, teacher_logits
from jaxkd.evaluate import accuracy, make_predict, summarize
from jaxkd.losses import hard_cross_entropy
from jaxkd.models.model import Model, Outputs
from jaxkd.parallel import Advance, Mapped, Population, Sharded, is_first_host, local, make_mesh, tell_all
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
        seconds: Time it took to train, over all restarts; where several trained at once, its part of theirs.
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
    devices: Sharded | Mapped | Population | None = None,
    teacher_cache: str | os.PathLike | None = None,
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
        devices: Where it runs, and how many at once; by default one student after another on the first device. A run
            may go on on others. A `Population` takes together the seeds, and the stages that differ in name and data
            alone.
        teacher_cache: Folder in which the logits of cached teachers are kept, for other runs as well; by default the
            run's own.

    Returns:
        For each name, in the plan's order, what it left, a pretrained model what it came with: one entry a seed.

    Raises:
        ValueError: If the plan is inconsistent.
        RunError: If a loss stops being finite, or the run holds checkpoints of another plan.
        OSError: If the run's folder cannot be written.
    """
    stages = [one for one in order(plan) if isinstance(one, Stage)]
    seeds, devices = list(seeds), devices or Sharded(make_mesh(devices=jax.local_devices()[:1]))
    given = {one.name: one.variables for one in plan if isinstance(one, Pretrained)}
    predicts = _make_predicts(plan, devices)
    trained: dict[str, dict[int, Trained]] = {one.name: {} for one in plan}
    for one in plan:
        if isinstance(one, Pretrained):
            trained[one.name] = dict.fromkeys(seeds, _as_given(one, predicts[one.name], validation))
    models = {one.name: one.model for one in plan}
    kept = run.folder / "teachers" if teacher_cache is None else Path(teacher_cache)
    answers = _make_answers(models, predicts, kept)
    ready = _prepare(stages, models, predicts, answers, given, validation, devices)
    with _progress() as progress:
        whole = progress.add_task("all stages", total=len(seeds) * sum(stage.steps for stage in stages))
        for turn in _turns(ready, seeds, devices):
            place = make_placer(_putting(devices))
            for students in turn:
                for together in _level([_begin(one, seed, trained, run) for one, seed in students]):
                    task = progress.add_task(_names(together), total=together[0].ready.stage.steps)

                    def advance(steps: int, task: Any = task, count: int = len(together)) -> None:
                        progress.advance(task, steps)
                        progress.advance(whole, count * steps)

                    for one, result in zip(together, _train(together, run, place, save_every, advance), strict=True):
                        trained[one.ready.stage.name][one.seed] = result
                        told = f"{_names([one])}: {_outcome(one, result)}"
                        progress.console.print(told, highlight=False, markup=False)
                    progress.remove_task(task)
    return {name: [results[seed] for seed in seeds] for name, results in trained.items()}


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
        logits[name] = [remembering(one.variables, test["inputs"]) for one in trained[name]]
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
    devices: Sharded | Mapped | Population
    advance: Advance
    init: Callable[..., dict]
    predict: Callable[..., np.ndarray]
    answers: Mapping[str, Callable[..., Any]]
    validation: Mapping[str, Any]
    fingerprint: dict[str, Any]


class _Training(NamedTuple):
    """One stage for one seed, as it stands before its next step."""

    ready: _Ready
    seed: int
    key: Array
    view_key: Array
    examples: Mapping[str, Any]
    teachers: tuple[dict, ...]
    state: TrainState
    notes: dict[str, Any]
    folder: Path


def _prepare(
    stages: Sequence[Stage],
    models: Mapping[str, Model],
    predicts: Mapping[str, Callable[..., np.ndarray]],
    answers: Mapping[str, Callable[..., Any]],
    given: Mapping[str, Any],
    validation: Mapping[str, Any],
    devices: Sharded | Mapped | Population,
) -> list[_Ready]:
    """The stages with their compiled functions, the same ones for all that differ in name and data alone."""
    inits = {model: jax.jit(model.init) for model in models.values()}
    prepared: list[_Ready] = []
    for stage in stages:
        told = _describe(stage, {name: given[name] for name in stage.needs if name in given})
        alike = next((one for one in prepared if _alike(one.stage, stage)), None)
        if alike is not None:
            prepared.append(alike._replace(stage=stage, predict=predicts[stage.name], fingerprint=told))
            continue
        advance = devices.make_advance(_step_maker(stage, tuple(models[name] for name in stage.teachers)))
        predict, init = predicts[stage.name], inits[stage.model]
        prepared.append(_Ready(stage, devices, advance, init, predict, answers, validation, told))
    return prepared


def _alike(stage: Stage, other: Stage) -> bool:
    names = {field.name for field in dataclasses.fields(Stage)} - {"name", "data"}
    return all(getattr(stage, name) == getattr(other, name) for name in names)


def _step_maker(stage: Stage, teachers: tuple[Model, ...]) -> Callable[..., Any]:
    live, loss = (teachers, stage.loss) if not stage.cache_teachers else ((), _from_cache(stage.loss))
    return functools.partial(
        make_train_step,
        stage.model,
        stage.tx,
        loss,
        teachers=live,
        augment=stage.augment,
        views=stage.views,
        loss_tx=stage.loss_tx,
    )


def _turns(
    ready: Sequence[_Ready], seeds: Sequence[int], devices: Sharded | Mapped | Population
) -> list[list[list[tuple[_Ready, int]]]]:
    """Who trains when: turns, within which arrays stay on the devices, of students that train at once."""
    if not isinstance(devices, Population):
        return [[[(one, seed)] for one in ready] for seed in seeds]
    groups: dict[Any, list[_Ready]] = {}
    for one in ready:
        groups.setdefault((one.advance, _shapes(one.stage.examples(seeds[0]))), []).append(one)
    # Seeds first: what a seed's teacher says is remembered from one of its students to the next.
    students = [[(one, seed) for seed in seeds for one in group] for group in groups.values()]
    return [[each[i : i + devices.size] for i in range(0, len(each), devices.size)] for each in students]


def _shapes(examples: Mapping[str, Any]) -> frozenset[tuple]:
    return frozenset((name, jnp.shape(array), jnp.result_type(array)) for name, array in examples.items())


def _level(begun: Sequence[_Training]) -> list[list[_Training]]:
    """Those that stand at one step together: a kill between two saves leaves some behind."""
    steps = sorted({one.notes["step"] for one in begun})
    return [[one for one in begun if one.notes["step"] == step] for step in steps]


def _names(together: Sequence[_Training]) -> str:
    first = f"{together[0].ready.stage.name}, seed {together[0].seed}"
    return first if len(together) == 1 else f"{first}, and {len(together) - 1} more at once"


def _outcome(one: _Training, result: Trained) -> str:
    stage, first = one.ready.stage, one.notes["step"]
    if first == stage.steps:
        return "already trained"
    told = f"{result.validation_accuracy:.1%} on validation after {stage.steps} steps and {result.seconds:.1f} s"
    return told + (f", resumed at step {first}" if first else "")


def _putting(devices: Sharded | Mapped | Population) -> Callable[[Any], Array]:
    return jnp.asarray if isinstance(devices, Population) else devices.place_examples


def _make_predicts(
    plan: Sequence[Stage | Pretrained], devices: Sharded | Mapped | Population | None
) -> dict[str, Callable[..., np.ndarray]]:
    """A predict for each, one and the same for those of one model, which compile once."""

    @functools.cache
    def make(model: Model) -> Callable[..., np.ndarray]:
        if not isinstance(devices, Sharded):
            return make_predict(model)
        predict = make_predict(model, mesh=devices.mesh)
        return lambda variables, inputs: predict(devices.place_teacher(variables), inputs)

    return {one.name: make(one.model) for one in plan}


def _remember_last(function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls a function anew only for other arguments: who shares them shares the answer."""
    last: list[Any] = []

    def remembered(*arguments: Any) -> Any:
        if not last or any(one is not other for one, other in zip(last[0], arguments, strict=True)):
            last[:] = arguments, function(*arguments)
        return last[1]

    return remembered


def _make_answers(
    models: Mapping[str, Model], predicts: Mapping[str, Callable[..., np.ndarray]], folder: Path
) -> dict[str, Callable[..., Any]]:
    """What says a teacher's logits, kept on disk, and the last in memory, for stages and seeds that share them."""
    # Several hosts predict together, which those could not that found an answer on a disk of their own.
    kept = {"folder": folder if jax.process_count() == 1 else None}

    def make(name: str) -> Callable[..., Any]:
        def answer(variables: dict, inputs: Any, augment: Any, count: int | None, key: Any, top_k: int | None) -> Any:
            views = None if count is None else Views(augment, key, count)
            notes = {"program": _program(models[name], variables, inputs)}
            return teacher_logits(predicts[name], variables, inputs, views=views, top_k=top_k, notes=notes, **kept)

        return _remember_last(answer)

    return {name: make(name) for name in predicts}


def _program(model: Model, variables: dict, inputs: Any) -> str:
    """A digest of what a model computes, which its weights do not say."""
    shapes = jax.eval_shape(lambda: variables), jax.ShapeDtypeStruct((1, *np.shape(inputs)[1:]), inputs.dtype)
    forward = jax.jit(lambda variables, inputs: model.apply(variables, inputs, train=False)[0].logits)
    return hashlib.sha256(forward.lower(*shapes).as_text().encode()).hexdigest()


def _as_given(one: Pretrained, predict: Callable[..., np.ndarray], validation: Mapping[str, Any]) -> Trained:
    variables = dict(one.variables)
    logits = predict(variables, validation["inputs"])
    return Trained(variables, 0.0, accuracy(logits, validation["labels"]))


def _train(
    together: Sequence[_Training],
    run: Run,
    place: Callable[[Any], Array],
    save_every: float,
    advance: Callable[[int], None],
) -> list[Trained]:
    """Trains students that stand at one step to their end, all at once."""
    ready, first = together[0].ready, together[0].notes["step"]
    stage = ready.stage
    advance(first)
    for one in together:
        run.rewind_metrics(one.seed, one.ready.stage.name, first)
    if first == stage.steps:
        return [_finished(one, one.state, one.notes, run) for one in together]
    course = _Course(together, run, place)
    examples = len(together[0].examples["inputs"])
    selects = [make_order(one.key, examples, stage.batch_size) for one in together]
    evaluated = {-(-stage.steps * (i + 1) // EVALUATIONS) for i in range(EVALUATIONS)}
    stops = sorted({*evaluated, *range(0, stage.steps, ready.devices.chunk)})
    saved = time.monotonic()
    try:
        for begin, number in itertools.pairwise([first, *(stop for stop in stops if stop > first)]):
            course.advance(np.stack([[select(step) for select in selects] for step in range(begin, number)]))
            advance(number - begin)
            if number in evaluated:
                # Before the checkpoint: a record ahead of the newest one is rewound, a missing one would be lost.
                course.evaluate(number)
            if number == stage.steps or time.monotonic() - saved > save_every:
                course.save(number)
                saved = time.monotonic()
    except KeyboardInterrupt:
        course.save_if_whole(evaluated)
        raise
    return course.finished()


class _Course:
    """The training of one student, or of several at once, from one step to the next."""

    def __init__(self, together: Sequence[_Training], run: Run, place: Callable[[Any], Array]) -> None:
        self.together, self.run, self.began = together, run, time.monotonic()
        self.devices, self.step = together[0].ready.devices, together[0].ready.advance
        self.state, *self.given = _place(together, place)
        self.reached = [one.notes["validation_accuracy"] for one in together]
        self.seconds = [one.notes["seconds"] for one in together]
        self._forget([one.notes["losses"] for one in together])

    def advance(self, indices: np.ndarray) -> None:
        """Takes steps on the examples `[K, P, B]`."""
        data, teachers, key = self.given
        chosen = indices if isinstance(self.devices, Population) else indices[:, 0]
        self.state, values = self.step(self.state, data, chosen, teachers, key)
        self.losses.append(values.reshape(len(values), -1))

    def evaluate(self, number: int) -> None:
        """Meets the validation split, and writes down how it went."""
        losses = self._losses()
        for i, (one, state) in enumerate(zip(self.together, self._states(), strict=True)):
            record = _evaluate(one, state, number, losses[i])
            self.run.append_metrics(record)
            self.reached[i] = record["validation_accuracy"]
        self._forget([[] for _ in self.together])

    def save(self, number: int) -> None:
        """Saves a checkpoint of each student, as if it trained alone."""
        # The losses since the last evaluation go along, so that the next record is that of an unbroken run.
        losses, share = self._losses(), (time.monotonic() - self.began) / len(self.together)
        self.seconds = [one.notes["seconds"] + share for one in self.together]
        states = self._states()
        if not is_first_host():
            return
        for i, one in enumerate(self.together):
            noted = {"seconds": self.seconds[i], "losses": losses[i].tolist(), "stage": one.ready.fingerprint}
            noted |= {"validation_accuracy": self.reached[i]}
            checkpoints.save(one.folder, number, jax.device_get(states[i]), notes=noted)

    def save_if_whole(self, evaluated: set[int]) -> None:
        """Saves where Ctrl-C left a training, unless it fell into a step, whose state is then gone."""
        if self.state.step.is_deleted():
            return
        number = int(self.state.step.ravel()[0])
        if number and sum(map(len, self.losses)) == number - max(
            (one for one in evaluated if one <= number), default=0
        ):
            self.save(number)

    def finished(self) -> list[Trained]:
        """What the students left."""
        told = [{"seconds": s, "validation_accuracy": r} for s, r in zip(self.seconds, self.reached, strict=True)]
        states = self._states()
        return [_finished(*each, self.run) for each in zip(self.together, states, told, strict=True)]

    def _states(self) -> list[TrainState]:
        if isinstance(self.devices, Population):
            return self.devices.unstack(self.state, len(self.together))
        return [local(self.state)]

    def _losses(self) -> np.ndarray:
        """Of each student since the last evaluation, `[P, K]`."""
        return np.ascontiguousarray(np.concatenate(jax.device_get(self.losses)).T)

    def _forget(self, losses: Sequence[Sequence[float]]) -> None:
        self.losses: list[Any] = [np.array(losses, np.float32).T]


def _place(together: Sequence[_Training], place: Callable[[Any], Array]) -> tuple[TrainState, Any, Any, Array]:
    """State, examples, teachers and keys, where they are needed."""
    devices, states, keys = together[0].ready.devices, [one.state for one in together], [one.key for one in together]
    data = [jax.tree.map(place, _given(one)) for one in together]
    teachers = [() if one.ready.stage.cache_teachers else one.teachers for one in together]
    if isinstance(devices, Population):
        return devices.stack(states), devices.gather(data), devices.gather(teachers), devices.stack(keys)
    return devices.place(states[0]), data[0], devices.place_teacher(teachers[0]), keys[0]


def _given(one: _Training) -> dict[str, Any]:
    """A stage's data, and what else its steps find in a batch."""
    stage, given = one.ready.stage, dict(one.examples)
    if stage.views is not None:
        count = len(one.examples["inputs"])
        given |= {"index": np.arange(count, dtype=np.int32), "examples": np.int32(count), "view_key": one.view_key}
    if stage.cache_teachers:
        key = None if stage.views is None else one.view_key  # what all seeds see, they may share
        asked = one.examples["inputs"], stage.augment, stage.views, key, stage.cache_top_k
        named = zip(stage.teachers, one.teachers, strict=True)
        given["teacher_logits"] = tuple(one.ready.answers[name](variables, *asked) for name, variables in named)
    return given


def _begin(ready: _Ready, seed: int, trained: Mapping[str, Mapping[int, Trained]], run: Run) -> _Training:
    """The training of a stage for a seed, at the newest checkpoint or at its beginning."""
    stage, folder = ready.stage, run.checkpoints(seed, ready.stage.name)
    latest = {name: trained[name][seed].variables for name in stage.needs}
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.name.encode()))
    examples = stage.examples(seed)
    state = _fresh(ready, key, latest[stage.start] if stage.start else None, examples["inputs"])
    state, notes = _restored(ready, state, folder)
    teachers = tuple(latest[name] for name in stage.teachers)
    return _Training(ready, seed, key, _view_key(seed), examples, teachers, state, notes, folder)


@functools.cache
def _view_key(seed: int) -> Array:
    """The key of a seed's views, which is that of all its stages."""
    return jax.random.fold_in(jax.random.key(seed), Purpose.VIEW)


def _fresh(ready: _Ready, key: Array, start: dict | None, inputs: Array) -> TrainState:
    stage = ready.stage
    variables = ready.init(jax.random.fold_in(key, Purpose.INIT), inputs[:1])
    if start is not None:
        start = start if stage.transfer is None else stage.transfer(start, variables)
        _check_same_tree(stage, start, variables)
        variables = start
    loss_params = None if stage.init_loss is None else stage.init_loss(jax.random.fold_in(key, Purpose.LOSS))
    return make_state(variables, stage.tx, loss_params=loss_params, loss_tx=stage.loss_tx)


def _restored(ready: _Ready, state: TrainState, folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """The state to go on from and the notes that were saved with it, its step among them."""
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
    return jax.tree.map(jnp.asarray, state), notes


def _describe(stage: Stage, given: Mapping[str, Any]) -> dict[str, Any]:
    """What can be told of a stage in JSON; the rest of it, such as the learning rate, is for the run's config."""
    told = {
        "steps": stage.steps,
        "batch_size": stage.batch_size,
        "teachers": list(stage.teachers),
        "start": stage.start,
        "augment": stage.augment is not None,
        "cache_teachers": stage.cache_teachers,
    } | {name: value for name in ("views", "cache_top_k") if (value := getattr(stage, name)) is not None}
    weights = {name: fingerprint(jax.tree.leaves(jax.device_get(variables))) for name, variables in given.items()}
    return told | ({"pretrained": weights} if given else {})


def _finished(one: _Training, state: TrainState, notes: Mapping[str, Any], run: Run) -> Trained:
    stage, records = one.ready.stage, {(each["seed"], each["stage"], each["step"]) for each in run.metrics()}
    if is_first_host() and (one.seed, stage.name, stage.steps) not in records:
        raise RunError(
            f"{run.folder}/metrics.jsonl has lost the records of {stage.name}, seed {one.seed}: "
            f"delete {one.folder} to train it anew"
        )
    return Trained(jax.tree.map(jnp.asarray, state.variables), notes["seconds"], notes["validation_accuracy"])


def _evaluate(one: _Training, state: TrainState, number: int, losses: np.ndarray) -> dict[str, Any]:
    stage, validation, loss = one.ready.stage, one.ready.validation, float(np.mean(losses))
    logits = one.ready.predict(jax.tree.map(jnp.asarray, state.variables), validation["inputs"])
    if not np.isfinite(loss) or not np.isfinite(logits).all():
        raise RunError(
            f"{stage.name}, seed {one.seed}: the loss is {loss} by step {number}, and training has diverged; "
            "try a smaller learning rate"
        )
    return {
        "seed": one.seed,
        "stage": stage.name,
        "step": number,
        "epoch": number * stage.batch_size / len(one.examples["inputs"]),
        "loss": loss,
        "validation_loss": float(np.mean(hard_cross_entropy(logits, validation["labels"]))),
        "validation_accuracy": accuracy(logits, validation["labels"]),
    }


def _from_cache(loss: Loss) -> Loss:
    """The loss, given the teachers' outputs out of the batch."""

    def cached(student: Outputs, _: tuple[Outputs, ...], batch: Batch, *loss_params: Any) -> Array:
        answers = batch["teacher_logits"]
        if "view" in batch:
            answers = jax.tree.map(lambda one: one[jnp.arange(len(one)), batch["view"]], answers)
        whole = (expand(one, num_classes=student.logits.shape[-1]) if isinstance(one, TopK) else one for one in answers)
        return loss(student, tuple(Outputs(one, {}) for one in whole), batch, *loss_params)

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
