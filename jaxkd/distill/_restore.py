"""The checkpoint from which a training goes on, also in a run whose configuration has changed."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxkd._messages import shorten
from jaxkd.distill._identity import MESSAGES, find_changes, is_shorter
from jaxkd.runs import Run, RunError, checkpoints
from jaxkd.runs.growth import describe_growth, find_set_aside, set_aside, take_back
from jaxkd.runs.run import checkpoint_identity


class StageProgress(NamedTuple):
    """What a checkpoint holds beside the training state.

    Attributes:
        step: Number of steps taken.
        seconds: Training time.
        metrics: The losses, and their terms, of the steps since the last evaluation, by name.
        scores: The scores of the last evaluation by name; `None` before the first.
        best_step: Step of the best evaluation, for a stage that returns its weights.
        best_scores: Its scores; `None` before the first evaluation.
        num_worse: Number of evaluations since then.
        is_stopped: Whether the training has ended early.
        records: The state of sequential records; `None` for other data.
    """

    step: int = 0
    seconds: float = 0.0
    metrics: Mapping[str, list[float]] = MappingProxyType({})
    scores: dict[str, float] | None = None
    best_step: int = 0
    best_scores: dict[str, float] | None = None
    num_worse: int = 0
    is_stopped: bool = False
    records: dict[str, Any] | None = None

    @property
    def num_losses(self) -> int:
        """Number of steps since the last evaluation."""
        return len(self.metrics.get("loss", ()))


class _Checkpoint(NamedTuple):
    """The newest sound checkpoint in a folder.

    Attributes:
        notes: Its notes and its step, which is 0 without a checkpoint.
        arrays: Its arrays.
        reason: Why it is of another training; empty if it is not.
        message: The same for an error, with its folder.
    """

    notes: dict[str, Any]
    arrays: Any
    reason: str = ""
    message: str = ""


def restore_training(
    run: Run,
    seed: int,
    stage: str,
    arrays: Any,
    fingerprint: Mapping[str, Any],
    find_program: Callable[[int], str | None],
) -> tuple[dict[str, Any], Any, str]:
    """Returns the notes and the arrays of a training's newest checkpoint.

    In a run that may grow, a checkpoint of another training is set aside together with its records,
    and one of this training that was set aside before is taken back.

    Args:
        run: The run.
        seed: The seed.
        stage: Name of the stage.
        arrays: The arrays of a checkpoint before the first step.
        fingerprint: The description of the training.
        find_program: See `is_shorter`.

    Returns:
        Notes with the step, 0 without a checkpoint; the arrays; and a remark on what became of the
        training of an earlier configuration, empty without one.

    Raises:
        RunError: If a checkpoint is of another training and the run may not grow, or the run's
            records are damaged.
    """
    run.metrics()  # raises an error if they are damaged
    growth = describe_growth(run) if run.grow and run.is_growing else ""

    def read(folder: Path) -> tuple[_Checkpoint, str]:
        found = _read_checkpoint(folder, seed, stage, arrays, fingerprint, growth)
        saved = found.notes.get("stage")
        if run.grow and found.reason and is_shorter(saved or {}, fingerprint, find_program):
            remark = f"goes on after step {found.notes['step']:,} of a shorter training"
            return found._replace(reason=""), remark
        return found, ""

    found, remark = read(run.checkpoint_folder(seed, stage))
    if found.reason and not run.grow:
        raise RunError(
            f"{found.message}: delete that folder to train the stage again, or name another folder "
            "for the run"
        )
    if found.notes["step"] and not found.reason:
        return found.notes, found.arrays, remark
    reasons = [found.reason]
    for folder in find_set_aside(run, seed, stage) if run.grow else ():
        aside, remark = read(folder)
        if aside.notes["step"] and not aside.reason:
            take_back(run, seed, stage, folder)
            return aside.notes, aside.arrays, remark or "an earlier configuration has trained it"
        reasons.append(aside.reason)
    if found.reason:
        set_aside(run, seed, stage)
    reason = next(filter(None, reasons), "")
    remark = f"trains again ({reason}); its earlier training is kept until the end"
    return {"step": 0}, arrays, remark if reason else ""


def _read_checkpoint(
    folder: Path,
    seed: int,
    stage: str,
    arrays: Any,
    fingerprint: Mapping[str, Any],
    growth: str,
) -> _Checkpoint:
    """Reads the newest sound checkpoint, and compares its training with that of a fingerprint.

    Args:
        folder: The folder.
        seed: The seed.
        stage: Name of the stage.
        arrays: The arrays of a checkpoint before the first step.
        fingerprint: The description of the training.
        growth: How the configuration has changed since the run last finished; empty if it has not.
    """
    nothing = {"step": 0}
    try:
        restored = checkpoints.restore(folder, arrays, identity=checkpoint_identity(seed, stage))
    except checkpoints.OtherArraysError as error:
        reason = _explain_other_arrays(error, fingerprint)
        return _Checkpoint(nothing, arrays, reason, f"{folder} holds another training ({reason})")
    except ValueError as error:
        return _Checkpoint(nothing, arrays, "its folder holds something else", str(error))
    if restored is None or restored.step == 0:
        return _Checkpoint(nothing, arrays)
    notes = _update_notes(restored.notes) | {"step": restored.step}
    needed = {"stage", "seconds", "metrics", "scores"}
    if needed - notes.keys() or not isinstance(notes["stage"], dict):
        reason = "no plan saved its checkpoints"
        message = f"{folder} holds checkpoints that no plan saved"
        return _Checkpoint(nothing, arrays, reason, message)
    changes, is_uncertain = find_changes(notes["stage"], fingerprint)
    if is_uncertain and growth:
        # With an unchanged configuration, the same script is expected. Now it is not.
        changes.append("another environment trained it, in which programs read otherwise")
    elif is_uncertain and not changes:
        warnings.warn(
            "checkpoints were saved in another environment or by an older version, so that a "
            "change of the data, model, loss or optimizer since then may go unnoticed",
            stacklevel=2,
        )
    if changes:
        reason = shorten("; ".join(changes), 150)
        message = f"{folder} holds another training ({'; '.join(changes)})"
        return _Checkpoint(notes, restored.tree, reason, message)
    return _Checkpoint(notes, restored.tree)


def _explain_other_arrays(
    error: checkpoints.OtherArraysError, fingerprint: Mapping[str, Any]
) -> str:
    """Returns the options of the stage that changed, or else the arrays that did."""
    saved = error.notes.get("stage")
    changes = find_changes(saved, fingerprint)[0] if isinstance(saved, dict) else []
    # The others, such as of the program, say less than the arrays.
    options = [change for change in changes if change not in MESSAGES.values()]
    return shorten("; ".join(options), 150) or f"its arrays changed: {error.differences}"


def _update_notes(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the notes of a checkpoint of version 0.1, which knew no terms and scores, as today's.

    Others are returned as they are.
    """
    updated = dict(notes)
    if {"losses", "validation_accuracy"} <= notes.keys():
        accuracy = updated.pop("validation_accuracy")
        updated["metrics"] = {"loss": updated.pop("losses")}
        updated["scores"] = None if accuracy is None else {"accuracy": accuracy}
    return updated
