"""Records that are read when they are needed, and what is refused of them."""

import numpy as np
import pytest

from jaxkd import data
from jaxkd.data.records import SAMPLE_SIZE, is_streamed, scannable

INPUTS = np.random.default_rng(0).normal(size=(600, 3)).astype(np.float32)


class Source:
    """A source that counts what is read."""

    def __init__(self, count=600):
        self.count = count
        self.reads = []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.reads.append(index)
        return {"inputs": INPUTS[index], "labels": index % 3}


class BatchSource(Source):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


@pytest.mark.parametrize("kind", [Source, BatchSource])
@pytest.mark.parametrize("index", [5, [7, 2, 7], slice(3, 6), np.arange(600) > 595])
def test_column_reads_the_rows_of_the_array(kind, index):
    source = kind()
    column = data.Records(source)["inputs"]
    source.reads.clear()
    np.testing.assert_array_equal(column[index], INPUTS[index])
    assert source.reads == np.atleast_1d(np.arange(600)[index]).tolist()
    assert column.shape == INPUTS.shape
    assert column.dtype == INPUTS.dtype
    with pytest.raises(TypeError, match=r"'inputs' is streamed, 600 records.*\[start:stop\]"):
        np.asarray(column)


def test_selections_are_read_by_their_own_rows():
    records = data.Records(Source()).select(np.array([10, 20, 30])).select(np.array([2, 0]))
    assert records.count == 2
    np.testing.assert_array_equal(records["inputs"][:], INPUTS[[30, 10]])
    np.testing.assert_array_equal(records["labels"].select(np.array([1]))[:], [1])


def test_sample_is_spread_and_read_once():
    source = Source()
    column = data.Records(source)["inputs"]
    sample = scannable(column)
    assert len(sample) == SAMPLE_SIZE
    np.testing.assert_array_equal(sample[[0, -1]], INPUTS[[0, -1]])
    source.reads.clear()
    assert scannable(column) is sample
    assert not source.reads
    assert scannable(INPUTS) is INPUTS


def test_digest_tells_other_records():
    sources = Source(), Source(599)
    digests = {data.Records(source)["inputs"].digest for source in sources}
    digests.add(data.Records(Source(), fingerprint="2")["inputs"].digest)
    digests.add(data.Records(Source())["labels"].digest)
    digests.add(data.Records(Source(), indices=np.arange(600)[::-1])["inputs"].digest)
    assert len(digests) == 5
    assert data.Records(Source())["inputs"].digest in digests


def test_dicts_within_become_columns_by_name():
    records = data.Records([{"inputs": {"ids": [1, 2], "mask": True}}] * 4)
    assert is_streamed({"a": 1, "inputs": records["inputs"]})
    assert records["inputs"]["ids"][1:3].tolist() == [[1, 2], [1, 2]]
    assert records["inputs"]["mask"].name == "inputs/mask"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (iter([1]), {}, "list_iterator cannot be read in any order"),
        ({"inputs": INPUTS}, {}, "dict cannot be read in any order"),
        ([], {}, "there is no record"),
        ([INPUTS[0]], {}, "record 0 is a ndarray, not a dict"),
        ([None], {}, "record 0 is None, as grain's filter"),
        ([{}], {}, "record 0 is empty"),
        ([{"inputs": 1, "id": "a"}], {}, "record 0 has values of dtype <U1 as 'id'"),
        ([{"a/b": 1}], {}, "record 0 has the name 'a/b'"),
        ([{"inputs": 1}], {"indices": np.array([1])}, "indices are from 1 to 1, but there are 1"),
        ([{"inputs": 1}], {"indices": np.array([True])}, "indices must be integers"),
        ([{"inputs": 1}], {"threads": 0}, "threads is 0"),
    ],
)
def test_refuses_other_sources(source, options, message):
    with pytest.raises(data.DataError, match=message):
        data.Records(source, **options)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"inputs": np.zeros(2)}, r"record 1 has 'inputs' as float64 \[2\], .* float64 \[3\]"),
        ({"inputs": np.zeros(3, np.uint8)}, r"record 1 has 'inputs' as uint8 \[3\]"),
        ({"inputs": np.zeros(3), "more": 1}, "record 1 has 'more' as int64 .* as missing"),
    ],
)
def test_refuses_a_record_unlike_the_first(record, message):
    records = data.Records([{"inputs": np.zeros(3)}, record])
    with pytest.raises(data.DataError, match=message):
        records.read([0, 1])


class RandomSource(Source):
    """A source that augments what it reads."""

    def __getitem__(self, index):
        self.reads.append(index)
        return {"inputs": INPUTS[index] + len(self.reads)}


class BufferSource(Source):
    """A source that reads into one array."""

    buffer = np.zeros(3, np.float32)

    def __getitem__(self, index):
        self.buffer[:] = INPUTS[index]
        return {"inputs": self.buffer}


@pytest.mark.parametrize("source", [RandomSource(), BufferSource()])
def test_refuses_a_record_that_changes(source):
    with pytest.raises(data.DataError, match="record 0 has another 'inputs' when it is read again"):
        data.Records(source).digest  # noqa: B018


@pytest.mark.parametrize("fails_in", ["source", "convert"])
def test_names_the_record_that_cannot_be_read(fails_in):
    def fail_at_two(record):
        if record["labels"] == 2:
            raise OSError("disk gone")
        return record

    class FailingSource(Source):
        def __getitem__(self, index):
            return fail_at_two(super().__getitem__(index))

    in_source = fails_in == "source"
    source = FailingSource() if in_source else BatchSource()
    records = data.Records(source, None if in_source else fail_at_two)
    with pytest.raises(data.DataError, match="record 5 cannot be read .OSError: disk gone"):
        records.read([0, 3, 5, 8])
