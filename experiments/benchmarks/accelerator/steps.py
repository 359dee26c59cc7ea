"""Distillation steps beside PyTorch: images a second, and the share of the device's peak.

jaxkd takes several steps in one call, as a plan does on an accelerator; PyTorch takes one a call,
eager and compiled, in channels_last. Both may multiply float32 in TF32. The first call, which
compiles, is timed apart.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.benchmarks import beside_torch, training_cases
from experiments.benchmarks.accelerator.measurement import Context, Outcome
from experiments.benchmarks.accelerator.peaks import roofline_share
from experiments.benchmarks.timing import Ratio
from experiments.benchmarks.training_cases import Case, Network, Settings, TorchTraining
from jaxkd import models
from jaxkd._messages import first_line

_SMALL_BERT = Network(
    "BERT", (training_cases.VOCABULARY, 8, 1, 2, 12), {"pooling": models.mean_pooling}
)
_SMALL_LSTM = Network("LSTMClassifier", (training_cases.VOCABULARY, 4, (5, 6), 7))
PAIRS = {
    case.name: case
    for case in (
        *(case for case in training_cases.CASES if case.teacher),
        Case("distil_lstm", training_cases.LSTM, training_cases.MINILM, on_texts=True),
        Case("tiny_cnn", Network("CNN", ((4,), 4)), Network("CNN", ((8,), 4))),
        Case("tiny_lstm", _SMALL_LSTM, _SMALL_BERT, on_texts=True),
    )
}
"""Pairs of student and teacher by name."""


class Options(NamedTuple):
    """Options of the measurement.

    Attributes:
        bf16: Computes in bfloat16 on both sides.
        pairs: Names of `PAIRS`.
        batch_size: Images per step.
        text_batch_size: Texts per step.
        rounds: Rounds; each times everything once.
        torch_versions: Forms of PyTorch to time.
    """

    bf16: bool
    pairs: tuple[str, ...] = ("distil_cnn", "distil_resnet20", "distil_wrn16_2", "distil_lstm")
    batch_size: int = 128
    text_batch_size: int = 32
    rounds: int = 11
    torch_versions: tuple[str, ...] = training_cases.TORCH_VERSIONS


def tiny(bf16: bool) -> Options:
    """Returns options with which a CPU takes seconds."""
    pairs = ("tiny_cnn",) if bf16 else ("tiny_cnn", "tiny_lstm")
    # torch.compile takes a minute on a CPU.
    return Options(bf16, pairs, 4, 3, rounds=3, torch_versions=("eager",))


def measure(options: Options, context: Context) -> Outcome:
    """Times every pair."""
    # A program from the cache would be loaded, not compiled, and its seconds are reported.
    settings: Any = jax.config
    settings.update("jax_enable_compilation_cache", False)
    torch, notes = beside_torch.load_torch(TorchTraining)
    if torch is not None:
        torch.torch.set_float32_matmul_precision("high")
    pairs = {}
    for name in options.pairs:
        pairs[name] = context.once(name, lambda name=name: measure_pair(name, options, torch))
        print(f"  {name}: {_describe(pairs[name])}", flush=True)
    summary = "; ".join(f"{name} {_describe(pair)}" for name, pair in pairs.items())
    return Outcome(summary, options.rounds, {"pairs": pairs, "notes": notes})


def measure_pair(name: str, options: Options, torch: TorchTraining | None) -> dict[str, Any]:
    """Times a step of a pair, and compares it with what the device could do at most."""
    case = PAIRS[name]
    settings = Settings(options.batch_size, options.text_batch_size, bf16=options.bf16)
    training = training_cases.make_training(case, settings)
    cost = read_cost(training)
    call, steps = training_cases.training_call(*training)
    calls, first_seconds, errors = [call], [_seconds(call, torch)], {}
    names = ["jaxkd"]
    for version in options.torch_versions if torch else ():
        assert torch is not None
        try:
            # torch.compile gives up on a function after a few input sizes unless it is reset.
            torch.torch.compiler.reset()
            torch_call = torch.make_call(case, settings, compiles=version == "compiled")
            seconds = _seconds(torch_call, torch)
        # The type depends on the cause: no C compiler, no Triton, an unsupported Python.
        except Exception as error:
            errors[version] = first_line(error)
            continue
        names.append(version)
        calls.append(torch_call)
        first_seconds.append(seconds)
    rounds = np.array(list(beside_torch.time_rounds(calls, options.rounds, torch)))
    rounds[:, 0] /= steps
    seconds = dict(zip(names, rounds.T.tolist(), strict=True))
    batch_size = len(training.arguments[0]["labels"])
    median = float(np.median(seconds["jaxkd"]))
    return {
        "batch": batch_size,
        "steps_per_call": steps,
        "seconds": seconds,
        "per_second": {name: batch_size / float(np.median(seconds[name])) for name in names},
        "ratios": {name: Ratio.of(seconds[name], seconds["jaxkd"]) for name in names[1:]},
        "first_call_seconds": dict(zip(names, first_seconds, strict=True)),
        "errors": errors,
        **cost,
        "roofline_share": roofline_share(
            jax.devices()[0].device_kind,
            flops=cost["flops"],
            num_bytes=cost["bytes"],
            seconds=median,
            bf16=options.bf16,
        ),
    }


def read_cost(training: training_cases.Training) -> dict[str, float]:
    """Returns the operations and the bytes of a step, by XLA.

    A compiled program of a GPU calls libraries, whose operations XLA does not count. They are those
    of the program before it is compiled, which has all of them. The bytes are those of the compiled
    program, because operations that are fused leave nothing in memory.
    """
    lowered = training.step.lower(training.state, *training.arguments)
    before = _read_analysis(lowered.cost_analysis())
    compiled = _read_analysis(lowered.compile().cost_analysis())
    return {
        "flops": before.get("flops", 0.0),
        "compiled_flops": compiled.get("flops", 0.0),
        "bytes": compiled.get("bytes accessed", 0.0),
    }


def _read_analysis(analysis: Any) -> dict[str, float]:
    # Older versions of JAX return one for each program.
    return (analysis[0] if isinstance(analysis, list) else analysis) or {}


def _seconds(call: Callable[[], Any], torch: TorchTraining | None) -> float:
    start = time.perf_counter()
    result = call()
    (torch.wait if torch else jax.block_until_ready)(result)
    return time.perf_counter() - start


def _describe(pair: dict[str, Any]) -> str:
    """Describes a pair: examples a second, and the times of PyTorch divided by jaxkd's."""
    parts = [f"{pair['per_second']['jaxkd']:,.0f}/s"]
    parts += [f"{name} ÷ jaxkd {Ratio(*ratio)}" for name, ratio in pair["ratios"].items()]
    if pair["roofline_share"] is not None:
        parts.append(f"{pair['roofline_share']:.1%} of the roofline")
    return ", ".join(parts)
