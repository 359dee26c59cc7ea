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
from safetensors.numpy import save_file

from jaxkd.data import tokens
from jaxkd.models import from_linen
from jaxkd.weights import hub

TEXTS = ["a good film", "bad films.", "good"]
NAMES = ("negative", "neutral", "positive")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film", "##s", "."]
COMMON = {
    "id2label": dict(enumerate(NAMES)),
    "label2id": {name: label for label, name in enumerate(NAMES)},
    "vocab_size": 10,
    "max_position_embeddings": 12,
}
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
HEADS = {
    "bert": {"bert.pooler.dense": (8, 8), "classifier": (3, 8)},
    "distilbert": {"pre_classifier": (8, 8), "classifier": (3, 8)},
}
has_transformers = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")


def list_shapes(kind):
    """Returns the shapes of a model's weights by their names in transformers."""
    config = CONFIGS[kind]
    shapes = {
        f"{kind}.embeddings.word_embeddings.weight": (config["vocab_size"], 8),
        f"{kind}.embeddings.position_embeddings.weight": (config["max_position_embeddings"], 8),
    }
    if "type_vocab_size" in config:
        name = f"{kind}.embeddings.token_type_embeddings.weight"
        shapes[name] = (config["type_vocab_size"], 8)
    modules = {f"{kind}.embeddings.LayerNorm": (8,)} | HEADS[kind]
    stack = "transformer.layer" if kind == "distilbert" else "encoder.layer"
    for i in range(2):
        layer = LAYERS["distilbert" if kind == "distilbert" else "bert"]
        modules |= {f"{kind}.{stack}.{i}.{name}": shape for name, shape in layer.items()}
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
    (folder / "vocab.txt").write_text("\n".join(WORDS))


@pytest.mark.parametrize("kind", CONFIGS)
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
    with torch.no_grad():
        logits = model.eval()(**encoded).logits.numpy()
    np.testing.assert_allclose(logits, EXPECTED[kind], atol=1e-6)


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_outputs_that_are_no_classes_have_no_names(kind, tmp_path):
    make_classifier(tmp_path, "bert")
    config = CONFIGS["bert"] | {"problem_type": kind}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert hub.load_bert(tmp_path, num_classes=3, key=jax.random.key(0)).class_names == ()
