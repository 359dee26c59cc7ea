"""Two CNNs of one architecture on CIFAR-10: model B is model A plus distillation.

Both are Conv 32 - pool - Conv 64 - pool - Dense 64 - Dense 10, trained on the same images, for as many steps, by the
same optimizer. A learns from the labels alone, B also from the soft targets of a larger CNN (Conv 64 - pool -
Conv 128 - pool - Dense 128) that was trained on images mirrored at random.

Paper: Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531

Command: python -m experiments.two_cnns

Result: teacher 72.8 %, A 69.2 %, B 69.7 % (CIFAR-10 re-encoded as JPEG, 3 seeds)

Time: 35 minutes on 2 CPU cores
"""

import dataclasses

from experiments import cli, plans, vision
from jaxkd import data, distill


@dataclasses.dataclass(frozen=True)
class Config(vision.SoftOptions):
    """Options of the experiment."""

    dataset: str = "cifar10"
    """A TFDS name such as `cifar10`, a folder with train/CLASS/ and test/CLASS/, or `fashion_mnist_mini`."""
    epochs: int = 10
    """Passes of A and B over the training images."""
    teacher_epochs: int = 10
    """Passes of the teacher, on images that are mirrored at random."""

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        super().check()
        cli.require(self.teacher_epochs >= 1, f"--teacher-epochs {self.teacher_epochs}: train for at least one")


def make_plan(config: Config, dataset: data.Dataset) -> tuple[distill.Stage, ...]:
    """Who learns what from whom."""
    examples = {"inputs": dataset.train.images, "labels": dataset.train.labels}

    small, large = vision.cnn((32, 64), 64, dataset, config), vision.cnn((64, 128), 128, dataset, config)
    steps = vision.steps(config, dataset)
    teacher_steps = vision.steps(config, dataset, epochs=config.teacher_epochs)
    teacher = vision.stage("teacher", large, examples, plans.supervised, config, steps=teacher_steps)
    model_a = vision.stage("model_a", small, examples, plans.supervised, config, steps=steps)
    return (
        # Mirrored only: shifted images would need many more passes of a network whose dense layer sees positions.
        dataclasses.replace(teacher, augment=data.random_flip),
        model_a,
        dataclasses.replace(
            model_a,
            name="model_b",
            loss=plans.taught(config),
            teachers=("teacher",),
            cache_teachers=config.caches_teachers,
        ),
    )


def main(config: Config) -> None:
    """Trains, compares and reports."""
    config.check()
    dataset = data.load(config.dataset, config.data_dir, image_size=config.image_size)
    vision.run(
        "two_cnns",
        config,
        dataset,
        make_plan(config, dataset),
        title="Two CNNs of one architecture",
        students=("model_a", "model_b"),
        comparisons=(("model_b", "model_a"), ("model_b", "teacher")),
    )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
