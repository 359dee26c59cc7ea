"""Benchmark of records that are read from disk: both sides train, and each is measured."""

import json

import numpy as np
import pytest

from experiments.benchmarks import streaming
from experiments.benchmarks.streaming import Clock, Config
from experiments.common.cli import OptionError


@pytest.mark.parametrize(
    "options",
    [{"steps": 20}, {"batch_size": 0}, {"rounds": 0}, {"gigabytes": 1e-6}, {"side": 0}],
)
def test_invalid_options_are_refused(options):
    with pytest.raises(OptionError):
        Config(**options).check()


def test_clock_starts_after_the_first_steps(monkeypatch):
    times = iter([10.0, 14.0])
    monkeypatch.setattr(streaming.time, "perf_counter", lambda: next(times))
    clock = Clock(52)
    # Calls of several steps, as on an accelerator.
    for count in (8, 8, 8, 8, 8, 8, 4):
        clock.advance(count, None)
    assert clock.marks == [(24, 10.0), (52, 14.0)]
    assert clock.steps_per_second == 7.0


def test_records_hold_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "SHARD_BYTES", 10 * 4 * 4 * 3)
    config = Config(gigabytes=25 * 4 * 4 * 3 / 1e9, side=4, batch_size=8)
    files = streaming.write_records(config, tmp_path)
    records = streaming.open_records(files, 4)
    assert (len(files), records.count, config.num_records) == (3, 25, 25)
    values = records.read(np.arange(25))
    assert values["inputs"].shape == (25, 4, 4, 3)
    assert len(np.unique(values["labels"])) > 1 and values["labels"].max() < 10


@pytest.mark.thorough
def test_trains_on_both_in_turn(tmp_path, capsys):
    config = Config(
        gigabytes=1e-4, side=12, batch_size=8, steps=22, rounds=1, workdir=str(tmp_path)
    )
    streaming.main(config)
    trainings = json.loads((tmp_path / "results.json").read_text())["trainings"]
    for mode in streaming.MODES:
        (row,) = trainings[mode]
        assert row["images_per_second"] > 0 and row["peak_bytes"] > 1e8
    assert "stream" in capsys.readouterr().out
    assert not list(tmp_path.glob("records-*")), "the records are left"
