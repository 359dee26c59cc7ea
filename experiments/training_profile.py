"""Which parts make a training step slower than PyTorch's, and how much do the parts leave unexplained?

The layers of the plain CNN and of ResNet-20 are timed alone, each by jaxkd's functions as the models use them and by
eager PyTorch in the memory format channels_last: of a convolution the forward pass and both gradients, of anything else
forward and backward pass together, then the loss and the optimizer. What a network has several times counts as often.
The sum of the parts stands beside the whole step of `experiments.training_benchmark`. All have their turn in every
round; what is reported are medians over rounds, and ratios within a round, their median and quartiles. PyTorch is
optional: without it jaxkd stands alone.

Left out are the additions and shortcuts of ResNet-20. A part alone is called from Python, has its inputs in memory and
writes its outputs there; within a step XLA may compute neighbours at once, or one twice.

Paper: He et al., Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385

Command: python -m experiments.training_profile

On Linux it was started with the allocator's settings of `experiments.training_benchmark`.

Result: in ResNet-20 the kernel gradients of the convolutions are behind by 62 ms a step, their input gradients by 27,
their forward passes by 24 and the normalisations by 19; the whole step takes 252 ms beside 156 (two x86-64 cores shared
with other work, jax 0.12, PyTorch 2.15). The table and what was tried: experiments/results/training_profile.md

Time: 2 minutes on 2 CPU cores
"""

import dataclasses
import enum
import fnmatch
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from experiments import beside_torch, cli, timing, training_benchmark
from experiments.timing import Ratio
from experiments.training_benchmark import LEARNING_RATE, MOMENTUM, Case, Torch
from jaxkd import models
from jaxkd.data.progress import track
from jaxkd.figures import COLOURS, draw
from jaxkd.models.cnn import max_pool
from jaxkd.models.convolution import Conv
from jaxkd.models.layers import BatchNorm

SIDES = ("jaxkd", "PyTorch")
WHOLE, SUM = "the whole step", "the sum of the parts"
NAMED = 3  # parts that the summary names
Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    only: str = "*"
    """Profile the network of such a name alone: `cnn` or `resnet20`."""
    batch_size: int = 128
    """Images a step."""
    rounds: int = 11
    """How many times everything is timed."""
    workdir: str = "runs/training_profile"
    """Where results.json and the figure are written; those of an earlier run are replaced."""

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        cli.require(self.batch_size >= 1, f"--batch-size {self.batch_size}: at least one image is needed")
        cli.require(self.rounds >= 1, f"--rounds {self.rounds}: at least one is needed")
        cli.require(
            bool(fnmatch.filter(NETWORKS, self.only)),
            f"--only {self.only}: nothing has such a name; there are {', '.join(NETWORKS)}",
        )


class Pass(enum.Enum):
    """What is timed of a layer."""

    FORWARD = "forward"
    KERNEL = "kernel gradient"
    INPUT = "input gradient"
    BOTH = "forward and backward"


class Layer(NamedTuple):
    """Some equal layers of a network."""

    name: str
    count: int
    shape: tuple[int, int, int]
    """Height, width and channels of the inputs."""
    ours: nn.Module
    theirs: Callable[[Any], Any]
    """Makes the same of `torch.nn`."""
    passes: tuple[Pass, ...] = (Pass.BOTH,)


def conv(
    count: int, size: int, before: int, width: int, *, stride: int = 1, padding: int = 1, bias: bool = False
) -> Layer:
    """Convolutions of 3×3; for images no gradient is needed."""
    return Layer(
        f"conv {before}→{width}, {size}×{size}" + (f" by {stride}" if stride > 1 else ""),
        count,
        (size, size, before),
        Conv(width, (3, 3), stride, padding=padding, use_bias=bias),
        lambda torch_nn: torch_nn.Conv2d(before, width, 3, stride, padding, bias=bias),
        (Pass.FORWARD, Pass.KERNEL, Pass.INPUT)[: 2 if before == 3 else 3],
    )


def chain(
    name: str, count: int, shape: tuple[int, int, int], ours: Sequence[Callable], theirs: Callable[[Any], Sequence]
) -> Layer:
    """One layer after the other, as one."""
    return Layer(name, count, shape, nn.Sequential(ours), lambda torch_nn: torch_nn.Sequential(*theirs(torch_nn)))


def norm(count: int, size: int, width: int) -> Layer:
    """Batch normalisations with ReLU."""
    ours = [BatchNorm(use_running_average=False), nn.relu]
    return chain(
        f"norm, ReLU {size}×{size}×{width}",
        count,
        (size, size, width),
        ours,
        lambda torch_nn: [torch_nn.BatchNorm2d(width), torch_nn.ReLU()],
    )


def pool(size: int, width: int) -> Layer:
    """ReLU with max-pooling."""
    return chain(
        f"ReLU, pool {size}×{size}×{width}",
        1,
        (size, size, width),
        [nn.relu, max_pool],
        lambda torch_nn: [torch_nn.ReLU(), torch_nn.MaxPool2d(2)],
    )


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(len(x), -1)


def _mean(x: jax.Array) -> jax.Array:
    return x.mean(axis=(1, 2))


NETWORKS: dict[str, tuple[Layer, ...]] = {
    "cnn": (
        conv(1, 32, 3, 32, padding=0, bias=True),
        pool(30, 32),
        conv(1, 15, 32, 64, padding=0, bias=True),
        pool(13, 64),
        chain(
            "dense 2304→64, ReLU",
            1,
            (6, 6, 64),
            [_flat, nn.Dense(64), nn.relu],
            lambda torch_nn: [torch_nn.Flatten(), torch_nn.Linear(2304, 64), torch_nn.ReLU()],
        ),
        chain(
            "dense 64→10",
            1,
            (1, 1, 64),
            [_flat, nn.Dense(10)],
            lambda torch_nn: [torch_nn.Flatten(), torch_nn.Linear(64, 10)],
        ),
    ),
    "resnet20": (
        conv(1, 32, 3, 16),
        conv(6, 32, 16, 16),
        conv(1, 32, 16, 32, stride=2),
        conv(5, 16, 32, 32),
        conv(1, 16, 32, 64, stride=2),
        conv(5, 8, 64, 64),
        norm(7, 32, 16),
        norm(6, 16, 32),
        norm(6, 8, 64),
        chain(
            "mean, dense 64→10",
            1,
            (8, 8, 64),
            [_mean, nn.Dense(10)],
            lambda torch_nn: [torch_nn.AdaptiveAvgPool2d(1), torch_nn.Flatten(), torch_nn.Linear(64, 10)],
        ),
    ),
}
"""The layers of the network that `training_benchmark` trains as `train_…`."""


class Part(NamedTuple):
    """What is timed, and how often a step has it; calls of jaxkd and, where it is installed, of PyTorch."""

    name: str
    count: int
    calls: list[Call]


def parts(network: str, config: Config, torch: Torch | None) -> list[Part]:
    """Those of a training step, the whole step last."""
    case = next(case for case in training_benchmark.CASES if case.name == f"train_{network}")
    made = []
    for layer in NETWORKS[network]:
        sides = [jax_calls(layer, config.batch_size)]
        sides += [torch_calls(layer, config.batch_size, torch)] if torch else []
        made += [Part(f"{layer.name}: {one.value}", layer.count, [side[one] for side in sides]) for one in layer.passes]
    step = training_benchmark.Config(batch_size=config.batch_size)
    rest = [(*jax_rest(case, config.batch_size), training_benchmark.jax_call(case, step)[0])]
    rest += [(*torch_rest(case, config.batch_size, torch), torch.call(case, step, compiles=False))] if torch else []
    names = ("loss", "optimizer", WHOLE)
    return made + [Part(name, 1, calls) for name, *calls in zip(names, *rest, strict=True)]


def noise(*shape: int) -> np.ndarray:
    """Of float32, the same at each call."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def jax_calls(layer: Layer, batch_size: int) -> dict[Pass, Call]:
    """Calls of each pass of a layer; XLA leaves out what a pass does not return."""
    images = jnp.asarray(noise(batch_size, *layer.shape))
    variables = jax.jit(layer.ours.init)(jax.random.key(0), images)
    params = variables.get("params", {})

    def forward(params: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        return layer.ours.apply({**variables, "params": params}, images, mutable="batch_stats")

    def run(params: Any, images: jax.Array, cotangent: jax.Array) -> tuple:
        outputs, pullback, stats = jax.vjp(forward, params, images, has_aux=True)
        return (outputs, stats), *pullback(cotangent)

    cotangent = jnp.asarray(noise(*jax.eval_shape(forward, params, images)[0].shape))

    def call(*kept: int) -> Call:
        return functools.partial(jax.jit(lambda *arrays: [run(*arrays)[i] for i in kept]), params, images, cotangent)

    return {Pass.FORWARD: call(0), Pass.KERNEL: call(1), Pass.INPUT: call(2), Pass.BOTH: call(0, 1, 2)}


def torch_calls(layer: Layer, batch_size: int, torch: Torch) -> dict[Pass, Call]:
    """The same of PyTorch; a gradient alone begins from what its forward pass kept."""
    module, images = torch.side.place(layer.theirs(torch.side.nn), noise(batch_size, *layer.shape), torch.device)
    outputs, weights = module(images.requires_grad_()), list(module.parameters())
    cotangent = torch.torch.randn_like(outputs)

    def gradient(wanted: list) -> Call:
        return lambda: torch.torch.autograd.grad(outputs, wanted, cotangent, retain_graph=True)

    return {
        Pass.FORWARD: lambda: module(images),
        Pass.KERNEL: gradient(weights),
        Pass.INPUT: gradient([images]),
        Pass.BOTH: lambda: torch.torch.autograd.grad(module(images), [*weights, images], cotangent),
    }


def jax_rest(case: Case, batch_size: int) -> tuple[Call, Call]:
    """Calls of the loss with its gradient, and of the optimizer."""
    batch, logits = training_benchmark.make_images(batch_size), jnp.asarray(noise(batch_size, 10))
    labels, tx = jnp.asarray(batch["labels"]), optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    student = training_benchmark.jax_model(case.student, bf16=False)
    params = jax.jit(student.init)(jax.random.key(0), batch["inputs"])["params"]
    gradients, state = jax.tree.map(jnp.ones_like, params), (params, tx.init(params))

    def mean(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return training_benchmark.loss(models.Outputs(logits, {}), (), {"labels": labels}).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def descend(state: tuple, gradients: Any) -> tuple:
        params, opt_state = state
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def optimize() -> tuple:
        nonlocal state
        state = descend(state, gradients)
        return state

    return functools.partial(jax.jit(jax.value_and_grad(mean)), logits, labels), optimize


def torch_rest(case: Case, batch_size: int, torch: Torch) -> tuple[Call, Call]:
    """The same of PyTorch."""
    batch, student = training_benchmark.make_images(batch_size), torch.network(case.student).to(torch.device)
    labels = torch.torch.from_numpy(batch["labels"]).to(torch.device)
    logits = torch.torch.from_numpy(noise(batch_size, 10)).to(torch.device).requires_grad_()
    optimizer = torch.torch.optim.SGD(student.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    for weights in student.parameters():
        weights.grad = torch.torch.ones_like(weights)
    return lambda: torch.torch.autograd.grad(
        torch.side.functional.cross_entropy(logits, labels), logits
    ), optimizer.step


def measure(config: Config, torch: Torch | None) -> list[dict]:
    """Times everything; a row for each part, with the seconds of each side, once, in each round."""
    rows: list[dict] = []
    for network in fnmatch.filter(NETWORKS, config.only):
        rows += _measure(network, config, torch)
    return rows


def _measure(network: str, config: Config, torch: Torch | None) -> list[dict]:
    made = parts(network, config, torch)
    rounds = beside_torch.time_rounds([call for part in made for call in part.calls], config.rounds, torch)
    times = iter(np.array(list(track(rounds, description=network, total=config.rounds))).T.tolist())
    return [
        {"network": network, "part": part.name, "count": part.count}
        | {side: next(times) for side, _ in zip(SIDES, part.calls, strict=False)}
        for part in made
    ]


def total(row: dict, side: str) -> np.ndarray:
    """Milliseconds a step in each round, of a part as often as the step has it."""
    return 1e3 * row["count"] * np.array(row[side])


def behind(row: dict) -> float:
    """By how many milliseconds a step jaxkd takes longer than PyTorch; all that it takes where it stands alone."""
    ours, *others = (float(np.median(total(row, side))) for side in SIDES if side in row)
    return ours - sum(others)


def split(rows: Sequence[dict], network: str) -> tuple[list[dict], dict, dict]:
    """The parts of a network, where jaxkd is behind most first; their sum; the whole step."""
    mine = [row for row in rows if row["network"] == network]
    whole = next(row for row in mine if row["part"] == WHOLE)
    single = sorted((row for row in mine if row is not whole), key=behind, reverse=True)
    sums = {
        side: np.sum([total(row, side) / 1e3 for row in single], axis=0).tolist() for side in SIDES if side in whole
    }
    return single, {"network": network, "part": SUM, "count": 1} | sums, whole


def conclude(rows: Sequence[dict]) -> list[str]:
    """Two sentences a network: the largest gaps, and what the parts leave unexplained."""
    sentences = []
    for network in dict.fromkeys(row["network"] for row in rows):
        single, sums, whole = split(rows, network)
        most = ", ".join(f"{row['part']} ({behind(row):.1f} ms)" for row in single[:NAMED])
        lost = f"is behind by {behind(whole):.1f} ms a step" if SIDES[1] in whole else f"takes {behind(whole):.1f} ms"
        rest = " and ".join(_explained(sums, whole, side) for side in SIDES if side in whole)
        sentences += [f"{network}: jaxkd {lost}; most in {most}.", f"{network}: the parts sum to {rest}."]
    return sentences


def _explained(sums: dict, whole: dict, side: str) -> str:
    parts, step = (float(np.median(total(row, side))) for row in (sums, whole))
    return f"{parts:.1f} of {side}'s {step:.1f} ms"


def print_tables(rows: Sequence[dict], *, console: Console | None = None) -> None:
    """Prints a table a network."""
    for network in dict.fromkeys(row["network"] for row in rows):
        single, sums, whole = split(rows, network)
        sides = [side for side in SIDES if side in whole]
        table = timing.table(f"{network}: milliseconds a step, and times PyTorch ÷ jaxkd: median (quartiles)", "part")
        for column in ("count", *sides, *(["PyTorch ÷ jaxkd"] if len(sides) > 1 else []), "share"):
            table.add_column(column, justify="right")
        for row in (*single, sums, whole):
            times = (f"{np.median(total(row, side)):.2f}" for side in sides)
            ratio = [str(Ratio.of(row[SIDES[1]], row[SIDES[0]]))] if len(sides) > 1 else []
            share = np.median(total(row, SIDES[0])) / np.median(total(whole, SIDES[0]))
            table.add_row(row["part"], str(row["count"]), *times, *ratio, f"{share:.0%}", end_section=row is single[-1])
        (console or Console()).print(table, end="\n\n")


def plot(rows: Sequence[dict], path: Path, *, title: str) -> None:
    """Draws the milliseconds a step of both sides, two bars a part."""
    networks = {name: split(rows, name)[0] for name in dict.fromkeys(row["network"] for row in rows)}
    lengths = [len(single) for single in networks.values()]
    with draw(path, 9, 1.2 + 0.32 * sum(lengths)) as figure:
        panels = figure.subplots(len(networks), 1, squeeze=False, height_ratios=lengths)[:, 0]
        for axes, (name, single) in zip(panels, networks.items(), strict=True):
            places = np.arange(len(single))
            for side, colour, shift in zip(SIDES, COLOURS, (-0.2, 0.2), strict=False):
                middle = [float(np.median(total(row, side))) for row in single]
                axes.barh(places + shift, middle, 0.4, color=colour, label=side)
            axes.set_yticks(places, [f"{row['part']} ×{row['count']}" for row in single], fontsize=8)
            axes.set(ylim=(len(single) - 0.5, -0.5), xlabel="milliseconds a step", title=name)
            axes.grid(visible=False, axis="y")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.suptitle(title, fontsize=8, color="#555555")


def main(config: Config) -> None:
    """Times, compares and reports."""
    folder = beside_torch.begin(config)
    torch, notes = beside_torch.load_torch(Torch)
    rows = measure(config, torch)
    sentences = conclude(rows)
    found = {"summary": sentences, "notes": notes, "rows": rows}
    setting = beside_torch.write_results(folder, config, torch, found, rounds=config.rounds)
    print_tables(rows)
    if torch:
        plot(rows, folder / "training_profile.png", title=setting)
    print(setting, *notes, *sentences, f"Everything is in {folder}", sep="\n")


if __name__ == "__main__":
    cli.run(main, Config, __doc__, resumes=False)
