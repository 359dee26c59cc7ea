"""Losses, networks and a small plan: the device's numbers beside a CPU's.

Values and gradients are computed in float32 on the device and, in a process of its own, on the CPU
of the same machine with exact float32 products. The figure is the largest difference of an array
relative to the largest number in it.
"""

import contextlib
import functools
import hashlib
import pickle
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments import USER_XLA_FLAGS
from experiments.benchmarks import loss_cases, training_cases
from experiments.benchmarks.accelerator.measurement import Context, Outcome
from experiments.benchmarks.training_cases import Network, Settings
from jaxkd import distill, losses, models, runs
from jaxkd._files import write_atomically

EXACT = "highest"
"""The matmul precision that computes float32 products in float32."""


class Options(NamedTuple):
    """Options of the measurement.

    Attributes:
        precisions: Matmul precisions of the device.
        batch: Examples of the losses and networks.
        tokens: Tokens, hidden units and vocabulary of the losses on tokens.
        networks: Name, class and arguments of each network, and whether it reads texts.
        steps: Steps of each stage of the plan.
        only: Names of the losses to compare among those that `experiments.benchmarks.losses`
            times; empty for all, and the other ones.
    """

    precisions: tuple[str, ...] = ("default", EXACT)
    batch: int = 128
    tokens: tuple[int, int, int] = (256, 128, 4096)
    networks: tuple[tuple[str, str, tuple, bool], ...] = (
        ("cnn", *training_cases.SMALL_CNN[:2], False),
        ("resnet20", *training_cases.RESNET_20[:2], False),
        ("lstm", *training_cases.LSTM[:2], True),
    )
    steps: int = 20
    only: tuple[str, ...] = ()


TINY = Options(
    batch=4,
    tokens=(6, 4, 9),
    networks=(("cnn", "CNN", ((2,), 4), False),),
    steps=2,
    only=("kl_divergence", "linear_kl_divergence"),
)


def measure(options: Options, context: Context) -> Outcome:
    """Compares the device with the CPU."""
    # The CPU computes meanwhile.
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(find_reference, options, context)
        computed = {precision: compute(options, precision) for precision in options.precisions}
        reference = pending.result()
    differences = {
        precision: {
            name: relative_difference(arrays, reference[name]) for name, arrays in parts.items()
        }
        for precision, parts in computed.items()
    }
    largest = {
        precision: max(parts.items(), key=lambda item: item[1])
        for precision, parts in differences.items()
    }
    summary = ", ".join(
        f"{value:.1e} at precision {precision} ({name})"
        for precision, (name, value) in largest.items()
    )
    return Outcome(f"largest relative difference {summary}", 1, {"differences": differences})


def find_reference(options: Options, context: Context) -> dict[str, list[np.ndarray]]:
    """Returns what a CPU computes, which measurements with other flags of the device share."""
    identity = repr(options._replace(precisions=()))
    path = context.shared / f"cpu_{hashlib.sha256(identity.encode()).hexdigest()[:12]}.pickle"
    if not path.is_file():
        reference = context.call_apart(
            compute, options, EXACT, JAX_PLATFORMS="cpu", XLA_FLAGS=USER_XLA_FLAGS
        )
        write_atomically(path, pickle.dumps(reference))
    return pickle.loads(path.read_bytes())


def compute(options: Options, precision: str) -> dict[str, list[np.ndarray]]:
    """Computes values and gradients by the name of the loss, network or plan."""
    with jax.default_matmul_precision(precision):
        functions = make_functions(options)
        parts = {
            name: jax.tree.leaves(jax.device_get(jax.jit(function)(*arrays)))
            for name, (function, arrays) in functions.items()
        }
        return parts | {"plan": train_plan(options)}


def relative_difference(arrays: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """Returns the largest difference of an array, relative to the largest number in it."""
    differences = []
    for array, expected in zip(arrays, reference, strict=True):
        scale = np.abs(expected).max(initial=0)
        difference = np.abs(array - expected).max(initial=0)
        # NaN compares as larger than nothing, but must not get lost.
        relative = difference if scale == 0 else difference / scale
        differences.append(float("inf") if np.isnan(relative) else float(relative))
    return max(differences)


def make_functions(options: Options) -> dict[str, tuple[Callable, tuple]]:
    """Makes functions that return value and gradient, with their arguments, by name."""
    functions: dict[str, tuple[Callable, tuple]] = {}
    tokens, hidden, vocabulary = options.tokens
    sizes = loss_cases.Sizes(
        batch=options.batch, classes=(10,), tokens=tokens, hidden=hidden, vocabulary=vocabulary
    )
    for case in loss_cases.make_cases(sizes):
        if options.only and case.name not in options.only:
            continue
        arrays = tuple(case.arrays())
        for implementation, mean_loss in loss_cases.jax_losses(case).items():
            name = "fused_" * (implementation == "fused") + case.name
            # The gradient is that with respect to the student.
            gradient = jax.value_and_grad(mean_loss, tuple(range(case.student_arrays)))
            functions[name] = (gradient, arrays)
    other_losses = {} if options.only else make_other_losses(options.batch)
    for name, (loss, arrays) in other_losses.items():
        mean_loss = functools.partial(_mean, loss)
        functions[name] = (jax.value_and_grad(mean_loss), arrays)
    for name, kind, arguments, on_texts in options.networks:
        functions[name] = _make_network_gradient(
            Network(kind, arguments), on_texts=on_texts, batch=options.batch
        )
    return functions


def make_other_losses(batch: int) -> dict[str, tuple[Callable, tuple]]:
    """Makes the losses that `experiments.benchmarks.losses` does not time, with arguments."""
    generator = np.random.default_rng(1)

    def draw(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, np.float32)

    labels = generator.integers(0, 10, batch)
    token_labels = generator.integers(0, 20, (batch, 8))
    key = jax.random.key(0)
    bank = losses.init_bank(key, batch + 32, 16)
    negatives = generator.integers(batch, batch + 32, (batch, 16))
    aligned = losses.init_aligned_states(key, 12, 12)
    calibration = losses.init_semantic_calibration(key, (4, 6), (4, 6), 8)
    generation = losses.init_masked_generation(key, 4, 6)
    review = losses.init_review(key, (4, 6), (4, 6), 5)
    paraphraser = losses.init_paraphraser(key, 4, 2)
    maps, wider = draw(batch, 6, 6, 4), draw(batch, 6, 6, 6)
    layers = losses.skip_layers(2, 4)
    logits = draw(batch, 10), draw(batch, 10)
    kept = losses.top_k(logits[1], k=3)
    sampled = losses.sample_classes(key, logits[1], count=5)
    embedding, bias = jax.random.normal(key, (10, 6)), jax.random.normal(key, (10,))
    head = losses.LinearHead(embedding, bias=bias, softcap=30.0, is_embedding=True)
    on_logits = {
        "batch_correlation_loss": losses.batch_correlation_loss,
        "class_correlation_loss": losses.class_correlation_loss,
    }
    on_a_part = {
        "sparse_soft_cross_entropy": losses.sparse_soft_cross_entropy,
        "sparse_kl_divergence": losses.sparse_kl_divergence,
        "sparse_jensen_shannon_divergence": functools.partial(
            losses.sparse_jensen_shannon_divergence, beta=0.5
        ),
    }
    return {
        **{name: (loss, logits) for name, loss in on_logits.items()},
        **{
            name: (lambda student, loss=loss: loss(student, kept), logits[:1])
            for name, loss in on_a_part.items()
        },
        "sampled_cross_entropy": (
            lambda student: losses.sampled_cross_entropy(student, sampled),
            logits[:1],
        ),
        "hard_cross_entropy": (losses.hard_cross_entropy, (draw(batch, 10), labels)),
        "token_distillation_loss": (
            functools.partial(losses.token_distillation_loss, where=token_labels > 1),
            (draw(batch, 8, 20), draw(batch, 8, 20), token_labels),
        ),
        "contrastive_bank_loss": (
            lambda student, teacher: losses.contrastive_bank_loss(
                bank, student, teacher, np.arange(batch), negatives
            ),
            (draw(batch, 16), draw(batch, 16)),
        ),
        "aligned_states_loss": (
            lambda student, teacher: losses.aligned_states_loss(aligned, student, teacher),
            (draw(batch, 8, 12), draw(batch, 8, 12)),
        ),
        "semantic_calibration_loss": (
            lambda student, other, *teachers: losses.semantic_calibration_loss(
                calibration, [student, other], list(teachers)
            ),
            (maps, wider, draw(*maps.shape), draw(*wider.shape)),
        ),
        "masked_generation_loss": (
            lambda student, teacher: losses.masked_generation_loss(
                generation, key, student, teacher, masked_fraction=0.5
            ),
            (maps, draw(*wider.shape)),
        ),
        "review_loss": (
            lambda student, other, *teachers: losses.review_loss(
                review, [student, other], list(teachers)
            ),
            (maps, wider, draw(*maps.shape), draw(*wider.shape)),
        ),
        "paraphraser_loss": (
            lambda teacher: losses.paraphraser_loss(paraphraser, teacher),
            (draw(*maps.shape),),
        ),
        "layers_loss": (
            lambda student, teacher: losses.layers_loss(
                losses.hidden_mse_loss, student, teacher, layers=layers
            ),
            (draw(2, batch, 8, 12), draw(4, batch, 8, 12)),
        ),
        "nested_loss": (
            lambda student, teacher: losses.nested_loss(
                losses.hidden_cosine_loss, student, teacher, dims=(4, 16)
            ),
            (draw(batch, 16), draw(batch, 16)),
        ),
        "sequence_reverse_kl_loss": (
            functools.partial(losses.sequence_reverse_kl_loss, where=token_labels > 1),
            (draw(batch, 8), draw(batch, 8)),
        ),
        "fused_linear_distillation_loss": (
            lambda student, teacher: losses.fused_linear_distillation_loss(
                student, head, teacher, head, labels, chunk_size=max(1, batch // 4)
            ),
            (draw(batch, 6), draw(batch, 6)),
        ),
        "fused_linear_cross_entropy": (
            lambda states: losses.fused_linear_cross_entropy(states, head, labels),
            (draw(batch, 6),),
        ),
        "fused_linear_sparse_kl_divergence": (
            lambda states: losses.fused_linear_sparse_kl_divergence(states, head, kept),
            (draw(batch, 6),),
        ),
    }


def _mean(loss: Callable[..., Any], *arrays: Any) -> jax.Array:
    return loss(*arrays).mean()


def _make_network_gradient(
    network: Network, *, on_texts: bool, batch: int
) -> tuple[Callable, tuple]:
    """Makes a function of params and a batch: cross-entropy in training mode, and its gradient."""
    settings = Settings(batch_size=batch, text_batch_size=batch)
    case = training_cases.Case("", network, on_texts=on_texts)
    arrays = training_cases.make_batch(case, settings)
    model = training_cases.jax_model(network, bf16=False)
    # NumPy arrays, so that device and CPU get the same bits.
    variables = draw_like(jax.eval_shape(model.init, jax.random.key(0), arrays["inputs"]))

    def mean_loss(params: Any, inputs: Any, labels: Any) -> jax.Array:
        outputs, _ = model.apply({**variables, "params": params}, inputs, train=True)
        return losses.hard_cross_entropy(outputs.logits, labels).mean()

    return jax.value_and_grad(mean_loss), (variables["params"], *arrays.values())


def draw_like(shapes: Any) -> Any:
    """Draws weights of these shapes with a standard deviation of one over the root of the fan-in.

    Scales of normalisations, biases and statistics are near 1, 0, 0 and 1.
    """
    generator = np.random.default_rng(2)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        noise = generator.standard_normal(leaf.shape, np.float32)
        if leaf.ndim > 1:
            return noise / np.float32(np.sqrt(leaf.size / leaf.shape[-1]))
        return np.float32("scale" in name or "var" in name) + np.float32(0.01) * np.abs(noise)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def train_plan(options: Options) -> list[np.ndarray]:
    """Trains a teacher and a student from its cached logits, and returns the student's weights."""
    generator = np.random.default_rng(3)
    images = generator.standard_normal((8 * options.batch, 16, 16, 3), np.float32)
    examples = {"inputs": images, "labels": generator.integers(0, 10, len(images))}
    model = models.from_linen(models.CNN(features=(4,), hidden=8))

    def stage(name: str, **attributes: Any) -> distill.Stage:
        return distill.Stage(
            name,
            model,
            examples,
            training_cases.label_or_distillation_loss,
            optax.sgd(0.01, momentum=0.9),
            steps=options.steps,
            batch_size=options.batch,
            **attributes,
        )

    plan = (stage("teacher"), stage("student", teachers=("teacher",), cache_teachers=True))
    with tempfile.TemporaryDirectory() as folder:
        run = runs.open_run(Path(folder) / "run", {})
        # The log takes the lines of the plan.
        with contextlib.redirect_stdout(sys.stderr):
            trained = distill.run_plan(plan, [0], run, validation=examples, evaluations=1)
        (student,) = trained["student"]
        return jax.tree.leaves(jax.device_get(student.variables["params"]))
