"""The lines and bars that a plan prints as it runs."""

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxkd import distill
from jaxkd.distill import _progress
from jaxkd.distill._progress import PlanProgress
from small_plans import TRAIN, VALIDATION, kill_at_save, make_model, make_stage, soft_loss, train

FOLDER = Path("runs") / "one"


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets by its only entry."""
    seconds = [100.0]
    monkeypatch.setattr(_progress, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    return seconds


def read_lines(capsys):
    return capsys.readouterr().out.splitlines()


def test_lines_of_a_plan_in_a_pipe(capsys, clock):
    plan = [make_stage("first", steps=1000), make_stage("second", steps=500)]
    with PlanProgress(plan, [0, 1, 2], FOLDER) as progress:
        assert read_lines(capsys) == [
            "training 2 stages for 3 seeds: 6 trainings, 4,500 steps, into runs/one"
        ]
        progress.start_group("first, seed 0, and 2 more", 1000, 3)
        clock[0] += 30
        progress.advance(400)
        progress.advance(600)
        assert read_lines(capsys) == []
        progress.end_group([f"first, seed {seed}: done" for seed in range(3)])
        # 3,000 of 4,500 steps took 30 s.
        assert read_lines(capsys) == [
            "first, seed 0: done",
            "first, seed 1: done",
            "first, seed 2: done (about 15 s left)",
        ]
        for seed, remaining in ((0, " (about 9 s left)"), (1, " (about 4 s left)"), (2, "")):
            progress.start_group(f"second, seed {seed}", 500, 1)
            progress.advance(500)
            progress.end_group([f"second, seed {seed}: done"])
            assert read_lines(capsys) == [f"second, seed {seed}: done{remaining}"]
    assert read_lines(capsys) == []


def test_one_is_singular(capsys):
    model = make_model()
    pretrained = distill.Pretrained(
        "pretrained", model, model.init(jax.random.key(0), TRAIN["inputs"])
    )
    plan = [pretrained, make_stage("first", steps=1)]
    with PlanProgress(plan, [0], FOLDER):
        assert read_lines(capsys) == [
            "training 1 stage for 1 seed: 1 training, 1 step, into runs/one"
        ]
    with PlanProgress([pretrained], [], FOLDER):
        assert read_lines(capsys) == [
            "training 0 stages for 0 seeds: 0 trainings, 0 steps, into runs/one"
        ]


def test_restored_steps_do_not_count_for_the_time_per_step(capsys, clock):
    with PlanProgress([make_stage("first", steps=300)], [0, 1], FOLDER) as progress:
        progress.start_group("first, seed 0", 300, 1)
        progress.advance(300, restored=True)
        progress.end_group(["first, seed 0: already trained"])
        clock[0] += 150
        progress.start_group("first, seed 1", 300, 1)
        progress.advance(200, restored=True)
        progress.advance(50)
        progress.end_group(["first, seed 1: 250 steps"])
    assert read_lines(capsys)[1:] == [
        "first, seed 0: already trained",
        "first, seed 1: 250 steps (about 2 min left)",
    ]


class Terminal(io.StringIO):
    """Takes what is printed, as a terminal."""

    def isatty(self):
        return True


def replace_stdout(monkeypatch, stdout):
    """Replaces the standard output. Not a fixture, since pytest sets its own before the test."""
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    return stdout


@pytest.mark.parametrize("make_stdout", [io.StringIO, Terminal])
def test_secondary_processes_print_nothing(monkeypatch, make_stdout):
    stdout = replace_stdout(monkeypatch, make_stdout())
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with PlanProgress([make_stage("first")], [0], FOLDER) as progress:
        progress.start_group("first, seed 0", 12, 1)
        progress.advance(12)
        progress.end_group(["first, seed 0: done"])
    assert stdout.getvalue() == ""


def print_two_groups(plan):
    with PlanProgress(plan, [0], FOLDER) as progress:
        for stage in plan:
            progress.start_group(f"{stage.name}, seed 0", stage.steps, 1)
            progress.advance(stage.steps)
            progress.end_group([f"{stage.name}, seed 0: [done] at 99%"])


EXPECTED = [
    "training 2 stages for 1 seed: 2 trainings, 24 steps, into runs/one",
    "first, seed 0: [done] at 99% (about 0 s left)",
    "second, seed 0: [done] at 99%",
]


def test_terminal_without_rich_gets_plain_lines(clock, monkeypatch):
    terminal = replace_stdout(monkeypatch, Terminal())
    monkeypatch.setitem(sys.modules, "rich", None)
    print_two_groups([make_stage("first"), make_stage("second")])
    assert terminal.getvalue().splitlines() == EXPECTED


def test_terminal_gets_the_same_lines_above_the_bars(clock, monkeypatch):
    pytest.importorskip("rich")
    terminal = replace_stdout(monkeypatch, Terminal())
    print_two_groups([make_stage("first"), make_stage("second")])
    printed = terminal.getvalue()
    assert "all stages" in printed and "24/24" in printed
    # Without the codes that hide and move the cursor, nothing styles the lines.
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed).replace("\r", "\n").splitlines()
    assert [line.rstrip() for line in lines if "seed" in line and "━" not in line] == EXPECTED


def test_plan_prints_its_trainings_in_order(capsys, tmp_path):
    plan = [make_stage("first", steps=2), make_stage("second", steps=2)]
    train(tmp_path, plan, (0, 1))
    *lines, disk_use = read_lines(capsys)
    assert lines[0] == (f"training 2 stages for 2 seeds: 4 trainings, 8 steps, into {tmp_path}")
    assert re.fullmatch(rf"{tmp_path} uses [\d.]+ kB", disk_use)
    trainings = [(stage.name, seed) for seed in (0, 1) for stage in plan]
    for line, (name, seed) in zip(lines[1:], trainings, strict=True):
        pattern = rf"{name}, seed {seed}: [\d.]+% on validation after 2 steps and [\d.]+ s"
        remaining = "" if (name, seed) == ("second", 1) else r" \(about \d+ (s|min) left\)"
        assert re.fullmatch(pattern + remaining, line), line
    train(tmp_path, plan, (0, 1))
    already_trained = [f"{name}, seed {seed}: already trained" for name, seed in trainings]
    summary = "keeps 4 of 4 trainings, goes on with 0, trains 0"
    assert read_lines(capsys) == [lines[0], *already_trained, summary, disk_use]


def test_resumed_training_names_its_first_step(capsys, tmp_path, monkeypatch):
    plan = [make_stage("first", steps=3)]
    kill_at_save(monkeypatch, 2)
    with pytest.raises(SystemExit):
        train(tmp_path, plan, save_every=0)
    monkeypatch.undo()
    capsys.readouterr()
    train(tmp_path, plan)
    _, summary, line, _ = read_lines(capsys)
    assert summary == "keeps 0 of 1 trainings, goes on with 1, trains 0"
    assert re.fullmatch(
        r"first, seed 0: [\d.]+% on validation after 3 steps and [\d.]+ s, resumed at step 2", line
    )


def test_evaluations_in_a_pipe_print_a_line_now_and_then(capsys, clock):
    with PlanProgress([make_stage("first", steps=1000)], [0], FOLDER) as progress:
        progress.start_group("first, seed 0", 1000, 1)
        for step in range(100, 1001, 100):
            clock[0] += 6
            progress.advance(100)
            progress.report_evaluation(step, 1 / step, f"{step / 2000:.1%} on validation")
        lines = read_lines(capsys)[1:]
    # The line that follows the last step comes from the end of the group.
    assert len(lines) == 4
    assert lines[0] == (
        "first, seed 0: step 200 of 1,000, loss 0.005, 10.0% on validation (about 48 s left)"
    )
    assert lines[-1].startswith("first, seed 0: step 800 of 1,000, ")


def test_evaluations_on_a_terminal_have_the_bars_alone(clock, monkeypatch):
    pytest.importorskip("rich")
    terminal = replace_stdout(monkeypatch, Terminal())
    with PlanProgress([make_stage("first", steps=10)], [0], FOLDER) as progress:
        progress.start_group("first, seed 0", 10, 1)
        clock[0] += 60
        progress.advance(5)
        progress.report_evaluation(5, 0.5, "50.0% on validation")
    assert "on validation" not in terminal.getvalue()


def test_a_plan_reports_its_evaluations(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(_progress, "SECONDS_BETWEEN_EVALUATIONS", 0)
    train(tmp_path, [make_stage("first", steps=4)], evaluations=2)
    _, evaluation, end, _ = read_lines(capsys)
    pattern = r"first, seed 0: step 2 of 4, loss [\d.]+, [\d.]+% on validation \(about \d+ s left\)"
    assert re.fullmatch(pattern, evaluation) and "after 4 steps" in end


def test_a_plan_names_a_teacher_that_is_no_better_than_the_student_alone(capsys, tmp_path):
    untrained = optax.set_to_zero()
    plan = [
        make_stage("teacher", 8, tx=untrained, steps=1),
        make_stage("alone", steps=60),
        make_stage("distilled", teachers=("teacher",), loss=soft_loss, steps=1),
    ]
    trained, _ = train(tmp_path, plan)
    accuracy, alone = (trained[name][0].validation_accuracy for name in ("teacher", "alone"))
    assert accuracy < alone
    assert (
        "the teacher 'teacher' is no better than 'alone', which has no teacher: "
        f"{accuracy:.1%} and {alone:.1%} on validation; improve the teacher first"
    ) in read_lines(capsys)


def test_a_plan_names_a_teacher_that_is_no_better_than_chance(capsys, tmp_path):
    """A pretrained teacher that gets inputs of another scale may end there."""
    model = make_model(8)
    constant = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), VALIDATION["inputs"]))
    good = make_stage("good", steps=60)
    students = [
        make_stage(f"from_{name}", teachers=(name,), loss=soft_loss, steps=1)
        for name in ("pretrained", "good")
    ]
    train(tmp_path, [distill.Pretrained("pretrained", model, constant), good, *students])
    (line,) = [line for line in read_lines(capsys) if "no better than chance" in line]
    assert line.startswith("the teacher 'pretrained' is no better than chance: ")
