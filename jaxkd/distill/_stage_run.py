"""The training of a stage for one seed: its start or its checkpoint, and its group."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkd._messages import list_some, shorten
from jaxkd.distill._compile import CompiledStage
from jaxkd.distill._diagnosis import count_not_finite
from jaxkd.distill._identity import TrainingDescriber
from jaxkd.distill._restore import StageProgress, restore_training
from jaxkd.distill.distributed import broadcast_from_primary, is_primary_process
from jaxkd.distill.plan import AVERAGE, Entry, Pretrained, Stage, init_stage_state, input_shapes
from jaxkd.distill.step import Purpose, TrainState
from jaxkd.models.model import Model
from jaxkd.runs import Run, RunError
from jaxkd.runs.run import checkpoint_identity


class TrainedModel(NamedTuple):
    """The result of a stage for one seed.

    Attributes:
        variables: The final parameters and running statistics.
        seconds: Training time over all restarts. Students that train together share their time.
        validation_accuracy: Accuracy on the validation split at the end, in [0, 1]; NaN where it
            was not measured.
        scores: All numbers that were measured on the validation split, by name.
        step: The step whose weights these are: the last one, or that of the best evaluation.
    """

    variables: dict
    seconds: float
    validation_accuracy: float
    scores: Mapping[str, float] = MappingProxyType({})
    step: int = 0


def make_trained(
    variables: dict, seconds: float, scores: Mapping[str, float], step: int = 0
) -> TrainedModel:
    """Returns a trained model with these scores."""
    return TrainedModel(variables, seconds, scores.get("accuracy", float("nan")), scores, step)


class StageRun(NamedTuple):
    """The training of a stage for one seed, before its next step.

    Attributes:
        compiled: The stage and its compiled functions.
        seed: The seed.
        key: The PRNG key of the steps.
        order_key: The PRNG key of the order of the examples.
        view_key: The PRNG key of the views, which all stages of the seed share.
        examples: The examples.
        teachers: The variables of each teacher; `None` for the student's own average.
        state: The training state.
        best: The variables of the best evaluation, for a stage that returns them.
        progress: Steps, time and evaluation so far.
        folder: Folder of the checkpoints.
        fingerprint: JSON values that identify the training. They are saved in its checkpoints.
        remark: What became of the training of an earlier configuration; empty without one.
    """

    compiled: CompiledStage
    seed: int
    key: Array
    order_key: Array
    view_key: Array
    examples: Mapping[str, Any]
    teachers: tuple[dict | None, ...]
    state: TrainState
    best: dict | None
    progress: StageProgress
    folder: Path
    fingerprint: dict[str, Any]
    remark: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of the checkpoints."""
        return checkpoint_identity(self.seed, self.stage.name)

    @property
    def stage(self) -> Stage:
        """The stage."""
        return self.compiled.stage

    @property
    def is_finished(self) -> bool:
        """Whether no step is left to take."""
        return self.progress.is_stopped or self.progress.step == self.stage.steps

    @property
    def other_teachers(self) -> dict[str, dict]:
        """The variables of the teachers by name, without the student's own average."""
        pairs = zip(self.stage.teachers, self.teachers, strict=True)
        return {name: variables for name, variables in pairs if variables is not None}

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
        self.is_finished = first.is_finished

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
    by_step: dict[tuple[int, int, bool], list[StageRun]] = {}
    for stage_run in stage_runs:
        progress = stage_run.progress
        # One that goes on with a shorter training was last evaluated at another step.
        key = progress.step, progress.num_losses, stage_run.is_finished
        by_step.setdefault(key, []).append(stage_run)
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
        RunError: If the checkpoints belong to another training and the run may not grow, or cannot
            be read. All processes raise it.
        ValueError: If the stage cannot start from the weights that it names.
    """
    stage = compiled.stage
    folder = run.checkpoint_folder(seed, stage.name)
    variables = {name: trained[name][seed].variables for name in stage.needs}
    examples = stage.examples(seed)
    start = variables[stage.start] if stage.start else None
    # The fresh state is needed even to resume: it tells Orbax the tree, shapes and dtypes to
    # restore.
    example = jax.tree.map(lambda array: array[:1], examples["inputs"])
    state = _init_state(compiled, stage.make_key(seed, "init"), start, example)
    # The digests of pretrained models are part of the stage's fingerprint.
    weights = {
        name: variables[name]
        for name in stage.needs
        if name not in compiled.fingerprint.get("pretrained", {})
    }
    fingerprint = {}
    if is_primary_process():  # which alone reads and writes checkpoints
        fingerprint = describer.describe(
            compiled.fingerprint,
            examples,
            state,
            weights,
            is_complete=compiled.lowered.is_complete,
        )
    state, best, progress, remark = _restore(run, seed, compiled, state, fingerprint)
    teachers = tuple(None if name == AVERAGE else variables[name] for name in stage.teachers)
    return StageRun(
        compiled,
        seed,
        stage.make_key(seed, "step"),
        stage.make_key(seed, "order"),
        _view_key(seed),
        examples,
        teachers,
        state,
        best,
        progress,
        folder,
        fingerprint,
        remark,
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
    if not jax.tree.leaves(variables["params"]) and stage.init_loss is None:
        raise ValueError(
            f"the model of stage {shorten(stage.name, 40)!r} has no parameters to train: make them "
            "nnx.Param or self.param of a module, or entries of params"
        )
    # Fresh variables are made in any case, since a transfer fills them and the check needs their
    # shapes.
    if start is not None:
        if stage.transfer is not None:
            start = _transfer(stage, stage.transfer, start, variables)
        _check_start(stage, start, variables)
        variables = start
    loss_params = None
    if stage.init_loss is not None:
        loss_params = stage.init_loss(jax.random.fold_in(key, Purpose.LOSS_INIT))
    return init_stage_state(stage, variables, loss_params)


def _restore(
    run: Run,
    seed: int,
    compiled: CompiledStage,
    state: TrainState,
    fingerprint: Mapping[str, Any],
) -> tuple[TrainState, dict | None, StageProgress, str]:
    """Returns the newest checkpoint's state, best variables and progress, or those at step 0.

    The text says what became of the training of an earlier configuration.
    """
    stage = compiled.stage
    notes: dict[str, Any] = {"step": 0}
    remark = ""
    arrays = pack_arrays(state, state.average_variables if stage.best else None)
    if is_primary_process():
        try:
            notes, arrays, remark = restore_training(
                run, seed, stage.name, arrays, fingerprint, compiled.find_program
            )
        # Whatever it is, the other processes would wait for this one.
        except (ValueError, OSError, ImportError) as error:
            if jax.process_count() == 1:
                raise
            notes = {"failure": str(error)}
    # Only the primary process writes checkpoints, and its disk need not be shared.
    (notes, remark), arrays = broadcast_from_primary((notes, remark), arrays)
    if "failure" in notes:
        raise RunError(notes["failure"])
    state, best = (arrays["state"], arrays["best"]) if stage.best else (arrays, None)
    state = jax.tree.map(jnp.asarray, state)
    if not notes["step"]:
        return state, best, StageProgress(), remark
    # The notes also hold the fingerprint, which is not part of the progress.
    known = {field: notes[field] for field in StageProgress._fields if field in notes}
    return state, best, StageProgress(**known), remark


def pack_arrays(state: TrainState, best: Any) -> Any:
    """Returns the arrays of a checkpoint: the state, and the best variables if there are any."""
    # A state alone, as versions before `Stage.best` saved it.
    return state if best is None else {"state": state, "best": best}


def check_pretrained(
    plan: Sequence[Entry], seed: int, scored_inputs: Callable[[Model], Any | None]
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
        owner = f"pretrained model {shorten(entry.name, 40)!r}"
        if inputs is not None:
            check_variables(owner, entry.model, entry.variables, inputs)
        elif student is not None:
            inputs = student.examples(seed)["inputs"]
            check_variables(owner, entry.model, entry.variables, inputs)


def check_variables(owner: str, model: Model, variables: Any, inputs: Any) -> None:
    """Raises `ValueError` if an array that a model reads is missing or has another shape.

    Args:
        owner: What has the variables, for the message.
        model: The model.
        variables: Its variables, which may hold further arrays.
        inputs: Inputs `[N, ...]`, an array or a dict of arrays.
    """
    fresh = jax.eval_shape(model.init, jax.random.key(0), input_shapes(inputs))
    # Another dtype and further arrays are no fault of a teacher.
    source, target = ({k: v.shape for k, v in _leaves(t).items()} for t in (variables, fresh))
    differing = sorted(path for path in target if source.get(path) != target[path])
    further = (variables or {}).keys() - fresh.keys() - {"params", "batch_stats"}
    if not differing and not further:
        return
    if any("['int8']" in path for path in source):
        raise ValueError(
            f"{owner} cannot be used: its weights are stored in 8 bits: pass "
            "models.dequantize_weights(variables)"
        )
    if not differing:
        problem = (
            f"its variables have {list_some(sorted(further))} beside {list_some(sorted(fresh))}, "
            "which its model does not read: pass the latter alone"
        )
    elif "params" in fresh and "params" not in (variables or {}):
        problem = "its variables lack the level 'params': pass {'params': ...} as model.init does"
    else:
        path = differing[0]
        shape = list(source[path]) if path in source else "missing"
        more = f", and {len(differing) - 1} more differ" if len(differing) > 1 else ""
        problem = (
            f"{path} is {shape} in its variables and {list(target[path])} in its model{more}; pass "
            "the model of these weights"
        )
    raise ValueError(f"{owner} cannot be used: {problem}")


def _leaves(tree: Any) -> dict[str, Any]:
    """Returns the arrays of a tree by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        for path, leaf in leaves
    }


def _transfer(
    stage: Stage, transfer: Callable[[dict, dict], dict], source: dict, fresh: dict
) -> dict:
    """Returns what a transfer makes; raises `ValueError` if it is a tuple or took nothing."""
    result: Any = transfer(source, fresh)
    owner = f"the transfer of stage {shorten(stage.name, 40)!r}"
    if isinstance(result, tuple):
        raise ValueError(
            f"{owner} returns a tuple, such as (variables, report): return its first entry alone"
        )
    leaves, fresh_leaves = _leaves(result), _leaves(fresh)
    if leaves.keys() == fresh_leaves.keys() and all(
        np.array_equal(leaf, fresh_leaves[path]) for path, leaf in leaves.items()
    ):
        raise ValueError(
            f"{owner} takes nothing of {stage.start!r:.60}, it returns the fresh weights: name the "
            "weights to move, as by transfer.transfer(source, fresh, rules=...)"
        )
    return result


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
