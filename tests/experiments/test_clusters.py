"""The scripts for clusters: their syntax, their commands, and the variables that JAX reads."""

import importlib
import inspect
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import jax
import pytest
import tyro
from jax._src import clusters, distributed
from jax._src.clusters import cloud_tpu_cluster

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "experiments" / "tools"
SCRIPTS = sorted(TOOLS.glob("*.sh"))
PAGE = (ROOT / "docs" / "guides" / "clusters.md").read_text(encoding="utf-8")
JOBSET = yaml.safe_load((TOOLS / "gke_jobset.yaml").read_text(encoding="utf-8"))
(JOB,) = (job["template"]["spec"] for job in JOBSET["spec"]["replicatedJobs"])
(CONTAINER,) = JOB["template"]["spec"]["containers"]
# Options for the experiment, in place of those that a user gives to the script.
USER_OPTIONS = ["--num-seeds", "5"]


def parse(words):
    """Parses a command `python -m experiments.NAME OPTIONS` by the experiment's own options."""
    assert words[:2] == ["python", "-m"]
    return tyro.cli(importlib.import_module(words[2]).Config, args=words[3:])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_command_of_a_script_has_options_of_the_experiment(script):
    lines = script.read_text(encoding="utf-8").splitlines()
    commands = [re.search(r"python -m experiments[^#]*", line) for line in lines]
    (command,) = (match[0] for match in commands if match)
    # The last word is for the options of the user; the quote is that of a command on other hosts.
    command = re.sub(r'\s*("\$@"|\$\*")$', "", command)
    options = parse(shlex.split(command) + USER_OPTIONS)
    assert options.coordinator == "auto" and options.num_seeds == 5


def test_slurm_starts_a_process_for_each_gpu():
    text = (TOOLS / "slurm.sh").read_text(encoding="utf-8")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "gpus-per-task" not in options
    # `sbatch` reads no option after the first command.
    assert text.rindex("#SBATCH") < text.index("set -euo pipefail")
    devices = int(options["nodes"]) * int(options["gpus-per-node"])
    assert parse(shlex.split(re.search(r"srun (.*) \"", text)[1])).batch_size % devices == 0


def test_pods_of_gke_run_an_experiment():
    options = parse(CONTAINER["command"])
    assert options.coordinator == "auto"
    (mount,) = CONTAINER["volumeMounts"]
    assert options.workdir.startswith(mount["mountPath"] + "/")
    (volume,) = JOB["template"]["spec"]["volumes"]
    assert volume["name"] == mount["name"]


def test_pods_of_gke_are_the_hosts_of_the_slice():
    topology = JOB["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    rows, columns = map(int, topology.split("x"))
    assert JOB["parallelism"] * CONTAINER["resources"]["limits"]["google.com/tpu"] == rows * columns
    assert JOB["completions"] == JOB["parallelism"] and JOB["completionMode"] == "Indexed"


# What JAX detects


VARIABLES = sorted(set(re.findall(r"\b(?:SLURM|TPU|MEGASCALE|KUBERNETES|JOB|JAX)_[A-Z_]+\b", PAGE)))


def test_page_names_variables():
    assert "SLURM_LOCALID" in VARIABLES and "TPU_WORKER_HOSTNAMES" in VARIABLES


@pytest.mark.parametrize("variable", [name for name in VARIABLES if name != "TPU_NAME"])
def test_jax_reads_the_variable(variable):
    folder = Path(inspect.getfile(clusters)).parent
    sources = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]
    sources.append(inspect.getsource(distributed))
    assert any(re.search(rf"[\"']{variable}[\"']", source) for source in sources)


def detect():
    """Returns coordinator, number of processes, index and devices, as `--coordinator auto` does."""
    return clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 1)


def test_jax_detects_the_tasks_of_slurm(monkeypatch):
    variables = {
        "SLURM_JOB_ID": "4097",
        "SLURM_STEP_NODELIST": "gpu[001-002]",
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    coordinator, processes, index, devices = detect()
    assert coordinator.startswith("gpu001:")
    # One GPU for each process, which the script and the page rely on.
    assert (processes, index, list(devices)) == (8, 5, [1])


def test_jax_detects_the_hosts_of_gke(monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(clusters.cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost,host1,host2,host3")
    monkeypatch.setenv("TPU_WORKER_ID", "2")
    # Of one slice; a value of "" keeps JAX from asking the metadata server.
    for name in ("COORDINATOR_ADDRESS", "NUM_SLICES", "SLICE_ID"):
        monkeypatch.setenv(f"MEGASCALE_{name}", "")
    coordinator, processes, index, devices = detect()
    assert coordinator.startswith("localhost:")
    assert (processes, index, devices) == (4, 2, None)


def test_nothing_is_detected_on_this_machine(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert detect() == (None, None, None, None)
    assert jax.process_count() == 1
