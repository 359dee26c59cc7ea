"""Figures of a run: curves of training, accuracy, and accuracy against size."""

import io
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxkd._files import write_atomically
from jaxkd.runs.errors import add_install_command
from jaxkd.runs.results import ResultRow, format_mean_and_std

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Metric = Mapping[str, Any]
"""A record of `metrics.jsonl`: `seed`, `stage`, `step`, `epoch` and `loss`, and on the validation
split `validation_loss` and `validation_accuracy`."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The palette of Okabe and Ito without its yellow, which is hard to see on white."""

_STYLE = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
}


def plot_curves(
    metrics: Sequence[Metric], path: str | os.PathLike, *, names: Sequence[str] = ()
) -> None:
    """Draws validation loss and accuracy against the step: the mean over seeds ± its deviation.

    The loss is the cross-entropy with the labels for every stage, whatever loss it is trained with,
    so that stages can be compared. Where `make_score` returned other numbers, the first two of them
    are drawn instead, in the order of the records.

    Args:
        metrics: The records of any stages and seeds.
        path: The PNG file. Its folder must exist. The same metrics give the same bytes.
        names: Stages in the order of their colours, as in `plot_size`. Further stages follow
            in the order of their records.

    Raises:
        ValueError: If there is no record.
        ImportError: If matplotlib is missing.

    Example:
        >>> import pathlib, tempfile
        >>> from jaxkd.runs import figures
        >>> metric = {"seed": 0, "stage": "student", "validation_accuracy": 0.8}
        >>> metrics = [metric | {"step": step, "validation_loss": 1 / step} for step in (1, 2, 3)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figures.plot_curves(metrics, pathlib.Path(folder) / "curves.png")
    """
    if not metrics:
        raise ValueError("there are no metrics to draw")
    stages = dict.fromkeys([*names, *(metric["stage"] for metric in metrics)])
    keys = _find_curves(metrics)
    with new_figure(path, 9, 3.8) as figure:
        all_axes = figure.subplots(1, 2)
        handles, labels = [], []
        for index, stage in enumerate(stages):
            # A stage without records keeps its colour, so that both figures agree.
            stage_metrics = [metric for metric in metrics if metric["stage"] == stage]
            if stage_metrics:
                lines = [
                    _plot_curve(axes, stage_metrics, key, _SCALES.get(key, 1), index)
                    for axes, key in zip(all_axes, keys, strict=False)
                ]
                handles.append(lines[0])
                labels.append(plain_text(stage))
        for axes, key in zip(all_axes, keys, strict=False):
            title = _TITLES.get(key, plain_text(key.replace("_", " ").capitalize()))
            axes.set(title=title, xlabel="step")
        for axes in all_axes[len(keys) :]:
            axes.set_visible(False)
        # By hand: matplotlib leaves out names that begin with an underscore.
        figure.legend(handles, labels, loc="outside lower center", ncols=4)


def plot_accuracy(
    rows: Sequence[ResultRow], path: str | os.PathLike, *, baseline: str | None = None
) -> None:
    """Draws the test accuracy of each row, from the best to the worst.

    That is the mean, its interval for the choice of the test examples as a pale bar, the standard
    deviation over seeds as a thin one, and below it each seed.

    Args:
        rows: The rows. Each needs an accuracy.
        path: The PNG file. Its folder must exist. The same rows give the same bytes.
        baseline: Name of the row with which the others are compared. It gets a vertical line and is
            black; the rows above it are green and those below it orange. Without a baseline, or for
            a name that no row has, all rows are blue.

    Raises:
        ValueError: If there is no row, or one has no accuracy.
        ImportError: If matplotlib is missing.

    Example:
        >>> import pathlib, tempfile
        >>> from jaxkd.runs import ResultRow, figures
        >>> row = ResultRow("student", accuracy=(0.86, 0.87))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figures.plot_accuracy([row], pathlib.Path(folder) / "accuracy.png")
    """
    means = {row.name: mean for row, (mean, _) in zip(rows, _accuracy_points(rows), strict=True)}
    # Python sorts stably: equal rows keep their order.
    rows = sorted(rows, key=lambda row: -means[row.name])
    level = means.get(baseline) if baseline is not None else None
    with new_figure(path, 7, 1.2 + 0.45 * len(rows)) as figure:
        axes = figure.subplots()
        if level is not None:
            axes.axvline(level, color="black", lw=1.2, ls="--", zorder=1)
        # Dots instead of bars, because the axis does not begin at 0.
        for index, (row, (mean, std)) in enumerate(zip(rows, _accuracy_points(rows), strict=True)):
            colour = _colour_against(mean, level)
            if row.accuracy_interval is not None:
                low, high = (100 * end for end in row.accuracy_interval)
                axes.plot((low, high), (index, index), color=colour, alpha=0.25, lw=6)
            axes.errorbar(mean, index, xerr=std, fmt="o", color=colour, capsize=4, ms=7)
            seeds = 100 * np.array(row.accuracy)
            heights = np.full(len(seeds), index + 0.28)
            axes.plot(seeds, heights, "o", color=colour, ms=3.5, alpha=0.6)
            text = format_mean_and_std(row.accuracy, scale=100)
            axes.annotate(text, (1.02, index), xycoords=axes.get_yaxis_transform(), va="center")
        axes.set_yticks(range(len(rows)), [plain_text(row.name) for row in rows])
        against = "" if level is None else f"; line: {plain_text(baseline)}"
        axes.set(
            ylim=(len(rows) - 0.4, -0.6),
            xlabel="test accuracy (%); 95 % interval, mean ± std over seeds, each seed below"
            + against,
        )
        axes.margins(x=0.1)
        axes.grid(visible=False, axis="y")


def plot_size(rows: Sequence[ResultRow], path: str | os.PathLike) -> None:
    """Draws the test accuracy of each row against its number of parameters.

    Args:
        rows: The rows. Each needs an accuracy and a number of parameters.
        path: The PNG file. Its folder must exist. The same rows give the same bytes.

    Raises:
        ValueError: If there is no row, or one has no accuracy or number of parameters.
        ImportError: If matplotlib is missing.

    Example:
        >>> import pathlib, tempfile
        >>> from jaxkd.runs import ResultRow, figures
        >>> row = ResultRow("student", accuracy=(0.86, 0.87), parameters=167562)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figures.plot_size([row], pathlib.Path(folder) / "size.png")
    """
    accuracies = _accuracy_points(rows)
    sizes = [row.parameters for row in rows if row.parameters is not None]
    if len(sizes) < len(rows):
        raise ValueError("each row to draw needs a number of parameters")
    points = [(size, mean) for size, (mean, _) in zip(sizes, accuracies, strict=True)]
    with new_figure(path, 7, 4.5) as figure:
        from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

        axes = figure.subplots()
        for index, (point, (_, std)) in enumerate(zip(points, accuracies, strict=True)):
            colour = COLOURS[index % len(COLOURS)]
            axes.errorbar(
                *point, yerr=std, fmt="o", color=colour, capsize=3, lw=1, ms=7, mec="white"
            )
        # At least 30: the margins are powers of the ratio, and vanish where all sizes are equal.
        ratio = max(max(sizes) / min(sizes), 30)
        axes.set(xscale="log", xlabel="parameters", ylabel="test accuracy (%)")
        # The names need room on the right.
        axes.set_xlim(min(sizes) / ratio**0.1, max(sizes) * ratio**0.35)
        axes.margins(y=0.2)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_locator(NullLocator())
        _label_points(figure, axes, [plain_text(row.name) for row in rows], points)


def plain_text(text: object) -> str:
    r"""Returns text that matplotlib draws as it is, instead of as mathematics between two $.

    Args:
        text: A name, such as that of a class or of a stage, or a token.

    Returns:
        The text for any label of a figure.

    Example:
        >>> print(plain_text("$ and $$"))
        \$ and \$\$
    """
    return str(text).replace("$", r"\$")


@contextmanager
def new_figure(path: str | os.PathLike, width: float, height: float) -> Generator["Figure"]:
    """Makes a figure in the common style and saves it when the block ends.

    No window is opened, and no global state of matplotlib changes.

    Args:
        path: The PNG file. Its folder must exist.
        width: Width in inches.
        height: Height in inches.

    Yields:
        The figure to draw in.

    Raises:
        ImportError: If matplotlib is missing.
    """
    with add_install_command("experiments"):
        import matplotlib.style
        from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(width, height))
        yield figure
        content = io.BytesIO()
        # By default the file names matplotlib's version, and its bytes would change with it.
        figure.savefig(content, format="png", metadata={"Software": None})
    write_atomically(path, content.getvalue())


def _colour_against(mean: float, level: float | None) -> str:
    blue, orange, green, *_ = COLOURS
    if level is None:
        return blue
    if mean == level:
        return "black"
    return green if mean > level else orange


def _accuracy_points(rows: Sequence[ResultRow]) -> list[tuple[float, float]]:
    """Returns mean and standard deviation of each row's accuracy, in percent."""
    if not rows:
        raise ValueError("there are no rows to draw")
    points = []
    for row in rows:
        if row.accuracy_mean is None:
            raise ValueError(f"the row {row.name} has no accuracy to draw")
        points.append((100 * row.accuracy_mean, 100 * (row.accuracy_std or 0)))
    return points


_TITLES = {
    "validation_loss": "Validation loss (cross-entropy)",
    "validation_accuracy": "Validation accuracy (%)",
}
_SCALES = {"validation_accuracy": 100}


def _find_curves(metrics: Sequence[Metric]) -> list[str]:
    """Returns the keys of at most two numbers that the records have."""
    found = dict.fromkeys(key for metric in metrics for key in metric)
    scores = [key for key in found if key.startswith("validation_")]
    # In this order for every run that has them.
    usual = [key for key in _TITLES if key in scores]
    return [*usual, *(key for key in scores if key not in usual)][:2] or ["loss"]


def _plot_curve(
    axes: "Axes", metrics: Sequence[Metric], key: str, scale: float, index: int
) -> "Line2D":
    """Draws a stage's mean over its seeds, and returns its line for the legend."""
    from matplotlib.ticker import MaxNLocator

    steps = sorted({metric["step"] for metric in metrics})
    # A record without the value leaves a gap in the line.
    values_by_step = [
        [
            np.nan if metric.get(key) is None else scale * metric[key]
            for metric in metrics
            if metric["step"] == step
        ]
        for step in steps
    ]
    mean = np.array([np.mean(values) for values in values_by_step])
    std = np.array([np.std(values, ddof=1) if len(values) > 1 else 0 for values in values_by_step])
    colour = COLOURS[index % len(COLOURS)]
    # Stages that share a colour differ in the style of the line.
    style = ("-", "--", ":")[index // len(COLOURS) % 3]
    (line,) = axes.plot(steps, mean, style, color=colour, marker="o", ms=2.5)
    axes.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return line


def _label_points(
    figure: "Figure", axes: "Axes", names: Sequence[str], points: Sequence[tuple[float, float]]
) -> None:
    """Writes each name to the right of its point, higher or lower where names would overlap."""
    # The layout fixes the position of the axes, and so of each point, only when it draws.
    figure.draw_without_rendering()
    # From pixels to points, the unit of the offsets of an annotation.
    heights = 72 / figure.dpi * axes.transData.transform(points)[:, 1]
    shifts = _spread_out(heights, 13) - heights
    for index, (name, point, shift) in enumerate(zip(names, points, shifts, strict=True)):
        line = {
            "arrowstyle": "-",
            "color": COLOURS[index % len(COLOURS)],
            "relpos": (0, 0.5),
            "shrinkB": 5,
        }
        axes.annotate(
            name,
            point,
            (24, shift),
            textcoords="offset points",
            va="center",
            # As part of the layout, the name would move the axes after its height was computed.
            in_layout=False,
            arrowprops=line,
        )


def _spread_out(heights: np.ndarray, gap: float) -> np.ndarray:
    """Moves heights as little as possible, in their order, so that neighbours are a gap apart."""
    # Each block is a list of indices whose heights are placed a gap apart around their mean.
    blocks: list[list[int]] = []
    for index in np.argsort(heights, kind="stable"):
        block = [index]
        # Pooling of adjacent violators: a merged block may overlap the one below it in turn.
        while blocks and _overlap(heights, blocks[-1], block, gap):
            block = blocks.pop() + block
        blocks.append(block)
    placed = np.empty_like(heights)
    for block in blocks:
        placed[block] = heights[block].mean() + gap * (np.arange(len(block)) - (len(block) - 1) / 2)
    return placed


def _overlap(heights: np.ndarray, lower: list[int], upper: list[int], gap: float) -> bool:
    distance = heights[upper].mean() - heights[lower].mean()
    return bool(distance < gap * (len(lower) + len(upper)) / 2)
