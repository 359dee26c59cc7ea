"""Tests of the comparison of runs: pairs, intervals, claims, options, files."""

import json

import numpy as np
import pytest

from jaxkd import evaluate, runs
from jaxkd.cli.main import main
from jaxkd.runs import RunError, comparison, growth, report
from jaxkd.runs.figures import COLOURS

FIRST, SECOND = (0.80, 0.82, 0.81), (0.85, 0.88, 0.86)


def make_run(folder, accuracies, *, config=None, seeds=(0, 1, 2), arrays=(), results=True):
    """Makes a finished run of some stages."""
    run = runs.open_run(folder, config or {}, arrays=list(arrays))
    for stage in accuracies:
        for seed in seeds:
            for step in (1, 2):
                record = {"seed": seed, "stage": stage, "step": step, "validation_loss": 1 / step}
                run.append_metrics(record | {"validation_accuracy": 0.4 * step})
    if results:
        run.write_results(
            [runs.ResultRow(name, accuracy=values) for name, values in accuracies.items()]
        )
    return folder


def test_equal_seeds_and_data_are_paired(tmp_path):
    first = make_run(tmp_path / "a", {"student": FIRST}, config={"alpha": 0.5, "same": 1})
    second = make_run(tmp_path / "b", {"student": SECOND}, config={"alpha": 0.9, "same": 1})
    found = comparison.compare_results([first, second])
    assert [row.name for row in found.rows] == ["a/student", "b/student"]
    assert found.options == {"alpha": [0.5, 0.9]}
    (difference,) = found.differences
    assert difference.is_paired and difference.num_seeds == (3, 3)
    # 5, 6 and 5 points: 16/3 with a deviation of 0.577 and t(2) = 4.303.
    assert difference.mean == pytest.approx(16 / 3)
    margin = 4.3027 * 0.57735 / 3**0.5
    assert difference.interval == pytest.approx((16 / 3 - margin, 16 / 3 + margin), abs=1e-3)
    assert difference.is_claimed
    assert str(difference) == (
        "b/student is 5.3 points above a/student, 95 % interval +3.9 to +6.8 (3 seeds, paired)."
    )


def test_pairs_are_those_of_the_common_seeds(tmp_path):
    first = make_run(tmp_path / "a", {"student": FIRST})
    second = make_run(tmp_path / "b", {"student": SECOND}, seeds=(1, 2, 3))
    (difference,) = comparison.compare_results([first, second]).differences
    assert difference.is_paired and difference.num_seeds == (2, 2)
    assert difference.mean == pytest.approx(100 * np.mean([0.85 - 0.82, 0.88 - 0.81]))


def test_other_seeds_are_not_paired(tmp_path):
    first = make_run(tmp_path / "a", {"student": FIRST})
    second = make_run(tmp_path / "b", {"student": SECOND}, seeds=(7, 8, 9))
    (difference,) = comparison.compare_results([first, second]).differences
    assert not difference.is_paired and difference.mean == pytest.approx(16 / 3)
    # Welch's interval, from scipy.stats.ttest_ind(...).confidence_interval().
    low, high = difference.interval
    assert (low, high) == pytest.approx((2.2124, 8.4542), abs=1e-3)


def test_nothing_is_claimed_across_other_data(tmp_path):
    first = make_run(tmp_path / "a", {"student": FIRST}, arrays=[np.zeros(3)])
    second = make_run(tmp_path / "b", {"student": SECOND}, arrays=[np.ones(3)])
    found = comparison.compare_results([first, second])
    (difference,) = found.differences
    assert not difference.is_paired and not difference.is_claimed
    assert "The runs have other data: no difference is claimed." in str(difference)
    assert any("b and a have other data, test sets included" in note for note in found.notes)


@pytest.mark.parametrize("seeds", [1, 3])
def test_small_differences_are_not_claimed(tmp_path, seeds):
    first = make_run(tmp_path / "a", {"student": FIRST[:seeds]}, seeds=range(seeds))
    values = (0.83, 0.80, 0.82)[:seeds]
    second = make_run(tmp_path / "b", {"student": values}, seeds=range(seeds))
    (difference,) = comparison.compare_results([first, second]).differences
    assert not difference.is_claimed
    expected = "One seed does not separate" if seeds == 1 else "The interval has 0"
    assert expected in str(difference)


def test_stages_may_be_chosen(tmp_path):
    stages = {"alone": FIRST, "kd": SECOND}
    first, second = make_run(tmp_path / "a", stages), make_run(tmp_path / "b", stages)
    found = comparison.compare_results([first, second], stage="kd")
    assert [row.name for row in found.rows] == ["a/kd", "b/kd"]
    # Stages of other names, also of one run.
    (difference,) = comparison.compare_results([f"{first}:alone", f"{first}:kd"]).differences
    assert difference.is_paired and difference.mean == pytest.approx(16 / 3)
    assert len(comparison.compare_results([first, second]).differences) == 2


def test_runs_without_common_stages(tmp_path):
    first = make_run(tmp_path / "a", {"one": FIRST, "two": FIRST})
    second = make_run(tmp_path / "b", {"three": FIRST})
    found = comparison.compare_results([first, second])
    assert not found.differences
    assert any("choose one of each by RUN:STAGE" in note for note in found.notes)


def test_equal_names_of_folders_get_their_parents(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    paths = [make_run(tmp_path / name / "run", {"student": FIRST}) for name in ("x", "y")]
    found = comparison.compare_results(paths)
    assert list(found.runs) == ["x/run", "y/run"]


def test_pretrained_model_without_records(tmp_path):
    first = make_run(tmp_path / "a", {"teacher": (0.9,)}, seeds=())
    second = make_run(tmp_path / "b", {"teacher": (0.9,)}, seeds=())
    (difference,) = comparison.compare_results([first, second]).differences
    assert difference.mean == 0 and difference.interval is None


def test_a_derived_model_has_the_seeds_of_its_run(tmp_path):
    run = make_run(tmp_path / "a", {"student": FIRST})
    rows = [("student", FIRST), ("ensemble", SECOND)]
    results = [runs.ResultRow(name, accuracy=values) for name, values in rows]
    runs.open_run(run, {}).write_results(results)
    chosen = [f"{run}:student", f"{run}:ensemble"]
    (difference,) = comparison.compare_results(chosen).differences
    assert difference.is_paired and difference.num_seeds == (3, 3)


def test_files(tmp_path, capsys):
    first = make_run(tmp_path / "a", {"student": FIRST}, config={"alpha": 0.5})
    second = make_run(tmp_path / "b", {"student": SECOND}, config={"alpha": 0.9})
    output = tmp_path / "out"
    main(["compare", str(first), str(second), "-o", str(output)])
    printed = capsys.readouterr().out
    assert "alpha: 0.5 in a, 0.9 in b" in printed and "3 seeds, paired" in printed
    text = (output / "compare.md").read_text()
    assert "| a/student" in text and "| alpha" in text and "compare_curves.png" in text
    assert (output / "compare_curves.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((output / "compare.json").read_text())
    assert content["differences"][0]["is_claimed"] is True
    main(["compare", str(first), str(second), "--json"])
    assert json.loads(capsys.readouterr().out) == content
    with pytest.raises(SystemExit, match="has compare.md.*: name another folder"):
        main(["compare", str(first), str(second), "-o", str(output)])


def test_bad_runs(tmp_path):
    first = make_run(tmp_path / "a", {"student": FIRST})
    with pytest.raises(ValueError, match="two runs or more"):
        comparison.compare_results([first])
    with pytest.raises(ValueError, match="named twice"):
        comparison.compare_results([first, first])
    with pytest.raises(RunError, match="has no stage 'kd', but student"):
        comparison.compare_results([first, f"{first}:kd"])
    with pytest.raises(RunError, match="holds no run"):
        comparison.compare_results([first, tmp_path / "nothing"])
    stopped = make_run(tmp_path / "stopped", {"student": FIRST}, results=False)
    with pytest.raises(RunError, match="has no results yet: finish the run first"):
        comparison.compare_results([first, stopped])


def test_seeds_that_are_not_in_order_are_not_paired(tmp_path):
    data = [np.zeros(3)]
    # 1 point for each seed, which pairs in ascending order would hide.
    first = make_run(tmp_path / "a", {"student": (0.90, 0.70)}, seeds=(5, 3), arrays=data)
    second = make_run(tmp_path / "b", {"student": (0.71, 0.91)}, seeds=(3, 5), arrays=data)
    (difference,) = comparison.compare_results([first, second]).differences
    assert not difference.is_paired and "2 and 2 seeds, not paired" in str(difference)


def test_seeds_of_the_options_are_paired_whatever_was_trained_last(tmp_path):
    config = {"seed": 3, "num_seeds": 2}
    # Seed 3 was trained again, so that its records come last.
    options = {"config": config, "arrays": [np.zeros(3)]}
    first = make_run(tmp_path / "a", {"student": (0.70, 0.90)}, seeds=(4, 3), **options)
    second = make_run(tmp_path / "b", {"student": (0.71, 0.91)}, seeds=(3, 4), **options)
    (difference,) = comparison.compare_results([first, second]).differences
    assert difference.is_paired and difference.interval == pytest.approx((1, 1))


def test_seeds_of_the_options_count_only_if_they_were_trained(tmp_path):
    # As many seeds as the options say and the same last one, but 0 in place of 1.
    config = {"seed": 1, "num_seeds": 3}
    first = make_run(tmp_path / "a", {"student": FIRST}, seeds=(0, 2, 3), config=config)
    second = make_run(tmp_path / "b", {"student": SECOND}, seeds=(1, 2, 3))
    (difference,) = comparison.compare_results([first, second]).differences
    assert difference.is_paired and difference.num_seeds == (2, 2)
    assert difference.mean == pytest.approx(100 * np.mean([0.88 - 0.82, 0.86 - 0.81]))


def make_tested(folder, accuracies, num_examples):
    """Makes a run that was tested on so many examples."""
    folder = make_run(folder, {"student": accuracies}, arrays=[np.zeros(3)])
    correct = float(np.mean(accuracies)) * num_examples
    interval = evaluate.accuracy_interval(correct, num_examples)
    row = runs.ResultRow("student", accuracy=accuracies, accuracy_interval=interval)
    runs.read_run(folder).write_results([row])
    return folder


@pytest.mark.parametrize(
    ("num_examples", "accuracies"),
    [(1, (1.0,)), (10, (0.0, 0.1)), (200, (0.5, 0.5)), (10_000, (0.99, 1.0)), (99_999, (0.3,))],
)
def test_interval_tells_the_number_of_test_examples(num_examples, accuracies):
    correct = float(np.mean(accuracies)) * num_examples
    interval = evaluate.accuracy_interval(correct, num_examples)
    row = runs.ResultRow("student", accuracy=accuracies, accuracy_interval=interval)
    assert comparison._count_test_examples(row) == num_examples


def test_nothing_is_claimed_across_test_sets(tmp_path):
    first = make_tested(tmp_path / "a", FIRST, 1000)
    found = comparison.compare_results([first, make_tested(tmp_path / "b", SECOND, 200)])
    assert not found.differences[0].is_paired and not found.differences[0].is_claimed
    assert "There are test sets of 200 and 1,000 examples." in found.notes
    found = comparison.compare_results([first, make_tested(tmp_path / "c", SECOND, 1000)])
    assert found.differences[0].is_claimed and not found.notes


def test_data_that_were_not_recorded_are_said(tmp_path):
    paths = [make_run(tmp_path / name, {"student": FIRST}) for name in "ab"]
    (note,) = comparison.compare_results(paths).notes
    assert note.startswith("a, b recorded no data, so that equal data are taken for granted")


def test_another_environment_is_said(tmp_path):
    paths = [make_run(tmp_path / n, {"student": FIRST}, arrays=[np.zeros(3)]) for n in "ab"]
    content = json.loads((paths[1] / "config.json").read_text())
    content["environment"]["jax"] = "0.1"
    (paths[1] / "config.json").write_text(json.dumps(content))
    (note,) = comparison.compare_results(paths).notes
    assert note.startswith("b ran in another environment than a, so times may not compare (jax was")


def test_results_without_an_accuracy_are_named(tmp_path):
    first = make_run(tmp_path / "a", {"student": FIRST})
    runs.open_run(tmp_path / "b", {}).write_results([runs.ResultRow("bleu", extra={"bleu": [1]})])
    with pytest.raises(RunError, match="b has no accuracy to compare: see its report.md"):
        comparison.compare_results([first, tmp_path / "b"])


def test_options_of_a_run_that_is_named_twice_have_one_column(tmp_path, capsys):
    stages = {"alone": FIRST, "kd": SECOND}
    first = make_run(tmp_path / "a", stages, config={"alpha": 0.5})
    second = make_run(tmp_path / "b", stages, config={"alpha": 0.9})
    chosen = [f"{first}:alone", f"{first}:kd", f"{second}:kd"]
    found = comparison.compare_results(chosen)
    assert list(found.runs) == ["a", "b"] and found.options == {"alpha": [0.5, 0.9]}
    main(["compare", *chosen])
    assert "alpha: 0.5 in a, 0.9 in b\n" in capsys.readouterr().out


def test_equal_stages_have_one_colour(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(comparison, "plot_curves", lambda *args, names: calls.append(names))
    stages = {"alone": FIRST, "kd": SECOND}
    paths = [make_run(tmp_path / name, stages) for name in "ab"]
    comparison.write_comparison(comparison.compare_results(paths), tmp_path / "all")
    comparison.write_comparison(comparison.compare_results(paths, stage="kd"), tmp_path / "kd")
    places = {name: i % len(COLOURS) for i, name in enumerate(calls[0])}
    assert places["a/alone"] == places["b/alone"] != places["a/kd"] == places["b/kd"]
    # Runs, where there is one stage.
    assert calls[1] == ["a/kd", "b/kd"]


def test_options_are_those_of_the_results(tmp_path):
    first = make_run(tmp_path / "a", {"student": FIRST}, config={"epochs": 1})
    second = make_run(tmp_path / "b", {"student": SECOND}, config={"epochs": 2})
    rows = [runs.ResultRow("student", accuracy=SECOND, parameters=9)]
    report.report_run(runs.open_run(second, {"epochs": 2}), rows, title="b")
    run = runs.open_run(second, {"epochs": 300}, grow=True)
    growth.record_growth(run, trains=True)
    found = comparison.compare_results([first, second])
    assert found.options == {"epochs": [1, 2]}
    assert "b is growing: its results and options are those before." in found.notes
    (second / "report.json").unlink()
    found = comparison.compare_results([first, second])
    assert found.options == {"epochs": [1, 300]}
    assert found.notes[-1] == "b has no report.json: its options may not be those before."


def test_a_file_as_the_folder_of_a_comparison_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(runs.RunError, match="file is not a folder: choose another --output"):
        comparison.write_comparison(None, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
