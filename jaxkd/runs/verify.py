"""Repetition of a finished run, and a comparison of two runs bit for bit."""

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxkd._files import describe_differences
from jaxkd._messages import shorten
from jaxkd.runs.checkpoints import Restored, load
from jaxkd.runs.errors import RunError
from jaxkd.runs.results import rows_without_timings
from jaxkd.runs.run import IGNORED_OPTIONS, Run, checkpoint_identity, is_leftover, read_run

OMITTED_OPTIONS = (
    "experiment",
    "command",
    "workdir",
    "teacher_cache",
    "log",
    "coordinator",
    "num_processes",
    "process_id",
)
"""Options that the command of a rerun omits, because it is one process with a folder of its own,
and is not logged."""

# Options that may be a path. A data set and a BERT may also be known by their names.
_PATH_OPTIONS = ("dataset", "data", "data_dir", "weights", "unlabelled", "bert", "teacher")

_Records = dict[tuple[str, int, int], list[dict]]
"""The records of each stage, seed and step. A sound run has one record of each."""


class Verdict(NamedTuple):
    """The differences between two runs.

    In each line, "was" and "is" give the values of the first and of the second run.

    Attributes:
        differences: One line for each of metrics, checkpoints, results and exported student that
            differ. Empty if the runs are identical.
        conditions: One line for each of options, data, environment, and environments before the
            first run grew that differ, and one on trainings of which few records are compared.
        compared: The numbers of records, checkpoints and rows that were compared.
    """

    differences: list[str]
    conditions: list[str]
    compared: str


def verify(
    folder: str | os.PathLike, scratch: str | os.PathLike, *, is_temporary: bool = False
) -> dict[Path, Verdict]:
    """Repeats a run with the options that it recorded, and compares both runs.

    The run is that of an experiment or of `jaxkd distill`.

    Args:
        folder: The folder of the run. If an experiment leaves several runs below one folder, that
            folder or the folder of one run.
        scratch: The folder of the new run. It must be empty or absent, or hold the run of an
            earlier call that was stopped.
        is_temporary: Keeps the name of that folder out of what the new run prints.

    Returns:
        The verdict on each run, by its folder.

    Raises:
        RunError: If there is no finished run of such a command, the folder of the new run holds
            something else, or the new run fails.
        OSError: If a file cannot be read or written.
    """
    folder = Path(folder)
    scratch = Path(scratch)
    runs = _find_runs(folder)
    for run in runs:
        _check_finished(run)
        if scratch.resolve() in (folder.resolve(), run.folder.resolve()):
            raise RunError(f"{scratch} is the run itself: name another folder for the rerun")
    _check_scratch(runs, scratch)
    # An experiment may use fewer seeds for one of its runs than the user asked for, never more.
    _rerun(max(runs, key=lambda run: run.config.get("num_seeds", 0)), scratch, is_temporary)
    return {run.folder: compare_runs(run.folder, _find_rerun(run, scratch)) for run in runs}


def compare_runs(first: str | os.PathLike, second: str | os.PathLike) -> Verdict:
    """Compares the files of two runs, except for the times in them.

    A run that has grown, see `open_run`, may hold trainings that were evaluated at other steps than
    its configuration says: one that went on with a shorter training, or is older than another
    number of evaluations. Of these, the last records alone are compared, and that without the
    training loss, which is a mean since the evaluation before. The conditions count them.

    Args:
        first: The folder of a run.
        second: The folder of the other run.

    Returns:
        The differences.

    Raises:
        RunError: If there is no run in a folder, or its files are damaged.
        OSError: If a file cannot be read.
    """
    pair = read_run(first), read_run(second)
    records = [_group_records(run) for run in pair]
    num_regrouped = 0
    if any(run.history for run in pair):
        num_regrouped = _keep_comparable(*records)
    rows = [rows_without_timings(run.read_results()) for run in pair]
    # In the order of the second run's training.
    stages = list(dict.fromkeys((stage, seed) for stage, seed, _ in [*records[1], *records[0]]))
    differences = [
        *_diff_records(*records),
        *_diff_checkpoints(pair, stages),
        *_diff_rows(*rows),
        *_diff_students(pair),
    ]
    conditions = [
        describe_differences(pair[0].config, pair[1].config, ignore=IGNORED_OPTIONS, limit=None),
        describe_differences({"data": pair[0].data}, {"data": pair[1].data}),
        describe_differences(pair[0].environment, pair[1].environment, limit=None),
        *_describe_earlier_environments(*pair),
        "trainings that were evaluated at other steps before the run grew, of which the last "
        f"records are compared: {num_regrouped}"
        if num_regrouped
        else "",
    ]
    compared = f"{len(records[1])} records, {len(stages)} checkpoints, {len(rows[1])} rows"
    return Verdict(differences, [line for line in conditions if line], compared)


def command_line_options(config: Mapping[str, Any]) -> list[str]:
    """Returns the command line arguments of a run, without the `OMITTED_OPTIONS`.

    Args:
        config: The options, as a run recorded them.

    Returns:
        The arguments.

    Example:
        >>> config = {"experiment": "methods", "alpha": 0.5, "augment": False, "workdir": "a"}
        >>> command_line_options(config | {"only": ["kd", "dist"]})
        ['--alpha=0.5', '--no-augment', '--only', 'kd', 'dist']
    """
    arguments: list[str] = []
    for name, value in config.items():
        # A dict is no option, but what a run notes of the files that it read.
        if name in OMITTED_OPTIONS or isinstance(value, Mapping):
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            arguments += [f"--{option}", *map(str, value)]
        else:
            # One argument, so that a value with a dash in front is not read as an option.
            arguments.append(f"--{option}={value}")
    return arguments


def _find_runs(folder: Path) -> list[Run]:
    """Returns the run in a folder, or the runs of one command that are below it."""
    folders = [folder]
    if not (folder / "config.json").exists():
        folders = sorted(path.parent for path in folder.glob("*/config.json")) or folders
    runs = [read_run(path) for path in folders]
    # Runs of one command may differ in their number of seeds: see `verify`.
    ignored = (*IGNORED_OPTIONS, "num_seeds")
    if any(describe_differences(runs[0].config, run.config, ignore=ignored) for run in runs):
        names = ", ".join(path.name for path in folders)
        raise RunError(f"{folder} holds runs of several commands: name one of {names}")
    return runs


def _find_program(run: Run) -> list[str]:
    """Returns the module that made a run, and its subcommand if it has some; empty if unknown."""
    if run.config.get("command") == "distill":
        return ["jaxkd", "distill"]
    experiment = run.config.get("experiment")
    return [f"experiments.{experiment}"] if experiment else []


def _check_finished(run: Run) -> None:
    program = _find_program(run)
    if not program:
        raise RunError(
            f"{run.folder} is not the run of an experiment or of jaxkd distill: repeat it in "
            "another folder and call jaxkd.runs.verify.compare_runs on both"
        )
    # The results of a run that is growing are those of an earlier configuration.
    if run.is_growing or not (run.folder / "results.json").exists():
        raise RunError(
            f"{run.folder} is not finished: run python -m {' '.join(program)} with the same "
            "options, which resumes it"
        )


def _check_scratch(runs: Iterable[Run], scratch: Path) -> None:
    """Raises `RunError` if a folder holds something else than a rerun that was stopped.

    The rerun itself would name another option, and `jaxkd distill` would let another run grow.
    """
    if scratch.exists() and not scratch.is_dir():
        raise RunError(f"{scratch} is not a folder: name another one (--keep)")
    pairs = [(run, _find_rerun(run, scratch)) for run in runs]
    pairs = [(run, folder) for run, folder in pairs if (folder / "config.json").exists()]
    if not pairs and scratch.exists() and not all(map(is_leftover, scratch.iterdir())):
        raise RunError(f"{scratch} is not empty and holds no rerun: name another folder (--keep)")
    for run, folder in pairs:
        if differences := run.describe_changes(read_run(folder).config):
            raise RunError(
                f"{folder} holds another run ({shorten(differences, 150)}): name another folder "
                "(--keep)"
            )


def _rerun(run: Run, scratch: Path, is_temporary: bool) -> None:
    program = _find_program(run)
    arguments = [*command_line_options(run.config), "--workdir", str(scratch)]
    command = [sys.executable, "-m", *program, *arguments]
    # In a process of its own: the library imports no experiment, and XLA reads the flags that an
    # option may set only when it starts.
    if is_temporary:
        status = _run_without_naming(command, str(scratch))
    else:
        status = subprocess.run(command, check=False).returncode
    if status:
        raise RunError(
            f"the rerun of {' '.join(program)} failed with exit status {status}: "
            f"the reason is printed above{_describe_relative_path(run)}"
        )


def _describe_relative_path(run: Run) -> str:
    """Returns advice on an option that may be a path from another folder, or an empty string."""
    for option in _PATH_OPTIONS:
        path = run.config.get(option)
        if not isinstance(path, str):
            continue
        # Behind the colon of NETWORK:FILE.
        file = path.rpartition(":")[2]
        if file not in ("", "auto") and not os.path.isabs(file) and not os.path.exists(file):
            return (
                f"; if the run's --{option.replace('_', '-')} {shorten(path, 60)} is a path, it is "
                "relative to another folder: start verify there"
            )
    return ""


def _run_without_naming(command: Sequence[str], folder: str) -> int:
    """Runs a command whose output does not name a folder, and returns its exit status.

    The folder of a new run that is identical is deleted. Whoever reads its name would look for it.
    """
    # Without a terminal, Python would hold lines back.
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env=environment, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line.replace(folder, "a temporary folder"), end="", flush=True)
    return process.returncode


def _find_rerun(run: Run, scratch: Path) -> Path:
    """Returns the folder in which the rerun left the counterpart of a run."""
    if (scratch / "config.json").exists():
        return scratch
    return scratch / Path(run.config.get("workdir") or "").name


def _group_records(run: Run) -> _Records:
    records: _Records = {}
    for record in run.metrics():
        key = record["stage"], record["seed"], record["step"]
        records.setdefault(key, []).append(record)
    return records


def _keep_comparable(first: _Records, second: _Records) -> int:
    """Keeps the last record of trainings that were evaluated at different steps.

    Returns:
        The number of these trainings.
    """
    steps: list[dict[tuple[str, int], set[int]]] = []
    for records in (first, second):
        by_training: dict[tuple[str, int], set[int]] = {}
        for stage, seed, step in records:
            by_training.setdefault((stage, seed), set()).add(step)
        steps.append(by_training)
    # One that a run lacks, or that ended at another step, is a difference.
    differing = {
        training
        for training in steps[0].keys() & steps[1].keys()
        if steps[0][training] != steps[1][training]
        and max(steps[0][training]) == max(steps[1][training])
    }
    for records, by_training in zip((first, second), steps, strict=True):
        for stage, seed, step in list(records):
            if (stage, seed) in differing:
                last = records.pop((stage, seed, step))
                if step == max(by_training[stage, seed]):
                    records[stage, seed, step] = [
                        {name: value for name, value in record.items() if name != "loss"}
                        for record in last
                    ]
    return len(differing)


def _describe_earlier_environments(first: Run, second: Run) -> Iterator[str]:
    """Yields how the environments differ in which the first run had earlier configurations."""
    now = first.environment
    for earlier in first.history:
        # Those that did not change are described already.
        if earlier["environment"] != now and (
            difference := describe_differences(
                earlier["environment"], second.environment, limit=None
            )
        ):
            yield f"before the run grew: {difference}"


def _diff_records(first: _Records, second: _Records) -> Iterator[str]:
    """Yields a line on the first difference, in the order of the second run's training."""
    for key in _union(second, first):
        before = first.get(key, [])
        after = second.get(key, [])
        if before == after:
            continue
        if len(before) != len(after):
            difference = f"the number of records was {len(before)} and is {len(after)}"
        else:
            lines = filter(None, map(describe_differences, before, after))
            # Unlike lists, the descriptions cannot tell a missing value from None.
            difference = next(lines, "a value is missing")
        stage, seed, step = key
        yield f"metrics: first at stage {stage}, seed {seed}, step {step}: {difference}"
        return


def _diff_checkpoints(pair: tuple[Run, Run], stages: Sequence[tuple[str, int]]) -> Iterator[str]:
    """Yields a line with the number of final checkpoints that differ and the first of them."""
    differences = []
    for stage, seed in stages:
        identity = checkpoint_identity(seed, stage)
        checkpoints = [load(run.checkpoint_folder(seed, stage), identity=identity) for run in pair]
        if difference := _diff_checkpoint(*checkpoints):
            differences.append(f"stage {stage}, seed {seed}: {difference}")
    if differences:
        yield (
            f"checkpoints: {len(differences)} of {len(stages)} differ, first at {differences[0]}"
        )


def _diff_checkpoint(first: Restored | None, second: Restored | None) -> str:
    if first is None or second is None:
        return f"no sound checkpoint in the {_first_or_second(first)} run"
    if first.step != second.step:
        return f"step was {first.step} and is {second.step}"
    before = _leaves_by_path(first.tree)
    after = _leaves_by_path(second.tree)
    paths = _union(before, after)
    differences = []
    for path in paths:
        if difference := _diff_tensors(before.get(path), after.get(path)):
            differences.append(f"{path}: {difference}")
    if not differences:
        return ""
    count = f"{len(differences)} of {len(paths)} tensors differ at step {second.step}"
    return f"{count}, first {differences[0]}"


def _leaves_by_path(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    by_path = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves
    }
    # Parameters first: the first difference is reported, and the optimizer's state says less.
    return dict(sorted(by_path.items(), key=lambda item: not item[0].startswith("params/")))


def _diff_tensors(first: np.ndarray | None, second: np.ndarray | None) -> str:
    if first is None or second is None:
        return f"missing in the {_first_or_second(first)} run"
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        before = f"{first.dtype}{list(first.shape)}"
        return f"was {before} and is {second.dtype}{list(second.shape)}"
    # Bytes, because 0.0 equals -0.0 and NaN does not equal itself.
    first_bytes, second_bytes = (
        np.ascontiguousarray(tensor).reshape(-1, 1).view(np.uint8) for tensor in (first, second)
    )
    # From `[elements, bytes of an element]` back to one boolean per element.
    differing = np.not_equal(first_bytes, second_bytes).any(1).reshape(first.shape)
    if not differing.any():
        return ""
    # In float64, because a difference of unsigned integers would wrap around.
    distance = np.abs(first[differing].astype(np.float64) - second[differing].astype(np.float64))
    count = f"{differing.sum():,} of {differing.size:,} elements differ"
    return f"{count}, by up to {distance.max():.3g}"


def _diff_rows(first: Mapping[str, dict], second: Mapping[str, dict]) -> Iterator[str]:
    names = _union(first, second)
    differing = [name for name in names if first.get(name) != second.get(name)]
    if differing:
        name = differing[0]
        difference = describe_differences(first.get(name, {}), second.get(name, {}))
        yield f"results: {len(differing)} of {len(names)} rows differ, first {name}: {difference}"


def _diff_students(pair: tuple[Run, Run]) -> Iterator[str]:
    paths = [run.folder / "student.safetensors" for run in pair]
    first, second = (path.read_bytes() if path.exists() else None for path in paths)
    if first == second:
        return
    if first is None or second is None:
        yield f"student.safetensors is missing in the {_first_or_second(first)} run"
    else:
        yield "student.safetensors differs"


def _union(first: Iterable, second: Iterable) -> list:
    """Returns the keys of both mappings, those of the first one in front."""
    return list(dict.fromkeys([*first, *second]))


def _first_or_second(first: Any) -> str:
    """Returns which of two runs lacks a value, given the value of the first one."""
    return "first" if first is None else "second"
