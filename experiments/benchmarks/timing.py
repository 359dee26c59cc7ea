"""Timing in alternating rounds, and the output that the benchmarks share."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from experiments.common.checks import check_writable
from jaxkd._files import write_atomically
from jaxkd.cli.limits import expand

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from rich.table import Table

# A sample repeats its call for about this long, far above the resolution of the clock.
SAMPLE_SECONDS = 0.005


class Ratio(NamedTuple):
    """Median and quartiles, over rounds, of the time of one case divided by that of another."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float], baseline: Sequence[float]) -> "Ratio":
        """Computes the ratio of two cases from their seconds in each round."""
        # Dividing within a round cancels whatever slowed the machine down during that round.
        low, median, high = np.percentile(np.divide(seconds, baseline), [25, 50, 75]).tolist()
        return cls(low, median, high)

    def __str__(self) -> str:
        """Formats the median, followed by the quartiles in brackets."""
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"

    @property
    def excludes_one(self) -> bool:
        """True if the middle half of the rounds agree on which case takes longer."""
        return not self.low <= 1 <= self.high


def time_rounds(
    calls: Sequence[Callable[[], Any]],
    rounds: int,
    *,
    wait: Callable[[Any], Any] = jax.block_until_ready,
    settle_seconds: float = 0.0,
) -> Iterator[list[float]]:
    """Times calls in rounds; each round takes one sample of every call.

    Args:
        calls: The calls to compare. The first call of each, which may compile, is not timed.
        rounds: Number of rounds.
        wait: Blocks until the result of a call is ready. It is called once, at the end of a sample,
            so that calls may queue as the steps of a training loop do.
        settle_seconds: Seconds of untimed calls before each sample, in which the threads of the
            library that was timed before become idle. PyTorch's threads spin for some ten
            milliseconds after their last work and occupy a core.

    Yields:
        The seconds of each call, once per round.
    """
    counts = []
    for call in calls:
        wait(call())
        # A call shorter than the clock's resolution may measure as 0 seconds.
        seconds_per_call = max(_sample(call, 1, wait), 1e-6)
        counts.append(max(1, math.ceil(SAMPLE_SECONDS / seconds_per_call)))
    for i in range(rounds):
        seconds = [0.0] * len(calls)
        forwards = range(len(calls))
        # Every second round runs backwards, so that a drift of the machine affects all equally.
        for j in forwards if i % 2 == 0 else reversed(forwards):
            _settle(calls[j], settle_seconds, wait)
            seconds[j] = _sample(calls[j], counts[j], wait)
        yield seconds


def prepare_folder(config: Any) -> Path:
    """Checks the options and makes the folder of the results."""
    config.check()
    folder = expand(config.workdir)
    # Now, not after minutes of measurements.
    check_writable("--workdir", folder)
    return folder


def write_results(folder: Path, config: Any, environment: dict, results: dict) -> None:
    """Writes `results.json`: the options, the environment and the results."""
    content = {"config": dataclasses.asdict(config), "environment": environment} | results
    write_atomically(folder / "results.json", (json.dumps(content, indent=1) + "\n").encode())


def make_table(title: str, *columns: str) -> "Table":
    """Makes a table with its text columns, which wrap long names instead of cutting them off."""
    # Here, because accelerators are measured where rich is not installed.
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def set_ratio_ticks(axis: "Axis") -> None:
    """Labels a logarithmic axis of ratios, on which all is drawn, with plain numbers: 0.5, 1, 2."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    # With three labels in a decade, a narrow axis may show a single one.
    subs = (1, 2, 5) if high / low > 10 else (1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _settle(call: Callable[[], Any], seconds: float, wait: Callable[[Any], Any]) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        wait(call())


def _sample(call: Callable[[], Any], count: int, wait: Callable[[Any], Any]) -> float:
    """Returns the mean seconds of `count` queued calls."""
    result = None
    start = time.perf_counter()
    for _ in range(count):
        result = call()
    wait(result)
    return (time.perf_counter() - start) / count
