"""How many images a second does a training step take, beside the same step in PyTorch?

Networks are trained on labels alone, distilled from a teacher (its forward pass, the student's forward and backward
pass, the optimizer) and run, by jaxkd as a user would and by PyTorch in the memory format channels_last, as it is
(eager) and compiled. Weights are drawn at random and images are noise, which times do not depend on. The runs of what
is compared alternate, so that other work on the machine meets all of them; what is reported are medians, and ratios
within a round of such runs, their median and quartiles. What JAX and torch.compile take before the first step is
stated apart. PyTorch is optional: without it jaxkd stands alone.

Paper: Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531; those of the
networks stand in jaxkd/models.

Command: python -m experiments.training_benchmark

On Linux it was started with MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647, so
that a process keeps the memory that a step returns: the pages of every step are made anew otherwise.

Result: eager PyTorch takes 0.96 times as long as jaxkd to train the CNN, 1.36 to run it and 1.03 to distil it, 0.74 to
train ResNet-20 and 0.83 to run it, 0.73 to distil ResNet-56 into ResNet-20 and 0.81 WRN-40-2 into WRN-16-2 (two x86-64
cores shared with other work, jax 0.12, PyTorch 2.15)

Time: 4 minutes on 2 CPU cores
"""

import dataclasses
import fnmatch
import functools
import importlib.util
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from experiments import cli, timing
from experiments.timing import Ratio, time_rounds
from jaxkd import losses, models, runs, train
from jaxkd.checkpoints import write_atomically
from jaxkd.data.progress import track
from jaxkd.figures import COLOURS, draw

SETTLE_SECONDS = 0.05  # before each sample, for the sake of PyTorch's threads
SCANNED_STEPS = 20  # of a call on an accelerator, which a step alone would not keep busy
LEARNING_RATE, MOMENTUM, TEMPERATURE, ALPHA = 1e-3, 0.9, 4.0, 0.9
OTHERS = ("eager", "compiled")


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    only: str = "*"
    """Time what has such a name alone; such as `train_cnn`, or `*resnet*` for all whose names hold `resnet`."""
    batch_size: int = 128
    """Images a step."""
    rounds: int = 11
    """How many times everything is timed."""
    compile: bool = False
    """Time torch.compile too, which on a CPU takes minutes to compile a large network."""
    bf16: bool = False
    """Compute in bfloat16, with float32 weights and losses, on both sides; for GPUs."""
    workdir: str = "runs/training_benchmark"
    """Where results.json and the figure are written; those of an earlier run are replaced."""

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        cli.require(self.batch_size >= 1, f"--batch-size {self.batch_size}: at least one image is needed")
        cli.require(self.rounds >= 1, f"--rounds {self.rounds}: at least one is needed")
        names = [case.name for case in CASES]
        cli.require(
            any(fnmatch.fnmatch(name, self.only) for name in names),
            f"--only {self.only}: nothing has such a name; there are {', '.join(names)}",
        )


class Case(NamedTuple):
    """What is timed: a network that is trained, with a teacher or without, or run."""

    name: str
    student: tuple[str, Any]
    """Its class in `jaxkd.models` and in `experiments.torch_training`, and what both take."""
    teacher: tuple[str, Any] | None = None
    trains: bool = True


SMALL_CNN, LARGE_CNN = ("CNN", ((32, 64), 64)), ("CNN", ((64, 128), 128))
RESNET_20, RESNET_56 = ("CifarResNet", (3,)), ("CifarResNet", (9,))
WRN_16_2, WRN_40_2 = ("WideResNet", (2, 2)), ("WideResNet", (6, 2))
CASES = (
    Case("train_cnn", SMALL_CNN),
    Case("run_cnn", SMALL_CNN, trains=False),
    Case("distil_cnn", SMALL_CNN, LARGE_CNN),
    Case("train_resnet20", RESNET_20),
    Case("run_resnet20", RESNET_20, trains=False),
    Case("distil_resnet20", RESNET_20, RESNET_56),
    Case("distil_wrn16_2", WRN_16_2, WRN_40_2),
)


def make_batch(batch_size: int) -> dict[str, np.ndarray]:
    """Images `[B, 32, 32, 3]` and labels, the same at each call."""
    draw = np.random.default_rng(0)
    images = draw.standard_normal((batch_size, 32, 32, 3), np.float32)
    return {"inputs": images, "labels": draw.integers(0, 10, batch_size)}


def jax_model(network: tuple[str, Any], *, bf16: bool) -> models.Model:
    """A network as a model."""
    name, arguments = network
    model = models.from_linen(getattr(models, name)(*arguments))
    return models.computing_in(model, jnp.bfloat16) if bf16 else model


def loss(student: models.Outputs, teachers: tuple[models.Outputs, ...], batch: train.Batch) -> jax.Array:
    """That of the labels, or with a teacher the mission's."""
    if not teachers:
        return losses.hard_cross_entropy(student.logits, batch["labels"])
    return losses.distillation_loss(
        student.logits, teachers[0].logits, batch["labels"], temperature=TEMPERATURE, alpha=ALPHA
    )


def jax_call(case: Case, config: Config) -> tuple[Callable[[], Any], int]:
    """A call, and how many steps it takes."""
    batch = jax.tree.map(jnp.asarray, make_batch(config.batch_size))
    networks = [network for network in (case.student, case.teacher) if network]
    student, *teachers = (jax_model(network, bf16=config.bf16) for network in networks)
    variables, *taught = (
        jax.jit(model.init)(jax.random.key(i), batch["inputs"]) for i, model in enumerate((student, *teachers))
    )
    if not case.trains:
        infer = jax.jit(lambda variables, images: student.apply(variables, images, train=False)[0].logits)
        return lambda: infer(variables, batch["inputs"]), 1
    tx = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    step = train.make_train_step(student, tx, loss, teachers=teachers)
    return _training(step, train.make_state(variables, tx), (batch, tuple(taught), jax.random.key(2)))


def _training(step: Callable, state: train.TrainState, others: tuple) -> tuple[Callable[[], Any], int]:
    """Step after step, by a loop on a CPU and by a scan elsewhere, as is faster on each."""
    steps = 1 if jax.default_backend() == "cpu" else SCANNED_STEPS

    @functools.partial(jax.jit, donate_argnums=0)
    def scan(state: train.TrainState, *others: Any) -> tuple[train.TrainState, dict]:
        return jax.lax.scan(lambda state, _: step(state, *others), state, length=steps)

    advance = step if steps == 1 else scan

    def call() -> dict:
        nonlocal state
        state, metrics = advance(state, *others)
        return metrics

    return call, steps


class Torch:
    """PyTorch's side; made only where it is installed."""

    def __init__(self) -> None:
        from experiments import torch_training

        self.side, self.torch = torch_training, torch_training.torch
        self.device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        self.torch.set_num_threads(cores())
        # Its compiler calls functions that it has deprecated itself.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")

    def calls(self, case: Case, config: Config) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Implementation and a call of one step."""
        for name in OTHERS[: 1 + config.compile]:
            self.torch.compiler.reset()
            yield name, self.call(case, config, compiles=name == "compiled")

    def call(self, case: Case, config: Config, *, compiles: bool) -> Callable[[], Any]:
        """A call of one step."""
        batch = make_batch(config.batch_size)
        more: dict[str, Any] = {"compiles": compiles, "bf16": config.bf16}
        student, images = self.side.place(self.network(case.student), batch["inputs"], self.device)
        if not case.trains:
            return self.side.make_inference(student, images, **more)
        teacher = self.network(case.teacher) if case.teacher else None
        if teacher is not None:
            teacher, _ = self.side.place(teacher, batch["inputs"], self.device)
        more |= {"learning_rate": LEARNING_RATE, "momentum": MOMENTUM, "temperature": TEMPERATURE, "alpha": ALPHA}
        return self.side.make_training(student, teacher, images, batch["labels"], **more)

    def network(self, network: tuple[str, Any]) -> Any:
        """One of random weights."""
        name, arguments = network
        return getattr(self.side, name)(*arguments)

    def wait(self, result: Any) -> None:
        """Returns when a result, JAX's or PyTorch's, is there."""
        jax.block_until_ready(result)
        if self.device != "cpu":
            self.torch.cuda.synchronize()


def load_torch() -> tuple[Torch | None, list[str]]:
    """PyTorch, if it can be compared with, and what is to be said about it."""
    if not importlib.util.find_spec("torch"):
        return None, ["PyTorch is not installed, so jaxkd stands alone; `pip install torch` brings the rest."]
    torch = Torch()
    if torch.device != "cpu" and not torch.torch.cuda.is_available():
        return None, [f"PyTorch sees no GPU and JAX runs on {jax.default_backend()}, so jaxkd stands alone."]
    return torch, []


def measure(config: Config, torch: Torch | None) -> list[dict]:
    """Times everything; a row for each case and implementation, with the seconds of a step in each round."""
    cases = [case for case in CASES if fnmatch.fnmatch(case.name, config.only)]
    rows: list[dict] = []
    for case in track(cases, description="timing", total=len(cases)):
        rows += _measure(case, config, torch)
    return rows


def _measure(case: Case, config: Config, torch: Torch | None) -> list[dict]:
    wait, settle = (torch.wait, SETTLE_SECONDS) if torch else (jax.block_until_ready, 0.0)
    call, steps = jax_call(case, config)
    found = [("jaxkd", call, steps)]
    if torch:
        found += [(name, call, 1) for name, call in torch.calls(case, config)]
    first = [_seconds(call, wait) for _, call, _ in found]
    rounds = np.array(list(time_rounds([call for _, call, _ in found], config.rounds, wait=wait, settle=settle)))
    rows = []
    for (name, _, steps), before, seconds in zip(found, first, rounds.T, strict=True):
        row = {"case": case.name, "implementation": name, "batch": config.batch_size, "first_call_seconds": before}
        rows.append(row | {"seconds": (seconds / steps).tolist()})
    return rows


def _seconds(call: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    start = time.perf_counter()
    wait(call())
    return time.perf_counter() - start


def find(rows: Sequence[dict], case: str, implementation: str) -> dict | None:
    """The row of a case in an implementation, if there is one."""
    found = (row for row in rows if (row["case"], row["implementation"]) == (case, implementation))
    return next(found, None)


def ratio(rows: Sequence[dict], case: str, implementation: str) -> Ratio | None:
    """How many times as long as jaxkd another implementation takes, over rounds; None if there is none."""
    ours, other = find(rows, case, "jaxkd"), find(rows, case, implementation)
    return Ratio.of(other["seconds"], ours["seconds"]) if ours and other else None


def speed(row: dict) -> float:
    """Images a second, at the median of the rounds."""
    return row["batch"] / float(np.median(row["seconds"]))


def conclude(rows: Sequence[dict]) -> list[str]:
    """What was measured, a sentence an implementation."""
    sentences = []
    for other in OTHERS:
        found = [(case, ratio(rows, case, other)) for case in dict.fromkeys(row["case"] for row in rows)]
        parts = [f"{case} {one}" for case, one in found if one]
        if parts:
            sentences.append(f"{other.capitalize()} PyTorch takes so many times as long as jaxkd: {', '.join(parts)}.")
    return sentences


def print_table(rows: Sequence[dict], *, console: Console | None = None) -> None:
    """Prints images a second, ratios, and what goes before the first step."""
    others = [name for name in OTHERS if any(row["implementation"] == name for row in rows)]
    heading = "Images a second" + (", and times PyTorch ÷ jaxkd: median (quartiles)" if others else "")
    table = timing.table(heading, "case")
    for column in ("jaxkd", *others, *(f"{other} ÷ jaxkd" for other in others), "first call, s"):
        table.add_column(column, justify="right")
    for case in dict.fromkeys(row["case"] for row in rows):
        found = [row for name in ("jaxkd", *others) if (row := find(rows, case, name))]
        first = ", ".join(f"{row['first_call_seconds']:.1f}" for row in found)
        ratios = [str(ratio(rows, case, other)) for other in others]
        table.add_row(case, *(f"{speed(row):,.0f}" for row in found), *ratios, first)
    (console or Console()).print(table, end="\n\n")


def plot(rows: Sequence[dict], path: Path, *, title: str) -> None:
    """Draws how many times as long PyTorch takes, a line a case."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    with draw(path, 7, 1.6 + 0.35 * len(cases)) as figure:
        axes = figure.subplots()
        for other, colour, shift in zip(OTHERS, COLOURS, (-0.12, 0.12), strict=False):
            found = [(i + shift, one) for i, case in enumerate(cases) if (one := ratio(rows, case, other))]
            if found:
                places, ratios = zip(*found, strict=True)
                middle = np.array([one.median for one in ratios])
                spread = [middle - [one.low for one in ratios], [one.high for one in ratios] - middle]
                axes.errorbar(middle, places, xerr=spread, fmt="o", color=colour, ms=5, lw=1, label=other)
        axes.axvline(1, color="black", lw=0.8)
        axes.set_yticks(range(len(cases)), cases)
        axes.set(ylim=(len(cases) - 0.5, -0.5), xscale="log", xlabel="time of PyTorch ÷ time of jaxkd")
        timing.log_ticks(axes.xaxis)
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside lower center", ncols=2)
        figure.suptitle(title, fontsize=8, color="#555555")


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(config: Config) -> None:
    """Times, compares and reports."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU PyTorch needs some memory as well
    config.check()
    folder = Path(config.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    torch, notes = load_torch()
    rows = measure(config, torch)
    sentences, environment = conclude(rows), runs.environment()
    environment |= {"torch": torch.torch.__version__ if torch else None, "threads": cores()}
    results = {"config": dataclasses.asdict(config), "environment": environment, "summary": sentences, "notes": notes}
    write_atomically(folder / "results.json", (json.dumps(results | {"rows": rows}, indent=1) + "\n").encode())
    setting = (
        f"{environment['platform']} ({environment['device']}), {environment['threads']} threads, "
        f"JAX {environment['jax']}, PyTorch {environment['torch'] or 'not installed'}, {config.rounds} rounds"
    )
    print_table(rows)
    if torch:
        plot(rows, folder / "training_benchmark.png", title=setting)
    print(setting, *notes, *sentences, f"Everything is in {folder}", sep="\n")


if __name__ == "__main__":
    cli.run(main, Config, __doc__, resumes=False)
