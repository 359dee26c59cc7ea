"""The page on the cost of a step shows what is recorded, and the formulas say the same."""

import json
import re
from pathlib import Path

import pytest

from experiments.benchmarks import cost
from experiments.benchmarks.step_cost import communication, pairs, tables
from experiments.benchmarks.step_cost.machines import MACHINES, Line

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "results" / "cost.md").read_text(encoding="utf-8")
RECORD = json.loads((ROOT / "experiments" / "results" / "cost.json").read_text(encoding="utf-8"))
ROWS = RECORD["communication"]


@pytest.mark.parametrize("name", tables.make_tables(RECORD))
def test_page_shows_the_recorded_table(name):
    (shown,) = re.findall(rf"^<!-- cost: {name} -->\n((?:\|.*\n)+)", PAGE, re.M)
    assert shown == tables.make_tables(RECORD)[name] + "\n"


def test_recorded_formulas_are_those_of_the_code():
    """Of the pair whose layers are found fastest; the code is the same for all."""
    computed = list(cost.find_machine_bounds("cnn", pairs.PAIRS["cnn"]))
    assert [row for row in RECORD["bounds"] if row["pair"] == "cnn"] == computed


def test_recorded_programs_send_what_the_formulas_say():
    for row in ROWS:
        if row["placement"] == communication.MODEL_MESH:
            # XLA joins a weight of the teacher, or divides its product.
            assert 0 < row["compiled_sent"] <= 1.001 * row["paper_sent"]
        else:
            assert row["compiled_sent"] == pytest.approx(row["paper_sent"], rel=1e-3)
    assert {row["devices"] for row in ROWS} == {1, 2, 4, 8}
    assert {row["processes"] for row in ROWS} == {1, 2, 4}


@pytest.mark.parametrize("pair", sorted({row["pair"] for row in ROWS}))
def test_gradients_keep_their_bytes_and_the_batch_of_a_mesh_grows_with_weak_scaling(pair):
    rows = [row for row in ROWS if row["processes"] == 1]
    mesh = [r for r in rows if (r["pair"], r["placement"]) == (pair, "mesh") and r["devices"] > 1]
    parts = {row["part"]: row for row in RECORD["parts"] if row["pair"] == pair}
    gradients = parts["optimizer"]["paper"]["bytes"] / 5
    example = parts["input"]["paper"]["bytes"] / 2 / parts["input"]["batch"]
    for row in mesh:
        rounds = 2 * (row["devices"] - 1) / row["devices"]
        rest = row["compiled_sent"] / rounds - gradients
        # Batch norm, indices and the loss are small beside them.
        assert rest == pytest.approx(row["batch"] * example, rel=0.1)
    # The last number of devices has one batch, because strong and weak scaling meet there.
    assert sorted(row["batch"] for row in mesh) == [8, 16, 32, 32, 32]


def test_processes_run_the_program_of_one_process():
    rows = ROWS
    for row in rows:
        if row["processes"] > 1:
            key = ("pair", "placement", "devices", "batch")
            (one,) = (r for r in rows if r["processes"] == 1 and all(r[k] == row[k] for k in key))
            assert row["compiled"] == one["compiled"]


def test_a_batch_is_bound_by_what_takes_longest():
    for row in RECORD["bounds"]:
        lines = {name: Line(**row["lines"][name]) for name in ("compute", "memory", "links")}
        chips = next(machine.chips for machine in MACHINES if machine.title == row["machine"])
        for batch, resource in row["bounds"]["mesh"]:
            longest = max(line.at(batch / chips) for line in lines.values())
            assert lines[resource].at(batch / chips) == pytest.approx(longest, rel=1e-6)
