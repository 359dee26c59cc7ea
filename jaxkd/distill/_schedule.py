"""The order of the trainings of a plan, and the groups that train in one program."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxkd.distill._compile import CompiledStage

Job = tuple[CompiledStage, int]
"""A stage and a seed."""

Round = list[list[Job]]
"""Groups of jobs, one after another. Arrays stay on the devices until the round ends."""


def make_schedule(
    stages: Sequence[CompiledStage], seeds: Sequence[int], max_students: int
) -> list[Round]:
    """Schedules every stage for every seed.

    Args:
        stages: The compiled stages, each after those it learns from.
        seeds: The seeds.
        max_students: Largest number of students in a group.

    Returns:
        One round per seed if students train alone. Otherwise one round per program, in which groups
        hold the seeds and the stages that share it.
    """
    if max_students == 1 or not seeds:
        # Seed by seed, so that a run that is stopped early holds whole seeds to compare.
        return [[[(stage, seed)] for stage in stages] for seed in seeds]
    levels = _find_levels(stages)
    programs: dict[Any, list[CompiledStage]] = {}
    for stage in stages:
        shapes = _shapes(stage.stage.examples(seeds[0]))
        # Stages of a program may still depend on each other, as born-again generations do.
        level = levels[stage.stage.name]
        programs.setdefault((stage.multi_step, shapes, level), []).append(stage)
    rounds = []
    for sharing in sorted(programs.values(), key=lambda group: levels[group[0].stage.name]):
        # Seeds come first: the cached logits of a seed's teacher serve one student after another.
        jobs = [(stage, seed) for seed in seeds for stage in sharing]
        rounds.append([jobs[i : i + max_students] for i in range(0, len(jobs), max_students)])
    return rounds


def _find_levels(stages: Sequence[CompiledStage]) -> dict[str, int]:
    """Returns the length of the longest chain of stages that each stage learns from, by name."""
    levels: dict[str, int] = {}
    for stage in stages:
        # Pretrained models have no level: they are there before any stage.
        needed = [levels[name] for name in stage.stage.needs if name in levels]
        levels[stage.stage.name] = 1 + max(needed, default=-1)
    return levels


def _shapes(examples: Mapping[str, Any]) -> frozenset[tuple]:
    return frozenset(
        (name, jnp.shape(array), jnp.result_type(array)) for name, array in examples.items()
    )
