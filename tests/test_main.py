"""The command line: what it writes, and what it says where it cannot."""

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

from jaxkd import export, layout, models, verify
from jaxkd.__main__ import constructors, convert, main
from jaxkd.checkpoints.weights import load_weights, save_torch, to_torch
from jaxkd.models import Outputs, from_linen
from jaxkd.runs import RunError
from jaxkd.transfer import Rule

PRETRAINED = Path(__file__).parents[1].parent / "shared" / "data" / "pretrained" / "resnet20-12fca82f.th"


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


def smaller(num_classes: int = 3):
    return nn.Dense(num_classes)


def unfinished(widths, num_classes: int = 3):
    return Small(num_classes + len(widths))


@pytest.fixture
def wanted():
    """Variables that PyTorch's file will hold, for 5 classes and images 2×2×3."""
    return from_linen(Small(5)).init(jax.random.key(4), jnp.zeros((1, 2, 2, 3)))


@pytest.fixture
def line(tmp_path, wanted, monkeypatch):
    """A command line whose model is the small one, in a folder of its own, for a file of 5 classes."""
    monkeypatch.setattr(models, "small", small, raising=False)
    monkeypatch.chdir(tmp_path)
    save_torch("weights", wanted, RULES)
    return "convert weights --model small --image-shape 2 2 3 -o out".split()


def refusal(line, capsys):
    """What a command line that fails says: the report above, and the error in one line."""
    with pytest.raises(SystemExit) as stop:
        main(line)
    told = str(stop.value.code)
    assert told.startswith("error: ") and "\n" not in told and not os.path.exists("out")
    return capsys.readouterr().err, told


def test_converts(line, wanted, capsys):
    main([*line, "--num-classes", "5"])
    chex.assert_trees_all_equal(export.load_safetensors("out"), wanted)
    told = capsys.readouterr().out
    assert told.startswith("4 transferred, 0 missing") and told.endswith("\nwrote out\n")
    assert "fc.weight" in told and "params/logits/kernel" in told
    assert sorted(os.listdir()) == ["out", "weights"]


def test_same_file_each_time(wanted, line):
    shape = {"image_shape": (2, 2, 3)}
    convert(Small(5), Path("weights"), Path("a"), **shape)
    convert(Small(5), Path("weights"), Path("b"), **shape)
    assert Path("a").read_bytes() == Path("b").read_bytes()


def test_another_number_of_classes(line, capsys):
    report, told = refusal(line, capsys)
    assert "params/logits/kernel" in report and "params/logits/bias" in report and "2 mismatched" in report
    assert told == "error: weights does not fit small: use --num-classes 5, or --partial to leave out what does not fit"


def test_partial_keeps_what_fits_and_draws_the_rest(line, wanted, capsys):
    main([*line, "--partial"])
    found = export.load_safetensors("out")["params"]
    chex.assert_trees_all_equal(found["conv"], wanted["params"]["conv"])
    assert found["logits"]["kernel"].shape == (16, 3) and np.std(found["logits"]["kernel"]) > 0.1
    assert "2 mismatched" in capsys.readouterr().out


def test_another_image_says_no_number_of_classes(line, capsys):
    line[line.index("2")] = "4"
    report, told = refusal([*line, "--num-classes", "5"], capsys)
    assert "1 mismatched" in report and "choose another --model, or --partial" in told


def test_what_is_missing_is_listed(line, wanted, capsys):
    weights = to_torch(wanted, RULES)
    del weights["conv.bias"], weights["fc.bias"]
    export.save_safetensors("weights", weights)
    report, told = refusal([*line, "--num-classes", "5"], capsys)
    assert "params/conv/bias" in report and "params/logits/bias" in report and "choose another --model" in told


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"weights": "absent"}, "No such file or directory: 'absent'"),
        ({"weights": "."}, "is a folder"),
        ({"small": "large"}, "no model 'large' .*there are .*small"),
        ({"out": "absent/out"}, "absent is no folder"),
        ({"-o": "--num-classes -1 -o"}, "--num-classes must be at least 1, got -1"),
        ({"-o": "--entry=ema -o"}, "safetensors file, which has no entries"),
    ],
)
def test_expected_errors(changes, match, line, capsys):
    line = " ".join(changes.get(word, word) for word in line).split()
    report, told = refusal(line, capsys)
    assert not report
    assert re.search(match, told)


def test_damaged_file_leaves_the_old_output(line, capsys):
    Path("weights").write_bytes(Path("weights").read_bytes()[:-1])
    Path("out").write_text("old")
    with pytest.raises(SystemExit, match="error: weights is not a whole safetensors file"):
        main(line)
    assert Path("out").read_text() == "old"


def test_missing_package_is_named(line, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(SystemExit, match=r"error: .*safetensors.*pip install 'jaxkd-distill\[experiments\]'"):
        main([*line, "--num-classes", "5"])


def test_wrong_options_are_told(line, capsys):
    for words in (["convert"], ["verify"], [*line, "--num-classes", "five"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2 and "usage: python -m jaxkd" in capsys.readouterr().err


def test_models_that_can_be_named():
    namespace = {"small": small, "smaller": smaller, "unfinished": unfinished, "_small": small, "Small": Small}
    namespace |= {"models": types.ModuleType("models"), "from_linen": from_linen}
    assert constructors(namespace) == {"small": small}


def test_help_teaches():
    told = subprocess.run([sys.executable, "-m", "jaxkd"], capture_output=True, text=True, check=True)
    assert "convert" in told.stdout and "verify" in told.stdout and not told.stderr
    told = subprocess.run(
        [sys.executable, "-m", "jaxkd", "convert", "--help"], capture_output=True, text=True, check=True
    )
    assert "python -m jaxkd convert resnet20.th --model resnet20 -o" in told.stdout


@pytest.fixture
def found(monkeypatch):
    """Makes the outcome of a rerun, instead of one; returns where the reruns went."""

    def make(*verdicts):
        def verify_(folder, scratch):
            places.append((folder, Path(scratch), Path(scratch).exists()))
            return {folder / str(i): verdict for i, verdict in enumerate(verdicts)}

        monkeypatch.setattr(verify, "verify", verify_)
        return places

    places = []
    return make


def test_identical_rerun_is_a_success(found, capsys):
    places = found(verify.Verdict([], [], "8 records"), verify.Verdict([], ["cores 1 there and 2 here"], "9 records"))
    main(["verify", "run"])
    told = "run/0: identical (8 records)\nrun/1: identical (9 records)\n  recorded: cores 1 there and 2 here\n"
    assert capsys.readouterr().out == told
    ((folder, scratch, was_there),) = places
    assert folder == Path("run") and was_there and not scratch.exists()


def test_rerun_that_differs_is_told_and_no_success(found, capsys):
    places = found(verify.Verdict(["metrics: loss", "results: accuracy"], [], ""), verify.Verdict([], [], "1 record"))
    with pytest.raises(SystemExit) as stop:
        main(["verify", "run", "--keep", "again"])
    assert stop.value.code == 1 and places == [(Path("run"), Path("again"), False)]
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == ["run/0: differs", "  metrics: loss", "  results: accuracy"]
    assert told[3].startswith("  recorded alike; a GPU") and told[4:] == ["run/1: identical (1 record)"]


def test_run_that_cannot_be_verified_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert refusal(["verify", "absent"], capsys)[1] == "error: absent holds no run: there is no config.json in it"

    def fail(*arguments):
        raise RunError("the run\nis not finished")

    monkeypatch.setattr(verify, "verify", fail)
    assert refusal(["verify", "run"], capsys)[1] == "error: the run is not finished"


@pytest.mark.skipif(not PRETRAINED.exists(), reason="the ResNet-20 checkpoint is not beside this")
@pytest.mark.skipif(not hasattr(models, "resnet20"), reason="there is no ResNet-20 yet")
def test_pretrained_resnet20(tmp_path):
    output = tmp_path / "out"
    line = [sys.executable, "-m", "jaxkd", "convert", str(PRETRAINED), "--model", "resnet20", "-o", str(output)]
    told = subprocess.run(line, capture_output=True, text=True, check=True)
    assert told.stdout.splitlines()[0].startswith("97 transferred, 0 missing, 0 unexpected, 0 mismatched")
    module = models.resnet20()
    back, weights = to_torch(export.load_safetensors(output), module.torch_rules()), load_weights(PRETRAINED)
    assert set(back) == set(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(back[name], array, strict=True)
