"""BERT teaches an LSTM to tell praise from blame.

A BERT that comes pretrained is fine-tuned on labelled sentences. An LSTM of a tenth of its size, two layers of 64 and
32 units, learns from the labels alone, from labels and the teacher's soft targets, and from soft targets on further
sentences without labels as well. All students take as many steps, and read the teacher's tokens. Further sentences
that hold one of the validation or test set are left out: collections of movie reviews overlap.

Paper: Tang et al., Distilling Task-Specific Knowledge from BERT into Simple Neural Networks,
https://arxiv.org/abs/1903.12136

Command: python -m experiments.sentiment --dataset FOLDER

With `--unlabelled movieReviewSnippets_GroundTruth.txt --unlabelled-field 3`, of VADER's data, it also has the last
student; `--dataset imdb_reviews --max-length 256` takes longer texts. On an accelerator, in full size: --bert
FOLDER_OF_BERT_BASE --frozen-layers -1 --teacher-learning-rate 2e-5 --teacher-epochs 3 --epochs 30 --embedding 300
--bf16

Result: teacher 88.1 %, LSTM alone 81.7 %, distilled 83.0 %, with further sentences 82.8 % (SST-2, 3 seeds)

Time: 7 minutes on 2 CPU cores
"""

import dataclasses
from typing import Any

import numpy as np

from experiments import cli, plans, text
from jaxkd import distill, models
from jaxkd.data import text as texts


@dataclasses.dataclass(frozen=True)
class Config(text.Options):
    """Options of the experiment."""

    epochs: int = 6
    """Passes of the students over the labelled texts; those that see further texts take as many steps."""
    batch_size: int = 32
    """Texts a step."""
    learning_rate: float = 2e-3
    """Adam's for the students, at the start; it falls to 0 along a cosine."""
    temperature: float = 2.0
    """Softens the targets; above 0."""
    alpha: float = 0.9
    """Weight of the soft targets where there is a label, from 0 to 1; without one they have all of it."""
    embedding: int = 64
    """Width of the student's embeddings."""
    dropout: float = 0.3
    """Share of the student's values that training drops before its last layers."""
    unlabelled: str | None = None
    """A file of further texts, one a line; None: there are none."""
    unlabelled_field: int = 1
    """Which field of its lines holds the text, between tabs and counted from 1."""

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        super().check()
        cli.require(self.embedding >= 1, f"--embedding {self.embedding}: at least 1")
        cli.require(0 <= self.dropout < 1, f"--dropout {self.dropout}: from 0 to below 1")


def further_texts(config: Config, dataset: texts.TextDataset) -> tuple[list[str], list[str]] | None:
    """The texts without labels that share nothing with what is validated and tested on, and their places."""
    if config.unlabelled is None:
        return None
    found, places = texts.read_texts(config.unlabelled, field=config.unlabelled_field)
    kept = texts.apart_from(found, dataset.validation.texts + dataset.test.texts)
    known = {*dataset.train.texts}
    kept &= np.array([one not in known for one in found])
    print(f"{kept.sum():,} of {len(found):,} further texts are learnt from: the others hold one that is labelled")
    cli.require(bool(kept.any()), f"--unlabelled {config.unlabelled}: all of its texts are labelled ones")
    return [found[i] for i in np.flatnonzero(kept)], [places[i] for i in np.flatnonzero(kept)]


def make_plan(config: Config, prepared: text.Prepared, teacher: distill.Trained) -> tuple[Any, ...]:
    """Who learns what from whom."""
    labelled = prepared.train
    module = models.LSTMClassifier(
        prepared.bert.module.vocab_size,
        embedding=config.embedding,
        num_classes=prepared.bert.module.num_classes,
        dropout=config.dropout,
    )
    student = plans.model(module, config)
    alone: dict[str, Any] = {"options": config, "steps": plans.steps(config, len(labelled["labels"]))}
    taught = alone | {"loss": plans.taught(config), "teachers": ("teacher",), "cache_teachers": True}
    plan = (
        distill.Pretrained("teacher", prepared.model, teacher.variables),
        plans.stage("lstm_alone", student, labelled, plans.supervised, **alone),
        plans.stage("lstm_distilled", student, labelled, **taught),
    )
    if prepared.unlabelled is None:
        return plan
    return *plan, plans.stage("lstm_transfer", student, with_unlabelled(labelled, prepared.unlabelled), **taught)


def with_unlabelled(labelled: dict[str, np.ndarray], further: np.ndarray) -> dict[str, np.ndarray]:
    """Labelled and further texts together; `labelled` tells which are which."""
    count = len(further)
    return {
        "inputs": np.concatenate([labelled["inputs"], further]),
        "labels": np.concatenate([labelled["labels"], np.zeros(count, np.int32)]),
        "labelled": np.arange(len(labelled["labels"]) + count) < len(labelled["labels"]),
    }


def main(config: Config) -> None:
    """Trains, compares and reports."""
    config.check()
    dataset = text.load(config)
    prepared = text.prepare(config, dataset, unlabelled=further_texts(config, dataset))
    run = plans.open_run("sentiment", config, config.dataset, text.arrays(prepared))
    teacher = text.train_teacher(run, config, prepared)
    plan = make_plan(config, prepared, teacher)
    trained = plans.train(run, config, plan, validation=prepared.validation, widths=prepared.widths)
    students = tuple(one.name for one in plan[1:])
    distilled = students[1:]
    plans.leave(
        run,
        plan,
        trained | {"teacher": [teacher]},
        prepared.test,
        title="BERT teaches an LSTM",
        students=students,
        comparisons=[(name, "lstm_alone") for name in distilled] + [(name, "teacher") for name in distilled],
        **text.MEASURED,
        widths=prepared.widths,
    )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
