"""Download of pretrained models from the Hugging Face hub, by names that begin with `hub:`."""

import hashlib
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jaxkd._messages import shorten
from jaxkd.data.errors import DataError, import_or_raise, one_line
from jaxkd.weights.bert_configs import CONFIG
from jaxkd.weights.files import ADAPTER_FILES, HUB_FILES

PREFIX = "hub:"
"""What a name of the hub begins with. No other name is ever downloaded."""

_NAME = re.compile(r"hub:(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.][\w./-]*))?")
_SMALL_FILES = (
    CONFIG, "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt",
    # Which are refused, so that weights without them are not taken for the model.
    *ADAPTER_FILES,
)  # fmt: skip
# Seconds to wait for the hub before the cache is used.
_TIMEOUT = 10
_SHA256 = re.compile(r"[0-9a-f]{64}")


class HubSource(NamedTuple):
    """The files of the hub that a model was loaded from.

    Attributes:
        repository: `owner/name`.
        revision: The hash of the commit.
        sha256: The checksum of each file that was used, by its name.
    """

    repository: str
    revision: str
    sha256: dict[str, str]


def is_hub_name(name: str | os.PathLike[str]) -> bool:
    """True if a name stands for a model of the hub."""
    return os.fspath(name).startswith(PREFIX)


def download(name: str) -> tuple[Path, HubSource]:
    """Downloads the files of a model that `load_bert` reads, unless they are in the cache.

    Without a network, the cached files are used, and a warning says so. The cache is that of
    `huggingface_hub`, and so are its variables, such as `HF_HOME`, `HF_ENDPOINT` and
    `HF_HUB_OFFLINE`.

    Args:
        name: `hub:owner/name` or `hub:owner/name@revision`; a revision is a branch, a tag or the
            hash of a commit.

    Returns:
        The folder with the files, and where they come from.

    Raises:
        DataError: If there is no such model or revision, it lacks a configuration or weights, a
            cached file is damaged, or neither the hub nor the cache has it.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise DataError(
            f"{shorten(name, 80)} is no name of the hub: write hub:owner/name or "
            "hub:owner/name@revision"
        )
    repository, revision = match["repository"], match["revision"] or "main"
    folder = _fetch(repository, revision)
    files = _choose_files(repository, os.listdir(folder))
    checksums = {file: _hash_file(folder / file) for file in files}
    return folder, HubSource(repository, folder.name, checksums)


def _fetch(repository: str, revision: str) -> Path:
    """Returns the folder of a revision in the cache, after the download of what it lacks."""
    library = import_or_raise("huggingface_hub")
    errors = import_or_raise("huggingface_hub.errors")
    try:
        # Not list_repo_files, which tries for half a minute where there is no network.
        info = library.HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT)
        files = _choose_files(repository, [file.rfilename for file in info.siblings or ()])
        return Path(library.snapshot_download(repository, revision=revision, allow_patterns=files))
    except DataError:
        raise
    except errors.RevisionNotFoundError as error:
        raise DataError(
            f"{PREFIX}{repository} has no revision {shorten(revision, 60)}: give a branch, a tag "
            "or the hash of a commit"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"the hub has no model {shorten(repository, 80)}, or it is private or gated: check the "
            "name, or log in by `hf auth login`"
        ) from error
    # Without a network, versions of the library raise errors of many types.
    except Exception as error:
        return _find_cached(library, repository, revision, error)


def _find_cached(library: Any, repository: str, revision: str, error: Exception) -> Path:
    """Returns the folder of a revision in the cache, and warns that the hub was not asked."""
    config = library.try_to_load_from_cache(repository, CONFIG, revision=revision)
    reason = shorten(one_line(error), 70)
    # The library returns an object of its own for a file that the hub does not have.
    if not isinstance(config, str):
        raise DataError(
            f"{shorten(repository, 80)} is not in the cache and cannot be downloaded ({reason}): "
            "go online, or give a folder that `hf download "
            f"{shorten(repository, 60)} --local-dir FOLDER` made elsewhere"
        ) from error
    folder = Path(config).parent
    warnings.warn(
        f"the hub cannot be asked for {repository} ({reason}): its revision {folder.name[:12]} "
        "from the cache is used",
        stacklevel=6,
    )
    return folder


def _choose_files(repository: str, names: Iterable[str]) -> list[str]:
    """Chooses the files that `load_bert` reads of those in a repository or a folder."""
    names = {*names}
    weights = next((file for file in HUB_FILES if file in names), None)
    if CONFIG not in names or weights is None:
        lacking = CONFIG if CONFIG not in names else f"{HUB_FILES[0]} or {HUB_FILES[2]}"
        raise DataError(
            f"{PREFIX}{repository} has no {lacking}: choose a model of transformers with weights "
            "for PyTorch, or go online if its download was interrupted"
        )
    chosen = {weights, *names.intersection(_SMALL_FILES)}
    if weights.endswith(".index.json"):
        stem, _, suffix = weights.removesuffix(".index.json").rpartition(".")
        shard = re.compile(rf"{re.escape(stem)}-\d+-of-\d+\.{suffix}")
        chosen |= {name for name in names if shard.fullmatch(name)}
    return sorted(chosen)


def _hash_file(file: Path) -> str:
    """Returns the sha256 of a file, after a check against its name in the cache.

    Raises:
        DataError: If they differ. The cache calls large files by their sha256.
    """
    try:
        with file.open("rb") as content:
            checksum = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {file} ({one_line(error)}): download it again") from error
    expected = file.resolve().name
    if _SHA256.fullmatch(expected) and checksum != expected:
        raise DataError(f"{file} is damaged: delete {file.resolve()} and load the model again")
    return checksum
