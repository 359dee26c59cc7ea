"""The order of the trainings of a plan, and the groups that train in one program."""

import collections
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxkd.distill._compile import CompiledStage, group_by_program
from jaxkd.distill._requirements import named_arrays
from jaxkd.distill.plan import Entry, Stage, needed_stages, order

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
    levels = _find_levels({stage.stage.name: stage.needed_stages for stage in stages})
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


def count_concurrent_stages(plan: Sequence[Entry], seed: int = 0) -> int:
    """Counts the stages that can train together, at most, for each seed.

    They share a program, have as many examples, and do not learn from each other.

    Args:
        plan: Stages and pretrained models in any order.
        seed: A seed whose examples have the shapes of every seed's.

    Returns:
        The largest number; 0 for a plan without a stage.
    """
    entries = {entry.name: entry for entry in order(plan)}
    levels = _find_levels(
        {
            name: needed_stages(entries, name)
            for name, entry in entries.items()
            if isinstance(entry, Stage)
        }
    )
    groups = [
        collections.Counter((levels[stage.name], _shapes(stage.examples(seed))) for stage in group)
        for group in group_by_program(plan, seed)
    ]
    return max((count for group in groups for count in group.values()), default=0)


def _find_levels(needed_stages: Mapping[str, Collection[str]]) -> dict[str, int]:
    """Returns the length of the longest chain of stages that each stage learns from, by name.

    Args:
        needed_stages: The stages that each stage learns or starts from, in an order in which they
            come before it.
    """
    levels: dict[str, int] = {}
    for name, needed in needed_stages.items():
        levels[name] = 1 + max((levels[other] for other in needed), default=-1)
    return levels


def _shapes(examples: Mapping[str, Any]) -> frozenset[tuple]:
    return frozenset(
        (name, jnp.shape(array), jnp.result_type(array)) for name, array in named_arrays(examples)
    )
