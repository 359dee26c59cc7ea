"""Methods of distillation as terms that are added to the cross-entropy with the labels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxkd import losses
from jaxkd.distill import Batch, LossContext, LossFn
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


def make_loss(method: Method) -> LossFn:
    """Makes the loss of a student: the cross-entropy with the labels and a method's term."""

    def loss(
        student: Outputs, teachers: tuple[Outputs, ...], batch: Batch, context: LossContext
    ) -> Any:
        (teacher,) = teachers
        hard = losses.hard_cross_entropy(student.logits, batch["labels"])
        term = method.term(student, teacher, batch, context.params)
        return losses.weighted_sum([hard, term], weights=(1.0, method.weight))

    return loss
