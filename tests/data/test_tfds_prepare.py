import http.server
import socket
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from jaxkd import data
from jaxkd.data import tfds_folder, tfds_prepare

COMMAND = (
    "pip install tensorflow tensorflow-datasets importlib_resources && "
    """python -c "import tensorflow_datasets as tfds; tfds.builder('cifar100', data_dir='{}')"""
    """.download_and_prepare(file_format='array_record')\""""
)


@pytest.fixture
def server():
    """A web server that answers every request with `server.status` and counts them."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.server.requests.append(self.path)
            self.send_response(self.server.status)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.status, server.requests = 200, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for variable in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)


def install_tensorflow(monkeypatch, *, present):
    find_spec = tfds_prepare.importlib.util.find_spec
    monkeypatch.setattr(
        tfds_prepare.importlib.util, "find_spec", lambda name: present if name == "tensorflow" else find_spec(name)
    )


@pytest.mark.parametrize("status", [200, 400, 404, 503])
def test_any_answer_means_online(status, server, monkeypatch):
    server.status = status
    monkeypatch.setattr(tfds_prepare, "_HOST", f"http://127.0.0.1:{server.server_port}")
    assert tfds_prepare._is_online()
    assert len(server.requests) == 1


def test_proxy_is_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(tfds_prepare, "_HOST", "http://behind-the-proxy.invalid")
    assert tfds_prepare._is_online()
    assert server.requests[0].startswith("http://behind-the-proxy.invalid")


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "nonsense://", "http://[:1"])
def test_broken_proxy_means_offline(proxy, monkeypatch):
    monkeypatch.setenv("https_proxy", proxy)
    assert not tfds_prepare._is_online()


def test_refused_connection_means_offline(monkeypatch):
    monkeypatch.setattr(tfds_prepare, "_HOST", "http://127.0.0.1:1")
    assert not tfds_prepare._is_online()


def test_silent_host_means_offline_soon(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(tfds_prepare, "_HOST", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(tfds_prepare, "_PROBE_SECONDS", 0.2)
        start = time.monotonic()
        assert not tfds_prepare._is_online()
        assert time.monotonic() - start < 1.5


def test_endless_name_lookup_means_offline_soon(monkeypatch):
    finished = threading.Event()
    monkeypatch.setattr(tfds_prepare, "_answers", lambda: finished.wait(20))
    monkeypatch.setattr(tfds_prepare, "_PROBE_SECONDS", -0.8)
    start = time.monotonic()
    assert not tfds_prepare._is_online()
    assert time.monotonic() - start < 2
    finished.set()


def test_waiting_is_bounded():
    assert tfds_prepare._PROBE_SECONDS + 1 < 5


@pytest.mark.parametrize(
    ("tensorflow", "online", "missing"),
    [
        (False, True, r"needs TensorFlow \(not installed\): on a machine"),
        (True, False, r"needs a network \(https://\S+ does not answer\): on a machine"),
        (False, False, r"needs TensorFlow \(not installed\) and a network \(https://\S+ does not answer\): on a"),
    ],
)
def test_what_is_missing_is_named(tensorflow, online, missing, monkeypatch, tmp_path):
    install_tensorflow(monkeypatch, present=tensorflow)
    monkeypatch.setattr(tfds_prepare, "_is_online", lambda: online)
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds, "builder", lambda *args, **kwargs: pytest.fail("TFDS was asked, which may take minutes"))
    with pytest.raises(data.DataError, match=missing) as caught:
        data.load("cifar100", tmp_path)
    assert str(caught.value).startswith(f"cifar100 is not in {tmp_path}, and preparing it needs ")
    assert str(caught.value).endswith(COMMAND.format(tmp_path))
    assert "\n" not in str(caught.value)


def test_fails_at_once_without_network(monkeypatch, tmp_path):
    monkeypatch.setattr(tfds_prepare, "_HOST", "http://127.0.0.1:1")
    start = time.monotonic()
    with pytest.raises(data.DataError, match="cifar100 is not in"):
        data.load("cifar100", tmp_path)
    assert time.monotonic() - start < 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cifar10:3.0.2", "cifar10/3.0.2", "mnist_corrupted/fog:1.0.0"])
def test_command_writes_names_as_tfds_reads_them(name):
    assert "'cifar10:3.0.2'" in tfds_folder.command("cifar10/3.0.2", Path("/d"))
    assert tfds_folder.tfds_name(name) == name.replace("/3.0.2", ":3.0.2")


@pytest.mark.parametrize("folder", ["/plain", "/with space", "/with $dollar", '/with "quotes"'])
def test_command_survives_the_shell(folder):
    import shlex

    code = shlex.split(tfds_folder.command("cifar10", Path(folder)))[-1]
    calls = []
    builder = types.SimpleNamespace(download_and_prepare=lambda file_format: calls.append(file_format))
    fake = types.SimpleNamespace(builder=lambda name, data_dir: calls.extend([name, data_dir]) or builder)
    exec(code.replace("import tensorflow_datasets as tfds; ", ""), {"tfds": fake})
    assert calls == ["cifar10", folder, "array_record"]


def test_failure_of_preparing_is_one_line(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    def builder(name, data_dir):
        raise RuntimeError(f"no {name}\nno space left\n" + "x" * 1000)

    install_tensorflow(monkeypatch, present=True)
    monkeypatch.setattr(tfds_prepare, "_is_online", lambda: True)
    monkeypatch.setattr(tfds_prepare, "import_tensorflow", lambda: None)
    monkeypatch.setattr(tfds, "builder", builder)
    with pytest.raises(
        data.DataError, match=r"^cannot prepare cifar100/3.0.2 in .* \(no cifar100:3.0.2 no space left x"
    ):
        data.load("cifar100/3.0.2", tmp_path)


def test_tensorflow_leaves_accelerators_alone(monkeypatch):
    hidden = []

    def set_visible_devices(devices, kind):
        hidden.append((devices, kind))
        raise RuntimeError("devices cannot be changed any more")

    config = types.SimpleNamespace(set_visible_devices=set_visible_devices)
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(config=config))
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")
    tfds_prepare.import_tensorflow()
    assert hidden == [([], "GPU"), ([], "TPU")]
