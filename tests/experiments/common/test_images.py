"""Caching of teachers, views and augmentation of stages on images, and pretrained weights."""

import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import images
from experiments.common.cli import OptionError
from experiments.common.images import Options
from jaxkd import data, distill, layout, models, weights
from jaxkd.distill.methods import supervised_loss
from jaxkd.transfer import Rule
from jaxkd.weights import save_safetensors


def test_teachers_can_be_cached_if_all_views_are_known():
    assert Options().can_cache_teachers and Options(augment=True, views=3).can_cache_teachers
    assert not Options(augment=True).can_cache_teachers


def test_stage_has_the_views_of_the_options():
    model = models.from_linen(models.CNN((4,), 4))
    examples = {"inputs": np.zeros((6, 8, 8, 1), np.uint8), "labels": np.arange(6)}
    plain, new_views, fixed_views = (
        images.make_stage("stage", model, examples, supervised_loss, options, steps=1)
        for options in (Options(), Options(augment=True), Options(augment=True, views=3))
    )
    assert (plain.augment, plain.views) == (None, None)
    assert (new_views.augment, new_views.views) == (data.crop_and_flip, None)
    assert (fixed_views.augment, fixed_views.views) == (data.crop_and_flip, 3)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"views": 3}, "--views 3: needs at least 1, together with --augment"),
        ({"augment": True, "views": 0}, "--views 0"),
    ],
)
def test_refuses_invalid_options(options, error):
    with pytest.raises(OptionError, match=error):
        Options(**options).check()


@pytest.fixture(scope="module")
def teacher():
    """A teacher of three classes that prefers the first one."""
    model = models.from_linen(models.CNN((2,), 2, num_classes=3))
    variables = model.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    variables["params"]["logits"]["bias"] = np.array([9.0, 0, 0], np.float32)
    return distill.Pretrained("teacher", model, variables)


def predicted_class(teacher, names):
    inputs = np.zeros((1, 8, 8, 1), np.float32)
    outputs, _ = teacher.model.apply(teacher.variables, inputs, train=False)
    return names[int(outputs.logits.argmax())]


def test_teacher_s_classes_are_matched_by_the_names_in_its_file(teacher, tmp_path, capsys):
    path = tmp_path / "student.safetensors"
    save_safetensors(path, teacher.variables, class_names=("dog", "ant", "cat"))
    names = ("ant", "cat", "dog")
    default = ("x", "y", "z")
    assert predicted_class(teacher, names) == "ant"
    matched = images.match_teacher(teacher, path, names, default=default)
    assert predicted_class(matched, names) == "dog"
    # The folder of a run has the same names.
    matched = images.match_teacher(teacher, tmp_path, names, default=default)
    assert predicted_class(matched, names) == "dog"
    assert "they are matched by name" in capsys.readouterr().out
    message = "--dataset: the classes .* only the data has fox and only the teacher has dog: rename"
    with pytest.raises(OptionError, match=message):
        images.match_teacher(teacher, path, ("ant", "cat", "fox"), default=default)


def test_teacher_s_classes_are_those_of_the_script_if_its_file_has_none(teacher, tmp_path, capsys):
    path = tmp_path / "teacher.th"
    path.write_bytes(b"no safetensors")
    names = ("ant", "cat", "dog")
    default = ("dog", "ant", "cat")
    assert predicted_class(images.match_teacher(teacher, path, names, default=default), names) == (
        "dog"
    )
    assert images.match_teacher(teacher, path, names, default=names) is teacher
    capsys.readouterr()
    assert images.match_teacher(teacher, path, ("0", "1", "2"), default=default) is teacher
    assert "0 is taken for the teacher's dog, and so on" in capsys.readouterr().out
    assert images.match_teacher(teacher, path, ("0", "1", "2"), default="012") is teacher
    with pytest.raises(OptionError, match="only the data has 0, 1, 2, 3 and only the teacher"):
        images.match_teacher(teacher, path, ("0", "1", "2", "3"), default=default)


# --- pretrained weights ---

MODULE = models.CNN((4,), hidden=8, num_classes=3)
PIXELS = np.zeros((2, 6, 6, 3), np.uint8)
RULES = (
    Rule("conv1.weight", "params/conv1/kernel", layout.CONV),
    Rule("conv1.bias", "params/conv1/bias"),
    Rule("fc1.weight", "params/hidden/kernel", layout.flattened_dense(channels=4)),
    Rule("fc1.bias", "params/hidden/bias"),
    Rule("fc2.weight", "params/logits/kernel", layout.DENSE),
    Rule("fc2.bias", "params/logits/bias"),
)


class PretrainedCNN(models.CNN):
    """A network that knows PyTorch's names."""

    def torch_rules(self):
        return RULES


def load_pretrained(path):
    module = PretrainedCNN((4,), hidden=8, num_classes=3)
    statistics = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    return images.load_pretrained("teacher", module, path, PIXELS, Options(), **statistics)


@pytest.fixture
def variables():
    return models.from_linen(MODULE).init(jax.random.key(3), jnp.zeros(PIXELS.shape))


def test_every_file_of_the_library_and_of_pytorch_is_a_teacher(variables, tmp_path, capsys):
    weights.save_safetensors(tmp_path / "student.safetensors", variables)
    weights.save_torch(tmp_path / "torch", variables, RULES)
    for path in (tmp_path / "student.safetensors", tmp_path, tmp_path / "torch"):
        chex.assert_trees_all_equal(load_pretrained(path).variables, variables)
    assert not capsys.readouterr().out
    named = {f"_orig_mod.{k}": a for k, a in weights.to_torch(variables, RULES).items()}
    weights.save_safetensors(tmp_path / "compiled", named)
    chex.assert_trees_all_equal(load_pretrained(tmp_path / "compiled").variables, variables)
    assert capsys.readouterr().out == (
        "PretrainedCNN: removed '_orig_mod.' from the names of its weights\n"
    )


def test_weights_that_do_not_fit_end_in_one_line(variables, tmp_path):
    path = tmp_path / "weights"
    weights.save_safetensors(path, {"a.weight": np.ones(2)})
    with pytest.raises(OptionError, match="does not fit PretrainedCNN: 0 transferred, 6 missing"):
        load_pretrained(path)
    other = models.from_linen(models.CNN((4,), hidden=8, num_classes=5))
    other = other.init(jax.random.key(3), jnp.zeros(PIXELS.shape))
    weights.save_safetensors(path, other)
    with pytest.raises(OptionError, match="4 transferred, .* 2 mismatched") as error:
        load_pretrained(path)
    assert "\n" not in str(error.value)
    path.write_text("<html>")
    with pytest.raises(OptionError, match="weights: is a web page: download the file") as error:
        load_pretrained(path)
    assert str(error.value).count(str(path)) == 1
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OptionError, match="weights: is a FIFO"):
        load_pretrained(path)
