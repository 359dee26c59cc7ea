"""Losses of translators, and their score in training.

A batch has pairs `[B, 2, T]` as its `inputs`: the tokens of source and target. The word at position
t of the target predicts the word at t + 1.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.common.translation_data import padded_batches
from jaxkd import losses
from jaxkd.data.bucketing import LengthBuckets
from jaxkd.distill import Batch, LossContext, LossFn
from jaxkd.evaluate import Score, ScoreFn
from jaxkd.models import Model, Outputs


def target_words(inputs: Array) -> tuple[Array, Array]:
    """Returns the words to predict, `[B, T - 1]`, and where they are not padding."""
    labels = inputs[:, 1, 1:]
    return labels, labels != 0


def sum_over_words(values: Array, where: Array) -> Array:
    """Computes values `[B]` whose mean is the mean over all words of the batch.

    Args:
        values: `[B, T]`, one value per word, 0 where `where` is False.
        where: Booleans `[B, T]`, the words that count.
    """
    # A step minimises the mean over pairs, in which the words of short pairs would weigh more.
    return values.sum(-1) * (len(values) / jnp.maximum(where.sum(), 1).astype(values.dtype))


def word_loss(
    student: Outputs, teachers: tuple[Outputs, ...], batch: Batch, context: LossContext
) -> Array:
    """Computes the cross-entropy with the words of the target."""
    labels, where = target_words(batch["inputs"])
    values = losses.hard_cross_entropy(student.logits, labels)
    return sum_over_words(jnp.where(where, values, 0), where)


def make_soft_word_loss(*, temperature: float, alpha: float) -> LossFn:
    """Makes the loss of word-level distillation: soft targets for each word of the target.

    Args:
        temperature: Temperature of the soft targets.
        alpha: Weight of the soft targets. The words of the target have the rest.
    """

    def loss(
        student: Outputs, teachers: tuple[Outputs, ...], batch: Batch, context: LossContext
    ) -> Array:
        (teacher,) = teachers
        labels, where = target_words(batch["inputs"])
        values = losses.token_distillation_loss(
            student.logits,
            teacher.logits,
            labels,
            where=where,
            temperature=temperature,
            alpha=alpha,
        )
        return sum_over_words(values, where)

    return loss


def make_word_score(model: Model, buckets: LengthBuckets) -> ScoreFn:
    """Makes the function that scores a translator on pairs, as `distill.run_plan` takes it.

    The loss is the mean cross-entropy of the target's words. The accuracy is the share of the words
    that are the most probable ones, after the true words before them.

    Args:
        model: The translator.
        buckets: The lengths to which batches are cut.
    """

    @jax.jit
    def compute_sums(variables: dict, inputs: Array) -> Array:
        outputs, _ = model.apply(variables, inputs, train=False)
        labels, where = target_words(inputs)
        is_correct = jnp.where(where, outputs.logits.argmax(-1) == labels, False)
        values = jnp.where(where, losses.hard_cross_entropy(outputs.logits, labels), 0)
        num_correct = is_correct.sum().astype(jnp.float32)
        num_words = where.sum().astype(jnp.float32)
        return jnp.stack([values.sum(), num_correct, num_words])

    def score(variables: dict, examples: Mapping[str, Any]) -> Score:
        batches = padded_batches(examples["inputs"], buckets)
        sums = [np.asarray(compute_sums(variables, batch)) for _, batch in batches]
        # In float64: a sum of many batches would be rounded in float32.
        loss, num_correct, num_words = np.stack(sums).astype(np.float64).sum(axis=0).tolist()
        return Score(loss / num_words, num_correct / num_words)

    return score
