"""Which temperature, and how much weight for the soft targets?

A teacher learns from all training images. A small network sees --num-images of them, with labels, and learns from the
labels alone, or from these and the soft targets under every pair of a temperature and their weight, alpha. The best
pair is the one with the highest validation accuracy; what it is worth is told on the test images.

Students that differ in temperature, alpha and seed are one program, trained at once or one after another: --at-once.

Paper: Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531

Command: python -m experiments.sweep
On an accelerator: python -m experiments.sweep --dataset cifar10 --num-images 5000 --epochs 40 --seeds 10

Result: T = 2 with alpha = 0.5 is best by validation, 83.7 %; on the test images it reaches 84.0 ± 0.5 %, and the labels
alone 82.0 ± 1.3 % (fashion_mnist_mini, 1,000 images, 3 seeds)

Time: 6 minutes on 2 CPU cores
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import cli, plans, vision
from jaxkd import data, distill, losses, parallel, report
from jaxkd.distill import Trained
from jaxkd.figures import draw
from jaxkd.models import Outputs
from jaxkd.train import Batch

TEACHER, STUDENT = ((64, 128), 128), ((16, 32), 32)
"""Channels of the convolutions, and width before the logits."""


@dataclasses.dataclass(frozen=True)
class Config(vision.Options):
    """Options of the experiment."""

    epochs: int = 4
    """Passes of the teacher over the training images; the students take as many steps on their own."""
    learning_rate: float = 3e-3
    """Adam's, at the start; it falls to 0 along a cosine."""
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    """The temperatures, each above 0."""
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """The weights of the soft targets, each from 0 to 1; the labels have the rest."""
    num_images: int = 1000
    """How many training images the students see; each seed draws its own."""

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        super().check()
        for name, values in (("temperatures", self.temperatures), ("alphas", self.alphas)):
            told = f"--{name} {' '.join(f'{value:g}' for value in values)}"
            cli.require(len(values) > 0, f"--{name}: at least one is needed")
            cli.require(len(set(values)) == len(values), f"{told}: each of them once")
        for value in self.temperatures:
            cli.require(value > 0 and math.isfinite(value), f"--temperatures {value:g}: each must be above 0")
        for value in self.alphas:
            cli.require(0 <= value <= 1, f"--alphas {value:g}: the weight of the soft targets lies from 0 to 1")


def taught(student: Outputs, teachers: tuple[Outputs, ...], batch: Batch) -> Any:
    """The loss, under the temperature and the alpha of the batch."""
    return losses.distillation_loss(
        student.logits, teachers[0].logits, batch["labels"], temperature=batch["temperature"], alpha=batch["alpha"]
    )


def cell(temperature: float, alpha: float) -> str:
    """Name of the stage with these two."""
    return f"T{temperature:g}_alpha{alpha:g}"


def make_plan(config: Config, dataset: data.Dataset) -> tuple[distill.Stage, ...]:
    """Who learns what from whom: stages that differ in numbers alone."""
    everything = {"inputs": dataset.train.images, "labels": dataset.train.labels}
    few = functools.cache(vision.few_labels(dataset, config.num_images)[0])
    teacher, student = (vision.cnn(*shape, dataset, config) for shape in (TEACHER, STUDENT))
    common: dict[str, Any] = {"options": config, "steps": vision.steps(config, dataset)}
    first = vision.stage(
        "first", student, few, taught, teachers=("teacher",), cache_teachers=config.caches_teachers, **common
    )

    def under(temperature: float, alpha: float) -> distill.Stage:
        numbers = {"temperature": np.float32(temperature), "alpha": np.float32(alpha)}
        return dataclasses.replace(first, name=cell(temperature, alpha), data=lambda seed: {**few(seed), **numbers})

    return (
        vision.stage("teacher", teacher, everything, plans.supervised, **common),
        vision.stage("labels", student, few, plans.supervised, **common),
        *(under(temperature, alpha) for temperature in config.temperatures for alpha in config.alphas),
    )


def plot(trained: Mapping[str, Sequence[Trained]], path: Path, config: Config, best: str) -> None:
    """Draws the validation accuracy of each pair as a heat map, with its number in it and a frame around the best."""
    pairs = [[cell(temperature, alpha) for temperature in config.temperatures] for alpha in config.alphas]
    seeds = [[[100 * one.validation_accuracy for one in trained[name]] for name in row] for row in pairs]
    means, spreads = np.mean(seeds, -1), np.std(seeds, -1, ddof=1) if config.seeds > 1 else None
    with draw(path, 2.5 + 1.15 * len(config.temperatures), 1.8 + 0.6 * len(config.alphas)) as figure:
        axes = figure.subplots()
        image = axes.imshow(means, aspect="auto", cmap="cividis")
        middle = (means.min() + means.max()) / 2
        for (row, column), mean in np.ndenumerate(means):
            told = f"{mean:.1f}" if spreads is None else f"{mean:.1f} ± {spreads[row, column]:.1f}"
            colour = "black" if mean > middle else "white"
            axes.text(column, row, told, ha="center", va="center", color=colour, fontsize=9)
            if pairs[row][column] == best:
                x, y = column + np.array([-0.5, 0.5, 0.5, -0.5, -0.5]), row + np.array([-0.5, -0.5, 0.5, 0.5, -0.5])
                axes.plot(x, y, color="#D55E00", lw=2.5, clip_on=False)
        axes.set_xticks(range(len(config.temperatures)), [f"{value:g}" for value in config.temperatures])
        axes.set_yticks(range(len(config.alphas)), [f"{value:g}" for value in config.alphas])
        axes.grid(visible=False)
        alone = [100 * one.validation_accuracy for one in trained["labels"]]
        axes.set(
            xlabel="temperature",
            ylabel="alpha, weight of the soft targets",
            title=f"Validation accuracy (%); labels alone {np.mean(alone):.1f}",
        )
        figure.colorbar(image, ax=axes)


def main(config: Config) -> None:
    """Trains, compares and draws."""
    config.check()
    dataset = data.load(config.dataset, config.data_dir, image_size=config.image_size)
    plan = make_plan(config, dataset)
    cells = [stage.name for stage in plan[2:]]
    done = vision.run(
        "sweep",
        config,
        dataset,
        plan,
        title="Temperature and alpha",
        students=cells,
        comparisons=[],
        alike=len(cells),
    )
    if not parallel.is_first_host():
        return
    best = max(cells, key=lambda name: sum(one.validation_accuracy for one in done.trained[name]))
    plot(done.trained, done.folder / "heatmap.png", config, best)
    print(f"Best by validation: {best}. On the test images: {report.compare(done.rows, best, 'labels')}")
    print(f"Validation accuracy of each pair: {done.folder / 'heatmap.png'}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
