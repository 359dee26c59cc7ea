"""Texts as arrays of token ids, padded on the right with 0, by Hugging Face tokenizers."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxkd._messages import shorten
from jaxkd.data.bucketing import warn_of_padding
from jaxkd.data.byte_pairs import exchange_ids, load_byte_pairs
from jaxkd.data.errors import DataError, expand_user_path, import_or_raise, one_line
from jaxkd.data.text_files import check_texts, read_utf8
from jaxkd.data.wordpiece import load_wordpiece, set_begin_and_end

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PADDING, UNKNOWN, BEGIN, END = "[PAD]", "[UNK]", "[BOS]", "[EOS]"
"""The special tokens of `train_tokenizer`; their ids are 0, 1, 2 and 3."""

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")
_NUM_BYTES = 256
_END_TOKENS = (END, "[SEP]", "</s>")
_PADDING_TOKENS = (PADDING, "<pad>")
# Tokenizers of the same vocabulary may differ in case, accents, numbers, punctuation and scripts.
_PROBE = "Ein Café, ÜBERGRÖSSE & 3.5 km; don't: „ça“ 你好"
_PADDING_REMEDY = "but 0 must be padding: choose a tokenizer like BERT's, whose [PAD] has the id 0"


def load_tokenizer(path: str | os.PathLike[str], *, padding_id: int = 0) -> "Tokenizer":
    """Loads a tokenizer, whose padding token gets the id 0 if it has another.

    A `vocab.txt` becomes BERT's tokenizer, which lower-cases unless a `tokenizer_config.json`
    beside it says `"do_lower_case": false`. A `vocab.json` with a `merges.txt` becomes RoBERTa's.
    Padding and truncation are switched off, even if the file switches them on: see `encode`.

    Args:
        path: A `tokenizer.json`, a `vocab.txt`, a `vocab.json`, or a folder that has one; the first
            of these is loaded.
        padding_id: The id of the padding token in the file: 0 for BERT, 1 for RoBERTa. It and the
            token of the id 0 exchange their ids. The rows of an embedding must be exchanged too, as
            `jaxkd.weights.hub.load_bert` does.

    Returns:
        The tokenizer.

    Raises:
        DataError: If there is no such file, it is damaged, or padding has another id in it.
    """
    file = _find_tokenizer_file(expand_user_path(path))
    if file.name == "vocab.json":
        tokenizer = load_byte_pairs(file)
    else:
        tokenizer = load_wordpiece(file) if file.suffix == ".txt" else _from_json(file)
    # Before no_padding(), which forgets the token.
    padding = _padding_token(tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    found_id = tokenizer.token_to_id(padding)
    if found_id is None:
        raise DataError(f"{file} has no padding token, {_PADDING_REMEDY}")
    if found_id != padding_id:
        raise DataError(
            f"{file}: the padding token {padding} has the id {found_id}, "
            + (f"not {padding_id}: copy it again" if padding_id else _PADDING_REMEDY)
        )
    return exchange_ids(tokenizer, 0, padding_id) if padding_id else tokenizer


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> "Tokenizer":
    """Trains a byte-level byte-pair encoding, which represents any text without unknown tokens.

    The tokenizer puts `[BOS]` before each text and `[EOS]` after it. Equal texts give equal
    tokenizers.

    Args:
        texts: The texts to learn from.
        vocab_size: Number of tokens, at least 260 (4 special tokens, 256 bytes). The vocabulary is
            smaller if the texts repeat too little.

    Returns:
        The tokenizer; `tokenizer.save(path)` writes it as a `tokenizer.json`.

    Raises:
        DataError: If the vocabulary cannot hold the bytes.
        TypeError: If `texts` is a single string.

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
    check_texts(texts)
    # The trainer numbers special tokens in this order, so padding gets the id 0.
    special_tokens = [PADDING, UNKNOWN, BEGIN, END]
    min_vocab_size = len(special_tokens) + _NUM_BYTES
    if vocab_size < min_vocab_size:
        raise DataError(
            f"vocab_size is {vocab_size}: choose at least {min_vocab_size}, to hold every byte"
        )
    library = import_or_raise("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special_tokens,
        # All 256 bytes, including those that the texts lack.
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    set_begin_and_end(tokenizer, BEGIN, END)
    return tokenizer


def encode(
    tokenizer: "Tokenizer",
    texts: Iterable[str],
    *,
    max_length: int,
    truncate: bool = False,
    name: Callable[[int], str] = "text {}".format,
) -> np.ndarray:
    """Turns texts into an array of token ids, padded on the right with 0.

    Args:
        tokenizer: A tokenizer from `load_tokenizer` or `train_tokenizer`.
        texts: The texts.
        max_length: Number of tokens that a text may have, including special ones such as `[CLS]`
            and `[SEP]`.
        truncate: Whether longer texts are truncated, which keeps the special tokens at both ends.
            If not, a longer text is an error.
        name: Returns the name of a text in error messages, such as its file and line, from its
            index.

    Returns:
        int32 `[N, S]`; S is the length of the longest text, at most `max_length`.

    Raises:
        DataError: If there is no text; a text is empty, too long or contains the padding token;
            `max_length` leaves no room for text; or the tokenizer itself pads or truncates.
        TypeError: If `texts` is a single string, a dict or a set, or holds anything but strings,
            such as None, NaN or pairs; the message names its index.
    """
    texts = _list_texts(texts)
    num_special_tokens = tokenizer.num_special_tokens_to_add(False)
    max_text_tokens = max_length - num_special_tokens
    if max_text_tokens < 1:
        raise DataError(
            f"max_length is {max_length}, of which special tokens take {num_special_tokens}: "
            "raise it"
        )
    if tokenizer.padding or tokenizer.truncation:
        raise DataError(
            "the tokenizer pads or truncates by itself: "
            "call its no_padding() and no_truncation() first"
        )
    if not texts:
        raise DataError("there are no texts to encode: give at least one")
    # Special tokens come later, so that truncation cuts between them.
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    for i, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
        # A text of control characters alone is not blank but has no tokens.
        if not text.strip() or not encoding.ids:
            raise DataError(f"{name(i)} is empty: remove it")
        # Such a token would be taken for padding and masked.
        if 0 in encoding.ids:
            raise DataError(
                f"{name(i)} contains the padding token {tokenizer.id_to_token(0)}: remove it"
            )
        if len(encoding) > max_text_tokens and not truncate:
            length = len(encoding) + num_special_tokens
            raise DataError(
                f"{name(i)} has {length} tokens, max_length is {max_length}: "
                "raise it, or set truncate"
            )
        encoding.truncate(max_text_tokens)
    rows = [tokenizer.post_process(encoding).ids for encoding in encodings]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    return tokens


def decode(tokenizer: "Tokenizer", tokens: np.ndarray) -> list[str]:
    """Turns token ids back into texts, without special tokens and padding.

    Args:
        tokenizer: The tokenizer that made the ids.
        tokens: Integers `[N, S]`; a row ends at its first `[EOS]` or `[SEP]`.

    Returns:
        N texts.

    Raises:
        ValueError: If `tokens` is not of rank 2, or an id is negative, such as the -100 of labels
            that others ignore.
        TypeError: If the ids are not integers.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2:
        raise ValueError(
            f"tokens must be [N, S], got {tokens.shape}: "
            "put a single row into a batch by tokens[None]"
        )
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    if tokens.size and tokens.min() < 0:
        raise ValueError(f"tokens must be at least 0, which is padding, got {tokens.min()}")
    end_ids = [
        token_id for token in _END_TOKENS if (token_id := tokenizer.token_to_id(token)) is not None
    ]
    has_ended = np.isin(tokens, end_ids).cumsum(axis=1) > 0
    is_text = (tokens != 0) & ~has_ended
    rows = [row[where].tolist() for row, where in zip(tokens, is_text, strict=True)]
    return tokenizer.decode_batch(rows)


def check_ids(tokens: np.ndarray, vocab_size: int) -> None:
    """Raises unless every token id has a row in an embedding of `vocab_size` tokens.

    An embedding raises no error: -1 reads the last token's row, and an id beyond it gives NaN or,
    by plain indexing, the last row. A warning says if most examples seem to be padded on the left,
    or with another token than 0.

    Args:
        tokens: Integers `[N, ...]`; 0 is padding.
        vocab_size: Number of tokens of the vocabulary.

    Raises:
        ValueError: If an id is negative or beyond the vocabulary; the message names the example.
        TypeError: If the ids are no integers.

    Example:
        >>> import numpy as np
        >>> from jaxkd.data import tokens
        >>> array = np.array([[2, 7, 3], [2, -100, 3]])
        >>> tokens.check_ids(array, 30)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: example 1 has the token id -100, outside 0..29: ...
    """
    tokens = np.asarray(tokens)
    if tokens.size and not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"token ids must be integers, got {tokens.dtype}: use tokens.astype(int)")
    # The extremes first, because a comparison would make an array of the size of the tokens.
    if not tokens.size or (tokens.min() >= 0 and tokens.max() < vocab_size):
        warn_of_padding(tokens)
        return
    index = np.argwhere((tokens < 0) | (tokens >= vocab_size))[0]
    raise ValueError(
        f"example {index[0]} has the token id {tokens[tuple(index)]}, outside 0..{vocab_size - 1}: "
        "use the model's own tokenizer, and 0 for padding"
    )


def check_same_tokenizer(teacher: "Tokenizer", student: "Tokenizer") -> None:
    """Raises unless the tokenizers of a teacher and a student give the same tokens.

    Args:
        teacher: The teacher's tokenizer.
        student: The student's.

    Raises:
        DataError: If an id stands for different tokens, the vocabularies differ in size, or the
            tokenizers split a text differently.
    """
    if difference := _describe_difference(teacher, student):
        raise DataError(
            f"the tokenizers of teacher and student differ: {difference}. Token logits and hidden "
            "states are paired token by token: use the teacher's tokenizer for the student too, or "
            "distil by sequences that the teacher generates or by logits of whole sentences"
        )


def _describe_difference(teacher: "Tokenizer", student: "Tokenizer") -> str | None:
    teacher_tokens = {token_id: token for token, token_id in teacher.get_vocab().items()}
    student_tokens = {token_id: token for token, token_id in student.get_vocab().items()}
    for token_id in sorted(teacher_tokens.keys() & student_tokens.keys()):
        if teacher_tokens[token_id] != student_tokens[token_id]:
            return (
                f"the id {token_id} is {teacher_tokens[token_id]!r} for the teacher "
                f"and {student_tokens[token_id]!r} for the student"
            )
    if len(teacher_tokens) != len(student_tokens):
        return (
            f"the teacher's has {len(teacher_tokens)} tokens, the student's {len(student_tokens)}"
        )
    # Equal vocabularies may still be used by different normalizers and pre-tokenizers.
    teacher_probe = teacher.encode(_PROBE).tokens
    student_probe = student.encode(_PROBE).tokens
    if teacher_probe == student_probe:
        return None
    return (
        f"they have the same tokens, but split {_PROBE!r} into {teacher_probe} and {student_probe}"
    )


def _find_tokenizer_file(path: Path) -> Path:
    # Not Path.is_dir and Path.is_file, which fail for a name that is too long.
    if os.path.isdir(path):
        files = [path / name for name in _TOKENIZER_FILES if (path / name).is_file()]
        if not files:
            raise DataError(
                f"the folder {path} has neither {' nor '.join(_TOKENIZER_FILES)}: "
                "put the tokenizer's file there"
            )
        return files[0]
    if not os.path.isfile(path):
        raise DataError(
            f"there is no tokenizer {path}: "
            f"give a {' or '.join(_TOKENIZER_FILES)}, or a folder that has one"
        )
    return path


def _from_json(file: Path) -> "Tokenizer":
    library = import_or_raise("tokenizers")
    text = read_utf8(file)
    try:
        return library.Tokenizer.from_str(text)
    # The library raises plain Exception.
    except Exception as error:
        raise DataError(
            f"{file} is not a tokenizer ({one_line(error)}): save or copy it again"
        ) from error


def _padding_token(tokenizer: "Tokenizer") -> str:
    """Returns the padding token that the file declares, else one of the usual names."""
    if tokenizer.padding:
        return tokenizer.padding["pad_token"]
    usual = [token for token in _PADDING_TOKENS if tokenizer.token_to_id(token) is not None]
    return usual[0] if usual else PADDING


def _list_texts(texts: Iterable[str]) -> list[str]:
    """Returns a list of texts, after a check that all are strings."""
    check_texts(texts)
    listed = list(texts)
    for index, text in enumerate(listed):
        if not isinstance(text, str):
            raise TypeError(
                f"texts must be strings, but that at index {index} is {shorten(repr(text), 60)}: "
                "leave it out, or choose one field of it"
            )
    # NumPy's strings are a class of their own.
    return list(map(str, listed))
