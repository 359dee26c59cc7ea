"""The networks of `experiments.benchmarks.training`, and calls that train or run them.

They need neither tyro nor rich, so that `experiments.benchmarks.accelerator` measures the same
calls on machines without them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import beside_torch
from jaxkd import distill, losses, models

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
class Settings:
    """Sizes of the batches, and the precision of both sides."""

    batch_size: int = 128
    """Images per step."""
    text_batch_size: int = 32
    """Texts per step."""
    compile: bool = False
    """Also time torch.compile, which on a CPU takes minutes to compile a large network."""
    bf16: bool = False
    """Compute in bfloat16 on both sides, with float32 weights and losses; for GPUs."""


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


def make_batch(case: Case, settings: Settings) -> dict[str, np.ndarray]:
    """Draws the inputs and labels of a case."""
    return (
        make_texts(settings.text_batch_size) if case.on_texts else make_images(settings.batch_size)
    )


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


def jax_call(case: Case, settings: Settings) -> tuple[Callable[[], Any], int]:
    """Makes a function that trains or runs the student, and returns it with its steps per call."""
    if case.trains:
        return training_call(*make_training(case, settings))
    inputs = jnp.asarray(make_batch(case, settings)["inputs"])
    student = jax_model(case.student, bf16=settings.bf16)
    variables = jax.jit(student.init)(jax.random.key(0), inputs)
    # Without the features, which PyTorch's networks do not return either.
    infer = jax.jit(
        lambda variables, inputs: student.apply(variables, inputs, train=False)[0].logits
    )
    return lambda: infer(variables, inputs), 1


class Training(NamedTuple):
    """A training step, and what it is called with.

    Attributes:
        step: `(state, *arguments) -> (state, metrics)`, which donates the state.
        state: The state before the first step.
        arguments: Batch, variables of the teachers, and key.
    """

    step: Any
    state: distill.TrainState
    arguments: tuple


def make_training(case: Case, settings: Settings) -> Training:
    """Makes the training step of a case, with weights drawn at random."""
    batch = jax.tree.map(jnp.asarray, make_batch(case, settings))
    student = jax_model(case.student, bf16=settings.bf16)
    teachers = [jax_model(case.teacher, bf16=settings.bf16)] if case.teacher else []
    return make_step(student, batch, label_or_distillation_loss, teachers)


def make_step(
    student: models.Model,
    batch: distill.Batch,
    loss: distill.LossFn,
    teachers: Sequence[models.Model] = (),
) -> Training:
    """Makes a training step.

    Args:
        student: The model to train.
        batch: Inputs and labels.
        loss: As of a stage: `(student, teachers, batch, context) -> [B]`.
        teachers: Models of the teachers, whose weights are drawn at random.
    """
    variables, *teacher_variables = (
        jax.jit(model.init)(jax.random.key(i), batch["inputs"])
        for i, model in enumerate((student, *teachers))
    )
    tx = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    step = distill.make_train_step(student, tx, loss, teachers=teachers)
    # Passed as arguments, because jit would embed arrays of a closure as constants.
    arguments = (batch, tuple(teacher_variables), jax.random.key(2))
    return Training(step, distill.init_train_state(variables, tx), arguments)


def training_call(
    step: Any, state: distill.TrainState, arguments: tuple
) -> tuple[Callable[[], Any], int]:
    """Makes a function that trains on one batch again and again.

    Args:
        step: See `Training`, whose attributes these are.
        state: The state before the first step.
        arguments: The other arguments of the step.

    Returns:
        The function, and how many steps it takes per call: one on a CPU and a scan of several on an
        accelerator, the faster form on each.
    """
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

    def calls(self, case: Case, settings: Settings) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Yields implementation and a function of one step."""
        for version in TORCH_VERSIONS[: 1 + settings.compile]:
            # torch.compile gives up on a function after a few input sizes unless it is reset.
            self.torch.compiler.reset()
            yield version, self.make_call(case, settings, compiles=version == "compiled")

    def make_call(self, case: Case, settings: Settings, *, compiles: bool) -> Callable[[], Any]:
        """Makes a function of one step."""
        batch = make_batch(case, settings)
        side = self.counterparts
        student, inputs = side.place(self.network(case.student), batch["inputs"], self.device)
        if not case.trains:
            return side.make_inference(student, inputs, compiles=compiles, bf16=settings.bf16)
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
            bf16=settings.bf16,
        )

    def network(self, network: Network) -> Any:
        """Makes a network with random weights."""
        return getattr(self.counterparts, network.name)(*network.arguments)
