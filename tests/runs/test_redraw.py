"""A report is drawn again from the files of its run, byte for byte."""

import json
import os
import shutil

import pytest

import small_plans
from jaxkd import distill, runs
from jaxkd.runs import ResultRow, RunError, redraw, report

FILES = ["accuracy.png", "curves.png", "report.json", "report.md", "size.png"]


def read_files(folder, names=FILES):
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """A finished run of three stages and two seeds, whose teacher is no better than its student."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    plan = (
        small_plans.make_stage("teacher", steps=2),
        small_plans.make_stage("alone"),
        small_plans.make_stage("student", loss=small_plans.soft_loss, teachers=("teacher",)),
    )
    run = runs.open_run(folder, {"rates": (0.1, 1e-5), "note": "a|b"})
    trained = distill.run_plan(plan, [3, 5], run, validation=small_plans.VALIDATION)
    rows = distill.evaluate_plan(
        plan, trained, small_plans.VALIDATION, reference="teacher", repeats=2
    )
    (folder / "kept.png").write_bytes(b"figure")
    report.report_run(
        run,
        rows,
        title="Grüße | $1",
        comparisons=[("student", "alone")],
        remarks=["Kept: 97 %.", "![kept](kept.png)"],
    )
    return folder


@pytest.fixture
def run_folder(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "run")


def test_a_report_of_a_trained_run_comes_back_byte_for_byte(run_folder, tmp_path):
    before = read_files(run_folder)
    assert "**Note:** The teacher 'teacher'" in before["report.md"].decode()
    redrawn = redraw.redraw_report(run_folder, output=tmp_path / "new" / "again")
    assert read_files(tmp_path / "new" / "again") == before
    assert (tmp_path / "new" / "again" / "kept.png").read_bytes() == b"figure"
    assert redrawn.path == tmp_path / "new" / "again" / "report.md" and not redrawn.left_out
    for name in FILES[:2] + FILES[3:]:
        (run_folder / name).unlink()
    assert redraw.redraw_report(run_folder).path == run_folder / "report.md"
    assert read_files(run_folder) == before


def test_results_print_as_at_the_end_of_the_run(run_folder, capsys):
    rows = runs.read_run(run_folder).read_results()
    redrawn = redraw.redraw_report(run_folder)
    report.print_results(
        redrawn.rows,
        comparisons=redrawn.comparisons,
        teachers=redrawn.teachers,
        chance=redrawn.chance,
    )
    text = capsys.readouterr().out
    assert report.compare_rows(rows, "student", "alone") in text
    assert "Note: The teacher 'teacher'" in text and "accuracy" in text


def test_an_output_leaves_the_run_as_it_is(run_folder, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    redraw.redraw_report(run_folder, output=tmp_path / "again")
    # Once more, over its own report.
    redraw.redraw_report(run_folder, output=tmp_path / "again")
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")} == before


def test_settings_are_those_of_the_report(trained_run, tmp_path, rows, metrics):
    run = runs.open_run(tmp_path / "run", {"save_every": 1})
    for metric in metrics:
        run.append_metrics(metric)
    run = runs.open_run(tmp_path / "run", {"save_every": 2})
    before = report.report_run(run, rows, title="Run").read_text()
    assert "| save_every | 2" in before
    assert redraw.redraw_report(run.folder).path.read_text() == before


def test_an_older_run_says_what_is_left_out(run_folder, tmp_path):
    (run_folder / "report.json").unlink()
    before = read_files(run_folder, ["report.md", "accuracy.png"])
    with pytest.raises(RunError, match="would be lost: name a new folder with --output"):
        redraw.redraw_report(run_folder)
    assert read_files(run_folder, before) == before
    redrawn = redraw.redraw_report(run_folder, output=tmp_path / "again")
    assert redrawn.left_out.endswith(
        "has no report.json: title, comparisons, remarks and notes of its report are left out"
    )
    text = redrawn.path.read_text()
    assert text.startswith("# run\n") and "student" in text and "Kept" not in text
    assert "| rates     | [0.1, 1e-05]" in text
    # Without a report, there is nothing to lose.
    (run_folder / "report.md").unlink()
    assert redraw.redraw_report(run_folder).path.read_text() == text


def test_a_stopped_run_has_curves_alone(run_folder, tmp_path):
    (run_folder / "results.json").unlink()
    expected = (run_folder / "curves.png").read_bytes()
    redrawn = redraw.redraw_report(run_folder, output=tmp_path / "again")
    assert os.listdir(tmp_path / "again") == ["curves.png"]
    assert redrawn.path.read_bytes() == expected and not redrawn.rows
    assert redrawn.left_out.endswith("run has no results yet, so only its curves are drawn")


def test_rows_without_an_accuracy_have_curves_alone(run_folder):
    runs.read_run(run_folder).write_results([ResultRow("student", extra={"bleu": [30.0]})])
    before = (run_folder / "report.md").read_bytes()
    redrawn = redraw.redraw_report(run_folder)
    assert "no accuracy or size of student, so only its curves" in redrawn.left_out
    assert redrawn.path.name == "curves.png"
    assert (run_folder / "report.md").read_bytes() == before


def test_a_run_without_metrics_is_refused(tmp_path):
    run = runs.open_run(tmp_path / "run", {})
    with pytest.raises(RunError, match="run has no metrics, .*: run it first"):
        redraw.redraw_report(run.folder)


def test_other_runs_and_reports_are_not_replaced(run_folder, tmp_path):
    runs.open_run(tmp_path / "other", {})
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.md").write_text("mine")
    for name, match in (
        ("other", "holds another run: choose another --output"),
        ("file", "is not a folder: choose another --output"),
        ("mine", "mine/report.md has no report.json beside it"),
    ):
        with pytest.raises(RunError, match=match):
            redraw.redraw_report(run_folder, output=tmp_path / name)
    assert (tmp_path / "mine" / "report.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"comparisons": ["ab"]}, "comparisons cannot be"),
        ({"comparisons": [["student"]]}, "comparisons cannot be"),
        ({"chance": "high"}, "chance cannot be 'high'"),
        ({"remarks": "Kept."}, "remarks cannot be 'Kept.'"),
        ({"settings": []}, r"settings cannot be \[\]"),
        ({"title": None}, "title cannot be None"),
    ],
)
def test_a_damaged_record_is_named(change, message, run_folder):
    path = run_folder / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RunError, match=f"report.json is damaged .{message}.*: restore it, or"):
        redraw.redraw_report(run_folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", b"\xff"])
def test_a_record_that_is_no_json_is_named(content, run_folder):
    path = run_folder / "report.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError, match="report.json is damaged"):
        redraw.redraw_report(run_folder)


def test_fields_of_another_version_are_left_out(run_folder):
    path = run_folder / "report.json"
    before = (run_folder / "report.md").read_bytes()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colours": ["red"]}))
    assert redraw.redraw_report(run_folder).path.read_bytes() == before


def test_settings_of_any_type_are_recorded(tmp_path, rows, metrics):
    run = runs.open_run(tmp_path, {"epochs": 1})
    for metric in metrics:
        run.append_metrics(metric)
    run.write_results(rows)
    options = {"comparisons": [], "environment": {}, "settings": {"path": tmp_path, 1: 1e5}}
    path = report.write_report(tmp_path, title="Run", rows=rows, metrics=metrics, **options)
    before = path.read_bytes()
    assert redraw.redraw_report(tmp_path).path.read_bytes() == before
