"""What do two ways to save time save: many students at once, and teachers that answer once?

Students of one kind take a step each, one after another or as one program vectorised over them, by the code that
a plan runs; and a student takes a step whose teacher runs along, or whose teacher's logits were computed before. The
calls alternate, so that other work on the machine meets all of them; what is reported are medians, and ratios within a
round of calls with their quartiles.

Command: python -m experiments.saving_benchmark
On an accelerator: python -m experiments.saving_benchmark --students 2 8 32

Result: at once 8 students of a dense network take 0.8 of the time that they take one after another, and 8 CNNs 1.9 of
it; without the teacher's forward pass a step of the CNN is 1.25 times as fast, of ResNet-20 beside ResNet-56 and of
WRN-16-2 beside WRN-40-2 1.6 times (two x86-64 cores, jax 0.12)

Time: 2 minutes on 2 CPU cores
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from experiments import cli, timing, training_benchmark
from experiments.timing import Ratio, time_rounds
from experiments.training_benchmark import (
    ALPHA,
    CASES,
    LEARNING_RATE,
    MOMENTUM,
    SMALL_CNN,
    TEMPERATURE,
    Network,
    jax_model,
)
from jaxkd import evaluate, losses, models, parallel, runs, train
from jaxkd.data.progress import track

DENSE = Network("CNN", ((), 64))
"""A network without convolutions."""
STUDENTS = {"dense": DENSE, "cnn": SMALL_CNN}
PAIRS = {case.name: case for case in CASES if case.teacher}


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    students: tuple[int, ...] = (2, 8)
    """How many train at once, each number in its turn."""
    batch_size: int = 128
    """Images a step."""
    rounds: int = 7
    """How many times everything is timed."""
    workdir: str = "runs/saving_benchmark"
    """Where results.json is written; that of an earlier run is replaced."""

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        cli.require(self.batch_size >= 1, f"--batch-size {self.batch_size}: at least one image is needed")
        cli.require(self.rounds >= 1, f"--rounds {self.rounds}: at least one is needed")
        for count in self.students:
            cli.require(count >= 2, f"--students {count}: two at least, as they are compared with one")


def students_call(network: Network, students: int, config: Config) -> Callable[[], Any]:
    """A call in which so many students take the steps that the device takes at once."""
    student, tx = jax_model(network, bf16=False), optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    make_step = functools.partial(train.make_train_step, student, tx, training_benchmark.loss)
    batch = training_benchmark.make_images(config.batch_size)
    mesh = parallel.make_mesh()
    devices = parallel.Population(mesh, students) if students > 1 else parallel.Sharded(mesh)
    init = jax.jit(student.init)
    states = [train.make_state(init(jax.random.key(i), batch["inputs"]), tx) for i in range(students)]
    advance, chosen = devices.make_advance(make_step), np.arange(config.batch_size)
    if isinstance(devices, parallel.Population):
        keys = devices.stack([jax.random.key(i) for i in range(students)])
        state, given = devices.stack(states), devices.gather([batch] * students)
        teachers = devices.gather([()] * students)
        indices = np.broadcast_to(chosen, (devices.chunk, students, len(chosen)))
    else:
        keys, state, teachers = jax.random.key(0), devices.place(states[0]), ()
        given = {name: devices.place_examples(array) for name, array in batch.items()}
        indices = np.broadcast_to(chosen, (devices.chunk, len(chosen)))

    def call() -> Any:
        nonlocal state
        state, values = advance(state, given, indices, teachers, keys)
        return values

    return call


def measure_students(config: Config) -> list[dict]:
    """A row for each network and number of students, with the seconds of a step of all of them in each round."""
    rows = []
    for name, network in track(STUDENTS.items(), description="students at once", total=len(STUDENTS)):
        calls = [students_call(network, count, config) for count in (1, *config.students)]
        rounds = np.array(list(time_rounds(calls, config.rounds))) / parallel.Sharded(parallel.make_mesh()).chunk
        one = rounds[:, 0].tolist()
        for count, seconds in zip(config.students, rounds.T[1:], strict=True):
            rows.append(
                {
                    "network": name,
                    "students": count,
                    "seconds": seconds.tolist(),
                    "one_student_seconds": one,
                    "at_once_by_one": Ratio.of(seconds.tolist(), one),
                    "one_by_one_by_at_once": Ratio.of([count * each for each in one], seconds.tolist()),
                }
            )
    return rows


def cached_loss(student: models.Outputs, _: Any, batch: train.Batch) -> Any:
    """That of a student whose teacher's logits lie in the batch."""
    return losses.distillation_loss(
        student.logits, batch["teacher_logits"], batch["labels"], temperature=TEMPERATURE, alpha=ALPHA
    )


def measure_caches(config: Config) -> list[dict]:
    """A row for each pair, with the seconds of a step with and without the teacher, and of its answer for a batch."""
    rows, options = [], training_benchmark.Config(batch_size=config.batch_size)
    batch = jax.tree.map(jnp.asarray, training_benchmark.make_images(config.batch_size))
    for name, case in track(PAIRS.items(), description="cached teachers", total=len(PAIRS)):
        assert case.teacher is not None
        teacher = jax_model(case.teacher, bf16=False)
        variables = jax.jit(teacher.init)(jax.random.key(1), batch["inputs"])
        predict = evaluate.make_predict(teacher, batch_size=config.batch_size)
        logits = jnp.asarray(predict(variables, batch["inputs"]))
        live, steps = training_benchmark.jax_call(case, options)
        student, given = jax_model(case.student, bf16=False), batch | {"teacher_logits": logits}
        cached, _ = training_benchmark.training_call(student, given, cached_loss)
        calls = (live, cached, lambda p=predict, v=variables: p(v, batch["inputs"]))
        rounds = np.array(list(time_rounds(calls, config.rounds))) / (steps, steps, 1)
        live_seconds, cached_seconds, fill_seconds = rounds.T.tolist()
        rows.append(
            {
                "pair": name,
                "batch": config.batch_size,
                "live_seconds": live_seconds,
                "cached_seconds": cached_seconds,
                "fill_seconds": fill_seconds,
                "live_by_cached": Ratio.of(live_seconds, cached_seconds),
                "bytes_an_image": logits.nbytes // len(logits),
            }
        )
    return rows


def print_tables(students: Sequence[dict], caches: Sequence[dict], *, console: Console | None = None) -> None:
    """Prints both, with medians and quartiles."""
    console = console or Console()
    table = timing.table(
        "A step of students at once, and what it saves over one after another: median (quartiles)", "network"
    )
    for column in ("students", "at once, ms", "÷ one student", "saves, times"):
        table.add_column(column, justify="right")
    for row in students:
        own = f"{1000 * np.median(row['seconds']):.1f}"
        table.add_row(
            row["network"], str(row["students"]), own, str(row["at_once_by_one"]), str(row["one_by_one_by_at_once"])
        )
    console.print(table, end="\n\n")
    table = timing.table(
        "A teacher that answers once, and what its answer to an image takes: median (quartiles)", "pair"
    )
    for column in ("live, ms", "cached, ms", "saves, times", "answer, µs", "bytes"):
        table.add_column(column, justify="right")
    for row in caches:
        live, cached, fill = (1000 * np.median(row[f"{name}_seconds"]) for name in ("live", "cached", "fill"))
        each = f"{1000 * fill / row['batch']:.0f}"
        table.add_row(
            row["pair"], f"{live:.1f}", f"{cached:.1f}", str(row["live_by_cached"]), each, str(row["bytes_an_image"])
        )
    console.print(table, end="\n\n")


def main(config: Config) -> None:
    """Times, compares and reports."""
    folder = timing.begin(config)
    students, caches = measure_students(config), measure_caches(config)
    timing.write_results(folder, config, runs.environment(), {"students": students, "caches": caches})
    print_tables(students, caches)
    print(f"Everything is in {folder}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__, resumes=False)
