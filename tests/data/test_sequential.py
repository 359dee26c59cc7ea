"""Records that can only be read one after another, and the state from which reading goes on."""

import json

import numpy as np
import pytest

from jaxkd import data
from jaxkd.data import sequential


class Numbers:
    """The numbers below `count`, by iterators that may tell and take back their state."""

    def __init__(self, count=5, state="dict", first=0):
        self.count, self.state, self.first = count, state, first
        self.reads = []

    def __iter__(self):
        return {"none": Iterator, "dict": StatefulIterator, "bytes": BytesIterator}[self.state](
            self
        )


class Iterator:
    def __init__(self, source):
        self.source, self.next = source, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.next == self.source.count:
            raise StopIteration
        number = self.source.first + self.next
        self.source.reads.append(number)
        self.next += 1
        return {"inputs": np.float32([number]), "labels": np.int32(number % 3)}


class StatefulIterator(Iterator):
    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


class BytesIterator(Iterator):
    def get_state(self):
        return bytes([self.next])

    def set_state(self, state):
        (self.next,) = state


@pytest.fixture(autouse=True)
def small_sample(monkeypatch):
    """All others are read by the iterator."""
    monkeypatch.setattr(sequential, "SAMPLE_SIZE", 2)


def read(records, start, stop):
    return records.read(np.arange(start, stop))["inputs"][:, 0].tolist()


@pytest.mark.parametrize("state", ["none", "dict", "bytes"])
def test_reads_in_order_and_starts_again_at_the_end(state):
    records = data.SequentialRecords(Numbers(state=state), count=5)
    assert records["inputs"].shape == (5, 1) and records["labels"].dtype == np.int32
    assert read(records, 0, 2) == [0, 1]
    assert read(records, 2, 4) == [2, 3]
    assert read(records, 4, 12) == [4, 0, 1, 2, 3, 4, 0, 1]
    # From the start again, as for another stage.
    assert read(records, 1, 4) == [1, 2, 3]
    assert records["labels"][2:].tolist() == [2, 0, 1]


def test_a_function_makes_the_source_of_each_epoch():
    records = data.SequentialRecords(lambda epoch: Numbers(3, first=10 * epoch), count=3)
    assert read(records, 1, 8) == [1, 2, 10, 11, 12, 20, 21]


@pytest.mark.parametrize("state", ["none", "dict", "bytes"])
def test_goes_on_from_a_state(state):
    def make_records(sources):
        def start(epoch):
            sources.append(Numbers(4, state, first=10 * epoch))
            return sources[-1]

        return data.SequentialRecords(start, count=4)

    records = make_records([])
    assert read(records, 2, 7) == [2, 3, 10, 11, 12]
    saved = json.loads(json.dumps(records.get_state()))
    expected = read(records, 7, 12)
    sources = []
    again = make_records(sources)
    again.set_state(saved)
    opened = len(sources)
    assert read(again, 7, 12) == expected == [13, 20, 21, 22, 23]
    # Without a state, the epoch is read up to its place; earlier epochs never are.
    skipped = [10, 11, 12] if state == "none" else []
    assert sources[opened - 1].reads == [*skipped, 13]


def test_a_state_of_another_source_is_named():
    records = data.SequentialRecords(Numbers(state="bytes"), count=5)
    state = {"row": 3, "epoch": 0, "row_in_epoch": 3, "iterator": 3}
    with pytest.raises(data.DataError, match="does not go on from its state in the checkpoint"):
        records.set_state(state)


def test_the_digest_is_that_of_text_and_first_records():
    def digest(**options):
        return data.SequentialRecords(Numbers(**options), count=5, fingerprint="1")["inputs"].digest

    assert digest() == digest(state="none")
    assert digest() != digest(first=1)
    other = data.SequentialRecords(Numbers(), count=5, fingerprint="2")["inputs"].digest
    assert digest() != other


def test_what_needs_another_order_is_refused():
    records = data.SequentialRecords(Numbers(), count=5)
    with pytest.raises(data.DataError, match="read in their order alone: pass a source with rand"):
        records.read(np.array([3, 1]))
    with pytest.raises(data.DataError, match="sequential records cannot be selected"):
        records.select(np.array([1]))
    assert read(records, 0, 2) == [0, 1]


def fail(epoch):
    yield {"inputs": np.zeros(1)}
    yield {"inputs": np.zeros(1)}
    raise OSError("no disk")


def change_shape(epoch):
    for length in (1, 1, 2):
        yield {"inputs": np.zeros(length)}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (fail, r"record 2 cannot be read \(OSError: no disk\)"),
        (change_shape, "record 2 has 'inputs' as .*, but the first one as"),
        (lambda epoch: [{"inputs": 1.0}, {"inputs": 1.0}, None], "record 2 is None"),
        (lambda epoch: [{"inputs": 1.0}, {"inputs": 1.0}, 3], "record 2 is a int, not a dict"),
        (lambda epoch: [{"inputs": 1.0}] * 2 if not epoch else [], "no record in epoch 1"),
    ],
)
def test_faults_of_a_record_name_it(source, message):
    records = data.SequentialRecords(source, count=9)
    with pytest.raises(data.DataError, match=message):
        records.read(np.arange(2, 4))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (iter([1, 2]), {}, "cannot be started again: pass a function of the epoch"),
        ([], {}, "no record in epoch 0"),
        ({"inputs": 1}, {}, "a dict has no records to iterate over"),
        (3, {}, "a int has no records to iterate over"),
        (Numbers(), {"count": 0}, "count is 0: pass the number of records of an epoch"),
        (Numbers(), {"count": True}, "count is True"),
        (Numbers(), {"count": None}, "count is None"),
    ],
)
def test_unfit_sources_are_refused(source, options, message):
    with pytest.raises(data.DataError, match=message):
        data.SequentialRecords(source, **{"count": 2} | options)


def test_a_source_that_starts_otherwise_each_time_is_named():
    generator = np.random.default_rng(0)
    records = data.SequentialRecords(
        lambda epoch: [{"inputs": generator.random()} for _ in range(3)], count=3
    )
    with pytest.raises(data.DataError, match="record 0 has another 'inputs' when it is read again"):
        _ = records.sample


def make_grain(kind):
    """Makes an `IterDataset` that filters, or a `DataLoader` with a state in bytes."""
    grain = pytest.importorskip("grain.python")

    def to_record(number):
        return {"inputs": np.float32([number]), "labels": np.int32(number % 3)}

    if kind == "IterDataset":
        dataset = grain.MapDataset.range(20).shuffle(seed=1).map(to_record)
        return dataset.to_iter_dataset().filter(lambda record: record["labels"] < 2)
    sampler = grain.IndexSampler(
        14, num_epochs=1, shuffle=True, seed=1, shard_options=grain.NoSharding()
    )
    return grain.DataLoader(
        data_source=grain.RangeDataSource(0, 14, 1), sampler=sampler, operations=[Map(to_record)]
    )


def Map(function):
    grain = pytest.importorskip("grain.python")

    class MapRecords(grain.MapTransform):
        def map(self, element):
            return function(element)

    return MapRecords()


@pytest.mark.parametrize("kind", ["IterDataset", "DataLoader"])
def test_grain_goes_on_from_a_state(kind):
    records = data.SequentialRecords(make_grain(kind), count=14)
    unbroken = read(records, 2, 24)
    numbers = [n for n in range(20) if n % 3 < 2] if kind == "IterDataset" else range(14)
    assert sorted(read(records, 0, 14)) == list(numbers)
    assert len(unbroken) == 22 and unbroken[14 - 2 :] == read(records, 0, 10)
    for stop in (9, 14, 17):
        read(records, 2, stop)
        saved = json.loads(json.dumps(records.get_state()))
        again = data.SequentialRecords(make_grain(kind), count=14)
        again.set_state(saved)
        assert read(again, stop, 24) == unbroken[stop - 2 :]
