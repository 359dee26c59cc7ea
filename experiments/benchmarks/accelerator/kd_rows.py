"""Test accuracy of ResNet-20 distilled from ResNet-56 on CIFAR-10 (JPEG), by method.

The recipes of `jaxkd.distill.methods` with the weights that RepDistiller and mdistiller
use for this pair on CIFAR-100, and RepDistiller's optimizer: SGD with momentum 0.9, learning rate
0.05 for a batch of 64, divided by 10 at 150/240, 180/240 and 210/240 of the training, weight decay
5e-4. CRD has the other images of the batch as negatives, not a bank.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.benchmarks import training_cases
from experiments.benchmarks.accelerator import cifar, students
from experiments.benchmarks.accelerator.measurement import Context, Outcome
from jaxkd import distill, losses, models, runs
from jaxkd.distill.methods import Method, make_loss
from jaxkd.distill.terms import (
    attention_term,
    crd_term,
    dist_term,
    init_crd,
    on_logits,
    on_logits_and_labels,
)

STAGES = ("stage1", "stage2", "stage3")
TEMPERATURE = 4.0
LABELS = "labels"


class Options(NamedTuple):
    """Options of the measurement.

    Attributes:
        method: A name of `METHODS`, or `LABELS` for the student alone.
        epochs: Passes over the training images.
        seeds: Number of seeds.
        teacher_epochs: Passes of the teacher.
        teacher: Arguments of the teacher, a `models.CifarResNet`.
        student: Arguments of the student.
        batch_size: Images per step.
    """

    method: str
    epochs: int = 60
    seeds: int = 3
    teacher_epochs: int = 60
    teacher: tuple = training_cases.RESNET_56.arguments
    student: tuple = training_cases.RESNET_20.arguments
    batch_size: int = 64


def tiny(method: str) -> Options:
    """Returns options with which a CPU takes seconds."""
    return Options(method, 1, 2, 1, cifar.TINY_RESNET, cifar.TINY_RESNET, 16)


METHODS = {
    # 0.9 : 0.1, as the cross-entropy has the weight 1.
    "kd": Method(9.0, on_logits(losses.kl_divergence, temperature=TEMPERATURE)),
    "dkd": Method(
        1.0,
        on_logits_and_labels(losses.decoupled_loss, temperature=TEMPERATURE, non_target_weight=2.0),
    ),
    "dist": Method(2.0, functools.partial(dist_term, temperature=TEMPERATURE)),
    "at": Method(1000.0, functools.partial(attention_term, layers=STAGES)),
    "crd": Method(0.8, crd_term),
}
"""Methods by name."""


def measure(options: Options, context: Context) -> Outcome:
    """Trains the teacher, if no other row has, and the student for each seed."""
    dataset = cifar.load(context)
    model = cifar.make_resnet(options.student, dataset, bf16=False)
    make_stage = functools.partial(
        cifar.make_stage,
        "student",
        model,
        dataset,
        epochs=options.epochs,
        batch_size=options.batch_size,
    )
    plan: tuple[Any, ...]
    if options.method == LABELS:
        plan = (make_stage(cifar.supervised_loss),)
        teacher_accuracy = None
    else:
        teacher = cifar.train_teacher(
            context,
            dataset,
            arguments=options.teacher,
            epochs=options.teacher_epochs,
            batch_size=options.batch_size,
            bf16=False,
        )
        method = METHODS[options.method]
        init = None
        if method.term is crd_term:
            init = functools.partial(
                init_crd,
                student_units=_count_units(model),
                teacher_units=_count_units(teacher.model),
            )
        stage = make_stage(make_loss(method), teachers=("teacher",), init_loss=init)
        plan = (teacher, stage)
        teacher_accuracy = cifar.measure_accuracy(teacher.model, teacher.variables, dataset)
    is_vectorized = students.is_vectorizing_faster(context.folder)
    placement = distill.single_device()
    if is_vectorized:
        placement = distill.VectorizedPlacement(distill.make_mesh(), options.seeds)
    run = runs.open_run(context.scratch / "run", options._asdict(), arrays=dataset.train)
    trained = distill.run_plan(
        plan,
        range(options.seeds),
        run,
        validation=dataset.validation.examples,
        placement=placement,
        evaluations=min(options.epochs, 6),
    )["student"]
    accuracies = [cifar.measure_accuracy(model, seed.variables, dataset) for seed in trained]
    results = {
        "method": options.method,
        "epochs": options.epochs,
        "train_images": len(dataset.train.labels),
        "test_accuracies": accuracies,
        "seconds": [seed.seconds for seed in trained],
        "vectorized": is_vectorized,
        "teacher_test_accuracy": teacher_accuracy,
    }
    mean, deviation = 100 * np.mean(accuracies), 100 * np.std(accuracies, ddof=1)
    return Outcome(f"{mean:.2f} ± {deviation:.2f} % on test", options.seeds, results)


def _count_units(model: models.Model) -> int:
    """Returns the number of features before the classifier."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)

    def get_features(key: jax.Array, images: jax.Array) -> jax.Array:
        outputs, _ = model.apply(model.init(key, images), images, train=False)
        return outputs.features["pre_logits"]

    return jax.eval_shape(get_features, jax.random.key(0), images).shape[-1]
