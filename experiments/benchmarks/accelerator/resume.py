"""A training that is killed and goes on, and the bits of two runs with and without flags.

A plan of two CNNs is killed by SIGKILL once its second stage has a checkpoint, started again, and
compared with an undisturbed run by `jaxkd.runs.verify`. Both run under `runs.DETERMINISM_FLAGS`.
Two undisturbed runs without these flags are compared as well.
"""

import contextlib
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import optax

from experiments import USER_XLA_FLAGS
from experiments.benchmarks import training_cases
from experiments.benchmarks.accelerator import process
from experiments.benchmarks.accelerator.measurement import Context, Outcome
from jaxkd import distill, models, runs
from jaxkd.runs import verify


class Options(NamedTuple):
    """Options of the measurement.

    Attributes:
        cnn: Channels and hidden units of both networks.
        steps: Steps of each stage.
        batch_size: Images per step.
        images: Number of images.
        repeats_without_flags: Whether two runs without the flags are compared as well. CPUs
            need no flags.
    """

    cnn: tuple = training_cases.SMALL_CNN.arguments
    steps: int = 640
    batch_size: int = 128
    images: int = 2048
    repeats_without_flags: bool = True


TINY = Options(((2,), 4), 4, 4, 16, False)


def measure(options: Options, context: Context) -> Outcome:
    """Kills a training, and compares the runs. This process has the flags."""
    undisturbed, killed = context.scratch / "undisturbed", context.scratch / "killed"
    was_killed = context.once("killed", lambda: kill_in_second_stage(options, context, killed))
    train(options, killed)
    train(options, undisturbed)
    differences = {"killed": compare(undisturbed, killed)}
    if differences["killed"]:
        # Tells a fault of the restart from one of the flags.
        differences["repeated"] = compare(undisturbed, _train_apart(options, context, "repeated"))
    if options.repeats_without_flags:
        # `runs.enable_determinism` has set the flags for this process and those that it starts.
        first, second = (
            _train_apart(options, context, name, XLA_FLAGS=USER_XLA_FLAGS)
            for name in ("without_flags", "again_without_flags")
        )
        differences["without_flags"] = compare(first, second)
    summary = ", ".join(
        f"{name}: {'same bits' if not lines else lines[0]}" for name, lines in differences.items()
    )
    return Outcome(summary, 1, {"was_killed": was_killed, "differences": differences})


def _train_apart(options: Options, context: Context, name: str, **environment: str) -> Path:
    folder = context.scratch / name
    context.call_apart(train, options, folder, **environment)
    return folder


def train(options: Options, folder: Path) -> None:
    """Trains the plan, with a checkpoint after each call of steps."""
    examples = training_cases.make_images(options.images)
    model = models.from_linen(models.CNN(*options.cnn))

    def stage(name: str, **attributes: Any) -> distill.Stage:
        return distill.Stage(
            name,
            model,
            examples,
            training_cases.label_or_distillation_loss,
            optax.sgd(0.01, momentum=0.9),
            steps=options.steps,
            batch_size=options.batch_size,
            **attributes,
        )

    plan = (stage("teacher"), stage("student", teachers=("teacher",)))
    run = runs.open_run(folder, options._asdict())
    # The log takes the lines of the plan.
    with contextlib.redirect_stdout(sys.stderr):
        trained = distill.run_plan(
            plan, [0], run, validation=examples, save_every=0.0, evaluations=2
        )
    run.write_results(
        [
            runs.ResultRow(name, accuracy=(models[0].validation_accuracy,))
            for name, models in trained.items()
        ]
    )


def kill_in_second_stage(options: Options, context: Context, folder: Path) -> bool:
    """Kills a training with its first checkpoint of the second stage, and returns True.

    The kill hits the process at its next step or in the middle of a save.

    Raises:
        RuntimeError: If the training ended before it could be killed.
    """
    worker = process.start(train, options, folder, log=context.log)
    pattern = "checkpoints/seed0/student/*.json"
    while worker.poll() is None and not any(folder.glob(pattern)):
        time.sleep(0.005)
    was_running = worker.poll() is None
    process.kill_group(worker)
    if not was_running or (folder / "results.json").exists():
        # So that the next call starts from the beginning.
        shutil.rmtree(folder, ignore_errors=True)
        raise RuntimeError("the training ended before it could be killed: see the log")
    return True


def compare(first: Path, second: Path) -> list[str]:
    """Returns a line for each difference of two runs."""
    return verify.compare_runs(first, second).differences
