"""BERT's WordPiece tokenizer, built from its vocabulary."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxkd.data.errors import DataError, import_or_raise, one_line
from jaxkd.data.text_files import read_utf8

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_OPTIONS_FILE = "tokenizer_config.json"
_REQUIRED_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def load_wordpiece(file: Path) -> "Tokenizer":
    """Loads a `vocab.txt` as BERT's tokenizer, with the options of `tokenizer_config.json`.

    Args:
        file: The vocabulary; the options, if there are any, are in the same folder.

    Raises:
        DataError: If one of the files is damaged.
    """
    library = import_or_raise("tokenizers")
    vocabulary = _read_vocabulary(file)
    options = _read_options(file.with_name(_OPTIONS_FILE))
    tokenizer = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token="[UNK]"))
    # The defaults are those of transformers, which a `tokenizer_config.json` need not repeat. An
    # absent `strip_accents` follows `lowercase`.
    tokenizer.normalizer = library.normalizers.BertNormalizer(
        lowercase=options.get("do_lower_case", True),
        strip_accents=options.get("strip_accents"),
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = library.decoders.WordPiece()
    tokenizer.add_special_tokens(
        [token for token in (*_REQUIRED_TOKENS, "[MASK]") if token in vocabulary]
    )
    set_begin_and_end(tokenizer, "[CLS]", "[SEP]")
    return tokenizer


def set_begin_and_end(tokenizer: "Tokenizer", begin: str, end: str) -> None:
    """Makes a tokenizer put the token `begin` before each text and `end` after it."""
    tokenizer.post_processor = import_or_raise("tokenizers").processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (begin, end)],
    )


def _read_vocabulary(file: Path) -> dict[str, int]:
    """Returns the ids of the tokens, one of which is on each line."""
    # Tokens may contain U+2028 and the like, at which str.splitlines would split.
    lines = read_utf8(file).replace("\r\n", "\n").removesuffix("\n").split("\n")
    vocabulary: dict[str, int] = {}
    for token_id, token in enumerate(lines):
        # Skipping a line would shift the ids of all tokens after it.
        if not token or token in vocabulary:
            fault = f"has {token!r} again" if token else "is empty"
            raise DataError(
                f"{file}, line {token_id + 1} {fault}, but each line must be a different token: "
                "correct it"
            )
        vocabulary[token] = token_id
    missing = [token for token in _REQUIRED_TOKENS if token not in vocabulary]
    if missing:
        raise DataError(f"{file} lacks {', '.join(missing)}: is it a vocabulary of BERT?")
    return vocabulary


def _read_options(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        options = json.loads(read_utf8(file))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file} is not valid JSON ({one_line(error)}): correct it or copy it again"
        ) from error
    if not isinstance(options, dict):
        raise DataError(f"{file} must be an object of options, got {one_line(ValueError(options))}")
    for name in ("do_lower_case", "strip_accents", "tokenize_chinese_chars"):
        if not isinstance(options.get(name), bool | None):
            raise DataError(f"{file}: {name} must be true or false, got {options[name]!r}")
    return {name: value for name, value in options.items() if value is not None}
