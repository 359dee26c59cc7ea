"""RoBERTa's byte-level byte-pair encoding, and tokenizers whose padding has another id than 0."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxkd.data.errors import DataError, import_or_raise, one_line
from jaxkd.data.text_files import read_utf8
from jaxkd.data.wordpiece import set_begin_and_end

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MERGES_FILE = "merges.txt"
_OPTIONS_FILE = "tokenizer_config.json"
_REQUIRED_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")


def load_byte_pairs(file: Path) -> "Tokenizer":
    """Loads a `vocab.json` and the `merges.txt` beside it as RoBERTa's tokenizer.

    Args:
        file: The vocabulary. A `tokenizer_config.json` in the same folder may say
            `"add_prefix_space": true`.

    Raises:
        DataError: If one of the files is missing or damaged.
    """
    library = import_or_raise("tokenizers")
    vocabulary = _read_object(file)
    missing = [token for token in _REQUIRED_TOKENS if token not in vocabulary]
    if missing:
        raise DataError(f"{file} lacks {', '.join(missing)}: is it a vocabulary of RoBERTa?")
    try:
        model = library.models.BPE(vocabulary, _read_merges(file.with_name(_MERGES_FILE)))
    # The library raises plain Exception.
    except Exception as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{file} and {_MERGES_FILE} do not fit ({one_line(error)}): copy both from one model"
        ) from error
    tokenizer = library.Tokenizer(model)
    add_space = _read_options(file.with_name(_OPTIONS_FILE)).get("add_prefix_space", False)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=add_space is True)
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.add_special_tokens([*_REQUIRED_TOKENS])
    if "<mask>" in vocabulary:
        tokenizer.add_special_tokens([library.AddedToken("<mask>", lstrip=True, special=True)])
    set_begin_and_end(tokenizer, "<s>", "</s>")
    return tokenizer


def exchange_ids(tokenizer: "Tokenizer", first: int, second: int) -> "Tokenizer":
    """Makes a tokenizer in which two tokens have exchanged their ids.

    Args:
        tokenizer: The tokenizer, which stays as it is.
        first: An id.
        second: Another id.
    """
    exchanged = {first: second, second: first}

    def new_id(token_id: int) -> int:
        return exchanged.get(token_id, token_id)

    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, dict):
        state["model"]["vocab"] = {token: new_id(i) for token, i in vocabulary.items()}
    else:
        # A unigram model lists its tokens by their ids.
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        if state["model"]["unk_id"] is not None:
            state["model"]["unk_id"] = new_id(state["model"]["unk_id"])
    for token in state["added_tokens"]:
        token["id"] = new_id(token["id"])
    state["added_tokens"].sort(key=lambda token: token["id"])
    _exchange_in_processor(state["post_processor"] or {}, new_id)
    return import_or_raise("tokenizers").Tokenizer.from_str(json.dumps(state))


def _exchange_in_processor(processor: dict[str, Any], new_id: Any) -> None:
    """Changes the ids that a post-processor puts around a text."""
    for part in processor.get("processors", ()):
        _exchange_in_processor(part, new_id)
    for name in ("cls", "sep"):
        if name in processor:
            token, token_id = processor[name]
            processor[name] = [token, new_id(token_id)]
    for token in processor.get("special_tokens", {}).values():
        token["ids"] = [new_id(token_id) for token_id in token["ids"]]


def _read_merges(file: Path) -> list[tuple[str, str]]:
    if not file.is_file():
        raise DataError(f"{file.parent} has a vocab.json but no {_MERGES_FILE}: copy it too")
    merges = []
    # Not splitlines: a token may have a character at which it splits.
    for number, line in enumerate(read_utf8(file).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise DataError(f"{file}, line {number} must be two tokens: copy it again")
        merges.append((parts[0], parts[1]))
    return merges


def _read_options(file: Path) -> dict[str, Any]:
    return _read_object(file) if file.is_file() else {}


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_utf8(file))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is not valid JSON ({one_line(error)}): copy it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{file} must be a JSON object, got {type(value).__name__}: copy it again")
    return value
