"""Knowledge distillation for JAX: pure losses, plans of stages, runs that reproduce bit for bit.

Import the part that you need, such as `from jaxkd import losses`. This module imports nothing.
"""

__version__ = "0.2.0"
