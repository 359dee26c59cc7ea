"""Stages, losses and results that experiments share."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from experiments.common.cli import check_writable
from experiments.common.limits import expand
from experiments.common.options import Options, SoftTargetOptions, make_placement
from jaxkd import distill, evaluate, losses, models, runs, weights
from jaxkd.distill import Batch, Examples, LossContext, LossFn, TrainedModel
from jaxkd.models import Outputs
from jaxkd.runs import report
from jaxkd.transfer import Rule, transfer

Plan = Sequence[distill.Stage | distill.Pretrained]
"""Stages and pretrained models."""


def make_stage(
    name: str,
    model: models.Model,
    examples: Examples,
    loss: LossFn,
    options: Options,
    *,
    steps: int,
    **kwargs: Any,
) -> distill.Stage:
    """Makes a stage with the options' optimizer and batch size.

    Args:
        name: Name of the stage.
        model: The student.
        examples: Its examples.
        loss: Its loss.
        options: The options.
        steps: Number of training steps.
        **kwargs: Further attributes of the stage, or others in place of the options'.
    """
    tx = optax.adam(optax.cosine_decay_schedule(options.learning_rate, steps))
    defaults: dict[str, Any] = {"tx": tx, "batch_size": options.batch_size}
    return distill.Stage(name, model, examples, loss, steps=steps, **defaults | kwargs)


def supervised_loss(
    student: Outputs, teachers: tuple[Outputs, ...], batch: Batch, context: LossContext
) -> Any:
    """Computes the cross-entropy with the labels."""
    return losses.hard_cross_entropy(student.logits, batch["labels"])


def make_soft_target_loss(options: SoftTargetOptions) -> LossFn:
    """Makes the loss of a student with one teacher and the options' temperature and alpha.

    If the batch has `labelled`, an example without a label gives all weight to the soft targets.
    """

    def loss(
        student: Outputs, teachers: tuple[Outputs, ...], batch: Batch, context: LossContext
    ) -> Any:
        (teacher,) = teachers
        # Without a label there is nothing but the teacher to learn from.
        alpha: Any = options.alpha
        if "labelled" in batch:
            alpha = jnp.where(batch["labelled"], options.alpha, 1.0)
        return losses.distillation_loss(
            student.logits,
            teacher.logits,
            batch["labels"],
            temperature=options.temperature,
            alpha=alpha,
        )

    return loss


def transfer_all_but_head(source: dict, fresh: dict) -> dict:
    """Returns the weights of another network, with the last layer of a fresh one."""
    # The two data sets may have different numbers of classes.
    rules = (Rule("params/logits/{rest...}", None),)
    return transfer(source, fresh, rules=rules, strict=False)[0]


def choose_folder(experiment: str, options: Options, data_name: str) -> Path:
    """Returns the options' workdir, or a folder in runs/ named after data and options.

    The name has the data, the number of seeds and some of the options that are not the default. The
    digits at its end stand for all of them.
    """
    if options.workdir:
        return expand(options.workdir)
    values = dataclasses.asdict(options).items()
    # Options that change no result, such as `--save-every`, resume the same folder.
    identifying = {name: value for name, value in values if name not in runs.IGNORED_OPTIONS}
    digest = hashlib.sha256(json.dumps(identifying, sort_keys=True).encode()).hexdigest()[:8]
    seeds = f"{options.num_seeds}seed{'s' if options.num_seeds > 1 else ''}"
    parts = [_clean_name(Path(data_name).resolve().name), seeds, *_name_changes(options), digest]
    return Path("runs") / experiment / "-".join(parts)


def _name_changes(options: Options) -> list[str]:
    """Names the first few options with another value than the default, such as `epochs2`."""
    changes = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        # The data and the number of seeds are named in any case.
        is_named = field.name in ("dataset", "num_seeds", *runs.IGNORED_OPTIONS)
        if not is_named and value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            changes.append(_clean_name(field.name + "_".join(map(str, values))))
    return changes[:3]


def _clean_name(text: str) -> str:
    """Returns the part of a file's name for a text, without what a shell would interpret."""
    return re.sub(r"(?:[^\w.]|_|\.\.+)+", "_", text).strip("._")[:40] or "data"


def open_run(
    experiment: str, options: Options, data_name: str, arrays: Iterable[np.ndarray]
) -> runs.Run:
    """Starts the run of an experiment, or resumes it.

    Args:
        experiment: Name of the script.
        options: Its options.
        data_name: Name of the data set.
        arrays: All of the data, for its fingerprint.
    """
    config = {"experiment": experiment} | dataclasses.asdict(options)
    if options.teacher_cache and distill.is_primary_process():
        # Otherwise it would fail after the teacher's training.
        check_writable("--teacher-cache", expand(options.teacher_cache))
    return runs.open_run(choose_folder(experiment, options, data_name), config, arrays=arrays)


def run_options(options: Options, plan: Plan) -> dict[str, Any]:
    """Returns the arguments of `distill.run_plan` that follow from the options."""
    return {
        "seeds": range(options.seed, options.seed + options.num_seeds),
        "placement": make_placement(options, plan),
        "save_every": options.save_every,
        "evaluations": options.evaluations,
        "teacher_cache": options.teacher_cache and expand(options.teacher_cache),
    }


def find_best(
    trained: Mapping[str, Sequence[TrainedModel]], names: Sequence[str]
) -> tuple[str, int]:
    """Returns the stage with the highest mean validation accuracy, and its best seed's position."""

    def accuracies(name: str) -> list[float]:
        return [model.validation_accuracy for model in trained[name]]

    # Chosen on the validation split: the best of several on the test set would look better than it
    # is.
    best = max(names, key=lambda name: sum(accuracies(name)))
    return best, int(np.argmax(accuracies(best)))


class RunOutputs(NamedTuple):
    """The results of a run.

    Attributes:
        folder: The run's folder.
        rows: The rows of the table.
        trained: The trained models of each stage, one per seed.
    """

    folder: Path
    rows: list[runs.ResultRow]
    trained: Mapping[str, Sequence[TrainedModel]]


def save_results(
    run: runs.Run,
    plan: Plan,
    trained: Mapping[str, Sequence[TrainedModel]],
    test: Mapping[str, Any],
    *,
    title: str,
    class_names: Sequence[str],
    students: Sequence[str],
    comparisons: Sequence[tuple[str, str]],
    reference: str = "teacher",
    unlisted: Sequence[str] = (),
    make_remarks: Callable[[Sequence[runs.ResultRow], Path], Sequence[str]] | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    **kwargs: Any,
) -> RunOutputs:
    """Measures a plan of classifiers; saves results, report, figures and the best student.

    Args:
        run: The run, from `open_run`.
        plan: The plan.
        trained: The trained models, from `distill.run_plan`.
        test: `inputs` and `labels`.
        title: Title of the report.
        class_names: Name of each class, by label. They are saved with the student's weights.
        students: The stages of which the best one is exported, by validation accuracy.
        comparisons: Pairs of a stage and the baseline that the report compares it with.
        reference: Name of the model with which agreement is measured.
        unlisted: Names that are left out of the tables.
        make_remarks: `(rows, folder) -> paragraphs` in Markdown for the report. It draws the
            figures that they show into the folder.
        tokenizer: For texts: the tokenizer, which is saved with the student.
        max_length: For texts: the largest number of tokens that the student takes.
        **kwargs: Further arguments of `distill.evaluate_plan`.

    Returns:
        Folder, rows and models.
    """
    listed = [entry for entry in plan if entry.name not in unlisted]
    rows = distill.evaluate_plan(listed, trained, test, reference=reference, **kwargs)
    outputs = RunOutputs(run.folder, rows, trained)
    if not distill.is_primary_process():
        return outputs
    variables = {name: seeds[0].variables for name, seeds in trained.items()}
    teachers = distill.teacher_baselines(plan, variables)
    chance = evaluate.chance_accuracy(test["labels"])
    report.report_run(
        run,
        rows,
        title=title,
        comparisons=comparisons,
        remarks=make_remarks(rows, run.folder) if make_remarks else (),
        teachers=teachers,
        chance=chance,
    )
    best, seed = find_best(trained, students)
    weights.save_student(
        run.folder,
        next(entry.model for entry in plan if entry.name == best),
        trained[best][seed].variables,
        test["inputs"][0],
        class_names=class_names,
        tokenizer=tokenizer,
        max_length=max_length,
    )
    report.print_results(rows, comparisons=comparisons, teachers=teachers, chance=chance)
    print(f"Exported the best student by validation accuracy, {best}.")
    print(f"Everything is in {run.folder}: start with report.md")
    return outputs
