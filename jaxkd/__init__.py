"""Knowledge distillation for JAX: pure losses, plans of stages, runs that reproduce bit for bit.

Import what you need (`from jaxkd import losses`); nothing is imported for you.
"""
