"""Messages and progress bars of a plan that runs."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxkd.distill.distributed import is_primary_process
from jaxkd.distill.plan import Entry, Stage

SECONDS_BETWEEN_EVALUATIONS = 10.0
"""Least time between a line and the next one that an evaluation prints."""


class PlanProgress:
    """Prints a line at the start of a plan and after each training, with bars on a terminal.

    The bars need rich. Without it, or in a pipe, there is also a line after an evaluation, unless
    another line was printed shortly before. Only the primary process prints.
    """

    def __init__(self, plan: Sequence[Entry], seeds: Sequence[int], folder: Path) -> None:
        """Takes what the first line says: the plan, the seeds and the run's folder."""
        stages = [entry for entry in plan if isinstance(entry, Stage)]
        self._total = len(seeds) * sum(stage.steps for stage in stages)
        self._done = 0
        self._trained_steps = 0
        self._start = self._printed_at = time.monotonic()
        self._bars = _make_bars()
        num_trainings = len(seeds) * len(stages)
        self._introduction = (
            f"training {_count(len(stages), 'stage')} for {_count(len(seeds), 'seed')}: "
            f"{_count(num_trainings, 'training')}, {_count(self._total, 'step')}, into {folder}"
        )

    def __enter__(self) -> "PlanProgress":
        """Prints the first line and shows the bars."""
        self._print(self._introduction)
        if self._bars is not None:
            self._bars.start()
            self._whole = self._bars.add_task("all stages", total=self._total)
        return self

    def __exit__(self, *exception: Any) -> None:
        """Removes the bars."""
        if self._bars is not None:
            self._bars.stop()

    def start_group(self, label: str, steps: int, num_students: int) -> None:
        """Shows a bar for a group of students that train together."""
        self._label, self._steps, self._num_students = label, steps, num_students
        if self._bars is not None:
            self._group = self._bars.add_task(label, total=steps)

    def advance(self, steps: int, *, restored: bool = False) -> None:
        """Counts steps of the current group. `restored` steps were taken by an earlier run."""
        self._done += self._num_students * steps
        # Restored steps took no time of this call and would make the estimate of the rest too
        # short.
        if not restored:
            self._trained_steps += self._num_students * steps
        if self._bars is not None:
            self._bars.advance(self._group, steps)
            self._bars.advance(self._whole, self._num_students * steps)

    def report_evaluation(self, step: int, loss: float, scores: str) -> None:
        """Prints a line after an evaluation, where no bar shows how far the group has come."""
        is_recent = time.monotonic() - self._printed_at < SECONDS_BETWEEN_EVALUATIONS
        # The line at the end of the group follows the last evaluation.
        if self._bars is None and not is_recent and step < self._steps:
            self._print(
                f"{self._label}: step {step:,} of {self._steps:,}, loss {loss:.3g}, "
                f"{scores}{self._describe_rest()}"
            )

    def report(self, messages: Sequence[str]) -> None:
        """Prints what the user should know about the run or the trained models."""
        for message in messages:
            self._print(message)

    def end_group(self, messages: Sequence[str]) -> None:
        """Removes the group's bar and prints a line for each of its trainings."""
        if self._bars is not None:
            self._bars.remove_task(self._group)
        for message in messages[:-1]:
            self._print(message)
        # The trainings of a group end together, so the last line alone tells the remaining time.
        self._print(messages[-1] + self._describe_rest())

    def _describe_rest(self) -> str:
        """Estimates the remaining time from the time per step so far."""
        remaining = self._total - self._done
        if not remaining or not self._trained_steps:
            return ""
        seconds = remaining * (time.monotonic() - self._start) / self._trained_steps
        duration = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
        return f" (about {duration} left)"

    def _print(self, message: str) -> None:
        self._printed_at = time.monotonic()
        if self._bars is not None:
            # The bars' own console prints above them instead of through them. As markup, a name in
            # square brackets would be taken for a style.
            self._bars.console.print(message, highlight=False, markup=False)
        elif is_primary_process():
            # Python buffers a pipe in blocks, so that a log could stay empty for minutes.
            print(message, flush=True)


def _make_bars() -> Any:
    """Returns rich's progress bars, or `None` without a terminal or without rich."""
    if not sys.stdout.isatty() or not is_primary_process():
        return None
    try:
        from rich import progress
    except ImportError:
        return None
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
