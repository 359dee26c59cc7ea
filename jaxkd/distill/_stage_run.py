"""The training of a stage for one seed: its start or its checkpoint, and its group."""

import functools
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkd._messages import shorten
from jaxkd.distill._compile import CompiledStage
from jaxkd.distill._diagnosis import count_not_finite
from jaxkd.distill._identity import TrainingDescriber, find_changes
from jaxkd.distill.distributed import broadcast_from_primary, is_primary_process
from jaxkd.distill.plan import Pretrained, Stage, input_shapes
from jaxkd.distill.step import Purpose, TrainState, init_train_state
from jaxkd.models.model import Model
from jaxkd.runs import Run, RunError, checkpoints
from jaxkd.runs.run import checkpoint_identity


class TrainedModel(NamedTuple):
    """The result of a stage for one seed.

    Attributes:
        variables: The final parameters and running statistics.
        seconds: Training time over all restarts. Students that train together share their time.
        validation_accuracy: Accuracy on the validation split at the end, in [0, 1].
    """

    variables: dict
    seconds: float
    validation_accuracy: float


class StageProgress(NamedTuple):
    """What a checkpoint holds beside the training state.

    Attributes:
        step: Number of steps taken.
        seconds: Training time.
        losses: The losses since the last evaluation.
        validation_accuracy: Accuracy of the last evaluation; `None` before the first.
    """

    step: int
    seconds: float
    losses: list[float]
    validation_accuracy: float | None


class StageRun(NamedTuple):
    """The training of a stage for one seed, before its next step.

    Attributes:
        compiled: The stage and its compiled functions.
        seed: The seed.
        key: The PRNG key of the training.
        view_key: The PRNG key of the views, which all stages of the seed share.
        examples: The examples.
        teachers: The variables of each teacher.
        state: The training state.
        progress: Steps, time and evaluation so far.
        folder: Folder of the checkpoints.
        fingerprint: JSON values that identify the training. They are saved in its checkpoints.
    """

    compiled: CompiledStage
    seed: int
    key: Array
    view_key: Array
    examples: Mapping[str, Any]
    teachers: tuple[dict, ...]
    state: TrainState
    progress: StageProgress
    folder: Path
    fingerprint: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of the checkpoints."""
        return checkpoint_identity(self.seed, self.stage.name)

    @property
    def stage(self) -> Stage:
        """The stage."""
        return self.compiled.stage

    @property
    def label(self) -> str:
        """Stage and seed, for messages."""
        return f"{self.stage.name}, seed {self.seed}"


class RunGroup:
    """Runs that share a program and take the same step next, so that they train together."""

    def __init__(self, stage_runs: Sequence[StageRun]) -> None:
        """Takes at least one run."""
        self.stage_runs = list(stage_runs)
        first = self.stage_runs[0]
        self.steps = first.stage.steps
        self.batch_size = first.stage.batch_size
        self.multi_step = first.compiled.multi_step
        self.first_step = first.progress.step

    def __len__(self) -> int:
        """Returns the number of students."""
        return len(self.stage_runs)

    @property
    def label(self) -> str:
        """The first run's stage and seed, and the number of others."""
        others = f", and {len(self) - 1} more in one program" if len(self) > 1 else ""
        return self.stage_runs[0].label + others


def group_by_step(stage_runs: Sequence[StageRun]) -> list[RunGroup]:
    """Groups runs by their step. A kill between two saves leaves some runs behind the others."""
    by_step: dict[int, list[StageRun]] = {}
    for stage_run in stage_runs:
        by_step.setdefault(stage_run.progress.step, []).append(stage_run)
    # Those furthest behind go first.
    return [RunGroup(by_step[step]) for step in sorted(by_step)]


def start_or_resume(
    compiled: CompiledStage,
    seed: int,
    trained: Mapping[str, Mapping[int, TrainedModel]],
    run: Run,
    describer: TrainingDescriber,
) -> StageRun:
    """Returns the training of a stage for a seed, from its newest checkpoint or from step 0.

    Args:
        compiled: The stage.
        seed: The seed.
        trained: The models trained so far, by name and seed.
        run: The run, which holds the checkpoints.
        describer: Describes the training, so that its checkpoints are known from others.

    Raises:
        RunError: If the checkpoints belong to another training, or cannot be read. All processes
            raise it.
        ValueError: If the stage cannot start from the weights that it names.
    """
    stage = compiled.stage
    folder = run.checkpoint_folder(seed, stage.name)
    variables = {name: trained[name][seed].variables for name in stage.needs}
    # The key depends on the name alone, so that adding a stage does not move another one's bits.
    # CRC-32 instead of `hash`, which differs from process to process.
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.name.encode()))
    examples = stage.examples(seed)
    start = variables[stage.start] if stage.start else None
    # The fresh state is needed even to resume: it tells Orbax the tree, shapes and dtypes to
    # restore.
    example = jax.tree.map(lambda array: array[:1], examples["inputs"])
    state = _init_state(compiled, key, start, example)
    # The digests of pretrained models are part of the stage's fingerprint.
    weights = {
        name: variables[name]
        for name in stage.needs
        if name not in compiled.fingerprint.get("pretrained", {})
    }
    fingerprint = {}
    if is_primary_process():  # which alone reads and writes checkpoints
        fingerprint = describer.describe(compiled.fingerprint, examples, state, weights)
    state, progress = _restore(run, seed, stage.name, state, fingerprint)
    teachers = tuple(variables[name] for name in stage.teachers)
    return StageRun(
        compiled,
        seed,
        key,
        _view_key(seed),
        examples,
        teachers,
        state,
        progress,
        folder,
        fingerprint,
    )


@functools.cache
def _view_key(seed: int) -> Array:
    """Returns the key of a seed's views. It is one object, which the teacher cache compares."""
    return jax.random.fold_in(jax.random.key(seed), Purpose.VIEW)


def _init_state(
    compiled: CompiledStage, key: Array, start: dict | None, example: Any
) -> TrainState:
    stage = compiled.stage
    variables = compiled.init(jax.random.fold_in(key, Purpose.INIT), example)
    # Fresh variables are made in any case, since a transfer fills them and the check needs their
    # shapes.
    if start is not None:
        if stage.transfer is not None:
            start = stage.transfer(start, variables)
        _check_start(stage, start, variables)
        variables = start
    loss_params = None
    if stage.init_loss is not None:
        loss_params = stage.init_loss(jax.random.fold_in(key, Purpose.LOSS_INIT))
    return init_train_state(variables, stage.tx, loss_params=loss_params, loss_tx=stage.loss_tx)


def _restore(
    run: Run, seed: int, name: str, state: TrainState, fingerprint: Mapping[str, Any]
) -> tuple[TrainState, StageProgress]:
    """Returns the newest checkpoint's state and progress, or the given state at step 0."""
    notes: dict[str, Any] = {"step": 0}
    if is_primary_process():
        try:
            notes, state = _restore_as_primary(run, seed, name, state, fingerprint)
        # Whatever it is, the other processes would wait for this one.
        except (ValueError, OSError, ImportError) as error:
            if jax.process_count() == 1:
                raise
            notes = {"failure": str(error)}
    # Only the primary process writes checkpoints, and its disk need not be shared.
    notes, state = broadcast_from_primary(notes, state)
    if "failure" in notes:
        raise RunError(notes["failure"])
    state = jax.tree.map(jnp.asarray, state)
    if not notes["step"]:
        return state, StageProgress(0, 0.0, [], None)
    # The notes also hold the fingerprint, which is not part of the progress.
    return state, StageProgress(**{field: notes[field] for field in StageProgress._fields})


def _restore_as_primary(
    run: Run, seed: int, name: str, state: TrainState, fingerprint: Mapping[str, Any]
) -> tuple[dict[str, Any], TrainState]:
    """Returns the newest checkpoint's notes and state, after a check that it is of this training.

    Raises:
        RunError: If it is of another training, or the run's records are damaged.
    """
    folder = run.checkpoint_folder(seed, name)
    remedy = "delete that folder to train the stage again, or name another folder for the run"
    try:
        restored = checkpoints.restore(folder, state, identity=checkpoint_identity(seed, name))
    except ValueError as error:
        raise RunError(f"{error}: {remedy}") from error
    run.metrics()  # raises an error if they are damaged
    if restored is None or restored.step == 0:
        return {"step": 0}, state
    notes = restored.notes | {"step": restored.step}
    if {"stage", *StageProgress._fields} - notes.keys() or not isinstance(notes["stage"], dict):
        raise RunError(f"{folder} holds checkpoints that no plan saved: {remedy}")
    changes, is_uncertain = find_changes(notes["stage"], fingerprint)
    if changes:
        raise RunError(f"{folder} holds another training ({'; '.join(changes)}): {remedy}")
    if is_uncertain:
        warnings.warn(
            "checkpoints were saved in another environment or by an older version, so that a "
            "change of the data, model, loss or optimizer since then may go unnoticed",
            stacklevel=2,
        )
    return notes, restored.tree


def check_pretrained(
    plan: Sequence[Stage | Pretrained], seed: int, scored_inputs: Callable[[Model], Any | None]
) -> None:
    """Checks that the weights of pretrained models have the shapes that their models read.

    Args:
        plan: The stages and pretrained models.
        seed: A seed whose examples have the shapes of every seed's.
        scored_inputs: Returns the inputs on which a model is scored; `None` if it is not. Those of
            its first student are taken then.

    Raises:
        ValueError: If an array of a model that is scored or teaches is missing or has another
            shape.
    """
    for entry in plan:
        if not isinstance(entry, Pretrained):
            continue
        students = (s for s in plan if isinstance(s, Stage) and entry.name in s.teachers)
        student = next(students, None)
        inputs = scored_inputs(entry.model)
        if inputs is not None:
            _check_variables(entry, inputs)
        elif student is not None:
            _check_variables(entry, student.examples(seed)["inputs"])


def _check_variables(entry: Pretrained, inputs: Any) -> None:
    fresh = jax.eval_shape(entry.model.init, jax.random.key(0), input_shapes(inputs))
    # Another dtype and further arrays are no fault of a teacher.
    source, target = ({k: v.shape for k, v in _leaves(t).items()} for t in (entry.variables, fresh))
    differing = sorted(path for path in target if source.get(path) != target[path])
    if not differing:
        return
    if "params" in fresh and "params" not in (entry.variables or {}):
        problem = "its variables lack the level 'params': pass {'params': ...} as model.init does"
    else:
        path = differing[0]
        shape = list(source[path]) if path in source else "missing"
        more = f", and {len(differing) - 1} more differ" if len(differing) > 1 else ""
        problem = (
            f"{path} is {shape} in its variables and {list(target[path])} in its model{more}; pass "
            "the model of these weights"
        )
    raise ValueError(f"pretrained model {shorten(entry.name, 40)!r} cannot be used: {problem}")


def _leaves(tree: Any) -> dict[str, Any]:
    """Returns the arrays of a tree by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        for path, leaf in leaves
    }


def _check_start(stage: Stage, start: dict, fresh: dict) -> None:
    """Raises `ValueError` unless weights have the shapes and dtypes of fresh ones, and no NaN."""
    source, target = (
        {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in _leaves(tree).items()}
        for tree in (start, fresh)
    )
    differing = sorted(
        path for path in source.keys() | target.keys() if source.get(path) != target.get(path)
    )
    problem = ""
    if differing:
        # One is enough to see what differs, and a large network has hundreds.
        path = differing[0]
        more = f", and {len(differing) - 1} more differ" if len(differing) > 1 else ""
        problem = (
            f"{path} is {source.get(path, 'missing')} there and {target.get(path, 'missing')} in "
            f"the stage{more}; convert them with transfer=..."
        )
    elif count := count_not_finite(start):
        problem = f"{count:,} of its weights are NaN or infinite"
    if problem:
        raise ValueError(f"stage {stage.name!r} cannot start from {stage.start!r}: {problem}")
