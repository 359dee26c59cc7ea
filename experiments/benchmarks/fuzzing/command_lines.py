"""Command lines of all experiments and of `jaxkd`, up to the first step of their work."""

import contextlib
import dataclasses
import functools
import importlib
import io
import os
import random
import sys
import typing
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from PIL import Image

from experiments.benchmarks.fuzzing import configurations, values, weights
from experiments.common import cli
from jaxkd import data, distill
from jaxkd.cli.main import main as jaxkd_main
from jaxkd.runs import verify

ON_IMAGES = (
    *("teacher_assistant", "two_cnns", "two_teachers", "methods", "compare_teachers", "sweep"),
    *("pretrained_teacher", "image_folder", "weight_transfer"),
)
ON_TEXTS = ("sentiment", "distilbert")
# The functions with which the work of the other scripts begins.
WORK = {
    "translation": (),
    "matrix_orientation": ("measure",),
    "benchmarks.losses": ("load_torch", "measure"),
    "benchmarks.saving": ("measure_students",),
    "benchmarks.training": ("measure",),
    "benchmarks.training_profile": ("measure",),
    "benchmarks.bit_equality": ("make_table", "describe_python"),
    "benchmarks.crash_recovery": ("flip_bits", "kill_trainings"),
}
SCRIPTS = (*ON_IMAGES, *ON_TEXTS, *WORK)
USUAL = ("1", "2", "3", "0.5", "16")
NUMBERS = (
    *("0", "1", "-1", "2", "3", "0.5", "1e-30", "1e30", "inf", "-inf", "nan", "None", "1_000"),
    *("10" * 5, str(10**9), str(2 * 10**9), str(2**31), str(2**63), str(10**12), str(10**30)),
    *("9" * 300, "9" * 5000, "²", "--1", "", " ", "1,2", "0x10", "1e400"),
)
PATHS = (
    *(
        "",
        " ",
        ".",
        "~",
        "~nosuchuser/x",
        "/dev/null/x",
        "/proc/x",
        "no/such",
        "/",
        "file",
        "taken",
    ),
    *("\udcff", "w\u00e4g", "a" * 300, "a" * 5000, "-", "--", "\u2028", "$HOME", "a\nb", "taken/x"),
)
EXTRA_MEMORY = 2**30
"""Bytes that options may ask for, such as larger images than those of the files."""


class WorkStartedError(BaseException):
    """Stops a command where its work begins. No handler of the library's errors catches it."""


def make(rng: random.Random, folder: Path) -> Callable[[], Any]:
    """Makes a folder of data and a command, and returns a function that runs the command."""
    _warm_up()
    (folder / "file").write_text("not a run")
    (folder / "taken").mkdir()
    (folder / "taken" / "file").write_text("not a run")
    if rng.random() < 0.2:
        return _make_jaxkd(rng, folder)
    name = rng.choice(SCRIPTS)
    module = importlib.import_module(f"experiments.{name}")
    arguments = [*_make_data(rng, name, module.Config, folder), *_draw_options(rng, module.Config)]
    return lambda: _run(lambda: _run_script(module, name, arguments), folder)


@functools.cache
def _warm_up() -> None:
    """Starts JAX and what else takes memory once, so that it is not counted for an input."""
    jax.block_until_ready(jax.random.permutation(jax.random.key(0), 3))
    data.load("fashion_mnist_mini")


def _run(command: Callable[[], Any], folder: Path) -> str:
    """Runs a command in a folder and returns what it printed, or raises its error.

    Raises:
        ValueError: If the command ended with an error. The message is what it printed.
        AssertionError: If it printed more than a line, or exited with another status.
    """
    output = io.StringIO()
    errors = io.StringIO()
    directory = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            command()
    except WorkStartedError:
        pass
    except SystemExit as stop:
        _check_exit(stop.code, errors.getvalue())
    finally:
        os.chdir(directory)
    return output.getvalue()


def _check_exit(status: Any, printed: str) -> None:
    if isinstance(status, str):
        raise ValueError(status)
    if status == 2:
        # The parser frames its message in a few lines, each of the width of the terminal.
        longest = max(map(len, printed.splitlines()), default=0)
        if longest > 300 or len(printed) > 6000 or "Traceback" in printed:
            raise ValueError(printed)
        raise ValueError("invalid options")
    if status not in (None, 0, 1):
        raise AssertionError(f"exit status {status!r}")


def _run_script(module: Any, name: str, arguments: list[str]) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", [f"experiments.{name}", *arguments]))
        stack.enter_context(mock.patch.object(warnings, "showwarning", warnings.showwarning))
        stack.enter_context(_keep_settings())
        for target, attribute in (
            *((distill, work) for work in ("run_plan", "initialize_distributed")),
            *((module, work) for work in WORK.get(name, ())),
        ):
            stack.enter_context(mock.patch.object(target, attribute, _start_work))
        cli.run(module.main, module.Config, None)


@contextlib.contextmanager
def _keep_settings() -> Generator[None]:
    """Restores what a command changes in its process."""
    variables = dict(os.environ)
    settings: Any = jax.config
    cache = settings.jax_compilation_cache_dir
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(variables)
        settings.update("jax_compilation_cache_dir", cache)


def _start_work(*arguments: Any, **keywords: Any) -> Any:
    raise WorkStartedError


def _make_data(rng: random.Random, name: str, config: Any, folder: Path) -> list[str]:
    """Writes tiny data, and returns the options that name them."""
    if name in ON_IMAGES:
        for split, count in (("train", 12), ("test", 2)):
            for number, label in enumerate(("a", "b", "c", "d")):
                (folder / "images" / split / label).mkdir(parents=True)
                for index in range(count):
                    image = Image.new("RGB", (8, 8), (60 * number, 20 * index, 0))
                    image.save(folder / "images" / split / label / f"{index}.png")
        options = ["--dataset", "images", "--image-size", rng.choice(("16", "32"))]
        known = {field.name for field in dataclasses.fields(config)}
        few = [option for option in ("num_labels", "num_images") if option in known]
        return options + [part for name in few for part in (f"--{name.replace('_', '-')}", "8")]
    if name in ON_TEXTS:
        rows = "".join(f"{word} film\t{word}\n" for word in ("good", "bad") * 20)
        (folder / "texts").mkdir()
        for split in ("train", "test"):
            (folder / "texts" / f"{split}.tsv").write_text(rows)
        (folder / "bert").mkdir()
        configurations.write_bert(folder / "bert")
        return ["--dataset", "texts", "--bert", "bert"]
    if name == "translation":
        (folder / "pairs").mkdir()
        for split in ("train", "val", "test"):
            for language in ("en", "de"):
                (folder / "pairs" / f"{split}.{language}").write_text("a film\n" * 20)
        return ["--dataset", "pairs", "--vocab-size", "300"]
    return []


def _draw_options(rng: random.Random, config: Any) -> list[str]:
    arguments = []
    hints = typing.get_type_hints(config)
    fields = dataclasses.fields(config)
    for field in rng.sample(fields, min(len(fields), rng.choice((1, 1, 1, 2, 3)))):
        option = f"--{field.name.replace('_', '-')}"
        kind = str(hints[field.name])
        if kind == "<class 'bool'>":
            arguments.append(rng.choice((option, f"--no-{option[2:]}", f"{option}=x")))
            continue
        number = any(word in kind for word in ("int", "float"))
        choices = NUMBERS if number and rng.random() < 0.9 else PATHS
        count = rng.choice((1, 2, 0, 2000)) if "tuple" in kind and rng.random() < 0.5 else 1
        drawn = [rng.choice(USUAL if number and rng.random() < 0.4 else choices)] * min(count, 1)
        drawn += [rng.choice(choices) for _ in range(count - 1)]
        arguments += [f"{option}={drawn[0]}"] if rng.random() < 0.3 and drawn else [option, *drawn]
    if rng.random() < 0.03:
        arguments.append(rng.choice(("--help", "--no-such", "x" * 5000, "\udcff", "--epochs")))
    return arguments


def _make_jaxkd(rng: random.Random, folder: Path) -> Callable[[], Any]:
    """Makes a command of `jaxkd`: of verify a run, of convert some weights."""
    if rng.random() < 0.3:
        words = ["verify", rng.choice((*PATHS, "run")), "--keep", rng.choice((*PATHS, "again"))]
        words = words[: rng.choice((2, 2, 4, 3))]
    else:
        weights.make(rng, folder)
        files = [path.name for path in folder.iterdir()]
        models = ("resnet20", "vgg8", "plain2", "no_such_model", "", "²", "Model", "BERT")
        words = ["convert", rng.choice((*files, *files, *PATHS)), "--model", rng.choice(models)]
        words += ["-o", rng.choice(("out", "out", "out", *PATHS))]
        if rng.random() < 0.4:
            words += ["--num-classes", rng.choice(NUMBERS)]
        if rng.random() < 0.3:
            words += ["--image-shape", *rng.choices(NUMBERS, k=3)]
        if rng.random() < 0.3:
            words += ["--entry", values.pick_text(rng)]
        if rng.random() < 0.2:
            words += ["--partial"]

    def command() -> None:
        with mock.patch.object(verify.subprocess, "run", _start_work):
            jaxkd_main(words)

    return lambda: _run(command, folder)
