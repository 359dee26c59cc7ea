"""Distils a small network from two teachers, and from each of them alone.

Question: does a small network learn more from two teachers than from the better one?

The large teacher is trained on all labels. The medium teacher starts from the large one's weights,
of which it takes the channels of largest norm, and is trained for a quarter of the steps. For
comparison, a network of its size is trained from scratch for as long. Only --num-labels images keep
their label for the small networks. They learn from the large teacher, from the medium one, from
both with the weights 0.7 and 0.3, and from the average of both teachers' probabilities.

Cross-entropy is linear in its targets. A weighted sum of two soft-target losses is therefore the
loss of the weighted average of the targets, and the last two students differ only in the weight of
each teacher.

Papers: You et al., Learning from Multiple Teacher Networks,
https://doi.org/10.1145/3097983.3098135; Li et al., Pruning Filters for Efficient ConvNets,
https://arxiv.org/abs/1608.08710

Command: python -m experiments.two_teachers

On an accelerator: python -m experiments.two_teachers --dataset cifar10 --epochs 30 --num-seeds 5

Result: large 87.6 %, medium 87.0 % (80.5 % from scratch); small alone 80.7 %, from large 85.3 %,
from medium 84.8 %, from both 85.2 %, from the average 85.8 % (fashion_mnist_mini, 500 labels,
3 seeds)

Time: 3 minutes on 2 CPU cores
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp

from experiments.common import cli, images, plans
from jaxkd import data, distill, losses, transfer
from jaxkd.distill import Batch, LossContext, LossFn
from jaxkd.distill.methods import supervised_loss
from jaxkd.models import Outputs

LARGE = ((64, 128), 128)
MEDIUM = ((32, 64), 64)
SMALL = ((16,), 32)
"""Channels of the convolutions, and units before the logits."""
CHANNELS = (
    transfer.Channels(
        {"params/conv1/kernel": -1, "params/conv1/bias": 0}, {"params/conv2/kernel": -2}
    ),
    transfer.Channels(
        {"params/conv2/kernel": -1, "params/conv2/bias": 0}, {"params/hidden/kernel": 0}
    ),
    transfer.Channels(
        {"params/hidden/kernel": -1, "params/hidden/bias": 0}, {"params/logits/kernel": 0}
    ),
)
"""For each layer, the axes that hold its output channels, and those of the next layer that read
them."""


@dataclasses.dataclass(frozen=True)
class Config(images.SoftTargetOptions):
    """Options of the experiment."""

    epochs: int = 4
    """Passes over the training images. A network with few labels takes the same number of steps."""
    learning_rate: float = 3e-3
    """Initial learning rate of Adam. It falls to 0 along a cosine."""
    weights: tuple[float, float] = (0.7, 0.3)
    """Weights of the losses with the large and the medium teacher."""
    num_labels: int = 500
    """Number of training images that keep their label for the small networks. The soft targets
    cover all images."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        super().check()
        large, medium = self.weights
        cli.require(
            min(large, medium) >= 0 and max(large, medium) > 0,
            f"--weights {large} {medium}: needs values of at least 0, not both 0",
        )


def narrow_to_medium(large: dict, fresh: dict) -> dict:
    """Cuts the large network's weights to the medium one's widths, by the channels' norm."""
    variables = large
    convolutions, hidden = MEDIUM
    for channels, width in zip(CHANNELS, (*convolutions, hidden), strict=True):
        variables = transfer.narrow(variables, channels, width, choose=transfer.largest_norm)
    return variables


def make_weighted_loss(config: Config) -> LossFn:
    """Makes the weighted sum of the soft-target losses of the teachers."""
    soft_target_loss = plans.make_soft_target_loss(config)

    def loss(
        student: Outputs, teachers: tuple[Outputs, ...], batch: Batch, context: LossContext
    ) -> Any:
        terms = [soft_target_loss(student, (teacher,), batch, context) for teacher in teachers]
        return losses.weighted_sum(terms, weights=config.weights)

    return loss


def make_average_loss(config: Config) -> LossFn:
    """Makes the soft-target loss with the average of the teachers' probabilities."""
    soft_target_loss = plans.make_soft_target_loss(config)

    def loss(
        student: Outputs, teachers: tuple[Outputs, ...], batch: Batch, context: LossContext
    ) -> Any:
        stacked = jnp.stack([teacher.logits for teacher in teachers])
        logits = losses.ensemble_logits(stacked, temperature=config.temperature)
        return soft_target_loss(student, (Outputs(logits, {}),), batch, context)

    return loss


def make_plan(config: Config, dataset: data.Dataset) -> tuple[distill.Stage, ...]:
    """Makes the stages: both teachers, and the small networks."""
    large = images.make_cnn(*LARGE, dataset, config)
    medium = images.make_cnn(*MEDIUM, dataset, config)
    small = images.make_cnn(*SMALL, dataset, config)

    all_labels = dataset.train.examples
    labelled_only, partly_labelled = data.few_labels(dataset.train.examples, config.num_labels)
    steps = images.num_steps(config, dataset)

    supervised = functools.partial(
        images.make_stage, loss=supervised_loss, options=config, steps=steps
    )
    distilled = functools.partial(
        images.make_stage,
        model=small,
        examples=partly_labelled,
        options=config,
        steps=steps,
        cache_teachers=config.can_cache_teachers,
    )
    soft_target_loss = plans.make_soft_target_loss(config)
    medium_scratch = supervised("medium_scratch", medium, all_labels, steps=math.ceil(steps / 4))
    both = ("large", "medium")
    return (
        supervised("large", large, all_labels),
        medium_scratch,
        dataclasses.replace(
            medium_scratch, name="medium", start="large", transfer=narrow_to_medium
        ),
        supervised("alone", small, labelled_only),
        distilled("by_large", loss=soft_target_loss, teachers=("large",)),
        distilled("by_medium", loss=soft_target_loss, teachers=("medium",)),
        distilled("by_both", loss=make_weighted_loss(config), teachers=both),
        distilled("by_average", loss=make_average_loss(config), teachers=both),
    )


def main(config: Config) -> None:
    """Trains all networks, compares them and writes the report."""
    config.check()
    dataset = images.load(config)
    plan = make_plan(config, dataset)
    run = images.open_run("two_teachers", config, dataset)
    trained = distill.run_plan(
        plan, run=run, validation=dataset.validation.examples, **plans.run_options(config, plan)
    )
    distill.save_results(
        run,
        plan,
        trained,
        dataset.test.examples,
        title="Two teachers",
        class_names=dataset.class_names,
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
