"""The training loop of a group of students that share a program.

Without a vectorised placement, a group is one student.
"""

import functools
import heapq
import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.data.bucketing import LengthBuckets
from jaxkd.data.records import is_streamed
from jaxkd.distill import _diagnosis
from jaxkd.distill._batches import BatchSelector, DeviceArrays, count_examples
from jaxkd.distill._best import BestSoFar
from jaxkd.distill._metric_buffer import MetricBuffer
from jaxkd.distill._requirements import named_arrays
from jaxkd.distill._save_clock import SaveClock
from jaxkd.distill._stage_run import (
    RunGroup,
    StageRun,
    TrainedModel,
    make_trained,
    pack_arrays,
)
from jaxkd.distill._stream import BatchStream
from jaxkd.distill._validation import (
    Evaluation,
    Validator,
    check_evaluation,
    describe_scores,
)
from jaxkd.distill.distributed import broadcast_from_primary, is_primary_process
from jaxkd.distill.placement import Placement, StreamingPlacement
from jaxkd.distill.step import BatchInfo, TrainState
from jaxkd.distill.teacher_cache import TeacherCache
from jaxkd.evaluate import describe_labels
from jaxkd.runs import Run, RunError, checkpoints


class TrainingLoop:
    """Trains a group from its current step to the end.

    Attributes:
        group: The runs that train together.
        ends: The last step of each of them; some may end early.
    """

    _stream: BatchStream | None = None

    def __init__(
        self,
        group: RunGroup,
        run: Run,
        *,
        placement: Placement,
        arrays: DeviceArrays,
        teacher_cache: TeacherCache,
        buckets: LengthBuckets | None,
        validator: Validator,
        save_every: float,
        keep: int,
        evaluations: int,
    ) -> None:
        """Takes the group and its surroundings. Nothing is put onto the devices yet.

        Args:
            group: The runs that train together.
            run: Takes the metrics and checkpoints.
            placement: Where the group trains.
            arrays: The arrays that are on the devices already.
            teacher_cache: The cached logits of teachers.
            buckets: The lengths to which batches of tokens are cut.
            validator: Evaluates the students.
            save_every: Seconds between two checkpoints.
            keep: Number of the newest checkpoints that are kept.
            evaluations: Number of evaluations over the whole training.
        """
        self.group = group
        self._run = run
        self._placement = placement
        self._arrays = arrays
        self._teacher_cache = teacher_cache
        self._buckets = buckets
        self._validator = validator
        self._save_every = save_every
        self._keep = keep
        # There is at most one evaluation after a step.
        self._evaluations = min(evaluations, group.steps)
        self._seconds = [stage_run.progress.seconds for stage_run in group.stage_runs]
        self._scores: list[Any] = [stage_run.progress.scores for stage_run in group.stage_runs]
        self._bests = [BestSoFar(stage_run) for stage_run in group.stage_runs]
        self.ends = [
            group.first_step if group.is_finished else group.steps for _ in group.stage_runs
        ]
        self._metrics = MetricBuffer(
            placement, [stage_run.progress.metrics for stage_run in group.stage_runs]
        )
        # A shorter training was evaluated at other steps than the one that goes on with it.
        self._evaluated_step = group.first_step - group.stage_runs[0].progress.num_losses

    @property
    def last_step(self) -> int:
        """The last step that any student takes."""
        return max(self.ends)

    def train(
        self,
        on_advance: Callable[[int], None],
        on_evaluate: Callable[[int, float, str], None] | None = None,
    ) -> list[TrainedModel]:
        """Takes all remaining steps, with evaluations and checkpoints.

        Args:
            on_advance: Called with the number of steps taken since its last call.
            on_evaluate: Called after an evaluation with the step, and with the mean over the
                students of the training loss since the last evaluation and of the scores, as text.

        Returns:
            The trained model of each run of the group.

        Raises:
            RunError: If a loss is not finite, the loss reads a label that is no class of the
                student, or the records of a finished training are lost.
            ValueError: If the scores lack the one by which a stage names its best.
        """
        group = self.group
        for stage_run in group.stage_runs:
            # Records after the checkpoint belong to steps that are taken again.
            self._run.rewind_metrics(stage_run.seed, stage_run.stage.name, group.first_step)
        if group.is_finished:
            return self._collect([stage_run.state for stage_run in group.stage_runs])
        self._put_on_devices()
        try:
            if not group.first_step:
                self._try_suspects()
                self._check_bests()
            clock = SaveClock(self._save_every)
            for step, next_step in itertools.pairwise(self._stops()):
                self._take_steps(range(step, next_step))
                on_advance(next_step - step)
                if next_step == self._last_evaluation(next_step):
                    # Evaluate before saving: on a restart, a record newer than the checkpoint is
                    # dropped and written again, while a missing one would be lost.
                    records = self._evaluate(next_step)
                    if on_evaluate is not None:
                        on_evaluate(next_step, *self._average(records))
                # Students that ended early have this step's checkpoint as their last one.
                if next_step in self.ends or clock.is_due():
                    self._save(next_step)
                    clock.restart()
                if next_step == self.last_step:
                    break
        except KeyboardInterrupt:
            self._save_if_consistent()
            raise
        finally:
            if self._stream is not None:
                self._stream.close()
        return self._collect(self._get_states())

    def _stops(self) -> Iterator[int]:
        """Yields the first step, and the steps at which control returns to the host."""
        first, last = self.group.first_step, self.group.steps
        per_call = (self._stream or self._placement).steps_per_call
        # Two sorted iterators, because there may be too many steps for a list.
        calls = range(first // per_call * per_call, last, per_call)
        evaluations = map(
            self._evaluation_step,
            range(first * self._evaluations // last + 1, self._evaluations + 1),
        )
        yield first
        for stop, _ in itertools.groupby(heapq.merge(calls, evaluations)):
            if stop > first:
                yield stop

    def _evaluation_step(self, number: int) -> int:
        """Returns the step of an evaluation; the last one is at the last step."""
        # Rounded up, so that none is at step 0.
        return -(-self.group.steps * number // self._evaluations)

    def _last_evaluation(self, step: int) -> int:
        """Returns the step of the last evaluation up to a step, or 0 before the first."""
        return self._evaluation_step(step * self._evaluations // self.group.steps)

    def _put_on_devices(self) -> None:
        group, placement = self.group, self._placement
        examples = [self._prepare(stage_run) for stage_run in group.stage_runs]
        teachers = []
        for stage_run in group.stage_runs:
            teachers.append(() if stage_run.stage.cache_teachers else stage_run.teachers)
        self._examples = examples
        self._selector = BatchSelector(
            [stage_run.order_key for stage_run in group.stage_runs],
            [batch["inputs"] for batch, _ in examples],
            group.batch_size,
            self._buckets,
            has_views=any(run.stage.views is not None for run in group.stage_runs),
        )
        self._stream = self._make_stream(*examples[0])
        # One entry per bucket length. Without buckets, the only key is `None`.
        self._put_examples = functools.cache(functools.partial(self._put_cut_examples, examples))
        self._state = placement.put_states([stage_run.state for stage_run in group.stage_runs])
        self._teachers = placement.put_teachers(teachers)
        self._keys = placement.put_keys([stage_run.key for stage_run in group.stage_runs])
        self._started = time.monotonic()

    def _make_stream(self, examples: Mapping[str, Any], info: BatchInfo) -> BatchStream | None:
        """Makes what reads the batches of streamed data; `None` for arrays in memory."""
        if not is_streamed(examples):
            return None
        return BatchStream(
            examples,
            info,
            # A placement that streams trains one student at a time.
            lambda step: self._selector.select(step)[1][0],
            range(self.group.first_step, self.group.steps),
            batch_size=self.group.batch_size,
            placement=cast(StreamingPlacement, self._placement),
            put_scalar=self._arrays.get,
            state=self.group.stage_runs[0].progress.records,
        )

    def _put_cut_examples(
        self, examples: Sequence[tuple[Mapping[str, Any], BatchInfo]], length: int | None
    ) -> Any:
        """Puts the examples onto the devices, with their inputs cut to a bucket length."""
        on_devices = []
        for arrays, info in examples:
            others = {name: array for name, array in arrays.items() if name != "inputs"}
            inputs = jax.tree.map(lambda array: self._arrays.get(array, length), arrays["inputs"])
            # Only inputs have a token axis to cut.
            others, info = jax.tree.map(self._arrays.get, (others, info))
            on_devices.append((others | {"inputs": inputs}, info))
        return self._placement.put_examples(on_devices)

    def _prepare(self, stage_run: StageRun) -> tuple[Mapping[str, Any], BatchInfo]:
        """Returns the user's arrays, and apart from them what the library adds."""
        stage = stage_run.stage
        inputs = stage_run.examples["inputs"]
        info = BatchInfo()
        if stage.views is not None:
            # The same objects for all stages, which `DeviceArrays` finds by their identity.
            index, num_examples = _make_index(count_examples(inputs))
            info = BatchInfo(index, num_examples, stage_run.view_key)
        if stage.cache_teachers:
            outputs = []
            for name, variables in stage_run.other_teachers.items():
                outputs.append(
                    self._teacher_cache.get(
                        name,
                        variables,
                        inputs,
                        augment=stage.augment,
                        num_views=stage.views,
                        # Without views, the outputs do not depend on the seed's key.
                        view_key=None if stage.views is None else stage_run.view_key,
                        parts=stage.cached_parts,
                    )
                )
            info = info._replace(
                teacher_logits=tuple(cached.logits for cached in outputs),
                teacher_features=tuple(cached.features for cached in outputs),
            )
        return stage_run.examples, info

    def _try_suspects(self) -> None:
        """Computes the loss of examples that may be unsound, before the first step.

        Raises:
            RunError: If the loss reads a label that is no class of the student, or is not finite
                for the smallest and the largest tokens.
        """
        tried = set()
        for i, stage_run in enumerate(self.group.stage_runs):
            # Students of a program read equal examples in the same way.
            shared = tuple(id(array) for _, array in named_arrays(stage_run.examples))
            if shared in tried:
                continue
            tried.add(shared)
            self._try_labels(i, stage_run)
            rows = _diagnosis.find_extreme_tokens(stage_run.examples["inputs"])
            if len(rows) and not np.isfinite(self._try_rows(i, rows)):
                cause = self._find_cause(stage_run)
                tokens = _diagnosis.describe_tokens(stage_run.examples["inputs"])
                raise RunError(
                    f"{stage_run.label}: the loss is not finite before the first step: "
                    + (cause or f"is one of {tokens}, outside of the vocabulary of its model?")
                )

    def _try_labels(self, i: int, stage_run: StageRun) -> None:
        labels = _diagnosis.get_labels(stage_run.examples)
        if labels is None:
            return
        num_classes = _diagnosis.count_classes(stage_run.stage.model, stage_run.examples["inputs"])
        rows = _diagnosis.find_unknown_labels(labels, num_classes)
        if not len(rows):
            return
        replace = functools.partial(_diagnosis.replace_unknown_labels, labels, num_classes)
        loss, read, other = (
            self._try_rows(i, rows, labels=candidate)
            for candidate in (labels, replace(), replace(shift=1))
        )
        # A loss that masks these labels is finite, and not that of the class that JAX would read.
        is_masked = np.isfinite(loss) and (loss != read or read == other)
        if not is_masked and np.isfinite(read):
            raise RunError(
                f"{stage_run.label}: {describe_labels(labels, num_classes)}, and the loss reads "
                "them: number the classes from 0, give the model more classes, or mask such labels "
                "in the loss, with where=labels >= 0 or with alpha=1"
            )

    def _try_rows(self, i: int, rows: np.ndarray, *, labels: np.ndarray | None = None) -> float:
        """Returns the mean loss of a student for some of its examples. The state stays as it is."""
        group = self.group
        load = self._load_rows(i, rows, labels)
        losses = []
        for start in range(0, len(rows), group.batch_size):
            batch = np.resize(rows[start : start + group.batch_size], group.batch_size)
            examples, indices = load(batch)
            # A copy each time, since a step donates its state.
            states = [
                jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), stage_run.state)
                for stage_run in group.stage_runs
            ]
            _, metrics = group.multi_step(
                self._placement.put_states(states), examples, indices, self._teachers, self._keys
            )
            losses.append(self._placement.get_metrics([metrics], len(group))["loss"][0, i])
        return float(np.mean(losses))

    def _load_rows(
        self, i: int, rows: np.ndarray, labels: np.ndarray | None
    ) -> Callable[[np.ndarray], tuple[Any, np.ndarray]]:
        """Returns `batch of rows -> (examples on the devices, indices)`; see `_try_rows`."""
        if self._stream is not None:
            return functools.partial(self._stream.load_scanned, labels=labels)
        length = self._selector.choose_length(i, rows)
        examples = self._put_examples(length)
        if labels is not None:
            # All students get the labels, since those that share an array must go on doing so.
            arrays = [({**batch, "labels": labels}, info) for batch, info in self._examples]
            examples = self._put_cut_examples(arrays, length)
        return lambda batch: (examples, np.tile(batch, (1, len(self.group), 1)))

    def _find_cause(self, stage_run: StageRun, step: int | None = None) -> str:
        """Describes why a loss is not finite; an empty string if labels and teachers are sound.

        Of streamed data, the batch of a step is searched, or a sample.
        """
        examples = stage_run.examples
        if self._stream is not None and step is not None:
            examples = self._stream.read_batch(step - 1)
        inputs, teachers = examples["inputs"], stage_run.other_teachers
        some_inputs = jax.tree.map(lambda array: array[: _diagnosis.MAX_TEACHER_EXAMPLES], inputs)
        logits = {
            name: self._teacher_cache.predict(name, variables, some_inputs)
            for name, variables in teachers.items()
        }
        return _diagnosis.find_cause(examples, teachers, logits)

    def _take_steps(self, steps: range) -> None:
        """Takes steps. Consecutive steps in the same bucket are one call."""
        if self._stream is not None:
            self._take_calls([self._stream.take(steps)])
            # Each step on the way to the devices holds a batch.
            self._metrics.wait_for_previous()
            return
        batches = map(self._selector.select, steps)
        self._take_calls(
            (self._put_examples(length), np.stack([rows for _, rows in selected]))
            for length, selected in itertools.groupby(batches, key=lambda batch: batch[0])
        )

    def _take_calls(self, calls: Iterable[tuple[Any, np.ndarray]]) -> None:
        """Takes the steps of calls, each with its examples on the devices and its indices."""
        for examples, indices in calls:
            self._state, metrics = self.group.multi_step(
                self._state, examples, indices, self._teachers, self._keys
            )
            self._metrics.append(metrics)

    def _check_bests(self) -> None:
        """Raises `ValueError` if a stage names a score that there is not, before the first step."""
        # Those of classifiers are known, and checked before anything is compiled.
        if self._validator.is_of_classes:
            return
        for stage_run, best in zip(self.group.stage_runs, self._bests, strict=True):
            if stage_run.stage.best is not None:
                variables = stage_run.state.average_variables
                best.check(self._validator.score(stage_run.stage.name, variables))

    def _evaluate(self, step: int) -> list[dict[str, Any]]:
        """Scores every student on the validation split, and records and returns the results."""
        metrics = self._metrics.get()
        records = []
        for i, state in enumerate(self._get_states()):
            stage_run = self.group.stage_runs[i]
            if self._bests[i].is_stopped:
                continue
            # Records are appended in the order of the group, so that an unbroken run repeats the
            # file.
            self._check_losses(stage_run, metrics[i]["loss"], step)
            variables = jax.tree.map(jnp.asarray, state.average_variables)
            evaluation = self._evaluate_student(stage_run, variables, step, metrics[i]["loss"])
            record = _make_record(stage_run, step, metrics[i], evaluation)
            self._run.append_metrics(record)
            self._scores[i] = evaluation.scores
            records.append(record)
            self._update_best(i, step, variables)
        self._metrics.reset()
        self._evaluated_step = step
        return records

    def _update_best(self, i: int, step: int, variables: Any) -> None:
        """Notes whether the last evaluation of a student is its best, and ends its training."""
        best, scores = self._bests[i], self._scores[i]
        # Processes that decided otherwise would wait for each other.
        is_better, _ = broadcast_from_primary(best.is_better(scores), ())
        best.update(step, scores, variables, better=is_better)
        if best.is_stopped:
            self.ends[i] = step

    def _evaluate_student(
        self, stage_run: StageRun, variables: Any, step: int, losses: np.ndarray
    ) -> Evaluation:
        """Evaluates a student. Raises `RunError` if a score is not finite."""
        evaluation = self._validator.evaluate(
            stage_run.stage.name, variables, stage_run.other_teachers
        )
        check_evaluation(
            evaluation, stage_run.label, step, variables, losses, self._validator.examples
        )
        return evaluation

    def _check_losses(self, stage_run: StageRun, losses: np.ndarray, step: int) -> None:
        """Raises `RunError` with the first loss that is not finite, and its cause."""
        unsound = np.flatnonzero(~np.isfinite(losses))
        if not len(unsound):
            return
        first = step - len(losses) + int(unsound[0]) + 1
        message = f"{stage_run.label}: the loss is {losses[unsound[0]]} in step {first}"
        if cause := self._find_cause(stage_run, first):
            where = "" if self._stream is None else "of its batch, "
            raise RunError(f"{message}: {where}{cause}")
        if first == 1:
            raise RunError(
                f"{message}, before any weight has changed, and inputs and teachers are finite ("
                f"{_diagnosis.describe_ranges(stage_run.examples)}): evaluate the student, whose "
                "max_value may be that of another scale, and the terms of its loss on one batch"
            )
        raise RunError(
            f"{message}, and training has diverged, since inputs and teachers are sound; try a "
            "smaller learning rate, unless a schedule takes a number of the loss out of its range"
        )

    def _save(self, step: int) -> None:
        """Saves a checkpoint of each student, as if it trained alone."""
        # The losses since the last evaluation are saved, so that the next record of a resumed run
        # equals that of an unbroken run.
        metrics = self._metrics.get()
        # Students of one program train at once, and each is charged an equal share of the time.
        share = (time.monotonic() - self._started) / len(self.group)
        # Orbax could write the parts of several processes at once, but only into a folder that all
        # of them see. Only the primary process need see that of a run, so it gets the states.
        states = self._get_states()
        for i, stage_run in enumerate(self.group.stage_runs):
            if self.ends[i] < step:
                continue
            self._seconds[i] = stage_run.progress.seconds + share
            if is_primary_process():
                self._run.check_folder()
                notes = {
                    "seconds": self._seconds[i],
                    "metrics": {name: values.tolist() for name, values in metrics[i].items()},
                    "stage": stage_run.fingerprint,
                    "scores": self._scores[i],
                    "records": None if self._stream is None else self._stream.state,
                }
                arrays = pack_arrays(states[i], self._bests[i].variables)
                try:
                    checkpoints.save(
                        stage_run.folder,
                        step,
                        jax.device_get(arrays),
                        notes=notes | self._bests[i].to_notes(),
                        identity=stage_run.identity,
                        keep=self._keep,
                    )
                finally:
                    # A save fails, or makes the folder again, if that was deleted during it.
                    self._run.check_folder()

    def _save_if_consistent(self) -> None:
        """Saves a checkpoint on Ctrl-C, unless the interrupt hit inside a step.

        A step donates its state: an interrupted one has deleted the old state without returning the
        new one, or has returned it without its losses being kept.
        """
        counter = self._state.step
        # The parts of other processes cannot be had: not all of them need have been interrupted.
        is_whole = counter.is_fully_addressable or counter.is_fully_replicated
        if counter.is_deleted() or not is_whole:
            return
        # A vectorised state has one counter per student; all of them are equal.
        step = int(counter.addressable_data(0).ravel()[0])
        is_recorded = self._evaluated_step >= self._last_evaluation(step)
        if step and is_recorded and self._metrics.num_steps == step - self._evaluated_step:
            self._save(step)

    def _collect(self, states: Sequence[TrainState]) -> list[TrainedModel]:
        """Returns the trained models, after a check that their records are there."""
        self._check_records()
        models = []
        for i, state in enumerate(states):
            best, step, scores = self._bests[i], self.ends[i], self._scores[i]
            variables: Any = state.average_variables
            if best.scores is not None:
                variables, step, scores = best.variables, best.step, best.scores
            # Students of a vectorised group come as NumPy arrays. Those who learn from them expect
            # JAX's.
            variables = jax.tree.map(jnp.asarray, variables)
            models.append(make_trained(variables, self._seconds[i], scores, step))
        return models

    def _check_records(self) -> None:
        """Raises a `RunError`, on all processes, if the last record of a training is missing."""
        lost = ""
        if is_primary_process():
            recorded = {(r["seed"], r["stage"], r["step"]) for r in self._run.metrics()}
            for stage_run, end in zip(self.group.stage_runs, self.ends, strict=True):
                if (stage_run.seed, stage_run.stage.name, end) not in recorded:
                    lost = (
                        f"{self._run.folder}/metrics.jsonl has lost the records of "
                        f"{stage_run.label}: delete {stage_run.folder} to train it again"
                    )
                self._warn_of_standstill(stage_run)
        lost, _ = broadcast_from_primary(lost, ())
        if lost:
            raise RunError(lost)

    def _warn_of_standstill(self, stage_run: StageRun) -> None:
        """Warns if no evaluation of a training differs from another: no weight has changed."""
        scores = [
            tuple(value for name, value in record.items() if name.startswith("validation_"))
            for record in self._run.metrics()
            if (record["seed"], record["stage"]) == (stage_run.seed, stage_run.stage.name)
        ]
        # A plan's own score may be a constant, but hardly in both.
        if len(scores) > 1 and len({*scores}) == 1:
            warnings.warn(
                f"{stage_run.label}: all {len(scores)} evaluations have the same loss and "
                "accuracy, as if nothing was learnt: has the loss a gradient, and the optimizer a "
                "learning rate and parameters that are not frozen?",
                stacklevel=2,
            )

    def _get_states(self) -> list[TrainState]:
        return self._placement.get_states(self._state, len(self.group))

    def _average(self, records: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
        """Returns the mean training loss of a group, and its mean scores as text."""
        scores = {
            name: float(np.mean([scores[name] for scores in self._scores]))
            for name in self._scores[0]
        }
        return float(np.mean([record["loss"] for record in records])), describe_scores(scores)


@functools.cache
def _make_index(count: int) -> tuple[np.ndarray, np.int32]:
    """Returns the indices of all examples and their number, the same arrays for every stage."""
    return np.arange(count, dtype=np.int32), np.int32(count)


def _make_record(
    stage_run: StageRun, step: int, metrics: Mapping[str, np.ndarray], evaluation: Evaluation
) -> dict[str, Any]:
    """Returns the record of an evaluation, for `metrics.jsonl`."""
    means = {name: float(np.mean(values)) for name, values in metrics.items()}
    record: dict[str, Any] = {
        "seed": stage_run.seed,
        "stage": stage_run.stage.name,
        "step": step,
        "epoch": step * stage_run.stage.batch_size / count_examples(stage_run.examples["inputs"]),
        "loss": means.pop("loss"),
    }
    record |= {f"validation_{name}": value for name, value in evaluation.scores.items()}
    if means:
        # A term may be NaN where the loss leaves it out. JSON has no such number.
        record["terms"] = {n: mean if np.isfinite(mean) else None for n, mean in means.items()}
    if evaluation.teachers:
        record["teachers"] = evaluation.teachers
    return record
