"""XLA's flags that CPUs need, by the version of JAX.

JAX reads the flags when it starts its first device, so this module does not import JAX.
"""

import importlib.metadata
import os

CONVOLUTION_OPTION = "--xla_cpu_experimental_ynn_fusion_type"
"""The option that tells which operations XLA gives to the library YNNPACK."""
CONVOLUTION_FLAG = f"{CONVOLUTION_OPTION}=-individual_convolution"
"""Keeps convolutions from YNNPACK, whose gradients of kernels take 2 to 10 times as long."""
PRODUCT_FLAG = "--xla_cpu_use_xnnpack=false"
"""Keeps products of matrices from XNNPACK, which may compute them with outdated weights."""

# XLA ends a process for a flag that it does not know, so that a new version needs a look first.
_SLOW_CONVOLUTIONS = ("0.9.", "0.10.", "0.11.", "0.12.")
_OUTDATED_PRODUCTS = ("0.7.",)


def choose_flags(version: str) -> list[str]:
    """Returns the flags that CPUs need with a version of JAX; other versions may not know them."""
    if version.startswith(_SLOW_CONVOLUTIONS):
        return [CONVOLUTION_FLAG]
    if version.startswith(_OUTDATED_PRODUCTS):
        return [PRODUCT_FLAG]
    return []


def add_flags() -> None:
    """Adds the flags that CPUs need with the installed JAX to XLA_FLAGS.

    An option that the user has set keeps the user's value. Call it before JAX starts.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    missing = [
        flag
        for flag in choose_flags(importlib.metadata.version("jax"))
        if not _sets(flags, flag.partition("=")[0])
    ]
    os.environ["XLA_FLAGS"] = " ".join([*missing, flags]).strip()


def lacks_convolution_flag(version: str) -> bool:
    """Returns whether convolutions on a CPU are slow because a flag is missing from XLA_FLAGS.

    Any value of the option counts as the user's choice.
    """
    is_set = _sets(os.environ.get("XLA_FLAGS", ""), CONVOLUTION_OPTION)
    return CONVOLUTION_FLAG in choose_flags(version) and not is_set


def _sets(flags: str, option: str) -> bool:
    return any(flag.partition("=")[0] == option for flag in flags.split())
