"""Compares methods of distillation on a small network that has few images.

Question: which method improves the student most?

The teacher learns from all training images. The students have one architecture and see --num-images
images with their labels. One student learns from the labels alone. Each of the others also learns
from the teacher by one method of `jaxkd.losses`: from its logits, its features, relations between
examples or contrasts. Parameters of a method, such as a projector, are trained with the student and
are not part of it.

The weight of each method's term is the best of three, a factor of 10 apart, by the validation
accuracy of one training with another seed than those of the comparison; --tune chooses it again.

Papers: see the catalogue in docs/api/catalogue.md

Command: python -m experiments.methods

Result: labels alone 82.0 %, dist 84.5 %, kd 84.1 %, reverse_kd 83.9 %, nkd 83.8 %; no method on
features or relations helps (fashion_mnist_mini, 1,000 images, 3 seeds)

Time: 18 minutes on 2 busy CPU cores
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments.common import cli, images, plans
from experiments.common.images import STUDENT, TEACHER
from jaxkd import data, distill, losses
from jaxkd.distill import terms
from jaxkd.distill.methods import (
    METHODS,
    Method,
    make_loss,
    make_method,
    supervised_loss,
)
from jaxkd.distill.terms import EMBEDDING_SIZE, on_features
from jaxkd.models import Outputs

FACTORS = {"tenth": 0.1, "once": 1.0, "tenfold": 10.0}
"""What the weights are multiplied by when they are tuned."""
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
    tune: bool = False
    """First trains each method with a tenth, once and ten times its weight, with the seed after
    those of the comparison, and takes the weight with the best validation accuracy. By default the
    weights are those that such a tuning has found."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        super().check()
        cli.select_names(self.only, make_methods(self))


def vid_term(student, teacher, batch, context):
    """Computes the variational bound on shared information."""
    return losses.variational_information_loss(
        context.params, student.features["stage1"], teacher.features["stage1"]
    )


def fsp_term(student, teacher, batch, context):
    """Computes the distance of flow matrices, after the student's channels are projected."""
    student_maps = [
        losses.project(context.params[name], features)
        for name, features in _pool_to_one_size(student.features).items()
    ]
    teacher_maps = _pool_to_one_size(teacher.features).values()
    return losses.flow_of_solution_procedure_loss(*student_maps, *teacher_maps)


def semckd_term(student, teacher, batch, context):
    """Computes semantic calibration, in which attention pairs the layers."""
    return losses.semantic_calibration_loss(
        context.params,
        [student.features[name] for name in STAGES],
        [teacher.features[name] for name in STAGES],
    )


def make_methods(config: Config) -> dict[str, Method]:
    """Makes the methods by name."""
    student_channels, _ = STUDENT
    teacher_channels, _ = TEACHER

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

    def init_semckd(key):
        return losses.init_semantic_calibration(
            key, student_channels, teacher_channels, EMBEDDING_SIZE
        )

    student, teacher = map(_describe_outputs, (STUDENT, TEACHER))
    by_name = {
        name: make_method(name, student, teacher, temperature=config.temperature)
        for name in METHODS
    }
    return by_name | {
        # At the first stage, where both have as many positions, and with the weight for it.
        "hint": Method(1000.0, functools.partial(terms.hint_term, layer="stage1"), init_hint),
        "attention": Method(10_000.0, on_features(losses.attention_transfer_mse_loss, "stage1")),
        "vid": Method(10.0, vid_term, init_vid),
        "nst": Method(500.0, on_features(losses.neuron_selectivity_loss, "stage1")),
        "fsp": Method(0.001, fsp_term, init_fsp),
        "semckd": Method(10.0, semckd_term, init_semckd),
    }


def _describe_outputs(architecture: tuple[tuple[int, ...], int]) -> Outputs:
    """Returns the shapes of a network's outputs, whose maps have the size of the other's."""
    channels, units = architecture
    shapes = {name: (1, 1, 1, count) for name, count in zip(STAGES, channels, strict=True)}
    shapes |= {"logits": (1, 10), "pre_logits": (1, units)}
    arrays: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()
    }
    return Outputs(arrays.pop("logits"), arrays)


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


def make_plan(
    config: Config, dataset: data.Dataset, methods: Mapping[str, Method]
) -> tuple[distill.Stage, ...]:
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
    for name, method in methods.items():
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


def tune(config: Config, dataset: data.Dataset, methods: Mapping[str, Method]) -> dict[str, Method]:
    """Returns the methods with the best of three weights each, by validation accuracy."""
    config = dataclasses.replace(
        config,
        seed=config.seed + config.num_seeds,
        num_seeds=1,
        # Beside the folder of the comparison, which has other stages.
        workdir=config.workdir and f"{config.workdir.rstrip('/')}_tuning",
    )
    candidates = {
        f"{name}_{label}": method._replace(weight=float(f"{factor * method.weight:g}"))
        for name, method in methods.items()
        for label, factor in FACTORS.items()
    }
    plan = make_plan(config, dataset, candidates)
    run = images.open_run("methods_tuning", config, dataset)
    trained = distill.run_plan(
        plan, run=run, validation=dataset.validation.examples, **plans.run_options(config, plan)
    )
    tuned = {}
    for name in methods:
        best, _ = distill.find_best(trained, [f"{name}_{label}" for label in FACTORS])
        tuned[name] = candidates[best]
        accuracies = (
            f"{candidates[f'{name}_{label}'].weight:g}: "
            f"{100 * trained[f'{name}_{label}'][0].validation_accuracy:.1f}"
            for label in FACTORS
        )
        print(f"weight of {name}, validation accuracy in %: {', '.join(accuracies)}")
    return tuned


def main(config: Config) -> None:
    """Trains all networks, compares them and writes the report."""
    config.check()
    dataset = images.load(config)
    known = make_methods(config)
    methods = {name: known[name] for name in cli.select_names(config.only, known)}
    if config.tune:
        methods = tune(config, dataset, methods)
    plan = make_plan(config, dataset, methods)
    run = images.open_run("methods", config, dataset)
    trained = distill.run_plan(
        plan, run=run, validation=dataset.validation.examples, **plans.run_options(config, plan)
    )
    weights = ", ".join(f"{name} {method.weight:g}" for name, method in methods.items())
    distill.save_results(
        run,
        plan,
        trained,
        dataset.test.examples,
        title="Methods of distillation, side by side",
        class_names=dataset.class_names,
        students=["labels", *methods],
        comparisons=[(name, "labels") for name in methods],
        make_remarks=lambda rows, folder: [f"Weights beside a cross-entropy of 1: {weights}."],
    )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
