"""Many students at once learn what each would learn alone, whatever devices they are divided over."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill, losses, models, runs
from jaxkd.distill import Stage
from jaxkd.models.layers import BatchNorm
from jaxkd.runs import checkpoints


class Net(nn.Module):
    """With dropout and batch statistics, so that every kind of draw and state takes part."""

    width: int

    @nn.compact
    def __call__(self, x, train):
        x = BatchNorm(use_running_average=not train)(nn.Dense(self.width)(x.astype(jnp.float32)))
        return nn.Dense(3)(nn.Dropout(0.1, deterministic=not train)(nn.relu(x)))


def examples(seed, count):
    inputs = np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)
    return {"inputs": inputs, "labels": inputs[:, :3].argmax(-1).astype(np.int32)}


TRAIN, VALIDATION = examples(0, 45), examples(1, 20)


def hard(student, teachers, batch, context):
    return losses.hard_cross_entropy(student.logits, batch["labels"])


def soft(student, teachers, batch, context):
    taught = losses.kl_divergence(
        student.logits, teachers[0].logits, temperature=batch["temperature"]
    )
    return taught + 0.01 * (context.params**2).sum()


def plan(**more):
    values = {"tx": optax.sgd(0.1, momentum=0.9), "steps": 10, "batch_size": 15}
    teacher = Stage("teacher", models.from_linen(Net(8)), TRAIN, hard, **values)
    student = Stage(
        "first",
        models.from_linen(Net(4)),
        TRAIN,
        soft,
        teachers=("teacher",),
        init_loss=lambda key: jax.random.normal(key, (2,)),
        **values | {"augment": lambda key, x: x + 0.1 * jax.random.normal(key, x.shape)} | more,
    )

    def own(temperature):
        return lambda seed: examples(seed + 10, 45) | {"temperature": np.float32(temperature)}

    return [
        teacher,
        *(
            dataclasses.replace(
                student, name=f"T{one}", data=TRAIN | {"temperature": np.float32(one)}
            )
            for one in (1, 4)
        ),
        dataclasses.replace(student, name="own", data=own(2.0)),
    ]


def train(folder, placement, stages, **more):
    run = runs.open_run(folder, {})
    return distill.run_plan(
        stages, range(3), run, validation=VALIDATION, placement=placement, **more
    ), run


def population(size, devices=1):
    return distill.VectorizedPlacement(distill.make_mesh(devices=jax.devices()[:devices]), size)


def weights(trained):
    return {name: [one.variables for one in seeds] for name, seeds in trained.items()}


def by_student(run):
    return sorted(
        run.metrics(), key=lambda record: (record["stage"], record["seed"], record["step"])
    )


def assert_same_course(run, other):
    for one, same in zip(by_student(run), by_student(other), strict=True):
        assert one.keys() == same.keys()
        for name in one:
            assert one[name] == (
                pytest.approx(same[name], rel=1e-4) if isinstance(one[name], float) else same[name]
            )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(tmp_path_factory.mktemp("alone"), None, plan())


@pytest.mark.parametrize(("size", "devices"), [(4, 1), (9, 8)])
def test_students_learn_what_each_learns_alone(alone, tmp_path, size, devices):
    trained, run = train(tmp_path, population(size, devices), plan())
    assert list(trained) == list(alone[0]) == ["teacher", "T1", "T4", "own"]
    chex.assert_trees_all_close(weights(trained), weights(alone[0]), rtol=1e-5, atol=1e-5)
    assert_same_course(run, alone[1])
    kernels = {
        np.asarray(one.variables["params"]["Dense_0"]["kernel"]).tobytes()
        for seeds in trained.values()
        for one in seeds
    }
    assert len(kernels) == 12, "every student has weights of its own"


def test_cached_teachers_are_those_of_each_seed(tmp_path):
    def stages():
        return plan(cache_teachers=True, augment=None)

    expected, _ = train(tmp_path / "alone", None, stages())
    trained, _ = train(tmp_path / "at_once", population(9, 2), stages())
    chex.assert_trees_all_close(weights(trained), weights(expected), rtol=1e-5, atol=1e-5)


def test_loop_on_the_device_takes_the_same_steps(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(distill.VectorizedPlacement, "steps_per_call", 4)
    trained, run = train(tmp_path, population(9, 2), plan())
    chex.assert_trees_all_close(weights(trained), weights(alone[0]), rtol=1e-5, atol=1e-5)
    assert_same_course(run, alone[1])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return train(tmp_path_factory.mktemp("unbroken"), population(9), plan(steps=4))


@pytest.mark.parametrize("dies_at", [5, 17])
def test_killed_population_ends_with_the_same_numbers(unbroken, tmp_path, monkeypatch, dies_at):
    expected, run = unbroken
    saved, save = [], checkpoints.save

    def dying(folder, step, *arguments, **keywords):
        save(folder, step, *arguments, **keywords)
        saved.append(step)
        if len(saved) == dies_at:
            raise SystemExit("killed")

    monkeypatch.setattr(checkpoints, "save", dying)
    with pytest.raises(SystemExit):
        train(tmp_path, population(9), plan(steps=4), save_every=0)
    resumed, resumed_run = train(tmp_path, population(9), plan(steps=4), save_every=0)
    # To rounding alone: those that a kill left a step behind catch up in a population of their own.
    chex.assert_trees_all_close(weights(resumed), weights(expected), rtol=1e-5, atol=1e-5)
    assert_same_course(resumed_run, run)
    assert len(saved) == 3 * 10 + 9 * 4, "no step that had been saved was taken again"


def test_finished_alone_counts_as_trained(alone, tmp_path):
    folder = alone[1].folder
    trained, _ = train(folder, population(9), plan())
    chex.assert_trees_all_equal(weights(trained), weights(alone[0]))


def test_stages_that_differ_in_numbers_alone_compile_once(tmp_path):
    counted = chex.assert_max_traces(
        lambda s, t, batch, context: batch["scale"] * hard(s, t, batch, context), n=1
    )
    first = Stage(
        "first", models.from_linen(Net(4)), TRAIN, counted, optax.sgd(0.1), 2, batch_size=15
    )
    stages = [
        dataclasses.replace(first, name=f"s{one}", data=TRAIN | {"scale": np.float32(one)})
        for one in range(1, 4)
    ]
    trained, _ = train(tmp_path, None, stages)
    kernels = [one[0].variables["params"]["Dense_1"]["kernel"] for one in trained.values()]
    assert np.abs(kernels[0] - kernels[2]).max() > 1e-4


def test_numbers_have_no_length(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"'first' needs `inputs` and arrays of the same length, at least 1, got .* \{\}",
    ):
        Stage("first", models.from_linen(Net(4)), {"scale": 2.0}, hard, optax.sgd(0.1), 2)


def test_population_of_nobody_is_refused():
    with pytest.raises(ValueError, match="max_students must be at least 1, got 0"):
        population(0)
