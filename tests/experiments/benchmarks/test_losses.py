"""Benchmark of losses: both sides compute the same, and the report follows from the times."""

import importlib.util
import inspect
import json

import jax
import numpy as np
import pytest
from PIL import Image

from experiments.benchmarks import loss_cases
from experiments.benchmarks import losses as losses_benchmark
from jaxkd import losses

needs_torch = pytest.mark.skipif(
    not importlib.util.find_spec("torch"), reason="PyTorch is not installed"
)
TINY = losses_benchmark.Config(batch=6, classes=(5,), tokens=8, hidden=4, vocabulary=7)
OPTIONS = (
    "--batch",
    "4",
    "--classes",
    "5",
    "--tokens",
    "8",
    "--hidden",
    "4",
    "--vocabulary",
    "7",
    "--repeats",
    "2",
)


@pytest.fixture(scope="module")
def printed(benchmark):
    """The folder and the output of a run with some losses."""
    return benchmark("benchmarks.losses", *OPTIONS, "--only", "*reverse_kl_divergence")


@pytest.mark.thorough
def test_writes_and_prints_every_case(printed):
    folder, text = printed
    results = json.loads((folder / "results.json").read_text())
    assert results["config"]["only"] == "*reverse_kl_divergence"
    assert results["config"]["repeats"] == 2
    rows = results["rows"]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
    ours = {
        (row["loss"], row["implementation"], row["pass"])
        for row in rows
        if row["implementation"] in ("jaxkd", "fused") and row["bytes"] > 0
    }
    plain, linear = "reverse_kl_divergence", "linear_reverse_kl_divergence"
    skewed = "skewed_reverse_kl_divergence"
    pairs = ((plain, "jaxkd"), (skewed, "jaxkd"), (linear, "jaxkd"), (linear, "fused"))
    assert ours == {
        (loss, implementation, pass_name)
        for loss, implementation in pairs
        for pass_name in ("forward", "both")
    }
    assert plain in text and linear in text
    assert results["environment"]["jax"] in text
    assert all(line in text for line in results["summary"] + results["notes"])
    assert "…" not in text, "a cell is cut off"
    if not importlib.util.find_spec("torch"):
        assert [path.name for path in folder.iterdir()] == ["results.json"]
        assert "`pip install torch`" in text and "÷" not in text


@pytest.mark.thorough
def test_memory_at_full_size_is_reported_by_the_compiler(printed):
    folder, _ = printed
    memory = json.loads((folder / "results.json").read_text())["full_size_memory"]
    assert [(row["loss"], row["dtype"], row["implementation"]) for row in memory] == [
        ("linear_reverse_kl_divergence", dtype, implementation)
        for dtype in ("bfloat16", "float32")
        for implementation in ("jaxkd", "fused")
    ]
    for row in memory:
        # Arguments: states and kernel of student and teacher; results: the student's gradients.
        layer = (8192 * 4096 + 4096 * 128_256) * (2 if row["dtype"] == "bfloat16" else 4)
        assert row["bytes"] - row["temporary_bytes"] == pytest.approx(3 * layer, rel=1e-3)
    for plain, fused in zip(memory[::2], memory[1::2], strict=True):
        assert fused["temporary_bytes"] < plain["temporary_bytes"] / 3


@pytest.mark.parametrize("case", loss_cases.make_cases(TINY), ids=lambda case: case.name)
def test_cases_compute_the_losses_of_their_names(case):
    arrays = case.arrays()
    assert [x.shape for x in arrays[: len(case.shapes)]] == list(case.shapes)
    for mean_loss in loss_cases.jax_losses(case).values():
        value = jax.eval_shape(mean_loss, *arrays)
        assert value.shape == () and value.dtype == np.float32
    assert (
        hasattr(losses, case.name) != (case.name in loss_cases.COMPOSED) or case.group == "features"
    )
    for x, y in zip(arrays, case.arrays(), strict=True):
        np.testing.assert_array_equal(x, y)


@needs_torch
@pytest.mark.parametrize("case", loss_cases.make_cases(TINY), ids=lambda case: case.name)
def test_pytorch_computes_the_same(case, monkeypatch):
    monkeypatch.setattr(loss_cases.TorchLosses, "compile_error", "not in this test")
    calls = loss_cases.TorchLosses().calls(case)
    theirs = {pass_name: call() for _, pass_name, call in calls}
    their_value, their_gradient = theirs["both"]
    for implementation, pass_name, call, _ in loss_cases.jax_calls(case):
        tolerance = {"rtol": 1e-5, "atol": 1e-6, "err_msg": implementation}
        if pass_name == "forward":
            np.testing.assert_allclose(call(), theirs["forward"], **tolerance)
        else:
            value, gradient = call()
            np.testing.assert_allclose(value, their_value, **tolerance)
            for ours, other in zip(gradient, their_gradient, strict=True):
                np.testing.assert_allclose(
                    ours, other, rtol=1e-4, atol=1e-5 * np.abs(ours).max(), err_msg=implementation
                )


@needs_torch
def test_every_loss_in_pytorch_is_make_rows():
    from experiments.benchmarks import torch_losses

    names = {
        name
        for name, _ in inspect.getmembers(torch_losses, inspect.isfunction)
        if not name.startswith("_")
    }
    assert names == {case.name for case in loss_cases.make_cases(TINY)}


@needs_torch
def test_draws_the_ratios(tmp_path):
    path = tmp_path / "figure.png"
    losses_benchmark.plot(make_rows(), path, other="compiled", title="invented times")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size[0] == 1200 and len(image.convert("RGB").getcolors(1 << 24)) > 50


def make_rows():
    """Invented times: compiled PyTorch takes 2 times as long at 10 classes, and 0.5 at 1000."""
    rows = []
    for classes, factor in ((10, 2.0), (1000, 0.5)):
        for pass_name in ("forward", "both"):
            common = {
                "group": "logits",
                "loss": "kl_divergence",
                "size": f"128 × {classes:,}",
                "dtype": "float32",
                "pass": pass_name,
                "bytes": 2_000_000,
            }
            seconds = [factor, 10 * factor, factor]
            rows.append(common | {"implementation": "jaxkd", "seconds": [1.0, 10.0, 1.0]})
            rows.append(common | {"implementation": "compiled", "seconds": seconds})
    return rows


def test_ratios_are_taken_round_by_round():
    rows = make_rows()
    assert losses_benchmark.ratio(rows, rows[0], "compiled") == (2.0, 2.0, 2.0)
    rows[1]["seconds"] = [2.0, 30.0, 1.0]
    assert losses_benchmark.ratio(rows, rows[0], "compiled") == (1.5, 2.0, 2.5)
    assert losses_benchmark.ratio(rows, rows[0], "eager") is None


def test_sentences_follow_from_the_times():
    memory = [
        {
            "loss": "x",
            "size": "8 × 4 × 7",
            "dtype": dtype,
            "implementation": name,
            "bytes": size,
            "temporary_bytes": 1,
        }
        for dtype, factor in (("bfloat16", 6), ("float32", 8))
        for name, size in (("jaxkd", 10 * factor), ("fused", 10))
    ]
    on_logits, on_memory = losses_benchmark.conclude(make_rows(), memory)
    assert "compiled PyTorch takes 1.00 (forward) and 1.00 (forward + backward)" in on_logits
    assert "of 2 cases; jaxkd is slower beyond the spread in 2 of 4" in on_logits
    assert "at worst in kl_divergence at 128 × 1,000, forward: 0.50 (0.50–0.50)" in on_logits
    assert "6.0 to 6.0 times in bfloat16, 8.0 to 8.0 times in float32" in on_memory


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--batch", "2"), "--batch 2: relational losses need at least 3"),
        (("--classes", "10", "2"), "--classes 2: must be at least 3"),
        (("--classes", "5", "5"), "each number only once"),
        (("--vocabulary", "1"), "--vocabulary 1: must be at least 2"),
        (("--repeats", "0"), "--repeats 0: must be at least 1"),
        (("--only", "kl"), "matches no loss; the losses are activation_boundary_loss"),
        (("--only", "hint_loss", "--workdir", "FILE"), "is not a folder"),
    ],
)
def test_bad_options_end_in_one_line(options, expected, tmp_path, refuse):
    (tmp_path / "file").write_text("mine")
    arguments = [str(tmp_path / "file") if option == "FILE" else option for option in options]
    assert expected in refuse(losses_benchmark, *arguments)
    assert (tmp_path / "file").read_text() == "mine"
