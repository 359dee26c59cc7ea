"""How many labels does it save to start from weights that were trained on another task?

A network learns to tell one half of a data set's classes apart: the source task. Networks of its architecture then
learn the other half, the target task, from 100, 300, 1,000 and all labels: from scratch, from the source's weights with
a new last layer, and from these with all but the dense layers frozen. All take equally many steps.

Paper: Yosinski et al., How transferable are features in deep neural networks?, https://arxiv.org/abs/1411.1792

Command: python -m experiments.weight_transfer
On an accelerator: python -m experiments.weight_transfer --dataset cifar10 --epochs 20 --seeds 5

Result: with 100 labels 88.5 % from scratch, 90.3 % transferred, 90.1 % frozen; with 300, 1,000 and all no gain
(fashion_mnist_mini, 3 seeds)

Time: 5 minutes on 2 CPU cores
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import cli, plans, timing, vision
from jaxkd import data, distill, parallel, transfer
from jaxkd.figures import COLOURS, draw

FEATURES, HIDDEN = (32, 64), 64
"""Channels of the convolutions, and width before the logits."""
WAYS = {
    "scratch": "from scratch",
    "transferred": "from the source's weights",
    "frozen": "from these, convolutions frozen",
}


@dataclasses.dataclass(frozen=True)
class Config(vision.Options):
    """Options of the experiment."""

    epochs: int = 8
    """Passes over all training images of a task; networks with fewer labels take as many steps."""
    target_classes: tuple[str, ...] = ()
    """Names of the target task's classes, two or more; by default the second half. The others are the source's."""
    num_labels: tuple[int, ...] = (100, 300, 1000)
    """How many labelled images of the target task there are, in turn; all of them come last in any case."""

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        super().check()
        cli.require(len({*self.num_labels}) == len(self.num_labels), f"--num-labels {self.num_labels}: each only once")


def split_classes(config: Config, dataset: data.Dataset) -> tuple[data.Dataset, data.Dataset]:
    """The source and the target task.

    Raises:
        OptionError: If there is no such class, or fewer than two on either side.
    """
    names = dataset.class_names
    chosen = config.target_classes or names[len(names) // 2 :]
    unknown = sorted({*chosen} - {*names})
    cli.require(not unknown, f"--target-classes: no class is named {', '.join(unknown)}; there are {', '.join(names)}")
    source = tuple(name for name in names if name not in chosen)
    target = tuple(name for name in names if name in chosen)
    cli.require(min(len(source), len(target)) >= 2, "--target-classes: each task needs at least two of the classes")
    return take_classes(dataset, source), take_classes(dataset, target)


def take_classes(dataset: data.Dataset, names: Sequence[str]) -> data.Dataset:
    """The images of some classes, which are numbered anew."""
    number = np.full(len(dataset.class_names), -1, np.int32)
    number[[dataset.class_names.index(name) for name in names]] = range(len(names))

    def take(split: data.Split) -> data.Split:
        labels = number[split.labels]
        return data.Split(split.images[labels >= 0], labels[labels >= 0])

    return data.Dataset(take(dataset.train), take(dataset.validation), take(dataset.test), tuple(names))


def make_plan(
    config: Config, target: data.Dataset, source: distill.Pretrained
) -> tuple[distill.Stage | distill.Pretrained, ...]:
    """The target task, learnt in every way from every number of labels."""
    total = len(target.train.labels)
    network = vision.cnn(FEATURES, HIDDEN, target, config)
    steps = vision.steps(config, target)
    stages: list[distill.Stage] = []
    for count in (*config.num_labels, total):
        few, _ = vision.few_labels(target, count)
        scratch = vision.stage(f"scratch_{count}", network, few, plans.supervised, config, steps=steps)
        moved = dataclasses.replace(scratch, name=f"transferred_{count}", start="source", transfer=plans.with_new_head)
        frozen = dataclasses.replace(moved, name=f"frozen_{count}", tx=transfer.freeze(moved.tx, "conv{i}/{rest...}"))
        stages += [scratch, moved, frozen]
    return (source, *stages)


def train_source(config: Config, dataset: data.Dataset, folder: Path) -> distill.Pretrained:
    """The source task's network, in a run of its own."""
    model = vision.cnn(FEATURES, HIDDEN, dataset, config)
    examples = {"inputs": dataset.train.images, "labels": dataset.train.labels}
    steps = vision.steps(config, dataset)
    options = dataclasses.replace(config, seeds=1, workdir=str(folder / "source"))
    done = vision.run(
        "weight_transfer",
        options,
        dataset,
        [vision.stage("source", model, examples, plans.supervised, config, steps=steps)],
        title="The source task",
        students=("source",),
        comparisons=(),
        reference="source",
    )
    return distill.Pretrained("source", model, done.trained["source"][0].variables)


def plot(rows: Sequence[Mapping[str, Any]], path: Path, *, total: int) -> None:
    """Draws the accuracy against the number of labels, a line a way."""
    with draw(path, 7, 4.5) as figure:
        axes = figure.subplots()
        for (way, label), colour in zip(WAYS.items(), COLOURS, strict=False):
            chosen = [row for row in rows if row["name"].startswith(f"{way}_")]
            counts = [int(row["name"].removeprefix(f"{way}_")) for row in chosen]
            means = [100 * row["accuracy_mean"] for row in chosen]
            spread = [100 * (row["accuracy_std"] or 0) for row in chosen]
            axes.errorbar(counts, means, yerr=spread, color=colour, marker="o", capsize=4, label=label)
        axes.set(xscale="log", xlabel=f"labelled images of the target task (of {total:,})", ylabel="test accuracy (%)")
        timing.log_ticks(axes.xaxis)
        axes.legend(loc="lower right")


def main(config: Config) -> None:
    """Trains, compares and reports."""
    config.check()
    dataset = data.load(config.dataset, config.data_dir, image_size=config.image_size)
    source, target = split_classes(config, dataset)
    folder, total = plans.workdir("weight_transfer", config, config.dataset), len(target.train.labels)
    for count in config.num_labels:
        cli.require(1 <= count < total, f"--num-labels {count}: choose from 1 to {total - 1}, which is all but one")
    given = train_source(config, source, folder)
    ways = [f"{way}_{count}" for count in (*config.num_labels, total) for way in WAYS]
    done = vision.run(
        "weight_transfer",
        dataclasses.replace(config, workdir=str(folder / "target")),
        target,
        make_plan(config, target, given),
        title="From one task to another",
        students=ways,
        comparisons=[(name, f"scratch_{name.split('_')[1]}") for name in ways if not name.startswith("scratch")],
        reference=f"scratch_{total}",
        unlisted=("source",),
    )
    if parallel.is_first_host():
        plot(done.rows, folder / "labels.png", total=total)
        print(f"Accuracy against the number of labels: {folder / 'labels.png'}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
