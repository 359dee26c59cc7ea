"""The losses and terms of the steps since the last evaluation, on devices and on the host."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxkd.distill._multi_step import Metrics
from jaxkd.distill.placement import Placement

METRICS_ON_DEVICE = 1024
"""Number of calls after which their metrics are moved to the host."""


class MetricBuffer:
    """Collects the metrics of a group's steps, and moves them to the host now and then."""

    def __init__(
        self, placement: Placement, metrics: Sequence[Mapping[str, Sequence[float]]]
    ) -> None:
        """Takes the placement, and the metrics of each student so far; those may be empty."""
        self._placement = placement
        self._num_students = len(metrics)
        self._calls: list[Any] = []
        self._num_on_device = 0
        # Without a step, the names of the terms are not known.
        if metrics[0].get("loss"):
            # Transposed to `[K, P]`, the layout in which steps return theirs.
            self._calls = [
                {
                    name: np.array([student[name] for student in metrics], np.float32).T
                    for name in metrics[0]
                }
            ]

    @property
    def num_steps(self) -> int:
        """Number of steps since the last evaluation."""
        return sum(len(call["loss"]) for call in self._calls)

    def append(self, metrics: Metrics) -> None:
        """Takes the metrics of a call, `[K, P]`, which may still be computed."""
        self._calls.append(metrics)
        self._num_on_device += 1
        if self._num_on_device == METRICS_ON_DEVICE:
            # An array on a device takes far more memory than the numbers in it.
            start = -self._num_on_device
            self._calls[start:] = [self._join(self._calls[start:])]
            self._num_on_device = 0

    def wait_for_previous(self) -> None:
        """Waits for the call before the last one."""
        jax.block_until_ready(self._calls[-2:][0])

    def get(self) -> list[dict[str, np.ndarray]]:
        """Returns the metrics of each student, `[K]`."""
        students = range(self._num_students)
        if not self._calls:
            return [{"loss": np.zeros(0, np.float32)} for _ in students]
        joined = self._join(self._calls)
        return [
            {name: np.ascontiguousarray(values[:, i]) for name, values in joined.items()}
            for i in students
        ]

    def reset(self) -> None:
        """Forgets all metrics, after an evaluation."""
        self._calls = []
        self._num_on_device = 0

    def _join(self, calls: Sequence[Metrics]) -> dict[str, np.ndarray]:
        return self._placement.get_metrics(calls, self._num_students)
