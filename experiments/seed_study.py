"""Asks what else than a method makes two trainings of one network differ.

Question: how much of the test accuracy is chance, and how many seeds does a claim need?

A small network sees --num-images images. Model A learns from their labels, model B also from the
soft targets of a teacher. Each is trained --size times --size times: with as many initial weights
as orders of the images, every pair of which occurs once, and as many augmentations (random crops
and flips), arranged as a Latin square. So the variance of the test accuracy splits into that of the
weights, the order, the augmentation and the rest, which is rounding and what does not add up. In
each cell A and B share all three, so that the square also says what pairing gains.

Papers: Bouthillier et al., Accounting for Variance in Machine Learning Benchmarks,
https://arxiv.org/abs/2103.03098; Hinton et al., Distilling the Knowledge in a Neural Network,
https://arxiv.org/abs/1503.02531

Command: python -m experiments.seed_study

Result: not recorded yet
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import cli, images, plans
from experiments.common.images import STUDENT, TEACHER
from experiments.common.variance import Component, count_seeds, split_variance
from jaxkd import data, distill, evaluate
from jaxkd._files import write_atomically
from jaxkd.distill import TrainedModel
from jaxkd.distill.methods import supervised_loss
from jaxkd.runs import figures, report

CAUSES = ("initial weights", "order", "augmentation")
CLAIMS = (1.0, 2.0, 4.0)
"""Differences in percentage points."""


@dataclasses.dataclass(frozen=True)
class Config(images.SoftTargetOptions):
    """Options of the experiment."""

    num_seeds: int = 1
    """Must be 1: the square takes the place of seeds. --seed draws another square."""
    epochs: int = 4
    """Passes of the teacher over the training images. The students take the same number of steps on
    their own images."""
    learning_rate: float = 3e-3
    """Initial learning rate of Adam. It falls to 0 along a cosine."""
    num_images: int = 1000
    """Number of training images that the students see, the same for all."""
    size: int = 5
    """Number of initial weights, of orders and of augmentations."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        super().check()
        cli.require(
            self.num_seeds == 1,
            f"--num-seeds {self.num_seeds}: the square takes the place of seeds; use --size",
        )
        cli.require(self.size >= 3, f"--size {self.size}: needs at least 3")
        cli.require(
            not self.augment and self.views is None,
            "--augment: the students' images are cropped and mirrored in any case",
        )


def stage_name(model: str, row: int, column: int) -> str:
    """Returns the name of a training of model `a` or `b`."""
    return f"{model}_{row}_{column}"


def make_plan(config: Config, dataset: data.Dataset) -> tuple[distill.Stage, ...]:
    """Makes the stages: the teacher, and models A and B for each cell of the square."""
    teacher = images.make_cnn(*TEACHER, dataset, config)
    student = images.make_cnn(*STUDENT, dataset, config)
    few_images, _ = data.few_labels(dataset.train.examples, config.num_images)
    stage = functools.partial(
        images.make_stage, options=config, steps=images.num_steps(config, dataset)
    )
    model_a = stage("a", student, few_images, supervised_loss, augment=data.crop_and_flip)
    model_b = dataclasses.replace(
        model_a, name="b", loss=plans.make_soft_target_loss(config), teachers=("teacher",)
    )
    stages = [stage("teacher", teacher, dataset.train.examples, supervised_loss)]
    for row, column in np.ndindex(config.size, config.size):
        key_name = {
            "init": f"weights_{row}",
            "order": f"order_{column}",
            "step": f"augmentation_{(row + column) % config.size}",
        }
        stages += [
            dataclasses.replace(model, name=stage_name(model.name, row, column), key_name=key_name)
            for model in (model_a, model_b)
        ]
    return tuple(stages)


def measure(
    plan: Sequence[distill.Stage],
    trained: Mapping[str, Sequence[TrainedModel]],
    test: data.Split,
    config: Config,
) -> dict[str, np.ndarray]:
    """Returns the test accuracy in % of every training, as a square for each model."""
    # All students are one network, which is compiled once.
    predict = evaluate.make_predict(plan[1].model)

    def accuracy(name: str) -> float:
        logits = predict(trained[name][0].variables, test.images)
        return 100 * float((np.argmax(logits, -1) == test.labels).mean())

    return {
        model: np.array(
            [
                [accuracy(stage_name(model, row, column)) for column in range(config.size)]
                for row in range(config.size)
            ]
        )
        for model in ("a", "b")
    }


def conclude(squares: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns what the squares say: components of variance, differences and numbers of seeds."""
    components = {model: split_variance(square, CAUSES) for model, square in squares.items()}
    differences = squares["b"] - squares["a"]
    # Of a training that draws everything for itself.
    deviations = [
        np.sqrt(sum(max(component.variance, 0) for component in components[model]))
        for model in ("a", "b")
    ]
    deviation = float(np.sqrt(np.mean(np.square(deviations))))
    paired_deviation = float(differences.std(ddof=1))
    return {
        "means": {model: float(square.mean()) for model, square in squares.items()},
        "components": components,
        "difference": float(differences.mean()),
        "paired_deviation": paired_deviation,
        "deviation": deviation,
        "seeds": {
            claim: {
                "unpaired": count_seeds(claim, deviation),
                "paired": count_seeds(claim, paired_deviation, paired=True),
            }
            for claim in CLAIMS
        },
    }


def describe_components(components: Mapping[str, Sequence[Component]]) -> str:
    """Returns the table of the components of variance in Markdown."""
    rows = []
    for model, parts in components.items():
        total = sum(max(part.variance, 0) for part in parts)
        rows += [
            [
                f"model {model.upper()}",
                part.name,
                f"{np.sqrt(max(part.variance, 0)):.2f}",
                f"{np.sqrt(part.low):.2f}–{np.sqrt(part.high):.2f}",
                f"{max(part.variance, 0) / total:.0%}",
                "" if part.p_value is None else f"{part.p_value:.2g}",
            ]
            for part in parts
        ]
    headers = ["", "cause", "deviation, points", "95 % interval", "share of variance", "p"]
    return report.markdown_table(headers, rows)


def describe_seeds(summary: Mapping[str, Any]) -> str:
    """Returns the table of the seeds that claims need, in Markdown."""
    rows = [
        [f"{claim:g}", counts["unpaired"], counts["paired"]]
        for claim, counts in summary["seeds"].items()
    ]
    return report.markdown_table(
        ["difference, points", "seeds, independent trainings", "seeds, pairs as here"], rows
    )


def plot(
    metrics: Sequence[Mapping[str, Any]],
    components: Mapping[str, Sequence[Component]],
    path: Path,
) -> None:
    """Draws the validation accuracy of both models with its band, and the deviation by cause."""
    with figures.new_figure(path, 10, 3.8) as figure:
        left, right = figure.subplots(1, 2)
        for model, colour in zip(components, figures.COLOURS, strict=False):
            records = [m for m in metrics if m["stage"].startswith(f"{model}_")]
            steps = sorted({record["step"] for record in records})
            accuracies = np.array(
                [[100 * m["validation_accuracy"] for m in records if m["step"] == s] for s in steps]
            )
            left.fill_between(
                steps, accuracies.min(1), accuracies.max(1), color=colour, alpha=0.2, lw=0
            )
            left.plot(steps, accuracies.mean(1), color=colour, label=f"model {model.upper()}")
        left.set(xlabel="step", ylabel="validation accuracy (%)", title="Mean, least and greatest")
        left.legend(loc="lower right")
        for index, parts in enumerate(components.values()):
            heights = np.arange(len(parts)) + 0.2 * (2 * index - 1)
            middle = np.sqrt([max(part.variance, 0) for part in parts])
            low, high = (np.sqrt([getattr(part, end) for part in parts]) for end in ("low", "high"))
            right.hlines(heights, low, high, color=figures.COLOURS[index], lw=2)
            right.plot(middle, heights, "o", color=figures.COLOURS[index])
        right.set_yticks(range(len(parts)), [part.name for part in parts])
        right.set(
            xlabel="standard deviation of the test accuracy (points)",
            title="Causes, with 95 % intervals",
            ylim=(len(parts) - 0.5, -0.5),
            xlim=(0, None),
        )
        right.grid(visible=False, axis="y")


def main(config: Config) -> None:
    """Trains the square, and writes its tables and its figure."""
    config.check()
    dataset = images.load(config)
    plan = make_plan(config, dataset)
    run = images.open_run("seed_study", config, dataset)
    trained = distill.run_plan(
        plan, run=run, validation=dataset.validation.examples, **plans.run_options(config, plan)
    )
    if not distill.is_primary_process():
        return
    squares = measure(plan, trained, dataset.test, config)
    summary = conclude(squares)
    components = summary["components"]
    plot(run.metrics(), components, run.folder / "causes.png")
    results = {
        "environment": run.environment,
        "accuracies": {model: square.tolist() for model, square in squares.items()},
        **summary,
        "components": {
            model: [part._asdict() for part in parts] for model, parts in components.items()
        },
    }
    write_atomically(run.folder / "causes.json", json.dumps(results, indent=1).encode())
    error = summary["paired_deviation"] / config.size
    text = "\n\n".join(
        [
            "# What chance contributes",
            f"Model A {summary['means']['a']:.1f} %, model B {summary['means']['b']:.1f} %; B is "
            f"{summary['difference']:+.2f} ± {error:.2f} points from A (mean ± standard error of "
            f"{config.size**2} pairs, which are not independent).",
            describe_components(components),
            describe_seeds(summary),
            "Number of seeds of each model with which a t-test at 5 % finds the difference with a "
            "probability of 80 %.",
            "![Curves and causes](causes.png)",
        ]
    )
    write_atomically(run.folder / "report.md", (text + "\n").encode())
    print(text, f"Everything is in {run.folder}", sep="\n\n")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
