"""When the next checkpoint is due, on all processes at the same step."""

import time

import jax
import numpy as np

from jaxkd.distill.distributed import broadcast_from_primary


class SaveClock:
    """Measures the time since the last checkpoint.

    Several processes gather the states that they save, so they must save at the same step, although
    their clocks differ. Asking the primary process after every step would slow training down. It is
    asked less and less often, the number of steps in between at most doubling, so that it is asked
    about when a checkpoint is due.
    """

    def __init__(self, save_every: float) -> None:
        """Starts with the seconds between two checkpoints."""
        self._save_every = save_every
        self.restart()

    def restart(self) -> None:
        """Starts again after a checkpoint."""
        self._started = time.monotonic()
        self._count = 0
        self._next_question = 1

    def is_due(self) -> bool:
        """Returns whether a checkpoint is due. All processes call it after the same steps."""
        elapsed = time.monotonic() - self._started
        if jax.process_count() == 1:
            return elapsed > self._save_every
        self._count += 1
        if self._count < self._next_question:
            return False
        _, elapsed = broadcast_from_primary(None, np.float32(elapsed))
        elapsed = float(elapsed)  # that of the primary process
        if elapsed > self._save_every:
            return True
        calls_per_second = self._count / max(elapsed, 1e-3)
        remaining = calls_per_second * (self._save_every - elapsed)
        self._next_question = self._count + int(np.clip(remaining, 1, self._count))
        return False
