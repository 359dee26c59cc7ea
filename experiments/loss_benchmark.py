"""How fast are the losses, and how much memory do they take, beside the same losses in PyTorch?

Each loss is timed alone and with its gradient to the student, compiled by JAX, and in PyTorch as it is (eager) and
compiled. Calls queue up as in a training loop and are waited for at the end of a sample. The runs of what is compared
alternate, so that other work on the machine meets all of them; what is reported are ratios within a round of such runs,
their median and quartiles. PyTorch is optional: without it jaxkd stands alone.

Paper: Hsu et al., Liger Kernel: Efficient Triton Kernels for LLM Training, https://arxiv.org/abs/2410.10989 (the fused
losses on tokens); those of the other losses stand in jaxkd/losses.

Command: python -m experiments.loss_benchmark

Result: on logits compiled PyTorch takes 2.5 times as long as jaxkd for value and gradient, and 1.01 times for the value
alone (geometric means of 24 cases; two x86-64 cores, jax 0.12, PyTorch 2.15); standardised, DIST and ensemble losses at
128 × 1,000 are slower in both

Time: 5 minutes on 2 CPU cores
"""

import dataclasses
import fnmatch
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import beside_torch, cli, timing
from experiments.timing import Ratio
from jaxkd import losses
from jaxkd.data.progress import track
from jaxkd.figures import COLOURS, draw
from jaxkd.losses.fused import CHUNK_LOGITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUPS = {
    "logits": "Losses on logits",
    "features": "Losses on features and relations",
    "transformer": "Losses on transformers",
    "tokens": "Losses on tokens, from hidden states",
}
PASSES = {"forward": "forward", "both": "forward + backward"}
FULL_SIZE = (8192, 4096, 128_256)  # tokens, hidden units and vocabulary of the bound on memory
SMALL_SIZE = (512, 256, 16_384)  # of what is timed on a CPU
CHUNKS = 4  # of the fused losses, where they would take all tokens at once by themselves


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    only: str = "*"
    """Time the losses of these names alone; such as `kl_divergence`, or `*kl*` for all whose names hold `kl`."""
    batch: int = 128
    """Examples, of all losses but those on tokens."""
    classes: tuple[int, ...] = (10, 1000)
    """How many classes the logits have, in turn."""
    tokens: int | None = None
    """Tokens; by default 8192 on a GPU and 512 on a CPU."""
    hidden: int | None = None
    """Size of the hidden states; by default 4096 on a GPU and 256 on a CPU."""
    vocabulary: int | None = None
    """How many tokens there are to choose from; by default 128256 on a GPU and 16384 on a CPU."""
    repeats: int = 11
    """Rounds in which everything is timed once."""
    workdir: str = "runs/loss_benchmark"
    """Where results.json and the figure are written; those of an earlier run are replaced."""

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        cli.require(self.batch >= 3, f"--batch {self.batch}: relations need three examples")
        cli.require(len(self.classes) > 0, "--classes: at least one number is needed")
        for classes in self.classes:
            cli.require(classes >= 3, f"--classes {classes}: at least 3")
        cli.require(len({*self.classes}) == len(self.classes), f"--classes {self.classes}: each only once")
        for name in ("tokens", "hidden", "vocabulary"):
            value = getattr(self, name)
            cli.require(value is None or value >= 2, f"--{name} {value}: at least 2")
        cli.require(self.repeats >= 1, f"--repeats {self.repeats}: at least one round is needed")
        names = sorted({case.name for case in make_cases(self)})
        cli.require(
            any(fnmatch.fnmatch(name, self.only) for name in names),
            f"--only {self.only}: no loss has such a name; there are {', '.join(names)}",
        )

    def token_size(self) -> tuple[int, ...]:
        """Tokens, hidden units and vocabulary, as given or as fits the device."""
        default = SMALL_SIZE if jax.default_backend() == "cpu" else FULL_SIZE
        given = self.tokens, self.hidden, self.vocabulary
        return tuple(default if one is None else one for one, default in zip(given, default, strict=True))


class Case(NamedTuple):
    """A loss and what it is called on, on both sides."""

    group: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    """Of its arrays, those of the student first."""
    keywords: dict[str, float] = {}
    learns: int = 1
    """How many of the arrays are the student's, to which the gradient goes."""
    classes: int = 0
    """Labels from as many classes come last, if there are any."""
    simplex: bool = False
    """Whether the arrays are probabilities."""

    @property
    def size(self) -> str:
        """The student's array, or tokens, hidden units and vocabulary."""
        shape = (*self.shapes[0], self.shapes[1][-1]) if self.group == "tokens" else self.shapes[self.learns - 1]
        return " × ".join(f"{n:,}" for n in shape)

    @property
    def dtype(self) -> str:
        """What the arrays are in: float32 but for tokens on an accelerator."""
        return "bfloat16" if self.group == "tokens" and jax.default_backend() != "cpu" else "float32"

    def arrays(self) -> list[np.ndarray]:
        """The same at each call."""
        draw = np.random.default_rng(0)
        arrays = [draw.standard_normal(shape, np.float32) for shape in self.shapes]
        if self.group == "tokens":  # logits of deviation 1
            arrays[1::2] = [kernel / np.float32(math.sqrt(len(kernel))) for kernel in arrays[1::2]]
        if self.simplex:
            arrays = [np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in arrays]
        return arrays + ([draw.integers(0, self.classes, self.shapes[0][:-1])] if self.classes else [])


def make_cases(config: Config) -> list[Case]:
    """What is timed, in the order of the tables."""
    cases, batch = [], config.batch
    for classes in config.classes:
        pair, labels = ((batch, classes),) * 2, {"classes": classes}
        at = {"temperature": 4.0}
        cases += [
            Case("logits", "soft_cross_entropy", pair, at),
            Case("logits", "kl_divergence", pair, at),
            Case("logits", "reverse_kl_divergence", pair, at),
            Case("logits", "jensen_shannon_divergence", pair, at | {"beta": 0.5}),
            Case("logits", "logit_mse_loss", pair),
            Case("logits", "standardized_kl_divergence", pair, at),
            Case("logits", "distillation_loss", pair, at, **labels),
            Case("logits", "label_smoothing_loss", pair[:1], {"smoothing": 0.1}, **labels),
            Case("logits", "decoupled_loss", pair, at | {"non_target_weight": 8.0}, **labels),
            Case("logits", "normalized_loss", pair, **labels),
            Case("logits", "dist_loss", pair, at),
            Case("logits", "ensemble_kl_divergence", (pair[0], (3, *pair[0])), at),
        ]
    maps, embeddings = ((batch, 8, 8, 64),) * 2, ((batch, 128),) * 2
    cases += [
        Case("features", "hint_loss", maps),
        Case("features", "attention_transfer_loss", maps),
        Case("features", "attention_transfer_mse_loss", maps),
        Case("features", "neuron_selectivity_loss", maps),
        Case("features", "flow_of_solution_procedure_loss", maps * 2, learns=2),
        Case("features", "variational_information_loss", ((64, 64), (64,), (64,), *maps), learns=4),
        Case("features", "similarity_preserving_loss", maps),
        Case("features", "relational_distance_loss", embeddings),
        Case("features", "relational_angle_loss", embeddings),
        Case("features", "probabilistic_transfer_loss", embeddings),
        Case("features", "correlation_congruence_loss", embeddings),
        Case("features", "linear_cka_loss", embeddings),
        Case("features", "contrastive_loss", embeddings, {"temperature": 0.1}),
    ]
    states, heads, values = ((8, 128, 256),) * 2, ((8, 4, 128, 128),) * 2, ((8, 128, 4, 64),) * 2
    cases += [
        Case("transformer", "hidden_cosine_loss", states),
        Case("transformer", "hidden_mse_loss", states),
        Case("transformer", "attention_map_loss", heads),
        Case("transformer", "attention_divergence_loss", heads, simplex=True),
        Case("transformer", "value_relation_loss", values),
    ]
    tokens, hidden, vocabulary = config.token_size()
    layers = ((tokens, hidden), (hidden, vocabulary)) * 2
    cases += [Case("tokens", name, layers, learns=2) for name in FUSED]
    return cases


def standardized_kl_divergence(student: jax.Array, teacher: jax.Array, *, temperature: float) -> jax.Array:
    """KL of standardised logits."""
    student, teacher = losses.standardize_logits(student), losses.standardize_logits(teacher)
    return losses.kl_divergence(student, teacher, temperature=temperature)


def dist_loss(student: jax.Array, teacher: jax.Array, *, temperature: float) -> jax.Array:
    """Both terms of DIST."""
    inter = losses.dist_inter_loss(student, teacher, temperature=temperature)
    return inter + losses.dist_intra_loss(student, teacher, temperature=temperature)


def ensemble_kl_divergence(student: jax.Array, teachers: jax.Array, *, temperature: float) -> jax.Array:
    """KL from several teachers' average."""
    ensemble = losses.ensemble_logits(teachers, temperature=temperature)
    return losses.kl_divergence(student, ensemble, temperature=temperature)


def variational_information_loss(
    kernel: jax.Array, bias: jax.Array, raw_variance: jax.Array, student: jax.Array, teacher: jax.Array
) -> jax.Array:
    """VID of parameters one by one."""
    params = {"kernel": kernel, "bias": bias, "raw_variance": raw_variance}
    return losses.variational_information_loss(params, student, teacher)


def linear_kl_divergence(*layers: jax.Array) -> jax.Array:
    """KL of the logits of a last layer."""
    return losses.kl_divergence(*_logits(*layers), temperature=1.0)


def linear_reverse_kl_divergence(*layers: jax.Array) -> jax.Array:
    """Reverse KL of the logits of a last layer."""
    return losses.reverse_kl_divergence(*_logits(*layers), temperature=1.0)


def linear_jensen_shannon_divergence(*layers: jax.Array) -> jax.Array:
    """Jensen–Shannon divergence of the logits of a last layer."""
    return losses.jensen_shannon_divergence(*_logits(*layers), temperature=1.0, beta=0.5)


COMPOSED = {
    function.__name__: function
    for function in (
        standardized_kl_divergence,
        dist_loss,
        ensemble_kl_divergence,
        variational_information_loss,
        linear_kl_divergence,
        linear_reverse_kl_divergence,
        linear_jensen_shannon_divergence,
    )
}
FUSED = {
    "linear_kl_divergence": functools.partial(losses.fused_linear_kl_divergence, temperature=1.0),
    "linear_reverse_kl_divergence": functools.partial(losses.fused_linear_reverse_kl_divergence, temperature=1.0),
    "linear_jensen_shannon_divergence": functools.partial(
        losses.fused_linear_jensen_shannon_divergence, temperature=1.0, beta=0.5
    ),
}


def jax_losses(case: Case) -> dict[str, Callable]:
    """The mean of jaxkd's values, and for tokens that of the fused loss."""
    values = functools.partial(COMPOSED.get(case.name) or getattr(losses, case.name), **case.keywords)
    found = {"jaxkd": lambda *arrays: values(*arrays).mean()}
    if case.group == "tokens":
        tokens, vocabulary = case.shapes[0][0], case.shapes[1][1]
        chunk = None if tokens * vocabulary > CHUNK_LOGITS else max(1, tokens // CHUNKS)
        found["fused"] = lambda *arrays: FUSED[case.name](*arrays, chunk_size=chunk).mean()
    return found


def jax_calls(case: Case) -> Iterator[tuple[str, str, Callable[[], Any], int]]:
    """Implementation, pass, a call, and the bytes that the program holds at most."""
    dtypes = [case.dtype] * len(case.shapes) + ["int32"] * bool(case.classes)
    arrays = [jnp.asarray(x, dtype) for x, dtype in zip(case.arrays(), dtypes, strict=True)]
    for name, mean in jax_losses(case).items():
        gradient = jax.value_and_grad(mean, tuple(range(case.learns)))
        for kind, function in (("forward", mean), ("both", gradient)):
            program = jax.jit(function).lower(*arrays).compile()
            yield name, kind, functools.partial(program, *arrays), sum(program_bytes(program))


def program_bytes(program: Any) -> tuple[int, int]:
    """What a compiled program takes for what lies between, and for its arguments and results."""
    sizes = program.memory_analysis()
    return sizes.temp_size_in_bytes, sizes.argument_size_in_bytes + sizes.output_size_in_bytes


def full_size_memory(config: Config) -> list[dict]:
    """Memory of the losses on tokens with their gradient at the full size, compiled but not run."""
    rows = []
    names = [name for name in FUSED if fnmatch.fnmatch(name, config.only)]
    for name, dtype in itertools.product(names, ("bfloat16", "float32")):
        tokens, hidden, vocabulary = FULL_SIZE
        layers = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((tokens, hidden), (hidden, vocabulary))] * 2
        case = Case("tokens", name, tuple(layer.shape for layer in layers), learns=2)
        for implementation, mean in jax_losses(case).items():
            program = jax.jit(jax.value_and_grad(mean, (0, 1))).lower(*layers).compile()
            temporary, rest = program_bytes(program)
            row = {"loss": name, "size": case.size, "dtype": dtype, "implementation": implementation}
            rows.append(row | {"temporary_bytes": temporary, "bytes": temporary + rest})
    return rows


class Torch(beside_torch.Torch):
    """The losses in PyTorch."""

    def __init__(self) -> None:
        from experiments import torch_losses

        super().__init__(torch_losses)

    @functools.cached_property
    def cannot_compile(self) -> str:
        """Why `torch.compile` does not work here, in a line; empty if it does."""
        try:
            self.torch.compile(lambda x: x.exp() + 1)(self.torch.ones(8, device=self.device))
        except Exception as error:  # of many kinds: no compiler, no Triton, an unsupported Python
            return str(error).strip().splitlines()[0]
        return ""

    def calls(self, case: Case) -> Iterator[tuple[str, str, Callable[[], Any]]]:
        """Implementation, pass, and a call."""
        self.torch.compiler.reset()  # it compiles one function for so many sizes only
        inputs = [self.torch.from_numpy(x).to(self.device) for x in case.arrays()]
        inputs = [x.to(getattr(self.torch, case.dtype)) if x.is_floating_point() else x for x in inputs]
        for one in inputs[: case.learns]:
            one.requires_grad_()
        loss = functools.partial(getattr(self.side, case.name), **case.keywords)
        versions = {"eager": loss}
        if not self.cannot_compile:
            versions["compiled"] = self.torch.compile(lambda *inputs: loss(*inputs), dynamic=False)
        for name, function in versions.items():
            yield name, "forward", functools.partial(self._forward, function, inputs)
            yield name, "both", functools.partial(self._both, function, inputs, case.learns)

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """The most memory that a call on a GPU held, arguments among it."""
        if self.device == "cpu":
            return None
        call()  # which compiles it
        self.torch.cuda.reset_peak_memory_stats()
        call()
        return self.torch.cuda.max_memory_allocated()

    def _forward(self, function: Callable, inputs: Sequence[Any]) -> Any:
        with self.torch.no_grad():
            return function(*inputs)

    def _both(self, function: Callable, inputs: Sequence[Any], learns: int) -> Any:
        for one in inputs[:learns]:
            one.grad = None
        value = function(*inputs)
        value.backward()
        return value.detach(), [one.grad for one in inputs[:learns]]


def load_torch() -> tuple[Torch | None, list[str]]:
    """PyTorch, if it can be compared with, and what is to be said about it."""
    torch, notes = beside_torch.load_torch(Torch)
    if torch and torch.device == "cpu":
        notes.append("PyTorch does not count its memory on a CPU, so there are no figures of it.")
    if torch and torch.cannot_compile:
        notes.append(f"torch.compile does not work here, so there are no figures of it: {torch.cannot_compile}")
    return torch, notes


def measure(config: Config, torch: Torch | None) -> list[dict]:
    """Times everything; a row for each case, implementation and pass, with the seconds of a call in each round."""
    cases = [case for case in make_cases(config) if fnmatch.fnmatch(case.name, config.only)]
    rows: list[dict] = []
    for case in track(cases, description="timing", total=len(cases)):
        rows += _measure(case, config.repeats, torch)
    return rows


def ratio(rows: Sequence[dict], row: dict, implementation: str) -> Ratio | None:
    """How many times as long as a row another implementation takes, over rounds; None if there is none."""
    other = find(rows, row, implementation)
    return None if other is None else Ratio.of(other["seconds"], row["seconds"])


def find(rows: Sequence[dict], row: dict, implementation: str) -> dict | None:
    """The row of the same loss, size and pass in another implementation."""
    names = {key: row[key] for key in ("loss", "size", "pass")} | {"implementation": implementation}
    return next((other for other in rows if names.items() <= other.items()), None)


def conclude(rows: Sequence[dict], memory: Sequence[dict]) -> list[str]:
    """What was measured, in a few sentences."""
    sentences = []
    for other in ("compiled", "eager"):
        chosen = [row for row in rows if row["group"] == "logits" and find(rows, row, other)]
        ours = [row for row in chosen if row["implementation"] == "jaxkd"]
        if ours:
            parts = [f"{_mean(rows, ours, kind, other)} ({label})" for kind, label in PASSES.items()]
            found = [(ratio(rows, row, other), row) for row in ours]
            slower = sum(one.high < 1 for one, _ in found if one)
            worst, row = min(found, key=lambda pair: pair[0] or math.inf)
            sentences.append(
                f"On logits, {other} PyTorch takes {' and '.join(parts)} times as long as jaxkd in the geometric mean "
                f"of {len(ours) // 2} cases; jaxkd is slower beyond the spread in {slower} of {len(ours)}, at worst in "
                f"{row['loss']} at {row['size']}, {PASSES[row['pass']]}: {worst}."
            )
    fused = [row for row in rows if row["implementation"] == "fused" and row["pass"] == "both"]
    if fused:
        times = [ratio(rows, row, "jaxkd") for row in fused]
        parts = ", ".join(f"{row['loss']} {time}" for row, time in zip(fused, times, strict=True))
        sentences.append(
            f"With the gradient at {fused[0]['size']}, the plain losses on tokens take this many times as long as the "
            f"fused ones: {parts}."
        )
    if memory:
        parts = []
        for dtype in ("bfloat16", "float32"):
            shares = [plain["bytes"] / fused["bytes"] for plain, fused in _pairs(memory) if plain["dtype"] == dtype]
            parts.append(f"{min(shares):.1f} to {max(shares):.1f} times in {dtype}")
        sentences.append(
            f"At {memory[0]['size']} the plain losses with their gradient need more memory than the fused ones: "
            f"{', '.join(parts)}."
        )
    return sentences


def print_tables(rows: Sequence[dict], memory: Sequence[dict], *, console: Console | None = None) -> None:
    """Prints times, ratios and memory, a table a group."""
    console = console or Console()
    others = [name for name in ("eager", "compiled") if any(row["implementation"] == name for row in rows)]
    for group, title in GROUPS.items():
        ours = [row for row in rows if row["group"] == group and row["implementation"] in ("jaxkd", "fused")]
        if ours:
            console.print(_time_table(title, rows, ours, others), end="\n\n")
    if memory:
        heading = f"Memory with the gradient at {memory[0]['size']}, by the compiler: GB (ratio)"
        table = timing.table(heading, "loss", "dtype")
        for column in ("plain", "fused", "plain, between", "fused, between"):
            table.add_column(column, justify="right")
        for plain, fused in _pairs(memory):
            cells = []
            for key in ("bytes", "temporary_bytes"):
                cells += [f"{plain[key] / 1e9:.2f}", f"{fused[key] / 1e9:.2f} ({plain[key] / fused[key]:.1f})"]
            table.add_row(plain["loss"], plain["dtype"], *cells)
        console.print(table)
        console.print("between: without arguments and results", end="\n\n")


def plot(rows: Sequence[dict], path: Path, *, other: str, title: str) -> None:
    """Draws how many times as long another implementation takes, a line a loss."""
    ours = [row for row in rows if row["implementation"] in ("jaxkd", "fused") and find(rows, row, other)]
    lines = list(dict.fromkeys((row["group"], *_label(row)) for row in ours))
    with draw(path, 8, 2 + 0.19 * len(lines)) as figure:
        axes = figure.subplots()
        for kind, shift, fill in (("forward", -0.18, "white"), ("both", 0.18, None)):
            for i, (group, *label) in enumerate(lines):
                row = next(row for row in ours if _label(row) == tuple(label) and row["pass"] == kind)
                colour, found = COLOURS[list(GROUPS).index(group)], ratio(rows, row, other)
                if found:
                    spread = [[found.median - found.low], [found.high - found.median]]
                    style = {"color": colour, "mfc": fill or colour, "ms": 4.5, "lw": 1}
                    axes.errorbar(found.median, i + shift, xerr=spread, fmt="o", **style)
        axes.axvline(1, color="black", lw=0.8)
        axes.set_yticks(range(len(lines)), [", ".join(label) for _, *label in lines], fontsize=7)
        axes.set(ylim=(len(lines) - 0.4, -0.6), xscale="log", xlabel=f"time of {other} PyTorch ÷ time of jaxkd")
        timing.log_ticks(axes.xaxis)
        axes.grid(visible=False, axis="y")
        _legend(figure, [group for group, *_ in lines])
        figure.suptitle(title, fontsize=8, color="#555555")


def main(config: Config) -> None:
    """Times, compares and reports."""
    folder = beside_torch.begin(config)
    torch, notes = load_torch()
    rows = measure(config, torch)
    memory = full_size_memory(config)
    sentences = conclude(rows, memory)
    found = {"summary": sentences, "notes": notes, "rows": rows, "full_size_memory": memory}
    setting = beside_torch.write_results(folder, config, torch, found, rounds=config.repeats)
    print_tables(rows, memory)
    if torch:
        other = "eager" if torch.cannot_compile else "compiled"
        plot(rows, folder / "loss_benchmark.png", other=other, title=setting)
    print(setting, *notes, *sentences, f"Everything is in {folder}", sep="\n")


def _measure(case: Case, repeats: int, torch: Torch | None) -> list[dict]:
    names = {"group": case.group, "loss": case.name, "size": case.size, "dtype": case.dtype}
    found = list(jax_calls(case))
    if torch:
        found += [(*one, call, torch.peak_bytes(call)) for *one, call in torch.calls(case)]
    rows = [names | {"implementation": one, "pass": kind, "bytes": memory} for one, kind, _, memory in found]
    rounds = list(beside_torch.time_rounds([call for *_, call, _ in found], repeats, torch))
    return [row | {"seconds": seconds} for row, seconds in zip(rows, np.transpose(rounds).tolist(), strict=True)]


def _logits(states: jax.Array, kernel: jax.Array, teacher_states: jax.Array, teacher_kernel: jax.Array) -> Any:
    return states @ kernel, teacher_states @ teacher_kernel


def _pairs(memory: Sequence[dict]) -> Iterator[tuple[dict, dict]]:
    """Plain and fused, of one loss and dtype."""
    return zip(memory[::2], memory[1::2], strict=True)


def _mean(rows: Sequence[dict], ours: Sequence[dict], kind: str, other: str) -> str:
    found = [ratio(rows, row, other) for row in ours if row["pass"] == kind]
    return f"{math.exp(np.mean([math.log(one.median) for one in found if one])):.2f}"


def _label(row: dict) -> tuple[str, str]:
    return ("fused_" if row["implementation"] == "fused" else "") + row["loss"], row["size"]


def _time_table(title: str, rows: Sequence[dict], ours: Sequence[dict], others: Sequence[str]) -> Table:
    """A line a loss and pass."""
    counted = [other for other in others[-1:] if any(row["bytes"] for row in rows if row["implementation"] == other)]
    heading = f"{title}: milliseconds a call" + (", and times PyTorch ÷ jaxkd: median (quartiles)" if others else "")
    table = timing.table(heading, "loss", "size", "pass")
    for column in (
        "jaxkd",
        *others,
        *(f"{other} ÷ jaxkd" for other in others[-1:]),
        "MB",
        *(f"MB {x}" for x in counted),
    ):
        table.add_column(column, justify="right")
    for row in ours:
        times = [_milliseconds(one) for one in (row, *(find(rows, row, other) for other in others))]
        ratios = [str(ratio(rows, row, other) or "") for other in others[-1:]]
        memory = [_megabytes(one) for one in (row, *(find(rows, row, other) for other in counted))]
        table.add_row(*_label(row), row["pass"], *times, *ratios, *memory)
    return table


def _milliseconds(row: dict | None) -> str:
    return f"{1000 * np.median(row['seconds']):,.3f}" if row else ""


def _megabytes(row: dict | None) -> str:
    return f"{row['bytes'] / 1e6:,.1f}" if row and row["bytes"] else ""


def _legend(figure: "Figure", groups: Sequence[str]) -> None:
    """Colours are groups, and the loss alone is hollow."""
    from matplotlib.lines import Line2D

    colours = {
        GROUPS[group]: (colour, colour) for group, colour in zip(GROUPS, COLOURS, strict=False) if group in groups
    }
    styles = {PASSES["forward"]: ("#555555", "white"), PASSES["both"]: ("#555555", "#555555")} | colours
    dots = [
        Line2D([], [], marker="o", ls="", color=colour, mfc=fill, ms=5, label=label)
        for label, (colour, fill) in styles.items()
    ]
    figure.legend(handles=dots, loc="outside lower center", ncols=2, fontsize=8)


if __name__ == "__main__":
    cli.run(main, Config, __doc__, resumes=False)
