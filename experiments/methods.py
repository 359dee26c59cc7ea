"""Compares methods of distillation on a small network that has few images.

Question: which method improves the student most?

The teacher learns from all training images. The students have one architecture and see --num-images
images with their labels. One student learns from the labels alone. Each of the others also learns
from the teacher by one method of `jaxkd.losses`: from its logits, its features, relations between
examples or contrasts. Parameters of a method, such as a projector, are trained with the student and
are not part of it.

The weight of each method's term is the best of three, a factor of 10 apart, by the validation
accuracy of one training with another seed than those below.

Papers: see the catalogue in docs/api/catalogue.md

Command: python -m experiments.methods

Result: labels alone 82.0 %, dist 84.5 %, kd 84.1 %, reverse_kd 83.9 %, nkd 83.8 %; no method on
features or relations helps (fashion_mnist_mini, 1,000 images, 3 seeds)

Time: 18 minutes on 2 busy CPU cores
"""

import dataclasses
import functools
from typing import Any

import jax

from experiments.common import cli, images, plans
from jaxkd import data, distill, losses
from jaxkd.distill.methods import (
    EMBEDDING_SIZE,
    Method,
    crd_term,
    dist_term,
    dkd_term,
    hint_term,
    make_loss,
    nkd_term,
    on_features,
    on_logits,
    rkd_term,
    standardized_kd_term,
    supervised_loss,
)

TEACHER = ((64, 128), 128)
STUDENT = ((16, 32), 32)
"""Channels of the convolutions, and units before the logits."""
STAGES = ("stage1", "stage2")
"""The features after each convolution."""


@dataclasses.dataclass(frozen=True)
class Config(images.SoftTargetOptions):
    """Options of the experiment."""

    epochs: int = 4
    """Passes of the teacher over the training images. The students take the same number of steps on
    their own images."""
    learning_rate: float = 3e-3
    """Initial learning rate of Adam. It falls to 0 along a cosine."""
    num_images: int = 1000
    """Number of training images that the students see. Each seed draws its own."""
    only: tuple[str, ...] = ()
    """Names of the methods to compare. By default all of them."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        super().check()
        cli.select_names(self.only, make_methods(self))


def vid_term(student, teacher, batch, params):
    """Computes the variational bound on shared information."""
    return losses.variational_information_loss(
        params, student.features["stage1"], teacher.features["stage1"]
    )


def fsp_term(student, teacher, batch, params):
    """Computes the distance of flow matrices, after the student's channels are projected."""
    student_maps = [
        losses.project(params[name], features)
        for name, features in _pool_to_one_size(student.features).items()
    ]
    teacher_maps = _pool_to_one_size(teacher.features).values()
    return losses.flow_of_solution_procedure_loss(*student_maps, *teacher_maps)


def semckd_term(student, teacher, batch, params):
    """Computes semantic calibration, in which attention pairs the layers."""
    return losses.semantic_calibration_loss(
        params,
        [student.features[name] for name in STAGES],
        [teacher.features[name] for name in STAGES],
    )


def make_methods(config: Config) -> dict[str, Method]:
    """Makes the methods by name."""
    temperature = config.temperature
    student_channels, student_units = STUDENT
    teacher_channels, teacher_units = TEACHER

    def init_hint(key):
        return losses.init_projector(key, student_channels[0], teacher_channels[0])

    def init_vid(key):
        return losses.init_variational_information(key, student_channels[0], teacher_channels[0])

    def init_fsp(key):
        channels = zip(STAGES, student_channels, teacher_channels, strict=True)
        return {
            name: losses.init_projector(jax.random.fold_in(key, narrow), narrow, wide)
            for name, narrow, wide in channels
        }

    def init_crd(key):
        units = {"student": student_units, "teacher": teacher_units}
        return {
            name: losses.init_projector(jax.random.fold_in(key, i), units[name], EMBEDDING_SIZE)
            for i, name in enumerate(units)
        }

    def init_semckd(key):
        return losses.init_semantic_calibration(
            key, student_channels, teacher_channels, EMBEDDING_SIZE
        )

    dkd = functools.partial(dkd_term, temperature=temperature, non_target_weight=8.0)
    return {
        "kd": Method(0.9, on_logits(losses.kl_divergence, temperature=temperature)),
        "reverse_kd": Method(
            90.0, on_logits(losses.reverse_kl_divergence, temperature=temperature)
        ),
        "jsd": Method(
            0.9, on_logits(losses.jensen_shannon_divergence, temperature=temperature, beta=0.5)
        ),
        "dkd": Method(10.0, dkd),
        "nkd": Method(1.0, nkd_term),
        "dist": Method(20.0, functools.partial(dist_term, temperature=temperature)),
        "standardized_kd": Method(9.0, standardized_kd_term),
        "hint": Method(1000.0, functools.partial(hint_term, layer="stage1"), init_hint),
        "attention": Method(10_000.0, on_features(losses.attention_transfer_mse_loss, "stage1")),
        "vid": Method(10.0, vid_term, init_vid),
        "nst": Method(500.0, on_features(losses.neuron_selectivity_loss, "stage1")),
        "fsp": Method(0.001, fsp_term, init_fsp),
        "similarity": Method(300.0, on_features(losses.similarity_preserving_loss, "pre_logits")),
        "rkd": Method(0.1, rkd_term),
        "pkt": Method(100.0, on_features(losses.probabilistic_transfer_loss, "pre_logits")),
        "cc": Method(10.0, on_features(losses.correlation_congruence_loss, "pre_logits")),
        "cka": Method(1.0, on_features(losses.linear_cka_loss, "pre_logits")),
        "crd": Method(0.08, crd_term, init_crd),
        "semckd": Method(10.0, semckd_term, init_semckd),
    }


def _pool_to_one_size(features: Any) -> dict[str, Any]:
    """Returns both stages in the size of the second, which a flow matrix needs."""
    first, second = (features[name] for name in STAGES)
    height, width = second.shape[1:3]
    # Max-pooled as the next layer sees it. Rows and columns that fill no window are left out.
    rows = first.shape[1] // height
    columns = first.shape[2] // width
    windows = first[:, : height * rows, : width * columns]
    windows = windows.reshape(len(first), height, rows, width, columns, first.shape[-1])
    return dict(zip(STAGES, (windows.max((2, 4)), second), strict=True))


def make_plan(config: Config, dataset: data.Dataset) -> tuple[distill.Stage, ...]:
    """Makes the stages: the teacher, a student without it, and a student for each method."""
    teacher = images.make_cnn(*TEACHER, dataset, config)
    student = images.make_cnn(*STUDENT, dataset, config)
    few_images, _ = data.few_labels(dataset.train.examples, config.num_images)
    stage = functools.partial(
        images.make_stage, options=config, steps=images.num_steps(config, dataset)
    )
    stages = [
        stage("teacher", teacher, dataset.train.examples, supervised_loss),
        stage("labels", student, few_images, supervised_loss),
    ]
    methods = make_methods(config)
    for name in cli.select_names(config.only, methods):
        method = methods[name]
        stages.append(
            stage(
                name,
                student,
                few_images,
                make_loss(method),
                teachers=("teacher",),
                init_loss=method.init,
            )
        )
    return tuple(stages)


def main(config: Config) -> None:
    """Trains all networks, compares them and writes the report."""
    config.check()
    dataset = images.load(config)
    plan = make_plan(config, dataset)
    students = [stage.name for stage in plan[1:]]
    run = images.open_run("methods", config, dataset)
    trained = distill.run_plan(
        plan, run=run, validation=dataset.validation.examples, **plans.run_options(config, plan)
    )
    distill.save_results(
        run,
        plan,
        trained,
        dataset.test.examples,
        title="Methods of distillation, side by side",
        class_names=dataset.class_names,
        students=students,
        comparisons=[(name, "labels") for name in students[1:]],
    )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
