"""Tests of `jaxkd verify`: messages and exit statuses, with a fake rerun."""

import shutil
from pathlib import Path

import pytest

from jaxkd.cli.main import main
from jaxkd.runs import RunError, verify


@pytest.fixture
def fake_verify(monkeypatch):
    """Replaces `jaxkd.runs.verify.verify`.

    Returns:
        A function that takes the verdicts to return. It returns a list of the calls, as the run's
        folder, the folder of the rerun and whether the latter existed.
    """
    calls = []

    def set_verdicts(*verdicts):
        def verify_(folder, scratch, is_temporary=False):
            calls.append((folder, Path(scratch), Path(scratch).exists()))
            return {folder / str(i): verdict for i, verdict in enumerate(verdicts)}

        monkeypatch.setattr(verify, "verify", verify_)
        return calls

    return set_verdicts


def test_identical_rerun_is_a_success(fake_verify, capsys):
    calls = fake_verify(
        verify.Verdict([], [], "8 records"),
        verify.Verdict([], ["cores was 1 and is 2"], "9 records"),
    )
    main(["verify", "run"])
    assert capsys.readouterr().out == (
        "run/0: identical (8 records)\n"
        "run/1: identical (9 records)\n"
        "  recorded: cores was 1 and is 2\n"
    )
    ((folder, scratch, existed),) = calls
    assert folder == Path("run") and existed and not scratch.exists()


def test_rerun_that_differs_is_a_failure(fake_verify, capsys):
    calls = fake_verify(
        verify.Verdict(["metrics: loss", "results: accuracy"], [], ""),
        verify.Verdict([], [], "1 record"),
    )
    with pytest.raises(SystemExit) as stop:
        main(["verify", "run", "--keep", "again"])
    assert stop.value.code == 1 and calls == [(Path("run"), Path("again"), False)]
    assert capsys.readouterr().out.splitlines() == [
        "run/0: differs",
        "  metrics: loss",
        "  results: accuracy",
        "  options, data and environment are identical; "
        "a GPU repeats bits only if both runs had --deterministic",
        "run/1: identical (1 record)",
    ]


def test_rerun_that_differs_under_other_conditions(fake_verify, capsys):
    calls = fake_verify(verify.Verdict(["metrics: loss"], ["jax was '0.10.2' and is '0.12.0'"], ""))
    with pytest.raises(SystemExit) as stop:
        main(["verify", "run"])
    ((_, scratch, _),) = calls
    assert stop.value.code == 1 and scratch.is_dir()
    shutil.rmtree(scratch)
    assert capsys.readouterr().out.splitlines() == [
        "run/0: differs",
        "  metrics: loss",
        "  recorded: jax was '0.10.2' and is '0.12.0'",
        f"the new run is kept in {scratch}",
    ]


def test_temporary_folder_is_deleted_after_an_error(monkeypatch):
    folders = []

    def fail(folder, scratch, is_temporary):
        folders.append(scratch)
        raise RunError("the rerun failed")

    monkeypatch.setattr(verify, "verify", fail)
    with pytest.raises(SystemExit, match="the rerun failed"):
        main(["verify", "run"])
    assert len(folders) == 1 and not folders[0].exists()


def test_errors_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["verify", "absent"])
    assert stop.value.code == "error: absent holds no run: there is no config.json in it"

    def fail(folder, scratch, is_temporary):
        raise RunError("the run\nis not finished")

    monkeypatch.setattr(verify, "verify", fail)
    with pytest.raises(SystemExit, match="^error: the run is not finished$"):
        main(["verify", "run"])
    assert capsys.readouterr() == ("", "")
