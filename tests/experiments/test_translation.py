"""The translation experiment on a made-up language: what it leaves, one sentence from it, and its parts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import translation, translation_report
from experiments.cli import OptionError
from jaxkd import models, runs

WORDS = {"a": "ein", "man": "mann", "dog": "hund", "runs": "rennt", "sees": "sieht", "big": "gross", "and": "und"}


def pair(draw):
    source = draw.choice([*WORDS], draw.integers(2, 9))
    return " ".join(source), " ".join(WORDS[word] for word in source)


@pytest.fixture(scope="module", autouse=True)
def promotion():
    """As users run experiments: optax's Adam is not strict about dtypes. One width, for there is little to save."""
    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(translation, "WIDTHS", {"count": 1})
        yield


@pytest.fixture(scope="module")
def languages(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("languages"), np.random.default_rng(0)
    for split, count in (("train", 150), ("val", 12), ("test", 12)):
        pairs = [pair(draw) for _ in range(count)]
        for i, language in enumerate(("en", "de")):
            (folder / f"{split}.{language}").write_text("".join(f"{one[i]}\n" for one in pairs))
    return folder


SMALL = {"seeds": 2, "epochs": 2, "teacher_epochs": 2, "hidden": 8, "teacher_hidden": 8, "teacher_layers": 1}
SMALL |= {"vocab_size": 300, "max_length": 24, "batch_size": 16, "beams": 2}


@pytest.fixture(scope="module")
def run(languages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = translation.Config(dataset=str(languages), workdir=str(folder), **SMALL)
    translation.main(config)
    return config, folder


@pytest.fixture(scope="module")
def prepared(languages):
    config = translation.Config(dataset=str(languages), **SMALL)
    return config, translation.prepare(config)


def test_a_run_leaves_rows_figures_translations_and_the_student(run):
    _, folder = run
    rows = json.loads((folder / "results.json").read_text())
    assert [row["name"] for row in rows] == ["teacher", "no_attention", "attention", "word_level", "sequence_level"]
    assert [len(row["bleu"]) for row in rows] == [1, 2, 2, 2, 2]
    assert all(len(one) == len(translation_report.LENGTHS) + 1 for row in rows for one in row["bleu_by_length"])
    for name in ("report.md", "lengths.png", "alignments.png", "curves.png", "student.safetensors", "tokenizer.json"):
        assert (folder / name).stat().st_size > 0
    lines = (folder / "translations.tsv").read_text().splitlines()
    assert len(lines) == 13 and all(line.count("\t") == 6 for line in lines)
    report = (folder / "report.md").read_text()
    assert "| teacher |" in report and "attention above no_attention by length" in report


def test_words_say_how_far_attention_is_ahead_at_each_length():
    lengths = {"attention": [[20.0, 10.0, 8.0, 0.0, 4.0]], "no_attention": [[10.0, 4.0, 2.0, 0.0, 1.0]]}
    rows = [{"name": name, "bleu": [9.0], "bleu_by_length": one} for name, one in lengths.items()]
    rows += [{"name": name, "bleu": [8.0], "bleu_by_length": lengths["attention"]} for name in translation.TAUGHT]
    *compared, gaps, shares = translation_report.sentences(rows)
    assert compared[1] == "word_level is -1.0 BLEU above attention"
    assert gaps.endswith("1–8 words 10.0, 9–10 words 6.0, 11–12 words 6.0, 13–15 words 0.0, 16+ words 3.0")
    assert shares.endswith("1–8 words 50 %, 9–10 words 40 %, 11–12 words 25 %, 16+ words 25 %")


def test_the_students_gradients_are_clipped():
    """Adam divides by the size of the first gradient, so that its moments alone tell."""
    tx, gradient = translation.clipped(translation.Config(clip=0.5), 10), jnp.array([0.6, 0.8])
    state = tx.init(gradient)

    def moments(size):
        return [np.asarray(leaf) for leaf in jax.tree.leaves(tx.update(size * gradient, state)[1])]

    assert all(np.allclose(one, other) for one, other in zip(moments(0.5), moments(5.0), strict=True))
    assert not all(np.allclose(one, other) for one, other in zip(moments(0.25), moments(0.5), strict=True))


def test_again_nothing_is_trained_and_the_teacher_does_not_translate_again(run, capsys, monkeypatch):
    config, folder = run
    before = json.loads((folder / "results.json").read_text())
    kept = (folder / "translations").stat().st_mtime_ns
    translation.main(config)
    after = json.loads((folder / "results.json").read_text())
    assert [row["bleu"] for row in after] == [row["bleu"] for row in before]
    assert (folder / "translations").stat().st_mtime_ns == kept
    assert "steps and" not in capsys.readouterr().out


def test_one_sentence_is_translated_by_a_finished_run(run, capsys):
    config, folder = run
    translation.main(dataclasses.replace(config, translate="a man sees a dog"))
    first = capsys.readouterr().out
    translation.main(translation.Config(workdir=str(folder), translate="a man sees a dog"))
    assert capsys.readouterr().out == first and len(first.splitlines()) == 1


def test_a_student_alone_needs_no_teacher_and_translates(languages, tmp_path, capsys):
    given = SMALL | {"only": ("no_attention",), "seeds": 1}
    config = translation.Config(dataset=str(languages), workdir=str(tmp_path), **given)
    translation.main(config)
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert row["name"] == "no_attention" and {one["stage"] for one in runs.read_run(tmp_path).metrics()} == {
        row["name"]
    }
    report = (tmp_path / "report.md").read_text()
    assert "teacher's" not in report and "alignments.png" not in report and "lengths.png" in report
    capsys.readouterr()
    translation.main(dataclasses.replace(config, translate="a man sees a dog"))
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_only_those_that_are_named_are_trained():
    config = translation.Config(only=("word_level", "no_attention"))
    assert config.students == ("no_attention", "word_level")
    assert translation.candidates(config.students) == ["word_level"]
    assert translation.candidates(("no_attention",)) == ["no_attention"]
    assert translation.Config().students == translation.STUDENTS


@pytest.mark.parametrize(("score", "params"), [("dot", None), ("general", {"kernel"}), ("additive", {"encoder"})])
def test_students_score_as_asked(score, params):
    module = translation.student_module(translation.Config(hidden=4, score=score), 10)
    params_there = module.init(jax.random.key(0), jnp.ones((1, 2, 3), jnp.int32))["params"].get("alignment")
    assert params_there is None if params is None else params <= set(params_there)


def test_no_run_no_translation(tmp_path):
    with pytest.raises(OptionError, match="run the experiment to its end first"):
        translation.main(translation.Config(workdir=str(tmp_path / "none"), translate="a man"))


def test_teacher_learns_once_and_its_translations_are_what_sequence_level_learns_from(run, languages):
    config, folder = run
    trained = {(one["stage"], one["seed"]) for one in runs.read_run(folder).metrics()}
    assert {seed for stage, seed in trained if stage == "teacher"} == {0}
    prepared = translation.prepare(config)
    kept = translation.checkpoints.load(folder / "translations").tree["pairs"]
    np.testing.assert_array_equal(kept[:, 0], prepared.train[:, 0])
    assert (kept[:, 1, 0] == prepared.train[:, 1, 0]).all() and kept.shape == prepared.train.shape


def test_pairs_become_tokens_and_longer_ones_are_left_out(prepared, languages, capsys):
    config, made = prepared
    assert made.train.shape[1:] == (2, 24) and made.sources.shape == (12, 24)
    for row, sentence in zip(made.train[:, 1], made.texts.train.targets, strict=True):
        assert made.tokenizer.decode(row[row != 0].tolist()) == sentence
    short = translation.prepare(dataclasses.replace(config, max_length=10))
    lengths = (made.train != 0).sum(-1).max(1)
    assert len(short.train) == (lengths <= 10).sum() < len(made.train)
    assert "are left out" in capsys.readouterr().out
    few = translation.prepare(dataclasses.replace(config, pairs=7))
    assert len(few.train) == 7


def test_two_files_serve_as_well(languages, prepared):
    config, _ = prepared
    files = {name: str(languages / f"train.{end}") for name, end in (("source", "en"), ("target", "de"))}
    dataset = translation.load(dataclasses.replace(config, **files))
    assert [len(split.sources) for split in dataset] == [122, 13, 15]


def test_the_loss_is_the_mean_over_words_whatever_the_padding(prepared):
    config, made = prepared
    model = models.from_linen(translation.student_module(config, made.tokenizer.get_vocab_size()))
    batch = made.train[:6]
    variables = model.init(jax.random.key(0), batch)

    def value(params, inputs):
        outputs, _ = model.apply({"params": params}, inputs, train=False)
        return translation.from_words(outputs, (), {"inputs": inputs}).mean()

    wide = jnp.pad(jnp.asarray(batch), ((0, 0), (0, 0), (0, 5)))
    (one, gradient), (other, others) = (jax.value_and_grad(value)(variables["params"], x) for x in (batch, wide))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, others)
    logits, labels = model.apply(variables, batch, train=False)[0].logits, batch[:, 1, 1:]
    each = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(one, each[labels != 0].mean(), rtol=1e-5)


def test_soft_words_of_the_teacher_itself_at_alpha_1_leave_no_gradient(prepared):
    config, made = prepared
    logits = jax.random.normal(jax.random.key(0), (3, 23, 300))
    outputs = models.Outputs(logits, {})
    loss = translation.from_soft_words(dataclasses.replace(config, alpha=1.0))

    def value(logits):
        return loss(models.Outputs(logits, {}), (outputs,), {"inputs": made.train[:3]}).mean()

    np.testing.assert_allclose(jax.grad(value)(logits), jnp.zeros_like(logits), atol=1e-6)


def test_the_score_counts_words(prepared):
    config, made = prepared
    model = models.from_linen(translation.student_module(config, made.tokenizer.get_vocab_size()))
    variables = model.init(jax.random.key(0), made.validation[:2])
    score = translation.make_score(made.widths)(model)(variables, {"inputs": made.validation})
    logits, labels = model.apply(variables, made.validation, train=False)[0].logits, made.validation[:, 1, 1:]
    right = (np.asarray(logits).argmax(-1) == labels)[labels != 0].mean()
    each = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), labels[..., None], -1)[..., 0]
    assert score.accuracy == pytest.approx(right) and score.loss == pytest.approx(each[labels != 0].mean(), rel=1e-5)


def test_batches_hold_every_row_once_and_are_of_one_size():
    inputs = np.arange(1, 31).reshape(10, 3)
    parts = list(translation.batches(inputs, (3,), size=4))
    assert sorted(np.concatenate([rows for rows, _ in parts])) == list(range(10))
    assert {batch.shape for _, batch in parts} == {(4, 3)} and (parts[-1][1][2:] == 0).all()


def test_translations_do_not_depend_on_their_neighbours(prepared):
    config, made = prepared
    module = translation.student_module(config, made.tokenizer.get_vocab_size())
    variables = models.from_linen(module).init(jax.random.key(3), made.train[:1])
    translate = translation.make_translate(module, config, made.widths, beams=2)
    whole = translate(variables, made.sources)
    np.testing.assert_array_equal(translate(variables, made.sources[3:4]), whole[3:4])


def test_groups_of_lengths_part_the_sentences():
    sources = ["w " * count for count in (1, 8, 9, 10, 11, 12, 13, 15, 16, 40)]
    groups = translation_report.by_length(sources)
    assert [group.tolist() for group in groups] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert translation_report.group_names() == ["1–8", "9–10", "11–12", "13–15", "16+"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--dataset", "nowhere"], "there is no folder nowhere"),
        (["--hidden", "7"], "--hidden 7: an even number"),
        (["--teacher-hidden", "10"], "--teacher-hidden 10: a multiple of 4"),
        (["--beams", "0"], "at least one"),
        (["--only", "attention", "words"], "--only words: choose from no_attention attention"),
        (["--teacher-forcing", "1.5"], "a probability"),
        (["--vocab-size", "100"], "vocab_size is 100"),
        (["--max-length", "3"], "no training pair is as short"),
        (["--at-once", "4"], "one after another"),
        (["--target", "fr"], "no pair train.en and train.fr"),
        (["--workdir", "none", "--translate", "a man"], "is not there"),
    ],
)
def test_bad_options_end_in_one_line(options, told, refuse, languages):
    given = [] if "--dataset" in options else ["--dataset", str(languages)]
    assert told in refuse(translation, *given, *options)


def test_alignments_of_real_sentences_are_drawn_between_tokens(prepared):
    config, made = prepared
    assert translation_report.drawn(["w " * 7, "w " * 8, "w " * 14, "w " * 15]) == [1, 2]
    numbers = made.tokenizer.encode("a man").ids
    assert [translation.shown(made.tokenizer, number) for number in numbers][0] == "[BOS]"


def test_a_pair_without_translation_is_told(languages, tmp_path, refuse):
    for path in languages.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "val.de").write_text("ein mann\n")
    assert "has 12 lines" in refuse(translation, "--dataset", str(tmp_path))
