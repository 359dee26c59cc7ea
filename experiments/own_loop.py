"""Distils a Flax NNX network in a training loop of your own: optax, one loss and nothing else.

Question: how much code does distillation need? A teacher learns from all 9,000 images. Two small
networks see 1,000 images with their labels, and one of them also learns from the teacher's logits.

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


def mean_loss(model, images, labels, teacher_logits=None):
    """Computes the mean loss of a batch, with or without a teacher."""
    logits = model(images)
    if teacher_logits is None:
        return losses.hard_cross_entropy(logits, labels).mean()
    loss = losses.distillation_loss(logits, teacher_logits, labels, temperature=4.0, alpha=0.9)
    return loss.mean()


@nnx.jit
def train_step(model, optimizer, *batch):
    """Updates the model in place."""
    optimizer.update(model, nnx.grad(mean_loss)(model, *batch))


def train(model, *examples, steps, seed):
    """Trains a model on images, labels and, for a student, the teacher's logits."""
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        indices = rng.integers(len(examples[0]), size=128)
        train_step(model, optimizer, *(array[indices] for array in examples))
    return model


def main(num_seeds=3, steps=300):
    """Trains teacher and students for each seed and prints their test accuracy."""
    train_split, _, test, _ = data.load("fashion_mnist_mini")
    predict = nnx.jit(lambda model, images: model(images))
    rows = []
    for seed in range(num_seeds):
        teacher = train(CNN(32, nnx.Rngs(seed)), *train_split, steps=steps, seed=seed)
        few = data.balanced_subset(train_split.labels, 1000, jax.random.key(seed))
        images, labels = train_split.images[few], train_split.labels[few]
        # Computed once for all images, and from then on part of the examples.
        logits = np.asarray(predict(teacher, images))
        alone = train(CNN(8, nnx.Rngs(seed)), images, labels, steps=steps, seed=seed)
        distilled = train(CNN(8, nnx.Rngs(seed)), images, labels, logits, steps=steps, seed=seed)
        classes = [predict(net, test.images).argmax(-1) for net in (teacher, alone, distilled)]
        rows.append([100 * np.mean(predicted == test.labels) for predicted in classes])
    for name, *values in zip(("teacher", "student alone", "distilled"), *rows, strict=True):
        print(f"{name}: {np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} %")


if __name__ == "__main__":
    main()
