"""Texts for `jaxkd distill`: tokens, BERTs and LSTMs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxkd import models, transfer
from jaxkd._messages import shorten
from jaxkd.cli.berts import load_classifier, lowest_layers, make_transfer
from jaxkd.cli.problem import Defaults, Problem, Student, Teacher
from jaxkd.data import text, tokens
from jaxkd.data.bucketing import LengthBuckets
from jaxkd.weights.students import find_student

_NUM_BUCKETS = 3
_VOCABULARY = 8000
_MAX_LENGTH = 512
_BERT_LEARNING_RATE = 5e-5
_TEACHER = "lstm(embedding=128, hidden=(128, 64), dense=128, dropout=0.3, bidirectional=True)"


class TextProblem(Problem):
    """Classification of texts."""

    defaults = Defaults(epochs=6, batch_size=32, learning_rate=2e-3)
    has_texts = True
    example = "lstm"
    default_student = "lstm(embedding=32, hidden=(32,), dense=32)"

    def __init__(
        self, dataset: text.TextDataset, teacher: str, *, max_length: int | None = None
    ) -> None:
        """Encodes the texts with the tokenizer of the teacher, or with one of their own.

        Args:
            dataset: The texts.
            teacher: What `--teacher` names: a hub folder, package or `hub:` name of a BERT, or a
                network.
            max_length: Number of tokens to which longer texts are cut. By default a longer text
                than the teacher takes is an error.
        """
        self._bert, self._is_fine_tuned = None, False
        if not _is_network(teacher):
            if find_student(teacher):
                raise ValueError(
                    f"--teacher {shorten(teacher, 80)}: the student of a run teaches images, not "
                    "texts; give the folder of a BERT, or a network such as auto"
                )
            self._bert, self._is_fine_tuned = load_classifier(teacher, dataset.class_names)
        limit = self._bert.module.positions if self._bert else _MAX_LENGTH
        if max_length is not None and not 3 <= max_length <= limit:
            raise ValueError(f"--max-length {max_length}: must be from 3 to {limit}")
        tokenizer = self._bert.tokenizer if self._bert else _train_tokenizer(dataset)
        splits = _encode(tokenizer, dataset, max_length or limit, truncate=max_length is not None)
        self._vocab_size = max(tokenizer.get_vocab().values()) + 1
        super().__init__(
            splits,
            dataset.class_names,
            buckets=LengthBuckets.fit(splits[0]["inputs"], count=_NUM_BUCKETS),
            saving={
                "tokenizer": tokenizer,
                "max_length": max_length or limit,
                "throughput_batch": 32,
                "repeats": 10,
            },
        )

        if self._bert and self._bert.source:
            self.sources = {"teacher_source": self._bert.source._asdict()}

    def make_teacher(self, name: str) -> Teacher:
        """Makes the teacher that `--teacher` names: a BERT, or a network to train.

        A BERT is fine-tuned unless it is a classifier of the data's classes.
        """
        if self._bert is None:
            if name == "auto":
                name = _TEACHER
                print(f"the teacher is trained: {name}; a BERT's folder as --teacher knows more")
            return Teacher(self._make_network(name, "--teacher"))

        def make_optimizer(steps: int) -> Any:
            return transfer.fine_tuning_optimizer(
                _BERT_LEARNING_RATE, steps, frozen=lowest_layers(0)
            )

        model = self.check_model(models.from_linen(self._bert.module), owner=f"--teacher {name}")
        if self._is_fine_tuned:
            print(f"{shorten(name, 80)} classifies the classes of the data: it teaches as it is")
            return Teacher(model, self._bert.variables)
        return Teacher(model, self._bert.variables, {"make_optimizer": make_optimizer, "epochs": 2})

    def make_student(self, description: str, *, option: str) -> Student:
        """Makes a student: an LSTM, or `BERT(layers=N)` of the layers of the teacher."""
        if description.partition("(")[0] in ("BERT", "bert"):
            return self._cut_bert(description, option)
        return Student(self._make_network(description, option), {})

    def _cut_bert(self, description: str, option: str) -> Student:
        """Makes a student of some of the teacher's layers, evenly spread."""
        if self._bert is None:
            raise ValueError(f"{option} {shorten(description, 60)} needs a BERT as --teacher")
        teacher = self._bert.module
        module = models.make_module(f"BERT(vocab_size=1, {description.partition('(')[2] or ')'}")
        expected = models.BERT(vocab_size=1, layers=module.layers, remat=module.remat)
        if module != expected or not 1 <= module.layers <= teacher.layers:
            raise ValueError(
                f"{option} {shorten(description, 60)}: write BERT(layers=N) with N from 1 to "
                f"{teacher.layers}, or BERT(layers=N, remat=True); the rest is that of the teacher"
            )
        layers = np.linspace(0, teacher.layers - 1, module.layers).round().astype(int).tolist()
        rules = transfer.layer_rules("params/block{i}/{rest...}", layers)
        model = models.from_linen(teacher.clone(layers=module.layers, remat=module.remat))
        return Student(model, {"start": "teacher", "transfer": make_transfer(rules)})

    def _make_network(self, description: str, option: str) -> models.Model:
        if "vocab_size" not in description:
            name, _, arguments = description.partition("(")
            description = f"{name}(vocab_size={self._vocab_size}, {arguments or ')'}"
        module = self.make_module(description, option=option)
        owner = f"{option} {shorten(description, 60)}"
        return self.check_model(models.from_linen(module), owner=owner)


def _is_network(teacher: str) -> bool:
    """Returns whether a teacher is trained from random weights."""
    return teacher.partition("(")[0] in ("auto", "lstm", "LSTMClassifier")


def _train_tokenizer(dataset: text.TextDataset) -> Any:
    return tokens.train_tokenizer(dataset.train.texts, vocab_size=_VOCABULARY)


def _encode(
    tokenizer: Any, dataset: text.TextDataset, max_length: int, *, truncate: bool
) -> list[dict[str, np.ndarray]]:
    """Encodes the three splits as tokens of one length."""
    arrays = encode_splits(
        tokenizer,
        [(split.texts, split.origins) for split in dataset[:3]],
        max_length=max_length,
        truncate=truncate,
    )
    return [
        {"inputs": array, "labels": split.labels}
        for array, split in zip(arrays, dataset[:3], strict=True)
    ]


def encode_splits(
    tokenizer: Any,
    splits: Sequence[tuple[Sequence[str], Sequence[str]]],
    *,
    max_length: int,
    truncate: bool,
) -> list[np.ndarray]:
    """Encodes texts as arrays of one length, int32 `[N, S]`.

    Args:
        tokenizer: As for `tokens.encode`.
        splits: The texts of each split, and the origin of each text for messages.
        max_length: As for `tokens.encode`.
        truncate: As for `tokens.encode`.
    """
    arrays = [
        tokens.encode(
            tokenizer, texts, max_length=max_length, truncate=truncate, name=origins.__getitem__
        )
        for texts, origins in splits
    ]
    longest = max(array.shape[1] for array in arrays)
    return [np.pad(array, ((0, 0), (0, longest - array.shape[1]))) for array in arrays]
