"""Runs a plan: compile, schedule, train, collect.

A finished stage is read from disk. A stage that was interrupted is resumed from its newest valid
checkpoint and ends with the bits of an unbroken run.
"""

import collections
import dataclasses
import functools
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxkd._cpu_flags import CONVOLUTION_FLAG, lacks_convolution_flag
from jaxkd._extras import require_installed
from jaxkd._messages import list_some, shorten
from jaxkd.data.bucketing import LengthBuckets
from jaxkd.distill._compile import check_buckets, compile_stages
from jaxkd.distill._derived import Deriver, check_derived
from jaxkd.distill._diagnosis import explain_nan_logits, has_unknown_labels
from jaxkd.distill._identity import TrainingDescriber
from jaxkd.distill._input_checks import (
    check_inputs,
    check_stage_inputs,
    check_validation_labels,
)
from jaxkd.distill._loop import TrainingLoop
from jaxkd.distill._measurements import describe_caches, digest_measurements, find_measured
from jaxkd.distill._progress import PlanProgress
from jaxkd.distill._requirements import check_integers, check_numbers, named_arrays
from jaxkd.distill._schedule import make_schedule
from jaxkd.distill._stage_run import TrainedModel, check_pretrained, check_variables, make_trained
from jaxkd.distill._stream import check_streams
from jaxkd.distill._trainer import Trainer, describe_disk_use
from jaxkd.distill._validation import MakeScore, Validator, check_scores, make_scores
from jaxkd.distill.distributed import share_fate
from jaxkd.distill.placement import Placement, single_device
from jaxkd.distill.plan import AVERAGE, Entry, Pretrained, Stage, order, teacher_baselines
from jaxkd.distill.teacher_cache import TeacherCache
from jaxkd.evaluate import (
    PredictFn,
    accuracy_interval,
    chance_accuracy,
    make_predict,
)
from jaxkd.models.model import Model
from jaxkd.runs import ResultRow, Run, summarize
from jaxkd.runs._lock import reserve_folder
from jaxkd.runs.environment import check_cpu_products
from jaxkd.runs.growth import describe_growth
from jaxkd.runs.results import measure_costs

Plan = Sequence[Entry]
"""Stages, pretrained and derived models, in any order."""

MAX_SEEDS = 10_000
"""Largest number of seeds. More are taken for a mistake: they would be years of training."""


def run_plan(
    plan: Plan,
    seeds: Iterable[int],
    run: Run,
    *,
    validation: Mapping[str, Any],
    placement: Placement | None = None,
    save_every: float = 15.0,
    keep: int = 2,
    evaluations: int = 10,
    teacher_cache: str | os.PathLike | None = None,
    buckets: LengthBuckets | None = None,
    make_score: MakeScore | None = None,
) -> dict[str, list[TrainedModel]]:
    """Trains every stage of a plan for every seed, and resumes what an earlier call began.

    All draws of a stage derive from `jax.random.key(seed)` and the stage's name. Stages may be
    added to a plan, and seeds to a run, without changing a bit of the others.

    In a run that `open_run(..., grow=True)` opened, stages may also change: those that did, and
    what depends on them, are trained again, in place of their earlier trainings, which are kept
    until then. A stage with more steps goes on where it ended, if its steps do not depend on their
    number. If the configuration has changed, trainings that the plan lacks are left out of the
    run's records until a plan has them again. A line before the first step says how many trainings
    are kept.

    Args:
        plan: The stages, pretrained and derived models.
        seeds: The whole plan is trained once for each seed, an integer from 0 to 2**32 - 1.
        run: Takes the metrics and the checkpoints.
        validation: `inputs` and `labels`, on which each student is evaluated as it trains.
        placement: Where the stages train, such as `MeshPlacement(make_mesh())` for all devices. By
            default the first device. A run may be resumed with another placement. A
            `VectorizedPlacement` trains together the seeds, and the stages that share a program.
        save_every: Seconds between two checkpoints of a stage. A checkpoint is also saved at its
            end and on Ctrl-C, then not of students that are divided among several processes.
        keep: Number of the newest checkpoints of a training that are kept, for weights of earlier
            steps. With two, one may become damaged.
        evaluations: Number of evaluations of each stage, evenly spread, the last one at its end.
        teacher_cache: Folder of the cached logits of teachers, which runs may share. By default a
            folder of this run.
        buckets: For tokens `[N, ..., S]`, padded with 0 on the right: examples of similar length
            make a batch, cut to one of these lengths. Each length is compiled.
        make_score: `model -> ((variables, validation) -> scores)`, for models that do not predict
            one class per example. The scores are a `Score` or a dict of numbers, such as
            `{"rmse": 0.4}`, and are recorded by name.

    Returns:
        The trained models by name, in the order of the plan, one per seed. A pretrained model has
        its own variables.

    Raises:
        TypeError: If the plan, the seeds, the run, the validation split, the placement or the
            buckets are of another type.
        ValueError: If the plan is inconsistent, `evaluations` or `keep` is no integer of at least
            1, `save_every` is negative or NaN, seeds are out of range or repeated, the validation
            split lacks labels, holds text, or has inputs of another kind than a stage, the weights
            of a pretrained model have other shapes than its model, a token id is negative, or
            `buckets` meet logits of each token that need one length.
        RunError: If a loss is not finite, another thread trains in the run's folder, the run holds
            checkpoints of another training (the message names what differs) and may not grow, its
            folder was deleted, or XLA computes with outdated weights
            (`runs.environment.check_cpu_products`).
        OSError: If the run's folder or that of the teachers' logits cannot be written.
        ImportError: If orbax is missing.
    """
    for name, count in (("evaluations", evaluations), ("keep", keep)):
        if not isinstance(count, (int, np.integer)) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {count!r:.40}")
    if not isinstance(save_every, (int, float, np.number)):
        raise TypeError(f"save_every must be a number of seconds, got {save_every!r}")
    if not save_every >= 0:  # which NaN is not either
        raise ValueError(f"save_every must be at least 0 seconds, got {save_every}")
    # Otherwise the first checkpoint would fail, after some of the training.
    require_installed("orbax")
    # Before any training: a program that reads outdated weights raises no error, but its results
    # are wrong.
    check_cpu_products()
    if not isinstance(run, Run):
        raise TypeError(f"run must be what runs.open_run returns, got {shorten(repr(run), 80)}")
    # Training needs teachers first.
    ordered = order(plan)
    # The results keep the order in which the caller wrote the plan.
    names = [entry.name for entry in plan]
    plan = ordered
    # Read several times below, which a generator would not survive.
    seeds = _check_seeds(seeds)
    placement = single_device() if placement is None else placement
    _check_placement(placement)
    # The shapes of a seed's examples are those of every seed.
    first_seed = seeds[0] if seeds else 0
    _check_buckets_type(buckets)
    check_streams(plan, first_seed, placement, has_buckets=buckets is not None)
    _check_data(plan, first_seed, validation, buckets, scores_classes=make_score is None)
    with (
        reserve_folder(run.folder),
        share_fate(),
        PlanProgress(plan, seeds, run.folder) as progress,
    ):
        predict_fns = _make_predict_fns(plan, placement.make_predict, buckets)
        validator = Validator(plan, predict_fns, validation, make_score)
        stages = compile_stages(plan, first_seed, placement, buckets, evaluations=evaluations)
        if any(stage.lowered.has_convolutions for stage in stages):
            _warn_of_slow_convolutions()
        describer = TrainingDescriber(validation, run.config)
        cache = TeacherCache(
            {entry.name: entry.model for entry in plan},
            predict_fns,
            run.folder / "teachers" if teacher_cache is None else Path(teacher_cache),
            make_predict=functools.partial(placement.make_predict, buckets=buckets),
            report=lambda line: progress.report([line]),
        )
        if any(isinstance(entry, Stage) and entry.cache_teachers for entry in plan):
            _check_cache(cache, teacher_cache)

        # Loops look their teachers up in this dictionary, which grows as stages end.
        def is_scored(model: Model) -> bool:
            return make_score is not None or not has_unknown_labels(model, validation)

        trained = _collect_pretrained(plan, seeds, validator, is_scored)
        deriver = Deriver(plan, trained, validator, is_scored=is_scored)
        make_loop = functools.partial(
            TrainingLoop,
            run=run,
            placement=placement,
            teacher_cache=cache,
            buckets=buckets,
            validator=validator,
            save_every=save_every,
            keep=keep,
            evaluations=evaluations,
        )
        trainer = Trainer(run, placement, trained, describer, make_loop, deriver, progress)
        num_kept = trainer.keep_finished(stages, seeds)
        if num_kept and make_score is not None:
            _warn_of_other_scores(run)
        for round_ in make_schedule(stages, seeds, placement.max_students):
            trainer.train(round_)
        doubts = _describe_weak_teachers(plan, seeds, trained)
        if make_score is None:
            doubts += _describe_teachers_at_chance(plan, seeds, trained, validation["labels"])
        progress.report([*doubts, describe_disk_use(run.folder)])
    return {name: [trained[name][seed] for seed in seeds] for name in names}


def evaluate_plan(
    plan: Plan,
    trained: Mapping[str, Sequence[TrainedModel]],
    test: Mapping[str, Any],
    *,
    reference: str | None = None,
    buckets: LengthBuckets | None = None,
    throughput_batch: int = 256,
    repeats: int = 50,
    run: Run | None = None,
    make_score: MakeScore | None = None,
) -> list[ResultRow]:
    """Measures the models of a plan on a test set.

    Args:
        plan: The stages and pretrained models.
        trained: The result of `run_plan`.
        test: `inputs` and `labels`.
        reference: Name of the model with which agreement is measured, seed by seed. Only models
            with a `make_score` need none.
        buckets: As for `run_plan`. Latency and FLOPs are those of inputs of full length.
        throughput_batch: Size of the larger batch that is timed.
        repeats: Number of calls that are timed.
        run: A run whose `results.json` may hold rows already. One of the same weights, predictions,
            test set, settings, configuration and environment is read instead of measured again.
            Scores of `make_score` are always measured.
        make_score: As for `run_plan`, for models that do not predict one class per example. The
            rows have its numbers as `scores`, in place of accuracy, agreement and calibration.

    Returns:
        A row for each stage and model, in the order of the plan. A model that all seeds share, such
        as a pretrained one, is measured once.

    Raises:
        ValueError: If the plan has no model of the reference's name, `trained` lacks a model or
            holds another number of them for one stage than for another, the test set lacks labels,
            holds text or negative token ids, or has inputs of another kind than a stage, logits are
            NaN, or `throughput_batch` or `repeats` is no whole number of at least 1. Data that are
            a function of the seed are not compared.
        TypeError: If the buckets are of another type.
    """
    _check_buckets_type(buckets)
    names = [entry.name for entry in plan]
    if missing := [name for name in names if name not in trained]:
        raise ValueError(
            f"trained lacks {list_some(missing)} of the plan: pass what run_plan returned"
        )
    _check_same_seeds({e.name: len(trained[e.name]) for e in plan if not isinstance(e, Pretrained)})
    models = {entry.name: _unique(trained[entry.name]) for entry in plan}
    if make_score is not None:
        _check_has_seeds(models)
        return _measure_scores(plan, models, test, make_score, throughput_batch, repeats)
    if reference is None:
        raise ValueError(
            f"evaluate_plan compares with a reference: pass reference=..., one of "
            f"{list_some(names)}, or a make_score for models that predict no classes"
        )
    if reference not in names:
        raise ValueError(
            f"reference {reference!r} is not in the plan, which has {list_some(names)}"
        )
    _check_split(test, "the test set", "inputs and labels")
    check_integers(test, "the test set")
    check_inputs(plan, test, "test set")
    for entry in plan:
        for model in models[entry.name][:1]:
            owner = f"the trained model {shorten(entry.name, 40)!r}"
            check_variables(owner, entry.model, model.variables, test["inputs"])
    _check_has_seeds(models)
    settings = [list(buckets.lengths) if buckets else None, throughput_batch, repeats]
    digests, known = {}, {}
    if run is not None:
        digests = digest_measurements(plan, models, test, reference, settings, run)
        known = find_measured(run, digests)
    logits = {}
    if len(known) < len(names):
        # The reference is compared with each of the others.
        wanted = [name for name in names if name not in known or name == reference]
        logits = _predict_all(plan, {name: models[name] for name in wanted}, test, buckets)
    rows = []
    # For the doubts of a report, which sees rows alone.
    chance = chance_accuracy(test["labels"])
    baselines: dict[str, list[str]] = {name: [] for name in names}
    variables = {name: seeds[0].variables for name, seeds in models.items()}
    for teacher, alone in teacher_baselines(plan, variables):
        baselines[teacher].append(alone)
    for entry in plan:
        seeds = models[entry.name]
        row = known.get(entry.name)
        if row is None:
            reference_logits = None
            if entry.name != reference:
                reference_logits = _match_seeds(logits[reference], len(seeds))
            row = summarize(
                entry.name,
                entry.model,
                [model.variables for model in seeds],
                logits[entry.name],
                test["inputs"],
                test["labels"],
                reference_logits=reference_logits,
                seconds=[model.seconds for model in seeds],
                throughput_batch=throughput_batch,
                repeats=repeats,
            )
        rows.append(
            dataclasses.replace(
                row,
                chance=chance,
                baselines=tuple(baselines[entry.name]),
                cached_teachers=describe_caches(entry, plan),
                measured=digests.get(entry.name),
            )
        )
    return rows


def _measure_scores(
    plan: Plan,
    models: Mapping[str, Sequence[TrainedModel]],
    test: Mapping[str, Any],
    make_score: MakeScore,
    throughput_batch: int,
    repeats: int,
) -> list[ResultRow]:
    """Returns the rows of models that are measured by a score of the user's own."""
    scores_by_model = make_scores(make_score, {entry.model for entry in plan})
    rows = []
    for entry in plan:
        seeds = models[entry.name]
        score = scores_by_model[entry.model]
        scores = [check_scores(score(seed.variables, test)) for seed in seeds]
        if len({frozenset(seed) for seed in scores}) > 1:
            raise ValueError(
                f"the scores of {shorten(entry.name, 40)!r} have other names for one seed than for "
                "another: return the same ones for all"
            )
        costs = measure_costs(
            entry.model, seeds[0].variables, test["inputs"], throughput_batch, repeats
        )
        rows.append(
            ResultRow(
                entry.name,
                scores={name: tuple(seed[name] for seed in scores) for name in scores[0]},
                seconds=tuple(seed.seconds for seed in seeds),
                cached_teachers=describe_caches(entry, plan),
                **costs,
            )
        )
    return rows


def _check_has_seeds(models: Mapping[str, Sequence[TrainedModel]]) -> None:
    """Raises `ValueError` if there is no trained model of a name."""
    if empty := [name for name, seeds in models.items() if not seeds]:
        raise ValueError(
            f"trained has no seed of {list_some(empty)}: pass what run_plan returned for at least "
            "one seed"
        )


def _predict_all(
    plan: Plan,
    models: Mapping[str, Sequence[TrainedModel]],
    test: Mapping[str, Any],
    buckets: LengthBuckets | None,
) -> dict[str, list[np.ndarray]]:
    """Returns the logits of each seed of some models on the test set.

    Raises:
        ValueError: If they are NaN.
    """
    predict_fns = _make_predict_fns(plan, make_predict, buckets)
    logits = {}
    for name, seeds in models.items():
        # All logits are kept, since each model is compared with the reference of the same seed.
        logits[name] = [predict_fns[name](model.variables, test["inputs"]) for model in seeds]
        for model, model_logits in zip(seeds, logits[name], strict=True):
            if np.isnan(model_logits).any():
                raise ValueError(
                    f"the logits of {shorten(name, 40)!r} are NaN for the test set: "
                    + explain_nan_logits(test, model.variables)
                )
    return logits


def _warn_of_other_scores(run: Run) -> None:
    """Warns if a function that no digest shows may have changed with the configuration."""
    growth = describe_growth(run) if run.is_growing else ""
    if growth:
        warnings.warn(
            f"the trainings that are kept keep the scores that make_score gave them ({growth}): if "
            "it depends on that, name another folder for the run",
            stacklevel=3,
        )


def _check_same_seeds(counts: Mapping[str, int]) -> None:
    """Raises `ValueError` if stages were trained for other numbers of seeds, which are paired."""
    if len({*counts.values()}) > 1:
        listed = list_some(f"{name} has {count}" for name, count in counts.items())
        raise ValueError(
            "the models of a seed are compared, but trained does not hold them for the same seeds, "
            f"{listed}: pass what run_plan returned"
        )


def _warn_of_slow_convolutions() -> None:
    """Warns if this process lacks the flag under which a CPU computes convolutions fast."""
    if jax.default_backend() == "cpu" and lacks_convolution_flag(jax.__version__):
        warnings.warn(
            f"JAX {jax.__version__} is slow at gradients of convolutions on a CPU: set "
            f"XLA_FLAGS={CONVOLUTION_FLAG} before JAX starts",
            stacklevel=3,
        )


def _check_placement(placement: Any) -> None:
    # A class has the methods of a placement as well.
    if isinstance(placement, type) or not hasattr(placement, "make_multi_step"):
        is_class = isinstance(placement, type)
        given = f"the class {placement.__name__}" if is_class else shorten(repr(placement), 80)
        raise TypeError(
            f"placement must be such as MeshPlacement(make_mesh()) or PmapPlacement(), got {given}"
        )


def _check_buckets_type(buckets: Any) -> None:
    if buckets is not None and not isinstance(buckets, LengthBuckets):
        raise TypeError(
            f"buckets must be such as LengthBuckets((16, 64)), got {shorten(repr(buckets), 80)}"
        )


def _check_split(examples: Mapping[str, Any], owner: str, needed: str) -> None:
    """Raises `ValueError` if a split lacks inputs or labels, or holds text.

    Raises `TypeError` if it is no dict.
    """
    if not isinstance(examples, Mapping):
        remedy = ": pass its .examples" if hasattr(examples, "examples") else ""
        raise TypeError(
            f"{owner} must be a dict, {{'inputs': ..., 'labels': ...}}, got a "
            f"{type(examples).__name__}{remedy}"
        )
    for name in ("inputs", "labels"):
        if name not in examples:
            raise ValueError(
                f"{owner} has no {name!r}, it holds {list_some(examples) or 'nothing'}: "
                f"pass {needed}"
            )
        array = examples[name]
        # Lists of numbers are fine, and those of text are found as arrays.
        array = np.asarray(array) if isinstance(array, (list, tuple)) else array
        check_numbers({name: array}, owner)
    # Inputs may be a dict, and labels those of each token.
    lengths = {
        name: len(array) if np.ndim(array) else 0
        for name, array in named_arrays({name: examples[name] for name in ("inputs", "labels")})
    }
    if len({*lengths.values()}) > 1 or not min(lengths.values()):
        raise ValueError(
            f"{owner} needs arrays of the same length, at least 1, got the lengths "
            f"{shorten(lengths, 120)}"
        )


def _check_data(
    plan: Plan,
    seed: int,
    validation: Mapping[str, Any],
    buckets: LengthBuckets | None,
    *,
    scores_classes: bool,
) -> None:
    """Checks before any training that data, models and pretrained weights fit each other.

    Raises:
        ValueError: If they do not.
    """
    for stage in plan:
        if isinstance(stage, Stage):
            check_stage_inputs(stage, seed)
            check_integers(stage.examples(seed), f"stage {shorten(stage.name, 40)!r}")
    if scores_classes:
        _check_split(validation, "the validation split", "inputs and labels, or a make_score")
        check_integers(validation, "the validation split")
        check_inputs(plan, validation, "validation split", seed=seed)
        check_validation_labels(plan, validation)

    def get_inputs(model: Model) -> Any:
        is_classifier = scores_classes and not has_unknown_labels(model, validation)
        return validation["inputs"] if is_classifier else None

    check_pretrained(plan, seed, get_inputs)
    check_derived(plan, seed)
    if buckets is not None:
        check_buckets(plan, seed, buckets, validation["inputs"], scores_classes=scores_classes)


def _check_seeds(seeds: Iterable[int]) -> list[int]:
    """Returns the seeds after a check that each gives a training of its own."""
    if not isinstance(seeds, Iterable):
        raise TypeError(
            f"seeds must be a sequence such as range(3), got {shorten(repr(seeds), 80)}"
        )
    # One more than allowed, because a range may be longer than memory.
    checked: list[Any] = list(itertools.islice(seeds, MAX_SEEDS + 1))
    if len(checked) > MAX_SEEDS:
        raise ValueError(f"there are more than {MAX_SEEDS:,} seeds: pass fewer")
    for seed in checked:
        is_integer = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
        # JAX takes a key's seed modulo 2**32, so that others would repeat the training of a seed
        # within.
        if not is_integer or not 0 <= seed < 2**32:
            raise ValueError(f"seeds must be integers from 0 to {2**32 - 1}, got {seed!r:.40}")
    checked = [int(seed) for seed in checked]
    repeated = sorted(seed for seed, count in collections.Counter(checked).items() if count > 1)
    if repeated:
        raise ValueError(f"seeds must differ, but {list_some(repeated)} are repeated")
    return checked


def _check_cache(cache: TeacherCache, folder: str | os.PathLike | None) -> None:
    """Fails or warns about the folder of teachers' logits before a teacher is trained for it."""
    cache.check_folder()
    if folder is not None and jax.process_count() > 1:
        warnings.warn(
            f"teacher_cache {folder} is not used, because several processes compute the logits "
            "together: each keeps them in memory",
            stacklevel=3,
        )


def _describe_weak_teachers(
    plan: Plan, seeds: Sequence[int], trained: Mapping[str, Mapping[int, TrainedModel]]
) -> list[str]:
    """Returns a line for each teacher that is no better than a stage without a teacher."""
    lines = []
    variables = {name: models[seeds[0]].variables for name, models in trained.items() if seeds}
    for teacher, alone in teacher_baselines(plan, variables) if seeds else ():
        accuracy, baseline = (_mean_accuracy(trained[name], seeds) for name in (teacher, alone))
        if accuracy <= baseline:
            lines.append(
                f"the teacher {teacher!r} is no better than {alone!r}, which has no teacher: "
                f"{accuracy:.1%} and {baseline:.1%} on validation; improve the teacher first"
            )
    return lines


def _mean_accuracy(models: Mapping[int, TrainedModel], seeds: Sequence[int]) -> float:
    """Returns the mean accuracy on validation of the models of some seeds."""
    return float(np.mean([models[seed].validation_accuracy for seed in seeds]))


def _describe_teachers_at_chance(
    plan: Plan,
    seeds: Sequence[int],
    trained: Mapping[str, Mapping[int, TrainedModel]],
    labels: Any,
) -> list[str]:
    """Returns a line for each teacher that is no better than a constant prediction."""
    chance, count = chance_accuracy(labels), np.size(labels)
    teachers = dict.fromkeys(
        name
        for stage in plan
        if isinstance(stage, Stage)
        for name in stage.teachers
        if name != AVERAGE
    )
    lines = []
    for name in teachers if seeds else ():
        accuracy = _mean_accuracy(trained[name], seeds)
        # NaN for a teacher of other classes, which is not compared.
        if accuracy >= 0 and accuracy_interval(accuracy * count, count)[0] <= chance:
            lines.append(
                f"the teacher {name!r} is no better than chance: {accuracy:.1%} on validation, "
                f"where the most frequent class has {chance:.1%}; does it get its own kind of "
                "inputs and order of classes?"
            )
    return lines


def _collect_pretrained(
    plan: Plan,
    seeds: Sequence[int],
    validator: Validator,
    is_scored: Callable[[Model], bool],
) -> dict[str, dict[int, TrainedModel]]:
    """Returns the models by name and seed, with the pretrained ones filled in.

    A teacher of other classes, for which `is_scored` is False, has the accuracy NaN.
    """
    trained: dict[str, dict[int, TrainedModel]] = {entry.name: {} for entry in plan}
    for entry in plan:
        if isinstance(entry, Pretrained):
            variables = dict(entry.variables)
            scores = validator.score(entry.name, variables) if is_scored(entry.model) else {}
            # One object for all seeds, by which `evaluate_plan` sees that they share it.
            trained[entry.name] = dict.fromkeys(seeds, make_trained(variables, 0.0, scores))
    return trained


def _make_predict_fns(
    plan: Plan, make: Callable[..., PredictFn], buckets: LengthBuckets | None
) -> dict[str, PredictFn]:
    """Makes a predict function by name. Entries with the same model share one and its program."""
    # Each call of `make` jits a new function, which would compile again. A `Model` is hashed by the
    # identity of its two functions.
    make_once = functools.cache(functools.partial(make, buckets=buckets))
    return {entry.name: make_once(entry.model) for entry in plan}


def _unique(seeds: Sequence[TrainedModel]) -> Sequence[TrainedModel]:
    """Returns one model if all seeds share it."""
    return seeds[:1] if all(model is seeds[0] for model in seeds) else seeds


def _match_seeds(logits: Sequence[np.ndarray], num_seeds: int) -> Sequence[np.ndarray]:
    """Returns one array per seed. A model that all seeds share has only one."""
    return list(logits[:1]) * num_seeds if len(logits) == 1 else logits[:num_seeds]
