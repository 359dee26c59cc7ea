"""Which columns of a table hold the texts and the classes, and what is refused or said."""

import csv
import gzip
import os

import pytest

from jaxkd.data import DataError, text

# The texts of a class are few here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*classes are not in the validation set"),
    # Tables are often written twice.
    pytest.mark.filterwarnings("ignore:.*test texts are also training texts"),
]

CLASSES = ("bad", "good")
ROWS = [(f"review {i}", CLASSES[i % 2]) for i in range(30)]


@pytest.fixture
def load(tmp_path):
    """Writes the files of a folder, by lines of fields, and loads it."""

    def write_and_load(files, **options):
        for name, rows in files.items():
            separator = "," if ".csv" in name else "\t"
            lines = [row if isinstance(row, str) else separator.join(row) for row in rows]
            content = "".join(f"{line}\n" for line in lines).encode()
            content = gzip.compress(content) if name.endswith(".gz") else content
            (tmp_path / name).write_bytes(content)
        return text.load_texts(tmp_path, **options)

    return write_and_load


def texts_and_classes(dataset, split):
    names = [dataset.class_names[label] for label in split.labels]
    return list(zip(split.texts, names, strict=True))


def all_rows(dataset):
    """Returns the training and validation texts with their classes, sorted by number."""
    rows = texts_and_classes(dataset, dataset.train)
    rows += texts_and_classes(dataset, dataset.validation)
    return sorted(rows, key=lambda row: int(row[0].split()[1]))


TEST = [("review 30", "bad"), ("review 31", "good")]
TEST_OF_SIGNS = [("review 90", "-1"), ("review 91", "0"), ("review 92", "1")]


# Headers


@pytest.mark.parametrize(
    ("header", "order", "chosen"),
    [
        (("text", "sentiment"), (0, 1), "'text', the class 'sentiment'"),
        (("Review", "Stars"), (0, 1), "'review', the class 'stars'"),
        (("label", "text"), (1, 0), "'text', the class 'label'"),
        (("kommentar", "label"), (0, 1), "'kommentar', the class 'label'"),
        (("text", "stimmung"), (0, 1), "'text', the class 'stimmung'"),
        (("index", "sentence", "label"), (None, 0, 1), "'sentence', the class 'label'"),
        (("", "text", "label"), (None, 0, 1), "'text', the class 'label'"),
        (("id", "label", "topic", "text"), (None, 1, None, 0), "'text', the class 'label'"),
        (('"text"', '"label"'), (0, 1), "'text', the class 'label'"),
        (("0", "1"), (0, 1), "'0', the class '1'"),
    ],
)
def test_columns_are_found_by_the_header(load, header, order, chosen):
    def arrange(rows):
        columns = [[str(i) if j is None else row[j] for j in order] for i, row in enumerate(rows)]
        return [header, *columns]

    with pytest.warns(UserWarning, match="train.tsv: line 1 is a header") as said:
        dataset = load({"train.tsv": arrange(ROWS), "test.tsv": arrange(TEST)})
    (warning,) = said
    assert f"the text is column {chosen};" in str(warning.message)
    assert warning.filename == __file__ and len(str(warning.message)) <= 300
    assert dataset.class_names == CLASSES and all_rows(dataset) == ROWS
    assert texts_and_classes(dataset, dataset.test) == TEST


def test_named_columns_are_taken_without_a_word(load):
    rows = [(str(i), label, line) for i, (line, label) in enumerate(ROWS)]
    files = {
        "train.tsv": [("nummer", "stimmung", "kommentar"), *rows],
        # Another order, which the header tells.
        "test.tsv": [("kommentar", "stimmung"), *TEST],
    }
    dataset = load(files, text_column="Kommentar", label_column="stimmung")
    assert dataset.class_names == CLASSES and all_rows(dataset) == ROWS
    assert texts_and_classes(dataset, dataset.test) == TEST


def test_header_of_the_first_file_alone(load):
    rows = [(str(i), *row) for i, row in enumerate(ROWS)]
    files = {
        "train.tsv": [("index", "sentence", "label"), *rows],
        "test.tsv": [("0", *TEST[0]), ("1", *TEST[1])],
    }
    with pytest.warns(UserWarning, match="line 1 is a header"):
        dataset = load(files)
    assert texts_and_classes(dataset, dataset.test) == TEST


def test_header_of_the_second_file_alone(load):
    with pytest.warns(UserWarning, match=r"test.tsv: line 1 is a header; the text .* 'label';"):
        dataset = load({"train.tsv": ROWS, "test.tsv": [("text", "label"), *TEST]})
    assert texts_and_classes(dataset, dataset.test) == TEST


def test_header_above_columns_by_number_is_left_out_and_said(load):
    files = {"train.tsv": [("text", "label"), *ROWS], "test.tsv": TEST}
    with pytest.warns(UserWarning, match="line 1 is a header") as said:
        dataset = load(files, text_column=1, label_column=2)
    assert [warning.filename for warning in said] == [__file__]
    assert all_rows(dataset) == ROWS


def test_examples_that_look_like_a_header_are_kept(load):
    rows = [(line, "review" if label == "good" else "question") for line, label in ROWS]
    rows[0] = ("review 0", "review")
    dataset = load({"train.tsv": rows, "dev.tsv": [rows[0]], "test.tsv": [rows[0]]})
    assert dataset.class_names == ("question", "review") and len(dataset.train.texts) == 30
    assert dataset.test.texts == dataset.validation.texts == ("review 0",)


def test_an_example_whose_text_is_a_usual_name_is_kept(load):
    rows = [("sentence", "good"), *ROWS]
    dataset = load({"train.tsv": rows, "test.tsv": TEST})
    assert "sentence" in (*dataset.train.texts, *dataset.validation.texts)


def test_files_that_were_joined_with_their_headers_are_refused(load):
    rows = [("text", "label"), *ROWS]
    with pytest.raises(DataError, match=r"train.tsv, line 32 repeats the header: remove it"):
        load({"train.tsv": rows + rows, "test.tsv": TEST})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (("index", "sentence1", "sentence2", "label"), "has the columns index, sentence1, "),
        (("text", "sentence"), "has the columns text, sentence: choose those of text and class"),
        (("sentence", "review", "label"), "has the columns sentence, review, label: choose"),
        (("text", "topic", "score"), "has the columns text, topic, score: choose"),
    ],
)
def test_ambiguous_header_asks_for_the_columns(load, header, message):
    rows = [header, *([row[0], *row[1:], "x", "y"][: len(header)] for row in ROWS)]
    with pytest.raises(DataError, match=message) as error:
        load({"train.tsv": rows, "test.tsv": TEST})
    assert "text_column" in str(error.value) and "--label-column" in str(error.value)


def test_one_text_of_a_pair_is_refused_unless_it_is_chosen(load):
    """QNLI has a question and a sentence, and its classes are those of both."""
    header = ("index", "question", "sentence", "label")
    rows = [header, *((str(i), "why?", *row) for i, row in enumerate(ROWS))]
    with pytest.raises(DataError, match=r"has the texts 'sentence' and 'question': .*--text-col"):
        load({"train.tsv": rows, "test.tsv": rows})
    with pytest.warns(UserWarning, match="the text is column 'sentence'"):
        dataset = load({"train.tsv": rows, "test.tsv": rows}, text_column="sentence")
    assert "why?" not in dataset.train.texts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "body"}, "has no column 'body' in line 1, only text, label, text: give"),
        ({"text_column": "text"}, "has several columns 'text' in line 1"),
        ({"text_column": 4}, "has no column 4: it has 3, counted from 1"),
        ({"text_column": "0"}, "has no column 0"),
        ({"text_column": 2, "label_column": 2}, "text and class would both be column 2: choose"),
    ],
)
def test_options_that_no_column_fits(load, options, message):
    rows = [("text", "label", "text"), *((*row, "x") for row in ROWS)]
    with pytest.raises(DataError, match=message):
        load({"train.tsv": rows, "test.tsv": TEST}, **options)


def test_columns_belong_to_folders(tmp_path):
    with pytest.raises(DataError, match="there is no folder imdb_reviews, and only its tables"):
        text.load_texts("imdb_reviews", tmp_path, text_column="text")


# No header


def test_header_of_unknown_names_is_not_taken_as_an_example(load):
    header = ("kommentar", "stimmung")
    with pytest.raises(DataError, match="no other line has the class 'stimmung' of line 1: if it"):
        load({"train.tsv": [header, *ROWS], "test.tsv": TEST})
    # A rare class further down is one.
    dataset = load({"train.tsv": [*ROWS, ("review 40", "stimmung")], "test.tsv": TEST})
    assert dataset.class_names == (*CLASSES, "stimmung")


def test_first_line_of_unusual_names_that_files_share_is_a_header(load):
    header = ("kommentar", "stimmung")
    rows = [*ROWS, ("review 30", "rare")]
    files = {"train.tsv": [header, *rows], "test.tsv": [header, *TEST], "dev.tsv": TEST}
    message = "train.tsv: line 1, 'kommentar' and 'stimmung', is read as a header: 2 files begin"
    with pytest.warns(UserWarning, match=message) as said:
        dataset = load(files)
    assert [warning.filename for warning in said] == [__file__]
    assert dataset.class_names == ("bad", "good", "rare")
    assert texts_and_classes(dataset, dataset.train) == rows
    assert texts_and_classes(dataset, dataset.test) == TEST
    assert dataset.test.origins[0].endswith("test.tsv, line 2")


def test_first_line_of_a_rare_class_is_an_example_and_said(load):
    rows = [("review 30", "odd"), *ROWS, ("review 31", "rare")]
    message = "no other line has the class 'odd' of line 1, which is read as an example; if it is a"
    with pytest.warns(UserWarning, match=message) as said:
        dataset = load({"train.tsv": rows, "dev.tsv": TEST, "test.tsv": TEST})
    assert len(said) == 1 and len(dataset.train.texts) == 32


def test_class_in_the_first_column(load):
    swapped = {
        name: [row[::-1] for row in rows]
        for name, rows in (("train.tsv", ROWS), ("test.tsv", TEST))
    }
    message = r"has 30 classes in 30 texts, more than 50%, such as 'review 0': .* label_column"
    with pytest.raises(DataError, match=message):
        load(swapped)
    for options in ({"label_column": 1}, {"text_column": "2"}):
        dataset = load(swapped, **options)
        assert dataset.class_names == CLASSES and all_rows(dataset) == ROWS
        assert texts_and_classes(dataset, dataset.test) == TEST


def test_columns_by_number(load):
    # CoLA's form: source, class, mark, sentence.
    def arrange(rows):
        return [("gj04", label, "*", line) for line, label in rows]

    files = {"train.tsv": arrange(ROWS), "test.tsv": arrange(TEST)}
    with pytest.raises(DataError, match="has 4 columns and no header: choose .* numbers from 1"):
        load(files)
    dataset = load(files, text_column=4, label_column=2)
    assert all_rows(dataset) == ROWS and texts_and_classes(dataset, dataset.test) == TEST


def test_tabs_within_a_few_texts_are_said(load):
    rows = [(f"{line}\tand more", label) if i == 3 else (line, label)
            for i, (line, label) in enumerate(ROWS)]  # fmt: skip
    with pytest.warns(
        UserWarning, match="train.tsv: 1 texts contain tabs; the class is what f"
    ) as said:
        dataset = load({"train.tsv": rows, "test.tsv": TEST})
    assert [warning.filename for warning in said] == [__file__]
    assert all_rows(dataset) == rows


def test_row_names_without_a_header_are_not_text(load):
    # R's write.table writes a column more than its header names.
    rows = [("text", "label"), *((str(i), *row) for i, row in enumerate(ROWS))]
    with pytest.raises(DataError, match="most lines have more than two columns"):
        load({"train.tsv": rows, "test.tsv": TEST})


def test_lines_of_another_number_of_columns_are_refused(load):
    rows = [("index", "sentence", "label"), *((str(i), *row) for i, row in enumerate(ROWS))]
    rows[7] = ("6", "review 6\twith a tab", "bad")
    with pytest.raises(DataError, match=r"train.tsv, line 8 has 4 columns, but each line must ha"):
        load({"train.tsv": rows, "test.tsv": TEST})
    rows[7] = ("6", "review 6", " ")
    with pytest.raises(DataError, match=r"train.tsv, line 8 has no class, but"):
        load({"train.tsv": rows, "test.tsv": TEST})


# Unlabelled splits


@pytest.mark.parametrize(
    "test",
    [
        [("index", "sentence"), ("0", "uneasy mishmash"), ("1", "a joy")],
        [("sentence", "label"), ("uneasy mishmash", "-1"), ("a joy", "-1")],
        ["sentence", "uneasy mishmash", "a joy"],
    ],
)
def test_unlabelled_test_set_of_glue_is_replaced_by_the_validation_set(load, test):
    header = ("sentence", "label")
    files = {"train.tsv": [header, *ROWS], "dev.tsv": [header, *TEST], "test.tsv": test}
    with pytest.warns(UserWarning) as said:
        dataset = load(files)
    messages = [str(warning.message) for warning in said]
    assert any("test.tsv has no classes and is left out" in message for message in messages)
    assert any("the validation set is the test set" in message for message in messages)
    assert {warning.filename for warning in said} == {__file__}
    assert dataset.class_names == CLASSES
    assert texts_and_classes(dataset, dataset.test) == TEST
    assert len(dataset.train.texts) == 27 and len(dataset.validation.texts) == 3
    (folder,) = {os.path.dirname(origin.split(",")[0]) for origin in dataset.train.origins}
    os.remove(os.path.join(folder, "dev.tsv"))
    with pytest.warns(UserWarning) as said:
        assert len(load({}).test.texts) == 3
    assert "a tenth of the training texts is the test set" in str(said[-1].message)


def test_unseen_classes_are_named_with_their_line(load):
    with pytest.raises(DataError, match=r"it lacks 'so', which .*test.tsv, line 2 has"):
        load({"train.tsv": ROWS, "test.tsv": [("a", "bad"), ("b", "so")]})
    rows = [(f"text {i}", f"class {i}") for i in range(20_000)]
    with pytest.raises(DataError, match=r"lacks 'class 0', .* and 19,996 more, which") as error:
        load({"train.tsv": ROWS, "test.tsv": rows})
    assert len(str(error.value)) <= 300


# Classes


def test_odd_numbers_are_names(load):
    names = ("²", "①", "--1", "2", "1")
    rows = [(f"review {i}", names[i % 5]) for i in range(30)]
    assert load({"train.tsv": rows, "test.tsv": rows}).class_names == ("1", "2", "--1", "²", "①")


def test_many_classes_are_fine_if_there_are_enough_texts(load):
    rows = [(f"review {i}", f"class {i // 2}") for i in range(400)]
    assert len(load({"train.tsv": rows, "test.tsv": rows}).class_names) == 200


def test_a_text_for_each_class_needs_both_columns_named(load):
    rows = [("text", "label"), *((f"review {i}", f"class {i}") for i in range(30))]
    with pytest.raises(DataError, match="has 30 classes in 30 texts, more than 50%"):
        load({"train.tsv": rows, "test.tsv": rows})
    options = {"text_column": "text", "label_column": "label"}
    files = {"train.tsv": rows, "test.tsv": rows}
    with pytest.raises(DataError, match="each class has only one training example, so none can be"):
        load(files, **options)
    dev = [rows[0], *((f"other {text}", label) for text, label in rows[1:])]
    assert len(load(files | {"dev.tsv": dev}, **options).class_names) == 30


def test_one_column_is_not_text_and_class(load):
    with pytest.raises(DataError, match="text and class would both be column 1: choose two") as e:
        load({"train.tsv": ROWS, "test.tsv": TEST}, text_column=1, label_column=1)
    assert "text_column and label_column (--text-column, --label-column)" in str(e.value)


def test_a_class_of_unlabelled_texts_is_refused_or_said(load):
    rows = [(f"review {i}", ("no", "yes", "unsup")[i % 3]) for i in range(30)]
    with pytest.raises(DataError, match="10 labels are 'unsup', which usually means missing"):
        load({"train.tsv": rows, "test.tsv": TEST})
    rows = [(f"review {i}", str(i % 4 - 1)) for i in range(80)]
    test = [(f"other {i}", str(i % 4 - 1)) for i in range(8)]
    with pytest.warns(UserWarning, match="train.tsv: the class '-1' is learnt as one: if it means"):
        assert load({"train.tsv": rows, "test.tsv": test}).class_names == ("-1", "0", "1", "2")
    # The negative of three.
    signs = [(text, str(min(int(label), 1))) for text, label in rows]
    assert load({"train.tsv": signs, "test.tsv": TEST_OF_SIGNS}).class_names == ("-1", "0", "1")


@pytest.mark.parametrize("split", ["dev", "test"])
def test_classes_that_another_split_lacks_are_said(load, split):
    rows = [(f"review {i}", CLASSES[i % 2]) for i in range(100, 130)]
    files = {"train.tsv": [*ROWS, ("odd", "36")], "dev.tsv": rows[:4], "test.tsv": TEST}
    files |= {f"{split}.tsv": [(f"{split} {i}", CLASSES[i % 2]) for i in range(20)]}
    name = {"dev": "validation"}.get(split, split)
    with pytest.warns(
        UserWarning, match=f"1 of 3 classes are in the training set, but not in the {name} set: 36"
    ):
        load(files)


@pytest.mark.parametrize(
    ("dev", "message"),
    [
        (ROWS[:25], "25 of 25 validation texts are also training texts, so that its accuracy"),
        ("test", "30 of 30 validation texts are also test texts, so that the best student is"),
    ],
)
def test_validation_texts_of_another_split_are_counted(load, dev, message):
    test = [(f"test {i}", CLASSES[i % 2]) for i in range(30)]
    with pytest.warns(UserWarning, match=message):
        load({"train.tsv": ROWS, "test.tsv": test, "dev.tsv": test if dev == "test" else dev})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("Good", "good", "bad"), "train.tsv: the classes 'Good' and 'good' differ in case only"),
        (("1", "1.0", "0"), "the classes '1' and '1.0' differ in number format only: rename one"),
        (("0", "1", "nan"), "train.tsv: 10 labels are 'nan', which usually means missing: remove"),
        (("0", "1", "None"), "10 labels are 'None', which usually means missing"),
    ],
)
def test_classes_that_are_surely_wrong(load, names, message):
    rows = [(f"review {i}", names[i % 3]) for i in range(30)]
    with pytest.raises(DataError, match=message) as error:
        load({"train.tsv": rows, "test.tsv": rows[:3]})
    assert len(str(error.value)) <= 300


def test_classes_that_another_table_spells_in_another_way(load):
    message = "train.tsv: the classes 'good' and 'GOOD' differ in case only: rename one"
    with pytest.raises(DataError, match=message):
        load({"train.tsv": ROWS, "test.tsv": [*TEST, ("review 32", "GOOD")]})
    with pytest.raises(DataError, match="test.tsv: 1 labels are 'NA', which usually means missing"):
        load({"train.tsv": ROWS, "test.tsv": [*TEST, ("review 32", "NA")]})


# Files


def test_a_table_that_is_a_link_to_another_is_refused(load, tmp_path):
    (tmp_path / "test.tsv").symlink_to(tmp_path / "train.tsv")
    with pytest.raises(DataError, match=r"train.tsv and .*test.tsv are the same: a split must not"):
        load({"train.tsv": ROWS})


def test_csv_with_quotes_and_line_breaks(load):
    lines = ["text,label", '"fine, ""really"" fine\nand long",good', "poor,bad"]
    rows = [f"{line},{label}" for line, label in ROWS]
    with pytest.warns(UserWarning, match="line 1 is a header"):
        dataset = load({"train.csv.gz": ["text,label", *rows], "test.csv": lines})
    assert dataset.test.texts == ('fine, "really" fine\nand long', "poor")
    assert [origin.rpartition("line ")[2] for origin in dataset.test.origins] == ["2", "4"]
    assert all_rows(dataset) == ROWS


def test_a_quoted_text_may_be_as_long_as_its_file(load):
    limit = csv.field_size_limit()
    rows = [*ROWS, (f'"{"x" * 200_000}"', "good")]
    dataset = load({"train.csv": rows, "test.csv": TEST})
    assert max(map(len, dataset.train.texts + dataset.validation.texts)) == 200_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    "swallowed",
    [
        '"I loved it,good\ntruly awful,bad\nwith an end",bad',
        # A row whose quote is closed by that of the next one.
        '"I loved it,good\nwith an end",bad',
        'fine,good\n"a\nlong,good\ntext",bad',
    ],
)
def test_quotes_that_swallow_rows_are_refused(load, swallowed):
    rows = [",".join(row) for row in ROWS]
    with pytest.raises(DataError, match="several lines; '.*,.*' looks like a row: correct") as e:
        load({"train.csv": [*rows, swallowed], "test.csv": TEST})
    assert "train.csv, line 31" in str(e.value) or "train.csv, line 32" in str(e.value)
    assert len(str(e.value)) <= 300


def test_quotes_that_swallow_rows_of_other_columns_are_refused(load):
    rows = [f"{i},{line},{label}" for i, (line, label) in enumerate(ROWS)]
    options = {"text_column": 2, "label_column": 3}
    for swallowed in ('30,"oh,good\n31,with an end",bad', '30,"oh\n31,why,bad\n32,an end",bad'):
        with pytest.raises(DataError, match="train.csv, line 31: .* looks like a row"):
            load({"train.csv": [*rows, swallowed], "test.csv": rows[:2]}, **options)


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
@pytest.mark.parametrize("comma", ["", " now, really"])
@pytest.mark.parametrize("header", [(), ("text", "label")])
def test_other_delimiters_are_recognised_and_said(load, delimiter, comma, header):
    rows = [delimiter.join((line + comma, label)) for line, label in ROWS]
    files = {
        "train.csv": [*filter(None, [delimiter.join(header)]), *rows],
        "test.csv": [delimiter.join(row) for row in TEST],
    }
    with pytest.warns(UserWarning) as said:
        dataset = load(files)
    messages = [str(warning.message) for warning in said]
    expected = f"train.csv: the columns are read as divided by {delimiter!r}, not by commas"
    assert messages[0].endswith(expected) and {w.filename for w in said} == {__file__}
    assert all_rows(dataset) == [(line + comma, label) for line, label in ROWS]


def test_other_delimiters_within_texts_are_text(load):
    rows = [(f"review {i} now; really", label) for i, (_, label) in enumerate(ROWS)]
    assert all_rows(load({"train.csv": rows, "test.csv": [rows[0]]})) == rows


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_quotes_that_a_program_wrote_are_removed_and_said(tmp_path, quoting, ending):
    rows = [(f'review {i} , "great"\tfilm' if i % 2 else line, int(i % 2)) for i, (line, _) in
            enumerate(ROWS)]  # fmt: skip
    for name in ("train.tsv", "test.tsv"):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t", quoting=quoting, lineterminator=ending)
            writer.writerows(rows if name == "train.tsv" else rows[:10])
    with pytest.warns(UserWarning, match="fields are in quotes as csv.writer and") as said:
        dataset = text.load_texts(tmp_path)
    assert [warning.filename for warning in said] == [__file__] * 2
    assert all_rows(dataset) == [(line, str(label)) for line, label in rows]


def test_quotes_within_texts_are_text(load):
    """As in GLUE, whose files have quotes at all places and double none."""
    rows = [(f'review {i} is "great', label) for i, (_, label) in enumerate(ROWS)]
    rows += [('"review 30 is all in quotes"', "good"), ('"review 31" is "', "bad")]
    dataset = load({"train.tsv": rows, "test.tsv": TEST})
    assert {*dataset.train.texts, *dataset.validation.texts} == {line for line, _ in rows}


def test_texts_in_quotes_among_others_keep_them_and_are_counted(load):
    rows = [*ROWS, ('"review 30"', "good"), ('"review 31"', "bad")]
    with pytest.warns(UserWarning, match="train.tsv: 2 fields are in quotes, which are kept"):
        dataset = load({"train.tsv": rows, "test.tsv": TEST})
    assert {*dataset.train.texts, *dataset.validation.texts} == {line for line, _ in rows}


def test_classes_in_quotes_beside_texts_with_other_quotes_are_refused(load):
    rows = [(rf'"review {i} is \"great\""', f'"{label}"') for i, (_, label) in enumerate(ROWS)]
    with pytest.raises(DataError, match='train.tsv: the classes are in quotes, such as "bad", but'):
        load({"train.tsv": rows, "test.tsv": TEST})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,label\n"never closed,good\n', r"test.csv, line 2 is not CSV \(unexpected end"),
        ("a,b,c\nd\n", r"test.csv, line 1 has 3 fields instead of two, a text and a class: put"),
        ("fine,good\n\n\n", r"test.csv, line 2 is empty: remove it"),
        ("fine,good\nfine\n", r"test.csv, line 2 must be a text, a comma and a class, got 'fine'"),
        ("\n", r"test.csv is empty"),
    ],
)
def test_damaged_csv(load, tmp_path, content, message):
    (tmp_path / "test.csv").write_text(content)
    with pytest.raises(DataError, match=message) as error:
        load({"train.csv": ROWS})
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)


def test_one_of_several_files_is_read_and_said(load):
    files = {"train.tsv": ROWS, "train.csv": TEST, "val.tsv": TEST, "dev.tsv": ROWS}
    with pytest.warns(UserWarning) as said:
        dataset = load(files | {"test.tsv": TEST})
    assert [str(warning.message).rpartition("/")[2] for warning in said] == [
        "train.tsv is read, train.csv beside it not",
        "val.tsv is read, dev.tsv beside it not",
    ]
    assert {warning.filename for warning in said} == {__file__}
    assert len(dataset.train.texts) == 30 and len(dataset.validation.texts) == 2


def test_gzip_bomb_is_refused(load, tmp_path):
    bomb = gzip.compress(b"fine\tgood\n" * 4_000_000)
    assert len(bomb) < 300_000
    (tmp_path / "test.tsv.gz").write_bytes(bomb)
    with pytest.raises(DataError, match="unpacks to more than 8,388,608 bytes: unpack it by") as e:
        load({"train.tsv": ROWS})
    assert len(str(e.value)) <= 300 and "max_unpacked" in str(e.value)


def test_limit_of_unpacking_is_an_argument(load, tmp_path):
    files = {"train.tsv": ROWS, "test.tsv.gz": TEST}
    with pytest.raises(DataError, match="unpacks to more than 20 bytes"):
        load(files, max_unpacked=20)
    assert len(load(files, max_unpacked=1000).test.texts) == 2
    path = tmp_path / "test.tsv.gz"
    with pytest.raises(DataError, match="unpacks to more than 20 bytes"):
        text.read_texts(path, max_unpacked=20)
    assert len(text.read_texts(path, max_unpacked=1000)[0]) == 2


def test_huge_line_ends_in_a_short_message(load):
    with pytest.raises(DataError, match="test.tsv, line 1 must be a text, a tab and a") as error:
        load({"train.tsv": ROWS, "test.tsv": ["x" * 1_000_000]})
    assert len(str(error.value)) <= 300


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(DataError, match="is not a regular file: check the path"):
            text.read_texts(path)
    with pytest.raises(DataError, match="nowhere does not exist: check the path"):
        text.read_texts(tmp_path / "nowhere")


def test_header_of_texts_without_classes_is_left_out(tmp_path):
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tuneasy mishmash\n")
    with pytest.warns(UserWarning, match="test.tsv, line 1 is a header and is left out") as said:
        texts, origins = text.read_texts(tmp_path / "test.tsv", field=2)
    assert [warning.filename for warning in said] == [__file__]
    assert texts == ("uneasy mishmash",) and origins[0].endswith("line 2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("fine\tgood\n".encode("utf-16"), "test.tsv is UTF-16 or UTF-32: save it as UTF-8"),
        ("fine\tgood\n".encode("utf-16-le"), "test.tsv is UTF-16 or UTF-32: save it as UTF-8"),
        ("fine\tgood\n".encode("utf-32-be"), "test.tsv is UTF-16 or UTF-32: save it as UTF-8"),
        (b"PK\x03\x04\x14\0\0\0", "test.tsv is a zip archive or a spreadsheet: unpack it"),
        (b"\x89PNG\r\n\x1a\n\0\0", "test.tsv is an image, but texts are read here: give a file"),
        (
            gzip.compress(b"fine\tgood\n", mtime=0),
            "test.tsv is packed by gzip, but not named so: add .gz",
        ),
        (b"PAR1\x15\0", "test.tsv is a Parquet file, but not named so: add .parquet"),
        (b"fine\tgood\nan utter b\0re\tbad\n", "test.tsv, line 2 has a null character: remove it"),
        (b"fine\tgood\rpoor\tbad\r", r"test.tsv ends its lines by \\r alone: save it with \\n"),
        (b"caf\xe9\tgood\n", r"test.tsv, line 1 is not UTF-8 \(byte 0xe9,"),
    ],
)
def test_other_encodings_end_in_one_line(load, tmp_path, content, message):
    (tmp_path / "test.tsv").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load({"train.tsv": ROWS})
    assert len(str(error.value)) <= 300


def test_a_table_of_several_sets_is_refused(load):
    header = ("text", "label", "split")
    rows = [header, *((*row, "test" if i % 3 else "train") for i, row in enumerate(ROWS))]
    with pytest.raises(DataError, match=r"train.tsv holds several sets, by .* test, train: write "):
        load({"train.tsv": rows, "test.tsv": TEST})
    # A set that was cut out keeps the column.
    with pytest.warns(UserWarning, match="the text is column 'text', the class 'label'"):
        load(
            {
                "train.tsv": [header, *((*row, "train") for row in ROWS)],
                "test.tsv": rows[:1] + [(*row, "test") for row in TEST],
            }
        )


def test_exchanged_columns_of_one_file_are_named(load):
    exchanged = [(label, text) for text, label in ROWS]
    with pytest.raises(DataError, match=r"the texts of .*test.tsv, line 1 and below are the class"):
        load({"train.tsv": ROWS, "test.tsv": exchanged})


def test_a_first_line_of_another_form_may_be_removed(load):
    with pytest.raises(DataError, match="got 'sep=;'; if it is no example, remove it"):
        load({"train.tsv": [("sep=;",), *ROWS], "test.tsv": TEST})


def test_texts_with_commas_that_are_not_in_quotes_are_named(load):
    rows = [*ROWS[:5], "film, so, so,good", *ROWS[5:]]
    with pytest.raises(DataError, match="line 6 has 4 fields instead of two, .* comma in quotes"):
        load({"train.csv": rows, "test.csv": TEST})


def test_a_web_page_is_named(load):
    with pytest.raises(DataError, match="train.csv is a web page: download the file itself"):
        load({"train.csv": ["<!DOCTYPE html>", "<html><body>", "</html>"], "test.csv": TEST})
