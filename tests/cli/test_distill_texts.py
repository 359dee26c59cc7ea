"""Tests of `jaxkd distill` on texts: tokens, BERTs, LSTMs, and a run from start to end."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxkd import distill, models, weights
from jaxkd.cli.distill import DistillCommand
from jaxkd.cli.distillation import load_problem, make_plan
from jaxkd.cli.main import main
from jaxkd.weights import hub
from jaxkd.weights.hub_download import HubSource

FILLERS = ("a", "film", "so", "it", "is", "this", "one", "plot")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "fine", "bad", "poor", *FILLERS]
LSTM = "lstm(embedding=16, hidden=(16,), dense=16)"


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """Returns a folder of sentences whose class follows from one of their words."""
    folder = tmp_path_factory.mktemp("data") / "reviews"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 120), ("test", 30)):
        lines = []
        for i in range(count):
            word = rng.choice(("good", "fine") if i % 2 else ("bad", "poor"))
            text = " ".join(rng.permutation([word, *rng.choice(FILLERS, rng.integers(4, 9))]))
            lines.append(f"{text}\t{'positive' if i % 2 else 'negative'}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Returns a hub folder of a random BERT of four layers."""
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"hidden": 8, "layers": 4, "heads": 2, "intermediate": 12, "positions": 160}
    module = models.BERT(len(WORDS), num_classes=2, pooling=models.mean_pooling, **sizes)
    variables = models.from_linen(module).init(jax.random.key(0), np.ones((1, 4), np.int32))
    config = {
        "model_type": "bert",
        "vocab_size": len(WORDS),
        "hidden_size": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "max_position_embeddings": 160,
        "type_vocab_size": 2,
        "layer_norm_eps": module.epsilon,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    save_file(weights.to_torch(variables, module.torch_rules()), folder / "model.safetensors")
    return folder


def plan_of(reviews, **options):
    options = DistillCommand(**{"data": str(reviews), "student": LSTM} | options)
    problem = load_problem(options)
    return problem, make_plan(options, problem, problem.make_teacher(options.teacher))


def test_teacher_of_its_own_tokens(reviews, capsys):
    problem, plan = plan_of(reviews)
    teacher, alone, kd = plan
    assert isinstance(teacher, distill.Stage) and kd.teachers == ("teacher",)
    assert "the teacher is trained: lstm(embedding=128" in capsys.readouterr().out
    assert problem.class_names == ("negative", "positive")
    assert problem.saving["tokenizer"].get_vocab_size() > 260
    assert alone.batch_size == 32 and alone.model.network.module.vocab_size > 260


def test_bert_is_fine_tuned_and_cut(reviews, bert):
    problem, plan = plan_of(reviews, teacher=str(bert), student="BERT(layers=2)")
    assert problem.make_teacher(str(bert)).fine_tuning["epochs"] == 2
    teacher, alone, _ = plan
    assert isinstance(teacher, distill.Pretrained) and alone.start == "teacher"
    fresh = alone.model.init(jax.random.key(1), problem.train["inputs"][:1])
    start = alone.transfer(teacher.variables, fresh)
    for block, layer in (("block0", "block0"), ("block1", "block3")):
        equal = jax.tree.map(
            np.array_equal, start["params"][block], dict(teacher.variables["params"][layer])
        )
        assert all(jax.tree.leaves(equal))
    _, (_, alone, _) = plan_of(reviews, teacher=str(bert), student="BERT(layers=2, remat=True)")
    assert alone.model.network.module.remat


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student": "BERT(layers=9)"}, r"write BERT\(layers=N\) with N from 1 to 4"),
        ({"student": "BERT(layers=2, hidden=4)"}, r"write BERT\(layers=N\)"),
        ({"student": "resnet20"}, "--student: resnet20 reads images, but the data are texts"),
        ({"max_length": 161}, "--max-length 161: must be from 3 to 160"),
        ({"image_size": 32}, "--image-size is for images, not texts"),
        ({"augment": True}, "--augment is for images, not texts"),
        ({"method": ("attention",)}, "--method attention: attention compares maps"),
        ({"teacher": "nothing"}, "there is no folder nothing"),
    ],
)
def test_bad_options(reviews, bert, options, message):
    with pytest.raises(ValueError, match=message) as error:
        plan_of(reviews, **{"teacher": str(bert)} | options)
    assert len(str(error.value)) <= 300


@pytest.fixture
def classifier(bert, tmp_path):
    """Returns a hub folder of a BERT with its own pooling, fine-tuned for the classes."""
    config = json.loads((bert / "config.json").read_text())
    config["id2label"] = {"0": "positive", "1": "negative"}
    sizes = {"hidden": 8, "layers": 4, "heads": 2, "intermediate": 12, "positions": 160}
    module = models.BERT(len(WORDS), num_classes=2, **sizes)
    variables = models.from_linen(module).init(jax.random.key(0), np.ones((1, 4), np.int32))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    save_file(weights.to_torch(variables, module.torch_rules()), tmp_path / "model.safetensors")
    return tmp_path


def test_a_classifier_of_the_classes_teaches_as_it_is(reviews, classifier, capsys):
    problem, plan = plan_of(reviews, teacher=str(classifier), student="BERT(layers=2)")
    assert problem.make_teacher(str(classifier)).fine_tuning is None
    assert "classifies the classes of the data: it teaches as it is" in capsys.readouterr().out
    teacher, student, _ = plan
    loaded = hub.load_bert(classifier, num_classes=2, key=jax.random.key(1))
    ids = problem.train["inputs"][:4]
    expected = models.from_linen(loaded.module).apply(loaded.variables, ids, train=False)[0]
    logits = teacher.model.apply(teacher.variables, ids, train=False)[0].logits
    # The data's classes are sorted, the other way round.
    np.testing.assert_allclose(logits, expected.logits[:, ::-1], atol=1e-6)
    fresh = student.model.init(jax.random.key(1), ids)
    start = student.transfer(teacher.variables, fresh)["params"]
    np.testing.assert_array_equal(
        start["pooler"]["kernel"], teacher.variables["params"]["pooler"]["kernel"]
    )


@pytest.mark.parametrize("names", [{"0": "bad", "1": "good"}, None])
def test_a_classifier_of_other_classes_is_fine_tuned(reviews, classifier, names):
    config = json.loads((classifier / "config.json").read_text()) | {"id2label": names}
    (classifier / "config.json").write_text(json.dumps(config))
    problem, (teacher, *_) = plan_of(reviews, teacher=str(classifier))
    assert problem.make_teacher(str(classifier)).fine_tuning["epochs"] == 2
    assert "pooler" in teacher.variables["params"]


def test_bert_student_of_another_teacher(reviews):
    with pytest.raises(ValueError, match="needs a BERT as --teacher"):
        plan_of(reviews, student="BERT(layers=2)")


def test_options_of_texts_for_images():
    with pytest.raises(ValueError, match="--text-column is for texts, not images"):
        load_problem(DistillCommand(data="fashion_mnist_mini", text_column="a"))


@pytest.fixture
def source(bert, monkeypatch):
    """Lets hub:owner/name stand for the folder of the BERT, and returns where it comes from."""
    source = HubSource("owner/name", "0" * 40, {"config.json": "1" * 64})
    monkeypatch.setattr(hub, "download", lambda name: (bert, source))
    return source


@pytest.mark.thorough
def test_distil_then_predict(reviews, source, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = [
        *("distill", "--data", str(reviews), "--teacher", "hub:owner/name", "--student", LSTM),
        *("--num-seeds", "1", "--epochs", "12", "--learning-rate", "0.02", "--workdir", str(run)),
    ]
    # As outside of the tests: optax's schedules mix floats and integers.
    with jax.numpy_dtype_promotion("standard"):
        main(arguments)
    output = capsys.readouterr().out
    assert "student_kd" in output and "teacher" in output
    # The same command finds everything trained.
    with jax.numpy_dtype_promotion("standard"):
        main(arguments)
    config = json.loads((run / "config.json").read_text())["config"]
    assert config["teacher_source"] == source._asdict()
    texts = tmp_path / "texts.txt"
    texts.write_text("so good a film\nit is so bad\n")
    capsys.readouterr()
    main(["predict", str(run / "student.jaxexport"), str(texts), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["classes"][0]["class"] for row in rows] == ["positive", "negative"]


@pytest.mark.parametrize("name", ["", "student.jaxexport"])
def test_student_of_a_run_as_the_teacher_of_texts(reviews, tmp_path, name):
    (tmp_path / "student.json").touch()
    with pytest.raises(ValueError, match="the student of a run teaches images, not texts; give"):
        load_problem(DistillCommand(data=str(reviews), teacher=str(tmp_path / name)))
