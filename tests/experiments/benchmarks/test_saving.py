"""Benchmark of vectorised students and cached teachers: both sides take the same steps."""

import json

import numpy as np
import pytest

from experiments.benchmarks import saving, training_cases
from experiments.benchmarks.saving import Config
from experiments.benchmarks.training_cases import Case, Network
from experiments.common.cli import OptionError

TINY = Config(students=(2,), batch_size=4, rounds=2)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    monkeypatch.setattr(saving, "STUDENTS", {"dense": Network("CNN", ((), 4))})
    pair = Case("pair", Network("CNN", ((4,), 4)), Network("CNN", ((8,), 4)))
    monkeypatch.setattr(saving, "PAIRS", {"pair": pair})


@pytest.mark.thorough
def test_writes_and_prints_every_case(tmp_path, capsys):
    saving.main(Config(**vars(TINY) | {"workdir": str(tmp_path)}))
    text = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    (students,), (cache,) = results["students"], results["caches"]
    assert (students["network"], students["students"]) == ("dense", 2)
    assert cache["pair"] == "pair" and cache["bytes_per_image"] == 40
    assert len(students["seconds"]) == len(cache["live_seconds"]) == 2
    assert "dense" in text and "pair" in text and "…" not in text, "a cell is cut off"


@pytest.mark.thorough
def test_vectorized_students_take_the_step_of_a_single_one():
    network = saving.STUDENTS["dense"]
    single_call, vectorized_call = (
        saving.students_call(network, count, TINY.batch_size) for count in (1, 3)
    )
    for _ in range(2):
        single = np.asarray(single_call())
        vectorized = np.asarray(vectorized_call())
        np.testing.assert_allclose(vectorized[0, 0], single[0, 0], rtol=1e-5)
    assert len(set(vectorized[0].tolist())) == 3, "each student has weights of its own"


@pytest.mark.parametrize("options", [{"students": (1,)}, {"batch_size": 0}, {"rounds": 0}])
def test_invalid_options_are_refused(options):
    with pytest.raises(OptionError):
        Config(**options).check()


def test_seconds_are_those_of_a_step(monkeypatch):
    """Simulates an accelerator, which scans several steps, as this machine may have none."""
    monkeypatch.setattr(training_cases.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(training_cases, "SCANNED_STEPS", 2)
    monkeypatch.setattr(saving, "time_rounds", lambda calls, rounds: [[8.0, 4.0, 1.0]] * rounds)
    (row,) = saving.measure_caches(TINY)
    assert [row[f"{name}_seconds"] for name in ("live", "cached", "fill")] == [
        [4.0] * 2,
        [2.0] * 2,
        [1.0] * 2,
    ]
    assert row["speedup"] == (2.0, 2.0, 2.0)
