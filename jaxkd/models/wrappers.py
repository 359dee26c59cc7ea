"""Models made from other models: normalised inputs, another precision, classes in another order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxkd.models.model import Inputs, Model, Outputs

if TYPE_CHECKING:
    pass


def with_input_normalization(
    model: Model, mean: ArrayLike, std: ArrayLike, *, max_value: float | None = None
) -> Model:
    """Makes a model normalise its input, so that it takes uint8 images as they are stored.

    `x -> (x / max_value - mean) / std`, in float32. Teacher and student may use different values.

    Args:
        model: A model of floating-point images `[B, H, W, C]`.
        mean: Mean of each channel, `[C]`, of pixels scaled to [0, 1]. One number serves all.
        std: Standard deviation of each channel, `[C]` or a number, on the same scale.
        max_value: Largest value that a pixel can have, such as 1.0 for floating-point images in
            [0, 1]. By default 255, and only uint8 images are taken: another dtype does not tell
            the scale of its pixels. A pixel beyond twice that value becomes NaN.

    Returns:
        The model of images in [0, `max_value`].

    Raises:
        TypeError: From `init` and `apply`, if the images are not uint8 and there is no `max_value`.
        ValueError: If the model normalises its inputs already, `max_value` is not positive, a mean
            is not within [0, 1], or a standard deviation is not positive or above 1. From `init`
            and `apply`, if `mean` or `std` has another number of channels than the images, or uint8
            images have another `max_value` than 255.
    """
    if model.max_value is not None:
        raise ValueError(
            "the model normalises its inputs already: pass it as it is, or make it of the network "
            "alone"
        )
    if max_value is not None and not max_value > 0:
        raise ValueError(f"max_value must be positive, got {max_value}")
    _check_statistics(mean, std)
    mean = jnp.asarray(mean, jnp.float32)
    std = jnp.asarray(std, jnp.float32)

    def normalize(inputs: Array) -> Array:
        # The dtype is known while a program is traced, the pixels are not.
        dtype = getattr(inputs, "dtype", type(inputs).__name__)
        if max_value is None and dtype != jnp.uint8:
            raise TypeError(
                f"with_input_normalization expects uint8 images, got {dtype}: for another scale "
                "pass max_value, 1.0 for pixels in [0, 1] or 255.0 for pixels in [0, 255]"
            )
        if dtype == jnp.uint8 and max_value not in (None, 255):
            raise ValueError(
                f"uint8 images are divided by 255, but max_value is {max_value}: leave max_value "
                "out, or convert images of that scale to float32 first"
            )
        if inputs.ndim == 3:
            raise ValueError(
                f"images must be [B, H, W, C], got {list(inputs.shape)}: add an axis of one "
                "channel by images[..., None], or one of one image by images[None]"
            )
        _check_channels("mean", mean, inputs)
        _check_channels("std", std, inputs)
        channels = (1,) * (inputs.ndim - 1) + (-1,)
        pixels = inputs.astype(jnp.float32) / (255 if max_value is None else max_value)
        if dtype != jnp.uint8:
            # Augmentation may exceed the scale a little, but not another scale's pixels.
            pixels = jnp.where(jnp.abs(pixels) <= 2, pixels, jnp.nan)
        return (pixels - mean.reshape(channels)) / std.reshape(channels)

    def apply(
        variables: dict, inputs: Inputs, *, train: bool, key: Array | None = None
    ) -> tuple[Outputs, dict]:
        return model.apply(variables, normalize(inputs), train=train, key=key)

    network = model.network
    if network is not None:
        # A description has the normalisation of uint8 images alone.
        is_of_bytes = max_value is None
        network = (
            network._replace(mean=_to_tuple(mean), std=_to_tuple(std)) if is_of_bytes else None
        )
    return Model(
        lambda key, inputs: model.init(key, normalize(inputs)),
        apply,
        network,
        255.0 if max_value is None else float(max_value),
    )


def _to_tuple(values: Array) -> tuple[float, ...]:
    return tuple(np.atleast_1d(np.asarray(values)).tolist())


def _check_statistics(mean: ArrayLike, std: ArrayLike) -> None:
    """Raises `ValueError` if a mean or deviation cannot be that of pixels in [0, 1]."""
    means, stds = np.ravel(np.asarray(mean, np.float32)), np.ravel(np.asarray(std, np.float32))
    for name, values, is_right, interval in (
        ("mean", means, (means >= 0) & (means <= 1), "[0, 1]"),
        # A channel of one value has the deviation 1 in `data.channel_statistics`.
        ("std", stds, (stds > 0) & (stds <= 1), "(0, 1]"),
    ):
        if not is_right.all():
            wrong = values[~is_right][0]
            raise ValueError(
                f"{name} must be within {interval}, got {wrong:.4g}: images are scaled to [0, 1] "
                "before, so give the statistics of images on that scale"
                + (f", such as {wrong:.4g} / 255" if wrong > 1 else "")
            )


def _check_channels(name: str, values: Array, images: Array) -> None:
    """Raises `ValueError` if there is neither one number nor a value for each channel."""
    num_channels = images.shape[-1]
    # One value in a list would be repeated over the channels, and one channel over the values.
    if values.ndim and values.size != num_channels:
        raise ValueError(
            f"{name} has {values.size} value{'s' * (values.size != 1)}, but the images have "
            f"{num_channels} channel{'s' * (num_channels != 1)}: give one for each channel, the "
            "last axis, or a number for all"
        )


# Flax fixes a module's axis when the module is constructed, before it is known on how many devices
# it will train. A context variable lets the training step set the axis while it traces the model.


def with_compute_dtype(model: Model, dtype: DTypeLike) -> Model:
    """Makes a model compute in another precision, such as bfloat16, with weights kept in float32.

    Weights and inputs are cast on every call, so that gradients and optimizer stay in float32.
    Running statistics are not cast, and the logits are cast back to float32. Apply
    `with_input_normalization` to the result, so that pixels are normalised in float32.

    Args:
        model: A model whose layers compute in the dtype of their inputs, as Flax's do by default.
        dtype: A floating-point dtype.

    Returns:
        The model, with the same variables.

    Raises:
        TypeError: If it is another dtype.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.models import CNN, from_linen
        >>> model = with_compute_dtype(from_linen(CNN(features=(4,), hidden=8)), jnp.bfloat16)
        >>> images = jnp.zeros((2, 8, 8, 3))
        >>> variables = model.init(jax.random.key(0), images)
        >>> outputs, _ = model.apply(variables, images, train=False)
        >>> variables["params"]["conv1"]["kernel"].dtype, outputs.logits.dtype
        (dtype('float32'), dtype('float32'))
        >>> outputs.features["stage1"].dtype
        dtype(bfloat16)
    """
    # `None` would be float64 for NumPy, and `float` is a default of JAX.
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        name = "None" if dtype is None else jnp.dtype(dtype).name
        raise TypeError(f"dtype must be floating-point, got {name}: pass one such as jnp.bfloat16")

    def cast(tree: Any) -> Any:
        # Token ids and other integers keep their dtype.
        return jax.tree.map(
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
        )

    def apply(
        variables: dict, inputs: Inputs, *, train: bool, key: Array | None = None
    ) -> tuple[Outputs, dict]:
        # Statistics in bfloat16 would stop moving: the small step of a moving average rounds away.
        compute_variables = {**variables, "params": cast(variables["params"])}
        outputs, batch_stats = model.apply(compute_variables, cast(inputs), train=train, key=key)
        return outputs._replace(logits=outputs.logits.astype(jnp.float32)), batch_stats

    return model._replace(apply=apply)


def with_class_order(model: Model, order: ArrayLike) -> Model:
    """Makes a model whose classes are in another order, such as that of a student's labels.

    Args:
        model: Any model with logits `[..., C]`.
        order: `[C]`, int. The model's output for each class, from `jaxkd.data.match_classes`.

    Returns:
        The model with logits `[..., order]`, with the same variables and features.

    Raises:
        ValueError: When applied, if `order` is not a permutation of the model's classes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.data import match_classes
        >>> from jaxkd.models import CNN, from_linen
        >>> model = from_linen(CNN(features=(4,), hidden=8, num_classes=2))
        >>> images = jnp.ones((1, 8, 8, 3))
        >>> variables = model.init(jax.random.key(0), images)
        >>> swapped = with_class_order(model, match_classes(["dog", "cat"], ["cat", "dog"]))
        >>> logits, swapped_logits = (
        ...     m.apply(variables, images, train=False)[0].logits for m in (model, swapped)
        ... )
        >>> bool((logits[:, ::-1] == swapped_logits).all())
        True
    """
    order = np.asarray(order)

    def apply(
        variables: dict, inputs: Array, *, train: bool, key: Array | None = None
    ) -> tuple[Outputs, dict]:
        outputs, batch_stats = model.apply(variables, inputs, train=train, key=key)
        # JAX would wrap or drop an index that does not exist.
        if sorted(order.tolist()) != list(range(outputs.logits.shape[-1])):
            raise ValueError(
                f"the order of {order.size} classes is not one of the model's "
                f"{outputs.logits.shape[-1]}: give each of its outputs once"
            )
        return outputs._replace(logits=outputs.logits[..., order]), batch_stats

    # The network alone would have its classes in another order.
    return model._replace(apply=apply, network=None)


def with_frozen_batch_stats(model: Model) -> Model:
    """Makes a model use and keep its running statistics in training.

    This serves fine-tuning on small batches. The model computes in training what it computes in
    evaluation, which affects every layer that depends on the mode: dropout, for example, is off.
    Scales and biases of batch normalisation are parameters, and are trained unless they are frozen.

    Args:
        model: Any model.

    Returns:
        The model that computes the same in training and evaluation, with the same variables.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxkd.models import from_nnx, with_frozen_batch_stats
        >>> model = with_frozen_batch_stats(from_nnx(lambda rngs: nnx.BatchNorm(2, rngs=rngs)))
        >>> images = jnp.array([[3.0, 4.0]])
        >>> _, batch_stats = model.apply(
        ...     model.init(jax.random.key(0), images), images, train=True
        ... )
        >>> batch_stats["mean"]
        Array([0., 0.], dtype=float32)
    """

    def apply(
        variables: dict, inputs: Inputs, *, train: bool, key: Array | None = None
    ) -> tuple[Outputs, dict]:
        del train
        return model.apply(variables, inputs, train=False, key=key)

    return model._replace(apply=apply)
