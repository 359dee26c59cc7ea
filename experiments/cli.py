"""What the experiments' command lines share: options that check themselves, errors of one line."""

import ctypes
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro

from jaxkd import parallel
from jaxkd.data import DataError
from jaxkd.runs import RunError, make_deterministic

Config = TypeVar("Config")


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of malloc.h


class OptionError(ValueError):
    """An option whose value makes no sense."""


def require(holds: bool, message: str) -> None:
    """Raises `OptionError(message)` unless a condition holds."""
    if not holds:
        raise OptionError(message)


def chosen(only: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """Of the known names those that `--only` gives, all if it gives none; raises `OptionError` for others."""
    known = tuple(known)
    unknown = sorted({*only} - {*known})
    require(not unknown, f"--only {' '.join(unknown)}: choose from {' '.join(known)}")
    return tuple(name for name in known if not only or name in only)


def run(main: Callable[[Config], None], config: type[Config], description: str | None, *, resumes: bool = True) -> None:
    """Parses the command line into a config and runs an experiment under it.

    Expected errors end in one line and exit status 1, Ctrl-C in a word on how to go on and 130.

    Args:
        main: The experiment.
        config: Its frozen dataclass of options.
        description: What `--help` says above the options.
        resumes: Whether the experiment goes on where it was stopped.
    """
    options = tyro.cli(config, prog=f"python -m experiments.{Path(sys.argv[0]).stem}", description=description)
    warnings.showwarning = _show_warning
    _keep_memory()
    try:
        if getattr(options, "deterministic", False):
            make_deterministic()
        _keep_compiled()
        _join_hosts(options)
        main(options)
    except (OptionError, DataError, RunError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        told = "stopped; the same command goes on from the newest checkpoint" if resumes else "stopped"
        print(f"\n{told}", file=sys.stderr)
        sys.exit(130)


def _keep_memory() -> None:
    """Has glibc keep the memory that a step returns, whose pages the next one would have to be given anew.

    On two cores BERT's steps take 0.6 to 0.8 of the time. MALLOC_TRIM_THRESHOLD_ in the environment says that the user
    has decided.
    """
    if not sys.platform.startswith("linux") or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        for option, value in ((_TRIM_THRESHOLD, 2**31 - 1), (_MMAP_THRESHOLD, 2**30), (_ARENA_MAX, 1)):
            mallopt(option, value)


def _keep_compiled() -> None:
    """Has JAX keep what takes it long to compile, so that it compiles once; JAX_COMPILATION_CACHE_DIR says where."""
    settings: Any = jax.config  # whose attributes older versions do not declare
    if settings.jax_compilation_cache_dir is None:
        caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        settings.update("jax_compilation_cache_dir", str(Path(caches).expanduser() / "jaxkd" / "compiled"))


def _join_hosts(options: Any) -> None:
    """Joins the hosts that the options name, if they name any."""
    coordinator = getattr(options, "coordinator", "")
    known = coordinator in ("", "auto") or (options.num_hosts is not None and options.host is not None)
    require(known, f"--coordinator {coordinator}: --num-hosts and --host are needed with it")
    if coordinator:
        parallel.join_hosts(coordinator, num_hosts=options.num_hosts, host=options.host)


def _show_warning(message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None) -> None:
    print(f"warning: {message}", file=sys.stderr)
