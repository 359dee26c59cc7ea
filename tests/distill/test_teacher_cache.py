"""Teachers' logits are computed once, for what the student sees, and read back as they were or not at all."""

import errno
import functools
import os
import shutil
import subprocess
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses, models
from jaxkd.data import crop_and_flip
from jaxkd.data.views import Views, augment_views
from jaxkd.distill import TopK, expand_top_k, teacher_cache, top_k
from jaxkd.distill.teacher_cache import teacher_logits
from jaxkd.evaluate import make_predict
from jaxkd.runs import checkpoints

KEY = jax.random.key(3)
IMAGES = np.random.default_rng(0).integers(1, 256, (10, 6, 5, 1), np.uint8)
PARAMS = {
    "bias": np.zeros(7, np.float32),
    "kernel": np.random.default_rng(1).random((30, 7), np.float32),
    "unused": np.ones(2, np.float32),
}
WEIGHTS = {"params": PARAMS}


def speckle(key, inputs, size=9):
    return inputs + jax.random.randint(key, inputs.shape, 0, size, inputs.dtype)


def noise(key, inputs):
    return inputs + 0.1 * jax.random.normal(key, inputs.shape)


VIEWS = Views(speckle, KEY, 3)


class Teacher:
    """A linear one that counts how often it is asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, variables, inputs):
        self.calls += 1
        params = variables["params"]
        return (
            np.asarray(inputs, np.float32).reshape(len(inputs), -1) / 255 @ params["kernel"]
            + params["bias"]
        )


# Views


@pytest.mark.parametrize(("augment", "dtype"), [(crop_and_flip, np.uint8), (noise, np.float32)])
def test_view_is_the_same_whatever_the_batch_around_it(augment, dtype):
    images = IMAGES.astype(dtype)
    indices, views = np.array([4, 0, 9, 4, 7, 2, 1]), np.array([0, 1, 2, 1, 0, 2, 1])
    draw = jax.jit(functools.partial(augment_views, augment, KEY))
    batch = np.asarray(draw(images[indices], indices, views))
    assert batch.dtype == dtype and batch.shape == (7, 6, 5, 1)
    order = np.array([6, 2, 0, 5, 1, 4, 3])
    np.testing.assert_array_equal(
        draw(images[indices[order]], indices[order], views[order]), batch[order]
    )
    for place in range(7):
        one = slice(place, place + 1)
        np.testing.assert_array_equal(
            draw(images[indices[one]], indices[one], views[one]), batch[one]
        )
        np.testing.assert_array_equal(
            draw(images[indices[one]], indices[one], views[place]), batch[one]
        )


def test_view_is_drawn_by_key_view_and_index():
    draw = jax.jit(functools.partial(augment_views, speckle))
    drawn = draw(KEY, IMAGES[[8]], jnp.array([8]), jnp.array([2]))
    expected = speckle(jax.random.fold_in(jax.random.fold_in(KEY, 2), 8), jnp.asarray(IMAGES[[8]]))
    np.testing.assert_array_equal(drawn, expected)
    for key, index, view in ((KEY, 8, 1), (KEY, 7, 2), (jax.random.key(4), 8, 2)):
        assert (draw(key, IMAGES[[8]], jnp.array([index]), jnp.array([view])) != expected).any()


def test_views_wrap():
    assert [VIEWS.at(epoch) for epoch in range(5)] == [0, 1, 2, 0, 1]
    np.testing.assert_array_equal(VIEWS.at(np.array([2, 3, 7])), [2, 0, 1])
    assert jax.jit(VIEWS.at)(jnp.int32(3)).dtype == jnp.int32


def test_views_that_make_no_sense_are_refused():
    with pytest.raises(
        ValueError,
        match=r"cannot be cached for views that are drawn at every step: pass views=",
    ):
        Views(crop_and_flip, KEY, 0)
    for indices, views in (([0, 1], 0), ([0, 1, 2], [0, 1]), (0, 0), ([0, 1, 2], [0])):
        with pytest.raises(
            ValueError, match=r"must be one per example of the inputs \(3, 6, 5, 1\)"
        ):
            augment_views(crop_and_flip, KEY, IMAGES[:3], np.array(indices), np.array(views))
    with pytest.raises(
        ValueError, match=r"draws other views in another batch: make one with impl='threefry2x32'"
    ):
        augment_views(crop_and_flip, jax.random.key(0, impl="rbg"), IMAGES[:3], np.arange(3), 0)


# The largest few


def reference(logits, k):
    """Values, indices and rest in float64."""
    logits = np.asarray(logits, np.float64)
    order = np.argsort(-logits, axis=-1, kind="stable")
    values, others = (
        np.take_along_axis(logits, part, -1) for part in (order[..., :k], order[..., k:])
    )
    with np.errstate(divide="ignore"):
        return values, order[..., :k], np.log(np.exp(others).sum(-1))


def normal(seed, shape, scale=3.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize("shape", [(11,), (5, 11), (2, 3, 11)])
def test_top_k_is_the_reference(shape, k):
    logits = normal(0, shape)
    kept = jax.jit(functools.partial(top_k, k=k))(logits)
    chex.assert_trees_all_close(kept, top_k(logits, k=k), rtol=2e-6)
    chex.assert_type(list(kept), [jnp.float32, jnp.int32, jnp.float32])
    values, indices, rest = reference(logits, k)
    np.testing.assert_array_equal(kept.values, values)
    np.testing.assert_array_equal(kept.indices, indices)
    np.testing.assert_allclose(kept.rest, rest, rtol=2e-6)


@pytest.mark.parametrize("k", [1, 4, 10])
def test_expanded_keeps_each_kept_mass_and_spreads_the_others(k):
    logits = normal(1, (6, 11))
    expanded = jax.jit(functools.partial(expand, num_classes=11))(top_k(logits, k=k))
    assert expanded.dtype == jnp.float32 and expanded.shape == (6, 11)
    values, indices, _ = reference(logits, k)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(expanded), indices, -1), values)
    before, after = (np.exp(np.asarray(one, np.float64)) for one in (logits, expanded))
    before, after = (one / one.sum(-1, keepdims=True) for one in (before, after))
    mass = np.take_along_axis(before, indices, -1)
    np.testing.assert_allclose(np.take_along_axis(after, indices, -1), mass, rtol=1e-6)
    np.put_along_axis(after, indices, np.nan, -1)
    shares = np.broadcast_to((1 - mass.sum(-1, keepdims=True)) / (11 - k), after.shape)
    np.testing.assert_allclose(after[~np.isnan(after)], shares[~np.isnan(after)], rtol=1e-4)


def test_all_kept_come_back_bit_for_bit():
    logits = normal(2, (4, 9)).at[1, 3].set(-jnp.inf).at[2, :].set(0.25)
    kept = top_k(logits, k=9)
    assert (kept.rest == -jnp.inf).all()
    np.testing.assert_array_equal(expand_top_k(kept, num_classes=9), logits)


def test_classes_that_are_not_there_stay_so():
    logits = jnp.full((3, 6), -jnp.inf).at[0, 2].set(1.0).at[1, :4].set(jnp.arange(4.0))
    kept = top_k(logits, k=2)
    np.testing.assert_allclose(kept.rest, [-np.inf, np.log(1 + np.e), -np.inf], rtol=1e-6)
    expanded = np.asarray(expand_top_k(kept, num_classes=6))
    np.testing.assert_array_equal(expanded[[0, 2]], logits[jnp.array([0, 2])])
    # A class that was ruled out shares what was not kept, as nothing tells it from the others.
    np.testing.assert_allclose(
        expanded[1], [*[np.log((1 + np.e) / 4)] * 2, 2, 3, *[np.log((1 + np.e) / 4)] * 2], rtol=1e-6
    )


def test_narrow_logits_are_widened_and_ties_go_to_the_first():
    kept = top_k(jnp.array([1, 2, 2, 2], jnp.bfloat16), k=2)
    assert kept.values.dtype == jnp.float32 and kept.indices.tolist() == [1, 2]
    np.testing.assert_allclose(kept.rest, np.logaddexp(1, 2), rtol=1e-6)


def test_divergence_from_the_whole_is_bounded():
    # One clear class of 1000: the largest 10 have 94 % of the weight, the largest 100 98 %.
    whole = normal(0, (64, 1000), scale=2.0).at[:, 0].add(12.0)
    for k, at_one, at_four in ((10, 0.09, 0.13), (100, 0.02, 0.08)):
        kept = top_k(whole, k=k)
        expanded = expand_top_k(kept, num_classes=1000)
        weight = jnp.exp(kept.rest - jax.nn.logsumexp(whole, axis=-1))
        divergence = losses.kl_divergence(expanded, whole, temperature=1.0)
        assert (
            (divergence > 0).all()
            and (divergence < weight * np.log(1000 - k)).all()
            and divergence.mean() < at_one
        )
        assert losses.kl_divergence(expanded, whole, temperature=4.0).mean() / 4**2 < at_four
        others_before, others_after = (
            1 - jnp.take_along_axis(jax.nn.softmax(logits / 4, axis=-1), kept.indices, -1).sum(-1)
            for logits in (whole, expanded)
        )
        assert (others_after > others_before).all(), (
            "above temperature 1 they weigh more than they did"
        )


def test_top_k_that_makes_no_sense_is_refused():
    for k in (0, 8):
        with pytest.raises(
            ValueError,
            match=rf"k must be from 1 to the number of classes, got k={k} for .* \(2, 7\)",
        ):
            top_k(jnp.zeros((2, 7)), k=k)
    with pytest.raises(ValueError, match=r"logits of the shape \(\)"):
        top_k(jnp.float32(1), k=1)
    with pytest.raises(TypeError, match="must be floating-point, got int32"):
        top_k(jnp.arange(3), k=1)
    with pytest.raises(
        ValueError, match="3 logits were kept of each example, but num_classes is 2"
    ):
        expand_top_k(top_k(jnp.zeros(5), k=3), num_classes=2)


# Computed


def test_logits_are_those_of_the_pictures_that_the_student_sees():
    teacher = Teacher()
    np.testing.assert_array_equal(
        teacher_logits(teacher, WEIGHTS, IMAGES), teacher(WEIGHTS, IMAGES)
    )
    logits = teacher_logits(teacher, WEIGHTS, IMAGES, views=VIEWS)
    assert type(logits) is np.ndarray and logits.dtype == np.float32 and logits.shape == (10, 3, 7)
    indices, epochs = np.array([9, 3, 3, 0]), np.array([5, 4, 0, 3])
    batch = augment_views(speckle, KEY, IMAGES[indices], indices, VIEWS.at(epochs))
    np.testing.assert_allclose(
        logits[indices, VIEWS.at(epochs)], teacher(WEIGHTS, batch), rtol=1e-6
    )
    assert (logits[:, 0] != logits[:, 1]).any()


@pytest.mark.parametrize("views", [None, VIEWS])
def test_largest_few_are_those_of_the_whole(views):
    whole = teacher_logits(Teacher(), WEIGHTS, IMAGES, views=views)
    kept = teacher_logits(Teacher(), WEIGHTS, IMAGES, views=views, top_k=2, chunk_size=4)
    assert isinstance(kept, TopK) and all(type(leaf) is np.ndarray for leaf in kept)
    np.testing.assert_allclose(kept.values, -np.sort(-whole)[..., :2], rtol=1e-6)
    np.testing.assert_allclose(expand_top_k(kept, num_classes=7).max(-1), whole.max(-1), rtol=1e-6)
    assert kept.rest.shape == whole.shape[:-1]


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(len(x), -1).astype(jnp.float32) / 255
        return nn.Dense(7)(nn.relu(nn.Dense(16)(x)))


def test_chunks_leave_the_bits_of_the_whole():
    model, images = models.from_linen(MLP()), IMAGES.repeat(3, axis=0)
    variables, predict = (
        model.init(jax.random.key(0), IMAGES[:1]),
        make_predict(model, batch_size=4),
    )
    np.testing.assert_array_equal(
        teacher_logits(predict, variables, images, chunk_size=8), predict(variables, images)
    )
    each = [
        teacher_logits(predict, variables, images, views=VIEWS, chunk_size=chunk)
        for chunk in (8, 100)
    ]
    np.testing.assert_array_equal(*each)


def test_nothing_to_predict_is_told():
    for inputs, chunk in ((IMAGES[:0], 4), (IMAGES, 0)):
        with pytest.raises(
            ValueError, match="there must be examples to predict, in chunks of at least 1"
        ):
            teacher_logits(Teacher(), WEIGHTS, inputs, chunk_size=chunk)
    with pytest.raises(ValueError, match="k must be from 1 to the number of classes, got k=8"):
        teacher_logits(Teacher(), WEIGHTS, IMAGES, top_k=8)


# Kept on disk

ASKED = {
    "variables": WEIGHTS,
    "inputs": IMAGES,
    "views": VIEWS,
    "top_k": 2,
    "notes": {"model": ["linear", 7]},
    "chunk": 4,
}


def ask(folder, **changed):
    """The logits, and how often the teacher was asked for them."""
    teacher, asked = Teacher(), ASKED | changed
    logits = teacher_logits(
        teacher, asked.pop("variables"), asked.pop("inputs"), folder=folder, **asked
    )
    return logits, teacher.calls


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where logits lie, and what they are."""
    folder = tmp_path_factory.mktemp("kept") / "a" / "teacher"
    logits, calls = ask(folder)
    assert calls == 9, "three views in three chunks each"
    return folder, logits


@pytest.fixture
def folder(kept, tmp_path):
    return shutil.copytree(kept[0], tmp_path / "teacher")


def test_read_back_instead_of_computed(kept, folder):
    logits, calls = ask(folder)
    assert calls == 0
    chex.assert_trees_all_equal(logits, kept[1])
    assert isinstance(logits, TopK) and all(type(leaf) is np.ndarray for leaf in logits)
    assert [leaf.dtype for leaf in logits] == [np.float32, np.int32, np.float32]
    (place,) = os.listdir(folder)
    assert sorted(os.listdir(folder / place)) == ["0", "0.json"]


def test_whole_logits_are_read_back_too(tmp_path):
    written, read = (ask(tmp_path, views=None, top_k=None) for _ in range(2))
    assert (written[1], read[1]) == (3, 0) and type(read[0]) is np.ndarray
    np.testing.assert_array_equal(*(logits for logits, _ in (written, read)))


ONE_UP = PARAMS["kernel"].copy()
ONE_UP[3, 4] = np.nextafter(ONE_UP[3, 4], np.float32(2))
OTHERS = {
    "a weight": {"variables": {"params": PARAMS | {"kernel": ONE_UP}}},
    "a weight's name": {
        "variables": {
            "params": {"v" if name == "unused" else name: PARAMS[name] for name in PARAMS}
        }
    },
    "an input": {"inputs": np.where(np.arange(IMAGES.size).reshape(IMAGES.shape) == 77, 0, IMAGES)},
    "the key": {"views": Views(speckle, jax.random.key(4), 3)},
    "the number of views": {"views": Views(speckle, KEY, 2)},
    "no views": {"views": None},
    "a value that an augmentation closes over": {
        "views": Views(lambda *given: speckle(*given, 8), KEY, 3)
    },
    "an argument of an augmentation": {"views": Views(functools.partial(speckle, size=7), KEY, 3)},
    "top_k": {"top_k": 3},
    "a note": {"notes": {"model": ["linear", 8]}},
}


@pytest.mark.parametrize("other", OTHERS)
def test_computed_anew_for_another(folder, other):
    logits, calls = ask(folder, **OTHERS[other])
    assert calls > 0 and len(os.listdir(folder)) == 2
    again, calls = ask(folder, **OTHERS[other])
    assert calls == 0
    chex.assert_trees_all_equal(again, logits)


def test_one_view_is_not_none_even_if_it_is_the_input(tmp_path):
    (one, calls), (none, more) = (
        ask(tmp_path, views=views, top_k=None)
        for views in (Views(lambda key, inputs: inputs, KEY, 1), None)
    )
    assert (one.shape, calls) == ((10, 1, 7), 3) and (none.shape, more) == ((10, 7), 3)


def test_logits_of_another_question_lie_beside(kept, folder):
    expected, _ = ask(None, top_k=None, **OTHERS["a weight"])
    for _ in range(2):
        np.testing.assert_array_equal(ask(folder, top_k=None, **OTHERS["a weight"])[0], expected)
        chex.assert_trees_all_equal(ask(folder), (kept[1], 0))


@pytest.mark.parametrize("setting", ["jax", "matmul_precision"])
def test_computed_anew_under_other_numerics(folder, monkeypatch, setting):
    if setting == "jax":
        monkeypatch.setattr(jax, "__version__", "0.0.1")
        assert ask(folder)[1] > 0
    else:
        with jax.default_matmul_precision("highest"):
            assert ask(folder)[1] > 0


def test_same_pictures_by_another_name_are_the_same(folder):
    assert ask(folder, views=Views(lambda key, inputs: speckle(key, inputs), KEY, 3))[1] == 0


OTHER_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import test_teacher_cache
print(test_teacher_cache.ask(sys.argv[2])[1])
"""


def test_read_by_another_process(folder):
    line = [sys.executable, "-c", OTHER_PROCESS, os.path.dirname(__file__), str(folder)]
    environment = os.environ | {"PYTHONHASHSEED": "7", "XLA_FLAGS": ""}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_damaged_ones_are_told_and_computed_anew(kept, folder):
    largest = max(
        (path for path in folder.glob("*/0/**/*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.warns(UserWarning, match=r"0 is damaged and passed over: its files differ"):
        logits, calls = ask(folder)
    assert calls == 9
    chex.assert_trees_all_equal(logits, kept[1])
    assert ask(folder)[1] == 0


def test_another_run_that_is_first_does_no_harm(kept, tmp_path, monkeypatch):
    def slower(*arguments, **more):
        monkeypatch.undo()
        assert ask(tmp_path)[1] == 9
        return checkpoints.save(*arguments, **more)

    monkeypatch.setattr(teacher_cache, "save", slower)
    logits, calls = ask(tmp_path)
    assert calls == 9
    chex.assert_trees_all_equal(logits, kept[1])
    assert ask(tmp_path)[1] == 0 and len(os.listdir(tmp_path)) == 1


def test_unwritable_place_is_told_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    teacher = Teacher()
    with pytest.raises(OSError, match="file"):
        teacher_logits(teacher, WEIGHTS, IMAGES, folder=tmp_path / "file" / "logits")
    assert teacher.calls == 0


def test_full_disk_is_told(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "write_atomically", fail)
    with pytest.raises(OSError, match="No space left on device"):
        ask(tmp_path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []
    assert ask(tmp_path)[1] == 9


def test_of_several_hosts_the_first_writes(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    logits, calls = ask(tmp_path)
    assert calls == 9 and os.listdir(tmp_path) == []
    chex.assert_trees_all_equal(logits, kept[1])
