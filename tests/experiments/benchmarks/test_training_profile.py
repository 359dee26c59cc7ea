"""Profile of a training step: its parts are those of the networks, and the report follows."""

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

from experiments.benchmarks import beside_torch, training_cases, training_profile
from experiments.benchmarks.training_profile import NETWORKS, SUM, WHOLE, Pass

needs_torch = pytest.mark.skipif(
    not importlib.util.find_spec("torch"), reason="PyTorch is not installed"
)
CASES = {case.name: case for case in training_cases.CASES}
LAYERS = [layer for layers in NETWORKS.values() for layer in layers]
KINDS = [LAYERS[i] for i in (0, 1, 2, 4, 8, 12, 15)]


@pytest.mark.thorough
def test_writes_and_prints_every_part(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(beside_torch, "load_torch", lambda make: (None, ["only jaxkd"]))
    options = training_profile.Config(
        only="cnn", batch_size=2, rounds=1, workdir=str(tmp_path / "run")
    )
    with jax.default_device(jax.devices()[0]):
        training_profile.main(options)
    text = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = results["rows"]
    layers = [
        f"{layer.name}: {layer_pass.value}"
        for layer in NETWORKS["cnn"]
        for layer_pass in layer.passes
    ]
    assert [row["part"] for row in rows] == [*layers, "loss", "optimizer", WHOLE]
    assert {row["network"] for row in rows} == {"cnn"}
    assert {row["count"] for row in rows} == {1}
    for row in rows:
        assert len(row["jaxkd"]) == 1 and row["jaxkd"][0] > 0 and "PyTorch" not in row
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["results.json"]
    assert results["environment"]["jax"] in text
    assert all(line in text for line in results["summary"] + results["notes"])


def count_layers(network):
    """Counts the layers of a network, each with the shape of its inputs."""
    layers: dict[tuple, Any] = {}

    def record(call, arguments, keywords, context):
        is_layer = isinstance(context.module, (nn.Conv, nn.BatchNorm, nn.Dense))
        if is_layer and context.method_name == "__call__":
            # By path, because initialisation may call a layer more than once.
            layers[context.module.path] = describe(context.module), arguments[0].shape[1:]
        return call(*arguments, **keywords)

    model = training_cases.jax_model(network, bf16=False)
    batch = training_cases.make_images(2)
    with nn.intercept_methods(record):
        jax.eval_shape(model.init, jax.random.key(0), batch["inputs"])
    return collections.Counter(layers.values())


def describe(module):
    if isinstance(module, nn.Conv):
        return (
            "conv",
            module.features,
            module.kernel_size,
            module.strides,
            0 if module.padding == "VALID" else module.padding,
            module.use_bias,
            module.conv_general_dilated,
        )
    return ("dense", module.features) if isinstance(module, nn.Dense) else ("norm",)


@pytest.mark.parametrize("network", NETWORKS)
def test_layers_are_those_of_the_network(network):
    expected = count_layers(CASES[f"train_{network}"].student)
    counts: collections.Counter[Any] = collections.Counter()
    for layer in NETWORKS[network]:
        for module in getattr(layer.module, "layers", [layer.module]):
            if isinstance(module, (nn.Conv, nn.BatchNorm)):
                counts[describe(module), layer.shape] += layer.count
            elif isinstance(module, nn.Dense):
                size = layer.shape[-1] if "mean" in layer.name else int(np.prod(layer.shape))
                counts[describe(module), (size,)] += layer.count
    assert counts == expected


@pytest.mark.thorough
@pytest.mark.parametrize("layer", KINDS, ids=lambda layer: layer.name)
def test_single_passes_are_those_of_both_together(layer):
    calls = training_profile.jax_calls(layer, 2)
    (outputs, _), kernel, inputs = calls[Pass.BOTH]()
    ((forward_outputs, _),) = calls[Pass.FORWARD]()
    (kernel_alone,) = calls[Pass.KERNEL]()
    (inputs_alone,) = calls[Pass.INPUT]()
    chex.assert_trees_all_close(
        [forward_outputs, kernel_alone, inputs_alone],
        [outputs, kernel, inputs],
        rtol=1e-4,
        atol=1e-4,
    )
    assert inputs.shape == (2, *layer.shape) and abs(inputs).max() > 0


@needs_torch
def test_torch_takes_the_same_parts():
    torch = training_cases.TorchTraining()
    for layer in KINDS:
        ours = training_profile.jax_calls(layer, 2)
        theirs = training_profile.torch_calls(layer, 2, torch)
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
    case = CASES["train_cnn"]
    jax_loss, _ = training_profile.jax_loss_and_optimizer(case, 4)
    torch_loss, _ = training_profile.torch_loss_and_optimizer(
        case, 4, training_cases.TorchTraining()
    )
    value, gradient = jax_loss()
    (theirs,) = torch_loss()
    np.testing.assert_allclose(gradient, theirs, rtol=1e-4, atol=1e-6)
    assert value > 0


def test_the_optimizer_moves_the_weights():
    _, optimize = training_profile.jax_loss_and_optimizer(CASES["train_cnn"], 2)
    # Copied, because the second call donates the arrays of the first.
    first, _ = jax.tree.map(np.array, optimize())
    second, _ = optimize()
    moved = jax.tree.map(lambda before, after: np.asarray(after) - before, first, second)
    chex.assert_trees_all_close(
        moved, jax.tree.map(lambda leaf: np.full_like(leaf, -1.9e-3), moved), rtol=1e-3
    )


def make_rows():
    """Invented times: jaxkd is faster in one part and slower in another, which occurs six times."""
    milliseconds = {
        "fast": (1, 2.0, 3.0),
        "slow": (6, 5.0, 4.0),
        "even": (1, 1.0, 1.0),
        WHOLE: (1, 40.0, 32.0),
    }
    return [
        {"network": "cnn", "part": part, "count": count}
        | {
            "jaxkd": [ours / 1e3, 5 * ours / 1e3, ours / 1e3],
            "PyTorch": [theirs / 1e3, 5 * theirs / 1e3, theirs / 1e3],
        }
        for part, (count, ours, theirs) in milliseconds.items()
    ]


def test_parts_are_sorted_by_how_far_jaxkd_is_behind():
    parts, summed, whole = training_profile.split(make_rows(), "cnn")
    assert [row["part"] for row in parts] == ["slow", "even", "fast"]
    np.testing.assert_allclose(
        [training_profile.behind(row) for row in (*parts, whole)], [6, 0, -1, 8]
    )
    assert summed["part"] == SUM
    np.testing.assert_allclose(training_profile.total(summed, "jaxkd"), [33, 165, 33])
    np.testing.assert_allclose(training_profile.total(summed, "PyTorch"), [28, 140, 28])


def test_parts_without_pytorch_are_sorted_by_their_time():
    rows = make_rows()
    for row in rows:
        del row["PyTorch"]
    parts, summed, _ = training_profile.split(rows, "cnn")
    assert [row["part"] for row in parts] == ["slow", "fast", "even"] and "PyTorch" not in summed


def test_the_summary_names_the_largest_gaps():
    first, second = training_profile.conclude(make_rows())
    assert first == (
        "cnn: jaxkd is behind by 8.0 ms a step; "
        "most in slow (6.0 ms), even (0.0 ms), fast (-1.0 ms)."
    )
    assert second == "cnn: the parts sum to 33.0 of jaxkd's 40.0 ms and 28.0 of PyTorch's 32.0 ms."


def test_the_table_shows_the_time_of_a_step():
    buffer = io.StringIO()
    training_profile.print_tables(make_rows(), console=Console(file=buffer, width=100))
    lines = [line.split() for line in buffer.getvalue().splitlines()]
    (slow,) = [line for line in lines if line[:1] == ["slow"]]
    assert slow == ["slow", "6", "30.00", "24.00", "0.80", "(0.80–0.80)", "75%"]
    (whole,) = [line for line in lines if line[:3] == WHOLE.split()]
    assert whole[3:] == ["1", "40.00", "32.00", "0.80", "(0.80–0.80)", "100%"]


def test_draws_the_parts(tmp_path):
    other = [row | {"network": "resnet20"} for row in make_rows()]
    training_profile.plot(make_rows() + other, tmp_path / "figure.png", title="invented times")
    with Image.open(tmp_path / "figure.png") as image:
        colours = image.convert("RGB").getcolors(1 << 24)
        assert image.size[0] == 1350 and colours and len(colours) > 50


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--batch-size", "0"), "--batch-size 0: must be at least 1"),
        (("--rounds", "0"), "--rounds 0: must be at least 1"),
        (("--only", "train_cnn"), "matches no network; the networks are cnn, resnet20"),
    ],
)
def test_bad_options_end_in_one_line(options, expected, refuse):
    assert expected in refuse(training_profile, *options)
