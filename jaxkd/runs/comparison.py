"""Comparison of finished runs: results side by side, differences over seeds, options, curves."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from jaxkd._files import describe_differences, write_atomically
from jaxkd._messages import list_some, shorten
from jaxkd.runs.errors import RunError
from jaxkd.runs.figures import COLOURS, Metric, plot_curves
from jaxkd.runs.growth import find_settings_of_results
from jaxkd.runs.report import markdown_table, results_table
from jaxkd.runs.results import ResultRow
from jaxkd.runs.run import IGNORED_OPTIONS, Run, fingerprint, read_run

CONFIDENCE = 0.95
"""Confidence of the intervals of differences, and of those of rows."""
_NO_DATA = fingerprint(())


class Difference(NamedTuple):
    """The difference in accuracy between two rows, in percentage points.

    Attributes:
        name: Name of the row to judge.
        baseline: Name of the row that it is compared with.
        mean: Mean difference.
        interval: Student's interval of the mean; `None` with fewer than two seeds.
        num_seeds: Number of seeds of each side.
        is_paired: Whether the differences are those of equal seeds on equal data.
        has_same_data: Whether both runs have data of one fingerprint, and as many test examples.
    """

    name: str
    baseline: str
    mean: float
    interval: tuple[float, float] | None
    num_seeds: tuple[int, int]
    is_paired: bool
    has_same_data: bool

    @property
    def is_claimed(self) -> bool:
        """Whether the interval excludes 0, and both runs have the same data."""
        if self.interval is None or not self.has_same_data:
            return False
        return not self.interval[0] <= 0 <= self.interval[1]

    def __str__(self) -> str:
        """Describes the difference in a sentence or two."""
        side = {1: "above", 0: "from", -1: "below"}[int(np.sign(round(self.mean, 1)))]
        text = f"{self.name} is {abs(self.mean):.1f} points {side} {self.baseline}"
        if self.interval is not None:
            text += f", 95 % interval {self.interval[0]:+.1f} to {self.interval[1]:+.1f}"
        text += f" ({self._describe_seeds()})."
        if not self.has_same_data:
            return f"{text} The runs have other data: no difference is claimed."
        if self.interval is None:
            return f"{text} One seed does not separate such a difference from chance."
        return text if self.is_claimed else f"{text} The interval has 0: no difference is claimed."

    def _describe_seeds(self) -> str:
        count, other = self.num_seeds
        if self.is_paired:
            return f"{count} seed{'s' if count > 1 else ''}, paired"
        return f"{count} and {other} seeds, not paired"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        runs: Name of each run, and its folder.
        rows: The rows of all runs, each named `run/stage`.
        options: For each option in which the runs differ, its value in each run.
        differences: The differences between equal stages of the first run and each other one; if
            one stage of each run was chosen, between these.
        metrics: The records of all runs, with stages named as the rows.
        notes: Sentences on what limits the comparison.
    """

    runs: Mapping[str, Path]
    rows: Sequence[ResultRow]
    options: Mapping[str, Sequence[Any]]
    differences: Sequence[Difference]
    metrics: Sequence[Metric]
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Returns the comparison as JSON values, without the records."""
        differences = [
            difference._asdict() | {"is_claimed": difference.is_claimed}
            for difference in self.differences
        ]
        return {
            "runs": {name: str(folder) for name, folder in self.runs.items()},
            "rows": [row.to_json() for row in self.rows],
            "options": {name: list(values) for name, values in self.options.items()},
            "differences": differences,
            "notes": list(self.notes),
        }


def compare_results(
    folders: Sequence[str | os.PathLike], *, stage: str | None = None
) -> Comparison:
    """Compares the results of finished runs.

    Differences are paired, seed by seed, if the runs have the same data: `arrays` of one
    fingerprint in `open_run`, which should have the test set among them, and as many test examples.
    The seeds are those of `seed` and `num_seeds` in the configuration, or of the records. Records
    that are not in ascending order, as of a plan with seeds 5 and 3, leave the order of the
    accuracies open, so that nothing is paired.

    Args:
        folders: The folders of two runs or more, each with `:stage` behind it to choose a stage.
        stage: The stage to choose in all runs that choose none. By default all stages.

    Returns:
        The comparison.

    Raises:
        ValueError: If there are fewer than two runs, or one is named twice.
        RunError: If a folder holds no finished run, it lacks the stage or accuracies, or a file is
            damaged.
        OSError: If a file cannot be read.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from jaxkd import runs
        >>> from jaxkd.runs import comparison
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name, accuracy in (("a", (0.80, 0.82, 0.81)), ("b", (0.85, 0.86, 0.86))):
        ...         run = runs.open_run(Path(folder) / name, {"run": name})
        ...         run.write_results([runs.ResultRow("student", accuracy=accuracy)])
        ...         del run
        ...     found = comparison.compare_results([Path(folder) / "a", Path(folder) / "b"])
        >>> found.options
        {'run': ['a', 'b']}
        >>> print(str(found.differences[0]).partition(",")[0])
        b/student is 4.7 points above a/student
    """
    chosen = [_choose(folder, stage) for folder in folders]
    if len(chosen) < 2:
        raise ValueError("name two runs or more to compare")
    if len({(run.folder.resolve(), name) for run, name in chosen}) < len(chosen):
        raise ValueError("a run is named twice: name other runs, or RUN:STAGE of each")
    labels = _label([run.folder for run, _ in chosen])
    rows: list[list[tuple[ResultRow, tuple[int, ...]]]] = []
    metrics: list[Metric] = []
    for label, (run, name) in zip(labels, chosen, strict=True):
        all_records = run.metrics()
        records = [record for record in all_records if name in (None, record["stage"])]
        rows.append(_read_rows(run, name, label, all_records))
        metrics += [
            record | {"stage": f"{label}/{record['stage']}"}
            for record in records
            if record.get("validation_accuracy") is not None
        ]
    # A run of which several stages were chosen counts once.
    runs = {label: run for label, (run, _) in zip(labels, chosen, strict=True)}
    folders_by_label = {label: run.folder for label, run in runs.items()}
    differences = _find_differences([run for run, _ in chosen], rows)
    listed = [row for run_rows in rows for row, _ in run_rows]
    notes = _describe_limits(runs, listed, differences)
    options = _find_options([*runs.values()])
    return Comparison(folders_by_label, listed, options, differences, metrics, notes)


def describe_comparison(comparison: Comparison) -> str:
    """Returns a comparison as Markdown: results, options, differences."""
    paragraphs = ["# Comparison of runs", results_table(comparison.rows)]
    if comparison.options:
        headers = ["option", *comparison.runs]
        cells = [[name, *map(str, values)] for name, values in comparison.options.items()]
        paragraphs.append(markdown_table(headers, cells))
    sentences = [*map(str, comparison.differences), *comparison.notes]
    paragraphs += ["\n".join(f"- {sentence}" for sentence in sentences)] if sentences else []
    if comparison.metrics:
        paragraphs.append("![Validation curves](compare_curves.png)")
    return "\n\n".join(paragraphs) + "\n"


def write_comparison(comparison: Comparison, folder: str | os.PathLike) -> Path:
    """Writes `compare.md`, `compare.json` and `compare_curves.png`.

    Args:
        comparison: From `compare_results`.
        folder: The folder, which is created if absent.

    Returns:
        The path of `compare.md`.

    Raises:
        RunError: If it is no folder, or has one of these files.
        OSError: If a file cannot be written.
        ImportError: If matplotlib or tabulate is missing.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is not a folder: choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    names = ("compare.md", "compare.json", "compare_curves.png")
    if existing := [name for name in names if (folder / name).exists()]:
        raise RunError(f"{folder} has {list_some(existing)}: name another folder")
    if comparison.metrics:
        names = _order_curves(comparison)
        plot_curves(comparison.metrics, folder / "compare_curves.png", names=names)
    text = json.dumps(comparison.to_json(), indent=2, allow_nan=False, default=str)
    write_atomically(folder / "compare.json", f"{text}\n".encode())
    path = folder / "compare.md"
    write_atomically(path, describe_comparison(comparison).encode())
    return path


def _choose(folder: str | os.PathLike, stage: str | None) -> tuple[Run, str | None]:
    """Returns a run and the stage that is chosen in it, if any."""
    name = os.fspath(folder)
    # A folder may have a colon in its name.
    head, separator, tail = name.rpartition(":")
    if separator and head and not Path(name).exists():
        name, stage = head, tail
    run = read_run(name)
    if not (run.folder / "results.json").exists():
        raise RunError(f"{run.folder} has no results yet: finish the run first")
    return find_settings_of_results(run) or run, stage


def _read_rows(
    run: Run, stage: str | None, label: str, records: Sequence[Metric]
) -> list[tuple[ResultRow, tuple[int, ...]]]:
    """Returns the rows of a run, named after it, and the seeds of each."""
    rows = [row for row in run.read_results() if row.accuracy]
    if not rows:
        raise RunError(f"{run.folder} has no accuracy to compare: see its report.md")
    names = [row.name for row in rows]
    if stage is not None and stage not in names:
        raise RunError(f"{run.folder} has no stage {shorten(stage, 40)!r}, but {list_some(names)}")
    found = []
    for row in rows:
        if stage in (None, row.name):
            seeds = _find_seeds(run, row, records)
            found.append((dataclasses.replace(row, name=f"{label}/{row.name}"), seeds))
    return found


def _find_seeds(run: Run, row: ResultRow, records: Sequence[Metric]) -> tuple[int, ...]:
    """Returns the seed of each accuracy of a row, or none if the run's files leave that open."""
    # In the order of the first record of each. A derived model has the seeds of its sources, and
    # no records. A pretrained one has one accuracy.
    own = [record for record in records if record["stage"] == row.name]
    seeds = tuple(dict.fromkeys(record["seed"] for record in own or records))
    if len(seeds) != len(row.accuracy):
        return ()
    # Experiments and `jaxkd distill` train these, in this order.
    first, count = run.config.get("seed"), run.config.get("num_seeds")
    if type(first) is int and count == len(seeds):
        expected = tuple(range(first, first + len(seeds)))
        if set(seeds) == set(expected):
            return expected
    # Accuracies have the order of the plan's seeds. That of the records may differ from it, because
    # a seed that is trained again appends its records.
    return seeds if list(seeds) == sorted(seeds) else ()


def _label(folders: Sequence[Path]) -> list[str]:
    """Names each run after its folder, with as many parents as make it different."""
    paths = [folder.resolve() for folder in folders]
    labels: list[str] = []
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-count:]) for path in paths]
        if len({*labels}) == len({*paths}):
            break
    # The same run may be named with several stages.
    return labels


def _find_differences(runs: Sequence[Run], rows: Sequence[Sequence[Any]]) -> list[Difference]:
    """Compares the rows of each run with those of the first one."""
    first_run, first_rows = runs[0], rows[0]
    are_chosen = all(len(run_rows) == 1 for run_rows in rows)
    differences = []
    for run, run_rows in zip(runs[1:], rows[1:], strict=True):
        for row, seeds in run_rows:
            for baseline, baseline_seeds in first_rows:
                if are_chosen or _stage_of(row) == _stage_of(baseline):
                    same_data = run.data == first_run.data and _has_one_size([row, baseline])
                    differences.append(_compare(row, seeds, baseline, baseline_seeds, same_data))
    return differences


def _stage_of(row: ResultRow) -> str:
    return row.name.rpartition("/")[2]


def _compare(
    row: ResultRow,
    seeds: Sequence[int],
    baseline: ResultRow,
    baseline_seeds: Sequence[int],
    same_data: bool,
) -> Difference:
    first = dict(zip(baseline_seeds, baseline.accuracy, strict=False))
    second = dict(zip(seeds, row.accuracy, strict=False))
    common = sorted(first.keys() & second.keys())
    if same_data and common:
        values = [100 * (second[seed] - first[seed]) for seed in common]
        mean, deviation, count = float(np.mean(values)), _deviation(values), len(values)
        error, freedom = deviation / math.sqrt(count), count - 1
        counts, is_paired = (count, count), True
    else:
        sides = [100 * np.array(side.accuracy) for side in (row, baseline)]
        mean = float(sides[0].mean() - sides[1].mean())
        counts, is_paired = (len(sides[0]), len(sides[1])), False
        error, freedom = _welch(sides)
    interval = None
    if freedom > 0:
        margin = _t_quantile(freedom) * error
        interval = (mean - margin, mean + margin)
    return Difference(row.name, baseline.name, mean, interval, counts, is_paired, same_data)


def _has_one_size(rows: Iterable[ResultRow]) -> bool:
    """Returns whether rows have as many test examples, as far as that is known."""
    return len({_count_test_examples(row) for row in rows} - {None}) <= 1


def _count_test_examples(row: ResultRow) -> int | None:
    """Returns the number n of test examples that a row's interval tells, if there is one.

    The ends of Wilson's interval have the product p² / (1 + z²/n), and so have those of 1 − p.
    """
    if row.accuracy_interval is None or row.accuracy_mean is None:
        return None
    share, (low, high) = row.accuracy_mean, row.accuracy_interval
    if share < 0.5:
        share, low, high = 1 - share, 1 - high, 1 - low
    ratio = share**2 / (low * high) - 1 if low * high > 0 else 0
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    return round(z**2 / ratio) if ratio > 0 else None


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _welch(sides: Sequence[np.ndarray]) -> tuple[float, float]:
    """Returns the standard error of a difference of means, and Welch's degrees of freedom."""
    if min(map(len, sides)) < 2:
        return 0.0, 0.0
    parts = [_deviation(side.tolist()) ** 2 / len(side) for side in sides]
    if sum(parts) == 0:
        return 0.0, float(sum(map(len, sides)) - 2)
    weights = [part**2 / (len(side) - 1) for part, side in zip(parts, sides, strict=True)]
    return math.sqrt(sum(parts)), sum(parts) ** 2 / sum(weights)


def _t_quantile(freedom: float) -> float:
    # A requirement of JAX. Unlike scipy.stats, it is imported quickly.
    from scipy.special import stdtrit

    # At least 2: no claim is made within twice the standard error.
    return max(2.0, float(stdtrit(freedom, 0.5 + CONFIDENCE / 2)))


def _find_options(runs: Sequence[Run]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for run in runs for name in run.config)
    values = {name: [run.config.get(name) for run in runs] for name in names}
    return {
        name: options
        for name, options in values.items()
        if name not in IGNORED_OPTIONS and any(option != options[0] for option in options)
    }


def _order_curves(comparison: Comparison) -> list[str]:
    """Returns the names of curves in an order that gives equal stages of all runs one colour."""
    stages = [*dict.fromkeys(map(_stage_of, comparison.rows))]
    # There are three styles of lines, and with one stage the colours tell the runs apart.
    if not 1 < len(stages) <= len(COLOURS) or len(comparison.runs) > 3:
        return [row.name for row in comparison.rows]
    # A name without records takes a colour, so that the next run begins with the first one again.
    stages += [f"without records {i}" for i in range(len(COLOURS) - len(stages))]
    return [f"{label}/{stage}" for label in comparison.runs for stage in stages]


def _describe_limits(
    runs: Mapping[str, Run], rows: Sequence[ResultRow], differences: Sequence[Difference]
) -> list[str]:
    notes = []
    (first, first_run), *others = runs.items()
    if names := [label for label, run in others if run.data != first_run.data]:
        notes.append(f"{list_some(names)} and {first} have other data, test sets included.")
    if names := [label for label, run in runs.items() if run.data == _NO_DATA]:
        notes.append(
            f"{list_some(names)} recorded no data, so that equal data are taken for granted: pass "
            "arrays to open_run."
        )
    if not _has_one_size(rows):
        counts = sorted({count for row in rows if (count := _count_test_examples(row))})
        notes.append(f"There are test sets of {' and '.join(f'{n:,}' for n in counts)} examples.")
    for label, run in others:
        if changes := describe_differences(first_run.environment, run.environment):
            notes.append(
                f"{label} ran in another environment than {first}, so times may not compare "
                f"({shorten(changes, 150)})."
            )
    if not differences:
        notes.append("The runs have no stage of the same name: choose one of each by RUN:STAGE.")
    if names := [label for label, run in runs.items() if run.is_growing]:
        notes.append(f"{list_some(names)} is growing: its results and options are those before.")
    if names := [label for label, run in runs.items() if not find_settings_of_results(run)]:
        notes.append(f"{list_some(names)} has no report.json: its options may not be those before.")
    return notes
