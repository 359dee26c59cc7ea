"""Students that train at once: 8, 32 and 128 CNNs beside one, and a sweep as one program."""

import contextlib
import dataclasses
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments.benchmarks import timing, training_cases
from experiments.benchmarks.accelerator import cifar, results
from experiments.benchmarks.accelerator.measurement import Context, Outcome
from experiments.benchmarks.timing import Ratio
from experiments.benchmarks.training_cases import Network
from experiments.benchmarks.vectorized_students import make_placement, students_call
from jaxkd import distill, losses, models, runs
from jaxkd.models import Outputs

RESNET = "resnet20"
"""The network of the rows of methods, which are vectorised only where that is faster."""


class Options(NamedTuple):
    """Options of the measurement.

    Attributes:
        cnn: Channels and hidden units of the CNN.
        resnet: Arguments of the ResNet.
        counts: Numbers of CNNs that train at once.
        resnet_count: Number of ResNets that train at once.
        batch_size: Images per step.
        rounds: Rounds; each times everything once.
        temperatures: Temperatures of the sweep.
        alphas: Weights of its soft term.
        seeds: Number of its seeds.
        steps: Steps of each of its trainings.
    """

    cnn: tuple = training_cases.SMALL_CNN.arguments
    resnet: tuple = training_cases.RESNET_20.arguments
    counts: tuple[int, ...] = (8, 32, 128)
    resnet_count: int = 3
    batch_size: int = 128
    rounds: int = 7
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    alphas: tuple[float, ...] = (0.5, 0.9)
    seeds: int = 4
    steps: int = 1600


TINY = Options(
    cnn=((2,), 4),
    resnet=cifar.TINY_RESNET,
    counts=(2,),
    resnet_count=2,
    batch_size=4,
    rounds=2,
    temperatures=(1.0, 4.0),
    alphas=(0.5,),
    seeds=1,
    steps=4,
)


def measure(options: Options, context: Context) -> Outcome:
    """Times students at once beside one, and a sweep beside its single training."""
    networks = {
        "cnn": (Network("CNN", options.cnn), options.counts),
        RESNET: (Network("CifarResNet", options.resnet), (options.resnet_count,)),
    }
    rows = []
    for name, (network, counts) in networks.items():
        for count in counts:
            row = context.once(
                f"{name}_{count}",
                lambda network=network, count=count: measure_count(network, count, options),
            )
            rows.append({"network": name, **row})
            print(f"  {count} {name}: {Ratio(*row['ratio'])} × one", flush=True)
    sweep = context.once("sweep", lambda: measure_sweep(options))
    parts = [f"{row['students']} {row['network']} {row['ratio'][1]:.2f} × one" for row in rows]
    parts.append(f"sweep of {sweep['trainings']} {sweep['ratio']:.2f} × one training")
    return Outcome(", ".join(parts), options.rounds, {"rows": rows, "sweep": sweep})


def measure_count(network: Network, count: int, options: Options) -> dict[str, Any]:
    """Times a step of some students beside one, in alternating rounds."""
    calls = [students_call(network, students, options.batch_size) for students in (1, count)]
    rounds = np.array(list(timing.time_rounds(calls, options.rounds)))
    one, together = (rounds / make_placement(1).steps_per_call).T.tolist()
    return {
        "students": count,
        "seconds": together,
        "one_student_seconds": one,
        "ratio": Ratio.of(together, one),
    }


def soft_target_loss(
    student: Outputs,
    teachers: tuple[Outputs, ...],
    batch: distill.Batch,
    context: distill.LossContext,
) -> jax.Array:
    """Computes the distillation loss with the temperature and the alpha of the batch."""
    return losses.distillation_loss(
        student.logits,
        teachers[0].logits,
        batch["labels"],
        temperature=batch["temperature"],
        alpha=batch["alpha"],
    )


def measure_sweep(options: Options) -> dict[str, Any]:
    """Times a plan of temperatures, alphas and seeds that train at once, and one training of it.

    Each plan runs twice and the second time counts, because the first compiles.
    """
    plan = make_sweep(options)
    count = options.seeds * (len(plan) - 1)
    placement = distill.VectorizedPlacement(distill.make_mesh(), count)
    whole = [_time_plan(plan, range(options.seeds), placement) for _ in range(2)]
    single = [_time_plan(plan[:2], [0], distill.single_device()) for _ in range(2)]
    return {
        "trainings": count,
        "programs": len(distill.group_by_program(plan)),
        "seconds": whole[-1],
        "first_seconds": whole[0],
        "one_training_seconds": single[-1],
        "ratio": whole[-1] / single[-1],
    }


def make_sweep(options: Options) -> tuple[distill.Stage | distill.Pretrained, ...]:
    """Makes a teacher of random weights and a student for each temperature and alpha."""
    examples = training_cases.make_images(8 * options.batch_size)
    model = models.from_linen(models.CNN(*options.cnn))
    variables = jax.jit(model.init)(jax.random.key(9), examples["inputs"])
    student = distill.Stage(
        "student",
        model,
        examples,
        soft_target_loss,
        optax.sgd(0.01, momentum=0.9),
        steps=options.steps,
        teachers=("teacher",),
        batch_size=options.batch_size,
    )
    students = (
        dataclasses.replace(
            student,
            name=f"T{temperature:g}_alpha{alpha:g}",
            # Data of the stage, not constants of its loss, so that one program serves all.
            data=examples | {"temperature": np.float32(temperature), "alpha": np.float32(alpha)},
        )
        for temperature, alpha in itertools.product(options.temperatures, options.alphas)
    )
    return (distill.Pretrained("teacher", model, variables), *students)


def _time_plan(plan: Any, seeds: Any, placement: distill.Placement) -> float:
    validation = {name: array[:64] for name, array in plan[1].data.items() if np.ndim(array)}
    with tempfile.TemporaryDirectory() as folder:
        run = runs.open_run(Path(folder) / "run", {})
        start = time.perf_counter()
        # The log takes the lines of the plan.
        with contextlib.redirect_stdout(sys.stderr):
            distill.run_plan(
                plan,
                seeds,
                run,
                validation=validation,
                placement=placement,
                evaluations=1,
                save_every=1e9,
            )
        return time.perf_counter() - start


def is_vectorizing_faster(folder: Path) -> bool:
    """Returns whether ResNets trained at once took less than one after another on this device."""
    content = results.read(folder / "students.json")
    rows = content["results"]["rows"] if content else []
    return any(row["network"] == RESNET and row["ratio"][1] < row["students"] for row in rows)
