"""The main job: what it leaves, that it repeats bit for bit, and that nothing stops it for good."""

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

from experiments import cli, teacher_assistant
from jaxkd import data, evaluate, export

NAMES = ["teacher", "assistant", "student_alone", "student_direct", "student_assisted", "student_all_labels"]
OPTIONS = ("--num-labels", 9)


@pytest.fixture(scope="module")
def done(tmp_path_factory, execute):
    folder = tmp_path_factory.mktemp("done") / "run"
    printed = execute("teacher_assistant", *OPTIONS, "--workdir", folder)
    return folder, printed


def results(folder):
    rows = json.loads((folder / "results.json").read_text())
    return [{key: value for key, value in row.items() if key not in evaluate.TIMINGS} for row in rows]


def assert_same_bits(folder, other):
    assert results(folder) == results(other)
    # A stage that is trained once more writes its records behind the others'.
    records, others = (sorted((one / "metrics.jsonl").read_text().splitlines()) for one in (folder, other))
    assert records == others
    for name in ("student.safetensors", "student.jaxexport", "accuracy.png", "curves.png", "size.png"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def test_run_leaves_what_it_promises(done):
    folder, printed = done
    rows = json.loads((folder / "results.json").read_text())
    assert [row["name"] for row in rows] == NAMES
    promised = "name accuracy accuracy_mean accuracy_std agreement parameters bytes flops latency_ms seconds"
    for row in rows:
        assert set(promised.split()) <= set(row)
        assert len(row["accuracy"]) == len(row["seconds"]) == 2
        assert row["accuracy_mean"] == pytest.approx(np.mean(row["accuracy"]))
        assert row["accuracy_std"] == pytest.approx(np.std(row["accuracy"], ddof=1))
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["num_labels"] == 9 and config["environment"]["jax"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {(r["stage"], r["seed"]) for r in records} == {(name, seed) for name in NAMES for seed in (0, 1)}
    report = (folder / "report.md").read_text()
    assert "student_assisted is" in report and "student_direct is" in report
    for figure in ("accuracy.png", "curves.png", "size.png"):
        assert (folder / figure).read_bytes().startswith(b"\x89PNG") and figure in report
    assert (folder / "checkpoints" / "seed1" / "student_direct").is_dir()
    assert "validation after" in printed.stdout and "student_direct" in printed.stdout and not printed.stderr


def test_exported_student_runs_alone_and_as_well(done, images, tmp_path):
    folder, printed = done
    best = re.search(r"best student by validation, (\w+),", printed.stdout).group(1)
    test = data.load(images, image_size=16).test
    np.savez(tmp_path / "test.npz", **test._asdict())
    code = (
        "import sys, numpy, jax; from jax import export; from pathlib import Path\n"
        f"program = export.deserialize(bytearray(Path({str(folder / 'student.jaxexport')!r}).read_bytes()))\n"
        f"test = numpy.load({str(tmp_path / 'test.npz')!r})\n"
        "logits = program.call(test['images'])\n"
        "assert not {'jaxkd', 'flax'} & set(sys.modules)\n"
        "print(float((logits.argmax(-1) == test['labels']).mean()))"
    )
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    (row,) = (row for row in results(folder) if row["name"] == best)
    assert min(abs(float(alone.stdout) - accuracy) for accuracy in row["accuracy"]) < 1e-6
    variables = export.load_safetensors(folder / "student.safetensors")
    assert evaluate.parameter_count(variables) == row["parameters"]


def test_same_command_gives_the_same_bits(done, tmp_path, execute):
    execute("teacher_assistant", *OPTIONS, "--workdir", tmp_path / "run")
    assert_same_bits(tmp_path / "run", done[0])


def test_killed_at_any_moment_it_ends_with_the_same_bits(done, tmp_path, command, environment, execute):
    folder = tmp_path / "run"
    for records, kill in ((1, signal.SIGKILL), (33, signal.SIGINT), (75, signal.SIGKILL)):
        line = command("teacher_assistant", *OPTIONS, "--workdir", folder, "--save-every", 0)
        process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        metrics = folder / "metrics.jsonl"
        try:
            while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= records):
                time.sleep(0.01)
            process.send_signal(kill)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
        if kill == signal.SIGINT:
            assert process.returncode == 130 and "the same command goes on" in error
        else:
            assert process.returncode == -signal.SIGKILL, error
    printed = execute("teacher_assistant", *OPTIONS, "--workdir", folder).stdout
    assert printed.count("already trained") >= 7 and "resumed at step" in printed
    assert_same_bits(folder, done[0])


def test_damaged_checkpoint_is_told_and_made_good(done, tmp_path, execute):
    folder = tmp_path / "run"
    shutil.copytree(done[0], folder)
    stage = folder / "checkpoints" / "seed1" / "student_direct"
    largest = max((path for path in stage.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    printed = execute("teacher_assistant", *OPTIONS, "--workdir", folder)
    assert re.search(r"^warning: checkpoint .*student_direct.* is damaged and passed over", printed.stderr)
    assert printed.stdout.count("already trained") == 11
    assert_same_bits(folder, done[0])


def fails(monkeypatch, *options):
    """The one line with which the command line refuses some options."""
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
        ("--temperature", "inf", "above 0"),
        ("--alpha", 2, "from 0 to 1"),
        ("--alpha", "nan", "from 0 to 1"),
        ("--epochs", 0, "at least one"),
        ("--seeds", 0, "at least one"),
        ("--seed", -1, "--seed"),
        ("--batch-size", 0, "at least one"),
        ("--learning-rate", 0, "above 0"),
        ("--save-every", -1, "at least 0"),
        ("--evaluations", 0, "at least one"),
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
def test_bad_options_end_in_one_line(option, value, expected, images, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    given = {"--dataset": images, "--image-size": 16, "--data-dir": tmp_path / "data", "--num-labels": 9}
    given |= {"--workdir": tmp_path / "run", option: value}
    message = fails(monkeypatch, *(part for pair in given.items() for part in pair))
    assert expected in message
    assert not (tmp_path / "run").exists()


def test_damaged_images_end_in_one_line(images, tmp_path, monkeypatch):
    shutil.copytree(images, tmp_path / "images")
    common = ("--dataset", tmp_path / "images", "--workdir", tmp_path / "run")
    corrupt = tmp_path / "images" / "train" / "red" / "7.png"
    corrupt.write_bytes(corrupt.read_bytes()[:50])
    assert "7.png" in fails(monkeypatch, *common)
    for path in (tmp_path / "images" / "train" / "red").iterdir():
        path.unlink()
    assert "red" in fails(monkeypatch, *common)
    shutil.rmtree(tmp_path / "images" / "train")
    assert "train" in fails(monkeypatch, *common)
    assert not (tmp_path / "run").exists()


def test_other_workdirs_are_refused_and_left_alone(done, images, tmp_path, monkeypatch):
    given = ("--dataset", images, "--image-size", 16, "--num-labels", 9)
    before = (done[0] / "results.json").stat().st_mtime_ns
    message = fails(monkeypatch, *given, "--workdir", done[0])
    assert "another configuration" in message and "epochs 3 there and" in message and "--workdir" in message
    assert (done[0] / "results.json").stat().st_mtime_ns == before
    (tmp_path / "letter.txt").write_text("mine")
    assert "holds no run" in fails(monkeypatch, *given, "--workdir", tmp_path)
    assert "letter.txt" in fails(monkeypatch, *given, "--workdir", tmp_path / "letter.txt" / "run")
    assert os.listdir(tmp_path) == ["letter.txt"]


def test_help_explains_every_option(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["teacher_assistant", "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.run(teacher_assistant.main, teacher_assistant.Config, teacher_assistant.__doc__)
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    promised = "dataset data-dir seeds seed epochs batch-size temperature alpha num-labels workdir"
    assert {name.replace("-", "_") for name in promised.split()} <= {
        field.name for field in dataclasses.fields(teacher_assistant.Config)
    }
    # An option that nobody explained has nothing but its default behind its type.
    for field in dataclasses.fields(teacher_assistant.Config):
        option = f"--{field.name.replace('_', '-')}"
        assert re.search(rf"{option}[ ,][^(]*[a-z]{{3,}}[^(]*\((default|required)", printed), option
    assert "What does distillation buy" in printed


def test_student_never_sees_a_label_that_is_not_kept(images):
    config = teacher_assistant.Config(num_labels=9)
    plan = {stage.name: stage for stage in teacher_assistant.make_plan(config, data.load(images, image_size=16))}
    assert set(plan) == set(NAMES)
    truth = plan["teacher"].data["labels"]
    kept = []
    for seed in (0, 1):
        for name in ("assistant", "student_direct", "student_assisted"):
            shown = plan[name].examples(seed)
            assert shown["labelled"].sum() == 9 and len(shown["inputs"]) == 81
            assert (shown["labels"][~shown["labelled"]] == 0).all()
            np.testing.assert_array_equal(shown["labels"][shown["labelled"]], truth[shown["labelled"]])
            kept.append(shown["labelled"])
        few = plan["student_alone"].examples(seed)
        np.testing.assert_array_equal(few["inputs"], shown["inputs"][shown["labelled"]])
        assert np.bincount(few["labels"]).tolist() == [3, 3, 3]
    assert (kept[0] == kept[2]).all() and (kept[0] != kept[3]).any(), "students of one seed share labels, seeds do not"
