"""Options, pairs of sentences, their tokens and batches for the experiment on translation."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.common.cli import require
from experiments.common.options import SoftTargetOptions, check_batch_size
from jaxkd.data import parallel_text, tokens
from jaxkd.data.bucketing import LengthBuckets, token_lengths
from jaxkd.data.errors import expand_user_path

NUM_BUCKETS = 3
"""Number of lengths to which batches are cut. Each is compiled."""
BUCKET_MULTIPLE = 4
"""The bucket lengths are multiples of this."""


@dataclasses.dataclass(frozen=True)
class Options(SoftTargetOptions):
    """Options of the pairs of sentences and their tokens."""

    dataset: str = "multi30k"
    """Folder with train.en and train.de, one sentence per line, test.en and test.de, and optionally
    val.en and val.de. They may be compressed, as .gz."""
    source: str = "en"
    """Suffix of the files to translate from, or a file, if --target is one too."""
    target: str = "de"
    """Suffix of the files to translate to, or a file."""
    pairs: int | None = 16_000
    """Number of training pairs, of which the first are taken. `None` for all."""
    max_length: int = 60
    """Number of tokens of the longest sentence, to learn from and to write. Longer training and
    validation pairs are left out, longer test sentences are cut."""
    vocab_size: int = 2000
    """Number of tokens of the vocabulary. Both languages share it, and it is made from the training
    sentences."""

    @property
    def data_name(self) -> str:
        """What names the run: the file to translate from, if the options give one, or --dataset."""
        source = expand_user_path(self.source)
        return source.name if source.is_file() else self.dataset

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        super().check()
        require(self.pairs is None or self.pairs >= 1, f"--pairs {self.pairs}: needs at least 1")
        require(self.max_length >= 3, f"--max-length {self.max_length}: needs at least 3 tokens")


class TranslationData(NamedTuple):
    """Pairs of sentences and their tokens.

    Attributes:
        pairs: The pairs as texts.
        tokenizer: The tokenizer of both languages.
        train: `[N, 2, S]`, the training pairs: source and target.
        validation: `[N, 2, S]`, the validation pairs.
        sources: `[N, S]`, the sources of the test pairs.
        buckets: The lengths to which batches are cut.
    """

    pairs: parallel_text.PairDataset
    tokenizer: Any
    train: np.ndarray
    validation: np.ndarray
    sources: np.ndarray
    buckets: LengthBuckets


def load(options: Options) -> parallel_text.PairDataset:
    """Loads the pairs that the options name: two files, or files of two languages in a folder."""
    source = expand_user_path(options.source)
    target = expand_user_path(options.target)
    require(
        source.is_file() == target.is_file(),
        f"--source {options.source} --target {options.target}: one is a file and the other is not; "
        "give two files, or two suffixes of files in --dataset",
    )
    if source.is_file() and target.is_file():
        print(f"{source} and {target} are read, not --dataset {options.dataset}")
        dataset = parallel_text.make_pair_dataset(parallel_text.read_pairs(source, target))
    else:
        dataset = parallel_text.load_pairs(
            options.dataset, source=options.source, target=options.target
        )
    sources, targets, origins = dataset.train
    count = options.pairs
    train = parallel_text.Pairs(sources[:count], targets[:count], origins[:count])
    check_batch_size(options, len(train.sources))
    return dataset._replace(train=train)


def encode(options: Options, dataset: parallel_text.PairDataset) -> TranslationData:
    """Makes the vocabulary from the training sentences, and encodes all pairs as its tokens.

    Raises:
        OptionError: If every training or validation pair is longer than the options allow.
        DataError: If the vocabulary cannot hold all bytes.
    """
    max_length = options.max_length
    sentences = [*dataset.train.sources, *dataset.train.targets]
    tokenizer = tokens.train_tokenizer(sentences, vocab_size=options.vocab_size)
    train = encode_pairs(tokenizer, dataset.train, max_length=max_length)
    num_left_out = len(dataset.train.sources) - len(train)
    if num_left_out:
        print(f"{num_left_out} training pairs of more than {max_length} tokens are left out")
    require(len(train) > 0, f"--max-length {max_length}: every training pair is longer")
    validation = encode_pairs(tokenizer, dataset.validation, max_length=max_length)
    require(len(validation) > 0, f"--max-length {max_length}: every validation pair is longer")
    sources = encode_sentences(
        tokenizer, dataset.test.sources, dataset.test.origins, max_length=max_length
    )
    buckets = LengthBuckets.fit(train, count=NUM_BUCKETS, multiple=BUCKET_MULTIPLE)
    return TranslationData(dataset, tokenizer, train, validation, sources, buckets)


def encode_sentences(
    tokenizer: Any, sentences: Sequence[str], origins: Sequence[str], *, max_length: int
) -> np.ndarray:
    """Encodes sentences as tokens, cut and padded to a length.

    Args:
        tokenizer: The tokenizer.
        sentences: N sentences.
        origins: The origin of each, for messages.
        max_length: S, the number of tokens.

    Returns:
        int32 `[N, S]`.
    """
    rows = tokens.encode(
        tokenizer, sentences, max_length=max_length, truncate=True, name=origins.__getitem__
    )
    return np.pad(rows, ((0, 0), (0, max_length - rows.shape[1])))


def encode_pairs(tokenizer: Any, pairs: parallel_text.Pairs, *, max_length: int) -> np.ndarray:
    """Encodes pairs as tokens, without the pairs that are longer than `max_length`.

    Args:
        tokenizer: The tokenizer.
        pairs: The pairs.
        max_length: S, the number of tokens of the longest sentence.

    Returns:
        int32 `[N, 2, S]`: source and target.
    """

    # One token more than allowed, so that a sentence that was cut can be recognised.
    def encode_column(sentences: Sequence[str]) -> np.ndarray:
        return encode_sentences(tokenizer, sentences, pairs.origins, max_length=max_length + 1)

    encoded = np.stack([encode_column(pairs.sources), encode_column(pairs.targets)], axis=1)
    return encoded[token_lengths(encoded) <= max_length][..., :max_length]


def padded_batches(
    inputs: np.ndarray, buckets: LengthBuckets, *, batch_size: int = 128
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Iterates over all sentences or pairs in batches of one size, sorted by length.

    Args:
        inputs: `[N, ..., S]`, tokens.
        buckets: The lengths to which batches are cut.
        batch_size: Number of rows of a batch. The last batch is filled up with padding, so that
            each bucket length is compiled once.

    Yields:
        The row indices of a batch, and the batch.
    """
    for rows, batch in buckets.batches(inputs, batch_size):
        missing = batch_size - len(rows)
        yield rows, np.pad(batch, [(0, missing), *[(0, 0)] * (batch.ndim - 1)])
