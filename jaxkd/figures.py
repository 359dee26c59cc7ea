"""Figures of a run, from the rows of `results.json` and the lines of `metrics.jsonl`."""

import io
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxkd.checkpoints import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
"""What `evaluate.summarize` returns."""

Metric = Mapping[str, Any]
"""One evaluation during training: `seed`, `stage`, `step`, `epoch`, `loss`, and on validation `validation_loss`
and `validation_accuracy`."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette without its yellow, which is lost on white."""

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


def plot_curves(metrics: Sequence[Metric], path: str | os.PathLike, *, names: Sequence[str] = ()) -> None:
    """Draws validation loss and accuracy against the step, the mean over seeds ± their standard deviation.

    The loss is the cross-entropy with the labels, whatever a stage was trained on, so that stages compare.

    Args:
        metrics: One evaluation each, of any stages and seeds.
        path: The PNG file; its folder exists. The same metrics give the same bytes.
        names: Stages in the order of their colours, as in the other figures; others follow as they appear.

    Raises:
        ValueError: If there is no metric.

    Example:
        >>> import pathlib, tempfile
        >>> from jaxkd import figures
        >>> metrics = [
        ...     {"seed": 0, "stage": "student", "step": step, "validation_loss": 1 / step, "validation_accuracy": 0.8}
        ...     for step in (1, 2, 3)
        ... ]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figures.plot_curves(metrics, pathlib.Path(folder) / "curves.png")
    """
    if not metrics:
        raise ValueError("there are no metrics to draw")
    stages = list(dict.fromkeys([*names, *(metric["stage"] for metric in metrics)]))
    with draw(path, 9, 3.8) as figure:
        axes = figure.subplots(1, 2)
        for i, stage in enumerate(stages):
            chosen = [metric for metric in metrics if metric["stage"] == stage]
            if chosen:
                _curve(axes[0], chosen, "validation_loss", 1, i)
                _curve(axes[1], chosen, "validation_accuracy", 100, i)
        axes[0].set(title="Validation loss (cross-entropy)", xlabel="step")
        axes[1].set(title="Validation accuracy (%)", xlabel="step")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def plot_accuracy(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Draws the test accuracy of each row: its seeds as dots, their mean ± standard deviation beside them.

    There are no bars, as the axis does not begin at 0.

    Args:
        rows: From `evaluate.summarize`, drawn from top to bottom.
        path: The PNG file; its folder exists. The same rows give the same bytes.

    Raises:
        ValueError: If there is no row.

    Example:
        >>> import pathlib, tempfile
        >>> from jaxkd import figures
        >>> row = {"name": "student", "accuracy": [0.86, 0.87], "accuracy_mean": 0.865, "accuracy_std": 0.007}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figures.plot_accuracy([row], pathlib.Path(folder) / "accuracy.png")
    """
    if not rows:
        raise ValueError("there are no rows to draw")
    with draw(path, 7, 1.2 + 0.45 * len(rows)) as figure:
        axes = figure.subplots()
        for i, row in enumerate(rows):
            colour, mean, seeds = COLOURS[i % len(COLOURS)], 100 * row["accuracy_mean"], np.array(row["accuracy"])
            axes.errorbar(mean, i, xerr=100 * (row["accuracy_std"] or 0), fmt="o", color=colour, capsize=4, ms=7)
            axes.plot(100 * seeds, np.full(len(seeds), i + 0.28), "o", color=colour, ms=3.5, alpha=0.6)
            axes.annotate(spread(row), (1.02, i), xycoords=axes.get_yaxis_transform(), va="center")
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="test accuracy (%); mean ± std over seeds, and each seed below")
        axes.margins(x=0.1)
        axes.grid(visible=False, axis="y")


def plot_size(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Draws the test accuracy of each row against its number of parameters.

    Args:
        rows: From `evaluate.summarize`.
        path: The PNG file; its folder exists. The same rows give the same bytes.

    Raises:
        ValueError: If there is no row.

    Example:
        >>> import pathlib, tempfile
        >>> from jaxkd import figures
        >>> row = {"name": "student", "parameters": 167562, "accuracy_mean": 0.865, "accuracy_std": 0.007}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figures.plot_size([row], pathlib.Path(folder) / "size.png")
    """
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    if not rows:
        raise ValueError("there are no rows to draw")
    with draw(path, 7, 4.5) as figure:
        axes = figure.subplots()
        for i, row in enumerate(rows):
            colour, std = COLOURS[i % len(COLOURS)], 100 * (row["accuracy_std"] or 0)
            axes.errorbar(*_point(row), yerr=std, fmt="o", color=colour, capsize=3, lw=1, ms=7, mec="white")
        smallest, largest = min(row["parameters"] for row in rows), max(row["parameters"] for row in rows)
        ratio = max(largest / smallest, 30)
        axes.set(xscale="log", xlabel="parameters", ylabel="test accuracy (%)")
        axes.set_xlim(smallest / ratio**0.1, largest * ratio**0.35)  # room for the names on the right
        axes.margins(y=0.2)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_locator(NullLocator())
        _label_points(figure, axes, rows)


@contextmanager
def draw(path: str | os.PathLike, width: float, height: float) -> Generator["Figure"]:
    """A figure in the common style, which is written when the block ends; no window or global state is involved.

    Args:
        path: Where to.
        width: In inches.
        height: In inches.

    Yields:
        The figure to draw in.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(width, height))
        yield figure
        content = io.BytesIO()
        # Without the name and version of the software, the bytes depend on the drawing alone.
        figure.savefig(content, format="png", metadata={"Software": None})
    write_atomically(path, content.getvalue())


def _curve(axes: "Axes", metrics: Sequence[Metric], key: str, scale: float, i: int) -> None:
    from matplotlib.ticker import MaxNLocator

    steps = sorted({metric["step"] for metric in metrics})
    seeds = [[scale * metric[key] for metric in metrics if metric["step"] == step] for step in steps]
    mean = np.array([np.mean(values) for values in seeds])
    std = np.array([np.std(values, ddof=1) if len(values) > 1 else 0 for values in seeds])
    colour, style = COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]
    axes.plot(steps, mean, style, color=colour, label=metrics[0]["stage"], marker="o", ms=2.5)
    axes.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _point(row: Row) -> tuple[float, float]:
    return row["parameters"], 100 * row["accuracy_mean"]


def _label_points(figure: "Figure", axes: "Axes", rows: Sequence[Row]) -> None:
    """Writes each name to the right of its point, higher or lower where names would overlap."""
    figure.draw_without_rendering()  # only now does the axes' place, and so each point's, stand
    heights = 72 / figure.dpi * axes.transData.transform([_point(row) for row in rows])[:, 1]
    for i, (row, shift) in enumerate(zip(rows, _apart(heights, 13) - heights, strict=True)):
        line = {"arrowstyle": "-", "color": COLOURS[i % len(COLOURS)], "relpos": (0, 0.5), "shrinkB": 5}
        place = {"textcoords": "offset points", "va": "center", "in_layout": False}
        axes.annotate(row["name"], _point(row), (24, shift), arrowprops=line, **place)


def _apart(heights: np.ndarray, gap: float) -> np.ndarray:
    """Moves heights by as little as keeps their order and leaves a gap between each two."""
    blocks: list[list[int]] = []
    for i in np.argsort(heights, kind="stable"):
        block = [i]
        while blocks and heights[block].mean() - heights[blocks[-1]].mean() < gap * len(block + blocks[-1]) / 2:
            block = blocks.pop() + block
        blocks.append(block)
    placed = np.empty_like(heights)
    for block in blocks:
        placed[block] = heights[block].mean() + gap * (np.arange(len(block)) - (len(block) - 1) / 2)
    return placed


def spread(row: Row) -> str:
    """A row's accuracy in percent, mean ± standard deviation, as text."""
    parts = (row["accuracy_mean"], row["accuracy_std"])
    return " ± ".join(f"{100 * part:.1f}" for part in parts if part is not None)
