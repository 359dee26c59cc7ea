"""Other configurations of a run, and trainings that are set aside and taken back."""

import json

import numpy as np
import pytest

from jaxkd import runs
from jaxkd.runs import ResultRow, checkpoints, growth
from jaxkd.runs.report import report_run

CONFIG = {"experiment": "tiny", "num_seeds": 1, "alpha": 0.5, "workdir": "a"}
TREE = {"weights": np.arange(3.0)}


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def test_another_configuration_is_recorded_with_a_history_of_the_earlier_ones(tmp_path):
    runs.open_run(tmp_path, CONFIG)
    before = (tmp_path / "config.json").read_bytes()
    run = runs.open_run(tmp_path, CONFIG | {"alpha": 0.7}, grow=True)
    # Nothing is written until the plan is known to be sound.
    assert (tmp_path / "config.json").read_bytes() == before
    growth.record_growth(run, trains=False)
    content = read_config(tmp_path)
    assert content["config"]["alpha"] == 0.7 and content["is_growing"]
    (earlier,) = content["history"]
    assert earlier["config"] == CONFIG and earlier["environment"] == run.environment
    assert growth.describe_growth(runs.read_run(tmp_path)) == "alpha was 0.5 and is 0.7"
    run.write_results([ResultRow("student")])
    assert "is_growing" not in read_config(tmp_path)
    # The same configuration again, and one that differs in where it computes.
    for config in (run.config, run.config | {"workdir": "b"}):
        before = (tmp_path / "config.json").read_bytes()
        again = runs.open_run(tmp_path, config, grow=True)
        growth.record_growth(again, trains=False)
        assert (tmp_path / "config.json").read_bytes() == before
    growth.record_growth(again, trains=True)
    assert runs.read_run(tmp_path).is_growing


def report(run):
    """Reports one row, as a command does at its end."""
    record = {"seed": 0, "stage": "student", "step": 1, "validation_loss": 0.5}
    run.append_metrics(record | {"validation_accuracy": 0.8})
    rows = [ResultRow("student", accuracy=(0.8,), parameters=9)]
    report_run(run, rows, title="Run")


def test_results_have_the_configuration_of_their_report(tmp_path):
    run = runs.open_run(tmp_path, CONFIG)
    report(run)
    assert growth.find_settings_of_results(runs.read_run(tmp_path)).config == CONFIG
    assert growth.describe_unfinished(runs.read_run(tmp_path)) == ""
    # Stopped twice before the next results.
    for alpha in (0.7, 0.9):
        run = runs.open_run(tmp_path, CONFIG | {"alpha": alpha}, grow=True)
        growth.record_growth(run, trains=True)
    run = runs.read_run(tmp_path)
    assert run.config["alpha"] == 0.9
    assert growth.find_settings_of_results(run).config == CONFIG
    assert growth.describe_unfinished(run).endswith(
        " goes on (alpha was 0.5 and is 0.9) and is not finished: its results and its student are "
        "those before"
    )
    (tmp_path / "report.json").unlink()
    assert growth.find_settings_of_results(run) is None
    assert " goes on and is not finished" in growth.describe_unfinished(run)
    report(runs.open_run(tmp_path, run.config, grow=True))
    run = runs.read_run(tmp_path)
    assert growth.find_settings_of_results(run).config["alpha"] == 0.9
    assert growth.describe_unfinished(run) == ""


def test_the_number_of_seeds_changes_no_training(tmp_path):
    runs.open_run(tmp_path, CONFIG)
    run = runs.open_run(tmp_path, CONFIG | {"num_seeds": 5}, grow=True)
    assert growth.describe_growth(run) == "" and len(run.history) == 1


def test_results_record_a_configuration_that_no_plan_has(tmp_path):
    runs.open_run(tmp_path, CONFIG)
    run = runs.open_run(tmp_path, CONFIG | {"alpha": 0.7}, grow=True)
    run.write_results([])
    assert read_config(tmp_path)["config"]["alpha"] == 0.7


def test_another_experiment_and_other_data_are_refused(tmp_path):
    runs.open_run(tmp_path, CONFIG)
    with pytest.raises(runs.RunError, match=r"experiment was 'tiny' and is 'big'\): name another"):
        runs.open_run(tmp_path, CONFIG | {"experiment": "big"}, grow=True)
    with pytest.raises(runs.RunError, match="command was None and is 'distill'"):
        runs.open_run(tmp_path, CONFIG | {"command": "distill"}, grow=True)
    with pytest.raises(runs.RunError, match="other data"):
        runs.open_run(tmp_path, CONFIG, arrays=[np.ones(2)], grow=True)
    with pytest.raises(runs.RunError, match=r"alpha was .*, or open it with grow=True for run_pl"):
        runs.open_run(tmp_path, CONFIG | {"alpha": 0.7})


@pytest.mark.parametrize("history", [3, [3], "ab", [{}], [{"config": [], "environment": {}}]])
def test_a_damaged_history_is_refused(tmp_path, history):
    runs.open_run(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(read_config(tmp_path) | {"history": history}))
    with pytest.raises(runs.RunError, match="is not the configuration of a run"):
        runs.read_run(tmp_path)


def save_training(run, seed, stage, scale=1.0):
    tree = {"weights": scale * TREE["weights"]}
    checkpoints.save(run.checkpoint_folder(seed, stage), 1, tree)
    run.append_metrics({"seed": seed, "stage": stage, "step": 1, "loss": scale})


def get_losses(run):
    return sorted((r["stage"], r["seed"], r["loss"]) for r in run.metrics())


def load_weights(folder):
    return checkpoints.load(folder).tree["weights"]


def test_trainings_are_set_aside_and_taken_back_with_their_records(tmp_path):
    run = runs.open_run(tmp_path, CONFIG)
    # Names with a dot and a number look like those of folders.
    for stage in ("a", "a.1"):
        save_training(run, 0, stage)
    growth.set_aside(run, 0, "a")
    assert get_losses(run) == [("a.1", 0, 1.0)]
    save_training(run, 0, "a", 2.0)
    growth.set_aside(run, 0, "a")
    growth.set_aside(run, 0, "a")  # nothing is there
    newest, oldest = growth.find_set_aside(run, 0, "a")
    assert (newest.name, oldest.name) == (".a.1", ".a.0")
    assert growth.find_set_aside(run, 0, "a.1") == []
    assert growth.find_trainings(run) == [(0, "a"), (0, "a.1")]
    save_training(run, 0, "a", 3.0)
    growth.take_back(run, 0, "a", oldest)
    assert get_losses(run) == [("a", 0, 1.0), ("a.1", 0, 1.0)]
    np.testing.assert_array_equal(load_weights(run.checkpoint_folder(0, "a")), TREE["weights"])
    newest = growth.find_set_aside(run, 0, "a")[0]
    np.testing.assert_array_equal(load_weights(newest), 3.0 * TREE["weights"])
    growth.delete_set_aside(run, 0, "a")
    assert growth.find_set_aside(run, 0, "a") == []
    assert growth.find_trainings(run) == [(0, "a"), (0, "a.1")]
