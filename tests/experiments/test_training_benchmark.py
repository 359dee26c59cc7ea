"""The timing of training: both sides take the same steps, and what is reported follows from the times."""

import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import cli, training_benchmark
from jaxkd import layout, models
from jaxkd.models import layers
from jaxkd.transfer import transfer

needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not installed")
TINY = training_benchmark.Config(batch_size=4)
CASES = {case.name: case for case in training_benchmark.CASES}
SMALL = (
    training_benchmark.Case("cnn", ("CNN", ((4, 8), 8)), ("CNN", ((8, 12), 8))),
    training_benchmark.Case("resnet", ("CifarResNet", (1,))),
    training_benchmark.Case("wide", ("WideResNet", (1, 1)), ("WideResNet", (1, 2))),
)


@pytest.fixture(scope="module")
def printed(tmp_path_factory, environment):
    """A run of a case to its end: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "workdir"
    options = ("--only", "*n_cnn", "--batch-size", "4", "--rounds", "2", "--workdir", str(folder))
    line = [sys.executable, "-m", "experiments.training_benchmark", *options]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True, timeout=600)
    return folder, done.stdout


def test_leaves_and_prints_every_case(printed):
    folder, text = printed
    results = json.loads((folder / "results.json").read_text())
    assert results["config"]["only"] == "*n_cnn" and results["config"]["rounds"] == 2
    names = ["jaxkd", "eager"] if importlib.util.find_spec("torch") else ["jaxkd"]
    rows = results["rows"]
    assert [(row["case"], row["implementation"]) for row in rows] == [
        (case, name) for case in ("train_cnn", "run_cnn") for name in names
    ]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
    assert all(row["first_call_seconds"] > max(row["seconds"]) for row in rows if row["implementation"] == "jaxkd")
    assert results["environment"]["jax"] in text and all(line in text for line in results["summary"] + results["notes"])
    assert "train_cnn" in text and "run_cnn" in text and "…" not in text, "a cell is cut off"
    if len(names) == 1:
        assert [path.name for path in folder.iterdir()] == ["results.json"] and "`pip install torch`" in text
    else:
        assert sorted(path.name for path in folder.iterdir()) == ["results.json", "training_benchmark.png"]


def test_every_case_names_networks_of_the_library():
    sizes = {"train_cnn": 167562, "train_resnet20": 269722, "distil_wrn16_2": 691674}
    images = training_benchmark.make_batch(2)["inputs"]
    for name, size in sizes.items():
        model = training_benchmark.jax_model(CASES[name].student, bf16=False)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == size


def test_steps_of_a_scan_are_those_of_a_loop(monkeypatch):
    """Accelerators scan, and this machine may have none."""
    with jax.default_device(jax.devices()[0]):
        call, steps = training_benchmark.jax_call(SMALL[0], TINY)
        assert steps == 1
        values = [float(call()["loss"]) for _ in range(2)]
        monkeypatch.setattr(training_benchmark.jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(training_benchmark, "SCANNED_STEPS", 2)
        call, steps = training_benchmark.jax_call(SMALL[0], TINY)
        assert steps == 2
        np.testing.assert_allclose(call()["loss"], values, rtol=1e-5)
        assert values[1] != values[0]


def rules(name, network):
    """How the weights of a network in PyTorch become ours."""
    if name != "CNN":
        return getattr(models, name)(*network).torch_rules()
    (first, last), _ = network
    flattened = layout.flattened_dense(channels=last)
    assert first != last
    return (
        *layers.dense_rules("convolutions.0", "conv1", layout.CONV),
        *layers.dense_rules("convolutions.3", "conv2", layout.CONV),
        *layers.dense_rules("hidden", "hidden", flattened),
        *layers.dense_rules("logits", "logits"),
    )


@needs_torch
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_pytorch_takes_the_same_steps(case, monkeypatch):
    torch, networks = training_benchmark.Torch(), {}

    def network(key):
        made = training_benchmark.Torch.network(torch, key)
        arrays = {name: tensor.detach().numpy().copy() for name, tensor in made.state_dict().items()}
        networks[key] = (made, arrays)
        return made

    monkeypatch.setattr(torch, "network", network)
    theirs = torch.call(case, TINY, compiles=False)

    def jax_model(key, *, bf16):
        """One whose weights are those of PyTorch's network."""
        model = models.from_linen(getattr(models, key[0])(*key[1]))

        def init(random, inputs):
            shapes = jax.eval_shape(model.init, random, inputs)
            variables, report = transfer(networks[key][1], shapes, rules=rules(*key))
            assert report.complete
            return variables

        return models.Model(init, model.apply)

    monkeypatch.setattr(training_benchmark, "jax_model", jax_model)
    ours, _ = training_benchmark.jax_call(case, TINY)
    np.testing.assert_allclose([ours()["loss"] for _ in range(2)], [theirs() for _ in range(2)], rtol=1e-4)


@needs_torch
def test_pytorch_runs_the_same_network():
    torch, case = training_benchmark.Torch(), CASES["run_cnn"]
    ours, _ = training_benchmark.jax_call(case, TINY)
    assert torch.call(case, TINY, compiles=False)().shape == ours().shape == (4, 10)


@needs_torch
def test_draws_the_ratios(tmp_path):
    training_benchmark.plot(timed(), tmp_path / "figure.png", title="times made up")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size[0] == 1050 and len(image.convert("RGB").getcolors(1 << 24)) > 50


def timed():
    """Times made up: eager PyTorch takes twice as long as jaxkd, compiled PyTorch half as long."""
    rows = []
    for name, factor in (("jaxkd", 1.0), ("eager", 2.0), ("compiled", 0.5)):
        row = {"case": "train_cnn", "implementation": name, "batch": 128, "first_call_seconds": 3.0}
        rows.append(row | {"seconds": [0.1 * factor, factor, 0.1 * factor]})
    return rows


def test_ratios_and_speeds_follow_from_the_times():
    rows = timed()
    assert training_benchmark.ratio(rows, "train_cnn", "eager") == (2.0, 2.0, 2.0)
    assert training_benchmark.ratio(rows, "run_cnn", "eager") is None
    assert training_benchmark.speed(rows[0]) == pytest.approx(1280)
    eager, compiled = training_benchmark.conclude(rows)
    assert eager == "Eager PyTorch takes so many times as long as jaxkd: train_cnn 2.00 (2.00–2.00)."
    assert compiled.startswith("Compiled PyTorch") and "0.50 (0.50–0.50)" in compiled
    assert training_benchmark.conclude(rows[:1]) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--batch-size", "0"), "--batch-size 0: at least one image"),
        (("--rounds", "0"), "--rounds 0: at least one"),
        (("--only", "cnn"), "nothing has such a name; there are train_cnn, run_cnn"),
    ],
)
def test_bad_options_end_in_one_line(options, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["training_benchmark", *options])
    with pytest.raises(SystemExit) as stop:
        cli.run(training_benchmark.main, training_benchmark.Config, None)
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message and expected in message
    assert not list(tmp_path.iterdir())
