"""Loading of pretrained BERTs from local folders in the format of the Hugging Face hub."""

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

from jaxkd.data.errors import DataError, expand_user_path, one_line
from jaxkd.data.tokens import load_tokenizer
from jaxkd.models.bert import BERT, Pooling, bert_pooling, canonical_names, distilbert_pooling, gelu
from jaxkd.models.model import from_linen
from jaxkd.transfer import Report, TransferError
from jaxkd.weights.torch_files import from_torch, load_weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    # Both names mean the approximation by tanh, which is the default of `jax.nn.gelu`.
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
}


class PretrainedBERT(NamedTuple):
    """A pretrained BERT and its tokenizer.

    Attributes:
        module: The Linen module, for `jaxkd.models.from_linen`.
        variables: Its variables, in float32.
        tokenizer: The tokenizer whose ids the module takes; see `jaxkd.data.tokens`.
    """

    module: BERT
    variables: dict
    tokenizer: "Tokenizer"


def find_hub_folder(name: str | os.PathLike[str]) -> Path:
    """Finds the folder of a pretrained model. Downloads nothing and imports no package.

    Args:
        name: A folder, or the name of an installed package with a `config.json` in its folder or
            up to two levels below.

    Returns:
        The folder.

    Raises:
        DataError: If there is neither a folder nor an installed package of this name, or if the
            package has no `config.json` or several at one level.
    """
    path = expand_user_path(name)
    name = os.fspath(name)
    if path.is_dir():
        return path
    roots = _find_package_folders(name)
    if not roots:
        raise DataError(
            f"there is no folder {name} and no installed package of that name: give a folder with "
            f"{_CONFIG}, weights and a tokenizer, or install a package that has one "
            "(nothing is downloaded)"
        )
    # Level by level: sentence-transformers keep a config.json for the pooling below the model's.
    for pattern in (_CONFIG, f"*/{_CONFIG}", f"*/*/{_CONFIG}"):
        folders = sorted(config.parent for root in roots for config in root.glob(pattern))
        if len(folders) > 1:
            raise DataError(
                f"the package {name} has several models: give one of {', '.join(map(str, folders))}"
            )
        if folders:
            return folders[0]
    raise DataError(
        f"the package {name} has no {_CONFIG} up to two levels below {roots[0]}: it has no model"
    )


def load_bert(
    name: str | os.PathLike[str],
    *,
    num_classes: int,
    key: Array,
    pooling: Pooling | None = None,
    dropout: float | None = None,
) -> PretrainedBERT:
    """Loads a BERT or a DistilBERT from a folder with `config.json`, weights and a tokenizer.

    The weights come from `model.safetensors`, or from `pytorch_model.bin` without that, and are
    cast to float32. Pretraining heads are dropped. The classifier is initialized randomly if the
    file has none or one for another number of classes. The dense layer of the pooling is
    initialized randomly if the file has none.

    Args:
        name: A folder or a package, as for `find_hub_folder`.
        num_classes: Number of logits.
        key: Key for the layers that are initialized randomly.
        pooling: Reduction of the token states to one vector. Defaults to that of BERT or
            DistilBERT. Sentence-transformers models use `jaxkd.models.bert.mean_pooling`.
        dropout: Dropout rate in training. Defaults to that of the configuration.

    Returns:
        The module, its variables and the tokenizer.

    Raises:
        DataError: If a file is missing, damaged or of another model type, or if weights,
            configuration and tokenizer do not fit together.

    Example:
        >>> import jax, pathlib, tempfile
        >>> from jaxkd.weights import hub
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hub.load_bert(folder, num_classes=2, key=jax.random.key(0))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        jaxkd.data.errors.DataError: the folder ... has no config.json: ...
    """
    folder = find_hub_folder(name)
    module = _make_module(folder, num_classes, pooling, dropout)
    variables = _load_variables(folder, module, key)
    tokenizer = load_tokenizer(folder)
    # JAX raises no error for an id beyond the end of the embedding table.
    if (largest := max(tokenizer.get_vocab().values())) >= module.vocab_size:
        raise DataError(
            f"the tokenizer in {folder} has the id {largest}, but {_CONFIG} has a vocab_size of "
            f"{module.vocab_size}: use the tokenizer that the model was trained with"
        )
    return PretrainedBERT(module, variables, tokenizer)


def _find_package_folders(name: str) -> list[Path]:
    """Returns the folders of an installed package, or an empty list."""
    try:
        # Identifiers only: find_spec imports the parent package of a dotted name.
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    # A module without a __spec__ that is already imported, such as __main__, is a ValueError.
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return []
    return [Path(location) for location in spec.submodule_search_locations or ()]


def _make_module(
    folder: Path, num_classes: int, pooling: Pooling | None, dropout: float | None
) -> BERT:
    """Makes the module that a folder's configuration describes."""
    file = folder / _CONFIG
    config = _read_config(file)
    constructors = {"bert": _make_bert, "distilbert": _make_distilbert}
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in constructors:
        raise DataError(
            f"{file}: model_type is {model_type!r}, but only {' and '.join(constructors)} "
            "are supported"
        )
    # BERT masks the positions whose id is 0.
    if (padding := config.get("pad_token_id", 0)) != 0:
        raise DataError(
            f"{file}: pad_token_id is {padding!r}, but padding must be 0: use a model like BERT"
        )
    try:
        module = constructors[model_type](config, num_classes)
    except KeyError as error:
        raise DataError(f"{file} lacks {error.args[0]}: copy it again") from error
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error
    changes: dict[str, Any] = {"pooling": pooling, "dropout": dropout}
    return module.clone(**{field: value for field, value in changes.items() if value is not None})


def _make_bert(config: Mapping[str, Any], num_classes: int) -> BERT:
    if (kind := config.get("position_embedding_type", "absolute")) != "absolute":
        raise ValueError(f"position_embedding_type is {kind!r}, but only 'absolute' is supported")
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
        raise ValueError(f"{name} must be a positive integer, got {size!r}")
    return size


def _read_number(config: Mapping[str, Any], name: str, default: float) -> float:
    number = config.get(name, default)
    if type(number) not in (int, float) or not 0 <= number < 1:
        raise ValueError(f"{name} must be a number in [0, 1), got {number!r}")
    return float(number)


def _read_activation(config: Mapping[str, Any], name: str) -> Callable[[Array], Array]:
    kind = config.get(name, "gelu")
    # The type first: a list is not hashable.
    if not isinstance(kind, str) or kind not in _ACTIVATIONS:
        raise ValueError(f"{name} is {kind!r}, but only {', '.join(_ACTIVATIONS)} are supported")
    return _ACTIVATIONS[kind]


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise DataError(
            f"the folder {file.parent} has no {_CONFIG}: a pretrained model has {_CONFIG}, "
            f"{' or '.join(_WEIGHTS)}, and tokenizer.json or vocab.txt"
        )
    try:
        config = json.loads(file.read_bytes())
    # UnicodeDecodeError and JSONDecodeError are ValueErrors.
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not JSON ({one_line(error)}): copy it again") from error
    if not isinstance(config, dict):
        raise DataError(f"{file} must be a JSON object, got {type(config).__name__}: copy it again")
    return config


def _load_variables(folder: Path, module: BERT, key: Array) -> dict:
    """Loads the weights of a folder and initializes the heads that they lack."""
    file, weights = _read_weights(folder)
    init = from_linen(module).init
    try:
        # Shapes alone: the values come from the file, and from `_init_layers` for the heads.
        target = jax.eval_shape(init, key, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    except ValueError as error:
        raise DataError(f"{folder / _CONFIG}: {one_line(error)}") from error
    heads = _find_missing_heads(weights, module)
    prefixes = tuple(heads.values())
    weights = {name: array for name, array in weights.items() if not name.startswith(prefixes)}
    target["params"] |= _init_layers(init, key, tuple(heads))
    try:
        variables, report = from_torch(weights, target, module.torch_rules(), strict=False)
    # strict=False still raises for abstract variables without a value; the report says which.
    except TransferError as error:
        variables = {}
        report = error.report
    if message := _describe_misfits(report, tuple(heads)):
        raise DataError(
            f"the weights of {file} do not fit {_CONFIG}: {message}; copy both from one model"
        )
    return jax.tree.map(jnp.asarray, variables)


def _read_weights(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    files = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    if not files:
        raise DataError(f"the folder {folder} has no weights: looked for {' and '.join(_WEIGHTS)}")
    try:
        return files[0], canonical_names(load_weights(files[0]))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load {files[0]} ({one_line(error)})") from error


def _find_missing_heads(weights: Mapping[str, np.ndarray], module: BERT) -> dict[str, str]:
    """Finds the layers after the encoder that need random values.

    Returns:
        The prefix of the PyTorch names of each such layer, by its name in Flax.
    """
    heads = {"logits": "classifier."}
    if module.pooling.dense:
        heads[module.pooling.dense] = f"{module.pooling.torch_name}."
    missing = {
        layer: prefix
        for layer, prefix in heads.items()
        if not any(name.startswith(prefix) for name in weights)
    }
    kernel = weights.get("classifier.weight")
    if kernel is not None and kernel.shape[:1] != (module.num_classes,):
        missing["logits"] = heads["logits"]
    return missing


def _init_layers(init: Callable[..., dict], key: Array, names: tuple[str, ...]) -> dict[str, Any]:
    """Initializes some layers with the values that they have in a complete initialization."""
    tokens = jnp.zeros((1, 1), jnp.int32)

    # Under jit, XLA removes the computation of all other parameters.
    @jax.jit
    def init_selected(key: Array) -> dict[str, Any]:
        params = init(key, tokens)["params"]
        return {name: params[name] for name in names}

    return init_selected(key)


def _describe_misfits(report: Report, initialized: tuple[str, ...]) -> str:
    """Describes in one line what does not fit, or returns "" if all fits."""
    misfits = {
        "missing": [path for path in report.missing if path.split("/")[1] not in initialized],
        "unexpected": list(report.unexpected),
        "of another shape": [
            f"{mismatch.source_path} {mismatch.source.shape} for {mismatch.target.shape}"
            for mismatch in report.mismatched
        ],
    }
    return "; ".join(f"{kind}: {_shorten(names)}" for kind, names in misfits.items() if names)


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
