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

Result: BLEU of the teacher 22.3, without attention 11.1, with it 20.0, taught by words 20.0, by sequences 17.5
(Multi30k English to German, 16,000 pairs, 3 seeds)

Time: 9 minutes on 2 CPU cores
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments import cli, plans
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
    report,
    runs,
)
from jaxkd.data import text, tokens
from jaxkd.data.errors import require as require_package
from jaxkd.data.progress import track
from jaxkd.models import Outputs, seq2seq
from jaxkd.train import Batch

WIDTHS = {"count": 3, "multiple": 4}
"""Widths to which batches are cut; each is compiled."""
LENGTHS = (8, 10, 12, 15)
"""Words of a source sentence at which the groups end by whose quality is shown."""
DRAWN = 4
"""Sentences whose alignments are drawn."""
STUDENTS = ("attention", "word_level", "sequence_level")
"""Those of one architecture, of which the best is left behind."""
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
    return seq2seq.Seq2Seq(
        vocab_size,
        embedding=config.hidden,
        hidden=config.hidden,
        alignment=seq2seq.GENERAL if attention else None,
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
    """Trains teacher and students; returns what they left, and their modules."""
    size = prepared.tokenizer.get_vocab_size()
    plain, aligned, large = (
        student_module(config, size, attention=False),
        student_module(config, size),
        teacher_module(config, size),
    )
    small, student, teacher = (plans.model(module, config) for module in (plain, aligned, large))
    pairs = {"inputs": prepared.train}
    given: dict[str, Any] = {
        "validation": {"inputs": prepared.validation},
        "widths": prepared.widths,
        "make_score": make_score(prepared.widths),
    }
    steps = functools.partial(plans.steps, config, len(prepared.train))
    longer = steps(epochs=config.teacher_epochs)
    tx = warmed_up(config.teacher_learning_rate, longer)
    alone = plans.stage("teacher", teacher, pairs, from_words, config, steps=longer, tx=tx)
    trained = plans.train(run, config, (alone,), seeds=[config.seed], **given)
    (taught,) = trained["teacher"]
    theirs = {"inputs": teachers_translations(run, config, prepared, taught, large)}
    more: dict[str, Any] = {"options": config, "steps": steps(), "tx": clipped(config, steps())}
    plan = (
        distill.Pretrained("teacher", teacher, taught.variables),
        plans.stage("no_attention", small, pairs, from_words, **more),
        plans.stage("attention", student, pairs, from_words, **more),
        plans.stage("word_level", student, pairs, from_soft_words(config), teachers=("teacher",), **more),
        plans.stage("sequence_level", student, theirs, from_words, **more),
    )
    trained = plans.train(run, config, plan, **given) | trained
    modules = {"teacher": large, "no_attention": plain}
    return trained, modules | dict.fromkeys(STUDENTS, aligned)


def measure(
    name: str, trained: Sequence[distill.Trained], module: Any, config: Config, prepared: Prepared
) -> tuple[dict[str, Any], list[list[str]]]:
    """A row of results, and the translations of the test set, seed by seed."""
    sacrebleu = require_package("sacrebleu")
    pairs = prepared.texts.test
    translate = make_translate(module, config, prepared.widths, beams=config.beams)
    written = [tokens.decode(prepared.tokenizer, translate(one.variables, prepared.sources)) for one in trained]
    references = [list(pairs.targets)]
    groups = by_length(pairs.sources)
    bleu = [sacrebleu.corpus_bleu(one, references).score for one in written]
    row = {
        "name": name,
        "bleu": bleu,
        "chrf": [sacrebleu.corpus_chrf(one, references).score for one in written],
        "bleu_by_length": [[bleu_of(sacrebleu, one, references[0], rows) for rows in groups] for one in written],
        "parameters": evaluate.parameter_count(trained[0].variables),
        "bytes": evaluate.parameter_bytes(trained[0].variables),
        "latency_ms": latency(translate, trained[0].variables, prepared.sources),
        "seconds": [one.seconds for one in trained],
    }
    return row, written


def bleu_of(sacrebleu: Any, written: Sequence[str], references: Sequence[str], rows: np.ndarray) -> float | None:
    """BLEU of some of the sentences."""
    if not len(rows):
        return None
    return sacrebleu.corpus_bleu([written[i] for i in rows], [[references[i] for i in rows]]).score


def by_length(sources: Sequence[str]) -> list[np.ndarray]:
    """The numbers of the sentences of each group of lengths in words."""
    words = np.array([len(one.split()) for one in sources])
    ends = [0, *LENGTHS, np.inf]
    return [np.flatnonzero((words > low) & (words <= high)) for low, high in zip(ends, ends[1:], strict=False)]


def latency(translate: Callable[..., np.ndarray], variables: dict, sources: np.ndarray, repeats: int = 5) -> float:
    """Milliseconds that a sentence takes, in a full batch of the middle lengths."""
    middle = sources[np.argsort(buckets.token_lengths(sources))][len(sources) // 2 :][:128]
    times = evaluate.time_calls(lambda: translate(variables, middle), repeats=repeats)
    return float(np.median(times)) / len(middle)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of results in Markdown."""
    headers = ["name", "BLEU", "chrF", "BLEU, % of the teacher's", "parameters", "size", "ms a sentence", "training s"]
    teacher = np.mean(rows[0]["bleu"])
    cells = [
        [
            row["name"],
            plans.with_spread(row["bleu"]),
            plans.with_spread(row["chrf"]),
            plans.with_spread(100 * np.array(row["bleu"]) / teacher) if teacher else "",
            f"{row['parameters']:,}",
            f"{row['bytes'] / 1e6:.1f} MB",
            f"{row['latency_ms']:.1f}",
            f"{np.mean(row['seconds']):,.0f}",
        ]
        for row in rows
    ]
    return report.markdown_table(headers, cells)


def sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the comparisons say."""
    found = {row["name"]: row for row in rows}
    told = []
    for name, other in (("attention", "no_attention"), ("word_level", "attention"), ("sequence_level", "attention")):
        difference = np.array(found[name]["bleu"]) - np.array(found[other]["bleu"])
        told.append(f"{name} is {plans.with_spread(difference)} BLEU above {other}")
    aligned, blind = (np.array(found[name]["bleu_by_length"], float) for name in ("attention", "no_attention"))
    gaps = [
        f"{group} words {plans.with_spread(gap)}" for group, gap in zip(group_names(), (aligned - blind).T, strict=True)
    ]
    told.append(f"attention above no_attention by length of the source: {', '.join(gaps)}")
    means = zip(group_names(), blind.mean(0), aligned.mean(0), strict=True)
    shares = [f"{group} words {100 * low / high:.0f} %" for group, low, high in means if high > 0]
    return [*told, f"no_attention reaches this share of attention's BLEU: {', '.join(shares)}"]


def group_names() -> list[str]:
    """What the groups of lengths are called."""
    starts = [1, *(end + 1 for end in LENGTHS)]
    return [f"{low}–{high}" for low, high in zip(starts, LENGTHS, strict=False)] + [f"{starts[-1]}+"]


def plot_lengths(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws quality against the length of the source."""
    with figures.draw(path, 6.4, 4.0) as figure:
        axes = figure.add_subplot()
        for i, row in enumerate(rows):
            values = np.array(row["bleu_by_length"], float)
            spread = values.std(0, ddof=1) if len(values) > 1 else None
            axes.errorbar(
                range(values.shape[1]), values.mean(0), spread, capsize=3, color=figures.COLOURS[i], label=row["name"]
            )
        axes.set_xticks(range(len(LENGTHS) + 1), group_names())
        axes.set(xlabel="words of the source", ylabel="BLEU")
        axes.legend()


def plot_alignments(
    config: Config, prepared: Prepared, module: Any, variables: dict, written: Sequence[str], path: Path
) -> None:
    """Draws which words of the source a translator looks at as it writes each word of its translation."""
    chosen = drawn(prepared.texts.test.sources)
    with figures.draw(path, 11, 9) as figure:
        for place, i in enumerate(chosen):
            source = prepared.texts.test.sources[i]
            pairs = text.Pairs((source,), (written[i] or "?",), (prepared.texts.test.places[i],))
            both = together(prepared.tokenizer, pairs, config.max_length)
            if not len(both):
                continue
            outputs, _ = plans.model(module, config).apply(variables, both, train=False)
            names = [[shown(prepared.tokenizer, number) for number in row[row != 0]] for row in both[0]]
            weights = np.asarray(outputs.features["alignment"])[0, : len(names[1]) - 1, : len(names[0])]
            axes = figure.add_subplot(2, 2, place + 1)
            axes.imshow(weights, cmap="Greys", vmin=0, vmax=1, aspect="auto")
            axes.grid(visible=False)
            axes.set_xticks(range(len(names[0])), names[0], rotation=90)
            axes.set_yticks(range(len(names[1]) - 1), names[1][1:])


def drawn(sources: Sequence[str]) -> list[int]:
    """The sentences whose alignments are drawn: the first ones of 8 to 14 words."""
    return [i for i, source in enumerate(sources) if 8 <= len(source.split()) <= 14][:DRAWN]


def shown(tokenizer: Any, number: int) -> str:
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
    best, seed = plans.best(trained, STUDENTS)
    winner = trained[best][seed]
    run.write_results(rows)
    plot_lengths(rows, run.folder / "lengths.png")
    figures.plot_curves(run.metrics(), run.folder / "curves.png", names=list(modules))
    plot_alignments(
        config, prepared, modules[best], winner.variables, written[best][seed], run.folder / "alignments.png"
    )
    export.save_safetensors(run.folder / "student.safetensors", winner.variables)
    checkpoints.write_atomically(run.folder / TOKENIZER, prepared.tokenizer.to_str().encode())
    write_translations(run.folder / "translations.tsv", prepared, written)
    write_report(run, rows)
    print(table(rows), *sentences(rows), sep="\n")
    print(f"The best student by validation is {best}. Everything is in {run.folder}: begin with report.md")


def write_translations(path: Path, prepared: Prepared, written: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Writes sources, references and the first seed's translations beside each other."""
    columns = [prepared.texts.test.sources, prepared.texts.test.targets, *(each[0] for each in written.values())]
    lines = ["\t".join(["source", "reference", *written]), *("\t".join(row) for row in zip(*columns, strict=True))]
    checkpoints.write_atomically(path, ("\n".join(lines) + "\n").encode())


def write_report(run: runs.Run, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes report.md."""
    settings = [[str(name), str(value)] for name, value in (run.config | run.environment).items()]
    parts = [
        "# Translation",
        table(rows),
        "± is the standard deviation over seeds; BLEU and chrF are sacrebleu's on the test set.",
        "\n".join(f"- {one}" for one in sentences(rows)),
        "![BLEU against the length of the source](lengths.png)",
        "![What the student looks at as it writes](alignments.png)",
        "![Validation loss and accuracy of words in training](curves.png)",
        "## Settings and environment",
        report.markdown_table(["item", "value"], settings),
    ]
    checkpoints.write_atomically(run.folder / "report.md", ("\n\n".join(parts) + "\n").encode())


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
    module = student_module(past, tokenizer.get_vocab_size())
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
