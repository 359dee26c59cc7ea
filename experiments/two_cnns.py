"""Trains two CNNs of one architecture on CIFAR-10, the second one with distillation.

Question: what does distillation add to the labels, if both students train equally long?

Both are Conv 32 - pool - Conv 64 - pool - Dense 64 - Dense 10. In a pair they start from the same
weights, see the same images in the same order, and take the same number of steps. Model A learns
from the labels alone. Model B also learns from the soft targets of a teacher. --lengths and
--images name the pairs: how many epochs they take, and whether they see images as they are or
mirrored at random.

The teacher is a larger CNN (Conv 64 - pool - Conv 128 - pool - Dense 128 - Dense 10), or, with
--weights, a ResNet-20 that starts from weights of PyTorch. Both are trained on the images of the
students. --recipe full is the experiment with the ResNet-20.

Papers: Hinton et al., Distilling the Knowledge in a Neural Network,
https://arxiv.org/abs/1503.02531; Beyer et al., Knowledge Distillation: A Good Teacher Is Patient
and Consistent, https://arxiv.org/abs/2106.05237

Command: python -m experiments.two_cnns

With a strong teacher: python -m experiments.two_cnns --recipe full --weights resnet20-12fca82f.th

Result: with the ResNet-20, 30 epochs of mirrored images, A 71.3 %, B 73.6 % (CIFAR-10 re-encoded as
JPEG, 3 seeds)

Time: 10 minutes on 2 CPU cores
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import optax

from experiments.common import cifar_resnet, cli, images, plans
from jaxkd import data, distill
from jaxkd.distill.methods import supervised_loss


@dataclasses.dataclass(frozen=True)
class Config(images.SoftTargetOptions):
    """Options of the experiment."""

    recipe: Literal["quick", "full"] = "quick"
    """Defaults of the other options: quick ends in 10 minutes; full takes hours and needs
    --weights."""
    dataset: str = "cifar10"
    """A TFDS name such as `cifar10`, a folder with train/CLASS/ and test/CLASS/, or
    `fashion_mnist_mini`."""
    epochs: int = 3
    """Passes of A and B over the training images."""
    lengths: tuple[int, ...] = ()
    """Several numbers of epochs in place of --epochs, with a pair of models each."""
    inputs: tuple[Literal["plain", "mirrored"], ...] = ("plain",)
    """What the students see: the images as they are, or mirrored at random, with a pair of models
    each."""
    mirrored_views: int = 4
    """Number of views of each mirrored image. The epochs show them in turn, so that the teacher
    sees each view only once."""
    weights: str = ""
    """The teacher's weights at its start: a PyTorch or safetensors file of a CIFAR ResNet-20. By
    default the teacher is a larger CNN that starts from random weights."""
    teacher_epochs: int = 3
    """Passes of the teacher over the training images, which are mirrored at random, and cropped for
    the ResNet-20. With 0 the ResNet-20 teaches as it is."""
    teacher_learning_rate: float = 0.02
    """Initial learning rate of the ResNet-20: SGD with momentum 0.9, along a cosine to 0."""

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """What the students of each pair see, and for how many epochs."""
        lengths = self.lengths or (self.epochs,)
        return [(inputs, epochs) for inputs in self.inputs for epochs in lengths]

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        super().check()
        cli.require(not self.augment, "--augment: name what the students see by --inputs mirrored")
        for epochs in self.lengths:
            cli.require(epochs >= 1, f"--lengths {epochs}: needs at least 1")
        cli.require(len(self.inputs) > 0, "--inputs: needs plain, mirrored or both")
        cli.require(
            len({*self.pairs}) == len(self.pairs),
            "--lengths and --inputs: the values of an option must differ",
        )
        cli.require(
            self.mirrored_views >= 1, f"--mirrored-views {self.mirrored_views}: needs at least 1"
        )
        cli.require(
            self.teacher_epochs >= (0 if self.weights else 1),
            f"--teacher-epochs {self.teacher_epochs}: needs at least 1, or 0 with --weights",
        )
        cli.require(
            self.teacher_learning_rate > 0,
            f"--teacher-learning-rate {self.teacher_learning_rate}: must be above 0",
        )
        if self.weights or self.recipe == "full":
            cifar_resnet.check_weights(self.weights)


RECIPES: Mapping[str, Config] = {
    "quick": Config(),
    "full": Config(
        recipe="full",
        lengths=(10, 30, 60),
        inputs=("plain", "mirrored"),
        teacher_epochs=2,
        temperature=2.0,
    ),
}
"""The options of each recipe."""


def make_teachers(
    config: Config, dataset: data.Dataset
) -> tuple[distill.Stage | distill.Pretrained, ...]:
    """Makes the teacher, and the weights that it starts from if there are any."""
    steps = images.num_steps(config, dataset, epochs=max(config.teacher_epochs, 1))
    if not config.weights:
        large = images.make_cnn((64, 128), 128, dataset, config)
        teacher = images.make_stage(
            "teacher",
            large,
            dataset.train.examples,
            supervised_loss,
            config,
            steps=steps,
            # Not cropped: the dense layer depends on positions, so that shifted images would need
            # many more epochs.
            augment=data.random_flip,
        )
        return (teacher,)
    if not config.teacher_epochs:
        return (cifar_resnet.load_resnet20("teacher", config.weights, dataset, config),)
    pretrained = cifar_resnet.load_resnet20("resnet20", config.weights, dataset, config)
    schedule = optax.cosine_decay_schedule(config.teacher_learning_rate, steps)
    teacher = images.make_stage(
        "teacher",
        pretrained.model,
        dataset.train.examples,
        supervised_loss,
        config,
        steps=steps,
        tx=optax.sgd(schedule, momentum=0.9),
        start="resnet20",
        augment=data.crop_and_flip,
    )
    return pretrained, teacher


def make_plan(
    config: Config, dataset: data.Dataset
) -> tuple[distill.Stage | distill.Pretrained, ...]:
    """Makes the stages: the teacher, and models A and B of each pair."""
    student = images.make_cnn((32, 64), 64, dataset, config)
    students = []
    for inputs, epochs in config.pairs:
        augmentation: dict[str, Any] = {}
        if inputs == "mirrored":
            augmentation = {"augment": data.random_flip, "views": config.mirrored_views}
        model_a = images.make_stage(
            f"a_{inputs}_{epochs}",
            student,
            dataset.train.examples,
            supervised_loss,
            config,
            steps=images.num_steps(config, dataset, epochs=epochs),
            key_name="student",
            **augmentation,
        )
        model_b = dataclasses.replace(
            model_a,
            name=f"b_{inputs}_{epochs}",
            loss=plans.make_soft_target_loss(config),
            teachers=("teacher",),
            cache_teachers=True,
        )
        students += [model_a, model_b]
    return *make_teachers(config, dataset), *students


def main(config: Config) -> None:
    """Trains all networks, compares them and writes the report."""
    config.check()
    dataset = images.load(config)
    plan = make_plan(config, dataset)
    run = images.open_run("two_cnns", config, dataset)
    trained = distill.run_plan(
        plan, run=run, validation=dataset.validation.examples, **plans.run_options(config, plan)
    )
    pairs = [(f"a_{inputs}_{epochs}", f"b_{inputs}_{epochs}") for inputs, epochs in config.pairs]
    distill.save_results(
        run,
        plan,
        trained,
        dataset.test.examples,
        title="Two CNNs of one architecture",
        class_names=dataset.class_names,
        students=[name for pair in pairs for name in pair],
        comparisons=[(b, a) for a, b in pairs],
    )


if __name__ == "__main__":
    cli.run(main, Config, __doc__, recipes=RECIPES)
