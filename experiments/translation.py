"""What does attention buy a translator, and what does a larger one teach it?

Recurrent encoder-decoders learn to translate from pairs of sentences alone, one without attention, which has to put a
whole sentence into one state and reads that at every step, and one that aligns its states with the encoder's. A
Transformer, which learns once for all seeds, then teaches the second one: word by word, by its soft targets for the
true translations; and by sequences, which are its own translations of the training sentences, found by beam search. All
students take as many steps.

Paper: Luong et al., Effective Approaches to Attention-based Neural Machine Translation,
https://arxiv.org/abs/1508.04025; Kim and Rush, Sequence-Level Knowledge Distillation, https://arxiv.org/abs/1606.07947

Command: python -m experiments.translation --dataset FOLDER

On an accelerator, in full size: --pairs None --vocab-size 8000 --batch-size 128 --hidden 512 --dropout 0.3 --epochs 12
--learning-rate 1e-3 --clip 1 --teacher-hidden 512 --teacher-layers 4 --teacher-epochs 30 --teacher-learning-rate 7e-4
--teacher-beams 5 --beams 5

What attention buys at each length, in longer training: --only no_attention attention --pairs None --hidden 96
--batch-size 64 --epochs 5 --learning-rate 8e-3

Result: BLEU of the teacher 22.3, without attention 11.1, with it 22.5, taught by words 21.1, by sequences 20.2
(Multi30k English to German, 16,000 pairs, 3 seeds); in longer training 18.8 and 30.9, 10 more up to 8 words and 15 more
above 15

Time: 9 minutes on 2 CPU cores, either way
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments import cli, plans, translation_report
from experiments.cli import OptionError, require
from jaxkd import (
    buckets,
    checkpoints,
    decode,
    distill,
    evaluate,
    export,
    figures,
    losses,
    models,
    parallel,
    runs,
)
from jaxkd.data import text, tokens
from jaxkd.data.errors import require as require_package
from jaxkd.data.progress import track
from jaxkd.models import Outputs, seq2seq
from jaxkd.train import Batch

WIDTHS = {"count": 3, "multiple": 4}
"""Widths to which batches are cut; each is compiled."""
TAUGHT = ("word_level", "sequence_level")
"""Students that have a teacher."""
ALIGNED = ("attention", *TAUGHT)
"""Students with attention."""
STUDENTS = ("no_attention", *ALIGNED)
HEADS, TOKENIZER = 4, "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Config(plans.SoftOptions):
    """Options of the experiment."""

    dataset: str = "multi30k"
    """A folder with train.en and train.de, one sentence a line, likewise test and maybe val; also .gz."""
    source: str = "en"
    """Ending of the files to translate from; or a file, if --target is one too."""
    target: str = "de"
    """Ending of the files to translate to; or a file."""
    only: tuple[str, ...] = ()
    """Names of the students to train, of no_attention, attention, word_level and sequence_level; all, if none is given.
    The last two have the teacher, which is not trained without them."""
    pairs: int | None = 16_000
    """How many of the training pairs to learn from, the first ones; None: all."""
    max_length: int = 60
    """Tokens of the longest sentence to learn from and to write; longer training pairs are left out."""
    vocab_size: int = 2000
    """Tokens of the vocabulary, which both languages share; it is made from the training sentences."""
    epochs: int = 2
    """Passes of each student over the pairs."""
    batch_size: int = 32
    """Pairs a step."""
    learning_rate: float = 1.2e-2
    """Adam's for the students, at the start; it falls to 0 along a cosine."""
    clip: float = 0.3
    """To which norm the gradients of the students are cut, as recurrent networks need."""
    hidden: int = 64
    """Width of the students' states and embeddings."""
    score: Literal["dot", "general", "additive"] = "dot"
    """How the students' states score the encoder's. Of general one seed in three ended 10 BLEU below the others."""
    dropout: float = 0.1
    """Share of embeddings and last states that training drops."""
    teacher_forcing: float = 1.0
    """Probability with which a student in training reads the true word instead of its own."""
    teacher_epochs: int = 3
    """Passes of the teacher over the pairs."""
    teacher_learning_rate: float = 3e-3
    """Adam's for the teacher, after a warm-up; it falls to 0 along a cosine."""
    teacher_hidden: int = 128
    """Width of the teacher's states."""
    teacher_layers: int = 2
    """Layers of the teacher's encoder, and of its decoder."""
    temperature: float = 1.0
    """Softens the targets of words; above 0."""
    alpha: float = 0.7
    """Weight of the soft targets of words, from 0 to 1; the true words have the rest."""
    beams: int = 4
    """Beginnings of a sentence that the search keeps when it translates what is tested on."""
    teacher_beams: int = 2
    """Beginnings that it keeps when the teacher translates the training sentences."""
    length_penalty: float = 0.6
    """How kind the search is to long sentences; 0 is not."""
    translate: str | None = None
    """A sentence to translate with the best student of a finished run, which --workdir names; nothing is trained."""

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        super().check()
        cli.chosen(self.only, STUDENTS)
        require(self.max_length >= 3, f"--max-length {self.max_length}: at least 3 tokens")
        require(self.pairs is None or self.pairs >= 1, f"--pairs {self.pairs}: at least one")
        require(self.hidden >= 2 and self.hidden % 2 == 0, f"--hidden {self.hidden}: an even number")
        require(0 <= self.dropout < 1, f"--dropout {self.dropout}: from 0 to below 1")
        require(self.clip > 0, f"--clip {self.clip}: must be above 0")
        require(0 <= self.teacher_forcing <= 1, f"--teacher-forcing {self.teacher_forcing}: a probability")
        require(self.teacher_epochs >= 1, f"--teacher-epochs {self.teacher_epochs}: train for at least one")
        require(self.teacher_learning_rate > 0, f"--teacher-learning-rate {self.teacher_learning_rate}: above 0")
        require(
            self.teacher_hidden % HEADS == 0, f"--teacher-hidden {self.teacher_hidden}: a multiple of {HEADS} heads"
        )
        require(self.teacher_layers >= 1, f"--teacher-layers {self.teacher_layers}: at least one")
        require(min(self.beams, self.teacher_beams) >= 1, "--beams and --teacher-beams: at least one")
        require(self.length_penalty >= 0, f"--length-penalty {self.length_penalty}: at least 0")
        require(self.at_once <= 1, "--at-once: translators train one after another")

    @property
    def students(self) -> tuple[str, ...]:
        """Those to train."""
        return cli.chosen(self.only, STUDENTS)


class Prepared(NamedTuple):
    """Pairs as tokens.

    Attributes:
        texts: The pairs.
        tokenizer: Makes tokens of them.
        train: `[N, 2, S]`: source and target.
        validation: Likewise.
        sources: The test set's sources, `[N, S]`.
        widths: To which batches are cut.
    """

    texts: text.PairDataset
    tokenizer: Any
    train: np.ndarray
    validation: np.ndarray
    sources: np.ndarray
    widths: tuple[int, ...]


def load(config: Config) -> text.PairDataset:
    """The pairs that the options name."""
    files = [Path(name).expanduser() for name in (config.source, config.target)]
    if all(path.is_file() for path in files):
        dataset = text.cut_pairs(text.pair_files(*files))
    else:
        dataset = text.load_pairs(config.dataset, source=config.source, target=config.target)
    first = slice(config.pairs)
    return dataset._replace(train=text.Pairs(*(column[first] for column in dataset.train)))


def prepare(config: Config) -> Prepared:
    """Loads pairs, makes the vocabulary, and turns pairs into tokens."""
    dataset = load(config)
    tokenizer = tokens.train_tokenizer([*dataset.train.sources, *dataset.train.targets], vocab_size=config.vocab_size)
    train = together(tokenizer, dataset.train, config.max_length)
    if len(train) < len(dataset.train.sources):
        left_out = len(dataset.train.sources) - len(train)
        print(f"{left_out} training pairs of more than {config.max_length} tokens are left out")
    require(len(train) > 0, f"--max-length {config.max_length}: no training pair is as short")
    validation = together(tokenizer, dataset.validation, config.max_length)
    require(len(validation) > 0, f"--max-length {config.max_length}: no validation pair is as short")
    sources = read(tokenizer, dataset.test.sources, dataset.test.places, config.max_length)
    return Prepared(dataset, tokenizer, train, validation, sources, buckets.bucket_widths(train, **WIDTHS))


def read(tokenizer: Any, sentences: Sequence[str], places: Sequence[str], max_length: int) -> np.ndarray:
    """Sentences as tokens `[N, S]`, cut to `max_length`."""
    rows = tokens.encode(tokenizer, sentences, max_length=max_length, truncate=True, name=places.__getitem__)
    return np.pad(rows, ((0, 0), (0, max_length - rows.shape[1])))


def together(tokenizer: Any, pairs: text.Pairs, max_length: int) -> np.ndarray:
    """Pairs as tokens `[N, 2, S]`, without those that are longer."""
    columns = [
        tokens.encode(tokenizer, sentences, max_length=max_length + 1, truncate=True, name=pairs.places.__getitem__)
        for sentences in (pairs.sources, pairs.targets)
    ]
    padded = [np.pad(rows, ((0, 0), (0, max_length + 1 - rows.shape[1]))) for rows in columns]
    both = np.stack(padded, axis=1)
    return both[buckets.token_lengths(both) <= max_length][..., :max_length]


def labels_of(batch: Batch) -> tuple[Array, Array]:
    """The words to predict, and which of them count."""
    labels = batch["inputs"][:, 1, 1:]
    return labels, labels != 0


def for_each_pair(values: Array, where: Array) -> Array:
    """One value a pair, of whose batch the mean is that over all words that count."""
    return values.sum(-1) * (len(values) / jnp.maximum(where.sum(), 1).astype(values.dtype))


def from_words(student: Outputs, teachers: tuple[Outputs, ...], batch: Batch) -> Array:
    """The loss of a translator that learns from the true words alone."""
    labels, where = labels_of(batch)
    values = losses.hard_cross_entropy(student.logits, labels)
    return for_each_pair(jnp.where(where, values, 0), where)


def from_soft_words(config: Config) -> Callable[[Outputs, tuple[Outputs, ...], Batch], Array]:
    """The loss of one that learns from a teacher's soft targets too."""

    def loss(student: Outputs, teachers: tuple[Outputs, ...], batch: Batch) -> Array:
        labels, where = labels_of(batch)
        values = losses.token_distillation_loss(
            student.logits,
            teachers[0].logits,
            labels,
            where=where,
            temperature=config.temperature,
            alpha=config.alpha,
        )
        return for_each_pair(values, where)

    return loss


def make_score(widths: tuple[int, ...]) -> Callable[[models.Model], Callable[..., evaluate.Score]]:
    """What scores a translator: cross-entropy of the words, and how many of them it gives most probability."""

    def make(model: models.Model) -> Callable[..., evaluate.Score]:
        @jax.jit
        def sums(variables: dict, inputs: Array) -> Array:
            outputs, _ = model.apply(variables, inputs, train=False)
            labels, where = labels_of({"inputs": inputs})
            right = jnp.where(where, outputs.logits.argmax(-1) == labels, False)
            lost = jnp.where(where, losses.hard_cross_entropy(outputs.logits, labels), 0)
            return jnp.stack([lost.sum(), *(one.sum().astype(jnp.float32) for one in (right, where))])

        def score(variables: dict, examples: Mapping[str, Any]) -> evaluate.Score:
            each = [np.asarray(sums(variables, batch)) for _, batch in batches(examples["inputs"], widths)]
            lost, right, count = np.stack(each).astype(np.float64).sum(axis=0).tolist()
            return evaluate.Score(lost / count, right / count)

        return score

    return make


def batches(inputs: np.ndarray, widths: tuple[int, ...], size: int = 128) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Batches of one size and of like length, with their rows; the last one is filled up with padding."""
    for rows, cut in buckets.by_length(inputs, size, widths):
        yield rows, np.pad(cut, [(0, size - len(rows)), *[(0, 0)] * (cut.ndim - 1)])


def student_module(config: Config, vocab_size: int, *, attention: bool = True) -> seq2seq.Seq2Seq:
    """A recurrent translator."""
    scores = {"dot": seq2seq.DOT, "general": seq2seq.GENERAL, "additive": seq2seq.additive(config.hidden)}
    return seq2seq.Seq2Seq(
        vocab_size,
        embedding=config.hidden,
        hidden=config.hidden,
        alignment=scores[config.score] if attention else None,
        teacher_forcing=config.teacher_forcing,
        dropout=config.dropout,
    )


def teacher_module(config: Config, vocab_size: int) -> models.Transformer:
    """The larger translator."""
    return models.Transformer(
        vocab_size,
        hidden=config.teacher_hidden,
        heads=HEADS,
        layers=config.teacher_layers,
        intermediate=4 * config.teacher_hidden,
        positions=config.max_length + 1,
        dropout=config.dropout,
    )


def warmed_up(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """The Transformer's optimizer, with Vaswani et al.'s second moment: without a warm-up it learns less."""
    rising = max(1, steps // 10)
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, learning_rate, rising, max(steps, rising + 1)), b2=0.98)


def clipped(config: Config, steps: int) -> optax.GradientTransformation:
    """The students' optimizer."""
    adam = optax.adam(optax.cosine_decay_schedule(config.learning_rate, steps))
    return optax.chain(optax.clip_by_global_norm(config.clip), adam)


def make_translate(module: Any, config: Config, widths: tuple[int, ...], *, beams: int) -> Callable[..., np.ndarray]:
    """Makes the function that translates sources `[N, S]` into tokens `[N, max_length]`, by beam search.

    Args:
        module: The translator.
        config: The options.
        widths: To which the sources are cut.
        beams: How many beginnings are kept.
    """
    decoder = seq2seq.make_decoder(module)

    @jax.jit
    def search(variables: dict, sources: Array) -> Array:
        state = decoder.begin(variables, sources, config.max_length)
        found = decode.beam_search(
            functools.partial(decoder.step, variables),
            state,
            beams=beams,
            max_length=config.max_length,
            length_penalty=config.length_penalty,
        )
        return found.tokens[:, 0]

    def translate(variables: dict, sources: np.ndarray, told: str = "translating") -> np.ndarray:
        found = np.zeros((len(sources), config.max_length), np.int32)
        parts = list(batches(sources, widths))
        for rows, batch in track(parts, description=told, total=len(parts)):
            found[rows] = np.asarray(search(variables, batch))[: len(rows)]
        return found

    return translate


def teachers_translations(
    run: runs.Run, config: Config, prepared: Prepared, teacher: distill.Trained, module: Any
) -> np.ndarray:
    """The training pairs `[N, 2, S]` with the teacher's translations, from the run's folder if they are there."""
    told = {"weights": runs.fingerprint(jax.tree.leaves(jax.device_get(teacher.variables)))}
    told |= {"sources": runs.fingerprint([prepared.train]), "beams": config.teacher_beams}
    kept = checkpoints.load(run.folder / "translations")
    if kept is not None and kept.notes == told:
        return kept.tree["pairs"]
    translate = make_translate(module, config, prepared.widths, beams=config.teacher_beams)
    found = translate(teacher.variables, prepared.train[:, 0], "the teacher translates")
    begun = np.pad(found, ((0, 0), (1, 0)), constant_values=prepared.train[0, 1, 0])[:, : config.max_length]
    pairs = np.stack([prepared.train[:, 0], begun], axis=1)
    if parallel.is_first_host():
        checkpoints.save(run.folder / "translations", 0, {"pairs": pairs}, notes=told)
    return pairs


def train_all(run: runs.Run, config: Config, prepared: Prepared) -> tuple[dict[str, list[distill.Trained]], dict]:
    """Trains the students, and before them a teacher if they need one; returns what they left, and their modules."""
    size = prepared.tokenizer.get_vocab_size()
    plain, aligned = student_module(config, size, attention=False), student_module(config, size)
    small, student = plans.model(plain, config), plans.model(aligned, config)
    modules = {"no_attention": plain} | dict.fromkeys(ALIGNED, aligned)
    steps, pairs = plans.steps(config, len(prepared.train)), {"inputs": prepared.train}
    stage = functools.partial(plans.stage, options=config, steps=steps, tx=clipped(config, steps))
    plan: list[distill.Stage | distill.Pretrained] = [
        stage("no_attention", small, pairs, from_words),
        stage("attention", student, pairs, from_words),
    ]
    trained: dict[str, list[distill.Trained]] = {}
    if {*TAUGHT} & {*config.students}:
        large = teacher_module(config, size)
        teacher, taught = train_teacher(run, config, prepared, large)
        plan += [teacher, stage("word_level", student, pairs, from_soft_words(config), teachers=("teacher",))]
        trained["teacher"], modules = [taught], {"teacher": large} | modules
        if "sequence_level" in config.students:
            theirs = {"inputs": teachers_translations(run, config, prepared, taught, large)}
            plan.append(stage("sequence_level", student, theirs, from_words))
    plan = [one for one in plan if one.name in ("teacher", *config.students)]
    trained = plans.train(run, config, plan, **evaluated(prepared)) | trained
    return trained, {name: module for name, module in modules.items() if name in trained}


def train_teacher(
    run: runs.Run, config: Config, prepared: Prepared, module: Any
) -> tuple[distill.Pretrained, distill.Trained]:
    """Trains the teacher, once for all seeds."""
    model, steps = plans.model(module, config), plans.steps(config, len(prepared.train), epochs=config.teacher_epochs)
    tx, pairs = warmed_up(config.teacher_learning_rate, steps), {"inputs": prepared.train}
    stage = plans.stage("teacher", model, pairs, from_words, config, steps=steps, tx=tx)
    (taught,) = plans.train(run, config, (stage,), seeds=[config.seed], **evaluated(prepared))["teacher"]
    return distill.Pretrained("teacher", model, taught.variables), taught


def evaluated(prepared: Prepared) -> dict[str, Any]:
    """How a plan meets the validation split."""
    given = {"validation": {"inputs": prepared.validation}, "make_score": make_score(prepared.widths)}
    return given | {"widths": prepared.widths}


def measure(
    name: str, trained: Sequence[distill.Trained], module: Any, config: Config, prepared: Prepared
) -> tuple[dict[str, Any], list[list[str]]]:
    """A row of results, and the translations of the test set, seed by seed."""
    translate = make_translate(module, config, prepared.widths, beams=config.beams)
    written = [tokens.decode(prepared.tokenizer, translate(one.variables, prepared.sources)) for one in trained]
    row = {
        "name": name,
        **translation_report.scores(written, prepared.texts.test),
        "parameters": evaluate.parameter_count(trained[0].variables),
        "bytes": evaluate.parameter_bytes(trained[0].variables),
        "latency_ms": latency(translate, trained[0].variables, prepared.sources),
        "seconds": [one.seconds for one in trained],
    }
    return row, written


def latency(translate: Callable[..., np.ndarray], variables: dict, sources: np.ndarray, repeats: int = 5) -> float:
    """Milliseconds that a sentence takes, in a full batch of the middle lengths."""
    middle = sources[np.argsort(buckets.token_lengths(sources))][len(sources) // 2 :][:128]
    times = evaluate.time_calls(lambda: translate(variables, middle), repeats=repeats)
    return float(np.median(times)) / len(middle)


def alignments(
    config: Config, prepared: Prepared, module: Any, variables: dict, written: Sequence[str]
) -> list[translation_report.Alignment]:
    """What a student looks at as it writes its translations of some sentences of the test set."""
    test, apply, found = prepared.texts.test, plans.model(module, config).apply, []
    for i in translation_report.drawn(test.sources):
        pairs = text.Pairs((test.sources[i],), (written[i] or "?",), (test.places[i],))
        both = together(prepared.tokenizer, pairs, config.max_length)
        if len(both):
            outputs, _ = apply(variables, both, train=False)
            source, target = ([shown(prepared.tokenizer, number) for number in row[row != 0]] for row in both[0])
            weights = np.asarray(outputs.features["alignment"])[0, : len(target) - 1, : len(source)]
            found.append(translation_report.Alignment(weights, target[1:], source))
    return found


def shown(tokenizer: Any, number: np.integer) -> str:
    """A token as a person reads it."""
    return tokenizer.decode([int(number)]).strip() or tokenizer.id_to_token(int(number))


def leave(
    run: runs.Run, config: Config, prepared: Prepared, trained: Mapping[str, Sequence[distill.Trained]], modules: dict
) -> None:
    """Leaves results, report, figures, translations and the best student."""
    rows, written = [], {}
    for name, module in modules.items():
        row, written[name] = measure(name, trained[name], module, config, prepared)
        rows.append(row)
    if not parallel.is_first_host():
        return
    best, seed = plans.best(trained, candidates(config.students))
    variables = trained[best][seed].variables
    run.write_results(rows)
    translation_report.plot_lengths(rows, run.folder / "lengths.png")
    figures.plot_curves(run.metrics(), run.folder / "curves.png", names=list(modules))
    if best in ALIGNED:
        maps = alignments(config, prepared, modules[best], variables, written[best][seed])
        translation_report.plot_alignments(maps, run.folder / "alignments.png")
    export.save_safetensors(run.folder / "student.safetensors", variables)
    checkpoints.write_atomically(run.folder / TOKENIZER, prepared.tokenizer.to_str().encode())
    translation_report.write_translations(run.folder / "translations.tsv", prepared.texts.test, written)
    translation_report.write_report(run, rows)
    print(translation_report.table(rows), *translation_report.sentences(rows), sep="\n")
    print(f"The best student by validation is {best}. Everything is in {run.folder}: begin with report.md")


def candidates(students: Sequence[str]) -> list[str]:
    """Those of which the best is left behind: of one architecture, with attention if there are any."""
    return [name for name in students if name in ALIGNED] or [*students]


def translate_one(config: Config) -> str:
    """Translates one sentence with the student that a run left."""
    folder = plans.workdir("translation", dataclasses.replace(config, translate=None), config.dataset)
    files = [folder / name for name in ("student.safetensors", TOKENIZER, "config.json")]
    for path in files:
        if not path.is_file():
            raise OptionError(f"{path} is not there: run the experiment to its end first, or name its --workdir")
    kept = runs.read_run(folder).config
    settings = {field.name: kept[field.name] for field in dataclasses.fields(Config) if field.name in kept}
    past, tokenizer = Config(**settings), tokens.load_tokenizer(files[1])
    variables = jax.tree.map(jnp.asarray, export.load_safetensors(files[0]))
    source = read(tokenizer, [config.translate or ""], ["--translate"], past.max_length)
    attention = candidates(past.students)[0] in ALIGNED
    module = student_module(past, tokenizer.get_vocab_size(), attention=attention)
    translate = make_translate(module, past, (past.max_length,), beams=past.beams)
    return tokens.decode(tokenizer, translate(variables, source))[0]


def main(config: Config) -> None:
    """Trains, translates, compares and reports."""
    config.check()
    if config.translate is not None:
        print(translate_one(config))
        return
    require_package("sacrebleu")
    prepared = prepare(config)
    arrays = [prepared.train, prepared.validation, prepared.sources]
    run = plans.open_run("translation", config, config.dataset, arrays)
    trained, modules = train_all(run, config, prepared)
    leave(run, config, prepared, trained, modules)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
