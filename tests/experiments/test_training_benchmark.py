"""The timing of training: both sides take the same steps, and what is reported follows from the times."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import training_benchmark
from experiments.training_benchmark import Case, Network
from jaxkd import layout, models, transfer
from jaxkd.models import layers

needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not installed")
TINY = training_benchmark.Config(batch_size=4, text_batch_size=3)
CASES = {case.name: case for case in training_benchmark.CASES}
VOCABULARY = training_benchmark.VOCABULARY
# What drops draws its own bits on either side.
SMALL_BERT = Network("BERT", (VOCABULARY, 8, 2, 2, 12), {"pooling": models.mean_pooling, "dropout": 0.0})
SMALL = (
    Case("cnn", Network("CNN", ((4, 8), 8)), Network("CNN", ((8, 12), 8))),
    Case("resnet", Network("CifarResNet", (1,))),
    Case("wide", Network("WideResNet", (1, 1)), Network("WideResNet", (1, 2))),
    Case("lstm", Network("LSTMClassifier", (VOCABULARY, 4, (5, 6), 7)), reads=True),
    Case("bert", SMALL_BERT, reads=True),
)


@pytest.fixture(scope="module")
def printed(benchmark):
    """A run of a case to its end: its folder and what it printed."""
    return benchmark("training_benchmark", "--only", "*n_cnn", "--batch-size", "4", "--rounds", "2")


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
    sizes |= {"train_lstm": 2001474, "train_bert": 22566146}
    for name, size in sizes.items():
        model = training_benchmark.jax_model(CASES[name].student, bf16=False)
        inputs = training_benchmark.make_batch(CASES[name], TINY)["inputs"]
        variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
        assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == size


def test_texts_are_padded_on_the_right():
    texts = training_benchmark.make_texts(500)
    tokens, labels = texts["inputs"], texts["labels"]
    where = tokens != 0
    assert tokens.shape == (500, 32) and tokens.dtype == np.int32 and tokens.max() < VOCABULARY and tokens.min() == 0
    assert {*where.sum(1).tolist()} == {*range(8, 33)} and (np.diff(where.astype(int)) <= 0).all()
    assert {*labels.tolist()} == {0, 1}
    np.testing.assert_array_equal(tokens, training_benchmark.make_texts(500)["inputs"])


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


def rules(network):
    """How the weights of a network in PyTorch become ours."""
    if network.name == "BERT":
        return bert_rules()
    if network.name != "CNN":
        return getattr(models, network.name)(*network.arguments).torch_rules()
    (first, last), _ = network.arguments
    flattened = layout.flattened_dense(channels=last)
    assert first != last
    return (
        *layers.dense_rules("convolutions.0", "conv1", layout.CONV),
        *layers.dense_rules("convolutions.3", "conv2", layout.CONV),
        *layers.dense_rules("hidden", "hidden", flattened),
        *layers.dense_rules("logits", "logits"),
    )


def bert_rules():
    """Its weights have our names in PyTorch, and not those that `BERT.torch_rules` reads."""
    denses = ("query", "key", "value", "attention_output", "mlp_in", "mlp_out")
    norms = {f"blocks.{{i}}.{name}": f"block{{i}}/{name}" for name in ("attention_norm", "mlp_norm")}
    norms["embedding_norm"] = "embedding_norm"
    return (
        transfer.Rule("token_embedding.weight", "params/token_embedding/embedding"),
        *(transfer.Rule(f"{name}.weight", f"params/{name}") for name in ("position_embedding", "segment_embedding")),
        *(rule for name in denses for rule in layers.dense_rules(f"blocks.{{i}}.{name}", f"block{{i}}/{name}")),
        *(transfer.Rule(f"{theirs}.weight", f"params/{ours}/scale") for theirs, ours in norms.items()),
        *(transfer.Rule(f"{theirs}.bias", f"params/{ours}/bias") for theirs, ours in norms.items()),
        *layers.dense_rules("logits", "logits"),
    )


@needs_torch
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_pytorch_takes_the_same_steps(case, monkeypatch):
    torch, networks = training_benchmark.Torch(), []
    monkeypatch.setattr(torch.side, "DROPOUT", 0.0)
    monkeypatch.setattr(training_benchmark, "LEARNING_RATE", 0.1)  # so that a step shows in the next one's loss

    def network(key):
        made = training_benchmark.Torch.network(torch, key)
        arrays = {name: tensor.detach().numpy().copy() for name, tensor in made.state_dict().items()}
        networks.append((key, arrays))
        return made

    monkeypatch.setattr(torch, "network", network)
    theirs = torch.call(case, TINY, compiles=False)

    def jax_model(key, *, bf16):
        """One whose weights are those of PyTorch's network."""
        model = models.from_linen(getattr(models, key.name)(*key.arguments, **key.ours))
        (arrays,) = (arrays for other, arrays in networks if other == key)

        def init(random, inputs):
            shapes = jax.eval_shape(model.init, random, inputs)
            variables, report = transfer.transfer(arrays, shapes, rules=rules(key))
            assert report.complete
            return variables

        return models.Model(init, model.apply)

    monkeypatch.setattr(training_benchmark, "jax_model", jax_model)
    ours, _ = training_benchmark.jax_call(case, TINY)
    values, others = np.array([(ours()["loss"], theirs()) for _ in range(2)]).T
    np.testing.assert_allclose(values, others, rtol=1e-4)
    np.testing.assert_allclose(np.diff(values), np.diff(others), rtol=0.05)


@needs_torch
@pytest.mark.parametrize(
    ("case", "shape"),
    [(SMALL[0], (4, 10)), (SMALL[3], (3, 2)), (SMALL[4], (3, 2))],
    ids=lambda one: getattr(one, "name", None),
)
def test_pytorch_runs_the_same_network(case, shape):
    torch, case = training_benchmark.Torch(), case._replace(trains=False)
    ours, _ = training_benchmark.jax_call(case, TINY)
    assert torch.call(case, TINY, compiles=False)().shape == ours().shape == shape


@needs_torch
def test_pytorch_drops_in_training_alone():
    torch, tokens = training_benchmark.Torch(), training_benchmark.make_texts(3)["inputs"]
    network, inputs = torch.side.place(torch.network(SMALL_BERT), tokens, "cpu")
    drops = [module.p for module in network.modules() if isinstance(module, torch.side.nn.Dropout)]
    assert drops == [models.BERT(VOCABULARY).dropout] * (1 + len(network.blocks))
    assert not torch.torch.equal(network(inputs), network(inputs))
    network.eval()
    assert torch.torch.equal(network(inputs), network(inputs))


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
        (("--text-batch-size", "0"), "--text-batch-size 0: at least one text"),
        (("--rounds", "0"), "--rounds 0: at least one"),
        (("--only", "cnn"), "nothing has such a name; there are train_cnn, run_cnn"),
    ],
)
def test_bad_options_end_in_one_line(options, expected, refuse):
    assert expected in refuse(training_benchmark, *options)
