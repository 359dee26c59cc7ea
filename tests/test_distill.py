"""Plans run: what is learnt, what is kept, and the same bits after any interruption."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import checkpoints, distill, losses, models, runs
from jaxkd.distill import Stage


class MLP(nn.Module):
    """Wide or narrow, with dropout, so that every kind of draw takes part."""

    width: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(self.width)(x.astype(jnp.float32)))
        return nn.Dense(3)(nn.Dropout(0.1, deterministic=not train)(x))


def examples(seed, count):
    key = jax.random.key(seed)
    inputs = np.asarray(jax.random.normal(key, (count, 5)))
    return {"inputs": inputs, "labels": inputs[:, :3].argmax(-1).astype(np.int32)}


TRAIN, VALIDATION = examples(0, 90), examples(1, 40)


def hard(student, teachers, batch):
    return losses.hard_cross_entropy(student.logits, batch["labels"])


def soft(student, teachers, batch):
    each = [losses.kl_divergence(student.logits, teacher.logits, temperature=2.0) for teacher in teachers]
    return sum(each) / len(each)


def stage(name, width=4, **more):
    values = {"data": TRAIN, "loss": hard, "tx": optax.sgd(0.1, momentum=0.9), "steps": 40, "batch_size": 32}
    return Stage(name, models.from_linen(MLP(width)), **values | more)


def chain():
    return [
        stage("teacher", 32),
        stage(
            "assistant", 8, teachers=("teacher",), loss=soft, augment=lambda key, x: x + 0.1 * jax.random.normal(key)
        ),
        stage("student", 4, teachers=("teacher", "assistant"), loss=soft, cache_teachers=True),
        stage("longer", 4, start="student", teachers=("assistant",), loss=soft),
    ]


def run_in(folder, plan, seeds=(0, 1)):
    run = runs.open_run(folder, {})
    return distill.run_plan(plan, seeds, run, validation=VALIDATION), run


def bits(trained):
    return {name: [one.variables for one in seeds] for name, seeds in trained.items()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("unbroken"), chain())


def test_plan_teaches_and_measures(unbroken):
    trained, run = unbroken
    assert list(trained) == ["teacher", "assistant", "student", "longer"]
    rows = distill.measure(chain(), trained, VALIDATION, reference="teacher")
    assert [row["name"] for row in rows] == list(trained)
    for row in rows:
        assert row["accuracy"] == [one.validation_accuracy for one in trained[row["name"]]]
        assert row["accuracy_mean"] > 0.6
    assert rows[0]["agreement"] is None and rows[2]["agreement"] > 0.6
    records = run.metrics()
    assert [r["step"] for r in records if (r["stage"], r["seed"]) == ("student", 1)] == list(range(4, 41, 4))
    assert all(np.isfinite(r["loss"]) for r in records)


def test_seeds_differ_and_repeat(unbroken, tmp_path):
    trained, run = unbroken
    again, other = run_in(tmp_path, chain())
    chex.assert_trees_all_equal(bits(again), bits(trained))
    assert other.metrics() == run.metrics()
    kernels = [one.variables["params"]["Dense_0"]["kernel"] for one in trained["student"]]
    assert (kernels[0] != kernels[1]).any()


@pytest.mark.parametrize("dies_at", [1, 8, 22])
def test_interrupted_plan_ends_with_the_same_bits(unbroken, tmp_path, monkeypatch, dies_at):
    trained, run = unbroken
    monkeypatch.setattr(distill, "SAVE_EVERY", 0.0)
    saved, save = [], checkpoints.save

    def dying(*arguments, **keywords):
        save(*arguments, **keywords)
        saved.append(arguments)
        if len(saved) == dies_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, chain())
    resumed, resumed_run = run_in(tmp_path, chain())
    chex.assert_trees_all_equal(bits(resumed), bits(trained))
    assert resumed_run.metrics() == run.metrics()
    steps = [(str(folder), step) for folder, step, *_ in saved]
    assert len(steps) == len(set(steps)), "no step that had been saved was taken again"


def test_finished_stages_are_not_trained_again(unbroken):
    trained, run = unbroken

    def never(*arguments):
        raise AssertionError("traced")

    untouched = [dataclasses.replace(one, loss=never) for one in chain()]
    again, _ = run_in(run.folder, untouched)
    chex.assert_trees_all_equal(bits(again), bits(trained))
    assert {name: [one.seconds for one in seeds] for name, seeds in again.items()} == {
        name: [one.seconds for one in seeds] for name, seeds in trained.items()
    }


def test_damaged_result_is_trained_again_from_the_sound_one_before(unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "SAVE_EVERY", 0.0)
    plan = chain()[:1]
    _, run = run_in(tmp_path, plan, seeds=(0,))
    folder = run.checkpoints(0, "teacher")
    files = (path for path in (folder / "40").rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match="passed over"):
        resumed, _ = run_in(tmp_path, plan, seeds=(0,))
    chex.assert_trees_all_equal(resumed["teacher"][0].variables, unbroken[0]["teacher"][0].variables)


def test_other_stages_and_seeds_move_no_bit(unbroken, tmp_path):
    more = [stage("stranger"), *chain()[:1]]
    trained, _ = run_in(tmp_path, more, seeds=(1,))
    chex.assert_trees_all_equal(trained["teacher"][0].variables, unbroken[0]["teacher"][1].variables)


def test_cached_teachers_teach_the_same(tmp_path):
    live = [stage("teacher", 32), stage("student", teachers=("teacher",), loss=soft)]
    cached = [live[0], dataclasses.replace(live[1], cache_teachers=True)]
    (one, _), (other, _) = run_in(tmp_path / "live", live, (0,)), run_in(tmp_path / "cached", cached, (0,))
    chex.assert_trees_all_close(bits(one)["student"], bits(other)["student"], rtol=1e-4, atol=1e-5)


def test_start_takes_over_the_weights(tmp_path):
    still = {"tx": optax.sgd(0.0), "steps": 1}
    trained, _ = run_in(tmp_path, [stage("first"), stage("second", start="first", **still)], (0,))
    chex.assert_trees_all_equal(trained["second"][0].variables, trained["first"][0].variables)
    with pytest.raises(
        ValueError, match=r"'wide' cannot start from 'first': .*kernel.* is \(5, 4\) there and \(5, 8\)"
    ):
        run_in(tmp_path, [stage("first"), stage("wide", 8, start="first", **still)], (0,))


def test_divergence_stops_the_run_and_keeps_what_is_done(tmp_path):
    wild = stage("wild", tx=optax.sgd(1e30))
    with pytest.raises(runs.RunError, match="wild, seed 0: the loss is (nan|inf) at step .*smaller learning rate"):
        run_in(tmp_path, [stage("first"), wild], (0,))
    assert checkpoints.restore(tmp_path / "checkpoints" / "seed0" / "wild", {}) is None
    assert (tmp_path / "checkpoints" / "seed0" / "first" / "40.json").exists()
