"""Experiments: one script for each question, run as `python -m experiments.NAME`."""

import importlib.metadata
import os
import sys

from jaxkd._extras import require_installed

_PACKAGES = (
    *("matplotlib", "rich", "tyro", "docstring_parser"),
    *("filelock", "flatbuffers", "orbax", "safetensors", "tabulate", "flax"),
)
"""Packages that every experiment needs, those of the largest extra first."""

USER_XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
"""The flags without those that this version of JAX needs, for processes with another version."""


def _check_packages() -> None:
    """Ends a command in one line if a package is missing, before a module imports it."""
    # This is the value while `python -m` looks for the module that it will run.
    if sys.argv[:1] != ["-m"]:
        return
    try:
        require_installed(*_PACKAGES)
    except ImportError as error:
        sys.exit(f"error: {error}")


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


_check_packages()
# JAX reads the flags when it starts, which is after this module.
_flags = [*_choose_cpu_flags(importlib.metadata.version("jax")), USER_XLA_FLAGS]
os.environ["XLA_FLAGS"] = " ".join(_flags).strip()
