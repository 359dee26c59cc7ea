"""Tests of `jaxkd distill`: plans, teachers from files, messages, and a run from start to end."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
import tyro
from PIL import Image

from jaxkd import data, distill, models, runs, weights
from jaxkd.cli.distill import DistillCommand
from jaxkd.cli.distillation import load_problem, make_plan
from jaxkd.cli.image_problem import ImageProblem
from jaxkd.cli.main import main
from jaxkd.data.records import Column
from jaxkd.distill import methods
from jaxkd.runs import verify
from jaxkd.runs.run import read_run

NAMES = ("dark", "light")
SMALL = "CNN(features=(4,), hidden=8)"


def make_dataset(num_classes=2, size=16, count=40, channels=3):
    rng = np.random.default_rng(0)
    labels = (np.arange(count) % num_classes).astype(np.int32)
    brightness = 60 * labels[:, None, None, None] + 40
    images = rng.integers(0, 40, (count, size, size, channels)) + brightness
    split = data.Split(images.astype(np.uint8), labels)
    names = NAMES if num_classes == 2 else tuple(f"class {i}" for i in range(num_classes))
    return data.Dataset(split, split, split, names)


def plan_of(dataset=None, **options):
    options = DistillCommand(**{"data": "x", "student": SMALL, "teacher": SMALL} | options)
    statistics = (options.teacher_mean, options.teacher_std) if options.teacher_mean else None
    problem = ImageProblem(dataset or make_dataset(), statistics=statistics)
    return make_plan(options, problem, problem.make_teacher(options.teacher))


def by_name(plan):
    return {entry.name: entry for entry in plan}


def save_torch(path, module, image_shape=(16, 16, 3)):
    variables = models.from_linen(module).init(jax.random.key(1), np.zeros((1, *image_shape)))
    weights.save_torch(path, variables, module.torch_rules())
    return variables


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Returns a folder of photographs of two classes, dark and light."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 6)):
        for label, name in enumerate(NAMES):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (12, 12, 3)) + 150 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{i}.png")
    return folder


def parse_options(arguments):
    return tyro.cli(DistillCommand, args=arguments)


@pytest.mark.thorough
def test_distil_then_predict(photos, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = [
        *("distill", "--data", str(photos), "--image-size", "16", "--teacher", SMALL),
        *("--student", SMALL, "--method", "kd", "hint", "--num-seeds", "2", "--epochs", "8"),
        *("--batch-size", "8", "--learning-rate", "0.01", "--log", "lines"),
        *("--workdir", str(run)),
    ]
    # As outside of the tests: optax's schedules mix floats and integers.
    with jax.numpy_dtype_promotion("standard"):
        main(arguments)
    output = capsys.readouterr().out
    assert "student_hint" in output and f"jaxkd predict {run} FILES" in output
    logged, recorded = (run / "training.log").read_text(), (run / "metrics.jsonl").read_text()
    assert logged.count("\n") == recorded.count("\n") > 0
    rows = json.loads((run / "results.json").read_text())
    assert [row["name"] for row in rows] == [
        "teacher",
        "student_alone",
        "student_kd",
        "student_hint",
    ]
    main(["predict", str(run), str(photos / "test" / "light"), "--json"])
    classes = [row["classes"][0]["class"] for row in json.loads(capsys.readouterr().out)]
    assert classes == ["light"] * 6
    # What a run notes of its files is no option.
    recorded = read_run(run).config | {"teacher_source": {"commit": "0123"}}
    options = verify.command_line_options(recorded)
    assert parse_options(options) == dataclasses.replace(
        parse_options(arguments[1:]), workdir=None, log=()
    )
    # More seeds keep those that are trained.
    seeds = arguments.index("--num-seeds") + 1
    with jax.numpy_dtype_promotion("standard"):
        main([*arguments[:seeds], "3", *arguments[seeds + 1 :]])
    assert "keeps 8 of 12 trainings, goes on with 0, trains 4\n" in capsys.readouterr().out
    rows = json.loads((run / "results.json").read_text())
    assert [len(row["accuracy"]) for row in rows] == [3, 3, 3, 3]
    # The student of this run teaches the next one.
    with jax.numpy_dtype_promotion("standard"):
        main([*arguments[:6], str(run), *arguments[7:-1], str(tmp_path / "second"), "--stream"])
    assert "student_kd" in capsys.readouterr().out


def test_stream_reads_images_when_they_are_needed(photos):
    first, second = (
        load_problem(DistillCommand(data=str(photos), image_size=side, stream=True))
        for side in (16, 8)
    )
    assert first.train["inputs"].shape == (36, 16, 16, 3)
    assert isinstance(first.train["inputs"], Column) and isinstance(first.test["inputs"], Column)
    assert runs.fingerprint(first.arrays) != runs.fingerprint(second.arrays)
    assert make_plan(DistillCommand(data="x", student=SMALL), first, first.make_teacher(SMALL))


def test_plan_of_several_methods_and_an_assistant():
    plan = by_name(plan_of(method=("kd", "attention"), assistant=SMALL))
    assert [*plan] == [
        *("teacher", "student_alone", "assistant", "student_kd", "student_attention"),
        *("student_kd_assisted", "student_attention_assisted"),
    ]
    assert plan["student_kd"].teachers == ("teacher",) and plan["student_kd"].cache_teachers
    assert plan["student_kd_assisted"].teachers == ("assistant",)
    # Its loss compares features, which a cache does not have.
    assert not plan["student_attention"].cache_teachers


def test_what_stages_return():
    plan = by_name(plan_of(ema_decay=0.9, best="loss", patience=2))
    assert {stage.ema_decay for stage in plan.values()} == {0.9}
    assert {stage.best for stage in plan.values()} == {distill.Best("loss", patience=2)}
    assert {stage.best for stage in plan_of()} == {None}


def test_few_labels():
    plan = by_name(plan_of(num_labels=6))
    assert len(plan["student_alone"].examples(0)["labels"]) == 6
    assert plan["student_kd"].examples(0)["labelled"].sum() == 6
    assert len(plan["teacher"].examples(0)["labels"]) == 40


def test_networks_that_are_not_named_suit_the_size(capsys):
    problem = ImageProblem(make_dataset(size=28))
    assert problem.default_student == "CNN(features=(16, 32), hidden=32)"
    problem.make_teacher("auto")
    output = capsys.readouterr().out
    assert "the teacher is trained: CNN(features=(64, 128), hidden=128)" in output
    large = ImageProblem(make_dataset(size=96)).default_student
    assert large == "CNN(features=(16, 32, 64, 64), hidden=32)"


def test_weights_with_the_same_classes_teach_as_they_are(tmp_path, capsys):
    module = models.resnet20(num_classes=2)
    variables = save_torch(tmp_path / "net.safetensors", module)
    plan = by_name(plan_of(teacher=f"resnet20:{tmp_path / 'net.safetensors'}"))
    assert isinstance(plan["teacher"], distill.Pretrained)
    kernel = plan["teacher"].variables["params"]["logits"]["kernel"]
    np.testing.assert_array_equal(kernel, variables["params"]["logits"]["kernel"])
    output = capsys.readouterr().out
    assert "dark is taken for its first one, light for its last one" in output
    assert "normalised by the statistics of the data" in output


def test_weights_with_other_classes_are_fine_tuned(tmp_path, capsys):
    save_torch(tmp_path / "net.safetensors", models.resnet20(num_classes=10))
    problem = ImageProblem(make_dataset())
    teacher = problem.make_teacher(f"resnet20:{tmp_path / 'net.safetensors'}")
    fresh = teacher.model.init(jax.random.key(0), make_dataset().train.images[:1])
    start = teacher.fine_tuning["transfer"](teacher.variables, fresh)
    assert start["params"]["logits"]["kernel"].shape == (64, 2)
    assert not np.any(start["params"]["logits"]["kernel"])
    assert "gets a new last layer and is fine-tuned" in capsys.readouterr().out


def test_statistics_of_a_teacher(tmp_path):
    save_torch(tmp_path / "net.safetensors", models.resnet20(num_classes=2))
    plan = by_name(
        plan_of(
            teacher=f"resnet20:{tmp_path / 'net.safetensors'}",
            teacher_mean=(0.1, 0.2, 0.3),
            teacher_std=(0.4, 0.5, 0.6),
        )
    )
    assert plan["teacher"].model.network.mean == pytest.approx((0.1, 0.2, 0.3))


def save_run(folder, names=NAMES):
    network = models.from_linen(models.CNN((4,), 8, num_classes=2))
    model = models.with_input_normalization(network, [0.5] * 3, [0.25] * 3)
    images = make_dataset().train.images
    variables = model.init(jax.random.key(3), images[:1])
    folder.mkdir()
    weights.save_student(folder, model, variables, images[0], class_names=names)
    return model, variables


def test_student_of_a_run_teaches_with_its_classes_in_the_order_of_the_data(tmp_path, capsys):
    model, variables = save_run(tmp_path / "run", names=("light", "dark"))
    teacher = by_name(plan_of(teacher=str(tmp_path / "run")))["teacher"]
    images = make_dataset().train.images[:4]
    logits = teacher.model.apply(teacher.variables, images, train=False)[0].logits
    expected = model.apply(variables, images, train=False)[0].logits[:, ::-1]
    np.testing.assert_allclose(logits, expected, rtol=1e-5)
    assert "matched by name" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student": "resnet21"}, "--student: there is no network 'resnet21'"),
        ({"student": "CNN(features=(4, 4, 4, 4, 4))"}, "--student .* does not fit inputs of 16 x"),
        ({"student": "CNN(num_classes=3)"}, "the data has 2 classes: leave out num_classes"),
        (
            {"student": "LSTMClassifier(vocab_size=9)"},
            "LSTMClassifier reads texts, but the data are images: choose a network of images, such",
        ),
        ({"student": "BERT(layers=3)"}, "BERT reads texts, but the data are images"),
        ({"teacher": "resnet20:gone.th"}, "there is no file gone.th"),
        ({"teacher": "gone/resnet20.th"}, "write NETWORK:gone/resnet20.th"),
        ({"teacher": "nothing:pyproject.toml"}, "there is no network 'nothing'"),
        ({"method": ("kdd",)}, "--method kdd: there is no method 'kdd': choose from kd"),
        ({"method": ("dkd",), "num_labels": 4}, "--method dkd reads every label"),
        ({"num_labels": 400}, "400 labelled images asked for"),
        ({"teacher": "CNN(features=(4, 8), hidden=8)", "method": ("attention",)}, None),
        ({"teacher": "resnet20", "method": ("attention",)}, "--method attention"),
        (
            {"teacher": "resnet20", "teacher_mean": (0.5,), "teacher_std": (0.2,)},
            "--teacher-mean and --teacher-std are for --teacher NETWORK:FILE",
        ),
    ],
)
def test_bad_options(options, message):
    if message is None:
        assert plan_of(**options)
        return
    with pytest.raises(ValueError, match=message) as error:
        plan_of(**options)
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("resnet20:RUN", "left over; RUN holds {}: pass --teacher RUN"),
        ("resnet20:RUN/student.safetensors", "left over; RUN holds {}: pass --teacher RUN"),
        ("resnet20:RUN/student.jaxexport", "a program of jax.export, not a file of weights: give"),
        (f"{SMALL}:RUN", "takes no file of weights; RUN holds {}: pass --teacher RUN"),
        (f"{SMALL}:RUN/student.jaxexport", "takes no file of weights; RUN holds {}: pass"),
        ("RUN/student.jaxexport", "RUN/student.jaxexport is a file of a student: pass the folder"),
        ("RUN/student.safetensors", "is a file of a student: pass the folder, --teacher RUN"),
    ],
)
def test_students_that_are_named_as_files_of_weights(tmp_path, monkeypatch, teacher, message):
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "RUN")
    # A warning on what the network would lack is an error of the tests.
    with pytest.raises(ValueError) as error:
        plan_of(teacher=teacher)
    assert message.format("CNN(features=(4,), hidden=8, num_classes=2)") in str(error.value)
    assert len(str(error.value)) <= 300


def test_network_that_takes_no_file(tmp_path):
    save_torch(tmp_path / "net.safetensors", models.resnet20(num_classes=2))
    with pytest.raises(ValueError, match="no file of weights; train it, or pass the folder of a"):
        plan_of(teacher=f"{SMALL}:{tmp_path / 'net.safetensors'}")


def test_teacher_without_the_classes_of_the_data(tmp_path):
    save_run(tmp_path / "run", names=("cat", "dog"))
    with pytest.raises(ValueError, match="--teacher .*: "):
        plan_of(teacher=str(tmp_path / "run"))


def test_teacher_of_images_of_another_size(tmp_path):
    save_run(tmp_path / "run", names=("dark", "light"))
    message = "was trained on images of 16 x 16 x 3, and these are 24 x 24 x 3: --image-size 16"
    with pytest.raises(ValueError, match=message):
        plan_of(make_dataset(size=24), teacher=str(tmp_path / "run"))


def test_weights_that_do_not_fit(tmp_path):
    save_torch(tmp_path / "net.safetensors", models.resnet32(num_classes=2))
    with pytest.raises(ValueError, match="does not fit: .* is missing or left over"):
        plan_of(teacher=f"resnet20:{tmp_path / 'net.safetensors'}")


def test_colour_weights_for_grey_images(tmp_path):
    save_torch(tmp_path / "net.safetensors", models.resnet20(num_classes=2))
    with pytest.raises(ValueError, match="grey|conv"):
        plan_of(make_dataset(channels=1), teacher=f"resnet20:{tmp_path / 'net.safetensors'}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs: must be at least 1"),
        (["--alpha", "2"], "--alpha: must be from 0 to 1"),
        (["--ema-decay", "1"], "--ema-decay: must be between 0 and 1"),
        (["--patience", "3"], "--patience needs --best accuracy or --best loss"),
        (["--best", "loss", "--patience", "0"], "--patience: must be at least 1"),
        (["--temperature", "0"], "--temperature"),
        (["--method", "kd", "kd"], "--method names one twice"),
        (["--log", "lines", "lines"], "--log names one twice"),
        (["--teacher-mean", "0.5"], "give both, or none"),
        (["--num-seeds", "100000"], "--num-seeds 100000: must be at most 10,000"),
        (["--workdir", "/dev/null/x"], "--workdir"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["distill", "--data", "no such data", *arguments])
    assert message in str(stop.value.code)


@pytest.mark.parametrize("folder", ["photos", "photos/train/new", "photos/../photos/x", "link/x"])
def test_run_within_the_data(photos, tmp_path, monkeypatch, folder):
    monkeypatch.chdir(photos.parent)
    (tmp_path / "link").symlink_to(photos)
    folder = folder.replace("link", str(tmp_path / "link"))
    before = sorted(photos.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(["distill", "--data", "photos", "--workdir", folder])
    assert f"--workdir {folder} is within --data photos, where the next start" in stop.value.code
    assert len(stop.value.code) <= 300 and sorted(photos.rglob("*")) == before
    # Beside it, and a name of data that is no folder.
    DistillCommand(data="photos", workdir="photos2/run").check()
    DistillCommand(data="cifar10", workdir="cifar10/run").check()


def test_unknown_data():
    with pytest.raises(SystemExit, match="no such folder|no dataset|there is no"):
        main(["distill", "--data", "nowhere/at/all"])


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_has_a_finite_gradient(name):
    dataset = make_dataset()
    networks = [models.from_linen(models.CNN((4,), width, num_classes=2)) for width in (8, 12)]
    images = dataset.train.images[:8].astype(np.float32) / 255
    variables = [model.init(jax.random.key(i), images) for i, model in enumerate(networks)]
    outputs = [
        model.apply(weights_, images, train=False)[0]
        for model, weights_ in zip(networks, variables, strict=True)
    ]
    method = methods.make_method(name, *outputs, temperature=2.0)
    params = method.init(jax.random.key(0)) if method.init else None
    context = distill.LossContext(0, 0.0, jax.random.key(0), params, 0)
    loss = methods.make_loss(method)
    batch = {"labels": dataset.train.labels[:8]}

    def total(student, params):
        values = loss(student, (outputs[1],), batch, context._replace(params=params))
        return values.mean(), values

    gradient_of = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, values), (of_outputs, of_params) = gradient_of(outputs[0], params)
    assert values.shape == (8,)
    chex.assert_tree_all_finite((values, of_outputs, of_params))
    # The cross-entropy alone gives no gradient to features and parameters.
    term = method.term(outputs[0], outputs[1], batch, context)
    assert np.shape(term) == (8,) and np.abs(term).max() > 0
    if name not in methods.LOGIT_METHODS:
        assert any(np.any(leaf) for leaf in jax.tree.leaves(of_outputs.features))
    for leaf in jax.tree.leaves(of_params):
        assert np.any(leaf) or name == "ctkd"  # whose temperature starts to move after step 0


def test_methods_that_follow_the_training_need_its_length():
    outputs = models.Outputs(jax.numpy.zeros((2, 3)), {})
    context = distill.LossContext(0, None, jax.random.key(0), None, None)
    method = methods.make_method("taid", outputs, outputs, temperature=2.0)
    with pytest.raises(ValueError, match="pass num_steps to make_train_step"):
        method.term(outputs, outputs, {}, context)


def test_unlabelled_examples_have_the_term_alone():
    networks = models.from_linen(models.CNN((4,), 8, num_classes=2))
    images = make_dataset().train.images[:4].astype(np.float32) / 255
    outputs = networks.apply(networks.init(jax.random.key(0), images), images, train=False)[0]
    method = methods.make_method("jsd", outputs, outputs, temperature=2.0)
    batch = {"labels": np.zeros(4, np.int32), "labelled": np.array([True, False, True, False])}
    context = distill.LossContext(0, 0.0, jax.random.key(0), None, 0)
    values = methods.make_loss(method)(outputs, (outputs,), batch, context)
    # Student and teacher agree, so that the term is 0.
    assert (np.asarray(values) > 1e-3).tolist() == [True, False, True, False]
