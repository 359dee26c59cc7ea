"""Distils a small network with few labels, directly and through a teacher assistant.

Question: what does distillation gain, and does an assistant between teacher and student gain more?

The teacher learns from all labels. Only --num-labels images keep their label for the students. One
student learns from those images alone, one from the teacher's soft targets on all images, and one
from the soft targets of an assistant of medium size that the teacher taught. A fourth student that
learns from all labels is the upper reference.

Paper: Mirzadeh et al., Improved Knowledge Distillation via Teacher Assistant,
    https://arxiv.org/abs/1902.03393

Command: python -m experiments.teacher_assistant

Result: alone 80.4 %, direct 85.5 %, assisted 85.1 %, all labels 86.8 % (fashion_mnist_mini,
    500 labels, 3 seeds)

Time: 2 minutes on 2 CPU cores
"""

import dataclasses
import functools

from experiments.common import cli, images, plans
from jaxkd import data, distill
from jaxkd.distill.methods import supervised_loss


@dataclasses.dataclass(frozen=True)
class Config(images.SoftTargetOptions):
    """Options of the experiment."""

    epochs: int = 4
    """Passes over the training images, for each network. A network with few labels takes the same
    number of steps."""
    learning_rate: float = 3e-3
    """Initial learning rate of Adam. It falls to 0 along a cosine."""
    alpha: float = 0.9
    """Weight of the soft targets for images with a label, from 0 to 1. Images without a label have
    soft targets alone."""
    num_labels: int = 500
    """Number of training images that keep their label, for assistant and students. The teacher
    learns from all labels, and its soft targets cover all images."""


def make_plan(config: Config, dataset: data.Dataset) -> tuple[distill.Stage, ...]:
    """Makes the stages: teacher, assistant and students."""
    teacher = images.make_cnn((64, 128), 128, dataset, config)
    assistant = images.make_cnn((32, 64), 64, dataset, config)
    student = images.make_cnn((16,), 32, dataset, config)

    all_labels = dataset.train.examples
    labelled_only, partly_labelled = data.few_labels(dataset.train.examples, config.num_labels)

    # All networks take the same number of steps, so that none is better for having trained longer.
    stage = functools.partial(
        images.make_stage, options=config, steps=images.num_steps(config, dataset)
    )
    supervised = functools.partial(stage, loss=supervised_loss)
    distilled = functools.partial(
        stage,
        loss=plans.make_soft_target_loss(config),
        cache_teachers=config.can_cache_teachers,
    )
    return (
        supervised("teacher", teacher, all_labels),
        distilled("assistant", assistant, partly_labelled, teachers=("teacher",)),
        supervised("student_alone", student, labelled_only),
        distilled("student_direct", student, partly_labelled, teachers=("teacher",)),
        distilled("student_assisted", student, partly_labelled, teachers=("assistant",)),
        # Shows what the labels that the other students lack are worth.
        supervised("student_all_labels", student, all_labels),
    )


def main(config: Config) -> None:
    """Trains all networks, compares them and writes the report."""
    config.check()
    dataset = images.load(config)
    plan = make_plan(config, dataset)
    run = images.open_run("teacher_assistant", config, dataset)
    trained = distill.run_plan(
        plan, run=run, validation=dataset.validation.examples, **plans.run_options(config, plan)
    )
    distill.save_results(
        run,
        plan,
        trained,
        dataset.test.examples,
        title="Teacher, assistant, student",
        class_names=dataset.class_names,
        # The candidates for the export. The student of all labels is left out: it only serves to
        # compare.
        students=("student_alone", "student_direct", "student_assisted"),
        comparisons=(
            ("student_direct", "student_alone"),
            ("student_assisted", "student_direct"),
            ("student_direct", "student_all_labels"),
        ),
    )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
