"""A run's directory: what was asked for, on what it ran, what was measured, and what to resume from.

config.json     the configuration, a fingerprint of the data, versions and device
metrics.jsonl   one record an evaluation during training
results.json    the table's rows
checkpoints/    one folder a seed and stage
.lock           held by the process that has the run open
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import warnings
import weakref
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxkd.checkpoints import write_atomically
from jaxkd.checkpoints.store import naming

try:
    import fcntl
except ImportError:  # there is none on Windows
    fcntl = None

DIVISION = ("parallel", "model_devices")
"""Options that say how the work is divided over devices, on which rounding depends."""
INCIDENTAL = (
    *("workdir", "data_dir", "save_every", "teacher_cache"),
    *("coordinator", "num_hosts", "host", *DIVISION),
)
"""Options that say where a run takes place, not what it computes; they may differ between it and its continuation."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "jaxkd-distill")
ACCELERATORS = (
    *("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
    *("nvidia-cublas-cu12", "nvidia-cudnn-cu12", "nvidia-cublas", "nvidia-cudnn-cu13"),
)
"""Packages that are recorded where they are installed."""

DETERMINISTIC = ("--xla_gpu_exclude_nondeterministic_ops=true", "--xla_gpu_autotune_level=0")
"""XLA's flags under which a GPU computes the same bits at every run: no atomics, no choice of kernels by their time."""


class RunError(ValueError):
    """A run that cannot be started or continued as asked."""


@dataclasses.dataclass(frozen=True)
class Run:
    """An opened run directory.

    Attributes:
        folder: Where it lies.
        config: The configuration, as JSON values.
        data: A fingerprint of the data.
        environment: Versions, device and commit that it was started with.
        lock: Keeps other processes away for as long as this is alive.
    """

    folder: Path
    config: dict
    data: str
    environment: dict
    lock: object = dataclasses.field(default=None, repr=False, compare=False)

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
        """Adds a record with `seed`, `stage` and `step`; of several hosts the first writes it."""
        if jax.process_index():
            return
        path = self.folder / "metrics.jsonl"
        with naming(path), open(path, "a") as file:
            file.write(json.dumps(record) + "\n")

    def rewind_metrics(self, seed: int, stage: str, step: int) -> None:
        """Drops a stage's records after a step, from which its training goes on."""
        if jax.process_index():
            return
        kept = [r for r in self.metrics() if (r["seed"], r["stage"]) != (seed, stage) or r["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(self.folder / "metrics.jsonl", text.encode())

    def write_results(self, rows: Iterable[Mapping]) -> None:
        """Writes the table's rows; of several hosts the first does."""
        if jax.process_index():
            return
        write_atomically(self.folder / "results.json", _json(list(rows)))


def open_run(folder: str | os.PathLike, config: Mapping[str, Any], *, arrays: Iterable[np.ndarray] = ()) -> Run:
    """Starts a run in an empty or absent folder, or continues the one that is there.

    Of several hosts the first alone touches the folder, which the others need not see. The run is this process's for
    as long as the value is alive; this process may open it again. Another process is refused. However this one ends,
    the lock ends with it.

    Args:
        folder: The run's directory.
        config: JSON values. A run is continued only under the same ones, `INCIDENTAL` apart.
        arrays: The data, of which a fingerprint is kept: a run is continued only on the same.

    Returns:
        The run.

    Raises:
        RunError: If the folder holds something else, or a run of another configuration or other data, or if another
            process has the run open.
        OSError: If the folder cannot be made or written.
    """
    folder = Path(folder)
    wanted = {"config": json.loads(_json(dict(config))), "data": fingerprint(arrays)}
    if jax.process_index():
        return Run(folder, **wanted, environment=environment())
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is not a folder: name another --workdir")
    if not path.exists() and folder.exists() and not all(_is_ours(one) for one in folder.iterdir()):
        raise RunError(f"{folder} is not empty and holds no run: name another --workdir")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written: name another --workdir")
    lock = _lock(folder)
    if path.exists():
        return _continue(read_run(folder), wanted, lock)
    now = environment()
    write_atomically(path, _json(wanted | {"environment": now}))
    return Run(folder, **wanted, environment=now, lock=lock)


def read_run(folder: str | os.PathLike) -> Run:
    """Reads a run of which no more is wanted than what it left: no lock is taken and nothing is written.

    Args:
        folder: The run's directory.

    Returns:
        The run.

    Raises:
        RunError: If there is none, or its configuration is damaged.
        OSError: If it cannot be read.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise RunError(f"{folder} holds no run: there is no config.json in it")
    try:
        found = json.loads(path.read_text())
        run = Run(Path(folder), found["config"], found["data"], found["environment"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is no run's configuration ({error}): restore it, or name another folder") from error
    if not isinstance(run.config, dict) or not isinstance(run.environment, dict):
        raise RunError(f"{path} is no run's configuration: restore it, or name another folder")
    return run


def tell_differing(there: Mapping, here: Mapping, *, but: Container[str] = ()) -> str:
    """Says in which values two mappings differ, such as two configurations or environments.

    Args:
        there: Values by name.
        here: Likewise; a name that is missing on one side counts as `None`.
        but: Names that may differ.

    Returns:
        One line, or none at all.

    Example:
        >>> tell_differing({"jax": "0.10.2", "cores": 2}, {"jax": "0.12.0", "cores": 2})
        "jax '0.10.2' there and '0.12.0' here"
    """
    names = [name for name in sorted(there.keys() | here.keys()) if name not in but]
    unlike = [name for name in names if there.get(name) != here.get(name)]
    return "; ".join(f"{name} {there.get(name)!r} there and {here.get(name)!r} here" for name in unlike)


def make_deterministic() -> None:
    """Has XLA compute the same bits at every run on a GPU, by the flags in `DETERMINISTIC`.

    To be called before the first JAX array is made, as XLA reads its flags but once. CPUs need none, and for TPUs there
    are none. It costs speed, and a program with an operation that has no such form (select-and-scatter, the gradient of
    `reduce_window` as a max-pool) does not compile.

    Raises:
        RunError: If JAX has started already and the flags were not set.

    References:
        XLA, Determinism (GPU), https://openxla.org/xla/determinism
    """
    from jax._src import xla_bridge  # JAX has no public way to ask this without starting

    present = os.environ.get("XLA_FLAGS", "").split()
    missing = [flag for flag in DETERMINISTIC if flag not in present]
    if missing and xla_bridge.backends_are_initialized():
        raise RunError(f"JAX has started already: set XLA_FLAGS='{' '.join(DETERMINISTIC)}' in the environment instead")
    os.environ["XLA_FLAGS"] = " ".join([*present, *missing])


def environment() -> dict:
    """What a run's bits depend on besides its configuration: versions, device, flags and commit."""
    device = jax.devices()[0]
    flags: Any = jax.config
    versions = {name: _version(name) for name in (*PACKAGES, *ACCELERATORS)}
    return {
        "python": platform.python_version(),
        **{name: version for name, version in versions.items() if version or name in PACKAGES},
        "platform": device.platform,
        "platform_version": " ".join(device.client.platform_version.split()),
        "device": device.device_kind if device.platform != "cpu" else platform.machine(),
        "device_count": jax.device_count(),
        **_processor(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "libtpu_init_args": os.environ.get("LIBTPU_INIT_ARGS", ""),
        "x64": flags.jax_enable_x64,
        "prng": flags.jax_default_prng_impl,
        "prng_partitionable": flags.jax_threefry_partitionable,
        "prng_seed_offset": flags.jax_random_seed_offset,
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


def _is_ours(path: Path) -> bool:
    """Whether this is what a process leaves that is killed before it has written a configuration."""
    return path.name == ".lock" or path.name.startswith(".config.json")


def _continue(before: Run, wanted: dict, lock: object) -> Run:
    folder = before.folder
    if differing := tell_differing(before.config, wanted["config"], but=INCIDENTAL):
        raise RunError(f"{folder} holds another configuration's run ({differing}): name another --workdir")
    if before.data != wanted["data"]:
        raise RunError(f"{folder} holds a run on other data, though of the same name: name another --workdir")
    before_and_now = ((before.environment, before.config), (environment(), wanted["config"]))
    told = [where | {name: config[name] for name in DIVISION if name in config} for where, config in before_and_now]
    if changed := tell_differing(*told):
        warnings.warn(f"{folder} was started elsewhere, so that bits may differ ({changed})", stacklevel=3)
    return dataclasses.replace(before, config=wanted["config"], lock=lock)


class _Lock:
    """An open file, locked until it is closed: at the latest by the system, at the process's end."""

    def __init__(self, file: int):
        self.file = file

    def release(self) -> None:
        file, self.file = self.file, -1
        if file >= 0:
            os.close(file)

    __del__ = release


_locks: weakref.WeakValueDictionary[tuple[int, int], _Lock] = weakref.WeakValueDictionary()


def _lock(folder: Path) -> _Lock:
    """This process's lock on a run's folder, a new one if it has none yet."""
    path = folder / ".lock"
    lock = _Lock(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
    status = os.fstat(lock.file)
    which = status.st_dev, status.st_ino
    if which in _locks:
        return _locks[which]
    _claim(lock.file, folder)
    _locks[which] = lock
    return lock


def _claim(file: int, folder: Path) -> None:
    try:
        if fcntl is None:
            raise OSError("this system has no file locks that end with their process")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(file, 1000, 0).decode(errors="replace") or "another process"
        raise RunError(f"{folder} is in use by {holder}: wait for its end, or name another --workdir") from error
    except OSError as error:
        warnings.warn(f"{folder} cannot be locked ({error}): see that no other process uses it", stacklevel=4)
    else:
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {platform.node()}".encode(), 0)


def _release_all() -> None:
    for lock in list(_locks.values()):
        lock.release()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    # A forked child that outlives this process would hold its locks on.
    os.register_at_fork(after_in_child=_release_all)


def _processor() -> dict:
    """What XLA compiles for on a CPU: its model, its vector extensions, and as many threads as may be used."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:  # which Linux alone has
        lines = []
    told = {name.strip(): value.strip() for name, _, value in lines}
    extensions = (told.get("flags") or told.get("Features") or "").split()
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return {
        "processor": told.get("model name") or platform.processor(),
        "vectors": " ".join(
            sorted(name for name in extensions if name.startswith(("avx", "amx", "fma", "asimd", "sve")))
        ),
        "cores": len(usable),
    }


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
