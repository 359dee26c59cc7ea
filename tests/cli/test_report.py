"""Tests of `jaxkd report`: what it prints, and its errors."""

import pytest

from jaxkd import runs
from jaxkd.cli.main import main
from jaxkd.runs import report


@pytest.fixture
def run(tmp_path, metrics, monkeypatch):
    """A run without results, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    run = runs.open_run("run", {"alpha": 0.5})
    for metric in metrics:
        run.append_metrics(metric)
    return run


def test_table_and_comparisons_are_printed(run, rows, capsys):
    comparison = ("student_direct", "student_alone")
    before = report.report_run(run, rows, title="Run", comparisons=[comparison]).read_bytes()
    main(["report", "run", "-o", "again"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "wrote again/report.md"
    assert report.compare_rows(rows, *comparison) in lines
    assert lines[-2].startswith("Note: The 95 % intervals of all 4 models overlap")
    assert any(line.startswith("student_alone") for line in lines)
    assert (run.folder.parent / "again" / "report.md").read_bytes() == before


def test_a_stopped_run_is_said_in_a_line(run, capsys):
    main(["report", "run"])
    assert capsys.readouterr().out.splitlines() == [
        "Note: run has no results yet, so only its curves are drawn.",
        "wrote run/curves.png",
    ]


def test_errors_are_one_line(run, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["report", "absent"])
    assert stop.value.code == "error: absent holds no run: there is no config.json in it"
    run.folder.joinpath("metrics.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match="^error: line 1 of run/metrics.jsonl is damaged"):
        main(["report", "run"])
    assert capsys.readouterr() == ("", "")
