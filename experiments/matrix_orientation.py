"""Does it matter whether a matrix lies in memory row after row or column after column?

Rows and columns of row-major and column-major matrices are summed and scaled, in one call and line by line, and
matrices are multiplied in the eight orientations of `layout.matmul`, by NumPy and by JAX. A column-major matrix of JAX
is one in a device layout; operands of products are stored transposed instead. The runs of what is compared alternate,
so that other work on the machine meets all of them; what is reported are ratios within a round of such runs, their
median and quartiles.

Paper: Drepper, What Every Programmer Should Know About Memory, https://www.akkadia.org/drepper/cpumemory.pdf

Command: python -m experiments.matrix_orientation

Result: line by line through 5,000 × 5,000, columns take 2.4 times (NumPy) and 6.6 times (JAX) as long as rows; none of
the other seven orientations of a product is clear of the spread (x86-64, jax 0.10.2)

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

from experiments import cli, timing
from experiments.timing import Ratio, time_rounds
from jaxkd import layout, runs
from jaxkd.data.progress import track
from jaxkd.figures import COLOURS, draw

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
    """Rows, and columns, of the matrices; one of 5000 takes 100 MB, and there are up to eight."""
    product_limit: int = 2000
    """The largest of the sizes at which matrices are multiplied, which takes n³ steps instead of n²."""
    repeats: int = 11
    """Rounds in which everything is timed once."""
    workdir: str = "runs/matrix_orientation"
    """Where results.json and the figure are written; those of an earlier run are replaced."""

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        cli.require(len(self.sizes) > 0, "--sizes: at least one is needed")
        for size in self.sizes:
            cli.require(2 <= size <= 30_000, f"--sizes {size}: choose from 2 to 30000, which takes 30 GB")
        cli.require(len({*self.sizes}) == len(self.sizes), f"--sizes {self.sizes}: each only once")
        smallest = min(self.sizes)
        cli.require(
            self.product_limit >= smallest, f"--product-limit {self.product_limit}: the smallest size is {smallest}"
        )
        cli.require(self.repeats >= 1, f"--repeats {self.repeats}: at least one round is needed")


class Case(NamedTuple):
    """Something to time: what it is called in the results, and a call that returns when it is done."""

    name: dict[str, Any]
    call: Callable[[], Any]


def access_cases(size: int) -> Iterator[list[Case]]:
    """Work along rows and along columns of matrices in both orders, one task after the other."""
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
    """Products of the same two matrices, each stored as it is or transposed, to a result stored as it is or not."""
    values = np.random.default_rng(0).random((2, size, size), np.float32)
    cases = []
    for orders in ALL_ORDERS:
        lhs, rhs = (x if order == "row" else x.T.copy() for x, order in zip(values, orders[:2], strict=True))
        name = {"task": "product", "size": size, "orders": list(orders)}
        cases.append(Case({**name, "library": "numpy"}, _numpy_product(lhs, rhs, orders)))
        cases.append(Case({**name, "library": "jax"}, _jax_product(lhs, rhs, orders)))
    return cases


def measure(config: Config) -> list[dict]:
    """Times everything; a row a case, with the seconds of a call in each round."""
    products = [size for size in config.sizes if size <= config.product_limit]
    groups = itertools.chain(
        itertools.chain.from_iterable(access_cases(size) for size in config.sizes),
        (product_cases(size) for size in products),
    )
    rows: list[dict] = []
    total = config.repeats * (len(TASKS) * len(config.sizes) + len(products))
    for _ in track(_rounds(groups, config.repeats, rows), description="timing", total=total):
        pass
    return rows


def ratio(rows: Sequence[dict], names: dict, baseline: dict) -> Ratio:
    """How many times as long as another case a case takes, both given by their names."""
    return Ratio.of(_find(rows, names), _find(rows, baseline))


def access_ratio(rows: Sequence[dict], **names: Any) -> Ratio:
    """How many times as long a task takes along columns as along rows."""
    return ratio(rows, names | {"by": "column"}, names | {"by": "row"})


def product_ratio(rows: Sequence[dict], orders: Sequence[str], **names: Any) -> Ratio:
    """How many times as long as with everything in row order a product takes."""
    names |= {"task": "product"}
    return ratio(rows, names | {"orders": list(orders)}, names | {"orders": ["row"] * 3})


def conclude(rows: Sequence[dict]) -> list[str]:
    """What was measured, in two sentences on the largest matrices."""
    size = _sizes(rows)[-1]
    lines = [access_ratio(rows, task="walk", size=size, library=library, order="row") for library in LIBRARIES]
    names = [{"task": "sum", "size": size, "library": library, "by": "row"} for library in LIBRARIES]
    whole = [ratio(rows, one | {"order": "column"}, one | {"order": "row"}) for one in names]
    product = _sizes(rows, "product")[-1]
    products = [_product_range(rows, product, library) for library in LIBRARIES]
    return [
        f"Line by line through a row-major matrix of {size:,} × {size:,}, columns take {lines[0]} times as long as "
        f"rows in NumPy and {lines[1]} times in JAX; to sum all rows in one call takes {whole[0]} times as long in "
        f"NumPy and {whole[1]} times in JAX where the matrix is column-major.",
        f"Products of {product:,} × {product:,} matrices in the seven other orientations take {products[0]} the "
        f"time of row · row → row in NumPy and {products[1]} in JAX.",
    ]


def print_tables(rows: Sequence[dict], *, console: Console | None = None) -> None:
    """Prints the ratios and, for the largest matrices, the times."""
    console, sizes = console or Console(), _sizes(rows)
    table = timing.table(
        "Time by columns ÷ time by rows: median ± half the distance of the quartiles", "task", "", "matrix"
    )
    for size in sizes:
        table.add_column(f"{size:,}", justify="right", no_wrap=True)
    table.add_column("ms by rows", justify="right")
    for task, library, order in itertools.product(TASKS, LIBRARIES, ORDERS):
        names = {"task": task, "library": library, "order": order}
        ratios = [access_ratio(rows, size=size, **names) for size in sizes]
        cells = [f"{one.median:.2f} ± {(one.high - one.low) / 2:.2f}" for one in ratios]
        last = _milliseconds(rows, names | {"size": sizes[-1], "by": "row"})
        table.add_row(task, LIBRARIES[library], order, *cells, last)
    console.print(table)
    console.print("; ".join(f"{task}: {label}" for task, label in TASKS.items()), end="\n\n")

    size = _sizes(rows, "product")[-1]
    table = timing.table(f"Product of {size:,} × {size:,} ÷ row · row → row: median (quartiles)", "orientation")
    for name in LIBRARIES.values():
        table.add_column(name, justify="right")
        table.add_column("ms", justify="right")
    for orders in ALL_ORDERS:
        cells = []
        for library in LIBRARIES:
            names = {"task": "product", "size": size, "library": library, "orders": list(orders)}
            cells += [str(product_ratio(rows, orders, size=size, library=library)), _milliseconds(rows, names)]
        table.add_row(_arrow(orders), *cells)
    console.print(table, end="\n\n")


def plot(rows: Sequence[dict], path: Path, *, title: str) -> None:
    """Draws the ratios: along rows and columns over the size, and of products in every orientation."""
    with draw(path, 11, 4.4) as figure:
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
        middle.sharey(left)
        for axes, library in ((left, "numpy"), (middle, "jax")):
            _plot_access(axes, rows, library)
        left.set_ylabel("time by columns ÷ time by rows")
        middle.tick_params(labelleft=False)
        _plot_products(right, rows)
        handles, labels = (
            sum(both, [])
            for both in zip(left.get_legend_handles_labels(), right.get_legend_handles_labels(), strict=True)
        )
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        figure.suptitle(title, fontsize=9, color="#555555")


def main(config: Config) -> None:
    """Times, compares and reports."""
    folder = timing.begin(config)
    rows = measure(config)
    sentences, environment = conclude(rows), runs.environment()
    timing.write_results(folder, config, environment, {"summary": sentences, "rows": rows})
    setting = (
        f"float32 on {environment['platform']} ({environment['device']}, {environment['cores']} cores), "
        f"NumPy {environment['numpy']}, JAX {environment['jax']}"
    )
    plot(rows, folder / "matrix_orientation.png", title=setting)
    print_tables(rows)
    print(setting, *sentences, f"Everything is in {folder}", sep="\n")


def _numpy_call(task: str, matrix: Any, axis: int) -> Callable[[], Any]:
    factors = np.expand_dims(_signs(len(matrix)), 1 - axis)
    lines = np.moveaxis(matrix, axis, 0)
    return {
        "walk": lambda: sum(line.sum() for line in lines),
        "sum": lambda: matrix.sum(1 - axis),
        "scale": lambda: np.multiply(matrix, factors, out=matrix),
    }[task]


def _jax_call(task: str, matrix: Any, axis: int) -> Callable[[], Any]:
    size, factors = len(matrix), jnp.expand_dims(_signs(len(matrix)), 1 - axis)

    def walk(x):
        def add(i, total):
            return total + lax.dynamic_index_in_dim(x, i, axis).sum()

        return lax.fori_loop(0, size, add, jnp.zeros((), x.dtype))

    if task == "scale":
        return _in_place(jax.jit(jnp.multiply, donate_argnums=0, out_shardings=matrix.format), matrix, factors)
    call = jax.jit(walk if task == "walk" else lambda x: x.sum(1 - axis))
    return lambda: call(matrix).block_until_ready()


def _signs(size: int) -> np.ndarray:
    """Factors with which a matrix can be scaled for ever."""
    return (1 - 2 * (np.arange(size) % 2)).astype(np.float32)


def _in_place(call: Callable, matrix: Any, factors: Any) -> Callable[[], Any]:
    """Scales a matrix where it lies, as NumPy does; most of the time would go into finding new memory otherwise."""
    held = [layout.as_order(jnp.array(matrix, copy=True), layout.order_of(matrix))]

    def again():
        held[0] = call(held[0], factors).block_until_ready()
        return held[0]

    return again


def _numpy_product(lhs: Any, rhs: Any, orders: Sequence[str]) -> Callable[[], Any]:
    lhs, rhs = (x if order == "row" else x.T for x, order in zip((lhs, rhs), orders[:2], strict=True))
    return (lambda: lhs @ rhs) if orders[2] == "row" else (lambda: rhs.T @ lhs.T)


def _jax_product(lhs: Any, rhs: Any, orders: Sequence[Any]) -> Callable[[], Any]:
    lhs_order, rhs_order, out_order = orders
    multiply = jax.jit(functools.partial(layout.matmul, lhs_order=lhs_order, rhs_order=rhs_order, out_order=out_order))
    lhs, rhs = jax.device_put((lhs, rhs))
    return lambda: multiply(lhs, rhs).block_until_ready()


def _rounds(groups: Iterable[list[Case]], repeats: int, rows: list[dict]) -> Iterator[None]:
    """Times group after group in rounds, and yields after each of them; a group's rows are added at its end."""
    for cases in groups:
        rounds = []
        for seconds in time_rounds([case.call for case in cases], repeats):
            rounds.append(seconds)
            yield
        times = np.transpose(rounds).tolist()
        rows += [case.name | {"seconds": seconds} for case, seconds in zip(cases, times, strict=True)]


def _sizes(rows: Sequence[dict], task: str = "sum") -> list[int]:
    return sorted({row["size"] for row in rows if row["task"] == task})


def _product_range(rows: Sequence[dict], size: int, library: str) -> str:
    found = [product_ratio(rows, orders, size=size, library=library) for orders in ALL_ORDERS[1:]]
    medians, clear = [one.median for one in found], sum(one.clear for one in found)
    return f"{min(medians):.2f} to {max(medians):.2f} times ({clear} of 7 clear of the spread)"


def _milliseconds(rows: Sequence[dict], names: dict) -> str:
    return f"{1000 * np.median(_find(rows, names)):,.2f}"


def _find(rows: Sequence[dict], names: dict) -> list[float]:
    return next(row["seconds"] for row in rows if names.items() <= row.items())


def _arrow(orders: Sequence[str]) -> str:
    return f"{orders[0]} · {orders[1]} → {orders[2]}"


def _plot_access(axes: "Axes", rows: Sequence[dict], library: str) -> None:
    from matplotlib.ticker import NullLocator

    sizes = _sizes(rows)
    for (task, label), colour in zip(TASKS.items(), COLOURS, strict=False):
        for order, style in zip(ORDERS, ("-", "--"), strict=True):
            found = [access_ratio(rows, task=task, size=size, library=library, order=order) for size in sizes]
            low, median, high = ([getattr(one, part) for one in found] for part in ("low", "median", "high"))
            axes.fill_between(sizes, low, high, color=colour, alpha=0.12, linewidth=0)
            axes.plot(sizes, median, style, color=colour, marker="o", ms=4, label=f"{label}, {order}-major")
    axes.axhline(1, color="black", lw=0.8)
    axes.set(title=LIBRARIES[library], xscale="log", yscale="log", xlabel="rows and columns")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    timing.log_ticks(axes.yaxis)


def _plot_products(axes: "Axes", rows: Sequence[dict]) -> None:
    size = _sizes(rows, "product")[-1]
    for library, colour, shift in zip(LIBRARIES, COLOURS[3:], (-0.15, 0.15), strict=False):
        found = [product_ratio(rows, orders, size=size, library=library) for orders in ALL_ORDERS]
        low, median, high = np.transpose(found)
        places, spread = np.arange(len(found)) + shift, [median - low, high - median]
        axes.errorbar(
            median, places, xerr=spread, fmt="o", color=colour, ms=5, capsize=3, label=f"product, {LIBRARIES[library]}"
        )
    axes.axvline(1, color="black", lw=0.8)
    axes.set_yticks(range(len(ALL_ORDERS)), [_arrow(orders) for orders in ALL_ORDERS])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(title=f"Product of {size:,} × {size:,}", xlabel="time ÷ row · row → row")


if __name__ == "__main__":
    cli.run(main, Config, __doc__, resumes=False)
