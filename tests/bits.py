"""Trains one plan under many conditions, and prints which of them change a bit of the student and which only round.

`python tests/bits.py --python /path/to/another/python --write experiments/results/bits.md`

A network with batch norm teaches another of its kind, which sees images cropped and flipped at random: ten steps each,
two seeds, SGD with momentum. (Adam divides gradients by their own size, and the biases before batch norm have gradients
that are rounding alone: it would make steps of full length out of them.) Each condition is a process of its own, on the
CPU, and is compared with one device of this Python: "same bits", or the larger deviation of the two seeds,
‖difference‖ / ‖reference‖. The first three conditions compile anew; the others take the programs that the reference has
compiled, as far as they run the same ones.

The smooth network has SiLU and strides. The plain one, of jaxkd.models, has ReLU and max-pooling: where a value is next
to zero, or to another, rounding turns a whole summand of the gradient on or off.
"""

import argparse
import collections
import functools
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxkd import data, distill, evaluate, losses, models, parallel, runs
from jaxkd.models.convolution import Conv
from jaxkd.models.layers import BatchNorm

ROOT = str(Path(__file__).resolve().parent.parent)
STEPS = 10
AT_ONCE = 2
"""Processes."""

DEVICES = {
    "none": lambda rows: None,
    "jit": lambda rows: parallel.Sharded(parallel.make_mesh(model=rows)),
    "pmap": lambda rows: parallel.Mapped(),
    "population": lambda rows: parallel.Population(parallel.make_mesh(), 2),
}


# What a process does


class Stopped(Exception):
    pass


def examples(seed, count):
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 256, (count, 12, 12, 3), np.uint8)
    return {"inputs": images, "labels": draw.integers(0, 10, count).astype(np.int32)}


class Smooth(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for width in (16, 32):
            x = nn.silu(BatchNorm(use_running_average=not train)(Conv(width, (3, 3), strides=2)(x)))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


NETWORKS = {"smooth": Smooth(), "plain": models.PlainCNN(((16,), (32,)))}


def make_model(network, *, bf16):
    model = models.from_linen(NETWORKS[network])
    model = models.computing_in(model, jnp.bfloat16) if bf16 else model
    return models.standardized(model, [0.5] * 3, [0.25] * 3)


def hard(student, teachers, batch):
    return losses.hard_cross_entropy(student.logits, batch["labels"])


def soft(student, teachers, batch):
    return losses.distillation_loss(student.logits, teachers[0].logits, batch["labels"], temperature=4.0, alpha=0.9)


def make_plan(network, *, more, bf16):
    stage = functools.partial(
        distill.Stage,
        model=make_model(network, bf16=bf16),  # one for all stages, so that less is to be compiled
        data=examples(0, 45),  # no number of devices divides them, and batches lie across epochs
        tx=optax.sgd(0.02, momentum=0.9),
        steps=STEPS,
        batch_size=16,
    )
    taught = functools.partial(
        stage, loss=soft, teachers=("teacher",), augment=functools.partial(data.crop_and_flip, padding=2)
    )
    return (*([taught("assistant")] if more else []), stage("teacher", loss=hard), taught("student"))


def stop_halfway(append):
    """`Run.append_metrics` that ends the training when the student is halfway."""

    def stopping(run, record):
        append(run, record)
        if record["stage"] == "student" and record["step"] == STEPS // 2:
            raise Stopped

    return stopping


def train(folder, *, network, save_every, seeds=(0, 1), way="none", rows=1, more=False, bf16=False):
    """Trains the plan; returns the student's weights and its logits on other images, for each seed."""
    plan, run = make_plan(network, more=more, bf16=bf16), runs.open_run(folder, {})
    options = {"validation": examples(1, 20), "save_every": save_every, "devices": DEVICES[way](rows)}
    trained = distill.run_plan(plan, seeds, run, **options)
    predict, arrays = evaluate.make_predict(plan[-1].model), {}
    for seed, one in zip(seeds, trained["student"], strict=True):
        leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(one.variables))]
        logits = predict(one.variables, examples(2, 64)["inputs"])
        arrays |= {f"weights{seed}": np.concatenate(leaves), f"logits{seed}": logits}
    return arrays


def tell(folder, *, stop=False, one_core=False, **options):
    """Trains in a folder, and prints what came of it."""
    if one_core:  # before JAX starts its threads
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if stop:
        runs.Run.append_metrics = stop_halfway(runs.Run.append_metrics)
    counted = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: counted.update([event.rpartition("/")[2]]))
    try:
        arrays = train(Path(folder) / "run", save_every=0.0 if stop else 60.0, **options)
    except Stopped:
        print(json.dumps({"stopped": True}))
        return
    np.savez(Path(folder) / "arrays.npz", **arrays)
    told = {
        "digests": {name: runs.fingerprint([array]) for name, array in arrays.items()},
        "arrays": str(Path(folder) / "arrays.npz"),
        "compiled": counted["cache_misses"],
        "fetched": counted["cache_hits"],
        "environment": runs.environment(),
    }
    print(json.dumps(told))


# Conditions: functions of a network and a folder that return what a process told, or None where they cannot be had


def start(network, folder, *, python=sys.executable, anew=False, hash_seed=0, devices=1, **options):
    """Runs `tell` in a process of its own; returns what it told, and all that it `said`."""
    settings = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": str(not anew),
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONHASHSEED": str(hash_seed),
        "PYTHONPATH": os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")])),  # all run this source
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip(),
    }
    line = [python, __file__, "--train", json.dumps({"network": network, "folder": str(folder)} | options)]
    done = subprocess.run(line, env=settings, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        sys.exit(f"{python} failed with exit status {done.returncode}:\n{done.stderr}")
    return {"said": " ".join(done.stdout.split())} | json.loads(done.stdout.splitlines()[-1])


def resumed(network, folder):
    if not start(network, folder, stop=True).get("stopped"):
        sys.exit("the training that was to be stopped ended")
    told = start(network, folder)
    if "resumed at step" not in told["said"]:
        sys.exit("the training that was stopped began anew")
    return told


def warm(network, folder):
    told = start(network, folder)
    if told["compiled"] or not told["fetched"]:
        sys.exit(f"{told['fetched']} programs were in the compilation cache, and {told['compiled']} were not")
    return told


def on_one_core(network, folder):
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return start(network, folder, anew=True, one_core=True) if len(usable) > 1 else None


CONDITIONS = {
    "run again": functools.partial(start, anew=True),
    "another PYTHONHASHSEED": functools.partial(start, anew=True, hash_seed=1),
    "one core": on_one_core,
    "programs from the compilation cache": warm,
    "stopped by an exception and resumed": resumed,
    "the second seed alone": functools.partial(start, seeds=[1]),
    "another stage in the plan": functools.partial(start, more=True),
    "jit on 2 devices": functools.partial(start, devices=2, way="jit"),
    "jit on 8 devices": functools.partial(start, devices=8, way="jit"),
    "jit on 4 × 2 devices, the teacher divided": functools.partial(start, devices=8, way="jit", rows=2),
    "pmap on 2 devices": functools.partial(start, devices=2, way="pmap"),
    "pmap on 8 devices": functools.partial(start, devices=8, way="pmap"),
    "both seeds at once, on one device": functools.partial(start, way="population"),
    "both seeds at once, on 2 devices": functools.partial(start, devices=2, way="population"),
    "bfloat16": functools.partial(start, bf16=True),
}


# The table


def cell(what, told, reference):
    """Whether the arrays named so are the reference's, bit for bit, or else how far they are from them."""
    if told is None:
        return "not tried: it needs two cores"
    names = [name for name in told["digests"] if name.startswith(what)]
    if all(told["digests"][name] == reference["digests"][name] for name in names):
        return "same bits"
    with np.load(told["arrays"]) as here, np.load(reference["arrays"]) as there:
        return f"{max(deviation(here[name], there[name]) for name in names):.1e}"


def deviation(found, wanted):
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def footnote(reference):
    told, names = reference["environment"], ("Python", "jax", "jaxlib", "flax", "optax", "NumPy")
    versions = ", ".join(f"{name} {told[name.lower()]}" for name in names)
    return (
        f"{told['processor']}, {told['cores']} cores, {versions}, XLA_FLAGS={told['xla_flags']}. "
        f"SHA-256 of the reference's weights under seed 0: {reference['digests']['weights0']}."
    )


def make_table(network, conditions, scratch):
    """Yields the table's lines, as they become known."""
    yield from ("", f"| {network} network | student's weights | logits on test images |", "|:--|:--|:--|")
    scratch.mkdir()
    reference = start(network, scratch / "reference")
    with ThreadPoolExecutor(AT_ONCE) as executor:
        tasks = {name: executor.submit(run, network, scratch / name) for name, run in conditions.items()}
        for name, task in tasks.items():
            told = task.result()
            yield f"| {name} | {cell('weights', told, reference)} | {cell('logits', told, reference)} |"
    yield from ("", footnote(reference))


def version(python):
    """Names a Python by what a table is to say of it."""
    code = "import jax, platform; print(f'Python {platform.python_version()}, jax {jax.__version__}')"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=600, check=True).stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default: both")
    parser.add_argument("--only", nargs="+", choices=CONDITIONS, default=list(CONDITIONS), metavar="CONDITION")
    parser.add_argument("--python", nargs="+", default=[], help="other Pythons, with other versions of JAX")
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the table goes as well")
    parser.add_argument("--train", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        tell(**options.train)
        return
    others = {version(python): functools.partial(start, python=python) for python in options.python}
    conditions, lines = {name: CONDITIONS[name] for name in options.only} | others, []
    with tempfile.TemporaryDirectory() as scratch:
        for network in options.network:
            for line in make_table(network, conditions, Path(scratch) / network):
                print(line, flush=True)
                lines.append(line)
    if options.write:
        head = ["# What changes no bit, and what rounds", "", *__doc__.splitlines()]
        options.write.write_text("\n".join([*head, *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
