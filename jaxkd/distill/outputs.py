"""What a finished plan of classifiers leaves: results, report, figures and the best student."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxkd import evaluate, weights
from jaxkd.distill._stage_run import TrainedModel
from jaxkd.distill.distributed import is_primary_process
from jaxkd.distill.plan import Entry, teacher_baselines
from jaxkd.distill.runner import evaluate_plan
from jaxkd.runs import ResultRow, Run, report


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
    rows: list[ResultRow]
    trained: Mapping[str, Sequence[TrainedModel]]


def save_results(
    run: Run,
    plan: Sequence[Entry],
    trained: Mapping[str, Sequence[TrainedModel]],
    test: Mapping[str, Any],
    *,
    title: str,
    class_names: Sequence[str],
    students: Sequence[str],
    comparisons: Sequence[tuple[str, str]],
    reference: str = "teacher",
    unlisted: Sequence[str] = (),
    make_remarks: Callable[[Sequence[ResultRow], Path], Sequence[str]] | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    **kwargs: Any,
) -> RunOutputs:
    """Measures a plan of classifiers; saves results, report, figures and the best student.

    Rows of a finished run in which nothing has changed are not measured again.

    Args:
        run: The run, from `open_run`.
        plan: The plan.
        trained: The trained models, from `run_plan`.
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
        **kwargs: Further arguments of `evaluate_plan`.

    Returns:
        Folder, rows and models.
    """
    listed = [entry for entry in plan if entry.name not in unlisted]
    rows = evaluate_plan(listed, trained, test, reference=reference, run=run, **kwargs)
    outputs = RunOutputs(run.folder, rows, trained)
    if not is_primary_process():
        return outputs
    variables = {name: seeds[0].variables for name, seeds in trained.items()}
    teachers = teacher_baselines(plan, variables)
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
