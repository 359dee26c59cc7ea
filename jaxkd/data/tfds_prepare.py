"""Prepares a set with TensorFlow Datasets where that can work, and says at once what is missing where it cannot."""

import contextlib
import difflib
import importlib.util
import os
import queue
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

from jaxkd.data import embedded, tfds_folder
from jaxkd.data.errors import DataError, one_line, require

_HOST = "https://storage.googleapis.com"
_PROBE_SECONDS = 3.0
_CATALOG = "https://www.tensorflow.org/datasets/catalog"


def prepare(name: str, data_dir: Path) -> Path:
    """Downloads a dataset and writes it as array_record, which is read without TensorFlow.

    Args:
        name: Name, with configuration and version if wanted.
        data_dir: The folder of all datasets.

    Returns:
        The folder of the version that was prepared.

    Raises:
        DataError: If there is no such dataset, TensorFlow or the network is missing, or preparing fails.
    """
    _check_known(name)
    _check_possible(name, data_dir)
    import_tensorflow()
    try:
        builder = require("tensorflow_datasets").builder(tfds_folder.tfds_name(name), data_dir=data_dir)
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # every dataset fails in its own way: download, checksum, manual steps, disk
        raise DataError(f"cannot prepare {name} in {data_dir} ({one_line(error)}): see {_CATALOG}") from error
    return Path(builder.data_dir)


def is_known(name: str, data_dir: Path) -> bool:
    """Tells whether TensorFlow Datasets can make or has made a dataset of this name, without a network."""
    if (data_dir / name).is_dir():
        return True
    return importlib.util.find_spec("tensorflow_datasets") is not None and name in _builders()


def import_tensorflow() -> None:
    """Imports TensorFlow quietly, and keeps it from taking the memory of the accelerator that JAX is to use."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    tensorflow = require("tensorflow")
    for kind in ("GPU", "TPU"):
        with contextlib.suppress(RuntimeError):  # the caller uses TensorFlow already and has placed it
            tensorflow.config.set_visible_devices([], kind)


def _builders() -> list[str]:
    # Community datasets are listed on a server.
    return require("tensorflow_datasets").list_builders(with_community_datasets=False)


def _check_known(name: str) -> None:
    builders = _builders()
    head = re.split("[/:]", name)[0]
    if head in builders:
        return
    close = difflib.get_close_matches(head.lower(), [embedded.NAME, *builders])
    remedy = f"did you mean {' or '.join(close)}?" if close else f"give the path of a folder or a name from {_CATALOG}"
    raise DataError(f"unknown dataset {name!r}; {remedy}")


def _check_possible(name: str, data_dir: Path) -> None:
    missing = [] if importlib.util.find_spec("tensorflow") else ["TensorFlow (not installed)"]
    # TensorFlow Datasets itself tries for minutes.
    if not _is_online():
        missing.append(f"a network ({_HOST} does not answer)")
    if missing:
        raise DataError(
            f"{name} is not in {data_dir}, and preparing it needs {' and '.join(missing)}: on a machine with both, run "
            f"{tfds_folder.command(name, data_dir)}"
        )


def _is_online() -> bool:
    """Asks in a thread, because the timeout of a request does not cover looking up the host's name."""
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(_answers()), daemon=True).start()
    try:
        return answers.get(timeout=_PROBE_SECONDS + 1)
    except queue.Empty:
        return False


def _answers() -> bool:
    try:
        # An opener of its own reads the environment's proxies now; the shared one keeps those of its first use.
        request = urllib.request.Request(_HOST, method="HEAD")
        urllib.request.build_opener().open(request, timeout=_PROBE_SECONDS).close()
        return True
    except urllib.error.HTTPError:
        return True  # the host is there, if with nothing at its root
    except Exception:  # no route, no name, a broken proxy or its address: all the same here
        return False
