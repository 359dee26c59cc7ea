"""What the benchmarks share that stand beside PyTorch: PyTorch's side, where it is installed, and the setting."""

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import jax

from experiments import timing
from jaxkd import runs

SETTLE_SECONDS = 0.05  # before each sample, for the sake of PyTorch's threads


class Torch:
    """PyTorch's side of a benchmark; made only where it is installed.

    Attributes:
        side: The module of what is compared, written in PyTorch.
        torch: PyTorch.
        device: Where it computes: where JAX does.
    """

    def __init__(self, side: ModuleType) -> None:
        self.side, self.torch = side, side.torch
        self.device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        self.torch.set_num_threads(cores())
        # Its compiler calls functions that it has deprecated itself.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")

    def wait(self, result: Any) -> None:
        """Returns when a result, JAX's or PyTorch's, is there."""
        jax.block_until_ready(result)
        if self.device != "cpu":
            self.torch.cuda.synchronize()


Side = TypeVar("Side", bound=Torch)


def begin(config: Any) -> Path:
    """Checks the options and makes the folder of results; to be called before anything asks JAX for a device."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU PyTorch needs some memory as well
    return timing.begin(config)


def load_torch(make: Callable[[], Side]) -> tuple[Side | None, list[str]]:
    """PyTorch's side, if it can be compared with, and what is to be said about it."""
    if not importlib.util.find_spec("torch"):
        return None, ["PyTorch is not installed, so jaxkd stands alone; `pip install torch` brings the rest."]
    torch = make()
    if torch.device != "cpu" and not torch.torch.cuda.is_available():
        return None, [f"PyTorch sees no GPU and JAX runs on {jax.default_backend()}, so jaxkd stands alone."]
    return torch, []


def time_rounds(calls: Sequence[Callable[[], Any]], rounds: int, torch: Torch | None) -> Iterator[list[float]]:
    """Those of `timing.time_rounds`, in which PyTorch's threads come to rest if it takes part."""
    wait, settle = (torch.wait, SETTLE_SECONDS) if torch else (jax.block_until_ready, 0.0)
    return timing.time_rounds(calls, rounds, wait=wait, settle=settle)


def write_results(folder: Path, config: Any, torch: Torch | None, found: dict, *, rounds: int) -> str:
    """Writes results.json and returns the setting, a line."""
    environment = runs.environment()
    environment |= {"torch": torch.torch.__version__ if torch else None, "threads": cores()}
    timing.write_results(folder, config, environment, found)
    return (
        f"{environment['platform']} ({environment['device']}), {environment['threads']} threads, "
        f"JAX {environment['jax']}, PyTorch {environment['torch'] or 'not installed'}, {rounds} rounds"
    )


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
