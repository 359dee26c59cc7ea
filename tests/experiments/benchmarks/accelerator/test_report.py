"""The page of accelerators holds what the recorded results say."""

import json
from pathlib import Path

import pytest

from experiments.benchmarks.accelerator import report, results
from experiments.benchmarks.accelerator.queue import QUEUE
from experiments.common.cli import OptionError

ROOT = Path(__file__).parents[4]
PAGE = ROOT / "docs" / "results" / "accelerators.md"
RECORDED = ROOT / "experiments" / "results" / "accelerators"

FOUND = {
    "smoke": {"differences": {"default": {"kl_divergence": 2e-3, "cnn": 1e-3, "plan": 5e-4}}},
    "steps_float32": {
        "pairs": {
            "distil_cnn": {
                "per_second": {"jaxkd": 123456.7},
                "ratios": {"eager": [2.9, 3.0, 3.1]},
                "first_call_seconds": {"jaxkd": 11.0},
                "roofline_share": 0.255,
            }
        }
    },
    "students": {
        "rows": [
            {"network": "cnn", "students": 32, "seconds": [0.002, 0.003], "ratio": [4.0, 5.0, 6.0]}
        ],
        "sweep": {"seconds": 1.25, "ratio": 2.5},
    },
    "fused_losses": {
        "rows": [
            {
                "loss": "linear_kl_divergence",
                "implementation": "plain",
                "seconds": [0.1],
                "peak_bytes": 24.4e9,
                "planned_bytes": None,
            }
        ]
    },
    "cifar10_30_epochs": {
        "seconds": 45.67,
        "whole_seconds": 81.2,
        "test_accuracy": 0.9123,
        "teacher_test_accuracy": 0.93,
        "train_images": 45000,
    },
    "resume": {"differences": {"killed": [], "without_flags": ["metrics: differ"]}},
    "labels": {"test_accuracies": [0.9, 0.91], "epochs": 60, "teacher_test_accuracy": None},
}


def write(folder, found, **changes):
    for measurement in QUEUE:
        if measurement.name in found:
            content = results.identify(measurement, "abc") | {
                "tiny": False,
                "device": "Imaginary 9",
                "environment": {"jax": "0.99"},
                "results": found[measurement.name],
            }
            path = folder / f"{measurement.name}.json"
            path.write_text(json.dumps(content | changes), encoding="utf-8")


def test_page_holds_the_recorded_results():
    folders = sorted(path for path in RECORDED.glob("*") if path.is_dir())
    text = PAGE.read_text("utf-8")
    assert report.fill_page(text, [report.read_device(folder) for folder in folders]) == text
    assert {match["name"] for match in report.MARKER.finditer(text)} == set(report.TABLES)


def test_cells_hold_the_results_and_the_others_are_empty(tmp_path):
    write(tmp_path, FOUND)
    device = report.read_device(tmp_path)
    tables = {name: report.make_table(name, [device]) for name in report.TABLES}
    assert "7 of 14" in tables["devices"] and "0.99" in tables["devices"]
    assert "2.0e-03 (kl_divergence)" in tables["smoke"] and "1.0e-03 (cnn)" in tables["smoke"]
    assert "123,457" in tables["steps"] and "3.00 (2.90–3.10)" in tables["steps"]
    assert "25.5%" in tables["steps"]
    assert "2.50" in tables["students"] and "5.00 (4.00–6.00)" in tables["students"]
    assert "24.4" in tables["fused"] and "100.0" in tables["fused"]
    assert "45.7" in tables["epochs"] and "91.23" in tables["epochs"]
    assert "same bits" in tables["resume"] and "metrics: differ" in tables["resume"]
    assert "90.50 ± 0.71" in tables["kd_rows"]
    for name, table in tables.items():
        empty = report.make_table(name, [])
        assert len(table.splitlines()) == len(empty.splitlines()), name
        assert "None" not in table + empty and "nan" not in table + empty


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tiny": True}, "is of toy sizes"),
        ({"options": {"size": 1}}, "has other options than the queue has now"),
    ],
)
def test_other_results_are_refused(tmp_path, changes, message):
    write(tmp_path, {"labels": FOUND["labels"]}, **changes)
    with pytest.raises(OptionError, match=message):
        report.read_device(tmp_path)


def test_unknown_files_and_markers_are_refused(tmp_path):
    (tmp_path / "other.json").write_text('{"tiny": false}')
    with pytest.raises(OptionError, match="no measurement has this name"):
        report.read_device(tmp_path)
    (tmp_path / "other.json").write_text("[")
    with pytest.raises(OptionError, match="is no file of results"):
        report.read_device(tmp_path)
    with pytest.raises(OptionError, match="unknown table: nothing"):
        report.fill_page("<!-- accelerator: nothing -->\n<!-- end -->", [])


def test_command_fills_a_page(tmp_path, capsys):
    write(tmp_path, FOUND)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- accelerator: epochs -->\nold\n<!-- end -->\nafter\n")
    report.main(report.Config((str(tmp_path),), str(page)))
    text = page.read_text()
    assert "old" not in text and "45.7" in text and text.startswith("before\n<!--")
    assert "7 files of results of 1 devices" in capsys.readouterr().out
