import shlex
import sys
import time
import types
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from jaxkd import data
from jaxkd.data import tfds_prepare

pytestmark = pytest.mark.usefixtures("no_download")

COMMAND = (
    "pip install tensorflow tensorflow-datasets importlib_resources && "
    """python -c "import tensorflow_datasets as tfds; tfds.builder('cifar100', data_dir='{}')"""
    """.download_and_prepare(file_format='array_record')\""""
)


def test_missing_tensorflow_is_named_with_the_command(pretend_tensorflow, tmp_path):
    pretend_tensorflow(installed=False)
    with pytest.raises(
        data.DataError, match=r"needs TensorFlow \(not installed\) and a network: on a machine"
    ) as caught:
        data.load("cifar100", tmp_path)
    assert str(caught.value).startswith(f"cifar100 is not in {tmp_path}, and preparing it needs ")
    assert str(caught.value).endswith(COMMAND.format(tmp_path))
    assert "\n" not in str(caught.value)


def test_missing_tensorflow_fails_at_once_and_writes_nothing(pretend_tensorflow, tmp_path):
    pretend_tensorflow(installed=False)
    start = time.monotonic()
    with pytest.raises(data.DataError, match="cifar100 is not in"):
        data.load("cifar100", tmp_path)
    assert time.monotonic() - start < 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cifar10:3.0.2", "cifar10/3.0.2", "mnist_corrupted/fog:1.0.0"])
def test_command_writes_names_as_tfds_reads_them(name):
    assert "'cifar10:3.0.2'" in tfds_prepare.prepare_command("cifar10/3.0.2", Path("/d"))
    assert tfds_prepare.tfds_name(name) == name.replace("/3.0.2", ":3.0.2")


@pytest.mark.parametrize("folder", ["/plain", "/with space", "/with $dollar", '/with "quotes"'])
def test_command_survives_the_shell(folder):
    code = shlex.split(tfds_prepare.prepare_command("cifar10", Path(folder)))[-1]
    calls = []
    builder = types.SimpleNamespace(
        download_and_prepare=lambda file_format: calls.append(file_format)
    )
    fake_tfds = types.SimpleNamespace(
        builder=lambda name, data_dir: calls.extend([name, data_dir]) or builder
    )
    exec(code.replace("import tensorflow_datasets as tfds; ", ""), {"tfds": fake_tfds})
    assert calls == ["cifar10", folder, "array_record"]


def test_failure_of_preparing_is_one_line(pretend_tensorflow, monkeypatch, tmp_path):
    def fail(name, data_dir):
        raise RuntimeError(f"no {name}\nno space left\n" + "x" * 1000)

    pretend_tensorflow(installed=True)
    monkeypatch.setattr(tfds_prepare, "import_tensorflow", lambda: None)
    monkeypatch.setattr(tfds, "builder", fail)
    with pytest.raises(
        data.DataError,
        match=r"^cannot prepare cifar100/3.0.2 in .* \(no cifar100:3.0.2 no space left .*check",
    ) as caught:
        data.load("cifar100/3.0.2", tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


def test_failing_download_is_one_line(pretend_tensorflow, monkeypatch, tmp_path):
    def download_and_prepare(file_format):
        raise ConnectionError("cannot connect to the server")

    builder = types.SimpleNamespace(download_and_prepare=download_and_prepare)
    pretend_tensorflow(installed=True)
    monkeypatch.setattr(tfds_prepare, "import_tensorflow", lambda: None)
    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: builder)
    with pytest.raises(
        data.DataError,
        match=r"^cannot prepare cifar100 in .* \(cannot connect to the server\): check the network",
    ):
        data.load("cifar100", tmp_path)


def test_tensorflow_leaves_accelerators_to_jax(monkeypatch):
    hidden = []

    def set_visible_devices(devices, kind):
        hidden.append((devices, kind))
        raise RuntimeError("devices cannot be changed any more")

    config = types.SimpleNamespace(set_visible_devices=set_visible_devices)
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(config=config))
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")
    tfds_prepare.import_tensorflow()
    assert hidden == [([], "GPU"), ([], "TPU")]
