"""The software and hardware on which the bits of a run depend."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxkd.runs.errors import RunError

REQUIRED_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "numpy",
    "orbax-checkpoint",
    "jaxkd-distill",
)
"""Packages whose versions are always recorded, as `None` if they are not installed."""
ACCELERATOR_PACKAGES = (
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "nvidia-cublas-cu12",
    "nvidia-cudnn-cu12",
    "nvidia-cublas",
    "nvidia-cudnn-cu13",
)
"""Packages whose versions are recorded if they are installed."""

DETERMINISM_FLAGS = (
    "--xla_gpu_exclude_nondeterministic_ops=true",
    "--xla_gpu_autotune_level=0",
)
"""XLA flags under which a GPU repeats its bits: no atomics, and no kernels chosen by their time."""


def check_cpu_products() -> None:
    """Checks that products of matrices on a CPU follow the weights when a step changes them.

    XLA of JAX 0.7 may keep a packed copy of a weight matrix, which it finds by the address of the
    weights. A step that donates its state puts the next weights at the same address, and a program
    that only reads them, such as an evaluation, then computes with the old ones. Other versions are
    not checked.

    Raises:
        RunError: If a product is that of the old weights.
    """
    if jax.__version_info__ >= (0, 10) or jax.default_backend() != "cpu":
        return
    inputs, weights = jnp.ones((512, 1024)), jnp.zeros((1024, 128))
    multiply = jax.jit(jnp.matmul)
    multiply(inputs, weights)
    weights = jax.jit(lambda weights: weights + 1, donate_argnums=0)(weights)
    if multiply(inputs, weights)[0, 0] != 1024:
        raise RunError(
            f"JAX {jax.__version__} computes with outdated weights on this CPU: set "
            "XLA_FLAGS=--xla_cpu_use_xnnpack=false before JAX starts, or install JAX 0.10 or newer"
        )


def enable_determinism() -> None:
    """Makes XLA compute the same bits in every run on a GPU, with `DETERMINISM_FLAGS`.

    Call it before the first JAX array is made, because XLA reads its flags only once. CPUs need no
    flags, and TPUs have none. Programs become slower, and a program with an operation that has no
    deterministic form does not compile. Such an operation is select-and-scatter, the gradient of a
    max-pool by `reduce_window`.

    Raises:
        RunError: If JAX has started without the flags.

    References:
        XLA, Determinism (GPU), https://openxla.org/xla/determinism
    """
    # JAX has no public function that answers this without starting a backend.
    from jax._src import xla_bridge

    flags = os.environ.get("XLA_FLAGS", "").split()
    missing = [flag for flag in DETERMINISM_FLAGS if flag not in flags]
    if missing and xla_bridge.backends_are_initialized():
        raise RunError(
            f"JAX has started already: set XLA_FLAGS='{' '.join(DETERMINISM_FLAGS)}' "
            "in the environment instead"
        )
    # XLA obeys the last flag of a name, so these override the user's.
    os.environ["XLA_FLAGS"] = " ".join([*flags, *missing])


def describe_environment() -> dict[str, Any]:
    """Returns everything but the configuration on which the bits of a run depend.

    Returns:
        JSON values by name: versions of packages, device, processor, XLA flags, JAX settings, and
        the commit of the source with a `+` if files have changed since.
    """
    device = jax.devices()[0]
    config: Any = jax.config  # the type stubs of older versions lack the attributes
    versions = {
        package: _package_version(package) for package in REQUIRED_PACKAGES + ACCELERATOR_PACKAGES
    }
    return {
        "python": platform.python_version(),
        **{
            package: version
            for package, version in versions.items()
            if version or package in REQUIRED_PACKAGES
        },
        "platform": device.platform,
        "platform_version": " ".join(device.client.platform_version.split()),
        "device": device.device_kind if device.platform != "cpu" else platform.machine(),
        "device_count": jax.device_count(),
        **_describe_processor(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "libtpu_init_args": os.environ.get("LIBTPU_INIT_ARGS", ""),
        "x64": config.jax_enable_x64,
        "prng": config.jax_default_prng_impl,
        "prng_partitionable": config.jax_threefry_partitionable,
        "prng_seed_offset": config.jax_random_seed_offset,
        "matmul_precision": config.jax_default_matmul_precision,
        "commit": _describe_commit(),
    }


def describe_lowering() -> dict[str, Any]:
    """Returns the part of the environment on which the text of a lowered program depends.

    Returns:
        JSON values by name: versions of the packages that make programs, kind of device and JAX
        settings.
    """
    config: Any = jax.config
    packages = ("jax", "jaxlib", "flax", "optax", "jaxkd-distill")
    return {
        **{package: _package_version(package) for package in packages},
        "platform": jax.default_backend(),
        "x64": config.jax_enable_x64,
        "prng": config.jax_default_prng_impl,
        "prng_partitionable": config.jax_threefry_partitionable,
        "prng_seed_offset": config.jax_random_seed_offset,
        "matmul_precision": config.jax_default_matmul_precision,
        "dtype_promotion": config.jax_numpy_dtype_promotion,
        # For debugging, but programs read otherwise or round otherwise.
        "disable_jit": config.jax_disable_jit,
        "disable_most_optimizations": config.values.get("jax_disable_most_optimizations"),
    }


def _describe_processor() -> dict[str, Any]:
    """Returns what XLA's programs for a CPU depend on: model, vector extensions, usable cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # only Linux has this file
        lines = []
    fields = {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    # x86 calls the list "flags", ARM "Features".
    extensions = (fields.get("flags") or fields.get("Features") or "").split()
    vector_prefixes = ("avx", "amx", "fma", "asimd", "sve")
    # XLA divides work among as many threads as the process may use cores.
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return {
        "processor": fields.get("model name") or platform.processor(),
        "vectors": " ".join(
            sorted(name for name in extensions if name.startswith(vector_prefixes))
        ),
        "cores": cores,
    }


def _package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe_commit() -> str | None:
    """Returns the source's commit, with a `+` if files have changed, or `None` without one."""
    root = Path(__file__).resolve().parents[2]
    try:
        # An installed package may lie inside the repository of another project.
        if Path(_run_git(root, "rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return _run_git(root, "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _run_git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return completed.stdout.strip()
