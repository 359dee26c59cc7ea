"""RoBERTa's tokenizer from its two files, and the exchange of ids."""

import json

import numpy as np
import pytest
import tokenizers

from jaxkd.data import DataError, tokens
from jaxkd.data.byte_pairs import exchange_ids

VOCABULARY = ["<s>", "<pad>", "</s>", "<unk>", "a", "b", "c", "ab", "Ġ", "Ġab", "<mask>"]
MERGES = ["#version: 0.2", "a b", "Ġ ab", ""]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(VOCABULARY)}))
    (tmp_path / "merges.txt").write_text("\n".join(MERGES))
    return tmp_path


def test_padding_gets_the_id_0(folder):
    texts = ["ab ab", "cab", "ab<mask>"]
    tokenizer = tokens.load_tokenizer(folder, padding_id=1)
    ids = tokens.encode(tokenizer, texts, max_length=8)
    assert ids.tolist() == [[1, 7, 9, 2], [1, 6, 7, 2], [1, 7, 10, 2]]
    assert tokens.decode(tokenizer, ids) == ["ab ab", "cab", "ab"]
    # What a student saves is read without the option.
    tokenizer.save(str(folder / "tokenizer.json"))
    again = tokens.load_tokenizer(folder / "tokenizer.json")
    np.testing.assert_array_equal(tokens.encode(again, texts, max_length=8), ids)


def test_a_space_before_the_first_word(folder):
    (folder / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    tokenizer = tokens.load_tokenizer(folder, padding_id=1)
    assert tokens.encode(tokenizer, ["ab"], max_length=8).tolist() == [[1, 9, 2]]


@pytest.mark.parametrize("form", ["RobertaProcessing", "TemplateProcessing", "Sequence"])
def test_ids_are_exchanged_wherever_they_are(folder, form):
    tokenizer = tokens.load_byte_pairs(folder / "vocab.json")
    library = tokenizers.processors
    processor = library.RobertaProcessing(("</s>", 2), ("<s>", 0))
    if form == "Sequence":
        processor = library.Sequence([processor])
    if form != "TemplateProcessing":
        tokenizer.post_processor = processor
    before = tokenizer.encode("ab")
    after = exchange_ids(tokenizer, 0, 1).encode("ab")
    assert before.ids == [0, 7, 2] and after.ids == [1, 7, 2]
    assert before.tokens == after.tokens and tokenizer.token_to_id("<pad>") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("merges.txt", None, "has a vocab.json but no merges.txt: copy it too"),
        ("merges.txt", "a b c", "merges.txt, line 1 must be two tokens"),
        ("merges.txt", "a x", "vocab.json and merges.txt do not fit .*: copy both"),
        ("vocab.json", "[]", "vocab.json must be a JSON object, got list"),
        ("vocab.json", "{", "vocab.json is not valid JSON"),
        ("vocab.json", '{"a": 0}', "lacks <s>, <pad>, </s>, <unk>: is it a vocabulary of RoBERTa"),
        ("vocab.json", '{"<s>": "x"}', "lacks <pad>"),
    ],
)
def test_damaged_files(folder, name, content, message):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        tokens.load_tokenizer(folder, padding_id=1)
    assert "\n" not in str(error.value)


def test_padding_of_another_id_is_refused(folder):
    with pytest.raises(DataError, match="<pad> has the id 1, but 0 must be padding"):
        tokens.load_tokenizer(folder)
