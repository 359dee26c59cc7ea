"""Hub folders of a tiny BERT, of which a file is changed."""

import functools
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.fuzzing import values
from jaxkd import models
from jaxkd.data import tokens
from jaxkd.weights import hub, save_torch

CONFIG = {
    "model_type": "bert",
    "vocab_size": 10,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "pad_token_id": 0,
}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film", "##s", "."]
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": {"type": "Lowercase"},
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {token: index for index, token in enumerate(VOCABULARY)},
    },
}


def make(rng: random.Random, folder: Path) -> Callable[[], Any]:
    """Makes a hub folder and returns a function that loads it."""
    write_bert(folder)
    if rng.random() < 0.3:
        (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")
    files = sorted(path.name for path in folder.iterdir())
    name = rng.choice((*["config.json"] * 6, *files))
    path = folder / name
    action = rng.random()
    if action < 0.1:
        values.replace_by_odd_file(rng, path)
    elif action < 0.25 or not name.endswith(".json"):
        path.write_bytes(values.damage(rng, path.read_bytes()))
    else:
        content = values.change_json(rng, json.loads(path.read_bytes()))
        path.write_bytes(values.encode_json(rng, content))
    if rng.random() < 0.15:
        return lambda: tokens.load_tokenizer(folder)
    return lambda: hub.load_bert(folder, num_classes=3, key=jax.random.key(0))


def write_bert(folder: Path) -> None:
    """Writes the configuration, weights and vocabulary of a tiny BERT."""
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(_make_weights())


@functools.cache
def _make_weights() -> bytes:
    module = models.BERT(
        10, hidden=8, layers=1, heads=2, intermediate=12, positions=16, num_classes=3
    )
    init = models.from_linen(module).init
    shapes = jax.eval_shape(init, jax.random.key(0), jax.ShapeDtypeStruct((1, 4), jnp.int32))
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), shapes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_torch(path, variables, module.torch_rules())
        return path.read_bytes()
