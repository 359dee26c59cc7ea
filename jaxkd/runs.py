"""A run's directory: what was asked for, on what it ran, what was measured, and what to resume from.

config.json     the configuration, a fingerprint of the data, versions and device
metrics.jsonl   one record an evaluation during training
results.json    the table's rows
checkpoints/    one folder a seed and stage
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import warnings
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxkd.checkpoints import write_atomically

INCIDENTAL = ("workdir", "data_dir", "save_every")
"""Options that move no bit of a result; they may differ between a run and its continuation."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "jaxkd-distill")


class RunError(ValueError):
    """A run that cannot be started or continued as asked."""


@dataclasses.dataclass(frozen=True)
class Run:
    """An opened run directory.

    Attributes:
        folder: Where it lies.
        config: The configuration, as JSON values.
        environment: Versions, device and commit that it was started with.
    """

    folder: Path
    config: dict
    environment: dict

    def checkpoints(self, seed: int, stage: str) -> Path:
        """The folder of a stage's checkpoints."""
        return self.folder / "checkpoints" / f"seed{seed}" / stage

    def metrics(self) -> list[dict]:
        """The records so far; a last line that was cut off by a crash does not count.

        Raises:
            RunError: If another line is damaged.
        """
        path = self.folder / "metrics.jsonl"
        try:
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            records = [json.loads(line) for line in lines if line.endswith("\n")]
            return [record for record in records if record.keys() >= {"seed", "stage", "step"}]
        except (ValueError, AttributeError) as error:
            raise RunError(f"{path} is damaged ({error}): restore it, or name another --workdir") from error

    def append_metrics(self, record: dict) -> None:
        """Adds a record with `seed`, `stage` and `step`."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    def rewind_metrics(self, seed: int, stage: str, step: int) -> None:
        """Drops a stage's records after a step, from which its training goes on."""
        kept = [r for r in self.metrics() if (r["seed"], r["stage"]) != (seed, stage) or r["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(self.folder / "metrics.jsonl", text.encode())

    def write_results(self, rows: Iterable[Mapping]) -> None:
        """Writes the table's rows."""
        write_atomically(self.folder / "results.json", _json(list(rows)))


def open_run(folder: str | os.PathLike, config: Mapping[str, Any], *, arrays: Iterable[np.ndarray] = ()) -> Run:
    """Starts a run in an empty or absent folder, or continues the one that is there.

    Args:
        folder: The run's directory.
        config: JSON values. A run is continued only under the same ones, `INCIDENTAL` apart.
        arrays: The data, of which a fingerprint is kept: a run is continued only on the same.

    Returns:
        The run.

    Raises:
        RunError: If the folder holds something else, or a run of another configuration or other data.
        OSError: If the folder cannot be made or written.
    """
    folder = Path(folder)
    wanted = {"config": json.loads(_json(dict(config))), "data": fingerprint(arrays)}
    path = folder / "config.json"
    if path.exists():
        return _continue(folder, wanted, path)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is not a folder: name another --workdir")
    if folder.exists() and any(not path.name.startswith(".config.json") for path in folder.iterdir()):
        raise RunError(f"{folder} is not empty and holds no run: name another --workdir")
    folder.mkdir(parents=True, exist_ok=True)
    now = environment()
    write_atomically(path, _json(wanted | {"environment": now}))
    return Run(folder, wanted["config"], now)


def _continue(folder: Path, wanted: dict, path: Path) -> Run:
    before, data, started_with = _read_config(path)
    config = wanted["config"]
    differing = _differing(before, config, but=INCIDENTAL)
    if differing:
        raise RunError(f"{folder} holds another configuration's run ({differing}): name another --workdir")
    if data != wanted["data"]:
        raise RunError(f"{folder} holds a run on other data, though of the same name: name another --workdir")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written: name another --workdir")
    if changed := _differing(started_with, environment()):
        warnings.warn(f"{folder} was started elsewhere, so that bits may differ ({changed})", stacklevel=3)
    return Run(folder, config, started_with)


def _read_config(path: Path) -> tuple[dict, str, dict]:
    try:
        found = json.loads(path.read_text())
        config, data, environment = found["config"], found["data"], found["environment"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is no run's configuration ({error}): name another --workdir") from error
    if not isinstance(config, dict) or not isinstance(environment, dict):
        raise RunError(f"{path} is no run's configuration: name another --workdir")
    return config, data, environment


def _differing(there: Mapping, here: Mapping, *, but: Container[str] = ()) -> str:
    names = [name for name in sorted(there.keys() | here.keys()) if name not in but]
    unlike = [name for name in names if there.get(name) != here.get(name)]
    return "; ".join(f"{name} {there.get(name)!r} there and {here.get(name)!r} here" for name in unlike)


def environment() -> dict:
    """What a run's bits depend on besides its configuration: versions, device, flags and commit."""
    device = jax.devices()[0]
    flags: Any = jax.config
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": device.platform,
        "device": device.device_kind if device.platform != "cpu" else platform.machine(),
        "device_count": jax.device_count(),
        "cores": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "x64": flags.jax_enable_x64,
        "prng": flags.jax_default_prng_impl,
        "matmul_precision": flags.jax_default_matmul_precision,
        "commit": _commit(),
    }


def fingerprint(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 of arrays on the host, their shapes and dtypes included."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)  # bfloat16 has no buffer of its own
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The source's commit, with `+` behind it where the source differs from it; none of another project's."""
    source = Path(__file__).resolve().parent
    try:
        if Path(_git(source, "rev-parse", "--show-toplevel")).resolve() != source.parent:
            return None
        return _git(source, "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
