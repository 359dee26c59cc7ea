"""The notebook for Colab: it runs from a checkout, resumes after a disconnect, and is clean."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.thorough  # trains networks, in processes of their own

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "experiments" / "colab.ipynb"
CONTENT = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
CODE = {
    cell["id"]: "".join(cell["source"]) for cell in CONTENT["cells"] if cell["cell_type"] == "code"
}

# As in a kernel, an event loop is running, in which `asyncio.run` would raise an error.
RUNNER = """
import asyncio, json, sys

async def main(notebook, settings):
    names = {"__name__": "__main__"}
    for cell in json.load(open(notebook, encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert settings.keys() <= names.keys()
            names |= settings
    print(sys.modules["jaxkd"].__file__)

asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))
"""
IPYTHON = """
version_info = 9, 0

def get_ipython():
    return None
"""
DISPLAY = """
from pathlib import Path

def Image(filename):
    return f"{Path(filename).name} of {len(Path(filename).read_bytes())} bytes"

Markdown, display = str, print
"""
COLAB = """
from pathlib import Path

class drive:
    def mount(where):
        Path(where, "MyDrive").mkdir(parents=True, exist_ok=True)

output = None  # JAX imports it on Colab
"""
# Two devices, and no time spent on optimising programs that run for a moment.
XLA_FLAGS = (
    "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)


def pack(path):
    """Zips the checkout into one folder, as in a download."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git, which lists the files of the checkout")
    process = subprocess.run(
        [
            "git",
            "-C",
            ROOT,
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "jaxkd",
            "experiments",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    with zipfile.ZipFile(path, "w") as file:
        for name in sorted(set(process.stdout.splitlines())):
            if (ROOT / name).is_file():
                file.write(ROOT / name, f"jaxkd-main/{name}")


def make_modules(folder):
    """Writes stand-ins for the modules of Colab and IPython."""
    modules = {
        "IPython/__init__.py": IPYTHON,
        "IPython/display.py": DISPLAY,
        "google/colab.py": COLAB,
    }
    for name, source in modules.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)
    return folder


def open_session(folder, modules, settings):
    """Runs the notebook in an empty folder on two devices, and returns what it prints."""
    folder.mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(modules),
        "XLA_FLAGS": XLA_FLAGS,
        "COLUMNS": "100",
    }
    process = subprocess.run(
        [sys.executable, "-c", RUNNER, str(NOTEBOOK), json.dumps(settings)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_runs_from_a_checkout_and_resumes_after_a_disconnect(image_dir, tmp_path):
    modules = make_modules(tmp_path / "modules")
    options = (
        f"--dataset {image_dir} --image-size 16 --num-seeds 1 --epochs 1 --batch-size 16 "
        "--num-labels 9"
    )
    settings = {"DRIVE": str(tmp_path / "drive"), "OPTIONS": options, "REPOSITORY": "../upload.zip"}
    pack(tmp_path / "upload.zip")
    printed = open_session(tmp_path / "before", modules, settings)
    run = tmp_path / "drive" / "MyDrive" / "jaxkd-runs" / "first"
    files = {"report.md", "results.json", "student.safetensors", "student.jaxexport"}
    assert files <= set(os.listdir(run))
    checkout = tmp_path / "before" / "checkout" / "jaxkd-main"
    assert f"{checkout}\n" in printed
    assert printed.endswith(f"{checkout / 'jaxkd' / '__init__.py'}\n")
    assert "already installed" in printed
    assert printed.count(f"'jax': '{importlib.metadata.version('jax')}'") == 2
    assert printed.count("on validation after") == 6 and "already trained" not in printed
    assert "# Teacher, assistant, student" in printed
    assert "student_assisted is" in printed and "![" not in printed
    figures = re.findall(r"^(\w+\.png) of \d{4,} bytes", printed, re.M)
    assert figures == ["accuracy.png", "size.png", "curves.png"]
    assert re.search(r"^\d+\.\d+ \(128, 10\)$", printed, re.M), "the loss alone"
    with zipfile.ZipFile(run.with_suffix(".zip")) as file:
        assert {"config.json", "report.md"} <= set(file.namelist())
    assert json.loads((run / "config.json").read_text())["environment"]["device_count"] == 2

    printed = open_session(tmp_path / "after", modules, settings)
    assert printed.count("already trained") == 6 and "on validation after" not in printed


def execute(*names, **settings):
    """Runs some cells in this process with some settings, and returns their variables."""
    variables = {}
    exec(CODE["settings"], variables)
    assert settings.keys() <= variables.keys()
    variables |= settings
    for name in names:
        exec(compile(CODE[name], name, "exec"), variables)
    return variables


def test_stays_local_without_drive(monkeypatch):
    assert execute("drive")["workdir"] == Path("runs", "first")
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(drive="not to be mounted"))
    assert execute("drive", DRIVE="")["workdir"] == Path("runs", "first")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A tiny checkout, of which the notebook's folder is the current one."""
    script = tmp_path / "mine" / "experiments" / "teacher_assistant.py"
    script.parent.mkdir(parents=True)
    script.write_text("")
    monkeypatch.chdir(script.parent)
    return tmp_path / "mine"


def test_checkout_is_around_the_notebook_or_a_folder(checkout, tmp_path, monkeypatch):
    assert execute("drive", "checkout")["checkout"] == checkout
    monkeypatch.chdir(tmp_path)
    assert execute("drive", "checkout", REPOSITORY=str(checkout))["checkout"] == checkout


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_checkout_is_cloned_once(checkout, tmp_path, monkeypatch):
    author = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
    for arguments in (["init", "-q"], ["add", "-A"], [*author, "commit", "-q", "-m", "All"]):
        subprocess.run(["git", *arguments], cwd=checkout, check=True)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        cloned = execute("drive", "checkout", REPOSITORY=checkout.as_uri())["checkout"]
        assert cloned == tmp_path / "checkout"
        assert (cloned / "experiments" / "teacher_assistant.py").exists()


def test_missing_checkout_raises_an_error(tmp_path, monkeypatch, capfd):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no jaxkd in .*REPOSITORY"):
        execute("drive", "checkout")
    with pytest.raises(subprocess.CalledProcessError):
        execute("drive", "checkout", REPOSITORY=str(tmp_path / "nowhere"))
    assert "nowhere" in capfd.readouterr().out


def test_installation_keeps_the_version_of_jax(checkout, monkeypatch):
    commands = []
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "distributions", lambda **named: iter(()))
    monkeypatch.setattr(sys, "path", list(sys.path))
    variables = execute("drive", "checkout")
    variables["run"] = lambda *command: commands.append(command)
    exec(CODE["install"], variables)
    pinned = tuple(f"{name}=={version(name)}" for name in ("jax", "jaxlib", "flax"))
    options = ("-m", "pip", "install", "-q", "-e", f"{checkout}[experiments]")
    assert commands == [(sys.executable, *options, *pinned)] and sys.path[0] == str(checkout)
    variables["run"] = lambda *command: monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.0"
    )
    with pytest.raises(AssertionError):
        exec(CODE["install"], variables)


def test_is_a_clean_notebook():
    assert (CONTENT["nbformat"], CONTENT["nbformat_minor"]) == (4, 5)
    assert CONTENT["metadata"]["accelerator"] == "TPU"
    assert all(re.fullmatch(r"[\w-]{1,64}", cell["id"]) for cell in CONTENT["cells"])
    assert len({cell["id"] for cell in CONTENT["cells"]}) == len(CONTENT["cells"])
    for cell in CONTENT["cells"]:
        is_code = cell["cell_type"] == "code"
        code_keys = {"execution_count", "outputs"} if is_code else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | code_keys
        assert cell["cell_type"] in ("code", "markdown")
        assert not cell.get("outputs") and not cell.get("execution_count")
        assert all(line.endswith("\n") for line in cell["source"][:-1])
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert text == json.dumps(CONTENT, indent=1, ensure_ascii=False) + "\n"
    # Colab works in /content; no path of another machine may occur.
    assert set(re.findall(r"(?<![\w.}*])/[a-z]\w*", text)) == {"/content"}
    assert not re.search(r"jax\[|https?:|^[!%]", "\n".join(CODE.values()), re.M)
