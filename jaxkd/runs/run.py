"""The folder of a run: configuration, environment, metrics, results and checkpoints.

config.json     the configuration, a fingerprint of the data, the environment, and earlier ones
metrics.jsonl   one record per evaluation during training
results.json    the rows of the table of results
report.json     title, comparisons and remarks of the report, which has files of its own
checkpoints/    one folder per seed and stage; those whose names begin with a dot hold trainings of
                earlier configurations
logged.json     the last step of each training whose records loggers had before it was resumed
.lock           locked by the process that has the run open, which .lock-holder names
"""

import dataclasses
import errno
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxkd._files import (
    add_filename_to_errors,
    describe_differences,
    is_temporary,
    write_atomically,
)
from jaxkd._messages import first_line, shorten
from jaxkd.runs._lock import HOLDER_FILE, LOCK_FILE, identify_lock, lock_folder
from jaxkd.runs._records import read_records
from jaxkd.runs.environment import describe_environment
from jaxkd.runs.errors import RunError, check_folder_name
from jaxkd.runs.loggers import Logger, RunLoggers, check_loggers
from jaxkd.runs.results import ResultRow

DEVICE_OPTIONS = ("parallel", "model_devices", "max_students")
"""Options that divide the work among devices and programs, on which rounding depends."""
IGNORED_OPTIONS = (
    "workdir",
    "data_dir",
    "save_every",
    "log",
    "teacher_cache",
    "coordinator",
    "num_processes",
    "process_id",
    *DEVICE_OPTIONS,
)
"""Options that say where and how a run computes, not what. They may change when it continues."""
UNTRAINED_OPTIONS = (*IGNORED_OPTIONS, "num_seeds")
"""Options on which no training depends."""
FIXED_OPTIONS = ("experiment", "command")
"""Names in a configuration of the program whose run it is, which never change."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The folder of a run, opened by `open_run` or `read_run`.

    Attributes:
        folder: The folder.
        config: The configuration, as JSON values.
        data: The fingerprint of the data.
        environment: What `describe_environment` returned when the run was started, or when its
            configuration changed last.
        lock: Keeps other processes out as long as it is alive. `None` without a lock.
        lock_id: Device and inode of the lock's file, by which `check_folder` notices that the
            folder was deleted. `None` for a run that `read_run` opened.
        grow: Whether trainings of another configuration may be replaced, see `open_run`.
        history: The earlier configurations, oldest first, each as `config` and `environment`.
        is_growing: Whether the configuration, or what `run_plan` trained, has changed since
            `write_results`.
        loggers: What gets the records of `append_metrics`, on the primary process alone.
    """

    folder: Path
    config: dict[str, Any]
    data: str
    environment: dict[str, Any]
    lock: object | None = dataclasses.field(default=None, repr=False, compare=False)
    lock_id: tuple[int, int] | None = dataclasses.field(default=None, repr=False, compare=False)
    grow: bool = dataclasses.field(default=False, compare=False)
    history: tuple[dict[str, Any], ...] = ()
    is_growing: bool = dataclasses.field(default=False, compare=False)
    loggers: RunLoggers = dataclasses.field(default_factory=RunLoggers, repr=False, compare=False)

    def check_folder(self) -> None:
        """Checks that the folder is still the one that `open_run` locked.

        Raises:
            RunError: If it was deleted, even if another run has started there since.
        """
        if self.lock_id is not None and identify_lock(self.folder) != self.lock_id:
            raise RunError(
                f"{self.folder} was deleted, or its {LOCK_FILE}, while this run used it: start the "
                "run again, in another folder if another run has started there"
            )

    def describe_changes(self, config: Mapping[str, Any]) -> str:
        """Describes the options in which a configuration differs, except for `IGNORED_OPTIONS`.

        Args:
            config: The other configuration, as JSON values.

        Returns:
            One line, or an empty string if nothing differs.
        """
        return describe_differences(self.config, config, ignore=IGNORED_OPTIONS)

    def write_config(self, *, is_growing: bool) -> None:
        """Writes `config.json`. Only the primary process writes.

        Args:
            is_growing: See `Run`.

        Raises:
            RunError: If the folder was deleted in the meantime.
            OSError: If the file cannot be written.
        """
        if not _is_primary():
            return
        self.check_folder()
        content: dict[str, Any] = {
            "config": self.config,
            "data": self.data,
            "environment": self.environment,
        }
        # Left out of a run that has not grown, whose file then never changes.
        if self.history:
            content["history"] = list(self.history)
        if is_growing:
            content["is_growing"] = True
        write_atomically(self.folder / "config.json", _encode_json(content))

    def checkpoint_folder(self, seed: int, stage: str) -> Path:
        """Returns the folder of a stage's checkpoints for a seed."""
        return self.folder / "checkpoints" / f"seed{seed}" / stage

    def metrics(self) -> list[dict[str, Any]]:
        """Reads the records of `metrics.jsonl`.

        Returns:
            The records in the order in which they were written. A last line that a crash cut off is
            left out.

        Raises:
            RunError: If another line is damaged. The message names it.
            OSError: If the file cannot be read.
        """
        return read_records(self.folder / "metrics.jsonl")

    def append_metrics(self, record: Mapping[str, Any], *, log: bool = True) -> None:
        """Appends a record to `metrics.jsonl` and passes it to the loggers.

        Only the primary process does so.

        Args:
            record: JSON values, with `seed`, `stage` and `step`.
            log: Whether the loggers get it, if they have not had it yet.

        Raises:
            RunError: If the folder was deleted in the meantime.
            OSError: If the file cannot be written, or is a symbolic link.
        """
        if not _is_primary():
            return
        self.check_folder()
        path = self.folder / "metrics.jsonl"
        # The line break is written with its record. A crash then cuts off the last record at most,
        # which `metrics` leaves out.
        with add_filename_to_errors(path), open(path, "a", opener=_open_unlinked) as file:
            file.write(json.dumps(record) + "\n")
        if log:
            self.loggers.log(record)

    def close_loggers(self) -> None:
        """Closes the loggers. They get no more records, and the run can be used without them.

        Without this call they are closed when the run is deleted or the process ends.
        """
        self.loggers.close()

    def rewind_metrics(self, seed: int, stage: str, step: int, *, repeat: bool = True) -> None:
        """Removes a stage's records after the step from which its training resumes.

        Only the primary process writes.

        Args:
            seed: The seed of the records.
            stage: The stage of the records.
            step: The last step whose record is kept.
            repeat: Whether the training will repeat the removed records, which the loggers then do
                not get again.

        Raises:
            RunError: If `metrics.jsonl` is damaged, or the folder was deleted in the meantime.
            OSError: If the file cannot be written.
        """
        if not _is_primary():
            return
        self.check_folder()
        records, removed = [], []
        for record in self.metrics():
            is_later = (record["seed"], record["stage"]) == (seed, stage) and record["step"] > step
            (removed if is_later else records).append(record)
        # First, because a crash in between must not let the loggers have a record again.
        if repeat:
            self.loggers.expect_again(removed)
        else:
            self.loggers.forget(seed, stage)
        text = "".join(json.dumps(record) + "\n" for record in records)
        # Atomically, because a crash must not lose the records of other stages.
        write_atomically(self.folder / "metrics.jsonl", text.encode())

    def write_results(self, rows: Iterable[ResultRow]) -> None:
        """Writes the rows of the table of results. Only the primary process writes.

        Args:
            rows: The rows.

        Raises:
            ValueError: If a value is not finite.
            RunError: If the folder was deleted in the meantime.
            OSError: If the file cannot be written.
        """
        if not _is_primary():
            return
        self.check_folder()
        content = _encode_json([row.to_json() for row in rows])
        write_atomically(self.folder / "results.json", content)
        recorded = read_run(self.folder)
        if recorded.is_growing or recorded.describe_changes(self.config):
            self.write_config(is_growing=False)

    def read_results(self) -> list[ResultRow]:
        """Reads the rows that `write_results` wrote.

        Raises:
            RunError: If the file is damaged.
            OSError: If the file cannot be read, such as when there is none yet.
        """
        path = self.folder / "results.json"
        # Reading a pipe or a device may never end.
        if path.exists() and not path.is_file():
            raise RunError(
                f"{path} is not a regular file: restore it, or name another folder (--workdir)"
            )
        try:
            return [ResultRow.from_json(row) for row in json.loads(path.read_text())]
        except (ValueError, TypeError, RecursionError) as error:
            raise RunError(
                f"{path} is damaged ({first_line(error)}): restore it, or name another folder "
                "(--workdir)"
            ) from error


def checkpoint_identity(seed: int, stage: str) -> dict[str, Any]:
    """Returns the identity with which the checkpoints of a stage are saved for a seed."""
    return {"seed": seed, "stage": stage}


def open_run(
    folder: str | os.PathLike,
    config: Mapping[str, Any],
    *,
    arrays: Iterable[np.ndarray] | Mapping[str, np.ndarray] = (),
    grow: bool = False,
    loggers: Iterable[Logger] = (),
) -> Run:
    """Starts a run in an empty or absent folder, or continues the run in a folder.

    This process locks the folder as long as the returned value is alive, and may open the run
    again. Another process is refused. The lock ends with the process, even if that is killed. If
    the folder is deleted while it is in use, the next write raises a `RunError`.

    In a program of several processes, all call this function, but only the primary one uses the
    folder. The others need not see it, and raise an error if the primary one does.

    Args:
        folder: The folder of the run.
        config: JSON values, numbers of NumPy and paths. Unless `grow`, a run continues only with
            the same values, `IGNORED_OPTIONS` excepted.
        arrays: The data: arrays, or a dict of them. A run continues only with data of the same
            fingerprint.
        grow: Lets the run continue with another configuration, and lets `run_plan` train again the
            stages that have changed, which it otherwise refuses. Only `run_plan` finds out what
            has changed, so leave it out for a loop of your own. The values "experiment" and
            "command" of `config` never change.
        loggers: Callables such as those of `line_logger`, `tensorboard_logger` and `wandb_logger`.
            On the primary process, each gets every record, a dict, in the order of `metrics.jsonl`
            and after it was written there. A training that resumes at a checkpoint repeats the
            records after it, which `metrics.jsonl` loses in between; a logger does not get them
            again. It gets none of those that were written before it was added. One that raises an
            exception is dropped with a warning. A method `close`, if there is one, is called at the
            end: see `Run.close_loggers`.

    Returns:
        The run.

    Raises:
        TypeError: If `config` is no dict or holds another value, `arrays` holds no arrays, or
            `loggers` no callables.
        ValueError: If a number in `config` is NaN or infinite.
        RunError: If the folder contains something else, or a run with another configuration or
            other data, if another process has the run open, or if the folder's name is not UTF-8.
        OSError: If the folder cannot be created or written.
        ImportError: If filelock is missing.
    """
    folder = check_folder_name(folder)
    loggers = check_loggers(loggers)
    # A round trip through JSON, so that tuples compare equal to the lists of config.json.
    json_config = json.loads(_encode_json(_check_config(config)))
    data = fingerprint(arrays.values() if isinstance(arrays, Mapping) else arrays)
    if not _is_primary():
        if _has_primary_failed(False):
            raise RunError(f"the primary process cannot use {folder}: its message tells why")
        return Run(folder, json_config, data, describe_environment(), grow=grow)
    try:
        run = _open_as_primary(folder, json_config, data, grow)
        run = dataclasses.replace(run, loggers=RunLoggers(loggers, run.folder / "logged.json"))
    except BaseException:
        _has_primary_failed(True)
        raise
    _has_primary_failed(False)
    return run


def _open_as_primary(folder: Path, json_config: dict[str, Any], data: str, grow: bool) -> Run:
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is not a folder: name another folder (--workdir)")
    if folder.exists() and not path.exists() and not all(map(is_leftover, folder.iterdir())):
        raise RunError(f"{folder} is not empty and holds no run: name another folder (--workdir)")
    folder.mkdir(parents=True, exist_ok=True)
    # Before the lock, which fails with a less helpful message, and only later for a folder whose
    # files may be written.
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written: name another folder (--workdir)")
    lock = lock_folder(folder)
    lock_id = identify_lock(folder)
    # Only now that no other process writes them.
    _delete_temporary_files(folder)
    if path.exists():
        before = read_run(folder)
        _check_continuation(before, json_config, data, grow=grow)
        # The environment remains that of the start, by which a report describes the run. The
        # configuration is the new one, which may differ in the ignored options.
        run = dataclasses.replace(before, config=json_config, lock=lock, lock_id=lock_id, grow=grow)
        if not before.describe_changes(json_config):
            return run
        earlier = {"config": before.config, "environment": before.environment}
        history = (*before.history, earlier)
        return dataclasses.replace(
            run, environment=describe_environment(), history=history, is_growing=True
        )
    run = Run(folder, json_config, data, describe_environment(), lock, lock_id, grow)
    run.write_config(is_growing=False)
    return run


def read_run(folder: str | os.PathLike) -> Run:
    """Opens a run for reading. It takes no lock and writes nothing.

    Args:
        folder: The folder of the run.

    Returns:
        The run.

    Raises:
        RunError: If the folder contains no run, or the configuration is damaged.
        OSError: If the configuration cannot be read.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise RunError(f"{folder} holds no run: there is no config.json in it")
    try:
        content = json.loads(path.read_text())
        run = Run(
            Path(folder),
            content["config"],
            content["data"],
            content["environment"],
            history=tuple(content.get("history", ())),
            is_growing=bool(content.get("is_growing")),
        )
        if not all(isinstance(value, dict) for value in _list_settings(run)):
            raise TypeError("config and environment must be objects")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(
            f"{path} is not the configuration of a run ({first_line(error)}): "
            "restore it, or name another folder"
        ) from error
    return run


def _list_settings(run: Run) -> list[Any]:
    """Returns the configurations and environments of a run and of its history."""
    settings = [run.config, run.environment]
    for earlier in run.history:
        settings += [earlier["config"], earlier["environment"]]
    return settings


def fingerprint(arrays: Iterable[np.ndarray]) -> str:
    """Computes the SHA-256 of arrays on the host, their shapes and dtypes included.

    Args:
        arrays: The arrays, in an order that counts.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: If an array is something else.
    """
    digest = hashlib.sha256()
    for array in arrays:
        if not hasattr(array, "dtype"):
            raise TypeError(
                f"expected arrays, got {shorten(repr(array), 80)}: pass np.asarray(...) of each"
            )
        digest.update(f"{array.dtype}{array.shape}".encode())
        # A view as bytes, because arrays of bfloat16 do not have the buffer interface.
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration of JSON values; raises an error that names another value."""
    if not isinstance(config, Mapping):
        raise TypeError(
            f"config must be a dict, got a {type(config).__name__}: pass vars(config), or "
            "dataclasses.asdict(config) of a dataclass"
        )
    return {str(name): _to_json(value, str(name)) for name, value in config.items()}


def _to_json(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _to_json(part, f"{name}.{key}") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(part, f"{name}[{i}]") for i, part in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    # A number of NumPy or JAX.
    if not np.ndim(value) and isinstance(value, (np.generic, np.ndarray, jax.Array)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"config {shorten(name, 60)!r} is {value}, which JSON cannot hold")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"config {shorten(name, 60)!r} is a {type(value).__name__}, which JSON cannot hold: pass "
        "numbers, text, lists and dicts"
    )


def _is_primary() -> bool:
    return jax.process_index() == 0


def _has_primary_failed(failed: bool) -> bool:
    """Tells the other processes, which would wait for the primary one in the first step."""
    if jax.process_count() == 1:
        return failed
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.int32(failed)))


def is_leftover(path: Path) -> bool:
    """True if a process that was killed before it wrote the configuration may leave this file."""
    if path.name in (LOCK_FILE, HOLDER_FILE) or path.name.startswith(".config.json"):
        return True
    return is_temporary(path.name)


def _delete_temporary_files(folder: Path) -> None:
    """Deletes what killed processes left of files that they were writing."""
    for path in folder.iterdir():
        if is_temporary(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)


def _open_unlinked(path: str, flags: int) -> int:
    """Opens a file unless it is a symbolic link, which may lead to a file of somebody else."""
    if os.path.islink(path):
        # Windows has no flag for it.
        raise OSError(errno.ELOOP, "is a symbolic link, remove it", path)
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _check_continuation(before: Run, config: Mapping[str, Any], data: str, *, grow: bool) -> None:
    """Refuses another configuration or other data, and warns of another environment."""
    if grow:
        programs = [
            {name: values.get(name) for name in FIXED_OPTIONS} for values in (before.config, config)
        ]
        differences, remedy = describe_differences(*programs), ""
    else:
        differences = before.describe_changes(config)
        remedy = ", or open it with grow=True for run_plan"
    if differences:
        raise RunError(
            f"{before.folder} holds a run with another configuration ({differences}): "
            f"name another folder (--workdir){remedy}"
        )
    if before.data != data:
        raise RunError(
            f"{before.folder} holds a run on other data with the same name: name another folder "
            "(--workdir)"
        )
    changes = describe_differences(
        before.environment | _select_device_options(before.config),
        describe_environment() | _select_device_options(config),
    )
    if changes:
        warnings.warn(
            f"{before.folder} was started in another environment, so bits may differ "
            f"({shorten(changes, 150)})",
            stacklevel=4,
        )


def _select_device_options(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in DEVICE_OPTIONS if name in config}


def _encode_json(value: Any) -> bytes:
    # JSON has no NaN, and readers other than Python's would reject the whole file.
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
