"""Checkpoints are sound or do not count."""

import concurrent.futures
import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill, runs
from jaxkd._files import write_atomically
from jaxkd.runs import checkpoints


def make_state(step):
    variables = {"params": {"kernel": jnp.arange(400.0) + step}, "batch_stats": {}}
    return distill.init_train_state(variables, optax.adam(0.1))._replace(step=jnp.int32(step))


def largest_file(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def test_restores_what_was_saved(tmp_path):
    checkpoints.save(tmp_path, 3, make_state(3), notes={"seconds": 1.5})
    restored = checkpoints.restore(tmp_path, make_state(0))
    assert restored.step == 3 and restored.notes == {"seconds": 1.5}
    chex.assert_trees_all_equal(restored.tree, make_state(3))
    assert isinstance(restored.tree, distill.TrainState)


def test_absent_folder_gives_none(tmp_path):
    assert checkpoints.restore(tmp_path / "absent", make_state(0)) is None


def test_keeps_the_newest_and_clears_what_a_killed_process_left(tmp_path):
    (tmp_path / "2").mkdir()
    (tmp_path / "4.orbax-checkpoint-tmp-7").mkdir()
    for step in (1, 2, 3):
        checkpoints.save(tmp_path, step, make_state(step), keep=2)
    assert sorted(os.listdir(tmp_path)) == ["2", "2.json", "3", "3.json"]
    checkpoints.save(tmp_path, 3, make_state(33))
    chex.assert_trees_all_equal(checkpoints.restore(tmp_path, make_state(0)).tree, make_state(33))


def test_folder_without_a_manifest_does_not_count(tmp_path):
    checkpoints.save(tmp_path, 1, make_state(1))
    checkpoints.save(tmp_path, 2, make_state(2))
    (tmp_path / "2.json").unlink()
    (tmp_path / "9").mkdir()
    assert checkpoints.restore(tmp_path, make_state(0)).step == 1


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit": lambda folder: flip(largest_file(folder / "2")),
    "a truncated file": lambda folder: os.truncate(largest_file(folder / "2"), 10),
    "a missing file": lambda folder: largest_file(folder / "2").unlink(),
    "a broken manifest": lambda folder: (folder / "2.json").write_text("{"),
    "a deeply nested manifest": lambda folder: (folder / "2.json").write_text(100_000 * "["),
    "a manifest with a long number": lambda folder: (folder / "2.json").write_text(
        '{"sha256": ' + 5_000 * "1" + "}"
    ),
    "a manifest that is not text": lambda folder: (folder / "2.json").write_bytes(b"\xff\xfe{"),
    "a manifest that is a folder": lambda folder: (
        (folder / "2.json").unlink(),
        (folder / "2.json").mkdir(),
    ),
    "a foreign manifest with a sound checksum": lambda folder: (folder / "2.json").write_bytes(
        checkpoints._encode({"sha256": checkpoints._digest({"a": 1}), "a": 1})
    ),
    "a manifest of another kind": lambda folder: (folder / "2.json").write_text(json.dumps([1])),
    "a changed note": lambda folder: (folder / "2.json").write_text(
        (folder / "2.json").read_text().replace('"notes": {}', '"notes": {"seconds": 1}')
    ),
    "a manifest with another space": lambda folder: (folder / "2.json").write_text(
        (folder / "2.json").read_text().replace('"notes": {}', '"notes":  {}')
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, damage):
    checkpoints.save(tmp_path, 1, make_state(1))
    checkpoints.save(tmp_path, 2, make_state(2))
    DAMAGES[damage](tmp_path)
    with pytest.warns(UserWarning, match=r"2 is damaged and passed over"):
        restored = checkpoints.restore(tmp_path, make_state(0))
    assert restored.step == 1
    chex.assert_trees_all_equal(restored.tree, make_state(1))


# Identity

IDENTITY = {"seed": 0, "stage": "a"}


def copy_checkpoint(source, step, folder, new_step):
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source / str(step), folder / str(new_step))
    shutil.copy(source / f"{step}.json", folder / f"{new_step}.json")


@pytest.mark.parametrize("read", ["restore", "load"])
def test_checkpoint_under_another_number_is_passed_over(tmp_path, read):
    checkpoints.save(tmp_path, 23, make_state(23))
    copy_checkpoint(tmp_path, 23, tmp_path, 24)
    arguments = (make_state(0),) if read == "restore" else ()
    with pytest.warns(UserWarning, match="24 is foreign and passed over: it was saved as step 23"):
        assert getattr(checkpoints, read)(tmp_path, *arguments).step == 23


@pytest.mark.parametrize("other", [{"seed": 1, "stage": "a"}, {"seed": 0, "stage": "b"}])
@pytest.mark.parametrize("read", ["restore", "load"])
def test_checkpoint_of_another_training_is_passed_over(tmp_path, other, read):
    checkpoints.save(tmp_path / "own", 2, make_state(2), identity=other)
    checkpoints.save(tmp_path / "other", 3, make_state(3), identity=IDENTITY)
    copy_checkpoint(tmp_path / "other", 3, tmp_path / "own", 3)
    arguments = (make_state(0),) if read == "restore" else ()
    with pytest.warns(UserWarning, match="3 is foreign .*of another training .(seed|stage) was "):
        restored = getattr(checkpoints, read)(tmp_path / "own", *arguments, identity=other)
    assert restored.step == 2


def test_checkpoint_without_an_identity_is_anyones(tmp_path):
    checkpoints.save(tmp_path, 1, make_state(1))
    assert checkpoints.restore(tmp_path, make_state(0), identity=IDENTITY).step == 1
    checkpoints.save(tmp_path, 2, make_state(2), identity=IDENTITY)
    assert checkpoints.restore(tmp_path, make_state(0)).step == 2


def test_checkpoint_of_an_older_version_is_restored(tmp_path):
    checkpoints.save(tmp_path, 1, make_state(1))
    path = tmp_path / "1.json"
    manifest = json.loads(path.read_text())
    content = {name: manifest[name] for name in ("files", "tree", "notes")}
    path.write_bytes(checkpoints._encode({"sha256": checkpoints._digest(content), **content}))
    assert checkpoints.restore(tmp_path, make_state(0), identity=IDENTITY).step == 1


@pytest.mark.parametrize("step", [-1, 3.0, True, "3", None, np.float32(3), 2.5])
def test_step_that_is_not_a_number_of_steps_is_refused(tmp_path, step):
    checkpoints.save(tmp_path, 2, make_state(2))
    with pytest.raises(ValueError, match="step must be an integer of at least 0, got"):
        checkpoints.save(tmp_path, step, make_state(3))
    assert checkpoints.restore(tmp_path, make_state(0)).step == 2


@pytest.mark.parametrize("keep", [0, -1, 1.0, True, None])
def test_keep_that_keeps_nothing_is_refused(tmp_path, keep):
    checkpoints.save(tmp_path, 2, make_state(2))
    with pytest.raises(ValueError, match="keep must be an integer of at least 1, got"):
        checkpoints.save(tmp_path, 3, make_state(3), keep=keep)
    assert checkpoints.restore(tmp_path, make_state(0)).step == 2


def test_step_may_be_an_integer_of_numpy(tmp_path):
    checkpoints.save(tmp_path, np.int64(3), make_state(3))
    assert checkpoints.restore(tmp_path, make_state(0)).step == 3


def test_names_that_save_does_not_write_are_no_steps(tmp_path):
    checkpoints.save(tmp_path, 2, make_state(2))
    for name in ("007.json", "²3.json", "٣.json", "-4.json"):
        (tmp_path / name).write_text("{}")
    assert checkpoints.restore(tmp_path, make_state(0)).step == 2


def test_links_are_deleted_and_not_followed(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("mine")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("1", "3", "7"):
        (folder / name).symlink_to(tmp_path / "photos")
    (folder / "3.json").symlink_to(tmp_path / "photos" / "cat.jpg")
    checkpoints.save(folder, 3, make_state(3))
    assert sorted(os.listdir(folder)) == ["3", "3.json"]
    assert os.listdir(tmp_path / "photos") == ["cat.jpg"]
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "mine"
    assert checkpoints.restore(folder, make_state(0)).step == 3


# Threads and time


def test_threads_save_and_restore_at_the_same_time(tmp_path):
    def save_and_restore(i):
        for step in (1, 2):
            checkpoints.save(tmp_path / str(i), step, {"x": jnp.full(9, i)})
            assert (checkpoints.load(tmp_path / str(i)).tree["x"] == i).all()
        return int(checkpoints.restore(tmp_path / str(i), {"x": jnp.zeros(9, int)}).tree["x"][0])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(save_and_restore, range(4), timeout=60)) == [0, 1, 2, 3]


@pytest.fixture
def clock(monkeypatch):
    """Sets the clock forward within the next saves. Returns a function that takes their number."""
    offset, jumps = [0.0], []
    now, make_checkpointer = time.time, checkpoints._make_checkpointer

    def make_jumping_checkpointer():
        checkpointer = make_checkpointer()
        save = checkpointer.save

        def save_and_jump(*args):
            save(*args)
            if jumps:
                offset[0] += jumps.pop()

        checkpointer.save = save_and_jump
        return checkpointer

    monkeypatch.setattr(time, "time", lambda: now() + offset[0])
    monkeypatch.setattr(checkpoints, "_make_checkpointer", make_jumping_checkpointer)
    monkeypatch.setattr(checkpoints, "RETRY_SECONDS", 0.2)
    return lambda number: jumps.extend(number * [1e6])


def test_save_in_which_the_clock_jumps_is_tried_again(tmp_path, clock):
    clock(1)
    with pytest.warns(UserWarning, match="1 took too long to write, or the clock was set"):
        checkpoints.save(tmp_path, 1, {"x": jnp.arange(1e6)})
    assert sorted(os.listdir(tmp_path)) == ["1", "1.json"]
    assert checkpoints.restore(tmp_path, {"x": jnp.zeros(10**6)}).step == 1


def test_save_that_takes_too_long_every_time_is_one_line(tmp_path, monkeypatch):
    class SlowCheckpointer:
        def __enter__(self):
            return self

        def __exit__(self, *arguments):
            pass

        def save(self, *arguments):
            raise TimeoutError("Timed out after 600 seconds.")

    checkpoints.save(tmp_path, 1, make_state(1))
    monkeypatch.setattr(checkpoints, "_make_checkpointer", SlowCheckpointer)
    monkeypatch.setattr(checkpoints, "RETRY_SECONDS", 0.0)
    with (
        pytest.warns(UserWarning, match="trying again"),
        pytest.raises(OSError, match=r"orbax took too long 3 times \(Timed out .*: '.*2'$"),
    ):
        checkpoints.save(tmp_path, 2, make_state(2))
    monkeypatch.undo()
    assert checkpoints.restore(tmp_path, make_state(0)).step == 1


def test_loads_any_tree_into_host_memory(tmp_path):
    assert checkpoints.load(tmp_path) is None
    for step in (1, 2):
        checkpoints.save(
            tmp_path,
            step,
            {"state": make_state(step), "half": [jnp.ones(2, jnp.bfloat16)]},
            notes={"a": 1.5},
        )
    loaded = checkpoints.load(tmp_path)
    assert (loaded.step, loaded.notes) == (2, {"a": 1.5})
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(loaded.tree))
    kernel = loaded.tree["state"]["params"]["kernel"]
    np.testing.assert_array_equal(kernel, make_state(2).params["kernel"])
    assert loaded.tree["half"][0].dtype == jnp.bfloat16
    assert loaded.tree["state"]["opt_state"][0]["count"] == 0
    DAMAGES["a flipped bit"](tmp_path)
    with pytest.warns(UserWarning, match=r"2 is damaged and passed over"):
        assert checkpoints.load(tmp_path).step == 1


@pytest.mark.parametrize(
    "other",
    [
        {"other": jnp.zeros(3)},
        {"x": jnp.zeros(4)},
        {"x": jnp.zeros(3, jnp.bfloat16)},
        {"x": jnp.zeros((3, 1))},
    ],
)
def test_checkpoint_of_another_tree_is_refused_and_kept(tmp_path, other):
    checkpoints.save(tmp_path, 1, {"x": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"1 has other arrays \(\['\w+'\] was .* and is .*: use "):
        checkpoints.restore(tmp_path, other)
    assert checkpoints.restore(tmp_path, {"x": jnp.ones(3)}).step == 1


def test_saving_leaves_other_files_alone(tmp_path):
    for name in ("thesis.tex", "notes.json", "2026-11"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "photos").mkdir()
    checkpoints.save(tmp_path, 1, make_state(1))
    assert sorted(os.listdir(tmp_path)) == [
        "1",
        "1.json",
        "2026-11",
        "notes.json",
        "photos",
        "thesis.tex",
    ]


def test_new_checkpoints_outlive_damaged_ones_of_higher_numbers(tmp_path):
    for step in (8, 9):
        checkpoints.save(tmp_path, step, make_state(step))
        flip(largest_file(tmp_path / str(step)))
    checkpoints.save(tmp_path, 1, make_state(1))
    assert checkpoints.restore(tmp_path, make_state(0)).step == 1
    assert sorted(os.listdir(tmp_path)) == ["1", "1.json"]


@pytest.fixture
def control_c():
    """Ctrl-C as in a terminal. In a job that a shell starts in the background, it is ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("control_c")
def test_control_c_waits_for_the_end_of_a_save(tmp_path, monkeypatch):
    make_checkpointer = checkpoints._make_checkpointer

    def interrupt():
        signal.raise_signal(signal.SIGINT)
        return make_checkpointer()

    monkeypatch.setattr(checkpoints, "_make_checkpointer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(tmp_path, 1, make_state(1))
    monkeypatch.undo()
    chex.assert_trees_all_equal(checkpoints.restore(tmp_path, make_state(0)).tree, make_state(1))
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


SAVE_WITH_LIMIT = """
import resource, sys
import jax.numpy as jnp
from jaxkd._files import write_atomically
from jaxkd.runs import checkpoints
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoints.save(sys.argv[1], 2, {"x": jnp.arange(10_000.0) ** 0.5})
except OSError as error:
    print(error)
"""


def test_file_that_cannot_be_written_is_one_line(tmp_path):
    # For orbax, a limit on the size of files is like a full disk.
    pytest.importorskip("resource", reason="this system has no limit on a file's size")
    checkpoints.save(tmp_path, 1, {"x": jnp.ones(10_000)})
    completed = subprocess.run(
        [sys.executable, "-c", SAVE_WITH_LIMIT, tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )
    message = f"[Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}: '{tmp_path / '2'}'\n"
    assert completed.stdout == message and not completed.stderr
    assert checkpoints.restore(tmp_path, {"x": jnp.zeros(10_000)}).step == 1


def test_error_without_a_number_is_an_os_error(tmp_path, monkeypatch):
    class FailingCheckpointer:
        def __enter__(self):
            return self

        def __exit__(self, *arguments):
            pass

        def save(self, *arguments):
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand a page of details")

    monkeypatch.setattr(checkpoints, "_make_checkpointer", FailingCheckpointer)
    with pytest.raises(
        OSError, match="1 cannot be written: RESOURCE_EXHAUSTED: No space left on device$"
    ):
        checkpoints.save(tmp_path, 1, make_state(1))


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_atomic_write_leaves_the_old_content_when_it_fails(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*file'"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_threads_write_one_file_atomically(tmp_path):
    contents = [bytes([i]) * 100_000 for i in range(8)]
    stop = threading.Event()
    torn = []

    def read():
        while not stop.is_set():
            with contextlib.suppress(FileNotFoundError):
                if (tmp_path / "file").read_bytes() not in contents:
                    torn.append(1)

    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        reader = pool.submit(read)
        writes = [
            pool.submit(write_atomically, tmp_path / "file", contents[i % 8]) for i in range(200)
        ]
        try:
            for write in writes:
                write.result()
        finally:
            stop.set()
        reader.result()
    assert not torn and os.listdir(tmp_path) == ["file"]


def test_atomic_write_follows_no_link(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "thesis.tex")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    assert (tmp_path / "link").read_bytes() == b"new"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file_is_not_replaced(tmp_path, make):
    make(tmp_path / "file")
    mode = (tmp_path / "file").stat().st_mode
    with pytest.raises(OSError, match="is not a regular file, name another one: '.*file'"):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").stat().st_mode == mode
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_restores_on_one_of_several_devices(tmp_path):
    assert jax.device_count() == 8
    checkpoints.save(tmp_path, 1, jax.device_put({"x": jnp.arange(8.0)}, jax.devices()[3]))
    assert checkpoints.restore(tmp_path, {"x": jnp.zeros(8)}).tree["x"].devices() == {
        jax.devices()[0]
    }


@pytest.mark.parametrize("call", ["save", "restore", "load"])
def test_without_orbax_the_error_names_the_command(tmp_path, monkeypatch, call):
    checkpoints.save(tmp_path, 1, {"x": jnp.zeros(3)})
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    arguments = {"save": (2, {"x": jnp.zeros(3)}), "restore": ({"x": jnp.zeros(3)},), "load": ()}
    message = r"^this needs orbax.checkpoint, .*: pip install -e '.*\[train\]'$"
    with pytest.raises(ImportError, match=message):
        getattr(checkpoints, call)(tmp_path, *arguments[call])


def test_a_checkpoint_or_a_run_is_no_folder_of_checkpoints(tmp_path):
    """They would be said to hold no checkpoint, and the training would start anew."""
    run = runs.open_run(tmp_path / "run", {})
    folder = run.checkpoint_folder(0, "first")
    checkpoints.save(folder, 3, make_state(3))
    for read in (checkpoints.load, lambda path: checkpoints.restore(path, make_state(0))):
        with pytest.raises(
            ValueError, match=r"first/3 is one checkpoint: name the folder .*first "
        ):
            read(folder / "3")
        with pytest.raises(ValueError, match=r"is the folder of a run: name that of a training in"):
            read(run.folder)
        assert read(folder).step == 3 and read(folder / "4") is None and read(tmp_path) is None
