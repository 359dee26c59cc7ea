"""The rows of the table of results: a typed record, and its form in `results.json`."""

from __future__ import annotations

import dataclasses
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxkd import evaluate
from jaxkd._messages import format_bytes, shorten

if TYPE_CHECKING:
    from jaxkd.models.model import Model

TIMINGS = (
    "latency_ms",
    "latency_p95_ms",
    "throughput_latency_ms",
    "throughput_latency_p95_ms",
    "seconds",
)
"""Fields that differ from one run to the next. A comparison of reruns ignores them."""


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """The test results of one model of a plan, over its seeds.

    Attributes:
        name: Name of the stage or the pretrained model.
        accuracy: Test accuracy of each seed, in [0, 1].
        accuracy_interval: Wilson's 95 % interval of the mean accuracy, for the choice of the test
            examples.
        agreement: Share of the test examples with the same prediction as the reference, mean over
            seeds; `None` without a reference.
        ece: Expected calibration error, mean over seeds.
        parameters: Number of trained parameters.
        bytes: Memory of parameters and statistics.
        flops: Floating-point operations of one prediction; `None` where they cannot be counted.
        latency_ms: Median time of predicting one example.
        latency_p95_ms: 95th percentile of the same.
        throughput_batch: Size of the larger batch that is timed.
        throughput_latency_ms: Median time of predicting it.
        throughput_latency_p95_ms: 95th percentile of the same.
        seconds: Training time of each seed.
        scores: Scores of one's own, such as "rmse", by name: one number of each seed.
        extra: Further values of an experiment, such as BLEU, by name. JSON values.
        chance: Accuracy of the best constant prediction on the test examples. Like `baselines`, it
            is for `report.describe_doubts`, and not in `results.json`.
        baselines: Names of the stages of the same network as a student of this model, which have no
            teacher.
        cached_teachers: Lines on the size of the cached outputs that this model learned from. Like
            `chance`, they are for the report alone.
        measured: Digest of what was measured, and where, by which `distill.evaluate_plan` finds the
            row again; `None` if it was not given a run. It is in `results.json`.
    """

    name: str
    accuracy: tuple[float, ...] = ()
    accuracy_interval: tuple[float, float] | None = None
    agreement: float | None = None
    ece: float | None = None
    parameters: int | None = None
    bytes: int | None = None
    flops: float | None = None
    latency_ms: float | None = None
    latency_p95_ms: float | None = None
    throughput_batch: int | None = None
    throughput_latency_ms: float | None = None
    throughput_latency_p95_ms: float | None = None
    seconds: tuple[float, ...] = ()
    scores: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Derived from labels and plan, so that they are neither stored nor compared.
    chance: float | None = dataclasses.field(default=None, compare=False)
    baselines: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    cached_teachers: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    # Not compared, because another machine that gives the same results has another digest.
    measured: str | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Raises an error unless the accuracy is a tuple of numbers in [0, 1] or NaN."""
        if not isinstance(self.accuracy, (tuple, list)):
            raise TypeError(
                f"the accuracy of {shorten(repr(self.name), 60)} must be a tuple of one number per "
                f"seed, got {shorten(repr(self.accuracy), 60)}"
            )
        wrong = [value for value in self.accuracy if value < 0 or value > 1]
        if wrong:
            raise ValueError(
                f"the accuracy of {shorten(repr(self.name), 60)} must be in [0, 1], got "
                f"{wrong[0]}: divide percentages by 100"
            )

    @property
    def accuracy_mean(self) -> float | None:
        """Mean accuracy over the seeds; `None` without any."""
        return float(np.mean(self.accuracy)) if self.accuracy else None

    @property
    def accuracy_std(self) -> float | None:
        """Sample standard deviation of the accuracy over the seeds; `None` for fewer than two."""
        return float(np.std(self.accuracy, ddof=1)) if len(self.accuracy) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Returns the row as JSON values: all fields, mean and deviation, and those of `extra`."""
        row: dict[str, Any] = {}
        for field in _stored_fields():
            value = getattr(self, field.name)
            if field.name == "scores":
                # Only where there are any, since most models are classifiers.
                row |= {"scores": {n: list(v) for n, v in value.items()}} if value else {}
                continue
            row[field.name] = list(value) if isinstance(value, tuple) else value
            # For readers of the file. `from_json` computes both again.
            if field.name == "accuracy":
                row |= {"accuracy_mean": self.accuracy_mean, "accuracy_std": self.accuracy_std}
        if self.measured is not None:
            row["measured"] = self.measured
        return row | dict(self.extra)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> ResultRow:
        """Returns the row that `to_json` wrote.

        Raises:
            ValueError: If the row has no name, or a value of another type.
        """
        if not isinstance(row, Mapping) or not isinstance(row.get("name"), str):
            raise ValueError(f"a row of results needs a name, got {shorten(repr(row), 80)}")
        values: dict[str, Any] = {"name": row["name"]}
        for field in _stored_fields()[1:]:
            if field.name in row:
                values[field.name] = _from_json_value(field.name, row[field.name])
        if not isinstance(row.get("measured"), (str, type(None))):
            raise ValueError(f"measured must be text, got {shorten(repr(row['measured']), 80)}")
        values["measured"] = row.get("measured")
        # Mean and deviation follow from the accuracies.
        known = {*values, "accuracy_mean", "accuracy_std"}
        extra = {name: value for name, value in row.items() if name not in known}
        return cls(**values, extra=extra)


def _stored_fields() -> list[dataclasses.Field]:
    """Returns the fields of a row that have a key of their own in `results.json`."""
    # The values of `extra` are stored under their own names.
    return [f for f in dataclasses.fields(ResultRow) if f.compare and f.name != "extra"]


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the table of results.

    Attributes:
        title: The heading.
        short_title: The heading on a console, with a line break where it may be narrow.
        cell: Returns a row's cell, empty where the row has no such value.
        priority: A narrow console leaves out the columns with the largest numbers first.
    """

    title: str
    short_title: str
    cell: Callable[[ResultRow], str]
    priority: int


def format_mean_and_std(values: Any, *, scale: float = 1.0) -> str:
    """Formats the mean of values and, for more than one, their sample standard deviation.

    Args:
        values: One value per seed, or none.
        scale: Factor of both, such as 100 for percentages.

    Returns:
        Text such as "86.4 ± 0.5", empty without a value.

    Example:
        >>> format_mean_and_std([0.86, 0.87], scale=100)
        '86.5 ± 0.7'
    """
    values = np.asarray(values, float)
    if not values.size:
        return ""
    std = f" ± {scale * values.std(ddof=1):.1f}" if values.size > 1 else ""
    # Scaled after the mean: the other order rounds some ties to another digit.
    return f"{scale * values.mean():.1f}{std}"


def is_finite_number(value: Any) -> bool:
    """Returns whether a JSON value is a number that a float can hold."""
    # A long integer is too large for a float.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _from_json_value(name: str, value: Any) -> Any:
    """Returns a field's value, a tuple for a list. Raises `ValueError` for another type."""
    # These two are lists, which are empty where there is no value.
    if value is None and name not in ("accuracy", "seconds", "scores"):
        return None
    if name == "scores":
        if not isinstance(value, Mapping):
            raise ValueError(f"scores must be lists by name, got {shorten(repr(value), 80)}")
        return {score: _from_json_value("seconds", values) for score, values in value.items()}
    if name not in ("accuracy", "accuracy_interval", "seconds"):
        if not is_finite_number(value):
            raise ValueError(f"{name} must be a finite number, got {shorten(repr(value), 80)}")
        return value
    if not isinstance(value, list) or not all(map(is_finite_number, value)):
        raise ValueError(f"{name} must be a list of numbers, got {shorten(repr(value), 80)}")
    return tuple(value)


def _format(value: float | None, scale: float = 1.0, form: str = ".1f") -> str:
    return "" if value is None else format(scale * value, form)


def _format_interval(row: ResultRow) -> str:
    if row.accuracy_interval is None:
        return ""
    low, high = row.accuracy_interval
    return f"{_format(low, 100)}–{_format(high, 100)}"


def _format_bytes(row: ResultRow) -> str:
    return "" if row.bytes is None else format_bytes(row.bytes)


_ACCURACY_COLUMNS = ("accuracy %", "95 % interval", "agreement %", "ECE %")

COLUMNS = (
    Column("name", "name", lambda row: row.name, 0),
    Column(
        "accuracy %", "accuracy\n%", lambda row: format_mean_and_std(row.accuracy, scale=100), 1
    ),
    Column("95 % interval", "95 %\ninterval", _format_interval, 4),
    Column("agreement %", "agrees\n%", lambda row: _format(row.agreement, 100), 7),
    Column("ECE %", "ECE\n%", lambda row: _format(row.ece, 100), 9),
    Column("parameters", "params", lambda row: _format(row.parameters, 1, ",.0f"), 2),
    Column("size", "size", _format_bytes, 5),
    Column("MFLOPs", "MFLOPs", lambda row: _format(row.flops, 1e-6, ",.1f"), 6),
    Column("latency ms", "latency\nms", lambda row: _format(row.latency_ms, 1, ".2f"), 3),
    Column(
        "training s",
        "train\ns",
        lambda row: _format(float(np.mean(row.seconds)) if row.seconds else None, 1, ",.0f"),
        8,
    ),
)
"""The columns of the table of results, from left to right."""


def choose_columns(rows: Iterable[ResultRow]) -> list[Column]:
    """Returns the columns of a table: those of accuracy if there is any, and one for each score."""
    rows = list(rows)
    scores = dict.fromkeys(name for row in rows for name in row.scores)
    has_accuracy = any(row.accuracy for row in rows) or not scores
    columns = [c for c in COLUMNS if has_accuracy or c.title not in _ACCURACY_COLUMNS]
    return [columns[0], *map(_make_score_column, scores), *columns[1:]]


def _make_score_column(name: str) -> Column:
    return Column(name, name, lambda row: _format_score(row.scores.get(name, ())), 1)


def _format_score(values: Sequence[float]) -> str:
    """Formats the mean and the deviation of numbers of any size."""
    if not values:
        return ""
    std = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
    return f"{np.mean(values):.4g}{std}"


def summarize(
    name: str,
    model: Model,
    variables: Sequence[dict],
    logits: Sequence[ArrayLike],
    inputs: Any,
    labels: ArrayLike,
    *,
    seconds: Sequence[float],
    reference_logits: Sequence[ArrayLike] | None = None,
    throughput_batch: int = 256,
    repeats: int = 50,
) -> ResultRow:
    """Measures a model over its seeds.

    Two sources of chance are kept apart. The standard deviation of the accuracy is its spread over
    seeds. The interval covers the choice of the N test examples: it is Wilson's 95 % interval of
    the mean accuracy. Costs are measured with the first seed's variables.

    Args:
        name: Name of the row.
        model: The model.
        variables: The variables of each seed.
        logits: The predictions for `inputs`, one `[N, C]` per seed.
        inputs: `[N, ...]`, the test examples, an array or a dict of arrays.
        labels: `[N]`, integers in [0, C).
        seconds: Training time of each seed.
        reference_logits: The logits to agree with, one `[N, C]` per seed.
        throughput_batch: Size of the larger batch that is timed, at least 1; at most N are.
        repeats: Number of calls that are timed, at least 1.

    Returns:
        The row.

    Raises:
        ValueError: If there is not one entry per seed, shapes disagree, or `throughput_batch` or
            `repeats` is no whole number of at least 1.

    Example:
        >>> import jax, numpy as np
        >>> from jaxkd.models import CNN, from_linen
        >>> from jaxkd.runs import summarize
        >>> model = from_linen(CNN(features=(4,), hidden=8))
        >>> images = np.zeros((4, 8, 8, 3), np.float32)
        >>> variables = model.init(jax.random.key(0), images)
        >>> logits = 9 * np.eye(4, 10)
        >>> row = summarize(
        ...     "tiny", model, [variables], [logits], images, np.arange(4), seconds=[1.0]
        ... )
        >>> row.accuracy, row.accuracy_std, row.parameters
        ((1.0,), None, 498)
    """
    references = [None] * len(logits) if reference_logits is None else reference_logits
    counts = [len(variables), len(logits), len(references), len(seconds)]
    if not logits or len(set(counts)) > 1:
        raise ValueError(
            f"{name}: variables, logits, references and seconds need one entry per seed, "
            f"got {counts}"
        )
    metrics = [
        evaluate.classification_metrics(seed_logits, labels, reference_logits=reference)
        for seed_logits, reference in zip(logits, references, strict=True)
    ]
    accuracies = tuple(seed.accuracy for seed in metrics)
    agreements = [seed.agreement for seed in metrics if seed.agreement is not None]
    # A mean over seeds need not be a whole number of correct predictions.
    total = np.size(labels)
    return ResultRow(
        name=name,
        accuracy=accuracies,
        # All seeds are tested on the same examples, so more seeds do not narrow the interval.
        accuracy_interval=evaluate.accuracy_interval(float(np.mean(accuracies)) * total, total),
        agreement=float(np.mean(agreements)) if len(agreements) == len(metrics) else None,
        ece=float(np.mean([seed.ece for seed in metrics])),
        seconds=tuple(float(value) for value in seconds),
        **measure_costs(model, variables[0], inputs, throughput_batch, repeats),
    )


def measure_costs(
    model: Model, variables: dict, inputs: Any, throughput_batch: int, repeats: int
) -> dict[str, Any]:
    """Measures size, FLOPs and latency of a model.

    Args:
        model: The model.
        variables: Its variables.
        inputs: `[N, ...]`, an array or a dict of arrays.
        throughput_batch: Size of the larger batch that is timed, at least 1; at most N are.
        repeats: Number of calls that are timed, at least 1.

    Returns:
        Fields of a `ResultRow` by name.

    Raises:
        ValueError: If `throughput_batch` or `repeats` is no whole number of at least 1.
    """
    for argument, value in (("throughput_batch", throughput_batch), ("repeats", repeats)):
        if not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{argument} must be a whole number of at least 1, got {value!r}")
    single, batch = (
        jax.tree.map(lambda array, count=count: np.asarray(array[:count]), inputs)
        for count in (1, throughput_batch)
    )
    latency = evaluate.latency(model, variables, single, repeats=repeats)
    throughput = evaluate.latency(model, variables, batch, repeats=repeats)
    return {
        "parameters": evaluate.parameter_count(variables),
        "bytes": evaluate.parameter_bytes(variables),
        "flops": evaluate.flops(model, variables, single),
        "latency_ms": latency.median_ms,
        "latency_p95_ms": latency.p95_ms,
        "throughput_batch": len(jax.tree.leaves(batch)[0]),
        "throughput_latency_ms": throughput.median_ms,
        "throughput_latency_p95_ms": throughput.p95_ms,
    }


def rows_without_timings(rows: Iterable[ResultRow]) -> dict[str, dict[str, Any]]:
    """Returns the JSON values of each row by its name, without what differs between machines."""
    ignored = (*TIMINGS, "measured")
    return {
        row.name: {name: value for name, value in row.to_json().items() if name not in ignored}
        for row in rows
    }
