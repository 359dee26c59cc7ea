"""The PyTorch backend and the environment line of the benchmarks that compare with PyTorch."""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import jax

from experiments.benchmarks import timing
from jaxkd import runs

# PyTorch's threads spin for some ten milliseconds after their last work.
SETTLE_SECONDS = 0.05


class TorchBackend:
    """The PyTorch half of a benchmark. Constructed only where PyTorch is installed.

    Attributes:
        counterparts: The module that implements in PyTorch what is compared.
        torch: The `torch` module.
        device: "cpu" or "cuda": the kind of device that JAX computes on.
    """

    def __init__(self, counterparts: ModuleType) -> None:
        self.counterparts = counterparts
        self.torch = counterparts.torch
        self.device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        self.torch.set_num_threads(available_cores())
        # PyTorch's compiler calls functions that PyTorch itself has deprecated.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")

    @functools.cached_property
    def compile_error(self) -> str:
        """The first line of the error if `torch.compile` does not work here, otherwise empty."""
        try:
            self.torch.compile(lambda x: x.exp() + 1)(self.torch.ones(8, device=self.device))
        # The type depends on the cause: no C++ compiler, no Triton, an unsupported Python.
        except Exception as error:
            return str(error).strip().splitlines()[0]
        return ""

    def wait(self, result: Any) -> None:
        """Blocks until a result of JAX or PyTorch is ready."""
        jax.block_until_ready(result)
        if self.device != "cpu":
            self.torch.cuda.synchronize()


Backend = TypeVar("Backend", bound=TorchBackend)


def prepare_folder(config: Any) -> Path:
    """Checks the options and makes the folder of the results. Call it before JAX starts."""
    # On a GPU, JAX would otherwise reserve most of the memory and leave too little to PyTorch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return timing.prepare_folder(config)


def load_torch(make: Callable[[], Backend]) -> tuple[Backend | None, list[str]]:
    """Makes the PyTorch backend, or returns `None` and a note on why PyTorch is left out."""
    if not importlib.util.find_spec("torch"):
        return None, [
            "PyTorch is not installed, so only jaxkd is measured; `pip install torch` adds PyTorch."
        ]
    torch = make()
    if torch.device != "cpu" and not torch.torch.cuda.is_available():
        return None, [
            f"PyTorch finds no GPU and JAX runs on {jax.default_backend()}, "
            "so only jaxkd is measured."
        ]
    return torch, []


def time_rounds(
    calls: Sequence[Callable[[], Any]], rounds: int, torch: TorchBackend | None
) -> Iterator[list[float]]:
    """Runs `timing.time_rounds`, letting PyTorch's threads become idle if PyTorch takes part."""
    if torch is None:
        return timing.time_rounds(calls, rounds)
    return timing.time_rounds(calls, rounds, wait=torch.wait, settle_seconds=SETTLE_SECONDS)


def write_results(
    folder: Path, config: Any, torch: TorchBackend | None, results: dict, *, rounds: int
) -> str:
    """Writes `results.json` and returns a line that describes the environment."""
    environment = runs.describe_environment()
    environment["torch"] = torch.torch.__version__ if torch else None
    environment["threads"] = available_cores()
    timing.write_results(folder, config, environment, results)
    return (
        f"{environment['platform']} ({environment['device']}), {environment['threads']} threads, "
        f"JAX {environment['jax']}, PyTorch {environment['torch'] or 'not installed'}, "
        f"{rounds} rounds"
    )


def available_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    # An affinity mask, as of a container or of taskset, may allow less than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
