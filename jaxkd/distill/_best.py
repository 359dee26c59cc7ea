"""The best evaluation of a student so far, and whether its training ends early."""

from typing import Any

import jax
import numpy as np

from jaxkd.distill._stage_run import StageRun


class BestSoFar:
    """Keeps the weights of a student's best evaluation on the host."""

    def __init__(self, stage_run: StageRun) -> None:
        """Goes on from the checkpoint of a training."""
        progress = stage_run.progress
        self._best = stage_run.stage.best
        self._owner = f"stage {stage_run.stage.name!r}"
        self._num_worse = progress.num_worse
        self.step = progress.best_step
        self.scores = progress.best_scores
        self.variables = None if stage_run.best is None else _copy_to_host(stage_run.best)
        self.is_stopped = progress.is_stopped

    def check(self, scores: dict[str, float]) -> None:
        """Raises `ValueError` if scores lack the one that the stage names."""
        if self._best is not None:
            self._best.read(scores, self._owner)

    def is_better(self, scores: dict[str, float]) -> bool:
        """Returns whether scores are better than those of all evaluations before."""
        if self._best is None:
            return False
        value = self._best.read(scores, self._owner)
        return self.scores is None or self._best.is_better(
            value, self._best.read(self.scores, self._owner)
        )

    def update(self, step: int, scores: dict[str, float], variables: Any, *, better: bool) -> None:
        """Takes an evaluation, and stops the training if its patience is at an end.

        Args:
            step: The step.
            scores: The scores by name.
            variables: The weights that were evaluated.
            better: The result of `is_better`, that of the primary process.
        """
        if self._best is None:
            return
        if better:
            self.step, self.scores, self._num_worse = step, scores, 0
            self.variables = _copy_to_host(variables)
            return
        self._num_worse += 1
        patience = self._best.patience
        self.is_stopped = patience is not None and self._num_worse >= patience

    def to_notes(self) -> dict[str, Any]:
        """Returns the notes of a checkpoint, as `StageProgress` reads them."""
        if self._best is None:
            return {}
        return {
            "best_step": self.step,
            "best_scores": self.scores,
            "num_worse": self._num_worse,
            "is_stopped": self.is_stopped,
        }


def _copy_to_host(variables: Any) -> Any:
    # A copy, because a step donates the arrays of the state.
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), jax.device_get(variables))
