"""Distils a Flax NNX network in a training loop of your own: optax, one loss and nothing else.

Question: how much code does distillation need, if you have your own network and loop?

The teacher learns from all 9,000 images. Two small networks see 1,000 images with their labels. One
of them also learns from the teacher's logits.

Paper: Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531

Command: python -m experiments.own_loop

Result: TODO

Time: 1 minute on 2 CPU cores
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxkd import data, losses


class CNN(nnx.Module):
    """Two convolutions and a dense layer, for uint8 images `[B, 28, 28, 1]` of ten classes."""

    def __init__(self, channels, rngs):
        self.conv1 = nnx.Conv(1, channels, (5, 5), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(channels, 2 * channels, (3, 3), strides=2, rngs=rngs)
        self.logits = nnx.Linear(7 * 7 * 2 * channels, 10, rngs=rngs)

    def __call__(self, images):
        """Computes the logits `[B, 10]`."""
        x = nnx.relu(self.conv1(images.astype(jnp.float32) / 255))
        x = nnx.relu(self.conv2(x))
        return self.logits(x.reshape(len(x), -1))


def train(model, images, labels, teacher_logits=None, *, steps, seed):
    """Returns a trained copy of a model, distilled if there are the logits of a teacher."""
    graphdef, params = nnx.split(model)
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    opt_state = tx.init(params)

    def mean_loss(params, images, labels, teacher_logits):
        logits = nnx.merge(graphdef, params)(images)
        if teacher_logits is None:
            return losses.hard_cross_entropy(logits, labels).mean()
        return losses.distillation_loss(
            logits, teacher_logits, labels, temperature=4.0, alpha=0.9
        ).mean()

    @jax.jit
    def step(params, opt_state, *batch):
        updates, opt_state = tx.update(jax.grad(mean_loss)(params, *batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    rng = np.random.default_rng(seed)
    for _ in range(steps):
        # The teacher ran once on all images, so that a step only looks its logits up.
        indices = rng.integers(len(images), size=128)
        batch_logits = None if teacher_logits is None else teacher_logits[indices]
        params, opt_state = step(params, opt_state, images[indices], labels[indices], batch_logits)
    return nnx.merge(graphdef, params)


def main(num_seeds=3, steps=300):
    """Trains teacher and students for each seed and prints their test accuracy."""
    train_split, _, test, _ = data.load("fashion_mnist_mini")
    predict = nnx.jit(lambda model, images: model(images))
    accuracies = {"teacher": [], "student alone": [], "student distilled": []}
    for seed in range(num_seeds):
        teacher = train(CNN(32, nnx.Rngs(seed)), *train_split, steps=steps, seed=seed)
        few = data.balanced_subset(train_split.labels, 1000, jax.random.key(seed))
        images, labels = train_split.images[few], train_split.labels[few]
        logits = np.asarray(predict(teacher, images))
        alone = train(CNN(8, nnx.Rngs(seed)), images, labels, steps=steps, seed=seed)
        distilled = train(CNN(8, nnx.Rngs(seed)), images, labels, logits, steps=steps, seed=seed)
        for name, model in zip(accuracies, (teacher, alone, distilled), strict=True):
            correct = predict(model, test.images).argmax(-1) == test.labels
            accuracies[name].append(100 * float(correct.mean()))
    for name, values in accuracies.items():
        print(f"{name}: {np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} %")


if __name__ == "__main__":
    main()
