"""Keeps the trainings that a run holds already, and trains the rest round by round."""

from collections.abc import Callable, Sequence
from pathlib import Path

from jaxkd._files import measure_disk_use
from jaxkd._messages import format_bytes
from jaxkd.distill._batches import DeviceArrays
from jaxkd.distill._compile import CompiledStage
from jaxkd.distill._derived import Deriver
from jaxkd.distill._identity import TrainingDescriber
from jaxkd.distill._loop import TrainingLoop
from jaxkd.distill._progress import PlanProgress
from jaxkd.distill._schedule import Round
from jaxkd.distill._stage_run import (
    RunGroup,
    StageRun,
    TrainedModel,
    group_by_step,
    start_or_resume,
)
from jaxkd.distill._validation import describe_scores
from jaxkd.distill.distributed import broadcast_from_primary, is_primary_process
from jaxkd.distill.placement import Placement
from jaxkd.runs import Run
from jaxkd.runs.growth import (
    Training,
    delete_set_aside,
    find_trainings,
    record_growth,
    set_aside,
)
from jaxkd.runs.run import read_run


class Trainer:
    """Trains the stages of a plan into a run."""

    def __init__(
        self,
        run: Run,
        placement: Placement,
        trained: dict[str, dict[int, TrainedModel]],
        describer: TrainingDescriber,
        make_loop: Callable[..., TrainingLoop],
        deriver: Deriver,
        progress: PlanProgress,
    ) -> None:
        """Takes the surroundings of the trainings.

        Args:
            run: The run.
            placement: Where groups train.
            trained: The models by name and seed, to which those of the plan are added.
            describer: Describes trainings, so that their checkpoints are known from others.
            make_loop: `(group, arrays=...) -> TrainingLoop`.
            deriver: Makes the models that come from trained ones.
            progress: Prints the lines.
        """
        self._run = run
        self._placement = placement
        self._trained = trained
        self._describer = describer
        self._make_loop = make_loop
        self._deriver = deriver
        self._progress = progress
        self._remarks: set[str] = set()

    def keep_finished(self, stages: Sequence[CompiledStage], seeds: Sequence[int]) -> int:
        """Adds what the run holds already to the models, and prints what is left to train.

        A stage whose teacher is left to train counts as left, too. It is read in its turn, and kept
        if the teacher comes out as it was.

        Args:
            stages: The stages, each after those it learns from.
            seeds: The seeds.

        Returns:
            The number of trainings that are kept.
        """
        for seed in seeds:
            self._deriver.complete(seed)  # from pretrained models
        jobs = [(stage, seed) for seed in seeds for stage in stages]
        held = self._find_held([(seed, stage.stage.name) for stage, seed in jobs])
        num_kept = num_resumed = 0
        for stage, seed in jobs:
            if (seed, stage.stage.name) not in held or not self._has_teachers(stage, seed):
                continue
            stage_run = self._start(stage, seed)
            if stage_run.is_finished:
                self._train_group(RunGroup([stage_run]), DeviceArrays(self._placement.put_array))
                num_kept += 1
            elif stage_run.progress.step:
                num_resumed += 1
        if self._run.grow and is_primary_process():
            record_growth(self._run, trains=num_kept < len(jobs))
        if held:
            num_trained = len(jobs) - num_kept - num_resumed
            self._progress.report(
                [
                    f"keeps {num_kept:,} of {len(jobs):,} trainings, goes on with "
                    f"{num_resumed:,}, trains {num_trained:,}"
                ]
            )
        return num_kept

    def train(self, round_: Round) -> None:
        """Trains the groups of a round, one after another, and adds their models."""
        # The arrays of a round are dropped together at its end: the next round has another seed's
        # examples or another program.
        arrays = DeviceArrays(self._placement.put_array)
        for jobs in round_:
            stage_runs = [
                self._start(stage, seed) for stage, seed in jobs if not self._is_kept(stage, seed)
            ]
            # A resumed group may be split, because each student has a checkpoint of its own.
            for group in group_by_step(stage_runs):
                self._train_group(group, arrays)

    def _find_held(self, wanted: Sequence[Training]) -> set[Training]:
        """Returns the trainings of the plan that the run may hold, on every process.

        If the configuration has changed, those that it lacks are set aside: the records of the run
        are those of its configuration.
        """
        found: list[Training] = []
        if is_primary_process():
            found = find_trainings(self._run)
            if read_run(self._run.folder).describe_changes(self._run.config):
                for seed, stage in set(found) - set(wanted):
                    set_aside(self._run, seed, stage)
        found, _ = broadcast_from_primary(found, ())
        return {(seed, stage) for seed, stage in found} & set(wanted)

    def _is_kept(self, stage: CompiledStage, seed: int) -> bool:
        return seed in self._trained[stage.stage.name]

    def _has_teachers(self, stage: CompiledStage, seed: int) -> bool:
        """Returns whether all that a stage learns or starts from is there."""
        return all(seed in self._trained[name] for name in stage.stage.needs)

    def _start(self, stage: CompiledStage, seed: int) -> StageRun:
        stage_run = start_or_resume(stage, seed, self._trained, self._run, self._describer)
        line = f"{stage_run.label}: {stage_run.remark}"
        # A training that goes on is read twice: for the first line, and in its turn.
        if stage_run.remark and line not in self._remarks:
            self._remarks.add(line)
            self._progress.report([line])
        return stage_run

    def _train_group(self, group: RunGroup, arrays: DeviceArrays) -> None:
        self._progress.start_group(group.label, group.steps, len(group))
        self._progress.advance(group.first_step, restored=True)
        loop = self._make_loop(group, arrays=arrays)
        models = loop.train(self._progress.advance, self._progress.report_evaluation)
        for stage_run, model in zip(group.stage_runs, models, strict=True):
            self._trained[stage_run.stage.name][stage_run.seed] = model
            self._deriver.complete(stage_run.seed)
            if not group.is_finished and is_primary_process():
                delete_set_aside(self._run, stage_run.seed, stage_run.stage.name)
        # Those that an early end has spared. They took no time.
        self._progress.advance(group.steps - loop.last_step, restored=True)
        self._progress.end_group(_describe_results(group, models, loop.ends))


def describe_disk_use(folder: Path) -> str:
    """Returns a line on the disk use of a run."""
    return f"{folder} uses {format_bytes(measure_disk_use(folder))}"


def _describe_results(
    group: RunGroup, models: Sequence[TrainedModel], ends: Sequence[int]
) -> list[str]:
    """Returns a line for each training of a group, of which the last steps are given."""
    lines = []
    for stage_run, model, end in zip(group.stage_runs, models, ends, strict=True):
        # Nothing was trained, so that seconds and accuracy are those of an earlier call.
        if group.is_finished:
            lines.append(f"{stage_run.label}: already trained")
            continue
        resumed = f", resumed at step {group.first_step}" if group.first_step else ""
        early = " (ended early)" if end < group.steps else ""
        best = f", the best of {end}{early}," if stage_run.stage.best else ""
        lines.append(
            f"{stage_run.label}: {describe_scores(model.scores)} after {model.step} steps{best} "
            f"and {model.seconds:.1f} s{resumed}"
        )
    return lines
