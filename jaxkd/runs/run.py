"""The folder of a run: configuration, environment, metrics, results and checkpoints.

config.json     the configuration, a fingerprint of the data and the environment
metrics.jsonl   one record per evaluation during training
results.json    the rows of the table of results
checkpoints/    one folder per seed and stage
.lock           locked by the process that has the run open, which .lock-holder names
"""

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxkd._files import add_filename_to_errors, describe_differences, write_atomically
from jaxkd.runs._lock import HOLDER_FILE, LOCK_FILE, lock_folder
from jaxkd.runs.environment import describe_environment
from jaxkd.runs.errors import RunError
from jaxkd.runs.results import ResultRow

DEVICE_OPTIONS = ("parallel", "model_devices")
"""Options that divide the work among devices, on which rounding depends."""
IGNORED_OPTIONS = (
    "workdir",
    "data_dir",
    "save_every",
    "teacher_cache",
    "coordinator",
    "num_processes",
    "process_id",
    *DEVICE_OPTIONS,
)
"""Options that say where and how a run computes, not what. They may change when it continues."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The folder of a run, opened by `open_run` or `read_run`.

    Attributes:
        folder: The folder.
        config: The configuration, as JSON values.
        data: The fingerprint of the data.
        environment: What `describe_environment` returned when the run was started.
        lock: Keeps other processes out as long as it is alive. `None` without a lock.
    """

    folder: Path
    config: dict[str, Any]
    data: str
    environment: dict[str, Any]
    lock: object | None = dataclasses.field(default=None, repr=False, compare=False)

    def checkpoint_folder(self, seed: int, stage: str) -> Path:
        """Returns the folder of a stage's checkpoints for a seed."""
        return self.folder / "checkpoints" / f"seed{seed}" / stage

    def metrics(self) -> list[dict[str, Any]]:
        """Reads the records of `metrics.jsonl`.

        Returns:
            The records in the order in which they were written. A last line that a crash cut off is
            left out.

        Raises:
            RunError: If another line is damaged.
            OSError: If the file cannot be read.
        """
        path = self.folder / "metrics.jsonl"
        try:
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            # Each record ends with a line break, so a line without one was cut off.
            records = [json.loads(line) for line in lines if line.endswith("\n")]
            return [record for record in records if record.keys() >= {"seed", "stage", "step"}]
        except (ValueError, AttributeError) as error:
            raise RunError(
                f"{path} is damaged ({error}): restore it, or name another --workdir"
            ) from error

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Appends a record to `metrics.jsonl`. Only the primary process writes.

        Args:
            record: JSON values, with `seed`, `stage` and `step`.

        Raises:
            OSError: If the file cannot be written.
        """
        if not _is_primary():
            return
        path = self.folder / "metrics.jsonl"
        # The line break is written with its record. A crash then cuts off the last record at most,
        # which `metrics` leaves out.
        with add_filename_to_errors(path), open(path, "a") as file:
            file.write(json.dumps(record) + "\n")

    def rewind_metrics(self, seed: int, stage: str, step: int) -> None:
        """Removes a stage's records after the step from which its training resumes.

        Only the primary process writes.

        Args:
            seed: The seed of the records.
            stage: The stage of the records.
            step: The last step whose record is kept.

        Raises:
            RunError: If `metrics.jsonl` is damaged.
            OSError: If the file cannot be written.
        """
        if not _is_primary():
            return
        records = [
            record
            for record in self.metrics()
            if (record["seed"], record["stage"]) != (seed, stage) or record["step"] <= step
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        # Atomically, because a crash must not lose the records of other stages.
        write_atomically(self.folder / "metrics.jsonl", text.encode())

    def write_results(self, rows: Iterable[ResultRow]) -> None:
        """Writes the rows of the table of results. Only the primary process writes.

        Args:
            rows: The rows.

        Raises:
            ValueError: If a value is not finite.
            OSError: If the file cannot be written.
        """
        if not _is_primary():
            return
        content = _encode_json([row.to_json() for row in rows])
        write_atomically(self.folder / "results.json", content)

    def read_results(self) -> list[ResultRow]:
        """Reads the rows that `write_results` wrote.

        Raises:
            RunError: If the file is damaged.
            OSError: If the file cannot be read, such as when there is none yet.
        """
        path = self.folder / "results.json"
        try:
            return [ResultRow.from_json(row) for row in json.loads(path.read_text())]
        except (ValueError, TypeError) as error:
            raise RunError(
                f"{path} is damaged ({error}): restore it, or name another --workdir"
            ) from error


def open_run(
    folder: str | os.PathLike, config: Mapping[str, Any], *, arrays: Iterable[np.ndarray] = ()
) -> Run:
    """Starts a run in an empty or absent folder, or continues the run in a folder.

    This process locks the folder as long as the returned value is alive, and may open the run
    again. Another process is refused. The lock ends with the process, even if that is killed.

    In a program of several processes, only the primary one uses the folder. The other processes
    need not see it.

    Args:
        folder: The folder of the run.
        config: JSON values. A run continues only with the same values, `IGNORED_OPTIONS` excepted.
        arrays: The data. A run continues only with data of the same fingerprint.

    Returns:
        The run.

    Raises:
        RunError: If the folder contains something else, or a run with another configuration or
            other data, or if another process has the run open.
        OSError: If the folder cannot be created or written.
        ImportError: If filelock is missing.
    """
    folder = Path(folder)
    # A round trip through JSON, so that tuples compare equal to the lists of config.json.
    json_config = json.loads(_encode_json(dict(config)))
    data = fingerprint(arrays)
    if not _is_primary():
        return Run(folder, json_config, data, describe_environment())
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is not a folder: name another --workdir")
    if folder.exists() and not path.exists() and not all(map(_is_leftover, folder.iterdir())):
        raise RunError(f"{folder} is not empty and holds no run: name another --workdir")
    folder.mkdir(parents=True, exist_ok=True)
    # Before the lock, which fails with a less helpful message, and only later for a folder whose
    # files may be written.
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written: name another --workdir")
    lock = lock_folder(folder)
    if path.exists():
        before = read_run(folder)
        _check_continuation(before, json_config, data)
        # The environment remains that of the start, by which a report describes the run. The
        # configuration is the new one, which may differ in the ignored options.
        return dataclasses.replace(before, config=json_config, lock=lock)
    run = Run(folder, json_config, data, describe_environment(), lock)
    content = {"config": run.config, "data": run.data, "environment": run.environment}
    write_atomically(path, _encode_json(content))
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
        run = Run(Path(folder), content["config"], content["data"], content["environment"])
        if not isinstance(run.config, dict) or not isinstance(run.environment, dict):
            raise TypeError("config and environment must be objects")
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} is not the configuration of a run ({error}): "
            "restore it, or name another folder"
        ) from error
    return run


def fingerprint(arrays: Iterable[np.ndarray]) -> str:
    """Computes the SHA-256 of arrays on the host, their shapes and dtypes included.

    Args:
        arrays: The arrays, in an order that counts.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        # A view as bytes, because arrays of bfloat16 do not have the buffer interface.
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _is_primary() -> bool:
    return jax.process_index() == 0


def _is_leftover(path: Path) -> bool:
    """True if a process that was killed before it wrote the configuration may leave this file."""
    return path.name in (LOCK_FILE, HOLDER_FILE) or path.name.startswith(".config.json")


def _check_continuation(before: Run, config: Mapping[str, Any], data: str) -> None:
    """Refuses another configuration or other data, and warns of another environment."""
    differences = describe_differences(before.config, config, ignore=IGNORED_OPTIONS)
    if differences:
        raise RunError(
            f"{before.folder} holds a run with another configuration ({differences}): "
            "name another --workdir"
        )
    if before.data != data:
        raise RunError(
            f"{before.folder} holds a run on other data with the same name: name another --workdir"
        )
    changes = describe_differences(
        before.environment | _select_device_options(before.config),
        describe_environment() | _select_device_options(config),
    )
    if changes:
        warnings.warn(
            f"{before.folder} was started in another environment, so bits may differ ({changes})",
            stacklevel=3,
        )


def _select_device_options(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in DEVICE_OPTIONS if name in config}


def _encode_json(value: Any) -> bytes:
    # JSON has no NaN, and readers other than Python's would reject the whole file.
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
