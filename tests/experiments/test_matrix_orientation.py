"""Benchmark of orientations: the calls do what they say, and the report follows from the times."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from experiments import matrix_orientation
from experiments.common import cli
from jaxkd import layout

TINY = ("--sizes", "20", "30", "--product-limit", "20", "--repeats", "2")


@pytest.fixture(scope="module")
def printed(tmp_path_factory, environment):
    """The folder and the output of a run."""
    folder = tmp_path_factory.mktemp("run") / "workdir"
    options = (*TINY, "--workdir", str(folder))
    benchmark = subprocess.run(
        [sys.executable, "-m", "experiments.matrix_orientation", *options],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert not benchmark.stderr, benchmark.stderr
    return folder, benchmark.stdout


@pytest.mark.thorough
def test_writes_and_prints_every_case(printed):
    folder, text = printed
    assert sorted(path.name for path in folder.iterdir()) == [
        "matrix_orientation.png",
        "results.json",
    ]
    results = json.loads((folder / "results.json").read_text())
    assert results["config"] == {
        "sizes": [20, 30],
        "product_limit": 20,
        "repeats": 2,
        "workdir": str(folder),
    }
    rows = results["rows"]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
    names = [
        tuple(str(value) for key, value in sorted(row.items()) if key != "seconds") for row in rows
    ]
    # Two sizes of three tasks in two libraries, orders and directions each; eight products in two
    # libraries at one size.
    assert len(names) == len({*names}) == 2 * 3 * 8 + 8 * 2
    for orders in itertools.product(("row", "column"), repeat=3):
        assert f"{orders[0]} · {orders[1]} → {orders[2]} " in text
    assert results["environment"]["jax"] in text and "cores)" in text
    assert len(results["summary"]) == 2 and all(sentence in text for sentence in results["summary"])
    assert "…" not in text, "a cell is cut off"
    with Image.open(folder / "matrix_orientation.png") as image:
        assert image.size == (1650, 660) and len(image.convert("RGB").getcolors(1 << 24)) > 100


def test_calls_compute_what_their_names_say():
    groups = list(matrix_orientation.access_cases(6))
    matrix = np.random.default_rng(0).random((6, 6), np.float32)
    for case in itertools.chain(*groups):
        result = case.call()
        if case.name["task"] == "sum":
            axis = 1 if case.name["by"] == "row" else 0
            np.testing.assert_allclose(result, matrix.sum(axis), rtol=1e-5)
        elif case.name["task"] == "walk":
            np.testing.assert_allclose(result, matrix.sum(), rtol=1e-5)
    assert [[case.name["task"] for case in cases] for cases in groups] == [
        [task] * 8 for task in ("walk", "sum", "scale")
    ]
    lhs, rhs = np.random.default_rng(0).random((2, 6, 6), np.float32)
    for case in matrix_orientation.product_cases(6):
        result = case.call()
        order = layout.order_of(np.asarray(result))
        assert order == "row", "a transposed result is stored, not a view"
        expected = lhs @ rhs if case.name["orders"][2] == "row" else (lhs @ rhs).T
        np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_repeated_scaling_works_in_place_and_keeps_the_order():
    (*_, scale_cases) = matrix_orientation.access_cases(6)
    matrix = np.random.default_rng(0).random((6, 6), np.float32)
    signs = np.array([1, -1] * 3, np.float32)
    for case in scale_cases:
        scaled = matrix * (signs[:, None] if case.name["by"] == "row" else signs[None, :])
        # NumPy's calls by rows and by columns share a matrix, which two calls restore.
        for expected in (scaled, matrix, scaled, matrix):
            result = case.call()
            np.testing.assert_array_equal(result, expected)
            assert layout.order_of(result) == case.name["order"]


def row(seconds, **names):
    return {"seconds": seconds, **names}


def test_ratios_are_taken_round_by_round():
    # The second round was slow for both cases: the ratios are 2, 2, 3, 2, not those of the sums.
    rows = [row([1.0, 10.0, 1.0, 1.0], by="row"), row([2.0, 20.0, 3.0, 2.0], by="column")]
    assert matrix_orientation.access_ratio(rows) == (2.0, 2.0, 2.25)


def test_sentences_follow_from_the_times():
    rows = []
    for task, library, order, by in itertools.product(
        ("walk", "sum", "scale"), ("numpy", "jax"), ("row", "column"), ("row", "column")
    ):
        factor = 5 if library == "jax" and order == "column" else 1
        seconds = factor * (2.0 if by == order else 6.0)
        names = {"task": task, "size": 1000, "library": library, "order": order, "by": by}
        rows.append(row([seconds, seconds], **names))
    for i, orders in enumerate(itertools.product(("row", "column"), repeat=3)):
        common = {"task": "product", "size": 500, "orders": list(orders)}
        rows += [
            row([1.0 + i, 1.0 + i], library="numpy", **common),
            row([1.0, 1.0], library="jax", **common),
        ]
    access, product = matrix_orientation.conclude(rows)
    assert (
        "1,000 × 1,000, columns take 3.00 (3.00–3.00) times as long as rows in NumPy and 3.00"
        in access
    )
    # By rows: 6 in a column-major matrix against 2; 5 times 6 against 2 in JAX.
    assert (
        "takes 3.00 (3.00–3.00) times as long in NumPy and 15.00 (15.00–15.00) times in JAX"
        in access
    )
    assert "2.00 to 8.00 times (7 of 7 clear of the spread) the time" in product
    assert "1.00 to 1.00 times (0 of 7 clear of the spread) in JAX" in product


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--sizes", "1"), "--sizes 1: must be from 2"),
        (("--sizes", "40000"), "to 30000"),
        (("--sizes", "20", "20"), "only once"),
        (("--sizes", "300", "--product-limit", "200"), "at least the smallest size, 300"),
        (("--repeats", "0"), "--repeats 0: must be at least 1"),
        (("--sizes", "20", "--workdir", "FILE"), "is not a folder"),
    ],
)
def test_bad_options_end_in_one_line(options, expected, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    arguments = [str(tmp_path / "file") if option == "FILE" else option for option in options]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["matrix_orientation", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.run(matrix_orientation.main, matrix_orientation.Config, None)
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    assert expected in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
