"""Distils a fine-tuned BERT into a BERT with half of its layers.

Question: how much of BERT's accuracy does half of its layers retain, and which loss retains most?

A pretrained BERT is fine-tuned on labelled sentences. The students start from every second layer of
the teacher and learn from the labels alone; by DistilBERT's triple loss, which is soft targets,
labels and the cosine of the last hidden states; and by TinyBERT's losses, which are soft targets,
all hidden states and the attention maps of paired layers. DistilBERT's own labels are masked words;
here they are the classes of the sentences. With --student, the students start from another
pretrained BERT. It may be narrower: its hidden states are then projected to the teacher's width.

Papers: Sanh et al., DistilBERT, a distilled version of BERT, https://arxiv.org/abs/1910.01108; Jiao
et al., TinyBERT, https://arxiv.org/abs/1909.10351

Command: python -m experiments.distilbert --dataset FOLDER

On an accelerator: python -m experiments.distilbert --dataset FOLDER --bert FOLDER_OF_BERT_BASE
--frozen-layers -1 --teacher-epochs 3 --epochs 3 --bf16

Result: teacher 87.1 %, of which labels retain 98.1 %, distilbert 98.5 % and tinybert 97.8 %, with
76 % of the parameters (SST-2, 2 seeds)

Time: 9 minutes on 2 CPU cores
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from experiments.common import cli, plans, texts
from experiments.common.options import make_model, num_steps
from jaxkd import distill, losses, transfer
from jaxkd.cli.berts import load_classifier, make_transfer
from jaxkd.data import tokens
from jaxkd.distill import Batch, LossContext, LossFn
from jaxkd.distill.methods import supervised_loss
from jaxkd.models import Outputs
from jaxkd.runs import ResultRow
from jaxkd.runs.figures import COLOURS, new_figure
from jaxkd.runs.results import format_mean_and_std

PUBLISHED = (60.0, 97.0)
"""Size and retention of DistilBERT in its paper, in percent: 40 % fewer parameters than BERT, and
97 % of its score on GLUE."""


@dataclasses.dataclass(frozen=True)
class Config(texts.Options):
    """Options of the experiment."""

    num_seeds: int = 2
    """Number of seeds. The students are trained once for each, the teacher once for all."""
    teacher_epochs: int = 1
    """Passes of the teacher over the labelled texts. It is trained once, for all seeds."""
    teacher_learning_rate: float = 1e-4
    """Highest learning rate of AdamW for the teacher. It rises in a warm-up and falls linearly to
    0."""
    epochs: int = 1
    """Passes of each student over the labelled texts."""
    evaluations: int = 4
    """Number of evaluations of each network on the validation texts, evenly spread."""
    batch_size: int = 32
    """Number of texts in a training step."""
    learning_rate: float = 5e-5
    """Highest learning rate of AdamW for the students. It rises in a warm-up and falls linearly to
    0."""
    temperature: float = 2.0
    """Temperature of the soft targets, above 0."""
    alpha: float = 0.7
    """Weight of the soft targets, from 0 to 1. The labels have the rest. DistilBERT's weights have
    the ratio 5 to 2."""
    cosine_weight: float = 0.15
    """Weight of the cosine of the last hidden states in the triple loss. DistilBERT's is a seventh
    of the other two weights together."""
    hidden_weight: float = 1.0
    """Weight of the difference of hidden states in TinyBERT's loss."""
    map_weight: float = 0.1
    """Weight of the difference of attention maps in TinyBERT's loss."""
    layers: tuple[int, ...] | None = None
    """Layers of the teacher from which the students start, counted from 0. By default every second
    one."""
    student: str | None = None
    """Another BERT or DistilBERT from which the students start, named as for --bert. It must have
    the teacher's tokenizer."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        super().check()
        for name in ("cosine_weight", "hidden_weight", "map_weight"):
            value = getattr(self, name)
            option = f"--{name.replace('_', '-')}"
            cli.require(value >= 0, f"{option} {value}: needs at least 0")


def make_triple_loss(config: Config) -> LossFn:
    """Makes DistilBERT's loss: soft targets, labels and the cosine of the last hidden states."""
    soft_target_loss = plans.make_soft_target_loss(config)

    def loss(
        student: Outputs, teachers: tuple[Outputs, ...], batch: Batch, context: LossContext
    ) -> Array:
        student_states = project_states(context.params, last_hidden_states(student))
        cosine_loss = losses.hidden_cosine_loss(student_states, last_hidden_states(teachers[0]))
        cosine_term = mean_over_tokens(cosine_loss, where=batch["inputs"] != 0)
        value = soft_target_loss(student, teachers, batch, context)
        return value + config.cosine_weight * cosine_term

    return loss


def make_layer_loss(config: Config, student_layers: int, teacher_layers: int) -> LossFn:
    """Makes TinyBERT's loss: soft targets, labels, all hidden states and the attention maps.

    Args:
        config: The options.
        student_layers: Number of the student's layers.
        teacher_layers: Number of the teacher's layers.
    """
    soft_target_loss = plans.make_soft_target_loss(config)
    layer_map = losses.uniform_layers(student_layers, teacher_layers)

    def loss(
        student: Outputs, teachers: tuple[Outputs, ...], batch: Batch, context: LossContext
    ) -> Array:
        teacher = teachers[0]
        where = batch["inputs"] != 0

        def hidden_loss(student_states: Array, teacher_states: Array) -> Array:
            return losses.hidden_mse_loss(
                project_states(context.params, student_states), teacher_states
            )

        def map_loss(student_map: Array, teacher_map: Array) -> Array:
            # Entries count if both the query and the key are tokens.
            where_both = where[:, None, :, None] & where[:, None, None, :]
            return losses.attention_map_loss(student_map, teacher_map, where=where_both)

        def mean_over_layers(loss: Callable[[Array, Array], Array], feature: str) -> Array:
            return losses.layers_loss(
                loss,
                layer_features(student, feature, student_layers),
                layer_features(teacher, feature, teacher_layers),
                layers=layer_map,
            )

        hidden_term = mean_over_layers(hidden_loss, "layer") + hidden_loss(
            student.features["embeddings"], teacher.features["embeddings"]
        )
        value = soft_target_loss(student, teachers, batch, context)
        value += config.hidden_weight * mean_over_tokens(hidden_term, where=where)
        # Without a weight, the maps may differ in their number of heads.
        if config.map_weight:
            value += config.map_weight * mean_over_layers(map_loss, "scores")
        return value

    return loss


def project_states(projector: dict[str, Array] | None, states: Array) -> Array:
    """Projects a student's states to the teacher's width, or returns them without a projector."""
    return states if projector is None else losses.project(projector, states)


def layer_features(outputs: Outputs, feature: str, num_layers: int) -> list[Array]:
    """Returns a feature of each layer of a BERT, from the first layer to the last."""
    return [outputs.features[f"{feature}{i}"] for i in range(1, num_layers + 1)]


def last_hidden_states(outputs: Outputs) -> Array:
    """Returns the hidden states of a BERT's last layer, `[B, S, D]`."""
    num_layers = sum(name.startswith("layer") for name in outputs.features)
    return outputs.features[f"layer{num_layers}"]


def mean_over_tokens(values: Array, *, where: Array) -> Array:
    """Averages values `[B, S]` over the tokens of each text."""

    def token_mean(text_values: Array, text_where: Array) -> Array:
        return losses.token_mean(text_values, where=text_where)

    return jax.vmap(token_mean)(values, where)


class Student(NamedTuple):
    """The network of the students and its initial weights.

    Attributes:
        module: A BERT.
        start: The arguments of its stages that give them these weights.
        pretrained: The plan's entry for a pretrained student; empty if it is cut from the teacher.
    """

    module: Any
    start: dict[str, Any]
    pretrained: tuple[distill.Pretrained, ...] = ()


def choose_student(config: Config, data: texts.TextData) -> Student:
    """Returns the student that the options name."""
    if config.student is None:
        return cut_from_teacher(config, data.bert.module)
    return load_student(config.student, config, data)


def cut_from_teacher(config: Config, teacher: Any) -> Student:
    """Returns a student that starts from some of the teacher's layers.

    Raises:
        OptionError: If `--layers` does not name different layers of the teacher.
    """
    num_layers = teacher.layers
    layers = config.layers
    if layers is None:
        # Half of the layers, rounded down.
        layers = tuple(range(0, num_layers - num_layers % 2, 2))
    are_different = 0 < len(layers) == len({*layers})
    cli.require(
        are_different and all(0 <= layer < num_layers for layer in layers),
        f"--layers {' '.join(map(str, layers))}: choose different layers from 0 to "
        f"{num_layers - 1}",
    )
    rules = transfer.layer_rules("params/block{i}/{rest...}", layers)
    start = {"start": "teacher", "transfer": make_transfer(rules)}
    return Student(teacher.clone(layers=len(layers)), start)


def load_student(name: str, config: Config, data: texts.TextData) -> Student:
    """Loads a student that starts from a pretrained BERT of its own.

    Args:
        name: Its name, as `jaxkd.weights.hub.find_hub_folder` takes it.
        config: The options.
        data: The teacher and its tokens.

    Raises:
        OptionError: If its layers, positions or heads do not fit the teacher's.
        DataError: If its tokenizer is not the teacher's.
    """
    teacher = data.bert.module
    bert = load_classifier(name, data.bert.class_names).bert
    student = bert.module
    tokens.check_same_tokenizer(data.bert.tokenizer, bert.tokenizer)
    longest = data.buckets.lengths[-1]
    cli.require(
        student.layers <= teacher.layers,
        f"--student {name}: has {student.layers} layers, the teacher only {teacher.layers}",
    )
    cli.require(
        student.positions >= longest,
        f"--student {name}: has positions for {student.positions} tokens, but a text has {longest}",
    )
    cli.require(
        student.heads == teacher.heads or not config.map_weight,
        f"--student {name}: has {student.heads} attention heads and the teacher {teacher.heads}, "
        "whose maps cannot be paired; use --map-weight 0",
    )
    entry = distill.Pretrained("student", make_model(student, config), bert.variables)
    return Student(student, {"start": "student"}, (entry,))


def make_plan(
    config: Config, data: texts.TextData, student: Student, teacher: distill.TrainedModel
) -> tuple[distill.Stage | distill.Pretrained, ...]:
    """Makes the stages of the students, after the fine-tuned teacher."""
    module = student.module
    teacher_module = data.bert.module
    steps = num_steps(config, len(data.train["labels"]))
    make_tx = functools.partial(texts.fine_tuning, config.learning_rate, steps)
    stage = functools.partial(
        plans.make_stage,
        model=make_model(module, config),
        examples=data.train,
        options=config,
        steps=steps,
        # --frozen-layers counts layers of the teacher: of a student, only the embeddings freeze.
        tx=make_tx(frozen_layers=min(config.frozen_layers, 0)),
        **student.start,
    )
    distilled = functools.partial(stage, teachers=("teacher",))
    if module.hidden != teacher_module.hidden:
        widths = {"student_features": module.hidden, "teacher_features": teacher_module.hidden}
        init_projector = functools.partial(losses.init_projector, **widths)
        # The stage's own optimizer masks the student's tree, which the projector is not in.
        projector_tx = make_tx(frozen_layers=-1)
        distilled = functools.partial(distilled, init_loss=init_projector, loss_tx=projector_tx)
    return (
        distill.Pretrained("teacher", data.model, teacher.variables),
        *student.pretrained,
        stage("labels", loss=supervised_loss),
        distilled("distilbert", loss=make_triple_loss(config)),
        distilled("tinybert", loss=make_layer_loss(config, module.layers, teacher_module.layers)),
    )


class Retention(NamedTuple):
    """What a student retains of the teacher, in percent.

    Attributes:
        size: Its number of parameters.
        accuracy: `[seeds]`, its accuracy.
    """

    size: float
    accuracy: np.ndarray


def compute_retention(rows: Sequence[ResultRow]) -> dict[str, Retention]:
    """Computes the size and the accuracy of each student in percent of the teacher's."""
    teacher, *students = rows
    return {
        row.name: Retention(
            100 * (row.parameters or 0) / (teacher.parameters or 1),
            100 * np.array(row.accuracy) / teacher.accuracy_mean,
        )
        for row in students
    }


def describe_retention(rows: Sequence[ResultRow]) -> str:
    """Describes what the students retain, in a Markdown list."""
    lines = [
        f"- {name} retains {format_mean_and_std(retention.accuracy)} % of the teacher's accuracy "
        f"with {retention.size:.1f} % of its parameters."
        for name, retention in compute_retention(rows).items()
    ]
    published = "- DistilBERT's paper: 97 % of BERT's score on GLUE with 60 % of its parameters."
    return "\n".join([*lines, published])


def make_remarks(rows: Sequence[ResultRow], folder: Path) -> list[str]:
    """Returns the report's paragraphs on retention, and draws their figure into the folder."""
    plot_retention(compute_retention(rows), folder / "retention.png")
    return [
        describe_retention(rows),
        "![Accuracy that the students retain, against their size](retention.png)",
    ]


def plot_retention(retentions: Mapping[str, Retention], path: Path) -> None:
    """Draws accuracy against size, both in percent of the teacher's."""
    with new_figure(path, 6.4, 4.0) as figure:
        axes = figure.add_subplot()
        for i, (name, retention) in enumerate(retentions.items()):
            mean = retention.accuracy.mean()
            std = retention.accuracy.std(ddof=1) if len(retention.accuracy) > 1 else None
            # Students of one size are drawn side by side.
            x = retention.size + 1.2 * (i - (len(retentions) - 1) / 2)
            axes.errorbar(x, mean, std, fmt="o", capsize=4, color=COLOURS[i], label=name)
        axes.plot(*PUBLISHED, "*", color="grey", markersize=12, label="DistilBERT's paper, GLUE")
        axes.axhline(100, color="grey", linewidth=0.8)
        axes.set(
            xlabel="parameters, % of the teacher's",
            ylabel="accuracy, % of the teacher's",
            xlim=(50, 105),
        )
        axes.legend(loc="lower right")


def main(config: Config) -> None:
    """Fine-tunes the teacher, trains the students, compares them and writes the report."""
    config.check()
    dataset = texts.load(config)
    data = texts.encode(config, dataset)
    student = choose_student(config, data)
    sources = texts.list_sources(data)
    run = plans.open_run(
        "distilbert", config, config.dataset, texts.list_arrays(data), sources=sources
    )
    teacher = texts.train_teacher(run, config, data)
    plan = make_plan(config, data, student, teacher)
    trained = distill.run_plan(
        plan,
        run=run,
        validation=data.validation,
        buckets=data.buckets,
        **plans.run_options(config, plan),
    )
    students = [entry.name for entry in plan if isinstance(entry, distill.Stage)]
    outputs = distill.save_results(
        run,
        plan,
        # The teacher in place of the plan's pretrained one, which has no training time.
        trained | {"teacher": [teacher]},
        data.test,
        title="A BERT of half the layers",
        class_names=dataset.class_names,
        students=students,
        comparisons=[
            *((name, "labels") for name in students if name != "labels"),
            *((name, "teacher") for name in students),
        ],
        make_remarks=make_remarks,
        unlisted=("student",),
        tokenizer=data.bert.tokenizer,
        max_length=min(data.max_length, student.module.positions),
        buckets=data.buckets,
        **texts.TIMING,
    )
    if distill.is_primary_process():
        print(describe_retention(outputs.rows))


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
