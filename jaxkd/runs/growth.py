"""Growth of a run: other configurations, and the trainings of earlier ones that are set aside.

`checkpoints/seed0/student` and `metrics.jsonl` hold a training of the run's configuration. One of
an earlier configuration lies in `checkpoints/seed0/.student.0`, a number for each, with its records
beside its checkpoints. No stage has such a name.
"""

import dataclasses
import json
import os
import re
from pathlib import Path

from jaxkd._files import delete, describe_differences, write_atomically
from jaxkd._messages import shorten
from jaxkd.runs._records import read_records
from jaxkd.runs._report_record import read_record
from jaxkd.runs.run import IGNORED_OPTIONS, UNTRAINED_OPTIONS, Run, read_run

Training = tuple[int, str]
"""A seed and the name of a stage."""


def describe_growth(run: Run) -> str:
    """Describes the options of an earlier configuration on which trainings may depend.

    Returns:
        One line, or an empty string if nothing but the `UNTRAINED_OPTIONS` has changed.
    """
    for earlier in run.history:
        if change := describe_differences(earlier["config"], run.config, ignore=UNTRAINED_OPTIONS):
            return change
    return ""


def find_settings_of_results(run: Run) -> Run | None:
    """Finds the configuration with which the results of a run were made.

    While a run is growing, `config.json` has that of the trainings, and the report that of the
    results.

    Returns:
        The run with the configuration and environment of its results; `None` if no file tells them.

    Raises:
        RunError: If `report.json` is damaged.
    """
    if not run.is_growing:
        return run
    record = read_record(run.folder)
    if record is None:
        return None
    now = {"config": run.config, "environment": run.environment}
    for settings in (now, *reversed(run.history)):
        texts = {name: str(value) for name, value in settings["config"].items()}
        if not describe_differences(texts, record.settings, ignore=IGNORED_OPTIONS):
            config, environment = settings["config"], settings["environment"]
            return dataclasses.replace(run, config=config, environment=environment)
    return None


def describe_unfinished(run: Run) -> str:
    """Describes a run whose results and student are older than its configuration, if it is one."""
    if not run.is_growing or not (run.folder / "results.json").exists():
        return ""
    before = find_settings_of_results(run) or run
    changes = describe_differences(before.config, run.config, ignore=IGNORED_OPTIONS)
    return (
        f"{shorten(run.folder, 80)} goes on{f' ({changes})' if changes else ''} and is not "
        "finished: its results and its student are those before"
    )


def record_growth(run: Run, *, trains: bool) -> None:
    """Writes another configuration into `config.json`, and the earlier one into its history.

    Until `Run.write_results`, `config.json` then says that the run is growing.

    Args:
        run: The run.
        trains: Whether anything is trained.
    """
    recorded = read_run(run.folder)
    is_finished = (run.folder / "results.json").exists() and not recorded.is_growing
    if recorded.describe_changes(run.config) or (trains and is_finished):
        run.write_config(is_growing=True)


def find_trainings(run: Run) -> list[Training]:
    """Returns the trainings with checkpoints, those that are set aside included."""
    found = set()
    for folder in (run.folder / "checkpoints").glob("seed*/*"):
        seed = folder.parent.name.removeprefix("seed")
        stage = re.sub(r"^\.(.*)\.[0-9]+$", r"\1", folder.name)
        if seed.isdecimal() and folder.is_dir():
            found.add((int(seed), stage))
    return sorted(found)


def set_aside(run: Run, seed: int, stage: str) -> None:
    """Moves a training's checkpoints and records to those of earlier configurations.

    A process that is killed in between leaves the training where it was, or records that the next
    start of the stage removes.
    """
    run.check_folder()
    folder = run.checkpoint_folder(seed, stage)
    records = [r for r in run.metrics() if (r["seed"], r["stage"]) == (seed, stage)]
    if not records and not folder.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(folder / "metrics.jsonl", text.encode())
    numbers = [int(path.name.rpartition(".")[2]) for path in find_set_aside(run, seed, stage)]
    os.rename(folder, folder.with_name(f".{stage}.{max(numbers, default=-1) + 1}"))
    # Every record, also one of step 0.
    run.rewind_metrics(seed, stage, -1, repeat=False)


def find_set_aside(run: Run, seed: int, stage: str) -> list[Path]:
    """Returns the folders of earlier configurations of a training, the newest first."""
    parent = run.checkpoint_folder(seed, stage).parent
    numbers = {}
    for path in parent.glob(f".{stage}.*"):
        number = path.name.removeprefix(f".{stage}.")
        if number.isdecimal():
            numbers[path] = int(number)
    return sorted(numbers, key=lambda path: numbers[path], reverse=True)


def take_back(run: Run, seed: int, stage: str, aside: Path) -> None:
    """Moves a training of an earlier configuration back, and sets aside what is in its place.

    The records come first: a process that is killed in between does so again.
    """
    set_aside(run, seed, stage)
    run.rewind_metrics(seed, stage, -1, repeat=False)
    for record in read_records(aside / "metrics.jsonl"):
        run.append_metrics(record, log=False)
    os.rename(aside, run.checkpoint_folder(seed, stage))


def delete_set_aside(run: Run, seed: int, stage: str) -> None:
    """Deletes the earlier configurations of a training."""
    for folder in find_set_aside(run, seed, stage):
        delete(folder)
