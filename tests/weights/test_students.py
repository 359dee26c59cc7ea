"""Tests of students that travel: program, description, tokenizer."""

import io
import json
import shutil
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import models, weights
from jaxkd._messages import shorten
from jaxkd.data import tokens

NAMES = ("cat", "dog", "elk")
TEXTS = ["a good film", "a bad film", "an utter bore, and far too long", "good"] * 5


def make_images(count=5):
    return np.random.default_rng(0).integers(0, 256, (count, 9, 8, 1), np.uint8)


@pytest.fixture(scope="module")
def image_student(tmp_path_factory):
    """Returns a folder of a student of images, its model and its variables."""
    folder = tmp_path_factory.mktemp("images")
    network = models.from_linen(models.CNN((4,), 8, num_classes=3))
    model = models.with_input_normalization(network, 0.5, 0.25)
    images = make_images()
    variables = model.init(jax.random.key(0), images)
    weights.save_student(folder, model, variables, images[0], class_names=NAMES)
    return folder, model, variables


@pytest.fixture(scope="module")
def text_student(tmp_path_factory):
    """Returns a folder of a student of texts, its model, variables and tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    tokenizer = tokens.train_tokenizer(TEXTS, vocab_size=280)
    model = models.from_linen(models.LSTMClassifier(300, 4, (4,), 4, num_classes=3))
    ids = tokens.encode(tokenizer, TEXTS, max_length=40)
    variables = model.init(jax.random.key(0), ids)
    weights.save_student(
        folder,
        model,
        variables,
        ids[0],
        class_names=NAMES,
        tokenizer=tokenizer,
        max_length=40,
    )
    return folder, model, variables, tokenizer


def probabilities_of(model, variables, inputs):
    return jax.nn.softmax(model.apply(variables, jnp.asarray(inputs), train=False)[0].logits)


def test_student_of_images_predicts_what_its_model_does(image_student):
    folder, model, variables = image_student
    student = weights.load_student(folder)
    assert student.class_names == NAMES
    assert student.card == weights.StudentCard(
        "images",
        (9, 8, 1),
        "uint8",
        NAMES,
        "CNN(features=(4,), hidden=8, num_classes=3)",
        (0.5,),
        (0.25,),
    )
    images = make_images(300)
    expected = probabilities_of(model, variables, images)
    np.testing.assert_allclose(student.predict(images), expected, atol=1e-6)


def test_program_alone_is_enough(image_student, tmp_path):
    folder, model, variables = image_student
    shutil.copy(folder / "student.jaxexport", tmp_path / "renamed")
    student = weights.load_student(tmp_path / "renamed")
    images = make_images()
    assert student.class_names == NAMES
    expected = probabilities_of(model, variables, images)
    np.testing.assert_allclose(student.predict(images), expected, atol=1e-6)


def test_weights_and_description_are_enough(image_student, tmp_path):
    folder, *_ = image_student
    for name in ("student.safetensors", "student.json"):
        shutil.copy(folder / name, tmp_path)
    images = make_images()
    from_weights = weights.load_student(tmp_path).predict(images)
    np.testing.assert_allclose(from_weights, weights.load_student(folder).predict(images), 1e-5)


def test_program_predicts_without_flax(image_student):
    folder, *_ = image_student
    code = (
        "import sys; sys.modules['flax'] = None\n"
        "import numpy as np; from jaxkd import weights\n"
        f"student = weights.load_student({str(folder / 'student.jaxexport')!r})\n"
        "print(student.predict(np.zeros((2, 9, 8, 1), np.uint8)).shape)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "(2, 3)", result.stderr


def test_jax_reads_the_program_and_zip_the_rest(image_student):
    folder, *_ = image_student
    content = (folder / "student.jaxexport").read_bytes()
    program = jax.export.deserialize(bytearray(content))
    assert program.call(jnp.zeros((4, 9, 8, 1), jnp.uint8)).shape == (4, 3)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert json.loads(archive.read("student.json"))["class_names"] == [*NAMES]


def test_equal_students_have_equal_bytes(image_student, tmp_path):
    folder, model, variables = image_student
    weights.save_student(tmp_path, model, variables, make_images()[0], class_names=NAMES)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


@pytest.mark.parametrize("from_weights", [False, True])
def test_student_of_texts_takes_texts_of_any_length(text_student, tmp_path, from_weights):
    folder, model, variables, tokenizer = text_student
    if from_weights:
        for name in ("student.safetensors", "student.json", "tokenizer.json"):
            shutil.copy(folder / name, tmp_path)
        folder = tmp_path
    student = weights.load_student(folder)
    assert student.card.inputs == "texts" and student.card.shape == (40,)
    for texts in (["good", "a bad film"], ["far too long, " * 4]):
        ids, num_cut = student.encode(texts)
        assert num_cut == sum(len(tokenizer.encode(text).ids) > 40 for text in texts)
        plain = tokens.encode(tokenizer, texts, max_length=40, truncate=True)
        expected = probabilities_of(model, variables, plain)
        np.testing.assert_allclose(student.predict(ids), expected, atol=1e-6)


def test_long_texts_are_cut_and_counted(text_student):
    student = weights.load_student(text_student[0])
    ids, num_cut = student.encode(["good", "good " * 60])
    assert num_cut == 1 and ids.shape == (2, 40)


def test_program_without_a_description_has_no_names(image_student, tmp_path):
    _, model, variables = image_student
    example = jax.ShapeDtypeStruct((9, 8, 1), jnp.uint8)
    weights.save_program(tmp_path / "plain.jaxexport", model, variables, example)
    student = weights.load_student(tmp_path / "plain.jaxexport")
    assert student.class_names == () and student.card.shape == (9, 8, 1)
    assert student.predict(make_images()).shape == (5, 3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            np.zeros((2, 9, 9, 1), np.uint8),
            r"takes uint8 \[N, 9, 8, 1\].* \[2, 9, 9, 1\]",
        ),
        (np.zeros((2, 9, 8, 1), np.float32), "got float32"),
        (np.zeros((9, 8, 1), np.uint8), "N at least 1"),
        (np.zeros((0, 9, 8, 1), np.uint8), "N at least 1"),
    ],
)
def test_wrong_inputs(image_student, inputs, message):
    with pytest.raises(ValueError, match=message):
        weights.load_student(image_student[0]).predict(inputs)


def test_texts_for_a_student_of_images(image_student):
    with pytest.raises(ValueError, match="reads images, not texts"):
        weights.load_student(image_student[0]).encode(["a"])


def test_folder_without_a_student(tmp_path):
    with pytest.raises(ValueError, match=r"has no student: .* name that file or its folder"):
        weights.load_student(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[: len(content) // 2], "no complete program|is damaged"),
        (lambda content: b"", "no complete program"),
        (lambda content: b"\xff" * 100, "no complete program"),
        (lambda content: content[:-40] + b"\0" * 18 + content[-22:], "is damaged"),
        (lambda content: content[:900] + b"\1\2\3" + content[903:], "not have its checksum"),
        (lambda content: b"\0" + content, "not have its checksum"),
    ],
)
def test_damaged_programs(image_student, tmp_path, change, message):
    content = (image_student[0] / "student.jaxexport").read_bytes()
    path = tmp_path / "student.jaxexport"
    path.write_bytes(change(content))
    with pytest.raises(ValueError, match=message) as error:
        weights.load_student(path)
    assert len(str(error.value)) <= 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("[]", "not an object"),
        ('{"version": 2}', "its version is 2, this jaxkd reads 1"),
        ('{"version": 1, "inputs": "sounds"}', "is no description of a student"),
        ("{" * 2000, "is no description of a student"),
        (
            '{"version": 1, "inputs": "images", "shape": [9, 8, 1], "dtype": "uint8",'
            ' "class_names": ["a"], "network": "CNN(features=(4,), hidden=8, num_classes=3)",'
            ' "mean": [0.5], "std": [0.25]}',
            r"names 1 classes \(a\), but has 3 logits",
        ),
        (
            '{"version": 1, "inputs": "images", "shape": [9, 8, 1], "dtype": "uint8",'
            ' "class_names": [], "network": "CNN(features=(5,), hidden=8, num_classes=3)"}',
            "do not fit CNN",
        ),
        (
            '{"version": 1, "inputs": "images", "shape": [9, 8, 1], "dtype": "uint8",'
            ' "class_names": []}',
            "use its student.jaxexport",
        ),
        (
            '{"version": 1, "inputs": "images", "shape": [9, 8, 1], "dtype": "uint8",'
            ' "class_names": [], "checksums": ["abc"]}',
            r"checksums is \['abc'\]",
        ),
    ],
)
def test_bad_descriptions(image_student, tmp_path, card, message):
    shutil.copy(image_student[0] / "student.safetensors", tmp_path)
    (tmp_path / "student.json").write_text(card)
    with pytest.raises(ValueError, match=message):
        weights.load_student(tmp_path)


# --- files of different students ---


@pytest.fixture
def other_files(image_student, text_student, tmp_path):
    """Returns a function that copies a student and replaces one of its files by another student's.

    The other one has the same network, but other weights, names of classes and tokenizer.
    """

    def mix(name):
        is_text = name == "tokenizer.json"
        folder, model, variables, *rest = text_student if is_text else image_student
        other = tmp_path / "other"
        other.mkdir()
        options = {"class_names": ("dog", "cat", "elk")}
        example = make_images()[0]
        if is_text:
            tokenizer = tokens.train_tokenizer([text[::-1] for text in TEXTS], vocab_size=280)
            options |= {"tokenizer": tokenizer, "max_length": 40}
            example = tokens.encode(tokenizer, TEXTS, max_length=40)[0]
        changed = jax.tree.map(lambda leaf: leaf + 1, variables)
        weights.save_student(other, model, changed, example, **options)
        shutil.copytree(folder, tmp_path / "mixed")
        shutil.copy(other / name, tmp_path / "mixed")
        return tmp_path / "mixed"

    return mix


@pytest.mark.parametrize(
    ("name", "culprits"),
    [
        ("student.safetensors", "student.safetensors does"),
        ("student.jaxexport", "student.jaxexport does"),
        ("student.json", "student.safetensors and student.jaxexport do"),
        ("tokenizer.json", "tokenizer.json does"),
    ],
)
@pytest.mark.parametrize("load", [weights.load_student, weights.load_network])
def test_files_of_different_students(other_files, name, culprits, load):
    folder = other_files(name)
    with pytest.raises(ValueError) as error:
        load(folder)
    assert str(error.value) == (
        f"{shorten(folder, 80)} holds files of different students: {culprits} not belong to "
        "student.json; save the student again with weights.save_student, or name "
        "student.jaxexport itself to use that"
    )
    # Named by itself, the program is what is meant.
    assert weights.load_student(folder / "student.jaxexport").class_names


@pytest.mark.parametrize("name", ["student.safetensors", "student.json"])
def test_files_of_different_students_without_a_program(other_files, name):
    folder = other_files(name)
    (folder / "student.jaxexport").unlink()
    with pytest.raises(ValueError, match="student.safetensors does not belong to student.json; sa"):
        weights.load_student(folder)


def test_students_of_earlier_versions_have_no_checksums(image_student, tmp_path):
    folder, *_ = image_student
    for name in ("student.safetensors", "student.json"):
        shutil.copy(folder / name, tmp_path)
    card = json.loads((tmp_path / "student.json").read_text())
    assert [*card.pop("checksums")] == ["student.safetensors"]
    (tmp_path / "student.json").write_text(json.dumps(card))
    assert weights.load_student(tmp_path).card == weights.read_card(folder)


def test_own_module_is_saved_without_a_network(tmp_path):
    model = models.Model(
        lambda key, inputs: {"params": {"scale": jnp.ones(2)}, "batch_stats": {}},
        lambda variables, inputs, *, train, key=None: (
            models.Outputs(inputs * variables["params"]["scale"][None], {}),
            {},
        ),
    )
    inputs = np.ones((3, 2), np.float32)
    variables = model.init(jax.random.key(0), inputs)
    weights.save_student(tmp_path, model, variables, inputs[0], class_names=("a", "b"))
    student = weights.load_student(tmp_path)
    assert student.card.network is None and student.card.inputs == "arrays"
    assert student.predict(inputs).shape == (3, 2)


def test_normalisation_that_a_description_cannot_hold_is_left_out():
    network = models.from_linen(models.CNN((4,), 8))
    assert models.with_input_normalization(network, 0.5, 0.5, max_value=1.0).network is None
    once = models.with_input_normalization(network, 0.5, 0.5)
    assert once.network is not None and once.network.mean == (0.5,)
    assert models.with_class_order(network, [1, 0]).network is None
    assert models.with_frozen_batch_stats(once).network == once.network


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"class_names": ("cat", "dog")}, ValueError, "has 2 names, but the model has 3 classes"),
        ({"class_names": None}, TypeError, "class_names must be one string per class"),
        ({"variables": {"params": {}}}, ValueError, "the variables do not fit the model: "),
    ],
)
def test_what_no_user_could_load_is_not_saved(image_student, tmp_path, options, error, match):
    _, model, variables = image_student
    options = {"variables": variables, "example": make_images()[0]} | options
    with pytest.raises(error, match=match):
        weights.save_student(tmp_path, model, **options)
    assert not [*tmp_path.iterdir()]
