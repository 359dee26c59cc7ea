"""A finished run is repeated with its recorded options, and every bit that differs is reported."""

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
from experiments.common import cli, images
from jaxkd import runs
from jaxkd.runs import ResultRow, RunError, checkpoints, verify
from jaxkd.runs.results import TIMINGS

STAGES = ("teacher", "student")

# Those whose runs can be repeated.
SCRIPTS = Path(experiments.__path__[0]).glob("*.py")
EXPERIMENTS = sorted(
    path.stem for path in SCRIPTS if re.search(r"class Config\(.*Options\):", path.read_text())
)


def example_values(hint):
    """Returns some values of the type of an option."""
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return [value for argument in arguments for value in example_values(argument)]
    if typing.get_origin(hint) is tuple:
        members = tuple(example_values(arguments[0]))
        return [(), members] if arguments[1] is ... else [members[: len(arguments)]]
    if typing.get_origin(hint) is typing.Literal:
        return list(arguments)
    examples = {
        bool: [True, False],
        int: [7, -1],
        float: [1.5e-07, 0.1],
        str: ["", "a b/{c...}"],
        type(None): [None],
    }
    return examples[hint]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_options_come_back_through_the_command_line(name):
    config = importlib.import_module(f"experiments.{name}").Config
    hints = typing.get_type_hints(config)
    for i in range(3):
        options = {}
        for option, hint in hints.items():
            examples = example_values(hint)
            options[option] = examples[i % len(examples)]
        recorded = {"experiment": "any"} | dataclasses.asdict(config(**options))
        recorded = json.loads(json.dumps(recorded))
        repeated = {
            option: value
            for option, value in options.items()
            if option not in verify.OMITTED_OPTIONS
        }
        arguments = verify.command_line_options(recorded)
        assert tyro.cli(config, args=arguments) == config(**repeated)
    recorded = json.loads(json.dumps(dataclasses.asdict(config())))
    assert tyro.cli(config, args=verify.command_line_options(recorded)) == config()


def test_deterministic_option_sets_the_flags_before_the_experiment_starts(monkeypatch):
    calls = []
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(cli, "enable_determinism", lambda: calls.append("flags"))
    for option in ("--deterministic", "--no-deterministic"):
        monkeypatch.setattr(sys, "argv", ["experiment", option])
        cli.run(lambda options: calls.append(options.deterministic), images.Options, None)
    assert calls == ["flags", True, False]


def make_tree(scale=1.0):
    return {
        "opt_state": [{"mu": jnp.zeros(3)}],
        "params": {
            "kernel": scale * jnp.arange(6.0).reshape(2, 3),
            "half": jnp.ones(2, jnp.bfloat16),
        },
        "step": jnp.int32(8),
    }


def make_run(folder, **config):
    """Makes a finished run of two stages and two seeds, as `experiments.tiny` leaves it."""
    options = {
        "experiment": "tiny",
        "num_seeds": 2,
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
            checkpoints.save(run.checkpoint_folder(seed, stage), 8, make_tree())
    run.write_results(ResultRow(name, accuracy=(0.5, 0.625), seconds=(1.0, 2.0)) for name in STAGES)
    (folder / "student.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("template") / "run")


@pytest.fixture
def pair(tmp_path, template):
    """The folders of two identical runs."""
    return [shutil.copytree(template, tmp_path / name) for name in ("run", "again")]


def rewrite(path, change):
    path.write_text(change(path.read_text()))


def test_runs_that_differ_in_timings_are_identical(pair):
    rewrite(pair[1] / "results.json", lambda text: text.replace("2.0", "3.0"))
    assert "seconds" in TIMINGS
    assert verify.compare_runs(*pair) == ([], [], "8 records, 4 checkpoints, 2 rows")


def test_order_of_records_does_not_count(pair):
    rewrite(
        pair[0] / "metrics.jsonl",
        lambda text: "".join(sorted(text.splitlines(keepends=True), reverse=True)),
    )
    assert not verify.compare_runs(*pair).differences


def test_first_record_that_differs_is_reported(pair):
    def change(text):
        lines = text.splitlines(keepends=True)
        lines[3] = lines[3].replace("0.125", "0.126")
        lines[4] = lines[4].replace("0.25", "0.26")
        return "".join(lines)

    rewrite(pair[1] / "metrics.jsonl", change)
    line = "metrics: first at stage student, seed 0, step 8: loss was 0.125 and is 0.126"
    assert verify.compare_runs(*pair).differences == [line]


def test_record_that_is_missing_or_double_is_reported(pair):
    path = pair[1] / "metrics.jsonl"
    last = path.read_text().splitlines(keepends=True)[-1]
    rewrite(path, lambda text: text.removesuffix(last))
    key = "metrics: first at stage student, seed 1, step 8"
    line = f"{key}: the number of records was 1 and is 0"
    assert verify.compare_runs(*pair).differences == [line]
    rewrite(path, lambda text: text + last + last)
    line = f"{key}: the number of records was 1 and is 2"
    assert verify.compare_runs(*pair).differences == [line]


def test_value_that_is_missing_from_a_record_is_reported(pair):
    rewrite(pair[0] / "metrics.jsonl", lambda text: text.replace('"loss": 0.25', '"loss": null'))
    rewrite(pair[1] / "metrics.jsonl", lambda text: text.replace(', "loss": 0.25', ""))
    line = "metrics: first at stage teacher, seed 0, step 4: a value is missing"
    assert verify.compare_runs(*pair).differences == [line]


def change_params(**params):
    tree = make_tree()
    return tree | {"params": tree["params"] | params}


ONE_BIT = np.arange(6, dtype=np.float32).reshape(2, 3)
ONE_BIT[1, 1] = np.nextafter(np.float32(4), np.float32(5))


@pytest.mark.parametrize(
    ("tree", "count", "difference"),
    [
        (
            change_params(kernel=jnp.asarray(ONE_BIT)),
            "1 of 4",
            "params/kernel: 1 of 6 elements differ, by up to 4.77e-07",
        ),
        (
            change_params(kernel=-0.0 * jnp.ones((2, 3))),
            "1 of 4",
            "params/kernel: 6 of 6 elements differ, by up to 5",
        ),
        (
            change_params(half=jnp.asarray([1, 1.5], jnp.bfloat16)),
            "1 of 4",
            "params/half: 1 of 2 elements differ, by up to 0.5",
        ),
        (
            change_params(half=jnp.asarray([1, jnp.nan])),
            "1 of 4",
            "params/half: was bfloat16[2] and is float32[2]",
        ),
        (
            change_params(half=jnp.ones((2, 1), jnp.bfloat16)),
            "1 of 4",
            "params/half: was bfloat16[2] and is bfloat16[2, 1]",
        ),
        (
            change_params(extra=jnp.ones(1)),
            "1 of 5",
            "params/extra: missing in the first run",
        ),
        (
            make_tree(jnp.nan) | {"step": jnp.int32(9)},
            "2 of 4",
            "params/kernel: 6 of 6 elements differ, by up to nan",
        ),
        (
            make_tree() | {"opt_state": [{"mu": -jnp.zeros(3)}]},
            "1 of 4",
            "opt_state/0/mu: 3 of 3 elements differ, by up to 0",
        ),
    ],
)
def test_first_tensor_that_differs_is_reported(pair, tree, count, difference):
    checkpoints.save(pair[1] / "checkpoints" / "seed1" / "teacher", 8, tree)
    (line,) = verify.compare_runs(*pair).differences
    checkpoint = "checkpoints: 1 of 4 differ, first at stage teacher, seed 1"
    assert line == f"{checkpoint}: {count} tensors differ at step 8, first {difference}"


def test_checkpoints_that_are_missing_or_of_another_step_are_reported(pair):
    checkpoints.save(pair[1] / "checkpoints" / "seed0" / "student", 7, make_tree())
    shutil.rmtree(pair[0] / "checkpoints" / "seed1" / "student")
    (line,) = verify.compare_runs(*pair).differences
    stage = "checkpoints: 2 of 4 differ, first at stage student, seed 0"
    assert line == f"{stage}: step was 8 and is 7"
    (line,) = verify.compare_runs(*reversed(pair)).differences
    assert line == f"{stage}: step was 7 and is 8"
    shutil.rmtree(pair[1] / "checkpoints" / "seed0")
    (line,) = verify.compare_runs(*pair).differences
    assert "teacher, seed 0: no sound checkpoint in the second run" in line


def test_results_and_student_that_differ_are_reported(pair):
    rewrite(pair[1] / "results.json", lambda text: text.replace("0.625", "1.0"))
    (pair[1] / "student.safetensors").write_bytes(b"weighty")
    assert verify.compare_runs(*pair).differences == [
        "results: 2 of 2 rows differ, first teacher: accuracy was [0.5, 0.625] and is [0.5, 1.0]; "
        "accuracy_mean was 0.5625 and is 0.75; "
        f"accuracy_std was {np.std([0.5, 0.625], ddof=1)} and is {np.std([0.5, 1.0], ddof=1)}",
        "student.safetensors differs",
    ]
    (pair[0] / "student.safetensors").unlink()
    line = "student.safetensors is missing in the first run"
    assert verify.compare_runs(*pair).differences[1] == line
    (pair[1] / "results.json").write_text("{")
    with pytest.raises(RunError, match=r"again/results.json is damaged"):
        verify.compare_runs(*pair)


def test_conditions_do_not_count_as_differences(pair):
    recorded = json.loads((pair[1] / "config.json").read_text())
    recorded["config"] |= {"alpha": 0.7, "workdir": "elsewhere", "data_dir": "elsewhere"}
    recorded["environment"] |= {"jax": "0.0.1", "cores": 1000}
    (pair[1] / "config.json").write_text(json.dumps(recorded | {"data": "other"}))
    differences, conditions, _ = verify.compare_runs(*pair)
    assert not differences
    options, data, environment = conditions
    assert options == "alpha was 0.5 and is 0.7" and data.startswith("data was ")
    assert environment.startswith("cores was ") and " and is 1000; jax was " in environment
    assert environment.count(";") == 1


def test_environments_before_a_run_grew_are_conditions(pair):
    recorded = json.loads((pair[0] / "config.json").read_text())
    environment = recorded["environment"]
    earlier = [
        {"config": recorded["config"], "environment": environment | {"jax": "0.0.1"}},
        {"config": recorded["config"], "environment": environment},
    ]
    (pair[0] / "config.json").write_text(json.dumps(recorded | {"history": earlier}))
    differences, (line,), _ = verify.compare_runs(*pair)
    assert not differences and line.startswith("before the run grew: jax was '0.0.1' and is '")


def test_a_training_that_ends_elsewhere_differs_although_the_run_has_grown(pair):
    recorded = json.loads((pair[0] / "config.json").read_text())
    earlier = {name: recorded[name] for name in ("config", "environment")}
    (pair[0] / "config.json").write_text(json.dumps(recorded | {"history": [earlier]}))
    path = pair[1] / "metrics.jsonl"
    rewrite(path, lambda text: text.replace('"step": 4', '"step": 3'))
    differences, conditions, _ = verify.compare_runs(*pair)
    assert not differences and conditions[0].endswith("the last records are compared: 4")
    rewrite(path, lambda text: text.replace('"step": 8', '"step": 9'))
    (line,) = verify.compare_runs(*pair).differences
    assert "step 3: the number of records was 0 and is 1" in line


TINY = """
import json, pathlib, shutil, sys
template, folder = pathlib.Path("template"), pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
if "--fail" in sys.argv:
    sys.exit(3)
pathlib.Path("arguments").write_text(" ".join(sys.argv[1:]))
shutil.copytree(template, folder, dirs_exist_ok=True)
print(f"Everything is in {folder}: start with report.md")
"""


@pytest.fixture
def tiny(template, tmp_path, monkeypatch):
    """A folder with a run of `experiments.tiny`, which leaves the same files again."""
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
    arguments = "--num-seeds=2 --alpha=0.5 --only kd dist --no-augment --workdir again"
    assert (tiny / "arguments").read_text() == arguments
    assert (tiny / "again" / "results.json").exists()
    rewrite(tiny / "template" / "metrics.jsonl", lambda text: text.replace("0.125", "0.5"))
    verdicts = verify.verify("run", "other")
    assert list(verdicts) == [Path("run")]
    (line,) = verdicts[Path("run")].differences
    assert "stage teacher, seed 0, step 8: loss was 0.125 and is 0.5" in line


@pytest.mark.parametrize("is_temporary", [False, True])
def test_output_of_the_new_run_does_not_name_a_folder_that_will_be_deleted(
    tiny, capfd, is_temporary
):
    verify.verify("run", "again", is_temporary=is_temporary)
    name = "a temporary folder" if is_temporary else "again"
    assert capfd.readouterr().out == f"Everything is in {name}: start with report.md\n"


def test_runs_of_one_command_are_repeated_together(tiny):
    for folder in ("template", "run"):
        shutil.rmtree(folder)
        make_run(tiny / folder / "source", num_seeds=1, workdir="first/source")
        make_run(tiny / folder / "target", num_seeds=2, workdir="first/target")
    (tiny / "template" / "target" / "student.safetensors").write_bytes(b"weighty")
    verdicts = verify.verify("run", "again")
    counts = {path.name: len(verdict.differences) for path, verdict in verdicts.items()}
    assert list(counts.items()) == [("source", 0), ("target", 1)]
    assert "--num-seeds=2" in (tiny / "arguments").read_text()
    (verdict,) = verify.verify("run/source", "part").values()
    assert not verdict.differences and "--num-seeds=1" in (tiny / "arguments").read_text()


def test_runs_that_cannot_be_repeated_are_refused(tiny):
    with pytest.raises(RunError, match="again holds no run"):
        verify.verify("again", "scratch")
    with pytest.raises(RunError, match="run is the run itself: name another folder"):
        verify.verify("run", "experiments/../run")
    make_run(tiny / "several" / "a", alpha=0.1)
    make_run(tiny / "several" / "b")
    with pytest.raises(RunError, match="several holds runs of several commands: name one of a, b"):
        verify.verify("several", "scratch")
    make_run(tiny / "mine", experiment=None)
    with pytest.raises(
        RunError,
        match=r"mine is not the run of an experiment or of jaxkd distill: .*verify\.compare_runs",
    ):
        verify.verify("mine", "scratch")
    make_run(tiny / "failing", fail=True)
    with pytest.raises(RunError, match=r"the rerun of experiments\.tiny failed with exit status 3"):
        verify.verify("failing", "scratch")
    message = r"is not finished: run python -m experiments\.tiny with the same options"
    # Its results are those of before.
    make_run(tiny / "growing")
    rewrite(tiny / "growing" / "config.json", lambda text: '{"is_growing": true,' + text[1:])
    with pytest.raises(RunError, match=f"growing {message}"):
        verify.verify("growing", "scratch")
    (tiny / "run" / "results.json").unlink()
    with pytest.raises(RunError, match=f"run {message}"):
        verify.verify("run", "scratch")


def test_folder_that_holds_something_else_is_refused(tiny):
    make_run(tiny / "other", alpha=0.1)
    before = (tiny / "other" / "config.json").read_bytes()
    message = r"^other holds another run \(alpha was 0.5 and is 0.1\): name another folder \(--keep"
    with pytest.raises(RunError, match=message):
        verify.verify("run", "other")
    assert (tiny / "other" / "config.json").read_bytes() == before
    with pytest.raises(RunError, match=r"not empty and holds no rerun: .* \(--keep\)"):
        verify.verify("run", "experiments")
    with pytest.raises(RunError, match=r"experiments/tiny.py is not a folder: .* \(--keep\)"):
        verify.verify("run", "experiments/tiny.py")
    assert not (tiny / "arguments").exists()
    # What a rerun that was stopped left, also before its first file.
    (tiny / "empty").mkdir()
    (tiny / "empty" / ".lock").touch()
    verify.verify("run", "empty")
    verify.verify("run", "empty")


@pytest.mark.parametrize("teacher", ["auto", "resnet20:here.th", "/absolute/run"])
def test_teacher_that_is_no_path_from_another_folder_is_not_named(tiny, teacher):
    (tiny / "here.th").touch()
    make_run(tiny / "failing", fail=True, teacher=teacher)
    with pytest.raises(RunError, match="the reason is printed above$"):
        verify.verify("failing", "scratch")


def test_path_relative_to_another_folder_is_named_if_the_rerun_fails(tiny):
    make_run(tiny / "moved", fail=True, dataset="photos")
    message = "; if the run's --dataset photos is a path, it is relative to another folder: start "
    with pytest.raises(RunError, match=message) as error:
        verify.verify("moved", "scratch")
    assert len(str(error.value)) <= 300
    (tiny / "photos").mkdir()
    with pytest.raises(RunError, match="the reason is printed above$"):
        verify.verify("moved", "scratch")
