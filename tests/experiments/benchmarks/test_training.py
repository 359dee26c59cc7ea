"""Benchmark of training: both sides take the same steps, and the report follows from the times."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from PIL import Image

from experiments.benchmarks import training, training_cases
from experiments.benchmarks.training_cases import Case, Network
from jaxkd import layout, models, transfer
from jaxkd.models import layers

needs_torch = pytest.mark.skipif(
    not importlib.util.find_spec("torch"), reason="PyTorch is not installed"
)
TINY = training.Config(batch_size=4, text_batch_size=3)
CASES = {case.name: case for case in training_cases.CASES}
VOCABULARY = training_cases.VOCABULARY
# Without dropout, whose random bits differ between JAX and PyTorch.
SMALL_BERT = Network(
    "BERT", (VOCABULARY, 8, 2, 2, 12), {"pooling": models.mean_pooling, "dropout": 0.0}
)
SMALL = (
    Case("cnn", Network("CNN", ((4, 8), 8)), Network("CNN", ((8, 12), 8))),
    Case("resnet", Network("CifarResNet", (1,))),
    Case("wide", Network("WideResNet", (1, 1)), Network("WideResNet", (1, 2))),
    Case("lstm", Network("LSTMClassifier", (VOCABULARY, 4, (5, 6), 7)), on_texts=True),
    Case("bert", SMALL_BERT, on_texts=True),
)


@pytest.fixture(scope="module")
def printed(benchmark):
    """The folder and the output of a run with two cases."""
    return benchmark(
        "benchmarks.training", "--only", "*n_cnn", "--batch-size", "4", "--rounds", "2"
    )


@pytest.mark.thorough
def test_writes_and_prints_every_case(printed):
    folder, text = printed
    results = json.loads((folder / "results.json").read_text())
    assert results["config"]["only"] == "*n_cnn" and results["config"]["rounds"] == 2
    has_torch = importlib.util.find_spec("torch")
    implementations = ["jaxkd", "eager"] if has_torch else ["jaxkd"]
    rows = results["rows"]
    assert [(row["case"], row["implementation"]) for row in rows] == [
        (case, implementation)
        for case in ("train_cnn", "run_cnn")
        for implementation in implementations
    ]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
    assert all(
        row["first_call_seconds"] > max(row["seconds"])
        for row in rows
        if row["implementation"] == "jaxkd"
    )
    assert results["environment"]["jax"] in text
    assert all(line in text for line in results["summary"] + results["notes"])
    assert "train_cnn" in text and "run_cnn" in text and "…" not in text, "a cell is cut off"
    files = sorted(path.name for path in folder.iterdir())
    if has_torch:
        assert files == ["results.json", "training_benchmark.png"]
    else:
        assert files == ["results.json"] and "`pip install torch`" in text


def test_every_case_names_networks_of_the_library():
    sizes = {"train_cnn": 167562, "train_resnet20": 269722, "distil_wrn16_2": 691674}
    sizes |= {"train_lstm": 2001474, "train_bert": 22566146}
    for name, size in sizes.items():
        model = training_cases.jax_model(CASES[name].student, bf16=False)
        inputs = training_cases.make_batch(CASES[name], TINY)["inputs"]
        variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
        assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == size


def test_texts_are_padded_on_the_right():
    texts = training_cases.make_texts(500)
    tokens, labels = texts["inputs"], texts["labels"]
    where = tokens != 0
    assert tokens.shape == (500, 32) and tokens.dtype == np.int32
    assert tokens.max() < VOCABULARY and tokens.min() == 0
    assert {*where.sum(1).tolist()} == {*range(8, 33)} and (np.diff(where.astype(int)) <= 0).all()
    assert {*labels.tolist()} == {0, 1}
    np.testing.assert_array_equal(tokens, training_cases.make_texts(500)["inputs"])


@pytest.mark.thorough
def test_steps_of_a_scan_are_those_of_a_loop(monkeypatch):
    """Simulates an accelerator, which scans, as this machine may have none."""
    with jax.default_device(jax.devices()[0]):
        call, steps = training_cases.jax_call(SMALL[0], TINY)
        assert steps == 1
        values = [float(call()["loss"]) for _ in range(2)]
        monkeypatch.setattr(training_cases.jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(training_cases, "SCANNED_STEPS", 2)
        call, steps = training_cases.jax_call(SMALL[0], TINY)
        assert steps == 2
        np.testing.assert_allclose(call()["loss"], values, rtol=1e-5)
        assert values[1] != values[0]


def rules(network):
    """Returns the rules that transfer PyTorch's weights of a network to jaxkd."""
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
    """Returns rules for the benchmark's BERT, which is not named as `BERT.torch_rules` expects."""
    denses = ("query", "key", "value", "attention_output", "mlp_in", "mlp_out")
    norms = {
        f"blocks.{{i}}.{name}": f"block{{i}}/{name}" for name in ("attention_norm", "mlp_norm")
    }
    norms["embedding_norm"] = "embedding_norm"
    return (
        transfer.Rule("token_embedding.weight", "params/token_embedding/embedding"),
        *(
            transfer.Rule(f"{name}.weight", f"params/{name}")
            for name in ("position_embedding", "segment_embedding")
        ),
        *(
            rule
            for name in denses
            for rule in layers.dense_rules(f"blocks.{{i}}.{name}", f"block{{i}}/{name}")
        ),
        *(
            transfer.Rule(f"{source}.weight", f"params/{target}/scale")
            for source, target in norms.items()
        ),
        *(
            transfer.Rule(f"{source}.bias", f"params/{target}/bias")
            for source, target in norms.items()
        ),
        *layers.dense_rules("logits", "logits"),
    )


@needs_torch
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_pytorch_takes_the_same_steps(case, monkeypatch):
    torch = training_cases.TorchTraining()
    monkeypatch.setattr(torch.counterparts, "DROPOUT", 0.0)
    # A large step, so that an error in it shows in the next loss.
    monkeypatch.setattr(training_cases, "LEARNING_RATE", 0.1)
    torch_weights = []

    def make_torch_network(network):
        module = training_cases.TorchTraining.network(torch, network)
        tensors = module.state_dict().items()
        torch_weights.append(
            (network, {name: tensor.detach().numpy().copy() for name, tensor in tensors})
        )
        return module

    monkeypatch.setattr(torch, "network", make_torch_network)
    torch_step = torch.make_call(case, TINY, compiles=False)

    def jax_model(network, *, bf16):
        """Makes a model that is initialised with the weights of PyTorch's network."""
        module = getattr(models, network.name)(*network.arguments, **network.jax_keywords)
        model = models.from_linen(module)
        (arrays,) = (arrays for other, arrays in torch_weights if other == network)

        def init(key, inputs):
            shapes = jax.eval_shape(model.init, key, inputs)
            variables, report = transfer.transfer(arrays, shapes, rules=rules(network))
            assert report.complete
            return variables

        return models.Model(init, model.apply)

    monkeypatch.setattr(training_cases, "jax_model", jax_model)
    jax_step, _ = training_cases.jax_call(case, TINY)
    ours, theirs = np.array([(jax_step()["loss"], torch_step()) for _ in range(2)]).T
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    np.testing.assert_allclose(np.diff(ours), np.diff(theirs), rtol=0.05)


@needs_torch
@pytest.mark.parametrize(
    ("case", "shape"),
    [(SMALL[0], (4, 10)), (SMALL[3], (3, 2)), (SMALL[4], (3, 2))],
    ids=lambda parameter: getattr(parameter, "name", None),
)
def test_pytorch_runs_the_same_network(case, shape):
    torch = training_cases.TorchTraining()
    case = case._replace(trains=False)
    call, _ = training_cases.jax_call(case, TINY)
    assert torch.make_call(case, TINY, compiles=False)().shape == call().shape == shape


@needs_torch
def test_pytorch_applies_dropout_only_in_training():
    torch = training_cases.TorchTraining()
    tokens = training_cases.make_texts(3)["inputs"]
    network, inputs = torch.counterparts.place(torch.network(SMALL_BERT), tokens, "cpu")
    dropout = torch.counterparts.nn.Dropout
    rates = [module.p for module in network.modules() if isinstance(module, dropout)]
    assert rates == [models.BERT(VOCABULARY).dropout] * (1 + len(network.blocks))
    assert not torch.torch.equal(network(inputs), network(inputs))
    network.eval()
    assert torch.torch.equal(network(inputs), network(inputs))


@needs_torch
def test_draws_the_ratios(tmp_path):
    training.plot(make_rows(), tmp_path / "figure.png", title="invented times")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size[0] == 1050 and len(image.convert("RGB").getcolors(1 << 24)) > 50


def make_rows():
    """Invented times: eager PyTorch takes twice as long as jaxkd, compiled PyTorch half as long."""
    rows = []
    for name, factor in (("jaxkd", 1.0), ("eager", 2.0), ("compiled", 0.5)):
        row = {"case": "train_cnn", "implementation": name, "batch": 128, "first_call_seconds": 3.0}
        rows.append(row | {"seconds": [0.1 * factor, factor, 0.1 * factor]})
    return rows


def test_ratios_and_speeds_follow_from_the_times():
    rows = make_rows()
    assert training.ratio(rows, "train_cnn", "eager") == (2.0, 2.0, 2.0)
    assert training.ratio(rows, "run_cnn", "eager") is None
    assert training.speed(rows[0]) == pytest.approx(1280)
    eager, compiled = training.conclude(rows)
    assert eager == "Eager PyTorch, time divided by that of jaxkd: train_cnn 2.00 (2.00–2.00)."
    assert compiled.startswith("Compiled PyTorch") and "0.50 (0.50–0.50)" in compiled
    assert training.conclude(rows[:1]) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--batch-size", "0"), "--batch-size 0: must be at least 1"),
        (("--text-batch-size", "0"), "--text-batch-size 0: must be at least 1"),
        (("--rounds", "0"), "--rounds 0: must be at least 1"),
        (("--only", "cnn"), "matches no case; the cases are train_cnn, run_cnn"),
    ],
)
def test_bad_options_end_in_one_line(options, expected, refuse):
    assert expected in refuse(training, *options)
