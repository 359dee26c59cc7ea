"""Whether a finished run repeats: its command once more in another folder, and what then differs, bit for bit."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxkd.checkpoints.store import Restored, load
from jaxkd.evaluate import TIMINGS
from jaxkd.runs import INCIDENTAL, Run, RunError, read_run, tell_differing

HERE = ("experiment", "workdir", "teacher_cache", "coordinator", "num_hosts", "host")
"""What a rerun does not take over: it is one process, which writes elsewhere."""


class Verdict(NamedTuple):
    """What a comparison of two runs found.

    Attributes:
        differences: One line each on metrics, checkpoints, results and the exported student; none if all are alike.
        conditions: One line each on options, data and environment that differ.
        compared: How much there was to compare.
    """

    differences: list[str]
    conditions: list[str]
    compared: str


def verify(folder: str | os.PathLike, scratch: str | os.PathLike) -> dict[Path, Verdict]:
    """Runs an experiment again, by the options that a run of it recorded, and compares what both left.

    Args:
        folder: The run's directory. Where an experiment leaves several runs below one folder, it, or one of them.
        scratch: Where the new run goes: an empty or absent folder, or one in which an earlier call was stopped.

    Returns:
        What was found, for each run by its directory.

    Raises:
        RunError: If there is no finished run of an experiment, or the new one fails.
        OSError: If a file cannot be read or written.
    """
    folder, scratch = Path(folder), Path(scratch)
    parts = _parts(folder)
    for part in parts:
        _check_finished(part)
        if scratch.resolve() in (folder.resolve(), part.folder.resolve()):
            raise RunError(f"{scratch} is the run itself: name another folder for the rerun")
    # A part may be trained under fewer seeds than were asked for, never under more.
    _rerun(max(parts, key=lambda part: part.config.get("seeds", 0)), scratch)
    return {part.folder: compare(part.folder, _counterpart(part, scratch)) for part in parts}


def compare(folder: str | os.PathLike, again: str | os.PathLike) -> Verdict:
    """Compares what two runs left, all but the times.

    Args:
        folder: A run's directory.
        again: The other one's.

    Returns:
        What was found.

    Raises:
        RunError: If there is no run, or its files are damaged.
        OSError: If a file cannot be read.
    """
    pair = read_run(folder), read_run(again)
    records = [_records(run) for run in pair]
    stages = list(dict.fromkeys((stage, seed) for stage, seed, _ in [*records[1], *records[0]]))
    rows = [_rows(run) for run in pair]
    differences = [*_records_differing(*records), *_stages_differing(pair, stages), *_rows_differing(*rows)]
    conditions = (
        tell_differing(pair[0].config, pair[1].config, but=INCIDENTAL),
        tell_differing({"data": pair[0].data}, {"data": pair[1].data}),
        tell_differing(pair[0].environment, pair[1].environment),
    )
    compared = f"{len(records[1])} records, {len(stages)} checkpoints, {len(rows[1])} rows"
    return Verdict([*differences, *_students_differing(pair)], [line for line in conditions if line], compared)


def flags(config: Mapping[str, Any]) -> list[str]:
    """The command line of an experiment's options, those in `HERE` apart.

    Args:
        config: The options, as a run recorded them.

    Returns:
        The words.

    Example:
        >>> flags({"experiment": "methods", "alpha": 0.5, "augment": False, "only": ["kd", "dist"], "workdir": "a"})
        ['--alpha=0.5', '--no-augment', '--only', 'kd', 'dist']
    """
    line: list[str] = []
    for name, value in config.items():
        option = name.replace("_", "-")
        if name in HERE:
            continue
        if isinstance(value, bool):
            line.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            line += [f"--{option}", *map(str, value)]
        else:
            line.append(f"--{option}={value}")
    return line


def _parts(folder: Path) -> list[Run]:
    """The run that lies in a folder, or those below it that one command left."""
    places = [folder] if (folder / "config.json").exists() else sorted(p.parent for p in folder.glob("*/config.json"))
    parts = [read_run(place) for place in places or [folder]]
    if any(tell_differing(parts[0].config, part.config, but=(*INCIDENTAL, "seeds")) for part in parts):
        raise RunError(f"{folder} holds several runs: name one of {', '.join(place.name for place in places)}")
    return parts


def _check_finished(run: Run) -> None:
    experiment = run.config.get("experiment")
    if not experiment:
        raise RunError(
            f"{run.folder} is no experiment's run: repeat it in another folder and call jaxkd.verify.compare on both"
        )
    if not (run.folder / "results.json").exists():
        raise RunError(
            f"{run.folder} is not finished: give its command again, python -m experiments.{experiment} with the same "
            "options, which goes on where it was stopped"
        )


def _rerun(run: Run, scratch: Path) -> None:
    name = run.config["experiment"]
    line = [sys.executable, "-m", f"experiments.{name}", *flags(run.config), "--workdir", str(scratch)]
    status = subprocess.run(line, check=False).returncode
    if status:
        raise RunError(f"the rerun of experiments.{name} failed with exit status {status}, for the reason above")


def _counterpart(part: Run, scratch: Path) -> Path:
    return scratch if (scratch / "config.json").exists() else scratch / Path(part.config["workdir"] or "").name


def _records(run: Run) -> dict[tuple[str, int, int], list[dict]]:
    """The records by stage, seed and step: one each, if all is well."""
    found: dict[tuple[str, int, int], list[dict]] = {}
    for record in run.metrics():
        found.setdefault((record["stage"], record["seed"], record["step"]), []).append(record)
    return found


def _records_differing(there: Mapping[tuple, list[dict]], here: Mapping[tuple, list[dict]]) -> Iterator[str]:
    """The first difference, in the order of the new run's training."""
    for key in [*here, *(key for key in there if key not in here)]:
        theirs, ours = there.get(key, []), here.get(key, [])
        if theirs != ours:
            told = f"{len(theirs)} records there and {len(ours)} here"
            if len(theirs) == len(ours):
                told = next(filter(None, map(tell_differing, theirs, ours)), "a value that is missing")
            yield "metrics: first at stage {}, seed {}, step {}: ".format(*key) + told
            return


def _stages_differing(pair: tuple[Run, Run], stages: Sequence[tuple[str, int]]) -> Iterator[str]:
    """The first final checkpoint that differs, and how many do."""
    found = []
    for stage, seed in stages:
        if told := _checkpoints_differing(*(load(run.checkpoints(seed, stage)) for run in pair)):
            found.append(f"stage {stage}, seed {seed}, {told}")
    if found:
        yield f"checkpoints: {len(found)} of {len(stages)} differ, first {found[0]}"


def _checkpoints_differing(there: Restored | None, here: Restored | None) -> str:
    if there is None or here is None:
        return f"of which there is no sound one {'there' if there is None else 'here'}"
    if there.step != here.step:
        return f"step {there.step} there and {here.step} here"
    leaves, others = _named(there.tree), _named(here.tree)
    names = [*leaves, *(name for name in others if name not in leaves)]
    found = [f"{name} {told}" for name in names if (told := _tensors_differing(leaves.get(name), others.get(name)))]
    return f"step {here.step}: {len(found)} of {len(names)} tensors, first {found[0]}" if found else ""


def _named(tree: Any) -> dict[str, np.ndarray]:
    """Leaves by their paths, the parameters first: the optimizer's state says less."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return dict(sorted(named.items(), key=lambda item: not item[0].startswith("params/")))


def _tensors_differing(there: np.ndarray | None, here: np.ndarray | None) -> str:
    if there is None or here is None:
        return f"which is missing {'there' if there is None else 'here'}"
    if (there.dtype, there.shape) != (here.dtype, here.shape):
        return f"which is {there.dtype}{list(there.shape)} there and {here.dtype}{list(here.shape)} here"
    bits = (np.ascontiguousarray(x).reshape(-1, 1).view(np.uint8) for x in (there, here))
    differing = np.not_equal(*bits).any(1).reshape(there.shape)
    if not differing.any():
        return ""
    distance = np.abs(there[differing].astype(np.float64) - here[differing].astype(np.float64)).max()
    return f"in {differing.sum():,} of {differing.size:,} elements, by up to {distance:.3g}"


def _rows(run: Run) -> dict[str, dict]:
    """The rows of results by name, without what no rerun repeats."""
    path = run.folder / "results.json"
    try:
        rows = json.loads(path.read_text())
        return {row["name"]: {key: row[key] for key in row if key not in TIMINGS} for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}): restore it") from error


def _rows_differing(there: Mapping[str, dict], here: Mapping[str, dict]) -> Iterator[str]:
    names = [*there, *(name for name in here if name not in there)]
    found = [name for name in names if there.get(name) != here.get(name)]
    if found:
        told = tell_differing(there.get(found[0], {}), here.get(found[0], {}))
        yield f"results: {len(found)} of {len(names)} rows differ, first {found[0]}: {told}"


def _students_differing(pair: tuple[Run, Run]) -> Iterator[str]:
    paths = [run.folder / "student.safetensors" for run in pair]
    there, here = (path.read_bytes() if path.exists() else None for path in paths)
    if there != here:
        missing = "there" if there is None else "here" if here is None else ""
        yield "student.safetensors " + (f"is missing {missing}" if missing else "differs")
