"""Trains one plan under many conditions and compares the bits of the students.

A network with batch norm teaches another of its kind on randomly cropped and flipped images: ten
steps each, two seeds, SGD with momentum. (Adam divides gradients by their own size. The biases
before batch norm have gradients of pure rounding error, from which Adam would make steps of full
length.) Each condition runs in its own process on the CPU and is compared with one device of this
Python. A cell says "same bits", or gives the larger deviation of the two seeds,
‖difference‖ / ‖reference‖. The first three conditions compile everything again; the others load the
programs that they share with the reference from the compilation cache.

The smooth network has SiLU and strides. The plain one, from jaxkd.models, has ReLU and max-pooling:
where a value is close to zero, or to another value, rounding switches a whole term of the gradient
on or off.

Command: `python -m experiments.benchmarks.bit_equality --write experiments/results/bits.md`
With other versions of JAX: `--python /path/to/python /path/to/another/python`
"""

import collections
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import USER_XLA_FLAGS
from experiments.common import cli
from jaxkd import data, distill, evaluate, losses, models, runs
from jaxkd.models.convolution import Conv
from jaxkd.models.layers import BatchNorm

TITLE = "# Bits of a student under many conditions"
MODULE = "experiments.benchmarks.bit_equality"
ROOT = Path(__file__).resolve().parents[2]
STEPS = 10
CONCURRENT_PROCESSES = 2

PLACEMENTS: dict[str, Callable[[int], Any]] = {
    "single": lambda teacher_shards: None,
    "mesh": lambda teacher_shards: distill.MeshPlacement(distill.make_mesh(model=teacher_shards)),
    "pmap": lambda teacher_shards: distill.PmapPlacement(),
    "vectorized": lambda teacher_shards: distill.VectorizedPlacement(distill.make_mesh(), 2),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    network: tuple[Literal["smooth", "plain"], ...] = ("smooth", "plain")
    """Networks to train."""
    only: tuple[str, ...] = ()
    """Try only these conditions, named as in the rows of experiments/results/bits.md."""
    python: tuple[str, ...] = ()
    """Further Python interpreters to compare with, such as of other versions of JAX."""
    write: Path | None = None
    """Markdown file to write the tables to, besides the terminal."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        cli.require(len(self.network) > 0, "--network: choose smooth, plain or both")
        for name in self.only:
            cli.require(
                name in CONDITIONS,
                f"--only {name!r}: not a condition; experiments/results/bits.md lists them",
            )
        if self.write:
            # Now, not after minutes of training.
            cli.require(
                self.write.parent.is_dir() and not self.write.is_dir(),
                f"--write {self.write}: must be a file in a folder that exists",
            )
        for python in self.python:
            cli.require(
                shutil.which(python) is not None, f"--python {python}: there is no such program"
            )


# The following functions run in the worker processes.


class TrainingStopped(Exception):
    """Raised to stop a training halfway."""


class Smooth(nn.Module):
    """A convolutional network whose gradient is a smooth function of its inputs."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes the logits."""
        for width in (16, 32):
            # Strides instead of max-pooling, whose gradient jumps where two values are equal.
            x = Conv(width, (3, 3), strides=2)(x)
            x = nn.silu(BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


NETWORKS = {"smooth": Smooth(), "plain": models.PlainCNN(((16,), (32,)))}


def make_examples(seed: int, count: int) -> dict[str, np.ndarray]:
    """Draws images and labels."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 12, 12, 3), np.uint8)
    return {"inputs": images, "labels": generator.integers(0, 10, count).astype(np.int32)}


def make_model(network: str, *, bf16: bool) -> models.Model:
    """Makes the model that is both teacher and student."""
    model = models.from_linen(NETWORKS[network])
    model = models.with_compute_dtype(model, jnp.bfloat16) if bf16 else model
    return models.with_input_normalization(model, np.full(3, 0.5), np.full(3, 0.25))


def hard_loss(
    student: models.Outputs,
    teachers: tuple[models.Outputs, ...],
    batch: distill.Batch,
    context: distill.LossContext,
) -> jax.Array:
    """Computes the cross-entropy with the labels."""
    return losses.hard_cross_entropy(student.logits, batch["labels"])


def soft_loss(
    student: models.Outputs,
    teachers: tuple[models.Outputs, ...],
    batch: distill.Batch,
    context: distill.LossContext,
) -> jax.Array:
    """Computes the distillation loss."""
    return losses.distillation_loss(
        student.logits, teachers[0].logits, batch["labels"], temperature=4.0, alpha=0.9
    )


def make_plan(network: str, *, extra_stage: bool, bf16: bool) -> tuple[distill.Stage, ...]:
    """Makes a plan of a teacher and a student, with another student before them if asked for."""
    stage = functools.partial(
        distill.Stage,
        # Stages that share a model share compiled programs.
        model=make_model(network, bf16=bf16),
        # No number of devices divides 45 examples, and some batches span two epochs.
        data=make_examples(0, 45),
        tx=optax.sgd(0.02, momentum=0.9),
        steps=STEPS,
        batch_size=16,
    )
    distilled = functools.partial(
        stage,
        loss=soft_loss,
        teachers=("teacher",),
        augment=functools.partial(data.crop_and_flip, padding=2),
    )
    plan = (stage("teacher", loss=hard_loss), distilled("student"))
    return (distilled("assistant"), *plan) if extra_stage else plan


def stop_halfway(append_metrics: Callable[..., None]) -> Callable[..., None]:
    """Wraps `Run.append_metrics` to stop the training when the student is halfway."""

    def append_or_stop(run: runs.Run, record: dict) -> None:
        append_metrics(run, record)
        if record["stage"] == "student" and record["step"] == STEPS // 2:
            raise TrainingStopped

    return append_or_stop


def train(
    folder: Path,
    *,
    network: str,
    save_every: float,
    seeds: Sequence[int] = (0, 1),
    placement: str = "single",
    teacher_shards: int = 1,
    extra_stage: bool = False,
    bf16: bool = False,
) -> dict[str, np.ndarray]:
    """Trains the plan in a folder, continuing a training that was stopped there.

    Args:
        folder: Folder of the run.
        network: Key of `NETWORKS`.
        save_every: Seconds between checkpoints.
        seeds: Seeds of the students.
        placement: Key of `PLACEMENTS`.
        teacher_shards: Devices over which the mesh placement divides the teacher.
        extra_stage: Adds another student to the plan.
        bf16: Computes in bfloat16.

    Returns:
        `weights0`, `logits0` and so on: the student's weights and its logits on other images, for
        each seed.
    """
    plan = make_plan(network, extra_stage=extra_stage, bf16=bf16)
    trained = distill.run_plan(
        plan,
        seeds,
        runs.open_run(folder, {}),
        validation=make_examples(1, 20),
        save_every=save_every,
        placement=PLACEMENTS[placement](teacher_shards),
    )
    predict = evaluate.make_predict(plan[-1].model)
    test_images = make_examples(2, 64)["inputs"]
    arrays = {}
    for seed, student in zip(seeds, trained["student"], strict=True):
        leaves = jax.tree.leaves(jax.device_get(student.variables))
        arrays[f"weights{seed}"] = np.concatenate([np.ravel(leaf) for leaf in leaves])
        arrays[f"logits{seed}"] = predict(student.variables, test_images)
    return arrays


def run_in_worker(
    folder: str, *, stop: bool = False, one_core: bool = False, **options: Any
) -> None:
    """Trains in a folder and prints the outcome as a line of JSON.

    Args:
        folder: Scratch folder of the condition.
        stop: Stops the training halfway.
        one_core: Uses a single CPU core.
        **options: Of `train`.
    """
    # JAX sizes its thread pool when it starts, which is later than this.
    if one_core:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if stop:
        runs.Run.append_metrics = stop_halfway(runs.Run.append_metrics)
    events: collections.Counter[str] = collections.Counter()
    jax.monitoring.register_event_listener(
        lambda event, **_: events.update([event.rpartition("/")[2]])
    )
    # With 0 seconds every step leaves a checkpoint to resume from.
    save_every = 0.0 if stop else 60.0
    try:
        arrays = train(Path(folder) / "run", save_every=save_every, **options)
    except TrainingStopped:
        print(json.dumps({"stopped": True}))
        return
    path = Path(folder) / "arrays.npz"
    named_arrays: dict[str, Any] = dict(arrays)
    np.savez(path, **named_arrays)
    outcome = {
        "digests": {name: runs.fingerprint([array]) for name, array in arrays.items()},
        "arrays": str(path),
        "cache_misses": events["cache_misses"],
        "cache_hits": events["cache_hits"],
        "environment": runs.describe_environment(),
    }
    print(json.dumps(outcome))


# A condition takes a network and a folder and returns the outcome of a worker, or `None` if this
# machine cannot provide the condition.


def start_worker(
    network: str,
    folder: Path,
    *,
    python: str = sys.executable,
    use_cache: bool = True,
    hash_seed: int = 0,
    devices: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Calls `run_in_worker` in a process of its own.

    Args:
        network: Key of `NETWORKS`.
        folder: Scratch folder of the condition; the compilation cache is beside it.
        python: Python interpreter.
        use_cache: Loads compiled programs from the cache and adds new ones.
        hash_seed: Value of PYTHONHASHSEED.
        devices: Number of virtual CPU devices.
        **options: Of `run_in_worker`.

    Returns:
        The worker's outcome, and all that it printed as `stdout`.
    """
    # Every interpreter must import this source, also one with another version installed.
    python_path = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    # Without the minimum compile time, programs that compile quickly would not be cached.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": str(use_cache),
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONHASHSEED": str(hash_seed),
        "PYTHONPATH": os.pathsep.join(python_path),
        # The worker adds what its own version of JAX needs, and aborts at an unknown flag.
        "XLA_FLAGS": f"{USER_XLA_FLAGS} --xla_force_host_platform_device_count={devices}".strip(),
    }
    arguments = json.dumps({"network": network, "folder": str(folder)} | options)
    worker = subprocess.run(
        [python, "-m", MODULE, "--worker", arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if worker.returncode:
        sys.exit(f"{python} failed with exit status {worker.returncode}:\n{worker.stderr}")
    outcome = json.loads(worker.stdout.splitlines()[-1])
    return {"stdout": " ".join(worker.stdout.split())} | outcome


def stop_and_resume(network: str, folder: Path) -> dict[str, Any]:
    """Stops a training by an exception and resumes it."""
    if not start_worker(network, folder, stop=True).get("stopped"):
        sys.exit("the training that should have stopped halfway has finished")
    outcome = start_worker(network, folder)
    if "resumed at step" not in outcome["stdout"]:
        sys.exit("the training that was stopped started from the beginning")
    return outcome


def train_from_cache(network: str, folder: Path) -> dict[str, Any]:
    """Trains with programs that all come from the compilation cache."""
    outcome = start_worker(network, folder)
    hits, misses = outcome["cache_hits"], outcome["cache_misses"]
    if misses or not hits:
        sys.exit(f"the compilation cache had {hits} programs and lacked {misses}")
    return outcome


def train_on_one_core(network: str, folder: Path) -> dict[str, Any] | None:
    """Trains on one core, if this process may use several."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    if len(cores) < 2:
        return None
    return start_worker(network, folder, use_cache=False, one_core=True)


Condition = Callable[[str, Path], dict[str, Any] | None]

_on_mesh = functools.partial(start_worker, placement="mesh")
_on_pmap = functools.partial(start_worker, placement="pmap")
_vectorized = functools.partial(start_worker, placement="vectorized")
CONDITIONS: dict[str, Condition] = {
    "repeated run": functools.partial(start_worker, use_cache=False),
    "another PYTHONHASHSEED": functools.partial(start_worker, use_cache=False, hash_seed=1),
    "one core": train_on_one_core,
    "programs from the compilation cache": train_from_cache,
    "stopped by an exception and resumed": stop_and_resume,
    "second seed alone": functools.partial(start_worker, seeds=[1]),
    "extra stage in the plan": functools.partial(start_worker, extra_stage=True),
    "jit on 2 devices": functools.partial(_on_mesh, devices=2),
    "jit on 8 devices": functools.partial(_on_mesh, devices=8),
    "jit on 4 × 2 devices, teacher sharded": functools.partial(
        _on_mesh, devices=8, teacher_shards=2
    ),
    "pmap on 2 devices": functools.partial(_on_pmap, devices=2),
    "pmap on 8 devices": functools.partial(_on_pmap, devices=8),
    "vectorized seeds on one device": _vectorized,
    "vectorized seeds on 2 devices": functools.partial(_vectorized, devices=2),
    "bfloat16": functools.partial(start_worker, bf16=True),
}


def compare(prefix: str, outcome: dict[str, Any] | None, reference: dict[str, Any]) -> str:
    """Compares the arrays whose names begin with a prefix with those of the reference.

    Args:
        prefix: "weights" or "logits".
        outcome: Of a worker, or `None` if the condition could not be tried.
        reference: Outcome of the reference.

    Returns:
        A cell of the table: "same bits" or the largest deviation.
    """
    if outcome is None:
        return "not tried: it needs two cores"
    names = [name for name in outcome["digests"] if name.startswith(prefix)]
    if all(outcome["digests"][name] == reference["digests"][name] for name in names):
        return "same bits"
    with (
        np.load(outcome["arrays"]) as arrays,
        np.load(reference["arrays"]) as reference_arrays,
    ):
        deviations = [deviation(arrays[name], reference_arrays[name]) for name in names]
    return f"{max(deviations):.1e}"


def deviation(values: np.ndarray, reference: np.ndarray) -> float:
    """Computes ‖values − reference‖ / ‖reference‖ in float64."""
    values = values.astype(np.float64)
    reference = reference.astype(np.float64)
    return float(np.linalg.norm(values - reference) / np.linalg.norm(reference))


def describe_reference(reference: dict[str, Any]) -> str:
    """Formats the environment and the digest of the reference."""
    environment = reference["environment"]
    packages = ("Python", "jax", "jaxlib", "flax", "optax", "NumPy")
    versions = ", ".join(f"{package} {environment[package.lower()]}" for package in packages)
    return (
        f"{environment['processor']}, {environment['cores']} cores, {versions}, "
        f"XLA_FLAGS={environment['xla_flags']}. "
        f"SHA-256 of the reference's weights under seed 0: {reference['digests']['weights0']}."
    )


def make_table(network: str, conditions: Mapping[str, Condition], scratch: Path) -> Iterator[str]:
    """Trains a network under all conditions and yields each line of the table when it is known."""
    yield ""
    yield f"| {network} network | student's weights | logits on test images |"
    yield "|:--|:--|:--|"
    scratch.mkdir()
    # The reference runs first and alone, so that it fills the compilation cache for the others.
    reference = start_worker(network, scratch / "reference")
    # Threads suffice, because they only wait for the workers' processes.
    with ThreadPoolExecutor(CONCURRENT_PROCESSES) as executor:
        tasks = {
            name: executor.submit(condition, network, scratch / name)
            for name, condition in conditions.items()
        }
        for name, task in tasks.items():
            outcome = task.result()
            weights = compare("weights", outcome, reference)
            logits = compare("logits", outcome, reference)
            yield f"| {name} | {weights} | {logits} |"
    yield ""
    yield describe_reference(reference)


def describe_python(python: str) -> str:
    """Names a Python interpreter by its version and that of JAX."""
    code = (
        "import jax, platform; print(f'Python {platform.python_version()}, jax {jax.__version__}')"
    )
    return subprocess.run(
        [python, "-c", code], capture_output=True, text=True, timeout=600, check=True
    ).stdout.strip()


def main(config: Config) -> None:
    """Trains under the conditions, prints the tables and writes them to a file if asked for."""
    config.check()
    conditions = {name: CONDITIONS[name] for name in config.only or CONDITIONS}
    for python in config.python:
        conditions[describe_python(python)] = functools.partial(start_worker, python=python)
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        for network in config.network:
            for line in make_table(network, conditions, Path(scratch) / network):
                print(line, flush=True)
                lines.append(line)
    if config.write:
        header = [TITLE, "", *(__doc__ or "").splitlines()]
        config.write.write_text("\n".join([*header, *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    # `start_worker` passes options that are no concern of the command line's users.
    if sys.argv[1:2] == ["--worker"]:
        run_in_worker(**json.loads(sys.argv[2]))
    else:
        cli.run(main, Config, __doc__, resumes=False)
