"""The losses that `experiments.benchmarks.losses` times, as cases for JAX and PyTorch.

They need neither tyro nor rich, so that `experiments.benchmarks.accelerator` measures the same
cases on machines without them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import beside_torch
from jaxkd import losses
from jaxkd.losses.fused import CHUNK_LOGITS

# Tokens, hidden units and vocabulary. The full size bounds the memory of a large language model;
# the small one is timed on a CPU.
FULL_SIZE = (8192, 4096, 128_256)
SMALL_SIZE = (512, 256, 16_384)
# Chunks of the fused losses at sizes where their default would be a single chunk.
CHUNKS = 4


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the arguments of the losses."""

    batch: int = 128
    """Examples per batch, for all losses except those on tokens."""
    classes: tuple[int, ...] = (10, 1000)
    """Numbers of classes; the losses on logits are timed at each of them."""
    tokens: int | None = None
    """Tokens; by default 8192 on a GPU and 512 on a CPU."""
    hidden: int | None = None
    """Size of the hidden states; by default 4096 on a GPU and 256 on a CPU."""
    vocabulary: int | None = None
    """Size of the vocabulary; by default 128256 on a GPU and 16384 on a CPU."""

    def token_sizes(self) -> tuple[int, ...]:
        """Returns tokens, hidden units and vocabulary, with the device's defaults filled in."""
        defaults = SMALL_SIZE if jax.default_backend() == "cpu" else FULL_SIZE
        options = (self.tokens, self.hidden, self.vocabulary)
        return tuple(
            default if option is None else option
            for option, default in zip(options, defaults, strict=True)
        )


class Case(NamedTuple):
    """A loss and the shapes of its arguments, the same in JAX and in PyTorch."""

    group: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the float arguments, the student's first."""
    keywords: dict[str, float] = {}
    student_arrays: int = 1
    """Number of leading arguments that are the student's; the gradient is taken to these."""
    classes: int = 0
    """If not 0, labels from this many classes are the last argument."""
    simplex: bool = False
    """True if the float arguments are probabilities."""

    @property
    def size(self) -> str:
        """The shape of the student's array, or tokens, hidden units and vocabulary."""
        shape = (
            (*self.shapes[0], self.shapes[1][-1])
            if self.group == "tokens"
            else self.shapes[self.student_arrays - 1]
        )
        return " × ".join(f"{n:,}" for n in shape)

    @property
    def dtype(self) -> str:
        """The dtype of the float arguments: float32, except for tokens on an accelerator."""
        # Large language models train in bfloat16, which CPUs compute slowly.
        on_cpu = jax.default_backend() == "cpu"
        return "bfloat16" if self.group == "tokens" and not on_cpu else "float32"

    def arrays(self) -> list[np.ndarray]:
        """Draws the arguments, the same at each call."""
        generator = np.random.default_rng(0)
        arrays: list[np.ndarray] = [
            generator.standard_normal(shape, np.float32) for shape in self.shapes
        ]
        if self.group == "tokens":
            # Scaled kernels give logits of standard deviation 1, whatever the hidden size.
            arrays[1::2] = [kernel / np.float32(math.sqrt(len(kernel))) for kernel in arrays[1::2]]
        if self.simplex:
            arrays = [np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in arrays]
        if self.classes:
            arrays.append(generator.integers(0, self.classes, self.shapes[0][:-1]))
        return arrays


def make_cases(sizes: Sizes) -> list[Case]:
    """Makes the cases in the order of the tables."""
    batch = sizes.batch
    cases: list[Case] = []
    for classes in sizes.classes:
        cases += _logit_cases(batch, classes)
    maps = ((batch, 8, 8, 64),) * 2
    embeddings = ((batch, 128),) * 2
    # Kernel, bias and raw variance of VID, which are trained together with the student.
    vid_shapes = ((64, 64), (64,), (64,), *maps)
    # The raw kernel of VkD, or the kernel of SRD, from 128 to 256 channels.
    vkd_shapes = ((128, 256), (batch, 128), (batch, 256))
    cases += [
        Case("features", "hint_loss", maps),
        Case("features", "attention_transfer_loss", maps),
        Case("features", "attention_transfer_mse_loss", maps),
        Case("features", "neuron_selectivity_loss", maps),
        # FSP relates two layers of each network.
        Case("features", "flow_of_solution_procedure_loss", maps * 2, student_arrays=2),
        Case("features", "variational_information_loss", vid_shapes, student_arrays=4),
        Case("features", "channel_wise_divergence", maps, {"temperature": 4.0}),
        Case("features", "class_attention_loss", maps, {"size": 4}),
        Case("features", "hierarchical_context_loss", maps),
        Case("features", "activation_boundary_loss", maps, {"margin": 1.0}),
        # Four segments.
        Case("features", "many_to_one_loss", ((batch, 8, 8, 256), maps[1])),
        Case("features", "factor_transfer_loss", maps),
        Case("features", "orthogonal_projection_loss", vkd_shapes, student_arrays=2),
        Case("features", "simple_recipe_loss", vkd_shapes, student_arrays=2),
        Case("features", "similarity_preserving_loss", maps),
        Case("features", "relational_distance_loss", embeddings),
        Case("features", "relational_angle_loss", embeddings),
        Case("features", "probabilistic_transfer_loss", embeddings),
        Case("features", "correlation_congruence_loss", embeddings),
        Case("features", "linear_cka_loss", embeddings),
        Case("features", "contrastive_loss", embeddings, {"temperature": 0.1}),
        # Each query of the batch with the documents of all.
        Case("features", "margin_mse_loss", ((batch, batch),) * 2),
        Case("features", "score_divergence_loss", ((batch, batch),) * 2, {"temperature": 2.0}),
    ]
    states = ((8, 128, 256),) * 2
    attention_weights = ((8, 4, 128, 128),) * 2
    values = ((8, 128, 4, 64),) * 2
    cases += [
        Case("transformer", "hidden_cosine_loss", states),
        Case("transformer", "hidden_mse_loss", states),
        Case("transformer", "attention_map_loss", attention_weights),
        Case("transformer", "attention_divergence_loss", attention_weights, simplex=True),
        Case("transformer", "value_relation_loss", values),
    ]
    tokens, hidden, vocabulary = sizes.token_sizes()
    layers = ((tokens, hidden), (hidden, vocabulary)) * 2
    cases += [Case("tokens", name, layers, student_arrays=2) for name in FUSED]
    return cases


def _logit_cases(batch: int, classes: int) -> list[Case]:
    pair = ((batch, classes),) * 2
    labels = {"classes": classes}
    softened = {"temperature": 4.0}
    return [
        Case("logits", "soft_cross_entropy", pair, softened),
        Case("logits", "kl_divergence", pair, softened),
        Case("logits", "reverse_kl_divergence", pair, softened),
        Case("logits", "jensen_shannon_divergence", pair, softened | {"beta": 0.5}),
        Case("logits", "logit_mse_loss", pair),
        Case("logits", "standardized_kl_divergence", pair, softened),
        Case("logits", "distillation_loss", pair, softened, **labels),
        Case("logits", "label_smoothing_loss", pair[:1], {"smoothing": 0.1}, **labels),
        Case("logits", "decoupled_loss", pair, softened | {"non_target_weight": 8.0}, **labels),
        Case("logits", "normalized_loss", pair, **labels),
        Case("logits", "enhanced_target_loss", pair, softened | {"exponent": 1.5}, **labels),
        Case("logits", "dist_loss", pair, softened),
        # Three teachers.
        Case("logits", "ensemble_kl_divergence", (pair[0], (3, *pair[0])), softened),
        Case("logits", "skewed_kl_divergence", pair, softened | {"skew": 0.1}),
        Case("logits", "skewed_reverse_kl_divergence", pair, softened | {"skew": 0.1}),
        Case("logits", "adaptive_kl_divergence", pair, softened | {"head": 0.5}),
        Case("logits", "alpha_beta_divergence", pair, softened | {"alpha": 0.2, "beta": 0.7}),
        Case("logits", "renyi_divergence", pair, softened | {"order": 2.0}),
        Case("logits", "total_variation_distance", pair, softened),
        Case("logits", "transformed_teacher_loss", pair, softened | {"weighted": True}),
        Case(
            "logits", "refined_logits_loss", pair, softened | {"correlation_weight": 8.0}, **labels
        ),
        Case("logits", "multi_level_loss", pair),
        # The teacher's vocabulary is twice the student's.
        Case("logits", "universal_logit_loss", (pair[0], (batch, 2 * classes))),
    ]


def standardized_kl_divergence(
    student: jax.Array, teacher: jax.Array, *, temperature: float
) -> jax.Array:
    """Computes the KL divergence of standardised logits."""
    student = losses.standardize_logits(student)
    teacher = losses.standardize_logits(teacher)
    return losses.kl_divergence(student, teacher, temperature=temperature)


def dist_loss(student: jax.Array, teacher: jax.Array, *, temperature: float) -> jax.Array:
    """Computes the sum of both terms of DIST."""
    inter = losses.dist_inter_loss(student, teacher, temperature=temperature)
    return inter + losses.dist_intra_loss(student, teacher, temperature=temperature)


def ensemble_kl_divergence(
    student: jax.Array, teachers: jax.Array, *, temperature: float
) -> jax.Array:
    """Computes the KL divergence from the average of several teachers."""
    ensemble = losses.ensemble_logits(teachers, temperature=temperature)
    return losses.kl_divergence(student, ensemble, temperature=temperature)


def variational_information_loss(
    kernel: jax.Array,
    bias: jax.Array,
    raw_variance: jax.Array,
    student: jax.Array,
    teacher: jax.Array,
) -> jax.Array:
    """Computes VID from its parameters as separate arguments."""
    params = {"kernel": kernel, "bias": bias, "raw_variance": raw_variance}
    return losses.variational_information_loss(params, student, teacher)


def orthogonal_projection_loss(
    raw_kernel: jax.Array, student: jax.Array, teacher: jax.Array
) -> jax.Array:
    """Computes VkD from its parameter as an argument."""
    return losses.orthogonal_projection_loss({"raw_kernel": raw_kernel}, student, teacher)


def simple_recipe_loss(kernel: jax.Array, student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Computes SRD from its kernel as an argument."""
    # The normalisation removes any bias.
    bias = jnp.zeros(kernel.shape[1])
    return losses.simple_recipe_loss({"kernel": kernel, "bias": bias}, student, teacher)


def linear_kl_divergence(*layers: jax.Array) -> jax.Array:
    """Computes the KL divergence of the logits of a last layer."""
    return losses.kl_divergence(*_last_layer_logits(*layers), temperature=1.0)


def linear_reverse_kl_divergence(*layers: jax.Array) -> jax.Array:
    """Computes the reverse KL divergence of the logits of a last layer."""
    return losses.reverse_kl_divergence(*_last_layer_logits(*layers), temperature=1.0)


def linear_jensen_shannon_divergence(*layers: jax.Array) -> jax.Array:
    """Computes the Jensen–Shannon divergence of the logits of a last layer."""
    logits = _last_layer_logits(*layers)
    return losses.jensen_shannon_divergence(*logits, temperature=1.0, beta=0.5)


COMPOSED = {
    function.__name__: function
    for function in (
        standardized_kl_divergence,
        dist_loss,
        ensemble_kl_divergence,
        variational_information_loss,
        orthogonal_projection_loss,
        simple_recipe_loss,
        linear_kl_divergence,
        linear_reverse_kl_divergence,
        linear_jensen_shannon_divergence,
    )
}
FUSED = {
    "linear_kl_divergence": functools.partial(losses.fused_linear_kl_divergence, temperature=1.0),
    "linear_reverse_kl_divergence": functools.partial(
        losses.fused_linear_reverse_kl_divergence, temperature=1.0
    ),
    "linear_jensen_shannon_divergence": functools.partial(
        losses.fused_linear_jensen_shannon_divergence, temperature=1.0, beta=0.5
    ),
}


def jax_losses(case: Case) -> dict[str, Callable]:
    """Makes functions that return the mean of jaxkd's loss and, for tokens, of the fused loss."""
    # COMPOSED comes first: the losses with parameters exist in both.
    values_fn = functools.partial(
        COMPOSED.get(case.name) or getattr(losses, case.name), **case.keywords
    )
    means = {"jaxkd": lambda *arrays: values_fn(*arrays).mean()}
    if case.group == "tokens":
        tokens, vocabulary = case.shapes[0][0], case.shapes[1][1]
        # At small sizes the default chunk holds all tokens, which would time the loss unchunked.
        chunk = None if tokens * vocabulary > CHUNK_LOGITS else max(1, tokens // CHUNKS)
        means["fused"] = lambda *arrays: FUSED[case.name](*arrays, chunk_size=chunk).mean()
    return means


def jax_calls(case: Case) -> Iterator[tuple[str, str, Callable[[], Any], int]]:
    """Yields implementation, pass, a call, and the bytes that the compiled program needs."""
    dtypes = [case.dtype] * len(case.shapes) + ["int32"] * bool(case.classes)
    arrays = [jnp.asarray(x, dtype) for x, dtype in zip(case.arrays(), dtypes, strict=True)]
    for implementation, mean_loss in jax_losses(case).items():
        gradient = jax.value_and_grad(mean_loss, tuple(range(case.student_arrays)))
        for pass_name, function in (("forward", mean_loss), ("both", gradient)):
            # Only a program that is compiled ahead of time reports its memory.
            program = jax.jit(function).lower(*arrays).compile()
            call = functools.partial(program, *arrays)
            yield implementation, pass_name, call, sum(program_bytes(program))


def program_bytes(program: Any) -> tuple[int, int]:
    """Returns the bytes of a program's temporaries, and those of its arguments and results."""
    sizes = program.memory_analysis()
    return sizes.temp_size_in_bytes, sizes.argument_size_in_bytes + sizes.output_size_in_bytes


class TorchLosses(beside_torch.TorchBackend):
    """The losses in PyTorch."""

    def __init__(self) -> None:
        from experiments.benchmarks import torch_losses

        super().__init__(torch_losses)

    def calls(self, case: Case) -> Iterator[tuple[str, str, Callable[[], Any]]]:
        """Yields implementation, pass and a call."""
        # torch.compile gives up on a function after a few input sizes unless it is reset.
        self.torch.compiler.reset()
        inputs = [self.torch.from_numpy(x).to(self.device) for x in case.arrays()]
        inputs = [
            x.to(getattr(self.torch, case.dtype)) if x.is_floating_point() else x for x in inputs
        ]
        for tensor in inputs[: case.student_arrays]:
            tensor.requires_grad_()
        loss = functools.partial(getattr(self.counterparts, case.name), **case.keywords)
        versions = {"eager": loss}
        if not self.compile_error:
            # Fixed shapes, as jit compiles for fixed shapes too.
            versions["compiled"] = self.torch.compile(lambda *inputs: loss(*inputs), dynamic=False)
        for implementation, function in versions.items():
            yield implementation, "forward", functools.partial(self._forward, function, inputs)
            both = functools.partial(self.run_both, function, inputs, case)
            yield implementation, "both", both

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Returns the peak memory of a call on a GPU, arguments included; `None` on a CPU."""
        if self.device == "cpu":
            return None
        # The first call compiles, which needs memory of its own.
        call()
        self.torch.cuda.reset_peak_memory_stats()
        call()
        return self.torch.cuda.max_memory_allocated()

    def _forward(self, function: Callable, inputs: Sequence[Any]) -> Any:
        with self.torch.no_grad():
            return function(*inputs)

    def run_both(self, function: Callable, inputs: Sequence[Any], case: Case) -> Any:
        """Returns the value of a loss and its gradients with respect to the student's arrays."""
        student_arrays = inputs[: case.student_arrays]
        # PyTorch would otherwise add to the gradients of the call before.
        for tensor in student_arrays:
            tensor.grad = None
        value = function(*inputs)
        value.backward()
        return value.detach(), [tensor.grad for tensor in student_arrays]


def _last_layer_logits(
    states: jax.Array, kernel: jax.Array, teacher_states: jax.Array, teacher_kernel: jax.Array
) -> Any:
    return states @ kernel, teacher_states @ teacher_kernel
