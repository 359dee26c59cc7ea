"""Factor transfer (FT): a paraphrase of the teacher's maps, and the student's translation to it.

First the paraphraser, an autoencoder, is trained on the teacher's maps with `paraphraser_loss`.
Then the student learns, together with a translator:

    teacher_factors = losses.extract_factors(paraphraser["encoder"], teacher_maps)
    student_factors = losses.extract_factors(translator, student_maps)
    losses.factor_transfer_loss(student_factors, teacher_factors)

with `translator = losses.init_factors(key, student_channels, factors)`, and as many `factors` as
`init_paraphraser` got.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import check_shape, flatten_examples, normalize, upcast_pair
from jaxkd.losses._maps import check_image_pair, check_images, convolve, init_convolution

NEGATIVE_SLOPE = 0.1
"""Slope of the leaky ReLU below zero, as in the authors' code."""


def init_factors(key: Array, features: int, factors: int) -> list[dict[str, Array]]:
    """Draws the parameters of `extract_factors`: three 3×3 convolutions.

    The kernels are LeCun normal (variance 1 / fan-in). PyTorch's default in the authors' code has
    a third of that variance.

    Args:
        key: A random key.
        features: C, the channels of the maps.
        factors: K, the channels of the factors.

    Returns:
        Convolutions from C to C, from C to K and from K to K channels, each
        `{"kernel": [3, 3, in, out], "bias": [out]}` in float32.

    Example:
        >>> import jax
        >>> from jaxkd import losses
        >>> params = losses.init_factors(jax.random.key(0), 16, 8)
        >>> print([layer["kernel"].shape for layer in params])
        [(3, 3, 16, 16), (3, 3, 16, 8), (3, 3, 8, 8)]
    """
    sizes = ((features, features), (features, factors), (factors, factors))
    return [
        init_convolution(subkey, *size)
        for subkey, size in zip(jax.random.split(key, 3), sizes, strict=True)
    ]


def extract_factors(params: list[dict[str, Array]], features: ArrayLike) -> Array:
    """Computes factors of maps: three 3×3 convolutions, each with a leaky ReLU.

    Args:
        params: From `init_factors`, or `encoder` or `decoder` of `init_paraphraser`.
        features: `[B, H, W, C]`, floating-point.

    Returns:
        `[B, H, W, K]`, in float32 or wider.

    Raises:
        ValueError: If the features are not `[B, H, W, C]` of the parameters' channels.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> translator = losses.init_factors(jax.random.key(0), 16, 8)
        >>> print(losses.extract_factors(translator, jnp.ones((2, 4, 4, 16))).shape)
        (2, 4, 4, 8)

    References:
        Kim et al., Paraphrasing Complex Network: Network Compression via Factor Transfer,
        https://arxiv.org/abs/1802.04977
    """
    maps = check_images("features", features)
    channels = params[0]["kernel"].shape[-2]
    check_shape(
        maps.shape[-1] == channels,
        f"features {maps.shape} must have {channels} channels in their last axis, the size of "
        "params; call init_factors with the features' own size",
    )
    for layer in params:
        maps = jax.nn.leaky_relu(convolve(layer, maps), NEGATIVE_SLOPE)
    return maps


def init_paraphraser(key: Array, features: int, factors: int) -> dict[str, Any]:
    """Draws the parameters of `paraphraser_loss`, an autoencoder of the teacher's maps.

    Args:
        key: A random key.
        features: T, the teacher's channels.
        factors: K, the channels of the factors; in the authors' code half of the teacher's.

    Returns:
        `encoder` and `decoder`, each from `init_factors`, from T to K channels and back.

    Example:
        >>> import jax
        >>> from jaxkd import losses
        >>> params = losses.init_paraphraser(jax.random.key(0), 16, 8)
        >>> print([layer["kernel"].shape for layer in params["decoder"]])
        [(3, 3, 8, 8), (3, 3, 8, 16), (3, 3, 16, 16)]
    """
    encoder_key, decoder_key = jax.random.split(key)
    return {
        "encoder": init_factors(encoder_key, features, factors),
        "decoder": init_factors(decoder_key, factors, features),
    }


def paraphraser_loss(params: dict[str, Any], teacher_features: ArrayLike) -> Array:
    """Computes the mean absolute error of teacher maps that the paraphraser reconstructs.

    mean abs(t − D(E(t))) over all but the batch, where E and D are `extract_factors` of the encoder
    and the decoder

    The decoder of the authors' code has transposed convolutions; at stride 1 these are convolutions
    with flipped kernels. The error is the code's.

    Args:
        params: From `init_paraphraser`.
        teacher_features: `[B, H, W, T]`, floating-point.

    Returns:
        One value per example `[B]`, in float32 or wider.

    Raises:
        ValueError: If the features are not `[B, H, W, T]` of the parameters' channels.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> params = losses.init_paraphraser(jax.random.key(0), 4, 2)
        >>> print(losses.paraphraser_loss(params, jnp.zeros((1, 8, 8, 4))))
        [0.]

    References:
        Kim et al., Paraphrasing Complex Network: Network Compression via Factor Transfer,
        https://arxiv.org/abs/1802.04977
    """
    teacher = check_images("teacher_features", teacher_features)
    factors = extract_factors(params["encoder"], teacher)
    reconstructed = extract_factors(params["decoder"], factors)
    teacher, reconstructed = upcast_pair(
        ("teacher_features", "reconstructed"), teacher, reconstructed
    )
    return jnp.mean(jnp.abs(flatten_examples(teacher - reconstructed)), axis=1)


def factor_transfer_loss(student_factors: ArrayLike, teacher_factors: ArrayLike) -> Array:
    """Computes the mean absolute difference of normalised factors (FT).

    mean abs(s / ‖s‖ − t / ‖t‖) over all but the batch, where the norms are over all units of an
    example

    The paper takes a p-norm of the difference; the mean is the authors' code's, which weights it by
    500. RepDistiller first averages the squares of the factors over their channels.

    Args:
        student_factors: `[B, H, W, K]`, floating-point, from `extract_factors` of the translator.
        teacher_factors: The same shape, of the encoder.

    Returns:
        One value per example `[B]`, in float32 or wider.

    Raises:
        ValueError: If the shapes differ.
        TypeError: If the factors are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[[[3.0, 4.0]]]]), jnp.array([[[[2.0, 0.0]]]])
        >>> print(losses.factor_transfer_loss(student, teacher))  # (0.4 + 0.8) / 2
        [0.6]

    References:
        Kim et al., Paraphrasing Complex Network: Network Compression via Factor Transfer,
        https://arxiv.org/abs/1802.04977
    """
    student, teacher = check_image_pair(
        ("student_factors", "teacher_factors"), student_factors, teacher_factors
    )
    check_shape(
        student.shape == teacher.shape,
        f"student_factors {student.shape} and teacher_factors {teacher.shape} must have the same "
        "channels (the last axis); call init_factors with the factors of the paraphraser",
    )
    student, teacher = (normalize(flatten_examples(maps)) for maps in (student, teacher))
    return jnp.mean(jnp.abs(student - teacher), axis=1)
