"""Measures the images and texts per second of training and inference, compared with PyTorch.

Networks are trained on labels alone, distilled from a teacher (its forward pass, the student's
forward and backward pass, the optimizer) and run. jaxkd runs as a user would run it, PyTorch both
eager and compiled. Weights are drawn at random, images are noise, and texts are 8 to 32 random
tokens padded to 32: times do not depend on the values. PyTorch uses the fastest of its usual
variants: the memory format channels_last for images, and LSTMs that also read the padding and
select the state at the end of each text, which takes less than half the time of packed texts.

The implementations alternate, so that other work on the machine affects all of them. The report
gives medians, and ratios within a round as median and quartiles. The time that JAX and
torch.compile need before the first step is reported separately. PyTorch is optional: without it
only jaxkd is measured.

Paper: Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531;
jaxkd/models cites the papers of the networks.

Command: python -m experiments.benchmarks.training

On Linux the result below was measured with MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=1073741824
MALLOC_TRIM_THRESHOLD_=2147483647, so that a process keeps the memory that a step frees: otherwise
the kernel has to map new pages in every step.

Result: eager PyTorch takes 1.30 times as long as jaxkd to train the LSTM and 1.22 to train BERT,
0.93 and 1.14 to run them; 0.79 to train the CNN, 0.97 to run it and 0.89 to distil it, 0.66 to
train ResNet-20 and 0.75 to run it, 0.67 to distil ResNet-56 into ResNet-20 and 0.76 WRN-40-2 into
WRN-16-2 (two x86-64 cores with AVX-512, jax 0.12, PyTorch 2.14)

Time: 4 minutes on 2 CPU cores
"""

import dataclasses
import fnmatch
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from experiments.benchmarks import beside_torch, timing
from experiments.benchmarks.timing import Ratio
from experiments.benchmarks.training_cases import (
    CASES,
    TORCH_VERSIONS,
    Case,
    Settings,
    TorchTraining,
    jax_call,
    make_batch,
)
from experiments.common import cli
from jaxkd.data.progress import track
from jaxkd.runs.figures import COLOURS, new_figure


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Options of the experiment."""

    only: str = "*"
    """Time only the cases that match this pattern, such as `train_cnn` or `*resnet*`."""
    rounds: int = 11
    """Rounds; each times everything once."""
    workdir: str = "runs/training_benchmark"
    """Folder of results.json and the figure; those of an earlier run are replaced."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        cli.require(self.batch_size >= 1, f"--batch-size {self.batch_size}: must be at least 1")
        cli.require(
            self.text_batch_size >= 1,
            f"--text-batch-size {self.text_batch_size}: must be at least 1",
        )
        cli.require(self.rounds >= 1, f"--rounds {self.rounds}: must be at least 1")
        names = [case.name for case in CASES]
        cli.require(
            any(fnmatch.fnmatch(name, self.only) for name in names),
            f"--only {self.only}: matches no case; the cases are {', '.join(names)}",
        )


def measure(config: Config, torch: TorchTraining | None) -> list[dict]:
    """Times all cases.

    Args:
        config: Options.
        torch: The networks in PyTorch, or `None` to measure only jaxkd.

    Returns:
        A row for each case and implementation, with the seconds per step of each round.
    """
    cases = [case for case in CASES if fnmatch.fnmatch(case.name, config.only)]
    rows: list[dict] = []
    for case in track(cases, description="timing", total=len(cases)):
        rows += _measure_case(case, config, torch)
    return rows


def _measure_case(case: Case, config: Config, torch: TorchTraining | None) -> list[dict]:
    call, steps_per_call = jax_call(case, config)
    implementations = [("jaxkd", call, steps_per_call)]
    if torch:
        implementations += [(version, call, 1) for version, call in torch.calls(case, config)]
    wait = torch.wait if torch else jax.block_until_ready
    # The first call compiles, so it must be timed before the rounds.
    first_seconds = [_seconds(call, wait) for _, call, _ in implementations]
    calls = [call for _, call, _ in implementations]
    rounds = np.array(list(beside_torch.time_rounds(calls, config.rounds, torch)))
    batch_size = len(make_batch(case, config)["labels"])
    return [
        {
            "case": case.name,
            "implementation": implementation,
            "batch": batch_size,
            "first_call_seconds": first_call_seconds,
            # A call of jaxkd may take several steps, a call of PyTorch takes one.
            "seconds": (seconds / steps).tolist(),
        }
        for (implementation, _, steps), first_call_seconds, seconds in zip(
            implementations, first_seconds, rounds.T, strict=True
        )
    ]


def _seconds(call: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    start = time.perf_counter()
    wait(call())
    return time.perf_counter() - start


def find(rows: Sequence[dict], case: str, implementation: str) -> dict | None:
    """Returns the row of a case in an implementation, if any."""
    names = {"case": case, "implementation": implementation}
    return next((row for row in rows if names.items() <= row.items()), None)


def ratio(rows: Sequence[dict], case: str, implementation: str) -> Ratio | None:
    """Returns an implementation's time divided by jaxkd's; `None` without such a measurement."""
    ours = find(rows, case, "jaxkd")
    other = find(rows, case, implementation)
    return Ratio.of(other["seconds"], ours["seconds"]) if ours and other else None


def speed(row: dict) -> float:
    """Returns images or texts per second, at the median of the rounds."""
    return row["batch"] / float(np.median(row["seconds"]))


def conclude(rows: Sequence[dict]) -> list[str]:
    """Summarises the measurements, one sentence per version of PyTorch."""
    sentences = []
    for version in TORCH_VERSIONS:
        ratios = _ratios(rows, version)
        if ratios:
            parts = ", ".join(f"{case} {case_ratio}" for case, case_ratio in ratios.items())
            sentences.append(
                f"{version.capitalize()} PyTorch, time divided by that of jaxkd: {parts}."
            )
    return sentences


def _ratios(rows: Sequence[dict], implementation: str) -> dict[str, Ratio]:
    """Returns the ratios of the cases that were measured in an implementation."""
    ratios = {}
    for case in _case_names(rows):
        case_ratio = ratio(rows, case, implementation)
        if case_ratio:
            ratios[case] = case_ratio
    return ratios


def _case_names(rows: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in rows))


def print_table(rows: Sequence[dict], *, console: Console | None = None) -> None:
    """Prints images or texts per second, ratios, and the seconds of the first call."""
    measured = {row["implementation"] for row in rows}
    versions = [version for version in TORCH_VERSIONS if version in measured]
    heading = "Images or texts a second" + (
        ", and times PyTorch ÷ jaxkd: median (quartiles)" if versions else ""
    )
    table = timing.make_table(heading, "case")
    ratio_columns = [f"{version} ÷ jaxkd" for version in versions]
    for column in ("jaxkd", *versions, *ratio_columns, "first call, s"):
        table.add_column(column, justify="right")
    for case in _case_names(rows):
        candidates = [find(rows, case, name) for name in ("jaxkd", *versions)]
        case_rows = [row for row in candidates if row]
        first_seconds = ", ".join(f"{row['first_call_seconds']:.1f}" for row in case_rows)
        ratios = [str(ratio(rows, case, version)) for version in versions]
        table.add_row(case, *(f"{speed(row):,.0f}" for row in case_rows), *ratios, first_seconds)
    (console or Console()).print(table, end="\n\n")


def plot(rows: Sequence[dict], path: Path, *, title: str) -> None:
    """Draws PyTorch's time divided by jaxkd's, one line per case."""
    cases = _case_names(rows)
    with new_figure(path, 7, 1.6 + 0.35 * len(cases)) as figure:
        axes = figure.subplots()
        for version, colour, offset in zip(TORCH_VERSIONS, COLOURS, (-0.12, 0.12), strict=False):
            ratios = _ratios(rows, version)
            if ratios:
                low, median, high = np.transpose(list(ratios.values()))
                heights = [cases.index(case) + offset for case in ratios]
                spread = [median - low, high - median]
                axes.errorbar(
                    median, heights, xerr=spread, fmt="o", color=colour, ms=5, lw=1, label=version
                )
        axes.axvline(1, color="black", lw=0.8)
        axes.set_yticks(range(len(cases)), cases)
        axes.set(
            ylim=(len(cases) - 0.5, -0.5), xscale="log", xlabel="time of PyTorch ÷ time of jaxkd"
        )
        timing.set_ratio_ticks(axes.xaxis)
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside lower center", ncols=2)
        figure.suptitle(title, fontsize=8, color="#555555")


def main(config: Config) -> None:
    """Times training, writes the results and prints the table."""
    folder = beside_torch.prepare_folder(config)
    torch, notes = beside_torch.load_torch(TorchTraining)
    rows = measure(config, torch)
    sentences = conclude(rows)
    results = {"summary": sentences, "notes": notes, "rows": rows}
    setting = beside_torch.write_results(folder, config, torch, results, rounds=config.rounds)
    print_table(rows)
    if torch:
        plot(rows, folder / "training_benchmark.png", title=setting)
    print(setting, *notes, *sentences, f"Everything is in {folder}", sep="\n")


if __name__ == "__main__":
    cli.run(main, Config, __doc__, resumes=False)
