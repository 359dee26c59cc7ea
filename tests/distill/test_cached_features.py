"""Features of teachers are cached with the logits or without them, in 32 or in 16 bits."""

import dataclasses
import os
import shutil

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill, losses, models
from jaxkd.data.bucketing import LengthBuckets
from jaxkd.distill import _cached_outputs, _lowering, teacher_cache
from jaxkd.distill.teacher_cache import teacher_logits, teacher_outputs
from jaxkd.models import Outputs
from jaxkd.runs import redraw, report
from small_plans import (
    PLACEMENTS,
    TRAIN,
    VALIDATION,
    add_noise,
    get_variables,
    kill_at_save,
    make_model,
    make_stage,
    run_error,
    soft_loss,
    train,
)
from test_teacher_cache import IMAGES, VARIABLES, VIEWS

# Plans


def hidden_and_soft_loss(student, teachers, batch, context):
    """Reads logits and features of the teacher."""
    (teacher,) = teachers
    assert set(teacher.features) == {"hidden"}
    assert {teacher.logits.dtype, teacher.features["hidden"].dtype} == {jnp.dtype("float32")}
    hint = jnp.square(student.features["hidden"] - teacher.features["hidden"]).mean(-1)
    return hint + soft_loss(student, teachers, batch, context)


def hidden_loss(student, teachers, batch, context):
    assert all(teacher.logits is None for teacher in teachers)
    target = sum(teacher.features["hidden"] for teacher in teachers)
    return jnp.square(student.features["hidden"] - target).mean(-1)


def make_plan(**options):
    """Makes a teacher and a student of equal width. Options are those of the student."""
    student = {"teachers": ("teacher",), "loss": hidden_and_soft_loss, "steps": 6} | options
    return [make_stage("teacher", steps=6), make_stage("student", **student)]


CACHED = {"cache_teachers": True, "cache_features": ("hidden",)}
TWO_VIEWS = {"augment": add_noise, "views": 2}


def train_student(folder, **options):
    placement = options.pop("placement", None)
    trained, _ = train(folder, make_plan(**options), evaluations=1, placement=placement)
    return get_variables(trained)["student"]


@pytest.mark.parametrize("views", [{}, TWO_VIEWS])
def test_cached_features_train_the_student_of_a_live_teacher(tmp_path, views):
    live = train_student(tmp_path / "live", **views)
    cached = train_student(tmp_path / "cached", **views, **CACHED)
    chex.assert_trees_all_close(cached, live, rtol=1e-4, atol=1e-5)
    largest = train_student(tmp_path / "largest", **views, **CACHED, cache_top_k=3)
    chex.assert_trees_all_close(largest, cached, rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_takes_cached_features(tmp_path, placement, dtype):
    options = {**CACHED, **TWO_VIEWS, "cache_dtype": dtype, "cache_top_k": 2}
    expected = train_student(tmp_path / "one", **options)
    other = train_student(tmp_path / "other", **options, placement=PLACEMENTS[placement]())
    chex.assert_trees_all_close(other, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_change_the_student_by_rounding_alone(tmp_path, dtype):
    exact = train_student(tmp_path / "exact", **CACHED)
    rounded = train_student(tmp_path / "rounded", **CACHED, cache_dtype=dtype)
    chex.assert_trees_all_close(rounded, exact, atol=2e-2)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(rounded, exact, rtol=1e-7)


def test_16_bits_stay_16_bits_on_the_device():
    stage = make_plan(**CACHED, **TWO_VIEWS, cache_dtype="float16", cache_top_k=2)[1]
    entries = {entry.name: entry for entry in make_plan()}
    info = _lowering._step_arguments(stage, entries, 0)[4]
    kept, hidden = info.teacher_logits[0], info.teacher_features[0]["hidden"]
    assert (kept.values.dtype, kept.rest.dtype, hidden.dtype) == (jnp.float16,) * 3
    assert kept.indices.dtype == jnp.int32 and hidden.shape == (16, 2, 4)


class TokenModel(nn.Module):
    """A model of tokens whose states and head give its logits."""

    width: int

    @nn.compact
    def __call__(self, tokens):
        states = nn.tanh(nn.Dense(self.width)(nn.Embed(12, self.width)(tokens)))
        head = self.param("head", nn.initializers.lecun_normal(), (self.width, 50))
        return Outputs(states @ head, {"states": states, "head": head})


def test_cached_states_and_a_fused_loss_are_exact_distillation(tmp_path):
    tokens = np.random.default_rng(0).integers(1, 12, (24, 5), np.int32)
    large, small = (models.from_linen(TokenModel(w), train_argument=None) for w in (16, 4))
    variables = large.init(jax.random.key(7), tokens)
    variables = jax.tree.map(lambda leaf: 3 * leaf, variables)

    def on_logits(student, teachers, batch, context):
        return losses.kl_divergence(student.logits, teachers[0].logits, temperature=2.0).mean(-1)

    def on_states(student, teachers, batch, context):
        assert teachers[0].logits is None
        return losses.fused_linear_kl_divergence(
            student.features["states"],
            student.features["head"],
            teachers[0].features["states"],
            context.params,
            temperature=2.0,
        ).mean(-1)

    live = make_stage("student", data={"inputs": tokens}, model=small, teachers=("large",))
    cached = dataclasses.replace(
        live,
        loss=on_states,
        init_loss=lambda key: variables["params"]["head"],
        loss_tx=optax.set_to_zero(),
        cache_teachers=True,
        cache_features=("states",),
        cache_logits=False,
    )
    options = {
        "validation": {"inputs": tokens[:4], "labels": tokens[:4]},
        "make_score": lambda model: lambda variables, examples: {"none": 0.0},
        "evaluations": 1,
    }
    teacher = distill.Pretrained("large", large, variables)
    plan = [teacher, dataclasses.replace(live, loss=on_logits)]
    expected = get_variables(train(tmp_path / "live", plan, **options)[0])["student"]
    other = get_variables(train(tmp_path / "cached", [teacher, cached], **options)[0])["student"]
    chex.assert_trees_all_close(other, expected, rtol=1e-4, atol=1e-6)
    few_steps = [teacher, dataclasses.replace(live, loss=on_logits, steps=1)]
    start = get_variables(train(tmp_path / "start", few_steps, **options)[0])["student"]
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(start, expected, rtol=1e-2)


def test_several_teachers_and_a_resumed_run_read_the_cache(tmp_path, monkeypatch, capsys):
    def plan():
        teachers = [make_stage("teacher", steps=2), make_stage("other", steps=2)]
        options = {**CACHED, "cache_logits": False, "cache_dtype": "float16", "loss": hidden_loss}
        student = make_stage("student", teachers=("teacher", "other"), steps=6, **options)
        return [*teachers, student]

    expected, _ = train(tmp_path / "unbroken", plan())
    lines = [line for line in capsys.readouterr().out.splitlines() if "cached" in line]
    assert lines == [
        "cached teachers: teacher: 8 bytes an example, 0 kB",
        "cached teachers: other: 8 bytes an example, 0 kB",
    ]
    kill_at_save(monkeypatch, 2 + 2 + 3)
    with pytest.raises(SystemExit):
        train(tmp_path / "killed", plan(), save_every=0)
    monkeypatch.undo()
    capsys.readouterr()
    resumed, _ = train(tmp_path / "killed", plan(), save_every=0)
    assert "cached teachers" not in capsys.readouterr().out, "they are read"
    chex.assert_trees_all_equal(get_variables(resumed), get_variables(expected))


def test_the_report_names_the_size(tmp_path):
    plan = make_plan(**CACHED, cache_dtype="bfloat16")
    trained, run = train(tmp_path / "run", plan)
    rows = distill.evaluate_plan(plan, trained, VALIDATION, reference="teacher", repeats=1)
    path = report.report_run(run, rows, title="Cached")
    # 3 logits and 4 hidden numbers of 2 bytes each, for 45 examples.
    line = "Cached teachers: teacher: 14 bytes an example, 1 kB."
    assert path.read_text().count(line) == 1
    redraw.redraw_report(tmp_path / "run")
    assert path.read_text().count(line) == 1
    rows = [dataclasses.replace(row, cached_teachers=()) for row in rows]
    assert "Cached" not in report.report_run(run, rows, title="Live").read_text()


# Errors


def test_an_unknown_feature_is_refused_before_the_first_step(tmp_path):
    plan = make_plan(**{**CACHED, "cache_features": ("hidden", "stage1")})
    message = run_error(tmp_path, plan)
    assert message == (
        "teacher 'teacher' of stage 'student' has no feature 'stage1' to cache, its features are "
        "hidden"
    )
    assert not list(tmp_path.glob("checkpoints/*/*")), "no teacher was trained"


def test_a_feature_without_rows_is_refused(tmp_path):
    model = make_model()

    def apply(variables, inputs, **options):
        outputs, batch_stats = model.apply(variables, inputs, **options)
        return outputs._replace(features={"hidden": outputs.logits.sum()}), batch_stats

    plan = make_plan(**CACHED)
    plan[0] = dataclasses.replace(plan[0], model=model._replace(apply=apply))
    message = run_error(tmp_path, plan)
    assert "has a feature 'hidden' of the shape () for 16 examples: cache features with" in message


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cache_features": ("hidden",)}, ValueError, "a cache_features: it needs cache_teachers"),
        ({"cache_logits": False}, ValueError, "a cache_logits: it needs cache_teachers=True"),
        ({"cache_dtype": "float16"}, ValueError, "a cache_dtype: it needs cache_teachers=True"),
        (
            {"cache_teachers": True, "cache_logits": False},
            ValueError,
            "caches no logits: name cache_features, and leave out cache_top_k",
        ),
        ({**CACHED, "cache_logits": False, "cache_top_k": 2}, ValueError, "leave out cache_top_k"),
        (
            {**CACHED, "cache_features": "hidden"},
            TypeError,
            r"tuple of names such as \('hidden',\)",
        ),
        ({**CACHED, "cache_dtype": "int8"}, TypeError, "'float32', 'float16' or 'bfloat16', got"),
        ({**CACHED, "cache_logits": 1}, TypeError, "cache_logits of stage 'a' must be True or"),
    ],
)
def test_contradicting_attributes_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        make_stage("a", teachers=("b",), **options)


@pytest.mark.filterwarnings("ignore:ndim requires ndarray:DeprecationWarning")
def test_a_loss_that_reads_logits_that_are_not_cached_is_told_so(tmp_path):
    def read_shape(student, teachers, batch, context):
        return jnp.zeros(teachers[0].logits.shape[0])

    for number, loss in enumerate((soft_loss, read_shape)):
        plan = make_plan(**CACHED, cache_logits=False, loss=loss)
        with pytest.raises(
            TypeError, match="set cache_logits=True, or read its features"
        ) as caught:
            train(tmp_path / str(number), plan)
        assert "\n" not in str(caught.value)


def test_a_changed_cache_is_another_training(tmp_path):
    train(tmp_path, make_plan(**CACHED))
    message = run_error(tmp_path, make_plan(**CACHED, cache_dtype="bfloat16"))
    assert "cache_dtype" in message and "bfloat16" in message


def test_features_of_tokens_are_refused_with_buckets(tmp_path):
    tokens = np.random.default_rng(0).integers(1, 9, (20, 8), np.int32)

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            states = nn.Embed(9, 4)(tokens)
            return Outputs(nn.Dense(3)(states.mean(1)), {"states": states, "mean": states.mean(1)})

    data = {"inputs": tokens, "labels": tokens[:, 0] % 3}
    stage = make_stage(
        "teacher", data=data, model=models.from_linen(Classifier(), train_argument=None)
    )
    for features, is_refused in ((("mean",), False), (("mean", "states"), True)):
        student = dataclasses.replace(
            stage,
            name="student",
            teachers=("teacher",),
            loss=lambda student, teachers, batch, context: jnp.square(
                student.features["mean"] - teachers[0].features["mean"]
            ).mean(-1),
            cache_teachers=True,
            cache_features=features,
        )
        few = {name: array[:8] for name, array in data.items()}
        options = {"validation": few, "buckets": LengthBuckets((4, 8))}
        if is_refused:
            message = run_error(tmp_path / "refused", [stage, student], **options)
            assert "caches 'states' of each token of 'teacher', which buckets" in message
        else:
            train(tmp_path / "trained", [stage, student], **options)


# On disk


def predict_both(variables, inputs):
    flat = np.asarray(inputs, np.float32).reshape(len(inputs), -1) / 255
    logits = flat @ variables["params"]["kernel"]
    names = np.arange(len(inputs), dtype=np.int32)
    return Outputs(logits, {"a/b.c": flat[:, :3], "names": names, "other": logits})


ARGUMENTS = {"features": ("names", "a/b.c"), "views": VIEWS, "top_k": 2, "chunk_size": 4}


def get_outputs(folder, **changes):
    """Returns the outputs, and the number of predictions that they took."""
    calls = []

    def count_and_predict(variables, inputs):
        calls.append(len(inputs))
        return predict_both(variables, inputs)

    outputs = teacher_outputs(
        count_and_predict, VARIABLES, IMAGES, folder=folder, **ARGUMENTS | changes
    )
    return outputs, len(calls)


@pytest.fixture(scope="module", params=_cached_outputs.DTYPES)
def saved(request, tmp_path_factory):
    """A folder of outputs, the outputs, and the dtype."""
    folder = tmp_path_factory.mktemp("saved")
    outputs, calls = get_outputs(folder, dtype=request.param)
    assert calls == 9, "three views in three chunks each"
    return folder, outputs, request.param


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the folder, which a test may change."""
    return shutil.copytree(saved[0], tmp_path / "teacher")


def test_saved_outputs_are_read_back(saved, folder):
    _, written, dtype = saved
    outputs, calls = get_outputs(folder, dtype=dtype)
    assert calls == 0 and list(outputs.features) == ["a/b.c", "names"]
    chex.assert_trees_all_equal(outputs, written)
    chex.assert_trees_all_equal_dtypes(outputs, written)
    assert outputs.features["names"].dtype == outputs.logits.indices.dtype == np.int32
    assert outputs.features["a/b.c"].dtype == outputs.logits.rest.dtype == jnp.dtype(dtype)
    assert outputs.features["a/b.c"].shape == (10, 3, 3)
    exact, _ = get_outputs(None)
    chex.assert_trees_all_close(
        jax.tree.map(lambda a: a.astype(np.float32), outputs.features),
        jax.tree.map(lambda a: a.astype(np.float32), exact.features),
        rtol={"float32": 0, "float16": 5e-4, "bfloat16": 4e-3}[dtype],
    )


def test_damaged_outputs_are_computed_again_with_a_warning(saved, folder):
    _, written, dtype = saved
    files = [path for path in folder.glob("*/0/**/*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.warns(UserWarning, match=r"0 is damaged and passed over: its files differ"):
        outputs, calls = get_outputs(folder, dtype=dtype)
    assert calls == 9
    chex.assert_trees_all_equal(outputs, written)
    assert get_outputs(folder, dtype=dtype)[1] == 0


@pytest.mark.parametrize(
    "change", [{"features": ["names"]}, {"has_logits": False, "top_k": None}, {"top_k": None}]
)
def test_outputs_are_computed_again_after_a_change(saved, folder, change):
    for expected_calls in (9, 0):
        outputs, calls = get_outputs(folder, dtype=saved[2], **change)
        assert calls == expected_calls
    assert (outputs.logits is None) == ("has_logits" in change)
    for dtype in _cached_outputs.DTYPES:
        assert (get_outputs(folder, dtype=dtype)[1] == 0) == (dtype == saved[2])


def test_the_order_of_features_does_not_count(saved, folder):
    features = ["a/b.c", "names", "names"]
    assert get_outputs(folder, dtype=saved[2], features=features)[1] == 0


def test_logits_in_32_bits_are_described_as_by_versions_without_features(tmp_path):
    parts = _cached_outputs.make_parts(top_k=2)
    views = lambda: iter([[IMAGES]])  # noqa: E731
    origin = teacher_cache._describe_origin(VARIABLES, views, None, parts, None)
    assert sorted(origin) == sorted(
        "variables inputs views top_k jax platform device x64 matmul_precision notes".split()
    )
    logits = np.zeros((2, 3))
    assert _cached_outputs.pack(Outputs(logits, {})) == {"logits": logits}


def test_a_number_that_float16_does_not_hold_is_an_error(tmp_path):
    def predict(variables, inputs):
        return np.where(np.eye(10, 7), np.float32(70_000), -np.inf)[: len(inputs)]

    with pytest.raises(ValueError, match=r"^the logits of a teacher cannot be .* float16: 70000"):
        teacher_logits(predict, VARIABLES, IMAGES, folder=tmp_path, dtype="float16")
    assert os.listdir(tmp_path) == []
    logits = teacher_logits(predict, VARIABLES, IMAGES, dtype="bfloat16")
    assert (np.isinf(logits) == ~np.eye(10, 7, dtype=bool)).all(), "excluded classes stay so"
    large = {"large": np.full((10, 2), 3.4e38, np.float32)}
    with pytest.raises(ValueError, match=r"the features\['large'\] of .*; choose float32$"):
        teacher_outputs(
            lambda variables, inputs: Outputs(None, large),
            VARIABLES,
            IMAGES,
            features=large,
            has_logits=False,
            dtype="bfloat16",
        )


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="no feature 'x' to cache, its features are a/b.c, names"):
        get_outputs(None, features=["x"])
    with pytest.raises(ValueError, match="nothing is cached without logits and features"):
        get_outputs(None, features=[], has_logits=False, top_k=None)
    with pytest.raises(ValueError, match="2 of the logits cannot be kept without logits"):
        get_outputs(None, has_logits=False)
    with pytest.raises(ValueError, match="cached in float32, float16, bfloat16, not in 'int8'"):
        teacher_logits(lambda v, x: x, VARIABLES, IMAGES, dtype="int8")


# In a loop of one's own


def test_a_step_takes_cached_features_alone():
    model, tx = make_model(), optax.sgd(0.1)
    step = distill.make_train_step(model, tx, hidden_loss)
    variables = model.init(jax.random.key(0), TRAIN["inputs"])
    batch = {name: array[:16] for name, array in TRAIN.items()}
    features = {"hidden": jnp.ones((16, 4), jnp.bfloat16)}
    info = distill.BatchInfo(teacher_features=(features, features))
    state, metrics = step(
        distill.init_train_state(variables, tx), batch, (), jax.random.key(0), info
    )
    hidden = model.apply(variables, batch["inputs"], train=False)[0].features["hidden"]
    np.testing.assert_allclose(metrics["loss"], jnp.square(hidden - 2).mean(), rtol=1e-6)
