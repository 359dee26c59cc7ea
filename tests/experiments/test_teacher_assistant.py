"""The main job: what it prints and writes, and that it repeats and resumes bit for bit."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import teacher_assistant
from experiments.common import cli
from jaxkd import data, evaluate
from jaxkd.runs import redraw, report, verify
from jaxkd.runs.results import TIMINGS
from jaxkd.weights import load_safetensors, read_class_names

NAMES = [
    "teacher",
    "assistant",
    "student_alone",
    "student_direct",
    "student_assisted",
    "student_all_labels",
]
OPTIONS = ("--num-labels", 9)


@pytest.fixture(scope="module")
def environment():
    """The environment of a user's terminal, in which programs are optimized."""
    of_tests = {"XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    variables = {name: value for name, value in os.environ.items() if name not in of_tests}
    return variables | {"COLUMNS": "100"}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, execute):
    folder = tmp_path_factory.mktemp("finished") / "run"
    process = execute("teacher_assistant", *OPTIONS, "--workdir", folder)
    return folder, process


def read_rows(folder):
    rows = json.loads((folder / "results.json").read_text())
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def assert_same_bits(folder, expected):
    assert read_rows(folder) == read_rows(expected)
    # Sorted, because a stage that is trained again appends its records after those of the others.
    records, expected_records = (
        sorted((path / "metrics.jsonl").read_text().splitlines()) for path in (folder, expected)
    )
    assert records == expected_records
    for name in (
        "student.safetensors",
        "student.jaxexport",
        "accuracy.png",
        "curves.png",
        "size.png",
    ):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.thorough
def test_run_writes_its_files(finished_run):
    folder, process = finished_run
    rows = json.loads((folder / "results.json").read_text())
    assert [row["name"] for row in rows] == NAMES
    keys = (
        "name accuracy accuracy_mean accuracy_std agreement parameters bytes flops latency_ms "
        "seconds"
    )
    for row in rows:
        assert set(keys.split()) <= set(row)
        assert len(row["accuracy"]) == len(row["seconds"]) == 2
        assert row["accuracy_mean"] == pytest.approx(np.mean(row["accuracy"]))
        assert row["accuracy_std"] == pytest.approx(np.std(row["accuracy"], ddof=1))
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["num_labels"] == 9 and config["environment"]["jax"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trainings = {(record["stage"], record["seed"]) for record in records}
    assert trainings == {(name, seed) for name in NAMES for seed in (0, 1)}
    text = (folder / "report.md").read_text()
    assert "student_assisted is" in text and "student_direct is" in text
    for figure in ("accuracy.png", "curves.png", "size.png"):
        assert (folder / figure).read_bytes().startswith(b"\x89PNG") and figure in text
    assert (folder / "checkpoints" / "seed1" / "student_direct").is_dir()
    assert "validation after" in process.stdout and "student_direct" in process.stdout
    assert not process.stderr


@pytest.mark.thorough
def test_report_is_drawn_again_byte_for_byte(finished_run, tmp_path):
    folder, process = finished_run
    redrawn = redraw.redraw_report(folder, output=tmp_path)
    assert not redrawn.left_out
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    sentences = [report.compare_rows(redrawn.rows, *names) for names in redrawn.comparisons]
    assert len(sentences) == 3 and all(sentence in process.stdout for sentence in sentences)


@pytest.mark.thorough
def test_prints_time_and_folder_then_a_line_per_training(finished_run):
    folder, process = finished_run
    # A slow training reports its evaluations as well, and the first use of a teacher its cache.
    lines = process.stdout.splitlines()
    sizes = [line for line in lines if line.startswith("cached teachers: ")]
    assert sizes and all(re.search(r": 12 bytes an example, [\d.]+ k?B$", line) for line in sizes)
    lines = [line for line in lines if ": step " not in line and line not in sizes]
    first, second, *others = lines
    assert first == (
        "python -m experiments.teacher_assistant: takes 2 minutes on 2 CPU cores with its default "
        "options"
    )
    # 3 epochs of 81 images in batches of 16 are 16 steps.
    assert second == (
        f"training 6 stages for 2 seeds: 12 trainings, {12 * 16} steps, into {folder}"
    )
    pattern = (
        r"(\w+), seed ([01]): [\d.]+% on validation after 16 steps and [\d.]+ s"
        r"( \(about \d+ (s|min) left\))?"
    )
    matches = [re.fullmatch(pattern, line) for line in others[:12]]
    assert all(matches), others[:12]
    trainings = [(match[1], int(match[2])) for match in matches]
    assert sorted(trainings) == sorted((name, seed) for name in NAMES for seed in (0, 1))
    assert all(match[3] for match in matches[:-1]) and not matches[-1][3]
    rest = "\n".join(others[12:])
    assert "student_direct is" in rest and f"Everything is in {folder}" in rest
    assert not re.search("on validation after", rest)


@pytest.mark.thorough
def test_first_lines_are_printed_before_training(tmp_path, command, environment):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command("teacher_assistant", *OPTIONS, "--workdir", folder),
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        # Each line is flushed, so that a pipe shows it at once.
        assert process.stdout.readline().startswith("python -m experiments.teacher_assistant: ")
        assert process.stdout.readline().startswith("training 6 stages for 2 seeds: ")
        assert process.poll() is None and not (folder / "metrics.jsonl").exists()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.thorough
def test_exported_student_runs_without_the_library(finished_run, image_dir, tmp_path):
    folder, process = finished_run
    best = re.search(r"best student by validation accuracy, (\w+)\.", process.stdout).group(1)
    test = data.load(image_dir, image_size=16).test
    np.savez(tmp_path / "test.npz", **test._asdict())
    program = str(folder / "student.jaxexport")
    code = (
        "import sys, numpy, jax; from jax import export; from pathlib import Path\n"
        f"program = export.deserialize(bytearray(Path({program!r}).read_bytes()))\n"
        f"test = numpy.load({str(tmp_path / 'test.npz')!r})\n"
        "logits = program.call(test['images'])\n"
        "assert not {'jaxkd', 'flax'} & set(sys.modules)\n"
        "print(float((logits.argmax(-1) == test['labels']).mean()))"
    )
    alone = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    (row,) = (row for row in read_rows(folder) if row["name"] == best)
    assert min(abs(float(alone.stdout) - accuracy) for accuracy in row["accuracy"]) < 1e-6
    variables = load_safetensors(folder / "student.safetensors")
    assert evaluate.parameter_count(variables) == row["parameters"]
    assert read_class_names(folder / "student.safetensors") == ("blue", "green", "red")


@pytest.mark.thorough
def test_same_command_gives_the_same_bits(finished_run, tmp_path, execute):
    execute("teacher_assistant", *OPTIONS, "--workdir", tmp_path / "run")
    assert_same_bits(tmp_path / "run", finished_run[0])


@pytest.mark.thorough
def test_killed_run_resumes_to_the_same_bits(finished_run, tmp_path, command, environment, execute):
    folder = tmp_path / "run"
    metrics = folder / "metrics.jsonl"
    for num_records, kill in ((1, signal.SIGKILL), (33, signal.SIGINT), (75, signal.SIGKILL)):
        process = subprocess.Popen(
            command("teacher_assistant", *OPTIONS, "--workdir", folder, "--save-every", 0),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            while process.poll() is None and not (
                metrics.exists() and metrics.read_bytes().count(b"\n") >= num_records
            ):
                time.sleep(0.01)
            process.send_signal(kill)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
        if kill == signal.SIGINT:
            assert process.returncode == 130 and "the same command resumes" in error
        else:
            assert process.returncode == -signal.SIGKILL, error
    printed = execute("teacher_assistant", *OPTIONS, "--workdir", folder).stdout
    assert printed.count("already trained") >= 7 and "resumed at step" in printed
    assert_same_bits(folder, finished_run[0])


@pytest.mark.thorough
def test_damaged_checkpoint_is_reported_and_trained_again(finished_run, tmp_path, execute):
    folder = tmp_path / "run"
    shutil.copytree(finished_run[0], folder)
    stage = folder / "checkpoints" / "seed1" / "student_direct"
    files = [path for path in stage.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    process = execute("teacher_assistant", *OPTIONS, "--workdir", folder)
    assert re.search(
        r"^warning: checkpoint .*student_direct.* is damaged and passed over", process.stderr
    )
    assert process.stdout.count("already trained") == 11
    assert_same_bits(folder, finished_run[0])


@pytest.mark.thorough
def test_other_options_let_a_run_grow(finished_run, tmp_path, execute):
    options = (*OPTIONS, "--temperature", 2, "--evaluations", 2)
    shutil.copytree(finished_run[0], tmp_path / "grown")
    printed = execute("teacher_assistant", *options, "--workdir", tmp_path / "grown").stdout
    assert "keeps 6 of 12 trainings, goes on with 0, trains 6\n" in printed
    assert "assistant, seed 0: trains again (its model, loss, optimizer or augment" in printed
    execute("teacher_assistant", *options, "--workdir", tmp_path / "fresh")
    verdict = verify.compare_runs(tmp_path / "grown", tmp_path / "fresh")
    assert verdict.differences == []
    assert "of which the last records are compared: 6" in verdict.conditions[-1]
    again = execute("teacher_assistant", *options, "--workdir", tmp_path / "grown").stdout
    assert "keeps 12 of 12 trainings, goes on with 0, trains 0\n" in again


def error_message(monkeypatch, *options):
    """Returns the one line with which the command line refuses options."""
    monkeypatch.setattr(sys, "argv", ["teacher_assistant", *map(str, options)])
    with pytest.raises(SystemExit) as stop:
        cli.run(teacher_assistant.main, teacher_assistant.Config, None)
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--temperature", 0, "above 0"),
        ("--temperature", "inf", "finite"),
        ("--alpha", 2, "from 0 to 1"),
        ("--alpha", "nan", "finite"),
        ("--epochs", 0, "at least 1"),
        ("--num-seeds", 0, "at least 1"),
        ("--seed", -1, "--seed"),
        ("--batch-size", 0, "at least 1"),
        ("--learning-rate", 0, "above 0"),
        ("--save-every", -1, "at least 0"),
        ("--evaluations", 0, "at least 1"),
        ("--dataset", "~nosuchuser/images", "home"),
        ("--data-dir", "~nosuchuser/data", "home"),
        ("--num-labels", 82, "81"),
        ("--num-labels", 0, "0"),
        ("--image-size", 8, "too small"),
        ("--dataset", "cifr10", "cifar10"),
        ("--dataset", "cifar10", "prepare"),
        ("--dataset", "no/such/folder", "no/such/folder"),
    ],
)
def test_bad_options_end_in_one_line(option, value, expected, image_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    options = {
        "--dataset": image_dir,
        "--image-size": 16,
        "--data-dir": tmp_path / "data",
        "--num-labels": 9,
        "--workdir": tmp_path / "run",
    }
    options[option] = value
    message = error_message(monkeypatch, *(part for pair in options.items() for part in pair))
    assert expected in message
    assert not (tmp_path / "run").exists()


def test_damaged_images_end_in_one_line(image_dir, tmp_path, monkeypatch):
    shutil.copytree(image_dir, tmp_path / "images")
    options = ("--dataset", tmp_path / "images", "--workdir", tmp_path / "run")
    corrupt = tmp_path / "images" / "train" / "red" / "7.png"
    corrupt.write_bytes(corrupt.read_bytes()[:50])
    assert "7.png" in error_message(monkeypatch, *options)
    for path in (tmp_path / "images" / "train" / "red").iterdir():
        path.unlink()
    assert "red" in error_message(monkeypatch, *options)
    shutil.rmtree(tmp_path / "images" / "train")
    assert "train" in error_message(monkeypatch, *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_other_workdirs_are_refused_and_left_alone(finished_run, image_dir, tmp_path, monkeypatch):
    folder, _ = finished_run
    options = ("--dataset", image_dir, "--image-size", 20, "--num-labels", 9)
    before = (folder / "results.json").stat().st_mtime_ns
    message = error_message(monkeypatch, *options, "--workdir", folder)
    assert "a run on other data" in message and "--workdir" in message
    assert (folder / "results.json").stat().st_mtime_ns == before
    letter = tmp_path / "letter.txt"
    letter.write_text("mine")
    assert "holds no run" in error_message(monkeypatch, *options, "--workdir", tmp_path)
    assert "letter.txt" in error_message(monkeypatch, *options, "--workdir", letter / "run")
    assert os.listdir(tmp_path) == ["letter.txt"]


def test_help_explains_every_option(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["teacher_assistant", "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.run(teacher_assistant.main, teacher_assistant.Config, teacher_assistant.__doc__)
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    names = "dataset data-dir num-seeds seed epochs batch-size temperature alpha num-labels workdir"
    assert {name.replace("-", "_") for name in names.split()} <= {
        field.name for field in dataclasses.fields(teacher_assistant.Config)
    }
    # An option without an explanation has only its default after its type.
    for field in dataclasses.fields(teacher_assistant.Config):
        option = f"--{field.name.replace('_', '-')}"
        assert re.search(rf"{option}[ ,][^(]*[a-z]{{3,}}[^(]*\((default|required)", printed), option
    assert "what does distillation gain" in printed


def test_student_never_sees_a_label_that_is_not_kept(image_dir):
    config = teacher_assistant.Config(num_labels=9)
    dataset = data.load(image_dir, image_size=16)
    plan = {stage.name: stage for stage in teacher_assistant.make_plan(config, dataset)}
    assert set(plan) == set(NAMES)
    true_labels = plan["teacher"].data["labels"]
    labelled = {}
    for seed in (0, 1):
        for name in ("assistant", "student_direct", "student_assisted"):
            examples = plan[name].examples(seed)
            is_labelled = examples["labelled"]
            assert is_labelled.sum() == 9 and len(examples["inputs"]) == 81
            assert (examples["labels"][~is_labelled] == 0).all()
            np.testing.assert_array_equal(examples["labels"][is_labelled], true_labels[is_labelled])
            labelled[name, seed] = is_labelled
        labelled_only = plan["student_alone"].examples(seed)
        np.testing.assert_array_equal(labelled_only["inputs"], examples["inputs"][is_labelled])
        assert np.bincount(labelled_only["labels"]).tolist() == [3, 3, 3]
    # Students of one seed share their labels, and seeds do not.
    assert (labelled["assistant", 0] == labelled["student_assisted", 0]).all()
    assert (labelled["assistant", 0] != labelled["assistant", 1]).any()
