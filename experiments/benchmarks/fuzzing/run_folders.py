"""Folders of runs: configuration, metrics, results, checkpoints and their manifests."""

import functools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.fuzzing import values
from jaxkd import runs
from jaxkd.runs import checkpoints, figures, report, verify

CONFIG = {"experiment": "teacher_assistant", "epochs": 2, "num_seeds": 1, "workdir": None}
CHECKPOINTS = Path("checkpoints", "seed0", "student")
TREE = {"params": {"kernel": np.arange(6.0, dtype=np.float32), "bias": np.zeros(2, np.float32)}}


def make(rng: random.Random, folder: Path) -> Callable[[], Any]:
    """Makes a damaged copy of a run and returns a function that reads it."""
    run = folder / rng.choice(("run", "run", "r é", "r\u2028n"))
    shutil.copytree(_make_run(), run)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _change(rng, folder, run)
    readers: tuple[Callable[[], Any], ...] = (
        lambda: runs.read_run(run),
        lambda: runs.read_run(run).metrics(),
        lambda: runs.read_run(run).read_results(),
        lambda: _open(run, rng.choice((CONFIG, CONFIG | {"epochs": 3}))),
        lambda: _open(run, CONFIG).rewind_metrics(0, "student", 1),
        lambda: checkpoints.load(run / CHECKPOINTS),
        lambda: checkpoints.restore(run / CHECKPOINTS, TREE),
        lambda: checkpoints.save(run / CHECKPOINTS, 5, TREE),
        lambda: verify.compare_runs(_make_run(), run),
        lambda: verify.compare_runs(run, run),
        lambda: report.results_table(runs.read_run(run).read_results()),
        lambda: figures.plot_curves(runs.read_run(run).metrics(), folder / "curves.png"),
    )
    return rng.choice(readers)


def may_change(path: Path) -> bool:
    """True for the files that opening a run or saving a checkpoint may rewrite or delete."""
    return (
        path.name in (".lock", ".lock-holder", "metrics.jsonl", "config.json")
        or "student" in path.parts
    )


def _open(run: Path, config: dict[str, Any]) -> runs.Run:
    opened = runs.open_run(run, config)
    lock: Any = opened.lock
    if lock is not None:
        # This process opens thousands.
        lock.release(force=True)
    return opened


@functools.cache
def _make_run() -> Path:
    """Makes a finished run of one stage, once for each process."""
    folder = Path(tempfile.mkdtemp(prefix="jaxkd-fuzz-run-"))
    run = _open(folder, CONFIG)
    for step in (1, 2):
        record = {"seed": 0, "stage": "student", "step": step, "epoch": step, "loss": 1.0}
        run.append_metrics(record | {"validation_loss": 1.0, "validation_accuracy": 0.5})
    run.write_results([runs.ResultRow("student", accuracy=(0.5,), seconds=(1.0,))])
    notes = {"seconds": 1.0, "losses": [], "stage": {}, "validation_accuracy": 0.5}
    for step in (1, 2):
        checkpoints.save(folder / CHECKPOINTS, step, TREE, notes=notes)
    return folder


def _change(rng: random.Random, folder: Path, run: Path) -> None:
    files = sorted(path for path in run.rglob("*") if path.is_file() and not path.is_symlink())
    named = [path for path in files if path.suffix in (".json", ".jsonl")]
    if not files:
        return
    path = rng.choice(named) if named and rng.random() < 0.75 else rng.choice(files)
    action = rng.random()
    if action < 0.1:
        values.replace_by_odd_file(rng, path)
    elif action < 0.3:
        path.write_bytes(values.damage(rng, path.read_bytes()))
    elif action < 0.4:
        _move_checkpoint(rng, run)
    elif action < 0.48:
        _link(rng, folder, run)
    else:
        _change_json(rng, path)


def _change_json(rng: random.Random, path: Path) -> None:
    try:
        if path.suffix == ".jsonl":
            lines = path.read_bytes().splitlines()
            index = rng.randrange(len(lines))
            content = values.change_json(rng, json.loads(lines[index]))
            lines[index] = values.encode_json(rng, content).replace(b"\n", b" ")
            path.write_bytes(b"\n".join(lines) + b"\n")
        else:
            content = values.change_json(rng, json.loads(path.read_bytes()))
            path.write_bytes(values.encode_json(rng, content))
    # An earlier change may have left no JSON.
    except (ValueError, RecursionError):
        path.write_bytes(b"")


def _move_checkpoint(rng: random.Random, run: Path) -> None:
    """Copies a checkpoint to another number, or leaves an empty or odd folder of a number."""
    folder = run / CHECKPOINTS
    number = rng.choice(("3", "0", "-1", "²", "٣", "1" * 100, "2.5", "99999999999"))
    if not folder.is_dir():
        return
    if rng.random() < 0.6 and (folder / "2").is_dir() and (folder / "2.json").is_file():
        shutil.copytree(folder / "2", folder / number, dirs_exist_ok=True)
        shutil.copy(folder / "2.json", folder / f"{number}.json")
    else:
        (folder / number).mkdir(exist_ok=True)
        (folder / f"{number}.json").write_text(rng.choice(("{}", "[]", "", "null")))


def _link(rng: random.Random, folder: Path, run: Path) -> None:
    """Puts a link to a file of somebody else where the library writes."""
    victim = folder / "somebody_elses_file"
    victim.write_text("precious", encoding="utf-8")
    name = rng.choice((".lock", ".lock-holder", "metrics.jsonl", "config.json", ".config.json.1"))
    path = run / name
    if os.path.lexists(path):
        if path.is_dir():
            return
        path.unlink()
    path.symlink_to(victim)
