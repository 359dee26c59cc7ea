"""Terms that methods of distillation add to the cross-entropy with the labels.

A term is `(student, teacher, batch, context) -> [B]`, for one teacher. `make_loss` of
`jaxkd.distill.methods` adds it to the cross-entropy.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxkd import losses
from jaxkd.distill.step import Batch, LossContext
from jaxkd.models import Outputs

Term = Callable[[Outputs, Outputs, Batch, LossContext], Any]
"""`(student, teacher, batch, context) -> [B]`. `context.params` is `None` without `init`."""
EMBEDDING_SIZE = 64
"""Size of the vectors that crd and semckd compare."""


def on_logits(loss: Callable[..., Any], **hyperparameters: Any) -> Term:
    """Makes the term of a loss on the logits."""
    return lambda student, teacher, batch, context: loss(
        student.logits, teacher.logits, **hyperparameters
    )


def on_logits_and_labels(loss: Callable[..., Any], **hyperparameters: Any) -> Term:
    """Makes the term of a loss on the logits that also reads the labels."""
    return lambda student, teacher, batch, context: loss(
        student.logits, teacher.logits, batch["labels"], **hyperparameters
    )


def on_features(loss: Callable[..., Any], layer: str) -> Term:
    """Makes the term of a loss on the features of a layer."""
    return lambda student, teacher, batch, context: loss(
        student.features[layer], teacher.features[layer]
    )


def on_projected_features(loss: Callable[..., Any], layer: str) -> Term:
    """Makes the term of a loss `(params, student, teacher)` that projects the student's features.

    Maps are averaged over their positions first.
    """

    def term(student: Outputs, teacher: Outputs, batch: Batch, context: LossContext) -> Any:
        features = (outputs.features[layer] for outputs in (student, teacher))
        return loss(context.params, *map(_average_positions, features))

    return term


def dist_term(
    student: Outputs, teacher: Outputs, batch: Batch, context: LossContext, *, temperature: float
) -> Any:
    """Computes DIST: correlations within each example and within each class of the batch."""
    inter = losses.dist_inter_loss(student.logits, teacher.logits, temperature=temperature)
    intra = losses.dist_intra_loss(student.logits, teacher.logits, temperature=temperature)
    return inter + intra


def standardized_kd_term(
    student: Outputs, teacher: Outputs, batch: Batch, context: LossContext
) -> Any:
    """Computes the divergence of standardized logits."""
    return losses.kl_divergence(
        losses.standardize_logits(student.logits),
        losses.standardize_logits(teacher.logits),
        temperature=2.0,
    )


def taid_term(
    student: Outputs, teacher: Outputs, batch: Batch, context: LossContext, *, temperature: float
) -> Any:
    """Computes the divergence from a mixture in which the teacher's share grows from 0.4 to 1."""
    mixed = losses.interpolated_logits(
        student.logits, teacher.logits, fraction=0.4 + 0.6 * _get_progress(context)
    )
    return losses.kl_divergence(student.logits, mixed, temperature=temperature)


def ctkd_term(student: Outputs, teacher: Outputs, batch: Batch, context: LossContext) -> Any:
    """Computes the divergence at a temperature that is trained to make it larger.

    The strength of the reversed gradient grows from 0 to 1 in the first tenth of the training.
    """
    progress = jnp.minimum(1, 10 * _get_progress(context))
    temperature = losses.curriculum_temperature(
        context.params, strength=(1 - jnp.cos(jnp.pi * progress)) / 2
    )
    return losses.kl_divergence(student.logits, teacher.logits, temperature=temperature)


def hint_term(
    student: Outputs, teacher: Outputs, batch: Batch, context: LossContext, *, layer: str
) -> Any:
    """Computes the distance of projected student features to the teacher's."""
    projected = losses.project(context.params, student.features[layer])
    return losses.hint_loss(projected, teacher.features[layer])


def attention_term(
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    context: LossContext,
    *,
    layers: Sequence[str],
) -> Any:
    """Computes the sum of attention transfer over layers."""
    return sum(
        losses.attention_transfer_mse_loss(student.features[name], teacher.features[name])
        for name in layers
    )


def channel_wise_term(
    student: Outputs, teacher: Outputs, batch: Batch, context: LossContext, *, layer: str
) -> Any:
    """Computes the divergence of each channel's positions, after the student's are projected."""
    student_maps, teacher_maps = _pool_to_one_size(student.features[layer], teacher.features[layer])
    projected = losses.project(context.params, student_maps)
    return losses.channel_wise_divergence(projected, teacher_maps)


def masked_generation_term(
    student: Outputs, teacher: Outputs, batch: Batch, context: LossContext, *, layer: str
) -> Any:
    """Computes the distance to the teacher's maps of those made from the student's masked ones."""
    maps = _pool_to_one_size(student.features[layer], teacher.features[layer])
    return losses.masked_generation_loss(context.params, context.key, *maps, masked_fraction=0.5)


def review_term(
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    context: LossContext,
    *,
    layers: Sequence[str],
) -> Any:
    """Computes ReviewKD over layers, from the first to the last."""
    maps = ([outputs.features[name] for name in layers] for outputs in (student, teacher))
    return losses.review_loss(context.params, *maps)


def rkd_term(student: Outputs, teacher: Outputs, batch: Batch, context: LossContext) -> Any:
    """Computes relations between examples, distances and angles, with the paper's weights."""
    features = student.features["pre_logits"], teacher.features["pre_logits"]
    distance = losses.relational_distance_loss(*features)
    angle = losses.relational_angle_loss(*features)
    return 25 * distance + 50 * angle


def crd_term(student: Outputs, teacher: Outputs, batch: Batch, context: LossContext) -> Any:
    """Computes the contrastive loss of projected features, with the batch as negatives."""
    return losses.contrastive_loss(
        losses.project(context.params["student"], student.features["pre_logits"]),
        losses.project(context.params["teacher"], teacher.features["pre_logits"]),
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


def _get_progress(context: LossContext) -> jax.Array:
    """Returns the progress of the training; raises `ValueError` if it is not known."""
    if context.progress is None:
        raise ValueError(
            "this method follows the progress of the training, which is not known: pass num_steps "
            "to make_train_step"
        )
    return context.progress


def _average_positions(features: jax.Array) -> jax.Array:
    """Averages `[B, ..., C]` over all axes but the first and the last."""
    return features.mean(range(1, features.ndim - 1))


def _pool_to_one_size(student_maps: jax.Array, teacher_maps: jax.Array) -> tuple[Any, Any]:
    """Averages maps `[B, H, W, C]` of two sizes to the smaller height and width."""
    size = tuple(map(min, student_maps.shape[1:3], teacher_maps.shape[1:3]))
    return losses.pool_to(student_maps, size), losses.pool_to(teacher_maps, size)
