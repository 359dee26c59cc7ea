"""What a measurement is: a function of a few options, which runs in a process of its own."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks.accelerator import process
from jaxkd._files import write_atomically

START_SECONDS = 120.0
"""Least time limit: a process has to start and to compile, whatever it measures."""


class Outcome(NamedTuple):
    """What a measurement found.

    Attributes:
        summary: Its key figures in one line.
        n: Number of repetitions behind each number: rounds, seeds or runs.
        results: JSON values.
    """

    summary: str
    n: int
    results: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Context:
    """What a measurement may use besides its options.

    Attributes:
        folder: Folder of the device's results, where a measurement may read those before it.
        scratch: Folder for what the measurement keeps between calls. It is empty for new options
            and for another source of jaxkd.
        shared: Folder for what measurements with the same source of jaxkd share.
        pack: Folder that `experiments.benchmarks.accelerator.pack` made, if the user gave one.
        log: File for the standard error of further processes.
    """

    folder: Path
    scratch: Path
    shared: Path
    pack: Path | None
    log: Path

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Returns the JSON values of a part that an earlier call measured, or measures it now.

        A measurement that was cut off goes on with its first part that is missing.
        """
        path = self.scratch / f"{name}.part.json"
        if path.is_file():
            return json.loads(path.read_text("utf-8"))
        value = compute()
        write_atomically(path, json.dumps(value).encode())
        return value

    def call_apart(self, function: Callable[..., Any], *arguments: Any, **environment: str) -> Any:
        """Calls a function in another new process, with variables of its environment."""
        return process.call_apart(function, *arguments, log=self.log, environment=environment)


class Measurement(NamedTuple):
    """An entry of the queue.

    Attributes:
        name: Name of the file of results.
        measure: `(options, context) -> Outcome`.
        options: Its options, a NamedTuple of JSON values.
        tiny: Options with which a CPU takes seconds.
        minutes: Minutes that it is expected to take on an H100.
        deterministic: Runs under `runs.DETERMINISM_FLAGS`.
        needs_pack: Reads the images of the pack.
    """

    name: str
    measure: Callable[[Any, Context], Outcome]
    options: Any
    tiny: Any
    minutes: float
    deterministic: bool = False
    needs_pack: bool = False

    def for_tiny(self) -> "Measurement":
        """Returns the measurement at toy sizes."""
        return self._replace(options=self.tiny, minutes=0.1)

    @property
    def limit(self) -> float:
        """Seconds after which the measurement is taken to hang."""
        return START_SECONDS + 3 * 60 * self.minutes
