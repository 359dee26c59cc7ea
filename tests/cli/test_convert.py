"""Tests of `jaxkd convert`: the file that it writes, its messages and its errors."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxkd import layout, models
from jaxkd.cli.convert import convert, find_constructors
from jaxkd.cli.main import main
from jaxkd.models import Outputs, from_linen
from jaxkd.transfer import Rule
from jaxkd.weights import load_safetensors, load_weights, save_safetensors, save_torch, to_torch

PRETRAINED = (
    Path(__file__).parents[2].parent / "shared" / "data" / "pretrained" / "resnet20-12fca82f.th"
)


class Small(nn.Module):
    num_classes: int = 3

    @nn.compact
    def __call__(self, inputs, train=False):
        del train
        x = nn.relu(nn.Conv(4, (3, 3), padding=1, name="conv")(inputs)).reshape(inputs.shape[0], -1)
        return Outputs(nn.Dense(self.num_classes, name="logits")(x), {})

    def torch_rules(self):
        return RULES


RULES = (
    Rule("conv.weight", "params/conv/kernel", layout.CONV),
    Rule("conv.bias", "params/conv/bias"),
    Rule("fc.weight", "params/logits/kernel", layout.flattened_dense(channels=4)),
    Rule("fc.bias", "params/logits/bias"),
)


def small(num_classes: int = 3, *, dropout: float = 0.0):
    del dropout
    return Small(num_classes)


def without_rules(num_classes: int = 3):
    return nn.Dense(num_classes)


def with_required_argument(widths, num_classes: int = 3):
    return Small(num_classes + len(widths))


@pytest.fixture
def variables():
    """The variables in the weights file, for 5 classes and images 2×2×3."""
    return from_linen(Small(5)).init(jax.random.key(4), jnp.zeros((1, 2, 2, 3)))


@pytest.fixture
def arguments(tmp_path, variables, monkeypatch):
    """Arguments that convert a file of 5 classes to the small model, in an empty folder."""
    monkeypatch.setattr(models, "small", small, raising=False)
    monkeypatch.chdir(tmp_path)
    save_torch("weights", variables, RULES)
    return "convert weights --model small --image-shape 2 2 3 -o out".split()


def run_with_error(arguments, capsys):
    """Runs a command that fails and returns its report and its one-line error."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = str(stop.value.code)
    assert error.startswith("error: ") and "\n" not in error and not os.path.exists("out")
    return capsys.readouterr().err, error


def test_converts(arguments, variables, capsys):
    main([*arguments, "--num-classes", "5"])
    chex.assert_trees_all_equal(load_safetensors("out"), variables)
    output = capsys.readouterr().out
    assert output.startswith("4 transferred, 0 missing") and output.endswith("\nwrote out\n")
    assert "fc.weight" in output and "params/logits/kernel" in output
    assert sorted(os.listdir()) == ["out", "weights"]


def test_long_option_for_the_output(arguments, variables):
    arguments = [argument.replace("-o", "--output") for argument in arguments]
    main([*arguments, "--num-classes=5"])
    chex.assert_trees_all_equal(load_safetensors("out"), variables)


def test_same_file_each_time(variables, arguments):
    image_shape = (2, 2, 3)
    convert(Small(5), Path("weights"), Path("a"), image_shape=image_shape)
    convert(Small(5), Path("weights"), Path("b"), image_shape=image_shape)
    assert Path("a").read_bytes() == Path("b").read_bytes()


def test_other_number_of_classes(arguments, capsys):
    report, error = run_with_error(arguments, capsys)
    assert "params/logits/kernel" in report and "params/logits/bias" in report
    assert "2 mismatched" in report
    assert error == (
        "error: weights does not fit small: "
        "use --num-classes 5, or --partial to leave out what does not fit"
    )


def test_partial_keeps_what_fits_and_initializes_the_rest(arguments, variables, capsys):
    main([*arguments, "--partial"])
    params = load_safetensors("out")["params"]
    chex.assert_trees_all_equal(params["conv"], variables["params"]["conv"])
    assert params["logits"]["kernel"].shape == (16, 3) and np.std(params["logits"]["kernel"]) > 0.1
    assert "2 mismatched" in capsys.readouterr().out


def test_other_image_shape_suggests_no_number_of_classes(arguments, capsys):
    arguments[arguments.index("2")] = "4"
    report, error = run_with_error([*arguments, "--num-classes", "5"], capsys)
    assert "1 mismatched" in report and "choose another --model, or --partial" in error


def test_missing_arrays_are_listed(arguments, variables, capsys):
    weights = to_torch(variables, RULES)
    del weights["conv.bias"], weights["fc.bias"]
    save_safetensors("weights", weights)
    report, error = run_with_error([*arguments, "--num-classes", "5"], capsys)
    assert "params/conv/bias" in report and "params/logits/bias" in report
    assert "choose another --model" in error


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"weights": "absent"}, "No such file or directory: 'absent'"),
        ({"weights": "."}, "is a folder"),
        ({"small": "large"}, "no model 'large' .*models are .*small"),
        ({"out": "absent/out"}, "the folder absent does not exist"),
        ({"-o": "--num-classes -1 -o"}, "--num-classes must be at least 1, got -1"),
        ({"-o": "--entry=ema -o"}, "safetensors file, which has no entries"),
    ],
)
def test_expected_errors(changes, match, arguments, capsys):
    arguments = " ".join(changes.get(word, word) for word in arguments).split()
    report, error = run_with_error(arguments, capsys)
    assert not report
    assert re.search(match, error)


def test_damaged_file_keeps_the_old_output(arguments, capsys):
    Path("weights").write_bytes(Path("weights").read_bytes()[:-1])
    Path("out").write_text("old")
    with pytest.raises(SystemExit, match="error: weights is not a complete safetensors file"):
        main(arguments)
    assert Path("out").read_text() == "old"


def test_error_names_a_missing_package(arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(
        SystemExit, match=r"error: .*safetensors.*pip install 'jaxkd-distill\[experiments\]'"
    ):
        main([*arguments, "--num-classes", "5"])


def test_find_constructors():
    namespace = {
        "small": small,
        "without_rules": without_rules,
        "with_required_argument": with_required_argument,
        "_small": small,
        "Small": Small,
        "models": types.ModuleType("models"),
        "from_linen": from_linen,
    }
    assert find_constructors(namespace) == {"small": small}


@pytest.mark.skipif(not PRETRAINED.exists(), reason="the ResNet-20 checkpoint is not available")
def test_pretrained_resnet20(tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "jaxkd", "convert", str(PRETRAINED)]
    command += ["--model", "resnet20", "-o", str(output)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[0].startswith(
        "97 transferred, 0 missing, 0 unexpected, 0 mismatched"
    )
    state_dict = to_torch(load_safetensors(output), models.resnet20().torch_rules())
    weights = load_weights(PRETRAINED)
    assert set(state_dict) == set(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(state_dict[name], array, strict=True)
