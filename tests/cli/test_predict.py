"""Tests of `jaxkd predict`: tables, formats, messages and exit statuses."""

import csv
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from jaxkd import models, weights
from jaxkd.cli.main import main
from jaxkd.data import tokens

NAMES = ("dark", "bright")
TEXTS = ["a good film", "a bad film", "an utter bore"] * 5


@pytest.fixture(scope="module")
def image_student(tmp_path_factory):
    """Returns a folder of a student that tells bright images of 8 x 6 pixels from dark ones."""
    folder = tmp_path_factory.mktemp("student")

    def apply(variables, inputs, *, train, key=None):
        brightness = inputs.astype(np.float32).mean((1, 2, 3))[:, None] / 255
        logits = 8 * (brightness - 0.5) * np.array([[-1.0, 1.0]], np.float32)
        return models.Outputs(logits, {}), {}

    model = models.Model(
        lambda key, inputs: {"params": {"a": np.ones(1)}, "batch_stats": {}}, apply
    )
    variables = model.init(None, None)
    weights.save_student(folder, model, variables, np.zeros((8, 6, 3), np.uint8), class_names=NAMES)
    return folder


@pytest.fixture(scope="module")
def text_student(tmp_path_factory):
    """Returns a folder of a student of texts of at most 12 tokens."""
    folder = tmp_path_factory.mktemp("texts")
    tokenizer = tokens.train_tokenizer(TEXTS, vocab_size=280)
    model = models.from_linen(models.LSTMClassifier(300, 4, (4,), 4))
    ids = tokens.encode(tokenizer, TEXTS, max_length=12)
    variables = model.init(jax.random.key(0), ids)
    weights.save_student(
        folder, model, variables, ids[0], class_names=NAMES, tokenizer=tokenizer, max_length=12
    )
    return folder


def save_image(path, value, size=(6, 8)):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)
    return str(path)


def predict(capsys, *arguments):
    main(["predict", *map(str, arguments)])
    return capsys.readouterr()


def fail(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["predict", *map(str, arguments)])
    captured = capsys.readouterr()
    # `sys.exit` prints a message that is not a number when the process ends.
    status = stop.value.code
    message = captured.err + (status if isinstance(status, str) else "")
    return captured.out, message


def test_table_of_images(image_student, tmp_path, capsys):
    paths = [save_image(tmp_path / "a.png", 255), save_image(tmp_path / "b.png", 0)]
    captured = predict(capsys, image_student, *paths)
    assert [line.split() for line in captured.out.splitlines()] == [
        [paths[0], "bright", "100.0", "%"],
        [paths[1], "dark", "100.0", "%"],
    ]
    assert captured.err == ""


def test_folders_and_top(image_student, tmp_path, capsys):
    save_image(tmp_path / "more" / "x.png", 127)
    output = predict(capsys, image_student, tmp_path, "--top", "2", "--json").out
    (row,) = json.loads(output)
    assert row["input"].endswith("x.png")
    assert [item["class"] for item in row["classes"]] == ["dark", "bright"]
    assert sum(item["probability"] for item in row["classes"]) == pytest.approx(1, abs=1e-5)


def test_csv_is_written_once(image_student, tmp_path, capsys):
    path, output = save_image(tmp_path / 'a,"b.png', 255), tmp_path / "out.csv"
    predict(capsys, image_student, path, "--csv", "--top", "2", "-o", output)
    header, row = csv.reader(io.StringIO(output.read_text()))
    assert header == ["input", "class", "probability", "class_2", "probability_2"]
    assert row[:2] == [path, "bright"] and float(row[2]) > 0.99 and row[3] == "dark"
    _, message = fail(capsys, image_student, path, "-o", output)
    assert "out.csv exists: choose another --output" in message
    assert output.read_text().startswith("input,")


def test_images_of_another_size_or_with_transparency_are_mentioned(image_student, tmp_path, capsys):
    save_image(tmp_path / "a.png", 255, size=(40, 30))
    Image.new("RGBA", (6, 8), (0, 0, 0, 0)).save(tmp_path / "b.png")
    captured = predict(capsys, image_student, tmp_path)
    assert "1 of 2 images have another size: they are cropped to the centre" in captured.err
    assert "scaled to 8 x 6" in captured.err
    assert "1 of 2 images have transparent parts, which are shown on white" in captured.err
    assert captured.out.count("bright") == 2


def test_bad_files_are_named_and_the_others_predicted(image_student, tmp_path, capsys):
    good = save_image(tmp_path / "good.png", 255)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no image")
    files = [tmp_path / "empty.png", good, tmp_path / "text.jpg", tmp_path / "gone.png", "-"]
    output, message = fail(capsys, image_student, *files)
    assert output.split()[:2] == [good, "bright"]
    for name in ("empty.png", "text.jpg", "gone.png"):
        assert name in message
    assert "4 inputs could not be read, 1 are predicted" in message
    assert f"there is no file {tmp_path / 'gone.png'}: check the path" in message
    assert "- is for lines of text, but this student reads images" in message


def test_folder_without_images(image_student, tmp_path, capsys):
    output, message = fail(capsys, image_student, tmp_path)
    assert output == "" and "has no images" in message


def test_arrays(image_student, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.full((3, 8, 6, 3), 255, np.uint8))
    np.save(tmp_path / "y.npy", np.zeros((3, 8, 6, 1), np.uint8))
    output, message = fail(capsys, image_student, tmp_path / "x.npy", tmp_path / "y.npy")
    assert output.count("bright") == 3 and "x.npy[2]" in output
    assert "y.npy: this student takes uint8 [N, 8, 6, 3]" in message


def test_texts_of_a_file(text_student, tmp_path, capsys):
    path = tmp_path / "reviews.txt"
    path.write_text("a good film\nan utter bore, without any doubt at all\n")
    captured = predict(capsys, text_student, path, "--json")
    rows = json.loads(captured.out)
    assert [row["text"] for row in rows] == path.read_text().splitlines()
    assert rows[1]["input"].endswith("line 2")
    assert "1 of 2 texts are longer than the student's 12 tokens" in captured.err
    student = weights.load_student(text_student)
    expected = student.predict(student.encode(path.read_text().splitlines())[0])
    assert rows[0]["classes"][0]["probability"] == pytest.approx(expected[0].max(), abs=1e-5)


def test_texts_of_standard_input(text_student, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a good film\n"))
    output = predict(capsys, text_student, "-").out
    assert output.startswith("stdin line 1  a good film")
    monkeypatch.setattr("jaxkd.cli.predict.MAX_STDIN", 20)
    monkeypatch.setattr("sys.stdin", io.StringIO("a good film\n" * 2))
    assert "standard input has more than 20 characters" in fail(capsys, text_student, "-")[1]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "standard input is empty: give one text" in fail(capsys, text_student, "-")[1]
    monkeypatch.setattr("sys.stdin", io.StringIO("a good film\n\n"))
    assert "standard input has an empty line" in fail(capsys, text_student, "-")[1]


@pytest.mark.filterwarnings("always::UserWarning")
@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_tables_need_a_column_or_a_usual_name(text_student, tmp_path, capsys, suffix):
    delimiter = {"tsv": "\t", "csv": ","}.get(suffix)
    table = tmp_path / f"reviews.{suffix}"

    def write(*names):
        rows = [("a good film", "1"), ("a bad film", "0")]
        if delimiter:
            lines = [delimiter.join(row) for row in ([names] if names else []) + rows]
        else:
            lines = [json.dumps(dict(zip(names or ("a", "b"), row, strict=True))) for row in rows]
        table.write_text("\n".join(lines) + "\n")

    write()
    assert (
        "choose that of the texts by column (--text-column)" in fail(capsys, text_student, table)[1]
    )
    assert "a bad film" in predict(capsys, text_student, table, "--text-column", "1").out
    write("kommentar", "stimmung")
    arguments = (text_student, table, "--text-column", "kommentar", "--json")
    rows = json.loads(predict(capsys, *arguments).out)
    assert [row["text"] for row in rows] == ["a good film", "a bad film"]
    write("sentence", "answer")
    captured = predict(capsys, text_student, table)
    assert "the text is column 'sentence'" in captured.err and "a bad film" in captured.out


def test_a_column_is_for_files_of_texts(text_student, image_student, tmp_path, capsys):
    for arguments in ((text_student, "-"), (image_student, save_image(tmp_path / "x.png", 0))):
        message = fail(capsys, *arguments, "--text-column", "1")[1]
        assert "--text-column is for files of texts: leave it out" in message


def test_empty_text_files_are_named(text_student, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "good.txt").write_text("a good film\n")
    files = [tmp_path / "empty.txt", tmp_path / "good.txt"]
    output, message = fail(capsys, text_student, *files)
    assert "a good film" in output and "empty.txt" in message


def test_student_without_class_names(image_student, tmp_path, capsys):
    variables = {"params": {"a": np.ones(1)}, "batch_stats": {}}
    model = models.Model(
        lambda key, inputs: variables,
        lambda variables, inputs, *, train, key=None: (
            models.Outputs(inputs.astype(np.float32)[:, 0, 0, :2], {}),
            {},
        ),
    )
    weights.save_student(tmp_path, model, variables, np.zeros((8, 6, 3), np.uint8))
    image = save_image(tmp_path / "a.png", 200)
    _, message = fail(capsys, tmp_path, image)
    assert "does not name its classes: add --class-names" in message
    assert predict(capsys, tmp_path, image, "--class-names", "no,yes").out.split()[1] == "no"
    assert (
        "has 2 classes, but --class-names has 3"
        in fail(capsys, tmp_path, image, "--class-names", "a,b,c")[1]
    )


def test_own_names_in_another_order_are_warned_of(image_student, tmp_path, capsys):
    image = save_image(tmp_path / "a.png", 255)
    captured = predict(capsys, image_student, image, "--class-names", "bright,dark")
    assert captured.err == (
        "warning: --class-names has bright, dark in another place than the student, whose order is "
        "dark, bright: leave it out unless the student's names are wrong\n"
    )
    assert captured.out.split()[1] == "dark"
    captured = predict(capsys, image_student, image, "--class-names", "bright,hell")
    assert "--class-names has bright in another place" in captured.err
    for names in ("dark,bright", "dark,hell", "dunkel,hell"):
        assert predict(capsys, image_student, image, "--class-names", names).err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json", "--csv"], "choose one of --json and --csv"),
        (["--top", "3"], "--top 3: choose 1 to 2"),
        (["--top", "0"], "--top 0: choose 1 to 2"),
        (["--class-names", "a,a"], "'a' more than once"),
        (["--class-names", "a"], "has 1 names, but the student has 2 classes"),
    ],
)
def test_wrong_options(image_student, tmp_path, capsys, options, message):
    image = save_image(tmp_path / "a.png", 200)
    assert message in fail(capsys, image_student, image, *options)[1]


def test_no_files(image_student, capsys):
    assert "name files or folders to predict" in fail(capsys, image_student)[1]


def test_no_student(tmp_path, capsys):
    assert "has no student" in fail(capsys, tmp_path, "a.png")[1]
    assert "gone" in fail(capsys, tmp_path / "gone", "a.png")[1]
