"""Tests of the experiments on texts, with a tiny BERT and a few sentences."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments import distilbert, sentiment
from experiments.common import plans, texts
from jaxkd import losses, runs, transfer
from jaxkd.cli.berts import load_classifier, make_transfer
from jaxkd.distill import LossContext, TrainedModel
from jaxkd.models import BERT, Outputs, from_linen, mean_pooling
from jaxkd.weights import load_weights, read_class_names, to_torch

pytestmark = pytest.mark.thorough  # trains networks, in processes of their own

WORDS = "good fine great lovely bad poor awful dull film plot cast score a the was very .".split()
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
CONTEXT = LossContext(jnp.zeros((), jnp.int32), None, jax.random.key(0), None, None)
"""The context of a loss without parameters."""


def draw_sentence(rng):
    """Draws words in any order, one of which is praise or blame, and the class."""
    kind = rng.integers(2)
    words = [
        *rng.choice(WORDS[8:], rng.integers(1, 9)),
        rng.choice(WORDS[4 * kind : 4 * kind + 4]),
    ]
    return " ".join(rng.permutation(words)), "negative" if kind else "positive"


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """Promotes dtypes as for users, since optax's Adam is not strict, and uses a single bucket."""
    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "NUM_BUCKETS", 1)
        yield


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """A folder of 120 training and 20 test sentences, and 30 without labels, one of them a test
    sentence."""
    folder = tmp_path_factory.mktemp("sentences")
    rng = np.random.default_rng(0)
    for split, count in (("train", 120), ("test", 20)):
        lines = ["\t".join(draw_sentence(rng)) for _ in range(count)]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    test_sentence = (folder / "test.tsv").read_text().split("\t")[0]
    further = [draw_sentence(rng)[0] + " and so it goes on and on" for _ in range(29)]
    lines = [f"{i}\t{sentence}" for i, sentence in enumerate([test_sentence, *further])]
    (folder / "more.txt").write_text("\n".join(lines) + "\n")
    return folder


def make_bert(folder, words=TOKENS, *, hidden=8, layers=4, heads=2, positions=24, num_classes=10):
    """Writes a hub folder with a random BERT."""
    module = BERT(
        len(words),
        pooling=mean_pooling,
        hidden=hidden,
        layers=layers,
        heads=heads,
        intermediate=12,
        positions=positions,
        num_classes=num_classes,
    )
    variables = from_linen(module).init(jax.random.key(0), np.ones((1, 4), np.int32))
    save_file(to_torch(variables, module.torch_rules()), folder / "model.safetensors")
    (folder / "vocab.txt").write_text("\n".join(words))
    config = {
        "model_type": "bert",
        "vocab_size": len(words),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 12,
        "max_position_embeddings": positions,
        "hidden_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "type_vocab_size": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def shallow_bert(tmp_path_factory):
    """A BERT of two layers, whose steps compile in half the time."""
    return make_bert(tmp_path_factory.mktemp("shallow_bert"), layers=2)


@pytest.fixture
def options(sentences, bert, tmp_path):
    return {
        "dataset": str(sentences),
        "bert": str(bert),
        "workdir": str(tmp_path / "run"),
        "num_seeds": 2,
        "teacher_epochs": 3,
        "teacher_learning_rate": 0.01,
        "learning_rate": 0.01,
        "epochs": 3,
        # A step for the eight virtual devices takes a third longer to compile.
        "parallel": "none",
    }


def read_results(options):
    path = Path(options["workdir"]) / "results.json"
    return {row["name"]: row for row in json.loads(path.read_text())}


def test_sentiment_trains_a_teacher_once_and_students_for_each_seed(
    options, shallow_bert, sentences, capsys
):
    options["bert"] = str(shallow_bert)
    config = sentiment.Config(**options, unlabelled=str(sentences / "more.txt"), unlabelled_field=2)
    sentiment.main(config)
    rows = read_results(options)
    folder = Path(options["workdir"])
    assert list(rows) == ["teacher", "lstm_alone", "lstm_distilled", "lstm_transfer"]
    assert [len(row["accuracy"]) for row in rows.values()] == [1, 2, 2, 2]
    assert rows["teacher"]["flops"] > 0 and rows["lstm_alone"]["flops"] is None
    trained = {(record["stage"], record["seed"]) for record in runs.read_run(folder).metrics()}
    assert {seed for stage, seed in trained if stage == "teacher"} == {0}
    printed = capsys.readouterr().out
    assert "29 of 30 further texts are used" in printed and "lstm_transfer is" in printed
    assert read_class_names(folder / "student.safetensors") == ("negative", "positive")
    assert (folder / "accuracy.png").is_file()
    before = (folder / "results.json").read_text()
    sentiment.main(config)
    assert "already trained" in capsys.readouterr().out
    assert [row["accuracy"] for row in json.loads(before)] == [
        row["accuracy"] for row in read_results(options).values()
    ]


def test_sentiment_without_further_texts_has_no_student_of_them(options):
    config = sentiment.Config(**options)
    data = texts.encode(config, texts.load(config))
    plan = sentiment.make_plan(config, data, TrainedModel(data.bert.variables, 1.0, 0.5))
    assert [entry.name for entry in plan] == ["teacher", "lstm_alone", "lstm_distilled"]


def test_texts_without_labels_have_all_weight_on_the_soft_targets():
    labelled = {"inputs": np.ones((3, 4), np.int32), "labels": np.array([1, 0, 1], np.int32)}
    examples = sentiment.add_unlabelled(labelled, np.full((2, 4), 5, np.int32))
    assert examples["labelled"].tolist() == [True] * 3 + [False] * 2
    assert examples["inputs"].shape == (5, 4) and examples["labels"].tolist() == [1, 0, 1, 0, 0]


def test_frozen_layers_keep_their_weights(options):
    config = sentiment.Config(**options, frozen_layers=2)
    data = texts.encode(config, texts.load(config))
    run = plans.open_run("sentiment", config, "x", texts.list_arrays(data))
    after = texts.train_teacher(run, config, data).variables["params"]
    before = data.bert.variables["params"]
    changed = {
        name: not np.array_equal(jax.tree.leaves(after[name])[0], jax.tree.leaves(before[name])[0])
        for name in after
    }
    frozen = {
        "token_embedding",
        "position_embedding",
        "segment_embedding",
        "embedding_norm",
        "block0",
        "block1",
    }
    assert {name for name, has_changed in changed.items() if not has_changed} == frozen


def test_distilbert_describes_and_draws_what_the_students_retain(options, shallow_bert, capsys):
    options["bert"] = str(shallow_bert)
    distilbert.main(distilbert.Config(**options))
    rows = read_results(options)
    folder = Path(options["workdir"])
    assert list(rows) == ["teacher", "labels", "distilbert", "tinybert"]
    report = (folder / "report.md").read_text()
    assert "tinybert retains" in report
    assert "retention.png" in report and (folder / "retention.png").is_file()
    assert "of the teacher's accuracy with" in capsys.readouterr().out


def make_distilbert_plan(config, data):
    student = distilbert.choose_student(config, data)
    return distilbert.make_plan(config, data, student, TrainedModel({}, 1.0, 0.5))


def test_students_start_from_every_second_layer_of_the_teacher(options):
    config = distilbert.Config(**options)
    data = texts.encode(config, texts.load(config))
    teacher_variables = data.bert.variables
    _, stage, *_ = make_distilbert_plan(config, data)
    fresh = stage.model.init(jax.random.key(1), data.train["inputs"][:1])
    student_variables = stage.transfer(teacher_variables, fresh)
    for student_layer, teacher_layer in ((0, 0), (1, 2)):
        jax.tree.map(
            np.testing.assert_array_equal,
            student_variables["params"][f"block{student_layer}"],
            teacher_variables["params"][f"block{teacher_layer}"],
        )
    assert "block2" not in student_variables["params"]


def test_a_pretrained_student_is_projected_and_starts_from_its_weights(options, tmp_path_factory):
    narrow = make_bert(tmp_path_factory.mktemp("narrow"), hidden=4, layers=2)
    config = distilbert.Config(**options, student=str(narrow))
    distilbert.main(config)
    rows = read_results(options)
    assert list(rows) == ["teacher", "labels", "distilbert", "tinybert"]
    # The projector is not part of the student.
    assert (
        rows["tinybert"]["parameters"]
        == rows["labels"]["parameters"]
        < rows["teacher"]["parameters"]
    )
    data = texts.encode(config, texts.load(config))
    _, student, stage, *_ = make_distilbert_plan(config, data)
    assert stage.start == student.name == "student" and student.variables["params"]["block1"]


@pytest.mark.parametrize(
    ("names", "order", "message"),
    [
        (("positive", "negative"), [1, 0], "are in another order: they are matched by name"),
        (("negative", "positive"), [0, 1], ""),
        (("bad", "good"), [0, 1], "its fine-tuning starts from bad for negative, and so on"),
        (("LABEL_0", "LABEL_1"), [0, 1], ""),
    ],
)
def test_a_fine_tuned_classifier_is_matched_by_name(names, order, message, tmp_path, capsys):
    folder = make_bert(tmp_path, num_classes=2)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = dict(enumerate(names))
    (folder / "config.json").write_text(json.dumps(config))
    kernel = load_weights(folder / "model.safetensors")["classifier.weight"].T
    bert = load_classifier(str(folder), ("negative", "positive")).bert
    np.testing.assert_array_equal(bert.variables["params"]["logits"]["kernel"], kernel[:, order])
    assert bert.class_names == ("negative", "positive")
    output = capsys.readouterr().out
    assert message in output and output.count("\n") == bool(message)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layers": 5}, "has 5 layers, the teacher only 4"),
        ({"positions": 6}, "has positions for 6 tokens"),
        (
            {"heads": 1},
            "has 1 attention heads and the teacher 2, whose maps cannot be paired; "
            "use --map-weight 0",
        ),
        (
            {"words": [*TOKENS[:-1], "!"]},
            "the tokenizers of teacher and student differ: the id 20 is '.'",
        ),
    ],
)
def test_a_student_that_does_not_fit_the_teacher_is_refused(
    options, sizes, message, tmp_path, refuse
):
    student = tmp_path / "student"
    student.mkdir()
    make_bert(student, **sizes)
    arguments = ["--dataset", options["dataset"], "--bert", options["bert"]]
    assert message in refuse(distilbert, *arguments, "--student", str(student))


@pytest.fixture
def outputs():
    """Outputs of a student with 2 layers and a teacher with 4, and their batch."""
    rng = np.random.default_rng(0)

    def draw_outputs(num_layers):
        features = {
            f"layer{i}": rng.normal(size=(2, 3, 4)).astype(np.float32)
            for i in range(1, num_layers + 1)
        }
        features |= {
            f"scores{i}": rng.normal(size=(2, 2, 3, 3)).astype(np.float32)
            for i in range(1, num_layers + 1)
        }
        features["embeddings"] = rng.normal(size=(2, 3, 4)).astype(np.float32)
        return Outputs(rng.normal(size=(2, 2)).astype(np.float32), features)

    batch = {"inputs": np.array([[5, 6, 7], [5, 6, 0]], np.int32), "labels": np.array([0, 1])}
    return draw_outputs(2), draw_outputs(4), batch


def test_the_triple_loss_is_the_sum_of_its_three_terms(outputs):
    student, teacher, batch = outputs
    config = distilbert.Config(cosine_weight=0.5)
    loss = distilbert.make_triple_loss(config)(student, (teacher,), batch, CONTEXT)
    student_states = student.features["layer2"]
    teacher_states = teacher.features["layer4"]
    cosine_loss = 1 - (student_states * teacher_states).sum(-1) / np.linalg.norm(
        student_states, axis=-1
    ) / np.linalg.norm(teacher_states, axis=-1)
    # The last token of the second text is padding.
    mean = np.array([cosine_loss[0].mean(), cosine_loss[1, :2].mean()])
    soft_target_loss = losses.distillation_loss(
        student.logits,
        teacher.logits,
        batch["labels"],
        temperature=config.temperature,
        alpha=config.alpha,
    )
    np.testing.assert_allclose(loss, soft_target_loss + 0.5 * mean, rtol=1e-5)


@pytest.mark.parametrize(
    "make_loss",
    [
        distilbert.make_triple_loss,
        lambda config: distilbert.make_layer_loss(config, 2, 4),
    ],
    ids=["triple", "layers"],
)
def test_padding_does_not_change_a_loss(outputs, make_loss):
    student, teacher, batch = outputs
    loss = make_loss(distilbert.Config())

    def spoil_padding(outputs):
        features = {name: np.array(array) for name, array in outputs.features.items()}
        for name, array in features.items():
            array[1, ..., 2, :] = 1e3 if not name.startswith("scores") else 7e3
            if name.startswith("scores"):
                array[1, ..., :, 2] = -7e3
        return outputs._replace(features=features)

    expected = loss(student, (teacher,), batch, CONTEXT)
    spoiled = loss(spoil_padding(student), (spoil_padding(teacher),), batch, CONTEXT)
    np.testing.assert_allclose(spoiled, expected, rtol=1e-6)


def test_tinybert_s_terms_are_0_where_the_features_are_the_teacher_s(outputs):
    _, teacher, batch = outputs
    paired = {
        "layer1": "layer2",
        "layer2": "layer4",
        "scores1": "scores2",
        "scores2": "scores4",
        "embeddings": "embeddings",
    }
    student = teacher._replace(
        features={name: teacher.features[paired_name] for name, paired_name in paired.items()}
    )
    config = distilbert.Config()
    soft_target_loss = plans.make_soft_target_loss(config)
    np.testing.assert_allclose(
        distilbert.make_layer_loss(config, 2, 4)(student, (teacher,), batch, CONTEXT),
        soft_target_loss(student, (teacher,), batch, CONTEXT),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("experiment", "arguments", "message"),
    [
        (sentiment, ["--dropout", "1"], "--dropout 1.0"),
        (sentiment, ["--bert", "nowhere"], "no folder nowhere and no installed package"),
        (sentiment, ["--frozen-layers", "4"], "has 4 layers"),
        (sentiment, ["--max-length", "99"], "has positions for 24 tokens"),
        (sentiment, ["--max-length", "2"], "needs at least 3 tokens"),
        (sentiment, ["--unlabelled", "nowhere.txt"], "nowhere.txt does not exist"),
        (
            distilbert,
            ["--layers", "0", "7"],
            "--layers 0 7: choose different layers from 0 to 3",
        ),
        (distilbert, ["--map-weight", "-1"], "--map-weight -1.0"),
        (distilbert, ["--teacher-learning-rate", "0"], "must be above 0"),
    ],
)
def test_invalid_options_end_in_one_line(experiment, arguments, message, refuse, sentences, bert):
    defaults = ["--dataset", str(sentences)]
    if "--bert" not in arguments:
        defaults += ["--bert", str(bert)]
    assert message in refuse(experiment, *defaults, *arguments)


def test_a_text_that_is_too_long_for_bert_is_named(sentences, bert, tmp_path, refuse):
    for name in ("train.tsv", "test.tsv"):
        (tmp_path / name).write_text((sentences / name).read_text())
    (tmp_path / "test.tsv").write_text(f"fine .\tpositive\n{'very ' * 30}bad\tnegative\n")
    message = refuse(sentiment, "--dataset", str(tmp_path), "--bert", str(bert))
    assert "test.tsv, line 2 has 33 tokens" in message and "24" in message
    config = sentiment.Config(dataset=str(tmp_path), bert=str(bert), max_length=16)
    assert texts.encode(config, texts.load(config)).test["inputs"].shape[1] == 16


def test_layer_rules_leave_out_the_other_layers():
    convert = make_transfer(transfer.layer_rules("params/block{i}/{rest...}", (1,)))
    source = {"params": {"block0": {"w": np.zeros(2)}, "block1": {"w": np.ones(2)}}}
    fresh = {"params": {"block0": {"w": np.zeros(2)}}}
    assert convert(source, fresh)["params"]["block0"]["w"].tolist() == [1, 1]
