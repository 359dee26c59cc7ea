"""Tests of saving a model as one serialized program."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.models import CNN, Model, Outputs, from_linen, with_input_normalization
from jaxkd.weights import save_program

# Runs a program where importing jaxkd or Flax is an error.
RUN_ALONE = """
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
np.savez(sys.argv[3], single=program.call(images[:1]), batch=program.call(images))
"""


@pytest.fixture(scope="module")
def student():
    model = with_input_normalization(from_linen(CNN(features=(4,), hidden=8)), [0.5] * 3, [0.2] * 3)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    return model, model.init(jax.random.key(0), images), images


@pytest.fixture
def locations_limit():
    """Sets a limit of its own, and checks afterwards that `save_program` has restored it."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 7)
    yield
    after = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", before)
    assert after == 7


@pytest.mark.thorough
def test_program_runs_without_this_package(student, tmp_path):
    model, variables, images = student
    save_program(tmp_path / "program", model, variables, jax.ShapeDtypeStruct((8, 8, 3), jnp.uint8))
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-W", "error", "-c", RUN_ALONE]
    command += ["program", "images.npy", "logits.npz"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    expected = np.asarray(model.apply(variables, images, train=False)[0].logits)
    with np.load(tmp_path / "logits.npz") as logits:
        np.testing.assert_allclose(logits["single"], expected[:1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(logits["batch"], expected, rtol=1e-5, atol=1e-6)


def test_program_is_for_every_platform_and_any_batch(student, tmp_path):
    model, variables, _ = student
    save_program(tmp_path / "program", model, variables, jax.ShapeDtypeStruct((8, 8, 3), jnp.uint8))
    program = jax.export.deserialize(bytearray((tmp_path / "program").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu") and program.nr_devices == 1
    assert [str(aval) for aval in program.in_avals] == ["uint8[b,8,8,3]"]
    assert [str(aval) for aval in program.out_avals] == ["float32[b,10]"]


def test_same_program_gives_the_same_bytes_without_paths(student, tmp_path, locations_limit):
    model, variables, _ = student
    example = jax.ShapeDtypeStruct((8, 8, 3), jnp.uint8)
    save_program(tmp_path / "first", model, variables, example)
    replicated = jax.device_put(
        variables, jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P())
    )
    save_program(tmp_path / "second", model, replicated, example)
    content = (tmp_path / "first").read_bytes()
    assert content == (tmp_path / "second").read_bytes()
    assert not any(
        word in content for word in (b".py", b"site-packages", b"jaxkd/", os.getcwd().encode())
    )


def test_failed_export_keeps_the_old_file_and_the_settings(tmp_path, locations_limit):
    def apply(variables, inputs, *, train, key=None):
        return Outputs(inputs if inputs.shape[0] > 3 else -inputs, {}), {}

    (tmp_path / "program").write_bytes(b"old")
    with pytest.raises(Exception, match="inconclusive"):
        save_program(
            tmp_path / "program", Model(dict, apply), {}, jax.ShapeDtypeStruct((2,), jnp.float32)
        )
    assert (tmp_path / "program").read_bytes() == b"old" and os.listdir(tmp_path) == ["program"]


def test_program_is_in_prediction_mode(tmp_path):
    def apply(variables, inputs, *, train, key=None):
        return Outputs(variables["params"] * inputs * (2 if train else 1), {}), {}

    example = jax.ShapeDtypeStruct((2,), jnp.float32)
    save_program(tmp_path / "program", Model(dict, apply), {"params": np.float32(3)}, example)
    program = jax.export.deserialize(bytearray((tmp_path / "program").read_bytes()))
    np.testing.assert_array_equal(program.call(np.ones((1, 2), np.float32)), [[3, 3]])
