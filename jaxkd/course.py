"""The course of one training: where it stands, its steps, its evaluations and its checkpoints.

Several students that share a compiled step may go through it at once.
"""

import functools
import itertools
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkd import checkpoints
from jaxkd.batches import make_bucketed_order, make_order
from jaxkd.buckets import narrowest, token_lengths
from jaxkd.evaluate import Score
from jaxkd.parallel import Advance, Mapped, Population, Sharded, is_first_host, local, tell_all
from jaxkd.plan import Stage
from jaxkd.runs import Run, RunError
from jaxkd.train import Purpose, TrainState, make_state


class Trained(NamedTuple):
    """What a stage left, for one seed.

    Attributes:
        variables: The final weights and statistics.
        seconds: Time it took to train, over all restarts; where several trained at once, its part of theirs.
        validation_accuracy: At the end, in [0, 1].
    """

    variables: dict
    seconds: float
    validation_accuracy: float


class Ready(NamedTuple):
    """A stage with its compiled functions, for all seeds.

    Attributes:
        stage: The stage.
        devices: Where it trains.
        advance: Takes steps.
        init: `(key, inputs) -> variables`.
        score: `variables -> Score`, on the validation split.
        answers: What says a teacher's logits, by its name.
        widths: To which batches of tokens are cut; `None`: not at all.
        fingerprint: What tells it from another training.
    """

    stage: Stage
    devices: Sharded | Mapped | Population
    advance: Advance
    init: Callable[..., dict]
    score: Callable[[dict], Score]
    answers: Mapping[str, Callable[..., Any]]
    widths: tuple[int, ...] | None
    fingerprint: dict[str, Any]


class Training(NamedTuple):
    """One stage for one seed, as it stands before its next step.

    Attributes:
        ready: The stage.
        seed: The seed.
        key: Makes its draws.
        view_key: Makes the pictures that all stages of the seed see.
        examples: What it learns from.
        teachers: The variables of its teachers.
        state: What its steps change.
        notes: What was saved beside the state: steps and seconds so far, losses since the last evaluation.
        folder: That of its checkpoints.
    """

    ready: Ready
    seed: int
    key: Array
    view_key: Array
    examples: Mapping[str, Any]
    teachers: tuple[dict, ...]
    state: TrainState
    notes: dict[str, Any]
    folder: Path


def begin(ready: Ready, seed: int, trained: Mapping[str, Mapping[int, Trained]], run: Run) -> Training:
    """The training of a stage for a seed, at the newest checkpoint or at its beginning."""
    stage, folder = ready.stage, run.checkpoints(seed, ready.stage.name)
    latest = {name: trained[name][seed].variables for name in stage.needs}
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.name.encode()))
    examples = stage.examples(seed)
    state = _fresh(ready, key, latest[stage.start] if stage.start else None, examples["inputs"])
    state, notes = _restored(ready, state, folder)
    teachers = tuple(latest[name] for name in stage.teachers)
    return Training(ready, seed, key, _view_key(seed), examples, teachers, state, notes, folder)


def train(
    together: Sequence[Training],
    run: Run,
    place: Callable[[Any], Array],
    save_every: float,
    evaluations: int,
    advance: Callable[[int], None],
) -> list[Trained]:
    """Trains students that stand at one step to their end, all at once."""
    ready, first = together[0].ready, together[0].notes["step"]
    stage = ready.stage
    advance(first)
    for one in together:
        run.rewind_metrics(one.seed, one.ready.stage.name, first)
    if first == stage.steps:
        return [_finished(one, one.state, one.notes, run) for one in together]
    course = _Course(together, run, place)
    evaluated = {-(-stage.steps * (i + 1) // evaluations) for i in range(evaluations)}
    stops = sorted({*evaluated, *range(0, stage.steps, ready.devices.chunk)})
    saved = time.monotonic()
    try:
        for since, number in itertools.pairwise([first, *(stop for stop in stops if stop > first)]):
            course.advance(range(since, number))
            advance(number - since)
            if number in evaluated:
                # Before the checkpoint: a record ahead of the newest one is rewound, a missing one would be lost.
                course.evaluate(number)
            if number == stage.steps or time.monotonic() - saved > save_every:
                course.save(number)
                saved = time.monotonic()
    except KeyboardInterrupt:
        course.save_if_whole(evaluated)
        raise
    return course.finished()


class _Course:
    """The training of one student, or of several at once, from one step to the next."""

    def __init__(self, together: Sequence[Training], run: Run, place: Callable[[Any], Array]) -> None:
        self.together, self.run, self.began = together, run, time.monotonic()
        self.devices, self.step = together[0].ready.devices, together[0].ready.advance
        self.select = _make_select(together)
        self.state, self.examples, self.teachers, self.key = _place(together, place)
        self.reached = [one.notes["validation_accuracy"] for one in together]
        self.seconds = [one.notes["seconds"] for one in together]
        self._forget([one.notes["losses"] for one in together])

    def advance(self, steps: Iterable[int]) -> None:
        """Takes steps, those at once that see batches of one width."""
        for width, chosen in itertools.groupby(map(self.select, steps), key=lambda selected: selected[0]):
            indices = np.stack([rows for _, rows in chosen])
            indices = indices if isinstance(self.devices, Population) else indices[:, 0]
            self.state, values = self.step(self.state, self.examples(width), indices, self.teachers, self.key)
            self.losses.append(values.reshape(len(values), -1))

    def evaluate(self, number: int) -> None:
        """Meets the validation split, and writes down how it went."""
        losses = self._losses()
        for i, (one, state) in enumerate(zip(self.together, self._states(), strict=True)):
            record = _evaluate(one, state, number, losses[i])
            self.run.append_metrics(record)
            self.reached[i] = record["validation_accuracy"]
        self._forget([[] for _ in self.together])

    def save(self, number: int) -> None:
        """Saves a checkpoint of each student, as if it trained alone."""
        # The losses since the last evaluation go along, so that the next record is that of an unbroken run.
        losses, share = self._losses(), (time.monotonic() - self.began) / len(self.together)
        self.seconds = [one.notes["seconds"] + share for one in self.together]
        states = self._states()
        if not is_first_host():
            return
        for i, one in enumerate(self.together):
            noted = {"seconds": self.seconds[i], "losses": losses[i].tolist(), "stage": one.ready.fingerprint}
            noted |= {"validation_accuracy": self.reached[i]}
            checkpoints.save(one.folder, number, jax.device_get(states[i]), notes=noted)

    def save_if_whole(self, evaluated: set[int]) -> None:
        """Saves where Ctrl-C left a training, unless it fell into a step, whose state is then gone."""
        if self.state.step.is_deleted():
            return
        number = int(self.state.step.ravel()[0])
        if number and sum(map(len, self.losses)) == number - max(
            (one for one in evaluated if one <= number), default=0
        ):
            self.save(number)

    def finished(self) -> list[Trained]:
        """What the students left."""
        told = [{"seconds": s, "validation_accuracy": r} for s, r in zip(self.seconds, self.reached, strict=True)]
        states = self._states()
        return [_finished(*each, self.run) for each in zip(self.together, states, told, strict=True)]

    def _states(self) -> list[TrainState]:
        if isinstance(self.devices, Population):
            return self.devices.unstack(self.state, len(self.together))
        return [local(self.state)]

    def _losses(self) -> np.ndarray:
        """Of each student since the last evaluation, `[P, K]`."""
        return np.ascontiguousarray(np.concatenate(jax.device_get(self.losses)).T)

    def _forget(self, losses: Sequence[Sequence[float]]) -> None:
        self.losses: list[Any] = [np.array(losses, np.float32).T]


def _make_select(together: Sequence[Training]) -> Callable[[int], tuple[int | None, np.ndarray]]:
    """Makes the function that says what a step sees: a width, and the numbers of its examples `[P, B]`."""
    size, widths = together[0].ready.stage.batch_size, together[0].ready.widths
    if widths is None:
        orders = [make_order(one.key, len(one.examples["inputs"]), size) for one in together]
        return lambda step: (None, np.stack([order(step) for order in orders]))
    lengths = [token_lengths(one.examples["inputs"]) for one in together]
    sorting = [make_bucketed_order(one.key, each, size) for one, each in zip(together, lengths, strict=True)]

    def select(step: int) -> tuple[int, np.ndarray]:
        rows = np.stack([order(step) for order in sorting])
        longest = max(each[chosen].max() for each, chosen in zip(lengths, rows, strict=True))
        return narrowest(widths, longest), rows

    return select


def _place(
    together: Sequence[Training], place: Callable[..., Array]
) -> tuple[TrainState, Callable[[int | None], Any], Any, Array]:
    """State, examples by the width to which they are cut, teachers and keys, where they are needed."""
    devices, states, keys = together[0].ready.devices, [one.state for one in together], [one.key for one in together]
    given = [(one.examples["inputs"], _others(one)) for one in together]
    teachers = [() if one.ready.stage.cache_teachers else one.teachers for one in together]

    @functools.cache
    def examples(width: int | None) -> Any:
        data = [jax.tree.map(place, others) | {"inputs": place(inputs, width)} for inputs, others in given]
        return devices.gather(data) if isinstance(devices, Population) else data[0]

    if isinstance(devices, Population):
        return devices.stack(states), examples, devices.gather(teachers), devices.stack(keys)
    return devices.place(states[0]), examples, devices.place_teacher(teachers[0]), keys[0]


def _others(one: Training) -> dict[str, Any]:
    """What else than the inputs the steps of a training find in a batch."""
    stage, given = one.ready.stage, {name: array for name, array in one.examples.items() if name != "inputs"}
    if stage.views is not None:
        count = len(one.examples["inputs"])
        given |= {"index": np.arange(count, dtype=np.int32), "examples": np.int32(count), "view_key": one.view_key}
    if stage.cache_teachers:
        key = None if stage.views is None else one.view_key  # what all seeds see, they may share
        asked = one.examples["inputs"], stage.augment, stage.views, key, stage.cache_top_k
        named = zip(stage.teachers, one.teachers, strict=True)
        given["teacher_logits"] = tuple(one.ready.answers[name](variables, *asked) for name, variables in named)
    return given


@functools.cache
def _view_key(seed: int) -> Array:
    """The key of a seed's views, which is that of all its stages."""
    return jax.random.fold_in(jax.random.key(seed), Purpose.VIEW)


def _fresh(ready: Ready, key: Array, start: dict | None, inputs: Array) -> TrainState:
    stage = ready.stage
    variables = ready.init(jax.random.fold_in(key, Purpose.INIT), inputs[:1])
    if start is not None:
        start = start if stage.transfer is None else stage.transfer(start, variables)
        _check_same_tree(stage, start, variables)
        variables = start
    loss_params = None if stage.init_loss is None else stage.init_loss(jax.random.fold_in(key, Purpose.LOSS))
    return make_state(variables, stage.tx, loss_params=loss_params, loss_tx=stage.loss_tx)


def _restored(ready: Ready, state: TrainState, folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """The state to go on from and the notes that were saved with it, its step among them."""
    try:
        found = checkpoints.restore(folder, state) if is_first_host() else None
    except ValueError as error:
        raise RunError(f"{error}: it belongs to another plan; name another folder for the run") from error
    notes: dict[str, Any] = {"step": 0, "seconds": 0.0, "losses": [], "validation_accuracy": None}
    if found is not None:
        notes, state = notes | found.notes | {"step": found.step}, found.tree
    notes, state = tell_all(notes, state)
    if notes["step"] and notes["stage"] != ready.fingerprint:
        raise RunError(
            f"{folder} holds another training ({notes['stage']} there, {ready.fingerprint} here): "
            "name another folder for the run"
        )
    return jax.tree.map(jnp.asarray, state), notes


def _finished(one: Training, state: TrainState, notes: Mapping[str, Any], run: Run) -> Trained:
    stage, records = one.ready.stage, {(each["seed"], each["stage"], each["step"]) for each in run.metrics()}
    if is_first_host() and (one.seed, stage.name, stage.steps) not in records:
        raise RunError(
            f"{run.folder}/metrics.jsonl has lost the records of {stage.name}, seed {one.seed}: "
            f"delete {one.folder} to train it anew"
        )
    return Trained(jax.tree.map(jnp.asarray, state.variables), notes["seconds"], notes["validation_accuracy"])


def _evaluate(one: Training, state: TrainState, number: int, losses: np.ndarray) -> dict[str, Any]:
    stage, loss = one.ready.stage, float(np.mean(losses))
    score = one.ready.score(jax.tree.map(jnp.asarray, state.variables))
    if not np.isfinite(loss) or not np.isfinite(score.loss):
        raise RunError(
            f"{stage.name}, seed {one.seed}: the loss is {loss} by step {number}, and training has diverged; "
            "try a smaller learning rate"
        )
    return {
        "seed": one.seed,
        "stage": stage.name,
        "step": number,
        "epoch": number * stage.batch_size / len(one.examples["inputs"]),
        "loss": loss,
        "validation_loss": score.loss,
        "validation_accuracy": score.accuracy,
    }


def _check_same_tree(stage: Stage, start: dict, fresh: dict) -> None:
    there, here = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (start, fresh)
    )
    differing = sorted(path for path in there.keys() | here.keys() if there.get(path) != here.get(path))
    if differing:
        listed = "; ".join(f"{path} is {there.get(path)} there and {here.get(path)} here" for path in differing)
        raise ValueError(f"stage {stage.name!r} cannot start from {stage.start!r}: {listed}")
