"""Models as pairs of pure functions, and the networks that come with the library.

Nothing outside this package imports Flax.
"""

from jaxkd.models.cnn import CNN, max_pool
from jaxkd.models.model import Model, Outputs, from_linen, from_nnx, standardized

__all__ = ["CNN", "Model", "Outputs", "from_linen", "from_nnx", "max_pool", "standardized"]
