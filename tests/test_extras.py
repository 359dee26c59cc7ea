"""Packages of the extras: where they belong, and the one line that a missing one ends in."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jaxkd import _extras, data, runs, weights
from jaxkd.data import image_folder, parquet, tokens
from jaxkd.runs import checkpoints, figures, report
from jaxkd.weights import hub

# Raises the error of an absent package at any import of the packages in argv.
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""
# `importlib.util.find_spec` must find an absent package absent, too.
ABSENT = "sys.modules.update(dict.fromkeys(sys.argv[1:]))\n"


def run_without(packages, code, blocker=BLOCKER):
    """Runs code in a process that lacks packages, in the clone's folder."""
    return subprocess.run(
        [sys.executable, "-c", blocker + code, *packages],
        cwd=_extras.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def read_extras():
    """Returns the distributions of each extra in pyproject.toml, without those it includes."""
    project = tomllib.loads((_extras.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return {
        extra: {re.split(r"[^\w.-]", line)[0] for line in lines if "jaxkd-distill" not in line}
        for extra, lines in project["project"]["optional-dependencies"].items()
    }


def test_packages_are_those_of_the_extras():
    expected = {
        (extra, distribution)
        for extra in (
            "models",
            "train",
            "experiments",
            "onnx",
            "text",
            "tensorboard",
            "wandb",
            "parquet",
            "hub",
        )
        for distribution in read_extras()[extra]
    }
    assert {package for package in _extras.PACKAGES.values() if package.extra} == expected


def check_message(message, package, extra):
    command = re.escape(f"[{extra}]'")
    assert re.search(
        rf"this needs {package}[\w.]*, which cannot be imported .*: pip install -e '.*{command}$",
        message,
    )
    assert len(message) <= 300


@pytest.mark.parametrize("module", ["models", "distill"])
def test_without_flax_the_import_ends_in_the_command_that_installs_it(module):
    process = run_without(["flax"], f"import jaxkd.{module}")
    assert process.returncode == 1
    # The last line of a traceback is the message.
    check_message(process.stderr.splitlines()[-1], "flax", "models")
    assert process.stderr.splitlines()[-1].endswith(": pip install -e '.[models]'")


@pytest.mark.parametrize(
    ("call", "package", "extra"),
    [
        (lambda: runs.open_run("runs/never", {}), "filelock", "train"),
        (lambda: runs.tensorboard_logger("runs/never"), "tensorboardX", "tensorboard"),
        (lambda: runs.wandb_logger("runs/never", project="p"), "wandb", "wandb"),
        (lambda: checkpoints.save("runs/never", 0, {}), "orbax", "train"),
        (lambda: report.markdown_table(["a"], []), "tabulate", "train"),
        (lambda: report.print_table([]), "rich", "experiments"),
        (lambda: figures.new_figure("x", 1, 1).__enter__(), "matplotlib", "experiments"),
        (lambda: weights.save_safetensors("x", {}), "safetensors", "train"),
        (lambda: weights.read_safetensors("x"), "safetensors", "train"),
        (lambda: weights.save_torch("x", {}, ()), "safetensors", "train"),
        (lambda: weights.save_program("x", None, {}, None), "flatbuffers", "train"),
        (lambda: tokens.train_tokenizer([], vocab_size=999), "tokenizers", "text"),
        (lambda: hub.find_hub_folder("hub:owner/name"), "huggingface_hub", "hub"),
        (lambda: next(parquet.iterate_records(Path("x.parquet"))), "pyarrow", "parquet"),
        (lambda: image_folder.read_image(Path(__file__), (8, 8, 3)), "PIL", "experiments"),
    ],
)
def test_missing_package_ends_in_the_command_that_installs_it(
    call, package, extra, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    for name in (package, *(name for name in sys.modules if name.startswith(f"{package}."))):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises((ImportError, data.DataError)) as caught:
        call()
    check_message(str(caught.value), package, extra)


RUN_PLAN = """
import tempfile, optax, jax.numpy as jnp, numpy as np
from jaxkd import distill, losses, models, runs
def init(key, inputs): return {"params": {"w": jnp.zeros((2, 2))}, "batch_stats": {}}
def apply(variables, inputs, *, train, key=None):
    return models.Outputs(inputs @ variables["params"]["w"], {}), {}
examples = {"inputs": np.ones((4, 2), np.float32), "labels": np.zeros(4, np.int32)}
loss = lambda student, teachers, batch, context: losses.hard_cross_entropy(
    student.logits, batch["labels"])
model = models.Model(init, apply)
stage = distill.Stage("a", model, examples, loss, optax.sgd(0.1), steps=2, batch_size=2)
with tempfile.TemporaryDirectory() as folder:
    try:
        distill.run_plan([stage], [0], runs.open_run(folder, {}), validation=examples)
    finally:
        print("records:", len(list(__import__("pathlib").Path(folder).glob("metrics.jsonl"))))
"""


def test_plan_without_orbax_ends_before_any_step():
    process = run_without(["orbax"], RUN_PLAN, BLOCKER + ABSENT)
    assert "this needs orbax" in process.stderr.splitlines()[-1]
    assert "pip install -e '.[train]'" in process.stderr.splitlines()[-1]
    assert "records: 0" in process.stdout


def test_plan_needs_nothing_that_only_reports_need():
    process = run_without(["matplotlib", "tabulate", "tyro", "safetensors"], RUN_PLAN)
    assert process.returncode == 0, process.stderr
    assert "records: 1" in process.stdout


@pytest.mark.parametrize("package", ["tyro", "flax", "tabulate"])
def test_experiment_without_a_package_ends_in_one_line(package):
    code = "import runpy; sys.argv[:] = ['-m']; runpy.run_module('experiments.teacher_assistant')"
    process = run_without([package], code, BLOCKER + ABSENT)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"error: this needs {package}, ") and "pip install -e '.[" in line


def test_command_outside_of_the_clone_names_the_clone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = f"pip install -e '{_extras.ROOT}[train]'"
    assert _extras.install_command("train", "filelock") == command


def test_command_of_an_installed_wheel_takes_the_wheel(monkeypatch, tmp_path):
    monkeypatch.setattr(_extras, "ROOT", tmp_path)
    monkeypatch.setattr(_extras, "_is_installed", lambda: True)
    assert _extras.install_command("text", "x") == "pip install 'jaxkd-distill[text]'"


def test_command_of_a_copied_folder_names_the_package(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\n', encoding="utf-8")
    monkeypatch.setattr(_extras, "ROOT", tmp_path)
    monkeypatch.setattr(_extras, "_is_installed", lambda: False)
    assert _extras.install_command("train", "orbax-checkpoint") == "pip install orbax-checkpoint"


def test_a_package_in_no_extra_is_named_itself():
    error = ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")
    assert _extras.describe_missing(error).endswith(": pip install tensorflow")


def test_other_errors_of_imports_get_no_command():
    error = ImportError("cannot import name 'train' from 'jaxkd'", name="jaxkd")
    assert _extras.describe_missing(error) == "cannot import name 'train' from 'jaxkd'"


def test_what_a_package_of_an_extra_needs_is_in_that_extra():
    error = ModuleNotFoundError("No module named 'etils'", name="etils")
    assert "[train]" in _extras.describe_missing(error, "train")


def test_a_module_of_python_is_not_installed_by_pip():
    error = ModuleNotFoundError("No module named '_lzma'", name="_lzma")
    message = _extras.describe_missing(error, "experiments")
    assert "pip" not in message and message.endswith(": use a Python that was built with it")


def test_a_package_that_raises_an_error_without_a_name_is_named():
    code = compile("raise ImportError('numpy is too old')", "package.py", "exec")
    for module, package in (
        ("tensorflow_datasets.core", "tensorflow_datasets"),
        ("json", "a package"),
    ):
        with pytest.raises(ImportError) as caught, _extras.add_install_command():
            exec(code, {"__name__": module})
        expected = "cannot be imported (numpy is too old): reinstall it, and what it needs"
        assert str(caught.value) == f"{package} {expected}"
    assert _extras.describe_missing(ImportError("numpy is too old")) == "numpy is too old"
