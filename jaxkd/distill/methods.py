"""Methods of distillation as terms that are added to the cross-entropy with the labels.

`make_method` makes a method by name for any two networks; a plan of one's own may use the terms.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkd import losses
from jaxkd.distill.step import Batch, LossContext, LossFn
from jaxkd.models import Outputs

Term = Callable[[Outputs, Outputs, Batch, Any], Any]
"""`(student, teacher, batch, params) -> [B]`. `params` is `None` for a method without any."""
EMBEDDING_SIZE = 64
"""Size of the vectors that crd and semckd compare."""


class Method(NamedTuple):
    """A method: the term that it adds to the cross-entropy with the labels.

    Attributes:
        weight: Weight of the term. The cross-entropy has the weight 1.
        term: The term.
        init: `key -> params`, the method's own parameters; `None` if it has none.
    """

    weight: float
    term: Term
    init: Callable[[jax.Array], Any] | None = None


def on_logits(loss: Callable[..., Any], **hyperparameters: Any) -> Term:
    """Makes the term of a loss on the logits."""
    return lambda student, teacher, batch, params: loss(
        student.logits, teacher.logits, **hyperparameters
    )


def on_features(loss: Callable[..., Any], layer: str) -> Term:
    """Makes the term of a loss on the features of a layer."""
    return lambda student, teacher, batch, params: loss(
        student.features[layer], teacher.features[layer]
    )


def dkd_term(student, teacher, batch, params, *, temperature, non_target_weight):
    """Computes decoupled knowledge distillation."""
    return losses.decoupled_loss(
        student.logits,
        teacher.logits,
        batch["labels"],
        temperature=temperature,
        non_target_weight=non_target_weight,
    )


def nkd_term(student, teacher, batch, params):
    """Computes normalized knowledge distillation."""
    return losses.normalized_loss(student.logits, teacher.logits, batch["labels"])


def dist_term(student, teacher, batch, params, *, temperature):
    """Computes DIST: correlations within each example and within each class of the batch."""
    inter = losses.dist_inter_loss(student.logits, teacher.logits, temperature=temperature)
    intra = losses.dist_intra_loss(student.logits, teacher.logits, temperature=temperature)
    return inter + intra


def standardized_kd_term(student, teacher, batch, params):
    """Computes the divergence of standardized logits."""
    return losses.kl_divergence(
        losses.standardize_logits(student.logits),
        losses.standardize_logits(teacher.logits),
        temperature=2.0,
    )


def hint_term(student, teacher, batch, params, *, layer):
    """Computes the distance of projected student features to the teacher's."""
    projected = losses.project(params, student.features[layer])
    return losses.hint_loss(projected, teacher.features[layer])


def attention_term(student, teacher, batch, params, *, layers):
    """Computes the sum of attention transfer over layers."""
    return sum(
        losses.attention_transfer_mse_loss(student.features[name], teacher.features[name])
        for name in layers
    )


def rkd_term(student, teacher, batch, params):
    """Computes relations between examples, distances and angles, with the paper's weights."""
    features = student.features["pre_logits"], teacher.features["pre_logits"]
    distance = losses.relational_distance_loss(*features)
    angle = losses.relational_angle_loss(*features)
    return 25 * distance + 50 * angle


def crd_term(student, teacher, batch, params):
    """Computes the contrastive loss of projected features, with the batch as negatives."""
    return losses.contrastive_loss(
        losses.project(params["student"], student.features["pre_logits"]),
        losses.project(params["teacher"], teacher.features["pre_logits"]),
        temperature=0.1,
        labels=batch["labels"],
    )


def init_crd(key: jax.Array, student_units: int, teacher_units: int) -> dict[str, Any]:
    """Draws the projectors that `crd_term` trains."""
    student_key, teacher_key = jax.random.split(key)
    return {
        "student": losses.init_projector(student_key, student_units, EMBEDDING_SIZE),
        "teacher": losses.init_projector(teacher_key, teacher_units, EMBEDDING_SIZE),
    }


METHODS = (
    "kd",
    "reverse_kd",
    "jsd",
    "dkd",
    "nkd",
    "dist",
    "standardized_kd",
    "hint",
    "attention",
    "similarity",
    "rkd",
    "pkt",
    "cc",
    "cka",
    "crd",
)
"""The methods that `make_method` makes for any two networks."""
LOGIT_METHODS = METHODS[:7]
"""Those that compare logits alone, so that the teacher's may be cached."""
LABEL_METHODS = ("dkd", "nkd", "crd")
"""Those whose term reads the labels, so that every example needs one."""


def make_method(name: str, student: Outputs, teacher: Outputs, *, temperature: float) -> Method:
    """Makes a method for two networks, with a weight that suits small networks on images.

    The weights are the best of three, a factor of 10 apart, in `experiments.methods`; that of
    `hint` is 1. Methods on features compare the last ones before the logits; `attention` compares
    all maps of one name and size.

    Args:
        name: One of `METHODS`.
        student: The student's outputs, or their shapes, as `jax.eval_shape` returns them.
        teacher: The teacher's outputs, or their shapes.
        temperature: Temperature of methods on logits that have one.

    Raises:
        ValueError: If there is no such method, or the networks lack the features that it compares.
    """
    if name not in METHODS:
        raise ValueError(f"there is no method {name[:40]!r}: choose from {', '.join(METHODS)}")
    if name in _LOGIT_TERMS:
        weight, make_term = _LOGIT_TERMS[name]
        return Method(weight, make_term(temperature))
    if name == "attention":
        return Method(
            10_000.0, functools.partial(attention_term, layers=_same_maps(student, teacher))
        )
    for outputs, owner in ((student, "student"), (teacher, "teacher")):
        if "pre_logits" not in outputs.features:
            raise ValueError(
                f"{name} compares the features pre_logits, which the {owner} does not return: "
                "choose a method on logits, such as kd"
            )
    units = [outputs.features["pre_logits"].shape[-1] for outputs in (student, teacher)]
    if name == "hint":
        term = functools.partial(hint_term, layer="pre_logits")
        return Method(1.0, term, lambda key: losses.init_projector(key, *units))
    if name == "crd":
        return Method(0.08, crd_term, lambda key: init_crd(key, *units))
    return _FEATURE_METHODS[name]


def _same_maps(student: Outputs, teacher: Outputs) -> tuple[str, ...]:
    """Returns the names of the maps `[B, H, W, C]` that both networks have in one size."""

    def sizes(outputs: Outputs) -> dict[str, tuple[int, ...]]:
        features = outputs.features.items()
        return {name: map_.shape[1:3] for name, map_ in features if len(map_.shape) == 4}

    names = tuple(name for name, _ in sorted(sizes(student).items() & sizes(teacher).items()))
    if not names:
        raise ValueError(
            "attention compares maps of one name and size, which student and teacher do not have: "
            "choose networks with equal stages, or a method on logits, such as kd"
        )
    return names


def supervised_loss(
    student: Outputs, teachers: tuple[Outputs, ...], batch: Batch, context: LossContext
) -> Any:
    """Computes the cross-entropy with the labels, of both parts of mixed examples."""
    return _over_labels(
        lambda labels, labelled: losses.hard_cross_entropy(student.logits, labels), batch, context
    )


def make_soft_target_loss(*, temperature: float, alpha: float) -> LossFn:
    """Makes the loss of a student with one teacher: labels and soft targets.

    If the batch has `labelled`, an example without a label gives all weight to the soft targets.

    Args:
        temperature: Temperature of the soft targets, above 0.
        alpha: Weight of the soft targets, from 0 to 1. The labels have the rest.
    """

    def loss(
        student: Outputs, teachers: tuple[Outputs, ...], batch: Batch, context: LossContext
    ) -> Any:
        (teacher,) = teachers

        def loss_of(labels: Any, labelled: Any) -> Any:
            # Without a label there is nothing but the teacher to learn from.
            weight = alpha if labelled is None else jnp.where(labelled, alpha, 1.0)
            return losses.distillation_loss(
                student.logits, teacher.logits, labels, temperature=temperature, alpha=weight
            )

        return _over_labels(loss_of, batch, context)

    return loss


def _over_labels(loss_of: Callable[[Any, Any], Any], batch: Batch, context: LossContext) -> Any:
    """Averages a loss over the label of each example and that of what was mixed into it.

    Args:
        loss_of: `(labels, labelled) -> [B]`; `labelled` is `None` if all examples have a label.
        batch: The batch.
        context: The context, whose `mix` counts.
    """
    labels, labelled = batch["labels"], batch.get("labelled")
    values = loss_of(labels, labelled)
    if context.mix is None:
        return values
    partner, weight = context.mix
    other_labelled = None if labelled is None else labelled[partner]
    return weight * values + (1 - weight) * loss_of(labels[partner], other_labelled)


def make_loss(method: Method) -> LossFn:
    """Makes the loss of a student: the cross-entropy with the labels and a method's term.

    If the batch has `labelled`, the cross-entropy of an example without a label is 0.
    """

    def loss(
        student: Outputs, teachers: tuple[Outputs, ...], batch: Batch, context: LossContext
    ) -> Any:
        (teacher,) = teachers
        hard = _over_labels(
            # Examples without a label are left out.
            lambda labels, labelled: losses.hard_cross_entropy(
                student.logits, labels, where=labelled
            ),
            batch,
            context,
        )
        term = method.term(student, teacher, batch, context.params)
        return losses.weighted_sum([hard, term], weights=(1.0, method.weight))

    return loss


_LOGIT_TERMS: dict[str, tuple[float, Callable[[float], Term]]] = {
    "kd": (0.9, lambda t: on_logits(losses.kl_divergence, temperature=t)),
    "reverse_kd": (90.0, lambda t: on_logits(losses.reverse_kl_divergence, temperature=t)),
    "jsd": (0.9, lambda t: on_logits(losses.jensen_shannon_divergence, temperature=t, beta=0.5)),
    "dkd": (10.0, lambda t: functools.partial(dkd_term, temperature=t, non_target_weight=8.0)),
    "nkd": (1.0, lambda t: nkd_term),
    "dist": (20.0, lambda t: functools.partial(dist_term, temperature=t)),
    "standardized_kd": (9.0, lambda t: standardized_kd_term),
}
_FEATURE_METHODS = {
    "similarity": Method(300.0, on_features(losses.similarity_preserving_loss, "pre_logits")),
    "rkd": Method(0.1, rkd_term),
    "pkt": Method(100.0, on_features(losses.probabilistic_transfer_loss, "pre_logits")),
    "cc": Method(10.0, on_features(losses.correlation_congruence_loss, "pre_logits")),
    "cka": Method(1.0, on_features(losses.linear_cka_loss, "pre_logits")),
}
