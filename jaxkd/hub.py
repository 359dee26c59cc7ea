"""Pretrained BERTs from folders as Hugging Face's hub has them: a configuration, weights and a tokenizer."""

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkd.checkpoints import from_torch, load_weights
from jaxkd.data.errors import DataError, expand, one_line
from jaxkd.data.tokens import load_tokenizer
from jaxkd.models.bert import BERT, Pooling, bert_pooling, canonical_names, distilbert_pooling, gelu
from jaxkd.models.model import from_linen
from jaxkd.transfer import Report, TransferError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONFIG, _WEIGHTS = "config.json", ("model.safetensors", "pytorch_model.bin")
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
}


class Pretrained(NamedTuple):
    """A model that has learnt already.

    Attributes:
        module: For `jaxkd.models.from_linen`.
        variables: Its variables, in float32.
        tokenizer: That whose ids it takes; see `jaxkd.data.tokens`.
    """

    module: BERT
    variables: dict
    tokenizer: "Tokenizer"


def find(name: str | os.PathLike[str]) -> Path:
    """The folder of a pretrained model; nothing is fetched, and no package is imported.

    Args:
        name: A folder, or the name of an installed package that has a `config.json` in it or up to two levels below.

    Returns:
        The folder.

    Raises:
        DataError: If there is no such folder and no such package, or the package has none or several.
    """
    path, name = expand(name), os.fspath(name)
    if path.is_dir():
        return path
    places = _package_folders(name)
    if not places:
        raise DataError(
            f"there is no folder {name} and no installed package of that name: give the folder of a pretrained model, "
            f"with {_CONFIG}, weights and a tokenizer, or install a package that has one (nothing is downloaded)"
        )
    for pattern in (_CONFIG, f"*/{_CONFIG}", f"*/*/{_CONFIG}"):
        found = sorted(config.parent for place in places for config in place.glob(pattern))
        if len(found) > 1:
            raise DataError(f"the package {name} has several models: give one of {', '.join(map(str, found))}")
        if found:
            return found[0]
    raise DataError(f"the package {name} has no {_CONFIG} up to two levels below {places[0]}: it has no model")


def load_bert(
    name: str | os.PathLike[str],
    *,
    num_classes: int,
    key: Array,
    pooling: Pooling | None = None,
    dropout: float | None = None,
) -> Pretrained:
    """Loads a BERT or a DistilBERT from a folder with `config.json`, weights and a tokenizer.

    Of the weights, `model.safetensors` is taken or else `pytorch_model.bin`; other precisions become float32. Heads of
    pretraining are left out. The classifier is the file's if it has one of as many classes, else a fresh one; the dense
    layer of the pooling is fresh if the file has none.

    Args:
        name: As `find` takes it.
        num_classes: Number of logits.
        key: Draws what is fresh.
        pooling: How the tokens become one vector; by default as BERT or DistilBERT do it. sentence-transformers have
            `jaxkd.models.bert.mean_pooling`.
        dropout: Probability of dropping a value in training; by default that of the configuration.

    Returns:
        The module, its variables and the tokenizer.

    Raises:
        DataError: If something is missing, damaged or of another kind, or weights, configuration and tokenizer do not
            fit each other.

    Example:
        >>> import jax, pathlib, tempfile
        >>> from jaxkd import hub
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hub.load_bert(folder, num_classes=2, key=jax.random.key(0))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        jaxkd.data.errors.DataError: the folder ... has no config.json: ...
    """
    folder = find(name)
    module = _module(folder, num_classes, pooling, dropout)
    variables = _variables(folder, module, key)
    tokenizer = load_tokenizer(folder)
    if (largest := max(tokenizer.get_vocab().values())) >= module.vocab_size:
        raise DataError(
            f"the tokenizer in {folder} has the id {largest}, but {_CONFIG} a vocab_size of {module.vocab_size}: "
            "take the tokenizer that the model was trained with"
        )
    return Pretrained(module, variables, tokenizer)


def _package_folders(name: str) -> list[Path]:
    """Where an installed package lies; of a dotted name the parent would be imported."""
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    return [Path(place) for place in spec.submodule_search_locations or ()] if spec else []


def _module(folder: Path, num_classes: int, pooling: Pooling | None, dropout: float | None) -> BERT:
    file = folder / _CONFIG
    config = _read_config(file)
    readers = {"bert": _bert, "distilbert": _distilbert}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in readers:
        raise DataError(f"{file}: model_type is {kind!r}, but only {' and '.join(readers)} can be loaded")
    if (padding := config.get("pad_token_id", 0)) != 0:
        raise DataError(f"{file}: pad_token_id is {padding!r}, but 0 must be padding: take a model like BERT")
    try:
        module = readers[kind](config, num_classes)
    except KeyError as error:
        raise DataError(f"{file} lacks {error.args[0]}: copy it anew") from error
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error
    changes: dict[str, Any] = {"pooling": pooling, "dropout": dropout}
    return module.clone(**{field: value for field, value in changes.items() if value is not None})


def _bert(config: Mapping[str, Any], num_classes: int) -> BERT:
    if (kind := config.get("position_embedding_type", "absolute")) != "absolute":
        raise ValueError(f"position_embedding_type is {kind!r}, but only 'absolute' can be loaded")
    return BERT(
        vocab_size=_size(config, "vocab_size"),
        hidden=_size(config, "hidden_size"),
        layers=_size(config, "num_hidden_layers"),
        heads=_size(config, "num_attention_heads"),
        intermediate=_size(config, "intermediate_size"),
        positions=_size(config, "max_position_embeddings"),
        segments=_size(config, "type_vocab_size"),
        num_classes=num_classes,
        pooling=bert_pooling,
        dropout=_number(config, "hidden_dropout_prob", 0.1),
        epsilon=_number(config, "layer_norm_eps", 1e-12),
        activation=_activation(config, "hidden_act"),
    )


def _distilbert(config: Mapping[str, Any], num_classes: int) -> BERT:
    return BERT(
        vocab_size=_size(config, "vocab_size"),
        hidden=_size(config, "dim"),
        layers=_size(config, "n_layers"),
        heads=_size(config, "n_heads"),
        intermediate=_size(config, "hidden_dim"),
        positions=_size(config, "max_position_embeddings"),
        segments=0,
        num_classes=num_classes,
        pooling=distilbert_pooling,
        dropout=_number(config, "dropout", 0.1),
        activation=_activation(config, "activation"),
    )


def _size(config: Mapping[str, Any], name: str) -> int:
    if type(size := config[name]) is not int or size < 1:
        raise ValueError(f"{name} must be a positive integer, got {size!r}")
    return size


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    number = config.get(name, default)
    if type(number) not in (int, float) or not 0 <= number < 1:
        raise ValueError(f"{name} must be a number from 0 to 1, got {number!r}")
    return float(number)


def _activation(config: Mapping[str, Any], name: str) -> Callable[[Array], Array]:
    kind = config.get(name, "gelu")
    if not isinstance(kind, str) or kind not in _ACTIVATIONS:
        raise ValueError(f"{name} is {kind!r}, but only {', '.join(_ACTIVATIONS)} can be loaded")
    return _ACTIVATIONS[kind]


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise DataError(
            f"the folder {file.parent} has no {_CONFIG}: a pretrained model has {_CONFIG}, {' or '.join(_WEIGHTS)}, "
            "and tokenizer.json or vocab.txt"
        )
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:  # a UnicodeDecodeError and a JSONDecodeError are ValueErrors
        raise DataError(f"{file} is no JSON ({one_line(error)}): copy it anew") from error
    if not isinstance(config, dict):
        raise DataError(f"{file} must be an object of options, got {type(config).__name__}: copy it anew")
    return config


def _variables(folder: Path, module: BERT, key: Array) -> dict:
    """The file's weights, and fresh ones for the heads that it has not got."""
    file, weights = _read_weights(folder)
    init, tokens = from_linen(module).init, jax.ShapeDtypeStruct((1, 1), jnp.int32)
    try:
        target = jax.eval_shape(init, key, tokens)
    except ValueError as error:
        raise DataError(f"{folder / _CONFIG}: {one_line(error)}") from error
    heads = _lacking_heads(weights, module)
    weights = {name: array for name, array in weights.items() if not name.startswith(tuple(heads.values()))}
    target["params"] |= _fresh(init, key, tuple(heads))
    try:
        variables, report = from_torch(weights, target, module.torch_rules(), strict=False)
    except TransferError as error:
        variables, report = {}, error.report
    if fault := _fault(report, tuple(heads)):
        raise DataError(f"the weights of {file} do not fit {_CONFIG}: {fault}; copy both from one model")
    return jax.tree.map(jnp.asarray, variables)


def _read_weights(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    found = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    if not found:
        raise DataError(f"the folder {folder} has no weights: looked for {' and '.join(_WEIGHTS)}")
    try:
        return found[0], canonical_names(load_weights(found[0]))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load {found[0]} ({one_line(error)})") from error


def _lacking_heads(weights: Mapping[str, np.ndarray], module: BERT) -> dict[str, str]:
    """Our names and PyTorch's of the layers behind the encoder that a file lacks, or has for other classes."""
    heads = {"logits": "classifier."} | (
        {module.pooling.dense: f"{module.pooling.torch}."} if module.pooling.dense else {}
    )
    lacking = {ours: theirs for ours, theirs in heads.items() if not any(name.startswith(theirs) for name in weights)}
    kernel = weights.get("classifier.weight")
    fits = kernel is None or kernel.shape[:1] == (module.num_classes,)
    return lacking if fits else lacking | {"logits": "classifier."}


def _fresh(init: Callable[..., dict], key: Array, names: tuple[str, ...]) -> dict[str, Any]:
    """Some of the initial parameters; the others are compiled away."""
    tokens = jnp.zeros((1, 1), jnp.int32)

    def drawn(key: Array) -> dict[str, Any]:
        params = init(key, tokens)["params"]
        return {name: params[name] for name in names}

    return jax.jit(drawn)(key)


def _fault(report: Report, fresh: tuple[str, ...]) -> str:
    """What keeps weights and configuration apart, in one line; nothing if they fit."""
    missing = [path for path in report.missing if path.split("/")[1] not in fresh]
    other = [f"{one.source_path} {one.source.shape} for {one.target.shape}" for one in report.mismatched]
    faults = {"missing": missing, "unexpected": list(report.unexpected), "of another shape": other}
    return "; ".join(f"{kind}: {_listed(names)}" for kind, names in faults.items() if names)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
