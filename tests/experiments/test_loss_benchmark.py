"""The timing of losses: both sides compute one thing, and what is reported follows from the times."""

import importlib.util
import inspect
import json

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import loss_benchmark
from jaxkd import losses

needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not installed")
TINY = loss_benchmark.Config(batch=6, classes=(5,), tokens=8, hidden=4, vocabulary=7)
OPTIONS = ("--batch", "4", "--classes", "5", "--tokens", "8", "--hidden", "4", "--vocabulary", "7", "--repeats", "2")


@pytest.fixture(scope="module")
def printed(benchmark):
    """A run of some losses to its end: its folder and what it printed."""
    return benchmark("loss_benchmark", *OPTIONS, "--only", "*reverse_kl_divergence")


def test_leaves_and_prints_every_case(printed):
    folder, text = printed
    results = json.loads((folder / "results.json").read_text())
    assert results["config"]["only"] == "*reverse_kl_divergence" and results["config"]["repeats"] == 2
    rows = results["rows"]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
    ours = {
        (row["loss"], row["implementation"], row["pass"])
        for row in rows
        if row["implementation"] in ("jaxkd", "fused") and row["bytes"] > 0
    }
    names = "reverse_kl_divergence", "linear_reverse_kl_divergence"
    wanted = {(names[0], "jaxkd"), (names[1], "jaxkd"), (names[1], "fused")}
    assert ours == {(*one, kind) for one in wanted for kind in ("forward", "both")}
    assert all(name in text for name in names)
    assert results["environment"]["jax"] in text and all(line in text for line in results["summary"] + results["notes"])
    assert "…" not in text, "a cell is cut off"
    if not importlib.util.find_spec("torch"):
        assert [path.name for path in folder.iterdir()] == ["results.json"]
        assert "`pip install torch`" in text and "÷" not in text


def test_memory_at_the_full_size_is_the_compilers(printed):
    folder, _ = printed
    memory = json.loads((folder / "results.json").read_text())["full_size_memory"]
    assert [(row["loss"], row["dtype"], row["implementation"]) for row in memory] == [
        ("linear_reverse_kl_divergence", dtype, implementation)
        for dtype in ("bfloat16", "float32")
        for implementation in ("jaxkd", "fused")
    ]
    for row in memory:
        # Two states and kernels come in, the gradients to the student's go out.
        layer = (8192 * 4096 + 4096 * 128_256) * (2 if row["dtype"] == "bfloat16" else 4)
        assert row["bytes"] - row["temporary_bytes"] == pytest.approx(3 * layer, rel=1e-3)
    for plain, fused in zip(memory[::2], memory[1::2], strict=True):
        assert fused["temporary_bytes"] < plain["temporary_bytes"] / 3


@pytest.mark.parametrize("case", loss_benchmark.make_cases(TINY), ids=lambda case: case.name)
def test_cases_are_the_losses_they_are_named_for(case):
    arrays = case.arrays()
    assert [x.shape for x in arrays[: len(case.shapes)]] == list(case.shapes)
    found = {
        implementation: jax.eval_shape(mean, *arrays)
        for implementation, mean in loss_benchmark.jax_losses(case).items()
    }
    assert all(value.shape == () and value.dtype == np.float32 for value in found.values())
    assert hasattr(losses, case.name) != (case.name in loss_benchmark.COMPOSED) or case.group == "features"
    for x, y in zip(arrays, case.arrays(), strict=True):
        np.testing.assert_array_equal(x, y)


@needs_torch
@pytest.mark.parametrize("case", loss_benchmark.make_cases(TINY), ids=lambda case: case.name)
def test_pytorch_computes_the_same(case, monkeypatch):
    monkeypatch.setattr(loss_benchmark.Torch, "cannot_compile", "not here")
    theirs = {kind: call() for name, kind, call in loss_benchmark.Torch().calls(case)}
    value, gradient = theirs["both"]
    for name, kind, call, _ in loss_benchmark.jax_calls(case):
        if kind == "forward":
            np.testing.assert_allclose(call(), theirs["forward"], rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            found, found_gradient = call()
            np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6, err_msg=name)
            for ours, other in zip(found_gradient, gradient, strict=True):
                np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-5 * np.abs(ours).max(), err_msg=name)


@needs_torch
def test_every_loss_in_pytorch_is_timed():
    from experiments import torch_losses

    names = {name for name, _ in inspect.getmembers(torch_losses, inspect.isfunction) if not name.startswith("_")}
    assert names == {case.name for case in loss_benchmark.make_cases(TINY)}


@needs_torch
def test_draws_the_ratios(tmp_path):
    loss_benchmark.plot(timed(), tmp_path / "figure.png", other="compiled", title="times made up")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size[0] == 1200 and len(image.convert("RGB").getcolors(1 << 24)) > 50


def timed():
    """Times made up: compiled PyTorch takes twice as long as jaxkd at 10 classes, and half as long at 1000."""
    rows = []
    for classes, factor in ((10, 2.0), (1000, 0.5)):
        for kind in ("forward", "both"):
            names = {"group": "logits", "loss": "kl_divergence", "size": f"128 × {classes:,}", "dtype": "float32"}
            names |= {"pass": kind, "bytes": 2_000_000}
            rows.append(names | {"implementation": "jaxkd", "seconds": [1.0, 10.0, 1.0]})
            rows.append(names | {"implementation": "compiled", "seconds": [factor, 10 * factor, factor]})
    return rows


def test_ratios_are_taken_round_by_round():
    rows = timed()
    assert loss_benchmark.ratio(rows, rows[0], "compiled") == (2.0, 2.0, 2.0)
    rows[1]["seconds"] = [2.0, 30.0, 1.0]
    assert loss_benchmark.ratio(rows, rows[0], "compiled") == (1.5, 2.0, 2.5)
    assert loss_benchmark.ratio(rows, rows[0], "eager") is None


def test_sentences_follow_from_the_times():
    memory = [
        {"loss": "x", "size": "8 × 4 × 7", "dtype": dtype, "implementation": name, "bytes": size, "temporary_bytes": 1}
        for dtype, share in (("bfloat16", 6), ("float32", 8))
        for name, size in (("jaxkd", 10 * share), ("fused", 10))
    ]
    logits, full = loss_benchmark.conclude(timed(), memory)
    assert "compiled PyTorch takes 1.00 (forward) and 1.00 (forward + backward)" in logits
    assert "of 2 cases; jaxkd is slower beyond the spread in 2 of 4" in logits
    assert "at worst in kl_divergence at 128 × 1,000, forward: 0.50 (0.50–0.50)" in logits
    assert "6.0 to 6.0 times in bfloat16, 8.0 to 8.0 times in float32" in full


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--batch", "2"), "--batch 2: relations need three"),
        (("--classes", "10", "2"), "--classes 2: at least 3"),
        (("--classes", "5", "5"), "each only once"),
        (("--vocabulary", "1"), "--vocabulary 1: at least 2"),
        (("--repeats", "0"), "at least one round"),
        (("--only", "kl"), "no loss has such a name; there are attention_divergence_loss"),
        (("--only", "hint_loss", "--workdir", "FILE"), "File exists"),
    ],
)
def test_bad_options_end_in_one_line(options, expected, tmp_path, refuse):
    (tmp_path / "file").write_text("mine")
    given = [str(tmp_path / "file") if option == "FILE" else option for option in options]
    assert expected in refuse(loss_benchmark, *given)
    assert (tmp_path / "file").read_text() == "mine"
