"""Strict numerics and eight virtual CPU devices for every test."""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
)
# JAX 0.7 to 0.10 compile in half the time without these emitters; later versions have no others.
if importlib.metadata.version("jax").startswith(("0.7.", "0.8.", "0.9.", "0.10.")):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# The workers, and the processes that they start, compile a program once between them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxkd-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Compiling takes most of the time. The main job, in processes of its own, is optimized.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402  (the flags above are read when JAX starts)
import pytest  # noqa: E402

import experiments  # noqa: E402, F401  (sets the flags that CPUs need with this version of JAX)
from jaxkd.runs import ResultRow  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


_TESTS_PER_CACHE = 300
_num_tests = 0


@pytest.fixture(autouse=True)
def _free_programs():
    """Frees compiled programs now and then, which would fill some gigabytes by the end."""
    yield
    global _num_tests
    _num_tests += 1
    if _num_tests % _TESTS_PER_CACHE == 0:
        jax.clear_caches()


@pytest.fixture
def make_row():
    """Makes a row of results by name and accuracies. Keywords replace its other values."""
    return _make_row


def _make_row(name, accuracy, **values):
    defaults = {
        "accuracy_interval": (0.8512, 0.8749),
        "agreement": 0.9034,
        "ece": 0.0312,
        "parameters": 167562,
        "bytes": 670248,
        "flops": 8201578.0,
        "latency_ms": 0.2134,
        "seconds": (40.0, 41.0, 46.0),
    }
    return ResultRow(name, accuracy=tuple(accuracy), **defaults | values)


@pytest.fixture
def rows():
    return [
        _make_row(
            "teacher", [0.912, 0.915, 0.909], parameters=2400000, bytes=9600000, agreement=None
        ),
        _make_row("student_alone", [0.82, 0.83, 0.81]),
        _make_row("student_direct", [0.86, 0.88, 0.855]),
        _make_row("student_transfer", [0.862, 0.877, 0.859]),
    ]


@pytest.fixture
def metrics():
    return [
        {
            "seed": seed,
            "stage": stage,
            "step": 100 * epoch,
            "epoch": epoch,
            "validation_loss": 1 / epoch + 0.1 * seed,
            "validation_accuracy": 0.9 - 0.3 / epoch + 0.01 * seed,
        }
        for stage in ("student_direct", "student_alone")
        for seed in range(2)
        for epoch in range(1, 5)
    ]
