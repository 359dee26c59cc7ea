"""Does a small network learn more from two teachers than from either?

A large network is trained on all labels. A medium one starts from the large one's weights, of which it takes the
channels of largest norm, and is trained on for a quarter of the steps; beside it stands one that starts from scratch
and takes as many. Small networks of which only --num-labels images keep their label then learn from the large one, from
the medium one, from both with weights 0.7 and 0.3, and from the average of both teachers' probabilities.

As the cross-entropy is linear in its targets, the weighted sum of two soft losses is the loss of the average with these
weights: the two students differ in how much each teacher counts.

Papers: You et al., Learning from Multiple Teacher Networks, https://doi.org/10.1145/3097983.3098135; Li et al., Pruning
Filters for Efficient ConvNets, https://arxiv.org/abs/1608.08710

Command: python -m experiments.two_teachers
On an accelerator: python -m experiments.two_teachers --dataset cifar10 --epochs 30 --seeds 5

Result: large 87.6 %, medium 87.0 % (80.5 % from scratch); small alone 80.7 %, by large 85.3 %, by medium 84.8 %, by
both 85.2 %, by the average 85.8 % (fashion_mnist_mini, 500 labels, 3 seeds)

Time: 3 minutes on 2 CPU cores
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from experiments import cli, plans, vision
from jaxkd import data, distill, losses, transfer
from jaxkd.plan import Examples
from jaxkd.train import Loss

LARGE, MEDIUM, SMALL = ((64, 128), 128), ((32, 64), 64), ((16,), 32)
"""Channels of the convolutions, and width before the logits."""
CHANNELS = (
    transfer.Channels({"params/conv1/kernel": -1, "params/conv1/bias": 0}, {"params/conv2/kernel": -2}),
    transfer.Channels({"params/conv2/kernel": -1, "params/conv2/bias": 0}, {"params/hidden/kernel": 0}),
    transfer.Channels({"params/hidden/kernel": -1, "params/hidden/bias": 0}, {"params/logits/kernel": 0}),
)
"""Layer by layer, where a channel is made and where it is used."""


@dataclasses.dataclass(frozen=True)
class Config(vision.SoftOptions):
    """Options of the experiment."""

    epochs: int = 4
    """Passes over the training images; those with few labels take as many steps on them."""
    learning_rate: float = 3e-3
    """Adam's, at the start; it falls to 0 along a cosine."""
    weights: tuple[float, float] = (0.7, 0.3)
    """Of the losses by the large and by the medium teacher."""
    num_labels: int = 500
    """How many training images keep their label for the small networks; the soft targets cover all."""

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        super().check()
        cli.require(min(self.weights) >= 0 and max(self.weights) > 0, f"--weights {self.weights}: at least 0, not both")


def narrowed(large: dict, fresh: dict) -> dict:
    """The large network's weights, cut to the medium one's widths: the channels of largest norm stay."""
    del fresh
    features, hidden = MEDIUM
    for channels, size in zip(CHANNELS, (*features, hidden), strict=True):
        large = transfer.narrow(large, channels, size, choose=transfer.largest_norm)
    return large


def by_both(config: Config) -> Loss:
    """Two distillation losses, weighted."""

    def loss(student, teachers, batch):
        terms = [plans.taught(config)(student, (teacher,), batch) for teacher in teachers]
        return losses.weighted_sum(terms, weights=config.weights)

    return loss


def by_average(config: Config) -> Loss:
    """One distillation loss, by the average of the teachers' probabilities."""

    def loss(student, teachers, batch):
        logits = jnp.stack([teacher.logits for teacher in teachers])
        average = teachers[0]._replace(logits=losses.ensemble_logits(logits, temperature=config.temperature))
        return plans.taught(config)(student, (average,), batch)

    return loss


def make_plan(config: Config, dataset: data.Dataset) -> tuple[distill.Stage, ...]:
    """Who learns what from whom."""
    everything: Examples = {"inputs": dataset.train.images, "labels": dataset.train.labels}
    few, partly = vision.few_labels(dataset, config.num_labels)
    large, medium, small = (vision.cnn(*shape, dataset, config) for shape in (LARGE, MEDIUM, SMALL))
    steps = vision.steps(config, dataset)
    short: dict[str, Any] = {"options": config, "steps": math.ceil(steps / 4)}
    common: dict[str, Any] = {"options": config, "steps": steps}
    taught = common | {"cache_teachers": config.caches_teachers}
    from_scratch = vision.stage("medium_scratch", medium, everything, plans.supervised, **short)
    pair = ("large", "medium")
    return (
        vision.stage("large", large, everything, plans.supervised, **common),
        from_scratch,
        dataclasses.replace(from_scratch, name="medium", start="large", transfer=narrowed),
        vision.stage("alone", small, few, plans.supervised, **common),
        vision.stage("by_large", small, partly, plans.taught(config), teachers=("large",), **taught),
        vision.stage("by_medium", small, partly, plans.taught(config), teachers=("medium",), **taught),
        vision.stage("by_both", small, partly, by_both(config), teachers=pair, **taught),
        vision.stage("by_average", small, partly, by_average(config), teachers=pair, **taught),
    )


def main(config: Config) -> None:
    """Trains, compares and reports."""
    config.check()
    dataset = data.load(config.dataset, config.data_dir, image_size=config.image_size)
    vision.run(
        "two_teachers",
        config,
        dataset,
        make_plan(config, dataset),
        title="Two teachers",
        students=("alone", "by_large", "by_medium", "by_both", "by_average"),
        comparisons=(
            ("medium", "medium_scratch"),
            ("by_large", "alone"),
            ("by_both", "by_large"),
            ("by_both", "by_medium"),
            ("by_both", "by_average"),
        ),
        reference="large",
    )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
