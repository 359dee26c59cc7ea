"""Loading of pretrained BERTs from folders in the format of the Hugging Face hub."""

import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkd._messages import list_some
from jaxkd.data.errors import DataError, expand_user_path, one_line
from jaxkd.data.tokens import load_tokenizer
from jaxkd.models._linen import from_linen
from jaxkd.models.bert import BERT, Pooling, canonical_names
from jaxkd.models.layers import check_dropout_rate
from jaxkd.transfer import Report, TransferError, leaves_by_path
from jaxkd.weights.bert_configs import (
    CONFIG,
    WEIGHTS,
    find_padding,
    is_roberta,
    make_module,
    read_class_names,
    read_config,
)
from jaxkd.weights.files import find_hub_file, to_text
from jaxkd.weights.hub_download import HubSource, download, is_hub_name
from jaxkd.weights.names import expected_names, unwrap_names
from jaxkd.weights.roberta import roberta_names, to_bert
from jaxkd.weights.torch_files import from_torch, read_state_dict

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_HEAD_NAMES = {"logits": "the classifier"}


class PretrainedBERT(NamedTuple):
    """A pretrained BERT and its tokenizer.

    Attributes:
        module: The Linen module, for `jaxkd.models.from_linen`.
        variables: Its variables, in float32.
        tokenizer: The tokenizer whose ids the module takes; see `jaxkd.data.tokens`.
        class_names: Name of each class, in the order of the logits, from `id2label` of the
            configuration. Empty if the classifier is drawn at random, if the configuration has no
            names of its own, or if several of its outputs may be true of a text.
            `jaxkd.data.match_classes` compares them with those of the data, and
            `jaxkd.models.with_class_order` brings the logits into the data's order.
        drawn: Names of the layers that were drawn at random, such as `"logits"`. Without any, and
            with its own pooling, it is a fine-tuned classifier that can be used as it is.
        source: Where the files come from, if they are the hub's.
    """

    module: BERT
    variables: dict
    tokenizer: "Tokenizer"
    class_names: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()
    source: HubSource | None = None


def find_hub_folder(name: str | os.PathLike[str]) -> Path:
    """Finds the folder of a pretrained model. Imports no package.

    Args:
        name: A folder, or the name of an installed package with a `config.json` in its folder or
            up to two levels below. `hub:owner/name` or `hub:owner/name@revision` is downloaded from
            the Hugging Face hub unless it is in its cache; nothing else is.

    Returns:
        The folder.

    Raises:
        DataError: If there is neither a folder nor an installed package of this name, or if the
            package has no `config.json` or several at one level; if a model cannot be downloaded.
    """
    return _locate(name)[0]


def _locate(name: str | os.PathLike[str]) -> tuple[Path, HubSource | None]:
    """Finds the folder of a pretrained model, and where the hub's come from."""
    if is_hub_name(name):
        return download(os.fspath(name))
    return _find_local_folder(name), None


def _find_local_folder(name: str | os.PathLike[str]) -> Path:
    path = expand_user_path(name)
    name = os.fspath(name)
    if path.is_dir():
        return path
    roots = _find_package_folders(name)
    if not roots:
        raise DataError(
            f"there is no folder {name} and no installed package of that name: give a folder with "
            f"{CONFIG}, weights and a tokenizer, a package that has one, or hub:owner/name to "
            "download it"
        )
    # Level by level: sentence-transformers keep a config.json for the pooling below the model's.
    for pattern in (CONFIG, f"*/{CONFIG}", f"*/*/{CONFIG}"):
        folders = sorted(config.parent for root in roots for config in root.glob(pattern))
        if len(folders) > 1:
            raise DataError(
                f"the package {name} has several models: give one of {', '.join(map(str, folders))}"
            )
        if folders:
            return folders[0]
    raise DataError(
        f"the package {name} has no {CONFIG} up to two levels below {roots[0]}: it has no model"
    )


def load_bert(
    name: str | os.PathLike[str],
    *,
    num_classes: int,
    key: Array,
    pooling: Pooling | None = None,
    dropout: float | None = None,
) -> PretrainedBERT:
    """Loads a BERT, DistilBERT or RoBERTa from a folder with `config.json`, weights and tokenizer.

    The weights come from `model.safetensors`, or from `pytorch_model.bin` without that; either may
    be divided into shards with an index. They are cast to float32. A prefix that a wrapper put
    before all names is removed. Pretraining heads are dropped. The classifier is initialized
    randomly if the file has none or one for another number of classes. The dense layer of the
    pooling is initialized randomly if the file has none.

    A RoBERTa becomes the BERT with the same outputs: its padding and the token of the id 0 exchange
    their ids, in the tokenizer and in the embedding, and its positions are counted from 0. In
    training, the dropout before its pooling is left out.

    Args:
        name: A folder, a package or `hub:owner/name`, as for `find_hub_folder`.
        num_classes: Number of logits.
        key: Key for the layers that are initialized randomly.
        pooling: Reduction of the token states to one vector. Defaults to that of BERT or
            DistilBERT. Sentence-transformers models use `jaxkd.models.bert.mean_pooling`.
        dropout: Dropout rate in training, in [0, 1). Defaults to that of the configuration.

    Returns:
        The module, its variables, the tokenizer and the names of the classes.

    Raises:
        ValueError: If the dropout rate is not in [0, 1).
        DataError: If a file is missing, damaged or of another model type, if weights,
            configuration and tokenizer do not fit together, or if there are adapters beside the
            weights.

    Warns:
        UserWarning: If a layer is initialized randomly, a prefix was removed from the names of the
            weights, or the folder has several files of weights.

    Example:
        >>> import jax, pathlib, tempfile
        >>> from jaxkd.weights import hub
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hub.load_bert(folder, num_classes=2, key=jax.random.key(0))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        jaxkd.data.errors.DataError: the folder ... has no config.json: ...
    """
    if dropout is not None:
        check_dropout_rate(dropout)
    folder, source = _locate(name)
    module = make_module(folder, num_classes, pooling, dropout)
    variables, drawn = _load_variables(folder, module, key)
    tokenizer = load_tokenizer(folder, padding_id=find_padding(read_config(folder / CONFIG)))
    # JAX raises no error for an id beyond the end of the embedding table.
    if (largest := max(tokenizer.get_vocab().values())) >= module.vocab_size:
        raise DataError(
            f"the tokenizer in {folder} has the id {largest}, but {CONFIG} has a vocab_size of "
            f"{module.vocab_size}: use the tokenizer that the model was trained with"
        )
    names = () if "logits" in drawn else read_class_names(read_config(folder / CONFIG))
    names = names if len(names) == num_classes else ()
    return PretrainedBERT(module, variables, tokenizer, names, drawn, source)


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


def _load_variables(folder: Path, module: BERT, key: Array) -> tuple[dict, tuple[str, ...]]:
    """Loads the weights of a folder and initializes the heads that they lack.

    Returns:
        The variables, and the names of the layers that were initialized.
    """
    init = from_linen(module).init
    try:
        # Shapes alone: the values come from the file, and from `_init_layers` for the heads.
        target = jax.eval_shape(init, key, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    except ValueError as error:
        raise DataError(f"{folder / CONFIG}: {one_line(error)}") from error
    rules = module.torch_rules()
    file, weights = _read_weights(folder, expected_names(leaves_by_path(target), rules))
    heads = _find_missing_heads(weights, module)
    prefixes = tuple(prefix for prefix, _ in heads.values())
    weights = {name: array for name, array in weights.items() if not name.startswith(prefixes)}
    # Without the missing heads, which are initialized only if all else fits: it takes long.
    params = {layer: leaves for layer, leaves in target["params"].items() if layer not in heads}
    try:
        variables, report = from_torch(weights, {**target, "params": params}, rules, strict=False)
    # strict=False still raises for abstract variables without a value; the report says which.
    except TransferError as error:
        variables = {}
        report = error.report
    except ValueError as error:
        raise DataError(f"the weights of {file} do not fit: {one_line(error)}") from error
    if message := _describe_misfits(report):
        raise DataError(
            f"the weights of {file} do not fit {CONFIG}: {message}; copy both from one model"
        )
    variables["params"] |= _init_layers(init, key, tuple(heads))
    if heads:
        reasons = " and ".join(
            f"{_HEAD_NAMES.get(layer, f'the layer {layer}')} is drawn at random: {reason}"
            for layer, (_, reason) in heads.items()
        )
        warnings.warn(f"{folder}: {reasons}; train it before use", stacklevel=3)
    return jax.tree.map(jnp.asarray, variables), tuple(heads)


def _read_weights(folder: Path, expected: set[str]) -> tuple[Path, dict[str, np.ndarray]]:
    """Reads the weights of a folder under the expected names, as far as it has them."""
    try:
        file = find_hub_file(folder)
    except ValueError as error:
        raise DataError(str(error)) from error
    if file is None:
        raise DataError(
            f"the folder {folder} has no weights: looked for {' and '.join(WEIGHTS)}, whole or "
            "in shards"
        )
    config = read_config(folder / CONFIG)
    expected = roberta_names(expected) if is_roberta(config) else expected
    try:
        weights, removed = unwrap_names(read_state_dict(file), _add_other_names(expected))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load {file} ({one_line(error)})") from error
    if is_roberta(config):
        weights = to_bert(weights, find_padding(config))
    if removed:
        prefixes = " and ".join(map(to_text, removed))
        warnings.warn(f"removed {prefixes} from the names in {file}", stacklevel=4)
    return file, canonical_names(weights)


def _add_other_names(names: set[str]) -> set[str]:
    """Adds the names that `canonical_names` renames: without a model's prefix, and old ones."""
    names = names | {re.sub(r"^(bert|distilbert|roberta)\.", "", name) for name in names}
    old = {re.sub(r"(?<=\.LayerNorm)\.weight$", ".gamma", name) for name in names}
    return names | old | {re.sub(r"(?<=\.LayerNorm)\.bias$", ".beta", name) for name in names}


def _find_missing_heads(
    weights: Mapping[str, np.ndarray], module: BERT
) -> dict[str, tuple[str, str]]:
    """Finds the layers after the encoder that need random values.

    Returns:
        The prefix of the PyTorch names of each such layer, and why it needs them, by its name in
        Flax.
    """
    heads = {"logits": "classifier."}
    if module.pooling.dense:
        heads[module.pooling.dense] = f"{module.pooling.torch_name}."
    missing = {
        layer: (prefix, "the file has none")
        for layer, prefix in heads.items()
        if not any(name.startswith(prefix) for name in weights)
    }
    kernel = weights.get("classifier.weight")
    if kernel is not None and kernel.shape[:1] != (module.num_classes,):
        num_classes = kernel.shape[0] if kernel.ndim else 0
        reason = f"the file has {num_classes} classes, not {module.num_classes}"
        missing["logits"] = (heads["logits"], reason)
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


def _describe_misfits(report: Report) -> str:
    """Describes in one line what does not fit, or returns "" if all fits."""
    misfits = {
        "missing": list(report.missing),
        "unexpected": list(report.unexpected),
        "of another shape": [
            f"{mismatch.source_path} {mismatch.source.shape} for {mismatch.target.shape}"
            for mismatch in report.mismatched
        ],
    }
    return "; ".join(
        # A name with two shapes has up to 90 characters.
        f"{kind}: {list_some(names, count=2, limit=90)}"
        for kind, names in misfits.items()
        if names
    )
