"""Kills trainings and damages checkpoints, and checks that the results do not change.

A training that was killed at a random moment is started again until it ends; its folder must then
equal that of an undisturbed training. A checkpoint of which a random bit was flipped must be
skipped in favour of the one before. The exit status is 1 if either fails.

Command: python -m experiments.benchmarks.crash_recovery --kills 50 --flips 100 --seed 0
"""

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import cli
from jaxkd import distill, losses, models, runs
from jaxkd.runs import checkpoints, verify

MODULE = "experiments.benchmarks.crash_recovery"
ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
# Printed by a worker when its imports are done, so that the kills hit the training.
READY = "ready"


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    kills: int = 50
    """Number of kills, over as many trainings as they take."""
    flips: int = 100
    """Number of bits to flip, one at a time."""
    seed: int = 0
    """Seed of the moments of the kills and of the bits."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        cli.require(self.kills >= 0, f"--kills {self.kills}: must be at least 0")
        cli.require(self.flips >= 0, f"--flips {self.flips}: must be at least 0")


def make_model() -> models.Model:
    """Makes a model of one layer with dropout, so that a step also draws random bits."""

    def init(key: jax.Array, inputs: Any) -> dict:
        kernel = jax.random.normal(key, (inputs.shape[-1], 3))
        return {"params": {"kernel": kernel}, "batch_stats": {}}

    def apply(
        variables: dict, inputs: Any, *, train: bool, key: Any = None
    ) -> tuple[models.Outputs, dict]:
        keep = jax.random.bernoulli(key, 0.9, inputs.shape) if train else True
        logits = jnp.where(keep, inputs, 0.0) @ variables["params"]["kernel"]
        return models.Outputs(logits, {}), {}

    return models.Model(init, apply)


def make_examples(seed: int) -> dict[str, np.ndarray]:
    """Draws inputs and labels that a linear model can learn."""
    inputs = np.random.default_rng(seed).normal(size=(60, 20)).astype(np.float32)
    return {"inputs": inputs, "labels": inputs[:, :3].argmax(1).astype(np.int32)}


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
    """Computes the KL divergence from the teacher."""
    return losses.kl_divergence(student.logits, teachers[0].logits, temperature=2.0)


def train(folder: Path) -> None:
    """Trains a teacher and a student, with a checkpoint after each step."""
    print(READY, flush=True)
    examples = make_examples(0)
    run = runs.open_run(folder, {"steps": STEPS}, arrays=examples.values())
    common = {"tx": optax.adam(0.1), "steps": STEPS, "batch_size": 16}
    plan = (
        distill.Stage("teacher", make_model(), examples, hard_loss, **common),
        distill.Stage(
            "student", make_model(), examples, soft_loss, teachers=("teacher",), **common
        ),
    )
    # A checkpoint after every step, so that many kills hit a save.
    trained = distill.run_plan(plan, [0], run, validation=make_examples(1), save_every=0.0)
    run.write_results(
        [
            runs.ResultRow(name, accuracy=(model.validation_accuracy,))
            for name, (model,) in trained.items()
        ]
    )


def start_worker(folder: Path) -> subprocess.Popen:
    """Starts a process that trains in a folder, and returns when its training begins."""
    # The flags of a test environment ask for virtual devices, of which a worker needs none.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["JAX_PLATFORMS"] = "cpu"
    python_path = filter(None, [str(ROOT), environment.get("PYTHONPATH")])
    environment["PYTHONPATH"] = os.pathsep.join(python_path)
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE, "--worker", str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    if not process.stdout.readline().startswith(READY):
        sys.exit(f"the training in {folder} did not start: exit status {process.wait()}")
    return process


def wait_for(process: subprocess.Popen) -> bool:
    """Waits for a worker, and returns True if it finished and False if it was killed."""
    process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        sys.exit(f"a training failed with exit status {process.returncode}")
    return process.returncode == 0


def find_incomplete(folder: Path) -> set[tuple[Path, int]]:
    """Returns the checkpoints, with their inodes, that a kill left without a manifest."""
    return {
        # A later save may reuse the name; its inode is another one.
        (path, path.stat().st_ino)
        for path in folder.glob("checkpoints/*/*/*")
        if path.is_dir() and not path.with_name(f"{path.name}.json").exists()
    }


def kill_trainings(kills: int, generator: random.Random, scratch: Path) -> int:
    """Kills trainings at random moments, prints a line for each, and compares what they leave.

    Args:
        kills: Number of kills over all trainings.
        generator: Draws the moments.
        scratch: Folder of the runs.

    Returns:
        The number of kills in trainings that ended with the bits of the undisturbed one.
    """
    reference = scratch / "undisturbed"
    process = start_worker(reference)
    start = time.monotonic()
    wait_for(process)
    duration = time.monotonic() - start
    killed = 0
    killed_in_save = 0
    harmless = 0
    while killed < kills:
        folder = scratch / f"run{killed}"
        killed_before = killed
        finished = False
        while not finished:
            incomplete_before = find_incomplete(folder)
            process = start_worker(folder)
            if killed < kills:
                time.sleep(generator.uniform(0, duration))
                process.kill()
            # The training may have finished before the kill, which then does not count.
            finished = wait_for(process)
            killed += not finished
            killed_in_save += bool(find_incomplete(folder) - incomplete_before)
        differences = verify.compare_runs(reference, folder).differences
        kills_of_run = killed - killed_before
        harmless += 0 if differences else kills_of_run
        print(f"training killed {kills_of_run} times: {differences or 'identical'}", flush=True)
        shutil.rmtree(folder)
    print(
        f"{harmless} of {kills} kills, {killed_in_save} of them within a save, "
        "ended with the bits of the undisturbed run"
    )
    return harmless


def flip_bits(flips: int, generator: random.Random, folder: Path) -> int:
    """Flips bits of the newer of two checkpoints, one at a time, and prints those not detected.

    Args:
        flips: Number of flips.
        generator: Draws the bits.
        folder: Folder of the checkpoints.

    Returns:
        The number of flips that were detected.
    """
    trees = [
        {"w": jnp.arange(300.0) * step, "half": jnp.full((2, 3), step, jnp.bfloat16)}
        for step in (1, 2)
    ]
    for step, tree in enumerate(trees, 1):
        # A number in the notes with a flipped digit is still valid JSON, only the checksum differs.
        checkpoints.save(folder, step, tree, notes={"seconds": 1e-5 * step})
    paths = [folder / "2.json", *sorted((folder / "2").rglob("*"))]
    # An empty file has no bit to flip.
    files = [path for path in paths if path.is_file() and path.stat().st_size]
    detected = 0
    for _ in range(flips):
        path = generator.choice(files)
        content = path.read_bytes()
        index = generator.randrange(len(content))
        bit = generator.randrange(8)
        damaged = bytearray(content)
        damaged[index] ^= 1 << bit
        path.write_bytes(damaged)
        if falls_back(folder, trees):
            detected += 1
        else:
            print(f"bit {bit} of byte {index} of {path.relative_to(folder)} was not detected")
        path.write_bytes(content)
    restored = checkpoints.restore(folder, trees[0])
    if restored is None or restored.step != 2:
        sys.exit("the newer checkpoint is not restored after its bits were flipped back")
    print(f"{detected} of {flips} flipped bits in {len(files)} files were detected")
    return detected


def falls_back(folder: Path, trees: list[dict]) -> bool:
    """Returns True if the older checkpoint is restored intact, with a warning about the newer."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        restored = checkpoints.restore(folder, trees[0])
    if restored is None or restored.step != 1:
        return False
    is_intact = jax.tree.all(jax.tree.map(np.array_equal, restored.tree, trees[0]))
    is_reported = any("2 is damaged and passed over" in str(warning.message) for warning in caught)
    return is_intact and is_reported


def main(config: Config) -> None:
    """Runs both tests and exits with status 1 if either of them fails."""
    config.check()
    generator = random.Random(config.seed)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        detected = flip_bits(config.flips, generator, Path(scratch) / "flips")
        harmless = kill_trainings(config.kills, generator, Path(scratch))
    passed = (harmless, detected) == (config.kills, config.flips)
    print(f"{'passed' if passed else 'FAILED'} in {time.monotonic() - start:.0f} s")
    if not passed:
        sys.exit(1)


if __name__ == "__main__":
    # `start_worker` passes a folder, which is no option of the command line's users.
    if sys.argv[1:2] == ["--worker"]:
        train(Path(sys.argv[2]))
    else:
        cli.run(main, Config, __doc__, resumes=False)
