"""Trains two CNNs of one architecture on CIFAR-10, the second one with distillation.

Question: what does distillation from a larger CNN add to the labels?

Both are Conv 32 - pool - Conv 64 - pool - Dense 64 - Dense 10, trained on the same images, with the
same optimizer and number of steps. Model A learns from the labels alone. Model B also learns from
the soft targets of a larger CNN (Conv 64 - pool - Conv 128 - pool - Dense 128 - Dense 10), which
was trained on randomly mirrored images.

Paper: Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531

Command: python -m experiments.two_cnns

Result: teacher 72.8 %, A 69.2 %, B 69.7 % (CIFAR-10 re-encoded as JPEG, 3 seeds)

Time: 35 minutes on 2 CPU cores
"""

import dataclasses

from experiments.common import cli, images, plans
from jaxkd import data, distill
from jaxkd.distill.methods import supervised_loss


@dataclasses.dataclass(frozen=True)
class Config(images.SoftTargetOptions):
    """Options of the experiment."""

    dataset: str = "cifar10"
    """A TFDS name such as `cifar10`, a folder with train/CLASS/ and test/CLASS/, or
    `fashion_mnist_mini`."""
    epochs: int = 10
    """Passes of A and B over the training images."""
    teacher_epochs: int = 10
    """Passes of the teacher over the training images, which are mirrored at random."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        super().check()
        cli.require(
            self.teacher_epochs >= 1, f"--teacher-epochs {self.teacher_epochs}: needs at least 1"
        )


def make_plan(config: Config, dataset: data.Dataset) -> tuple[distill.Stage, ...]:
    """Makes the stages: the teacher, model A and model B."""
    small = images.make_cnn((32, 64), 64, dataset, config)
    large = images.make_cnn((64, 128), 128, dataset, config)
    examples = dataset.train.examples

    teacher = images.make_stage(
        "teacher",
        large,
        examples,
        supervised_loss,
        config,
        steps=images.num_steps(config, dataset, epochs=config.teacher_epochs),
        # Not cropped: the dense layer depends on positions, so that shifted images would need many
        # more epochs.
        augment=data.random_flip,
    )
    model_a = images.make_stage(
        "model_a",
        small,
        examples,
        supervised_loss,
        config,
        steps=images.num_steps(config, dataset),
    )
    model_b = dataclasses.replace(
        model_a,
        name="model_b",
        loss=plans.make_soft_target_loss(config),
        teachers=("teacher",),
        cache_teachers=config.can_cache_teachers,
    )
    return teacher, model_a, model_b


def main(config: Config) -> None:
    """Trains all networks, compares them and writes the report."""
    config.check()
    dataset = images.load(config)
    plan = make_plan(config, dataset)
    run = images.open_run("two_cnns", config, dataset)
    trained = distill.run_plan(
        plan, run=run, validation=dataset.validation.examples, **plans.run_options(config, plan)
    )
    distill.save_results(
        run,
        plan,
        trained,
        dataset.test.examples,
        title="Two CNNs of one architecture",
        class_names=dataset.class_names,
        students=("model_a", "model_b"),
        comparisons=(("model_b", "model_a"), ("model_b", "teacher")),
    )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
