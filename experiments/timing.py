"""How the benchmarks time, in rounds in which all that is compared has its turn, and how they begin and report."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from rich import box
from rich.table import Table

from jaxkd.checkpoints import write_atomically

if TYPE_CHECKING:
    from matplotlib.axis import Axis

SAMPLE_SECONDS = 0.005  # a sample is as many calls as take this long, of which the clock is sure


class Ratio(NamedTuple):
    """How many times as long as another case a case takes, over rounds."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float], baseline: Sequence[float]) -> "Ratio":
        """The ratio within each round, so that what slows a round down slows both: median and quartiles."""
        low, median, high = np.percentile(np.divide(seconds, baseline), [25, 50, 75]).tolist()
        return cls(low, median, high)

    def __str__(self) -> str:
        """The median, and the quartiles behind it."""
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"

    @property
    def clear(self) -> bool:
        """Whether the middle half of the rounds agree on which case takes longer."""
        return not self.low <= 1 <= self.high


def time_rounds(
    calls: Sequence[Callable[[], Any]],
    repeats: int,
    *,
    wait: Callable[[Any], Any] = jax.block_until_ready,
    settle: float = 0.0,
) -> Iterator[list[float]]:
    """Times calls in rounds, each of which lets all have their turn.

    Args:
        calls: What is compared. The first call of each, which may compile, is not timed.
        repeats: Rounds.
        wait: Returns when a call's result is there. It is called at the end of a sample: calls may queue, as the steps
            of a training loop do.
        settle: Seconds of calls that go before each sample and are not timed, in which the threads of the library
            whose turn it was before come to rest. Those of PyTorch go on spinning for some ten milliseconds, and take
            a core away.

    Yields:
        The seconds of each call, once a round.
    """
    counts = []
    for call in calls:
        wait(call())
        counts.append(max(1, math.ceil(SAMPLE_SECONDS / max(_sample(call, 1, wait), 1e-6))))
    for i in range(repeats):
        seconds = [0.0] * len(calls)
        forwards = range(len(calls))
        # Back and forth, so that what drifts meets all alike.
        for j in forwards if i % 2 == 0 else reversed(forwards):
            _settle(calls[j], settle, wait)
            seconds[j] = _sample(calls[j], counts[j], wait)
        yield seconds


def begin(config: Any) -> Path:
    """Checks the options and makes the folder of results."""
    config.check()
    folder = Path(config.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_results(folder: Path, config: Any, environment: dict, found: dict) -> None:
    """Writes results.json: the options, the environment and what was found."""
    results = {"config": dataclasses.asdict(config), "environment": environment} | found
    write_atomically(folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())


def table(title: str, *columns: str) -> Table:
    """A table of ratios without columns of numbers yet; the names in the first ones are never cut off."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def log_ticks(axis: "Axis") -> None:
    """Labels a logarithmic axis of ratios with plain numbers: 0.5, 1, 2, 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _settle(call: Callable[[], Any], seconds: float, wait: Callable[[Any], Any]) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        wait(call())


def _sample(call: Callable[[], Any], count: int, wait: Callable[[Any], Any]) -> float:
    """Seconds of one of so many calls."""
    result, start = None, time.perf_counter()
    for _ in range(count):
        result = call()
    wait(result)
    return (time.perf_counter() - start) / count
