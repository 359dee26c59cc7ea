"""Fills the tables of a page from the results of accelerators.

Each table of the page lies between two comments, `<!-- accelerator: NAME -->` and `<!-- end -->`,
and gets the rows of every device whose folder of results is given. What a device has not measured
stays empty. Results at toy sizes are refused.

Command: python -m experiments.benchmarks.accelerator.report experiments/results/accelerators/*
--page docs/results/accelerators.md

Time: seconds
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.benchmarks.accelerator import fused, kd_rows, results, steps, students
from experiments.benchmarks.accelerator.queue import QUEUE
from experiments.common import cli
from jaxkd._files import write_atomically
from jaxkd.cli.limits import expand
from jaxkd.runs import report as run_report

Results = Mapping[str, Mapping[str, Any]]
"""The contents of a device's files of results, by the name of the measurement."""
Row = list[str]
PAIRS = {
    "distil_cnn": "CNN ← CNN of twice the channels",
    "distil_resnet20": "ResNet-20 ← ResNet-56",
    "distil_wrn16_2": "WRN-16-2 ← WRN-40-2",
    "distil_lstm": "LSTM ← MiniLM",
}
LOSSES = {
    "linear_jensen_shannon_divergence": "Jensen–Shannon",
    "linear_kl_divergence": "KL",
    "linear_reverse_kl_divergence": "reverse KL",
}
MARKER = re.compile(
    r"(?P<start><!-- accelerator: (?P<name>\w+) -->\n).*?(?P<end><!-- end -->)", re.S
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the command."""

    results: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of results, one for each device."""
    page: str = "docs/results/accelerators.md"
    """Page whose tables are filled."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        for folder in self.results:
            cli.require(expand(folder).is_dir(), f"{folder}: no such folder of results")
        cli.require(expand(self.page).is_file(), f"--page {self.page}: no such page")


def read_device(folder: Path) -> dict[str, dict[str, Any]]:
    """Reads the results of a device.

    Raises:
        OptionError: If a file is damaged, of toy sizes, or of other options than the queue's.
    """
    known = {measurement.name: measurement for measurement in QUEUE}
    contents = {}
    for path in sorted(folder.glob("*.json")):
        content = results.read(path)
        cli.require(content is not None, f"{path}: is no file of results")
        assert content is not None
        cli.require(
            not content.get("tiny", True), f"{path}: is of toy sizes; measure without --tiny"
        )
        cli.require(path.stem in known, f"{path}: no measurement has this name")
        expected = results.identify(known[path.stem], content.get("source", ""))
        cli.require(
            expected.items() <= content.items(),
            f"{path}: has other options than the queue has now; measure again",
        )
        contents[path.stem] = content
    return contents


def fill_page(text: str, devices: Sequence[Results]) -> str:
    """Returns the text of a page with its tables filled.

    Raises:
        OptionError: If a marker names no table.
    """

    def fill(match: re.Match) -> str:
        name = match["name"]
        cli.require(name in TABLES, f"the page has a marker of an unknown table: {name}")
        return f"{match['start']}{make_table(name, devices)}{match['end']}"

    return MARKER.sub(fill, text)


def make_table(name: str, devices: Sequence[Results]) -> str:
    """Makes a table with the rows of all devices, or with empty cells if there is none."""
    titles, make_rows = TABLES[name]
    rows = [row for device in devices or [{}] for row in make_rows(device)]
    return run_report.markdown_table(["device", *titles], rows) + "\n"


def _smoke_rows(device: Results) -> list[Row]:
    rows = []
    for name, flags in (("smoke", "none"), ("smoke_deterministic", "deterministic")):
        differences = _get(device, name, "differences") or {}
        for precision in ("default", "highest") if name == "smoke" else ("highest",):
            parts = differences.get(precision, {})
            networks = {"cnn", "resnet20", "lstm"}
            groups = (
                {part: value for part, value in parts.items() if part not in {*networks, "plan"}},
                {part: value for part, value in parts.items() if part in networks},
                {part: value for part, value in parts.items() if part == "plan"},
            )
            cells = [_format_largest(group) for group in groups]
            rows.append([_name(device), flags, precision, *cells])
    return rows


def _format_largest(parts: Mapping[str, float]) -> str:
    if not parts:
        return ""
    name, value = max(parts.items(), key=lambda item: item[1])
    return f"{value:.1e} ({name})"


def _steps_rows(device: Results) -> list[Row]:
    rows = []
    for dtype in ("float32", "bfloat16"):
        pairs = _get(device, f"steps_{dtype}", "pairs") or {}
        for name, title in PAIRS.items():
            pair = pairs.get(name, {})
            first = pair.get("first_call_seconds", {})
            rows.append(
                [
                    _name(device),
                    title,
                    dtype,
                    _format(pair.get("per_second", {}).get("jaxkd"), "{:,.0f}"),
                    *(
                        _format_ratio(pair.get("ratios", {}).get(version))
                        for version in ("eager", "compiled")
                    ),
                    " / ".join(_format(first.get(side), "{:.0f}") for side in ("jaxkd", "compiled"))
                    if first
                    else "",
                    _format(pair.get("roofline_share"), "{:.1%}"),
                    "2.0" if name == "distil_cnn" else "1.2",
                ]
            )
    return rows


def _students_rows(device: Results) -> list[Row]:
    found = _get(device, "students", "rows") or []
    options = students.Options()
    counts = [("cnn", count) for count in options.counts] + [
        (students.RESNET, options.resnet_count)
    ]
    rows = []
    for network, count in counts:
        row = next(
            (row for row in found if (row["network"], row["students"]) == (network, count)), {}
        )
        milliseconds = 1e3 * float(np.median(row["seconds"])) if row else None
        rows.append(
            [
                _name(device),
                f"{count} × {'CNN' if network == 'cnn' else 'ResNet-20'}",
                _format(milliseconds, "{:.2f}"),
                _format_ratio(row.get("ratio")),
                "6" if (network, count) == ("cnn", 32) else "",
            ]
        )
    sweep = _get(device, "students", "sweep") or {}
    count = options.seeds * len(options.temperatures) * len(options.alphas)
    rows.append(
        [
            _name(device),
            f"sweep of {count} CNNs as one program, {options.steps:,} steps",
            _format(1e3 * sweep["seconds"] if sweep else None, "{:,.0f} (whole plan)"),
            _format(sweep.get("ratio"), "{:.2f}"),
            "",
        ]
    )
    return rows


def _fused_rows(device: Results) -> list[Row]:
    found = _get(device, "fused_losses", "rows") or []
    rows = []
    for loss, title in LOSSES.items():
        for implementation in (*fused.IMPLEMENTATIONS, fused.TORCH):
            row = next(
                (
                    row
                    for row in found
                    if (row["loss"], row["implementation"]) == (loss, implementation)
                ),
                {},
            )
            seconds = row.get("seconds")
            is_target = (loss, implementation) == (fused.Options().losses[0], "fused")
            rows.append(
                [
                    _name(device),
                    title,
                    "PyTorch, eager" if implementation == fused.TORCH else implementation,
                    _format(1e3 * float(np.median(seconds)) if seconds else None, "{:.1f}"),
                    *(
                        _format(row[key] / 1e9 if row.get(key) else None, "{:.1f}")
                        for key in ("peak_bytes", "planned_bytes")
                    ),
                    "60 ms, 11 GB" if is_target else "",
                ]
            )
    return rows


def _epochs_rows(device: Results) -> list[Row]:
    found = _content(device, "cifar10_30_epochs")
    return [
        [
            _name(device),
            _format(found.get("seconds"), "{:.1f}"),
            _format(found.get("whole_seconds"), "{:.1f}"),
            _format_percent(found.get("test_accuracy")),
            _format_percent(found.get("teacher_test_accuracy")),
            _format(found.get("train_images"), "{:,}"),
            "60",
        ]
    ]


def _resume_rows(device: Results) -> list[Row]:
    differences = _get(device, "resume", "differences") or {}
    titles = {
        "killed": "killed and resumed, beside an undisturbed run, deterministic flags",
        "without_flags": "two undisturbed runs, no flags",
    }
    return [
        [
            _name(device),
            title,
            _describe_bits(differences[name]) if name in differences else "",
            "same bits" if name == "killed" else "",
        ]
        for name, title in titles.items()
    ]


def _describe_bits(lines: Sequence[str]) -> str:
    return lines[0] if lines else "same bits"


def _kd_rows(device: Results) -> list[Row]:
    rows = []
    for method in (kd_rows.LABELS, *kd_rows.METHODS):
        name = method if method == kd_rows.LABELS else f"kd_rows_{method}"
        found = _content(device, name)
        accuracies = [100 * accuracy for accuracy in found.get("test_accuracies", ())]
        cell = ""
        if accuracies:
            cell = f"{np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f}"
        rows.append(
            [
                _name(device),
                method,
                cell,
                _format_percent(found.get("teacher_test_accuracy")),
                _format(len(accuracies) or None, "{}"),
                _format(found.get("epochs"), "{}"),
            ]
        )
    return rows


def _devices_rows(device: Results) -> list[Row]:
    content = next(iter(device.values()), {})
    environment = content.get("environment", {})
    return [
        [
            _name(device),
            *(
                _format(environment.get(name), "{}")
                for name in ("python", "jax", "platform_version")
            ),
            _format(content.get("torch"), "{}"),
            _format(content.get("source"), "{}"),
            f"{len(device)} of {len(QUEUE)}",
        ]
    ]


TABLES: dict[str, tuple[Sequence[str], Callable[[Results], list[Row]]]] = {
    "devices": (
        ("Python", "jax", "platform", "PyTorch", "source of jaxkd", "measurements"),
        _devices_rows,
    ),
    "smoke": (("flags", "matmul precision", "losses", "networks", "plan"), _smoke_rows),
    "steps": (
        (
            *("student ← teacher", "dtype", "jaxkd, examples/s", "eager ÷ jaxkd"),
            *("torch.compile ÷ jaxkd", "first call, s (jaxkd / torch.compile)"),
            *("share of the roofline", "target, torch.compile ÷ jaxkd, at least"),
        ),
        _steps_rows,
    ),
    "students": (("students at once", "a step, ms", "÷ one student", "target"), _students_rows),
    "fused": (
        (
            *("loss", "implementation", "value and gradients, ms", "peak of the device, GB"),
            *("planned by XLA, GB", "target"),
        ),
        _fused_rows,
    ),
    "epochs": (
        (
            *("30 epochs, s", "with compilation, s", "student, % on test"),
            *("teacher, % on test", "training images", "target, s"),
        ),
        _epochs_rows,
    ),
    "resume": (("runs", "difference", "target"), _resume_rows),
    "kd_rows": (
        ("method", "student, % on test", "teacher, % on test", "seeds", "epochs"),
        _kd_rows,
    ),
}
"""Titles of the columns after the device, and the rows of a device, by the table's name."""


def _content(device: Results, name: str) -> Mapping[str, Any]:
    return device[name]["results"] if name in device else {}


def _get(device: Results, name: str, key: str) -> Any:
    return _content(device, name).get(key)


def _name(device: Results) -> str:
    return next((content["device"] for content in device.values()), "")


def _format(value: Any, template: str) -> str:
    return "" if value is None else template.format(value)


def _format_percent(value: float | None) -> str:
    return _format(None if value is None else 100 * value, "{:.2f}")


def _format_ratio(ratio: Sequence[float] | None) -> str:
    return "" if ratio is None else str(steps.Ratio(*ratio))


def main(config: Config) -> None:
    """Fills the page."""
    config.check()
    page = expand(config.page)
    devices = [read_device(expand(folder)) for folder in config.results]
    text = page.read_text("utf-8")
    cli.require(MARKER.search(text) is not None, f"--page {page}: has no marker of a table")
    write_atomically(page, fill_page(text, devices).encode())
    count = sum(map(len, devices))
    print(f"{page}: {count} files of results of {len(devices)} devices")


if __name__ == "__main__":
    cli.run(main, Config, __doc__, resumes=False)
