"""Times the losses and measures their memory, compared with PyTorch.

Each loss is timed alone and together with its gradient to the student: compiled by JAX, and in
PyTorch both eager and compiled. Calls queue as in a training loop, and a sample ends when the last
result is ready. The implementations alternate, so that other work on the machine affects all of
them; the report gives ratios within a round, as median and quartiles. PyTorch is optional: without
it only jaxkd is measured.

Paper: Hsu et al., Liger Kernel: Efficient Triton Kernels for LLM Training,
https://arxiv.org/abs/2410.10989 (the fused losses on tokens); jaxkd/losses cites the papers of the
other losses.

Command: python -m experiments.benchmarks.losses

Result: on logits compiled PyTorch takes 2.5 times as long as jaxkd for value and gradient, and 1.01
times for the value alone (geometric means of 24 cases; two x86-64 cores, jax 0.12, PyTorch 2.15);
standardised, DIST and ensemble losses at 128 × 1,000 are slower in both

Time: 5 minutes on 2 CPU cores
"""

import dataclasses
import fnmatch
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import beside_torch, timing
from experiments.benchmarks.loss_cases import (
    FULL_SIZE,
    FUSED,
    Case,
    Sizes,
    TorchLosses,
    jax_calls,
    jax_losses,
    make_cases,
    program_bytes,
)
from experiments.benchmarks.timing import Ratio
from experiments.common import cli
from jaxkd.data.progress import track
from jaxkd.runs.figures import COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUPS = {
    "logits": "Losses on logits",
    "features": "Losses on features and relations",
    "transformer": "Losses on transformers",
    "tokens": "Losses on tokens, from hidden states",
}
PASSES = {"forward": "forward", "both": "forward + backward"}


@dataclasses.dataclass(frozen=True)
class Config(Sizes):
    """Options of the experiment."""

    only: str = "*"
    """Time only the losses that match this pattern, such as `kl_divergence` or `*kl*`."""
    repeats: int = 11
    """Rounds; each times everything once."""
    workdir: str = "runs/loss_benchmark"
    """Folder of results.json and the figure; those of an earlier run are replaced."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        cli.require(
            self.batch >= 3, f"--batch {self.batch}: relational losses need at least 3 examples"
        )
        cli.require(len(self.classes) > 0, "--classes: give at least one number")
        for classes in self.classes:
            cli.require(classes >= 3, f"--classes {classes}: must be at least 3")
        cli.require(
            len({*self.classes}) == len(self.classes),
            f"--classes {self.classes}: give each number only once",
        )
        for name in ("tokens", "hidden", "vocabulary"):
            value = getattr(self, name)
            cli.require(value is None or value >= 2, f"--{name} {value}: must be at least 2")
        cli.require(self.repeats >= 1, f"--repeats {self.repeats}: must be at least 1")
        # The other options are valid by now, so that cases can be made from them.
        names = sorted({case.name for case in make_cases(self)})
        cli.require(
            any(fnmatch.fnmatch(name, self.only) for name in names),
            f"--only {self.only}: matches no loss; the losses are {', '.join(names)}",
        )


def full_size_memory(config: Config) -> list[dict]:
    """Returns the memory of the token losses with gradient at full size, compiled but not run."""
    rows = []
    tokens, hidden, vocabulary = FULL_SIZE
    shapes = ((tokens, hidden), (hidden, vocabulary)) * 2
    names = [name for name in FUSED if fnmatch.fnmatch(name, config.only)]
    for name, dtype in itertools.product(names, ("bfloat16", "float32")):
        case = Case("tokens", name, shapes, student_arrays=2)
        # Abstract arrays, because real ones would take up to 4.5 GB.
        layers = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        for implementation, mean_loss in jax_losses(case).items():
            program = jax.jit(jax.value_and_grad(mean_loss, (0, 1))).lower(*layers).compile()
            temporary_bytes, other_bytes = program_bytes(program)
            rows.append(
                {
                    "loss": name,
                    "size": case.size,
                    "dtype": dtype,
                    "implementation": implementation,
                    "temporary_bytes": temporary_bytes,
                    "bytes": temporary_bytes + other_bytes,
                }
            )
    return rows


def load_torch() -> tuple[TorchLosses | None, list[str]]:
    """Returns the losses in PyTorch if they can be compared, and notes on what is left out."""
    torch, notes = beside_torch.load_torch(TorchLosses)
    if torch and torch.device == "cpu":
        notes.append("PyTorch does not measure its memory on a CPU, so its memory is left out.")
    if torch and torch.compile_error:
        notes.append(f"torch.compile does not work here and is left out: {torch.compile_error}")
    return torch, notes


def measure(config: Config, torch: TorchLosses | None) -> list[dict]:
    """Times all cases.

    Args:
        config: Options.
        torch: The losses in PyTorch, or `None` to measure only jaxkd.

    Returns:
        A row for each case, implementation and pass, with the seconds per call of each round.
    """
    cases = [case for case in make_cases(config) if fnmatch.fnmatch(case.name, config.only)]
    rows: list[dict] = []
    for case in track(cases, description="timing", total=len(cases)):
        rows += _measure_case(case, config.repeats, torch)
    return rows


def ratio(rows: Sequence[dict], row: dict, implementation: str) -> Ratio | None:
    """Returns an implementation's time divided by a row's; `None` without such a measurement."""
    other = find(rows, row, implementation)
    return None if other is None else Ratio.of(other["seconds"], row["seconds"])


def find(rows: Sequence[dict], row: dict, implementation: str) -> dict | None:
    """Returns the row of the same loss, size and pass in another implementation, if any."""
    names = {key: row[key] for key in ("loss", "size", "pass")} | {"implementation": implementation}
    return next((other for other in rows if names.items() <= other.items()), None)


def conclude(rows: Sequence[dict], memory: Sequence[dict]) -> list[str]:
    """Summarises the measurements in a few sentences."""
    sentences = []
    for other in ("compiled", "eager"):
        ours = [
            row
            for row in rows
            if row["group"] == "logits"
            and row["implementation"] == "jaxkd"
            and find(rows, row, other)
        ]
        if ours:
            sentences.append(_conclude_logits(rows, ours, other))
    fused = [row for row in rows if row["implementation"] == "fused" and row["pass"] == "both"]
    if fused:
        ratios = [f"{row['loss']} {ratio(rows, row, 'jaxkd')}" for row in fused]
        sentences.append(
            f"With the gradient at {fused[0]['size']}, the time of the plain losses on tokens "
            f"divided by that of the fused ones is: {', '.join(ratios)}."
        )
    if memory:
        sentences.append(_conclude_memory(memory))
    return sentences


def _conclude_logits(rows: Sequence[dict], ours: Sequence[dict], other: str) -> str:
    means = [
        f"{_geometric_mean(rows, ours, pass_name, other)} ({label})"
        for pass_name, label in PASSES.items()
    ]
    ratios = []
    for row in ours:
        row_ratio = ratio(rows, row, other)
        if row_ratio:
            ratios.append((row_ratio, row))
    # Below 1 PyTorch is faster; with the upper quartile below 1, beyond the spread.
    slower = sum(row_ratio.high < 1 for row_ratio, _ in ratios)
    # Ratios compare by their lower quartile first.
    worst, worst_row = min(ratios, key=lambda pair: pair[0])
    return (
        f"On logits, {other} PyTorch takes {' and '.join(means)} times as long as jaxkd in the "
        f"geometric mean of {len(ours) // 2} cases; jaxkd is slower beyond the spread in {slower} "
        f"of {len(ours)}, at worst in {worst_row['loss']} at {worst_row['size']}, "
        f"{PASSES[worst_row['pass']]}: {worst}."
    )


def _conclude_memory(memory: Sequence[dict]) -> str:
    parts = []
    for dtype in ("bfloat16", "float32"):
        shares = [
            plain["bytes"] / fused["bytes"]
            for plain, fused in _plain_and_fused(memory)
            if plain["dtype"] == dtype
        ]
        parts.append(f"{min(shares):.1f} to {max(shares):.1f} times in {dtype}")
    return (
        f"At {memory[0]['size']} the plain losses with their gradient need more memory than the "
        f"fused ones: {', '.join(parts)}."
    )


def print_tables(
    rows: Sequence[dict], memory: Sequence[dict], *, console: Console | None = None
) -> None:
    """Prints times, ratios and memory, one table per group of losses."""
    console = console or Console()
    measured = {row["implementation"] for row in rows}
    versions = [name for name in ("eager", "compiled") if name in measured]
    for group, title in GROUPS.items():
        ours = [
            row
            for row in rows
            if row["group"] == group and row["implementation"] in ("jaxkd", "fused")
        ]
        if ours:
            console.print(_time_table(title, rows, ours, versions), end="\n\n")
    if memory:
        console.print(_memory_table(memory))
        console.print("temporary: without arguments and results", end="\n\n")


def _memory_table(memory: Sequence[dict]) -> Table:
    title = f"Memory with the gradient at {memory[0]['size']}, by the compiler: GB (ratio)"
    table = timing.make_table(title, "loss", "dtype")
    for column in ("plain", "fused", "plain, temporary", "fused, temporary"):
        table.add_column(column, justify="right")
    for plain, fused in _plain_and_fused(memory):
        cells = []
        for key in ("bytes", "temporary_bytes"):
            cells += [
                f"{plain[key] / 1e9:.2f}",
                f"{fused[key] / 1e9:.2f} ({plain[key] / fused[key]:.1f})",
            ]
        table.add_row(plain["loss"], plain["dtype"], *cells)
    return table


def plot(rows: Sequence[dict], path: Path, *, other: str, title: str) -> None:
    """Draws the time of another implementation divided by jaxkd's, one line per loss."""
    ours = [
        row
        for row in rows
        if row["implementation"] in ("jaxkd", "fused") and find(rows, row, other)
    ]
    lines = list(dict.fromkeys((row["group"], *_label(row)) for row in ours))
    with new_figure(path, 8, 2 + 0.19 * len(lines)) as figure:
        axes = figure.subplots()
        for pass_name, offset, fill in (("forward", -0.18, "white"), ("both", 0.18, None)):
            for i, (group, *label) in enumerate(lines):
                row = next(
                    row for row in ours if _label(row) == tuple(label) and row["pass"] == pass_name
                )
                colour = COLOURS[list(GROUPS).index(group)]
                row_ratio = ratio(rows, row, other)
                if row_ratio:
                    low, median, high = row_ratio
                    spread = [[median - low], [high - median]]
                    style = {"color": colour, "mfc": fill or colour, "ms": 4.5, "lw": 1}
                    axes.errorbar(median, i + offset, xerr=spread, fmt="o", **style)
        axes.axvline(1, color="black", lw=0.8)
        axes.set_yticks(range(len(lines)), [", ".join(label) for _, *label in lines], fontsize=7)
        axes.set(
            ylim=(len(lines) - 0.4, -0.6),
            xscale="log",
            xlabel=f"time of {other} PyTorch ÷ time of jaxkd",
        )
        timing.set_ratio_ticks(axes.xaxis)
        axes.grid(visible=False, axis="y")
        _add_legend(figure, [group for group, *_ in lines])
        figure.suptitle(title, fontsize=8, color="#555555")


def main(config: Config) -> None:
    """Times the losses, writes the results and prints the tables."""
    folder = beside_torch.prepare_folder(config)
    torch, notes = load_torch()
    rows = measure(config, torch)
    memory = full_size_memory(config)
    sentences = conclude(rows, memory)
    results = {"summary": sentences, "notes": notes, "rows": rows, "full_size_memory": memory}
    setting = beside_torch.write_results(folder, config, torch, results, rounds=config.repeats)
    print_tables(rows, memory)
    if torch:
        other = "eager" if torch.compile_error else "compiled"
        plot(rows, folder / "loss_benchmark.png", other=other, title=setting)
    print(setting, *notes, *sentences, f"Everything is in {folder}", sep="\n")


def _measure_case(case: Case, rounds: int, torch: TorchLosses | None) -> list[dict]:
    common = {"group": case.group, "loss": case.name, "size": case.size, "dtype": case.dtype}
    calls: list[Callable[[], Any]] = []
    rows: list[dict[str, Any]] = []
    for implementation, pass_name, call, memory in jax_calls(case):
        calls.append(call)
        rows.append({"implementation": implementation, "pass": pass_name, "bytes": memory})
    if torch:
        for implementation, pass_name, call in torch.calls(case):
            calls.append(call)
            memory = torch.peak_bytes(call)
            rows.append({"implementation": implementation, "pass": pass_name, "bytes": memory})
    times = np.transpose(list(beside_torch.time_rounds(calls, rounds, torch))).tolist()
    return [common | row | {"seconds": seconds} for row, seconds in zip(rows, times, strict=True)]


def _plain_and_fused(memory: Sequence[dict]) -> Iterator[tuple[dict, dict]]:
    """Yields the plain and the fused row of each loss and dtype, which are adjacent."""
    return zip(memory[::2], memory[1::2], strict=True)


def _geometric_mean(rows: Sequence[dict], ours: Sequence[dict], pass_name: str, other: str) -> str:
    ratios = [ratio(rows, row, other) for row in ours if row["pass"] == pass_name]
    logarithms = [math.log(row_ratio.median) for row_ratio in ratios if row_ratio]
    return f"{math.exp(np.mean(logarithms)):.2f}"


def _label(row: dict) -> tuple[str, str]:
    return ("fused_" if row["implementation"] == "fused" else "") + row["loss"], row["size"]


def _time_table(
    title: str, rows: Sequence[dict], ours: Sequence[dict], versions: Sequence[str]
) -> Table:
    """Makes a table with a line for each loss and pass."""
    # The ratio is taken to the fastest of PyTorch's versions: compiled, where that works.
    fastest = versions[-1:]
    # On a CPU PyTorch reports no memory, and the column would be empty.
    with_memory = [
        other
        for other in fastest
        if any(row["bytes"] for row in rows if row["implementation"] == other)
    ]
    heading = f"{title}: milliseconds a call" + (
        ", and times PyTorch ÷ jaxkd: median (quartiles)" if versions else ""
    )
    table = timing.make_table(heading, "loss", "size", "pass")
    for column in (
        "jaxkd",
        *versions,
        *(f"{other} ÷ jaxkd" for other in fastest),
        "MB",
        *(f"MB {other}" for other in with_memory),
    ):
        table.add_column(column, justify="right")
    for row in ours:
        rows_with_time = [row, *(find(rows, row, version) for version in versions)]
        rows_with_memory = [row, *(find(rows, row, other) for other in with_memory)]
        table.add_row(
            *_label(row),
            row["pass"],
            *map(_milliseconds, rows_with_time),
            *(str(ratio(rows, row, other) or "") for other in fastest),
            *map(_megabytes, rows_with_memory),
        )
    return table


def _milliseconds(row: dict | None) -> str:
    return f"{1000 * np.median(row['seconds']):,.3f}" if row else ""


def _megabytes(row: dict | None) -> str:
    return f"{row['bytes'] / 1e6:,.1f}" if row and row["bytes"] else ""


def _add_legend(figure: "Figure", groups: Sequence[str]) -> None:
    """Explains the colours (groups) and the fill (hollow: forward pass alone)."""
    from matplotlib.lines import Line2D

    styles = {
        PASSES["forward"]: ("#555555", "white"),
        PASSES["both"]: ("#555555", "#555555"),
    }
    for group, colour in zip(GROUPS, COLOURS, strict=False):
        if group in groups:
            styles[GROUPS[group]] = (colour, colour)
    dots = [
        Line2D([], [], marker="o", ls="", color=colour, mfc=fill, ms=5, label=label)
        for label, (colour, fill) in styles.items()
    ]
    figure.legend(handles=dots, loc="outside lower center", ncols=2, fontsize=8)


if __name__ == "__main__":
    cli.run(main, Config, __doc__, resumes=False)
