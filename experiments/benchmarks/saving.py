"""Measures the time that vectorised students and cached teachers save.

Students of one architecture each take a step, one after another or as one program vectorised over
them, through the code that a plan runs. And a student takes a step while its teacher runs along, or
with the teacher's logits computed before. The calls alternate, so that other work on the machine
affects all of them; the report gives medians, and ratios within a round as median and quartiles.

Command: python -m experiments.benchmarks.saving
On an accelerator: python -m experiments.benchmarks.saving --students 2 8 32

Result: 8 vectorised students of a dense network take 0.8 of the time that they take one after
another, 8 CNNs 1.9 of it; without the teacher's forward pass a step of the CNN is 1.25 times as
fast, of ResNet-20 distilled from ResNet-56 and of WRN-16-2 from WRN-40-2 1.6 times (two x86-64
cores, jax 0.12)

Time: 2 minutes on 2 CPU cores
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import timing, training_cases
from experiments.benchmarks.timing import Ratio, time_rounds
from experiments.benchmarks.training_cases import (
    ALPHA,
    CASES,
    SMALL_CNN,
    TEMPERATURE,
    Network,
    jax_model,
)
from experiments.benchmarks.vectorized_students import make_placement, students_call
from experiments.common import cli
from jaxkd import distill, evaluate, losses, models, runs
from jaxkd.data.progress import track

# Without convolutions, which XLA computes slowly for many networks at once on a CPU.
DENSE = Network("CNN", ((), 64))
STUDENTS = {"dense": DENSE, "cnn": SMALL_CNN}
PAIRS = {case.name: case for case in CASES if case.teacher}


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    students: tuple[int, ...] = (2, 8)
    """Numbers of students to vectorise; each number is timed."""
    batch_size: int = 128
    """Images per step."""
    rounds: int = 7
    """Rounds; each times everything once."""
    workdir: str = "runs/saving_benchmark"
    """Folder of results.json; that of an earlier run is replaced."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        cli.require(self.batch_size >= 1, f"--batch-size {self.batch_size}: must be at least 1")
        cli.require(self.rounds >= 1, f"--rounds {self.rounds}: must be at least 1")
        for count in self.students:
            cli.require(
                count >= 2, f"--students {count}: must be at least 2, to compare with one student"
            )


def measure_students(config: Config) -> list[dict]:
    """Times vectorised students against a single one.

    Args:
        config: Options.

    Returns:
        A row for each network and number of students, with the seconds per step of all of them in
        each round.
    """
    steps_per_call = make_placement(1).steps_per_call
    rows = []
    for name, network in track(
        STUDENTS.items(), description="vectorised students", total=len(STUDENTS)
    ):
        calls = [
            students_call(network, count, config.batch_size) for count in (1, *config.students)
        ]
        rounds = np.array(list(time_rounds(calls, config.rounds))) / steps_per_call
        one_student, *vectorized = rounds.T.tolist()
        for count, seconds in zip(config.students, vectorized, strict=True):
            # All students have the same architecture, so one after another take a multiple of one.
            one_after_another = [count * student_seconds for student_seconds in one_student]
            rows.append(
                {
                    "network": name,
                    "students": count,
                    "seconds": seconds,
                    "one_student_seconds": one_student,
                    "relative_to_one_student": Ratio.of(seconds, one_student),
                    "speedup": Ratio.of(one_after_another, seconds),
                }
            )
    return rows


def cached_loss(
    student: models.Outputs,
    teachers: tuple[models.Outputs, ...],
    batch: distill.Batch,
    context: distill.LossContext,
) -> jax.Array:
    """Computes the distillation loss from the teacher's logits in the batch."""
    return losses.distillation_loss(
        student.logits,
        batch["teacher_logits"],
        batch["labels"],
        temperature=TEMPERATURE,
        alpha=ALPHA,
    )


def measure_caches(config: Config) -> list[dict]:
    """Times steps with a teacher that runs along against steps with cached logits.

    Args:
        config: Options.

    Returns:
        A row for each pair of student and teacher, with the seconds per step with and without the
        teacher, and the seconds in which the teacher computes the logits of a batch.
    """
    rows = []
    options = training_cases.Settings(batch_size=config.batch_size)
    batch = jax.tree.map(jnp.asarray, training_cases.make_images(config.batch_size))
    for name, case in track(PAIRS.items(), description="cached teachers", total=len(PAIRS)):
        # For the type checker: PAIRS holds only cases with a teacher.
        assert case.teacher is not None
        teacher = jax_model(case.teacher, bf16=False)
        variables = jax.jit(teacher.init)(jax.random.key(1), batch["inputs"])
        predict = evaluate.make_predict(teacher, batch_size=config.batch_size)
        fill = functools.partial(predict, variables, batch["inputs"])
        logits = jnp.asarray(fill())
        live, steps = training_cases.jax_call(case, options)
        student = jax_model(case.student, bf16=False)
        training = training_cases.make_step(
            student, batch | {"teacher_logits": logits}, cached_loss
        )
        cached, _ = training_cases.training_call(*training)
        rounds = np.array(list(time_rounds((live, cached, fill), config.rounds)))
        # A call of `fill` predicts one batch, a call of the others takes `steps` steps.
        live_seconds, cached_seconds, fill_seconds = (rounds / (steps, steps, 1)).T.tolist()
        rows.append(
            {
                "pair": name,
                "batch": config.batch_size,
                "live_seconds": live_seconds,
                "cached_seconds": cached_seconds,
                "fill_seconds": fill_seconds,
                "speedup": Ratio.of(live_seconds, cached_seconds),
                "bytes_per_image": logits.nbytes // len(logits),
            }
        )
    return rows


def print_tables(
    students: Sequence[dict], caches: Sequence[dict], *, console: Console | None = None
) -> None:
    """Prints a table of vectorised students and one of cached teachers."""
    console = console or Console()
    console.print(_students_table(students), end="\n\n")
    console.print(_caches_table(caches), end="\n\n")


def _students_table(rows: Sequence[dict]) -> Table:
    table = timing.make_table(
        "A step of vectorised students, and its speedup over one after another: median (quartiles)",
        "network",
    )
    for column in ("students", "vectorised, ms", "÷ one student", "speedup"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["network"],
            str(row["students"]),
            f"{1000 * np.median(row['seconds']):.1f}",
            str(row["relative_to_one_student"]),
            str(row["speedup"]),
        )
    return table


def _caches_table(rows: Sequence[dict]) -> Table:
    table = timing.make_table(
        "Steps with a cached teacher, and the cost of filling the cache: median (quartiles)",
        "pair",
    )
    for column in ("live, ms", "cached, ms", "speedup", "fill, µs per image", "bytes per image"):
        table.add_column(column, justify="right")
    for row in rows:
        live, cached, fill = (
            float(np.median(row[f"{name}_seconds"])) for name in ("live", "cached", "fill")
        )
        table.add_row(
            row["pair"],
            f"{1e3 * live:.1f}",
            f"{1e3 * cached:.1f}",
            str(row["speedup"]),
            f"{1e6 * fill / row['batch']:.0f}",
            str(row["bytes_per_image"]),
        )
    return table


def main(config: Config) -> None:
    """Times both, writes the results and prints the tables."""
    folder = timing.prepare_folder(config)
    students = measure_students(config)
    caches = measure_caches(config)
    results = {"students": students, "caches": caches}
    timing.write_results(folder, config, runs.describe_environment(), results)
    print_tables(students, caches)
    print(f"Everything is in {folder}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__, resumes=False)
