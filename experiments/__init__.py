"""Experiments: one script for each question, run as `python -m experiments.NAME`."""

import importlib.metadata
import os


def _choose_cpu_flags(version: str) -> list[str]:
    """Returns the XLA flags that CPUs need with this version of JAX, and others may not know."""
    if version.startswith("0.10."):
        # XLA hands convolutions to a library that takes five times as long; it does reductions
        # well.
        return ["--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"]
    if version.startswith("0.7."):
        # XLA keeps a copy of a weight matrix by its address, where a step puts the next weights.
        return ["--xla_cpu_use_xnnpack=false"]
    return []


# JAX reads the flags when it starts, which is after this module.
_flags = [*_choose_cpu_flags(importlib.metadata.version("jax")), os.environ.get("XLA_FLAGS", "")]
os.environ["XLA_FLAGS"] = " ".join(_flags).strip()
