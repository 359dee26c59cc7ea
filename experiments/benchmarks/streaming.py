"""Measures training on records that are read from disk, against arrays in memory.

Writes images as array_record, and trains the small CNN through `distill.run_plan`, in turn on the
records and on an array of the first of them. Each training is a process of its own, which reports
its images per second after the first steps and the largest memory that it has held. Start-up, the
program and its compilation included, takes several hundred MB of that.

Command: python -m experiments.benchmarks.streaming
Twenty gigabytes: python -m experiments.benchmarks.streaming --gigabytes 20 --steps 600

Result: on 20 GB, 1.05 (0.98 to 1.06) of the images per second of an array in memory, within 1.05 GB
(two x86-64 cores, jax 0.12)

Time: 3 minutes on 2 CPU cores
"""

import dataclasses
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

from experiments.benchmarks import timing
from experiments.benchmarks.timing import Ratio
from experiments.common import cli
from jaxkd import data, distill, models, runs
from jaxkd._messages import format_bytes
from jaxkd.data.progress import track
from jaxkd.distill import methods

NUM_CLASSES = 10
# Steps before the clock starts: programs are compiled, and the first batches are read.
WARM_STEPS = 20
MIN_SIDE = 10
SHARD_BYTES = 2**30
MODES = ("memory", "stream")


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    gigabytes: float = 0.2
    """Size of the records. They are written to the folder, and deleted at the end."""
    side: int = 32
    """Height and width of the images."""
    batch_size: int = 128
    """Images per step."""
    steps: int = 300
    """Steps of each training."""
    rounds: int = 3
    """Rounds; each trains once on arrays and once on records."""
    workdir: str = "runs/streaming_benchmark"
    """Folder of results.json; that of an earlier run is replaced."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        cli.require(self.side >= MIN_SIDE, f"--side {self.side}: at least {MIN_SIDE} for the CNN")
        for name in ("batch_size", "rounds"):
            option = f"--{name.replace('_', '-')}"
            cli.require(getattr(self, name) >= 1, f"{option} {getattr(self, name)}: at least 1")
        cli.require(self.steps > WARM_STEPS, f"--steps {self.steps}: more than {WARM_STEPS}")
        cli.require(
            self.num_records >= self.batch_size,
            f"--gigabytes {self.gigabytes}: at least one batch, "
            f"{self.batch_size * self.side**2 * 3 / 1e9:.4f}",
        )

    @property
    def num_records(self) -> int:
        """Number of records."""
        return int(self.gigabytes * 1e9) // (self.side**2 * 3)


class Clock:
    """Times of steps that have ended.

    Attributes:
        marks: The number of steps and the time, after the first steps and after the last one.
    """

    def __init__(self, last_step: int) -> None:
        """Takes the number of the last step."""
        self.marks: list[tuple[int, float]] = []
        self._num_steps = 0
        self._wanted = [last_step, WARM_STEPS]

    def advance(self, count: int, result: Any) -> None:
        """Counts steps; waits for their result where a time is wanted."""
        self._num_steps += count
        if self._wanted and self._num_steps >= self._wanted[-1]:
            self._wanted.pop()
            jax.block_until_ready(result)
            self.marks.append((self._num_steps, time.perf_counter()))

    @property
    def steps_per_second(self) -> float:
        """The speed between the two marks."""
        (first, start), (last, end) = self.marks
        return (last - first) / (end - start)


@dataclasses.dataclass(frozen=True)
class TimedPlacement(distill.MeshPlacement):
    """Tells a clock of the steps."""

    clock: Clock = dataclasses.field(kw_only=True)

    def make_multi_step(self, make_step: Any) -> Any:
        """Compiles a training step, whose calls advance the clock."""
        take_steps = super().make_multi_step(make_step)

        def timed(states: Any, examples: Any, indices: np.ndarray, *rest: Any) -> Any:
            result = take_steps(states, examples, indices, *rest)
            self.clock.advance(len(indices), result)
            return result

        return timed


def write_records(config: Config, folder: Path) -> list[str]:
    """Writes images of noise with a label, in files of a gigabyte.

    Args:
        config: Options.
        folder: An empty folder.

    Returns:
        The files.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    rng = np.random.default_rng(0)
    size = config.side**2 * 3
    # Each image begins somewhere in a block of noise: drawing all of them would take minutes.
    block = rng.integers(0, 256, 2**26 + size, np.uint8).tobytes()
    starts = rng.integers(0, 2**26, config.num_records)
    labels = rng.integers(0, NUM_CLASSES, config.num_records)
    per_file = max(1, SHARD_BYTES // size)
    files = []
    shards = range(0, config.num_records, per_file)
    for first in track(shards, description="writing records", total=len(shards)):
        files.append(str(folder / f"{len(files):05d}.array_record"))
        # A record a group, for reads in any order.
        writer = ArrayRecordWriter(files[-1], "group_size:1,uncompressed")
        for i in range(first, min(first + per_file, config.num_records)):
            writer.write(bytes([labels[i]]) + block[starts[i] : starts[i] + size])
        writer.close()
    return files


def open_records(files: list[str], side: int) -> data.Records:
    """Opens what `write_records` wrote."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    def convert(record: bytes) -> dict[str, Any]:
        image = np.frombuffer(record, np.uint8, offset=1).reshape(side, side, 3)
        return {"inputs": image, "labels": np.int32(record[0])}

    return data.Records(ArrayRecordDataSource(files), convert)


def train(mode: str, config: Config, files: list[str]) -> dict[str, float]:
    """Trains in this process, and returns its images per second and its largest memory."""
    records = open_records(files, config.side)
    examples: Any = records
    if mode == "memory":
        examples = records.read(np.arange(min(records.count, 10_000)))
    model = models.from_linen(models.CNN(features=(32, 64), hidden=64, num_classes=NUM_CLASSES))
    model = models.with_input_normalization(model, np.full(3, 0.5), np.full(3, 0.25))
    stage = distill.Stage(
        "student",
        model,
        examples,
        methods.supervised_loss,
        optax.adam(1e-3),
        config.steps,
        batch_size=config.batch_size,
    )
    clock = Clock(config.steps)
    mesh = distill.make_mesh(devices=jax.local_devices()[:1])
    with tempfile.TemporaryDirectory() as folder:
        distill.run_plan(
            [stage],
            [0],
            runs.open_run(folder, {}),
            validation=records.read(np.arange(config.batch_size)),
            placement=TimedPlacement(mesh, clock=clock),
            evaluations=1,
            save_every=1e9,
        )
    return {
        "images_per_second": clock.steps_per_second * config.batch_size,
        "peak_bytes": measure_peak_memory(),
    }


def measure_peak_memory() -> int:
    """Returns the largest resident memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(config: Config, files: list[str]) -> dict[str, list[dict[str, float]]]:
    """Trains on arrays and on records in turn, each time in a new process.

    Returns:
        The results of each round, by mode.
    """
    rows: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    spawn = multiprocessing.get_context("spawn")
    for i in track(range(config.rounds), description="training", total=config.rounds):
        # Every second round runs backwards, so that a drift of the machine affects both equally.
        for mode in MODES if i % 2 == 0 else reversed(MODES):
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                rows[mode].append(pool.submit(train, mode, config, files).result())
    return rows


def print_table(rows: dict[str, list[dict[str, float]]], *, console: Console | None = None) -> None:
    """Prints the medians of both, and their ratio."""
    speeds = {mode: [row["images_per_second"] for row in rows[mode]] for mode in MODES}
    table = timing.make_table("Training of the small CNN: median (quartiles)", "images")
    for column in ("images per second", "÷ in memory", "largest memory"):
        table.add_column(column, justify="right")
    for mode in MODES:
        table.add_row(
            mode,
            f"{np.median(speeds[mode]):,.0f}",
            str(Ratio.of(speeds[mode], speeds["memory"])),
            format_bytes(int(np.median([row["peak_bytes"] for row in rows[mode]]))),
        )
    (console or Console()).print(table, end="\n\n")


def main(config: Config) -> None:
    """Writes the records, trains in turn, writes the results and prints the table."""
    folder = timing.prepare_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    records = Path(tempfile.mkdtemp(prefix="records-", dir=folder))
    try:
        rows = measure(config, write_records(config, records))
    finally:
        shutil.rmtree(records, ignore_errors=True)
    timing.write_results(folder, config, runs.describe_environment(), {"trainings": rows})
    print_table(rows)
    print(f"Everything is in {folder}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__, resumes=False)
