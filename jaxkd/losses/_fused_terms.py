"""Terms of the fused losses: values on the logits of some tokens, gradients on some classes.

The value of a term needs all classes of a token at once. What its gradient needs of them beside the
logits are a few numbers per token, its statistics, so that the gradient can be computed for a part
of the vocabulary at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxkd.losses._softmax import expectation, log_add_exp, log_sum_exp


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Reductions over all classes, of which each device of a mesh may hold a part.

    Attributes:
        axis_name: The axis of the mesh that shards the classes in a `shard_map`, or `None`.
    """

    axis_name: str | None = None

    def sum(self, values: Array) -> Array:
        """Adds up what the devices have summed over their classes."""
        return values if self.axis_name is None else jax.lax.psum(values, self.axis_name)

    def log_sum_exp(self, logits: Array) -> Array:
        """Computes log Σ exp of `[N, V]` over the classes of all devices."""
        own = log_sum_exp(logits)
        if self.axis_name is None:
            return own
        largest = jax.lax.pmax(own, self.axis_name)
        largest = jnp.where(largest != -jnp.inf, largest, 0)
        return jnp.log(self.sum(jnp.exp(own - largest))) + largest

    def expectation(self, probabilities: Array, values: Array) -> Array:
        return self.sum(expectation(probabilities, values))

    def size(self, own_size: int) -> int:
        """Returns the number of classes of all devices, each of which has `own_size`."""
        return own_size if self.axis_name is None else own_size * jax.lax.psum(1, self.axis_name)

    def own_indices(self, indices: Array, own_size: int) -> Array:
        """Returns indices into the device's own classes, and `own_size` for those of others."""
        if self.axis_name is not None:
            indices = indices - (jax.lax.axis_index(self.axis_name) * own_size).astype(
                indices.dtype
            )
        return within(indices, own_size)

    def take(self, logits: Array, indices: Array) -> Array:
        """Returns the logits `[N, k]` of some classes; of a class that none has, NaN."""
        own_size = logits.shape[1]
        own = self.own_indices(indices, own_size)
        values = jnp.take_along_axis(logits, own, 1, mode="fill", fill_value=0)
        is_class = self.sum((own < own_size).astype(values.dtype)) > 0
        return jnp.where(is_class, self.sum(values), jnp.nan)


def within(indices: Array, size: int) -> Array:
    """Returns the indices, and `size`, which scatters drop, for those that are out of range."""
    # JAX counts negative indices from the end.
    return jnp.where((indices >= 0) & (indices < size), indices, size)


class DivergenceStatistics(NamedTuple):
    """What the gradient of a divergence needs of all classes, for student and teacher.

    The mean derivatives are empty for a side that gets no gradient.
    """

    log_denominators: Sequence[Array]
    mean_derivatives: Sequence[Array]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m) of two models' logits `[N, V]`, or the KL at β = 0 or 1."""

    teacher_share: float
    student_share: float
    is_softened = True

    @classmethod
    def from_beta(cls, beta: float) -> Divergence:
        return cls(beta, 1 - beta)

    def evaluate(
        self, logits: Sequence[Array], target: Any, vocabulary: Vocabulary, sides: Sequence[int]
    ) -> tuple[Array, DivergenceStatistics]:
        """Computes the values `[N]`, and the statistics of the sides that get a gradient."""
        log_denominators = [vocabulary.log_sum_exp(side_logits) for side_logits in logits]
        logs = [logits[side] - log_denominators[side][:, None] for side in (0, 1)]
        value = self._value(logs[0], logs[1], vocabulary)
        mean_derivatives = [
            self.for_side(side)._mean_derivative(logs[side], logs[1 - side], vocabulary)
            if side in sides
            else log_denominators[side][:0]
            for side in (0, 1)
        ]
        return value, DivergenceStatistics(log_denominators, mean_derivatives)

    def logit_gradients(
        self,
        logits: Sequence[Array],
        target: Any,
        statistics: DivergenceStatistics,
        cotangent: Array,
        own_classes: Any,
        sides: Sequence[int],
    ) -> dict[int, Array]:
        """Computes the gradients `[N, part]` with respect to the logits of some classes."""
        logs = [logits[side] - statistics.log_denominators[side][:, None] for side in (0, 1)]
        return {
            side: cotangent[:, None]
            * self.for_side(side)._logit_gradient(
                logs[side], logs[1 - side], statistics.mean_derivatives[side]
            )
            for side in sides
        }

    def for_side(self, side: int) -> Divergence:
        """Returns the divergence with its arguments swapped for side 1, the teacher.

        The gradient with respect to the teacher is then computed like that for the student.
        """
        return Divergence(self.student_share, self.teacher_share) if side else self

    def _value(self, student: Array, teacher: Array, vocabulary: Vocabulary) -> Array:
        if self.teacher_share == 0:
            return vocabulary.expectation(jnp.exp(teacher), teacher - student)
        if self.student_share == 0:
            return vocabulary.expectation(jnp.exp(student), student - teacher)
        mixture = self._mixture(student, teacher)
        forward, reverse = (
            vocabulary.expectation(jnp.exp(logs), logs - mixture) for logs in (teacher, student)
        )
        return self.teacher_share * forward + self.student_share * reverse

    def _derivative(self, student: Array, teacher: Array) -> Array:
        """Computes the derivative `[N, V]` by the student's probabilities.

        It is defined up to a constant per token, and not for the forward KL.
        """
        if self.student_share == 0:
            return student - teacher
        return self.student_share * (student - self._mixture(student, teacher))

    def _mean_derivative(self, student: Array, teacher: Array, vocabulary: Vocabulary) -> Array:
        """Computes the mean `[N]` of the derivative under the student's distribution.

        The gradient of the softmax subtracts it. The forward KL does not need it.
        """
        if self.teacher_share == 0:
            return jnp.zeros_like(student[:, 0])
        return vocabulary.expectation(jnp.exp(student), self._derivative(student, teacher))

    def _logit_gradient(self, student: Array, teacher: Array, mean_derivative: Array) -> Array:
        """Computes the gradient `[N, V]` with respect to the student's logits."""
        if self.teacher_share == 0:
            return jnp.exp(student) - jnp.exp(teacher)
        probabilities = jnp.exp(student)
        derivative = self._derivative(student, teacher) - mean_derivative[:, None]
        # A class that both rule out has the derivative −inf + inf.
        return probabilities * jnp.where(probabilities != 0, derivative, 0)

    def _mixture(self, student: Array, teacher: Array) -> Array:
        log_shares = jnp.log(jnp.array([self.teacher_share, self.student_share], student.dtype))
        return log_add_exp(teacher + log_shares[0], student + log_shares[1])


class ClassStatistics(NamedTuple):
    """log Σ exp `[N]` of all logits, and of those that are not named, or empty."""

    log_denominator: Array
    log_rest: Array


@dataclasses.dataclass(frozen=True)
class ClassLogProbabilities:
    """The student's log-probabilities `[N, k]` of some classes, such as labels.

    Attributes:
        is_softened: True if the logits are divided by the temperature.
        has_rest: True if a last column holds the log-probability of all other classes together,
            `[N, k + 1]`. No class may be named twice.
    """

    is_softened: bool
    has_rest: bool

    def evaluate(
        self,
        logits: Sequence[Array],
        target: Any,
        vocabulary: Vocabulary,
        sides: Sequence[int],
    ) -> tuple[Array, ClassStatistics]:
        """Computes the log-probabilities of the classes `target` `[N, k]`, and their statistics."""
        student = logits[0]
        log_denominator = vocabulary.log_sum_exp(student)
        logs = vocabulary.take(student, target)
        if not self.has_rest:
            return logs - log_denominator[:, None], ClassStatistics(
                log_denominator, log_denominator[:0]
            )
        own = vocabulary.own_indices(target, student.shape[1])
        log_rest = vocabulary.log_sum_exp(_replace(student, own, -jnp.inf))
        logs = jnp.concatenate([logs, log_rest[:, None]], 1) - log_denominator[:, None]
        return logs, ClassStatistics(log_denominator, log_rest)

    def logit_gradients(
        self,
        logits: Sequence[Array],
        target: Any,
        statistics: ClassStatistics,
        cotangent: Array,
        own_classes: Any,
        sides: Sequence[int],
    ) -> dict[int, Array]:
        """Computes the gradient `[N, part]`; `own_classes` finds the classes within the part."""
        if 0 not in sides:
            return {}
        student = logits[0]
        own, in_range = own_classes(target)
        named = cotangent[:, : target.shape[1]]
        # The value of a class that is out of range is NaN, and has no gradient.
        named = jnp.where(in_range, named, 0)
        total = named.sum(1)
        gradient = jnp.zeros_like(student)
        if self.has_rest:
            rest = cotangent[:, -1]
            # Where the named classes are all there are, no class takes a share.
            log_rest = jnp.where(statistics.log_rest != -jnp.inf, statistics.log_rest, jnp.inf)
            shares = jnp.exp(student - log_rest[:, None])
            gradient = rest[:, None] * _replace(shares, own, 0)
            total = total + rest
        rows = jnp.arange(len(student))[:, None]
        gradient = gradient.at[rows, own].add(named, mode="drop")
        probabilities = jnp.exp(student - statistics.log_denominator[:, None])
        return {0: gradient - total[:, None] * probabilities}


def _replace(values: Array, indices: Array, value: float) -> Array:
    """Returns values `[N, V]` with those at the indices `[N, k]` replaced."""
    rows = jnp.arange(len(values))[:, None]
    return values.at[rows, indices].set(jnp.asarray(value, values.dtype), mode="drop")


Term = Divergence | ClassLogProbabilities
