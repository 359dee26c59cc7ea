"""The one loop that runs a plan.

A stage that is done is on disk and is not trained again; one that was cut off goes on from its newest sound checkpoint,
with the bits that an unbroken run would have had.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkd.batches import make_placer
from jaxkd.cache import TopK, Views, expand, teacher_logits
from jaxkd.course import Ready, Trained, Training, begin, train
from jaxkd.evaluate import Score, classifier_score, make_predict, summarize
from jaxkd.models.model import Model, Outputs
from jaxkd.parallel import Mapped, Population, Sharded, is_first_host, make_mesh
from jaxkd.plan import Pretrained, Stage, order
from jaxkd.runs import Run, fingerprint
from jaxkd.train import Batch, Loss, make_train_step

__all__ = ["Pretrained", "Stage", "Trained", "results", "run_plan"]

SENTENCES = 64
"""Sentences that are predicted at once; of hundreds, the attention maps would not fit a processor's caches."""

MakeScore = Callable[[Model], Callable[[dict, Mapping[str, Any]], Score]]
"""`model -> ((variables, examples) -> Score)`."""


def run_plan(
    plan: Sequence[Stage | Pretrained],
    seeds: Iterable[int],
    run: Run,
    *,
    validation: Mapping[str, Any],
    save_every: float = 15.0,
    evaluations: int = 10,
    devices: Sharded | Mapped | Population | None = None,
    teacher_cache: str | os.PathLike | None = None,
    widths: Sequence[int] | None = None,
    make_score: MakeScore | None = None,
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
        evaluations: How often a stage's student meets the validation split, evenly spread, the last time at its end.
        devices: Where it runs, and how many at once; by default one student after another on the first device. A run
            may go on on others. A `Population` takes together the seeds, and the stages that differ in name and data
            alone.
        teacher_cache: Folder in which the logits of cached teachers are kept, for other runs as well; by default the
            run's own.
        widths: For inputs that are tokens `[N, ..., S]`, padded with 0 on the right, in rising order: sentences of like
            length make a batch, cut to the narrowest of these that holds them. Each is compiled.
        make_score: `model -> ((variables, validation) -> Score)`, for models that do not choose one class for each
            example.

    Returns:
        For each name, in the plan's order, what it left, a pretrained model what it came with: one entry a seed.

    Raises:
        ValueError: If the plan is inconsistent, or nothing is ever evaluated.
        RunError: If a loss stops being finite, or the run holds checkpoints of another plan.
        OSError: If the run's folder cannot be written.
    """
    if evaluations < 1:
        raise ValueError(f"evaluations must be at least 1, the one at a stage's end, got {evaluations}")
    stages = [one for one in order(plan) if isinstance(one, Stage)]
    seeds, devices = list(seeds), devices or Sharded(make_mesh(devices=jax.local_devices()[:1]))
    given = {one.name: one.variables for one in plan if isinstance(one, Pretrained)}
    widths = None if widths is None else tuple(widths)
    predicts = _make_predicts(plan, devices, widths)
    scores = _make_scores(plan, predicts, validation, make_score)
    trained: dict[str, dict[int, Trained]] = {one.name: {} for one in plan}
    for one in plan:
        if isinstance(one, Pretrained):
            trained[one.name] = dict.fromkeys(seeds, _as_given(one, scores[one.name]))
    models = {one.name: one.model for one in plan}
    kept = run.folder / "teachers" if teacher_cache is None else Path(teacher_cache)
    answers = _make_answers(models, predicts, kept)
    ready = _prepare(stages, models, scores, answers, given, devices, widths)
    with _progress() as progress:
        whole = progress.add_task("all stages", total=len(seeds) * sum(stage.steps for stage in stages))
        for turn in _turns(ready, seeds, devices):
            place = make_placer(_putting(devices))
            for students in turn:
                for together in _level([begin(one, seed, trained, run) for one, seed in students]):
                    task = progress.add_task(_names(together), total=together[0].ready.stage.steps)

                    def advance(steps: int, task: Any = task, count: int = len(together)) -> None:
                        progress.advance(task, steps)
                        progress.advance(whole, count * steps)

                    for one, result in zip(
                        together, train(together, run, place, save_every, evaluations, advance), strict=True
                    ):
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
    widths: Sequence[int] | None = None,
    throughput_batch: int = 256,
    repeats: int = 50,
) -> list[dict]:
    """Measures what a plan left on a test set.

    Args:
        plan: The stages and pretrained models.
        trained: What `run_plan` returned.
        test: `inputs` and `labels`.
        reference: Name of the one with which agreement is measured, seed by seed.
        widths: As for `run_plan`. Time and work are those of inputs in their whole width.
        throughput_batch: Size of the larger batch that is timed.
        repeats: Number of calls that are timed.

    Returns:
        A row for each of them, in the plan's order, as `evaluate.summarize` makes them; what all seeds share, such as a
        pretrained model, is measured once.
    """
    predicts = _make_predicts(plan, None, None if widths is None else tuple(widths))
    left = {one.name: _different(trained[one.name]) for one in plan}
    logits = {name: [predicts[name](one.variables, test["inputs"]) for one in left[name]] for name in left}
    return [
        summarize(
            one.name,
            one.model,
            [each.variables for each in left[one.name]],
            logits[one.name],
            test["inputs"],
            test["labels"],
            reference_logits=None if one.name == reference else _for_each(logits[reference], len(left[one.name])),
            seconds=[each.seconds for each in left[one.name]],
            throughput_batch=throughput_batch,
            repeats=repeats,
        )
        for one in plan
    ]


def _different(trained: Sequence[Trained]) -> Sequence[Trained]:
    """What was left, once if all seeds have the same."""
    return trained[:1] if all(one is trained[0] for one in trained) else trained


def _for_each(logits: Sequence[np.ndarray], seeds: int) -> Sequence[np.ndarray]:
    """One for each seed, of which all may share one; and one alone for a model that all seeds share."""
    return list(logits[:1]) * seeds if len(logits) == 1 else logits[:seeds]


def _prepare(
    stages: Sequence[Stage],
    models: Mapping[str, Model],
    scores: Mapping[str, Callable[[dict], Score]],
    answers: Mapping[str, Callable[..., Any]],
    given: Mapping[str, Any],
    devices: Sharded | Mapped | Population,
    widths: tuple[int, ...] | None,
) -> list[Ready]:
    """The stages with their compiled functions, the same ones for all that differ in name and data alone."""
    inits = {model: jax.jit(model.init) for model in models.values()}
    prepared: list[Ready] = []
    for stage in stages:
        told = _describe(stage, {name: given[name] for name in stage.needs if name in given})
        alike = next((one for one in prepared if _alike(one.stage, stage)), None)
        if alike is not None:
            prepared.append(alike._replace(stage=stage, fingerprint=told))
            continue
        advance = devices.make_advance(_step_maker(stage, tuple(models[name] for name in stage.teachers)))
        init, score = inits[stage.model], scores[stage.name]
        prepared.append(Ready(stage, devices, advance, init, score, answers, widths, told))
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


def _from_cache(loss: Loss) -> Loss:
    """The loss, given the teachers' outputs out of the batch."""

    def cached(student: Outputs, _: tuple[Outputs, ...], batch: Batch, *loss_params: Any) -> Array:
        answers = batch["teacher_logits"]
        if "view" in batch:
            answers = jax.tree.map(lambda one: one[jnp.arange(len(one)), batch["view"]], answers)
        whole = (expand(one, num_classes=student.logits.shape[-1]) if isinstance(one, TopK) else one for one in answers)
        return loss(student, tuple(Outputs(one, {}) for one in whole), batch, *loss_params)

    return cached


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


def _turns(
    ready: Sequence[Ready], seeds: Sequence[int], devices: Sharded | Mapped | Population
) -> list[list[list[tuple[Ready, int]]]]:
    """Who trains when: turns, within which arrays stay on the devices, of students that train at once."""
    if not isinstance(devices, Population):
        return [[[(one, seed)] for one in ready] for seed in seeds]
    groups: dict[Any, list[Ready]] = {}
    for one in ready:
        groups.setdefault((one.advance, _shapes(one.stage.examples(seeds[0]))), []).append(one)
    # Seeds first: what a seed's teacher says is remembered from one of its students to the next.
    students = [[(one, seed) for seed in seeds for one in group] for group in groups.values()]
    return [[each[i : i + devices.size] for i in range(0, len(each), devices.size)] for each in students]


def _shapes(examples: Mapping[str, Any]) -> frozenset[tuple]:
    return frozenset((name, jnp.shape(array), jnp.result_type(array)) for name, array in examples.items())


def _level(begun: Sequence[Training]) -> list[list[Training]]:
    """Those that stand at one step together: a kill between two saves leaves some behind."""
    steps = sorted({one.notes["step"] for one in begun})
    return [[one for one in begun if one.notes["step"] == step] for step in steps]


def _names(together: Sequence[Training]) -> str:
    first = f"{together[0].ready.stage.name}, seed {together[0].seed}"
    return first if len(together) == 1 else f"{first}, and {len(together) - 1} more at once"


def _outcome(one: Training, result: Trained) -> str:
    stage, first = one.ready.stage, one.notes["step"]
    if first == stage.steps:
        return "already trained"
    told = f"{result.validation_accuracy:.1%} on validation after {stage.steps} steps and {result.seconds:.1f} s"
    return told + (f", resumed at step {first}" if first else "")


def _putting(devices: Sharded | Mapped | Population) -> Callable[[Any], Array]:
    return jnp.asarray if isinstance(devices, Population) else devices.place_examples


def _make_predicts(
    plan: Sequence[Stage | Pretrained],
    devices: Sharded | Mapped | Population | None,
    widths: tuple[int, ...] | None,
) -> dict[str, Callable[..., np.ndarray]]:
    """A predict for each, one and the same for those of one model, which compile once."""
    given: dict[str, Any] = {} if widths is None else {"widths": widths, "batch_size": SENTENCES}

    @functools.cache
    def make(model: Model) -> Callable[..., np.ndarray]:
        if not isinstance(devices, Sharded):
            return make_predict(model, **given)
        predict = make_predict(model, mesh=devices.mesh, **given)
        return lambda variables, inputs: predict(devices.place_teacher(variables), inputs)

    return {one.name: make(one.model) for one in plan}


def _make_scores(
    plan: Sequence[Stage | Pretrained],
    predicts: Mapping[str, Callable[..., np.ndarray]],
    validation: Mapping[str, Any],
    make: MakeScore | None,
) -> dict[str, Callable[[dict], Score]]:
    """What scores each on the validation split, one and the same for those of one model."""

    @functools.cache
    def scoring(model: Model, predict: Callable[..., np.ndarray]) -> Callable[[dict], Score]:
        score = classifier_score(predict) if make is None else make(model)
        return lambda variables: score(variables, validation)

    return {one.name: scoring(one.model, predicts[one.name]) for one in plan}


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


def _as_given(one: Pretrained, score: Callable[[dict], Score]) -> Trained:
    variables = dict(one.variables)
    return Trained(variables, 0.0, score(variables).accuracy)


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
