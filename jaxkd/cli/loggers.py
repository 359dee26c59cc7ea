"""The loggers of `--log`, which write into the folder of the run."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxkd._extras import require_installed
from jaxkd.runs import Logger, line_logger, tensorboard_logger, wandb_logger

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check_installed(names: Iterable[str]) -> None:
    """Raises `ImportError` if the package of a logger is missing."""
    require_installed(*(_PACKAGES[name] for name in names if name in _PACKAGES))


def make_loggers(names: Iterable[str], folder: Path, config: Mapping[str, Any]) -> list[Logger]:
    """Makes the loggers of a run.

    Args:
        names: Some of `lines`, `tensorboard` and `wandb`.
        folder: The folder of the run.
        config: Options that W&B shows with the run.
    """
    make = {
        "lines": lambda: line_logger(folder / "training.log"),
        "tensorboard": lambda: tensorboard_logger(folder / "tensorboard"),
        "wandb": lambda: wandb_logger(folder, project="jaxkd", config=config),
    }
    return [make[name]() for name in names]
