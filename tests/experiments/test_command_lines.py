"""Options that no command can use end in one line, before any work."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import compare_teachers, image_folder, sentiment, teacher_assistant, two_cnns
from experiments.common import cli, plans
from jaxkd import distill, runs
from jaxkd.cli import limits
from jaxkd.cli.folders import choose_folder

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("experiments", "experiments/benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "cli.run(" in path.read_text(encoding="utf-8")
]
HUGE = "9" * 300


def fields(script):
    """Returns the options of a script and their defaults."""
    return importlib.import_module(script).Config.__dataclass_fields__


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("~nosuchuser/x", "home folder"),
        ("/dev/null/x", "/dev/null is not a folder"),
        ("", "is empty"),
        ("file", "is not a folder"),
        ("x" * 300, "File name too long"),
    ],
)
def test_folder_that_cannot_be_made(script, folder, expected, refuse, tmp_path):
    (tmp_path / "file").write_text("mine")
    for name in limits.OUTPUT_FOLDERS:
        if name in fields(script):
            option = f"--{name.replace('_', '-')}"
            message = refuse(importlib.import_module(script), f"{option}={folder}")
            assert message.startswith(f"error: {option}") and expected in message
            assert len(message) <= 300


@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers_that_no_machine_can_use(script, refuse):
    """Every option that is a number is bounded, whatever the script does with it."""
    module = importlib.import_module(script)
    for name, field in fields(script).items():
        default = (
            next(iter(field.default), "") if isinstance(field.default, tuple) else field.default
        )
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        if not is_number:
            continue
        option = f"--{name.replace('_', '-')}"
        values = ["inf", "nan", "-inf"] if isinstance(default, float) else [HUGE]
        # A pair of weights.
        repeats = len(field.default) if name == "weights" else 1
        for value in values:
            message = refuse(module, option, *[value] * repeats)
            assert option in message and len(message) <= 300


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--epochs", str(10**9)), "choose fewer --epochs"),
        (("--evaluations", str(2 * 10**9)), "--evaluations 2000000000: must be at most 1,000,000"),
        (("--num-seeds", str(10**9)), "--num-seeds 1000000000: must be at most 10,000"),
        (("--seed", str(2**31 - 2)), "the seeds must be from 0 to"),
        (("--batch-size", "1000000"), "there are only 9,000 training examples"),
        (("--batch-size", str(10**12)), "must be at most 1,048,576"),
        (("--image-size", str(10**9)), "--image-size 1000000000: must be at most 4,096"),
        (("--temperature", "1e-30"), "must be at least 0.001"),
        (("--temperature", "1e30"), "must be at most 1,000,000"),
        (("--save-every", "inf"), "must be a finite number"),
        (("--save-every", "nan"), "must be a finite number"),
        (("--num-labels", str(-(10**12))), "-1000000000000"),
        (("--coordinator", "host"), "needs --num-processes and --process-id"),
        (
            ("--coordinator", "host", "--num-processes", "2", "--process-id", "1"),
            "must be address:port",
        ),
        (
            ("--coordinator", "host:1", "--num-processes", "2", "--process-id", "2"),
            "must be from 0 to 1",
        ),
        (("--num-processes", "2"), "--num-processes: needs --coordinator"),
        (("--process-id", "0"), "--process-id: needs --coordinator"),
        (("--dataset", ""), "--dataset is empty"),
    ],
)
def test_options_are_refused_before_any_step(options, expected, refuse, monkeypatch):
    def train(*arguments, **keywords):
        raise AssertionError("training has started")

    monkeypatch.setattr(distill, "run_plan", train)
    start = time.monotonic()
    assert expected in refuse(teacher_assistant, *options)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("script", [compare_teachers, two_cnns])
def test_images_that_are_too_small_for_the_network(script, image_dir, refuse):
    message = refuse(script, "--dataset", str(image_dir), "--image-size", "2", *FEW[script])
    assert message.startswith("error: the images do not fit the network: ")


FEW = {compare_teachers: ("--num-images", "6"), two_cnns: ()}


def test_the_longest_training_starts_at_once(monkeypatch, tmp_path):
    """Steps are iterated, so that a billion of them take no memory."""
    plans_seen = []

    def train(plan, **keywords):
        plans_seen.extend(plan)
        raise cli.OptionError("training has started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill, "run_plan", train)
    monkeypatch.setattr(sys, "argv", ["teacher_assistant", "--epochs", str(3 * 10**7)])
    with pytest.raises(SystemExit, match="training has started"):
        cli.run(teacher_assistant.main, teacher_assistant.Config, None)
    assert plans_seen[0].steps == 3 * 10**7 * 9000 // 128


def test_the_wait_for_the_other_processes_is_said(refuse, monkeypatch, capsys):
    def initialize(coordinator, **keywords):
        raise runs.RunError(f"no connection to the coordinator {coordinator}")

    monkeypatch.setattr(distill, "initialize_distributed", initialize)
    options = ("--num-processes", "2", "--process-id", "1", "--coordinator")
    message = refuse(teacher_assistant, *options, "127.0.0.1:9")
    assert message == "error: no connection to the coordinator 127.0.0.1:9"
    assert "waiting up to 5 minutes" in capsys.readouterr().out
    assert "must be address:port" in refuse(teacher_assistant, *options, "127.0.0.1:70000")


@pytest.mark.parametrize("option", ["--workdir", "--dataset", "--teacher-cache"])
def test_a_path_that_is_not_utf8(option, tmp_path):
    """In a process of its own, because its line must reach a real stderr."""
    process = subprocess.run(
        [sys.executable, "-m", "experiments.teacher_assistant", option, b"runs/\xff"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert process.returncode == 1 and not list(tmp_path.iterdir())
    (line,) = process.stderr.splitlines()
    assert line.startswith(b"error: ") and b"is not UTF-8" in line


def test_a_folder_below_one_that_is_not_utf8(tmp_path, monkeypatch, refuse):
    parent = Path(f"{tmp_path}/\udcff")
    parent.mkdir()
    options = teacher_assistant.Config(workdir=str(parent / "run"))
    with pytest.raises(cli.OptionError, match="whose name is not UTF-8"):
        limits.check_limits(options, cli.require)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    options = teacher_assistant.Config(workdir=str(tmp_path / "closed" / "run"))
    with pytest.raises(cli.OptionError, match="closed cannot be written"):
        limits.check_limits(options, cli.require)


def test_teacher_cache_that_cannot_be_written_is_refused_before_training(tmp_path, monkeypatch):
    """The file system says so only when a folder is made there."""
    monkeypatch.chdir(tmp_path)
    options = teacher_assistant.Config(teacher_cache="/proc/teachers")
    with pytest.raises(cli.OptionError, match=r"--teacher-cache /proc/teachers: cannot be written"):
        plans.open_run("teacher_assistant", options, "images", [])
    assert not (tmp_path / "runs").exists()


def test_home_folder_in_a_cache_s_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = teacher_assistant.Config(teacher_cache="~/cache", max_students=1)
    assert plans.run_options(options, [])["teacher_cache"] == Path("/home/me/cache")


def test_a_lack_of_memory_ends_in_one_line(monkeypatch, refuse):
    def train(*arguments, **keywords):
        raise MemoryError("Unable to allocate 450. GiB for an array")

    monkeypatch.setattr(teacher_assistant.images, "load", train)
    assert "use smaller batches, images or networks" in refuse(teacher_assistant)


def test_text_that_the_terminal_lacks_is_replaced(tmp_path):
    """The table at the end has characters that ASCII lacks, and must not end in an error."""
    code = "from jaxkd.cli import start; start.print_any_text(); print('84.1 ± 0.2 →')"
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout == "84.1 ? 0.2 ?\n"


# The default folder


def choose(config, data="images/flowers"):
    return choose_folder("two_cnns", config, data)


def test_folder_is_named_after_what_it_holds():
    folder = choose(two_cnns.Config(), "fashion_mnist_mini")
    assert folder.parent == Path("runs/two_cnns")
    name, digest = folder.name.rsplit("-", 1)
    assert name == "fashion_mnist_mini-3seeds" and len(digest) == 8
    one_seed = choose(two_cnns.Config(num_seeds=1, epochs=2, bf16=True)).name
    assert one_seed.startswith("flowers-1seed-epochs2-bf16True-")


def test_folder_depends_on_what_changes_the_result():
    folder = choose(two_cnns.Config())
    assert choose(two_cnns.Config(save_every=1.0)) == folder
    assert choose(two_cnns.Config(seed=1)) != folder
    many = two_cnns.Config(seed=1, epochs=2, batch_size=3, alpha=0.5)
    assert choose(many) != choose(two_cnns.Config(seed=1, epochs=2, batch_size=3, alpha=0.6))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("glue/sst2", "sst2-3seeds-"),
        ("my photos (new)/", "my_photos_new-3seeds-"),
        ("-rf", "rf-3seeds-"),
        ("/", "data-3seeds-"),
        ("x" * 250, "x" * 40 + "-3seeds-"),
        ("cifar10:3.0.2", "cifar10_3.0.2-3seeds-"),
    ],
)
def test_folder_of_odd_data_has_a_plain_name(data, expected):
    assert choose(two_cnns.Config(), data).name.startswith(expected)


def test_folder_of_the_current_directory_is_named_after_it(tmp_path, monkeypatch):
    (tmp_path / "flowers").mkdir()
    monkeypatch.chdir(tmp_path / "flowers")
    assert choose(two_cnns.Config(), ".").name.startswith("flowers-3seeds-")


def test_tuples_in_the_name():
    config = image_folder.Config(dataset="x", frozen=("stem/{rest...}", "a"))
    assert "-frozenstem_rest_a-" in choose_folder("image_folder", config, "x").name
    assert "-layers0_" not in choose_folder("sentiment", sentiment.Config(), "x").name
