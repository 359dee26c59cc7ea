"""Kills a training at random moments and flips random bits of checkpoints, and says whether any harm came of it.

python tests/crashes.py --kills 50 --flips 100 --seed 0

A training that is killed is started again until it ends; what it leaves must be what one left that nobody disturbed. A
checkpoint of which a bit is flipped must be passed over for the one before. The exit status is 1 if either fails.
"""

import argparse
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

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxkd import checkpoints, distill, losses, models, runs, verify

STEPS = 24
BEGINS = "begins"


def dense():
    """A network of one layer, with dropout, so that draws of every kind take part."""

    def init(key, inputs):
        return {"params": {"kernel": jax.random.normal(key, (inputs.shape[-1], 3))}, "batch_stats": {}}

    def apply(variables, inputs, *, train, key=None):
        kept = jax.random.bernoulli(key, 0.9, inputs.shape) if train else True
        return models.Outputs(jnp.where(kept, inputs, 0.0) @ variables["params"]["kernel"], {}), {}

    return models.Model(init, apply)


def examples(seed):
    inputs = np.random.default_rng(seed).normal(size=(60, 20)).astype(np.float32)
    return {"inputs": inputs, "labels": inputs[:, :3].argmax(1).astype(np.int32)}


def train(folder):
    """A teacher and a student, with a checkpoint after each step."""

    def hard(student, teachers, batch):
        return losses.hard_cross_entropy(student.logits, batch["labels"])

    def soft(student, teachers, batch):
        return losses.kl_divergence(student.logits, teachers[0].logits, temperature=2.0)

    print(BEGINS, flush=True)
    run = runs.open_run(folder, {"steps": STEPS}, arrays=examples(0).values())
    common = {"tx": optax.adam(0.1), "steps": STEPS, "batch_size": 16}
    plan = (
        distill.Stage("teacher", dense(), examples(0), hard, **common),
        distill.Stage("student", dense(), examples(0), soft, teachers=("teacher",), **common),
    )
    trained = distill.run_plan(plan, [0], run, validation=examples(1), save_every=0.0)
    run.write_results([{"name": name, "accuracy": one.validation_accuracy} for name, (one,) in trained.items()])


def start(folder):
    """A process that trains there, at the moment when it begins."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    line = [sys.executable, __file__, "--train", str(folder)]
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)
    if not process.stdout.readline().startswith(BEGINS):
        sys.exit(f"the training in {folder} did not begin: exit status {process.wait()}")
    return process


def ends(process):
    """Waits for a process; returns whether it ended by itself."""
    process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        sys.exit(f"a training failed with exit status {process.returncode}")
    return process.returncode == 0


def incomplete(folder):
    """Checkpoints that a kill cut off."""
    found = (path for path in folder.glob("checkpoints/*/*/*") if path.is_dir())
    return {(path, path.stat().st_ino) for path in found if not path.with_name(f"{path.name}.json").exists()}


def kill_often(kills, draw, scratch):
    """Kills trainings, `kills` times in all; returns how many of these did no harm, and says so."""
    process, began = start(scratch / "unbroken"), time.monotonic()
    ends(process)
    duration = time.monotonic() - began
    killed = within = unharmed = 0
    while killed < kills:
        folder, before, ended = scratch / f"run{killed}", killed, False
        while not ended:
            cut_off = incomplete(folder)
            process = start(folder)
            if killed < kills:
                time.sleep(draw.uniform(0, duration))
                process.kill()
            ended = ends(process)
            killed += not ended
            within += bool(incomplete(folder) - cut_off)
        differences = verify.compare(scratch / "unbroken", folder).differences
        unharmed += 0 if differences else killed - before
        print(f"a training killed {killed - before} times: {differences or 'identical'}", flush=True)
        shutil.rmtree(folder)
    print(f"{unharmed} of {kills} kills, {within} of them within a save, ended with the unbroken run's bits")
    return unharmed


def flip_often(flips, draw, folder):
    """Flips bits of the newest of two checkpoints, one at a time; returns how many were noticed, and says so."""
    trees = [{"w": jnp.arange(300.0) * step, "half": jnp.full((2, 3), step, jnp.bfloat16)} for step in (1, 2)]
    for step, tree in enumerate(trees, 1):
        checkpoints.save(folder, step, tree, notes={"seconds": 1e-5 * step})
    files = [folder / "2.json", *sorted(path for path in (folder / "2").rglob("*") if path.is_file())]
    files = [path for path in files if path.stat().st_size]
    noticed = 0
    for _ in range(flips):
        path = draw.choice(files)
        content = path.read_bytes()
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        if is_noticed(folder, trees):
            noticed += 1
        else:
            print(f"bit {bit} of byte {place} of {path.relative_to(folder)} was not noticed")
        path.write_bytes(content)
    if checkpoints.restore(folder, trees[0]).step != 2:
        sys.exit("the checkpoint whose bits were flipped back is not restored")
    print(f"{noticed} of {flips} flipped bits in {len(files)} files were noticed")
    return noticed


def is_noticed(folder, trees):
    """Whether the older checkpoint is restored, as it was saved, with a warning on the newer one."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = checkpoints.restore(folder, trees[0])
    same = found is not None and found.step == 1 and jax.tree.all(jax.tree.map(np.array_equal, found.tree, trees[0]))
    return same and any("2 is damaged and passed over" in str(one.message) for one in told)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train)
        return
    draw, began = random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        noticed = flip_often(options.flips, draw, Path(scratch) / "flips")
        unharmed = kill_often(options.kills, draw, Path(scratch))
    safe = (unharmed, noticed) == (options.kills, options.flips)
    print(f"{'no harm' if safe else 'HARM'} in {time.monotonic() - began:.0f} s")
    sys.exit(not safe)


if __name__ == "__main__":
    main()
