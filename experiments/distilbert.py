"""A BERT of half the layers: what does it keep, and what teaches it best?

A pretrained BERT is fine-tuned on labelled sentences. Students with half of its layers begin with every second one of
the teacher's and learn from the labels alone; by DistilBERT's triple loss, from soft targets, the labels and the
direction of the last hidden states; and by TinyBERT's losses, from soft targets, all hidden states and the maps of
attention, whose layers a map pairs with the teacher's. DistilBERT's third task is masked words, here it is the labels.

Paper: Sanh et al., DistilBERT, a distilled version of BERT, https://arxiv.org/abs/1910.01108; Jiao et al., TinyBERT,
https://arxiv.org/abs/1909.10351

Command: python -m experiments.distilbert --dataset FOLDER

Result: teacher 88.2 %, of which labels keep 97.5 %, distilbert 97.2 %, tinybert 96.7 % with 76 % of the parameters
(SST-2, 3 seeds)

Time: 15 minutes on 2 CPU cores shared with other work
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from experiments import cli, plans, text
from jaxkd import distill, losses, transfer
from jaxkd.figures import COLOURS, draw
from jaxkd.models import Outputs
from jaxkd.train import Batch, Loss

PUBLISHED = (60.0, 97.0)
"""Size and retention in percent that DistilBERT's paper gives: 40 % fewer parameters, 97 % of BERT on GLUE."""


@dataclasses.dataclass(frozen=True)
class Config(text.Options):
    """Options of the experiment."""

    epochs: int = 1
    """Passes of the students over the texts."""
    batch_size: int = 32
    """Texts a step."""
    learning_rate: float = 5e-5
    """AdamW's for the students, after a warm-up; it falls to 0 along a line."""
    temperature: float = 2.0
    """Softens the targets; above 0."""
    alpha: float = 0.7
    """Weight of the soft targets, from 0 to 1; the labels have the rest. DistilBERT's weights are 5 to 2."""
    cosine_weight: float = 0.15
    """Weight of the angle between last hidden states, in the triple loss; DistilBERT's is a seventh of the others."""
    hidden_weight: float = 1.0
    """Weight of the difference of hidden states, in TinyBERT's loss."""
    map_weight: float = 0.1
    """Weight of the difference of attention maps, in TinyBERT's loss."""
    layers: tuple[int, ...] | None = None
    """Layers of the teacher, counted from 0, with which a student begins; None: every second one."""

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        super().check()
        for name in ("cosine_weight", "hidden_weight", "map_weight"):
            cli.require(getattr(self, name) >= 0, f"--{name.replace('_', '-')} {getattr(self, name)}: at least 0")


def triple(config: Config) -> Loss:
    """DistilBERT's: soft targets, labels, and the angle between the last hidden states."""
    task = plans.taught(config)

    def loss(student: Outputs, teachers: tuple[Outputs, ...], batch: Batch) -> Array:
        states, taught = (last_states(outputs) for outputs in (student, teachers[0]))
        angle = mean_over_tokens(losses.hidden_cosine_loss(states, taught), batch["inputs"] != 0)
        return task(student, teachers, batch) + config.cosine_weight * angle

    return loss


def layer_by_layer(config: Config, students: int, teachers: int) -> Loss:
    """TinyBERT's: soft targets and labels, embeddings and hidden states, and maps of attention."""
    task, layers = plans.taught(config), losses.uniform_layers(students, teachers)

    def loss(student: Outputs, taught: tuple[Outputs, ...], batch: Batch) -> Array:
        where = batch["inputs"] != 0
        ours, theirs = student.features, taught[0].features
        states = losses.layers_loss(
            losses.hidden_mse_loss, named(ours, "layer", students), named(theirs, "layer", teachers), layers=layers
        )
        states += losses.hidden_mse_loss(ours["embeddings"], theirs["embeddings"])
        pairs = where[:, None, :, None] & where[:, None, None, :]

        def maps_loss(one: Array, other: Array) -> Array:
            return losses.attention_map_loss(one, other, where=pairs)

        maps = losses.layers_loss(
            maps_loss, named(ours, "scores", students), named(theirs, "scores", teachers), layers=layers
        )
        value = task(student, taught, batch) + config.map_weight * maps
        return value + config.hidden_weight * mean_over_tokens(states, where)

    return loss


def named(features: Mapping[str, Array], name: str, count: int) -> list[Array]:
    """What a BERT's layers say, from the first to the last."""
    return [features[f"{name}{i}"] for i in range(1, count + 1)]


def last_states(outputs: Outputs) -> Array:
    """The hidden states of the last layer."""
    count = sum(name.startswith("layer") for name in outputs.features)
    return outputs.features[f"layer{count}"]


def mean_over_tokens(values: Array, where: Array) -> Array:
    """Each text's mean `[B]` over its tokens, of values `[B, S]`."""
    return jax.vmap(lambda each, counts: losses.token_mean(each, where=counts))(values, where)


def make_plan(config: Config, prepared: text.Prepared, teacher: distill.Trained) -> tuple[Any, ...]:
    """Who learns what from whom."""
    whole = prepared.bert.module.layers
    layers = tuple(range(0, whole - whole % 2, 2)) if config.layers is None else config.layers
    cli.require(
        len(layers) > 0 and len({*layers}) == len(layers) and all(0 <= layer < whole for layer in layers),
        f"--layers {' '.join(map(str, layers))}: each once, from 0 to {whole - 1}",
    )
    student = plans.model(prepared.bert.module.clone(layers=len(layers)), config)
    rules = transfer.layer_rules("params/block{i}/{rest...}", layers)
    steps = plans.steps(config, len(prepared.train["labels"]))
    given: dict[str, Any] = {
        "options": config,
        "steps": steps,
        "tx": text.fine_tuning(config.learning_rate, steps, frozen_layers=min(config.frozen_layers, 0)),
        "start": "teacher",
        "transfer": text.by_rules(rules),
    }
    taught = given | {"teachers": ("teacher",)}
    return (
        distill.Pretrained("teacher", prepared.model, teacher.variables),
        plans.stage("labels", student, prepared.train, plans.supervised, **given),
        plans.stage("distilbert", student, prepared.train, triple(config), **taught),
        plans.stage("tinybert", student, prepared.train, layer_by_layer(config, len(layers), whole), **taught),
    )


def retained(rows: Sequence[dict]) -> dict[str, tuple[float, np.ndarray]]:
    """Of each student the size and, seed by seed, the accuracy, in percent of the teacher's."""
    teacher, *students = rows
    return {
        row["name"]: (
            100 * row["parameters"] / teacher["parameters"],
            100 * np.array(row["accuracy"]) / teacher["accuracy_mean"],
        )
        for row in students
    }


def remarks(rows: Sequence[dict], folder: Path) -> list[str]:
    """What the students keep, in words and as a figure."""
    kept = retained(rows)
    plot_retention(kept, folder / "retention.png")
    sentences = [
        f"- {name} keeps {plans.with_spread(values)} % of the teacher's accuracy with {size:.1f} % of its parameters."
        for name, (size, values) in kept.items()
    ]
    published = "- DistilBERT's paper: 97 % of BERT's score on GLUE with 60 % of its parameters."
    return ["\n".join([*sentences, published]), "![What the students keep of the teacher](retention.png)"]


def plot_retention(kept: Mapping[str, tuple[float, np.ndarray]], path: Path) -> None:
    """Draws accuracy against size, both in percent of the teacher's."""
    with draw(path, 6.4, 4.0) as figure:
        axes = figure.add_subplot()
        for i, (name, (size, values)) in enumerate(kept.items()):
            deviation = values.std(ddof=1) if len(values) > 1 else None
            place = size + 1.2 * (i - (len(kept) - 1) / 2)  # side by side, where sizes are one
            axes.errorbar(place, values.mean(), deviation, fmt="o", capsize=4, color=COLOURS[i], label=name)
        axes.plot(*PUBLISHED, "*", color="grey", markersize=12, label="DistilBERT's paper, GLUE")
        axes.axhline(100, color="grey", linewidth=0.8)
        axes.set(xlabel="parameters, % of the teacher's", ylabel="accuracy, % of the teacher's", xlim=(50, 105))
        axes.legend(loc="lower right")


def main(config: Config) -> None:
    """Trains, compares and reports."""
    config.check()
    prepared = text.prepare(config, text.load(config))
    run = plans.open_run("distilbert", config, config.dataset, text.arrays(prepared))
    teacher = text.train_teacher(run, config, prepared)
    plan = make_plan(config, prepared, teacher)
    trained = plans.train(run, config, plan, validation=prepared.validation, widths=prepared.widths)
    students = tuple(one.name for one in plan[1:])
    done = plans.leave(
        run,
        plan,
        trained | {"teacher": [teacher]},
        prepared.test,
        title="A BERT of half the layers",
        students=students,
        comparisons=[(name, "labels") for name in students[1:]] + [(name, "teacher") for name in students],
        remarks=remarks,
        widths=prepared.widths,
        **text.MEASURED,
    )
    print("\n".join(remarks(done.rows, done.folder)[:1]))


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
