"""What students at once and cached teachers save: both sides take the same steps, and every case is told."""

import json

import numpy as np
import pytest

from experiments import saving_benchmark, training_benchmark
from experiments.cli import OptionError
from experiments.saving_benchmark import Config
from experiments.training_benchmark import Case, Network

TINY = Config(students=(2,), batch_size=4, rounds=2)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(saving_benchmark, "STUDENTS", {"dense": Network("CNN", ((), 4))})
    pair = Case("pair", Network("CNN", ((4,), 4)), Network("CNN", ((8,), 4)))
    monkeypatch.setattr(saving_benchmark, "PAIRS", {"pair": pair})


def test_leaves_and_prints_every_case(tmp_path, capsys):
    saving_benchmark.main(Config(**vars(TINY) | {"workdir": str(tmp_path)}))
    text, results = capsys.readouterr().out, json.loads((tmp_path / "results.json").read_text())
    (students,), (cache,) = results["students"], results["caches"]
    assert (students["network"], students["students"]) == ("dense", 2)
    assert cache["pair"] == "pair" and cache["bytes_an_image"] == 40
    assert all(len(row[name]) == 2 for row, name in ((students, "seconds"), (cache, "live_seconds")))
    assert "dense" in text and "pair" in text and "…" not in text, "a cell is cut off"


def test_students_at_once_take_the_step_of_one():
    network = saving_benchmark.STUDENTS["dense"]
    one, three = (saving_benchmark.students_call(network, count, TINY) for count in (1, 3))
    for _ in range(2):
        alone, at_once = np.asarray(one()), np.asarray(three())
        np.testing.assert_allclose(at_once[0, 0], alone[0], rtol=1e-5)
    assert len(set(at_once[0].tolist())) == 3, "each student has weights of its own"


@pytest.mark.parametrize("options", [{"students": (1,)}, {"batch_size": 0}, {"rounds": 0}])
def test_refuses_what_makes_no_sense(options):
    with pytest.raises(OptionError):
        Config(**options).check()


def test_seconds_are_those_of_a_step(monkeypatch):
    """Accelerators scan several, and this machine may have none."""
    monkeypatch.setattr(training_benchmark.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(training_benchmark, "SCANNED_STEPS", 2)
    monkeypatch.setattr(saving_benchmark, "time_rounds", lambda calls, rounds: [[8.0, 4.0, 1.0]] * rounds)
    (row,) = saving_benchmark.measure_caches(TINY)
    assert [row[f"{name}_seconds"] for name in ("live", "cached", "fill")] == [[4.0] * 2, [2.0] * 2, [1.0] * 2]
    assert row["live_by_cached"] == (2.0, 2.0, 2.0)
