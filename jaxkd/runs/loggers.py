"""Loggers, which get the records of a training as they go to `metrics.jsonl`."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import json
import os
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from jaxkd._extras import add_install_command, require_installed
from jaxkd._files import write_atomically
from jaxkd._messages import first_line, shorten
from jaxkd.runs.errors import RunError

Logger = Callable[[dict[str, Any]], object]
"""A callable that takes a record, and may have a method `close()` for the end."""

_WANDB_ID = "wandb-id"


RUN_FILES = ("metrics.jsonl", "config.json", "results.json", "report.md", "report.json")
"""Names of files that a run writes itself."""


def line_logger(file: str | os.PathLike | TextIO) -> Logger:
    """Makes a logger that writes a line of text for each record.

    Args:
        file: A path, whose file is created at the first record and continued by a resumed run, or
            an open text file such as `sys.stderr`, which stays open.

    Returns:
        The logger, for `open_run`.

    Raises:
        TypeError: If an open file takes bytes.
        ValueError: If it is closed, or the path is that of a folder or of a run's own file.

    Example:
        >>> import sys
        >>> log = line_logger(sys.stdout)
        >>> log({"seed": 0, "stage": "student", "step": 400, "epoch": 5.0, "loss": 0.25})
        seed 0, student, step 400: epoch 5, loss 0.25
    """
    # Failing at the first record, the logger would be dropped and the training go on.
    if isinstance(file, (io.RawIOBase, io.BufferedIOBase)):
        raise TypeError("the file of line_logger takes bytes: open it as text")
    if isinstance(file, io.TextIOBase):
        if file.closed:
            raise ValueError(
                "the file of line_logger is closed: pass one that stays open, or a path"
            )
    elif isinstance(file, (str, os.PathLike)) and Path(file).is_dir():
        raise ValueError(f"{file} is a folder: pass line_logger the path of a file")
    elif isinstance(file, (str, os.PathLike)) and Path(file).name in RUN_FILES:
        raise ValueError(
            f"{file} has the name of a run's own file, which the logger would damage: name another"
        )
    return _LineLogger(file)


def tensorboard_logger(folder: str | os.PathLike) -> Logger:
    """Makes a logger that writes event files for TensorBoard.

    Each seed and stage is a run of TensorBoard, such as `seed0/student`, so that their curves share
    one plot per value. The files are written by tensorboardX, which needs no TensorFlow:
    `pip install 'jaxkd-distill[tensorboard]'`. The command `tensorboard --logdir FOLDER`, which
    shows them, is in a package of its own.

    Args:
        folder: The folder of the event files. A resumed run adds files to it.

    Returns:
        The logger, for `open_run`. It creates the folder at its first record.

    Raises:
        ImportError: If tensorboardX is missing.
    """
    require_installed("tensorboardX")
    return _TensorBoardLogger(Path(folder))


def wandb_logger(
    folder: str | os.PathLike,
    *,
    project: str,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Logger:
    """Makes a logger that sends records to Weights & Biases.

    All seeds and stages are one run there, with values such as `seed0/student/loss` over
    `seed0/student/step`. It starts at the first record. W&B reads its own environment variables,
    such as WANDB_ENTITY, and with WANDB_MODE=offline sends nothing: `wandb sync` does so later.
    Needs `pip install 'jaxkd-distill[wandb]'`.

    Args:
        folder: The folder of W&B's local files, and of a file with the id of the run there, which a
            resumed run continues.
        project: Name of the project.
        name: Name of the run. By default W&B chooses one.
        config: Options that W&B shows with the run.

    Returns:
        The logger, for `open_run`.

    Raises:
        ImportError: If wandb is missing.
    """
    require_installed("wandb")
    return _WandbLogger(Path(folder), project, name, None if config is None else dict(config))


class RunLoggers:
    """The loggers of a run, and which records of a training that is repeated they have had.

    A logger that raises an exception is dropped with a warning. All are closed by `close`, or when
    this object is deleted or the process ends.
    """

    def __init__(self, loggers: Iterable[Logger] = (), path: Path | None = None) -> None:
        """Takes the loggers and the file that tells a later process what they have had.

        Args:
            loggers: The loggers.
            path: The file. There need be none without loggers.

        Raises:
            TypeError: If a logger cannot be called.
            RunError: If the file is damaged.
            OSError: If the file cannot be read.
        """
        self._loggers = check_loggers(loggers)
        self._path = path
        self._logged_steps = _read_logged_steps(path) if path and self._loggers else {}
        weakref.finalize(self, _close_all, self._loggers)

    def log(self, record: Mapping[str, Any]) -> None:
        """Passes a record to all loggers, unless they had it before its training was resumed."""
        step = self._logged_steps.get((record.get("seed"), record.get("stage")))
        if step is not None and record["step"] <= step:
            return
        for logger in tuple(self._loggers):
            try:
                # A copy, so that no logger changes what another one gets.
                logger(dict(record))
            except Exception as error:
                self._loggers.remove(logger)
                with contextlib.suppress(Exception):
                    _close(logger)
                _warn(f"{_describe(error, logger)} and gets no more records; the run goes on")

    def expect_again(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Notes records that were logged, and whose training will repeat them.

        Raises:
            OSError: If the note cannot be written.
        """
        records = list(records)
        if not self._loggers or not records or self._path is None:
            return
        for record in records:
            key = record["seed"], record["stage"]
            self._logged_steps[key] = max(record["step"], self._logged_steps.get(key, -1))
        self._write_logged_steps()

    def forget(self, seed: int, stage: str) -> None:
        """Makes all records of a training new, because it will be another one.

        Raises:
            OSError: If the note cannot be written.
        """
        if self._logged_steps.pop((seed, stage), None) is not None:
            self._write_logged_steps()

    def close(self) -> None:
        """Closes the loggers, which then get no more records. An error becomes a warning."""
        _close_all(self._loggers)

    def _write_logged_steps(self) -> None:
        if self._path is not None:
            rows = [[*key, step] for key, step in self._logged_steps.items()]
            write_atomically(self._path, (json.dumps(rows) + "\n").encode())


def check_loggers(loggers: Any) -> list[Logger]:
    """Returns loggers as a list; raises `TypeError` if one of them cannot be called."""
    remedy = "pass a tuple of callables, such as (runs.line_logger('training.log'),)"
    if callable(loggers) or not isinstance(loggers, Iterable):
        raise TypeError(f"loggers is a {type(loggers).__name__}: {remedy}")
    loggers = list(loggers)
    for logger in loggers:
        if not callable(logger):
            raise TypeError(f"loggers has a {type(logger).__name__}: {remedy}")
    return loggers


class _LineLogger:
    def __init__(self, file: str | os.PathLike | TextIO) -> None:
        self._path = Path(file) if isinstance(file, (str, os.PathLike)) else None
        self._file = None if isinstance(file, (str, os.PathLike)) else file

    def __call__(self, record: dict[str, Any]) -> None:
        if self._file is None:
            assert self._path is not None
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a", encoding="utf-8")
        values = ", ".join(f"{name} {value:.6g}" for name, value in _list_values(record))
        self._file.write(
            f"seed {record['seed']}, {record['stage']}, step {record['step']}: {values}\n"
        )
        self._file.flush()

    def close(self) -> None:
        if self._path is not None and self._file is not None:
            self._file.close()


class _TensorBoardLogger:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[Path, Any] = {}

    def __call__(self, record: dict[str, Any]) -> None:
        with add_install_command("tensorboard"):
            tensorboard = importlib.import_module("tensorboardX")
        folder = self._folder / f"seed{record['seed']}" / record["stage"]
        if folder not in self._writers:
            # By default the name is that of a second, and another writer would replace the file.
            suffix = f".{uuid.uuid4().hex[:8]}"
            self._writers[folder] = tensorboard.SummaryWriter(str(folder), filename_suffix=suffix)
        writer = self._writers[folder]
        for name, value in _list_values(record):
            writer.add_scalar(name, value, record["step"])
        # Evaluations are rare, and one that was killed shall show how far it has come.
        writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class _WandbLogger:
    def __init__(
        self, folder: Path, project: str, name: str | None, config: dict[str, Any] | None
    ) -> None:
        self._folder, self._project, self._name, self._config = folder, project, name, config
        self._run: Any = None
        self._prefixes: set[str] = set()

    def __call__(self, record: dict[str, Any]) -> None:
        if self._run is None:
            self._run = self._start()
            # Python calls what was registered last first, and W&B ends its service at the exit.
            atexit.register(self.close)
        prefix = f"seed{record['seed']}/{record['stage']}"
        if prefix not in self._prefixes:
            self._prefixes.add(prefix)
            # The steps of W&B count the records of all trainings.
            self._run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")
        values = {f"{prefix}/{name}": value for name, value in _list_values(record)}
        self._run.log({f"{prefix}/step": record["step"]} | values)

    def close(self) -> None:
        atexit.unregister(self.close)
        if self._run is not None:
            run, self._run = self._run, None
            run.finish()

    def _start(self) -> Any:
        """Starts or continues the run of W&B."""
        with add_install_command("wandb"):
            wandb = importlib.import_module("wandb")
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / _WANDB_ID
        if not path.exists():
            write_atomically(path, uuid.uuid4().hex[:8].encode())
        return wandb.init(
            dir=str(self._folder),
            project=self._project,
            name=self._name,
            config=self._config,
            id=path.read_text("utf-8").strip(),
            resume="allow",
            # The output of the program, with bars that move, is no part of the records.
            settings=wandb.Settings(console="off"),
        )


def _list_values(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields the numbers of a record, except for those that say whose they are."""
    for name, value in record.items():
        if isinstance(value, (int, float)) and name not in ("seed", "stage", "step"):
            yield name, value


def _read_logged_steps(path: Path) -> dict[tuple[Any, Any], int]:
    if not path.is_file():
        return {}
    try:
        return {
            (int(seed), str(stage)): int(step) for seed, stage, step in json.loads(path.read_text())
        }
    except (ValueError, TypeError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({first_line(error)}): delete it") from error


def _close_all(loggers: list[Logger]) -> None:
    """Closes loggers, and takes them from the list."""
    while loggers:
        logger = loggers.pop(0)
        try:
            _close(logger)
        except Exception as error:
            _warn(f"{_describe(error, logger)} when it was closed")


def _close(logger: Logger) -> None:
    close = getattr(logger, "close", None)
    if callable(close):
        close()


def _describe(error: Exception, logger: Logger) -> str:
    name = getattr(logger, "__qualname__", type(logger).__name__).strip("_")
    return f"logger {shorten(name, 60)} raised {type(error).__name__} ({first_line(error)})"


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
