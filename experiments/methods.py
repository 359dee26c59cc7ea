"""Which method teaches a small network most, when images are few?

A teacher learns from all training images. Students of one architecture see --num-images of them, with labels: one
learns from the labels alone, the others also from the teacher's logits, from its features, from relations between
examples or from contrasts, each by one method of `jaxkd.losses`. What a method needs beside, such as a projector, is
trained with the student and left behind.

Papers: in the catalogue, jaxkd/README.md. The weight of each term is the one of three, a factor of 10 apart, with the
best validation accuracy in one training under another seed than those below.

Command: python -m experiments.methods

Result: labels alone 82.0 %, dist 84.5 %, kd 84.1 %, reverse_kd 83.9 %, nkd 83.8 %; of the methods on features and
relations none helps (fashion_mnist_mini, 1,000 images, 3 seeds)

Time: 18 minutes on 2 busy CPU cores
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from experiments import cli, plans, vision
from jaxkd import data, distill, losses
from jaxkd.models import Outputs
from jaxkd.train import Batch, Loss

TEACHER, STUDENT = ((64, 128), 128), ((16, 32), 32)
"""Channels of the convolutions, and width before the logits."""
STAGES = "stage1", "stage2"
"""The features behind the convolutions."""
EMBEDDING = 64
"""Size of the vectors that the contrastive method compares."""


@dataclasses.dataclass(frozen=True)
class Config(vision.SoftOptions):
    """Options of the experiment."""

    epochs: int = 4
    """Passes of the teacher over the training images; the students take as many steps on their own."""
    learning_rate: float = 3e-3
    """Adam's, at the start; it falls to 0 along a cosine."""
    num_images: int = 1000
    """How many training images the students see; each seed draws its own."""
    only: tuple[str, ...] = ()
    """Names of the methods to compare; all, if none is given."""

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        super().check()
        cli.chosen(self.only, methods(self))


class Method(NamedTuple):
    """What a student learns from beside the labels.

    Attributes:
        weight: Of the term, the cross-entropy with the labels having 1.
        term: `(student, teacher, batch) -> [B]`, with the method's own parameters as a fourth argument if it has any.
        init: `key -> parameters`.
    """

    weight: float
    term: Callable[..., Any]
    init: Callable[[Any], Any] | None = None


def methods(config: Config) -> dict[str, Method]:
    """The methods by name."""
    temperature = config.temperature

    def last(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda s, t, _: function(s.features["pre_logits"], t.features["pre_logits"])

    def first(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda s, t, _: function(s.features["stage1"], t.features["stage1"])

    def soft(function: Callable[..., Any], **more: Any) -> Callable[..., Any]:
        return lambda s, t, _: function(s.logits, t.logits, temperature=temperature, **more)

    def decoupled(s: Outputs, t: Outputs, batch: Any) -> Any:
        return losses.decoupled_loss(
            s.logits, t.logits, batch["labels"], temperature=temperature, non_target_weight=8.0
        )

    def normalized(s: Outputs, t: Outputs, batch: Any) -> Any:
        return losses.normalized_loss(s.logits, t.logits, batch["labels"])

    def standardized(s: Outputs, t: Outputs, _: Any) -> Any:
        student, teacher = losses.standardize_logits(s.logits), losses.standardize_logits(t.logits)
        return losses.kl_divergence(student, teacher, temperature=2.0)

    def dist(s: Outputs, t: Outputs, _: Any) -> Any:
        inter = losses.dist_inter_loss(s.logits, t.logits, temperature=temperature)
        return inter + losses.dist_intra_loss(s.logits, t.logits, temperature=temperature)

    def hint(s: Outputs, t: Outputs, _: Any, projector: Any) -> Any:
        return losses.hint_loss(losses.project(projector, s.features["stage1"]), t.features["stage1"])

    def variational(s: Outputs, t: Outputs, _: Any, params: Any) -> Any:
        return losses.variational_information_loss(params, s.features["stage1"], t.features["stage1"])

    def flow(s: Outputs, t: Outputs, _: Any, projectors: Any) -> Any:
        student = [losses.project(projectors[name], maps) for name, maps in _of_one_size(s.features).items()]
        return losses.flow_of_solution_procedure_loss(*student, *_of_one_size(t.features).values())

    def relational(s: Outputs, t: Outputs, _: Any) -> Any:
        student, teacher = s.features["pre_logits"], t.features["pre_logits"]
        by_distance, by_angle = losses.relational_distance_loss, losses.relational_angle_loss
        return 25 * by_distance(student, teacher) + 50 * by_angle(student, teacher)

    def contrastive(s: Outputs, t: Outputs, batch: Any, projectors: Any) -> Any:
        student = losses.project(projectors["student"], s.features["pre_logits"])
        teacher = losses.project(projectors["teacher"], t.features["pre_logits"])
        return losses.contrastive_loss(student, teacher, temperature=0.1, labels=batch["labels"])

    def calibrated(s: Outputs, t: Outputs, _: Any, params: Any) -> Any:
        student, teacher = ([one.features[name] for name in STAGES] for one in (s, t))
        return losses.semantic_calibration_loss(params, student, teacher)

    narrow, wide = STUDENT[0], TEACHER[0]

    def both(key: Any) -> Any:
        pairs = zip(STAGES, narrow, wide, strict=True)
        return {name: losses.init_projector(jax.random.fold_in(key, s), s, t) for name, s, t in pairs}

    def embeddings(key: Any) -> Any:
        widths = (("student", STUDENT[1]), ("teacher", TEACHER[1]))
        return {
            name: losses.init_projector(jax.random.fold_in(key, i), w, EMBEDDING) for i, (name, w) in enumerate(widths)
        }

    return {
        "kd": Method(0.9, soft(losses.kl_divergence)),
        "reverse_kd": Method(90.0, soft(losses.reverse_kl_divergence)),
        "jsd": Method(0.9, soft(losses.jensen_shannon_divergence, beta=0.5)),
        "dkd": Method(10.0, decoupled),
        "nkd": Method(1.0, normalized),
        "dist": Method(20.0, dist),
        "standardized_kd": Method(9.0, standardized),
        "hint": Method(1000.0, hint, lambda key: losses.init_projector(key, narrow[0], wide[0])),
        "attention": Method(10_000.0, first(losses.attention_transfer_mse_loss)),
        "vid": Method(10.0, variational, lambda key: losses.init_variational_information(key, narrow[0], wide[0])),
        "nst": Method(500.0, first(losses.neuron_selectivity_loss)),
        "fsp": Method(0.001, flow, both),
        "similarity": Method(300.0, last(losses.similarity_preserving_loss)),
        "rkd": Method(0.1, relational),
        "pkt": Method(100.0, last(losses.probabilistic_transfer_loss)),
        "cc": Method(10.0, last(losses.correlation_congruence_loss)),
        "cka": Method(1.0, last(losses.linear_cka_loss)),
        "crd": Method(0.08, contrastive, embeddings),
        "semckd": Method(10.0, calibrated, lambda key: losses.init_semantic_calibration(key, narrow, wide, EMBEDDING)),
    }


def _of_one_size(features: Any) -> dict[str, Any]:
    """Both stages in the size of the second: the first max-pooled, as flow matrices need it."""
    first, second = (features[name] for name in STAGES)
    height, width = second.shape[1:3]
    rows, columns = first.shape[1] // height, first.shape[2] // width
    windows = first[:, : height * rows, : width * columns]
    windows = windows.reshape(len(first), height, rows, width, columns, first.shape[-1])
    return dict(zip(STAGES, (windows.max((2, 4)), second), strict=True))


def with_labels(method: Method) -> Loss:
    """The cross-entropy with the labels, and a method's term beside it."""

    def loss(student: Outputs, teachers: tuple[Outputs, ...], batch: Batch, *params: Any) -> Any:
        hard = losses.hard_cross_entropy(student.logits, batch["labels"])
        return losses.weighted_sum(
            [hard, method.term(student, teachers[0], batch, *params)], weights=(1.0, method.weight)
        )

    return loss


def make_plan(config: Config, dataset: data.Dataset) -> tuple[distill.Stage, ...]:
    """Who learns what from whom."""
    images, labels = dataset.train
    few, _ = vision.few_labels(dataset, config.num_images)
    teacher, student = (vision.cnn(*shape, dataset, config) for shape in (TEACHER, STUDENT))
    steps = vision.steps(config, dataset)
    common = {"options": config, "steps": steps}
    stages = [
        vision.stage("teacher", teacher, {"inputs": images, "labels": labels}, plans.supervised, **common),
        vision.stage("labels", student, few, plans.supervised, **common),
    ]
    known = methods(config)
    for name in cli.chosen(config.only, known):
        loss, taught = with_labels(known[name]), {"teachers": ("teacher",), "init_loss": known[name].init}
        stages.append(vision.stage(name, student, few, loss, **common, **taught))
    return tuple(stages)


def main(config: Config) -> None:
    """Trains, compares and reports."""
    config.check()
    dataset = data.load(config.dataset, config.data_dir, image_size=config.image_size)
    plan = make_plan(config, dataset)
    students = [stage.name for stage in plan[1:]]
    vision.run(
        "methods",
        config,
        dataset,
        plan,
        title="Methods of distillation, side by side",
        students=students,
        comparisons=[(name, "labels") for name in students[1:]],
    )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
