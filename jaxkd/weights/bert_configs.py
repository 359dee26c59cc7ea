"""Configurations of pretrained BERTs, `config.json` of the Hugging Face hub, as modules."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax import Array

from jaxkd.data.errors import DataError, one_line
from jaxkd.models.bert import BERT, Pooling, bert_pooling, distilbert_pooling, gelu
from jaxkd.weights import roberta
from jaxkd.weights.files import read_json, to_text

CONFIG = "config.json"
"""The file of the configuration."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The files of the weights, in the order in which they are looked for."""

# Of the sizes in a configuration; the largest BERTs have a hundredth of most of them. The shapes of
# a module are computed before they are compared with the weights, which takes time for each layer.
_LIMITS = {"num_hidden_layers": 128, "n_layers": 128}
_LIMIT = 2**24
_UNNAMED = re.compile(r"LABEL_\d+")
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    # Both names mean the approximation by tanh, which is the default of `jax.nn.gelu`.
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
}


def make_module(
    folder: Path, num_classes: int, pooling: Pooling | None, dropout: float | None
) -> BERT:
    """Makes the module that a folder's configuration describes.

    Args:
        folder: A hub folder.
        num_classes: Number of logits.
        pooling: Replaces that of the model's type.
        dropout: Replaces that of the configuration.

    Raises:
        DataError: If there is no configuration, or it describes another network.
    """
    file = folder / CONFIG
    config = read_config(file)
    constructors = {"bert": _make_bert, "distilbert": _make_distilbert}
    constructors |= dict.fromkeys(roberta.MODEL_TYPES, _make_roberta)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in constructors:
        raise DataError(
            f"{file}: model_type is {_show(model_type)}, but only {', '.join(constructors)} "
            "are supported"
        )
    try:
        find_padding(config)
        module = constructors[model_type](config, num_classes)
    except KeyError as error:
        raise DataError(f"{file} lacks {error.args[0]}: copy it again") from error
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error
    changes: dict[str, Any] = {"pooling": pooling, "dropout": dropout}
    return module.clone(**{field: value for field, value in changes.items() if value is not None})


def _make_bert(config: Mapping[str, Any], num_classes: int) -> BERT:
    if (kind := config.get("position_embedding_type", "absolute")) != "absolute":
        raise ValueError(
            f"position_embedding_type is {_show(kind)}, but only 'absolute' is supported"
        )
    return BERT(
        vocab_size=_read_size(config, "vocab_size"),
        hidden=_read_size(config, "hidden_size"),
        layers=_read_size(config, "num_hidden_layers"),
        heads=_read_size(config, "num_attention_heads"),
        intermediate=_read_size(config, "intermediate_size"),
        positions=_read_size(config, "max_position_embeddings"),
        segments=_read_size(config, "type_vocab_size"),
        num_classes=num_classes,
        pooling=bert_pooling,
        dropout=_read_number(config, "hidden_dropout_prob", 0.1),
        epsilon=_read_number(config, "layer_norm_eps", 1e-12),
        activation=_read_activation(config, "hidden_act"),
    )


def _make_roberta(config: Mapping[str, Any], num_classes: int) -> BERT:
    module = _make_bert(config, num_classes)
    first = find_padding(config) + 1
    if module.positions <= first:
        raise ValueError(f"max_position_embeddings must be above {first}, got {module.positions}")
    return module.clone(positions=module.positions - first)


def _make_distilbert(config: Mapping[str, Any], num_classes: int) -> BERT:
    return BERT(
        vocab_size=_read_size(config, "vocab_size"),
        hidden=_read_size(config, "dim"),
        layers=_read_size(config, "n_layers"),
        heads=_read_size(config, "n_heads"),
        intermediate=_read_size(config, "hidden_dim"),
        positions=_read_size(config, "max_position_embeddings"),
        segments=0,
        num_classes=num_classes,
        pooling=distilbert_pooling,
        # No epsilon: DistilBERT's configuration has none, and its code fixes the default, 1e-12.
        dropout=_read_number(config, "dropout", 0.1),
        activation=_read_activation(config, "activation"),
    )


def _read_size(config: Mapping[str, Any], name: str) -> int:
    # Not isinstance: true is an int for it.
    if type(size := config[name]) is not int or size < 1:
        raise ValueError(f"{name} must be a positive integer, got {_show(size)}")
    if size > (limit := _LIMITS.get(name, _LIMIT)):
        raise ValueError(f"{name} must be at most {limit:,}, got {_show(size)}")
    return size


def _read_number(config: Mapping[str, Any], name: str, default: float) -> float:
    number = config.get(name, default)
    if type(number) not in (int, float) or not 0 <= number < 1:
        raise ValueError(f"{name} must be a number in [0, 1), got {_show(number)}")
    return float(number)


def _read_activation(config: Mapping[str, Any], name: str) -> Callable[[Array], Array]:
    kind = config.get(name, "gelu")
    # The type first: a list is not hashable.
    if not isinstance(kind, str) or kind not in _ACTIVATIONS:
        raise ValueError(
            f"{name} is {_show(kind)}, but only {', '.join(_ACTIVATIONS)} are supported"
        )
    return _ACTIVATIONS[kind]


def read_config(file: Path) -> dict[str, Any]:
    """Reads a configuration.

    Raises:
        DataError: If there is none, or it is no JSON object.
    """
    if not file.is_file():
        raise DataError(
            f"the folder {file.parent} has no {CONFIG}: a pretrained model has {CONFIG}, "
            f"{' or '.join(WEIGHTS)}, and tokenizer.json or vocab.txt"
        )
    try:
        return read_json(file)
    except ValueError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        raise DataError(f"cannot read {file} ({one_line(error)})") from error


def _show(value: Any) -> str:
    """Returns a value of a configuration for a message, however long or deep it is."""
    if isinstance(value, list):
        return f"[{', '.join(map(_show_scalar, value[:3]))}{', ...' if len(value) > 3 else ''}]"
    return _show_scalar(value)


def _show_scalar(value: Any) -> str:
    return repr(to_text(value)) if isinstance(value, str) else to_text(value)


def is_roberta(config: Mapping[str, Any]) -> bool:
    """True if a configuration is that of a RoBERTa."""
    return config.get("model_type") in roberta.MODEL_TYPES


def find_padding(config: Mapping[str, Any]) -> int:
    """Returns the id of the padding token.

    Raises:
        ValueError: If it is not 0, which BERT masks, except for a RoBERTa, whose ids are exchanged.
    """
    padding = config.get("pad_token_id", 1 if is_roberta(config) else 0)
    if not is_roberta(config) and padding != 0:
        raise ValueError(
            f"pad_token_id is {_show(padding)}, but padding must be 0: use a model like BERT"
        )
    # Not isinstance: true is an int for it.
    if type(padding) is not int or not 0 <= padding < _read_size(config, "vocab_size"):
        raise ValueError(f"pad_token_id must be the id of a token, got {_show(padding)}")
    return padding


def read_class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of a classifier's classes, or () if it has no names of its own.

    Outputs of which several may be true of a text, and those of a regression, are no classes.
    """
    names = config.get("id2label")
    if config.get("problem_type") not in (None, "single_label_classification"):
        return ()
    if not isinstance(names, dict):
        return ()
    values = [names.get(str(label)) for label in range(len(names))]
    ordered = tuple(name for name in values if isinstance(name, str))
    # transformers writes LABEL_0, LABEL_1, ... for outputs that nobody has named.
    is_unnamed = any(map(_UNNAMED.fullmatch, ordered))
    return () if is_unnamed or len(ordered) < len(values) else ordered
