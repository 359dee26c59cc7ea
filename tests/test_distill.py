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


def run_in(folder, plan, seeds=(0, 1), **options):
    run = runs.open_run(folder, {})
    return distill.run_plan(plan, seeds, run, validation=VALIDATION, **options), run


def bits(trained):
    return {name: [one.variables for one in seeds] for name, seeds in trained.items()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("unbroken"), chain())


def test_plan_teaches_and_measures(unbroken):
    trained, run = unbroken
    assert list(trained) == ["teacher", "assistant", "student", "longer"]
    rows = distill.results(chain(), trained, VALIDATION, reference="teacher")
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


@pytest.mark.parametrize("dies_at", [57, 130])
def test_killed_plan_ends_with_the_same_bits(unbroken, tmp_path, monkeypatch, dies_at):
    trained, run = unbroken
    saved, save = [], checkpoints.save

    def dying(folder, step, *arguments, **keywords):
        save(folder, step, *arguments, **keywords)
        saved.append((str(folder), step))
        if len(saved) == dies_at:
            raise SystemExit("killed")

    monkeypatch.setattr(checkpoints, "save", dying)
    with pytest.raises(SystemExit):
        run_in(tmp_path, chain(), (0,), save_every=0)
    resumed, resumed_run = run_in(tmp_path, chain(), (0,), save_every=0)
    chex.assert_trees_all_equal(bits(resumed), {name: seeds[:1] for name, seeds in bits(trained).items()})
    assert resumed_run.metrics() == [record for record in run.metrics() if record["seed"] == 0]
    assert len(saved) == len(set(saved)) == 4 * 40, "no step that had been saved was taken again"


def test_evaluations_are_as_many_as_asked_and_move_no_bit(unbroken, tmp_path):
    trained, run = unbroken
    thrice, other = run_in(tmp_path, chain(), evaluations=3)
    chex.assert_trees_all_equal(bits(thrice), bits(trained))
    records = {(r["stage"], r["seed"], r["step"]): r for r in other.metrics()}
    assert sorted(step for name, seed, step in records if (name, seed) == ("student", 1)) == [14, 27, 40]
    last = next(r for r in run.metrics() if (r["stage"], r["seed"], r["step"]) == ("student", 1, 40))
    assert records["student", 1, 40]["validation_loss"] == last["validation_loss"]


def test_more_evaluations_than_steps_are_one_a_step(tmp_path):
    _, run = run_in(tmp_path, [stage("alone", steps=2)], (0,), evaluations=9)
    assert [r["step"] for r in run.metrics()] == [1, 2]


def test_plan_without_evaluations_is_refused(tmp_path):
    with pytest.raises(ValueError, match="evaluations must be at least 1"):
        run_in(tmp_path, chain(), evaluations=0)


def before_each_step(monkeypatch, call):
    make = distill.Sharded.make_advance

    def make_advance(self, make_step):
        advance = make(self, make_step)

        def counted(*arguments):
            call()
            return advance(*arguments)

        return counted

    monkeypatch.setattr(distill.Sharded, "make_advance", make_advance)


def test_control_c_saves_where_it_stands(unbroken, tmp_path, monkeypatch):
    trained, run = unbroken
    append, records = runs.Run.append_metrics, []

    def interrupted(self, record):
        append(self, record)
        records.append(record)
        if len(records) == 15:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "append_metrics", interrupted)
    taken = []
    before_each_step(monkeypatch, lambda: taken.append(0))
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, chain())
    first = len(taken)
    resumed, resumed_run = run_in(tmp_path, chain())
    chex.assert_trees_all_equal(bits(resumed), bits(trained))
    assert resumed_run.metrics() == run.metrics()
    # The record was written, but the losses behind it not yet forgotten: the one moment at which nothing is saved.
    assert first == 60 and len(taken) - first == 2 * 4 * 40 - 40


def test_control_c_between_steps_loses_no_step(unbroken, tmp_path, monkeypatch):
    trained, run = unbroken
    taken = []

    def interrupted():
        taken.append("taken" if len(taken) != 61 else "interrupted")
        if taken[-1] == "interrupted":
            raise KeyboardInterrupt

    before_each_step(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, chain())
    resumed, resumed_run = run_in(tmp_path, chain())
    chex.assert_trees_all_equal(bits(resumed), bits(trained))
    assert resumed_run.metrics() == run.metrics()
    assert taken.count("taken") == 2 * 4 * 40


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


def test_damaged_result_is_trained_again_from_the_sound_one_before(unbroken, tmp_path):
    plan = chain()[:1]
    _, run = run_in(tmp_path, plan, seeds=(0,), save_every=0)
    folder = run.checkpoints(0, "teacher")
    assert sorted(path.name for path in folder.iterdir()) == ["39", "39.json", "40", "40.json"]
    files = (path for path in (folder / "40").rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match="passed over"):
        resumed, again = run_in(tmp_path, plan, seeds=(0,))
    chex.assert_trees_all_equal(resumed["teacher"][0].variables, unbroken[0]["teacher"][0].variables)
    assert again.metrics() == [r for r in unbroken[1].metrics() if (r["stage"], r["seed"]) == ("teacher", 0)]


@pytest.mark.parametrize("change", [{"steps": 50}, {"steps": 10}, {"batch_size": 16}, {"start": "other"}])
def test_checkpoints_of_another_plan_are_refused(tmp_path, change):
    run_in(tmp_path, [stage("first"), stage("other")], (0,))
    with pytest.raises(runs.RunError, match="first holds another training .*name another folder"):
        run_in(tmp_path, [dataclasses.replace(stage("first"), **change), stage("other")], (0,))
    with pytest.raises(runs.RunError, match=r"is of another tree .*another plan"):
        run_in(tmp_path, [stage("first", 5), stage("other")], (0,))
    assert (tmp_path / "checkpoints" / "seed0" / "first" / "40.json").exists()


def test_lost_records_are_told(tmp_path):
    _, run = run_in(tmp_path, [stage("first")], (0,))
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(runs.RunError, match="lost the records of first, seed 0: delete .*first to train it anew"):
        run_in(tmp_path, [stage("first")], (0,))


def test_seeds_learn_from_their_own_examples(tmp_path):
    def own(seed):
        return {name: array[seed::2] for name, array in TRAIN.items()}

    trained, _ = run_in(tmp_path / "own", [stage("first", data=own)], (0, 1))
    for seed in (0, 1):
        alone, _ = run_in(tmp_path / str(seed), [stage("first", data=own(seed))], (seed,))
        chex.assert_trees_all_equal(alone["first"][0].variables, trained["first"][seed].variables)


def test_other_stages_and_seeds_move_no_bit(unbroken, tmp_path):
    more = [stage("stranger"), *chain()[:1]]
    trained, _ = run_in(tmp_path, more, seeds=(1,))
    chex.assert_trees_all_equal(trained["teacher"][0].variables, unbroken[0]["teacher"][1].variables)


def test_cached_teachers_teach_the_same(tmp_path):
    live = [stage("teacher", 32), stage("student", teachers=("teacher",), loss=soft)]
    cached = [live[0], dataclasses.replace(live[1], cache_teachers=True)]
    (one, _), (other, _) = run_in(tmp_path / "live", live, (0,)), run_in(tmp_path / "cached", cached, (0,))
    chex.assert_trees_all_close(bits(one)["student"], bits(other)["student"], rtol=1e-4, atol=1e-5)


def projected(student, teachers, batch, kernel):
    """Learns from the teacher's logits through a projection that is learnt too."""
    return jnp.square(jnp.tanh(student.logits @ kernel) - jnp.tanh(teachers[0].logits)).mean(-1)


def test_parameters_of_a_loss_resume_and_stay_behind(tmp_path, monkeypatch):
    def plan():
        student = stage(
            "student", 4, teachers=("teacher",), loss=projected, init_loss=lambda key: jax.random.normal(key, (3, 3))
        )
        return [stage("teacher", 32), student]

    trained, _ = run_in(tmp_path / "unbroken", plan(), seeds=(0,), save_every=0)
    assert set(trained["student"][0].variables) == {"params", "batch_stats"}
    saved = checkpoints.save

    def dies(folder, step, *args, **kwargs):
        saved(folder, step, *args, **kwargs)
        if folder.name == "student" and step == 17:
            raise SystemExit

    monkeypatch.setattr(checkpoints, "save", dies)
    with pytest.raises(SystemExit):
        run_in(tmp_path / "broken", plan(), seeds=(0,), save_every=0)
    monkeypatch.setattr(checkpoints, "save", saved)
    resumed, _ = run_in(tmp_path / "broken", plan(), seeds=(0,), save_every=0)
    chex.assert_trees_all_equal(bits(resumed), bits(trained))


def test_start_takes_over_the_weights(tmp_path):
    still = {"tx": optax.sgd(0.0), "steps": 1}
    trained, _ = run_in(tmp_path, [stage("first"), stage("second", start="first", **still)], (0,))
    chex.assert_trees_all_equal(trained["second"][0].variables, trained["first"][0].variables)
    with pytest.raises(
        ValueError, match=r"'wide' cannot start from 'first': .*kernel.* is \(5, 4\) there and \(5, 8\)"
    ):
        run_in(tmp_path, [stage("first"), stage("wide", 8, start="first", **still)], (0,))


def test_weights_that_are_lost_in_the_last_step_are_told(tmp_path):
    wild = stage("wild", tx=optax.sgd(float("nan")), steps=1)
    with pytest.raises(runs.RunError, match="wild, seed 0: the loss is [0-9.]+ by step 1, and training has diverged"):
        run_in(tmp_path, [wild], (0,))


def test_divergence_stops_the_run_and_keeps_what_is_done(tmp_path):
    wild = stage("wild", tx=optax.sgd(1e30))
    with pytest.raises(runs.RunError, match="wild, seed 0: the loss is .* by step .*smaller learning rate"):
        run_in(tmp_path, [stage("first"), wild], (0,))
    assert not (tmp_path / "checkpoints" / "seed0" / "wild").exists()
    assert (tmp_path / "checkpoints" / "seed0" / "first" / "40.json").exists()


def test_pretrained_models_teach_and_are_started_from(tmp_path):
    model = models.from_linen(MLP(4))
    weights = model.init(jax.random.key(5), TRAIN["inputs"][:1])
    given = distill.Pretrained("given", model, weights)
    before = jax.tree.map(np.array, weights)
    plan = [stage("taught", teachers=("given",), loss=soft, start="given", steps=2), given]
    trained = distill.run_plan(plan, [0, 1], runs.open_run(tmp_path / "run", {}), validation=VALIDATION)
    assert [len(trained[name]) for name in ("taught", "given")] == [2, 2]
    chex.assert_trees_all_equal(trained["given"][1].variables, before)
    # It starts where its teacher stands: there is nothing to learn from it yet, dropout apart.
    rows = distill.results(plan, trained, VALIDATION, reference="given")
    assert [row["name"] for row in rows] == ["taught", "given"]
    assert rows[0]["agreement"] > 0.8 and rows[1]["agreement"] is None
    # What all seeds share is measured once, and agreed with by each.
    assert [len(row["accuracy"]) for row in rows] == [2, 1] and rows[1]["accuracy_std"] is None

    other = given._replace(variables=jax.tree.map(lambda leaf: leaf + 1, weights))
    with pytest.raises(runs.RunError, match="holds another training"):
        distill.run_plan([plan[0], other], [0], runs.open_run(tmp_path / "run", {}), validation=VALIDATION)


def test_weights_of_another_architecture_are_transferred(tmp_path):
    def first_units(theirs, fresh):
        return jax.tree.map(lambda big, small: big[tuple(map(slice, small.shape))], theirs, fresh)

    plan = [
        stage("large", 8, steps=3),
        stage("small", 4, start="large", transfer=first_units, tx=optax.set_to_zero(), steps=1),
    ]
    trained = distill.run_plan(plan, [0], runs.open_run(tmp_path, {}), validation=VALIDATION)
    large, small = (trained[name][0].variables["params"] for name in ("large", "small"))
    chex.assert_trees_all_equal(small["Dense_0"]["kernel"], large["Dense_0"]["kernel"][:, :4])

    wrong = [plan[0], dataclasses.replace(plan[1], name="wrong", transfer=lambda theirs, fresh: theirs)]
    with pytest.raises(ValueError, match="'wrong' cannot start from 'large'"):
        distill.run_plan(wrong, [0], runs.open_run(tmp_path / "other", {}), validation=VALIDATION)
    with pytest.raises(ValueError, match="has a transfer but no start"):
        stage("lost", transfer=first_units)


def test_a_cached_teacher_answers_once_for_all_that_it_teaches_alike(tmp_path, monkeypatch):
    asked, make_predict = [], distill.make_predict

    def counting(model, **more):
        predict = make_predict(model, **more)
        return lambda variables, inputs: asked.append(len(inputs)) or predict(variables, inputs)

    monkeypatch.setattr(distill, "make_predict", counting)
    model = models.from_linen(MLP(4))
    given = distill.Pretrained("given", model, model.init(jax.random.key(5), TRAIN["inputs"][:1]))
    taught = {"teachers": ("given",), "loss": soft, "steps": 1, "cache_teachers": True}
    plan = [given, stage("one", **taught), stage("two", **taught)]
    distill.run_plan(plan, [0, 1], runs.open_run(tmp_path, {}), validation=VALIDATION)
    assert asked.count(len(TRAIN["inputs"])) == 1
