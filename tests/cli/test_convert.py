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
from jaxkd.weights import (
    load_safetensors,
    load_weights,
    read_class_names,
    save_safetensors,
    save_torch,
    to_torch,
)

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


def test_damaged_file_leaves_no_output(arguments, capsys):
    Path("weights").write_bytes(Path("weights").read_bytes()[:-1])
    _, error = run_with_error(arguments, capsys)
    assert error.startswith("error: weights is not a complete safetensors file")
    assert os.listdir() == ["weights"]


def test_error_names_a_missing_package(arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(SystemExit, match=r"error: .*safetensors.*pip install -e '.*\[train\]'$"):
        main([*arguments, "--num-classes", "5"])


# --- names of wrappers, what moved, and the library's own files ---


def prefix_weights(prefix, **extra):
    weights = load_weights("weights")
    save_safetensors("weights", {f"{prefix}{k}": a for k, a in weights.items()} | extra)


@pytest.mark.parametrize("options", [[], ["--partial"]])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "module.module."])
def test_prefixes_are_removed_and_named(prefix, options, arguments, variables, capsys):
    prefix_weights(prefix, n_averaged=np.array(3))
    main([*arguments, "--num-classes", "5", *options])
    chex.assert_trees_all_equal(load_safetensors("out"), variables)
    output = capsys.readouterr().out
    assert f"removed {prefix!r} from the names" in output and "n_averaged" in output
    share = "transferred 4 of 4 (100.0 %) arrays and 197 of 197 (100.0 %) parameters"
    assert (share in output) == bool(options)


@pytest.mark.parametrize("options", [[], ["--partial"]])
def test_nothing_transferred_is_an_error_and_suggests_no_other_option(options, arguments, capsys):
    save_safetensors("weights", {f"a{i}.weight": np.ones(3) for i in range(5)})
    report, error = run_with_error([*arguments, *options], capsys)
    assert "0 transferred, 4 missing" in report
    assert error == (
        "error: weights does not fit small: nothing fits, its names are a0.weight, a1.weight, "
        "a2.weight, a3.weight and 1 more: choose another --model or file"
    )


@pytest.mark.parametrize("options", [[], ["--partial"]])
def test_what_differs_in_dtype_is_named(options, arguments, variables, capsys):
    weights = {name: array.astype(np.int32) for name, array in load_weights("weights").items()}
    save_safetensors("weights", weights)
    _, error = run_with_error([*arguments, "--num-classes", "5", *options], capsys)
    assert error == (
        "error: the weights are int32 where the network has floating-point numbers, 4 arrays such "
        "as conv.bias: dequantise the weights first, and save them as float32"
    )
    assert not Path("out").exists()


@pytest.mark.parametrize("options", [[], ["--partial"]])
def test_adapters_are_not_left_out(options, arguments, capsys):
    prefix_weights("base_model.model.", **{"base_model.model.fc.lora_A.weight": np.ones((4, 2))})
    _, error = run_with_error([*arguments, "--num-classes", "5", *options], capsys)
    assert error.startswith("error: the file holds LoRA adapters, 1 array such as fc.lora_A.weight")
    assert not Path("out").exists()


def test_partial_states_the_share(arguments, capsys):
    main([*arguments, "--partial"])
    assert (
        "transferred 2 of 4 (50.0 %) arrays and 112 of 163 (68.7 %) parameters; "
        "the rest is drawn at random; of the file, 2 arrays are left out, such as fc.bias\n"
    ) in capsys.readouterr().out
    # A larger network has all that a smaller one needs.
    prefix_weights("", **{f"conv{i}.weight": np.ones(3) for i in range(60)})
    os.remove("out")
    main([*arguments, "--num-classes", "5", "--partial"])
    assert (
        "parameters; of the file, 60 arrays are left out, such as conv0.weight\n"
    ) in capsys.readouterr().out


@pytest.mark.filterwarnings("default")
def test_a_second_network_is_named(arguments, variables, capsys):
    prefix_weights("", **{f"ema.{k}": a for k, a in load_weights("weights").items()})
    arguments = [*arguments, "--num-classes", "5"]
    _, error = run_with_error(arguments, capsys)
    assert error == (
        "error: the weights are two networks, one of names that begin with 'ema.': take that one "
        "by entry='ema' (--entry ema), or the other one by strict=False (--partial)"
    )
    main([*arguments, "--partial"])
    assert "warning: the weights are two networks" in capsys.readouterr().err


def test_entry_selects_one_of_two_networks(arguments, variables, capsys):
    prefix_weights("teacher.")
    weights = load_weights("weights")
    other = {"student.conv.weight": np.ones((2, 3, 3, 3), np.float32)}
    save_safetensors("weights", weights | other)
    _, error = run_with_error([*arguments, "--num-classes", "5"], capsys)
    assert error.endswith(
        "student.conv.weight would be left over, besides the names that begin with 'teacher.': "
        "use --entry teacher to take those alone"
    )
    copies = {name.replace("teacher", "copy"): array for name, array in weights.items()}
    save_safetensors("weights", weights | copies)
    _, error = run_with_error([*arguments, "--num-classes", "5", "--partial"], capsys)
    assert "each of the prefixes 'copy.' and 'teacher.': choose one, as in entry='copy'" in error
    main([*arguments, "--num-classes", "5", "--entry", "teacher"])
    chex.assert_trees_all_equal(load_safetensors("out"), variables)


@pytest.mark.parametrize("options", [[], ["--partial"]])
def test_its_own_output_and_a_run_are_inputs(options, arguments, variables):
    main([*arguments, "--num-classes", "5"])
    os.rename("out", "own")
    os.mkdir("run")
    save_safetensors("run/student.safetensors", variables)
    for source in ("own", "run"):
        again = [source if argument == "weights" else argument for argument in arguments]
        main([*again, "--num-classes", "5", *options])
        chex.assert_trees_all_equal(load_safetensors("out"), variables)
        os.remove("out")
        with pytest.raises(SystemExit, match="use --num-classes 5, or --partial"):
            main(again)


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(arguments, variables, monkeypatch, capsys):
    def read_torch(path):
        return {**to_torch(variables, RULES), "epoch": 3}

    # In the format of PyTorch, which may have other values between the weights.
    Path("weights").write_bytes(b"PK")
    monkeypatch.setattr("jaxkd.weights.torch_files.read_torch", read_torch)
    main([*arguments, "--num-classes", "5"])
    chex.assert_trees_all_equal(load_safetensors("out"), variables)
    assert capsys.readouterr().err == (
        "warning: left out what is no array between the weights: 'epoch' (int)\n"
    )


@pytest.mark.parametrize(("num_classes", "names"), [(5, ("a", "b", "c", "d", "e")), (3, ())])
def test_names_of_the_same_classes_are_kept(num_classes, names, arguments, variables):
    os.mkdir("run")
    save_safetensors("run/student.safetensors", variables, class_names=list("abcde"))
    for source in ("run", "run/student.safetensors"):
        again = [source if argument == "weights" else argument for argument in arguments]
        main([*again, "--partial", f"--num-classes={num_classes}"])
        assert read_class_names("out") == names
        os.remove("out")


# --- files that cannot be read or written ---


def test_only_regular_files_are_read_and_written(arguments, capsys):
    os.mkfifo("fifo")
    for path in ("fifo", "/dev/zero"):
        _, error = run_with_error(
            [path if argument == "weights" else argument for argument in arguments], capsys
        )
        assert "is a FIFO, a device or a socket" in error
    # Not /dev/null, which a defect would replace by a file.
    for path in ("fifo", "."):
        _, error = run_with_error(
            [path if argument == "out" else argument for argument in arguments], capsys
        )
        assert f"{path} is not a regular file: choose another --output" in error


@pytest.mark.parametrize("existing", ["other.pth", "run/student.safetensors", "dangling"])
def test_nothing_is_overwritten(existing, arguments, variables, capsys):
    os.mkdir("run")
    Path("other.pth").touch()
    save_safetensors("run/student.safetensors", variables, class_names=list("abcde"))
    os.symlink("absent", "dangling")
    before = {path: path.read_bytes() for path in Path().rglob("*.*")}
    arguments = [*arguments, "--num-classes", "5"]
    _, error = run_with_error([existing if word == "out" else word for word in arguments], capsys)
    assert error == f"error: {existing} exists: choose another --output, or remove it"
    assert {path: path.read_bytes() for path in Path().rglob("*.*")} == before
    assert os.path.islink("dangling") and not os.path.exists("absent")


def test_the_input_is_not_overwritten(arguments, capsys):
    content = Path("weights").read_bytes()
    os.symlink("weights", "link")
    for output in ("weights", "link", "../" + Path.cwd().name + "/weights"):
        _, error = run_with_error(
            [output if argument == "out" else argument for argument in arguments], capsys
        )
        assert "is the file to convert: choose another --output" in error
    assert Path("weights").read_bytes() == content


def test_paths_that_are_not_utf8_end_in_one_line(arguments, capsys):
    name = os.fsdecode(b"out-\xfe")
    _, error = run_with_error([name if word == "out" else word for word in arguments], capsys)
    assert "'out-\\udcfe' is not UTF-8, which files need here: rename" in error
    assert not Path(name).exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ("--num-classes 1000000000000", "--num-classes must be at most 1,000,000"),
        ("--image-shape 0 2 3", "--image-shape needs lengths of 1 to 16,384"),
        ("--image-shape -1 2 3", "--image-shape needs lengths of 1 to 16,384"),
        ("--image-shape 1000000 2 3", "--image-shape needs lengths of 1 to 16,384"),
        (
            "--partial --num-classes 1000000 --image-shape 100 100 3",
            "the model would have 40,001,000,112 parameters, more than 2,000,000,000",
        ),
    ],
)
def test_sizes_are_bounded(options, match, arguments, capsys):
    _, error = run_with_error([*arguments, *options.split()], capsys)
    assert re.search(match, error)


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
