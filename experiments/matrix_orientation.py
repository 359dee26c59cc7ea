"""Times matrices that are stored row after row and column after column.

Rows and columns of row-major and column-major matrices are summed and scaled, in one call and line
by line, and matrices are multiplied in the eight orientations of `layout.matmul`, by NumPy and by
JAX. A column-major matrix of JAX has a column-major device layout; operands of products are stored
transposed instead. The cases alternate, so that other work on the machine affects all of them; the
report gives ratios within a round, as median and quartiles.

Paper: Drepper, What Every Programmer Should Know About Memory,
https://www.akkadia.org/drepper/cpumemory.pdf

Command: python -m experiments.matrix_orientation

Result: line by line through 5,000 × 5,000, columns take 2.4 times (NumPy) and 6.6 times (JAX) as
long as rows; none of the other seven orientations of a product is clear of the spread (x86-64, jax
0.10.2)

Time: 2 minutes on 2 CPU cores
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import timing
from experiments.benchmarks.timing import Ratio, time_rounds
from experiments.common import cli
from jaxkd import layout, runs
from jaxkd.data.progress import track
from jaxkd.runs.figures import COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIBRARIES = {"numpy": "NumPy", "jax": "JAX"}
TASKS = {"walk": "sum, line by line", "sum": "sum, one call", "scale": "scale, one call"}
ORDERS = ("row", "column")
ALL_ORDERS = tuple(itertools.product(ORDERS, repeat=3))


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    sizes: tuple[int, ...] = (500, 1000, 2000, 5000)
    """Sizes n of the n × n matrices; one of 5000 takes 100 MB, and up to eight exist at a time."""
    product_limit: int = 2000
    """Largest size at which matrices are multiplied; a product takes n³ operations, not n²."""
    repeats: int = 11
    """Rounds; each times everything once."""
    workdir: str = "runs/matrix_orientation"
    """Folder of results.json and the figure; those of an earlier run are replaced."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        cli.require(len(self.sizes) > 0, "--sizes: give at least one size")
        for size in self.sizes:
            cli.require(
                2 <= size <= 30_000,
                f"--sizes {size}: must be from 2 to 30000, at which the matrices take 30 GB",
            )
        cli.require(
            len({*self.sizes}) == len(self.sizes), f"--sizes {self.sizes}: give each size only once"
        )
        # The summary and the figure need at least one product.
        smallest = min(self.sizes)
        cli.require(
            self.product_limit >= smallest,
            f"--product-limit {self.product_limit}: must be at least the smallest size, {smallest}",
        )
        cli.require(self.repeats >= 1, f"--repeats {self.repeats}: must be at least 1")


class Case(NamedTuple):
    """A call to time."""

    name: dict[str, Any]
    """The keys that identify the case in the results."""
    call: Callable[[], Any]
    """Returns when the result is ready."""


def access_cases(size: int) -> Iterator[list[Case]]:
    """Yields, task by task, the cases that work along rows and columns in both memory orders."""
    values = np.random.default_rng(0).random((size, size), np.float32)
    matrices = {
        (library, order): layout.as_order(make(values), order)
        for library, make in (("numpy", np.array), ("jax", jnp.array))
        for order in ORDERS
    }
    make_call = {"numpy": _numpy_call, "jax": _jax_call}
    for task in TASKS:
        yield [
            Case(
                {"task": task, "size": size, "library": library, "order": order, "by": by},
                make_call[library](task, matrix, axis),
            )
            for (library, order), matrix in matrices.items()
            for axis, by in enumerate(ORDERS)
        ]


def product_cases(size: int) -> list[Case]:
    """Makes the products of two matrices in all orientations, for both libraries."""
    values = np.random.default_rng(0).random((2, size, size), np.float32)
    cases = []
    for orders in ALL_ORDERS:
        # NumPy and JAX get the same memory: a column-major operand is a transposed row-major array.
        lhs, rhs = (
            matrix if order == "row" else matrix.T.copy()
            for matrix, order in zip(values, orders[:2], strict=True)
        )
        name = {"task": "product", "size": size, "orders": list(orders)}
        cases.append(Case(name | {"library": "numpy"}, _numpy_product(lhs, rhs, orders)))
        cases.append(Case(name | {"library": "jax"}, _jax_product(lhs, rhs, orders)))
    return cases


def measure(config: Config) -> list[dict]:
    """Times all cases.

    Args:
        config: Options.

    Returns:
        A row for each case, with the seconds per call of each round.
    """
    product_sizes = [size for size in config.sizes if size <= config.product_limit]
    # Lazily, so that the matrices of one group are freed before those of the next are made.
    groups = itertools.chain(
        itertools.chain.from_iterable(access_cases(size) for size in config.sizes),
        (product_cases(size) for size in product_sizes),
    )
    rows: list[dict] = []
    total = config.repeats * (len(TASKS) * len(config.sizes) + len(product_sizes))
    for _ in track(_time_groups(groups, config.repeats, rows), description="timing", total=total):
        pass
    return rows


def ratio(rows: Sequence[dict], names: dict, baseline: dict) -> Ratio:
    """Returns the time of one case divided by that of another, both given by their names."""
    return Ratio.of(_find(rows, names), _find(rows, baseline))


def access_ratio(rows: Sequence[dict], **names: Any) -> Ratio:
    """Returns the time of a task along columns divided by its time along rows."""
    return ratio(rows, names | {"by": "column"}, names | {"by": "row"})


def product_ratio(rows: Sequence[dict], orders: Sequence[str], **names: Any) -> Ratio:
    """Returns the time of a product divided by that of the product entirely in row order."""
    names |= {"task": "product"}
    return ratio(rows, names | {"orders": list(orders)}, names | {"orders": ["row"] * 3})


def conclude(rows: Sequence[dict]) -> list[str]:
    """Summarises the largest matrices and the largest products, a sentence for each."""
    size = _sizes(rows)[-1]
    walk_ratios = [
        access_ratio(rows, task="walk", size=size, library=library, order="row")
        for library in LIBRARIES
    ]
    order_ratios = []
    for library in LIBRARIES:
        names = {"task": "sum", "size": size, "library": library, "by": "row"}
        order_ratios.append(ratio(rows, names | {"order": "column"}, names | {"order": "row"}))
    product_size = _sizes(rows, "product")[-1]
    product_ranges = [_product_range(rows, product_size, library) for library in LIBRARIES]
    return [
        f"Line by line through a row-major matrix of {size:,} × {size:,}, columns take "
        f"{walk_ratios[0]} times as long as rows in NumPy and {walk_ratios[1]} times in JAX; to "
        f"sum all rows in one call takes {order_ratios[0]} times as long in NumPy and "
        f"{order_ratios[1]} times in JAX if the matrix is column-major.",
        f"Products of {product_size:,} × {product_size:,} matrices in the seven other orientations "
        f"take {product_ranges[0]} the time of row · row → row in NumPy and {product_ranges[1]} in "
        "JAX.",
    ]


def print_tables(rows: Sequence[dict], *, console: Console | None = None) -> None:
    """Prints the ratios and, for the largest matrices, the times."""
    console = console or Console()
    console.print(_access_table(rows))
    console.print("; ".join(f"{task}: {label}" for task, label in TASKS.items()), end="\n\n")
    console.print(_product_table(rows), end="\n\n")


def _access_table(rows: Sequence[dict]) -> Table:
    sizes = _sizes(rows)
    title = "Time by columns ÷ time by rows: median ± half the distance of the quartiles"
    table = timing.make_table(title, "task", "", "matrix")
    for size in sizes:
        table.add_column(f"{size:,}", justify="right", no_wrap=True)
    table.add_column("ms by rows", justify="right")
    for task, library, order in itertools.product(TASKS, LIBRARIES, ORDERS):
        names = {"task": task, "library": library, "order": order}
        cells = []
        for size in sizes:
            low, median, high = access_ratio(rows, size=size, **names)
            cells.append(f"{median:.2f} ± {(high - low) / 2:.2f}")
        milliseconds = _milliseconds(rows, names | {"size": sizes[-1], "by": "row"})
        table.add_row(task, LIBRARIES[library], order, *cells, milliseconds)
    return table


def _product_table(rows: Sequence[dict]) -> Table:
    size = _sizes(rows, "product")[-1]
    title = f"Product of {size:,} × {size:,} ÷ row · row → row: median (quartiles)"
    table = timing.make_table(title, "orientation")
    for name in LIBRARIES.values():
        table.add_column(name, justify="right")
        table.add_column("ms", justify="right")
    for orders in ALL_ORDERS:
        cells = []
        for library in LIBRARIES:
            names = {"task": "product", "size": size, "library": library, "orders": list(orders)}
            cells += [
                str(product_ratio(rows, orders, size=size, library=library)),
                _milliseconds(rows, names),
            ]
        table.add_row(_orientation(orders), *cells)
    return table


def plot(rows: Sequence[dict], path: Path, *, title: str) -> None:
    """Draws the ratios of columns to rows against the size, and those of the products."""
    with new_figure(path, 11, 4.4) as figure:
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
        middle.sharey(left)
        for axes, library in ((left, "numpy"), (middle, "jax")):
            _plot_access(axes, rows, library)
        left.set_ylabel("time by columns ÷ time by rows")
        middle.tick_params(labelleft=False)
        _plot_products(right, rows)
        access_handles, access_labels = left.get_legend_handles_labels()
        product_handles, product_labels = right.get_legend_handles_labels()
        figure.legend(
            access_handles + product_handles,
            access_labels + product_labels,
            loc="outside lower center",
            ncols=4,
        )
        figure.suptitle(title, fontsize=9, color="#555555")


def main(config: Config) -> None:
    """Times the cases, writes the results and the figure, and prints the tables."""
    folder = timing.prepare_folder(config)
    rows = measure(config)
    sentences = conclude(rows)
    environment = runs.describe_environment()
    timing.write_results(folder, config, environment, {"summary": sentences, "rows": rows})
    setting = (
        f"float32 on {environment['platform']} "
        f"({environment['device']}, {environment['cores']} cores), "
        f"NumPy {environment['numpy']}, JAX {environment['jax']}"
    )
    plot(rows, folder / "matrix_orientation.png", title=setting)
    print_tables(rows)
    print(setting, *sentences, f"Everything is in {folder}", sep="\n")


def _numpy_call(task: str, matrix: Any, axis: int) -> Callable[[], Any]:
    factors = np.expand_dims(_signs(len(matrix)), 1 - axis)
    # A view: iterating over it gives rows or columns without a copy.
    lines = np.moveaxis(matrix, axis, 0)
    return {
        "walk": lambda: sum(line.sum() for line in lines),
        "sum": lambda: matrix.sum(1 - axis),
        "scale": lambda: np.multiply(matrix, factors, out=matrix),
    }[task]


def _jax_call(task: str, matrix: Any, axis: int) -> Callable[[], Any]:
    size = len(matrix)
    factors = jnp.expand_dims(_signs(size), 1 - axis)

    # The loop is part of the program, since a loop in Python would time the dispatch of each line.
    def walk(matrix: Any) -> Any:
        def add_line(i: Any, total: Any) -> Any:
            return total + lax.dynamic_index_in_dim(matrix, i, axis).sum()

        return lax.fori_loop(0, size, add_line, jnp.zeros((), matrix.dtype))

    if task == "scale":
        # Without an explicit output format XLA would return the product in row order.
        scale = jax.jit(jnp.multiply, donate_argnums=0, out_shardings=matrix.format)
        return _in_place(scale, matrix, factors)
    call = jax.jit(walk if task == "walk" else lambda matrix: matrix.sum(1 - axis))
    return lambda: call(matrix).block_until_ready()


def _signs(size: int) -> np.ndarray:
    """Returns factors of ±1: repeated scaling by other factors would over- or underflow."""
    return (1 - 2 * (np.arange(size) % 2)).astype(np.float32)


def _in_place(scale: Callable, matrix: Any, factors: Any) -> Callable[[], Any]:
    """Makes a function that scales a matrix in its own memory, as NumPy does.

    Allocating memory for the result would take most of the time.
    """
    matrix = layout.as_order(jnp.array(matrix, copy=True), layout.order_of(matrix))

    def scale_again() -> Any:
        nonlocal matrix
        matrix = scale(matrix, factors).block_until_ready()
        return matrix

    return scale_again


def _numpy_product(lhs: Any, rhs: Any, orders: Sequence[str]) -> Callable[[], Any]:
    lhs, rhs = (
        matrix if order == "row" else matrix.T
        for matrix, order in zip((lhs, rhs), orders[:2], strict=True)
    )
    # (A B)ᵀ = Bᵀ Aᵀ: NumPy writes the transposed result without a copy.
    return (lambda: lhs @ rhs) if orders[2] == "row" else (lambda: rhs.T @ lhs.T)


def _jax_product(lhs: Any, rhs: Any, orders: Sequence[Any]) -> Callable[[], Any]:
    lhs_order, rhs_order, out_order = orders
    multiply = jax.jit(
        functools.partial(
            layout.matmul, lhs_order=lhs_order, rhs_order=rhs_order, out_order=out_order
        )
    )
    # Outside the timed call, which would otherwise include the copy to the device.
    lhs, rhs = jax.device_put((lhs, rhs))
    return lambda: multiply(lhs, rhs).block_until_ready()


def _time_groups(groups: Iterable[list[Case]], repeats: int, rows: list[dict]) -> Iterator[None]:
    """Times one group of cases after another and appends to `rows`; yields after each round."""
    for cases in groups:
        rounds = []
        for seconds in time_rounds([case.call for case in cases], repeats):
            rounds.append(seconds)
            yield
        times = np.transpose(rounds).tolist()
        rows += [
            case.name | {"seconds": seconds} for case, seconds in zip(cases, times, strict=True)
        ]


def _sizes(rows: Sequence[dict], task: str = "sum") -> list[int]:
    return sorted({row["size"] for row in rows if row["task"] == task})


def _product_range(rows: Sequence[dict], size: int, library: str) -> str:
    ratios = [product_ratio(rows, orders, size=size, library=library) for orders in ALL_ORDERS[1:]]
    medians = [product.median for product in ratios]
    clear = sum(product.excludes_one for product in ratios)
    return f"{min(medians):.2f} to {max(medians):.2f} times ({clear} of 7 clear of the spread)"


def _milliseconds(rows: Sequence[dict], names: dict) -> str:
    return f"{1000 * np.median(_find(rows, names)):,.2f}"


def _find(rows: Sequence[dict], names: dict) -> list[float]:
    return next(row["seconds"] for row in rows if names.items() <= row.items())


def _orientation(orders: Sequence[str]) -> str:
    return f"{orders[0]} · {orders[1]} → {orders[2]}"


def _plot_access(axes: "Axes", rows: Sequence[dict], library: str) -> None:
    from matplotlib.ticker import NullLocator

    sizes = _sizes(rows)
    for (task, label), colour in zip(TASKS.items(), COLOURS, strict=False):
        for order, style in zip(ORDERS, ("-", "--"), strict=True):
            ratios = [
                access_ratio(rows, task=task, size=size, library=library, order=order)
                for size in sizes
            ]
            low, median, high = np.transpose(ratios)
            axes.fill_between(sizes, low, high, color=colour, alpha=0.12, linewidth=0)
            axes.plot(
                sizes,
                median,
                style,
                color=colour,
                marker="o",
                ms=4,
                label=f"{label}, {order}-major",
            )
    axes.axhline(1, color="black", lw=0.8)
    axes.set(title=LIBRARIES[library], xscale="log", yscale="log", xlabel="rows and columns")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    timing.set_ratio_ticks(axes.yaxis)


def _plot_products(axes: "Axes", rows: Sequence[dict]) -> None:
    size = _sizes(rows, "product")[-1]
    # The first three colours are those of the tasks.
    for library, colour, offset in zip(LIBRARIES, COLOURS[3:], (-0.15, 0.15), strict=False):
        ratios = [product_ratio(rows, orders, size=size, library=library) for orders in ALL_ORDERS]
        low, median, high = np.transpose(ratios)
        axes.errorbar(
            median,
            np.arange(len(ratios)) + offset,
            xerr=[median - low, high - median],
            fmt="o",
            color=colour,
            ms=5,
            capsize=3,
            label=f"product, {LIBRARIES[library]}",
        )
    axes.axvline(1, color="black", lw=0.8)
    axes.set_yticks(range(len(ALL_ORDERS)), [_orientation(orders) for orders in ALL_ORDERS])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(title=f"Product of {size:,} × {size:,}", xlabel="time ÷ row · row → row")


if __name__ == "__main__":
    cli.run(main, Config, __doc__, resumes=False)
