"""Trains recurrent translators without attention, with attention, and taught by a Transformer.

Question: what does attention gain, and what does distillation from a larger translator add?

Recurrent encoder-decoders learn to translate from pairs of sentences. One has no attention: it must
put a whole sentence into one state, which it reads at every step. The others align their states
with the encoder's. A Transformer, trained once for all seeds, then teaches students with attention:
word by word, by its soft targets for the reference translations, and by sequences, which are its
own translations of the training sentences, found by beam search. All students take the same number
of steps.

Papers: Luong et al., Effective Approaches to Attention-based Neural Machine Translation,
https://arxiv.org/abs/1508.04025; Kim and Rush, Sequence-Level Knowledge Distillation,
https://arxiv.org/abs/1606.07947

Command: python -m experiments.translation --dataset FOLDER

On an accelerator: python -m experiments.translation --dataset FOLDER --pairs None --vocab-size 8000
--batch-size 128 --hidden 512 --dropout 0.3 --epochs 12 --learning-rate 1e-3 --clip 1
--teacher-hidden 512 --teacher-layers 4 --teacher-epochs 30 --teacher-learning-rate 7e-4
--teacher-beams 5 --beams 5

The gain of attention at each length, in longer training of 9 minutes as well: python -m
experiments.translation --dataset FOLDER --only no_attention attention --pairs None --hidden 96
--batch-size 64 --epochs 5 --learning-rate 8e-3

Result: BLEU of the teacher 22.3, without attention 11.1, with attention 22.5, word-level 21.1,
sequence-level 20.2 (Multi30k English to German, 16,000 pairs, 3 seeds); in longer training 18.8 and
30.9, where attention gains 10 BLEU up to 8 words and 15 above 15 words

Time: 9 minutes on 2 CPU cores
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import cli, plans, translation_data, translation_report
from experiments.common import translation_search as search
from experiments.common.cli import OptionError, require
from experiments.common.options import make_model, num_steps
from experiments.common.translation_data import TranslationData
from experiments.common.translation_losses import make_soft_word_loss, make_word_score, word_loss
from jaxkd import distill, models, runs
from jaxkd._files import write_atomically
from jaxkd.data import tokens
from jaxkd.data.bucketing import LengthBuckets
from jaxkd.data.errors import import_or_raise
from jaxkd.distill import TrainedModel
from jaxkd.models import seq2seq
from jaxkd.weights import load_safetensors, save_safetensors

DISTILLED = ("word_level", "sequence_level")
"""Students that have a teacher."""
WITH_ATTENTION = ("attention", *DISTILLED)
"""Students with attention."""
STUDENTS = ("no_attention", *WITH_ATTENTION)
TEACHER_HEADS = 4
"""Number of attention heads of the teacher."""
TOKENIZER_FILE = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Config(translation_data.Options):
    """Options of the experiment."""

    only: tuple[str, ...] = ()
    """Names of the students to train: no_attention, attention, word_level, sequence_level. By
    default all of them. The teacher is trained only if one of the last two is."""
    max_students: int = 1
    """Translators train one after another."""
    epochs: int = 2
    """Passes of each student over the pairs."""
    batch_size: int = 32
    """Number of pairs in a training step."""
    learning_rate: float = 1.2e-2
    """Initial learning rate of Adam for the students. It falls to 0 along a cosine."""
    clip: float = 0.3
    """Norm to which the students' gradients are clipped. Recurrent networks need it."""
    hidden: int = 64
    """Width of the students' states and embeddings, an even number."""
    score: Literal["dot", "general", "additive"] = "dot"
    """Score of the students' states against the encoder's. With general, one seed in three ended 10
    BLEU below the others."""
    dropout: float = 0.1
    """Fraction of embeddings and last states that training drops."""
    teacher_forcing: float = 1.0
    """Probability with which a student in training reads the true word, not its own."""
    teacher_epochs: int = 3
    """Passes of the teacher over the pairs."""
    teacher_learning_rate: float = 3e-3
    """Highest learning rate of Adam for the teacher. It rises in a warm-up and falls to 0 along a
    cosine."""
    teacher_hidden: int = 128
    """Width of the teacher's states, a multiple of its 4 heads."""
    teacher_layers: int = 2
    """Number of layers of the teacher's encoder, and of its decoder."""
    temperature: float = 1.0
    """Temperature of the soft targets of words, above 0."""
    alpha: float = 0.7
    """Weight of the soft targets of words, from 0 to 1. The true words have the rest."""
    beams: int = 4
    """Number of prefixes that the search keeps when it translates the test sentences."""
    teacher_beams: int = 2
    """Number of prefixes that it keeps when the teacher translates the training sentences."""
    length_penalty: float = 0.6
    """Exponent of the search's length penalty. Larger values favour long sentences, 0 disables
    it."""
    translate: str | None = None
    """A sentence to translate with the best student of a finished run, that of --workdir. Nothing
    is trained."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        super().check()
        cli.select_names(self.only, STUDENTS)
        for name in ("teacher_epochs", "teacher_layers", "beams", "teacher_beams"):
            value = getattr(self, name)
            option = f"--{name.replace('_', '-')}"
            require(value >= 1, f"{option} {value}: needs at least 1")
        require(
            self.hidden >= 2 and self.hidden % 2 == 0,
            f"--hidden {self.hidden}: must be an even number, at least 2",
        )
        require(0 <= self.dropout < 1, f"--dropout {self.dropout}: must be at least 0 and below 1")
        require(self.clip > 0, f"--clip {self.clip}: must be above 0")
        require(
            0 <= self.teacher_forcing <= 1,
            f"--teacher-forcing {self.teacher_forcing}: must be a probability, from 0 to 1",
        )
        require(
            self.teacher_learning_rate > 0,
            f"--teacher-learning-rate {self.teacher_learning_rate}: must be above 0",
        )
        require(
            self.teacher_hidden % TEACHER_HEADS == 0,
            f"--teacher-hidden {self.teacher_hidden}: must be a multiple of {TEACHER_HEADS} heads",
        )
        require(
            self.length_penalty >= 0, f"--length-penalty {self.length_penalty}: needs at least 0"
        )
        require(
            self.max_students <= 1,
            f"--max-students {self.max_students}: translators train one after another",
        )

    @property
    def students(self) -> tuple[str, ...]:
        """Names of the students to train."""
        return cli.select_names(self.only, STUDENTS)

    @property
    def has_teacher(self) -> bool:
        """Returns whether a teacher is trained, because a student needs one."""
        return bool(set(DISTILLED) & set(self.students))


def make_module(name: str, config: Config, vocab_size: int) -> Any:
    """Makes the network of the teacher or of a student, by name."""
    if name == "teacher":
        return models.Transformer(
            vocab_size,
            hidden=config.teacher_hidden,
            heads=TEACHER_HEADS,
            layers=config.teacher_layers,
            intermediate=4 * config.teacher_hidden,
            positions=config.max_length + 1,
            dropout=config.dropout,
        )
    alignments = {
        "dot": seq2seq.DOT,
        "general": seq2seq.GENERAL,
        "additive": seq2seq.additive(config.hidden),
    }
    return seq2seq.Seq2Seq(
        vocab_size,
        embedding=config.hidden,
        hidden=config.hidden,
        alignment=alignments[config.score] if name in WITH_ATTENTION else None,
        teacher_forcing=config.teacher_forcing,
        dropout=config.dropout,
    )


def make_student_tx(config: Config, steps: int) -> optax.GradientTransformation:
    """Makes the students' optimizer: Adam on clipped gradients."""
    adam = optax.adam(optax.cosine_decay_schedule(config.learning_rate, steps))
    return optax.chain(optax.clip_by_global_norm(config.clip), adam)


def make_teacher_tx(config: Config, steps: int) -> optax.GradientTransformation:
    """Makes the teacher's optimizer: Adam with a warm-up, without which it learns less."""
    warm_up_steps = max(1, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.teacher_learning_rate, warm_up_steps, max(steps, warm_up_steps + 1)
    )
    # The b2 of Vaswani et al., Attention Is All You Need.
    return optax.adam(schedule, b2=0.98)


def train(
    run: runs.Run, config: Config, data: TranslationData, plan: plans.Plan, **kwargs: Any
) -> dict[str, list[TrainedModel]]:
    """Runs a plan of translators. Further arguments are those of `distill.run_plan`."""
    return distill.run_plan(
        plan,
        run=run,
        validation={"inputs": data.validation},
        make_score=functools.partial(make_word_score, buckets=data.buckets),
        buckets=data.buckets,
        **plans.run_options(config, plan) | kwargs,
    )


def train_teacher(
    run: runs.Run, config: Config, data: TranslationData
) -> tuple[TrainedModel, np.ndarray | None]:
    """Trains the teacher, once for all seeds.

    Returns:
        The teacher, and the training pairs with its translations if a student learns from them.
    """
    module = make_module("teacher", config, data.tokenizer.get_vocab_size())
    steps = num_steps(config, len(data.train), epochs=config.teacher_epochs)
    stage = plans.make_stage(
        "teacher",
        make_model(module, config),
        {"inputs": data.train},
        word_loss,
        config,
        steps=steps,
        tx=make_teacher_tx(config, steps),
    )
    (teacher,) = train(run, config, data, [stage], seeds=[config.seed])["teacher"]
    if "sequence_level" not in config.students:
        return teacher, None
    beams = config.teacher_beams
    translate = make_translate(module, config, data.buckets, beams=beams)
    return teacher, search.translate_train_pairs(
        run, data, teacher.variables, translate, beams=beams
    )


def make_plan(
    config: Config,
    data: TranslationData,
    teacher: TrainedModel | None,
    teacher_pairs: np.ndarray | None,
) -> plans.Plan:
    """Makes the stages of the students.

    Args:
        config: The options.
        data: The pairs.
        teacher: The trained teacher, if a student needs it.
        teacher_pairs: The training pairs with its translations, if a student learns from them.
    """
    vocab_size = data.tokenizer.get_vocab_size()
    plain = make_model(make_module("no_attention", config, vocab_size), config)
    # One model for all stages with attention, so that they share its compiled programs.
    aligned = make_model(make_module("attention", config, vocab_size), config)
    steps = num_steps(config, len(data.train))
    tx = make_student_tx(config, steps)
    stage = functools.partial(plans.make_stage, options=config, steps=steps, tx=tx)
    pairs = {"inputs": data.train}
    soft_word_loss = make_soft_word_loss(temperature=config.temperature, alpha=config.alpha)
    stages = [
        stage("no_attention", plain, pairs, word_loss),
        stage("attention", aligned, pairs, word_loss),
        stage("word_level", aligned, pairs, soft_word_loss, teachers=("teacher",)),
    ]
    if teacher_pairs is not None:
        stages.append(stage("sequence_level", aligned, {"inputs": teacher_pairs}, word_loss))
    plan = [stage for stage in stages if stage.name in config.students]
    if teacher is None:
        return plan
    teacher_model = make_model(make_module("teacher", config, vocab_size), config)
    return [distill.Pretrained("teacher", teacher_model, teacher.variables), *plan]


def make_translate(
    module: Any, config: Config, buckets: LengthBuckets, *, beams: int
) -> search.TranslateFn:
    """Makes the function that translates with a network, by the options' beam search."""
    return search.make_translate(
        module,
        buckets,
        beams=beams,
        max_length=config.max_length,
        length_penalty=config.length_penalty,
    )


def save_results(
    run: runs.Run,
    config: Config,
    data: TranslationData,
    trained: Mapping[str, Sequence[TrainedModel]],
) -> None:
    """Translates the test set; saves results, report, figures and the best student."""
    vocab_size = data.tokenizer.get_vocab_size()
    rows: list[runs.ResultRow] = []
    translations: dict[str, list[list[str]]] = {}
    for name, seeds in trained.items():
        module = make_module(name, config, vocab_size)
        translate = make_translate(module, config, data.buckets, beams=config.beams)
        row, translations[name] = search.measure(name, seeds, translate, data)
        rows.append(row)
    if not distill.is_primary_process():
        return
    folder = run.folder
    best, seed = distill.find_best(trained, export_candidates(config.students))
    variables = trained[best][seed].variables
    if best in WITH_ATTENTION:
        model = make_model(make_module(best, config, vocab_size), config)
        alignments = search.compute_alignments(model, variables, data, translations[best][seed])
        translation_report.plot_alignments(alignments, folder / "alignments.png")
    save_safetensors(folder / "student.safetensors", variables)
    write_atomically(folder / TOKENIZER_FILE, data.tokenizer.to_str().encode())
    translation_report.write_translations(
        folder / "translations.tsv", data.pairs.test, translations
    )
    run.write_results(rows)
    translation_report.write_report(run, rows)
    translation_report.print_summary(rows)
    print(f"Exported the best student by validation accuracy, {best}.")
    print(f"Everything is in {folder}: start with report.md")


def export_candidates(students: Sequence[str]) -> list[str]:
    """Returns the students of which the best is exported.

    They have one architecture, so that `--translate` knows it from the options: with attention, if
    there are such students.
    """
    return [name for name in students if name in WITH_ATTENTION] or list(students)


def translate_sentence(config: Config, sentence: str) -> str:
    """Translates a sentence with the student that a run exported.

    Raises:
        OptionError: If there is no finished run in the folder.
    """
    # By default, the folder is named after the options without the sentence.
    options_of_run = dataclasses.replace(config, translate=None)
    folder = plans.choose_folder("translation", options_of_run, config.data_name)
    for name in ("student.safetensors", TOKENIZER_FILE, "config.json"):
        if not (folder / name).is_file():
            raise OptionError(
                f"{folder / name} does not exist: run the experiment to its end first, or name its "
                "--workdir"
            )
    # The options of the run, not those of this command, describe the student.
    run = runs.read_run(folder)
    if run.is_growing:
        raise OptionError(
            f"the student in {folder} is older than the options of its run, which is growing: run "
            "the experiment to its end first"
        )
    names = {field.name for field in dataclasses.fields(Config)}
    config = Config(**{name: value for name, value in run.config.items() if name in names})
    tokenizer = tokens.load_tokenizer(folder / TOKENIZER_FILE)
    student = export_candidates(config.students)[0]
    module = make_module(student, config, tokenizer.get_vocab_size())
    variables = jax.tree.map(jnp.asarray, load_safetensors(folder / "student.safetensors"))
    sources = translation_data.encode_sentences(
        tokenizer, [sentence], ["--translate"], max_length=config.max_length
    )
    buckets = LengthBuckets((config.max_length,))
    translate = make_translate(module, config, buckets, beams=config.beams)
    return tokens.decode(tokenizer, translate(variables, sources))[0]


def main(config: Config) -> None:
    """Trains the translators, compares their translations and writes the report."""
    config.check()
    if config.translate is not None:
        print(translate_sentence(config, config.translate))
        return
    # The scores need it: fail now, not after the training.
    import_or_raise("sacrebleu")
    data = translation_data.encode(config, translation_data.load(config))
    arrays = [data.train, data.validation, data.sources]
    run = plans.open_run("translation", config, config.data_name, arrays)
    teacher = teacher_pairs = None
    if config.has_teacher:
        teacher, teacher_pairs = train_teacher(run, config, data)
    trained = train(run, config, data, make_plan(config, data, teacher, teacher_pairs))
    if teacher is not None:
        # In place of the plan's pretrained teacher, which has no training time.
        trained = trained | {"teacher": [teacher]}
    save_results(run, config, data, trained)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
