"""The files of results: one for each device and measurement, written as the measurement ends."""

import hashlib
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks.accelerator.device import find_device
from experiments.benchmarks.accelerator.measurement import Context, Measurement
from experiments.benchmarks.accelerator.process import ROOT
from jaxkd import runs
from jaxkd._files import write_atomically


def source_version() -> str:
    """Returns digits that stand for the source of jaxkd."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "jaxkd").rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def identify(measurement: Measurement, source: str) -> dict[str, Any]:
    """Returns the part of a file of results that says what was measured."""
    # A round trip, so that tuples compare equal to the lists of a file.
    options = json.loads(json.dumps(measurement.options._asdict()))
    return {"name": measurement.name, "options": options, "source": source}


def digest_identity(identity: dict[str, Any]) -> str:
    """Returns digits that stand for what is measured."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def read(path: Path) -> dict[str, Any] | None:
    """Reads a file of results; `None` if it is missing or damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def find_finished(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the content of a file of results if it is of the same measurement."""
    content = read(path)
    is_same = content is not None and identity.items() <= content.items()
    return content if is_same else None


def measure_and_save(
    measurement: Measurement, context: Context, identity: dict[str, Any], is_tiny: bool
) -> None:
    """Runs a measurement in this process and writes its file of results."""
    if measurement.deterministic:
        runs.enable_determinism()
    start = time.monotonic()
    outcome = measurement.measure(measurement.options, context)
    seconds = time.monotonic() - start
    device = find_device()
    environment = runs.describe_environment()
    content = {
        **identity,
        "tiny": is_tiny,
        "device": device.kind,
        "device_count": device.count,
        "environment": environment,
        "torch": _torch_version(),
        "matmul_precision": environment["matmul_precision"] or "default",
        "seconds": round(seconds, 1),
        "n": outcome.n,
        "summary": outcome.summary,
        "results": outcome.results,
    }
    path = context.folder / f"{measurement.name}.json"
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def _torch_version() -> str | None:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
