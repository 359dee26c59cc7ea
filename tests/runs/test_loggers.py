"""Loggers get each record once, in order, and none of them can end a run."""

import gc
import io
import re
import subprocess
import sys

import jax
import pytest

from jaxkd import runs
from jaxkd.runs import growth


class Recorder:
    """Keeps what it gets. Can fail at its n-th record and when it is closed."""

    def __init__(self, fail_at=None, fail_close=False):
        self.records, self.closed = [], 0
        self.fail_at, self.fail_close = fail_at, fail_close

    def __call__(self, record):
        if len(self.records) + 1 == self.fail_at:
            raise OSError("no space")
        self.records.append(record)

    def close(self):
        self.closed += 1
        if self.fail_close:
            raise OSError("gone")

    @property
    def steps(self):
        return [record["step"] for record in self.records]


def make_record(step, stage="student"):
    return {"seed": 0, "stage": stage, "step": step, "epoch": step / 8, "loss": 1 / step}


def log(folder, steps, *loggers, resume_at=None):
    """Opens a run, resumes its training if need be, and appends records."""
    run = runs.open_run(folder, {}, loggers=loggers)
    if resume_at is not None:
        run.rewind_metrics(0, "student", resume_at)
    for step in steps:
        run.append_metrics(make_record(step))
    return run


def test_loggers_get_copies_of_what_the_file_has_and_are_closed(tmp_path):
    logger = Recorder()
    run = log(tmp_path, [4, 8], lambda record: record.clear(), logger)
    assert logger.records == run.metrics() == [make_record(4), make_record(8)]
    run.close_loggers()
    run.append_metrics(make_record(12))
    assert (logger.steps, logger.closed) == ([4, 8], 1)


def test_loggers_are_closed_with_a_run_that_nobody_has_any_more(tmp_path):
    logger = Recorder()
    run = log(tmp_path, [4], logger)
    del run
    gc.collect()
    assert logger.closed == 1


def test_resumed_training_logs_no_record_twice_however_often_it_is_killed(tmp_path):
    logger = Recorder()
    log(tmp_path, [4, 8, 12], logger)
    # Killed before it is again where the first process was.
    log(tmp_path, [8], logger, resume_at=4)
    run = log(tmp_path, [8, 12, 16], logger, resume_at=4)
    assert logger.steps == [4, 8, 12, 16] == [record["step"] for record in run.metrics()]


def test_another_training_of_a_stage_is_logged(tmp_path):
    logger = Recorder()
    log(tmp_path, [4, 8], logger)
    run = log(tmp_path, [8], logger, resume_at=4)
    growth.set_aside(run, 0, "student")
    run.append_metrics(make_record(4))
    assert logger.steps == [4, 8, 4]
    aside = growth.find_set_aside(run, 0, "student")[0]
    growth.take_back(run, 0, "student", aside)
    assert logger.steps == [4, 8, 4], "these records were logged before"


def test_failing_logger_is_dropped_with_a_line(tmp_path):
    bad, good = Recorder(fail_at=2, fail_close=True), Recorder()
    with pytest.warns(UserWarning, match=r"logger Recorder raised OSError \(no space\)") as warned:
        log(tmp_path, [4, 8, 12], bad, good)
    assert len(warned) == 1
    assert (bad.steps, bad.closed, good.steps) == ([4], 1, [4, 8, 12])


def test_failing_close_is_a_warning(tmp_path):
    bad, good = Recorder(fail_close=True), Recorder()
    run = log(tmp_path, [4], bad, good)
    with pytest.warns(UserWarning, match="when it was closed"):
        run.close_loggers()
    assert good.closed == 1


def test_only_the_primary_process_logs(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    logger = Recorder()
    log(tmp_path, [4], logger)
    assert logger.records == []


@pytest.mark.parametrize("loggers", [print, "log.txt", 3, (3,)])
def test_what_is_no_logger_is_refused(tmp_path, loggers):
    with pytest.raises(TypeError, match="pass a tuple of callables") as raised:
        runs.open_run(tmp_path, {}, loggers=loggers)
    assert not list(tmp_path.iterdir()) and len(str(raised.value)) <= 300


def test_damaged_note_of_logged_steps_is_an_error(tmp_path):
    runs.open_run(tmp_path, {})
    (tmp_path / "logged.json").write_text('[["a", 1]]')
    with pytest.raises(runs.RunError, match="logged.json is damaged .*: delete it"):
        runs.open_run(tmp_path, {}, loggers=(print,))


def test_lines_go_to_a_file_or_stream(tmp_path):
    stream = io.StringIO()
    path = tmp_path / "logs" / "training.log"
    log(tmp_path / "run", [4], runs.line_logger(path), runs.line_logger(stream)).close_loggers()
    line = "seed 0, student, step 4: epoch 0.5, loss 0.25\n"
    assert path.read_text() == stream.getvalue() == line
    log(tmp_path / "run", [8], runs.line_logger(path)).close_loggers()
    assert path.read_text().splitlines()[1].startswith("seed 0, student, step 8:")


@pytest.mark.parametrize("name", ["metrics.jsonl", "results.json"])
def test_a_file_of_the_run_itself_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="has the name of a run's own file"):
        runs.line_logger(tmp_path / name)


@pytest.mark.parametrize("kind", ["closed", "binary", "folder"])
def test_a_file_that_takes_no_lines_is_refused_before_the_training(tmp_path, kind):
    path = tmp_path / "log.txt"
    messages = {"closed": "is closed", "binary": "takes bytes", "folder": "is a folder"}
    with path.open("wb" if kind == "binary" else "w") as file:
        if kind == "closed":
            file.close()
        with pytest.raises((TypeError, ValueError), match=messages[kind]):
            runs.line_logger(tmp_path if kind == "folder" else file)


def test_tensorboard_gets_the_values_at_their_steps(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2

    for steps in ([4, 8], [12]):
        log(tmp_path / "run", steps, runs.tensorboard_logger(tmp_path / "tb")).close_loggers()
    values = []
    for path in (tmp_path / "tb" / "seed0" / "student").iterdir():
        content, start = path.read_bytes(), 0
        while start < len(content):
            length = int.from_bytes(content[start : start + 8], "little")
            # A checksum of 4 bytes follows the length, and another one the event.
            event = event_pb2.Event.FromString(content[start + 12 : start + 12 + length])
            values += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            start += 16 + length
    steps = (4, 8, 12)
    expected = [(i, "epoch", i / 8) for i in steps] + [(i, "loss", 1 / i) for i in steps]
    assert sorted(values) == [pytest.approx(value) for value in sorted(expected)]


WANDB = """
import sys
from jaxkd import runs
for step in 4, 8:
    run = runs.open_run("run", {}, loggers=[runs.wandb_logger("wb", project="p")])
    run.append_metrics({"seed": 0, "stage": "student", "step": step, "loss": 1 / step})
    if step == 4:
        run.close_loggers()
"""


@pytest.mark.thorough
def test_wandb_continues_its_run_offline(tmp_path):
    pytest.importorskip("wandb")
    # In a process of its own, which ends the service that W&B starts.
    process = subprocess.run(
        [sys.executable, "-c", WANDB],
        cwd=tmp_path,
        env={"WANDB_MODE": "offline", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    # W&B itself has an end at the exit, before which the open run must be closed.
    assert "Traceback" not in process.stderr and "raised" not in process.stderr
    run_id = (tmp_path / "wb" / "wandb-id").read_text()
    files = sorted((tmp_path / "wb").rglob(f"run-{run_id}.wandb"))
    # The values of a record are JSON texts in an uncompressed file.
    found = [set(re.findall(rb"seed0/student/loss.{1,4}?(0\.\d+)", f.read_bytes())) for f in files]
    assert found == [{b"0.25"}, {b"0.125"}]
