"""Times the parts of a training step, to find those that are slower than PyTorch's.

The layers of the plain CNN and of ResNet-20 are timed alone: by jaxkd's functions as the models use
them, and by eager PyTorch in the memory format channels_last. A convolution is timed as forward
pass, kernel gradient and input gradient; every other layer as forward and backward pass together;
then the loss and the optimizer. A layer that a network has several times counts as often. The sum
of the parts is compared with the whole step of `experiments.benchmarks.training`. Each round times
everything once. The report gives medians over rounds, and ratios within a round as median and
quartiles. PyTorch is optional: without it only jaxkd is measured.

The additions and shortcuts of ResNet-20 are left out. A part that is timed alone is called from
Python, reads its inputs from memory and writes its outputs there; within a step XLA may fuse
adjacent parts, or compute one of them twice.

Paper: He et al., Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385

Command: python -m experiments.benchmarks.training_profile

On Linux the result below was measured with the allocator's settings of
`experiments.benchmarks.training`.

Result: in ResNet-20 jaxkd is behind by 106 ms per step in the kernel gradients of the
convolutions, by 30 in their input gradients, by 29 in their forward passes and by 20 in the
normalisations; the whole step takes 304 ms, PyTorch's 210 (two x86-64 cores with AVX-512, jax 0.12,
PyTorch 2.14). The table and what was tried: experiments/results/training_profile.md

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
from rich.table import Table

from experiments.benchmarks import beside_torch, timing, training_cases
from experiments.benchmarks.timing import Ratio
from experiments.benchmarks.training_cases import LEARNING_RATE, MOMENTUM, Case, TorchTraining
from experiments.common import cli
from jaxkd import models
from jaxkd.data.progress import track
from jaxkd.models.cnn import max_pool
from jaxkd.models.convolution import Conv
from jaxkd.models.layers import BatchNorm
from jaxkd.runs.figures import COLOURS, new_figure

SIDES = ("jaxkd", "PyTorch")
WHOLE = "the whole step"
SUM = "the sum of the parts"
# The summary names this many of the parts in which jaxkd is behind most.
PARTS_IN_SUMMARY = 3
Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    only: str = "*"
    """Profile only the networks that match this pattern: `cnn` or `resnet20`."""
    batch_size: int = 128
    """Images per step."""
    rounds: int = 11
    """Rounds; each times everything once."""
    workdir: str = "runs/training_profile"
    """Folder of results.json and the figure; those of an earlier run are replaced."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        cli.require(self.batch_size >= 1, f"--batch-size {self.batch_size}: must be at least 1")
        cli.require(self.rounds >= 1, f"--rounds {self.rounds}: must be at least 1")
        cli.require(
            bool(fnmatch.filter(NETWORKS, self.only)),
            f"--only {self.only}: matches no network; the networks are {', '.join(NETWORKS)}",
        )


class Pass(enum.Enum):
    """The passes of a layer that are timed."""

    FORWARD = "forward"
    KERNEL = "kernel gradient"
    INPUT = "input gradient"
    BOTH = "forward and backward"


class Layer(NamedTuple):
    """A layer, and how often a network has it."""

    name: str
    count: int
    shape: tuple[int, int, int]
    """Height, width and channels of the inputs."""
    module: nn.Module
    """The layer in Flax."""
    make_torch_module: Callable[[Any], Any]
    """Makes the layer from the module `torch.nn`."""
    passes: tuple[Pass, ...] = (Pass.BOTH,)


def conv(
    count: int,
    size: int,
    in_channels: int,
    width: int,
    *,
    stride: int = 1,
    padding: int = 1,
    bias: bool = False,
) -> Layer:
    """Describes convolutions of 3×3."""
    reads_images = in_channels == 3
    return Layer(
        f"conv {in_channels}→{width}, {size}×{size}" + (f" by {stride}" if stride > 1 else ""),
        count,
        (size, size, in_channels),
        Conv(width, (3, 3), stride, padding=padding, use_bias=bias),
        lambda torch_nn: torch_nn.Conv2d(in_channels, width, 3, stride, padding, bias=bias),
        # Training needs no gradient to the images.
        (Pass.FORWARD, Pass.KERNEL) if reads_images else (Pass.FORWARD, Pass.KERNEL, Pass.INPUT),
    )


def chain(
    name: str,
    count: int,
    shape: tuple[int, int, int],
    functions: Sequence[Callable],
    make_torch_modules: Callable[[Any], Sequence],
) -> Layer:
    """Describes consecutive layers that are timed as one."""
    return Layer(
        name,
        count,
        shape,
        nn.Sequential(functions),
        lambda torch_nn: torch_nn.Sequential(*make_torch_modules(torch_nn)),
    )


def norm(count: int, size: int, width: int) -> Layer:
    """Describes batch normalisations with ReLU."""
    return chain(
        f"norm, ReLU {size}×{size}×{width}",
        count,
        (size, size, width),
        [BatchNorm(use_running_average=False), nn.relu],
        lambda torch_nn: [torch_nn.BatchNorm2d(width), torch_nn.ReLU()],
    )


def pool(size: int, width: int) -> Layer:
    """Describes ReLU with max-pooling."""
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


# The layers of the networks that `experiments.benchmarks.training` trains as `train_…`.
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
    # Three stages of six convolutions; in the second and third stage the first one has stride 2.
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
            lambda torch_nn: [
                torch_nn.AdaptiveAvgPool2d(1),
                torch_nn.Flatten(),
                torch_nn.Linear(64, 10),
            ],
        ),
    ),
}


class Part(NamedTuple):
    """A timed part of a training step, and how often the step has it."""

    name: str
    count: int
    calls: list[Call]
    """The call of jaxkd and, if PyTorch is measured, that of PyTorch."""


def make_parts(network: str, config: Config, torch: TorchTraining | None) -> list[Part]:
    """Makes the parts of a training step: layers, loss, optimizer, and the whole step last."""
    case = next(case for case in training_cases.CASES if case.name == f"train_{network}")
    parts = []
    for layer in NETWORKS[network]:
        sides = [jax_calls(layer, config.batch_size)]
        if torch:
            sides.append(torch_calls(layer, config.batch_size, torch))
        for layer_pass in layer.passes:
            calls = [side[layer_pass] for side in sides]
            parts.append(Part(f"{layer.name}: {layer_pass.value}", layer.count, calls))
    options = training_cases.Settings(batch_size=config.batch_size)
    step, _ = training_cases.jax_call(case, options)
    other_calls = [(*jax_loss_and_optimizer(case, config.batch_size), step)]
    if torch:
        torch_step = torch.make_call(case, options, compiles=False)
        other_calls.append((*torch_loss_and_optimizer(case, config.batch_size, torch), torch_step))
    for name, *calls in zip(("loss", "optimizer", WHOLE), *other_calls, strict=True):
        parts.append(Part(name, 1, calls))
    return parts


def noise(*shape: int) -> np.ndarray:
    """Draws float32 values, the same at each call."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def jax_calls(layer: Layer, batch_size: int) -> dict[Pass, Call]:
    """Makes a call of jaxkd for each pass of a layer."""
    images = jnp.asarray(noise(batch_size, *layer.shape))
    variables = jax.jit(layer.module.init)(jax.random.key(0), images)
    params = variables.get("params", {})

    # A training step also updates the running statistics of batch norm.
    def forward(params: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        return layer.module.apply({**variables, "params": params}, images, mutable="batch_stats")

    def all_passes(params: Any, images: jax.Array, cotangent: jax.Array) -> tuple:
        outputs, pullback, stats = jax.vjp(forward, params, images, has_aux=True)
        return (outputs, stats), *pullback(cotangent)

    cotangent = jnp.asarray(noise(*jax.eval_shape(forward, params, images)[0].shape))

    def call(*results: int) -> Call:
        # XLA removes the computations whose results are not returned.
        program = jax.jit(lambda *arrays: [all_passes(*arrays)[i] for i in results])
        return functools.partial(program, params, images, cotangent)

    return {
        Pass.FORWARD: call(0),
        Pass.KERNEL: call(1),
        Pass.INPUT: call(2),
        Pass.BOTH: call(0, 1, 2),
    }


def torch_calls(layer: Layer, batch_size: int, torch: TorchTraining) -> dict[Pass, Call]:
    """Makes a call of PyTorch for each pass of a layer."""
    module, images = torch.counterparts.place(
        layer.make_torch_module(torch.counterparts.nn),
        noise(batch_size, *layer.shape),
        torch.device,
    )
    outputs = module(images.requires_grad_())
    weights = list(module.parameters())
    cotangent = torch.torch.randn_like(outputs)

    def gradient(tensors: list) -> Call:
        # A gradient without its forward pass reuses the graph of the forward pass above.
        return lambda: torch.torch.autograd.grad(outputs, tensors, cotangent, retain_graph=True)

    return {
        Pass.FORWARD: lambda: module(images),
        Pass.KERNEL: gradient(weights),
        Pass.INPUT: gradient([images]),
        Pass.BOTH: lambda: torch.torch.autograd.grad(module(images), [*weights, images], cotangent),
    }


def jax_loss_and_optimizer(case: Case, batch_size: int) -> tuple[Call, Call]:
    """Makes jaxkd's calls of the loss with its gradient, and of the optimizer."""
    batch = training_cases.make_images(batch_size)
    logits = jnp.asarray(noise(batch_size, 10))
    labels = jnp.asarray(batch["labels"])
    tx = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    student = training_cases.jax_model(case.student, bf16=False)
    params = jax.jit(student.init)(jax.random.key(0), batch["inputs"])["params"]
    # The optimizer takes the same time whatever the gradients are.
    gradients = jax.tree.map(jnp.ones_like, params)
    state = (params, tx.init(params))

    def mean_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        outputs = models.Outputs(logits, {})
        batch = {"labels": labels}
        # The loss does not read its context, which the training step would pass.
        return training_cases.label_or_distillation_loss(outputs, (), batch, None).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: tuple, gradients: Any) -> tuple:
        params, opt_state = state
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def optimize() -> tuple:
        # The update donates the state, so each call must continue from the state returned before.
        nonlocal state
        state = update(state, gradients)
        return state

    return functools.partial(jax.jit(jax.value_and_grad(mean_loss)), logits, labels), optimize


def torch_loss_and_optimizer(
    case: Case, batch_size: int, torch: TorchTraining
) -> tuple[Call, Call]:
    """Makes PyTorch's calls of the loss with its gradient, and of the optimizer."""
    batch = training_cases.make_images(batch_size)
    student = torch.network(case.student).to(torch.device)
    labels = torch.torch.from_numpy(batch["labels"]).to(torch.device)
    logits = torch.torch.from_numpy(noise(batch_size, 10)).to(torch.device).requires_grad_()
    optimizer = torch.torch.optim.SGD(student.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    for weights in student.parameters():
        weights.grad = torch.torch.ones_like(weights)

    def loss_gradient() -> tuple:
        loss = torch.counterparts.functional.cross_entropy(logits, labels)
        return torch.torch.autograd.grad(loss, logits)

    return loss_gradient, optimizer.step


def measure(config: Config, torch: TorchTraining | None) -> list[dict]:
    """Times all parts.

    Args:
        config: Options.
        torch: The networks in PyTorch, or `None` to measure only jaxkd.

    Returns:
        A row for each part, with the seconds per call of each side and round.
    """
    rows: list[dict] = []
    for network in fnmatch.filter(NETWORKS, config.only):
        rows += _measure_network(network, config, torch)
    return rows


def _measure_network(network: str, config: Config, torch: TorchTraining | None) -> list[dict]:
    parts = make_parts(network, config, torch)
    calls = [call for part in parts for call in part.calls]
    rounds = beside_torch.time_rounds(calls, config.rounds, torch)
    seconds = np.array(list(track(rounds, description=network, total=config.rounds)))
    seconds_of_calls = iter(seconds.T.tolist())
    rows = []
    for part in parts:
        row: dict[str, Any] = {"network": network, "part": part.name, "count": part.count}
        for side, _ in zip(SIDES, part.calls, strict=False):
            row[side] = next(seconds_of_calls)
        rows.append(row)
    return rows


def total(row: dict, side: str) -> np.ndarray:
    """Returns the milliseconds per step in each round, over all occurrences of a part."""
    return 1e3 * row["count"] * np.array(row[side])


def behind(row: dict) -> float:
    """Returns jaxkd's milliseconds per step minus PyTorch's, which are 0 if not measured."""
    medians = {side: float(np.median(total(row, side))) for side in SIDES if side in row}
    return medians["jaxkd"] - medians.get("PyTorch", 0.0)


def split(rows: Sequence[dict], network: str) -> tuple[list[dict], dict, dict]:
    """Splits the rows of a network.

    Args:
        rows: From `measure`.
        network: Name of the network.

    Returns:
        The rows of the parts, sorted by how far jaxkd is behind; a row of their sum; the row of the
        whole step.
    """
    network_rows = [row for row in rows if row["network"] == network]
    whole = next(row for row in network_rows if row["part"] == WHOLE)
    parts = sorted((row for row in network_rows if row is not whole), key=behind, reverse=True)
    summed: dict[str, Any] = {"network": network, "part": SUM, "count": 1}
    for side in SIDES:
        if side in whole:
            # In seconds, like the rows of the parts.
            summed[side] = np.sum([total(row, side) / 1e3 for row in parts], axis=0).tolist()
    return parts, summed, whole


def conclude(rows: Sequence[dict]) -> list[str]:
    """Summarises the largest gaps, and what the parts leave unexplained, for each network."""
    sentences = []
    for network in _network_names(rows):
        parts, summed, whole = split(rows, network)
        largest = ", ".join(
            f"{row['part']} ({behind(row):.1f} ms)" for row in parts[:PARTS_IN_SUMMARY]
        )
        step = (
            f"is behind by {behind(whole):.1f} ms a step"
            if "PyTorch" in whole
            else f"takes {behind(whole):.1f} ms a step"
        )
        explained = " and ".join(_explained(summed, whole, side) for side in SIDES if side in whole)
        sentences += [
            f"{network}: jaxkd {step}; most in {largest}.",
            f"{network}: the parts sum to {explained}.",
        ]
    return sentences


def _network_names(rows: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(row["network"] for row in rows))


def _explained(summed: dict, whole: dict, side: str) -> str:
    parts, step = (float(np.median(total(row, side))) for row in (summed, whole))
    return f"{parts:.1f} of {side}'s {step:.1f} ms"


def print_tables(rows: Sequence[dict], *, console: Console | None = None) -> None:
    """Prints a table for each network."""
    for network in _network_names(rows):
        (console or Console()).print(_make_table(rows, network), end="\n\n")


def _make_table(rows: Sequence[dict], network: str) -> Table:
    parts, summed, whole = split(rows, network)
    sides = [side for side in SIDES if side in whole]
    ratio_columns = ["PyTorch ÷ jaxkd"] if "PyTorch" in whole else []
    title = f"{network}: milliseconds a step, and times PyTorch ÷ jaxkd: median (quartiles)"
    table = timing.make_table(title, "part")
    for column in ("count", *sides, *ratio_columns, "share"):
        table.add_column(column, justify="right")
    for row in (*parts, summed, whole):
        times = [f"{np.median(total(row, side)):.2f}" for side in sides]
        ratios = [str(Ratio.of(row["PyTorch"], row["jaxkd"])) for _ in ratio_columns]
        # The shares may sum to more than 100 %, because XLA saves work within the whole step.
        share = np.median(total(row, "jaxkd")) / np.median(total(whole, "jaxkd"))
        table.add_row(
            row["part"],
            str(row["count"]),
            *times,
            *ratios,
            f"{share:.0%}",
            end_section=row is parts[-1],
        )
    return table


def plot(rows: Sequence[dict], path: Path, *, title: str) -> None:
    """Draws the milliseconds per step of jaxkd and PyTorch, two bars for each part."""
    networks = {name: split(rows, name)[0] for name in _network_names(rows)}
    lengths = [len(parts) for parts in networks.values()]
    with new_figure(path, 9, 1.2 + 0.32 * sum(lengths)) as figure:
        panels = figure.subplots(len(networks), 1, squeeze=False, height_ratios=lengths)[:, 0]
        for axes, (name, parts) in zip(panels, networks.items(), strict=True):
            heights = np.arange(len(parts))
            for side, colour, offset in zip(SIDES, COLOURS, (-0.2, 0.2), strict=False):
                medians = [float(np.median(total(row, side))) for row in parts]
                axes.barh(heights + offset, medians, 0.4, color=colour, label=side)
            labels = [f"{row['part']} ×{row['count']}" for row in parts]
            axes.set_yticks(heights, labels, fontsize=8)
            axes.set(ylim=(len(parts) - 0.5, -0.5), xlabel="milliseconds a step", title=name)
            axes.grid(visible=False, axis="y")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.suptitle(title, fontsize=8, color="#555555")


def main(config: Config) -> None:
    """Times the parts, writes the results and prints the tables."""
    folder = beside_torch.prepare_folder(config)
    torch, notes = beside_torch.load_torch(TorchTraining)
    rows = measure(config, torch)
    sentences = conclude(rows)
    results = {"summary": sentences, "notes": notes, "rows": rows}
    setting = beside_torch.write_results(folder, config, torch, results, rounds=config.rounds)
    print_tables(rows)
    if torch:
        plot(rows, folder / "training_profile.png", title=setting)
    print(setting, *notes, *sentences, f"Everything is in {folder}", sep="\n")


if __name__ == "__main__":
    cli.run(main, Config, __doc__, resumes=False)
