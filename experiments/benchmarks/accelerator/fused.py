"""Losses on tokens from hidden states: time and peak memory, fused, plain and in PyTorch.

Each loss and implementation has a process of its own, because a device reports its peak since the
process began. Value and gradients with respect to the student's states and kernel are computed.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import beside_torch, loss_cases, timing
from experiments.benchmarks.accelerator.measurement import Context, Outcome
from experiments.benchmarks.accelerator.process import ProcessError
from experiments.benchmarks.loss_cases import Case, TorchLosses

IMPLEMENTATIONS = {"fused": "fused", "plain": "jaxkd"}
"""Implementations of jaxkd, and their names in `loss_cases.jax_losses`."""
TORCH = "torch"
DISTINCT_COLUMNS = 2004
"""Columns of the kernels that are drawn. They are repeated, since times do not depend on values."""


class Options(NamedTuple):
    """Options of the measurement.

    Attributes:
        losses: Names of losses on tokens.
        tokens: Number of tokens.
        hidden: Size of the hidden states.
        vocabulary: Size of the vocabulary.
        dtype: Dtype of states and kernels.
        rounds: Number of timed samples.
    """

    losses: tuple[str, ...] = (
        "linear_jensen_shannon_divergence",
        "linear_kl_divergence",
        "linear_reverse_kl_divergence",
    )
    tokens: int = loss_cases.FULL_SIZE[0]
    hidden: int = loss_cases.FULL_SIZE[1]
    vocabulary: int = loss_cases.FULL_SIZE[2]
    dtype: str = "bfloat16"
    rounds: int = 7


TINY = Options(("linear_jensen_shannon_divergence",), 16, 8, 40, "float32", 2)


def measure(options: Options, context: Context) -> Outcome:
    """Measures every loss in every implementation."""
    rows = []
    has_torch = importlib.util.find_spec("torch") is not None
    implementations = (*IMPLEMENTATIONS, TORCH) if has_torch else tuple(IMPLEMENTATIONS)
    for loss in options.losses:
        for implementation in implementations:
            row = context.once(
                f"{loss}_{implementation}",
                lambda loss=loss, name=implementation: _measure_apart(options, context, loss, name),
            )
            rows.append({"loss": loss, "implementation": implementation, **row})
            print(f"  {loss} {implementation}: {_describe(row)}", flush=True)
    first = options.losses[0]
    parts = [f"{row['implementation']} {_describe(row)}" for row in rows if row["loss"] == first]
    return Outcome(f"{first}: {', '.join(parts)}", options.rounds, {"rows": rows})


def _measure_apart(
    options: Options, context: Context, loss: str, implementation: str
) -> dict[str, Any]:
    function = measure_torch if implementation == TORCH else measure_jaxkd
    try:
        return context.call_apart(function, options, loss, implementation)
    # Such as a lack of memory, which is a result for the plain losses.
    except ProcessError as error:
        return _make_row(error=str(error))


def measure_jaxkd(options: Options, loss: str, implementation: str) -> dict[str, Any]:
    """Times an implementation of jaxkd, and reads its peak memory from device and compiler."""
    case = make_case(options, loss)
    mean_loss = loss_cases.jax_losses(case)[IMPLEMENTATIONS[implementation]]
    arrays = [jnp.asarray(block, options.dtype) for block in make_blocks(case)]
    repeat = jax.jit(_repeat_columns, static_argnums=1)
    arrays = [repeat(array, shape[-1]) for array, shape in zip(arrays, case.shapes, strict=True)]
    program = jax.jit(jax.value_and_grad(mean_loss, (0, 1))).lower(*arrays).compile()
    seconds = time_call(lambda: program(*arrays), options.rounds)
    statistics = jax.devices()[0].memory_stats() or {}
    return _make_row(
        seconds=seconds,
        peak_bytes=statistics.get("peak_bytes_in_use"),
        planned_bytes=sum(loss_cases.program_bytes(program)),
    )


def measure_torch(options: Options, loss: str, implementation: str) -> dict[str, Any]:
    """Times the plain loss in eager PyTorch, and reads its peak memory on a GPU."""
    del implementation
    torch, notes = beside_torch.load_torch(TorchLosses)
    if torch is None:
        return _make_row(error=notes[0])
    case = make_case(options, loss)
    arrays = []
    for block, shape in zip(make_blocks(case), case.shapes, strict=True):
        columns = torch.torch.arange(shape[-1], device=torch.device) % block.shape[-1]
        tensor = torch.torch.from_numpy(block).to(torch.device, getattr(torch.torch, options.dtype))
        arrays.append(tensor[:, columns])
    for tensor in arrays[: case.student_arrays]:
        tensor.requires_grad_()
    function = getattr(torch.counterparts, loss)
    call = lambda: torch.run_both(function, arrays, case)  # noqa: E731  (one line is clearest)
    seconds = time_call(call, options.rounds, wait=torch.wait)
    return _make_row(seconds=seconds, peak_bytes=torch.peak_bytes(call))


def make_case(options: Options, loss: str) -> Case:
    """Makes the case of a loss at the options' size."""
    layer = ((options.tokens, options.hidden), (options.hidden, options.vocabulary))
    return Case("tokens", loss, layer * 2, student_arrays=2)


def make_blocks(case: Case) -> list[np.ndarray]:
    """Draws states, and the distinct columns of kernels."""
    shapes = tuple(
        (rows, min(columns, DISTINCT_COLUMNS) if i % 2 else columns)
        for i, (rows, columns) in enumerate(case.shapes)
    )
    return case._replace(shapes=shapes).arrays()


def time_call(
    call: Callable[[], Any], rounds: int, wait: Callable[[Any], Any] = jax.block_until_ready
) -> list[float]:
    """Returns the seconds of a call in each round."""
    return [seconds for (seconds,) in timing.time_rounds([call], rounds, wait=wait)]


def _repeat_columns(block: jax.Array, count: int) -> jax.Array:
    return block[:, jnp.arange(count) % block.shape[1]]


def _make_row(
    *,
    seconds: list[float] | None = None,
    peak_bytes: int | None = None,
    planned_bytes: int | None = None,
    error: str | None = None,
) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "peak_bytes": peak_bytes,
        "planned_bytes": planned_bytes,
        "error": error,
    }


def _describe(row: dict[str, Any]) -> str:
    if row["seconds"] is None:
        return "not measured"
    text = f"{1e3 * np.median(row['seconds']):.1f} ms"
    num_bytes = row["peak_bytes"] or row["planned_bytes"]
    return text if num_bytes is None else f"{text} and {num_bytes / 1e9:.2f} GB"
