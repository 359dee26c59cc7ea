"""Sweeps the temperature and the weight of the soft targets.

Question: which temperature is best, and how much weight should the soft targets have?

The teacher learns from all training images. A small network sees --num-images images with their
labels. It learns from the labels alone, or from the labels and the soft targets, for every pair of
a temperature and a weight alpha. The pair with the highest validation accuracy is the best one. Its
gain is reported on the test images.

Students that differ only in temperature, alpha and seed share one compiled program. --max-students
sets how many of them train at the same time.

Paper: Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531

Command: python -m experiments.sweep

On an accelerator: python -m experiments.sweep --dataset cifar10 --num-images 5000 --epochs 40
--num-seeds 10

Result: T = 2 with alpha = 0.5 is best by validation, 83.7 %; on the test images it reaches
84.0 ± 0.5 %, and the labels alone 82.0 ± 1.3 % (fashion_mnist_mini, 1,000 images, 3 seeds)

Time: 6 minutes on 2 CPU cores
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import cli, images, plans
from experiments.common.images import STUDENT, TEACHER
from jaxkd import data, distill, losses
from jaxkd.distill import Batch, LossContext, TrainedModel
from jaxkd.distill.methods import supervised_loss
from jaxkd.models import Outputs
from jaxkd.runs import figures, report


@dataclasses.dataclass(frozen=True)
class Config(images.Options):
    """Options of the experiment."""

    epochs: int = 4
    """Passes of the teacher over the training images. The students take the same number of steps on
    their own images."""
    learning_rate: float = 3e-3
    """Initial learning rate of Adam. It falls to 0 along a cosine."""
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    """The temperatures, each above 0."""
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """The weights of the soft targets, each from 0 to 1. The labels have the rest."""
    num_images: int = 1000
    """Number of training images that the students see. Each seed draws its own."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        super().check()
        for name, values in (("temperatures", self.temperatures), ("alphas", self.alphas)):
            listed = " ".join(f"{value:g}" for value in values)
            cli.require(len(values) > 0, f"--{name}: needs at least one value")
            cli.require(
                len(set(values)) == len(values), f"--{name} {listed}: the values must differ"
            )
        for temperature in self.temperatures:
            cli.require(
                temperature > 0 and math.isfinite(temperature),
                f"--temperatures {temperature:g}: each must be above 0",
            )
        for alpha in self.alphas:
            cli.require(
                0 <= alpha <= 1,
                f"--alphas {alpha:g}: the weight of the soft targets must be from 0 to 1",
            )


def soft_target_loss(
    student: Outputs, teachers: tuple[Outputs, ...], batch: Batch, context: LossContext
) -> Any:
    """Computes the distillation loss with the temperature and the alpha of the batch."""
    (teacher,) = teachers
    return losses.distillation_loss(
        student.logits,
        teacher.logits,
        batch["labels"],
        temperature=batch["temperature"],
        alpha=batch["alpha"],
    )


def stage_name(temperature: float, alpha: float) -> str:
    """Returns the name of the stage with this temperature and alpha."""
    return f"T{temperature:g}_alpha{alpha:g}"


def make_plan(config: Config, dataset: data.Dataset) -> tuple[distill.Stage, ...]:
    """Makes the stages: the teacher, a student without it, and a student for each pair."""
    teacher = images.make_cnn(*TEACHER, dataset, config)
    student = images.make_cnn(*STUDENT, dataset, config)
    # Cached, so that all students of a seed share one copy of its images.
    few_images = functools.cache(data.few_labels(dataset.train.examples, config.num_images)[0])
    stage = functools.partial(
        images.make_stage, options=config, steps=images.num_steps(config, dataset)
    )
    distilled = stage(
        "distilled",
        student,
        few_images,
        soft_target_loss,
        teachers=("teacher",),
        cache_teachers=config.can_cache_teachers,
    )

    def make_student(temperature: float, alpha: float) -> distill.Stage:
        # The numbers are data of the stage, not constants of its loss, so that one program serves
        # all pairs.
        scalars = {"temperature": np.float32(temperature), "alpha": np.float32(alpha)}
        return dataclasses.replace(
            distilled,
            name=stage_name(temperature, alpha),
            data=lambda seed: {**few_images(seed), **scalars},
        )

    return (
        stage("teacher", teacher, dataset.train.examples, supervised_loss),
        stage("labels", student, few_images, supervised_loss),
        *(
            make_student(temperature, alpha)
            for temperature in config.temperatures
            for alpha in config.alphas
        ),
    )


def plot_heatmap(
    trained: Mapping[str, Sequence[TrainedModel]], path: Path, config: Config, best: str
) -> None:
    """Draws the validation accuracy of each pair as a heat map, with a frame around the best."""

    def accuracies(name: str) -> list[float]:
        return [100 * model.validation_accuracy for model in trained[name]]

    names = [
        [stage_name(temperature, alpha) for temperature in config.temperatures]
        for alpha in config.alphas
    ]
    by_seed = np.array([[accuracies(name) for name in row] for row in names])
    means = by_seed.mean(-1)
    stds = by_seed.std(-1, ddof=1) if config.num_seeds > 1 else None
    middle = (means.min() + means.max()) / 2
    width = 2.5 + 1.15 * len(config.temperatures)
    height = 1.8 + 0.6 * len(config.alphas)
    with figures.new_figure(path, width, height) as figure:
        axes = figure.subplots()
        image = axes.imshow(means, aspect="auto", cmap="cividis")
        for (row, column), mean in np.ndenumerate(means):
            text = f"{mean:.1f}" if stds is None else f"{mean:.1f} ± {stds[row, column]:.1f}"
            colour = "black" if mean > middle else "white"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
            if names[row][column] == best:
                x = column + np.array([-0.5, 0.5, 0.5, -0.5, -0.5])
                y = row + np.array([-0.5, -0.5, 0.5, 0.5, -0.5])
                # Not clipped, or a frame at the border would lose half of its width.
                axes.plot(x, y, color="#D55E00", lw=2.5, clip_on=False)
        axes.set_xticks(
            range(len(config.temperatures)), [f"{value:g}" for value in config.temperatures]
        )
        axes.set_yticks(range(len(config.alphas)), [f"{value:g}" for value in config.alphas])
        axes.grid(visible=False)
        alone = np.mean(accuracies("labels"))
        axes.set(
            xlabel="temperature",
            ylabel="alpha, weight of the soft targets",
            title=f"Validation accuracy (%); labels alone {alone:.1f}",
        )
        figure.colorbar(image, ax=axes)


def main(config: Config) -> None:
    """Trains all networks, writes the report and draws the heat map."""
    config.check()
    dataset = images.load(config)
    plan = make_plan(config, dataset)
    students = [stage.name for stage in plan[2:]]
    run = images.open_run("sweep", config, dataset)
    trained = distill.run_plan(
        plan, run=run, validation=dataset.validation.examples, **plans.run_options(config, plan)
    )
    outputs = distill.save_results(
        run,
        plan,
        trained,
        dataset.test.examples,
        title="Temperature and alpha",
        class_names=dataset.class_names,
        students=students,
        comparisons=[],
    )
    if not distill.is_primary_process():
        return
    best, _ = distill.find_best(outputs.trained, students)
    path = outputs.folder / "heatmap.png"
    plot_heatmap(outputs.trained, path, config, best)
    comparison = report.compare_rows(outputs.rows, best, "labels")
    print(f"Best by validation: {best}. On the test images: {comparison}")
    print(f"Validation accuracy of each pair: {path}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
