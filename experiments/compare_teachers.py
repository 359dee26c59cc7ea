"""Compares teachers of different depth, and methods of distillation, for one small network.

Question: does a small network learn more from a deeper teacher, and with which method?

ResNets of --depths layers learn from all training images. A ResNet of --student-depth layers sees
--num-images images with their labels. It learns from the labels alone, and from each teacher by
each method, whose term is added to the cross-entropy with the labels. All students of a seed see
the same images and take the same number of steps.

Terms and weights are those of RepDistiller, the code of Tian et al. The dkd term and its weight are
its authors' for ResNets of one width, without their warm-up. The negatives of crd are the other
images of the batch. Nothing is tuned to these images.

Papers: see the catalogue in docs/api/catalogue.md; Mirzadeh et al. on teachers that are too large
for their student, https://arxiv.org/abs/1902.03393; Tian et al. on the methods,
https://arxiv.org/abs/1910.10699

Command: python -m experiments.compare_teachers

On an accelerator: python -m experiments.compare_teachers --dataset cifar10 --depths 32 56 110
--student-depth 20 --width 16 --num-images None --epochs 200 --student-epochs 200 --batch-size 128
--learning-rate 3e-3 --augment --only kd dkd attention crd

Result: alone 75.3 %; with a ResNet-14 as teacher dkd 77.7 %, hint 77.2 %, rkd 77.2 %, kd 76.8 %,
similarity 75.1 %, crd 74.9 %, attention 72.7 %; a ResNet-20 is not a better teacher than a ResNet-8
(fashion_mnist_mini, 3 seeds)

Time: 9.5 minutes on 2 CPU cores
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import methods
from experiments.common import cli, images, plans
from experiments.common.options import num_steps
from jaxkd import data, distill, losses, models
from jaxkd.distill.methods import Method, make_loss, supervised_loss
from jaxkd.distill.terms import (
    attention_term,
    hint_term,
    init_crd,
    on_features,
    on_logits_and_labels,
)
from jaxkd.runs import ResultRow, figures

STAGES = ("stage1", "stage2", "stage3")
"""The features after each stage of residual blocks."""


@dataclasses.dataclass(frozen=True)
class Config(images.SoftTargetOptions):
    """Options of the experiment."""

    depths: tuple[int, ...] = (8, 14, 20)
    """Numbers of layers of the teachers, each 6n + 2."""
    student_depth: int = 8
    """Number of layers of the student, 6n + 2."""
    width: int = 8
    """Channels of the first stage of blocks, in teachers and student. The second stage has twice as
    many and the third four times as many."""
    epochs: int = 2
    """Passes of each teacher over the training images."""
    student_epochs: int = 16
    """Passes of each student over its images."""
    batch_size: int = 32
    """Number of images in a training step."""
    learning_rate: float = 1e-2
    """Initial learning rate of Adam. It falls to 0 along a cosine."""
    num_images: int | None = 500
    """Number of training images that the students see, balanced over classes. Each seed draws its
    own. `None` for all images."""
    only: tuple[str, ...] = ()
    """Names of the methods to compare. By default all of them."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        super().check()
        for depth in self.depths:
            _check_depth("--depths", depth)
        _check_depth("--student-depth", self.student_depth)
        listed = " ".join(map(str, self.depths))
        cli.require(len(self.depths) > 0, "--depths: needs at least one depth")
        cli.require(
            len(set(self.depths)) == len(self.depths), f"--depths {listed}: the depths must differ"
        )
        cli.require(self.width >= 1, f"--width {self.width}: needs at least 1 channel")
        cli.require(
            self.student_epochs >= 1, f"--student-epochs {self.student_epochs}: needs at least 1"
        )
        cli.require(
            self.alpha < 1,
            f"--alpha {self.alpha}: must be below 1, so that the labels have a weight",
        )
        cli.select_names(self.only, make_methods(self))


def _check_depth(option: str, depth: int) -> None:
    cli.require(
        depth >= 8 and depth % 6 == 2, f"{option} {depth}: choose from 8, 14, 20 and so on, 6n + 2"
    )


def make_methods(config: Config) -> dict[str, Method]:
    """Makes the methods by name."""
    shared = methods.make_methods(methods.Config(temperature=config.temperature))

    def init_hint(key):
        return losses.init_projector(key, 2 * config.width, 2 * config.width)

    def init_projectors(key):
        return init_crd(key, 4 * config.width, 4 * config.width)

    dkd = on_logits_and_labels(
        losses.decoupled_loss, temperature=config.temperature, non_target_weight=2.0
    )
    hint = functools.partial(hint_term, layer="stage2")
    attention = functools.partial(attention_term, layers=STAGES)
    similarity = on_features(losses.similarity_preserving_loss, "stage3")
    return {
        # alpha : 1 - alpha, as the cross-entropy has the weight 1.
        "kd": shared["kd"]._replace(weight=config.alpha / (1 - config.alpha)),
        "dkd": Method(1.0, dkd),
        "hint": Method(100.0, hint, init_hint),
        "attention": Method(1000.0, attention),
        "similarity": Method(3000.0, similarity),
        "rkd": shared["rkd"]._replace(weight=1.0),
        "crd": shared["crd"]._replace(weight=0.8, init=init_projectors),
    }


def select_methods(config: Config) -> dict[str, Method]:
    """Returns the methods that the options select."""
    known = make_methods(config)
    return {name: known[name] for name in cli.select_names(config.only, known)}


def make_resnet(depth: int, config: Config, dataset: data.Dataset) -> models.Model:
    """Makes a ResNet of this depth for the uint8 images of a data set.

    Raises:
        OptionError: If the images are too small for it.
    """
    widths = (config.width, config.width, 2 * config.width, 4 * config.width)
    module = models.CifarResNet((depth - 2) // 6, widths, num_classes=len(dataset.class_names))
    train_images = dataset.train.images
    model = images.make_network(module, *data.channel_statistics(train_images), config)
    images.infer_shapes(model, train_images)
    return model


def make_plan(config: Config, dataset: data.Dataset) -> tuple[distill.Stage, ...]:
    """Makes the stages: the teachers, a student alone, and one for each method and teacher."""
    all_images = dataset.train.examples
    count = len(dataset.train.labels) if config.num_images is None else config.num_images
    few_images, _ = data.few_labels(dataset.train.examples, count)
    networks = {
        depth: make_resnet(depth, config, dataset)
        for depth in (*config.depths, config.student_depth)
    }
    teacher_stage = functools.partial(
        images.make_stage,
        examples=all_images,
        options=config,
        steps=images.num_steps(config, dataset),
    )
    student_stage = functools.partial(
        images.make_stage,
        model=networks[config.student_depth],
        examples=few_images,
        options=config,
        # Epochs over the student's images, of which there are fewer than of the teacher's.
        steps=num_steps(config, count, epochs=config.student_epochs),
    )
    stages = [
        teacher_stage(f"resnet{depth}", networks[depth], loss=supervised_loss)
        for depth in config.depths
    ]
    stages.append(student_stage("alone", loss=supervised_loss))
    for name, method in select_methods(config).items():
        for depth in config.depths:
            stages.append(
                student_stage(
                    f"{name}_resnet{depth}",
                    loss=make_loss(method),
                    teachers=(f"resnet{depth}",),
                    init_loss=method.init,
                )
            )
    return tuple(stages)


def plot_depths(rows: Sequence[ResultRow], path: Path, config: Config) -> None:
    """Draws the accuracy against the teacher's depth: the teachers above, the students below."""
    accuracies = {
        row.name: (100 * (row.accuracy_mean or 0), 100 * (row.accuracy_std or 0)) for row in rows
    }
    positions = np.arange(len(config.depths))

    def plot_line(axes: Any, prefix: str, *, shift: float = 0.0, **style: Any) -> None:
        points = [accuracies[f"{prefix}resnet{depth}"] for depth in config.depths]
        means, stds = zip(*points, strict=True)
        axes.errorbar(positions + shift, means, yerr=stds, marker="o", ms=5, capsize=3, **style)

    names = list(select_methods(config))
    # Shifted to the side, so that no error bar hides another.
    shifts = np.linspace(-0.18, 0.18, len(names))
    with figures.new_figure(path, 7.5, 6) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
        plot_line(above, "", color="#666666")
        mean, std = accuracies["alone"]
        below.axhline(mean, color="#666666", ls="--", label="alone (± std)")
        below.axhspan(mean - std, mean + std, color="#666666", alpha=0.12, lw=0)
        for name, colour, shift in zip(names, figures.COLOURS, shifts, strict=False):
            plot_line(below, f"{name}_", shift=shift, color=colour, label=name, lw=1.2)
        above.set(title="The teachers", ylabel="accuracy (%)")
        below.set(
            title=f"ResNet-{config.student_depth}, taught by them",
            ylabel="test accuracy (%)",
            xlabel="teacher",
        )
        below.set_xticks(positions, [f"ResNet-{depth}" for depth in config.depths])
        figure.legend(loc="outside right center")


def main(config: Config) -> None:
    """Trains all networks, compares them and writes the report."""
    config.check()
    dataset = images.load(config)
    plan = make_plan(config, dataset)
    students = [stage.name for stage in plan[len(config.depths) :]]
    shallowest = f"resnet{min(config.depths)}"
    deepest = f"resnet{max(config.depths)}"
    comparisons = [(name, "alone") for name in students[1:]]
    if deepest != shallowest:
        comparisons += [
            (f"{name}_{deepest}", f"{name}_{shallowest}") for name in select_methods(config)
        ]
    run = images.open_run("compare_teachers", config, dataset)
    trained = distill.run_plan(
        plan, run=run, validation=dataset.validation.examples, **plans.run_options(config, plan)
    )
    outputs = distill.save_results(
        run,
        plan,
        trained,
        dataset.test.examples,
        title="A ladder of teachers",
        class_names=dataset.class_names,
        students=students,
        comparisons=comparisons,
        reference=deepest,
    )
    if distill.is_primary_process():
        path = outputs.folder / "depths.png"
        plot_depths(outputs.rows, path, config)
        print(f"Accuracy against the teacher's depth: {path}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
