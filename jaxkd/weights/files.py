"""Where the weights of a model lie: one file, the shards of an index, or the folder of a run."""

import json
import os
import re
import stat
import warnings
from pathlib import Path
from typing import Any

from jaxkd._files import add_filename_to_errors
from jaxkd._messages import list_some, shorten
from jaxkd.weights.signatures import describe_other_file
from jaxkd.weights.unfinished import MERGE_ADVICE

RUN_FILE = "student.safetensors"
"""The file that an experiment leaves in the folder of its run."""
HUB_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The files of a hub folder, in the order in which transformers looks for them."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""The files of adapters, without which the weights beside them would be another model's."""

_URL = re.compile(r"(https?|ftp|file|s3|gs|hf):/+", re.IGNORECASE)
_WEIGHTS_NAME = re.compile(r".*\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?")
_SHARD_NAME = re.compile(r".*-\d+\.(safetensors|bin)")

# Of an index or a configuration. The largest public index has a tenth of it.
_MAX_JSON_BYTES = 32 * 2**20


def check_regular_file(path: str | os.PathLike) -> None:
    """Raises unless a path is a regular file: a FIFO or a device may never end.

    Raises:
        ValueError: If it is something else, such as a folder, a FIFO or a device, or a URL.
        OSError: If it does not exist.
    """
    # `stat` does not open the file, which would wait for the writer of a FIFO.
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        # A `Path` has already made one slash of two.
        if url := _URL.match(os.fsdecode(path)):
            address = f"{url[1]}://{os.fsdecode(path)[url.end() :]}"
            raise ValueError(
                f"{shorten(address, 150)} is a URL; nothing is downloaded: download it first, and "
                "give the path of the file"
            ) from error
        raise
    if not stat.S_ISREG(mode):
        kind = "a folder" if os.path.isdir(path) else "a FIFO, a device or a socket"
        raise ValueError(f"{os.fspath(path)} is {kind}, not a file of weights: copy it to a file")


def find_weights_file(path: str | os.PathLike) -> Path:
    """Finds the weights in the folder of a run or of a hub model.

    Args:
        path: A file, or a folder with `student.safetensors`, `model.safetensors` or
            `pytorch_model.bin`; the last two also as an index of shards.

    Returns:
        The file, which may be an index; a path to a file is returned as it is.

    Raises:
        ValueError: If the path is neither a regular file nor such a folder, or the folder has
            weights of a run and of a hub model, or adapters.
        OSError: If it does not exist.

    Warns:
        UserWarning: As `find_hub_file`.
    """
    path = Path(path)
    if not path.is_dir():
        check_regular_file(path)
        return path
    files = [path / name for name in (RUN_FILE, *HUB_FILES) if (path / name).is_file()]
    if files and files[0].name == RUN_FILE:
        if len(files) > 1:
            raise ValueError(
                f"{path} has {RUN_FILE} and {files[1].name}: give one of the two files"
            )
        return files[0]
    file = find_hub_file(path)
    if file is None:
        raise ValueError(f"{path} is a folder without weights: {_describe_remedy(path)}")
    return file


def find_hub_file(folder: Path) -> Path | None:
    """Finds the weights of a hub folder, whole or as an index of shards.

    Args:
        folder: The folder.

    Returns:
        The first of `HUB_FILES` that it has, or `None` if it has none.

    Raises:
        ValueError: If there are adapters, without which the weights would be another model's.

    Warns:
        UserWarning: If other files in it hold weights too, such as those of a second model.
    """
    adapters = [name for name in ADAPTER_FILES if (folder / name).is_file()]
    if adapters:
        raise ValueError(
            f"{folder} has adapters ({adapters[0]}): {MERGE_ADVICE}, or move them to another "
            "folder if the weights without them are meant"
        )
    files = [folder / name for name in HUB_FILES if (folder / name).is_file()]
    if not files:
        return None
    others = sorted(
        name
        for name in os.listdir(folder)
        if _WEIGHTS_NAME.fullmatch(name)
        and name != files[0].name
        # The shards of the index that is read.
        and not (files[0].suffix == ".json" and _SHARD_NAME.fullmatch(name))
    )
    if others:
        warnings.warn(
            f"{folder} has several files of weights: {files[0].name} is read and "
            f"{list_some(others)} passed over; move to another folder what is not meant",
            stacklevel=4,
        )
    return files[0]


def is_index(path: str | os.PathLike) -> bool:
    """True if a regular file begins like a JSON object, as the index of shards does."""
    # A file in /proc may be regular and yet fail, without a name in the error.
    with add_filename_to_errors(path), open(path, "rb") as file:
        return file.read(64).lstrip().startswith(b"{")


def read_index(path: str | os.PathLike) -> dict[Path, list[str]]:
    """Reads the index of weights that are divided into shards.

    Args:
        path: The index, such as `model.safetensors.index.json`.

    Returns:
        The names of the arrays in each shard, by the shard's file.

    Raises:
        ValueError: If it is no index, a shard is missing, or one lies outside the index's folder.
        OSError: If a file cannot be read.
    """
    path = Path(path)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{path} has no weight_map: it is not an index of weights; give the file of the weights"
        )
    shards: dict[Path, list[str]] = {}
    for name, shard in weight_map.items():
        if not _is_plain_name(shard):
            raise ValueError(
                f"{path} places {to_text(name)!r} in {to_text(shard)!r}: shards must be files "
                "beside it"
            )
        shards.setdefault(path.parent / shard, []).append(name)
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise ValueError(
            f"the shards {list_some(missing)} of {len(shards)} are missing beside {path}: "
            "copy them too"
        )
    return shards


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a JSON object from a regular file of at most 32 MiB.

    Raises:
        ValueError: If it is none.
        OSError: If it cannot be read.
    """
    check_regular_file(path)
    if os.path.getsize(path) > _MAX_JSON_BYTES:
        raise ValueError(f"{os.fspath(path)} has more than {_MAX_JSON_BYTES} bytes: copy it again")
    try:
        content = json.loads(Path(path).read_bytes())
    # UnicodeDecodeError and JSONDecodeError are ValueErrors.
    except (ValueError, RecursionError) as error:
        if kind := describe_other_file(path):
            raise ValueError(f"{os.fspath(path)} is {kind}") from error
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{os.fspath(path)} is not JSON ({reason}): copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{os.fspath(path)} must be a JSON object, got {type(content).__name__}: copy it again"
        )
    return content


def to_text(value: Any, *, length: int = 60) -> str:
    """Returns a value as text of at most `length` characters."""
    # Not str(value) for a container: it may be deep or long.
    text = str(value) if isinstance(value, str | float | bool | None) else type(value).__name__
    if isinstance(value, int) and value.bit_length() < 200:
        text = str(value)
    # Cut first, since the text may be long. Line breaks and escape sequences are shown as codes.
    text = text[: length + 1]
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _is_plain_name(name: Any) -> bool:
    """True for the name of a file: "../x" or "/dev/x" would read files that nobody named."""
    if not isinstance(name, str) or name in ("", ".", "..") or len(name) > 255:
        return False
    return name.isprintable() and not {*name} & {*"/\\"}


def _describe_remedy(folder: Path) -> str:
    if (folder / "metrics.jsonl").is_file():
        return f"it is a run without {RUN_FILE}; run its command to the end"
    return (
        f"looked for {RUN_FILE}, {HUB_FILES[0]} and {HUB_FILES[2]}, whole or in shards; give a "
        "file (jaxkd.runs.checkpoints.restore loads Orbax checkpoints)"
    )
