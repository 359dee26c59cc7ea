"""Distils a small network from a teacher that was trained in PyTorch.

Question: what does a pretrained network teach a small one, with all labels and with few?

A ResNet-20 that was trained in PyTorch for 200 epochs is read from its file and teaches a CNN of
two convolutions on CIFAR-10. The same CNN learns from the labels alone for comparison. Both are
trained once with the labels of all training images and once with only --num-labels of them, while
the soft targets cover all images.

Papers: Hinton et al., Distilling the Knowledge in a Neural Network,
https://arxiv.org/abs/1503.02531; He et al., Deep Residual Learning for Image Recognition,
https://arxiv.org/abs/1512.03385

Command: python -m experiments.pretrained_teacher --weights resnet20-12fca82f.th

On an accelerator: python -m experiments.pretrained_teacher --weights resnet20-12fca82f.th
--epochs 40 --num-seeds 5

Result: teacher 81.0 %; with 1,000 labels 40.7 % alone, 56.8 % distilled; with all labels 60.3 %
alone, 56.8 % distilled (CIFAR-10 re-encoded as JPEG, 3 seeds)

Time: 9 minutes on 2 CPU cores
"""

import dataclasses
import functools

from experiments.common import cifar_resnet, cli, images, plans
from jaxkd import data, distill
from jaxkd.distill.methods import supervised_loss


@dataclasses.dataclass(frozen=True)
class Config(images.SoftTargetOptions):
    """Options of the experiment."""

    dataset: str = "cifar10"
    """A TFDS name or a folder with train/CLASS/ and test/CLASS/, with the ten classes of
    CIFAR-10."""
    weights: str = ""
    """The teacher's weights: a PyTorch or safetensors file of a CIFAR ResNet-20, or the folder of a
    run that trained one."""
    epochs: int = 2
    """Passes over the training images. A network with few labels takes the same number of steps."""
    num_labels: int = 1000
    """Number of training images that keep their label for the students with few labels."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        super().check()
        cifar_resnet.check_weights(self.weights)


def make_plan(
    config: Config, dataset: data.Dataset
) -> tuple[distill.Stage | distill.Pretrained, ...]:
    """Makes the pretrained teacher and the stages of the students."""
    teacher = cifar_resnet.load_resnet20("teacher", config.weights, dataset, config)
    student = images.make_cnn((32, 64), 64, dataset, config)
    all_labels = dataset.train.examples
    labelled_only, partly_labelled = data.few_labels(dataset.train.examples, config.num_labels)

    stage = functools.partial(
        images.make_stage, model=student, options=config, steps=images.num_steps(config, dataset)
    )
    supervised = functools.partial(stage, loss=supervised_loss)
    distilled = functools.partial(
        stage,
        loss=plans.make_soft_target_loss(config),
        teachers=("teacher",),
        cache_teachers=config.can_cache_teachers,
    )
    return (
        teacher,
        supervised("all_alone", examples=all_labels),
        distilled("all_distilled", examples=all_labels),
        supervised("few_alone", examples=labelled_only),
        distilled("few_distilled", examples=partly_labelled),
    )


def main(config: Config) -> None:
    """Trains all students, compares them and writes the report."""
    config.check()
    dataset = images.load(config)
    plan = make_plan(config, dataset)
    run = images.open_run("pretrained_teacher", config, dataset)
    trained = distill.run_plan(
        plan, run=run, validation=dataset.validation.examples, **plans.run_options(config, plan)
    )
    distill.save_results(
        run,
        plan,
        trained,
        dataset.test.examples,
        title="A pretrained teacher",
        class_names=dataset.class_names,
        students=("all_alone", "all_distilled", "few_alone", "few_distilled"),
        comparisons=(
            ("all_distilled", "all_alone"),
            ("few_distilled", "few_alone"),
            ("few_distilled", "all_alone"),
        ),
    )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
