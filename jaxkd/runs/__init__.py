"""Runs: folders with configuration, metrics, checkpoints and results, reports, and repetitions."""

from jaxkd.runs.environment import DETERMINISM_FLAGS, describe_environment, enable_determinism
from jaxkd.runs.errors import RunError
from jaxkd.runs.loggers import Logger, line_logger, tensorboard_logger, wandb_logger
from jaxkd.runs.results import ResultRow, summarize
from jaxkd.runs.run import (
    IGNORED_OPTIONS,
    UNTRAINED_OPTIONS,
    Run,
    fingerprint,
    open_run,
    read_run,
)

__all__ = [
    "DETERMINISM_FLAGS",
    "IGNORED_OPTIONS",
    "Logger",
    "ResultRow",
    "Run",
    "RunError",
    "UNTRAINED_OPTIONS",
    "describe_environment",
    "enable_determinism",
    "fingerprint",
    "line_logger",
    "open_run",
    "read_run",
    "summarize",
    "tensorboard_logger",
    "wandb_logger",
]
