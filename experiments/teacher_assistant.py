"""What does distillation buy a small network, and does an assistant in between help?

A teacher learns from all labels. Students of which only --num-labels images keep their label learn from those alone,
from the teacher's soft targets on all images, or from the soft targets of an assistant that the teacher taught. Beside
them, as the upper reference, stands the student that had every label.

Paper: Mirzadeh et al., Improved Knowledge Distillation via Teacher Assistant, https://arxiv.org/abs/1902.03393

Command: python -m experiments.teacher_assistant

Result: alone 80.4 %, direct 85.5 %, assisted 85.1 %, all labels 86.8 % (fashion_mnist_mini, 500 labels, 3 seeds)

Time: 2 minutes on 2 CPU cores
"""

import dataclasses
from typing import Any

from experiments import cli, plans, vision
from jaxkd import data, distill


@dataclasses.dataclass(frozen=True)
class Config(vision.SoftOptions):
    """Options of the experiment."""

    epochs: int = 4
    """Passes over the training images, for each network; those with few labels take as many steps on them."""
    learning_rate: float = 3e-3
    """Adam's, at the start; it falls to 0 along a cosine."""
    alpha: float = 0.9
    """Weight of the soft targets where there is a label, from 0 to 1; without one they have all of it."""
    num_labels: int = 500
    """How many training images keep their label, for assistant and students; the teacher sees all, and its soft targets
    cover all."""


def make_plan(config: Config, dataset: data.Dataset) -> tuple[distill.Stage, ...]:
    """Who learns what from whom."""
    everything = {"inputs": dataset.train.images, "labels": dataset.train.labels}
    few, partly = vision.few_labels(dataset, config.num_labels)
    teacher = vision.cnn((64, 128), 128, dataset, config)
    assistant = vision.cnn((32, 64), 64, dataset, config)
    student = vision.cnn((16,), 32, dataset, config)
    steps = vision.steps(config, dataset)
    alone: dict[str, Any] = {"loss": plans.supervised, "options": config, "steps": steps}
    taught = alone | {"loss": plans.taught(config), "cache_teachers": config.caches_teachers}
    return (
        vision.stage("teacher", teacher, everything, **alone),
        vision.stage("assistant", assistant, partly, teachers=("teacher",), **taught),
        vision.stage("student_alone", student, few, **alone),
        vision.stage("student_direct", student, partly, teachers=("teacher",), **taught),
        vision.stage("student_assisted", student, partly, teachers=("assistant",), **taught),
        vision.stage("student_all_labels", student, everything, **alone),
    )


def main(config: Config) -> None:
    """Trains, compares and reports."""
    config.check()
    dataset = data.load(config.dataset, config.data_dir, image_size=config.image_size)
    vision.run(
        "teacher_assistant",
        config,
        dataset,
        make_plan(config, dataset),
        title="Teacher, assistant, student",
        students=("student_alone", "student_direct", "student_assisted"),
        comparisons=(
            ("student_direct", "student_alone"),
            ("student_assisted", "student_direct"),
            ("student_direct", "student_all_labels"),
        ),
    )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
