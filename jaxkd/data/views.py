"""A fixed number of augmented views of each example, which a teacher and its students share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.data.mixing import Mixed

Augment = Callable[[Array, Array], Array | Mixed]
"""`(key, inputs) -> inputs`, such as `jaxkd.data.crop_and_flip`, or `-> Mixed` (`data.mixup`)."""


# Compared and hashed by identity: an array, such as the key, has no hash.
@dataclass(frozen=True, eq=False)
class Views:
    """The augmented views of each example that a teacher and its students share.

    The student sees view `epoch % count` of every example. The teacher's logits can therefore be
    computed in advance for every view that the student will see. More views come closer to the
    paper's teacher, which sees a new view at every step.

    Attributes:
        augment: `(key, inputs [B, ...]) -> inputs`, such as `jaxkd.data.crop_and_flip`.
        key: The PRNG key of all draws.
        count: Number of views of each example.

    References:
        Beyer et al., Knowledge distillation: A good teacher is patient and consistent,
        https://arxiv.org/abs/2106.05237
    """

    augment: Augment
    key: Array
    count: int

    def __post_init__(self) -> None:
        """Raises `ValueError` if there is no view."""
        if self.count < 1:
            raise ValueError(
                "the logits of a teacher cannot be cached for views that are drawn at every step: "
                f"pass views=1 or more, got {self.count}"
            )

    def at(self, epochs: Any) -> Any:
        """Returns the views that are shown in these epochs, an int or an array."""
        return epochs % self.count


def augment_views(
    augment: Augment, key: Array, inputs: ArrayLike, indices: ArrayLike, views: ArrayLike
) -> Array:
    """Draws a view of each example. It does not depend on the rest of the batch.

    augment(fold_in(fold_in(key, view), index), example)

    Args:
        augment: `(key, inputs [B, ...]) -> inputs`. It is called with one example at a time, so it
            cannot mix examples.
        key: The PRNG key of all draws. `rbg` keys are not supported, because their draws depend on
            the batch.
        inputs: `[B, ...]`, the examples.
        indices: `[B]`, int32. The index of each example in the data set.
        views: `[B]` or a scalar, int32. The view of each example.

    Returns:
        `[B, ...]`, the augmented examples.

    Raises:
        ValueError: If there is not one index and one view per example, the key is an `rbg` key, or
            the augmentation mixes examples.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.data import crop_and_flip
        >>> key, images = jax.random.key(0), jnp.arange(5 * 8 * 8.0).reshape(5, 8, 8, 1)
        >>> batch = augment_views(crop_and_flip, key, images, jnp.arange(5), 1)
        >>> alone = augment_views(crop_and_flip, key, images[3:4], jnp.array([3]), 1)
        >>> bool((batch[3] == alone[0]).all())
        True

    References:
        Beyer et al., Knowledge distillation: A good teacher is patient and consistent,
        https://arxiv.org/abs/2106.05237
    """
    batch = jnp.shape(inputs)[:1]
    if jnp.shape(indices) != batch or jnp.shape(views) not in (batch, ()):
        raise ValueError(
            f"indices {jnp.shape(indices)} and views {jnp.shape(views)} must have one entry per "
            f"example of the inputs {jnp.shape(inputs)}; views may also be a scalar"
        )
    # Under vmap, the first rbg key of a batch makes the draws of the whole batch.
    if str(jax.random.key_impl(key)).endswith("rbg"):
        raise ValueError(
            "the draws of an rbg key depend on the batch: make the key with impl='threefry2x32'"
        )

    def draw(example: Array, index: Array, view: Array) -> Array:
        drawn = augment(jax.random.fold_in(jax.random.fold_in(key, view), index), example[None])
        if isinstance(drawn, Mixed):
            raise ValueError(
                "mixup and cutmix mix the examples of a batch, but views are drawn of one example "
                "at a time: leave out views, or the mixing"
            )
        return drawn[0]

    return jax.vmap(draw)(jnp.asarray(inputs), jnp.asarray(indices), jnp.broadcast_to(views, batch))
