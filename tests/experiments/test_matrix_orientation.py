"""The timing of orientations: what is timed does what it says, and what is reported follows from the times."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from experiments import cli, matrix_orientation
from jaxkd import layout

TINY = ("--sizes", "20", "30", "--product-limit", "20", "--repeats", "2")


@pytest.fixture(scope="module")
def printed(tmp_path_factory, environment):
    """A run to its end: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "workdir"
    line = [sys.executable, "-m", "experiments.matrix_orientation", *TINY, "--workdir", str(folder)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True, timeout=300)
    assert not done.stderr, done.stderr
    return folder, done.stdout


def test_leaves_and_prints_every_case(printed):
    folder, text = printed
    assert sorted(path.name for path in folder.iterdir()) == ["matrix_orientation.png", "results.json"]
    results = json.loads((folder / "results.json").read_text())
    assert results["config"] == {"sizes": [20, 30], "product_limit": 20, "repeats": 2, "workdir": str(folder)}
    rows = results["rows"]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
    names = [tuple(str(value) for key, value in sorted(row.items()) if key != "seconds") for row in rows]
    # Two sizes of three tasks in two libraries, orders and directions; one size of eight products in two libraries.
    assert len(names) == len({*names}) == 2 * 3 * 8 + 8 * 2
    for orders in itertools.product(("row", "column"), repeat=3):
        assert f"{orders[0]} · {orders[1]} → {orders[2]} " in text
    assert results["environment"]["jax"] in text and "cores)" in text
    assert len(results["summary"]) == 2 and all(sentence in text for sentence in results["summary"])
    assert "…" not in text, "a cell is cut off"
    with Image.open(folder / "matrix_orientation.png") as image:
        assert image.size == (1650, 660) and len(image.convert("RGB").getcolors(1 << 24)) > 100


def test_calls_do_what_they_are_named_for():
    groups = list(matrix_orientation.access_cases(6))
    matrix = np.random.default_rng(0).random((6, 6), np.float32)
    for case in itertools.chain(*groups):
        found = case.call()
        if case.name["task"] == "sum":
            np.testing.assert_allclose(found, matrix.sum(1 if case.name["by"] == "row" else 0), rtol=1e-5)
        elif case.name["task"] == "walk":
            np.testing.assert_allclose(found, matrix.sum(), rtol=1e-5)
    assert [[case.name["task"] for case in cases] for cases in groups] == [
        [task] * 8 for task in ("walk", "sum", "scale")
    ]
    left, right = np.random.default_rng(0).random((2, 6, 6), np.float32)
    for case in matrix_orientation.product_cases(6):
        out = case.call()
        assert layout.order_of(np.asarray(out)) == "row", "the result is stored as it is returned"
        wanted = left @ right if case.name["orders"][2] == "row" else (left @ right).T
        np.testing.assert_allclose(out, wanted, rtol=1e-5)


def test_scaling_goes_on_in_place_and_in_order():
    (*_, scales) = matrix_orientation.access_cases(6)
    matrix, signs = np.random.default_rng(0).random((6, 6), np.float32), np.array([1, -1] * 3, np.float32)
    for case in scales:
        scaled = matrix * (signs[:, None] if case.name["by"] == "row" else signs[None, :])
        # The calls by rows and by columns of NumPy share their matrix, which is itself again after two.
        for wanted in (scaled, matrix, scaled, matrix):
            found = case.call()
            np.testing.assert_array_equal(found, wanted)
            assert layout.order_of(found) == case.name["order"]


def row(seconds, **names):
    return {"seconds": seconds, **names}


def test_ratios_are_taken_round_by_round():
    # The second round met other work, which slowed both: the ratios are 2, 2, 3, 2 and not those of the sums.
    rows = [row([1.0, 10.0, 1.0, 1.0], by="row"), row([2.0, 20.0, 3.0, 2.0], by="column")]
    found = matrix_orientation.access_ratio(rows)
    assert found == (2.0, 2.0, 2.25)


def test_sentences_follow_from_the_times():
    orders = itertools.product(("row", "column"), repeat=3)
    rows = [
        row([(2.0 if by == order else 6.0) * (5 if library == "jax" and order == "column" else 1)] * 2, **names)
        for task, library, order, by in itertools.product(
            ("walk", "sum", "scale"), ("numpy", "jax"), ("row", "column"), ("row", "column")
        )
        for names in [{"task": task, "size": 1000, "library": library, "order": order, "by": by}]
    ]
    for i, order in enumerate(orders):
        common = {"task": "product", "size": 500, "orders": list(order)}
        rows += [row([1.0 + i, 1.0 + i], library="numpy", **common), row([1.0, 1.0], library="jax", **common)]
    access, product = matrix_orientation.conclude(rows)
    assert "1,000 × 1,000, columns take 3.00 (3.00–3.00) times as long as rows in NumPy and 3.00" in access
    # By rows: 6 in a column-major matrix against 2; 5 times 6 against 2 in JAX.
    assert "takes 3.00 (3.00–3.00) times as long in NumPy and 15.00 (15.00–15.00) times in JAX" in access
    assert "2.00 to 8.00 times (7 of 7 clear of the spread) the time" in product
    assert "1.00 to 1.00 times (0 of 7 clear of the spread) in JAX" in product


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--sizes", "1"), "--sizes 1: choose from 2"),
        (("--sizes", "40000"), "to 30000"),
        (("--sizes", "20", "20"), "only once"),
        (("--sizes", "300", "--product-limit", "200"), "the smallest size is 300"),
        (("--repeats", "0"), "at least one"),
        (("--sizes", "20", "--workdir", "FILE"), "File exists"),
    ],
)
def test_bad_options_end_in_one_line(options, expected, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    given = [str(tmp_path / "file") if option == "FILE" else option for option in options]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["matrix_orientation", *given])
    with pytest.raises(SystemExit) as stop:
        cli.run(matrix_orientation.main, matrix_orientation.Config, None)
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    assert expected in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
