"""A run grows: what is kept, gone on with and trained again, and that nothing valid is lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings

import chex
import jax
import numpy as np
import optax
import pytest

from jaxkd import distill, evaluate, losses, runs
from jaxkd.distill import _identity, runner
from jaxkd.distill._loop import TrainingLoop
from jaxkd.runs import growth, verify
from small_plans import (
    VALIDATION,
    get_losses,
    get_variables,
    hard_loss,
    kill_at_save,
    make_examples,
    make_model,
    make_stage,
    train,
    vectorized_placement,
)


def make_soft_loss(temperature):
    def loss(student, teachers, batch, context):
        (teacher,) = teachers
        return losses.kl_divergence(student.logits, teacher.logits, temperature=temperature)

    return loss


def make_plan(temperature=2.0, *, stages=2, teacher_steps=4, tx=None, **changes):
    """Makes a teacher, a student alone and a student that learns from the teacher's logits."""
    teacher = make_stage("teacher", 8, steps=teacher_steps)
    student = {"teachers": ("teacher",), "loss": make_soft_loss(temperature), "steps": 4}
    plan = [teacher, make_stage("student", **student | changes), make_stage("alone", steps=4)]
    return plan[:stages]


def grow(folder, plan, seeds=(0,), *, measure=True, **options):
    """Trains a plan into a folder, with a configuration that tells plans apart, and measures it."""
    config = {"num_seeds": len(seeds), "plan": [stage.name for stage in plan]}
    config |= options.pop("config", {})
    trained, run = train(folder, plan, seeds, config=config, grow=True, **options)
    if measure:
        rows = distill.evaluate_plan(plan, trained, VALIDATION, reference="teacher", repeats=1)
        run.write_results(rows)
    return trained, run


def compare(folder, other):
    """Returns the differences between two runs, apart from times and the order of records."""
    return verify.compare_runs(folder, other).differences


def count_steps(monkeypatch):
    """Returns a dict that counts the steps which each training takes."""
    counts = {}
    take_steps = TrainingLoop._take_steps

    def take_and_count(self, steps):
        for stage_run in self.group.stage_runs:
            key = stage_run.stage.name, stage_run.seed
            counts[key] = counts.get(key, 0) + len(steps)
        take_steps(self, steps)

    monkeypatch.setattr(TrainingLoop, "_take_steps", take_and_count)
    return counts


def read_summary(capsys):
    (line,) = re.findall(r"^keeps .*", capsys.readouterr().out, re.M)
    return line


def list_names(run, seed=0):
    """Returns the names of the folders of a seed's trainings, those set aside included."""
    return sorted(os.listdir(run.folder / "checkpoints" / f"seed{seed}"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    grow(folder, make_plan())
    return folder


# Seeds and stages


def test_more_seeds_keep_the_finished_ones_and_end_as_an_unbroken_run(
    tmp_path, monkeypatch, capsys
):
    grow(tmp_path / "run", make_plan())
    assert "keeps" not in capsys.readouterr().out
    counts = count_steps(monkeypatch)
    _, run = grow(tmp_path / "run", make_plan(), (0, 1))
    assert counts == {("teacher", 1): 4, ("student", 1): 4}
    assert read_summary(capsys) == "keeps 2 of 4 trainings, goes on with 0, trains 2"
    grow(tmp_path / "fresh", make_plan(), (0, 1))
    assert compare(tmp_path / "run", tmp_path / "fresh") == []
    assert [len(row.accuracy) for row in run.read_results()] == [2, 2]


@pytest.mark.thorough
def test_more_seeds_may_train_in_one_program(tmp_path):
    options = {"placement": vectorized_placement()}
    grow(tmp_path / "run", make_plan(), (0,), **options)
    grow(tmp_path / "run", make_plan(), (0, 1, 2), **options)
    grow(tmp_path / "fresh", make_plan(), (0, 1, 2), **options)
    assert compare(tmp_path / "run", tmp_path / "fresh") == []


def test_fewer_seeds_and_stages_leave_the_others_out_and_find_them_again(
    tmp_path, monkeypatch, capsys
):
    grow(tmp_path / "run", make_plan(stages=3), (0, 1))
    _, run = grow(tmp_path / "run", make_plan(stages=2), (0,))
    assert {(r["stage"], r["seed"]) for r in run.metrics()} == {("teacher", 0), ("student", 0)}
    assert list_names(run) == [".alone.0", "student", "teacher"]
    grow(tmp_path / "fresh", make_plan(stages=2))
    assert compare(tmp_path / "run", tmp_path / "fresh") == []
    capsys.readouterr()
    counts = count_steps(monkeypatch)
    grow(tmp_path / "run", make_plan(stages=3), (0, 1))
    assert counts == {}
    assert read_summary(capsys) == "keeps 6 of 6 trainings, goes on with 0, trains 0"
    grow(tmp_path / "whole", make_plan(stages=3), (0, 1))
    assert compare(tmp_path / "run", tmp_path / "whole") == []


def test_a_new_stage_trains_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    grow(tmp_path / "run", make_plan())
    counts = count_steps(monkeypatch)
    _, run = grow(tmp_path / "run", make_plan(stages=3))
    assert counts == {("alone", 0): 4}
    assert read_summary(capsys) == "keeps 2 of 3 trainings, goes on with 0, trains 1"
    grow(tmp_path / "fresh", make_plan(stages=3))
    assert compare(tmp_path / "run", tmp_path / "fresh") == []


# Stages that change


def test_another_temperature_trains_its_stage_again(tmp_path, monkeypatch, capsys):
    grow(tmp_path / "run", make_plan(2.0, stages=3), config={"temperature": 2.0})
    counts = count_steps(monkeypatch)
    capsys.readouterr()
    _, run = grow(tmp_path / "run", make_plan(4.0, stages=3), config={"temperature": 4.0})
    assert counts == {("student", 0): 4}
    lines = capsys.readouterr().out.splitlines()
    replaced = (
        "student, seed 0: trains again (its model, loss, optimizer or augmentation changed); its "
        "earlier training is kept until the end"
    )
    summary = "keeps 2 of 3 trainings, goes on with 0, trains 1"
    assert lines.count(replaced) == lines.count(summary) == 1
    # Before the first step.
    trained = next(i for i, line in enumerate(lines) if "after 4 steps" in line)
    assert lines.index(replaced) < lines.index(summary) < trained
    assert list_names(run) == ["alone", "student", "teacher"]
    grow(tmp_path / "fresh", make_plan(4.0, stages=3), config={"temperature": 4.0})
    assert compare(tmp_path / "run", tmp_path / "fresh") == []


def test_another_teacher_trains_its_students_again(tmp_path, monkeypatch, capsys):
    grow(tmp_path / "run", make_plan(stages=3))
    counts = count_steps(monkeypatch)
    plan = make_plan(stages=3)
    plan[0] = make_stage("teacher", 8, steps=4, loss=lambda *args: 2.0 * hard_loss(*args))
    _, run = grow(tmp_path / "run", plan, config={"changed": True})
    assert counts == {("teacher", 0): 4, ("student", 0): 4}
    out = capsys.readouterr().out
    assert "keeps 1 of 3 trainings, goes on with 0, trains 2\n" in out
    assert "student, seed 0: trains again (the weights of 'teacher' changed)" in out
    grow(tmp_path / "fresh", plan, config={"changed": True})
    assert compare(tmp_path / "run", tmp_path / "fresh") == []


def test_other_data_never_return_a_stale_student(tmp_path, monkeypatch):
    """A folder without `arrays` as well."""
    grow(tmp_path / "run", make_plan())
    counts = count_steps(monkeypatch)
    trained, _ = grow(tmp_path / "run", make_plan(data=make_examples(5, 45)))
    assert counts == {("student", 0): 4}
    expected, _ = grow(tmp_path / "fresh", make_plan(data=make_examples(5, 45)))
    chex.assert_trees_all_equal(get_variables(trained), get_variables(expected))
    run = {"config": {}, "grow": True}
    runs.open_run(tmp_path / "arrays", {}, arrays=[np.ones(2)])
    with pytest.raises(runs.RunError, match="holds a run on other data"):
        runs.open_run(tmp_path / "arrays", **run, arrays=[np.zeros(2)])


@pytest.mark.thorough
def test_another_architecture_is_set_aside(tmp_path):
    grow(tmp_path / "run", make_plan())
    trained, run = grow(tmp_path / "run", make_plan(model=make_model(5)))
    expected, _ = grow(tmp_path / "fresh", make_plan(model=make_model(5)))
    chex.assert_trees_all_equal(get_variables(trained), get_variables(expected))
    assert list_names(run) == ["student", "teacher"]


@pytest.mark.thorough
def test_plans_that_share_a_run_grow_together(tmp_path, monkeypatch):
    """A teacher that serves all seeds trains in a plan of its own."""

    def train_both(folder, temperature, seeds):
        config = {"temperature": temperature, "num_seeds": len(seeds)}
        run = runs.open_run(folder, config, grow=True)
        teacher, student = make_plan(temperature)
        options = {"run": run, "validation": VALIDATION}
        (taught,) = distill.run_plan([teacher], [0], **options)["teacher"]
        pretrained = distill.Pretrained("teacher", teacher.model, taught.variables)
        plan = [pretrained, student]
        trained = distill.run_plan(plan, seeds, **options)
        run.write_results(distill.evaluate_plan(plan, trained, VALIDATION, reference="teacher"))
        return run

    train_both(tmp_path / "run", 2.0, (0,))
    counts = count_steps(monkeypatch)
    train_both(tmp_path / "run", 2.0, (0, 1))
    assert counts == {("student", 1): 4}
    counts.clear()
    run = train_both(tmp_path / "run", 4.0, (0, 1))
    assert counts == {("student", 0): 4, ("student", 1): 4}
    assert list_names(run) == ["student", "teacher"]
    train_both(tmp_path / "fresh", 4.0, (0, 1))
    assert compare(tmp_path / "run", tmp_path / "fresh") == []


# More steps


def test_more_steps_go_on_where_the_shorter_training_ended(tmp_path, monkeypatch, capsys):
    grow(tmp_path / "run", make_plan())
    counts = count_steps(monkeypatch)
    _, run = grow(tmp_path / "run", make_plan(steps=9), config={"steps": 9})
    assert counts == {("student", 0): 5}
    out = capsys.readouterr().out
    assert out.count("student, seed 0: goes on after step 4 of a shorter training\n") == 1
    assert "keeps 1 of 2 trainings, goes on with 1, trains 0\n" in out
    grow(tmp_path / "fresh", make_plan(steps=9), config={"steps": 9})
    assert compare(tmp_path / "run", tmp_path / "fresh") == []


def test_records_at_other_steps_are_not_compared(tmp_path):
    options = {"evaluations": 2}
    grow(tmp_path / "run", make_plan(), **options)
    grow(tmp_path / "run", make_plan(steps=9), config={"steps": 9}, **options)
    _, run = grow(tmp_path / "fresh", make_plan(steps=9), config={"steps": 9}, **options)
    differences, conditions, _ = verify.compare_runs(tmp_path / "run", tmp_path / "fresh")
    assert differences == []
    assert conditions == [
        "trainings that were evaluated at other steps before the run grew, of which the last "
        "records are compared: 1"
    ]
    # The last record still counts.
    path = run.folder / "metrics.jsonl"
    *others, last = path.read_text().splitlines(keepends=True)
    record = json.loads(last) | {"validation_loss": 0.0}
    path.write_text("".join([*others, json.dumps(record) + "\n"]))
    (line,) = compare(tmp_path / "run", tmp_path / "fresh")
    assert line.startswith("metrics: first at stage student, seed 0, step 9: validation_loss was")


@pytest.mark.thorough
def test_students_of_a_longer_teacher_train_again(tmp_path, monkeypatch):
    grow(tmp_path / "run", make_plan())
    counts = count_steps(monkeypatch)
    grow(tmp_path / "run", make_plan(teacher_steps=6), config={"steps": 6})
    assert counts == {("teacher", 0): 2, ("student", 0): 4}
    grow(tmp_path / "fresh", make_plan(teacher_steps=6), config={"steps": 6})
    assert compare(tmp_path / "run", tmp_path / "fresh") == []


def cosine(steps):
    return {"steps": steps, "tx": optax.sgd(optax.cosine_decay_schedule(0.1, steps))}


def cooling_loss(student, teachers, batch, context):
    """Uses a weight that follows the progress of the training."""
    return (1.0 - context.progress) * hard_loss(student, teachers, batch, context)


def test_a_schedule_over_the_steps_trains_again(tmp_path, monkeypatch):
    shorter = {"first": cosine(4), "cooling": {"steps": 4, "loss": cooling_loss}}
    longer = {"first": cosine(6), "cooling": {"steps": 6, "loss": cooling_loss}}

    def make_stages(options):
        return [make_stage(name, **values) for name, values in options.items()]

    with jax.numpy_dtype_promotion("standard"):
        grow(tmp_path / "run", make_stages(shorter), measure=False)
        counts = count_steps(monkeypatch)
        trained, _ = grow(tmp_path / "run", make_stages(longer), measure=False)
        assert counts == {("first", 0): 6, ("cooling", 0): 6}
        expected, _ = grow(tmp_path / "fresh", make_stages(longer), measure=False)
    chex.assert_trees_all_equal(get_variables(trained), get_variables(expected))


@pytest.mark.thorough
def test_fewer_steps_train_again(tmp_path, monkeypatch):
    grow(tmp_path / "run", make_plan(steps=5))
    counts = count_steps(monkeypatch)
    grow(tmp_path / "run", make_plan(steps=3))
    assert counts == {("student", 0): 3}


@pytest.mark.thorough
def test_more_steps_of_a_training_that_was_stopped(tmp_path, monkeypatch):
    kill_at_save(monkeypatch, 6)
    with pytest.raises(SystemExit):
        grow(tmp_path / "run", make_plan(steps=6), save_every=0)
    monkeypatch.undo()
    counts = count_steps(monkeypatch)
    trained, _ = grow(tmp_path / "run", make_plan(steps=9))
    assert counts == {("student", 0): 7}
    expected, _ = grow(tmp_path / "fresh", make_plan(steps=9))
    chex.assert_trees_all_equal(get_variables(trained), get_variables(expected))


@pytest.mark.thorough
def test_a_longer_training_and_a_stopped_one_at_the_same_step(tmp_path, monkeypatch):
    """They were evaluated at different steps, so that they cannot train in one program."""
    options = {"measure": False, "evaluations": 2, "config": {"plan": "any"}}
    grow(tmp_path / "run", [make_stage("longer", steps=4)], **options)
    kill_at_save(monkeypatch, 4)
    with pytest.raises(SystemExit):
        grow(tmp_path / "run", [make_stage("stopped", steps=9)], save_every=0, **options)
    monkeypatch.undo()
    plan = [make_stage(name, steps=9) for name in ("longer", "stopped")]
    trained, run = grow(tmp_path / "run", plan, placement=vectorized_placement(), **options)
    expected, fresh_run = grow(tmp_path / "fresh", plan, **options)
    chex.assert_trees_all_close(get_variables(trained), get_variables(expected), rtol=1e-5)
    losses = [get_losses(run, name) for run in (run, fresh_run) for name in ("longer", "stopped")]
    # The first evaluation of the longer one was at step 2.
    assert [len(values) for values in losses] == [4, 2, 2, 2]
    np.testing.assert_allclose(losses[1], losses[3], rtol=1e-5)


# Nothing valid is lost


def test_the_earlier_training_lasts_until_the_new_one_is_finished(tmp_path, monkeypatch, capsys):
    config = {"config": {"temperature": 2.0}}
    earlier, run = grow(tmp_path / "run", make_plan(), **config)
    records, results = run.metrics(), (run.folder / "results.json").read_bytes()
    kill_at_save(monkeypatch, 2)
    with pytest.raises(SystemExit):
        grow(tmp_path / "run", make_plan(4.0), config={"temperature": 4.0}, save_every=0)
    monkeypatch.undo()
    assert list_names(run) == [".student.0", "student", "teacher"]
    assert (run.folder / "results.json").read_bytes() == results
    assert runs.read_run(run.folder).is_growing
    capsys.readouterr()
    # The earlier configuration finds its own training again.
    counts = count_steps(monkeypatch)
    trained, run = grow(tmp_path / "run", make_plan(), **config)
    assert counts == {}
    assert "student, seed 0: an earlier configuration has trained it\n" in capsys.readouterr().out
    chex.assert_trees_all_equal(get_variables(trained), get_variables(earlier))
    assert sorted(map(str, run.metrics())) == sorted(map(str, records))
    assert not runs.read_run(run.folder).is_growing


@pytest.mark.thorough
@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("number", range(8))
def test_a_crash_while_trainings_are_set_aside_or_taken_back_loses_nothing(
    finished, tmp_path, monkeypatch, number, earlier
):
    """Ends the process, as a kill would, before or behind each change of files but for saves."""
    folder = shutil.copytree(finished, tmp_path / "run")
    other = {"config": {"temperature": 4.0}}
    calls = []

    def with_crash(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == number + 1:
                raise SystemExit("killed")
            result = function(*args, **kwargs)
            calls.append(function)
            if len(calls) == number + 1:
                raise SystemExit("killed")
            return result

        return call

    with monkeypatch.context() as patch:
        patch.setattr(growth.os, "rename", with_crash(os.rename))
        for name in ("rewind_metrics", "write_config"):
            patch.setattr(runs.Run, name, with_crash(getattr(runs.Run, name)))
        with pytest.raises(SystemExit):
            grow(folder, make_plan(4.0), **other)
    plan, options = (make_plan(2.0), {}) if earlier else (make_plan(4.0), other)
    counts = count_steps(monkeypatch)
    grow(folder, plan, **options)
    assert counts == ({} if earlier else {("student", 0): 4})
    grow(tmp_path / "fresh", plan, **options)
    assert compare(folder, tmp_path / "fresh") == []


# What digests do not show


def make_calling_loss(scale):
    """Makes a loss that gets weights from the host, whose function no digest shows."""

    def weigh(labels):
        return np.full(labels.shape, scale, np.float32)

    def loss(student, teachers, batch, context):
        shape = jax.ShapeDtypeStruct(batch["labels"].shape, np.float32)
        weights = jax.pure_callback(weigh, shape, batch["labels"])
        return weights * hard_loss(student, teachers, batch, context)

    return loss


def test_calls_of_the_host_train_again_with_another_configuration(tmp_path, monkeypatch):
    def make_stages(scale):
        calling = make_stage("calling", loss=make_calling_loss(scale), steps=2)
        return [calling, make_stage("other", steps=2)]

    grow(tmp_path, make_stages(1.0), measure=False, config={"scale": 1.0})
    counts = count_steps(monkeypatch)
    for seeds in ((0, 1), (0, 1)):
        grow(tmp_path, make_stages(1.0), seeds, measure=False, config={"scale": 1.0})
    assert counts == {("calling", 1): 2, ("other", 1): 2}
    counts.clear()
    for _ in range(2):
        grow(tmp_path, make_stages(2.0), measure=False, config={"scale": 2.0})
    assert counts == {("calling", 0): 2}


def test_growth_in_another_environment_trains_again_what_cannot_be_compared(
    finished, tmp_path, monkeypatch
):
    folder = shutil.copytree(finished, tmp_path / "run")
    for name in ("describe_lowering", "describe_environment"):
        describe = getattr(_identity, name)
        changed = lambda describe=describe: describe() | {"jax": "0.0.1"}  # noqa: E731
        monkeypatch.setattr(_identity, name, changed)
    counts = count_steps(monkeypatch)
    config = {"temperature": 4.0}
    grow(folder, make_plan(4.0), config=config)
    # The teacher has the same digests.
    assert counts == {("student", 0): 4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grow(folder, make_plan(4.0), config=config)
    assert counts == {("student", 0): 4}


def test_scores_of_the_user_warn(tmp_path):
    def make_score(model):
        return lambda variables, examples: evaluate.Score(0.5, 0.25)

    def train_stages(*names, **config):
        options = {"measure": False, "make_score": make_score, "config": config}
        return grow(tmp_path, [make_stage(name, steps=1) for name in names], **options)

    train_stages("first", beams=1)
    with pytest.warns(UserWarning, match=r"make_score .*beams was 1 and is 2.* another folder"):
        train_stages("first", "second", beams=2)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_growth
from jaxkd.runs import checkpoints
save, saves = checkpoints.save, []
def save_and_die(*args, **kwargs):
    save(*args, **kwargs)
    saves.append(args)
    if len(saves) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save = save_and_die
test_growth.grow(sys.argv[2], test_growth.make_plan(4.0, stages=3), (0, 1), save_every=0)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("number", [2, 6])
def test_growth_that_is_killed_resumes(tmp_path, number):
    train(tmp_path / "first", make_plan(), config={"num_seeds": 1})
    # A copy, because this process still has the run open.
    shutil.copytree(tmp_path / "first", tmp_path / "run")
    command = [sys.executable, "-c", KILLED, os.path.dirname(__file__)]
    killed = subprocess.run([*command, str(tmp_path / "run"), str(number)], check=False)
    assert killed.returncode == -signal.SIGKILL
    plan = make_plan(4.0, stages=3)
    grow(tmp_path / "run", plan, (0, 1), save_every=0)
    grow(tmp_path / "fresh", plan, (0, 1), save_every=0)
    assert compare(tmp_path / "run", tmp_path / "fresh") == []
    names = {path.name for path in (tmp_path / "run" / "checkpoints").glob("*/*")}
    assert names == {"teacher", "student", "alone"}


# Measurements


def test_a_finished_run_is_not_measured_again(tmp_path, monkeypatch):
    plan = make_plan(stages=3)

    def measure(folder, plan=plan, **options):
        names = [stage.name for stage in plan]
        trained, run = train(folder, plan, config={"plan": names}, grow=True)
        options = {"reference": "teacher", "repeats": 1, "run": run} | options
        rows = distill.evaluate_plan(plan, trained, VALIDATION, **options)
        run.write_results(rows)
        return rows

    measured = []
    summarize = runner.summarize
    monkeypatch.setattr(
        runner,
        "summarize",
        lambda name, *args, **kwargs: measured.append(name) or summarize(name, *args, **kwargs),
    )
    monkeypatch.setattr(
        runner, "make_predict", lambda *args, **kwargs: pytest.fail("predicted again")
    )
    with monkeypatch.context() as patch:
        patch.setattr(runner, "make_predict", evaluate.make_predict)
        rows = measure(tmp_path / "run")
    names = [stage.name for stage in plan]
    assert measured == names
    again = measure(tmp_path / "run")
    assert measured == names and again == rows
    assert [row.latency_ms for row in again] == [row.latency_ms for row in rows]
    assert [(row.chance, row.baselines) for row in again] == [
        (row.chance, row.baselines) for row in rows
    ]
    monkeypatch.setattr(runner, "make_predict", evaluate.make_predict)
    measure(tmp_path / "run", repeats=2)
    assert measured == 2 * names
    # Another student, and what is compared with it.
    measured.clear()
    plan[1] = make_plan(4.0)[1]
    measure(tmp_path / "run", plan, repeats=2)
    assert measured == ["student"]
    measured.clear()
    plan[0] = make_stage("teacher", 8, steps=5)
    measure(tmp_path / "run", plan, repeats=2)
    assert measured == ["teacher", "student", "alone"]
    (tmp_path / "run" / "results.json").write_text("{")
    measured.clear()
    with pytest.warns(UserWarning, match="all models are measured again: "):
        measure(tmp_path / "run", plan, repeats=2)
    assert measured == ["teacher", "student", "alone"]
