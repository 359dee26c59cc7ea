"""Distillation losses: pure functions that return one value per example. They need jax and optax alone."""

from jaxkd.losses.logits import (
    distillation_loss,
    hard_cross_entropy,
    kl_divergence,
    soft_cross_entropy,
    temperature_softmax,
)

__all__ = [
    "distillation_loss",
    "hard_cross_entropy",
    "kl_divergence",
    "soft_cross_entropy",
    "temperature_softmax",
]
