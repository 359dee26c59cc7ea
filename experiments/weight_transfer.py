"""Starts from weights that were trained on another task, with few labels and with many.

Question: how many labels does it save to start from the weights of another task?

A network learns to classify one half of a data set's classes, the source task. Networks of the same
architecture then learn the other half, the target task, from 100, 300, 1,000 and all labels: from
scratch, from the source's weights with a new last layer, and from these with frozen convolutions.
All take the same number of steps.

Paper: Yosinski et al., How transferable are features in deep neural networks?,
https://arxiv.org/abs/1411.1792

Command: python -m experiments.weight_transfer

On an accelerator: python -m experiments.weight_transfer --dataset cifar10 --epochs 20 --num-seeds 5

Result: with 100 labels 88.5 % from scratch, 90.3 % transferred, 90.1 % frozen; with 300, 1,000 and
all labels no gain (fashion_mnist_mini, 3 seeds)

Time: 5 minutes on 2 CPU cores
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.benchmarks import timing
from experiments.common import cli, images, plans
from jaxkd import data, distill, transfer
from jaxkd._messages import list_some
from jaxkd.distill.methods import supervised_loss
from jaxkd.runs import ResultRow, figures

FEATURES = (32, 64)
"""Channels of the convolutions."""
HIDDEN = 64
"""Units before the logits."""
VARIANTS = {
    "scratch": "from scratch",
    "transferred": "from the source's weights",
    "frozen": "from these, convolutions frozen",
}
"""Ways to learn the target task, and their names in the figure."""


@dataclasses.dataclass(frozen=True)
class Config(images.Options):
    """Options of the experiment."""

    epochs: int = 8
    """Passes over all training images of a task. A network with few labels takes the same number of
    steps."""
    target_classes: tuple[str, ...] = ()
    """Names of the classes of the target task, at least two. By default the second half. The other
    classes are the source task."""
    num_labels: tuple[int, ...] = (100, 300, 1000)
    """Numbers of labelled images of the target task. All labels come last in any case."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        super().check()
        listed = " ".join(map(str, self.num_labels))
        cli.require(
            len(set(self.num_labels)) == len(self.num_labels),
            f"--num-labels {listed}: the numbers must differ",
        )


def split_classes(config: Config, dataset: data.Dataset) -> tuple[data.Dataset, data.Dataset]:
    """Returns the source and the target task.

    Raises:
        OptionError: If a class is unknown, or a task has fewer than two classes.
    """
    names = dataset.class_names
    target_names = config.target_classes or names[len(names) // 2 :]
    unknown = sorted({*target_names} - {*names})
    cli.require(
        not unknown,
        f"--target-classes: no class is named {list_some(unknown)}; "
        f"there are {list_some(names, 10)}",
    )
    source = tuple(name for name in names if name not in target_names)
    target = tuple(name for name in names if name in target_names)
    cli.require(
        min(len(source), len(target)) >= 2,
        "--target-classes: each task needs at least two of the classes",
    )
    return take_classes(dataset, source), take_classes(dataset, target)


def take_classes(dataset: data.Dataset, names: Sequence[str]) -> data.Dataset:
    """Returns the images of some classes, numbered from 0 in the order of the names."""
    new_labels = np.full(len(dataset.class_names), -1, np.int32)
    new_labels[[dataset.class_names.index(name) for name in names]] = range(len(names))

    def take(split: data.Split) -> data.Split:
        labels = new_labels[split.labels]
        return data.Split(split.images[labels >= 0], labels[labels >= 0])

    return data.Dataset(
        take(dataset.train), take(dataset.validation), take(dataset.test), tuple(names)
    )


def train_source(config: Config, dataset: data.Dataset, folder: Path) -> distill.Pretrained:
    """Trains the network of the source task, in a run of its own."""
    stage = images.make_stage(
        "source",
        images.make_cnn(FEATURES, HIDDEN, dataset, config),
        dataset.train.examples,
        supervised_loss,
        config,
        steps=images.num_steps(config, dataset),
    )
    plan = [stage]
    options = dataclasses.replace(config, num_seeds=1, workdir=str(folder / "source"))
    run = images.open_run("weight_transfer", options, dataset)
    trained = distill.run_plan(
        plan, run=run, validation=dataset.validation.examples, **plans.run_options(options, plan)
    )
    outputs = distill.save_results(
        run,
        plan,
        trained,
        dataset.test.examples,
        title="The source task",
        class_names=dataset.class_names,
        students=("source",),
        comparisons=(),
        reference="source",
    )
    return distill.Pretrained("source", stage.model, outputs.trained["source"][0].variables)


def make_plan(
    config: Config, target: data.Dataset, source: distill.Pretrained
) -> tuple[distill.Stage | distill.Pretrained, ...]:
    """Makes the stages of the target task: each variant with each number of labels."""
    network = images.make_cnn(FEATURES, HIDDEN, target, config)
    stages: list[distill.Stage] = []
    for count in (*config.num_labels, len(target.train.labels)):
        labelled_only, _ = data.few_labels(target.train.examples, count)
        scratch = images.make_stage(
            f"scratch_{count}",
            network,
            labelled_only,
            supervised_loss,
            config,
            steps=images.num_steps(config, target),
        )
        transferred = dataclasses.replace(
            scratch,
            name=f"transferred_{count}",
            start="source",
            transfer=plans.transfer_all_but_head,
        )
        frozen = dataclasses.replace(
            transferred,
            name=f"frozen_{count}",
            tx=transfer.freeze(transferred.tx, "conv{i}/{rest...}"),
        )
        stages += [scratch, transferred, frozen]
    return (source, *stages)


def plot_labels(rows: Sequence[ResultRow], path: Path, *, total: int) -> None:
    """Draws the accuracy of each variant against the number of labels."""
    with figures.new_figure(path, 7, 4.5) as figure:
        axes = figure.subplots()
        for (variant, label), colour in zip(VARIANTS.items(), figures.COLOURS, strict=False):
            of_variant = [row for row in rows if row.name.startswith(f"{variant}_")]
            counts = [int(row.name.removeprefix(f"{variant}_")) for row in of_variant]
            means = [100 * (row.accuracy_mean or 0) for row in of_variant]
            stds = [100 * (row.accuracy_std or 0) for row in of_variant]
            axes.errorbar(
                counts, means, yerr=stds, color=colour, marker="o", capsize=4, label=label
            )
        axes.set(
            xscale="log",
            xlabel=f"labelled images of the target task (of {total:,})",
            ylabel="test accuracy (%)",
        )
        timing.set_ratio_ticks(axes.xaxis)
        axes.legend(loc="lower right")


def main(config: Config) -> None:
    """Trains the source task, then the target task, and compares the variants."""
    config.check()
    dataset = images.load(config)
    source, target = split_classes(config, dataset)
    total = len(target.train.labels)
    for count in config.num_labels:
        cli.require(
            1 <= count < total,
            f"--num-labels {count}: choose from 1 to {total - 1}, which is all but one",
        )
    folder = plans.choose_folder("weight_transfer", config, config.dataset)
    pretrained = train_source(config, source, folder)
    counts = (*config.num_labels, total)
    students = [f"{variant}_{count}" for count in counts for variant in VARIANTS]
    plan = make_plan(config, target, pretrained)
    options = dataclasses.replace(config, workdir=str(folder / "target"))
    run = images.open_run("weight_transfer", options, target)
    trained = distill.run_plan(
        plan, run=run, validation=target.validation.examples, **plans.run_options(options, plan)
    )
    outputs = distill.save_results(
        run,
        plan,
        trained,
        target.test.examples,
        title="From one task to another",
        class_names=target.class_names,
        students=students,
        comparisons=[
            (f"{variant}_{count}", f"scratch_{count}")
            for count in counts
            for variant in ("transferred", "frozen")
        ],
        reference=f"scratch_{total}",
        unlisted=("source",),
    )
    if distill.is_primary_process():
        path = folder / "labels.png"
        plot_labels(outputs.rows, path, total=total)
        print(f"Accuracy against the number of labels: {path}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
