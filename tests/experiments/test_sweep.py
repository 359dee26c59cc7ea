"""The sweep: a stage for each pair, the best pair by validation, vectorized or one by one."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from experiments import sweep
from experiments.common.cli import OptionError
from experiments.sweep import Config
from jaxkd import data
from jaxkd.distill import TrainedModel

pytestmark = pytest.mark.thorough  # trains networks, in processes of their own

OPTIONS = (
    "--temperatures",
    1,
    4,
    "--alphas",
    0.5,
    "--num-images",
    45,
    "--epochs",
    1,
    "--batch-size",
    32,
)
PAIRS = ["T1_alpha0.5", "T4_alpha0.5"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, execute):
    """Output and folder of a sweep with one student in a program, and of one with three."""
    parent = tmp_path_factory.mktemp("sweep")
    results = []
    for count in (1, 3):
        folder = parent / str(count)
        process = execute("sweep", *OPTIONS, "--max-students", count, "--workdir", folder)
        results.append((process.stdout, folder))
    return results


def read_rows(folder):
    return {row["name"]: row for row in json.loads((folder / "results.json").read_text())}


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_names_the_best_pair_by_validation(runs):
    printed, folder = runs[0]
    assert list(read_rows(folder)) == ["teacher", "labels", *PAIRS]
    # Later records replace earlier ones, so that the last of each training remains.
    accuracies = {
        (record["stage"], record["seed"]): record["validation_accuracy"]
        for record in read_metrics(folder)
    }
    best = max(PAIRS, key=lambda name: np.mean([accuracies[name, seed] for seed in (0, 1)]))
    assert f"Best by validation: {best}." in printed
    with Image.open(folder / "heatmap.png") as figure:
        assert len(figure.convert("RGB").getcolors(1 << 24)) > 50


def test_vectorized_students_equal_those_trained_one_by_one(runs):
    one_by_one, vectorized = (read_rows(folder) for _, folder in runs)
    curves = [
        sorted(
            (record["stage"], record["seed"], record["step"], record["loss"])
            for record in read_metrics(folder)
        )
        for _, folder in runs
    ]
    assert [point[:3] for point in curves[0]] == [point[:3] for point in curves[1]]
    np.testing.assert_allclose(
        [point[3] for point in curves[1]], [point[3] for point in curves[0]], rtol=1e-3
    )
    for name, row in one_by_one.items():
        np.testing.assert_allclose(vectorized[name]["accuracy"], row["accuracy"], atol=2 / 30)


def test_heat_map_frames_the_best(tmp_path):
    config = Config(temperatures=(1.0, 4.0), alphas=(0.5,), num_seeds=2)
    trained = {
        name: [TrainedModel({}, 1.0, 0.5 + 0.1 * i + 0.01 * seed) for seed in (0, 1)]
        for i, name in enumerate(["labels", *PAIRS])
    }
    centres = []
    for best in PAIRS:
        path = tmp_path / f"{best}.png"
        sweep.plot_heatmap(trained, path, config, best)
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        frame = (np.abs(pixels - [0xD5, 0x5E, 0x00]).sum(-1) < 30).nonzero()
        centres.append(frame[1].mean())
    assert centres[0] < centres[1]


def test_heat_map_of_one_pair_and_one_seed(tmp_path):
    config = Config(temperatures=(2.0,), alphas=(0.5,), num_seeds=1)
    trained = {
        "labels": [TrainedModel({}, 1.0, 0.5)],
        "T2_alpha0.5": [TrainedModel({}, 1.0, 0.6)],
    }
    sweep.plot_heatmap(trained, tmp_path / "heatmap.png", config, "")
    assert (tmp_path / "heatmap.png").read_bytes().startswith(b"\x89PNG")


def test_students_differ_only_in_scalars():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 12, 12, 1), dtype=np.uint8)
    split = data.Split(images, np.arange(60, dtype=np.int32) % 10)
    dataset = data.Dataset(split, split, split, tuple("abcdefghij"))
    _, labels, *students = sweep.make_plan(Config(num_images=20), dataset)
    assert len(students) == 20
    assert len({id(stage.loss) for stage in students}) == 1
    assert len({id(stage.tx) for stage in students}) == 1
    pairs = [
        (float(stage.examples(0)["temperature"]), float(stage.examples(0)["alpha"]))
        for stage in students
    ]
    assert len(set(pairs)) == 20 and pairs[-1] == (16.0, 1.0)
    for stage in students:
        np.testing.assert_array_equal(stage.examples(1)["inputs"], labels.examples(1)["inputs"])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"temperatures": ()}, "--temperatures: needs at least one"),
        ({"temperatures": (1.0, 0.0)}, "--temperatures 0: each must be above 0"),
        ({"temperatures": (math.inf,)}, "--temperatures inf"),
        ({"temperatures": (2.0, 2.0)}, "--temperatures 2 2: the values must differ"),
        ({"alphas": (0.5, 1.5)}, "--alphas 1.5: the weight"),
        ({"max_students": -1}, "--max-students -1"),
        (
            {"max_students": 4, "parallel": "pmap"},
            "--max-students 4: students in one program",
        ),
    ],
)
def test_refuses_invalid_options(options, error):
    with pytest.raises(OptionError, match=error):
        Config(**options).check()
