"""What does a pretrained network teach a small one, with all labels and with few?

A ResNet-20 that was trained in PyTorch for 200 epochs is read from its file and teaches a CNN of two convolutions on
CIFAR-10, next to the same CNN that learns from the labels alone: once all training images keep their label, once only
--num-labels of them do, while the soft targets cover all.

Papers: Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531; He et al., Deep
Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385

Command: python -m experiments.pretrained_teacher --weights resnet20-12fca82f.th
On an accelerator: python -m experiments.pretrained_teacher --weights resnet20-12fca82f.th --epochs 40 --seeds 5

Result: teacher 81.0 %; with 1,000 labels 40.7 % alone, 56.8 % distilled; with all labels 60.3 % alone, 56.8 % distilled
(CIFAR-10 re-encoded as JPEG, 3 seeds)

Time: 9 minutes on 2 CPU cores
"""

import dataclasses
from pathlib import Path
from typing import Any

from experiments import cli, plans, vision
from jaxkd import data, distill, models

WEIGHTS = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/resnet20-12fca82f.th"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of each channel, by which the ResNet's images were standardised."""


@dataclasses.dataclass(frozen=True)
class Config(vision.SoftOptions):
    """Options of the experiment."""

    dataset: str = "cifar10"
    """A TFDS name or a folder with train/CLASS/ and test/CLASS/, of the ten classes of CIFAR-10."""
    weights: str = ""
    """The teacher's weights: a PyTorch or safetensors file of a CIFAR ResNet-20."""
    epochs: int = 2
    """Passes over the training images; the students with few labels take as many steps."""
    num_labels: int = 1000
    """How many training images keep their label for the students with few."""

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        super().check()
        cli.require(bool(self.weights), f"--weights is needed: a ResNet-20's file, such as {WEIGHTS}")
        cli.require(Path(self.weights).is_file(), f"--weights {self.weights}: there is no such file; get {WEIGHTS}")


def make_plan(config: Config, dataset: data.Dataset) -> tuple[distill.Stage | distill.Pretrained, ...]:
    """Who learns what from whom."""
    images, labels = dataset.train
    everything = {"inputs": images, "labels": labels}
    few, partly = vision.few_labels(dataset, config.num_labels)
    student = vision.cnn((32, 64), 64, dataset, config)
    steps = vision.steps(config, dataset)
    alone: dict[str, Any] = {"loss": plans.supervised, "options": config, "steps": steps}
    taught = alone | {"loss": plans.taught(config), "cache_teachers": config.caches_teachers}
    return (
        vision.pretrained("teacher", models.resnet20(), config.weights, images, config, mean=MEAN, std=DEVIATION),
        vision.stage("all_alone", student, everything, **alone),
        vision.stage("all_distilled", student, everything, teachers=("teacher",), **taught),
        vision.stage("few_alone", student, few, **alone),
        vision.stage("few_distilled", student, partly, teachers=("teacher",), **taught),
    )


def main(config: Config) -> None:
    """Trains, compares and reports."""
    config.check()
    dataset = data.load(config.dataset, config.data_dir, image_size=config.image_size)
    cli.require(len(dataset.class_names) == 10, f"--dataset {config.dataset}: the teacher knows CIFAR-10's ten classes")
    vision.run(
        "pretrained_teacher",
        config,
        dataset,
        make_plan(config, dataset),
        title="A pretrained teacher",
        students=("all_alone", "all_distilled", "few_alone", "few_distilled"),
        comparisons=(("all_distilled", "all_alone"), ("few_distilled", "few_alone"), ("few_distilled", "all_alone")),
    )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
