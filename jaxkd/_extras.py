"""Packages that only parts of the library need, and the command that installs one."""

import contextlib
import importlib.metadata
import importlib.util
import shlex
import sys
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

from jaxkd._messages import shorten

DISTRIBUTION = "jaxkd-distill"
ROOT = Path(__file__).resolve().parents[1]
"""The clone that this package is part of, or the folder of installed packages."""


class Package(NamedTuple):
    """An optional package: the smallest extra that has it, if one has, and its name for pip."""

    extra: str | None
    distribution: str


PACKAGES = {
    "flax": Package("models", "flax"),
    "filelock": Package("train", "filelock"),
    "flatbuffers": Package("train", "flatbuffers"),
    "orbax": Package("train", "orbax-checkpoint"),
    "safetensors": Package("train", "safetensors"),
    "tabulate": Package("train", "tabulate"),
    "docstring_parser": Package("experiments", "docstring-parser"),
    "importlib_resources": Package("experiments", "importlib_resources"),
    "matplotlib": Package("experiments", "matplotlib"),
    "PIL": Package("experiments", "pillow"),
    "rich": Package("experiments", "rich"),
    "tensorflow_datasets": Package("experiments", "tensorflow-datasets"),
    "tyro": Package("experiments", "tyro"),
    "jax2onnx": Package("onnx", "jax2onnx"),
    "huggingface_hub": Package("hub", "huggingface_hub"),
    "pyarrow": Package("parquet", "pyarrow"),
    "sacrebleu": Package("text", "sacrebleu"),
    "tokenizers": Package("text", "tokenizers"),
    "tensorboardX": Package("tensorboard", "tensorboardX"),
    "wandb": Package("wandb", "wandb"),
    "tensorflow": Package(None, "tensorflow"),
}
"""The optional packages by the name under which Python imports them."""


def find_package(module: str | None) -> Package | None:
    """Returns the package of an extra that has a module, such as `PIL.Image`."""
    return PACKAGES.get((module or "").partition(".")[0])


def install_command(extra: str | None, distribution: str) -> str:
    """Returns the command that installs the packages of an extra, or one that is in no extra.

    In a clone, that is the clone with the extra, because an index need not have this project. For
    an installed wheel, pip takes the wheel that is there. Without either, as for a copied folder,
    the command installs one package.

    Args:
        extra: The extra, if there is one.
        distribution: The package that is missing, by its name for pip.
    """
    if extra is not None and _is_clone(ROOT):
        folder = "." if Path.cwd() == ROOT else str(ROOT)
        return f"pip install -e {shlex.quote(f'{folder}[{extra}]')}"
    if extra is not None and _is_installed():
        return f"pip install {shlex.quote(f'{DISTRIBUTION}[{extra}]')}"
    return f"pip install {distribution}"


def describe_missing(error: ImportError, extra: str | None = None) -> str:
    """Describes in one line a package that cannot be imported, with the command that installs it.

    Args:
        error: The error of the import.
        extra: The extra to install if the package is in none itself, because one of the extra
            needs it. Without it, the error of an unknown package is returned as it is: no command
            of this project would mend it. An error that names no module is of the package that
            raised it, which is there but does not work.
    """
    reason = shorten(error, 120)
    if error.name is None and extra is not None and "install" not in str(error):
        package = _find_importing_package(error) or "a package"
        return f"{package} cannot be imported ({reason}): reinstall it, and what it needs"
    package = find_package(error.name)
    if package is None and extra is not None:
        package = Package(extra, error.name or "PACKAGE")
    if package is None or error.name is None or "pip install" in str(error):
        return shorten(error)
    if error.name in sys.stdlib_module_names:
        command = "use a Python that was built with it"
    else:
        command = install_command(*package)
    return f"this needs {error.name}, which cannot be imported ({reason}): {command}"


@contextlib.contextmanager
def add_install_command(extra: str = "train") -> Generator[None]:
    """Adds to an `ImportError` the command that installs the missing package.

    Args:
        extra: The extra to install for a package that is in none itself, but that one of this extra
            needs.

    Raises:
        ImportError: If the block raises one. The message has one line.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(describe_missing(error, extra), name=error.name) from error


def require_installed(*packages: str) -> None:
    """Checks that packages are installed, without importing them.

    Call it before work that would be lost if an import failed at its end.

    Args:
        *packages: Names of top-level packages.

    Raises:
        ImportError: If one is missing. The message names the command that installs the first.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        error = ModuleNotFoundError(f"not installed: {', '.join(missing)}", name=missing[0])
        raise ImportError(describe_missing(error), name=missing[0]) from None


def _find_importing_package(error: ImportError) -> str | None:
    """Returns the package whose code raised an error, unless it is this one or Python's own."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__") if frames else None
    package = str(module or "").partition(".")[0]
    is_other = package not in ("", "__main__", "jaxkd", *sys.stdlib_module_names)
    return package if is_other else None


def _is_clone(folder: Path) -> bool:
    """True if the folder has the project file of this project."""
    try:
        return f'name = "{DISTRIBUTION}"' in (folder / "pyproject.toml").read_text("utf-8")
    except (OSError, ValueError):
        return False


def _is_installed() -> bool:
    try:
        importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
