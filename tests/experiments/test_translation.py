"""Tests of the experiment on translation, on pairs of sentences in a made-up language."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import translation
from experiments.common import (
    translation_data,
    translation_losses,
    translation_report,
    translation_search,
)
from experiments.common.cli import OptionError
from jaxkd import models, runs
from jaxkd.data.bucketing import LengthBuckets
from jaxkd.distill import LossContext
from jaxkd.runs import ResultRow, checkpoints, growth

pytestmark = pytest.mark.thorough  # trains networks, in processes of their own

WORDS = {
    "a": "ein",
    "man": "mann",
    "dog": "hund",
    "runs": "rennt",
    "sees": "sieht",
    "big": "gross",
    "and": "und",
}
CONTEXT = LossContext(jnp.zeros((), jnp.int32), None, jax.random.key(0), None, None)
"""The context of a loss without parameters."""
SMALL = {
    "num_seeds": 2,
    "epochs": 2,
    "teacher_epochs": 2,
    "hidden": 8,
    "teacher_hidden": 8,
    "teacher_layers": 1,
    "vocab_size": 300,
    "max_length": 24,
    "batch_size": 16,
    "beams": 2,
    # A step for the eight virtual devices takes a third longer to compile.
    "parallel": "none",
}


def draw_pair(rng):
    source = rng.choice([*WORDS], rng.integers(2, 9))
    return " ".join(source), " ".join(WORDS[word] for word in source)


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """Promotes dtypes as for users, since optax's Adam is not strict, and uses a single bucket."""
    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(translation_data, "NUM_BUCKETS", 1)
        yield


@pytest.fixture(scope="module")
def languages(tmp_path_factory):
    """A folder with 150 training, 12 validation and 12 test pairs."""
    folder = tmp_path_factory.mktemp("languages")
    rng = np.random.default_rng(0)
    for split, count in (("train", 150), ("val", 12), ("test", 12)):
        pairs = [draw_pair(rng) for _ in range(count)]
        for i, language in enumerate(("en", "de")):
            (folder / f"{split}.{language}").write_text("".join(f"{pair[i]}\n" for pair in pairs))
    return folder


@pytest.fixture(scope="module")
def run(languages, tmp_path_factory):
    """The options and the folder of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    config = translation.Config(dataset=str(languages), workdir=str(folder), **SMALL)
    translation.main(config)
    return config, folder


@pytest.fixture(scope="module")
def encoded(languages):
    """Options and the encoded pairs."""
    config = translation.Config(dataset=str(languages), **SMALL)
    return config, encode(config)


def encode(config):
    return translation_data.encode(config, translation_data.load(config))


def predict_logits(model, variables, inputs):
    return jax.jit(lambda *arguments: model.apply(*arguments, train=False)[0].logits)(
        variables, inputs
    )


def make_student(config, data):
    return translation.make_module("attention", config, data.tokenizer.get_vocab_size())


def test_a_run_leaves_rows_figures_translations_and_the_student(run):
    _, folder = run
    rows = json.loads((folder / "results.json").read_text())
    assert [row["name"] for row in rows] == [
        "teacher",
        "no_attention",
        "attention",
        "word_level",
        "sequence_level",
    ]
    assert [len(row["bleu"]) for row in rows] == [1, 2, 2, 2, 2]
    assert all(
        len(groups) == len(translation_report.GROUP_ENDS) + 1
        for row in rows
        for groups in row["bleu_by_length"]
    )
    for name in (
        "report.md",
        "lengths.png",
        "alignments.png",
        "curves.png",
        "student.safetensors",
        "tokenizer.json",
    ):
        assert (folder / name).stat().st_size > 0
    lines = (folder / "translations.tsv").read_text().splitlines()
    assert len(lines) == 13 and all(line.count("\t") == 6 for line in lines)
    report = (folder / "report.md").read_text()
    assert "| teacher  " in report and "attention above no_attention by length" in report


def test_the_comparisons_describe_the_gain_of_attention_at_each_length():
    bleu_by_length = {
        "attention": [[20.0, 10.0, 8.0, 0.0, 4.0]],
        "no_attention": [[10.0, 4.0, 2.0, 0.0, 1.0]],
    }
    rows = [
        ResultRow(name, extra={"bleu": [9.0], "bleu_by_length": groups})
        for name, groups in bleu_by_length.items()
    ]
    rows += [
        ResultRow(name, extra={"bleu": [8.0], "bleu_by_length": bleu_by_length["attention"]})
        for name in translation.DISTILLED
    ]
    *comparisons, gains, shares = translation_report.describe_comparisons(rows)
    assert comparisons[1] == "word_level is 1.0 BLEU below attention"
    assert gains.endswith(
        "1–8 words 10.0, 9–10 words 6.0, 11–12 words 6.0, 13–15 words 0.0, 16+ words 3.0"
    )
    assert shares.endswith("1–8 words 50 %, 9–10 words 40 %, 11–12 words 25 %, 16+ words 25 %")


def test_the_students_gradients_are_clipped():
    """Compares Adam's moments, because its first update does not depend on the gradient's size."""
    tx = translation.make_student_tx(translation.Config(clip=0.5), 10)
    direction = jnp.array([0.6, 0.8])
    state = tx.init(direction)

    def moments(norm):
        return [np.asarray(leaf) for leaf in jax.tree.leaves(tx.update(norm * direction, state)[1])]

    def are_close(lhs, rhs):
        return all(np.allclose(a, b) for a, b in zip(lhs, rhs, strict=True))

    assert are_close(moments(0.5), moments(5.0))
    assert not are_close(moments(0.25), moments(0.5))


def test_a_second_run_neither_trains_nor_translates_the_training_pairs_again(run, capsys):
    config, folder = run
    before = json.loads((folder / "results.json").read_text())
    modified = (folder / "translations").stat().st_mtime_ns
    translation.main(config)
    after = json.loads((folder / "results.json").read_text())
    assert [row["bleu"] for row in after] == [row["bleu"] for row in before]
    assert (folder / "translations").stat().st_mtime_ns == modified
    assert "steps and" not in capsys.readouterr().out


def test_a_finished_run_translates_a_sentence(run, capsys):
    config, folder = run
    translation.main(dataclasses.replace(config, translate="a man sees a dog"))
    printed = capsys.readouterr().out
    translation.main(translation.Config(workdir=str(folder), translate="a man sees a dog"))
    assert capsys.readouterr().out == printed and len(printed.splitlines()) == 1


def test_a_student_alone_needs_no_teacher_and_translates(languages, tmp_path, capsys):
    options = SMALL | {"only": ("no_attention",), "num_seeds": 1}
    config = translation.Config(dataset=str(languages), workdir=str(tmp_path), **options)
    translation.main(config)
    (row,) = json.loads((tmp_path / "results.json").read_text())
    stages = {record["stage"] for record in runs.read_run(tmp_path).metrics()}
    assert row["name"] == "no_attention" and stages == {row["name"]}
    report = (tmp_path / "report.md").read_text()
    assert "teacher's" not in report and "alignments.png" not in report and "lengths.png" in report
    capsys.readouterr()
    translation.main(dataclasses.replace(config, translate="a man sees a dog"))
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_only_the_named_students_are_trained():
    config = translation.Config(only=("word_level", "no_attention"))
    assert config.students == ("no_attention", "word_level")
    assert translation.export_candidates(config.students) == ["word_level"]
    assert translation.export_candidates(("no_attention",)) == ["no_attention"]
    assert translation.Config().students == translation.STUDENTS


@pytest.mark.parametrize(
    ("score", "expected"), [("dot", None), ("general", {"kernel"}), ("additive", {"encoder"})]
)
def test_students_score_as_the_options_say(score, expected):
    config = translation.Config(hidden=4, score=score)
    module = translation.make_module("attention", config, 10)
    params = module.init(jax.random.key(0), jnp.ones((1, 2, 3), jnp.int32))["params"]
    alignment = params.get("alignment")
    assert alignment is None if expected is None else expected <= set(alignment)


def test_without_a_finished_run_no_sentence_is_translated(tmp_path):
    with pytest.raises(OptionError, match="run the experiment to its end first"):
        translation.main(translation.Config(workdir=str(tmp_path / "none"), translate="a man"))


def test_the_student_of_a_run_that_is_growing_translates_nothing(run, tmp_path):
    folder = shutil.copytree(run[1], tmp_path / "run")
    content = json.loads((folder / "config.json").read_text()) | {"is_growing": True}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(OptionError, match="growing: run the experiment to its end first"):
        translation.main(translation.Config(workdir=str(folder), translate="a man"))


def test_other_options_of_the_search_translate_the_training_pairs_again(encoded, tmp_path):
    _, data = encoded
    calls = []

    def translate(variables, sources):
        calls.append(1)
        return np.zeros_like(sources)

    for length_penalty, seeds in ((0.0, 1), (0.0, 2), (1.0, 2)):
        config = {"length_penalty": length_penalty, "num_seeds": seeds}
        run = runs.open_run(tmp_path, config, grow=True)
        translation_search.translate_train_pairs(run, data, {}, translate, beams=2)
        growth.record_growth(run, trains=True)
    assert len(calls) == 2


def test_the_teacher_trains_once_and_its_translations_teach_sequence_level(run):
    config, folder = run
    trained = {(record["stage"], record["seed"]) for record in runs.read_run(folder).metrics()}
    assert {seed for stage, seed in trained if stage == "teacher"} == {0}
    train = encode(config).train
    saved = checkpoints.load(folder / "translations").tree["pairs"]
    np.testing.assert_array_equal(saved[:, 0], train[:, 0])
    # The targets begin with the start token.
    assert (saved[:, 1, 0] == train[:, 1, 0]).all() and saved.shape == train.shape


def test_pairs_become_tokens_and_longer_ones_are_left_out(encoded, capsys):
    config, data = encoded
    assert data.train.shape[1:] == (2, 24) and data.sources.shape == (12, 24)
    for row, sentence in zip(data.train[:, 1], data.pairs.train.targets, strict=True):
        assert data.tokenizer.decode(row[row != 0].tolist()) == sentence
    short = encode(dataclasses.replace(config, max_length=10))
    lengths = (data.train != 0).sum(-1).max(1)
    assert len(short.train) == (lengths <= 10).sum() < len(data.train)
    assert "are left out" in capsys.readouterr().out
    few = encode(dataclasses.replace(config, pairs=7))
    assert len(few.train) == 7


def test_two_files_replace_a_folder(languages, encoded):
    config, _ = encoded
    files = {
        option: str(languages / f"train.{suffix}")
        for option, suffix in (("source", "en"), ("target", "de"))
    }
    dataset = translation_data.load(dataclasses.replace(config, **files))
    assert [len(split.sources) for split in dataset] == [122, 13, 15]
    with pytest.raises(OptionError, match="one is a file and the other is not; give two files"):
        translation_data.load(dataclasses.replace(config, **files | {"target": "de"}))


def test_the_loss_is_the_mean_over_words_whatever_the_padding(encoded):
    config, data = encoded
    model = models.from_linen(make_student(config, data))
    batch = data.train[:6]
    variables = model.init(jax.random.key(0), batch)

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params, inputs):
        outputs, _ = model.apply({"params": params}, inputs, train=False)
        return translation_losses.word_loss(outputs, (), {"inputs": inputs}, CONTEXT).mean()

    padded = jnp.pad(jnp.asarray(batch), ((0, 0), (0, 0), (0, 5)))
    value, gradients = mean_loss(variables["params"], batch)
    padded_value, padded_gradients = mean_loss(variables["params"], padded)
    np.testing.assert_allclose(value, padded_value, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradients, padded_gradients
    )
    logits = predict_logits(model, variables, batch)
    labels = batch[:, 1, 1:]
    cross_entropies = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), labels[..., None], -1
    )[..., 0]
    np.testing.assert_allclose(value, cross_entropies[labels != 0].mean(), rtol=1e-5)


def test_soft_words_of_the_teacher_itself_at_alpha_1_leave_no_gradient(encoded):
    config, data = encoded
    logits = jax.random.normal(jax.random.key(0), (3, 23, 300))
    teacher = models.Outputs(logits, {})
    loss = translation_losses.make_soft_word_loss(temperature=config.temperature, alpha=1.0)

    def mean_loss(logits):
        student = models.Outputs(logits, {})
        return loss(student, (teacher,), {"inputs": data.train[:3]}, CONTEXT).mean()

    np.testing.assert_allclose(jax.grad(mean_loss)(logits), jnp.zeros_like(logits), atol=1e-6)


def test_the_score_counts_words(encoded):
    config, data = encoded
    model = models.from_linen(make_student(config, data))
    variables = model.init(jax.random.key(0), data.validation[:2])
    score = translation_losses.make_word_score(model, data.buckets)(
        variables, {"inputs": data.validation}
    )
    logits = predict_logits(model, variables, data.validation)
    labels = data.validation[:, 1, 1:]
    accuracy = (np.asarray(logits).argmax(-1) == labels)[labels != 0].mean()
    cross_entropies = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), labels[..., None], -1
    )[..., 0]
    assert score.accuracy == pytest.approx(accuracy)
    assert score.loss == pytest.approx(cross_entropies[labels != 0].mean(), rel=1e-5)


def test_batches_hold_every_row_once_and_have_one_size():
    inputs = np.arange(1, 31).reshape(10, 3)
    batches = list(translation_data.padded_batches(inputs, LengthBuckets((3,)), batch_size=4))
    assert sorted(np.concatenate([rows for rows, _ in batches])) == list(range(10))
    assert {batch.shape for _, batch in batches} == {(4, 3)} and (batches[-1][1][2:] == 0).all()


def test_a_translation_does_not_depend_on_its_batch(encoded):
    config, data = encoded
    module = make_student(config, data)
    variables = models.from_linen(module).init(jax.random.key(3), data.train[:1])
    translate = translation.make_translate(module, config, data.buckets, beams=2)
    translations = translate(variables, data.sources)
    np.testing.assert_array_equal(translate(variables, data.sources[3:4]), translations[3:4])


def test_groups_of_lengths_divide_the_sentences():
    sources = ["w " * count for count in (1, 8, 9, 10, 11, 12, 13, 15, 16, 40)]
    groups = translation_report.group_by_length(sources)
    assert [group.tolist() for group in groups] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert translation_report.group_names() == ["1–8", "9–10", "11–12", "13–15", "16+"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "nowhere"], "there is no folder nowhere"),
        (["--hidden", "7"], "--hidden 7: must be an even number"),
        (["--teacher-hidden", "10"], "--teacher-hidden 10: must be a multiple of 4"),
        (["--beams", "0"], "--beams 0: needs at least 1"),
        (["--only", "attention", "words"], "--only words: choose from no_attention attention"),
        (["--teacher-forcing", "1.5"], "must be a probability"),
        (["--vocab-size", "100"], "vocab_size is 100"),
        (["--max-length", "3"], "every training pair is longer"),
        (["--max-students", "4"], "one after another"),
        (["--target", "fr"], "no pair train.en and train.fr"),
        (["--workdir", "none", "--translate", "a man"], "does not exist"),
    ],
)
def test_invalid_options_end_in_one_line(arguments, message, refuse, languages):
    defaults = [] if "--dataset" in arguments else ["--dataset", str(languages)]
    assert message in refuse(translation, *defaults, *arguments)


def test_alignments_are_drawn_for_sentences_of_medium_length_between_tokens(encoded):
    _, data = encoded
    sources = ["w " * 7, "w " * 8, "w " * 14, "w " * 15]
    assert translation_report.select_aligned(sources) == [1, 2]
    token_ids = data.tokenizer.encode("a man").ids
    token_texts = [translation_search.token_text(data.tokenizer, i) for i in token_ids]
    assert token_texts[0] == "[BOS]"


def test_files_of_different_lengths_are_refused(languages, tmp_path, refuse):
    for path in languages.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "val.de").write_text("ein mann\n")
    assert "has 12 lines" in refuse(translation, "--dataset", str(tmp_path))
