"""Tests of `jaxkd export`: each format gives the student's logits."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest

from jaxkd import models, runs, weights
from jaxkd._messages import shorten
from jaxkd.cli.main import main
from jaxkd.data import tokens
from jaxkd.runs import growth, report

NAMES = ("cat", "dog", "elk")
TEXTS = ["a good film", "a bad film", "an utter bore, and far too long"] * 5


def save(folder, module, inputs, normalize=False, **more):
    """Saves a student and returns a function of its logits."""
    model = models.from_linen(module)
    if normalize:
        model = models.with_input_normalization(model, [0.4] * 3, [0.25] * 3)
    variables = jax.jit(model.init)(jax.random.key(0), inputs[:2])
    # Not only biases of 0 and statistics of new layers.
    key = jax.random.key(1)
    variables = jax.tree.map(
        lambda leaf: leaf + 0.01 * jax.random.normal(key, leaf.shape), variables
    )
    weights.save_student(folder, model, variables, inputs[0], class_names=NAMES, **more)
    return lambda inputs: model.apply(variables, inputs, train=False)[0].logits


def make_images(count=5, size=32):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnet")
    return folder, save(folder, models.resnet20(num_classes=3), make_images(), normalize=True)


def fail(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(["export", *map(str, arguments)])
    return str(stop.value.code)


@pytest.mark.parametrize("kind", ["jaxexport", "safetensors"])
def test_copies(resnet, tmp_path, kind, capsys):
    output = tmp_path / "out"
    main(["export", str(resnet[0]), "--format", kind, "-o", str(output)])
    assert output.read_bytes() == (resnet[0] / f"student.{kind}").read_bytes()
    assert capsys.readouterr().out == f"wrote {output}\n"


def test_torch(resnet, tmp_path):
    folder, logits_fn = resnet
    output = tmp_path / "student.safetensors"
    main(["export", str(folder), "--format", "torch", "-o", str(output)])
    names = weights.read_safetensors(output)
    assert names["conv1.weight"].shape == (16, 3, 3, 3)
    module = models.resnet20(num_classes=3)
    target = models.from_linen(module).init(jax.random.key(5), np.zeros((1, 32, 32, 3)))
    variables, _ = weights.load_variables(output, target, module.torch_rules())
    model = models.with_input_normalization(models.from_linen(module), [0.4] * 3, [0.25] * 3)
    logits = model.apply(variables, make_images(), train=False)[0].logits
    np.testing.assert_allclose(logits, logits_fn(make_images()), atol=1e-5)


@pytest.mark.parametrize("network", ["CNN", "resnet20", "wrn16_2", "plain4", "vgg8"])
def test_onnx_of_images(tmp_path, network):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("jax2onnx")
    module = models.make_module(network, num_classes=3)
    logits_fn = save(tmp_path, module, make_images(), normalize=True)
    output = tmp_path / "student.onnx"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        main(["export", str(tmp_path), "--format", "onnx", "-o", str(output)])
    session = onnxruntime.InferenceSession(output)
    assert session.get_inputs()[0].type == "tensor(uint8)"
    names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
    assert tuple(names) == NAMES
    for count in (1, 5):
        (logits,) = session.run(["logits"], {"inputs": make_images(count)})
        np.testing.assert_allclose(logits, logits_fn(make_images(count)), atol=1e-4)


@pytest.mark.parametrize(
    "module",
    [
        models.LSTMClassifier(300, 8, (8, 4), 8, num_classes=3),
        models.BERT(
            300,
            hidden=8,
            layers=2,
            heads=2,
            intermediate=16,
            positions=40,
            num_classes=3,
            pooling=models.mean_pooling,
        ),
    ],
    ids=["lstm", "bert"],
)
def test_onnx_of_texts_of_any_length(tmp_path, module):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("jax2onnx")
    tokenizer = tokens.train_tokenizer(TEXTS, vocab_size=280)
    ids = tokens.encode(tokenizer, TEXTS, max_length=40)
    logits_fn = save(tmp_path, module, ids, tokenizer=tokenizer, max_length=40)
    output = tmp_path / "student.onnx"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        main(["export", str(tmp_path), "--format", "onnx", "-o", str(output)])
    session = onnxruntime.InferenceSession(output)
    for texts in (TEXTS[:1], TEXTS[1:3], ["far too long, " * 3]):
        batch = tokens.encode(tokenizer, texts, max_length=40, truncate=True)
        (logits,) = session.run(["logits"], {"inputs": batch})
        np.testing.assert_allclose(logits, logits_fn(batch), atol=1e-4)


def test_operation_that_onnx_lacks(tmp_path):
    pytest.importorskip("jax2onnx")

    def apply(variables, inputs, *, train, key=None):
        del train, key
        logits, _ = jax.lax.linalg.schur(inputs[:, :2, :2, 0].astype(np.float32))
        return models.Outputs(logits[:, 0] * variables["params"]["a"], {}), {}

    model = models.Model(lambda key, inputs: {}, apply)
    example = jax.ShapeDtypeStruct((32, 32, 3), np.uint8)
    variables = {"params": {"a": np.float32(1)}, "batch_stats": {}}
    with pytest.raises(ValueError, match="converted to ONNX: the operation schur failed"):
        weights.save_onnx(tmp_path / "x.onnx", model, variables, example)


def test_missing_converter(resnet, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    message = fail(resnet[0], "--format", "onnx", "-o", tmp_path / "x.onnx")
    assert "jax2onnx" in message and "[onnx]" in message
    assert not (tmp_path / "x.onnx").exists()


def test_nothing_is_overwritten(resnet, tmp_path):
    output = tmp_path / "student.onnx"
    output.write_text("mine")
    assert "exists: choose another --output" in fail(resnet[0], "--format", "onnx", "-o", output)
    assert output.read_text() == "mine"
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "absent")
    assert "exists: choose another" in fail(resnet[0], "--format", "safetensors", "-o", link)
    assert not (tmp_path / "absent").exists()
    assert f"{tmp_path} is not a regular file: choose another --output" in fail(
        resnet[0], "--format", "torch", "-o", tmp_path
    )


def test_a_student_that_is_older_than_its_run_is_said(resnet, tmp_path, capsys):
    folder = tmp_path / "run"
    run = runs.open_run(folder, {"epochs": 1})
    shutil.copytree(resnet[0], folder, dirs_exist_ok=True)
    run.append_metrics({"seed": 0, "stage": "a", "step": 1, "validation_accuracy": 0.5})
    report.report_run(run, [runs.ResultRow("a", accuracy=(0.5,), parameters=1)], title="Run")
    np.save(tmp_path / "x.npy", make_images(1))
    commands = [
        ["export", folder, "--format", "jaxexport", "-o", tmp_path / "out"],
        ["predict", folder, tmp_path / "x.npy"],
        ["predict", folder / "student.jaxexport", tmp_path / "x.npy"],
        ["report", folder],
    ]
    for command in commands:
        main([*map(str, command)])
    assert "note" not in capsys.readouterr().err
    growth.record_growth(runs.open_run(folder, {"epochs": 300}, grow=True), trains=True)
    (tmp_path / "out").unlink()
    for command in commands:
        main([*map(str, command)])
        assert capsys.readouterr().err == (
            f"note: {shorten(folder, 80)} goes on (epochs was 1 and is 300) and is not finished: "
            "its results and its student are those before\n"
        )


@pytest.mark.parametrize("kind", ["onnx", "torch", "jaxexport", "safetensors"])
def test_files_of_different_students_are_not_exported(resnet, tmp_path, kind):
    folder = tmp_path / "mixed"
    shutil.copytree(resnet[0], folder)
    variables = weights.load_safetensors(folder)
    weights.save_safetensors(folder / "student.safetensors", variables, class_names=("a", "b", "c"))
    message = fail(folder, "--format", kind, "-o", tmp_path / "out")
    assert "student.safetensors does not belong to student.json" in message
    assert len(message) <= 300 and not (tmp_path / "out").exists()


def test_bad_runs(resnet, tmp_path):
    output = tmp_path / "out"
    for kind in ("onnx", "torch", "jaxexport", "safetensors"):
        message = fail(tmp_path, "--format", kind, "-o", output)
        assert "name the folder of a finished run" in message
    assert "does not exist" in fail(resnet[0], "--format", "onnx", "-o", tmp_path / "no" / "x")
    shutil.copytree(resnet[0], tmp_path / "own")
    (tmp_path / "own" / "student.jaxexport").unlink()
    card = json.loads((tmp_path / "own" / "student.json").read_text())
    (tmp_path / "own" / "student.json").write_text(json.dumps(card | {"network": None}))
    message = fail(tmp_path / "own", "--format", "torch", "-o", output)
    assert "jaxkd cannot make: use its student.jaxexport" in message
