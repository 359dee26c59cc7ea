"""The command line of an experiment: options that check themselves, and errors of one line."""

import itertools
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tyro

from experiments.common.checks import (
    OptionError,
    check_writable,
    require,
    select_names,
)
from jaxkd import distill
from jaxkd.cli import errors
from jaxkd.cli.help import join_help_lines
from jaxkd.cli.limits import check_limits
from jaxkd.cli.start import keep_compiled_programs, keep_freed_memory, print_any_text
from jaxkd.data import DataError
from jaxkd.distill.distributed import CONNECTION_SECONDS
from jaxkd.runs import RunError, enable_determinism

__all__ = ["OptionError", "check_writable", "require", "run", "select_names"]

Config = TypeVar("Config")


def run(
    main: Callable[[Config], None],
    config: type[Config],
    description: str | None,
    *,
    resumes: bool = True,
    recipes: Mapping[str, Config] | None = None,
) -> None:
    """Parses the command line and runs an experiment.

    An expected error ends in one line and exit status 1, Ctrl-C in a line and exit status 130.

    Args:
        main: The experiment, a function of its options.
        config: The frozen dataclass of its options.
        description: The text of `--help` above the options. A line "Time: ..." in it is printed at
            the start.
        resumes: Whether the same command resumes a stopped experiment.
        recipes: The options that `--recipe NAME` chooses, by name; other options of the command
            line replace them. The first one is the default.
    """
    with errors.end_without_reader():
        _run(main, config, description, resumes=resumes, recipes=recipes or {})


def _run(
    main: Callable[[Config], None],
    config: type[Config],
    description: str | None,
    *,
    resumes: bool,
    recipes: Mapping[str, Config],
) -> None:
    join_help_lines(config)
    if description is not None and {"-h", "--help"} & {*sys.argv[1:]}:
        # tyro would print each paragraph as one long line.
        print(_wrap(description), end="\n\n")
        description = ""
    errors.check_arguments(sys.argv[1:])
    recipe = _read_recipe(sys.argv[1:], recipes)
    options = errors.parse(
        lambda: tyro.cli(config, prog=_command(), description=description, default=recipe)
    )
    warnings.showwarning = errors.show_warning
    print_any_text()
    keep_freed_memory()
    print(_describe_start(description, is_default=options == config()), flush=True)
    try:
        with errors.errors_in_one_line(OptionError, DataError, RunError):
            check_limits(options, require)
            if getattr(options, "deterministic", False):
                enable_determinism()
            keep_compiled_programs()
            _connect_processes(options)
            with distill.share_fate():
                main(options)
    except KeyboardInterrupt:
        hint = "; the same command resumes from the newest checkpoint" if resumes else ""
        print(f"\nstopped{hint}", file=sys.stderr)
        sys.exit(130)


def _read_recipe(arguments: Sequence[str], recipes: Mapping[str, Config]) -> Config | None:
    """Returns the options of the recipe that arguments name, before the others are read."""
    name = None
    for argument, following in itertools.pairwise([*arguments, ""]):
        if argument == "--recipe":
            name = following
        elif argument.startswith("--recipe="):
            name = argument.removeprefix("--recipe=")
    # The parser refuses an unknown name.
    return recipes.get(name) if name else None


def _wrap(description: str) -> str:
    """Wraps the paragraphs of a description to the width of the terminal."""
    width = min(shutil.get_terminal_size().columns, 100)
    paragraphs = (" ".join(paragraph.split()) for paragraph in description.split("\n\n"))
    return "\n\n".join(
        textwrap.fill(paragraph, width, break_long_words=False, break_on_hyphens=False)
        for paragraph in paragraphs
    )


def _command() -> str:
    """Returns the command that started this process, as `--help` shows it."""
    spec = sys.modules["__main__"].__spec__
    # A script that was not started by `python -m` has no spec.
    return f"python -m {spec.name}" if spec else f"python {sys.argv[0]}"


def _describe_start(description: str | None, *, is_default: bool) -> str:
    """Returns the first line of output: the command and how long it is expected to take."""
    time = re.search(r"^Time: (.*(?:\n.+)*)", description or "", re.M)
    if time is None:
        return _command()
    duration = " ".join(time[1].split())
    options = "" if is_default else " with its default options"
    return f"{_command()}: takes {duration}{options}"


def _connect_processes(options: Any) -> None:
    """Connects the processes of several hosts, if the options name a coordinator."""
    coordinator = getattr(options, "coordinator", "")
    if not coordinator:
        for name in ("num_processes", "process_id"):
            # Otherwise every host would train alone, into the same folder.
            require(
                getattr(options, name, None) is None,
                f"--{name.replace('_', '-')}: needs --coordinator, the first process's address",
            )
        return
    if coordinator != "auto":
        _check_coordinator(coordinator, options.num_processes, options.process_id)
    minutes = CONNECTION_SECONDS // 60
    print(f"waiting up to {minutes} minutes for all processes at {coordinator}", flush=True)
    distill.initialize_distributed(
        coordinator, num_processes=options.num_processes, process_id=options.process_id
    )


def _check_coordinator(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Checks the options of several processes, which would wait for each other in vain."""
    if num_processes is None or process_id is None:
        raise OptionError(f"--coordinator {coordinator}: needs --num-processes and --process-id")
    require(num_processes >= 1, f"--num-processes {num_processes}: needs at least 1")
    require(
        0 <= process_id < num_processes,
        f"--process-id {process_id}: must be from 0 to {num_processes - 1}, below --num-processes",
    )
    address = re.fullmatch(r".+:([0-9]{1,5})", coordinator)
    require(
        address is not None and int(address[1]) < 2**16,
        f"--coordinator {coordinator}: must be address:port, such as 10.0.0.1:1234",
    )
