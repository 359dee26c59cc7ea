"""The square of trainings that splits chance by its causes."""

import json

import numpy as np
import pytest

from experiments import seed_study
from experiments.common.cli import OptionError
from jaxkd import data


def test_cells_share_what_their_rows_columns_and_letters_name(image_dir):
    dataset = data.load(image_dir, image_size=28)
    config = seed_study.Config(num_images=45, size=3)
    teacher, *students = seed_study.make_plan(config, dataset)
    assert len(students) == 18 and teacher.name == "teacher"
    for a, b in zip(students[::2], students[1::2], strict=True):
        assert a.key_name == b.key_name and b.teachers == ("teacher",)
    names = [tuple(stage.key_name[p] for p in ("init", "order", "step")) for stage in students[::2]]
    # Every pair of levels of two causes occurs once.
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert len({(name[first], name[second]) for name in names}) == 9


def test_the_summary_separates_pairs_from_chance():
    generator = np.random.default_rng(0)
    chance = generator.normal(size=(5, 1)) + np.zeros((5, 5))
    squares = {
        "a": 70 + chance + 0.1 * generator.normal(size=(5, 5)),
        "b": 72 + chance + 0.1 * generator.normal(size=(5, 5)),
    }
    summary = seed_study.conclude(squares)
    assert summary["difference"] == pytest.approx(2, abs=0.1)
    assert summary["paired_deviation"] < 0.3 < summary["deviation"]
    counts = summary["seeds"][1.0]
    assert counts["paired"] < counts["unpaired"]
    table = seed_study.describe_components(summary["components"])
    assert table.count("model A") == table.count("model B") == 4
    assert "initial weights" in table


@pytest.mark.thorough
def test_runs_and_reports(tmp_path, execute):
    folder = tmp_path / "run"
    printed = execute(
        "seed_study",
        *("--image-size", 28, "--num-images", 45, "--num-seeds", 1, "--epochs", 1),
        *("--size", 3, "--workdir", folder),
    ).stdout
    results = json.loads((folder / "causes.json").read_text())
    assert np.shape(results["accuracies"]["a"]) == (3, 3)
    assert [part["name"] for part in results["components"]["b"]] == [*seed_study.CAUSES, "rest"]
    assert (folder / "causes.png").stat().st_size > 10_000
    assert (
        "seeds, pairs as here" in printed
        and "seeds, pairs as here" in (folder / "report.md").read_text()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_seeds": 3}, "use --size"),
        ({"size": 2}, "--size 2: needs at least 3"),
        ({"augment": True}, "cropped and mirrored in any case"),
    ],
)
def test_unfit_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        seed_study.Config(**options).check()
