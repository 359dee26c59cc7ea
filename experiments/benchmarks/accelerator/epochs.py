"""A whole distillation on CIFAR-10 (JPEG): ResNet-20 from ResNet-56, seconds and accuracy.

The teacher is trained first, which does not count. The student then learns for some epochs of
cropped and flipped images, with the teacher's forward pass in every step, through `run_plan`, which
evaluates it after each epoch. The first epoch compiles and is reported apart.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.benchmarks import training_cases
from experiments.benchmarks.accelerator import cifar
from experiments.benchmarks.accelerator.measurement import Context, Outcome
from jaxkd import distill, evaluate, losses, models, runs
from jaxkd.models import Outputs

TEMPERATURE = 4.0
ALPHA = 0.9


class Options(NamedTuple):
    """Options of the measurement.

    Attributes:
        epochs: Passes of the student over the training images.
        teacher_epochs: Passes of the teacher.
        teacher: Arguments of the teacher, a `models.CifarResNet`.
        student: Arguments of the student.
        batch_size: Images per step.
        bf16: Computes in bfloat16, with float32 weights and losses.
    """

    epochs: int = 30
    teacher_epochs: int = 30
    teacher: tuple = training_cases.RESNET_56.arguments
    student: tuple = training_cases.RESNET_20.arguments
    batch_size: int = 128
    bf16: bool = True


TINY = Options(2, 1, cifar.TINY_RESNET, cifar.TINY_RESNET, 16, False)


def distillation_loss(
    student: Outputs,
    teachers: tuple[Outputs, ...],
    batch: distill.Batch,
    context: distill.LossContext,
) -> jax.Array:
    """Computes the distillation loss."""
    return losses.distillation_loss(
        student.logits, teachers[0].logits, batch["labels"], temperature=TEMPERATURE, alpha=ALPHA
    )


def measure(options: Options, context: Context) -> Outcome:
    """Trains teacher and student."""
    dataset = cifar.load(context)
    teacher = cifar.train_teacher(
        context,
        dataset,
        arguments=options.teacher,
        epochs=options.teacher_epochs,
        batch_size=options.batch_size,
        bf16=options.bf16,
    )
    model = cifar.make_resnet(options.student, dataset, bf16=options.bf16)
    stage = cifar.make_stage(
        "student",
        model,
        dataset,
        distillation_loss,
        epochs=options.epochs,
        batch_size=options.batch_size,
        teachers=("teacher",),
    )
    run = runs.open_run(context.scratch / "run", options._asdict(), arrays=dataset.train)
    stamps: list[float] = []
    start = time.perf_counter()
    trained = distill.run_plan(
        (teacher, stage),
        [0],
        run,
        validation=dataset.validation.examples,
        evaluations=options.epochs,
        make_score=functools.partial(make_timed_score, stamps=stamps),
    )
    whole_seconds = time.perf_counter() - start
    (student,) = trained["student"]
    accuracy = cifar.measure_accuracy(model, student.variables, dataset)
    # The teacher is scored first.
    epoch_seconds = np.diff(stamps[-options.epochs :]).tolist()
    # A run that goes on has seen a part of its epochs only.
    is_whole = len(stamps) > options.epochs
    seconds = options.epochs * float(np.median(epoch_seconds)) if is_whole else None
    results = {
        "seconds": seconds,
        "whole_seconds": whole_seconds if is_whole else None,
        "epoch_seconds": epoch_seconds,
        "epochs": options.epochs,
        "train_images": len(dataset.train.labels),
        "test_accuracy": accuracy,
        "teacher_test_accuracy": cifar.measure_accuracy(teacher.model, teacher.variables, dataset),
    }
    time_text = "resumed, so not timed" if seconds is None else f"{seconds:.1f} s"
    return Outcome(f"{time_text} for {options.epochs} epochs, {accuracy:.2%} on test", 1, results)


def make_timed_score(model: models.Model, stamps: list[float]) -> Callable:
    """Makes the score of a classifier, which also notes the time of each evaluation."""
    score = evaluate.make_classifier_score(evaluate.make_predict(model))

    def timed_score(variables: dict, examples: Mapping[str, Any]) -> evaluate.Score:
        result = score(variables, examples)
        stamps.append(time.perf_counter())
        return result

    return timed_score
