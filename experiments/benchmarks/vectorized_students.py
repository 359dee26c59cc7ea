"""Students of one architecture that each take a step, as one vectorised program."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from experiments.benchmarks import training_cases
from experiments.benchmarks.training_cases import LEARNING_RATE, MOMENTUM, Network, jax_model
from jaxkd import distill


def students_call(network: Network, students: int, batch_size: int) -> Callable[[], Any]:
    """Makes a function in which students train, and which returns the losses [K, P] of K steps."""
    student = jax_model(network, bf16=False)
    tx = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    make_step = functools.partial(
        distill.make_train_step, student, tx, training_cases.label_or_distillation_loss
    )
    batch = training_cases.make_images(batch_size)
    placement = make_placement(students)
    init = jax.jit(student.init)
    states = placement.put_states(
        [
            distill.init_train_state(init(jax.random.key(i), batch["inputs"]), tx)
            for i in range(students)
        ]
    )
    # The students share the arrays, which `put_examples` recognises by their identity.
    arrays = {name: placement.put_array(array) for name, array in batch.items()}
    examples = placement.put_examples([(arrays, distill.BatchInfo())] * students)
    teachers = placement.put_teachers([()] * students)
    keys = placement.put_keys([jax.random.key(i) for i in range(students)])
    multi_step = placement.make_multi_step(make_step)
    shape = (placement.steps_per_call, students, batch_size)
    # Every step of every student trains on the same batch.
    indices = np.broadcast_to(np.arange(batch_size), shape)

    def call() -> jax.Array:
        # The step donates the states, so each call must continue from those returned before.
        nonlocal states
        states, values = multi_step(states, examples, indices, teachers, keys)
        return values["loss"]

    return call


def make_placement(students: int) -> distill.Placement:
    """Returns the placement on all devices of one student, or of several vectorised ones."""
    mesh = distill.make_mesh()
    if students == 1:
        return distill.MeshPlacement(mesh)
    return distill.VectorizedPlacement(mesh, students)
