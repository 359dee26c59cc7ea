"""The command line of an experiment: options that check themselves, and errors of one line."""

import ctypes
import dataclasses
import os
import re
import shutil
import sys
import textwrap
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import docstring_parser
import jax
import tyro

from jaxkd import distill
from jaxkd.data import DataError
from jaxkd.runs import RunError, enable_determinism

Config = TypeVar("Config")

# Options of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_ARENA_MAX = -8


class OptionError(ValueError):
    """An invalid value of an option."""


def require(condition: bool, message: str) -> None:
    """Raises `OptionError(message)` unless the condition holds."""
    if not condition:
        raise OptionError(message)


def select_names(only: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """Returns the known names that `--only` lists, or all of them if it is empty.

    Raises:
        OptionError: If it lists an unknown name.
    """
    known = tuple(known)
    unknown = sorted({*only} - {*known})
    require(not unknown, f"--only {' '.join(unknown)}: choose from {' '.join(known)}")
    return tuple(name for name in known if not only or name in only)


def run(
    main: Callable[[Config], None],
    config: type[Config],
    description: str | None,
    *,
    resumes: bool = True,
) -> None:
    """Parses the command line and runs an experiment.

    An expected error ends in one line and exit status 1, Ctrl-C in a line and exit status 130.

    Args:
        main: The experiment, a function of its options.
        config: The frozen dataclass of its options.
        description: The text of `--help` above the options. A line "Time: ..." in it is printed at
            the start.
        resumes: Whether the same command resumes a stopped experiment.
    """
    _join_help_lines(config)
    if description is not None and {"-h", "--help"} & {*sys.argv[1:]}:
        # tyro would print each paragraph as one long line.
        print(_wrap(description), end="\n\n")
        description = ""
    options = tyro.cli(config, prog=_command(), description=description)
    warnings.showwarning = _show_warning
    _keep_freed_memory()
    print(_describe_start(description, is_default=options == config()), flush=True)
    try:
        if getattr(options, "deterministic", False):
            enable_determinism()
        _keep_compiled_programs()
        _connect_processes(options)
        main(options)
    except (OptionError, DataError, RunError, ImportError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        hint = "; the same command resumes from the newest checkpoint" if resumes else ""
        print(f"\nstopped{hint}", file=sys.stderr)
        sys.exit(130)


def _join_help_lines(config: type) -> None:
    """Makes one line of each option's docstring, which tyro would break where the source does."""
    helps: dict[str, str] = {}
    # A class comes after its bases, because its own docstring of an option counts.
    for base in reversed(config.__mro__[:-1]):
        for option in docstring_parser.parse_from_object(base).params:
            helps[option.arg_name] = " ".join((option.description or "").split())
    for field in dataclasses.fields(config):
        if field.name in helps:
            help_text = {"help": helps[field.name]}
            field.metadata = types.MappingProxyType({**field.metadata, **help_text})


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


def _keep_freed_memory() -> None:
    """Lets glibc keep the memory that a step frees, so that the next step need not fault it in.

    On two cores, BERT's steps take 0.6 to 0.8 of the time. Nothing is changed if the environment
    sets MALLOC_TRIM_THRESHOLD_.
    """
    if not sys.platform.startswith("linux") or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return
    # Other C libraries have no mallopt.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_THRESHOLD, 2**30)
        mallopt(_ARENA_MAX, 1)


def _keep_compiled_programs() -> None:
    """Keeps compiled programs on disk, in a user cache unless JAX_COMPILATION_CACHE_DIR is set."""
    settings: Any = jax.config  # older versions do not declare the attribute
    if settings.jax_compilation_cache_dir is None:
        caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = Path(caches).expanduser() / "jaxkd" / "compiled"
        settings.update("jax_compilation_cache_dir", str(folder))


def _connect_processes(options: Any) -> None:
    """Connects the processes of several hosts, if the options name a coordinator."""
    coordinator = getattr(options, "coordinator", "")
    if not coordinator:
        return
    is_complete = options.num_processes is not None and options.process_id is not None
    require(
        coordinator == "auto" or is_complete,
        f"--coordinator {coordinator}: needs --num-processes and --process-id",
    )
    distill.initialize_distributed(
        coordinator, num_processes=options.num_processes, process_id=options.process_id
    )


def _show_warning(
    message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None
) -> None:
    print(f"warning: {message}", file=sys.stderr)
