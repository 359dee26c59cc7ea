"""The order of trainings, and which of them train in one program."""

import chex
import numpy as np
import pytest

from jaxkd import distill
from jaxkd.distill._compile import CompiledStage
from jaxkd.distill._schedule import make_schedule
from small_plans import (
    TRAIN,
    get_variables,
    make_stage,
    soft_loss,
    train,
    vectorized_placement,
)


def make_compiled(name, program="program", **options):
    """Makes a compiled stage whose program is a name."""
    stage = make_stage(name, **options)
    return CompiledStage(stage, program, None, frozenset(stage.needs), {}, None, None)


def schedule(stages, seeds, max_students):
    """Returns the rounds, with a stage's name and a seed in place of each job."""
    rounds = make_schedule(stages, seeds, max_students)
    return [
        [[(job.stage.name, seed) for job, seed in jobs] for jobs in groups] for groups in rounds
    ]


CHAIN = [
    make_compiled("teacher", "large"),
    make_compiled("first", "small", teachers=("teacher",)),
    make_compiled("second", "small", teachers=("first",)),
]


def test_students_alone_train_seed_by_seed_in_the_order_of_the_plan():
    assert schedule(CHAIN, [5, 3], 1) == [
        [[("teacher", 5)], [("first", 5)], [("second", 5)]],
        [[("teacher", 3)], [("first", 3)], [("second", 3)]],
    ]


def test_seeds_of_a_stage_train_together():
    assert schedule(CHAIN, [0, 1], 8) == [
        [[("teacher", 0), ("teacher", 1)]],
        [[("first", 0), ("first", 1)]],
        [[("second", 0), ("second", 1)]],
    ]


def test_stages_of_a_program_train_together_unless_one_needs_the_other():
    stages = [*CHAIN, make_compiled("other", "small", start="teacher")]
    assert schedule(stages, [0], 8)[1:] == [
        [[("first", 0), ("other", 0)]],
        [[("second", 0)]],
    ]


def test_groups_hold_at_most_max_students_and_seeds_come_first():
    stages = [make_compiled(name) for name in "abc"]
    jobs = [(name, seed) for seed in (0, 1) for name in "abc"]
    assert schedule(stages, [0, 1], 4) == [[jobs[:4], jobs[4:]]]
    assert schedule(stages, [0, 1], 6) == [[jobs]]


def test_stages_train_after_a_program_of_another_level():
    """The longest chain counts: `late` needs the end of a chain, though its program comes first."""
    stages = [
        make_compiled("early", "shared"),
        make_compiled("middle", "other", teachers=("early",)),
        make_compiled("late", "shared", teachers=("early", "middle")),
    ]
    names = [[name for jobs in groups for name, _ in jobs] for groups in schedule(stages, [0], 8)]
    assert names == [["early"], ["middle"], ["late"]]


@pytest.mark.parametrize(
    "data",
    [
        {name: array[:40] for name, array in TRAIN.items()},
        TRAIN | {"scale": np.float32(2)},
        TRAIN | {"labels": TRAIN["labels"].astype(np.int8)},
    ],
)
def test_stages_with_examples_of_other_shapes_train_apart(data):
    stages = [make_compiled("first"), make_compiled("second", data=data)]
    assert schedule(stages, [0], 8) == [[[("first", 0)]], [[("second", 0)]]]


def test_schedule_without_seeds_is_empty():
    assert schedule(CHAIN, [], 1) == schedule(CHAIN, [], 8) == []


@pytest.mark.thorough
def test_generations_of_one_program_train_in_order(tmp_path):
    """Born-again networks: each generation learns from the one before, in the same program."""

    def make_plan():
        teachers = {"second": "first", "third": "second", "fourth": "third"}
        generations = [
            make_stage(name, dropout=0.1, teachers=(teacher,), loss=soft_loss)
            for name, teacher in teachers.items()
        ]
        return [*reversed(generations), make_stage("first", dropout=0.1)]

    groups = distill.group_by_program(distill.order(make_plan()))
    assert [[stage.name for stage in group] for group in groups] == [
        ["first"],
        ["second", "third", "fourth"],
    ]
    expected, _ = train(tmp_path / "sequential", make_plan(), (0, 1))
    trained, run = train(
        tmp_path / "vectorized", make_plan(), (0, 1), placement=vectorized_placement()
    )
    chex.assert_trees_all_close(
        get_variables(trained), get_variables(expected), rtol=1e-5, atol=1e-5
    )
    stages = dict.fromkeys(record["stage"] for record in run.metrics())
    assert list(stages) == ["first", "second", "third", "fourth"]


def test_stages_that_learn_from_each_other_do_not_count_together():
    teachers = {"second": "first", "third": "second"}
    generations = [
        make_stage(name, teachers=(teacher,), loss=soft_loss) for name, teacher in teachers.items()
    ]
    others = [make_stage("copy", teachers=("first",), loss=soft_loss)]
    plan = [make_stage("first"), *generations]
    assert distill.count_concurrent_stages(plan) == 1
    assert distill.count_concurrent_stages([*plan, *others]) == 2
    # Another number of examples is another shape on the devices.
    fewer = {name: array[:20] for name, array in TRAIN.items()}
    assert distill.count_concurrent_stages([*plan, make_stage("fewer", data=fewer)]) == 1
    assert distill.count_concurrent_stages([]) == 0
