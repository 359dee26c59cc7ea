"""A BERT of half the layers: what does it keep, and what teaches it best?

A pretrained BERT is fine-tuned on labelled sentences. Students with half of its layers begin with every second one of
the teacher's and learn from the labels alone; by DistilBERT's triple loss, from soft targets, the labels and the
direction of the last hidden states; and by TinyBERT's losses, from soft targets, all hidden states and the maps of
attention, whose layers a map pairs with the teacher's. DistilBERT's third task is masked words, here it is the labels.
`--student` begins with another pretrained BERT instead, which may be narrower: its states are then projected.

Paper: Sanh et al., DistilBERT, a distilled version of BERT, https://arxiv.org/abs/1910.01108; Jiao et al., TinyBERT,
https://arxiv.org/abs/1909.10351

Command: python -m experiments.distilbert --dataset FOLDER

On an accelerator, in full size: --bert FOLDER_OF_BERT_BASE --frozen-layers -1 --teacher-epochs 3 --epochs 3 --bf16

Result: teacher 87.1 %, of which labels keep 98.1 %, distilbert 98.5 %, tinybert 97.8 % with 76 % of the parameters
(SST-2, 2 seeds)

Time: 9 minutes on 2 CPU cores
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax import Array

from experiments import cli, plans, text
from jaxkd import distill, losses, transfer
from jaxkd.data import tokens
from jaxkd.figures import COLOURS, draw
from jaxkd.models import Outputs
from jaxkd.train import Batch, Loss

Projector: TypeAlias = dict[str, Array] | None
"""Parameters of `jaxkd.losses.project`, where a student is narrower than its teacher."""

PUBLISHED = (60.0, 97.0)
"""Size and retention in percent that DistilBERT's paper gives: 40 % fewer parameters, 97 % of BERT on GLUE."""


@dataclasses.dataclass(frozen=True)
class Config(text.Options):
    """Options of the experiment."""

    seeds: int = 2
    """How many times the students are trained; the teacher is trained once."""
    teacher_epochs: int = 1
    """Passes of the teacher over the labelled texts; it is trained once, for all seeds."""
    teacher_learning_rate: float = 1e-4
    """AdamW's for the teacher, after a warm-up; it falls to 0 along a line."""
    epochs: int = 1
    """Passes of the students over the texts."""
    evaluations: int = 4
    """How often each network meets the validation split in training, evenly spread."""
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
    student: str | None = None
    """A BERT or DistilBERT of the teacher's tokenizer with which a student begins instead, named as by --bert."""

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        super().check()
        for name in ("cosine_weight", "hidden_weight", "map_weight"):
            cli.require(getattr(self, name) >= 0, f"--{name.replace('_', '-')} {getattr(self, name)}: at least 0")


def triple(config: Config) -> Loss:
    """DistilBERT's: soft targets, labels, and the angle between the last hidden states."""
    task = plans.taught(config)

    def loss(student: Outputs, teachers: tuple[Outputs, ...], batch: Batch, projector: Projector = None) -> Array:
        states, taught = projected(projector, last_states(student)), last_states(teachers[0])
        angle = mean_over_tokens(losses.hidden_cosine_loss(states, taught), batch["inputs"] != 0)
        return task(student, teachers, batch) + config.cosine_weight * angle

    return loss


def layer_by_layer(config: Config, students: int, teachers: int) -> Loss:
    """TinyBERT's: soft targets and labels, embeddings and hidden states, and maps of attention."""
    task, layers = plans.taught(config), losses.uniform_layers(students, teachers)

    def loss(student: Outputs, taught: tuple[Outputs, ...], batch: Batch, projector: Projector = None) -> Array:
        where = batch["inputs"] != 0
        ours, theirs = student.features, taught[0].features

        def states_loss(one: Array, other: Array) -> Array:
            return losses.hidden_mse_loss(projected(projector, one), other)

        def maps_loss(one: Array, other: Array) -> Array:
            return losses.attention_map_loss(one, other, where=where[:, None, :, None] & where[:, None, None, :])

        def over_layers(loss: Callable[[Array, Array], Array], name: str) -> Array:
            return losses.layers_loss(loss, named(ours, name, students), named(theirs, name, teachers), layers=layers)

        states = over_layers(states_loss, "layer") + states_loss(ours["embeddings"], theirs["embeddings"])
        value = task(student, taught, batch) + config.hidden_weight * mean_over_tokens(states, where)
        return value + (config.map_weight * over_layers(maps_loss, "scores") if config.map_weight else 0)

    return loss


def projected(projector: Projector, states: Array) -> Array:
    """The student's states in the teacher's width, in which they are already if there is no projector."""
    return states if projector is None else losses.project(projector, states)


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


class Student(NamedTuple):
    """Who learns.

    Attributes:
        module: A BERT.
        start: How its stages begin: arguments of a stage.
        pretrained: The plan's entry from which they begin, if it is not the teacher.
    """

    module: Any
    start: dict[str, Any]
    pretrained: tuple[distill.Pretrained, ...] = ()


def choose_student(config: Config, prepared: text.Prepared) -> Student:
    """The student that the options name."""
    if config.student is None:
        return of_teacher(config, prepared.bert.module)
    return of_its_own(config.student, config, prepared)


def of_teacher(config: Config, teacher: Any) -> Student:
    """One of some of the teacher's layers."""
    whole = teacher.layers
    layers = tuple(range(0, whole - whole % 2, 2)) if config.layers is None else config.layers
    cli.require(
        len(layers) > 0 and len({*layers}) == len(layers) and all(0 <= layer < whole for layer in layers),
        f"--layers {' '.join(map(str, layers))}: each once, from 0 to {whole - 1}",
    )
    rules = transfer.layer_rules("params/block{i}/{rest...}", layers)
    return Student(teacher.clone(layers=len(layers)), {"start": "teacher", "transfer": text.by_rules(rules)})


def of_its_own(name: str, config: Config, prepared: text.Prepared) -> Student:
    """One that comes pretrained, as `jaxkd.hub.find` takes its name."""
    teacher, told = prepared.bert.module, f"--student {name}"
    bert = text.load_bert(name, teacher.num_classes)
    tokens.check_same_tokenizer(prepared.bert.tokenizer, bert.tokenizer)
    longest, module = prepared.widths[-1], bert.module
    cli.require(module.layers <= teacher.layers, f"{told} has {module.layers} layers, the teacher {teacher.layers}")
    cli.require(module.positions >= longest, f"{told} has places for {module.positions} tokens, a text has {longest}")
    cli.require(
        module.heads == teacher.heads or not config.map_weight,
        f"{told} has {module.heads} heads and the teacher {teacher.heads}, whose maps cannot be paired: --map-weight 0",
    )
    entry = distill.Pretrained("student", plans.model(module, config), bert.variables)
    return Student(module, {"start": "student"}, (entry,))


def make_plan(
    config: Config, prepared: text.Prepared, student: Student, teacher: distill.Trained
) -> tuple[distill.Stage | distill.Pretrained, ...]:
    """Who learns what from whom."""
    module, full = student.module, prepared.bert.module
    model, steps = plans.model(module, config), plans.steps(config, len(prepared.train["labels"]))
    tx = functools.partial(text.fine_tuning, config.learning_rate, steps)
    frozen = tx(frozen_layers=min(config.frozen_layers, 0))
    given: dict[str, Any] = {"options": config, "steps": steps, "tx": frozen, **student.start}
    taught = given | {"teachers": ("teacher",)}
    if module.hidden != full.hidden:
        widths = {"student_features": module.hidden, "teacher_features": full.hidden}
        taught |= {"init_loss": functools.partial(losses.init_projector, **widths), "loss_tx": tx(frozen_layers=-1)}
    by_layers = layer_by_layer(config, module.layers, full.layers)
    return (
        distill.Pretrained("teacher", prepared.model, teacher.variables),
        *student.pretrained,
        plans.stage("labels", model, prepared.train, plans.supervised, **given),
        plans.stage("distilbert", model, prepared.train, triple(config), **taught),
        plans.stage("tinybert", model, prepared.train, by_layers, **taught),
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
    student = choose_student(config, prepared)
    run = plans.open_run("distilbert", config, config.dataset, text.arrays(prepared))
    teacher = text.train_teacher(run, config, prepared)
    plan = make_plan(config, prepared, student, teacher)
    trained = plans.train(run, config, plan, validation=prepared.validation, widths=prepared.widths)
    students = tuple(one.name for one in plan if isinstance(one, distill.Stage))
    done = plans.leave(
        run,
        plan,
        trained | {"teacher": [teacher]},
        prepared.test,
        title="A BERT of half the layers",
        students=students,
        comparisons=[(name, "labels") for name in students[1:]] + [(name, "teacher") for name in students],
        remarks=remarks,
        unlisted=("student",),
        widths=prepared.widths,
        **text.MEASURED,
    )
    print("\n".join(remarks(done.rows, done.folder)[:1]))


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
