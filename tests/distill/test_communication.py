"""The devices of a step exchange the gradient and their batch, and vectorised students nothing."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses
from jaxkd.distill import placement as placement_module
from small_plans import TRAIN, TX, make_model, mesh_placement, soft_loss, vectorized_placement

BATCH_SIZE = 16
WIDTH = 8
NUM_PARAMETERS = (5 + 1) * WIDTH + (WIDTH + 1) * 3
COLLECTIVE = re.compile(
    r" = (\(?[^()]*\)?) "
    r"(all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter)"
    r"(?:-start)?\("
)


def relational_loss(student, teachers, batch, context):
    """Compares the hidden layers of all examples with each other."""
    return losses.relational_distance_loss(
        student.features["hidden"], teachers[0].features["hidden"]
    )


def compile_step(monkeypatch, placement, loss, *, num_students=1):
    """Returns the compiled program of one step."""
    programs = []

    def repeat_step(take_step, *_):
        def repeat(states, examples, indices, teachers, keys):
            step = jax.jit(take_step)
            lowered = step.lower(states, examples, indices[0], teachers, keys)
            programs.append(lowered.compile().as_text())
            return states, {"loss": jnp.zeros(indices.shape[:-1])}

        return repeat

    monkeypatch.setattr(placement_module, "repeat_step", repeat_step)
    model = make_model(WIDTH)
    states = []
    for seed in range(num_students):
        variables = model.init(jax.random.key(seed), TRAIN["inputs"][:1])
        states.append(distill.init_train_state(variables, TX))
    teacher = model.init(jax.random.key(num_students), TRAIN["inputs"][:1])
    make_step = functools.partial(distill.make_train_step, model, TX, loss, teachers=[model])
    placement.make_multi_step(make_step)(
        placement.put_states(states),
        placement.put_examples([(TRAIN, distill.BatchInfo())] * num_students),
        np.zeros((1, num_students, BATCH_SIZE), int),
        placement.put_teachers([(teacher,)] * num_students),
        placement.put_keys([jax.random.key(seed) for seed in range(num_students)]),
    )
    (program,) = programs
    return program


def find_collectives(program):
    """Returns the shapes that each kind of collective operation leaves on every device.

    All of their elements have 4 bytes.
    """
    found = {}
    for types, kind in COLLECTIVE.findall(program):
        for dtype, dimensions in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", types):
            assert dtype in ("f32", "s32", "u32")
            shape = tuple(map(int, filter(None, dimensions.split(","))))
            found.setdefault(kind, []).append(shape)
    return found


def count_bytes(shapes):
    return sum(4 * math.prod(shape) for shape in shapes)


def test_one_device_communicates_with_none(monkeypatch):
    assert not find_collectives(compile_step(monkeypatch, mesh_placement(1), soft_loss))


@pytest.mark.parametrize("num_devices", [2, 4, 8])
def test_devices_exchange_the_gradient_and_their_batch(monkeypatch, num_devices):
    program = compile_step(monkeypatch, mesh_placement(num_devices), soft_loss)
    found = find_collectives(program)
    assert found.keys() == {"all-reduce", "all-gather"}
    # The gradient, the mean loss, and the inputs, each of which one device holds.
    expected = 4 * NUM_PARAMETERS + 4 + 4 * BATCH_SIZE * 5
    assert count_bytes(found["all-reduce"]) == expected
    # The indices of the batch, by which the inputs are found.
    assert count_bytes(found["all-gather"]) == 4 * BATCH_SIZE


def test_copied_examples_are_not_exchanged(monkeypatch):
    placement = dataclasses.replace(mesh_placement(4), max_copied_bytes=TRAIN["inputs"].nbytes)
    found = find_collectives(compile_step(monkeypatch, placement, soft_loss))
    assert found.keys() == {"all-reduce"}
    assert count_bytes(found["all-reduce"]) == 4 * NUM_PARAMETERS + 4


def test_loss_that_compares_examples_gathers_what_it_compares(monkeypatch):
    found = find_collectives(compile_step(monkeypatch, mesh_placement(4), relational_loss))
    # The indices, and the hidden layers of student and teacher.
    hidden = (BATCH_SIZE, WIDTH)
    assert sorted(found["all-gather"]) == [(BATCH_SIZE, 1), hidden, hidden]
    # The gradient of the student's hidden layer comes back. Neither network runs on other examples
    # than those of its device, so that no logits are exchanged.
    of_batch = {shape for shape in found["all-reduce"] if shape[:1] == (BATCH_SIZE,)}
    assert of_batch == {(BATCH_SIZE, 5), hidden, (BATCH_SIZE,)}


def test_vectorized_students_exchange_nothing(monkeypatch):
    program = compile_step(monkeypatch, vectorized_placement(4, 4), soft_loss, num_students=4)
    assert not find_collectives(program)
