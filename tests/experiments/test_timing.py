"""The rounds of the benchmarks: who is called when, what counts, what ratios say, and what is left on disk."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

from experiments import beside_torch, timing
from experiments.cli import OptionError
from experiments.timing import Ratio


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a millisecond each time that it is looked at."""
    ticks = iter(np.arange(0, 1000, 0.001))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))


def test_ratios_are_taken_round_by_round():
    # The second round met other work, which slowed both: the ratios are 2, 2, 3, 2 and not those of the sums.
    found = Ratio.of([2.0, 20.0, 3.0, 2.0], [1.0, 10.0, 1.0, 1.0])
    assert found == (2.0, 2.0, 2.25) and str(found) == "2.00 (2.00–2.25)" and found.clear
    assert not Ratio(0.9, 1.2, 1.3).clear
    assert Ratio(0.7, 0.8, 0.9).clear


@pytest.mark.usefixtures("clock")
def test_samples_are_of_many_calls_which_are_waited_for_once():
    calls, waits = [], []
    rounds = timing.time_rounds([lambda: calls.append(1) or len(calls)], 1, wait=waits.append)
    # One call may compile and one tells how many make a sample; five take as long as a sample is to be.
    assert next(rounds) == [pytest.approx(0.0002)]
    assert len(calls) == 1 + 1 + 5 and waits == [1, 2, 7]


@pytest.mark.usefixtures("clock")
def test_rounds_go_back_and_forth():
    calls = []
    order = [lambda name=name: calls.append(name) for name in "abc"]
    rounds = list(timing.time_rounds(order, 3))
    assert [len(one) for one in rounds] == [3, 3, 3]
    assert "".join(calls[6::5]) == "abccbaabc"


@pytest.mark.usefixtures("clock")
def test_settling_is_not_timed():
    calls = []
    (seconds,) = timing.time_rounds([lambda: calls.append(1)], 1, settle=0.0105)
    assert seconds == [pytest.approx(0.0002)]
    assert len(calls) == 1 + 1 + 10 + 5


@dataclasses.dataclass
class Options:
    workdir: str
    rounds: int = 3

    def check(self):
        if not self.rounds:
            raise OptionError("none")


def test_begins_with_a_folder_unless_an_option_is_wrong(tmp_path):
    with pytest.raises(OptionError):
        timing.begin(Options(str(tmp_path / "not"), 0))
    assert not list(tmp_path.iterdir())
    folder = timing.begin(Options(str(tmp_path / "some" / "where")))
    assert folder.is_dir() and timing.begin(Options(str(folder))) == folder


def test_leaves_options_environment_and_what_was_found(tmp_path):
    options = Options(str(tmp_path))
    setting = beside_torch.write_results(tmp_path, options, None, {"summary": ["fast"], "rows": []}, rounds=3)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["config", "environment", "summary", "rows"]
    assert results["config"] == {"workdir": str(tmp_path), "rounds": 3} and results["summary"] == ["fast"]
    environment = results["environment"]
    assert environment["torch"] is None and environment["threads"] == beside_torch.cores() > 0
    assert f"JAX {environment['jax']}, PyTorch not installed, 3 rounds" in setting


def test_stands_alone_without_pytorch(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    torch, (note,) = beside_torch.load_torch(lambda: pytest.fail("made where it is not installed"))
    assert torch is None and "`pip install torch`" in note
