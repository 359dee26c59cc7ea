"""Small networks, data and plans that the tests of `jaxkd.distill` share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill, losses, models, runs
from jaxkd.models.layers import BatchNorm
from jaxkd.runs import checkpoints


class Net(nn.Module):
    """A hidden layer, with batch norm and dropout for tests in which they must take part."""

    width: int = 4
    dropout: float = 0.0
    batch_norm: bool = False

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(self.width)(x.astype(jnp.float32))
        if self.batch_norm:
            x = BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
        return models.Outputs(nn.Dense(3)(x), {"hidden": x})


@functools.cache
def make_model(width=4, dropout=0.0, batch_norm=False):
    """Makes a model, the identical one each time: stages of one program need the same model."""
    return models.from_linen(Net(width, dropout, batch_norm))


def make_examples(seed, count):
    """Makes examples whose label is the largest of the first three inputs."""
    inputs = np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)
    return {"inputs": inputs, "labels": inputs[:, :3].argmax(-1).astype(np.int32)}


# No number of devices divides the number of examples, and a batch of 16 spans two epochs.
TRAIN = make_examples(0, 45)
VALIDATION = make_examples(1, 20)
TX = optax.sgd(0.1, momentum=0.9)
"""One object, because optax compares its optimizers by identity."""


def hard_loss(student, teachers, batch, context):
    return losses.hard_cross_entropy(student.logits, batch["labels"])


def soft_loss(student, teachers, batch, context):
    """Returns the mean divergence from the teachers."""
    divergences = [
        losses.kl_divergence(student.logits, teacher.logits, temperature=2.0)
        for teacher in teachers
    ]
    return sum(divergences) / len(divergences)


def add_noise(key, inputs):
    return inputs + 0.1 * jax.random.normal(key, inputs.shape)


def make_stage(name, width=4, *, dropout=0.0, batch_norm=False, **options):
    """Makes a stage of 12 steps that learns from the labels. Options replace its attributes."""
    defaults = {
        "model": make_model(width, dropout, batch_norm),
        "data": TRAIN,
        "loss": hard_loss,
        "tx": TX,
        "steps": 12,
        "batch_size": 16,
    }
    return distill.Stage(name, **defaults | options)


def train(folder, plan, seeds=(0,), *, config=None, grow=False, **options):
    """Returns the trained models by name and the run."""
    run = runs.open_run(folder, config or {}, grow=grow)
    options = {"validation": VALIDATION} | options
    return distill.run_plan(plan, seeds, run, **options), run


def get_variables(trained):
    return {name: [model.variables for model in seeds] for name, seeds in trained.items()}


def get_losses(run, stage, seed=0):
    """Returns the recorded losses of a training, in the order of its steps."""
    records = [r for r in run.metrics() if (r["stage"], r["seed"]) == (stage, seed)]
    return [record["loss"] for record in records]


def assert_record_close(record, expected, rtol):
    """Compares two records of `metrics.jsonl`, with numbers in dicts of teachers and terms."""
    leaves, expected_leaves = map(jax.tree_util.tree_leaves_with_path, (record, expected))
    assert [path for path, _ in leaves] == [path for path, _ in expected_leaves]
    for (path, value), (_, other) in zip(leaves, expected_leaves, strict=True):
        if isinstance(other, float):
            other = pytest.approx(other, rel=rtol)
        assert value == other, jax.tree_util.keystr(path)


def kill_at_save(monkeypatch, number):
    """Ends the process, as a kill would, behind a save. Returns the list of saves, which grows."""
    saves, save = [], checkpoints.save

    def save_and_die(folder, step, *args, **kwargs):
        save(folder, step, *args, **kwargs)
        saves.append((str(folder), step))
        if len(saves) == number:
            raise SystemExit("killed")

    monkeypatch.setattr(checkpoints, "save", save_and_die)
    return saves


def train_with_kill(monkeypatch, folder, make_plan, number, **options):
    """Trains a plan that is killed behind a save, resumes it, and returns what the second leaves.

    Returns:
        The trained models, the run, and the saves of both runs.
    """
    saves = kill_at_save(monkeypatch, number)
    options = {"save_every": 0} | options
    with pytest.raises(SystemExit):
        train(folder, make_plan(), **options)
    trained, run = train(folder, make_plan(), **options)
    return trained, run, saves


def mesh_placement(num_devices):
    return distill.MeshPlacement(distill.make_mesh(devices=jax.devices()[:num_devices]))


def vectorized_placement(max_students=4, num_devices=2):
    mesh = distill.make_mesh(devices=jax.devices()[:num_devices])
    return distill.VectorizedPlacement(mesh, max_students)


PLACEMENTS = {
    "one device": lambda: mesh_placement(1),
    "mesh of 8": lambda: mesh_placement(8),
    "pmap": distill.PmapPlacement,
    "vectorized": vectorized_placement,
}


def run_error(folder, plan, **options):
    """Returns the message of the error in which a plan ends, and checks that it is one line."""
    with pytest.raises((runs.RunError, ValueError)) as caught:
        train(folder, plan, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) <= 300
    return message


@functools.cache
def make_trained():
    """Makes what a plan returns of a stage, with weights that are not trained."""
    variables = make_model().init(jax.random.key(0), TRAIN["inputs"])
    return [distill.TrainedModel(variables, 0.0, 0.5)]
