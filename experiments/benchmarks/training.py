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

Result: eager PyTorch takes 1.16 times as long as jaxkd to train the LSTM and 1.03 to train BERT,
0.95 and 0.78 to run them; 0.77 to train the CNN, 0.62 to run it and 0.82 to distil it, 0.47 to
train ResNet-20 and 0.77 to run it, 0.55 to distil ResNet-56 into ResNet-20 and 0.66 WRN-40-2 into
WRN-16-2 (two x86-64 cores, jax 0.10.2, PyTorch 2.13)

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

from experiments.benchmarks import beside_torch, timing
from experiments.benchmarks.timing import Ratio
from experiments.common import cli
from jaxkd import distill, losses, models
from jaxkd.data.progress import track
from jaxkd.runs.figures import COLOURS, new_figure

# Steps per call on an accelerator, which would wait for Python between single steps.
SCANNED_STEPS = 20
LEARNING_RATE = 1e-3
MOMENTUM = 0.9
TEMPERATURE = 4.0
ALPHA = 0.9
TORCH_VERSIONS = ("eager", "compiled")
VOCABULARY = 30522
# Lengths of the texts, in tokens.
SHORTEST, LONGEST = 8, 32


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    only: str = "*"
    """Time only the cases that match this pattern, such as `train_cnn` or `*resnet*`."""
    batch_size: int = 128
    """Images per step."""
    text_batch_size: int = 32
    """Texts per step."""
    rounds: int = 11
    """Rounds; each times everything once."""
    compile: bool = False
    """Also time torch.compile, which on a CPU takes minutes to compile a large network."""
    bf16: bool = False
    """Compute in bfloat16 on both sides, with float32 weights and losses; for GPUs."""
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


class Network(NamedTuple):
    """A network that both `jaxkd.models` and `experiments.benchmarks.torch_training` have."""

    name: str
    """Name of the class in both modules."""
    arguments: tuple
    """Positional arguments of both classes."""
    jax_keywords: dict[str, Any] = {}
    """Keyword arguments of the class in `jaxkd.models` alone."""


class Case(NamedTuple):
    """A network to train, with or without a teacher, or to run."""

    name: str
    student: Network
    teacher: Network | None = None
    trains: bool = True
    on_texts: bool = False
    """True if the inputs are texts, not images."""


SMALL_CNN = Network("CNN", ((32, 64), 64))
LARGE_CNN = Network("CNN", ((64, 128), 128))
RESNET_20 = Network("CifarResNet", (3,))
RESNET_56 = Network("CifarResNet", (9,))
WRN_16_2 = Network("WideResNet", (2, 2))
WRN_40_2 = Network("WideResNet", (6, 2))
LSTM = Network("LSTMClassifier", (VOCABULARY, 64, (64, 32), 64))
# The size of MiniLM with 6 layers: 22.6 million parameters.
MINILM = Network("BERT", (VOCABULARY, 384, 6, 12, 1536), {"pooling": models.mean_pooling})
CASES = (
    Case("train_cnn", SMALL_CNN),
    Case("run_cnn", SMALL_CNN, trains=False),
    Case("distil_cnn", SMALL_CNN, LARGE_CNN),
    Case("train_resnet20", RESNET_20),
    Case("run_resnet20", RESNET_20, trains=False),
    Case("distil_resnet20", RESNET_20, RESNET_56),
    Case("distil_wrn16_2", WRN_16_2, WRN_40_2),
    Case("train_lstm", LSTM, on_texts=True),
    Case("run_lstm", LSTM, trains=False, on_texts=True),
    Case("train_bert", MINILM, on_texts=True),
    Case("run_bert", MINILM, trains=False, on_texts=True),
)


def make_images(batch_size: int) -> dict[str, np.ndarray]:
    """Draws images `[B, 32, 32, 3]` and labels, the same at each call."""
    generator = np.random.default_rng(0)
    images = generator.standard_normal((batch_size, 32, 32, 3), np.float32)
    return {"inputs": images, "labels": generator.integers(0, 10, batch_size)}


def make_texts(batch_size: int) -> dict[str, np.ndarray]:
    """Draws tokens `[B, 32]`, padded with 0 on the right, and labels, the same at each call."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(SHORTEST, LONGEST, (batch_size, 1), endpoint=True)
    # From 1, because 0 is the padding.
    tokens = generator.integers(1, VOCABULARY, (batch_size, LONGEST), np.int32)
    return {
        "inputs": tokens * (np.arange(LONGEST) < lengths),
        "labels": generator.integers(0, 2, batch_size),
    }


def make_batch(case: Case, config: Config) -> dict[str, np.ndarray]:
    """Draws the inputs and labels of a case."""
    return make_texts(config.text_batch_size) if case.on_texts else make_images(config.batch_size)


def jax_model(network: Network, *, bf16: bool) -> models.Model:
    """Makes the model of a network."""
    module = getattr(models, network.name)(*network.arguments, **network.jax_keywords)
    model = models.from_linen(module)
    return models.with_compute_dtype(model, jnp.bfloat16) if bf16 else model


def label_or_distillation_loss(
    student: models.Outputs,
    teachers: tuple[models.Outputs, ...],
    batch: distill.Batch,
    context: distill.LossContext | None,
) -> jax.Array:
    """Computes the cross-entropy with the labels, or with a teacher the distillation loss."""
    if not teachers:
        return losses.hard_cross_entropy(student.logits, batch["labels"])
    return losses.distillation_loss(
        student.logits, teachers[0].logits, batch["labels"], temperature=TEMPERATURE, alpha=ALPHA
    )


def jax_call(case: Case, config: Config) -> tuple[Callable[[], Any], int]:
    """Makes a function that trains or runs the student, and returns it with its steps per call."""
    batch = jax.tree.map(jnp.asarray, make_batch(case, config))
    student = jax_model(case.student, bf16=config.bf16)
    if not case.trains:
        variables = jax.jit(student.init)(jax.random.key(0), batch["inputs"])
        # Without the features, which PyTorch's networks do not return either.
        infer = jax.jit(
            lambda variables, inputs: student.apply(variables, inputs, train=False)[0].logits
        )
        return lambda: infer(variables, batch["inputs"]), 1
    teachers = [jax_model(case.teacher, bf16=config.bf16)] if case.teacher else []
    return training_call(student, batch, label_or_distillation_loss, teachers)


def training_call(
    student: models.Model,
    batch: distill.Batch,
    loss: distill.LossFn,
    teachers: Sequence[models.Model] = (),
) -> tuple[Callable[[], Any], int]:
    """Makes a function that trains the student on one batch again and again.

    Args:
        student: The model to train.
        batch: Inputs and labels.
        loss: As of a stage: `(student, teachers, batch, context) -> [B]`.
        teachers: Models of the teachers, whose weights are drawn at random.

    Returns:
        The function, and how many steps it takes per call: one on a CPU and a scan of several on an
        accelerator, the faster form on each.
    """
    variables, *teacher_variables = (
        jax.jit(model.init)(jax.random.key(i), batch["inputs"])
        for i, model in enumerate((student, *teachers))
    )
    tx = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    step = distill.make_train_step(student, tx, loss, teachers=teachers)
    state = distill.init_train_state(variables, tx)
    # Passed as arguments, because jit would embed arrays of a closure as constants.
    arguments = (batch, tuple(teacher_variables), jax.random.key(2))
    steps_per_call = 1 if jax.default_backend() == "cpu" else SCANNED_STEPS

    @functools.partial(jax.jit, donate_argnums=0)
    def scan(state: distill.TrainState, *arguments: Any) -> tuple[distill.TrainState, dict]:
        return jax.lax.scan(lambda state, _: step(state, *arguments), state, length=steps_per_call)

    advance = step if steps_per_call == 1 else scan

    def call() -> dict:
        # The step donates the state, so each call must continue from the state returned before.
        nonlocal state
        state, metrics = advance(state, *arguments)
        return metrics

    return call, steps_per_call


class TorchTraining(beside_torch.TorchBackend):
    """The networks in PyTorch."""

    def __init__(self) -> None:
        from experiments.benchmarks import torch_training

        super().__init__(torch_training)

    def calls(self, case: Case, config: Config) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Yields implementation and a function of one step."""
        for version in TORCH_VERSIONS[: 1 + config.compile]:
            # torch.compile gives up on a function after a few input sizes unless it is reset.
            self.torch.compiler.reset()
            yield version, self.make_call(case, config, compiles=version == "compiled")

    def make_call(self, case: Case, config: Config, *, compiles: bool) -> Callable[[], Any]:
        """Makes a function of one step."""
        batch = make_batch(case, config)
        side = self.counterparts
        student, inputs = side.place(self.network(case.student), batch["inputs"], self.device)
        if not case.trains:
            return side.make_inference(student, inputs, compiles=compiles, bf16=config.bf16)
        teacher = None
        if case.teacher:
            teacher, _ = side.place(self.network(case.teacher), batch["inputs"], self.device)
        return side.make_training(
            student,
            teacher,
            inputs,
            batch["labels"],
            learning_rate=LEARNING_RATE,
            momentum=MOMENTUM,
            temperature=TEMPERATURE,
            alpha=ALPHA,
            compiles=compiles,
            bf16=config.bf16,
        )

    def network(self, network: Network) -> Any:
        """Makes a network with random weights."""
        return getattr(self.counterparts, network.name)(*network.arguments)


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
