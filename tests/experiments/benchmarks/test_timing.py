"""Rounds and ratios of the benchmarks, and the files and notes that they leave."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

from experiments.benchmarks import beside_torch, timing
from experiments.benchmarks.timing import Ratio
from experiments.common.cli import OptionError


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances by a millisecond each time it is read."""
    ticks = iter(np.arange(0, 1000, 0.001))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))


def test_ratios_are_taken_round_by_round():
    # The second round was slow for both cases: the ratios are 2, 2, 3, 2, not those of the sums.
    ratio = Ratio.of([2.0, 20.0, 3.0, 2.0], [1.0, 10.0, 1.0, 1.0])
    assert ratio == (2.0, 2.0, 2.25) and str(ratio) == "2.00 (2.00–2.25)" and ratio.excludes_one
    assert not Ratio(0.9, 1.2, 1.3).excludes_one
    assert Ratio(0.7, 0.8, 0.9).excludes_one


@pytest.mark.usefixtures("clock")
def test_samples_have_several_calls_and_wait_once():
    calls, waits = [], []
    rounds = timing.time_rounds([lambda: calls.append(1) or len(calls)], 1, wait=waits.append)
    # One call may compile and one measures how many make a sample; five calls fill a sample.
    assert next(rounds) == [pytest.approx(0.0002)]
    assert len(calls) == 1 + 1 + 5 and waits == [1, 2, 7]


@pytest.mark.usefixtures("clock")
def test_rounds_alternate_their_direction():
    calls = []
    order = [lambda name=name: calls.append(name) for name in "abc"]
    rounds = list(timing.time_rounds(order, 3))
    assert [len(seconds) for seconds in rounds] == [3, 3, 3]
    assert "".join(calls[6::5]) == "abccbaabc"


@pytest.mark.usefixtures("clock")
def test_settling_is_not_timed():
    calls = []
    (seconds,) = timing.time_rounds([lambda: calls.append(1)], 1, settle_seconds=0.0105)
    assert seconds == [pytest.approx(0.0002)]
    assert len(calls) == 1 + 1 + 10 + 5


@dataclasses.dataclass
class Options:
    workdir: str
    rounds: int = 3

    def check(self):
        if not self.rounds:
            raise OptionError("none")


def test_folder_is_made_unless_an_option_is_invalid(tmp_path):
    with pytest.raises(OptionError):
        timing.prepare_folder(Options(str(tmp_path / "not"), 0))
    assert not list(tmp_path.iterdir())
    folder = timing.prepare_folder(Options(str(tmp_path / "some" / "where")))
    assert folder.is_dir() and timing.prepare_folder(Options(str(folder))) == folder


def test_writes_options_environment_and_results(tmp_path):
    options = Options(str(tmp_path))
    setting = beside_torch.write_results(
        tmp_path, options, None, {"summary": ["fast"], "rows": []}, rounds=3
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["config", "environment", "summary", "rows"]
    assert results["config"] == {"workdir": str(tmp_path), "rounds": 3}
    assert results["summary"] == ["fast"]
    environment = results["environment"]
    assert environment["torch"] is None
    assert environment["threads"] == beside_torch.available_cores() > 0
    assert f"JAX {environment['jax']}, PyTorch not installed, 3 rounds" in setting


def test_pytorch_is_left_out_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    torch, (note,) = beside_torch.load_torch(lambda: pytest.fail("PyTorch is not installed"))
    assert torch is None and "`pip install torch`" in note


@pytest.mark.parametrize(("limits", "shown"), [((0.6, 1.4), "0.7"), ((0.05, 40), "0.5")])
def test_an_axis_of_ratios_has_several_labels(limits, shown):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.set(xscale="log", xlim=limits)
    timing.set_ratio_ticks(axes.xaxis)
    ticks = [tick for tick in axes.get_xticks() if limits[0] <= tick <= limits[1]]
    labels = [axes.xaxis.get_major_formatter()(tick, 0) for tick in ticks]
    assert len(labels) >= 4 and {"1", shown} <= {*labels}
