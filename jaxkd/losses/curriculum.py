"""Targets and temperatures that become harder as training goes on.

What these functions return is passed to a loss on logits: `interpolated_logits` as its teacher,
`curriculum_temperature` as its temperature.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import check_fraction, check_positive, check_shape
from jaxkd.losses._softmax import check_logits_pair, softmax
from jaxkd.losses.features import init_projector, project

LOWEST_LOG_PROBABILITY = -100.0
"""Lower ones, such as −inf of a class that is excluded, count as this one."""


def interpolated_logits(
    student_logits: ArrayLike, teacher_logits: ArrayLike, *, fraction: ArrayLike
) -> Array:
    """Mixes the logits of student and teacher into a teacher that the student can follow (TAID).

    (1 − f) s + f t, with no gradient in s

    Let f grow from 0.4 to 1 over the training, as `update_interpolation` does, or in proportion to
    `context.progress` of a plan's loss. The loss is then `kl_divergence(s, interpolated_logits)`,
    at T = 1 in the paper.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape.
        fraction: f in [0, 1], a scalar, the teacher's share.

    Returns:
        Logits of the same shape, in float32 or wider, without a gradient.

    Raises:
        ValueError: If the shapes differ or `fraction` is not in [0, 1].
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]])
        >>> print(losses.interpolated_logits(student, teacher, fraction=0.5))
        [[2.  1.5]]

    References:
        Shing et al., TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge
        Transfer in Language Models, https://arxiv.org/abs/2501.16937
    """
    fraction = check_fraction("fraction", fraction)
    student, teacher = check_logits_pair(student_logits, teacher_logits)
    fraction = jnp.asarray(fraction, student.dtype)
    # A share of 0 takes nothing, not even of −inf.
    mixed = jnp.where(fraction < 1, (1 - fraction) * student, 0) + jnp.where(
        fraction > 0, fraction * teacher, 0
    )
    return jax.lax.stop_gradient(mixed)


class Interpolation(NamedTuple):
    """State of an adaptive interpolation, scalars of float32.

    Attributes:
        fraction: The teacher's share for the next step.
        loss: The loss of the step before; infinite before the first.
        momentum: Mean of its relative decrease over the last steps.
    """

    fraction: Array
    loss: Array
    momentum: Array


def init_interpolation(*, start: float = 0.4) -> Interpolation:
    """Makes the state of `update_interpolation` before the first step.

    Args:
        start: The first share of the teacher, in [0, 1].

    Returns:
        The state.

    Raises:
        ValueError: If `start` is not in [0, 1].

    Example:
        >>> from jaxkd import losses
        >>> print(losses.init_interpolation().fraction)
        0.4
    """
    first = jnp.asarray(check_fraction("start", start), jnp.float32)
    return Interpolation(first, jnp.float32(jnp.inf), jnp.float32(0))


def update_interpolation(
    state: Interpolation,
    loss: ArrayLike,
    progress: ArrayLike,
    *,
    start: ArrayLike = 0.4,
    end: ArrayLike = 1.0,
    rate: ArrayLike = 5e-4,
    decay: ArrayLike = 0.99,
) -> Interpolation:
    """Moves the teacher's share on after a step, faster while the loss falls (TAID).

    f ← min(end, max(start + (end − start) progress, f + rate σ(m) (1 − f))) with
    m ← decay m + (1 − decay) (loss before − loss) / loss before

    The first call only keeps the loss. The function is pure: call it under `jit`, and keep the
    state with that of the optimizer.

    Args:
        state: From `init_interpolation` or the step before.
        loss: The mean loss of the step, a scalar.
        progress: Share of the training that is done, in [0, 1].
        start: The share at progress 0.
        end: The share at progress 1.
        rate: Largest increase in a step.
        decay: Weight of the steps before in the momentum, in [0, 1].

    Returns:
        The state for the next step. Its share never decreases.

    Raises:
        ValueError: If an option is not in [0, 1], or `loss` is no scalar.

    Example:
        >>> from jaxkd import losses
        >>> state = losses.update_interpolation(losses.init_interpolation(), 2.0, 0.0)
        >>> state = losses.update_interpolation(state, 1.0, 0.5)
        >>> print(state.fraction, state.loss, state.momentum)
        0.70000005 1.0 0.005

    References:
        Shing et al., TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge
        Transfer in Language Models, https://arxiv.org/abs/2501.16937
    """
    options = {"start": start, "end": end, "rate": rate, "decay": decay, "progress": progress}
    first, last, rate, decay, progress = (
        jnp.asarray(check_fraction(name, value), jnp.float32) for name, value in options.items()
    )
    loss = jax.lax.stop_gradient(jnp.asarray(loss, jnp.float32))
    check_shape(loss.shape == (), f"loss must be a scalar, got shape {loss.shape}: take the mean")
    is_first = state.loss == jnp.inf
    decrease = (state.loss - loss) / (state.loss + 1e-15)
    momentum = decay * state.momentum + (1 - decay) * jnp.where(is_first, 0, decrease)
    step = rate * jax.nn.sigmoid(momentum) * (1 - state.fraction)
    planned = first + (last - first) * progress
    fraction = jnp.minimum(last, jnp.maximum(planned, state.fraction + step))
    return Interpolation(
        jnp.where(is_first, state.fraction, fraction).astype(jnp.float32),
        loss,
        jnp.where(is_first, state.momentum, momentum).astype(jnp.float32),
    )


@jax.custom_vjp
def _scale_gradient(x: Array, scale: Array) -> Array:
    return x


def _scale_gradient_forward(x: Array, scale: Array) -> tuple[Array, Array]:
    return x, scale


def _scale_gradient_backward(scale: Array, gradient: Array) -> tuple[Array, Array]:
    return gradient * scale.astype(gradient.dtype), jnp.zeros_like(scale)


_scale_gradient.defvjp(_scale_gradient_forward, _scale_gradient_backward)


def reverse_gradient(x: ArrayLike, *, strength: ArrayLike) -> Array:
    """Returns its argument, whose gradient is multiplied by minus a strength.

    x, with the gradient −λ dx

    What stands before it is trained against the loss.

    Args:
        x: Any shape, floating-point.
        strength: λ of at least 0, a scalar. It has no gradient.

    Returns:
        x.

    Raises:
        ValueError: If `strength` is no scalar.

    Example:
        >>> import jax
        >>> from jaxkd import losses
        >>> print(jax.grad(lambda x: losses.reverse_gradient(x, strength=0.5) ** 2)(3.0))
        -3.0

    References:
        Ganin and Lempitsky, Unsupervised Domain Adaptation by Backpropagation,
        https://arxiv.org/abs/1409.7495
    """
    x = jnp.asarray(x)
    check_shape(
        jnp.ndim(strength) == 0, f"strength must be a scalar, got shape {jnp.shape(strength)}"
    )
    return _scale_gradient(x, -jnp.asarray(strength, x.dtype))


def init_curriculum_temperature() -> dict[str, Array]:
    """Makes the parameter of `curriculum_temperature`.

    Returns:
        `{"temperature": []}`, float32: 1, as in the authors' code.

    Example:
        >>> from jaxkd import losses
        >>> print(losses.init_curriculum_temperature())
        {'temperature': Array(1., dtype=float32)}
    """
    return {"temperature": jnp.float32(1)}


def curriculum_temperature(
    params: dict[str, Array],
    *,
    strength: ArrayLike,
    lowest: ArrayLike = 1.0,
    span: ArrayLike = 20.0,
) -> Array:
    """Computes a temperature that is trained to make the loss larger (CTKD, global form).

    T = lowest + span σ(θ), with the gradient in θ reversed and multiplied by the strength

    The student and the temperature play against each other, so that distillation becomes harder.
    The paper lets the strength grow from 0 to 1 by a cosine over the first epochs,
    `0.5 * (1 - cos(π min(1, epoch / 10)))`. The temperature is trained by the optimizer of the
    loss's parameters (`Stage.init_loss`). `instance_temperature` is the paper's other form.

    Args:
        params: From `init_curriculum_temperature`.
        strength: λ of at least 0, a scalar.
        lowest: The lowest temperature, above 0.
        span: How far the temperature may be above the lowest one.

    Returns:
        T, a scalar, for the `temperature` of a loss on logits.

    Raises:
        ValueError: If `lowest` or `span` is not a positive scalar, or `strength` is no scalar.

    Example:
        >>> from jaxkd import losses
        >>> params = losses.init_curriculum_temperature()
        >>> print(losses.curriculum_temperature(params, strength=1.0))
        15.621172

    References:
        Li et al., Curriculum Temperature for Knowledge Distillation,
        https://arxiv.org/abs/2211.16231
    """
    return _to_temperature(params["temperature"], strength, lowest, span)


def init_instance_temperature(
    key: Array, num_classes: int, hidden: int
) -> dict[str, dict[str, Array]]:
    """Draws the parameters of `instance_temperature`, a network of two dense layers.

    Args:
        key: A random key.
        num_classes: C.
        hidden: H, the units between the layers, such as 128.

    Returns:
        `hidden` and `output`, each `{"kernel": [in, out], "bias": [out]}` in float32, from 2 C to H
        and from H to 1. The kernels are LeCun normal, and the biases zero.

    Example:
        >>> import jax
        >>> from jaxkd import losses
        >>> params = losses.init_instance_temperature(jax.random.key(0), 10, 16)
        >>> print(params["hidden"]["kernel"].shape, params["output"]["kernel"].shape)
        (20, 16) (16, 1)
    """
    hidden_key, output_key = jax.random.split(key)
    return {
        "hidden": init_projector(hidden_key, 2 * num_classes, hidden),
        "output": init_projector(output_key, hidden, 1),
    }


def instance_temperature(
    params: dict[str, dict[str, Array]],
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    strength: ArrayLike,
    lowest: ArrayLike = 1.0,
    span: ArrayLike = 20.0,
) -> Array:
    """Computes a temperature for each example that is trained to make its loss larger (CTKD).

    T = lowest + span σ(θ), with θ = relu([log softmax(t), log softmax(s)] A + a) B + b, and the
    gradient in θ reversed and multiplied by the strength

    The temperature itself has no gradient in the logits. The losses take one temperature for all
    examples, so divide the logits, and multiply the loss by T²:

        T = losses.instance_temperature(params, student, teacher, strength=1.0)
        scaled = student / T[:, None], teacher / T[:, None]
        values = T**2 * losses.kl_divergence(*scaled, temperature=1.0)

    The authors' code has the global form alone.

    Args:
        params: From `init_instance_temperature`; they are trained with the student.
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape.
        strength: λ of at least 0, a scalar, as for `curriculum_temperature`.
        lowest: The lowest temperature, above 0.
        span: How far a temperature may be above the lowest one.

    Returns:
        One temperature per example `[...]`, in float32 or wider.

    Raises:
        ValueError: If the shapes differ or do not fit the parameters, `lowest` or `span` is not a
            positive scalar, or `strength` is no scalar.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> params = losses.init_instance_temperature(jax.random.key(0), 3, 16)
        >>> student, teacher = jnp.zeros((2, 3)), jnp.array([[4.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
        >>> print(losses.instance_temperature(params, student, teacher, strength=1.0).shape)
        (2,)

    References:
        Li et al., Curriculum Temperature for Knowledge Distillation,
        https://arxiv.org/abs/2211.16231
    """
    logits = jax.lax.stop_gradient(check_logits_pair(student_logits, teacher_logits))
    # Bounded, since the logarithm of an excluded class is −inf.
    student, teacher = (
        jnp.maximum(softmax(array).log_probabilities, LOWEST_LOG_PROBABILITY) for array in logits
    )
    num_classes = params["hidden"]["kernel"].shape[0] // 2
    check_shape(
        student.shape[-1] == num_classes,
        f"student_logits {student.shape} must have {num_classes} classes, the number of params; "
        "call init_instance_temperature with the logits' number of classes",
    )
    inputs = jnp.concatenate([teacher, student], -1)
    hidden = jax.nn.relu(project(params["hidden"], inputs))
    return _to_temperature(project(params["output"], hidden)[..., 0], strength, lowest, span)


def _to_temperature(x: Array, strength: ArrayLike, lowest: ArrayLike, span: ArrayLike) -> Array:
    """Maps parameters to temperatures that are trained against the loss."""
    share = jax.nn.sigmoid(reverse_gradient(x, strength=strength))
    first, width = (
        jnp.asarray(check_positive(name, value), share.dtype)
        for name, value in (("lowest", lowest), ("span", span))
    )
    return first + width * share
