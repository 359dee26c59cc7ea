"""The experiments on texts, on a tiny BERT and a few sentences: what they leave, and wrong input told in a line."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments import distilbert, sentiment, text
from jaxkd import losses, runs, transfer
from jaxkd.checkpoints import to_torch
from jaxkd.models import BERT, Outputs, from_linen, mean_pooling

WORDS = "good fine great lovely bad poor awful dull film plot cast score a the was very .".split()
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]


def sentence(draw):
    kind = draw.integers(2)
    words = [*draw.choice(WORDS[8:], draw.integers(1, 9)), draw.choice(WORDS[4 * kind : 4 * kind + 4])]
    return " ".join(draw.permutation(words)), "negative" if kind else "positive"


@pytest.fixture(scope="module", autouse=True)
def promotion():
    """As users run experiments: optax's Adam is not strict about dtypes. One width, for there is little to save."""
    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "WIDTHS", 1)
        yield


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """120 sentences to train on, 20 to test, and 30 more without labels, of which one is tested on."""
    folder, draw = tmp_path_factory.mktemp("sentences"), np.random.default_rng(0)
    for split, count in (("train", 120), ("test", 20)):
        lines = ["\t".join(sentence(draw)) for _ in range(count)]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    tested = (folder / "test.tsv").read_text().split("\t")[0]
    further = [sentence(draw)[0] + " and so it goes on and on" for _ in range(29)]
    (folder / "more.txt").write_text("\n".join(f"{i}\t{one}" for i, one in enumerate([tested, *further])) + "\n")
    return folder


def make_bert(folder, words=TOKENS, *, hidden=8, layers=4, heads=2, positions=24):
    """A hub folder with a BERT that knows nothing."""
    sizes = {"hidden": hidden, "layers": layers, "heads": heads, "intermediate": 12, "positions": positions}
    module = BERT(len(words), pooling=mean_pooling, **sizes)
    variables = from_linen(module).init(jax.random.key(0), np.ones((1, 4), np.int32))
    save_file(to_torch(variables, module.torch_rules()), folder / "model.safetensors")
    (folder / "vocab.txt").write_text("\n".join(words))
    config = {"model_type": "bert", "vocab_size": len(words), "hidden_size": hidden, "num_hidden_layers": layers}
    config |= {"num_attention_heads": heads, "intermediate_size": 12, "max_position_embeddings": positions}
    config |= {"hidden_dropout_prob": 0.1, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config | {"type_vocab_size": 2}))
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def given(sentences, bert, tmp_path):
    shared = {"dataset": str(sentences), "bert": str(bert), "workdir": str(tmp_path / "run"), "seeds": 2}
    return shared | {"teacher_epochs": 3, "teacher_learning_rate": 0.01, "learning_rate": 0.01, "epochs": 3}


def results(given):
    return {row["name"]: row for row in json.loads((Path(given["workdir"]) / "results.json").read_text())}


def test_sentiment_trains_a_teacher_once_and_students_for_each_seed(given, sentences, capsys):
    config = sentiment.Config(**given, unlabelled=str(sentences / "more.txt"), unlabelled_field=2)
    sentiment.main(config)
    rows, folder = results(given), Path(given["workdir"])
    assert list(rows) == ["teacher", "lstm_alone", "lstm_distilled", "lstm_transfer"]
    assert [len(row["accuracy"]) for row in rows.values()] == [1, 2, 2, 2]
    assert rows["teacher"]["flops"] > 0 and rows["lstm_alone"]["flops"] is None
    trained = {(one["stage"], one["seed"]) for one in runs.read_run(folder).metrics()}
    assert {seed for stage, seed in trained if stage == "teacher"} == {0}
    printed = capsys.readouterr().out
    assert "29 of 30 further texts are learnt from" in printed and "lstm_transfer is" in printed
    assert (folder / "student.safetensors").is_file() and (folder / "accuracy.png").is_file()
    before = (folder / "results.json").read_text()
    sentiment.main(config)
    assert "already trained" in capsys.readouterr().out
    assert [row["accuracy"] for row in json.loads(before)] == [row["accuracy"] for row in results(given).values()]


def test_without_further_texts_there_is_no_student_of_them(given):
    config = sentiment.Config(**given)
    prepared = text.prepare(config, text.load(config))
    teacher = sentiment.distill.Trained(prepared.bert.variables, 1.0, 0.5)
    plan = sentiment.make_plan(config, prepared, teacher)
    assert [one.name for one in plan] == ["teacher", "lstm_alone", "lstm_distilled"]


def test_texts_without_labels_have_all_weight_on_the_soft_targets():
    labelled = {"inputs": np.ones((3, 4), np.int32), "labels": np.array([1, 0, 1], np.int32)}
    whole = sentiment.with_unlabelled(labelled, np.full((2, 4), 5, np.int32))
    assert whole["labelled"].tolist() == [True] * 3 + [False] * 2
    assert whole["inputs"].shape == (5, 4) and whole["labels"].tolist() == [1, 0, 1, 0, 0]


def test_frozen_layers_stay_as_they_came(given):
    config = sentiment.Config(**given, frozen_layers=2)
    prepared = text.prepare(config, text.load(config))
    run = sentiment.plans.open_run("sentiment", config, "x", text.arrays(prepared))
    after = text.train_teacher(run, config, prepared).variables["params"]
    before = prepared.bert.variables["params"]
    moved = {
        name: not np.array_equal(jax.tree.leaves(after[name])[0], jax.tree.leaves(before[name])[0]) for name in after
    }
    still = {"token_embedding", "position_embedding", "segment_embedding", "embedding_norm", "block0", "block1"}
    assert {name for name, value in moved.items() if not value} == still


def test_distilbert_leaves_what_is_kept_in_words_and_a_figure(given, capsys):
    distilbert.main(distilbert.Config(**given))
    rows, folder = results(given), Path(given["workdir"])
    assert list(rows) == ["teacher", "labels", "distilbert", "tinybert"]
    report = (folder / "report.md").read_text()
    assert "tinybert keeps" in report and "retention.png" in report and (folder / "retention.png").is_file()
    assert "of the teacher's accuracy with" in capsys.readouterr().out


def planned(config, prepared):
    student, teacher = distilbert.choose_student(config, prepared), distilbert.distill.Trained({}, 1.0, 0.5)
    return distilbert.make_plan(config, prepared, student, teacher)


def test_students_begin_with_every_second_layer_of_the_teacher(given):
    config = distilbert.Config(**given)
    prepared = text.prepare(config, text.load(config))
    theirs = prepared.bert.variables
    _, first, *_ = planned(config, prepared)
    fresh = first.model.init(jax.random.key(1), prepared.train["inputs"][:1])
    ours = first.transfer(theirs, fresh)
    for mine, other in ((0, 0), (1, 2)):
        jax.tree.map(np.testing.assert_array_equal, ours["params"][f"block{mine}"], theirs["params"][f"block{other}"])
    assert "block2" not in ours["params"]


def test_a_student_of_its_own_is_projected_and_begins_as_it_came(given, tmp_path_factory):
    narrow = make_bert(tmp_path_factory.mktemp("narrow"), hidden=4, layers=2)
    config = distilbert.Config(**given, student=str(narrow))
    distilbert.main(config)
    rows = results(given)
    assert list(rows) == ["teacher", "labels", "distilbert", "tinybert"]
    assert rows["tinybert"]["parameters"] == rows["labels"]["parameters"] < rows["teacher"]["parameters"]
    prepared = text.prepare(config, text.load(config))
    _, student, first, *_ = planned(config, prepared)
    assert first.start == student.name == "student" and student.variables["params"]["block1"]


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"layers": 5}, "has 5 layers, the teacher 4"),
        ({"positions": 6}, "has places for 6 tokens"),
        ({"heads": 1}, "has 1 heads and the teacher 2, whose maps cannot be paired: --map-weight 0"),
        ({"words": [*TOKENS[:-1], "!"]}, "the tokenizers of teacher and student differ: the id 20 is '.'"),
    ],
)
def test_a_student_that_cannot_be_paired_is_told_what_to_do(given, sizes, told, tmp_path, refuse):
    student = tmp_path / "student"
    student.mkdir()
    make_bert(student, **sizes)
    options = ["--dataset", given["dataset"], "--bert", given["bert"], "--student", str(student)]
    assert told in refuse(distilbert, *options)


@pytest.fixture
def states():
    draw = np.random.default_rng(0)

    def outputs(layers):
        features = {f"layer{i}": draw.normal(size=(2, 3, 4)).astype(np.float32) for i in range(1, layers + 1)}
        features |= {f"scores{i}": draw.normal(size=(2, 2, 3, 3)).astype(np.float32) for i in range(1, layers + 1)}
        features["embeddings"] = draw.normal(size=(2, 3, 4)).astype(np.float32)
        return Outputs(draw.normal(size=(2, 2)).astype(np.float32), features)

    batch = {"inputs": np.array([[5, 6, 7], [5, 6, 0]], np.int32), "labels": np.array([0, 1])}
    return outputs(2), outputs(4), batch


def test_the_triple_loss_is_its_three_parts(states):
    student, teacher, batch = states
    config = distilbert.Config(cosine_weight=0.5)
    got = distilbert.triple(config)(student, (teacher,), batch)
    ours, theirs = student.features["layer2"], teacher.features["layer4"]
    angle = 1 - (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
    mean = np.array([angle[0].mean(), angle[1, :2].mean()])
    task = losses.distillation_loss(
        student.logits, teacher.logits, batch["labels"], temperature=config.temperature, alpha=config.alpha
    )
    np.testing.assert_allclose(got, task + 0.5 * mean, rtol=1e-5)


@pytest.mark.parametrize("name", ["triple", "layer_by_layer"])
def test_padding_changes_no_loss(states, name):
    student, teacher, batch = states
    config = distilbert.Config()
    loss = distilbert.triple(config) if name == "triple" else distilbert.layer_by_layer(config, 2, 4)

    def spoilt(outputs):
        features = {key: np.array(value) for key, value in outputs.features.items()}
        for key, value in features.items():
            value[1, ..., 2, :] = 1e3 if not key.startswith("scores") else 7e3
            if key.startswith("scores"):
                value[1, ..., :, 2] = -7e3
        return outputs._replace(features=features)

    expected = loss(student, (teacher,), batch)
    np.testing.assert_allclose(loss(spoilt(student), (spoilt(teacher),), batch), expected, rtol=1e-6)


def test_tinybert_s_loss_is_0_beside_the_task_where_layers_are_the_teacher_s(states):
    _, teacher, batch = states
    own = {
        "layer1": "layer2",
        "layer2": "layer4",
        "scores1": "scores2",
        "scores2": "scores4",
        "embeddings": "embeddings",
    }
    student = teacher._replace(features={mine: teacher.features[theirs] for mine, theirs in own.items()})
    config = distilbert.Config()
    task = distilbert.plans.taught(config)(student, (teacher,), batch)
    np.testing.assert_allclose(distilbert.layer_by_layer(config, 2, 4)(student, (teacher,), batch), task, rtol=1e-6)


@pytest.mark.parametrize(
    ("experiment", "options", "told"),
    [
        (sentiment, ["--dropout", "1"], "--dropout 1.0"),
        (sentiment, ["--bert", "nowhere"], "no folder nowhere and no installed package"),
        (sentiment, ["--frozen-layers", "4"], "has 4 layers"),
        (sentiment, ["--max-length", "99"], "has places for 24 tokens"),
        (sentiment, ["--max-length", "2"], "at least 3 tokens"),
        (sentiment, ["--unlabelled", "nowhere.txt"], "cannot read nowhere.txt"),
        (distilbert, ["--layers", "0", "7"], "--layers 0 7: each once, from 0 to 3"),
        (distilbert, ["--map-weight", "-1"], "--map-weight -1.0"),
        (distilbert, ["--teacher-learning-rate", "0"], "must be above 0"),
    ],
)
def test_bad_options_end_in_one_line(experiment, options, told, refuse, sentences, bert):
    given = [] if "--bert" in options else ["--bert", str(bert)]
    assert told in refuse(experiment, "--dataset", str(sentences), *given, *options)


def test_a_text_that_bert_has_no_places_for_is_named(sentences, bert, tmp_path, refuse):
    for name in ("train.tsv", "test.tsv"):
        (tmp_path / name).write_text((sentences / name).read_text())
    (tmp_path / "test.tsv").write_text(f"fine .\tpositive\n{'very ' * 30}bad\tnegative\n")
    told = refuse(sentiment, "--dataset", str(tmp_path), "--bert", str(bert))
    assert "test.tsv, line 2 has 33 tokens" in told and "24" in told
    config = sentiment.Config(dataset=str(tmp_path), bert=str(bert), max_length=16)
    assert text.prepare(config, text.load(config)).test["inputs"].shape[1] == 16


def test_rules_leave_out_the_other_layers():
    start = text.by_rules(transfer.layer_rules("params/block{i}/{rest...}", (1,)))
    theirs = {"params": {"block0": {"w": np.zeros(2)}, "block1": {"w": np.ones(2)}}}
    assert start(theirs, {"params": {"block0": {"w": np.zeros(2)}}})["params"]["block0"]["w"].tolist() == [1, 1]
