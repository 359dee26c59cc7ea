"""A fixed number of augmented pictures of each example, which a teacher and its students share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

Augment = Callable[[Array, Array], Array]
"""`(key, inputs) -> inputs`, such as `jaxkd.data.crop_and_flip`."""


@dataclass(frozen=True, eq=False)
class Views:
    """The augmented pictures of each example that a teacher and its students share.

    The student meets view `epoch % count` of every example, so that the teacher's logits can be computed ahead for all
    pictures that it will ever see. More views come closer to the paper's teacher, who sees every picture anew.

    Attributes:
        augment: `(key, inputs [B, ...]) -> inputs`, such as `jaxkd.data.crop_and_flip`.
        key: Makes all draws.
        count: How many views there are of each example.

    References:
        Beyer et al., Knowledge distillation: A good teacher is patient and consistent, https://arxiv.org/abs/2106.05237
    """

    augment: Augment
    key: Array
    count: int

    def __post_init__(self) -> None:
        """Raises `ValueError` if there is no view."""
        if self.count < 1:
            raise ValueError(
                "teachers' logits cannot be cached for pictures that are drawn anew at every step: "
                f"give views=1 or more, got {self.count}"
            )

    def at(self, epochs: Any) -> Any:
        """The views that are shown in these epochs, an int or an array of them."""
        return epochs % self.count


def augment_views(augment: Augment, key: Array, inputs: ArrayLike, indices: ArrayLike, views: ArrayLike) -> Array:
    """Draws each example's picture of a view, the same whenever it is asked for and whatever the batch around it.

    augment(fold_in(fold_in(key, view), index), example)

    Args:
        augment: `(key, inputs [B, ...]) -> inputs`. It gets each example alone, and so has none to mix it with.
        key: Makes all draws; not of an `rbg` kind, whose draws depend on the batch.
        inputs: `[B, ...]`, the examples.
        indices: `[B]`, int32, their numbers among all examples.
        views: `[B]` or a scalar, int32, their views.

    Returns:
        `[B, ...]`, the pictures.

    Raises:
        ValueError: If the indices are not one per example, the views neither that nor one for all, or the key's kind
            is `rbg`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.data import crop_and_flip
        >>> key, images = jax.random.key(0), jnp.arange(5 * 8 * 8.0).reshape(5, 8, 8, 1)
        >>> batch = augment_views(crop_and_flip, key, images, jnp.arange(5), 1)
        >>> alone = augment_views(crop_and_flip, key, images[3:4], jnp.array([3]), 1)
        >>> bool((batch[3] == alone[0]).all())
        True

    References:
        Beyer et al., Knowledge distillation: A good teacher is patient and consistent, https://arxiv.org/abs/2106.05237
    """
    batch = jnp.shape(inputs)[:1]
    if jnp.shape(indices) != batch or jnp.shape(views) not in (batch, ()):
        raise ValueError(
            f"indices {jnp.shape(indices)} and views {jnp.shape(views)} must be one per example of the inputs "
            f"{jnp.shape(inputs)}; one view may stand for all"
        )
    if str(jax.random.key_impl(key)).endswith("rbg"):  # of these the first key of a batch makes all draws
        raise ValueError("an rbg key draws other views in another batch: make one with impl='threefry2x32'")

    def draw(example: Array, index: Array, view: Array) -> Array:
        return augment(jax.random.fold_in(jax.random.fold_in(key, view), index), example[None])[0]

    return jax.vmap(draw)(jnp.asarray(inputs), jnp.asarray(indices), jnp.broadcast_to(views, batch))
