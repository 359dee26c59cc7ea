"""The sweep: a cell for each pair, the best by validation, the same numbers at once and one after another."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from experiments import sweep
from experiments.cli import OptionError
from experiments.sweep import Config
from jaxkd import data
from jaxkd.distill import Trained

GRID = ("--temperatures", 1, 4, "--alphas", 0.5, "--num-images", 45, "--epochs", 1, "--batch-size", 32)
CELLS = ["T1_alpha0.5", "T4_alpha0.5"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, execute):
    """What a sweep one after another and one at once print, and their folders."""
    folder = tmp_path_factory.mktemp("sweep")
    return [
        (execute("sweep", *GRID, "--at-once", count, "--workdir", folder / str(count)).stdout, folder / str(count))
        for count in (1, 3)
    ]


def rows(folder):
    return {row["name"]: row for row in json.loads((folder / "results.json").read_text())}


def test_names_the_best_pair_by_validation(runs):
    printed, folder = runs[0]
    assert list(rows(folder)) == ["teacher", "labels", *CELLS]
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    reached = {
        name: np.mean(
            [
                [one for one in last if (one["stage"], one["seed"]) == (name, s)][-1]["validation_accuracy"]
                for s in (0, 1)
            ]
        )
        for name in CELLS
    }
    best = max(CELLS, key=lambda name: reached[name])
    assert f"Best by validation: {best}." in printed
    with Image.open(folder / "heatmap.png") as figure:
        assert len(figure.convert("RGB").getcolors(1 << 24)) > 50


def test_students_at_once_are_those_one_after_another(runs):
    alone, at_once = (rows(folder) for _, folder in runs)
    curves = [
        sorted(
            (one["stage"], one["seed"], one["step"], one["loss"])
            for one in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        )
        for _, folder in runs
    ]
    assert [one[:3] for one in curves[0]] == [one[:3] for one in curves[1]]
    np.testing.assert_allclose([one[3] for one in curves[1]], [one[3] for one in curves[0]], rtol=1e-3)
    for name, row in alone.items():
        np.testing.assert_allclose(at_once[name]["accuracy"], row["accuracy"], atol=2 / 30)


def test_heat_map_frames_the_best(tmp_path):
    config = Config(temperatures=(1.0, 4.0), alphas=(0.5,), seeds=2)
    trained = {
        name: [Trained({}, 1.0, 0.5 + 0.1 * i + 0.01 * s) for s in (0, 1)] for i, name in enumerate(["labels", *CELLS])
    }
    sweep.plot(trained, tmp_path / "first.png", config, CELLS[0])
    sweep.plot(trained, tmp_path / "last.png", config, CELLS[1])
    first, last = (
        np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int) for name in ("first.png", "last.png")
    )
    frame = (np.abs(first - [0xD5, 0x5E, 0x00]).sum(-1) < 30).nonzero()
    other = (np.abs(last - [0xD5, 0x5E, 0x00]).sum(-1) < 30).nonzero()
    assert frame[1].mean() < other[1].mean()
    one = Config(temperatures=(2.0,), alphas=(0.5,), seeds=1)
    sweep.plot(
        {"labels": [Trained({}, 1.0, 0.5)], "T2_alpha0.5": [Trained({}, 1.0, 0.6)]}, tmp_path / "one.png", one, ""
    )


def test_cells_differ_in_numbers_alone():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (60, 12, 12, 1), dtype=np.uint8)
    split = data.Split(images, np.arange(60, dtype=np.int32) % 10)
    _, labels, *cells = sweep.make_plan(Config(num_images=20), data.Dataset(split, split, split, tuple("abcdefghij")))
    assert len(cells) == 20 and len({id(one.loss) for one in cells}) == len({id(one.tx) for one in cells}) == 1
    pairs = [(float(one.examples(0)["temperature"]), float(one.examples(0)["alpha"])) for one in cells]
    assert len(set(pairs)) == 20 and pairs[-1] == (16.0, 1.0)
    for one in cells:
        np.testing.assert_array_equal(one.examples(1)["inputs"], labels.examples(1)["inputs"])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"temperatures": ()}, "--temperatures: at least one"),
        ({"temperatures": (1.0, 0.0)}, "--temperatures 0: each must be above 0"),
        ({"temperatures": (math.inf,)}, "--temperatures inf"),
        ({"temperatures": (2.0, 2.0)}, "--temperatures 2 2: each of them once"),
        ({"alphas": (0.5, 1.5)}, "--alphas 1.5: the weight"),
        ({"at_once": -1}, "--at-once -1"),
        ({"at_once": 4, "parallel": "pmap"}, "--at-once 4: students that train at once"),
    ],
)
def test_refuses_what_makes_no_sense(options, error):
    with pytest.raises(OptionError, match=error):
        Config(**options).check()
