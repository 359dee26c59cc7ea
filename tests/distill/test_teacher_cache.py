"""Teacher logits are computed once for the views that students see, and read back unchanged."""

import concurrent.futures
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

from jaxkd import models
from jaxkd.data.views import Views, augment_views
from jaxkd.distill import TopK, expand_top_k, teacher_cache
from jaxkd.distill._cached_outputs import make_parts
from jaxkd.distill.teacher_cache import TeacherCache, teacher_logits
from jaxkd.evaluate import make_predict
from jaxkd.runs import checkpoints

KEY = jax.random.key(3)
IMAGES = np.random.default_rng(0).integers(1, 256, (10, 6, 5, 1), np.uint8)
PARAMS = {
    "bias": np.zeros(7, np.float32),
    "kernel": np.random.default_rng(1).random((30, 7), np.float32),
    "unused": np.ones(2, np.float32),
}
VARIABLES = {"params": PARAMS}


def add_integers(key, inputs, limit=9):
    return inputs + jax.random.randint(key, inputs.shape, 0, limit, inputs.dtype)


VIEWS = Views(add_integers, KEY, 3)


class Teacher:
    """A linear teacher that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, variables, inputs):
        self.calls += 1
        params = variables["params"]
        flat = np.asarray(inputs, np.float32).reshape(len(inputs), -1) / 255
        return flat @ params["kernel"] + params["bias"]


# Computed


def test_a_teacher_that_drops_its_last_batch_is_refused(tmp_path):
    def drop_last(variables, inputs):
        return Teacher()(variables, inputs[: len(inputs) // 4 * 4])

    with pytest.raises(ValueError, match=r"shape \(4, 7\) for 5 examples: return one row of"):
        teacher_logits(drop_last, VARIABLES, IMAGES, chunk_size=5, folder=tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.thorough
def test_logits_are_those_of_the_images_that_the_student_sees():
    teacher = Teacher()
    logits = teacher_logits(teacher, VARIABLES, IMAGES)
    np.testing.assert_array_equal(logits, teacher(VARIABLES, IMAGES))
    logits = teacher_logits(teacher, VARIABLES, IMAGES, views=VIEWS)
    assert type(logits) is np.ndarray and logits.dtype == np.float32 and logits.shape == (10, 3, 7)
    indices = np.array([9, 3, 3, 0])
    views = VIEWS.at(np.array([5, 4, 0, 3]))
    batch = augment_views(add_integers, KEY, IMAGES[indices], indices, views)
    np.testing.assert_allclose(logits[indices, views], teacher(VARIABLES, batch), rtol=1e-6)
    assert (logits[:, 0] != logits[:, 1]).any()


@pytest.mark.parametrize("views", [None, VIEWS])
def test_top_k_keeps_the_largest_of_all_logits(views):
    logits = teacher_logits(Teacher(), VARIABLES, IMAGES, views=views)
    kept = teacher_logits(Teacher(), VARIABLES, IMAGES, views=views, top_k=2, chunk_size=4)
    assert isinstance(kept, TopK) and all(type(leaf) is np.ndarray for leaf in kept)
    np.testing.assert_allclose(kept.values, -np.sort(-logits)[..., :2], rtol=1e-6)
    largest = expand_top_k(kept, num_classes=7).max(-1)
    np.testing.assert_allclose(largest, logits.max(-1), rtol=1e-6)
    assert kept.rest.shape == logits.shape[:-1]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(len(x), -1).astype(jnp.float32) / 255
        return nn.Dense(7)(nn.relu(nn.Dense(16)(x)))


@pytest.mark.thorough
def test_chunks_do_not_change_the_bits():
    model = models.from_linen(Net())
    images = IMAGES.repeat(3, axis=0)
    variables = model.init(jax.random.key(0), IMAGES[:1])
    predict = make_predict(model, batch_size=4)
    logits = teacher_logits(predict, variables, images, chunk_size=8)
    np.testing.assert_array_equal(logits, predict(variables, images))
    small_chunks, one_chunk = (
        teacher_logits(predict, variables, images, views=VIEWS, chunk_size=chunk_size)
        for chunk_size in (8, 100)
    )
    np.testing.assert_array_equal(small_chunks, one_chunk)


def test_wrong_sizes_are_refused():
    for inputs, chunk_size in ((IMAGES[:0], 4), (IMAGES, 0)):
        message = "needs at least one example and a chunk_size of at least 1, got inputs of the"
        with pytest.raises(ValueError, match=message):
            teacher_logits(Teacher(), VARIABLES, inputs, chunk_size=chunk_size)
    with pytest.raises(ValueError, match="k must be from 1 to the number of classes, got k=8"):
        teacher_logits(Teacher(), VARIABLES, IMAGES, top_k=8)


# On disk

ARGUMENTS = {
    "variables": VARIABLES,
    "inputs": IMAGES,
    "views": VIEWS,
    "top_k": 2,
    "notes": {"model": ["linear", 7]},
    "chunk_size": 4,
}


def get_logits(folder, **changes):
    """Returns the logits, and the number of calls of the teacher that they took."""
    teacher = Teacher()
    arguments = ARGUMENTS | changes
    variables, inputs = arguments.pop("variables"), arguments.pop("inputs")
    return teacher_logits(teacher, variables, inputs, folder=folder, **arguments), teacher.calls


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of logits, and the logits."""
    folder = tmp_path_factory.mktemp("saved") / "a" / "teacher"
    logits, calls = get_logits(folder)
    assert calls == 9, "three views in three chunks each"
    return folder, logits


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the folder, which a test may change."""
    return shutil.copytree(saved[0], tmp_path / "teacher")


def test_saved_logits_are_read_back(saved, folder):
    logits, calls = get_logits(folder)
    assert calls == 0
    chex.assert_trees_all_equal(logits, saved[1])
    assert isinstance(logits, TopK) and all(type(leaf) is np.ndarray for leaf in logits)
    assert [leaf.dtype for leaf in logits] == [np.float32, np.int32, np.float32]
    (name,) = os.listdir(folder)
    assert sorted(os.listdir(folder / name)) == ["0", "0.json"]


def test_saved_logits_of_all_classes_are_read_back(tmp_path):
    (written, calls), (read, more_calls) = (
        get_logits(tmp_path, views=None, top_k=None) for _ in range(2)
    )
    assert (calls, more_calls) == (3, 0) and type(read) is np.ndarray
    np.testing.assert_array_equal(written, read)


CHANGED_KERNEL = PARAMS["kernel"].copy()
CHANGED_KERNEL[3, 4] = np.nextafter(CHANGED_KERNEL[3, 4], np.float32(2))
RENAMED_PARAMS = {"v" if name == "unused" else name: array for name, array in PARAMS.items()}
CHANGED_IMAGES = np.where(np.arange(IMAGES.size).reshape(IMAGES.shape) == 77, 0, IMAGES)
CHANGES = {
    "a weight": {"variables": {"params": PARAMS | {"kernel": CHANGED_KERNEL}}},
    "a weight's name": {"variables": {"params": RENAMED_PARAMS}},
    "an input": {"inputs": CHANGED_IMAGES},
    "the key": {"views": Views(add_integers, jax.random.key(4), 3)},
    "the number of views": {"views": Views(add_integers, KEY, 2)},
    "no views": {"views": None},
    "a value that an augmentation closes over": {
        "views": Views(lambda *args: add_integers(*args, 8), KEY, 3)
    },
    "an argument of an augmentation": {
        "views": Views(functools.partial(add_integers, limit=7), KEY, 3)
    },
    "top_k": {"top_k": 3},
    "a note": {"notes": {"model": ["linear", 8]}},
}


@pytest.mark.thorough
@pytest.mark.parametrize("change", CHANGES)
def test_logits_are_computed_again_after_a_change(folder, change):
    logits, calls = get_logits(folder, **CHANGES[change])
    assert calls > 0 and len(os.listdir(folder)) == 2
    read, calls = get_logits(folder, **CHANGES[change])
    assert calls == 0
    chex.assert_trees_all_equal(read, logits)


def test_one_view_that_is_the_input_differs_from_no_views(tmp_path):
    one_view = Views(lambda key, inputs: inputs, KEY, 1)
    logits, calls = get_logits(tmp_path, views=one_view, top_k=None)
    assert (logits.shape, calls) == ((10, 1, 7), 3)
    logits, calls = get_logits(tmp_path, views=None, top_k=None)
    assert (logits.shape, calls) == ((10, 7), 3)


def test_logits_of_other_arguments_are_kept_as_well(saved, folder):
    changes = {"top_k": None} | CHANGES["a weight"]
    expected, _ = get_logits(None, **changes)
    for _ in range(2):
        np.testing.assert_array_equal(get_logits(folder, **changes)[0], expected)
        chex.assert_trees_all_equal(get_logits(folder), (saved[1], 0))


@pytest.mark.parametrize("setting", ["jax", "matmul_precision"])
def test_logits_are_computed_again_under_other_numerics(folder, monkeypatch, setting):
    if setting == "jax":
        monkeypatch.setattr(jax, "__version__", "0.0.1")
        assert get_logits(folder)[1] > 0
    else:
        with jax.default_matmul_precision("highest"):
            assert get_logits(folder)[1] > 0


def test_augmentation_may_be_another_function_with_the_same_views(folder):
    views = Views(lambda key, inputs: add_integers(key, inputs), KEY, 3)
    assert get_logits(folder, views=views)[1] == 0


OTHER_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import test_teacher_cache
print(test_teacher_cache.get_logits(sys.argv[2])[1])
"""


@pytest.mark.thorough
def test_another_process_reads_the_logits(folder):
    command = [sys.executable, "-c", OTHER_PROCESS, os.path.dirname(__file__), str(folder)]
    environment = os.environ | {"PYTHONHASHSEED": "7", "XLA_FLAGS": ""}
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert completed.stdout == "0\n"


def test_damaged_logits_are_computed_again_with_a_warning(saved, folder):
    files = [path for path in folder.glob("*/0/**/*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.warns(UserWarning, match=r"0 is damaged and passed over: its files differ"):
        logits, calls = get_logits(folder)
    assert calls == 9
    chex.assert_trees_all_equal(logits, saved[1])
    assert get_logits(folder)[1] == 0


def test_two_runs_may_save_the_same_logits(saved, tmp_path, monkeypatch):
    def save_after_another_run(*args, **kwargs):
        monkeypatch.undo()
        assert get_logits(tmp_path)[1] == 9
        return checkpoints.save(*args, **kwargs)

    monkeypatch.setattr(teacher_cache, "save", save_after_another_run)
    logits, calls = get_logits(tmp_path)
    assert calls == 9
    chex.assert_trees_all_equal(logits, saved[1])
    assert get_logits(tmp_path)[1] == 0 and len(os.listdir(tmp_path)) == 1


def test_unwritable_folder_fails_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    teacher = Teacher()
    with pytest.raises(OSError, match="file"):
        teacher_logits(teacher, VARIABLES, IMAGES, folder=tmp_path / "file" / "logits")
    assert teacher.calls == 0


def test_full_disk_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "write_atomically", fail)
    with pytest.raises(OSError, match="No space left on device"):
        get_logits(tmp_path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []
    assert get_logits(tmp_path)[1] == 9


def test_secondary_processes_write_nothing(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    logits, calls = get_logits(tmp_path)
    assert calls == 9 and os.listdir(tmp_path) == []
    chex.assert_trees_all_equal(logits, saved[1])


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_teacher_cache as test
from jaxkd.distill import teacher_cache
save = teacher_cache.save
def save_and_die(*args, **kwargs):
    save(*args, **kwargs)
    print(*os.listdir(sys.argv[2]), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
teacher_cache.save = save_and_die
test.get_logits(sys.argv[2])
"""


@pytest.mark.thorough
def test_what_a_kill_left_is_deleted_when_the_folder_is_opened(tmp_path):
    command = [sys.executable, "-c", KILLED, os.path.dirname(__file__), str(tmp_path)]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    (name,) = os.listdir(tmp_path)
    assert completed.stdout == f"{name}\n" and name.startswith(teacher_cache.TEMPORARY_PREFIX)
    assert get_logits(tmp_path)[1] == 9
    (name,) = os.listdir(tmp_path)
    assert not name.startswith(".")


def test_folder_in_which_another_run_saves_is_left_alone(tmp_path):
    with teacher_cache._make_locked_folder(tmp_path) as folder:
        teacher_cache._prepare_folder(tmp_path)
        assert folder.is_dir()
    assert os.listdir(tmp_path) == []


def test_threads_share_a_folder(tmp_path):
    expected = [get_logits(None, top_k=k)[0] for k in (1, 2, 1, 2)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        logits = pool.map(lambda k: get_logits(tmp_path, top_k=k)[0], (1, 2, 1, 2), timeout=60)
        chex.assert_trees_all_equal(list(logits), expected)
    assert len(os.listdir(tmp_path)) == 2


# The program of a model


def make_shifted_model(make_shift):
    """Makes a model whose weights do not determine its logits, and its function that predicts."""

    def apply(variables, inputs, *, train, key=None):
        flat = inputs.reshape(len(inputs), -1).astype(jnp.float32) / 255
        return models.Outputs(flat @ variables["params"]["kernel"] + make_shift(flat), {}), {}

    return models.Model(lambda key, inputs: VARIABLES, apply)


def shift_by_callback(number):
    def make_shift(flat):
        shape = jax.ShapeDtypeStruct((len(flat), 7), flat.dtype)
        return jax.pure_callback(lambda x: np.full(shape.shape, number, x.dtype), shape, flat)

    return make_shift


def shift_by_array(number):
    array = jnp.full((30, 7), number, jnp.float32)
    return lambda flat: flat @ array


def count_predictions(model, folder):
    """Returns the number of examples that a cache predicts for a teacher."""
    counts = []
    predict = make_predict(model)

    def count_and_predict(variables, inputs):
        counts.append(len(inputs))
        return predict(variables, inputs)

    cache = TeacherCache({"teacher": model}, {"teacher": count_and_predict}, folder)
    options = {"augment": None, "num_views": None, "view_key": None, "parts": make_parts()}
    first = cache.get("teacher", VARIABLES, IMAGES, **options)
    assert cache.get("teacher", VARIABLES, IMAGES, **options) is first and first.features == {}
    np.testing.assert_allclose(first.logits, predict(VARIABLES, IMAGES), rtol=1e-6)
    return sum(counts)


def count_predictions_of_three(make_shift, folder):
    """Counts the predictions of a model, of another one, and of the first one again."""
    return [count_predictions(make_shifted_model(make_shift(n)), folder) for n in (1, 2, 1)]


@pytest.mark.parametrize("make_shift", [shift_by_array, shift_by_callback])
def test_model_that_closes_over_another_value_is_another_teacher(tmp_path, make_shift):
    assert count_predictions_of_three(make_shift, tmp_path) == [10, 10, 0]


def test_cache_returns_the_identical_arrays_for_an_equal_top_k(tmp_path):
    def predict(variables, inputs):
        return np.tile(inputs.reshape(len(inputs), -1), 9).astype(np.float32)

    cache = TeacherCache(
        {"teacher": make_shifted_model(shift_by_array(1))}, {"teacher": predict}, tmp_path
    )
    options = {"augment": None, "num_views": None, "view_key": None}
    # Python makes a new object for every integer above 256.
    first, second, other = (
        cache.get("teacher", VARIABLES, IMAGES, parts=make_parts(top_k=int(k)), **options).logits
        for k in ("260", "260", "259")
    )
    assert first is second and other.indices.shape == (10, 259)


HOISTED = """
import sys
sys.path.insert(0, sys.argv[1])
from test_teacher_cache import count_predictions_of_three, shift_by_array
print(count_predictions_of_three(shift_by_array, sys.argv[2]))
"""


@pytest.mark.thorough
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="JAX 0.7 fails under this option")
def test_constants_that_jax_makes_arguments_are_not_overlooked(tmp_path):
    # JAX reads the option when it starts.
    command = [sys.executable, "-c", HOISTED, os.path.dirname(__file__), str(tmp_path)]
    environment = os.environ | {"JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS": "1"}
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert completed.stdout == "[10, 10, 0]\n"
