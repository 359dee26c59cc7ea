"""One of several processes that train a plan together: `host.py ADDRESS HOSTS HOST FOLDER STEPS`.

It prints what the trained networks weigh. Negative steps: it stops behind so many.
"""

import json
import os
import sys

if (
    __name__ == "__main__"
):  # and not where doctests are looked for, whose process has devices of its own
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import flax.linen as nn
import jax
import numpy as np
import optax

from jaxkd import distill, losses, models, runs
from jaxkd.models.layers import BatchNorm


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))


def examples(seed, count):
    inputs = np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)
    return {"inputs": inputs, "labels": inputs[:, :3].argmax(-1).astype(np.int32)}


def hard(student, teachers, batch, context):
    return losses.hard_cross_entropy(student.logits, batch["labels"])


def soft(student, teachers, batch, context):
    return losses.kl_divergence(student.logits, teachers[0].logits, temperature=2.0)


def stage(name, **more):
    values = {
        "data": examples(0, 45),
        "loss": hard,
        "tx": optax.sgd(0.1),
        "steps": 12,
        "batch_size": 15,
    }
    return distill.Stage(name, models.from_linen(Net()), **values | more)


class Stopped(Exception):
    pass


def stopping_behind(step, append):
    def stop(run, record):
        append(run, record)
        if record["step"] >= step and record["stage"] == "cached":
            raise Stopped

    return stop


def main(address, hosts, host, folder, steps):
    if int(hosts) > 1:
        distill.initialize_distributed(address, num_processes=int(hosts), process_id=int(host))
        assert jax.device_count() == 2 * jax.local_device_count() == 4
    if int(steps) < 0:
        runs.Run.append_metrics = stopping_behind(-int(steps), runs.Run.append_metrics)
    plan = [
        stage("teacher"),
        stage("live", teachers=("teacher",), loss=soft),
        stage("cached", teachers=("teacher",), loss=soft, cache_teachers=True),
    ]
    run = runs.open_run(folder, {})
    placement = distill.MeshPlacement(distill.make_mesh())
    try:
        trained = distill.run_plan(
            plan, [0], run, validation=examples(1, 20), save_every=0, placement=placement
        )
    except Stopped:
        trained = {}
    leaves = {name: jax.tree.leaves(one.variables) for name, (one,) in trained.items()}
    sums = {name: [float(np.abs(leaf).sum()) for leaf in found] for name, found in leaves.items()}
    print(
        json.dumps(
            sums | {name: [one.validation_accuracy] for name, (one,) in trained.items()}
            if trained
            else {}
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
