"""FLOPs and bytes of the parts of a step, as XLA counts them in the compiled programs."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from experiments.benchmarks.step_cost.layers import Cost
from experiments.benchmarks.step_cost.pairs import Pair, distillation_loss, make_optimizer
from jaxkd import models


def count_parts(pair: Pair, batch_size: int) -> dict[str, Cost]:
    """Compiles each part of a step for a CPU and returns XLA's count.

    The iterations of a loop count once, and exponentials and the like not at all.
    """
    teacher, student = pair.models()
    batch = pair.shapes(batch_size)
    inputs = batch["inputs"]
    key = jax.random.key(0)
    teacher_variables, variables = (
        jax.eval_shape(model.init, key, inputs) for model in (teacher, student)
    )
    logits = jax.eval_shape(predict(teacher), teacher_variables, inputs)
    params = variables["params"]
    tx = make_optimizer()
    return {
        "teacher": count(predict(teacher), teacher_variables, inputs),
        "student": count(pull_back(student), variables, inputs, logits),
        "loss": count(loss_gradient, logits, logits, batch["labels"]),
        "optimizer": count(update(tx), params, jax.eval_shape(tx.init, params), params),
    }


def predict(model: models.Model) -> Callable[..., jax.Array]:
    """Makes the forward pass of a teacher."""
    return lambda variables, inputs: model.apply(variables, inputs, train=False)[0].logits


def pull_back(model: models.Model) -> Callable[..., Any]:
    """Makes the forward and backward pass of a student, given the gradient of its logits."""

    def gradients(variables: dict, inputs: Any, cotangent: jax.Array) -> Any:
        def forward(params: Any) -> tuple[jax.Array, dict]:
            outputs, batch_stats = model.apply(
                {**variables, "params": params}, inputs, train=True, key=jax.random.key(0)
            )
            return outputs.logits, batch_stats

        logits, pull, batch_stats = jax.vjp(forward, variables["params"], has_aux=True)
        return logits, pull(cotangent), batch_stats

    return gradients


def loss_gradient(student: jax.Array, teacher: jax.Array, labels: jax.Array) -> Any:
    """Computes the mean loss and its gradient with respect to the student's logits."""

    def mean_loss(logits: jax.Array) -> jax.Array:
        outputs = models.Outputs(logits, {})
        teachers = (models.Outputs(teacher, {}),)
        return distillation_loss(outputs, teachers, {"labels": labels}, None).mean()

    return jax.value_and_grad(mean_loss)(student)


def update(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Makes the optimizer's part of a step."""

    def apply(gradients: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return apply


def count(function: Callable[..., Any], *shapes: Any) -> Cost:
    """Compiles a function for a CPU and returns the FLOPs and bytes that XLA counts in it."""
    # Compilers for GPUs put convolutions into library calls, which XLA counts as nothing.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        costs = jax.jit(function).lower(*shapes).compile().cost_analysis() or {}
    return Cost(int(costs.get("flops", 0)), int(costs.get("bytes accessed", 0)))
