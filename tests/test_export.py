import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import export
from jaxkd.models import CNN, Model, Outputs, from_linen, standardized

ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jaxkd", "flax"):
            raise ImportError(f"the program must run without {name}")

sys.meta_path.insert(0, Refuse())
import numpy as np
from pathlib import Path
from jax import export
program = export.deserialize(bytearray(Path(sys.argv[1]).read_bytes()))
images = np.load(sys.argv[2])
np.savez(sys.argv[3], one=program.call(images[:1]), five=program.call(images))
"""


@pytest.fixture(scope="module")
def student():
    model = standardized(from_linen(CNN(features=(4,), hidden=8)), [0.5] * 3, [0.2] * 3)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    return model, model.init(jax.random.key(0), images), images


@pytest.fixture
def locations():
    """A setting of JAX that is not the one under which programs are saved, and has to be there afterwards."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 7)
    yield
    after = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", before)
    assert after == 7


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for leaf, same in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert leaf.dtype == same.dtype
        np.testing.assert_array_equal(leaf, same)


def test_weights_come_back_as_they_were(student, tmp_path):
    _, variables, _ = student
    export.save_safetensors(tmp_path / "student.safetensors", variables)
    loaded = export.load_safetensors(tmp_path / "student.safetensors")
    assert_same(loaded, variables)
    assert loaded["batch_stats"] == {}
    assert os.listdir(tmp_path) == ["student.safetensors"]


def test_names_are_paths(student, tmp_path):
    from safetensors.numpy import load_file

    export.save_safetensors(tmp_path / "student.safetensors", student[1])
    expected = {f"params/{layer}/{name}" for layer in ("conv1", "hidden", "logits") for name in ("bias", "kernel")}
    assert set(load_file(tmp_path / "student.safetensors")) == expected


def test_statistics_lists_views_and_small_types_come_back(tmp_path):
    layers = {0: {"kernel": jnp.ones((2, 3), jnp.bfloat16)}, 11: {"kernel": np.arange(6.0).reshape(2, 3).T}}
    variables = {"params": {"layers": layers}, "batch_stats": {"count": np.array(3, np.int32)}}
    export.save_safetensors(tmp_path / "student.safetensors", variables)
    assert_same(export.load_safetensors(tmp_path / "student.safetensors"), variables)


def test_the_same_weights_give_the_same_file(student, tmp_path):
    _, variables, _ = student
    backwards = {"batch_stats": {}, "params": dict(reversed(variables["params"].items()))}
    export.save_safetensors(tmp_path / "first", variables)
    export.save_safetensors(tmp_path / "second", backwards)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.parametrize("key", ["conv/1", "12"])
def test_keys_that_would_change_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match=f"'{key}' in params/"):
        export.save_safetensors(tmp_path / "student.safetensors", {"params": {key: np.zeros(1)}})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:20], lambda content: b"no"])
def test_a_damaged_file_is_named(student, tmp_path, damage):
    path = tmp_path / "student.safetensors"
    export.save_safetensors(path, student[1])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"student\.safetensors is not a whole safetensors file"):
        export.load_safetensors(path)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        export.load_safetensors(tmp_path / "student.safetensors")


def test_the_program_runs_without_this_package(student, tmp_path):
    model, variables, images = student
    export.save_program(tmp_path / "program", model, variables, jax.ShapeDtypeStruct((8, 8, 3), jnp.uint8))
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-W", "error", "-c", ALONE, "program", "images.npy", "logits.npz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = np.asarray(model.apply(variables, images, train=False)[0].logits)
    with np.load(tmp_path / "logits.npz") as logits:
        np.testing.assert_allclose(logits["one"], expected[:1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(logits["five"], expected, rtol=1e-5, atol=1e-6)


def test_the_program_is_for_every_platform_and_any_batch(student, tmp_path):
    model, variables, _ = student
    export.save_program(tmp_path / "program", model, variables, jax.ShapeDtypeStruct((8, 8, 3), jnp.uint8))
    program = jax.export.deserialize(bytearray((tmp_path / "program").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu") and program.nr_devices == 1
    assert [str(aval) for aval in program.in_avals] == ["uint8[b,8,8,3]"]
    assert [str(aval) for aval in program.out_avals] == ["float32[b,10]"]


def test_the_same_program_gives_the_same_bytes_and_tells_no_paths(student, tmp_path, locations):
    model, variables, _ = student
    example = jax.ShapeDtypeStruct((8, 8, 3), jnp.uint8)
    export.save_program(tmp_path / "first", model, variables, example)
    spread = jax.device_put(variables, jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P()))
    export.save_program(tmp_path / "second", model, spread, example)
    content = (tmp_path / "first").read_bytes()
    assert content == (tmp_path / "second").read_bytes()
    assert not any(word in content for word in (b".py", b"site-packages", b"jaxkd/", os.getcwd().encode()))


def test_a_failed_export_leaves_the_old_file_and_the_settings(tmp_path, locations):
    def apply(variables, inputs, *, train, key=None):
        return Outputs(inputs if inputs.shape[0] > 3 else -inputs, {}), {}

    (tmp_path / "program").write_bytes(b"old")
    with pytest.raises(Exception, match="inconclusive"):
        export.save_program(tmp_path / "program", Model(dict, apply), {}, jax.ShapeDtypeStruct((2,), jnp.float32))
    assert (tmp_path / "program").read_bytes() == b"old" and os.listdir(tmp_path) == ["program"]


def test_the_program_predicts_and_does_not_train(tmp_path):
    def apply(variables, inputs, *, train, key=None):
        return Outputs(variables["params"] * inputs * (2 if train else 1), {}), {}

    example = jax.ShapeDtypeStruct((2,), jnp.float32)
    export.save_program(tmp_path / "program", Model(dict, apply), {"params": np.float32(3)}, example)
    program = jax.export.deserialize(bytearray((tmp_path / "program").read_bytes()))
    np.testing.assert_array_equal(program.call(np.ones((1, 2), np.float32)), [[3, 3]])
