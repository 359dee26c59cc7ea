"""Does a deeper teacher teach a small network more, and by which method?

ResNets of --depths layers learn from all training images. A ResNet of --student-depth layers sees --num-images of them,
with labels: alone, and from each of these teachers by each method. All students of a seed see the same images in as
many steps. A method's term stands beside the cross-entropy with the labels.

Terms and weights are those of Tian et al.'s comparison, whose code is RepDistiller, and for dkd those of its authors
for ResNets of one width, without their warm-up; crd draws its negatives from the batch. None is tuned to these images.

Papers: in the catalogue, jaxkd/README.md; Mirzadeh et al. on teachers that are too large for their student,
https://arxiv.org/abs/1902.03393; Tian et al. on the methods, https://arxiv.org/abs/1910.10699

Command: python -m experiments.compare_teachers
On an accelerator: python -m experiments.compare_teachers --dataset cifar10 --depths 32 56 110 --student-depth 20
    --width 16 --num-images None --epochs 200 --student-epochs 200 --batch-size 128 --learning-rate 3e-3 --augment
    --only kd dkd attention crd

Result: alone 75.3 %; by a ResNet-14 dkd 77.7 %, hint 77.2 %, rkd 77.2 %, kd 76.8 %, similarity 75.1 %, crd 74.9 %,
attention 72.7 %; a ResNet-20 teaches no better than a ResNet-8 (fashion_mnist_mini, 3 seeds)

Time: 9.5 minutes on 2 CPU cores
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import cli, methods, plans, vision
from experiments.methods import Method
from jaxkd import data, distill, losses, models, parallel
from jaxkd.figures import COLOURS, draw
from jaxkd.models import Outputs
from jaxkd.plan import Examples

STAGES = "stage1", "stage2", "stage3"
"""The features behind the stages of blocks."""


@dataclasses.dataclass(frozen=True)
class Config(vision.SoftOptions):
    """Options of the experiment."""

    depths: tuple[int, ...] = (8, 14, 20)
    """Layers of each teacher, 6n + 2."""
    student_depth: int = 8
    """Layers of the student, 6n + 2."""
    width: int = 8
    """Channels of the first stage of blocks, in teachers and student; the second has twice, the third four times as
    many."""
    epochs: int = 2
    """Passes of each teacher over the training images."""
    student_epochs: int = 16
    """Passes of each student over its images."""
    batch_size: int = 32
    """Images a step."""
    learning_rate: float = 1e-2
    """Adam's, at the start; it falls to 0 along a cosine."""
    num_images: int | None = 500
    """How many training images the students see, as many of each class; each seed draws its own. `None`: all."""
    only: tuple[str, ...] = ()
    """Names of the methods to compare; all, if none is given."""

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        super().check()
        for option, depths in (("--depths", self.depths), ("--student-depth", (self.student_depth,))):
            for depth in depths:
                cli.require(depth >= 8 and depth % 6 == 2, f"{option} {depth}: choose from 8, 14, 20 and so on, 6n + 2")
        once = 0 < len(self.depths) == len({*self.depths})
        cli.require(once, f"--depths {' '.join(map(str, self.depths))}: at least one, and each only once")
        cli.require(self.width >= 1, f"--width {self.width}: at least one channel is needed")
        cli.require(self.student_epochs >= 1, f"--student-epochs {self.student_epochs}: train for at least one")
        cli.require(self.alpha < 1, f"--alpha {self.alpha}: must be below 1, so that the labels have a part")
        cli.chosen(self.only, make_methods(self))


def make_methods(config: Config) -> dict[str, Method]:
    """The methods by name: terms and weights of RepDistiller, for dkd those of its authors for ResNets of one width."""
    shared = methods.methods(methods.Config(temperature=config.temperature))
    width = 4 * config.width

    def decoupled(s: Outputs, t: Outputs, batch: Any) -> Any:
        return losses.decoupled_loss(
            s.logits, t.logits, batch["labels"], temperature=config.temperature, non_target_weight=2.0
        )

    def hint(s: Outputs, t: Outputs, _: Any, projector: Any) -> Any:
        return losses.hint_loss(losses.project(projector, s.features["stage2"]), t.features["stage2"])

    def attention(s: Outputs, t: Outputs, _: Any) -> Any:
        return sum(losses.attention_transfer_mse_loss(s.features[name], t.features[name]) for name in STAGES)

    def similarity(s: Outputs, t: Outputs, _: Any) -> Any:
        return losses.similarity_preserving_loss(s.features["stage3"], t.features["stage3"])

    def embeddings(key: Any) -> Any:
        keys = zip(("student", "teacher"), jax.random.split(key), strict=True)
        return {name: losses.init_projector(subkey, width, methods.EMBEDDING) for name, subkey in keys}

    return {
        "kd": shared["kd"]._replace(weight=config.alpha / (1 - config.alpha)),
        "dkd": Method(1.0, decoupled),
        "hint": Method(100.0, hint, lambda key: losses.init_projector(key, width // 2, width // 2)),
        "attention": Method(1000.0, attention),
        "similarity": Method(3000.0, similarity),
        "rkd": shared["rkd"]._replace(weight=1.0),
        "crd": shared["crd"]._replace(weight=0.8, init=embeddings),
    }


def compared(config: Config) -> dict[str, Method]:
    """The methods that were asked for."""
    known = make_methods(config)
    return {name: known[name] for name in cli.chosen(config.only, known)}


def resnet(depth: int, config: Config, dataset: data.Dataset) -> models.Model:
    """A ResNet of so many layers for a data set's uint8 images."""
    widths = config.width, config.width, 2 * config.width, 4 * config.width
    module = models.CifarResNet((depth - 2) // 6, widths, num_classes=len(dataset.class_names))
    return vision.network(module, *data.channel_statistics(dataset.train.images), config)


def make_plan(config: Config, dataset: data.Dataset) -> tuple[distill.Stage, ...]:
    """Who learns what from whom."""
    everything: Examples = {"inputs": dataset.train.images, "labels": dataset.train.labels}
    count = len(dataset.train.labels) if config.num_images is None else config.num_images
    few, _ = vision.few_labels(dataset, count)
    networks = {depth: resnet(depth, config, dataset) for depth in (*config.depths, config.student_depth)}
    student = networks[config.student_depth]
    long: dict[str, Any] = {"options": config, "steps": vision.steps(config, dataset)}
    short: dict[str, Any] = {"options": config, "steps": math.ceil(config.student_epochs * count / config.batch_size)}
    stages = [
        vision.stage(f"resnet{depth}", networks[depth], everything, plans.supervised, **long) for depth in config.depths
    ]
    stages.append(vision.stage("alone", student, few, plans.supervised, **short))
    for name, method in compared(config).items():
        for depth in config.depths:
            loss, taught = methods.with_labels(method), {"teachers": (f"resnet{depth}",), "init_loss": method.init}
            stages.append(vision.stage(f"{name}_resnet{depth}", student, few, loss, **short, **taught))
    return tuple(stages)


def plot(rows: Sequence[Mapping[str, Any]], path: Path, config: Config) -> None:
    """Draws the student's accuracy against the teacher's depth, a line a method, and above it the teachers' own."""
    by_name = {row["name"]: row for row in rows}
    places = np.arange(len(config.depths))

    def line(axes: Any, shift: float, prefix: str, **style: Any) -> None:
        chosen = [by_name[f"{prefix}resnet{depth}"] for depth in config.depths]
        means, spread = ([100 * (row[key] or 0) for row in chosen] for key in ("accuracy_mean", "accuracy_std"))
        axes.errorbar(places + shift, means, yerr=spread, marker="o", ms=5, capsize=3, **style)

    with draw(path, 7.5, 6) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
        line(above, 0, "", color="#666666")
        alone, spread = (100 * (by_name["alone"][key] or 0) for key in ("accuracy_mean", "accuracy_std"))
        below.axhline(alone, color="#666666", ls="--", label="alone (± std)")
        below.axhspan(alone - spread, alone + spread, color="#666666", alpha=0.12, lw=0)
        names = list(compared(config))
        shifts = np.linspace(-0.18, 0.18, len(names))  # so that no error bar hides another
        for name, colour, shift in zip(names, COLOURS, shifts, strict=False):
            line(below, shift, f"{name}_", color=colour, label=name, lw=1.2)
        above.set(title="The teachers", ylabel="accuracy (%)")
        below.set(title=f"ResNet-{config.student_depth}, taught by them", ylabel="test accuracy (%)", xlabel="teacher")
        below.set_xticks(places, [f"ResNet-{depth}" for depth in config.depths])
        figure.legend(loc="outside right center")


def main(config: Config) -> None:
    """Trains, compares and reports."""
    config.check()
    dataset = data.load(config.dataset, config.data_dir, image_size=config.image_size)
    plan = make_plan(config, dataset)
    students = [stage.name for stage in plan[len(config.depths) :]]
    low, high = (f"resnet{end(config.depths)}" for end in (min, max))
    upwards = [(f"{name}_{high}", f"{name}_{low}") for name in compared(config) if low != high]
    done = vision.run(
        "compare_teachers",
        config,
        dataset,
        plan,
        title="A ladder of teachers",
        students=students,
        comparisons=[(name, "alone") for name in students[1:]] + upwards,
        reference=high,
    )
    if parallel.is_first_host():
        plot(done.rows, done.folder / "depths.png", config)
        print(f"Accuracy against the teacher's depth: {done.folder / 'depths.png'}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
