"""Tests of the comparison of runs: pairs, intervals, claims, options, files."""

import json

import numpy as np
import pytest

from jaxkd import runs
from jaxkd.cli.main import main
from jaxkd.runs import RunError, comparison

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
    assert "choose one of each by RUN:STAGE" in found.notes[0]


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
