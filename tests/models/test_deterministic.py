"""No training step of a model with pooling has the operation that deterministic GPUs refuse."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from jaxkd import data, distill, losses, models

MODELS = {
    "cnn": models.CNN(),
    "plain4": models.plain4(),
    "vgg8": models.vgg8(),
    "resnet18": models.resnet18(),
}


def lower_step_for_gpus(module):
    """Lowers a training step for GPUs; returns the program as it goes to XLA's compiler."""
    model = models.from_linen(module)
    tx = optax.sgd(0.1)

    def loss(student, teachers, batch, context):
        return losses.distillation_loss(
            student.logits, teachers[0].logits, batch["labels"], temperature=4.0, alpha=0.5
        )

    images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((4,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(model.init, key, images)
    state = jax.eval_shape(lambda variables: distill.init_train_state(variables, tx), variables)
    step = distill.make_train_step(model, tx, loss, teachers=[model], augment=data.crop_and_flip)
    batch = {"inputs": images, "labels": labels}
    return step.trace(state, batch, (variables,), key).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.thorough
@pytest.mark.parametrize("name", MODELS)
def test_no_gradient_needs_select_and_scatter(name):
    assert "select_and_scatter" not in lower_step_for_gpus(MODELS[name])


def test_flax_pooling_would_need_it():
    class Pooled(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(10)(nn.max_pool(nn.Conv(4, (3, 3))(x), (2, 2), (2, 2)).mean((1, 2)))

    assert "select_and_scatter" in lower_step_for_gpus(Pooled())
