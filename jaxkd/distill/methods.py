"""Methods of distillation: terms with weights, added to the cross-entropy with the labels.

`make_method` makes a method by name for any two networks, and `make_loss` the loss of a stage. A
plan of your own may use other `terms`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkd import losses
from jaxkd.distill import terms
from jaxkd.distill.step import Batch, LossContext, LossFn
from jaxkd.distill.terms import (
    Term,
    on_features,
    on_logits,
    on_logits_and_labels,
    on_projected_features,
)
from jaxkd.models import Outputs


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


LOGIT_METHODS = (
    "kd",
    "reverse_kd",
    "jsd",
    "dkd",
    "nkd",
    "dist",
    "standardized_kd",
    "skewed_kl",
    "skewed_reverse_kl",
    "akl",
    "abkd",
    "renyi",
    "tv",
    "ttm",
    "wttm",
    "rld",
    "mlkd",
    "taid",
    "ctkd",
)
"""Those that compare logits alone, so that the teacher's may be cached."""
MAP_METHODS = ("attention", "cwd", "mgd", "review")
"""Those that compare maps `[B, H, W, C]`."""
METHODS = (
    *LOGIT_METHODS,
    "hint",
    *MAP_METHODS,
    "similarity",
    "rkd",
    "pkt",
    "cc",
    "cka",
    "crd",
    "srd",
    "vkd",
)
"""The methods that `make_method` makes for any two networks."""
LABEL_METHODS = ("dkd", "nkd", "rld", "crd")
"""Those whose term reads the labels, so that every example needs one."""


def make_method(name: str, student: Outputs, teacher: Outputs, *, temperature: float) -> Method:
    """Makes a method for two networks, with a weight that suits small networks on images.

    Most weights are the best of three, a factor of 10 apart, in `experiments.methods`. That of hint
    is 1. Those of taid, ctkd, cwd, mgd, review, srd and vkd have not been tuned: they are ten
    times, and of methods on features once, that with which the term has as large a gradient as the
    cross-entropy, early in a training of that experiment.

    Methods on features compare the last ones before the logits. attention compares all maps of one
    name and size, review all maps of one name, cwd and mgd the last of these.

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
        init = _init_temperature if name == "ctkd" else None
        return Method(weight, make_term(temperature), init)
    if name in MAP_METHODS:
        return _make_map_method(name, student, teacher)
    for outputs, owner in ((student, "student"), (teacher, "teacher")):
        if "pre_logits" not in outputs.features:
            raise ValueError(
                f"{name} compares the features pre_logits, which the {owner} does not return: "
                "choose a method on logits, such as kd"
            )
    units = [outputs.features["pre_logits"].shape[-1] for outputs in (student, teacher)]
    if name not in _PROJECTING_METHODS:
        return _FEATURE_METHODS[name]
    weight, term, init = _PROJECTING_METHODS[name]
    return Method(weight, term, lambda key: init(key, *units))


def _make_map_method(name: str, student: Outputs, teacher: Outputs) -> Method:
    """Makes a method on maps: `attention` on those of one size, the others on those of one name."""
    if name == "attention":
        layers = _shared_maps(name, student, teacher, axes=slice(1, 3))
        return Method(10_000.0, functools.partial(terms.attention_term, layers=layers))
    layers = _shared_maps(name, student, teacher, axes=slice(0))
    student_channels, teacher_channels = (
        [outputs.features[layer].shape[-1] for layer in layers] for outputs in (student, teacher)
    )
    if name == "review":
        return Method(
            10.0,
            functools.partial(terms.review_term, layers=layers),
            lambda key: losses.init_review(
                key, student_channels, teacher_channels, terms.EMBEDDING_SIZE
            ),
        )
    last = student_channels[-1], teacher_channels[-1]
    if name == "cwd":
        term = functools.partial(terms.channel_wise_term, layer=layers[-1])
        return Method(7.0, term, lambda key: losses.init_projector(key, *last))
    term = functools.partial(terms.masked_generation_term, layer=layers[-1])
    return Method(2e-3, term, lambda key: losses.init_masked_generation(key, *last))


def _shared_maps(
    method: str, student: Outputs, teacher: Outputs, *, axes: slice
) -> tuple[str, ...]:
    """Returns the sorted names of the maps of both networks whose shapes agree in some axes."""

    def sizes(outputs: Outputs) -> dict[str, tuple[int, ...]]:
        features = outputs.features.items()
        return {name: map_.shape[axes] for name, map_ in features if len(map_.shape) == 4}

    names = tuple(name for name, _ in sorted(sizes(student).items() & sizes(teacher).items()))
    if not names:
        likeness = "one name and size" if axes.stop else "one name"
        raise ValueError(
            f"{method} compares maps of {likeness}, which student and teacher do not have: "
            "choose networks with equal stages, or a method on logits, such as kd"
        )
    return names


def _init_temperature(key: jax.Array) -> dict[str, jax.Array]:
    """Makes the parameter of `ctkd`, which is not drawn."""
    return losses.init_curriculum_temperature()


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
        term = method.term(student, teacher, batch, context)
        return losses.weighted_sum([hard, term], weights=(1.0, method.weight))

    return loss


def _with_temperature(
    make: Callable[..., Term], loss: Callable[..., Any], **hyperparameters: Any
) -> Callable[[float], Term]:
    return lambda temperature: make(loss, temperature=temperature, **hyperparameters)


_on_logits = functools.partial(_with_temperature, on_logits)
_on_labels = functools.partial(_with_temperature, on_logits_and_labels)

_LOGIT_TERMS: dict[str, tuple[float, Callable[[float], Term]]] = {
    "kd": (0.9, _on_logits(losses.kl_divergence)),
    "reverse_kd": (90.0, _on_logits(losses.reverse_kl_divergence)),
    "jsd": (0.9, _on_logits(losses.jensen_shannon_divergence, beta=0.5)),
    "dkd": (10.0, _on_labels(losses.decoupled_loss, non_target_weight=8.0)),
    "nkd": (1.0, lambda t: on_logits_and_labels(losses.normalized_loss)),
    "dist": (20.0, lambda t: functools.partial(terms.dist_term, temperature=t)),
    "standardized_kd": (9.0, lambda t: terms.standardized_kd_term),
    "skewed_kl": (3.0, _on_logits(losses.skewed_kl_divergence)),
    "skewed_reverse_kl": (30.0, _on_logits(losses.skewed_reverse_kl_divergence)),
    "akl": (0.3, _on_logits(losses.adaptive_kl_divergence)),
    "abkd": (0.2, _on_logits(losses.alpha_beta_divergence, alpha=0.2, beta=0.7)),
    "renyi": (5.0, _on_logits(losses.renyi_divergence, order=0.5)),
    "tv": (100.0, _on_logits(losses.total_variation_distance)),
    "ttm": (0.7, _on_logits(losses.transformed_teacher_loss)),
    "wttm": (20.0, _on_logits(losses.transformed_teacher_loss, weighted=True)),
    "rld": (0.3, _on_labels(losses.refined_logits_loss, correlation_weight=8.0)),
    "mlkd": (0.007, lambda t: on_logits(losses.multi_level_loss)),
    "taid": (4.0, lambda t: functools.partial(terms.taid_term, temperature=t)),
    "ctkd": (2.0, lambda t: terms.ctkd_term),
}
_FEATURE_METHODS = {
    "similarity": Method(300.0, on_features(losses.similarity_preserving_loss, "pre_logits")),
    "rkd": Method(0.1, terms.rkd_term),
    "pkt": Method(100.0, on_features(losses.probabilistic_transfer_loss, "pre_logits")),
    "cc": Method(10.0, on_features(losses.correlation_congruence_loss, "pre_logits")),
    "cka": Method(1.0, on_features(losses.linear_cka_loss, "pre_logits")),
}
_PROJECTING_METHODS: dict[str, tuple[float, Term, Callable[..., Any]]] = {
    "hint": (
        1.0,
        functools.partial(terms.hint_term, layer="pre_logits"),
        losses.init_projector,
    ),
    "crd": (0.08, terms.crd_term, terms.init_crd),
    "srd": (
        5.0,
        on_projected_features(losses.simple_recipe_loss, "pre_logits"),
        losses.init_projector,
    ),
    "vkd": (
        1.0,
        on_projected_features(losses.orthogonal_projection_loss, "pre_logits"),
        losses.init_orthogonal_projector,
    ),
}
