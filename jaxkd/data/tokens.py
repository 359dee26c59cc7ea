"""Texts as arrays of token ids, padded on the right with 0, by the tokenizers of Hugging Face's library."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxkd.data.errors import DataError, expand, one_line, read_utf8, require

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PADDING, UNKNOWN, BEGIN, END = "[PAD]", "[UNK]", "[BOS]", "[EOS]"
"""The special tokens of `train_tokenizer`; their ids are 0, 1, 2 and 3."""

_FILES = ("tokenizer.json", "vocab.txt")
_OPTIONS = "tokenizer_config.json"
_BERT = (PADDING, UNKNOWN, "[CLS]", "[SEP]")
_BYTES = 256
_ENDS = (END, "[SEP]")
_PADDINGS = (PADDING, "<pad>")
# Case, accents, numbers, punctuation and another script: what tokenizers of one vocabulary may treat differently.
_PROBE = "Ein Café, ÜBERGRÖSSE & 3.5 km; don't: „ça“ 你好"


def load_tokenizer(path: str | os.PathLike[str]) -> "Tokenizer":
    """Loads a tokenizer whose padding token has the id 0, as BERT's have.

    A `vocab.txt` becomes BERT's tokenizer, which lower-cases unless a `tokenizer_config.json` beside it says
    `"do_lower_case": false`. Padding and truncation that a file has switched on are switched off: see `encode`.

    Args:
        path: A `tokenizer.json`, a `vocab.txt`, or a folder that has either; of both, the first is taken.

    Returns:
        The tokenizer.

    Raises:
        DataError: If there is no such file, it is damaged, or padding has another id.
    """
    file = _tokenizer_file(expand(path))
    tokenizer = _from_vocabulary(file) if file.suffix == ".txt" else _from_json(file)
    padding = _padding_token(tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if (number := tokenizer.token_to_id(padding)) != 0:
        has = "it has no padding token" if number is None else f"its padding token {padding} has the id {number}"
        raise DataError(f"{file}: {has}, but 0 must be padding: take a tokenizer like BERT's, whose [PAD] has the id 0")
    return tokenizer


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> "Tokenizer":
    """Trains a tokenizer by byte-pair encoding of bytes, so that no text is unknown and every text can be had back.

    It puts `[BOS]` before and `[EOS]` behind a text. Equal texts give equal tokenizers.

    Args:
        texts: The texts to learn from.
        vocab_size: Number of tokens, at least 260: 4 special ones, 256 bytes. It has less if the texts repeat little.

    Returns:
        The tokenizer; `tokenizer.save(path)` writes it as a `tokenizer.json`.

    Raises:
        DataError: If the vocabulary cannot hold the bytes.
        TypeError: If `texts` is one text.

    Example:
        >>> from jaxkd.data import tokens
        >>> tokenizer = tokens.train_tokenizer(["Zwei grüne Äpfel.", "Zwei Äpfel."], vocab_size=280)
        >>> array = tokens.encode(tokenizer, ["Zwei Äpfel?", "grün"], max_length=16)
        >>> array[:, 0], array.dtype
        (array([2, 2], dtype=int32), dtype('int32'))
        >>> tokens.decode(tokenizer, array)
        ['Zwei Äpfel?', 'grün']

    References:
        Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units",
        https://arxiv.org/abs/1508.07909
    """
    _check_texts(texts)
    special = [PADDING, UNKNOWN, BEGIN, END]
    if vocab_size < len(special) + _BYTES:
        raise DataError(f"vocab_size is {vocab_size}: choose at least {len(special) + _BYTES}, to hold every byte")
    library = require("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    _surround(tokenizer, BEGIN, END)
    return tokenizer


def encode(
    tokenizer: "Tokenizer",
    texts: Sequence[str],
    *,
    max_length: int,
    truncate: bool = False,
    name: Callable[[int], str] = "text {}".format,
) -> np.ndarray:
    """Turns texts into one array of ids, padded on the right with 0.

    Args:
        tokenizer: From `load_tokenizer` or `train_tokenizer`.
        texts: The texts.
        max_length: Tokens that a text may have, special ones such as `[CLS]` and `[SEP]` included.
        truncate: Whether a longer text is cut; its special tokens stay at both ends. If not, it is an error.
        name: What an error calls the text of an index, such as its file and line.

    Returns:
        int32 `[N, S]`; S is the length of the longest, at most `max_length`.

    Raises:
        DataError: If there is no text; one is empty, too long or has the padding token in it; `max_length` leaves no
            room for text; or the tokenizer pads or truncates by itself.
        TypeError: If `texts` is one text.
    """
    _check_texts(texts)
    room = max_length - tokenizer.num_special_tokens_to_add(False)
    if room < 1:
        raise DataError(f"max_length is {max_length}, of which special tokens take {max_length - room}: raise it")
    if tokenizer.padding or tokenizer.truncation:
        raise DataError("the tokenizer pads or truncates by itself: call its no_padding() and no_truncation() first")
    if not texts:
        raise DataError("there are no texts to encode: give at least one")
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    for i, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
        if not text.strip() or not encoding.ids:
            raise DataError(f"{name(i)} is empty: leave it out")
        if 0 in encoding.ids:
            raise DataError(f"{name(i)} has the padding token {tokenizer.id_to_token(0)} in it: take it out")
        if len(encoding) > room and not truncate:
            length = len(encoding) + max_length - room
            raise DataError(f"{name(i)} has {length} tokens, max_length is {max_length}: raise it, or cut by truncate")
        encoding.truncate(room)
    rows = [tokenizer.post_process(encoding).ids for encoding in encodings]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    return tokens


def decode(tokenizer: "Tokenizer", tokens: np.ndarray) -> list[str]:
    """Turns ids back into texts, without special tokens and padding.

    Args:
        tokenizer: That which made the ids.
        tokens: Integers `[N, S]`; what stands behind the first `[EOS]` or `[SEP]` of a row is passed over.

    Returns:
        N texts.

    Raises:
        ValueError: If the shape is another.
        TypeError: If the ids are not integers.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [N, S], got {tokens.shape}: put a single row into a batch by tokens[None]")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    ends = [number for end in _ENDS if (number := tokenizer.token_to_id(end)) is not None]
    ended = np.isin(tokens, ends).cumsum(axis=1) > 0
    counts = (tokens != 0) & ~ended
    return tokenizer.decode_batch([row[where].tolist() for row, where in zip(tokens, counts, strict=True)])


def check_same_tokenizer(teacher: "Tokenizer", student: "Tokenizer") -> None:
    """Raises unless a teacher and a student read a text as the same tokens.

    Args:
        teacher: The teacher's tokenizer.
        student: The student's.

    Raises:
        DataError: If an id stands for different tokens, the sizes differ, or they cut a text otherwise.
    """
    if difference := _difference(teacher, student):
        raise DataError(
            f"the tokenizers of teacher and student differ: {difference}. Logits of tokens and hidden states are "
            "paired token by token: use the teacher's tokenizer for the student too, or distil by sequences that the "
            "teacher generates or by logits of whole sentences"
        )


def _difference(teacher: "Tokenizer", student: "Tokenizer") -> str | None:
    ours, theirs = ({number: token for token, number in one.get_vocab().items()} for one in (teacher, student))
    for number in sorted({*ours} & {*theirs}):
        if ours[number] != theirs[number]:
            return f"the id {number} is {ours[number]!r} for the teacher and {theirs[number]!r} for the student"
    if len(ours) != len(theirs):
        return f"the teacher's has {len(ours)} tokens, the student's {len(theirs)}"
    cuts = teacher.encode(_PROBE).tokens, student.encode(_PROBE).tokens
    return None if cuts[0] == cuts[1] else f"they know the same tokens, but cut {_PROBE!r} into {cuts[0]} and {cuts[1]}"


def _tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        if not found:
            raise DataError(f"the folder {path} has neither {' nor '.join(_FILES)}: put the tokenizer's file there")
        return found[0]
    if not path.is_file():
        raise DataError(f"there is no tokenizer {path}: give a {' or '.join(_FILES)}, or a folder that has one")
    return path


def _from_json(file: Path) -> "Tokenizer":
    library, text = require("tokenizers"), read_utf8(file)
    try:
        return library.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more special
        raise DataError(f"{file} is no tokenizer ({one_line(error)}): save or copy it anew") from error


def _from_vocabulary(file: Path) -> "Tokenizer":
    """BERT's tokenizer as the options beside its vocabulary want it."""
    library, vocabulary, options = require("tokenizers"), _vocabulary(file), _options(file.with_name(_OPTIONS))
    tokenizer = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = library.normalizers.BertNormalizer(
        lowercase=options.get("do_lower_case", True),
        strip_accents=options.get("strip_accents"),
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = library.decoders.WordPiece()
    tokenizer.add_special_tokens([token for token in (*_BERT, "[MASK]") if token in vocabulary])
    _surround(tokenizer, "[CLS]", "[SEP]")
    return tokenizer


def _vocabulary(file: Path) -> dict[str, int]:
    """Ids by token, one a line."""
    lines = read_utf8(file).replace("\r\n", "\n").removesuffix("\n").split("\n")
    vocabulary: dict[str, int] = {}
    for number, token in enumerate(lines):
        if not token or token in vocabulary:
            fault = f"has {token!r} again" if token else "is empty"
            raise DataError(f"{file}, line {number + 1} {fault}, but each line must be a token of its own: correct it")
        vocabulary[token] = number
    if lacking := [token for token in _BERT if token not in vocabulary]:
        raise DataError(f"{file} lacks {', '.join(lacking)}: is it a vocabulary of BERT?")
    return vocabulary


def _options(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        options = json.loads(read_utf8(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is no JSON ({one_line(error)}): correct or copy it anew") from error
    if not isinstance(options, dict):
        raise DataError(f"{file} must be an object of options, got {one_line(ValueError(options))}")
    for name in ("do_lower_case", "strip_accents", "tokenize_chinese_chars"):
        if not isinstance(options.get(name), bool | None):
            raise DataError(f"{file}: {name} must be true or false, got {options[name]!r}")
    return {name: value for name, value in options.items() if value is not None}


def _padding_token(tokenizer: "Tokenizer") -> str:
    """What the file calls its padding token, or else one of the usual names."""
    if tokenizer.padding:
        return tokenizer.padding["pad_token"]
    return next((token for token in _PADDINGS if tokenizer.token_to_id(token) is not None), PADDING)


def _surround(tokenizer: "Tokenizer", begin: str, end: str) -> None:
    """Lets the tokenizer put one token before each text and one behind it."""
    tokenizer.post_processor = require("tokenizers").processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (begin, end)],
    )


def _check_texts(texts: Iterable[str]) -> None:
    if isinstance(texts, str):
        raise TypeError(f"texts must be several, got the one text {texts[:20]!r}: put it into a list")
