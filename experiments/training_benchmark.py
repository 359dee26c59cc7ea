"""How many images or texts a second does a training step take, beside the same step in PyTorch?

Networks are trained on labels alone, distilled from a teacher (its forward pass, the student's forward and backward
pass, the optimizer) and run, by jaxkd as a user would and by PyTorch as it is (eager) and compiled. Weights are drawn
at random, images are noise, and texts are 8 to 32 random tokens padded to 32: times do not depend on what they say. Of
PyTorch's usual ways the fastest is taken: the memory format channels_last for images; LSTMs that read the padding too,
the state at each text's end being looked up, which takes less than half the time of packed texts.

The runs of what is compared alternate, so that other work on the machine meets all of them; what is reported are
medians, and ratios within a round of such runs, their median and quartiles. What JAX and torch.compile take before the
first step is stated apart. PyTorch is optional: without it jaxkd stands alone.

Paper: Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531; those of the
networks stand in jaxkd/models.

Command: python -m experiments.training_benchmark

On Linux it was started with MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647, so
that a process keeps the memory that a step returns: the pages of every step are made anew otherwise.

Result: eager PyTorch takes 1.16 times as long as jaxkd to train the LSTM and 1.03 to train BERT, 0.95 and 0.78 to run
them; 0.77 to train the CNN, 0.62 to run it and 0.82 to distil it, 0.47 to train ResNet-20 and 0.77 to run it, 0.55 to
distil ResNet-56 into ResNet-20 and 0.66 WRN-40-2 into WRN-16-2 (two x86-64 cores, jax 0.10.2, PyTorch 2.13)

Time: 3 minutes on 2 CPU cores
"""

import dataclasses
import fnmatch
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from experiments import beside_torch, cli, timing
from experiments.timing import Ratio
from jaxkd import losses, models, train
from jaxkd.data.progress import track
from jaxkd.figures import COLOURS, draw

SCANNED_STEPS = 20  # of a call on an accelerator, which a step alone would not keep busy
LEARNING_RATE, MOMENTUM, TEMPERATURE, ALPHA = 1e-3, 0.9, 4.0, 0.9
OTHERS = ("eager", "compiled")
VOCABULARY, SHORTEST, LONGEST = 30522, 8, 32  # of texts, in tokens


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    only: str = "*"
    """Time what has such a name alone; such as `train_cnn`, or `*resnet*` for all whose names hold `resnet`."""
    batch_size: int = 128
    """Images a step."""
    text_batch_size: int = 32
    """Texts a step."""
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
        cli.require(self.text_batch_size >= 1, f"--text-batch-size {self.text_batch_size}: at least one text is needed")
        cli.require(self.rounds >= 1, f"--rounds {self.rounds}: at least one is needed")
        names = [case.name for case in CASES]
        cli.require(
            any(fnmatch.fnmatch(name, self.only) for name in names),
            f"--only {self.only}: nothing has such a name; there are {', '.join(names)}",
        )


class Network(NamedTuple):
    """A network on both sides."""

    name: str
    """Of its class, in `jaxkd.models` and in `experiments.torch_training`."""
    arguments: tuple
    """What both classes take."""
    ours: dict[str, Any] = {}
    """What that of `jaxkd.models` takes beside, where the other one knows no choice."""


class Case(NamedTuple):
    """What is timed: a network that is trained, with a teacher or without, or run."""

    name: str
    student: Network
    teacher: Network | None = None
    trains: bool = True
    reads: bool = False
    """Whether texts take the place of images."""


SMALL_CNN, LARGE_CNN = Network("CNN", ((32, 64), 64)), Network("CNN", ((64, 128), 128))
RESNET_20, RESNET_56 = Network("CifarResNet", (3,)), Network("CifarResNet", (9,))
WRN_16_2, WRN_40_2 = Network("WideResNet", (2, 2)), Network("WideResNet", (6, 2))
LSTM = Network("LSTMClassifier", (VOCABULARY, 64, (64, 32), 64))
MINILM = Network("BERT", (VOCABULARY, 384, 6, 12, 1536), {"pooling": models.mean_pooling})
CASES = (
    Case("train_cnn", SMALL_CNN),
    Case("run_cnn", SMALL_CNN, trains=False),
    Case("distil_cnn", SMALL_CNN, LARGE_CNN),
    Case("train_resnet20", RESNET_20),
    Case("run_resnet20", RESNET_20, trains=False),
    Case("distil_resnet20", RESNET_20, RESNET_56),
    Case("distil_wrn16_2", WRN_16_2, WRN_40_2),
    Case("train_lstm", LSTM, reads=True),
    Case("run_lstm", LSTM, trains=False, reads=True),
    Case("train_bert", MINILM, reads=True),
    Case("run_bert", MINILM, trains=False, reads=True),
)


def make_images(batch_size: int) -> dict[str, np.ndarray]:
    """Images `[B, 32, 32, 3]` and labels, the same at each call."""
    draw = np.random.default_rng(0)
    images = draw.standard_normal((batch_size, 32, 32, 3), np.float32)
    return {"inputs": images, "labels": draw.integers(0, 10, batch_size)}


def make_texts(batch_size: int) -> dict[str, np.ndarray]:
    """Tokens `[B, 32]`, padded with 0 on the right, and labels, the same at each call."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(SHORTEST, LONGEST, (batch_size, 1), endpoint=True)
    tokens = draw.integers(1, VOCABULARY, (batch_size, LONGEST), np.int32)
    return {"inputs": tokens * (np.arange(LONGEST) < lengths), "labels": draw.integers(0, 2, batch_size)}


def make_batch(case: Case, config: Config) -> dict[str, np.ndarray]:
    """What a case learns from or is run on."""
    return make_texts(config.text_batch_size) if case.reads else make_images(config.batch_size)


def jax_model(network: Network, *, bf16: bool) -> models.Model:
    """A network as a model."""
    model = models.from_linen(getattr(models, network.name)(*network.arguments, **network.ours))
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
    batch = jax.tree.map(jnp.asarray, make_batch(case, config))
    student = jax_model(case.student, bf16=config.bf16)
    if not case.trains:
        variables = jax.jit(student.init)(jax.random.key(0), batch["inputs"])
        infer = jax.jit(lambda variables, inputs: student.apply(variables, inputs, train=False)[0].logits)
        return lambda: infer(variables, batch["inputs"]), 1
    teachers = [jax_model(case.teacher, bf16=config.bf16)] if case.teacher else []
    return training_call(student, batch, loss, teachers)


def training_call(
    student: models.Model, batch: train.Batch, loss: train.Loss, teachers: Sequence[models.Model] = ()
) -> tuple[Callable[[], Any], int]:
    """A call that trains, and how many steps it takes: one on a CPU, a scan elsewhere, as is faster on each."""
    variables, *taught = (
        jax.jit(model.init)(jax.random.key(i), batch["inputs"]) for i, model in enumerate((student, *teachers))
    )
    tx = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    step, state = train.make_train_step(student, tx, loss, teachers=teachers), train.make_state(variables, tx)
    others = batch, tuple(taught), jax.random.key(2)
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


class Torch(beside_torch.Torch):
    """The networks in PyTorch."""

    def __init__(self) -> None:
        from experiments import torch_training

        super().__init__(torch_training)

    def calls(self, case: Case, config: Config) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Implementation and a call of one step."""
        for name in OTHERS[: 1 + config.compile]:
            self.torch.compiler.reset()
            yield name, self.call(case, config, compiles=name == "compiled")

    def call(self, case: Case, config: Config, *, compiles: bool) -> Callable[[], Any]:
        """A call of one step."""
        batch = make_batch(case, config)
        more: dict[str, Any] = {"compiles": compiles, "bf16": config.bf16}
        student, inputs = self.side.place(self.network(case.student), batch["inputs"], self.device)
        if not case.trains:
            return self.side.make_inference(student, inputs, **more)
        teacher = self.network(case.teacher) if case.teacher else None
        if teacher is not None:
            teacher, _ = self.side.place(teacher, batch["inputs"], self.device)
        more |= {"learning_rate": LEARNING_RATE, "momentum": MOMENTUM, "temperature": TEMPERATURE, "alpha": ALPHA}
        return self.side.make_training(student, teacher, inputs, batch["labels"], **more)

    def network(self, network: Network) -> Any:
        """One of random weights."""
        return getattr(self.side, network.name)(*network.arguments)


def measure(config: Config, torch: Torch | None) -> list[dict]:
    """Times everything; a row for each case and implementation, with the seconds of a step in each round."""
    cases = [case for case in CASES if fnmatch.fnmatch(case.name, config.only)]
    rows: list[dict] = []
    for case in track(cases, description="timing", total=len(cases)):
        rows += _measure(case, config, torch)
    return rows


def _measure(case: Case, config: Config, torch: Torch | None) -> list[dict]:
    call, steps = jax_call(case, config)
    found = [("jaxkd", call, steps)]
    if torch:
        found += [(name, call, 1) for name, call in torch.calls(case, config)]
    wait = torch.wait if torch else jax.block_until_ready
    first = [_seconds(call, wait) for _, call, _ in found]
    rounds = np.array(list(beside_torch.time_rounds([call for _, call, _ in found], config.rounds, torch)))
    rows, batch_size = [], len(make_batch(case, config)["labels"])
    for (name, _, steps), before, seconds in zip(found, first, rounds.T, strict=True):
        row = {"case": case.name, "implementation": name, "batch": batch_size, "first_call_seconds": before}
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
    """Images or texts a second, at the median of the rounds."""
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
    """Prints images or texts a second, ratios, and what goes before the first step."""
    others = [name for name in OTHERS if any(row["implementation"] == name for row in rows)]
    heading = "Images or texts a second" + (", and times PyTorch ÷ jaxkd: median (quartiles)" if others else "")
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


def main(config: Config) -> None:
    """Times, compares and reports."""
    folder = beside_torch.begin(config)
    torch, notes = beside_torch.load_torch(Torch)
    rows = measure(config, torch)
    sentences = conclude(rows)
    found = {"summary": sentences, "notes": notes, "rows": rows}
    setting = beside_torch.write_results(folder, config, torch, found, rounds=config.rounds)
    print_table(rows)
    if torch:
        plot(rows, folder / "training_benchmark.png", title=setting)
    print(setting, *notes, *sentences, f"Everything is in {folder}", sep="\n")


if __name__ == "__main__":
    cli.run(main, Config, __doc__, resumes=False)
