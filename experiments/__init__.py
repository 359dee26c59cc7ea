"""Experiments: one script for each question, run as `python -m experiments.NAME`."""

import os
import sys

from jaxkd._cpu_flags import add_flags
from jaxkd._extras import require_installed

_PACKAGES = (
    *("matplotlib", "rich", "tyro", "docstring_parser"),
    *("filelock", "flatbuffers", "orbax", "safetensors", "tabulate", "flax"),
)
"""Packages that an experiment needs, those of the largest extra first."""
_OTHER_PACKAGES = {
    # It runs on machines that have little more than JAX.
    "experiments.benchmarks.accelerator": ("filelock", "orbax", "flax"),
}
"""Packages of modules that need fewer, by the name that follows `python -m`."""

USER_XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
"""The flags without those that this version of JAX needs, for processes with another version."""


def _check_packages() -> None:
    """Ends a command in one line if a package is missing, before a module imports it."""
    # This is the value while `python -m` looks for the module that it will run.
    if sys.argv[:1] != ["-m"]:
        return
    arguments = sys.orig_argv
    module = arguments[arguments.index("-m") + 1] if "-m" in arguments[:-1] else ""
    try:
        require_installed(*_OTHER_PACKAGES.get(module, _PACKAGES))
    except ImportError as error:
        sys.exit(f"error: {error}")


_check_packages()
add_flags()
