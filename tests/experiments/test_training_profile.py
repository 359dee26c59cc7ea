"""The profile of a training step: its parts are those of the networks, and what is reported follows from the times."""

import collections
import importlib.util
import io
import json
from typing import Any

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from experiments import beside_torch, training_benchmark, training_profile
from experiments.training_profile import NETWORKS, SUM, WHOLE, Pass

needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not installed")
CASES = {case.name: case for case in training_benchmark.CASES}
LAYERS = [layer for layers in NETWORKS.values() for layer in layers]
KINDS = [LAYERS[i] for i in (0, 1, 2, 4, 8, 12, 15)]


def test_leaves_and_prints_every_part(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(beside_torch, "load_torch", lambda make: (None, ["jaxkd stands alone"]))
    options = training_profile.Config(only="cnn", batch_size=2, rounds=1, workdir=str(tmp_path / "run"))
    with jax.default_device(jax.devices()[0]):
        training_profile.main(options)
    text, results = capsys.readouterr().out, json.loads((tmp_path / "run" / "results.json").read_text())
    layers = [f"{layer.name}: {one.value}" for layer in NETWORKS["cnn"] for one in layer.passes]
    assert [row["part"] for row in results["rows"]] == [*layers, "loss", "optimizer", WHOLE]
    assert {row["network"] for row in results["rows"]} == {"cnn"} and {row["count"] for row in results["rows"]} == {1}
    assert all(len(row["jaxkd"]) == 1 and row["jaxkd"][0] > 0 and "PyTorch" not in row for row in results["rows"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["results.json"]
    assert results["environment"]["jax"] in text and all(line in text for line in results["summary"] + results["notes"])


def seen(network):
    """How often a network has which layer, with the shape of its inputs."""
    found: dict[tuple, Any] = {}

    def note(call, arguments, keywords, context):
        if isinstance(context.module, (nn.Conv, nn.BatchNorm, nn.Dense)) and context.method_name == "__call__":
            found[context.module.path] = _described(context.module), arguments[0].shape[1:]
        return call(*arguments, **keywords)

    module, batch = training_benchmark.jax_model(network, bf16=False), training_benchmark.make_images(2)
    with nn.intercept_methods(note):
        jax.eval_shape(module.init, jax.random.key(0), batch["inputs"])
    return collections.Counter(found.values())


def _described(module):
    if isinstance(module, nn.Conv):
        bias, padding = module.use_bias, 0 if module.padding == "VALID" else module.padding
        return "conv", module.features, module.kernel_size, module.strides, padding, bias, module.conv_general_dilated
    return ("dense", module.features) if isinstance(module, nn.Dense) else ("norm",)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_layers_are_those_of_the_network(network):
    expected = seen(CASES[f"train_{network}"].student)
    found: collections.Counter[Any] = collections.Counter()
    for layer in NETWORKS[network]:
        for module in getattr(layer.ours, "layers", [layer.ours]):
            if isinstance(module, (nn.Conv, nn.BatchNorm)):
                found[_described(module), layer.shape] += layer.count
            elif isinstance(module, nn.Dense):
                size = layer.shape[-1] if "mean" in layer.name else int(np.prod(layer.shape))
                found[_described(module), (size,)] += layer.count
    assert found == expected


@pytest.mark.parametrize("layer", KINDS, ids=lambda layer: layer.name)
def test_passes_are_parts_of_one(layer):
    calls = training_profile.jax_calls(layer, 2)
    (outputs, _), kernel, inputs = calls[Pass.BOTH]()
    found = [calls[one]()[0] for one in (Pass.FORWARD, Pass.KERNEL, Pass.INPUT)]
    chex.assert_trees_all_close([found[0][0], *found[1:]], [outputs, kernel, inputs], rtol=1e-4, atol=1e-4)
    assert inputs.shape == (2, *layer.shape) and abs(inputs).max() > 0


@needs_torch
def test_torch_takes_the_same_parts():
    torch = training_benchmark.Torch()
    for layer in KINDS:
        ours, theirs = training_profile.jax_calls(layer, 2), training_profile.torch_calls(layer, 2, torch)
        outputs = jax.eval_shape(ours[Pass.FORWARD])[0][0]
        channels_first = np.moveaxis(np.empty(outputs.shape), -1, 1).shape
        assert theirs[Pass.FORWARD]().shape == channels_first
        *kernel, images = theirs[Pass.BOTH]()
        assert images.shape == (2, layer.shape[2], *layer.shape[:2]) and images.abs().max() > 0
        assert sum(leaf.numel() for leaf in kernel) == sum(
            leaf.size for leaf in jax.tree.leaves(jax.eval_shape(ours[Pass.KERNEL]))
        )
        if Pass.KERNEL in layer.passes:
            assert [leaf.shape for leaf in theirs[Pass.INPUT]()] == [images.shape]
            assert [leaf.shape for leaf in theirs[Pass.KERNEL]()] == [leaf.shape for leaf in kernel]


@needs_torch
def test_torch_has_the_same_loss():
    torch, case = training_benchmark.Torch(), CASES["train_cnn"]
    value, gradient = training_profile.jax_rest(case, 4)[0]()
    (theirs,) = training_profile.torch_rest(case, 4, torch)[0]()
    np.testing.assert_allclose(gradient, theirs, rtol=1e-4, atol=1e-6)
    assert value > 0


def test_the_optimizer_moves_the_weights():
    optimize = training_profile.jax_rest(CASES["train_cnn"], 2)[1]
    (first, _), (second, _) = jax.tree.map(np.array, optimize()), optimize()
    moved = jax.tree.map(lambda before, after: np.asarray(after) - before, first, second)
    chex.assert_trees_all_close(moved, jax.tree.map(lambda leaf: np.full_like(leaf, -1.9e-3), moved), rtol=1e-3)


def timed():
    """Times made up, in milliseconds: a part that jaxkd runs faster, and one that it runs slower, six times a step."""
    made = {"fast": (1, 2.0, 3.0), "slow": (6, 5.0, 4.0), "even": (1, 1.0, 1.0), WHOLE: (1, 40.0, 32.0)}
    return [
        {"network": "cnn", "part": part, "count": count}
        | {"jaxkd": [ours / 1e3, 5 * ours / 1e3, ours / 1e3], "PyTorch": [theirs / 1e3, 5 * theirs / 1e3, theirs / 1e3]}
        for part, (count, ours, theirs) in made.items()
    ]


def test_parts_are_sorted_by_what_they_cost():
    single, sums, whole = training_profile.split(timed(), "cnn")
    assert [row["part"] for row in single] == ["slow", "even", "fast"]
    np.testing.assert_allclose([training_profile.behind(row) for row in (*single, whole)], [6, 0, -1, 8])
    assert sums["part"] == SUM
    np.testing.assert_allclose(training_profile.total(sums, "jaxkd"), [33, 165, 33])
    np.testing.assert_allclose(training_profile.total(sums, "PyTorch"), [28, 140, 28])
    alone = [{name: value for name, value in row.items() if name != "PyTorch"} for row in timed()]
    single, sums, _ = training_profile.split(alone, "cnn")
    assert [row["part"] for row in single] == ["slow", "fast", "even"] and "PyTorch" not in sums


def test_the_summary_names_the_largest_gaps():
    first, second = training_profile.conclude(timed())
    assert first == "cnn: jaxkd is behind by 8.0 ms a step; most in slow (6.0 ms), even (0.0 ms), fast (-1.0 ms)."
    assert second == "cnn: the parts sum to 33.0 of jaxkd's 40.0 ms and 28.0 of PyTorch's 32.0 ms."


def test_the_table_shows_the_time_of_a_step():
    buffer = io.StringIO()
    training_profile.print_tables(timed(), console=Console(file=buffer, width=100))
    lines = [line.split() for line in buffer.getvalue().splitlines()]
    (slow,) = [line for line in lines if line[:1] == ["slow"]]
    assert slow == ["slow", "6", "30.00", "24.00", "0.80", "(0.80–0.80)", "75%"]
    (whole,) = [line for line in lines if line[:3] == WHOLE.split()]
    assert whole[3:] == ["1", "40.00", "32.00", "0.80", "(0.80–0.80)", "100%"]


def test_draws_the_parts(tmp_path):
    other = [row | {"network": "resnet20"} for row in timed()]
    training_profile.plot(timed() + other, tmp_path / "figure.png", title="times made up")
    with Image.open(tmp_path / "figure.png") as image:
        colours = image.convert("RGB").getcolors(1 << 24)
        assert image.size[0] == 1350 and colours and len(colours) > 50


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--batch-size", "0"), "--batch-size 0: at least one image"),
        (("--rounds", "0"), "--rounds 0: at least one"),
        (("--only", "train_cnn"), "nothing has such a name; there are cnn, resnet20"),
    ],
)
def test_bad_options_end_in_one_line(options, expected, refuse):
    assert expected in refuse(training_profile, *options)
