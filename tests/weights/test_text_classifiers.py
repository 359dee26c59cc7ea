"""Fine-tuned text classifiers as transformers saves them: logits, classes, heads.

The expected logits were computed by transformers 5.24 and PyTorch 2.13 from the same folders, which
`test_transformers_gives_the_expected_logits` repeats where both are installed.
"""

import importlib
import importlib.util
import json

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from jaxkd.data import DataError, tokens
from jaxkd.models import from_linen
from jaxkd.weights import hub, load_weights

TEXTS = ["a good film", "bad films.", "good"]
NAMES = ("negative", "neutral", "positive")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film", "##s", "."]
COMMON = {
    "id2label": dict(enumerate(NAMES)),
    "label2id": {name: label for label, name in enumerate(NAMES)},
    "vocab_size": 10,
    "max_position_embeddings": 12,
}
BYTE_PAIRS = [
    *("<s>", "<pad>", "</s>", "<unk>", "a", "b", "d", "f", "g", "i", "l", "m", "o", "s", ".", "Ġ"),
    *("oo", "ood", "good", "Ġgood", "il", "ilm", "film", "Ġfilm", "<mask>"),
]
MERGES = ["#version: 0.2", "o o", "oo d", "g ood", "Ġ good", "i l", "il m", "f ilm", "Ġ film"]
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁a", "▁good", "▁bad", "▁film", "s", "."]
BERT_SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}
CONFIGS = {
    "bert": COMMON
    | BERT_SIZES
    | {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification"],
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-3,
        "pad_token_id": 0,
    },
    "distilbert": COMMON
    | {
        "model_type": "distilbert",
        "architectures": ["DistilBertForSequenceClassification"],
        "dim": 8,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 12,
        "pad_token_id": 0,
    },
}
# Two positions more than tokens, since the first one of a token is 2.
CONFIGS["roberta"] = CONFIGS["bert"] | {
    "model_type": "roberta",
    "architectures": ["RobertaForSequenceClassification"],
    "vocab_size": 25,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
CONFIGS["xlm-roberta"] = CONFIGS["roberta"] | {
    "model_type": "xlm-roberta",
    "architectures": ["XLMRobertaForSequenceClassification"],
    "vocab_size": 10,
}
EXPECTED = {
    "bert": [
        [2.834002, 0.396552, -2.135981],
        [2.860995, 0.393063, -2.164333],
        [2.800628, 0.370645, -2.085501],
    ],
    "distilbert": [
        [0.738710, -5.096304, 5.653332],
        [0.780401, -4.975688, 5.639146],
        [0.730271, -5.434152, 5.651259],
    ],
    "roberta": [
        [1.516523, 1.600362, 0.214144],
        [1.557499, 1.767661, 0.224009],
        [1.705025, 1.351166, 0.639980],
    ],
    "xlm-roberta": [
        [0.893010, -3.616609, -1.740158],
        [0.903984, -3.605255, -1.704192],
        [0.924932, -3.587324, -1.650334],
    ],
}
LAYERS = {
    "bert": {
        "attention.self.query": (8, 8),
        "attention.self.key": (8, 8),
        "attention.self.value": (8, 8),
        "attention.output.dense": (8, 8),
        "attention.output.LayerNorm": (8,),
        "intermediate.dense": (12, 8),
        "output.dense": (8, 12),
        "output.LayerNorm": (8,),
    },
    "distilbert": {
        "attention.q_lin": (8, 8),
        "attention.k_lin": (8, 8),
        "attention.v_lin": (8, 8),
        "attention.out_lin": (8, 8),
        "sa_layer_norm": (8,),
        "ffn.lin1": (12, 8),
        "ffn.lin2": (8, 12),
        "output_layer_norm": (8,),
    },
}
ROBERTA_HEADS = {"classifier.dense": (8, 8), "classifier.out_proj": (3, 8)}
HEADS = {
    "roberta": ROBERTA_HEADS,
    "xlm-roberta": ROBERTA_HEADS,
    "bert": {"bert.pooler.dense": (8, 8), "classifier": (3, 8)},
    "distilbert": {"pre_classifier": (8, 8), "classifier": (3, 8)},
}
has_transformers = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")


def list_shapes(kind):
    """Returns the shapes of a model's weights by their names in transformers."""
    config = CONFIGS[kind]
    prefix = "roberta" if kind == "xlm-roberta" else kind
    shapes = {
        f"{prefix}.embeddings.word_embeddings.weight": (config["vocab_size"], 8),
        f"{prefix}.embeddings.position_embeddings.weight": (config["max_position_embeddings"], 8),
    }
    if "type_vocab_size" in config:
        name = f"{prefix}.embeddings.token_type_embeddings.weight"
        shapes[name] = (config["type_vocab_size"], 8)
    modules = {f"{prefix}.embeddings.LayerNorm": (8,)} | HEADS[kind]
    stack = "transformer.layer" if kind == "distilbert" else "encoder.layer"
    for i in range(2):
        layer = LAYERS["distilbert" if kind == "distilbert" else "bert"]
        modules |= {f"{prefix}.{stack}.{i}.{name}": shape for name, shape in layer.items()}
    for name, shape in modules.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def make_classifier(folder, kind):
    """Writes a classifier with random weights as transformers saves it."""
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(0.0, 0.8, shape).astype(np.float32)
        for name, shape in sorted(list_shapes(kind).items())
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    write_tokenizer(folder, kind)


def write_tokenizer(folder, kind):
    if kind == "roberta":
        vocabulary = {token: i for i, token in enumerate(BYTE_PAIRS)}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("\n".join(MERGES))
    elif kind == "xlm-roberta":
        make_pieces().save(str(folder / "tokenizer.json"))
        options = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(options))
    else:
        (folder / "vocab.txt").write_text("\n".join(WORDS))


def make_pieces():
    """Makes a tokenizer of the form that XLM-RoBERTa has."""
    pieces = [(piece, -float(i)) for i, piece in enumerate(PIECES)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(PIECES[:4])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("bert", marks=pytest.mark.thorough),
        "distilbert",
        "roberta",
        pytest.param("xlm-roberta", marks=pytest.mark.thorough),
    ],
)
def test_a_fine_tuned_classifier_gives_the_logits_of_transformers(kind, tmp_path):
    make_classifier(tmp_path, kind)
    loaded = hub.load_bert(tmp_path, num_classes=3, key=jax.random.key(0))
    assert loaded.class_names == NAMES and loaded.drawn == ()
    ids = tokens.encode(loaded.tokenizer, TEXTS, max_length=12)
    outputs, _ = from_linen(loaded.module).apply(loaded.variables, ids, train=False)
    np.testing.assert_allclose(outputs.logits, EXPECTED[kind], atol=2e-5)


@pytest.mark.skipif(not has_transformers, reason="PyTorch or transformers is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_gives_the_expected_logits(kind, tmp_path):
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    make_classifier(tmp_path, kind)
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    # Padding has the id 0 here.
    ids = encoded["input_ids"].numpy()
    exchanged = np.select([ids == 0, ids == model.config.pad_token_id], [ids.max() + 1, 0], ids)
    exchanged[exchanged == ids.max() + 1] = model.config.pad_token_id
    loaded = tokens.load_tokenizer(tmp_path, padding_id=model.config.pad_token_id)
    np.testing.assert_array_equal(tokens.encode(loaded, TEXTS, max_length=12), exchanged)
    with torch.no_grad():
        logits = model.eval()(**encoded).logits.numpy()
    np.testing.assert_allclose(logits, EXPECTED[kind], atol=1e-6)


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_outputs_that_are_no_classes_have_no_names(kind, tmp_path):
    make_classifier(tmp_path, "bert")
    config = CONFIGS["bert"] | {"problem_type": kind}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert hub.load_bert(tmp_path, num_classes=3, key=jax.random.key(0)).class_names == ()


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta"])
def test_weights_of_a_pretraining_model_are_read_without_its_head(kind, tmp_path):
    make_classifier(tmp_path, kind)
    file = tmp_path / "model.safetensors"
    named = {
        name.removeprefix("roberta."): array
        for name, array in load_weights(file).items()
        if not name.startswith("classifier")
    }
    head = {"lm_head.bias": np.zeros(3, np.float32), "pooler.dense.bias": np.zeros(8, np.float32)}
    save_file(named | head, file)
    with pytest.warns(UserWarning, match="classifier is .* and the layer pooler is drawn at rando"):
        loaded = hub.load_bert(tmp_path, num_classes=3, key=jax.random.key(0))
    assert loaded.drawn == ("logits", "pooler")
    table = named["embeddings.word_embeddings.weight"]
    embedding = loaded.variables["params"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(embedding[:3], table[[1, 0, 2]])
    positions = loaded.variables["params"]["position_embedding"]
    np.testing.assert_array_equal(positions, named["embeddings.position_embeddings.weight"][2:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_token_id": None}, "pad_token_id must be the id of a token, got None"),
        ({"pad_token_id": 25}, "pad_token_id must be the id of a token, got 25"),
        ({"pad_token_id": 2}, "the padding token <pad> has the id 1, not 2: copy it again"),
        ({"max_position_embeddings": 2}, "max_position_embeddings must be above 2, got 2"),
        ({"vocab_size": 24}, "word_embeddings.weight .25, 8. for .24, 8.; copy both"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is drawn at random")
def test_configurations_that_do_not_fit_a_roberta(changes, message, tmp_path):
    make_classifier(tmp_path, "roberta")
    config = CONFIGS["roberta"] | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=message) as error:
        hub.load_bert(tmp_path, num_classes=3, key=jax.random.key(0))
    assert len(str(error.value).replace(str(tmp_path), "")) <= 300
