"""A finished run is repeated from what it recorded, and every bit that then differs is told."""

import dataclasses
import importlib
import json
import re
import shutil
import sys
import types
import typing
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tyro

import experiments
from experiments import cli, vision
from jaxkd import checkpoints, evaluate, runs, verify
from jaxkd.runs import RunError

STAGES = ("teacher", "student")


# Those whose runs can be repeated.
SCRIPTS = Path(experiments.__path__[0]).glob("*.py")
EXPERIMENTS = sorted(path.stem for path in SCRIPTS if re.search(r"class Config\(.*Options\):", path.read_text()))


def values(hint):
    """Some values of a type that options have."""
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return [value for one in arguments for value in values(one)]
    if typing.get_origin(hint) is tuple:
        members = values(arguments[0])
        return [(), tuple(members)] if arguments[1] is ... else [tuple(members)[: len(arguments)]]
    if typing.get_origin(hint) is typing.Literal:
        return list(arguments)
    some = {bool: [True, False], int: [7, -1], float: [1.5e-07, 0.1], str: ["", "a b/{c...}"], type(None): [None]}
    return some[hint]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_options_come_back_through_the_command_line(name):
    config = importlib.import_module(f"experiments.{name}").Config
    hints = typing.get_type_hints(config)
    for i in range(3):
        chosen = {name: values(hint)[i % len(values(hint))] for name, hint in hints.items()}
        recorded = json.loads(json.dumps({"experiment": "any"} | dataclasses.asdict(config(**chosen))))
        wanted = config(**{option: value for option, value in chosen.items() if option not in verify.HERE})
        assert tyro.cli(config, args=verify.flags(recorded)) == wanted
    recorded = json.loads(json.dumps(dataclasses.asdict(config())))
    assert tyro.cli(config, args=verify.flags(recorded)) == config()


def test_deterministic_option_sets_the_flags_before_the_experiment_starts(monkeypatch):
    called = []
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(cli, "make_deterministic", lambda: called.append("flags"))
    for option in ("--deterministic", "--no-deterministic"):
        monkeypatch.setattr(sys, "argv", ["experiment", option])
        cli.run(lambda options: called.append(options.deterministic), vision.Options, None)
    assert called == ["flags", True, False]


def trees(scale=1.0):
    return {
        "opt_state": [{"mu": jnp.zeros(3)}],
        "params": {"kernel": scale * jnp.arange(6.0).reshape(2, 3), "half": jnp.ones(2, jnp.bfloat16)},
        "step": jnp.int32(8),
    }


def make(folder, **config):
    """A finished run of two stages and two seeds, as `experiments.tiny` leaves it."""
    options = {
        "experiment": "tiny",
        "seeds": 2,
        "alpha": 0.5,
        "only": ["kd", "dist"],
        "augment": False,
        "workdir": None,
    }
    run = runs.open_run(folder, options | config)
    for seed in range(2):
        for stage in STAGES:
            for step in (4, 8):
                run.append_metrics({"seed": seed, "stage": stage, "step": step, "loss": 1 / step})
            checkpoints.save(run.checkpoints(seed, stage), 8, trees())
    run.write_results([{"name": name, "accuracy": [0.5, 0.625], "seconds": [1.0, 2.0]} for name in STAGES])
    (folder / "student.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return make(tmp_path_factory.mktemp("template") / "run")


@pytest.fixture
def pair(tmp_path, template):
    """Two runs that are alike."""
    return [shutil.copytree(template, tmp_path / name) for name in ("run", "again")]


def rewrite(path, change):
    path.write_text(change(path.read_text()))


def test_alike_is_identical(pair):
    rewrite(pair[1] / "results.json", lambda text: text.replace("2.0", "3.0"))
    assert "seconds" in evaluate.TIMINGS
    assert verify.compare(*pair) == ([], [], "8 records, 4 checkpoints, 2 rows")


def test_order_of_records_says_nothing(pair):
    rewrite(pair[0] / "metrics.jsonl", lambda text: "".join(sorted(text.splitlines(keepends=True), reverse=True)))
    assert not verify.compare(*pair).differences


def test_first_record_that_differs_is_told(pair):
    def change(text):
        lines = text.splitlines(keepends=True)
        return "".join([*lines[:3], lines[3].replace("0.125", "0.126"), lines[4].replace("0.25", "0.26"), *lines[5:]])

    rewrite(pair[1] / "metrics.jsonl", change)
    told = ["metrics: first at stage student, seed 0, step 8: loss 0.125 there and 0.126 here"]
    assert verify.compare(*pair).differences == told


def test_record_that_is_missing_or_double_is_told(pair):
    path = pair[1] / "metrics.jsonl"
    last = path.read_text().splitlines(keepends=True)[-1]
    rewrite(path, lambda text: text.removesuffix(last))
    told = "metrics: first at stage student, seed 1, step 8: {} records there and {} here"
    assert verify.compare(*pair).differences == [told.format(1, 0)]
    rewrite(path, lambda text: text + last + last)
    assert verify.compare(*pair).differences == [told.format(1, 2)]


def changed(**params):
    tree = trees()
    return tree | {"params": tree["params"] | params}


ONE_BIT = np.arange(6, dtype=np.float32).reshape(2, 3)
ONE_BIT[1, 1] = np.nextafter(np.float32(4), np.float32(5))


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        (
            changed(kernel=jnp.asarray(ONE_BIT)),
            "1 of 4 tensors, first params/kernel in 1 of 6 elements, by up to 4.77e-07",
        ),
        (changed(kernel=-0.0 * jnp.ones((2, 3))), "1 of 4 tensors, first params/kernel in 6 of 6 elements, by up to 5"),
        (
            changed(half=jnp.asarray([1, 1.5], jnp.bfloat16)),
            "1 of 4 tensors, first params/half in 1 of 2 elements, by up to 0.5",
        ),
        (
            changed(half=jnp.asarray([1, jnp.nan])),
            "1 of 4 tensors, first params/half which is bfloat16[2] there and float32[2] here",
        ),
        (
            changed(half=jnp.ones((2, 1), jnp.bfloat16)),
            "1 of 4 tensors, first params/half which is bfloat16[2] there and bfloat16[2, 1] here",
        ),
        (changed(extra=jnp.ones(1)), "1 of 5 tensors, first params/extra which is missing there"),
        (
            trees(jnp.nan) | {"step": jnp.int32(9)},
            "2 of 4 tensors, first params/kernel in 6 of 6 elements, by up to nan",
        ),
        (
            trees() | {"opt_state": [{"mu": -jnp.zeros(3)}]},
            "1 of 4 tensors, first opt_state/0/mu in 3 of 3 elements, by up to 0",
        ),
    ],
)
def test_first_tensor_that_differs_is_told(pair, tree, told):
    checkpoints.save(pair[1] / "checkpoints" / "seed1" / "teacher", 8, tree)
    (found,) = verify.compare(*pair).differences
    assert found == f"checkpoints: 1 of 4 differ, first stage teacher, seed 1, step 8: {told}"


def test_checkpoints_that_are_missing_or_of_another_step_are_told(pair):
    checkpoints.save(pair[1] / "checkpoints" / "seed0" / "student", 7, trees())
    shutil.rmtree(pair[0] / "checkpoints" / "seed1" / "student")
    (found,) = verify.compare(*pair).differences
    assert found == "checkpoints: 2 of 4 differ, first stage student, seed 0, step 8 there and 7 here"
    (found,) = verify.compare(*reversed(pair)).differences
    assert "step 7 there and 8 here" in found
    shutil.rmtree(pair[1] / "checkpoints" / "seed0")
    assert "teacher, seed 0, of which there is no sound one here" in verify.compare(*pair).differences[0]


def test_results_and_student_that_differ_are_told(pair):
    rewrite(pair[1] / "results.json", lambda text: text.replace("0.625", "0.75"))
    (pair[1] / "student.safetensors").write_bytes(b"weighty")
    assert verify.compare(*pair).differences == [
        "results: 2 of 2 rows differ, first teacher: accuracy [0.5, 0.625] there and [0.5, 0.75] here",
        "student.safetensors differs",
    ]
    (pair[0] / "student.safetensors").unlink()
    assert verify.compare(*pair).differences[1] == "student.safetensors is missing there"
    (pair[1] / "results.json").write_text("{")
    with pytest.raises(RunError, match=r"again/results.json is damaged"):
        verify.compare(*pair)


def test_conditions_that_differ_are_no_difference(pair):
    recorded = json.loads((pair[1] / "config.json").read_text())
    recorded["config"] |= {"alpha": 0.7, "workdir": "elsewhere", "data_dir": "elsewhere"}
    recorded["environment"] |= {"jax": "0.0.1", "cores": 1000}
    (pair[1] / "config.json").write_text(json.dumps(recorded | {"data": "other"}))
    differences, conditions, _ = verify.compare(*pair)
    assert not differences
    assert conditions[0] == "alpha 0.5 there and 0.7 here" and conditions[1].startswith("data ")
    assert "cores " in conditions[2] and "and 1000 here; jax " in conditions[2] and conditions[2].count(";") == 1


TINY = """
import json, pathlib, shutil, sys
template, folder = pathlib.Path("template"), pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
if "--fail" in sys.argv:
    sys.exit(3)
pathlib.Path("arguments").write_text(" ".join(sys.argv[1:]))
shutil.copytree(template, folder, dirs_exist_ok=True)
"""


@pytest.fixture
def tiny(template, tmp_path, monkeypatch):
    """A folder in which `experiments.tiny` leaves once more what a run there has left."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").touch()
    (tmp_path / "experiments" / "tiny.py").write_text(TINY)
    shutil.copytree(template, "template")
    shutil.copytree(template, "run")
    return tmp_path


def test_repeats_a_run_from_its_own_configuration(tiny):
    (verdict,) = verify.verify("run", "again").values()
    assert not verdict.differences
    line = "--seeds=2 --alpha=0.5 --only kd dist --no-augment --workdir again"
    assert (tiny / "arguments").read_text() == line and (tiny / "again" / "results.json").exists()
    rewrite(tiny / "template" / "metrics.jsonl", lambda text: text.replace("0.125", "0.5"))
    found = verify.verify("run", "other")
    assert list(map(str, found)) == ["run"]
    assert (
        "stage teacher, seed 0, step 8: loss 0.125 there and 0.5 here"
        in found[tiny.joinpath("run").relative_to(tiny)][0][0]
    )


def test_parts_of_one_command_are_repeated_together(tiny):
    for folder in ("template", "run"):
        shutil.rmtree(folder)
        make(tiny / folder / "source", seeds=1, workdir="first/source")
        make(tiny / folder / "target", seeds=2, workdir="first/target")
    (tiny / "template" / "target" / "student.safetensors").write_bytes(b"weighty")
    found = verify.verify("run", "again")
    assert [(path.name, len(verdict.differences)) for path, verdict in found.items()] == [("source", 0), ("target", 1)]
    assert "--seeds=2" in (tiny / "arguments").read_text()
    (found,) = verify.verify("run/source", "part").values()
    assert not found.differences and "--seeds=1" in (tiny / "arguments").read_text()


def test_what_cannot_be_repeated_is_told(tiny):
    with pytest.raises(RunError, match="again holds no run"):
        verify.verify("again", "scratch")
    with pytest.raises(RunError, match="run is the run itself: name another folder"):
        verify.verify("run", "experiments/../run")
    make(tiny / "several" / "a", alpha=0.1)
    make(tiny / "several" / "b")
    with pytest.raises(RunError, match="several holds several runs: name one of a, b"):
        verify.verify("several", "scratch")
    make(tiny / "mine", experiment=None)
    with pytest.raises(RunError, match=r"mine is no experiment's run: repeat it .* jaxkd\.verify\.compare"):
        verify.verify("mine", "scratch")
    make(tiny / "failing", fail=True)
    with pytest.raises(RunError, match=r"the rerun of experiments\.tiny failed with exit status 3"):
        verify.verify("failing", "scratch")
    (tiny / "run" / "results.json").unlink()
    with pytest.raises(
        RunError, match=r"run is not finished: give its command again, python -m experiments\.tiny with"
    ):
        verify.verify("run", "scratch")
