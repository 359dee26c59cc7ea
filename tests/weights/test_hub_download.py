"""Models by the name `hub:owner/name`, from a server on the loopback that plays the hub."""

import hashlib
import http.server
import json
import threading
import urllib.parse

import pytest

from jaxkd.data import DataError
from jaxkd.weights import hub
from jaxkd.weights.hub_download import download

constants = pytest.importorskip("huggingface_hub.constants")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "bert"}',
    "vocab.txt": b"[PAD]",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"the same weights",
    "tf_model.h5": b"other weights",
    "onnx/model.onnx": b"a program",
    "README.md": b"# A model",
}


def etag(name, content):
    """Returns what the hub calls a file: large ones by their sha256, small ones by git's sha1."""
    if name.endswith((".json", ".txt", ".md")):
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return hashlib.sha256(content).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers the requests of `huggingface_hub` for the model owner/name."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def reply(self, content, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def reply_json(self, value, status=200, **headers):
        self.reply(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.server.requests.append(path)
        files = self.server.files
        if "owner/name" not in path:
            self.reply_json({"error": "no"}, 404, X_Error_Code="RepoNotFound")
        elif path.startswith("/api/") and path.rpartition("/")[2] not in ("main", "v1", COMMIT):
            self.reply_json({"error": "no"}, 404, X_Error_Code="RevisionNotFound")
        elif path.startswith("/api/models/owner/name/tree/"):
            self.reply_json([describe(name, content) for name, content in files.items()])
        elif path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in files]
            self.reply_json({"id": "owner/name", "sha": COMMIT, "siblings": siblings})
        else:
            name = path.partition(f"/resolve/{COMMIT}/")[2] or path.partition("/resolve/main/")[2]
            content = files[name]
            self.reply(content, X_Repo_Commit=COMMIT, ETag=f'"{etag(name, content)}"')

    do_HEAD = do_GET


def describe(name, content):
    return {"type": "file", "path": name, "size": len(content), "oid": etag(name, content)}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Starts the server, and points the library to it and to an empty cache."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.files, server.requests = dict(FILES), []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("revision", ["", "@main", "@v1", f"@{COMMIT}"])
def test_only_the_files_of_the_model_are_downloaded(server, revision):
    folder, source = download(f"hub:owner/name{revision}")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocab.txt",
    ]
    assert source.repository == "owner/name" and source.revision == COMMIT
    assert source.sha256 == {
        path.name: hashlib.sha256(FILES[path.name]).hexdigest() for path in folder.iterdir()
    }


def test_shards_are_downloaded_with_their_index(server):
    del server.files["model.safetensors"]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "model.safetensors.index.json"
    server.files |= dict.fromkeys([*shards, index, "other-00001-of-00002.safetensors"], b"{}")
    assert [*download("hub:owner/name")[1].sha256] == [
        "config.json",
        *shards,
        index,
        "vocab.txt",
    ]


def test_without_a_network_the_cache_is_used_and_named(server, monkeypatch):
    folder, source = download("hub:owner/name")
    # A closed port.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = f"hub cannot be asked for owner/name .*its revision {COMMIT[:12]} from the cache is"
    with pytest.warns(UserWarning, match=message):
        assert download("hub:owner/name") == (folder, source)
    with pytest.raises(DataError, match="owner/another is not in the cache and cannot be down"):
        download("hub:owner/another")


def test_offline_mode_asks_nobody(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="go online, or give a folder that `hf download") as error:
        hub.find_hub_folder("hub:owner/name")
    assert not server.requests
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300


def test_a_damaged_file_of_the_cache_is_found(server):
    folder, _ = download("hub:owner/name")
    (folder / "model.safetensors").resolve().write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"model.safetensors is damaged: delete .* and load the"):
        download("hub:owner/name")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hub:name", "hub:name is no name of the hub: write hub:owner/name or hub:owner/name@rev"),
        ("hub:owner/name@", "is no name of the hub"),
        ("hub:../name/x", "is no name of the hub"),
        ("hub:owner/gone", "the hub has no model owner/gone, or it is private or gated: check the"),
        ("hub:owner/name@gone", "hub:owner/name has no revision gone: give a branch, a tag or"),
    ],
)
def test_names_that_the_hub_does_not_have(server, name, message):
    with pytest.raises(DataError, match=message):
        hub.find_hub_folder(name)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "hub:owner/name has no config.json: choose a model of transformers"),
        ("model.safetensors", "has no model.safetensors or pytorch_model.bin: choose a model"),
    ],
)
def test_models_of_other_libraries(server, missing, message):
    del server.files[missing], server.files["pytorch_model.bin"]
    with pytest.raises(DataError, match=message):
        download("hub:owner/name")


def test_nothing_else_is_downloaded(server, tmp_path):
    for name in ("owner/name", "bert-base-uncased"):
        with pytest.raises(DataError, match="no folder .* or hub:owner/name to download it"):
            hub.find_hub_folder(name)
    assert not server.requests
