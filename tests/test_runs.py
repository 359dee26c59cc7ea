"""A run's directory: started once, continued only as it was, never overwritten."""

import json
import os

import numpy as np
import pytest

from jaxkd import runs

CONFIG = {"epochs": 3, "alpha": 0.5, "workdir": None, "data_dir": None}
ARRAYS = (np.zeros((2, 3), np.uint8),)


def test_starts_and_continues(tmp_path):
    run = runs.open_run(tmp_path / "run", CONFIG, arrays=ARRAYS)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["config"] == run.config == CONFIG
    assert {"python", "jax", "jaxlib", "device", "platform", "xla_flags", "commit"} <= set(written["environment"])
    again = runs.open_run(tmp_path / "run", CONFIG | {"data_dir": "moved"}, arrays=ARRAYS)
    assert again.environment == written["environment"]
    assert run.checkpoints(1, "teacher") == tmp_path / "run" / "checkpoints" / "seed1" / "teacher"


def test_refuses_another_configuration_and_overwrites_nothing(tmp_path):
    runs.open_run(tmp_path, CONFIG, arrays=ARRAYS)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(runs.RunError, match=r"alpha 0.5 there and 0.7 here; epochs 3 there and 4 here.*--workdir"):
        runs.open_run(tmp_path, CONFIG | {"epochs": 4, "alpha": 0.7}, arrays=ARRAYS)
    with pytest.raises(runs.RunError, match="other data"):
        runs.open_run(tmp_path, CONFIG, arrays=(np.ones((2, 3), np.uint8),))
    assert (tmp_path / "config.json").read_bytes() == before and os.listdir(tmp_path) == ["config.json"]


def test_refuses_a_foreign_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(runs.RunError, match="not empty and holds no run"):
        runs.open_run(tmp_path, CONFIG)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(runs.RunError, match="is not a folder"):
        runs.open_run(tmp_path / "thesis.tex", CONFIG)
    for content in ("{", "[]", "{}", '{"config": [], "data": "", "environment": {}}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(runs.RunError, match="no run's configuration"):
            runs.open_run(tmp_path, CONFIG)


def test_unwritable_place_is_told(tmp_path):
    # A folder cannot be made below a file, by nobody; permissions alone would not stop the superuser.
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        runs.open_run(tmp_path / "file" / "run", CONFIG)


def test_read_only_folder_is_told(tmp_path, monkeypatch):
    runs.open_run(tmp_path, CONFIG, arrays=ARRAYS)
    monkeypatch.setattr(os, "access", lambda *arguments: False)  # the superuser may write everywhere
    with pytest.raises(PermissionError, match="cannot be written"):
        runs.open_run(tmp_path, CONFIG, arrays=ARRAYS)


def test_metrics_rewind_to_a_step_and_forget_a_line_cut_off(tmp_path):
    run = runs.open_run(tmp_path, CONFIG)
    assert run.metrics() == []
    records = [{"seed": 0, "stage": stage, "step": step} for stage in ("a", "b") for step in (1, 2, 3)]
    for record in records:
        run.append_metrics(record)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"seed": 0, "sta')
    assert run.metrics() == records
    run.rewind_metrics(0, "b", 1)
    assert run.metrics() == records[:4]
    run.append_metrics(records[4])
    assert run.metrics() == records[:5]


@pytest.mark.parametrize("line", ["gibberish\n", "[1]\n", "\xff\n"])
def test_damaged_metrics_are_told(tmp_path, line):
    run = runs.open_run(tmp_path, CONFIG)
    (tmp_path / "metrics.jsonl").write_bytes(line.encode("latin-1"))
    with pytest.raises(runs.RunError, match=r"metrics.jsonl is damaged"):
        run.metrics()


def test_continuing_elsewhere_is_told(tmp_path):
    runs.open_run(tmp_path, CONFIG)
    written = json.loads((tmp_path / "config.json").read_text())
    written["environment"]["jax"] = "0.0.1"
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.warns(UserWarning, match="bits may differ .jax '0.0.1' there and"):
        assert runs.open_run(tmp_path, CONFIG).environment["jax"] == "0.0.1"


def test_commit_of_another_project_is_not_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_git", lambda folder, *arguments: str(tmp_path))
    assert runs.environment()["commit"] is None


def test_results_are_strict_json(tmp_path):
    run = runs.open_run(tmp_path, CONFIG)
    run.write_results([{"name": "a", "accuracy": [0.5]}])
    assert json.loads((tmp_path / "results.json").read_text()) == [{"name": "a", "accuracy": [0.5]}]
    with pytest.raises(ValueError):
        run.write_results([{"name": "a", "accuracy": [float("nan")]}])
